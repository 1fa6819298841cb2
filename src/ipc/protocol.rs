//! The messages between the command line and the supervisor; also the public API of the socket.
//!
//! Fields are only ever added. Unknown fields are ignored, so that an older client understands a newer supervisor and
//! the reverse; an unknown request is refused with code 2, and so is an unknown key of a spec ([`super::strict`]).

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::model::figures::NodeFigures;
use crate::model::id::{AppName, Generation, OpId, PmId, Slot};
pub use crate::model::mask::MASK;
use crate::model::moment::Moment;
use crate::model::saved::HookKind;
use crate::model::spec::AppSpec;
use crate::model::status::Status;

/// The version of this protocol.
pub const VERSION: u32 = 1;

/// The longest line in either direction, in bytes. A longer request is refused and the connection closed.
pub const MAX_LINE: usize = 64 * 1024 * 1024;

/// A supervisor that is alive says so at least this often while a request is under way.
pub const ALIVE_EVERY: Duration = Duration::from_secs(1);

impl Request {
    /// The specs that it comes with.
    #[must_use]
    pub fn specs(&self) -> &[AppSpec] {
        match self {
            Self::Start { specs, .. }
            | Self::Apply { specs, .. }
            | Self::Act { specs, .. }
            | Self::PlanReload { specs, .. } => specs,
            _ => &[],
        }
    }
}

/// A request as one line.
#[derive(Debug, Serialize, Deserialize)]
pub struct Call {
    /// [`VERSION`].
    pub v: u32,
    /// Chosen by the client, at random: names the operation, so that a client that lost its connection can ask for
    /// the outcome with [`Request::Outcome`].
    pub op: OpId,
    /// What is asked.
    pub request: Request,
}

/// What can be asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Whether anybody is there. Answers `Pong`.
    Ping,
    /// The table. Answers `List`. No targets: everything.
    List {
        /// Names, namespaces, ids, /regex/, `all`.
        targets: Vec<String>,
        /// With what the agents in Node processes have measured.
        #[serde(default)]
        figures: bool,
    },
    /// The table with everything known: processes of each instance, environment, paths. Answers `Describe`.
    Describe {
        /// As in `List`, but at least one.
        targets: Vec<String>,
        /// Do not mask values of the environment.
        show_env: bool,
    },
    /// The list in PM2's form. Answers `Raw` with a JSON array.
    Jlist {
        /// As in `List`.
        targets: Vec<String>,
        /// Do not mask values of the environment.
        show_env: bool,
    },
    /// Limit how many instances may launch at once. Answers `Operation`.
    LimitStarts {
        /// From 1.
        at_once: u32,
    },
    /// Whether values of the environment are shown to everybody who asks, as `show_env` of a config file says.
    /// Answers `Operation`.
    ShowEnv {
        /// From now on.
        show: bool,
    },
    /// Start apps from specs. Answers `Operation`.
    Start {
        /// The specs, in order.
        specs: Vec<AppSpec>,
        /// The caller's environment, scrubbed.
        shell: BTreeMap<String, String>,
    },
    /// Make the apps of a file what it says. Says `Plan` first, then acts and answers `Operation`; with `act: false`
    /// answers `Plan` and does nothing.
    Apply {
        /// The chosen ones of its apps, in its order.
        specs: Vec<AppSpec>,
        /// Every app of the file.
        all: Vec<AppName>,
        /// The file, as in the origin of its apps.
        file: PathBuf,
        /// Remove apps that came from it and are not in it any more.
        prune: bool,
        /// Whether to do it.
        act: bool,
        /// The caller's environment, scrubbed: for apps that are new.
        shell: BTreeMap<String, String>,
        /// Do not mask values of the environment in the plan.
        show_env: bool,
    },
    /// Act on what exists. Answers `Operation`.
    Act {
        /// What to do.
        verb: Verb,
        /// On what; with `specs`, the names of those specs unless given.
        targets: Vec<String>,
        /// `restart FILE`, `reload FILE`: the specs as the file has them now; an app that does not exist is started.
        specs: Vec<AppSpec>,
        /// The caller's environment: with `--update-env`, and with `specs` for apps that are new.
        shell: Option<BTreeMap<String, String>>,
        /// Take `shell` also for apps that exist.
        update_env: bool,
    },
    /// What a reload would do; nothing is changed. Answers `Plan`.
    PlanReload {
        /// As in `Act`.
        targets: Vec<String>,
        /// As in `Act`.
        specs: Vec<AppSpec>,
        /// The caller's environment, for apps that are new.
        shell: BTreeMap<String, String>,
    },
    /// Change the number of instances. Answers `Operation`.
    Scale {
        /// One app.
        target: String,
        /// To how many.
        to: ScaleTo,
    },
    /// Set restart counters to zero. Answers `Operation`.
    Reset {
        /// As in `List`.
        targets: Vec<String>,
    },
    /// What the next start of one instance would change in its environment, never masked: env files are read anew. pm's
    /// own variables, which differ for each run, are left out. Answers `EnvDiff`.
    EnvDiff {
        /// An id, or a name (its first slot).
        target: String,
    },
    /// The environment of one instance, never masked. Answers `Env`.
    Env {
        /// An id, or a name (its first slot).
        target: String,
    },
    /// Write the list for `resurrect`. Answers `Saved`.
    Save,
    /// Start what the saved list says. Answers `Operation`.
    Resurrect,
    /// Save the list, stop everything, end the daemon. Answers `Operation`, before the daemon ends.
    Kill,
    /// Replace the daemon by this program. Answers `Upgrade`; where it is replaced the connection ends instead, and the
    /// next supervisor is asked with `UpgradeOutcome`.
    Upgrade {
        /// An absolute path.
        program: PathBuf,
        /// Leave the keeper as it is.
        supervisor_only: bool,
        /// Only look whether it would do.
        check: bool,
    },
    /// How an upgrade ended, waiting for that. Answers `Upgrade` or `NeverBegun`.
    UpgradeOutcome {
        /// Which.
        op: OpId,
    },
    /// The outcome of an earlier operation, waiting for it if it is under way. Answers `Operation`, or
    /// `NeverBegun`.
    Outcome {
        /// Which.
        op: OpId,
        /// When it was asked for, so that what was forgotten meanwhile is not taken for what was never begun. Earlier
        /// versions do not say.
        #[serde(default)]
        asked: Option<Moment>,
    },
}

/// What to do with what exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verb {
    /// Stopped: start; online: restart.
    Start,
    /// Stop.
    Stop,
    /// All instances at once.
    Restart,
    /// One generation after the other.
    Reload,
    /// Stop and forget.
    Delete,
}

/// A new number of instances.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScaleTo {
    /// Exactly this many.
    To(u32),
    /// This many more.
    Up(u32),
    /// This many fewer.
    Down(u32),
}

/// A line of the server.
#[derive(Debug, Serialize, Deserialize)]
pub struct Line {
    /// The call it belongs to.
    pub op: OpId,
    /// What it says.
    pub reply: Reply,
}

/// What a line says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// The request arrived; sent at once, and again every [`ALIVE_EVERY`] while it is under way.
    Alive,
    /// Words for people before an operation acts: "this is not zero-downtime, because …".
    Notice(String),
    /// What `Apply` is about to do.
    Plan(PlanView),
    /// A step of the operation.
    Progress(StepView),
    /// The end: what was asked for.
    Answer(Answer),
    /// The end: nothing, or not what was asked for.
    Refused(Refused),
}

/// What was asked for.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// To `Ping`.
    Pong {
        /// The supervisor's version.
        version: String,
        /// The keeper's pid.
        daemon_pid: u32,
        /// The supervisor's pid.
        supervisor_pid: u32,
        /// What people should know about the daemon.
        #[serde(default)]
        warnings: Vec<String>,
    },
    /// To `List`.
    List(ListView),
    /// To `Describe`.
    Describe(Vec<InstanceDetail>),
    /// To `Jlist`: JSON as it is to be printed.
    Raw(Box<RawValue>),
    /// To everything that changes something.
    Operation(OperationView),
    /// To `Apply` that does nothing.
    Plan(PlanView),
    /// To `EnvDiff`.
    EnvDiff {
        /// Whose instance.
        app: AppName,
        /// The variables that differ; empty where nothing runs.
        changes: Vec<KeyChange>,
    },
    /// To `PlanReload`: one per app, in the order asked.
    ReloadPlan(Vec<ReloadPlanView>),
    /// To `Env`.
    Env(BTreeMap<String, String>),
    /// To `Save`.
    Saved {
        /// Where.
        path: PathBuf,
        /// How many apps.
        apps: u32,
    },
    /// To `Upgrade` and `UpgradeOutcome`.
    Upgrade(UpgradeView),
    /// To `Outcome`: nobody has begun it, so it may be asked for again.
    NeverBegun,
}

/// How an upgrade ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpgradeView {
    /// In a word.
    pub result: UpgradeResult,
    /// The version that ran before.
    pub from: String,
    /// The version of the new program.
    pub to: String,
    /// What became of the keeper.
    pub keeper: KeeperFate,
    /// Why the new supervisor did not take over, or why the keeper is not new.
    #[serde(default)]
    pub reason: Option<String>,
}

/// How an upgrade ended, in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UpgradeResult {
    /// The new program runs.
    Replaced,
    /// It ran before.
    Already,
    /// Only asked: it would take over.
    Fits,
    /// The new supervisor did not take over; the one before it goes on.
    Failed,
}

/// The keeper after an upgrade.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeeperFate {
    /// It runs the new program, in the same process.
    Replaced,
    /// It had that program before, or was to stay.
    Same,
    /// It runs an older program.
    Older,
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// The exit code (design: 1 failed, 2 wrong usage, 3 no such app, 5 busy, 70 internal).
    pub code: u8,
    /// What could not be done: "cannot reload `api`".
    pub message: String,
    /// Why.
    pub cause: Option<String>,
    /// What would work.
    pub hint: Option<String>,
}

/// A step of an operation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepView {
    /// Whose instance.
    pub app: AppName,
    /// Its number for people.
    pub pm_id: PmId,
    /// Its place.
    pub slot: Slot,
    /// Its generation.
    pub generation: Generation,
    /// What happened.
    pub step: StepKind,
}

/// What happened to an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepKind {
    /// Waits for its turn.
    Queued,
    /// Is being spawned.
    Launching,
    /// Runs.
    Spawned {
        /// Its main process.
        pid: u32,
    },
    /// Is ready, and in rotation.
    Ready {
        /// Milliseconds from the spawn until it was ready.
        after_ms: u64,
        /// Nothing but having lived for that long says so.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        lived: bool,
    },
    /// Is ready, and has to live on for a while before it gets connections.
    Soaking {
        /// Milliseconds from the spawn until it was ready.
        after_ms: u64,
        /// Milliseconds that it has to live on.
        span_ms: u64,
    },
    /// Was replaced: gets no new connections, and stays in case the reload fails.
    Reserved,
    /// The reload has failed: gets connections again.
    Restored,
    /// Gets no new connections.
    Draining,
    /// Has the kill signal.
    Signalled {
        /// "SIGINT".
        signal: String,
    },
    /// Is gone.
    Gone {
        /// Milliseconds since it began to stop.
        after_ms: u64,
        /// SIGKILL was needed.
        killed: bool,
        /// "exit code 0", "SIGINT".
        reason: String,
    },
    /// Will not be.
    Failed {
        /// Why.
        reason: String,
    },
    /// A hook of the app runs; the step's slot and generation mean nothing.
    Hook {
        /// Which.
        hook: HookKind,
    },
}

/// What a reload would do to one app.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReloadPlanView {
    /// Which app.
    pub app: AppName,
    /// "reload" or "start"; "wait" for what is going on; "refuse" because of it.
    pub action: String,
    /// What is going on, where that matters.
    pub going_on: Option<String>,
    /// Why an instance could not be started now.
    pub fault: Option<String>,
    /// Whether its spec would change.
    pub changed: bool,
    /// "rolling", "blue-green" or "in-place".
    pub strategy: String,
    /// The slots in the order of their turn.
    pub slots: Vec<PlannedSlotView>,
    /// Slots that would be given up at the end.
    pub given_up: Vec<PlannedSlotView>,
    /// How many slots are replaced at the same time.
    pub at_once: u32,
    /// How many instances may be missing meanwhile.
    pub max_unavailable: u32,
    /// The most that launch or serve at the same time.
    pub most: u32,
    /// Replaced ones stay alive until the last slot is ready, beyond that.
    pub reserve: bool,
    /// How many replaced ones may be there at the same time.
    pub max_draining: u32,
    /// What is waited for, in words: "it says that it is ready, within 30s".
    pub ready: String,
    /// How long a new one has to live on before it gets connections.
    pub min_healthy_ms: u64,
    /// "rollback" or "abort".
    pub on_failure: String,
    /// Whether requests may go unanswered meanwhile.
    pub downtime: bool,
}

/// A slot of a plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedSlotView {
    /// Its place.
    pub slot: Slot,
    /// Its number for people, once it has one.
    pub pm_id: Option<PmId>,
    /// The main process that runs there now.
    pub pid: Option<u32>,
    /// The generation that runs there now.
    pub generation: Option<Generation>,
    /// The generation that would follow.
    pub next: Option<Generation>,
}

/// How an operation ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperationView {
    /// Whether everything is as asked. Exit code 0, else 1.
    pub ok: bool,
    /// One per app, in the order asked.
    pub apps: Vec<AppResult>,
}

/// The result of an app that a reload of many had not come to when its supervisor ended: asking for it again does it once.
pub const NOT_BEGUN: &str = "not begun";

/// How an operation ended for one app.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppResult {
    /// Which app.
    pub app: AppName,
    /// Whether it is as asked.
    pub ok: bool,
    /// "started", "already running", "reloaded", "superseded", "failed", …
    pub result: String,
    /// How many slots were concerned.
    pub slots: u32,
    /// What went wrong.
    pub failure: Option<Failure>,
}

/// What went wrong in an operation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// "worker 2 was not ready within 5s", in one line.
    pub cause: String,
    /// What serves now, and what to do.
    pub hint: Option<String>,
    /// The last lines the failed instance wrote.
    pub last_lines: Vec<String>,
    /// Slots that run the new release.
    pub replaced: Vec<Slot>,
    /// Slots that still run the old one, or do again.
    pub kept: Vec<Slot>,
    /// Slots that ran the new release and run the old one again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub restored: Vec<Slot>,
}

/// What `Apply` does, or would do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanView {
    /// Whether anything changes.
    pub changes: bool,
    /// One per app, in the order in which they begin.
    pub apps: Vec<PlannedApp>,
    /// Apps that came from the file, are not in it any more, and stay.
    pub left_over: Vec<AppName>,
}

/// What is to become of one app.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedApp {
    /// Which.
    pub app: AppName,
    /// What is done.
    pub measure: Measure,
    /// How many instances it has afterwards; 0 where it is removed.
    pub instances: u32,
    /// Why: the keys that differ.
    pub changes: Vec<KeyChange>,
    /// Why, where no key says it; "it is down".
    pub note: Option<String>,
}

/// What is done to an app.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    /// It goes.
    Remove,
    /// It is new.
    Create,
    /// Instances that are down are started.
    Start,
    /// Every process is replaced, without a gap.
    Reload,
    /// Every process is replaced, with downtime.
    Restart,
    /// Instances are added or removed.
    Scale,
    /// Its rules change, its processes stay.
    Update,
    /// Nothing.
    Unchanged,
}

/// A key of the config that differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyChange {
    /// Its name; `env.PORT` for a variable.
    pub key: String,
    /// `None` where it was not set. Values of variables may be [`MASK`].
    pub old: Option<String>,
    /// `None` where it is not set any more.
    pub new: Option<String>,
}

/// The table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ListView {
    /// One row per slot, by app in the order of creation, then by slot.
    pub rows: Vec<Row>,
    /// The machine.
    pub host: HostView,
    /// Something people should know: the supervisor keeps dying, the disk is full.
    pub warnings: Vec<String>,
}

/// A row of the table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Its number for people.
    pub pm_id: PmId,
    /// Whose instance.
    pub app: AppName,
    /// The app's namespace.
    pub namespace: String,
    /// Its place.
    pub slot: Slot,
    /// The generation in the row.
    pub generation: Option<Generation>,
    /// "fork" or "cluster".
    pub mode: String,
    /// Its main process.
    pub pid: Option<u32>,
    /// Milliseconds since the current run was spawned.
    pub uptime_ms: Option<u64>,
    /// Restarts, asked for or not.
    pub restarts: u32,
    /// Its state.
    pub status: Status,
    /// It is online, and fails its health check.
    #[serde(default)]
    pub unhealthy: bool,
    /// "queued", "draining 3 (12 s left)", "restart in 3 s", "exit code 1": what the status alone does not tell.
    pub note: Option<String>,
    /// Percent of one core, the whole tree.
    pub cpu: Option<f64>,
    /// Bytes, the whole tree.
    pub memory: Option<u64>,
    /// Addresses the app listens on, as far as pm knows them: "http://127.0.0.1:8080" is made from them.
    pub listen: Vec<String>,
    /// What the agent in a Node process has measured, where it was asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub figures: Option<NodeFigures>,
}

/// The machine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HostView {
    /// Percent of all cores together.
    pub cpu: f64,
    /// Usable cores.
    pub cores: u32,
    /// Load averages of 1, 5 and 15 minutes.
    pub load: [f64; 3],
    /// Bytes in use (total − available).
    pub memory_used: u64,
    /// Bytes in all.
    pub memory_total: u64,
}

/// Everything known about an instance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InstanceDetail {
    /// Its row.
    pub row: Row,
    /// What it runs.
    pub spec: AppSpec,
    /// The revision of that spec.
    pub revision: u64,
    /// Standard output goes here.
    pub out_file: PathBuf,
    /// Standard error goes here.
    pub error_file: PathBuf,
    /// When the slot was created, milliseconds since 1970.
    pub created_ms: u64,
    /// When the current run was spawned, milliseconds since 1970.
    pub started_ms: Option<u64>,
    /// Milliseconds from spawn to ready.
    pub ready_after_ms: Option<u64>,
    /// Exits in a row before `min_uptime`.
    pub unstable: u32,
    /// How the last run ended.
    pub last_exit: Option<String>,
    /// Proportional set size of the whole tree, bytes.
    pub pss: Option<u64>,
    /// Resident set size of all its processes added up, bytes.
    pub rss: Option<u64>,
    /// Its processes.
    pub processes: Vec<ProcessView>,
    /// Older generations that are still there.
    pub draining: Vec<DrainingView>,
    /// The environment, masked unless asked otherwise.
    pub env: BTreeMap<String, String>,
    /// What a probe heard last.
    #[serde(default)]
    pub probe: Option<ProbeView>,
    /// "healthy", "failing", "unhealthy" or "unknown", where there is a health check.
    #[serde(default)]
    pub health: Option<String>,
    /// Which promise is weaker, and why: "agent = false: …".
    pub notes: Vec<String>,
    /// The version of Node that its process runs on.
    #[serde(default)]
    pub node_version: Option<String>,
}

/// What a probe heard last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeView {
    /// "ready" or "health".
    pub role: String,
    /// Whether it was a good answer.
    pub ok: bool,
    /// "GET /healthz → 503 'db not connected'".
    pub text: String,
    /// How long ago, in milliseconds.
    pub ago_ms: u64,
    /// How long the answer took, in milliseconds.
    pub took_ms: u64,
    /// How many in a row went like it, itself included.
    pub in_a_row: u32,
}

/// A process of an instance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProcessView {
    /// Its pid.
    pub pid: u32,
    /// Its command line, shortened.
    pub command: String,
    /// Percent of one core.
    pub cpu: f64,
    /// Resident, bytes.
    pub rss: u64,
    /// Proportional, bytes.
    pub pss: u64,
}

/// An older generation that is still there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainingView {
    /// Its generation.
    pub generation: Generation,
    /// Its main process.
    pub pid: Option<u32>,
    /// Milliseconds until SIGKILL.
    pub kill_in_ms: Option<u64>,
    /// "reserve", "draining", "stopping", "launching", "soaking".
    #[serde(default)]
    pub state: String,
}
