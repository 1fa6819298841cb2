//! Messages of any size and sense, in both directions, and handles.

use std::io::Read;
use std::net::TcpStream;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use pm::dispatch::{self, ChannelKind, Command, DispatchEvent, EVENTS};
use pm::model::spec::Balance;
use serde_json::Value;

use super::world::{Log, PATIENCE, World, instance, nodes};

#[test]
fn any_message_is_harmless() {
    for node in nodes() {
        for cluster in [true, false] {
            let mut world = World::new(&node);
            let id = instance("web", 0, 1);
            let balance = Balance::RoundRobin;
            let kind = || match cluster {
                true => ChannelKind::Cluster { balance, configured: Vec::new() },
                false => ChannelKind::Plain,
            };
            world.spawn(&id, kind(), false, &["anything"]);
            world.wait("ready", |log| log.ready.contains(&id).then_some(()));
            for json in ["null", "7", "{\"a\":\n1}"] {
                world.handle.send(Command::SendMessage { id: id.clone(), json: json.to_owned() });
            }
            world.handle.send(Command::SendShutdown { id: id.clone() });
            world.wait("echo", |log| log.messages(&id).iter().any(|m| m["echo"] == "shutdown").then_some(()));
            let echoes: Vec<Value> = world.log.0.lock().unwrap().messages(&id);
            assert!(echoes.contains(&serde_json::json!({"echo": {"a": 1}})), "{echoes:?}");
            assert!(echoes.contains(&Value::Null));
            assert!(world.children[0].try_wait().unwrap().is_none(), "{node:?}");
        }
    }
}

#[test]
fn messages_of_3_mb_pass_and_lines_of_100_mb_are_skipped() {
    for node in nodes() {
        let mut world = World::new(&node);
        let id = instance("big", 0, 1);
        world.spawn(&id, ChannelKind::Plain, false, &["big", "3000000"]);
        world.wait("ready", |log| log.ready.contains(&id).then_some(()));
        world.wait_event("the message", |event| {
            matches!(event, DispatchEvent::UserMessage { message, .. }
                if message.length() == 3_000_002 && message.bytes().len() == dispatch::MESSAGE_KEPT)
        });
        // And back: the worker reads all of it, in order.
        let text = "0123456789".repeat(300_000);
        let json = format!("\"{text}\"");
        world.handle.send(Command::SendMessage { id: id.clone(), json });
        assert_eq!(world.message(&id, "length")["length"], 3_000_000);

        let huge = instance("big", 1, 1);
        world.spawn(&huge, ChannelKind::Plain, false, &["big", "104857600"]);
        world.wait_event("the skipped line", |event| {
            matches!(event, DispatchEvent::LongLineSkipped { bytes: 104_857_602, total: 1, .. })
        });
        world.wait("ready", |log| log.ready.contains(&huge).then_some(()));
    }
}

#[test]
fn a_worker_that_talks_without_end_costs_bounded_memory() {
    let mut world = World::new(Path::new("node"));
    let id = instance("chatty", 0, 1);
    // The log of this test keeps every message, as a driver would that has stopped reading.
    world.spawn(&id, ChannelKind::Plain, false, &["chatty", "400"]);
    world.wait("ready", |log| log.ready.contains(&id).then_some(()));
    let lost = world.stats().instances[0].messages_lost;
    assert!(lost >= 200, "{lost} of 400 messages of 64 KiB were dropped");
}

#[test]
fn a_worker_that_does_not_read_costs_bounded_memory() {
    let mut world = World::new(Path::new("node"));
    let id = instance("deaf", 0, 1);
    world.spawn(&id, ChannelKind::Plain, false, &["deaf", "1500"]);
    world.wait("ready", |log| log.ready.contains(&id).then_some(()));
    let json = format!("\"{}\"", "x".repeat(1024 * 1024));
    for _ in 0..40 {
        world.handle.send(Command::SendMessage { id: id.clone(), json: json.clone() });
    }
    world.wait_event("a dropped message", |event| matches!(event, DispatchEvent::MessageDropped { .. }));
    world.wait("the queue to drain", |_| (world.stats().instances.first()?.queued == 0).then_some(()));
    world.handle.send(Command::SendMessage { id: id.clone(), json: r#"{"last":1}"#.to_owned() });
    world.message(&id, "last");
}

#[test]
fn a_worker_that_asks_and_does_not_read_costs_bounded_memory() {
    let mut world = World::new(Path::new("node"));
    let id = instance("asks", 0, 1);
    world.spawn(&id, ChannelKind::Plain, false, &["asks", "400"]);
    // Everything it asked has been read; it reads none of the 8 MB that answer.
    world.message(&id, "asked");
    let stats = world.stats().instances[0].clone();
    assert!(stats.queued <= 60 && stats.messages_lost >= 300, "{stats:?}");
    // It is not cut off.
    world.wait("the queue to drain", |_| (world.stats().instances.first()?.queued == 0).then_some(()));
    world.handle.send(Command::SendMessage { id: id.clone(), json: r#"{"last":1}"#.to_owned() });
    world.message(&id, "last");
}

#[test]
fn a_worker_that_makes_events_without_end_costs_bounded_memory_and_none_is_lost() {
    const ONLINES: usize = 3 * EVENTS;
    let mut world = World::new(Path::new("node"));
    let id = instance("web", 0, 1);
    // The driver hangs at the first of them.
    world.stuck.hearing.store(true, Ordering::Relaxed);
    world.worker(&id, Balance::RoundRobin, &["onlines", &ONLINES.to_string()]);
    world.wait("the driver to be far behind", |_| (world.stats().events_waiting >= EVENTS).then_some(()));
    let limit = Instant::now() + Duration::from_millis(300);
    while Instant::now() < limit {
        let waiting = world.stats().events_waiting;
        assert!(waiting <= EVENTS + 2_000, "{waiting}");
        std::thread::park_timeout(Duration::from_millis(5));
    }
    world.stuck.hearing.store(false, Ordering::Relaxed);
    world.message(&id, "done");
    let told = |log: &Log| {
        let onlines = log.events.iter().filter(|event| matches!(event, DispatchEvent::Online { .. }));
        (onlines.count() == ONLINES + 1).then_some(())
    };
    world.wait("all of them", told);
}

#[test]
fn a_handle_from_the_worker_is_acknowledged_and_closed() {
    for node in nodes() {
        let mut world = World::new(&node);
        let id = instance("web", 0, 1);
        world.worker(&id, Balance::RoundRobin, &["passOn"]);
        world.up(&id);
        let mut client = TcpStream::connect(("127.0.0.1", world.port())).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        // Without our ACK and NODE_SOCKET_ALL_CLOSED the later two never come.
        for field in ["passed", "after", "closed"] {
            world.message(&id, field);
        }
        assert_eq!(client.read(&mut [0]).unwrap_or(0), 0, "we hold no connection");
    }
}
