//! Answers to questions: the table, the details, the list in PM2's form.
//!
//! A thread of its own, because a sampling pass over a thousand process trees takes milliseconds that neither a
//! connection nor a restart should wait for. The driver hands over plain values; this thread never touches the fleet.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use super::details::Details;
use super::handle::Replies;
use super::jlist;
use super::probe::Finding;
use super::variables::Variables;
use super::world::Heard;
use crate::ipc::protocol::{
    Answer, DrainingView, HostView, InstanceDetail, ListView, ProbeView, ProcessView, Reply, Row,
};
use crate::logs::journal::Dropped;
use crate::metrics::host::HostSampler;
use crate::metrics::sample::Sampler;
use crate::model::exit::ExitReason;
use crate::model::figures::NodeFigures;
use crate::model::id::InstanceId;
use crate::model::mask::{self, ShowEnv, shown};
use crate::model::moment::{Moment, millis};
use crate::model::process::{rounded_size, size};
use crate::model::spec::{AppSpec, Balance, Runtime};
use crate::model::status::Status;
use crate::policy::vocabulary::{Health, ProbeResult, ProbeRole, RunState, RunView, SlotView};
use crate::sys::clock;

/// Everything the driver knows about a slot.
#[derive(Clone, Debug)]
pub struct SlotInfo {
    /// What it runs.
    pub spec: Arc<AppSpec>,
    /// The revision of that spec.
    pub revision: u64,
    /// What the fleet says.
    pub view: SlotView,
    /// The current run's main process: pid and start ticks.
    pub process: Option<(InstanceId, i32, u64)>,
    /// The environment of the current run.
    pub env: Variables,
    /// Standard output.
    pub out_file: PathBuf,
    /// Standard error.
    pub error_file: PathBuf,
    /// The pid file.
    pub pid_file: PathBuf,
    /// One pair of files for all instances.
    pub merged_logs: bool,
    /// Milliseconds since 1970.
    pub created_ms: u64,
    /// Milliseconds since 1970.
    pub started_ms: Option<u64>,
    /// Until the next start.
    pub restart_in_ms: Option<u64>,
    /// From the app's package.json, or "N/A".
    pub version: String,
    /// The version of Node the agent reported.
    pub node_version: Option<String>,
    /// The current run, where it has an agent that has been heard of.
    pub agent: Option<InstanceId>,
    /// What that agent has measured.
    pub inside: Inside,
    /// Who runs it.
    pub username: String,
    /// Differs for each run.
    pub unique_id: String,
    /// Addresses it is known to listen on.
    pub listen: Vec<String>,
    /// The client address that makes most of the app's connections, where that counts.
    pub crowd: Option<IpAddr>,
    /// What its log files did not take since it began.
    pub dropped: Dropped,
    /// What a probe of the current run heard last.
    pub probe: Option<Heard>,
    /// Messages of the current run that were too long to be read.
    pub skipped_lines: u64,
    /// Limits that are not enforced here, and why.
    pub not_enforced: Vec<String>,
    /// The control group of the current run.
    pub cgroup: Option<PathBuf>,
}

impl SlotInfo {
    /// The main process of the current run.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.view.current.as_ref().and_then(|run| run.pid)
    }

    /// From spawn to ready.
    #[must_use]
    pub fn ready_after_ms(&self) -> Option<u64> {
        let run = self.view.current.as_ref()?;
        Some(millis(run.ready_at?.since(run.since)))
    }
}

/// What is known of the inside of a process.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Inside {
    /// There is no agent in it, or nobody has asked.
    #[default]
    Unknown,
    /// Its agent did not answer in time: the event loop is busy.
    Silent,
    /// This.
    Known(NodeFigures),
}

impl Inside {
    /// The figures.
    #[must_use]
    pub const fn figures(&self) -> Option<&NodeFigures> {
        match self {
            Self::Known(figures) => Some(figures),
            Self::Unknown | Self::Silent => None,
        }
    }
}

/// What was measured for a slot.
#[derive(Clone, Debug, Default)]
pub struct Numbers {
    /// Percent of one core.
    pub cpu: Option<f64>,
    /// Bytes.
    pub memory: Option<u64>,
    /// Bytes.
    pub rss: Option<u64>,
    /// Bytes.
    pub pss: Option<u64>,
    /// One by one.
    pub processes: Vec<ProcessView>,
}

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Question {
    /// The table.
    List {
        /// With what agents have measured.
        figures: bool,
    },
    /// Everything.
    Describe(ShowEnv),
    /// PM2's form.
    Jlist(ShowEnv),
}

/// A question with everything needed to answer it.
#[derive(Debug)]
pub struct Job {
    /// What is asked.
    pub question: Question,
    /// About which slots.
    pub slots: Vec<SlotInfo>,
    /// What people should know.
    pub warnings: Vec<String>,
    /// When it was asked.
    pub now: Moment,
    /// Where the answer goes.
    pub replies: Replies,
}

/// Hands questions to the thread.
#[derive(Clone, Debug)]
pub struct Publisher {
    jobs_tx: Sender<Job>,
}

impl Publisher {
    /// Starts the thread. Numbers of process trees are found below `keeper`.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(keeper: i32) -> std::io::Result<Self> {
        let (jobs_tx, jobs_rx) = channel();
        thread::Builder::new().name("publisher".into()).spawn(move || run(keeper, &jobs_rx))?;
        Ok(Self { jobs_tx })
    }

    /// Asks; the answer goes to the job's `replies`.
    pub fn ask(&self, job: Job) {
        // The thread lives as long as this sender.
        let _ = self.jobs_tx.send(job);
    }
}

fn run(keeper: i32, jobs_rx: &Receiver<Job>) {
    let mut sampler = Sampler::new();
    let mut details = Details::default();
    let mut host =
        HostSampler::new(clock::now()).inspect_err(|error| tracing::warn!(%error, "cannot read /proc")).ok();
    while let Ok(job) = jobs_rx.recv() {
        let instances: Vec<(InstanceId, i32, u64)> =
            job.slots.iter().filter_map(|slot| slot.process.clone()).collect();
        let usage = sampler.sample(clock::now(), keeper, &instances).unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot measure processes");
            HashMap::new()
        });
        let mut numbers: Vec<Numbers> = job
            .slots
            .iter()
            .map(|slot| {
                let usage = slot.process.as_ref().and_then(|(id, ..)| usage.get(id));
                Numbers {
                    cpu: usage.map(|usage| round(usage.cpu_percent)),
                    memory: usage.map(|usage| usage.memory),
                    ..Numbers::default()
                }
            })
            .collect();
        let answer = match job.question {
            Question::List { .. } => Answer::List(ListView {
                rows: job
                    .slots
                    .iter()
                    .zip(&numbers)
                    .map(|(slot, numbers)| row(slot, numbers, job.now))
                    .collect(),
                host: host.as_mut().map_or_else(HostView::default, host_view),
                warnings: job.warnings,
            }),
            Question::Describe(show) => {
                Details::add_all(&mut sampler, &job.slots, &mut numbers);
                Answer::Describe(
                    job.slots
                        .iter()
                        .zip(numbers)
                        .map(|(slot, numbers)| {
                            let mut detail = detail(slot, numbers, show, job.now);
                            detail.notes.extend(job.warnings.iter().cloned());
                            detail
                        })
                        .collect(),
                )
            }
            Question::Jlist(show) => {
                details.add_some(&mut sampler, &job.slots, &mut numbers);
                Answer::Raw(jlist::render(&job.slots, &numbers, show))
            }
        };
        // The client may have gone.
        let _ = job.replies.send(Reply::Answer(answer));
    }
}

pub(super) fn round(percent: f64) -> f64 {
    (percent * 10.0).round() / 10.0
}

fn host_view(sampler: &mut HostSampler) -> HostView {
    let Ok(host) = sampler.sample(clock::now()) else { return HostView::default() };
    HostView {
        cpu: round(host.cpu_percent),
        cores: u32::try_from(host.cpus).unwrap_or(u32::MAX),
        load: host.load,
        memory_used: host.memory_used,
        memory_total: host.memory_total,
    }
}

fn row(slot: &SlotInfo, numbers: &Numbers, now: Moment) -> Row {
    let current = slot.view.current.as_ref();
    let runs = matches!(slot.view.status, Status::Online | Status::Launching | Status::Stopping);
    Row {
        pm_id: slot.view.pm_id,
        app: slot.spec.name.clone(),
        namespace: slot.spec.namespace.clone(),
        slot: slot.view.slot,
        generation: current.map(|run| run.id.generation),
        mode: slot.spec.mode.as_str().into(),
        pid: slot.pid(),
        uptime_ms: current.filter(|run| runs && run.pid.is_some()).map(|run| millis(now.since(run.since))),
        restarts: slot.view.restarts,
        status: slot.view.status,
        unhealthy: current_health(slot) == Some(Health::Unhealthy),
        note: note(slot, now),
        cpu: numbers.cpu,
        memory: numbers.memory,
        listen: slot.listen.clone(),
        figures: slot.inside.figures().cloned(),
    }
}

fn note(slot: &SlotInfo, now: Moment) -> Option<String> {
    let mut notes = Vec::new();
    let view = &slot.view;
    match view.status {
        Status::Launching if view.current.as_ref().is_some_and(|run| run.queued) => {
            notes.push("queued".to_owned());
        }
        Status::Launching if !view.waiting_for.is_empty() => {
            let names: Vec<&str> = view.waiting_for.iter().map(|app| app.as_str()).collect();
            notes.push(format!("waiting for {}", names.join(", ")));
        }
        Status::WaitingRestart => {
            if let Some(at) = view.restart_at {
                notes.push(format!("restart in {}", seconds(at.since(now))));
            }
            notes.extend(view.last_exit.as_ref().map(ToString::to_string));
        }
        Status::Errored => notes.extend(view.last_exit.as_ref().map(ToString::to_string)),
        // How a run ended that was asked to end is no news.
        Status::Stopped if !view.by_itself => {}
        Status::Stopped => {
            notes.extend(
                view.last_exit.as_ref().filter(|exit| **exit != ExitReason::Code(0)).map(ToString::to_string),
            );
        }
        Status::Stopping => {
            if let Some(at) = view.current.as_ref().and_then(|run| run.kill_at) {
                notes.push(format!("killed in {}", seconds(at.since(now))));
            }
        }
        Status::Launching | Status::Online => {}
    }
    let heard = || slot.probe.as_ref().map(|heard| heard.finding.text.as_str()).unwrap_or_default();
    match current_health(slot) {
        Some(Health::Unhealthy) => {
            notes.push(format!("unhealthy: {}", heard()));
            if let Some(at) = view.replace_after {
                notes.push(format!("not replaced again for {}", seconds(at.since(now))));
            }
        }
        Some(Health::Failing { failed }) => notes.push(format!("health check failed {failed}×: {}", heard())),
        Some(Health::Unknown | Health::Healthy) | None => {}
    }
    if let (Some(bytes), Some(limit)) = (over_memory(slot), slot.spec.max_memory) {
        notes.push(format!("uses {}, over its limit of {}", rounded_size(bytes), size(limit)));
        if let Some(at) = view.curb_after {
            notes.push(format!("not replaced again for {}", seconds(at.since(now))));
        }
    }
    let are = |states: &[RunState]| view.draining.iter().filter(|run| states.contains(&run.state)).count();
    let left = view.draining.iter().filter_map(|run| run.kill_at).max();
    match (are(&[RunState::Draining, RunState::Stopping]), left) {
        (0, _) => {}
        (count, Some(at)) => notes.push(format!("draining {count} ({} left)", seconds(at.since(now)))),
        (count, None) => notes.push(format!("draining {count}")),
    }
    for (count, words) in [
        (are(&[RunState::Reserve]), "in reserve"),
        (are(&[RunState::Queued, RunState::Launching]), "launching"),
        (are(&[RunState::Soaking]), "on probation"),
    ] {
        if count > 0 {
            notes.push(format!("{count} {words}"));
        }
    }
    (!notes.is_empty()).then(|| notes.join(", "))
}

fn seconds(span: Duration) -> String {
    if span < Duration::from_secs(1) {
        format!("{} ms", span.as_millis())
    } else {
        format!("{} s", span.as_secs())
    }
}

fn detail(slot: &SlotInfo, numbers: Numbers, show: ShowEnv, now: Moment) -> InstanceDetail {
    let env: BTreeMap<String, String> =
        slot.env.iter().map(|(key, value)| (key.to_owned(), shown(key, value, show).to_owned())).collect();
    InstanceDetail {
        row: row(slot, &numbers, now),
        spec: mask::spec(&slot.spec, show),
        revision: slot.revision,
        out_file: slot.out_file.clone(),
        error_file: slot.error_file.clone(),
        created_ms: slot.created_ms,
        started_ms: slot.started_ms,
        ready_after_ms: slot.ready_after_ms(),
        unstable: slot.view.unstable,
        last_exit: slot.view.last_exit.as_ref().map(ToString::to_string),
        pss: numbers.pss,
        rss: numbers.rss,
        processes: numbers.processes,
        draining: slot.view.draining.iter().map(|run| draining(run, now)).collect(),
        env,
        probe: slot.probe.as_ref().map(|heard| probe_view(heard, now)),
        health: current_health(slot).map(|health| health_word(health).to_owned()),
        notes: notes(slot),
        node_version: slot.node_version.clone(),
    }
}

/// The current run's health.
pub(super) fn current_health(slot: &SlotInfo) -> Option<Health> {
    slot.view.current.as_ref().filter(|run| run.status == Status::Online)?.health
}

/// What the current run uses, while that is more than it may.
pub(super) fn over_memory(slot: &SlotInfo) -> Option<u64> {
    slot.view.current.as_ref().filter(|run| run.status == Status::Online)?.over_memory
}

/// One word for it.
pub(super) const fn health_word(health: Health) -> &'static str {
    match health {
        Health::Unknown => "unknown",
        Health::Healthy => "healthy",
        Health::Failing { .. } => "failing",
        Health::Unhealthy => "unhealthy",
    }
}

/// What a probe heard last.
pub(super) fn probe_view(heard: &Heard, now: Moment) -> ProbeView {
    let Finding { role, result, text, at, took, .. } = &heard.finding;
    ProbeView {
        role: match role {
            ProbeRole::Ready => "ready".to_owned(),
            ProbeRole::Health => "health".to_owned(),
        },
        ok: *result == ProbeResult::Passed,
        text: text.clone(),
        ago_ms: millis(now.since(*at)),
        took_ms: millis(*took),
        in_a_row: heard.in_a_row,
    }
}

fn draining(run: &RunView, now: Moment) -> DrainingView {
    DrainingView {
        generation: run.id.generation,
        pid: run.pid,
        kill_in_ms: run.kill_at.map(|at| millis(at.since(now))),
        state: run.state.as_str().to_owned(),
    }
}

/// Behind a proxy every client has one address.
fn crowd(slot: &SlotInfo) -> Option<String> {
    let address = slot.crowd.filter(|_| slot.spec.balance == Balance::Sticky)?;
    Some(format!(
        "more than 80% of the connections come from {address}, and all of these go to one worker: behind a proxy use \
         another balance, and let the proxy do what sticky is for"
    ))
}

fn notes(slot: &SlotInfo) -> Vec<String> {
    let spec = &slot.spec;
    let mut notes = Vec::new();
    if slot.inside == Inside::Silent {
        notes.push("the agent did not answer: the event loop is busy, or stopped".to_owned());
    }
    if !spec.can_overlap() {
        notes.push(
            "reload restarts in place, with downtime: set `listen` and take the socket from LISTEN_FDS, or use cluster mode"
                .to_owned(),
        );
    }
    if !spec.agent && spec.command.runtime == Runtime::Node {
        notes.push(
            "agent = false: weaker is promise 1, a reload loses nothing: keep-alive connections, HTTP/2 sessions and \
             websockets are not told to close before the kill signal, and without a handler for it requests in flight \
             may be cut; heap, event loop and HTTP figures are missing"
                .to_owned(),
        );
    }
    if spec.is_node_cluster() && spec.balance == Balance::LeastConnections && !spec.has_agent() {
        notes.push(
            "least-connections needs the agent, which is not there: connections go by turns".to_owned(),
        );
    }
    notes.extend(crowd(slot));
    if slot.skipped_lines > 0 {
        notes.push(format!(
            "{} messages of more than 16 MiB that it sent with process.send were not read",
            slot.skipped_lines
        ));
    }
    let Dropped { bytes, lines } = slot.dropped;
    if bytes > 0 {
        notes.push(format!(
            "{lines} lines ({bytes} bytes) of its output were dropped, because the disk of its log files was full or too \
             slow; log_overflow = \"block\" would let it wait"
        ));
    }
    notes.extend(slot.not_enforced.iter().cloned());
    notes.extend(slot.cgroup.iter().map(|dir| format!("control group {}", dir.display())));
    notes
}
