//! Programs that run beside an app's life: when, with what, and what follows when they fail.

use nix::sys::signal::Signal;

use super::support::home::Running;
use super::support::load;
use super::support::{Home, PATIENT, SOON, free_port, millis, process, stays, wait_until};

/// A hook that notes that it ran, and does what the file `do-<hook>` says.
const HOOK: &str = "echo \"$PM_HOOK $PM_APP $WHO $* $PM_SLOT $PM_REASON\" >>hooks\n\
    echo \"says $PM_HOOK\"; echo \"warns\" >&2\n\
    [ -e do-$PM_HOOK ] && . ./do-$PM_HOOK\nexit 0\n";

const ALL: &str = "pre_start = ['sh', 'hook.sh', 'a b']\npre_reload = 'sh hook.sh'\npost_stop = 'sh hook.sh'\n\
    on_errored = 'sh hook.sh'\n";

/// A Node cluster with every hook. The top level of the table.
fn api(home: &Home, port: u16, more: &str) -> String {
    home.write("hook.sh", HOOK);
    home.write(
        "app.js",
        &format!("require('node:http').createServer((q, r) => r.end('ok ' + process.pid + ' end\\n')).listen({port}, '127.0.0.1');\n"),
    );
    format!(
        "[[apps]]\nname = 'api'\nscript = 'app.js'\nexec_mode = 'cluster'\ninstances = 2\n{ALL}{more}\n\
         env = {{ WHO = 'me' }}\n"
    )
}

fn ran(home: &Home) -> Vec<String> {
    home.read("hooks").lines().map(|line| line.split(' ').next().unwrap().to_owned()).collect()
}

#[test]
fn hooks_run_with_the_apps_environment_and_write_to_its_log() {
    let home = Home::new();
    let text = api(&home, free_port(), "");
    let run = home.start(&text);
    run.says("api: runs its hook pre_start");
    assert_eq!(home.read("hooks"), "pre_start api me a b  \n");
    home.log_with("api-out-0.log", "[pre_start] says pre_start\n");
    home.log_with("api-error-0.log", "[pre_start] warns\n");
    home.ok(&["reload", "api"]).says("pre_reload");
    home.ok(&["restart", "api"]);
    home.ok(&["scale", "api", "3"]);
    home.ok(&["stop", "api"]);
    assert_eq!(ran(&home), ["pre_start", "pre_reload", "pre_start", "post_stop"]);
    home.ok(&["start", "api"]);
    home.ok(&["delete", "api"]);
    assert_eq!(ran(&home)[4..], ["pre_start", "post_stop"]);
    assert_eq!(process::tree(home.keeper()).len(), 2, "{}", home.process_list());
}

#[test]
fn a_pre_start_that_fails_fails_the_start_with_its_last_words() {
    let home = Home::new();
    let text = api(&home, free_port(), "");
    home.write("do-pre_start", "echo 'no database here'; exit 3\n");
    home.ecosystem(&text);
    let run = home.exits(1, &["start", "ecosystem.toml"]);
    run.says("hook pre_start failed: exit code 3").says("no database here");
    assert_eq!(home.statuses("api"), ["errored", "errored"]);
    home.write("do-pre_start", "exit 0\n");
    home.ok(&["start", "api"]);
    assert_eq!(home.statuses("api"), ["online", "online"]);
    // Of a restart it fails before anything is stopped.
    let old = home.pids("api");
    home.write("do-pre_start", "exit 4\n");
    home.exits(1, &["restart", "api"]).says("nothing that ran was stopped");
    assert_eq!(home.pids("api"), old);
}

#[test]
fn a_pre_reload_that_fails_or_hangs_aborts_the_reload_and_the_old_serve_on() {
    let home = Home::new();
    let port = free_port();
    let text = api(&home, port, "");
    home.start(
        &text.replace("pre_reload = 'sh hook.sh'", "pre_reload = { run = 'sh hook.sh', timeout = '500ms' }"),
    );
    let old = home.pids("api");
    home.write("do-pre_reload", "echo 'build is broken' >&2; exit 7\n");
    let run = home.exits(1, &["reload", "api"]);
    run.says("hook pre_reload failed: exit code 7")
        .says("build is broken")
        .says("the old workers are still serving");
    assert_eq!(home.pids("api"), old);
    home.write("do-pre_reload", "sleep 1000 & echo $! >sleeper; wait\n");
    let run = home.exits(1, &["reload", "api"]);
    run.says("no end within 500ms");
    let sleeper: i32 = home.file_with("sleeper", "\n").trim().parse().unwrap();
    assert!(!process::alive(sleeper), "what it started is killed too: {}", process::describe(sleeper));
    assert_eq!(home.pids("api"), old);
    load::get(port, "/").unwrap();
    home.write("do-pre_reload", "exit 0\n");
    home.ok(&["reload", "api"]);
    assert!(home.pids("api").iter().all(|pid| !old.contains(pid)));
    // One that is not there.
    home.ecosystem(&text.replace("pre_reload = 'sh hook.sh'", "pre_reload = './nonexistent'"));
    home.exits(1, &["reload", "ecosystem.toml"]).says("nonexistent");
}

#[test]
fn a_post_stop_runs_when_everything_is_gone_and_its_failure_is_told() {
    let home = Home::new();
    let text = api(&home, free_port(), "");
    home.start(&text);
    let pids = home.pids("api");
    let looks: Vec<String> =
        pids.iter().map(|pid| format!("[ -e /proc/{pid} ] && echo {pid} lives >>hooks")).collect();
    home.write("do-post_stop", &format!("{}\nexit 5\n", looks.join("\n")));
    let run = home.exits(1, &["stop", "api"]);
    run.says("hook post_stop failed: exit code 5").says("It is stopped all the same");
    assert!(!home.read("hooks").contains("lives"), "{}", home.read("hooks"));
    assert_eq!(home.statuses("api"), ["stopped", "stopped"]);
    home.ok(&["stop", "api"]);
    assert_eq!(ran(&home), ["pre_start", "post_stop"], "it is down: nothing runs again");
}

#[test]
fn pain_25_on_errored_is_told_which_instance_and_why() {
    let home = Home::new();
    home.write("hook.sh", HOOK);
    home.write("app.sh", "exit 6\n");
    home.ecosystem(
        "[[apps]]\nname = 'job'\nscript = 'app.sh'\nready = { log = 'up' }\nlisten_timeout = '60s'\nmax_restarts = 2\n\
         on_errored = 'sh hook.sh x'\nenv = { WHO = 'me' }\n",
    );
    home.exits(1, &["start", "ecosystem.toml"]);
    home.wait_status("job", "errored");
    assert_eq!(home.file_with("hooks", "\n"), "on_errored job me x 0 exit code 6\n");
    home.log_with("job-out.log", "[on_errored] says on_errored\n");
}

#[test]
fn a_stop_ends_the_hook_of_the_reload_that_it_supersedes() {
    let home = Home::new();
    let text = api(&home, free_port(), "");
    home.start(&text);
    home.write("do-pre_reload", "echo $$ >running; sleep 1000\n");
    let reload = Running::start(home.command(&["reload", "api"]), b"");
    let hook: i32 = home.file_with("running", "\n").trim().parse().unwrap();
    home.ok(&["stop", "api"]);
    let run = reload.end(PATIENT);
    assert_eq!(run.code, 1, "{run:?}");
    run.says("superseded");
    assert!(!process::alive(hook));
    assert_eq!(ran(&home), ["pre_start", "pre_reload", "post_stop"]);
}

#[test]
fn a_hook_whose_supervisor_is_killed_is_ended_and_asked_again_and_never_runs_twice_at_once() {
    let home = Home::new();
    let text = api(&home, free_port(), "");
    home.start(&text);
    let old = home.pids("api");
    // Each run holds a lock for as long as it, or anything that it started, lives.
    home.write(
        "do-pre_reload",
        "exec 9>lock; flock -n 9 || { echo two at once >>trouble; exit 1; }\n\
         echo $$ >>running\n[ -e quick ] || sleep 1000\n",
    );
    let reload = Running::start(home.command(&["reload", "api"]), b"");
    let first: i32 = home.file_with("running", "\n").trim().parse().unwrap();
    home.write("quick", "");
    process::end(home.supervisor());
    let run = reload.end(PATIENT);
    assert_eq!(run.code, 0, "{run:?}");
    assert!(!process::alive(first), "what the dead supervisor waited for is ended");
    assert_eq!(home.read("trouble"), "");
    assert_eq!(home.read("running").lines().count(), 2);
    assert!(
        home.pids("api").iter().all(|pid| !old.contains(pid)),
        "the command asked again, and the reload was done"
    );
}

#[test]
fn a_new_daemon_starts_apps_with_their_pre_start() {
    let home = Home::new();
    let text = api(&home, free_port(), "");
    home.start(&text);
    process::signal(home.keeper(), Signal::SIGTERM);
    wait_until("the daemon has ended", PATIENT, || {
        if home.has_daemon() { Err(home.process_list()) } else { Ok(()) }
    });
    home.ok(&["start", "ecosystem.toml"]);
    wait_until("it is up", SOON, || {
        let statuses = home.statuses("api");
        if statuses == ["online", "online"] { Ok(()) } else { Err(statuses) }
    });
    let hooks = ran(&home);
    assert!(hooks.len() >= 2 && hooks.iter().all(|hook| hook == "pre_start"), "{hooks:?}");
    stays("and once", millis(300), || if ran(&home) == hooks { Ok(()) } else { Err(ran(&home)) });
}
