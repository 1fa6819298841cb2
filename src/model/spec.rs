//! An app as it is to be run: the user's file or command line, resolved.
//!
//! Resolved means: defaults filled in, relative paths made absolute against the app's `cwd`, numbers checked. What
//! can change between two spawns (symlinks, the interpreter in PATH, env files) stays unresolved here and is looked
//! up anew at each spawn.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::id::AppName;
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
    /// Whether the Node agent is preloaded (direct Node scripts only).
    pub agent: bool,
    /// What an instance reads from descriptor 0.
    pub stdin: Stdin,
    /// Whether `start` and boot start it; an app with `autostart = false` is listed as stopped until started by name.
    pub autostart: bool,
}

impl AppSpec {
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
    #[must_use]
    pub const fn is_node_cluster(&self) -> bool {
        // Deno takes no handle in shared mode; it takes inherited listeners like everybody else.
        matches!(self.mode, ExecMode::Cluster) && matches!(self.command.runtime, Runtime::Node | Runtime::Bun)
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
}

/// When an instance counts as ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadyRules {
    /// Wait for the app to say so: `"ready"` over IPC, `READY=1` on NOTIFY_SOCKET, or a newline on PM_READY_FD.
    pub wait_ready: bool,
    /// Not ready within this time from spawn is a failure. 30 s unless set.
    pub listen_timeout: Duration,
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

/// How one generation replaces another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReloadRules {
    /// Instances launching or ready beyond `instances`. 1 unless set.
    pub max_surge: u32,
    /// Instances that may be missing meanwhile. 0 unless set.
    pub max_unavailable: u32,
    /// What to do with finished slots when a later one fails.
    pub on_failure: OnFailure,
    /// Whether generations may overlap; `None`: yes for cluster mode and inherited listeners.
    pub overlap: Option<bool>,
}

/// What a failed reload leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnFailure {
    /// Finished slots stay new, the rest stays old.
    Abort,
}

/// Where output goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
