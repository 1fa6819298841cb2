//! Runs that use more memory than they may, and their replacement.
//!
//! What is measured is the whole process tree, and it counts while a run is in rotation. After [`SAMPLES`] samples in a
//! row above `max_memory_restart` the run is replaced as one that fails its health check: a reload of its slot through
//! the same gate, one at a time, that waits for what is going on with the app. What a reload has replaced meanwhile is
//! no concern of anybody. Such a replacement is no crash: neither backoff nor `max_restarts` count it. Who crosses the
//! limit soon after each replacement is replaced ever more rarely. Nothing is measured here.

use std::time::Duration;

use crate::model::id::{InstanceId, Slot};
use crate::model::moment::Moment;
use crate::model::saved::Desired;

use super::app::{App, Shared};
use super::instance::{Phase, Run};
use super::news::What;
use super::slot::SlotState;
use super::vocabulary::{Action, Health};

/// So many samples in a row have to be above the limit: a peak of a moment, such as one before a garbage collection, is
/// none.
pub const SAMPLES: u32 = 3;
/// A run that stayed below its limit for so long has nothing to do with the replacement before it: a leak that takes
/// longer than this is met each time at once.
const OVERRUN_RESET: Duration = Duration::from_secs(60);

/// What was measured of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Gauge {
    /// Samples in a row above the limit.
    pub(super) over: u32,
    /// The last of them, in bytes.
    pub(super) bytes: u64,
    /// When it was found below its limit again; `None`: it has been since it came into rotation.
    below_since: Option<Moment>,
    /// How long it had been below its limit before these samples. Counts for one replacement: when that fails, the
    /// next one is a relapse.
    below_for: Duration,
}

impl Gauge {
    /// What an earlier supervisor had measured.
    pub(super) const fn known((over, bytes): (u32, u64)) -> Self {
        Self { over, bytes, below_since: None, below_for: Duration::ZERO }
    }

    /// What the next one has to know.
    pub(super) const fn memo(&self) -> (u32, u64) {
        (self.over, self.bytes)
    }

    /// A sample. Says whether it is the one that makes the run too large.
    fn feel(&mut self, now: Moment, ready_at: Moment, bytes: u64, limit: u64) -> bool {
        if bytes <= limit {
            if self.over > 0 {
                self.below_since = Some(now);
            }
            self.over = 0;
            return false;
        }
        if self.over == 0 {
            self.below_for = now.since(self.below_since.unwrap_or(ready_at));
        }
        (self.over, self.bytes) = (self.over.saturating_add(1), bytes);
        self.over == SAMPLES
    }
}

impl Run {
    /// Whether it has used more than it may for long enough.
    pub(super) fn is_oversized(&self) -> bool {
        self.spec.max_memory.is_some() && self.gauge.over >= SAMPLES
    }

    /// Its memory is to be measured, if it has a limit.
    pub(super) fn watch_memory(&self) -> Option<Action> {
        self.spec.max_memory.map(|limit| Action::WatchMemory { id: self.id.clone(), limit })
    }

    /// It is to end, or out of rotation: its memory is nobody's concern any more.
    pub(super) fn measure_no_more(&self) -> Option<Action> {
        let watched = matches!(self.phase, Phase::Ready) && self.spec.max_memory.is_some();
        watched.then(|| Action::UnwatchMemory { id: self.id.clone() })
    }
}

impl SlotState {
    /// The replacement of a run begins that had stayed below its limit for so long.
    pub(super) fn curb(&mut self, now: Moment, below_for: Duration) {
        self.overruns.begin(now, below_for, OVERRUN_RESET);
        for run in &mut self.runs {
            run.gauge.below_for = Duration::ZERO;
        }
    }
}

impl App {
    /// The memory of a run was measured. Late figures, of a run that is in another phase by now, mean nothing.
    pub(super) fn measured(&mut self, id: &InstanceId, bytes: u64, now: Moment) {
        let Some(run) = self.run_mut(id).filter(|run| run.is_ready()) else { return };
        let Some(limit) = run.spec.max_memory else { return };
        let ready_at = run.ready_at.unwrap_or(now);
        if run.gauge.feel(now, ready_at, bytes, limit) {
            let pm_id = run.pm_id;
            self.happened(id, pm_id, What::MemoryExceeded { bytes, limit });
        }
    }

    /// The first slot whose run is to be replaced now because of its memory, and how long that was below its limit
    /// before.
    pub(super) fn to_be_curbed(&self, shared: &Shared) -> Option<(Slot, Duration)> {
        let saved = shared.ledger.wanted.app(&self.name)?;
        if saved.operation.is_some() {
            return None;
        }
        self.slots.iter().find_map(|(slot, state)| {
            let wanted = saved.slots.get(slot.0 as usize);
            // A slot in which anything else is going on is changing already.
            let [run] = &state.runs[..] else { return None };
            // A successor that has to be ready first takes nothing away; else somebody has to serve meanwhile.
            let beside = saved.spec.can_overlap() && saved.spec.reload.max_unavailable.is_none();
            let may = wanted.is_some_and(|wanted| wanted.desired == Desired::Running)
                && run.is_ready()
                && run.is_oversized()
                && run.spec.restart.autorestart
                && state.overruns.pause_until.is_none()
                && (beside || self.others_serve(*slot, shared));
            may.then_some((*slot, run.gauge.below_for))
        })
    }

    /// Whether another slot serves, and well as far as anybody knows; where there is no other, nobody needs to.
    fn others_serve(&self, slot: Slot, shared: &Shared) -> bool {
        let wanted = shared.ledger.wanted.app(&self.name);
        let slots = wanted.map(|app| &app.slots[..]).unwrap_or_default();
        let meant = slots.iter().filter(|wanted| wanted.desired == Desired::Running).count();
        let well = |run: &Run| run.is_ready() && run.health().is_none_or(|health| health == Health::Healthy);
        meant == 1 || self.slots.iter().any(|(other, state)| *other != slot && state.runs.iter().any(well))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READY: Moment = Moment::from_nanos(1_000_000_000);

    fn at(seconds: u64) -> Moment {
        READY + Duration::from_secs(seconds)
    }

    #[test]
    fn samples_count_in_a_row_and_only_above_the_limit() {
        let mut gauge = Gauge::default();
        let mut feel = |second, bytes| gauge.feel(at(second), READY, bytes, 100);
        assert!(!feel(1, 101) && !feel(2, 101) && !feel(3, 100), "at the limit is not above it");
        assert!(!feel(4, 101) && !feel(5, 200));
        assert!(feel(6, 300), "the third in a row");
        assert!(!feel(7, 400), "said once");
        assert_eq!((gauge.over, gauge.bytes), (4, 400));
    }

    #[test]
    fn how_long_it_was_below_its_limit_is_counted_to_the_first_sample_above_it() {
        let mut gauge = Gauge::default();
        for second in [50, 51, 52] {
            gauge.feel(at(second), READY, 101, 100);
        }
        assert_eq!(gauge.below_for, Duration::from_secs(50));
        gauge.feel(at(53), READY, 10, 100);
        gauge.feel(at(60), READY, 101, 100);
        assert_eq!(gauge.below_for, Duration::from_secs(7), "since it came back below it");
    }

    #[test]
    fn a_slow_leak_is_met_at_once_each_time_and_a_limit_that_does_not_fit_ever_more_rarely() {
        let mut state = SlotState::new(crate::model::id::PmId(0), READY, super::super::slot::Rest::Due, 1);
        for _ in 0..3 {
            state.curb(READY, OVERRUN_RESET);
            assert_eq!(state.overruns.pause_until, Some(at(15)), "over before the next one can be due");
        }
        for expected in [30, 60, 120, 240, 480, 600, 600] {
            state.curb(READY, Duration::from_secs(5));
            assert_eq!(state.overruns.pause_until, Some(at(expected)));
        }
    }
}
