//! An app as it is to be run: the user's file or command line, resolved.
//!
//! Resolved means: defaults filled in, relative paths made absolute against the app's `cwd`, numbers checked. What
//! can change between two spawns (symlinks, the interpreter in PATH, env files) stays unresolved here and is looked
//! up anew at each spawn.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::id::AppName;
use super::process::ProcessRules;
use super::signal::Signal;

/// Everything there is to know about an app before it runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppSpec {
    /// Unique among the apps of a daemon.
    pub name: AppName,
    /// Group for targets; `default` unless set.
    pub namespace: String,
    /// The file it came from; `None` for an app started from the command line.
    pub origin: Option<Origin>,
    /// What to execute.
    pub command: CommandSpec,
    /// The working directory, absolute, symlinks unresolved.
    pub cwd: PathBuf,
    /// Fork or cluster.
    pub mode: ExecMode,
    /// How many slots, at least 1.
    pub instances: u32,
    /// The environment of an instance.
    pub env: EnvSpec,
    /// Listening sockets that instances inherit, in the order of their descriptors from 3.
    pub listen: Vec<ListenSpec>,
    /// How connections reach workers in cluster mode.
    pub balance: Balance,
    /// When an instance counts as ready.
    pub ready: ReadyRules,
    /// How an instance is ended.
    pub stop: StopRules,
    /// What follows an exit nobody asked for.
    pub restart: RestartRules,
    /// How one generation replaces another.
    pub reload: ReloadRules,
    /// Where output goes.
    pub logs: LogRules,
    /// When a running instance counts as sick and is replaced; `None`: never.
    #[serde(default)]
    pub health: Option<Probe>,
    /// An instance whose processes together use more than this many bytes is replaced; `None`: never.
    #[serde(default)]
    pub max_memory: Option<u64>,
    /// Programs that run beside the app's life.
    #[serde(default)]
    pub hooks: Hooks,
    /// The apps that have to be up before this one starts, and are stopped after it.
    #[serde(default)]
    pub depends_on: BTreeMap<AppName, Dependency>,
    /// Whether the Node agent is preloaded (direct Node scripts only).
    pub agent: bool,
    /// What an instance reads from descriptor 0.
    pub stdin: Stdin,
    /// Whether `start` and boot start it; an app with `autostart = false` is listed as stopped until started by name.
    pub autostart: bool,
    /// Who its processes are and what they may use.
    #[serde(default)]
    pub process: ProcessRules,
}

impl AppSpec {
    /// An app of which only what to run and where is known; everything else has its default.
    #[must_use]
    pub fn new(name: AppName, command: CommandSpec, cwd: PathBuf) -> Self {
        Self {
            name,
            namespace: "default".to_owned(),
            origin: None,
            command,
            cwd,
            mode: ExecMode::Fork,
            instances: 1,
            env: EnvSpec::default(),
            listen: Vec::new(),
            balance: Balance::RoundRobin,
            ready: ReadyRules::default(),
            stop: StopRules::default(),
            restart: RestartRules::default(),
            reload: ReloadRules::default(),
            logs: LogRules::default(),
            health: None,
            max_memory: None,
            hooks: Hooks::default(),
            depends_on: BTreeMap::new(),
            agent: true,
            stdin: Stdin::Pipe,
            autostart: true,
            process: ProcessRules::default(),
        }
    }

    /// Whether an instance gets an IPC channel (`NODE_CHANNEL_FD`).
    ///
    /// Programs that do not know the channel would hand it to their children, so they get one only when they are
    /// to say "ready" on it.
    #[must_use]
    pub const fn has_channel(&self) -> bool {
        match self.command.runtime {
            Runtime::Node | Runtime::Bun | Runtime::Deno => true,
            Runtime::Other => self.ready.wait_ready,
        }
    }

    /// Whether an instance is a worker of a Node cluster whose primary is the daemon.
    ///
    /// Deno takes no handle in shared mode; it takes inherited listeners like everybody else. Bun says it is a worker,
    /// but asks the primary for nothing: each worker binds the port itself, with SO_REUSEPORT. With `listen` it gets
    /// sockets whose queues outlive it instead.
    #[must_use]
    pub const fn is_node_cluster(&self) -> bool {
        matches!(self.mode, ExecMode::Cluster)
            && match self.command.runtime {
                Runtime::Node => true,
                Runtime::Bun => self.listen.is_empty(),
                Runtime::Deno | Runtime::Other => false,
            }
    }

    /// Whether every slot inherits listening sockets of its own, and the kernel is told which of them get connections.
    #[must_use]
    pub const fn inherits_slots(&self) -> bool {
        self.balance.is_slots() && !self.is_node_cluster() && !self.listen.is_empty()
    }

    /// Whether an instance that is taken out of rotation gets no new connections, without its help.
    #[must_use]
    pub const fn has_rotation(&self) -> bool {
        self.is_node_cluster() || self.inherits_slots()
    }

    /// Whether the agent is preloaded.
    #[must_use]
    pub const fn has_agent(&self) -> bool {
        self.agent && matches!(self.command.runtime, Runtime::Node)
    }

    /// Whether two generations of a slot may run side by side.
    #[must_use]
    pub fn can_overlap(&self) -> bool {
        self.reload.overlap.unwrap_or(self.is_node_cluster() || !self.listen.is_empty())
    }
}

/// Where a spec came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The config file, absolute.
    pub file: PathBuf,
    /// The environment chosen with `--env`, if any.
    pub env_name: Option<String>,
}

/// What to execute.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandSpec {
    /// The script or binary: absolute, symlinks unresolved (`current/app.js` follows each release); or, when it has
    /// no `/`, a command looked up in the *app's* PATH at each spawn.
    pub script: PathBuf,
    /// The program that runs the script; `None` executes the script itself. Without a `/` it is looked up in the
    /// *app's* PATH at each spawn. `python` falls back to `python3`.
    pub interpreter: Option<String>,
    /// Arguments of the interpreter, before the script.
    pub interpreter_args: Vec<String>,
    /// Arguments of the app. `{fd:NAME}` stands for the descriptor of the listener of that name.
    pub args: Vec<String>,
    /// Which of the runtimes we know will run the script directly.
    pub runtime: Runtime,
}

/// The runtimes whose IPC protocol we speak. A shell or package runner in front makes it `Other`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Runtime {
    /// node script.js
    Node,
    /// bun script.ts
    Bun,
    /// deno run script.ts
    Deno,
    /// Anything else.
    Other,
}

/// Fork: one process that binds its own port. Cluster: instances that share listening sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExecMode {
    /// Each instance on its own.
    Fork,
    /// Instances share sockets: as workers of a Node cluster, or through inherited listeners.
    Cluster,
}

/// The environment of an instance: caller's shell at first start, then `files`, then `vars`, then pm's own variables.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnvSpec {
    /// `false` leaves PATH, HOME, USER, LANG, TZ and SHELL of the shell.
    pub inherit: bool,
    /// Files of `KEY=value` lines, absolute, read anew at each spawn.
    pub files: Vec<PathBuf>,
    /// `env` and `env_<name>` of the config, merged.
    pub vars: BTreeMap<String, String>,
    /// The variable that carries the slot number; `NODE_APP_INSTANCE` unless set.
    pub instance_var: String,
    /// A variable that counts up per slot, from its value in `vars` or 0.
    pub increment_var: Option<String>,
}

impl Default for EnvSpec {
    fn default() -> Self {
        Self {
            inherit: true,
            files: Vec::new(),
            vars: BTreeMap::new(),
            instance_var: "NODE_APP_INSTANCE".to_owned(),
            increment_var: None,
        }
    }
}

/// A listening socket that pm opens and instances inherit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListenSpec {
    /// Its name in LISTEN_FDNAMES, `PM_LISTEN_FD_<NAME>` and `{fd:NAME}`: the port or the socket's file stem unless set.
    pub name: String,
    /// Where it listens.
    pub address: ListenAddress,
    /// listen(2)'s backlog; 511 unless set, as Node.
    pub backlog: u32,
    /// Leaves O_NONBLOCK off, for old prefork servers that expect a blocking accept.
    pub blocking: bool,
}

/// An address to listen on.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ListenAddress {
    /// A TCP socket. `[::]:p` is dual stack.
    Tcp(SocketAddr),
    /// A unix stream socket at an absolute path.
    Unix(PathBuf),
}

impl std::fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// How connections reach the workers of a Node cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Balance {
    /// The daemon accepts and hands each connection to the next free worker.
    RoundRobin,
    /// Workers accept from one shared socket.
    Shared,
    /// The daemon accepts and hands each connection to the worker with the fewest open ones, as the agent reports.
    LeastConnections,
    /// The daemon accepts, and connections of one client address reach one worker.
    Sticky,
    /// The kernel spreads connections over a socket for each slot (SO_REUSEPORT, socket(7)).
    Slots,
    /// The same, and connections of one client address reach one slot.
    StickySlots,
}

impl Balance {
    /// The most instances that [`Balance::StickySlots`] chooses among: twelve instructions each, of the 4096 that the
    /// kernel takes in a classic BPF program (BPF_MAXINSNS).
    pub const STICKY_SLOTS_MAX: u32 = 300;

    /// Whether every slot has a socket of its own.
    #[must_use]
    pub const fn is_slots(self) -> bool {
        matches!(self, Self::Slots | Self::StickySlots)
    }
}

/// When an instance counts as ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadyRules {
    /// Wait for the app to say so: `"ready"` over IPC, `READY=1` on NOTIFY_SOCKET, or a newline on PM_READY_FD.
    pub wait_ready: bool,
    /// Not ready within this time from spawn is a failure. 30 s unless set.
    pub listen_timeout: Duration,
    /// Ask the instance until it says so.
    #[serde(default)]
    pub probe: Option<Probe>,
}

impl Default for ReadyRules {
    fn default() -> Self {
        Self { wait_ready: false, listen_timeout: Duration::from_secs(30), probe: None }
    }
}

/// A question that is asked of one instance again and again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// What is asked.
    pub check: Check,
    /// From the end of one question to the next. 1 s for `ready`, 10 s for `health` unless set.
    pub interval: Duration,
    /// An answer that takes longer is none. 2 s unless set.
    pub timeout: Duration,
    /// How many answers in a row decide: good ones for `ready` (1 unless set), bad ones for `health` (3 unless set).
    pub threshold: u32,
    /// For `health`: how long after an instance became ready nothing is asked. 0 unless set.
    pub start_period: Duration,
}

/// What a probe asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Check {
    /// An HTTP GET: `http://host:port/path`, `http://unix:/path.sock:/path`, or a path alone, which goes to that
    /// very worker of a Node app. `{NAME}` stands for the instance's variable of that name. 2xx and 3xx are good.
    Http(String),
    /// A TCP connection, or one to `unix:/path.sock`; `{NAME}` likewise.
    Tcp(String),
    /// A program with its arguments, in the instance's environment: exit code 0 is good.
    Exec(Vec<String>),
    /// A line of the instance's output that matches this regular expression (for `ready` only).
    Log(String),
}

/// Programs that run beside an app's life, each with its arguments; nothing goes through a shell.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hooks {
    /// Before the app's instances are started; its failure fails the start.
    pub pre_start: Option<Hook>,
    /// Before the first step of a reload; its failure aborts the reload.
    pub pre_reload: Option<Hook>,
    /// When every instance of a stopped app is gone.
    pub post_stop: Option<Hook>,
    /// When the app has become `errored`.
    pub on_errored: Option<Hook>,
}

/// A program that pm runs and waits for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hook {
    /// The program, looked up in the app's PATH from its `cwd`, and its arguments.
    pub argv: Vec<String>,
    /// After this time it is ended and has failed. 60 s unless set.
    pub timeout: Duration,
}

/// How far another app has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Dependency {
    /// Every instance has been started.
    Started,
    /// Every instance is ready.
    Ready,
}

/// How an instance is ended: the stop ladder's parameters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopRules {
    /// SIGINT unless set.
    pub signal: Signal,
    /// From the signal to SIGKILL. 10 s unless set.
    pub timeout: Duration,
    /// Who gets the signal.
    pub mode: KillMode,
    /// What to do with a Node worker that does not say whether it handles the signal.
    pub method: StopMethod,
    /// Send `"shutdown"` over IPC instead of a signal.
    pub with_message: bool,
    /// How long open connections may drain before the signal; at most `timeout`. `None`: the server's
    /// keepAliveTimeout + 1 s.
    pub drain_timeout: Option<Duration>,
    /// Send websocket clients a close frame (1001) when a drain begins.
    #[serde(default)]
    pub drain_websockets: bool,
}

impl Default for StopRules {
    fn default() -> Self {
        Self {
            signal: Signal::INT,
            timeout: Duration::from_secs(10),
            mode: KillMode::Target,
            method: StopMethod::Signal,
            with_message: false,
            drain_timeout: None,
            drain_websockets: false,
        }
    }
}

/// Who gets the kill signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KillMode {
    /// The main process or, while that is a shell or package runner with exactly one child, that child, and so on.
    Target,
    /// Every process of the instance at once, as PM2's treekill.
    Group,
    /// The main process only.
    Main,
}

/// What ends a Node worker that did not answer whether it handles the kill signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StopMethod {
    /// The signal.
    Signal,
    /// The cluster's `disconnect`, then the signal.
    Disconnect,
}

/// What follows an exit nobody asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestartRules {
    /// `false`: `stopped` after an exit, code kept.
    pub autorestart: bool,
    /// `errored` after this many exits in a row that each came before `min_uptime`. 16 unless set.
    pub max_restarts: u32,
    /// A run that lasts this long was no failed start. 1 s unless set.
    pub min_uptime: Duration,
    /// A fixed delay before every restart, the first included, in place of the backoff.
    pub restart_delay: Option<Duration>,
    /// The first backoff step. 100 ms unless `exp_backoff_restart_delay` is set.
    pub backoff_base: Duration,
    /// A run that lasts this long resets the backoff. 30 s unless set.
    pub backoff_reset: Duration,
    /// Exit codes after which it is `stopped`. Never match a signal.
    pub stop_exit_codes: Vec<i32>,
}

impl Default for RestartRules {
    fn default() -> Self {
        Self {
            autorestart: true,
            max_restarts: 16,
            min_uptime: Duration::from_secs(1),
            restart_delay: None,
            backoff_base: Duration::from_millis(100),
            backoff_reset: Duration::from_secs(30),
            stop_exit_codes: Vec::new(),
        }
    }
}

/// How one generation replaces another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReloadRules {
    /// Slot after slot, or all at once.
    #[serde(default)]
    pub strategy: Strategy,
    /// Instances launching or ready beyond `instances`. 1 unless set.
    pub max_surge: Share,
    /// Instances that may be missing meanwhile. 0 unless set.
    pub max_unavailable: Share,
    /// How long a new instance has to live after it became ready before the old one goes. 0 unless set.
    #[serde(default)]
    pub min_healthy: Duration,
    /// How many old instances may drain at once; `None`: as many as there are slots.
    #[serde(default)]
    pub max_draining: Option<u32>,
    /// What to do with finished slots when a later one fails.
    pub on_failure: OnFailure,
    /// For `rollback`: keep the old instances of finished slots alive until the last slot is ready.
    #[serde(default = "yes")]
    pub reserve: bool,
    /// Whether generations may overlap; `None`: yes for cluster mode and inherited listeners.
    pub overlap: Option<bool>,
}

const fn yes() -> bool {
    true
}

impl Default for ReloadRules {
    fn default() -> Self {
        Self {
            strategy: Strategy::Rolling,
            max_surge: Share::Count(1),
            max_unavailable: Share::Count(0),
            min_healthy: Duration::ZERO,
            max_draining: None,
            on_failure: OnFailure::Rollback,
            reserve: true,
            overlap: None,
        }
    }
}

/// How a reload proceeds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// One slot after the other.
    #[default]
    Rolling,
    /// All new instances beside the old ones, then all at once.
    BlueGreen,
}

/// A number of instances, or a part of all of them. Where it is written for people to read it is `2` or `"25%"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Share {
    /// This many.
    Count(u32),
    /// This part of `instances`, from 0 to 100.
    Percent(u32),
}

impl Share {
    /// How many of `instances` that is, parts of one counted as one: for `max_surge`, as in Kubernetes.
    #[must_use]
    pub fn of_up(self, instances: u32) -> u32 {
        match self {
            Self::Count(count) => count,
            Self::Percent(percent) => part(instances, percent, 99),
        }
    }

    /// How many of `instances` that is, parts of one not counted: for `max_unavailable`, as in Kubernetes.
    #[must_use]
    pub fn of_down(self, instances: u32) -> u32 {
        match self {
            Self::Count(count) => count,
            Self::Percent(percent) => part(instances, percent, 0),
        }
    }

    /// Whether it is none, of however many.
    #[must_use]
    pub const fn is_none(self) -> bool {
        matches!(self, Self::Count(0) | Self::Percent(0))
    }
}

impl std::fmt::Display for Share {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Count(count) => count.fmt(f),
            Self::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

fn part(whole: u32, percent: u32, round: u64) -> u32 {
    u32::try_from((u64::from(whole) * u64::from(percent) + round) / 100).unwrap_or(u32::MAX)
}

impl Serialize for Share {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match (*self, serializer.is_human_readable()) {
            (Self::Count(count), true) => serializer.serialize_u32(count),
            (Self::Percent(_), true) => serializer.collect_str(self),
            // Formats that do not describe themselves: a share is below zero.
            (Self::Count(count), false) => serializer.serialize_i64(i64::from(count)),
            (Self::Percent(percent), false) => serializer.serialize_i64(-1 - i64::from(percent)),
        }
    }
}

impl<'de> Deserialize<'de> for Share {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Count(u32),
            Percent(String),
        }
        let bad = || D::Error::custom("expected a number of instances, or a percentage");
        if deserializer.is_human_readable() {
            return match Written::deserialize(deserializer)? {
                Written::Count(count) => Ok(Self::Count(count)),
                Written::Percent(text) => text.parse().map_err(D::Error::custom),
            };
        }
        let number = i64::deserialize(deserializer)?;
        let size = |number: i64| u32::try_from(number).map_err(|_| bad());
        if number < 0 { size(-1 - number).map(Self::Percent) } else { size(number).map(Self::Count) }
    }
}

/// A text that is no share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected a number of instances, or a percentage such as \"25%\" (up to 100%)")]
pub struct BadShare;

impl std::str::FromStr for Share {
    type Err = BadShare;

    fn from_str(text: &str) -> Result<Self, BadShare> {
        let digits =
            |text: &str| if text.bytes().all(|b| b.is_ascii_digit()) { text.parse().ok() } else { None };
        match text.trim().strip_suffix('%') {
            Some(percent) => digits(percent).filter(|&percent| percent <= 100).map(Self::Percent),
            None => digits(text.trim()).map(Self::Count),
        }
        .ok_or(BadShare)
    }
}

/// What a failed reload leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnFailure {
    /// Finished slots stay new, the rest stays old.
    Abort,
    /// Every slot goes back to the old release.
    Rollback,
}

/// Where output goes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogRules {
    /// Standard output, absolute; `None`: `<home>/logs/<name>-out.log`, with `-<id>` before the suffix unless merged.
    /// `/dev/null` discards.
    pub out_file: Option<PathBuf>,
    /// Standard error, likewise; `<home>/logs/<name>-error.log`.
    pub error_file: Option<PathBuf>,
    /// One file for all instances: no `-<id>`. `None`: yes for a single fork-mode instance, as PM2 does it.
    pub merge: Option<bool>,
    /// A time stamp `<stamp>: ` before each line, in dayjs's format language; `time = true` is
    /// `YYYY-MM-DDTHH:mm:ss`.
    pub date_format: Option<String>,
    /// What happens to output that a file does not take, or not as fast as it comes.
    #[serde(default)]
    pub overflow: Overflow,
}

/// What happens to output that a log file does not take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Overflow {
    /// It is dropped and counted; the app goes on.
    #[default]
    Drop,
    /// The app waits.
    Block,
}

/// What an instance reads from descriptor 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stdin {
    /// An open pipe on which nothing arrives.
    Pipe,
    /// /dev/null.
    Null,
}

/// Gives the values of a config key their words: the only list of them, for reading, for tables and for plans.
macro_rules! words {
    ($($key:ident { $($value:ident = $word:literal),+ $(,)? })+) => { $(
        impl $key {
            /// Every value with its word in config files and on the command line.
            pub const NAMES: &'static [(&'static str, Self)] = &[$(($word, Self::$value)),+];

            /// Its word.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$value => $word,)+
                }
            }
        }

        impl std::fmt::Display for $key {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }
    )+ };
}

words! {
    ExecMode { Fork = "fork", Cluster = "cluster" }
    Balance {
        RoundRobin = "round-robin",
        LeastConnections = "least-connections",
        Sticky = "sticky",
        Shared = "shared",
        Slots = "slots",
        StickySlots = "sticky-slots",
    }
    Dependency { Ready = "ready", Started = "started" }
    KillMode { Target = "target", Group = "group", Main = "main" }
    StopMethod { Signal = "signal", Disconnect = "disconnect" }
    Strategy { Rolling = "rolling", BlueGreen = "blue-green" }
    OnFailure { Rollback = "rollback", Abort = "abort" }
    Stdin { Pipe = "pipe", Null = "null" }
    Overflow { Drop = "drop", Block = "block" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_read_as_they_are_written() {
        for share in [Share::Count(0), Share::Count(10_000), Share::Percent(0), Share::Percent(100)] {
            assert_eq!(share.to_string().parse(), Ok(share));
            let json = serde_json::to_string(&share).unwrap();
            assert_eq!(serde_json::from_str::<Share>(&json).unwrap(), share);
            let bytes = postcard::to_allocvec(&share).unwrap();
            assert_eq!(postcard::from_bytes::<Share>(&bytes).unwrap(), share);
        }
        for text in ["", "%", "101%", "-1", "1.5", "half", "25 %%"] {
            assert_eq!(text.parse::<Share>(), Err(BadShare), "{text}");
        }
    }

    #[test]
    fn a_part_of_an_instance_counts_for_surge_only() {
        let quarter = Share::Percent(25);
        let both = |instances| (quarter.of_up(instances), quarter.of_down(instances));
        assert_eq!([both(1), both(4), both(6)], [(1, 0), (1, 1), (2, 1)]);
        assert_eq!(Share::Percent(100).of_up(u32::MAX), u32::MAX);
        assert_eq!((Share::Count(3).of_up(1), Share::Count(3).of_down(1)), (3, 3));
    }
}
