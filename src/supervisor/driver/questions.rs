//! What clients want to know: which instances they mean, and what there is to say about them.

use std::collections::BTreeMap;

use super::super::figures::Then;
use super::super::handle::Replies;
use super::super::launch::configured_environment;
use super::super::publish::{Job, Question, SlotInfo};
use super::super::variables::Variables;
use super::{Driver, failed, usage};
use crate::ipc::protocol::{Answer, KeyChange, Refused};
use crate::model::id::AppName;
use crate::model::mask::ShowEnv;
use crate::model::spelling;
use crate::policy::target::{self, NoTarget};
use crate::policy::vocabulary::Selected;
use crate::store::environment::is_scrubbed;
use crate::sys::clock;

impl Driver {
    pub(super) fn publish(
        &mut self,
        question: Question,
        targets: &[String],
        replies: &Replies,
    ) -> Result<(), Refused> {
        let slots = self.slots(targets)?;
        let warnings = match question {
            // Each instance has notes of its own.
            Question::Describe(_) => self.daemon_warnings(),
            Question::List { .. } | Question::Jlist(_) => self.warnings(),
        };
        let job = Job { question, slots, warnings, now: clock::now(), replies: replies.clone() };
        if let Question::List { figures: false } = question {
            self.publisher.ask(job);
            return Ok(());
        }
        match self.surveys.begin(job) {
            Then::Answer(job) => self.publisher.ask(*job),
            Then::Ask { ids, ask } => self.world.ask_figures(ids, ask),
        }
        Ok(())
    }

    /// Whether the caller gets values: it asked for them, or the daemon's setting lets everybody have them.
    pub(super) fn show(&self, asked: bool) -> ShowEnv {
        (asked || self.fleet.shows_env()).into()
    }

    pub(super) fn env_diff(&self, target: &str) -> Result<Answer, Refused> {
        let slots = self.slots(&[target.to_owned()])?;
        let Some(slot) = slots.first() else { return Err(usage("this names no instance", None)) };
        let app = slot.spec.name.clone();
        let (Some(view), Some(run)) = (self.fleet.app(&app), &slot.view.current) else {
            return Ok(Answer::EnvDiff { app, changes: Vec::new() });
        };
        let shell = self.shells.present().get(&app).cloned().unwrap_or_default();
        let mut next = configured_environment(&view.spec, &shell, &run.id, slot.view.pm_id)
            .map_err(|error| failed("cannot tell what the next start would get", &error))?;
        let mut changes = Vec::new();
        for (name, value) in slot.env.iter().filter(|(name, _)| !is_scrubbed(name)) {
            let new = next.remove(name);
            if new.as_deref() != Some(value) {
                changes.push(KeyChange { key: name.to_owned(), old: Some(value.to_owned()), new });
            }
        }
        changes.extend(next.into_iter().map(|(key, value)| KeyChange { key, old: None, new: Some(value) }));
        Ok(Answer::EnvDiff { app, changes })
    }

    pub(super) fn known(&self) -> Vec<target::Known> {
        self.fleet
            .view()
            .iter()
            .map(|app| target::Known {
                name: app.spec.name.clone(),
                namespace: app.spec.namespace.clone(),
                pm_ids: app.slots.iter().map(|slot| slot.pm_id).collect(),
            })
            .collect()
    }

    pub(super) fn select(&self, targets: &[String]) -> Result<Vec<Selected>, Refused> {
        target::resolve_all(targets, &self.known()).map_err(|error| match error {
            NoTarget::Unknown(_) | NoTarget::NoMatch(_) => Refused {
                code: 3,
                message: error.to_string(),
                cause: None,
                hint: Some(self.hint_for(&error)),
            },
            NoTarget::Pattern { .. } => usage(&error.to_string(), None),
        })
    }

    pub(super) fn hint_for(&self, error: &NoTarget) -> String {
        let known = self.known();
        let names = known.iter().map(|app| app.name.as_str());
        let meant = match error {
            NoTarget::Unknown(target) => spelling::closest(target, names),
            NoTarget::NoMatch(_) | NoTarget::Pattern { .. } => None,
        };
        match meant {
            Some(name) => format!("Did you mean `{name}`? `pm list` shows what there is."),
            None => "`pm list` shows what there is.".to_owned(),
        }
    }

    pub(super) fn slots(&self, targets: &[String]) -> Result<Vec<SlotInfo>, Refused> {
        let selection = if targets.is_empty() { None } else { Some(self.select(targets)?) };
        let wanted = |app: &AppName, slot| match &selection {
            None => true,
            Some(selection) => selection.iter().any(|chosen| {
                chosen.app == *app && chosen.slots.as_ref().is_none_or(|slots| slots.contains(&slot))
            }),
        };
        let now = clock::now();
        let mut infos = Vec::new();
        for app in self.fleet.view() {
            for slot in &app.slots {
                if wanted(&app.spec.name, slot.slot) {
                    infos.push(self.world.slot_info(now, &app, slot.clone()));
                }
            }
        }
        Ok(infos)
    }

    /// What people should know whichever app they ask about.
    pub(super) fn daemon_warnings(&self) -> Vec<String> {
        let unsaved = self.fleet.unsaved().map(|why| {
            format!(
                "the list on disk is not this one: {why}. What was stopped or deleted since would start again after a \
                 reboot. It is tried again every 2 s"
            )
        });
        self.warnings.iter().cloned().chain(unsaved).collect()
    }

    /// What people should know about the daemon and all of its apps.
    pub(super) fn warnings(&self) -> Vec<String> {
        let mut warnings = self.daemon_warnings();
        warnings.extend(self.world.warnings());
        warnings
    }
}

pub(super) fn pairs(variables: &Variables) -> BTreeMap<String, String> {
    variables.iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}
