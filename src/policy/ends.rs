//! The ends of runs: what an exit means for the slot, and for the operation that is going on.
//!
//! A run on the stop ladder ends as it was meant to. Of one that ended by itself the reload decides when it was to
//! replace another, else the restart policy (`restart`). Nothing is started here.

use std::sync::Arc;
use std::time::Duration;

use crate::model::exit::ExitReason;
use crate::model::id::InstanceId;
use crate::model::saved::Desired;

use super::admit::Kind;
use super::app::{App, Shared};
use super::instance::Phase;
use super::ledger::After;
use super::news::What;
use super::operation::Stage;
use super::restart::{Next, after_exit};
use super::slot::Rest;
use super::stop::{Cause, Ladder};
use super::vocabulary::{Action, IdleConnections, Retry, StepKind};
use super::wanted::Change;
impl App {
    /// The main process has ended.
    pub(super) fn exited(&mut self, id: &InstanceId, reason: &ExitReason, shared: &mut Shared) {
        let now = shared.now;
        let Some(state) = self.slots.get(&id.slot) else { return };
        let condemned = state.runs.iter().find(|run| run.id == *id).and_then(|run| self.condemned(run));
        let Some(run) = self.run_mut(id) else { return };
        shared.actions.extend(run.ask_no_more());
        let signal = run.spec.stop.signal;
        let ready = run.is_ready();
        let (by_itself, ladder, reason) = match &run.phase {
            Phase::Launching { .. } | Phase::Ready | Phase::Reserve => (true, None, reason.clone()),
            Phase::Stopping(ladder) if ladder.cause == Cause::NotReady => {
                (true, Some(ladder.clone()), ExitReason::NotReady)
            }
            Phase::Stopping(ladder) => {
                (false, Some(ladder.clone()), condemned.unwrap_or_else(|| reason.clone()))
            }
            // Late news of what is known.
            Phase::Queued | Phase::Leaving { .. } => return,
        };
        // SIGKILL to the tree answers with its end by itself.
        if !ladder.as_ref().is_some_and(Ladder::killed) {
            shared.actions.push(Action::EndLeftovers { id: id.clone(), signal });
        }
        let uptime = run.uptime(now);
        let (pm_id, reserve) = (run.pm_id, run.is_reserve());
        run.phase = Phase::Leaving { reason: reason.clone(), ladder };
        if ready {
            self.happened(id, pm_id, What::OutOfRotation);
        }
        self.happened(id, pm_id, What::Exited { reason: reason.clone(), by_itself, uptime });
        if reserve {
            // Its slot has another run. When that has to go back, it starts a third one.
            self.step(id, pm_id, StepKind::Failed { reason });
        } else if by_itself {
            self.ended_by_itself(id, ready, uptime, &reason, None, shared);
        } else if let Some(state) = self.slots.get_mut(&id.slot) {
            (state.last_exit, state.by_itself) = (Some(reason), false);
        }
    }

    /// There is no process and will be none.
    pub(super) fn spawn_failed(&mut self, id: &InstanceId, error: String, retry: Retry, shared: &mut Shared) {
        let Some(run) = self.run_mut(id) else { return };
        let reason = ExitReason::NotStarted(error);
        let by_itself = match &run.phase {
            Phase::Launching { .. } => true,
            Phase::Stopping(_) => run.was_not_ready(),
            Phase::Queued | Phase::Ready | Phase::Reserve | Phase::Leaving { .. } => return,
        };
        let pm_id = run.pm_id;
        run.phase = Phase::Leaving { reason: reason.clone(), ladder: None };
        if by_itself {
            self.ended_by_itself(id, false, Duration::ZERO, &reason, Some(retry), shared);
        }
        shared.actions.push(Action::Forget { id: id.clone() });
        let told = self
            .operation
            .as_ref()
            .is_some_and(|operation| operation.failure.as_ref().is_some_and(|(failed, _)| failed == id));
        if !told {
            self.step(id, pm_id, StepKind::Failed { reason });
        }
        if let Some(state) = self.slots.get_mut(&id.slot) {
            state.runs.retain(|run| run.id != *id);
        }
    }

    /// Every process of the run is gone.
    pub(super) fn tree_gone(&mut self, id: &InstanceId, shared: &mut Shared) {
        let Some(run) = self.run_mut(id) else { return };
        let Phase::Leaving { reason, ladder } = &run.phase else { return };
        let (since, killed) =
            ladder.as_ref().map_or((shared.now, false), |ladder| (ladder.since, ladder.forced()));
        let step = StepKind::Gone { after: shared.now.since(since), killed, reason: reason.clone() };
        let pm_id = run.pm_id;
        shared.actions.push(Action::Forget { id: id.clone() });
        self.step(id, pm_id, step);
        if let Some(state) = self.slots.get_mut(&id.slot) {
            state.runs.retain(|run| run.id != *id);
        }
    }

    /// A run ended that nobody had asked to: what does its slot do now, and what does that mean for the operation?
    pub(super) fn ended_by_itself(
        &mut self,
        id: &InstanceId,
        was_ready: bool,
        uptime: Duration,
        reason: &ExitReason,
        retry: Option<Retry>,
        shared: &mut Shared,
    ) {
        let slot = id.slot;
        let Some(run) = self.run(id) else { return };
        let (rules, revision, spec) = (run.spec.restart.clone(), run.revision, Arc::clone(&run.spec));
        let candidate = self.is_candidate(slot, run);
        let replaced = self.is_replaced(slot, run);
        let way_back = self.is_way_back(slot, run);
        // A release is on probation until it has the last slot, where there is a way back.
        let going = self.operation.as_ref().is_some_and(|operation| operation.stage == Stage::Going);
        let goes_back = replaced && going && self.rolls_back(shared);
        let probation = goes_back && !self.all_replaced(shared);
        let Some(state) = self.slots.get_mut(&slot) else { return };
        (state.last_exit, state.by_itself) = (Some(reason.clone()), true);
        if candidate {
            if state.has_live() {
                // Nobody saw this run do anything.
                state.restarts = state.restarts.saturating_sub(1);
            }
            // The reload decides; the slot stays as it is, with the old run or without one.
            self.fail(id, reason, shared);
            return;
        }
        if way_back {
            self.end_way_back(id, reason);
            let pm_id = self.slots.get(&slot).map(|state| state.pm_id);
            if let Some(pm_id) = pm_id {
                self.step(id, pm_id, StepKind::Failed { reason: reason.clone() });
            }
        }
        let Some(state) = self.slots.get_mut(&slot) else { return };
        if state.has_live() {
            // An old run dies beside its successor, which takes over.
            state.rest = Rest::Held;
            return;
        }
        if let Some(operation) = &self.operation
            && operation.kind == Kind::Reload
            && operation.replaced.contains(&slot)
            && operation.revision != revision
        {
            // It was to bring the release before back. What had served here last was the new one.
            (state.rest, state.ended) = (Rest::Due, None);
            return;
        }
        if let Some(operation) = &self.operation
            && operation.kind == Kind::Restart
            && operation.stage == Stage::Going
            && operation.covers(slot)
            && operation.revision > revision
        {
            // It was to go anyway, although this supervisor had not told it yet.
            state.rest = Rest::Due;
            return;
        }
        let quick = uptime < rules.min_uptime;
        let (next, streak) = after_exit(shared.now, id, uptime, reason, &rules, state.streak);
        let mut ended_well = false;
        state.rest = match (retry, next) {
            (Some(Retry::Never), _) | (_, Next::GiveUp) => Rest::Errored,
            (_, Next::StartAt(at)) => Rest::Waiting { at },
            (_, Next::Ended) => {
                ended_well =
                    reason.code().is_some_and(|code| code == 0 || rules.stop_exit_codes.contains(&code));
                state.ended = Some(revision);
                Rest::Stopped
            }
        };
        // The end of a release that its slot is not meant to run any more says nothing about the one it is.
        let outdated = self.operation.is_none()
            && shared.ledger.wanted.slot(&self.name, slot).is_some_and(|wanted| wanted.revision > revision);
        if state.rest == Rest::Stopped && outdated {
            (state.rest, state.ended) = (Rest::Due, None);
        }
        let fails = replaced && !ended_well && (probation || !was_ready || quick);
        if fails && goes_back {
            // What this release does says nothing about the one that comes back.
            (state.rest, state.ended) = (Rest::Held, None);
            self.fail(id, reason, shared);
            return;
        }
        state.streak = streak;
        let (rest, pm_id) = (state.rest, state.pm_id);
        self.happened(
            id,
            pm_id,
            match rest {
                Rest::Waiting { at } => What::RestartScheduled { delay: at.since(shared.now) },
                Rest::Due if outdated => What::RestartScheduled { delay: Duration::ZERO },
                Rest::Stopped => What::Ended { reason: reason.clone() },
                Rest::Due | Rest::Errored | Rest::Held => What::Errored { reason: reason.clone() },
            },
        );
        let given_up = rest == Rest::Errored;
        self.note_ended(shared);
        if given_up {
            self.tell_errored(slot, &spec, reason, shared);
        }
        let Some(operation) = &mut self.operation else { return };
        if ended_well {
            operation.awaiting.remove(&slot);
        } else if operation.awaiting.contains(&slot) || fails {
            self.fail(id, reason, shared);
        }
    }

    /// What ended for good is wanted no more. Said again when an operation ends that wanted it to run once more, and did
    /// not come to that.
    pub(super) fn note_ended(&self, shared: &mut Shared) {
        for (slot, state) in &self.slots {
            let wanted = shared.ledger.wanted.slot(&self.name, *slot);
            if state.rest == Rest::Stopped
                && let Some(revision) = state.ended
                && wanted.is_some_and(|wanted| wanted.desired == Desired::Running)
            {
                let change = Change::Ended { app: self.name.clone(), slot: *slot, revision };
                shared.ledger.push_regardless(change, After::Nothing);
            }
        }
    }

    /// A run was not ready in time: it goes, and its slot or its operation has failed.
    pub(super) fn not_ready(&mut self, id: &InstanceId, shared: &mut Shared) {
        // Ready at the very moment of the deadline is ready.
        self.note_ready(shared);
        if self.run_mut(id).is_none_or(|run| !matches!(run.phase, Phase::Launching { .. })) {
            return;
        }
        let before_way_back = self.run(id).is_some_and(|run| self.is_way_back(id.slot, run));
        self.stop_runs_because(id.slot, Cause::NotReady, IdleConnections::Wait, shared, |run| run.id == *id);
        let awaited = self.operation.as_ref().is_some_and(|operation| operation.awaiting.contains(&id.slot));
        let fails =
            self.run(id).is_some_and(|run| self.is_candidate(id.slot, run) || self.is_replaced(id.slot, run));
        if before_way_back {
            self.end_way_back(id, &ExitReason::NotReady);
        }
        if awaited || fails {
            self.fail(id, &ExitReason::NotReady, shared);
        }
    }
}
