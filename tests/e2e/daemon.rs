//! The daemon: exactly one per home, private, started only when needed, and never silent when it cannot answer.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::process::Command;

use nix::sys::signal::Signal;

use super::support::home::{Running, run};
use super::support::{Home, PATIENT, SOON, process, secs, wait_until};

const SLEEPER: &str = "[[apps]]\nname = 'job'\nscript = 'sleep'\nargs = ['1000']\n";

#[test]
fn pain_17_a_hundred_commands_at_once_start_one_daemon_and_one_app() {
    let home = Home::loaded();
    home.ecosystem(SLEEPER);
    let commands: Vec<Running> =
        (0..100).map(|_| Running::start(home.command(&["start", "ecosystem.toml"]), b"")).collect();
    for command in commands {
        let run = command.end(secs(60));
        assert_eq!(run.code, 0, "{run:?}");
    }
    assert_eq!(home.rows().len(), 1);
    let count = |word: &str| {
        home.processes()
            .into_iter()
            .filter(|pid| process::cmdline(*pid).get(1).is_some_and(|a| a == word))
            .count()
    };
    wait_until("one keeper, one supervisor, one app", SOON, || {
        let found = (count("daemon"), count("supervisor"), home.processes().len());
        if found == (1, 1, 3) { Ok(()) } else { Err((found, home.process_list())) }
    });
}

#[test]
fn without_a_daemon_commands_say_so_and_start_none() {
    let home = Home::new();
    for command in [vec!["list"], vec!["ls"], vec!["ps"]] {
        home.exits(0, &command);
    }
    assert_eq!(home.exits(0, &["jlist"]).out.trim(), "[]");
    assert_eq!(home.exits(0, &["prettylist"]).out.trim(), "[]");
    home.exits(4, &["ping"]);
    for command in ["stop", "restart", "reload", "delete", "describe"] {
        home.exits(3, &[command, "job"]);
    }
    home.exits(0, &["kill"]);
    home.exits(0, &["stop", "all"]);
    assert!(!home.has_daemon(), "{}", home.process_list());
}

#[test]
fn ping_answers_and_kill_ends_everything() {
    let home = Home::new();
    home.start(SLEEPER);
    home.ok(&["ping"]);
    let app = home.pid("job");
    home.ok(&["kill"]);
    assert!(!process::alive(app));
    wait_until("the daemon has gone", SOON, || {
        if home.has_daemon() { Err(home.process_list()) } else { Ok(()) }
    });
    assert_eq!(home.exits(0, &["jlist"]).out.trim(), "[]");
    home.exits(4, &["ping"]);
}

#[test]
fn socket_and_home_are_private() {
    let home = Home::new();
    home.start(SLEEPER);
    let mode = |path: &std::path::Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(&home.path()), 0o700);
    assert_eq!(mode(&home.path().join("pm.sock")), 0o600);
    assert_eq!(mode(&home.path().join("state.json")) & 0o077, 0);
    assert_eq!(mode(&home.path().join("logs/job-out.log")), 0o640);
}

#[test]
fn another_user_is_refused_even_where_the_modes_would_let_them_in() {
    if !nix::unistd::getuid().is_root() {
        eprintln!("only root can try to be somebody else");
        return;
    }
    let home = Home::new();
    home.start(SLEEPER);
    // Somebody opened the doors: the peer's credentials still count.
    for path in [home.path().parent().unwrap().to_owned(), home.path(), home.path().join("pm.sock")] {
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
    }
    let app = home.pid("job");
    // The test binary's directory may be closed to others, the system's Python is not.
    let mut command = Command::new(super::support::node::find_in_path("setpriv"));
    home.environment(&mut command);
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/python3", "-c"]).arg(
        format!(
            "import socket\n\
         s = socket.socket(socket.AF_UNIX)\n\
         s.settimeout(5)\n\
         s.connect('{}/pm.sock')\n\
         try:\n    s.sendall(b'{{}}\\n' * 10)\nexcept OSError: pass\n\
         try:\n    print('GOT', s.recv(1000))\nexcept ConnectionResetError: print('GOT', b'')\n",
            home.path().display()
        ),
    );
    let run = run(command, PATIENT);
    assert_eq!(run.code, 0, "{run:?}");
    // Cut off, or told why: no rows either way.
    run.does_not_say("job");
    assert_eq!(home.pid("job"), app);
}

#[test]
fn pain_18_a_supervisor_that_does_not_answer_ends_commands_within_5_s_with_exit_code_4() {
    let home = Home::new();
    home.start(SLEEPER);
    let supervisor = home.supervisor();
    process::signal(supervisor, Signal::SIGSTOP);
    for command in
        [vec!["jlist"], vec!["list"], vec!["ping"], vec!["stop", "job"], vec!["start", "ecosystem.toml"]]
    {
        let run = home.pm(&command);
        assert_eq!(run.code, 4, "{command:?}: {run:?}");
        assert!(run.took <= secs(6), "{command:?}: {run:?}");
    }
    process::signal(supervisor, Signal::SIGCONT);
    wait_until("it answers again", SOON, || {
        let run = home.pm(&["ping"]);
        if run.code == 0 { Ok(()) } else { Err(run) }
    });
}

#[test]
fn a_second_daemon_on_a_home_exits_5_and_names_the_first() {
    let home = Home::new();
    home.start(SLEEPER);
    let run = home.exits(5, &["daemon"]);
    run.says(&home.keeper().to_string());
    assert_eq!(home.row("job").status, "online");
}

#[test]
fn daemon_in_the_foreground_stays_there_and_sigterm_remembers_what_ran() {
    let home = Home::new();
    let daemon = Running::start(home.command(&["daemon"]), b"");
    wait_until("it answers", SOON, || {
        let run = home.pm(&["ping"]);
        if run.code == 0 { Ok(()) } else { Err(run) }
    });
    assert_eq!(home.keeper(), daemon.pid(), "the foreground process is the keeper");
    home.start(SLEEPER);
    home.ok(&["start", "sleep", "--name", "resting", "--", "1000"]);
    home.ok(&["stop", "resting"]);
    let app = home.pid("job");
    process::signal(daemon.pid(), Signal::SIGTERM);
    let run = daemon.end(SOON);
    assert_eq!(run.code, 0, "{run:?}");
    assert!(!process::alive(app));
    assert!(home.processes().is_empty(), "{}", home.process_list());

    // SIGTERM never changes the desired state: the next daemon restores it.
    let daemon = Running::start(home.command(&["daemon"]), b"");
    wait_until("the app is back", SOON, || {
        let run = home.pm(&["jlist"]);
        let text = run.text();
        if text.contains("\"online\"") && text.contains("\"stopped\"") { Ok(()) } else { Err(run) }
    });
    assert_eq!(home.row("job").status, "online");
    assert_eq!(home.row("resting").status, "stopped");
    home.ok(&["kill"]);
    daemon.end(SOON);
}

#[test]
fn pain_20_after_a_reboot_apps_are_running_or_stopped_as_desired_and_none_runs_twice() {
    let home = Home::new();
    home.start(SLEEPER);
    home.ok(&["start", "sleep", "--name", "resting", "--", "1000"]);
    home.ok(&["stop", "resting"]);
    // As when the machine went down: nobody lives on.
    home.power_cut();
    // The app is known by name although no daemon runs yet.
    home.ok(&["start", "job"]);
    home.wait_status("job", "online");
    assert_eq!(home.row("resting").status, "stopped");
    wait_until("one sleep runs", SOON, || {
        let sleeps: Vec<i32> = home
            .processes()
            .into_iter()
            .filter(|pid| process::cmdline(*pid).iter().any(|arg| arg == "1000"))
            .collect();
        if sleeps == [home.pid("job")] { Ok(()) } else { Err(home.process_list()) }
    });
}

#[test]
fn pain_18_fifty_mixed_requests_at_once_each_get_their_own_answer() {
    let home = Home::new();
    home.start(SLEEPER);
    let commands: Vec<(usize, Running)> = (0..50)
        .map(|n| {
            let args: &[&str] = match n % 4 {
                0 => &["jlist"],
                1 => &["pid", "job"],
                2 => &["ping"],
                _ => &["describe", "nobody"],
            };
            (n, Running::start(home.command(args), b""))
        })
        .collect();
    let pid = home.pid("job");
    for (n, command) in commands {
        let run = command.end(PATIENT);
        match n % 4 {
            0 => assert_eq!(run.json()[0]["pid"], pid),
            1 => assert_eq!(run.out.trim(), pid.to_string()),
            2 => assert_eq!(run.code, 0),
            _ => assert_eq!(run.code, 3),
        }
    }
}

#[test]
fn an_idle_daemon_costs_no_processor_time() {
    let home = Home::alone();
    home.start(
        "[[apps]]\nname = 'job'\nscript = 'sleep'\nargs = ['1000']\ninstances = 20\nexec_mode = 'fork'\n",
    );
    let daemon = [home.keeper(), home.supervisor()];
    let ticks = || daemon.iter().map(|pid| process::stat(*pid).unwrap().cpu_ticks).sum::<u64>();
    let before = ticks();
    super::support::stays("the daemon is idle", secs(5), || {
        // Ten milliseconds each: two per second would be 2 % of a core.
        let used = ticks() - before;
        if used <= 3 { Ok(()) } else { Err(used) }
    });
}

#[test]
fn pain_16_descriptors_and_threads_are_the_same_after_hundreds_of_crashes_and_rotations() {
    let home = Home::new();
    home.ecosystem(
        "[[apps]]\nname = 'crash'\nscript = 'sh'\nargs = ['-c', 'echo word; exit 1']\ninstances = 4\n\
         exec_mode = 'fork'\nrestart_delay = 1\nmax_restarts = 100000\n\
         [[apps]]\nname = 'talk'\nscript = 'sh'\nargs = ['-c', 'while echo word; do sleep 0.1; done']\n",
    );
    home.ok(&["start", "ecosystem.toml", "--no-wait"]);
    let (keeper, supervisor) = (home.keeper(), home.supervisor());
    let count = || {
        [keeper, supervisor].map(|pid| {
            (process::descriptors(pid).len(), fs::read_dir(format!("/proc/{pid}/task")).unwrap().count())
        })
    };
    let crashes = || home.rows_of("crash").iter().map(|row| row.restarts).sum::<i64>();
    let crash_on = |more: i64| {
        let goal = crashes() + more;
        wait_until("crashes", PATIENT, || {
            let now = crashes();
            if now >= goal { Ok(()) } else { Err(format!("{now} of {goal}")) }
        });
        home.ok(&["stop", "crash"]);
    };
    crash_on(20);
    let before = count();
    home.ok(&["start", "crash", "--no-wait"]);
    crash_on(300);
    let log = home.path().join("logs/talk-out.log");
    // A renamed file is noticed within a second (`bench/crash-restarts.py` has a hundred of them, and 10,000 crashes).
    for _ in 0..3 {
        fs::rename(&log, home.path().join("logs/talk-out.log.1")).unwrap();
        wait_until("the next file", SOON, || fs::metadata(&log).map_err(|error| error.to_string()));
    }
    wait_until("as many as before", SOON, || {
        let now = count();
        if now == before { Ok(()) } else { Err((before, now)) }
    });
    assert_eq!(process::children(keeper).len(), 2, "no zombies: {}", home.process_list());
}

#[test]
fn garbage_on_the_socket_disturbs_nobody() {
    let home = Home::new();
    home.start(SLEEPER);
    let pid = home.pid("job");
    let socket = home.path().join("pm.sock");
    let huge = vec![b'x'; 3_000_000];
    for garbage in
        [&b"\n\n\n"[..], b"\x00\xff\xfe{{{", b"{\"version\":1,\"re", b"GET / HTTP/1.1\r\n\r\n", &huge]
    {
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.set_read_timeout(Some(secs(10))).unwrap();
        stream.set_write_timeout(Some(secs(10))).unwrap();
        // Being cut off while writing is an answer, too.
        let _ = stream.write_all(garbage);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        match stream.read_to_end(&mut answer) {
            Ok(_) => {}
            Err(error) => {
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "it must close: {error}");
            }
        }
        assert_eq!(home.pid("job"), pid);
    }
    // Connections that say nothing do not keep others out.
    let silent: Vec<UnixStream> = (0..50).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    assert_eq!(home.pid("job"), pid);
    drop(silent);
}

#[test]
fn the_working_directory_of_the_daemon_is_the_root() {
    let home = Home::new();
    home.start(SLEEPER);
    for pid in [home.keeper(), home.supervisor()] {
        assert_eq!(fs::read_link(format!("/proc/{pid}/cwd")).unwrap().to_str(), Some("/"));
    }
    assert_eq!(fs::metadata(home.path().join("pm.lock")).unwrap().uid(), nix::unistd::getuid().as_raw());
}
