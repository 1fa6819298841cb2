//! What a person would see of the world.

use super::*;

impl World {
    pub(super) fn rows(&self, app: &str) -> Vec<SlotView> {
        let view = self.fleet.as_ref().and_then(|fleet| fleet.app(&name(app)));
        view.map(|view| view.slots).unwrap_or_default()
    }

    /// The exit code of a daemon in the foreground, if it would end now.
    pub(crate) fn exit_code(&self) -> Option<u8> {
        Some(pm::policy::finished::exit_code(&self.fleet.as_ref()?.finished()?))
    }

    pub(crate) fn healths(&self, app: &str) -> Vec<Option<Health>> {
        self.rows(app).iter().map(|row| row.current.as_ref().and_then(|run| run.health)).collect()
    }

    pub(crate) fn over_memory(&self, app: &str) -> Vec<Option<u64>> {
        self.rows(app).iter().map(|row| row.current.as_ref().and_then(|run| run.over_memory)).collect()
    }

    pub(crate) fn online_count(&self, app: &str) -> usize {
        self.rotation.iter().filter(|id| id.app == name(app)).count()
    }

    pub(crate) fn unstable(&self, app: &str) -> Vec<u32> {
        self.rows(app).iter().map(|row| row.unstable).collect()
    }

    pub(crate) fn restarts(&self, app: &str) -> Vec<u32> {
        self.rows(app).iter().map(|row| row.restarts).collect()
    }

    pub(crate) fn last_exit(&self, app: &str, slot: usize) -> Option<ExitReason> {
        self.rows(app).get(slot).and_then(|row| row.last_exit.clone())
    }

    /// How a request ended, if it has.
    pub(crate) fn answer(&self, op: OpId) -> Option<&Outcome> {
        self.outcomes.iter().find(|(one, _)| *one == op).map(|(_, outcome)| outcome)
    }

    pub(crate) fn pids(&self, app: &str) -> Vec<u32> {
        self.procs
            .iter()
            .filter(|(id, proc)| id.app == name(app) && proc.alive())
            .filter_map(|(_, p)| p.pid)
            .collect()
    }

    /// What a person would see.
    pub(crate) fn picture(&self, app: &str) -> String {
        let mut text = String::new();
        let Some(view) = self.fleet.as_ref().and_then(|fleet| fleet.app(&name(app))) else {
            return String::from("unknown");
        };
        for slot in &view.slots {
            let run = slot.current.as_ref().and_then(|run| self.procs.get(&run.id));
            let version = run.map_or(String::new(), |proc| format!(" v{}", proc.version));
            let separator = if text.is_empty() { "" } else { " | " };
            write!(text, "{separator}{}: {}{version}", slot.slot, slot.status).unwrap();
            for other in &slot.draining {
                let version = self.procs.get(&other.id).map_or(0, |proc| proc.version);
                let state = match other.state {
                    RunState::Reserve | RunState::Soaking => other.state.as_str(),
                    _ => other.status.as_str(),
                };
                write!(text, " + {state} v{version}").unwrap();
            }
        }
        text
    }

    /// How the last request ended.
    pub(crate) fn last(&self) -> String {
        let Some(op) = self.last_op else { return String::from("nothing asked") };
        let Some((_, outcome)) = self.outcomes.iter().find(|(one, _)| *one == op) else {
            return String::from("no reply");
        };
        let of_app = |outcome: &AppOutcome| match outcome {
            AppOutcome::Done { what, .. } => (*what).to_owned(),
            AppOutcome::Already { what } => format!("already {what}"),
            AppOutcome::Failed { id, reason, replaced, kept, rollback } => {
                let mut text =
                    format!("failed: {} {reason}, {} replaced, {} kept", id.slot, replaced.len(), kept.len());
                if let Some(Rollback { restored, failed }) = rollback.as_deref() {
                    write!(text, ", {} restored", restored.len()).unwrap();
                    if let Some((id, reason)) = failed {
                        write!(text, ", {} did not come back: {reason}", id.slot).unwrap();
                    }
                }
                text
            }
            AppOutcome::HookFailed { hook, why, done, .. } => {
                format!("{}hook {hook} failed: {why}", done.map_or(String::new(), |done| format!("{done}, ")))
            }
            AppOutcome::Unfit { why } => format!("unfit: {why}"),
            AppOutcome::Superseded { by } => format!("superseded by {by}"),
            AppOutcome::Waiting { on, why } => format!("waiting for {on}, which {why}"),
            AppOutcome::Skipped { on } => format!("skipped after {on}"),
            AppOutcome::NotRemembered { what, .. } => format!("{what}, not remembered"),
            AppOutcome::StillListed { .. } => String::from("stopped, still listed"),
            AppOutcome::NotSaved { .. } => String::from("not saved"),
        };
        match outcome {
            Outcome::Done { apps } | Outcome::Failed { apps } => {
                apps.iter().map(|(_, outcome)| of_app(outcome)).collect::<Vec<_>>().join(", ")
            }
            Outcome::Refused(refusal) => format!("refused: {refusal}"),
        }
    }

    #[track_caller]
    pub(crate) fn check(&self, app: &str, expected: &str) {
        self.expect_no_breach();
        let seen = format!("{} | {}", self.picture(app), self.last());
        assert_eq!(seen, expected, "\n{}", self.log.join("\n"));
    }

    #[track_caller]
    pub(crate) fn expect_no_breach(&self) {
        if let Some(Broken(why)) = &self.broken {
            panic!("{why}\n{}", self.log.join("\n"));
        }
    }
}
