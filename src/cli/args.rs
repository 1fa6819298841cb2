//! What can be typed: commands, options and their help.
//!
//! PM2's verbs and options keep their spellings. Values that the config file also knows (durations, sizes, numbers of
//! instances) stay text here; the config layer reads both with the same rules and words its errors.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand};

use super::serve::ServeOptions;

/// What the verbs do to a running app, in one table: the question people ask most often about process managers.
const VERBS: &str = "\
What happens to an app that is online:
  command           new process   new code   new config    downtime
  start FILE        if changed    yes        yes           none *
  reload NAME       yes           yes        no            none *
  reload FILE       yes           yes        yes           none *
  apply FILE        if needed     yes        yes           none *
  restart NAME      yes           yes        no            yes
  stop              ends          -          -             yes
  scale             added only    yes        no            none
  * cluster mode and `listen`; others are restarted in place, and the command says so.
  --update-env makes restart and reload take the environment of your shell.

Exit codes: 0 done or already so, 1 failed, 2 wrong usage or config, 3 no such app,
4 daemon not reachable or not answering, 5 busy, 6 `apply --check` found changes, 70 internal error.";

/// What only `run` does.
const RUN: &str = "\
Output of the apps goes to standard output and standard error, a line at a time with the app's
name before it; with --json one object per line (time, app, instance, stream, line), with --raw as
the apps wrote it. No file is written; `pm list`, `pm reload` and the like work beside it.

SIGTERM, SIGINT, SIGQUIT: every app finishes what it has, within its kill_timeout; once more: SIGKILL.
SIGHUP: the config file is read again and its apps are reloaded.

Ends when every app has come to its end, with the exit code of the first one that failed (128 + n
for signal n, 127 when it could not be started); 0 after a signal, 137 when something had to be killed.";

/// Keeps apps up and ships new versions without losing a request.
#[derive(Debug, Parser)]
#[command(
    name = "pm",
    bin_name = "pm",
    version,
    disable_version_flag = true,
    arg_required_else_help = true,
    subcommand_required = true,
    after_help = VERBS,
    max_term_width = 100
)]
pub struct Cli {
    /// Options of every command.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Print the version
    #[arg(short = 'v', short_alias = 'V', long, action = ArgAction::Version)]
    version: Option<bool>,
}

/// Options of every command.
#[derive(Debug, Args)]
pub struct Global {
    /// Use the daemon of this directory [default: $PM_HOME, /var/lib/pm for root, else ~/.pm]
    #[arg(long, global = true, value_name = "DIR", help_heading = "Global options")]
    pub home: Option<PathBuf>,
    /// Print no colors [default: colors on a terminal, unless NO_COLOR is set]
    #[arg(long, global = true, help_heading = "Global options")]
    pub no_color: bool,
    /// Print neither tables nor progress nor messages; errors and what a script asked for remain
    #[arg(short, long, global = true, help_heading = "Global options")]
    pub silent: bool,
    /// Print JSON for programs
    #[arg(long, global = true, help_heading = "Global options")]
    pub json: bool,
    /// Show values of the environment [default: masked, unless PM_SHOW_ENV=1]
    #[arg(long, global = true, help_heading = "Global options")]
    pub show_env: bool,
}

/// A command.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start apps: a config file, a script, a binary, or what is stopped
    Start(Box<Start>),
    /// Run apps in the foreground until they end: the first process of a container
    #[command(after_help = RUN)]
    Run(Box<Run>),
    /// Stop apps; they stay in the list
    #[command(arg_required_else_help = true)]
    Stop(Act),
    /// Restart all instances of apps at once (this means downtime; `reload` does without)
    #[command(alias = "startOrRestart", arg_required_else_help = true)]
    Restart(ActFile),
    /// Replace instances one by one, without losing a request
    #[command(aliases = ["startOrReload", "startOrGracefulReload"], arg_required_else_help = true)]
    Reload(Reload),
    /// Make apps what a config file says: shows what changes, then changes that and nothing else
    Apply(Apply),
    /// Stop apps and forget them
    #[command(visible_alias = "del", arg_required_else_help = true)]
    Delete(Act),
    /// Show the table
    #[command(visible_aliases = ["ls", "ps", "status"], alias = "l")]
    List(List),
    /// Print the list as JSON, in PM2's form
    Jlist(Jlist),
    /// Print the list in PM2's form, as Node prints objects
    Prettylist(Jlist),
    /// Show everything known about apps
    #[command(visible_aliases = ["desc", "show", "info"], arg_required_else_help = true)]
    Describe(Describe),
    /// Show the logs of apps and follow them
    #[command(alias = "log")]
    Logs(Logs),
    /// Show what has happened to apps: starts, exits, reloads step by step
    Events(Events),
    /// Change the number of instances of an app
    #[command(arg_required_else_help = true)]
    Scale(Scale),
    /// Print the environment of an instance, secrets included
    #[command(arg_required_else_help = true)]
    Env(Env),
    /// Print the ids of an app, as a JavaScript array
    #[command(arg_required_else_help = true)]
    Id(OneTarget),
    /// Print process ids, one per line
    Pid(OptionalTarget),
    /// Set restart counters to zero
    #[command(arg_required_else_help = true)]
    Reset(Targets),
    /// Save the list for `pm resurrect`
    #[command(alias = "dump")]
    Save,
    /// Start what the saved list says
    Resurrect(Waiting),
    /// Save the list, stop everything, end the daemon
    Kill,
    /// Say whether the daemon answers
    Ping,
    /// Let systemd start pm and its apps at boot
    Startup(Startup),
    /// Undo `pm startup`; what runs goes on
    Unstartup(UnitOptions),
    /// What a systemd unit runs when it stops
    #[command(hide = true)]
    Unit(UnitHook),
    /// Replace the running daemon by another version of pm; what runs goes on
    Upgrade(Upgrade),
    /// Run the daemon in the foreground, as systemd wants it
    Daemon(Daemon),
    /// Serve the files of a directory over HTTP
    #[command(alias = "expose")]
    Serve(ServeOptions),
    /// Write an ecosystem.toml to start from
    #[command(visible_alias = "ecosystem")]
    Init(Init),
    /// Check a config file and show what it would start
    Check(Check),
    /// The logic behind the daemon; the daemon starts it
    #[command(hide = true)]
    Supervisor(Supervisor),
}

/// `pm start`.
#[derive(Debug, Args)]
pub struct Start {
    /// Config files, scripts, commands; or names, ids, namespaces, /regex/ and `all` of what exists
    /// [default: ecosystem.toml]
    pub targets: Vec<String>,
    /// How the app is to run.
    #[command(flatten)]
    pub app: AppOptions,
    /// What to take from config files.
    #[command(flatten)]
    pub file: FileOptions,
    /// Take the environment of this shell also for apps that exist
    #[arg(short = 'a', long)]
    pub update_env: bool,
    /// Whether to wait.
    #[command(flatten)]
    pub waiting: Waiting,
    /// Arguments of the app
    #[arg(last = true, value_name = "APP ARGS")]
    pub args: Vec<String>,
}

/// `pm run`.
#[derive(Debug, Args)]
pub struct Run {
    /// The config file, script or command [default: ecosystem.toml]
    pub target: Option<String>,
    /// How the app is to run.
    #[command(flatten)]
    pub app: AppOptions,
    /// What to take from the config file.
    #[command(flatten)]
    pub file: FileOptions,
    /// Print what apps write as it is [default: lines with the app's name before them]
    #[arg(long, conflicts_with = "json")]
    pub raw: bool,
    /// Arguments of the app
    #[arg(last = true, value_name = "APP ARGS")]
    pub args: Vec<String>,
}

/// What to take from a config file.
#[derive(Clone, Debug, Default, Args)]
pub struct FileOptions {
    /// Act on these apps of the config file only (comma or space separated)
    #[arg(long, value_name = "NAMES")]
    pub only: Option<String>,
    /// Add the variables of [apps.env_NAME]
    #[arg(long, value_name = "NAME")]
    pub env: Option<String>,
}

/// Whether a command waits.
#[derive(Clone, Copy, Debug, Default, Args)]
pub struct Waiting {
    /// Return when the daemon has accepted it [default: when it is done]
    #[arg(long)]
    pub no_wait: bool,
}

/// How an app is to run, from the command line. Laid over what a config file says.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "App options")]
pub struct AppOptions {
    /// Name the app [default: the script's name without its extension]
    #[arg(short, long, allow_hyphen_values = true)]
    pub name: Option<String>,
    /// Run this many instances: a number, `max` or 0 for all CPUs, -1 for all but one [default: 1]
    #[arg(short, long, value_name = "N", allow_hyphen_values = true)]
    pub instances: Option<String>,
    /// Put the app into this group [default: default]
    #[arg(long, value_name = "GROUP")]
    pub namespace: Option<String>,
    /// Run in this directory [default: the current one]
    #[arg(long, value_name = "DIR")]
    pub cwd: Option<String>,
    /// Run as this user, with the groups of `id USER` (daemons of root only) [default: who runs the daemon]
    #[arg(long, visible_alias = "uid", value_name = "USER")]
    pub user: Option<String>,
    /// Run with this primary group [default: the user's]
    #[arg(long, visible_alias = "gid", value_name = "GROUP")]
    pub group: Option<String>,
    /// Run the script with this program; `none` executes it [default: by its extension]
    #[arg(long, value_name = "PROGRAM")]
    pub interpreter: Option<String>,
    /// Give these arguments to the interpreter
    #[arg(long, visible_alias = "node-args", value_name = "ARGS", allow_hyphen_values = true)]
    pub interpreter_args: Option<String>,
    /// Run in fork mode, whatever the number of instances
    #[arg(short = 'x', long)]
    pub execute_command: bool,
    /// Listen here and hand the socket to every instance: `3000`, `127.0.0.1:3000`, `unix:/run/app.sock`; repeatable
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Vec<String>,
    /// Balance connections: round-robin, least-connections, sticky, shared, slots or sticky-slots [default: round-robin]
    #[arg(long, value_name = "HOW")]
    pub balance: Option<String>,
    /// Write standard output to this file [default: $PM_HOME/logs/NAME-out.log]
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<String>,
    /// Write standard error to this file [default: $PM_HOME/logs/NAME-error.log]
    #[arg(short, long, value_name = "FILE")]
    pub error: Option<String>,
    /// Use one log file for all instances
    #[arg(long)]
    pub merge_logs: bool,
    /// Begin each log line with the time in this format
    #[arg(long, value_name = "FORMAT")]
    pub log_date_format: Option<String>,
    /// Begin each log line with the time, as YYYY-MM-DDTHH:mm:ss
    #[arg(long)]
    pub time: bool,
    /// Wait for the app to say that it is ready
    #[arg(long)]
    pub wait_ready: bool,
    /// Fail when an instance is not ready within this time: `10s`, or milliseconds [default: 30s]
    #[arg(long, value_name = "TIME")]
    pub listen_timeout: Option<String>,
    /// Kill an instance this long after its kill signal [default: 10s]
    #[arg(short, long, value_name = "TIME")]
    pub kill_timeout: Option<String>,
    /// End instances with the IPC message "shutdown" instead of a signal
    #[arg(long)]
    pub shutdown_with_message: bool,
    /// Wait this long before every restart [default: a growing backoff]
    #[arg(long, value_name = "TIME")]
    pub restart_delay: Option<String>,
    /// Begin the growing backoff with this delay [default: 100ms]
    #[arg(long, value_name = "TIME")]
    pub exp_backoff_restart_delay: Option<String>,
    /// Give up after this many quick exits in a row [default: 16]
    #[arg(long, value_name = "N")]
    pub max_restarts: Option<String>,
    /// Replace an instance that uses more memory than this, gracefully: `300M`, `1.5G`; 0: never
    #[arg(long, value_name = "SIZE")]
    pub max_memory_restart: Option<String>,
    /// Do not restart after these exit codes (comma or space separated)
    #[arg(long, value_name = "CODES")]
    pub stop_exit_codes: Vec<String>,
    /// Let a shell run the line: needed where it has a pipe, a variable, && and the like
    #[arg(long)]
    pub shell: bool,
    /// Do not restart the app when it exits
    #[arg(long)]
    pub no_autorestart: bool,
    /// Add the app to the list without starting it
    #[arg(long)]
    pub no_autostart: bool,
}

/// `stop`, `delete`.
#[derive(Debug, Args)]
pub struct Act {
    /// Names, ids, namespaces, /regex/, `all`, or config files
    #[arg(required = true)]
    pub targets: Vec<String>,
    /// Act on these apps of the config file only (comma or space separated)
    #[arg(long, value_name = "NAMES")]
    pub only: Option<String>,
    /// Whether to wait.
    #[command(flatten)]
    pub waiting: Waiting,
}

/// `restart`, `reload`.
#[derive(Debug, Args)]
pub struct ActFile {
    /// Names, ids, namespaces, /regex/, `all`; or config files, to take what they say now
    #[arg(required = true)]
    pub targets: Vec<String>,
    /// What to take from config files.
    #[command(flatten)]
    pub file: FileOptions,
    /// Take the environment of this shell
    #[arg(short = 'a', long)]
    pub update_env: bool,
    /// Whether to wait.
    #[command(flatten)]
    pub waiting: Waiting,
}

/// `env`.
#[derive(Debug, Args)]
pub struct Env {
    /// A name or an id
    pub target: String,
    /// Show what the next start would change in it: env files are read anew, and the config file is compared
    #[arg(long)]
    pub diff: bool,
}

/// `apply`.
#[derive(Debug, Args)]
pub struct Apply {
    /// The config file
    #[arg(default_value = "ecosystem.toml")]
    pub file: String,
    /// Remove apps that came from this file and are not in it any more
    #[arg(long, conflicts_with = "only")]
    pub prune: bool,
    /// Show what would change, change nothing, and exit with 6 if anything would
    #[arg(long)]
    pub check: bool,
    /// Show what would change and change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// What to take from it.
    #[command(flatten)]
    pub options: FileOptions,
    /// Whether to wait.
    #[command(flatten)]
    pub waiting: Waiting,
}

/// `reload`.
#[derive(Debug, Args)]
pub struct Reload {
    /// What, and from which file.
    #[command(flatten)]
    pub act: ActFile,
    /// Print what would happen to which instance in which order, and do nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// `list`.
#[derive(Debug, Args)]
pub struct List {
    /// Names, ids, namespaces, /regex/ [default: all]
    pub targets: Vec<String>,
    /// Show every column, also where the terminal is narrow
    #[arg(short, long)]
    pub wide: bool,
}

/// `jlist`, `prettylist`.
#[derive(Debug, Args)]
pub struct Jlist {
    /// Names, ids, namespaces, /regex/ [default: all]
    pub targets: Vec<String>,
}

/// `describe`.
#[derive(Debug, Args)]
pub struct Describe {
    /// Names, ids, namespaces, /regex/, `all`
    #[arg(required = true)]
    pub targets: Vec<String>,
}

/// `logs`.
#[derive(Debug, Args)]
pub struct Logs {
    /// Names, ids, namespaces, /regex/ [default: all]
    pub targets: Vec<String>,
    /// Begin with the last N lines
    #[arg(short = 'n', long, value_name = "N", default_value_t = 15)]
    pub lines: usize,
    /// Print what is there and end [default: follow]
    #[arg(long)]
    pub nostream: bool,
    /// Follow (this is the default)
    #[arg(short, long, conflicts_with = "nostream")]
    pub follow: bool,
    /// Show standard error only
    #[arg(long, visible_alias = "error")]
    pub err: bool,
    /// Show standard output only
    #[arg(long, conflicts_with = "err")]
    pub out: bool,
    /// Print lines as the app wrote them
    #[arg(long)]
    pub raw: bool,
}

/// `events`.
#[derive(Debug, Args)]
pub struct Events {
    /// Names, ids, namespaces, /regex/ [default: all]
    pub targets: Vec<String>,
    /// Begin this long ago (`10m`, `1h 30m`) or at this time (`08:00`, `2026-11-21 08:00`) [default: with the oldest]
    #[arg(long, value_name = "WHEN")]
    pub since: Option<String>,
    /// Show the last N only
    #[arg(short = 'n', long, value_name = "N")]
    pub lines: Option<usize>,
    /// Go on with what happens next
    #[arg(short, long)]
    pub follow: bool,
}

/// `scale`.
#[derive(Debug, Args)]
pub struct Scale {
    /// The app's name, or an id of one of its instances
    pub target: String,
    /// To how many: `4`, two more: `+2`, one fewer: `-1`
    #[arg(allow_hyphen_values = true)]
    pub number: String,
    /// Whether to wait.
    #[command(flatten)]
    pub waiting: Waiting,
}

/// Commands on one thing.
#[derive(Debug, Args)]
pub struct OneTarget {
    /// A name or an id
    pub target: String,
}

/// Commands on one thing or everything.
#[derive(Debug, Args)]
pub struct OptionalTarget {
    /// A name or an id [default: the daemon itself]
    pub target: Option<String>,
}

/// Commands on several things.
#[derive(Debug, Args)]
pub struct Targets {
    /// Names, ids, namespaces, /regex/, `all`
    #[arg(required = true)]
    pub targets: Vec<String>,
}

/// `upgrade`.
#[derive(Debug, Args)]
pub struct Upgrade {
    /// The new program [default: the `pm` that this command is]
    pub program: Option<PathBuf>,
    /// Leave the keeper, the small process that is the parent of all apps, as it is
    #[arg(long)]
    pub supervisor_only: bool,
    /// Check the program against the running daemon, and change nothing
    #[arg(long)]
    pub check: bool,
}

/// `daemon`.
#[derive(Debug, Args)]
pub struct Daemon {
    /// Leave the session of the caller
    #[arg(long, hide = true)]
    pub detached: bool,
    /// Go on from what an older program left in this process
    #[arg(long, hide = true, value_name = "DESCRIPTOR")]
    pub resume: Option<i32>,
    /// Take over from the supervisor at the other end of this connection
    #[arg(long, hide = true, value_name = "DESCRIPTOR")]
    pub heir: Option<i32>,
    /// The lock of the home, held already
    #[arg(long, hide = true, value_name = "DESCRIPTOR")]
    pub lock: Option<i32>,
}

/// `startup`.
#[derive(Debug, Args)]
pub struct Startup {
    /// Which unit.
    #[command(flatten)]
    pub unit: UnitOptions,
    /// Print the unit and change nothing
    #[arg(long)]
    pub print: bool,
}

/// Which unit `startup` and `unstartup` are about.
#[derive(Debug, Args)]
pub struct UnitOptions {
    /// The service manager: systemd is set up; openrc, runit, launchd: print a recipe [default: systemd]
    pub platform: Option<String>,
    /// A service of your own (systemctl --user), which needs no root
    #[arg(long, conflicts_with = "run_as")]
    pub user: bool,
    /// A service of the machine that runs as this user [default: who asks]
    #[arg(short = 'u', long, value_name = "USER")]
    pub run_as: Option<String>,
    /// The name of the unit [default: pm; pm-USER for another user than root]
    #[arg(long, value_name = "NAME")]
    pub service_name: Option<String>,
}

/// `unit`.
#[derive(Debug, Args)]
pub struct UnitHook {
    /// When it is run
    pub moment: UnitMoment,
    /// The unit's full name
    pub unit: String,
    /// It is one of the user's own
    #[arg(long)]
    pub user: bool,
}

/// When a unit runs a hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum UnitMoment {
    /// ExecStop
    Stop,
    /// ExecStopPost
    Cleanup,
}

/// `init`.
#[derive(Debug, Args)]
pub struct Init {
    /// The file to write
    #[arg(default_value = "ecosystem.toml")]
    pub file: PathBuf,
}

/// `check`.
#[derive(Debug, Args)]
pub struct Check {
    /// The config file
    #[arg(default_value = "ecosystem.toml")]
    pub file: PathBuf,
    /// What to take from it.
    #[command(flatten)]
    pub options: FileOptions,
}

/// `supervisor`.
#[derive(Debug, Args)]
pub struct Supervisor {
    /// Passed on unread
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub args: Vec<OsString>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("pm").chain(line.split_whitespace()))
    }

    #[test]
    fn the_definition_holds_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn numbers_with_signs_are_values_and_not_options() {
        for (line, number) in [("scale app -1", "-1"), ("scale app +2", "+2"), ("scale app 0", "0")] {
            let Command::Scale(scale) = parse(line).unwrap().command else { panic!("{line}") };
            assert_eq!(scale.number, number);
        }
        for (line, number) in [
            ("start a.js -i -1", "-1"),
            ("start -i max a.js", "max"),
            ("start a.js -i0", "0"),
            ("start a.js --instances=-2", "-2"),
        ] {
            let Command::Start(start) = parse(line).unwrap().command else { panic!("{line}") };
            assert_eq!(
                (start.app.instances.as_deref(), start.targets),
                (Some(number), vec!["a.js".to_owned()])
            );
        }
    }

    #[test]
    fn everything_after_two_dashes_belongs_to_the_app() {
        let Command::Start(start) = parse("start a.js -x --home /h -- --name b -i 3 --").unwrap().command
        else {
            panic!()
        };
        assert_eq!(start.args, ["--name", "b", "-i", "3", "--"]);
        assert_eq!(start.app.name, None);
        assert!(start.app.execute_command);
    }

    #[test]
    fn pm2_spellings() {
        for line in [
            "ls",
            "l",
            "ps",
            "status",
            "list",
            "desc a",
            "show 0",
            "info a",
            "del all",
            "log",
            "log api --lines 5",
            "dump",
            "ecosystem",
            "expose",
            "serve . 9000",
            "pid",
            "pid api",
            "id api",
            "env 0",
            "reset all",
            "restart /api-.*/ --update-env",
            "reload all",
            "-s list",
            "list -s",
            "stop a b 3",
            "start",
            "start a.js --node-args --inspect",
            "start a.js -k 5000 --wait-ready --listen-timeout 3000",
            "start a.js --stop-exit-codes 0,2 --no-autorestart -o /dev/null -e /dev/null --merge-logs --time",
            "start a.js -n api --namespace web --cwd /srv --interpreter python3 --env production --only a,b -a",
            "logs --nostream --err --raw",
            "jlist",
            "prettylist",
            "ping",
            "kill",
            "save",
            "resurrect",
            "startup",
            "startup systemd -u ann",
            "unstartup systemd",
        ] {
            assert!(parse(line).is_ok(), "{line}: {}", parse(line).unwrap_err());
        }
    }

    #[test]
    fn wrong_usage_ends_with_2_and_says_what_was_meant() {
        for (line, expected) in [
            ("strat", "'start'"),
            ("relaod all", "'reload'"),
            ("start a.js --nmae x", "'--name'"),
            ("stop", "Usage"),
            ("logs --out --err", "cannot be used with"),
            ("", "Usage"),
        ] {
            let error = parse(line).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{line}");
            assert!(error.to_string().contains(expected), "{line}: {error}");
        }
        assert_eq!(parse("-v").unwrap_err().exit_code(), 0);
        assert_eq!(parse("start --help").unwrap_err().exit_code(), 0);
    }
}
