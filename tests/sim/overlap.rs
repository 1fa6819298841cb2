//! Operations that meet: every second one at every instant of every first one.
//!
//! A first operation is begun, and its story is told again and again, each time up to its next event; there the second
//! thing happens: a command, a death, a sleep. Then the world becomes calm, and what is left must be what the answers
//! say. No answer is written down here twice: what a request was told decides what must be true afterwards. The
//! invariants of `world` (rows are processes, nobody serving is taken away, one answer each) hold in every turn.

use std::sync::Arc;

use pm::model::exit::ExitReason;
use pm::model::id::{InstanceId, OpId};
use pm::model::signal::Signal;
use pm::model::spec::AppSpec;
use pm::model::status::Status;
use pm::policy::vocabulary::{AppOutcome, Command, Outcome, Refusal, Selected, Verb};

use crate::behaviour::{Behaviour, millis, secs};
use crate::sabotage::{Bug, Sabotage};
use crate::specs::{Like, name, spec};
use crate::world::{Broken, World};

const APP: &str = "api";
const SLOTS: u32 = 2;

/// What goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum First {
    Reload,
    /// Of a release that never gets ready.
    BadReload,
    /// Of a release that crashes at boot.
    CrashingReload,
    Restart,
    Start,
    Stop,
    ScaleUp,
    ScaleDown,
}

const FIRSTS: [First; 8] = [
    First::Reload,
    First::BadReload,
    First::CrashingReload,
    First::Restart,
    First::Start,
    First::Stop,
    First::ScaleUp,
    First::ScaleDown,
];

/// What comes in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Second {
    Reload,
    ReloadOther,
    Restart,
    StartFile,
    StartOther,
    StartName,
    Stop,
    Delete,
    Scale,
    Kill,
    Terminate,
    SupervisorDies,
    /// The process of a slot that has been there longest is killed.
    OldestDies,
    /// The one that came last.
    NewestDies,
    Sleep,
}

const SECONDS: [Second; 15] = [
    Second::Reload,
    Second::ReloadOther,
    Second::Restart,
    Second::StartFile,
    Second::StartOther,
    Second::StartName,
    Second::Stop,
    Second::Delete,
    Second::Scale,
    Second::Kill,
    Second::Terminate,
    Second::SupervisorDies,
    Second::OldestDies,
    Second::NewestDies,
    Second::Sleep,
];

/// Where a story broke off, for the message of a failed test.
struct Story {
    world: World,
    first: OpId,
    second: Option<OpId>,
    /// The first one had been answered before the second thing happened.
    over: bool,
    /// The oldest process is from before the first operation.
    killed_old: bool,
}

fn other_release(like: Like) -> AppSpec {
    let mut other = spec(APP, like, SLOTS);
    other.env.vars.insert(String::from("RELEASE"), String::from("other"));
    other
}

fn on_app(verb: Verb, specs: Vec<Arc<AppSpec>>) -> Command {
    Command::Act { verb, selection: vec![Selected { app: name(APP), slots: None }], specs }
}

fn begin(world: &mut World, first: First) -> OpId {
    if first == First::Start {
        world.act(Verb::Stop, APP);
        world.run_for(secs(1));
    }
    match first {
        First::BadReload => world.deploy(APP, Behaviour::never_ready()),
        First::CrashingReload => world.deploy(APP, Behaviour::crashes_after(millis(20))),
        _ => world.deploy(APP, Behaviour::default()),
    }
    world.ask(match first {
        First::Reload | First::BadReload | First::CrashingReload => on_app(Verb::Reload, Vec::new()),
        First::Restart => on_app(Verb::Restart, Vec::new()),
        First::Start => on_app(Verb::Start, Vec::new()),
        First::Stop => on_app(Verb::Stop, Vec::new()),
        First::ScaleUp => Command::Scale { app: name(APP), instances: SLOTS + 1 },
        First::ScaleDown => Command::Scale { app: name(APP), instances: 1 },
    })
}

fn happen(world: &mut World, second: Second, like: Like) -> Option<OpId> {
    let command = match second {
        Second::Reload => on_app(Verb::Reload, Vec::new()),
        Second::ReloadOther => on_app(Verb::Reload, vec![Arc::new(other_release(like))]),
        Second::Restart => on_app(Verb::Restart, Vec::new()),
        Second::StartFile => Command::Start { specs: vec![Arc::new(spec(APP, like, SLOTS))] },
        Second::StartOther => Command::Start { specs: vec![Arc::new(other_release(like))] },
        Second::StartName => on_app(Verb::Start, Vec::new()),
        Second::Stop => on_app(Verb::Stop, Vec::new()),
        Second::Delete => on_app(Verb::Delete, Vec::new()),
        Second::Scale => Command::Scale { app: name(APP), instances: SLOTS + 2 },
        Second::Kill => Command::Kill,
        Second::Terminate => Command::Terminate,
        Second::SupervisorDies => {
            world.supervisor_dies();
            return None;
        }
        Second::OldestDies => {
            kill_one(world, |ids| ids.into_iter().next());
            return None;
        }
        Second::NewestDies => {
            kill_one(world, |ids| ids.into_iter().last());
            return None;
        }
        Second::Sleep => {
            world.sleep_for(secs(3600));
            return None;
        }
    };
    if second == Second::Reload {
        world.deploy(APP, Behaviour::default());
    }
    Some(world.ask(command))
}

/// SIGKILL to one of the processes, which are given in the order of their birth.
fn kill_one(world: &mut World, which: impl FnOnce(Vec<InstanceId>) -> Option<InstanceId>) {
    let mut alive: Vec<_> = world.procs.iter().filter(|(_, proc)| proc.alive()).collect();
    alive.sort_by_key(|(_, proc)| (proc.born, proc.pid));
    if let Some(id) = which(alive.into_iter().map(|(id, _)| id.clone()).collect()) {
        world.crash_run(&id, &ExitReason::Signal(Signal::KILL));
    }
}

/// How a story begins.
#[derive(Clone, Copy, Debug)]
struct Beginning {
    first: First,
    like: Like,
    /// How many events the first operation has had.
    after: u32,
    remembers: bool,
    verbose: bool,
    /// For controls.
    bug: Bug,
}

impl Beginning {
    const fn of(first: First, like: Like, after: u32) -> Self {
        Self { first, like, after, remembers: false, verbose: false, bug: Bug::None }
    }

    /// A world in which the app is online, and the first operation has had its events; `None` when it was over before.
    fn world(self) -> Option<(World, OpId)> {
        let mut world = World::new(7);
        (world.verbose, world.remembers) = (self.verbose, self.remembers);
        world.sabotage = Sabotage::new(self.bug);
        world.unkind.save_delay = 2;
        let mut one = spec(APP, self.like, SLOTS);
        one.restart.min_uptime = millis(300);
        world.start(one);
        world.run_for(secs(2));
        let op = begin(&mut world, self.first);
        let end = world.now + secs(30);
        for _ in 0..self.after {
            if world.answer(op).is_some() || !world.next(end) {
                return None;
            }
        }
        Some((world, op))
    }
}

/// Long enough for everything to end; then whatever had to be started again from bad files finds good ones.
fn calm(world: &mut World) {
    world.run_for(secs(15));
    world.deploy(APP, Behaviour::default());
    world.run_for(secs(60));
    world.check_converged();
}

/// The story of a first operation with the second thing after so many events; `None` when the first one was over
/// before.
fn tell(beginning: Beginning, second: Second) -> Option<Story> {
    // The memory of a supervisor that may die has to be kept.
    let remembers = second == Second::SupervisorDies;
    let (mut world, first_op) = Beginning { remembers, ..beginning }.world()?;
    let over = world.answer(first_op).is_some();
    let killed_old = world.procs.values().any(|proc| proc.alive() && proc.version == 1);
    let second_op = happen(&mut world, second, beginning.like);
    // stop and delete end a reload at once, and not when its next instance is ready.
    if let Some(op) = second_op
        && matches!(second, Second::Stop | Second::Delete | Second::Kill | Second::Terminate)
    {
        world.run_for(millis(20));
        let serving = world.fleet.as_ref().and_then(|fleet| fleet.app(&name(APP))).is_some_and(|view| {
            let runs = view.slots.iter().flat_map(|slot| slot.current.iter().chain(&slot.draining));
            runs.filter(|run| !run.queued).any(|run| matches!(run.status, Status::Online | Status::Launching))
        });
        if serving && world.answer(op).is_none() {
            world.break_promise(format!("{second:?} has not begun to end everything after 20 ms"));
        }
    }
    calm(&mut world);
    Some(Story { world, first: first_op, second: second_op, over, killed_old })
}

/// What became of a request, in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Word {
    Done(&'static str),
    Already(&'static str),
    Failed,
    Superseded(&'static str),
    Busy,
    Gone,
    Ending,
    Other,
}

fn word(world: &World, op: OpId) -> Word {
    match world.answer(op) {
        None => Word::Other,
        Some(Outcome::Refused(Refusal::Busy { .. })) => Word::Busy,
        Some(Outcome::Refused(Refusal::NoSuchApp(_))) => Word::Gone,
        Some(Outcome::Refused(Refusal::Ending)) => Word::Ending,
        Some(Outcome::Refused(Refusal::Invalid(_))) => Word::Other,
        Some(Outcome::Done { apps } | Outcome::Failed { apps }) => match apps.first() {
            Some((_, AppOutcome::Done { what, .. })) => Word::Done(what),
            Some((_, AppOutcome::Already { what })) => Word::Already(what),
            Some((_, AppOutcome::Failed { .. })) => Word::Failed,
            Some((_, AppOutcome::Superseded { by })) => Word::Superseded(by),
            _ => Word::Other,
        },
    }
}

/// What is wrong with the end of a story.
fn verdict(first: First, second: Second, story: &Story) -> Option<String> {
    let world = &story.world;
    if let Some(Broken(why)) = &world.broken {
        return Some(why.clone());
    }
    let ends_daemon = matches!(second, Second::Kill | Second::Terminate);
    if ends_daemon {
        if !world.quit || !world.pids(APP).is_empty() {
            return Some(String::from("the daemon did not end, or left something behind"));
        }
        let kept = world.disk.apps.len();
        return match (second, kept) {
            (Second::Kill, 0) | (Second::Terminate, 1) => None,
            _ => Some(format!("{kept} apps are wanted after {second:?}")),
        };
    }
    let first_word = word(world, story.first);
    let second_word = story.second.map(|op| word(world, op));
    let view = world.fleet.as_ref().and_then(|fleet| fleet.app(&name(APP)));
    let rows: Vec<Status> = view.iter().flat_map(|view| &view.slots).map(|slot| slot.status).collect();
    let all =
        |status: Status, count: u32| rows.len() == count as usize && rows.iter().all(|row| *row == status);
    // Only what ends an app supersedes what goes on.
    if matches!(first_word, Word::Superseded(_)) && !matches!(second, Second::Stop | Second::Delete) {
        return Some(format!("the first one was superseded by {second:?}"));
    }
    // What the first one leaves when nothing comes in between.
    let alone = |rows_of: u32| match first {
        First::Stop => all(Status::Stopped, rows_of),
        _ => all(Status::Online, rows_of),
    };
    let slots = match (first, first_word) {
        // An instance that crashes at boot is tried again, whatever the command said.
        (First::ScaleUp, Word::Done(_) | Word::Failed) => SLOTS + 1,
        (First::ScaleDown, Word::Done(_)) => 1,
        _ => SLOTS,
    };
    let fine = match (second, second_word) {
        (Second::Stop, Some(Word::Done("stopped") | Word::Already("stopped"))) => {
            !rows.is_empty() && rows.iter().all(|row| *row == Status::Stopped)
        }
        (Second::Delete, Some(Word::Done("deleted"))) => rows.is_empty(),
        // Never refused: whoever wants it down gets it down.
        (Second::Stop | Second::Delete, _) => false,
        // Another reload waits for the first one, whatever becomes of that; of what is down by then it is a start.
        (Second::Reload, Some(Word::Done("reloaded" | "started"))) => {
            !rows.is_empty() && rows.iter().all(|row| *row == Status::Online)
        }
        (Second::Reload, _) => false,
        (Second::ReloadOther | Second::StartOther, Some(Word::Done(_))) => {
            all(Status::Online, SLOTS) && view.is_some_and(|view| view.spec.env.vars.contains_key("RELEASE"))
        }
        (Second::Restart | Second::StartName, Some(Word::Done(_) | Word::Already(_)))
        | (Second::StartFile, Some(Word::Done(_) | Word::Already(_))) => {
            !rows.is_empty() && rows.iter().all(|row| *row == Status::Online)
        }
        (Second::Scale, Some(Word::Done("scaled"))) => {
            rows.len() == SLOTS as usize + 2 && (first == First::Stop || all(Status::Online, SLOTS + 2))
        }
        // The files are bad, and what they are started from fails; the old spec is the one that counts then.
        (
            Second::ReloadOther
            | Second::StartOther
            | Second::Restart
            | Second::StartFile
            | Second::StartName
            | Second::Scale,
            Some(Word::Failed),
        ) => {
            let scaled = if second == Second::Scale { SLOTS + 2 } else { SLOTS };
            matches!(first, First::BadReload | First::CrashingReload) && all(Status::Online, scaled)
        }
        // Refused, and only while something goes on; then it has changed nothing.
        (
            Second::ReloadOther
            | Second::StartOther
            | Second::Restart
            | Second::StartFile
            | Second::StartName
            | Second::Scale,
            Some(Word::Busy),
        ) => !story.over && alone(slots),
        (Second::OldestDies | Second::NewestDies | Second::Sleep, None) => alone(slots),
        // Nobody was told anything, so either is fine: finished or taken back.
        (Second::SupervisorDies, None) => match first {
            First::ScaleUp | First::ScaleDown | First::Stop | First::Start => {
                !rows.is_empty() && rows.windows(2).all(|two| two[0] == two[1])
            }
            _ => all(Status::Online, SLOTS),
        },
        _ => false,
    };
    if !fine {
        return Some(format!("{first_word:?}, then {second_word:?}: {}", world.picture(APP)));
    }
    // A death of what the release replaces is no reason to give the release up.
    if first == First::Reload
        && (second == Second::Sleep || second == Second::OldestDies && story.killed_old)
        && first_word != Word::Done("reloaded")
    {
        return Some(format!("the reload ended as {first_word:?}"));
    }
    None
}

/// Tells every story of these, and demands that there were many.
fn sweep(firsts: &[First], seconds: &[Second], likes: &[Like]) {
    let mut stories = 0;
    for &like in likes {
        for &first in firsts {
            for &second in seconds {
                // Stories differ in what happens first; after their end nothing new would.
                for after in 0..400 {
                    let beginning = Beginning::of(first, like, after);
                    let Some(story) = tell(beginning, second) else { break };
                    stories += 1;
                    if let Some(why) = verdict(first, second, &story) {
                        let log = tell(Beginning { verbose: true, ..beginning }, second)
                            .map(|story| story.world.log.join("\n"))
                            .unwrap_or_default();
                        panic!("{log}\n{like:?}: {second:?} after {after} events of {first:?}: {why}");
                    }
                }
            }
        }
    }
    assert!(stories > firsts.len() * seconds.len() * likes.len() * 4, "only {stories} stories");
}

#[test]
fn any_command_at_any_instant_of_any_operation_workers() {
    sweep(&FIRSTS, &SECONDS, &[Like::PoliteWorkers]);
}

#[test]
fn any_command_at_any_instant_of_any_operation_inherited_listener() {
    sweep(&FIRSTS, &SECONDS, &[Like::Inheriting]);
}

#[test]
fn any_command_at_any_instant_of_any_operation_in_place() {
    sweep(&FIRSTS, &SECONDS, &[Like::Plain, Like::NodeFork]);
}

/// A sweep that finds no planted bug would watch nothing.
#[test]
fn control_the_sweep_finds_planted_bugs() {
    let like = Like::PoliteWorkers;
    for bug in
        [Bug::DropTakeOut, Bug::SaveLater, Bug::RestartStopped, Bug::OldFirst, Bug::StopLies, Bug::LoseExits]
    {
        let breaks = |first, second, after| {
            let story = tell(Beginning { bug, ..Beginning::of(first, like, after) }, second);
            story.is_some_and(|story| verdict(first, second, &story).is_some())
        };
        let found = FIRSTS
            .iter()
            .any(|first| SECONDS.iter().any(|second| (0..40).any(|after| breaks(*first, *second, after))));
        assert!(found, "{bug:?} is not found");
    }
}

#[test]
fn any_two_commands_at_any_instants_of_a_reload() {
    let mut stories = 0;
    for first in [First::Reload, First::BadReload] {
        for (one, other) in SECONDS.iter().flat_map(|one| SECONDS.iter().map(move |other| (*one, *other))) {
            for after in 0..400 {
                // Not every distance at every instant: all of them at some.
                let between = after * 7 % 9;
                let like = Like::PoliteWorkers;
                let tell = |verbose| {
                    let beginning = Beginning::of(first, like, after);
                    let (mut world, _) = Beginning { remembers: true, verbose, ..beginning }.world()?;
                    happen(&mut world, one, like);
                    let end = world.now + secs(1);
                    for _ in 0..between {
                        world.next(end);
                    }
                    happen(&mut world, other, like);
                    calm(&mut world);
                    Some(world)
                };
                let Some(world) = tell(false) else { break };
                stories += 1;
                if let Some(Broken(why)) = world.broken {
                    let log = tell(true).map(|world| world.log.join("\n")).unwrap_or_default();
                    panic!(
                        "{log}\n{one:?} after {after} events of {first:?}, {other:?} {between} later: {why}"
                    );
                }
            }
        }
    }
    assert!(stories > 5_000, "only {stories} stories");
}

#[test]
fn reloads_asked_for_at_any_instant_of_a_reload_share_one_that_follows() {
    for like in [Like::PoliteWorkers, Like::Inheriting, Like::Plain] {
        let mut stories = 0;
        for after in 0..400 {
            let beginning = Beginning { verbose: true, ..Beginning::of(First::Reload, like, after) };
            let Some((mut world, first)) = beginning.world() else {
                break;
            };
            if world.answer(first).is_some() {
                break;
            }
            world.deploy(APP, Behaviour::default());
            let newest = world.files[&name(APP)].0;
            let others: Vec<OpId> = (0..3).map(|_| world.ask(on_app(Verb::Reload, Vec::new()))).collect();
            world.run_for(secs(30));
            world.check_converged();
            world.expect_no_breach();
            // The running one may have started instances from older files: nobody joins it.
            assert_eq!(world.spawns, 3 * SLOTS, "started, reloaded twice\n{}", world.log.join("\n"));
            assert!(world.procs.values().all(|proc| proc.version == newest));
            for op in [&[first][..], &others].concat() {
                assert_eq!(word(&world, op), Word::Done("reloaded"), "after {after} events");
            }
            stories += 1;
        }
        assert!(stories > 8, "only {stories} instants");
    }
}

#[test]
fn a_reload_of_one_app_takes_as_long_as_alone_whatever_goes_on_with_another() {
    let alone = {
        let mut world = World::new(3);
        world.start(spec(APP, Like::PoliteWorkers, SLOTS));
        world.run_for(secs(2));
        time_of_a_reload(&mut world)
    };
    let beside = {
        let mut world = World::new(3);
        for app in [APP, "web", "job"] {
            world.start(spec(app, Like::PoliteWorkers, SLOTS));
        }
        world.run_for(secs(2));
        world.deploy("web", Behaviour::never_ready());
        world.act(Verb::Reload, "web");
        world.deploy("job", Behaviour::ignores_signals());
        world.act(Verb::Restart, "job");
        world.run_for(millis(10));
        time_of_a_reload(&mut world)
    };
    // Launch places are shared, and nothing else: the other two have one or two of the four.
    assert!(beside <= alone + millis(20), "{beside:?}, alone {alone:?}");
}

fn time_of_a_reload(world: &mut World) -> std::time::Duration {
    let from = world.now;
    let op = world.ask(on_app(Verb::Reload, Vec::new()));
    let end = world.now + secs(30);
    while world.answer(op).is_none() && world.next(end) {}
    world.expect_no_breach();
    assert_eq!(word(world, op), Word::Done("reloaded"));
    world.now.since(from)
}

#[test]
fn a_start_of_the_file_while_a_reload_begins_anew_after_a_reboot_waits_for_it() {
    let mut world = World::with_app(APP, Like::PoliteWorkers, SLOTS);
    world.deploy(APP, Behaviour { ready_after: Some(secs(2)), ..Behaviour::default() });
    world.act(Verb::Reload, APP);
    world.run_for(secs(1));
    // Beside it everything serves: nothing to wait for.
    world.start(spec(APP, Like::PoliteWorkers, SLOTS));
    world.run_for(millis(10));
    assert!(world.last().starts_with("already running"), "{}", world.last());
    world.reboot();
    world.run_for(millis(1100));
    world.start(spec(APP, Like::PoliteWorkers, SLOTS));
    world.run_for(millis(100));
    assert_eq!(world.last(), "no reply", "{}", world.picture(APP));
    world.run_for(secs(10));
    world.check(APP, "0: online v2 | 1: online v2 | reloaded");
}

/// The page that people read, tried out cell by cell.
#[test]
fn the_page_about_commands_that_meet_says_what_happens() {
    const PAGE: &str = include_str!("../../docs/overlapping.md");
    const RUNNING: [&str; 6] = ["start", "restart", "reload", "scale", "stop", "delete"];
    let mut cells = 0;
    for line in PAGE.lines().filter(|line| line.starts_with("| `")) {
        let mut columns = line.trim_matches('|').split('|').map(str::trim);
        let asked = columns.next().unwrap();
        for (running, said) in RUNNING.into_iter().zip(columns) {
            assert_eq!(met(running, asked), said, "{asked} during {running}");
            cells += 1;
        }
    }
    assert_eq!(cells, 10 * RUNNING.len());
}

/// What becomes of the second command, in the words of the page.
fn met(running: &str, asked: &str) -> &'static str {
    let like = Like::PoliteWorkers;
    let slow = Behaviour { ready_after: Some(secs(2)), obeys_after: Some(secs(2)), ..Behaviour::default() };
    let mut world = World::new(5);
    world.files.insert(name(APP), (1, slow));
    let scale = |instances| Command::Scale { app: name(APP), instances };
    let file = |spec: AppSpec| Command::Start { specs: vec![Arc::new(spec)] };
    if running != "start" {
        world.ask(file(spec(APP, like, SLOTS)));
        world.run_for(secs(4));
    }
    let first = world.ask(match running {
        "start" => file(spec(APP, like, SLOTS)),
        "restart" => on_app(Verb::Restart, Vec::new()),
        "reload" => on_app(Verb::Reload, Vec::new()),
        "scale" => scale(SLOTS + 1),
        "stop" => on_app(Verb::Stop, Vec::new()),
        "delete" => on_app(Verb::Delete, Vec::new()),
        other => panic!("{other}"),
    });
    world.run_for(millis(100));
    // What is the same is what the first one brings about.
    let slots = if running == "scale" { SLOTS + 1 } else { SLOTS };
    let same = spec(APP, like, slots);
    let mut other = same.clone();
    other.env.vars.insert(String::from("RELEASE"), String::from("other"));
    let second = world.ask(match asked {
        "`stop`" => on_app(Verb::Stop, Vec::new()),
        "`delete`" => on_app(Verb::Delete, Vec::new()),
        "`reload`" => on_app(Verb::Reload, Vec::new()),
        "`reload`, another spec" => on_app(Verb::Reload, vec![Arc::new(other)]),
        "`restart`" => on_app(Verb::Restart, Vec::new()),
        "`start NAME`" => on_app(Verb::Start, Vec::new()),
        "`start FILE`, the same spec" => file(same),
        "`start FILE`, another spec" => file(other),
        "`scale`, the same number" => scale(slots),
        "`scale`, another number" => scale(SLOTS + 2),
        other => panic!("{other}"),
    });
    match word(&world, second) {
        Word::Busy => return "refused",
        Word::Already(_) => return "already",
        _ => {}
    }
    if matches!(word(&world, first), Word::Superseded(_)) {
        return "ends it";
    }
    let end = world.now + secs(60);
    while world.answer(first).is_none() && world.next(end) {}
    let together = world.answer(second).is_some();
    world.run_for(secs(60));
    world.expect_no_breach();
    match (together, world.answer(second)) {
        (true, _) => "joins it",
        (false, Some(_)) => "waits",
        (false, None) => "never answered",
    }
}
