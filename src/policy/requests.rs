//! Requests as they come in: refused as a whole, or taken apart into one part per app.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::model::id::{AppName, OpId, Slot};
use crate::model::saved::{Desired, SavedFleet};
use crate::model::spec::AppSpec;

use super::admit::{Ask, Verdict};
use super::batch::RELOADS_AT_ONCE;
use super::ending::{EndKind, EndStage};
use super::fleet::Fleet;
use super::restart::Streak;
use super::vocabulary::{Action, AppOutcome, Command, Outcome, Refusal, Selected, Verb};
use super::wanted::slot_at;
impl Fleet {
    pub(super) fn asked(&mut self, op: OpId, command: Command) {
        if self.ending.is_some() {
            match (command, &mut self.ending) {
                (Command::Terminate, Some(ending)) if ending.stage != EndStage::Over => {
                    ending.clients.push(op);
                }
                (Command::Kill, Some(ending))
                    if ending.kind == EndKind::Kill && ending.stage != EndStage::Over =>
                {
                    ending.clients.push(op);
                }
                _ => self.reply(op, Outcome::Refused(Refusal::Ending)),
            }
            return;
        }
        let (parts, at_once) = match command {
            Command::Start { specs } => {
                let parts = specs
                    .into_iter()
                    .map(|spec| {
                        let run = spec.autostart;
                        (spec.name.clone(), Ask::StartSpec { spec, run })
                    })
                    .collect();
                (parts, usize::MAX)
            }
            Command::Act { verb, selection, specs } => match self.parts_of(verb, selection, &specs) {
                Ok(parts) => (parts, if verb == Verb::Reload { RELOADS_AT_ONCE } else { usize::MAX }),
                Err(refusal) => return self.reply(op, Outcome::Refused(refusal)),
            },
            Command::Scale { app, instances } => {
                if instances == 0 {
                    let why = format!("`{app}` needs at least one instance; to have none, stop it");
                    return self.reply(op, Outcome::Refused(Refusal::Invalid(why)));
                }
                (vec![(app, Ask::Scale { instances })], usize::MAX)
            }
            Command::Resurrect { saved } => (resurrected(saved), usize::MAX),
            Command::Kill => return self.kill(op),
            Command::Terminate => return self.terminate(op),
            Command::Reset { selection } => return self.reset(op, &selection),
        };
        if let Some(refusal) = parts.iter().find_map(|(app, ask)| self.refusal(app, ask)) {
            return self.reply(op, Outcome::Refused(refusal));
        }
        if parts.is_empty() {
            return self.reply(op, Outcome::Done { apps: Vec::new() });
        }
        self.shared.requests.open(op, parts, at_once);
    }

    pub(super) fn reply(&mut self, op: OpId, outcome: Outcome) {
        self.shared.actions.push(Action::Reply { op, outcome });
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
