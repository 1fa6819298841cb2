//! `events`: what happened, when, to which run; complete over reloads and over the death of the supervisor.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt as _;

use nix::sys::signal::Signal;
use serde_json::Value;

use super::support::home::Running;
use super::support::{Home, PATIENT, SOON, process, wait_until};

/// The timer keeps it until it is told to end: without listeners it may have ended by itself before.
const WEB: &str = "require('http').createServer((_, answer) => answer.end()).listen(0, '127.0.0.1');\n\
                   setInterval(() => {}, 1000);\n";

fn cluster(home: &Home, lines: &str) {
    home.write("web.js", WEB);
    home.ecosystem(&format!("[[apps]]\nname = 'web'\nscript = 'web.js'\nexec_mode = 'cluster'\n{lines}\n"));
}

fn events(home: &Home, args: &[&str]) -> Vec<Value> {
    let args: Vec<&str> = ["events", "--json"].into_iter().chain(args.iter().copied()).collect();
    let run = home.ok(&args);
    let parse = |line: &str| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    run.out.lines().map(parse).collect()
}

fn text<'a>(event: &'a Value, key: &str) -> &'a str {
    event[key].as_str().unwrap_or_default()
}

/// How many instances of `web` are in rotation after each event from `since` on, and the lowest of these numbers.
fn replay(events: &[Value], since: u64) -> (usize, usize) {
    let mut ready: BTreeSet<(u64, u64)> = BTreeSet::new();
    let mut least = usize::MAX;
    for event in events {
        let run = (event["slot"].as_u64().unwrap_or(0), event["generation"].as_u64().unwrap_or(0));
        match text(event, "event") {
            "in_rotation" => {
                ready.insert(run);
            }
            "out_of_rotation" => {
                ready.remove(&run);
            }
            _ => {}
        }
        if event["seq"].as_u64().unwrap() >= since {
            least = least.min(ready.len());
        }
    }
    (least, ready.len())
}

#[test]
fn ready_workers_replayed_from_the_events_never_fall_below_what_the_reload_promises() {
    for (rules, instances, floor) in [
        ("", 3, 3),
        ("max_surge = 2", 3, 3),
        ("max_surge = 0\nmax_unavailable = 1", 3, 2),
        ("max_surge = '50%'\nmin_healthy = '50ms'", 2, 2),
        ("strategy = 'blue-green'", 2, 2),
    ] {
        let home = Home::new();
        cluster(&home, &format!("instances = {instances}\n{rules}"));
        home.ok(&["start", "ecosystem.toml"]);
        let since = events(&home, &[]).last().unwrap()["seq"].as_u64().unwrap();
        home.ok(&["reload", "web"]);
        home.ok(&["reload", "web"]);
        let all = events(&home, &[]);
        let (least, at_the_end) = replay(&all, since);
        assert!(least >= floor, "{rules}: {least} of {instances} are in rotation, {floor} are promised");
        assert_eq!(at_the_end, instances, "{rules}");
        let came = all.iter().filter(|event| text(event, "event") == "in_rotation").count();
        assert_eq!(came, instances * 3, "{rules}: the start and two reloads");
        // The control: a restart has nobody in rotation for a while, and the replay sees it.
        let since = all.last().unwrap()["seq"].as_u64().unwrap();
        home.ok(&["restart", "web"]);
        assert_eq!(replay(&events(&home, &[]), since), (0, instances), "{rules}");
    }
}

#[test]
fn events_are_numbered_and_stamped_and_say_which_run_and_which_operation() {
    let home = Home::new();
    cluster(&home, "instances = 2");
    home.ok(&["start", "ecosystem.toml"]);
    home.ok(&["reload", "web"]);
    let all = events(&home, &[]);
    for (index, event) in all.iter().enumerate() {
        assert_eq!(event["seq"], index + 1);
        let time = text(event, "time");
        // RFC 3339 with microseconds, in UTC.
        let shape: String = time.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
        assert_eq!(shape, "0000-00-00T00:00:00.000000Z");
        assert!(event["mono_ns"].as_u64().is_some(), "{event}");
    }
    let sorted = |key: &str| all.is_sorted_by(|a, b| a[key].as_str() <= b[key].as_str());
    assert!(sorted("time"), "{all:#?}");
    let begun: Vec<&Value> = all.iter().filter(|event| text(event, "event") == "operation_begun").collect();
    let ended: Vec<&Value> = all.iter().filter(|event| text(event, "event") == "operation_ended").collect();
    assert_eq!(begun.iter().map(|event| text(event, "verb")).collect::<Vec<_>>(), ["start", "reload"]);
    let reload = text(begun[1], "op");
    assert_eq!((text(ended[1], "op"), &ended[1]["ok"]), (reload, &Value::Bool(true)));
    let of_reload: Vec<&Value> =
        all.iter().filter(|event| text(event, "op") == reload && event["slot"] == 0).collect();
    let names: Vec<&str> = of_reload.iter().map(|event| text(event, "event")).collect();
    for name in [
        "launching",
        "spawned",
        "ready",
        "in_rotation",
        "out_of_rotation",
        "draining",
        "signalled",
        "exited",
        "gone",
    ] {
        assert!(names.contains(&name), "{name} is missing: {names:?}");
    }
    let spawned = of_reload.iter().find(|event| text(event, "event") == "spawned").unwrap();
    assert_eq!(
        (&spawned["generation"], spawned["pid"].as_i64()),
        (&2.into(), Some(home.rows_of("web")[0].pid.into()))
    );
    let mode = std::fs::metadata(home.path().join("events.jsonl")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    // What is chosen.
    assert_eq!(events(&home, &["-n", "1"]), [all.last().unwrap().clone()]);
    assert_eq!(events(&home, &["--since", "1h"]).len(), all.len());
    assert!(events(&home, &["--since", text(all.last().unwrap(), "time")]).len() < 3);
    assert!(events(&home, &["nobody"]).is_empty());
    assert!(events(&home, &["/^we/"]).iter().all(|event| event.to_string().contains("web")));
    home.exits(2, &["events", "--since", "yesterdayish"]).says("is no time");
    home.ok(&["events", "web"]).says("web:0 #2").says("in rotation").does_not_say("\u{1b}");
    home.ok(&["kill"]);
    // The file is there without a daemon too.
    let after = events(&home, &[]);
    assert_eq!(after[..all.len()], all[..]);
    assert!(after.len() > all.len());
}

#[test]
fn crashes_restarts_and_kills_are_events_with_their_reasons() {
    let home = Home::new();
    let stubborn = "script = 'sh'\nargs = ['-c', 'trap \"\" INT; touch deaf; while :; do sleep 1; done']\nkill_timeout = '100ms'\n";
    home.ecosystem(&format!(
        "[[apps]]\nname = 'deaf'\n{stubborn}\n[[apps]]\nname = 'job'\nscript = 'sh'\nargs = ['-c', 'exit 3']\n\
         ready = {{ log = 'up' }}\nlisten_timeout = '60s'\nmax_restarts = 2\nrestart_delay = 10\n"
    ));
    home.exits(1, &["start", "ecosystem.toml"]);
    home.wait_status("job", "errored");
    let job = events(&home, &["job"]);
    let find = |name: &str| {
        job.iter().find(|event| text(event, "event") == name).unwrap_or_else(|| panic!("no {name}: {job:#?}"))
    };
    assert_eq!(text(find("crashed"), "reason"), "exit code 3");
    assert_eq!(find("restart_scheduled")["in_ms"], 10);
    assert_eq!(text(find("errored"), "reason"), "exit code 3");
    home.file_with("deaf", "");
    wait_until("the trap is set", SOON, || home.work().join("deaf").is_file().then_some(()).ok_or("no file"));
    home.ok(&["stop", "deaf"]);
    let deaf = events(&home, &["deaf"]);
    assert!(deaf.iter().any(|event| text(event, "event") == "killed"), "{deaf:#?}");
    home.ok(&["events", "deaf"]).says("killed after");
}

/// Killed at many points of a reload: every number once, and each operation has its result.
#[test]
fn events_survive_the_death_of_the_supervisor_without_gaps_or_doubles() {
    let home = Home::new();
    cluster(&home, "instances = 2");
    home.ok(&["start", "ecosystem.toml"]);
    let launches = |home: &Home| events(home, &[]).iter().filter(|e| text(e, "event") == "launching").count();
    for round in 0..4 {
        let before = launches(&home);
        let reload = Running::start(home.command(&["reload", "web"]), b"");
        // Once after the first new worker, once after the second, and so on.
        wait_until("the reload is on its way", SOON, || {
            let now = launches(&home);
            if now > before + round % 2 { Ok(()) } else { Err(now) }
        });
        process::signal(home.supervisor(), Signal::SIGKILL);
        let run = reload.end(PATIENT);
        assert_eq!(run.code, 0, "{run:#?}");
    }
    // The last one may still be taking over.
    let all = wait_until("four supervisors were started again", SOON, || {
        let all = events(&home, &[]);
        let deaths = all.iter().filter(|event| text(event, "event") == "supervisor_restarted").count();
        if deaths == 4 { Ok(all) } else { Err(deaths) }
    });
    let numbers: Vec<u64> = all.iter().map(|event| event["seq"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (1..=all.len() as u64).collect::<Vec<_>>());
    let ops = |name: &str| -> Vec<&str> {
        all.iter().filter(|event| text(event, "event") == name).map(|event| text(event, "op")).collect()
    };
    let ended = ops("operation_ended");
    for op in ops("operation_begun") {
        assert_eq!(ended.iter().filter(|other| **other == op).count(), 1, "{op} has one result: {all:#?}");
    }
    let (_, at_the_end) = replay(&all, 0);
    assert_eq!(at_the_end, 2);
}

#[test]
fn follow_goes_on_with_what_happens_next() {
    let home = Home::new();
    home.ecosystem("[[apps]]\nname = 'job'\nscript = 'sleep'\nargs = ['1000']\n");
    home.ok(&["start", "ecosystem.toml"]);
    let mut follow = home.command(&["events", "--json", "-f", "job"]);
    let out = std::fs::File::create(home.work_file("followed")).unwrap();
    let mut child = follow.stdout(out).spawn().unwrap();
    home.file_with("followed", "\"spawned\"");
    home.ok(&["restart", "job"]);
    home.file_with("followed", "\"verb\":\"restart\"");
    let text = home.file_with("followed", "\"generation\":2");
    child.kill().unwrap();
    child.wait().unwrap();
    let numbers: Vec<u64> =
        text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()?["seq"].as_u64()).collect();
    assert!(numbers.is_sorted_by(|a, b| a < b), "{numbers:?}");
}
