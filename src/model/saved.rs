//! What is remembered: the desired state (state.json) and the actual state (the blob).
//!
//! Desired state survives a reboot. Actual state is only valid in the same boot: its moments count from boot and its
//! pids are checked against the keeper's inventory before anything is believed.

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::exit::ExitReason;
use super::id::{AppName, Generation, InstanceId, PmId, Slot};
use super::moment::Moment;
use super::spec::{AppSpec, Hook, Hooks};

/// The desired state of a whole daemon: what state.json holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedFleet {
    /// Every app, in the order of creation.
    pub apps: Vec<SavedApp>,
    /// The next `pm_id` to give out.
    pub next_pm_id: u32,
    /// `start_parallelism` as the last file that had it said.
    #[serde(default)]
    pub start_parallelism: Option<u32>,
    /// `show_env` as the last file that had it said.
    #[serde(default)]
    pub show_env: bool,
}

/// The desired state of one app.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedApp {
    /// What is to run. During a reload this is the target spec.
    pub spec: Arc<AppSpec>,
    /// Counts the releases of this app, from 1: every reload and restart is one, also with an unchanged spec, so that
    /// the next supervisor can tell which instances were replaced already.
    pub revision: u64,
    /// During a reload: what the instances not yet replaced run, and the failed reload returns to. Afterwards only
    /// while a slot still runs it.
    pub previous: Option<(Arc<AppSpec>, u64)>,
    /// Releases before that one which a slot still runs, after failed reloads.
    #[serde(default)]
    pub older: Vec<(Arc<AppSpec>, u64)>,
    /// Its slots, ascending and without holes.
    pub slots: Vec<SavedSlot>,
    /// The operation that was going on, so that the next supervisor finishes or undoes it.
    pub operation: Option<SavedOperation>,
}

/// The desired state of one slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedSlot {
    /// Its number for people.
    pub pm_id: PmId,
    /// Whether an instance is meant to run here.
    pub desired: Desired,
    /// No generation up to and including this one may be used again: numbers are reserved in blocks, so that a
    /// restart after a crash needs no write.
    pub reserved: Generation,
    /// The release that this slot is meant to run: `SavedApp::revision`, or that of `previous` where a failed reload
    /// kept the old one. 0 in older files: the app's.
    #[serde(default)]
    pub revision: u64,
    /// During a reload: the release it had before, to which a failed reload returns it. 0 otherwise.
    #[serde(default)]
    pub before: u64,
    /// A reload that was given up has left it behind, with what it ran before. One that runs an older release because
    /// only others were replaced is not behind.
    #[serde(default)]
    pub behind: bool,
}

/// What a slot is meant to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Desired {
    /// An instance is meant to run.
    Running,
    /// None is, because somebody said so or the app ended for good.
    Stopped,
}

/// An operation that outlives a supervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SavedOperation {
    /// Instances of older generations are being replaced one by one.
    Reload,
    /// Every instance is stopped, then started.
    Restart,
    /// Instances are being ended, and the app forgotten.
    Delete,
}

/// The actual state of a whole daemon: what the blob holds, rewritten after every turn that changed it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memo {
    /// One per slot that has something to remember.
    pub slots: Vec<SlotMemo>,
    /// One per instance that exists.
    pub instances: Vec<InstanceMemo>,
    /// Hooks that have to run before or after anything else of their app.
    #[serde(default)]
    pub hooks: Vec<HookMemo>,
    /// One per reload that is going on.
    #[serde(default)]
    pub reloads: Vec<ReloadMemo>,
    /// Apps that were deleted although the disk did not take it.
    #[serde(default)]
    pub deleted: Vec<AppName>,
    /// The last run of each slot that is no more while the disk may still have the slot: its number is not given out
    /// again.
    #[serde(default)]
    pub retired: Vec<InstanceId>,
}

/// Which of an app's hooks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HookKind {
    /// Before the app's instances are started.
    PreStart,
    /// Before a reload.
    PreReload,
    /// After the last instance has gone.
    PostStop,
    /// When a slot was given up.
    OnErrored,
}

impl HookKind {
    /// Its key in the config.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::PreStart => "pre_start",
            Self::PreReload => "pre_reload",
            Self::PostStop => "post_stop",
            Self::OnErrored => "on_errored",
        }
    }
}

impl Hooks {
    /// The hook of a kind.
    #[must_use]
    pub const fn of(&self, kind: HookKind) -> Option<&Hook> {
        match kind {
            HookKind::PreStart => self.pre_start.as_ref(),
            HookKind::PreReload => self.pre_reload.as_ref(),
            HookKind::PostStop => self.post_stop.as_ref(),
            HookKind::OnErrored => self.on_errored.as_ref(),
        }
    }
}

impl std::fmt::Display for HookKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A hook that an app still owes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookMemo {
    /// Which app.
    pub app: AppName,
    /// Which hook.
    pub kind: HookKind,
}

/// What is remembered of a slot beyond its desired state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotMemo {
    /// Whose slot.
    pub app: AppName,
    /// Which slot.
    pub slot: Slot,
    /// Restarts that nobody asked for, and those that somebody did: the table's ↺.
    pub restarts: u32,
    /// Exits in a row that each came before `min_uptime`.
    pub unstable: u32,
    /// Failures in a row that the backoff counts.
    pub failures: u32,
    /// When the next start is due, while waiting.
    pub restart_at: Option<Moment>,
    /// Given up.
    pub errored: bool,
    /// When the slot was created.
    pub created: Moment,
    /// How the last run ended.
    pub last_exit: Option<ExitReason>,
    /// Nobody had asked that run to end.
    #[serde(default)]
    pub by_itself: bool,
    /// The highest generation that was given out: a found one up to it that is not remembered is accounted for.
    #[serde(default)]
    pub newest: Generation,
    /// The release whose run ended for good here, while that may not be on disk yet.
    #[serde(default)]
    pub ended: Option<u64>,
    /// It was stopped, and that could not be saved yet.
    #[serde(default)]
    pub stop_unsaved: bool,
    /// Its next run is a start from rest, which waits for what the app depends on.
    #[serde(default)]
    pub gated: bool,
    /// How many runs in a row were replaced here because they were unhealthy.
    #[serde(default)]
    pub relapses: u32,
    /// When the next one may be.
    #[serde(default)]
    pub replace_after: Option<Moment>,
    /// How many runs in a row were replaced here because they crossed their memory limit soon.
    #[serde(default)]
    pub overruns: u32,
    /// When the next one may be.
    #[serde(default)]
    pub curb_after: Option<Moment>,
}

/// What is remembered of an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceMemo {
    /// Which run.
    pub id: InstanceId,
    /// The revision of the spec it runs.
    pub revision: u64,
    /// Its main process, once spawned.
    pub pid: Option<u32>,
    /// When the spawn was asked for.
    pub since: Moment,
    /// When it became ready.
    pub ready_at: Option<Moment>,
    /// Whether it gets new connections.
    pub in_rotation: bool,
    /// When the stop ladder began, if it did, and when the kill signal was sent.
    pub stopping: Option<(Moment, Option<Moment>)>,
    /// Listener keys it serves.
    pub keys: Vec<String>,
    /// The app said that it is ready, but it is not in rotation yet: the word is not said twice.
    #[serde(default)]
    pub said_ready: bool,
    /// How its main process exited, when that is accounted for and the rest of its tree is being ended.
    #[serde(default)]
    pub left: Option<ExitReason>,
    /// How many probes in a row have passed and failed.
    #[serde(default)]
    pub probes: (u32, u32),
    /// How many samples of its memory in a row were above its limit, and the last of them in bytes.
    #[serde(default)]
    pub over_memory: (u32, u64),
    /// Replaced and out of rotation, but kept in case the reload fails.
    #[serde(default)]
    pub reserve: bool,
    /// The files it was started from.
    #[serde(default)]
    pub from: Option<Arc<StartedFrom>>,
}

/// The files a run was started from, every symlink resolved: what a failed reload goes back to when the old instance is
/// gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartedFrom {
    /// Its working directory.
    pub cwd: PathBuf,
    /// Its script or binary, where it is one file.
    pub script: Option<StartedFile>,
}

/// A file as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartedFile {
    /// Where it is.
    pub path: PathBuf,
    /// The device it is on.
    pub device: u64,
    /// Its inode there.
    pub inode: u64,
    /// Bytes.
    pub size: u64,
    /// When it was written, nanoseconds since 1970.
    pub modified: i64,
}

/// What is remembered of a reload beyond the runs it is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReloadMemo {
    /// Whose.
    pub app: AppName,
    /// The release it brings about.
    pub revision: u64,
    /// It has failed, and is being undone.
    pub failure: Option<(InstanceId, ExitReason)>,
    /// Slots that were replaced and are not any more.
    pub restored: Vec<Slot>,
    /// Files of instances that are gone.
    pub from: Vec<(Slot, Arc<StartedFrom>)>,
    /// Who wants it.
    #[serde(default)]
    pub trigger: Trigger,
}

/// Who wants an operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trigger {
    /// Somebody asked for it.
    #[default]
    Asked,
    /// The health check of a run: what somebody asks for meanwhile comes after it and is not refused.
    Health,
    /// The memory limit of a run; likewise.
    Memory,
}

/// A process that the keeper reports to a new supervisor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Which run, from its tag.
    pub id: InstanceId,
    /// The revision of its spec, from its tag.
    pub revision: u64,
    /// Its main process.
    pub pid: u32,
    /// How it ended, if it has; its process is still a zombie.
    pub exited: Option<ExitReason>,
    /// Its kill signal was sent, not only decided on.
    pub signalled: bool,
}
