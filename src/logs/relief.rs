//! Keeps apps from waiting for a slow disk.
//!
//! The pump writes by itself: handing every chunk to another thread would cost as much as writing it. So a disk that takes
//! its time holds up the pump, and every app whose pipe is full. This thread looks on. When the pump has done little but wait
//! for a disk for two seconds, it reads the pipes that fill up and throws away what is in them, counted; the pump says in the
//! log what is missing as soon as it gets there. It is asleep while nothing is written, and awake four times a second
//! otherwise.
//!
//! A machine that is merely busy costs no line: a pump that could run and gets no processor does not wait for a disk, and an
//! app that writes as fast as it can may be held up by it, as by any reader.
//!
//! Never: a copy of what apps write; a pipe of an app whose `log_overflow` is `block`.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, Thread};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::unistd::{gettid, read};

use super::recent::{Recent, Stream};
use crate::sys::pipe;

/// How often it looks while lines are written.
const LOOK: Duration = Duration::from_millis(250);
/// How often it looks while the pump waits for a disk.
const LOOK_CLOSELY: Duration = Duration::from_millis(25);
/// After so many looks that found it waiting (two seconds), less four for each that did not, pipes are emptied.
const PATIENCE: u32 = 80;
/// As many looks that find it waiting are counted; it is no longer slow when they are used up down to [`PATIENCE`].
const COUNTED: u32 = 120;
/// What a look counts that finds it not waiting.
const RELAX: u32 = 4;

/// A pipe that may be emptied.
#[derive(Debug)]
pub(super) struct Outlet {
    pub(super) fd: Arc<OwnedFd>,
    pub(super) stream: Stream,
    pub(super) recent: Arc<Mutex<Recent>>,
}

/// What the pump tells.
#[derive(Debug)]
pub(super) struct Relief {
    /// Counts beginnings and ends of work: odd while something is written.
    work: AtomicU64,
    is_asleep: AtomicBool,
    /// The pump's thread.
    pump: AtomicI32,
    outlets: Mutex<HashMap<u64, Outlet>>,
    /// Whoever takes from a pipe has it.
    taking: Mutex<()>,
    thread: Thread,
}

impl Drop for Relief {
    fn drop(&mut self) {
        self.thread.unpark();
    }
}

impl Relief {
    /// Starts the thread, which ends with the last copy of what is returned.
    ///
    /// # Errors
    /// See pthread_create(3).
    pub(super) fn start() -> io::Result<Arc<Self>> {
        let (shared_tx, shared_rx) = std::sync::mpsc::sync_channel::<Weak<Self>>(1);
        let thread =
            thread::Builder::new().name("pm-logs-relief".into()).stack_size(128 * 1024).spawn(move || {
                if let Ok(shared) = shared_rx.recv() {
                    run(&shared);
                }
            })?;
        let shared = Arc::new(Self {
            work: AtomicU64::new(0),
            is_asleep: AtomicBool::new(false),
            pump: AtomicI32::new(0),
            outlets: Mutex::default(),
            taking: Mutex::new(()),
            thread: thread.thread().clone(),
        });
        // Fails only when the thread is gone.
        let _ = shared_tx.send(Arc::downgrade(&shared));
        Ok(shared)
    }

    pub(super) fn add(&self, key: u64, outlet: Outlet) {
        lock(&self.outlets).insert(key, outlet);
    }

    pub(super) fn remove(&self, key: u64) {
        lock(&self.outlets).remove(&key);
    }

    /// To be held while something is taken from a pipe.
    pub(super) fn taking(&self) -> MutexGuard<'_, ()> {
        lock(&self.taking)
    }

    /// The pump's thread tells which it is.
    pub(super) fn is_for_this_thread(&self) {
        self.pump.store(gettid().as_raw(), Ordering::SeqCst);
    }

    /// Whether the pump, which works, can do nothing: it neither runs nor waits for a processor.
    fn waits_for_disk(&self) -> bool {
        let stat = fs::read(format!("/proc/self/task/{}/stat", self.pump.load(Ordering::SeqCst)));
        let state = stat.ok().and_then(|stat| {
            // Its name is in parentheses, and ours.
            let end = memchr::memrchr(b')', &stat)?;
            stat.get(end + 2).copied()
        });
        state.is_some_and(|state| matches!(state, b'D' | b'S'))
    }

    /// Something is about to be written.
    pub(super) fn begin(&self) {
        self.work.fetch_add(1, Ordering::SeqCst);
        if self.is_asleep.load(Ordering::SeqCst) && self.is_asleep.swap(false, Ordering::SeqCst) {
            self.thread.unpark();
        }
    }

    /// It is written, or lost.
    pub(super) fn end(&self) {
        self.work.fetch_add(1, Ordering::SeqCst);
    }

    /// Empties the pipes that are at least half full.
    fn relieve(&self, chunk: &mut [u8], began: u64) {
        for outlet in lock(&self.outlets).values() {
            let _taking = self.taking();
            // From here on the pump does it itself.
            if self.work.load(Ordering::SeqCst) != began {
                return;
            }
            let capacity = fcntl(&outlet.fd, FcntlArg::F_GETPIPE_SZ).unwrap_or(0);
            let capacity = usize::try_from(capacity).unwrap_or(0);
            let waiting = pipe::waiting(&outlet.fd).unwrap_or(0);
            if waiting * 2 < capacity {
                continue;
            }
            let mut left = waiting;
            while left > 0 {
                let size = left.min(chunk.len());
                match read(&outlet.fd, &mut chunk[..size]) {
                    Ok(0) => break,
                    Ok(count) => {
                        lock(&outlet.recent).lose(outlet.stream, &chunk[..count]);
                        left -= count.min(left);
                    }
                    Err(Errno::EINTR) => {}
                    Err(_) => break,
                }
            }
        }
    }
}

fn run(shared: &Weak<Relief>) {
    let mut chunk = Vec::new();
    let mut waits = 0;
    let mut seen = u64::MAX;
    loop {
        let Some(relief) = shared.upgrade() else { return };
        let now = relief.work.load(Ordering::SeqCst);
        let is_waiting = !now.is_multiple_of(2) && relief.waits_for_disk();
        waits = if is_waiting { (waits + 1).min(COUNTED) } else { waits.saturating_sub(RELAX) };
        if is_waiting && waits >= PATIENCE {
            chunk.resize(super::journal::CHUNK, 0);
            relief.relieve(&mut chunk, now);
        } else if waits == 0 {
            chunk = Vec::new();
        }
        if now == seen && now.is_multiple_of(2) {
            relief.is_asleep.store(true, Ordering::SeqCst);
            // It may have begun in between.
            if relief.work.load(Ordering::SeqCst) == now {
                drop(relief);
                thread::park();
                (seen, waits) = (u64::MAX, 0);
                continue;
            }
            relief.is_asleep.store(false, Ordering::SeqCst);
        }
        seen = now;
        drop(relief);
        thread::park_timeout(if waits > 0 { LOOK_CLOSELY } else { LOOK });
    }
}

/// A poisoned lock is taken: what it guards is never left half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
