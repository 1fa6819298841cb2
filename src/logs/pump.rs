//! The thread that moves output from pipes to files.
//!
//! One thread for all instances, with its own epoll loop: a storm of lines delays neither a connection nor a command,
//! and a command delays no line. Ready pipes take turns, one read each, so a noisy app does not silence the others.
//! Files are shared by path: old and new generation of a slot, or all instances with `merge_logs`, append through one
//! `Writer`.
//!
//! An app holds its stdout as a pipe opened O_RDWR, so end of file never comes: the stream ends when the instance's
//! processes are gone ([`LogHandle::finish`]) and the pipe is drained. Nothing is read after that, although a process
//! that escaped might still write.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, SyncSender, TryRecvError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::ppoll;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::time::TimeSpec;
use nix::unistd::read;

use super::console::{Lines, Tap};
use super::line::{Company, Framing, Now};
use super::recent::{Recent, Stream};
use super::stamp::Stamp;
pub use super::watch::Watch;
use super::writer::{Target, Trouble, Writer};
use crate::model::id::InstanceId;

/// One read; also the capacity of a pipe unless somebody changed it.
const CHUNK: usize = 64 * 1024;
/// Ready pipes handled per turn of the loop.
const EVENTS: usize = 64;
/// Turns that follow each other within this time make a storm.
const QUICK: Duration = Duration::from_micros(500);
/// How long pipes fill during a storm.
const REST: Duration = Duration::from_micros(50);
/// The key of the eventfd that announces orders; streams count up from 0.
const ORDERS: u64 = u64::MAX;

/// What happened in the pump. Handed to the callback of [`spawn`], on the pump's thread: it must not block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogEvent {
    /// Everything the instance wrote is in its files, and its pipes are closed.
    Drained {
        /// The instance that [`LogHandle::finish`] named.
        id: InstanceId,
    },
    /// The instance's pipes are no longer read, see [`LogHandle::detach`].
    Detached {
        /// The instance.
        id: InstanceId,
    },
    /// A line that somebody waits for, see [`Attachment::watch`].
    Matched {
        /// Who wrote it.
        id: InstanceId,
        /// The line, without its end.
        line: Vec<u8>,
    },
    /// Every file was opened anew, see [`LogHandle::reopen`].
    Reopened,
    /// A file does not take output, which is dropped. At most once in ten seconds for a file.
    Trouble(Trouble),
}

/// The read end of a pipe and where its bytes go.
#[derive(Debug)]
pub struct Pipe {
    /// Our end. Its open file description becomes O_NONBLOCK; the app's is another one and is not touched.
    pub fd: OwnedFd,
    /// Where it goes.
    pub target: Target,
}

/// Whether an instance has written before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// It was just started: its first line begins a line.
    Spawned,
    /// It was taken over from another supervisor: it may be in the middle of a line.
    Adopted,
}

/// The output of an instance.
#[derive(Debug)]
pub struct Attachment {
    /// Whose it is.
    pub id: InstanceId,
    /// Standard output.
    pub out: Option<Pipe>,
    /// Standard error.
    pub err: Option<Pipe>,
    /// What goes before each line.
    pub stamp: Option<Stamp>,
    /// What goes before each line, after the stamp.
    pub mark: String,
    /// Lines that somebody waits for.
    pub watch: Option<Watch>,
}

enum Order {
    Print(InstanceId, Box<Tap>),
    Attach(Box<Attachment>, Origin, Arc<Mutex<Recent>>),
    Finish(InstanceId),
    Detach(InstanceId),
    Unwatch(InstanceId),
    Reopen,
    Stop(SyncSender<()>),
}

/// Gives orders to the pump. No call blocks or does I/O on files. Clones talk to the same pump, which ends with the
/// last of them.
#[derive(Clone)]
pub struct LogHandle {
    shared: Arc<Shared>,
}

struct Shared {
    /// Unbounded: a handful of orders per instance and run, and the pump takes all of them each turn.
    orders: Mutex<Option<Sender<Order>>>,
    wake: Arc<EventFd>,
    recent: Mutex<HashMap<InstanceId, Arc<Mutex<Recent>>>>,
    dropped: Arc<AtomicU64>,
}

impl fmt::Debug for LogHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogHandle").finish_non_exhaustive()
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // The thread sees that nobody can give orders any more.
        *lock(&self.orders) = None;
        let _ = self.wake.write(1);
    }
}

/// Starts the pump's thread. `on_event` runs on it.
///
/// # Errors
/// Whatever the kernel says to another epoll instance, eventfd or thread.
pub fn spawn(on_event: impl FnMut(LogEvent) + Send + 'static) -> io::Result<LogHandle> {
    let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(&wake, EpollEvent::new(EpollFlags::EPOLLIN, ORDERS))?;
    let (orders_tx, orders_rx) = mpsc::channel();
    let dropped = Arc::new(AtomicU64::new(0));
    let pump = Pump {
        epoll,
        wake: Arc::clone(&wake),
        orders: orders_rx,
        streams: HashMap::new(),
        next_key: 0,
        writers: HashMap::new(),
        taps: HashMap::new(),
        next_writer: 0,
        holding: Vec::new(),
        chunk: vec![0; CHUNK],
        batch: Vec::new(),
        dropped: Arc::clone(&dropped),
        on_event: Box::new(on_event),
    };
    thread::Builder::new().name("pm-logs".into()).stack_size(256 * 1024).spawn(move || pump.run())?;
    let shared = Shared { orders: Mutex::new(Some(orders_tx)), wake, recent: Mutex::default(), dropped };
    Ok(LogHandle { shared: Arc::new(shared) })
}

impl LogHandle {
    /// Starts reading the pipes of an instance that was just spawned. Its first line begins a line, also where its
    /// predecessor left one unfinished. Its files are opened on the pump's thread; if that fails, a
    /// [`LogEvent::Trouble`] says so, and it is tried again as output arrives.
    ///
    /// # Errors
    /// When a pipe cannot be made non-blocking.
    pub fn attach(&self, attachment: Attachment) -> io::Result<()> {
        self.attach_from(Origin::Spawned, attachment)
    }

    /// [`attach`](Self::attach) for an instance taken over from another supervisor: it may be in the middle of a line,
    /// which goes on where it ended.
    ///
    /// # Errors
    /// When a pipe cannot be made non-blocking.
    pub fn adopt(&self, attachment: Attachment) -> io::Result<()> {
        self.attach_from(Origin::Adopted, attachment)
    }

    fn attach_from(&self, origin: Origin, attachment: Attachment) -> io::Result<()> {
        for pipe in attachment.out.iter().chain(&attachment.err) {
            let flags = OFlag::from_bits_retain(fcntl(&pipe.fd, FcntlArg::F_GETFL)?);
            fcntl(&pipe.fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        }
        let recent = Arc::clone(lock(&self.shared.recent).entry(attachment.id.clone()).or_default());
        self.order(Order::Attach(Box::new(attachment), origin, recent));
        Ok(())
    }

    /// Prints what the instance writes, too, from its next attachment on.
    pub fn print(&self, id: InstanceId, tap: Tap) {
        self.order(Order::Print(id, Box::new(tap)));
    }

    /// The instance's processes are gone: reads its pipes to their end, writes the last unfinished line, closes
    /// everything, then reports [`LogEvent::Drained`], also for an instance it does not know.
    pub fn finish(&self, id: InstanceId) {
        self.order(Order::Finish(id));
    }

    /// Stops reading the instance's pipes and leaves in them what is there, for another reader. What was read is
    /// written first. Answered by [`LogEvent::Detached`].
    pub fn detach(&self, id: InstanceId) {
        self.order(Order::Detach(id));
    }

    /// Nobody waits for lines of this instance any more.
    pub fn unwatch(&self, id: InstanceId) {
        self.order(Order::Unwatch(id));
    }

    /// Opens every file anew, after somebody moved them. Answered by [`LogEvent::Reopened`]: from then on nothing is
    /// written to the old ones. (Without it the pump notices by itself within a second of output.)
    pub fn reopen(&self) {
        self.order(Order::Reopen);
    }

    /// The last `count` lines of an instance, both streams, oldest first; at most 40 lines or 4 KiB. Still there after
    /// [`finish`](Self::finish), until [`forget`](Self::forget).
    #[must_use]
    pub fn last_lines(&self, id: &InstanceId, count: usize) -> Vec<String> {
        let recent = lock(&self.shared.recent).get(id).map(Arc::clone);
        recent.map_or_else(Vec::new, |recent| lock(&recent).lines(count))
    }

    /// Frees the memory behind [`last_lines`](Self::last_lines).
    pub fn forget(&self, id: &InstanceId) {
        lock(&self.shared.recent).remove(id);
    }

    /// Bytes of output that no file took, since the pump was started.
    #[must_use]
    pub fn dropped_bytes(&self) -> u64 {
        self.shared.dropped.load(Ordering::Relaxed)
    }

    /// Ends the pump: what was read is written, what is still in the pipes stays there for the next reader. Returns
    /// whether that was done within `limit`; a hung disk may hold the thread up for longer.
    #[must_use]
    pub fn stop(&self, limit: Duration) -> bool {
        let (done_tx, done_rx) = mpsc::sync_channel(1);
        self.order(Order::Stop(done_tx));
        // An error of the other kind, a pump that is gone, is what was wanted.
        !matches!(done_rx.recv_timeout(limit), Err(mpsc::RecvTimeoutError::Timeout))
    }

    fn order(&self, order: Order) {
        if let Some(orders) = &*lock(&self.shared.orders) {
            // Fails only after `stop`.
            let _ = orders.send(order);
        }
        let _ = self.shared.wake.write(1);
    }
}

/// A poisoned lock is taken: what it guards is never left half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps the loop from waking up for every line of a storm.
///
/// A program that writes a line at a time would otherwise be read a line at a time: two system calls and a wake-up for
/// 100 bytes. When turns follow each other quickly and bring little, the loop rests for [`REST`] and lets the pipes
/// fill: a third of the CPU time, and, being shorter than it takes to fill a pipe, no wait for the app (benches/logs.rs;
/// 200 µs would double the time of the fastest writer).
#[derive(Debug, Default)]
struct Pace {
    last: Option<Instant>,
    needs_rest: bool,
}

impl Pace {
    fn note(&mut self, now: Instant, bytes: usize) {
        let is_quick = self.last.is_some_and(|last| now.saturating_duration_since(last) < QUICK);
        self.needs_rest = is_quick && bytes > 0 && bytes < CHUNK / 4;
        self.last = Some(now);
    }

    fn rest(&self) {
        if self.needs_rest {
            // Ending early, by a signal, only makes this turn a small one.
            let _ = ppoll(&mut [], Some(TimeSpec::from_duration(REST)), None);
        }
    }
}

/// Tells whether the loop goes on.
#[derive(PartialEq, Eq)]
enum Turn {
    Next,
    Last,
}

struct Source {
    id: InstanceId,
    fd: OwnedFd,
    stream: Stream,
    /// `None` discards.
    writer: Option<u64>,
    framing: Framing,
    recent: Arc<Mutex<Recent>>,
    watch: Option<Box<Watch>>,
    console: Option<Box<Lines>>,
}

struct SharedWriter {
    writer: Writer,
    path: PathBuf,
    streams: usize,
}

struct Pump {
    epoll: Epoll,
    wake: Arc<EventFd>,
    orders: Receiver<Order>,
    streams: HashMap<u64, Source>,
    next_key: u64,
    writers: HashMap<u64, SharedWriter>,
    /// Of instances that are about to be attached.
    taps: HashMap<InstanceId, Tap>,
    next_writer: u64,
    /// Streams that hold an unfinished line; usually none, and then the loop sleeps without a timeout.
    holding: Vec<u64>,
    chunk: Vec<u8>,
    batch: Vec<u8>,
    dropped: Arc<AtomicU64>,
    on_event: Box<dyn FnMut(LogEvent) + Send>,
}

impl Pump {
    fn run(mut self) {
        let mut events = [EpollEvent::empty(); EVENTS];
        let mut now = clocks();
        let mut pace = Pace::default();
        loop {
            pace.rest();
            let count = match self.epoll.wait(&mut events, self.timeout(now.instant)) {
                Ok(count) => count,
                Err(Errno::EINTR) => 0,
                // Anything else means that the epoll descriptor is gone, and with it every way to go on.
                Err(_) => return,
            };
            now = clocks();
            let mut has_orders = false;
            let mut bytes = 0;
            for event in &events[..count] {
                if event.data() == ORDERS {
                    has_orders = true;
                } else {
                    bytes += self.read_once(event.data(), now);
                }
            }
            pace.note(now.instant, bytes);
            self.flush_overdue(now);
            // After the reads: an order may remove a stream whose event is in the list.
            if has_orders && self.obey(now) == Turn::Last {
                return;
            }
        }
    }

    fn timeout(&self, now: Instant) -> EpollTimeout {
        let due = self.holding.iter().filter_map(|key| self.streams.get(key)?.framing.deadline()).min();
        due.map_or(EpollTimeout::NONE, |due| {
            // One more, or the timer ends in the millisecond before the deadline and the loop spins through it.
            let millis = due.saturating_duration_since(now).as_millis() + 1;
            EpollTimeout::from(u16::try_from(millis).unwrap_or(u16::MAX))
        })
    }

    fn obey(&mut self, now: Now) -> Turn {
        let _ = self.wake.read();
        loop {
            match self.orders.try_recv() {
                Ok(Order::Attach(attachment, origin, recent)) => {
                    self.attach(*attachment, origin, &recent, now);
                }
                Ok(Order::Print(id, tap)) => drop(self.taps.insert(id, *tap)),
                Ok(Order::Finish(id)) => {
                    for key in self.streams_of(&id) {
                        self.drain(key, now);
                        self.close(key, now);
                    }
                    (self.on_event)(LogEvent::Drained { id });
                }
                Ok(Order::Detach(id)) => {
                    for key in self.streams_of(&id) {
                        self.close(key, now);
                    }
                    (self.on_event)(LogEvent::Detached { id });
                }
                Ok(Order::Unwatch(id)) => {
                    for source in self.streams.values_mut().filter(|source| source.id == id) {
                        source.watch = None;
                    }
                }
                Ok(Order::Reopen) => self.reopen(now),
                Ok(Order::Stop(done)) => {
                    self.close_all(now);
                    let _ = done.send(());
                    return Turn::Last;
                }
                Err(TryRecvError::Empty) => return Turn::Next,
                Err(TryRecvError::Disconnected) => {
                    self.close_all(now);
                    return Turn::Last;
                }
            }
        }
    }

    fn attach(&mut self, attachment: Attachment, origin: Origin, recent: &Arc<Mutex<Recent>>, now: Now) {
        let Attachment { id, out, err, stamp, mark, watch } = attachment;
        let tap = self.taps.remove(&id);
        let pipes =
            [(Stream::Out, out), (Stream::Err, err)].into_iter().filter_map(|(s, pipe)| Some((s, pipe?)));
        for (stream, Pipe { fd, target }) in pipes {
            let key = self.next_key;
            self.next_key += 1;
            let writer = match target {
                Target::Discard => None,
                Target::File { path, owner } => {
                    let known = self
                        .writers
                        .iter()
                        .find(|(_, known)| known.path.as_os_str() == path.as_os_str())
                        .map(|(&key, _)| key);
                    let writer = known.unwrap_or_else(|| {
                        let number = self.next_writer;
                        self.next_writer += 1;
                        let writer = Writer::new(path.clone(), owner, now.instant);
                        self.writers.insert(number, SharedWriter { writer, path, streams: 0 });
                        number
                    });
                    if let Some(shared) = self.writers.get_mut(&writer) {
                        shared.streams += 1;
                        if shared.streams == 1 && origin == Origin::Spawned {
                            shared.writer.begin_line();
                        }
                    }
                    Some(writer)
                }
            };
            if let Err(error) = self.epoll.add(&fd, EpollEvent::new(EpollFlags::EPOLLIN, key)) {
                let path = writer.and_then(|key| Some(self.writers.get(&key)?.path.clone()));
                let reason = format!("output of {id} cannot be watched: {error}");
                (self.on_event)(LogEvent::Trouble(Trouble {
                    path: path.unwrap_or_default(),
                    reason,
                    dropped: 0,
                }));
            }
            let framing = Framing::new(key, stamp.clone(), mark.clone());
            let (recent, watch) = (Arc::clone(recent), watch.clone().map(Box::new));
            let console = tap.clone().map(|tap| Box::new(Lines::new(tap, stream)));
            let source = Source { id: id.clone(), fd, stream, writer, framing, recent, watch, console };
            self.streams.insert(key, source);
            self.report(writer);
        }
    }

    /// Reads one chunk. Returns how much there was; 0 when the pipe is empty or ended.
    fn read_once(&mut self, key: u64, now: Now) -> usize {
        let Some(source) = self.streams.get_mut(&key) else { return 0 };
        let count = match read(&source.fd, &mut self.chunk) {
            Ok(0) | Err(Errno::EIO | Errno::ECONNRESET) => {
                // Every writer has closed it. It stays readable for ever, so it is not watched any more; the
                // stream ends, like all others, with the instance.
                let _ = self.epoll.delete(source.fd.as_fd());
                return 0;
            }
            Ok(count) => count,
            Err(_) => return 0,
        };
        let chunk = &self.chunk[..count];
        lock(&source.recent).push(source.stream, chunk);
        if let Some(watch) = &mut source.watch {
            let id = &source.id;
            watch.feed(chunk, |line| {
                (self.on_event)(LogEvent::Matched { id: id.clone(), line: line.to_vec() });
            });
            if watch.is_over() {
                source.watch = None;
            }
        }
        if let Some(console) = &mut source.console {
            console.feed(chunk, now.wall);
        }
        let Some(number) = source.writer else { return count };
        let Some(shared) = self.writers.get_mut(&number) else { return count };
        let was_holding = source.framing.deadline().is_some();
        let company = if shared.streams == 1 { Company::Alone } else { Company::Shared };
        source.framing.feed(chunk, company, &mut shared.writer, &mut self.batch, now);
        match (was_holding, source.framing.deadline().is_some()) {
            (false, true) => self.holding.push(key),
            (true, false) => self.holding.retain(|&other| other != key),
            _ => {}
        }
        self.report(Some(number));
        count
    }

    fn flush_overdue(&mut self, now: Now) {
        for at in (0..self.holding.len()).rev() {
            let key = self.holding[at];
            let deadline = self.streams.get(&key).and_then(|source| source.framing.deadline());
            if deadline.is_none_or(|deadline| deadline <= now.instant) {
                self.holding.swap_remove(at);
                self.flush(key, now);
            }
        }
    }

    fn flush(&mut self, key: u64, now: Now) {
        let Some(source) = self.streams.get_mut(&key) else { return };
        let Some(number) = source.writer else { return };
        if let Some(shared) = self.writers.get_mut(&number) {
            source.framing.flush(&mut shared.writer, &mut self.batch, now);
        }
        self.report(Some(number));
    }

    /// Reads what was in the pipe when the processes ended, which is never more than the pipe holds: a process that
    /// escaped and goes on writing does not keep the instance from being finished.
    fn drain(&mut self, key: u64, now: Now) {
        let Some(source) = self.streams.get(&key) else { return };
        let capacity = fcntl(&source.fd, FcntlArg::F_GETPIPE_SZ).ok();
        let capacity = capacity.and_then(|size| usize::try_from(size).ok()).unwrap_or(CHUNK);
        let mut total = 0;
        while total < capacity {
            match self.read_once(key, now) {
                0 => return,
                count => total += count,
            }
        }
    }

    fn close(&mut self, key: u64, now: Now) {
        self.flush(key, now);
        self.holding.retain(|&other| other != key);
        let Some(mut source) = self.streams.remove(&key) else { return };
        if let Some(console) = &mut source.console {
            console.finish(now.wall);
        }
        // Closing is not enough: the keeper has the same open file description, which would stay registered.
        let _ = self.epoll.delete(source.fd.as_fd());
        let Some(number) = source.writer else { return };
        if let Some(shared) = self.writers.get_mut(&number) {
            shared.streams -= 1;
            if shared.streams == 0 {
                self.writers.remove(&number);
            }
        }
    }

    fn close_all(&mut self, now: Now) {
        let keys: Vec<u64> = self.streams.keys().copied().collect();
        for key in keys {
            self.close(key, now);
        }
    }

    fn reopen(&mut self, now: Now) {
        for shared in self.writers.values_mut() {
            if let Err(error) = shared.writer.reopen(now.instant) {
                let (path, reason) = (shared.path.clone(), format!("cannot open it again: {error}"));
                (self.on_event)(LogEvent::Trouble(Trouble { path, reason, dropped: 0 }));
            }
        }
        (self.on_event)(LogEvent::Reopened);
    }

    fn streams_of(&self, id: &InstanceId) -> Vec<u64> {
        let mut keys: Vec<u64> =
            self.streams.iter().filter(|(_, source)| source.id == *id).map(|(&key, _)| key).collect();
        keys.sort_unstable();
        keys
    }

    fn report(&mut self, writer: Option<u64>) {
        let Some(shared) = writer.and_then(|number| self.writers.get_mut(&number)) else { return };
        let dropped = shared.writer.take_dropped();
        if dropped > 0 {
            self.dropped.fetch_add(dropped, Ordering::Relaxed);
        }
        if let Some(trouble) = shared.writer.take_report() {
            (self.on_event)(LogEvent::Trouble(trouble));
        }
    }
}

fn clocks() -> Now {
    Now { instant: Instant::now(), wall: Timestamp::now() }
}
