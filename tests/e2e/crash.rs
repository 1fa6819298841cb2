//! The daemon is never the weak point: the supervisor may die at any time, the keeper stays small.

use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit};

use super::support::load::{self, Connections, Load};
use super::support::node::Node;
use super::support::wait::equal;
use super::support::{Home, PATIENT, SOON, fixture, free_port, process, secs, stays, wait_until};

fn cluster(port: u16, balance: &str) -> String {
    format!(
        "[[apps]]\nname = 'web'\nscript = '{}'\nexec_mode = 'cluster'\ninstances = 2\nbalance = '{balance}'\n\
         interpreter = '{}'\nenv = {{ PORT = '{port}' }}\n",
        fixture("web-textbook.js"),
        Node::installed().binary,
    )
}

/// Kills the supervisor and returns when a list is right again, which takes a tenth of a second, or ten on a machine with
/// a load of thirty.
fn kill_the_supervisor(home: &Home, app: &str) {
    let expected: Vec<_> =
        home.rows_of(app).iter().map(|row| (row.pid, row.status.clone(), row.restarts)).collect();
    let old = home.supervisor();
    process::end(old);
    let killed = Instant::now();
    let run = home.pm(&["jlist"]);
    let took = Instant::now().duration_since(killed);
    assert_eq!(run.code, 0, "{run:?}");
    assert!(took <= secs(10), "the list came after {took:?}");
    let rows: Vec<_> =
        home.rows_of(app).iter().map(|row| (row.pid, row.status.clone(), row.restarts)).collect();
    assert_eq!(rows, expected);
    assert_ne!(home.supervisor(), old);
}

#[test]
fn pain_13_supervisor_killed_under_load_loses_nothing_in_shared_mode() {
    let home = Home::loaded();
    let port = free_port();
    home.start(&cluster(port, "shared"));
    let before: Vec<_> = home.pids("web").into_iter().map(process::identity).collect();
    let keeper = process::identity(home.keeper());
    let load = Load::start(port, 16, Connections::OnePerRequest);
    load.more(200);
    for _ in 0..3 {
        kill_the_supervisor(&home, "web");
        load.more(300);
    }
    let list = home.ok(&["list"]);
    list.says("web").says("online");
    let after: Vec<_> = home.pids("web").into_iter().map(process::identity).collect();
    assert_eq!(after, before, "same pids and start ticks");
    assert_eq!(process::identity(home.keeper()), keeper);
    // The adopted workers are reloaded like any other.
    home.ok(&["reload", "web"]);
    load.more(200);
    load.stop().lost_nothing(1000);
}

#[test]
fn supervisor_killed_under_load_loses_at_most_one_request_in_round_robin() {
    let home = Home::loaded();
    let port = free_port();
    home.start(&cluster(port, "round-robin"));
    let before: Vec<_> = home.pids("web").into_iter().map(process::identity).collect();
    let load = Load::start(port, 16, Connections::OnePerRequest);
    load.more(200);
    kill_the_supervisor(&home, "web");
    load.more(1000);
    let tally = load.stop();
    eprintln!("{tally:?}");
    assert!(tally.failed() <= 1, "{tally:?}");
    let after: Vec<_> = home.pids("web").into_iter().map(process::identity).collect();
    assert_eq!(after, before);
    assert!(tally.slowest < secs(2), "round robin goes on with the next supervisor: {tally:?}");
}

#[test]
fn a_reload_works_and_loses_nothing_after_the_supervisor_was_killed_in_round_robin() {
    let home = Home::loaded();
    let port = free_port();
    home.start(&cluster(port, "round-robin"));
    kill_the_supervisor(&home, "web");
    let load = Load::start(port, 16, Connections::OnePerRequest);
    for _ in 0..2 {
        home.ok(&["reload", "web"]);
        load.more(100);
    }
    load.stop().lost_nothing(200);
}

#[test]
fn an_exit_while_there_is_no_supervisor_is_accounted_for() {
    let home = Home::new();
    home.start(
        "[[apps]]\nname = 'again'\nscript = 'sleep'\nargs = ['1000']\n\
         [[apps]]\nname = 'once'\nscript = 'sh'\nargs = ['-c', 'trap \"exit 7\" TERM; while :; do sleep 0.05; done']\n\
         autorestart = false\n",
    );
    let (again, once) = (home.pid("again"), home.pid("once"));
    process::end(home.supervisor());
    process::end(again);
    process::signal(once, nix::sys::signal::Signal::SIGTERM);
    let row = home.wait_row("again", "started again", |row| row.status == "online" && row.pid != again);
    assert_eq!(row.restarts, 1);
    let row = home.wait_status("once", "stopped");
    assert_eq!(row.env("exit_code"), 7, "{row:?}");
    // Nobody had asked it to end: that is worth a note, also when yet another supervisor tells it.
    home.ok(&["list"]).says("exit code 7");
    process::end(home.supervisor());
    wait_until("the note is back", PATIENT, || {
        let run = home.pm(&["list"]);
        if run.code == 0 && run.text().contains("exit code 7") { Ok(()) } else { Err(run) }
    });
}

#[test]
fn logs_go_on_over_the_death_of_the_supervisor() {
    let home = Home::new();
    home.write("app.sh", "n=0\nwhile :; do n=$((n+1)); echo line $n; sleep 0.01; done\n");
    home.start("[[apps]]\nname = 'talk'\nscript = 'app.sh'\n");
    home.log_with("talk-out.log", "line 20\n");
    process::end(home.supervisor());
    let log = home.log_with("talk-out.log", "line 200\n");
    let numbers: Vec<u64> = log.lines().filter_map(|l| l.strip_prefix("line ")?.parse().ok()).collect();
    let expected: Vec<u64> = (1..=u64::try_from(numbers.len()).unwrap()).collect();
    assert_eq!(numbers, expected, "every line once");
}

#[test]
fn pain_20_a_stop_is_remembered_over_the_death_of_the_supervisor() {
    let home = Home::new();
    home.start(
        "[[apps]]\nname = 'one'\nscript = 'sleep'\nargs = ['1000']\n\
         [[apps]]\nname = 'two'\nscript = 'sleep'\nargs = ['1000']\n",
    );
    home.ok(&["stop", "one"]);
    let two = home.pid("two");
    process::end(home.supervisor());
    wait_until("the list is back", SOON, || {
        let rows = home.rows();
        if rows.len() == 2 { Ok(()) } else { Err(rows) }
    });
    assert_eq!(home.row("one").status, "stopped");
    home.ok(&["stop", "two"]);
    assert!(!process::alive(two));
    stays("both stay stopped", secs(1), || {
        equal(home.rows().into_iter().map(|row| row.status).collect::<Vec<_>>(), &vec!["stopped".into(); 2])
    });
}

#[test]
fn a_worker_survives_many_deaths_of_the_supervisor() {
    let home = Home::loaded();
    let port = free_port();
    home.start(&cluster(port, "shared"));
    let before = home.pids("web");
    for _ in 0..6 {
        process::end(home.supervisor());
        wait_until("a right list", PATIENT, || {
            let run = home.pm(&["jlist"]);
            if run.code == 0 { Ok(()) } else { Err(run) }
        });
    }
    assert_eq!(home.pids("web"), before);
    load::get(port, "/").unwrap();
}

#[test]
fn keeper_has_one_thread_and_little_memory() {
    let home = Home::new();
    let port = free_port();
    home.start(&cluster(port, "round-robin"));
    let keeper = home.keeper();
    assert_eq!(process::stat(keeper).unwrap().threads, 1);
    let dirty = process::private_dirty_kib(keeper);
    eprintln!("Private_Dirty of the keeper: {dirty} KiB");
    assert!(dirty <= 1024, "Private_Dirty of the keeper is {dirty} KiB");
    for pid in home.pids("web") {
        assert_eq!(process::stat(pid).unwrap().parent, keeper, "apps are children of the keeper");
        assert_eq!(process::stat(pid).unwrap().session, pid, "in sessions of their own");
    }
    assert_eq!(process::stat(home.supervisor()).unwrap().parent, keeper);
}

#[test]
fn no_supervisor_has_to_wait_in_accept_for_its_table_of_descriptors_to_grow() {
    let home = Home::new();
    home.ok(&["start", "sleep", "--", "1000"]);
    let (_, limit) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let is_long = || process::status_figure(home.supervisor(), "FDSize") >= limit.min(4096);
    assert!(is_long());
    let old = home.supervisor();
    process::end(old);
    wait_until("the next one is up", PATIENT, || if home.supervisor() == old { Err(old) } else { Ok(()) });
    assert!(is_long());
}

#[test]
fn pain_16_children_get_no_descriptor_of_the_daemon() {
    let home = Home::new();
    let port = free_port();
    home.start(&format!(
        "[[apps]]\nname = 'plain'\nscript = 'sleep'\nargs = ['1000']\n\
         [[apps]]\nname = 'inherits'\nscript = 'sleep'\nargs = ['1000']\nexec_mode = 'cluster'\ninstances = 1\n\
         listen = ['127.0.0.1:{port}']\nmin_uptime = '100ms'\n"
    ));
    let numbers = |name: &str| process::descriptors(home.pid(name)).into_keys().collect::<Vec<_>>();
    assert_eq!(numbers("plain"), [0, 1, 2]);
    assert_eq!(numbers("inherits"), [0, 1, 2, 3]);
}

#[test]
fn commands_learn_the_true_end_of_their_operation_from_the_next_supervisor() {
    let home = Home::loaded();
    let port = free_port();
    home.start(&cluster(port, "round-robin"));
    home.start(&format!(
        "{}[[apps]]\nname = 'plain'\nscript = 'sleep'\nargs = ['1000']\n",
        cluster(port, "round-robin")
    ));
    let commands: [&[&str]; 5] = [
        &["reload", "web"],
        &["restart", "web"],
        &["scale", "web", "3"],
        &["stop", "plain"],
        &["delete", "plain"],
    ];
    for (index, command) in commands.into_iter().enumerate() {
        let before = home.pids("web");
        let running = super::support::home::Running::start(home.command(command), b"");
        // At another point of the operation each time, the first one perhaps before it has begun.
        stays("the operation goes on", Duration::from_millis(30 * u64::try_from(index).unwrap()), || {
            Ok::<_, ()>(())
        });
        process::end(home.supervisor());
        let run = running.end(PATIENT);
        assert_eq!(run.code, 0, "{command:?}: {run:#?}");
        let after = home.pids("web");
        match command[0] {
            "reload" | "restart" => {
                assert!(before.iter().all(|pid| !after.contains(pid)), "{command:?} {before:?} {after:?}");
            }
            "scale" => assert_eq!(after.len(), 3),
            "stop" => assert_eq!(home.row("plain").status, "stopped"),
            _ => assert!(home.rows_of("plain").is_empty()),
        }
        let events = home.ok(&["events", "--json"]).out;
        let mut ended =
            events.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        let ended = ended.rfind(|event| event["event"] == "operation_ended");
        let ended = ended.unwrap_or_else(|| panic!("{command:?}: {events}"));
        assert_eq!((&ended["ok"], &ended["apps"][0]["app"]), (&true.into(), &command[1].into()), "{ended}");
        // A supervisor that dies soon after its birth is started with a delay.
        stays("it lives on", secs(2), || Ok::<_, ()>(()));
    }
}

#[test]
fn a_reload_that_fails_after_the_supervisor_died_still_says_so() {
    let home = Home::new();
    home.write("app.js", "setTimeout(() => process.send('ready'), 100); setInterval(() => {}, 1000);\n");
    home.start(
        "[[apps]]\nname = 'web'\nscript = 'app.js'\nexec_mode = 'cluster'\ninstances = 1\nwait_ready = true\n\
         listen_timeout = '4s'\n",
    );
    let old = home.pid("web");
    home.write("app.js", "setInterval(() => {}, 1000);\n");
    let running = super::support::home::Running::start(home.command(&["reload", "web"]), b"");
    wait_until("the new one is there", SOON, || {
        let tree = process::children(home.keeper());
        let instances = tree.iter().filter(|pid| process::environ(**pid).contains_key("PM_INSTANCE")).count();
        if instances == 2 { Ok(()) } else { Err(instances) }
    });
    process::end(home.supervisor());
    let run = running.end(PATIENT);
    assert_eq!(run.code, 1, "{run:#?}");
    run.says("not reloaded");
    assert_eq!(home.pid("web"), old);
}

#[test]
fn a_kill_whose_supervisor_dies_ends_the_daemon_and_keeps_its_list() {
    let home = Home::new();
    home.write(
        "slow.js",
        "process.on('SIGINT', () => setInterval(() => require('fs').existsSync('go') && process.exit(0), 20));\n\
         setInterval(() => {}, 1000);\n",
    );
    home.start("[[apps]]\nname = 'slow'\nscript = 'slow.js'\nkill_timeout = '60s'\n");
    let running = super::support::home::Running::start(home.command(&["kill"]), b"");
    wait_until("it is stopping", SOON, || {
        let status = home.statuses("slow");
        if status == ["stopping"] { Ok(()) } else { Err(status) }
    });
    process::end(home.supervisor());
    home.write("go", "");
    let run = running.end(PATIENT);
    assert_eq!(run.code, 0, "{run:#?}");
    wait_until(
        "the daemon is gone",
        SOON,
        || {
            if home.has_daemon() { Err(home.process_list()) } else { Ok(()) }
        },
    );
    home.ok(&["resurrect"]);
    home.wait_status("slow", "online");
}

#[test]
fn what_was_lost_with_the_memory_of_supervisors_that_died_quickly_is_found_again() {
    for balance in ["shared", "round-robin"] {
        let home = Home::loaded();
        let port = free_port();
        home.start(&cluster(port, balance));
        let before = home.pids("web");
        home.wear_out_supervisors();
        assert_eq!(home.pids("web"), before);
        let load = Load::start(port, 4, Connections::OnePerRequest);
        load.more(100);
        home.ok(&["reload", "web"]);
        load.more(100);
        load.stop().lost_nothing(200);
    }
}

#[test]
fn a_state_that_nobody_can_read_ends_nothing_and_commands_say_why() {
    let home = Home::new();
    home.start("[[apps]]\nname = 'one'\nscript = 'sleep'\nargs = ['1000']\n");
    let pid = home.pid("one");
    let state = home.path().join("state.json");
    let good = std::fs::read(&state).unwrap();
    let previous = home.path().join("state.json.prev");
    std::fs::write(&state, "garbage").unwrap();
    std::fs::write(&previous, "garbage").unwrap();
    process::end(home.supervisor());
    home.exits(1, &["list"]).says("state.json");
    assert!(process::alive(pid));
    std::fs::write(&state, good).unwrap();
    wait_until("the list is back", PATIENT, || {
        let run = home.pm(&["list"]);
        if run.code == 0 { Ok(()) } else { Err(run) }
    });
    assert_eq!(home.pid("one"), pid);
}
