//! Requests as they come in: refused as a whole, or taken apart into one part per app.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use crate::model::id::{AppName, OpId, Slot};
use crate::model::saved::{Desired, SavedApp, SavedFleet, SavedSlot};
use crate::model::spec::AppSpec;

use super::admit::{Ask, Verdict};
use super::batch::Part;
use super::ending::{EndKind, EndStage};
use super::fleet::Fleet;
use super::plan::{self, Measure, Plan, Planned, Present};
use super::restart::Streak;
use super::slot::Rest;
use super::vocabulary::{Action, AppOutcome, Command, Outcome, Refusal, Selected, Verb};
use super::wanted::{is_same_program, slot_at, spec_of};
impl Fleet {
    pub(super) fn asked(&mut self, op: OpId, command: Command) {
        if self.ending.is_some() {
            match (command, &mut self.ending) {
                (Command::Terminate, Some(ending)) if ending.stage != EndStage::Over => {
                    ending.clients.push(op);
                }
                (Command::Kill | Command::KillUnlisted { .. }, Some(ending))
                    if ending.kind != EndKind::Terminate && ending.stage != EndStage::Over =>
                {
                    ending.clients.push(op);
                }
                _ => self.reply(op, Outcome::Refused(Refusal::Ending)),
            }
            return;
        }
        if let Some(circle) = self.circle(&command) {
            let why =
                format!("{circle}: apps cannot wait for each other; change `depends_on` of one of them");
            return self.reply(op, Outcome::Refused(Refusal::Invalid(why)));
        }
        let parts = match command {
            Command::Start { specs } => specs
                .into_iter()
                .map(|spec| {
                    let run = spec.autostart;
                    (spec.name.clone(), Ask::StartSpec { spec, run })
                })
                .collect(),
            Command::Apply { specs, all, file, prune } => {
                return self.apply(op, &self.plan(&specs, &all, &file, prune));
            }
            Command::Act { verb, selection, specs } => match self.parts_of(verb, selection, &specs) {
                Ok(parts) => parts,
                Err(refusal) => return self.reply(op, Outcome::Refused(refusal)),
            },
            Command::Scale { app, instances } => {
                if instances == 0 {
                    let why = format!("`{app}` needs at least one instance; to have none, stop it");
                    return self.reply(op, Outcome::Refused(Refusal::Invalid(why)));
                }
                vec![(app, Ask::Scale { instances })]
            }
            Command::Resurrect { saved } => resurrected(saved),
            Command::Kill => return self.kill(op),
            Command::KillUnlisted { error } => return self.kill_unlisted(op, &error),
            Command::Terminate => return self.terminate(op),
            Command::Reset { selection } => return self.reset(op, &selection),
        };
        if let Some(refusal) = parts.iter().find_map(|(app, ask)| self.refusal(app, ask)) {
            return self.reply(op, Outcome::Refused(refusal));
        }
        if parts.is_empty() {
            return self.reply(op, Outcome::Done { apps: Vec::new() });
        }
        self.shared.requests.open(op, parts);
    }

    /// What [`Command::Apply`] would do now.
    #[must_use]
    pub fn plan(&self, specs: &[Arc<AppSpec>], all: &[AppName], file: &Path, prune: bool) -> Plan {
        let present: BTreeMap<AppName, Present> = self
            .shared
            .ledger
            .wanted
            .names()
            .filter_map(|name| Some((name.clone(), self.present(name)?)))
            .collect();
        plan::plan(specs, all, file, prune, &present)
    }

    fn present(&self, name: &AppName) -> Option<Present> {
        let saved = self.shared.ledger.wanted.app(name)?;
        let app = self.apps.get(name)?;
        // What goes on brings about what is wanted already.
        let idle = app.operation.is_none();
        let mut present = Present {
            spec: Arc::clone(&saved.spec),
            up: 0,
            ended: 0,
            down: 0,
            mixed: idle && saved.slots.iter().any(|slot| is_of_another(slot, saved)),
        };
        for state in app.slots.values() {
            if state.is_up() || !idle {
                present.up += 1;
            } else if state.rest == Rest::Stopped && state.ended.is_some() {
                present.ended += 1;
            } else {
                present.down += 1;
            }
        }
        Some(present)
    }

    fn apply(&mut self, op: OpId, plan: &Plan) {
        let parts: Vec<Part> = plan.steps.iter().map(|step| part_of(step, plan)).collect();
        let refusal = parts.iter().find_map(|part| self.refusal(&part.app, part.ask.as_ref().ok()?));
        if let Some(refusal) = refusal {
            return self.reply(op, Outcome::Refused(refusal));
        }
        if parts.is_empty() {
            return self.reply(op, Outcome::Done { apps: Vec::new() });
        }
        self.shared.requests.open_parts(op, parts);
    }

    pub(super) fn reply(&mut self, op: OpId, outcome: Outcome) {
        self.shared.actions.push(Action::Reply { op, outcome });
    }

    /// Apps that would wait for each other with the specs of this command. A file's are checked when it is read; those of
    /// several files are not.
    fn circle(&self, command: &Command) -> Option<String> {
        let specs: Vec<&Arc<AppSpec>> = match command {
            Command::Start { specs } | Command::Apply { specs, .. } | Command::Act { specs, .. } => {
                specs.iter().collect()
            }
            Command::Resurrect { saved } => saved.apps.iter().map(|app| &app.spec).collect(),
            Command::Scale { .. }
            | Command::Kill
            | Command::KillUnlisted { .. }
            | Command::Terminate
            | Command::Reset { .. } => {
                return None;
            }
        };
        let wanted = &self.shared.ledger.wanted;
        let spec_of = |name: &AppName| {
            let new = specs.iter().find(|spec| spec.name == *name).map(|spec| &***spec);
            // What is about to be wanted counts as wanted.
            let under_way = || self.apps.get(name)?.operation.as_ref()?.target.as_deref();
            new.or_else(under_way).or_else(|| wanted.app(name).map(|app| &*app.spec))
        };
        let found = specs
            .iter()
            .filter(|spec| !spec.depends_on.is_empty())
            .find_map(|spec| plan::circle(spec_of, &spec.name))?;
        Some(found.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(" → "))
    }

    /// Why a part of a request cannot be done, now or later.
    pub(super) fn refusal(&self, name: &AppName, ask: &Ask) -> Option<Refusal> {
        let creates = matches!(ask, Ask::StartSpec { .. } | Ask::Resurrect { .. });
        let Some(app) = self.apps.get(name) else {
            return (!creates).then(|| Refusal::NoSuchApp(name.clone()));
        };
        // An app that is only found or only asked for is none yet.
        if !creates && self.shared.ledger.wanted.app(name).is_none() && app.operation.is_none() {
            return Some(Refusal::NoSuchApp(name.clone()));
        }
        (app.verdict(ask, &self.shared) == Verdict::Busy).then(|| Refusal::Busy {
            app: name.clone(),
            operation: app.operation.as_ref().map_or("operation", |operation| operation.kind.name()),
        })
    }

    /// What a verb means for each app selected.
    pub(super) fn parts_of(
        &self,
        verb: Verb,
        selection: Vec<Selected>,
        specs: &[Arc<AppSpec>],
    ) -> Result<Vec<(AppName, Ask)>, Refusal> {
        let mut parts: Vec<(AppName, Ask)> = Vec::new();
        for Selected { app: name, slots } in selection {
            let spec = specs.iter().find(|spec| spec.name == name).cloned();
            let known = match (self.apps.get(&name), &spec) {
                (Some(known), _) => known,
                // A file may have got a new app since.
                (None, Some(spec)) => {
                    parts.push((name, Ask::StartSpec { spec: Arc::clone(spec), run: spec.autostart }));
                    continue;
                }
                (None, None) => return Err(Refusal::NoSuchApp(name)),
            };
            let all: BTreeSet<Slot> = match self.shared.ledger.wanted.app(&name) {
                Some(app) => (0..app.slots.len()).map(slot_at).collect(),
                None => known.slots.keys().copied().collect(),
            };
            let chosen = slots.map(|slots| slots.into_iter().collect::<BTreeSet<Slot>>());
            if chosen.as_ref().is_some_and(|chosen| chosen.is_empty() || !chosen.is_subset(&all)) {
                return Err(Refusal::NoSuchApp(name));
            }
            let slots = chosen.filter(|chosen| *chosen != all);
            let ask = match verb {
                Verb::Start => match spec {
                    Some(spec) => Ask::StartSpec { spec, run: true },
                    None => Ask::StartName { slots },
                },
                Verb::Stop => Ask::Stop { slots },
                Verb::Restart => Ask::Restart { slots, spec },
                Verb::Reload => Ask::Reload { slots, spec },
                Verb::Delete => match slots {
                    None => Ask::Delete,
                    Some(slots) => Ask::Scale { instances: remaining(&name, &all, &slots)? },
                },
            };
            parts.push((name, ask));
        }
        Ok(parts)
    }

    pub(super) fn reset(&mut self, op: OpId, selection: &[Selected]) {
        if let Some(unknown) = selection.iter().find(|one| !self.apps.contains_key(&one.app)) {
            return self.reply(op, Outcome::Refused(Refusal::NoSuchApp(unknown.app.clone())));
        }
        let mut apps = Vec::new();
        for one in selection {
            let mut count = 0;
            self.with_app(&one.app, |app, _| {
                for (slot, state) in &mut app.slots {
                    if one.slots.as_ref().is_none_or(|slots| slots.contains(slot)) {
                        (state.restarts, state.streak) = (0, Streak::default());
                        count += 1;
                    }
                }
            });
            apps.push((one.app.clone(), AppOutcome::Done { what: "reset", slots: count }));
        }
        self.reply(op, Outcome::Done { apps });
    }
}

/// Whether an instance runs what the spec does not say, or files that are not those of the others: a reload has left it
/// behind. One that was replaced alone, because somebody asked for that or because it was unhealthy, has left no other
/// behind.
fn is_of_another(slot: &SavedSlot, saved: &SavedApp) -> bool {
    slot.desired == Desired::Running
        && slot.revision != 0
        && slot.revision != saved.revision
        && (slot.behind || !is_same_program(spec_of(saved, slot.revision), &saved.spec))
}

fn part_of(step: &Planned, plan: &Plan) -> Part {
    let replaces = matches!(step.measure, Measure::Reload | Measure::Restart);
    let changes =
        |app: &AppName| plan.steps.iter().any(|step| step.app == *app && step.measure != Measure::Unchanged);
    let after = match &step.spec {
        // What is started waits for what it depends on by itself, and is listed meanwhile.
        Some(spec) if replaces => spec.depends_on.keys().filter(|app| changes(app)).cloned().collect(),
        Some(_) | None => BTreeSet::new(),
    };
    let ask = match (&step.spec, step.measure) {
        (None, _) | (_, Measure::Remove) => Ok(Ask::Delete),
        (Some(_), Measure::Unchanged) => Err(AppOutcome::Already { what: "up to date" }),
        (Some(spec), Measure::Create) => Ok(Ask::StartSpec { spec: Arc::clone(spec), run: spec.autostart }),
        (Some(spec), Measure::Start { .. }) => Ok(Ask::StartSpec { spec: Arc::clone(spec), run: true }),
        (Some(spec), Measure::Reload | Measure::Restart) => {
            Ok(Ask::Reload { slots: None, spec: Some(Arc::clone(spec)) })
        }
        (Some(spec), Measure::Scale { .. } | Measure::Update) => Ok(Ask::Adjust { spec: Arc::clone(spec) }),
    };
    Part { app: step.app.clone(), ask, after }
}

/// `delete ID` of the highest slots is a scale-down; slots have no holes.
fn remaining(name: &AppName, all: &BTreeSet<Slot>, slots: &BTreeSet<Slot>) -> Result<u32, Refusal> {
    let rest: BTreeSet<Slot> = all.difference(slots).copied().collect();
    let count = u32::try_from(rest.len()).unwrap_or(u32::MAX);
    if rest.iter().all(|slot| slot.0 < count) {
        return Ok(count);
    }
    Err(Refusal::Invalid(format!(
        "only the highest instances of `{name}` can be deleted alone; `pm scale {name} {count}` does that"
    )))
}

fn resurrected(saved: SavedFleet) -> Vec<(AppName, Ask)> {
    saved
        .apps
        .into_iter()
        .map(|app| {
            let stopped = app
                .slots
                .iter()
                .enumerate()
                .filter(|(_, slot)| slot.desired == Desired::Stopped)
                .map(|(index, _)| slot_at(index))
                .collect();
            (app.spec.name.clone(), Ask::Resurrect { spec: app.spec, stopped })
        })
        .collect()
}
