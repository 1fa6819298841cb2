//! Real Node workers against the dispatch thread: what an unmodified app sees of its cluster primary.
//!
//! Runs on the installed Node, and on every other that `PM_TEST_NODES` names (paths with colons between).

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests; the exemption in .clippy.toml covers test functions only"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Process, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal as Sig, kill};
use nix::unistd::Pid;
use pm::dispatch::{
    self, Adopted, ChannelKind, Command, DispatchEvent, DispatchHandle, Drain, Greeting, Idle, InFlight,
    KeptListener, NewInstance, OpenListener, Origin, Part, Stats,
};
use pm::model::id::{AppName, Generation, InstanceId, Slot};
use pm::model::signal::Signal;
use pm::model::spec::Balance;
use pm::sys::{fdpass, listen, scm};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(20);

fn nodes() -> Vec<PathBuf> {
    let mut nodes = vec![PathBuf::from("node")];
    let more = std::env::var("PM_TEST_NODES").unwrap_or_default();
    nodes.extend(more.split(':').filter(|path| !path.is_empty()).map(PathBuf::from));
    nodes
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/node").join(name)
}

fn app(name: &str) -> AppName {
    AppName::new(name).unwrap()
}

fn instance(name: &str, slot: u32, generation: u64) -> InstanceId {
    InstanceId { app: app(name), slot: Slot(slot), generation: Generation(generation) }
}

fn drain(idle: Idle, patience: Duration) -> Drain {
    Drain {
        idle,
        patience: Some(patience),
        in_flight: InFlight::Leave,
        websockets: false,
        within: Duration::from_secs(20),
    }
}

/// What a driver would have recorded, and everything that happened.
#[derive(Default)]
struct Log {
    events: Vec<DispatchEvent>,
    kept: BTreeMap<String, KeptListener>,
    open: BTreeMap<InstanceId, Vec<OpenListener>>,
    ready: BTreeSet<InstanceId>,
    inboxes: BTreeMap<InstanceId, OwnedFd>,
    lines: BTreeMap<(InstanceId, u64), OwnedFd>,
}

/// A dispatch thread with a driver that records at once, unless it is told to be stuck.
struct World {
    handle: Arc<DispatchHandle>,
    log: Arc<(Mutex<Log>, Condvar)>,
    stuck: Arc<AtomicBool>,
    node: PathBuf,
    children: Vec<Child>,
    /// Copies of our ends of the channels, as the keeper holds them.
    channels: BTreeMap<InstanceId, OwnedFd>,
    /// Likewise of where unanswered connections lie.
    shelf: [OwnedFd; 2],
}

impl World {
    fn new(node: &Path) -> Self {
        let (handle, log, stuck) = start();
        let shelf = dispatch::shelf_ends().unwrap();
        let [put, take] = [&shelf[0], &shelf[1]].map(|end| end.try_clone().unwrap());
        handle.send(Command::UseShelf { put, take });
        let (children, channels) = (Vec::new(), BTreeMap::new());
        Self { handle, log, stuck, node: node.to_owned(), children, channels, shelf }
    }

    /// Spawns an app on a new channel, without telling the dispatch thread. An inherited listener is descriptor 4.
    fn spawn_process(
        &mut self,
        id: &InstanceId,
        cluster: bool,
        agent: bool,
        inherited: Option<&OwnedFd>,
        args: &[&str],
    ) -> OwnedFd {
        let (ours, theirs) = scm::line_pair().unwrap();
        let mut command = Process::new("sh");
        // The channel comes as standard input and is moved to descriptor 3, where Node has it.
        let script = match inherited {
            None => r#"exec "$0" "$@" 3<&0 </dev/null"#,
            Some(listener) => {
                command.stdout(Stdio::from(listener.try_clone().unwrap()));
                r#"exec "$0" "$@" 3<&0 4<&1 </dev/null >/dev/null"#
            }
        };
        command.args(["-c", script]).arg(&self.node);
        if agent {
            command.arg("--require").arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/node/agent.cjs"));
        }
        command.arg(fixture("app.js")).args(args).stdin(Stdio::from(theirs));
        command.env("NODE_CHANNEL_FD", "3").env("NODE_CHANNEL_SERIALIZATION_MODE", "json");
        if cluster {
            command.env("NODE_UNIQUE_ID", (self.children.len() + 1).to_string());
        }
        self.children.push(command.spawn().unwrap());
        self.channels.insert(id.clone(), ours.try_clone().unwrap());
        ours
    }

    fn spawn(&mut self, id: &InstanceId, kind: ChannelKind, agent: bool, args: &[&str]) -> usize {
        let cluster = matches!(kind, ChannelKind::Cluster { .. });
        let channel = self.spawn_process(id, cluster, agent, None, args);
        let new = NewInstance {
            id: id.clone(),
            channel,
            kind,
            agent: agent.then(Greeting::default),
            adopted: None,
        };
        self.handle.send(Command::AddInstance(Box::new(new)));
        self.children.len() - 1
    }

    /// A fork-mode instance on a listener that several share, with the agent.
    fn spawn_inheriting(&mut self, id: &InstanceId, listener: &OwnedFd, args: &[&str]) -> usize {
        let channel = self.spawn_process(id, false, true, Some(listener), args);
        let kind = ChannelKind::Plain;
        let new =
            NewInstance { id: id.clone(), channel, kind, agent: Some(Greeting::default()), adopted: None };
        self.handle.send(Command::AddInstance(Box::new(new)));
        self.wait("ready", |log| log.ready.contains(id).then_some(()));
        self.children.len() - 1
    }

    fn worker(&mut self, id: &InstanceId, balance: Balance, args: &[&str]) -> usize {
        self.spawn(id, ChannelKind::Cluster { balance, configured: Vec::new() }, false, args)
    }

    /// Two workers that serve HTTP, both in rotation, and their places among the children.
    fn two_workers(&mut self) -> ([InstanceId; 2], [usize; 2]) {
        let ids = [instance("web", 0, 1), instance("web", 1, 1)];
        let children = ids.clone().map(|id| self.worker(&id, Balance::RoundRobin, &["http"]));
        for id in &ids {
            self.up(id);
        }
        (ids, children)
    }

    /// The supervisor is gone, without a word; the keeper's copies and what was recorded are all that is left.
    fn next_supervisor(&mut self, ids: &[InstanceId], kind: impl Fn(&InstanceId) -> ChannelKind) {
        let (handle, log, stuck) = start();
        let old = std::mem::replace(&mut self.handle, handle);
        let old_log = std::mem::replace(&mut self.log, log);
        self.stuck.store(false, Ordering::Relaxed);
        self.stuck = stuck;
        let mut old = Some(old);
        // Its driver may be about to say something.
        while let Some(handle) = old.take() {
            match Arc::try_unwrap(handle) {
                Ok(handle) => handle.finish(),
                Err(handle) => old = Some(handle),
            }
        }
        let old_log = std::mem::take(&mut *old_log.0.lock().unwrap());
        let Log { kept, open, ready, inboxes, lines, .. } = old_log;
        let [put, take] = &self.shelf;
        let [put, take] = [put, take].map(|end| end.try_clone().unwrap());
        self.handle.send(Command::UseShelf { put, take });
        for kept in kept.into_values() {
            let copy = KeptListener {
                key: kept.key.clone(),
                data: kept.data.clone(),
                origin: kept.origin,
                socket: kept.socket.try_clone().unwrap(),
            };
            self.log.0.lock().unwrap().kept.insert(kept.key.clone(), kept);
            self.handle.send(Command::AdoptListener { app: app("web"), listener: copy });
        }
        for id in ids {
            let open = open.get(id).cloned().unwrap_or_default();
            let ready = ready.contains(id);
            let inbox = inboxes.get(id).map(|file| file.try_clone().unwrap());
            let copy = |file: &OwnedFd| file.try_clone().unwrap();
            let lines: BTreeMap<u64, OwnedFd> =
                lines.iter().filter(|((of, _), _)| of == id).map(|((_, n), file)| (*n, copy(file))).collect();
            {
                let mut log = self.log.0.lock().unwrap();
                log.open.insert(id.clone(), open.clone());
                log.lines.extend(lines.iter().map(|(number, file)| ((id.clone(), *number), copy(file))));
                log.inboxes.extend(inbox.iter().map(|file| (id.clone(), copy(file))));
                if ready {
                    log.ready.insert(id.clone());
                }
            }
            self.handle.send(Command::AddInstance(Box::new(NewInstance {
                id: id.clone(),
                channel: self.channels[id].try_clone().unwrap(),
                kind: kind(id),
                agent: None,
                adopted: Some(Adopted { ready, open, inbox, lines }),
            })));
        }
        self.handle.send(Command::Adopted);
    }

    /// Waits until the worker is ready and listening, and puts it in.
    fn up(&self, id: &InstanceId) {
        self.wait("ready", |log| log.ready.contains(id).then_some(()));
        self.wait("listening", |log| {
            log.find(|event| matches!(event, DispatchEvent::Listening { id: who, .. } if who == id))
        });
        self.handle.send(Command::PutIn { id: id.clone() });
    }

    fn wait<T>(&self, what: &str, mut look: impl FnMut(&Log) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        let mut log = self.log.0.lock().unwrap();
        loop {
            if let Some(found) = look(&log) {
                return found;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "waited for {what} with {:?}; saw {:#?}", self.node, log.events);
            // Not everything that is looked at comes with an event.
            let nap = left.min(Duration::from_millis(20));
            log = self.log.1.wait_timeout(log, nap).unwrap().0;
        }
    }

    fn wait_event(&self, what: &str, mut wanted: impl FnMut(&DispatchEvent) -> bool) {
        self.wait(what, |log| log.find(&mut wanted));
    }

    /// Waits for a user message that is an object with this field.
    fn message(&self, id: &InstanceId, field: &str) -> Value {
        self.wait(field, |log| log.messages(id).into_iter().find(|value| value.get(field).is_some()))
    }

    /// The port of the only TCP listener.
    fn port(&self) -> u16 {
        self.wait("a listener", |log| {
            log.kept.values().find_map(|kept| {
                listen::local_address(kept.socket.as_fd()).unwrap().map(|address| address.port())
            })
        })
    }

    fn stats(&self) -> Stats {
        let (tx, rx) = std::sync::mpsc::channel();
        self.handle.send(Command::Stats {
            reply: Box::new(move |stats| {
                let _ = tx.send(stats);
            }),
        });
        rx.recv_timeout(PATIENCE).unwrap()
    }

    fn exited(&mut self, child: usize, within: Duration) -> Option<i32> {
        let deadline = Instant::now() + within;
        while Instant::now() < deadline {
            if let Some(status) = self.children[child].try_wait().unwrap() {
                return Some(status.code().unwrap_or(-1));
            }
            std::thread::park_timeout(Duration::from_millis(5));
        }
        None
    }

    fn signal(&self, child: usize, signal: Sig) {
        kill(Pid::from_raw(i32::try_from(self.children[child].id()).unwrap()), signal).unwrap();
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

type Shared = (Arc<DispatchHandle>, Arc<(Mutex<Log>, Condvar)>, Arc<AtomicBool>);

fn start() -> Shared {
    let log: Arc<(Mutex<Log>, Condvar)> = Arc::default();
    let stuck = Arc::new(AtomicBool::new(false));
    let (events_tx, events_rx) = std::sync::mpsc::channel();
    let handle = dispatch::spawn(Box::new(move |event| {
        let _ = events_tx.send(event);
    }));
    let handle = Arc::new(handle.unwrap());
    let (weak, driver_log, is_stuck) = (Arc::downgrade(&handle), Arc::clone(&log), Arc::clone(&stuck));
    std::thread::spawn(move || {
        for event in events_rx {
            let Some(token) = driver_log.0.lock().unwrap().record(event) else {
                driver_log.1.notify_all();
                continue;
            };
            driver_log.1.notify_all();
            while is_stuck.load(Ordering::Relaxed) {
                std::thread::park_timeout(Duration::from_millis(2));
            }
            if let Some(handle) = weak.upgrade() {
                handle.send(Command::Recorded { token });
            }
        }
    });
    (handle, log, stuck)
}

impl Log {
    fn record(&mut self, mut event: DispatchEvent) -> Option<dispatch::Token> {
        let token = match &mut event {
            DispatchEvent::Ready { id, token } => {
                assert!(self.ready.insert(id.clone()), "ready twice");
                Some(*token)
            }
            DispatchEvent::Opened { id, open, new, token } => {
                for kept in std::mem::take(new) {
                    assert!(self.kept.insert(kept.key.clone(), kept).is_none(), "bound twice");
                }
                self.open.entry(id.clone()).or_default().push(open.clone());
                Some(*token)
            }
            DispatchEvent::ListenerClosed { id, key, token, .. } => {
                self.open.entry(id.clone()).or_default().retain(|open| open.key != *key);
                Some(*token)
            }
            DispatchEvent::Listening { id, key, token, .. } => {
                for open in self.open.entry(id.clone()).or_default() {
                    open.listening |= Some(&open.key) == key.as_ref();
                }
                Some(*token)
            }
            DispatchEvent::Keep { id, part, file, token } => {
                let file = file.try_clone().unwrap();
                match part {
                    Part::Inbox => self.inboxes.insert(id.clone(), file),
                    Part::Line(number) => self.lines.insert((id.clone(), *number), file),
                };
                Some(*token)
            }
            DispatchEvent::LineGone { id, number } => {
                assert!(self.lines.remove(&(id.clone(), *number)).is_some(), "gone twice");
                None
            }
            DispatchEvent::Ended { panicked } => {
                assert!(!*panicked, "the dispatch thread panicked");
                None
            }
            _ => None,
        };
        self.events.push(event);
        token
    }

    fn find(&self, wanted: impl FnMut(&DispatchEvent) -> bool) -> Option<()> {
        self.events.iter().any(wanted).then_some(())
    }

    fn messages(&self, of: &InstanceId) -> Vec<Value> {
        self.events
            .iter()
            .filter_map(|event| match event {
                DispatchEvent::UserMessage { id, message } if id == of => {
                    serde_json::from_slice(message.bytes()).ok()
                }
                _ => None,
            })
            .collect()
    }
}

/// One request on a fresh connection; the body, or why not.
fn get(port: u16, path: &str) -> Result<String, String> {
    request(TcpStream::connect(("127.0.0.1", port)).map_err(|e| format!("connect: {e}"))?, path)
}

fn request(mut stream: impl Read + Write, path: &str) -> Result<String, String> {
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        .map_err(|e| format!("write: {e}"))?;
    let mut text = String::new();
    stream.read_to_string(&mut text).map_err(|e| format!("read: {e}"))?;
    let (head, body) = text.split_once("\r\n\r\n").ok_or_else(|| format!("cut: {text:?}"))?;
    if !head.starts_with("HTTP/1.1 200") {
        return Err(head.to_owned());
    }
    // Chunked or not, the worker's number is the only line of digits that is no chunk size.
    body.lines().find(|line| !line.is_empty()).map(str::to_owned).ok_or_else(|| "empty".to_owned())
}

const BALANCES: [Balance; 2] = [Balance::RoundRobin, Balance::Shared];

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
        world.stuck.store(true, Ordering::Relaxed);
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

fn free_port() -> u16 {
    let socket = std::net::TcpListener::bind("[::]:0").unwrap();
    socket.local_addr().unwrap().port()
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

#[test]
fn a_line_waits_in_the_socket_until_its_effect_is_recorded() {
    let mut world = World::new(Path::new("node"));
    world.stuck.store(true, Ordering::Relaxed);
    let id = instance("web", 0, 1);
    world.worker(&id, Balance::RoundRobin, &["http"]);
    world.wait_event("the query", |event| matches!(event, DispatchEvent::Opened { .. }));
    // The query is not answered, hence no `listening`; a crash now would leave the line to the next supervisor.
    let mut buffer = vec![0; 65536];
    let seen = scm::peek(world.channels[&id].as_fd(), &mut buffer).unwrap();
    let text = String::from_utf8_lossy(&buffer[..seen.count]);
    assert!(text.starts_with(r#"{"cmd":"NODE_CLUSTER","act":"queryServer""#), "{text}");
    world.stuck.store(false, Ordering::Relaxed);
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

/// What the supervisor that is to be killed is given: the channel, the shelf and what the keeper holds for it come as
/// descriptors.
#[derive(serde::Serialize, serde::Deserialize)]
struct Legacy {
    inbox: bool,
    lines: Vec<u64>,
    /// The number of the message it shall send.
    send: Option<u64>,
}

const TO_BE_KILLED: &str = "PM_TEST_TO_BE_KILLED";

/// No test but the process that `killed_in_the_middle_of_3_mb_each_way_…` kills: a dispatch thread whose driver has
/// everything held by its parent, which is the keeper here.
#[test]
fn helper_of_the_kills_below() {
    if std::env::var_os(TO_BE_KILLED).is_none() {
        return;
    }
    let keeper = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let mut buffer = vec![0; 4096];
    let received = loop {
        match fdpass::receive(&keeper, &mut buffer, fdpass::Take::Consume) {
            Ok(received) => break received,
            Err(_) => std::thread::park_timeout(Duration::from_millis(1)),
        }
    };
    let legacy: Legacy = serde_json::from_slice(&buffer[..received.len]).unwrap();
    let mut fds = received.fds.into_iter();
    let mut next = || fds.next().unwrap();
    let (channel, put, take) = (next(), next(), next());
    let inbox = legacy.inbox.then(&mut next);
    let lines: BTreeMap<u64, OwnedFd> = legacy.lines.iter().map(|number| (*number, next())).collect();
    let (tokens_tx, tokens_rx) = std::sync::mpsc::channel();
    let told = keeper.try_clone().unwrap();
    // Told before the thread goes on: what is done about a line is done before the line is consumed.
    let handle = dispatch::spawn(Box::new(move |event| {
        let tell = |text: String, fds: &[std::os::fd::BorrowedFd<'_>]| {
            while fdpass::send(&told, text.as_bytes(), fds).is_err() {
                std::thread::park_timeout(Duration::from_millis(1));
            }
        };
        match event {
            DispatchEvent::Keep { part, file, token, .. } => {
                let text = match part {
                    Part::Inbox => "inbox".to_owned(),
                    Part::Line(number) => format!("line:{number}"),
                };
                tell(text, &[file.as_fd()]);
                let _ = tokens_tx.send(token);
            }
            DispatchEvent::LineGone { number, .. } => tell(format!("gone:{number}"), &[]),
            DispatchEvent::UserMessage { message, .. } => {
                let head = &message.bytes()[..message.bytes().len().min(60)];
                tell(format!("said:{}:{}", message.length(), String::from_utf8_lossy(head)), &[]);
            }
            _ => {}
        }
    }));
    let handle = handle.unwrap();
    let id = instance("talk", 0, 1);
    handle.send(Command::UseShelf { put, take });
    handle.send(Command::AddInstance(Box::new(NewInstance {
        id: id.clone(),
        channel,
        kind: ChannelKind::Plain,
        agent: None,
        adopted: Some(Adopted { ready: true, open: Vec::new(), inbox, lines }),
    })));
    handle.send(Command::Adopted);
    if let Some(number) = legacy.send {
        let json = format!(r#"{{"number":{number},"text":"{}"}}"#, "y".repeat(3_000_000));
        handle.send(Command::SendMessage { id, json });
    }
    fdpass::send(&keeper, b"up", &[]).unwrap();
    for token in tokens_rx {
        handle.send(Command::Recorded { token });
    }
}

/// A keeper with a supervisor that is killed with SIGKILL at any instant, in whatever system call.
struct KilledAgain {
    channel: OwnedFd,
    shelf: [OwnedFd; 2],
    inbox: Option<OwnedFd>,
    lines: BTreeMap<u64, OwnedFd>,
    /// Lengths and heads of what the worker was heard saying.
    said: Vec<(u64, String)>,
    placed: usize,
}

/// Killed also when its test has failed.
struct Mortal(Child);

impl Mortal {
    fn end(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Mortal {
    fn drop(&mut self) {
        self.end();
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum From {
    Birth,
    Placed,
}

impl KilledAgain {
    /// Lets a supervisor live until `enough` says so, or so long from its birth, or from when it has put its message
    /// where the next one finds it.
    fn supervise(&mut self, send: Option<u64>, life: (From, Duration), enough: impl Fn(&Self) -> bool) {
        let (from, life) = life;
        let placed = self.placed;
        let (ours, theirs) = pm::sys::pipe::packet_pair().unwrap();
        let child = Process::new(std::env::current_exe().unwrap())
            .args(["--exact", "helper_of_the_kills_below", "--nocapture"])
            .env(TO_BE_KILLED, "1")
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut child = Mortal(child);
        let legacy =
            Legacy { inbox: self.inbox.is_some(), lines: self.lines.keys().copied().collect(), send };
        let mut fds = vec![self.channel.as_fd(), self.shelf[0].as_fd(), self.shelf[1].as_fd()];
        fds.extend(self.inbox.as_ref().map(AsFd::as_fd));
        fds.extend(self.lines.values().map(AsFd::as_fd));
        fdpass::send(&ours, &serde_json::to_vec(&legacy).unwrap(), &fds).unwrap();
        let mut until = None;
        let limit = Instant::now() + PATIENCE;
        while until.is_none_or(|until| Instant::now() < until) && !enough(self) {
            assert!(Instant::now() < limit, "{:?} lines {:?}", self.said, self.lines.keys());
            let up = self.hear(&ours);
            if (from == From::Birth && up)
                || (from == From::Placed && until.is_none() && self.placed > placed)
            {
                until = Some(Instant::now() + life);
            }
            std::thread::park_timeout(Duration::from_micros(300));
        }
        child.end();
        // What it had said counts.
        self.hear(&ours);
    }

    /// Takes what was said. Whether the supervisor has said that it is up.
    fn hear(&mut self, from: &OwnedFd) -> bool {
        let mut buffer = vec![0; 4096];
        let mut up = false;
        while let Ok(received) = fdpass::receive(from, &mut buffer, fdpass::Take::Consume)
            && received.len > 0
        {
            let text = String::from_utf8_lossy(&buffer[..received.len]).into_owned();
            let file = received.fds.into_iter().next();
            match text.split_once(':').unwrap_or((&text, "")) {
                ("up", _) => up = true,
                ("inbox", _) => self.inbox = file,
                ("line", number) => {
                    self.lines.insert(number.parse().unwrap(), file.unwrap());
                    self.placed += 1;
                }
                ("gone", number) => drop(self.lines.remove(&number.parse().unwrap())),
                (_, rest) => {
                    let (length, head) = rest.split_once(':').unwrap();
                    let said = (length.parse().unwrap(), head.to_owned());
                    // Killed between the event and the end of the line: it is told again. Each has a number of its own.
                    if !self.said.contains(&said) {
                        self.said.push(said);
                    }
                }
            }
        }
        up
    }
}

#[test]
fn killed_in_the_middle_of_3_mb_each_way_nothing_is_lost_or_doubled_and_the_worker_lives() {
    const MESSAGES: u64 = 12;
    let mut world = World::new(Path::new("node"));
    let id = instance("talk", 0, 1);
    let channel = world.spawn_process(&id, false, false, None, &["dialogue", &MESSAGES.to_string()]);
    let mut keeper = KilledAgain {
        channel,
        shelf: dispatch::shelf_ends().unwrap(),
        inbox: None,
        lines: BTreeMap::new(),
        said: Vec::new(),
        placed: 0,
    };
    let heard =
        |keeper: &KilledAgain| keeper.said.iter().filter(|(_, head)| head.starts_with(r#"{"heard""#)).count();
    let all_said = |keeper: &KilledAgain| {
        keeper.said.iter().filter(|(length, _)| *length > 1_000_000).count() as u64 >= MESSAGES
    };
    let (mut moment, mut midway, mut kills) = (3_u64, 0, 0);
    // On a slow machine more of them come too early.
    while kills < 25 || (kills < 200 && (keeper.placed < 5 || midway < 3)) {
        moment = (moment * 131 + 7) % 211;
        let next = keeper.placed as u64 + 1;
        // A third one would be refused: the worker does not read.
        let send = (keeper.lines.len() < 2).then_some(next);
        let from = if kills % 2 == 0 && send.is_some() { From::Placed } else { From::Birth };
        keeper.supervise(send, (from, Duration::from_micros(moment * 100)), |_| false);
        kills += 1;
        midway += usize::from(!keeper.lines.is_empty());
    }
    let placed = keeper.placed;
    keeper.supervise(None, (From::Birth, PATIENCE), |keeper| {
        all_said(keeper) && heard(keeper) == placed && keeper.lines.is_empty()
    });
    assert!(world.children[0].try_wait().unwrap().is_none(), "the worker lives");
    assert!(placed >= 5 && midway >= 3, "{placed} messages, {midway} kills with one under way");
    let (long, short): (Vec<_>, Vec<_>) =
        keeper.said.into_iter().partition(|(length, _)| *length > 1_000_000);
    let long: Vec<(u64, String)> =
        long.into_iter().map(|(length, head)| (length, head.split_once(',').unwrap().0.to_owned())).collect();
    let expected = |n: u64| {
        let head = format!(r#"{{"said":{n}"#);
        (head.len() as u64 + 3_000_000 + r#","text":""}"#.len() as u64, head)
    };
    assert_eq!(long, (1..=MESSAGES).map(expected).collect::<Vec<_>>());
    let short: Vec<String> = short.into_iter().map(|(_, text)| text).collect();
    let expected: Vec<String> =
        (1..=placed).map(|n| format!(r#"{{"heard":{n},"number":{n},"length":3000000}}"#)).collect();
    assert_eq!(short, expected, "each message once, and whole");
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
            world.stuck.store(true, Ordering::Relaxed);
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
