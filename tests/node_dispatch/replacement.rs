//! Workers that are replaced under load.

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal as Sig;
use pm::dispatch::{ChannelKind, Command, DispatchEvent, Idle};
use pm::model::id::InstanceId;
use pm::model::spec::Balance;
use pm::sys::listen;

use super::world::{BALANCES, PATIENCE, World, drain, get, instance, nodes};

/// Eight clients that ask one request after the other, each on a fresh connection, and never again.
struct Load {
    stop: Arc<AtomicBool>,
    made: Arc<AtomicUsize>,
    clients: Vec<std::thread::JoinHandle<Vec<String>>>,
}

impl Load {
    fn start(port: u16) -> Self {
        let (stop, made) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let client = |_| {
            let (stop, made) = (Arc::clone(&stop), Arc::clone(&made));
            std::thread::spawn(move || {
                let mut failed = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    if let Err(why) = get(port, "/?ms=5") {
                        failed.push(why);
                    }
                    made.fetch_add(1, Ordering::Relaxed);
                }
                failed
            })
        };
        let clients = (0..8).map(client).collect();
        Self { stop, made, clients }
    }

    /// After at least fifty more, and a thousand in all: how many were made, and why some failed.
    fn stop(self) -> (usize, Vec<String>) {
        let target = (self.made.load(Ordering::Relaxed) + 50).max(1_000);
        let deadline = Instant::now() + PATIENCE;
        while self.made.load(Ordering::Relaxed) < target && Instant::now() < deadline {
            std::thread::park_timeout(Duration::from_millis(5));
        }
        self.stop.store(true, Ordering::Relaxed);
        let failed = self.clients.into_iter().flat_map(|client| client.join().unwrap()).collect();
        (self.made.load(Ordering::Relaxed), failed)
    }
}

/// How an old worker is ended in a rolling replacement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Disconnect,
    AgentThenSigint,
    SigintWithHandler,
    Sigkill,
}

/// Replaces both workers again and again under load; returns requests made and failed ones.
fn replace_under_load(node: &Path, balance: Balance, end: End, rounds: u64) -> (usize, Vec<String>) {
    let mut world = World::new(node);
    let agent = end == End::AgentThenSigint;
    let scenario = if end == End::SigintWithHandler { "graceful" } else { "http" };
    let kind = || ChannelKind::Cluster { balance, configured: Vec::new() };
    let mut current: Vec<(InstanceId, usize)> = Vec::new();
    for slot in 0..2 {
        let id = instance("web", slot, 1);
        let child = world.spawn(&id, kind(), agent, &[scenario]);
        current.push((id, child));
    }
    for (id, _) in &current {
        world.up(id);
    }
    let port = world.port();
    let load = Load::start(port);
    for generation in 2..2 + rounds {
        for (slot, serving) in current.iter_mut().enumerate() {
            let id = instance("web", u32::try_from(slot).unwrap(), generation);
            let child = world.spawn(&id, kind(), agent, &[scenario]);
            world.up(&id);
            let (old, old_child) = std::mem::replace(serving, (id, child));
            if end != End::Sigkill {
                world.handle.send(Command::TakeOut { id: old.clone() });
                world.wait_event("settled", |e| matches!(e, DispatchEvent::Settled { id, .. } if *id == old));
            }
            match end {
                End::Disconnect => {
                    world.handle.send(Command::Disconnect { id: old.clone() });
                    world.wait_event(
                        "end",
                        |e| matches!(e, DispatchEvent::ChannelClosed { id } if *id == old),
                    );
                }
                End::AgentThenSigint => {
                    let within = Duration::from_secs(5);
                    world.handle.send(Command::Drain { id: old.clone(), drain: drain(Idle::Wait, within) });
                    world.wait_event("drained", |e| matches!(e, DispatchEvent::Drained { id } if *id == old));
                    world.signal(old_child, Sig::SIGINT);
                }
                End::SigintWithHandler => world.signal(old_child, Sig::SIGINT),
                End::Sigkill => world.signal(old_child, Sig::SIGKILL),
            }
            assert!(world.exited(old_child, PATIENCE).is_some(), "{old} does not end");
            world.handle.send(Command::Remove { id: old });
        }
    }
    load.stop()
}

#[test]
fn rolling_replacement_under_load_loses_nothing() {
    for node in nodes() {
        for balance in BALANCES {
            for end in [End::Disconnect, End::AgentThenSigint, End::SigintWithHandler] {
                let (made, failed) = replace_under_load(&node, balance, end, 3);
                assert!(
                    failed.is_empty(),
                    "{node:?} {balance:?} {end:?}: {} of {made}: {failed:?}",
                    failed.len()
                );
                assert!(made >= 1_000, "only {made} requests");
            }
        }
    }
}

/// Fork mode: instances accept from an inherited listener, and only the agent can make one stop.
#[test]
fn instances_on_an_inherited_listener_are_replaced_without_a_loss() {
    for node in nodes() {
        let listener = listen::tcp(SocketAddr::from(([127, 0, 0, 1], 0)), listen::Stack::Dual, 511).unwrap();
        let port = listen::local_address(listener.as_fd()).unwrap().unwrap().port();
        let mut world = World::new(&node);
        let mut old = (instance("web", 0, 1), 0);
        old.1 = world.spawn_inheriting(&old.0, &listener, &["fd", "4"]);
        let load = Load::start(port);
        for generation in 2..6 {
            let id = instance("web", 0, generation);
            // Every other one has a handler of its own.
            let scenario = if generation % 2 == 0 { "gracefulFd" } else { "fd" };
            let child = world.spawn_inheriting(&id, &listener, &[scenario, "4"]);
            let (old_id, old_child) = std::mem::replace(&mut old, (id, child));
            let within = Duration::from_secs(5);
            world.handle.send(Command::Drain { id: old_id.clone(), drain: drain(Idle::Wait, within) });
            world.wait_event("drained", |e| matches!(e, DispatchEvent::Drained { id } if *id == old_id));
            world.signal(old_child, Sig::SIGINT);
            let code = world.exited(old_child, PATIENCE);
            assert_eq!(code, Some(if scenario == "fd" { 0 } else { -1 }), "{node:?} {old_id}");
        }
        let (made, failed) = load.stop();
        assert!(failed.is_empty(), "{node:?}: {} of {made}: {failed:?}", failed.len());
        assert!(made >= 1_000, "only {made} requests");
    }
}

#[test]
fn the_same_replacement_with_sigkill_does_lose_requests() {
    for balance in BALANCES {
        let (made, failed) = replace_under_load(Path::new("node"), balance, End::Sigkill, 3);
        assert!(!failed.is_empty(), "{made} requests and no failure: the load shows nothing");
    }
}
