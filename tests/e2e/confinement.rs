//! Who an app's processes are and what they may use. Most of it needs root, as the daemon then does.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown, symlink};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::unistd::{User, geteuid};

use super::support::home::run;
use super::support::{Home, PATIENT, SOON, free_port, not_here, process, wait_until};

/// A home whose working directory others may read; `None` without root.
fn of_root() -> Option<Home> {
    if !geteuid().is_root() {
        not_here("only root starts processes as somebody else");
        return None;
    }
    let home = Home::new();
    home.open_to_others();
    Some(home)
}

/// A user who is not root, with more groups than one where there is such a user.
fn somebody() -> String {
    let users = fs::read_to_string("/etc/passwd").unwrap();
    let names = || users.lines().filter_map(|line| line.split(':').next()).filter(|name| *name != "root");
    let several = names().find(|name| ids(&["-G", name]).contains(' '));
    several.or_else(|| names().find(|name| *name == "nobody")).expect("a user").to_owned()
}

fn ids(args: &[&str]) -> String {
    String::from_utf8(Command::new("id").args(args).output().unwrap().stdout).unwrap().trim().to_owned()
}

/// A line of /proc/PID/status, as numbers in ascending order where it has several.
fn status(pid: i32, key: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("{key}:"))).unwrap_or_default();
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn sorted(numbers: &str) -> Vec<u32> {
    let mut numbers: Vec<u32> = numbers.split_whitespace().map(|number| number.parse().unwrap()).collect();
    numbers.sort_unstable();
    numbers
}

/// Real, effective, saved and for the file system.
fn four(id: impl std::fmt::Display) -> String {
    format!("{id} {id} {id} {id}")
}

#[test]
fn pain_27_user_gives_the_groups_of_id_user_and_that_users_home() {
    let Some(home) = of_root() else { return };
    let name = somebody();
    let user = User::from_name(&name).unwrap().unwrap();
    for (app, key) in [("by-name", format!("user = '{name}'")), ("by-number", format!("uid = {}", user.uid))]
    {
        home.start(&format!(
            "[[apps]]\nname = '{app}'\nscript = 'sleep'\nargs = ['1000']\n{key}\nenv = {{ LOGNAME = 'x' }}\n"
        ));
        let pid = home.pid(app);
        assert_eq!(status(pid, "Uid"), four(user.uid));
        assert_eq!(status(pid, "Gid"), four(user.gid));
        assert_eq!(sorted(&status(pid, "Groups")), sorted(&ids(&["-G", &name])), "the groups of `id {name}`");
        let env = process::environ(pid);
        assert_eq!((env["HOME"].as_str(), env["USER"].as_str()), (user.dir.to_str().unwrap(), name.as_str()));
        assert_eq!(env["LOGNAME"], "x", "what the config sets stays");
    }
    // From the command line, as with PM2; the group alone is another group's.
    home.ok(&["start", "sleep", "--name", "cli", "--uid", &name, "--gid", "root", "--", "1000"]);
    assert_eq!(status(home.pid("cli"), "Uid"), four(user.uid));
    assert_eq!(status(home.pid("cli"), "Gid"), "0 0 0 0");
    home.ok(&["describe", "cli"]).says(&name);
    home.start("[[apps]]\nname = 'group'\nscript = 'sleep'\nargs = ['1000']\ngroup = 'daemon'\n");
    assert_eq!(status(home.pid("group"), "Uid"), "0 0 0 0");
    assert_eq!(status(home.pid("group"), "Gid"), four(ids(&["-g", "daemon"])));
}

#[test]
fn pain_27_log_files_belong_to_the_apps_user_and_no_link_of_that_user_is_followed() {
    let Some(home) = of_root() else { return };
    let name = somebody();
    let user = User::from_name(&name).unwrap().unwrap();
    home.write("app.sh", "while :; do echo line; sleep 0.05; done\n");
    let app = |more: &str| format!("[[apps]]\nname = 'job'\nscript = 'app.sh'\nuser = '{name}'\n{more}\n");
    // One that root has made before the app had a user becomes its user's too.
    home.start(&app("").replace(&format!("user = '{name}'\n"), ""));
    home.log_with("job-out.log", "line");
    home.start(&app(""));
    let owner = |path: &std::path::Path| fs::metadata(path).map(|meta| (meta.uid(), meta.mode() & 0o777));
    for file in ["job-out.log", "job-error.log"] {
        let path = home.path().join("logs").join(file);
        wait_until("the log file is the user's", SOON, || match owner(&path) {
            Ok((uid, 0o640)) if uid == user.uid.as_raw() => Ok(()),
            other => Err(format!("{other:?}")),
        });
    }
    home.ok(&["delete", "job"]);
    // The user's own directory: a link in it, or the file itself as a link, could lead to anything of root's.
    let theirs = home.work().join("theirs");
    fs::create_dir_all(theirs.join("logs")).unwrap();
    for dir in [&theirs, &theirs.join("logs")] {
        chown(dir, Some(user.uid.as_raw()), Some(user.gid.as_raw())).unwrap();
    }
    let victim = home.work().join("victim");
    fs::create_dir(&victim).unwrap();
    fs::write(victim.join("secret"), "root's\n").unwrap();
    symlink(victim.join("secret"), theirs.join("logs/link.log")).unwrap();
    symlink(&victim, theirs.join("dir")).unwrap();
    lchown(theirs.join("dir"), Some(user.uid.as_raw()), None).unwrap();
    fs::hard_link(victim.join("secret"), theirs.join("logs/hard.log")).unwrap();
    for path in ["logs/link.log", "dir/new.log", "logs/hard.log"] {
        home.start(&app(&format!("out_file = 'theirs/{path}'")));
        wait_until("the daemon says that the file takes nothing", SOON, || {
            let log = fs::read_to_string(home.path().join("pm.log")).unwrap();
            if log.contains(path) { Ok(()) } else { Err(log) }
        });
        home.ok(&["delete", "job"]);
    }
    assert_eq!(fs::read_to_string(victim.join("secret")).unwrap(), "root's\n");
    assert_eq!(owner(&victim.join("secret")).unwrap().0, 0);
    assert!(!victim.join("new.log").try_exists().unwrap());
    // Without links it is a place like any other.
    home.start(&app("out_file = 'theirs/logs/good.log'"));
    home.file_with("theirs/logs/good.log", "line");
    assert_eq!(owner(&theirs.join("logs/good.log")).unwrap().0, user.uid.as_raw());
}

/// A directory below the working directory, and whose it is.
fn directory(home: &Home, name: &str, owner: &User) -> std::path::PathBuf {
    let dir = home.work().join(name);
    fs::create_dir_all(&dir).unwrap();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
    chown(&dir, Some(owner.uid.as_raw()), Some(owner.gid.as_raw())).unwrap();
    dir
}

fn daemon_says(home: &Home, wanted: &str) {
    wait_until(&format!("the daemon says {wanted:?}"), SOON, || {
        let log = fs::read_to_string(home.path().join("pm.log")).unwrap();
        if log.contains(wanted) { Ok(()) } else { Err(log) }
    });
}

#[test]
fn pain_27_a_file_of_roots_that_a_user_moves_to_the_name_of_a_log_stays_roots_and_gets_no_line() {
    let Some(home) = of_root() else { return };
    let nobody = User::from_name("nobody").unwrap().unwrap();
    let logs = directory(&home, "logs", &nobody);
    home.write("app.sh", "while :; do echo line; sleep 0.05; done\n");
    home.start("[[apps]]\nname = 'job'\nscript = 'app.sh'\nuser = 'nobody'\nout_file = 'logs/out.log'\n");
    home.file_with("logs/out.log", "line");
    let secret = home.write("logs/.viminfo", "root's\n");
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    let log = logs.join("out.log");
    fs::rename(&secret, &log).unwrap();
    let advice = format!("chown {}:{}", nobody.uid, nobody.gid);
    daemon_says(&home, &advice);
    assert_eq!(fs::metadata(&log).unwrap().uid(), 0);
    assert_eq!(fs::read_to_string(&log).unwrap(), "root's\n");
    // As the daemon says.
    chown(&log, Some(nobody.uid.as_raw()), Some(nobody.gid.as_raw())).unwrap();
    home.file_with("logs/out.log", "\nline\n");
}

#[test]
fn pain_27_unix_sockets_are_made_and_removed_only_where_the_apps_user_may() {
    let Some(home) = of_root() else { return };
    let (root, nobody) =
        (User::from_name("root").unwrap().unwrap(), User::from_name("nobody").unwrap().unwrap());
    let (theirs, roots) = (directory(&home, "theirs", &nobody), directory(&home, "roots", &root));
    let victims = ["closed", "left"];
    for victim in victims {
        fs::write(roots.join(victim), "root's\n").unwrap();
        directory(&home, &format!("theirs/{victim}"), &nobody);
    }
    // What a worker asks for, the daemon binds. While it listens, the way there becomes another one.
    home.write(
        "app.js",
        "const net = require('net'), fs = require('fs');\n\
         const listen = (path, then) => {\n\
           const server = net.createServer((c) => c.end('served'));\n\
           server.on('error', (error) => console.log('refused', path, error.code));\n\
           server.listen({ path, readableAll: true, writableAll: true }, () => then(server));\n\
         };\n\
         listen('theirs/good.sock', (server) => console.log('good', server.address()));\n\
         listen('roots/bad.sock', () => console.log('bad'));\n\
         for (const name of ['closed', 'left']) listen(`theirs/${name}/${name}`, (server) => {\n\
           fs.renameSync(`theirs/${name}`, `theirs/old-${name}`);\n\
           fs.symlinkSync('../roots', `theirs/${name}`);\n\
           console.log('led elsewhere', name);\n\
           if (name === 'closed') server.close();\n\
         });\n\
         setInterval(() => {}, 1000);\n",
    );
    home.start(
        "[[apps]]\nname = 'web'\nscript = 'app.js'\nexec_mode = 'cluster'\ninstances = 1\nuser = 'nobody'\n\
         [[apps]]\nname = 'heir'\nscript = 'sleep'\nargs = ['1000']\nuser = 'nobody'\n\
         listen = ['unix:theirs/heir.sock', 'unix:roots/heir.sock']\n",
    );
    let good = theirs.join("good.sock");
    for line in ["refused roots/bad.sock EACCES", "led elsewhere closed", "led elsewhere left"] {
        home.log_with("web-out-0.log", line);
    }
    home.log_with("web-out-0.log", "good theirs/good.sock");
    let meta = fs::metadata(&good).unwrap();
    assert_eq!(
        (meta.uid(), meta.gid(), meta.mode() & 0o666),
        (nobody.uid.as_raw(), nobody.gid.as_raw(), 0o666)
    );
    let mut answer = String::new();
    UnixStream::connect(&good).unwrap().read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "served");
    // Configured ones too; the operator may choose a place that is root's alone.
    for (dir, owner) in [(&theirs, &nobody), (&roots, &root)] {
        assert_eq!(fs::metadata(dir.join("heir.sock")).unwrap().uid(), owner.uid.as_raw());
    }
    let removes = |victim: &str| {
        daemon_says(&home, &format!("theirs/{victim}/{victim}"));
    };
    removes("closed");
    // The next supervisor closes what it has not bound.
    process::end(home.supervisor());
    home.ok(&["delete", "all"]);
    removes("left");
    for victim in victims {
        assert_eq!(fs::read_to_string(roots.join(victim)).unwrap(), "root's\n");
    }
    for gone in [good, theirs.join("heir.sock"), roots.join("heir.sock"), roots.join("bad.sock")] {
        assert!(!gone.try_exists().unwrap(), "{}", gone.display());
    }
}

#[test]
fn pain_27_the_number_that_is_nobodys_starts_nothing_as_root() {
    let Some(home) = of_root() else { return };
    for [uid, gid] in [["4294967295", "7"], ["7", "4294967295"], ["+4294967295", "7"]] {
        let run = home.pm(&["start", "sleep", "--name", "job", "--uid", uid, "--gid", gid, "--", "1000"]);
        assert!(run.code != 0, "{run:#?}");
        run.says("4294967295");
        assert!(home.rows().iter().all(|row| row.status != "online"), "{:?}", home.rows());
    }
}

#[test]
fn pain_27_eacces_on_the_socket_prints_who_owns_the_daemon_and_the_exact_fix() {
    let Some(home) = of_root() else { return };
    home.ok(&["start", "sleep", "--name", "job", "--", "1000"]);
    let nobody = User::from_name("nobody").unwrap().unwrap();
    let mut command = home.command_of(&home.program_for_others(), &["list"]);
    command.uid(nobody.uid.as_raw()).gid(nobody.gid.as_raw());
    let run = run(command, PATIENT);
    assert_eq!(run.code, 4, "{run:?}");
    run.says("root").says(&format!("sudo -u root pm --home {} list", home.path().display()));
}

#[test]
fn without_root_another_user_is_refused_and_the_error_says_what_would_work() {
    let Some(home) = of_root() else { return };
    let nobody = User::from_name("nobody").unwrap().unwrap();
    let (uid, gid) = (nobody.uid.as_raw(), nobody.gid.as_raw());
    let program = home.program_for_others();
    fs::create_dir(home.path()).unwrap();
    chown(home.path(), Some(uid), Some(gid)).unwrap();
    let pm = |args: &[&str]| {
        let mut command = home.command_of(&program, args);
        command.uid(uid).gid(gid);
        run(command, PATIENT)
    };
    home.ecosystem("[[apps]]\nname = 'job'\nscript = 'sleep'\nargs = ['1000']\nuser = 'daemon'\n");
    let refused = pm(&["start", "ecosystem.toml"]);
    assert_eq!(refused.code, 1, "{refused:?}");
    refused.says("cannot run as `daemon`: the daemon runs as `nobody`").says("sudo pm startup");
    // Who it is already, it may be.
    // As nice as it gets, should this test itself be nice.
    home.ecosystem("[[apps]]\nname = 'own'\nscript = 'sleep'\nargs = ['1000']\nuser = 'nobody'\nnice = 19\n");
    assert_eq!(pm(&["start", "ecosystem.toml"]).code, 0);
    home.ecosystem("[[apps]]\nname = 'first'\nscript = 'sleep'\nargs = ['1000']\nnice = -5\n");
    let refused = pm(&["start", "ecosystem.toml"]);
    assert_eq!(refused.code, 1, "{refused:?}");
    refused.says("only root takes a `nice` below the daemon's");
    assert_eq!(pm(&["kill"]).code, 0);
}

#[test]
fn a_user_that_does_not_exist_is_named_and_nothing_is_taken_down_for_it() {
    let home = Home::new();
    let app = |user: &str| format!("[[apps]]\nname = 'job'\nscript = 'sleep'\nargs = ['1000']\n{user}\n");
    home.start(&app(""));
    let pid = home.pid("job");
    home.ecosystem(&app("user = 'no-such-user'"));
    home.ok(&["check", "ecosystem.toml"]).says("there is no user `no-such-user` on this machine");
    home.exits(1, &["reload", "ecosystem.toml"]).says("there is no user `no-such-user`");
    assert_eq!(home.pid("job"), pid);
}

#[test]
fn another_user_reaches_the_agent_and_the_notify_socket() {
    let Some(home) = of_root() else { return };
    home.write(
        "app.js",
        "require('http').createServer((q, r) => r.end('ok')).listen(Number(process.env.PORT), '127.0.0.1');\n",
    );
    home.write(
        "notify.py",
        "import os, socket, time\n\
         socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'READY=1\\n', os.environ['NOTIFY_SOCKET'])\n\
         time.sleep(1000)\n",
    );
    home.start(&format!(
        "[[apps]]\nname = 'web'\nscript = 'app.js'\nuser = 'nobody'\ninstances = 2\nenv = {{ PORT = '{}' }}\n\
         [[apps]]\nname = 'ready'\nscript = 'notify.py'\ninterpreter = '/usr/bin/python3'\nuser = 'nobody'\nwait_ready = true\nlisten_timeout = '20s'\n",
        free_port()
    ));
    wait_until("the agent has reported", PATIENT, || {
        let run = home.ok(&["describe", "web"]);
        if run.out.contains("Inside Node") { Ok(()) } else { Err(run.out) }
    });
    home.ok(&["reload", "all"]);
    let socket = process::environ(home.pid("ready"))["NOTIFY_SOCKET"].clone();
    let nobody = User::from_name("nobody").unwrap().unwrap();
    assert_eq!(fs::symlink_metadata(&socket).unwrap().uid(), nobody.uid.as_raw());
    home.ok(&["kill"]);
    assert!(!std::path::Path::new(&socket).try_exists().unwrap());
}

#[test]
fn a_normal_user_with_net_bind_service_binds_a_port_below_1024_and_without_it_does_not() {
    let Some(home) = of_root() else { return };
    let start = fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start").unwrap_or_default();
    let Some(port) = (200..start.trim().parse().unwrap_or(0))
        .find(|port| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok())
    else {
        return not_here("every port is for everybody");
    };
    home.write(
        "bind.py",
        "import socket, sys, time\nl = socket.socket()\n\
         l.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n\
         l.bind(('127.0.0.1', int(sys.argv[1]))); l.listen(); time.sleep(1000)\n",
    );
    let app = |more: &str| {
        format!(
            "[[apps]]\nname = 'web'\nscript = 'bind.py'\nargs = ['{port}']\ninterpreter = '/usr/bin/python3'\nuser = 'nobody'\nautorestart = false\n{more}\n"
        )
    };
    home.start(&app("ambient_capabilities = ['CAP_NET_BIND_SERVICE']\nno_new_privs = true"));
    wait_until("it listens", PATIENT, || std::net::TcpStream::connect(("127.0.0.1", port)));
    let pid = home.pid("web");
    for set in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
        assert_eq!(
            u64::from_str_radix(&status(pid, set), 16).unwrap(),
            1 << 10,
            "{set}: this one and no other"
        );
    }
    assert_eq!(status(pid, "NoNewPrivs"), "1");
    home.ok(&["delete", "web"]);
    // The control.
    home.ecosystem(&app(""));
    home.pm(&["start", "ecosystem.toml"]);
    home.log_with("web-error.log", "Permission denied");
    home.ok(&["delete", "web"]);
}

#[test]
fn nice_ionice_cpu_affinity_umask_and_limits_are_those_of_the_config() {
    let home = Home::new();
    home.write("app.sh", "umask >mask.new\nmv mask.new mask\nexec sleep 1000\n");
    home.start(
        "[[apps]]\nname = 'job'\nscript = 'app.sh'\nnice = 7\nionice = 'best-effort:6'\ncpu_affinity = [0]\numask = '0027'\n\
         no_new_privs = true\nlimits = { nofile = '100:200', core = 0, stack = '1M:unlimited', cpu = '1h', nproc = 5000 }\n",
    );
    assert_eq!(home.file_with("mask", "\n"), "0027\n");
    let pid = home.pid("job");
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let nice = stat.rsplit(") ").next().unwrap().split(' ').nth(16).unwrap().to_owned();
    assert_eq!(nice, "7");
    assert_eq!(status(pid, "Cpus_allowed_list"), "0");
    assert_eq!(status(pid, "NoNewPrivs"), "1");
    let ionice = Command::new("ionice").args(["-p", &pid.to_string()]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&ionice.stdout).trim(), "best-effort: prio 6");
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let limit = |name: &str| {
        let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().take(2).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(limit("Max open files"), ["100", "200"]);
    assert_eq!(limit("Max core file size"), ["0", "0"]);
    assert_eq!(limit("Max stack size"), ["1048576", "unlimited"]);
    assert_eq!(limit("Max cpu time"), ["3600", "3600"]);
    assert_eq!(limit("Max processes"), ["5000", "5000"]);
    home.ok(&["describe", "job"]).says("nofile 100:200").says("best-effort:6").says("0027");
    home.ecosystem("[[apps]]\nname = 'job2'\nscript = 'sleep'\nargs = ['1000']\ncpu_affinity = '5000'\n");
    home.exits(1, &["start", "ecosystem.toml"]).says("no CPU of `cpu_affinity` exists here");
}

#[test]
fn probes_and_hooks_run_as_the_apps_user_too() {
    let Some(home) = of_root() else { return };
    for name in ["hook.sh", "probe.sh"] {
        let path = home.write(name, &format!("#!/bin/sh\nid -u >{}/{name}.id\n", home.work_file("out")));
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    fs::create_dir(home.work().join("out")).unwrap();
    let nobody = User::from_name("nobody").unwrap().unwrap();
    chown(home.work().join("out"), Some(nobody.uid.as_raw()), None).unwrap();
    home.start(
        "[[apps]]\nname = 'job'\nscript = 'sleep'\nargs = ['1000']\nuser = 'nobody'\npre_start = ['./hook.sh']\n\
         ready = { exec = ['./probe.sh'] }\n",
    );
    for name in ["hook.sh", "probe.sh"] {
        assert_eq!(home.file_with(&format!("out/{name}.id"), "\n").trim(), nobody.uid.to_string(), "{name}");
    }
}
