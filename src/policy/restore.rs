//! A fleet that goes on where another supervisor was interrupted.
//!
//! What was saved says what is wanted, the memo says how far things were, and only the inventory says what exists: a
//! run that is not in it has no process, and one that is in it lives or is a zombie whose exit is accounted for now.
//! After a reboot the inventory is empty and everything wanted is started. Nobody waits for operations that are
//! finished or undone here; nothing that was stopped is started.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::model::exit::ExitReason;
use crate::model::id::{AppName, Generation, InstanceId, PmId, Slot};
use crate::model::moment::Moment;
use crate::model::saved::{
    Desired, Found, HookKind, HookMemo, InstanceMemo, Memo, ReloadMemo, SavedApp, SavedFleet, SavedOperation,
    SlotMemo,
};
use crate::model::spec::{AppSpec, CommandSpec, KillMode, Runtime};

use super::admit::Kind;
use super::app::App;
use super::fleet::{Fleet, Settings};
use super::health::{Pulse, Relapses};
use super::instance::{Phase, ReadySource, Run, START_SETTLE, ready_source};
use super::ledger::After;
use super::memory::Gauge;
use super::operation::{Operation, Stage};
use super::restart::Streak;
use super::slot::{Rest, SlotState};
use super::stop::{Cause, Descent, Ladder};
use super::vocabulary::{Action, IdleConnections};
use super::wanted::{Change, Wanted, slot_at, spec_of};

/// What a run that was launching gets at least to be ready: its word may be waiting to be read.
const READ_LIMIT: Duration = Duration::from_secs(2);

impl Fleet {
    /// The fleet as it goes on, and what is to be done at once. `memo` is that of the same boot, or none; `found` is the
    /// keeper's inventory, empty for a new daemon.
    #[must_use]
    pub fn restore(
        settings: Settings,
        now: Moment,
        saved: SavedFleet,
        memo: Option<Memo>,
        found: Vec<Found>,
    ) -> (Self, Vec<Action>) {
        let mut fleet = Self::with_wanted(settings, Wanted::from_saved(saved));
        fleet.shared.now = now;
        let known = memo.is_some();
        let memo = memo.unwrap_or_default();
        let owed = memo.hooks;
        let reloads: BTreeMap<AppName, ReloadMemo> =
            memo.reloads.into_iter().map(|reload| (reload.app.clone(), reload)).collect();
        let newest: BTreeMap<(AppName, Slot), Generation> =
            memo.slots.iter().map(|slot| ((slot.app.clone(), slot.slot), slot.newest)).collect();
        let mut slots: BTreeMap<(AppName, Slot), SlotMemo> =
            memo.slots.into_iter().map(|slot| ((slot.app.clone(), slot.slot), slot)).collect();
        let mut instances: BTreeMap<InstanceId, InstanceMemo> =
            memo.instances.into_iter().map(|run| (run.id.clone(), run)).collect();

        for (app, slot, reserved) in fleet.shared.ledger.wanted.reservations() {
            fleet.shared.retired.insert((app, slot), reserved.0 + 1);
        }
        for InstanceId { app, slot, generation } in &memo.retired {
            let next = fleet.shared.retired.entry((app.clone(), *slot)).or_default();
            *next = (*next).max(generation.0 + 1);
        }
        // A stop that was carried out on a full disk holds as long as anybody remembers it.
        for slot in slots.values().filter(|slot| slot.stop_unsaved) {
            let saved = fleet.shared.ledger.wanted.slot(&slot.app, slot.slot);
            if saved.is_none_or(|saved| saved.desired == Desired::Stopped) {
                continue;
            }
            let stop = Change::Stop { app: slot.app.clone(), slots: Some(BTreeSet::from([slot.slot])) };
            fleet.shared.ledger.wanted.apply(&stop);
            fleet.shared.ledger.push_regardless(stop, After::Nothing);
        }
        for app in memo.deleted {
            let delete = Change::Remove { app };
            fleet.shared.ledger.wanted.apply(&delete);
            fleet.shared.ledger.push_regardless(delete, After::Nothing);
        }
        let names: Vec<AppName> = fleet.shared.ledger.wanted.names().cloned().collect();
        for name in names {
            let app = fleet.adopt_app(&name, &mut slots);
            fleet.apps.insert(name, app);
        }
        let mut exited = BTreeMap::new();
        for one in found {
            let remembered = instances.remove(&one.id);
            if let Some(reason) = one.exited.clone() {
                let given_out = newest.get(&(one.id.app.clone(), one.id.slot));
                let forgotten =
                    remembered.is_none() && given_out.is_some_and(|last| *last >= one.id.generation);
                let left = remembered.as_ref().and_then(|memo| memo.left.clone());
                // Accounted for by the last supervisor: only the rest of its tree is left to see to.
                if let Some(reason) = left.or(forgotten.then_some(reason.clone())) {
                    fleet.adopt_left(one, remembered, reason);
                    continue;
                }
                exited.insert(one.id.clone(), reason);
            }
            fleet.adopt_run(one, remembered, known);
        }
        fleet.go_on_stopping();
        let names: Vec<AppName> = fleet.apps.keys().cloned().collect();
        for name in &names {
            fleet.resume(name, known, reloads.get(name), &exited);
        }
        for HookMemo { app, kind } in owed {
            if let Some(app) = fleet.apps.get_mut(&app) {
                app.owe(kind, &mut fleet.shared);
            }
        }
        // After a reboot, or in a new daemon, everything is started.
        if !known {
            for app in fleet.apps.values_mut().filter(|app| app.runs().next().is_none()) {
                app.owe(HookKind::PreStart, &mut fleet.shared);
            }
        }
        // Exits that nobody has seen yet: the same path as any other. Before anything is asked of the living, and after
        // it is known which operation they belong to.
        for (id, reason) in &exited {
            if let Some(app) = fleet.apps.get_mut(&id.app) {
                app.exited(id, reason, &mut fleet.shared);
                // A ladder that was begun for it just now was never climbed: it ended by itself.
                if let Some(run) = app.run_mut(id)
                    && let Phase::Leaving { ladder, .. } = &mut run.phase
                {
                    ladder.take_if(|ladder| ladder.since == now);
                }
            }
        }
        // A zombie takes no orders.
        fleet.shared.actions.retain(|action| ordered(action).is_none_or(|id| !exited.contains_key(id)));
        for name in &names {
            fleet.end_superfluous(name, known);
        }
        for app in fleet.apps.values() {
            app.note_ended(&mut fleet.shared);
        }
        // Every slot gets new generations in one save: those that were reserved may have been used.
        if names.is_empty() {
            let actions = fleet.settle();
            return (fleet, actions);
        }
        for name in &names {
            fleet
                .shared
                .ledger
                .push(Change::Reserve { app: name.clone() }, After::Reserved { app: name.clone() });
        }
        for state in fleet.apps.values_mut().flat_map(|app| app.slots.values_mut()) {
            state.reserving = true;
        }
        fleet.touched.extend(names);
        let actions = fleet.settle();
        (fleet, actions)
    }

    fn adopt_app(&self, name: &AppName, memos: &mut BTreeMap<(AppName, Slot), SlotMemo>) -> App {
        let mut app = App::new(name.clone());
        // What is open is known to the keeper; an app that is down closes it again.
        app.listening = true;
        let Some(saved) = self.shared.ledger.wanted.app(name) else { return app };
        for (index, wanted) in saved.slots.iter().enumerate() {
            let slot = slot_at(index);
            let rest = match wanted.desired {
                Desired::Running => Rest::Due,
                Desired::Stopped => Rest::Stopped,
            };
            let retired = self.shared.retired.get(&(name.clone(), slot)).copied();
            let next = retired.unwrap_or_default().max(wanted.reserved.0 + 1);
            let mut state = SlotState::new(wanted.pm_id, self.shared.now, rest, next);
            // After a reboot it starts from rest; what is found running is no start (see `adopt_run`).
            state.gated = wanted.desired == Desired::Running;
            if let Some(memo) = memos.remove(&(name.clone(), slot)) {
                state.restarts = memo.restarts;
                state.streak = Streak { unstable: memo.unstable, failures: memo.failures };
                state.created = memo.created;
                state.gated = memo.gated;
                (state.last_exit, state.by_itself) = (memo.last_exit, memo.by_itself);
                state.ended = memo.ended;
                state.relapses = Relapses { count: memo.relapses, pause_until: memo.replace_after };
                state.overruns = Relapses { count: memo.overruns, pause_until: memo.curb_after };
                state.next_generation = state.next_generation.max(memo.newest.0 + 1);
                if wanted.desired == Desired::Running {
                    state.rest = match memo.restart_at {
                        _ if memo.errored => Rest::Errored,
                        _ if memo.ended.is_some() => Rest::Stopped,
                        Some(at) => Rest::Waiting { at },
                        None => Rest::Due,
                    };
                }
            }
            app.slots.insert(slot, state);
        }
        app
    }

    /// A zombie whose exit was accounted for.
    fn adopt_left(&mut self, found: Found, memo: Option<InstanceMemo>, reason: ExitReason) {
        let (id, stopping) = (found.id.clone(), memo.and_then(|memo| memo.stopping));
        self.adopt_run(found, None, true);
        let Some(run) = self.apps.get_mut(&id.app).and_then(|app| app.run_mut(&id)) else { return };
        let ladder = stopping
            .map(|(began, signalled)| Ladder::signalled(began, signalled.unwrap_or(began), &run.spec));
        let signal = run.spec.stop.signal;
        run.phase = Phase::Leaving { reason, ladder };
        self.shared.actions.push(Action::EndLeftovers { id, signal });
    }

    fn adopt_run(&mut self, found: Found, memo: Option<InstanceMemo>, known: bool) {
        let now = self.shared.now;
        let Found { id, revision, pid, exited: _, signalled } = found;
        let wanted = self.shared.ledger.wanted.app(&id.app);
        let spec = wanted.map_or_else(|| stranger(&id.app), |app| Arc::clone(spec_of(app, revision)));
        let next_pm_id = PmId(u32::MAX);
        let app = self.apps.entry(id.app.clone()).or_insert_with(|| App::new(id.app.clone()));
        app.listening = true;
        let state = app
            .slots
            .entry(id.slot)
            .or_insert_with(|| SlotState::new(next_pm_id, now, Rest::Stopped, id.generation.0 + 1));
        state.next_generation = state.next_generation.max(id.generation.0 + 1);
        (state.launched, state.gated) = (true, false);
        let since = memo.as_ref().map_or(now, |memo| memo.since);
        let mut run = Run::queued(id.clone(), state.pm_id, spec, revision, START_SETTLE, since);
        run.launch(since);
        run.spawned(since, pid);
        if let Phase::Launching { fail_at, .. } = &mut run.phase {
            *fail_at = (*fail_at).max(now + READ_LIMIT);
        }
        match memo {
            Some(memo) => {
                if let Phase::Launching { said, .. } = &mut run.phase {
                    *said = memo.said_ready;
                }
                run.keys = memo.keys.into_iter().collect();
                run.from = memo.from;
                run.ready_at = memo.ready_at;
                run.pulse = Pulse::known(memo.probes.0, memo.probes.1);
                run.gauge = Gauge::known(memo.over_memory);
                if let Some((began, decided)) = memo.stopping {
                    match decided {
                        Some(at) => {
                            let (at, action) = go_on_signalling(&run, at, signalled, now);
                            run.phase = Phase::Stopping(Ladder::signalled(began, at, &run.spec));
                            self.shared.actions.extend(action);
                        }
                        // From the first rung again: each may be repeated.
                        None => {
                            if memo.ready_at.is_some() {
                                run.phase = Phase::Ready;
                            }
                            run.ready_at = None;
                        }
                    }
                    run.settle = STOP_AGAIN;
                } else if memo.reserve {
                    run.phase = Phase::Reserve;
                } else if memo.ready_at.is_some() {
                    run.phase = Phase::Ready;
                }
            }
            // The blob is lost: what says "ready" on its own has said so long ago, as far as anybody can tell. With a
            // blob that does not know it, it has just been spawned.
            None if !known => {
                run.phase = Phase::Ready;
                run.ready_at = Some(now);
            }
            None => {
                run.since = now;
                run.spawned_at = Some(now);
                if let Phase::Launching { lives_at, fail_at, .. } = &mut run.phase {
                    *fail_at = now + run.spec.ready.listen_timeout;
                    if ready_source(&run.spec) == ReadySource::Lives {
                        *lives_at = Some(now + START_SETTLE);
                    }
                }
            }
        }
        let place = state.runs.partition_point(|other| other.id.generation < id.generation);
        state.runs.insert(place, run);
    }

    /// Runs whose stop had begun, but not come to the signal, begin again; the others come back into rotation.
    fn go_on_stopping(&mut self) {
        let now = self.shared.now;
        for run in
            self.apps.values_mut().flat_map(|app| app.slots.values_mut()).flat_map(|state| &mut state.runs)
        {
            let mut descent = Descent::default();
            if run.settle == STOP_AGAIN {
                run.settle = START_SETTLE;
                run.begin_stop(now, Cause::Asked, IdleConnections::Close, &mut descent);
            } else if run.is_ready() {
                run.serve(now, &mut descent.actions);
            } else {
                descent.actions.extend(run.ask_whether_ready());
            }
            self.shared.actions.extend(descent.actions);
        }
    }

    /// The operation of an app goes on, without anybody waiting for it.
    fn resume(
        &mut self,
        name: &AppName,
        known: bool,
        reload: Option<&ReloadMemo>,
        exited: &BTreeMap<InstanceId, ExitReason>,
    ) {
        let Some(saved) = self.shared.ledger.wanted.app(name) else { return };
        let Some(operation) = saved.operation else { return };
        let (saved, serial) = (saved.clone(), self.shared.new_serial());
        let Some(app) = self.apps.get_mut(name) else { return };
        app.operation = Some(match operation {
            SavedOperation::Delete => Operation::resumed(serial, Kind::Delete, saved.revision),
            SavedOperation::Restart => resumed_restart(app, &saved, serial),
            SavedOperation::Reload => {
                let mut operation = resumed_reload(app, &saved, serial, known, exited);
                // That of another reload says nothing about this one.
                if let Some(memo) = reload.filter(|memo| memo.revision == saved.revision) {
                    operation.recall(memo);
                }
                operation
            }
        });
        if app.operation.as_ref().is_some_and(|operation| operation.stage == Stage::Undoing)
            && app.rolls_back(&self.shared)
        {
            app.begin_rollback(&mut self.shared);
        }
    }

    /// Ends runs that should not be beside others. With a memo there are none but those of a restart; without one, some
    /// that were on their way down have come back.
    fn end_superfluous(&mut self, name: &AppName, known: bool) {
        let Some(app) = self.apps.get_mut(name) else { return };
        let slots: Vec<Slot> = app.slots.keys().copied().collect();
        for slot in slots {
            let operation = app.operation.as_ref().filter(|operation| operation.covers(slot));
            let kind = operation.map(|operation| (operation.kind, operation.revision));
            // What the slot is meant to run.
            let release = self.shared.ledger.wanted.slot(name, slot).map(|wanted| wanted.revision);
            let Some(state) = app.slots.get(&slot) else { continue };
            let live: Vec<(Generation, u64)> =
                state.live().map(|run| (run.id.generation, run.revision)).collect();
            let unwanted = |generation: Generation, revision: u64| {
                // In a reload two releases may run side by side, else the newer run has replaced the other.
                let newer = live.iter().any(|&(other, release)| {
                    other > generation && (release == revision || !matches!(kind, Some((Kind::Reload, _))))
                });
                let beside_old = live.iter().any(|&(_, release)| release != revision);
                newer
                    || match kind {
                        Some((Kind::Restart, target)) => revision != target,
                        // Nobody knows whether the new one ever got ready.
                        Some((Kind::Reload, target)) => !known && revision == target && beside_old,
                        // It was on its way down when the memory was lost, and came back with it.
                        None => !known && release.is_some_and(|release| release != revision),
                        Some(_) => false,
                    }
            };
            app.stop_runs(slot, IdleConnections::Wait, &mut self.shared, |run| {
                unwanted(run.id.generation, run.revision)
            });
        }
    }
}

/// Marks a run whose stop has to begin again while it is being adopted.
const STOP_AGAIN: Duration = Duration::MAX;

/// The slots that are meant to run the present release.
fn of_release(saved: &SavedApp) -> impl Iterator<Item = Slot> + '_ {
    let wanted = saved.slots.iter().enumerate();
    wanted
        .filter(|(_, wanted)| wanted.desired == Desired::Running && wanted.revision == saved.revision)
        .map(|(index, _)| slot_at(index))
}

fn resumed_reload(
    app: &mut App,
    saved: &SavedApp,
    serial: super::ledger::Serial,
    known: bool,
    exited: &BTreeMap<InstanceId, ExitReason>,
) -> Operation {
    let mut operation = Operation::resumed(serial, Kind::Reload, saved.revision);
    let covered: BTreeSet<Slot> = of_release(saved).filter(|slot| slot.0 < saved.spec.instances).collect();
    for slot in &covered {
        let Some(state) = app.slots.get_mut(slot) else { continue };
        let is_new = |run: &Run| run.revision == saved.revision;
        let lives = |run: &&Run| run.is_live() && !exited.contains_key(&run.id);
        if !known && state.runs.iter().filter(lives).any(|run| !is_new(run)) {
            // Nobody knows whether the new one ever got ready: the old one goes on (see `end_superfluous`).
            continue;
        }
        let serves = |run: &&mut Run| is_new(run) && run.ready_at.is_some() && run.is_live();
        if let Some(run) = state.runs.iter_mut().find(serves) {
            operation.replaced.insert(*slot);
            if !saved.spec.can_overlap() {
                run.proves_until = run.ready_at.map(|at| at + saved.spec.reload.min_healthy);
            }
        } else if let Some(run) = state.runs.iter_mut().find(|run| is_new(run) && run.is_live()) {
            run.settle = saved.spec.restart.min_uptime;
        } else if !state.has_live() {
            // Nothing runs here: the new release goes first, not the old one once more.
            state.rest = Rest::Held;
        }
    }
    operation.slots = Some(covered);
    operation
}

fn resumed_restart(app: &mut App, saved: &SavedApp, serial: super::ledger::Serial) -> Operation {
    let mut operation = Operation::resumed(serial, Kind::Restart, saved.revision);
    let covered: BTreeSet<Slot> = of_release(saved).collect();
    for slot in &covered {
        let Some(state) = app.slots.get_mut(slot) else { continue };
        let is_new = |run: &Run| run.revision == saved.revision && run.is_live();
        if !state.runs.iter().any(|run| is_new(run) && run.is_ready()) {
            operation.awaiting.insert(*slot);
        }
        if !state.runs.iter().any(is_new) {
            state.rest = Rest::Due;
        }
    }
    operation.slots = Some(covered);
    operation
}

/// The process that an action orders to do something.
fn ordered(action: &Action) -> Option<&InstanceId> {
    match action {
        Action::PutIn { id }
        | Action::Probe { id, .. }
        | Action::StopProbing { id }
        | Action::WatchMemory { id, .. }
        | Action::UnwatchMemory { id }
        | Action::TakeOut { id }
        | Action::AskKillListeners { id, .. }
        | Action::Drain { id, .. }
        | Action::Disconnect { id }
        | Action::SendShutdown { id }
        | Action::Signal { id, .. }
        | Action::Follow { id, .. }
        | Action::KillTree { id } => Some(id),
        Action::Save { .. }
        | Action::Spawn { .. }
        | Action::TakeOver { .. }
        | Action::SpawnFrom { .. }
        | Action::Preflight { .. }
        | Action::EndLeftovers { .. }
        | Action::Forget { .. }
        | Action::CloseListeners { .. }
        | Action::Progress { .. }
        | Action::Reply { .. }
        | Action::RunHook { .. }
        | Action::KillHook { .. }
        | Action::Quit => None,
    }
}

/// What stands for the spec of a run whose app is not known any more: enough to end it.
fn stranger(name: &AppName) -> Arc<AppSpec> {
    let command = CommandSpec {
        script: PathBuf::from("unknown"),
        interpreter: None,
        interpreter_args: Vec::new(),
        args: Vec::new(),
        runtime: Runtime::Other,
    };
    let mut spec = AppSpec::new(name.clone(), command, PathBuf::from("/"));
    (spec.env.inherit, spec.restart.autorestart, spec.autostart) = (false, false, false);
    Arc::new(spec)
}

/// When the kill signal of a run counts as sent, and what is to be done about it. A supervisor that was killed between
/// its decision and the signal has not sent it, and waiting for what was never sent would end in SIGKILL.
fn go_on_signalling(run: &Run, at: Moment, signalled: bool, now: Moment) -> (Moment, Option<Action>) {
    let stop = &run.spec.stop;
    if stop.with_message && run.spec.has_channel() {
        // Whether a message went is not known; some would take a second one amiss.
        return (at, None);
    }
    let (id, signal) = (run.id.clone(), stop.signal);
    if signalled {
        return (at, (stop.mode == KillMode::Target).then_some(Action::Follow { id, signal }));
    }
    (now, Some(Action::Signal { id, signal, mode: stop.mode }))
}
