//! What differs between two specs of an app, key by key, in the names of the config file.
//!
//! Says of each key what it takes to bring a change about. Nothing here knows which processes run.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::Path;
use std::time::Duration;

use super::moment::spelled;
use super::process::{ProcessRules, cpu_list, size};
use super::spec::{
    AppSpec, Check, CommandSpec, EnvSpec, Hook, Hooks, LogRules, Probe, ReadyRules, ReloadRules,
    RestartRules, StopRules,
};

/// What it takes to bring the change of a key about, the least first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Weight {
    /// A rule of ours: it holds from now on, for the processes that run too.
    Rule,
    /// Instances are added or removed; the others stay.
    Instances,
    /// The program sees it only when it is started: every process is replaced.
    Process,
}

/// One key of a spec.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Its name in the config file; `env.PORT` for a variable.
    pub key: String,
    /// Its value as people write it; `None` where it is not set.
    pub value: Option<String>,
    /// What a change of it takes.
    pub weight: Weight,
}

/// A key whose value differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Its name in the config file; `env.PORT` for a variable.
    pub key: String,
    /// `None` where it was not set.
    pub old: Option<String>,
    /// `None` where it is not set any more.
    pub new: Option<String>,
    /// What the change takes.
    pub weight: Weight,
}

/// The variable that a key `env.NAME` stands for.
#[must_use]
pub fn variable_of(key: &str) -> Option<&str> {
    key.strip_prefix("env.")
}

/// What differs, in the order of the documentation; empty exactly when the specs are equal.
#[must_use]
pub fn differences(old: &AppSpec, new: &AppSpec) -> Vec<Difference> {
    if old == new {
        return Vec::new();
    }
    let before: BTreeMap<String, Setting> =
        settings(old).into_iter().map(|setting| (setting.key.clone(), setting)).collect();
    let mut found = Vec::new();
    let mut seen = Vec::new();
    for Setting { key, value, weight } in settings(new) {
        let old = before.get(&key).and_then(|setting| setting.value.clone());
        if old != value {
            found.push(Difference { key: key.clone(), old, new: value, weight });
        }
        seen.push(key);
    }
    // Variables that are gone.
    for (key, Setting { value, weight, .. }) in before {
        if !seen.contains(&key) {
            found.push(Difference { key, old: value, new: None, weight });
        }
    }
    found
}

/// Every key of a spec.
#[must_use]
#[expect(
    clippy::too_many_lines,
    reason = "one line for each key; a field that is forgotten does not compile"
)]
pub fn settings(spec: &AppSpec) -> Vec<Setting> {
    // Taken apart in full: a new field has to be given a name and a weight here.
    let AppSpec {
        name: _,
        namespace,
        origin,
        command: CommandSpec { script, interpreter, interpreter_args, args, runtime: _ },
        cwd,
        mode,
        instances,
        env: EnvSpec { inherit, files, vars, instance_var, increment_var },
        listen,
        balance,
        ready: ReadyRules { wait_ready, listen_timeout, probe },
        stop:
            StopRules { signal, timeout, mode: kill_mode, method, with_message, drain_timeout, drain_websockets },
        restart:
            RestartRules {
                autorestart,
                max_restarts,
                min_uptime,
                restart_delay,
                backoff_base,
                backoff_reset,
                stop_exit_codes,
            },
        reload:
            ReloadRules {
                strategy,
                max_surge,
                max_unavailable,
                min_healthy,
                max_draining,
                on_failure,
                reserve,
                overlap,
            },
        logs: LogRules { out_file, error_file, merge, date_format, overflow },
        health,
        max_memory,
        hooks: Hooks { pre_start, pre_reload, post_stop, on_errored },
        depends_on,
        agent,
        stdin,
        autostart,
        process:
            ProcessRules {
                user,
                group,
                umask,
                nice,
                ionice,
                cpu_affinity,
                no_new_privs,
                ambient_capabilities,
                limits,
                rlimits,
            },
    } = spec;
    let mut list = List(Vec::new());

    use Weight::{Instances, Process, Rule};
    list.set("namespace", Rule, Some(namespace.clone()));
    list.set("script", Process, Some(path(script)));
    list.set("args", Process, words(args));
    list.set("cwd", Process, Some(path(cwd)));
    list.set("interpreter", Process, interpreter.clone());
    list.set("interpreter_args", Process, words(interpreter_args));
    list.set("exec_mode", Process, Some(mode.to_string()));
    list.set("instances", Instances, Some(instances.to_string()));
    let sockets = listen.iter().map(|socket| {
        let mut text = socket.address.to_string();
        // What is not so by default.
        if socket.backlog != 511 {
            text.push_str(&format!(" (backlog {})", socket.backlog));
        }
        if socket.blocking {
            text.push_str(" (blocking)");
        }
        text.push_str(&format!(" as {}", socket.name));
        text
    });
    list.set("listen", Process, joined(sockets));
    list.set("balance", Process, Some(balance.to_string()));
    for (variable, value) in vars {
        list.set(&format!("env.{variable}"), Process, Some(value.clone()));
    }
    list.set("env_file", Process, joined(files.iter().map(|file| path(file))));
    list.set("inherit_env", Process, yes(*inherit));
    list.set("instance_var", Process, Some(instance_var.clone()));
    list.set("increment_var", Process, increment_var.clone());
    list.set("wait_ready", Rule, yes(*wait_ready));
    list.set("listen_timeout", Rule, span(*listen_timeout));
    list.set("ready", Rule, probe.as_ref().map(self::probe));
    list.set("health", Rule, health.as_ref().map(self::probe));
    list.set("kill_timeout", Rule, span(*timeout));
    list.set("kill_signal", Rule, Some(signal.to_string()));
    list.set("kill_mode", Rule, Some(kill_mode.to_string()));
    list.set("stop_method", Rule, Some(method.to_string()));
    list.set("shutdown_with_message", Rule, yes(*with_message));
    list.set("drain_timeout", Rule, drain_timeout.and_then(span));
    list.set("drain_websockets", Rule, yes(*drain_websockets));
    list.set("agent", Process, yes(*agent));
    list.set("strategy", Rule, Some(strategy.to_string()));
    list.set("max_surge", Rule, Some(max_surge.to_string()));
    list.set("max_unavailable", Rule, Some(max_unavailable.to_string()));
    list.set("min_healthy", Rule, span(*min_healthy));
    list.set("max_draining", Rule, max_draining.map(|count| count.to_string()));
    list.set("on_failure", Rule, Some(on_failure.to_string()));
    list.set("reserve", Rule, yes(*reserve));
    list.set("overlap", Rule, overlap.and_then(yes));
    list.set("min_uptime", Rule, span(*min_uptime));
    list.set("max_restarts", Rule, Some(max_restarts.to_string()));
    list.set("restart_delay", Rule, restart_delay.and_then(span));
    list.set("exp_backoff_restart_delay", Rule, span(*backoff_base));
    list.set("backoff_reset", Rule, span(*backoff_reset));
    list.set("autorestart", Rule, yes(*autorestart));
    list.set("autostart", Rule, yes(*autostart));
    list.set("max_memory_restart", Rule, max_memory.map(size));
    list.set("stop_exit_codes", Rule, joined(stop_exit_codes.iter().map(ToString::to_string)));
    list.set("out_file", Rule, out_file.as_ref().map(|file| path(file)));
    list.set("error_file", Rule, error_file.as_ref().map(|file| path(file)));
    list.set("merge_logs", Rule, merge.and_then(yes));
    list.set("log_date_format", Rule, date_format.clone());
    list.set("log_overflow", Rule, Some(overflow.to_string()));
    list.set("stdin", Process, Some(stdin.to_string()));
    list.set("user", Process, user.clone());
    list.set("group", Process, group.clone());
    list.set("umask", Process, umask.map(|mask| format!("{mask:04o}")));
    list.set("nice", Process, nice.map(|nice| nice.to_string()));
    list.set("ionice", Process, ionice.map(|order| order.to_string()));
    list.set("cpu_affinity", Process, (!cpu_affinity.is_empty()).then(|| cpu_list(cpu_affinity)));
    list.set("no_new_privs", Process, yes(*no_new_privs));
    list.set("ambient_capabilities", Process, joined(ambient_capabilities.iter()));
    for (key, value, _) in limits.set() {
        list.set(&format!("limits.{key}"), Process, Some(value));
    }
    list.set("limits.required", Process, limits.required.then(|| "true".to_owned()));
    for (limit, range) in rlimits {
        list.set(&format!("limits.{}", limit.as_str()), Process, Some(range.show(limit.unit())));
    }
    for (key, hook) in [
        ("pre_start", pre_start),
        ("pre_reload", pre_reload),
        ("post_stop", post_stop),
        ("on_errored", on_errored),
    ] {
        list.set(key, Rule, hook.as_ref().map(self::hook));
    }
    let dependencies = depends_on.iter().map(|(app, how)| format!("{app} {how}"));
    list.set("depends_on", Rule, joined(dependencies));
    list.set("config file", Rule, origin.as_ref().map(|origin| path(&origin.file)));
    list.set("--env", Rule, origin.as_ref().and_then(|origin| origin.env_name.clone()));
    list.0
}

struct List(Vec<Setting>);

impl List {
    fn set(&mut self, key: &str, weight: Weight, value: Option<String>) {
        self.0.push(Setting { key: key.to_owned(), value, weight });
    }
}

fn path(path: &Path) -> String {
    path.display().to_string()
}

#[expect(clippy::unnecessary_wraps, reason = "as its neighbours")]
fn yes(yes: bool) -> Option<String> {
    Some(yes.to_string())
}

#[expect(clippy::unnecessary_wraps, reason = "as its neighbours")]
fn span(span: Duration) -> Option<String> {
    Some(spelled(span))
}

fn joined<T: Display>(items: impl Iterator<Item = T>) -> Option<String> {
    let items: Vec<String> = items.map(|item| item.to_string()).collect();
    (!items.is_empty()).then(|| items.join(", "))
}

/// Words as they were given; one with a space is quoted, so that two words do not look like one.
fn words(words: &[String]) -> Option<String> {
    let plain =
        |word: &String| !word.is_empty() && !word.contains(|c: char| c.is_whitespace() || c.is_control());
    let quoted = words.iter().map(|word| if plain(word) { word.clone() } else { format!("{word:?}") });
    (!words.is_empty()).then(|| quoted.collect::<Vec<_>>().join(" "))
}

fn hook(hook: &Hook) -> String {
    let argv = words(&hook.argv).unwrap_or_default();
    match span(hook.timeout) {
        Some(timeout) => format!("{argv} (timeout {timeout})"),
        None => argv,
    }
}

fn probe(probe: &Probe) -> String {
    let what = match &probe.check {
        Check::Http(url) => format!("http {url}"),
        Check::Tcp(address) => format!("tcp {address}"),
        Check::Exec(argv) => format!("exec {}", words(argv).unwrap_or_default()),
        Check::Log(pattern) => format!("log /{pattern}/"),
    };
    let time = |value: Duration| span(value).unwrap_or_default();
    format!(
        "{what} (interval {}, timeout {}, threshold {}, start period {})",
        time(probe.interval),
        time(probe.timeout),
        probe.threshold,
        time(probe.start_period)
    )
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::model::id::AppName;
    use crate::model::spec::{Dependency, ListenAddress, ListenSpec, Origin, Runtime};

    fn spec() -> AppSpec {
        let command = CommandSpec {
            script: PathBuf::from("/srv/app.js"),
            interpreter: Some("node".to_owned()),
            interpreter_args: Vec::new(),
            args: vec!["--port".to_owned(), "a b".to_owned()],
            runtime: Runtime::Node,
        };
        let mut spec = AppSpec::new(AppName::new("api").unwrap(), command, PathBuf::from("/srv"));
        spec.env.vars.insert("A".to_owned(), "1".to_owned());
        spec.env.vars.insert("B".to_owned(), "2".to_owned());
        spec
    }

    fn text(change: impl FnOnce(&mut AppSpec)) -> String {
        let mut new = spec();
        change(&mut new);
        let none = || "-".to_owned();
        let one = |one: &Difference| {
            let (old, new) = (one.old.clone().unwrap_or_else(none), one.new.clone().unwrap_or_else(none));
            format!("{}: {old} → {new} {:?}", one.key, one.weight)
        };
        differences(&spec(), &new).iter().map(one).collect::<Vec<_>>().join("; ")
    }

    #[test]
    fn every_change_has_the_name_of_its_key_and_what_it_takes() {
        assert_eq!(text(|_| {}), "");
        assert_eq!(text(|new| new.instances = 4), "instances: 1 → 4 Instances");
        assert_eq!(
            text(|new| {
                new.env.vars.remove("A");
                new.env.vars.insert("C".to_owned(), "3".to_owned());
            }),
            "env.C: - → 3 Process; env.A: 1 → - Process"
        );
        assert_eq!(
            text(|new| new.command.args.push(String::new())),
            "args: --port \"a b\" → --port \"a b\" \"\" Process"
        );
        assert_eq!(
            text(|new| new.stop.timeout = Duration::from_millis(1500)),
            "kill_timeout: 10s → 1500ms Rule"
        );
        assert_eq!(
            text(|new| new.logs.out_file = Some(PathBuf::from("/var/log/a.log"))),
            "out_file: - → /var/log/a.log Rule"
        );
        assert_eq!(
            text(|new| {
                new.depends_on.insert(AppName::new("db").unwrap(), Dependency::Ready);
            }),
            "depends_on: - → db ready Rule"
        );
        assert_eq!(
            text(|new| new.origin = Some(Origin { file: PathBuf::from("/e.toml"), env_name: None })),
            "config file: - → /e.toml Rule"
        );
        let listener = |blocking| ListenSpec {
            name: "web".to_owned(),
            address: ListenAddress::Tcp("127.0.0.1:80".parse().unwrap()),
            backlog: 511,
            blocking,
        };
        assert_eq!(
            text(|new| new.listen.push(listener(true))),
            "listen: - → 127.0.0.1:80 (blocking) as web Process"
        );
    }

    #[test]
    fn specs_that_differ_have_a_difference() {
        // The runtime follows from script and interpreter, and the name tells which two are compared.
        let mut new = spec();
        new.command.interpreter = Some("bun".to_owned());
        new.command.runtime = Runtime::Bun;
        assert_eq!(differences(&spec(), &new).len(), 1);
        let keys: Vec<String> = settings(&spec()).into_iter().map(|setting| setting.key).collect();
        let mut once = keys.clone();
        once.sort();
        once.dedup();
        assert_eq!(once.len(), keys.len(), "a key stands there twice");
    }
}
