//! The children and the descriptors held for them: what an inventory is made of. Decides nothing and talks to nobody;
//! changes that a supervisor has to hear of are collected here until they are told.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use super::link::Inventory;
use super::mirror::{pidfd_name, with_prefix};
use super::wire::{
    COMMAND_MAX, ChildRecord, ChildState, CommandView, FDS_MAX, FRAME_MAX, FromKeeper, HeldFds, HeldRecord,
    Spawn, child_len, held_len,
};
use crate::sys::child::{self, WaitStatus, Zombie};
use crate::sys::limits::Limit;
use crate::sys::memfd::Mapped;
use crate::sys::pidfd;
use crate::sys::poll::{self, Interest};
use crate::sys::spawn::{self, Failure, Outcome, Program, Report, Stage, Target};

/// What a child gets that the keeper itself has changed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Originals {
    /// The limit on open descriptors.
    pub(super) open_files: Limit,
    /// The out-of-memory score adjustment; `None` while ours is the original.
    pub(super) oom_score_adj: Option<i32>,
}

#[derive(Debug)]
struct Child {
    start_ticks: u64,
    tag: Vec<u8>,
    state: State,
    /// The answer that is owed on the present link.
    request: Option<u64>,
    /// The supervisor on the present link knows of it, and knows that it has ended.
    known: bool,
    end_known: bool,
    /// The names of what is held for it.
    held: Vec<String>,
    parent: Parent,
}

#[derive(Debug)]
enum Parent {
    Us,
    /// A keeper that is gone: whoever inherited the process reaps it, and this descriptor tells when it ends.
    Gone(Option<OwnedFd>),
}

#[derive(Debug)]
enum State {
    Starting(Report),
    Running,
    /// A zombie.
    Exited(WaitStatus),
}

#[derive(Debug)]
struct Held {
    fd: OwnedFd,
    owner: Option<u32>,
}

#[derive(Debug)]
struct NotStarted {
    request: u64,
    pid: u32,
    failure: Failure,
}

/// All children that have a tag, and all held descriptors.
#[derive(Debug, Default)]
pub(super) struct Children {
    children: BTreeMap<u32, Child>,
    held: BTreeMap<String, Held>,
    /// Pids whose report is open.
    starting: BTreeSet<u32>,
    /// Pids of which something is to be told, in no particular order.
    news: BTreeSet<u32>,
    failures: VecDeque<NotStarted>,
}

impl Children {
    /// What a keeper that is gone left, to be looked after here.
    pub(super) fn adopt(inventory: Inventory) -> Self {
        let mut all = Self::to_pass_on(inventory);
        for (&pid, child) in &mut all.children {
            if matches!(child.state, State::Exited(_)) {
                continue;
            }
            let name = pidfd_name(pid);
            child.held.retain(|held| *held != name);
            let handed = all.held.remove(&name).map(|held| held.fd);
            let opened = || pidfd::open_same(pid, child.start_ticks).ok().flatten();
            match handed.or_else(opened) {
                Some(fd) => child.parent = Parent::Gone(Some(fd)),
                // Gone, or nothing could tell when it is: the next look at it would find the same.
                None => child.state = State::Exited(WaitStatus::UNKNOWN),
            }
        }
        all
    }

    /// What this process had before it replaced itself: our own children, and those of an earlier keeper. Its
    /// supervisor knows all of it.
    pub(super) fn resume(
        records: Vec<ChildRecord>,
        adopted: Vec<(u32, Option<OwnedFd>)>,
        held: Vec<(HeldRecord, OwnedFd)>,
    ) -> Self {
        let mut all = Self::default();
        for record in records {
            let state = match record.state {
                ChildState::Exited(status) => State::Exited(status),
                ChildState::Starting | ChildState::Running => State::Running,
            };
            let child = Child {
                start_ticks: record.start_ticks,
                tag: record.tag,
                end_known: matches!(state, State::Exited(_)),
                state,
                request: None,
                known: true,
                held: Vec::new(),
                parent: Parent::Us,
            };
            all.children.insert(record.pid, child);
        }
        for (pid, pidfd) in adopted {
            if let Some(child) = all.children.get_mut(&pid) {
                child.parent = Parent::Gone(pidfd);
            }
        }
        for (record, fd) in held {
            all.hold(vec![record.name], vec![fd], record.owner);
        }
        all
    }

    /// The children of an earlier keeper, each with the descriptor that tells of its end.
    pub(super) fn not_ours(&self) -> impl Iterator<Item = (u32, Option<BorrowedFd<'_>>)> {
        self.children.iter().filter_map(|(&pid, child)| match &child.parent {
            Parent::Us => None,
            Parent::Gone(pidfd) => Some((pid, pidfd.as_ref().map(AsFd::as_fd))),
        })
    }

    /// Whether the supervisor has been told everything.
    pub(super) fn is_quiet(&self) -> bool {
        self.news.is_empty() && self.failures.is_empty() && self.starting.is_empty()
    }

    /// What a keeper that is gone left, to be told to the next one.
    pub(super) fn to_pass_on(inventory: Inventory) -> Self {
        let mut all = Self::default();
        let mut owners: BTreeMap<String, u32> = BTreeMap::new();
        for child in inventory.children {
            owners.extend(child.held.iter().map(|name| (name.clone(), child.pid)));
            let state = match child.state {
                ChildState::Exited(status) => State::Exited(status),
                ChildState::Starting | ChildState::Running => State::Running,
            };
            let adopted = Child {
                start_ticks: child.start_ticks,
                tag: child.tag,
                state,
                request: None,
                known: false,
                end_known: false,
                held: child.held,
                parent: Parent::Gone(None),
            };
            all.children.insert(child.pid, adopted);
        }
        for (name, fd) in inventory.held {
            let owner = owners.get(&name).copied();
            all.held.insert(name, Held { fd, owner });
        }
        all
    }

    /// The children of an earlier keeper that still run, each with the descriptor that becomes readable when it ends.
    pub(super) fn adopted(&self) -> impl Iterator<Item = (u32, BorrowedFd<'_>)> {
        self.children.iter().filter_map(|(&pid, child)| match child.state {
            State::Exited(_) => None,
            State::Starting(_) | State::Running => match &child.parent {
                Parent::Gone(Some(pidfd)) => Some((pid, pidfd.as_fd())),
                Parent::Gone(None) | Parent::Us => None,
            },
        })
    }

    /// Holds descriptors under names. A name in use gets the new descriptor.
    pub(super) fn hold(&mut self, names: Vec<String>, fds: Vec<OwnedFd>, owner: Option<u32>) {
        // An owner that is gone cannot release anything.
        let owner = owner.filter(|pid| self.children.contains_key(pid));
        for (name, fd) in names.into_iter().zip(fds) {
            if let Some(child) = owner.and_then(|pid| self.children.get_mut(&pid)) {
                child.held.push(name.clone());
            }
            self.held.insert(name, Held { fd, owner });
        }
    }

    pub(super) fn release(&mut self, name: &str) {
        let owner = self.held.remove(name).and_then(|held| held.owner);
        if let Some(child) = owner.and_then(|pid| self.children.get_mut(&pid)) {
            child.held.retain(|held| held != name);
        }
    }

    pub(super) fn release_prefix(&mut self, prefix: &str) {
        let names = with_prefix(&self.held, prefix);
        for name in names {
            self.release(&name);
        }
    }

    /// Starts a program. From the instant its process exists it and what is held for it are in the inventory.
    pub(super) fn spawn(&mut self, spawn: Spawn, fds: Vec<OwnedFd>, originals: &Originals) {
        let request = spawn.request;
        if let Err(failure) = self.try_spawn(spawn, fds, originals) {
            self.failures.push_back(NotStarted { request, pid: 0, failure });
        }
    }

    fn try_spawn(
        &mut self,
        spawn: Spawn,
        mut fds: Vec<OwnedFd>,
        originals: &Originals,
    ) -> Result<(), Failure> {
        let refused = |error: io::Error| Failure {
            stage: Stage::Request,
            errno: error.raw_os_error().unwrap_or(libc::EINVAL),
        };
        let attached = match spawn.command {
            Some(_) => None,
            None => fds.pop().map(|fd| Mapped::new(fd, COMMAND_MAX)).transpose().map_err(refused)?,
        };
        let bytes = attached.as_deref().or(spawn.command.as_deref()).unwrap_or_default();
        let command = CommandView::decode(bytes)
            .map_err(|error| refused(io::Error::new(io::ErrorKind::InvalidData, error)))?;
        // The wire has checked that there are as many descriptors as the frame says.
        let to_hold = fds.split_off(usize::from(spawn.child_fds).min(fds.len()));
        let child_fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        let mut limits = vec![originals.open_files];
        limits.extend(&command.limits);
        let started = spawn::start(&Program {
            target: Target::Path(command.program),
            args: &command.args,
            env: &command.env,
            listen_pid: command.listen_pid,
            cwd: Some(command.cwd).filter(|cwd| !cwd.is_empty()),
            credentials: command.credentials.as_ref(),
            umask: command.umask,
            oom_score_adj: command.oom_score_adj.or(originals.oom_score_adj),
            die_with_us: false,
            limits: &limits,
            confinement: &command.confinement,
            cgroup: Some(command.cgroup).filter(|dir| !dir.is_empty()),
            fds: &child_fds,
        })?;
        if self.children.contains_key(&started.pid) {
            // A child of an earlier keeper had this pid, and its end is not confirmed yet. Two of one name would be
            // taken for each other: this one has not begun, and is asked for again.
            let _ = pidfd::open(started.pid).and_then(|fd| pidfd::send_signal(fd, libc::SIGKILL));
            return Err(Failure { stage: Stage::Fork, errno: libc::EAGAIN });
        }
        let child = Child {
            // Our unreaped child has an entry in /proc; without one mounted every check of ticks fails, never passes.
            start_ticks: child::start_ticks(started.pid).unwrap_or(0),
            tag: spawn.tag,
            state: State::Starting(started.report),
            request: Some(spawn.request),
            known: false,
            end_known: false,
            held: Vec::new(),
            parent: Parent::Us,
        };
        self.children.insert(started.pid, child);
        self.starting.insert(started.pid);
        self.hold(spawn.held, to_hold, Some(started.pid));
        Ok(())
    }

    /// The children whose start is still open, each with the descriptor that becomes readable when it is not.
    pub(super) fn starting(&self) -> impl Iterator<Item = (u32, BorrowedFd<'_>)> {
        self.starting.iter().filter_map(|&pid| match &self.children.get(&pid)?.state {
            State::Starting(report) => Some((pid, report.as_fd())),
            State::Running | State::Exited(_) => None,
        })
    }

    pub(super) fn starting_len(&self) -> usize {
        self.starting.len()
    }

    /// Looks how the start of this child went.
    pub(super) fn settle(&mut self, pid: u32) {
        let Entry::Occupied(mut entry) = self.children.entry(pid) else { return };
        let State::Starting(report) = &entry.get().state else { return };
        match report.outcome() {
            Outcome::Open => {}
            Outcome::Running => {
                entry.get_mut().state = State::Running;
                self.starting.remove(&pid);
                self.news.insert(pid);
            }
            Outcome::Failed(failure) => {
                // It never was an instance: from here on its process is any orphan, reaped when it ends.
                let child = entry.remove();
                self.starting.remove(&pid);
                self.news.remove(&pid);
                for name in &child.held {
                    self.release_owned(name, pid);
                }
                // Without request and not in the inventory, it was the business of a supervisor that is gone.
                if child.request.is_some() || child.known {
                    let request = child.request.unwrap_or(0);
                    self.failures.push_back(NotStarted { request, pid, failure });
                }
            }
        }
    }

    fn release_owned(&mut self, name: &str, owner: u32) {
        if self.held.get(name).is_some_and(|held| held.owner == Some(owner)) {
            self.held.remove(name);
        }
    }

    /// Whether `pid` is a child with a tag that still runs, as far as is known.
    pub(super) fn is_alive(&self, pid: u32) -> bool {
        self.children.get(&pid).is_some_and(|child| !matches!(child.state, State::Exited(_)))
    }

    /// Whether `pid` is a child with a tag.
    pub(super) fn contains(&self, pid: u32) -> bool {
        self.children.contains_key(&pid)
    }

    /// Signals every child that still runs; with SIGKILL its process group as well, and those of children that have ended and
    /// are zombies.
    pub(super) fn signal(&self, signal: i32) {
        for (&pid, child) in &self.children {
            let is_alive = !matches!(child.state, State::Exited(_));
            let process = match &child.parent {
                // Not reaped, so its pid is its own, and the number of its group.
                Parent::Us => pidfd::open(pid).ok(),
                Parent::Gone(_) if is_alive => pidfd::open_same(pid, child.start_ticks).ok().flatten(),
                Parent::Gone(_) => None,
            };
            let Some(process) = process else { continue };
            if is_alive {
                // One that has just ended.
                let _ = pidfd::send_signal(process, signal);
            }
            if signal == libc::SIGKILL {
                pidfd::kill_group(pid);
            }
        }
    }

    /// The pids of all children that still run, as far as is known.
    pub(super) fn alive(&self) -> Vec<u32> {
        self.children.keys().copied().filter(|&pid| self.is_alive(pid)).collect()
    }

    /// Looks whether this child has ended, and leaves its zombie.
    ///
    /// # Errors
    /// See waitid(2).
    pub(super) fn look(&mut self, pid: u32) -> io::Result<()> {
        if let Some(child) = self.children.get_mut(&pid)
            && let Parent::Gone(pidfd) = &child.parent
        {
            let Some(pidfd) = pidfd else { return Ok(()) };
            let ready = poll::wait(&[(pidfd.as_fd(), Interest::Read)], Some(Duration::ZERO))?;
            if ready[0] && !matches!(child.state, State::Exited(_)) {
                // As a zombie it tells everybody; reaped, it tells us on Linux 6.15 and later.
                let status =
                    child::status_of_zombie(pid, child.start_ticks).or_else(|| pidfd::exit_status(pidfd));
                child.state = State::Exited(status.unwrap_or(WaitStatus::UNKNOWN));
                self.news.insert(pid);
            }
            return Ok(());
        }
        let Some(status) = child::exited(pid, Zombie::Keep)? else { return Ok(()) };
        // The report first: a program that ended at once was started all the same, and its answer precedes its end.
        self.settle(pid);
        match self.children.get_mut(&pid) {
            Some(child) => {
                child.state = State::Exited(status);
                self.starting.remove(&pid);
                self.news.insert(pid);
            }
            None => drop(child::exited(pid, Zombie::Reap)?),
        }
        Ok(())
    }

    /// Lets the zombie of this child go. Nothing happens to one that still runs or is unknown.
    ///
    /// # Errors
    /// See waitid(2).
    pub(super) fn confirm(&mut self, pid: u32, fds: HeldFds) -> io::Result<()> {
        let Entry::Occupied(entry) = self.children.entry(pid) else { return Ok(()) };
        if !matches!(entry.get().state, State::Exited(_)) {
            return Ok(());
        }
        let child = entry.remove();
        self.news.remove(&pid);
        for name in &child.held {
            match fds {
                HeldFds::Release => self.release_owned(name, pid),
                HeldFds::Keep => {
                    if let Some(held) = self.held.get_mut(name).filter(|held| held.owner == Some(pid)) {
                        held.owner = None;
                    }
                }
            }
        }
        match child.parent {
            Parent::Us => child::exited(pid, Zombie::Reap).map(drop),
            Parent::Gone(_) => Ok(()),
        }
    }

    /// The link is gone: the next supervisor has heard of nothing.
    pub(super) fn forget_what_was_told(&mut self) {
        for child in self.children.values_mut() {
            child.request = None;
            child.known = false;
            child.end_known = false;
        }
        self.news.clear();
        self.failures.clear();
    }

    /// The next inventory batch of children with pids above `after`, and the last pid in it.
    pub(super) fn batch_of_children(&mut self, after: u32) -> Option<(Vec<ChildRecord>, u32)> {
        let mut records = Vec::new();
        let (mut bytes, mut last) = (0, after);
        for (&pid, child) in self.children.range_mut(after.saturating_add(1)..) {
            let state = match child.state {
                State::Starting(_) => ChildState::Starting,
                State::Running => ChildState::Running,
                State::Exited(status) => ChildState::Exited(status),
            };
            let record = ChildRecord { pid, start_ticks: child.start_ticks, tag: child.tag.clone(), state };
            bytes += child_len(&record);
            if bytes > BATCH_MAX {
                break;
            }
            child.known = true;
            child.end_known = matches!(child.state, State::Exited(_));
            if child.end_known {
                self.news.remove(&pid);
            }
            records.push(record);
            last = pid;
        }
        if records.is_empty() { None } else { Some((records, last)) }
    }

    /// The next inventory batch of held descriptors with names above `after`, and the last name in it.
    pub(super) fn batch_of_held(
        &self,
        after: Option<&str>,
    ) -> Option<(Vec<HeldRecord>, Vec<BorrowedFd<'_>>, String)> {
        use std::ops::Bound::{Excluded, Unbounded};
        let mut records: Vec<HeldRecord> = Vec::new();
        let mut fds = Vec::new();
        let mut bytes = 0;
        let from = after.map_or(Unbounded, Excluded);
        for (name, held) in self.held.range::<str, _>((from, Unbounded)) {
            let record = HeldRecord { name: name.clone(), owner: held.owner };
            bytes += held_len(&record);
            if bytes > BATCH_MAX || fds.len() == FDS_MAX {
                break;
            }
            fds.push(held.fd.as_fd());
            records.push(record);
        }
        let last = records.last()?.name.clone();
        Some((records, fds, last))
    }

    /// The next thing the supervisor has not heard of. To be called only after the inventory is complete.
    pub(super) fn next_news(&mut self) -> Option<FromKeeper> {
        if let Some(NotStarted { request, pid, failure }) = self.failures.pop_front() {
            return Some(FromKeeper::SpawnFailed { request, pid, failure });
        }
        while let Some(pid) = self.news.pop_first() {
            let Some(child) = self.children.get_mut(&pid) else { continue };
            if let Some(request) = child.request.take() {
                child.known = true;
                if matches!(child.state, State::Exited(_)) {
                    self.news.insert(pid);
                }
                return Some(FromKeeper::Spawned { request, pid, start_ticks: child.start_ticks });
            }
            if let State::Exited(status) = child.state
                && !child.end_known
            {
                child.end_known = true;
                return Some(FromKeeper::Exited { pid, tag: child.tag.clone(), status });
            }
        }
        None
    }
}

/// Bytes of records in an inventory batch; the rest of the frame is headers.
const BATCH_MAX: usize = FRAME_MAX - 64;
