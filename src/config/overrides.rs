//! The command line: what it lays over a file, and apps that come from it alone.

use std::time::Duration;

use super::app::{AppConfig, Instances};
use super::error::{At, ConfigError, Place};
use super::listen::{ListenConfig, ListenText};
use super::resolve::{self, Context, Resolved};
use crate::model::signal::Signal;
use crate::model::spec::ExecMode;

/// What the command line sets. Each field is one option; `None` where it was not given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    /// `--name`
    pub name: Option<String>,
    /// `--namespace`
    pub namespace: Option<String>,
    /// `--only`: names of apps in a file, one each.
    pub only: Vec<String>,
    /// `-i`, `--instances`
    pub instances: Option<Instances>,
    /// `-x` is [`ExecMode::Fork`].
    pub exec_mode: Option<ExecMode>,
    /// `--cwd`
    pub cwd: Option<String>,
    /// `--user`, `--uid`
    pub user: Option<String>,
    /// `--group`, `--gid`
    pub group: Option<String>,
    /// `--interpreter`
    pub interpreter: Option<String>,
    /// `--interpreter-args`, `--node-args`, split into words.
    pub interpreter_args: Option<Vec<String>>,
    /// `--shell`
    pub shell: Option<bool>,
    /// What follows `--`.
    pub args: Option<Vec<String>>,
    /// `--listen`, each time it is given.
    pub listen: Vec<ListenText>,
    /// `--wait-ready`
    pub wait_ready: Option<bool>,
    /// `--listen-timeout`
    pub listen_timeout: Option<Duration>,
    /// `-k`, `--kill-timeout`
    pub kill_timeout: Option<Duration>,
    /// `--kill-signal`
    pub kill_signal: Option<Signal>,
    /// `--shutdown-with-message`
    pub shutdown_with_message: Option<bool>,
    /// `-o`, `--output`
    pub out_file: Option<String>,
    /// `-e`, `--error`
    pub error_file: Option<String>,
    /// `--merge-logs`
    pub merge_logs: Option<bool>,
    /// `--time`
    pub time: Option<bool>,
    /// `--log-date-format`
    pub log_date_format: Option<String>,
    /// `--max-restarts`
    pub max_restarts: Option<u32>,
    /// `--max-memory-restart`, in bytes; 0: none.
    pub max_memory_restart: Option<u64>,
    /// `--restart-delay`
    pub restart_delay: Option<Duration>,
    /// `--exp-backoff-restart-delay`
    pub exp_backoff_restart_delay: Option<Duration>,
    /// `--stop-exit-codes`
    pub stop_exit_codes: Option<Vec<i32>>,
    /// `--no-autorestart` is `false`.
    pub autorestart: Option<bool>,
    /// `--no-autostart` is `false`.
    pub autostart: Option<bool>,
}

impl Overrides {
    /// The app with the command line laid over it.
    #[must_use]
    pub fn over(&self, app: &AppConfig) -> AppConfig {
        let mut app = app.clone();
        lay_at(&mut app.name, self.name.as_ref(), "--name");
        lay_at(&mut app.namespace, self.namespace.as_ref(), "--namespace");
        lay_at(&mut app.instances, self.instances.as_ref(), "--instances");
        lay_at(&mut app.exec_mode, self.exec_mode.as_ref(), "--execute-command");
        lay_at(&mut app.cwd, self.cwd.as_ref(), "--cwd");
        lay_at(&mut app.user, self.user.as_ref(), "--user");
        lay_at(&mut app.group, self.group.as_ref(), "--group");
        lay_at(&mut app.interpreter, self.interpreter.as_ref(), "--interpreter");
        lay_at(&mut app.interpreter_args, self.interpreter_args.as_ref(), "--interpreter-args");
        lay_at(&mut app.args, self.args.as_ref(), "--");
        lay_at(&mut app.shell, self.shell.as_ref(), "--shell");
        lay_at(&mut app.kill_timeout, self.kill_timeout.as_ref(), "--kill-timeout");
        lay_at(
            &mut app.shutdown_with_message,
            self.shutdown_with_message.as_ref(),
            "--shutdown-with-message",
        );
        lay_at(&mut app.out_file, self.out_file.as_ref(), "--output");
        lay_at(&mut app.error_file, self.error_file.as_ref(), "--error");
        if !self.listen.is_empty() {
            let entry = |address: &ListenText| ListenConfig {
                address: At::new(address.clone(), Place::Option("--listen")),
                name: None,
                backlog: None,
                blocking: None,
            };
            app.listen = Some(self.listen.iter().map(entry).collect());
        }
        lay(&mut app.wait_ready, self.wait_ready.as_ref());
        lay(&mut app.listen_timeout, self.listen_timeout.as_ref());
        lay(&mut app.kill_signal, self.kill_signal.as_ref());
        lay(&mut app.merge_logs, self.merge_logs.as_ref());
        lay(&mut app.time, self.time.as_ref());
        lay(&mut app.log_date_format, self.log_date_format.as_ref());
        lay(&mut app.max_restarts, self.max_restarts.as_ref());
        lay_at(&mut app.max_memory_restart, self.max_memory_restart.as_ref(), "--max-memory-restart");
        lay(&mut app.restart_delay, self.restart_delay.as_ref());
        lay(&mut app.exp_backoff_restart_delay, self.exp_backoff_restart_delay.as_ref());
        lay(&mut app.stop_exit_codes, self.stop_exit_codes.as_ref());
        lay(&mut app.autorestart, self.autorestart.as_ref());
        lay(&mut app.autostart, self.autostart.as_ref());
        app
    }
}

fn lay<T: Clone>(field: &mut Option<T>, over: Option<&T>) {
    if let Some(value) = over {
        *field = Some(value.clone());
    }
}

fn lay_at<T: Clone>(field: &mut Option<At<T>>, over: Option<&T>, option: &'static str) {
    if let Some(value) = over {
        *field = Some(At::new(value.clone(), Place::Option(option)));
    }
}

/// An app from the command line: `target` is a script, a command in PATH, or a command with its arguments.
///
/// # Errors
/// Every problem with the target and the options.
pub fn command_line(target: &str, overrides: &Overrides, context: &Context) -> Result<Resolved, ConfigError> {
    let mut app = AppConfig::new(Place::CommandLine);
    app.script = Some(At::new(target.to_owned(), Place::CommandLine));
    let app = overrides.over(&app);
    resolve::resolve(&app, None, context)
        .map(|(spec, warnings, _)| Resolved { spec, warnings })
        .map_err(ConfigError::of_command_line)
}
