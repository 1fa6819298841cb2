//! What must be true after every turn, and of everything that is taken down or started.

use super::*;

impl World {
    pub(super) fn online(&self) -> BTreeSet<InstanceId> {
        let views = self.fleet.iter().flat_map(Fleet::view);
        let slots = views.flat_map(|view| view.slots);
        let runs = slots.flat_map(|slot| slot.current.into_iter().chain(slot.draining));
        runs.filter(|run| run.state == RunState::Online).map(|run| run.id).collect()
    }

    /// What an app needs is up before anything of it is started from rest.
    pub(super) fn check_needs(&mut self, id: &InstanceId) {
        if !self.awake.insert(id.app.clone()) || self.sabotage.bug == Bug::StopsAtOnce {
            return;
        }
        let operation = self.fleet.as_ref().and_then(|fleet| fleet.app(&id.app)?.operation);
        // Nothing is promised of what is asked of an app in any other way.
        if operation.is_some_and(|operation| operation != "start") {
            return;
        }
        let needs = self.needs.get(&id.app).cloned().unwrap_or_default();
        for (needed, how_far) in needs {
            let up = match how_far {
                Dependency::Ready => self.was_up.contains(&needed),
                Dependency::Started => self.awake.contains(&needed),
            };
            if !up {
                let app = &id.app;
                broken!(self, "{app} is started although {needed}, which it needs, never came up");
            }
        }
    }

    pub(super) fn note_up(&mut self) {
        let Some(fleet) = &self.fleet else { return };
        let saved = fleet.saved();
        for (view, app) in fleet.view().iter().zip(&saved.apps) {
            let running =
                view.slots.iter().zip(&app.slots).filter(|(_, slot)| slot.desired == Desired::Running);
            let done = |row: &SlotView| {
                row.status == Status::Stopped && row.by_itself && row.last_exit == Some(ExitReason::Code(0))
            };
            let mut up = running.map(|(row, _)| row.status == Status::Online || done(row)).peekable();
            let ended = app.slots.iter().all(|slot| slot.desired == Desired::Stopped);
            if (up.peek().is_some() && up.all(|up| up)) || ended {
                self.was_up.insert(app.spec.name.clone());
            }
        }
    }

    /// Of apps that go down together those that need another one are gone before it goes.
    pub(super) fn check_order(&mut self, id: &InstanceId) {
        // What is not up goes when it is late, whoever is there.
        if self.needs.is_empty() || !self.procs.get(id).is_some_and(Proc::serves) {
            return;
        }
        let Some(fleet) = &self.fleet else { return };
        let saved = fleet.saved();
        let goes = |name: &AppName| {
            saved.apps.iter().any(|app| {
                app.spec.name == *name && app.slots.iter().all(|slot| slot.desired == Desired::Stopped)
            })
        };
        // A slot that is given up goes at once.
        let has_slot = |app: &SavedApp| app.spec.name == id.app && (id.slot.0 as usize) < app.slots.len();
        if !goes(&id.app) || !saved.apps.iter().any(has_slot) {
            return;
        }
        let first = self.procs.iter().find(|(other, proc)| {
            let needs = self.needs.get(&other.app).is_some_and(|needs| needs.contains_key(&id.app));
            needs && goes(&other.app) && proc.alive()
        });
        if let Some((other, _)) = first {
            let other = other.clone();
            broken!(self, "{id} goes down before {other}, which needs it");
        }
    }

    /// Runs that launch, serve or have not got their signal yet stay within instances + surge.
    pub(super) fn check_surge(&mut self, app: &AppName) {
        let Some(view) = self.fleet.as_ref().and_then(|fleet| fleet.app(app)) else { return };
        // What the release before was allowed may still be draining.
        let of_app = self.procs.iter().filter(|(id, _)| id.app == *app).map(|(_, proc)| &proc.spec.reload);
        let instances = view.spec.instances;
        let surge = |rules: &ReloadRules| {
            let surge = match rules.strategy {
                Strategy::Rolling => rules.max_surge.of_up(instances),
                Strategy::BlueGreen => instances,
            };
            if rules.max_unavailable.of_down(instances) == 0 { surge.max(1) } else { surge }
        };
        // And the way back goes by the rules of the release that has failed.
        let surge = of_app.chain([&view.spec.reload]).map(surge).max().unwrap_or(0);
        let limit = view.slots.len() + surge as usize;
        let count = self
            .procs
            .iter()
            .filter(|(id, proc)| {
                // What is or was kept in reserve comes on top.
                id.app == *app
                    && proc.exited.is_none()
                    && proc.signalled_at.is_none()
                    && !proc.signal_lost
                    && state_of(&view, id) != Some(RunState::Reserve)
                    && !self.reserved.contains(id)
            })
            .count();
        if count > limit {
            broken!(self, "{app} has {count} runs, {limit} are allowed");
        }
    }

    /// In a reload nothing that serves is taken away unless enough others do, or its successor does.
    pub(super) fn check_takedown(&mut self, id: &InstanceId) {
        if self.unfit.get(&id.app).is_some_and(|serving| serving.contains(id)) {
            return broken!(self, "{id} is taken down although nothing could be started in its place");
        }
        // A supervisor without its memory cannot know which of them have been serving.
        let believes = self.procs.iter().any(|(other, proc)| other.app == id.app && proc.believed);
        if believes || !self.procs.get(id).is_some_and(Proc::serves) {
            return;
        }
        let Some(view) = self.fleet.as_ref().and_then(|fleet| fleet.app(&id.app)) else { return };
        self.check_health_cap(id, &view);
        self.check_cause(id, &view);
        if let Some(own) =
            self.own.get_mut(&id.app).filter(|own| view.operation == Some("reload") && !own.asked)
        {
            own.taken.insert(id.slot);
            if own.taken.len() > 1 {
                broken!(self, "{id} is the second one that is taken down although nobody asked for it");
            }
        }
        if view.operation != Some("reload") || !view.spec.can_overlap() {
            return;
        }
        // Of a slot that the release gives up nothing is promised.
        if id.slot.0 >= view.spec.instances {
            return;
        }
        let others: Vec<&InstanceId> = self
            .procs
            .iter()
            .filter(|(other, proc)| {
                other.app == id.app && *other != id && proc.serves() && self.is_online(other)
            })
            .map(|(other, _)| other)
            .collect();
        let saved = self.fleet.as_ref().map(Fleet::saved).unwrap_or_default();
        let meant = saved.apps.iter().filter(|app| app.spec.name == id.app).flat_map(|app| &app.slots);
        let meant = meant.take(promised(&view, &saved) as usize);
        let given_up = |status| matches!(status, Status::Errored | Status::Stopped);
        let rows = view.slots.iter().map(|row| given_up(row.status));
        let meant = meant.zip(rows).filter(|(slot, gone)| slot.desired == Desired::Running && !gone).count();
        let least =
            meant.saturating_sub(view.spec.reload.max_unavailable.of_down(view.spec.instances) as usize);
        if others.len() < least
            && !others.iter().any(|other| other.slot == id.slot)
            && self.served.contains(id)
        {
            let count = others.len();
            broken!(self, "{id} is taken down and only {count} serve, {least} are promised");
        }
    }

    /// What serves is taken down only when something is asked that takes it down.
    pub(super) fn check_cause(&mut self, id: &InstanceId, view: &AppView) {
        let wanted = self.fleet.as_ref().is_some_and(|fleet| {
            let saved = fleet.saved();
            let app = saved.apps.iter().find(|app| app.spec.name == id.app);
            let slot = app.and_then(|app| app.slots.get(id.slot.0 as usize));
            slot.is_some_and(|slot| slot.desired == Desired::Running)
        });
        let ends =
            self.open.values().any(|(_, command)| matches!(command, Command::Kill | Command::Terminate));
        if wanted
            && !ends
            && self.served.contains(id)
            && matches!(view.operation, None | Some("start" | "scale"))
        {
            let operation = view.operation.unwrap_or("no operation");
            broken!(self, "{id} serves and is taken down although {operation} is going on");
        }
    }

    /// Nobody is ended for being unhealthy when no other instance is known to be well.
    pub(super) fn check_health_cap(&mut self, id: &InstanceId, view: &AppView) {
        let Some(probe) = &view.spec.health else { return };
        let saved = self.fleet.as_ref().map(Fleet::saved).unwrap_or_default();
        let wanted = saved.apps.iter().find(|app| app.spec.name == id.app);
        let meant: Vec<bool> = wanted.map_or_else(Vec::new, |app| {
            app.slots.iter().map(|slot| slot.desired == Desired::Running).collect()
        });
        let asked = self.open.values().any(|(_, command)| concerns(command, &id.app)) || self.died;
        let running = meant.iter().filter(|running| **running).count();
        if asked
            || !self.is_online_before(id)
            || running < 2
            || !meant.get(id.slot.0 as usize).is_some_and(|running| *running)
        {
            return;
        }
        // What a probe has said may be as old as this.
        let slack = probe.interval * 2 + millis(self.unkind.save_delay) + secs(1);
        let now = self.now;
        // Nobody was asked anything while the machine slept.
        if now < self.woken + slack {
            return;
        }
        let sick = self.procs.get(id).is_some_and(|proc| proc.is_sick(now, Duration::ZERO));
        let others = self.procs.iter().any(|(other, proc)| {
            other.app == id.app && other != id && proc.serves() && !proc.is_sick(now, slack)
        });
        if sick && !others {
            broken!(self, "{id} is ended for being unhealthy, and no other is well");
        }
    }

    pub(super) fn is_online(&self, id: &InstanceId) -> bool {
        let Some(view) = self.fleet.as_ref().and_then(|fleet| fleet.app(&id.app)) else { return false };
        view.slots
            .iter()
            .flat_map(|slot| slot.current.iter().chain(&slot.draining))
            .any(|run| run.id == *id && run.state == RunState::Online)
    }

    /// It had been put into rotation: what is still launching is no loss.
    pub(super) fn is_online_before(&self, id: &InstanceId) -> bool {
        let Some(view) = self.fleet.as_ref().and_then(|fleet| fleet.app(&id.app)) else { return false };
        view.slots
            .iter()
            .flat_map(|slot| slot.current.iter().chain(&slot.draining))
            .any(|run| run.id == *id && run.ready_at.is_some())
    }

    /// Processes are rows, and rows are processes.
    pub(super) fn check_rows(&mut self) {
        if self.broken.is_some() || self.quit {
            return;
        }
        let Some(fleet) = &self.fleet else { return };
        let mut rows: BTreeMap<InstanceId, Status> = BTreeMap::new();
        let mut lies = None;
        let views = fleet.view();
        for view in &views {
            for slot in &view.slots {
                for run in slot.current.iter().chain(&slot.draining) {
                    rows.insert(run.id.clone(), run.status);
                    let Some(proc) = self.procs.get(&run.id) else {
                        if !run.queued {
                            lies = Some(format!("{} has a row and no process", run.id));
                        }
                        continue;
                    };
                    if proc.put_in && run.state != RunState::Online {
                        lies = Some(format!("{} gets connections, but it is {}", run.id, run.state.as_str()));
                    }
                    if run.state == RunState::Online {
                        if proc.exited.is_none() && !proc.may_serve() {
                            lies = Some(format!("{} is online, but never said so", run.id));
                        }
                        if proc.spec.is_node_cluster()
                            && !proc.put_in
                            && !proc.exit_told
                            && proc.exited.is_none()
                        {
                            lies = Some(format!("{} is online, but gets no connections", run.id));
                        }
                    }
                }
            }
        }
        if let Some(hidden) = self.procs.keys().find(|id| !rows.contains_key(*id)) {
            lies = Some(format!("{hidden} has a process and no row"));
        }
        if let Some(lie) = lies {
            self.break_promise(lie);
        }
        self.check_floor(&views);
        self.check_own(&views);
    }

    /// Reloads that nobody asked for: there is a reason, nobody else is taken down, and somebody serves meanwhile.
    fn check_own(&mut self, views: &[AppView]) {
        let mut own = BTreeMap::new();
        for view in views.iter().filter(|view| view.operation == Some("reload")) {
            let app = &view.spec.name;
            let saved = self.fleet.as_ref().map(Fleet::saved).unwrap_or_default();
            let acts = saved.apps.iter().any(|one| one.spec.name == *app && one.operation.is_some());
            let asked = self.died || self.open.values().any(|(_, command)| concerns(command, app));
            // The next one may begin in the turn in which the one before has ended: then a pause begins, too.
            let pauses = view.slots.iter().flat_map(|slot| [slot.replace_after, slot.curb_after]).flatten();
            let begins = pauses.map(|at| at.since(self.now)).any(|span| {
                span >= secs(15) && span.subsec_nanos() == 0 && (span.as_secs() / 15).is_power_of_two()
                    || span == secs(600)
            });
            if let Some(mut known) = self.own.remove(app).filter(|known| !(known.acts && !acts && begins)) {
                (known.acts, known.asked) = (known.acts || acts, known.asked || asked);
                own.insert(app.clone(), known);
                continue;
            }
            own.insert(app.clone(), Reloading { asked, acts, taken: BTreeSet::new() });
            if asked {
                continue;
            }
            self.own_reloads += 1;
            let runs = || view.slots.iter().filter_map(|slot| slot.current.as_ref());
            let why = |run: &&RunView| run.over_memory.is_some() || run.health == Some(Health::Unhealthy);
            if !runs().any(|run| why(&run)) {
                broken!(self, "{app} is reloaded, and nobody asked for it");
            }
            let fat = |id: &InstanceId| self.procs.get(id).is_some_and(|proc| proc.heavy > Some(0));
            if let Some(lean) = runs().find(|run| run.over_memory.is_some() && !fat(&run.id)) {
                let id = lean.id.clone();
                broken!(self, "{id} is said to use memory that it does not use");
            }
            let meant =
                saved.apps.iter().filter(|saved| saved.spec.name == *app).flat_map(|saved| &saved.slots);
            let several = meant.filter(|slot| slot.desired == Desired::Running).count() > 1;
            let serves = |run: &RunView| {
                run.state == RunState::Online && run.health.is_none_or(|health| health == Health::Healthy)
            };
            let spared = |run: &&RunView| runs().any(|other| other.id != run.id && serves(other));
            if several && !view.spec.can_overlap() && !runs().filter(|run| why(run)).any(|run| spared(&run)) {
                broken!(self, "{app}: one goes before its successor is there, and no other serves");
            }
        }
        self.own = own;
    }

    /// However a reload goes about it: as long as nothing dies by itself, the number of those in rotation does not fall
    /// below `instances - max_unavailable`.
    pub(super) fn check_floor(&mut self, views: &[AppView]) {
        let Some(fleet) = &self.fleet else { return };
        if views.iter().all(|view| view.operation != Some("reload")) {
            self.in_rotation.clear();
            return;
        }
        let saved = fleet.saved();
        let before = std::mem::take(&mut self.in_rotation);
        let mut fallen = None;
        for view in views {
            let name = &view.spec.name;
            let mine = || self.procs.iter().filter(|(id, _)| id.app == *name);
            if view.operation != Some("reload")
                || !mine().all(|(_, proc)| proc.spec.can_overlap() && !proc.believed)
                || !view.spec.can_overlap()
            {
                continue;
            }
            // Nothing is promised of slots that the release gives up.
            let stay = view.slots.iter().filter(|slot| slot.slot.0 < view.spec.instances);
            let runs = stay.flat_map(|slot| slot.current.iter().chain(&slot.draining));
            let now = runs.filter(|run| run.state == RunState::Online).count();
            // A crash takes one away, and so does an app that ends for good or a slot that is given up.
            let died = mine().any(|(_, proc)| proc.exited.is_some() && !proc.ladder);
            let wanted = saved.apps.iter().find(|app| app.spec.name == *name);
            let stopped = wanted.is_none_or(|app| {
                app.slots.len() != app.spec.instances as usize
                    || app.slots.iter().any(|slot| slot.desired == Desired::Stopped)
            });
            // What was given up would hold up every reload for ever.
            let given_up = |row: &&SlotView| matches!(row.status, Status::Errored | Status::Stopped);
            let given_up = u32::try_from(view.slots.iter().filter(given_up).count()).unwrap();
            let missing = view.spec.reload.max_unavailable.of_down(view.spec.instances) + given_up;
            let least = promised(view, &saved).saturating_sub(missing);
            if let Some((before, of)) = before.get(name)
                && now < *before
                && *of == view.spec.instances
                && now < least as usize
                && !died
                && !stopped
            {
                fallen = Some(format!("{name}: {before} were in rotation, now {now}; {least} are promised"));
            }
            self.in_rotation.insert(name.clone(), (now, view.spec.instances));
        }
        if let Some(fallen) = fallen {
            self.break_promise(fallen);
        }
    }

    /// After a long calm: everything is as wanted, everybody has been answered.
    pub(crate) fn check_converged(&mut self) {
        if self.broken.is_some() || self.quit {
            return;
        }
        if let Some((op, (_, command))) = self.open.iter().next() {
            let pictures: Vec<_> = ["api", "web", "job"].iter().map(|app| self.picture(app)).collect();
            let verb = format!("{command:?}").chars().take(160).collect::<String>();
            return broken!(self, "{op:?} was never answered: {verb}\n{pictures:#?}");
        }
        let Some(fleet) = &self.fleet else { return broken!(self, "no supervisor came back") };
        let saved = fleet.saved();
        let views = fleet.view();
        if saved != self.disk {
            return broken!(self, "memory and disk differ:\n{saved:?}\n{:?}", self.disk);
        }
        if views.len() != saved.apps.len() {
            return broken!(self, "{} apps are shown, {} are wanted", views.len(), saved.apps.len());
        }
        for (view, app) in views.iter().zip(&saved.apps) {
            let name = &app.spec.name;
            if view.operation.is_some() || app.operation.is_some() {
                return broken!(self, "{name}: an operation never ended: {view:?}");
            }
            if view.slots.len() != app.slots.len() || app.slots.len() != app.spec.instances as usize {
                return broken!(self, "{name} has {} slots instead of {}", view.slots.len(), app.slots.len());
            }
            for (row, wanted) in view.slots.iter().zip(&app.slots) {
                let is_up = |needed: &AppName| {
                    views.iter().any(|view| {
                        view.spec.name == *needed
                            && view.slots.iter().all(|slot| slot.status == Status::Online)
                    })
                };
                let fine = match (wanted.desired, row.status) {
                    (Desired::Running, Status::Launching) if !row.waiting_for.is_empty() => {
                        row.current.is_none() && !row.waiting_for.iter().any(is_up)
                    }
                    (Desired::Running, Status::Online) => row.current.is_some() && row.draining.is_empty(),
                    (Desired::Running, Status::Errored) | (Desired::Stopped, Status::Stopped) => {
                        row.current.is_none() && row.draining.is_empty()
                    }
                    _ => false,
                };
                if !fine {
                    return broken!(self, "{name}: not as wanted ({:?}): {row:?}", wanted.desired);
                }
                let runs = row.current.as_ref().and_then(|run| self.procs.get(&run.id));
                if let Some(proc) = runs.filter(|proc| proc.revision != wanted.revision) {
                    let (slot, runs, wanted) = (row.slot, proc.revision, wanted.revision);
                    return broken!(self, "{name}: slot {slot} runs release {runs} instead of {wanted}");
                }
                // How it says that it is ready was settled when it was spawned.
                let same = |proc: &Proc| {
                    let (ready, instances) = (app.spec.ready.clone(), app.spec.instances);
                    AppSpec { ready, instances, ..AppSpec::clone(&proc.spec) } == *app.spec
                };
                if runs.is_some_and(|proc| proc.revision == app.revision && !same(proc)) {
                    let slot = row.slot;
                    return broken!(self, "{name}: slot {slot} does not follow the rules of its release");
                }
            }
        }
    }
}

pub(super) fn state_of(view: &AppView, id: &InstanceId) -> Option<RunState> {
    let mut runs = view.slots.iter().flat_map(|slot| slot.current.iter().chain(&slot.draining));
    runs.find(|run| run.id == *id).map(|run| run.state)
}

/// How many instances the promise is about: no more than the release has that a failed one goes back to.
pub(super) fn promised(view: &AppView, saved: &SavedFleet) -> u32 {
    let app = saved.apps.iter().find(|app| app.spec.name == view.spec.name);
    let before = app.and_then(|app| app.previous.as_ref()).map(|(spec, _)| spec.instances);
    view.spec.instances.min(before.unwrap_or(u32::MAX))
}
