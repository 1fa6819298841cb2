//! Reload: nothing is lost, and a bad release never replaces a good one.

use std::collections::BTreeSet;

use super::support::home::Running;
use super::support::load::{self, Connections, Load};
use super::support::node::{self, Node};
use super::support::{Home, PATIENT, SOON, fixture, free_port, millis, process, secs, stays, wait_until};

/// The apps that a reload must not hurt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum App {
    /// Node cluster, the handler of the tutorials.
    Textbook,
    /// Node cluster, no handler at all.
    Plain,
    /// A shell in front of Node on an inherited listener, as `npm start` would run it.
    Chain,
    /// Python's standard library on an inherited listener.
    Python,
}

/// An app whose releases are files: each reload finds what was last released.
struct Web {
    home: Home,
    app: App,
    port: u16,
}

impl Web {
    fn start(app: App, balance: &str, node: &Node) -> Self {
        let web = Self { home: Home::loaded(), app, port: free_port() };
        web.release("v1");
        let Self { port, .. } = web;
        let Node { binary, version } = node;
        eprintln!("{app:?} {balance} {version}");
        let python = node::python();
        let run = match app {
            App::Textbook | App::Plain => {
                format!("script = 'app.js'\ninterpreter = '{binary}'\nbalance = '{balance}'")
            }
            App::Chain => format!(
                "script = '/bin/sh'\ninterpreter = 'none'\nargs = ['-c', '{binary} app.js; true']\n\
                 listen = ['127.0.0.1:{port}']\nmin_uptime = '300ms'"
            ),
            App::Python => format!(
                "script = 'app.py'\ninterpreter = '{python}'\nlisten = ['127.0.0.1:{port}']\nmin_uptime = '300ms'"
            ),
        };
        web.home.start(&format!(
            "[[apps]]\nname = 'web'\n{run}\nexec_mode = 'cluster'\ninstances = 2\nenv = {{ PORT = '{port}' }}\n"
        ));
        wait_until("the app answers", PATIENT, || load::get(port, "/"));
        web
    }

    fn release(&self, version: &str) {
        match self.app {
            App::Python => {
                let server = fixture("web.py");
                self.home.write(
                    "app.py",
                    &format!(
                        "import os, runpy\nos.environ['VERSION'] = '{version}'\n\
                         runpy.run_path('{server}', run_name='__main__')\n"
                    ),
                );
            }
            App::Textbook | App::Plain | App::Chain => {
                let server = fixture(match self.app {
                    App::Textbook => "web-textbook.js",
                    App::Plain => "web-plain.js",
                    _ => "web-inherited.js",
                });
                self.home
                    .write("app.js", &format!("process.env.VERSION = '{version}';\nrequire('{server}');\n"));
            }
        }
    }

    /// The version that answers, from as many requests as would find an old worker.
    fn serves_only(&self, version: &str) {
        for _ in 0..40 {
            let reply = load::get(self.port, "/").unwrap();
            assert_eq!(reply.header("x-version"), version);
        }
    }

    fn reloads_lose_nothing(&self, kind: Connections) {
        let load = Load::start(self.port, 16, kind);
        let mut seen = vec![self.home.pids("web")];
        for n in 2..=11 {
            let version = format!("v{n}");
            self.release(&version);
            let run = self.home.ok(&["reload", "web"]);
            run.does_not_say("killed after");
            let pids = self.home.pids("web");
            assert!(seen.iter().flatten().all(|old| !pids.contains(old)), "{pids:?} after {seen:?}");
            assert_eq!(self.home.statuses("web"), ["online", "online"]);
            seen.push(pids);
            load.more(50);
        }
        let tally = load.stop();
        tally.lost_nothing(1000);
        assert_eq!(tally.versions.len(), 11, "each release has served: {tally:?}");
        self.serves_only("v11");
        wait_until("no old generation is left", SOON, || {
            let left: Vec<i32> =
                seen[..10].iter().flatten().copied().filter(|pid| process::alive(*pid)).collect();
            if left.is_empty() { Ok(()) } else { Err(left) }
        });
    }

    /// The control: what clients see when workers are ended without the ladder.
    fn kills_lose_requests(&self) {
        let load = Load::start(self.port, 16, Connections::OnePerRequest);
        for _ in 0..3 {
            for slot in 0..2 {
                let before = self.home.pids("web");
                let tree = process::tree(before[slot]);
                tree.iter().rev().for_each(|pid| process::end(*pid));
                wait_until("the slot runs again", PATIENT, || {
                    let rows = self.home.rows_of("web");
                    let fine =
                        rows[slot].pid != before[slot] && rows.iter().all(|row| row.status == "online");
                    if fine { Ok(()) } else { Err(rows) }
                });
                load.more(50);
            }
        }
        let tally = load.stop();
        eprintln!("control: {tally:?}");
        assert!(tally.failed() > 0, "a client that sees no failure here proves nothing: {tally:?}");
    }
}

macro_rules! ten_reloads {
    ($($name:ident: $app:ident, $balance:literal, $node:ident, $kind:ident;)*) => {
        $(
            #[test]
            fn $name() {
                Web::start(App::$app, $balance, &Node::$node()).reloads_lose_nothing(Connections::$kind);
            }
        )*
    };
}

ten_reloads! {
    ten_reloads_lose_nothing_textbook_round_robin: Textbook, "round-robin", installed, OnePerRequest;
    ten_reloads_lose_nothing_textbook_round_robin_on_another_node: Textbook, "round-robin", other, OnePerRequest;
    ten_reloads_lose_nothing_textbook_shared: Textbook, "shared", installed, OnePerRequest;
    ten_reloads_lose_nothing_without_handler_round_robin: Plain, "round-robin", installed, OnePerRequest;
    ten_reloads_lose_nothing_without_handler_shared: Plain, "shared", installed, OnePerRequest;
    ten_reloads_lose_nothing_shell_chain_on_inherited_listener: Chain, "", installed, OnePerRequest;
    ten_reloads_lose_nothing_python_on_inherited_listener: Python, "", installed, OnePerRequest;
    pain_03_ten_reloads_reset_no_keep_alive_connection_textbook_round_robin: Textbook, "round-robin", installed, KeepAlive;
    pain_03_ten_reloads_reset_no_keep_alive_connection_without_handler_shared: Plain, "shared", installed, KeepAlive;
}

#[test]
fn control_workers_killed_without_the_ladder_lose_requests_round_robin() {
    Web::start(App::Textbook, "round-robin", &Node::installed()).kills_lose_requests();
}

#[test]
fn control_workers_killed_without_the_ladder_lose_requests_shared() {
    Web::start(App::Plain, "shared", &Node::other()).kills_lose_requests();
}

#[test]
fn control_workers_killed_without_the_ladder_lose_requests_inherited_listener() {
    Web::start(App::Python, "", &Node::installed()).kills_lose_requests();
}

// Bad releases. ---------------------------------------------------------------------------------------------------

const THROWS: &str = "throw new Error('boot failure: no database');\n";

/// Blocks the event loop for ever without using the processor.
const HANGS: &str = "console.error('waiting for the database');\n\
    Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0);\n";

/// Listens and serves, but never says that it is ready.
fn never_ready() -> String {
    format!(
        "process.env.VERSION = 'v2';\nconsole.error('connected, not ready');\n\
         require('{}').server().listen(Number(process.env.PORT), '127.0.0.1');\n",
        fixture("common.js")
    )
}

fn good(version: &str) -> String {
    format!(
        "process.env.VERSION = '{version}';\nprocess.env.SAY_READY = '1';\nrequire('{}');\n",
        fixture("web-textbook.js")
    )
}

fn a_bad_release_changes_nothing(balance: &str, bad: &str, last_words: &str) {
    let home = Home::loaded();
    let port = free_port();
    home.write("app.js", &good("v1"));
    home.start(&format!(
        "[[apps]]\nname = 'web'\nscript = 'app.js'\nexec_mode = 'cluster'\ninstances = 2\nbalance = '{balance}'\n\
         wait_ready = true\nlisten_timeout = '3s'\nenv = {{ PORT = '{port}' }}\n"
    ));
    let before: Vec<_> = home.pids("web").into_iter().map(process::identity).collect();
    let load = Load::start(port, 16, Connections::OnePerRequest);

    home.write("app.js", bad);
    let run = home.exits(1, &["reload", "web"]);
    assert!(run.took <= secs(4), "listen_timeout + 1 s at most: {run:?}");
    run.says(last_words);
    let after: Vec<_> = home.pids("web").into_iter().map(process::identity).collect();
    assert_eq!(after, before, "the old workers");
    assert_eq!(home.statuses("web"), ["online", "online"]);
    load.more(200);
    wait_until("only the two old workers are left", SOON, || {
        let list = home.process_list();
        if list.matches("app.js").count() == 2 { Ok(()) } else { Err(list) }
    });

    home.write("app.js", &good("v3"));
    home.ok(&["reload", "web"]);
    load.more(200);
    let tally = load.stop();
    tally.lost_nothing(400);
    assert!(tally.versions.contains_key("v1") && tally.versions.contains_key("v3"), "{tally:?}");
    if balance == "round-robin" {
        assert!(!tally.versions.contains_key("v2"), "a worker in launch is not in rotation: {tally:?}");
    }
    assert!(home.pids("web").iter().all(|pid| before.iter().all(|(old, _)| old != pid)));
}

#[test]
fn pain_01_a_release_that_throws_at_boot_changes_nothing_round_robin() {
    a_bad_release_changes_nothing("round-robin", THROWS, "boot failure: no database");
}

#[test]
fn pain_01_a_release_that_throws_at_boot_changes_nothing_shared() {
    a_bad_release_changes_nothing("shared", THROWS, "boot failure: no database");
}

#[test]
fn pain_01_a_release_that_hangs_changes_nothing_round_robin() {
    a_bad_release_changes_nothing("round-robin", HANGS, "waiting for the database");
}

#[test]
fn pain_01_a_release_that_hangs_changes_nothing_shared() {
    a_bad_release_changes_nothing("shared", HANGS, "waiting for the database");
}

#[test]
fn pain_01_a_release_that_never_gets_ready_changes_nothing_round_robin() {
    a_bad_release_changes_nothing("round-robin", &never_ready(), "connected, not ready");
}

#[test]
fn pain_01_a_release_that_never_gets_ready_changes_nothing_shared() {
    a_bad_release_changes_nothing("shared", &never_ready(), "connected, not ready");
}

#[test]
fn a_release_that_fails_in_its_second_slot_leaves_the_first_new_and_says_so() {
    let home = Home::new();
    let port = free_port();
    home.write("app.js", &good("v1"));
    home.start(&format!(
        "[[apps]]\nname = 'web'\nscript = 'app.js'\nexec_mode = 'cluster'\ninstances = 2\non_failure = 'abort'\n\
         wait_ready = true\nlisten_timeout = '3s'\nenv = {{ PORT = '{port}' }}\n"
    ));
    let before = home.pids("web");
    let bad = format!("if (process.env.NODE_APP_INSTANCE === '1') {{ {THROWS} }}\n{}", good("v2"));
    home.write("app.js", &bad);
    home.exits(1, &["reload", "web"]).says("boot failure");
    let after = home.pids("web");
    assert_ne!(after[0], before[0], "the first slot is new");
    assert_eq!(after[1], before[1], "the second slot is old");
    assert_eq!(home.statuses("web"), ["online", "online"]);
}

// How a reload goes on. -------------------------------------------------------------------------------------------

fn slow_boot(home: &Home, port: u16, keys: &str) -> String {
    format!(
        "[[apps]]\nname = 'web'\nscript = '{}'\nexec_mode = 'cluster'\nwait_ready = true\n{keys}\n\
         env = {{ PORT = '{port}', BOOT_MS = '300', LIFE = '{}' }}\n",
        fixture("web-slow-boot.js"),
        home.work_file("life"),
    )
}

/// The most instances that were in the interval between two kinds of steps at once.
fn most_between(life: &str, from: &str, to: &str) -> i32 {
    let (mut now, mut most) = (0, 0);
    for line in life.lines() {
        let what = line.split(' ').next().unwrap_or_default();
        now += i32::from(what == from) - i32::from(what == to);
        most = most.max(now);
    }
    most
}

#[test]
fn reload_takes_as_long_as_booting_takes_not_as_long_as_its_timeout() {
    let home = Home::alone();
    let port = free_port();
    home.start(&slow_boot(&home, port, "instances = 3\nlisten_timeout = '30s'"));
    home.write("life", "");
    let run = home.ok(&["reload", "web"]);
    assert!(run.took >= millis(900), "three boots in turn of 300 ms each: {run:?}");
    assert!(run.took <= secs(4), "{run:?}");
    let life = home.read("life");
    assert_eq!(most_between(&life, "boot", "ready"), 1, "max_surge is 1: {life}");
    // A slot's old instance is told to stop only when its successor is ready.
    let first = life.lines().position(|line| line.starts_with("stop")).unwrap();
    let ready = life.lines().position(|line| line.starts_with("ready")).unwrap();
    assert!(ready < first, "{life}");
}

#[test]
fn pain_05_a_single_instance_is_replaced_before_it_is_stopped() {
    let home = Home::new();
    let port = free_port();
    home.start(&slow_boot(&home, port, "instances = 1"));
    home.write("life", "");
    home.ok(&["reload", "web"]);
    let life = home.file_with("life", "end");
    let order: Vec<&str> = life.lines().map(|line| line.split(' ').next().unwrap()).collect();
    assert_eq!(order, ["boot", "ready", "stop", "end"]);
}

#[test]
fn pain_05_max_surge_is_the_number_of_instances_that_boot_at_once() {
    let home = Home::new();
    let port = free_port();
    home.start(&slow_boot(&home, port, "instances = 4\nmax_surge = 2"));
    home.write("life", "");
    home.ok(&["reload", "web"]);
    let life = home.read("life");
    assert_eq!(most_between(&life, "boot", "ready"), 2, "{life}");
}

#[test]
fn pain_05_max_unavailable_without_surge_stops_an_instance_before_its_successor_starts() {
    let home = Home::new();
    let port = free_port();
    home.start(&slow_boot(&home, port, "instances = 2\nmax_surge = 0\nmax_unavailable = 1"));
    home.write("life", "");
    home.ok(&["reload", "web"]);
    let life = home.file_with("life", "ready");
    assert!(life.starts_with("stop"), "{life}");
    assert_eq!(most_between(&life, "stop", "ready"), 1, "at most one is missing: {life}");
    assert_eq!(life.lines().filter(|line| line.starts_with("ready")).count(), 2, "{life}");
}

#[test]
fn reload_of_a_fork_mode_app_says_downtime_and_restarts_it() {
    let home = Home::new();
    home.start("[[apps]]\nname = 'job'\nscript = 'sleep'\nargs = ['1000']\nmin_uptime = '100ms'\n");
    let before = home.pid("job");
    home.ok(&["reload", "job"]).says("downtime");
    assert_ne!(home.pid("job"), before);
    assert!(!process::alive(before));
}

#[test]
fn overlap_lets_a_fork_mode_app_run_beside_its_successor() {
    let home = Home::new();
    let app = fixture("life.py");
    home.start(&format!("[[apps]]\nname = 'job'\nscript = '{app}'\noverlap = true\nmin_uptime = '500ms'\n"));
    home.file_with("life", "boot");
    home.ok(&["reload", "job"]).does_not_say("downtime");
    assert_eq!(home.file_with("life", "SIGINT"), "boot\nboot\nSIGINT\n");
}

#[test]
fn reload_of_a_stopped_app_starts_it() {
    let home = Home::new();
    home.start("[[apps]]\nname = 'job'\nscript = 'sleep'\nargs = ['1000']\n");
    home.ok(&["stop", "job"]);
    home.ok(&["reload", "job"]);
    assert_eq!(home.row("job").status, "online");
}

#[test]
fn pain_31_reload_all_goes_on_after_a_failure_and_exits_1() {
    let home = Home::new();
    let port = free_port();
    home.write("app.js", &good("v1"));
    home.start(&format!(
        "[[apps]]\nname = 'bad'\nscript = 'app.js'\nexec_mode = 'cluster'\ninstances = 1\nwait_ready = true\n\
         listen_timeout = '5s'\nenv = {{ PORT = '{port}' }}\n\
         [[apps]]\nname = 'good'\nscript = 'sleep'\nargs = ['1000']\nmin_uptime = '100ms'\n"
    ));
    let before = (home.pid("bad"), home.pid("good"));
    home.write("app.js", THROWS);
    home.exits(1, &["reload", "all"]).says("bad");
    assert_eq!(home.pid("bad"), before.0);
    assert_ne!(home.pid("good"), before.1);
}

#[test]
fn a_reload_that_is_overtaken_by_stop_ends_as_superseded() {
    let home = Home::new();
    let port = free_port();
    home.start(&slow_boot(&home, port, "instances = 4\nlisten_timeout = '60s'\n").replace("'300'", "'1500'"));
    home.write("life", "");
    let reload = super::support::home::Running::start(home.command(&["reload", "web"]), b"");
    home.file_with("life", "boot");
    let stop = home.ok(&["stop", "web"]);
    let reload = reload.end(SOON);
    assert_eq!(reload.code, 1, "{reload:?}");
    reload.says("superseded");
    assert!(stop.took < secs(15), "{stop:?}");
    assert_eq!(home.statuses("web"), ["stopped"; 4]);
    stays("nothing starts afterwards", secs(2), || {
        let list = home.process_list();
        if list.contains("web-slow-boot") { Err(list) } else { Ok(()) }
    });
}

#[test]
fn pain_08_an_instance_that_does_not_drain_in_time_is_killed_and_the_reload_says_so() {
    let home = Home::new();
    let port = free_port();
    home.write(
        "app.js",
        "const http = require('http');\n\
         const server = http.createServer((q, r) => { if (q.url === '/slow') return; r.end('ok'); });\n\
         server.listen(Number(process.env.PORT), '127.0.0.1');\n\
         process.on('SIGINT', () => server.close(() => process.exit(0)));\n",
    );
    home.start(&format!(
        "[[apps]]\nname = 'web'\nscript = 'app.js'\nexec_mode = 'cluster'\ninstances = 1\nkill_timeout = '1s'\n\
         env = {{ PORT = '{port}' }}\n"
    ));
    let old = home.pid("web");
    let slow = std::thread::spawn(move || load::get(port, "/slow"));
    wait_until("the slow request is in the worker", SOON, || {
        let sockets =
            process::descriptors(old).values().filter(|target| target.starts_with("socket:")).count();
        if sockets >= 2 { Ok(()) } else { Err(process::descriptors(old)) }
    });
    let run = home.ok(&["reload", "web"]);
    run.says("killed after");
    assert!(run.took < secs(6), "{run:?}");
    assert!(slow.join().unwrap().is_err());
    assert!(!process::alive(old));
    assert_eq!(load::get(port, "/").unwrap().body, "ok");
}

#[test]
fn reload_by_name_keeps_every_setting_of_the_app() {
    let home = Home::new();
    let port = free_port();
    home.start(&slow_boot(&home, port, "instances = 1\nlisten_timeout = '2s'"));
    // Ready messages stop: only a remembered wait_ready and listen_timeout make this reload fail in time.
    home.ecosystem("broken on purpose, reload by name does not read it");
    home.write("life", "");
    home.ok(&["reload", "web"]);
    home.ok(&["reload", "web"]);
    assert_eq!(home.read("life").lines().filter(|line| line.starts_with("ready")).count(), 2);
}

#[test]
fn pain_28_reload_of_a_file_applies_changed_and_removed_environment() {
    let home = Home::new();
    let port = free_port();
    let config = |env: &str| {
        format!(
            "[[apps]]\nname = 'web'\nscript = '{}'\nexec_mode = 'cluster'\ninstances = 1\n\
             env = {{ PORT = '{port}', {env} }}\n",
            fixture("web-plain.js")
        )
    };
    home.start(&config("COLOUR = 'blue', GONE = 'soon'"));
    home.ecosystem(&config("COLOUR = 'green'"));
    home.ok(&["reload", "web"]);
    assert_eq!(process::environ(home.pid("web"))["COLOUR"], "blue", "by name the stored spec counts");
    home.ok(&["reload", "ecosystem.toml"]);
    let environ = process::environ(home.pid("web"));
    assert_eq!(environ["COLOUR"], "green");
    assert!(!environ.contains_key("GONE"), "removed keys are gone");
}

#[test]
fn pain_30_a_symlinked_release_is_followed_at_each_reload() {
    let home = Home::new();
    let port = free_port();
    for version in ["1", "2"] {
        home.write(
            &format!("releases/{version}/app.js"),
            &format!("process.env.VERSION = 'v{version}';\nrequire('{}');\n", fixture("web-plain.js")),
        );
    }
    let current = home.work().join("current");
    std::os::unix::fs::symlink("releases/1", &current).unwrap();
    home.start(&format!(
        "[[apps]]\nname = 'web'\nscript = 'app.js'\ncwd = '{}'\nexec_mode = 'cluster'\ninstances = 1\n\
         env = {{ PORT = '{port}' }}\n",
        current.display()
    ));
    assert_eq!(load::get(port, "/").unwrap().header("x-version"), "v1");
    std::fs::remove_file(&current).unwrap();
    std::os::unix::fs::symlink("releases/2", &current).unwrap();
    home.ok(&["reload", "web"]);
    assert_eq!(load::get(port, "/").unwrap().header("x-version"), "v2");
    let cwd = std::fs::read_link(format!("/proc/{}/cwd", home.pid("web"))).unwrap();
    assert!(cwd.ends_with("releases/2"), "{}", cwd.display());
    std::fs::remove_dir_all(home.work().join("releases/1")).unwrap();
    assert_eq!(home.row("web").status, "online");
}

#[test]
fn generations_count_up_and_slots_keep_their_number() {
    let home = Home::new();
    let port = free_port();
    home.start(&format!(
        "[[apps]]\nname = 'web'\nscript = '{}'\nexec_mode = 'cluster'\ninstances = 2\nenv = {{ PORT = '{port}' }}\n",
        fixture("web-textbook.js")
    ));
    let mut last = 0;
    for _ in 0..3 {
        for row in home.rows_of("web") {
            let environ = process::environ(row.pid);
            assert_eq!(environ["NODE_APP_INSTANCE"], row.slot.to_string());
            assert_eq!(environ["pm_id"], row.id.to_string());
            let generation: u64 = environ["PM_GENERATION"].parse().unwrap();
            assert!(generation > last || row.slot == 1 && generation == last, "{generation} after {last}");
            last = generation;
        }
        assert_eq!(home.rows_of("web").iter().map(|row| row.slot).collect::<Vec<_>>(), [0, 1]);
        home.ok(&["reload", "web"]);
    }
}

#[test]
fn pain_31_reload_prints_json_lines_for_programs_and_plain_lines_in_a_pipe() {
    let home = Home::new();
    let port = free_port();
    home.start(&format!(
        "[[apps]]\nname = 'web'\nscript = '{}'\nexec_mode = 'cluster'\ninstances = 2\nenv = {{ PORT = '{port}' }}\n",
        fixture("web-textbook.js")
    ));
    let run = home.ok(&["reload", "web"]);
    assert!(!run.text().contains('\u{1b}'), "no escapes in a pipe: {run:?}");
    let run = home.ok(&["reload", "web", "--json"]);
    let lines: Vec<serde_json::Value> = run
        .out
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
        .collect();
    assert!(lines.len() >= 2, "steps as they happen, the result last: {run:?}");
}

#[test]
fn pain_37_a_rolling_reload_from_one_node_to_another_loses_nothing_while_both_serve() {
    let home = Home::alone();
    let (port, from, to) = (free_port(), Node::installed(), Node::other());
    let file = |node: &Node| {
        format!(
            "[[apps]]\nname = 'web'\nscript = '{}'\ninterpreter = '{}'\ninstances = 2\nmin_healthy = '3s'\n[apps.env]\nPORT = '{port}'\n",
            fixture("web-textbook.js"),
            node.binary
        )
    };
    home.start(&file(&from));
    let load = Load::start(port, 8, Connections::OnePerRequest);
    load.more(300);
    home.ecosystem(&file(&to));
    let reload = Running::start(home.command(&["reload", "ecosystem.toml"]), b"");
    // Both versions in the table at once, each with its own number.
    let bare = |node: &Node| node.version.trim_start_matches('v').to_owned();
    let versions = || -> BTreeSet<String> {
        home.rows_of("web")
            .iter()
            .map(|row| row.env("node_version").as_str().unwrap_or_default().to_owned())
            .collect()
    };
    wait_until("both generations serve", PATIENT, || {
        let seen = versions();
        if seen == BTreeSet::from([bare(&from), bare(&to)]) { Ok(()) } else { Err(seen) }
    });
    let done = reload.end(PATIENT);
    assert_eq!(done.code, 0, "{done:#?}");
    load.more(300);
    load.stop().lost_nothing(1000);
    assert_eq!(versions(), BTreeSet::from([bare(&to)]));
    home.ok(&["describe", "web"]).says("node version").says(&bare(&to));
}

#[test]
fn pain_37_the_interpreter_is_looked_for_anew_at_each_spawn() {
    let home = Home::new();
    let (from, to) = (Node::installed(), Node::other());
    // As a version manager does it: a directory in PATH whose link moves.
    let link = |node: &Node| {
        let path = home.work().join("bin/node");
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let _ = std::fs::remove_file(&path);
        std::os::unix::fs::symlink(&node.binary, path).unwrap();
    };
    link(&from);
    home.write(
        "app.js",
        "require('fs').appendFileSync('seen', process.version + '\\n'); setInterval(() => {}, 1000);",
    );
    home.start(&format!(
        "[[apps]]\nname = 'app'\nscript = 'app.js'\n[apps.env]\nPATH = '{}:/usr/bin:/bin'\n",
        home.work_file("bin")
    ));
    home.file_with("seen", &from.version);
    link(&to);
    crate::support::process::end(home.pid("app"));
    home.file_with("seen", &to.version);
    link(&from);
    home.ok(&["restart", "app"]);
    wait_until("it is back", PATIENT, || {
        let seen = home.read("seen");
        if seen.lines().count() == 3 && seen.ends_with(&format!("{}\n", from.version)) {
            Ok(())
        } else {
            Err(seen)
        }
    });
}
