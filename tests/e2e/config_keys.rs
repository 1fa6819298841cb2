//! Each key of the config does what it says. Keys that other subjects show are tested there (restart policy, logs,
//! environment, reload, ready); the last test here sees to it that no key is forgotten.

use serde_json::Value;

use super::support::load;
use super::support::{Home, PATIENT, SOON, fixture, free_port, millis, process, secs, wait_until};

const SLEEPER: &str = "[[apps]]\nname = 'job'\nscript = 'sleep'\nargs = ['1000']\n";

/// Starts the reporting fixture with these keys and returns what it saw.
fn report(home: &Home, keys: &str) -> Value {
    home.start(&format!("[[apps]]\nname = 'job'\nscript = '{}'\n{keys}\n", fixture("report.py")));
    let text = wait_until("the report", PATIENT, || {
        let text = home.read("report-0.json");
        if text.is_empty() { Err("none") } else { Ok(text) }
    });
    serde_json::from_str(&text).unwrap()
}

#[test]
fn args_as_list_and_as_line() {
    for keys in ["args = ['--a', 'b c']", "args = \"--a 'b c'\""] {
        let home = Home::new();
        assert_eq!(report(&home, keys)["argv"], serde_json::json!(["--a", "b c"]));
    }
}

#[test]
fn cwd_is_where_it_runs_and_relative_paths_start_there() {
    let home = Home::new();
    home.write("site/app.sh", "pwd >here\nexec sleep 1000\n");
    home.start("[[apps]]\nname = 'job'\nscript = './app.sh'\ncwd = 'site'\nout_file = 'log/out.log'\n");
    assert_eq!(home.file_with("site/here", "site").trim(), home.work_file("site"));
    assert!(home.work().join("site/log/out.log").is_file());
}

#[test]
fn interpreter_and_its_arguments_come_before_the_script() {
    let home = Home::new();
    home.write("app.txt", "import time\ntime.sleep(1000)\n");
    for (n, keys) in ["interpreter_args = ['-B', '-s']", "node_args = ['-B', '-s']"].into_iter().enumerate() {
        home.start(&format!(
            "[[apps]]\nname = 'job{n}'\nscript = 'app.txt'\ninterpreter = 'python3'\n{keys}\n"
        ));
        let line = process::cmdline(home.pid(&format!("job{n}")));
        assert_eq!(line[1..], ["-B".to_owned(), "-s".to_owned(), home.work_file("app.txt")], "{line:?}");
    }
}

#[test]
fn only_shell_has_a_shell_run_the_script() {
    let home = Home::new();
    home.start(
        "[[apps]]\nname = 'job'\nscript = 'echo $((20 + 3)) >here && exec sleep 1000'\nshell = true\n",
    );
    home.file_with("here", "23");
    let plain =
        home.write("plain.toml", "[[apps]]\nname = 'plain'\nscript = 'echo $((20 + 3)) && sleep 1000'\n");
    home.exits(2, &["start", &plain]).says("set `shell = true`");
}

#[test]
fn interpreter_none_executes_the_script_itself() {
    let home = Home::new();
    let path = home.write("app.js", "#!/bin/sh\nexec sleep 1000\n");
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    home.start("[[apps]]\nname = 'job'\nscript = 'app.js'\ninterpreter = 'none'\n");
    wait_until("it is a sleep", SOON, || {
        let line = process::cmdline(home.pid("job"));
        if line == ["sleep", "1000"] { Ok(()) } else { Err(line) }
    });
}

#[test]
fn exec_mode_fork_keeps_several_node_instances_apart() {
    let home = Home::new();
    home.write(
        "app.js",
        "require('fs').writeFileSync('w' + process.env.NODE_APP_INSTANCE, String(require('cluster').isWorker) + '\\n');\n\
         setInterval(() => {}, 1e6);\n",
    );
    home.start("[[apps]]\nname = 'job'\nscript = 'app.js'\nexec_mode = 'fork'\ninstances = 2\n");
    assert_eq!(home.file_with("w0", "\n").trim(), "false");
    assert_eq!(home.file_with("w1", "\n").trim(), "false");
}

#[test]
fn instances_negative_is_processors_minus_that() {
    let home = Home::new();
    let processors = std::thread::available_parallelism().unwrap().get();
    home.ecosystem(&format!("{SLEEPER}exec_mode = 'fork'\ninstances = -1\n"));
    if processors > 1 {
        home.ok(&["start", "ecosystem.toml"]);
        assert_eq!(home.rows_of("job").len(), processors - 1);
    } else {
        home.exits(2, &["start", "ecosystem.toml"]);
    }
}

#[test]
fn namespace_is_shown() {
    let home = Home::new();
    home.start(&format!("{SLEEPER}namespace = 'site'\n"));
    assert_eq!(home.row("job").env("namespace"), "site");
}

#[test]
fn listen_opens_sockets_and_hands_them_over_in_order() {
    let home = Home::new();
    let (one, two) = (free_port(), free_port());
    let seen = report(
        &home,
        &format!(
            "exec_mode = 'cluster'\ninstances = 1\nargs = ['{{fd:web}}', '{{fd:app}}']\n\
             listen = [{{ address = '127.0.0.1:{one}', name = 'web', backlog = 77 }}, 'unix:app.sock',\n\
                       {{ address = '127.0.0.1:{two}', name = 'old', blocking = true }}]"
        ),
    );
    let listeners = &seen["listeners"];
    assert_eq!(listeners[0]["address"], serde_json::json!(["127.0.0.1", one]));
    assert_eq!(listeners[0]["backlog"], 77);
    assert_eq!(listeners[0]["blocking"], false);
    assert_eq!(listeners[1]["address"], home.work_file("app.sock").as_str());
    assert_eq!(listeners[2]["blocking"], true);
    assert_eq!(listeners[2]["backlog"], 511);
    assert_eq!(seen["argv"], serde_json::json!(["3", "4"]));
    let env = &seen["env"];
    assert_eq!(env["LISTEN_FDS"], "3");
    assert_eq!(env["LISTEN_PID"], seen["pid"].to_string().as_str());
    assert_eq!(env["LISTEN_FDNAMES"], "web:app:old");
    assert_eq!(env["PM_LISTEN_FD_web"].as_str().or(env["PM_LISTEN_FD_WEB"].as_str()), Some("3"));
    // A listener is open from the first start to `stopped`: restarts keep it, stop closes it.
    let connect = || std::net::TcpStream::connect(("127.0.0.1", one)).is_ok();
    assert!(connect());
    home.ok(&["stop", "job"]);
    assert!(!connect());
    assert!(!home.work().join("app.sock").try_exists().unwrap(), "the socket file goes with its listener");
    home.ok(&["start", "job"]);
    assert!(connect());
}

#[test]
fn a_listener_stays_open_while_its_app_waits_for_a_restart() {
    let home = Home::new();
    let port = free_port();
    home.write("app.sh", "sleep 0.3; exit 1\n");
    home.start(&format!(
        "[[apps]]\nname = 'job'\nscript = 'app.sh'\nexec_mode = 'cluster'\nlisten = ['127.0.0.1:{port}']\n\
         restart_delay = '100s'\nmin_uptime = '100ms'\n"
    ));
    home.wait_status("job", "waiting restart");
    std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
}

#[test]
fn balance_round_robin_takes_turns_and_shared_lets_workers_accept() {
    let home = Home::new();
    for (n, balance) in ["round-robin", "shared"].into_iter().enumerate() {
        let port = free_port();
        home.start(&format!(
            "[[apps]]\nname = 'web{n}'\nscript = '{}'\nexec_mode = 'cluster'\ninstances = 2\nbalance = '{balance}'\n\
             env = {{ PORT = '{port}' }}\n",
            fixture("web-plain.js")
        ));
        let turns: Vec<String> =
            (0..20).map(|_| load::get(port, "/").unwrap().header("x-slot").to_owned()).collect();
        let alternates = turns.windows(2).all(|pair| pair[0] != pair[1]);
        if balance == "round-robin" {
            assert!(alternates, "{turns:?}");
        }
        // Who holds the listening socket tells the two apart for certain.
        let inode = listening_inode(port);
        let worker = process::descriptors(home.pids(&format!("web{n}"))[0]);
        let held = worker.values().any(|target| *target == format!("socket:[{inode}]"));
        assert_eq!(held, balance == "shared", "{worker:?}");
    }
}

fn listening_inode(port: u16) -> String {
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let wanted = format!(":{port:04X}");
    let line = table.lines().find(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        fields.get(1).is_some_and(|a| a.ends_with(&wanted)) && fields.get(3) == Some(&"0A")
    });
    line.unwrap_or_else(|| panic!("nobody listens on {port}: {table}"))
        .split_whitespace()
        .nth(9)
        .unwrap()
        .to_owned()
}

#[test]
fn kill_signal_is_the_signal_that_ends_it() {
    for signal in ["SIGTERM", "SIGHUP", "USR2"] {
        let home = Home::new();
        home.start(&format!(
            "[[apps]]\nname = 'job'\nscript = '{}'\nkill_signal = '{signal}'\n",
            fixture("life.py")
        ));
        home.file_with("life", "boot");
        home.ok(&["stop", "job"]);
        assert_eq!(home.read("life"), format!("boot\nSIG{}\n", signal.trim_start_matches("SIG")));
    }
}

/// What parent and child noted when the app `family.py` behind a shell was stopped.
fn family(kill_mode: &str, shell: bool) -> String {
    let home = Home::new();
    let app = fixture("family.py");
    let run = if shell {
        format!("script = 'sh'\nargs = ['-c', 'python3 {app}; true']")
    } else {
        format!("script = '{app}'")
    };
    home.start(&format!("[[apps]]\nname = 'job'\n{run}\nkill_mode = '{kill_mode}'\nkill_timeout = '3s'\n"));
    home.file_with("family", "ready");
    home.ok(&["stop", "job"]);
    home.read("family")
}

#[test]
fn kill_mode_target_signals_the_program_behind_the_shell() {
    let noted = family("target", true);
    assert!(noted.starts_with("ready\nparent got SIGINT\nparent ends\n"), "{noted}");
}

#[test]
fn kill_mode_group_signals_every_process_at_once() {
    let noted = family("group", false);
    let child = noted.find("child got SIGINT").unwrap_or_else(|| panic!("{noted}"));
    let end = noted.find("parent ends").unwrap_or_else(|| panic!("{noted}"));
    assert!(child < end, "{noted}");
}

#[test]
fn kill_mode_main_signals_the_main_process_only() {
    let noted = family("main", false);
    assert!(noted.starts_with("ready\nparent got SIGINT\nparent ends\n"), "{noted}");
}

/// Stops a worker without a SIGINT handler while a request that takes so long is in flight, and returns what its client
/// got.
fn answer_while_stopping(keys: &str, millis: u32) -> Result<load::Reply, load::Failure> {
    let home = Home::new();
    let port = free_port();
    home.write(
        "app.js",
        &format!(
            "require('http').createServer((q, r) => {{\n\
               if (q.url !== '/slow') return r.end('ok');\n\
               console.log('in flight');\n\
               setTimeout(() => r.end('whole'), {millis});\n\
             }}).listen(Number(process.env.PORT), '127.0.0.1');\n"
        ),
    );
    home.start(&format!(
        "[[apps]]\nname = 'web'\nscript = 'app.js'\nexec_mode = 'cluster'\ninstances = 1\nmerge_logs = true\n{keys}\n\
         env = {{ PORT = '{port}' }}\n"
    ));
    let slow = std::thread::spawn(move || load::get(port, "/slow"));
    home.log_with("web-out.log", "in flight");
    home.ok(&["stop", "web"]);
    slow.join().unwrap()
}

#[test]
fn the_agent_finds_out_that_an_app_has_no_handler() {
    assert_eq!(answer_while_stopping("", 600).unwrap().body, "whole");
}

#[test]
fn without_the_agent_stop_method_decides() {
    // Longer than any command takes to get to its signal.
    answer_while_stopping("agent = false\nstop_method = 'signal'", 10_000).unwrap_err();
    assert_eq!(
        answer_while_stopping("agent = false\nstop_method = 'disconnect'", 600).unwrap().body,
        "whole"
    );
}

#[test]
fn agent_false_preloads_nothing_and_describe_says_which_promise_is_weaker() {
    let home = Home::new();
    home.write(
        "app.js",
        "console.log('required', JSON.stringify(process.execArgv), process.env.NODE_OPTIONS || '');\n\
        setInterval(() => {}, 1e6);\n",
    );
    home.start("[[apps]]\nname = 'on'\nscript = 'app.js'\n[[apps]]\nname = 'off'\nscript = 'app.js'\nagent = false\n");
    home.log_with("off-out.log", "required []");
    home.log_with("on-out.log", "required");
    let line = |name: &str| {
        process::cmdline(home.pid(name)).join(" ")
            + &process::environ(home.pid(name)).get("NODE_OPTIONS").cloned().unwrap_or_default()
    };
    assert!(line("on").contains("agent"), "{}", line("on"));
    assert!(!line("off").contains("agent"), "{}", line("off"));
    home.ok(&["describe", "off"]).says("agent");
}

#[test]
fn shutdown_with_message_sends_the_word_instead_of_a_signal() {
    let home = Home::new();
    home.write(
        "app.js",
        "const note = (what) => require('fs').appendFileSync('notes', what + '\\n');\n\
         process.on('SIGINT', () => { note('SIGINT'); process.exit(0); });\n\
         process.on('message', (m) => { note('message ' + m); process.exit(0); });\nnote('up');\n",
    );
    home.start("[[apps]]\nname = 'job'\nscript = 'app.js'\nshutdown_with_message = true\n");
    home.file_with("notes", "up");
    home.ok(&["stop", "job"]);
    assert_eq!(home.read("notes"), "up\nmessage shutdown\n");
}

#[test]
fn drain_timeout_bounds_the_wait_before_the_signal() {
    for (drain, least, most) in [("200ms", 0, 1200), ("1500ms", 1300, 2900)] {
        let home = Home::alone();
        let port = free_port();
        home.write(
            "app.js",
            "require('http').createServer(() => console.log('in flight')).listen(Number(process.env.PORT), '127.0.0.1');\n\
             process.on('SIGINT', () => process.exit(0));\n",
        );
        home.start(&format!(
            "[[apps]]\nname = 'web'\nscript = 'app.js'\nexec_mode = 'cluster'\ninstances = 1\nmerge_logs = true\n\
             drain_timeout = '{drain}'\nkill_timeout = '5s'\nenv = {{ PORT = '{port}' }}\n"
        ));
        let slow = std::thread::spawn(move || load::get(port, "/"));
        home.log_with("web-out.log", "in flight");
        let run = home.ok(&["stop", "web"]);
        assert!(run.took >= millis(least) && run.took <= millis(most), "{drain}: {run:?}");
        slow.join().unwrap().unwrap_err();
    }
}

#[test]
fn stdin_is_an_open_silent_pipe_or_null() {
    let home = Home::new();
    home.start(&format!(
        "{SLEEPER}[[apps]]\nname = 'null'\nscript = 'sleep'\nargs = ['1000']\nstdin = 'null'\n"
    ));
    assert!(process::descriptors(home.pid("job"))[&0].starts_with("pipe:"));
    assert_eq!(process::descriptors(home.pid("null"))[&0], "/dev/null");
    // Reading blocks: no end of file, nothing to read.
    home.start("[[apps]]\nname = 'cat'\nscript = 'cat'\n");
    super::support::stays("cat waits", secs(1), || {
        let row = home.row("cat");
        if row.status == "online" && row.restarts == 0 { Ok(()) } else { Err(row) }
    });
}

#[test]
fn autostart_false_is_listed_as_stopped_until_started_by_name() {
    let home = Home::new();
    home.start(&format!("{SLEEPER}autostart = false\n"));
    assert_eq!(home.row("job").status, "stopped");
    home.ok(&["start", "job"]);
    assert_eq!(home.row("job").status, "online");
}

#[test]
fn durations_are_understood_in_both_spellings() {
    for value in ["1500", "'1500ms'", "'1.5s'"] {
        let home = Home::new();
        home.write(
            "app.py",
            "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nopen('up','w').write('up')\n\
            while True: signal.pause()\n",
        );
        home.start(&format!("[[apps]]\nname = 'job'\nscript = 'app.py'\nkill_timeout = {value}\n"));
        home.file_with("up", "up");
        let run = home.ok(&["stop", "job"]);
        assert!(run.took >= millis(1400) && run.took < millis(4000), "{value}: {run:?}");
    }
}

#[test]
fn port_sets_the_variable_and_opens_nothing() {
    let home = Home::new();
    let port = free_port();
    home.start(&format!("{SLEEPER}port = {port}\n"));
    assert_eq!(process::environ(home.pid("job"))["PORT"], port.to_string());
    assert!(std::net::TcpStream::connect(("127.0.0.1", port)).is_err());
}

#[test]
fn start_parallelism_bounds_how_many_launch_at_once() {
    for (limit, least) in [(1, 4 * 300), (4, 300)] {
        let home = Home::alone();
        home.write(
            "app.py",
            "import os, time\ntime.sleep(0.3)\nos.write(int(os.environ['PM_READY_FD']), b'\\n')\ntime.sleep(1000)\n",
        );
        let run = home.start(&format!(
            "start_parallelism = {limit}\n[[apps]]\nname = 'job'\nscript = 'app.py'\nwait_ready = true\n\
             exec_mode = 'fork'\ninstances = 4\n"
        ));
        assert!(run.took >= millis(least) && run.took < millis(least + 850), "{limit} at once: {run:?}");
    }
}

#[test]
fn strategy_rolling_replaces_one_slot_after_the_other() {
    let home = Home::new();
    let port = free_port();
    home.start(&format!(
        "[[apps]]\nname = 'web'\nscript = '{}'\nexec_mode = 'cluster'\ninstances = 2\nwait_ready = true\n\
         strategy = 'rolling'\nenv = {{ PORT = '{port}', BOOT_MS = '100', LIFE = '{}' }}\n",
        fixture("web-slow-boot.js"),
        home.work_file("life"),
    ));
    home.write("life", "");
    home.ok(&["reload", "web"]);
    let life = home.read("life");
    let boots: Vec<&str> = life.lines().filter(|line| line.starts_with("boot")).collect();
    assert!(boots[0].starts_with("boot 0") && boots[1].starts_with("boot 1"), "{life}");
    let ready = life.find("ready 0").unwrap();
    assert!(ready < life.find("boot 1").unwrap(), "{life}");
    home.ecosystem("[[apps]]\nname = 'web'\nscript = 'sleep'\nstrategy = 'all-at-once'\n");
    home.exits(2, &["check", "ecosystem.toml"]).says("strategy");
}

#[test]
fn every_key_of_the_example_is_used_in_a_test() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let example = std::fs::read_to_string(root.join("ecosystem.example.toml")).unwrap();
    let mut tests = String::new();
    for entry in root.join("tests/e2e").read_dir().unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            tests += &std::fs::read_to_string(path).unwrap();
        }
    }
    let mut keys = std::collections::BTreeSet::new();
    for line in example.lines() {
        let line = line.trim_start_matches(['#', ' ']);
        let Some((key, _)) = line.split_once('=') else { continue };
        let key = key.trim().trim_start_matches("apps.");
        if !key.is_empty() && key.chars().all(|c| c.is_ascii_lowercase() || c == '_') {
            keys.insert(key.to_owned());
        }
    }
    assert!(keys.len() > 30, "the example shows every key: {keys:?}");
    // As it stands in a config: at the start of a line or of a string, or within braces.
    let used = |key: &str| {
        let text = format!("{key} = ");
        tests.match_indices(&text).any(|(at, _)| {
            let before = tests[..at].trim_end_matches(' ');
            ["\\n", "\n", "\"", "{", "}"].iter().any(|end| before.ends_with(end))
        })
    };
    let unused: Vec<&String> = keys.iter().filter(|key| !used(key)).collect();
    assert!(unused.is_empty(), "keys without a test that shows their effect: {unused:?}");
}
