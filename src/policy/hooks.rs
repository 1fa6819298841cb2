//! When the programs run that an app has beside its instances, and what follows from their end.
//!
//! | hook | before, after or when | its failure |
//! | --- | --- | --- |
//! | `pre_start` | before the first instance of a start or restart, also after a reboot | nothing is started, or nothing is stopped |
//! | `pre_reload` | before a reload of what runs changes anything | nothing is changed |
//! | `post_stop` | after the last process of a stop or delete | is told; what is down stays down |
//! | `on_errored` | when a slot was given up | nothing |
//!
//! One at a time for an app. A restart or reload has not begun while its hook runs: when the supervisor dies then,
//! whoever waits asks again. What a start or stop owes is in the memo, and is done by the next supervisor. Nothing here
//! runs anything.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use crate::model::exit::ExitReason;
use crate::model::id::{Generation, InstanceId, PmId, Slot};
use crate::model::moment::Moment;
use crate::model::saved::{Desired, HookKind, HookMemo, Trigger};
use crate::model::spec::AppSpec;

use super::admit::Kind;
use super::app::{App, Shared};
use super::ledger::{After, Pending, Serial};
use super::news::What;
use super::operation::{Operation, Stage};
use super::slot::Rest;
use super::vocabulary::{Action, AppOutcome, HookEnd, StepKind};
use super::wanted::{Change, slot_at};

/// How many hooks of an app wait for their turn; the oldest news of slots that were given up are dropped.
const WAITING_MAX: usize = 16;

/// The hooks of an app that run, or wait for that.
#[derive(Clone, Debug, Default)]
pub(super) struct HookRuns {
    running: Option<Running>,
    waiting: VecDeque<Wish>,
    /// Numbers them; counts from the clock, so that the next supervisor gives out others.
    last: u64,
}

#[derive(Clone, Debug)]
struct Running {
    id: InstanceId,
    wish: Wish,
    /// When it is killed.
    until: Option<Moment>,
    killed: Option<Killed>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Killed {
    /// Its time was over.
    Late,
    /// Nobody waits for it any more.
    Superseded,
}

#[derive(Clone, Debug)]
struct Wish {
    kind: HookKind,
    spec: Arc<AppSpec>,
    /// The operation that waits for it.
    waits: Option<Serial>,
    /// For `on_errored`: which slot, and why.
    errored: Option<(Slot, String)>,
}

impl HookRuns {
    pub(super) fn is_idle(&self) -> bool {
        self.running.is_none() && self.waiting.is_empty()
    }

    /// Hands the pending deadline to `visit`.
    pub(super) fn deadline(&mut self, visit: &mut dyn FnMut(&mut Moment)) {
        if let Some(at) = self.running.as_mut().and_then(|running| running.until.as_mut()) {
            visit(at);
        }
    }

    pub(super) fn next_deadline(&self) -> Option<Moment> {
        self.running.as_ref().and_then(|running| running.until)
    }
}

impl App {
    /// The hook that has to succeed before an operation changes anything. (A start has its own: see `ask_to_start`.)
    fn gate_of(&self, kind: Kind, spec: &AppSpec, meant_to_run: bool) -> Option<HookKind> {
        let runs = self.runs().next().is_some();
        let hook = match kind {
            Kind::Reload if runs => HookKind::PreReload,
            Kind::Reload | Kind::Restart => HookKind::PreStart,
            // What is added would be the first to run.
            Kind::Scale if meant_to_run && !runs => HookKind::PreStart,
            Kind::Start | Kind::Scale | Kind::Stop | Kind::Delete => return None,
        };
        spec.hooks.of(hook).map(|_| hook)
    }

    /// The operation waits for this hook.
    pub(super) fn run_gate(&mut self, hook: HookKind, spec: Arc<AppSpec>, shared: &mut Shared) {
        let Some(operation) = &mut self.operation else { return };
        operation.stage = Stage::Preparing;
        let waits = Some(operation.serial);
        self.want_hook(Wish { kind: hook, spec, waits, errored: None }, shared);
    }

    /// What a start wants is durable: its hook goes first, if it has one. Says whether it does.
    pub(super) fn ask_to_start(&mut self, shared: &mut Shared) -> bool {
        let Some(operation) = &self.operation else { return false };
        let Some(saved) = shared.ledger.wanted.app(&self.name) else { return false };
        let starts = saved
            .slots
            .iter()
            .enumerate()
            .any(|(index, slot)| slot.desired == Desired::Running && operation.covers(slot_at(index)));
        if operation.kind != Kind::Start || saved.spec.hooks.pre_start.is_none() || !starts {
            return false;
        }
        let spec = Arc::clone(&saved.spec);
        self.run_gate(HookKind::PreStart, spec, shared);
        true
    }

    /// Everything of a stop or delete is gone: its hook goes last, once. Says whether it does, or another one still runs.
    pub(super) fn wind_up(&mut self, shared: &mut Shared) -> bool {
        let Some(operation) = &self.operation else { return false };
        if operation.kind == Kind::Delete
            && self.hooks.running.as_ref().is_some_and(|it| it.wish.waits.is_none())
        {
            self.kill_hook(Killed::Superseded, shared);
        }
        let Some(operation) = &mut self.operation else { return false };
        if self.hooks.running.is_some() {
            return true;
        }
        let Some(saved) = shared.ledger.wanted.app(&self.name) else { return false };
        let whole = saved.slots.iter().all(|slot| slot.desired == Desired::Stopped);
        if !operation.owes_post_stop || !whole || saved.spec.hooks.post_stop.is_none() {
            return false;
        }
        operation.owes_post_stop = false;
        operation.stage = Stage::Winding;
        let wish = Wish {
            kind: HookKind::PostStop,
            spec: Arc::clone(&saved.spec),
            waits: Some(operation.serial),
            errored: None,
        };
        self.want_hook(wish, shared);
        true
    }

    /// A slot was given up.
    pub(super) fn tell_errored(
        &mut self,
        slot: Slot,
        spec: &Arc<AppSpec>,
        reason: &ExitReason,
        shared: &mut Shared,
    ) {
        if spec.hooks.on_errored.is_some() && !shared.ending {
            let errored = Some((slot, reason.to_string()));
            self.want_hook(
                Wish { kind: HookKind::OnErrored, spec: Arc::clone(spec), waits: None, errored },
                shared,
            );
        }
    }

    fn want_hook(&mut self, wish: Wish, shared: &mut Shared) {
        self.hooks.waiting.push_back(wish);
        if self.hooks.waiting.len() > WAITING_MAX {
            let oldest = self.hooks.waiting.iter().position(|wish| wish.waits.is_none());
            oldest.map(|index| self.hooks.waiting.remove(index));
        }
        self.run_next_hook(shared);
    }

    fn run_next_hook(&mut self, shared: &mut Shared) {
        while self.hooks.running.is_none()
            && let Some(wish) = self.hooks.waiting.pop_front()
        {
            let serial = self.operation.as_ref().map(|operation| operation.serial);
            if wish.waits.is_some() && wish.waits != serial {
                continue;
            }
            let Some(hook) = wish.spec.hooks.of(wish.kind) else { continue };
            self.hooks.last = shared.now.nanos().max(self.hooks.last + 1);
            let generation = Generation(self.hooks.last);
            let id = InstanceId { app: self.name.clone(), slot: Slot::HOOK, generation };
            let pm_id = self.slots.values().next().map_or(PmId(0), |state| state.pm_id);
            let until = Some(shared.now + hook.timeout);
            shared.actions.push(Action::RunHook {
                id: id.clone(),
                kind: wish.kind,
                pm_id,
                spec: Arc::clone(&wish.spec),
                errored: wish.errored.clone(),
            });
            let step = StepKind::Hook { kind: wish.kind };
            if wish.waits.is_some() {
                self.step(&id, pm_id, step);
            } else {
                self.happened(&id, pm_id, What::Step(step));
            }
            self.hooks.running = Some(Running { id, wish, until, killed: None });
        }
    }

    fn kill_hook(&mut self, why: Killed, shared: &mut Shared) {
        if let Some(running) = &mut self.hooks.running
            && running.killed.is_none()
        {
            (running.killed, running.until) = (Some(why), None);
            shared.actions.push(Action::KillHook { id: running.id.clone() });
        }
    }

    /// Acts on the deadline, if it has passed.
    pub(super) fn expire_hook(&mut self, shared: &mut Shared) {
        if self.hooks.next_deadline().is_some_and(|at| at <= shared.now) {
            self.kill_hook(Killed::Late, shared);
        }
    }

    /// The operation ends before its hook: what was to allow it is ended, what cleans up after it goes on.
    pub(super) fn abandon_gate(&mut self, operation: &Operation, shared: &mut Shared) {
        let starts = operation.kind == Kind::Start || operation.held_back;
        // One that is being saved may be on disk when this supervisor dies, and the stop that came then is not.
        self.unprepared |= matches!(operation.stage, Stage::Saving | Stage::Preparing) && starts;
        if operation.stage == Stage::Preparing
            && self.hooks.running.as_ref().is_some_and(|running| running.wish.waits == Some(operation.serial))
        {
            self.kill_hook(Killed::Superseded, shared);
        }
    }

    /// What was to prepare a start was superseded by the stop of another slot: the rest is still to be started.
    pub(super) fn prepare_again(&mut self, shared: &mut Shared) {
        // What waited behind the stop goes first, and brings its own hook.
        let follows = self.next.is_some() || shared.due.iter().any(|(app, ..)| *app == self.name);
        if !self.unprepared || self.operation.is_some() || follows || shared.doomed {
            return;
        }
        self.unprepared = false;
        self.owe(HookKind::PreStart, shared);
    }

    /// Everything goes down: hooks too.
    pub(super) fn abandon_hooks(&mut self, shared: &mut Shared) {
        self.hooks.waiting.clear();
        self.kill_hook(Killed::Superseded, shared);
    }

    /// A hook has ended, with everything that it had started.
    pub(super) fn hook_ended(&mut self, id: &InstanceId, end: HookEnd, shared: &mut Shared) {
        let Some(running) = self.hooks.running.take_if(|running| running.id == *id) else { return };
        let Running { wish, killed, .. } = running;
        let limit = wish.spec.hooks.of(wish.kind).map(|hook| hook.timeout).unwrap_or_default();
        let failure = match (killed, end) {
            (Some(Killed::Late), _) => Some(format!("no end within {limit:?}, so it was killed")),
            (Some(Killed::Superseded), _) => Some("killed".to_owned()),
            (None, HookEnd::Succeeded) => None,
            (None, HookEnd::Failed(why)) => Some(why),
        };
        let pm_id = self.slots.values().next().map_or(PmId(0), |state| state.pm_id);
        self.happened(id, pm_id, What::HookEnded { kind: wish.kind, failure: failure.clone() });
        if let Some(operation) = &mut self.operation
            && wish.waits == Some(operation.serial)
        {
            match (operation.stage, failure) {
                (Stage::Preparing, None) => self.gate_opens(shared),
                (Stage::Preparing, Some(why)) => self.gate_stays_shut(wish.kind, id, why, shared),
                (Stage::Winding, failure) => {
                    operation.stage = Stage::Going;
                    operation.hook_failure = failure.map(|why| (wish.kind, id.clone(), why));
                }
                (
                    Stage::Checking
                    | Stage::Saving
                    | Stage::Going
                    | Stage::Undoing
                    | Stage::Closing
                    | Stage::Sweeping,
                    _,
                ) => {}
            }
        }
        self.run_next_hook(shared);
    }

    fn gate_opens(&mut self, shared: &mut Shared) {
        let Some(operation) = &mut self.operation else { return };
        match operation.prepared.take() {
            Some(pending) => {
                operation.stage = Stage::Saving;
                shared.ledger.waiting.push(pending);
            }
            // What it wants is durable; of an operation that was taken up again it is known how far it was.
            None => {
                operation.stage = Stage::Going;
                if operation.kind == Kind::Start {
                    self.begin(shared);
                }
            }
        }
    }

    fn gate_stays_shut(&mut self, hook: HookKind, id: &InstanceId, why: String, shared: &mut Shared) {
        let Some(operation) = &self.operation else { return };
        if operation.kind == Kind::Start || operation.held_back {
            let told = !operation.clients.is_empty();
            let covered = operation.slots.clone();
            let after = match operation.kind {
                Kind::Reload => Some(Change::Revert { app: self.name.clone(), replaced: BTreeSet::new() }),
                Kind::Restart => Some(Change::Finish { app: self.name.clone() }),
                Kind::Start | Kind::Scale | Kind::Stop | Kind::Delete => None,
            };
            let all = operation.held_back;
            let covers = |slot: &Slot| all || covered.as_ref().is_none_or(|slots| slots.contains(slot));
            let reason = ExitReason::NotStarted(format!("hook {hook} failed: {why}"));
            self.sync(shared);
            let mut given_up = Vec::new();
            for (slot, state) in self.slots.iter_mut().filter(|(slot, _)| covers(slot)) {
                let wanted = shared.ledger.wanted.slot(&self.name, *slot);
                if wanted.is_some_and(|wanted| wanted.desired == Desired::Running) && state.runs.is_empty() {
                    state.rest = Rest::Errored;
                    (state.last_exit, state.by_itself) = (Some(reason.clone()), true);
                    given_up.push(*slot);
                }
            }
            if let Some(change) = after {
                shared.ledger.push_regardless(change, After::Nothing);
            }
            let spec = shared.ledger.wanted.app(&self.name).map(|app| Arc::clone(&app.spec));
            if let Some(spec) = spec.filter(|_| !told) {
                for slot in given_up {
                    self.tell_errored(slot, &spec, &reason, shared);
                }
            }
        }
        self.finish(AppOutcome::HookFailed { hook, id: id.clone(), why, done: None }, shared);
    }

    /// What the next supervisor has to do for this app before or after anything else.
    pub(super) fn owed_hook(&self) -> Option<HookMemo> {
        let prepares = || HookMemo { app: self.name.clone(), kind: HookKind::PreStart };
        let Some(operation) = &self.operation else { return self.unprepared.then(prepares) };
        let kind = match (operation.kind, operation.stage) {
            _ if self.unprepared => return Some(prepares()),
            // What is being saved may be on disk when this supervisor dies, and is started by the next one.
            (Kind::Start, Stage::Saving | Stage::Preparing) => HookKind::PreStart,
            (_, Stage::Preparing) if operation.held_back => HookKind::PreStart,
            (Kind::Stop, Stage::Winding) => HookKind::PostStop,
            (Kind::Stop, Stage::Going) if operation.owes_post_stop => HookKind::PostStop,
            _ => return None,
        };
        Some(HookMemo { app: self.name.clone(), kind })
    }

    /// An operation that an earlier supervisor could not bring to its end because of a hook, or the start of an app that
    /// nothing is left of: after a reboot, or in a new daemon.
    pub(super) fn owe(&mut self, kind: HookKind, shared: &mut Shared) {
        let Some(saved) = shared.ledger.wanted.app(&self.name) else { return };
        if saved.spec.hooks.of(kind).is_none() {
            return;
        }
        let (revision, spec) = (saved.revision, Arc::clone(&saved.spec));
        let runs_on = saved.slots.iter().any(|slot| slot.desired == Desired::Running);
        if let Some(operation) = &mut self.operation {
            if kind == HookKind::PreStart && matches!(operation.kind, Kind::Reload | Kind::Restart) {
                operation.held_back = true;
                self.run_gate(kind, spec, shared);
            }
            return;
        }
        let serial = shared.new_serial();
        match kind {
            HookKind::PreStart => {
                self.operation = Some(Operation::resumed(serial, Kind::Start, revision));
                if !self.ask_to_start(shared) {
                    self.operation = None;
                }
            }
            // The rest of an app goes on when one of its slots is stopped.
            HookKind::PostStop if runs_on => {}
            HookKind::PostStop => {
                let mut operation = Operation::resumed(serial, Kind::Stop, revision);
                operation.owes_post_stop = true;
                self.operation = Some(operation);
            }
            HookKind::PreReload | HookKind::OnErrored => {}
        }
    }

    /// Puts a change on its way to the disk, or behind the hook that has to allow it.
    pub(super) fn save_or_prepare(&mut self, pending: Pending, shared: &mut Shared) {
        let Some(operation) = &mut self.operation else { return };
        let spec = operation.target.clone().or_else(|| {
            let saved = shared.ledger.wanted.app(&self.name);
            saved.map(|app| Arc::clone(&app.spec))
        });
        let (kind, asked) = (operation.kind, operation.trigger == Trigger::Asked);
        let wanted = shared.ledger.wanted.app(&self.name).map(|app| &app.slots[..]).unwrap_or_default();
        let meant = wanted.iter().any(|slot| slot.desired == Desired::Running);
        let gate = spec.filter(|_| asked).and_then(|spec| Some((self.gate_of(kind, &spec, meant)?, spec)));
        match gate {
            Some((hook, spec)) => {
                if let Some(operation) = &mut self.operation {
                    operation.prepared = Some(pending);
                }
                self.run_gate(hook, spec, shared);
            }
            None => shared.ledger.waiting.push(pending),
        }
    }
}
