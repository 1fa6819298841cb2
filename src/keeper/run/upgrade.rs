//! An upgrade, as the keeper sees it: the next supervisor is started from another executable, and the keeper replaces
//! itself by that.
//!
//! ```text
//!           Upgrade               Go                        TookOver              nothing under way
//! (serving) ──────→ prepared ───────────→ trial ─────────────────→ (serving) ──────────────────────→ execve
//!                   waits for  Hello,      │  ended, or not within TRIAL        where its own program differs
//!                   its Hello  inventory   ↓
//!                                  the program before it is started again
//! ```
//!
//! The old supervisor (`retired`) keeps its copies of everything, frozen, until the new one has them.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use super::{Alive, Keeper, Phase, Supervisor, say};
use crate::keeper::packet::Packets;
use crate::keeper::wire::own::Own;
use crate::keeper::wire::{ChildRecord, FromKeeper, HeldRecord, Hello, Upgrade, UpgradeState};
use crate::sys::activity::Activity;
use crate::sys::clock::{self, Moment};
use crate::sys::memfd::{self, Mapped};
use crate::sys::{exec, fdpass, pidfd};

/// A supervisor that wanted to freeze has done so by then.
const PREPARED: Duration = Duration::from_secs(15);
/// A new supervisor has taken over by then, or never will.
const TRIAL: Duration = Duration::from_secs(5);
/// One that does nothing for so long, neither computes nor waits for a processor or a disk, never will either: connections
/// that only a supervisor hands out wait meanwhile.
const STALLED: Duration = Duration::from_secs(2);
/// How often it is looked at.
const LOOK: Duration = Duration::from_millis(250);
/// A supervisor that was dismissed is gone by then.
const DISMISSED: Duration = Duration::from_secs(2);
/// There is a moment without a start under way by then.
const REPLACING: Duration = Duration::from_secs(10);
/// What a keeper leaves for the next program, at most.
const OWN_MAX: usize = 16 * 1024 * 1024;

/// How far an upgrade is.
#[derive(Default)]
pub(super) struct Succession {
    prepared: Option<Prepared>,
    trial: Option<Trial>,
    /// More than one when the next upgrade comes before the old supervisor of the last one has ended.
    retired: Vec<Retired>,
    /// The keeper replaces itself as soon as nothing is under way, until then at most.
    replace: Option<Moment>,
    last: Option<Upgrade>,
    /// The supervisor has not heard of `last`.
    news: bool,
}

/// A new supervisor that waits for its Hello.
struct Prepared {
    alive: Alive,
    on: Trial,
}

/// What a new supervisor was started from.
struct Trial {
    executable: OwnedFd,
    keeper_too: bool,
    until: Moment,
    /// While it has not taken over.
    watch: Option<Watch>,
}

/// How a supervisor on trial gets on.
struct Watch {
    seen: Activity,
    at: Moment,
    /// When it was last seen to do something.
    stirred: Moment,
}

impl Watch {
    fn new(now: Moment) -> Self {
        Self { seen: Activity::default(), at: now, stirred: now }
    }

    /// Looks at it when that is due; whether it hangs.
    fn finds_stalled(&mut self, pid: u32, now: Moment) -> bool {
        if now.since(self.at) < LOOK {
            return false;
        }
        // Whoever looks late was kept from it, and perhaps it has been waiting for us. Who cannot be looked at has time.
        let late = now.since(self.at) > LOOK * 2;
        let seen = Activity::of(pid).ok();
        if late || seen.is_none_or(|seen| seen.stirs_since(self.seen)) {
            self.stirred = now;
        }
        (self.seen, self.at) = (seen.unwrap_or_default(), now);
        now.since(self.stirred) >= STALLED
    }
}

/// The old supervisor.
struct Retired {
    pid: u32,
    link: Option<Packets>,
    /// When it is killed; nothing while it is not dismissed.
    until: Option<Moment>,
}

impl Succession {
    /// After the death of the keeper in the middle of an upgrade: whoever lives is the new one.
    pub(super) fn of_estate(upgrade: Option<Upgrade>) -> Self {
        let settled = |upgrade: Upgrade| match upgrade.state {
            UpgradeState::Pending => Upgrade { state: UpgradeState::Both, ..upgrade },
            _ => upgrade,
        };
        Self { last: upgrade.map(settled), ..Self::default() }
    }

    /// After the keeper has replaced itself.
    fn of_own(upgrade: Option<Upgrade>) -> Self {
        Self { news: true, ..Self::of_estate(upgrade) }
    }

    pub(super) fn last(&self) -> Option<&Upgrade> {
        self.last.as_ref()
    }

    /// Whether an old supervisor is there, so that no other may be started.
    pub(super) fn has_retired(&self) -> bool {
        !self.retired.is_empty()
    }

    /// Whether nothing is under way.
    pub(super) fn is_over(&self) -> bool {
        self.prepared.is_none() && self.trial.is_none() && self.retired.is_empty() && self.replace.is_none()
    }

    pub(super) fn next_deadline(&self) -> Option<Moment> {
        let prepared = self.prepared.as_ref().map(|prepared| prepared.on.until);
        let trial = self.trial.as_ref().map(|trial| match &trial.watch {
            Some(watch) => trial.until.min(watch.at + LOOK),
            None => trial.until,
        });
        let retired = self.retired.iter().filter_map(|retired| retired.until).min();
        [prepared, trial, retired, self.replace].into_iter().flatten().min()
    }

    fn settle(&mut self, state: UpgradeState) {
        if let Some(last) = &mut self.last {
            last.state = state;
            self.news = true;
        }
    }
}

impl Keeper {
    pub(super) fn upgrade(&mut self, op: u64, from: String, supervisor_only: bool, fds: Vec<OwnedFd>) {
        let Some(executable) = fds.into_iter().next() else { return };
        if self.succession.prepared.is_some() {
            // There is one supervisor, and it asks for one upgrade at a time.
            return;
        }
        let now = clock::now();
        self.succession.last = Some(Upgrade { op, from, state: UpgradeState::Pending });
        self.succession.news = true;
        match self.try_start_supervisor(executable.as_fd(), now) {
            Ok(alive) => {
                let on =
                    Trial { executable, keeper_too: !supervisor_only, until: now + PREPARED, watch: None };
                self.succession.prepared = Some(Prepared { alive, on });
            }
            Err(reason) => self.succession.settle(UpgradeState::Failed { reason }),
        }
    }

    /// The supervisor is frozen: the prepared one gets everything.
    pub(super) fn go(&mut self) {
        let now = clock::now();
        let waiting = Supervisor::Waiting { until: now };
        let Supervisor::Alive(old) = std::mem::replace(&mut self.supervisor, waiting) else { return };
        self.succession.retired.push(Retired { pid: old.pid, link: old.link, until: None });
        self.children.forget_what_was_told();
        let Some(Prepared { mut alive, on }) = self.succession.prepared.take() else {
            // It has ended meanwhile: the program of the old one is started again.
            self.dismiss(now);
            return;
        };
        alive.started = now;
        self.supervisor = Supervisor::Alive(alive);
        self.succession.trial = Some(Trial { until: now + TRIAL, watch: Some(Watch::new(now)), ..on });
        self.succession.news = false;
        self.greet();
    }

    /// The new supervisor has everything.
    pub(super) fn dismiss(&mut self, now: Moment) {
        for retired in self.succession.retired.iter_mut().filter(|retired| retired.until.is_none()) {
            retired.until = Some(now + DISMISSED);
            if let (Some(link), Ok(frame)) = (&mut retired.link, FromKeeper::Dismissed.encode(0)) {
                // One that cannot be told is killed in time.
                let _ = link.send(frame, &[]);
            }
        }
    }

    pub(super) fn took_over(&mut self) {
        let Some(trial) = self.succession.trial.take() else { return };
        let own = exec::own_executable();
        let same = own.and_then(|own| exec::is_same_program(own.as_fd(), trial.executable.as_fd()));
        self.executable = trial.executable;
        if trial.keeper_too && !matches!(same, Ok(true)) {
            self.succession.replace = Some(clock::now() + REPLACING);
        } else {
            self.succession.settle(UpgradeState::Supervisor);
        }
    }

    /// A process has ended; whether it belonged to an upgrade and is accounted for.
    pub(super) fn successor_ended(&mut self, pid: u32, status: &str) -> bool {
        if let Some(at) = self.succession.retired.iter().position(|retired| retired.pid == pid) {
            self.succession.retired.remove(at);
            return true;
        }
        if self.succession.prepared.as_ref().is_some_and(|prepared| prepared.alive.pid == pid) {
            self.succession.prepared = None;
            let reason = format!("the new supervisor ended before it was given anything: {status}");
            self.succession.settle(UpgradeState::Failed { reason });
            return true;
        }
        false
    }

    /// The supervisor has ended; whether it was one on trial, so that the program before it is started again at once.
    pub(super) fn trial_failed(&mut self, reason: &str, now: Moment) -> bool {
        self.abandon_prepared();
        if self.succession.trial.take().is_none() {
            return false;
        }
        say(&format!("the new supervisor did not take over: {reason}; the one before it goes on"));
        self.dismiss(now);
        self.succession.settle(UpgradeState::Failed { reason: reason.to_owned() });
        true
    }

    /// The supervisor that asked for it has died: the next one comes from the same program as before.
    fn abandon_prepared(&mut self) {
        if let Some(prepared) = self.succession.prepared.take() {
            kill(prepared.alive.pid);
            let reason = "the supervisor ended in the middle of it".to_owned();
            self.succession.settle(UpgradeState::Failed { reason });
        }
    }

    pub(super) fn act_on_upgrade(&mut self, now: Moment) {
        if self.succession.prepared.as_ref().is_some_and(|prepared| prepared.on.until <= now) {
            self.abandon_prepared();
        }
        if let (Some(trial), Supervisor::Alive(alive)) = (&mut self.succession.trial, &self.supervisor) {
            let reason = if trial.until <= now {
                Some(format!("it did not take over within {} s", TRIAL.as_secs()))
            } else if trial.watch.as_mut().is_some_and(|watch| watch.finds_stalled(alive.pid, now)) {
                Some(format!("it did nothing for {} s", STALLED.as_secs()))
            } else {
                None
            };
            if let Some(reason) = reason {
                // Its end is what is waited for now.
                (trial.until, trial.watch) = (now + TRIAL, None);
                self.break_link(&reason);
            }
        }
        for retired in &mut self.succession.retired {
            if retired.until.is_some_and(|until| until <= now) {
                kill(retired.pid);
                retired.until = Some(now + DISMISSED);
            }
        }
        if self.succession.replace.is_some_and(|until| until <= now) {
            self.succession.replace = None;
            let reason = "programs were being started all the time".to_owned();
            self.succession.settle(UpgradeState::KeeperStays { reason });
        }
    }

    /// What the supervisor has to hear of an upgrade.
    pub(super) fn upgrade_news(&mut self) -> Option<FromKeeper> {
        let upgrade = self.succession.last.clone().filter(|_| self.succession.news)?;
        self.succession.news = false;
        Some(FromKeeper::Upgraded(upgrade))
    }

    /// Replaces this program when that is due and nothing is under way. Returns when it was not.
    pub(super) fn replace_when_quiet(&mut self) {
        let quiet = self.succession.replace.is_some()
            && self.succession.trial.is_none()
            && self.succession.retired.is_empty()
            && self.can_leave()
            && self.children.is_quiet()
            && self.to_forward.is_empty()
            && self.quit.is_none()
            && self.leave.is_none();
        if !quiet {
            return;
        }
        self.succession.replace = None;
        let Err(reason) = self.replace_itself();
        say(&format!("cannot replace itself by the new program: {reason}"));
        self.succession.settle(UpgradeState::KeeperStays { reason });
    }

    fn replace_itself(&mut self) -> Result<std::convert::Infallible, String> {
        let words = |step: &'static str| move |error: io::Error| format!("cannot {step}: {error}");
        let hello = self.hello();
        let Supervisor::Alive(Alive { pid, started, link: Some(link), beat, .. }) = &self.supervisor else {
            return Err("there is no supervisor".to_owned());
        };
        let mut children: Vec<ChildRecord> = Vec::new();
        let mut held: Vec<(HeldRecord, BorrowedFd<'_>)> = Vec::new();
        let mut after = 0;
        while let Some((records, last)) = self.children.batch_of_children(after) {
            children.extend(records);
            after = last;
        }
        let mut after: Option<String> = None;
        while let Some((records, fds, last)) = self.children.batch_of_held(after.as_deref()) {
            held.extend(records.into_iter().zip(fds));
            after = Some(last);
        }
        let adopted: Vec<(u32, Option<BorrowedFd<'_>>)> = self.children.not_ours().collect();
        let own = Own {
            hello,
            children,
            adopted: adopted.iter().map(|(pid, fd)| (*pid, fd.map(|fd| fd.as_raw_fd()))).collect(),
            held: held.iter().map(|(record, fd)| (record.clone(), fd.as_raw_fd())).collect(),
            supervisor: *pid,
            supervisor_started: started.nanos(),
            link: link.as_fd().as_raw_fd(),
            beats: beat.is_some(),
            executable: self.executable.as_raw_fd(),
            children_oom_score_adj: self.originals.oom_score_adj,
        };
        let bytes = own.encode().map_err(|error| error.to_string())?;
        let record = memfd::sealed(c"pm-keeper", &bytes).map_err(words("write down what it has"))?;
        let mut kept: Vec<BorrowedFd<'_>> = held.iter().map(|(_, fd)| *fd).collect();
        kept.extend(adopted.iter().filter_map(|(_, fd)| *fd));
        kept.extend([link.as_fd(), self.executable.as_fd(), record.as_fd()]);
        let mut args = self.config.own_args.clone();
        args.extend(
            [RESUME, &record.as_raw_fd().to_string()].map(|arg| CString::new(arg).unwrap_or_default()),
        );
        Err(format!("execve: {}", exec::replace(self.executable.as_fd(), &args, &self.config.env, &kept)))
    }

    /// Goes on where the program before this one stopped, in the same process.
    pub(super) fn resume(&mut self, resumed: Resumed) {
        let Resumed { own, children, link, executable } = resumed;
        let now = clock::now();
        // Through a descriptor this process would be called after its number.
        let _ = exec::set_process_name(c"pm");
        let hello = own.hello;
        self.executable = executable;
        self.started = Moment::from_nanos(hello.started);
        self.open_files = hello.open_files;
        self.oom_score_adj = hello.oom_score_adj;
        self.originals.open_files = hello.open_files;
        self.originals.oom_score_adj = own.children_oom_score_adj;
        self.restarts.resume(hello.deaths);
        self.last_death = hello.last_death;
        self.terminate = hello.terminate;
        self.succession = Succession::of_own(hello.upgrade);
        self.children = children;
        self.supervisor = Supervisor::Alive(Alive {
            pid: own.supervisor,
            started: Moment::from_nanos(own.supervisor_started),
            report: None,
            link: Some(Packets::new(link)),
            phase: Phase::Ready,
            beat: own.beats.then_some(now),
            reason: String::new(),
        });
        // Signals that came in between have waited, but one may stand for many.
        self.scan_due = Some(now);
    }
}

/// The option with which a keeper that has replaced itself is started.
pub const RESUME: &str = "--resume";

/// What the program before this one left in this process.
#[derive(Debug)]
pub struct Resumed {
    own: Own,
    children: super::Children,
    link: OwnedFd,
    executable: OwnedFd,
}

impl Resumed {
    /// Reads what was left behind this descriptor. To be called once, before any other descriptor is opened.
    ///
    /// # Errors
    /// There is nothing that this program understands; its supervisor finds the keeper gone then, and starts the next.
    pub fn from_descriptor(number: std::os::fd::RawFd) -> Result<Self, String> {
        let words = |error: io::Error| format!("cannot go on from descriptor {number}: {error}");
        let record = fdpass::inherited(number).map_err(words)?;
        let bytes = Mapped::new(&record, OWN_MAX).map_err(words)?;
        let own =
            Own::decode(&bytes).map_err(|error| format!("cannot go on from descriptor {number}: {error}"))?;
        let take = |fd| fdpass::inherited(fd).map_err(words);
        let link = take(own.link)?;
        let executable = take(own.executable)?;
        let adopted = own
            .adopted
            .iter()
            .map(|&(pid, fd)| Ok((pid, fd.map(take).transpose()?)))
            .collect::<Result<Vec<_>, String>>()?;
        let held = own
            .held
            .iter()
            .map(|(record, fd)| Ok((record.clone(), take(*fd)?)))
            .collect::<Result<Vec<_>, String>>()?;
        let children = super::Children::resume(own.children.clone(), adopted, held);
        Ok(Self { own, children, link, executable })
    }
}

impl Keeper {
    /// Says Hello to the supervisor that has just come up.
    pub(super) fn greet(&mut self) {
        let hello: Hello = self.hello();
        self.to_forward.clear();
        // A request to end is told to every supervisor until there is none.
        self.send(&FromKeeper::Hello(hello));
    }
}

pub(super) fn kill(pid: u32) {
    // Our unreaped child: its pid cannot mean anybody else. An error means that it has ended by itself.
    let _ = pidfd::open(pid).and_then(|fd| pidfd::send_signal(fd, libc::SIGKILL));
}
