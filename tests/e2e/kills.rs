//! The supervisor is killed at random, in the middle of whatever it does: the small sister of `bench/kills.py`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::Signal;

use super::support::home::Running;
use super::support::load::{Connections, Load};
use super::support::wait::pause_for;
use super::support::{Home, PATIENT, SOON, free_port, millis, process, secs, stays, wait_until};

/// Says 3 MB over its channel again and again, in messages that are known by their number, and `"ready"` in between.
const TALKER: &str = "let n = 0;\n\
     const text = 'x'.repeat(3000000);\n\
     const say = () => process.send({ n: n += 1, text }, () => setTimeout(say, 5));\n\
     say();\n\
     process.send('ready');\n";

fn web(port: u16, balance: &str) -> String {
    format!(
        "[[apps]]\nname = 'web'\nscript = '{}'\nexec_mode = 'cluster'\ninstances = 2\nbalance = '{balance}'\n\
         env = {{ PORT = '{port}' }}\n",
        super::support::fixture("web-textbook.js")
    )
}

fn identities(home: &Home, apps: &[&str]) -> Vec<(i32, Option<u64>)> {
    apps.iter().flat_map(|app| home.pids(app)).map(process::identity).collect()
}

/// Kills the supervisor so many times, each time at another moment.
fn kill_at_random(home: &Home, times: u64) {
    let mut moment = 17;
    for kill in 1..=times {
        if kill % 4 == 0 {
            // After five quick deaths in a row it would be started without what it remembered.
            pause_for(secs(3));
        }
        moment = (moment * 131 + 7) % 211;
        pause_for(millis(moment));
        kill_one(home);
    }
}

fn kill_one(home: &Home) {
    let supervisor = wait_until("a supervisor", PATIENT, || {
        let found = process::children(home.keeper())
            .into_iter()
            .find(|pid| process::cmdline(*pid).iter().any(|arg| arg == "supervisor"));
        found.ok_or_else(|| home.process_list())
    });
    process::end(supervisor);
}

#[test]
fn pain_13_a_mixed_load_survives_a_supervisor_that_is_killed_at_random() {
    let home = Home::loaded();
    let port = free_port();
    home.write("talker.js", TALKER);
    home.write("lines.sh", "n=0\nwhile :; do n=$((n+1)); echo line $n; sleep 0.005; done\n");
    home.start(&format!(
        "{}[[apps]]\nname = 'talker'\nscript = 'talker.js'\nwait_ready = true\n\
         [[apps]]\nname = 'lines'\nscript = 'lines.sh'\n\
         [[apps]]\nname = 'one'\nscript = 'sleep'\nargs = ['1000']\n\
         [[apps]]\nname = 'two'\nscript = 'sleep'\nargs = ['1000']\n",
        web(port, "shared")
    ));
    let lasting = ["web", "talker", "lines"];
    let before = identities(&home, &lasting);
    let load = Load::start(port, 8, Connections::OnePerRequest);
    load.more(100);
    let home = Arc::new(home);
    let over = Arc::new(AtomicBool::new(false));
    let commands = {
        let (home, over) = (Arc::clone(&home), Arc::clone(&over));
        std::thread::spawn(move || {
            let steps: [&[&str]; 6] = [
                &["stop", "one"],
                &["restart", "two"],
                &["start", "one"],
                &["scale", "two", "2"],
                &["restart", "one"],
                &["scale", "two", "1"],
            ];
            let mut rounds = 0;
            while !over.load(Ordering::Relaxed) {
                for step in steps {
                    // It waits for the true end, whichever supervisor knows of it.
                    let run = Running::start(home.command(step), b"").end(PATIENT);
                    assert_eq!(run.code, 0, "{step:?}: {run:#?}");
                }
                rounds += 1;
            }
            rounds
        })
    };
    kill_at_random(&home, 8);
    over.store(true, Ordering::Relaxed);
    assert!(commands.join().unwrap() >= 1);
    load.more(300);
    load.stop().lost_nothing(1000);
    assert_eq!(identities(&home, &lasting), before, "same pids and start times");
    let running: BTreeMap<String, String> =
        home.rows().into_iter().map(|row| (format!("{}:{}", row.name, row.slot), row.status)).collect();
    let wanted = ["lines:0", "one:0", "talker:0", "two:0", "web:0", "web:1"];
    assert_eq!(running, wanted.map(|slot| (slot.to_owned(), "online".to_owned())).into());
    let tokens: Vec<String> = home
        .processes()
        .into_iter()
        .filter_map(|pid| process::environ(pid).remove("PM_INSTANCE"))
        .filter(|token| !token.starts_with("lines:"))
        .collect();
    assert_eq!(tokens.len(), 5, "nothing runs twice: {tokens:?}");
}

#[test]
fn control_the_same_load_notices_a_worker_that_is_killed() {
    let home = Home::loaded();
    let port = free_port();
    home.start(&web(port, "shared"));
    let before = identities(&home, &["web"]);
    let load = Load::start(port, 8, Connections::OnePerRequest);
    load.more(100);
    for _ in 0..10 {
        process::signal(home.pids("web")[0], Signal::SIGKILL);
        wait_until("both are back", PATIENT, || {
            let seen = home.statuses("web");
            if seen == ["online", "online"] { Ok(()) } else { Err(seen) }
        });
        load.more(50);
    }
    let tally = load.stop();
    assert!(tally.failed() > 0, "the load shows nothing: {tally:?}");
    assert_ne!(identities(&home, &["web"]), before);
}

#[test]
fn long_messages_are_skipped_and_counted_over_the_death_of_the_supervisor() {
    let home = Home::new();
    home.write(
        "long.js",
        "const text = 'x'.repeat(17 * 1024 * 1024);\n\
         let left = 3;\n\
         const say = () => process.send(text, () => (left -= 1) ? say() : process.send('ready'));\n\
         say();\n\
         setInterval(() => {}, 1000);\n",
    );
    home.ecosystem(
        "[[apps]]\nname = 'long'\nscript = 'long.js'\nwait_ready = true\nlisten_timeout = '60s'\n",
    );
    let starting = Running::start(home.command(&["start", "ecosystem.toml"]), b"");
    wait_until("it runs", SOON, || {
        let seen = home.process_list();
        if home.has_daemon() && seen.contains("long.js") { Ok(()) } else { Err(seen) }
    });
    kill_at_random(&home, 3);
    let run = starting.end(PATIENT);
    assert_eq!(run.code, 0, "what is behind the long messages is read: {run:#?}");
    let row = home.row("long");
    assert_eq!(
        (row.status.as_str(), row.restarts),
        ("online", 0),
        "half a message would have looked like others"
    );
    home.ok(&["describe", "long"]).says("3 messages of more than 16 MiB");
}

#[test]
fn a_shell_being_stopped_follows_its_command_also_with_the_next_supervisor() {
    let home = Home::new();
    // The loop goes on without the signal, for as long as it is let.
    home.write("loop.sh", "while :; do sleep 1000; done\n");
    home.start("[[apps]]\nname = 'loop'\nscript = 'loop.sh'\nkill_timeout = '50s'\n");
    let shell = home.pid("loop");
    let command = |pid: i32| process::children(pid).into_iter().next();
    let first = wait_until("it sleeps", SOON, || command(shell).ok_or(()));
    let stopping = Running::start(home.command(&["stop", "loop"]), b"");
    // The command has its signal; the shell gets it 300 ms later, from somebody who is no more.
    wait_until("the command ends", SOON, || {
        if process::alive(first) { Err(home.process_list()) } else { Ok(()) }
    });
    process::end(home.supervisor());
    let run = stopping.end(secs(30));
    assert_eq!(run.code, 0, "{run:#?}");
    assert!(!process::alive(shell));
    run.does_not_say("killed after");
}

#[test]
fn a_supervisor_that_dies_again_and_again_is_started_with_backoff_and_everybody_is_told() {
    let home = Home::new();
    home.start("[[apps]]\nname = 'one'\nscript = 'sleep'\nargs = ['1000']\n");
    let one = process::identity(home.pid("one"));
    let told = home.wear_out_supervisors();
    told.says("has ended").says("pm.log");
    for command in [&["ping"][..], &["describe", "one"]] {
        home.ok(command).says("without what it remembered");
    }
    assert_eq!(process::identity(home.pid("one")), one);
    let log = home.read("../home/pm.log");
    assert!(log.contains("next one in 0 ms") && log.contains("next one in 400 ms"), "{log}");
    // It lives, so it has what it needs, and works.
    stays("it lives on", secs(1), || Ok::<_, ()>(()));
    home.ok(&["restart", "one"]);
    assert_eq!(home.row("one").status, "online");
}

#[test]
fn a_hang_up_ends_the_daemon_also_when_the_supervisor_that_heard_of_it_dies() {
    let home = Home::new();
    home.write("slow.sh", "trap 'sleep 1; exit 0' INT\nwhile :; do sleep 0.05; done\n");
    let daemon = Running::start(home.command(&["daemon"]), b"");
    wait_until("it answers", SOON, || {
        let run = home.pm(&["ping"]);
        if run.code == 0 { Ok(()) } else { Err(run) }
    });
    home.start("[[apps]]\nname = 'slow'\nscript = 'slow.sh'\n");
    process::signal(daemon.pid(), Signal::SIGHUP);
    wait_until("it is stopping", SOON, || {
        let log = home.read("../home/events.jsonl");
        if log.contains("daemon_ending") { Ok(()) } else { Err(log) }
    });
    process::end(home.supervisor());
    assert_eq!(daemon.end(PATIENT).code, 0);
    assert!(home.processes().is_empty(), "{}", home.process_list());
}

#[test]
fn pain_13_output_of_an_app_breaks_no_pipe_while_nobody_reads_it() {
    let home = Home::new();
    home.write("lines.sh", "n=0\nwhile :; do n=$((n+1)); echo line $n; echo $n > count; sleep 0.01; done\n");
    home.start("[[apps]]\nname = 'lines'\nscript = 'lines.sh'\n");
    let pid = process::identity(home.pid("lines"));
    let goes_on = |what: &str| {
        let count = || home.read("count").trim().parse::<u64>().unwrap_or(0);
        let before = count();
        wait_until(what, SOON, || if count() > before + 20 { Ok(()) } else { Err(count()) });
    };
    // First without a supervisor, then without anybody.
    let (keeper, supervisor) = (home.keeper(), home.supervisor());
    process::signal(keeper, Signal::SIGSTOP);
    process::end(supervisor);
    goes_on("it writes without a supervisor");
    process::end(keeper);
    goes_on("it writes without a daemon");
    assert_eq!(process::identity(pid.0), pid);
    // The next daemon cannot read what it says any more, and starts another one in its place.
    home.ok(&["start", "lines"]);
    assert!(!process::alive(pid.0));
}

#[test]
fn pain_17_list_stop_and_logs_start_no_daemon() {
    let home = Home::new();
    for command in
        [&["list"][..], &["jlist"], &["stop", "all"], &["stop", "api"], &["logs", "--nostream"], &["ping"]]
    {
        home.pm(command);
        assert!(!home.has_daemon(), "{command:?}: {}", home.process_list());
    }
}

#[test]
fn pain_17_a_stale_pid_of_somebody_else_is_never_signalled() {
    let home = Home::new();
    home.start("[[apps]]\nname = 'one'\nscript = 'sleep'\nargs = ['1000']\n");
    let row = home.row("one");
    // The machine goes down, and what is left on disk names a process that is somebody else's by now.
    for pid in [home.keeper(), home.supervisor(), row.pid] {
        process::end(pid);
    }
    let mut innocent = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
    std::fs::write(home.path().join(format!("pids/one-{}.pid", row.id)), innocent.id().to_string()).unwrap();
    home.ok(&["start", "one"]);
    home.ok(&["stop", "one"]);
    home.ok(&["delete", "one"]);
    home.ok(&["kill"]);
    let alive = innocent.try_wait().unwrap().is_none();
    innocent.kill().unwrap();
    innocent.wait().unwrap();
    assert!(alive);
}
