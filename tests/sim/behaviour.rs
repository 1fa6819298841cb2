//! What a scripted process does.

use std::time::Duration;

use pm::policy::vocabulary::Retry;

use crate::rng::Rng;

pub(crate) const fn millis(n: u64) -> Duration {
    Duration::from_millis(n)
}

pub(crate) const fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// A process. Times count from its birth, or from what it answers.
#[derive(Clone, Debug)]
pub(crate) struct Behaviour {
    /// Why there is no process.
    pub(crate) no_spawn: Option<Retry>,
    /// When it listens, and says so where it is asked to; `None`: never.
    pub(crate) ready_after: Option<Duration>,
    /// When it listens, where that is later than being ready.
    pub(crate) listens_after: Option<Duration>,
    /// The keys it listens on.
    pub(crate) keys: u32,
    /// When it fails its health check for ever.
    pub(crate) sick_after: Option<Duration>,
    /// When it uses more memory than it may, for ever.
    pub(crate) fat_after: Option<Duration>,
    /// When it ends by itself, with this code.
    pub(crate) exits_after: Option<(Duration, i32)>,
    /// How long after the kill signal it ends; `None`: it ignores it.
    pub(crate) obeys_after: Option<Duration>,
    /// How long open connections last; `None`: the agent never answers.
    pub(crate) drains_after: Option<Duration>,
    /// What the agent says about kill listeners; `None`: nothing.
    pub(crate) kill_listeners: Option<u32>,
    /// How long after `disconnect` the channel ends; `None`: never.
    pub(crate) disconnects_after: Option<Duration>,
    /// How long what it leaves behind lasts.
    pub(crate) leftovers_for: Duration,
    /// How long hand-overs stay unanswered.
    pub(crate) settles_after: Duration,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self {
            no_spawn: None,
            ready_after: Some(millis(50)),
            listens_after: None,
            keys: 1,
            sick_after: None,
            fat_after: None,
            exits_after: None,
            obeys_after: Some(millis(5)),
            drains_after: Some(millis(1)),
            kill_listeners: Some(0),
            disconnects_after: Some(millis(1)),
            leftovers_for: millis(1),
            settles_after: millis(1),
        }
    }
}

impl Behaviour {
    pub(crate) fn never_ready() -> Self {
        Self { ready_after: None, ..Self::default() }
    }

    pub(crate) fn crashes_after(after: Duration) -> Self {
        Self { exits_after: Some((after, 1)), ..Self::default() }
    }

    pub(crate) fn sick_after(after: Duration) -> Self {
        Self { sick_after: Some(after), ..Self::default() }
    }

    pub(crate) fn fat_after(after: Duration) -> Self {
        Self { fat_after: Some(after), ..Self::default() }
    }

    pub(crate) fn ignores_signals() -> Self {
        Self { obeys_after: None, ..Self::default() }
    }

    pub(crate) fn random(rng: &mut Rng) -> Self {
        let mut one = Self::default();
        match rng.below(12) {
            0 => one.no_spawn = Some(if rng.chance(30) { Retry::Never } else { Retry::Backoff }),
            1 => one.ready_after = None,
            2 => one.ready_after = Some(millis(rng.below(7000))),
            3 => one.exits_after = Some((millis(rng.below(3000)), i32::from(rng.chance(70)))),
            4 => one.exits_after = Some((millis(rng.below(200)), 1)),
            6..=8 => one.sick_after = Some(millis(rng.below(6000))),
            5 => one.listens_after = Some(millis(rng.below(4000))),
            _ => {}
        }
        match rng.below(8) {
            0 => one.obeys_after = None,
            1 => one.obeys_after = Some(millis(rng.below(12_000))),
            _ => {}
        }
        match rng.below(8) {
            0 => one.drains_after = None,
            1 => one.drains_after = Some(millis(rng.below(8000))),
            2 => one.disconnects_after = None,
            3 => one.kill_listeners = None,
            4 => one.kill_listeners = Some(1),
            5 => one.leftovers_for = millis(rng.below(2000)),
            6 => one.settles_after = millis(rng.below(1000)),
            _ => {}
        }
        one.keys = u32::try_from(rng.below(2)).unwrap() + 1;
        one
    }
}
