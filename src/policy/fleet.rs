//! The whole fleet as a value: events and the time in, actions out.
//!
//! Routes events to apps, lets runs launch a few at a time, puts changes of the desired state on their way to the disk,
//! and answers requests. What an app does is decided in `app` and `operation`.
//!
//! A turn is: event → deadlines → apps that were touched → launch queue → at most one `Save`, which is the last action
//! of its turn. What the save makes possible begins in the turn of its `Saved` or `SaveFailed`, so nothing ever stands
//! behind the barrier while later turns go on.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use crate::model::id::{AppName, Generation, InstanceId, Slot};
use crate::model::moment::Moment;
use crate::model::saved::{Desired, Memo, SavedFleet};
use crate::model::spec::AppSpec;

use super::app::{App, RESERVE_BLOCK, Shared};
use super::batch::Requests;
use super::depends::{Graph, Standing};
use super::ending::Ending;
use super::instance::{Phase, ReadySource, ready_source};
use super::ledger::{After, Ledger, Pending};
use super::news::News;
use super::slot::Rest;
use super::stop::Heard;
use super::vocabulary::{Action, Event, SaveId, SlotView, StepKind};
use super::wanted::{Change, Wanted, slot_at};

/// Deadlines that are overdue by more than this were not missed but slept through: everything moves.
const SLEPT: Duration = Duration::from_secs(5);
/// Deadlines that are overdue by this are acted on also in turns of other events, so that a stream of those cannot
/// keep them off for ever.
const OVERDUE: Duration = Duration::from_millis(250);
/// When a save that failed in the background is tried again.
const SAVE_AGAIN: Duration = Duration::from_secs(2);

/// What a fleet has to know about the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// How many instances may launch at the same time.
    pub start_parallelism: u32,
}

impl Settings {
    /// The defaults for a machine with so many CPUs.
    #[must_use]
    pub const fn for_cpus(cpus: u32) -> Self {
        Self { start_parallelism: if cpus == 0 { 2 } else { cpus.saturating_mul(2) } }
    }
}

/// What is shown of one app.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppView {
    /// What is to run.
    pub spec: Arc<AppSpec>,
    /// The number of its release.
    pub revision: u64,
    /// Its slots, ascending; also those that are being given up.
    pub slots: Vec<SlotView>,
    /// What is going on with it: "reload", "stop", …
    pub operation: Option<&'static str>,
}

/// The state of everything, desired and actual.
#[derive(Clone, Debug)]
pub struct Fleet {
    pub(super) settings: Settings,
    pub(super) apps: BTreeMap<AppName, App>,
    pub(super) shared: Shared,
    pub(super) touched: BTreeSet<AppName>,
    pub(super) ending: Option<Ending>,
    /// When to write the state again, after that failed.
    pub(super) write_again: Option<Moment>,
    /// Whether values of the environment are shown to everybody who asks.
    shows_env: bool,
    pub(super) changed: u64,
    /// Nothing that goes down is waited for any more.
    pub(super) hurried: bool,
}

impl Fleet {
    /// A fleet without apps.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self::with_wanted(settings, Wanted::default())
    }

    pub(super) fn with_wanted(mut settings: Settings, wanted: Wanted) -> Self {
        settings.start_parallelism = wanted.start_parallelism.unwrap_or(settings.start_parallelism);
        let shows_env = wanted.show_env;
        Self {
            settings,
            apps: BTreeMap::new(),
            shared: Shared {
                now: Moment::default(),
                actions: Vec::new(),
                news: Vec::new(),
                graph: Graph::of(&wanted),
                standings: BTreeMap::new(),
                ledger: Ledger::new(wanted),
                requests: Requests::default(),
                queue: VecDeque::new(),
                retired: BTreeMap::new(),
                due: Vec::new(),
                ending: false,
                doomed: false,
                last_serial: 0,
            },
            touched: BTreeSet::new(),
            ending: None,
            write_again: None,
            shows_env,
            changed: 0,
            hurried: false,
        }
    }

    /// Takes in what happened and says what is to be done, in order. Never fails; news about what is gone is ignored.
    #[must_use]
    pub fn handle(&mut self, now: Moment, event: Event) -> Vec<Action> {
        let next = self.wake(now);
        let by_clock = matches!(event, Event::DeadlineReached);
        self.take_in(event);
        // An exit outranks a grace period that has just run out; a stream of events does not keep it off for ever.
        if by_clock || next.is_some_and(|at| now.since(at) > OVERDUE) {
            self.expire();
        }
        self.settle()
    }

    /// What has happened since this was last asked, in order. To be taken after each turn.
    pub fn take_news(&mut self) -> Vec<News> {
        std::mem::take(&mut self.shared.news)
    }

    /// Limits how many instances may launch at once, in place of the settings; saved by the next turn.
    pub fn limit_starts(&mut self, at_once: u32) {
        self.settings.start_parallelism = at_once;
        self.change_settings(Some(at_once), None);
    }

    /// Whether values of the environment are shown to everybody who asks; saved by the next turn.
    pub fn show_env(&mut self, show: bool) {
        // At once, and not when it is saved: whoever turns it off means now.
        self.shows_env = show;
        self.change_settings(None, Some(show));
    }

    /// Whether values of the environment are shown to everybody who asks.
    #[must_use]
    pub const fn shows_env(&self) -> bool {
        self.shows_env
    }

    /// A save that is under way does not know of it yet, so it is a change like any other.
    fn change_settings(&mut self, start_parallelism: Option<u32>, show_env: Option<bool>) {
        let change = Change::Settings { start_parallelism, show_env };
        self.shared.ledger.push_regardless(change, After::Nothing);
    }

    /// When `DeadlineReached` is due; `None`: never, unless something else happens.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Moment> {
        self.apps.values().filter_map(|app| app.due).chain(self.write_again).min()
    }

    /// Every app, in the order of creation.
    #[must_use]
    pub fn view(&self) -> Vec<AppView> {
        let mut views: Vec<AppView> = self.apps.values().filter_map(|app| self.view_of(app)).collect();
        views.sort_by_key(|view| view.slots.first().map(|slot| slot.pm_id));
        views
    }

    /// One app.
    #[must_use]
    pub fn app(&self, name: &AppName) -> Option<AppView> {
        self.view_of(self.apps.get(name)?)
    }

    /// Whether there is such an app, or somebody asks for it, or something of it is left.
    #[must_use]
    pub fn knows(&self, name: &AppName) -> bool {
        self.apps.contains_key(name)
    }

    pub(super) fn view_of(&self, app: &App) -> Option<AppView> {
        let wanted = self.shared.ledger.wanted.app(&app.name);
        let run = app.runs().last();
        // What is found without being wanted is shown until it is gone.
        let (spec, revision) = wanted
            .map(|wanted| (&wanted.spec, wanted.revision))
            .or_else(|| run.map(|run| (&run.spec, run.revision)))?;
        Some(AppView {
            spec: Arc::clone(spec),
            revision,
            slots: app
                .slots
                .iter()
                .map(|(slot, state)| {
                    let mut view = state.view(*slot);
                    if state.gated && state.runs.is_empty() && state.rest == Rest::Due {
                        view.waiting_for.clone_from(&app.waits_for);
                    }
                    view
                })
                .collect(),
            operation: app.operation.as_ref().map(|operation| operation.kind.name()),
        })
    }

    /// The desired state as it is (believed to be) on disk.
    #[must_use]
    pub fn saved(&self) -> SavedFleet {
        self.shared.ledger.wanted.to_saved()
    }

    /// Why the state on disk is older than this one, while it is. It is tried again by itself.
    #[must_use]
    pub fn unsaved(&self) -> Option<&str> {
        self.shared.ledger.unsaved.as_deref()
    }

    /// The actual state, for the next supervisor of this boot. To be written before the actions of the turn are
    /// performed: then what was begun is known also when it was not done, and nobody is signalled twice.
    #[must_use]
    pub fn memo(&self) -> Memo {
        let deleted = self.shared.ledger.deleted.iter().cloned().collect();
        let mut memo = Memo { deleted, ..Memo::default() };
        for app in self.apps.values() {
            memo.hooks.extend(app.owed_hook());
            for (slot, state) in &app.slots {
                let mut slot_memo = state.memo(&app.name, *slot);
                slot_memo.stop_unsaved = self.unsaved().is_some()
                    && self
                        .shared
                        .ledger
                        .wanted
                        .slot(&app.name, *slot)
                        .is_some_and(|wanted| wanted.desired == Desired::Stopped);
                memo.slots.push(slot_memo);
                memo.instances.extend(state.runs.iter().filter_map(super::instance::Run::memo));
            }
            memo.reloads.extend(app.operation.as_ref().and_then(|operation| operation.memo(&app.name)));
        }
        if !self.shared.ledger.current {
            memo.retired.extend(self.retired());
        }
        memo
    }

    /// The last run of each slot that is no more.
    fn retired(&self) -> impl Iterator<Item = InstanceId> + '_ {
        let is_gone =
            |app: &AppName, slot: Slot| self.apps.get(app).is_none_or(|app| !app.slots.contains_key(&slot));
        self.shared.retired.iter().filter(move |((app, slot), _)| is_gone(app, *slot)).map(
            |((app, slot), next)| InstanceId {
                app: app.clone(),
                slot: *slot,
                generation: Generation(next.saturating_sub(1)),
            },
        )
    }

    /// Counts the turns that may have changed the memo: the same number twice, the same memo twice.
    #[must_use]
    pub const fn changed(&self) -> u64 {
        self.changed
    }

    /// After a suspend or SIGSTOP everybody else has slept as well: nobody is late. When in the pause the sleep was cannot
    /// be known, so everybody gets what was left at the last turn. Says when the next deadline is, or was.
    fn wake(&mut self, now: Moment) -> Option<Moment> {
        // A clock that runs backwards stands still.
        let now = now.max(self.shared.now);
        let pause = now.since(self.shared.now);
        self.shared.now = now;
        let next = self.next_deadline()?;
        if now.since(next) <= SLEPT {
            return Some(next);
        }
        let mut shift = |at: &mut Moment| *at = *at + pause;
        for app in self.apps.values_mut() {
            app.deadlines(&mut shift);
            app.refresh(self.shared.ending);
        }
        if let Some(at) = &mut self.write_again {
            shift(at);
        }
        Some(next + pause)
    }

    pub(super) fn take_in(&mut self, event: Event) {
        match event {
            Event::Asked { op, command } => self.asked(op, command),
            Event::StartedFrom { id, from } => self.with_run(&id, |app, _| {
                if let Some(run) = app.run_mut(&id) {
                    run.from = Some(Arc::new(from));
                }
            }),
            Event::Checked { app, check, fault } => {
                self.with_app(&app, |app, shared| app.checked(check, fault, shared));
            }
            Event::Spawned { id, pid } => self.with_run(&id, |app, shared| {
                let now = shared.now;
                let Some(run) = app.run_mut(&id) else { return };
                // A second report of the same birth is no news.
                if run.pid.is_some() {
                    return;
                }
                run.spawned(now, pid);
                let pm_id = run.pm_id;
                shared.actions.extend(run.ask_whether_ready());
                app.step(&id, pm_id, StepKind::Spawned { pid });
                app.hear(&id, Heard::Spawned, shared);
            }),
            Event::SpawnFailed { id, error, retry } => {
                self.with_run(&id, |app, shared| app.spawn_failed(&id, error, retry, shared));
            }
            Event::Exited { id, reason } => {
                self.with_run(&id, |app, shared| app.exited(&id, &reason, shared));
            }
            Event::TreeGone { id } => self.with_run(&id, |app, shared| app.tree_gone(&id, shared)),
            Event::Ready { id } => self.with_run(&id, |app, _| {
                if let Some(run) = app.run_mut(&id)
                    && ready_source(&run.spec) != ReadySource::Probed
                    && let Phase::Launching { said, .. } = &mut run.phase
                {
                    *said = true;
                }
            }),
            Event::Listening { id, key } => self.with_run(&id, |app, _| {
                if let Some(run) = app.run_mut(&id) {
                    run.keys.insert(key);
                }
            }),
            Event::ListenerClosed { id, key } => self.with_run(&id, |app, _| {
                if let Some(run) = app.run_mut(&id) {
                    run.keys.remove(&key);
                }
            }),
            Event::ChannelClosed { id } => self.hear(&id, Heard::ChannelClosed),
            Event::Settled { id } => self.hear(&id, Heard::Settled),
            Event::KillListeners { id, count } => self.hear(&id, Heard::KillListeners(count)),
            Event::Drained { id } => self.hear(&id, Heard::Drained),
            Event::Probed { id, role, result } => {
                self.with_run(&id, |app, shared| app.probed(&id, role, result, shared));
            }
            Event::Measured { id, bytes } => {
                self.with_run(&id, |app, shared| app.measured(&id, bytes, shared.now));
            }
            Event::HookEnded { id, end } => {
                self.with_app(&id.app, |app, shared| app.hook_ended(&id, end, shared));
            }
            Event::Saved { save } => {
                let pending = self.shared.ledger.saved(save);
                self.shared.graph = Graph::of(&self.shared.ledger.wanted);
                self.after_save(pending, None);
            }
            Event::SaveFailed { save, error } => self.save_failed(save, &error),
            Event::Hurried => self.hurried = true,
            Event::DeadlineReached => {}
        }
    }

    pub(super) fn hear(&mut self, id: &InstanceId, heard: Heard) {
        self.with_run(id, |app, shared| app.hear(id, heard, shared));
    }

    /// Does something with an app, and looks after it at the end of the turn.
    pub(super) fn with_app(&mut self, name: &AppName, act: impl FnOnce(&mut App, &mut Shared)) {
        if let Some(app) = self.apps.get_mut(name) {
            act(app, &mut self.shared);
            self.touched.insert(name.clone());
        }
    }

    /// The same for a run that is known: late news of others is none.
    pub(super) fn with_run(&mut self, id: &InstanceId, act: impl FnOnce(&mut App, &mut Shared)) {
        if self.apps.get_mut(&id.app).is_some_and(|app| app.run_mut(id).is_some()) {
            self.with_app(&id.app, act);
        }
    }

    pub(super) fn expire(&mut self) {
        let now = self.shared.now;
        for (name, app) in &mut self.apps {
            if app.due.is_some_and(|at| at <= now) {
                app.expire(&mut self.shared);
                self.touched.insert(name.clone());
            }
        }
        if self.write_again.take_if(|at| *at <= now).is_some() {
            // The save carries the whole state.
            self.shared.ledger.push_regardless(Change::Nothing, After::Nothing);
        }
    }

    /// Lets everything take its course until nothing more follows from this turn's event.
    pub(super) fn settle(&mut self) -> Vec<Action> {
        loop {
            if let Some(name) = self.touched.pop_first() {
                let neighbours = self.look_around(&name);
                if let Some(app) = self.apps.get_mut(&name) {
                    app.advance(&mut self.shared);
                    app.refresh(self.shared.ending);
                    if !neighbours.is_empty() {
                        let standing = Some(app.standing(&self.shared));
                        if app.told != standing {
                            app.told = standing;
                            self.touched.extend(neighbours);
                        }
                    }
                    let ledger = &self.shared.ledger;
                    // The next supervisor may find it on disk, and owes it what this one did.
                    let may_be_found = app.unprepared && ledger.is_saving(&name);
                    if app.is_empty() && ledger.wanted.app(&name).is_none() && !may_be_found {
                        self.apps.remove(&name);
                    }
                }
            } else if let Some((name, clients, ask)) = self.shared.due.pop() {
                let app = self.apps.entry(name.clone()).or_insert_with(|| App::new(name.clone()));
                app.accept(clients, ask, &mut self.shared);
                self.touched.insert(name);
            } else if let Some((key, name, ask)) = self.shared.requests.next_part(&mut self.shared.actions) {
                let app = self.apps.entry(name.clone()).or_insert_with(|| App::new(name.clone()));
                app.accept(vec![key], ask, &mut self.shared);
                self.touched.insert(name);
            } else {
                break;
            }
        }
        self.launch_queued();
        if self.hurried {
            self.hurry();
        }
        self.end_if_down();
        self.begin_save();
        self.changed += 1;
        std::mem::take(&mut self.shared.actions)
    }

    /// Finds out how far the apps are that this one waits for, or that wait for it.
    fn look_around(&mut self, name: &AppName) -> Vec<AppName> {
        let neighbours = self.shared.graph.neighbours(name);
        for neighbour in &neighbours {
            let standing = match self.apps.get(neighbour) {
                Some(app) => app.standing(&self.shared),
                None => Standing::missing(),
            };
            self.shared.standings.insert(neighbour.clone(), standing);
        }
        neighbours
    }

    /// Lets those launch whose turn it is.
    pub(super) fn launch_queued(&mut self) {
        if self.shared.queue.is_empty() {
            return;
        }
        let mut launching: usize = self.apps.values().map(|app| app.launching).sum();
        let limit = self.settings.start_parallelism.max(1) as usize;
        let mut waiting = VecDeque::new();
        while let Some(id) = self.shared.queue.pop_front() {
            let Some(app) = self.apps.get_mut(&id.app) else { continue };
            if !app.run_mut(&id).is_some_and(|run| matches!(run.phase, Phase::Queued)) {
                continue;
            }
            if launching >= limit {
                waiting.push_back(id);
                waiting.append(&mut self.shared.queue);
            } else if app.is_being_cleared(id.slot) {
                waiting.push_back(id);
            } else {
                app.spawn(&id, &mut self.shared);
                app.flush_steps(&mut self.shared);
                app.refresh(self.shared.ending);
                launching += 1;
            }
        }
        self.shared.queue = waiting;
        // Who came into the queue in this turn, and stays there.
        let now = self.shared.now;
        let mut newcomers = BTreeSet::new();
        for id in self.shared.queue.iter().rev() {
            let Some(app) = self.apps.get_mut(&id.app) else { continue };
            let Some(run) = app.run_mut(id).filter(|run| run.since == now) else { break };
            let pm_id = run.pm_id;
            app.step(id, pm_id, StepKind::Queued);
            newcomers.insert(id.app.clone());
        }
        for name in newcomers {
            if let Some(app) = self.apps.get_mut(&name) {
                app.flush_steps(&mut self.shared);
            }
        }
    }

    /// The save goes last: nothing of this turn waits for it.
    pub(super) fn begin_save(&mut self) {
        let apps = &self.apps;
        let retired = &self.shared.retired;
        let reserve = |candidate: &mut Wanted, pending: &[Pending]| {
            let names: BTreeSet<&AppName> = pending.iter().filter_map(|one| one.change.app()).collect();
            for name in names {
                let count = candidate.app(name).map_or(0, |app| app.slots.len());
                for slot in (0..count).map(slot_at) {
                    let state = apps.get(name).and_then(|app| app.slots.get(&slot));
                    let next = state
                        .map(|state| state.next_generation)
                        .or_else(|| retired.get(&(name.clone(), slot)).copied())
                        .unwrap_or(1);
                    candidate.reserve(name, slot, Generation(next + RESERVE_BLOCK - 1));
                }
            }
        };
        if let Some(batch) = self.shared.ledger.next_save(reserve) {
            let (save, state) = (batch.save, batch.candidate.to_saved());
            self.shared.actions.push(Action::Save { save, state });
        }
    }

    pub(super) fn save_failed(&mut self, save: SaveId, error: &str) {
        let pending = self.shared.ledger.failed(save, error);
        self.shared.graph = Graph::of(&self.shared.ledger.wanted);
        if self.shared.ledger.unsaved.is_some() {
            self.write_again = Some(self.shared.now + SAVE_AGAIN);
        }
        self.after_save(pending, Some(error));
    }

    pub(super) fn after_save(&mut self, pending: Vec<Pending>, error: Option<&str>) {
        if error.is_none() && !pending.is_empty() {
            self.write_again = None;
            for (name, app) in &mut self.apps {
                for state in app.slots.values_mut().filter(|state| state.overdraws) {
                    // The disk takes something again: what was used without having been reserved is reserved first.
                    (state.overdraws, state.reserve_at) = (false, None);
                    self.touched.insert(name.clone());
                }
            }
        }
        for one in pending {
            match one.after {
                After::Begin { app, serial } => self.with_app(&app, |app, shared| {
                    let rules = matches!(one.change, Change::Adjust { .. } | Change::Scale { .. });
                    if rules && error.is_none() {
                        app.follow_rules(shared);
                    }
                    app.saved(serial, error, one.regardless, shared);
                }),
                After::Close { app, serial } => {
                    self.with_app(&app, |app, shared| app.closed(serial, error, shared));
                }
                After::Reserved { app } => self.with_app(&app, |app, shared| {
                    for state in app.slots.values_mut().filter(|state| state.reserving) {
                        state.reserving = false;
                        state.reserve_at = error.map(|_| shared.now + SAVE_AGAIN);
                        state.overdraws = error.is_some();
                    }
                }),
                After::KillBegins => self.go_down(error),
                After::KillEnds => self.over(error),
                After::Nothing => {
                    if let Some(app) = one.change.app().cloned() {
                        self.with_app(&app, |_, _| {});
                    }
                }
            }
        }
    }
}
