//! The desired state of the fleet, and the only ways in which it changes.
//!
//! A change is a value that is applied to a copy; the copy becomes the truth when it is durable (`ledger`). Nothing
//! here knows which processes exist.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::model::difference::{Weight, differences};
use crate::model::id::{AppName, Generation, PmId, Slot};
use crate::model::saved::{Desired, SavedApp, SavedFleet, SavedOperation, SavedSlot};
use crate::model::spec::AppSpec;

/// The desired state. Apps are shared between copies, so a copy costs a map and no specs.
#[derive(Clone, Debug, Default)]
pub(super) struct Wanted {
    apps: BTreeMap<AppName, Arc<SavedApp>>,
    next_pm_id: u32,
    pub(super) start_parallelism: Option<u32>,
    pub(super) show_env: bool,
}

/// One change of the desired state. One for an app that is gone changes nothing.
#[derive(Clone, Debug)]
pub(super) enum Change {
    /// A new app whose slots are meant to run, but for those in `stopped`; nothing when it exists.
    Create { spec: Arc<AppSpec>, stopped: BTreeSet<Slot> },
    /// These slots (`None`: all) are meant to run, from this spec on.
    Start { app: AppName, slots: Option<BTreeSet<Slot>>, spec: Option<Arc<AppSpec>> },
    /// A new release for these slots, of this spec or the present one.
    Release {
        app: AppName,
        slots: Option<BTreeSet<Slot>>,
        spec: Option<Arc<AppSpec>>,
        operation: SavedOperation,
    },
    /// These slots are meant to be down.
    Stop { app: AppName, slots: Option<BTreeSet<Slot>> },
    /// The instance in this slot ended for good, as its rules say. Means nothing for a slot that has been given another
    /// release since.
    Ended { app: AppName, slot: Slot, revision: u64 },
    /// Another number of slots.
    Scale { app: AppName, instances: u32 },
    /// Other rules for the processes that run, or another number of slots.
    Adjust { app: AppName, spec: Arc<AppSpec> },
    /// The operation has ended well.
    Finish { app: AppName },
    /// A reload has failed: slots that are not among `replaced` keep what they had.
    Revert { app: AppName, replaced: BTreeSet<Slot> },
    /// The app is to end and to be forgotten.
    Condemn { app: AppName },
    /// Every app is to end and to be forgotten.
    CondemnAll,
    /// The app is forgotten.
    Remove { app: AppName },
    /// More generations for this app's slots: the ledger adds them for every app that a change names.
    Reserve { app: AppName },
    /// What files say of the whole daemon; `None` where they were silent.
    Settings { start_parallelism: Option<u32>, show_env: Option<bool> },
    /// None: what was changed before is to be written again.
    Nothing,
}

impl Change {
    /// The app it is about.
    pub(super) fn app(&self) -> Option<&AppName> {
        match self {
            Self::Create { spec, .. } => Some(&spec.name),
            Self::Start { app, .. }
            | Self::Release { app, .. }
            | Self::Stop { app, .. }
            | Self::Ended { app, .. }
            | Self::Scale { app, .. }
            | Self::Adjust { app, .. }
            | Self::Finish { app }
            | Self::Revert { app, .. }
            | Self::Condemn { app }
            | Self::Remove { app }
            | Self::Reserve { app } => Some(app),
            Self::CondemnAll | Self::Settings { .. } | Self::Nothing => None,
        }
    }
}

impl Wanted {
    /// The desired state as it was saved.
    pub(super) fn from_saved(saved: SavedFleet) -> Self {
        let mut next_pm_id = saved.next_pm_id;
        let (start_parallelism, show_env) = (saved.start_parallelism, saved.show_env);
        let mut apps = BTreeMap::new();
        for mut app in saved.apps {
            for slot in &mut app.slots {
                if slot.revision == 0 {
                    slot.revision = app.revision;
                }
                next_pm_id = next_pm_id.max(slot.pm_id.0.saturating_add(1));
            }
            apps.insert(app.spec.name.clone(), Arc::new(app));
        }
        Self { apps, next_pm_id, start_parallelism, show_env }
    }

    /// What is to be written. `pm_id`s count up, so the first of each app tells the order of creation.
    pub(super) fn to_saved(&self) -> SavedFleet {
        let mut apps: Vec<SavedApp> = self.apps.values().map(|app| SavedApp::clone(app)).collect();
        apps.sort_by_key(|app| app.slots.first().map(|slot| slot.pm_id));
        SavedFleet {
            apps,
            next_pm_id: self.next_pm_id,
            start_parallelism: self.start_parallelism,
            show_env: self.show_env,
        }
    }

    pub(super) fn app(&self, name: &AppName) -> Option<&SavedApp> {
        self.apps.get(name).map(|app| &**app)
    }

    pub(super) fn slot(&self, name: &AppName, slot: Slot) -> Option<&SavedSlot> {
        self.app(name)?.slots.get(slot.0 as usize)
    }

    /// Up to which generation each slot may have been used.
    pub(super) fn reservations(&self) -> Vec<(AppName, Slot, Generation)> {
        let slots = |(name, app): (&AppName, &Arc<SavedApp>)| -> Vec<_> {
            let slots = app.slots.iter().enumerate();
            slots.map(|(index, slot)| (name.clone(), slot_at(index), slot.reserved)).collect()
        };
        self.apps.iter().flat_map(slots).collect()
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &AppName> {
        self.apps.keys()
    }

    /// Makes one change.
    pub(super) fn apply(&mut self, change: &Change) {
        match change {
            Change::Create { spec, stopped } => self.create(spec, stopped),
            Change::Start { app, slots, spec } => {
                self.edit(app, |app, next| {
                    if let Some(spec) = spec {
                        // What still leaves of the old release has to be known until it is gone.
                        let old = (Arc::clone(&app.spec), app.revision);
                        app.revision = newest(app) + 1;
                        app.older.extend(app.previous.replace(old));
                        app.spec = Arc::clone(spec);
                        resize(app, spec.instances, next);
                        for slot in &mut app.slots {
                            slot.before = slot.revision;
                            slot.revision = app.revision;
                        }
                        forget_unused(app);
                    }
                    app.operation = None;
                    for slot in chosen(app, slots.as_ref(), usize::MAX) {
                        slot.desired = Desired::Running;
                    }
                });
            }
            Change::Release { app, slots, spec, operation } => {
                self.edit(app, |app, next| {
                    let revision = newest(app) + 1;
                    let old = (Arc::clone(&app.spec), app.revision);
                    if let Some(spec) = spec {
                        app.spec = Arc::clone(spec);
                        // Superfluous slots are given up when the release has succeeded, not before.
                        let count = u32::try_from(app.slots.len()).unwrap_or(u32::MAX);
                        let count = if *operation == SavedOperation::Reload {
                            count.max(spec.instances)
                        } else {
                            spec.instances
                        };
                        resize(app, count, next);
                    }
                    app.revision = revision;
                    for slot in &mut app.slots {
                        slot.before = 0;
                    }
                    let count = app.spec.instances as usize;
                    for slot in chosen(app, slots.as_ref(), count) {
                        slot.before = slot.revision;
                        slot.revision = revision;
                        slot.desired = Desired::Running;
                    }
                    app.older.extend(app.previous.replace(old));
                    app.operation = Some(*operation);
                });
            }
            Change::Stop { app, slots } => {
                self.edit(app, |app, next| {
                    // Who stops an app in the middle of a reload says how far that was with a `Revert` before this, and
                    // of a restart that had begun that it is done (`Finish`). What had not begun is taken back, and so is
                    // everything by a supervisor that does not know.
                    revert(app, &BTreeSet::new(), next);
                    app.operation = None;
                    for slot in chosen(app, slots.as_ref(), usize::MAX) {
                        slot.desired = Desired::Stopped;
                    }
                    forget_unused(app);
                });
            }
            Change::Ended { app, slot, revision } => {
                self.edit(app, |app, _| {
                    if let Some(slot) = app.slots.get_mut(slot.0 as usize)
                        && slot.revision == *revision
                    {
                        slot.desired = Desired::Stopped;
                    }
                });
            }
            Change::Scale { app, instances } => {
                self.edit(app, |app, next| {
                    let mut spec = AppSpec::clone(&app.spec);
                    spec.instances = *instances;
                    app.spec = Arc::new(spec);
                    resize(app, *instances, next);
                });
            }
            Change::Adjust { app, spec } => {
                self.edit(app, |app, next| {
                    let before = std::mem::replace(&mut app.spec, Arc::clone(spec));
                    // Instances that were not replaced when another one was, alone, follow the rules as that one does.
                    for (older, _) in app.previous.iter_mut().chain(&mut app.older) {
                        if is_same_program(older, &before) {
                            *older = Arc::clone(spec);
                        }
                    }
                    resize(app, spec.instances, next);
                });
            }
            Change::Finish { app } => {
                self.edit(app, |app, next| {
                    app.operation = None;
                    resize(app, app.spec.instances, next);
                    for slot in &mut app.slots {
                        slot.before = 0;
                    }
                    forget_unused(app);
                });
            }
            Change::Revert { app, replaced } => self.edit(app, |app, next| revert(app, replaced, next)),
            Change::Condemn { app } => self.edit(app, |app, _| condemn(app)),
            Change::CondemnAll => {
                for app in self.apps.values_mut() {
                    condemn(Arc::make_mut(app));
                }
            }
            Change::Remove { app } => {
                self.apps.remove(app);
                if self.apps.is_empty() {
                    self.next_pm_id = 0;
                }
            }
            Change::Settings { start_parallelism, show_env } => {
                self.start_parallelism = start_parallelism.or(self.start_parallelism);
                self.show_env = show_env.unwrap_or(self.show_env);
            }
            Change::Reserve { .. } | Change::Nothing => {}
        }
    }

    /// No generation of this slot up to `last` is used without another save.
    pub(super) fn reserve(&mut self, name: &AppName, slot: Slot, last: Generation) {
        if let Some(app) = self.apps.get_mut(name)
            && let Some(slot) = Arc::make_mut(app).slots.get_mut(slot.0 as usize)
        {
            slot.reserved = slot.reserved.max(last);
        }
    }

    fn create(&mut self, spec: &Arc<AppSpec>, stopped: &BTreeSet<Slot>) {
        if self.apps.contains_key(&spec.name) {
            return;
        }
        let mut app = SavedApp {
            spec: Arc::clone(spec),
            revision: 1,
            previous: None,
            older: Vec::new(),
            slots: Vec::new(),
            operation: None,
        };
        resize(&mut app, spec.instances, &mut self.next_pm_id);
        for (index, slot) in app.slots.iter_mut().enumerate() {
            slot.desired =
                if stopped.contains(&slot_at(index)) { Desired::Stopped } else { Desired::Running };
        }
        self.apps.insert(spec.name.clone(), Arc::new(app));
    }

    fn edit(&mut self, name: &AppName, change: impl FnOnce(&mut SavedApp, &mut u32)) {
        if let Some(app) = self.apps.get_mut(name) {
            change(Arc::make_mut(app), &mut self.next_pm_id);
        }
    }
}

/// The number of the slot at this place; slots have no holes.
pub(super) fn slot_at(index: usize) -> Slot {
    Slot(u32::try_from(index).unwrap_or(u32::MAX))
}

/// Those of the first `count` slots that are meant; `None`: all of them.
fn chosen<'a>(
    app: &'a mut SavedApp,
    slots: Option<&'a BTreeSet<Slot>>,
    count: usize,
) -> impl Iterator<Item = &'a mut SavedSlot> {
    app.slots
        .iter_mut()
        .take(count)
        .enumerate()
        .filter(move |(index, _)| slots.is_none_or(|slots| slots.contains(&slot_at(*index))))
        .map(|(_, slot)| slot)
}

/// The highest release number in use.
fn newest(app: &SavedApp) -> u64 {
    let previous = app.previous.iter().chain(&app.older).map(|(_, revision)| *revision).max().unwrap_or(0);
    app.slots.iter().map(|slot| slot.revision).fold(app.revision.max(previous), u64::max)
}

/// Adds slots at the end, or removes the highest. New slots are meant to run when any other is.
fn resize(app: &mut SavedApp, instances: u32, next_pm_id: &mut u32) {
    let count = instances.max(1) as usize;
    let desired = if app.slots.iter().any(|slot| slot.desired == Desired::Running) {
        Desired::Running
    } else {
        Desired::Stopped
    };
    app.slots.truncate(count);
    while app.slots.len() < count {
        let pm_id = PmId(*next_pm_id);
        *next_pm_id = next_pm_id.saturating_add(1);
        app.slots.push(SavedSlot {
            pm_id,
            desired,
            reserved: Generation(0),
            revision: app.revision,
            before: 0,
            behind: false,
        });
    }
}

/// Forgets releases that no slot runs any more. One with the same spec as the present one stays while it is used: the
/// spec may change, and its number has to lead to what it was.
fn forget_unused(app: &mut SavedApp) {
    for slot in app.slots.iter_mut().filter(|slot| slot.revision == app.revision) {
        slot.behind = false;
    }
    let used = |(_, revision): &(Arc<AppSpec>, u64)| {
        app.slots.iter().any(|slot| slot.revision == *revision || slot.before == *revision)
    };
    let previous = app.previous.take().filter(used);
    let older = std::mem::take(&mut app.older).into_iter().filter(used).collect();
    (app.previous, app.older) = (previous, older);
}

fn condemn(app: &mut SavedApp) {
    app.operation = Some(SavedOperation::Delete);
    for slot in &mut app.slots {
        slot.desired = Desired::Stopped;
    }
}

/// Slots that were not replaced return to the release before; without any replaced slot the whole app does. Slots
/// that only the failed release asked for go with it, unless they or others behind them were finished.
fn revert(app: &mut SavedApp, replaced: &BTreeSet<Slot>, next_pm_id: &mut u32) {
    // What it was to be never was saved, or it is over: there is nothing to return from.
    let release = |operation: &mut SavedOperation| *operation != SavedOperation::Delete;
    if app.operation.take_if(release).is_none() {
        return;
    }
    let Some((old_spec, old_revision)) = app.previous.clone() else { return };
    // Finished slots stay, also those that only the failed release asked for.
    let finished = replaced.last().map_or(0, |slot| slot.0.saturating_add(1));
    let count = u32::try_from(app.slots.len()).unwrap_or(u32::MAX);
    resize(app, count.min(old_spec.instances.max(finished)), next_pm_id);
    let failed = app.revision;
    let is_kept = |slot: &SavedSlot| slot.revision == failed;
    let splits =
        app.slots.iter().enumerate().any(|(index, slot)| is_kept(slot) && replaced.contains(&slot_at(index)));
    for (index, slot) in app.slots.iter_mut().enumerate() {
        if is_kept(slot) && !replaced.contains(&slot_at(index)) {
            slot.revision = if slot.before == 0 { old_revision } else { slot.before };
            slot.behind |= splits;
        }
        slot.before = 0;
    }
    if app.slots.iter().all(|slot| slot.revision != failed) {
        (app.spec, app.revision) = (old_spec, old_revision);
        app.previous = None;
    }
    let count = u32::try_from(app.slots.len()).unwrap_or(u32::MAX);
    if app.spec.instances != count {
        let mut spec = AppSpec::clone(&app.spec);
        spec.instances = count;
        app.spec = Arc::new(spec);
    }
    forget_unused(app);
}

/// Whether instances of the two differ in nothing but rules of ours.
pub(super) fn is_same_program(one: &AppSpec, other: &AppSpec) -> bool {
    differences(one, other).iter().all(|one| one.weight != Weight::Process)
}

/// The spec of a release that a slot or a run names.
pub(super) fn spec_of(app: &SavedApp, revision: u64) -> &Arc<AppSpec> {
    if revision == app.revision {
        return &app.spec;
    }
    let others = app.previous.iter().chain(&app.older);
    others.filter(|(_, other)| *other == revision).map(|(spec, _)| spec).next().unwrap_or(&app.spec)
}
