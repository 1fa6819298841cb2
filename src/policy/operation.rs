//! Operations: what somebody asked of an app, from the save that makes it durable to the reply.
//!
//! ```text
//!  (Checking, Preparing ─►) Saving ──► Going ──► (Winding ─►) ────────────► (finished)
//!               │  reload: all replaced ─► Closing ─► Sweeping ─────▲
//!               │  reload: a new one failed ─► Undoing ─► Closing ──┤
//!               └  delete: all gone ─► Closing ─────────────────────┘
//! ```
//!
//! Nothing is started or stopped while `Saving`. An operation never restarts a crashed run: that is upkeep's, in `app`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::model::exit::ExitReason;
use crate::model::id::{AppName, InstanceId, Slot};
use crate::model::saved::{Desired, HookKind, ReloadMemo, StartedFrom, Trigger};
use crate::model::spec::AppSpec;

use super::admit::{Kind, Slots};
use super::app::{App, Shared};
use super::asked::Plan;
use super::batch::RequestKey;
use super::health::Relapses;
use super::instance::Run;
use super::ledger::{After, Pending, Serial};
use super::restart::Streak;
use super::slot::Rest;
use super::stop::Cause;
use super::vocabulary::{Action, AppOutcome, IdleConnections, Rollback, StepKind};
use super::wanted::{Change, is_same_program, slot_at};

/// What is going on with an app.
#[derive(Clone, Debug)]
pub(super) struct Operation {
    pub(super) serial: Serial,
    pub(super) kind: Kind,
    pub(super) stage: Stage,
    /// The slots it is about; `None`: all.
    pub(super) slots: Slots,
    /// The release a reload brings about.
    pub(super) revision: u64,
    /// Who waits for it.
    pub(super) clients: Vec<RequestKey>,
    /// The spec it brings about, when that is a new one.
    pub(super) target: Option<Arc<AppSpec>>,
    /// The verb in past tense.
    pub(super) what: &'static str,
    /// Slots whose first run must be ready before the operation has succeeded.
    pub(super) awaiting: BTreeSet<Slot>,
    /// Slots of a reload whose new run is or was in rotation.
    pub(super) replaced: BTreeSet<Slot>,
    /// Slots of a failed reload that were among them, and run the release before again.
    pub(super) restored: BTreeSet<Slot>,
    /// Slots of a failed reload in which the release before serves again since the way back began.
    pub(super) back: BTreeSet<Slot>,
    /// Slots of a failed reload in which nothing has to be done for that.
    pub(super) settled: BTreeSet<Slot>,
    /// The first steps back have been taken.
    pub(super) rolling_back: bool,
    /// The run of the release before that did not come back, and why.
    pub(super) way_back_ends: Option<(InstanceId, ExitReason)>,
    /// The files that the instances before the reload were started from.
    pub(super) from: BTreeMap<Slot, Arc<StartedFrom>>,
    /// What is to be saved when the check has been passed.
    pub(super) plan: Option<Box<Plan>>,
    pub(super) failure: Option<(InstanceId, ExitReason)>,
    /// Why it is not remembered.
    pub(super) unsaved: Option<String>,
    pub(super) trigger: Trigger,
    /// What is to be saved when the hook that has to allow it has succeeded.
    pub(super) prepared: Option<Pending>,
    /// Nothing of the app runs, and nothing is started before the hook has allowed it: an operation that a reboot had
    /// interrupted.
    pub(super) held_back: bool,
    /// The app was up, so its `post_stop` runs when it is down.
    pub(super) owes_post_stop: bool,
    /// A hook that failed without keeping anything from being done.
    pub(super) hook_failure: Option<(HookKind, InstanceId, String)>,
}

/// What supersedes an operation when the daemon is asked to end.
pub(super) const SHUTDOWN: &str = "shutdown";

/// How far an operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// A hook runs that has to allow it: of a start when what it wants is durable, else before anything is.
    Preparing,
    /// Whether its instances could be started is being looked at; nothing has happened yet.
    Checking,
    /// What it wants is being saved.
    Saving,
    /// It acts.
    Going,
    /// A reload has failed: its new runs are being removed.
    Undoing,
    /// Its end is being saved.
    Closing,
    /// Slots that the new release does not have any more are being ended.
    Sweeping,
    /// Everything is down, and its last hook runs.
    Winding,
}

impl Stage {
    /// Whether what it wants is on disk, so that it may act.
    pub(super) const fn acts(self) -> bool {
        match self {
            Self::Preparing | Self::Checking | Self::Saving => false,
            Self::Going | Self::Undoing | Self::Closing | Self::Sweeping | Self::Winding => true,
        }
    }
}

impl Operation {
    pub(super) fn new(serial: Serial, kind: Kind, stage: Stage) -> Self {
        Self {
            serial,
            kind,
            stage,
            slots: None,
            revision: 0,
            clients: Vec::new(),
            target: None,
            what: past_tense(kind),
            awaiting: BTreeSet::new(),
            replaced: BTreeSet::new(),
            restored: BTreeSet::new(),
            back: BTreeSet::new(),
            settled: BTreeSet::new(),
            rolling_back: false,
            way_back_ends: None,
            from: BTreeMap::new(),
            plan: None,
            failure: None,
            unsaved: None,
            trigger: Trigger::Asked,
            prepared: None,
            held_back: false,
            owes_post_stop: kind == Kind::Delete,
            hook_failure: None,
        }
    }

    pub(super) fn covers(&self, slot: Slot) -> bool {
        self.slots.as_ref().is_none_or(|slots| slots.contains(&slot))
    }

    /// What an earlier supervisor knew of it.
    pub(super) fn recall(&mut self, memo: &ReloadMemo) {
        self.from = memo.from.iter().cloned().collect();
        self.trigger = memo.trigger;
        if memo.failure.is_some() {
            self.stage = Stage::Undoing;
            self.failure = memo.failure.clone();
            self.restored = memo.restored.iter().copied().collect();
        }
    }

    /// What became of the way back, where anything had to be done for it.
    fn rollback(&self) -> Option<Rollback> {
        (!self.restored.is_empty() || self.way_back_ends.is_some()).then(|| Rollback {
            restored: self.restored.iter().copied().collect(),
            failed: self.way_back_ends.clone(),
        })
    }

    /// An operation that an earlier supervisor had begun; nobody waits for it.
    pub(super) fn resumed(serial: Serial, kind: Kind, revision: u64) -> Self {
        Self { revision, ..Self::new(serial, kind, Stage::Going) }
    }

    /// What the next supervisor has to know of a reload beyond the runs it is about.
    pub(super) fn memo(&self, app: &AppName) -> Option<ReloadMemo> {
        (self.kind == Kind::Reload && self.stage.acts()).then(|| ReloadMemo {
            app: app.clone(),
            revision: self.revision,
            failure: self.failure.clone(),
            restored: self.restored.iter().copied().collect(),
            from: self.from.iter().map(|(slot, from)| (*slot, Arc::clone(from))).collect(),
            trigger: self.trigger,
        })
    }
}

pub(super) const fn past_tense(kind: Kind) -> &'static str {
    match kind {
        Kind::Start => "started",
        Kind::Restart => "restarted",
        Kind::Reload => "reloaded",
        Kind::Scale => "scaled",
        Kind::Stop => "stopped",
        Kind::Delete => "deleted",
    }
}

impl App {
    /// What is going on ends here: its clients are told by what. `ending` are the slots that are to end, `None`: all.
    pub(super) fn supersede(&mut self, by: &'static str, ending: &Slots, shared: &mut Shared) {
        self.flush_steps(shared);
        let waiting = self.next.take().map(|(_, keys)| keys).unwrap_or_default();
        let outcome = AppOutcome::Superseded { by };
        let rolls_back = self.rolls_back(shared);
        if let Some(mut operation) = self.operation.take() {
            self.settle(&operation.clients, &outcome, shared);
            self.abandon_gate(&operation, shared);
            if operation.kind == Kind::Reload && operation.stage.acts() {
                // In what goes on running there is one release in each slot, the old one where it can come back.
                let stay = |slot: &Slot| ending.as_ref().is_some_and(|ending| !ending.contains(slot));
                let replaced: Vec<Slot> = operation.replaced.iter().copied().filter(stay).collect();
                let revision = operation.revision;
                for slot in replaced {
                    if rolls_back && operation.stage == Stage::Going && self.put_back(slot, shared) {
                        operation.replaced.remove(&slot);
                        self.stop_runs(slot, IdleConnections::Wait, shared, |run| run.revision == revision);
                    } else {
                        self.stop_runs(slot, IdleConnections::Wait, shared, |run| run.revision != revision);
                    }
                }
                // SIGTERM leaves what is wanted as it is: the next daemon finishes or undoes the reload.
                if by != SHUTDOWN {
                    let replaced = operation.replaced.clone();
                    let revert = Change::Revert { app: self.name.clone(), replaced };
                    shared.ledger.push_regardless(revert, After::Nothing);
                }
                if operation.stage == Stage::Going {
                    self.remove_candidates(&operation, Cause::Asked, shared);
                }
            }
            // What supersedes it may find nothing to do, and would leave it on disk.
            if operation.kind == Kind::Restart && operation.stage.acts() && by != SHUTDOWN {
                let finish = Change::Finish { app: self.name.clone() };
                shared.ledger.push_regardless(finish, After::Nothing);
            }
            for state in self.slots.values_mut().filter(|state| state.rest == Rest::Held) {
                state.rest = Rest::Due;
            }
        }
        self.note_ended(shared);
        self.settle(&waiting, &outcome, shared);
    }

    /// What the operation wants is durable, or could not be saved.
    pub(super) fn saved(
        &mut self,
        serial: Serial,
        error: Option<&str>,
        regardless: bool,
        shared: &mut Shared,
    ) {
        let Some(operation) = self.operation.as_mut().filter(|operation| operation.serial == serial) else {
            return;
        };
        if let Some(error) = error {
            match operation.kind {
                Kind::Stop | Kind::Delete => operation.unsaved = Some(error.to_owned()),
                Kind::Restart if regardless => {}
                Kind::Restart | Kind::Start | Kind::Reload | Kind::Scale => {
                    self.finish(AppOutcome::NotSaved { error: error.to_owned() }, shared);
                    return;
                }
            }
        }
        if operation.stage == Stage::Saving {
            if self.ask_to_start(shared) {
                return;
            }
            if let Some(operation) = &mut self.operation {
                operation.stage = Stage::Going;
            }
            self.begin(shared);
        }
    }

    /// The effects of an operation begin.
    pub(super) fn begin(&mut self, shared: &mut Shared) {
        let Some(saved) = shared.ledger.wanted.app(&self.name) else { return };
        let wanted: Vec<(Slot, Desired)> =
            saved.slots.iter().enumerate().map(|(index, slot)| (slot_at(index), slot.desired)).collect();
        let (revision, wished) = (saved.revision, saved.spec.instances);
        self.sync(shared);
        let was_up = self.is_up() || self.runs().next().is_some();
        let Some(operation) = &mut self.operation else { return };
        operation.revision = revision;
        let chosen: Vec<Slot> = wanted
            .iter()
            .filter(|(slot, desired)| operation.covers(*slot) && *desired == Desired::Running)
            .map(|(slot, _)| *slot)
            .collect();
        if operation.kind == Kind::Reload {
            operation.from = self
                .slots
                .iter()
                .filter_map(|(slot, state)| {
                    let from = state.runs.iter().rev().find(|run| run.is_ready())?.from.as_ref()?;
                    Some((*slot, Arc::clone(from)))
                })
                .collect();
        }
        let mut anew = Vec::new();
        if matches!(operation.kind, Kind::Start | Kind::Restart | Kind::Reload) {
            self.unprepared = false;
            for slot in &chosen {
                let runs = self.slots.get_mut(slot).into_iter().flat_map(|state| &mut state.runs);
                runs.for_each(Run::forgive);
            }
        }
        match operation.kind {
            Kind::Start | Kind::Restart => {
                let restart = operation.kind == Kind::Restart;
                for slot in chosen {
                    let Some(state) = self.slots.get_mut(&slot) else { continue };
                    state.gated = state.is_at_rest();
                    if !state.has_live() {
                        state.launched =
                            restart && state.launched && !matches!(state.rest, Rest::Stopped | Rest::Errored);
                    }
                    (state.streak, state.rest, state.ended) = (Streak::default(), Rest::Due, None);
                    if restart || !state.runs.iter().any(Run::is_ready) {
                        operation.awaiting.insert(slot);
                    }
                    if restart {
                        anew.push(slot);
                    }
                }
            }
            Kind::Scale => {
                for slot in chosen {
                    if let Some(state) = self.slots.get(&slot)
                        && !state.launched
                        && state.rest == Rest::Due
                        && !state.gated
                        && state.runs.is_empty()
                    {
                        operation.awaiting.insert(slot);
                    }
                }
            }
            Kind::Reload => {
                // Slots that the release does not have any more are not replaced, but given up at the end.
                operation.slots = Some(chosen.iter().copied().filter(|slot| slot.0 < wished).collect());
                for slot in chosen {
                    if let Some(state) = self.slots.get_mut(&slot) {
                        if operation.trigger == Trigger::Asked {
                            state.streak = Streak::default();
                        }
                        if matches!(state.rest, Rest::Errored | Rest::Stopped) {
                            state.launched = false;
                        }
                        // Where nothing runs the new release goes first, not the old one once more.
                        if !state.has_live() && slot.0 < wished {
                            (state.rest, state.ended) = (Rest::Held, None);
                        }
                    }
                }
            }
            Kind::Stop | Kind::Delete => {
                operation.owes_post_stop |= was_up;
                // From now on it is down because somebody said so.
                for (slot, state) in &mut self.slots {
                    if operation.covers(*slot) {
                        state.ended = None;
                    }
                }
            }
        }
        for slot in anew {
            self.stop_runs(slot, IdleConnections::Close, shared, |_| true);
        }
    }

    /// Other rules are durable: what runs follows them, whatever becomes of the operation that brought them.
    pub(super) fn follow_rules(&mut self, shared: &mut Shared) {
        let Some(saved) = shared.ledger.wanted.app(&self.name) else { return };
        let (spec, revision) = (Arc::clone(&saved.spec), saved.revision);
        // Of a release before there may be instances too that run nothing else.
        let follows = |run: &&mut Run| run.revision == revision || is_same_program(&run.spec, &spec);
        let mut revisions = BTreeSet::from([revision]);
        let mut asked_anew = Vec::new();
        for state in self.slots.values_mut() {
            for run in state.runs.iter_mut().filter(follows) {
                revisions.insert(run.revision);
                // How often the limit before was crossed says nothing about this one.
                if run.spec.max_memory != spec.max_memory {
                    state.overruns = Relapses::default();
                }
                asked_anew.extend(run.take_over(&spec, shared.now));
            }
        }
        for revision in revisions {
            shared.actions.push(Action::TakeOver {
                app: self.name.clone(),
                spec: Arc::clone(&spec),
                revision,
            });
        }
        shared.actions.extend(asked_anew);
    }

    /// Takes the operation one step further. Says whether there may be another one.
    pub(super) fn drive(&mut self, shared: &mut Shared) -> bool {
        let Some(operation) = &mut self.operation else { return false };
        if operation.stage == Stage::Going {
            // Nobody waits for what ended for good, or was given up.
            let wanted = &shared.ledger.wanted;
            operation.awaiting.retain(|slot| {
                wanted.slot(&self.name, *slot).is_some_and(|slot| slot.desired == Desired::Running)
            });
        }
        match (operation.stage, operation.kind) {
            (Stage::Preparing | Stage::Checking | Stage::Saving | Stage::Closing | Stage::Winding, _) => {
                false
            }
            (Stage::Going, Kind::Start | Kind::Restart) => {
                let (restart, awaiting) = (operation.kind == Kind::Restart, operation.awaiting.clone());
                let hopeless = self.hopeless(&awaiting, shared);
                if hopeless.is_none() && !awaiting.is_empty() {
                    return false;
                }
                if restart {
                    let finish = Change::Finish { app: self.name.clone() };
                    shared.ledger.push_regardless(finish, After::Nothing);
                }
                match hopeless {
                    Some((on, why)) => self.finish(AppOutcome::Waiting { on, why }, shared),
                    None => self.succeed(shared),
                }
                true
            }
            (Stage::Going, Kind::Scale) | (Stage::Sweeping, _) => {
                let wanted = shared.ledger.wanted.app(&self.name).map_or(0, |app| app.slots.len());
                if !operation.awaiting.is_empty() || self.slots.len() > wanted {
                    return false;
                }
                if operation.kind == Kind::Reload {
                    self.close_unserved_listeners(shared);
                }
                self.succeed(shared);
                true
            }
            (Stage::Going, Kind::Stop) => {
                let down = self.slots.iter().all(|(slot, state)| {
                    !operation.covers(*slot)
                        || (state.runs.is_empty()
                            && shared
                                .ledger
                                .wanted
                                .slot(&self.name, *slot)
                                .is_none_or(|wanted| wanted.desired == Desired::Stopped))
                });
                if !down || self.wind_up(shared) {
                    return false;
                }
                self.close_listeners_if_idle(shared);
                self.succeed(shared);
                true
            }
            (Stage::Going, Kind::Delete) => {
                let down = self.runs().next().is_none();
                if down && !self.wind_up(shared) {
                    self.close_listeners_if_idle(shared);
                    self.close(Change::Remove { app: self.name.clone() }, shared);
                }
                false
            }
            (Stage::Going, Kind::Reload) => self.drive_reload(shared),
            (Stage::Undoing, _) if self.rolls_back(shared) => self.drive_rollback(shared),
            (Stage::Undoing, _) => self.drive_abort(shared),
        }
    }

    /// The end of the operation is to be durable before its reply.
    pub(super) fn close(&mut self, change: Change, shared: &mut Shared) {
        let Some(operation) = &mut self.operation else { return };
        operation.stage = Stage::Closing;
        let after = After::Close { app: self.name.clone(), serial: operation.serial };
        shared.ledger.push_regardless(change, after);
    }

    /// The end of the operation is durable, or could not be saved.
    pub(super) fn closed(&mut self, serial: Serial, error: Option<&str>, shared: &mut Shared) {
        let Some(operation) = self.operation.as_mut().filter(|operation| operation.serial == serial) else {
            return;
        };
        if let Some(error) = error {
            operation.unsaved.get_or_insert_with(|| error.to_owned());
        }
        match (&operation.failure, operation.kind) {
            (Some((id, reason)), _) => {
                // Slots that only the failed release asked for went with it.
                let wanted = shared.ledger.wanted.app(&self.name).map_or(0, |app| app.slots.len());
                let outcome = AppOutcome::Failed {
                    id: id.clone(),
                    reason: reason.clone(),
                    replaced: operation
                        .replaced
                        .iter()
                        .copied()
                        .filter(|slot| (slot.0 as usize) < wanted)
                        .collect(),
                    kept: self
                        .slots
                        .iter()
                        .filter(|(slot, state)| {
                            // What was taken down for the release and is coming back does not serve yet.
                            !operation.replaced.contains(slot) && state.runs.iter().any(Run::is_ready)
                        })
                        .map(|(slot, _)| *slot)
                        .collect(),
                    rollback: operation.rollback().map(Box::new),
                };
                self.close_unserved_listeners(shared);
                for state in self.slots.values_mut().filter(|state| state.rest == Rest::Held) {
                    state.rest = Rest::Due;
                }
                self.finish(outcome, shared);
            }
            (None, Kind::Reload) => {
                operation.stage = Stage::Sweeping;
            }
            (None, Kind::Delete | Kind::Start | Kind::Restart | Kind::Scale | Kind::Stop) => {
                self.succeed(shared);
            }
        }
    }

    /// After a reload: what only the generation that has gone listened on would take connections that nobody serves.
    fn close_unserved_listeners(&self, shared: &mut Shared) {
        if let Some(app) = shared.ledger.wanted.app(&self.name) {
            let keep = Some(Arc::clone(&app.spec));
            shared.actions.push(Action::CloseListeners { app: self.name.clone(), keep });
        }
    }

    pub(super) fn succeed(&mut self, shared: &mut Shared) {
        let Some(operation) = &self.operation else { return };
        let what = operation.what;
        let slots = operation.slots.as_ref().map_or(self.slots.len(), BTreeSet::len);
        // Every save carries the whole state: a later one may have made up for it.
        let unsaved = operation.unsaved.as_ref().filter(|_| shared.ledger.unsaved.is_some());
        let outcome = match (unsaved, &operation.hook_failure) {
            (None, Some((hook, id, why))) => {
                AppOutcome::HookFailed { hook: *hook, id: id.clone(), why: why.clone(), done: Some(what) }
            }
            (Some(error), _) => AppOutcome::NotRemembered { what, error: error.clone() },
            (None, None) => AppOutcome::Done { what, slots: u32::try_from(slots).unwrap_or(u32::MAX) },
        };
        self.finish(outcome, shared);
    }

    /// The operation has ended: everybody who waits for it is told, and what waits behind it may begin.
    pub(super) fn finish(&mut self, outcome: AppOutcome, shared: &mut Shared) {
        self.flush_steps(shared);
        let Some(operation) = self.operation.take() else { return };
        self.settle(&operation.clients, &outcome, shared);
        self.note_ended(shared);
        let Some((ask, clients)) = self.next.take() else { return };
        if shared.ledger.wanted.app(&self.name).is_some() {
            shared.due.push((self.name.clone(), clients, ask));
        } else {
            // It waited for an app that did not come to be.
            self.settle(&clients, &outcome, shared);
        }
    }

    /// A run that the operation depends on has failed.
    pub(super) fn fail(&mut self, id: &InstanceId, reason: &ExitReason, shared: &mut Shared) {
        let pm_id = self.slots.get(&id.slot).map(|state| state.pm_id);
        let Some(operation) = &mut self.operation else { return };
        if operation.stage != Stage::Going {
            return;
        }
        operation.failure = Some((id.clone(), reason.clone()));
        let (kind, what) = (operation.kind, StepKind::Failed { reason: reason.clone() });
        if let Some(pm_id) = pm_id {
            self.step(id, pm_id, what);
        }
        match kind {
            Kind::Reload => {
                if let Some(mut operation) = self.operation.take() {
                    operation.stage = Stage::Undoing;
                    self.remove_candidates(&operation, Cause::Undone, shared);
                    self.operation = Some(operation);
                }
                if self.rolls_back(shared) {
                    self.begin_rollback(shared);
                }
            }
            Kind::Start | Kind::Restart | Kind::Scale => {
                let replaced = self
                    .slots
                    .iter()
                    .filter(|(_, state)| state.runs.iter().any(Run::is_ready))
                    .map(|(slot, _)| *slot)
                    .collect();
                if kind == Kind::Restart {
                    let finish = Change::Finish { app: self.name.clone() };
                    shared.ledger.push_regardless(finish, After::Nothing);
                }
                let (id, reason) = (id.clone(), reason.clone());
                let (kept, rollback) = (Vec::new(), None);
                self.finish(AppOutcome::Failed { id, reason, replaced, kept, rollback }, shared);
            }
            Kind::Stop | Kind::Delete => {}
        }
    }

    /// A run has come into rotation.
    pub(super) fn became_ready(&mut self, id: &InstanceId) {
        let run = self.run(id);
        let candidate = run.is_some_and(|run| self.is_candidate(id.slot, run));
        let way_back = run.is_some_and(|run| self.is_way_back(id.slot, run));
        let Some(operation) = &mut self.operation else { return };
        operation.awaiting.remove(&id.slot);
        if candidate {
            operation.replaced.insert(id.slot);
        }
        if way_back {
            operation.back.insert(id.slot);
            if operation.replaced.remove(&id.slot) {
                operation.restored.insert(id.slot);
            }
        }
    }

    /// Whether this run is to replace another one and has not yet.
    pub(super) fn is_candidate(&self, slot: Slot, run: &Run) -> bool {
        self.operation.as_ref().is_some_and(|operation| {
            operation.kind == Kind::Reload
                && matches!(operation.stage, Stage::Going | Stage::Undoing)
                && operation.covers(slot)
                && !operation.replaced.contains(&slot)
                && run.revision == operation.revision
        })
    }

    /// Whether this run has replaced another one in the reload that is going on.
    pub(super) fn is_replaced(&self, slot: Slot, run: &Run) -> bool {
        self.operation.as_ref().is_some_and(|operation| {
            operation.kind == Kind::Reload
                && operation.replaced.contains(&slot)
                && run.revision == operation.revision
        })
    }
}
