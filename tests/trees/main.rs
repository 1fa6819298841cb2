//! Trees of real processes: who belongs to an instance, who gets the stop signal, and that nothing survives.
//!
//! Every test runs in a process of its own, which plays the keeper: a child subreaper and the parent of the instances.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in helpers as well")]

mod keeper;
mod sampling;

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pm::model::signal::Signal;
use pm::model::spec::KillMode;
use pm::sys::procfs::{ProcessId, Procfs};
use pm::sys::tree::worker::{Instance, Outcome, TreeOp};
use pm::sys::tree::{Scanner, Snapshot};

use keeper::{PATIENCE, as_keeper, await_empty, me, reap_orphans, wait_for};

const END: TreeOp = TreeOp::EndLeftovers { signal: Signal::TERM, grace: Duration::from_secs(1) };

/// Listens, says its port, and says goodbye on SIGINT.
const SERVER: &str = "
const fs = require('fs');
process.on('SIGINT', () => { fs.writeFileSync('handled', 'SIGINT\\n'); process.exit(0); });
require('net').createServer().listen(0, '127.0.0.1', function () {
  fs.writeFileSync('port', this.address().port + '\\n');
});
";

fn port_is_free(port: &str) {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port.parse().unwrap())).unwrap();
}

#[test]
fn npm_start_passes_the_signal_to_the_app_itself() {
    as_keeper("npm_start_passes_the_signal_to_the_app_itself", |keeper| {
        keeper.file("server.js", SERVER);
        keeper.file(
            "package.json",
            r#"{"name":"x","version":"1.0.0","scripts":{"start":"node server.js; true"}}"#,
        );
        let app = keeper.start(&["npm", "start"]);
        let port = keeper.said("port");
        assert_eq!(keeper.living(&app), ["node", "npm start", "sh"]);
        assert_eq!(keeper.stop(&app).len(), 1);
        keeper.ask_until_empty(&app, await_empty());
        assert_eq!(keeper.said("handled"), "SIGINT");
        port_is_free(&port);
    });
}

#[test]
fn npx_and_a_shell_pass_the_signal_to_the_app_itself() {
    as_keeper("npx_and_a_shell_pass_the_signal_to_the_app_itself", |keeper| {
        keeper.file("server.js", SERVER);
        for command in [&["npx", "-c", "node server.js"][..], &["sh", "-c", "node server.js; true"]] {
            let app = keeper.start(command);
            let port = keeper.said("port");
            assert_eq!(keeper.stop(&app).len(), 1);
            keeper.ask_until_empty(&app, await_empty());
            assert_eq!(keeper.said("handled"), "SIGINT");
            port_is_free(&port);
            for file in ["port", "handled"] {
                fs::remove_file(keeper.dir.path().join(file)).unwrap();
            }
        }
    });
}

#[test]
fn a_shell_with_two_children_is_told_with_them() {
    as_keeper("a_shell_with_two_children_is_told_with_them", |keeper| {
        for mode in [KillMode::Target, KillMode::Group] {
            let app = keeper.start(&["sh", "-c", "sleep 1000 & sleep 1000; true"]);
            keeper.wait_for_living(&app, &["sh", "sleep", "sleep"]);
            let told = keeper.ask(&app, TreeOp::Stop { mode, signal: Signal::TERM });
            assert!(matches!(&told, Outcome::Signalled(pids) if pids.len() == 3), "{told:?}");
            keeper.ask_until_empty(&app, await_empty());
        }
        let app = keeper.start(&["sh", "-c", "sh -c 'sleep 1000; true' | sleep 1000"]);
        keeper.wait_for_living(&app, &["sh", "sh", "sleep", "sleep"]);
        let told = keeper.ask(&app, TreeOp::Stop { mode: KillMode::Target, signal: Signal::TERM });
        assert!(matches!(&told, Outcome::Signalled(pids) if pids.len() == 4), "{told:?}");
        keeper.ask_until_empty(&app, await_empty());
    });
}

/// A shell that loops around short commands never sees a signal that only its command gets.
#[test]
fn a_loop_in_a_shell_ends_soon_after_its_command() {
    as_keeper("a_loop_in_a_shell_ends_soon_after_its_command", |keeper| {
        for shell in ["sh", "bash"] {
            let app = keeper.start(&[shell, "-c", "while :; do sleep 1000; done"]);
            keeper.wait_for_living(&app, &[shell, "sleep"]);
            assert_eq!(keeper.stop(&app).len(), 1);
            keeper.ask_until_empty(&app, await_empty());
        }
    });
}

#[test]
fn nothing_of_an_exited_main_process_escapes() {
    as_keeper("nothing_of_an_exited_main_process_escapes", |keeper| {
        for command in [
            "sleep 1000 & exec sleep 2000",
            "setsid sleep 1000 & exec sleep 2000",
            "(sleep 1000 &); exec sleep 2000",
            "(setsid sleep 1000 &); exec sleep 2000",
            // The environment is gone, but not the session.
            "(env -i sleep 1000 &); exec sleep 2000",
            // Neither token nor session, but a parent that has both.
            "sh -c 'env -i setsid sleep 1000; true' & exec sleep 2000",
        ] {
            let app = keeper.start(&["sh", "-c", command]);
            let expected =
                if command.contains("sh -c") { &["sh", "sleep", "sleep"][..] } else { &["sleep", "sleep"] };
            keeper.wait_for_living(&app, expected);
            keeper.kill_main(&app);
            assert_eq!(keeper.living(&app).len(), expected.len() - 1, "{command}");
            // The same without `children` files, and when the instance was adopted from another keeper.
            let roots = std::slice::from_ref(&app.root);
            for (mut scanner, keeper) in
                [(Scanner::without_children_files(), me()), (Scanner::new(), i32::MAX)]
            {
                let snapshot = Snapshot::take(&mut scanner, keeper, roots).unwrap();
                assert_eq!(snapshot.trees[0].living().count(), expected.len() - 1, "{command}");
            }
            keeper.ask_until_empty(&app, END);
        }
    });
}

#[test]
fn kill_all_ends_every_shape_of_tree_with_its_main_alive() {
    as_keeper("kill_all_ends_every_shape_of_tree_with_its_main_alive", |keeper| {
        let mut apps = Vec::new();
        for command in [
            "trap '' INT TERM; (setsid sh -c \"trap '' INT TERM; sleep 1000; true\" &); sleep 1000; true",
            "sh -c 'env -i setsid sleep 1000; true' & exec sleep 2000",
            "exec sleep 2000",
        ] {
            apps.push(keeper.start(&["sh", "-c", command]));
        }
        keeper.wait_for_living(&apps[0], &["sh", "sh", "sleep", "sleep"]);
        keeper.wait_for_living(&apps[1], &["sh", "sleep", "sleep"]);
        for app in &apps {
            keeper.worker.ask(app.clone(), TreeOp::KillAll);
        }
        for _ in &apps {
            let event = keeper.events.recv_timeout(PATIENCE).unwrap();
            assert!(matches!(event.outcome, Outcome::Empty), "{event:?}");
        }
        for app in &apps {
            assert_eq!(keeper.living(app), [""; 0]);
        }
    });
}

#[test]
fn what_ignores_the_signal_is_killed_after_the_grace_period() {
    as_keeper("what_ignores_the_signal_is_killed_after_the_grace_period", |keeper| {
        let app = keeper.start(&[
            "sh",
            "-c",
            "(trap '' INT TERM; exec setsid sleep 1000) & trap 'exit 3' TERM; sleep 1000",
        ]);
        keeper.wait_for_living(&app, &["sh", "sleep", "sleep"]);
        keeper.kill_main(&app);
        let grace = Duration::from_millis(300);
        let took = keeper.ask_until_empty(&app, TreeOp::EndLeftovers { signal: Signal::INT, grace });
        assert!(took >= grace, "{took:?}");
    });
}

#[test]
fn nobody_waits_for_another_instance() {
    as_keeper("nobody_waits_for_another_instance", |keeper| {
        let stubborn = keeper.start(&["sh", "-c", "(trap '' TERM; sleep 1000; true) & exec sleep 2000"]);
        keeper.wait_for_living(&stubborn, &["sh", "sleep", "sleep"]);
        keeper.kill_main(&stubborn);
        let other = keeper.start(&["sleep", "1000"]);
        let grace = TreeOp::EndLeftovers { signal: Signal::TERM, grace: Duration::from_secs(60) };
        keeper.worker.ask(stubborn.clone(), grace);
        keeper.worker.ask(stubborn.clone(), await_empty());
        let took = keeper.ask_until_empty(&other, TreeOp::KillAll);
        assert!(took < Duration::from_secs(1), "{took:?}");
        // KillAll cuts the grace period short, and everybody who waits is told.
        keeper.worker.ask(stubborn.clone(), TreeOp::KillAll);
        for _ in 0..3 {
            let event = keeper.events.recv_timeout(PATIENCE).unwrap();
            assert!(event.id == stubborn.id && matches!(event.outcome, Outcome::Empty), "{event:?}");
        }
    });
}

#[test]
fn an_exited_instance_without_leftovers_is_answered_at_once() {
    as_keeper("an_exited_instance_without_leftovers_is_answered_at_once", |keeper| {
        let app = keeper.start(&["sleep", "1000"]);
        keeper.kill_main(&app);
        let took = (0..5).map(|_| keeper.ask_until_empty(&app, END)).min().unwrap();
        println!("answered after {took:?}");
        assert!(took < Duration::from_millis(10), "{took:?}");
    });
}

#[test]
fn a_tree_that_keeps_forking_is_caught() {
    as_keeper("a_tree_that_keeps_forking_is_caught", |keeper| {
        // Each process starts the next and exits, at most 5,000 times; another one collects children.
        let chain = "
import os
open('chain', 'w').write('on\\n')
for _ in range(5000):
    if os.fork():
        os._exit(0)
    os.setsid()
";
        let crowd = "
import os, time
for n in range(200):
    if os.fork() == 0:
        time.sleep(1000)
    if n == 50:
        open('crowd', 'w').write('on\\n')
    time.sleep(0.005)
time.sleep(1000)
";
        let mains = Arc::new(Mutex::new(Vec::new()));
        reap_orphans(Arc::clone(&mains));
        for (file, code) in [("crowd", crowd), ("chain", chain)] {
            let begin = Instant::now();
            let mut mains = mains.lock().unwrap();
            let app = keeper.start(&["python3", "-c", code]);
            mains.push(app.root.main.pid);
            drop(mains);
            keeper.said(file);
            for _ in 0..100 {
                let roots = std::slice::from_ref(&app.root);
                let snapshot = Snapshot::take(&mut keeper.scanner, me(), roots).unwrap();
                assert!(
                    !snapshot.settled || !snapshot.trees[0].is_empty(),
                    "something lives, but nothing is seen"
                );
            }
            let took = keeper.ask_until_empty(&app, TreeOp::KillAll);
            println!("{file}: {took:?} of {:?}", Instant::now() - begin);
        }
    });
}

#[test]
fn the_port_of_a_daemonized_grandchild_is_free_afterwards() {
    as_keeper("the_port_of_a_daemonized_grandchild_is_free_afterwards", |keeper| {
        keeper.file(
            "listen.py",
            "
import socket, signal, threading
signal.signal(signal.SIGINT, signal.SIG_IGN)
s = socket.socket()
s.bind(('127.0.0.1', 0))
s.listen()
open('port', 'w').write('%d\\n' % s.getsockname()[1])
signal.pause()
",
        );
        let app = keeper.start(&["sh", "-c", "(setsid python3 listen.py &); exec sleep 1000"]);
        let port = keeper.said("port");
        TcpListener::bind((Ipv4Addr::LOCALHOST, port.parse().unwrap())).unwrap_err();
        keeper.ask_until_empty(&app, TreeOp::KillAll);
        port_is_free(&port);
    });
}

#[test]
fn an_orphan_that_matches_nothing_is_listed_and_left_alone() {
    as_keeper("an_orphan_that_matches_nothing_is_listed_and_left_alone", |keeper| {
        let app = keeper.start(&["sh", "-c", "(env -i setsid sleep 1000 &); exec sleep 2000"]);
        let other = keeper.start(&["sleep", "3000"]);
        let mut found: Option<ProcessId> = None;
        wait_for("the orphan", || {
            let roots = [app.root.clone(), other.root.clone()];
            let snapshot = Snapshot::take(&mut keeper.scanner, me(), &roots).unwrap();
            found = match snapshot.unattributed.as_slice() {
                [one] if one.comm.as_bytes() == b"sleep" => Some(one.process),
                _ => None,
            };
            found.is_some()
        });
        let orphan = found.unwrap();
        keeper.ask_until_empty(&app, TreeOp::KillAll);
        let mut procfs = Procfs::new();
        assert!(procfs.stat(orphan.pid).unwrap().unwrap().alive());
        assert_eq!(keeper.living(&other), ["sleep"]);
        pm::sys::tree::pidfd::signal_process(&mut procfs, orphan, &[9]).unwrap();
    });
}

#[test]
fn a_reused_pid_is_never_signalled() {
    as_keeper("a_reused_pid_is_never_signalled", |keeper| {
        let app = keeper.start(&["sleep", "1000"]);
        let mut stale = app.clone();
        stale.root.main.start_ticks -= 1;
        stale.root.token = "tree:0:0:0".to_owned();
        for mode in [KillMode::Target, KillMode::Group, KillMode::Main] {
            let told = keeper.ask(&stale, TreeOp::Stop { mode, signal: Signal::KILL });
            assert!(matches!(&told, Outcome::Signalled(pids) if pids.is_empty()), "{told:?}");
        }
        let outcome = keeper.ask(&stale, TreeOp::KillAll);
        assert!(matches!(outcome, Outcome::Empty), "{outcome:?}");
        assert_eq!(keeper.living(&app), ["sleep"]);
    });
}

#[test]
fn many_instances_end_together_and_cheaply() {
    as_keeper("many_instances_end_together_and_cheaply", |keeper| {
        let apps: Vec<Instance> = (0..100).map(|_| keeper.start(&["sleep", "1000"])).collect();
        let cpu = worker_cpu();
        for app in &apps {
            keeper.worker.ask(app.clone(), TreeOp::Stop { mode: KillMode::Target, signal: Signal::TERM });
            keeper.worker.ask(app.clone(), await_empty());
        }
        let mut empty = 0;
        while empty < apps.len() {
            let event = keeper.events.recv_timeout(PATIENCE).unwrap();
            match event.outcome {
                Outcome::Empty => empty += 1,
                Outcome::Signalled(pids) => assert_eq!(pids.len(), 1),
                other => panic!("{other:?}"),
            }
        }
        let used = worker_cpu() - cpu;
        println!("100 instances stopped: {used:?} of CPU");
        // 50 ms is the aim of a release build.
        assert!(used < Duration::from_millis(250), "{used:?}");

        let apps: Vec<Instance> = (0..100).map(|_| keeper.start(&["sleep", "1000"])).collect();
        let cpu = worker_cpu();
        for app in &apps {
            keeper.worker.ask(app.clone(), TreeOp::KillAll);
        }
        for _ in &apps {
            let event = keeper.events.recv_timeout(PATIENCE).unwrap();
            assert!(matches!(event.outcome, Outcome::Empty), "{event:?}");
        }
        let used = worker_cpu() - cpu;
        println!("100 instances killed: {used:?} of CPU");
        assert!(used < Duration::from_millis(250), "{used:?}");
    });
}

/// CPU time of the worker's thread, from /proc/self/task/TID/schedstat.
fn worker_cpu() -> Duration {
    for task in fs::read_dir("/proc/self/task").unwrap() {
        let path = task.unwrap().path();
        if read(&path.join("comm")).trim() == "tree" {
            let nanos = read(&path.join("schedstat")).split_whitespace().next().unwrap().parse().unwrap();
            return Duration::from_nanos(nanos);
        }
    }
    panic!("no worker thread");
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}
