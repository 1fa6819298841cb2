//! One thread that ends process trees, any number of them at the same time.
//!
//! Requests that arrive together share one look at /proc. Between looks the thread sleeps until a process it waits for
//! has exited (pidfd) or a deadline is near; it never waits for one instance while another has something to do. It
//! reaps nothing: zombies belong to their parents, and to the keeper.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::time::{ClockId, clock_gettime};

use super::job::{Job, Look, Step};
use super::pidfd::Pidfd;
use super::{Root, Scanner, Snapshot, Tree};
use crate::model::id::InstanceId;
use crate::model::moment::Moment;
use crate::model::signal::Signal;
use crate::model::spec::KillMode;
use crate::sys::procfs::{ProcessId, Stat};

/// How often to look when a process cannot be waited for, or /proc cannot be read, for lack of descriptors.
pub(super) const RETRY: Duration = Duration::from_millis(25);

/// Looks that may fail in a row before a request is answered with the error.
const RETRIES: u32 = 40;

/// How many processes of a tree are waited for at a time. All have to go before it is empty, so when these are gone
/// the next ones have their turn; no tree can use up the descriptors.
const WATCHED_AT_MOST: usize = 16;

/// The epoll key of the request queue; requests have keys from 1.
const QUEUE: u32 = 0;

/// An instance as the worker needs to know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instance {
    /// Who it is; comes back in the answer.
    pub id: InstanceId,
    /// Where its tree starts. Ask before the exit of the main process is confirmed to the keeper.
    pub root: Root,
}

/// What to do with an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TreeOp {
    /// Send a signal once, then SIGCONT. Answered [`Outcome::Signalled`].
    Signal {
        /// Who gets it.
        mode: KillMode,
        /// Which.
        signal: Signal,
    },
    /// Send the stop signal, then SIGCONT. As `Signal`; in mode `Target`, if the target exits and the shells and
    /// package runners above it do not within 300 ms, they get the signal as well.
    Stop {
        /// Who gets it.
        mode: KillMode,
        /// Which.
        signal: Signal,
    },
    /// Go on with a `Stop` in mode `Target` after `target` got its signal from a supervisor that was killed. Not
    /// answered.
    Follow {
        /// Who got it.
        target: ProcessId,
        /// Which it was.
        signal: Signal,
    },
    /// SIGKILL everything, the main process included. Answered [`Outcome::Empty`], or [`Outcome::Left`] after 5 s.
    KillAll,
    /// End what an exited main process left behind: the signal, after `grace` SIGKILL. Answered as `KillAll`.
    EndLeftovers {
        /// The signal that comes first.
        signal: Signal,
        /// From the signal to SIGKILL.
        grace: Duration,
    },
    /// Wait until nothing runs, without doing anything. Answered [`Outcome::Empty`], or [`Outcome::Left`] at the
    /// deadline.
    AwaitEmpty {
        /// Until when.
        deadline: Moment,
    },
}

/// The answer to a request. Every request gets exactly one, unless the worker is dropped first.
#[derive(Clone, Debug)]
pub struct TreeEvent {
    /// Which instance.
    pub id: InstanceId,
    /// What was asked.
    pub op: TreeOp,
    /// What came of it.
    pub outcome: Outcome,
}

/// What came of a request.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// The signal was sent to these processes; to none when there was nothing to signal.
    Signalled(Vec<ProcessId>),
    /// Nothing of the instance runs any more. A main process that waits to be reaped does not count.
    Empty,
    /// These were still there at the end of the time.
    Left(Vec<Stat>),
    /// Nothing can be said.
    Failed(Arc<io::Error>),
}

enum Message {
    Ask(Instance, TreeOp),
    End,
}

/// The handle of the thread. Dropping it ends the thread: what was asked before is begun (SIGKILL is sent, not awaited),
/// and what it was waiting for is not answered.
#[derive(Debug)]
pub struct TreeWorker {
    queue_tx: Sender<Message>,
    wake: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl TreeWorker {
    /// Starts the thread. `keeper` is the parent of all instances. `answer` is called on the thread and should be
    /// short.
    ///
    /// # Errors
    /// No descriptors or no threads left.
    pub fn start(keeper: i32, answer: impl Fn(TreeEvent) + Send + 'static) -> io::Result<Self> {
        let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(wake.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, key(QUEUE, 0)))?;
        // Unbounded, and short all the same: the stop ladder has at most one request per instance and step.
        let (queue_tx, queue_rx) = mpsc::channel();
        let mut state = Worker {
            keeper,
            answer,
            queue_rx,
            wake: Arc::clone(&wake),
            epoll,
            scanner: Scanner::new(),
            jobs: HashMap::new(),
            next_key: QUEUE,
            ended: false,
        };
        let thread = std::thread::Builder::new().name("tree".to_owned()).spawn(move || state.run())?;
        Ok(Self { queue_tx, wake, thread: Some(thread) })
    }

    /// Asks for something; the answer comes through the callback.
    pub fn ask(&self, instance: Instance, op: TreeOp) {
        self.send(Message::Ask(instance, op));
    }

    fn send(&self, message: Message) {
        // Neither can fail while the thread runs; after a panic in it there is nobody left to tell.
        let _ = self.queue_tx.send(message);
        let _ = self.wake.write(1);
    }
}

impl Drop for TreeWorker {
    fn drop(&mut self) {
        self.send(Message::End);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Worker<F> {
    keeper: i32,
    answer: F,
    queue_rx: Receiver<Message>,
    wake: Arc<EventFd>,
    epoll: Epoll,
    scanner: Scanner,
    jobs: HashMap<u32, Job>,
    next_key: u32,
    ended: bool,
}

impl<F: Fn(TreeEvent)> Worker<F> {
    fn run(&mut self) {
        let mut events = [EpollEvent::empty(); 128];
        while !self.ended {
            let timeout = self.timeout(now());
            let count = match self.epoll.wait(&mut events, timeout) {
                Ok(count) => count,
                Err(Errno::EINTR) => 0,
                // The descriptor is ours and valid: nothing else is documented. Looking every RETRY still works.
                Err(_) => {
                    for job in self.jobs.values_mut() {
                        job.due = true;
                    }
                    0
                }
            };
            for event in &events[..count] {
                self.exited(event.data());
            }
            self.drain();
            let now = now();
            for job in self.jobs.values_mut() {
                job.due |= job.wake_at.is_some_and(|at| at <= now);
            }
            // Also after the end: nothing that was stopped in order to be killed may be left like that.
            while self.round() {
                self.drain();
            }
        }
    }

    fn timeout(&self, now: Moment) -> EpollTimeout {
        let Some(at) = self.jobs.values().filter_map(|job| job.wake_at).min() else {
            return EpollTimeout::NONE;
        };
        // Rounded up: waking a moment too early would only mean another turn.
        let millis = at.since(now).as_micros().div_ceil(1000);
        EpollTimeout::try_from(millis).unwrap_or(EpollTimeout::MAX)
    }

    fn exited(&mut self, data: u64) {
        let (job, pid) = unkey(data);
        if job == QUEUE {
            let _ = self.wake.read();
            return;
        }
        // Closing the pidfd takes it out of the epoll set.
        if let Some(job) = self.jobs.get_mut(&job)
            && job.watched.remove(&pid).is_some()
        {
            job.due |= job.watched.is_empty();
        }
    }

    fn drain(&mut self) {
        loop {
            match self.queue_rx.try_recv() {
                Ok(Message::Ask(instance, op)) => self.accept(instance, op),
                Ok(Message::End) | Err(TryRecvError::Disconnected) => {
                    self.ended = true;
                    return;
                }
                Err(TryRecvError::Empty) => return,
            }
        }
    }

    fn accept(&mut self, instance: Instance, op: TreeOp) {
        // Whatever comes next for this instance says how it goes on.
        if !matches!(op, TreeOp::AwaitEmpty { .. }) {
            self.jobs.retain(|_, job| job.instance.id != instance.id || !job.is_following());
        }
        self.next_key = self.next_key.checked_add(1).unwrap_or(QUEUE + 1);
        self.jobs.insert(self.next_key, Job::new(instance, op, now()));
    }

    /// One look at all instances that are due, and a step for each. Whether there was any.
    fn round(&mut self) -> bool {
        let mut keys: Vec<u32> = self.jobs.iter().filter(|(_, job)| job.due).map(|(&key, _)| key).collect();
        if keys.is_empty() {
            return false;
        }
        keys.sort_unstable();
        let roots: HashSet<Root> = keys
            .iter()
            .map(|k| &self.jobs[k])
            .filter(|j| j.needs_tree())
            .map(|j| j.instance.root.clone())
            .collect();
        let roots: Vec<Root> = roots.into_iter().collect();
        let snapshot = if roots.is_empty() {
            Ok(Snapshot::default())
        } else {
            Snapshot::take(&mut self.scanner, self.keeper, &roots)
        };
        let snapshot = match snapshot {
            Ok(snapshot) => snapshot,
            Err(error) => {
                self.postpone(&keys, error);
                return true;
            }
        };
        let trees: HashMap<&Root, &Tree> = roots.iter().zip(&snapshot.trees).collect();
        let nothing = Tree::default();
        let now = now();
        for key in keys {
            let Some(mut job) = self.jobs.remove(&key) else { continue };
            let tree = trees.get(&job.instance.root).copied().unwrap_or(&nothing);
            job.failures = 0;
            job.due = false;
            job.wake_at = None;
            let look = Look { tree, settled: snapshot.settled, empty: tree.is_empty() && snapshot.settled };
            match job.step(&mut self.scanner, &look, now) {
                Ok(Step::Again) => job.due = true,
                Ok(Step::Wait(until)) => {
                    self.watch(key, &mut job, tree.living().map(|s| s.process), now, until);
                }
                Ok(Step::Follow(target, told)) => {
                    if !told.is_empty() {
                        self.reply(&job, Outcome::Signalled(told));
                    }
                    self.watch(key, &mut job, std::iter::once(target), now, Moment::from_nanos(u64::MAX));
                }
                Ok(Step::Sleep(until)) => job.wake_at = Some(until),
                Ok(Step::Forget) => continue,
                Ok(Step::Done(outcome)) => {
                    self.reply(&job, outcome);
                    continue;
                }
                Err(error) => {
                    if !job.is_following() {
                        self.reply(&job, Outcome::Failed(Arc::new(error)));
                    }
                    continue;
                }
            }
            self.jobs.insert(key, job);
        }
        true
    }

    /// Waits for the exit of these processes, at most until then.
    fn watch(
        &mut self,
        key: u32,
        job: &mut Job,
        processes: impl Iterator<Item = ProcessId>,
        now: Moment,
        until: Moment,
    ) {
        let mut before = std::mem::take(&mut job.watched);
        let mut blind = false;
        for process in processes.take(WATCHED_AT_MOST) {
            let watch = match before.remove(&process.pid) {
                Some(Some(pidfd)) => Some(pidfd),
                _ => match Pidfd::open(self.scanner.procfs(), process) {
                    Ok(Some(pidfd)) => {
                        let event = EpollEvent::new(EpollFlags::EPOLLIN, self::key(key, process.pid));
                        self.epoll.add(pidfd.as_fd(), event).is_ok().then_some(pidfd)
                    }
                    // Gone since the look.
                    Ok(None) => continue,
                    Err(_) => None,
                },
            };
            blind |= watch.is_none();
            job.watched.insert(process.pid, watch);
        }
        job.due = job.watched.is_empty();
        job.wake_at = Some(if blind { until.min(now + RETRY) } else { until });
    }

    fn postpone(&mut self, keys: &[u32], error: io::Error) {
        let at = now() + RETRY;
        let error = Arc::new(error);
        for key in keys {
            let Some(mut job) = self.jobs.remove(key) else { continue };
            job.failures += 1;
            if job.failures > RETRIES {
                self.reply(&job, Outcome::Failed(Arc::clone(&error)));
            } else {
                job.due = false;
                job.wake_at = Some(at);
                self.jobs.insert(*key, job);
            }
        }
    }

    fn reply(&self, job: &Job, outcome: Outcome) {
        (self.answer)(TreeEvent { id: job.instance.id.clone(), op: job.op, outcome });
    }
}

/// CLOCK_MONOTONIC.
fn now() -> Moment {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
    Moment::from_nanos(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX))
}

fn key(job: u32, pid: i32) -> u64 {
    u64::from(job) << 32 | u64::from(pid.cast_unsigned())
}

#[expect(clippy::cast_possible_truncation, reason = "takes apart what key() put together")]
const fn unkey(data: u64) -> (u32, i32) {
    ((data >> 32) as u32, (data as u32).cast_signed())
}
