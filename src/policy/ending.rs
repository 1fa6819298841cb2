//! The end of the daemon's work: `pm kill` forgets everything, SIGTERM nothing. Both take everything down by the ladder.

use crate::model::id::{AppName, InstanceId, OpId};

use super::app::App;
use super::fleet::Fleet;
use super::ledger::After;
use super::operation::SHUTDOWN;
use super::stop::Heard;
use super::vocabulary::{Action, AppOutcome, Outcome};
use super::wanted::Change;
/// The end of the daemon's work.
#[derive(Clone, Debug)]
pub(super) struct Ending {
    pub(super) clients: Vec<OpId>,
    pub(super) kind: EndKind,
    pub(super) names: Vec<(AppName, u32)>,
    pub(super) unsaved: Option<String>,
    pub(super) stage: EndStage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EndKind {
    Kill,
    KillUnlisted,
    Terminate,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EndStage {
    Saving,
    GoingDown,
    Forgetting,
    Over,
}

impl Fleet {
    /// Everything that goes on ends here.
    pub(super) fn begin_ending(&mut self, op: OpId, kind: EndKind, by: &'static str) {
        self.shared.requests.give_up_waiting_parts(&AppOutcome::Superseded { by }, &mut self.shared.actions);
        self.shared.doomed = true;
        for app in self.apps.values_mut() {
            app.supersede(by, &None, &mut self.shared);
        }
        let wanted = &self.shared.ledger.wanted;
        let names = wanted
            .to_saved()
            .apps
            .iter()
            .map(|app| (app.spec.name.clone(), u32::try_from(app.slots.len()).unwrap_or(u32::MAX)))
            .collect();
        self.ending = Some(Ending { clients: vec![op], kind, names, unsaved: None, stage: EndStage::Saving });
        self.touched.extend(self.apps.keys().cloned());
    }

    pub(super) fn kill(&mut self, op: OpId) {
        self.begin_ending(op, EndKind::Kill, "kill");
        self.shared.ledger.push_regardless(Change::CondemnAll, After::KillBegins);
    }

    pub(super) fn kill_unlisted(&mut self, op: OpId, error: &str) {
        self.begin_ending(op, EndKind::KillUnlisted, "kill");
        self.go_down(Some(error));
    }

    pub(super) fn terminate(&mut self, op: OpId) {
        self.begin_ending(op, EndKind::Terminate, SHUTDOWN);
        self.go_down(None);
    }

    /// From here on nothing is started any more.
    pub(super) fn go_down(&mut self, error: Option<&str>) {
        self.shared.ending = true;
        if let Some(ending) = &mut self.ending {
            ending.stage = EndStage::GoingDown;
            ending.unsaved = error.map(str::to_owned);
        }
        self.touched.extend(self.apps.keys().cloned());
    }

    /// SIGKILL to everything that is on its way down.
    pub(super) fn hurry(&mut self) {
        let ending = self.shared.ending;
        for app in self.apps.values_mut() {
            let ids: Vec<InstanceId> =
                app.runs().filter(|run| run.ladder().is_some()).map(|run| run.id.clone()).collect();
            for id in ids {
                app.hear(&id, Heard::Hurried, &mut self.shared);
            }
            app.flush_steps(&mut self.shared);
            app.refresh(ending);
        }
    }

    pub(super) fn end_if_down(&mut self) {
        let Some(ending) = &mut self.ending else { return };
        let busy = |app: &App| app.runs().next().is_some() || !app.hooks.is_idle();
        if ending.stage != EndStage::GoingDown || self.apps.values().any(busy) {
            return;
        }
        match ending.kind {
            EndKind::Terminate | EndKind::KillUnlisted => self.over(None),
            EndKind::Kill => {
                ending.stage = EndStage::Forgetting;
                let names: Vec<AppName> = self.shared.ledger.wanted.names().cloned().collect();
                if names.is_empty() {
                    return self.over(None);
                }
                let last = names.len() - 1;
                for (index, app) in names.into_iter().enumerate() {
                    let after = if index == last { After::KillEnds } else { After::Nothing };
                    self.shared.ledger.push_regardless(Change::Remove { app }, after);
                }
            }
        }
    }

    pub(super) fn over(&mut self, error: Option<&str>) {
        let Some(ending) = &mut self.ending else { return };
        ending.stage = EndStage::Over;
        // Every save carries the whole state: the last one may have made up for the first.
        let remembered = ending.kind == EndKind::Kill && self.shared.ledger.unsaved.is_none();
        let first = ending.unsaved.take();
        let unsaved = error.map(str::to_owned).or(first).filter(|_| !remembered);
        let apps: Vec<_> = ending
            .names
            .iter()
            .map(|(app, slots)| {
                let outcome = match &unsaved {
                    Some(error) => AppOutcome::StillListed { error: error.clone() },
                    None => AppOutcome::Done { what: "stopped", slots: *slots },
                };
                (app.clone(), outcome)
            })
            .collect();
        for op in std::mem::take(&mut ending.clients) {
            let apps = apps.clone();
            let outcome = match &unsaved {
                Some(_) => Outcome::Failed { apps },
                None => Outcome::Done { apps },
            };
            self.shared.actions.push(Action::Reply { op, outcome });
        }
        self.shared.actions.push(Action::Quit);
    }
}
