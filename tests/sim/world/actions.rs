//! What is done about a turn's actions.

use super::*;

impl World {
    pub(super) fn perform(&mut self, actions: Vec<Action>) {
        for action in actions {
            self.perform_one(action);
        }
        self.check_rows();
    }

    pub(super) fn perform_one(&mut self, action: Action) {
        if self.verbose && !matches!(action, Action::Progress { .. } | Action::Save { .. }) {
            self.log.push(
                format!("              {action:?}").replace("InstanceId ", "").chars().take(400).collect(),
            );
        }
        match action {
            Action::Save { save, state } => {
                let span = millis(self.rng.below(self.unkind.save_delay + 1));
                if self.sabotage.bug == Bug::SaveLater {
                    // Says that it is durable before it is.
                    self.later(millis(0), Happening::Hears(Event::Saved { save }));
                    return;
                }
                self.later(span, Happening::SaveEnds(save, state));
            }
            Action::TakeOver { app, spec, revision } => {
                for (_, proc) in
                    self.procs.iter_mut().filter(|(id, proc)| id.app == app && proc.revision == revision)
                {
                    proc.follow(&spec);
                }
            }
            Action::Spawn { id, spec, revision, .. } => {
                // What cannot be started is known of the files as they were.
                self.unfit.remove(&id.app);
                let version = self.files.get(&id.app).map_or(1, |(version, _)| *version);
                self.spawn(id.clone(), spec, revision, version);
                let from = started_from(version);
                self.later(millis(0), Happening::Hears(Event::StartedFrom { id, from }));
            }
            Action::SpawnFrom { id, spec, revision, from, .. } => {
                let version = version_of(&from);
                let present = self.files.get(&id.app).map_or(1, |(version, _)| *version);
                self.spawn(id.clone(), spec, revision, version);
                if version == present || self.releases.contains_key(&(id.app.clone(), version)) {
                    let from = StartedFrom::clone(&from);
                    self.later(millis(0), Happening::Hears(Event::StartedFrom { id, from }));
                } else if let Some(proc) = self.procs.get_mut(&id) {
                    // The files have changed.
                    proc.behaviour.no_spawn = Some(Retry::Backoff);
                }
            }
            Action::Preflight { app, check, spec: _ } => {
                let missing = self.files.get(&app).is_some_and(|(_, files)| files.no_spawn.is_some());
                let fault = if self.unkind.moody { self.rng.chance(8) } else { missing };
                self.unfit.remove(&app);
                let others = self.open.values().filter(|(_, command)| concerns(command, &app)).count() > 1;
                if fault && !others {
                    let serves = self.procs.iter().filter(|(id, proc)| id.app == app && proc.serves());
                    self.unfit.insert(app.clone(), serves.map(|(id, _)| id.clone()).collect());
                }
                let fault = fault.then(|| String::from("no such directory"));
                self.later(millis(0), Happening::Hears(Event::Checked { app, check, fault }));
            }
            Action::Reply { op, outcome } => self.replied(op, outcome),
            Action::Progress { op, step } => self.steps.push((op, step)),
            Action::Quit => {
                if self.procs.values().any(Proc::alive) {
                    broken!(self, "the daemon ends although processes live");
                }
                self.quit = true;
            }
            Action::CloseListeners { app, keep } => {
                if keep.is_none() && self.procs.iter().any(|(id, proc)| id.app == app && proc.alive()) {
                    broken!(self, "the listeners of {app} are closed although it runs");
                }
            }
            Action::Forget { id } => match self.procs.remove(&id) {
                Some(proc) if proc.exited.is_none() || !proc.tree_gone => {
                    broken!(self, "{id} is forgotten although not all of it is gone");
                }
                Some(_) => {}
                None => broken!(self, "{id} is forgotten twice"),
            },
            Action::PutIn { id } => self.order(id, |proc, _, _| {
                proc.put_in = true;
                // A supervisor that did not remember the stop takes it back.
                proc.ladder = proc.signalled_at.is_some();
                None
            }),
            Action::TakeOut { id } => {
                self.check_takedown(&id);
                self.check_order(&id);
                self.order(id, |proc, now, id| {
                    (proc.put_in, proc.ladder) = (false, true);
                    let span = proc.behaviour.settles_after;
                    proc.settles_at = Some(now + span);
                    Some((span, Event::Settled { id }))
                });
            }
            Action::Drain { id, within, .. } => {
                self.check_takedown(&id);
                self.check_order(&id);
                self.order(id, |proc, now, id| {
                    proc.ladder = true;
                    // What a failed reload removes has less time than its spec says.
                    let limit = proc
                        .spec
                        .stop
                        .drain_timeout
                        .unwrap_or(secs(6))
                        .min(proc.spec.stop.timeout)
                        .min(within);
                    let span = proc.behaviour.drains_after;
                    proc.drain_until = Some(now + span.unwrap_or(limit).min(limit));
                    span.map(|span| (span, Event::Drained { id }))
                });
            }
            Action::AskKillListeners { id, .. } => {
                self.check_takedown(&id);
                self.order(id, |proc, _, id| {
                    proc.ladder = true;
                    proc.behaviour.kill_listeners.map(|count| (millis(1), Event::KillListeners { id, count }))
                });
            }
            Action::Probe { id, role, delay } => {
                self.seq += 1;
                let order = self.seq;
                if let Some(proc) = self.procs.get_mut(&id) {
                    (proc.asked, proc.known_well) = (Some((role, order)), false);
                    self.later(delay, Happening::Asked(id, role, order));
                }
            }
            Action::RunHook { id, kind, spec, .. } => self.run_hook(id, kind, &spec),
            Action::KillHook { id } => {
                if let Some(kind) = self.hooks.get(&id) {
                    let kind = *kind;
                    self.later(millis(2), Happening::HookEnds(id, kind, None));
                }
            }
            Action::StopProbing { id } => {
                if let Some(proc) = self.procs.get_mut(&id) {
                    proc.asked = None;
                }
            }
            Action::WatchMemory { id, limit } => {
                self.seq += 1;
                let order = self.seq;
                if let Some(proc) = self.procs.get_mut(&id) {
                    (proc.weighed, proc.heavy) = (Some((limit, order)), None);
                    self.later(self.weighed_every, Happening::Weighed(id, order));
                }
            }
            Action::UnwatchMemory { id } => {
                if let Some(proc) = self.procs.get_mut(&id) {
                    proc.weighed = None;
                }
            }
            Action::Disconnect { id } => self.order(id, |proc, _, id| {
                proc.behaviour.disconnects_after.map(|span| (span, Event::ChannelClosed { id }))
            }),
            Action::Signal { id, .. } | Action::SendShutdown { id } => self.signal(id),
            Action::Follow { id, .. } => {
                if self.procs.get(&id).is_none_or(|proc| proc.signalled_at.is_none()) {
                    broken!(self, "{id} is to follow what was never signalled");
                }
            }
            Action::KillTree { id } => self.kill_tree(id),
            Action::EndLeftovers { id, .. } => {
                let Some(proc) = self.procs.get(&id) else {
                    return broken!(self, "leftovers of {id}, which is unknown, are ended");
                };
                if proc.exited.is_none() {
                    return broken!(self, "leftovers of {id} are ended although it lives");
                }
                let span = proc.behaviour.leftovers_for.min(secs(1));
                self.later(span, Happening::TreeGoes(id));
            }
        }
    }

    /// An order for a process: it must be there, and its end must not be known.
    pub(super) fn order(
        &mut self,
        id: InstanceId,
        order: impl FnOnce(&mut Proc, Moment, InstanceId) -> Option<(Duration, Event)>,
    ) {
        let now = self.now;
        match self.procs.get_mut(&id) {
            None => broken!(self, "an order for {id}, which is gone"),
            Some(proc) if proc.exit_told => broken!(self, "an order for {id}, whose exit is known"),
            Some(proc) => {
                if let Some((span, event)) = order(proc, now, id) {
                    self.later(span, Happening::Hears(event));
                }
            }
        }
    }

    /// A sample of its memory, unless nobody wants it any more.
    pub(super) fn weighs(&mut self, id: &InstanceId, order: u64) {
        let (now, every) = (self.now, self.weighed_every);
        let Some(proc) = self.procs.get_mut(id) else { return };
        let Some((limit, _)) = proc.weighed.filter(|(_, number)| *number == order) else { return };
        if proc.exit_told || (proc.ladder && !proc.believed && proc.exited.is_none() && !proc.signal_lost) {
            return broken!(self, "{id} is measured although it is on its way out");
        }
        if proc.spec.max_memory != Some(limit) {
            let meant = proc.spec.max_memory;
            return broken!(self, "{id} is measured against {limit} instead of {meant:?}");
        }
        let fat = proc.is_fat(now);
        let before = proc.heavy;
        let heavy = if fat { before.unwrap_or(0) + 1 } else { 0 };
        proc.heavy = Some(heavy);
        let lives = proc.alive();
        self.later(every, Happening::Weighed(id.clone(), order));
        // As the daemon does: only what matters is told.
        let news = before.is_none() || if fat { heavy <= SAMPLES } else { before != Some(0) };
        if news && lives {
            self.turn(Event::Measured { id: id.clone(), bytes: if fat { LIMIT * 2 } else { LIMIT / 2 } });
        }
    }

    pub(super) fn signal(&mut self, id: InstanceId) {
        self.check_takedown(&id);
        self.check_order(&id);
        let now = self.now;
        let Some(proc) = self.procs.get_mut(&id) else {
            return broken!(self, "{id} is signalled although it is gone");
        };
        if proc.exit_told {
            return broken!(self, "{id} is signalled although its exit is known");
        }
        if proc.put_in {
            return broken!(self, "{id} is signalled in rotation");
        }
        if proc.settles_at.is_some_and(|at| at > now) {
            return broken!(self, "{id} is signalled with hand-overs unanswered");
        }
        // Of a release that is long gone the next supervisor does not know the rules any more.
        let (slot, revision) = (id.slot.0 as usize, proc.revision);
        let known = self.disk.apps.iter().any(|app| {
            let mut releases = app.previous.iter().chain(&app.older).map(|(_, revision)| *revision);
            app.spec.name == id.app
                && slot < app.slots.len()
                && (app.revision == revision || releases.any(|known| known == revision))
        });
        if known && proc.drain_until.is_some_and(|at| at > now) {
            return broken!(self, "{id} is signalled while it drains");
        }
        proc.ladder = true;
        proc.signalled_at = Some(now);
        if let Some(span) = proc.behaviour.obeys_after {
            let reason = ExitReason::Signal(Signal::INT);
            self.later(span, Happening::Exits(id, reason));
        }
    }

    pub(super) fn kill_tree(&mut self, id: InstanceId) {
        let now = self.now;
        let Some(proc) = self.procs.get_mut(&id) else {
            return broken!(self, "{id} is killed although it is gone");
        };
        let early = proc.signalled_at.is_none_or(|at| now < at + millis(400)) && !proc.signal_lost;
        if early && !self.hurried {
            return broken!(self, "{id} is killed without a signal and its time before");
        }
        if proc.exited.is_none() {
            self.later(millis(2), Happening::Exits(id.clone(), ExitReason::Signal(Signal::KILL)));
        }
        self.later(millis(4), Happening::TreeGoes(id));
    }

    pub(super) fn spawn(&mut self, id: InstanceId, spec: Arc<AppSpec>, revision: u64, version: u32) {
        self.spawns += 1;
        let saved = self.disk.apps.iter().find(|app| app.spec.name == id.app);
        let wanted = saved.and_then(|app| app.slots.get(id.slot.0 as usize));
        match wanted {
            None => return broken!(self, "{id} is started, which is not on disk"),
            Some(slot) if slot.desired == Desired::Stopped => {
                return broken!(self, "{id} is started, which is stopped");
            }
            // A disk that takes nothing keeps no app down.
            Some(slot) if slot.reserved < id.generation && !self.disk_refuses => {
                return broken!(self, "{id} is started before its generation is reserved");
            }
            Some(_) => {}
        }
        if let Some(fleet) = &self.fleet {
            let believed = fleet.saved();
            let slot = believed
                .apps
                .iter()
                .find(|app| app.spec.name == id.app)
                .and_then(|app| app.slots.get(id.slot.0 as usize));
            if slot.is_none_or(|slot| slot.desired == Desired::Stopped) {
                return broken!(self, "{id} is started although its stop was carried out");
            }
        }
        if self.open.values().any(|(_, command)| ends(command, &id)) {
            return broken!(self, "{id} is started while its stop waits");
        }
        if self.down.contains(&(id.app.clone(), id.slot)) {
            return broken!(self, "{id} is started, which somebody was told is down");
        }
        let wants = |app: &SavedApp| app.spec.name == id.app && app.spec.hooks.pre_start.is_some();
        let hooked = self.fleet.as_ref().is_some_and(|fleet| fleet.saved().apps.iter().any(wants));
        if self.unprepared.contains(&id.app) && hooked {
            return broken!(self, "{id} is started without its pre_start hook");
        }
        self.unprepared.remove(&id.app);
        if !self.spawned.insert(id.clone()) {
            return broken!(self, "{id} runs twice");
        }
        let running = self.procs.iter().any(|(other, proc)| {
            let same = other.app == id.app && other.slot == id.slot;
            // One of a pair that can is enough: what a reload has put side by side may go back in the same way.
            let overlap = spec.can_overlap() || proc.spec.can_overlap();
            same && !proc.tree_gone && (!overlap || (proc.exited.is_some() && !proc.ladder))
        });
        if running {
            return broken!(self, "{id} is started before its predecessor is gone");
        }
        let present = self.files.get(&id.app).filter(|(present, _)| *present == version);
        let released = self.releases.get(&(id.app.clone(), version));
        let behaviour = present.map(|(_, files)| files).or(released).cloned().unwrap_or_default();
        let mut behaviour = if self.unkind.moody { Behaviour::random(&mut self.rng) } else { behaviour };
        if self.unkind.moody && self.limited.contains(&id.app) && self.appetite.chance(15) {
            behaviour.fat_after = Some(millis(self.appetite.below(20_000)));
        }
        self.procs.insert(
            id.clone(),
            Proc {
                spec,
                born: self.now,
                revision,
                version,
                behaviour,
                pid: None,
                exited: None,
                exit_told: false,
                tree_gone: false,
                said_ready: false,
                keys: BTreeSet::new(),
                told: Vec::new(),
                put_in: false,
                settles_at: None,
                drain_until: None,
                signalled_at: None,
                signal_lost: false,
                believed: false,
                ladder: false,
                asked: None,
                passed: false,
                known_well: false,
                weighed: None,
                heavy: None,
            },
        );
        self.check_surge(&id.app);
        self.check_needs(&id);
        let span = millis(self.rng.below(3));
        self.later(span, Happening::Birth(id));
    }
}

/// What tells the files of one version from those of another.
pub(super) fn started_from(version: u32) -> StartedFrom {
    let path = PathBuf::from("/srv/app.js");
    let script = StartedFile { path, device: 1, inode: 1, size: u64::from(version), modified: 0 };
    StartedFrom { cwd: PathBuf::from("/srv"), script: Some(script) }
}

pub(super) fn version_of(from: &StartedFrom) -> u32 {
    from.script.as_ref().map_or(0, |script| u32::try_from(script.size).unwrap())
}
