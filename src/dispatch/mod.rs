//! One thread that owns every IPC channel and hands connections to workers.
//!
//! It never waits for the driver: commands are read between turns, events go into the driver's queue, and only a
//! worker's *control* lines (`ready`, `listening`, `close`, `listen()`) stay in their socket until the driver has
//! recorded what they mean ([`Command::Recorded`]). So it goes on serving while the driver is busy, and the next
//! supervisor finds every control line that had no recorded effect. Handlers are therefore idempotent.
//!
//! It never spawns or signals a process, never writes a file but the sockets it binds, with the rights of the app's user,
//! and never decides who is in rotation.

mod backlog;
mod crowd;
mod inbox;
mod input;
mod listeners;
mod output;
mod run;
mod shelf;
mod slots;

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use serde::{Deserialize, Serialize};

pub use crate::node::messages::{Drain, Greeting, Idle, InFlight, Query};

pub use shelf::ends as shelf_ends;

use backlog::Backlog;

use crate::model::figures::NodeFigures;
use crate::model::id::{AppName, InstanceId};
use crate::model::signal::Signal;
use crate::model::spec::Balance;
use crate::sys::guise::Guise;

/// How much of a user message an event carries, in bytes.
pub const MESSAGE_KEPT: usize = crate::node::channel::LINE_KEPT;

/// How long a worker taken out of rotation may leave a connection unanswered before it counts as settled.
pub const SETTLE_WITHIN: Duration = Duration::from_secs(1);

/// Ties a control line to what the driver records. Never used twice by a dispatch thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub u64);

/// An instance whose channel the thread shall own.
#[derive(Debug)]
pub struct NewInstance {
    /// Who it is, in every later command and event.
    pub id: InstanceId,
    /// Our end of its channel: a stream socket. Becomes non-blocking.
    pub channel: OwnedFd,
    /// What is spoken on it.
    pub kind: ChannelKind,
    /// Whether our preload runs in it; it is greeted at once.
    pub agent: Option<Greeting>,
    /// With whose rights unix sockets are made that it asks for: those that it has itself.
    pub guise: Guise,
    /// What a former supervisor recorded; `None` for a new instance.
    pub adopted: Option<Adopted>,
}

/// What is spoken on a channel.
#[derive(Debug)]
pub enum ChannelKind {
    /// User messages only (fork mode).
    Plain,
    /// Node's cluster protocol.
    Cluster {
        /// How this worker gets its connections. Workers of one app may differ while a reload changes it.
        balance: Balance,
        /// The app's configured listeners: `listen({fd: k})` means the one at `k - 3`.
        configured: Vec<Arc<OwnedFd>>,
    },
}

/// What a former supervisor recorded of an instance.
#[derive(Debug, Default)]
pub struct Adopted {
    /// `"ready"` was recorded.
    pub ready: bool,
    /// The listeners it has open ([`DispatchEvent::Opened`] less [`DispatchEvent::ListenerClosed`]); their sockets are
    /// given with [`Command::AdoptListener`] beforehand.
    pub open: Vec<OpenListener>,
    /// What the keeper holds for it ([`Part::Inbox`]).
    pub inbox: Option<OwnedFd>,
    /// Likewise: the long lines that have not gone, or not whole ([`Part::Line`]), by their numbers.
    pub lines: BTreeMap<u64, OwnedFd>,
}

/// What a channel needs to have held, beside its socket, so that the next supervisor goes on in the middle of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// What is known of a long line that is being read.
    Inbox,
    /// A long line for the app; its position is how much of it has gone.
    Line(u64),
}

/// A listener that a worker has open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenListener {
    /// The listener's key.
    pub key: String,
    /// The worker's query for it.
    pub query: Query,
    /// It has said that it listens, so it has had our answer.
    #[serde(default)]
    pub listening: bool,
}

/// Who made a listening socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Origin {
    /// The thread, for a worker's `listen()`. A unix path is unlinked when the listener is closed.
    Bound,
    /// The app's configuration.
    Configured,
}

/// A listener as the keeper holds it.
#[derive(Debug)]
pub struct KeptListener {
    /// Names it within its app.
    pub key: String,
    /// TLS ticket keys of the first worker, as JSON; secret.
    pub data: String,
    /// Who made it.
    pub origin: Origin,
    /// The socket, or a duplicate.
    pub socket: OwnedFd,
}

/// What the driver asks for. Unknown instances are ignored: they may have gone meanwhile.
pub enum Command {
    /// Keep unanswered connections between these sockets ([`shelf_ends`]), and go on with those that lie there. The first
    /// command of all.
    UseShelf {
        /// What goes in.
        put: OwnedFd,
        /// What comes out.
        take: OwnedFd,
    },
    /// Every instance and every listener of a former supervisor is here. The kernel does as that one told it until then.
    Adopted,
    /// Own this channel.
    AddInstance(Box<NewInstance>),
    /// A listener of a former supervisor; before the instances that have it open.
    AdoptListener {
        /// Whose.
        app: AppName,
        /// What.
        listener: KeptListener,
    },
    /// Connections go to this worker from now on. (In shared mode it takes them by itself from `listen()` on.)
    PutIn {
        /// Who.
        id: InstanceId,
    },
    /// No new connection goes to this worker; answered with [`DispatchEvent::Settled`].
    TakeOut {
        /// Who.
        id: InstanceId,
    },
    /// Ask the agent whether the app handles a signal; answered with [`DispatchEvent::KillListeners`], or never.
    AskKillListeners {
        /// Who.
        id: InstanceId,
        /// Which.
        signal: Signal,
    },
    /// Let the instance's connections end, by its agent; answered with [`DispatchEvent::Drained`], or never.
    Drain {
        /// Who.
        id: InstanceId,
        /// How.
        drain: Drain,
    },
    /// Ask the agents of these instances what they have measured; each answers with [`DispatchEvent::Figures`], or never.
    AskFigures {
        /// Who.
        ids: Vec<InstanceId>,
        /// Comes back with the answers.
        ask: u64,
    },
    /// Hand this socket to the agent, which gives it to the app's HTTP server. It is closed instead while the one
    /// before has not been taken: the app does not read its channel.
    Probe {
        /// Who.
        id: InstanceId,
        /// The app's end of a connection.
        socket: OwnedFd,
    },
    /// Have a cluster worker close its servers, end its connections and then its channel.
    Disconnect {
        /// Who.
        id: InstanceId,
    },
    /// Send the message `"shutdown"`.
    SendShutdown {
        /// Who.
        id: InstanceId,
    },
    /// Send a user message. One over 32 KiB goes when the keeper holds it, and is then finished by whoever comes
    /// after us.
    SendMessage {
        /// Who.
        id: InstanceId,
        /// One JSON value without a newline.
        json: String,
    },
    /// Close the channel and forget the instance; what it did not answer for goes to others.
    Remove {
        /// Who.
        id: InstanceId,
    },
    /// Close listeners; waiting connections are closed with them. The port is free when the keeper's copy is closed too.
    CloseListeners {
        /// Whose.
        app: AppName,
        /// Which; `None` for all.
        keys: Option<Vec<String>>,
    },
    /// The effect of an event is recorded: its line may be consumed, its query answered.
    Recorded {
        /// The event's.
        token: Token,
    },
    /// It could not be recorded (the keeper has no descriptor left): a query fails with this errno.
    NotRecorded {
        /// The event's.
        token: Token,
        /// Positive or negative.
        errno: i32,
    },
    /// Stop accepting, settle, and leave every channel at a line's end; answered with [`DispatchEvent::Frozen`] within
    /// [`SETTLE_WITHIN`].
    Freeze,
    /// Go on after [`Command::Freeze`].
    Thaw,
    /// Count.
    Stats {
        /// Called on the dispatch thread; must not block.
        reply: Box<dyn FnOnce(Stats) + Send>,
    },
    /// End the thread; sockets are closed.
    Finish,
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = match self {
            Self::UseShelf { .. } => "UseShelf",
            Self::Adopted => "Adopted",
            Self::AddInstance(new) => return f.debug_tuple("AddInstance").field(&new.id).finish(),
            Self::AdoptListener { .. } => "AdoptListener",
            Self::PutIn { .. } => "PutIn",
            Self::TakeOut { .. } => "TakeOut",
            Self::AskKillListeners { .. } => "AskKillListeners",
            Self::AskFigures { .. } => "AskFigures",
            Self::Drain { .. } => "Drain",
            Self::Probe { .. } => "Probe",
            Self::Disconnect { .. } => "Disconnect",
            Self::SendShutdown { .. } => "SendShutdown",
            Self::SendMessage { .. } => "SendMessage",
            Self::Remove { .. } => "Remove",
            Self::CloseListeners { .. } => "CloseListeners",
            Self::Recorded { .. } => "Recorded",
            Self::NotRecorded { .. } => "NotRecorded",
            Self::Freeze => "Freeze",
            Self::Thaw => "Thaw",
            Self::Stats { .. } => "Stats",
            Self::Finish => "Finish",
        };
        f.write_str(name)
    }
}

/// What happened. An event with a token waits for [`Command::Recorded`]; its channel is read no further until then.
#[derive(Debug)]
pub enum DispatchEvent {
    /// A cluster worker has started Node.
    Online {
        /// Who.
        id: InstanceId,
    },
    /// The app said `"ready"`, for the first time.
    Ready {
        /// Who.
        id: InstanceId,
        /// To be confirmed.
        token: Token,
    },
    /// A worker gets a listener: remember it with the worker and, when `new` is there, first have the keeper hold it.
    Opened {
        /// Who.
        id: InstanceId,
        /// Which.
        open: OpenListener,
        /// Listeners that did not exist before: this one, or those of further slots too.
        new: Vec<KeptListener>,
        /// To be confirmed; the worker's `listen()` goes on then.
        token: Token,
    },
    /// A worker's `listen()` is complete.
    Listening {
        /// Who.
        id: InstanceId,
        /// The listener; `None` when the runtime bound it by itself (Bun).
        key: Option<String>,
        /// For people: `*:8080`.
        address: String,
        /// To be confirmed.
        token: Token,
    },
    /// A worker closed a listener. The listener stays open for others until [`Command::CloseListeners`].
    ListenerClosed {
        /// Who.
        id: InstanceId,
        /// Which.
        key: String,
        /// How many workers still have it open.
        left: usize,
        /// To be confirmed.
        token: Token,
    },
    /// A worker's `listen()` failed, as it was told.
    ListenFailed {
        /// Who.
        id: InstanceId,
        /// For people.
        address: String,
        /// Positive.
        errno: i32,
    },
    /// The channel has ended. Says nothing about the process.
    ChannelClosed {
        /// Who.
        id: InstanceId,
    },
    /// After [`Command::TakeOut`]: no connection on its way to this worker is unanswered.
    Settled {
        /// Who.
        id: InstanceId,
        /// Connections that [`SETTLE_WITHIN`] was too short for; they are given to others should it die.
        unanswered: usize,
    },
    /// The agent is there.
    AgentHello {
        /// Who.
        id: InstanceId,
        /// `process.version`.
        version: String,
    },
    /// The agent's answer to [`Command::AskKillListeners`].
    KillListeners {
        /// Who.
        id: InstanceId,
        /// Which signal.
        signal: Signal,
        /// How many listeners the app has.
        count: u32,
    },
    /// No connection of this instance is open any more.
    Drained {
        /// Who.
        id: InstanceId,
    },
    /// The agent's answer to [`Command::AskFigures`].
    Figures {
        /// Who.
        id: InstanceId,
        /// The command's.
        ask: u64,
        /// What it has measured.
        figures: Box<NodeFigures>,
    },
    /// A message of the app's own.
    UserMessage {
        /// Who.
        id: InstanceId,
        /// What it said.
        message: Message,
    },
    /// A line over 16 MiB was skipped.
    LongLineSkipped {
        /// Who.
        id: InstanceId,
        /// Its length; 0 when a former supervisor has told it.
        bytes: u64,
        /// How many were skipped in the instance's life.
        total: u64,
    },
    /// To be held by the keeper for this instance, and then confirmed.
    Keep {
        /// Who.
        id: InstanceId,
        /// What.
        part: Part,
        /// A copy.
        file: OwnedFd,
        /// To be confirmed; the channel, or this line, goes on then.
        token: Token,
    },
    /// A long line has gone: nobody needs its file any more.
    LineGone {
        /// Who.
        id: InstanceId,
        /// Its number.
        number: u64,
    },
    /// A user's message was dropped: the app does not read.
    MessageDropped {
        /// Who.
        id: InstanceId,
    },
    /// Connections cannot be accepted (EMFILE, ENOBUFS, …); tried again every 50 ms, told once per streak.
    AcceptFailing {
        /// Whose listener.
        app: AppName,
        /// Which.
        key: String,
        /// Positive.
        errno: i32,
    },
    /// One client address makes more than four fifths of an app's connections, or does not any more. Counted only where
    /// clients belong to workers by their address.
    Crowd {
        /// Whose clients.
        app: AppName,
        /// Which address; `None`: none any more.
        address: Option<IpAddr>,
    },
    /// After [`Command::Freeze`]: nothing is read, written or accepted any more.
    Frozen {
        /// Instances whose channel could not be left at a line's end.
        midway: Vec<InstanceId>,
    },
    /// The thread is gone, by [`Command::Finish`] or by a bug.
    Ended {
        /// Whether it was a bug.
        panicked: bool,
    },
}

/// A message of an app's own. As long as it lives it counts towards what may wait for the driver.
#[derive(Debug)]
pub struct Message {
    bytes: Vec<u8>,
    length: u64,
    waiting: Arc<AtomicUsize>,
}

/// How many bytes of user messages may wait for the driver; more are dropped and counted.
pub const MESSAGES_WAITING: usize = 8 * 1024 * 1024;

impl Message {
    fn new(bytes: &[u8], length: u64, waiting: &Arc<AtomicUsize>) -> Option<Self> {
        let cost = bytes.len() + size_of::<Self>();
        // Only the dispatch thread adds, so nothing can come between.
        if waiting.load(Ordering::Relaxed) + cost > MESSAGES_WAITING {
            return None;
        }
        waiting.fetch_add(cost, Ordering::Relaxed);
        Some(Self { bytes: bytes.to_vec(), length, waiting: Arc::clone(waiting) })
    }

    /// At most [`MESSAGE_KEPT`] bytes of it: JSON, or any bytes without a newline.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Its true length.
    #[must_use]
    pub const fn length(&self) -> u64 {
        self.length
    }
}

impl Drop for Message {
    fn drop(&mut self) {
        self.waiting.fetch_sub(self.bytes.len() + size_of::<Self>(), Ordering::Relaxed);
    }
}

/// A count of everything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stats {
    /// Per instance with an open channel.
    pub instances: Vec<InstanceStats>,
    /// Per listener.
    pub listeners: Vec<ListenerStats>,
    /// Events that the driver has not handled.
    pub events_waiting: usize,
}

/// One instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstanceStats {
    /// Who.
    pub id: InstanceId,
    /// Connections it accepted from us.
    pub accepted: u64,
    /// Connections it has not answered for.
    pub unanswered: usize,
    /// Lines that wait for it.
    pub queued: usize,
    /// Messages of its own that were dropped because [`MESSAGES_WAITING`] was reached.
    pub messages_lost: u64,
}

/// One listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenerStats {
    /// Whose.
    pub app: AppName,
    /// Which.
    pub key: String,
    /// Workers that have it open.
    pub workers: usize,
    /// Of these, free ones in rotation.
    pub free: usize,
    /// Connections that were accepted and wait.
    pub pending: usize,
}

/// How many events may wait for the driver; a channel's buffer of lines more, at most.
pub const EVENTS: usize = 10_000;

/// The way to the thread. Dropping it ends the thread.
#[derive(Debug)]
pub struct DispatchHandle {
    commands_tx: Sender<Command>,
    wake: Arc<EventFd>,
    backlog: Backlog,
    thread: Option<JoinHandle<()>>,
}

impl DispatchHandle {
    /// Sends a command; never blocks. The queue stays short because the thread empties it every turn.
    pub fn send(&self, command: Command) {
        // Both fail only when the thread is gone, and `DispatchEvent::Ended` has told so.
        let _ = self.commands_tx.send(command);
        let _ = self.wake.write(1);
    }

    /// An event has been handled.
    pub fn handled(&self) {
        self.backlog.handled();
    }

    /// Ends the thread and waits for it.
    pub fn finish(mut self) {
        self.send(Command::Finish);
        if let Some(thread) = self.thread.take() {
            // A panic was reported as an event.
            let _ = thread.join();
        }
    }
}

impl Drop for DispatchHandle {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.send(Command::Finish);
        }
    }
}

/// Starts the thread. `sink` is called on it and must not block (an unbounded channel's `send`). Whoever handles an event
/// says so with [`DispatchHandle::handled`]: while [`EVENTS`] wait, channels are not read.
///
/// # Errors
/// No descriptors or threads left.
pub fn spawn(sink: Box<dyn Fn(DispatchEvent) + Send>) -> io::Result<DispatchHandle> {
    let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
    let (commands_tx, commands_rx) = mpsc::channel();
    let backlog = Backlog::default();
    let dispatcher = run::Dispatcher::new(Arc::clone(&wake), commands_rx, sink, backlog.clone())?;
    let thread = std::thread::Builder::new().name("dispatch".to_owned()).spawn(move || dispatcher.run())?;
    Ok(DispatchHandle { commands_tx, wake, backlog, thread: Some(thread) })
}
