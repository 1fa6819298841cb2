//! Every key of an app: its spellings, what it takes, its default, what it means, and how it is read.
//!
//! This table is the only list of keys: the reader, "did you mean", docs/config.md and ecosystem.example.toml are
//! made from it or checked against it.

use std::collections::BTreeMap;
use std::time::Duration;

use super::app::{AppConfig, INSTANCES_MAX, Instances, Variables};
use super::error::{At, Place, Problem, quoted};
use super::value::Value;
use super::{listen, probe, process, unknown};
use crate::model::signal::Signal;
use crate::model::spec::{
    Balance, Dependency, ExecMode, Hook, KillMode, OnFailure, Overflow, Share, Stdin, StopMethod, Strategy,
};

/// No timeout or delay is longer.
const DAY: Duration = Duration::from_secs(86_400);
/// The backoff never waits longer between two restarts.
const BACKOFF_MAX: Duration = Duration::from_secs(15);

/// How long a hook may take unless it says so.
const HOOK_TIMEOUT: Duration = Duration::from_secs(60);

/// One key of an app.
#[derive(Debug)]
pub struct Key {
    /// Its name: snake_case.
    pub name: &'static str,
    /// Other spellings that mean the same; camelCase of any of them works too.
    pub aliases: &'static [&'static str],
    /// What it takes, for people.
    pub takes: &'static str,
    /// What holds without it: TOML where a value says it, else words.
    pub default: &'static str,
    /// A value that shows how it is written, in TOML.
    pub example: &'static str,
    /// One line that says what it does.
    pub meaning: &'static str,
    read: fn(&mut AppConfig, Value<'_, '_>) -> Result<(), Problem>,
}

/// A key of the whole file.
#[derive(Debug)]
pub struct FileKey {
    /// Its name.
    pub name: &'static str,
    /// What it takes, for people.
    pub takes: &'static str,
    /// What holds without it.
    pub default: &'static str,
    /// One line that says what it does.
    pub meaning: &'static str,
}

/// The keys outside of `[[apps]]`.
pub static FILE_KEYS: [FileKey; 3] = [
    FileKey { name: "apps", takes: "tables", default: "required", meaning: "One `[[apps]]` table per app." },
    FileKey {
        name: "start_parallelism",
        takes: "number, 1 to 1000",
        default: "2 × CPUs",
        meaning: "How many instances may be launching at once; the others wait their turn.",
    },
    FileKey {
        name: "show_env",
        takes: "true or false",
        default: "false, or what the last file said that had it",
        meaning: "Show values of the environment in `jlist`, `describe` and plans to everybody who may ask the daemon; false masks them.",
    },
];

/// Reads one value into its field.
macro_rules! set {
    ($field:ident, $value:ident => $read:expr) => {
        |app, $value| {
            app.$field = Some($read);
            Ok(())
        }
    };
}

/// Every key, in the order of the documentation.
pub static KEYS: [Key; 69] = [
    Key {
        name: "name",
        aliases: &[],
        takes: "string",
        default: "the script's file name without its last extension",
        example: "\"api\"",
        meaning: "What tables and commands call the app; unique.",
        read: set!(name, v => v.at(v.string()?)),
    },
    Key {
        name: "namespace",
        aliases: &[],
        takes: "string",
        default: "\"default\"",
        example: "\"shop\"",
        meaning: "A group of apps, as a target of commands.",
        read: set!(namespace, v => v.at(v.filled()?)),
    },
    Key {
        name: "script",
        aliases: &["exec", "cmd", "command"],
        takes: "string",
        default: "required",
        example: "\"server.js\"",
        meaning: "What to run: a file (relative to `cwd`), a command in PATH, or a command with its arguments; `pm` is pm itself.",
        read: set!(script, v => v.at(v.filled()?)),
    },
    Key {
        name: "shell",
        aliases: &[],
        takes: "true or false",
        default: "false",
        example: "true",
        meaning: "`script` is a line for bash, or sh where there is no bash: with pipes, variables, `&&`. Without it no shell reads it.",
        read: set!(shell, v => v.at(v.boolean()?)),
    },
    Key {
        name: "args",
        aliases: &[],
        takes: "array of strings, or one string that is split as a shell does it",
        default: "[]",
        example: "[\"--verbose\"]",
        meaning: "Arguments of the script; `{fd:NAME}` stands for the descriptor of the listener of that name.",
        read: set!(args, v => v.at(v.words()?)),
    },
    Key {
        name: "cwd",
        aliases: &[],
        takes: "path",
        default: "the directory of the config file",
        example: "\"/srv/api/current\"",
        meaning: "The working directory; other relative paths start here. Symlinks are followed anew at each spawn.",
        read: set!(cwd, v => v.at(v.filled()?)),
    },
    Key {
        name: "interpreter",
        aliases: &["exec_interpreter"],
        takes: "program or path",
        default: "by `#!` line or extension",
        example: "\"node\"",
        meaning: "What runs the script; \"none\" executes the script itself.",
        read: set!(interpreter, v => v.at(v.filled()?)),
    },
    Key {
        name: "interpreter_args",
        aliases: &["node_args"],
        takes: "array of strings, or one string",
        default: "[]",
        example: "[\"--enable-source-maps\"]",
        meaning: "Arguments of the interpreter, before the script.",
        read: set!(interpreter_args, v => v.at(v.words()?)),
    },
    Key {
        name: "exec_mode",
        aliases: &[],
        takes: "\"fork\" or \"cluster\"",
        default: "\"cluster\" when `instances` is given for a Node script or with `listen`, else \"fork\"",
        example: "\"cluster\"",
        meaning: "fork: each instance on its own. cluster: instances share listening sockets and reload without a gap.",
        read: set!(exec_mode, v => v.at(match v.as_str() {
            // As PM2 stores and prints them.
            Some("fork_mode") => ExecMode::Fork,
            Some("cluster_mode") => ExecMode::Cluster,
            _ => v.one_of(ExecMode::NAMES)?,
        })),
    },
    Key {
        name: "instances",
        aliases: &[],
        takes: "number or \"max\"",
        default: "1",
        example: "2",
        meaning: "How many instances; 0 or \"max\": one per CPU; -1: one less than CPUs.",
        read: set!(instances, v => v.at(read_instances(v)?)),
    },
    Key {
        name: "listen",
        aliases: &[],
        takes: "addresses: \"0.0.0.0:3000\", 3000, \"[::]:3000\", \"unix:/run/app.sock\", or tables `{ address, name, backlog, blocking }`",
        default: "[]",
        example: "[\"127.0.0.1:3000\"]",
        meaning: "Sockets that pm opens and every instance inherits (LISTEN_FDS), for any language; a port alone means every address.",
        read: set!(listen, v => listen::read(v)?),
    },
    Key {
        name: "balance",
        aliases: &[],
        takes: "\"round-robin\", \"least-connections\", \"sticky\", \"shared\", \"slots\" or \"sticky-slots\"",
        default: "\"round-robin\"",
        example: "\"shared\"",
        meaning: "How connections reach Node cluster workers: in turn among free ones, to the one with the fewest, by client address, accepted by them from one socket, or from a socket for each slot.",
        read: set!(balance, v => v.at(v.one_of(Balance::NAMES)?)),
    },
    Key {
        name: "env",
        aliases: &[],
        takes: "table",
        default: "{}",
        example: "{ NODE_ENV = \"production\" }",
        meaning: "Environment variables; tables and arrays become JSON. `[apps.env_NAME]` is laid over it by `--env NAME`.",
        read: |app, v| {
            app.env = read_variables(v)?;
            Ok(())
        },
    },
    Key {
        name: "env_file",
        aliases: &[],
        takes: "path or array of paths",
        default: "[]",
        example: "\".env\"",
        meaning: "Files of `KEY=value` lines, read anew at each spawn; `env` wins over them, a later file over an earlier one.",
        read: |app, v| {
            app.env_file =
                v.items().into_iter().map(|v| v.filled().map(|path| v.at(path))).collect::<Result<_, _>>()?;
            Ok(())
        },
    },
    Key {
        name: "inherit_env",
        aliases: &[],
        takes: "boolean",
        default: "true",
        example: "false",
        meaning: "Start from the environment of the shell that started the app; false leaves PATH, HOME, USER, LANG, TZ and SHELL.",
        read: set!(inherit_env, v => v.boolean()?),
    },
    Key {
        name: "instance_var",
        aliases: &[],
        takes: "string",
        default: "\"NODE_APP_INSTANCE\"",
        example: "\"WORKER\"",
        meaning: "The variable that carries the number of the instance, from 0.",
        read: set!(instance_var, v => read_variable_name(v)?),
    },
    Key {
        name: "increment_var",
        aliases: &[],
        takes: "string",
        default: "none",
        example: "\"PORT\"",
        meaning: "A variable that counts up per instance, from its value in `env` or 0.",
        read: set!(increment_var, v => v.at(read_variable_name(v)?)),
    },
    Key {
        name: "port",
        aliases: &[],
        takes: "number, 0 to 65535",
        default: "none",
        example: "3000",
        meaning: "Sets the variable PORT; pm opens nothing (see `listen`).",
        read: set!(port, v => u16::try_from(v.count(0..=65_535)?).map_err(|_| v.problem("this is no port"))?),
    },
    Key {
        name: "wait_ready",
        aliases: &[],
        takes: "boolean",
        default: "false",
        example: "true",
        meaning: "An instance is ready when it says so: process.send('ready'), READY=1 on NOTIFY_SOCKET, or a newline on PM_READY_FD.",
        read: set!(wait_ready, v => v.boolean()?),
    },
    Key {
        name: "listen_timeout",
        aliases: &[],
        takes: "duration, 1ms to 1d",
        default: "\"30s\"",
        example: "\"10s\"",
        meaning: "An instance that is not ready this long after its start has failed.",
        read: set!(listen_timeout, v => v.duration(Duration::from_millis(1)..=DAY)?),
    },
    Key {
        name: "kill_timeout",
        aliases: &[],
        takes: "duration, 0s to 1d",
        default: "\"10s\"",
        example: "\"3s\"",
        meaning: "From the kill signal to SIGKILL.",
        read: set!(kill_timeout, v => v.at(v.duration(Duration::ZERO..=DAY)?)),
    },
    Key {
        name: "kill_signal",
        aliases: &[],
        takes: "signal by name or number",
        default: "\"SIGINT\"",
        example: "\"SIGTERM\"",
        meaning: "The signal that asks an instance to end.",
        read: set!(kill_signal, v => read_signal(v)?),
    },
    Key {
        name: "kill_mode",
        aliases: &[],
        takes: "\"target\", \"group\" or \"main\"",
        default: "\"target\"",
        example: "\"group\"",
        meaning: "Who gets the signal: the app behind shells and package runners, every process at once, or the main process.",
        read: set!(kill_mode, v => v.one_of(KillMode::NAMES)?),
    },
    Key {
        name: "stop_method",
        aliases: &[],
        takes: "\"signal\" or \"disconnect\"",
        default: "\"signal\"",
        example: "\"disconnect\"",
        meaning: "What ends a Node worker that does not say whether it handles the signal: the signal, or cluster disconnect first.",
        read: set!(stop_method, v => v.one_of(StopMethod::NAMES)?),
    },
    Key {
        name: "shutdown_with_message",
        aliases: &[],
        takes: "boolean",
        default: "false",
        example: "true",
        meaning: "Send the IPC message \"shutdown\" instead of a signal.",
        read: set!(shutdown_with_message, v => v.at(v.boolean()?)),
    },
    Key {
        name: "drain_timeout",
        aliases: &[],
        takes: "duration, at most `kill_timeout`",
        default: "the server's keepAliveTimeout + 1s",
        example: "\"5s\"",
        meaning: "How long open connections may finish before the signal.",
        read: set!(drain_timeout, v => v.at(v.duration(Duration::ZERO..=DAY)?)),
    },
    Key {
        name: "agent",
        aliases: &[],
        takes: "boolean",
        default: "true",
        example: "false",
        meaning: "Preload the agent that lets a Node app drain its connections; false weakens what a reload promises.",
        read: set!(agent, v => v.boolean()?),
    },
    Key {
        name: "drain_websockets",
        aliases: &[],
        takes: "boolean",
        default: "false",
        example: "true",
        meaning: "Send websocket clients a close frame (1001, going away) when a drain begins; false leaves them until `kill_timeout`.",
        read: set!(drain_websockets, v => v.boolean()?),
    },
    Key {
        name: "strategy",
        aliases: &[],
        takes: "\"rolling\" or \"blue-green\"",
        default: "\"rolling\"",
        example: "\"blue-green\"",
        meaning: "How a reload proceeds: one slot after the other, or all new instances beside the old ones and then over at once.",
        read: set!(strategy, v => v.one_of(Strategy::NAMES)?),
    },
    Key {
        name: "max_surge",
        aliases: &[],
        takes: "number, 0 to 10000, or percentage",
        default: "1",
        example: "\"50%\"",
        meaning: "How many instances beyond `instances` a reload may have launching or ready at once; parts of one count as one.",
        read: set!(max_surge, v => v.at(read_share(v)?)),
    },
    Key {
        name: "max_unavailable",
        aliases: &[],
        takes: "number, 0 to 10000, or percentage",
        default: "0",
        example: "1",
        meaning: "How many instances may be missing during a reload; parts of one do not count.",
        read: set!(max_unavailable, v => v.at(read_share(v)?)),
    },
    Key {
        name: "max_draining",
        aliases: &[],
        takes: "number, 1 to 10000",
        default: "`instances`",
        example: "2",
        meaning: "How many old instances may be finishing their work at once; a reload waits before it makes more.",
        read: set!(max_draining, v => v.count(1..=INSTANCES_MAX)?),
    },
    Key {
        name: "min_healthy",
        aliases: &[],
        takes: "duration, 0s to 1d",
        default: "\"0s\"",
        example: "\"5s\"",
        meaning: "How long a new instance has to live after it became ready before a reload takes the old one away.",
        read: set!(min_healthy, v => v.duration(Duration::ZERO..=DAY)?),
    },
    Key {
        name: "on_failure",
        aliases: &[],
        takes: "\"rollback\" or \"abort\"",
        default: "\"rollback\"",
        example: "\"abort\"",
        meaning: "What a failed reload leaves: the old instances everywhere, or finished slots new and the others old.",
        read: set!(on_failure, v => v.one_of(OnFailure::NAMES)?),
    },
    Key {
        name: "reserve",
        aliases: &[],
        takes: "boolean",
        default: "true",
        example: "false",
        meaning: "For rollback: keep the old instances of finished slots alive until the last slot is ready; false starts them again from the files as they are then.",
        read: set!(reserve, v => v.boolean()?),
    },
    Key {
        name: "overlap",
        aliases: &[],
        takes: "boolean",
        default: "true in cluster mode and with `listen`, else false",
        example: "true",
        meaning: "Whether a reload starts the new instance beside the old one.",
        read: set!(overlap, v => v.boolean()?),
    },
    Key {
        name: "ready",
        aliases: &[],
        takes: "table `{ http | tcp | exec | log, interval, timeout, threshold }`",
        default: "none",
        example: "{ http = \"http://127.0.0.1:{PORT}/ready\" }",
        meaning: "An instance is ready when this probe succeeds.",
        read: set!(ready, v => v.at(probe::read(v, probe::Role::Ready)?)),
    },
    Key {
        name: "health",
        aliases: &[],
        takes: "table `{ http | tcp | exec, interval, timeout, threshold, start_period }`",
        default: "none",
        example: "{ tcp = \"127.0.0.1:{PORT}\" }",
        meaning: "An instance whose probe fails `threshold` times in a row is replaced, one at a time.",
        read: set!(health, v => v.at(probe::read(v, probe::Role::Health)?)),
    },
    Key {
        name: "pre_start",
        aliases: &[],
        takes: "program with arguments, or table `{ run, timeout }`",
        default: "none",
        example: "[\"./migrate\", \"--check\"]",
        meaning: "Run before the app is started; when it fails, so does the start.",
        read: set!(pre_start, v => read_hook(v)?),
    },
    Key {
        name: "pre_reload",
        aliases: &[],
        takes: "program with arguments, or table `{ run, timeout }`",
        default: "none",
        example: "{ run = [\"npm\", \"run\", \"build\"], timeout = \"5m\" }",
        meaning: "Run before the first step of a reload; when it fails, the reload is aborted.",
        read: set!(pre_reload, v => read_hook(v)?),
    },
    Key {
        name: "post_stop",
        aliases: &[],
        takes: "program with arguments, or table `{ run, timeout }`",
        default: "none",
        example: "\"./cleanup\"",
        meaning: "Run when the app has been stopped and its last process is gone.",
        read: set!(post_stop, v => read_hook(v)?),
    },
    Key {
        name: "on_errored",
        aliases: &[],
        takes: "program with arguments, or table `{ run, timeout }`",
        default: "none",
        example: "\"./page-somebody\"",
        meaning: "Run when the app has become `errored`: pm has given up starting it.",
        read: set!(on_errored, v => read_hook(v)?),
    },
    Key {
        name: "user",
        aliases: &["uid"],
        takes: "name or number",
        default: "who runs the daemon",
        example: "\"www-data\"",
        meaning: "Who the processes run as, with the groups of `id USER` and that user's HOME, USER, LOGNAME and SHELL; needs a daemon of root.",
        read: set!(user, v => v.at(process::read_account(v)?)),
    },
    Key {
        name: "group",
        aliases: &["gid"],
        takes: "name or number",
        default: "the user's",
        example: "\"www-data\"",
        meaning: "The primary group.",
        read: set!(group, v => v.at(process::read_account(v)?)),
    },
    Key {
        name: "limits",
        aliases: &[],
        takes: "table; see below",
        default: "{}",
        example: "{ memory_max = \"300M\", nofile = 4096 }",
        meaning: "What an instance may use: memory, CPU and processes of all of it together (control groups), and what each process may (docs/limits.md).",
        read: set!(limits, v => process::read_limits(v)?),
    },
    Key {
        name: "nice",
        aliases: &[],
        takes: "number, -20 to 19",
        default: "as the daemon was started",
        example: "10",
        meaning: "Order at the CPU: 19 comes last; below 0 needs a daemon of root.",
        read: set!(nice, v => i32::try_from(v.integer(-20..=19)?).map_err(|_| v.problem("this is out of range"))?),
    },
    Key {
        name: "ionice",
        aliases: &[],
        takes: "\"idle\", \"best-effort:0\" to \"best-effort:7\", \"realtime:0\" to \"realtime:7\"",
        default: "by `nice`",
        example: "\"best-effort:6\"",
        meaning: "Order at the disk: 0 comes first, idle last.",
        read: set!(ionice, v => process::read_io_priority(v)?),
    },
    Key {
        name: "cpu_affinity",
        aliases: &[],
        takes: "CPUs: \"0-3,6\", 0 or [0, 2]",
        default: "as the daemon was started",
        example: "\"0\"",
        meaning: "The CPUs that the processes may run on.",
        read: set!(cpu_affinity, v => process::read_cpus(v)?),
    },
    Key {
        name: "umask",
        aliases: &[],
        takes: "octal digits in quotes",
        default: "as the daemon was started",
        example: "\"0027\"",
        meaning: "What is taken away from the mode of files that the app creates.",
        read: set!(umask, v => process::read_umask(v)?),
    },
    Key {
        name: "no_new_privs",
        aliases: &[],
        takes: "boolean",
        default: "false",
        example: "true",
        meaning: "No program that the app starts gains rights: sudo and other set-user-ID programs do nothing for it.",
        read: set!(no_new_privs, v => v.boolean()?),
    },
    Key {
        name: "ambient_capabilities",
        aliases: &[],
        takes: "array of names (capabilities(7)), with or without CAP_",
        default: "[]",
        example: "[\"net_bind_service\"]",
        meaning: "Rights of root that the app has as another user: net_bind_service is for ports below 1024.",
        read: set!(ambient_capabilities, v => process::read_capabilities(v)?),
    },
    Key {
        name: "depends_on",
        aliases: &[],
        takes: "array of names, or table `{ NAME = \"ready\" | \"started\" }`",
        default: "[]",
        example: "{ db = \"ready\" }",
        meaning: "Apps that have to be up before this one starts; they are stopped after it.",
        read: |app, v| {
            app.depends_on = read_dependencies(v)?;
            Ok(())
        },
    },
    Key {
        name: "autorestart",
        aliases: &[],
        takes: "boolean",
        default: "true",
        example: "false",
        meaning: "Start again after an exit nobody asked for; false: the app is stopped then.",
        read: set!(autorestart, v => v.boolean()?),
    },
    Key {
        name: "autostart",
        aliases: &[],
        takes: "boolean",
        default: "true",
        example: "false",
        meaning: "Start with the file and at boot; false: listed as stopped until started by name.",
        read: set!(autostart, v => v.boolean()?),
    },
    Key {
        name: "max_restarts",
        aliases: &[],
        takes: "number, 1 to 1000000",
        default: "16",
        example: "5",
        meaning: "Give up (`errored`) after this many exits in a row that each came before `min_uptime`.",
        read: set!(max_restarts, v => {
            let help = "set `autorestart = false` for an app that is never started again";
            v.count(1..=1_000_000).map_err(|problem| problem.help(help))?
        }),
    },
    Key {
        name: "max_memory_restart",
        aliases: &["max_memory"],
        takes: "size, 1M or more; 0: none",
        default: "none",
        example: "\"300M\"",
        meaning: "An instance whose processes together use more memory than this is replaced, one at a time (docs/memory.md).",
        read: set!(max_memory_restart, v => v.at(process::read_size(v)?)),
    },
    Key {
        name: "min_uptime",
        aliases: &[],
        takes: "duration, 0s to 1d",
        default: "\"1s\"",
        example: "\"5s\"",
        meaning: "A run that lasts this long was no failed start.",
        read: set!(min_uptime, v => v.duration(Duration::ZERO..=DAY)?),
    },
    Key {
        name: "restart_delay",
        aliases: &[],
        takes: "duration, 0s to 1d",
        default: "0",
        example: "\"2s\"",
        meaning: "A fixed delay before every restart, in place of the growing one; 0: none.",
        read: set!(restart_delay, v => v.duration(Duration::ZERO..=DAY)?),
    },
    Key {
        name: "exp_backoff_restart_delay",
        aliases: &[],
        takes: "duration, 0s to 15s",
        default: "\"100ms\"",
        example: "\"200ms\"",
        meaning: "The first step of the growing delay between restarts (× 1.5 each, up to 15 s); 0: the default.",
        read: set!(exp_backoff_restart_delay, v => v.duration(Duration::ZERO..=BACKOFF_MAX)?),
    },
    Key {
        name: "backoff_reset",
        aliases: &[],
        takes: "duration, 0s to 1d",
        default: "\"30s\"",
        example: "\"1m\"",
        meaning: "A run that lasts this long makes the next restart immediate again.",
        read: set!(backoff_reset, v => v.duration(Duration::ZERO..=DAY)?),
    },
    Key {
        name: "stop_exit_codes",
        aliases: &[],
        takes: "number or array of numbers, 0 to 255",
        default: "[]",
        example: "[0]",
        meaning: "Exit codes after which the app is stopped and not started again; never match a signal.",
        read: set!(stop_exit_codes, v => {
            let code = |v: Value<'_, '_>| {
                let code = v.integer(0..=255)?;
                i32::try_from(code).map_err(|_| v.problem("this is no exit code"))
            };
            v.items().into_iter().map(code).collect::<Result<_, _>>()?
        }),
    },
    Key {
        name: "out_file",
        aliases: &["out", "output", "out_log"],
        takes: "path",
        default: "<home>/logs/<name>-out.log",
        example: "\"logs/out.log\"",
        meaning: "Where standard output goes; \"/dev/null\" discards it.",
        read: set!(out_file, v => v.at(v.filled()?)),
    },
    Key {
        name: "error_file",
        aliases: &["error", "err", "err_file", "err_log"],
        takes: "path",
        default: "<home>/logs/<name>-error.log",
        example: "\"logs/error.log\"",
        meaning: "Where standard error goes; \"/dev/null\" discards it.",
        read: set!(error_file, v => v.at(v.filled()?)),
    },
    Key {
        name: "merge_logs",
        aliases: &["combine_logs"],
        takes: "boolean",
        default: "true for a single instance in fork mode, else false",
        example: "true",
        meaning: "One pair of log files for all instances, without `-<id>` in the names.",
        read: set!(merge_logs, v => v.boolean()?),
    },
    Key {
        name: "time",
        aliases: &[],
        takes: "boolean",
        default: "false",
        example: "true",
        meaning: "Begin every log line with the time, as YYYY-MM-DDTHH:mm:ss.",
        read: set!(time, v => v.boolean()?),
    },
    Key {
        name: "log_date_format",
        aliases: &[],
        takes: "string",
        default: "none",
        example: "\"YYYY-MM-DD HH:mm:ss.SSS Z\"",
        meaning: "Begin every log line with the time in this form (the letters of dayjs); wins over `time`.",
        read: set!(log_date_format, v => v.string()?),
    },
    Key {
        name: "log_overflow",
        aliases: &[],
        takes: "\"drop\" or \"block\"",
        default: "\"drop\"",
        example: "\"block\"",
        meaning: "When the disk of a log file is full, or slower than what is written: lose lines, which are counted and \
                  said so in the log and in `pm describe`, or let the app wait.",
        read: set!(log_overflow, v => v.one_of(Overflow::NAMES)?),
    },
    Key {
        name: "stdin",
        aliases: &[],
        takes: "\"pipe\" or \"null\"",
        default: "\"pipe\"",
        example: "\"null\"",
        meaning: "What an instance reads: an open pipe on which nothing arrives, or /dev/null.",
        read: set!(stdin, v => v.one_of(Stdin::NAMES)?),
    },
    Key {
        name: "env_NAME",
        aliases: &[],
        takes: "table",
        default: "{}",
        example: "{ NODE_ENV = \"production\" }",
        meaning: "Variables laid over `env` when the file is started with `--env NAME`.",
        // Its name is open, so it is read by `read_key`, before the table is asked.
        read: |_, v| Err(v.problem("`env_NAME` stands for names such as `env_production`")),
    },
];

/// The key of this spelling: its name, an alias, or the camelCase form of either.
#[must_use]
pub fn find(spelling: &str) -> Option<&'static Key> {
    let snake = snake_case(spelling);
    KEYS.iter()
        .filter(|key| key.name != "env_NAME")
        .find(|key| key.name == snake || key.aliases.contains(&snake.as_str()))
}

/// Reads one key of an app; returns the name under which it counts, so that the caller sees two spellings of one key.
pub(super) fn read_key(
    app: &mut AppConfig,
    spelling: At<&str>,
    value: Value<'_, '_>,
) -> Result<String, Problem> {
    let At { value: text, place } = spelling;
    if let Some(key) = find(text) {
        (key.read)(app, value)?;
        return Ok(key.name.to_owned());
    }
    if let Some(section) = text.strip_prefix("env_").filter(|section| !section.is_empty())
        && value.table().is_some()
    {
        app.env_sections.insert(section.to_owned(), read_variables(value)?);
        return Ok(text.to_owned());
    }
    Err(unknown::problem(text, place))
}

/// `killTimeout` → `kill_timeout`; what has no capitals within stays as it is.
pub(super) fn snake_case(text: &str) -> String {
    let mut snake = String::with_capacity(text.len() + 4);
    let mut before = None;
    for c in text.chars() {
        if c.is_ascii_uppercase() && before.is_some_and(|b: char| b.is_ascii_lowercase()) {
            snake.push('_');
            snake.push(c.to_ascii_lowercase());
        } else {
            snake.push(c);
        }
        before = Some(c);
    }
    snake
}

fn read_instances(value: Value<'_, '_>) -> Result<Instances, Problem> {
    let bad = |error: super::app::BadInstances| value.problem(error.to_string());
    if value.as_str().is_some() || value.is_integer() {
        value.text().parse().map_err(bad)
    } else {
        Err(bad(super::app::BadInstances))
    }
}

fn read_share(value: Value<'_, '_>) -> Result<Share, Problem> {
    if value.as_str().is_none() {
        return value.count(0..=INSTANCES_MAX).map(Share::Count);
    }
    match value.text().parse() {
        Ok(Share::Count(_)) => value.count(0..=INSTANCES_MAX).map(Share::Count),
        Ok(share) => Ok(share),
        Err(error) => Err(value.problem(error.to_string())),
    }
}

fn read_hook(value: Value<'_, '_>) -> Result<Hook, Problem> {
    let argv = |value: Value<'_, '_>| match value.words()? {
        argv if argv.first().is_none_or(String::is_empty) => {
            Err(value.problem("a hook needs a program to run"))
        }
        argv => Ok(argv),
    };
    let Some(table) = value.table() else {
        return Ok(Hook { argv: argv(value)?, timeout: HOOK_TIMEOUT });
    };
    let (mut run, mut timeout) = (None, HOOK_TIMEOUT);
    for (key, entry) in table {
        let entry = Value::new(entry);
        match &**key.get_ref() {
            "run" => run = Some(argv(entry)?),
            "timeout" => timeout = entry.duration(Duration::from_millis(1)..=DAY)?,
            other => {
                let message = format!("unknown key {} of a hook; known are run, timeout", quoted(other));
                return Err(
                    Problem::new(Place::Text(key.span()), message).did_you_mean(other, ["run", "timeout"])
                );
            }
        }
    }
    let argv = run.ok_or_else(|| value.problem("a hook needs `run`: the program and its arguments"))?;
    Ok(Hook { argv, timeout })
}

fn read_dependencies(value: Value<'_, '_>) -> Result<BTreeMap<String, At<Dependency>>, Problem> {
    let Some(table) = value.table() else {
        let ready = |entry: Value<'_, '_>| Ok((entry.filled()?, entry.at(Dependency::Ready)));
        return value.items().into_iter().map(ready).collect();
    };
    let one = |(key, entry): (&toml::Spanned<std::borrow::Cow<'_, str>>, _)| {
        let how_far = Value::new(entry).one_of(Dependency::NAMES)?;
        Ok(((**key.get_ref()).to_owned(), At::new(how_far, Place::Text(key.span()))))
    };
    table.iter().map(one).collect()
}

fn read_signal(value: Value<'_, '_>) -> Result<Signal, Problem> {
    let text = if value.is_integer() { value.text() } else { value.string()? };
    if let Some(signal) = Signal::from_name(&text) {
        return Ok(signal);
    }
    let problem = value.problem(format!(
        "{} is no signal; use a name such as \"SIGTERM\" or a number from 1 to 64",
        quoted(&text)
    ));
    let names: Vec<String> = (1..=31).filter_map(Signal::from_number).map(|s| s.to_string()).collect();
    let upper = text.to_uppercase();
    let full = if upper.starts_with("SIG") { upper } else { format!("SIG{upper}") };
    Err(problem.did_you_mean(&full, names.iter().map(String::as_str)))
}

fn read_variable_name(value: Value<'_, '_>) -> Result<String, Problem> {
    let name = value.filled()?;
    if name.contains('=') { Err(value.problem("a variable's name has no `=`")) } else { Ok(name) }
}

fn read_variables(value: Value<'_, '_>) -> Result<Variables, Problem> {
    let Some(table) = value.table() else {
        return Err(value.problem("expected a table of variables").help(
            "write `[apps.env]` with `NAME = \"value\"` lines below it, or `env = { NAME = \"value\" }`",
        ));
    };
    let mut variables = Variables::new();
    for (key, entry) in table {
        let name = &**key.get_ref();
        if name.is_empty() || name.contains(['=', '\0']) {
            return Err(Problem::new(
                Place::Text(key.span()),
                format!("{} cannot be the name of a variable", quoted(name)),
            ));
        }
        let text = Value::new(entry).text();
        if text.contains('\0') {
            return Err(Value::new(entry).problem("a variable cannot contain a NUL character"));
        }
        variables.insert(name.to_owned(), text);
    }
    Ok(variables)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_leads_to_its_key() {
        for (spelling, name) in [
            ("script", "script"),
            ("cmd", "script"),
            ("killTimeout", "kill_timeout"),
            ("interpreterArgs", "interpreter_args"),
            ("nodeArgs", "interpreter_args"),
            ("execMode", "exec_mode"),
            ("execInterpreter", "interpreter"),
            ("errorFile", "error_file"),
            ("expBackoffRestartDelay", "exp_backoff_restart_delay"),
        ] {
            assert_eq!(find(spelling).map(|key| key.name), Some(name), "{spelling}");
        }
        assert!(find("env_NAME").is_none() && find("Script").is_none() && find("kill-timeout").is_none());
    }

    #[test]
    fn no_spelling_is_used_twice() {
        let mut seen = std::collections::BTreeSet::new();
        for key in &KEYS {
            for spelling in std::iter::once(&key.name).chain(key.aliases) {
                assert!(seen.insert(*spelling), "{spelling}");
                assert!(!unknown::is_foreign(spelling), "{spelling}");
            }
        }
    }

    #[test]
    fn every_example_and_literal_default_reads() {
        for key in KEYS.iter().filter(|key| key.name != "env_NAME") {
            let mut texts = vec![key.example];
            // Defaults that are words ("none", "2 × CPUs") are for people.
            texts.extend(toml::de::DeValue::parse(key.default).is_ok().then_some(key.default));
            for text in texts {
                let value = toml::de::DeValue::parse(text).unwrap();
                let mut app = AppConfig::new(Place::CommandLine);
                let read = (key.read)(&mut app, Value::new(&value));
                assert!(read.is_ok(), "{} = {text}: {read:?}", key.name);
            }
        }
    }
}
