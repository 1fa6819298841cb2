//! The environment of an instance: who wins, what is left out, and who may see it.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use super::support::home::{Run, run};
use super::support::{Home, SOON, process};

const SLEEPER: &str = "[[apps]]\nname = 'job'\nscript = 'sleep'\nargs = ['1000']\n";

/// `pm start ecosystem.toml …` from a shell with these variables.
fn start_with(home: &Home, args: &[&str], variables: &[(&str, &str)]) {
    let mut command: Command = home.command(args);
    command.envs(variables.iter().copied());
    let run = run(command, SOON);
    assert_eq!(run.code, 0, "{run:?}");
}

fn environ(home: &Home) -> BTreeMap<String, String> {
    process::environ(home.pid("job"))
}

#[test]
fn shell_then_file_then_env_then_env_name() {
    let home = Home::new();
    home.write("vars.env", "# a comment\nA=file\nB=file\nC=file\nexport QUOTED=\"two words\"\n\nEMPTY=\n");
    home.ecosystem(&format!(
        "{SLEEPER}env_file = 'vars.env'\nenv = {{ A = 'env', B = 'env' }}\nenv_staging = {{ A = 'staging' }}\n"
    ));
    let shell = [("A", "shell"), ("B", "shell"), ("C", "shell"), ("D", "shell")];
    start_with(&home, &["start", "ecosystem.toml", "--env", "staging"], &shell);
    let env = environ(&home);
    assert_eq!(["A", "B", "C", "D"].map(|key| env[key].as_str()), ["staging", "env", "file", "shell"]);
    assert_eq!((env["QUOTED"].as_str(), env["EMPTY"].as_str()), ("two words", ""));
}

#[test]
fn variables_of_service_managers_node_npm_and_pm_are_left_out() {
    let home = Home::new();
    home.ecosystem(SLEEPER);
    let unwanted = [
        "NODE_CHANNEL_FD",
        "NODE_CHANNEL_SERIALIZATION_MODE",
        "NODE_UNIQUE_ID",
        "LISTEN_FDS",
        "LISTEN_PID",
        "LISTEN_FDNAMES",
        "NOTIFY_SOCKET",
        "WATCHDOG_USEC",
        "WATCHDOG_PID",
        "INVOCATION_ID",
        "JOURNAL_STREAM",
        "npm_config_cache",
        "npm_lifecycle_event",
        "INIT_CWD",
        "PM_SOMETHING",
        "PM_READY_FD",
    ];
    let mut shell: Vec<(&str, &str)> = unwanted.iter().map(|key| (*key, "77")).collect();
    shell.extend([("NODE_APP_INSTANCE", "77"), ("pm_id", "77"), ("KEPT", "yes")]);
    start_with(&home, &["start", "ecosystem.toml"], &shell);
    let env = environ(&home);
    for key in unwanted {
        assert!(!env.contains_key(key), "{key}={:?}", env.get(key));
    }
    assert_eq!(env["NODE_APP_INSTANCE"], "0");
    assert_eq!(env["pm_id"], "0");
    assert_eq!(env["name"], "job");
    assert_eq!(env["PM_GENERATION"], "1");
    assert_eq!(env["KEPT"], "yes");
}

#[test]
fn inherit_env_false_leaves_little_of_the_shell() {
    let home = Home::new();
    home.ecosystem(&format!("{SLEEPER}inherit_env = false\nenv = {{ MINE = 'yes' }}\n"));
    start_with(&home, &["start", "ecosystem.toml"], &[("SECRET_OF_SHELL", "x")]);
    let env = environ(&home);
    assert!(!env.contains_key("SECRET_OF_SHELL"));
    for key in ["PATH", "HOME", "USER", "LANG", "TZ", "MINE"] {
        assert!(env.contains_key(key), "{key}: {env:?}");
    }
}

#[test]
fn restart_by_name_keeps_the_shell_of_the_first_start_unless_told_otherwise() {
    let home = Home::new();
    home.ecosystem(SLEEPER);
    start_with(&home, &["start", "ecosystem.toml"], &[("COLOUR", "blue")]);
    start_with(&home, &["restart", "job"], &[("COLOUR", "green")]);
    assert_eq!(environ(&home)["COLOUR"], "blue");
    start_with(&home, &["restart", "job", "--update-env"], &[("COLOUR", "green")]);
    assert_eq!(environ(&home)["COLOUR"], "green");
}

#[test]
fn pain_28_env_file_is_read_anew_at_each_spawn() {
    let home = Home::new();
    home.write("vars.env", "A=1\nOLD=1\n");
    home.start(&format!("{SLEEPER}env_file = 'vars.env'\n"));
    assert_eq!(environ(&home)["A"], "1");
    home.write("vars.env", "A=2\n");
    home.ok(&["restart", "job"]);
    assert_eq!(environ(&home)["A"], "2");
    assert!(!environ(&home).contains_key("OLD"));
}

#[test]
fn instance_var_and_increment_var_number_the_instances() {
    let home = Home::new();
    home.start(&format!(
        "{SLEEPER}instances = 3\nexec_mode = 'fork'\ninstance_var = 'WORKER'\nincrement_var = 'PORT'\n\
         env = {{ PORT = '3000' }}\n"
    ));
    let numbers: Vec<(String, String)> = home
        .pids("job")
        .into_iter()
        .map(process::environ)
        .map(|env| (env["WORKER"].clone(), env["PORT"].clone()))
        .collect();
    let expected = [("0", "3000"), ("1", "3001"), ("2", "3002")].map(|(a, b)| (a.to_owned(), b.to_owned()));
    assert_eq!(numbers, expected);
}

/// In a config file, in an env file, and in the shell.
const SECRETS: [&str; 3] = ["hunter2", "tr0ub4dor", "correcthorse"];

fn job_with_secrets(home: &Home) {
    home.write("vars.env", "FILE_TOKEN=tr0ub4dor\n");
    home.ecosystem(&format!(
        "{SLEEPER}env_file = 'vars.env'\nenv = {{ API_TOKEN = 'hunter2', NODE_ENV = 'production', PORT = '3456' }}\n"
    ));
    start_with(home, &["start", "ecosystem.toml"], &[("SHELL_TOKEN", "correcthorse")]);
}

fn shows_no_secret(run: &Run) {
    for secret in SECRETS {
        run.does_not_say(secret);
    }
}

#[test]
fn pain_42_values_never_appear_in_lists_plans_logs_and_events_unless_asked_for() {
    let home = Home::new();
    job_with_secrets(&home);
    let lists = [
        vec!["jlist"],
        vec!["prettylist"],
        vec!["describe", "job"],
        vec!["describe", "job", "--json"],
        vec!["list", "--wide"],
        vec!["list", "--json"],
        vec!["logs", "--nostream"],
        vec!["events"],
        vec!["events", "--json"],
        vec!["check", "ecosystem.toml", "--json"],
    ];
    for args in &lists {
        shows_no_secret(&home.ok(args));
    }
    let env = &home.row("job").entry["pm2_env"]["env"].clone();
    assert!(env.get("API_TOKEN").is_some(), "the name is shown, only its value is not: {env}");
    assert_eq!(env["NODE_ENV"], "production");
    assert_eq!(env["PORT"], "3456");
    assert_eq!(env["PM_GENERATION"], "1");
    // The values do not leave the daemon, so none of the commands above could have shown them.
    let mut socket = std::os::unix::net::UnixStream::connect(home.path().join("pm.sock")).unwrap();
    for request in ["{\"jlist\":{\"targets\":[],", "{\"describe\":{\"targets\":[\"job\"],"] {
        let line = format!("{{\"v\":1,\"op\":7,\"request\":{request}\"show_env\":false}}}}}}\n");
        socket.write_all(line.as_bytes()).unwrap();
    }
    socket.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answers = String::new();
    socket.read_to_string(&mut answers).unwrap();
    assert!(answers.contains("API_TOKEN") && answers.matches("answer").count() >= 2, "{answers}");
    assert!(SECRETS.iter().all(|secret| !answers.contains(secret)), "{answers}");
    // Plans, with values that are and that will be.
    let text = home.read("ecosystem.toml");
    home.ecosystem(&text.replace("hunter2", "hunter3"));
    for args in [
        vec!["apply", "--dry-run"],
        vec!["apply", "--dry-run", "--json"],
        vec!["describe", "job"],
        vec!["reload", "ecosystem.toml", "--dry-run"],
        vec!["apply"],
        vec!["apply", "--json"],
    ] {
        home.ok(&args).does_not_say("hunter");
    }
    assert_eq!(environ(&home)["API_TOKEN"], "hunter3");
    home.ok(&["events", "--json"]).does_not_say("hunter");
    // Asked for.
    for args in [
        vec!["jlist", "--show-env"],
        vec!["prettylist", "--show-env"],
        vec!["--show-env", "describe", "job", "--json"],
        vec!["env", "0"],
    ] {
        home.ok(&args).says("hunter3").says("correcthorse").says("tr0ub4dor");
    }
    home.ok(&["check", "ecosystem.toml", "--json", "--show-env"]).says("hunter3");
    home.ecosystem(&text);
    home.ok(&["apply", "--dry-run", "--show-env"]).says("hunter3").says("hunter2");
    let mut command = home.command(&["jlist"]);
    command.env("PM_SHOW_ENV", "1");
    run(command, SOON).says("hunter3");
}

#[test]
fn pain_42_values_do_not_appear_when_an_app_or_a_file_is_broken() {
    let home = Home::new();
    job_with_secrets(&home);
    home.write("crash.sh", "echo last words; exit 3\n");
    let crash = "[[apps]]\nname = 'crash'\nscript = 'crash.sh'\nenv_file = 'vars.env'\nmax_restarts = 1\n\
                 [apps.env]\nAPI_TOKEN = 'hunter2'\n";
    home.write("crash.toml", crash);
    let mut start = home.command(&["start", "crash.toml"]);
    start.env("SHELL_TOKEN", "correcthorse");
    let failed = run(start, SOON);
    assert_eq!(failed.code, 1, "{failed:#?}");
    shows_no_secret(failed.says("last words"));
    for args in [vec!["events", "--json"], vec!["describe", "crash"], vec!["logs", "--nostream"]] {
        shows_no_secret(&home.ok(&args));
    }
    home.write("crash.toml", &crash.replace("API_TOKEN = 'hunter2'", "API_TOKEN = 'hunter2"));
    shows_no_secret(home.exits(2, &["check", "crash.toml"]).says("API_TOKEN"));
    // A line of an env file that cannot be understood is reported, and not quoted.
    home.write("vars.env", "tr0ub4dor is no assignment\nA=1\n");
    shows_no_secret(&home.ok(&["restart", "job"]));
    // The daemon's own log.
    let log = std::fs::read_to_string(home.path().join("pm.log")).unwrap_or_default();
    assert!(SECRETS.iter().all(|secret| !log.contains(secret)), "{log}");
}

#[test]
fn the_daemon_shows_values_to_everybody_who_may_ask_where_its_setting_says_so() {
    let home = Home::new();
    job_with_secrets(&home);
    let text = home.read("ecosystem.toml");
    home.ecosystem(&format!("show_env = true\n{text}"));
    home.ok(&["apply"]);
    home.ok(&["jlist"]).says("hunter2").says("correcthorse");
    // Also by the next supervisor: it is a part of what is desired.
    process::end(home.supervisor());
    home.ok(&["jlist"]).says("hunter2");
    // A file that is silent changes nothing.
    home.ecosystem(&text);
    home.ok(&["apply"]);
    home.ok(&["jlist"]).says("hunter2");
    home.ecosystem(&format!("show_env = false\n{text}"));
    home.ok(&["apply"]);
    shows_no_secret(&home.ok(&["jlist"]));
    process::end(home.supervisor());
    shows_no_secret(&home.ok(&["jlist"]));
}

#[test]
fn pain_42_the_state_file_is_private_and_refers_to_env_files_by_name() {
    let home = Home::new();
    job_with_secrets(&home);
    home.ok(&["save"]);
    for name in ["state.json", "dump.json"] {
        let path = home.path().join(name);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600, "{name}");
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains("vars.env"), "{name} has the reference");
        for secret in ["tr0ub4dor", "correcthorse"] {
            assert!(!text.contains(secret), "{name} has {secret}");
        }
    }
    // What the reference stands for is looked up when it is needed.
    home.write("vars.env", "FILE_TOKEN=changed\n");
    home.ok(&["kill"]);
    home.ok(&["resurrect"]);
    let env = environ(&home);
    assert_eq!((env["FILE_TOKEN"].as_str(), env["SHELL_TOKEN"].as_str()), ("changed", "correcthorse"));
}

#[test]
fn pain_42_secrets_of_the_shell_are_in_private_files_only() {
    let home = Home::new();
    home.ecosystem(SLEEPER);
    start_with(&home, &["start", "ecosystem.toml"], &[("SHELL_TOKEN", "correcthorse")]);
    let state = std::fs::read_to_string(home.path().join("state.json")).unwrap();
    assert!(!state.contains("correcthorse"));
    let mut open = vec![home.path().join("env")];
    let mut files = 0;
    while let Some(path) = open.pop() {
        let metadata = std::fs::metadata(&path).unwrap();
        if metadata.is_dir() {
            assert_eq!(metadata.permissions().mode() & 0o077, 0, "{}", path.display());
            open.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else {
            assert_eq!(metadata.permissions().mode() & 0o777, 0o600, "{}", path.display());
            files += 1;
        }
    }
    assert!(files >= 1);
    let log = std::fs::read_to_string(home.path().join("pm.log")).unwrap_or_default();
    assert!(!log.contains("correcthorse"));
}
