//! Whole trees, with a control group for each instance and without: nothing that an app has started outlives its stop,
//! counted by the kernel and not by the daemon.

use std::path::PathBuf;

use nix::sys::signal::Signal;

use super::support::groups::{below, members, mount, of};
use super::support::home::run;
use super::support::{Home, PATIENT, SOON, fixture, free_port, load, not_here, process, secs, wait_until};

/// A home without control groups, and one with them where that can be had.
fn both() -> Vec<Home> {
    let mut homes = vec![Home::new()];
    match Home::new().with_groups() {
        Ok(home) => homes.push(home),
        Err(why) => not_here(&format!("the half with control groups: {why}")),
    }
    homes
}

fn grouped() -> Option<Home> {
    Home::new().with_groups().map_err(|why| not_here(&why)).ok()
}

/// The only group of an instance in this home.
fn group(home: &Home) -> PathBuf {
    let mut all = below(home.groups().unwrap());
    assert_eq!(all.len(), 1, "{all:?}");
    all.pop().unwrap()
}

/// Everything of the test but the daemon itself.
fn of_apps(home: &Home) -> Vec<i32> {
    let daemon = [home.keeper(), home.supervisor()];
    let mut pids = home.processes();
    pids.extend(home.groups().map(members).unwrap_or_default());
    pids.retain(|pid| !daemon.contains(pid));
    pids.sort_unstable();
    pids.dedup();
    pids
}

/// Stops everything; then nothing of it may live, and no group be left.
fn stop_leaves_nothing(home: &Home, app: &str) {
    let before = of_apps(home);
    assert!(before.len() >= 2, "{app}: a tree has several processes: {}", home.process_list());
    home.ok(&["stop", app]);
    let left: Vec<String> =
        before.into_iter().filter(|pid| process::alive(*pid)).map(process::describe).collect();
    assert_eq!(left, Vec::<String>::new(), "{app}, groups: {:?}", home.groups());
    assert_eq!(of_apps(home), Vec::<i32>::new(), "{}", home.process_list());
    if let Some(groups) = home.groups() {
        assert_eq!(below(groups), Vec::<PathBuf>::new(), "{app}");
    }
    home.ok(&["delete", app]);
}

#[test]
fn pain_22_stop_of_npm_run_start_sh_c_double_fork_and_setsid_leaves_no_process_and_a_free_port() {
    for home in both() {
        home.write(
            "package.json",
            "{\"name\":\"x\",\"version\":\"1.0.0\",\"scripts\":{\"start\":\"node app.js\"}}",
        );
        home.write(
            "app.js",
            "require('http').createServer((q, r) => r.end('ok')).listen(Number(process.env.PORT), '127.0.0.1');\n",
        );
        let port = free_port();
        home.start(&format!(
            "[[apps]]\nname = 'npm'\nscript = 'npm'\nargs = ['run', 'start']\nenv = {{ PORT = '{port}' }}\n"
        ));
        wait_until("the app answers", PATIENT, || load::get(port, "/"));
        stop_leaves_nothing(&home, "npm");
        std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();

        home.start(
            "[[apps]]\nname = 'shell'\nscript = 'sh'\nargs = ['-c', 'sleep 1000 & sleep 1001 & echo up >up; wait']\n",
        );
        home.file_with("up", "up");
        stop_leaves_nothing(&home, "shell");

        for way in ["child", "setsid", "double", "both"] {
            let _ = std::fs::remove_file(home.work_file("escaped"));
            let port = free_port();
            home.start(&format!(
                "[[apps]]\nname = 'tree'\nscript = '{}'\nargs = ['{way}']\nenv = {{ PORT = '{port}' }}\nkill_timeout = '500ms'\n",
                fixture("escapes.py")
            ));
            home.file_with("escaped", "\n");
            stop_leaves_nothing(&home, "tree");
            std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
        }
    }
}

#[test]
fn exec_probes_have_the_limits_the_rights_and_the_control_group_of_their_instance() {
    for home in both() {
        let say = "{ umask; cut -d' ' -f19 /proc/$$/stat; cat /proc/$$/oom_score_adj /proc/$$/cgroup; ionice -p $$\n\
                   grep -e 'Max open files' -e 'Max core' /proc/$$/limits; grep -e NoNewPrivs -e Cpus_allowed_list /proc/$$/status\n\
                   echo end; } >$1.new\nmv $1.new $1\n";
        // Asked again until the app has said everything: also how readily it may be killed, which it has changed.
        home.write("ask.sh", &format!("[ -e \"${{1#asks-}}\" ] || exit 1\n{say}"));
        home.write("app.sh", &format!("#!/bin/sh\necho 300 >/proc/$$/oom_score_adj\n{say}exec sleep 1000\n"));
        // A daemon raises its own limit on open files, which is none of the apps'.
        home.write(
            "ecosystem.toml",
            "[[apps]]\nname = 'bound'\nscript = 'app.sh'\nargs = ['bound']\nready = { exec = ['sh', 'ask.sh', 'asks-bound'] }\n\
             nice = 7\nionice = 'best-effort:6'\ncpu_affinity = [0]\numask = '0027'\nno_new_privs = true\n\
             limits = { nofile = '100:200', core = 0 }\n\
             [[apps]]\nname = 'plain'\nscript = 'app.sh'\nargs = ['plain']\nready = { exec = ['sh', 'ask.sh', 'asks-plain'] }\n",
        );
        let start = home.command(&["start", "ecosystem.toml"]);
        let mut limited = std::process::Command::new("sh");
        limited
            .args(["-c", "ulimit -Sn 1024 && exec \"$@\"", "sh"])
            .arg(start.get_program())
            .args(start.get_args());
        limited.current_dir(home.work());
        home.environment(&mut limited);
        let started = run(limited, PATIENT);
        assert_eq!(started.code, 0, "{started:#?}");
        for (app, has) in [("bound", "0027\n7\n300\n"), ("plain", "")] {
            let own = home.file_with(app, "end\n");
            assert_eq!(
                home.file_with(&format!("asks-{app}"), "end\n"),
                own,
                "{app}, groups: {:?}",
                home.groups()
            );
            assert!(own.starts_with(has) && own.contains("Max open files"), "{app}: {own}");
        }
        assert!(home.read("plain").contains(" 1024 "), "{}", home.read("plain"));
        let in_group = home.read("asks-bound").contains("/app-bound-0-");
        assert_eq!(in_group, home.groups().is_some(), "{}", home.read("asks-bound"));
        home.ok(&["stop", "all"]);
        if let Some(groups) = home.groups() {
            assert_eq!(below(groups), Vec::<PathBuf>::new());
        }
    }
}

#[test]
fn pain_22_the_drain_signal_goes_to_the_main_process_first_and_then_the_tree_is_ended() {
    for home in both() {
        home.write(
            "app.py",
            "import os, signal, sys, time\n\
             def note(word):\n    open('order', 'a').write(word + '\\n')\n\
             if os.fork() == 0:\n\
             \x20   os.setsid()\n\
             \x20   signal.signal(signal.SIGINT, lambda *_: note('child'))\n\
             \x20   note('up')\n\
             \x20   while True: time.sleep(1000)\n\
             def leave(*_):\n    note('main'); time.sleep(0.5); note('main has finished'); os._exit(0)\n\
             signal.signal(signal.SIGINT, leave)\n\
             while True: time.sleep(1000)\n",
        );
        home.start("[[apps]]\nname = 'job'\nscript = 'app.py'\nkill_timeout = '20s'\n");
        home.file_with("order", "up");
        stop_leaves_nothing(&home, "job");
        assert_eq!(home.read("order"), "up\nmain\nmain has finished\nchild\n", "groups: {:?}", home.groups());
    }
}

/// 200 processes: in sessions of their own or not, deaf to signals, and each that sees its parent go starts two more.
const BOMB: &str = "import os, signal, time\n\
    signal.signal(signal.SIGINT, signal.SIG_IGN)\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n\
    def stay(parent):\n\
    \x20   while os.getppid() == parent: time.sleep(0.02)\n\
    \x20   for _ in range(2):\n\
    \x20       if os.fork() == 0:\n\
    \x20           os.setsid(); time.sleep(1000); os._exit(0)\n\
    \x20   time.sleep(1000)\n\
    main = os.getpid()\n\
    for n in range(200):\n\
    \x20   if os.fork() == 0:\n\
    \x20       if n % 2: os.setsid()\n\
    \x20       stay(main); os._exit(0)\n\
    open('up', 'w').write('up')\n\
    time.sleep(1000)\n";

#[test]
fn a_fork_bomb_of_200_processes_is_gone_after_stop() {
    for home in both() {
        home.write("bomb.py", BOMB);
        home.start("[[apps]]\nname = 'bomb'\nscript = 'bomb.py'\nkill_timeout = '300ms'\n");
        home.file_with("up", "up");
        assert!(of_apps(&home).len() > 200);
        stop_leaves_nothing(&home, "bomb");
    }
}

#[test]
fn a_process_that_hides_from_everything_else_is_found_in_its_group() {
    let Some(home) = grouped() else { return };
    // A session of its own, no parent that is left, and nothing in its environment.
    home.start(
        "[[apps]]\nname = 'ghost'\nscript = 'sh'\nkill_timeout = '500ms'\n\
         args = ['-c', '(setsid env -i sh -c \"trap : INT TERM; echo up >up; while :; do sleep 1000; done\" &); exec sleep 1000']\n",
    );
    home.file_with("up", "up");
    let ghosts = wait_until("the shell that led there has left", SOON, || {
        let members = members(home.groups().unwrap());
        let main = home.pid("ghost");
        let ghosts: Vec<i32> = members.iter().copied().filter(|pid| *pid != main).collect();
        let hidden = ghosts.iter().all(|pid| !process::environ(*pid).contains_key("PM_INSTANCE"));
        if hidden && ghosts.len() >= 2 { Ok(ghosts) } else { Err(members) }
    });
    home.ok(&["stop", "ghost"]);
    for ghost in ghosts {
        assert!(!process::alive(ghost), "{}", process::describe(ghost));
    }
    assert_eq!(below(home.groups().unwrap()), Vec::<PathBuf>::new());
}

#[test]
fn every_instance_has_a_group_that_comes_and_goes_with_it_and_the_daemon_is_in_none() {
    let Some(home) = grouped() else { return };
    home.start("[[apps]]\nname = 'my app'\nscript = 'sleep'\nargs = ['1000']\ninstances = 3\n");
    let groups = below(home.groups().unwrap());
    assert_eq!(groups.len(), 3, "{groups:?}");
    for pid in home.pids("my app") {
        let name = of(pid);
        assert!(
            groups.iter().any(|group| name.ends_with(group.file_name().unwrap().to_str().unwrap())),
            "{name}"
        );
        assert!(name.contains("/app-my-app-"), "{name}");
        home.ok(&["describe", "my app"]).says(&name);
    }
    for daemon in [home.keeper(), home.supervisor()] {
        assert!(!of(daemon).contains("/app-"), "{}", of(daemon));
    }
    home.ok(&["reload", "my app"]);
    assert_eq!(below(home.groups().unwrap()).len(), 3);
    home.ok(&["scale", "my app", "1"]);
    assert_eq!(below(home.groups().unwrap()).len(), 1);
    // A crash leaves no group either.
    let before = group(&home);
    let pid = home.pid("my app");
    process::signal(pid, Signal::SIGKILL);
    home.wait_row("my app", "another process", |row| row.status == "online" && row.pid != pid);
    let after = wait_until("only the successor's group is left", SOON, || {
        let mut all = below(home.groups().unwrap());
        if all.len() == 1 { Ok(all.remove(0)) } else { Err(all) }
    });
    assert_ne!(before, after);
}

#[test]
fn the_next_supervisor_and_the_next_keeper_know_the_groups() {
    let Some(home) = grouped() else { return };
    home.start("[[apps]]\nname = 'tree'\nscript = 'sh'\nargs = ['-c', 'setsid env -i sleep 1000 & wait']\n");
    let (pid, before) = (home.pid("tree"), group(&home));
    wait_until("both processes are there", SOON, || {
        let members = members(&before);
        if members.len() == 2 { Ok(()) } else { Err(members) }
    });
    for daemon in [home.supervisor(), home.keeper()] {
        process::signal(daemon, Signal::SIGKILL);
        wait_until("another one is there", PATIENT, || {
            let gone = !process::alive(daemon);
            let run = home.pm(&["list"]);
            if gone && run.code == 0 { Ok(()) } else { Err(run.text()) }
        });
        assert_eq!((home.pid("tree"), group(&home)), (pid, before.clone()));
    }
    home.ok(&["stop", "tree"]);
    assert_eq!(below(home.groups().unwrap()), Vec::<PathBuf>::new());
}

#[test]
fn what_keeper_and_supervisor_leave_when_both_are_killed_is_ended_by_its_group() {
    let Some(home) = grouped() else { return };
    home.start(
        "[[apps]]\nname = 'ghost'\nscript = 'sh'\n\
         args = ['-c', '(setsid env -i sleep 1000 &); exec sleep 1001']\n",
    );
    let before = group(&home);
    let ghosts = wait_until("both processes are there", SOON, || {
        let members = members(&before);
        if members.len() == 2 { Ok(members) } else { Err(members) }
    });
    let daemon = [home.supervisor(), home.keeper()];
    // The keeper first stands still, or it would start the next supervisor.
    process::signal(daemon[1], Signal::SIGSTOP);
    for pid in daemon {
        process::signal(pid, Signal::SIGKILL);
    }
    wait_until("both are gone", SOON, || if home.has_daemon() { Err(home.process_list()) } else { Ok(()) });
    home.ok(&["start", "ghost"]);
    for ghost in ghosts {
        assert!(!process::alive(ghost), "{}", process::describe(ghost));
    }
    // Whose last process may not be reaped yet; it goes with the next one.
    assert!(below(home.groups().unwrap()).iter().any(|group| *group != before));
    home.ok(&["stop", "ghost"]);
    assert_eq!(below(home.groups().unwrap()), Vec::<PathBuf>::new());
}

#[test]
fn a_group_that_cannot_be_divided_is_refused_with_the_reason() {
    let home = Home::new();
    let daemon = |root: &str| {
        let mut command = home.command(&["daemon"]);
        command.env("PM_CGROUP_ROOT", root);
        run(command, PATIENT)
    };
    let wrong = daemon(&home.work_file("x"));
    assert_eq!(wrong.code, 2, "{wrong:?}");
    wrong.says("is not in a cgroup v2 file system");
    assert!(!home.work().join("x").try_exists().unwrap());
    let relative = daemon("pm");
    assert_eq!(relative.code, 2, "{relative:?}");
    relative.says("is not an absolute path");
    if let Ok(mount) = mount() {
        let all = daemon(mount.to_str().unwrap());
        assert_eq!(all.code, 2, "{all:?}");
        all.says("the root of all control groups");
    }
}

#[test]
fn a_limit_that_cannot_be_enforced_is_said_by_start_check_and_describe_and_refused_when_it_is_required() {
    let home = Home::new();
    let app = |more: &str| {
        format!(
            "[[apps]]\nname = 'job'\nscript = 'sleep'\nargs = ['1000']\nlimits = {{ memory_max = '300M', pids_max = 50{more} }}\n"
        )
    };
    home.start(&app("")).says("job: limits.memory_max, limits.pids_max are not enforced").says("pm startup");
    let described = home.ok(&["describe", "job"]).says("memory_max 300M").text();
    assert_eq!(
        described.matches("limits.memory_max, limits.pids_max are not enforced").count(),
        1,
        "{described}"
    );
    // An app without limits has nothing to do with that.
    home.ok(&["start", "sleep", "--name", "other", "--", "1000"]);
    home.ok(&["describe", "other"]).does_not_say("not enforced");
    home.ok(&["list"]).says("not enforced");
    home.ecosystem(&app(", required = true"));
    home.exits(1, &["restart", "ecosystem.toml"]).says("`limits.required` is set");
    let machine = mount().is_ok_and(|mount| {
        let has = |file: &str| std::fs::read_to_string(mount.join(file)).unwrap_or_default();
        has("cgroup.controllers").split_whitespace().any(|name| name == "memory")
    });
    let check = home.ok(&["check", "ecosystem.toml"]);
    if machine {
        check.does_not_say("limits.memory_max needs");
    } else {
        check.says("limits.memory_max needs").says("the app will not start here");
    }
    if let Some(home) = grouped().filter(|_| !machine) {
        home.start(&app("")).says("has no `memory` controller").says("has no `pids` controller");
    }
}

#[test]
fn pain_14_a_memory_bomb_in_one_app_leaves_the_daemon_and_the_other_alone_and_its_reason_is_oom_killed() {
    // With the memory controller the app's own limit; without it a group of cgroup v1 stands for the machine's memory.
    let home = Home::new();
    let v1 = PathBuf::from("/sys/fs/cgroup/memory").join(home.path().parent().unwrap().file_name().unwrap());
    if std::fs::create_dir(&v1).is_err() {
        return not_here("no memory controller may be written to, of neither version");
    }
    std::fs::write(v1.join("memory.limit_in_bytes"), "67108864").unwrap();
    // The daemon reads the kernel's log, where that is the one of its own processes.
    if std::fs::File::open("/dev/kmsg").is_err() {
        std::fs::remove_dir(&v1).unwrap();
        return not_here("the kernel's log cannot be read");
    }
    home.write("bomb.py", "import os, time\nwhile not os.path.exists('go'): time.sleep(0.02)\ndata = []\nfor _ in range(4000): data.append(bytearray(b'x' * (1 << 20)))\ntime.sleep(1000)\n");
    let group = v1.join("cgroup.procs");
    home.start(&format!(
        "[[apps]]\nname = 'b'\nscript = 'sleep'\nargs = ['1000']\n\
         [[apps]]\nname = 'a'\nscript = 'sh'\nargs = ['-c', 'echo $$ >{}; exec python3 bomb.py']\nmin_uptime = '1ms'\n\
         restart_delay = '1d'\n",
        group.display()
    ));
    let (daemon, b) = (home.keeper(), home.pid("b"));
    home.write("go", "");
    home.wait_status("a", "waiting restart");
    home.ok(&["describe", "a"]).says("oom-killed");
    home.ok(&["events", "a"]).says("oom-killed");
    assert_eq!((home.keeper(), home.pid("b")), (daemon, b));
    assert_eq!(home.row("b").status, "online");
    // A SIGKILL of somebody else is a SIGKILL.
    process::signal(b, Signal::SIGKILL);
    home.wait_row("b", "another process", |row| row.status == "online" && row.pid != b);
    home.ok(&["describe", "b"]).says("SIGKILL").does_not_say("oom-killed");
    drop(home);
    wait_until("the group is empty", secs(10), || std::fs::remove_dir(&v1));
}
