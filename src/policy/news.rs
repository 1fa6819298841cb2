//! What has happened: the events that `pm events` shows.
//!
//! A fleet gathers news while it decides, and whoever drives it takes them after each turn. News never decide anything,
//! and there is one for every instant at which an instance comes into rotation or leaves it, so that the number of
//! instances in rotation can be replayed from them.

use std::time::Duration;

use crate::model::exit::ExitReason;
use crate::model::id::{AppName, InstanceId, OpId, PmId};
use crate::model::moment::Moment;
use crate::model::saved::HookKind;

use super::vocabulary::StepKind;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct News {
    /// When.
    pub at: Moment,
    /// In the course of which operation, if somebody asked for one.
    pub op: Option<OpId>,
    /// To which app.
    pub app: AppName,
    /// To which of its runs; `None`: to the app as a whole.
    pub run: Option<Subject>,
    /// What.
    pub what: What,
}

/// The run that something happened to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    /// Which run.
    pub id: InstanceId,
    /// Its slot's number for people.
    pub pm_id: PmId,
    /// Its main process, once spawned.
    pub pid: Option<u32>,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// A step that clients of operations are told of too.
    Step(StepKind),
    /// It gets new connections from now on.
    InRotation,
    /// It gets no new connections any more.
    OutOfRotation,
    /// Its main process has ended.
    Exited {
        /// How.
        reason: ExitReason,
        /// Nobody had asked it to.
        by_itself: bool,
        /// Since exec(2).
        uptime: Duration,
    },
    /// SIGKILL was sent to everything that belongs to it.
    Killed {
        /// Since the kill signal.
        after: Duration,
    },
    /// The last samples of its memory were all above its limit.
    MemoryExceeded {
        /// The last of them, in bytes.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// Its successor is started after a pause.
    RestartScheduled {
        /// How long the pause is.
        delay: Duration,
    },
    /// Its slot is given up: too many quick exits, or a program that cannot be run.
    Errored {
        /// How the last run ended.
        reason: ExitReason,
    },
    /// It ended for good, as its rules say.
    Ended {
        /// How.
        reason: ExitReason,
    },
    /// A hook has ended, with everything that it had started.
    HookEnded {
        /// Which.
        kind: HookKind,
        /// Why it failed; `None`: it did not.
        failure: Option<String>,
    },
    /// The app is not started before others are there.
    Waiting {
        /// For which.
        on: Vec<AppName>,
    },
}
