//! Unmodified Node apps in cluster mode, and what workers observe compared with a genuine Node primary beside it.

use std::collections::BTreeSet;
use std::net::UdpSocket;
use std::process::Command;

use super::support::genuine;
use super::support::home::run;
use super::support::load::{self, Connections, Load, Target};
use super::support::node::{self, Node};
use super::support::{Home, PATIENT, SOON, fixture, free_port, secs, wait_until};

/// Copies a fixture beside `node_modules` and starts two workers of it.
fn start_app(home: &Home, app: &str, port: u16, balance: &str, node: &Node) {
    std::os::unix::fs::symlink(node::packages(), home.work().join("node_modules")).unwrap();
    std::fs::copy(fixture(app), home.work().join(app)).unwrap();
    home.start(&format!(
        "[[apps]]\nname = 'app'\nscript = '{app}'\nexec_mode = 'cluster'\ninstances = 2\nbalance = '{balance}'\n\
         interpreter = '{}'\nenv = {{ PORT = '{port}' }}\n",
        node.binary
    ));
}

fn pids_that_answer(port: u16) -> BTreeSet<String> {
    (0..20).map(|_| load::get(port, "/").unwrap().header("x-pid").to_owned()).collect()
}

#[test]
fn express_runs_unmodified_and_reloads_without_losing_a_request() {
    for node in [Node::installed(), Node::other()] {
        let home = Home::loaded();
        let port = free_port();
        start_app(&home, "express.js", port, "round-robin", &node);
        assert_eq!(pids_that_answer(port).len(), 2);
        let load = Load::start(port, 8, Connections::OnePerRequest);
        home.ok(&["reload", "app"]);
        load.more(50);
        load.stop().lost_nothing(50);
    }
}

#[test]
fn fastify_runs_unmodified_and_reloads_without_losing_a_request() {
    for balance in ["round-robin", "shared"] {
        let home = Home::loaded();
        let port = free_port();
        start_app(&home, "fastify.js", port, balance, &Node::installed());
        let load = Load::start(port, 8, Connections::OnePerRequest);
        home.ok(&["reload", "app"]);
        load.more(50);
        load.stop().lost_nothing(50);
    }
}

#[test]
fn socket_io_runs_unmodified_over_websockets() {
    for balance in ["round-robin", "shared"] {
        let home = Home::new();
        let port = free_port();
        let node = Node::installed();
        start_app(&home, "socketio.js", port, balance, &node);
        std::fs::copy(fixture("socketio-client.js"), home.work().join("client.js")).unwrap();
        let mut client = Command::new(&node.binary);
        home.environment(&mut client);
        client.arg("client.js").env("PORT", port.to_string());
        let run = run(client, PATIENT);
        assert_eq!(run.code, 0, "{run:?}");
        let answered = run.json();
        let pids: BTreeSet<String> = home.pids("app").iter().map(ToString::to_string).collect();
        for pid in answered.as_array().unwrap() {
            assert!(pids.contains(pid.as_str().unwrap()), "{answered} {pids:?}");
        }
        if balance == "round-robin" {
            assert_eq!(answered.as_array().unwrap().len(), 2, "both workers have clients");
        }
    }
}

#[test]
fn an_es_module_with_top_level_await_runs_as_a_worker() {
    let home = Home::new();
    let port = free_port();
    home.write(
        "app.mjs",
        "import { createServer } from 'node:http';\nawait new Promise((r) => setTimeout(r, 50));\n\
         createServer((q, r) => r.end('esm')).listen(Number(process.env.PORT), '127.0.0.1');\n",
    );
    home.start(&format!(
        "[[apps]]\nname = 'app'\nscript = 'app.mjs'\nexec_mode = 'cluster'\ninstances = 2\nenv = {{ PORT = '{port}' }}\n"
    ));
    assert_eq!(load::get(port, "/").unwrap().body, "esm");
    home.ok(&["reload", "app"]);
    assert_eq!(load::get(port, "/").unwrap().body, "esm");
}

// Compared with a genuine primary. --------------------------------------------------------------------------------

/// What the two workers of a probe reported, sorted by slot; order within a slot is kept.
fn reports(home: &Home, file: &str) -> Vec<String> {
    let text = wait_until(&format!("both workers are done in {file}"), PATIENT, || {
        let text = home.read(file);
        let done = text.lines().filter(|line| line.ends_with(" done")).count();
        if done >= 2 { Ok(text) } else { Err(text) }
    });
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    lines.sort_by_key(|line| line.split(' ').next().unwrap_or_default().to_owned());
    lines
}

/// A probe under a genuine primary or under `pm`, up to what its workers have reported.
struct Probed {
    reports: Vec<String>,
    _genuine: Option<genuine::Helper>,
}

fn under_genuine(home: &Home, probe: &str, balance: &str, node: &Node, variables: &[(&str, &str)]) -> Probed {
    let file = "genuine.report";
    home.write(file, "");
    let path = home.work_file(file);
    let mut all = variables.to_vec();
    all.push(("REPORT", &path));
    let policy = if balance == "shared" { "none" } else { "rr" };
    let primary = genuine::primary(home, node, &fixture(&format!("probes/{probe}")), 2, policy, &all);
    Probed { reports: reports(home, file), _genuine: Some(primary) }
}

fn under_pm(home: &Home, probe: &str, balance: &str, node: &Node, variables: &[(&str, &str)]) -> Probed {
    let file = "pm.report";
    home.write(file, "");
    let env: String = variables.iter().map(|(key, value)| format!("{key} = '{value}'\n")).collect();
    home.ecosystem(&format!(
        "[[apps]]\nname = 'probe'\nscript = '{}'\nexec_mode = 'cluster'\ninstances = 2\nbalance = '{balance}'\n\
         interpreter = '{}'\nautorestart = false\n[apps.env]\nREPORT = '{}'\n{env}",
        fixture(&format!("probes/{probe}")),
        node.binary,
        home.work_file(file)
    ));
    home.pm(&["start", "ecosystem.toml"]);
    Probed { reports: reports(home, file), _genuine: None }
}

/// Runs a probe under both, one after the other, in both modes and on both Nodes, and compares what it reports.
fn same_as_genuine(probe: &str, variables: &[(&str, &str)]) {
    for node in [Node::installed(), Node::other()] {
        for balance in ["round-robin", "shared"] {
            let home = Home::new();
            let expected = under_genuine(&home, probe, balance, &node, variables).reports;
            let seen = under_pm(&home, probe, balance, &node, variables).reports;
            assert_eq!(seen, expected, "{probe} {balance} {}", node.version);
        }
    }
}

#[test]
fn a_worker_knows_itself_as_under_a_genuine_primary() {
    same_as_genuine("identity.js", &[]);
}

#[test]
fn process_send_takes_what_it_takes_under_a_genuine_primary() {
    same_as_genuine("messages.js", &[]);
}

#[test]
fn worker_disconnect_goes_as_under_a_genuine_primary() {
    same_as_genuine("disconnect.js", &[("PORT", &free_port().to_string())]);
}

#[test]
fn worker_kill_goes_as_under_a_genuine_primary() {
    same_as_genuine("kill.js", &[]);
}

#[test]
fn a_socket_sent_to_the_primary_blocks_nothing() {
    same_as_genuine("handle.js", &[]);
}

#[test]
fn listening_again_and_elsewhere_goes_as_under_a_genuine_primary() {
    same_as_genuine(
        "relisten.js",
        &[("PORT0", &free_port().to_string()), ("PORT1", &free_port().to_string())],
    );
}

#[test]
fn a_port_in_use_is_reported_as_under_a_genuine_primary() {
    for node in [Node::installed(), Node::other()] {
        for balance in ["round-robin", "shared"] {
            let home = Home::new();
            let taken = free_port();
            let holder = genuine::port_holder(&home, taken);
            let variables = [("TAKEN", &*taken.to_string())];
            let expected = under_genuine(&home, "inuse.js", balance, &node, &variables).reports;
            assert!(expected[0].contains("EADDRINUSE"), "{expected:?}");
            let seen = under_pm(&home, "inuse.js", balance, &node, &variables).reports;
            assert_eq!(seen, expected, "{balance} {}", node.version);
            drop(holder);
        }
    }
}

#[test]
fn listening_twice_in_one_worker_is_refused_as_under_a_genuine_primary() {
    for node in [Node::installed(), Node::other()] {
        let home = Home::new();
        let port = free_port().to_string();
        let variables = [("PORT", port.as_str())];
        // In shared mode a genuine primary of Node 22 lets the worker die of an internal assertion, so both modes of
        // `pm` are held against its round robin.
        let expected = under_genuine(&home, "twice.js", "round-robin", &node, &variables).reports;
        for balance in ["round-robin", "shared"] {
            let seen = under_pm(&home, "twice.js", balance, &node, &variables).reports;
            assert_eq!(seen, expected, "{balance} {}", node.version);
            home.ok(&["delete", "all"]);
        }
    }
}

#[test]
fn port_0_is_one_port_per_server_shared_by_the_workers() {
    for balance in ["round-robin", "shared"] {
        let home = Home::new();
        let node = Node::installed();
        let shape = |reports: &[String]| {
            let port = |slot: &str, server: &str| {
                let start = format!("{slot} port {server} ");
                reports.iter().find_map(|line| line.strip_prefix(&start)?.parse::<u16>().ok()).unwrap()
            };
            let (a, b) = (port("0", "a"), port("0", "b"));
            (a == port("1", "a"), b == port("1", "b"), a == b, a > 0)
        };
        let expected = shape(&under_genuine(&home, "port0.js", balance, &node, &[]).reports);
        let probed = under_pm(&home, "port0.js", balance, &node, &[]);
        assert_eq!(shape(&probed.reports), expected, "{balance}");
        let port: u16 =
            probed.reports.iter().find_map(|l| l.strip_prefix("0 port b ")).unwrap().parse().unwrap();
        assert_eq!(load::get(port, "/").unwrap().body, "b");
    }
}

#[test]
fn udp_datagrams_are_answered_as_under_a_genuine_primary() {
    for balance in ["round-robin", "shared"] {
        let home = Home::new();
        let node = Node::installed();
        let port = free_port();
        let variables = [("PORT", port.to_string())];
        let variables: Vec<(&str, &str)> = variables.iter().map(|(k, v)| (*k, v.as_str())).collect();
        let answered = || {
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            socket.set_read_timeout(Some(secs(5))).unwrap();
            for n in 0..20 {
                let text = format!("hello {n}");
                socket.send_to(text.as_bytes(), ("127.0.0.1", port)).unwrap();
                let mut answer = [0; 100];
                let (length, _) = socket.recv_from(&mut answer).unwrap();
                assert!(String::from_utf8_lossy(&answer[..length]).starts_with(&text));
            }
        };
        let genuine = under_genuine(&home, "udp.js", balance, &node, &variables);
        answered();
        let expected = genuine.reports.clone();
        drop(genuine);
        let probed = under_pm(&home, "udp.js", balance, &node, &variables);
        answered();
        assert_eq!(probed.reports, expected);
    }
}

#[test]
fn pain_10_unix_paths_are_served_as_under_a_genuine_primary_and_over_reloads() {
    for balance in ["round-robin", "shared"] {
        let home = Home::new();
        let node = Node::installed();
        let path = home.work_file("app.sock");
        let target = || Target::Unix(path.clone().into());
        let genuine = under_genuine(&home, "unix.js", balance, &node, &[("SOCKET", &path)]);
        assert_eq!(load::get(target(), "/").unwrap().body, "over unix");
        let expected = genuine.reports.clone();
        drop(genuine);
        // A genuine primary that is killed leaves its socket file.
        let _ = std::fs::remove_file(&path);
        let probed = under_pm(&home, "unix.js", balance, &node, &[("SOCKET", &path)]);
        assert_eq!(probed.reports, expected);
        for _ in 0..3 {
            assert_eq!(load::get(target(), "/").unwrap().body, "over unix");
            home.ok(&["reload", "probe"]);
        }
        assert_eq!(load::get(target(), "/").unwrap().body, "over unix");
        home.ok(&["stop", "probe"]);
        load::get(target(), "/").unwrap_err();
    }
}

#[test]
fn a_worker_that_calls_disconnect_is_replaced() {
    let home = Home::new();
    let port = free_port();
    home.write(
        "app.js",
        "const { worker } = require('cluster');\n\
         require('http').createServer((q, r) => {\n\
           r.setHeader('x-pid', process.pid); r.end('bye');\n\
           if (q.url === '/leave') worker.disconnect();\n\
         }).listen(Number(process.env.PORT), '127.0.0.1');\n",
    );
    home.start(&format!(
        "[[apps]]\nname = 'app'\nscript = 'app.js'\nexec_mode = 'cluster'\ninstances = 1\nenv = {{ PORT = '{port}' }}\n"
    ));
    let old = home.pid("app");
    load::get(port, "/leave").unwrap();
    // Clients wait for the successor: the listener stays.
    let reply = wait_until("the successor answers", SOON, || {
        let reply = load::get(port, "/").map_err(|failure| format!("{failure:?}"))?;
        if reply.header("x-pid") == old.to_string() { Err("still the old one".to_owned()) } else { Ok(reply) }
    });
    assert_eq!(reply.body, "bye");
    let row = home.wait_row("app", "online again", |row| row.status == "online" && row.pid != old);
    assert_eq!(row.env("exit_code"), 0);
}

#[test]
fn worker_ids_are_unique_over_reloads() {
    let home = Home::new();
    let port = free_port();
    home.write(
        "app.js",
        "require('fs').appendFileSync('ids', require('cluster').worker.id + '\\n');\n\
         require('http').createServer((q, r) => r.end('x')).listen(Number(process.env.PORT), '127.0.0.1');\n",
    );
    home.start(&format!(
        "[[apps]]\nname = 'app'\nscript = 'app.js'\nexec_mode = 'cluster'\ninstances = 2\nenv = {{ PORT = '{port}' }}\n"
    ));
    home.ok(&["reload", "app"]);
    let ids = home.read("ids");
    let different: BTreeSet<&str> = ids.lines().collect();
    assert_eq!((ids.lines().count(), different.len()), (4, 4), "{ids}");
    assert!(different.iter().all(|id| id.parse::<u64>().is_ok_and(|id| id >= 1)), "{ids}");
}

#[test]
fn pain_07_connections_wait_while_the_only_worker_restarts() {
    let home = Home::new();
    let port = free_port();
    home.start(&format!(
        "[[apps]]\nname = 'app'\nscript = '{}'\nexec_mode = 'cluster'\ninstances = 1\nenv = {{ PORT = '{port}' }}\n",
        fixture("web-plain.js")
    ));
    let old = home.pid("app");
    super::support::process::end(old);
    // Sent into the gap: neither refused nor reset.
    for _ in 0..5 {
        assert!(load::get(port, "/").unwrap().body.starts_with("ok "));
    }
    assert_ne!(home.pid("app"), old);
}

#[test]
fn a_port_that_the_app_has_closed_is_free_for_others_and_can_be_taken_again() {
    let home = Home::new();
    let (port, other) = (free_port(), free_port());
    home.write(
        "app.js",
        "const http = require('http');\n\
         const main = http.createServer((q, r) => r.end('main'));\n\
         const listen = () => main.listen(Number(process.env.PORT), '127.0.0.1');\n\
         listen();\n\
         process.on('SIGUSR2', () => main.listening ? main.close() : listen());\n\
         http.createServer((q, r) => r.end('other')).listen(Number(process.env.OTHER), '127.0.0.1');\n",
    );
    home.start(&format!(
        "[[apps]]\nname = 'app'\nscript = 'app.js'\nexec_mode = 'cluster'\ninstances = 2\n\
         env = {{ PORT = '{port}', OTHER = '{other}' }}\n"
    ));
    assert_eq!(load::get(port, "/").unwrap().body, "main");
    let toggle = || {
        for pid in home.pids("app") {
            super::support::process::signal(pid, nix::sys::signal::Signal::SIGUSR2);
        }
    };
    toggle();
    let taken = wait_until("the port is free", PATIENT, || {
        std::net::TcpListener::bind(("127.0.0.1", port)).map_err(|error| error.to_string())
    });
    assert_eq!(load::get(other, "/").unwrap().body, "other");
    drop(taken);
    toggle();
    let again = wait_until("it listens again", SOON, || {
        load::get(port, "/").map_err(|failure| format!("{failure:?}"))
    });
    assert_eq!(again.body, "main");
}
