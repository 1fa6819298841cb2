//! What was asked, and whether the answer is true.

use super::*;

impl World {
    /// How often a hook runs is told of requests that have their app to themselves.
    pub(super) fn note_alone(&mut self, op: OpId, command: &Command) {
        let open = &self.open;
        let meets = |other: &Command| {
            APPS.iter().any(|app| concerns(other, &name(app)) && concerns(command, &name(app)))
        };
        self.alone.retain(|other, _| open.get(other).is_some_and(|(_, other)| !meets(other)));
        let Command::Act { selection, .. } = command else { return };
        let [Selected { app, slots: None }] = &selection[..] else { return };
        let rests =
            self.fleet.as_ref().and_then(|fleet| fleet.app(app)).is_some_and(|view| view.operation.is_none());
        let others =
            open.iter().filter(|(other, (_, command))| **other != op && concerns(command, app)).count();
        if rests && others == 0 && !self.hooks.keys().any(|id| id.app == *app) {
            self.alone.insert(op, Vec::new());
        }
    }

    /// Each hook runs once in what it is about.
    pub(super) fn check_hooks(&mut self, op: OpId, command: &Command, app: &AppName, what: &str) {
        let Some(run) = self.alone.remove(&op) else { return };
        let Command::Act { verb, .. } = command else { return };
        let saved = self.fleet.as_ref().map(Fleet::saved).unwrap_or_default();
        let has =
            saved.apps.iter().any(|saved| saved.spec.name == *app && saved.spec.hooks != Hooks::default());
        let count = |kinds: &[HookKind]| run.iter().filter(|kind| kinds.contains(kind)).count();
        let gates = count(&[HookKind::PreStart, HookKind::PreReload]);
        let fine = match (verb, what) {
            (Verb::Reload, "reloaded")
            | (Verb::Restart, "restarted")
            | (Verb::Start, "started" | "restarted") => gates == usize::from(has),
            (Verb::Stop, "stopped") => gates == 0 && count(&[HookKind::PostStop]) <= 1,
            _ => true,
        };
        if !fine {
            broken!(self, "{app} is {what}, and these hooks were run: {run:?}");
        }
    }

    pub(super) fn replied(&mut self, op: OpId, outcome: Outcome) {
        let Some((asked, command)) = self.open.remove(&op) else {
            return broken!(self, "{op:?} is answered twice, or was never asked");
        };
        if let Outcome::Failed { apps } = &outcome {
            for (app, what) in apps {
                self.check_failure(app, what, apps.len() == 1);
            }
        }
        // Of a request over many apps a part may have been done long ago, and undone since.
        if let Outcome::Done { apps } = &outcome
            && apps.len() == 1
        {
            for (app, what) in apps {
                let AppOutcome::Done { what, .. } = what else { continue };
                self.check_hooks(op, &command, app, what);
                let of_app = |id: &InstanceId| {
                    id.app == *app && selection(&command, app).is_none_or(|slots| slots.contains(&id.slot))
                };
                match *what {
                    "stopped" | "deleted" => {
                        if let Some(kind) =
                            self.hooks.iter().find(|(id, _)| id.app == *app).map(|(_, kind)| *kind)
                            && (*what == "deleted" || kind == HookKind::PostStop)
                        {
                            return broken!(self, "{app} is said to be {what}, but its {kind} runs");
                        }
                        if selection(&command, app).is_none() && is_end(&command) {
                            self.unprepared.insert(app.clone());
                        }
                        let alone = !self.open.values().any(|(_, command)| concerns(command, app));
                        if alone && is_end(&command) {
                            let slots = (0..8).map(Slot);
                            let slots = slots.filter(|slot| {
                                selection(&command, app).is_none_or(|slots| slots.contains(slot))
                            });
                            self.down.extend(slots.map(|slot| (app.clone(), slot)));
                        }
                        if selection(&command, app).is_none() {
                            self.awake.remove(app);
                            self.was_up.remove(app);
                        }
                        if let Some((id, _)) = self.procs.iter().find(|(id, _)| of_app(id)) {
                            let id = id.clone();
                            return broken!(self, "{app} is said to be {what}, but {id} is there");
                        }
                    }
                    "reloaded" | "restarted" if matches!(command, Command::Act { .. }) => {
                        let old = self.procs.iter().find(|(id, proc)| {
                            of_app(id) && proc.born < asked && proc.alive() && !proc.ladder
                        });
                        if let Some((id, _)) = old {
                            let id = id.clone();
                            return broken!(self, "{app} is said to be {what}, but {id} is from before");
                        }
                    }
                    _ => {}
                }
            }
        }
        if self.verbose || self.outcomes.len() < 64 {
            self.outcomes.push((op, outcome));
        }
    }

    /// What is said to serve after a failure does.
    pub(super) fn check_failure(&mut self, app: &AppName, outcome: &AppOutcome, now: bool) {
        let AppOutcome::Failed { replaced, kept, .. } = outcome else { return };
        if let Some(slot) = kept.iter().find(|slot| replaced.contains(slot)) {
            return broken!(self, "{app}: slot {slot} is said to be both replaced and kept");
        }
        let serves = |slot: &Slot| self.rotation.iter().any(|id| id.app == *app && id.slot == *slot);
        if let Some(slot) = kept.iter().find(|slot| now && !serves(slot)) {
            broken!(self, "{app}: slot {slot} is said to be kept, and does not serve");
        }
    }

    /// Whatever processes and hooks do, there is an end of a stop.
    pub(super) fn check_patience(&mut self) {
        let now = self.now;
        let late = self.open.iter().find(|(_, (asked, command))| {
            let ends = is_end(command) || matches!(command, Command::Kill | Command::Terminate);
            ends && now.since(self.woken.max(*asked)) > PATIENCE
        });
        if let Some((op, _)) = late {
            broken!(self, "{op:?} has not ended anything for {PATIENCE:?}");
        }
    }
}

pub(super) fn selection<'a>(command: &'a Command, app: &AppName) -> Option<&'a Vec<Slot>> {
    match command {
        Command::Act { selection, .. } => {
            selection.iter().find(|one| one.app == *app).and_then(|one| one.slots.as_ref())
        }
        _ => None,
    }
}

/// Whether a command may do something to an app.
pub(super) fn concerns(command: &Command, app: &AppName) -> bool {
    match command {
        Command::Start { specs } | Command::Apply { specs, prune: false, .. } => {
            specs.iter().any(|spec| spec.name == *app)
        }
        Command::Apply { .. } => true,
        Command::Act { selection, .. } | Command::Reset { selection } => {
            selection.iter().any(|one| one.app == *app)
        }
        Command::Scale { app: other, .. } => other == app,
        Command::Resurrect { saved } => saved.apps.iter().any(|saved| saved.spec.name == *app),
        Command::Kill | Command::KillUnlisted { .. } | Command::Terminate => true,
    }
}

/// Whether a command ends what it is about, and nothing else.
pub(super) fn is_end(command: &Command) -> bool {
    matches!(command, Command::Act { verb: Verb::Stop | Verb::Delete, .. } | Command::Reset { .. })
}

/// Whether an unanswered command wants this run's slot to be down. Of a command over many apps a part may have been
/// done long ago.
pub(super) fn ends(command: &Command, id: &InstanceId) -> bool {
    match command {
        Command::Act { selection, .. } if selection.len() > 1 => false,
        Command::Act { verb: Verb::Stop, selection, .. } => selection
            .iter()
            .any(|one| one.app == id.app && one.slots.as_ref().is_none_or(|slots| slots.contains(&id.slot))),
        Command::Act { verb: Verb::Delete, selection, .. } => {
            selection.iter().any(|one| one.app == id.app && one.slots.is_none())
        }
        _ => false,
    }
}
