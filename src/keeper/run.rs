//! The keeper's loop: signals, the link, starts that are under way; and the life of the supervisor.
//!
//! ```text
//!            start              Welcome, inventory, InventoryEnd
//! Waiting ─────────→ Greeting ──────────────────────────────────→ Ready
//!    ↑                  │ ended, link broken, too slow              │ ended, link broken
//!    └──────────────────┴───────────────────────────────────────────┘ (Quit was asked for: the keeper exits)
//! ```
//!
//! A daemon in the foreground that was asked to end does, also when no supervisor can: see `ending`.
//!
//! It never waits for the supervisor: frames that find no room are queued, the queue is bounded because the link is
//! not read while it is long, and exits need no queue because the zombies stay.

mod ending;
mod upgrade;

use std::ffi::{CStr, CString};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::sync::OnceLock;
use std::time::Duration;

use self::ending::Ending;
use self::upgrade::Succession;
pub use self::upgrade::{RESUME, Resumed};
use super::children::{Children, Originals};
use super::link::Inventory;
use super::packet::{Incoming, Packets};
use super::restarts::Restarts;
use super::wire::{Death, FromKeeper, Hello, ToKeeper, VERSION};
use crate::sys::child::{self, WaitStatus, Zombie};
use crate::sys::clock::{self, Moment};
use crate::sys::notify::{LEAVE_SIGNAL, Notifier};
use crate::sys::pidfd;
use crate::sys::poll::{self, Interest, Signals};
use crate::sys::spawn::{self, Confinement, Outcome, Program, Report, Target};
use crate::sys::{exec, fdpass, limits, pipe};

/// How to run a keeper.
#[derive(Debug)]
pub struct Config {
    /// The arguments of the supervisor, beginning with the program's name.
    pub args: Vec<CString>,
    /// The environment of the supervisor, `KEY=value` each.
    pub env: Vec<CString>,
    /// The supervisor's executable; `None` is this program's own.
    pub executable: Option<OwnedFd>,
    /// What is held from the start, by name: the lock, the command line's socket.
    pub held: Vec<(String, OwnedFd)>,
    /// An out-of-memory score adjustment for keeper and supervisor; children get the original one. Not being allowed
    /// to lower it is no error.
    pub oom_score_adj: Option<i32>,
    /// What the children get instead of the adjustment this process was started with.
    pub children_oom_score_adj: Option<i32>,
    /// What an earlier keeper left.
    pub estate: Option<Inventory>,
    /// What the program before this one left in this process.
    pub resumed: Option<Resumed>,
    /// The arguments of this process, for when an upgrade replaces it by another program.
    pub own_args: Vec<CString>,
    /// Who hears how the daemon is.
    pub notifier: Option<Notifier>,
    /// How often the service manager wants to hear of this process. A supervisor that is silent for as long is
    /// replaced.
    pub watchdog: Option<Duration>,
    /// Whoever started this process waits for its end: it leaves nothing to another keeper.
    pub foreground: bool,
}

impl Config {
    /// A keeper that starts this program again with these arguments and the present environment.
    #[must_use]
    pub fn new(args: Vec<CString>) -> Self {
        let env = std::env::vars_os().filter_map(|(key, value)| {
            let mut entry = key.into_vec();
            entry.push(b'=');
            entry.extend(value.into_vec());
            CString::new(entry).ok()
        });
        Self {
            args,
            env: env.collect(),
            executable: None,
            held: Vec::new(),
            oom_score_adj: None,
            children_oom_score_adj: None,
            estate: None,
            resumed: None,
            own_args: Vec::new(),
            notifier: None,
            watchdog: None,
            foreground: false,
        }
    }
}

/// Why a keeper cannot run.
#[derive(Debug, thiserror::Error)]
#[error("keeper cannot {step}")]
pub struct Error {
    /// What it tried.
    pub step: &'static str,
    /// What the kernel said.
    pub source: io::Error,
}

/// The children's starts that may be open at once; beyond that the link is not read.
const STARTING_MAX: usize = 64;
/// The frames that may wait for room in the link; beyond that it is not read.
const QUEUE_MAX: usize = 256;
/// A supervisor that has not taken the inventory by then hangs.
const GREETING_TIMEOUT: Duration = Duration::from_secs(60);
/// A supervisor that said Quit and is still there after this hangs.
const QUIT_TIMEOUT: Duration = Duration::from_secs(10);
/// While zombies wait for their confirmation, looking for other ones costs a system call per child: not more often
/// than this.
const SCAN_PAUSE: Duration = Duration::from_millis(5);
/// A keeper that was told to leave waits this long for starts that are under way, and for a supervisor.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(10);
/// When the kernel refuses to carry more descriptors, polling cannot tell when it will again.
const CONGESTION_PAUSE: Duration = Duration::from_millis(10);

/// Runs the keeper until a supervisor has said Quit and has ended; returns how that one ended. To be called before this
/// process has other threads.
///
/// # Errors
/// [`Error`] when it cannot begin, when waiting for events itself fails, or when it had to end the children itself.
pub fn run(config: Config) -> Result<Option<WaitStatus>, Error> {
    let mut keeper = Keeper::new(config)?;
    while keeper.turn()? == Turn::Again {}
    Ok(keeper.last_status)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    Again,
    Done,
}

struct Keeper {
    config: Config,
    executable: OwnedFd,
    signals: Signals,
    /// Signals that ask us to end and that we were not started with ignored.
    forwarded: Vec<i32>,
    started: Moment,
    /// As the daemon was started.
    open_files: limits::Limit,
    oom_score_adj: i32,
    originals: Originals,
    children: Children,
    supervisor: Supervisor,
    restarts: Restarts,
    last_death: Option<Death>,
    /// The daemon was told to end; stays until it does, whatever happens to supervisors.
    terminate: Option<i32>,
    /// Signals not yet sent on the link.
    to_forward: Vec<i32>,
    /// A supervisor said that everything is stopped.
    quit: Option<Moment>,
    /// How the supervisor ended that had said so.
    last_status: Option<WaitStatus>,
    /// Told to leave; until then at most.
    leave: Option<Moment>,
    succession: Succession,
    /// Nobody else ends everything.
    ending: Ending,
    /// When the service manager hears from us next.
    ping: Option<Moment>,
    /// When to look at every child again.
    scan_due: Option<Moment>,
    last_scan: Moment,
}

enum Supervisor {
    Waiting { until: Moment },
    Alive(Alive),
}

impl Supervisor {
    /// Whether it is this process.
    fn is(&self, pid: u32) -> bool {
        matches!(self, Self::Alive(alive) if alive.pid == pid)
    }
}

struct Alive {
    pid: u32,
    started: Moment,
    report: Option<Report>,
    /// `None` when the link is broken and the process is about to be reaped.
    link: Option<Packets>,
    phase: Phase,
    /// Its last sign of life, if it has promised more of them.
    beat: Option<Moment>,
    /// What is known about its end beyond the wait status.
    reason: String,
}

#[derive(Debug)]
enum Phase {
    /// Hello is sent.
    Greeting,
    /// This batch of the inventory is sent.
    Inventory { batch: u32, sent: Sent },
    /// It knows everything.
    Ready,
}

#[derive(Debug)]
enum Sent {
    ChildrenUpTo(u32),
    HeldUpTo(Option<String>),
}

impl Keeper {
    fn new(config: Config) -> Result<Self, Error> {
        fn step<T>(step: &'static str, outcome: io::Result<T>) -> Result<T, Error> {
            outcome.map_err(|source| Error { step, source })
        }
        let executable = match &config.executable {
            Some(fd) => step("copy a descriptor", fd.try_clone())?,
            None => step("open its own executable", exec::own_executable())?,
        };
        // Whoever started us may have left descriptors open.
        step("set descriptors to close on exec", fdpass::close_on_exec_from(3))?;
        let forwarded: Vec<i32> = [libc::SIGTERM, libc::SIGINT, libc::SIGQUIT, libc::SIGHUP]
            .into_iter()
            .filter(|&signal| !poll::is_ignored(signal))
            .collect();
        let mut watched = forwarded.clone();
        watched.extend([libc::SIGCHLD, LEAVE_SIGNAL]);
        let signals = step("take signals", Signals::block(&watched))?;
        step("take SIGCHLD", poll::default_sigchld())?;
        step("ignore SIGXFSZ", poll::ignore_sigxfsz())?;
        step("become a subreaper", child::become_subreaper())?;
        let open_files = step("raise its limit on open files", limits::raise_open_files())?;
        let oom_score_adj = limits::oom_score_adj().unwrap_or(0);
        let resumed = config.resumed.is_some();
        let changed =
            !resumed && config.oom_score_adj.is_some_and(|value| limits::set_oom_score_adj(value).is_ok());
        let started = clock::now();
        let mut keeper = Self {
            executable,
            signals,
            forwarded,
            started,
            open_files,
            oom_score_adj,
            originals: Originals {
                open_files,
                oom_score_adj: config.children_oom_score_adj.or(changed.then_some(oom_score_adj)),
            },
            children: Children::default(),
            supervisor: Supervisor::Waiting { until: started },
            restarts: Restarts::default(),
            last_death: None,
            terminate: None,
            to_forward: Vec::new(),
            quit: None,
            last_status: None,
            leave: None,
            succession: Succession::default(),
            ending: Ending::default(),
            ping: config.watchdog.and(config.notifier.as_ref()).map(|_| started),
            scan_due: None,
            last_scan: Moment::default(),
            config,
        };
        if let Some(estate) = keeper.config.estate.take() {
            keeper.terminate = estate.hello.terminate;
            keeper.succession = Succession::of_estate(estate.hello.upgrade.clone());
            keeper.children = Children::adopt(estate);
        }
        if let Some(resumed) = keeper.config.resumed.take() {
            keeper.resume(resumed);
        }
        for (name, fd) in std::mem::take(&mut keeper.config.held) {
            keeper.children.hold(vec![name], vec![fd], None);
        }
        Ok(keeper)
    }

    fn turn(&mut self) -> Result<Turn, Error> {
        let now = clock::now();
        self.act_on_deadlines(now);
        self.act_on_ending(now)?;
        if self.quit.is_some() && matches!(self.supervisor, Supervisor::Waiting { .. }) {
            return Ok(Turn::Done);
        }
        // Directly before the wait, so that no news lies here during it.
        self.tell();
        self.replace_when_quiet();
        if self.leave.is_some() && self.can_leave() && self.succession.is_over() {
            self.send(&FromKeeper::Leaving);
            return Ok(Turn::Done);
        }
        let ready = self.wait(now).map_err(|source| Error { step: "wait for events", source })?;
        // Outcomes of starts before exits: an answer precedes the end of its process.
        for pid in ready.settled {
            self.children.settle(pid);
        }
        for pid in ready.ended {
            self.look(pid);
        }
        if ready.signals {
            self.take_signals();
        }
        if ready.link {
            self.read_link(Patience::Bounded);
        }
        Ok(Turn::Again)
    }

    fn wait(&self, now: Moment) -> io::Result<Ready> {
        let mut wanted: Vec<(BorrowedFd<'_>, Interest)> = vec![(self.signals.as_fd(), Interest::Read)];
        let link = match &self.supervisor {
            Supervisor::Alive(alive) => alive.link.as_ref(),
            Supervisor::Waiting { .. } => None,
        };
        if let Some(link) = link {
            let interest = match (self.takes_orders(link), link.wants_room()) {
                (true, true) => Interest::ReadWrite,
                (true, false) => Interest::Read,
                (false, true) => Interest::Write,
                (false, false) => Interest::Hangup,
            };
            wanted.push((link.as_fd(), interest));
        }
        let first_report = wanted.len();
        let pids: Vec<u32> = self
            .children
            .starting()
            .map(|(pid, fd)| {
                wanted.push((fd, Interest::Read));
                pid
            })
            .collect();
        let first_adopted = wanted.len();
        let adopted: Vec<u32> = self
            .children
            .adopted()
            .map(|(pid, fd)| {
                wanted.push((fd, Interest::Read));
                pid
            })
            .collect();
        let timeout = self.next_deadline(now).map(|deadline| deadline.since(now));
        let ready = poll::wait(&wanted, timeout)?;
        let those = |pids: Vec<u32>, ready: &[bool]| -> Vec<u32> {
            pids.into_iter().zip(ready).filter(|&(_, &ready)| ready).map(|(pid, _)| pid).collect()
        };
        Ok(Ready {
            signals: ready[0],
            link: link.is_some() && ready[1],
            settled: those(pids, &ready[first_report..first_adopted]),
            ended: those(adopted, &ready[first_adopted..]),
        })
    }

    /// Whether there is room for what orders bring about.
    fn takes_orders(&self, link: &Packets) -> bool {
        link.waiting() < QUEUE_MAX && self.children.starting_len() < STARTING_MAX
    }

    fn next_deadline(&self, now: Moment) -> Option<Moment> {
        let supervisor = match &self.supervisor {
            // The exit of the one before is what is waited for.
            Supervisor::Waiting { .. } if self.succession.has_retired() => None,
            Supervisor::Waiting { .. } if self.ending.is_ours() => self.ending.next_deadline(),
            Supervisor::Waiting { until } => Some(*until),
            Supervisor::Alive(alive) if !matches!(alive.phase, Phase::Ready) && alive.link.is_some() => {
                Some(alive.started + GREETING_TIMEOUT)
            }
            Supervisor::Alive(_) => None,
        };
        let congested = match &self.supervisor {
            Supervisor::Alive(Alive { link: Some(link), .. }) if link.waiting() > 0 && !link.wants_room() => {
                Some(now + CONGESTION_PAUSE)
            }
            _ => None,
        };
        let beat = self.beat_due();
        let upgrade = self.succession.next_deadline();
        [supervisor, congested, self.scan_due, self.quit, self.leave, self.ping, beat, upgrade]
            .into_iter()
            .flatten()
            .min()
    }

    /// When the supervisor has been silent for too long.
    fn beat_due(&self) -> Option<Moment> {
        match &self.supervisor {
            Supervisor::Alive(Alive { link: Some(_), beat: Some(last), .. }) if self.quit.is_none() => {
                Some(*last + self.config.watchdog?)
            }
            _ => None,
        }
    }

    /// Whether the supervisor has everything that the next keeper will want to know of it.
    fn can_leave(&self) -> bool {
        match &self.supervisor {
            Supervisor::Alive(Alive { link: Some(link), phase: Phase::Ready, .. }) => {
                link.waiting() == 0 && self.children.starting_len() == 0
            }
            _ => false,
        }
    }

    fn act_on_deadlines(&mut self, now: Moment) {
        match &self.supervisor {
            Supervisor::Waiting { until }
                if *until <= now
                    && self.quit.is_none()
                    && !self.succession.has_retired()
                    && !self.ending.is_ours() =>
            {
                self.start_supervisor(now);
            }
            Supervisor::Alive(alive)
                if alive.link.is_some()
                    && !matches!(alive.phase, Phase::Ready)
                    && alive.started + GREETING_TIMEOUT <= now =>
            {
                self.break_link("did not take the inventory in time");
            }
            _ => {}
        }
        if self.quit.is_some_and(|at| at <= now) {
            self.quit = Some(now + QUIT_TIMEOUT);
            self.break_link("did not end after Quit");
        }
        if self.beat_due().is_some_and(|at| at <= now) {
            self.break_link("it gave no sign of life");
        }
        if self.leave.is_some_and(|until| until <= now) {
            say("told to leave, but there is nobody to leave everything to");
            self.leave = None;
        }
        if self.ping.is_some_and(|at| at <= now) {
            // A third of what is asked for: one may be late.
            self.ping = self.config.watchdog.map(|every| now + every / 3);
            self.notify("WATCHDOG=1");
        }
        if self.scan_due.is_some_and(|at| at <= now) {
            self.scan(now);
        }
        self.act_on_upgrade(now);
    }

    fn notify(&self, text: &str) {
        if let Some(notifier) = &self.config.notifier {
            // Nobody can be told that nobody can be told.
            let _ = notifier.send(text);
        }
    }

    // The supervisor's life.

    fn start_supervisor(&mut self, now: Moment) {
        match self.try_start_supervisor(self.executable.as_fd(), now) {
            Ok(alive) => {
                self.supervisor = Supervisor::Alive(alive);
                self.greet();
            }
            Err(reason) => self.bury(0, WaitStatus::from_raw(0), Duration::ZERO, reason, now),
        }
    }

    fn try_start_supervisor(&self, executable: BorrowedFd<'_>, now: Moment) -> Result<Alive, String> {
        let (ours, theirs) = pipe::packet_pair().map_err(|error| format!("cannot make a link: {error}"))?;
        let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
        let args: Vec<&CStr> = self.config.args.iter().map(AsRef::as_ref).collect();
        let env: Vec<&CStr> = self.config.env.iter().map(AsRef::as_ref).collect();
        // The link becomes `link::LINK_FD`.
        let fds = [stdin.as_fd(), stdout.as_fd(), stderr.as_fd(), theirs.as_fd()];
        let started = spawn::start(&Program {
            target: Target::File(executable),
            args: &args,
            env: &env,
            listen_pid: false,
            cwd: None,
            credentials: None,
            umask: None,
            confinement: &Confinement::NONE,
            cgroup: None,
            oom_score_adj: None,
            die_with_us: false,
            limits: &[],
            fds: &fds,
        })
        .map_err(|failure| failure.to_string())?;
        Ok(Alive {
            pid: started.pid,
            started: now,
            report: Some(started.report),
            link: Some(Packets::new(ours)),
            phase: Phase::Greeting,
            beat: None,
            reason: String::new(),
        })
    }

    fn hello(&self) -> Hello {
        Hello {
            version: VERSION,
            keeper_pid: std::process::id(),
            started: self.started.nanos(),
            open_files: self.open_files,
            oom_score_adj: self.oom_score_adj,
            deaths: self.restarts.deaths(),
            last_death: self.last_death.clone(),
            without_blob: self.restarts.without_blob(),
            terminate: self.terminate,
            upgrade: self.succession.last().cloned(),
        }
    }

    /// The link cannot be used any more: the supervisor is killed, and the next one gets the inventory.
    fn break_link(&mut self, reason: &str) {
        let Supervisor::Alive(alive) = &mut self.supervisor else { return };
        alive.link = None;
        if alive.reason.is_empty() {
            reason.clone_into(&mut alive.reason);
        }
        // Our unreaped child: its pid cannot mean anybody else. An error means that it has ended by itself.
        let _ = pidfd::open(alive.pid).and_then(|fd| pidfd::send_signal(fd, libc::SIGKILL));
    }

    /// The supervisor `pid` is a zombie, which has yet to be reaped.
    fn supervisor_ended(&mut self, pid: u32, status: WaitStatus) {
        // What it had said counts: its effects and ours stay in the order in which it meant them.
        self.read_link(Patience::Everything);
        if !self.supervisor.is(pid) {
            // Its last word was that another one goes on.
            self.successor_ended(pid, &status.to_string());
            return;
        }
        let now = clock::now();
        let waiting = Supervisor::Waiting { until: now };
        let Supervisor::Alive(alive) = std::mem::replace(&mut self.supervisor, waiting) else { return };
        let mut reason = alive.reason;
        if let Some(Outcome::Failed(failure)) = alive.report.map(|report| report.outcome()) {
            reason = failure.to_string();
        }
        self.bury(alive.pid, status, now.since(alive.started), reason, now);
    }

    fn bury(&mut self, pid: u32, status: WaitStatus, lived: Duration, reason: String, now: Moment) {
        self.children.forget_what_was_told();
        if self.quit.is_some() {
            self.last_status = Some(status);
            return;
        }
        let words = if reason.is_empty() { status.to_string() } else { reason.clone() };
        if self.trial_failed(&words, clock::now()) {
            self.supervisor = Supervisor::Waiting { until: now };
            return;
        }
        let delay = self.restarts.after_death(lived);
        let detail = if reason.is_empty() { String::new() } else { format!(" ({reason})") };
        say(&format!("supervisor {pid} ended: {status}{detail}; next one in {} ms", delay.as_millis()));
        let lived_ms = u64::try_from(lived.as_millis()).unwrap_or(u64::MAX);
        self.last_death = Some(Death { pid, status, lived_ms, reason });
        self.supervisor = Supervisor::Waiting { until: now + delay };
        self.supervisor_failed(now);
    }

    // What comes in.

    fn take_signals(&mut self) {
        let mut ended = Vec::new();
        while let Ok(Some(arrived)) = self.signals.next() {
            if arrived.signal == libc::SIGCHLD {
                ended.push(arrived.pid);
            } else if arrived.signal == LEAVE_SIGNAL {
                // Whoever is to end cannot leave things to others, nor whoever is waited for.
                if self.terminate.is_none() && self.quit.is_none() && !self.config.foreground {
                    self.leave.get_or_insert(clock::now() + LEAVE_TIMEOUT);
                }
            } else if self.forwarded.contains(&arrived.signal) {
                // The end of a terminal does not replace what somebody asked for.
                if arrived.signal != libc::SIGHUP || self.terminate.is_none() {
                    self.terminate = Some(arrived.signal);
                }
                self.to_forward.push(arrived.signal);
            }
        }
        if ended.is_empty() {
            return;
        }
        // One signal may stand for many exits, but the one it names is looked at without delay.
        for pid in ended {
            self.look(pid);
        }
        let now = clock::now();
        if now.since(self.last_scan) >= SCAN_PAUSE {
            self.scan(now);
        } else {
            self.scan_due = Some(self.last_scan + SCAN_PAUSE);
        }
    }

    /// Looks for every child that has ended.
    fn scan(&mut self, now: Moment) {
        self.last_scan = now;
        self.scan_due = None;
        // The kernel names the first zombie in its list; as long as that is a new one, nothing has to be searched.
        loop {
            match child::any_exited(Zombie::Keep) {
                Ok(None) => return,
                Ok(Some((pid, _))) if self.children.contains(pid) && !self.children.is_alive(pid) => break,
                Ok(Some((pid, _))) => self.look(pid),
                Err(error) => return say(&format!("cannot wait for children: {error}")),
            }
        }
        // An unconfirmed zombie is in the way.
        for pid in self.children.alive() {
            self.look(pid);
        }
        for pid in child::children().unwrap_or_default() {
            if !self.children.contains(pid) {
                self.look(pid);
            }
        }
    }

    /// Looks at one child that may have ended: instances stay zombies, orphans are reaped at once.
    fn look(&mut self, pid: u32) {
        if self.children.contains(pid) {
            if let Err(error) = self.children.look(pid) {
                say(&format!("cannot wait for {pid}: {error}"));
            }
            return;
        }
        // A hint may be outdated: the process was reaped by an earlier look.
        let Ok(Some(status)) = child::exited(pid, Zombie::Keep) else { return };
        if self.supervisor.is(pid) {
            self.supervisor_ended(pid, status);
        } else {
            self.successor_ended(pid, &status.to_string());
        }
        // Only now: a broken link has its process killed, and until here its pid can mean nobody else.
        let _ = child::exited(pid, Zombie::Reap);
    }

    fn read_link(&mut self, patience: Patience) {
        let Supervisor::Alive(Alive { pid: reads_of, .. }) = self.supervisor else { return };
        loop {
            let Supervisor::Alive(alive) = &self.supervisor else { return };
            if alive.pid != reads_of {
                // It has been told to go on, and has a link of its own.
                return;
            }
            let Some(link) = &alive.link else { return };
            if patience == Patience::Bounded && !self.takes_orders(link) {
                return;
            }
            let Supervisor::Alive(Alive { link: Some(link), .. }) = &mut self.supervisor else { return };
            match link.receive() {
                Ok(Incoming::Nothing) => return,
                Ok(Incoming::End) => return self.link_ended(),
                Ok(Incoming::Frame(frame, fds)) => match ToKeeper::decode(frame, fds.len()) {
                    Ok(order) => self.obey(order, fds),
                    Err(error) => return self.break_link(&format!("bad frame: {error}")),
                },
                Err(error) => return self.break_link(&format!("link failed: {error}")),
            }
        }
    }

    fn link_ended(&mut self) {
        match &mut self.supervisor {
            // It has said its last word and may tidy up.
            Supervisor::Alive(alive) if self.quit.is_some() => alive.link = None,
            // Its process has ended or is about to; the wait status tells more.
            _ => self.break_link(""),
        }
    }

    fn obey(&mut self, order: ToKeeper, fds: Vec<OwnedFd>) {
        let Supervisor::Alive(alive) = &mut self.supervisor else { return };
        match (&alive.phase, order) {
            (Phase::Greeting, ToKeeper::Welcome { .. }) => {
                alive.report = None;
                alive.phase = Phase::Inventory { batch: 0, sent: Sent::ChildrenUpTo(0) };
                self.send_next_batch();
            }
            (Phase::Inventory { batch: sent, .. }, ToKeeper::Taken { batch }) if batch == *sent => {
                self.send_next_batch();
            }
            (_, ToKeeper::Unknown { kind }) => self.send(&FromKeeper::NotUnderstood { kind }),
            (Phase::Ready, order) => self.obey_ready(order, fds),
            (Phase::Greeting | Phase::Inventory { .. }, _) => {
                self.break_link("gave orders before it had the inventory");
            }
        }
    }

    fn obey_ready(&mut self, order: ToKeeper, fds: Vec<OwnedFd>) {
        match order {
            ToKeeper::Spawn(spawn) => self.children.spawn(spawn, fds, &self.originals),
            ToKeeper::Confirm { pid, fds } => {
                if let Err(error) = self.children.confirm(pid, fds) {
                    say(&format!("cannot reap {pid}: {error}"));
                }
            }
            ToKeeper::Hold { names, owner } => self.children.hold(names, fds, owner),
            ToKeeper::Release { name } => self.children.release(&name),
            ToKeeper::ReleasePrefix { prefix } => self.children.release_prefix(&prefix),
            ToKeeper::Sync { request } => {
                // Answers to what came before go first.
                self.tell();
                self.send(&FromKeeper::Synced { request });
            }
            ToKeeper::Quit => self.quit = Some(clock::now() + QUIT_TIMEOUT),
            ToKeeper::Notify { text } => self.notify(&text),
            ToKeeper::Beat => {
                if let Supervisor::Alive(alive) = &mut self.supervisor {
                    alive.beat = Some(clock::now());
                }
            }
            ToKeeper::Upgrade { op, from, supervisor_only } => self.upgrade(op, from, supervisor_only, fds),
            ToKeeper::Go => self.go(),
            ToKeeper::TookOver => self.took_over(),
            ToKeeper::Welcome { .. } | ToKeeper::Taken { .. } | ToKeeper::Unknown { .. } => {}
        }
    }

    // What goes out.

    /// Sends the part of the inventory that follows, or its end.
    fn send_next_batch(&mut self) {
        let Supervisor::Alive(alive) = &mut self.supervisor else { return };
        let Phase::Inventory { batch, sent } = &mut alive.phase else { return };
        *batch += 1;
        let batch = *batch;
        if let Sent::ChildrenUpTo(after) = *sent {
            if let Some((children, last)) = self.children.batch_of_children(after) {
                *sent = Sent::ChildrenUpTo(last);
                return self.send(&FromKeeper::Children { batch, children });
            }
            *sent = Sent::HeldUpTo(None);
        }
        let Sent::HeldUpTo(after) = sent else { return };
        let Some((held, fds, last)) = self.children.batch_of_held(after.as_deref()) else {
            alive.phase = Phase::Ready;
            self.send(&FromKeeper::InventoryEnd);
            return self.dismiss(clock::now());
        };
        *after = Some(last);
        let Some(link) = &mut alive.link else { return };
        let outcome = match (FromKeeper::Held { batch, held }).encode(fds.len()) {
            Ok(frame) => link.send(frame, &fds).map_err(|error| format!("link failed: {error}")),
            Err(error) => Err(format!("cannot say what is held: {error}")),
        };
        if let Err(reason) = outcome {
            self.break_link(&reason);
        }
    }

    /// Tells the supervisor what it has not heard of, as far as there is room.
    fn tell(&mut self) {
        let Supervisor::Alive(Alive { link: Some(link), phase, .. }) = &mut self.supervisor else { return };
        if let Err(error) = link.flush() {
            return self.link_failed(&error);
        }
        if !matches!(phase, Phase::Ready) {
            return;
        }
        if let Some(news) = self.upgrade_news() {
            self.send(&news);
        }
        for signal in std::mem::take(&mut self.to_forward) {
            self.send(&FromKeeper::Terminate { signal });
        }
        while let Supervisor::Alive(Alive { link: Some(link), .. }) = &self.supervisor
            && link.waiting() < QUEUE_MAX
            && let Some(news) = self.children.next_news()
        {
            self.send(&news);
        }
    }

    fn send(&mut self, message: &FromKeeper) {
        let Supervisor::Alive(Alive { link: Some(link), .. }) = &mut self.supervisor else { return };
        match message.encode(0) {
            Ok(frame) => {
                if let Err(error) = link.send(frame, &[]) {
                    self.link_failed(&error);
                }
            }
            Err(error) => self.break_link(&format!("cannot say {message:?}: {error}")),
        }
    }

    /// A supervisor that is gone cannot be written to, but what it said before can still be read.
    fn link_failed(&mut self, error: &io::Error) {
        if !matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) {
            self.break_link(&format!("link failed: {error}"));
        }
    }
}

struct Ready {
    signals: bool,
    link: bool,
    settled: Vec<u32>,
    /// Children of an earlier keeper.
    ended: Vec<u32>,
}

/// How much of the link is read at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Patience {
    /// As much as there is room for its consequences.
    Bounded,
    /// All of it: its other end is closed, so that is what one socket buffer holds.
    Everything,
}

/// How a line is said where stderr has a form of its own. Must not wait.
static VOICE: OnceLock<fn(&str)> = OnceLock::new();

/// Lets this function say what there is to say; the first one that is set stays.
pub fn speak_through(voice: fn(&str)) {
    VOICE.get_or_init(|| voice);
}

/// A line on stderr, for the rare case that somebody has to look. Dropped when it would have to wait for a reader.
fn say(text: &str) {
    if let Some(voice) = VOICE.get() {
        return voice(text);
    }
    let mut stderr = io::stderr();
    let ready = poll::wait(&[(stderr.as_fd(), Interest::Write)], Some(Duration::ZERO));
    if ready.is_ok_and(|ready| ready[0]) {
        // There is nobody left to tell.
        let _ = writeln!(stderr, "pm daemon: {text}");
    }
}
