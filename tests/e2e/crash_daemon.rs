//! Keeper and supervisor die together, or end and come back: nothing runs twice, and what was wanted comes back.

use std::fs;

use nix::sys::signal::Signal;

use super::support::home::Running;
use super::support::wait::pause_for;
use super::support::{Home, PATIENT, SOON, free_port, millis, process, secs, wait_until};

fn two_apps(home: &Home) {
    home.write("family.sh", "sh -c 'while :; do sleep 0.1; done' & while :; do sleep 0.1; done\n");
    home.start(
        "[[apps]]\nname = 'plain'\nscript = 'sleep'\nargs = ['1000']\n\
         [[apps]]\nname = 'family'\nscript = 'family.sh'\n\
         [[apps]]\nname = 'down'\nscript = 'sleep'\nargs = ['1001']\n",
    );
    home.ok(&["stop", "down"]);
}

/// Every living process of an instance, by the token it was started with.
fn instances(home: &Home) -> Vec<(String, i32)> {
    let mut found: Vec<(String, i32)> = home
        .processes()
        .into_iter()
        .filter_map(|pid| {
            let token = process::environ(pid).into_iter().find(|(key, _)| key == "PM_INSTANCE")?.1;
            Some((token, pid))
        })
        .collect();
    found.sort();
    found
}

#[test]
fn a_killed_daemon_leaves_orphans_that_end_before_their_apps_start_again() {
    let home = Home::new();
    two_apps(&home);
    let before = instances(&home);
    assert!(before.len() >= 3, "{before:?}");
    let (keeper, supervisor) = (home.keeper(), home.supervisor());
    // The other order would start another supervisor.
    process::signal(keeper, Signal::SIGSTOP);
    process::end(supervisor);
    process::end(keeper);
    assert!(!instances(&home).is_empty(), "fork-mode apps go on without a daemon");
    home.ok(&["start", "ecosystem.toml", "--only", "plain"]);
    let old: Vec<i32> = before.iter().map(|(_, pid)| *pid).collect();
    let left: Vec<i32> = old.iter().copied().filter(|pid| process::alive(*pid)).collect();
    assert!(left.is_empty(), "still there: {left:?}");
    home.wait_status("plain", "online");
    home.wait_status("family", "online");
    assert_eq!(home.row("down").status, "stopped");
    let tokens: Vec<String> = instances(&home).into_iter().map(|(token, _)| token).collect();
    assert_eq!(tokens.iter().filter(|token| token.starts_with("plain:")).count(), 1, "{tokens:?}");
    home.ok(&["list"]).says("the daemon before this one was killed");
}

/// The keeper that follows `before`, with its supervisor.
fn next_daemon(home: &Home, before: (i32, i32)) -> (i32, i32) {
    wait_until("the next keeper and its supervisor", PATIENT, || {
        let seen = home.process_list();
        let daemon = home.pm(&["ping"]);
        let pids: Vec<i32> = daemon.out.split([' ', ',']).filter_map(|word| word.parse().ok()).collect();
        match pids.as_slice() {
            [keeper, supervisor] if *keeper != before.0 && *supervisor != before.1 => {
                Ok((*keeper, *supervisor))
            }
            _ => Err(seen),
        }
    })
}

#[test]
fn a_killed_keeper_is_replaced_and_every_app_keeps_its_pid_and_its_connections() {
    let home = Home::new();
    home.write("count.sh", "i=0\nwhile [ $i -lt 100000 ]; do i=$((i+1)); echo $i; sleep 0.05; done\n");
    home.write(
        "server.js",
        "require('http').createServer((q, r) => r.end(String(process.pid))).listen(+process.env.PORT, '127.0.0.1');",
    );
    let port = free_port();
    home.start(&format!(
        "[[apps]]\nname = 'plain'\nscript = 'sleep'\nargs = ['1000']\n\
         [[apps]]\nname = 'count'\nscript = 'count.sh'\n\
         [[apps]]\nname = 'web'\nscript = 'server.js'\ninstances = 2\nenv = {{ PORT = '{port}' }}\n\
         [[apps]]\nname = 'down'\nscript = 'sleep'\nargs = ['1001']\n"
    ));
    home.ok(&["stop", "down"]);
    let before = instances(&home);
    let ask = || -> String {
        use std::io::{Read as _, Write as _};
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    };
    let mut daemon = (home.keeper(), home.supervisor());
    for _ in 0..4 {
        process::signal(daemon.0, Signal::SIGKILL);
        // Nobody is there to accept: the client waits, and is served by the worker that it would have had before.
        assert!(ask().starts_with("HTTP/1.1 200"));
        daemon = next_daemon(&home, daemon);
        let now = instances(&home);
        // The counting shell has a `sleep` most of the time.
        let mains = before.iter().filter(|one| home.rows().iter().any(|row| row.pid == one.1));
        assert_eq!(mains.clone().count(), 4, "{before:?}");
        assert!(mains.clone().all(|one| now.contains(one)), "{before:?} {now:?}");
        let tokens = |all: &[(String, i32)]| -> std::collections::BTreeSet<String> {
            all.iter().map(|(token, _)| token.clone()).collect()
        };
        assert_eq!(tokens(&now), tokens(&before), "nothing runs twice");
    }
    assert_eq!(home.row("down").status, "stopped");

    // What ends now is noticed although it is nobody's child here, and counts as what it was.
    let plain = home.pid("plain");
    process::end(plain);
    wait_until("it is started again", SOON, || {
        let row = home.row("plain");
        if row.pid != plain && row.status == "online" { Ok(()) } else { Err(format!("{row:?}")) }
    });
    home.ok(&["describe", "plain"]).says("SIGKILL");
    home.ok(&["reload", "web"]);
    assert!(ask().starts_with("HTTP/1.1 200"));
    home.ok(&["stop", "count"]);
    let log = home.log("count-out.log");
    let numbers: Vec<usize> = log.lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(numbers, (1..=numbers.len()).collect::<Vec<_>>(), "no line is lost or twice");
}

#[test]
fn a_keeper_killed_while_apps_start_stop_and_reload_leaves_what_was_wanted() {
    let home = Home::new();
    let app = |name: &str| {
        format!(
            "[[apps]]\nname = '{name}'\nscript = 'sleep'\nargs = ['1000']\ninstances = 3\nexec_mode = 'fork'\n"
        )
    };
    home.ecosystem(&["a", "b", "c"].map(app).concat());
    home.ok(&["start", "ecosystem.toml"]);
    let mut daemon = (home.keeper(), home.supervisor());
    for (round, command) in
        [["restart", "a"], ["stop", "b"], ["start", "b"], ["restart", "c"], ["stop", "a"], ["start", "a"]]
            .iter()
            .enumerate()
    {
        // Later in every round: before it is read, in the middle, when it is over.
        let running = Running::start(home.command(command), b"");
        pause_for(millis(round as u64 * 4));
        process::signal(daemon.0, Signal::SIGKILL);
        let run = running.end(PATIENT);
        assert_eq!(run.code, 0, "{command:?}: {run:#?}");
        daemon = next_daemon(&home, daemon);
    }
    wait_until("all are online", SOON, || {
        let seen: Vec<String> = ["a", "b", "c"].iter().flat_map(|app| home.statuses(app)).collect();
        if seen.len() == 9 && seen.iter().all(|status| status == "online") { Ok(()) } else { Err(seen) }
    });
    let tokens: Vec<String> = instances(&home).into_iter().map(|(token, _)| token).collect();
    let slots: std::collections::BTreeSet<String> =
        tokens.iter().map(|token| token.split(':').take(2).collect::<Vec<_>>().join(":")).collect();
    assert_eq!((tokens.len(), slots.len()), (9, 9), "each slot runs once: {tokens:?}");
}

#[test]
fn another_home_s_processes_are_left_alone() {
    let (ours, theirs) = (Home::new(), Home::new());
    ours.start("[[apps]]\nname = 'plain'\nscript = 'sleep'\nargs = ['1000']\n");
    let pid = ours.pid("plain");
    theirs.start("[[apps]]\nname = 'plain'\nscript = 'sleep'\nargs = ['1000']\n");
    assert!(process::alive(pid));
    assert_eq!(ours.pid("plain"), pid);
}

#[test]
fn sigterm_stops_apps_by_the_ladder_and_the_next_daemon_restores_them() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let home = Home::new();
        home.write("polite.sh", "trap 'echo bye; exit 0' INT\nwhile :; do sleep 0.05; done\n");
        home.start(
            "[[apps]]\nname = 'polite'\nscript = 'polite.sh'\n\
             [[apps]]\nname = 'down'\nscript = 'sleep'\nargs = ['1001']\n",
        );
        home.ok(&["stop", "down"]);
        let pid = home.pid("polite");
        let keeper = home.keeper();
        process::signal(keeper, signal);
        wait_until("the daemon is gone", SOON, || {
            if home.has_daemon() { Err(home.process_list()) } else { Ok(()) }
        });
        assert!(!process::alive(pid));
        assert!(home.log("polite-out.log").contains("bye"), "the handler ran");
        home.ok(&["resurrect"]);
        let row = home.wait_status("polite", "online");
        assert_ne!(row.pid, pid);
        assert_eq!(home.row("down").status, "stopped", "the desired state is as it was");
    }
}

#[test]
fn kill_and_start_in_turn_never_meet() {
    let home = Home::new();
    home.ecosystem("[[apps]]\nname = 'plain'\nscript = 'sleep'\nargs = ['1000']\n");
    for _ in 0..8 {
        home.ok(&["start", "ecosystem.toml"]);
        assert_eq!(instances(&home).len(), 1);
        home.ok(&["kill"]);
        assert!(instances(&home).is_empty());
    }
}

#[test]
fn a_home_without_its_socket_is_reachable_after_the_supervisor_s_death() {
    let home = Home::new();
    home.start("[[apps]]\nname = 'plain'\nscript = 'sleep'\nargs = ['1000']\n");
    let pid = home.pid("plain");
    let supervisor = home.supervisor();
    fs::remove_file(home.path().join("pm.sock")).unwrap();
    process::end(supervisor);
    wait_until("the socket is back", secs(5), || {
        let run = home.pm(&["ping"]);
        if run.code == 0 { Ok(()) } else { Err(run) }
    });
    assert_eq!(home.pid("plain"), pid);
}
