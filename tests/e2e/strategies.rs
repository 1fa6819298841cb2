//! Strategies of a reload: rolling and blue-green, the way back, and what it needs for that.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use serde_json::Value;

use super::support::home::Run;
use super::support::load::{self, Connections, Load, Tally};
use super::support::node;
use super::support::{Home, PATIENT, SOON, fixture, free_port, process, wait_until};

/// How a release behaves beside serving its version.
#[derive(Clone, Copy, Debug)]
enum Release {
    Good,
    /// Ends while booting, in this slot.
    DiesInSlot(u32),
    /// Ends this many milliseconds after it was ready, in this slot.
    DiesLater(u32, u32),
}

fn javascript(version: &str, release: Release) -> String {
    let dies = match release {
        Release::Good => String::new(),
        Release::DiesInSlot(slot) => format!(
            "if (process.env.NODE_APP_INSTANCE === '{slot}') throw new Error('{version}: no database');\n"
        ),
        Release::DiesLater(slot, millis) => format!(
            "if (process.env.NODE_APP_INSTANCE === '{slot}') setTimeout(() => process.exit(3), {millis});\n"
        ),
    };
    format!(
        "process.env.VERSION = '{version}';\nprocess.env.SAY_READY = '1';\n{dies}require('{}');\n",
        fixture("web-textbook.js")
    )
}

fn python(version: &str, release: Release) -> String {
    let dies = match release {
        Release::Good => String::new(),
        Release::DiesInSlot(slot) => format!(
            "if os.environ['NODE_APP_INSTANCE'] == '{slot}': raise SystemExit('{version}: no database')\n"
        ),
        Release::DiesLater(slot, millis) => format!(
            "import threading\nif os.environ['NODE_APP_INSTANCE'] == '{slot}': \
             threading.Timer({millis} / 1000, lambda: os._exit(3)).start()\n"
        ),
    };
    format!(
        "import os, runpy\nos.environ['VERSION'] = '{version}'\n{dies}os.write(int(os.environ['PM_READY_FD']), b'\\n')\nrunpy.run_path('{}', run_name='__main__')\n",
        fixture("web.py")
    )
}

/// Workers of a Node cluster, or processes on an inherited listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum App {
    Node,
    Python,
}

struct Web {
    home: Home,
    app: App,
    port: u16,
}

impl Web {
    /// Four instances of version 1.
    fn start(home: Home, app: App, keys: &str) -> Self {
        let web = Self { home, app, port: free_port() };
        web.release("v1", Release::Good);
        web.home.start(&web.config(keys));
        wait_until("the app answers", PATIENT, || load::get(web.port, "/"));
        web
    }

    fn config(&self, keys: &str) -> String {
        let port = self.port;
        let run = match self.app {
            App::Node => "script = 'app.js'\nwait_ready = true\n".to_owned(),
            App::Python => format!(
                "script = 'app.py'\ninterpreter = '{}'\nlisten = ['127.0.0.1:{port}']\nwait_ready = true\n",
                node::python()
            ),
        };
        format!(
            "[[apps]]\nname = 'web'\n{run}exec_mode = 'cluster'\ninstances = 4\nenv = {{ PORT = '{port}' }}\n{keys}\n"
        )
    }

    /// Overwrites the app's file in place.
    fn release(&self, version: &str, release: Release) {
        match self.app {
            App::Node => self.home.write("app.js", &javascript(version, release)),
            App::Python => self.home.write("app.py", &python(version, release)),
        };
    }

    fn identities(&self) -> Vec<(i32, Option<u64>)> {
        self.home.pids("web").into_iter().map(process::identity).collect()
    }

    /// The versions that answer.
    fn versions(&self) -> BTreeSet<String> {
        (0..40).map(|_| load::get(self.port, "/").unwrap().header("x-version").to_owned()).collect()
    }

    /// Reloads under load and returns what the command printed for programs.
    fn reload_under_load(&self, code: i32) -> (Run, Tally) {
        let load = Load::start(self.port, 16, Connections::OnePerRequest);
        load.more(300);
        let run = self.home.exits(code, &["reload", "web", "--json"]);
        load.more(700);
        (run, load.stop())
    }
}

fn set(versions: &[&str]) -> BTreeSet<String> {
    versions.iter().map(|version| (*version).to_owned()).collect()
}

/// The steps of a reload as it printed them: slot, generation, what, and the fields of that.
fn steps(run: &Run) -> Vec<(u64, u64, String)> {
    let lines = run.out.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines
        .filter_map(|line| {
            let step = line.get("step")?.clone();
            let what = match &step["step"] {
                Value::String(what) => what.clone(),
                Value::Object(map) => map.keys().next().unwrap().clone(),
                other => panic!("{other}"),
            };
            Some((step["slot"].as_u64().unwrap(), step["generation"].as_u64().unwrap(), what))
        })
        .collect()
}

fn result(run: &Run) -> Value {
    let last = run.out.lines().rev().find(|line| line.contains("\"result\"")).unwrap();
    serde_json::from_str::<Value>(last).unwrap()["result"]["apps"][0].clone()
}

/// Replays the steps of a reload: the fewest and the most instances that were in rotation.
fn replayed(steps: &[(u64, u64, String)], instances: usize) -> (usize, usize) {
    let mut begun: BTreeSet<(u64, u64)> = BTreeSet::new();
    let mut serving: BTreeSet<(u64, u64)> = BTreeSet::new();
    // Whoever is not launched in the course of it served before.
    for (slot, generation, what) in steps {
        if matches!(what.as_str(), "queued" | "launching") {
            begun.insert((*slot, *generation));
        } else if !begun.contains(&(*slot, *generation)) {
            serving.insert((*slot, *generation));
        }
    }
    let silent = instances - serving.len().min(instances);
    let (mut least, mut most) = (instances, instances);
    for (slot, generation, what) in steps {
        let run = (*slot, *generation);
        match what.as_str() {
            "ready" | "restored" => {
                serving.insert(run);
            }
            "reserved" | "draining" | "signalled" | "gone" | "failed" => {
                serving.remove(&run);
            }
            _ => {}
        }
        let count = serving.len() + silent;
        (least, most) = (least.min(count), most.max(count));
    }
    (least, most)
}

// The way back. ---------------------------------------------------------------------------------------------------

fn a_release_that_dies_in_its_third_slot_is_rolled_back(app: App, keys: &str) {
    let web = Web::start(Home::loaded(), app, keys);
    let before = web.identities();
    // Overwritten in place: only the processes know what the old release was.
    web.release("v2", Release::DiesInSlot(2));
    let (run, tally) = web.reload_under_load(1);
    tally.lost_nothing(1000);
    assert_eq!(web.identities(), before, "the old instances, and not new ones of the old release: {run:#?}");
    assert_eq!(web.versions(), set(&["v1"]));
    let result = result(&run);
    assert_eq!(result["failure"]["restored"], serde_json::json!([0, 1]), "{result}");
    assert_eq!(result["failure"]["replaced"], serde_json::json!([]), "{result}");
    assert_eq!(result["failure"]["kept"], serde_json::json!([0, 1, 2, 3]), "{result}");
    run.says("Rolled back").says("workers 0, 1").says("no database");
    assert!(tally.versions.contains_key("v2"), "the first two had been replaced: {tally:?}");
    let (least, _) = replayed(&steps(&run), 4);
    assert!(least >= 4, "fewer than four served: {:#?}", steps(&run));
    wait_until("nothing of the new release is left", SOON, || {
        let rows = web.home.rows_of("web");
        let left: Vec<_> = rows.iter().map(|row| row.pm("draining").clone()).collect();
        if left.iter().all(|left| left.as_array().is_some_and(Vec::is_empty)) { Ok(()) } else { Err(left) }
    });
    // And the next good one comes through.
    web.release("v3", Release::Good);
    web.home.ok(&["reload", "web"]);
    assert_eq!(web.versions(), set(&["v3"]));
}

#[test]
fn rollback_puts_four_workers_back_although_their_files_were_overwritten() {
    a_release_that_dies_in_its_third_slot_is_rolled_back(App::Node, "");
}

#[test]
fn rollback_puts_processes_on_an_inherited_listener_back() {
    a_release_that_dies_in_its_third_slot_is_rolled_back(App::Python, "");
}

#[test]
fn abort_leaves_what_the_message_says() {
    let web = Web::start(Home::loaded(), App::Node, "on_failure = 'abort'");
    let before = web.identities();
    web.release("v2", Release::DiesInSlot(2));
    let (run, tally) = web.reload_under_load(1);
    tally.lost_nothing(1000);
    run.says("Workers 0, 1 run the new release, 2, 3 still run the old one");
    let after = web.identities();
    assert!(after[0] != before[0] && after[1] != before[1], "{after:?}");
    assert_eq!(after[2..], before[2..]);
    assert_eq!(web.versions(), set(&["v1", "v2"]));
    let (least, _) = replayed(&steps(&run), 4);
    assert!(least >= 4, "{:#?}", steps(&run));
}

#[test]
fn a_worker_that_dies_after_it_took_over_takes_the_release_back_with_it() {
    let web = Web::start(Home::new(), App::Node, "min_uptime = '10ms'");
    let before = web.identities();
    // It has lived for longer than min_uptime, but the release has not got the last slot yet.
    web.release("v2", Release::DiesLater(0, 400));
    let slow = javascript("v2", Release::DiesLater(0, 400))
        .replace("require(", "if (process.env.NODE_APP_INSTANCE === '1') { const end = Date.now() + 1500; while (Date.now() < end); }\nrequire(");
    web.home.write("app.js", &slow);
    let run = web.home.exits(1, &["reload", "web", "--json"]);
    run.says("exited with code 3");
    assert_eq!(web.identities(), before, "{run:#?}");
    assert_eq!(result(&run)["failure"]["restored"], serde_json::json!([0]));
}

#[test]
fn a_reserve_that_has_died_is_replaced_by_a_fresh_one_of_the_old_release() {
    let home = Home::new();
    let port = free_port();
    releases(&home, &[("1", "v1", Release::Good), ("2", "v2", Release::DiesInSlot(3))]);
    home.start(&current(port, "instances = 4"));
    let before = home.pids("web");
    point(&home, "2");
    // Slot 3 boots for long enough to kill the reserve of slot 0.
    let file = home.work().join("releases/2/app.js");
    let text = fs::read_to_string(&file).unwrap();
    let slow = "if (process.env.NODE_APP_INSTANCE === '3') { const end = Date.now() + 2000; while (Date.now() < end); }\n";
    fs::write(&file, format!("{slow}{text}")).unwrap();
    let reload = std::thread::scope(|scope| {
        let reload = scope.spawn(|| home.exits(1, &["reload", "web", "--json"]));
        wait_until("the first three are in reserve", SOON, || {
            let words: Vec<String> =
                home.rows_of("web").iter().map(|row| row.pm("draining").to_string()).collect();
            if words[..3].iter().all(|words| words.contains("reserve")) { Ok(()) } else { Err(words) }
        });
        process::end(before[0]);
        reload.join().unwrap()
    });
    reload.says("Rolled back");
    let after = home.pids("web");
    assert_eq!(after[1..], before[1..], "{reload:#?}");
    assert_ne!(after[0], before[0]);
    assert_eq!(
        cwd(after[0]),
        home.work().join("releases/1").to_str().unwrap(),
        "the old release, wherever `current` leads"
    );
    for _ in 0..20 {
        assert_eq!(load::get(port, "/").unwrap().header("x-version"), "v1");
    }
}

// Without reserve. ------------------------------------------------------------------------------------------------

/// A directory per release, and `current` that leads to the first.
fn releases(home: &Home, all: &[(&str, &str, Release)]) {
    for (dir, version, release) in all {
        home.write(&format!("releases/{dir}/app.js"), &javascript(version, *release));
    }
    point(home, all[0].0);
}

fn point(home: &Home, release: &str) {
    let (current, aside) = (home.work().join("current"), home.work().join("current.new"));
    symlink(Path::new("releases").join(release), &aside).unwrap();
    // What `ln -sfn` and `mv -T` do.
    fs::rename(&aside, &current).unwrap();
}

fn current(port: u16, keys: &str) -> String {
    format!(
        "[[apps]]\nname = 'web'\nscript = 'app.js'\ncwd = 'current'\nexec_mode = 'cluster'\nwait_ready = true\n\
         env = {{ PORT = '{port}' }}\n{keys}\n"
    )
}

fn cwd(pid: i32) -> String {
    fs::read_link(format!("/proc/{pid}/cwd")).unwrap().to_str().unwrap().to_owned()
}

#[test]
fn without_reserve_the_old_release_is_started_again_from_where_it_was() {
    let home = Home::loaded();
    let port = free_port();
    releases(&home, &[("1", "v1", Release::Good), ("2", "v2", Release::DiesInSlot(2))]);
    home.start(&current(port, "instances = 3\nreserve = false"));
    let before = home.pids("web");
    point(&home, "2");
    let load = Load::start(port, 16, Connections::OnePerRequest);
    load.more(300);
    let run = home.exits(1, &["reload", "web", "--json"]);
    load.more(700);
    let tally = load.stop();
    tally.lost_nothing(1000);
    run.says("Rolled back");
    let after = home.pids("web");
    assert!(after[0] != before[0] && after[1] != before[1] && after[2] == before[2], "{before:?} {after:?}");
    for pid in after {
        assert_eq!(cwd(pid), home.work().join("releases/1").to_str().unwrap());
    }
    for _ in 0..30 {
        assert_eq!(load::get(port, "/").unwrap().header("x-version"), "v1");
    }
    let (least, _) = replayed(&steps(&run), 3);
    assert!(least >= 3, "{:#?}", steps(&run));
}

#[test]
fn without_reserve_the_command_says_when_nothing_is_left_to_go_back_to() {
    let web = Web::start(Home::new(), App::Node, "reserve = false");
    web.release("v2", Release::DiesInSlot(2));
    let run = web.home.exits(1, &["reload", "web"]);
    run.says("app.js").says("has changed since it was started, so there is nothing to go back to");
    run.says("On the new release: workers 0, 1").says("On the old one: workers 2, 3");
    assert_eq!(web.versions(), set(&["v1", "v2"]));
    assert_eq!(web.home.statuses("web"), ["online"; 4]);
}

#[test]
fn a_restart_in_place_is_rolled_back_to_the_release_before() {
    let home = Home::new();
    let script = |version: &str, dies: bool| {
        let dies = if dies { "if [ \"$NODE_APP_INSTANCE\" = 1 ]; then exit 4; fi\n" } else { "" };
        format!("#!/bin/sh\n{dies}echo serves {version}\nexec sleep 1000\n")
    };
    for (dir, text) in [("1", script("v1", false)), ("2", script("v2", true))] {
        home.write(&format!("releases/{dir}/app.sh"), &text);
    }
    point(&home, "1");
    home.start(
        "[[apps]]\nname = 'job'\nscript = 'app.sh'\ninterpreter = '/bin/sh'\ncwd = 'current'\nexec_mode = 'fork'\n\
         instances = 3\nmin_uptime = '200ms'\n",
    );
    point(&home, "2");
    let run = home.exits(1, &["reload", "job"]);
    run.says("downtime").says("Rolled back").says("worker 0");
    assert_eq!(home.statuses("job"), ["online"; 3]);
    for pid in home.pids("job") {
        assert_eq!(cwd(pid), home.work().join("releases/1").to_str().unwrap(), "{run:#?}");
    }
}

// Strategies. -----------------------------------------------------------------------------------------------------

#[test]
fn blue_green_switches_when_all_are_ready() {
    let web = Web::start(Home::loaded(), App::Node, "strategy = 'blue-green'");
    let before = web.home.pids("web");
    web.release("v2", Release::Good);
    let (run, tally) = web.reload_under_load(0);
    tally.lost_nothing(1000);
    assert_eq!(web.versions(), set(&["v2"]));
    assert!(web.home.pids("web").iter().all(|pid| !before.contains(pid)));
    let steps = steps(&run);
    let first_out = steps.iter().position(|(_, _, what)| what == "reserved" || what == "draining").unwrap();
    let last_ready = steps.iter().rposition(|(_, _, what)| what == "ready").unwrap();
    assert!(last_ready < first_out, "nobody goes before all are there: {steps:#?}");
    assert_eq!(replayed(&steps, 4), (4, 8));
}

#[test]
fn blue_green_with_a_bad_instance_never_gives_the_release_a_connection() {
    let web = Web::start(Home::new(), App::Node, "strategy = 'blue-green'");
    let before = web.identities();
    web.release("v2", Release::DiesInSlot(3));
    let run = web.home.exits(1, &["reload", "web", "--json"]);
    let steps = steps(&run);
    assert!(steps.iter().all(|(_, _, what)| what != "ready"), "{steps:#?}");
    assert_eq!(web.identities(), before);
    assert_eq!(web.versions(), set(&["v1"]));
}

#[test]
fn an_instance_that_dies_within_min_healthy_never_gets_a_connection() {
    let web = Web::start(Home::new(), App::Node, "min_healthy = '3s'");
    let before = web.identities();
    web.release("v2", Release::DiesLater(0, 300));
    let run = web.home.exits(1, &["reload", "web", "--json"]);
    let steps = steps(&run);
    assert!(steps.iter().any(|(_, _, what)| what == "soaking"), "{steps:#?}");
    assert!(steps.iter().all(|(_, _, what)| what != "ready"), "{steps:#?}");
    assert_eq!(web.identities(), before);
}

#[test]
fn a_dry_run_tells_the_plan_and_changes_nothing() {
    let web = Web::start(Home::new(), App::Node, "max_surge = 2\nmin_healthy = '2s'");
    let before = (web.identities(), web.home.jlist()[0]["pm"]["revision"].clone());
    let plan = web.home.ok(&["reload", "web", "--dry-run"]);
    plan.says("web: rolling reload of 4 instances").says("Nothing was changed.");
    plan.says(&format!("slot 0 (id 0): pid {}, generation 1 -> generation 2", before.0[0].0));
    plan.says("up to 6 launch or serve at once")
        .says("come back from reserve")
        .says("and for 2.0 s after that");
    web.home.ecosystem(&web.config("strategy = 'blue-green'\non_failure = 'abort'"));
    let plan = web.home.ok(&["reload", "ecosystem.toml", "--dry-run", "--json"]).json();
    assert_eq!(plan[0]["strategy"], "blue-green");
    assert_eq!((&plan[0]["most"], &plan[0]["changed"]), (&8.into(), &true.into()), "{plan}");
    assert_eq!(plan[0]["on_failure"], "abort");
    web.home.exits(3, &["reload", "nobody", "--dry-run"]);
    fs::remove_file(web.home.work().join("app.js")).unwrap();
    web.home.ok(&["reload", "web", "--dry-run"]).says("could not be started now").says("app.js");
    let after = (web.identities(), web.home.jlist()[0]["pm"]["revision"].clone());
    assert_eq!(after, before);
    // Without a daemon it starts none. One home at a time: another test may be waiting for the machine.
    drop(web);
    let cold = Home::new();
    cold.write("app.js", "setInterval(() => {}, 1000);\n");
    cold.ecosystem("[[apps]]\nname = 'web'\nscript = 'app.js'\n");
    cold.ok(&["reload", "ecosystem.toml", "--dry-run"]).says("would be started");
    assert!(!cold.has_daemon());
}

#[test]
fn pain_01_a_bad_deploy_changes_nothing_and_the_next_good_one_succeeds() {
    let web = Web::start(Home::loaded(), App::Node, "listen_timeout = '3s'");
    let before = web.identities();
    web.release("v2", Release::DiesInSlot(0));
    let (run, tally) = web.reload_under_load(1);
    tally.lost_nothing(1000);
    run.says("v2: no database");
    assert_eq!(web.identities(), before, "every old pid is unchanged");
    web.release("v3", Release::Good);
    web.home.ok(&["reload", "web"]);
    assert_eq!(web.versions(), set(&["v3"]));
}

#[test]
fn pain_05_surge_and_availability_hold_at_every_step_of_a_reload() {
    let web = Web::start(Home::new(), App::Node, "");
    for (keys, instances, least, most) in [
        ("", 4, 4, 5),
        ("max_surge = '50%'", 4, 4, 6),
        ("max_surge = 0\nmax_unavailable = 1", 4, 3, 4),
        ("max_surge = 1\nmax_unavailable = '25%'", 4, 3, 5),
        ("max_draining = 1", 4, 4, 5),
        ("", 1, 1, 2),
    ] {
        let config = web.config(keys).replacen("instances = 4", &format!("instances = {instances}"), 1);
        web.home.ecosystem(&config);
        // Once to make these rules those of the app, unless they are, and once by them.
        web.home.ok(&["reload", "ecosystem.toml"]);
        let run = web.home.ok(&["reload", "web", "--json"]);
        let steps = steps(&run);
        let (fewest, greatest) = replayed(&steps, instances);
        assert!(fewest >= least, "{keys}: only {fewest} served: {steps:#?}");
        assert!(greatest <= most, "{keys}: {greatest} served: {steps:#?}");
    }
}

#[test]
fn pain_30_current_is_resolved_at_each_spawn_and_an_old_release_may_be_deleted() {
    let home = Home::new();
    let port = free_port();
    releases(&home, &[("1", "v1", Release::Good), ("2", "v2", Release::Good)]);
    home.start(&current(port, "instances = 2"));
    point(&home, "2");
    home.ok(&["reload", "web"]);
    for pid in home.pids("web") {
        assert_eq!(cwd(pid), home.work().join("releases/2").to_str().unwrap());
    }
    fs::remove_dir_all(home.work().join("releases/1")).unwrap();
    assert_eq!(load::get(port, "/").unwrap().header("x-version"), "v2");
    home.ok(&["list"]);
    home.ok(&["reload", "web"]);
    // A crash goes on with what `current` leads to.
    let before = home.pids("web");
    process::end(before[0]);
    wait_until("the worker runs again", SOON, || {
        let rows = home.rows_of("web");
        if rows[0].pid != before[0] && rows[0].status == "online" { Ok(()) } else { Err(rows) }
    });
    assert_eq!(cwd(home.pids("web")[0]), home.work().join("releases/2").to_str().unwrap());
    for daemon in [home.keeper(), home.supervisor()] {
        assert_eq!(cwd(daemon), "/", "the daemon keeps no directory busy");
    }
}

// Before anything is taken down. ----------------------------------------------------------------------------------

#[test]
fn what_cannot_be_started_again_is_not_taken_down() {
    let home = Home::new();
    home.write("app/run.sh", "echo runs\nexec sleep 1000\n");
    home.write("settings.env", "A=1\n");
    home.start(
        "[[apps]]\nname = 'job'\nscript = 'run.sh'\ninterpreter = '/bin/sh'\ncwd = 'app'\nexec_mode = 'fork'\n\
         env_file = '../settings.env'\nmin_uptime = '100ms'\n",
    );
    let pid = home.pid("job");
    fs::rename(home.work().join("app"), home.work().join("away")).unwrap();
    for verb in ["restart", "reload"] {
        home.exits(1, &[verb, "job"]).says("working directory").says("Nothing was touched");
        assert_eq!((home.pid("job"), home.row("job").status.as_str()), (pid, "online"));
    }
    fs::rename(home.work().join("away"), home.work().join("app")).unwrap();
    fs::remove_file(home.work().join("settings.env")).unwrap();
    home.exits(1, &["restart", "job"]).says("settings.env");
    fs::remove_file(home.work().join("app/run.sh")).unwrap();
    home.write("settings.env", "A=1\n");
    home.exits(1, &["reload", "job"]).says("run.sh");
    assert_eq!((home.pid("job"), home.row("job").status.as_str()), (pid, "online"));
    home.write("app/run.sh", "echo runs\nexec sleep 1000\n");
    home.ok(&["restart", "job"]);
    assert_ne!(home.pid("job"), pid);
}

// The next supervisor. --------------------------------------------------------------------------------------------

#[test]
fn a_supervisor_that_dies_while_others_are_in_reserve_loses_nothing() {
    let web = Web::start(Home::loaded(), App::Node, "");
    let before = web.identities();
    let slow = "if (process.env.NODE_APP_INSTANCE === '2') { const cell = new Int32Array(new SharedArrayBuffer(4)); while (!require('fs').existsSync('go')) Atomics.wait(cell, 0, 0, 50); }\n";
    web.home.write("app.js", &format!("{slow}{}", javascript("v2", Release::DiesInSlot(2))));
    let load = Load::start(web.port, 8, Connections::OnePerRequest);
    let run = std::thread::scope(|scope| {
        let reload = scope.spawn(|| web.home.exits(1, &["reload", "web"]));
        wait_until("two are in reserve", SOON, || {
            let words: Vec<String> =
                web.home.rows_of("web").iter().map(|row| row.pm("draining").to_string()).collect();
            if words[..2].iter().all(|words| words.contains("reserve")) { Ok(()) } else { Err(words) }
        });
        process::end(web.home.supervisor());
        web.home.write("go", "");
        reload.join().unwrap()
    });
    load.more(300);
    let tally = load.stop();
    // A connection that had just been accepted may go with the supervisor, and no other.
    assert!(tally.failed() <= 1, "{tally:?}");
    wait_until("the old workers serve", PATIENT, || {
        let now = web.identities();
        if now == before { Ok(()) } else { Err(now) }
    });
    assert_eq!(web.versions(), set(&["v1"]), "{run:#?}");
}
