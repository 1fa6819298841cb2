//! A reload at work: takes the moves of `reload`, and takes everything back when a new run has failed.

use std::sync::Arc;

use crate::model::id::Slot;
use crate::model::saved::{Desired, SavedApp};

use super::app::{App, Shared};
use super::instance::Run;
use super::operation::Operation;
use super::reload::{Move, NewRun, OldRun, Picture, SlotPicture, moves};
use super::slot::Rest;
use super::stop::Cause;
use super::vocabulary::IdleConnections;
use super::wanted::Change;
impl App {
    /// Takes a reload as far as its promises allow.
    pub(super) fn drive_reload(&mut self, shared: &mut Shared) -> bool {
        let Some(operation) = &self.operation else { return false };
        let Some(saved) = shared.ledger.wanted.app(&self.name) else { return false };
        let (spec, revision) = (Arc::clone(&saved.spec), operation.revision);
        let picture = self.picture(operation, saved);
        let over = |slot: &SlotPicture| slot.new == NewRun::Serving && slot.old == OldRun::Gone;
        if picture.slots.iter().all(over) {
            self.close(Change::Finish { app: self.name.clone() }, shared);
            return false;
        }
        let mut moved = false;
        for one in moves(&picture) {
            match one {
                Move::Launch(slot) => {
                    if let Some(state) = self.slots.get_mut(&slot) {
                        state.rest = Rest::Held;
                    }
                    let settle = spec.restart.min_uptime;
                    moved |= self.launch(slot, Arc::clone(&spec), revision, settle, shared);
                }
                Move::TakeDown(slot) => {
                    if let Some(state) = self.slots.get_mut(&slot) {
                        state.rest = Rest::Held;
                    }
                    let idle = if picture.overlap { IdleConnections::Wait } else { IdleConnections::Close };
                    self.stop_runs(slot, idle, shared, |run| run.revision != revision);
                    moved = true;
                }
            }
        }
        moved
    }

    pub(super) fn picture(&self, operation: &Operation, saved: &SavedApp) -> Picture {
        let spec = &saved.spec;
        let running = |slot: &Slot| {
            saved.slots.get(slot.0 as usize).is_some_and(|saved| saved.desired == Desired::Running)
        };
        // A slot whose run ended for good meanwhile is replaced by nothing.
        let covered = |slot: &Slot| operation.covers(*slot) && running(slot);
        let slots = self.slots.iter().filter(|(slot, _)| covered(slot)).map(|(slot, state)| {
            let is_new = |run: &&Run| run.revision == operation.revision && run.is_live();
            let new = match state.runs.iter().find(is_new) {
                Some(run) if run.is_ready() => NewRun::Serving,
                Some(_) if operation.replaced.contains(slot) => NewRun::Lost,
                Some(_) => NewRun::Launching,
                None if operation.replaced.contains(slot) => NewRun::Lost,
                None => NewRun::None,
            };
            let old = state.runs.iter().filter(|run| !is_new(run)).map(|run| {
                if run.is_ready() {
                    OldRun::Serving
                } else if run.is_live() {
                    OldRun::Launching
                } else if run.counts() {
                    OldRun::Draining
                } else if run.ladder().is_none() {
                    OldRun::Crashed
                } else {
                    OldRun::Leaving
                }
            });
            SlotPicture { slot: *slot, new, old: old.max().unwrap_or(OldRun::Gone) }
        });
        Picture {
            places: self.slots.keys().filter(|slot| running(slot)).count(),
            instances: self
                .slots
                .iter()
                .filter(|(slot, _)| running(slot) && slot.0 < spec.instances)
                // What was given up elsewhere would never come back, and hold up the reload for ever.
                .filter(|(slot, state)| {
                    let given_up =
                        matches!(state.rest, Rest::Errored | Rest::Stopped) && state.runs.is_empty();
                    covered(slot) || !given_up
                })
                .count(),
            max_surge: spec.reload.max_surge.of_up(spec.instances) as usize,
            max_unavailable: spec.reload.max_unavailable.of_down(spec.instances) as usize,
            overlap: spec.can_overlap(),
            counted: self
                .slots
                .iter()
                .map(|(slot, state)| {
                    let count = state.runs.iter().filter(|run| run.counts()).count();
                    count.max(usize::from(running(slot)))
                })
                .sum(),
            serving: self.serving(),
            slots: slots.collect(),
        }
    }

    /// Ends the new runs of a reload that have not replaced anything.
    pub(super) fn remove_candidates(&mut self, operation: &Operation, cause: Cause, shared: &mut Shared) {
        let slots: Vec<Slot> = self
            .slots
            .keys()
            .copied()
            .filter(|slot| operation.covers(*slot) && !operation.replaced.contains(slot))
            .collect();
        for slot in slots {
            self.stop_runs_because(slot, cause, IdleConnections::Wait, shared, |run| {
                run.revision == operation.revision
            });
        }
    }

    /// A failed reload: when the last new run is gone, the old state of things is saved.
    pub(super) fn drive_undoing(&mut self, shared: &mut Shared) -> bool {
        let Some(operation) = &self.operation else { return false };
        let (revision, replaced) = (operation.revision, operation.replaced.clone());
        // Slots that only the failed release asked for have nothing to come back to.
        let had = shared
            .ledger
            .wanted
            .app(&self.name)
            .and_then(|app| app.previous.as_ref())
            .map_or(0, |(spec, _)| spec.instances);
        let mut gone = true;
        let mut moved = false;
        for (slot, state) in &mut self.slots {
            if !operation.covers(*slot) || replaced.contains(slot) {
                continue;
            }
            gone &= state.runs.iter().all(|run| run.revision != revision);
            // Where the old run had to go first, or died meanwhile, it comes back at once.
            if state.rest == Rest::Held && state.runs.is_empty() && slot.0 < had {
                state.rest = Rest::Due;
                moved = true;
            }
        }
        if gone {
            self.close(Change::Revert { app: self.name.clone(), replaced }, shared);
        }
        moved
    }
}
