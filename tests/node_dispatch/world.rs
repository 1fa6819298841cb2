//! A dispatch thread with a driver that keeps what it is told to, and workers of a real Node.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Process, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal as Sig, kill};
use nix::unistd::Pid;
use pm::dispatch::{
    self, Adopted, ChannelKind, Command, DispatchEvent, DispatchHandle, Drain, Greeting, Idle, InFlight,
    KeptListener, NewInstance, OpenListener, Part, Stats,
};
use pm::model::id::{AppName, Generation, InstanceId, Slot};
use pm::model::spec::Balance;
use pm::sys::guise::Guise;
use pm::sys::{listen, scm};
use serde_json::Value;

pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) const BALANCES: [Balance; 2] = [Balance::RoundRobin, Balance::Shared];

pub(crate) fn nodes() -> Vec<PathBuf> {
    let mut nodes = vec![PathBuf::from("node")];
    let more = std::env::var("PM_TEST_NODES").unwrap_or_default();
    nodes.extend(more.split(':').filter(|path| !path.is_empty()).map(PathBuf::from));
    nodes
}

pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/node").join(name)
}

pub(crate) fn app(name: &str) -> AppName {
    AppName::new(name).unwrap()
}

pub(crate) fn instance(name: &str, slot: u32, generation: u64) -> InstanceId {
    InstanceId { app: app(name), slot: Slot(slot), generation: Generation(generation) }
}

pub(crate) fn drain(idle: Idle, patience: Duration) -> Drain {
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
pub(crate) struct Log {
    pub(crate) events: Vec<DispatchEvent>,
    pub(crate) kept: BTreeMap<String, KeptListener>,
    pub(crate) open: BTreeMap<InstanceId, Vec<OpenListener>>,
    pub(crate) ready: BTreeSet<InstanceId>,
    pub(crate) inboxes: BTreeMap<InstanceId, OwnedFd>,
    pub(crate) lines: BTreeMap<(InstanceId, u64), OwnedFd>,
}

/// Where a driver hangs.
#[derive(Default)]
pub(crate) struct Stuck {
    /// Before it says that something is recorded.
    pub(crate) recording: AtomicBool,
    /// When it hears that a worker is online.
    pub(crate) hearing: AtomicBool,
}

/// A dispatch thread with a driver that records at once, unless it is told to be stuck.
pub(crate) struct World {
    pub(crate) handle: Arc<DispatchHandle>,
    pub(crate) log: Arc<(Mutex<Log>, Condvar)>,
    pub(crate) stuck: Arc<Stuck>,
    pub(crate) node: PathBuf,
    pub(crate) children: Vec<Child>,
    /// Copies of our ends of the channels, as the keeper holds them.
    pub(crate) channels: BTreeMap<InstanceId, OwnedFd>,
    /// Likewise of where unanswered connections lie.
    pub(crate) shelf: [OwnedFd; 2],
    /// Of all instances that are added from now on.
    pub(crate) guise: Guise,
}

impl World {
    pub(crate) fn new(node: &Path) -> Self {
        let (handle, log, stuck) = start();
        let shelf = dispatch::shelf_ends().unwrap();
        let [put, take] = [&shelf[0], &shelf[1]].map(|end| end.try_clone().unwrap());
        handle.send(Command::UseShelf { put, take });
        let (children, channels) = (Vec::new(), BTreeMap::new());
        Self { handle, log, stuck, node: node.to_owned(), children, channels, shelf, guise: Guise::Own }
    }

    /// Spawns an app on a new channel, without telling the dispatch thread. An inherited listener is descriptor 4.
    pub(crate) fn spawn_process(
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

    pub(crate) fn spawn(&mut self, id: &InstanceId, kind: ChannelKind, agent: bool, args: &[&str]) -> usize {
        let cluster = matches!(kind, ChannelKind::Cluster { .. });
        let channel = self.spawn_process(id, cluster, agent, None, args);
        let new = NewInstance {
            id: id.clone(),
            channel,
            kind,
            agent: agent.then(Greeting::default),
            guise: self.guise.clone(),
            adopted: None,
        };
        self.handle.send(Command::AddInstance(Box::new(new)));
        self.children.len() - 1
    }

    /// A fork-mode instance on a listener that several share, with the agent.
    pub(crate) fn spawn_inheriting(&mut self, id: &InstanceId, listener: &OwnedFd, args: &[&str]) -> usize {
        let channel = self.spawn_process(id, false, true, Some(listener), args);
        let kind = ChannelKind::Plain;
        let new = NewInstance {
            id: id.clone(),
            channel,
            kind,
            agent: Some(Greeting::default()),
            guise: self.guise.clone(),
            adopted: None,
        };
        self.handle.send(Command::AddInstance(Box::new(new)));
        self.wait("ready", |log| log.ready.contains(id).then_some(()));
        self.children.len() - 1
    }

    pub(crate) fn worker(&mut self, id: &InstanceId, balance: Balance, args: &[&str]) -> usize {
        self.spawn(id, ChannelKind::Cluster { balance, configured: Vec::new() }, false, args)
    }

    /// Two workers that serve HTTP, both in rotation, and their places among the children.
    pub(crate) fn two_workers(&mut self) -> ([InstanceId; 2], [usize; 2]) {
        let ids = [instance("web", 0, 1), instance("web", 1, 1)];
        let children = ids.clone().map(|id| self.worker(&id, Balance::RoundRobin, &["http"]));
        for id in &ids {
            self.up(id);
        }
        (ids, children)
    }

    /// The supervisor is gone, without a word; the keeper's copies and what was recorded are all that is left.
    pub(crate) fn next_supervisor(&mut self, ids: &[InstanceId], kind: impl Fn(&InstanceId) -> ChannelKind) {
        let (handle, log, stuck) = start();
        let old = std::mem::replace(&mut self.handle, handle);
        let old_log = std::mem::replace(&mut self.log, log);
        self.stuck.recording.store(false, Ordering::Relaxed);
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
                guise: self.guise.clone(),
                adopted: Some(Adopted { ready, open, inbox, lines }),
            })));
        }
        self.handle.send(Command::Adopted);
    }

    /// Waits until the worker is ready and listening, and puts it in.
    pub(crate) fn up(&self, id: &InstanceId) {
        self.wait("ready", |log| log.ready.contains(id).then_some(()));
        self.wait("listening", |log| {
            log.find(|event| matches!(event, DispatchEvent::Listening { id: who, .. } if who == id))
        });
        self.handle.send(Command::PutIn { id: id.clone() });
    }

    pub(crate) fn wait<T>(&self, what: &str, mut look: impl FnMut(&Log) -> Option<T>) -> T {
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

    pub(crate) fn wait_event(&self, what: &str, mut wanted: impl FnMut(&DispatchEvent) -> bool) {
        self.wait(what, |log| log.find(&mut wanted));
    }

    /// Waits for a user message that is an object with this field.
    pub(crate) fn message(&self, id: &InstanceId, field: &str) -> Value {
        self.wait(field, |log| log.messages(id).into_iter().find(|value| value.get(field).is_some()))
    }

    /// The port of the only TCP listener.
    pub(crate) fn port(&self) -> u16 {
        self.wait("a listener", |log| {
            log.kept.values().find_map(|kept| {
                listen::local_address(kept.socket.as_fd()).unwrap().map(|address| address.port())
            })
        })
    }

    pub(crate) fn stats(&self) -> Stats {
        let (tx, rx) = std::sync::mpsc::channel();
        self.handle.send(Command::Stats {
            reply: Box::new(move |stats| {
                let _ = tx.send(stats);
            }),
        });
        rx.recv_timeout(PATIENCE).unwrap()
    }

    pub(crate) fn exited(&mut self, child: usize, within: Duration) -> Option<i32> {
        let deadline = Instant::now() + within;
        while Instant::now() < deadline {
            if let Some(status) = self.children[child].try_wait().unwrap() {
                return Some(status.code().unwrap_or(-1));
            }
            std::thread::park_timeout(Duration::from_millis(5));
        }
        None
    }

    pub(crate) fn signal(&self, child: usize, signal: Sig) {
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

pub(crate) type Shared = (Arc<DispatchHandle>, Arc<(Mutex<Log>, Condvar)>, Arc<Stuck>);

pub(crate) fn start() -> Shared {
    let log: Arc<(Mutex<Log>, Condvar)> = Arc::default();
    let stuck = Arc::<Stuck>::default();
    let (events_tx, events_rx) = std::sync::mpsc::channel();
    let handle = dispatch::spawn(Box::new(move |event| {
        let _ = events_tx.send(event);
    }));
    let handle = Arc::new(handle.unwrap());
    let (weak, driver_log, is_stuck) = (Arc::downgrade(&handle), Arc::clone(&log), Arc::clone(&stuck));
    std::thread::spawn(move || {
        for event in events_rx {
            let is_online = matches!(event, DispatchEvent::Online { .. });
            let token = driver_log.0.lock().unwrap().record(event);
            driver_log.1.notify_all();
            while token.is_some() && is_stuck.recording.load(Ordering::Relaxed)
                || is_online && is_stuck.hearing.load(Ordering::Relaxed)
            {
                std::thread::park_timeout(Duration::from_millis(2));
            }
            if let Some(handle) = weak.upgrade() {
                handle.handled();
                if let Some(token) = token {
                    handle.send(Command::Recorded { token });
                }
            }
        }
    });
    (handle, log, stuck)
}

impl Log {
    pub(crate) fn record(&mut self, mut event: DispatchEvent) -> Option<dispatch::Token> {
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

    pub(crate) fn find(&self, wanted: impl FnMut(&DispatchEvent) -> bool) -> Option<()> {
        self.events.iter().any(wanted).then_some(())
    }

    pub(crate) fn messages(&self, of: &InstanceId) -> Vec<Value> {
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
pub(crate) fn get(port: u16, path: &str) -> Result<String, String> {
    request(TcpStream::connect(("127.0.0.1", port)).map_err(|e| format!("connect: {e}"))?, path)
}

pub(crate) fn request(mut stream: impl Read + Write, path: &str) -> Result<String, String> {
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

pub(crate) fn free_port() -> u16 {
    let socket = std::net::TcpListener::bind("[::]:0").unwrap();
    socket.local_addr().unwrap().port()
}
