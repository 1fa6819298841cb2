//! `depends_on`: who waits for whom at the start, who goes last at the stop, and what is said meanwhile.

use nix::sys::signal::Signal;
use serde_json::Value;

use super::support::home::Running;
use super::support::{Home, PATIENT, SOON, millis, process, stays, wait_until};

/// Ready as soon as there is a file `go`.
const SLOW_DB: &str = "[[apps]]\nname = 'db'\nscript = 'sh'\n\
    args = ['-c', 'while [ ! -e go ]; do sleep 0.02; done; echo >&$PM_READY_FD; exec sleep 1000']\n\
    wait_ready = true\nkill_timeout = '2s'\n";

fn needing(name: &str, lines: &str) -> String {
    format!("[[apps]]\nname = '{name}'\nscript = 'sleep'\nargs = ['1000']\n{lines}\n")
}

fn web_needs_db() -> String {
    // In the file after the one that needs it: the order comes from the keys.
    format!("{}{SLOW_DB}", needing("web", "depends_on = { db = 'ready' }\ninstances = 2"))
}

/// What happened to which app, in order.
fn story(home: &Home, wanted: &[&str]) -> Vec<String> {
    home.ok(&["events", "--json"])
        .out
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .filter_map(|event| {
            let name = event["event"].as_str()?.to_owned();
            let app = event["app"].as_str()?.to_owned();
            wanted.contains(&name.as_str()).then(|| format!("{app} {name}"))
        })
        .collect()
}

#[track_caller]
fn comes_before(story: &[String], first: &str, second: &str) {
    let last = story.iter().rposition(|line| line == first);
    let next = story.iter().position(|line| line == second);
    assert!(last.is_some() && next.is_some() && last < next, "{first} before {second}: {story:#?}");
}

#[test]
fn pain_32_depends_on_ready_orders_the_start_and_reverses_the_stop() {
    let home = Home::new();
    home.ecosystem(&web_needs_db());
    let start = Running::start(home.command(&["start", "ecosystem.toml"]), b"");
    wait_until("web waits", SOON, || {
        let text = home.pm(&["describe", "web"]).out;
        if text.contains("launching (waiting for db)") { Ok(()) } else { Err(text) }
    });
    assert!(home.rows_of("web").iter().all(|row| row.pid == 0), "no process while it waits");
    home.write("go", "");
    assert_eq!(start.end(PATIENT).code, 0);
    comes_before(&story(&home, &["ready", "spawned"]), "db ready", "web spawned");
    home.ok(&["stop", "all"]);
    comes_before(&story(&home, &["gone", "signalled"]), "web gone", "db signalled");
    // The same for the saved list, and for the end of everything.
    home.ok(&["start", "all"]);
    home.ok(&["kill"]);
    let before = story(&home, &["ready", "spawned", "gone", "signalled"]);
    comes_before(&before[before.len() - 6..], "web gone", "db signalled");
    home.ok(&["resurrect"]);
    let after = story(&home, &["ready", "spawned"]);
    comes_before(&after[after.len() - 6..], "db ready", "web spawned");
}

#[test]
fn pain_32_crash_of_db_does_not_restart_dependents() {
    let home = Home::new();
    home.write("go", "");
    home.ecosystem(&web_needs_db());
    home.ok(&["start", "ecosystem.toml"]);
    let (web, db) = (home.pids("web"), home.pid("db"));
    process::signal(db, Signal::SIGKILL);
    home.wait_row("db", "back", |row| row.status == "online" && row.pid != db);
    assert_eq!(home.pids("web"), web);
    // And one that crashes while db is away does not wait for it: it was up already.
    std::fs::remove_file(home.work_file("go")).unwrap();
    home.ok(&["restart", "db", "--no-wait"]);
    process::signal(web[0], Signal::SIGKILL);
    wait_until("web is back", SOON, || {
        let rows = home.rows_of("web");
        if rows.iter().all(|row| row.status == "online" && row.pid != web[0]) { Ok(()) } else { Err(rows) }
    });
    assert_eq!(home.row("db").status, "launching");
}

#[test]
fn pain_32_cycles_are_rejected_when_the_file_is_read_and_shown_with_their_lines() {
    let home = Home::new();
    home.ecosystem(&format!(
        "{}{}",
        needing("web", "depends_on = ['db']"),
        needing("db", "depends_on = ['web']")
    ));
    for command in ["start", "apply", "check", "reload"] {
        home.exits(2, &[command, "ecosystem.toml"])
            .says("these apps wait for each other: web → db → web")
            .says("web waits for db (line 5), db waits for web (line 10)");
    }
    home.ecosystem(&needing("web", "depends_on = ['dbx']"));
    home.exits(2, &["start", "ecosystem.toml"]).says("the file has no app \"dbx\" to depend on");
    assert!(!home.has_daemon());
    // A circle over several files is found by the daemon.
    home.ecosystem(&format!("{}{}", needing("web", "depends_on = ['db']"), needing("db", "")));
    home.ok(&["start", "ecosystem.toml"]);
    let pids = (home.pids("web"), home.pids("db"));
    home.write("other.toml", &format!("{}{}", needing("db", "depends_on = ['web']"), needing("web", "")));
    home.exits(2, &["reload", "other.toml", "--only", "db"]).says("`db` → `web` → `db`");
    assert_eq!((home.pids("web"), home.pids("db")), pids);
}

#[test]
fn pain_32_stop_of_a_waiting_app_is_immediate_and_a_restart_makes_no_second_one() {
    let home = Home::new();
    home.ecosystem(&web_needs_db());
    home.ok(&["start", "ecosystem.toml", "--no-wait"]);
    wait_until("web waits", SOON, || {
        let table = home.pm(&["list"]).out;
        if table.contains("waiting for db") { Ok(()) } else { Err(table) }
    });
    let run = home.ok(&["stop", "web"]);
    assert!(run.took < super::support::secs(5), "{run:?}");
    assert_eq!(home.statuses("web"), ["stopped", "stopped"]);
    home.write("go", "");
    home.wait_status("db", "online");
    stays("web is down", millis(300), || {
        let statuses = home.statuses("web");
        if statuses == ["stopped", "stopped"] { Ok(()) } else { Err(statuses) }
    });
    home.ok(&["restart", "web"]);
    home.ok(&["restart", "web"]);
    assert_eq!(home.rows_of("web").len(), 2);
    let sleeps =
        home.processes().into_iter().filter(|pid| process::cmdline(*pid) == ["sleep", "1000"]).count();
    assert_eq!(sleeps, 3, "two of web, one of db:\n{}", home.process_list());
}

#[test]
fn dependents_of_what_fails_are_not_started_and_start_when_it_comes_up_after_all() {
    let home = Home::new();
    let db = "[[apps]]\nname = 'db'\nscript = 'sh'\nargs = ['-c', 'test -e disk && echo up && exec sleep 1000; exit 3']\n\
        ready = { log = 'up' }\nlisten_timeout = '60s'\nmax_restarts = 2\nrestart_delay = 10\n";
    home.ecosystem(&format!(
        "{}{}{db}",
        needing("page", "depends_on = ['web']"),
        needing("web", "depends_on = { db = 'started' }")
    ));
    // Started is not ready: a process that exits at once has been started.
    home.exits(1, &["start", "ecosystem.toml"]).says("cannot start `db`");
    home.ok(&["delete", "all"]);
    home.ecosystem(&home.read("ecosystem.toml").replace("'started'", "'ready'"));
    let run = home.exits(1, &["start", "ecosystem.toml"]);
    run.says("cannot start `web`").says("not started: waiting for `db`, which failed: exit code 3");
    run.says("cannot start `page`").says("not started: waiting for `web`");
    home.wait_status("db", "errored");
    home.ok(&["list"]).says("waiting for db").says("waiting for web");
    assert_eq!(home.pid("web"), 0);
    home.exits(1, &["start", "web"]).says("waiting for `db`, which failed");
    home.write("disk", "");
    home.ok(&["start", "db"]);
    home.wait_status("web", "online");
    home.wait_status("page", "online");
}

#[test]
fn who_waits_goes_on_waiting_when_the_supervisor_is_killed() {
    let home = Home::new();
    home.ecosystem(&web_needs_db());
    let start = Running::start(home.command(&["start", "ecosystem.toml"]), b"");
    wait_until("web waits", SOON, || {
        let table = home.pm(&["list"]).out;
        if table.contains("waiting for db") { Ok(()) } else { Err(table) }
    });
    let old = home.supervisor();
    process::signal(old, Signal::SIGKILL);
    wait_until("another supervisor waits", SOON, || {
        let table = home.pm(&["list"]).out;
        if home.supervisor() != old && table.contains("waiting for db") { Ok(()) } else { Err(table) }
    });
    assert!(home.rows_of("web").iter().all(|row| row.pid == 0));
    home.write("go", "");
    let run = start.end(PATIENT);
    assert_eq!(run.code, 0, "{run:#?}");
    assert_eq!(home.statuses("web"), ["online", "online"]);
    comes_before(&story(&home, &["ready", "spawned"]), "db ready", "web spawned");
}
