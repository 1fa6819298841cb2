//! Who gets a connection, and who gets it when that one is gone.

use std::collections::BTreeMap;
use std::path::Path;

use nix::sys::signal::Signal as Sig;
use pm::dispatch::{Command, DispatchEvent};
use pm::model::spec::Balance;

use super::world::{PATIENCE, World, get, instance, nodes};

#[test]
fn twenty_requests_are_spread_evenly() {
    for node in nodes() {
        let mut world = World::new(&node);
        let ids = [instance("web", 0, 1), instance("web", 1, 1)];
        for id in &ids {
            world.worker(id, Balance::RoundRobin, &["http"]);
        }
        for id in &ids {
            world.up(id);
        }
        let port = world.port();
        let mut served: BTreeMap<String, usize> = BTreeMap::new();
        for _ in 0..20 {
            *served.entry(get(port, "/").unwrap()).or_default() += 1;
        }
        assert_eq!(served.into_values().collect::<Vec<_>>(), [10, 10], "{node:?}");
        world.wait_event("online", |event| matches!(event, DispatchEvent::Online { id } if *id == ids[1]));
        let stats = world.stats();
        assert_eq!(stats.instances.iter().map(|i| i.accepted).collect::<Vec<_>>(), [10, 10]);
        assert_eq!(stats.listeners.len(), 1);
    }
}

#[test]
fn a_worker_gets_nothing_before_it_is_put_in() {
    let mut world = World::new(Path::new("node"));
    let (first, second) = (instance("web", 0, 1), instance("web", 0, 2));
    world.worker(&first, Balance::RoundRobin, &["http"]);
    world.up(&first);
    world.worker(&second, Balance::RoundRobin, &["http"]);
    world.wait("ready", |log| log.ready.contains(&second).then_some(()));
    let port = world.port();
    for _ in 0..5 {
        assert_eq!(get(port, "/").unwrap(), "1");
    }
    world.handle.send(Command::TakeOut { id: first.clone() });
    world
        .wait_event("settled", |e| matches!(e, DispatchEvent::Settled { id, unanswered: 0 } if *id == first));
    world.handle.send(Command::PutIn { id: second });
    for _ in 0..5 {
        assert_eq!(get(port, "/").unwrap(), "2");
    }
}

#[test]
fn a_connection_on_its_way_to_a_dead_worker_goes_to_another() {
    for node in nodes() {
        let mut world = World::new(&node);
        let (ids, children) = world.two_workers();
        let port = world.port();
        world.signal(children[0], Sig::SIGSTOP);
        let clients: Vec<_> = (0..6).map(|_| std::thread::spawn(move || get(port, "/"))).collect();
        world.wait("a connection stuck in the stopped worker", |_| {
            let stats = world.stats();
            let stuck = stats.instances.iter().find(|i| i.id == ids[0])?;
            let others: u64 = stats.instances.iter().map(|i| i.accepted).sum();
            (stuck.unanswered == 1 && others >= 5).then_some(())
        });
        world.signal(children[0], Sig::SIGKILL);
        for client in clients {
            assert_eq!(client.join().unwrap().as_deref(), Ok("2"), "{node:?}");
        }
        world.wait_event("end", |e| matches!(e, DispatchEvent::ChannelClosed { id } if *id == ids[0]));
    }
}

#[test]
fn clients_wait_while_there_is_no_worker() {
    let mut world = World::new(Path::new("node"));
    let id = instance("web", 0, 1);
    let child = world.worker(&id, Balance::RoundRobin, &["http"]);
    world.up(&id);
    let port = world.port();
    world.signal(child, Sig::SIGKILL);
    world.wait_event("end", |event| matches!(event, DispatchEvent::ChannelClosed { .. }));
    let clients: Vec<_> = (0..3).map(|_| std::thread::spawn(move || get(port, "/"))).collect();
    let next = instance("web", 0, 2);
    world.worker(&next, Balance::RoundRobin, &["http"]);
    world.up(&next);
    for client in clients {
        assert_eq!(client.join().unwrap().as_deref(), Ok("2"));
    }
}

#[test]
fn a_closed_server_rejects_and_others_take_over() {
    let mut world = World::new(Path::new("node"));
    let ids = [instance("web", 0, 1), instance("web", 1, 1)];
    world.worker(&ids[0], Balance::RoundRobin, &["closing"]);
    world.worker(&ids[1], Balance::RoundRobin, &["http"]);
    for id in &ids {
        world.up(id);
    }
    let port = world.port();
    world.handle.send(Command::SendMessage { id: ids[0].clone(), json: "1".to_owned() });
    for _ in 0..50 {
        get(port, "/").unwrap();
    }
    world.wait_event(
        "close",
        |event| matches!(event, DispatchEvent::ListenerClosed { id, left: 1, .. } if *id == ids[0]),
    );
}

#[test]
fn a_worker_that_leaves_by_itself_is_let_go() {
    for node in nodes() {
        let mut world = World::new(&node);
        let id = instance("web", 0, 1);
        let child = world.worker(&id, Balance::RoundRobin, &["leave"]);
        world.up(&id);
        world.handle.send(Command::SendMessage { id: id.clone(), json: "1".to_owned() });
        assert_eq!(world.exited(child, PATIENCE), Some(0), "{node:?}");
    }
}
