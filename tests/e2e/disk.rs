//! Disks that are full, fail, or can only be read: what is refused, what is done all the same, and what is remembered.

use std::fs;
use std::os::unix::fs::MetadataExt as _;

use nix::sys::signal::Signal;
use serde_json::Value;

use super::support::home::{Running, run};
use super::support::mounts::{Mounted, own_mounts};
use super::support::{Home, PATIENT, SOON, millis, process, stays, wait_until};

/// Three apps, of which one has two instances.
const APPS: &str = "
[[apps]]
name = 'web'
script = 'sleep'
args = ['1000']
instances = 2

[[apps]]
name = 'job'
script = 'sleep'
args = ['1000']

[[apps]]
name = 'old'
script = 'sleep'
args = ['1000']
";

/// One more, whose spec is so long that the pages of a pid file are no room for the state.
fn apps() -> String {
    let long = "x".repeat(60_000);
    format!("{APPS}[[apps]]\nname = 'long'\nscript = 'sh'\nargs = ['-c', 'exec sleep 1000', '{long}']\n")
}

/// What the disk says is wanted: each app with what its slots are to do.
fn on_disk(home: &Home) -> Vec<(String, Vec<String>)> {
    let text = fs::read_to_string(home.path().join("state.json")).expect("state.json");
    let state: Value = serde_json::from_str(&text).expect("it is whole");
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let app = |app: &Value| {
        let slots = app["slots"].as_array().expect("slots");
        (text(&app["spec"]["name"]), slots.iter().map(|slot| text(&slot["desired"])).collect())
    };
    let mut apps: Vec<_> = state["fleet"]["apps"].as_array().expect("apps").iter().map(app).collect();
    apps.sort();
    apps
}

/// A daemon with the apps, whose home is a disk of 1 MiB; `None` where nobody may mount one.
fn on_a_small_disk() -> Option<(Home, Mounted)> {
    if !own_mounts() {
        return None;
    }
    let home = Home::new();
    let disk = Mounted::small(&home.path(), 1024);
    home.start(&apps());
    Some((home, disk))
}

fn kill_the_supervisor(home: &Home) {
    let supervisor = home.supervisor();
    process::signal(supervisor, Signal::SIGKILL);
    wait_until("the next supervisor answers", PATIENT, || {
        let run = home.pm(&["ping"]);
        if run.code == 0 && home.supervisor() != supervisor { Ok(()) } else { Err(run) }
    });
}

/// What needs to be remembered is refused, what ends something is done, and both say why.
fn refuses_and_ends(home: &Home, why: &str) {
    let before = (on_disk(home), home.pids("web"));
    for command in
        [&["start", "sleep", "--name", "new", "--", "1000"][..], &["scale", "web", "3"], &["reload", "web"]]
    {
        home.exits(1, command).says("the state cannot be saved").says(why).says("Nothing was changed");
    }
    assert_eq!((on_disk(home), home.pids("web")), before, "nothing was changed");
    assert_eq!(home.rows().len(), 5);
    home.ok(&["list"]).does_not_say("warning");
    // What runs is restarted: nothing of that has to be remembered.
    let job = home.pid("job");
    home.ok(&["restart", "job"]);
    assert_ne!(home.pid("job"), job);

    for _ in 0..2 {
        home.exits(1, &["stop", "job"]).says("stopped, but not remembered over a reboot").says(why);
        assert_eq!(home.row("job").status, "stopped");
    }
    home.exits(1, &["delete", "old"]).says("deleted, but not remembered over a reboot").says(why);
    assert!(home.rows_of("old").is_empty());
    home.ok(&["list"]).says("warning").says("would start again after a reboot").says(why);
    assert_eq!(on_disk(home), before.0, "what was acknowledged last is what the disk has");
}

#[test]
fn pain_11_on_a_full_disk_start_scale_and_reload_are_refused_and_stop_delete_and_kill_act() {
    let Some((home, disk)) = on_a_small_disk() else { return };
    let web = home.pids("web");
    disk.fill();
    refuses_and_ends(&home, "No space left on device");
    // The next supervisor knows what the disk does not.
    kill_the_supervisor(&home);
    assert_eq!(home.pids("web"), web, "the apps have gone on");
    assert_eq!(home.row("job").status, "stopped");
    assert!(home.rows_of("old").is_empty());
    home.ok(&["list"]).says("would start again after a reboot");

    disk.free();
    wait_until("the list is on disk", SOON, || {
        let list = home.ok(&["list"]).text();
        if list.contains("reboot") { Err(list) } else { Ok(()) }
    });
    let both = |what: &str| vec![what.to_owned()];
    let wanted = vec![
        ("job".to_owned(), both("stopped")),
        ("long".to_owned(), both("running")),
        ("web".to_owned(), [both("running"), both("running")].concat()),
    ];
    assert_eq!(on_disk(&home), wanted);
    home.ok(&["stop", "job"]).says("already stopped");
    home.ok(&["start", "sleep", "--name", "new", "--", "1000"]);
    home.ok(&["scale", "web", "3"]);

    disk.fill();
    home.exits(1, &["kill"]).says("stopped, but not remembered over a reboot").says("resurrect");
    wait_until("everything has ended", SOON, || {
        let left = home.process_list();
        if left.is_empty() { Ok(()) } else { Err(left) }
    });
    disk.free();
    // As it said: the next daemon starts it again.
    home.ok(&["resurrect"]);
    home.wait_status("new", "online");
    assert_eq!(home.statuses("web"), ["online"; 3]);
    home.ok(&["kill"]);
}

#[test]
fn pain_11_a_machine_that_boots_with_a_full_disk_starts_what_is_wanted() {
    let Some((home, disk)) = on_a_small_disk() else { return };
    home.ok(&["stop", "job"]);
    let wanted = on_disk(&home);
    disk.fill();
    home.power_cut();
    home.pm(&["resurrect"]);
    wait_until("the apps are up", SOON, || {
        let rows = home.rows();
        let up = rows.iter().filter(|row| row.status == "online").count();
        if up == 4 && rows.len() == 5 { Ok(()) } else { Err(rows) }
    });
    assert_eq!(home.row("job").status, "stopped");
    assert_eq!(on_disk(&home), wanted);
    // An app that ends is started again, more often than numbers were reserved for.
    for _ in 0..3 {
        let old = home.pid("old");
        process::signal(old, Signal::SIGKILL);
        home.wait_row("old", "another one is online", |row| row.status == "online" && row.pid != old);
    }
    disk.free();
    home.ok(&["start", "job"]);
    home.ok(&["kill"]);
}

#[test]
fn pain_11_on_a_disk_that_has_become_read_only_the_same_is_refused_and_done() {
    let Some((home, disk)) = on_a_small_disk() else { return };
    let web = home.pids("web");
    let read_only = Mounted::read_only(&home.path());
    refuses_and_ends(&home, "Read-only file system");
    kill_the_supervisor(&home);
    assert_eq!(home.pids("web"), web);
    assert_eq!(home.row("job").status, "stopped");
    drop(read_only);
    wait_until("the list is on disk", SOON, || {
        let list = home.ok(&["list"]).text();
        if list.contains("reboot") { Err(list) } else { Ok(()) }
    });
    home.ok(&["scale", "web", "3"]);
    home.ok(&["kill"]);
    drop(disk);
}

#[test]
fn a_keeper_killed_while_its_home_is_read_only_costs_nothing() {
    let Some((home, disk)) = on_a_small_disk() else { return };
    let (web, job) = (home.pids("web"), home.pid("job"));
    let read_only = Mounted::read_only(&home.path());
    let keeper = home.keeper();
    process::signal(keeper, Signal::SIGKILL);
    // No place for a socket, and none is needed.
    wait_until("the next keeper has everything", PATIENT, || {
        let run = home.pm(&["ping"]);
        if run.code == 0 && home.keeper() != keeper { Ok(()) } else { Err(run) }
    });
    assert_eq!((home.pids("web"), home.pid("job")), (web.clone(), job), "the apps have gone on");
    process::signal(job, Signal::SIGKILL);
    wait_until("it is a keeper", PATIENT, || {
        let row = home.row("job");
        if row.status == "online" && home.pid("job") != job { Ok(()) } else { Err(row) }
    });
    drop(read_only);
    home.ok(&["scale", "web", "3"]);
    assert_eq!(home.pids("web")[..2], web[..]);
    home.ok(&["kill"]);
    drop(disk);
}

#[test]
fn pain_11_a_disk_that_fails_costs_no_app_and_no_acknowledged_state() {
    if !own_mounts() {
        return;
    }
    let home = Home::new();
    let image = home.work().join("disk.img");
    let Some(disk) = Mounted::ext4(&image, &home.path()) else { return };
    fs::remove_dir(home.path().join("lost+found")).unwrap();
    home.start(&apps());
    let (web, acknowledged) = (home.pids("web"), on_disk(&home));
    disk.fail();
    home.exits(1, &["start", "sleep", "--name", "new", "--", "1000"]).says("Input/output error");
    home.exits(1, &["scale", "web", "3"]).says("Input/output error");
    home.exits(1, &["stop", "job"])
        .says("stopped, but not remembered over a reboot")
        .says("Input/output error");
    home.ok(&["list"]).says("would start again after a reboot");
    assert_eq!(home.pids("web"), web);
    // The next supervisor cannot know what is wanted: it ends nothing, starts nothing, and says so.
    process::signal(home.supervisor(), Signal::SIGKILL);
    wait_until("the next one says what is wrong", SOON, || {
        let run = home.pm(&["list"]);
        let says = run.text().contains("cannot read its state") && run.text().contains("Input/output error");
        if says && run.code == 1 { Ok(()) } else { Err(run) }
    });
    stays("the apps go on", millis(300), || {
        if web.iter().all(|pid| process::alive(*pid)) { Ok(()) } else { Err(home.process_list()) }
    });

    // Another disk controller, and a reboot.
    home.power_cut();
    drop(disk);
    let disk = Mounted::ext4(&image, &home.path()).expect("it was there before");
    assert_eq!(on_disk(&home), acknowledged);
    home.ok(&["resurrect"]);
    assert_eq!(home.statuses("web"), ["online"; 2]);
    home.ok(&["kill"]);
    drop(disk);
}

#[test]
fn pain_11_shutdown_never_rewrites_the_desired_state() {
    let home = Home::new();
    home.start(APPS);
    home.start("[[apps]]\nname = 'slow'\nscript = 'sh'\nargs = ['-c', 'trap \"\" INT; while :; do sleep 0.1; done']\nkill_timeout = '1s'\n");
    // In the middle of a restart, which is part of the state.
    let restart = Running::start(home.command(&["restart", "slow"]), b"");
    let file = home.path().join("state.json");
    let before = wait_until("the restart is on disk", SOON, || {
        let text = fs::read_to_string(&file).unwrap_or_default();
        if text.contains("\"operation\":\"restart\"") { Ok(text) } else { Err(text) }
    });
    let inode = fs::metadata(&file).unwrap().ino();
    process::signal(home.keeper(), Signal::SIGTERM);
    wait_until("the daemon has ended", PATIENT, || {
        let left = home.process_list();
        if left.contains(" daemon ") || left.contains("sleep") { Err(left) } else { Ok(()) }
    });
    assert_ne!(restart.end(PATIENT).code, 0);
    assert_eq!(fs::read_to_string(&file).unwrap(), before);
    assert_eq!(fs::metadata(&file).unwrap().ino(), inode, "it was not even written again");
    home.ok(&["resurrect"]);
    home.wait_status("slow", "online");
    assert_eq!(home.statuses("web"), ["online"; 2]);
}

#[test]
fn pain_11_a_file_system_with_a_limit_on_file_sizes_ends_no_supervisor() {
    let home = Home::new();
    home.start(&apps());
    let (supervisor, web) = (home.supervisor(), home.pids("web"));
    let limit = |bytes: &str| {
        let mut command = std::process::Command::new("prlimit");
        home.environment(&mut command);
        command.args(["--pid", &supervisor.to_string(), &format!("--fsize={bytes}")]);
        let done = run(command, SOON);
        assert_eq!(done.code, 0, "{done:?}");
    };
    limit("100:");
    home.exits(1, &["scale", "web", "3"]).says("the state cannot be saved").says("File too large");
    assert_eq!((home.supervisor(), home.pids("web")), (supervisor, web), "SIGXFSZ ends nobody");
    limit("unlimited:");
    home.ok(&["scale", "web", "3"]);
}
