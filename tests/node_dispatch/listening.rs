//! What a worker may listen on, and what it is told where it may not.

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use pm::dispatch::{ChannelKind, Command, DispatchEvent, Origin};
use pm::model::id::InstanceId;
use pm::model::spec::Balance;
use pm::sys::listen;

use super::world::{BALANCES, PATIENCE, World, app, free_port, get, instance, nodes, request};

#[test]
fn every_kind_of_listen_works_as_under_a_node_primary() {
    for node in nodes() {
        for balance in BALANCES {
            let home = tempfile::tempdir().unwrap();
            let path = home.path().join("app.sock");
            let mut world = World::new(&node);
            let ids = [instance("web", 0, 1), instance("web", 1, 1)];
            for id in &ids {
                world.worker(id, balance, &["kinds", path.to_str().unwrap()]);
            }
            let names = ["first", "second", "six", "unix", "udp", "tls"];
            let report = |id: &InstanceId, name: &str| {
                world.wait(name, |log| log.messages(id).into_iter().find(|m| m["name"] == name))
            };
            let [of_first, of_second] = ids.clone().map(|id| names.map(|name| report(&id, name)));
            // The same listener for both, whatever the port, and the same TLS tickets.
            assert_eq!(of_first, of_second, "{node:?} {balance:?}");
            assert_ne!(of_first[0]["address"]["port"], of_first[1]["address"]["port"]);
            assert_eq!(of_first[5]["keys"].as_str().unwrap().len(), 96);
            for id in &ids {
                world.handle.send(Command::PutIn { id: id.clone() });
            }
            let port = u16::try_from(of_first[1]["address"]["port"].as_u64().unwrap()).unwrap();
            get(port, "/").unwrap();
            request(UnixStream::connect(&path).unwrap(), "/").unwrap();
            assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o666, 0o666);
            let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
            udp.set_read_timeout(Some(PATIENCE)).unwrap();
            let udp_port = u16::try_from(of_first[4]["address"]["port"].as_u64().unwrap()).unwrap();
            udp.send_to(b"ping", ("127.0.0.1", udp_port)).unwrap();
            let mut buffer = [0; 64];
            let count = udp.recv(&mut buffer).unwrap();
            assert!(buffer[..count].ends_with(b":ping"));
            // Closing removes the socket file and frees the port.
            world.handle.send(Command::CloseListeners { app: app("web"), keys: None });
            world.stats();
            assert!(!path.try_exists().unwrap());
        }
    }
}

#[test]
fn an_address_in_use_is_told_as_node_tells_it() {
    let port = free_port();
    for balance in BALANCES {
        let mut world = World::new(Path::new("node"));
        let id = instance("one", 0, 1);
        world.worker(&id, balance, &["inUse", &port.to_string()]);
        assert_eq!(world.message(&id, "second")["second"], "EADDRINUSE");
        assert_eq!(world.message(&id, "again")["again"], true);
        // Another app wants the same address.
        let other = instance("two", 0, 1);
        world.worker(&other, balance, &["inUse", &port.to_string()]);
        assert_eq!(world.message(&other, "first")["first"], "EADDRINUSE");
        world.wait_event(
            "failure",
            |event| matches!(event, DispatchEvent::ListenFailed { id, errno: 98, .. } if *id == other),
        );
    }
}

/// A listener that nobody needs is closed here first and at the keeper a moment later. Whoever asked for its address in
/// between was told that it is in use, by nobody: bench/kills.py found a worker that had ended for it.
#[test]
fn an_address_that_the_keeper_has_not_let_go_yet_is_waited_for() {
    for balance in BALANCES {
        let port = free_port().to_string();
        let mut world = World::new(Path::new("node"));
        let one = instance("one", 0, 1);
        let child = world.worker(&one, balance, &["inUse", &port]);
        world.message(&one, "again");
        world.children[child].kill().unwrap();
        world.wait_event("its end", |event| matches!(event, DispatchEvent::ChannelClosed { .. }));
        world.handle.send(Command::CloseListeners { app: app("one"), keys: None });
        let two = instance("two", 0, 1);
        world.worker(&two, balance, &["inUse", &port]);
        world.wait_event("a worker", |event| matches!(event, DispatchEvent::Online { id } if *id == two));
        // It asks now; most likely before the keeper's copy is closed.
        std::thread::park_timeout(Duration::from_millis(100));
        world.log.0.lock().unwrap().kept.clear();
        // It has got its first listener, so that the second is in use.
        let said = world.wait("an answer", |log| log.messages(&two).into_iter().next());
        assert_eq!(said["second"], "EADDRINUSE", "{balance:?}: {said}");
    }
}

/// The same when it was bound by a supervisor that died before it could say so: its successor has the question, and the
/// keeper the socket, which it is told to close.
#[test]
fn an_address_that_a_supervisor_took_and_did_not_record_is_waited_for() {
    for balance in BALANCES {
        let port = free_port().to_string();
        let mut world = World::new(Path::new("node"));
        let id = instance("web", 0, 1);
        world.stuck.recording.store(true, Ordering::Relaxed);
        world.worker(&id, balance, &["inUse", &port]);
        world.wait_event("the query", |event| matches!(event, DispatchEvent::Opened { .. }));
        let copy = {
            let mut log = world.log.0.lock().unwrap();
            log.open.clear();
            log.kept.pop_first()
        };
        world.next_supervisor(std::slice::from_ref(&id), |_| ChannelKind::Cluster {
            balance,
            configured: Vec::new(),
        });
        // It has asked by then, most likely.
        std::thread::park_timeout(Duration::from_millis(100));
        drop(copy);
        let said = world.wait("an answer", |log| log.messages(&id).into_iter().next());
        assert_eq!(said["second"], "EADDRINUSE", "{balance:?}: {said}");
    }
}

#[test]
fn a_descriptor_number_means_a_configured_listener_and_nothing_else() {
    for balance in BALANCES {
        let socket = listen::tcp(SocketAddr::from(([127, 0, 0, 1], 0)), listen::Stack::Dual, 511).unwrap();
        let port = listen::local_address(socket.as_fd()).unwrap().unwrap().port();
        let configured = vec![Arc::new(socket)];
        let mut world = World::new(Path::new("node"));
        let (good, bad) = (instance("web", 0, 1), instance("web", 1, 1));
        let kind = ChannelKind::Cluster { balance, configured: configured.clone() };
        world.spawn(&good, kind, false, &["fd", "3"]);
        world.up(&good);
        assert_eq!(get(port, "/").unwrap(), "1");
        world.wait("kept", |log| (log.kept.values().next()?.origin == Origin::Configured).then_some(()));
        for fd in ["4", "0", "7"] {
            let kind = ChannelKind::Cluster { balance, configured: configured.clone() };
            world.spawn(&bad, kind, false, &["fd", fd]);
            assert_eq!(world.message(&bad, "error")["error"], "EBADF", "fd {fd}");
        }
        // The app's own listen(port) means the configured listener, too.
        let third = instance("web", 2, 1);
        let all = listen::tcp_any(0, 511).unwrap();
        let port = listen::local_address(all.as_fd()).unwrap().unwrap().port();
        let kind = ChannelKind::Cluster { balance, configured: vec![Arc::new(all)] };
        world.spawn(&third, kind, false, &["http", &port.to_string()]);
        world.up(&third);
        get(port, "/").unwrap();
    }
}

#[test]
fn a_listener_that_a_worker_has_no_descriptor_for_is_refused_and_not_waited_for() {
    for node in nodes() {
        let mut world = World::new(&node);
        let id = instance("web", 0, 1);
        world.worker(&id, Balance::Shared, &["poor"]);
        let error = world.message(&id, "error");
        assert_eq!(error["error"], "EMFILE", "{node:?}");
        assert!(world.children[0].try_wait().unwrap().is_none());
    }
}
