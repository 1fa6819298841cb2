//! Outcomes and steps of the fleet in the words of the protocol.

use std::time::Duration;

use crate::ipc::protocol::{
    AppResult, Failure, OperationView, PlannedSlotView, Refused, ReloadPlanView, StepKind as StepWords,
    StepView,
};
use crate::model::exit::ExitReason;
use crate::model::id::{AppName, Generation, InstanceId, Slot};
use crate::model::moment::{millis, spelled};
use crate::model::saved::HookKind;
use crate::policy::reload_plan::{Course, Manner, PlannedSlot, ReloadPlan};
use crate::policy::vocabulary::{AppOutcome, Outcome, Refusal, Rollback, Step, StepKind};

/// What the texts need beyond the outcome itself.
pub trait Witness {
    /// The last lines an instance wrote.
    fn last_lines(&self, id: &InstanceId) -> Vec<String>;
    /// Why a `listen()` of an instance failed, if one did.
    fn listen_failure(&self, id: &InstanceId) -> Option<String>;
    /// The `listen_timeout` of an app.
    fn listen_timeout(&self, app: &AppName) -> Option<Duration>;
    /// What a probe of an instance heard last.
    fn last_probe(&self, id: &InstanceId) -> Option<String>;
}

/// A step in the words of the protocol.
#[must_use]
pub fn step_view(step: Step) -> StepView {
    let Step { id, pm_id, kind } = step;
    let step = match kind {
        StepKind::Queued => StepWords::Queued,
        StepKind::Launching => StepWords::Launching,
        StepKind::Spawned { pid } => StepWords::Spawned { pid },
        StepKind::Ready { after, lived } => StepWords::Ready { after_ms: millis(after), lived },
        StepKind::Soaking { after, span } => {
            StepWords::Soaking { after_ms: millis(after), span_ms: millis(span) }
        }
        StepKind::Reserved => StepWords::Reserved,
        StepKind::Restored => StepWords::Restored,
        StepKind::Draining => StepWords::Draining,
        StepKind::Signalled { signal } => StepWords::Signalled { signal: signal.to_string() },
        StepKind::Gone { after, killed, reason } => {
            StepWords::Gone { after_ms: millis(after), killed, reason: reason.to_string() }
        }
        StepKind::Failed { reason } => StepWords::Failed { reason: reason.to_string() },
        // A hook has no place of its own.
        StepKind::Hook { kind } => {
            let step = StepWords::Hook { hook: kind };
            return StepView { app: id.app, pm_id, slot: Slot(0), generation: Generation(0), step };
        }
    };
    StepView { app: id.app, pm_id, slot: id.slot, generation: id.generation, step }
}

/// A result in the words of the protocol: what was done, or why nothing was.
///
/// # Errors
/// A refusal, with its exit code.
pub fn operation_view(outcome: Outcome, witness: &impl Witness) -> Result<OperationView, Refused> {
    match outcome {
        Outcome::Done { apps } => Ok(view(true, apps, witness)),
        Outcome::Failed { apps } => Ok(view(false, apps, witness)),
        Outcome::Refused(refusal) => Err(refused(&refusal)),
    }
}

fn view(ok: bool, apps: Vec<(AppName, AppOutcome)>, witness: &impl Witness) -> OperationView {
    OperationView {
        ok,
        apps: apps.into_iter().map(|(app, outcome)| app_result(app, outcome, witness)).collect(),
    }
}

fn app_result(app: AppName, outcome: AppOutcome, witness: &impl Witness) -> AppResult {
    let done = |app, result: String, slots| AppResult { app, ok: true, result, slots, failure: None };
    let failed = |app, result: &str, failure| AppResult {
        app,
        ok: false,
        result: result.to_owned(),
        slots: 0,
        failure: Some(failure),
    };
    match outcome {
        AppOutcome::Done { what, slots } => done(app, what.to_owned(), slots),
        AppOutcome::Already { what } => done(app, format!("already {what}"), 0),
        AppOutcome::Failed { id, reason, replaced, kept, rollback } => {
            let cause = failure_cause(&id, &reason, witness.listen_timeout(&app));
            let cause = match witness.last_probe(&id).filter(|_| reason == ExitReason::NotReady) {
                Some(probe) => format!("{cause}; last probe: {probe}"),
                None => cause,
            };
            let failure = Failure {
                cause: match witness.listen_failure(&id) {
                    Some(why) => format!("{cause}: {why}"),
                    None => cause,
                },
                hint: Some(failure_hint(&app, &reason, &replaced, &kept, rollback.as_deref())),
                last_lines: witness.last_lines(&id),
                replaced,
                kept,
                restored: rollback.map(|rollback| rollback.restored).unwrap_or_default(),
            };
            failed(app, "failed", failure)
        }
        AppOutcome::HookFailed { hook, id, why, done } => {
            let failure = Failure {
                cause: format!("hook {hook} failed: {why}"),
                hint: Some(hook_hint(&app, hook, done)),
                last_lines: witness.last_lines(&id),
                replaced: Vec::new(),
                kept: Vec::new(),
                restored: Vec::new(),
            };
            failed(app, done.unwrap_or("failed"), failure)
        }
        AppOutcome::Unfit { why } => {
            let hint = format!(
                "Nothing was touched. Put that right, then run the command again; `pm describe {}` \
                 shows the paths.",
                word_of(&app)
            );
            failed(app, "refused", plain(format!("it could not be started again: {why}"), Some(&hint)))
        }
        AppOutcome::Superseded { by } => {
            let cause = format!("superseded by a {by} of the same app");
            failed(app, "superseded", plain(cause, None))
        }
        AppOutcome::Waiting { on, why } => {
            let cause = format!("not started: waiting for `{on}`, which {why}");
            let hint =
                format!("It starts by itself as soon as `{on}` is up; see `pm describe {}`.", word_of(&on));
            failed(app, "waiting", plain(cause, Some(&hint)))
        }
        AppOutcome::Skipped { on } => {
            let cause = format!("nothing was changed: it depends on `{on}`, which failed");
            failed(app, "skipped", plain(cause, Some("Put that right, then apply the file again.")))
        }
        AppOutcome::NotRemembered { what, error } => {
            let hint = "Free some space, or make the home writable. The daemon tries again every 2 s; `pm list` shows a \
                        warning until it has succeeded.";
            failed(app, what, plain(format!("{what}, but not remembered over a reboot: {error}"), Some(hint)))
        }
        AppOutcome::StillListed { error } => {
            let hint = "The list could be neither emptied nor saved elsewhere, so the next daemon, as `pm resurrect` \
                        starts one, starts it again. To begin with an empty list, free some space and run `pm kill` \
                        after that.";
            let cause = format!("stopped, but not remembered over a reboot: {error}");
            failed(app, "stopped", plain(cause, Some(hint)))
        }
        AppOutcome::NotSaved { error } => {
            let hint =
                "Nothing was changed. Free some space or make the home writable, then run the command again.";
            failed(app, "refused", plain(format!("the state cannot be saved: {error}"), Some(hint)))
        }
    }
}

fn plain(cause: String, hint: Option<&str>) -> Failure {
    Failure {
        cause,
        hint: hint.map(str::to_owned),
        last_lines: Vec::new(),
        replaced: Vec::new(),
        kept: Vec::new(),
        restored: Vec::new(),
    }
}

fn failure_cause(id: &InstanceId, reason: &ExitReason, listen_timeout: Option<Duration>) -> String {
    let slot = id.slot;
    match reason {
        ExitReason::NotReady => match listen_timeout {
            Some(limit) => format!("worker {slot} was not ready within {}", spelled(limit)),
            None => format!("worker {slot} was not ready in time"),
        },
        ExitReason::NotStarted(why) => format!("worker {slot} could not be started: {why}"),
        ExitReason::Code(code) => format!("worker {slot} exited with code {code} before it was ready"),
        ExitReason::Signal(signal) => format!("worker {slot} was ended by {signal} before it was ready"),
        ExitReason::Oom | ExitReason::Health | ExitReason::Memory | ExitReason::Unknown => {
            format!("worker {slot} ended: {reason}")
        }
    }
}

/// Names may have spaces, and what a hint says is typed as it stands.
fn word_of(app: &AppName) -> String {
    if app.as_str().contains([' ', '~']) { format!("'{app}'") } else { app.to_string() }
}

fn failure_hint(
    app: &AppName,
    reason: &ExitReason,
    replaced: &[Slot],
    kept: &[Slot],
    rollback: Option<&Rollback>,
) -> String {
    let word = word_of(app);
    let logs = match reason {
        // What never ran has no logs.
        ExitReason::NotStarted(_) if kept.is_empty() => format!("Put that right, then `pm restart {word}`."),
        ExitReason::NotStarted(_) => format!("Put that right, then `pm reload {word}`."),
        _ => format!("See `pm logs {word} --err`."),
    };
    if let Some(Rollback { restored, failed }) = rollback {
        let mut said = Vec::new();
        match failed {
            None => said.push("Rolled back: the old release serves again.".to_owned()),
            Some((id, why)) => said.push(format!("The old worker {} did not come back: {why}.", id.slot)),
        }
        if !restored.is_empty() {
            said.push(format!("Put back: {}.", workers(restored)));
        }
        if !replaced.is_empty() {
            said.push(format!("On the new release: {}.", workers(replaced)));
        }
        if failed.is_some() && !kept.is_empty() {
            said.push(format!("On the old one: {}.", workers(kept)));
        }
        said.push(logs);
        return said.join(" ");
    }
    match (replaced.is_empty(), kept.is_empty()) {
        (true, false) => format!("The old workers are still serving. {logs}"),
        (false, false) => format!(
            "Workers {} run the new release, {} still run the old one. {logs}",
            numbers(replaced),
            numbers(kept)
        ),
        (false, true) | (true, true) => logs,
    }
}

fn hook_hint(app: &AppName, hook: HookKind, done: Option<&'static str>) -> String {
    let logs = format!("See `pm logs {}`.", word_of(app));
    match (hook, done) {
        (_, Some(done)) => format!("It is {done} all the same. {logs}"),
        (HookKind::PreReload, None) => {
            format!("Nothing was changed: the old workers are still serving. {logs}")
        }
        (HookKind::PreStart | HookKind::PostStop | HookKind::OnErrored, None) => {
            format!("Nothing was started, and nothing that ran was stopped. {logs}")
        }
    }
}

fn workers(slots: &[Slot]) -> String {
    let word = if slots.len() == 1 { "worker" } else { "workers" };
    format!("{word} {}", numbers(slots))
}

fn numbers(slots: &[Slot]) -> String {
    slots.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// A plan in the words of the protocol; `fault` is why an instance could not be started now.
#[must_use]
pub fn reload_plan_view(plan: ReloadPlan, fault: Option<String>) -> ReloadPlanView {
    let ReloadPlan { app, spec, changed, course, manner, slots, given_up, .. } = plan;
    let (action, going_on) = match course {
        Course::Begins => ("reload", None),
        Course::Starts => ("start", None),
        Course::Waits(what) => ("wait", Some(what.to_owned())),
        Course::Refused(what) => ("refuse", Some(what.to_owned())),
    };
    let slot_view = |slot: PlannedSlot| PlannedSlotView {
        slot: slot.slot,
        pm_id: slot.pm_id,
        pid: slot.old.and_then(|(pid, _)| pid),
        generation: slot.old.map(|(_, generation)| generation),
        next: slot.next,
    };
    let limit = spelled(spec.ready.listen_timeout);
    let ready = if spec.ready.wait_ready {
        format!("it says that it is ready, within {limit}")
    } else if spec.ready.probe.is_some() {
        format!("its probe succeeds, within {limit}")
    } else if spec.is_node_cluster() {
        format!("it listens, within {limit}")
    } else {
        format!("it has lived for {} (min_uptime)", spelled(spec.restart.min_uptime))
    };
    ReloadPlanView {
        app,
        action: action.to_owned(),
        going_on,
        fault,
        changed,
        strategy: match manner {
            Manner::Rolling => "rolling",
            Manner::BlueGreen => "blue-green",
            Manner::InPlace => "in-place",
        }
        .to_owned(),
        downtime: manner == Manner::InPlace && slots.iter().any(|slot| slot.old.is_some()),
        slots: slots.into_iter().map(slot_view).collect(),
        given_up: given_up.into_iter().map(slot_view).collect(),
        at_once: plan.at_once,
        max_unavailable: plan.max_unavailable,
        most: plan.most,
        reserve: plan.reserve,
        max_draining: plan.max_draining,
        ready,
        min_healthy_ms: millis(spec.reload.min_healthy),
        on_failure: spec.reload.on_failure.to_string(),
    }
}

/// A refusal with its exit code.
#[must_use]
pub fn refused(refusal: &Refusal) -> Refused {
    let (code, hint) = match refusal {
        Refusal::NoSuchApp(_) => (3, Some("`pm list` shows what there is.")),
        // What ends an app cannot be aborted.
        Refusal::Busy { operation: "stop" | "delete", .. } => {
            (5, Some("Run the command again when it has ended."))
        }
        Refusal::Busy { .. } => (5, Some("Wait for it to end, or stop the app: that aborts it.")),
        Refusal::Ending => (5, Some("Run the command again when the daemon has ended.")),
        Refusal::Invalid(_) => (2, None),
    };
    Refused { code, message: refusal.to_string(), cause: None, hint: hint.map(str::to_owned) }
}
