//! Who waits for whom: `depends_on` orders starts, and reverses stops.
//!
//! An app that is started from rest (by a command, at boot, from the saved list) waits until those it needs are as far as
//! it needs them; it is listed meanwhile, and has no process that could not be stopped at once. An app that is going
//! down waits until those that need it and go down too are gone. Nothing here starts or restarts anything: a crash of
//! what is needed is no business of those that need it. Nobody waits in a circle: commands that would make one are
//! refused (`requests`), and of one that comes about all the same a link is ignored.

use std::collections::{BTreeMap, BTreeSet};

use crate::model::exit::ExitReason;
use crate::model::id::{AppName, Slot};
use crate::model::saved::Desired;
use crate::model::spec::Dependency;

use super::admit::Kind;
use super::app::{App, Shared};
use super::news::What;
use super::slot::{Rest, SlotState};
use super::wanted::{Wanted, slot_at};

/// Which apps need which, as wanted.
#[derive(Clone, Debug, Default)]
pub(super) struct Graph {
    needs: BTreeMap<AppName, BTreeMap<AppName, Dependency>>,
    needed_by: BTreeMap<AppName, BTreeSet<AppName>>,
}

impl Graph {
    /// Of everything that is wanted.
    pub(super) fn of(wanted: &Wanted) -> Self {
        let mut graph = Self::default();
        for name in wanted.names() {
            let Some(app) = wanted.app(name) else { continue };
            if app.spec.depends_on.is_empty() {
                continue;
            }
            graph.needs.insert(name.clone(), app.spec.depends_on.clone());
        }
        graph.open_circles();
        for (name, needs) in &graph.needs {
            for needed in needs.keys() {
                graph.needed_by.entry(needed.clone()).or_default().insert(name.clone());
            }
        }
        graph
    }

    /// Takes out the link by which a circle closes. Commands that were under way together, or a failed reload that goes
    /// back to what its app needed before, can leave one; everybody in it would wait for ever, also to go down.
    fn open_circles(&mut self) {
        let mut done: BTreeSet<AppName> = BTreeSet::new();
        let names: Vec<AppName> = self.needs.keys().cloned().collect();
        for name in names {
            let mut trail = vec![name];
            // Depth first; what has been left behind is in no circle.
            while let Some(here) = trail.last().cloned() {
                let needs = self.needs.get_mut(&here);
                let next = needs.as_ref().and_then(|needs| needs.keys().find(|next| !done.contains(*next)));
                match next.cloned() {
                    None => {
                        trail.pop();
                        done.insert(here);
                    }
                    Some(next) if trail.contains(&next) => {
                        needs.map(|needs| needs.remove(&next));
                    }
                    Some(next) => trail.push(next),
                }
            }
        }
    }

    /// Every app that waits for this one, or that it waits for.
    pub(super) fn neighbours(&self, name: &AppName) -> Vec<AppName> {
        let needs = self.needs.get(name).into_iter().flat_map(BTreeMap::keys);
        let needed_by = self.needed_by.get(name).into_iter().flatten();
        needs.chain(needed_by).cloned().collect()
    }
}

/// How far an app is, as far as others have to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Standing {
    pub(super) level: Level,
    /// It is going down, and something of it is still there.
    pub(super) leaving: bool,
}

/// How far an app has come up. In this order: of several slots the first tells what the app is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Level {
    /// It is not coming up, as things are. Why, in the words of "which …".
    Failing(String),
    /// It is coming up.
    Pending,
    /// Its processes run.
    Started,
    /// It is in rotation, or has done what it was started for.
    Ready,
}

impl Standing {
    /// Of an app that does not exist.
    pub(super) fn missing() -> Self {
        Self { level: Level::Failing("does not exist".to_owned()), leaving: false }
    }
}

impl App {
    /// How far it is.
    pub(super) fn standing(&self, shared: &Shared) -> Standing {
        let Some(saved) = shared.ledger.wanted.app(&self.name) else {
            // It is being created, or what is left of it is going.
            let level = match &self.operation {
                Some(operation) if operation.kind == Kind::Start => Level::Pending,
                Some(_) | None => Standing::missing().level,
            };
            return Standing { level, leaving: self.runs().next().is_some() };
        };
        let mut level: Option<Level> = None;
        let mut running = false;
        for (index, wanted) in saved.slots.iter().enumerate() {
            running |= wanted.desired == Desired::Running;
            let state = self.slots.get(&slot_at(index));
            let one = match (wanted.desired, state) {
                (Desired::Running, None) => Level::Pending,
                (Desired::Running, Some(state)) => self.level_of(state, shared),
                (Desired::Stopped, Some(state)) if done(state) => Level::Ready,
                // Somebody stopped a part of it: the rest counts.
                (Desired::Stopped, _) => continue,
            };
            level = Some(level.map_or(one.clone(), |known| known.min(one)));
        }
        let level = level.unwrap_or_else(|| Level::Failing("is stopped".to_owned()));
        let rises = self.operation.as_ref().is_some_and(|operation| match operation.kind {
            Kind::Start | Kind::Restart | Kind::Reload | Kind::Scale => true,
            Kind::Stop | Kind::Delete => false,
        });
        Standing {
            level: if rises && matches!(level, Level::Failing(_)) { Level::Pending } else { level },
            leaving: (shared.ending || !running) && self.runs().next().is_some(),
        }
    }

    fn level_of(&self, state: &SlotState, shared: &Shared) -> Level {
        if state.runs.iter().any(super::instance::Run::is_ready) {
            return Level::Ready;
        }
        if let Some(run) = state.live().last() {
            return if run.pid.is_some() { Level::Started } else { Level::Pending };
        }
        let failed = || match &state.last_exit {
            Some(reason) => Level::Failing(format!("failed: {reason}")),
            None => Level::Failing("failed".to_owned()),
        };
        if state.runs.iter().any(super::instance::Run::was_not_ready) {
            return Level::Failing("was not ready in time".to_owned());
        }
        match state.rest {
            Rest::Due if state.gated => match self.unmet(shared).into_iter().next() {
                Some((on, Level::Failing(_))) => Level::Failing(format!("waits for `{on}`")),
                Some(_) | None => Level::Pending,
            },
            Rest::Due | Rest::Held => Level::Pending,
            Rest::Waiting { at } if at <= shared.now => Level::Pending,
            Rest::Waiting { .. } | Rest::Errored => failed(),
            Rest::Stopped if done(state) => Level::Ready,
            Rest::Stopped => Level::Failing("is stopped".to_owned()),
        }
    }

    /// What it needs and does not have.
    pub(super) fn unmet(&self, shared: &Shared) -> Vec<(AppName, Level)> {
        let Some(needs) = shared.graph.needs.get(&self.name) else { return Vec::new() };
        needs
            .iter()
            .filter_map(|(name, how_far)| {
                let standing = shared.standings.get(name).cloned().unwrap_or_else(Standing::missing);
                let least = match how_far {
                    Dependency::Started => Level::Started,
                    Dependency::Ready => Level::Ready,
                };
                (standing.level < least).then(|| (name.clone(), standing.level))
            })
            .collect()
    }

    /// Whether a start from rest may go on; says so to everybody when it has to wait.
    pub(super) fn may_start(&mut self, shared: &Shared) -> bool {
        let on: Vec<AppName> = self.unmet(shared).into_iter().map(|(name, _)| name).collect();
        let met = on.is_empty();
        if self.waits_for != on {
            self.waits_for.clone_from(&on);
            if !met {
                self.news.push((None, What::Waiting { on }));
            }
        }
        met
    }

    /// What keeps the start of all of these slots from ever going on, as things are: whoever asked for them hears of it when
    /// nothing else is left to be waited for.
    pub(super) fn hopeless(&self, slots: &BTreeSet<Slot>, shared: &Shared) -> Option<(AppName, String)> {
        let waits =
            |slot: &Slot| self.slots.get(slot).is_some_and(|state| state.gated && state.runs.is_empty());
        if slots.is_empty() || !slots.iter().all(waits) {
            return None;
        }
        self.unmet(shared).into_iter().find_map(|(name, level)| match level {
            Level::Failing(why) => Some((name, why)),
            Level::Pending | Level::Started | Level::Ready => None,
        })
    }

    /// Whether others that need it are on their way down and not gone yet.
    pub(super) fn is_needed_still(&self, shared: &Shared) -> bool {
        let mut needed_by = shared.graph.needed_by.get(&self.name).into_iter().flatten();
        needed_by.any(|name| shared.standings.get(name).is_some_and(|standing| standing.leaving))
    }
}

/// It has done what it was started for.
fn done(state: &SlotState) -> bool {
    state.runs.is_empty()
        && state.rest == Rest::Stopped
        && state.ended.is_some()
        && state.last_exit == Some(ExitReason::Code(0))
}
