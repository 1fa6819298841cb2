//! The control groups of runs: made before a process is in them, removed when nothing is.
//!
//! Where no group is ours to divide, instances have none, and everything else works as before: trees are found by
//! descent, session and token.

use std::collections::{BTreeSet, HashSet};

use super::super::rights::{self, RightsError};
use super::super::tag::{HomeMark, Tag};
use super::World;
use crate::keeper::wire;
use crate::model::exit::ExitReason;
use crate::model::process::Controller;
use crate::model::signal::Signal;
use crate::model::spec::AppSpec;
use crate::sys::cgroup::group::{Group, GroupError};
use crate::sys::cgroup::root::Root;
use crate::sys::child::WaitStatus;
use crate::sys::{cgroup, oom};

/// The first version of the keeper that puts a child into a control group, and knows its order and rights.
const KEEPER_KNOWS: u16 = 2;

/// A shell's exit code for a command that SIGKILL has ended.
const KILLED_BELOW_A_SHELL: i32 = 128 + 9;

/// The groups below the one that is ours to divide.
#[derive(Debug)]
pub(super) struct Groups {
    root: Option<Root>,
    keeper_version: u16,
    /// Some that were still busy when they should go.
    left: Vec<Group>,
}

impl Groups {
    pub(super) fn new(root: Option<Root>, keeper_version: u16) -> Self {
        if let Some(root) = &root {
            // Counts who is killed for lack of memory, also where nothing is limited.
            if let Err(error) = root.enable(Controller::Memory) {
                tracing::info!(root = %root.dir().display(), %error, "no memory controller for instances");
            }
            tracing::info!(root = %root.dir().display(), controllers = ?root.available(), "instances have control groups");
        }
        Self { root: root.filter(|_| keeper_version >= KEEPER_KNOWS), keeper_version, left: Vec::new() }
    }

    /// Whether the keeper knows what this app asks for.
    pub(super) fn check(&self, command: &wire::Command) -> Result<(), RightsError> {
        let asks = command.confinement != crate::sys::spawn::Confinement::NONE;
        if asks && self.keeper_version < KEEPER_KNOWS { Err(RightsError::OldKeeper) } else { Ok(()) }
    }

    /// What of an app's limits is not enforced; an error where that must not be.
    pub(super) fn unenforced(&self, spec: &AppSpec) -> Result<Vec<String>, RightsError> {
        let reasons = rights::unenforced(spec, self.root.as_ref());
        if spec.process.limits.required && !reasons.is_empty() {
            return Err(RightsError::Unenforced(reasons.join("; ")));
        }
        Ok(reasons)
    }

    /// Makes the group of a run, with what can be enforced of its limits.
    pub(super) fn create(&self, tag: &Tag, spec: &AppSpec) -> Result<Option<Group>, GroupError> {
        let Some(root) = &self.root else { return Ok(None) };
        let mut limits = spec.process.limits;
        let available = root.available();
        if !available.contains(&Controller::Memory) {
            (limits.memory_max, limits.memory_high, limits.oom_group) = (None, None, None);
        }
        if !available.contains(&Controller::Cpu) {
            limits.cpu_max = None;
        }
        if !available.contains(&Controller::Pids) {
            limits.pids_max = None;
        }
        root.create(&tag.group_name(), &limits).map(Some)
    }

    /// The group that a run was started in, if it was.
    pub(super) fn existing(&self, tag: &Tag) -> Option<Group> {
        let group = self.root.as_ref()?.group(&tag.group_name());
        group.dir().try_exists().unwrap_or(false).then_some(group)
    }

    /// The group that a run was started in; one that was started without gets one now, with all its offspring.
    fn adopt(&self, tag: &Tag, spec: &AppSpec, pid: i32) -> Option<Group> {
        let root = self.root.as_ref()?;
        let group = root.group(&tag.group_name());
        let is_there = group.dir().try_exists().unwrap_or(false);
        if is_there && group.is_populated() {
            // systemd may have had to take the controllers away, and with them the limits, while no daemon was there.
            if let Err(error) = self.create(tag, spec) {
                tracing::warn!(instance = %tag.id, %error, "limit");
            }
            return Some(group);
        }
        let group = match self.create(tag, spec) {
            Ok(group) => group?,
            Err(error) => {
                tracing::warn!(instance = %tag.id, %error, "taken over without a control group");
                return is_there.then_some(group);
            }
        };
        for member in cgroup::family(&[pid]).unwrap_or_default() {
            // One that has ended meanwhile needs no group.
            let _ = group.take(member);
        }
        Some(group)
    }

    /// Removes a group of a run that is over.
    pub(super) fn remove(&mut self, group: Option<Group>) {
        self.left.extend(group);
        self.left.retain(|group| !group.remove());
    }

    /// Ends what is in groups of this home that nobody knows: keeper and supervisor were killed together.
    pub(super) fn sweep(&mut self, mark: HomeMark, known: &HashSet<String>) {
        let Some(root) = &self.root else { return };
        for name in root.groups().unwrap_or_default() {
            if !mark.made_group(&name) || known.contains(&name) {
                continue;
            }
            let group = root.group(&name);
            if group.is_populated() {
                tracing::warn!(group = name, "left by an earlier daemon, ended");
                let _ = group.kill();
            }
            self.left.push(group);
        }
        self.left.retain(|group| !group.remove());
    }
}

impl World {
    /// The group of a run that an earlier supervisor started.
    pub(super) fn adopt_group(&self, tag: &Tag, spec: &AppSpec, pid: u32) -> Option<Group> {
        self.groups.adopt(tag, spec, pid.cast_signed())
    }

    /// The groups of runs that nobody knows any more go.
    pub(super) fn sweep_groups(&mut self) {
        let known = self.runs.values().map(|run| run.tag.group_name()).collect();
        self.groups.sweep(self.mark, &known);
    }

    /// What of running apps' limits is not enforced, a line for each app and reason.
    pub(super) fn unenforced_warnings(&self) -> Vec<String> {
        let limited =
            self.runs.iter().filter(|(id, run)| !id.slot.is_hook() && run.spec.process.limits.any());
        let lines = limited.flat_map(|(id, run)| {
            self.limits_not_enforced(&run.spec).into_iter().map(move |reason| format!("{}: {reason}", id.app))
        });
        lines.collect::<BTreeSet<String>>().into_iter().collect()
    }

    /// What of an app's limits is not enforced here, for people.
    pub(super) fn limits_not_enforced(&self, spec: &AppSpec) -> Vec<String> {
        rights::unenforced(spec, self.groups.root.as_ref())
    }
}

/// How a run ended. `killed`: by us.
pub(super) fn reason_of(status: WaitStatus, pid: u32, group: Option<&Group>, killed: bool) -> ExitReason {
    let reason = match (status.code(), status.signal().and_then(Signal::from_number)) {
        (Some(code), _) => ExitReason::Code(code),
        (None, Some(signal)) => ExitReason::Signal(signal),
        (None, None) => ExitReason::Unknown,
    };
    let by_kill = match &reason {
        ExitReason::Signal(signal) => signal.number() == 9,
        ExitReason::Code(code) => *code == KILLED_BELOW_A_SHELL,
        _ => false,
    };
    if killed || !by_kill {
        return reason;
    }
    let ran_out = match group.and_then(Group::oom_kills) {
        Some(count) => count > 0,
        None => oom::took(pid),
    };
    if ran_out { ExitReason::Oom } else { reason }
}
