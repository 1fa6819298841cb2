//! Processes, a keeper, a disk and a clock that exist only here, and what must be true of them.
//!
//! The world performs a turn's actions in order, as the daemon does: what follows a `Save` waits until that is durable.
//! What the keeper holds (processes, zombies, unread words on channels) survives the supervisor; what only the
//! supervisor knew (answers under way, rotation, a save in flight) does not.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pm::model::exit::ExitReason;
use pm::model::id::{AppName, InstanceId, OpId, Slot};
use pm::model::moment::Moment;
use pm::model::saved::{Desired, Found, HookKind, Memo, SavedApp, SavedFleet, StartedFile, StartedFrom};
use pm::model::signal::Signal;
use pm::model::spec::{AppSpec, Dependency, Hooks, ReloadRules, Strategy};
use pm::model::status::Status;
use pm::policy::fleet::{AppView, Fleet, Settings};
use pm::policy::news::{News, What};
use pm::policy::vocabulary::{
    Action, AppOutcome, Command, Event, Health, HookEnd, Outcome, ProbeResult, ProbeRole, Retry, Rollback,
    RunState, SaveId, Selected, SlotView, Step, StepKind, Verb,
};

use crate::behaviour::{Behaviour, millis, secs};
use crate::random::APPS;
use crate::rng::Rng;
use crate::sabotage::{Bug, Sabotage};
use crate::specs::{Like, name, spec};

/// Three apps that need each other one after the other, each of which drains, ignores its signal and has hooks that hang;
/// and a few naps of the machine.
const PATIENCE: Duration = secs(400);

/// A broken promise.
#[derive(Clone, Debug)]
pub(crate) struct Broken(pub String);

macro_rules! broken {
    ($world:expr, $($text:tt)*) => {
        $world.break_promise(format!($($text)*))
    };
}

/// A child of the keeper.
#[derive(Clone, Debug)]
pub(crate) struct Proc {
    pub(crate) spec: Arc<AppSpec>,
    pub(crate) born: Moment,
    pub(crate) revision: u64,
    pub(crate) version: u32,
    pub(crate) behaviour: Behaviour,
    pub(crate) pid: Option<u32>,
    /// How it ended; a zombie until it is forgotten.
    pub(crate) exited: Option<ExitReason>,
    /// The supervisor knows that it ended.
    pub(crate) exit_told: bool,
    pub(crate) tree_gone: bool,
    /// What it wrote on its channel, and whether the supervisor has recorded that.
    pub(crate) said_ready: bool,
    pub(crate) keys: BTreeSet<String>,
    pub(crate) told: Vec<Event>,
    /// In rotation, as far as the dispatcher of this supervisor knows.
    pub(crate) put_in: bool,
    /// A hand-over is unanswered until then.
    pub(crate) settles_at: Option<Moment>,
    /// It drains, and is not to be disturbed until then.
    pub(crate) drain_until: Option<Moment>,
    pub(crate) signalled_at: Option<Moment>,
    /// The supervisor died between remembering its signal and sending it.
    pub(crate) signal_lost: bool,
    /// The supervisor lost its memory and had to believe that it is ready.
    pub(crate) believed: bool,
    pub(crate) ladder: bool,
    /// What it is being asked, and the number of that order.
    pub(crate) asked: Option<(ProbeRole, u64)>,
    /// It has answered well, and how it was then is not taken back.
    pub(crate) passed: bool,
    /// The last answer that the fleet heard was a good one.
    pub(crate) known_well: bool,
}

impl Proc {
    /// How it says that it is ready was settled when it was spawned.
    fn follow(&mut self, spec: &AppSpec) {
        self.spec = Arc::new(AppSpec { ready: self.spec.ready.clone(), ..spec.clone() });
    }

    pub(crate) fn alive(&self) -> bool {
        self.pid.is_some() && self.exited.is_none()
    }

    fn may_serve(&self) -> bool {
        let ready = if self.spec.ready.wait_ready {
            self.said_ready
        } else if self.spec.ready.probe.is_some() {
            self.passed
        } else if self.spec.is_node_cluster() {
            !self.keys.is_empty()
        } else {
            true
        };
        self.alive() && (ready || self.believed)
    }

    /// Whether it has failed its health check for at least so long.
    fn is_sick(&self, now: Moment, span: Duration) -> bool {
        self.behaviour.sick_after.is_some_and(|after| self.born + after + span <= now)
    }

    fn serves(&self) -> bool {
        self.may_serve() && !self.ladder
    }
}

/// Something that is going to happen.
#[derive(Clone, Debug)]
enum Happening {
    /// The keeper has forked, or could not.
    Birth(InstanceId),
    /// The process becomes ready or listens.
    Says(InstanceId, Word),
    Exits(InstanceId, ExitReason),
    TreeGoes(InstanceId),
    /// A hook and all it started have ended; `None`: it was killed.
    HookEnds(InstanceId, HookKind, Option<HookEnd>),
    /// It is asked how it is.
    Asked(InstanceId, ProbeRole, u64),
    /// The supervisor hears something that only it waits for.
    Hears(Event),
    /// A late double of what it has heard.
    HearsAgain(Event),
    SaveEnds(SaveId, SavedFleet),
    SupervisorStarts,
}

#[derive(Clone, Debug)]
enum Word {
    Ready,
    Listens(String),
}

/// How unkind the world is.
#[derive(Clone, Debug, Default)]
pub(crate) struct Unkind {
    /// Percent of saves that fail.
    pub(crate) save_fails: u64,
    /// The longest save, in ms.
    pub(crate) save_delay: u64,
    /// Percent of turns in which the supervisor dies.
    pub(crate) dies: u64,
    /// Percent of deaths that take the memory with them.
    pub(crate) forgets: u64,
    /// Percent of events that are heard twice.
    pub(crate) doubles: u64,
    /// Every process behaves as it likes.
    pub(crate) moody: bool,
}

#[derive(Debug)]
pub(crate) struct World {
    pub(crate) now: Moment,
    pub(crate) fleet: Option<Fleet>,
    pub(crate) procs: BTreeMap<InstanceId, Proc>,
    pub(crate) disk: SavedFleet,
    memo: Option<Memo>,
    agenda: BTreeMap<(Moment, u64), Happening>,
    seq: u64,
    pids: u32,
    /// Which version of its files an app has, and how that behaves.
    pub(crate) files: BTreeMap<AppName, (u32, Behaviour)>,
    /// Versions that are there beside the present one, as `releases/1` is.
    releases: BTreeMap<(AppName, u32), Behaviour>,
    /// What serves of an app that could not be started again just now, and is not to be touched.
    unfit: BTreeMap<AppName, BTreeSet<InstanceId>>,
    /// How many of each app were in rotation after the last turn, of how many slots.
    in_rotation: BTreeMap<AppName, (usize, u32)>,
    /// Runs that have been in reserve, and did not come back.
    reserved: BTreeSet<InstanceId>,
    pub(crate) rng: Rng,
    pub(crate) unkind: Unkind,
    pub(crate) sabotage: Sabotage,
    settings: Settings,
    /// Every generation that was ever spawned in the life of its slot.
    spawned: BTreeSet<InstanceId>,
    /// A save has failed in this supervisor's life.
    disk_refuses: bool,
    ops: u64,
    /// Requests without a reply, and when they were made.
    pub(crate) open: BTreeMap<OpId, (Moment, Command)>,
    /// Slots that somebody was told are stopped or deleted, and nobody has asked to start since.
    down: BTreeSet<(AppName, Slot)>,
    pub(crate) outcomes: Vec<(OpId, Outcome)>,
    pub(crate) steps: Vec<(OpId, Step)>,
    pub(crate) quit: bool,
    pub(crate) broken: Option<Broken>,
    pub(crate) log: Vec<String>,
    pub(crate) verbose: bool,
    /// The memory of a supervisor is kept also where none dies by chance.
    pub(crate) remembers: bool,
    pub(crate) spawns: u32,
    /// What each app needs, in every spec of it.
    pub(crate) needs: BTreeMap<AppName, BTreeMap<AppName, Dependency>>,
    /// When the machine woke up last.
    woken: Moment,
    /// Requests that nothing has come in the way of, and the hooks that were run for their app since.
    alone: BTreeMap<OpId, Vec<HookKind>>,
    /// Specs may need what they like, without a promise about the order.
    pub(crate) tangled: bool,
    /// A list for `resurrect`.
    pub(crate) dump: SavedFleet,
    /// Runs that were in rotation before this turn.
    served: BTreeSet<InstanceId>,
    /// Apps of which something was started since they were last at rest.
    awake: BTreeSet<AppName>,
    /// Those of them that were once up altogether.
    was_up: BTreeSet<AppName>,
    /// Runs in rotation, as the news tell.
    rotation: BTreeSet<InstanceId>,
    pub(crate) news: Vec<News>,
    stuck: u32,
    /// A supervisor has died, and what was asked of it is not known any more.
    died: bool,
    /// Hooks that run, and when they would end by themselves.
    hooks: BTreeMap<InstanceId, HookKind>,
    /// Apps whose next start needs their `pre_start` before it.
    unprepared: BTreeSet<AppName>,
    /// What hooks of an app do from now on; else they end well after a moment.
    pub(crate) hook_like: Option<(Duration, HookEnd)>,
    /// Every hook that was run, and how it ended.
    pub(crate) hooks_run: Vec<String>,
    last_op: Option<OpId>,
    /// Nobody waits for what is on its way down.
    hurried: bool,
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        let settings = Settings { start_parallelism: 4 };
        Self {
            now: Moment::from_nanos(1_000_000_000),
            fleet: Some(Fleet::new(settings)),
            procs: BTreeMap::new(),
            disk: SavedFleet::default(),
            memo: None,
            agenda: BTreeMap::new(),
            seq: 0,
            pids: 100,
            files: BTreeMap::new(),
            releases: BTreeMap::new(),
            unfit: BTreeMap::new(),
            in_rotation: BTreeMap::new(),
            reserved: BTreeSet::new(),
            rng: Rng::new(seed),
            unkind: Unkind::default(),
            sabotage: Sabotage::new(Bug::None),
            settings,
            spawned: BTreeSet::new(),
            disk_refuses: false,
            ops: 0,
            open: BTreeMap::new(),
            down: BTreeSet::new(),
            outcomes: Vec::new(),
            steps: Vec::new(),
            quit: false,
            broken: None,
            log: Vec::new(),
            verbose: false,
            remembers: false,
            spawns: 0,
            needs: BTreeMap::new(),
            woken: Moment::default(),
            alone: BTreeMap::new(),
            tangled: false,
            dump: SavedFleet::default(),
            served: BTreeSet::new(),
            awake: BTreeSet::new(),
            was_up: BTreeSet::new(),
            rotation: BTreeSet::new(),
            news: Vec::new(),
            stuck: 0,
            died: false,
            hooks: BTreeMap::new(),
            unprepared: BTreeSet::new(),
            hook_like: None,
            hooks_run: Vec::new(),
            last_op: None,
            hurried: false,
        }
    }

    /// A world in which this app is online at version 1.
    pub(crate) fn with_app(app: &str, like: Like, instances: u32) -> Self {
        let mut world = Self::new(1);
        world.verbose = true;
        world.start(spec(app, like, instances));
        world.run_for(secs(3));
        world.expect_no_breach();
        world
    }

    // What scenarios do.

    pub(crate) fn start(&mut self, spec: AppSpec) {
        self.files.entry(spec.name.clone()).or_insert((1, Behaviour::default()));
        self.ask(Command::Start { specs: vec![Arc::new(spec)] });
    }

    pub(crate) fn act(&mut self, verb: Verb, app: &str) {
        self.act_on(verb, app, None, None);
    }

    pub(crate) fn act_on(&mut self, verb: Verb, app: &str, slots: Option<&[u32]>, spec: Option<AppSpec>) {
        let slots = slots.map(|slots| slots.iter().map(|slot| Slot(*slot)).collect());
        self.ask(Command::Act {
            verb,
            selection: vec![Selected { app: name(app), slots }],
            specs: spec.into_iter().map(Arc::new).collect(),
        });
    }

    /// New files for the app; they take effect with the next spawn.
    pub(crate) fn deploy(&mut self, app: &str, behaviour: Behaviour) {
        let version = self.files.get(&name(app)).map_or(1, |(version, _)| version + 1);
        self.files.insert(name(app), (version, behaviour));
    }

    /// The same, beside the files there are: `current` leads to another release.
    pub(crate) fn release(&mut self, app: &str, behaviour: Behaviour) {
        if let Some((version, old)) = self.files.get(&name(app)).cloned() {
            self.releases.insert((name(app), version), old);
        }
        self.deploy(app, behaviour);
    }

    /// Everything that is started from now on behaves.
    pub(crate) fn mend_files(&mut self) {
        self.files.clear();
        self.releases.values_mut().for_each(|files| *files = Behaviour::default());
    }

    pub(crate) fn ask(&mut self, command: Command) -> OpId {
        self.ops += 1;
        let op = OpId(self.ops);
        if self.fleet.is_some() && !self.quit {
            self.open.insert(op, (self.now, command.clone()));
            self.unfit.retain(|app, _| !concerns(&command, app));
            self.down.retain(|(app, _)| !concerns(&command, app) || is_end(&command));
            self.last_op = Some(op);
            self.note_alone(op, &command);
            self.turn(Event::Asked { op, command });
        }
        op
    }

    /// The oldest live instance of a slot ends like this.
    pub(crate) fn crash(&mut self, app: &str, slot: u32, reason: &ExitReason) {
        let id =
            self.procs.iter().find(|(id, proc)| id.app == name(app) && id.slot == Slot(slot) && proc.alive());
        if let Some((id, _)) = id {
            let id = id.clone();
            self.happen(Happening::Exits(id, reason.clone()));
        }
    }

    /// The live instance of a slot fails its health check from now on.
    pub(crate) fn sicken(&mut self, app: &str, slot: u32) {
        let now = self.now;
        self.each_in_slot(app, slot, |proc| proc.behaviour.sick_after = Some(now.since(proc.born)));
    }

    /// It does not any more.
    pub(crate) fn cure(&mut self, app: &str, slot: u32) {
        self.each_in_slot(app, slot, |proc| proc.behaviour.sick_after = None);
    }

    fn each_in_slot(&mut self, app: &str, slot: u32, change: impl Fn(&mut Proc)) {
        let of_slot = |id: &InstanceId| id.app == name(app) && id.slot == Slot(slot);
        self.procs
            .iter_mut()
            .filter(|(id, proc)| of_slot(id) && proc.alive())
            .for_each(|(_, proc)| change(proc));
    }

    fn rows(&self, app: &str) -> Vec<SlotView> {
        let view = self.fleet.as_ref().and_then(|fleet| fleet.app(&name(app)));
        view.map(|view| view.slots).unwrap_or_default()
    }

    /// The exit code of a daemon in the foreground, if it would end now.
    pub(crate) fn exit_code(&self) -> Option<u8> {
        Some(pm::policy::finished::exit_code(&self.fleet.as_ref()?.finished()?))
    }

    /// Nobody waits for what is on its way down any more.
    pub(crate) fn hurry(&mut self) {
        self.hurried = true;
        self.turn(Event::Hurried);
    }

    pub(crate) fn healths(&self, app: &str) -> Vec<Option<Health>> {
        self.rows(app).iter().map(|row| row.current.as_ref().and_then(|run| run.health)).collect()
    }

    pub(crate) fn restarts(&self, app: &str) -> Vec<u32> {
        self.rows(app).iter().map(|row| row.restarts).collect()
    }

    pub(crate) fn last_exit(&self, app: &str, slot: usize) -> Option<ExitReason> {
        self.rows(app).get(slot).and_then(|row| row.last_exit.clone())
    }

    /// This run ends like this.
    pub(crate) fn crash_run(&mut self, id: &InstanceId, reason: &ExitReason) {
        self.happen(Happening::Exits(id.clone(), reason.clone()));
    }

    /// How a request ended, if it has.
    pub(crate) fn answer(&self, op: OpId) -> Option<&Outcome> {
        self.outcomes.iter().find(|(one, _)| *one == op).map(|(_, outcome)| outcome)
    }

    pub(crate) fn pids(&self, app: &str) -> Vec<u32> {
        self.procs
            .iter()
            .filter(|(id, proc)| id.app == name(app) && proc.alive())
            .filter_map(|(_, p)| p.pid)
            .collect()
    }

    pub(crate) fn run_for(&mut self, span: Duration) {
        let end = self.now + span;
        while self.broken.is_none() && self.next(end) {}
        self.now = self.now.max(end);
    }

    /// Time passes, and nothing runs: a suspended machine, or SIGSTOP.
    pub(crate) fn sleep_for(&mut self, span: Duration) {
        self.now = self.now + span;
        self.woken = self.now;
        let late: Vec<_> = std::mem::take(&mut self.agenda).into_iter().collect();
        for ((at, seq), happening) in late {
            self.agenda.insert((at + span, seq), happening);
        }
    }

    /// What a person would see.
    pub(crate) fn picture(&self, app: &str) -> String {
        let mut text = String::new();
        let Some(view) = self.fleet.as_ref().and_then(|fleet| fleet.app(&name(app))) else {
            return String::from("unknown");
        };
        for slot in &view.slots {
            let run = slot.current.as_ref().and_then(|run| self.procs.get(&run.id));
            let version = run.map_or(String::new(), |proc| format!(" v{}", proc.version));
            let separator = if text.is_empty() { "" } else { " | " };
            write!(text, "{separator}{}: {}{version}", slot.slot, slot.status).unwrap();
            for other in &slot.draining {
                let version = self.procs.get(&other.id).map_or(0, |proc| proc.version);
                let state = match other.state {
                    RunState::Reserve | RunState::Soaking => other.state.as_str(),
                    _ => other.status.as_str(),
                };
                write!(text, " + {state} v{version}").unwrap();
            }
        }
        text
    }

    /// How the last request ended.
    pub(crate) fn last(&self) -> String {
        let Some(op) = self.last_op else { return String::from("nothing asked") };
        let Some((_, outcome)) = self.outcomes.iter().find(|(one, _)| *one == op) else {
            return String::from("no reply");
        };
        let of_app = |outcome: &AppOutcome| match outcome {
            AppOutcome::Done { what, .. } => (*what).to_owned(),
            AppOutcome::Already { what } => format!("already {what}"),
            AppOutcome::Failed { id, reason, replaced, kept, rollback } => {
                let mut text =
                    format!("failed: {} {reason}, {} replaced, {} kept", id.slot, replaced.len(), kept.len());
                if let Some(Rollback { restored, failed }) = rollback.as_deref() {
                    write!(text, ", {} restored", restored.len()).unwrap();
                    if let Some((id, reason)) = failed {
                        write!(text, ", {} did not come back: {reason}", id.slot).unwrap();
                    }
                }
                text
            }
            AppOutcome::HookFailed { hook, why, done, .. } => {
                format!("{}hook {hook} failed: {why}", done.map_or(String::new(), |done| format!("{done}, ")))
            }
            AppOutcome::Unfit { why } => format!("unfit: {why}"),
            AppOutcome::Superseded { by } => format!("superseded by {by}"),
            AppOutcome::Waiting { on, why } => format!("waiting for {on}, which {why}"),
            AppOutcome::Skipped { on } => format!("skipped after {on}"),
            AppOutcome::NotRemembered { what, .. } => format!("{what}, not remembered"),
            AppOutcome::StillListed { .. } => String::from("stopped, still listed"),
            AppOutcome::NotSaved { .. } => String::from("not saved"),
        };
        match outcome {
            Outcome::Done { apps } | Outcome::Failed { apps } => {
                apps.iter().map(|(_, outcome)| of_app(outcome)).collect::<Vec<_>>().join(", ")
            }
            Outcome::Refused(refusal) => format!("refused: {refusal}"),
        }
    }

    #[track_caller]
    pub(crate) fn check(&self, app: &str, expected: &str) {
        self.expect_no_breach();
        let seen = format!("{} | {}", self.picture(app), self.last());
        assert_eq!(seen, expected, "\n{}", self.log.join("\n"));
    }

    #[track_caller]
    pub(crate) fn expect_no_breach(&self) {
        if let Some(Broken(why)) = &self.broken {
            panic!("{why}\n{}", self.log.join("\n"));
        }
    }

    // The clock.

    fn later(&mut self, span: Duration, happening: Happening) {
        self.seq += 1;
        self.agenda.insert((self.now + span, self.seq), happening);
    }

    /// Lets the next thing happen that does so before `end`. Says whether there was one.
    pub(crate) fn next(&mut self, end: Moment) -> bool {
        if self.quit {
            return false;
        }
        let planned = self.agenda.keys().next().copied();
        let due = self.fleet.as_ref().and_then(Fleet::next_deadline);
        match (planned, due) {
            // An exit outranks a grace period that has just run out.
            (Some(key), due) if due.is_none_or(|at| key.0 <= at) => {
                if key.0 > end {
                    return false;
                }
                self.stuck = 0;
                self.now = self.now.max(key.0);
                if let Some(happening) = self.agenda.remove(&key) {
                    self.happen(happening);
                }
            }
            (_, Some(at)) => {
                if at > end {
                    return false;
                }
                self.stuck = if at <= self.now { self.stuck + 1 } else { 0 };
                if self.stuck > 8 {
                    broken!(self, "next_deadline {at:?} stays in the past");
                    return false;
                }
                self.now = self.now.max(at);
                self.turn(Event::DeadlineReached);
            }
            (_, None) => return false,
        }
        true
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Birth(id) => self.birth(&id),
            Happening::Says(id, word) => self.says(&id, word),
            Happening::Exits(id, reason) => self.exits(&id, reason),
            Happening::TreeGoes(id) => {
                if let Some(proc) = self.procs.get_mut(&id) {
                    proc.tree_gone = true;
                }
                self.hear(Event::TreeGone { id });
            }
            Happening::HookEnds(id, kind, end) => self.hook_ends(id, kind, end),
            Happening::Asked(id, role, order) => self.answers(&id, role, order),
            Happening::Hears(event) => {
                if let Event::Settled { id } = &event
                    && let Some(proc) = self.procs.get_mut(id)
                {
                    proc.settles_at = None;
                }
                if let Event::Drained { id } = &event
                    && let Some(proc) = self.procs.get_mut(id)
                {
                    proc.drain_until = None;
                }
                self.hear(event);
            }
            Happening::HearsAgain(event) => self.turn(event),
            Happening::SaveEnds(save, state) => {
                if self.rng.chance(self.unkind.save_fails) {
                    self.disk_refuses = true;
                    self.turn(Event::SaveFailed { save, error: String::from("disk full") });
                } else {
                    self.disk = state;
                    self.turn(Event::Saved { save });
                }
            }
            Happening::SupervisorStarts => self.supervisor_starts(),
        }
    }

    /// The supervisor hears something, perhaps twice.
    fn hear(&mut self, event: Event) {
        if self.fleet.is_some() && self.rng.chance(self.unkind.doubles) {
            let span = millis(self.rng.below(3000));
            self.later(span, Happening::HearsAgain(event.clone()));
        }
        self.turn(event);
    }

    // Processes.

    fn birth(&mut self, id: &InstanceId) {
        let Some(proc) = self.procs.get_mut(id) else { return };
        if proc.pid.is_some() {
            return;
        }
        let behaviour = proc.behaviour.clone();
        if let Some(retry) = behaviour.no_spawn {
            proc.exited = Some(ExitReason::NotStarted(String::new()));
            (proc.exit_told, proc.tree_gone) = (true, true);
            if self.fleet.is_none() {
                // Nobody is there to be told, and there is nothing to be found.
                self.procs.remove(id);
                return;
            }
            return self.turn(Event::SpawnFailed { id: id.clone(), error: String::from("EAGAIN"), retry });
        }
        self.pids += 1;
        let pid = self.pids;
        proc.pid = Some(pid);
        let spec = Arc::clone(&proc.spec);
        let listens = behaviour.listens_after.or(behaviour.ready_after);
        if let Some(after) = behaviour.ready_after
            && spec.ready.wait_ready
        {
            self.later(after, Happening::Says(id.clone(), Word::Ready));
        }
        if let Some(after) = listens
            && spec.is_node_cluster()
        {
            for key in 0..behaviour.keys {
                self.later(after, Happening::Says(id.clone(), Word::Listens(format!("{}", 3000 + key))));
            }
        }
        if let Some((after, code)) = behaviour.exits_after {
            self.later(after, Happening::Exits(id.clone(), ExitReason::Code(code)));
        }
        self.turn(Event::Spawned { id: id.clone(), pid });
    }

    fn says(&mut self, id: &InstanceId, word: Word) {
        let Some(proc) = self.procs.get_mut(id).filter(|proc| proc.alive()) else { return };
        let event = match word {
            Word::Ready => {
                proc.said_ready = true;
                Event::Ready { id: id.clone() }
            }
            Word::Listens(key) => {
                proc.keys.insert(key.clone());
                Event::Listening { id: id.clone(), key }
            }
        };
        proc.told.push(event.clone());
        self.hear(event);
    }

    fn exits(&mut self, id: &InstanceId, reason: ExitReason) {
        let Some(proc) = self.procs.get_mut(id).filter(|proc| proc.alive()) else { return };
        proc.exited = Some(reason.clone());
        proc.put_in = false;
        if self.fleet.is_some() {
            proc.exit_told = true;
            self.hear(Event::Exited { id: id.clone(), reason });
        }
    }

    // The supervisor.

    pub(crate) fn supervisor_dies(&mut self) {
        if self.fleet.take().is_none() {
            return;
        }
        self.died = true;
        self.note("--- the supervisor dies");
        self.unfit.clear();
        self.in_rotation.clear();
        // What was on its way to the keeper arrives; what only the supervisor would have heard is gone. A save in
        // flight may be on disk or not.
        let agenda = std::mem::take(&mut self.agenda);
        for (key, happening) in agenda {
            match happening {
                Happening::Birth(id) => self.birth(&id),
                Happening::SaveEnds(_, state) => {
                    if self.rng.chance(50) {
                        self.disk = state;
                    }
                }
                Happening::Hears(_)
                | Happening::HearsAgain(_)
                | Happening::TreeGoes(_)
                | Happening::HookEnds(..)
                | Happening::Asked(..) => {}
                Happening::Says(..) | Happening::Exits(..) | Happening::SupervisorStarts => {
                    self.agenda.insert(key, happening);
                }
            }
        }
        // The next one ends what is left of them before it does anything else.
        self.hooks.clear();
        for proc in self.procs.values_mut() {
            (proc.put_in, proc.exit_told, proc.settles_at) = (false, false, None);
            (proc.drain_until, proc.asked) = (None, None);
        }
        self.procs.retain(|_, proc| proc.pid.is_some());
        self.open.clear();
        self.alone.clear();
        let span = millis(self.rng.below(2000));
        self.later(span, Happening::SupervisorStarts);
    }

    /// The machine loses power: only the disk survives.
    pub(crate) fn reboot(&mut self) {
        self.died = true;
        self.note("--- reboot");
        self.in_rotation.clear();
        self.fleet = None;
        self.procs.clear();
        self.agenda.clear();
        self.hooks.clear();
        self.unprepared = self.disk.apps.iter().map(|app| app.spec.name.clone()).collect();
        self.memo = None;
        self.open.clear();
        self.spawned.clear();
        self.awake.clear();
        self.was_up.clear();
        self.rotation.clear();
        self.reserved.clear();
        self.later(secs(1), Happening::SupervisorStarts);
    }

    /// After the daemon has ended, another one is started.
    pub(crate) fn new_daemon(&mut self) {
        self.quit = false;
        self.reboot();
    }

    fn supervisor_starts(&mut self) {
        if self.fleet.is_some() {
            return;
        }
        self.note("--- a supervisor starts");
        self.disk_refuses = false;
        let forgets = self.rng.chance(self.unkind.forgets);
        let memo = if forgets { None } else { self.memo.clone() };
        // It knows runs by their release, whose rules may have been saved without having been taken over.
        for (id, proc) in &mut self.procs {
            let app =
                self.disk.apps.iter().find(|app| app.spec.name == id.app && app.revision == proc.revision);
            match app {
                Some(app) if self.rotation.contains(id) => proc.follow(&app.spec),
                // How it has to say that it is ready is read from them, too.
                Some(app) => proc.spec = Arc::clone(&app.spec),
                None => {}
            }
        }
        for proc in self.procs.values_mut() {
            proc.exit_told = proc.exited.is_some();
            proc.believed |= memo.is_none();
            // The ladder is climbed again where it did not come to the signal.
            proc.ladder = proc.signalled_at.is_some() || (proc.ladder && memo.is_some());
        }
        let known = |id: &InstanceId| self.disk.apps.iter().any(|app| app.spec.name == id.app);
        let gone: Vec<_> =
            self.spawned.iter().filter(|id| !known(id) && !self.procs.contains_key(id)).cloned().collect();
        for id in gone {
            self.spawned.remove(&id);
        }
        let slots = |id: &InstanceId| {
            self.disk.apps.iter().find(|app| app.spec.name == id.app).map_or(0, |app| app.slots.len())
        };
        let procs = &self.procs;
        let kept: BTreeSet<_> = self
            .spawned
            .iter()
            .filter(|id| (id.slot.0 as usize) < slots(id) || procs.contains_key(id))
            .cloned()
            .collect();
        self.spawned = kept;
        if self.unkind.save_fails > 0 {
            // Of numbers that the disk did not take, those are known that something still has, or that the memo names.
            let reserved = |id: &InstanceId| {
                let app = self.disk.apps.iter().find(|app| app.spec.name == id.app);
                app.and_then(|app| app.slots.get(id.slot.0 as usize)).map_or(0, |slot| slot.reserved.0)
            };
            let named = |id: &InstanceId| {
                let slots = memo.iter().flat_map(|memo| &memo.slots);
                slots.filter(|slot| slot.app == id.app && slot.slot == id.slot).count() > 0
            };
            let known =
                |id: &InstanceId| id.generation.0 <= reserved(id) || named(id) || self.procs.contains_key(id);
            let kept = self.spawned.iter().filter(|id| known(id)).cloned().collect();
            self.spawned = kept;
        }
        let mut found: Vec<Found> = self
            .procs
            .iter()
            .filter_map(|(id, proc)| {
                proc.pid.map(|pid| Found {
                    id: id.clone(),
                    revision: proc.revision,
                    pid,
                    exited: proc.exited.clone(),
                    signalled: proc.signalled_at.is_some(),
                })
            })
            .collect();
        // What nobody has read from the channels.
        let unread: Vec<Event> = self.procs.values().flat_map(|proc| proc.told.clone()).collect();
        let mut saved = self.disk.clone();
        self.sabotage.restore(&mut saved, &mut found);
        let (fleet, mut actions) = Fleet::restore(self.settings, self.now, saved, memo, found);
        self.fleet = Some(fleet);
        if forgets {
            // What has to be believed is no news, and what is told may have been told before.
            let _ = self.fleet.as_mut().map(Fleet::take_news);
            self.rotation = self.online();
        }
        self.hear_news();
        self.remember();
        self.sabotage.actions(&mut actions);
        self.perform(actions);
        for event in unread {
            self.turn(event);
        }
    }

    fn turn(&mut self, event: Event) {
        if self.quit || self.broken.is_some() {
            return;
        }
        self.check_patience();
        if self.fleet.is_none() {
            return;
        }
        let events = self.sabotage.event(event);
        for event in events {
            self.turn_of(event);
        }
        for action in std::mem::take(&mut self.sabotage.again) {
            self.perform_one(action);
        }
        for id in std::mem::take(&mut self.sabotage.skipped) {
            self.later(millis(0), Happening::Hears(Event::HookEnded { id, end: HookEnd::Succeeded }));
        }
    }

    fn turn_of(&mut self, event: Event) {
        let Some(fleet) = &mut self.fleet else { return };
        if self.verbose {
            self.log.push(format!("{:>9.3} {event:?}", self.now.nanos() as f64 / 1e9 - 1.0));
        }
        let mut actions = fleet.handle(self.now, event);
        self.hear_news();
        self.remember();
        self.sabotage.actions(&mut actions);
        let dies_after = if self.rng.chance(self.unkind.dies) {
            Some(self.rng.below(actions.len() as u64 + 1))
        } else {
            None
        };
        match dies_after {
            Some(count) => {
                for lost in actions.split_off(usize::try_from(count).unwrap()) {
                    self.lose(&lost);
                }
                for action in actions {
                    self.perform_one(action);
                }
                self.supervisor_dies();
            }
            None => self.perform(actions),
        }
    }

    /// News are remembered with everything else of a turn, before it is acted on.
    fn hear_news(&mut self) {
        let Some(fleet) = &mut self.fleet else { return };
        self.served.clone_from(&self.rotation);
        for news in fleet.take_news() {
            if let Some(run) = &news.run {
                match &news.what {
                    What::Step(StepKind::Reserved) => self.reserved.insert(run.id.clone()),
                    What::Step(StepKind::Restored) => self.reserved.remove(&run.id),
                    _ => false,
                };
                let fine = match &news.what {
                    What::InRotation => self.rotation.insert(run.id.clone()),
                    What::OutOfRotation => self.rotation.remove(&run.id),
                    _ => true,
                };
                if !fine {
                    let id = run.id.clone();
                    broken!(self, "{id}: {:?} is told twice", news.what);
                    return;
                }
            }
            if self.verbose {
                self.news.push(news);
            }
        }
        if !self.needs.is_empty() {
            self.note_up();
        }
        let online = self.online();
        if self.rotation != online && !self.quit {
            broken!(self, "the news tell of {:?} in rotation, the rows of {online:?}", self.rotation);
        }
    }

    fn online(&self) -> BTreeSet<InstanceId> {
        let views = self.fleet.iter().flat_map(Fleet::view);
        let slots = views.flat_map(|view| view.slots);
        let runs = slots.flat_map(|slot| slot.current.into_iter().chain(slot.draining));
        runs.filter(|run| run.state == RunState::Online).map(|run| run.id).collect()
    }

    /// What an app needs is up before anything of it is started from rest.
    fn check_needs(&mut self, id: &InstanceId) {
        if !self.awake.insert(id.app.clone()) || self.sabotage.bug == Bug::StopsAtOnce {
            return;
        }
        let operation = self.fleet.as_ref().and_then(|fleet| fleet.app(&id.app)?.operation);
        // Nothing is promised of what is asked of an app in any other way.
        if operation.is_some_and(|operation| operation != "start") {
            return;
        }
        let needs = self.needs.get(&id.app).cloned().unwrap_or_default();
        for (needed, how_far) in needs {
            let up = match how_far {
                Dependency::Ready => self.was_up.contains(&needed),
                Dependency::Started => self.awake.contains(&needed),
            };
            if !up {
                let app = &id.app;
                broken!(self, "{app} is started although {needed}, which it needs, never came up");
            }
        }
    }

    fn note_up(&mut self) {
        let Some(fleet) = &self.fleet else { return };
        let saved = fleet.saved();
        for (view, app) in fleet.view().iter().zip(&saved.apps) {
            let running =
                view.slots.iter().zip(&app.slots).filter(|(_, slot)| slot.desired == Desired::Running);
            let done = |row: &SlotView| {
                row.status == Status::Stopped && row.by_itself && row.last_exit == Some(ExitReason::Code(0))
            };
            let mut up = running.map(|(row, _)| row.status == Status::Online || done(row)).peekable();
            let ended = app.slots.iter().all(|slot| slot.desired == Desired::Stopped);
            if (up.peek().is_some() && up.all(|up| up)) || ended {
                self.was_up.insert(app.spec.name.clone());
            }
        }
    }

    /// Of apps that go down together those that need another one are gone before it goes.
    fn check_order(&mut self, id: &InstanceId) {
        // What is not up goes when it is late, whoever is there.
        if self.needs.is_empty() || !self.procs.get(id).is_some_and(Proc::serves) {
            return;
        }
        let Some(fleet) = &self.fleet else { return };
        let saved = fleet.saved();
        let goes = |name: &AppName| {
            saved.apps.iter().any(|app| {
                app.spec.name == *name && app.slots.iter().all(|slot| slot.desired == Desired::Stopped)
            })
        };
        // A slot that is given up goes at once.
        let has_slot = |app: &SavedApp| app.spec.name == id.app && (id.slot.0 as usize) < app.slots.len();
        if !goes(&id.app) || !saved.apps.iter().any(has_slot) {
            return;
        }
        let first = self.procs.iter().find(|(other, proc)| {
            let needs = self.needs.get(&other.app).is_some_and(|needs| needs.contains_key(&id.app));
            needs && goes(&other.app) && proc.alive()
        });
        if let Some((other, _)) = first {
            let other = other.clone();
            broken!(self, "{id} goes down before {other}, which needs it");
        }
    }

    /// An order that was remembered, and never given.
    fn lose(&mut self, action: &Action) {
        let (id, signal) = match action {
            Action::SendShutdown { id } | Action::KillTree { id } => (id, true),
            Action::Signal { id, .. } => (id, false),
            Action::TakeOut { id } | Action::AskKillListeners { id, .. } | Action::Drain { id, .. } => {
                (id, false)
            }
            _ => return,
        };
        if let Some(proc) = self.procs.get_mut(id) {
            proc.ladder = true;
            proc.signal_lost |= signal;
        }
    }

    fn perform(&mut self, actions: Vec<Action>) {
        for action in actions {
            self.perform_one(action);
        }
        self.check_rows();
    }

    /// The memo is written before a turn's actions are performed: what was begun is known to the next supervisor, also
    /// when it was not done.
    fn remember(&mut self) {
        let Some(fleet) = &self.fleet else { return };
        // Only where it may be needed: building it costs more than the turn.
        if self.unkind.dies > 0 || self.verbose || self.remembers {
            self.memo = Some(fleet.memo());
            for proc in self.procs.values_mut() {
                proc.told.clear();
            }
        }
    }

    fn perform_one(&mut self, action: Action) {
        if self.verbose && !matches!(action, Action::Progress { .. } | Action::Save { .. }) {
            self.log.push(
                format!("              {action:?}").replace("InstanceId ", "").chars().take(400).collect(),
            );
        }
        match action {
            Action::Save { save, state } => {
                let span = millis(self.rng.below(self.unkind.save_delay + 1));
                if self.sabotage.bug == Bug::SaveLater {
                    // Says that it is durable before it is.
                    self.later(millis(0), Happening::Hears(Event::Saved { save }));
                    return;
                }
                self.later(span, Happening::SaveEnds(save, state));
            }
            Action::TakeOver { app, spec, revision } => {
                for (_, proc) in
                    self.procs.iter_mut().filter(|(id, proc)| id.app == app && proc.revision == revision)
                {
                    proc.follow(&spec);
                }
            }
            Action::Spawn { id, spec, revision, .. } => {
                // What cannot be started is known of the files as they were.
                self.unfit.remove(&id.app);
                let version = self.files.get(&id.app).map_or(1, |(version, _)| *version);
                self.spawn(id.clone(), spec, revision, version);
                let from = started_from(version);
                self.later(millis(0), Happening::Hears(Event::StartedFrom { id, from }));
            }
            Action::SpawnFrom { id, spec, revision, from, .. } => {
                let version = version_of(&from);
                let present = self.files.get(&id.app).map_or(1, |(version, _)| *version);
                self.spawn(id.clone(), spec, revision, version);
                if version == present || self.releases.contains_key(&(id.app.clone(), version)) {
                    let from = StartedFrom::clone(&from);
                    self.later(millis(0), Happening::Hears(Event::StartedFrom { id, from }));
                } else if let Some(proc) = self.procs.get_mut(&id) {
                    // The files have changed.
                    proc.behaviour.no_spawn = Some(Retry::Backoff);
                }
            }
            Action::Preflight { app, check, spec: _ } => {
                let missing = self.files.get(&app).is_some_and(|(_, files)| files.no_spawn.is_some());
                let fault = if self.unkind.moody { self.rng.chance(8) } else { missing };
                self.unfit.remove(&app);
                let others = self.open.values().filter(|(_, command)| concerns(command, &app)).count() > 1;
                if fault && !others {
                    let serves = self.procs.iter().filter(|(id, proc)| id.app == app && proc.serves());
                    self.unfit.insert(app.clone(), serves.map(|(id, _)| id.clone()).collect());
                }
                let fault = fault.then(|| String::from("no such directory"));
                self.later(millis(0), Happening::Hears(Event::Checked { app, check, fault }));
            }
            Action::Reply { op, outcome } => self.replied(op, outcome),
            Action::Progress { op, step } => self.steps.push((op, step)),
            Action::Quit => {
                if self.procs.values().any(Proc::alive) {
                    broken!(self, "the daemon ends although processes live");
                }
                self.quit = true;
            }
            Action::CloseListeners { app, keep } => {
                if keep.is_none() && self.procs.iter().any(|(id, proc)| id.app == app && proc.alive()) {
                    broken!(self, "the listeners of {app} are closed although it runs");
                }
            }
            Action::Forget { id } => match self.procs.remove(&id) {
                Some(proc) if proc.exited.is_none() || !proc.tree_gone => {
                    broken!(self, "{id} is forgotten although not all of it is gone");
                }
                Some(_) => {}
                None => broken!(self, "{id} is forgotten twice"),
            },
            Action::PutIn { id } => self.order(id, |proc, _, _| {
                proc.put_in = true;
                // A supervisor that did not remember the stop takes it back.
                proc.ladder = proc.signalled_at.is_some();
                None
            }),
            Action::TakeOut { id } => {
                self.check_takedown(&id);
                self.check_order(&id);
                self.order(id, |proc, now, id| {
                    (proc.put_in, proc.ladder) = (false, true);
                    let span = proc.behaviour.settles_after;
                    proc.settles_at = Some(now + span);
                    Some((span, Event::Settled { id }))
                });
            }
            Action::Drain { id, within, .. } => {
                self.check_takedown(&id);
                self.check_order(&id);
                self.order(id, |proc, now, id| {
                    proc.ladder = true;
                    // What a failed reload removes has less time than its spec says.
                    let limit = proc
                        .spec
                        .stop
                        .drain_timeout
                        .unwrap_or(secs(6))
                        .min(proc.spec.stop.timeout)
                        .min(within);
                    let span = proc.behaviour.drains_after;
                    proc.drain_until = Some(now + span.unwrap_or(limit).min(limit));
                    span.map(|span| (span, Event::Drained { id }))
                });
            }
            Action::AskKillListeners { id, .. } => {
                self.check_takedown(&id);
                self.order(id, |proc, _, id| {
                    proc.ladder = true;
                    proc.behaviour.kill_listeners.map(|count| (millis(1), Event::KillListeners { id, count }))
                });
            }
            Action::Probe { id, role, delay } => {
                self.seq += 1;
                let order = self.seq;
                if let Some(proc) = self.procs.get_mut(&id) {
                    (proc.asked, proc.known_well) = (Some((role, order)), false);
                    self.later(delay, Happening::Asked(id, role, order));
                }
            }
            Action::RunHook { id, kind, spec, .. } => self.run_hook(id, kind, &spec),
            Action::KillHook { id } => {
                if let Some(kind) = self.hooks.get(&id) {
                    let kind = *kind;
                    self.later(millis(2), Happening::HookEnds(id, kind, None));
                }
            }
            Action::StopProbing { id } => {
                if let Some(proc) = self.procs.get_mut(&id) {
                    proc.asked = None;
                }
            }
            Action::Disconnect { id } => self.order(id, |proc, _, id| {
                proc.behaviour.disconnects_after.map(|span| (span, Event::ChannelClosed { id }))
            }),
            Action::Signal { id, .. } | Action::SendShutdown { id } => self.signal(id),
            Action::Follow { id, .. } => {
                if self.procs.get(&id).is_none_or(|proc| proc.signalled_at.is_none()) {
                    broken!(self, "{id} is to follow what was never signalled");
                }
            }
            Action::KillTree { id } => self.kill_tree(id),
            Action::EndLeftovers { id, .. } => {
                let Some(proc) = self.procs.get(&id) else {
                    return broken!(self, "leftovers of {id}, which is unknown, are ended");
                };
                if proc.exited.is_none() {
                    return broken!(self, "leftovers of {id} are ended although it lives");
                }
                let span = proc.behaviour.leftovers_for.min(secs(1));
                self.later(span, Happening::TreeGoes(id));
            }
        }
    }

    /// An order for a process: it must be there, and its end must not be known.
    fn order(
        &mut self,
        id: InstanceId,
        order: impl FnOnce(&mut Proc, Moment, InstanceId) -> Option<(Duration, Event)>,
    ) {
        let now = self.now;
        match self.procs.get_mut(&id) {
            None => broken!(self, "an order for {id}, which is gone"),
            Some(proc) if proc.exit_told => broken!(self, "an order for {id}, whose exit is known"),
            Some(proc) => {
                if let Some((span, event)) = order(proc, now, id) {
                    self.later(span, Happening::Hears(event));
                }
            }
        }
    }

    /// How often a hook runs is told of requests that have their app to themselves.
    fn note_alone(&mut self, op: OpId, command: &Command) {
        let open = &self.open;
        let meets = |other: &Command| {
            APPS.iter().any(|app| concerns(other, &name(app)) && concerns(command, &name(app)))
        };
        self.alone.retain(|other, _| open.get(other).is_some_and(|(_, other)| !meets(other)));
        let Command::Act { selection, .. } = command else { return };
        let [Selected { app, slots: None }] = &selection[..] else { return };
        let rests =
            self.fleet.as_ref().and_then(|fleet| fleet.app(app)).is_some_and(|view| view.operation.is_none());
        let others =
            open.iter().filter(|(other, (_, command))| **other != op && concerns(command, app)).count();
        if rests && others == 0 && !self.hooks.keys().any(|id| id.app == *app) {
            self.alone.insert(op, Vec::new());
        }
    }

    /// Each hook runs once in what it is about.
    fn check_hooks(&mut self, op: OpId, command: &Command, app: &AppName, what: &str) {
        let Some(run) = self.alone.remove(&op) else { return };
        let Command::Act { verb, .. } = command else { return };
        let saved = self.fleet.as_ref().map(Fleet::saved).unwrap_or_default();
        let has =
            saved.apps.iter().any(|saved| saved.spec.name == *app && saved.spec.hooks != Hooks::default());
        let count = |kinds: &[HookKind]| run.iter().filter(|kind| kinds.contains(kind)).count();
        let gates = count(&[HookKind::PreStart, HookKind::PreReload]);
        let fine = match (verb, what) {
            (Verb::Reload, "reloaded")
            | (Verb::Restart, "restarted")
            | (Verb::Start, "started" | "restarted") => gates == usize::from(has),
            (Verb::Stop, "stopped") => gates == 0 && count(&[HookKind::PostStop]) <= 1,
            _ => true,
        };
        if !fine {
            broken!(self, "{app} is {what}, and these hooks were run: {run:?}");
        }
    }

    fn run_hook(&mut self, id: InstanceId, kind: HookKind, spec: &AppSpec) {
        if self.hooks.keys().any(|other| other.app == id.app) {
            return broken!(self, "{} runs two hooks at once", id.app);
        }
        if spec.hooks == Hooks::default() || !id.slot.is_hook() {
            return broken!(self, "{} has no such hook", id.app);
        }
        self.hooks.insert(id.clone(), kind);
        for (op, run) in &mut self.alone {
            if self.open.get(op).is_some_and(|(_, command)| concerns(command, &id.app)) {
                run.push(kind);
            }
        }
        let (span, end) = match &self.hook_like {
            Some((span, end)) => (*span, end.clone()),
            None if self.unkind.moody => {
                let fails = self.rng.chance(20);
                let end =
                    if fails { HookEnd::Failed(String::from("exit code 1")) } else { HookEnd::Succeeded };
                (millis(self.rng.below(6000)), end)
            }
            None => (millis(20), HookEnd::Succeeded),
        };
        self.later(span, Happening::HookEnds(id, kind, Some(end)));
    }

    fn hook_ends(&mut self, id: InstanceId, kind: HookKind, end: Option<HookEnd>) {
        if self.hooks.remove(&id).is_none() {
            return;
        }
        if self.verbose {
            self.hooks_run
                .push(format!("{kind}{}", if end == Some(HookEnd::Succeeded) { "" } else { " failed" }));
        }
        if kind == HookKind::PreStart && end == Some(HookEnd::Succeeded) {
            self.unprepared.remove(&id.app);
        }
        let end = end.unwrap_or(HookEnd::Failed(String::from("SIGKILL")));
        self.hear(Event::HookEnded { id, end });
    }

    /// A probe, unless it was taken back.
    fn answers(&mut self, id: &InstanceId, role: ProbeRole, order: u64) {
        let now = self.now;
        let Some(proc) = self.procs.get_mut(id).filter(|proc| proc.asked == Some((role, order))) else {
            return;
        };
        if proc.exit_told || (proc.ladder && !proc.believed && proc.exited.is_none() && !proc.signal_lost) {
            return broken!(self, "{id} is asked how it is although it is on its way out");
        }
        let (well, probe) = match role {
            ProbeRole::Ready => {
                let ready = proc.behaviour.ready_after.is_some_and(|after| proc.born + after <= now);
                (ready, proc.spec.ready.probe.clone())
            }
            ProbeRole::Health => (!proc.is_sick(now, Duration::ZERO), proc.spec.health.clone()),
        };
        let well = well && proc.alive();
        let known_well = std::mem::replace(&mut proc.known_well, well && role == ProbeRole::Health);
        proc.passed |= well && role == ProbeRole::Ready;
        let Some(probe) = probe else { return broken!(self, "{id} is asked for what it has no probe for") };
        let result = if well { ProbeResult::Passed } else { ProbeResult::Failed };
        self.later(probe.interval, Happening::Asked(id.clone(), role, order));
        // As the daemon does: a success after a success is no news.
        if well && role == ProbeRole::Health && known_well {
            return;
        }
        self.hear(Event::Probed { id: id.clone(), role, result });
    }

    fn signal(&mut self, id: InstanceId) {
        self.check_takedown(&id);
        self.check_order(&id);
        let now = self.now;
        let Some(proc) = self.procs.get_mut(&id) else {
            return broken!(self, "{id} is signalled although it is gone");
        };
        if proc.exit_told {
            return broken!(self, "{id} is signalled although its exit is known");
        }
        if proc.put_in {
            return broken!(self, "{id} is signalled in rotation");
        }
        if proc.settles_at.is_some_and(|at| at > now) {
            return broken!(self, "{id} is signalled with hand-overs unanswered");
        }
        // Of a release that is long gone the next supervisor does not know the rules any more.
        let (slot, revision) = (id.slot.0 as usize, proc.revision);
        let known = self.disk.apps.iter().any(|app| {
            let mut releases = app.previous.iter().chain(&app.older).map(|(_, revision)| *revision);
            app.spec.name == id.app
                && slot < app.slots.len()
                && (app.revision == revision || releases.any(|known| known == revision))
        });
        if known && proc.drain_until.is_some_and(|at| at > now) {
            return broken!(self, "{id} is signalled while it drains");
        }
        proc.ladder = true;
        proc.signalled_at = Some(now);
        if let Some(span) = proc.behaviour.obeys_after {
            let reason = ExitReason::Signal(Signal::INT);
            self.later(span, Happening::Exits(id, reason));
        }
    }

    fn kill_tree(&mut self, id: InstanceId) {
        let now = self.now;
        let Some(proc) = self.procs.get_mut(&id) else {
            return broken!(self, "{id} is killed although it is gone");
        };
        let early = proc.signalled_at.is_none_or(|at| now < at + millis(400)) && !proc.signal_lost;
        if early && !self.hurried {
            return broken!(self, "{id} is killed without a signal and its time before");
        }
        if proc.exited.is_none() {
            self.later(millis(2), Happening::Exits(id.clone(), ExitReason::Signal(Signal::KILL)));
        }
        self.later(millis(4), Happening::TreeGoes(id));
    }

    fn spawn(&mut self, id: InstanceId, spec: Arc<AppSpec>, revision: u64, version: u32) {
        self.spawns += 1;
        let saved = self.disk.apps.iter().find(|app| app.spec.name == id.app);
        let wanted = saved.and_then(|app| app.slots.get(id.slot.0 as usize));
        match wanted {
            None => return broken!(self, "{id} is started, which is not on disk"),
            Some(slot) if slot.desired == Desired::Stopped => {
                return broken!(self, "{id} is started, which is stopped");
            }
            // A disk that takes nothing keeps no app down.
            Some(slot) if slot.reserved < id.generation && !self.disk_refuses => {
                return broken!(self, "{id} is started before its generation is reserved");
            }
            Some(_) => {}
        }
        if let Some(fleet) = &self.fleet {
            let believed = fleet.saved();
            let slot = believed
                .apps
                .iter()
                .find(|app| app.spec.name == id.app)
                .and_then(|app| app.slots.get(id.slot.0 as usize));
            if slot.is_none_or(|slot| slot.desired == Desired::Stopped) {
                return broken!(self, "{id} is started although its stop was carried out");
            }
        }
        if self.open.values().any(|(_, command)| ends(command, &id)) {
            return broken!(self, "{id} is started while its stop waits");
        }
        if self.down.contains(&(id.app.clone(), id.slot)) {
            return broken!(self, "{id} is started, which somebody was told is down");
        }
        let wants = |app: &SavedApp| app.spec.name == id.app && app.spec.hooks.pre_start.is_some();
        let hooked = self.fleet.as_ref().is_some_and(|fleet| fleet.saved().apps.iter().any(wants));
        if self.unprepared.contains(&id.app) && hooked {
            return broken!(self, "{id} is started without its pre_start hook");
        }
        self.unprepared.remove(&id.app);
        if !self.spawned.insert(id.clone()) {
            return broken!(self, "{id} runs twice");
        }
        let running = self.procs.iter().any(|(other, proc)| {
            let same = other.app == id.app && other.slot == id.slot;
            // One of a pair that can is enough: what a reload has put side by side may go back in the same way.
            let overlap = spec.can_overlap() || proc.spec.can_overlap();
            same && !proc.tree_gone && (!overlap || (proc.exited.is_some() && !proc.ladder))
        });
        if running {
            return broken!(self, "{id} is started before its predecessor is gone");
        }
        let present = self.files.get(&id.app).filter(|(present, _)| *present == version);
        let released = self.releases.get(&(id.app.clone(), version));
        let behaviour = present.map(|(_, files)| files).or(released).cloned().unwrap_or_default();
        let behaviour = if self.unkind.moody { Behaviour::random(&mut self.rng) } else { behaviour };
        self.procs.insert(
            id.clone(),
            Proc {
                spec,
                born: self.now,
                revision,
                version,
                behaviour,
                pid: None,
                exited: None,
                exit_told: false,
                tree_gone: false,
                said_ready: false,
                keys: BTreeSet::new(),
                told: Vec::new(),
                put_in: false,
                settles_at: None,
                drain_until: None,
                signalled_at: None,
                signal_lost: false,
                believed: false,
                ladder: false,
                asked: None,
                passed: false,
                known_well: false,
            },
        );
        self.check_surge(&id.app);
        self.check_needs(&id);
        let span = millis(self.rng.below(3));
        self.later(span, Happening::Birth(id));
    }

    // What must be true.

    fn replied(&mut self, op: OpId, outcome: Outcome) {
        let Some((asked, command)) = self.open.remove(&op) else {
            return broken!(self, "{op:?} is answered twice, or was never asked");
        };
        if let Outcome::Failed { apps } = &outcome {
            for (app, what) in apps {
                self.check_failure(app, what, apps.len() == 1);
            }
        }
        // Of a request over many apps a part may have been done long ago, and undone since.
        if let Outcome::Done { apps } = &outcome
            && apps.len() == 1
        {
            for (app, what) in apps {
                let AppOutcome::Done { what, .. } = what else { continue };
                self.check_hooks(op, &command, app, what);
                let of_app = |id: &InstanceId| {
                    id.app == *app && selection(&command, app).is_none_or(|slots| slots.contains(&id.slot))
                };
                match *what {
                    "stopped" | "deleted" => {
                        if let Some(kind) =
                            self.hooks.iter().find(|(id, _)| id.app == *app).map(|(_, kind)| *kind)
                            && (*what == "deleted" || kind == HookKind::PostStop)
                        {
                            return broken!(self, "{app} is said to be {what}, but its {kind} runs");
                        }
                        if selection(&command, app).is_none() && is_end(&command) {
                            self.unprepared.insert(app.clone());
                        }
                        let alone = !self.open.values().any(|(_, command)| concerns(command, app));
                        if alone && is_end(&command) {
                            let slots = (0..8).map(Slot);
                            let slots = slots.filter(|slot| {
                                selection(&command, app).is_none_or(|slots| slots.contains(slot))
                            });
                            self.down.extend(slots.map(|slot| (app.clone(), slot)));
                        }
                        if selection(&command, app).is_none() {
                            self.awake.remove(app);
                            self.was_up.remove(app);
                        }
                        if let Some((id, _)) = self.procs.iter().find(|(id, _)| of_app(id)) {
                            let id = id.clone();
                            return broken!(self, "{app} is said to be {what}, but {id} is there");
                        }
                    }
                    "reloaded" | "restarted" if matches!(command, Command::Act { .. }) => {
                        let old = self.procs.iter().find(|(id, proc)| {
                            of_app(id) && proc.born < asked && proc.alive() && !proc.ladder
                        });
                        if let Some((id, _)) = old {
                            let id = id.clone();
                            return broken!(self, "{app} is said to be {what}, but {id} is from before");
                        }
                    }
                    _ => {}
                }
            }
        }
        if self.verbose || self.outcomes.len() < 64 {
            self.outcomes.push((op, outcome));
        }
    }

    /// What is said to serve after a failure does.
    fn check_failure(&mut self, app: &AppName, outcome: &AppOutcome, now: bool) {
        let AppOutcome::Failed { replaced, kept, .. } = outcome else { return };
        if let Some(slot) = kept.iter().find(|slot| replaced.contains(slot)) {
            return broken!(self, "{app}: slot {slot} is said to be both replaced and kept");
        }
        let serves = |slot: &Slot| self.rotation.iter().any(|id| id.app == *app && id.slot == *slot);
        if let Some(slot) = kept.iter().find(|slot| now && !serves(slot)) {
            broken!(self, "{app}: slot {slot} is said to be kept, and does not serve");
        }
    }

    /// Whatever processes and hooks do, there is an end of a stop.
    fn check_patience(&mut self) {
        let now = self.now;
        let late = self.open.iter().find(|(_, (asked, command))| {
            let ends = is_end(command) || matches!(command, Command::Kill | Command::Terminate);
            ends && now.since(self.woken.max(*asked)) > PATIENCE
        });
        if let Some((op, _)) = late {
            broken!(self, "{op:?} has not ended anything for {PATIENCE:?}");
        }
    }

    /// Runs that launch, serve or have not got their signal yet stay within instances + surge.
    fn check_surge(&mut self, app: &AppName) {
        let Some(view) = self.fleet.as_ref().and_then(|fleet| fleet.app(app)) else { return };
        // What the release before was allowed may still be draining.
        let of_app = self.procs.iter().filter(|(id, _)| id.app == *app).map(|(_, proc)| &proc.spec.reload);
        let instances = view.spec.instances;
        let surge = |rules: &ReloadRules| {
            let surge = match rules.strategy {
                Strategy::Rolling => rules.max_surge.of_up(instances),
                Strategy::BlueGreen => instances,
            };
            if rules.max_unavailable.of_down(instances) == 0 { surge.max(1) } else { surge }
        };
        // And the way back goes by the rules of the release that has failed.
        let surge = of_app.chain([&view.spec.reload]).map(surge).max().unwrap_or(0);
        let limit = view.slots.len() + surge as usize;
        let count = self
            .procs
            .iter()
            .filter(|(id, proc)| {
                // What is or was kept in reserve comes on top.
                id.app == *app
                    && proc.exited.is_none()
                    && proc.signalled_at.is_none()
                    && !proc.signal_lost
                    && state_of(&view, id) != Some(RunState::Reserve)
                    && !self.reserved.contains(id)
            })
            .count();
        if count > limit {
            broken!(self, "{app} has {count} runs, {limit} are allowed");
        }
    }

    /// In a reload nothing that serves is taken away unless enough others do, or its successor does.
    fn check_takedown(&mut self, id: &InstanceId) {
        if self.unfit.get(&id.app).is_some_and(|serving| serving.contains(id)) {
            return broken!(self, "{id} is taken down although nothing could be started in its place");
        }
        // A supervisor without its memory cannot know which of them have been serving.
        let believes = self.procs.iter().any(|(other, proc)| other.app == id.app && proc.believed);
        if believes || !self.procs.get(id).is_some_and(Proc::serves) {
            return;
        }
        let Some(view) = self.fleet.as_ref().and_then(|fleet| fleet.app(&id.app)) else { return };
        self.check_health_cap(id, &view);
        self.check_cause(id, &view);
        if view.operation != Some("reload") || !view.spec.can_overlap() {
            return;
        }
        // Of a slot that the release gives up nothing is promised.
        if id.slot.0 >= view.spec.instances {
            return;
        }
        let others: Vec<&InstanceId> = self
            .procs
            .iter()
            .filter(|(other, proc)| {
                other.app == id.app && *other != id && proc.serves() && self.is_online(other)
            })
            .map(|(other, _)| other)
            .collect();
        let saved = self.fleet.as_ref().map(Fleet::saved).unwrap_or_default();
        let meant = saved.apps.iter().filter(|app| app.spec.name == id.app).flat_map(|app| &app.slots);
        let meant = meant.take(promised(&view, &saved) as usize);
        let given_up = |status| matches!(status, Status::Errored | Status::Stopped);
        let rows = view.slots.iter().map(|row| given_up(row.status));
        let meant = meant.zip(rows).filter(|(slot, gone)| slot.desired == Desired::Running && !gone).count();
        let least =
            meant.saturating_sub(view.spec.reload.max_unavailable.of_down(view.spec.instances) as usize);
        if others.len() < least
            && !others.iter().any(|other| other.slot == id.slot)
            && self.served.contains(id)
        {
            let count = others.len();
            broken!(self, "{id} is taken down and only {count} serve, {least} are promised");
        }
    }

    /// What serves is taken down only when something is asked that takes it down.
    fn check_cause(&mut self, id: &InstanceId, view: &AppView) {
        let wanted = self.fleet.as_ref().is_some_and(|fleet| {
            let saved = fleet.saved();
            let app = saved.apps.iter().find(|app| app.spec.name == id.app);
            let slot = app.and_then(|app| app.slots.get(id.slot.0 as usize));
            slot.is_some_and(|slot| slot.desired == Desired::Running)
        });
        let ends =
            self.open.values().any(|(_, command)| matches!(command, Command::Kill | Command::Terminate));
        if wanted
            && !ends
            && self.served.contains(id)
            && matches!(view.operation, None | Some("start" | "scale"))
        {
            let operation = view.operation.unwrap_or("no operation");
            broken!(self, "{id} serves and is taken down although {operation} is going on");
        }
    }

    /// Nobody is ended for being unhealthy when no other instance is known to be well.
    fn check_health_cap(&mut self, id: &InstanceId, view: &AppView) {
        let Some(probe) = &view.spec.health else { return };
        let saved = self.fleet.as_ref().map(Fleet::saved).unwrap_or_default();
        let wanted = saved.apps.iter().find(|app| app.spec.name == id.app);
        let meant: Vec<bool> = wanted.map_or_else(Vec::new, |app| {
            app.slots.iter().map(|slot| slot.desired == Desired::Running).collect()
        });
        let asked = self.open.values().any(|(_, command)| concerns(command, &id.app)) || self.died;
        let running = meant.iter().filter(|running| **running).count();
        if asked
            || !self.is_online_before(id)
            || running < 2
            || !meant.get(id.slot.0 as usize).is_some_and(|running| *running)
        {
            return;
        }
        // What a probe has said may be as old as this.
        let slack = probe.interval * 2 + millis(self.unkind.save_delay) + secs(1);
        let now = self.now;
        let sick = self.procs.get(id).is_some_and(|proc| proc.is_sick(now, Duration::ZERO));
        let others = self.procs.iter().any(|(other, proc)| {
            other.app == id.app && other != id && proc.serves() && !proc.is_sick(now, slack)
        });
        if sick && !others {
            broken!(self, "{id} is ended for being unhealthy, and no other is well");
        }
    }

    fn is_online(&self, id: &InstanceId) -> bool {
        let Some(view) = self.fleet.as_ref().and_then(|fleet| fleet.app(&id.app)) else { return false };
        view.slots
            .iter()
            .flat_map(|slot| slot.current.iter().chain(&slot.draining))
            .any(|run| run.id == *id && run.state == RunState::Online)
    }

    /// It had been put into rotation: what is still launching is no loss.
    fn is_online_before(&self, id: &InstanceId) -> bool {
        let Some(view) = self.fleet.as_ref().and_then(|fleet| fleet.app(&id.app)) else { return false };
        view.slots
            .iter()
            .flat_map(|slot| slot.current.iter().chain(&slot.draining))
            .any(|run| run.id == *id && run.ready_at.is_some())
    }

    /// Processes are rows, and rows are processes.
    fn check_rows(&mut self) {
        if self.broken.is_some() || self.quit {
            return;
        }
        let Some(fleet) = &self.fleet else { return };
        let mut rows: BTreeMap<InstanceId, Status> = BTreeMap::new();
        let mut lies = None;
        let views = fleet.view();
        for view in &views {
            for slot in &view.slots {
                for run in slot.current.iter().chain(&slot.draining) {
                    rows.insert(run.id.clone(), run.status);
                    let Some(proc) = self.procs.get(&run.id) else {
                        if !run.queued {
                            lies = Some(format!("{} has a row and no process", run.id));
                        }
                        continue;
                    };
                    if proc.put_in && run.state != RunState::Online {
                        lies = Some(format!("{} gets connections, but it is {}", run.id, run.state.as_str()));
                    }
                    if run.state == RunState::Online {
                        if proc.exited.is_none() && !proc.may_serve() {
                            lies = Some(format!("{} is online, but never said so", run.id));
                        }
                        if proc.spec.is_node_cluster()
                            && !proc.put_in
                            && !proc.exit_told
                            && proc.exited.is_none()
                        {
                            lies = Some(format!("{} is online, but gets no connections", run.id));
                        }
                    }
                }
            }
        }
        if let Some(hidden) = self.procs.keys().find(|id| !rows.contains_key(*id)) {
            lies = Some(format!("{hidden} has a process and no row"));
        }
        if let Some(lie) = lies {
            self.break_promise(lie);
        }
        self.check_floor(&views);
    }

    /// However a reload goes about it: as long as nothing dies by itself, the number of those in rotation does not fall
    /// below `instances - max_unavailable`.
    fn check_floor(&mut self, views: &[AppView]) {
        let Some(fleet) = &self.fleet else { return };
        if views.iter().all(|view| view.operation != Some("reload")) {
            self.in_rotation.clear();
            return;
        }
        let saved = fleet.saved();
        let before = std::mem::take(&mut self.in_rotation);
        let mut fallen = None;
        for view in views {
            let name = &view.spec.name;
            let mine = || self.procs.iter().filter(|(id, _)| id.app == *name);
            if view.operation != Some("reload")
                || !mine().all(|(_, proc)| proc.spec.can_overlap() && !proc.believed)
                || !view.spec.can_overlap()
            {
                continue;
            }
            // Nothing is promised of slots that the release gives up.
            let stay = view.slots.iter().filter(|slot| slot.slot.0 < view.spec.instances);
            let runs = stay.flat_map(|slot| slot.current.iter().chain(&slot.draining));
            let now = runs.filter(|run| run.state == RunState::Online).count();
            // A crash takes one away, and so does an app that ends for good or a slot that is given up.
            let died = mine().any(|(_, proc)| proc.exited.is_some() && !proc.ladder);
            let wanted = saved.apps.iter().find(|app| app.spec.name == *name);
            let stopped = wanted.is_none_or(|app| {
                app.slots.len() != app.spec.instances as usize
                    || app.slots.iter().any(|slot| slot.desired == Desired::Stopped)
            });
            // What was given up would hold up every reload for ever.
            let given_up = |row: &&SlotView| matches!(row.status, Status::Errored | Status::Stopped);
            let given_up = u32::try_from(view.slots.iter().filter(given_up).count()).unwrap();
            let missing = view.spec.reload.max_unavailable.of_down(view.spec.instances) + given_up;
            let least = promised(view, &saved).saturating_sub(missing);
            if let Some((before, of)) = before.get(name)
                && now < *before
                && *of == view.spec.instances
                && now < least as usize
                && !died
                && !stopped
            {
                fallen = Some(format!("{name}: {before} were in rotation, now {now}; {least} are promised"));
            }
            self.in_rotation.insert(name.clone(), (now, view.spec.instances));
        }
        if let Some(fallen) = fallen {
            self.break_promise(fallen);
        }
    }

    /// After a long calm: everything is as wanted, everybody has been answered.
    pub(crate) fn check_converged(&mut self) {
        if self.broken.is_some() || self.quit {
            return;
        }
        if let Some((op, (_, command))) = self.open.iter().next() {
            let pictures: Vec<_> = ["api", "web", "job"].iter().map(|app| self.picture(app)).collect();
            let verb = format!("{command:?}").chars().take(160).collect::<String>();
            return broken!(self, "{op:?} was never answered: {verb}\n{pictures:#?}");
        }
        let Some(fleet) = &self.fleet else { return broken!(self, "no supervisor came back") };
        let saved = fleet.saved();
        let views = fleet.view();
        if saved != self.disk {
            return broken!(self, "memory and disk differ:\n{saved:?}\n{:?}", self.disk);
        }
        if views.len() != saved.apps.len() {
            return broken!(self, "{} apps are shown, {} are wanted", views.len(), saved.apps.len());
        }
        for (view, app) in views.iter().zip(&saved.apps) {
            let name = &app.spec.name;
            if view.operation.is_some() || app.operation.is_some() {
                return broken!(self, "{name}: an operation never ended: {view:?}");
            }
            if view.slots.len() != app.slots.len() || app.slots.len() != app.spec.instances as usize {
                return broken!(self, "{name} has {} slots instead of {}", view.slots.len(), app.slots.len());
            }
            for (row, wanted) in view.slots.iter().zip(&app.slots) {
                let is_up = |needed: &AppName| {
                    views.iter().any(|view| {
                        view.spec.name == *needed
                            && view.slots.iter().all(|slot| slot.status == Status::Online)
                    })
                };
                let fine = match (wanted.desired, row.status) {
                    (Desired::Running, Status::Launching) if !row.waiting_for.is_empty() => {
                        row.current.is_none() && !row.waiting_for.iter().any(is_up)
                    }
                    (Desired::Running, Status::Online) => row.current.is_some() && row.draining.is_empty(),
                    (Desired::Running, Status::Errored) | (Desired::Stopped, Status::Stopped) => {
                        row.current.is_none() && row.draining.is_empty()
                    }
                    _ => false,
                };
                if !fine {
                    return broken!(self, "{name}: not as wanted ({:?}): {row:?}", wanted.desired);
                }
                let runs = row.current.as_ref().and_then(|run| self.procs.get(&run.id));
                if let Some(proc) = runs.filter(|proc| proc.revision != wanted.revision) {
                    let (slot, runs, wanted) = (row.slot, proc.revision, wanted.revision);
                    return broken!(self, "{name}: slot {slot} runs release {runs} instead of {wanted}");
                }
                // How it says that it is ready was settled when it was spawned.
                let same = |proc: &Proc| {
                    let (ready, instances) = (app.spec.ready.clone(), app.spec.instances);
                    AppSpec { ready, instances, ..AppSpec::clone(&proc.spec) } == *app.spec
                };
                if runs.is_some_and(|proc| proc.revision == app.revision && !same(proc)) {
                    let slot = row.slot;
                    return broken!(self, "{name}: slot {slot} does not follow the rules of its release");
                }
            }
        }
    }

    fn note(&mut self, text: &str) {
        if self.verbose {
            self.log.push(format!("{:>9.3} {text}", self.now.nanos() as f64 / 1e9 - 1.0));
        }
    }

    pub(crate) fn break_promise(&mut self, why: String) {
        if self.broken.is_none() {
            self.broken = Some(Broken(why));
        }
    }
}

fn state_of(view: &AppView, id: &InstanceId) -> Option<RunState> {
    let mut runs = view.slots.iter().flat_map(|slot| slot.current.iter().chain(&slot.draining));
    runs.find(|run| run.id == *id).map(|run| run.state)
}

/// How many instances the promise is about: no more than the release has that a failed one goes back to.
fn promised(view: &AppView, saved: &SavedFleet) -> u32 {
    let app = saved.apps.iter().find(|app| app.spec.name == view.spec.name);
    let before = app.and_then(|app| app.previous.as_ref()).map(|(spec, _)| spec.instances);
    view.spec.instances.min(before.unwrap_or(u32::MAX))
}

/// What tells the files of one version from those of another.
fn started_from(version: u32) -> StartedFrom {
    let path = PathBuf::from("/srv/app.js");
    let script = StartedFile { path, device: 1, inode: 1, size: u64::from(version), modified: 0 };
    StartedFrom { cwd: PathBuf::from("/srv"), script: Some(script) }
}

fn version_of(from: &StartedFrom) -> u32 {
    from.script.as_ref().map_or(0, |script| u32::try_from(script.size).unwrap())
}

fn selection<'a>(command: &'a Command, app: &AppName) -> Option<&'a Vec<Slot>> {
    match command {
        Command::Act { selection, .. } => {
            selection.iter().find(|one| one.app == *app).and_then(|one| one.slots.as_ref())
        }
        _ => None,
    }
}

/// Whether a command may do something to an app.
fn concerns(command: &Command, app: &AppName) -> bool {
    match command {
        Command::Start { specs } | Command::Apply { specs, prune: false, .. } => {
            specs.iter().any(|spec| spec.name == *app)
        }
        Command::Apply { .. } => true,
        Command::Act { selection, .. } | Command::Reset { selection } => {
            selection.iter().any(|one| one.app == *app)
        }
        Command::Scale { app: other, .. } => other == app,
        Command::Resurrect { saved } => saved.apps.iter().any(|saved| saved.spec.name == *app),
        Command::Kill | Command::KillUnlisted { .. } | Command::Terminate => true,
    }
}

/// Whether a command ends what it is about, and nothing else.
fn is_end(command: &Command) -> bool {
    matches!(command, Command::Act { verb: Verb::Stop | Verb::Delete, .. } | Command::Reset { .. })
}

/// Whether an unanswered command wants this run's slot to be down. Of a command over many apps a part may have been
/// done long ago.
fn ends(command: &Command, id: &InstanceId) -> bool {
    match command {
        Command::Act { selection, .. } if selection.len() > 1 => false,
        Command::Act { verb: Verb::Stop, selection, .. } => selection
            .iter()
            .any(|one| one.app == id.app && one.slots.as_ref().is_none_or(|slots| slots.contains(&id.slot))),
        Command::Act { verb: Verb::Delete, selection, .. } => {
            selection.iter().any(|one| one.app == id.app && one.slots.is_none())
        }
        _ => false,
    }
}
