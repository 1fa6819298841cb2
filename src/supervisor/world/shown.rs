//! What there is to show about runs.

use std::time::Duration;

use super::super::launch::FIRST_FD;
use super::super::listeners;
use super::super::outcome::Witness;
use super::super::publish::{Inside, SlotInfo};
use super::{World, boot_ms_now};
use crate::logs::naming::{is_merged, log_paths};
use crate::model::id::{AppName, InstanceId};
use crate::model::moment::{Moment, millis};
use crate::policy::fleet::AppView;
use crate::policy::vocabulary::SlotView;

/// How many of the last lines a failure shows.
const LAST_LINES: usize = 24;

impl World {
    /// Whether the main process of this run has ended, and what it wrote is not all read yet.
    #[must_use]
    pub fn is_being_read(&self, id: &InstanceId) -> bool {
        self.runs.get(id).is_some_and(|run| run.end.exited)
    }

    /// What people should know about the effects.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = self.unenforced_warnings();
        let dropped = self.logs.dropped_bytes();
        if dropped > 0 {
            warnings.push(format!(
                "{dropped} bytes of log output were dropped because a log file did not take them; see {}",
                self.home.log_file().display()
            ));
        }
        warnings
    }

    /// When the machine was booted: always the same answer, so that a moment is always shown as the same time, until
    /// the wall clock is set or the machine has slept.
    pub(super) fn boot_ms(&self) -> u64 {
        let now = boot_ms_now();
        if now.abs_diff(self.boot_ms) > 1000 { now } else { self.boot_ms }
    }

    /// Everything there is to show about a slot.
    #[must_use]
    pub fn slot_info(&self, now: Moment, app: &AppView, view: SlotView) -> SlotInfo {
        let spec = &app.spec;
        let run = view.current.as_ref().and_then(|current| self.runs.get(&current.id));
        let merged = is_merged(spec);
        let paths = log_paths(&self.home.logs_dir(), &spec.name, &spec.logs, merged, view.pm_id);
        let boot_ms = self.boot_ms();
        let wall_of = |moment: Moment| boot_ms.saturating_add(moment.nanos() / 1_000_000);
        SlotInfo {
            spec: run.map_or_else(|| spec.clone(), |run| run.spec.clone()),
            revision: app.revision,
            process: run.and_then(|run| {
                let process = run.process?;
                Some((view.current.as_ref()?.id.clone(), process.pid, process.start_ticks))
            }),
            env: run.map(|run| run.env.clone()).unwrap_or_default(),
            out_file: paths.out,
            error_file: paths.err,
            pid_file: self.pid_file(&spec.name, view.pm_id),
            merged_logs: merged,
            created_ms: wall_of(view.created),
            started_ms: view.current.as_ref().map(|run| wall_of(run.since)),
            restart_in_ms: view.restart_at.map(|at| millis(at.since(now))),
            version: run.map_or_else(|| "N/A".to_owned(), |run| run.version.clone()),
            node_version: run.and_then(|run| run.node_version.clone()),
            agent: run
                .filter(|run| run.channel && run.node_version.is_some())
                .and(view.current.as_ref())
                .map(|run| run.id.clone()),
            inside: Inside::Unknown,
            username: self.username.clone(),
            unique_id: run.map(|run| run.tag.nonce.as_uuid()).unwrap_or_default(),
            listen: self.addresses(spec),
            crowd: self.crowds.get(&spec.name).copied(),
            skipped_lines: run.map_or(0, |run| run.skipped_lines),
            dropped: view.current.as_ref().map(|run| self.logs.dropped(&run.id)).unwrap_or_default(),
            probe: view.current.as_ref().and_then(|run| self.last_heard(&run.id)).cloned(),
            not_enforced: self.limits_not_enforced(spec),
            cgroup: run.and_then(|run| run.group.as_ref()).map(|group| group.dir().to_owned()),
            view,
        }
    }

    /// What to say of an app that asked the kernel for a socket it has been given.
    pub(super) fn binds_what_it_inherits(&self, id: &InstanceId) -> Option<String> {
        let lines = self.logs.last_lines(id, LAST_LINES);
        let address = listeners::bound_again(self.listeners.of(&id.app), &lines)?;
        Some(format!(
            "it seems to bind {address} itself, but that socket is open already and waits for it as descriptor {FIRST_FD} \
             (LISTEN_FDS; docs/zero-downtime.md)"
        ))
    }
}

impl Witness for World {
    fn last_lines(&self, id: &InstanceId) -> Vec<String> {
        self.logs.last_lines(id, LAST_LINES)
    }

    fn listen_failure(&self, id: &InstanceId) -> Option<String> {
        self.listen_failures.get(id).cloned().or_else(|| self.binds_what_it_inherits(id))
    }

    fn listen_timeout(&self, app: &AppName) -> Option<Duration> {
        self.listen_timeouts.get(app).copied()
    }

    fn last_probe(&self, id: &InstanceId) -> Option<String> {
        self.last_heard(id).map(|heard| heard.finding.text.clone())
    }
}
