//! The way back of a reload that has failed: the old release serves again in every slot, as far as there is one to go
//! back to.
//!
//! ```text
//!  slot has its old run still        ─► nothing to do
//!  old run is in reserve             ─► into rotation at once, then the new one leaves by the ladder
//!  old run is gone                   ─► started again from the files it was started from, then the new one leaves
//!  the files have changed, or it does not get ready ─► the way back ends here: what serves goes on serving
//! ```
//!
//! Starting again is a reload with the releases in exchanged parts, and keeps the same promises.

use std::sync::Arc;

use crate::model::exit::ExitReason;
use crate::model::id::{InstanceId, Slot};
use crate::model::spec::OnFailure;

use super::app::{App, Shared};
use super::instance::{Run, START_SETTLE};
use super::operation::Stage;
use super::reload::{Move, NewRun, OldRun, SlotPicture, moves};
use super::rolling::old_run;
use super::slot::Rest;
use super::vocabulary::IdleConnections;
use super::wanted::{Change, spec_of};

impl App {
    /// Whether the reload that is going on goes back when it fails.
    pub(super) fn rolls_back(&self, shared: &Shared) -> bool {
        let saved = shared.ledger.wanted.app(&self.name);
        saved.is_some_and(|saved| saved.spec.reload.on_failure == OnFailure::Rollback)
    }

    /// The first steps back: who is in reserve serves again.
    pub(super) fn begin_rollback(&mut self, shared: &mut Shared) {
        let had = self.had_before(shared);
        let Some(saved) = shared.ledger.wanted.app(&self.name) else { return };
        let Some(operation) = &self.operation else { return };
        let failed = operation.revision;
        for slot in self.covered(operation, saved) {
            let Some(operation) = &mut self.operation else { return };
            if slot.0 >= had {
                operation.settled.insert(slot);
                continue;
            }
            if operation.replaced.contains(&slot) {
                if self.put_back(slot, shared) {
                    if let Some(operation) = &mut self.operation {
                        operation.replaced.remove(&slot);
                        operation.restored.insert(slot);
                        operation.back.insert(slot);
                    }
                    self.stop_runs(slot, IdleConnections::Wait, shared, |run| run.revision == failed);
                }
                self.hold(slot);
                continue;
            }
            let Some(state) = self.slots.get(&slot) else { continue };
            let old_lives = state.runs.iter().any(|run| run.revision != failed && run.is_live());
            // An old run that died by itself is upkeep's.
            if old_lives || state.rest != Rest::Held {
                operation.settled.insert(slot);
            }
        }
        if let Some(operation) = &mut self.operation {
            operation.rolling_back = true;
        }
    }

    /// Takes a rollback as far as the promises of a reload allow; when nothing more can be done, the state of things is
    /// saved.
    pub(super) fn drive_rollback(&mut self, shared: &mut Shared) -> bool {
        let Some(operation) = &self.operation else { return false };
        let Some(saved) = shared.ledger.wanted.app(&self.name) else { return false };
        let failed = operation.revision;
        let is_old = |run: &Run| run.revision != failed && run.is_live();
        let covered = self.covered(operation, saved);
        let mut pending = Vec::new();
        for &slot in covered.iter().filter(|slot| !operation.settled.contains(slot)) {
            let Some(state) = self.slots.get(&slot) else { continue };
            let new = match state.runs.iter().find(|run| is_old(run)) {
                _ if operation.back.contains(&slot) => NewRun::Serving,
                Some(run) if run.is_ready() => NewRun::Serving,
                Some(_) => NewRun::Launching,
                None => NewRun::None,
            };
            let old = state.runs.iter().filter(|run| !is_old(run)).map(old_run).max();
            pending.push(SlotPicture { slot, new, old: old.unwrap_or(OldRun::Gone) });
        }
        // Whoever did not replace anything, and whoever was replaced again, has to be gone; so does what the reload had
        // sent away before, or old generations would pile up behind failed reloads.
        let gone = self.slots.iter().filter(|(slot, _)| operation.covers(**slot)).all(|(slot, state)| {
            let stays = operation.replaced.contains(slot);
            state.runs.iter().all(|run| run.ladder().is_none() && (stays || run.revision != failed))
        });
        let leaves = |slot: &SlotPicture| !matches!(slot.old, OldRun::Serving | OldRun::Launching);
        let back = pending.iter().all(|slot| slot.new == NewRun::Serving && leaves(slot));
        let ends_here = operation.way_back_ends.is_some()
            && pending.iter().all(|slot| match slot.new {
                NewRun::Launching => false,
                NewRun::Serving => leaves(slot),
                NewRun::None | NewRun::Soaking | NewRun::Lost => true,
            });
        if gone && (back || ends_here) {
            let mut replaced = operation.replaced.clone();
            if !ends_here {
                // What only the failed release asked for goes when the others are back.
                let had = self.had_before(shared);
                replaced.retain(|slot| slot.0 < had);
            }
            self.close(Change::Revert { app: self.name.clone(), replaced }, shared);
            return false;
        }
        let may_launch = operation.way_back_ends.is_none();
        let picture = self.picture_of(saved, self.had_before(shared), pending);
        let overlap = picture.overlap;
        let saved = saved.clone();
        let mut moved = false;
        for one in moves(&picture) {
            match one {
                Move::Launch(slot) if may_launch => moved |= self.launch_again(slot, &saved, shared),
                Move::TakeDown(slot) if may_launch || picture.serves(slot) => {
                    self.hold(slot);
                    let idle = if overlap { IdleConnections::Wait } else { IdleConnections::Close };
                    self.stop_runs(slot, idle, shared, |run| run.revision == failed);
                    moved = true;
                }
                Move::Launch(_) | Move::TakeDown(_) | Move::Keep(_) | Move::GiveUp(_) => {}
            }
        }
        moved
    }

    /// The release before is started once more, from the files it had.
    fn launch_again(
        &mut self,
        slot: Slot,
        saved: &crate::model::saved::SavedApp,
        shared: &mut Shared,
    ) -> bool {
        self.hold(slot);
        let Some(wanted) = saved.slots.get(slot.0 as usize) else { return false };
        let old = saved.previous.as_ref().map_or(saved.revision, |(_, revision)| *revision);
        let revision = if wanted.before == 0 { old } else { wanted.before };
        let spec = Arc::clone(spec_of(saved, revision));
        // Its predecessor of the same release may still be leaving, with the port that it needs.
        let failed = saved.revision;
        let leaving = self
            .slots
            .get(&slot)
            .is_some_and(|state| state.runs.iter().any(|run| run.revision != failed && run.lingers()));
        if leaving && !spec.can_overlap() {
            return false;
        }
        // A release that has served before need not prove itself where nothing is left to go back to.
        let settle = if spec.can_overlap() { spec.restart.min_uptime } else { START_SETTLE };
        let again = self.operation.as_ref().and_then(|operation| operation.from.get(&slot)).cloned();
        if !self.launch(slot, spec, revision, settle, shared) {
            return false;
        }
        if let Some(run) = self.slots.get_mut(&slot).and_then(|state| state.runs.last_mut()) {
            run.again = again;
        }
        true
    }

    /// Whether this run is to bring the release before back, and has not yet.
    pub(super) fn is_way_back(&self, slot: Slot, run: &Run) -> bool {
        self.operation.as_ref().is_some_and(|operation| {
            operation.stage == Stage::Undoing
                && operation.rolling_back
                && operation.covers(slot)
                && !operation.settled.contains(&slot)
                && !operation.back.contains(&slot)
                && run.revision != operation.revision
        })
    }

    /// The release before does not come back either: what serves now goes on serving.
    pub(super) fn end_way_back(&mut self, id: &InstanceId, reason: &ExitReason) {
        if let Some(operation) = &mut self.operation {
            operation.settled.insert(id.slot);
            operation.way_back_ends.get_or_insert_with(|| (id.clone(), reason.clone()));
        }
    }
}
