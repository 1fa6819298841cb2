//! Keeper and supervisor die together, or end and come back: nothing runs twice, and what was wanted comes back.

use std::fs;

use nix::sys::signal::Signal;

use super::support::{Home, SOON, process, secs, wait_until};

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

#[test]
fn a_killed_keeper_takes_the_supervisor_along_and_nothing_runs_twice_afterwards() {
    let home = Home::new();
    two_apps(&home);
    process::end(home.keeper());
    wait_until("the supervisor ends", SOON, || {
        if home.has_daemon() { Err(home.process_list()) } else { Ok(()) }
    });
    home.ok(&["start", "ecosystem.toml"]);
    home.wait_status("plain", "online");
    home.wait_status("family", "online");
    let tokens: Vec<String> = instances(&home).into_iter().map(|(token, _)| token).collect();
    let count = |app: &str| {
        let of_app = tokens.iter().filter(|token| token.starts_with(&format!("{app}:")));
        of_app.collect::<std::collections::BTreeSet<_>>().len()
    };
    assert_eq!((count("plain"), count("family"), count("down")), (1, 1, 1), "{tokens:?}");
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
