//! What is written becomes what is run: defaults filled in, paths absolute, and everything checked that can be
//! checked before something starts.

use crate::model::mask::{self, ShowEnv};
use crate::model::spelling;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::app::{AppConfig, Instances, Variables};
use super::error::{At, ConfigError, Place, Problem, Source, quoted};
use super::file::File;
use super::overrides::Overrides;
use super::{balance, command, depends, listen, paths, process};
use crate::model::id::AppName;
use crate::model::spec::{
    AppSpec, Balance, Check, CommandSpec, Dependency, EnvSpec, ExecMode, Hooks, ListenSpec, LogRules, Origin,
    ReadyRules, ReloadRules, RestartRules, Runtime, Stdin, StopRules,
};

/// What `time = true` stands for.
const TIME_FORMAT: &str = "YYYY-MM-DDTHH:mm:ss";

/// Who asks, and on what machine.
#[derive(Clone, Debug)]
pub struct Context {
    /// The caller's working directory, absolute; best from [`paths::logical_cwd`].
    pub cwd: PathBuf,
    /// The caller's home directory, for `~/`.
    pub home: Option<PathBuf>,
    /// The caller's PATH.
    pub path: OsString,
    /// The CPUs that may be used, at least 1: affinity and cgroup quota respected.
    pub cpus: u32,
    /// The running executable: what the script `pm` stands for.
    pub current_exe: PathBuf,
    /// `--env NAME`.
    pub env_name: Option<String>,
}

/// An app that can be started, and what is doubtful about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// The app.
    pub spec: AppSpec,
    /// Lines for people, each with its place.
    pub warnings: Vec<String>,
}

/// Resolves the apps of a file, with the command line laid over each; `overrides.only` selects some.
///
/// # Errors
/// Every problem of every selected app, and of all together: a name twice, an address twice.
pub fn resolve_file(
    file: &File,
    overrides: &Overrides,
    context: &Context,
) -> Result<Vec<Resolved>, ConfigError> {
    let mut problems = twice_named(&file.apps);
    problems.extend(depends::check(file));
    let apps = select(file, &overrides.only, &mut problems);
    if apps.len() > 1 && overrides.name.is_some() {
        problems.push(
            Problem::new(
                Place::Option("--name"),
                format!("the file has {} apps; a name fits one", apps.len()),
            )
            .help("select one with --only NAME, or set `name` in the file"),
        );
    }
    let mut resolved = Vec::new();
    let mut sockets: Vec<(AppName, At<ListenSpec>)> = Vec::new();
    for app in apps {
        let app = overrides.over(app);
        match resolve(&app, Some(&file.source), context) {
            Ok((spec, warnings, listeners)) => {
                for listener in listeners {
                    if let Some((owner, first)) = sockets.iter().find(|(owner, l)| {
                        *owner != spec.name && listen::collide(&l.value.address, &listener.value.address)
                    }) {
                        problems.push(collision(
                            &listener,
                            first,
                            &format!("app `{owner}` listens there, at "),
                        ));
                    }
                    sockets.push((spec.name.clone(), listener));
                }
                resolved.push(Resolved { spec, warnings });
            }
            Err(more) => problems.extend(more),
        }
    }
    if problems.is_empty() {
        Ok(resolved)
    } else {
        Err(ConfigError::in_file(std::sync::Arc::clone(&file.source), problems))
    }
}

fn collision(second: &At<ListenSpec>, first: &At<ListenSpec>, whose: &str) -> Problem {
    Problem::new(second.place.clone(), format!("{} is taken already", second.value.address))
        .with(first.place.clone(), format!("{whose}{}", first.value.address))
}

fn select<'a>(file: &'a File, only: &[String], problems: &mut Vec<Problem>) -> Vec<&'a AppConfig> {
    if only.is_empty() {
        return file.apps.iter().collect();
    }
    let names: Vec<(String, &AppConfig)> =
        file.apps.iter().filter_map(|app| Some((app.display_name()?, app))).collect();
    for wanted in only.iter().filter(|wanted| !names.iter().any(|(name, _)| name == *wanted)) {
        let known: Vec<&str> = names.iter().map(|(name, _)| name.as_str()).collect();
        let message = format!("the file has no app {}; it has {}", quoted(wanted), known.join(", "));
        problems.push(Problem::new(Place::Option("--only"), message).did_you_mean(wanted, known));
    }
    names.into_iter().filter(|(name, _)| only.contains(name)).map(|(_, app)| app).collect()
}

fn twice_named(apps: &[AppConfig]) -> Vec<Problem> {
    let mut seen: Vec<(String, Place)> = Vec::new();
    let mut problems = Vec::new();
    for app in apps {
        let Some(name) = app.display_name() else { continue };
        let place = app.name.as_ref().or(app.script.as_ref()).map_or(&app.place, |at| &at.place);
        if let Some((_, first)) = seen.iter().find(|(other, _)| *other == name) {
            let problem = Problem::new(place.clone(), format!("two apps have the name {}", quoted(&name)))
                .with(first.clone(), "the first is here");
            problems.push(if app.name.is_none() {
                problem.help("the name comes from the script; set `name`")
            } else {
                problem.help("for more instances of one app use `instances`")
            });
        } else {
            seen.push((name, place.clone()));
        }
    }
    problems
}

type Outcome = (AppSpec, Vec<String>, Vec<At<ListenSpec>>);

/// Resolves one app. Without a `source` it comes from the command line.
///
/// # Errors
/// Every problem of the app.
pub(super) fn resolve(
    app: &AppConfig,
    source: Option<&Source>,
    context: &Context,
) -> Result<Outcome, Vec<Problem>> {
    let mut problems = Vec::new();
    let mut warnings = Vec::new();

    let base = source.and_then(|source| source.path.parent()).unwrap_or(&context.cwd);
    let home = context.home.as_deref();
    let cwd = app.cwd.as_ref().map_or_else(
        || base.to_owned(),
        |cwd| {
            // `--cwd` is typed in a shell and starts there; `cwd` in a file starts at the file.
            let base = if matches!(cwd.place, Place::Text(_)) { base } else { &context.cwd };
            paths::absolute_from_home(base, home, &cwd.value)
        },
    );
    let cwd_is_there = cwd.is_dir();
    if !cwd_is_there {
        let place = app.cwd.as_ref().map_or(&app.place, |cwd| &cwd.place);
        problems.push(Problem::new(place.clone(), format!("`cwd` is no directory: {}", cwd.display())));
    }
    let within = |text: &str| paths::absolute_from_home(&cwd, home, text);

    let name = keep(name(app), &mut problems);
    let mut env = variables(app, source, context, &mut warnings, &mut problems);
    let files: Vec<PathBuf> = app.env_file.iter().map(|file| within(&file.value)).collect();
    for (file, at) in files.iter().zip(&app.env_file) {
        if !file.is_file() {
            let message = format!("`env_file` is no file: {}", file.display());
            problems.push(Problem::new(at.place.clone(), message));
        }
    }

    let listeners = app.listen.as_deref().unwrap_or_default();
    let listeners = listen::resolve(listeners, &cwd, home, &mut problems);
    for (index, listener) in listeners.iter().enumerate() {
        if let Some(first) = listeners[..index]
            .iter()
            .find(|first| listen::collide(&first.value.address, &listener.value.address))
        {
            problems.push(collision(listener, first, "this app listens there already, at "));
        }
    }

    let path = env.get("PATH").map_or(context.path.as_os_str(), |path| OsStr::new(path.as_str()));
    // In a directory that does not exist every file is missing: one problem, said once.
    let command =
        if cwd_is_there { keep(command::resolve(app, &cwd, path, context), &mut problems) } else { None };
    if let Some(command) = &command {
        let names: Vec<&str> = listeners.iter().map(|l| l.value.name.as_str()).collect();
        let place = app.args.as_ref().map(|a| &a.place).or(app.script.as_ref().map(|s| &s.place));
        problems.extend(command::check_placeholders(command, place.unwrap_or(&app.place), &names));
        if command::is_python(command) {
            // Without it the last lines before a crash stay in the buffer. PM2 does the same.
            env.entry("PYTHONUNBUFFERED".to_owned()).or_insert_with(|| "1".to_owned());
        }
    }

    let instances = keep(instances(app, context.cpus), &mut problems);
    let mode = command.as_ref().and_then(|command| keep(mode(app, command), &mut problems));
    if let (Some(mode), Some(instances)) = (mode, instances)
        && let Some(doubt) = port_clash(app, &env, mode, instances)
    {
        warnings.push(doubt.line(source));
    }
    if let (Some(mode), Some(command)) = (mode, &command)
        && let Some(doubt) = bun_binds_itself(app, command, mode).or_else(|| runner_in_between(app, command))
    {
        warnings.push(doubt.line(source));
    }

    let depends_on = dependencies(app, &mut problems);
    problems.extend(probes(app, command.as_ref().map(|command| command.runtime)));
    let stop = keep(stop(app), &mut problems);
    let max_memory = keep(process::memory_limit(app), &mut problems).flatten();
    let reload = keep(reload(app), &mut problems);
    if let Some(var) = &app.increment_var
        && let Some(start) = env.get(&var.value)
        && start.trim().parse::<u32>().is_err()
    {
        let start = quoted(mask::shown(&var.value, start, ShowEnv::No));
        let message = format!("`increment_var` counts up from {start}, which is no number");
        problems.push(Problem::new(var.place.clone(), message));
    }

    let (Some(name), Some(command), Some(mode), Some(instances), Some(stop), Some(reload)) =
        (name, command, mode, instances, stop, reload)
    else {
        return Err(problems);
    };
    if !problems.is_empty() {
        return Err(problems);
    }
    let mut spec = AppSpec {
        name,
        namespace: app.namespace.as_ref().map_or_else(|| "default".to_owned(), |n| n.value.clone()),
        origin: source.map(|source| Origin { file: source.path.clone(), env_name: context.env_name.clone() }),
        command,
        mode,
        instances,
        env: EnvSpec {
            inherit: app.inherit_env.unwrap_or(true),
            files,
            vars: env,
            instance_var: app.instance_var.clone().unwrap_or_else(|| "NODE_APP_INSTANCE".to_owned()),
            increment_var: app.increment_var.as_ref().map(|var| var.value.clone()),
        },
        listen: listeners.iter().map(|listener| listener.value.clone()).collect(),
        balance: Balance::RoundRobin,
        ready: ready(app),
        stop,
        restart: restart(app),
        reload,
        logs: logs(app, &within),
        health: app.health.as_ref().map(|probe| probe.value.clone()),
        max_memory,
        hooks: Hooks {
            pre_start: app.pre_start.clone(),
            pre_reload: app.pre_reload.clone(),
            post_stop: app.post_stop.clone(),
            on_errored: app.on_errored.clone(),
        },
        depends_on,
        agent: app.agent.unwrap_or(true),
        stdin: app.stdin.unwrap_or(Stdin::Pipe),
        autostart: app.autostart.unwrap_or(true),
        process: process::rules(app),
        cwd,
    };
    spec.balance = app.balance.as_ref().map_or_else(
        || balance::default_for(spec.is_node_cluster(), !spec.listen.is_empty()),
        |asked| asked.value,
    );
    if let Some(asked) = &app.balance {
        if let Err(unfit) = balance::check(&spec) {
            return Err(vec![Problem::new(asked.place.clone(), unfit.message).help(unfit.help)]);
        }
        if !spec.is_node_cluster() && spec.listen.is_empty() {
            let doubt =
                "`balance` does nothing: instances of this app share no socket; see exec_mode and `listen`";
            warnings.push(Problem::new(asked.place.clone(), doubt).line(source));
        }
    }
    Ok((spec, warnings, listeners))
}

/// Keeps what worked and notes what did not, so that one run finds all problems.
fn keep<T>(result: Result<T, Problem>, problems: &mut Vec<Problem>) -> Option<T> {
    result.map_err(|problem| problems.push(problem)).ok()
}

fn name(app: &AppConfig) -> Result<AppName, Problem> {
    let text = app.display_name().unwrap_or_default();
    let place = app.name.as_ref().or(app.script.as_ref()).map_or(&app.place, |at| &at.place);
    AppName::new(&text).map_err(|error| {
        let problem =
            Problem::new(place.clone(), format!("{} cannot be the name of an app: {error}", quoted(&text)));
        match app.name {
            Some(_) => problem,
            None => problem.help("the name comes from the script; set `name` (or --name)"),
        }
    })
}

/// `env`, then the section that `--env` chose, then `port`.
fn variables(
    app: &AppConfig,
    source: Option<&Source>,
    context: &Context,
    warnings: &mut Vec<String>,
    problems: &mut Vec<Problem>,
) -> Variables {
    let mut env = app.env.clone();
    if let Some(section) = &context.env_name {
        match (app.env_sections.get(section), source) {
            (Some(variables), _) => env.extend(variables.clone()),
            (None, Some(_)) => {
                // As in PM2 a warning: with several apps in a file not all need every section.
                let known: Vec<&str> = app.env_sections.keys().map(String::as_str).collect();
                let has = if known.is_empty() {
                    "it has no `env_NAME` section".to_owned()
                } else {
                    format!(
                        "it has {}",
                        known.iter().map(|n| format!("`env_{n}`")).collect::<Vec<_>>().join(", ")
                    )
                };
                let likely = spelling::closest(section, known.iter().copied());
                let hint = likely.map(|name| format!("; did you mean --env {name}?")).unwrap_or_default();
                let message =
                    format!("this app has no section `env_{section}` for --env {section}; {has}{hint}");
                warnings.push(Problem::new(app.place.clone(), message).line(source));
            }
            (None, None) => problems.push(
                Problem::new(Place::Option("--env"), "it chooses an `env_NAME` section of a config file")
                    .help("without a config file set the variable in the shell: NAME=value pm start …"),
            ),
        }
    }
    if let Some(port) = app.port {
        env.insert("PORT".to_owned(), port.to_string());
    }
    env
}

fn instances(app: &AppConfig, cpus: u32) -> Result<u32, Problem> {
    let Some(instances) = &app.instances else { return Ok(1) };
    match instances.value {
        Instances::Max => Ok(cpus.max(1)),
        Instances::Count(count) => Ok(count),
        Instances::CpusLess(less) => match cpus.checked_sub(less) {
            Some(count) if count >= 1 => Ok(count),
            _ => {
                let cpu_word = if cpus == 1 { "CPU" } else { "CPUs" };
                let message =
                    format!("-{less} leaves no instance on {cpus} {cpu_word}; at least 1 is needed");
                let lowest = cpus.saturating_sub(1);
                Err(Problem::new(instances.place.clone(), message).help(match lowest {
                    0 => "allowed here: 0, \"max\", or a number from 1".to_owned(),
                    1 => "allowed here: -1, 0, \"max\", or a number from 1".to_owned(),
                    _ => format!("allowed here: -{lowest} to -1, 0, \"max\", or a number from 1"),
                }))
            }
        },
    }
}

/// Fork or cluster. PM2's rule, but every value of `instances` counts as given, and listeners make it work for any
/// language.
fn mode(app: &AppConfig, command: &CommandSpec) -> Result<ExecMode, Problem> {
    let speaks_cluster = matches!(command.runtime, Runtime::Node | Runtime::Bun);
    let listens = app.listen.as_ref().is_some_and(|listen| !listen.is_empty());
    match &app.exec_mode {
        Some(mode) if mode.value == ExecMode::Cluster && !speaks_cluster && !listens => {
            let what = match (&command.interpreter, command.script.file_name()) {
                (Some(interpreter), _) => interpreter.clone(),
                (None, Some(file)) => file.to_string_lossy().into_owned(),
                (None, None) => command.script.display().to_string(),
            };
            Err(Problem::new(
                mode.place.clone(),
                format!("cluster mode needs a script run by node or bun, or `listen`; this app runs {what}"),
            )
            .help("add `listen = [\"0.0.0.0:3000\"]` (instances inherit that socket), or use exec_mode = \"fork\""))
        }
        Some(mode) => Ok(mode.value),
        None if app.instances.is_some() && (speaks_cluster || listens) => Ok(ExecMode::Cluster),
        None => Ok(ExecMode::Fork),
    }
}

/// npm and its kin are Node programs, which close the descriptors they inherit: what they start finds no socket.
fn runner_in_between(app: &AppConfig, command: &CommandSpec) -> Option<Problem> {
    app.listen.as_ref().filter(|listen| !listen.is_empty())?;
    let runner = command::package_runner(command)?;
    let place = app.script.as_ref().map_or(&app.place, |script| &script.place);
    let message = format!(
        "{runner} does not hand inherited sockets on to what it starts; make `script` the file that it would run \
         (docs/zero-downtime.md, Next.js and npm start)"
    );
    Some(Problem::new(place.clone(), message))
}

/// A Bun worker binds the port itself (SO_REUSEPORT): what waits in its queue when it closes is reset by the kernel.
fn bun_binds_itself(app: &AppConfig, command: &CommandSpec, mode: ExecMode) -> Option<Problem> {
    let listens = app.listen.as_ref().is_some_and(|listen| !listen.is_empty());
    if command.runtime != Runtime::Bun || mode != ExecMode::Cluster || listens {
        return None;
    }
    let place = app.exec_mode.as_ref().map(|at| &at.place).or(app.instances.as_ref().map(|at| &at.place));
    Some(Problem::new(
        place.unwrap_or(&app.place).clone(),
        "bun's cluster workers bind the port themselves, so a reload can reset a few connections; with `listen` it \
         loses none (docs/zero-downtime.md, Bun)",
    ))
}

/// Several processes that are told one port to bind: all but one will fail.
fn port_clash(app: &AppConfig, env: &Variables, mode: ExecMode, instances: u32) -> Option<Problem> {
    let port = env.get("PORT").filter(|port| *port != "0")?;
    let alone = mode == ExecMode::Fork && app.listen.as_ref().is_none_or(Vec::is_empty);
    let counts_up = app.increment_var.as_ref().is_some_and(|var| var.value == "PORT");
    if instances < 2 || !alone || counts_up {
        return None;
    }
    let place = app.instances.as_ref().map_or(&app.place, |at| &at.place);
    Some(Problem::new(
        place.clone(),
        format!(
            "{instances} instances in fork mode all get PORT={port}; use `listen`, cluster mode, or increment_var = \"PORT\""
        ),
    ))
}

fn ready(app: &AppConfig) -> ReadyRules {
    let default = ReadyRules::default();
    ReadyRules {
        wait_ready: app.wait_ready.unwrap_or(default.wait_ready),
        listen_timeout: app.listen_timeout.unwrap_or(default.listen_timeout),
        probe: app.ready.as_ref().map(|probe| probe.value.clone()),
    }
}

/// What is wrong with an app's probes, beside each by itself.
fn probes(app: &AppConfig, runtime: Option<Runtime>) -> Vec<Problem> {
    let mut problems = Vec::new();
    if let Some(ready) = &app.ready
        && app.wait_ready == Some(true)
    {
        let problem =
            Problem::new(ready.place.clone(), "`wait_ready` and `ready` are two answers to one question");
        problems.push(problem.help("keep one of them"));
    }
    let with_agent = app.agent.unwrap_or(true) && runtime.is_none_or(|runtime| runtime == Runtime::Node);
    for probe in app.ready.iter().chain(&app.health) {
        if let Check::Http(address) = &probe.value.check
            && address.starts_with('/')
            && !with_agent
        {
            let message =
                "a path alone goes over the IPC channel to the agent in a Node app, and there is none here";
            let problem = Problem::new(probe.place.clone(), message);
            problems.push(problem.help(
                "name an address of the instance's own, such as \"http://127.0.0.1:{PORT}/healthz\" or \
                 \"http://unix:/run/app-{NODE_APP_INSTANCE}.sock:/healthz\"",
            ));
        }
    }
    problems
}

fn dependencies(app: &AppConfig, problems: &mut Vec<Problem>) -> BTreeMap<AppName, Dependency> {
    let own = app.display_name();
    let one = |(text, at): (&String, &At<Dependency>)| match AppName::new(text) {
        Ok(name) if own.as_deref() != Some(text) => Some((name, at.value)),
        Ok(_) => {
            problems.push(Problem::new(at.place.clone(), "an app cannot depend on itself"));
            None
        }
        Err(error) => {
            let message = format!("{} cannot be the name of an app: {error}", quoted(text));
            problems.push(Problem::new(at.place.clone(), message));
            None
        }
    };
    app.depends_on.iter().filter_map(one).collect()
}

fn stop(app: &AppConfig) -> Result<StopRules, Problem> {
    let default = StopRules::default();
    let timeout = app.kill_timeout.as_ref().map_or(default.timeout, |timeout| timeout.value);
    if let Some(drain) = &app.drain_timeout
        && drain.value > timeout
    {
        let limit = super::units::show_duration(timeout);
        let problem = Problem::new(
            drain.place.clone(),
            format!("this is out of range; allowed: 0s to `kill_timeout`, which is {limit}"),
        );
        return Err(match &app.kill_timeout {
            Some(timeout) => problem.with(timeout.place.clone(), "`kill_timeout` is set here"),
            None => problem.help("raise `kill_timeout` too"),
        });
    }
    Ok(StopRules {
        signal: app.kill_signal.unwrap_or(default.signal),
        timeout,
        mode: app.kill_mode.unwrap_or(default.mode),
        method: app.stop_method.unwrap_or(default.method),
        with_message: app.shutdown_with_message.as_ref().is_some_and(|with| with.value),
        drain_timeout: app.drain_timeout.as_ref().map(|drain| drain.value),
        drain_websockets: app.drain_websockets.unwrap_or(default.drain_websockets),
    })
}

fn reload(app: &AppConfig) -> Result<ReloadRules, Problem> {
    let default = ReloadRules::default();
    let max_surge = app.max_surge.as_ref().map_or(default.max_surge, |at| at.value);
    let max_unavailable = app.max_unavailable.as_ref().map_or(default.max_unavailable, |at| at.value);
    if max_surge.is_none() && max_unavailable.is_none() {
        let surge = app.max_surge.as_ref().map_or(&app.place, |at| &at.place);
        let problem = Problem::new(
            surge.clone(),
            "with `max_surge` and `max_unavailable` both 0 a reload could replace nothing",
        )
        .help("set one of them to 1 or more");
        return Err(match &app.max_unavailable {
            Some(at) => problem.with(at.place.clone(), "`max_unavailable` is set here"),
            None => problem,
        });
    }
    Ok(ReloadRules {
        strategy: app.strategy.unwrap_or(default.strategy),
        max_surge,
        max_unavailable,
        min_healthy: app.min_healthy.unwrap_or(default.min_healthy),
        max_draining: app.max_draining.or(default.max_draining),
        on_failure: app.on_failure.unwrap_or(default.on_failure),
        reserve: app.reserve.unwrap_or(default.reserve),
        overlap: app.overlap,
    })
}

fn restart(app: &AppConfig) -> RestartRules {
    let set = |span: Option<Duration>| span.filter(|span| !span.is_zero());
    let default = RestartRules::default();
    RestartRules {
        autorestart: app.autorestart.unwrap_or(default.autorestart),
        max_restarts: app.max_restarts.unwrap_or(default.max_restarts),
        min_uptime: app.min_uptime.unwrap_or(default.min_uptime),
        // 0 is PM2's way to write "none" for both.
        restart_delay: set(app.restart_delay),
        backoff_base: set(app.exp_backoff_restart_delay).unwrap_or(default.backoff_base),
        backoff_reset: app.backoff_reset.unwrap_or(default.backoff_reset),
        stop_exit_codes: app.stop_exit_codes.clone().unwrap_or_default(),
    }
}

fn logs(app: &AppConfig, within: &dyn Fn(&str) -> PathBuf) -> LogRules {
    let file = |at: &Option<At<String>>| {
        at.as_ref().map(|at| match at.value.as_str() {
            // PM2's spelling.
            "NULL" => Path::new("/dev/null").to_owned(),
            path => within(path),
        })
    };
    LogRules {
        out_file: file(&app.out_file),
        error_file: file(&app.error_file),
        merge: app.merge_logs,
        date_format: app
            .log_date_format
            .clone()
            .filter(|format| !format.is_empty())
            .or_else(|| app.time.unwrap_or(false).then(|| TIME_FORMAT.to_owned())),
        overflow: app.log_overflow.unwrap_or_default(),
    }
}
