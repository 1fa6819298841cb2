//! What people do not expect of a process manager, and ran into with this one or another.

use super::support::home::Running;
use super::support::load::{self, Failure};
use super::support::{Home, PATIENT, SOON, free_port, process, wait_until};

const SERVER: &str = "require('http').createServer((q, r) => r.end('ok')).listen(process.env.PORT);\n";

/// Boots for a second and takes another one for its end.
/// Ready when there is a file `go`.
const SLOW: &str = "const asks = setInterval(() => { if (!require('fs').existsSync('go')) return; clearInterval(asks);\n\
                    require('http').createServer((q, r) => r.end('ok')).listen(process.env.PORT); \
                    process.send('ready'); }, 50);\n\
                    process.on('SIGINT', () => setTimeout(() => process.exit(0), 1000));\n";

fn cluster(home: &Home, script: &str, port: u16, more: &str) -> String {
    home.write("app.js", script);
    let text = format!(
        "[[apps]]\nname = 'web'\nscript = 'app.js'\ninstances = 2\nenv = {{ PORT = '{port}' }}\n{more}\n"
    );
    home.write("ecosystem.toml", &text)
}

fn refuses(port: u16) {
    wait_until("nobody listens on the port", SOON, || match load::get(port, "/") {
        Err(Failure::Refused) => Ok(()),
        other => Err(other.map(|reply| reply.status)),
    });
}

#[test]
fn a_reload_to_another_port_leaves_nobody_waiting_on_the_old_one() {
    let home = Home::new();
    let (before, after) = (free_port(), free_port());
    let file = cluster(&home, SERVER, before, "");
    home.ok(&["start", &file]);
    load::get(before, "/").unwrap();
    cluster(&home, SERVER, after, "");
    home.ok(&["reload", &file]).does_not_say(&format!(":{before}")).says(&format!(":{after}"));
    load::get(after, "/").unwrap();
    refuses(before);
}

#[test]
fn a_failed_release_leaves_no_port_and_counts_no_restart() {
    let home = Home::new();
    let (good, bad) = (free_port(), free_port());
    let file = cluster(&home, SERVER, good, "wait_ready = false");
    home.ok(&["start", &file]);
    let restarts = |home: &Home| -> Vec<_> {
        home.rows_of("web").iter().map(|row| row.env("restart_time").clone()).collect()
    };
    let before = restarts(&home);
    cluster(&home, "throw new Error('no');\n", bad, "");
    home.exits(1, &["reload", &file]);
    assert_eq!(restarts(&home), before);
    refuses(bad);
    load::get(good, "/").unwrap();
}

#[test]
fn a_stop_that_was_asked_for_needs_no_note() {
    let home = Home::new();
    home.ok(&["start", "sleep", "--name", "job", "--", "1000"]);
    home.ok(&["stop", "job"]).says("stopped");
    home.ok(&["list"]).does_not_say("note").does_not_say("SIGINT");
    home.ok(&["describe", "job"]).says("SIGINT");
    home.ok(&["start", "sh", "--name", "once", "--no-autorestart", "--", "-c", "sleep 0.3; exit 3"]);
    home.wait_status("once", "stopped");
    home.ok(&["list"]).says("exit code 3");
}

#[test]
fn a_bare_start_of_a_script_that_runs_changes_nothing() {
    let home = Home::new();
    home.write("app.js", SERVER);
    let port = free_port().to_string();
    let mut command = home.command(&["start", "app.js", "-i", "2", "--kill-timeout", "3s"]);
    command.env("PORT", &port);
    assert_eq!(Running::start(command, b"").end(PATIENT).code, 0);
    let before = home.pids("app");
    home.ok(&["start", "app.js"]).says("already running");
    assert_eq!(home.pids("app"), before);
    home.ok(&["stop", "app"]);
    home.ok(&["start", "app.js"]);
    assert_eq!(home.statuses("app"), ["online", "online"]);
}

#[test]
fn a_script_of_the_same_name_elsewhere_does_not_take_the_place_of_an_app() {
    let home = Home::new();
    home.write("one/app.sh", "sleep 1000\n");
    let other = home.write("two/app.sh", "sleep 1000\n");
    home.ok(&["start", "one/app.sh"]);
    let before = home.pids("app");
    home.exits(2, &["start", &other]).says("another `app`").says("one/app.sh").says("--name");
    assert_eq!(home.pids("app"), before);
    home.ok(&["start", &other, "--name", "two"]);
    assert_eq!(home.pids("app"), before);
}

#[test]
fn a_stop_during_a_reload_gives_the_new_one_its_time_too() {
    let home = Home::new();
    let file = cluster(&home, SLOW, free_port(), "wait_ready = true");
    home.write("go", "");
    home.ok(&["start", &file]);
    std::fs::remove_file(home.work().join("go")).unwrap();
    let reload = Running::start(home.command(&["reload", "web"]), b"");
    wait_until("the new one runs", PATIENT, || {
        let found = home.processes();
        let handles = |pid: &&i32| process::describe(**pid).contains("app.js");
        let count = found.iter().filter(handles).count();
        if count == 3 { Ok(()) } else { Err(count) }
    });
    home.ok(&["stop", "web"]).does_not_say("killed after");
    let run = reload.end(SOON);
    assert_eq!(run.code, 1, "{run:?}");
    run.says("superseded");
}

/// Starts `job`, and takes its env file away. Says where that was.
fn job_without_its_env_file(home: &Home) -> String {
    home.write("vars", "A=1\n");
    home.write(
        "ecosystem.toml",
        "[[apps]]\nname = 'job'\nscript = 'sleep'\nargs = ['1000']\nenv_file = ['vars']\n",
    );
    home.ok(&["start", "ecosystem.toml"]);
    let vars = home.work_file("vars");
    std::fs::remove_file(&vars).unwrap();
    vars
}

#[test]
fn what_is_missing_for_a_moment_is_waited_for() {
    let home = Home::new();
    let vars = job_without_its_env_file(&home);
    process::end(home.pid("job"));
    home.wait_status("job", "waiting restart");
    home.ok(&["list"]).says("No such file");
    std::fs::write(&vars, "A=2\n").unwrap();
    home.wait_status("job", "online");
}

#[test]
fn what_comes_back_stopped_is_not_called_started() {
    let home = Home::new();
    home.ok(&["start", "sleep", "--name", "on", "--", "1000"]);
    home.ok(&["start", "sleep", "--name", "off", "--", "1000"]);
    home.ok(&["stop", "off"]);
    home.ok(&["kill"]);
    home.ok(&["resurrect"]).says("on: started").says("off: listed as stopped");
    assert_eq!(home.statuses("off"), ["stopped"]);
}

#[test]
fn hints_work_as_they_stand() {
    let home = Home::new();
    home.write("bad.js", "throw new Error('no');\n");
    home.exits(1, &["start", "bad.js", "--name", "two words", "--wait-ready"])
        .says("`pm logs 'two words' --err`");
    let vars = job_without_its_env_file(&home);
    home.exits(1, &["restart", "job"]).says("Nothing was touched").says("`pm describe job`");
    home.ok(&["describe", "job"]).says(&vars);
    assert_eq!(home.row("job").status, "online");
    std::fs::write(&vars, "").unwrap();
    home.ok(&["restart", "job"]);
}

#[test]
fn a_pipeline_is_told_to_stop_as_a_terminal_would_tell_it() {
    let home = Home::new();
    home.write(
        "app.js",
        "process.on('SIGINT', () => { console.log('handler ran'); process.exit(0); });\n\
         setInterval(() => {}, 1000); console.log('up');\n",
    );
    home.ok(&["start", "node app.js | cat", "--shell", "--name", "piped", "--kill-timeout", "20s"]);
    home.log_with("piped-out.log", "up");
    let run = home.ok(&["stop", "piped"]);
    run.does_not_say("killed after");
    assert!(run.took < SOON, "{run:?}");
}

#[test]
fn a_failed_restart_in_place_does_not_claim_that_anything_serves() {
    let home = Home::new();
    let script = home.write("app.js", "process.send('ready');\nsetInterval(() => {}, 1000);\n");
    // It says when it is ready: a slow machine may take longer to the error than an app has to live otherwise.
    home.ok(&["start", "app.js", "--wait-ready", "--listen-timeout", "60s"]);
    std::fs::write(&script, "throw new Error('no');\n").unwrap();
    home.exits(1, &["reload", "app"]).does_not_say("still serving").says("downtime");
}

#[test]
fn a_reload_of_a_file_starts_what_is_new_in_it() {
    let home = Home::new();
    let one = "[[apps]]\nname = 'one'\nscript = 'sleep'\nargs = ['1000']\n";
    home.start(one);
    home.ecosystem(&format!("{one}{}", one.replace("'one'", "'two'")));
    home.ok(&["reload", "ecosystem.toml"]).says("two: started");
    assert_eq!(home.statuses("two"), ["online"]);
    home.ok(&["delete", "all"]);
    home.ok(&["startOrReload", "ecosystem.toml"]).says("one: started");
}
