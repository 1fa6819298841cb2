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
use pm::policy::memory::SAMPLES;
use pm::policy::news::{News, What};
use pm::policy::vocabulary::{
    Action, AppOutcome, Command, Event, Health, HookEnd, Outcome, ProbeResult, ProbeRole, Retry, Rollback,
    RunState, RunView, SaveId, Selected, SlotView, Step, StepKind, Verb,
};

use crate::behaviour::{Behaviour, millis, secs};
use crate::random::APPS;
use crate::rng::Rng;
use crate::sabotage::{Bug, Sabotage};
use crate::specs::{LIMIT, Like, name, spec};

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

mod actions;
mod happenings;
mod picture;
mod promises;
mod replies;
mod supervisor;

use self::replies::{concerns, ends, is_end};

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
    /// Its limit, and the number of the order to measure it.
    pub(crate) weighed: Option<(u64, u64)>,
    /// Samples of its memory in a row above the limit; `None`: there was none yet.
    heavy: Option<u32>,
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

    /// Whether it uses more memory than it may.
    fn is_fat(&self, now: Moment) -> bool {
        self.spec.max_memory.is_some()
            && self.behaviour.fat_after.is_some_and(|after| self.born + after <= now)
    }

    fn serves(&self) -> bool {
        self.may_serve() && !self.ladder
    }
}

/// A reload that is going on.
#[derive(Clone, Debug)]
struct Reloading {
    /// Somebody asked for it, or may have.
    asked: bool,
    /// It has begun to act.
    acts: bool,
    /// The slots that it has taken down.
    taken: BTreeSet<Slot>,
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
    /// Its memory is measured.
    Weighed(InstanceId, u64),
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
    /// The last save of this supervisor failed.
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
    /// What has to do with memory happens by these chances.
    pub(crate) appetite: Rng,
    /// Apps that have a limit in what is random.
    pub(crate) limited: BTreeSet<AppName>,
    /// How often memory is measured.
    pub(crate) weighed_every: Duration,
    /// Reloads that are going on.
    own: BTreeMap<AppName, Reloading>,
    /// How many there were.
    pub(crate) own_reloads: u32,
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
            unprepared: APPS.iter().map(|app| name(app)).collect(),
            hook_like: None,
            hooks_run: Vec::new(),
            last_op: None,
            hurried: false,
            appetite: Rng::new(seed),
            limited: BTreeSet::new(),
            weighed_every: secs(1),
            own: BTreeMap::new(),
            own_reloads: 0,
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

    /// The live instance of a slot uses too much memory from now on.
    pub(crate) fn fatten(&mut self, app: &str, slot: u32) {
        let now = self.now;
        self.each_in_slot(app, slot, |proc| proc.behaviour.fat_after = Some(now.since(proc.born)));
    }

    /// It does neither any more.
    pub(crate) fn cure(&mut self, app: &str, slot: u32) {
        self.each_in_slot(app, slot, |proc| {
            (proc.behaviour.sick_after, proc.behaviour.fat_after) = (None, None);
        });
    }

    fn each_in_slot(&mut self, app: &str, slot: u32, change: impl Fn(&mut Proc)) {
        let of_slot = |id: &InstanceId| id.app == name(app) && id.slot == Slot(slot);
        self.procs
            .iter_mut()
            .filter(|(id, proc)| of_slot(id) && proc.alive())
            .for_each(|(_, proc)| change(proc));
    }

    /// Nobody waits for what is on its way down any more.
    pub(crate) fn hurry(&mut self) {
        self.hurried = true;
        self.turn(Event::Hurried);
    }

    /// This run ends like this.
    pub(crate) fn crash_run(&mut self, id: &InstanceId, reason: &ExitReason) {
        self.happen(Happening::Exits(id.clone(), reason.clone()));
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

    // The clock.

    fn later(&mut self, span: Duration, happening: Happening) {
        self.seq += 1;
        self.agenda.insert((self.now + span, self.seq), happening);
    }

    // Processes.

    // The supervisor.

    // What must be true.

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
