//! The stop ladder: the one path by which runs are ended.
//!
//! ```text
//!  (awaiting spawn) ─► settling ─► asking ─► draining ─► disconnecting ─► signalled ─► killed
//!                      TakeOut     AskKill…  Drain       Disconnect       Signal       KillTree
//! ```
//!
//! An app that handles its kill signal has `drain_timeout` before the signal and `kill_timeout` after it; what is open
//! then ends by SIGKILL. For an app without a handler the signal itself is such an end, so `kill_timeout` comes before
//! it: requests are waited for until they are answered, and a Node worker's long-lived connections (websockets) after a
//! `disconnect`, where another instance serves.
//!
//! Rungs that mean nothing for an app are skipped, so a program without agent and channel gets its signal at once. A
//! run that was never ready has no traffic and goes straight to the signal. Every rung but the first and the last has
//! a deadline; the last needs none, because SIGKILL does not ask. Nothing here decides *whether* to stop a run.

use std::time::Duration;

use crate::model::moment::Moment;
use crate::model::spec::{AppSpec, Balance, StopMethod};

use super::instance::{Phase, Run};
use super::vocabulary::{Action, IdleConnections, RequestsInFlight, StepKind};

/// `TakeOut` is answered within 1 s; a dispatcher that does not answer must not hold up a stop.
const SETTLE_LIMIT: Duration = Duration::from_millis(1200);
/// How long the agent may take to say whether the app listens for the kill signal.
const ASK_LIMIT: Duration = Duration::from_millis(500);
/// Node's keepAliveTimeout of 5 s + 1 s, for an agent that does not answer: others know their server's.
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
    /// How many listeners the app has for the kill signal, once the agent has said so.
    listeners: Option<u32>,
    /// How draining ended.
    drained: Drained,
    /// When draining is to be over, for an app whose signal is its end.
    finish_until: Option<Moment>,
    /// At most so long, for one that is removed before it ever was ready.
    drain_limit: Option<Duration>,
    /// How long the agent may take to answer.
    ask: Duration,
    /// From the signal to SIGKILL.
    grace: Duration,
}

/// How far a run got with its connections before the signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Drained {
    /// It has not been asked to, or cannot be.
    Unknown,
    /// None is left, but for websockets.
    Yes,
    /// Time was over.
    No,
}

#[derive(Clone, Debug)]
enum Rung {
    AwaitingSpawn,
    Settling { until: Moment },
    Asking { until: Moment },
    Draining { until: Moment },
    Disconnecting { until: Moment },
    Signalled { kill_at: Moment },
    Killed,
}

/// Where to go on; rungs that do not apply lead to the next one.
enum Towards {
    Settle,
    Ask,
    Drain,
    End,
    Disconnect(Moment),
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
    /// Nobody waits any longer.
    Hurried,
}

impl Ladder {
    /// The deadline of the present rung.
    pub(super) fn deadline(&mut self, visit: &mut dyn FnMut(&mut Moment)) {
        if let Some(at) = &mut self.finish_until {
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

    /// When it is ended by force, at the latest.
    pub(super) fn kill_at(&self, spec: &AppSpec) -> Option<Moment> {
        match self.rung {
            Rung::Signalled { kill_at } => Some(kill_at),
            Rung::Settling { until } => Some(until + self.ask + self.drain(spec).within + self.grace),
            Rung::Asking { until } => Some(until + self.drain(spec).within + self.grace),
            Rung::Draining { until } if self.listeners == Some(0) => Some(until),
            Rung::Draining { until } => Some(until + self.grace),
            Rung::Disconnecting { until } => Some(until),
            Rung::AwaitingSpawn | Rung::Killed => None,
        }
    }

    /// Whether SIGKILL was needed.
    pub(super) const fn killed(&self) -> bool {
        matches!(self.rung, Rung::Killed)
    }

    /// Whether it was ended by force: by SIGKILL, or by a signal that the app does not handle while connections were
    /// open that it was to end.
    pub(super) fn forced(&self) -> bool {
        self.killed() || (self.listeners == Some(0) && self.drained == Drained::No)
    }

    /// How connections are to drain.
    fn drain(&self, spec: &AppSpec) -> DrainRules {
        let set = spec.stop.drain_timeout.map(|time| time.min(spec.stop.timeout));
        let (in_flight, within) = match self.listeners {
            Some(0) => (RequestsInFlight::Finish, spec.stop.timeout),
            // The agent is there and knows how long its server lets idle connections wait.
            Some(_) => (RequestsInFlight::Leave, set.unwrap_or(spec.stop.timeout)),
            None => (RequestsInFlight::Leave, set.unwrap_or(DRAIN_DEFAULT.min(spec.stop.timeout))),
        };
        let limit = self.drain_limit.unwrap_or(within);
        let patience = self.drain_limit.or(set).or(self.listeners.is_none().then_some(within));
        DrainRules { in_flight, within: within.min(limit), patience: patience.map(|time| time.min(within)) }
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
            listeners: None,
            drained: Drained::Unknown,
            finish_until: None,
            drain_limit: None,
            ask: ASK_LIMIT,
            grace,
        }
    }
}

/// Moves with the other deadlines although nothing waits for it by itself.
fn visit_quietly(at: &mut Moment, visit: &mut dyn FnMut(&mut Moment), rung: &Rung) {
    match rung {
        Rung::Settling { .. } | Rung::Asking { .. } | Rung::Draining { .. } | Rung::Disconnecting { .. } => {
            visit(at);
        }
        Rung::AwaitingSpawn | Rung::Signalled { .. } | Rung::Killed => {}
    }
}

/// How connections drain.
struct DrainRules {
    in_flight: RequestsInFlight,
    /// For everything.
    within: Duration,
    /// For idle connections.
    patience: Option<Duration>,
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
            // What is in reserve is out already, but perhaps not settled yet.
            Phase::Ready | Phase::Reserve => (Towards::Settle, false),
            // It is in no rotation, but it may have taken connections by itself.
            Phase::Launching { .. } if accepts_by_itself(&self.spec) && self.pid.is_some() => {
                (Towards::Ask, false)
            }
            Phase::Launching { .. } => (Towards::Signal, self.pid.is_none()),
            Phase::Queued | Phase::Stopping(_) | Phase::Leaving { .. } => return,
        };
        descent.actions.extend(self.ask_no_more());
        let grace = self.spec.stop.timeout;
        let (drain_limit, ask, grace) = match cause {
            Cause::Asked => (None, ASK_LIMIT, grace),
            Cause::NotReady | Cause::Undone => {
                (Some(NOT_READY.0.min(grace)), ASK_LIMIT.min(NOT_READY.1), grace.min(NOT_READY.2))
            }
        };
        self.phase = Phase::Stopping(Ladder {
            since: now,
            cause,
            signalled_at: None,
            rung: Rung::AwaitingSpawn,
            idle,
            listeners: None,
            drained: Drained::Unknown,
            finish_until: None,
            drain_limit,
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
        let Phase::Stopping(ladder) = &mut self.phase else { return };
        let towards = match (&ladder.rung, heard) {
            (Rung::Killed, Heard::Hurried) => return,
            (Rung::AwaitingSpawn, Heard::Hurried) => {
                // There is nobody to kill yet.
                ladder.grace = Duration::ZERO;
                return;
            }
            (
                Rung::Settling { .. }
                | Rung::Asking { .. }
                | Rung::Draining { .. }
                | Rung::Disconnecting { .. }
                | Rung::Signalled { .. },
                Heard::Hurried,
            ) => Towards::Kill,
            (Rung::AwaitingSpawn, Heard::Spawned) => Towards::Signal,
            (Rung::Settling { .. }, Heard::Settled | Heard::TimeOver) => Towards::Ask,
            (Rung::Asking { .. }, Heard::KillListeners(count)) => {
                ladder.listeners = Some(count);
                Towards::Drain
            }
            (Rung::Asking { .. }, Heard::TimeOver) => Towards::Drain,
            (Rung::Draining { .. }, Heard::Drained) => {
                ladder.drained = Drained::Yes;
                Towards::End
            }
            (Rung::Draining { .. }, Heard::TimeOver) => {
                ladder.drained = Drained::No;
                Towards::End
            }
            (Rung::Disconnecting { .. }, Heard::TimeOver) => {
                ladder.drained = Drained::No;
                Towards::Signal
            }
            // The end of the channel also means that nobody is left to answer.
            (
                Rung::Draining { .. } | Rung::Asking { .. } | Rung::Disconnecting { .. },
                Heard::ChannelClosed,
            ) => Towards::Signal,
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
        let rotation = spec.has_rotation();
        let agent = spec.has_agent();
        loop {
            towards = match towards {
                Towards::Settle if rotation => {
                    descent.actions.push(Action::TakeOut { id: id.clone() });
                    descent.steps.push(StepKind::Draining);
                    ladder.rung = Rung::Settling { until: now + SETTLE_LIMIT };
                    return;
                }
                Towards::Settle => Towards::Ask,
                // An app that is told by message has said how it wants to be ended.
                Towards::Ask if agent && !by_message(spec) => {
                    let signal = spec.stop.signal;
                    descent.actions.push(Action::AskKillListeners { id: id.clone(), signal });
                    ladder.rung = Rung::Asking { until: now + ladder.ask };
                    return;
                }
                Towards::Ask => Towards::Drain,
                Towards::Drain if agent => {
                    if !rotation {
                        descent.steps.push(StepKind::Draining);
                    }
                    let DrainRules { in_flight, within, patience } = ladder.drain(spec);
                    descent.actions.push(Action::Drain {
                        id: id.clone(),
                        idle: ladder.idle,
                        patience,
                        in_flight,
                        websockets: spec.stop.drain_websockets,
                        within,
                    });
                    ladder.finish_until = Some(now + within);
                    ladder.rung = Rung::Draining { until: now + within };
                    return;
                }
                Towards::Drain => Towards::End,
                Towards::End if !cluster || by_message(spec) => Towards::Signal,
                Towards::End => match (ladder.listeners, spec.stop.method) {
                    // Nothing listens for the signal. Websockets may last a while where their clients could not do
                    // better: when nobody else serves, they are about to lose the server in any case.
                    (Some(0), _)
                        if ladder.drained == Drained::Yes && ladder.idle == IdleConnections::Wait =>
                    {
                        Towards::Disconnect(ladder.finish_until.unwrap_or(now))
                    }
                    (Some(_), _) | (None, StopMethod::Signal) => Towards::Signal,
                    // Who used up the time for draining would not get any further by this.
                    (None, StopMethod::Disconnect) if ladder.drained == Drained::No => Towards::Signal,
                    (None, StopMethod::Disconnect) => Towards::Disconnect(now + ladder.drain(spec).within),
                },
                Towards::Disconnect(until) => {
                    descent.actions.push(Action::Disconnect { id: id.clone() });
                    ladder.rung = Rung::Disconnecting { until };
                    return;
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
    let shared = if spec.is_node_cluster() {
        matches!(spec.balance, Balance::Shared) || spec.balance.is_slots()
    } else {
        !spec.listen.is_empty()
    };
    shared && spec.has_agent()
}

/// Whether the app is ended by a message instead of a signal.
const fn by_message(spec: &AppSpec) -> bool {
    spec.stop.with_message && spec.has_channel()
}
