//! Nothing left: of descriptors, processes, memory, room in /tmp or patience. The daemon refuses politely and lives, the
//! apps serve, and afterwards everything is as before.

use std::collections::VecDeque;
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;

use super::support::home::{Run, Running, run};
use super::support::mounts::{Mounted, own_mounts};
use super::support::{Home, PATIENT, SOON, not_here, process, secs, wait_until};

const SLEEPER: &str = "[[apps]]\nname = 'job'\nscript = 'sleep'\nargs = ['1000']\n";

/// The daemon is there, as the same processes, and so is the app.
#[derive(Debug, PartialEq, Eq)]
struct Alive {
    keeper: i32,
    supervisor: i32,
    app: i32,
}

impl Alive {
    fn of(home: &Home) -> Self {
        Self { keeper: home.keeper(), supervisor: home.supervisor(), app: home.pid("job") }
    }
}

/// Changes a limit of a process, as in `prlimit --nofile=64:`.
fn limit(home: &Home, pid: i32, what: &str) {
    let mut command = Command::new("prlimit");
    home.environment(&mut command);
    let done = run(
        {
            command.args(["--pid", &pid.to_string(), what]);
            command
        },
        SOON,
    );
    assert_eq!(done.code, 0, "{done:?}");
}

/// A daemon in the foreground with these limits; ends with its home.
fn daemon_with(home: &Home, limits: &[&str]) -> Running {
    let mut command = Command::new("prlimit");
    home.environment(&mut command);
    command.args(limits).args([env!("CARGO_BIN_EXE_pm"), "daemon"]);
    let daemon = Running::start(command, b"");
    wait_until("it answers", PATIENT, || {
        let run = home.pm(&["ping"]);
        if run.code == 0 { Ok(()) } else { Err(run) }
    });
    daemon
}

#[test]
fn a_keeper_that_does_not_answer_ends_commands_within_5_s_with_exit_code_4_and_a_way_out() {
    let home = Home::new();
    home.start(SLEEPER);
    let before = Alive::of(&home);
    process::signal(before.keeper, Signal::SIGSTOP);
    let hint = format!("`kill -CONT {0}` lets it go on; `kill -9 {0}` has it replaced", before.keeper);
    for command in [
        &["start", "sleep", "--name", "new", "--", "1000"][..],
        &["ping"],
        &["stop", "job"],
        &["restart", "job"],
        &["reload", "job"],
        &["scale", "job", "2"],
        &["delete", "job"],
        &["kill"],
    ] {
        let run = home.exits(4, command);
        assert!(run.took <= secs(6), "{command:?}: {run:?}");
        run.says("not responding").says(&format!("keeper (pid {}) is stopped", before.keeper)).says(&hint);
    }
    // What needs no keeper is answered.
    assert_eq!(home.row("job").pid, before.app);
    process::signal(before.keeper, Signal::SIGCONT);
    wait_until("it answers again", SOON, || {
        let run = home.pm(&["ping"]);
        if run.code == 0 { Ok(()) } else { Err(run) }
    });
    // Begun is begun, and only that.
    home.wait_status("new", "online");
    assert_eq!(Alive::of(&home), before);
    home.ok(&["scale", "job", "2"]);

    process::signal(before.keeper, Signal::SIGSTOP);
    home.exits(4, &["restart", "new"]);
    process::signal(before.keeper, Signal::SIGKILL);
    wait_until("as the hint says", PATIENT, || {
        let run = home.pm(&["ping"]);
        if run.code == 0 && home.keeper() != before.keeper { Ok(()) } else { Err(run) }
    });
    assert_eq!(home.rows_of("job")[0].pid, before.app);
}

#[test]
fn a_supervisor_that_does_not_answer_is_named_with_a_way_out() {
    let home = Home::new();
    home.start(SLEEPER);
    let before = Alive::of(&home);
    process::signal(before.supervisor, Signal::SIGSTOP);
    let run = home.exits(4, &["list"]);
    assert!(run.took <= secs(6), "{run:?}");
    let supervisor = before.supervisor;
    run.says(&format!("supervisor (pid {supervisor}) is stopped"))
        .says(&format!("`kill -CONT {supervisor}` lets it go on; `kill -9 {supervisor}` has it replaced"));
    process::signal(supervisor, Signal::SIGKILL);
    wait_until("as the hint says", PATIENT, || {
        let run = home.pm(&["ping"]);
        if run.code == 0 { Ok(()) } else { Err(run) }
    });
    assert_eq!(home.pid("job"), before.app);
}

#[test]
fn pain_16_a_start_beyond_64_descriptors_is_refused_with_the_number_and_floods_leave_room() {
    let home = Home::new();
    let daemon = daemon_with(&home, &["--nofile=64:64"]);
    home.start(SLEEPER);
    let before = Alive::of(&home);
    let run = home.exits(1, &["scale", "job", "40"]);
    run.says("39 more would need 312 descriptors, and of the 64 that the daemon may open 8 are left")
        .says("there is room for 1 more")
        .says("LimitNOFILE");
    home.exits(1, &["start", "sleep", "--name", "many", "-i", "9", "--", "1000"]).says("descriptors");
    assert_eq!(home.rows().len(), 1, "nothing was begun");
    home.ok(&["scale", "job", "2"]);
    home.ok(&["reload", "job"]);
    home.ok(&["scale", "job", "1"]);
    let before = Alive { app: home.pid("job"), ..before };
    // Clients that say nothing take no descriptor that somebody needs.
    let silent: Vec<UnixStream> =
        (0..60).map(|_| UnixStream::connect(home.path().join("pm.sock")).unwrap()).collect();
    home.ok(&["list"]);
    home.ok(&["restart", "job"]);
    drop(silent);
    let before = Alive { app: home.pid("job"), ..before };
    assert_eq!(Alive::of(&home), before);
    let limits = fs::read_to_string(format!("/proc/{}/limits", before.app)).unwrap();
    let files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    assert_eq!(
        files.split_whitespace().nth(3),
        Some("64"),
        "the app has the limit of whoever started the daemon"
    );
    home.ok(&["kill"]);
    daemon.end(SOON);
}

#[test]
fn pain_16_on_emfile_a_spawn_fails_with_backoff_and_the_daemon_lives() {
    let home = Home::new();
    home.start(SLEEPER);
    home.ok(&["start", "sleep", "--name", "other", "--", "1000"]);
    let before = Alive::of(&home);
    let other = home.pid("other");
    // It keeps what it has and gets nothing more, not even in the place of what it closes.
    limit(&home, before.supervisor, "--nofile=3:");
    let killed = Instant::now();
    process::signal(before.app, Signal::SIGKILL);
    wait_until("it is tried four times", PATIENT, || {
        let log = fs::read_to_string(home.path().join("pm.log")).unwrap();
        if log.matches("Too many open files").count() >= 4 { Ok(()) } else { Err(log) }
    });
    // At once, then after 100 ms × (1 + 1.5 + 1.5²), less a tenth.
    let took = Instant::now().duration_since(killed);
    assert!(took >= Duration::from_millis(427), "{took:?}");
    assert_eq!((home.keeper(), home.supervisor()), (before.keeper, before.supervisor));
    assert!(process::alive(other), "the other app runs on");
    limit(&home, before.supervisor, "--nofile=20000:");
    let row = home.wait_row("job", "it runs again", |row| row.status == "online" && row.pid != before.app);
    assert!(row.restarts >= 1);
    assert_eq!(home.supervisor(), before.supervisor);
}

#[test]
fn a_keeper_that_dies_while_its_supervisor_gets_no_descriptors_costs_nothing() {
    let home = Home::new();
    home.start(SLEEPER);
    let before = Alive::of(&home);
    limit(&home, before.supervisor, "--nofile=3:");
    process::signal(before.keeper, Signal::SIGKILL);
    // It is the only one that has anything now.
    wait_until("it tries again and again", PATIENT, || {
        let log = fs::read_to_string(home.path().join("pm.log")).unwrap();
        if log.matches("cannot start the next keeper").count() >= 3 { Ok(()) } else { Err(log) }
    });
    assert!(process::alive(before.app) && process::alive(before.supervisor), "{}", home.process_list());
    limit(&home, before.supervisor, "--nofile=20000:");
    wait_until("the next keeper has everything", PATIENT, || {
        let run = home.pm(&["ping"]);
        if run.code == 0 { Ok(()) } else { Err(run) }
    });
    assert_eq!(home.pid("job"), before.app);
    assert_ne!(home.keeper(), before.keeper);
    process::signal(before.app, Signal::SIGKILL);
    home.wait_row("job", "its end was seen", |row| row.status == "online" && row.pid != before.app);
}

#[test]
fn pain_16_without_memory_a_spawn_fails_with_backoff_and_the_daemon_lives() {
    let home = Home::new();
    home.start(SLEEPER);
    home.ok(&["start", "sleep", "--name", "other", "--", "1000"]);
    let before = Alive::of(&home);
    let other = home.pid("other");
    // Less than it has: nothing can be mapped any more, by the keeper or by what it starts.
    limit(&home, before.keeper, "--as=1000000:");
    process::signal(before.app, Signal::SIGKILL);
    home.wait_row("job", "it waits for its next try", |row| {
        row.status == "waiting restart" && row.restarts >= 3
    });
    home.exits(1, &["start", "sleep", "--name", "new", "--", "1000"]).says("error: cannot start");
    assert_eq!((home.keeper(), home.supervisor()), (before.keeper, before.supervisor));
    assert!(process::alive(other), "the other app runs on");
    limit(&home, before.keeper, "--as=unlimited:");
    home.wait_status("job", "online");
    home.wait_status("new", "online");
    assert_eq!(home.keeper(), before.keeper);
}

/// Runs `pm` as a user without any privilege, who may execute a copy of it.
fn as_nobody(home: &Home, program: &str, args: &[&str]) -> Command {
    let mut command = Command::new(super::support::node::find_in_path("setpriv"));
    home.environment(&mut command);
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(program).args(args);
    command
}

#[test]
fn pain_16_a_fork_that_fails_with_eagain_is_tried_again_and_a_start_says_why() {
    if !nix::unistd::geteuid().is_root() {
        return not_here("only root can be somebody else, and change that one's limits");
    }
    let home = Home::new();
    let program = home.program_for_others();
    fs::create_dir(home.path()).unwrap();
    nix::unistd::chown(&home.path(), Some(65534.into()), Some(65534.into())).unwrap();
    let pm = |args: &[&str]| run(as_nobody(&home, &program, args), PATIENT);
    let started = pm(&["start", "sleep", "--name", "job", "--", "1000"]);
    assert_eq!(started.code, 0, "{started:?}");
    let before = Alive::of(&home);
    let nproc = |soft: &str| {
        let args = ["--pid", &before.keeper.to_string(), &format!("--nproc={soft}:")];
        let done = run(as_nobody(&home, "prlimit", &args), SOON);
        assert_eq!(done.code, 0, "{done:?}");
    };
    let limits = fs::read_to_string(format!("/proc/{}/limits", before.keeper)).unwrap();
    let usual = limits.lines().find_map(|line| line.strip_prefix("Max processes")).unwrap();
    let usual = usual.split_whitespace().next().unwrap();
    // No process more for this user, as far as the keeper is concerned.
    nproc("1");
    let refused = pm(&["start", "sleep", "--name", "new", "--", "1000"]);
    assert_eq!(refused.code, 1, "{refused:?}");
    refused.says("Resource temporarily unavailable");
    process::signal(before.app, Signal::SIGKILL);
    wait_until("it waits for its next try", SOON, || {
        let row = home.row("job");
        let tried = row.status == "waiting restart" && row.restarts >= 2;
        if tried { Ok(()) } else { Err(row) }
    });
    assert_eq!((home.keeper(), home.supervisor()), (before.keeper, before.supervisor));
    nproc(usual);
    home.wait_status("job", "online");
    home.wait_status("new", "online");
    let ended = pm(&["kill"]);
    assert_eq!(ended.code, 0, "{ended:?}");
}

#[test]
fn without_memory_a_supervisor_may_die_and_the_next_one_goes_on() {
    let home = Home::new();
    home.start(SLEEPER);
    let before = Alive::of(&home);
    let size = process::status_figure(before.supervisor, "VmSize");
    // Nothing that is not mapped already.
    limit(&home, before.supervisor, &format!("--as={}:", size * 1024));
    // Larger than what an allocator has left over. Whatever becomes of it, it becomes of it in time.
    let long = "x".repeat(1_500_000);
    home.ecosystem(&format!("{SLEEPER}[apps.env]\nLONG = '{}'\n", &long[..100_000]));
    let runs: Vec<Run> = (0..5).map(|_| home.pm(&["restart", "ecosystem.toml"])).collect();
    assert!(runs.iter().all(|run| run.took <= secs(30)), "{runs:?}");
    wait_until("the daemon serves", PATIENT, || {
        let run = home.pm(&["list"]);
        if run.code == 0 { Ok(()) } else { Err(run) }
    });
    limit(&home, home.supervisor(), "--as=unlimited:");
    assert_eq!(home.keeper(), before.keeper);
    home.ok(&["restart", "job"]);
    assert_eq!(home.rows().len(), 1);
    assert_eq!(process::children(before.keeper).len(), 2, "{}", home.process_list());
}

#[test]
fn a_full_tmp_is_nothing_to_the_daemon() {
    if !own_mounts() {
        return;
    }
    let home = Home::new();
    // What lies in /tmp is elsewhere, for what this test starts; the program, which may have been built there, as well.
    let elsewhere = Path::new("/mnt");
    fs::copy(env!("CARGO_BIN_EXE_pm"), home.work().join("pm")).unwrap();
    let none: Option<&str> = None;
    mount(home.path().parent(), elsewhere, none, MsFlags::MS_BIND, none).unwrap();
    let tmp = Mounted::small(Path::new("/tmp"), 64);
    tmp.fill();
    let pm = |args: &[&str]| {
        let work = elsewhere.join("work");
        let mut command = home.command_of(work.join("pm").to_str().unwrap(), args);
        command.env("PM_HOME", elsewhere.join("home")).env("TMPDIR", "/tmp").current_dir(work);
        let done = run(command, PATIENT);
        assert_eq!(done.code, 0, "{done:?}");
        done
    };
    pm(&["start", "sleep", "--name", "job", "--", "1000"]);
    pm(&["reload", "job"]);
    pm(&["restart", "job"]);
    pm(&["list"]).says("online");
    pm(&["stop", "job"]);
    pm(&["kill"]);
    drop(tmp);
}

/// One call as the protocol has it.
fn call(request: &str) -> String {
    format!("{{\"v\":{},\"op\":7,\"request\":{request}}}\n", pm::ipc::protocol::VERSION)
}

#[test]
fn floods_of_clients_that_say_nothing_say_half_or_never_read_keep_nobody_out() {
    let home = Home::new();
    home.start(SLEEPER);
    let before = Alive::of(&home);
    let socket = home.path().join("pm.sock");
    let open = || process::descriptors(before.supervisor).len();
    let at_rest = open();
    // Connecting to a full queue would wait; a client that gives up is none.
    let connect = || {
        let stream = UnixStream::connect(&socket).unwrap();
        stream.set_nonblocking(true).unwrap();
        stream
    };
    let request = call(r#"{"jlist":{"targets":[],"show_env":false}}"#);
    let mut flood: Vec<UnixStream> = Vec::new();
    for index in 0..600 {
        let mut stream = connect();
        match index % 3 {
            0 => {}
            1 => stream.write_all(&request.as_bytes()[..request.len() / 2]).unwrap(),
            _ => {
                // Until the socket is full of questions, and then of answers that nobody reads.
                while stream.write(request.as_bytes()).is_ok_and(|written| written == request.len()) {}
            }
        }
        flood.push(stream);
    }
    let run = home.ok(&["list"]);
    assert!(run.took <= secs(10), "{run:?}");
    home.ok(&["restart", "job"]);
    wait_until("those that say nothing are cut off", PATIENT, || {
        let silent = flood.iter_mut().step_by(3);
        let open = silent.filter_map(|stream| stream.read(&mut [0; 16]).err()).count();
        if open == 0 { Ok(()) } else { Err(open) }
    });
    drop(flood);
    wait_until("as many descriptors as before", PATIENT, || {
        let now = open();
        // The app's log files may have been opened meanwhile.
        if now <= at_rest + 2 { Ok(()) } else { Err((at_rest, now)) }
    });
    assert_eq!((home.keeper(), home.supervisor()), (before.keeper, before.supervisor));
}

#[test]
fn a_flood_of_10_000_connections_holds_commands_up_and_none_fails_but_politely() {
    let home = Home::new();
    home.start(SLEEPER);
    let before = Alive::of(&home);
    let socket = home.path().join("pm.sock");
    let at_rest = process::descriptors(before.supervisor).len();
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    // As many as possible at the same time: far more than the daemon takes, and than wait in its queue.
    let each = usize::try_from(hard.saturating_sub(500).min(10_000) / 4).unwrap();
    let floods: Vec<_> = (0..4)
        .map(|_| {
            let socket = socket.clone();
            std::thread::spawn(move || {
                let mut held = VecDeque::new();
                for _ in 0..2_500 {
                    held.push_back(UnixStream::connect(&socket).unwrap());
                    if held.len() > each {
                        held.pop_front();
                    }
                }
            })
        })
        .collect();
    let mut answered = 0;
    while !floods.iter().all(std::thread::JoinHandle::is_finished) {
        let run = home.pm(&["list"]);
        assert!(run.took <= secs(6), "{run:?}");
        match run.code {
            0 => answered += 1,
            _ => assert_eq!(run.code, 4, "{:?}", run.says("not responding")),
        }
    }
    floods.into_iter().for_each(|flood| flood.join().unwrap());
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    assert!(answered > 0);
    home.ok(&["restart", "job"]);
    wait_until("as many descriptors as before", PATIENT, || {
        let now = process::descriptors(before.supervisor).len();
        if now <= at_rest + 2 { Ok(()) } else { Err((at_rest, now)) }
    });
    assert_eq!((home.keeper(), home.supervisor()), (before.keeper, before.supervisor));
}

#[test]
fn a_program_that_cannot_be_started_is_tried_again_ever_more_slowly() {
    let home = Home::new();
    let script = home.write("job.sh", "#!/bin/sh\nexec sleep 1000\n");
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    home.ok(&["start", &script, "--name", "job", "--interpreter", "none"]);
    let pid = home.pid("job");
    fs::rename(&script, format!("{script}.away")).unwrap();
    process::signal(pid, Signal::SIGKILL);
    let tried = |least: i64| {
        home.wait_row("job", "it waits", |row| row.status == "waiting restart" && row.restarts >= least)
    };
    // Half a dozen tries take 100 ms × (1.5⁰ + … + 1.5⁵), less a tenth: without backoff they would take none.
    let from = Instant::now();
    tried(6);
    let took = Instant::now().duration_since(from);
    assert!(took >= Duration::from_millis(600), "{took:?}");
    fs::rename(format!("{script}.away"), &script).unwrap();
    home.wait_status("job", "online");
}
