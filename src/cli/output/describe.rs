//! Everything known about an instance, in sections.

use std::io;
use std::time::Duration;

use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{ContentArrangement, Table};
use jiff::tz::TimeZone;
use owo_colors::Style;

use super::{Look, Terminal, words};
use crate::config::words as words_of_shell;
use crate::ipc::protocol::{InstanceDetail, MASK};
use crate::model::figures::{NodeFigures, Spread};
use crate::model::process::{ProcessRules, cpu_list, size};
use crate::model::spec::{AppSpec, Check, Dependency, ExecMode, OnFailure, Runtime, Strategy};

/// Prints one instance.
///
/// # Errors
/// Standard output's.
pub fn print(detail: &InstanceDetail, zone: &TimeZone, terminal: &mut Terminal) -> io::Result<()> {
    let look = terminal.look();
    let row = &detail.row;
    title(&format!("Describing process with id {} - name {}", row.pm_id, row.app), terminal)?;
    terminal.say(&pairs(&state(detail, zone), look))?;
    title("Configuration", terminal)?;
    terminal.say(&pairs(&configuration(&detail.spec), look))?;
    if let Some(figures) = &row.figures {
        title("Inside Node", terminal)?;
        terminal.say(&pairs(&inside(figures), look))?;
    }
    if !detail.processes.is_empty() {
        title("Processes", terminal)?;
        let mut table = table(look);
        table.set_header(["pid", "cpu", "rss", "pss", "command"]);
        for process in &detail.processes {
            table.add_row([
                process.pid.to_string(),
                words::percent(process.cpu),
                words::bytes(process.rss),
                words::bytes(process.pss),
                process.command.clone(),
            ]);
        }
        terminal.say(&table.to_string())?;
    }
    if !detail.draining.is_empty() {
        title("Other generations", terminal)?;
        let mut table = table(look);
        table.set_header(["generation", "pid", "state", "killed in"]);
        for older in &detail.draining {
            table.add_row([
                older.generation.to_string(),
                older.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
                older.state.clone(),
                older.kill_in_ms.map_or_else(|| "-".to_owned(), words::millis),
            ]);
        }
        terminal.say(&table.to_string())?;
    }
    if !detail.env.is_empty() {
        title("Environment", terminal)?;
        let shown = detail.env.iter().filter(|(_, value)| *value != MASK);
        let shown: Vec<(&str, String)> = shown.map(|(key, value)| (key.as_str(), value.clone())).collect();
        if !shown.is_empty() {
            terminal.say(&pairs(&shown, look))?;
        }
        let hidden = detail.env.len() - shown.len();
        if hidden > 0 {
            let target = row.pm_id;
            terminal.say(&format!(" {hidden} more, hidden here: `pm env {target}` prints them all"))?;
        }
    }
    if !detail.notes.is_empty() {
        title("Notes", terminal)?;
        detail.notes.iter().try_for_each(|note| terminal.say(&format!(" - {note}")))?;
    }
    Ok(())
}

fn title(text: &str, terminal: &mut Terminal) -> io::Result<()> {
    let text = terminal.on_out(text, Style::new().bold());
    terminal.say(&format!(" {text}"))
}

fn table(look: Look) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    table.force_no_tty();
    if let Some(width) = look.width {
        table.set_content_arrangement(ContentArrangement::Dynamic).set_width(width);
    }
    table
}

fn pairs(pairs: &[(&str, String)], look: Look) -> String {
    let mut table = table(look);
    for (key, value) in pairs {
        table.add_row([key, value.as_str()]);
    }
    table.to_string()
}

fn state(detail: &InstanceDetail, zone: &TimeZone) -> Vec<(&'static str, String)> {
    let row = &detail.row;
    let dash = || "-".to_owned();
    let mut lines = vec![
        (
            "status",
            match &row.note {
                Some(note) => format!("{} ({note})", words::status(row)),
                None => words::status(row),
            },
        ),
        ("name", row.app.to_string()),
        ("namespace", row.namespace.clone()),
        ("slot", row.slot.to_string()),
        ("generation", row.generation.map_or_else(dash, |generation| generation.to_string())),
        ("pid", row.pid.map_or_else(dash, |pid| pid.to_string())),
        ("restarts", row.restarts.to_string()),
        ("unstable restarts", detail.unstable.to_string()),
        ("uptime", row.uptime_ms.map_or_else(dash, words::uptime)),
        ("created at", words::date(detail.created_ms, zone)),
        ("started at", detail.started_ms.map_or_else(dash, |millis| words::date(millis, zone))),
        ("ready after", detail.ready_after_ms.map_or_else(dash, words::millis)),
        ("last exit", detail.last_exit.clone().unwrap_or_else(dash)),
        ("cpu (of one core)", row.cpu.map_or_else(dash, words::percent)),
        ("memory", row.memory.map_or_else(dash, words::bytes)),
        ("memory (pss)", detail.pss.map_or_else(dash, words::bytes)),
        ("memory (rss)", detail.rss.map_or_else(dash, words::bytes)),
        ("error log path", detail.error_file.display().to_string()),
        ("out log path", detail.out_file.display().to_string()),
    ];
    if let Some(version) = &detail.node_version {
        lines.push(("node version", version.clone()));
    }
    if !row.listen.is_empty() {
        lines.push(("listens on", row.listen.join("\n")));
    }
    if let Some(health) = &detail.health {
        lines.push(("health", health.clone()));
    }
    if let Some(probe) = &detail.probe {
        let times = match (probe.in_a_row, probe.ok) {
            (1, _) => String::new(),
            (times, true) => format!(", {times} good answers in a row"),
            (times, false) => format!(", {times} bad answers in a row"),
        };
        let (ago, took) = (words::millis(probe.ago_ms), words::millis(probe.took_ms));
        lines.push(("last probe", format!("{} ({}, {ago} ago, took {took}{times})", probe.text, probe.role)));
    }
    lines
}

/// Who the processes are and what they may use, where that is set.
fn process(rules: &ProcessRules) -> Vec<(&'static str, String)> {
    let group = rules.limits.set().into_iter().map(|(key, value, _)| format!("{key} {value}"));
    let each =
        rules.rlimits.iter().map(|(limit, range)| format!("{} {}", limit.as_str(), range.show(limit.unit())));
    let limits: Vec<String> = group.chain(each).collect();
    let capabilities: Vec<String> = rules.ambient_capabilities.iter().map(ToString::to_string).collect();
    let text = |text: String| (!text.is_empty()).then_some(text);
    [
        ("user", rules.user.clone()),
        ("group", rules.group.clone()),
        ("limits", text(limits.join(", "))),
        ("nice", rules.nice.map(|nice| nice.to_string())),
        ("ionice", rules.ionice.map(|order| order.to_string())),
        ("cpu affinity", text(cpu_list(&rules.cpu_affinity))),
        ("umask", rules.umask.map(|mask| format!("{mask:04o}"))),
        ("no new privileges", rules.no_new_privs.then(|| "yes".to_owned())),
        ("ambient capabilities", text(capabilities.join(", "))),
    ]
    .into_iter()
    .filter_map(|(key, value)| Some((key, value?)))
    .collect()
}

fn inside(figures: &NodeFigures) -> Vec<(&'static str, String)> {
    let spread = |spread: Spread| {
        let [p50, p95, p99] = [spread.p50, spread.p95, spread.p99].map(words::fine_millis);
        format!("p50 {p50}, p95 {p95}, p99 {p99}")
    };
    let mut lines = vec![
        ("heap", format!("{} of {}", words::bytes(figures.heap_used), words::bytes(figures.heap_total))),
        (
            "external memory",
            format!("{}, buffers {}", words::bytes(figures.external), words::bytes(figures.array_buffers)),
        ),
        ("event loop delay", figures.loop_delay.map_or_else(|| "not yet measured".to_owned(), spread)),
        ("active handles", figures.handles.to_string()),
        ("active requests", figures.requests.to_string()),
        ("open connections", figures.connections.to_string()),
    ];
    if let Some(http) = &figures.http {
        lines.push(("http requests", format!("{} per second", words::rate(http.per_second))));
        if let Some(latency) = http.latency {
            lines.push(("http latency", spread(latency)));
        }
    }
    lines
}

fn configuration(spec: &AppSpec) -> Vec<(&'static str, String)> {
    let yes_no = |value: bool| if value { "yes" } else { "no" }.to_owned();
    let time = |span: Duration| words::setting(span);
    let command = &spec.command;
    let mut lines = vec![
        (
            "from",
            match &spec.origin {
                Some(origin) => match &origin.env_name {
                    Some(name) => format!("{} (env_{name})", origin.file.display()),
                    None => origin.file.display().to_string(),
                },
                None => "command line".to_owned(),
            },
        ),
        ("script path", command.script.display().to_string()),
        ("script args", shown_args(&command.args)),
        ("interpreter", command.interpreter.clone().unwrap_or_else(|| "none".to_owned())),
        ("interpreter args", shown_args(&command.interpreter_args)),
        ("exec cwd", spec.cwd.display().to_string()),
        ("exec mode", spec.mode.to_string()),
        ("instances", spec.instances.to_string()),
        (
            "ready",
            match &spec.ready.probe {
                _ if spec.ready.wait_ready => "when the app says so".to_owned(),
                Some(probe) => format!(
                    "when {} passes {}, asked every {}",
                    check(&probe.check),
                    words::count(probe.threshold as usize, "time"),
                    time(probe.interval)
                ),
                None => "when it runs or listens".to_owned(),
            },
        ),
        ("listen timeout", time(spec.ready.listen_timeout)),
        (
            "stops by",
            if spec.stop.with_message {
                "message \"shutdown\"".to_owned()
            } else {
                spec.stop.signal.to_string()
            },
        ),
        ("kill timeout", time(spec.stop.timeout)),
        ("kill mode", spec.stop.mode.to_string()),
        ("drain timeout", spec.stop.drain_timeout.map_or_else(|| "keep-alive timeout + 1s".to_owned(), time)),
        ("autorestart", yes_no(spec.restart.autorestart)),
        (
            "restart delay",
            spec.restart
                .restart_delay
                .map_or_else(|| format!("backoff from {}", time(spec.restart.backoff_base)), time),
        ),
        ("max restarts", spec.restart.max_restarts.to_string()),
        ("min uptime", time(spec.restart.min_uptime)),
        ("reload", reload(spec)),
    ];
    lines.extend(process(&spec.process));
    if !spec.depends_on.is_empty() {
        let needed = spec.depends_on.iter().map(|(app, how_far)| match how_far {
            Dependency::Ready => app.to_string(),
            Dependency::Started => format!("{app} (started)"),
        });
        lines.push(("depends on", needed.collect::<Vec<_>>().join(", ")));
    }
    if matches!(spec.mode, ExecMode::Cluster) {
        lines.push(("balance", spec.balance.to_string()));
    }
    if matches!(spec.command.runtime, Runtime::Node) {
        lines.push(("agent", yes_no(spec.agent)));
        lines.push(("stop method", spec.stop.method.to_string()));
    }
    if !spec.restart.stop_exit_codes.is_empty() {
        let codes: Vec<String> = spec.restart.stop_exit_codes.iter().map(i32::to_string).collect();
        lines.push(("stop exit codes", codes.join(", ")));
    }
    if let Some(limit) = spec.max_memory {
        lines.push(("memory limit", format!("{}, replaced when above", size(limit))));
    }
    if let Some(probe) = &spec.health {
        let text = format!(
            "{} every {}, replaced after {}",
            check(&probe.check),
            time(probe.interval),
            words::count(probe.threshold as usize, "failure")
        );
        lines.push(("health check", text));
    }
    let hooks = &spec.hooks;
    for (name, hook) in [
        ("pre_start", &hooks.pre_start),
        ("pre_reload", &hooks.pre_reload),
        ("post_stop", &hooks.post_stop),
        ("on_errored", &hooks.on_errored),
    ] {
        if let Some(hook) = hook {
            lines.push((name, format!("{} (within {})", shown_args(&hook.argv), time(hook.timeout))));
        }
    }
    for listen in &spec.listen {
        lines.push(("inherits", format!("{} as {}", listen.address, listen.name)));
    }
    for file in &spec.env.files {
        lines.push(("env file", file.display().to_string()));
    }
    lines
}

/// How one generation replaces another, in a line.
fn reload(spec: &AppSpec) -> String {
    let rules = &spec.reload;
    let way = match (spec.can_overlap(), rules.strategy) {
        (false, _) => "in place, with downtime".to_owned(),
        (true, strategy @ Strategy::BlueGreen) => strategy.to_string(),
        (true, strategy @ Strategy::Rolling) => {
            format!("{strategy}, surge {}, unavailable {}", rules.max_surge, rules.max_unavailable)
        }
    };
    match rules.on_failure {
        OnFailure::Rollback => format!("{way}, rolls back"),
        OnFailure::Abort => format!("{way}, no way back"),
    }
}

fn check(check: &Check) -> String {
    match check {
        Check::Http(address) => format!("GET {address}"),
        Check::Tcp(address) => format!("tcp {address}"),
        Check::Exec(argv) => format!("exec {}", shown_args(argv)),
        Check::Log(pattern) => format!("log /{pattern}/"),
    }
}

/// Arguments as a shell would need them.
fn shown_args(args: &[String]) -> String {
    if args.is_empty() {
        return "-".to_owned();
    }
    args.iter().map(|arg| words_of_shell::quote(arg)).collect::<Vec<_>>().join(" ")
}
