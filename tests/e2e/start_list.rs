//! Starting and listing: what runs, under which name, and what the table says.

use super::support::load;
use super::support::{Home, SOON, fixture, free_port, process, secs, stays, wait_until};

#[test]
fn start_of_a_file_starts_its_apps_and_prints_the_table() {
    let home = Home::new();
    let run = home.start(
        "[[apps]]\nname = 'one'\nscript = 'sleep'\nargs = ['1000']\n\
         [[apps]]\nname = 'two'\nscript = 'sleep'\nargs = ['1000']\ninstances = 2\nexec_mode = 'fork'\n",
    );
    run.says("one").says("two").says("online");
    assert_eq!(home.rows().len(), 3);
    let list = home.ok(&["list"]);
    list.says("one").says("two").does_not_say("\u{1b}");
    for alias in ["ls", "ps"] {
        home.ok(&[alias]).says("one").says("two");
    }
}

#[test]
fn start_of_a_running_file_says_already_running_and_changes_nothing() {
    let home = Home::new();
    home.start("[[apps]]\nname = 'one'\nscript = 'sleep'\nargs = ['1000']\n");
    let pid = home.pid("one");
    home.ok(&["start", "ecosystem.toml"]).says("already running");
    assert_eq!(home.pid("one"), pid);
}

#[test]
fn start_of_a_changed_file_reloads_the_changed_app_only() {
    let home = Home::new();
    let two = "[[apps]]\nname = 'two'\nscript = 'sleep'\nargs = ['1000']\nmin_uptime = '100ms'\n";
    home.start(&format!(
        "[[apps]]\nname = 'one'\nscript = 'sleep'\nargs = ['1000']\nmin_uptime = '100ms'\n{two}"
    ));
    let before = (home.pid("one"), home.pid("two"));
    home.start(&format!(
        "[[apps]]\nname = 'one'\nscript = 'sleep'\nargs = ['2000']\nmin_uptime = '100ms'\n{two}"
    ));
    assert_ne!(home.pid("one"), before.0);
    assert_eq!(process::cmdline(home.pid("one")).last().unwrap(), "2000");
    assert_eq!(home.pid("two"), before.1);
}

#[test]
fn only_and_env_choose_apps_and_environment() {
    let home = Home::new();
    home.ecosystem(
        "[[apps]]\nname = 'one'\nscript = 'sleep'\nargs = ['1000']\n\
         env = { COLOUR = 'blue' }\nenv_production = { COLOUR = 'green' }\n\
         [[apps]]\nname = 'two'\nscript = 'sleep'\nargs = ['1000']\n\
         [[apps]]\nname = 'three'\nscript = 'sleep'\nargs = ['1000']\n",
    );
    home.ok(&["start", "ecosystem.toml", "--only", "one,three", "--env", "production"]);
    assert_eq!(home.rows().iter().map(|row| row.name.as_str()).collect::<Vec<_>>(), ["one", "three"]);
    assert_eq!(process::environ(home.pid("one"))["COLOUR"], "green");
}

#[test]
fn a_script_is_named_after_its_file_and_gets_the_arguments_behind_the_dashes() {
    let home = Home::new();
    std::fs::copy(fixture("report.py"), home.work().join("report.py")).unwrap();
    home.ok(&["start", "report.py", "--", "--name", "not mine", "-x"]);
    let report: serde_json::Value = serde_json::from_str(&home.file_with("report-0.json", "}")).unwrap();
    assert_eq!(report["argv"], serde_json::json!(["--name", "not mine", "-x"]));
    assert_eq!(report["cwd"], home.work().to_str().unwrap());
    let row = home.row("report");
    assert_eq!(row.env("exec_mode"), "fork_mode");
    assert_eq!(row.env("pm_exec_path"), home.work_file("report.py").as_str());
}

#[test]
fn a_binary_and_a_shell_command_run_as_they_are() {
    let home = Home::new();
    home.ok(&["start", "/bin/sleep", "--name", "binary", "--", "1000"]);
    home.ok(&["start", "sleep 1000 && echo never", "--shell", "--name", "line"]);
    assert_eq!(process::cmdline(home.pid("binary")), ["/bin/sleep", "1000"]);
    let line = home.pid("line");
    wait_until("a shell runs the line", SOON, || {
        let tree: Vec<String> = process::tree(line).into_iter().map(process::describe).collect();
        if tree.len() == 2 { Ok(()) } else { Err(tree) }
    });
}

#[test]
fn command_line_options_arrive_in_the_app() {
    let home = Home::new();
    let app = fixture("report.py");
    home.write("elsewhere/.keep", "");
    home.ok(&[
        "start",
        &app,
        "--name",
        "opt",
        "--cwd",
        &home.work_file("elsewhere"),
        "--interpreter",
        "python3",
    ]);
    let report = home.file_with("elsewhere/report-0.json", "}");
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["cwd"], home.work_file("elsewhere").as_str());
    assert!(process::cmdline(home.pid("opt"))[0].ends_with("python3"));
    // -x and --kill-timeout, --wait-ready, --listen-timeout:
    let text = "import os, time\ntime.sleep(0.3)\nos.write(int(os.environ['PM_READY_FD']), b'\\n')\ntime.sleep(1000)\n";
    home.write("slow.py", text);
    let run = home.ok(&[
        "start",
        "slow.py",
        "--wait-ready",
        "--listen-timeout",
        "20000",
        "--kill-timeout",
        "1000",
        "-x",
        "--name",
        "slow",
    ]);
    assert!(run.took >= super::support::millis(300), "waits for the app to be ready: {run:?}");
    assert_eq!(home.row("slow").status, "online");
    home.write("never.py", "import time\ntime.sleep(1000)\n");
    let run = home.exits(1, &["start", "never.py", "--wait-ready", "--listen-timeout", "500"]);
    assert!(run.took < secs(5), "{run:?}");
}

#[test]
fn instances_of_a_node_script_form_a_cluster() {
    let home = Home::new();
    let port = free_port();
    let mut command = home.command(&["start", &fixture("web-plain.js"), "--name", "web", "-i", "2"]);
    command.env("PORT", port.to_string());
    let run = super::support::home::run(command, SOON);
    assert_eq!(run.code, 0, "{run:?}");
    let rows = home.rows_of("web");
    assert_eq!(rows.len(), 2);
    assert!(rows.iter().all(|row| row.env("exec_mode") == "cluster_mode"), "{rows:?}");
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..20 {
        seen.insert(load::get(port, "/").unwrap().header("x-pid").to_owned());
    }
    assert_eq!(seen.len(), 2, "both workers answer");
}

#[test]
fn i_max_and_0_mean_the_number_of_processors() {
    let home = Home::new();
    let processors = std::thread::available_parallelism().unwrap().get();
    for (n, word) in ["max", "0"].into_iter().enumerate() {
        let name = format!("job{n}");
        home.ok(&["start", "sleep", "--name", &name, "-x", "-i", word, "--", "1000"]);
        assert_eq!(home.rows_of(&name).len(), processors, "-i {word}");
    }
}

#[test]
fn start_of_a_name_starts_the_stopped_and_restarts_the_online() {
    let home = Home::new();
    home.start("[[apps]]\nname = 'job'\nscript = 'sleep'\nargs = ['1000']\n");
    let first = home.pid("job");
    home.ok(&["start", "job"]);
    let second = home.pid("job");
    assert_ne!(second, first, "online: restarted");
    home.ok(&["stop", "job"]);
    assert_eq!(home.row("job").status, "stopped");
    assert_eq!(home.row("job").pid, 0);
    home.ok(&["start", "job"]);
    assert_eq!(home.row("job").status, "online");
}

#[test]
fn a_start_that_fails_prints_the_last_words_and_keeps_the_row() {
    let home = Home::new();
    home.write("app.sh", "echo no database at all >&2\nexit 3\n");
    home.ecosystem(
        "[[apps]]\nname = 'bad'\nscript = 'app.sh'\nrestart_delay = '100s'\n\
         ready = { log = 'up' }\nlisten_timeout = '60s'\n",
    );
    let run = home.exits(1, &["start", "ecosystem.toml"]);
    run.says("no database at all");
    let row = home.row("bad");
    assert_eq!(row.status, "waiting restart", "{row:?}");
    assert_eq!(row.env("exit_code"), 3);
}

#[test]
fn restart_delete_scale_do_what_they_say() {
    let home = Home::new();
    home.start(
        "[[apps]]\nname = 'job'\nscript = 'sleep'\nargs = ['1000']\ninstances = 2\nexec_mode = 'fork'\n",
    );
    let before = home.pids("job");
    home.ok(&["restart", "job"]);
    let after = home.pids("job");
    assert!(after.iter().all(|pid| !before.contains(pid)));
    home.ok(&["scale", "job", "4"]);
    assert_eq!(home.pids("job")[..2], after[..], "the first two are untouched");
    assert_eq!(home.rows_of("job").iter().map(|row| row.slot).collect::<Vec<_>>(), [0, 1, 2, 3]);
    home.ok(&["scale", "job", "4"]);
    home.ok(&["scale", "job", "+1"]);
    assert_eq!(home.rows_of("job").len(), 5);
    home.ok(&["scale", "job", "1"]);
    assert_eq!(home.pids("job"), after[..1], "the highest slots go");
    let pid = home.pid("job");
    home.ok(&["delete", "job"]);
    assert!(home.rows().is_empty());
    assert!(!process::alive(pid));
}

#[test]
fn ids_count_up_and_begin_anew_when_the_list_is_empty() {
    let home = Home::new();
    for (name, id) in [("a", 0), ("b", 1)] {
        home.ok(&["start", "sleep", "--name", name, "--", "1000"]);
        assert_eq!(home.row(name).id, id);
    }
    home.ok(&["delete", "b"]);
    home.ok(&["start", "sleep", "--name", "c", "--", "1000"]);
    assert_eq!(home.row("c").id, 2);
    home.ok(&["delete", "all"]);
    home.ok(&["start", "sleep", "--name", "d", "--", "1000"]);
    assert_eq!(home.row("d").id, 0);
}

#[test]
fn pid_id_and_env_print_what_scripts_read() {
    let home = Home::new();
    home.start("[[apps]]\nname = 'job'\nscript = 'sleep'\nargs = ['1000']\nenv = { COLOUR = 'blue' }\n");
    let row = home.row("job");
    assert_eq!(home.ok(&["pid", "job"]).out.trim(), row.pid.to_string());
    assert_eq!(home.ok(&["pid"]).out.trim(), row.pid.to_string());
    home.ok(&["id", "job"]).says(&row.id.to_string());
    assert_eq!(home.ok(&["id", "nobody"]).out.trim(), "[]");
    home.ok(&["env", &row.id.to_string()]).says("COLOUR").says("blue");
}

#[test]
fn describe_shows_the_facts_of_an_app() {
    let home = Home::new();
    home.start("[[apps]]\nname = 'job'\nscript = 'sleep'\nargs = ['1000']\n");
    let row = home.row("job");
    let run = home.ok(&["describe", "job"]);
    run.says("job").says("online").says(&row.pid.to_string()).says("job-out.log").says("job-error.log");
    for alias in ["show", "info", "desc"] {
        home.ok(&[alias, "job"]).says("online");
    }
}

#[test]
fn pain_31_no_wait_returns_before_the_app_is_ready() {
    let home = Home::new();
    home.write("app.js", "setInterval(() => require('fs').existsSync('go') && process.send('ready'), 50);\n");
    home.ecosystem("[[apps]]\nname = 'job'\nscript = 'app.js'\nwait_ready = true\n");
    let run = home.ok(&["start", "ecosystem.toml", "--no-wait"]);
    run.does_not_say("ready after");
    assert_eq!(home.row("job").status, "launching");
    home.write("go", "");
    home.wait_status("job", "online");
}

#[test]
fn parallel_starts_of_one_file_give_one_app() {
    let home = Home::new();
    home.ecosystem("[[apps]]\nname = 'job'\nscript = 'sleep'\nargs = ['1000']\n");
    let both = [(); 2]
        .map(|()| super::support::home::Running::start(home.command(&["start", "ecosystem.toml"]), b""));
    for command in both {
        let run = command.end(SOON);
        assert_eq!(run.code, 0, "{run:?}");
    }
    assert_eq!(home.rows().len(), 1);
}

#[test]
fn stopped_apps_stay_in_the_list_and_stopped() {
    let home = Home::new();
    home.start("[[apps]]\nname = 'job'\nscript = 'sleep'\nargs = ['1000']\n");
    home.ok(&["stop", "job"]);
    home.ok(&["stop", "job"]);
    stays("it stays stopped", secs(1), || {
        let row = home.row("job");
        if row.status == "stopped" { Ok(()) } else { Err(row) }
    });
    home.ok(&["list"]).says("stopped");
}

#[test]
fn the_footer_of_the_list_shows_the_host() {
    let home = Home::new();
    home.start("[[apps]]\nname = 'job'\nscript = 'sleep'\nargs = ['1000']\n");
    let list = home.ok(&["list"]).out.to_lowercase();
    for word in ["cpu", "load", "mem"] {
        assert!(list.contains(word), "{word} in {list}");
    }
}

#[test]
fn init_writes_a_config_that_check_accepts_and_never_overwrites() {
    let home = Home::new();
    home.ok(&["init"]);
    let written = home.read("ecosystem.toml");
    assert!(written.contains("[[apps]]"), "{written}");
    home.write("mine/ecosystem.toml", "[[apps]]\nname = 'mine'\nscript = 'sleep'\n");
    let mut command = home.command(&["ecosystem"]);
    command.current_dir(home.work().join("mine"));
    let run = super::support::home::run(command, SOON);
    assert_ne!(run.code, 0, "{run:?}");
    assert!(home.read("mine/ecosystem.toml").contains("mine"));
    assert!(!home.has_daemon());
}

#[test]
fn check_accepts_a_good_file_and_names_the_place_of_a_bad_one_without_a_daemon() {
    let home = Home::new();
    home.ecosystem("[[apps]]\nname = 'job'\nscript = 'sleep'\nargs = ['1']\n");
    home.ok(&["check", "ecosystem.toml"]);
    home.ecosystem("[[apps]]\nname = 'job'\nscrpt = 'sleep'\n");
    home.exits(2, &["check", "ecosystem.toml"]).says("ecosystem.toml").says("3").says("scrpt").says("script");
    assert!(!home.has_daemon());
}

#[test]
fn version_and_help_need_no_daemon() {
    let home = Home::new();
    home.ok(&["--version"]).says(env!("CARGO_PKG_VERSION"));
    let help = home.ok(&["--help"]);
    for command in [
        "start",
        "stop",
        "restart",
        "reload",
        "delete",
        "list",
        "jlist",
        "prettylist",
        "describe",
        "logs",
        "scale",
        "env",
        "id",
        "pid",
        "save",
        "resurrect",
        "kill",
        "ping",
        "daemon",
        "serve",
        "init",
        "check",
    ] {
        help.says(command);
    }
    home.ok(&["restart", "--help"]).says("downtime");
    assert!(!home.has_daemon());
}
