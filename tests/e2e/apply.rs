//! `apply FILE`: the file is what is wanted, the plan says what that takes, and nothing else is touched.

use std::collections::BTreeMap;

use serde_json::Value;

use super::support::{Home, PATIENT, SOON, process, wait_until};

const SLEEPER: &str = "script = 'sleep'\nargs = ['1000']\n";

fn app(name: &str, lines: &str) -> String {
    format!("[[apps]]\nname = '{name}'\n{SLEEPER}{lines}\n")
}

/// A Node cluster and two plain programs.
fn shop(home: &Home, web: &str, job: &str) -> String {
    let run = home
        .write("web.js", "require('http').createServer((_, answer) => answer.end()).listen(0, '127.0.0.1');");
    let web = format!("[[apps]]\nname = 'web'\nscript = '{run}'\nexec_mode = 'cluster'\n{web}\n");
    format!("{web}{}{}", app("job", job), app("mail", ""))
}

/// Pids of everything, by app.
fn pids(home: &Home) -> BTreeMap<String, Vec<i32>> {
    let mut pids: BTreeMap<String, Vec<i32>> = BTreeMap::new();
    for row in home.rows() {
        pids.entry(row.name).or_default().push(row.pid);
    }
    pids
}

/// What the plan says of each app.
fn plan(home: &Home, args: &[&str]) -> BTreeMap<String, String> {
    let args: Vec<&str> =
        ["apply", "ecosystem.toml", "--dry-run", "--json"].into_iter().chain(args.iter().copied()).collect();
    let plan = home.ok(&args).json();
    let apps = plan["plan"]["apps"].as_array().unwrap_or_else(|| panic!("no plan: {plan}"));
    apps.iter()
        .map(|app| (app["app"].as_str().unwrap().to_owned(), app["measure"].as_str().unwrap().to_owned()))
        .collect()
}

#[test]
fn pain_29_apply_is_idempotent_and_prints_a_plan_and_touches_only_changed_apps() {
    let home = Home::new();
    home.ecosystem(&shop(&home, "instances = 2", ""));
    home.ok(&["apply", "ecosystem.toml"]).says("+ web   create   2 instances").says("Plan: 3 to create.");
    let before = pids(&home);
    let events = home.ok(&["events", "--json"]).out.lines().count();
    home.ok(&["apply", "ecosystem.toml"]).says("All 3 apps are as ecosystem.toml says; nothing to do.");
    assert_eq!(pids(&home), before);
    let more: Vec<Value> = home
        .ok(&["events", "--json"])
        .out
        .lines()
        .skip(events)
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let told: Vec<&str> = more.iter().map(|event| event["event"].as_str().unwrap()).collect();
    assert_eq!(told, ["operation_begun", "operation_ended"], "nothing happened to any app: {more:#?}");
    // One app of three changes: the others keep their processes.
    home.ecosystem(&shop(
        &home,
        "instances = 2\nenv = { RELEASE = '2', TOKEN = 'hush' }",
        "env = { A = '1' }",
    ));
    let run = home.ok(&["apply", "ecosystem.toml"]);
    run.says("~ web  reload")
        .says("env.RELEASE")
        .says("Plan: 1 to reload, 1 to restart, 1 unchanged.")
        .does_not_say("hush")
        .does_not_say("\u{1b}");
    let after = pids(&home);
    assert_eq!(after["mail"], before["mail"]);
    for name in ["web", "job"] {
        assert!(after[name].iter().all(|pid| !before[name].contains(pid)), "{name}: {before:?} {after:?}");
    }
    let pid = home.rows_of("web")[0].pid;
    assert_eq!(process::environ(pid)["RELEASE"], "2");
}

#[test]
fn pain_29_instances_2_to_4_starts_two_and_touches_none() {
    let home = Home::new();
    home.ecosystem(&shop(&home, "instances = 2", ""));
    home.ok(&["apply", "ecosystem.toml"]);
    let before = pids(&home);
    home.ecosystem(&home.read("ecosystem.toml").replace("instances = 2", "instances = 4"));
    home.ok(&["apply", "ecosystem.toml"]).says("~ web  scale    instances  2 → 4");
    let after = pids(&home);
    assert_eq!(after["web"].len(), 4);
    assert_eq!(after["web"][..2], before["web"][..]);
    // The same by hand is drift, which the file wins over.
    home.ok(&["scale", "web", "3"]);
    home.exits(6, &["apply", "ecosystem.toml", "--check"]).says("instances  3 → 4");
    home.ok(&["apply", "ecosystem.toml"]);
    assert_eq!(pids(&home)["web"][..2], before["web"][..]);
}

#[test]
fn pain_29_script_cwd_and_env_are_reloads_and_rules_are_taken_over_by_the_processes_that_run() {
    let home = Home::new();
    home.write("here/stub", "");
    home.write("there/stub", "");
    let file = |web: &str| format!("{}{}", shop(&home, web, ""), app("tool", "max_restarts = 3"));
    home.ecosystem(&file("instances = 1\ncwd = 'here'"));
    home.ok(&["apply", "ecosystem.toml"]);
    home.ecosystem(
        &home.read("ecosystem.toml").replace("'here'", "'there'").replace("max_restarts = 3", "cwd = 'here'"),
    );
    let measures = plan(&home, &["--only", "web,tool"]);
    assert_eq!((measures["web"].as_str(), measures["tool"].as_str()), ("reload", "restart"));
    home.ok(&["apply", "ecosystem.toml", "--dry-run"]).says("with downtime");
    home.ok(&["apply", "ecosystem.toml", "--only", "web"]);
    let web = home.pid("web");
    let cwd = std::fs::read_link(format!("/proc/{web}/cwd")).unwrap();
    assert!(cwd.ends_with("there"), "{}", cwd.display());
    // Rules: the process stays, and is treated by the new ones.
    let job = home.pid("job");
    home.ecosystem(&home.read("ecosystem.toml").replace(
        "[[apps]]\nname = 'job'",
        "[[apps]]\nkill_timeout = '200ms'\nkill_signal = 'SIGUSR1'\nautorestart = false\nname = 'job'",
    ));
    assert_eq!(plan(&home, &["--only", "job"])["job"], "update");
    home.ok(&["apply", "ecosystem.toml", "--only", "job"])
        .says("its processes stay")
        .says("kill_timeout  10s → 200ms");
    assert_eq!(home.pid("job"), job);
    home.ok(&["describe", "job"]).says("SIGUSR1");
    process::signal(job, nix::sys::signal::Signal::SIGKILL);
    // autorestart = false holds for the run that was there before.
    home.wait_status("job", "stopped");
    // It ended by itself: that is no drift.
    assert_eq!(plan(&home, &["--only", "job"])["job"], "unchanged");
}

#[test]
fn pain_29_check_exits_6_on_drift_and_changes_nothing() {
    let home = Home::new();
    home.ecosystem(&format!("{}{}", app("a", ""), app("b", "autostart = false")));
    // No daemon: everything is new, and looking does not start one.
    home.exits(6, &["apply", "ecosystem.toml", "--check"]).says("+ a  create");
    home.ok(&["apply", "ecosystem.toml", "--dry-run"]).says("Plan: 2 to create.");
    assert!(!home.has_daemon());
    home.ok(&["apply", "ecosystem.toml"]);
    assert_eq!((home.row("a").status, home.row("b").status), ("online".to_owned(), "stopped".to_owned()));
    home.ok(&["apply", "ecosystem.toml", "--check"]).says("nothing to do");
    // Whoever stopped it: the file says that it runs.
    home.ok(&["stop", "a"]);
    home.exits(6, &["apply", "ecosystem.toml", "--check"]).says("+ a  start");
    assert_eq!(home.row("a").status, "stopped");
    home.ok(&["apply", "ecosystem.toml"]);
    assert_eq!(home.row("a").status, "online");
    // What is not meant to start by itself is left as it is, running or not.
    home.ok(&["start", "b"]);
    home.ok(&["apply", "ecosystem.toml", "--check"]);
    // A hundred looks leave no trace.
    let pid = home.pid("a");
    home.ecosystem(&app("a", "env = { X = '1' }"));
    home.exits(6, &["apply", "ecosystem.toml", "--check"]);
    assert_eq!(home.pid("a"), pid);
    for bad in
        [&["apply", "nothing.toml"][..], &["apply", "app.js"], &["apply", "ecosystem.toml", "--only", "c"]]
    {
        home.exits(2, bad);
    }
}

#[test]
fn pain_29_prune_removes_what_left_the_file_and_nothing_else() {
    let home = Home::new();
    home.ecosystem(&format!("{}{}", app("kept", ""), app("gone", "")));
    home.write("other.toml", &app("other", ""));
    home.ok(&["apply", "ecosystem.toml"]);
    home.ok(&["apply", "other.toml"]);
    home.ok(&["start", "sleep", "--name", "byhand", "--", "1000"]);
    home.ecosystem(&app("kept", ""));
    let before = pids(&home);
    home.ok(&["apply", "ecosystem.toml"])
        .says("gone came from ecosystem.toml and is not in it any more; --prune");
    home.ok(&["apply", "ecosystem.toml", "--check"]);
    home.exits(6, &["apply", "ecosystem.toml", "--check", "--prune"]).says("- gone  remove");
    home.exits(2, &["apply", "ecosystem.toml", "--prune", "--only", "kept"]);
    assert_eq!(pids(&home), before);
    home.ok(&["apply", "ecosystem.toml", "--prune"]);
    let mut left = before.clone();
    let gone = left.remove("gone").unwrap();
    assert_eq!(pids(&home), left);
    assert!(!process::alive(gone[0]));
}

#[test]
fn pain_31_apply_waits_until_ready_and_its_exit_code_and_json_tell_each_app() {
    let home = Home::new();
    let slow = "script = 'sh'\nargs = ['-c', 'sleep 0.4; echo >&$PM_READY_FD; exec sleep 1000']\nwait_ready = true\n";
    let bad = "script = 'sh'\nargs = ['-c', 'echo no database; exit 7']\nmax_restarts = 1\n";
    home.ecosystem(&format!("[[apps]]\nname = 'slow'\n{slow}[[apps]]\nname = 'bad'\n{bad}"));
    let run = home.exits(1, &["apply", "ecosystem.toml", "--json"]);
    let lines: Vec<Value> = run.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines[0]["plan"]["changes"], true);
    let result = &lines.last().unwrap()["result"];
    assert_eq!(
        (&result["ok"], &result["apps"][0]["ok"], &result["apps"][1]["ok"]),
        (&false.into(), &true.into(), &false.into())
    );
    assert!(result["apps"][1]["failure"]["last_lines"].to_string().contains("no database"), "{result}");
    assert_eq!(home.row("slow").status, "online", "it returns when what can be ready is");
    run.says("cannot apply `bad`");
    home.ok(&["delete", "all"]);
    home.ok(&["apply", "ecosystem.toml", "--no-wait", "--only", "slow"]).says("Accepted");
    home.wait_status("slow", "online");
    home.ok(&["delete", "all"]);
    home.ok(&["stop", "all"]);
}

#[test]
fn reload_of_a_file_and_apply_bring_the_same_about() {
    let home = Home::new();
    home.ecosystem(&shop(&home, "instances = 2", ""));
    home.ok(&["start", "ecosystem.toml"]);
    home.ecosystem(&shop(&home, "instances = 3\nenv = { RELEASE = '2' }", "").replace("'1000'", "'2000'"));
    home.ok(&["reload", "ecosystem.toml"]);
    home.ok(&["apply", "ecosystem.toml", "--check"]).says("nothing to do");
    assert_eq!(home.rows_of("web").len(), 3);
    assert_eq!(process::cmdline(home.pid("mail")), ["sleep", "2000"]);
}

/// The file's own idea of itself survives the supervisor, and a death in the middle of an apply costs nothing.
#[test]
fn apply_goes_on_when_the_supervisor_is_killed_in_the_middle() {
    let home = Home::new();
    home.ecosystem(&shop(&home, "instances = 2", ""));
    home.ok(&["apply", "ecosystem.toml"]);
    home.ecosystem(
        &home.read("ecosystem.toml").replace("instances = 2", "instances = 2\nenv = { RELEASE = '2' }"),
    );
    let apply = super::support::home::Running::start(home.command(&["apply", "ecosystem.toml"]), b"");
    wait_until("the reload has begun", SOON, || {
        let events = home.pm(&["events", "web"]).out;
        if events.contains("#2") { Ok(()) } else { Err(events) }
    });
    process::signal(home.supervisor(), nix::sys::signal::Signal::SIGKILL);
    let run = apply.end(super::support::PATIENT);
    assert_eq!(run.code, 0, "{run:#?}");
    home.ok(&["apply", "ecosystem.toml", "--check"]);
    for row in home.rows_of("web") {
        assert_eq!(process::environ(row.pid)["RELEASE"], "2");
    }
}

#[test]
fn pain_28_reload_recomputes_the_environment_and_env_diff_shows_running_against_configured() {
    let home = Home::new();
    home.write("vars.env", "FROM_FILE=1\nGOES=soon\n");
    home.ecosystem(&app(
        "job",
        "env_file = 'vars.env'\nenv = { RELEASE = '1', OLD = 'x' }\nmin_uptime = '100ms'",
    ));
    let mut start = home.command(&["apply", "ecosystem.toml"]);
    start.env("OF_THE_SHELL", "first");
    assert_eq!(super::support::home::run(start, SOON).code, 0);
    home.ok(&["env", "job", "--diff"]).says("job runs with the environment that is configured.");
    home.write("vars.env", "FROM_FILE=2\n");
    home.ecosystem(
        &home.read("ecosystem.toml").replace("RELEASE = '1', OLD = 'x'", "RELEASE = '2', NEW = 'y'"),
    );
    let diff = home.ok(&["env", "job", "--diff"]);
    diff.says("`pm reload job` would change:").says("~ FROM_FILE  1 → 2").says("- GOES       soon → not set");
    diff.says("ecosystem.toml says otherwise")
        .says("~ RELEASE  1 → 2")
        .says("+ NEW      not set → y")
        .says("- OLD");
    let json = home.ok(&["env", "job", "--diff", "--json"]).json();
    assert_eq!(json["reload"][0]["key"], "FROM_FILE");
    home.ok(&["describe", "job"])
        .says("its config file says otherwise: env.NEW, env.RELEASE, env.OLD; `pm apply ");
    // By name: the env file anew, the stored config, and never the caller's shell.
    let mut reload = home.command(&["reload", "job"]);
    reload.env("OF_THE_SHELL", "second");
    assert_eq!(super::support::home::run(reload, SOON).code, 0);
    let env = process::environ(home.pid("job"));
    assert_eq!(
        (env["FROM_FILE"].as_str(), env["RELEASE"].as_str(), env["OF_THE_SHELL"].as_str()),
        ("2", "1", "first")
    );
    assert!(!env.contains_key("GOES"));
    home.ok(&["apply", "ecosystem.toml"]);
    let env = process::environ(home.pid("job"));
    assert_eq!(
        (env["RELEASE"].as_str(), env["NEW"].as_str(), env["OF_THE_SHELL"].as_str()),
        ("2", "y", "first")
    );
    assert!(!env.contains_key("OLD"), "removed keys are gone");
    home.ok(&["describe", "job"]).does_not_say("says otherwise");
    let mut update = home.command(&["reload", "job", "--update-env"]);
    update.env("OF_THE_SHELL", "third");
    assert_eq!(super::support::home::run(update, SOON).code, 0);
    assert_eq!(process::environ(home.pid("job"))["OF_THE_SHELL"], "third");
    home.ecosystem(&app("other", ""));
    home.ok(&["describe", "job"]).says("does not have it any more");
    home.ecosystem("[[apps\n");
    home.ok(&["describe", "job"]).says("pm check");
}

/// `start app.js -i 3` of an app that was started with `--wait-ready` used to forget that.
#[test]
fn pain_02_a_start_of_what_is_there_changes_only_what_the_command_line_names() {
    let home = Home::new();
    home.write("polite.js", "require('http').createServer((_, a) => a.end()).listen(0, '127.0.0.1', () => setTimeout(() => process.send('ready'), 50));");
    home.ok(&["start", "polite.js", "-i", "2", "--wait-ready", "--kill-timeout", "3s", "--", "--verbose"]);
    let before = home.pids("polite");
    home.ok(&["start", "polite.js", "-i", "3"]);
    let after = home.pids("polite");
    assert_eq!(after[..2], before[..], "another number touches nobody");
    assert_eq!(after.len(), 3);
    let spec = &home.ok(&["describe", "polite", "--json"]).json()[0]["spec"];
    assert_eq!((&spec["ready"]["wait_ready"], &spec["instances"]), (&true.into(), &3.into()));
    assert_eq!(
        (&spec["stop"]["timeout"]["secs"], &spec["command"]["args"][0]),
        (&3.into(), &"--verbose".into())
    );
    home.ok(&["start", "polite.js", "--kill-timeout", "4s"]).says("updated");
    assert_eq!(home.pids("polite"), after, "a rule touches nobody");
    home.ok(&["start", "polite.js"]).says("already running");
}

/// What only changes the list leaves nothing to wait for, and so nothing that shows whether it was done.
#[test]
fn a_change_of_the_list_that_was_not_saved_when_the_supervisor_died_is_done_and_not_just_said_to_be() {
    let home = Home::new();
    home.ecosystem(&app("job", ""));
    home.ok(&["apply", "ecosystem.toml"]);
    let job = home.pid("job");
    let begun = || {
        std::fs::read_to_string(home.path().join("events.jsonl"))
            .unwrap()
            .matches("\"operation_begun\"")
            .count()
    };
    let before = begun();
    home.ecosystem(&format!("{}{}", app("job", "max_restarts = 3"), app("idle", "autostart = false")));
    // The state is written aside first: the supervisor waits for a reader there.
    let aside = home.path().join("state.json.new");
    nix::unistd::mkfifo(&aside, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    let apply = super::support::home::Running::start(home.command(&["apply", "ecosystem.toml"]), b"");
    wait_until("the apply has begun", SOON, || if begun() > before { Ok(()) } else { Err(begun()) });
    std::fs::remove_file(&aside).unwrap();
    process::end(home.supervisor());
    let run = apply.end(PATIENT);
    assert_eq!(run.code, 0, "{run:?}");
    assert_eq!(home.statuses("idle"), ["stopped"]);
    let spec = &home.ok(&["describe", "job", "--json"]).json()[0]["spec"];
    assert_eq!((&spec["restart"]["max_restarts"], home.pid("job")), (&3.into(), job));
    home.ok(&["apply", "ecosystem.toml"]).says("nothing to do");
}
