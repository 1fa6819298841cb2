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

mod run;

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Sender, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};

use self::run::Pump;
use super::console::Tap;
use super::journal::{Dropped, Journal};
use super::recent::Recent;
use super::relief::Relief;
use super::stamp::Stamp;
pub use super::watch::Watch;
use super::writer::{Target, Trouble};
use crate::model::id::InstanceId;
use crate::model::spec::Overflow;

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
    /// What happens to output that its files do not take.
    pub overflow: Overflow,
    /// Lines that somebody waits for.
    pub watch: Option<Watch>,
}

/// Where the output of an instance goes from now on.
#[derive(Debug)]
pub struct Route {
    /// Whose it is.
    pub id: InstanceId,
    /// Standard output.
    pub out: Target,
    /// Standard error.
    pub err: Target,
    /// What goes before each line.
    pub stamp: Option<Stamp>,
    /// What happens to output that its files do not take.
    pub overflow: Overflow,
}

/// Where one stream goes from now on.
struct Turnoff {
    target: Target,
    stamp: Option<Stamp>,
    overflow: Overflow,
}

enum Order {
    Print(InstanceId, Box<Tap>),
    Attach(Box<Attachment>, Origin, Arc<Mutex<Recent>>),
    Finish(InstanceId),
    Detach(InstanceId),
    Unwatch(InstanceId),
    Redirect(Box<Route>),
    Reopen,
    Settle,
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

/// Starts the pump's thread, which goes on where the journal was left. `on_event` runs on it.
///
/// # Errors
/// Whatever the kernel says to another epoll instance, eventfd or thread.
pub fn spawn(journal: Journal, on_event: impl FnMut(LogEvent) + Send + 'static) -> io::Result<LogHandle> {
    let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(&wake, EpollEvent::new(EpollFlags::EPOLLIN, ORDERS))?;
    let (orders_tx, orders_rx) = mpsc::channel();
    let dropped = Arc::new(AtomicU64::new(0));
    let relief = Relief::start()?;
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
        paused: Vec::new(),
        retry_at: None,
        relief,
        journal,
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

    /// Sends the output of an instance somewhere else from the next line on. A line that is in its file in part ends
    /// there.
    pub fn redirect(&self, route: Route) {
        self.order(Order::Redirect(Box::new(route)));
    }

    /// What was dropped of an instance's output since it began.
    #[must_use]
    pub fn dropped(&self, id: &InstanceId) -> Dropped {
        let recent = lock(&self.shared.recent).get(id).map(Arc::clone);
        recent.map_or_else(Dropped::default, |recent| lock(&recent).dropped())
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

    /// Everything that an earlier supervisor left has been adopted: what the journal has of other streams is forgotten.
    pub fn settle(&self) {
        self.order(Order::Settle);
    }

    /// Ends the pump: lines that were read are written, the beginning of one stays in the journal, and what is still in
    /// the pipes stays there for the next reader. Returns whether that was done within `limit`; a hung disk may hold the
    /// thread up for longer.
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
