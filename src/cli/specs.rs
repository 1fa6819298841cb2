//! From options and files of the command line to specs: the bridge to the config layer.

use std::env;
use std::path::{Path, PathBuf};

use super::args::{AppOptions, FileOptions};
use super::error::CliError;
use super::{Context, output::Terminal};
use crate::config::app::Instances;
use crate::config::balance::check as check_balance;
use crate::config::error::{ConfigError, quoted};
use crate::config::file::{self, Argument};
use crate::config::listen::{BadAddress, ListenText};
use crate::config::overrides::{self, Overrides};
use crate::config::process::is_account;
use crate::config::resolve::{self, Resolved};
use crate::config::{paths, units, words};
use crate::ipc::protocol::Request;
use crate::model::id::AppName;
use crate::model::spec::{AppSpec, Balance, ExecMode};
use crate::store::environment::TRUST_FILES;
use crate::sys::{cpus, trust as trusting};

/// What the command line says beside the target.
#[derive(Clone, Debug, Default)]
pub struct Wishes {
    overrides: Overrides,
    balance: Option<Balance>,
    env_name: Option<String>,
}

impl Wishes {
    /// Reads the options of `start`.
    ///
    /// # Errors
    /// A value that is none, with the option's name.
    pub fn new(app: &AppOptions, file: &FileOptions, args: &[String]) -> Result<Self, CliError> {
        let balance = app.balance.as_deref().map(|text| {
            let known = Balance::NAMES.iter().find(|(name, _)| *name == text);
            known.map(|(_, balance)| *balance).ok_or_else(|| {
                let names: Vec<&str> = Balance::NAMES.iter().map(|(name, _)| *name).collect();
                let names = names.join(", ");
                bad("--balance", text, &format!("expected one of {names}"))
            })
        });
        let interpreter_args = app.interpreter_args.as_deref().map(|text| {
            words::split(text).map_err(|error| bad("--interpreter-args", text, &error.to_string()))
        });
        let listen = app
            .listen
            .iter()
            .map(|text| text.parse().map_err(|error: BadAddress| bad("--listen", text, &error.to_string())));
        let flag = |on: bool| on.then_some(true);
        let duration = |option: &str, text: &Option<String>| {
            text.as_deref()
                .map(|text| units::duration(text).map_err(|error| bad(option, text, &error.to_string())))
                .transpose()
        };
        let overrides = Overrides {
            name: app.name.clone(),
            namespace: app.namespace.clone(),
            only: names(file.only.as_deref()),
            instances: parsed::<Instances>("--instances", app.instances.as_deref())?,
            exec_mode: app.execute_command.then_some(ExecMode::Fork),
            cwd: app.cwd.clone(),
            user: account("--user", app.user.as_deref())?,
            group: account("--group", app.group.as_deref())?,
            interpreter: app.interpreter.clone(),
            interpreter_args: interpreter_args.transpose()?,
            args: (!args.is_empty()).then(|| args.to_vec()),
            listen: listen.collect::<Result<Vec<ListenText>, CliError>>()?,
            shell: flag(app.shell),
            wait_ready: flag(app.wait_ready),
            listen_timeout: duration("--listen-timeout", &app.listen_timeout)?,
            kill_timeout: duration("--kill-timeout", &app.kill_timeout)?,
            shutdown_with_message: flag(app.shutdown_with_message),
            out_file: app.output.clone(),
            error_file: app.error.clone(),
            merge_logs: flag(app.merge_logs),
            time: flag(app.time),
            log_date_format: app.log_date_format.clone(),
            max_restarts: parsed("--max-restarts", app.max_restarts.as_deref())?,
            max_memory_restart: size("--max-memory-restart", app.max_memory_restart.as_deref())?,
            restart_delay: duration("--restart-delay", &app.restart_delay)?,
            exp_backoff_restart_delay: duration(
                "--exp-backoff-restart-delay",
                &app.exp_backoff_restart_delay,
            )?,
            stop_exit_codes: exit_codes(&app.stop_exit_codes)?,
            autorestart: app.no_autorestart.then_some(false),
            autostart: app.no_autostart.then_some(false),
            ..Overrides::default()
        };
        Ok(Self { overrides, balance: balance.transpose()?, env_name: file.env.clone() })
    }

    /// Only what chooses from a file.
    #[must_use]
    pub fn of_file(file: &FileOptions) -> Self {
        let overrides = Overrides { only: names(file.only.as_deref()), ..Overrides::default() };
        Self { overrides, balance: None, env_name: file.env.clone() }
    }

    /// Whether anything but `--only` and `--env` is set: something that an app that exists cannot take.
    #[must_use]
    pub fn change_an_app(&self) -> bool {
        let Overrides { only, .. } = &self.overrides;
        let rest = Overrides { only: only.clone(), ..Overrides::default() };
        self.overrides != rest || self.balance.is_some()
    }

    /// Whether the name is given, and not taken from the script.
    #[must_use]
    pub const fn names_it(&self) -> bool {
        self.overrides.name.is_some()
    }

    /// An app that exists, with what the command line names laid over it: what was said at an earlier start holds until
    /// something else is said. `new` is what the command line alone would make.
    #[must_use]
    pub fn laid_over(&self, known: &AppSpec, new: AppSpec) -> AppSpec {
        // Taken apart in full: an option that is added has to be laid over something.
        let Overrides {
            name: _,
            namespace,
            only: _,
            instances,
            exec_mode,
            cwd,
            user,
            group,
            interpreter,
            interpreter_args,
            args,
            shell,
            listen,
            wait_ready,
            listen_timeout,
            kill_timeout,
            kill_signal,
            shutdown_with_message,
            out_file,
            error_file,
            merge_logs,
            time,
            log_date_format,
            max_restarts,
            max_memory_restart,
            restart_delay,
            exp_backoff_restart_delay,
            stop_exit_codes,
            autorestart,
            autostart,
        } = &self.overrides;
        let mut spec = known.clone();
        let another = known.command.script != new.command.script || shell.is_some();
        if another || interpreter.is_some() {
            let before = std::mem::replace(&mut spec.command, new.command.clone());
            (spec.command.args, spec.command.interpreter_args) = (before.args, before.interpreter_args);
        }
        // Without the option they are words of the line itself.
        take(&mut spec.command.args, &new.command.args, args.is_some() || !new.command.args.is_empty());
        take(&mut spec.command.interpreter_args, &new.command.interpreter_args, interpreter_args.is_some());
        take(&mut spec.namespace, &new.namespace, namespace.is_some());
        take(&mut spec.cwd, &new.cwd, cwd.is_some());
        take(&mut spec.process.user, &new.process.user, user.is_some());
        // The group of another user is not this one's.
        take(&mut spec.process.group, &new.process.group, user.is_some() || group.is_some());
        take(&mut spec.listen, &new.listen, !listen.is_empty());
        take(&mut spec.instances, &new.instances, instances.is_some());
        // A number or an address makes an app a cluster, unless it was several forks by its own wish.
        let several_forks = known.mode == ExecMode::Fork && known.instances > 1;
        let by_number = (instances.is_some() || !listen.is_empty()) && !several_forks;
        take(&mut spec.mode, &new.mode, exec_mode.is_some() || by_number);
        take(&mut spec.ready.wait_ready, &new.ready.wait_ready, wait_ready.is_some());
        take(&mut spec.ready.listen_timeout, &new.ready.listen_timeout, listen_timeout.is_some());
        take(&mut spec.stop.timeout, &new.stop.timeout, kill_timeout.is_some());
        take(&mut spec.stop.signal, &new.stop.signal, kill_signal.is_some());
        take(&mut spec.stop.with_message, &new.stop.with_message, shutdown_with_message.is_some());
        take(&mut spec.logs.out_file, &new.logs.out_file, out_file.is_some());
        take(&mut spec.logs.error_file, &new.logs.error_file, error_file.is_some());
        take(&mut spec.logs.merge, &new.logs.merge, merge_logs.is_some());
        take(&mut spec.logs.date_format, &new.logs.date_format, time.is_some() || log_date_format.is_some());
        take(&mut spec.restart.max_restarts, &new.restart.max_restarts, max_restarts.is_some());
        take(&mut spec.max_memory, &new.max_memory, max_memory_restart.is_some());
        take(&mut spec.restart.restart_delay, &new.restart.restart_delay, restart_delay.is_some());
        take(&mut spec.restart.backoff_base, &new.restart.backoff_base, exp_backoff_restart_delay.is_some());
        take(&mut spec.restart.stop_exit_codes, &new.restart.stop_exit_codes, stop_exit_codes.is_some());
        take(&mut spec.restart.autorestart, &new.restart.autorestart, autorestart.is_some());
        take(&mut spec.autostart, &new.autostart, autostart.is_some());
        take(&mut spec.balance, &new.balance, self.balance.is_some());
        spec
    }

    /// The specs of a config file. Warnings are printed.
    ///
    /// # Errors
    /// Every problem of the file.
    pub fn from_file(&self, path: &str, verb: &str, terminal: &mut Terminal) -> Result<FileSpecs, CliError> {
        let failed = |error: &ConfigError| config_error(format!("cannot {verb} {path}"), error);
        let context = self.context()?;
        trust(&paths::absolute(&context.cwd, Path::new(path)), verb)?;
        let file = file::load(Path::new(path), &context.cwd).map_err(|error| failed(&error))?;
        let resolved =
            resolve::resolve_file(&file, &self.overrides, &context).map_err(|error| failed(&error))?;
        for env_file in resolved.iter().flat_map(|app| &app.spec.env.files) {
            trust(env_file, verb)?;
        }
        Ok(FileSpecs::of(&file, self.accept(resolved, terminal)?))
    }

    /// The specs of a config file, whose warnings were printed when it was started.
    ///
    /// # Errors
    /// Every problem of the file.
    pub fn read_quietly(&self, path: &Path) -> Result<FileSpecs, CliError> {
        let failed = |error: &ConfigError| config_error(format!("cannot read {}", path.display()), error);
        let context = self.context()?;
        let file = file::load(path, &context.cwd).map_err(|error| failed(&error))?;
        let resolved =
            resolve::resolve_file(&file, &self.overrides, &context).map_err(|error| failed(&error))?;
        Ok(FileSpecs::of(&file, resolved.into_iter().map(|resolved| resolved.spec).collect()))
    }

    /// The spec of a script, a binary, a line. Warnings are printed.
    ///
    /// # Errors
    /// Every problem with it.
    pub fn from_target(&self, target: &str, terminal: &mut Terminal) -> Result<AppSpec, CliError> {
        let resolved = overrides::command_line(target, &self.overrides, &self.context()?)
            .map_err(|error| config_error(format!("cannot start {}", quoted(target)), &error))?;
        let mut specs = self.accept(vec![resolved], terminal)?;
        // One went in.
        specs.pop().ok_or(CliError::WrongAnswer)
    }

    /// Everything that is wrong with a file, or what it would start.
    ///
    /// # Errors
    /// All problems at once.
    pub fn check(&self, path: &Path) -> Result<Vec<Resolved>, CliError> {
        file::check(path, &self.overrides, &self.context()?)
            .map_err(|error| config_error(format!("{} has problems", path.display()), &error))
    }

    fn accept(&self, resolved: Vec<Resolved>, terminal: &mut Terminal) -> Result<Vec<AppSpec>, CliError> {
        let mut specs = Vec::with_capacity(resolved.len());
        for Resolved { mut spec, warnings } in resolved {
            for warning in warnings {
                terminal.error_line("warning:", &warning)?;
            }
            if let Some(balance) = self.balance {
                spec.balance = balance;
                if let Err(unfit) = check_balance(&spec) {
                    let message = format!("{}; {}", unfit.message, unfit.help);
                    return Err(bad("--balance", &balance.to_string(), &message));
                }
            }
            specs.push(spec);
        }
        Ok(specs)
    }

    fn context(&self) -> Result<resolve::Context, CliError> {
        let real =
            env::current_dir().map_err(|source| CliError::File { what: "find", path: ".".into(), source })?;
        Ok(resolve::Context {
            cwd: paths::logical_cwd(env::var_os("PWD").as_deref(), real),
            home: env::var_os("HOME").map(Into::into),
            path: env::var_os("PATH").unwrap_or_default(),
            // Respects the affinity mask and the cgroup's quota.
            cpus: u32::try_from(cpus::available()).unwrap_or(u32::MAX),
            current_exe: env::current_exe().map_err(|source| CliError::File {
                what: "find",
                path: "/proc/self/exe".into(),
                source,
            })?,
            env_name: self.env_name.clone(),
        })
    }
}

/// Root does nothing that a file says which everybody may change, unless told that it is fine: on some mounts every file
/// looks like that.
///
/// # Errors
/// It is such a file; says how to make it another one.
pub fn trust(path: &Path, verb: &str) -> Result<(), CliError> {
    if env::var_os(TRUST_FILES).is_some_and(|value| value == "1") {
        return Ok(());
    }
    // A file that is not there is complained about by whoever reads it.
    match trusting::steered_by_everybody(path) {
        Ok(Some(why)) => Err(CliError::Usage {
            message: format!("cannot {verb} {}", path.display()),
            cause: Some(format!("{why}, and root would do what it says")),
            hint: Some(format!(
                "`chown root {0} && chmod o-w {0}` in a directory of root's, or PM_TRUST_FILES=1 where that is no danger.",
                crate::config::words::quote(&path.to_string_lossy())
            )),
        }),
        Ok(None) | Err(_) => Ok(()),
    }
}

/// Whether a target is a config file, whatever exists.
#[must_use]
pub fn is_config(target: &str) -> bool {
    matches!(file::classify(target), Argument::Config | Argument::ForeignConfig)
}

fn take<T: Clone>(old: &mut T, new: &T, is_named: bool) {
    if is_named {
        old.clone_from(new);
    }
}

/// The names in `--only "a, b"`.
fn names(only: Option<&str>) -> Vec<String> {
    // Names may contain spaces; where there is a comma, only commas separate.
    let text = only.unwrap_or_default();
    let separators: &[char] = if text.contains(',') { &[','] } else { &[' '] };
    text.split(separators).map(str::trim).filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

fn exit_codes(texts: &[String]) -> Result<Option<Vec<i32>>, CliError> {
    if texts.is_empty() {
        return Ok(None);
    }
    let words = texts.iter().flat_map(|text| text.split([',', ' '])).filter(|word| !word.is_empty());
    let code = |word: &str| match word.parse::<i32>() {
        Ok(code) if (0..=255).contains(&code) => Ok(code),
        _ => Err(bad("--stop-exit-codes", word, "expected exit codes from 0 to 255, as in 0,2")),
    };
    words.map(code).collect::<Result<Vec<i32>, CliError>>().map(Some)
}

fn parsed<T: std::str::FromStr<Err: std::fmt::Display>>(
    option: &str,
    text: Option<&str>,
) -> Result<Option<T>, CliError> {
    text.map(|text| text.parse().map_err(|error: T::Err| bad(option, text, &error.to_string()))).transpose()
}

fn size(option: &str, text: Option<&str>) -> Result<Option<u64>, CliError> {
    text.map(|text| units::size(text).map_err(|error| bad(option, text, &error.to_string()))).transpose()
}

fn account(option: &str, text: Option<&str>) -> Result<Option<String>, CliError> {
    match text {
        Some(text) if !is_account(text) => Err(bad(option, text, "expected a name or a number")),
        text => Ok(text.map(str::to_owned)),
    }
}

fn bad(option: &str, text: &str, why: &str) -> CliError {
    CliError::Usage {
        message: format!("{option} {} is no value", quoted(text)),
        cause: Some(why.to_owned()),
        hint: None,
    }
}

fn config_error(summary: String, error: &ConfigError) -> CliError {
    CliError::Config { summary, problems: error.to_string().split("\n\n").map(str::to_owned).collect() }
}

/// The caller's environment, as it is kept with an app.
#[must_use]
pub fn shell() -> std::collections::BTreeMap<String, String> {
    crate::store::environment::shell_snapshot(env::vars_os())
}

/// What a config file says of the whole daemon; `None` where it is silent.
#[derive(Clone, Copy, Debug, Default)]
pub struct FileSettings {
    /// How many instances may launch at once.
    pub start_parallelism: Option<u32>,
    /// Whether values of the environment are shown to everybody who asks.
    pub show_env: Option<bool>,
}

impl FileSettings {
    /// These, and where they are silent those of a file before it.
    #[must_use]
    pub fn or(self, before: Self) -> Self {
        Self {
            start_parallelism: self.start_parallelism.or(before.start_parallelism),
            show_env: self.show_env.or(before.show_env),
        }
    }

    /// What makes them so.
    pub fn requests(self) -> impl Iterator<Item = Request> {
        let at_once = self.start_parallelism.map(|at_once| Request::LimitStarts { at_once });
        at_once.into_iter().chain(self.show_env.map(|show| Request::ShowEnv { show }))
    }
}

/// What a config file says.
#[derive(Debug)]
pub struct FileSpecs {
    /// Its apps.
    pub apps: Vec<AppSpec>,
    /// What it says of the whole daemon.
    pub settings: FileSettings,
    /// The names of all apps of the file, also of those that were not chosen.
    pub all: Vec<AppName>,
    /// The file, absolute, symlinks unresolved.
    pub path: PathBuf,
}

impl FileSpecs {
    fn of(file: &file::File, apps: Vec<AppSpec>) -> Self {
        let names = file.apps.iter().filter_map(|app| AppName::new(&app.display_name()?).ok());
        Self {
            apps,
            settings: FileSettings { start_parallelism: file.start_parallelism, show_env: file.show_env },
            all: names.collect(),
            path: file.path().to_owned(),
        }
    }
}

impl Context {
    /// Reads a config file with the choices of `--only` and `--env`.
    ///
    /// # Errors
    /// Every problem of the file.
    pub fn specs_of(&mut self, path: &str, options: &FileOptions, verb: &str) -> Result<FileSpecs, CliError> {
        Wishes::of_file(options).from_file(path, verb, &mut self.terminal)
    }
}
