//! The words between the `Fleet` and the world: what can happen, and what can be asked for.
//!
//! Events are past tense and carry slot and generation; actions are imperative. Both are closed enums: a new variant
//! points at every place that has to think about it.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::model::exit::ExitReason;
use crate::model::id::{AppName, InstanceId, OpId, PmId, Slot};
use crate::model::saved::{HookKind, SavedFleet, StartedFrom};
use crate::model::signal::Signal;
use crate::model::spec::{AppSpec, KillMode};
use crate::model::status::Status;

/// Numbers the saves of a supervisor's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SaveId(pub u64);

/// Numbers the preflights of a supervisor's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CheckId(pub u64);

/// Everything that can happen to a fleet.
#[derive(Clone, Debug)]
pub enum Event {
    /// A client asked for something. Every `Asked` gets exactly one `Reply`, also when the app vanishes meanwhile.
    Asked {
        /// Names the request.
        op: OpId,
        /// What was asked.
        command: Command,
    },
    /// The files a run is being started from. Comes before `Spawned`.
    StartedFrom {
        /// Which run.
        id: InstanceId,
        /// The files.
        from: StartedFrom,
    },
    /// Answer to `Preflight`.
    Checked {
        /// Of which app.
        app: AppName,
        /// Which check.
        check: CheckId,
        /// Why an instance could not be started now, for people.
        fault: Option<String>,
    },
    /// The process runs: exec(2) has succeeded.
    Spawned {
        /// Which run.
        id: InstanceId,
        /// Its main process.
        pid: u32,
    },
    /// There is no process.
    SpawnFailed {
        /// Which run.
        id: InstanceId,
        /// What went wrong, for people.
        error: String,
        /// Whether trying again could help.
        retry: Retry,
    },
    /// The main process has ended (it is a zombie until `ConfirmExit`).
    Exited {
        /// Which run.
        id: InstanceId,
        /// How.
        reason: ExitReason,
    },
    /// Answer to `EndLeftovers` and `KillTree`: every process of the instance is gone and its pipes are read to
    /// their end. Comes after `Exited`.
    TreeGone {
        /// Which run.
        id: InstanceId,
    },
    /// The instance says that it may receive traffic (sources of `wait_ready`).
    Ready {
        /// Which run.
        id: InstanceId,
    },
    /// A cluster worker listens on this key.
    Listening {
        /// Which run.
        id: InstanceId,
        /// The listener's key.
        key: String,
    },
    /// A cluster worker no longer listens on this key.
    ListenerClosed {
        /// Which run.
        id: InstanceId,
        /// The listener's key.
        key: String,
    },
    /// The IPC channel is at its end: after `Disconnect`, the worker has drained.
    ChannelClosed {
        /// Which run.
        id: InstanceId,
    },
    /// Answer to `TakeOut`: no hand-over is unanswered any more.
    Settled {
        /// Which run.
        id: InstanceId,
    },
    /// Answer to `AskKillListeners`.
    KillListeners {
        /// Which run.
        id: InstanceId,
        /// How many listeners the app has for the kill signal.
        count: u32,
    },
    /// Answer to `Drain`: no connection is open any more.
    Drained {
        /// Which run.
        id: InstanceId,
    },
    /// An answer to `Probe`; one after the other, until `StopProbing`. A success that follows a success of a health
    /// check may be left out.
    Probed {
        /// Which run.
        id: InstanceId,
        /// What was asked.
        role: ProbeRole,
        /// How it went.
        result: ProbeResult,
    },
    /// An answer to `WatchMemory`; one after the other, until `UnwatchMemory`. The first one always comes; one at or below
    /// the limit that follows another such may be left out, and so may those above it after the first few in a row.
    Measured {
        /// Which run.
        id: InstanceId,
        /// What its processes use together.
        bytes: u64,
    },
    /// A hook has ended, with every process that it had started, and its output is read. Answer to `RunHook`.
    HookEnded {
        /// Which run of a hook.
        id: InstanceId,
        /// How.
        end: HookEnd,
    },
    /// The state is durable; what followed the save has been performed.
    Saved {
        /// Which save.
        save: SaveId,
    },
    /// The state could not be written; what followed the save was *not* performed.
    SaveFailed {
        /// Which save.
        save: SaveId,
        /// What went wrong, for people.
        error: String,
    },
    /// Who ends the daemon will not wait any longer: what is on its way down is ended by force, and so is what begins
    /// to go down from now on.
    Hurried,
    /// `next_deadline()` has been reached.
    DeadlineReached,
}

/// How a hook ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HookEnd {
    /// With exit code 0.
    Succeeded,
    /// Otherwise, or it never ran.
    Failed(String),
}

/// What a probe is to find out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProbeRole {
    /// Whether a run may receive traffic.
    Ready,
    /// Whether a run that does is well.
    Health,
}

/// How a probe went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProbeResult {
    /// Well.
    Passed,
    /// It failed, or took too long.
    Failed,
}

/// What the health check says of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// It has not been asked yet.
    Unknown,
    /// The last answer was good.
    Healthy,
    /// So many bad answers in a row, fewer than `threshold`.
    Failing {
        /// How many.
        failed: u32,
    },
    /// At least `threshold` bad answers in a row.
    Unhealthy,
}

/// Whether trying a failed spawn again could help.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// No: the program cannot be executed, the environment is larger than the kernel takes.
    Never,
    /// Perhaps: EAGAIN, ENOMEM, EMFILE; the script is missing, somebody else has the port.
    Backoff,
}

/// What a client can ask for. Names are resolved to apps and slots before.
#[derive(Clone, Debug)]
pub enum Command {
    /// Start apps from specs. Absent: created and started (with `autostart = false` created as stopped, until it is
    /// started by name); stopped: started with the new spec; online: "already running" when the spec is equal, else
    /// reloaded.
    Start {
        /// The specs, in order; names are unique.
        specs: Vec<Arc<AppSpec>>,
    },
    /// Make the apps of a file what it says: see [`super::plan`].
    Apply {
        /// The chosen ones of its apps, in its order; names are unique.
        specs: Vec<Arc<AppSpec>>,
        /// Every app of the file.
        all: Vec<AppName>,
        /// The file, as in the origin of its apps.
        file: PathBuf,
        /// Remove apps that came from it and are not in it any more.
        prune: bool,
    },
    /// Act on what exists.
    Act {
        /// What to do.
        verb: Verb,
        /// On which apps, in order, each once.
        selection: Vec<Selected>,
        /// Another spec for some of the apps: `reload FILE`, `restart FILE`, `--update-env`.
        specs: Vec<Arc<AppSpec>>,
    },
    /// Change the number of slots.
    Scale {
        /// Which app.
        app: AppName,
        /// To how many.
        instances: u32,
    },
    /// Start what a saved list says, apps that exist already excepted.
    Resurrect {
        /// The list.
        saved: SavedFleet,
    },
    /// Save the list, end everything, forget everything: `pm kill`.
    Kill,
    /// The same, but nothing is forgotten: the list could not be saved, and would be lost.
    KillUnlisted {
        /// Why not.
        error: String,
    },
    /// End the daemon's work without changing the desired state: SIGTERM. Apps are stopped by the ladder.
    Terminate,
    /// Set the restart counters of these to zero.
    Reset {
        /// Which.
        selection: Vec<Selected>,
    },
}

/// What to do with what exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Stopped or errored: start; online: restart (PM2's `start NAME`).
    Start,
    /// Down the ladder, and stay down.
    Stop,
    /// All instances of the app at once: down, then up.
    Restart,
    /// Rolling where the app can overlap, else a slot at a time in place; starts what is stopped.
    Reload,
    /// Stop and forget.
    Delete,
}

/// An app, or some of its slots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selected {
    /// Which app.
    pub app: AppName,
    /// Which slots; `None`: all.
    pub slots: Option<Vec<Slot>>,
}

/// Everything a fleet can ask for. A turn's actions are performed in order.
#[derive(Clone, Debug)]
pub enum Action {
    /// A barrier: what follows in this turn's list is performed when the state is durable (then `Saved` comes), or
    /// not at all (then `SaveFailed` comes). At most one in a turn.
    Save {
        /// Which save.
        save: SaveId,
        /// The desired state to write.
        state: SavedFleet,
    },
    /// Open what listeners of the spec are not open yet and start a process. Answers `Spawned` or `SpawnFailed`.
    Spawn {
        /// Which run.
        id: InstanceId,
        /// Its slot's number for people.
        pm_id: PmId,
        /// The spec to run.
        spec: Arc<AppSpec>,
        /// The spec's revision.
        revision: u64,
    },
    /// Runs of this release follow these rules from now on; their processes stay as they are.
    TakeOver {
        /// Whose runs.
        app: AppName,
        /// The rules.
        spec: Arc<AppSpec>,
        /// Runs of this release.
        revision: u64,
    },
    /// Start a process from these files, whatever the paths of the spec lead to now; the way back to a release before.
    /// Answers `Spawned`, or `SpawnFailed`, also when the files have changed since.
    SpawnFrom {
        /// Which run.
        id: InstanceId,
        /// Its slot's number for people.
        pm_id: PmId,
        /// The spec to run.
        spec: Arc<AppSpec>,
        /// The spec's revision.
        revision: u64,
        /// The files.
        from: Arc<StartedFrom>,
    },
    /// Look whether an instance of this spec could be started now: its script, working directory, interpreter and env
    /// files. Answers `Checked`; starts and changes nothing.
    Preflight {
        /// Of which app.
        app: AppName,
        /// Which check.
        check: CheckId,
        /// The spec.
        spec: Arc<AppSpec>,
    },
    /// Give new connections to this instance.
    PutIn {
        /// Which run.
        id: InstanceId,
    },
    /// Give no new connections to this instance. Answers `Settled`, within 1 s.
    TakeOut {
        /// Which run.
        id: InstanceId,
    },
    /// Ask the agent how many listeners the app has for this signal. Answers `KillListeners`, or never.
    AskKillListeners {
        /// Which run.
        id: InstanceId,
        /// The signal.
        signal: Signal,
    },
    /// Tell the agent to drain. Answers `Drained`, or never.
    Drain {
        /// Which run.
        id: InstanceId,
        /// What becomes of idle connections.
        idle: IdleConnections,
        /// After this time idle ones are closed in any case; `None`: after the time that the app's server gives them.
        patience: Option<Duration>,
        /// What becomes of requests that are in flight then.
        in_flight: RequestsInFlight,
        /// Whether websockets are closed, too.
        websockets: bool,
        /// After this time it goes on without `Drained`.
        within: Duration,
    },
    /// Ask this run again and again, in place of what it was asked before. Answers `Probed`.
    Probe {
        /// Which run.
        id: InstanceId,
        /// Which of its spec's probes.
        role: ProbeRole,
        /// Before the first question.
        delay: Duration,
    },
    /// Ask this run no more.
    StopProbing {
        /// Which run.
        id: InstanceId,
    },
    /// Measure the memory of this run again and again, in place of what was asked before. Answers `Measured`.
    WatchMemory {
        /// Which run.
        id: InstanceId,
        /// What it may use, in bytes.
        limit: u64,
    },
    /// Measure the memory of this run no more.
    UnwatchMemory {
        /// Which run.
        id: InstanceId,
    },
    /// Run a hook of this spec. Answers `HookEnded`. Not before what an earlier supervisor left of this app's hooks has
    /// ended.
    RunHook {
        /// Which run of it; its slot is `Slot::HOOK`.
        id: InstanceId,
        /// Which hook.
        kind: HookKind,
        /// Whose log files take its output.
        pm_id: PmId,
        /// The spec that has the hook.
        spec: Arc<AppSpec>,
        /// The slot that was given up, and why.
        errored: Option<(Slot, String)>,
    },
    /// SIGKILL to a hook and everything that it has started. `HookEnded` follows.
    KillHook {
        /// Which run of it.
        id: InstanceId,
    },
    /// Send the cluster's `disconnect`. Answers `ChannelClosed`, or never.
    Disconnect {
        /// Which run.
        id: InstanceId,
    },
    /// Send `"shutdown"` over IPC.
    SendShutdown {
        /// Which run.
        id: InstanceId,
    },
    /// Send the kill signal, then SIGCONT. `Exited` follows, or not.
    Signal {
        /// Which run.
        id: InstanceId,
        /// The signal.
        signal: Signal,
        /// Who gets it.
        mode: KillMode,
    },
    /// A supervisor that was killed had sent the kill signal: see to it that a shell follows what it ran, as `Signal`
    /// does.
    Follow {
        /// Which run.
        id: InstanceId,
        /// The signal.
        signal: Signal,
    },
    /// SIGKILL to everything that belongs to the instance. `Exited`, if it has not come yet, and `TreeGone` follow.
    KillTree {
        /// Which run.
        id: InstanceId,
    },
    /// The main process has exited: end what it left behind (this signal, 1 s, SIGKILL) and read its pipes to their
    /// end. Answers `TreeGone`.
    EndLeftovers {
        /// Which run.
        id: InstanceId,
        /// The signal.
        signal: Signal,
    },
    /// The exit is accounted for: the keeper may reap the zombie, everything of this run is released.
    Forget {
        /// Which run.
        id: InstanceId,
    },
    /// Close those listeners of the app that are not in `keep`, and those that workers asked for and no run has open:
    /// the app is stopped, errored or deleted, or was reloaded.
    CloseListeners {
        /// Which app.
        app: AppName,
        /// What stays open; `None`: nothing, listeners that workers asked for included.
        keep: Option<Arc<AppSpec>>,
    },
    /// A step of an operation, for the client that asked.
    Progress {
        /// Which request.
        op: OpId,
        /// What happened.
        step: Step,
    },
    /// The answer to `Asked`.
    Reply {
        /// Which request.
        op: OpId,
        /// How it ended.
        outcome: Outcome,
    },
    /// Everything is down after `Kill` or `Terminate`: the daemon may end.
    Quit,
}

/// What becomes of requests that are in flight when idle connections are closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestsInFlight {
    /// They are waited for: the app does not handle its kill signal, so nobody else would.
    Finish,
    /// They are left to the app's own handler.
    Leave,
}

/// What becomes of idle keep-alive connections while draining.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IdleConnections {
    /// They may send one more request: another instance serves.
    Wait,
    /// They are closed at once.
    Close,
}

/// A step of an operation, as the live display shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Which run.
    pub id: InstanceId,
    /// Its slot's number for people.
    pub pm_id: PmId,
    /// What happened to it.
    pub kind: StepKind,
}

/// What happened to an instance in the course of an operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StepKind {
    /// Waits for its turn to launch.
    Queued,
    /// The spawn was asked for.
    Launching,
    /// The process runs.
    Spawned {
        /// Its main process.
        pid: u32,
    },
    /// In rotation.
    Ready {
        /// How long after the spawn it was ready.
        after: Duration,
        /// Nothing but this span of life said so.
        lived: bool,
    },
    /// Ready, but not in rotation before it has lived on for this long.
    Soaking {
        /// How long after the spawn it was ready.
        after: Duration,
        /// `min_healthy`.
        span: Duration,
    },
    /// Replaced: out of rotation, and kept until the last slot is ready.
    Reserved,
    /// The reload has failed: back in rotation.
    Restored,
    /// Gets no new connections, finishes what it has.
    Draining,
    /// The kill signal was sent.
    Signalled {
        /// The signal.
        signal: Signal,
    },
    /// It is gone.
    Gone {
        /// Since the stop ladder began.
        after: Duration,
        /// Whether SIGKILL was needed.
        killed: bool,
        /// How it ended.
        reason: ExitReason,
    },
    /// A hook runs; the step's run is the hook's.
    Hook {
        /// Which.
        kind: HookKind,
    },
    /// It will not be.
    Failed {
        /// Why.
        reason: ExitReason,
    },
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Done, or already so; one entry per app in the order asked.
    Done {
        /// What happened to each app.
        apps: Vec<(AppName, AppOutcome)>,
    },
    /// At least one app failed; the others were done all the same. Exit code 1.
    Failed {
        /// What happened to each app.
        apps: Vec<(AppName, AppOutcome)>,
    },
    /// Nothing was done.
    Refused(Refusal),
}

/// How a request ended for one app.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AppOutcome {
    /// It is as asked; the verb in past tense.
    Done {
        /// What was done: "started", "stopped", "restarted", "reloaded", "deleted", "scaled".
        what: &'static str,
        /// Slots concerned.
        slots: u32,
    },
    /// It was so before.
    Already {
        /// What is true: "running", "stopped".
        what: &'static str,
    },
    /// A new instance failed. What serves now is the old ones, for those slots that were not replaced.
    Failed {
        /// The run that failed first.
        id: InstanceId,
        /// How.
        reason: ExitReason,
        /// Slots that run the new release.
        replaced: Vec<Slot>,
        /// Slots that still run the old one, or do again.
        kept: Vec<Slot>,
        /// What became of the way back, where there was one to go.
        rollback: Option<Box<Rollback>>,
    },
    /// Nothing was taken down, because nothing could have been started in its place.
    Unfit {
        /// Why.
        why: String,
    },
    /// It is not started before another app is up, and that one is not going to be, as things are. It starts by itself
    /// when the other one has come up after all.
    Waiting {
        /// For which.
        on: AppName,
        /// What is wrong with that: "is stopped".
        why: String,
    },
    /// Nothing was done to it, because an app that it depends on failed in the same request.
    Skipped {
        /// Which.
        on: AppName,
    },
    /// A hook failed. Exit code 1.
    HookFailed {
        /// Which.
        hook: HookKind,
        /// Its run: what it wrote last is known by it.
        id: InstanceId,
        /// How it failed.
        why: String,
        /// What was done all the same, in past tense; `None`: nothing.
        done: Option<&'static str>,
    },
    /// Another operation (stop, delete, kill) put an end to this one.
    Superseded {
        /// Which: "stop", "delete", "kill".
        by: &'static str,
    },
    /// Done, but the state could not be written: not remembered over a reboot. Exit code 1.
    NotRemembered {
        /// What was done.
        what: &'static str,
        /// Why it could not be written.
        error: String,
    },
    /// Stopped by `kill`, but the state could not be written, and the daemon ends: the next one starts it again. Exit
    /// code 1.
    StillListed {
        /// Why it could not be written.
        error: String,
    },
    /// Nothing was done because the state could not be written.
    NotSaved {
        /// Why.
        error: String,
    },
}

/// What became of a rollback.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rollback {
    /// Slots that ran the new release and run the old one again.
    pub restored: Vec<Slot>,
    /// The run of the old release that could not be started again, and why; slots that had not been restored by then
    /// stay as they are.
    pub failed: Option<(InstanceId, ExitReason)>,
}

/// Why nothing was done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// No such app. Exit code 3.
    NoSuchApp(AppName),
    /// Another operation is going on. Exit code 5.
    Busy {
        /// On which app.
        app: AppName,
        /// Which operation: "reload", "stop", …
        operation: &'static str,
    },
    /// The daemon is ending. Exit code 5.
    Ending,
    /// The request makes no sense for this app. Exit code 2.
    Invalid(String),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSuchApp(app) => write!(f, "there is no app `{app}`"),
            Self::Busy { app, operation } => write!(f, "a {operation} of `{app}` is going on"),
            Self::Ending => f.write_str("the daemon is ending"),
            Self::Invalid(why) => f.write_str(why),
        }
    }
}

/// What a row of the table says about a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotView {
    /// Its number for people.
    pub pm_id: PmId,
    /// Its place.
    pub slot: Slot,
    /// Its state.
    pub status: Status,
    /// The run the row shows: the newest one that is in rotation, else the newest.
    pub current: Option<RunView>,
    /// Older runs that are still there.
    pub draining: Vec<RunView>,
    /// Restarts, asked for or not.
    pub restarts: u32,
    /// Exits in a row before `min_uptime`.
    pub unstable: u32,
    /// When it was created.
    pub created: crate::model::moment::Moment,
    /// When the next start is due.
    pub restart_at: Option<crate::model::moment::Moment>,
    /// How the last run ended.
    pub last_exit: Option<ExitReason>,
    /// Nobody had asked that run to end.
    pub by_itself: bool,
    /// Apps that have to be up before it is started.
    pub waiting_for: Vec<AppName>,
    /// Before this moment an unhealthy run is not replaced: others of this slot have been, shortly before.
    pub replace_after: Option<crate::model::moment::Moment>,
    /// Likewise one that is over its memory limit.
    pub curb_after: Option<crate::model::moment::Moment>,
}

/// What is shown about one run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunView {
    /// Which run.
    pub id: InstanceId,
    /// Its main process, once spawned.
    pub pid: Option<u32>,
    /// Its own state.
    pub status: Status,
    /// When the spawn was asked for.
    pub since: crate::model::moment::Moment,
    /// When it became ready.
    pub ready_at: Option<crate::model::moment::Moment>,
    /// Waits for its turn to launch.
    pub queued: bool,
    /// When SIGKILL is due, while stopping.
    pub kill_at: Option<crate::model::moment::Moment>,
    /// What its health check says, if it has one.
    pub health: Option<Health>,
    /// How many probes in a row have failed.
    pub failed_probes: u32,
    /// It is over its memory limit, with so many bytes.
    pub over_memory: Option<u64>,
    /// Where it stands in more words than the table has.
    pub state: RunState,
}

/// Where a run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    /// Waits for its turn to launch.
    Queued,
    /// Launching, not ready.
    Launching,
    /// Ready, but not in rotation yet: it has to live for `min_healthy`, or waits for the others of its release.
    Soaking,
    /// In rotation.
    Online,
    /// Replaced and out of rotation; comes back when the reload fails.
    Reserve,
    /// Out of rotation, finishing what it has.
    Draining,
    /// It has its signal, or has exited.
    Stopping,
}

impl RunState {
    /// The word for people and `jlist`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Launching => "launching",
            Self::Soaking => "soaking",
            Self::Online => "online",
            Self::Reserve => "reserve",
            Self::Draining => "draining",
            Self::Stopping => "stopping",
        }
    }
}
