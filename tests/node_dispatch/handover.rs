//! What one dispatch thread records, and the next one makes of it.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::Ordering;

use nix::sys::signal::Signal as Sig;
use pm::dispatch::{ChannelKind, Command, DispatchEvent};
use pm::model::id::InstanceId;
use pm::model::spec::Balance;
use pm::sys::{fdpass, scm};

use super::world::{BALANCES, World, get, instance, nodes};

#[test]
fn a_line_waits_in_the_socket_until_its_effect_is_recorded() {
    let mut world = World::new(Path::new("node"));
    world.stuck.recording.store(true, Ordering::Relaxed);
    let id = instance("web", 0, 1);
    world.worker(&id, Balance::RoundRobin, &["http"]);
    world.wait_event("the query", |event| matches!(event, DispatchEvent::Opened { .. }));
    // The query is not answered, hence no `listening`; a crash now would leave the line to the next supervisor.
    let mut buffer = vec![0; 65536];
    let seen = scm::peek(world.channels[&id].as_fd(), &mut buffer).unwrap();
    let text = String::from_utf8_lossy(&buffer[..seen.count]);
    assert!(text.starts_with(r#"{"cmd":"NODE_CLUSTER","act":"queryServer""#), "{text}");
    world.stuck.recording.store(false, Ordering::Relaxed);
    world.up(&id);
    assert_eq!(get(world.port(), "/").unwrap(), "1");
}

#[test]
fn another_thread_takes_over_the_same_descriptors() {
    for node in nodes() {
        for balance in BALANCES {
            let mut world = World::new(&node);
            let ids = [instance("web", 0, 1), instance("web", 1, 1)];
            for id in &ids {
                world.worker(id, balance, &["http"]);
            }
            for id in &ids {
                world.up(id);
            }
            let port = world.port();
            for _ in 0..4 {
                get(port, "/").unwrap();
            }
            world.next_supervisor(&ids, |_| ChannelKind::Cluster { balance, configured: Vec::new() });
            for id in &ids {
                world.handle.send(Command::PutIn { id: id.clone() });
            }
            let waiting = std::thread::spawn(move || get(port, "/"));
            waiting.join().unwrap().unwrap();
            let mut served: BTreeMap<String, usize> = BTreeMap::new();
            for _ in 0..20 {
                *served.entry(get(port, "/").unwrap()).or_default() += 1;
            }
            if balance == Balance::RoundRobin {
                assert_eq!(served.values().copied().collect::<Vec<_>>(), [10, 10], "{node:?}");
            }
            // A third worker joins the adopted listener.
            let third = instance("web", 0, 2);
            world.worker(&third, balance, &["http"]);
            world.up(&third);
            assert_eq!(world.stats().listeners.len(), 1);
            world.handle.send(Command::Disconnect { id: ids[0].clone() });
            world.wait_event("end", |e| matches!(e, DispatchEvent::ChannelClosed { id } if *id == ids[0]));
        }
    }
}

#[test]
fn frozen_it_touches_nothing_and_thawed_it_goes_on() {
    let mut world = World::new(Path::new("node"));
    let id = instance("web", 0, 1);
    world.worker(&id, Balance::RoundRobin, &["http"]);
    world.up(&id);
    let port = world.port();
    get(port, "/").unwrap();
    world.handle.send(Command::Freeze);
    world
        .wait_event("frozen", |event| matches!(event, DispatchEvent::Frozen { midway } if midway.is_empty()));
    let client = std::thread::spawn(move || get(port, "/"));
    let before = world.stats().instances[0].accepted;
    assert_eq!(before, 1);
    world.handle.send(Command::Thaw);
    assert_eq!(client.join().unwrap().as_deref(), Ok("1"));
}

#[test]
fn a_hand_over_that_nobody_answered_is_redispatched_by_the_next_supervisor() {
    for node in nodes() {
        let mut world = World::new(&node);
        let (ids, children) = world.two_workers();
        let port = world.port();
        world.signal(children[0], Sig::SIGSTOP);
        world.signal(children[1], Sig::SIGSTOP);
        let clients: Vec<_> = (0..2).map(|_| std::thread::spawn(move || get(port, "/"))).collect();
        world.wait("a connection stuck in each worker", |_| {
            world.stats().instances.iter().all(|instance| instance.unanswered == 1).then_some(())
        });
        let kind =
            |_: &InstanceId| ChannelKind::Cluster { balance: Balance::RoundRobin, configured: Vec::new() };
        // Dead twice: what the first one knew only from the one before it is not forgotten.
        for _ in 0..2 {
            world.next_supervisor(&ids, kind);
            for id in &ids {
                world.handle.send(Command::PutIn { id: id.clone() });
            }
            world.wait("the next one knows of them", |_| {
                world.stats().instances.iter().all(|instance| instance.unanswered == 1).then_some(())
            });
        }
        world.signal(children[0], Sig::SIGKILL);
        world.signal(children[1], Sig::SIGCONT);
        for client in clients {
            assert_eq!(client.join().unwrap().as_deref(), Ok("2"), "{node:?}");
        }
        world.wait("nothing is left", |_| {
            world.stats().instances.iter().all(|instance| instance.unanswered == 0).then_some(())
        });
        let left = fdpass::receive(&world.shelf[1], &mut [0; 4096], fdpass::Take::Peek);
        assert!(left.is_err(), "a copy that stays would keep connections open: {left:?}");
    }
}

#[test]
fn a_connection_that_waits_for_a_worker_waits_on_with_the_next_supervisor() {
    let mut world = World::new(Path::new("node"));
    let id = instance("web", 0, 1);
    let child = world.worker(&id, Balance::RoundRobin, &["http"]);
    world.up(&id);
    let port = world.port();
    world.signal(child, Sig::SIGSTOP);
    let client = std::thread::spawn(move || get(port, "/"));
    world.wait("it is stuck", |_| (world.stats().instances.first()?.unanswered == 1).then_some(()));
    world.signal(child, Sig::SIGKILL);
    world.wait_event("end", |event| matches!(event, DispatchEvent::ChannelClosed { .. }));
    world.wait("it waits", |_| (world.stats().listeners.first()?.pending == 1).then_some(()));
    let kind = |_: &InstanceId| ChannelKind::Cluster { balance: Balance::RoundRobin, configured: Vec::new() };
    world.next_supervisor(&[], kind);
    let next = instance("web", 0, 2);
    world.worker(&next, Balance::RoundRobin, &["http"]);
    world.up(&next);
    assert_eq!(client.join().unwrap().as_deref(), Ok("2"));
}

#[test]
fn a_query_whose_answer_was_lost_with_the_supervisor_is_answered_by_the_next_one() {
    for node in nodes() {
        for balance in BALANCES {
            let mut world = World::new(&node);
            let id = instance("web", 0, 1);
            let kind = |_: &InstanceId| ChannelKind::Cluster { balance, configured: Vec::new() };
            // Before it is recorded: the line is still in the socket.
            world.stuck.recording.store(true, Ordering::Relaxed);
            world.worker(&id, balance, &["http"]);
            world.wait_event("the query", |event| matches!(event, DispatchEvent::Opened { .. }));
            world.next_supervisor(std::slice::from_ref(&id), kind);
            // The former driver is about to record: that is too late.
            world.up(&id);
            let port = world.port();
            assert_eq!(get(port, "/").unwrap(), "1", "{node:?} {balance:?}");
            // Recorded, consumed, and the answer lost: nobody has heard of `listening` either.
            world.log.0.lock().unwrap().open.get_mut(&id).unwrap()[0].listening = false;
            world.next_supervisor(std::slice::from_ref(&id), kind);
            world.handle.send(Command::PutIn { id: id.clone() });
            for _ in 0..5 {
                assert_eq!(get(port, "/").unwrap(), "1", "a second answer does no harm");
            }
        }
    }
}
