//! `pm run`: apps in the foreground, and as the first process of a container.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;

use super::support::container::{Container, possible};
use super::support::home::Running;
use super::support::{Home, PATIENT, fixture, free_port, millis, process, secs, stays, wait_until};

/// An app that is a line of shell.
fn shell(name: &str, line: &str, keys: &str) -> String {
    format!("[[apps]]\nname = '{name}'\nscript = 'sh'\nargs = ['-c', '''{line}''']\n{keys}\n")
}

#[test]
fn pain_38_exits_with_the_apps_code_and_prints_its_lines_and_leaves_no_file() {
    if !possible() {
        return;
    }
    let home = Home::new();
    home.ecosystem(&shell("job", "echo to out; echo to err >&2; exit 7", "autorestart = false"));
    let (code, out, err) = Container::run(&home, &["ecosystem.toml"]).end(PATIENT);
    assert_eq!(code, 7, "{out}{err}");
    assert_eq!(out, "job | to out\n");
    assert!(err.contains("job | to err\n") && err.contains("pm | every app has ended"), "{err}");
    let left: Vec<_> =
        std::fs::read_dir(home.work()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["ecosystem.toml"]);
}

#[test]
fn pain_38_reaps_zombies_also_of_orphans_and_of_commands_that_were_run_in_the_container() {
    if !possible() {
        return;
    }
    let home = Home::new();
    // Each round leaves an orphan that ends when its parent is long gone.
    let line = "while :; do (sh -c \"sleep 0.2\" &) ; sleep 0.05; done";
    home.ecosystem(&shell("littering", line, ""));
    let container = Container::run(&home, &[]);
    container.online(&home, 1);
    for _ in 0..10 {
        container.exec(&home, &["sh", "-c", "(sleep 0.1 &)"]);
    }
    let seen = || {
        let processes = process::tree(container.init());
        (processes.len(), container.zombies())
    };
    let reaped = || match seen() {
        (_, zombies) if zombies.is_empty() => Ok(()),
        (_, zombies) => Err(zombies),
    };
    for _ in 0..20 {
        wait_until("no zombies", secs(5), reaped);
    }
    stays("a handful of processes", secs(2), || match seen() {
        (0..40, _) => Ok(()),
        seen => Err(seen),
    });
    container.signal(Signal::SIGTERM);
    assert_eq!(container.end(PATIENT).0, 0);
}

/// Answers after half a second, and ends when everybody has an answer.
const SLOW: &str = "const server = require('http').createServer((request, response) => {
  setTimeout(() => response.end('x'.repeat(5000) + 'end\\n'), 500);
});
server.listen(Number(process.env.PORT), '127.0.0.1');
process.on('SIGINT', () => server.close(() => { console.log('closed'); process.exit(0); }));
";

#[test]
fn pain_38_sigterm_drains_all_within_the_grace_period_and_cuts_no_request() {
    if !possible() {
        return;
    }
    let home = Home::alone();
    let ports = [free_port(), free_port()];
    home.write("slow.js", SLOW);
    let app = |name: &str, port: u16, keys: &str| {
        format!("[[apps]]\nname = '{name}'\nscript = 'slow.js'\n{keys}\n[apps.env]\nPORT = '{port}'\n")
    };
    home.ecosystem(
        &[app("cluster", ports[0], "instances = 2"), app("fork", ports[1], "exec_mode = 'fork'")].concat(),
    );
    let container = Container::run(&home, &["ecosystem.toml"]);
    container.online(&home, 3);
    wait_until("both listen", PATIENT, || ports.iter().try_for_each(|port| request(*port)));
    // A thousand requests, all in the hands of the apps and none of them answered, when the signal comes.
    let clients: Vec<TcpStream> = (0..1000).map(|number| send(ports[number % 2]).unwrap()).collect();
    wait_until("all of them are accepted", PATIENT, || {
        let waiting = queued(&ports);
        if waiting == 0 { Ok(()) } else { Err(waiting) }
    });
    container.signal(Signal::SIGTERM);
    for mut stream in clients {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("end\n"), "{answer:?}");
    }
    let (code, out, err) = container.end(PATIENT);
    assert_eq!(code, 0, "{out}{err}");
    for app in ["cluster:0", "cluster:1", "fork"] {
        assert!(out.contains(&format!("{app} | closed\n")), "{app} ended in its own time: {out}");
    }
    assert!(request(ports[0]).is_err(), "nobody listens any more");
}

/// Connections that a listening socket of this machine holds and nobody has accepted (proc_net_tcp(5): its receive
/// queue).
fn queued(ports: &[u16]) -> u32 {
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let rows = table.lines().skip(1).filter_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let port = u16::from_str_radix(words[1].split(':').nth(1)?, 16).ok()?;
        (words[3] == "0A" && ports.contains(&port))
            .then(|| u32::from_str_radix(words[4].split(':').nth(1)?, 16).ok())?
    });
    rows.sum()
}

fn send(port: u16) -> Result<TcpStream, String> {
    let connect = || -> std::io::Result<TcpStream> {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(secs(30)))?;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
        Ok(stream)
    };
    connect().map_err(|error| error.to_string())
}

fn request(port: u16) -> Result<(), String> {
    let mut answer = String::new();
    send(port)?.read_to_string(&mut answer).map_err(|error| error.to_string())?;
    if answer.starts_with("HTTP/1.1 200") && answer.ends_with("end\n") { Ok(()) } else { Err(answer) }
}

#[test]
fn pain_38_does_not_exit_while_an_app_is_in_backoff_and_exits_with_its_code_when_it_is_errored() {
    if !possible() {
        return;
    }
    let home = Home::new();
    // Another one has long finished; the first one that failed decides.
    let keys = "max_restarts = 3\nexp_backoff_restart_delay = '6s'";
    home.ecosystem(
        &[shell("done", "exit 0", "autorestart = false"), shell("bad", "date >>starts; exit 3", keys)]
            .concat(),
    );
    let mut container = Container::run(&home, &["ecosystem.toml"]);
    container.says("bad:0 starts again in");
    assert!(!container.is_over());
    let rows = container.jlist(&home);
    assert!(rows.iter().any(|row| row["pm2_env"]["status"] == "waiting restart"), "{rows:#?}");
    let (code, out, err) = container.end(PATIENT);
    assert_eq!(code, 3, "{out}{err}");
    assert_eq!(home.read("starts").lines().count(), 3, "{err}");
    assert!(err.contains("bad:0 is given up: exit code 3"), "{err}");
}

#[test]
fn an_exit_code_is_that_of_the_first_app_that_failed() {
    if !possible() {
        return;
    }
    let home = Home::new();
    for (line, keys, code) in [
        ("kill -TERM $$", "autorestart = false", 143),
        ("exit 0", "autorestart = false", 0),
        ("exit 0", "max_restarts = 2", 1),
        ("exit 5", "stop_exit_codes = [5]", 5),
    ] {
        home.ecosystem(&shell("app", line, keys));
        let (seen, out, err) = Container::run(&home, &["ecosystem.toml"]).end(PATIENT);
        assert_eq!(seen, code, "{line}: {out}{err}");
    }
}

#[test]
fn commands_work_beside_it_and_what_somebody_stops_does_not_end_it() {
    if !possible() {
        return;
    }
    let home = Home::new();
    let port = free_port();
    let text = format!(
        "[[apps]]\nname = 'web'\nscript = '{}'\ninstances = 2\n[apps.env]\nPORT = '{port}'\n",
        fixture("web-textbook.js")
    );
    home.ecosystem(&text);
    let mut container = Container::run(&home, &["ecosystem.toml"]);
    let before = container.online(&home, 2);
    let reload = container.pm(&home, &["reload", "web"]);
    assert_eq!(reload.code, 0, "{reload:#?}");
    let after = container.online(&home, 2);
    assert!(before.iter().all(|pid| !after.contains(pid)), "{before:?} {after:?}");
    // The same file says nothing new, although output goes nowhere else than here.
    let check = container.pm(&home, &["apply", &home.work_file("ecosystem.toml"), "--check"]);
    assert_eq!(check.code, 0, "{check:#?}");
    // SIGHUP reads the file again.
    home.ecosystem(&text.replace("instances = 2", "instances = 3"));
    container.signal(Signal::SIGHUP);
    container.online(&home, 3);
    container.says("pm | reload: ");
    assert_eq!(container.pm(&home, &["stop", "all"]).code, 0);
    stays("it goes on", millis(700), || if container.is_over() { Err(()) } else { Ok(()) });
    assert_eq!(container.pm(&home, &["start", "web"]).code, 0);
    container.online(&home, 3);
    container.pm(&home, &["logs", "--nostream"]).says("docker logs");
    // With its first process everything in the container ends, the command too.
    let kill = container.pm(&home, &["kill"]);
    assert!([0, -9].contains(&kill.code), "{kill:#?}");
    let (code, out, err) = container.end(PATIENT);
    assert_eq!(code, 0, "{out}{err}");
}

#[test]
fn a_supervisor_that_is_killed_is_replaced_and_the_container_goes_on() {
    if !possible() {
        return;
    }
    let home = Home::new();
    let line = "echo begun; i=0; while :; do i=$((i+1)); echo line $i; sleep 0.05; done";
    home.ecosystem(&shell("app", line, ""));
    let container = Container::run(&home, &["ecosystem.toml"]);
    let pids = container.online(&home, 1);
    let supervisor = || {
        let is_one = |pid: &i32| process::cmdline(*pid).iter().any(|word| word == "supervisor");
        process::children(container.init()).into_iter().find(is_one)
    };
    for _ in 0..3 {
        let old = wait_until("a supervisor", PATIENT, || supervisor().ok_or(()));
        process::signal(old, Signal::SIGKILL);
        wait_until("another supervisor", PATIENT, || supervisor().filter(|pid| *pid != old).ok_or(()));
        assert_eq!(container.online(&home, 1), pids, "{}", container.err());
    }
    container.signal(Signal::SIGQUIT);
    let (code, out, err) = container.end(PATIENT);
    assert_eq!(code, 0, "{err}");
    assert_eq!(out.matches("app | begun\n").count(), 1, "{out}");
}

/// Homes in containers have the same name. A daemon that looked for what an earlier one of its home had left ended the
/// apps of all other containers on the machine.
#[test]
fn a_daemon_leaves_the_apps_of_containers_alone_whose_home_has_the_name_of_its_own() {
    if !possible() {
        return;
    }
    let home = Home::new();
    home.ecosystem(&shell("app", "echo up; sleep 1000", ""));
    let container = Container::run(&home, &["ecosystem.toml", "--home", "/dev/shm/pm-of-a-test"]);
    let inside = ["--home", "/dev/shm/pm-of-a-test", "jlist"];
    let pids = |run: super::support::Run| -> Vec<serde_json::Value> {
        run.json().as_array().unwrap().iter().map(|row| row["pid"].clone()).collect()
    };
    container.says("app | up");
    let before = pids(container.pm(&home, &inside));
    for runner in 0..2 {
        let text = shell("other", "echo other", "autorestart = false");
        let file = home.write(&format!("other-{runner}.toml"), &text);
        let run = home.exits(0, &["run", &file, "--home", "/dev/shm/pm-of-a-test"]);
        assert_eq!(run.out, "other | other\n", "{run:#?}");
        run.does_not_say("left by an earlier daemon");
    }
    std::fs::remove_dir_all("/dev/shm/pm-of-a-test").unwrap();
    assert_eq!(pids(container.pm(&home, &inside)), before);
    container.signal(Signal::SIGTERM);
    assert_eq!(container.end(PATIENT).0, 0);
}

#[test]
fn a_second_signal_ends_what_does_not_listen_and_the_code_says_so() {
    if !possible() {
        return;
    }
    let home = Home::new();
    let keys = "kill_timeout = '600s'";
    home.ecosystem(&shell("deaf", "trap \"\" INT TERM; echo deaf; while :; do sleep 0.1; done", keys));
    let container = Container::run(&home, &["ecosystem.toml"]);
    container.online(&home, 1);
    container.says("deaf | deaf");
    container.signal(Signal::SIGTERM);
    container.says("asked to end");
    // The echo of the first is no second one.
    container.signal(Signal::SIGTERM);
    wait_until("half a second has passed", PATIENT, || {
        // It may be over by now.
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(container.init()), Signal::SIGINT);
        let text = container.err();
        if text.contains("once more") { Ok(()) } else { Err(text) }
    });
    let (code, out, err) = container.end(PATIENT);
    assert_eq!(code, 137, "{out}{err}");
}

#[test]
fn kill_timeout_is_the_grace_period_and_an_app_that_needed_force_makes_the_code_137() {
    if !possible() {
        return;
    }
    let home = Home::new();
    home.ecosystem(&shell(
        "deaf",
        "trap \"\" INT; echo deaf; while :; do sleep 0.1; done",
        "kill_timeout = '300ms'",
    ));
    let container = Container::run(&home, &["ecosystem.toml"]);
    container.says("deaf | deaf");
    container.online(&home, 1);
    container.signal(Signal::SIGTERM);
    let (code, out, err) = container.end(PATIENT);
    assert_eq!(code, 137, "{out}{err}");
    assert!(err.contains("deaf:0 did not end, killed after"), "{err}");
}

#[test]
fn pain_38_needs_no_file_no_home_no_user_and_nothing_that_can_be_written_to_but_memory() {
    if !possible() {
        return;
    }
    let home = Home::new();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(home.work().parent().unwrap(), mode).unwrap();
    home.ecosystem(&shell(
        "app",
        "echo $(id -u) \"[$HOME]\"; touch /tmp/x || echo read-only; sleep 1000",
        "kill_timeout = '2s'",
    ));
    let read_only = "mount -o remount,ro,bind / && mount -t tmpfs -o ro tmpfs /dev/mqueue 2>/dev/null; test ! -e /dev/log &&";
    let program = std::fs::canonicalize(env!("CARGO_BIN_EXE_pm")).unwrap();
    let line = format!(
        "exec setpriv --reuid 54321 --regid 54321 --clear-groups --inh-caps=-all --bounding-set=-all \
         env -i PATH=/usr/bin:/bin {} run ecosystem.toml",
        program.display()
    );
    let container = Container::with(&home, read_only, &line);
    let text = container.says("app | read-only");
    assert!(text.contains("app | 54321 []\n"), "{text}");
    // `docker exec` is the same user, who has no name here either.
    let as_user = |args: &[&str]| {
        let who = ["setpriv", "--reuid", "54321", "--regid", "54321", "--clear-groups"];
        container.exec(&home, &[&who, [program.to_str().unwrap()].as_slice(), args].concat())
    };
    as_user(&["list"]).says("online");
    assert_eq!(as_user(&["restart", "app"]).code, 0);
    assert!(container.exists("/dev/shm/pm-54321/pm.sock"));
    container.signal(Signal::SIGTERM);
    let (code, out, err) = container.end(PATIENT);
    assert_eq!(code, 0, "{out}{err}");
}

#[test]
fn json_is_one_object_for_each_line_with_exact_text() {
    let home = Home::new();
    home.ecosystem(&shell(
        "app",
        "printf \"a \\\"quoted\\\" line\\n\\ttab\\n\"; echo oops >&2; exit 2",
        "autorestart = false",
    ));
    let mut command = home.command(&["run", "ecosystem.toml", "--json"]);
    command.env_remove("PM_HOME");
    let run = Running::start(command, b"").end(PATIENT);
    assert_eq!(run.code, 2, "{run:#?}");
    let parse = |text: &str| -> Vec<serde_json::Value> {
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
            .collect()
    };
    let out = parse(&run.out);
    let lines: Vec<_> = out.iter().map(|line| line["line"].as_str().unwrap()).collect();
    assert_eq!(lines, ["a \"quoted\" line", "\ttab"]);
    for (key, expected) in [("app", "app"), ("stream", "stdout")] {
        assert_eq!(out[0][key], expected);
    }
    assert_eq!(out[0]["instance"], 0);
    assert!(out[0]["time"].as_str().unwrap().ends_with('Z'));
    let err = parse(&run.err);
    assert!(err.iter().any(|line| line["stream"] == "stderr" && line["line"] == "oops"), "{err:#?}");
    assert!(err.iter().any(|line| line["app"] == "pm"), "{err:#?}");
}

#[test]
fn every_line_is_json_also_when_a_supervisor_has_died() {
    let home = Home::new();
    home.ecosystem(&shell("app", "echo up; sleep 1000", ""));
    let running = Running::start(home.command(&["run", "ecosystem.toml", "--json"]), b"");
    home.wait_status("app", "online");
    let old = home.supervisor();
    process::end(old);
    wait_until("another one", PATIENT, || if home.supervisor() == old { Err(()) } else { Ok(()) });
    home.wait_status("app", "online");
    process::signal(running.pid(), Signal::SIGTERM);
    let run = running.end(PATIENT);
    assert_eq!(run.code, 0, "{run:#?}");
    for line in run.text().lines() {
        let value: serde_json::Value =
            serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        assert!(value["time"].is_string() && value["line"].is_string(), "{line}");
    }
    run.says("next one in");
}

#[test]
fn raw_is_byte_for_byte_and_a_script_takes_the_options_of_start() {
    let home = Home::new();
    home.write("job.sh", "printf 'no prefix\\r\\n\\n'; printf \"$1 without end\"");
    let mut command =
        home.command(&["run", "job.sh", "--raw", "--no-autorestart", "--name", "job", "--", "argument"]);
    command.env_remove("PM_HOME");
    let run = Running::start(command, b"").end(PATIENT);
    assert_eq!(
        (run.code, run.out.as_str(), run.err.as_str()),
        (0, "no prefix\r\n\nargument without end", "")
    );
}

#[test]
fn what_is_wrong_with_the_file_is_said_before_anything_runs() {
    let home = Home::new();
    home.exits(2, &["run", "missing.toml"]).says("missing.toml");
    home.exits(2, &["run"]).says("ecosystem.toml");
    home.ecosystem("[[apps]]\nname = 'a'\nscript = 'missing.js'\n");
    home.exits(2, &["run"]).says("missing.js");
    assert!(!home.has_daemon());
    // A home that is in use keeps its daemon.
    home.write("app.sh", "sleep 1000");
    home.ok(&["start", "app.sh"]);
    let pid = home.pid("app");
    home.exits(5, &["run", "app.sh"]).says("a daemon is running already");
    assert_eq!(home.pid("app"), pid);
}

#[test]
fn outside_of_a_container_it_ends_with_ctrl_c_and_takes_nothing_of_the_daemon_that_runs() {
    let home = Home::new();
    home.write("app.sh", "sleep 1000");
    home.ok(&["start", "app.sh"]);
    home.ecosystem(&shell("front", "echo up; sleep 1000", ""));
    let mut command = home.command(&["run", "ecosystem.toml"]);
    command.env_remove("PM_HOME").env("XDG_RUNTIME_DIR", home.work());
    let running = Running::start(command, b"");
    let place = home.work();
    let mine = || {
        let entries = std::fs::read_dir(&place).unwrap();
        entries
            .filter_map(|entry| entry.unwrap().file_name().into_string().ok())
            .find(|name| name.starts_with("pm-"))
    };
    let dir = wait_until("its home", PATIENT, || mine().ok_or(()));
    let its_own = home.work_file(&dir);
    wait_until("its app runs", PATIENT, || {
        let list = home.pm(&["--home", &its_own, "list"]);
        if list.out.contains("online") { Ok(()) } else { Err(list) }
    });
    assert_eq!(home.rows().len(), 1, "the other daemon has its own app only");
    process::signal(running.pid(), Signal::SIGINT);
    let run = running.end(PATIENT);
    assert_eq!(run.code, 0, "{run:#?}");
    assert_eq!(mine(), None, "its home is gone");
    assert_eq!(home.row("app").status, "online");
}

#[test]
fn several_that_start_at_the_same_moment_have_a_home_each() {
    let home = Home::new();
    let names = ["a", "b", "c", "d", "e", "f"];
    for name in names {
        // Long, so that reading it takes a moment: there are others who look for a home then.
        let long = shell(name, "exec sleep 1000", "") + &"# nothing\n".repeat(500_000);
        home.write(&format!("{name}.toml"), &long);
    }
    let start = |name: &&str| {
        let mut command = home.command(&["run", &format!("{name}.toml")]);
        command.env_remove("PM_HOME").env("XDG_RUNTIME_DIR", home.work());
        Running::start(command, b"")
    };
    let running: Vec<Running> = names.iter().map(start).collect();
    let homes = || {
        let entries = std::fs::read_dir(home.work()).unwrap();
        let names = entries.filter_map(|entry| entry.unwrap().file_name().into_string().ok());
        names.filter(|name| name.starts_with("pm-")).collect::<Vec<String>>()
    };
    // Every lock that was seen held stays so, and goes with its file: in between, another one would take the home for free.
    let lock_of = |dir: &String| {
        std::fs::metadata(home.work_file(&format!("{dir}/pm.lock"))).map(|meta| meta.ino()).ok()
    };
    let mut held = BTreeSet::new();
    wait_until("each has a supervisor", PATIENT, || {
        let has_socket = |dir: &String| std::fs::metadata(home.work_file(&format!("{dir}/pm.sock"))).is_ok();
        let began = Instant::now();
        // Without a pause, because the moment would be a short one.
        while Instant::now().duration_since(began) < millis(100) {
            let locks = std::fs::read_to_string("/proc/locks").unwrap();
            let is_held = |inode: u64| locks.contains(&format!(":{inode} 0 EOF"));
            for inode in homes().iter().filter_map(lock_of) {
                assert!(is_held(inode) || !held.contains(&inode), "given back: {inode}\n{locks}");
                held.extend(Some(inode).filter(|&inode| is_held(inode)));
            }
        }
        let ready = homes().iter().filter(|dir| has_socket(dir)).count();
        if (ready, held.len()) == (names.len(), names.len()) { Ok(()) } else { Err((ready, held.len())) }
    });
    wait_until("each runs its own app", PATIENT, || {
        let apps = |dir: &String| {
            let list = home.pm(&["--home", &home.work_file(dir), "jlist"]);
            let rows: Vec<Value> = serde_json::from_str(&list.out).unwrap_or_default();
            rows.into_iter().map(|row| format!("{} {}", row["name"], row["pm2_env"]["status"])).collect()
        };
        let mut found: Vec<Vec<String>> = homes().iter().map(apps).collect();
        found.sort();
        let wanted: Vec<Vec<String>> =
            names.iter().map(|name| vec![format!("\"{name}\" \"online\"")]).collect();
        if found == wanted { Ok(()) } else { Err(found) }
    });
    for one in &running {
        process::signal(one.pid(), Signal::SIGINT);
    }
    for one in running {
        let run = one.end(PATIENT);
        assert_eq!(run.code, 0, "{run:#?}");
    }
    assert_eq!(homes(), Vec::<String>::new(), "none is left");
}

#[test]
fn killed_by_force_it_takes_its_apps_along() {
    let home = Home::new();
    home.ecosystem(&shell(
        "front",
        "trap \"echo bye >said; exit\" INT; echo up; while :; do sleep 0.1; done",
        "",
    ));
    let running = Running::start(home.command(&["run", "ecosystem.toml"]), b"");
    home.wait_status("front", "online");
    process::signal(running.pid(), Signal::SIGKILL);
    wait_until("nothing is left", PATIENT + Duration::from_secs(20), || {
        let left = home.process_list();
        if left.is_empty() { Ok(()) } else { Err(left) }
    });
    assert_eq!(home.read("said"), "bye\n", "by the book");
    drop(running);
}
