//! Planted bugs: what a wrong policy would do, between the right one and the world.
//!
//! Each must be found by the invariants within the random sequences; a bug that is not found would mean that the
//! simulation watches nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use pm::model::id::{AppName, Generation, InstanceId, OpId, Slot};
use pm::model::saved::{Desired, Found, SavedFleet};
use pm::model::signal::Signal;
use pm::model::spec::KillMode;
use pm::policy::memory::SAMPLES;
use pm::policy::vocabulary::{
    Action, AppOutcome, Command, Event, IdleConnections, Outcome, ProbeResult, ProbeRole, RequestsInFlight,
    Verb,
};

use crate::random::first_breach;
use crate::specs::LIMIT;

/// A bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bug {
    None,
    /// The old worker stays in rotation.
    DropTakeOut,
    /// The signal does not wait for unanswered hand-overs.
    SignalAtOnce,
    /// The signal does not wait for the drain.
    SkipDrain,
    /// What follows a save does not wait for it.
    SaveLater,
    ForgetReply,
    ReplyTwice,
    /// A new worker gets no connections.
    NoPutIn,
    ReuseGeneration,
    /// A spawned process counts as ready.
    BelieveReady,
    /// A pending restart survives the stop.
    RestartStopped,
    /// Zombies are never reaped.
    DropForget,
    /// Reaped before the tree is gone.
    ForgetEarly,
    /// SIGKILL in place of the signal.
    KillAtOnce,
    /// The old one goes when the new one is launched, not when it is ready.
    OldFirst,
    LoseExits,
    /// A new supervisor starts everything, stopped or not.
    StartStopped,
    /// A new supervisor does not look what is there.
    NoInventory,
    NeverKill,
    SpawnTwice,
    /// Listeners are closed while the app runs.
    CloseEarly,
    /// `stop` answers before the processes are gone.
    StopLies,
    DeafToTime,
    /// Nobody waits for what it needs.
    StartsAtOnce,
    /// What others need goes down with them.
    StopsAtOnce,
    /// A probe that failed counts as passed.
    ProbeLies,
    /// The health check of the first slot is believed whatever it says.
    BelieveWell,
    /// Whoever is measured uses too much.
    AllTooLarge,
    /// Who is on its way out is measured on.
    KeepMeasuring,
    /// Who is on its way out is asked on.
    KeepProbing,
    /// Hooks count as succeeded without having been run.
    SkipHooks,
    /// Hooks are run twice.
    TwoHooks,
    /// The end of a hook is never heard of.
    LoseHooks,
    /// What is out of rotation comes back before anybody says so: from reserve, or on its way out.
    ComesBack,
    /// Whoever comes back from reserve gets no connections.
    NoWayBack,
    /// A new worker gets connections as soon as it listens, whatever it has to wait for.
    Impatient,
    /// What cannot be started again is taken down all the same.
    BlindToFaults,
    /// Another release is started than the one that is meant.
    OtherRelease,
    /// The end of one instance takes another one down.
    Contagious,
    /// A hook that has ended is run once more, before its end is told.
    HookAgain,
    /// It is never heard that the second instance is gone.
    LoseEnds,
}

/// The bug and what it needs to know.
#[derive(Clone, Debug)]
pub(crate) struct Sabotage {
    pub(crate) bug: Bug,
    spawns: BTreeMap<AppName, Action>,
    serving: BTreeMap<(AppName, Slot), InstanceId>,
    lied: Vec<OpId>,
    lie: Option<(OpId, AppName)>,
    pub(crate) skipped: Vec<InstanceId>,
    /// Runs that were put in once.
    known: BTreeSet<InstanceId>,
    listens: Option<InstanceId>,
    hooks: BTreeMap<InstanceId, Action>,
    /// To be done once more.
    pub(crate) again: Vec<Action>,
}

impl Sabotage {
    pub(crate) fn new(bug: Bug) -> Self {
        Self {
            bug,
            spawns: BTreeMap::new(),
            serving: BTreeMap::new(),
            lied: Vec::new(),
            lie: None,
            skipped: Vec::new(),
            known: BTreeSet::new(),
            listens: None,
            hooks: BTreeMap::new(),
            again: Vec::new(),
        }
    }

    /// What the fleet hears.
    pub(crate) fn event(&mut self, event: Event) -> Vec<Event> {
        if let Event::Exited { id, .. } = &event {
            self.serving.retain(|_, serving| serving != id);
        }
        match (self.bug, event) {
            (Bug::BelieveReady, Event::Spawned { id, pid }) => {
                vec![Event::Spawned { id: id.clone(), pid }, Event::Ready { id }]
            }
            (Bug::ProbeLies, Event::Probed { id, role: ProbeRole::Ready, .. }) => {
                vec![Event::Probed { id, role: ProbeRole::Ready, result: ProbeResult::Passed }]
            }
            (Bug::AllTooLarge, Event::Measured { id, .. }) => {
                vec![Event::Measured { id, bytes: LIMIT * 2 }; SAMPLES as usize]
            }
            (Bug::BelieveWell, Event::Probed { id, role: ProbeRole::Health, .. }) if id.slot == Slot(0) => {
                vec![Event::Probed { id, role: ProbeRole::Health, result: ProbeResult::Passed }]
            }
            (Bug::HookAgain, Event::HookEnded { id, end }) => match self.hooks.remove(&id) {
                Some(hook) => {
                    self.again.push(hook);
                    Vec::new()
                }
                None => vec![Event::HookEnded { id, end }],
            },
            (Bug::LoseEnds, Event::TreeGone { id }) if id.slot == Slot(1) => Vec::new(),
            (Bug::LoseHooks, Event::HookEnded { .. })
            | (Bug::LoseExits, Event::Exited { .. })
            | (Bug::DeafToTime, Event::DeadlineReached) => Vec::new(),
            (Bug::StopLies, Event::Asked { op, command }) => {
                if let Command::Act { verb: Verb::Stop, selection, .. } = &command
                    && let [one] = &selection[..]
                    && one.slots.is_none()
                {
                    self.lie = Some((op, one.app.clone()));
                }
                vec![Event::Asked { op, command }]
            }
            (Bug::StartsAtOnce | Bug::StopsAtOnce, Event::Asked { op, mut command }) => {
                if let Command::Start { specs } | Command::Apply { specs, .. } | Command::Act { specs, .. } =
                    &mut command
                {
                    for spec in specs {
                        Arc::make_mut(spec).depends_on.clear();
                    }
                }
                vec![Event::Asked { op, command }]
            }
            (Bug::BlindToFaults, Event::Checked { app, check, fault: _ }) => {
                vec![Event::Checked { app, check, fault: None }]
            }
            (Bug::Impatient, Event::Listening { id, key }) => {
                self.listens = Some(id.clone());
                vec![Event::Listening { id, key }]
            }
            (_, event) => vec![event],
        }
    }

    /// What the world is asked for.
    pub(crate) fn actions(&mut self, actions: &mut Vec<Action>) {
        if self.bug == Bug::None {
            return;
        }
        let mut out = Vec::new();
        for action in actions.drain(..) {
            self.twist(action, &mut out);
        }
        if let Some((op, app)) = self.lie.take()
            && !out.iter().any(|action| matches!(action, Action::Reply { .. }))
        {
            self.lied.push(op);
            let apps = vec![(app, AppOutcome::Done { what: "stopped", slots: 1 })];
            out.push(Action::Reply { op, outcome: Outcome::Done { apps } });
        }
        if let Some(id) = self.listens.take()
            && !out.iter().any(|action| matches!(action, Action::PutIn { id: other } if *other == id))
        {
            out.push(Action::PutIn { id });
        }
        *actions = out;
    }

    fn twist(&mut self, action: Action, out: &mut Vec<Action>) {
        match (self.bug, action) {
            (Bug::HookAgain, Action::RunHook { id, kind, pm_id, spec, errored }) => {
                let hook = Action::RunHook { id: id.clone(), kind, pm_id, spec, errored };
                self.hooks.insert(id, hook.clone());
                out.push(hook);
            }
            (Bug::OtherRelease, Action::Spawn { id, pm_id, spec, revision }) => {
                out.push(Action::Spawn { id, pm_id, spec, revision: revision.saturating_sub(1).max(1) });
            }
            (Bug::Contagious, Action::PutIn { id }) => {
                self.serving.insert((id.app.clone(), id.slot), id.clone());
                out.push(Action::PutIn { id });
            }
            (Bug::Contagious, Action::Forget { id }) => {
                let mut others =
                    self.serving.values().filter(|other| other.app == id.app && other.slot != id.slot);
                let other = others.next().cloned();
                self.serving.retain(|_, serving| *serving != id && Some(&*serving) != other.as_ref());
                out.push(Action::Forget { id });
                out.extend(other.map(|id| Action::TakeOut { id }));
            }
            (Bug::SkipHooks, Action::RunHook { id, .. }) => self.skipped.push(id),
            (Bug::TwoHooks, Action::RunHook { id, kind, pm_id, spec, errored }) => {
                let mut other = id.clone();
                other.generation.0 += 1;
                let twice = errored.clone();
                out.push(Action::RunHook { id, kind, pm_id, spec: spec.clone(), errored });
                out.push(Action::RunHook { id: other, kind, pm_id, spec, errored: twice });
            }
            (Bug::KeepProbing, Action::StopProbing { .. })
            | (Bug::KeepMeasuring, Action::UnwatchMemory { .. })
            | (Bug::DropTakeOut, Action::TakeOut { .. })
            | (Bug::NoPutIn, Action::PutIn { .. })
            | (Bug::DropForget, Action::Forget { .. })
            | (Bug::NeverKill, Action::KillTree { .. }) => {}
            (Bug::ForgetReply, Action::Reply { op, .. }) if op.0 % 3 == 0 => {}
            (Bug::StopLies, Action::Reply { op, .. }) if self.lied.contains(&op) => {}
            (Bug::ReplyTwice, Action::Reply { op, outcome }) => {
                out.push(Action::Reply { op, outcome: outcome.clone() });
                out.push(Action::Reply { op, outcome });
            }
            (Bug::SignalAtOnce, Action::TakeOut { id }) | (Bug::SkipDrain, Action::Drain { id, .. }) => {
                if self.bug == Bug::SignalAtOnce {
                    out.push(Action::TakeOut { id: id.clone() });
                } else {
                    out.push(Action::Drain {
                        id: id.clone(),
                        idle: IdleConnections::Close,
                        patience: None,
                        in_flight: RequestsInFlight::Leave,
                        websockets: false,
                        within: std::time::Duration::from_secs(1),
                    });
                }
                out.push(Action::Signal { id, signal: Signal::INT, mode: KillMode::Target });
            }
            (Bug::ReuseGeneration, Action::Spawn { mut id, pm_id, spec, revision }) => {
                id.generation = Generation(id.generation.0.saturating_sub(1).max(1));
                out.push(Action::Spawn { id, pm_id, spec, revision });
            }
            (Bug::SpawnTwice, Action::Spawn { id, pm_id, spec, revision }) => {
                let mut other = id.clone();
                other.generation.0 += 1;
                out.push(Action::Spawn { id, pm_id, spec: spec.clone(), revision });
                out.push(Action::Spawn { id: other, pm_id, spec, revision });
            }
            (Bug::ForgetEarly, Action::EndLeftovers { id, signal }) => {
                out.push(Action::EndLeftovers { id: id.clone(), signal });
                out.push(Action::Forget { id });
            }
            (Bug::KillAtOnce, Action::Signal { id, .. }) => out.push(Action::KillTree { id }),
            (Bug::OldFirst, Action::PutIn { id }) => {
                self.serving.insert((id.app.clone(), id.slot), id.clone());
                out.push(Action::PutIn { id });
            }
            (Bug::OldFirst, Action::TakeOut { id }) => {
                self.serving.retain(|_, serving| *serving != id);
                out.push(Action::TakeOut { id });
            }
            (Bug::OldFirst, Action::Spawn { id, pm_id, spec, revision }) => {
                let old = self.serving.remove(&(id.app.clone(), id.slot));
                out.push(Action::Spawn { id, pm_id, spec, revision });
                out.extend(old.map(|id| Action::TakeOut { id }));
            }
            (Bug::RestartStopped, Action::Spawn { id, pm_id, spec, revision }) => {
                let spawn = Action::Spawn { id: id.clone(), pm_id, spec, revision };
                self.spawns.insert(id.app, spawn.clone());
                out.push(spawn);
            }
            (Bug::RestartStopped, Action::Reply { op, outcome }) => {
                if let Outcome::Done { apps } = &outcome
                    && let Some((app, AppOutcome::Done { what: "stopped", .. })) = apps.first()
                    && let Some(Action::Spawn { id, pm_id, spec, revision }) = self.spawns.get(app)
                {
                    let mut id = id.clone();
                    id.generation.0 += 1;
                    let (pm_id, spec, revision) = (*pm_id, spec.clone(), *revision);
                    out.push(Action::Reply { op, outcome });
                    out.push(Action::Spawn { id, pm_id, spec, revision });
                    return;
                }
                out.push(Action::Reply { op, outcome });
            }
            (Bug::NoWayBack, Action::PutIn { id }) => {
                if self.known.insert(id.clone()) {
                    out.push(Action::PutIn { id });
                }
            }
            (Bug::ComesBack, Action::TakeOut { id }) => {
                out.push(Action::TakeOut { id: id.clone() });
                out.push(Action::PutIn { id });
            }
            (Bug::CloseEarly, Action::PutIn { id }) => {
                let app = id.app.clone();
                out.push(Action::PutIn { id });
                out.push(Action::CloseListeners { app, keep: None });
            }
            (_, action) => out.push(action),
        }
    }

    /// What a new supervisor is told.
    pub(crate) fn restore(&mut self, saved: &mut SavedFleet, found: &mut Vec<Found>) {
        self.serving.clear();
        self.known.clear();
        match self.bug {
            Bug::StartStopped => {
                let kept = saved.apps.iter_mut().filter(|app| app.operation.is_none());
                for slot in kept.flat_map(|app| &mut app.slots) {
                    slot.desired = Desired::Running;
                }
            }
            Bug::NoInventory => found.clear(),
            _ => {}
        }
    }
}

#[test]
fn every_planted_bug_is_found() {
    for bug in [
        Bug::DropTakeOut,
        Bug::SignalAtOnce,
        Bug::SkipDrain,
        Bug::SaveLater,
        Bug::ForgetReply,
        Bug::ReplyTwice,
        Bug::NoPutIn,
        Bug::ReuseGeneration,
        Bug::BelieveReady,
        Bug::RestartStopped,
        Bug::DropForget,
        Bug::ForgetEarly,
        Bug::KillAtOnce,
        Bug::OldFirst,
        Bug::LoseExits,
        Bug::StartStopped,
        Bug::NoInventory,
        Bug::NeverKill,
        Bug::SpawnTwice,
        Bug::CloseEarly,
        Bug::StopLies,
        Bug::DeafToTime,
        Bug::StartsAtOnce,
        Bug::StopsAtOnce,
        Bug::ProbeLies,
        Bug::BelieveWell,
        Bug::AllTooLarge,
        Bug::KeepMeasuring,
        Bug::KeepProbing,
        Bug::SkipHooks,
        Bug::TwoHooks,
        Bug::LoseHooks,
        Bug::ComesBack,
        Bug::NoWayBack,
        Bug::Impatient,
        Bug::BlindToFaults,
        Bug::OtherRelease,
        Bug::Contagious,
        Bug::HookAgain,
        Bug::LoseEnds,
    ] {
        match first_breach(bug, 0..2000) {
            Some((seed, why)) => println!("{bug:?}: seed {seed}: {why}"),
            None => panic!("{bug:?} is not found"),
        }
    }
}
