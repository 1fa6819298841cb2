//! Reloads under clients that keep their connections: HTTP, HTTPS and HTTP/2, with every kind of signal handler.
//!
//! The clients (tests/fixtures/load/keepalive.js) never retry. `bench/keepalive.py` does the same with more of
//! everything: 50 reloads, 1 to 512 connections, every Node, and PM2 beside it.

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};

use serde_json::Value;

use super::support::home::Running;
use super::support::node::Node;
use super::support::{Home, PATIENT, fixture, free_port, load, process, wait_until};

const FAILURES: [&str; 4] = ["refused", "reset", "truncated", "stalled"];

/// Clients of one app.
struct Clients {
    child: Child,
    input: Option<ChildStdin>,
    seen: Arc<Mutex<Value>>,
}

impl Clients {
    /// `idle`: half of the pauses between two requests of a connection are up to this long, in ms.
    fn start(home: &Home, kind: &str, port: u16, connections: u32, idle: u32) -> Self {
        let mut command = Command::new(Node::installed().binary);
        home.environment(&mut command);
        let options =
            serde_json::json!({ "kind": kind, "port": port, "connections": connections, "idle": idle });
        let script = fixture("../load/keepalive.js");
        command.args([script, options.to_string()]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (input, output) = (child.stdin.take(), child.stdout.take().unwrap());
        let seen = Arc::new(Mutex::new(Value::Null));
        let last = Arc::clone(&seen);
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                *last.lock().unwrap() = serde_json::from_str(&line).unwrap();
            }
        });
        Self { child, input, seen }
    }

    fn seen(&self) -> Value {
        self.seen.lock().unwrap().clone()
    }

    fn requests(&self) -> u64 {
        self.seen()["requests"].as_u64().unwrap_or(0)
    }

    fn failed(seen: &Value) -> u64 {
        FAILURES.iter().map(|what| seen[what].as_u64().unwrap_or(1)).sum()
    }

    /// Waits until so many more are answered.
    fn more(&self, requests: u64) {
        let before = self.requests();
        wait_until("more answers", PATIENT, || {
            if self.requests() >= before + requests { Ok(()) } else { Err(self.seen()) }
        });
    }

    fn stop(mut self) -> Value {
        drop(self.input.take());
        wait_until("the clients end", PATIENT, || match self.child.try_wait() {
            Ok(Some(status)) => Ok(status),
            _ => Err(self.seen()),
        });
        // The reader may be a line behind.
        let done = |seen: &Value| seen["requests"].as_u64().is_some();
        wait_until(
            "their last words",
            PATIENT,
            || if done(&self.seen()) { Ok(()) } else { Err(self.seen()) },
        );
        self.seen()
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        // Gone already, unless the test has failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The apps of one home, one for each kind and handler, with clients on each.
struct Site {
    home: Home,
    apps: Vec<(String, Clients)>,
}

impl Site {
    fn start(node: &Node, kinds: &[(&str, &str)], connections: u32, idle: u32) -> Self {
        let home = Home::loaded();
        let mut config = String::new();
        let mut ports = Vec::new();
        for (kind, handler) in kinds {
            let port = free_port();
            ports.push(port);
            config.push_str(&format!(
                "[[apps]]\nname = '{kind}-{handler}'\nscript = '{}'\ninterpreter = '{}'\nexec_mode = 'cluster'\n\
                 instances = 2\nenv = {{ PORT = '{port}', KIND = '{kind}', HANDLER = '{handler}' }}\n",
                fixture("web-kinds.js"),
                node.binary
            ));
        }
        home.start(&config);
        let apps = kinds
            .iter()
            .zip(ports)
            .map(|((kind, handler), port)| {
                (format!("{kind}-{handler}"), Clients::start(&home, kind, port, connections, idle))
            })
            .collect();
        Self { home, apps }
    }

    fn all_answer(&self, requests: u64) {
        self.apps.iter().for_each(|(_, clients)| clients.more(requests));
    }

    /// All apps at the same time.
    fn reload(&self, times: u32) {
        for _ in 0..times {
            let reloads: Vec<Running> = self
                .apps
                .iter()
                .map(|(name, _)| Running::start(self.home.command(&["reload", name]), b""))
                .collect();
            for reload in reloads {
                let run = reload.end(PATIENT);
                assert_eq!(run.code, 0, "{run:?}");
                run.does_not_say("killed after");
            }
        }
    }
}

const KINDS: [(&str, &str); 4] =
    [("http", "naive"), ("https", "textbook"), ("http2", "none"), ("h2c", "textbook")];

fn nothing_is_lost(node: &Node, connections: u32, idle: u32, times: u32, at_least: u64) {
    let site = Site::start(node, &KINDS, connections, idle);
    // The same clients without a reload.
    site.all_answer(100);
    for (name, clients) in &site.apps {
        let seen = clients.seen();
        assert_eq!(Clients::failed(&seen), 0, "{name} before the first reload: {seen}");
    }
    site.reload(times);
    site.all_answer(50);
    let mut requests = 0;
    for (name, clients) in site.apps {
        let seen = clients.stop();
        eprintln!("{} {name}: {seen}", node.version);
        assert_eq!(Clients::failed(&seen), 0, "{} {name}: {seen}", node.version);
        requests += seen["requests"].as_u64().unwrap();
    }
    assert!(requests >= at_least, "only {requests} requests");
}

#[test]
fn pain_03_reloads_lose_no_keep_alive_request_over_http_https_and_http2() {
    nothing_is_lost(&Node::installed(), 16, 200, 3, 1000);
}

#[test]
fn pain_03_reloads_lose_no_keep_alive_request_on_every_other_node() {
    for node in Node::others() {
        nothing_is_lost(&node, 16, 200, 1, 1000);
    }
}

#[test]
fn connections_that_are_idle_for_seconds_at_a_reload_lose_nothing() {
    nothing_is_lost(&Node::installed(), 64, 4000, 1, 400);
}

#[test]
fn control_workers_killed_without_the_ladder_lose_keep_alive_requests() {
    let site = Site::start(&Node::installed(), &KINDS, 16, 400);
    site.all_answer(50);
    for (name, clients) in site.apps {
        let failed = wait_until("the clients notice", PATIENT, || {
            site.home.pids(&name).into_iter().filter(|pid| *pid > 0).for_each(process::end);
            let seen = clients.seen();
            if Clients::failed(&seen) > 0 { Ok(Clients::failed(&seen)) } else { Err(seen) }
        });
        eprintln!("{name}: {failed} failed");
    }
}

#[test]
fn requests_of_8_seconds_in_flight_at_a_reload_are_answered_in_full_whatever_the_handler() {
    let home = Home::new();
    let mut config = String::new();
    let mut apps = Vec::new();
    for handler in ["textbook", "naive", "none"] {
        let port = free_port();
        config.push_str(&format!(
            "[[apps]]\nname = '{handler}'\nscript = '{}'\nexec_mode = 'cluster'\ninstances = 1\nmerge_logs = true\n\
             env = {{ PORT = '{port}', HANDLER = '{handler}' }}\n",
            fixture("web-kinds.js")
        ));
        apps.push((handler, port));
    }
    home.start(&config);
    for (_, port) in &apps {
        wait_until("it answers", PATIENT, || load::get(*port, "/"));
    }
    let slow: Vec<_> = apps
        .iter()
        .map(|(handler, port)| {
            let (handler, port) = (*handler, *port);
            let old = home.pid(handler);
            (handler, old, std::thread::spawn(move || load::get(port, "/slow?ms=8000")))
        })
        .collect();
    for (handler, _, _) in &slow {
        home.log_with(&format!("{handler}-out.log"), "in flight");
    }
    let reloads: Vec<Running> =
        apps.iter().map(|(handler, _)| Running::start(home.command(&["reload", handler]), b"")).collect();
    for reload in reloads {
        let run = reload.end(PATIENT);
        assert_eq!(run.code, 0, "{run:?}");
        run.does_not_say("killed after");
    }
    for (handler, old, request) in slow {
        let reply = request.join().unwrap().unwrap_or_else(|failure| panic!("{handler}: {failure:?}"));
        assert_eq!(reply.header("x-pid"), old.to_string(), "{handler}: by the old one");
        assert!(reply.body.ends_with(" end\n"), "{handler}: {}", reply.body.len());
    }
}
