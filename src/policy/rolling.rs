//! A reload at work: takes the moves of `reload`, and removes new runs when one has failed. The way back of slots that
//! were replaced is `rollback`'s.

use std::sync::Arc;

use crate::model::id::{InstanceId, Slot};
use crate::model::saved::{Desired, SavedApp};
use crate::model::spec::{AppSpec, OnFailure, Strategy};

use super::admit::Kind;
use super::app::{App, Shared};
use super::instance::Run;
use super::operation::{Operation, Stage};
use super::reload::{Move, NewRun, OldRun, Picture, SlotPicture, moves};
use super::slot::Rest;
use super::stop::Cause;
use super::vocabulary::IdleConnections;
use super::wanted::Change;

/// Whether all new instances take over in one turn.
pub(super) fn is_blue_green(spec: &AppSpec) -> bool {
    spec.reload.strategy == Strategy::BlueGreen && spec.can_overlap()
}

/// Whether what is replaced is kept until the last slot is ready.
pub(super) fn keeps_reserve(spec: &AppSpec) -> bool {
    let rules = &spec.reload;
    // A switch takes everything old out of rotation at once, and lets it drain afterwards.
    spec.can_overlap() && (is_blue_green(spec) || rules.on_failure == OnFailure::Rollback && rules.reserve)
}

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
                    self.hold(slot);
                    let settle = spec.restart.min_uptime;
                    moved |= self.launch(slot, Arc::clone(&spec), revision, settle, shared);
                }
                Move::TakeDown(slot) => {
                    self.hold(slot);
                    let idle = if picture.overlap { IdleConnections::Wait } else { IdleConnections::Close };
                    self.stop_runs(slot, idle, shared, |run| run.revision != revision);
                    moved = true;
                }
                Move::Keep(slot) => {
                    self.hold(slot);
                    self.keep(slot, shared, |run| run.revision != revision);
                    moved = true;
                }
                Move::GiveUp(slot) => {
                    self.stop_runs(slot, IdleConnections::Wait, shared, Run::is_reserve);
                    moved = true;
                }
            }
        }
        moved
    }

    /// Nothing is started in this slot but what a reload, or the way back of one, starts.
    pub(super) fn hold(&mut self, slot: Slot) {
        if let Some(state) = self.slots.get_mut(&slot) {
            state.rest = Rest::Held;
        }
    }

    /// What a reload knows of the app: its release is new.
    fn picture(&self, operation: &Operation, saved: &SavedApp) -> Picture {
        let is_new = |run: &Run| run.revision == operation.revision && run.is_live();
        let slots = self.covered(operation, saved).into_iter().filter_map(|slot| {
            let state = self.slots.get(&slot)?;
            let replaced = operation.replaced.contains(&slot);
            let new = match state.runs.iter().find(|run| is_new(run)) {
                Some(run) if run.is_ready() && run.proves_until.is_some() => NewRun::Soaking,
                Some(run) if run.is_ready() => NewRun::Serving,
                Some(_) if replaced => NewRun::Lost,
                Some(_) => NewRun::Launching,
                None if replaced => NewRun::Lost,
                None => NewRun::None,
            };
            let old = state.runs.iter().filter(|run| !is_new(run)).map(old_run).max();
            Some(SlotPicture { slot, new, old: old.unwrap_or(OldRun::Gone) })
        });
        let picture = self.picture_of(saved, u32::MAX, slots.collect());
        Picture { reserve: keeps_reserve(&saved.spec), ..picture }
    }

    /// The picture of the whole app, with these slots. Those from `count` on are not meant to stay.
    pub(super) fn picture_of(&self, saved: &SavedApp, count: u32, slots: Vec<SlotPicture>) -> Picture {
        let spec = &saved.spec;
        let rules = &spec.reload;
        let at_once = is_blue_green(spec);
        let moves = |slot: &Slot| slots.iter().any(|one| one.slot == *slot);
        let running = |slot: &Slot| slot.0 < count && is_wanted(saved, *slot);
        let instances = self
            .slots
            .iter()
            .filter(|(slot, _)| running(slot) && slot.0 < spec.instances)
            // What was given up elsewhere would never come back, and hold up the reload for ever.
            .filter(|(slot, state)| {
                let given_up = matches!(state.rest, Rest::Errored | Rest::Stopped) && state.runs.is_empty();
                moves(slot) || !given_up
            })
            .count();
        let max_draining = rules.max_draining.unwrap_or(spec.instances).max(1);
        let lingering = self.runs().filter(|run| run.lingers()).count();
        let max_surge = if at_once { spec.instances } else { rules.max_surge.of_up(spec.instances) };
        Picture {
            places: self.slots.keys().filter(|slot| running(slot)).count(),
            instances,
            max_surge: max_surge as usize,
            max_unavailable: rules.max_unavailable.of_down(spec.instances) as usize,
            overlap: spec.can_overlap(),
            reserve: false,
            at_once,
            max_draining: max_draining as usize,
            lingering,
            counted: self
                .slots
                .iter()
                .filter(|(slot, _)| slot.0 < count)
                .map(|(slot, state)| {
                    let count = state.runs.iter().filter(|run| run.counts()).count();
                    count.max(usize::from(running(slot)))
                })
                .sum(),
            serving: self.serving(),
            slots,
        }
    }

    /// The slots of a reload that are meant to run: one whose run ended for good meanwhile is replaced by nothing.
    pub(super) fn covered(&self, operation: &Operation, saved: &SavedApp) -> Vec<Slot> {
        let covered = |slot: &Slot| operation.covers(*slot) && is_wanted(saved, *slot);
        self.slots.keys().copied().filter(covered).collect()
    }

    /// Whether every slot of the reload that is going on has a new run that serves or has served.
    pub(super) fn all_replaced(&self, shared: &Shared) -> bool {
        let Some(operation) = &self.operation else { return false };
        let Some(saved) = shared.ledger.wanted.app(&self.name) else { return false };
        self.covered(operation, saved).iter().all(|slot| operation.replaced.contains(slot))
    }

    /// Whether the new runs of the reload that is going on come into rotation together.
    pub(super) fn switches_at_once(&self) -> bool {
        self.operation
            .as_ref()
            .is_some_and(|operation| operation.kind == Kind::Reload && operation.stage == Stage::Going)
            && self.runs().any(|run| is_blue_green(&run.spec))
    }

    /// Whether every slot of the reload has a run that could come into rotation now, or has one there.
    pub(super) fn all_stand_by(&self, ready: &[InstanceId], shared: &Shared) -> bool {
        let Some(operation) = &self.operation else { return true };
        let Some(saved) = shared.ledger.wanted.app(&self.name) else { return true };
        !is_blue_green(&saved.spec)
            || self.covered(operation, saved).iter().all(|slot| {
                operation.replaced.contains(slot)
                    || ready.iter().any(|id| id.slot == *slot && self.is_candidate_id(id))
            })
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
            let is_new = |run: &Run| run.revision == operation.revision;
            if let Some(state) = self.slots.get_mut(&slot)
                && state.live().any(is_new)
                && state.live().any(|run| !is_new(run))
            {
                // The row goes on with the old one: nobody saw this run do anything.
                state.restarts = state.restarts.saturating_sub(1);
            }
            self.stop_runs_because(slot, cause, IdleConnections::Wait, shared, is_new);
        }
    }

    /// A failed reload that leaves finished slots as they are: when the last new run is gone, that is saved.
    pub(super) fn drive_abort(&mut self, shared: &mut Shared) -> bool {
        let mut moved = self.spare_reserve(shared);
        let Some(operation) = &self.operation else { return false };
        let (revision, replaced) = (operation.revision, operation.replaced.clone());
        let had = self.had_before(shared);
        let mut gone = true;
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

    /// A slot is not finished whose new run is lost while the old one is still there, after a switch: that one serves on.
    fn spare_reserve(&mut self, shared: &mut Shared) -> bool {
        let Some(operation) = &self.operation else { return false };
        let (revision, replaced) = (operation.revision, operation.replaced.clone());
        let lost = |slot: &Slot| {
            let runs = self.slots.get(slot).into_iter().flat_map(|state| state.live());
            !runs.into_iter().any(|run| run.revision == revision)
        };
        let lost: Vec<Slot> = replaced.into_iter().filter(lost).collect();
        let mut moved = false;
        for slot in lost {
            if self.put_back(slot, shared) {
                self.hold(slot);
                moved |= self.operation.as_mut().is_some_and(|operation| operation.replaced.remove(&slot));
            }
        }
        moved
    }

    /// How many slots the release before had: those that only the failed one asked for have nothing to come back to.
    pub(super) fn had_before(&self, shared: &Shared) -> u32 {
        let saved = shared.ledger.wanted.app(&self.name);
        saved.and_then(|app| app.previous.as_ref()).map_or(0, |(spec, _)| spec.instances)
    }
}

/// What a run that is to go looks like.
pub(super) fn old_run(run: &Run) -> OldRun {
    if run.is_ready() {
        OldRun::Serving
    } else if run.is_live() {
        OldRun::Launching
    } else if run.is_reserve() {
        OldRun::Reserve
    } else if run.counts() {
        OldRun::Draining
    } else if run.ladder().is_none() {
        OldRun::Crashed
    } else {
        OldRun::Leaving
    }
}

fn is_wanted(saved: &SavedApp, slot: Slot) -> bool {
    saved.slots.get(slot.0 as usize).is_some_and(|saved| saved.desired == Desired::Running)
}
