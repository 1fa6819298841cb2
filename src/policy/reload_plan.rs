//! What a reload would do, without doing it: `pm reload --dry-run`.
//!
//! Looks at the same rules as the reload itself. Changes nothing, and promises nothing about what happens meanwhile.

use std::sync::Arc;

use crate::model::id::{AppName, Generation, PmId, Slot};
use crate::model::spec::{AppSpec, OnFailure, Strategy};

use super::admit::{Ask, Verdict};
use super::fleet::Fleet;
use super::instance::Run;
use super::rolling::{is_blue_green, keeps_reserve};
use super::vocabulary::{Refusal, Selected, Verb};
use super::wanted::slot_at;

/// What a reload of one app would do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReloadPlan {
    /// Which app.
    pub app: AppName,
    /// The spec it would run.
    pub spec: Arc<AppSpec>,
    /// Whether that differs from what it runs now.
    pub changed: bool,
    /// What would become of the request.
    pub course: Course,
    /// How the instances would be replaced.
    pub manner: Manner,
    /// The slots in the order of their turn.
    pub slots: Vec<PlannedSlot>,
    /// Slots that the new spec does not have any more: stopped at the end.
    pub given_up: Vec<PlannedSlot>,
    /// How many slots are replaced at the same time.
    pub at_once: u32,
    /// How many instances may be missing meanwhile.
    pub max_unavailable: u32,
    /// The most processes that launch or serve at the same time.
    pub most: u32,
    /// Replaced ones stay until the last slot is ready, beyond that.
    pub reserve: bool,
    /// How many replaced ones may be there at the same time.
    pub max_draining: u32,
}

/// What would become of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Course {
    /// It would begin at once.
    Begins,
    /// It would wait for what is going on.
    Waits(&'static str),
    /// It would be refused because of what is going on.
    Refused(&'static str),
    /// There is no such app, or nothing of it runs: it would be started.
    Starts,
}

/// How instances are replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// Slot after slot, new beside old.
    Rolling,
    /// All new beside the old, then over at once.
    BlueGreen,
    /// Slot after slot, the old one first: downtime.
    InPlace,
}

/// A slot of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedSlot {
    /// Its place.
    pub slot: Slot,
    /// Its number for people; `None` for a slot that does not exist yet.
    pub pm_id: Option<PmId>,
    /// What runs there now: main process and generation.
    pub old: Option<(Option<u32>, Generation)>,
    /// The generation that would follow, unless something is started there before.
    pub next: Option<Generation>,
}

impl Fleet {
    /// What a reload of these would do; apps of `specs` that do not exist would be started.
    ///
    /// # Errors
    /// What a reload of these would be refused with, but for being busy: that is part of the plan.
    pub fn plan_reload(
        &self,
        selection: Vec<Selected>,
        specs: &[Arc<AppSpec>],
    ) -> Result<Vec<ReloadPlan>, Refusal> {
        let parts = self.parts_of(Verb::Reload, selection, specs)?;
        Ok(parts.into_iter().filter_map(|(name, ask)| self.plan_of(name, &ask)).collect())
    }

    fn plan_of(&self, name: AppName, ask: &Ask) -> Option<ReloadPlan> {
        let (slots, spec) = match ask {
            Ask::Reload { slots, spec } => (slots.clone(), spec.clone()),
            Ask::StartSpec { spec, .. } => (None, Some(Arc::clone(spec))),
            Ask::Resurrect { .. }
            | Ask::StartName { .. }
            | Ask::Stop { .. }
            | Ask::Restart { .. }
            | Ask::Delete
            | Ask::Adjust { .. }
            | Ask::Scale { .. } => return None,
        };
        let saved = self.shared.ledger.wanted.app(&name);
        let app = self.apps.get(&name);
        let spec = spec.or_else(|| saved.map(|saved| Arc::clone(&saved.spec)))?;
        let course = match app {
            None => Course::Starts,
            Some(app) if app.operation.is_none() && !app.is_up() => Course::Starts,
            Some(app) => {
                let going = app.operation.as_ref().map_or("operation", |operation| operation.kind.name());
                match app.verdict(ask, &self.shared) {
                    Verdict::Busy => Course::Refused(going),
                    Verdict::Queue => Course::Waits(going),
                    Verdict::Go | Verdict::Supersede | Verdict::Join | Verdict::Already => Course::Begins,
                }
            }
        };
        let planned = |slot: Slot| {
            let state = app.and_then(|app| app.slots.get(&slot));
            let old = state.and_then(|state| state.runs.iter().rev().find(|run| Run::is_live(run)));
            PlannedSlot {
                slot,
                pm_id: state.map(|state| state.pm_id),
                old: old.map(|run| (run.pid, run.id.generation)),
                next: state.map(|state| Generation(state.next_generation)),
            }
        };
        let have = saved.map_or(0, |saved| saved.slots.len());
        let chosen = |slot: &Slot| slots.as_ref().is_none_or(|slots| slots.contains(slot));
        let all = (0..spec.instances).map(Slot).filter(chosen);
        let given_up = (spec.instances as usize..have).map(slot_at).filter(chosen);
        let (slots, given_up): (Vec<_>, Vec<_>) =
            (all.map(planned).collect(), given_up.map(planned).collect());
        let rules = &spec.reload;
        let manner = if is_blue_green(&spec) {
            Manner::BlueGreen
        } else if spec.can_overlap() {
            Manner::Rolling
        } else {
            Manner::InPlace
        };
        let count = u32::try_from(slots.len()).unwrap_or(u32::MAX);
        let unavailable = rules.max_unavailable.of_down(spec.instances);
        let surge = rules.max_surge.of_up(spec.instances).max(u32::from(unavailable == 0));
        let (surge, unavailable) = match manner {
            Manner::BlueGreen => (spec.instances, 0),
            Manner::Rolling => (surge, unavailable),
            Manner::InPlace => (0, 1),
        };
        let present = u32::try_from(have).unwrap_or(u32::MAX).max(spec.instances);
        Some(ReloadPlan {
            app: name,
            changed: saved.is_none_or(|saved| saved.spec != spec),
            course,
            manner,
            at_once: surge.saturating_add(unavailable).min(count),
            max_unavailable: unavailable,
            most: present.saturating_add(surge.min(count)),
            reserve: keeps_reserve(&spec)
                && surge > 0
                && rules.on_failure == OnFailure::Rollback
                && (rules.reserve || rules.strategy == Strategy::BlueGreen),
            max_draining: rules.max_draining.unwrap_or(spec.instances),
            slots,
            given_up,
            spec,
        })
    }
}
