//! A slot as it is: its runs, its counters, and what it does while no run is live in it.

use crate::model::exit::ExitReason;
use crate::model::id::{AppName, Generation, PmId, Slot};
use crate::model::moment::Moment;
use crate::model::saved::SlotMemo;
use crate::model::status::Status;

use super::health::Relapses;
use super::instance::Run;
use super::restart::Streak;
use super::vocabulary::SlotView;
/// A slot as it is.
#[derive(Clone, Debug)]
pub(super) struct SlotState {
    pub(super) pm_id: PmId,
    /// Oldest first. At most one is neither live nor about to be gone, but during a reload.
    pub(super) runs: Vec<Run>,
    pub(super) rest: Rest,
    /// Its next run is a start from rest: what the app depends on comes first.
    pub(super) gated: bool,
    pub(super) restarts: u32,
    pub(super) streak: Streak,
    pub(super) created: Moment,
    pub(super) last_exit: Option<ExitReason>,
    /// Nobody had asked that run to end. Not known of runs of an earlier supervisor.
    pub(super) by_itself: bool,
    /// The release whose run ended for good here, while at rest because of that.
    pub(super) ended: Option<u64>,
    /// The generation that the next run gets.
    pub(super) next_generation: u64,
    /// A run has been started here since somebody asked for it: the next one counts as a restart.
    pub(super) launched: bool,
    /// More generations have been asked for.
    pub(super) reserving: bool,
    /// When to ask again, after that failed.
    pub(super) reserve_at: Option<Moment>,
    /// The disk has refused them, and no app stays down because of that: until it takes them again, generations are
    /// used that are not reserved. The next supervisor knows those from the blob and from what runs.
    pub(super) overdraws: bool,
    /// Runs that were replaced here because they were unhealthy.
    pub(super) relapses: Relapses,
    /// Likewise because they were over their memory limit.
    pub(super) overruns: Relapses,
}

/// What a slot does while no run is live in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rest {
    /// Nothing.
    Stopped,
    /// A run is to be started as soon as the last one is gone.
    Due,
    /// A run is to be started at this moment.
    Waiting { at: Moment },
    /// Given up.
    Errored,
    /// An operation decides.
    Held,
}

impl SlotState {
    pub(super) fn new(pm_id: PmId, now: Moment, rest: Rest, next_generation: u64) -> Self {
        Self {
            pm_id,
            runs: Vec::new(),
            rest,
            gated: false,
            restarts: 0,
            streak: Streak::default(),
            created: now,
            last_exit: None,
            by_itself: false,
            ended: None,
            next_generation,
            launched: false,
            reserving: false,
            reserve_at: None,
            overdraws: false,
            relapses: Relapses::default(),
            overruns: Relapses::default(),
        }
    }

    pub(super) fn live(&self) -> impl Iterator<Item = &Run> {
        self.runs.iter().filter(|run| run.is_live())
    }

    pub(super) fn has_live(&self) -> bool {
        self.runs.iter().any(Run::is_live)
    }

    /// Whether it runs or is about to. What waits for other apps does neither.
    pub(super) fn is_up(&self) -> bool {
        self.has_live()
            || match self.rest {
                Rest::Due => !self.gated,
                Rest::Waiting { .. } | Rest::Held => true,
                Rest::Stopped | Rest::Errored => false,
            }
    }

    /// Whether a start from here is one from rest, which waits for what the app depends on.
    pub(super) fn is_at_rest(&self) -> bool {
        !self.has_live()
            && match self.rest {
                Rest::Stopped | Rest::Errored => true,
                Rest::Due => self.gated || !self.launched,
                Rest::Waiting { .. } | Rest::Held => false,
            }
    }

    pub(super) fn has_reserve(&self) -> bool {
        self.runs.iter().any(Run::is_reserve)
    }

    /// What a row of the table says.
    pub(super) fn view(&self, slot: Slot) -> SlotView {
        let current = self
            .runs
            .iter()
            .rev()
            .find(|run| run.is_ready())
            .or_else(|| self.runs.iter().rev().find(|run| !run.is_reserve()))
            .or_else(|| self.runs.last());
        let status = match (current, self.rest) {
            (Some(run), _) => run.status(),
            (None, Rest::Stopped) => Status::Stopped,
            (None, Rest::Due | Rest::Held) => Status::Launching,
            (None, Rest::Waiting { .. }) => Status::WaitingRestart,
            (None, Rest::Errored) => Status::Errored,
        };
        SlotView {
            pm_id: self.pm_id,
            slot,
            status,
            current: current.map(Run::view),
            draining: self
                .runs
                .iter()
                .filter(|run| current.is_none_or(|current| current.id != run.id))
                .map(Run::view)
                .collect(),
            restarts: self.restarts,
            unstable: self.streak.unstable,
            created: self.created,
            restart_at: match self.rest {
                Rest::Waiting { at } => Some(at),
                Rest::Stopped | Rest::Due | Rest::Errored | Rest::Held => None,
            },
            last_exit: self.last_exit.clone(),
            by_itself: self.by_itself,
            waiting_for: Vec::new(),
            replace_after: self.relapses.pause_until,
            curb_after: self.overruns.pause_until,
        }
    }

    /// What the next supervisor has to know beyond the desired state.
    pub(super) fn memo(&self, app: &AppName, slot: Slot) -> SlotMemo {
        SlotMemo {
            app: app.clone(),
            slot,
            restarts: self.restarts,
            unstable: self.streak.unstable,
            failures: self.streak.failures,
            restart_at: match self.rest {
                Rest::Waiting { at } => Some(at),
                Rest::Stopped | Rest::Due | Rest::Errored | Rest::Held => None,
            },
            errored: self.rest == Rest::Errored,
            created: self.created,
            last_exit: self.last_exit.clone(),
            by_itself: self.by_itself,
            newest: Generation(self.next_generation.saturating_sub(1)),
            ended: self.ended.filter(|_| self.rest == Rest::Stopped),
            stop_unsaved: false,
            gated: self.is_at_rest(),
            relapses: self.relapses.count,
            replace_after: self.relapses.pause_until,
            overruns: self.overruns.count,
            curb_after: self.overruns.pause_until,
        }
    }
}
