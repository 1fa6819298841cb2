//! Nothing goes out: the core of this suite once more in a network namespace that has no route to anywhere, with every
//! attempt to reach something noted.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use super::support::home::{Run, attempt};
use super::support::load::{Connections, Load};
use super::support::{Home, fixture, free_port, not_here, secs};

/// Start, list, reload under requests, stop, logs, a Node cluster: each by its own test.
const CORE: [&str; 4] = [
    "offline::a_day_in_the_life_of_a_cluster",
    "start_list::start_of_a_file_starts_its_apps_and_prints_the_table",
    "logs::lines_are_neither_lost_nor_doubled_over_restarts_and_reloads",
    "agent::describe_jlist_and_list_wide_show_the_inside_of_a_node_process",
];

/// What most daemons see most of the time, in a few seconds. With a network other tests show each part of it.
#[test]
fn a_day_in_the_life_of_a_cluster() {
    if !is_offline() {
        return;
    }
    let home = Home::loaded();
    let port = free_port();
    home.start(&format!(
        "[[apps]]\nname = 'web'\nscript = '{}'\ninstances = 2\nenv = {{ PORT = '{port}' }}\n",
        fixture("web-textbook.js")
    ));
    let load = Load::start(port, 4, Connections::OnePerRequest);
    for _ in 0..2 {
        home.ok(&["reload", "web"]);
        load.more(50);
    }
    home.ok(&["scale", "web", "3"]);
    home.ok(&["restart", "web"]);
    load.more(50);
    assert!(load.stop().ok > 200);
    home.ok(&["logs", "--nostream"]).says("handler");
    home.ok(&["apply", "ecosystem.toml"]);
    home.ok(&["stop", "web"]);
    assert_eq!(home.statuses("web"), ["stopped", "stopped"]);
    home.ok(&["save"]);
    home.ok(&["kill"]);
}

/// Whether there is no interface but loopback.
fn is_offline() -> bool {
    let table = fs::read_to_string("/proc/net/dev").expect("the interfaces");
    table.lines().skip(2).all(|line| line.trim_start().starts_with("lo:"))
}

/// Brings the loopback interface up (SIOCSIFFLAGS, netdevice(7)), which a new namespace has and has down, then becomes
/// the command.
const WITH_LOOPBACK: &str = "import fcntl, os, socket, struct, sys\n\
    with socket.socket() as s: fcntl.ioctl(s, 0x8914, struct.pack('16sh22x', b'lo', 1))\n\
    os.execvp(sys.argv[1], sys.argv[1:])";

/// Runs a command without a network and returns what it did and every internet address that it or its descendants
/// wanted to reach.
fn offline(trace: &Path, command: &[&str]) -> (Run, BTreeSet<String>) {
    let mut unshare = Command::new("unshare");
    unshare.args(["--net", "python3", "-c", WITH_LOOPBACK, "strace", "--seccomp-bpf", "-f", "-qq", "-o"]);
    unshare.arg(trace).args(["-e", "trace=connect,sendto,sendmsg,sendmmsg"]).args(command);
    let run = attempt(unshare, secs(300)).expect("an end");
    (run, addresses(&fs::read_to_string(trace).expect("a trace")))
}

/// `inet_addr("127.0.0.1")` and `inet_pton(AF_INET6, "::1", …)` of all lines.
fn addresses(trace: &str) -> BTreeSet<String> {
    let after = |mark: &str| -> Vec<String> {
        trace.split(mark).skip(1).filter_map(|rest| rest.split('"').next()).map(str::to_owned).collect()
    };
    [after("inet_addr(\""), after("inet_pton(AF_INET6, \"")].concat().into_iter().collect()
}

fn leaves_the_machine(address: &str) -> bool {
    match address.parse::<std::net::IpAddr>().expect(address) {
        std::net::IpAddr::V4(address) => !address.is_loopback(),
        std::net::IpAddr::V6(address) => !address.to_canonical().is_loopback(),
    }
}

/// Whether this machine lets us make namespaces and watch system calls.
fn can_isolate() -> bool {
    let strace = Command::new("strace").arg("-V").output().is_ok_and(|output| output.status.success());
    let net = Command::new("unshare").args(["--net", "true"]).status().is_ok_and(|status| status.success());
    if !strace || !net {
        not_here(&format!("needs strace ({strace}) and a network namespace, as root ({net})"));
    }
    strace && net
}

#[test]
fn the_core_of_the_suite_runs_without_a_network_and_never_tries_to_reach_one() {
    if !can_isolate() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("trace");
    let this = std::env::current_exe().unwrap();
    let mut command = vec![this.to_str().unwrap(), "--exact", "--test-threads=3"];
    command.extend(CORE);
    let (run, reached) = offline(&trace, &command);
    assert_eq!(run.code, 0, "{run:#?}");
    run.says(&format!("{} passed", CORE.len()));
    assert!(reached.contains("127.0.0.1"), "requests were seen: {reached:?}");
    let out: Vec<&String> = reached.iter().filter(|address| leaves_the_machine(address)).collect();
    assert_eq!(out, [] as [&String; 0]);
}

#[test]
fn control_an_attempt_to_reach_something_is_seen() {
    if !can_isolate() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let script = "import errno, socket\n\
        def out(kind, address):\n\
        \x20   try: socket.socket(socket.AF_INET6 if ':' in address else socket.AF_INET, kind).connect((address, 9))\n\
        \x20   except OSError as error: assert error.errno == errno.ENETUNREACH, error\n\
        \x20   else: raise SystemExit('there is a network')\n\
        out(socket.SOCK_STREAM, '192.0.2.1')\n\
        out(socket.SOCK_STREAM, '2001:db8::1')\n\
        try: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('198.51.100.7', 53))\n\
        except OSError: pass\n";
    // By a grandchild that has left its session, as a daemon has.
    let (run, reached) = offline(&dir.path().join("trace"), &["setsid", "--wait", "python3", "-c", script]);
    assert_eq!(run.code, 0, "{run:#?}");
    let out: Vec<&str> =
        reached.iter().map(String::as_str).filter(|address| leaves_the_machine(address)).collect();
    assert_eq!(out, ["192.0.2.1", "198.51.100.7", "2001:db8::1"]);
}
