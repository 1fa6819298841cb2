//! Who may do what: another user, names and paths from outside, shells, sockets. docs/security.md has the claims; each of
//! them names its test.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::Signal;
use serde_json::Value;

use super::support::home::{Running, run};
use super::support::{Home, PATIENT, SOON, not_here, process, wait_until};

const SLEEPER: &str = "[[apps]]\nname = 'job'\nscript = 'sleep'\nargs = ['1000']\n";

/// Tries everything another user could think of, and prints what it got as JSON. Its arguments: the uid to become, the
/// home, pids.
const INTRUDER: &str = r#"
import errno, json, os, socket, sys
uid, home, pids = int(sys.argv[1]), sys.argv[2], [int(pid) for pid in sys.argv[3:]]
if uid:
    os.setgroups([]); os.setgid(uid); os.setuid(uid)
got = {}
def attempt(what, do):
    try:
        got[what] = repr(do())
    except OSError as error:
        # Refused, or hung up on.
        assert error.errno in (errno.EPERM, errno.EACCES, errno.EPIPE, errno.ECONNRESET), (what, error)
def ask():
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(10)
        s.connect(home + "/pm.sock")
        s.sendall(b'{"v":1,"op":7,"request":"ping"}\n')
        answer = s.recv(4096)
        if not answer: raise PermissionError(13, "nothing was said")
        return answer
attempt("ask", ask)
attempt("home", lambda: os.listdir(home))
attempt("plant", lambda: os.close(os.open(home + "/planted", os.O_CREAT | os.O_WRONLY)))
for path in json.loads(os.environ["FILES"]):
    attempt("read " + path, lambda: open(home + "/" + path, "rb").read())
    attempt("write " + path, lambda: open(home + "/" + path, "r+b").close())
for pid in pids:
    attempt(f"environment {pid}", lambda: open(f"/proc/{pid}/environ", "rb").read())
    attempt(f"memory {pid}", lambda: open(f"/proc/{pid}/mem", "rb").close())
    attempt(f"descriptors {pid}", lambda: os.listdir(f"/proc/{pid}/fd"))
    attempt(f"signal {pid}", lambda: os.kill(pid, 0))
print(json.dumps(got))
"#;

/// Nobody's number, as far as any machine goes.
const STRANGER: u32 = 54_321;

fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        not_here("only root can become another user");
    }
    root
}

/// Every file, socket and directory of the home, relative to it.
fn everything(home: &Home) -> Vec<PathBuf> {
    let (mut open, mut found) = (vec![home.path()], Vec::new());
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            // Files come and go while they are written aside.
            let Ok(meta) = path.symlink_metadata() else { continue };
            if meta.is_dir() {
                open.push(path.clone());
            }
            found.push(path);
        }
    }
    found
}

fn intrude(home: &Home, uid: u32) -> Value {
    let files: Vec<String> = everything(home)
        .iter()
        .filter(|path| path.is_file())
        .map(|path| path.strip_prefix(home.path()).unwrap().to_str().unwrap().to_owned())
        .filter(|path| !path.ends_with(".new"))
        .collect();
    assert!(
        files.iter().any(|file| file == "state.json") && files.iter().any(|file| file.starts_with("logs/"))
    );
    let mut command = Command::new("python3");
    command.arg("-c").arg(INTRUDER).arg(uid.to_string()).arg(home.path());
    let pids = [home.keeper(), home.supervisor(), home.pid("job")];
    command.args(pids.map(|pid| pid.to_string()));
    command.env("FILES", serde_json::to_string(&files).unwrap());
    let run = run(command, PATIENT);
    assert_eq!(run.code, 0, "{run:#?}");
    run.json()
}

/// A home that others can find: only its own protection counts.
fn reachable() -> Home {
    let home = Home::new();
    home.open_to_others();
    home
}

#[test]
fn pain_43_another_user_cannot_connect_nor_read_logs_state_or_environments() {
    if !is_root() {
        return;
    }
    let home = reachable();
    home.start(&format!("{SLEEPER}env = {{ TOKEN = 'hush' }}\n"));
    home.ok(&["restart", "job"]);
    assert_eq!(intrude(&home, STRANGER), serde_json::json!({}), "nothing at all");
    // The control: the same attempts by somebody who may.
    let own = intrude(&home, 0);
    let got = own.as_object().unwrap();
    for what in ["ask", "home", "plant", "read state.json", "read events.jsonl", "write state.json"] {
        assert!(got.contains_key(what), "{what}: {own:#}");
    }
    let keys: Vec<&str> = got.keys().map(String::as_str).collect();
    for kind in ["read env/", "read logs/", "environment ", "memory ", "descriptors ", "signal "] {
        assert!(keys.iter().any(|key| key.starts_with(kind)), "{kind}: {keys:?}");
    }
    assert!(own["ask"].as_str().unwrap().contains("alive"), "{own:#}");
}

#[test]
fn pain_43_peer_credentials_count_where_the_directory_does_not_keep_others_out() {
    if !is_root() {
        return;
    }
    let home = reachable();
    home.start(SLEEPER);
    // As if somebody had opened it by mistake.
    fs::set_permissions(home.path(), fs::Permissions::from_mode(0o777)).unwrap();
    fs::set_permissions(home.path().join("pm.sock"), fs::Permissions::from_mode(0o666)).unwrap();
    let got = intrude(&home, STRANGER);
    let keys: BTreeSet<&str> = got.as_object().unwrap().keys().map(String::as_str).collect();
    // The files are private one by one; what the directory gives away are names, and the Node agent, which is no secret.
    let given: Vec<&str> =
        keys.into_iter().filter(|key| !["home", "plant", "read run/agent.cjs"].contains(key)).collect();
    assert_eq!(given, [] as [&str; 0], "{got:#}");
    wait_until("the daemon says so", SOON, || {
        let log = fs::read_to_string(home.path().join("pm.log")).unwrap_or_default();
        if log.contains("refused a client of another user") { Ok(()) } else { Err(log) }
    });
    home.ok(&["ping"]);
    fs::remove_file(home.path().join("planted")).unwrap();
}

#[test]
fn pain_43_another_user_cannot_take_over_from_a_supervisor_without_a_keeper() {
    if !is_root() {
        return;
    }
    let home = reachable();
    fs::create_dir_all(home.path()).unwrap();
    fs::set_permissions(home.path(), fs::Permissions::from_mode(0o777)).unwrap();
    // One that is started in the foreground is watched over, so its supervisor waits for the next one.
    let daemon = Running::start(home.command(&["daemon"]), b"");
    wait_until("the daemon answers", PATIENT, || {
        let ping = home.pm(&["ping"]);
        if ping.code == 0 { Ok(()) } else { Err(ping) }
    });
    home.start(SLEEPER);
    let pid = home.pid("job");
    let script = r#"
import os, socket, sys, time
path = sys.argv[1] + "/takeover.sock"
deadline = time.monotonic() + 30
open("thief", "w").write("waits")
while time.monotonic() < deadline:
    try:
        os.chmod(os.path.dirname(path), 0o777)
        mode = os.stat(path).st_mode & 0o777
        os.chmod(path, 0o666)
        break
    except FileNotFoundError:
        time.sleep(0.001)
os.setgroups([]); os.setgid(54321); os.setuid(54321)
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
    s.settimeout(10)
    s.connect(path)
    try:
        said = s.recv(65536)
    except ConnectionResetError:
        said = b""
print(oct(mode), len(said))
"#;
    let mut command = Command::new("python3");
    command.args(["-c", script]).arg(home.path()).current_dir(home.work());
    let thief = Running::start(command, b"");
    home.file_with("thief", "waits");
    process::end(home.keeper());
    let run = thief.end(PATIENT);
    assert_eq!(run.out.lines().last(), Some("0o600 0"), "{run:#?}");
    // The app goes on, and the next daemon gets everything.
    home.ok(&["start", "ecosystem.toml"]);
    assert_eq!(home.pid("job"), pid);
    home.ok(&["kill"]);
    drop(daemon);
}

#[test]
fn pain_43_modes_do_not_depend_on_the_umask() {
    for umask in ["000", "077", "027"] {
        let home = reachable();
        home.write("shout.sh", "echo out; echo err >&2; exec sleep 1000\n");
        home.ecosystem("[[apps]]\nname = 'job'\nscript = 'shout.sh'\nenv = { TOKEN = 'hush' }\n");
        let mut command = Command::new("sh");
        let line = format!("umask {umask}; exec \"$0\" start ecosystem.toml");
        command.args(["-c", &line, env!("CARGO_BIN_EXE_pm")]);
        home.environment(&mut command);
        let started = run(command, PATIENT);
        assert_eq!(started.code, 0, "{started:#?}");
        home.log_with("job-out.log", "out");
        home.log_with("job-error.log", "err");
        home.ok(&["save"]);
        assert_eq!(fs::metadata(home.path()).unwrap().mode() & 0o7777, 0o700, "umask {umask}");
        let mut seen = BTreeSet::new();
        for path in everything(&home) {
            let Ok(meta) = path.symlink_metadata() else { continue };
            let name = path.strip_prefix(home.path()).unwrap();
            let top = name.iter().next().unwrap().to_str().unwrap();
            let expected = match top {
                _ if meta.is_dir() => 0o700,
                "logs" => 0o640,
                _ if name == Path::new("run/agent.cjs") => 0o444,
                _ => 0o600,
            };
            let mode = meta.mode() & 0o7777;
            assert!(
                mode == expected || mode & !expected == 0 && meta.is_dir(),
                "{}: {mode:o} with umask {umask}, not {expected:o}",
                name.display()
            );
            seen.insert(top.to_owned());
            if meta.file_type().is_socket() {
                seen.insert("a socket".to_owned());
            }
        }
        for part in [
            "a socket",
            "env",
            "events.jsonl",
            "logs",
            "pids",
            "pm.lock",
            "pm.log",
            "state.json",
            "saved-env",
        ] {
            assert!(seen.contains(part), "{part}: {seen:?}");
        }
    }
}

#[test]
fn pain_43_no_tcp_listener_and_no_other_door_but_the_one_socket() {
    let home = Home::new();
    home.start(SLEEPER);
    let mut sockets = BTreeSet::new();
    for pid in [home.keeper(), home.supervisor()] {
        sockets.extend(process::descriptors(pid).into_values().filter(|to| to.starts_with("socket:")));
    }
    assert!(!sockets.is_empty());
    let has = |line: &str, inode: usize| {
        line.split_whitespace().nth(inode).is_some_and(|inode| sockets.contains(&format!("socket:[{inode}]")))
    };
    for table in ["tcp", "tcp6", "udp", "udp6", "raw", "raw6"] {
        let Ok(text) = fs::read_to_string(format!("/proc/net/{table}")) else { continue };
        let ours: Vec<&str> = text.lines().filter(|line| has(line, 9)).collect();
        assert_eq!(ours, [] as [&str; 0], "{table}");
    }
    // Listening unix sockets (flag 00010000) with a name.
    let text = fs::read_to_string("/proc/net/unix").unwrap();
    let doors: BTreeSet<&str> = text
        .lines()
        .filter(|line| has(line, 6) && line.split_whitespace().nth(3) == Some("00010000"))
        .filter_map(|line| line.split_whitespace().nth(7))
        .collect();
    assert_eq!(doors, BTreeSet::from([home.path().join("pm.sock").to_str().unwrap()]));
}

#[test]
fn a_socket_of_another_user_is_not_believed_and_roots_environment_goes_to_nobody_else() {
    if !is_root() {
        return;
    }
    let home = reachable();
    fs::create_dir_all(home.path()).unwrap();
    fs::set_permissions(home.path(), fs::Permissions::from_mode(0o755)).unwrap();
    home.ecosystem(SLEEPER);
    // A daemon of somebody else that says yes to everything, and notes what it hears.
    let script = r#"
import os, socket, sys
os.chown(sys.argv[1], 54321, 54321)
os.setgroups([]); os.setgid(54321); os.setuid(54321)
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(sys.argv[1] + "/pm.sock")
    os.chmod(sys.argv[1] + "/pm.sock", 0o666)
    listener.listen()
    while True:
        client, _ = listener.accept()
        print(client.recv(65536), flush=True)
        client.close()
"#;
    let mut command = Command::new("python3");
    command.args(["-c", script]).arg(home.path());
    let false_daemon = Running::start(command, b"");
    wait_until("it listens", SOON, || {
        let socket = home.path().join("pm.sock");
        UnixStream::connect(&socket).map(drop).map_err(|error| error.to_string())
    });
    let mut start = home.command(&["start", "ecosystem.toml"]);
    start.env("TOKEN", "hush-hush");
    let run_as_root = run(start, PATIENT);
    assert_eq!(run_as_root.code, 4, "{run_as_root:#?}");
    run_as_root.says("belongs to 54321");
    // Another user is told the same, and asks nothing. That user needs the program where it can be reached.
    let program = home.write("pm", "");
    fs::copy(env!("CARGO_BIN_EXE_pm"), &program).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let mut list = Command::new("setpriv");
    list.args(["--reuid=54322", "--regid=54322", "--clear-groups", &program, "list"]);
    home.environment(&mut list);
    let run_as_other = run(list, PATIENT);
    assert_eq!(run_as_other.code, 4, "{run_as_other:#?}");
    run_as_other.says("belongs to 54321");
    process::end(false_daemon.pid());
    let heard = false_daemon.end(SOON);
    assert!(!heard.out.contains("hush-hush") && !heard.out.contains("list"), "{heard:#?}");
    fs::remove_file(home.path().join("pm.sock")).unwrap();
    std::os::unix::fs::chown(home.path(), Some(0), Some(0)).unwrap();
}

#[test]
fn a_home_that_somebody_else_has_made_is_not_used() {
    if !is_root() {
        return;
    }
    let home = reachable();
    fs::create_dir(home.path()).unwrap();
    std::os::unix::fs::chown(home.path(), Some(STRANGER), None).unwrap();
    home.ecosystem(SLEEPER);
    home.pm(&["start", "ecosystem.toml"]).says("belongs to user 54321");
    assert!(!home.has_daemon() && fs::read_dir(home.path()).unwrap().next().is_none());
}

#[test]
fn root_does_nothing_that_a_file_says_which_everybody_may_change() {
    if !is_root() {
        return;
    }
    let home = Home::new();
    home.write("vars.env", "A=1\n");
    home.ecosystem(&format!("{SLEEPER}env_file = 'vars.env'\n"));
    let chmod = |name: &str, mode: u32| {
        fs::set_permissions(home.work_file(name), fs::Permissions::from_mode(mode)).unwrap();
    };
    for file in ["ecosystem.toml", "vars.env"] {
        chmod(file, 0o666);
        for command in [vec!["start"], vec!["apply"], vec!["reload", "ecosystem.toml"]] {
            let refused = home.exits(2, &command);
            refused.says("everybody may change it").says(file);
        }
        chmod(file, 0o644);
    }
    assert!(!home.has_daemon());
    chmod("ecosystem.toml", 0o666);
    let mut trusting = home.command(&["start"]);
    trusting.env("PM_TRUST_FILES", "1");
    assert_eq!(run(trusting, PATIENT).code, 0);
}

#[test]
fn root_judges_every_directory_and_symlink_on_the_way_to_a_file() {
    if !is_root() {
        return;
    }
    let home = reachable();
    home.ecosystem(SLEEPER);
    let theirs = home.write("bobs/evil.toml", &SLEEPER.replace("job", "evil"));
    for path in [home.work().join("bobs"), PathBuf::from(&theirs)] {
        std::os::unix::fs::chown(path, Some(STRANGER), None).unwrap();
    }
    let mode = |name: &str, mode: u32| {
        fs::set_permissions(home.work().join(name), fs::Permissions::from_mode(mode)).unwrap();
    };
    home.write("open/app/ecosystem.toml", SLEEPER);
    home.write("sticky/fine/ecosystem.toml", SLEEPER);
    mode("open", 0o777);
    mode("sticky", 0o1777);
    let link = |target: &str, name: &str, owner: u32| {
        let name = home.work().join(name);
        std::os::unix::fs::symlink(target, &name).unwrap();
        std::os::unix::fs::lchown(name, Some(owner), None).unwrap();
    };
    link(&theirs, "open/ecosystem.toml", STRANGER);
    link(&home.work_file("ecosystem.toml"), "sticky/ecosystem.toml", STRANGER);
    link("open/app", "to-open", 0);
    for (file, why) in [
        ("open/ecosystem.toml", "everybody may replace what is in"),
        ("open/app/ecosystem.toml", "everybody may replace what is in"),
        ("to-open/ecosystem.toml", "everybody may replace what is in"),
        ("sticky/ecosystem.toml", "user 54321 has put"),
    ] {
        home.exits(2, &["start", file]).says(why).says(file);
    }
    assert!(!home.has_daemon());
    // What was fine stays fine: root's own below a sticky directory, and a user's own directory.
    home.ok(&["start", "sticky/fine/ecosystem.toml"]);
    home.ok(&["start", "bobs/evil.toml"]);
}

#[test]
fn root_looks_at_an_env_file_again_whenever_it_is_read() {
    if !is_root() {
        return;
    }
    let home = reachable();
    let file = home.write("sticky/app.env", "GREETING=hello\n");
    let sticky = home.work().join("sticky");
    fs::set_permissions(&sticky, fs::Permissions::from_mode(0o1777)).unwrap();
    home.start(&format!("{SLEEPER}env_file = 'sticky/app.env'\nrestart_delay = '200ms'\n"));
    let pid = home.pid("job");
    let greeting = |pid: i32| process::environ(pid).get("GREETING").cloned();
    assert_eq!(greeting(pid).as_deref(), Some("hello"));
    // It goes, as files in /tmp do, and somebody else puts another one there.
    fs::remove_file(&file).unwrap();
    home.write("sticky/app.env", "GREETING=evil\nLD_PRELOAD=/tmp/evil.so\n");
    std::os::unix::fs::chown(&file, Some(STRANGER), None).unwrap();
    for command in ["restart", "reload"] {
        let refused = home.exits(1, &[command, "job"]);
        refused.says("user 54321 has put").says("sticky/app.env").says("chown root");
    }
    assert_eq!(home.pid("job"), pid, "what cannot be started again is not taken down");
    process::signal(pid, Signal::SIGKILL);
    let log = home.path().join("pm.log");
    wait_until("the crash restart is refused, with the reason", SOON, || {
        let text = fs::read_to_string(&log).unwrap_or_default();
        if text.contains("user 54321 has put") { Ok(()) } else { Err(text) }
    });
    assert_eq!(home.row("job").pid, 0, "{:#?}", home.row("job"));
    home.pm(&["describe", "job"]).says("user 54321 has put");
    // It is tried again, and comes up with what root says.
    std::os::unix::fs::chown(&file, Some(0), None).unwrap();
    home.write("sticky/app.env", "GREETING=hello again\n");
    let row = home.wait_row("job", "it runs", |row| row.status == "online" && row.pid != 0);
    assert_eq!(greeting(row.pid).as_deref(), Some("hello again"));
    // Whoever says that it is fine is believed, also when the app starts again.
    fs::set_permissions(&file, fs::Permissions::from_mode(0o666)).unwrap();
    home.exits(1, &["restart", "job"]).says("everybody may change it");
    let mut trusting = home.command(&["restart", "job", "--update-env"]);
    trusting.env("PM_TRUST_FILES", "1");
    let trusting = run(trusting, PATIENT);
    assert_eq!(trusting.code, 0, "{trusting:#?}");
    home.ok(&["restart", "job"]);
    assert!(!process::environ(home.pid("job")).contains_key("PM_TRUST_FILES"));
}

#[test]
fn a_package_json_that_is_no_file_holds_nobody_up() {
    let home = Home::new();
    home.write("app/package.json", "{\"version\": \"1.2.3\"}");
    home.write("app/idle.js", "setInterval(() => {}, 1000);\n");
    home.start(&format!(
        "{SLEEPER}[[apps]]\nname = 'app'\nscript = 'app/idle.js'\nexec_mode = 'fork'\nrestart_delay = 0\n"
    ));
    assert_eq!(home.row("app").env("version"), "1.2.3");
    let package = home.work().join("app/package.json");
    let plant: [(&str, &dyn Fn()); 3] = [
        ("a FIFO", &|| {
            nix::unistd::mkfifo(&package, nix::sys::stat::Mode::from_bits_truncate(0o666)).unwrap();
        }),
        ("an endless device", &|| std::os::unix::fs::symlink("/dev/zero", &package).unwrap()),
        ("a huge file", &|| {
            let file = fs::File::create(&package).unwrap();
            file.set_len(64 << 30).unwrap();
        }),
    ];
    for (what, plant) in plant {
        fs::remove_file(&package).unwrap();
        plant();
        let before = home.row("app");
        process::signal(before.pid, Signal::SIGKILL);
        let row = home.wait_row("app", what, |row| row.status == "online" && row.pid != before.pid);
        assert_eq!(row.env("version"), "N/A", "{what}");
        // The next supervisor reads it too.
        let supervisor = home.supervisor();
        process::signal(supervisor, Signal::SIGKILL);
        wait_until(what, SOON, || {
            if process::alive(supervisor) { Err("the supervisor lives".to_owned()) } else { Ok(()) }
        });
        assert_eq!(home.row("app").pid, row.pid, "{what}");
        assert!(process::status_figure(home.supervisor(), "VmHWM") < 512 << 10, "{what}");
    }
    home.ok(&["stop", "job"]);
}

#[test]
fn an_env_file_that_is_no_file_holds_nobody_up() {
    let home = Home::new();
    home.write("vars.env", "A=1\n");
    home.start(&format!("{SLEEPER}env_file = 'vars.env'\n"));
    fs::remove_file(home.work_file("vars.env")).unwrap();
    let fifo = home.work().join("vars.env");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    home.exits(1, &["restart", "job"]).says("vars.env").says("not a regular file");
    home.ok(&["ping"]);
    assert_eq!(home.row("job").status, "online", "what cannot be started again is not taken down");
}

/// Whatever a shell would make of these, nobody else does.
const NASTY: [&str; 8] = [
    "$(touch pwned)",
    "`touch pwned`",
    "; touch pwned",
    "| touch pwned",
    "&& touch pwned",
    "> pwned",
    "a b\tc\n'd' \"e\" \\",
    "*",
];

#[test]
fn pain_43_arguments_are_vectors_and_no_shell_sees_them_unless_asked_for() {
    let home = Home::new();
    let says_args = "#!/usr/bin/env python3\nimport json, sys, time\n\
                     open(sys.argv[1], 'a').write(json.dumps(sys.argv[2:]) + '\\n')\n";
    // In paths as well: a script, a directory, a log file.
    let dir = "$(touch pwned); `touch pwned`";
    let script =
        home.write(&format!("{dir}/app & touch pwned.py"), &format!("{says_args}time.sleep(1000)\n"));
    let tool = home.write("tool's $(touch pwned)", says_args);
    for path in [&script, &tool] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let list = |first: &str, words: &[&str]| {
        let words = std::iter::once(first).chain(words.iter().copied()).map(toml_string);
        format!("[{}]", words.collect::<Vec<_>>().join(", "))
    };
    let program = |report: &str| {
        let mut words = vec![report];
        words.extend(NASTY);
        list(&tool, &words)
    };
    home.start(&format!(
        "[[apps]]\nname = 'job'\nscript = {}\ncwd = {}\nargs = {}\nout_file = {}\npre_start = {}\npost_stop = {}\n\
         ready = {{ exec = {} }}\nenv = {{ A = {} }}\n",
        toml_string(&script),
        toml_string(home.work().join(dir).to_str().unwrap()),
        list(&home.work_file("args"), &NASTY),
        toml_string(&home.work_file("$(touch pwned).log")),
        program(&home.work_file("pre_start")),
        program(&home.work_file("post_stop")),
        program(&home.work_file("probe")),
        toml_string(NASTY[0]),
    ));
    assert_eq!(process::environ(home.pid("job"))["A"], NASTY[0]);
    home.file_with("args", "]");
    // From the command line too, in one word or in several.
    let report = home.work_file("line");
    let mut by_hand =
        vec!["start", tool.as_str(), "--name", "hand", "--no-autorestart", "--", report.as_str()];
    by_hand.extend(NASTY);
    home.pm(&by_hand);
    home.file_with("line", "]");
    home.ok(&["stop", "job"]);
    home.file_with("post_stop", "]");
    for report in ["args", "pre_start", "post_stop", "probe", "line"] {
        let text = home.read(report);
        let words: Vec<String> = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        assert_eq!(words, NASTY, "{report}");
    }
    // A line that only a shell understands needs one to be asked for.
    let line = "sleep 1000 & touch pwned; wait";
    home.exits(2, &["start", line, "--name", "line"]).says("this line needs a shell").says("--shell");
    let pwned: Vec<PathBuf> = [home.work(), home.work().join(dir), home.path(), PathBuf::from("/")]
        .iter()
        .map(|dir| dir.join("pwned"))
        .filter(|path| path.symlink_metadata().is_ok())
        .collect();
    assert_eq!(pwned, [] as [PathBuf; 0]);
    // The control.
    home.ok(&["start", line, "--name", "line", "--shell"]);
    wait_until("the shell has run it", SOON, || {
        home.work().join("pwned").symlink_metadata().map_err(|e| e.kind())
    });
}

fn toml_string(text: &str) -> String {
    serde_json::to_string(text).unwrap()
}

/// Says a line to the socket as any program could, and returns the last line of the answer.
fn say(home: &Home, line: &str) -> Value {
    let mut stream = UnixStream::connect(home.path().join("pm.sock")).unwrap();
    stream.write_all(line.as_bytes()).unwrap();
    stream.write_all(b"\n").unwrap();
    stream.set_read_timeout(Some(PATIENT)).unwrap();
    let mut lines = BufReader::new(stream).lines();
    loop {
        let line: Value = serde_json::from_str(&lines.next().expect("an answer").unwrap()).unwrap();
        if line["reply"].get("answer").is_some() || line["reply"].get("refused").is_some() {
            return line["reply"].clone();
        }
    }
}

#[test]
fn pain_43_names_are_validated_wherever_they_come_from() {
    let home = Home::new();
    home.start(SLEEPER);
    for name in
        ["../../etc/cron.d/x", "/etc/passwd", "a/b", "..", ".hidden", "-rf", "a\0b", "a\nb", "all", "7", ""]
    {
        home.write("bad.toml", &format!("[[apps]]\nname = {}\nscript = 'sleep'\n", toml_string(name)));
        if !name.contains('\0') {
            let run = home.pm(&["start", "sleep", &format!("--name={name}")]);
            assert_eq!(run.code, 2, "{name:?}: {run:#?}");
        }
        home.exits(2, &["start", "bad.toml"]);
        // A client that checks nothing.
        let describe =
            say(&home, r#"{"v":1,"op":7,"request":{"describe":{"targets":["job"],"show_env":true}}}"#);
        let mut spec = describe["answer"]["describe"][0]["spec"].clone();
        assert_eq!(spec["name"], "job", "{describe:#}");
        spec["name"] = name.into();
        let call = serde_json::json!({"v": 1, "op": 8, "request": {"start": {"specs": [spec], "shell": {}}}});
        let refused = say(&home, &call.to_string());
        assert_eq!(refused["refused"]["code"], 2, "{name:?}: {refused:#}");
    }
    assert_eq!(home.rows().len(), 1);
    let outside: Vec<PathBuf> =
        everything(&home).into_iter().filter(|path| !path.starts_with(home.path())).collect();
    assert_eq!(outside, [] as [PathBuf; 0]);
}

#[test]
fn pain_43_nonsense_on_the_socket_costs_its_own_connection_only() {
    let home = Home::new();
    home.start(SLEEPER);
    let (pid, supervisor) = (home.pid("job"), home.supervisor());
    for nonsense in
        ["{", "null", "[]", "\u{0}\u{1}", &"[".repeat(100_000), r#"{"v":1,"op":-1,"request":"ping"}"#]
    {
        let refused = say(&home, nonsense);
        assert_eq!(refused["refused"]["code"], 2, "{refused:#}");
    }
    // A length that never ends is cut off, and its memory is given back.
    let before = process::smaps_kib(supervisor, "Rss");
    let mut endless = UnixStream::connect(home.path().join("pm.sock")).unwrap();
    endless.set_write_timeout(Some(PATIENT)).unwrap();
    let block = vec![b'x'; 1 << 20];
    let taken = (0..80).take_while(|_| endless.write_all(&block).is_ok()).count();
    assert!((60..70).contains(&taken), "{taken} MiB were taken");
    wait_until("the memory is given back", SOON, || {
        let now = process::smaps_kib(supervisor, "Rss");
        if now < before + 8 * 1024 { Ok(()) } else { Err((before, now)) }
    });
    assert_eq!((home.pid("job"), home.supervisor()), (pid, supervisor));
}

/// Signals to what is no process of ours would be the worst that a forged pid file could bring about.
#[test]
fn pid_files_and_leftovers_in_the_home_are_not_believed() {
    let home = Home::new();
    home.start(SLEEPER);
    let mut bystander = Command::new("sleep").arg("1000").spawn().unwrap();
    let pid = i32::try_from(bystander.id()).unwrap();
    fs::write(home.path().join("pids/job-0.pid"), pid.to_string()).unwrap();
    home.ok(&["restart", "job"]);
    fs::write(home.path().join("pids/job-0.pid"), pid.to_string()).unwrap();
    home.ok(&["stop", "job"]);
    home.ok(&["delete", "job"]);
    assert!(process::alive(pid));
    process::signal(pid, Signal::SIGKILL);
    bystander.wait().unwrap();
}
