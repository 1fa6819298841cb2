//! The log pump with real processes: nothing lost, nothing split, nothing held up.

#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use pm::logs::stamp::Stamp;
use pm::logs::{Attachment, Journal, LogEvent, LogHandle, Pipe, Target, spawn};
use pm::model::id::{AppName, Generation, InstanceId, Slot};
use pm::model::spec::Overflow;

const LIMIT: Duration = Duration::from_secs(30);

fn id(app: &str, slot: u32, generation: u64) -> InstanceId {
    InstanceId { app: AppName::new(app).unwrap(), slot: Slot(slot), generation: Generation(generation) }
}

struct World {
    logs: LogHandle,
    events: Receiver<LogEvent>,
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let (events_tx, events) = channel();
        let logs = spawn(Journal::private().unwrap(), move |event| {
            let _ = events_tx.send(event);
        })
        .unwrap();
        Self { logs, events, dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn read(&self, name: &str) -> String {
        String::from_utf8(fs::read(self.path(name)).unwrap()).unwrap()
    }

    /// A pipe whose write end is opened O_RDWR, as an app gets it: its reader never sees end of file.
    fn pipe() -> (OwnedFd, OwnedFd) {
        let (read_end, write_end) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let name = format!("/proc/self/fd/{}", write_end.as_raw_fd());
        let both = fs::OpenOptions::new().read(true).write(true).open(name).unwrap();
        (read_end, both.into())
    }

    /// Runs a program with both outputs attached.
    fn run(&self, id: &InstanceId, program: &[&str], out: Target, err: Target, stamp: Option<&str>) -> Child {
        let (child, [out_fd, err_fd]) = Self::start(program);
        self.attach(id, Pipe { fd: out_fd, target: out }, Pipe { fd: err_fd, target: err }, stamp);
        child
    }

    fn start(program: &[&str]) -> (Child, [OwnedFd; 2]) {
        let ((out_read, out_write), (err_read, err_write)) = (Self::pipe(), Self::pipe());
        let mut command = Command::new(program[0]);
        command.args(&program[1..]).stdin(Stdio::null()).stdout(out_write).stderr(err_write);
        (command.spawn().unwrap(), [out_read, err_read])
    }

    fn attach(&self, id: &InstanceId, out: Pipe, err: Pipe, stamp: Option<&str>) {
        let stamp = stamp.and_then(Stamp::new);
        self.logs
            .attach(Attachment {
                id: id.clone(),
                out: Some(out),
                err: Some(err),
                stamp,
                mark: String::new(),
                overflow: Overflow::Drop,
                watch: None,
            })
            .unwrap();
    }

    fn file(&self, name: &str) -> Target {
        Target::file(self.path(name), None)
    }

    fn wait_for(&self, wanted: &LogEvent) {
        let end = Instant::now() + LIMIT;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let event = self.events.recv_timeout(left).unwrap_or_else(|_| panic!("no {wanted:?}"));
            if event == *wanted {
                return;
            }
        }
    }

    fn finish(&self, id: &InstanceId) {
        self.logs.finish(id.clone());
        self.wait_for(&LogEvent::Drained { id: id.clone() });
    }

    fn wait_until(&self, what: &str, mut is_so: impl FnMut() -> bool) {
        let end = Instant::now() + LIMIT;
        while !is_so() {
            assert!(Instant::now() < end, "not within {LIMIT:?}: {what}");
            std::thread::park_timeout(Duration::from_millis(2));
        }
    }
}

#[test]
fn last_words_before_exit_are_captured() {
    let world = World::new();
    let app = id("api", 0, 1);
    // As much as the pipe holds, and gone before anything is read.
    let script = "require('fs').writeSync(1, 'x'.repeat(65535) + '\\n'); require('fs').writeSync(2, 'bye'); process.exit(7)";
    let (mut child, [out, err]) = World::start(&["node", "-e", script]);
    assert_eq!(child.wait().unwrap().code(), Some(7));
    let (out, err) =
        (Pipe { fd: out, target: world.file("out.log") }, Pipe { fd: err, target: world.file("err.log") });
    world.attach(&app, out, err, None);
    world.finish(&app);
    assert_eq!(world.read("out.log").len(), 65_536);
    assert_eq!(world.read("err.log"), "bye");
    assert_eq!(world.logs.last_lines(&app, 1), ["bye"]);
    world.logs.forget(&app);
    assert!(world.logs.last_lines(&app, 1).is_empty());
}

#[test]
fn last_words_before_sigkill_are_captured() {
    let world = World::new();
    let app = id("api", 0, 1);
    let script = "for i in 1 2 3 4 5 6 7 8; do printf \"%08000d\\n\" $i; done; kill -9 $$";
    let mut child =
        world.run(&app, &["sh", "-c", script], world.file("out.log"), world.file("err.log"), None);
    assert_eq!(child.wait().unwrap().code(), None);
    world.finish(&app);
    let text = world.read("out.log");
    assert_eq!(text.lines().count(), 8);
    assert!(text.lines().enumerate().all(|(n, line)| line.parse::<usize>().unwrap() == n + 1));
}

#[test]
fn a_program_that_left_a_grandchild_writing_is_finished_all_the_same() {
    let world = World::new();
    let app = id("api", 0, 1);
    let mut child = world.run(&app, &["yes"], world.file("out.log"), Target::Discard, None);
    world.wait_until("output", || !world.logs.last_lines(&app, 1).is_empty());
    world.finish(&app);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn instances_that_share_a_file_do_not_share_lines() {
    let world = World::new();
    // A line in two writes each, so that chunks end anywhere; a long one now and then.
    let script = "import os, sys\n\
        me = sys.argv[1]\n\
        for n in range(4000):\n    \
            line = f'{me}:{n}:' + me * (40 if n % 50 else 70000) + ':end\\n'\n    \
            half = len(line) // 2\n    \
            for part in (line[:half], line[half:]):\n        \
                part = part.encode()\n        \
                while part: part = part[os.write(1 + n % 2, part):]\n";
    let ids: Vec<InstanceId> = (0..3).map(|slot| id("api", slot, 1)).collect();
    let mut children: Vec<Child> = ids
        .iter()
        .zip(["a", "b", "c"])
        .map(|(id, me)| {
            world.run(id, &["python3", "-c", script, me], world.file("all.log"), world.file("all.log"), None)
        })
        .collect();
    for (id, child) in ids.iter().zip(&mut children) {
        assert!(child.wait().unwrap().success());
        world.finish(id);
    }
    let text = world.read("all.log");
    let mut seen = std::collections::HashSet::new();
    let mut bytes = 0;
    for line in text.lines() {
        bytes += line.len() + 1;
        // Lines longer than what is held may be cut in pieces, the others never.
        if line.len() < 200 {
            let parts: Vec<&str> = line.split(':').collect();
            if parts.len() == 4 && parts[2].len() == 40 {
                assert!(parts[2].chars().all(|c| parts[0] == c.to_string()), "{line}");
                assert!(seen.insert((parts[0].to_owned(), parts[1].to_owned())), "doubled: {line}");
            }
        }
    }
    assert_eq!(seen.len(), 3 * 3920, "every short line is there, whole, once");
    let long: usize = text.matches("a".repeat(1000).as_str()).count();
    assert!(long > 0 && bytes == text.len());
}

#[test]
fn an_unfinished_line_in_a_shared_file_is_shown_after_a_moment() {
    let world = World::new();
    let (one, two) = (id("api", 0, 1), id("api", 1, 1));
    let mut says =
        world.run(&two, &["sh", "-c", "exec sleep 60"], world.file("x.log"), Target::Discard, None);
    // Second, or it would have the file to itself when it asks.
    let mut asks = world.run(
        &one,
        &["sh", "-c", "printf 'prompt> '; exec sleep 60"],
        world.file("x.log"),
        Target::Discard,
        None,
    );
    world.wait_until("the prompt", || fs::read(world.path("x.log")).is_ok_and(|text| text == b"prompt> "));
    for child in [&mut asks, &mut says] {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    world.finish(&one);
    world.finish(&two);
}

#[test]
fn lines_are_stamped_once_each() {
    let world = World::new();
    let app = id("api", 0, 1);
    let script = "for i in 1 2 3; do printf 'line '; printf \"$i\\n\"; done; printf end";
    let mut child =
        world.run(&app, &["sh", "-c", script], world.file("x.log"), Target::Discard, Some("YYYY[!]"));
    child.wait().unwrap();
    world.finish(&app);
    let text = world.read("x.log");
    let year = &text[..4];
    assert!(year.parse::<u32>().unwrap() >= 2024);
    assert_eq!(
        text,
        ["line 1\n", "line 2\n", "line 3\n", "end"].map(|line| format!("{year}!: {line}")).concat()
    );
}

#[test]
fn rotation_loses_and_doubles_nothing() {
    let world = World::new();
    let app = id("api", 0, 1);
    const LINES: usize = 400_000;
    let mut child =
        world.run(&app, &["seq", "1", &LINES.to_string()], world.file("x.log"), Target::Discard, None);
    let mut rotated = 0;
    while child.try_wait().unwrap().is_none() {
        if fs::rename(world.path("x.log"), world.path(&format!("x.log.{rotated}"))).is_ok() {
            rotated += 1;
            world.logs.reopen();
            world.wait_for(&LogEvent::Reopened);
        }
    }
    world.finish(&app);
    let mut text = String::new();
    for number in 0..rotated {
        text.push_str(&world.read(&format!("x.log.{number}")));
    }
    text.push_str(&world.read("x.log"));
    let expected: String = (1..=LINES).map(|n| format!("{n}\n")).collect();
    assert!(rotated > 0);
    assert!(text == expected, "{} bytes instead of {}", text.len(), expected.len());
}

#[test]
fn a_removed_file_comes_back_without_being_asked() {
    let world = World::new();
    let app = id("api", 0, 1);
    let script = "while :; do echo tick; sleep 0.05; done";
    let mut child = world.run(&app, &["sh", "-c", script], world.file("x.log"), Target::Discard, None);
    world.wait_until("the file", || fs::read(world.path("x.log")).is_ok_and(|text| !text.is_empty()));
    fs::remove_file(world.path("x.log")).unwrap();
    world.wait_until("a new file", || fs::read(world.path("x.log")).is_ok_and(|text| !text.is_empty()));
    child.kill().unwrap();
    child.wait().unwrap();
    world.finish(&app);
}

#[test]
fn a_full_disk_stops_nobody_and_says_so() {
    let world = World::new();
    let app = id("api", 0, 1);
    let full = Target::file("/dev/full".into(), None);
    let script = "head -c 20000000 /dev/zero | tr '\\0' x; echo; echo done >&2";
    let mut child = world.run(&app, &["sh", "-c", script], full, world.file("err.log"), None);
    assert!(child.wait().unwrap().success());
    world.finish(&app);
    assert_eq!(world.read("err.log"), "done\n");
    assert!(world.logs.dropped_bytes() > 0);
}

#[test]
fn a_file_that_cannot_be_opened_is_reported() {
    let world = World::new();
    let app = id("api", 0, 1);
    fs::write(world.path("plain"), "").unwrap();
    let target = Target::file(world.path("plain").join("x.log"), None);
    let mut child = world.run(&app, &["echo", "hello"], target, Target::Discard, None);
    child.wait().unwrap();
    let event = world.events.recv_timeout(LIMIT).unwrap();
    let LogEvent::Trouble(trouble) = event else { panic!("{event:?}") };
    assert_eq!(trouble.path, world.path("plain").join("x.log"));
    world.finish(&app);
    assert_eq!(world.logs.last_lines(&app, 9), ["hello"]);
}

/// Resident memory of this process in bytes.
fn resident() -> usize {
    let text = fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

#[test]
fn a_hundred_megabytes_without_a_newline_need_no_memory() {
    let world = World::new();
    let (app, other) = (id("api", 0, 1), id("api", 1, 1));
    // Shared and stamped: the path that holds lines back.
    let mut quiet = world.run(&other, &["sleep", "60"], world.file("x.log"), Target::Discard, Some("ss"));
    let script = "head -c 100000000 /dev/zero | tr '\\0' x; echo";
    let before = resident();
    let mut child = world.run(&app, &["sh", "-c", script], world.file("x.log"), Target::Discard, Some("ss"));
    let mut peak = before;
    while child.try_wait().unwrap().is_none() {
        peak = peak.max(resident());
        std::thread::park_timeout(Duration::from_millis(5));
    }
    quiet.kill().unwrap();
    quiet.wait().unwrap();
    world.finish(&app);
    assert_eq!(fs::metadata(world.path("x.log")).unwrap().len(), 4 + 100_000_001);
    assert!(peak - before < 8 << 20, "{} KiB more", (peak - before) / 1024);
}

#[test]
fn what_a_stopped_pump_leaves_is_there_for_the_next() {
    let world = World::new();
    let app = id("api", 0, 1);
    let (read_end, write_end) = World::pipe();
    let again = read_end.try_clone().unwrap();
    let to_file = |world: &World, fd: OwnedFd| Attachment {
        id: app.clone(),
        out: Some(Pipe { fd, target: Target::file(world.path("x.log"), None) }),
        err: None,
        stamp: None,
        mark: String::new(),
        overflow: Overflow::Drop,
        watch: None,
    };
    world.logs.attach(to_file(&world, read_end)).unwrap();
    let write = |text: &str| {
        nix::unistd::write(&write_end, text.as_bytes()).unwrap();
    };
    write("first\nsec");
    world.wait_until("first", || fs::read(world.path("x.log")).is_ok_and(|text| text == b"first\nsec"));
    assert!(world.logs.stop(LIMIT));
    write("ond\n");
    let next = World::new();
    next.logs.adopt(to_file(&world, again)).unwrap();
    write("third\n");
    next.finish(&app);
    assert_eq!(world.read("x.log"), "first\nsecond\nthird\n");
}

/// Everything this process has open below a directory.
fn open_files(dir: &Path) -> usize {
    let fds = fs::read_dir("/proc/self/fd").unwrap();
    fds.filter(|fd| fs::read_link(fd.as_ref().unwrap().path()).is_ok_and(|path| path.starts_with(dir)))
        .count()
}

#[test]
fn generations_share_a_file_and_leave_no_descriptor() {
    let world = World::new();
    for generation in 1..=20 {
        let (old, new) = (id("api", 0, generation), id("api", 0, generation + 100));
        let mut first = world.run(&old, &["echo", "a"], world.file("x.log"), world.file("y.log"), None);
        let mut second = world.run(&new, &["echo", "a"], world.file("x.log"), world.file("y.log"), None);
        first.wait().unwrap();
        second.wait().unwrap();
        world.finish(&old);
        assert_eq!(open_files(world.dir.path()), 2);
        world.finish(&new);
        assert_eq!(open_files(world.dir.path()), 0);
    }
    assert_eq!(world.read("x.log"), "a\n".repeat(40));
}

#[test]
fn an_unread_error_stream_does_not_keep_the_process_from_writing() {
    let world = World::new();
    let app = id("api", 0, 1);
    let mut child = world.run(
        &app,
        &["sh", "-c", "head -c 1000000 /dev/zero >&2; echo through"],
        world.file("x.log"),
        Target::Discard,
        None,
    );
    assert!(child.wait().unwrap().success());
    world.finish(&app);
    let mut text = String::new();
    fs::File::open(world.path("x.log")).unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "through\n");
}

// A pump that is killed. --------------------------------------------------------------------------------------------

/// Where the pump process finds its pipes; its journal is its standard input.
const PUMP: &str = "PM_TEST_PUMP";

/// Every way output can go: alone and shared, stamped and not, whole lines and pieces.
const WAYS: [(&str, &str, Option<&str>, Shape); 6] = [
    ("alone", "alone.log", None, Shape::Whole),
    ("pieces", "pieces.log", Some("YYYY"), Shape::Pieces),
    ("stamped", "stamped.log", Some("YYYY[!]"), Shape::Whole),
    ("one", "shared.log", None, Shape::Pieces),
    ("two", "shared.log", None, Shape::Whole),
    ("three", "shared.log", None, Shape::Long),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    Whole,
    /// A line in two writes.
    Pieces,
    /// Lines of up to 3 KB.
    Long,
}

fn way(app: &str) -> InstanceId {
    id(app, 0, 1)
}

fn attachment(dir: &Path, app: &str, file: &str, stamp: Option<&str>, pipe: OwnedFd) -> Attachment {
    Attachment {
        id: way(app),
        out: Some(Pipe { fd: pipe, target: Target::file(dir.join(file), None) }),
        err: None,
        stamp: stamp.and_then(Stamp::new),
        mark: String::new(),
        overflow: Overflow::Drop,
        watch: None,
    }
}

/// The process that is killed: no test, unless it is told where its pipes are.
#[test]
fn the_pump_process() {
    let Ok(pipes) = std::env::var(PUMP) else { return };
    let mut pipes = pipes.split(' ');
    let dir = PathBuf::from(pipes.next().unwrap());
    let memory = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let logs = spawn(Journal::open(memory).unwrap(), |event| println!("{event:?}")).unwrap();
    for ((app, file, stamp, _), pipe) in WAYS.iter().zip(pipes) {
        let pipe = fs::OpenOptions::new().read(true).open(pipe).unwrap();
        logs.adopt(attachment(&dir, app, file, *stamp, pipe.into())).unwrap();
    }
    logs.settle();
    loop {
        std::thread::park();
    }
}

/// How long a line is. Of one in pieces the first has at least the number.
const fn filler(shape: Shape, count: usize) -> usize {
    match shape {
        Shape::Whole => count % 50,
        Shape::Pieces => 30 + count % 50,
        Shape::Long => count * 37 % 3000,
    }
}

/// Writes numbered lines until it is told to end, and returns how many.
fn talk(mut pipe: fs::File, app: &str, shape: Shape, end: &AtomicBool) -> usize {
    let mut count = 0;
    while !end.load(Ordering::Relaxed) {
        let line = format!("{app} {count} {}\n", "x".repeat(filler(shape, count)));
        let cut = if shape == Shape::Pieces { line.len() / 2 } else { line.len() };
        for part in [&line[..cut], &line[cut..]].into_iter().filter(|part| !part.is_empty()) {
            pipe.write_all(part.as_bytes()).unwrap();
        }
        count += 1;
    }
    count
}

/// What is wrong with the lines of an app: nothing, if every number is there once and in order.
///
/// A machine may be so busy that the end of a line comes later than the pump waits for it (200 ms): in a shared file that is
/// a line of its own then.
fn fault(text: &str, app: &str, shape: Shape, prefix: &str, count: usize) -> Option<String> {
    let mut next = 0;
    let mut late: Vec<usize> = Vec::new();
    let mut ends: Vec<usize> = text
        .lines()
        .filter(|line| shape == Shape::Pieces && line.bytes().all(|byte| byte == b'x'))
        .map(str::len)
        .collect();
    for line in text.lines() {
        let Some(rest) = line.strip_prefix(prefix) else {
            return Some(format!("{app}: no stamp: {line:.80}"));
        };
        let Some(rest) = rest.strip_prefix(app).and_then(|rest| rest.strip_prefix(' ')) else { continue };
        let mut words = rest.splitn(2, ' ');
        let number = words.next().and_then(|number| number.parse::<usize>().ok());
        let found = words.next().filter(|filler| filler.bytes().all(|byte| byte == b'x')).map(str::len);
        let missing = found.and_then(|found| filler(shape, next).checked_sub(found));
        let is_fine = missing.is_some_and(|missing| missing == 0 || shape == Shape::Pieces);
        if number != Some(next) || !is_fine {
            return Some(format!("{app}: {next} of {count} expected: {line:.80}"));
        }
        late.extend(missing.filter(|&missing| missing > 0));
        next += 1;
    }
    late.sort_unstable();
    ends.sort_unstable();
    if late != ends {
        return Some(format!("{app}: ends of lines are missing: {late:?}, {ends:?}"));
    }
    (next != count).then(|| format!("{app}: {next} lines of {count}"))
}

/// Kills a pump again and again while apps write, and says what is wrong with their files afterwards. `memory` gives each
/// pump its journal.
fn kill_pumps(kills: u32, mut memory: impl FnMut() -> OwnedFd) -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    let pipes: Vec<(OwnedFd, OwnedFd)> = WAYS.iter().map(|_| World::pipe()).collect();
    let end = Arc::new(AtomicBool::new(false));
    let me = std::process::id();
    let mut names = vec![dir.path().display().to_string()];
    names.extend(pipes.iter().map(|(read_end, _)| format!("/proc/{me}/fd/{}", read_end.as_raw_fd())));
    let apps: Vec<std::thread::JoinHandle<usize>> = WAYS
        .iter()
        .zip(&pipes)
        .map(|(&(app, _, _, shape), (_, pipe))| {
            let (pipe, end) = (fs::File::from(pipe.try_clone().unwrap()), Arc::clone(&end));
            std::thread::spawn(move || talk(pipe, app, shape, &end))
        })
        .collect();
    let size = || {
        let files = fs::read_dir(dir.path()).unwrap();
        files.map(|file| file.unwrap().metadata().unwrap().len()).sum::<u64>()
    };
    for number in 0..kills {
        let before = size();
        let mut pump = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "the_pump_process", "--nocapture"])
            .env(PUMP, names.join(" "))
            .stdin(memory())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        // Some are killed before they have done anything.
        if number % 5 > 0 {
            let limit = Instant::now() + LIMIT;
            while size() == before && Instant::now() < limit {
                std::thread::park_timeout(Duration::from_millis(1));
            }
        }
        std::thread::park_timeout(Duration::from_micros(u64::from(number * 7919 % 20_000)));
        assert!(pump.try_wait().unwrap().is_none(), "the pump has ended by itself");
        pump.kill().unwrap();
        pump.wait().unwrap();
    }
    end.store(true, Ordering::Relaxed);
    let (events_tx, events) = channel();
    let last = spawn(Journal::open(memory()).unwrap(), move |event| {
        let _ = events_tx.send(event);
    })
    .unwrap();
    for ((app, file, stamp, _), (pipe, _)) in WAYS.iter().zip(&pipes) {
        last.adopt(attachment(dir.path(), app, file, *stamp, pipe.try_clone().unwrap())).unwrap();
    }
    last.settle();
    let counts: Vec<usize> = apps.into_iter().map(|app| app.join().unwrap()).collect();
    for (app, ..) in WAYS {
        last.finish(way(app));
    }
    for _ in WAYS {
        assert!(matches!(events.recv_timeout(LIMIT).unwrap(), LogEvent::Drained { .. }));
    }
    let year = Stamp::new("YYYY").unwrap().prefix(jiff::Timestamp::now()).to_vec();
    let year = String::from_utf8(year).unwrap().trim_end_matches(": ").to_owned();
    WAYS.iter()
        .zip(counts)
        .filter_map(|(&(app, file, stamp, shape), count)| {
            let text = String::from_utf8(fs::read(dir.path().join(file)).unwrap()).unwrap();
            let prefix = stamp.map_or_else(String::new, |format| {
                format!("{year}{}: ", if format.contains('!') { "!" } else { "" })
            });
            fault(&text, app, shape, &prefix, count)
        })
        .collect()
}

#[test]
fn no_line_is_lost_or_doubled_however_often_the_pump_is_killed() {
    let memory = pm::logs::journal::create().unwrap();
    assert_eq!(kill_pumps(60, || memory.try_clone().unwrap()), Vec::<String>::new());
}

#[test]
fn without_its_memory_a_killed_pump_loses_lines() {
    // On a busy machine ten kills may all find a pump that waits.
    let loses = |_| !kill_pumps(10, || pm::logs::journal::create().unwrap()).is_empty();
    assert!((0..10).any(loses), "the test above can fail");
}
