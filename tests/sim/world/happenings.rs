//! What happens by itself: births, words, exits, answers of probes, ends of hooks.

use super::*;

impl World {
    /// Lets the next thing happen that does so before `end`. Says whether there was one.
    pub(crate) fn next(&mut self, end: Moment) -> bool {
        if self.quit {
            return false;
        }
        let planned = self.agenda.keys().next().copied();
        let due = self.fleet.as_ref().and_then(Fleet::next_deadline);
        match (planned, due) {
            // An exit outranks a grace period that has just run out.
            (Some(key), due) if due.is_none_or(|at| key.0 <= at) => {
                if key.0 > end {
                    return false;
                }
                self.stuck = 0;
                self.now = self.now.max(key.0);
                if let Some(happening) = self.agenda.remove(&key) {
                    self.happen(happening);
                }
            }
            (_, Some(at)) => {
                if at > end {
                    return false;
                }
                self.stuck = if at <= self.now { self.stuck + 1 } else { 0 };
                if self.stuck > 8 {
                    broken!(self, "next_deadline {at:?} stays in the past");
                    return false;
                }
                self.now = self.now.max(at);
                self.turn(Event::DeadlineReached);
            }
            (_, None) => return false,
        }
        true
    }

    pub(super) fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Birth(id) => self.birth(&id),
            Happening::Says(id, word) => self.says(&id, word),
            Happening::Exits(id, reason) => self.exits(&id, reason),
            Happening::TreeGoes(id) => {
                if let Some(proc) = self.procs.get_mut(&id) {
                    proc.tree_gone = true;
                }
                self.hear(Event::TreeGone { id });
            }
            Happening::HookEnds(id, kind, end) => self.hook_ends(id, kind, end),
            Happening::Asked(id, role, order) => self.answers(&id, role, order),
            Happening::Weighed(id, order) => self.weighs(&id, order),
            Happening::Hears(event) => {
                if let Event::Settled { id } = &event
                    && let Some(proc) = self.procs.get_mut(id)
                {
                    proc.settles_at = None;
                }
                if let Event::Drained { id } = &event
                    && let Some(proc) = self.procs.get_mut(id)
                {
                    proc.drain_until = None;
                }
                self.hear(event);
            }
            Happening::HearsAgain(event) => self.turn(event),
            Happening::SaveEnds(save, state) => {
                if self.rng.chance(self.unkind.save_fails) {
                    self.disk_refuses = true;
                    self.turn(Event::SaveFailed { save, error: String::from("disk full") });
                } else {
                    self.disk_refuses = false;
                    self.disk = state;
                    self.turn(Event::Saved { save });
                }
            }
            Happening::SupervisorStarts => self.supervisor_starts(),
        }
    }

    /// The supervisor hears something, perhaps twice.
    pub(super) fn hear(&mut self, event: Event) {
        if self.fleet.is_some() && self.rng.chance(self.unkind.doubles) {
            let span = millis(self.rng.below(3000));
            self.later(span, Happening::HearsAgain(event.clone()));
        }
        self.turn(event);
    }

    pub(super) fn birth(&mut self, id: &InstanceId) {
        let Some(proc) = self.procs.get_mut(id) else { return };
        if proc.pid.is_some() {
            return;
        }
        let behaviour = proc.behaviour.clone();
        if let Some(retry) = behaviour.no_spawn {
            proc.exited = Some(ExitReason::NotStarted(String::new()));
            (proc.exit_told, proc.tree_gone) = (true, true);
            if self.fleet.is_none() {
                // Nobody is there to be told, and there is nothing to be found.
                self.procs.remove(id);
                return;
            }
            return self.turn(Event::SpawnFailed { id: id.clone(), error: String::from("EAGAIN"), retry });
        }
        self.pids += 1;
        let pid = self.pids;
        proc.pid = Some(pid);
        let spec = Arc::clone(&proc.spec);
        let listens = behaviour.listens_after.or(behaviour.ready_after);
        if let Some(after) = behaviour.ready_after
            && spec.ready.wait_ready
        {
            self.later(after, Happening::Says(id.clone(), Word::Ready));
        }
        if let Some(after) = listens
            && spec.is_node_cluster()
        {
            for key in 0..behaviour.keys {
                self.later(after, Happening::Says(id.clone(), Word::Listens(format!("{}", 3000 + key))));
            }
        }
        if let Some((after, code)) = behaviour.exits_after {
            self.later(after, Happening::Exits(id.clone(), ExitReason::Code(code)));
        }
        self.turn(Event::Spawned { id: id.clone(), pid });
    }

    pub(super) fn says(&mut self, id: &InstanceId, word: Word) {
        let Some(proc) = self.procs.get_mut(id).filter(|proc| proc.alive()) else { return };
        let event = match word {
            Word::Ready => {
                proc.said_ready = true;
                Event::Ready { id: id.clone() }
            }
            Word::Listens(key) => {
                proc.keys.insert(key.clone());
                Event::Listening { id: id.clone(), key }
            }
        };
        proc.told.push(event.clone());
        self.hear(event);
    }

    pub(super) fn exits(&mut self, id: &InstanceId, reason: ExitReason) {
        let Some(proc) = self.procs.get_mut(id).filter(|proc| proc.alive()) else { return };
        proc.exited = Some(reason.clone());
        proc.put_in = false;
        if self.fleet.is_some() {
            proc.exit_told = true;
            self.hear(Event::Exited { id: id.clone(), reason });
        }
    }

    pub(super) fn run_hook(&mut self, id: InstanceId, kind: HookKind, spec: &AppSpec) {
        if self.hooks.keys().any(|other| other.app == id.app) {
            return broken!(self, "{} runs two hooks at once", id.app);
        }
        if spec.hooks == Hooks::default() || !id.slot.is_hook() {
            return broken!(self, "{} has no such hook", id.app);
        }
        self.hooks.insert(id.clone(), kind);
        for (op, run) in &mut self.alone {
            if self.open.get(op).is_some_and(|(_, command)| concerns(command, &id.app)) {
                run.push(kind);
            }
        }
        let (span, end) = match &self.hook_like {
            Some((span, end)) => (*span, end.clone()),
            None if self.unkind.moody => {
                let fails = self.rng.chance(20);
                let end =
                    if fails { HookEnd::Failed(String::from("exit code 1")) } else { HookEnd::Succeeded };
                (millis(self.rng.below(6000)), end)
            }
            None => (millis(20), HookEnd::Succeeded),
        };
        self.later(span, Happening::HookEnds(id, kind, Some(end)));
    }

    pub(super) fn hook_ends(&mut self, id: InstanceId, kind: HookKind, end: Option<HookEnd>) {
        if self.hooks.remove(&id).is_none() {
            return;
        }
        if self.verbose {
            self.hooks_run
                .push(format!("{kind}{}", if end == Some(HookEnd::Succeeded) { "" } else { " failed" }));
        }
        if kind == HookKind::PreStart && end == Some(HookEnd::Succeeded) {
            self.unprepared.remove(&id.app);
        }
        let end = end.unwrap_or(HookEnd::Failed(String::from("SIGKILL")));
        self.hear(Event::HookEnded { id, end });
    }

    /// A probe, unless it was taken back.
    pub(super) fn answers(&mut self, id: &InstanceId, role: ProbeRole, order: u64) {
        let now = self.now;
        let Some(proc) = self.procs.get_mut(id).filter(|proc| proc.asked == Some((role, order))) else {
            return;
        };
        if proc.exit_told || (proc.ladder && !proc.believed && proc.exited.is_none() && !proc.signal_lost) {
            return broken!(self, "{id} is asked how it is although it is on its way out");
        }
        let (well, probe) = match role {
            ProbeRole::Ready => {
                let ready = proc.behaviour.ready_after.is_some_and(|after| proc.born + after <= now);
                (ready, proc.spec.ready.probe.clone())
            }
            ProbeRole::Health => (!proc.is_sick(now, Duration::ZERO), proc.spec.health.clone()),
        };
        let well = well && proc.alive();
        let known_well = std::mem::replace(&mut proc.known_well, well && role == ProbeRole::Health);
        proc.passed |= well && role == ProbeRole::Ready;
        let Some(probe) = probe else { return broken!(self, "{id} is asked for what it has no probe for") };
        let result = if well { ProbeResult::Passed } else { ProbeResult::Failed };
        self.later(probe.interval, Happening::Asked(id.clone(), role, order));
        // As the daemon does: a success after a success is no news.
        if well && role == ProbeRole::Health && known_well {
            return;
        }
        self.hear(Event::Probed { id: id.clone(), role, result });
    }
}
