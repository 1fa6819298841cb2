//! Operations that outlive the supervisor they were asked of: what is noted of each when it begins, and how the next
//! supervisor tells from the fleet what has become of it.
//!
//! The note is in the blob before the fleet hears of the request. So an operation without a note has never begun, and
//! may be asked for again; one with a note has begun exactly if the desired state says so, is finished or undone by
//! the fleet, and has ended when its apps have come to rest.

use serde::{Deserialize, Serialize};

use super::fnv;
use crate::ipc::protocol::{AppResult, Failure, OperationView};
use crate::model::id::{AppName, OpId, Slot};
use crate::model::saved::{Desired, SavedApp, SavedFleet};
use crate::model::spec::AppSpec;
use crate::model::status::Status;
use crate::policy::fleet::{AppView, Fleet};
use crate::policy::plan::{Measure, Planned};
use crate::policy::vocabulary::{Command, Selected, SlotView, Verb};

/// What is noted of an operation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperationMemo {
    /// The client's name of it.
    pub op: OpId,
    /// What was asked.
    pub aim: Aim,
    /// What is to be on the list, with nothing to wait for.
    #[serde(default)]
    pub entries: Vec<Entry>,
}

/// What an operation wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Aim {
    /// Of each app.
    Apps(Vec<AppAim>),
    /// The end of everything, `pm kill`: asked for again.
    Kill,
}

/// What an operation wants of one app.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppAim {
    app: AppName,
    /// `None`: all.
    slots: Option<Vec<Slot>>,
    goal: Goal,
    /// The verb in past tense.
    what: Past,
}

/// An app that is to be on the list: rules of what runs, or something that is not to run now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    app: AppName,
    /// A hash of its spec. Another version of pm may come to another one, and then it is asked for once more.
    spec: u64,
    what: Listed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Listed {
    New,
    Updated,
}

impl Listed {
    const fn word(self) -> &'static str {
        match self {
            Self::New => "listed as stopped",
            Self::Updated => "updated",
        }
    }
}

impl Entry {
    fn new(spec: &AppSpec, what: Listed) -> Self {
        Self { app: spec.name.clone(), spec: hash_of(spec), what }
    }

    fn found<'a>(&self, saved: &'a SavedFleet) -> Option<&'a SavedApp> {
        saved.apps.iter().find(|app| app.spec.name == self.app && hash_of(&app.spec) == self.spec)
    }

    fn result(&self, saved: &SavedFleet) -> AppResult {
        let word = self.what.word();
        match self.found(saved) {
            Some(app) => done(&self.app, word, app.slots.len()),
            None => failed(&self.app, word, ""),
        }
    }
}

fn hash_of(spec: &AppSpec) -> u64 {
    fnv::hash(&serde_json::to_vec(spec).unwrap_or_default())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Goal {
    /// Instances run.
    Up,
    /// Instances of a later release than this run.
    After(u64),
    /// None runs.
    Down,
    /// So many run.
    Count(u32),
    /// There is no such app.
    Gone,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Past {
    Started,
    Stopped,
    Restarted,
    Reloaded,
    Deleted,
    Scaled,
}

impl Past {
    const fn word(self) -> &'static str {
        match self {
            Self::Started => "started",
            Self::Stopped => "stopped",
            Self::Restarted => "restarted",
            Self::Reloaded => "reloaded",
            Self::Deleted => "deleted",
            Self::Scaled => "scaled",
        }
    }
}

impl OperationMemo {
    /// What is to be noted of a command; `None` for those that end in the turn in which they are asked.
    #[must_use]
    pub fn of(op: OpId, command: &Command, fleet: &Fleet) -> Option<Self> {
        let mut entries = Vec::new();
        let aims = match command {
            Command::Start { specs } => specs
                .iter()
                .map(|spec| {
                    let (goal, what) = match fleet.app(&spec.name) {
                        Some(view) if runs(&view, None) && view.spec != *spec => {
                            (Goal::After(view.revision), Past::Reloaded)
                        }
                        Some(_) | None => (Goal::Up, Past::Started),
                    };
                    AppAim { app: spec.name.clone(), slots: None, goal, what }
                })
                .collect(),
            Command::Apply { specs, all, file, prune } => {
                let steps = fleet.plan(specs, all, file, *prune).steps;
                entries = steps.iter().filter_map(entry).collect();
                steps.iter().filter_map(|step| planned(step, fleet)).collect()
            }
            Command::Act { verb, selection, .. } => {
                selection.iter().map(|selected| act(*verb, selected, fleet)).collect()
            }
            Command::Scale { app, instances } => {
                vec![AppAim {
                    app: app.clone(),
                    slots: None,
                    goal: Goal::Count(*instances),
                    what: Past::Scaled,
                }]
            }
            Command::Resurrect { saved } => {
                // What was stopped stays so; there is nothing to wait for.
                let runs = |app: &&SavedApp| app.slots.iter().all(|slot| slot.desired == Desired::Running);
                let new = |app: &&SavedApp| !runs(app) && fleet.app(&app.spec.name).is_none();
                entries =
                    saved.apps.iter().filter(new).map(|app| Entry::new(&app.spec, Listed::New)).collect();
                let aim = |app: &SavedApp| AppAim {
                    app: app.spec.name.clone(),
                    slots: None,
                    goal: Goal::Up,
                    what: Past::Started,
                };
                saved.apps.iter().filter(runs).map(aim).collect()
            }
            Command::Kill | Command::KillUnlisted { .. } => {
                return Some(Self { op, aim: Aim::Kill, entries });
            }
            Command::Terminate | Command::Reset { .. } => return None,
        };
        Some(Self { op, aim: Aim::Apps(aims), entries })
    }

    /// Whether it wants something of this app.
    #[must_use]
    pub fn is_about(&self, app: &AppName) -> bool {
        match &self.aim {
            Aim::Apps(aims) => {
                aims.iter().any(|aim| aim.app == *app) || self.entries.iter().any(|entry| entry.app == *app)
            }
            Aim::Kill => true,
        }
    }

    /// Whether any of it had become part of the desired state, so that the fleet finishes or undoes it. What nothing
    /// of the desired state tells of may be asked for again, because it changes nothing, or the same as before.
    #[must_use]
    pub fn has_begun(&self, saved: &SavedFleet) -> bool {
        match &self.aim {
            Aim::Apps(aims) if aims.is_empty() => {
                self.entries.iter().any(|entry| entry.found(saved).is_some())
            }
            Aim::Apps(aims) => aims.iter().any(|aim| aim.has_begun(saved)),
            Aim::Kill => true,
        }
    }

    /// The apps that it was to come to, and had not: those of a reload of many, which goes a few at a time. Nobody
    /// remembers to begin with them.
    #[must_use]
    pub fn not_begun(&self, saved: &SavedFleet) -> Vec<AppName> {
        let Aim::Apps(aims) = &self.aim else { return Vec::new() };
        let left = aims.iter().filter(|aim| aim.what == Past::Reloaded && !aim.has_begun(saved));
        left.map(|aim| aim.app.clone()).collect()
    }

    /// How it ended; `None` while an app of it has not come to rest.
    #[must_use]
    pub fn ended(&self, fleet: &Fleet, saved: &SavedFleet) -> Option<OperationView> {
        let Aim::Apps(aims) = &self.aim else { return None };
        let views: Vec<Option<AppView>> = aims.iter().map(|aim| fleet.app(&aim.app)).collect();
        let at_rest =
            aims.iter().zip(&views).all(|(aim, view)| view.as_ref().is_none_or(|v| aim.at_rest(v, fleet)));
        if !at_rest {
            return None;
        }
        let aims = aims.iter().zip(&views).map(|(aim, view)| aim.result(view.as_ref(), saved));
        let apps: Vec<AppResult> = aims.chain(self.entries.iter().map(|entry| entry.result(saved))).collect();
        Some(OperationView { ok: apps.iter().all(|app| app.ok), apps })
    }
}

/// What a step of a plan puts on the list, and nothing else.
fn entry(step: &Planned) -> Option<Entry> {
    let spec = step.spec.as_ref()?;
    match step.measure {
        Measure::Create if !spec.autostart => Some(Entry::new(spec, Listed::New)),
        Measure::Update => Some(Entry::new(spec, Listed::Updated)),
        _ => None,
    }
}

/// What a step of a plan wants; `None` where nothing is waited for.
fn planned(step: &Planned, fleet: &Fleet) -> Option<AppAim> {
    let revision = fleet.app(&step.app).map_or(0, |view| view.revision);
    let instances = step.spec.as_ref().map_or(0, |spec| spec.instances);
    let autostart = step.spec.as_ref().is_some_and(|spec| spec.autostart);
    let (goal, what) = match step.measure {
        Measure::Remove => (Goal::Gone, Past::Deleted),
        Measure::Create | Measure::Start { .. } if autostart => (Goal::Up, Past::Started),
        Measure::Reload | Measure::Restart => (Goal::After(revision), Past::Reloaded),
        Measure::Scale { .. } => (Goal::Count(instances), Past::Scaled),
        Measure::Create | Measure::Start { .. } | Measure::Update | Measure::Unchanged => return None,
    };
    Some(AppAim { app: step.app.clone(), slots: None, goal, what })
}

fn act(verb: Verb, selected: &Selected, fleet: &Fleet) -> AppAim {
    let Selected { app, slots } = selected;
    let view = fleet.app(app);
    let known = view.as_ref().map(|view| view.revision);
    let running = known.filter(|_| view.is_some_and(|view| runs(&view, slots.as_deref())));
    let (goal, what) = match (verb, running) {
        (Verb::Stop, _) => (Goal::Down, Past::Stopped),
        (Verb::Delete, _) => {
            let left = slots.as_ref().map_or(0, |chosen| {
                let all = fleet.app(app).map_or(0, |view| view.slots.len());
                u32::try_from(all.saturating_sub(chosen.len())).unwrap_or(u32::MAX)
            });
            let goal = if left == 0 { Goal::Gone } else { Goal::Count(left) };
            return AppAim { app: app.clone(), slots: None, goal, what: Past::Deleted };
        }
        // A restart is a release also of what is down; what was given up is wanted before anybody asks.
        (Verb::Restart, None) if known.is_some() => (Goal::After(known.unwrap_or(0)), Past::Restarted),
        (Verb::Start | Verb::Restart | Verb::Reload, None) => (Goal::Up, Past::Started),
        (Verb::Start | Verb::Restart, Some(revision)) => (Goal::After(revision), Past::Restarted),
        (Verb::Reload, Some(revision)) => (Goal::After(revision), Past::Reloaded),
    };
    AppAim { app: app.clone(), slots: slots.clone(), goal, what }
}

fn runs(view: &AppView, slots: Option<&[Slot]>) -> bool {
    chosen(view, slots).any(|slot| !matches!(slot.status, Status::Stopped | Status::Errored))
}

fn chosen<'a>(view: &'a AppView, slots: Option<&'a [Slot]>) -> impl Iterator<Item = &'a SlotView> {
    view.slots.iter().filter(move |slot| slots.is_none_or(|slots| slots.contains(&slot.slot)))
}

#[cfg(test)]
impl AppAim {
    pub(super) fn start_of(app: AppName) -> Self {
        Self { app, slots: None, goal: Goal::Up, what: Past::Started }
    }

    pub(super) fn deletion_of(app: AppName) -> Self {
        Self { app, slots: None, goal: Goal::Gone, what: Past::Deleted }
    }
}

impl AppAim {
    fn has_begun(&self, saved: &SavedFleet) -> bool {
        let app = saved.apps.iter().find(|app| app.spec.name == self.app);
        match (self.goal, app) {
            (Goal::Gone, None) => true,
            (Goal::Gone, Some(app)) => app.operation == Some(crate::model::saved::SavedOperation::Delete),
            (_, None) => false,
            (Goal::Up, Some(app)) => self.slots_of(app).any(|(desired, _)| desired == Desired::Running),
            (Goal::Down, Some(app)) => self.slots_of(app).all(|(desired, _)| desired == Desired::Stopped),
            (Goal::After(revision), Some(app)) => self.slots_of(app).any(|(_, now)| now > revision),
            (Goal::Count(count), Some(app)) => app.spec.instances == count,
        }
    }

    /// What is wanted of each slot, and the release it is meant to run.
    fn slots_of<'a>(&'a self, app: &'a SavedApp) -> impl Iterator<Item = (Desired, u64)> + 'a {
        app.slots
            .iter()
            .zip(0..)
            .filter(|(_, index)| self.slots.as_ref().is_none_or(|slots| slots.contains(&Slot(*index))))
            .map(|(slot, _)| (slot.desired, if slot.revision == 0 { app.revision } else { slot.revision }))
    }

    fn at_rest(&self, view: &AppView, fleet: &Fleet) -> bool {
        // What it waits for may come up at any time, or never.
        let stuck = |app: &AppName| {
            fleet.app(app).is_none_or(|view| {
                view.operation.is_none() && view.slots.iter().all(|slot| slot.status != Status::Launching)
            })
        };
        view.operation.is_none()
            && chosen(view, self.slots.as_deref()).all(|slot| {
                let waits = !slot.waiting_for.is_empty() && slot.waiting_for.iter().all(stuck);
                slot.draining.is_empty()
                    && (waits
                        || matches!(
                            slot.status,
                            Status::Online | Status::Stopped | Status::Errored | Status::WaitingRestart
                        ))
            })
    }

    fn result(&self, view: Option<&AppView>, saved: &SavedFleet) -> AppResult {
        let app = saved.apps.iter().find(|app| app.spec.name == self.app);
        let slots: Vec<&SlotView> =
            view.into_iter().flat_map(|view| chosen(view, self.slots.as_deref())).collect();
        let all = |status: Status| slots.iter().all(|slot| slot.status == status);
        let up = !slots.is_empty() && all(Status::Online);
        let ok = match (self.goal, app) {
            (Goal::Up, _) => up,
            (Goal::After(revision), Some(app)) => up && self.slots_of(app).all(|(_, now)| now > revision),
            (Goal::After(_), None) => false,
            (Goal::Down, _) => all(Status::Stopped),
            (Goal::Count(count), _) => up && view.is_some_and(|view| view.spec.instances == count),
            (Goal::Gone, _) => view.is_none(),
        };
        let word = self.what.word();
        if ok {
            return done(&self.app, word, slots.len());
        }
        let exit =
            slots.iter().find(|slot| slot.status != Status::Online).and_then(|slot| slot.last_exit.as_ref());
        let why = exit.map_or_else(String::new, |exit| format!(": {exit}"));
        failed(&self.app, word, &why)
    }
}

fn done(app: &AppName, word: &str, slots: usize) -> AppResult {
    let slots = u32::try_from(slots).unwrap_or(u32::MAX);
    AppResult { app: app.clone(), ok: true, result: word.to_owned(), slots, failure: None }
}

fn failed(app: &AppName, word: &str, why: &str) -> AppResult {
    let failure = Failure {
        cause: format!("the supervisor was started again meanwhile, and the app was not {word}{why}"),
        hint: Some(format!("`pm list` shows what is true now; see also `pm logs {app} --err`.")),
        last_lines: Vec::new(),
        replaced: Vec::new(),
        kept: Vec::new(),
        restored: Vec::new(),
    };
    AppResult { app: app.clone(), ok: false, result: "failed".to_owned(), slots: 0, failure: Some(failure) }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::model::moment::Moment;
    use crate::model::spec::{CommandSpec, Runtime};
    use crate::policy::fleet::Settings;
    use crate::policy::vocabulary::{Action, Event, SaveId};

    const OP: OpId = OpId(7);

    fn spec(app: &str, change: impl FnOnce(&mut AppSpec)) -> Arc<AppSpec> {
        let command = CommandSpec {
            script: PathBuf::from("/srv/app"),
            interpreter: None,
            interpreter_args: Vec::new(),
            args: Vec::new(),
            runtime: Runtime::Other,
        };
        let mut spec = AppSpec::new(AppName::new(app).unwrap(), command, PathBuf::from("/srv"));
        spec.autostart = false;
        change(&mut spec);
        Arc::new(spec)
    }

    fn apply(specs: &[Arc<AppSpec>]) -> Command {
        let all = specs.iter().map(|spec| spec.name.clone()).collect();
        Command::Apply { specs: specs.to_vec(), all, file: "/srv/pm.toml".into(), prune: false }
    }

    fn fleet(saved: SavedFleet) -> Fleet {
        let now = Moment::default();
        let (mut fleet, first) = Fleet::restore(Settings::for_cpus(2), now, saved, None, Vec::new());
        if let Some((save, _)) = save_of(first) {
            let _ = fleet.handle(now, Event::Saved { save });
        }
        fleet
    }

    fn save_of(actions: Vec<Action>) -> Option<(SaveId, SavedFleet)> {
        actions.into_iter().find_map(|action| match action {
            Action::Save { save, state } => Some((save, state)),
            _ => None,
        })
    }

    /// What is noted of a command, and what is saved because of it.
    fn asked(fleet: &mut Fleet, command: Command) -> (OperationMemo, SavedFleet) {
        let memo = OperationMemo::of(OP, &command, fleet).unwrap();
        let actions = fleet.handle(Moment::default(), Event::Asked { op: OP, command });
        (memo, save_of(actions).unwrap().1)
    }

    fn words(memo: &OperationMemo, saved: &SavedFleet) -> Vec<(String, bool, String)> {
        let view = memo.ended(&fleet(saved.clone()), saved).unwrap();
        view.apps.into_iter().map(|app| (app.app.to_string(), app.ok, app.result)).collect()
    }

    fn word(app: &str, ok: bool, result: &str) -> (String, bool, String) {
        (app.to_owned(), ok, result.to_owned())
    }

    #[test]
    fn what_only_changes_the_list_has_begun_when_the_list_says_so() {
        let mut new = fleet(SavedFleet::default());
        let (created, listed) = asked(&mut new, apply(&[spec("api", |_| {})]));
        assert!(!created.has_begun(&SavedFleet::default()));
        assert!(created.has_begun(&listed));
        assert_eq!(words(&created, &listed), [word("api", true, "listed as stopped")]);
        let other = spec("api", |spec| spec.stop.timeout = Duration::from_secs(3));
        let (updated, after) = asked(&mut fleet(listed.clone()), apply(&[other]));
        assert!(!updated.has_begun(&listed), "the app is there, with its old rules");
        assert!(updated.has_begun(&after));
        assert_eq!(words(&updated, &after), [word("api", true, "updated")]);
        assert_eq!(words(&updated, &listed), [word("api", false, "failed")]);
        let (resurrected, again) =
            asked(&mut fleet(SavedFleet::default()), Command::Resurrect { saved: after.clone() });
        assert!(!resurrected.has_begun(&SavedFleet::default()));
        assert!(resurrected.has_begun(&again));
        let again =
            OperationMemo::of(OP, &Command::Resurrect { saved: after.clone() }, &fleet(after.clone()));
        assert!(!again.unwrap().has_begun(&after), "nothing to do, today and tomorrow");
    }

    #[test]
    fn notes_of_earlier_versions_are_read() {
        let memo: OperationMemo = serde_json::from_str(r#"{"op":7,"aim":{"Apps":[]}}"#).unwrap();
        assert_eq!(memo, OperationMemo { op: OP, aim: Aim::Apps(Vec::new()), entries: Vec::new() });
    }
}
