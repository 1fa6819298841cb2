//! What probes say of a run, and the replacement of one that fails its health check, or of one that uses too much
//! memory (see `memory`).
//!
//! A replacement is a reload of one slot: it goes through the same gate, waits for what is going on with the app, and
//! nobody waits for it. Never more than one at a time, and in an app of several instances only while another one is
//! known to be well: where every instance fails at once, what they depend on or their load is to blame, and ending them
//! would make it worse. Who is replaced again and again is replaced ever more rarely. Nothing is asked of a process
//! here, and no time-out is measured.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::model::exit::ExitReason;
use crate::model::id::{InstanceId, Slot};
use crate::model::moment::Moment;
use crate::model::saved::{Desired, Trigger};

use super::admit::Ask;
use super::app::{App, Shared};
use super::instance::{Phase, ReadySource, Run, ready_source};
use super::vocabulary::{Action, Health, ProbeResult, ProbeRole};

/// The pause between the first replacement in a slot and the second, for the same reason; it doubles with each that
/// follows.
const RELAPSE_PAUSE: Duration = Duration::from_secs(15);
/// The longest pause.
const RELAPSE_PAUSE_MAX: Duration = Duration::from_secs(600);
/// A run that was well for so long had nothing to do with the replacement before it.
const RELAPSE_RESET: Duration = Duration::from_secs(600);

/// Results in a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Pulse {
    pub(super) passed: u32,
    pub(super) failed: u32,
    /// When the first of the latest row of successes came.
    since: Option<Moment>,
    /// How long the row of successes before these failures lasted.
    was_well: Duration,
    /// The last failure came while another instance was known to be well. Else it may be the old answer of one that
    /// recovers together with the others, only asked a moment later.
    alone: bool,
}

impl Pulse {
    /// A pulse that an earlier supervisor felt.
    pub(super) const fn known(passed: u32, failed: u32) -> Self {
        Self { passed, failed, since: None, was_well: Duration::ZERO, alone: false }
    }

    fn feel(&mut self, now: Moment, result: ProbeResult, others_are_well: bool) {
        self.alone = result == ProbeResult::Failed && others_are_well;
        match result {
            ProbeResult::Passed => {
                (self.passed, self.failed) = (self.passed.saturating_add(1), 0);
                self.since.get_or_insert(now);
            }
            ProbeResult::Failed => {
                (self.passed, self.failed) = (0, self.failed.saturating_add(1));
                if let Some(since) = self.since.take() {
                    self.was_well = now.since(since);
                }
            }
        }
    }
}

impl Run {
    /// What its health check says of it; `None`: it has none.
    pub(super) fn health(&self) -> Option<Health> {
        let probe = self.spec.health.as_ref()?;
        Some(match self.pulse {
            Pulse { failed, .. } if failed >= probe.threshold.max(1) => Health::Unhealthy,
            Pulse { failed: 0, passed: 0, .. } => Health::Unknown,
            Pulse { failed: 0, .. } => Health::Healthy,
            Pulse { failed, .. } => Health::Failing { failed },
        })
    }

    /// It is to be asked whether it is ready, from its birth on.
    pub(super) fn ask_whether_ready(&self) -> Option<Action> {
        let launching = matches!(self.phase, Phase::Launching { said: false, .. });
        (launching && ready_source(&self.spec) == ReadySource::Probed).then(|| Action::Probe {
            id: self.id.clone(),
            role: ProbeRole::Ready,
            delay: Duration::ZERO,
        })
    }

    /// It is ready: it is to be asked for its health, or not to be asked any more.
    pub(super) fn ask_for_health(&self, now: Moment) -> Option<Action> {
        let id = self.id.clone();
        match &self.spec.health {
            Some(probe) => {
                let ready = self.ready_at.map_or(Duration::ZERO, |at| now.since(at));
                let delay = probe.start_period.saturating_sub(ready);
                Some(Action::Probe { id, role: ProbeRole::Health, delay })
            }
            None if ready_source(&self.spec) == ReadySource::Probed => Some(Action::StopProbing { id }),
            None => None,
        }
    }

    /// It is to end, or out of rotation: nobody asks it any more.
    pub(super) fn ask_no_more(&self) -> Vec<Action> {
        let asked = match &self.phase {
            Phase::Launching { .. } => ready_source(&self.spec) == ReadySource::Probed,
            Phase::Ready => self.spec.health.is_some(),
            Phase::Queued | Phase::Reserve | Phase::Stopping(_) | Phase::Leaving { .. } => false,
        };
        let probed = (asked && self.pid.is_some()).then(|| Action::StopProbing { id: self.id.clone() });
        probed.into_iter().chain(self.measure_no_more()).collect()
    }
}

/// Replacements of runs in a slot for one reason that is their own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Relapses {
    /// In a row.
    pub(super) count: u32,
    /// Not before this moment comes the next one.
    pub(super) pause_until: Option<Moment>,
}

impl Relapses {
    /// A replacement begins now of a run that had been well for so long.
    pub(super) fn begin(&mut self, now: Moment, was_well: Duration, reset: Duration) {
        self.count = if was_well >= reset { 1 } else { self.count.saturating_add(1) };
        let doublings = self.count.saturating_sub(1).min(16);
        let pause = RELAPSE_PAUSE.saturating_mul(1 << doublings).min(RELAPSE_PAUSE_MAX);
        self.pause_until = Some(now + pause);
    }
}

impl App {
    /// A probe has an answer. Late ones, of a run that is in another phase by now, mean nothing.
    pub(super) fn probed(&mut self, id: &InstanceId, role: ProbeRole, result: ProbeResult, shared: &Shared) {
        let now = shared.now;
        let others_are_well = self.others_are_well(id.slot, shared);
        let Some(run) = self.run_mut(id) else { return };
        match (role, &mut run.phase) {
            (ProbeRole::Ready, Phase::Launching { said, .. }) => {
                run.pulse.feel(now, result, others_are_well);
                let enough = run.spec.ready.probe.as_ref().map_or(1, |probe| probe.threshold.max(1));
                *said |= ready_source(&run.spec) == ReadySource::Probed && run.pulse.passed >= enough;
            }
            (ProbeRole::Health, Phase::Ready) => run.pulse.feel(now, result, others_are_well),
            (
                ProbeRole::Ready | ProbeRole::Health,
                Phase::Queued
                | Phase::Launching { .. }
                | Phase::Ready
                | Phase::Reserve
                | Phase::Stopping(_)
                | Phase::Leaving { .. },
            ) => {}
        }
    }

    /// Begins the replacement of an unhealthy run, or of one that uses too much memory, where that is allowed now.
    pub(super) fn tend(&mut self, shared: &mut Shared) {
        if self.operation.is_some() || self.next.is_some() || shared.ending {
            return;
        }
        let unwell = self.to_be_replaced(shared).map(|(slot, was_well)| (slot, Trigger::Health, was_well));
        let chosen =
            unwell.or_else(|| self.to_be_curbed(shared).map(|(slot, below)| (slot, Trigger::Memory, below)));
        let Some((slot, trigger, was_well)) = chosen else { return };
        let ask = Ask::Reload { slots: Some(BTreeSet::from([slot])), spec: None };
        let Ok(plan) = self.plan(ask, shared) else { return };
        if let Some(state) = self.slots.get_mut(&slot) {
            match trigger {
                Trigger::Memory => state.curb(shared.now, was_well),
                Trigger::Health | Trigger::Asked => {
                    state.relapses.begin(shared.now, was_well, RELAPSE_RESET);
                }
            }
        }
        self.begin_planned(Vec::new(), plan, trigger, shared);
    }

    /// The first slot whose run may be replaced now, and how long that had been well.
    fn to_be_replaced(&self, shared: &Shared) -> Option<(Slot, Duration)> {
        let saved = shared.ledger.wanted.app(&self.name)?;
        if saved.operation.is_some() {
            return None;
        }
        self.slots.iter().find_map(|(slot, state)| {
            let wanted = saved.slots.get(slot.0 as usize);
            // A slot in which anything else is going on is changing already.
            let [run] = &state.runs[..] else { return None };
            let may = wanted.is_some_and(|wanted| wanted.desired == Desired::Running)
                && run.is_ready()
                && run.health() == Some(Health::Unhealthy)
                && run.pulse.alone
                && run.spec.restart.autorestart
                && state.relapses.pause_until.is_none()
                && self.others_are_well(*slot, shared);
            may.then_some((*slot, run.pulse.was_well))
        })
    }

    /// Whether any slot but this one is known to be well; where there is no other, nobody needs to be.
    fn others_are_well(&self, slot: Slot, shared: &Shared) -> bool {
        let wanted = shared.ledger.wanted.app(&self.name);
        let slots = wanted.map(|app| &app.slots[..]).unwrap_or_default();
        let meant = slots.iter().filter(|wanted| wanted.desired == Desired::Running).count();
        let well = |run: &Run| run.is_ready() && run.health() == Some(Health::Healthy);
        meant == 1 || self.slots.iter().any(|(other, state)| *other != slot && state.runs.iter().any(well))
    }

    /// Why this run is on its way out, where that is because it failed its health check or uses too much memory.
    pub(super) fn condemned(&self, run: &Run) -> Option<ExitReason> {
        let operation = self.operation.as_ref()?;
        if !operation.covers(run.id.slot) || operation.revision == run.revision {
            return None;
        }
        match operation.trigger {
            Trigger::Health => (run.health() == Some(Health::Unhealthy)).then_some(ExitReason::Health),
            Trigger::Memory => Some(ExitReason::Memory),
            Trigger::Asked => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Moment = Moment::from_nanos(1_000_000_000);

    #[test]
    fn who_is_replaced_again_and_again_is_replaced_ever_more_rarely() {
        let mut relapses = Relapses::default();
        for expected in [15, 30, 60, 120, 240, 480, 600, 600] {
            relapses.begin(NOW, Duration::from_secs(5), RELAPSE_RESET);
            assert_eq!(relapses.pause_until, Some(NOW + Duration::from_secs(expected)));
        }
        relapses.begin(NOW, RELAPSE_RESET, RELAPSE_RESET);
        assert_eq!(relapses.pause_until, Some(NOW + RELAPSE_PAUSE), "ten minutes of health are a new life");
    }

    #[test]
    fn results_count_in_a_row() {
        let mut pulse = Pulse::default();
        pulse.feel(NOW, ProbeResult::Failed, true);
        pulse.feel(NOW, ProbeResult::Failed, true);
        assert_eq!((pulse.passed, pulse.failed), (0, 2));
        pulse.feel(NOW, ProbeResult::Passed, true);
        pulse.feel(NOW + Duration::from_secs(7), ProbeResult::Passed, true);
        assert_eq!((pulse.passed, pulse.failed), (2, 0));
        pulse.feel(NOW + Duration::from_secs(9), ProbeResult::Failed, true);
        assert_eq!((pulse.passed, pulse.failed, pulse.was_well), (0, 1, Duration::from_secs(9)));
    }
}
