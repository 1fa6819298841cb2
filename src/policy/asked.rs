//! What becomes of a request: what it comes to for an app, and whether it begins, joins, waits or is refused.
//!
//! Compares what is asked with what is wanted and what goes on; the table of overlapping operations is in `admit`, what
//! an operation does in `operation`.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::model::difference::{Weight, differences};
use crate::model::id::{AppName, Slot};
use crate::model::saved::{Desired, SavedOperation, Trigger};
use crate::model::spec::AppSpec;

use super::admit::{Ask, Kind, Release, Slots, Verdict, verdict};
use super::app::{App, Shared};
use super::batch::RequestKey;
use super::instance::{Phase, Run};
use super::ledger::{After, Pending};
use super::operation::{Operation, Stage, past_tense};
use super::slot::{Rest, SlotState};
use super::vocabulary::{Action, AppOutcome, CheckId};
use super::wanted::{Change, slot_at};
/// What an operation consists of.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    kind: Kind,
    slots: Slots,
    target: Option<Arc<AppSpec>>,
    change: Change,
    what: &'static str,
    regardless: bool,
}

/// What has been done when an app is there that was not, with these slots stopped.
fn created(spec: &AppSpec, stopped: &BTreeSet<Slot>) -> &'static str {
    if u32::try_from(stopped.len()) == Ok(spec.instances) {
        "listed as stopped"
    } else {
        past_tense(Kind::Start)
    }
}

impl App {
    /// What would become of a request.
    pub(super) fn verdict(&self, ask: &Ask, shared: &Shared) -> Verdict {
        let target = self
            .operation
            .as_ref()
            .and_then(|operation| operation.target.as_ref())
            .or_else(|| shared.ledger.wanted.app(&self.name).map(|app| &app.spec));
        let release = match ask {
            Ask::StartSpec { spec, .. } | Ask::Adjust { spec } | Ask::Reload { spec: Some(spec), .. } => {
                match target {
                    Some(target) if target == spec => Release::Same,
                    Some(_) | None => Release::Other,
                }
            }
            Ask::Scale { instances } => match target {
                Some(target) if target.instances == *instances => Release::Same,
                Some(_) | None => Release::Other,
            },
            Ask::Resurrect { .. }
            | Ask::StartName { .. }
            | Ask::Stop { .. }
            | Ask::Restart { .. }
            | Ask::Reload { spec: None, .. }
            | Ask::Delete => Release::Same,
        };
        let verdict = verdict(self.operation.as_ref().map(|operation| operation.kind), ask, release);
        // Nobody asked for what is going on, so nobody is told to wait for it and to ask again.
        let by_itself = self.operation.as_ref().is_some_and(|operation| operation.trigger != Trigger::Asked);
        let verdict = match verdict {
            Verdict::Busy | Verdict::Already if by_itself => Verdict::Queue,
            verdict => verdict,
        };
        match (&self.next, verdict) {
            (Some((waiting, _)), Verdict::Queue) if merged(waiting, ask).is_none() => Verdict::Busy,
            // Nothing of it serves yet: after a crash of the whole daemon a reload is finished from the beginning.
            (_, Verdict::Already) if matches!(ask, Ask::StartSpec { .. }) && self.serving() == 0 => {
                Verdict::Join
            }
            _ => verdict,
        }
    }

    /// Begins, joins, queues or answers a request of these clients.
    pub(super) fn accept(&mut self, clients: Vec<RequestKey>, ask: Ask, shared: &mut Shared) {
        let verdict = self.verdict(&ask, shared);
        match verdict {
            Verdict::Go => self.begin_asked(clients, ask, shared),
            Verdict::Supersede => {
                match &ask {
                    Ask::Stop { slots } => self.supersede("stop", slots, shared),
                    Ask::StartSpec { .. }
                    | Ask::Resurrect { .. }
                    | Ask::StartName { .. }
                    | Ask::Restart { .. }
                    | Ask::Reload { .. }
                    | Ask::Delete
                    | Ask::Adjust { .. }
                    | Ask::Scale { .. } => self.supersede("delete", &None, shared),
                }
                self.begin_asked(clients, ask, shared);
            }
            Verdict::Join => self.join(clients, &ask, shared),
            Verdict::Already => self.settle(&clients, &AppOutcome::Already { what: "running" }, shared),
            Verdict::Queue => match &mut self.next {
                Some((waiting, keys)) => {
                    if let Some(both) = merged(waiting, &ask) {
                        *waiting = both;
                    }
                    keys.extend(clients);
                }
                None => self.next = Some((ask, clients)),
            },
            // Only parts of a batch whose turn came late get here: all were checked when they were asked.
            Verdict::Busy => {
                let by = self.operation.as_ref().map_or("", |operation| operation.kind.name());
                self.settle(&clients, &AppOutcome::Superseded { by }, shared);
            }
        }
    }

    pub(super) fn settle(&self, clients: &[RequestKey], outcome: &AppOutcome, shared: &mut Shared) {
        for key in clients {
            shared.requests.settle(*key, self.name.clone(), outcome.clone(), &mut shared.actions);
        }
    }

    pub(super) fn join(&mut self, clients: Vec<RequestKey>, ask: &Ask, shared: &mut Shared) {
        let name = self.name.clone();
        let Some(operation) = &mut self.operation else { return };
        operation.clients.extend(clients);
        // A stop of further slots is added to the one that is going on.
        if let Ask::Stop { slots } = ask
            && operation.kind == Kind::Stop
            && let Some(have) = &operation.slots
            && !slots.as_ref().is_some_and(|more| more.is_subset(have))
        {
            let after = After::Begin { app: name.clone(), serial: operation.serial };
            operation.slots = union(&operation.slots, slots);
            self.drop_queued(slots);
            shared.ledger.push_regardless(Change::Stop { app: name, slots: slots.clone() }, after);
        }
    }

    /// Nothing is in the way of a request.
    pub(super) fn begin_asked(&mut self, clients: Vec<RequestKey>, ask: Ask, shared: &mut Shared) {
        let creates = matches!(ask, Ask::StartSpec { .. } | Ask::Resurrect { .. });
        let ends = matches!(ask, Ask::Stop { .. } | Ask::Delete);
        if shared.ledger.wanted.app(&self.name).is_none() && !creates && !ends {
            // A part of a batch whose turn came after the app was deleted.
            return self.settle(&clients, &AppOutcome::Superseded { by: "delete" }, shared);
        }
        match self.plan(ask, shared) {
            Ok(plan) => self.begin_planned(clients, plan, Trigger::Asked, shared),
            Err(outcome) => self.settle(&clients, &outcome, shared),
        }
    }

    /// Who still waits for its turn to launch when a stop is asked for has lost it now, and not when that is on disk.
    pub(super) fn drop_queued(&mut self, slots: &Slots) {
        for (slot, state) in &mut self.slots {
            if slots.as_ref().is_none_or(|slots| slots.contains(slot)) {
                let before = state.runs.len();
                state.runs.retain(|run| !matches!(run.phase, Phase::Queued));
                if state.runs.len() < before {
                    state.rest = Rest::Due;
                }
            }
        }
    }

    /// Begins an operation, with a look at the files where that is needed.
    pub(super) fn begin_planned(
        &mut self,
        clients: Vec<RequestKey>,
        plan: Plan,
        trigger: Trigger,
        shared: &mut Shared,
    ) {
        match self.to_be_checked(&plan, shared) {
            Some(spec) => self.begin_checking(clients, plan, trigger, spec, shared),
            None => self.begin_saving(clients, plan, trigger, shared),
        }
    }

    /// What is taken down before its successor runs is not taken down before it is known that one could run: the spec
    /// to look at.
    fn to_be_checked(&self, plan: &Plan, shared: &Shared) -> Option<Arc<AppSpec>> {
        let present = shared.ledger.wanted.app(&self.name).map(|app| &app.spec)?;
        let spec = plan.target.as_ref().unwrap_or(present);
        let in_place = match plan.kind {
            Kind::Restart => true,
            Kind::Reload => !spec.can_overlap() || spec.reload.max_unavailable.of_down(spec.instances) > 0,
            Kind::Start | Kind::Scale | Kind::Stop | Kind::Delete => false,
        };
        let serves = self.slots.iter().any(|(slot, state)| {
            plan.slots.as_ref().is_none_or(|slots| slots.contains(slot))
                && state.runs.iter().any(Run::is_ready)
        });
        (in_place && serves).then(|| Arc::clone(spec))
    }

    fn begin_checking(
        &mut self,
        clients: Vec<RequestKey>,
        plan: Plan,
        trigger: Trigger,
        spec: Arc<AppSpec>,
        shared: &mut Shared,
    ) {
        let serial = shared.new_serial();
        let mut operation = Operation::new(serial, plan.kind, Stage::Checking);
        operation.trigger = trigger;
        (operation.clients, operation.target) = (clients, plan.target.clone());
        operation.plan = Some(Box::new(plan));
        self.operation = Some(operation);
        let check = CheckId(serial.0);
        shared.actions.push(Action::Preflight { app: self.name.clone(), check, spec });
    }

    /// Whether an instance could be started is known.
    pub(super) fn checked(&mut self, check: CheckId, fault: Option<String>, shared: &mut Shared) {
        let Some(operation) = self.operation.as_mut().filter(|operation| operation.serial.0 == check.0)
        else {
            return;
        };
        let Some(plan) = operation.plan.take() else { return };
        match fault {
            Some(why) => self.finish(AppOutcome::Unfit { why }, shared),
            None => {
                let (clients, trigger) = (std::mem::take(&mut operation.clients), operation.trigger);
                self.begin_saving(clients, *plan, trigger, shared);
            }
        }
    }

    fn begin_saving(&mut self, clients: Vec<RequestKey>, plan: Plan, trigger: Trigger, shared: &mut Shared) {
        let Plan { kind, slots, target, change, what, regardless } = plan;
        if matches!(kind, Kind::Stop | Kind::Delete) {
            self.drop_queued(&slots);
        }
        let serial = match &self.operation {
            // What was looked at goes on.
            Some(operation) if operation.stage == Stage::Checking => operation.serial,
            Some(_) | None => shared.new_serial(),
        };
        let after = After::Begin { app: self.name.clone(), serial };
        self.operation = Some(Operation {
            slots,
            clients,
            target,
            what,
            trigger,
            owes_post_stop: false,
            ..Operation::new(serial, kind, Stage::Saving)
        });
        self.save_or_prepare(Pending { change, after, regardless }, shared);
    }

    /// What a request comes to, or the answer when there is nothing to do.
    pub(super) fn plan(&self, ask: Ask, shared: &Shared) -> Result<Plan, AppOutcome> {
        let app = self.name.clone();
        let saved = shared.ledger.wanted.app(&app);
        let plan = |kind: Kind, slots: Slots, target: Option<Arc<AppSpec>>, change: Change| {
            let regardless = matches!(kind, Kind::Stop | Kind::Delete);
            Plan { kind, slots, target, change, what: past_tense(kind), regardless }
        };
        match ask {
            Ask::StartSpec { spec, run } => {
                let Some(saved) = saved else {
                    let stopped = if run { BTreeSet::new() } else { (0..spec.instances).map(Slot).collect() };
                    let what = created(&spec, &stopped);
                    let change = Change::Create { spec: Arc::clone(&spec), stopped };
                    return Ok(Plan { what, ..plan(Kind::Start, None, Some(spec), change) });
                };
                if saved.spec == spec {
                    let down: BTreeSet<Slot> = self
                        .slots
                        .iter()
                        .filter(|(_, state)| !state.runs.iter().any(Run::is_ready))
                        .map(|(slot, _)| *slot)
                        .collect();
                    if down.is_empty() {
                        return Err(AppOutcome::Already { what: "running" });
                    }
                    let slots = Some(down);
                    let change = Change::Start { app, slots: slots.clone(), spec: None };
                    return Ok(plan(Kind::Start, slots, None, change));
                }
                if !self.is_up() {
                    let change = Change::Start { app, slots: None, spec: Some(Arc::clone(&spec)) };
                    return Ok(plan(Kind::Start, None, Some(spec), change));
                }
                let weight = differences(&saved.spec, &spec).iter().map(|one| one.weight).max();
                match weight {
                    Some(Weight::Process) | None => Ok(reload_plan(app, None, Some(spec))),
                    Some(Weight::Instances | Weight::Rule) => self.plan(Ask::Adjust { spec }, shared),
                }
            }
            Ask::Adjust { spec } => {
                let Some(saved) = saved else { return Err(AppOutcome::Superseded { by: "delete" }) };
                let same = saved.slots.len() == spec.instances as usize;
                let what = if same { "updated" } else { past_tense(Kind::Scale) };
                let change = Change::Adjust { app, spec: Arc::clone(&spec) };
                Ok(Plan { what, ..plan(Kind::Scale, None, Some(spec), change) })
            }
            Ask::Resurrect { spec, stopped } => match saved {
                Some(_) => Err(AppOutcome::Already { what: "listed" }),
                None => {
                    let what = created(&spec, &stopped);
                    let change = Change::Create { spec: Arc::clone(&spec), stopped };
                    Ok(Plan { what, ..plan(Kind::Start, None, Some(spec), change) })
                }
            },
            Ask::StartName { slots } => {
                let chosen = |slot: &Slot| slots.as_ref().is_none_or(|slots| slots.contains(slot));
                if self.slots.iter().any(|(slot, state)| chosen(slot) && state.has_live()) {
                    return self.plan(Ask::Restart { slots, spec: None }, shared);
                }
                let change = Change::Start { app, slots: slots.clone(), spec: None };
                Ok(plan(Kind::Start, slots, None, change))
            }
            Ask::Stop { slots } => {
                let chosen = |slot: Slot| slots.as_ref().is_none_or(|slots| slots.contains(&slot));
                let down = saved.is_some_and(|saved| {
                    saved
                        .slots
                        .iter()
                        .enumerate()
                        .all(|(index, slot)| !chosen(slot_at(index)) || slot.desired == Desired::Stopped)
                });
                let idle = self.slots.iter().all(|(slot, state)| !chosen(*slot) || state.runs.is_empty());
                // With a save under way the desired state may be about to say otherwise.
                let settled = shared.ledger.under_way.is_none() && shared.ledger.waiting.is_empty();
                // What is down but not remembered is not done: whoever asks again hears how it is now.
                if down && idle && settled && shared.ledger.unsaved.is_none() {
                    return Err(AppOutcome::Already { what: "stopped" });
                }
                let change = Change::Stop { app, slots: slots.clone() };
                Ok(plan(Kind::Stop, slots, None, change))
            }
            Ask::Restart { slots, spec } => {
                let chosen = |slot: Slot| slots.as_ref().is_none_or(|slots| slots.contains(&slot));
                // A restart of what runs changes nothing that has to be remembered.
                let regardless =
                    spec.is_none()
                        && saved.is_some_and(|saved| {
                            saved.slots.iter().enumerate().all(|(index, slot)| {
                                !chosen(slot_at(index)) || slot.desired == Desired::Running
                            })
                        });
                let change = Change::Release {
                    app,
                    slots: slots.clone(),
                    spec: spec.clone(),
                    operation: SavedOperation::Restart,
                };
                Ok(Plan { regardless, ..plan(Kind::Restart, slots, spec, change) })
            }
            // There is nothing to be replaced, and nothing to go back to; but perhaps something to wait for.
            Ask::Reload { slots, spec } if !self.is_up() && saved.is_some() => {
                let change = Change::Start { app, slots: slots.clone(), spec: spec.clone() };
                Ok(plan(Kind::Start, slots, spec, change))
            }
            Ask::Reload { slots, spec } => Ok(reload_plan(app, slots, spec)),
            Ask::Delete => Ok(plan(Kind::Delete, None, None, Change::Condemn { app })),
            Ask::Scale { instances } => {
                let Some(saved) = saved else { return Err(AppOutcome::Superseded { by: "delete" }) };
                if saved.slots.len() == instances as usize {
                    return Err(AppOutcome::Already { what: "scaled" });
                }
                let mut spec = AppSpec::clone(&saved.spec);
                spec.instances = instances;
                let change = Change::Scale { app, instances };
                Ok(plan(Kind::Scale, None, Some(Arc::new(spec)), change))
            }
        }
    }

    /// Whether anything of it runs or is about to.
    pub(super) fn is_up(&self) -> bool {
        self.slots.values().any(SlotState::is_up)
    }
}

fn reload_plan(app: AppName, slots: Slots, spec: Option<Arc<AppSpec>>) -> Plan {
    let change =
        Change::Release { app, slots: slots.clone(), spec: spec.clone(), operation: SavedOperation::Reload };
    let what = past_tense(Kind::Reload);
    Plan { kind: Kind::Reload, slots, target: spec, change, what, regardless: false }
}

/// Both sets of slots; all, when either is.
fn union(one: &Slots, other: &Slots) -> Slots {
    Some(one.as_ref()?.union(other.as_ref()?).copied().collect())
}

/// One request that stands for two, where that is possible.
fn merged(waiting: &Ask, ask: &Ask) -> Option<Ask> {
    match (waiting, ask) {
        (Ask::Reload { slots: one, spec: old }, Ask::Reload { slots: other, spec: new }) if old == new => {
            Some(Ask::Reload { slots: union(one, other), spec: old.clone() })
        }
        (Ask::Restart { slots: one, spec: old }, Ask::Restart { slots: other, spec: new }) if old == new => {
            Some(Ask::Restart { slots: union(one, other), spec: old.clone() })
        }
        _ if waiting == ask => Some(ask.clone()),
        _ => None,
    }
}
