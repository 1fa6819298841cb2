//! The daemon becomes another program while everything runs: two real builds, in both directions and both mixes.

use std::fs;
use std::path::Path;

use nix::sys::signal::Signal;

use super::support::earlier::{PRESENT, another_build, earlier, impostor, program_of};
use super::support::home::Running;
use super::support::load::{Connections, Load};
use super::support::node::Node;
use super::support::wait::pause_for;
use super::support::{Home, PATIENT, Run, SOON, fixture, free_port, millis, process, secs, wait_until};

fn run_of(home: &Home, program: &str, args: &[&str]) -> Run {
    Running::start(home.command_of(program, args), b"").end(PATIENT)
}

/// Replaces the daemon by this program.
#[track_caller]
fn upgrade(home: &Home, program: &str) {
    let run = home.ok(&["upgrade", program]);
    run.says("every process has gone on");
    assert_eq!(program_of(home.supervisor()), Path::new(program));
    assert_eq!(program_of(home.keeper()), Path::new(program));
}

/// A cluster, a plain app that counts, and one that ends with a code of its own when it is told to.
fn apps(home: &Home, port: u16, balance: &str) -> String {
    home.write("count.sh", "i=0\nwhile [ $i -lt 100000 ]; do i=$((i+1)); echo $i; sleep 0.01; done\n");
    home.write("ends.sh", "trap 'exit 7' TERM\nwhile :; do sleep 0.05; done\n");
    format!(
        "[[apps]]\nname = 'web'\nscript = '{}'\nexec_mode = 'cluster'\ninstances = 2\nbalance = '{balance}'\n\
         interpreter = '{}'\nenv = {{ PORT = '{port}' }}\n\
         [[apps]]\nname = 'count'\nscript = 'count.sh'\n\
         [[apps]]\nname = 'ends'\nscript = 'ends.sh'\nautorestart = false\ninstances = 2\nexec_mode = 'fork'\n",
        fixture("web-textbook.js"),
        Node::installed().binary,
    )
}

fn identities(home: &Home) -> Vec<(i32, Option<u64>)> {
    home.rows().iter().map(|row| process::identity(row.pid)).collect()
}

/// What `count` has written is complete.
#[track_caller]
fn counted(home: &Home) -> usize {
    home.ok(&["stop", "count"]);
    let log = home.log("count-out.log");
    let numbers: Vec<usize> = log.lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(numbers, (1..=numbers.len()).collect::<Vec<_>>(), "no line is lost or twice");
    numbers.len()
}

/// Ends the instances of `ends`, and their exit code is theirs.
#[track_caller]
fn ends_with_its_own_code(home: &Home, slot: usize) {
    let row = home.rows_of("ends")[slot].clone();
    process::signal(row.pid, Signal::SIGTERM);
    let ended = wait_until("it has ended", SOON, || {
        let row = home.rows_of("ends")[slot].clone();
        if row.status == "stopped" { Ok(row) } else { Err(row) }
    });
    assert_eq!(ended.env("exit_code"), 7, "{ended:?}");
}

#[test]
fn pain_12_an_upgrade_under_load_keeps_every_pid_loses_no_request_and_no_line_and_knows_later_exit_codes() {
    let home = Home::alone();
    let before = earlier(&home);
    let port = free_port();
    home.ecosystem(&apps(&home, port, "round-robin"));
    assert_eq!(run_of(&home, &before, &["start", "ecosystem.toml"]).code, 0);
    assert_eq!(program_of(home.keeper()), Path::new(&before));
    let ran = identities(&home);
    let keeper = process::identity(home.keeper());
    let load = Load::start(port, 16, Connections::OnePerRequest);
    let kept = Load::start(port, 4, Connections::KeepAlive);
    load.more(200);
    for program in [PRESENT, &before, PRESENT] {
        upgrade(&home, program);
        load.more(250);
        assert_eq!(identities(&home), ran, "same pids and start ticks");
        assert_eq!(process::identity(home.keeper()), keeper, "the keeper is the same process");
    }
    // The next operations find everything as it was.
    home.ok(&["reload", "web"]);
    load.more(200);
    load.stop().lost_nothing(1000);
    kept.stop().lost_nothing(100);
    ends_with_its_own_code(&home, 0);
    assert!(counted(&home) > 100);
    home.ok(&["events", "--json"]).says("\"event\":\"daemon_upgraded\"");
}

#[test]
fn control_ending_the_daemon_and_starting_the_next_one_loses_requests() {
    let home = Home::alone();
    let port = free_port();
    home.start(&apps(&home, port, "round-robin"));
    let load = Load::start(port, 8, Connections::OnePerRequest);
    home.ok(&["kill"]);
    home.ok(&["resurrect"]);
    load.more(50);
    assert!(load.stop().failed() > 0, "the load finds what an upgrade must not do");
}

/// Everything that keeper and supervisor say to each other.
fn everything_works(home: &Home) {
    let web = home.pids("web");
    home.ok(&["restart", "ends"]);
    home.ok(&["reload", "web"]);
    home.ok(&["scale", "web", "3"]);
    assert_eq!(home.statuses("web"), ["online"; 3]);
    assert!(home.pids("web").iter().all(|pid| !web.contains(pid)));
    ends_with_its_own_code(home, 0);
    home.ok(&["scale", "web", "2"]);
    // Another supervisor of the same program takes over.
    let (pids, old) = (home.pids("web"), home.supervisor());
    let program = program_of(old);
    process::end(old);
    wait_until("the next supervisor", SOON, || {
        let run = home.pm(&["ping"]);
        if run.code == 0 && home.supervisor() != old { Ok(()) } else { Err(run) }
    });
    assert_eq!(program_of(home.supervisor()), program);
    assert_eq!(home.pids("web"), pids);
    ends_with_its_own_code(home, 1);
    counted(home);
}

#[test]
fn an_earlier_keeper_works_with_a_later_supervisor_and_the_other_way_round() {
    let home = Home::new();
    let before = earlier(&home);
    for (keeper, supervisor) in [(before.as_str(), PRESENT), (PRESENT, before.as_str())] {
        home.ecosystem(&apps(&home, free_port(), "round-robin"));
        assert_eq!(run_of(&home, keeper, &["start", "ecosystem.toml"]).code, 0);
        let ran = identities(&home);
        home.ok(&["upgrade", "--supervisor-only", supervisor]).says("the keeper is as it was");
        assert_eq!(program_of(home.keeper()), Path::new(keeper));
        assert_eq!(program_of(home.supervisor()), Path::new(supervisor));
        assert_eq!(identities(&home), ran);
        everything_works(&home);
        // What was left out is made up for.
        upgrade(&home, supervisor);
        home.ok(&["upgrade", supervisor]).says("already");
        home.ok(&["kill"]);
        let _ = fs::remove_dir_all(home.path().join("logs"));
    }
}

#[test]
fn a_supervisor_that_cannot_take_over_is_killed_and_the_one_before_goes_on() {
    let home = Home::new();
    let port = free_port();
    // Nobody accepts in between: they wait, and none is lost.
    home.start(&apps(&home, port, "round-robin"));
    let ran = identities(&home);
    let load = Load::start(port, 2, Connections::OnePerRequest);
    for (behaviour, why) in
        [("DIES", "3"), ("HANGS", "it did nothing for 2 s"), ("SPINS", "did not take over within 5 s")]
    {
        let program = impostor(&home, &behaviour.to_lowercase(), behaviour);
        let run = home.exits(1, &["upgrade", &program]);
        run.says(why).says("goes on, and nothing of the apps has changed");
        assert_eq!(identities(&home), ran);
        for pid in [home.keeper(), home.supervisor()] {
            assert_eq!(program_of(pid), Path::new(PRESENT));
        }
        assert_eq!(home.processes().iter().filter(|pid| program_of(**pid) == Path::new(&program)).count(), 0);
    }
    load.more(100);
    load.stop().lost_nothing(200);
    home.ok(&["events", "--json"]).says("\"event\":\"upgrade_failed\"");
    // The next one is none the worse for it.
    upgrade(&home, &another_build(&home, "next"));
    everything_works(&home);
}

#[test]
fn a_program_that_will_not_do_is_refused_before_anything_happens() {
    let home = Home::new();
    home.exits(0, &["upgrade"]).says("No daemon is running");
    home.exits(4, &["upgrade", "--check"]);
    home.start("[[apps]]\nname = 'plain'\nscript = 'sleep'\nargs = ['1000']\n");
    let daemon = (home.pid("plain"), home.keeper(), home.supervisor());
    home.exits(0, &["upgrade"]).says("already");
    home.write("empty", "");
    let script = home.write("script", "#!/bin/sh\necho pm 9.9.9\n");
    let arm = home.work_file("arm");
    let mut bytes = fs::read(impostor(&home, "pm-9", "DIES")).unwrap();
    home.exits(0, &["upgrade", "--check", "pm-9"]).says("would take over").says("9.9.9");
    // Its machine.
    bytes[18..20].copy_from_slice(&183_u16.to_le_bytes());
    fs::write(&arm, &bytes).unwrap();
    for name in ["empty", "script", "arm"] {
        use std::os::unix::fs::PermissionsExt as _;
        fs::set_permissions(home.work_file(name), fs::Permissions::from_mode(0o755)).unwrap();
    }
    home.write("not-executable", "x");
    let built = |name: &str, behaviour: &str| impostor(&home, name, behaviour);
    for (program, code, why) in [
        ("nowhere/pm".to_owned(), 2, "No such file or directory"),
        (".".to_owned(), 2, "it is not a file"),
        ("not-executable".to_owned(), 2, "it is not executable"),
        ("empty".to_owned(), 2, "it is not a program"),
        (script, 2, "it is not a program"),
        (arm, 2, "another kind of machine"),
        (built("other", "OTHER"), 2, "it is not pm: it says \"frobnicate 3.1\""),
        (built("old", "OLD"), 2, "pm 9.9.9 is too old to take over"),
        (built("mute", "MUTE"), 2, "it did not answer within 5 s"),
        (built("refuses", "REFUSES"), 1, "state.json is of version 7"),
    ] {
        home.exits(code, &["upgrade", &program]).says(why);
    }
    assert_eq!((home.pid("plain"), home.keeper(), home.supervisor()), daemon, "nothing has happened");
    home.ok(&["events", "--json"]).does_not_say("upgrade");
}

#[test]
fn a_reload_and_a_log_that_is_followed_go_on_over_an_upgrade() {
    let home = Home::new();
    home.start(&apps(&home, free_port(), "round-robin"));
    // It boots when the test lets it.
    let gate = home.write("gate", "");
    home.start(&format!(
        "[[apps]]\nname = 'gated'\nscript = '{}'\nexec_mode = 'cluster'\ninstances = 2\nwait_ready = true\n\
         listen_timeout = '60s'\nenv = {{ PORT = '{}', GATE = '{gate}', HOLD = '{gate}.none', LIFE = '{}' }}\n",
        fixture("gated.js"),
        free_port(),
        home.work_file("life")
    ));
    let before = home.pids("gated");
    fs::remove_file(&gate).unwrap();
    let follows = Running::start(home.command(&["logs", "count", "--raw"]), b"");
    let mut reload = Running::start(home.command(&["reload", "gated"]), b"");
    wait_until("the reload has begun", SOON, || {
        let life = home.read("life");
        if life.matches("boot").count() == 3 { Ok(()) } else { Err(life) }
    });
    let program = another_build(&home, "next");
    // Two at once: one of them does it, the other one finds it done or under way.
    let [one, two] = [(), ()].map(|()| Running::start(home.command(&["upgrade", &program]), b""));
    let mut codes = [one, two].map(|run| run.end(PATIENT).code);
    assert!(!reload.is_done(), "the upgrade was in the middle of it");
    codes.sort_unstable();
    assert!(codes == [0, 0] || codes == [0, 5], "{codes:?}");
    assert_eq!(program_of(home.keeper()), Path::new(&program));
    home.write("gate", "");
    let reload = reload.end(PATIENT);
    assert_eq!(reload.code, 0, "{reload:#?}");
    assert_eq!(home.read("life").matches("boot").count(), 4, "nothing was started twice");
    let after = home.pids("gated");
    assert!(after.len() == 2 && after.iter().all(|pid| !before.contains(pid)), "{before:?} {after:?}");

    let seen = home.log("count-out.log").lines().count();
    home.log_with("count-out.log", &format!("\n{}\n", seen + 20));
    process::signal(follows.pid(), Signal::SIGTERM);
    let follows = follows.end(SOON);
    assert!(follows.out.contains(&format!("\n{}\n", seen + 1)), "it followed what came after the upgrade");
}

#[test]
fn supervisor_or_keeper_killed_at_any_moment_of_an_upgrade_leaves_a_daemon_with_every_app() {
    let home = Home::new();
    let next = another_build(&home, "next");
    home.start(&apps(&home, free_port(), "round-robin"));
    let ran = identities(&home);
    for round in 0..10_u64 {
        // Later in every round, and in turn.
        let program = if program_of(home.supervisor()) == Path::new(&next) { PRESENT } else { &next };
        let victim = if round.is_multiple_of(2) { home.supervisor() } else { home.keeper() };
        let upgrade = Running::start(home.command(&["upgrade", program]), b"");
        pause_for(millis(round * 12));
        process::end(victim);
        let run = upgrade.end(PATIENT);
        assert!([0, 1, 4].contains(&run.code), "round {round}: {run:#?}");
        wait_until("a daemon answers", PATIENT, || {
            let run = home.pm(&["ping"]);
            let (keepers, supervisors) = count(&home);
            if run.code == 0 && (keepers, supervisors) == (1, 1) { Ok(()) } else { Err(home.process_list()) }
        });
        assert_eq!(identities(&home), ran, "round {round}");
    }
    upgrade(&home, &another_build(&home, "last"));
    home.ok(&["reload", "web"]);
    counted(&home);
}

fn count(home: &Home) -> (usize, usize) {
    let count = |word: &str| {
        let is = |pid: &i32| process::cmdline(*pid).iter().skip(1).any(|arg| arg == word);
        home.processes().iter().filter(|pid| is(pid)).count()
    };
    (count("daemon"), count("supervisor"))
}

/// What `bench/upgrade.py` does for long.
#[test]
fn descriptors_and_memory_are_the_same_after_many_upgrades() {
    let home = Home::new();
    home.start(&apps(&home, free_port(), "round-robin"));
    let next = another_build(&home, "next");
    let used = |home: &Home| [home.keeper(), home.supervisor()].map(|pid| process::descriptors(pid).len());
    upgrade(&home, &next);
    upgrade(&home, PRESENT);
    let first = used(&home);
    for _ in 0..3 {
        upgrade(&home, &next);
        upgrade(&home, PRESENT);
    }
    wait_until("as many descriptors as before", secs(5), || {
        let now = used(&home);
        if now == first { Ok(()) } else { Err(format!("{first:?} {now:?}")) }
    });
}
