//! The actual state of one app: its slots, their runs, and what they need without anybody asking.
//!
//! `upkeep` brings what is nearer to what is wanted: it ends runs that are not meant to be, and starts the successor of
//! a run when its pause is over and the last process of its tree is gone. Operations (`operation`) change what is
//! wanted, and hold slots back while they act on them themselves.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use crate::model::id::{AppName, Generation, InstanceId, PmId, Slot};
use crate::model::moment::Moment;
use crate::model::saved::Desired;
use crate::model::spec::{AppSpec, ListenSpec};

use super::admit::{Ask, Kind};
use super::batch::{RequestKey, Requests};
use super::depends::{Graph, Standing};
use super::hooks::HookRuns;
use super::instance::{Phase, ReadySource, Run, START_SETTLE, Wait, ready_source};
use super::ledger::{After, Ledger, Serial};
use super::memory::Gauge;
use super::news::{News, Subject, What};
use super::operation::Operation;
use super::slot::{Rest, SlotState};
use super::stop::{Cause, Descent};
use super::vocabulary::{Action, IdleConnections, Step, StepKind};
use super::wanted::{Change, slot_at, spec_of};

/// What the apps of a fleet share in a turn.
#[derive(Clone, Debug)]
pub(super) struct Shared {
    /// The time of this turn.
    pub(super) now: Moment,
    /// What is to be done, in order.
    pub(super) actions: Vec<Action>,
    /// What has happened since the news were last taken.
    pub(super) news: Vec<News>,
    pub(super) ledger: Ledger,
    /// Which apps need which.
    pub(super) graph: Graph,
    /// How far the neighbours of the app are that is being looked after.
    pub(super) standings: BTreeMap<AppName, Standing>,
    pub(super) requests: Requests,
    /// Runs that wait for their turn to launch.
    pub(super) queue: VecDeque<InstanceId>,
    /// The next generation of slots that are no more.
    pub(super) retired: BTreeMap<(AppName, Slot), u64>,
    /// Requests of queued operations whose turn has come.
    pub(super) due: Vec<(AppName, Vec<RequestKey>, Ask)>,
    /// Everything is to go down.
    pub(super) ending: bool,
    /// Likewise, but that is not durable yet.
    pub(super) doomed: bool,
    pub(super) last_serial: u64,
}

impl Shared {
    pub(super) fn new_serial(&mut self) -> Serial {
        self.last_serial += 1;
        Serial(self.last_serial)
    }
}

/// An app as it is.
#[derive(Clone, Debug)]
pub(super) struct App {
    pub(super) name: AppName,
    pub(super) slots: BTreeMap<Slot, SlotState>,
    pub(super) operation: Option<Operation>,
    /// The one request that waits for the operation to end, and everybody who asked for it.
    pub(super) next: Option<(Ask, Vec<RequestKey>)>,
    /// Listeners may be open.
    pub(super) listening: bool,
    /// How far it was when its neighbours were last looked after because of it.
    pub(super) told: Option<Standing>,
    /// What it said last that it waits for.
    pub(super) waits_for: Vec<AppName>,
    /// Steps of this turn that have not been reported yet.
    pub(super) steps: Vec<Step>,
    /// Likewise what happened in this turn.
    pub(super) news: Vec<(Option<Subject>, What)>,
    /// Kept by `refresh`, so that a turn looks at one number per app and not at every run of a large fleet.
    pub(super) due: Option<Moment>,
    /// Likewise: how many runs take a launch place.
    pub(super) launching: usize,
    pub(super) hooks: HookRuns,
    /// Nothing of it is started before its `pre_start` has run: what was to run that has been superseded.
    pub(super) unprepared: bool,
}

impl App {
    pub(super) fn new(name: AppName) -> Self {
        Self {
            name,
            slots: BTreeMap::new(),
            operation: None,
            next: None,
            listening: false,
            told: None,
            waits_for: Vec::new(),
            steps: Vec::new(),
            news: Vec::new(),
            due: None,
            launching: 0,
            hooks: HookRuns::default(),
            unprepared: false,
        }
    }

    /// To be called after every change.
    pub(super) fn refresh(&mut self, ending: bool) {
        self.due = self.next_deadline(ending);
        self.launching = self.runs().filter(|run| run.holds_launch_place()).count();
    }

    pub(super) fn runs(&self) -> impl Iterator<Item = &Run> {
        self.slots.values().flat_map(|slot| &slot.runs)
    }

    pub(super) fn run(&self, id: &InstanceId) -> Option<&Run> {
        self.slots.get(&id.slot)?.runs.iter().find(|run| run.id == *id)
    }

    pub(super) fn run_mut(&mut self, id: &InstanceId) -> Option<&mut Run> {
        self.slots.get_mut(&id.slot)?.runs.iter_mut().find(|run| run.id == *id)
    }

    /// How many runs are in rotation.
    pub(super) fn serving(&self) -> usize {
        self.runs().filter(|run| run.is_ready()).count()
    }

    /// Whether nothing is left to remember.
    pub(super) fn is_empty(&self) -> bool {
        self.slots.is_empty() && self.operation.is_none() && self.next.is_none() && self.hooks.is_idle()
    }

    pub(super) fn step(&mut self, id: &InstanceId, pm_id: PmId, kind: StepKind) {
        self.happened(id, pm_id, What::Step(kind.clone()));
        if self.operation.is_some() {
            self.steps.push(Step { id: id.clone(), pm_id, kind });
        }
    }

    /// Notes what happened to a run.
    pub(super) fn happened(&mut self, id: &InstanceId, pm_id: PmId, what: What) {
        let pid = self.run_mut(id).and_then(|run| run.pid);
        self.news.push((Some(Subject { id: id.clone(), pm_id, pid }), what));
    }

    fn flush_news(&mut self, shared: &mut Shared) {
        if self.news.is_empty() {
            return;
        }
        let client = self.operation.as_ref().and_then(|operation| operation.clients.first());
        let op = client.and_then(|key| shared.requests.op(*key));
        let (at, app) = (shared.now, &self.name);
        let news = self.news.drain(..).map(|(run, what)| News { at, op, app: app.clone(), run, what });
        shared.news.extend(news);
    }

    /// Reports the steps of this turn to everybody who asked for the operation.
    pub(super) fn flush_steps(&mut self, shared: &mut Shared) {
        self.flush_news(shared);
        let steps = std::mem::take(&mut self.steps);
        let Some(operation) = &self.operation else { return };
        for step in steps {
            for key in &operation.clients {
                if let Some(op) = shared.requests.op(*key) {
                    shared.actions.push(Action::Progress { op, step: step.clone() });
                }
            }
        }
    }

    /// Brings the app as far as it gets in this turn.
    pub(super) fn advance(&mut self, shared: &mut Shared) {
        if shared.ending {
            self.abandon_hooks(shared);
        }
        self.sync(shared);
        self.note_ready(shared);
        loop {
            self.upkeep(shared);
            if !self.drive(shared) {
                break;
            }
        }
        self.prepare_again(shared);
        self.tend(shared);
        self.close_listeners_if_idle(shared);
        self.flush_steps(shared);
        self.steps.clear();
    }

    /// Every slot that is wanted has a state.
    pub(super) fn sync(&mut self, shared: &Shared) {
        let Some(app) = shared.ledger.wanted.app(&self.name) else { return };
        // A new app starts from rest, and what is added while it waits for others waits with it.
        let gated = self.slots.values().all(SlotState::is_at_rest);
        for (index, saved) in app.slots.iter().enumerate() {
            let slot = slot_at(index);
            let state = self.slots.entry(slot).or_insert_with(|| {
                let next = shared.retired.get(&(self.name.clone(), slot)).copied().unwrap_or(1);
                let rest = match saved.desired {
                    Desired::Running => Rest::Due,
                    Desired::Stopped => Rest::Stopped,
                };
                let mut state = SlotState::new(saved.pm_id, shared.now, rest, next);
                state.gated = gated && rest == Rest::Due;
                state
            });
            // A slot that was given up and came back while its last run was still leaving has a new number.
            state.pm_id = saved.pm_id;
            // A pause that is over is no deadline any more, also where something else holds the start back.
            if matches!(state.rest, Rest::Waiting { at } if at <= shared.now) {
                state.rest = Rest::Due;
            }
        }
    }

    /// Puts runs into rotation that may be.
    pub(super) fn note_ready(&mut self, shared: &mut Shared) {
        let now = shared.now;
        let mut ready = Vec::new();
        let mut unready = Vec::new();
        for (slot, state) in &self.slots {
            for run in state.runs.iter().filter(|run| matches!(run.phase, Phase::Launching { .. })) {
                if run.is_ready_by_itself(now) && self.covers_keys_of_old(*slot, state, run) {
                    ready.push(run.id.clone());
                } else {
                    unready.push(run.id.clone());
                }
            }
        }
        for id in unready {
            if let Some(run) = self.run_mut(&id) {
                run.unready();
            }
        }
        // Those that are to replace others wait for `min_healthy`, and in a blue-green reload for each other.
        ready.retain(|id| self.has_soaked(id, now));
        if self.switches_at_once() && !self.all_stand_by(&ready, shared) {
            ready.retain(|id| !self.is_candidate_id(id));
        }
        for id in ready {
            let proves = self.proves_in_rotation(&id);
            let Some(run) = self.run_mut(&id) else { continue };
            let after = run.ready_after(now);
            run.put_in(now);
            run.proves_until = proves.map(|span| now + span);
            let pm_id = run.pm_id;
            let lived = ready_source(&run.spec) == ReadySource::Lives;
            run.serve(now, &mut shared.actions);
            self.step(&id, pm_id, StepKind::Ready { after, lived });
            self.happened(&id, pm_id, What::InRotation);
            self.became_ready(&id);
        }
    }

    /// Whether a run that is ready may come into rotation as far as `min_healthy` goes.
    fn has_soaked(&mut self, id: &InstanceId, now: Moment) -> bool {
        if !self.is_candidate_id(id) {
            return true;
        }
        let Some(run) = self.run_mut(id) else { return false };
        // Where nothing serves beside it there is nothing to wait for out of rotation.
        let beside = run.spec.can_overlap();
        let span = if beside { run.spec.reload.min_healthy } else { Duration::ZERO };
        let (done, fresh) = run.soak(now, span);
        let pm_id = run.pm_id;
        if let Some(after) = fresh
            && !span.is_zero()
        {
            self.step(id, pm_id, StepKind::Soaking { after, span });
        }
        done
    }

    /// How long a run that comes into rotation holds up the next slot.
    fn proves_in_rotation(&self, id: &InstanceId) -> Option<Duration> {
        let run = self.run(id)?;
        let span = run.spec.reload.min_healthy;
        (self.is_candidate(id.slot, run) && !run.spec.can_overlap() && !span.is_zero()).then_some(span)
    }

    pub(super) fn is_candidate_id(&self, id: &InstanceId) -> bool {
        self.run(id).is_some_and(|run| self.is_candidate(id.slot, run))
    }

    /// A new worker takes over only when it listens wherever the old one serves, unless the release changes that.
    pub(super) fn covers_keys_of_old(&self, slot: Slot, state: &SlotState, run: &Run) -> bool {
        if !run.spec.is_node_cluster() || !self.is_candidate(slot, run) {
            return true;
        }
        state
            .runs
            .iter()
            .filter(|old| {
                old.is_ready() && old.revision != run.revision && !listens_differ(&old.spec, &run.spec)
            })
            .all(|old| old.keys.is_subset(&run.keys))
    }

    /// Ends what is not meant to be, starts what is.
    pub(super) fn upkeep(&mut self, shared: &mut Shared) {
        let slots: Vec<Slot> = self.slots.keys().copied().collect();
        for slot in slots {
            let desired = shared.ledger.wanted.slot(&self.name, slot).map(|saved| saved.desired);
            match desired {
                None => {
                    self.stop_runs(slot, IdleConnections::Wait, shared, |_| true);
                    if let Some(state) = self.slots.get(&slot)
                        && state.runs.is_empty()
                    {
                        shared.retired.insert((self.name.clone(), slot), state.next_generation);
                        self.slots.remove(&slot);
                    }
                }
                Some(Desired::Stopped) => {
                    let runs = self.slots.get(&slot).is_some_and(SlotState::has_live);
                    self.take_down(slot, shared);
                    if let Some(state) = self.slots.get_mut(&slot) {
                        // What it was done with when it ended by itself stays known, also while what it left behind is
                        // still going.
                        if state.rest != Rest::Stopped || runs {
                            (state.rest, state.ended) = (Rest::Stopped, None);
                        }
                        state.gated = false;
                    }
                }
                Some(Desired::Running) if shared.ending => self.take_down(slot, shared),
                Some(Desired::Running) => {
                    self.settle_reserve(slot, shared);
                    self.start_if_due(slot, shared);
                }
            }
        }
    }

    /// Ends what runs in a slot, unless others that go down too still need it. What has no process yet never gets one.
    fn take_down(&mut self, slot: Slot, shared: &mut Shared) {
        let needed = self.is_needed_still(shared);
        self.stop_runs(slot, IdleConnections::Close, shared, |run| {
            !needed || matches!(run.phase, Phase::Queued)
        });
    }

    /// Reserve is for reloads: where none goes on any more, it goes, or serves where nothing else does.
    fn settle_reserve(&mut self, slot: Slot, shared: &mut Shared) {
        let reloads = self.operation.as_ref().is_some_and(|operation| operation.kind == Kind::Reload);
        let Some(state) = self.slots.get(&slot).filter(|state| !reloads && state.has_reserve()) else {
            return;
        };
        if state.has_live() {
            self.stop_runs(slot, IdleConnections::Wait, shared, Run::is_reserve);
        } else {
            self.put_back(slot, shared);
        }
    }

    /// Puts the run that is in reserve back into rotation. Says whether there was one.
    pub(super) fn put_back(&mut self, slot: Slot, shared: &mut Shared) -> bool {
        let Some(state) = self.slots.get_mut(&slot) else { return false };
        let Some(run) = state.runs.iter_mut().rev().find(|run| run.is_reserve()) else { return false };
        run.phase = Phase::Ready;
        // What was measured before it went is old.
        run.gauge = Gauge::default();
        // The row goes on with this one, as if it had never been replaced.
        state.restarts = state.restarts.saturating_sub(1);
        let (id, pm_id) = (run.id.clone(), run.pm_id);
        run.serve(shared.now, &mut shared.actions);
        self.step(&id, pm_id, StepKind::Restored);
        self.happened(&id, pm_id, What::InRotation);
        true
    }

    /// Takes the run that is being replaced out of rotation, and keeps it.
    pub(super) fn keep(&mut self, slot: Slot, shared: &mut Shared, which: impl Fn(&Run) -> bool) {
        let Some(state) = self.slots.get_mut(&slot) else { return };
        let Some(run) = state.runs.iter_mut().rev().find(|run| run.is_ready() && which(run)) else { return };
        shared.actions.extend(run.ask_no_more());
        run.phase = Phase::Reserve;
        let (id, pm_id) = (run.id.clone(), run.pm_id);
        if run.spec.has_rotation() {
            shared.actions.push(Action::TakeOut { id: id.clone() });
        }
        self.step(&id, pm_id, StepKind::Reserved);
        self.happened(&id, pm_id, What::OutOfRotation);
        // Where a supervisor without memory has found several, the others have no business here.
        self.stop_runs(slot, IdleConnections::Wait, shared, |run| run.is_live() && which(run));
    }

    fn start_if_due(&mut self, slot: Slot, shared: &mut Shared) {
        // A stop wins from the moment it is asked for, also while its save is under way.
        if let Some(operation) = &self.operation
            && matches!(operation.kind, Kind::Stop | Kind::Delete)
            && (!operation.stage.acts() || operation.covers(slot))
        {
            return;
        }
        if self.unprepared {
            return;
        }
        // A start, or other rules, wait for their save and their hook: what came to be before would run what was.
        if let Some(operation) = &self.operation
            && !operation.stage.acts()
            && (operation.held_back
                || (matches!(operation.kind, Kind::Start | Kind::Scale) && operation.covers(slot)))
        {
            return;
        }
        let Some(state) = self.slots.get_mut(&slot) else { return };
        if !state.runs.is_empty() {
            return;
        }
        // It was stopped, and is not meant to be any more, although what was to start it has been superseded.
        if state.rest == Rest::Stopped && state.ended.is_none() {
            (state.gated, state.rest) = (state.is_at_rest(), Rest::Due);
        }
        match state.rest {
            Rest::Due => {}
            Rest::Waiting { .. } | Rest::Stopped | Rest::Errored | Rest::Held => return,
        }
        if state.gated && !self.may_start(shared) {
            return;
        }
        let Some(saved) = shared.ledger.wanted.app(&self.name) else { return };
        let Some(wanted) = saved.slots.get(slot.0 as usize) else { return };
        // What the reload has not replaced yet goes on with what it had.
        let revision = match &self.operation {
            Some(operation)
                if operation.kind == Kind::Reload
                    && operation.stage.acts()
                    && operation.covers(slot)
                    && wanted.before != 0
                    && !operation.replaced.contains(&slot) =>
            {
                wanted.before
            }
            _ => wanted.revision,
        };
        let spec = Arc::clone(spec_of(saved, revision));
        self.launch(slot, spec, revision, START_SETTLE, shared);
    }

    /// Puts a new run into the launch queue, if a generation is reserved for it, or cannot be; else asks for that first.
    /// Says whether it did.
    pub(super) fn launch(
        &mut self,
        slot: Slot,
        spec: Arc<AppSpec>,
        revision: u64,
        settle: Duration,
        shared: &mut Shared,
    ) -> bool {
        let reserved = shared.ledger.wanted.slot(&self.name, slot).map_or(0, |saved| saved.reserved.0);
        let Some(state) = self.slots.get_mut(&slot) else { return false };
        let left = (reserved + 1).saturating_sub(state.next_generation);
        if left < RESERVE_AHEAD && !state.reserving && state.reserve_at.is_none_or(|at| at <= shared.now) {
            state.reserving = true;
            state.reserve_at = None;
            shared
                .ledger
                .push(Change::Reserve { app: self.name.clone() }, After::Reserved { app: self.name.clone() });
        }
        if left == 0 && !state.overdraws {
            return false;
        }
        let generation = Generation(state.next_generation);
        state.gated = false;
        state.next_generation += 1;
        if state.launched {
            state.restarts = state.restarts.saturating_add(1);
        }
        state.launched = true;
        let id = InstanceId { app: self.name.clone(), slot, generation };
        let run = Run::queued(id.clone(), state.pm_id, spec, revision, settle, shared.now);
        state.runs.push(run);
        shared.queue.push_back(id);
        true
    }

    /// Whether what a run left behind that exited by itself is still being ended in this slot.
    pub(super) fn is_being_cleared(&self, slot: Slot) -> bool {
        self.slots.get(&slot).is_some_and(|state| {
            state.runs.iter().any(|run| matches!(run.phase, Phase::Leaving { ladder: None, .. }))
        })
    }

    /// Its turn to launch has come.
    pub(super) fn spawn(&mut self, id: &InstanceId, shared: &mut Shared) {
        let now = shared.now;
        self.listening = true;
        let Some(run) = self.run_mut(id) else { return };
        run.launch(now);
        let (pm_id, spec, revision) = (run.pm_id, Arc::clone(&run.spec), run.revision);
        shared.actions.push(match run.again.clone() {
            Some(from) => Action::SpawnFrom { id: id.clone(), pm_id, spec, revision, from },
            None => Action::Spawn { id: id.clone(), pm_id, spec, revision },
        });
        self.step(id, pm_id, StepKind::Launching);
    }

    /// Puts live runs of a slot on the stop ladder, those in the queue aside: they simply go.
    pub(super) fn stop_runs(
        &mut self,
        slot: Slot,
        idle: IdleConnections,
        shared: &mut Shared,
        which: impl Fn(&Run) -> bool,
    ) {
        self.stop_runs_because(slot, Cause::Asked, idle, shared, which);
    }

    pub(super) fn stop_runs_because(
        &mut self,
        slot: Slot,
        cause: Cause,
        idle: IdleConnections,
        shared: &mut Shared,
        which: impl Fn(&Run) -> bool,
    ) {
        let Some(state) = self.slots.get_mut(&slot) else { return };
        state.runs.retain(|run| !(matches!(run.phase, Phase::Queued) && which(run)));
        // Asked for every slot after every event, and mostly there is nothing to do.
        if !state.runs.iter().any(|run| (run.is_live() || run.is_reserve()) && which(run)) {
            return;
        }
        let serving = self.serving();
        let Some(state) = self.slots.get_mut(&slot) else { return };
        let mut all = Vec::new();
        for run in state.runs.iter_mut().filter(|run| (run.is_live() || run.is_reserve()) && which(run)) {
            // Idle connections may wait only where somebody else takes what they send next.
            let others = serving - usize::from(run.is_ready());
            let idle = if others > 0 { idle } else { IdleConnections::Close };
            let mut descent = Descent::default();
            let served = run.is_ready();
            run.begin_stop(shared.now, cause, idle, &mut descent);
            all.push((run.id.clone(), run.pm_id, served, descent));
        }
        for (id, pm_id, served, descent) in all {
            if served {
                self.happened(&id, pm_id, What::OutOfRotation);
            }
            self.perform(&id, pm_id, descent, shared);
        }
    }

    pub(super) fn perform(&mut self, id: &InstanceId, pm_id: PmId, descent: Descent, shared: &mut Shared) {
        let killed = descent.actions.iter().any(|action| matches!(action, Action::KillTree { .. }));
        shared.actions.extend(descent.actions);
        if killed {
            let since = self.run_mut(id).and_then(|run| run.ladder()?.signalled_at).unwrap_or(shared.now);
            self.happened(id, pm_id, What::Killed { after: shared.now.since(since) });
        }
        for kind in descent.steps {
            self.step(id, pm_id, kind);
        }
    }

    /// Hands every pending deadline to `visit`.
    pub(super) fn deadlines(&mut self, visit: &mut dyn FnMut(&mut Moment)) {
        self.hooks.deadline(visit);
        for state in self.slots.values_mut() {
            if let Rest::Waiting { at } = &mut state.rest {
                visit(at);
            }
            if let Some(at) = &mut state.reserve_at {
                visit(at);
            }
            for pause in [&mut state.relapses.pause_until, &mut state.overruns.pause_until] {
                pause.iter_mut().for_each(&mut *visit);
            }
            for run in &mut state.runs {
                run.deadlines(visit);
                if let Some(at) = &mut run.proves_until {
                    visit(at);
                }
            }
        }
    }

    /// The earliest moment at which something happens by itself.
    fn next_deadline(&self, ending: bool) -> Option<Moment> {
        self.slots
            .values()
            .flat_map(|state| {
                let waiting = match state.rest {
                    // While a run is still leaving, its end is what is waited for.
                    Rest::Waiting { at } if state.runs.is_empty() && !ending => Some(at),
                    Rest::Waiting { .. } | Rest::Stopped | Rest::Due | Rest::Errored | Rest::Held => None,
                };
                let others =
                    [waiting, state.reserve_at, state.relapses.pause_until, state.overruns.pause_until];
                state.runs.iter().map(Run::next_deadline).chain(others).flatten()
            })
            .chain(self.hooks.next_deadline())
            .min()
    }

    /// Acts on deadlines that have passed.
    pub(super) fn expire(&mut self, shared: &mut Shared) {
        self.expire_hook(shared);
        let now = shared.now;
        let mut late = Vec::new();
        let mut over = Vec::new();
        for state in self.slots.values_mut() {
            state.reserve_at.take_if(|at| *at <= now);
            state.relapses.pause_until.take_if(|at| *at <= now);
            state.overruns.pause_until.take_if(|at| *at <= now);
            for run in &mut state.runs {
                run.proves_until.take_if(|at| *at <= now);
                match &run.phase {
                    // Who only has to live cannot be late, and who is ready is not.
                    Phase::Launching { lives_at: None, fail_at, wait: Wait::Not, .. } if *fail_at <= now => {
                        late.push(run.id.clone());
                    }
                    Phase::Stopping(ladder) if ladder.next_deadline().is_some_and(|at| at <= now) => {
                        over.push(run.id.clone());
                    }
                    Phase::Launching { .. }
                    | Phase::Stopping(_)
                    | Phase::Queued
                    | Phase::Ready
                    | Phase::Reserve
                    | Phase::Leaving { .. } => {}
                }
            }
        }
        for id in over {
            self.hear(&id, super::stop::Heard::TimeOver, shared);
        }
        for id in late {
            self.not_ready(&id, shared);
        }
    }

    /// An answer for a run on the ladder.
    pub(super) fn hear(&mut self, id: &InstanceId, heard: super::stop::Heard, shared: &mut Shared) {
        let now = shared.now;
        let Some(run) = self.run_mut(id) else { return };
        let mut descent = Descent::default();
        run.heard(now, heard, &mut descent);
        let pm_id = run.pm_id;
        self.perform(id, pm_id, descent, shared);
    }

    /// The listeners of an app are closed when nothing of it runs and nothing is going to.
    pub(super) fn close_listeners_if_idle(&mut self, shared: &mut Shared) {
        let idle = self.listening
            && self
                .slots
                .values()
                .all(|state| state.runs.is_empty() && matches!(state.rest, Rest::Stopped | Rest::Errored));
        if idle {
            self.listening = false;
            shared.actions.push(Action::CloseListeners { app: self.name.clone(), keep: None });
        }
    }
}

/// Fewer generations than this in reserve, and more are asked for.
const RESERVE_AHEAD: u64 = 6;
/// How many generations a slot has in reserve after a save.
pub(super) const RESERVE_BLOCK: u64 = 16;

/// Whether a release changes where the app listens, so that the old keys say nothing about the new ones.
fn listens_differ(old: &AppSpec, new: &AppSpec) -> bool {
    let addresses = |spec: &AppSpec| -> Vec<ListenSpec> { spec.listen.clone() };
    addresses(old) != addresses(new) || old.env.vars.get("PORT") != new.env.vars.get("PORT")
}
