//! What is tried under systemd.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pm::sys::clock;

use crate::machine::{
    DIR, PM, Scenario, alive, daemon, drop_in, ok, pids, pids_of, processes, sh, start, unit, until,
    until_says, write,
};

pub(crate) const ALL: &[Scenario] = &[
    (
        "startup_sets_up_a_unit_that_verifies_and_twice_is_the_same_as_once",
        pain_19_startup_writes_a_notify_unit_without_pid_file_that_verifies,
    ),
    ("startup_refuses_what_it_must_not_do_and_says_what_would_work", startup_refuses),
    ("paths_with_dollars_blanks_and_percent_signs_are_taken_as_they_are", odd_paths),
    ("a_daemon_that_was_started_by_hand_is_taken_over_with_its_apps", by_hand_is_taken_over),
    ("kill_9_of_the_keeper_leaves_one_keeper_one_supervisor_and_the_same_app_pids", killed_keeper),
    ("systemctl_restart_keeps_the_app_pids", restart_keeps_pids),
    ("systemctl_reload_replaces_the_daemon_by_what_is_installed_and_keeps_every_process", reload_upgrades),
    ("systemctl_stop_ends_the_apps_and_start_brings_back_what_was_wanted", stop_and_start),
    ("a_stop_takes_as_long_as_the_slowest_app_may_take", slow_stop),
    ("what_a_hung_daemon_leaves_is_ended_when_a_stop_was_asked_for", hung_daemon_is_cleaned_up),
    ("a_supervisor_or_keeper_that_hangs_is_replaced_and_no_app_notices", watchdog),
    (
        "fifty_apps_that_boot_with_cpu_work_all_come_up_and_ready_does_not_wait_for_them",
        pain_19_ready_is_sent_when_the_daemon_is_up_and_fifty_apps_are_restored_in_parallel,
    ),
    ("pain_42_credentials_of_the_unit_reach_apps", pain_42_credentials),
    ("apps_do_not_inherit_what_protects_the_daemon", oom_scores),
    ("instances_are_in_groups_of_their_own_and_the_daemon_in_a_leaf_over_crash_and_restart", groups),
    ("pain_14_the_unit_sets_oom_policy_delegate_and_a_low_score_for_the_daemon", pain_14_shipped_unit),
    ("pain_27_an_app_of_a_user_has_the_groups_of_id_user", pain_27_groups_of_id),
    ("pm_kill_ends_the_unit_and_systemd_does_not_start_it_again", kill_is_final),
    ("unstartup_undoes_startup_and_ends_nothing", unstartup),
    ("a_unit_for_another_user_runs_as_that_user", other_user),
    ("a_user_service_needs_no_root", user_service),
];

const TWO: &str = "[[apps]]\nname = 'one'\nscript = 'sleep'\nargs = ['1000']\n\
                   [[apps]]\nname = 'two'\nscript = 'sh'\nargs = ['-c', 'sleep 1001; true']\ninstances = 2\n";

/// Numbered lines, a hundred a second.
const COUNT: &str = "i=0\nwhile [ $i -lt 100000 ]; do i=$((i+1)); echo $i; sleep 0.01; done\n";

/// Of those that an app `count` has written so far.
fn no_line_is_lost_or_twice() {
    let lines = ok("cat /var/lib/pm/logs/count-out*.log");
    let numbers: Vec<u64> = lines.lines().map(|line| line.parse().unwrap()).collect();
    assert!(numbers.len() > 20);
    let expected: Vec<u64> = (1..=numbers.len() as u64).collect();
    assert_eq!(numbers, expected);
}

fn pain_19_startup_writes_a_notify_unit_without_pid_file_that_verifies() {
    let path = "/etc/systemd/system/pm.service";
    sh("pm startup").succeeds().says("pm.service is set up").says(path).says_not("warning");
    assert_eq!(ok("systemctl is-enabled pm"), "enabled");
    assert_eq!(ok("systemctl is-active pm"), "active");
    for (key, value) in [
        ("Type", "notify"),
        ("NotifyAccess", "main"),
        ("PIDFile", ""),
        ("KillMode", "process"),
        ("OOMPolicy", "continue"),
        ("Delegate", "yes"),
        ("Restart", "on-failure"),
        ("WatchdogUSec", "1min"),
        ("StatusText", "no apps"),
    ] {
        assert_eq!(unit(key), value, "{key}");
    }
    assert_eq!(ok("systemd-analyze verify --man=no /etc/systemd/system/pm.service"), "", "not a word");
    let text = fs::read_to_string(path).unwrap();
    assert_eq!(ok("pm startup --print"), text.trim());
    let before = unit("MainPID");
    sh("pm startup").succeeds().says("is set up already");
    sh("pm startup systemd --json").succeeds().says("\"changed\":false");
    assert_eq!(unit("MainPID"), before);
    assert_eq!(fs::read_to_string(path).unwrap(), text);

    // One that an older version wrote is brought up to date.
    fs::write(path, text.replace("WatchdogSec=60", "WatchdogSec=61")).unwrap();
    sh("pm startup --json").succeeds().says("\"changed\":true");
    assert_eq!(fs::read_to_string(path).unwrap(), text);
    assert_eq!(unit("MainPID"), before);
    start(TWO);
    until_says("systemctl show pm --value -p StatusText", "2 apps: 3 online");
}

fn startup_refuses() {
    sh("useradd -m ann");
    // The command to copy, and nothing done.
    let refused = sh("su ann -c 'pm startup'");
    assert_eq!(refused.code, 1, "{}", refused.text);
    refused.says("sudo /usr/local/bin/pm startup -u ann\n").says("pm startup --user");
    sh("su ann -c 'pm startup --home /srv/x --service-name shop'")
        .says("sudo /usr/local/bin/pm startup -u ann --home /srv/x --service-name shop\n");
    sh("pm startup -u nobody-there").says("there is no user `nobody-there`");
    sh("pm startup upstart").says("openrc, runit").code_is(2);
    sh("pm startup --service-name ../x").says("is not a name for a unit").code_is(2);
    sh("pm unstartup").succeeds().says("not set up");

    let path = "/etc/systemd/system/pm.service";
    fs::write(path, "[Service]\nExecStart=/bin/true\n").unwrap();
    sh("pm startup").says("is not a unit that `pm startup` wrote").says("--service-name").code_is(1);
    sh("pm unstartup").says("is not a unit that `pm startup` wrote").code_is(1);
    assert!(fs::read_to_string(path).unwrap().contains("/bin/true"));
    fs::remove_file(path).unwrap();

    ok("pm startup --service-name pm-shop --home /srv/shop");
    sh("pm startup --service-name pm-shop").says("is for another home").says("/srv/shop").code_is(1);
    ok("systemctl stop pm-shop; pm unstartup --service-name pm-shop --home /srv/shop; rm -rf /srv/shop");
    assert!(fs::metadata("/etc/systemd/system/pm-shop.service").is_err());
}

fn odd_paths() {
    let (place, home) = ("/opt/a $b 1% ${c} $$d", "/srv/e $f 1% ${g} $$h");
    ok(&format!("mkdir '{place}' '{home}'; cp /usr/local/bin/pm '{place}/pm'"));
    sh(&format!("'{place}/pm' startup --service-name pm-odd --home '{home}'")).succeeds().says_not("warning");
    assert_eq!(ok("systemctl is-active pm-odd"), "active");
    let mounts = ok("systemctl show pm-odd --value -p RequiresMountsFor");
    // Shown as a shell would have it.
    assert!(mounts.replace('\\', "").contains(home), "{mounts}");
    let words = |pid: &str| fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let keeper = ok("systemctl show pm-odd --value -p MainPID");
    assert!(words(&keeper).ends_with(&format!("\0daemon\0--home\0{home}\0")), "{}", words(&keeper));
    assert_eq!(fs::read_link(format!("/proc/{keeper}/exe")).unwrap(), Path::new(place).join("pm"));
    ok(&format!("pm --home '{home}' start sleep --name odd -- 1000"));
    let pid = ok(&format!("pm --home '{home}' pid odd"));
    ok("systemctl reload pm-odd");
    ok("systemctl restart pm-odd");
    assert_eq!(
        ok(&format!("pm --home '{home}' pid odd")),
        pid,
        "ExecReload and ExecStop find program and home"
    );
    ok(&format!("systemctl stop pm-odd; '{place}/pm' unstartup --service-name pm-odd --home '{home}'"));
    assert!(!alive(pid.parse().unwrap()));
    ok(&format!("rm -rf '{place}' '{home}'"));
}

fn by_hand_is_taken_over() {
    start(TWO);
    let before = pids();
    assert_eq!(before.len(), 3);
    let (by_hand, _) = daemon();
    sh("pm startup").succeeds().says("it took over from the one that was running, with every app");
    let (keeper, _) = daemon();
    assert_ne!(keeper, by_hand);
    assert_eq!(unit("MainPID"), keeper.to_string());
    assert_eq!(pids(), before);
    for pid in before.values() {
        let group = group_of(*pid);
        assert!(group.contains("/system.slice/pm.service/app-"), "{group}");
    }
    // The other way round nobody is driven out: the one that is there is named.
    let second = sh("pm daemon");
    assert_eq!(second.code, 5);
    second.says(&format!("pid {keeper}"));
}

fn killed_keeper() {
    write("count.sh", COUNT);
    ok("pm startup");
    start(&format!("{TWO}[[apps]]\nname = 'count'\nscript = 'count.sh'\n"));
    let before = pids();
    let mut earlier = daemon();
    for round in 1..=5 {
        ok(&format!("kill -9 {}", earlier.0));
        until("systemd has started the next keeper", || {
            let main = unit("MainPID");
            let up = unit("SubState") == "running" && main != earlier.0.to_string() && main != "0";
            if up { Ok(()) } else { Err(format!("{main} {}", unit("SubState"))) }
        });
        let now = daemon();
        assert_eq!(unit("MainPID"), now.0.to_string(), "round {round}");
        assert_ne!(now.1, earlier.1, "the supervisor handed over and ended");
        assert_eq!(pids(), before, "round {round}");
        earlier = now;
    }
    assert_eq!(unit("NRestarts"), "5");
    // An app that ends now is followed all the same, and what it ended by is known.
    let one = before["one:0"];
    ok(&format!("kill -TERM {one}"));
    until("it was started again", || match pids().get("one:0") {
        Some(pid) if *pid != one => Ok(()),
        other => Err(format!("{other:?}")),
    });
    sh("pm describe one").succeeds().says("SIGTERM");
    no_line_is_lost_or_twice();
    assert_eq!(ok("pm ping | wc -l"), "1");
}

/// Starts two apps that sleep, one that counts lines, and one that ends with code 7 when it is asked to.
fn start_two_count_and_ends() {
    write("count.sh", COUNT);
    write("ends.sh", "trap 'exit 7' TERM\nwhile :; do sleep 0.05; done\n");
    start(&format!(
        "{TWO}[[apps]]\nname = 'count'\nscript = 'count.sh'\n\
         [[apps]]\nname = 'ends'\nscript = 'ends.sh'\nautorestart = false\n"
    ));
}

fn restart_keeps_pids() {
    ok("pm startup");
    start_two_count_and_ends();
    let before = pids();
    let (first, _) = daemon();
    for verb in ["restart", "try-restart", "reload-or-restart"] {
        ok(&format!("systemctl {verb} pm"));
        assert_eq!(unit("MainPID"), daemon().0.to_string());
        assert_eq!(pids(), before, "{verb}");
        assert_eq!((unit("Result"), unit("NRestarts")), ("success".into(), "0".into()), "{verb}");
    }
    assert_ne!(daemon().0, first);
    // Nobody's child any more; the kernel still says what it ended with, if it is new enough.
    ok(&format!("kill -TERM {}", before["ends:4"]));
    until("its exit is known", || match sh("pm describe ends").text {
        text if text.contains("exit code 7") || (!keeps_exits() && text.contains("stopped")) => Ok(()),
        text => Err(text),
    });
    ok("pm stop count");
    no_line_is_lost_or_twice();
    // What was decided before holds afterwards.
    ok("pm stop two");
    ok("systemctl restart pm");
    assert_eq!(pids().into_keys().collect::<Vec<_>>(), ["one:0"]);
}

/// Whether the kernel tells the exit code of a process that somebody else has reaped (PIDFD_GET_INFO, Linux 6.15).
fn keeps_exits() -> bool {
    let release = ok("uname -r");
    let mut numbers = release.split(['.', '-']).map(|part| part.parse::<u32>().unwrap_or(0));
    (numbers.next(), numbers.next()) >= (Some(6), Some(15))
}

fn reload_upgrades() {
    ok("pm startup");
    start_two_count_and_ends();
    let before = pids();
    let (keeper, mut supervisor) = daemon();
    // Nothing new is installed: nothing happens.
    ok("systemctl reload pm");
    assert_eq!(daemon(), (keeper, supervisor));
    for round in 1..=3 {
        // As packages do it: the new file takes the name of the old one.
        ok(&format!("cp {PM} {PM}.new && echo >> {PM}.new && mv {PM}.new {PM}"));
        ok("systemctl reload pm");
        until("systemd has heard that it is ready", || match unit("SubState") {
            state if state == "running" => Ok(()),
            state => Err(state),
        });
        let now = daemon();
        assert_eq!(now.0, keeper, "round {round}: the main process is the same");
        assert_ne!(now.1, supervisor);
        supervisor = now.1;
        assert_eq!(unit("MainPID"), keeper.to_string());
        assert_eq!(pids(), before, "round {round}");
        assert_eq!((unit("Result"), unit("NRestarts")), ("success".into(), "0".into()));
        assert_eq!(unit("NotifyAccess"), "main");
        for pid in [now.0, now.1] {
            let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap();
            assert_eq!(program.to_str(), Some(PM), "round {round}");
        }
    }
    // Systemd goes on watching, and the apps are still the keeper's children.
    ok(&format!("kill -TERM {}", before["ends:4"]));
    until("its exit is known", || match sh("pm describe ends").text {
        text if text.contains("exit code 7") => Ok(()),
        text => Err(text),
    });
    ok("pm stop count");
    no_line_is_lost_or_twice();
    until_says("systemctl show pm --value -p StatusText", "4 apps: 3 online, 2 stopped");
    // Something that is no pm is refused, and the daemon goes on.
    ok("cp /bin/true /root/scenario/true");
    sh("pm upgrade /root/scenario/true").says("it is not pm").code_is(2);
    assert_eq!(daemon(), (keeper, supervisor));
}

fn stop_and_start() {
    ok("pm startup");
    start(TWO);
    ok("pm stop one");
    let before = pids();
    ok("systemctl stop pm");
    assert_eq!(processes(), [], "daemon and supervisor are gone");
    for pid in before.values() {
        assert!(!alive(*pid), "{pid}");
    }
    assert_eq!((unit("ActiveState"), unit("Result")), ("inactive".into(), "success".into()));
    sh("pm list").succeeds();
    assert_eq!(processes(), [], "asking starts nothing");
    ok("systemctl start pm");
    until("what was running runs", || match pids() {
        now if now.len() == 2 => Ok(()),
        now => Err(format!("{now:?}")),
    });
    assert!(pids().keys().all(|name| name.starts_with("two:")), "what was stopped stays so: {:?}", pids());
}

fn slow_stop() {
    ok("pm startup");
    // A third of what the app takes: without being asked for more, systemd would end the daemon in the middle.
    drop_in("TimeoutStopSec=1");
    write(
        "slow.sh",
        "trap 'sleep 3; echo done >/root/scenario/done; exit 0' INT\nwhile :; do sleep 0.1; done\n",
    );
    start("[[apps]]\nname = 'slow'\nscript = 'slow.sh'\nkill_timeout = '30s'\n");
    let begun = clock::now();
    ok("systemctl stop pm");
    assert!(clock::now().since(begun) > Duration::from_secs(2));
    assert_eq!(fs::read_to_string(format!("{DIR}/done")).unwrap().trim(), "done");
    assert_eq!((unit("ActiveState"), unit("Result")), ("inactive".into(), "success".into()));
}

fn hung_daemon_is_cleaned_up() {
    ok("pm startup");
    drop_in("TimeoutStopSec=3");
    write(
        "deaf.sh",
        "trap '' INT TERM\n(trap '' TERM; while :; do sleep 0.1; done) &\nwhile :; do sleep 0.1; done\n",
    );
    start(&format!("{TWO}[[apps]]\nname = 'deaf'\nscript = 'deaf.sh'\n"));
    let before = pids();
    let (keeper, supervisor) = daemon();
    ok(&format!("kill -STOP {keeper} {supervisor}"));
    sh("systemctl stop pm");
    assert_eq!(processes(), []);
    for pid in before.values() {
        assert!(!alive(*pid), "{pid}");
    }
    until_says(
        "systemctl show pm --value -p ControlGroup | xargs -I{} cat /sys/fs/cgroup{}/cgroup.procs | wc -l",
        "0",
    );
    // Run by hand, it touches nothing.
    ok("systemctl start pm");
    until("everything runs again", || if pids().len() == 4 { Ok(()) } else { Err(format!("{:?}", pids())) });
    let before = pids();
    ok("pm unit cleanup pm.service");
    ok("SERVICE_RESULT=success pm unit cleanup pm.service");
    assert_eq!(pids(), before);
}

fn watchdog() {
    ok("pm startup");
    drop_in("WatchdogSec=2\nTimeoutStopSec=1");
    ok("systemctl restart pm");
    start(TWO);
    let before = pids();
    let (keeper, supervisor) = daemon();
    ok(&format!("kill -STOP {supervisor}"));
    until("the keeper replaces the supervisor", || match daemon() {
        (now, next) if now == keeper && next != supervisor => Ok(()),
        seen => Err(format!("{seen:?}")),
    });
    assert_eq!(pids(), before);
    ok(&format!("kill -STOP {keeper}"));
    until("systemd replaces the keeper", || match unit("MainPID") {
        main if main != keeper.to_string() && main != "0" && unit("SubState") == "running" => Ok(()),
        seen => Err(format!("{seen} {}", unit("SubState"))),
    });
    daemon();
    assert_eq!(pids(), before);
    assert_eq!(unit("NRestarts"), "1");
}

fn pain_19_ready_is_sent_when_the_daemon_is_up_and_fifty_apps_are_restored_in_parallel() {
    // Each needs a good tenth of a second of CPU time before it can serve.
    write(
        "work.sh",
        "i=0\nwhile [ $i -lt 40000 ]; do i=$((i+1)); done\necho >&$PM_READY_FD\nexec sleep 1000\n",
    );
    let apps: String = (0..50)
        .map(|n| format!("[[apps]]\nname = 'app-{n}'\nscript = 'work.sh'\nwait_ready = true\n"))
        .collect();
    ok("pm startup");
    write("ecosystem.toml", &format!("start_parallelism = 5\n{apps}"));
    ok(&format!("cd {DIR} && pm start ecosystem.toml --no-wait"));
    ok("systemctl stop pm");
    assert_eq!(processes(), []);
    let begun = clock::now();
    ok("systemctl start pm");
    let up = clock::now().since(begun);
    let online = pids().len();
    assert!(online < 50, "READY did not wait for the apps: {online} online after {up:?}");
    until("all apps are online", || {
        if pids().len() == 50 { Ok(()) } else { Err(format!("{} of 50", pids().len())) }
    });
    println!("  50 apps: READY after {up:?}, all online after {:?}", clock::now().since(begun));
    let list: serde_json::Value = serde_json::from_str(&ok("pm jlist")).unwrap();
    for row in list.as_array().unwrap() {
        assert_eq!(row["pm2_env"]["restart_time"], 0, "{}", row["name"]);
    }
    until_says("systemctl show pm --value -p StatusText", "50 apps: 50 online");
}

fn pain_42_credentials() {
    ok("pm startup");
    write("token", "s3cret");
    drop_in(&format!("LoadCredential=token:{DIR}/token"));
    ok("systemctl restart pm");
    write("reads.sh", "cat $CREDENTIALS_DIRECTORY/token >/root/scenario/seen\nexec sleep 1000\n");
    start(
        "[[apps]]\nname = 'reads'\nscript = 'reads.sh'\n\
         [[apps]]\nname = 'own'\nscript = 'sleep'\nargs = ['1000']\n[apps.env]\nCREDENTIALS_DIRECTORY = '/mine'\n",
    );
    until_says("cat /root/scenario/seen", "s3cret");
    let pid = pids()["own:1"];
    let env = fs::read_to_string(format!("/proc/{pid}/environ")).unwrap();
    assert!(
        env.split('\0').any(|entry| entry == "CREDENTIALS_DIRECTORY=/mine"),
        "the config has the last word"
    );
    for word in ["NOTIFY_SOCKET", "WATCHDOG_USEC", "INVOCATION_ID", "JOURNAL_STREAM", "PM_APPS_OOM_SCORE_ADJ"]
    {
        assert!(!env.contains(word), "{word} is between systemd and the daemon");
    }
}

fn oom_scores() {
    ok("pm startup");
    start(TWO);
    // A machine may be forbidden to protect anything; then there is nothing to pass on either.
    let protected = if sh("echo -900 >/proc/self/oom_score_adj").code == 0 { "-900" } else { "0" };
    let score =
        |pid: i32| fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap().trim().to_owned();
    let check = || {
        let (keeper, supervisor) = daemon();
        assert_eq!((score(keeper).as_str(), score(supervisor).as_str()), (protected, protected));
        for pid in pids().values() {
            assert_eq!(score(*pid), "0");
            let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
            let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
            let limit: u64 = line.split_whitespace().nth(3).unwrap().parse().unwrap();
            // As much as the unit says, or as this machine allows.
            assert_eq!(limit, 65536.min(pm::sys::limits::open_files().unwrap().hard), "{line}");
        }
    };
    check();
    ok("systemctl restart pm");
    ok("pm restart all");
    check();
}

/// The v2 group of a process.
fn group_of(pid: i32) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    text.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default().to_owned()
}

/// The directory of a v2 group.
fn dir_of(group: &str) -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = mounts.lines().find(|line| line.contains(" - cgroup2 ")).unwrap();
    let mut fields = line.split(' ').skip(3);
    let (root, mount) = (fields.next().unwrap(), fields.next().unwrap());
    let group = group.strip_prefix(root).unwrap_or(group);
    Path::new(mount).join(group.trim_start_matches('/'))
}

fn is_in_place(before: &BTreeMap<String, i32>) {
    assert_eq!(pids(), *before);
    let (keeper, supervisor) = daemon();
    for pid in [keeper, supervisor] {
        assert!(group_of(pid).ends_with("/pm.service/_daemon"), "{}", group_of(pid));
    }
    let groups: Vec<String> = before.values().map(|pid| group_of(*pid)).collect();
    for group in &groups {
        assert!(group.contains("/pm.service/app-"), "{group}");
        assert_eq!(groups.iter().filter(|other| *other == group).count(), 1, "{group} is of one instance");
    }
    let unit = dir_of(groups[0].rsplit_once('/').unwrap().0);
    assert_eq!(fs::read_to_string(unit.join("cgroup.procs")).unwrap(), "", "no process in an inner group");
}

fn groups() {
    ok("pm startup");
    start(TWO);
    let before = pids();
    is_in_place(&before);
    let mut group = group_of(before["one:0"]);
    // Of the domain controllers this kernel may have, any one makes a group that must have no processes.
    let property = unit;
    let unit = group.rsplit_once('/').unwrap().0.to_owned();
    let mut path = PathBuf::new();
    let mut all = vec![dir_of("/")];
    for part in unit.trim_start_matches('/').split('/') {
        path.push(part);
        all.push(dir_of(&format!("/{}", path.display())));
    }
    let controllers = fs::read_to_string(all[0].join("cgroup.controllers")).unwrap();
    let enabled = controllers.split_whitespace().find(|controller| {
        all.iter().all(|dir| fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}")).is_ok())
    });
    println!("a controller that is enabled for the apps: {enabled:?}, of: {controllers}");
    let kill = |pid: i32| ok(&format!("kill -9 {pid}"));
    for round in 0..3 {
        let (keeper, _) = daemon();
        if round == 2 {
            ok("systemctl restart pm");
        } else {
            kill(keeper);
        }
        until("systemd has started the next keeper", || {
            let main = main_pid();
            let up = property("SubState") == "running" && main != keeper && main != 0;
            if up { Ok(()) } else { Err(format!("{main} {}", ok("systemctl status pm; true"))) }
        });
        is_in_place(&before);
        if let Some(controller) = enabled {
            // The next daemon enables what it needs; this one is nobody's need but the test's.
            let _ = fs::write(dir_of(&unit).join("cgroup.subtree_control"), format!("+{controller}"));
        }
    }
    // What hides from everything else is still in its group, and ends with it.
    start(
        "[[apps]]\nname = 'one'\nscript = 'sh'\nargs = ['-c', '(setsid env -i sleep 1234 &); exec sleep 1235']\n",
    );
    until("the hidden one is there", || {
        group = group_of(pids()["one:0"]);
        let members = fs::read_to_string(dir_of(&group).join("cgroup.procs")).unwrap();
        if members.lines().count() == 2 { Ok(()) } else { Err(members) }
    });
    ok("pm stop one");
    assert!(fs::metadata(dir_of(&group)).is_err(), "{group} is gone");
    ok("systemctl stop pm");
    until("the unit's group is empty", || {
        let left = fs::read_dir(dir_of(&unit)).map(|dir| dir.count()).unwrap_or(0);
        let running = pids_in(&dir_of(&unit));
        if running.is_empty() { Ok(()) } else { Err(format!("{left} entries, {running}")) }
    });
    // The machine's own groups are as they were.
    for dir in all.iter().rev() {
        let _ = fs::write(dir.join("cgroup.subtree_control"), format!("-{}", enabled.unwrap_or_default()));
    }
}

fn pids_in(dir: &Path) -> String {
    let own = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    let below = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.is_dir());
    below.fold(own, |all, dir| all + &pids_in(&dir))
}

fn main_pid() -> i32 {
    unit("MainPID").parse().unwrap_or(0)
}

fn pain_14_shipped_unit() {
    ok("pm startup");
    start("[[apps]]\nname = 'one'\nscript = 'sleep'\nargs = ['1000']\n");
    for (key, value) in [("OOMPolicy", "continue"), ("Delegate", "yes"), ("OOMScoreAdjust", "-900")] {
        assert_eq!(unit(key), value, "{key}");
    }
    let score =
        |pid: i32| fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap().trim().to_owned();
    // A machine may be forbidden to protect anything.
    let protected = if sh("echo -900 >/proc/self/oom_score_adj").code == 0 { "-900" } else { "0" };
    assert_eq!(score(daemon().0), protected);
    assert_eq!(score(pids()["one:0"]), "0");
}

fn pain_27_groups_of_id() {
    ok("groupadd shop; groupadd media; useradd -m -G shop,media bob");
    ok("pm startup");
    start("[[apps]]\nname = 'one'\nscript = 'sleep'\nargs = ['1000']\nuser = 'bob'\n");
    let status = fs::read_to_string(format!("/proc/{}/status", pids()["one:0"])).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("Groups:")).unwrap();
    let sorted = |text: &str| {
        let mut groups: Vec<u32> = text.split_whitespace().map(|group| group.parse().unwrap()).collect();
        groups.sort_unstable();
        groups
    };
    assert_eq!(sorted(line), sorted(&ok("id -G bob")));
    assert_eq!(sorted(line).len(), 3);
    let log = fs::metadata("/var/lib/pm/logs/one-out.log").unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&log).to_string(), ok("id -u bob"));
}

fn kill_is_final() {
    ok("pm startup");
    start(TWO);
    ok("pm kill");
    until_says("systemctl show pm --value -p ActiveState", "inactive");
    assert_eq!((unit("Result"), unit("NRestarts")), ("success".into(), "0".into()));
    assert_eq!(processes(), []);
    // The daemon a command starts is the unit's no more; the next start of the unit takes it over.
    ok("pm resurrect");
    let before = pids();
    assert_eq!(before.len(), 3);
    ok("systemctl start pm");
    assert_eq!(pids(), before);
    assert_eq!(unit("MainPID"), daemon().0.to_string());
}

fn unstartup() {
    ok("pm startup");
    start(TWO);
    let before = pids();
    sh("pm unstartup").succeeds().says("pm.service is removed").says("run on");
    assert!(fs::metadata("/etc/systemd/system/pm.service").is_err());
    assert_ne!(sh("systemctl is-enabled pm").text.trim(), "enabled");
    assert_eq!(pids(), before);
    // Until the next reboot systemd goes on looking after it.
    ok(&format!("kill -9 {}", daemon().0));
    until(
        "the next keeper is there",
        || if unit("NRestarts") == "1" { Ok(()) } else { Err(unit("NRestarts")) },
    );
    daemon();
    assert_eq!(pids(), before);
    sh("pm unstartup").succeeds().says("not set up");
    ok("systemctl stop pm");
    assert_eq!(processes(), []);
    // And once more from the beginning.
    ok("pm startup");
    assert_eq!(unit("FragmentPath"), "/etc/systemd/system/pm.service");
    until("everything runs again", || if pids().len() == 3 { Ok(()) } else { Err(format!("{:?}", pids())) });
    ok("systemctl stop pm && pm unstartup");
    assert_eq!(unit("LoadState"), "not-found");
}

fn other_user() {
    sh("useradd -m bob");
    write("../bob.toml", TWO);
    ok("cp /root/bob.toml /home/bob/ && chown bob /home/bob/bob.toml");
    ok("su bob -c 'cd && pm start bob.toml'");
    let pm = "su bob -c pm\\ ";
    let list = || pids_of("HOME=/home/bob pm --home /home/bob/.pm");
    let before = list();
    assert_eq!(before.len(), 3, "{pm}");
    sh("pm startup -u bob").succeeds().says("pm-bob.service is set up").says("took over");
    assert_eq!(list(), before);
    let main = ok("systemctl show pm-bob --value -p MainPID");
    assert_eq!(ok(&format!("stat -c %U /proc/{main}")), "bob");
    ok("systemctl restart pm-bob");
    assert_eq!(list(), before);
    ok("systemctl stop pm-bob");
    ok("systemctl start pm-bob");
    until("everything runs again", || if list().len() == 3 { Ok(()) } else { Err(format!("{:?}", list())) });
    for pid in list().values() {
        assert_eq!(ok(&format!("stat -c %U /proc/{pid}")), "bob");
        assert_eq!(fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap().trim(), "0");
    }
    ok("systemctl stop pm-bob && pm unstartup -u bob");
    assert_eq!(processes(), []);
}

fn user_service() {
    // Root's own instance of systemd stands for that of any user: it needs no seat and no session.
    let up = sh("systemctl start user@0.service");
    if up.code != 0 {
        println!("  no user instance here: {}", up.text);
        return;
    }
    let home = "/root/scenario/home";
    let pm = format!("XDG_RUNTIME_DIR=/run/user/0 pm --home {home}");
    let systemctl = "XDG_RUNTIME_DIR=/run/user/0 systemctl --user";
    sh(&format!("{pm} startup --user"))
        .succeeds()
        .says("pm.service is set up")
        .says(".config/systemd/user/pm.service");
    assert_eq!(ok(&format!("{systemctl} is-enabled pm")), "enabled");
    write("ecosystem.toml", TWO);
    ok(&format!("cd {DIR} && {pm} start ecosystem.toml"));
    let before = pids_of(&pm);
    ok(&format!("{systemctl} restart pm"));
    assert_eq!(pids_of(&pm), before);
    let main = ok(&format!("{systemctl} show pm --value -p MainPID"));
    ok(&format!("kill -9 {main}"));
    until_says(
        &format!("{systemctl} show pm --value -p NRestarts -p SubState | sort | tr '\\n' ' '"),
        "1 running",
    );
    assert_eq!(pids_of(&pm), before);
    ok(&format!("{systemctl} stop pm"));
    for pid in before.values() {
        assert!(!alive(*pid));
    }
    sh(&format!("{pm} unstartup --user")).succeeds().says("removed");
    assert_eq!(processes(), []);
    assert!(fs::metadata(PM).is_ok());
}
