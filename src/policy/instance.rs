//! One run of an app in a slot, from its place in the launch queue to the last process of its tree.
//!
//! ```text
//!            turn          ready                 stop asked, replaced, not ready in time
//!  Queued ─────────► Launching ────► Ready ◄──► Reserve ───────────┐
//!    │ cancelled        │   │          │ exits by itself          ▼
//!    ▼                  │   └──────────┼──── stop asked ──► Stopping (the ladder, see `stop`)
//!  (gone: no process)   │ exits        ▼                          │ exits
//!                       └────────► Leaving ◄──────────────────────┘
//!                                     │ tree gone
//!                                     ▼
//!                                 forgotten
//! ```
//!
//! A run in `Reserve` has been replaced in a reload that is not over: alive, out of rotation, and not told anything.
//!
//! A run knows nothing of its neighbours: which run serves, follows or replaces it is decided in `app` and `reload`.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use crate::model::exit::ExitReason;
use crate::model::id::{InstanceId, PmId};
use crate::model::moment::Moment;
use crate::model::saved::{InstanceMemo, StartedFrom};
use crate::model::spec::AppSpec;
use crate::model::status::Status;

use super::health::Pulse;
use super::memory::Gauge;
use super::stop::{Cause, Ladder};
use super::vocabulary::{Action, RunState, RunView};

/// How long a process without a readiness source of its own has to live to count as started.
pub(super) const START_SETTLE: Duration = Duration::from_millis(100);

/// One run.
#[derive(Clone, Debug)]
pub(super) struct Run {
    pub(super) id: InstanceId,
    pub(super) pm_id: PmId,
    /// The release it runs.
    pub(super) revision: u64,
    pub(super) spec: Arc<AppSpec>,
    /// Its main process, once spawned.
    pub(super) pid: Option<u32>,
    /// When the spawn was asked for; before that, when it was queued.
    pub(super) since: Moment,
    pub(super) spawned_at: Option<Moment>,
    pub(super) ready_at: Option<Moment>,
    /// Listener keys it serves.
    pub(super) keys: BTreeSet<String>,
    /// How long it has to live to be ready, where nothing else says so.
    pub(super) settle: Duration,
    /// What probes of the present phase have said.
    pub(super) pulse: Pulse,
    /// What was measured of its memory since it is in rotation.
    pub(super) gauge: Gauge,
    /// The files it was started from, once that is known.
    pub(super) from: Option<Arc<StartedFrom>>,
    /// The files it is to be started from, where that is not up to its spec: a rollback.
    pub(super) again: Option<Arc<StartedFrom>>,
    /// It is in rotation, and on probation until then.
    pub(super) proves_until: Option<Moment>,
    pub(super) phase: Phase,
}

/// Where a run stands.
#[derive(Clone, Debug)]
pub(super) enum Phase {
    /// Waits for its turn to launch. There is no process.
    Queued,
    /// The spawn was asked for.
    Launching {
        /// The app, or the probe that asks it, said that it is ready.
        said: bool,
        /// When it has lived long enough, where that is what counts.
        lives_at: Option<Moment>,
        /// When not being ready becomes a failure.
        fail_at: Moment,
        /// It is ready, but not in rotation yet.
        wait: Wait,
    },
    /// In rotation.
    Ready,
    /// Replaced and out of rotation, but it may come back.
    Reserve,
    /// On the stop ladder.
    Stopping(Ladder),
    /// The main process has exited; what it left behind is being ended.
    Leaving {
        /// How it exited.
        reason: ExitReason,
        /// The ladder it was on.
        ladder: Option<Ladder>,
    },
}

/// What a run waits for between being ready and being in rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// It is not ready.
    Not,
    /// It has to live until then (`min_healthy`).
    Soaking { after: Duration, until: Moment },
    /// The others have to come as far as it is.
    Standby { after: Duration },
}

/// What says that a run is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReadySource {
    /// The app.
    Said,
    /// A probe that asks it.
    Probed,
    /// Its first listener.
    Listens,
    /// A span of life.
    Lives,
}

/// Which source counts for this spec.
pub(super) const fn ready_source(spec: &AppSpec) -> ReadySource {
    if spec.ready.wait_ready {
        ReadySource::Said
    } else if spec.ready.probe.is_some() {
        ReadySource::Probed
    } else if spec.is_node_cluster() {
        ReadySource::Listens
    } else {
        ReadySource::Lives
    }
}

impl Run {
    /// A run that waits for its turn.
    pub(super) fn queued(
        id: InstanceId,
        pm_id: PmId,
        spec: Arc<AppSpec>,
        revision: u64,
        settle: Duration,
        now: Moment,
    ) -> Self {
        Self {
            id,
            pm_id,
            revision,
            spec,
            pid: None,
            since: now,
            spawned_at: None,
            ready_at: None,
            keys: BTreeSet::new(),
            settle,
            pulse: Pulse::default(),
            gauge: Gauge::default(),
            from: None,
            again: None,
            proves_until: None,
            phase: Phase::Queued,
        }
    }

    /// From now on it follows these rules. How it says that it is ready was settled when it was spawned; for its health
    /// it is asked anew where the question is another one, and its memory is measured against another limit.
    pub(super) fn take_over(&mut self, spec: &Arc<AppSpec>, now: Moment) -> Vec<Action> {
        let another = self.spec.health != spec.health && self.is_ready();
        let other_limit = self.spec.max_memory != spec.max_memory;
        let spawned = !matches!(self.phase, Phase::Queued);
        self.spec = if spawned && spec.ready != self.spec.ready {
            Arc::new(AppSpec { ready: self.spec.ready.clone(), ..AppSpec::clone(spec) })
        } else {
            Arc::clone(spec)
        };
        let mut actions = Vec::new();
        if another {
            self.pulse = Pulse::default();
            let ask = self.ask_for_health(now);
            actions.push(ask.unwrap_or_else(|| Action::StopProbing { id: self.id.clone() }));
        }
        if other_limit {
            self.gauge = Gauge::default();
            if self.is_ready() {
                let watch = self.watch_memory();
                actions.push(watch.unwrap_or_else(|| Action::UnwatchMemory { id: self.id.clone() }));
            }
        }
        actions
    }

    /// It is in rotation: connections come, it is asked for its health, and its memory is measured.
    pub(super) fn serve(&self, now: Moment, actions: &mut Vec<Action>) {
        actions.extend(self.ask_for_health(now));
        actions.extend(self.watch_memory());
        if self.spec.has_rotation() {
            actions.push(Action::PutIn { id: self.id.clone() });
        }
    }

    /// Its turn has come: the spawn is asked for.
    pub(super) fn launch(&mut self, now: Moment) {
        self.since = now;
        self.phase = Phase::Launching {
            said: false,
            lives_at: None,
            fail_at: now + self.spec.ready.listen_timeout,
            wait: Wait::Not,
        };
    }

    /// The process runs.
    pub(super) fn spawned(&mut self, now: Moment, pid: u32) {
        self.pid = Some(pid);
        self.spawned_at.get_or_insert(now);
        let settle = self.settle;
        if let Phase::Launching { lives_at, .. } = &mut self.phase
            && ready_source(&self.spec) == ReadySource::Lives
        {
            lives_at.get_or_insert(now + settle);
        }
    }

    /// Whether it takes one of the places of those that launch at the same time.
    pub(super) fn holds_launch_place(&self) -> bool {
        matches!(self.phase, Phase::Launching { wait: Wait::Not, .. })
            && !(ready_source(&self.spec) == ReadySource::Lives && self.spawned_at.is_some())
    }

    /// Whether it may serve, as far as it can tell by itself.
    pub(super) fn is_ready_by_itself(&self, now: Moment) -> bool {
        let Phase::Launching { said, lives_at, .. } = &self.phase else { return false };
        match ready_source(&self.spec) {
            ReadySource::Said | ReadySource::Probed => *said,
            ReadySource::Listens => !self.keys.is_empty(),
            ReadySource::Lives => lives_at.is_some_and(|at| now >= at),
        }
    }

    /// It has been ready for as long as it has to. Says, on the way there, what becomes known: it has just become ready.
    pub(super) fn soak(&mut self, now: Moment, span: Duration) -> (bool, Option<Duration>) {
        let after = now.since(self.since);
        let Phase::Launching { wait, .. } = &mut self.phase else { return (false, None) };
        let fresh = *wait == Wait::Not;
        if fresh {
            *wait = if span.is_zero() {
                Wait::Standby { after }
            } else {
                Wait::Soaking { after, until: now + span }
            };
        }
        if let Wait::Soaking { after, until } = *wait
            && until <= now
        {
            *wait = Wait::Standby { after };
        }
        (matches!(wait, Wait::Standby { .. }), fresh.then_some(after))
    }

    /// It was ready, and is not any more: what it has lived through does not count.
    pub(super) fn unready(&mut self) {
        if let Phase::Launching { wait, .. } = &mut self.phase {
            *wait = Wait::Not;
        }
    }

    /// How long after its spawn it was ready.
    pub(super) fn ready_after(&self, now: Moment) -> Duration {
        match self.phase {
            Phase::Launching { wait: Wait::Soaking { after, .. } | Wait::Standby { after }, .. } => after,
            Phase::Launching { wait: Wait::Not, .. }
            | Phase::Queued
            | Phase::Ready
            | Phase::Reserve
            | Phase::Stopping(_)
            | Phase::Leaving { .. } => now.since(self.since),
        }
    }

    /// It is in rotation from now on.
    pub(super) fn put_in(&mut self, now: Moment) {
        self.ready_at = Some(now);
        self.pulse = Pulse::default();
        self.gauge = Gauge::default();
        self.phase = Phase::Ready;
    }

    /// Whether it is in rotation.
    pub(super) const fn is_ready(&self) -> bool {
        matches!(self.phase, Phase::Ready)
    }

    /// Whether it is kept in reserve.
    pub(super) const fn is_reserve(&self) -> bool {
        matches!(self.phase, Phase::Reserve)
    }

    /// Whether it has been replaced and is there all the same, in reserve or on its way out.
    pub(super) const fn lingers(&self) -> bool {
        matches!(self.phase, Phase::Reserve | Phase::Stopping(_) | Phase::Leaving { .. })
    }

    /// Whether it serves, or is on its way to it.
    pub(super) const fn is_live(&self) -> bool {
        matches!(self.phase, Phase::Queued | Phase::Launching { .. } | Phase::Ready)
    }

    /// Whether it counts against `instances` + `max_surge`: from the queue until it has its signal, but for reserve.
    pub(super) const fn counts(&self) -> bool {
        match &self.phase {
            Phase::Queued | Phase::Launching { .. } | Phase::Ready => true,
            Phase::Stopping(ladder) => ladder.signalled_at.is_none(),
            Phase::Reserve | Phase::Leaving { .. } => false,
        }
    }

    /// How long the process has lived.
    pub(super) fn uptime(&self, now: Moment) -> Duration {
        self.spawned_at.map_or(Duration::ZERO, |at| now.since(at))
    }

    /// The ladder it is or was on.
    pub(super) const fn ladder(&self) -> Option<&Ladder> {
        match &self.phase {
            Phase::Queued | Phase::Launching { .. } | Phase::Ready | Phase::Reserve => None,
            Phase::Stopping(ladder) => Some(ladder),
            Phase::Leaving { ladder, .. } => ladder.as_ref(),
        }
    }

    /// Whether it is being removed because it was not ready in time.
    pub(super) fn was_not_ready(&self) -> bool {
        self.ladder().is_some_and(|ladder| ladder.cause == Cause::NotReady)
    }

    /// Its own state in the words of the table.
    pub(super) const fn status(&self) -> Status {
        match &self.phase {
            Phase::Queued | Phase::Launching { .. } => Status::Launching,
            // Out of rotation, but nobody has told it to end.
            Phase::Ready | Phase::Reserve => Status::Online,
            Phase::Stopping(_) | Phase::Leaving { .. } => Status::Stopping,
        }
    }

    /// Hands every pending deadline to `visit`.
    pub(super) fn deadlines(&mut self, visit: &mut dyn FnMut(&mut Moment)) {
        match &mut self.phase {
            Phase::Launching { lives_at, fail_at, wait, .. } => {
                if let Some(at) = lives_at {
                    visit(at);
                }
                if let Wait::Soaking { until, .. } = wait {
                    visit(until);
                }
                visit(fail_at);
            }
            Phase::Stopping(ladder) => ladder.deadline(visit),
            Phase::Queued | Phase::Ready | Phase::Reserve | Phase::Leaving { .. } => {}
        }
    }

    /// The earliest pending deadline.
    pub(super) fn next_deadline(&self) -> Option<Moment> {
        match &self.phase {
            Phase::Launching { lives_at, fail_at, wait, .. } => match wait {
                // Who only has to live cannot be late.
                Wait::Not => Some(lives_at.unwrap_or(*fail_at)),
                Wait::Soaking { until, .. } => Some(*until),
                Wait::Standby { .. } => None,
            },
            Phase::Stopping(ladder) => ladder.next_deadline(),
            Phase::Ready => self.proves_until,
            Phase::Queued | Phase::Reserve | Phase::Leaving { .. } => None,
        }
    }

    /// What is shown about it.
    pub(super) fn view(&self) -> RunView {
        RunView {
            id: self.id.clone(),
            pid: self.pid,
            status: self.status(),
            since: self.since,
            ready_at: self.ready_at,
            queued: matches!(self.phase, Phase::Queued),
            kill_at: match &self.phase {
                Phase::Stopping(ladder) => ladder.kill_at(&self.spec),
                Phase::Queued
                | Phase::Launching { .. }
                | Phase::Ready
                | Phase::Reserve
                | Phase::Leaving { .. } => None,
            },
            health: self.health(),
            failed_probes: self.pulse.failed,
            over_memory: self.is_oversized().then_some(self.gauge.bytes),
            state: self.state(),
        }
    }

    /// Where it stands, for people.
    const fn state(&self) -> RunState {
        match &self.phase {
            Phase::Queued => RunState::Queued,
            Phase::Launching { wait: Wait::Not, .. } => RunState::Launching,
            Phase::Launching { .. } => RunState::Soaking,
            Phase::Ready => RunState::Online,
            Phase::Reserve => RunState::Reserve,
            Phase::Stopping(ladder) if ladder.signalled_at.is_none() => RunState::Draining,
            Phase::Stopping(_) | Phase::Leaving { .. } => RunState::Stopping,
        }
    }

    /// What the next supervisor has to know about it; nothing while there is no process.
    pub(super) fn memo(&self) -> Option<InstanceMemo> {
        if matches!(self.phase, Phase::Queued) {
            return None;
        }
        Some(InstanceMemo {
            id: self.id.clone(),
            revision: self.revision,
            pid: self.pid,
            since: self.since,
            ready_at: self.ready_at,
            in_rotation: self.is_ready(),
            stopping: self.ladder().map(|ladder| (ladder.since, ladder.signalled_at)),
            keys: self.keys.iter().cloned().collect(),
            left: match &self.phase {
                Phase::Leaving { reason, .. } => Some(reason.clone()),
                Phase::Queued
                | Phase::Launching { .. }
                | Phase::Ready
                | Phase::Reserve
                | Phase::Stopping(_) => None,
            },
            reserve: self.is_reserve(),
            from: self.from.clone(),
            said_ready: matches!(self.phase, Phase::Launching { said: true, .. }),
            probes: (self.pulse.passed, self.pulse.failed),
            over_memory: self.gauge.memo(),
        })
    }
}
