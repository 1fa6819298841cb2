//! The stop ladder: the one path by which runs are ended.
//!
//! ```text
//!  (awaiting spawn) ─► settling ─► draining ─► asking ─► disconnecting ─► signalled ─► killed
//!                      TakeOut     Drain       AskKill…  Disconnect       Signal       KillTree
//! ```
//!
//! Rungs that mean nothing for an app are skipped, so a program without agent and channel gets its signal at once. A
//! run that was never ready has no traffic and goes straight to the signal. Every rung but the first and the last has
//! a deadline; the last needs none, because SIGKILL does not ask. Nothing here decides *whether* to stop a run.

use std::time::Duration;

use crate::model::moment::Moment;
use crate::model::spec::{AppSpec, Balance, StopMethod};

use super::instance::{Phase, Run};
use super::vocabulary::{Action, IdleConnections, StepKind};

/// `TakeOut` is answered within 1 s; a dispatcher that does not answer must not hold up a stop.
const SETTLE_LIMIT: Duration = Duration::from_millis(1200);
/// How long the agent may take to say whether the app listens for the kill signal.
const ASK_LIMIT: Duration = Duration::from_millis(500);
/// Node's keepAliveTimeout of 5 s + 1 s.
const DRAIN_DEFAULT: Duration = Duration::from_secs(6);
/// A run that was not ready in time has this for its connections, for the agent's answer and from the signal to
/// SIGKILL: a failed reload is reported within a second.
const NOT_READY: (Duration, Duration, Duration) =
    (Duration::from_millis(250), Duration::from_millis(50), Duration::from_millis(400));

/// Why a run is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// Somebody asked for it, or it was replaced.
    Asked,
    /// It was not ready within `listen_timeout`.
    NotReady,
    /// A failed reload removes its new instances.
    Undone,
}

/// A run's way down.
#[derive(Clone, Debug)]
pub(super) struct Ladder {
    /// When it began.
    pub(super) since: Moment,
    pub(super) cause: Cause,
    /// When the kill signal (or SIGKILL) was sent.
    pub(super) signalled_at: Option<Moment>,
    rung: Rung,
    idle: IdleConnections,
    /// Draining, by whatever means, is over then.
    drain_until: Option<Moment>,
    /// How long connections may drain.
    drain: Duration,
    /// How long the agent may take to answer.
    ask: Duration,
    /// From the signal to SIGKILL.
    grace: Duration,
}

#[derive(Clone, Debug)]
enum Rung {
    AwaitingSpawn,
    Settling { until: Moment },
    Draining { until: Moment },
    Asking { until: Moment },
    Disconnecting { until: Moment },
    Signalled { kill_at: Moment },
    Killed,
}

/// Where to go on; rungs that do not apply lead to the next one.
enum Towards {
    Settle,
    Drain,
    Ask,
    ByMethod,
    Disconnect,
    Signal,
    Kill,
}

/// An answer, or the lack of one, that takes a run to its next rung.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// The process runs.
    Spawned,
    /// No hand-over is unanswered.
    Settled,
    /// No connection is open.
    Drained,
    /// How many listeners the app has for the kill signal.
    KillListeners(u32),
    /// The channel is at its end.
    ChannelClosed,
    /// The rung's time is over.
    TimeOver,
}

impl Ladder {
    /// The deadline of the present rung.
    pub(super) fn deadline(&mut self, visit: &mut dyn FnMut(&mut Moment)) {
        if let Some(at) = &mut self.drain_until {
            visit_quietly(at, visit, &self.rung);
        }
        match &mut self.rung {
            Rung::Settling { until }
            | Rung::Draining { until }
            | Rung::Asking { until }
            | Rung::Disconnecting { until } => visit(until),
            Rung::Signalled { kill_at } => visit(kill_at),
            Rung::AwaitingSpawn | Rung::Killed => {}
        }
    }

    /// The deadline of the present rung.
    pub(super) const fn next_deadline(&self) -> Option<Moment> {
        match self.rung {
            Rung::Settling { until }
            | Rung::Draining { until }
            | Rung::Asking { until }
            | Rung::Disconnecting { until } => Some(until),
            Rung::Signalled { kill_at } => Some(kill_at),
            Rung::AwaitingSpawn | Rung::Killed => None,
        }
    }

    /// When SIGKILL is due.
    pub(super) const fn kill_at(&self) -> Option<Moment> {
        match self.rung {
            Rung::Signalled { kill_at } => Some(kill_at),
            Rung::AwaitingSpawn
            | Rung::Settling { .. }
            | Rung::Draining { .. }
            | Rung::Asking { .. }
            | Rung::Disconnecting { .. }
            | Rung::Killed => None,
        }
    }

    /// Whether SIGKILL was needed.
    pub(super) const fn killed(&self) -> bool {
        matches!(self.rung, Rung::Killed)
    }

    /// A ladder that an earlier supervisor had taken as far as the signal.
    pub(super) fn signalled(since: Moment, at: Moment, spec: &AppSpec) -> Self {
        let grace = spec.stop.timeout;
        Self {
            since,
            cause: Cause::Asked,
            signalled_at: Some(at),
            rung: Rung::Signalled { kill_at: at + grace },
            idle: IdleConnections::Close,
            drain_until: None,
            drain: drain_limit(spec),
            ask: ASK_LIMIT,
            grace,
        }
    }
}

/// The drain budget moves with the other deadlines although nothing waits for it by itself.
fn visit_quietly(at: &mut Moment, visit: &mut dyn FnMut(&mut Moment), rung: &Rung) {
    match rung {
        Rung::Settling { .. } | Rung::Draining { .. } | Rung::Asking { .. } | Rung::Disconnecting { .. } => {
            visit(at);
        }
        Rung::AwaitingSpawn | Rung::Signalled { .. } | Rung::Killed => {}
    }
}

/// How long connections may drain before the signal.
fn drain_limit(spec: &AppSpec) -> Duration {
    spec.stop.drain_timeout.unwrap_or(DRAIN_DEFAULT).min(spec.stop.timeout)
}

/// What a turn of a ladder produces.
#[derive(Debug, Default)]
pub(super) struct Descent {
    pub(super) actions: Vec<Action>,
    pub(super) steps: Vec<StepKind>,
}

impl Run {
    /// Puts a live run that has been spawned, or whose spawn was asked for, on the ladder. Runs that are on it already
    /// stay where they are, but for a shorter grace.
    pub(super) fn begin_stop(
        &mut self,
        now: Moment,
        cause: Cause,
        idle: IdleConnections,
        descent: &mut Descent,
    ) {
        let (towards, awaiting) = match &self.phase {
            Phase::Ready => (Towards::Settle, false),
            // It is in no rotation, but it may have taken connections by itself.
            Phase::Launching { .. } if accepts_by_itself(&self.spec) && self.pid.is_some() => {
                (Towards::Drain, false)
            }
            Phase::Launching { .. } => (Towards::Signal, self.pid.is_none()),
            Phase::Queued | Phase::Stopping(_) | Phase::Leaving { .. } => return,
        };
        let full = (drain_limit(&self.spec), ASK_LIMIT, self.spec.stop.timeout);
        let (drain, ask, grace) = match cause {
            Cause::Asked => full,
            Cause::NotReady | Cause::Undone => {
                (full.0.min(NOT_READY.0), full.1.min(NOT_READY.1), full.2.min(NOT_READY.2))
            }
        };
        self.phase = Phase::Stopping(Ladder {
            since: now,
            cause,
            signalled_at: None,
            rung: Rung::AwaitingSpawn,
            idle,
            drain_until: None,
            drain,
            ask,
            grace,
        });
        if !awaiting {
            self.climb(now, towards, descent);
        }
    }

    /// A run that is being removed because it was not ready is now removed because somebody wants another one: its end
    /// says nothing about that one.
    pub(super) fn forgive(&mut self) {
        if let Phase::Stopping(ladder) = &mut self.phase {
            ladder.cause = Cause::Asked;
        }
    }

    /// Takes a run on the ladder to its next rung, when what was heard is what its rung waits for.
    pub(super) fn heard(&mut self, now: Moment, heard: Heard, descent: &mut Descent) {
        let Phase::Stopping(ladder) = &self.phase else { return };
        let towards = match (&ladder.rung, heard) {
            (Rung::AwaitingSpawn, Heard::Spawned) => Towards::Signal,
            (Rung::Settling { .. }, Heard::Settled | Heard::TimeOver) => Towards::Drain,
            (Rung::Draining { .. }, Heard::Drained | Heard::TimeOver) => Towards::Ask,
            (Rung::Asking { .. }, Heard::KillListeners(0)) => Towards::Disconnect,
            (Rung::Asking { .. }, Heard::KillListeners(_)) => Towards::Signal,
            (Rung::Asking { .. }, Heard::TimeOver) => Towards::ByMethod,
            // The end of the channel also means that nobody is left to answer.
            (
                Rung::Draining { .. } | Rung::Asking { .. } | Rung::Disconnecting { .. },
                Heard::ChannelClosed,
            )
            | (Rung::Disconnecting { .. }, Heard::TimeOver) => Towards::Signal,
            (Rung::Signalled { .. }, Heard::TimeOver) => Towards::Kill,
            (
                Rung::AwaitingSpawn
                | Rung::Settling { .. }
                | Rung::Draining { .. }
                | Rung::Asking { .. }
                | Rung::Disconnecting { .. }
                | Rung::Signalled { .. }
                | Rung::Killed,
                _,
            ) => return,
        };
        self.climb(now, towards, descent);
    }

    /// Steps over rungs that mean nothing for this app, to the next one that does.
    fn climb(&mut self, now: Moment, mut towards: Towards, descent: &mut Descent) {
        let Self { id, spec, phase: Phase::Stopping(ladder), .. } = self else { return };
        let cluster = spec.is_node_cluster();
        let agent = spec.has_agent();
        loop {
            towards = match towards {
                Towards::Settle if cluster => {
                    descent.actions.push(Action::TakeOut { id: id.clone() });
                    descent.steps.push(StepKind::Draining);
                    ladder.rung = Rung::Settling { until: now + SETTLE_LIMIT };
                    return;
                }
                Towards::Settle => Towards::Drain,
                Towards::Drain if agent => {
                    if !cluster {
                        descent.steps.push(StepKind::Draining);
                    }
                    let within = ladder.drain;
                    let until = now + within;
                    ladder.drain_until = Some(until);
                    descent.actions.push(Action::Drain { id: id.clone(), idle: ladder.idle, within });
                    ladder.rung = Rung::Draining { until };
                    return;
                }
                Towards::Drain => Towards::Ask,
                // An app that is told by message has said how it wants to be ended.
                Towards::Ask if cluster && agent && !by_message(spec) => {
                    let signal = spec.stop.signal;
                    descent.actions.push(Action::AskKillListeners { id: id.clone(), signal });
                    ladder.rung = Rung::Asking { until: now + ladder.ask };
                    return;
                }
                Towards::Ask => Towards::ByMethod,
                Towards::ByMethod => match spec.stop.method {
                    StopMethod::Disconnect if cluster && !by_message(spec) => Towards::Disconnect,
                    StopMethod::Disconnect | StopMethod::Signal => Towards::Signal,
                },
                Towards::Disconnect => {
                    let until = *ladder.drain_until.get_or_insert(now + ladder.drain);
                    // Who used up the time for draining would not get any further by this.
                    if until <= now {
                        Towards::Signal
                    } else {
                        descent.actions.push(Action::Disconnect { id: id.clone() });
                        ladder.rung = Rung::Disconnecting { until };
                        return;
                    }
                }
                Towards::Signal => {
                    let signal = spec.stop.signal;
                    descent.actions.push(if by_message(spec) {
                        Action::SendShutdown { id: id.clone() }
                    } else {
                        Action::Signal { id: id.clone(), signal, mode: spec.stop.mode }
                    });
                    descent.steps.push(StepKind::Signalled { signal });
                    ladder.signalled_at = Some(now);
                    ladder.rung = Rung::Signalled { kill_at: now + ladder.grace };
                    return;
                }
                Towards::Kill => {
                    descent.actions.push(Action::KillTree { id: id.clone() });
                    ladder.rung = Rung::Killed;
                    return;
                }
            };
        }
    }
}

/// Whether an instance accepts connections from a shared socket as soon as it listens, and can be asked to stop that.
fn accepts_by_itself(spec: &AppSpec) -> bool {
    let shared =
        if spec.is_node_cluster() { spec.balance == Balance::Shared } else { !spec.listen.is_empty() };
    shared && spec.has_agent()
}

/// Whether the app is ended by a message instead of a signal.
const fn by_message(spec: &AppSpec) -> bool {
    spec.stop.with_message && spec.has_channel()
}
