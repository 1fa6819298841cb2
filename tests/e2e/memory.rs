//! Memory limits: who crosses `max_memory_restart` is replaced as in a reload, and a limit is changed without one.

use std::collections::BTreeSet;

use serde_json::Value;

use super::support::home::Running;
use super::support::load::{Connections, Load};
use super::support::{Home, PATIENT, fixture, free_port, millis, process, secs, stays, wait_until};

/// The limit of the apps here: a Node process and a small child are below it, one with the large child is not.
const LIMIT: u64 = 150 << 20;

/// A server whose child eats when the file `eat-<slot>-<generation>` appears; itself it stays as it is. With GATED in its
/// environment only the first generation boots before the file `gate` is there.
fn server(home: &Home, keys: &str) -> u16 {
    let port = free_port();
    home.write(
        "web.js",
        &format!(
            "const fs = require('fs');\n\
             const gated = process.env.GATED && process.env.PM_GENERATION > 1;\n\
             const boot = () => (!gated || fs.existsSync('gate') ? require('{}') : setTimeout(boot, 10));\n\
             boot();\n\
             const wish = `eat-${{process.env.NODE_APP_INSTANCE}}-${{process.env.PM_GENERATION}}`;\n\
             const hungry = setInterval(() => {{\n\
               if (!fs.existsSync(wish)) return;\n\
               clearInterval(hungry);\n\
               const eat = \"x = b'x' * (160 << 20); import time; time.sleep(1000)\";\n\
               require('child_process').spawn('python3', ['-c', eat], {{ stdio: 'ignore' }});\n\
             }}, 20).unref();\n",
            fixture("web-textbook.js")
        ),
    );
    home.write("gated.env", "GATED=yes\n");
    home.ecosystem(&file(port, keys));
    home.ok(&["start", "ecosystem.toml"]);
    port
}

fn file(port: u16, keys: &str) -> String {
    format!(
        "[[apps]]\nname = 'web'\nscript = 'web.js'\nexec_mode = 'cluster'\nenv = {{ PORT = '{port}' }}\n{keys}\n"
    )
}

fn events(home: &Home) -> Vec<Value> {
    let run = home.ok(&["events", "--json"]);
    run.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn number(event: &Value, key: &str) -> u64 {
    event[key].as_u64().unwrap_or_default()
}

fn of_kind<'a>(events: &'a [Value], kind: &str) -> Vec<&'a Value> {
    events.iter().filter(|event| event["event"] == kind).collect()
}

fn resident(pid: i32) -> u64 {
    let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0) * 4096
}

/// Waits until none of these processes is an app's any more and every row is online, nothing draining.
fn replaced(home: &Home, old: &[i32]) -> Vec<i32> {
    wait_until("they are replaced", PATIENT, || {
        let rows = home.rows_of("web");
        let fine = rows.iter().all(|row| {
            row.status == "online"
                && !old.contains(&row.pid)
                && row.pm("draining").as_array().unwrap().is_empty()
        });
        if fine { Ok(rows.iter().map(|row| row.pid).collect()) } else { Err(home.ok(&["list"]).out) }
    })
}

#[test]
fn pain_24_crossing_the_limit_replaces_one_worker_at_a_time_and_no_request_fails() {
    let home = Home::loaded();
    let port = server(&home, "instances = 3\nmax_memory_restart = '150M'\nkill_timeout = '20s'");
    let old = home.pids("web");
    let load = Load::start(port, 4, Connections::KeepAlive);
    load.more(300);
    for slot in 0..3 {
        home.write(&format!("eat-{slot}-1"), "");
    }
    let new = replaced(&home, &old);
    load.more(700);
    load.stop().lost_nothing(1000);

    let all = events(&home);
    let exceeded = of_kind(&all, "memory_exceeded");
    assert_eq!(exceeded.len(), 3, "{exceeded:#?}");
    for event in &exceeded {
        assert!(number(event, "bytes") > LIMIT && number(event, "limit") == LIMIT, "{event}");
    }
    // The whole tree was counted: no main process is anywhere near its limit.
    assert!(new.iter().all(|pid| resident(*pid) < LIMIT), "{new:?}");
    // One at a time: from the launch of a successor until the old one is gone no other is launched.
    let mut under_way: BTreeSet<u64> = BTreeSet::new();
    let (mut ready, mut least) = (0_usize, usize::MAX);
    let first = number(exceeded[0], "seq");
    for event in &all {
        let kind = event["event"].as_str().unwrap();
        match kind {
            "in_rotation" => ready += 1,
            "out_of_rotation" => ready -= 1,
            _ => {}
        }
        if number(event, "seq") < first {
            continue;
        }
        least = least.min(ready);
        match kind {
            "launching" => assert!(under_way.insert(number(event, "slot")), "{event}"),
            "gone" => assert!(under_way.remove(&number(event, "slot")), "{event}"),
            _ => {}
        }
        assert!(under_way.len() <= 1, "two at a time: {under_way:?} at {event}");
    }
    assert_eq!((least, ready), (3, 3), "in rotation all the time");
    let gone = of_kind(&all, "exited");
    assert!(
        gone.len() == 3 && gone.iter().all(|event| event["reason"] == "over its memory limit"),
        "{gone:#?}"
    );
    for row in home.rows_of("web") {
        assert_eq!((row.restarts, row.env("unstable_restarts")), (1, &Value::from(0)), "no crash");
        assert_eq!(row.env("exit_reason"), "over its memory limit");
        assert_eq!(row.env("max_memory_restart"), LIMIT);
    }
    home.ok(&["events"]).says("of memory, over its limit of 150M");

    // Control: what ends a process at its limit at once, as the kernel does, costs requests.
    let load = Load::start(port, 4, Connections::KeepAlive);
    load.more(300);
    for pid in new {
        process::end(pid);
        load.more(100);
    }
    let tally = load.stop();
    eprintln!("control: {tally:?}");
    assert!(tally.failed() > 0, "this load would see nothing: {tally:?}");
}

#[test]
fn pain_24_the_limit_is_editable_live_and_a_changed_limit_restarts_nothing() {
    let home = Home::new();
    let port = server(&home, "instances = 2\nmax_memory_restart = '1T'");
    let old = home.pids("web");
    home.write("eat-0-1", "");
    wait_until("the child has eaten", PATIENT, || {
        let memory = home.rows_of("web")[0].entry["monit"]["memory"].as_u64().unwrap();
        if memory > LIMIT { Ok(()) } else { Err(memory) }
    });
    let apply = |limit: &str| {
        home.ecosystem(&file(port, &format!("instances = 2\n{limit}")));
        home.ok(&["apply", "ecosystem.toml"])
    };
    apply("max_memory_restart = '2T'").says("max_memory_restart");
    let was_left_alone = || {
        let rows = home.rows_of("web");
        let same = rows.iter().map(|row| row.pid).eq(old.iter().copied());
        if same && rows.iter().all(|row| row.restarts == 0) { Ok(()) } else { Err(rows) }
    };
    was_left_alone().unwrap();
    // Without a limit nobody is measured, and no thread is there to do it.
    apply("").says("max_memory_restart");
    stays("nobody is replaced", secs(3), was_left_alone);
    assert_eq!(watchers(&home), 0);
    apply("max_memory_restart = '150M'");
    assert_eq!(watchers(&home), 1);
    let new = wait_until("the one above it is replaced", PATIENT, || {
        let pids = home.pids("web");
        if pids[0] == old[0] { Err(pids) } else { Ok(pids) }
    });
    assert_eq!(new[1], old[1], "the other one is below it");
    assert_eq!(of_kind(&events(&home), "memory_exceeded").len(), 1);
    // The command line says the same.
    home.ok(&["start", "web.js", "--name", "web", "--max-memory-restart", "900M"]);
    assert_eq!(home.rows_of("web")[1].env("max_memory_restart"), 900_u64 << 20);
    assert_eq!(home.pids("web")[1], old[1]);
    home.ok(&["describe", "web"]).says("900M, replaced when above");
}

/// Threads of the supervisor that measure memory.
fn watchers(home: &Home) -> usize {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", home.supervisor())).unwrap();
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
    names.filter(|name| name.trim() == "memory").count()
}

#[test]
fn pain_24_a_memory_trigger_during_a_reload_waits_and_is_moot() {
    let home = Home::new();
    server(
        &home,
        "instances = 2\nmax_memory_restart = '150M'\nlisten_timeout = '60s'\nenv_file = 'gated.env'",
    );
    let old = home.pids("web");
    let launched = |count: usize| {
        wait_until("so many launches", PATIENT, || {
            let events = events(&home);
            let launches = of_kind(&events, "launching").len();
            if launches == count { Ok(()) } else { Err(launches) }
        });
    };
    let reload = Running::start(home.command(&["reload", "web"]), b"");
    launched(3);
    home.write("eat-1-1", "");
    wait_until("it is over its limit", PATIENT, || {
        let rows = home.rows_of("web");
        if rows[1].pm("over_memory").as_u64().is_some_and(|bytes| bytes > LIMIT) { Ok(()) } else { Err(rows) }
    });
    home.ok(&["list"]).says("over its limit of 150M");
    stays("the reload is not disturbed", secs(1), || {
        let pids = home.pids("web");
        if pids == old { Ok(()) } else { Err(pids) }
    });
    launched(3);
    home.write("gate", "");
    let run = reload.end(PATIENT);
    assert_eq!(run.code, 0, "{run:?}");
    replaced(&home, &old);
    // Three samples later everybody has had the chance to do it twice.
    stays("nothing is left to do", secs(3), || {
        let restarts: Vec<i64> = home.rows_of("web").iter().map(|row| row.restarts).collect();
        if restarts == [1, 1] { Ok(()) } else { Err(restarts) }
    });
    launched(4);
    let all = events(&home);
    let reasons: Vec<&Value> = of_kind(&all, "exited").iter().map(|event| &event["reason"]).collect();
    assert!(reasons.len() == 2 && reasons.iter().all(|reason| **reason == "exit code 0"), "{reasons:?}");
}

#[test]
fn pain_24_a_supervisor_that_is_killed_is_followed_by_one_that_measures_on() {
    let home = Home::new();
    server(&home, "instances = 2\nmax_memory_restart = '150M'");
    let old = home.pids("web");
    home.write("eat-1-1", "");
    // In the middle of it, wherever that is.
    for _ in 0..3 {
        process::end(home.supervisor());
        stays("a moment passes", millis(700), || Ok::<(), ()>(()));
    }
    let new = wait_until("it is replaced", PATIENT, || {
        let pids = home.pids("web");
        if pids[1] == old[1] { Err(pids) } else { Ok(pids) }
    });
    assert_eq!(new[0], old[0]);
    wait_until("the old one is gone", PATIENT, || {
        let row = home.rows_of("web").remove(1);
        if row.env("exit_reason") == "over its memory limit" { Ok(()) } else { Err(row.entry) }
    });
}
