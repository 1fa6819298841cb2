//! Who is asked how it is, and what was heard last.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::time::Duration;

use tokio::task::AbortHandle;

use super::{Run, World};
use crate::dispatch::Command;
use crate::logs::pump::Watch;
use crate::model::address::Place;
use crate::model::id::InstanceId;
use crate::model::spec::{AppSpec, Check, Probe};
use crate::policy::vocabulary::{Event, ProbeResult, ProbeRole};
use crate::supervisor::probe::{self, Finding, Subject};
use crate::sys::clock;

/// Follows what was heard at a port where a worker is one of several.
const BY_WAY_OF_THE_CLUSTER: &str = "; at that port only workers that are ready answer, whichever is free: a path alone (\"/…\") asks this very one";

/// Everything about probes. Empty, and without memory, where no app has any.
#[derive(Debug, Default)]
pub(super) struct Probes {
    asked: HashMap<InstanceId, Asked>,
    /// The last answer of each run, and how many in a row went like it.
    last: HashMap<InstanceId, Heard>,
}

/// An instance that is being asked.
#[derive(Debug)]
struct Asked {
    role: ProbeRole,
    /// `None`: the log pump answers.
    task: Option<AbortHandle>,
    /// The fleet knows that it is well.
    known_well: bool,
}

impl Drop for Asked {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

/// The last answer of an instance.
#[derive(Clone, Debug)]
pub struct Heard {
    /// What was heard.
    pub finding: Finding,
    /// How many in a row went like it, itself included.
    pub in_a_row: u32,
}

/// What an app's instances are asked for this.
const fn probe_of(spec: &AppSpec, role: ProbeRole) -> Option<&Probe> {
    match role {
        ProbeRole::Ready => spec.ready.probe.as_ref(),
        ProbeRole::Health => spec.health.as_ref(),
    }
}

impl World {
    pub(super) fn probe(&mut self, id: InstanceId, role: ProbeRole, delay: Duration) {
        let Some(run) = self.runs.get(&id) else { return };
        let Some(probe) = probe_of(&run.spec, role).cloned() else { return };
        if role == ProbeRole::Health {
            self.unwatch(&id);
        }
        let task = if matches!(probe.check, Check::Log(_)) {
            None
        } else {
            let subject = Subject {
                id: id.clone(),
                role,
                probe,
                env: run.env.clone(),
                cwd: run.spec.cwd.clone(),
                pid: run.process.map(|process| process.pid.unsigned_abs()),
                process: run.spec.process.clone(),
                group: run.group.as_ref().map(|group| group.dir().to_owned()),
                open_files: self.open_files,
            };
            Some(probe::start(subject, delay, self.inputs.clone()))
        };
        self.probes.asked.insert(id, Asked { role, task, known_well: false });
    }

    pub(super) fn stop_probing(&mut self, id: &InstanceId) {
        self.probes.asked.remove(id);
        self.unwatch(id);
    }

    fn unwatch(&self, id: &InstanceId) {
        if self.runs.get(id).is_some_and(|run| log_watch(&run.spec).is_some()) {
            self.logs.unwatch(id.clone());
        }
    }

    pub(super) fn forget_probes(&mut self, id: &InstanceId) {
        self.stop_probing(id);
        self.probes.last.remove(id);
    }

    /// What an answer means to the fleet. A success that follows a success is no news: a turn for each of a thousand
    /// healthy instances would only wear out the blob.
    pub fn probed(&mut self, answer: Finding) -> Option<Event> {
        let asked = self.probes.asked.get_mut(&answer.id).filter(|asked| asked.role == answer.role)?;
        let Finding { id, role, result, .. } = &answer;
        let event = Event::Probed { id: id.clone(), role: *role, result: *result };
        let is_news = !(asked.known_well && *result == ProbeResult::Passed);
        asked.known_well = *role == ProbeRole::Health && *result == ProbeResult::Passed;
        self.hear(answer);
        is_news.then_some(event)
    }

    fn hear(&mut self, mut answer: Finding) {
        if self.is_asked_by_way_of_the_cluster(&answer) {
            answer.text.push_str(BY_WAY_OF_THE_CLUSTER);
        }
        let before = self.probes.last.get(&answer.id);
        let same =
            before.filter(|heard| (heard.finding.role, heard.finding.result) == (answer.role, answer.result));
        let in_a_row = same.map_or(0, |heard| heard.in_a_row).saturating_add(1);
        if same.is_none() {
            tracing::info!(instance = %answer.id, role = ?answer.role, result = ?answer.result, text = answer.text, "probe");
        }
        self.probes.last.insert(answer.id.clone(), Heard { finding: answer, in_a_row });
    }

    /// Whether the port that was asked is one that this worker listens on as part of a cluster, so that another may have
    /// answered, or none could.
    fn is_asked_by_way_of_the_cluster(&self, answer: &Finding) -> bool {
        let Finding { id, role, result, .. } = answer;
        let Some(run) = self.runs.get(id).filter(|run| run.spec.is_node_cluster()) else { return false };
        let place = probe_of(&run.spec, *role).and_then(|probe| probe::place(&probe.check, &run.env).ok()?);
        let Some(Place::Tcp { port, .. }) = place else { return false };
        let listens = |run: &Run| run.open.iter().any(|open| open.query.port == Some(port.into()));
        let not_yet = (*role, *result) == (ProbeRole::Ready, ProbeResult::Failed);
        let mut others = self.runs.iter().filter(|(other, _)| other.app == id.app && *other != id);
        listens(run) && (not_yet || others.any(|(_, other)| listens(other)))
    }

    /// A line of an instance's output matched its readiness probe.
    pub(super) fn line_matched(&mut self, id: InstanceId, line: &[u8]) -> Option<Event> {
        let run = self.runs.get(&id)?;
        // A line may be read before it is known that its process was started.
        let asked = self.probes.asked.get(&id).map(|asked| asked.role);
        if asked != Some(ProbeRole::Ready) && (asked.is_some() || run.process.is_some()) {
            return None;
        }
        let Some(Check::Log(pattern)) = run.spec.ready.probe.as_ref().map(|probe| &probe.check) else {
            return None;
        };
        let (role, result) = (ProbeRole::Ready, ProbeResult::Passed);
        let line = &line[..line.len().min(probe::KEPT)];
        let text = format!("log /{pattern}/ → {}", probe::quoted(line));
        let (at, took) = (clock::now(), Duration::ZERO);
        self.hear(Finding { id: id.clone(), role, result, text, at, took });
        Some(Event::Probed { id, role, result })
    }

    /// A connection to an instance's own process goes over its channel.
    pub fn hand_probe(&self, id: InstanceId, socket: OwnedFd) {
        self.dispatch.send(Command::Probe { id, socket });
    }

    /// The last answer of a run.
    pub(super) fn last_heard(&self, id: &InstanceId) -> Option<&Heard> {
        self.probes.last.get(id)
    }
}

/// What the log pump is to look for in the output of a run that is not ready yet.
pub(super) fn log_watch(spec: &AppSpec) -> Option<Watch> {
    let probe = spec.ready.probe.as_ref()?;
    let Check::Log(pattern) = &probe.check else { return None };
    // It was compiled when the config was read.
    let regex = regex_lite::Regex::new(pattern).ok()?;
    Some(Watch::new(regex, probe.threshold))
}
