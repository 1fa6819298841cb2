//! The list in PM2's form (`pm jlist`): what scripts, exporters and dashboards read.
//!
//! Streams JSON without building a tree: a thousand rows have a hundred fields each. Field names are PM2's; ours stand
//! beside `pm2_env` under `pm`. Values of the environment are masked unless asked otherwise.

use std::collections::BTreeMap;

use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::value::{RawValue, Value, to_raw_value};

use super::publish::{Numbers, SlotInfo, current_health, health_word, over_memory, probe_view};
use crate::ipc::protocol::ProcessView;
use crate::model::figures::NodeFigures;
use crate::model::mask::{ShowEnv, shown};
use crate::model::moment::millis;
use crate::model::spec::ExecMode;
use crate::policy::vocabulary::RunView;
use crate::sys::clock;

/// The whole array.
#[must_use]
pub fn render(slots: &[SlotInfo], numbers: &[Numbers], show: ShowEnv) -> Box<RawValue> {
    let entries: Vec<Entry<'_>> =
        slots.iter().zip(numbers).map(|(info, numbers)| Entry { info, numbers, show }).collect();
    to_raw_value(&entries).unwrap_or_else(|_| empty())
}

fn empty() -> Box<RawValue> {
    serde_json::value::to_raw_value::<[u8; 0]>(&[]).unwrap_or_default()
}

struct Entry<'a> {
    info: &'a SlotInfo,
    numbers: &'a Numbers,
    show: ShowEnv,
}

impl Serialize for Entry<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("pid", &self.info.pid().unwrap_or(0))?;
        map.serialize_entry("name", &self.info.spec.name)?;
        map.serialize_entry("pm2_env", &Pm2Env(self))?;
        map.serialize_entry("pm_id", &self.info.view.pm_id)?;
        map.serialize_entry(
            "monit",
            &Monit { memory: self.numbers.memory.unwrap_or(0), cpu: self.numbers.cpu.unwrap_or(0.0) },
        )?;
        map.serialize_entry("pm", &Ours(self))?;
        map.end()
    }
}

#[derive(serde::Serialize)]
struct Monit {
    memory: u64,
    #[serde(serialize_with = "as_javascript")]
    cpu: f64,
}

/// JavaScript prints a whole number without a fraction, and programs compare what they read.
fn as_javascript<S: Serializer>(number: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "checked to be a small whole number"
    )]
    if number.fract() == 0.0 && (0.0..1e9).contains(number) {
        serializer.serialize_u64(*number as u64)
    } else {
        serializer.serialize_f64(*number)
    }
}

/// The effective options with the environment flattened among them, as PM2 has it; an option wins over a variable of
/// the same name.
struct Pm2Env<'a>(&'a Entry<'a>);

impl Serialize for Pm2Env<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Entry { info, show, .. } = *self.0;
        let spec = &*info.spec;
        let view = &info.view;
        let mut map = Fields { map: serializer.serialize_map(None)?, names: Vec::with_capacity(OPTIONS) };
        map.put("name", &spec.name)?;
        map.put("namespace", &spec.namespace)?;
        map.put("pm_id", &view.pm_id)?;
        map.put("status", &view.status)?;
        map.put("version", &info.version)?;
        map.put("node_version", &info.node_version)?;
        map.put(
            "exec_mode",
            match spec.mode {
                ExecMode::Fork => "fork_mode",
                ExecMode::Cluster => "cluster_mode",
            },
        )?;
        map.put("exec_interpreter", spec.command.interpreter.as_deref().unwrap_or("none"))?;
        map.put("node_args", &spec.command.interpreter_args)?;
        if !spec.command.args.is_empty() {
            map.put("args", &spec.command.args)?;
        }
        map.put("instances", &spec.instances)?;
        map.put("NODE_APP_INSTANCE", &view.slot)?;
        map.put("instance_var", &spec.env.instance_var)?;
        map.put("pm_exec_path", &spec.cwd.join(&spec.command.script))?;
        map.put("pm_cwd", &spec.cwd)?;
        map.put("pm_out_log_path", &info.out_file)?;
        map.put("pm_err_log_path", &info.error_file)?;
        map.put("pm_pid_path", &info.pid_file)?;
        map.put("pm_uptime", &info.started_ms.unwrap_or(0))?;
        map.put("created_at", &info.created_ms)?;
        map.put("restart_time", &view.restarts)?;
        map.put("unstable_restarts", &view.unstable)?;
        map.put("prev_restart_delay", &info.restart_in_ms.unwrap_or(0))?;
        if let Some(exit) = &view.last_exit {
            map.put("exit_code", &exit.code())?;
            map.put("exit_reason", &exit.to_string())?;
        }
        map.put("autorestart", &spec.restart.autorestart)?;
        map.put("autostart", &spec.autostart)?;
        map.put("max_restarts", &spec.restart.max_restarts)?;
        if let Some(limit) = &spec.max_memory {
            map.put("max_memory_restart", limit)?;
        }
        map.put("min_uptime", &millis(spec.restart.min_uptime))?;
        map.put("restart_delay", &spec.restart.restart_delay.map_or(0, millis))?;
        map.put("stop_exit_codes", &spec.restart.stop_exit_codes)?;
        map.put("kill_timeout", &millis(spec.stop.timeout))?;
        map.put("listen_timeout", &millis(spec.ready.listen_timeout))?;
        map.put("wait_ready", &spec.ready.wait_ready)?;
        map.put("shutdown_with_message", &spec.stop.with_message)?;
        map.put("treekill", &true)?;
        map.put("merge_logs", &info.merged_logs)?;
        map.put("watch", &false)?;
        map.put("vizion", &false)?;
        map.put("pmx", &false)?;
        map.put("automation", &false)?;
        map.put("username", &info.username)?;
        map.put("unique_id", &info.unique_id)?;
        map.put("axm_actions", &[(); 0])?;
        map.put("axm_monitor", &Monitor(info.inside.figures()))?;
        map.put("axm_options", &BTreeMap::from([("module_name", spec.name.as_str())]))?;
        map.put("axm_dynamic", &BTreeMap::<&str, &str>::new())?;
        map.put("versioning", &None::<()>)?;
        let env: Vec<(&str, &str)> =
            info.env.iter().map(|(key, value)| (key, shown(key, value, show))).collect();
        map.put("env", &Environment(&env))?;
        for (key, value) in env {
            // An option wins over a variable of its name.
            if !map.names.contains(&key) {
                map.map.serialize_entry(key, value)?;
            }
        }
        map.map.end()
    }
}

/// What PM2's own agent reports, in its words and units; metrics that have no value yet are not there.
struct Monitor<'a>(Option<&'a NodeFigures>);

#[derive(serde::Serialize)]
struct Metric<V> {
    value: V,
    #[serde(rename = "type")]
    kind: &'static str,
    #[serde(skip_serializing_if = "str::is_empty")]
    unit: &'static str,
    historic: bool,
}

impl Serialize for Monitor<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        let Some(node) = self.0 else { return map.end() };
        let mebibytes = |bytes| decimals(count(bytes) / 1_048_576.0);
        let mut put = |name: &str, value: Value, unit, kind| {
            map.serialize_entry(name, &Metric { value, kind, unit, historic: true })
        };
        put("Used Heap Size", mebibytes(node.heap_used), "MiB", "internal/v8/heap/used")?;
        let usage = (count(node.heap_used) / count(node.heap_total.max(1)) * 10_000.0).round() / 100.0;
        put("Heap Usage", plain(usage), "%", "internal/v8/heap/usage")?;
        put("Heap Size", mebibytes(node.heap_total), "MiB", "internal/v8/heap/total")?;
        put("External Memory", mebibytes(node.external), "MiB", "internal/v8/external")?;
        put("Array Buffers", mebibytes(node.array_buffers), "MiB", "internal/v8/arraybuffers")?;
        if let Some(delay) = node.loop_delay {
            put("Event Loop Latency", decimals(delay.p50), "ms", "internal/libuv/latency/p50")?;
            put("Event Loop Latency p95", decimals(delay.p95), "ms", "internal/libuv/latency/p95")?;
            put("Event Loop Latency p99", decimals(delay.p99), "ms", "internal/libuv/latency/p99")?;
        }
        put("Active handles", node.handles.into(), "", "internal/libuv/handles")?;
        put("Active requests", node.requests.into(), "", "internal/libuv/requests")?;
        put("Open connections", node.connections.into(), "", "internal/net/connections")?;
        if let Some(http) = &node.http {
            let per_minute = (http.per_second * 6_000.0).round() / 100.0;
            put("HTTP", plain(per_minute), "req/min", "internal/http/builtin/reqs")?;
            if let Some(latency) = http.latency {
                // PM2 calls the median a mean.
                put("HTTP Mean Latency", rounded(latency.p50), "ms", "internal/http/builtin/latency/p50")?;
                put("HTTP P95 Latency", rounded(latency.p95), "ms", "internal/http/builtin/latency/p95")?;
                put("HTTP P99 Latency", rounded(latency.p99), "ms", "internal/http/builtin/latency/p99")?;
            }
        }
        map.end()
    }
}

#[expect(clippy::cast_precision_loss, reason = "two decimals of a MiB are shown")]
const fn count(bytes: u64) -> f64 {
    bytes as f64
}

/// PM2 has these as text.
fn decimals(number: f64) -> Value {
    format!("{number:.2}").into()
}

fn rounded(number: f64) -> Value {
    plain((number * 100.0).round() / 100.0)
}

/// A number as JavaScript prints it.
fn plain(number: f64) -> Value {
    as_javascript(&number, serde_json::value::Serializer).unwrap_or_default()
}

/// How many options there are, about.
const OPTIONS: usize = 64;

/// A map that remembers its names, which each occur once. Few enough to look through one by one: that is faster than a
/// set, for a thousand rows with fifty variables each.
struct Fields<M> {
    map: M,
    names: Vec<&'static str>,
}

impl<M: SerializeMap> Fields<M> {
    fn put<V: Serialize + ?Sized>(&mut self, name: &'static str, value: &V) -> Result<(), M::Error> {
        debug_assert!(!self.names.contains(&name), "{name} twice");
        self.names.push(name);
        self.map.serialize_entry(name, value)
    }
}

/// Names and values as they are to be shown.
struct Environment<'a>(&'a [(&'a str, &'a str)]);

impl Serialize for Environment<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().copied())
    }
}

/// What PM2 has no words for.
struct Ours<'a>(&'a Entry<'a>);

#[derive(serde::Serialize)]
struct Run {
    pid: u32,
    generation: u64,
    /// "reserve", "draining", "stopping", "launching", "soaking".
    status: &'static str,
}

impl Serialize for Ours<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Entry { info, numbers, .. } = *self.0;
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("slot", &info.view.slot)?;
        map.serialize_entry("generation", &info.view.current.as_ref().map(|run| run.id.generation))?;
        map.serialize_entry("revision", &info.revision)?;
        map.serialize_entry("balance", &info.spec.is_node_cluster().then_some(info.spec.balance))?;
        map.serialize_entry("listen", &info.listen)?;
        map.serialize_entry("ready_after_ms", &info.ready_after_ms())?;
        map.serialize_entry("health", &current_health(info).map(health_word))?;
        let probe = info.probe.as_ref().map(|heard| probe_view(heard, clock::now()));
        map.serialize_entry("probe", &probe)?;
        let draining: Vec<Run> = info.view.draining.iter().map(run).collect();
        // Bytes, while it is over its limit.
        map.serialize_entry("over_memory", &over_memory(info))?;
        map.serialize_entry("draining", &draining)?;
        map.serialize_entry("rss", &numbers.rss)?;
        map.serialize_entry("pss", &numbers.pss)?;
        map.serialize_entry("processes", &numbers.processes.iter().collect::<Vec<&ProcessView>>())?;
        map.end()
    }
}

fn run(run: &RunView) -> Run {
    Run { pid: run.pid.unwrap_or(0), generation: run.id.generation.0, status: run.state.as_str() }
}
