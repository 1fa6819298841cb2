//! The shell each app takes its environment from: that of its first start, or of the last `--update-env` that came to
//! something.
//!
//! A shell that came with a request is taken back when the request was refused, or when its reload failed: an old
//! instance that crashes the day after must not come up with the environment of a release that never served. What is
//! to be taken back is not remembered over the death of a supervisor in the middle of the reload.

use std::collections::BTreeMap;

use crate::model::id::{AppName, OpId};
use crate::policy::vocabulary::{AppOutcome, Outcome};
use crate::store::state::Shell;

/// Shells by app, and those that may have to come back.
#[derive(Debug)]
pub struct Shells {
    present: BTreeMap<AppName, Shell>,
    replaced: BTreeMap<OpId, Replaced>,
}

#[derive(Debug, Default)]
struct Replaced {
    /// What failed is undone: a reload, not a restart.
    undone: bool,
    /// What each app had before.
    before: BTreeMap<AppName, Option<Shell>>,
}

impl Shells {
    /// As they were saved.
    #[must_use]
    pub const fn new(present: BTreeMap<AppName, Shell>) -> Self {
        Self { present, replaced: BTreeMap::new() }
    }

    /// The shells as they are now.
    #[must_use]
    pub const fn present(&self) -> &BTreeMap<AppName, Shell> {
        &self.present
    }

    /// A shell for an app that has none.
    pub fn give(&mut self, app: &AppName, shell: &Shell) {
        if !self.present.contains_key(app) {
            self.present.insert(app.clone(), shell.clone());
        }
    }

    /// A shell for an app that is created.
    pub fn set(&mut self, app: &AppName, shell: &Shell) {
        self.present.insert(app.clone(), shell.clone());
    }

    /// Another shell for an app, if this operation comes to something. `undone`: whether it is undone when it fails.
    pub fn replace(&mut self, op: OpId, undone: bool, app: &AppName, shell: &Shell) {
        let before = self.present.insert(app.clone(), shell.clone());
        let replaced = self.replaced.entry(op).or_default();
        replaced.undone = undone;
        replaced.before.insert(app.clone(), before);
    }

    /// An operation has ended like this: what it did not come to is taken back.
    pub fn ended(&mut self, op: OpId, outcome: &Outcome) {
        let Some(Replaced { undone, before }) = self.replaced.remove(&op) else { return };
        for (app, shell) in before {
            let stays = match outcome {
                Outcome::Refused(_) => false,
                Outcome::Done { apps } | Outcome::Failed { apps } => {
                    match apps.iter().find(|(name, _)| *name == app).map(|(_, outcome)| outcome) {
                        Some(
                            AppOutcome::NotSaved { .. }
                            | AppOutcome::Skipped { .. }
                            | AppOutcome::Unfit { .. }
                            | AppOutcome::HookFailed { done: None, .. },
                        )
                        | None => false,
                        Some(AppOutcome::Superseded { .. }) => !undone,
                        Some(AppOutcome::Failed { replaced, .. }) => !undone || !replaced.is_empty(),
                        Some(
                            AppOutcome::Done { .. }
                            | AppOutcome::Already { .. }
                            // It is there, and starts with it when its turn has come.
                            | AppOutcome::Waiting { .. }
                            | AppOutcome::HookFailed { .. }
                            | AppOutcome::NotRemembered { .. }
                            | AppOutcome::StillListed { .. },
                        ) => true,
                    }
                }
            };
            if stays {
                continue;
            }
            match shell {
                Some(shell) => self.present.insert(app, shell),
                None => self.present.remove(&app),
            };
        }
    }

    /// Forgets those of apps that are no more.
    pub fn retain(&mut self, is_known: impl Fn(&AppName) -> bool) {
        self.present.retain(|app, _| is_known(app));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::model::exit::ExitReason;
    use crate::model::id::{Generation, InstanceId, Slot};
    use crate::policy::vocabulary::Refusal;

    const OP: OpId = OpId(1);

    fn api() -> AppName {
        AppName::new("api").unwrap()
    }

    fn shell(colour: &str) -> Shell {
        Arc::new(BTreeMap::from([("COLOUR".to_owned(), colour.to_owned())]))
    }

    fn failed(replaced: &[u32]) -> AppOutcome {
        AppOutcome::Failed {
            id: InstanceId { app: api(), slot: Slot(0), generation: Generation(2) },
            reason: ExitReason::NotReady,
            replaced: replaced.iter().map(|slot| Slot(*slot)).collect(),
            kept: Vec::new(),
            rollback: None,
        }
    }

    #[track_caller]
    fn check(undone: bool, outcome: Outcome, expected: &str) {
        let mut shells = Shells::new(BTreeMap::from([(api(), shell("blue"))]));
        shells.replace(OP, undone, &api(), &shell("green"));
        assert_eq!(shells.present()[&api()], shell("green"), "it counts while the operation goes on");
        shells.ended(OpId(2), &outcome);
        shells.ended(OP, &outcome);
        assert_eq!(shells.present()[&api()], shell(expected), "{outcome:?}");
        assert!(shells.replaced.is_empty());
    }

    #[test]
    fn what_came_to_nothing_is_taken_back() {
        let of = |outcome: AppOutcome| Outcome::Failed { apps: vec![(api(), outcome)] };
        let done = Outcome::Done { apps: vec![(api(), AppOutcome::Done { what: "reloaded", slots: 1 })] };
        check(true, done, "green");
        check(true, Outcome::Refused(Refusal::Ending), "blue");
        check(true, of(AppOutcome::NotSaved { error: String::new() }), "blue");
        check(true, of(failed(&[])), "blue");
        check(true, of(failed(&[0])), "green");
        check(true, of(AppOutcome::Superseded { by: "stop" }), "blue");
        // A restart is not undone: what was asked for is what is tried again.
        check(false, of(failed(&[])), "green");
        check(false, of(AppOutcome::Superseded { by: "stop" }), "green");
    }

    #[test]
    fn an_app_that_had_none_has_none_again_and_what_is_no_more_is_forgotten() {
        let mut shells = Shells::new(BTreeMap::new());
        shells.replace(OP, true, &api(), &shell("green"));
        shells.ended(OP, &Outcome::Refused(Refusal::Ending));
        assert!(shells.present().is_empty());
        shells.give(&api(), &shell("red"));
        shells.give(&api(), &shell("blue"));
        assert_eq!(shells.present()[&api()], shell("red"));
        shells.retain(|_| false);
        assert!(shells.present().is_empty());
    }
}
