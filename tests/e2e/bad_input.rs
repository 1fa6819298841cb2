//! Bad input gets a clear error and changes nothing.

use super::support::genuine;
use super::support::home::Running;
use super::support::load;
use super::support::wait::equal;
use super::support::{Home, PATIENT, SOON, fixture, free_port, process, secs, stays};

/// A home with an app whose row and process must stay as they are.
fn with_bystander() -> (Home, i32) {
    let home = Home::new();
    home.ok(&["start", "sleep", "--name", "bystander", "--", "1000"]);
    let pid = home.pid("bystander");
    (home, pid)
}

#[track_caller]
fn unchanged(home: &Home, pid: i32) {
    let rows = home.rows();
    assert_eq!(rows.len(), 1, "{rows:#?}");
    assert_eq!((rows[0].name.as_str(), rows[0].pid, rows[0].status.as_str()), ("bystander", pid, "online"));
}

#[test]
fn a_missing_script_starts_nothing_and_is_named() {
    let (home, pid) = with_bystander();
    for args in [vec!["start", "./nowhere.js"], vec!["start", "nowhere.js"], vec!["start", "/no/where"]] {
        let name = args[1].trim_start_matches("./");
        home.exits(2, &args).says(name);
    }
    home.ecosystem("[[apps]]\nname = 'a'\nscript = 'nowhere.js'\n");
    home.exits(2, &["start", "ecosystem.toml"]).says("nowhere.js");
    home.exits(2, &["start", "missing.toml"]).says("missing.toml");
    unchanged(&home, pid);
}

#[test]
fn a_bad_app_in_a_file_keeps_the_good_ones_from_starting() {
    let (home, pid) = with_bystander();
    home.ecosystem(
        "[[apps]]\nname = 'good'\nscript = 'sleep'\nargs = ['1']\n[[apps]]\nname = 'bad'\nscript = 'nowhere.js'\n",
    );
    home.exits(2, &["start", "ecosystem.toml"]);
    unchanged(&home, pid);
}

#[test]
fn an_unknown_interpreter_starts_nothing_and_is_named() {
    let (home, pid) = with_bystander();
    home.write("app.js", "");
    home.exits(2, &["start", "app.js", "--interpreter", "pythonn9"]).says("pythonn9");
    home.ecosystem("[[apps]]\nname = 'a'\nscript = 'app.js'\ninterpreter = '/opt/none/such'\n");
    home.exits(2, &["start", "ecosystem.toml"]).says("/opt/none/such");
    unchanged(&home, pid);
}

#[test]
fn bad_toml_is_shown_with_file_line_and_column() {
    let (home, pid) = with_bystander();
    home.ecosystem("[[apps]]\nname = 'a'\nscript = = 'sleep'\n");
    let run = home.exits(2, &["start", "ecosystem.toml"]);
    run.says("ecosystem.toml").says("3");
    home.write("binary.toml", "\u{0}\u{1}");
    home.exits(2, &["start", "binary.toml"]);
    std::fs::write(home.work().join("latin1.toml"), b"name = '\xe4'").unwrap();
    home.exits(2, &["start", "latin1.toml"]);
    unchanged(&home, pid);
}

#[test]
fn an_unknown_key_is_an_error_with_the_likely_one() {
    let (home, pid) = with_bystander();
    home.ecosystem("[[apps]]\nname = 'a'\nscript = 'sleep'\nkill_timout = '5s'\n");
    home.exits(2, &["start", "ecosystem.toml"])
        .says("ecosystem.toml")
        .says("4")
        .says("kill_timout")
        .says("kill_timeout");
    home.ecosystem("[[app]]\nname = 'a'\nscript = 'sleep'\n");
    home.exits(2, &["start", "ecosystem.toml"]).says("apps");
    home.exits(2, &["start", "sleep", "--nmae", "x"]).says("--name");
    home.exits(2, &["strat", "sleep"]).says("start");
    unchanged(&home, pid);
}

#[test]
fn values_of_the_wrong_kind_are_errors_that_name_the_key() {
    let (home, pid) = with_bystander();
    for (key, value) in [
        ("instances", "-5000"),
        ("instances", "'many'"),
        ("instances", "1.5"),
        ("kill_timeout", "'soon'"),
        ("kill_timeout", "-1"),
        ("balance", "'roundrobin'"),
        ("exec_mode", "'cluter'"),
        ("kill_signal", "'SIGNOPE'"),
        ("listen", "['no port']"),
        ("args", "{ a = 1 }"),
        ("env", "'A=1'"),
        ("autorestart", "'perhaps'"),
        ("stop_exit_codes", "['x']"),
        ("env_file", "'nowhere.env'"),
        ("cwd", "'/no/such/directory'"),
    ] {
        home.ecosystem(&format!("[[apps]]\nname = 'a'\nscript = 'sleep'\n{key} = {value}\n"));
        home.exits(2, &["start", "ecosystem.toml"]).says(key);
        unchanged(&home, pid);
    }
    home.exits(2, &["start", "sleep", "-i", "-5000"]);
    home.exits(2, &["scale", "bystander", "-5000"]);
    home.exits(2, &["scale", "bystander", "0"]);
    unchanged(&home, pid);
}

#[test]
fn instances_minus_5_on_a_small_machine_is_an_error() {
    let (home, pid) = with_bystander();
    if std::thread::available_parallelism().unwrap().get() > 5 {
        return;
    }
    home.ecosystem("[[apps]]\nname = 'a'\nscript = 'sleep'\nargs = ['1000']\ninstances = -5\n");
    home.exits(2, &["start", "ecosystem.toml"]).says("instances");
    unchanged(&home, pid);
}

#[test]
fn impossible_names_are_errors_that_quote_them() {
    let (home, pid) = with_bystander();
    let long = "n".repeat(10_000);
    for name in [
        "a/b",
        "../up",
        "..",
        "it's",
        "say \"hi\"",
        "two\nlines",
        "",
        " ",
        "-x",
        ".hidden",
        "all",
        "42",
        &long,
    ] {
        home.ecosystem(&format!(
            "[[apps]]\nname = {}\nscript = 'sleep'\nargs = ['1000']\n",
            toml::Value::String(name.to_owned())
        ));
        let run = home.exits(2, &["start", "ecosystem.toml"]);
        assert!(run.text().len() < 4000, "a long name is shortened: {} bytes", run.text().len());
        let arg = format!("--name={name}");
        home.exits(2, &["start", "sleep", &arg, "--", "1000"]);
    }
    unchanged(&home, pid);
    // Nothing was written outside.
    assert!(!home.path().parent().unwrap().join("up-out.log").try_exists().unwrap());
}

#[test]
fn two_apps_of_one_name_or_one_address_are_an_error() {
    let (home, pid) = with_bystander();
    let app = "[[apps]]\nname = 'a'\nscript = 'sleep'\nargs = ['1000']\n";
    home.ecosystem(&format!("{app}{app}"));
    home.exits(2, &["start", "ecosystem.toml"]).says("a");
    let port = free_port();
    let listen = format!("exec_mode = 'cluster'\nlisten = ['127.0.0.1:{port}']\n");
    home.ecosystem(&format!("{app}{listen}{}{listen}", app.replace("'a'", "'b'")));
    home.exits(2, &["start", "ecosystem.toml"]).says(&port.to_string());
    unchanged(&home, pid);
}

#[test]
fn pain_10_a_port_in_use_fails_the_start_and_the_message_names_who_holds_it() {
    let (home, _) = with_bystander();
    let port = free_port();
    let holder = genuine::port_holder(&home, port);
    home.ecosystem(&format!(
        "[[apps]]\nname = 'inherit'\nscript = 'sleep'\nargs = ['1000']\nexec_mode = 'cluster'\n\
         listen = ['127.0.0.1:{port}']\n"
    ));
    let run = home.exits(1, &["start", "ecosystem.toml"]);
    run.says(&port.to_string()).says(&holder.pid().to_string());
    // In a Node cluster the app itself asks for the port, and is told.
    home.ecosystem(&format!(
        "[[apps]]\nname = 'cluster'\nscript = '{}'\nexec_mode = 'cluster'\ninstances = 1\nmax_restarts = 2\n\
         env = {{ PORT = '{port}' }}\n",
        fixture("web-plain.js")
    ));
    let run = home.exits(1, &["start", "ecosystem.toml"]);
    run.says("EADDRINUSE").says(&holder.pid().to_string());
    assert_eq!(home.row("bystander").status, "online");
}

#[test]
fn a_home_that_cannot_be_written_is_an_error_that_names_it() {
    let home = Home::new();
    // A file where a directory should be: this stops root as well.
    let path = home.write("not-a-directory", "");
    for place in [format!("{path}/home"), "/proc/no-home-here".to_owned()] {
        let mut command = home.command(&["start", "sleep", "--", "1000"]);
        command.env("PM_HOME", &place);
        let run = super::support::home::run(command, PATIENT);
        assert!(matches!(run.code, 1 | 2 | 4), "{run:?}");
        run.says(&place);
        assert!(run.took < secs(6), "{run:?}");
    }
}

#[test]
fn process_send_of_null_and_other_oddities_hurt_nobody() {
    let (home, pid) = with_bystander();
    let port = free_port();
    home.write(
        "app.js",
        "for (const m of [null, 0, '', false, [], {}, 'x'.repeat(1e6), { cmd: 'NODE_' }, { cmd: 'NODE_NOPE' },\n\
           { cmd: 'NODE_CLUSTER' }, { cmd: 'NODE_CLUSTER', act: 'nope', seq: 1 }, '\\ud800', { a: { b: [[[[null]]]] } },\n\
           { cmd: 'NODE_CLUSTER', act: 'queryServer', seq: 'x' }, { cmd: 'NODE_HANDLE_ACK' },\n\
           { type: 'process:msg', data: null }, { type: 'axm:monitor' }])\n  process.send(m);\n\
         const garbage = Buffer.from('no json at all\\n{\"cmd\":\\n\\n\\u0000\\n' + '['.repeat(5000) + '\\n');\n\
         const spew = (at) => {\n\
           try { while (at < garbage.length) at += require('fs').writeSync(3, garbage, at); }\n\
           catch (error) { if (error.code !== 'EAGAIN') throw error; setTimeout(spew, 1, at); }\n\
         };\n\
         setTimeout(spew, 100, 0);\n\
         require('http').createServer((q, r) => r.end('ok')).listen(Number(process.env.PORT), '127.0.0.1');\n",
    );
    let (keeper, supervisor) = (home.keeper(), home.supervisor());
    home.start(&format!(
        "[[apps]]\nname = 'odd'\nscript = 'app.js'\nexec_mode = 'cluster'\ninstances = 2\nenv = {{ PORT = '{port}' }}\n"
    ));
    assert_eq!(load::get(port, "/").unwrap().body, "ok");
    stays("everybody lives on", secs(1), || {
        equal((home.keeper(), home.supervisor(), home.pid("bystander")), &(keeper, supervisor, pid))
    });
    assert_eq!(home.statuses("odd"), ["online", "online"]);
    home.ok(&["reload", "odd"]);
    assert_eq!(load::get(port, "/").unwrap().body, "ok");
}

#[test]
fn an_interrupted_command_leaves_the_daemon_in_order() {
    let (home, pid) = with_bystander();
    for _ in 0..10 {
        let mut command = Running::start(home.command(&["restart", "bystander"]), b"");
        let _ = command.child.kill();
        command.end(SOON);
    }
    let row = home.wait_status("bystander", "online");
    assert!(process::alive(row.pid));
    assert!(row.pid == pid || !process::alive(pid), "one process: {}", home.process_list());
}

#[test]
fn wrong_usage_exits_2_and_starts_no_daemon() {
    let home = Home::new();
    for args in [
        &["start"][..],
        &["nonsense"],
        &["scale", "x"],
        &["scale", "x", "y"],
        &["logs", "--lines", "x"],
        &["start", "sleep", "--kill-timeout", "soon"],
        &["check"],
        &["start", "sleep", "-i", "some"],
    ] {
        home.exits(2, args);
    }
    assert!(!home.has_daemon(), "{}", home.process_list());
}
