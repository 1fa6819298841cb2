//! The Node agent: what it tells, what it lets connections do, and that nobody notices it.

use std::io::{Read, Write};
use std::net::TcpStream;

use serde_json::Value;

use super::support::home::Running;
use super::support::load;
use super::support::node::Node;
use super::support::{Home, PATIENT, SOON, fixture, free_port, millis, process, secs, wait_until};

// Unnoticed. ------------------------------------------------------------------------------------------------------

/// What the app saw, with the agent or without, and how it ended.
fn seen(home: &Home, node: &Node, agent: bool) -> Value {
    let out = home.work_file(&format!("seen-{agent}"));
    let _ = std::fs::remove_file(&out);
    home.ecosystem(&format!(
        "[[apps]]\nname = 'looks'\nscript = '{}'\ninterpreter = '{}'\nautorestart = false\nagent = {agent}\n\
         args = ['one', 'two']\ninterpreter_args = ['--max-http-header-size=9000']\nenv = {{ OUT = '{out}' }}\n",
        fixture("looks-around.js"),
        node.binary
    ));
    // It may have ended before anybody could see it run.
    home.pm(&["start", "ecosystem.toml"]);
    // Nothing keeps it alive when it has nothing more to do.
    let row = home.wait_row("looks", "stopped", |row| row.status == "stopped");
    assert_eq!(row.env("exit_code"), 0, "{}", home.log("looks-error-0.log"));
    assert_eq!(home.log("looks-error-0.log"), "", "no warning");
    let text = std::fs::read_to_string(&out).unwrap();
    home.ok(&["delete", "looks"]);
    serde_json::from_str(&text.replace(&format!("seen-{agent}"), "seen")).unwrap()
}

#[test]
fn an_app_that_does_not_look_for_the_agent_cannot_tell_the_difference() {
    for node in [Node::installed(), Node::other()] {
        let home = Home::new();
        let (without, with) = (seen(&home, &node, false), seen(&home, &node, true));
        for part in ["alone", "listening"] {
            for (what, expected) in without[part].as_object().unwrap() {
                // The only trace: the text of a function that the app has no reason to print.
                let expected = if what == "patched" { &Value::Bool(true) } else { expected };
                assert_eq!(&with[part][what], expected, "{} {part} {what}", node.version);
            }
        }
        assert_eq!(with["response"], without["response"]);
        for inner in ["thread", "child"] {
            assert_eq!(with[inner], without[inner], "{} {inner}", node.version);
            assert_eq!(with[inner]["patched"], false, "{} {inner}", node.version);
        }
    }
}

#[test]
fn agent_false_switches_it_off_and_describe_says_which_promise_is_weaker() {
    let home = Home::new();
    let port = free_port();
    home.start(&format!(
        "[[apps]]\nname = 'web'\nscript = '{}'\nexec_mode = 'cluster'\nagent = false\nenv = {{ PORT = '{port}' }}\n",
        fixture("web-plain.js")
    ));
    load::get(port, "/").unwrap();
    assert!(!process::cmdline(home.pid("web")).iter().any(|arg| arg == "--require"));
    let described = home.ok(&["describe", "web"]);
    described.says("agent = false: weaker is promise 1, a reload loses nothing");
    described.does_not_say("event loop delay");
    assert_eq!(home.row("web").env("axm_monitor"), &serde_json::json!({}));
}

// Figures. --------------------------------------------------------------------------------------------------------

#[test]
fn describe_jlist_and_list_wide_show_the_inside_of_a_node_process() {
    let home = Home::new();
    let port = free_port();
    home.write(
        "app.js",
        &format!("global.kept = Buffer.alloc(3e6, 1);\nrequire('{}');\n", fixture("web-plain.js")),
    );
    home.start(&format!(
        "[[apps]]\nname = 'web'\nscript = 'app.js'\nexec_mode = 'cluster'\nenv = {{ PORT = '{port}' }}\n"
    ));
    // Before anything was asked of it, and at once.
    let metrics = home.row("web").env("axm_monitor").clone();
    assert!(metrics["HTTP"].is_null(), "no request yet: {metrics}");
    for _ in 0..20 {
        load::get(port, "/").unwrap();
    }
    let open: Vec<TcpStream> = (0..3).map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap()).collect();
    let metrics = wait_until("three connections are open and the loop is measured", SOON, || {
        let metrics = home.row("web").env("axm_monitor").clone();
        let there = metrics["Open connections"]["value"] == 3 && !metrics["Event Loop Latency p99"].is_null();
        if there { Ok(metrics) } else { Err(metrics) }
    });
    let number = |name: &str| {
        let value = &metrics[name]["value"];
        value.as_f64().or_else(|| value.as_str()?.parse().ok()).unwrap_or_else(|| panic!("{name}: {metrics}"))
    };
    // PM2's names, units and kinds of values.
    for (name, unit, kind) in [
        ("Used Heap Size", "MiB", "internal/v8/heap/used"),
        ("Heap Usage", "%", "internal/v8/heap/usage"),
        ("Heap Size", "MiB", "internal/v8/heap/total"),
        ("Event Loop Latency", "ms", "internal/libuv/latency/p50"),
        ("Event Loop Latency p95", "ms", "internal/libuv/latency/p95"),
        ("HTTP", "req/min", "internal/http/builtin/reqs"),
        ("HTTP Mean Latency", "ms", "internal/http/builtin/latency/p50"),
        ("HTTP P95 Latency", "ms", "internal/http/builtin/latency/p95"),
    ] {
        assert_eq!((&metrics[name]["unit"], &metrics[name]["type"]), (&unit.into(), &kind.into()), "{name}");
    }
    assert!(metrics["Used Heap Size"]["value"].is_string(), "as in PM2: {metrics}");
    let (used, all) = (number("Used Heap Size"), number("Heap Size"));
    assert!(used > 1.0 && used <= all && all < 200.0, "{metrics}");
    assert!((number("Heap Usage") - used / all * 100.0).abs() < 1.0, "{metrics}");
    assert!(number("External Memory") >= 2.8 && number("Array Buffers") >= 2.8, "{metrics}");
    assert!(number("Active handles") >= 4.0, "three sockets and the channel: {metrics}");
    // The fixture takes 5 ms for an answer.
    assert!(number("HTTP Mean Latency") >= 4.5, "{metrics}");
    assert!(number("HTTP P95 Latency") >= number("HTTP Mean Latency"), "{metrics}");
    assert!(number("HTTP") >= 20.0, "20 requests within a minute: {metrics}");
    drop(open);
    let described = home.ok(&["describe", "web"]);
    for what in ["heap", "external memory", "event loop delay", "open connections", "http latency"] {
        described.says(what);
    }
    let wide = home.ok(&["list", "--wide"]);
    for title in ["heap", "loop p99", "conns", "req/s", "p95"] {
        wide.says(title);
    }
    home.ok(&["list"]).does_not_say("loop p99");
}

#[test]
fn a_blocked_event_loop_holds_up_no_table_and_describe_says_so() {
    let home = Home::new();
    let app = "process.on('SIGUSR2', () => {\n\
         require('fs').writeFileSync('blocked', 'yes');\n\
         Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 60000);\n});\n\
         setInterval(() => {}, 1000);\n";
    home.write("app.js", app);
    home.start("[[apps]]\nname = 'job'\nscript = 'app.js'\nmin_uptime = '100ms'\nkill_timeout = '200ms'\n");
    home.ok(&["describe", "job"]).says("event loop delay");
    process::signal(home.pid("job"), nix::sys::signal::Signal::SIGUSR2);
    home.file_with("blocked", "yes");
    let described = wait_until("describe misses the agent", SOON, || {
        let run = home.ok(&["describe", "job"]);
        if run.out.contains("the agent did not answer") { Ok(run) } else { Err(run) }
    });
    described.does_not_say("event loop delay");
    for _ in 0..5 {
        let run = home.ok(&["jlist"]);
        assert!(run.took < secs(2), "{run:?}");
    }
    assert_eq!(home.row("job").env("axm_monitor"), &serde_json::json!({}));
    assert_eq!(home.row("job").status, "online");
}

// Websockets. -----------------------------------------------------------------------------------------------------

/// A websocket client that has its handshake behind it.
struct Websocket(TcpStream);

impl Websocket {
    fn open(port: u16) -> Self {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_read_timeout(Some(PATIENT)).unwrap();
        write!(
            stream,
            "GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        .unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(Self::byte(&mut stream).expect("the end of the handshake"));
        }
        Self(stream)
    }

    fn byte(stream: &mut TcpStream) -> Option<u8> {
        let mut byte = [0];
        (stream.read(&mut byte).unwrap_or(0) == 1).then_some(byte[0])
    }

    /// Whether the server answers.
    fn echoes(&mut self) -> bool {
        self.0.write_all(&[0x81]).is_ok() && Self::byte(&mut self.0) == Some(0x81)
    }
}

fn websocket_app(home: &Home, port: u16, keys: &str) {
    home.start(&format!(
        "[[apps]]\nname = 'chat'\nscript = '{}'\nexec_mode = 'cluster'\ninstances = 1\n{keys}\n",
        fixture("websocket.js")
    ));
    wait_until("it answers", PATIENT, || load::get(port, "/"));
}

#[test]
fn drain_websockets_closes_them_with_1001_and_the_reload_does_not_wait_for_kill_timeout() {
    for handler in ["", ", HANDLER = 'yes'"] {
        let home = Home::new();
        let port = free_port();
        let keys = format!("drain_websockets = true\nenv = {{ PORT = '{port}'{handler} }}");
        websocket_app(&home, port, &keys);
        let mut client = Websocket::open(port);
        assert!(client.echoes());
        let old = home.pid("chat");
        let reload = Running::start(home.command(&["reload", "chat"]), b"");
        let frame: Vec<u8> = (0..4).map_while(|_| Websocket::byte(&mut client.0)).collect();
        assert_eq!(frame, [0x88, 2, 0x03, 0xe9], "a close frame with 1001, going away");
        // The client says close, too (masked with zeros), and the server ends the connection.
        client.0.write_all(&[0x88, 0x82, 0, 0, 0, 0, 0x03, 0xe9]).unwrap();
        assert_eq!(Websocket::byte(&mut client.0), None);
        drop(client);
        let run = reload.end(PATIENT);
        assert_eq!(run.code, 0, "{run:?}");
        run.does_not_say("killed after");
        assert!(!process::alive(old));
    }
}

#[test]
fn pain_08_a_worker_with_an_open_websocket_drains_until_kill_timeout_and_the_reload_says_that_it_was_killed()
{
    let home = Home::new();
    let apps = [("plain", "", free_port()), ("handler", "HANDLER = 'yes', ", free_port())];
    let config: String = apps
        .iter()
        .map(|(name, handler, port)| {
            format!(
                "[[apps]]\nname = '{name}'\nscript = '{}'\nexec_mode = 'cluster'\ninstances = 1\n\
                 kill_timeout = '12s'\nenv = {{ {handler}PORT = '{port}' }}\n",
                fixture("websocket.js")
            )
        })
        .collect();
    home.start(&config);
    let mut draining: Vec<_> = apps
        .iter()
        .map(|(name, _, port)| {
            wait_until("it answers", PATIENT, || load::get(*port, "/"));
            let client = Websocket::open(*port);
            let old = home.pid(name);
            (*name, *port, client, old, Running::start(home.command(&["reload", name]), b""))
        })
        .collect();
    wait_until("the table says how long both may drain", SOON, || {
        let table = home.ok(&["list"]).out;
        let left = |line: &&str| (0..=12).any(|left| line.contains(&format!("draining 1 ({left} s left)")));
        if table.lines().filter(left).count() == 2 { Ok(()) } else { Err(table) }
    });
    for (name, port, client, old, _) in &mut draining {
        // The old one still talks to its client, and the new one serves.
        assert!(client.echoes(), "{name}: left alone until kill_timeout");
        assert!(process::alive(*old), "{name}");
        assert_eq!(load::get(*port, "/").unwrap().body, "ok", "{name}");
    }
    for (name, _, mut client, old, reload) in draining {
        let run = reload.end(PATIENT);
        assert_eq!(run.code, 0, "{run:?}");
        run.says("1 worker force-killed after ");
        assert!(run.took >= millis(11_900), "{name}: {run:?}");
        assert_eq!(Websocket::byte(&mut client.0), None, "{name}");
        assert!(!process::alive(old), "{name}");
    }
}

#[test]
fn an_open_websocket_does_not_hold_up_a_stop_of_an_app_without_a_handler() {
    let home = Home::new();
    let port = free_port();
    websocket_app(&home, port, &format!("env = {{ PORT = '{port}' }}"));
    let mut client = Websocket::open(port);
    assert!(client.echoes());
    let run = home.ok(&["stop", "chat"]);
    run.does_not_say("killed after");
    // kill_timeout is 10 s, and nobody is there who would take the client over.
    assert!(run.took < secs(8), "{run:?}");
    assert_eq!(Websocket::byte(&mut client.0), None);
}
