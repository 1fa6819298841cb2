//! The life of the supervisor: its turns, what it remembers, its death and the next one.

use super::*;

impl World {
    pub(crate) fn supervisor_dies(&mut self) {
        if self.fleet.take().is_none() {
            return;
        }
        self.died = true;
        self.note("--- the supervisor dies");
        self.unfit.clear();
        self.in_rotation.clear();
        // What was on its way to the keeper arrives; what only the supervisor would have heard is gone. A save in
        // flight may be on disk or not.
        let agenda = std::mem::take(&mut self.agenda);
        for (key, happening) in agenda {
            match happening {
                Happening::Birth(id) => self.birth(&id),
                Happening::SaveEnds(_, state) => {
                    if self.rng.chance(50) {
                        self.disk = state;
                    }
                }
                Happening::Hears(_)
                | Happening::HearsAgain(_)
                | Happening::TreeGoes(_)
                | Happening::HookEnds(..)
                | Happening::Asked(..)
                | Happening::Weighed(..) => {}
                Happening::Says(..) | Happening::Exits(..) | Happening::SupervisorStarts => {
                    self.agenda.insert(key, happening);
                }
            }
        }
        // The next one ends what is left of them before it does anything else.
        self.hooks.clear();
        for proc in self.procs.values_mut() {
            (proc.put_in, proc.exit_told, proc.settles_at) = (false, false, None);
            (proc.drain_until, proc.asked, proc.weighed) = (None, None, None);
        }
        self.procs.retain(|_, proc| proc.pid.is_some());
        self.open.clear();
        self.alone.clear();
        let span = millis(self.rng.below(2000));
        self.later(span, Happening::SupervisorStarts);
    }

    /// The machine loses power: only the disk survives.
    pub(crate) fn reboot(&mut self) {
        self.died = true;
        self.note("--- reboot");
        self.in_rotation.clear();
        self.fleet = None;
        self.procs.clear();
        self.agenda.clear();
        self.hooks.clear();
        self.unprepared = self.disk.apps.iter().map(|app| app.spec.name.clone()).collect();
        self.memo = None;
        self.open.clear();
        self.spawned.clear();
        self.awake.clear();
        self.was_up.clear();
        self.rotation.clear();
        self.reserved.clear();
        self.later(secs(1), Happening::SupervisorStarts);
    }

    /// After the daemon has ended, another one is started.
    pub(crate) fn new_daemon(&mut self) {
        self.quit = false;
        self.reboot();
    }

    pub(super) fn supervisor_starts(&mut self) {
        if self.fleet.is_some() {
            return;
        }
        self.note("--- a supervisor starts");
        self.disk_refuses = false;
        let forgets = self.rng.chance(self.unkind.forgets);
        let memo = if forgets { None } else { self.memo.clone() };
        // It knows runs by their release, whose rules may have been saved without having been taken over.
        for (id, proc) in &mut self.procs {
            let app =
                self.disk.apps.iter().find(|app| app.spec.name == id.app && app.revision == proc.revision);
            match app {
                Some(app) if self.rotation.contains(id) => proc.follow(&app.spec),
                // How it has to say that it is ready is read from them, too.
                Some(app) => proc.spec = Arc::clone(&app.spec),
                None => {}
            }
        }
        for proc in self.procs.values_mut() {
            proc.exit_told = proc.exited.is_some();
            proc.believed |= memo.is_none();
            // The ladder is climbed again where it did not come to the signal.
            proc.ladder = proc.signalled_at.is_some() || (proc.ladder && memo.is_some());
        }
        let known = |id: &InstanceId| self.disk.apps.iter().any(|app| app.spec.name == id.app);
        let gone: Vec<_> =
            self.spawned.iter().filter(|id| !known(id) && !self.procs.contains_key(id)).cloned().collect();
        for id in gone {
            self.spawned.remove(&id);
        }
        let slots = |id: &InstanceId| {
            self.disk.apps.iter().find(|app| app.spec.name == id.app).map_or(0, |app| app.slots.len())
        };
        let procs = &self.procs;
        let kept: BTreeSet<_> = self
            .spawned
            .iter()
            .filter(|id| (id.slot.0 as usize) < slots(id) || procs.contains_key(id))
            .cloned()
            .collect();
        self.spawned = kept;
        if memo.is_none() {
            // Numbers that the disk did not take are lost with the memory of them, but for those that something still has.
            let reserved = |id: &InstanceId| {
                let app = self.disk.apps.iter().find(|app| app.spec.name == id.app);
                app.and_then(|app| app.slots.get(id.slot.0 as usize)).map_or(0, |slot| slot.reserved.0)
            };
            let known = |id: &InstanceId| id.generation.0 <= reserved(id) || self.procs.contains_key(id);
            let kept = self.spawned.iter().filter(|id| known(id)).cloned().collect();
            self.spawned = kept;
        }
        let mut found: Vec<Found> = self
            .procs
            .iter()
            .filter_map(|(id, proc)| {
                proc.pid.map(|pid| Found {
                    id: id.clone(),
                    revision: proc.revision,
                    pid,
                    exited: proc.exited.clone(),
                    signalled: proc.signalled_at.is_some(),
                })
            })
            .collect();
        // What nobody has read from the channels.
        let unread: Vec<Event> = self.procs.values().flat_map(|proc| proc.told.clone()).collect();
        let mut saved = self.disk.clone();
        self.sabotage.restore(&mut saved, &mut found);
        let (fleet, mut actions) = Fleet::restore(self.settings, self.now, saved, memo, found);
        self.fleet = Some(fleet);
        if forgets {
            // What has to be believed is no news, and what is told may have been told before.
            let _ = self.fleet.as_mut().map(Fleet::take_news);
            self.rotation = self.online();
        }
        self.hear_news();
        self.remember();
        self.sabotage.actions(&mut actions);
        self.perform(actions);
        for event in unread {
            self.turn(event);
        }
    }

    pub(super) fn turn(&mut self, event: Event) {
        if self.quit || self.broken.is_some() {
            return;
        }
        self.check_patience();
        if self.fleet.is_none() {
            return;
        }
        let events = self.sabotage.event(event);
        for event in events {
            self.turn_of(event);
        }
        for action in std::mem::take(&mut self.sabotage.again) {
            self.perform_one(action);
        }
        for id in std::mem::take(&mut self.sabotage.skipped) {
            self.later(millis(0), Happening::Hears(Event::HookEnded { id, end: HookEnd::Succeeded }));
        }
    }

    pub(super) fn turn_of(&mut self, event: Event) {
        let Some(fleet) = &mut self.fleet else { return };
        if self.verbose {
            self.log.push(format!("{:>9.3} {event:?}", self.now.nanos() as f64 / 1e9 - 1.0));
        }
        let by_memory = matches!(event, Event::Measured { .. });
        let mut actions = fleet.handle(self.now, event);
        self.hear_news();
        self.remember();
        self.sabotage.actions(&mut actions);
        let rng = if by_memory { &mut self.appetite } else { &mut self.rng };
        let dies_after =
            if rng.chance(self.unkind.dies) { Some(rng.below(actions.len() as u64 + 1)) } else { None };
        match dies_after {
            Some(count) => {
                for lost in actions.split_off(usize::try_from(count).unwrap()) {
                    self.lose(&lost);
                }
                for action in actions {
                    self.perform_one(action);
                }
                self.supervisor_dies();
            }
            None => self.perform(actions),
        }
    }

    /// News are remembered with everything else of a turn, before it is acted on.
    pub(super) fn hear_news(&mut self) {
        let Some(fleet) = &mut self.fleet else { return };
        self.served.clone_from(&self.rotation);
        for news in fleet.take_news() {
            if let Some(run) = &news.run {
                match &news.what {
                    What::Step(StepKind::Reserved) => self.reserved.insert(run.id.clone()),
                    What::Step(StepKind::Restored) => self.reserved.remove(&run.id),
                    _ => false,
                };
                let fine = match &news.what {
                    What::InRotation => self.rotation.insert(run.id.clone()),
                    What::OutOfRotation => self.rotation.remove(&run.id),
                    _ => true,
                };
                if !fine {
                    let id = run.id.clone();
                    broken!(self, "{id}: {:?} is told twice", news.what);
                    return;
                }
            }
            if self.verbose {
                self.news.push(news);
            }
        }
        if !self.needs.is_empty() {
            self.note_up();
        }
        let online = self.online();
        if self.rotation != online && !self.quit {
            broken!(self, "the news tell of {:?} in rotation, the rows of {online:?}", self.rotation);
        }
    }

    /// An order that was remembered, and never given.
    pub(super) fn lose(&mut self, action: &Action) {
        let (id, signal) = match action {
            Action::SendShutdown { id } | Action::KillTree { id } => (id, true),
            // By the rules that the app has got meanwhile it would have been a message, of which nobody knows whether it
            // went.
            Action::Signal { id, .. } => {
                let saved = self.disk.apps.iter().find(|app| app.spec.name == id.app);
                (id, saved.is_some_and(|app| app.spec.stop.with_message))
            }
            Action::TakeOut { id } | Action::AskKillListeners { id, .. } | Action::Drain { id, .. } => {
                (id, false)
            }
            _ => return,
        };
        if let Some(proc) = self.procs.get_mut(id) {
            proc.ladder = true;
            proc.signal_lost |= signal;
        }
    }

    /// The memo is written before a turn's actions are performed: what was begun is known to the next supervisor, also
    /// when it was not done.
    pub(super) fn remember(&mut self) {
        let Some(fleet) = &self.fleet else { return };
        // Only where it may be needed: building it costs more than the turn.
        if self.unkind.dies > 0 || self.verbose || self.remembers {
            self.memo = Some(fleet.memo());
            for proc in self.procs.values_mut() {
                proc.told.clear();
            }
        }
    }
}
