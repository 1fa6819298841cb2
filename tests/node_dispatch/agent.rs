//! The agent inside of a worker: signal handlers, keep-alive connections, and how a worker ends with it.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal as Sig;
use pm::dispatch::{ChannelKind, Command, DispatchEvent, Idle};
use pm::model::signal::Signal;
use pm::model::spec::Balance;

use super::world::{PATIENCE, World, drain, free_port, instance, nodes};

#[test]
fn the_agent_counts_signal_handlers() {
    for node in nodes() {
        let mut world = World::new(&node);
        for (slot, (scenario, expected)) in [("http", 0), ("graceful", 1)].into_iter().enumerate() {
            let id = instance("web", u32::try_from(slot).unwrap(), 1);
            let kind = ChannelKind::Cluster { balance: Balance::RoundRobin, configured: Vec::new() };
            world.spawn(&id, kind, true, &[scenario]);
            world.wait("ready", |log| log.ready.contains(&id).then_some(()));
            world.wait_event("hello", |event| {
                matches!(event, DispatchEvent::AgentHello { id: who, version } if *who == id && version.starts_with('v'))
            });
            world.handle.send(Command::AskKillListeners { id: id.clone(), signal: Signal::INT });
            world.wait_event("count", |event| {
                matches!(event, DispatchEvent::KillListeners { id: who, signal: Signal::INT, count }
                    if *who == id && *count == expected)
            });
        }
    }
}

/// A keep-alive connection.
struct KeepAlive(TcpStream);

impl KeepAlive {
    fn new(port: u16) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(stream)
    }

    fn ask(&mut self, path: &str) {
        write!(self.0, "GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    }

    /// The head of one answer, its body read.
    fn head(&mut self) -> String {
        let mut text = String::new();
        let mut byte = [0];
        while !text.ends_with("\r\n\r\n") {
            assert_eq!(self.0.read(&mut byte).unwrap(), 1, "connection ended after {text:?}");
            text.push(char::from(byte[0]));
        }
        let text = text.to_lowercase();
        let length =
            text.lines().find_map(|line| line.strip_prefix("content-length: ")).map(|n| n.parse().unwrap());
        self.0.read_exact(&mut vec![0; length.unwrap()]).unwrap();
        text
    }

    fn is_closed(&mut self) -> bool {
        self.0.read(&mut [0]).unwrap_or(0) == 0
    }
}

#[test]
fn the_agent_drains_keep_alive_connections_without_cutting_one() {
    for node in nodes() {
        for (kind, name) in
            [(Some(Balance::RoundRobin), "round robin"), (Some(Balance::Shared), "shared"), (None, "fork")]
        {
            let mut world = World::new(&node);
            let id = instance("web", 0, 1);
            let (child, port) = match kind {
                Some(balance) => {
                    let kind = ChannelKind::Cluster { balance, configured: Vec::new() };
                    let child = world.spawn(&id, kind, true, &["graceful"]);
                    world.up(&id);
                    (child, world.port())
                }
                None => {
                    let port = free_port();
                    let child = world.spawn(&id, ChannelKind::Plain, true, &["graceful", &port.to_string()]);
                    world.wait("ready", |log| log.ready.contains(&id).then_some(()));
                    (child, port)
                }
            };
            let (mut idle, mut busy) = (KeepAlive::new(port), KeepAlive::new(port));
            idle.ask("/");
            assert!(idle.head().contains("connection: keep-alive"));
            busy.ask("/?ms=300");
            world.handle.send(Command::TakeOut { id: id.clone() });
            // The slow request has reached the app once the other connection got a later one answered.
            idle.ask("/?ms=50");
            assert!(idle.head().contains("connection: keep-alive"), "{name}");
            let within = Duration::from_secs(10);
            world.handle.send(Command::Drain { id: id.clone(), drain: drain(Idle::Wait, within) });
            assert!(busy.head().contains("connection: close"), "{node:?} {name}");
            assert!(busy.is_closed());
            // The idle one may ask once more, and is told to go.
            assert!(
                world.log.0.lock().unwrap().find(|e| matches!(e, DispatchEvent::Drained { .. })).is_none()
            );
            idle.ask("/");
            assert!(idle.head().contains("connection: close"), "{node:?} {name}");
            assert!(idle.is_closed());
            world.wait_event("drained", |event| matches!(event, DispatchEvent::Drained { .. }));
            // The process still lives, and its own handler works as if nothing had happened.
            assert!(world.children[child].try_wait().unwrap().is_none(), "{node:?} {name}");
            world.signal(child, Sig::SIGINT);
            assert_eq!(world.message(&id, "closed")["closed"], true);
            assert_eq!(world.exited(child, PATIENCE), Some(0));
        }
    }
}

#[test]
fn the_agent_closes_idle_connections_at_once_when_nobody_else_serves() {
    for node in nodes() {
        let mut world = World::new(&node);
        let id = instance("web", 0, 1);
        let kind = ChannelKind::Cluster { balance: Balance::RoundRobin, configured: Vec::new() };
        world.spawn(&id, kind, true, &["http"]);
        world.up(&id);
        let mut idle = KeepAlive::new(world.port());
        idle.ask("/");
        idle.head();
        let asked = Instant::now();
        let within = Duration::from_secs(10);
        world.handle.send(Command::Drain { id: id.clone(), drain: drain(Idle::CloseNow, within) });
        assert!(idle.is_closed());
        world.wait_event("drained", |event| matches!(event, DispatchEvent::Drained { .. }));
        assert!(asked.elapsed_since() < Duration::from_secs(3), "{node:?}");
    }
}

trait ElapsedSince {
    fn elapsed_since(&self) -> Duration;
}

impl ElapsedSince for Instant {
    fn elapsed_since(&self) -> Duration {
        Self::now().saturating_duration_since(*self)
    }
}

#[test]
fn the_agent_does_not_keep_a_process_alive() {
    for node in nodes() {
        let mut world = World::new(&node);
        let id = instance("script", 0, 1);
        let child = world.spawn(&id, ChannelKind::Plain, true, &["script"]);
        assert_eq!(world.exited(child, PATIENCE), Some(0), "{node:?}");
    }
}
