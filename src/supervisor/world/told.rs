//! What the keeper, the dispatcher, the trees and the logs say, and what that means to the fleet.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use super::super::listeners::Listeners;
use super::super::rights;
use super::super::tag::Held;
use super::{Run, World, groups, start};
use crate::dispatch::{Command, DispatchEvent, Part, Token};
use crate::keeper::link::LinkError;
use crate::keeper::wire::{FromKeeper, HeldFds, ToKeeper};
use crate::logs::pump::LogEvent;
use crate::model::id::InstanceId;
use crate::node::messages::common_key;
use crate::policy::vocabulary::{Event, HookEnd};
use crate::sys::procfs::ProcessId;
use crate::sys::tree::worker::{self as tree_worker, TreeEvent};

/// What a worker's `listen()` fails with when its listener cannot be held: EMFILE.
const NO_DESCRIPTOR: i32 = 24;

/// So many failures of `listen()` are explained per run: who has an address is looked for in all processes, which a
/// worker that tries without end must not have us do all the time.
const FAILED_LISTENS: u32 = 16;

impl World {
    /// What the keeper's message means to the fleet.
    pub fn told(&mut self, message: FromKeeper) -> Option<Event> {
        match message {
            FromKeeper::Spawned { request, pid, start_ticks } => {
                let id = self.spawning.remove(&request)?;
                self.has_process(&id, pid, start_ticks);
                if id.slot.is_hook() {
                    self.hook_spawned(&id);
                    return None;
                }
                Some(Event::Spawned { id, pid })
            }
            FromKeeper::SpawnFailed { request, pid, failure } => {
                // One that an earlier supervisor asked for is known by its pid.
                let id = self.spawning.remove(&request).or_else(|| self.by_pid.get(&pid).cloned())?;
                let error = self.runs.get(&id).map(|run| rights::explain(failure, &run.spec));
                self.never_ran(&id);
                if id.slot.is_hook() {
                    let error = error.unwrap_or_else(|| failure.to_string());
                    return Some(Event::HookEnded { id, end: HookEnd::Failed(error) });
                }
                let retry = start::retry_of(failure.errno);
                let error = error.unwrap_or_else(|| failure.to_string());
                Some(Event::SpawnFailed { id, error, retry })
            }
            FromKeeper::Exited { pid, status, .. } => {
                let Some(id) = self.by_pid.get(&pid).cloned() else {
                    // Of no app: nobody else will confirm it.
                    self.tell_keeper(&ToKeeper::Confirm { pid, fds: HeldFds::Release });
                    return None;
                };
                let run = self.runs.get_mut(&id)?;
                run.end.exited = true;
                let reason = groups::reason_of(status, pid, run.group.as_ref(), run.killed);
                if self.steering.take_out(&id) {
                    self.listeners.steer(&id.app, &self.steering);
                }
                self.finish_logs(&id);
                if id.slot.is_hook() {
                    self.hook_exited(&id, reason);
                    return None;
                }
                Some(Event::Exited { id, reason })
            }
            FromKeeper::NotUnderstood { kind } => {
                tracing::error!(kind, "the keeper does not know a message");
                None
            }
            FromKeeper::Leaving => {
                self.successor_announced = true;
                None
            }
            FromKeeper::Hello(_)
            | FromKeeper::Upgraded(_)
            | FromKeeper::Dismissed
            | FromKeeper::Children { .. }
            | FromKeeper::Held { .. }
            | FromKeeper::InventoryEnd
            | FromKeeper::Terminate { .. }
            | FromKeeper::Synced { .. }
            | FromKeeper::Unknown { .. } => None,
        }
    }

    pub(super) fn has_process(&mut self, id: &InstanceId, pid: u32, start_ticks: u64) {
        let Some(run) = self.runs.get_mut(id) else { return };
        let process = ProcessId { pid: pid.cast_signed(), start_ticks };
        run.process = Some(process);
        self.memory.appeared(id, process);
        let pm_id = run.tag.pm_id;
        self.by_pid.insert(pid, id.clone());
        if !id.slot.is_hook() {
            self.write_pid_file(&id.app, pm_id, pid);
        }
    }

    /// A spawn that failed leaves nothing: no descriptors, no ears, no log files held open.
    pub(super) fn never_ran(&mut self, id: &InstanceId) {
        self.logs.finish(id.clone());
        self.forget(id);
    }

    /// When the main process and the tree are both gone, what is left in the pipes is read.
    pub(super) fn finish_logs(&mut self, id: &InstanceId) {
        if let Some(run) = self.runs.get_mut(id)
            && run.end.exited
            && run.end.tree_gone
            && !run.end.draining
        {
            run.end.draining = true;
            self.logs.finish(id.clone());
        }
    }

    /// What the tree worker's answer means to the fleet.
    pub fn tree(&mut self, event: TreeEvent) -> Option<Event> {
        let TreeEvent { id, outcome, .. } = event;
        match outcome {
            tree_worker::Outcome::Signalled(told) => {
                tracing::debug!(instance = %id, ?told, "signalled");
                if let Some(run) = self.runs.get_mut(&id) {
                    run.told = Some(told);
                    self.changes += 1;
                }
                return None;
            }
            tree_worker::Outcome::Empty => {}
            tree_worker::Outcome::Left(left) => {
                tracing::error!(instance = %id, ?left, "processes survive SIGKILL");
            }
            tree_worker::Outcome::Failed(error) => {
                tracing::error!(instance = %id, %error, "cannot see processes");
            }
        }
        if id.slot.is_hook() && !self.runs.contains_key(&id) {
            return self.left_hook_gone(&id);
        }
        self.runs.get_mut(&id)?.end.tree_gone = true;
        self.finish_logs(&id);
        None
    }

    /// What the log pump's event means to the fleet.
    pub fn logged(&mut self, event: LogEvent) -> Option<Event> {
        match event {
            LogEvent::Drained { id } if id.slot.is_hook() => {
                self.runs.contains_key(&id).then(|| self.hook_gone(&id))
            }
            LogEvent::Drained { id } => self.runs.contains_key(&id).then_some(Event::TreeGone { id }),
            LogEvent::Trouble(trouble) => {
                tracing::warn!(
                    path = %trouble.path.display(), reason = trouble.reason, dropped = trouble.dropped,
                    "log file takes no output"
                );
                None
            }
            LogEvent::Matched { id, line } => self.line_matched(id, &line),
            LogEvent::Detached { .. } | LogEvent::Reopened => None,
        }
    }

    /// What the dispatcher's event means to the fleet.
    pub fn dispatched(&mut self, event: DispatchEvent) -> Option<Event> {
        match event {
            DispatchEvent::Ready { id, token } => {
                self.remember(&id, token, |run| run.ready = true);
                Some(Event::Ready { id })
            }
            DispatchEvent::Opened { id, open, new, token } => {
                if let Err(error) = self.hold_listeners(&id.app, new) {
                    tracing::error!(instance = %id, %error, "cannot hold a listener");
                    self.dispatch.send(Command::NotRecorded { token, errno: NO_DESCRIPTOR });
                    return None;
                }
                self.remember(&id, token, |run| {
                    run.open.retain(|known| known.key != open.key);
                    run.open.push(open);
                });
                None
            }
            DispatchEvent::Listening { id, key, address, token } => {
                let listens = |run: &mut Run| {
                    for open in run.open.iter_mut().filter(|open| Some(&open.key) == key.as_ref()) {
                        open.listening = true;
                    }
                };
                self.remember(&id, token, listens);
                let key = key.unwrap_or_else(|| address.clone());
                let known = self.cluster_listeners.get_mut(&(id.app.clone(), key.clone()));
                if let Some(listener) = known
                    && listener.address != address
                {
                    listener.address = address;
                    self.changes += 1;
                }
                Some(Event::Listening { id, key: common_key(&key).to_owned() })
            }
            DispatchEvent::ListenerClosed { id, key, left, token } => {
                self.remember(&id, token, |run| run.open.retain(|known| known.key != key));
                tracing::debug!(instance = %id, key, left, "listener closed");
                Some(Event::ListenerClosed { id, key: common_key(&key).to_owned() })
            }
            DispatchEvent::ListenFailed { id, address, errno } => {
                let run = self.runs.get_mut(&id)?;
                run.failed_listens = run.failed_listens.saturating_add(1);
                if run.failed_listens > FAILED_LISTENS {
                    return None;
                }
                let why = Listeners::why_not(&address, &io::Error::from_raw_os_error(errno));
                tracing::warn!(instance = %id, why, "listen failed");
                self.listen_failures.insert(id, why);
                None
            }
            DispatchEvent::ChannelClosed { id } => Some(Event::ChannelClosed { id }),
            DispatchEvent::Settled { id, unanswered } => {
                if unanswered > 0 {
                    tracing::warn!(instance = %id, unanswered, "does not answer for connections");
                }
                Some(Event::Settled { id })
            }
            DispatchEvent::AgentHello { id, version } => {
                if let Some(run) = self.runs.get_mut(&id) {
                    run.node_version = Some(version.trim_start_matches('v').to_owned());
                    self.changes += 1;
                }
                None
            }
            DispatchEvent::KillListeners { id, count, .. } => Some(Event::KillListeners { id, count }),
            DispatchEvent::Drained { id } => Some(Event::Drained { id }),
            DispatchEvent::LongLineSkipped { id, bytes, total } => {
                if bytes > 0 {
                    tracing::warn!(instance = %id, bytes, total, "an IPC message over 16 MiB was skipped");
                }
                if let Some(run) = self.runs.get_mut(&id) {
                    run.skipped_lines = run.skipped_lines.max(total);
                    self.changes += 1;
                }
                None
            }
            DispatchEvent::Keep { id, part, file, token } => {
                self.keep(&id, part, &file, token);
                None
            }
            DispatchEvent::LineGone { id, number } => {
                let name = self.runs.get(&id).map(|run| run.tag.held_line(number));
                if let Some(name) = name {
                    self.tell_keeper(&ToKeeper::Release { name });
                }
                None
            }
            DispatchEvent::AcceptFailing { app, key, errno } => {
                let error = io::Error::from_raw_os_error(errno);
                tracing::error!(%app, key, %error, "cannot accept connections");
                None
            }
            DispatchEvent::Ended { panicked } => {
                // The next supervisor starts with a new thread; workers keep serving what they have.
                assert!(!panicked, "the dispatch thread has panicked");
                None
            }
            DispatchEvent::Crowd { app, address } => {
                match address {
                    Some(address) => self.crowds.insert(app, address),
                    None => self.crowds.remove(&app),
                };
                None
            }
            DispatchEvent::Online { .. }
            | DispatchEvent::Figures { .. }
            | DispatchEvent::UserMessage { .. }
            | DispatchEvent::MessageDropped { .. }
            | DispatchEvent::Frozen { .. } => None,
        }
    }

    /// Has the keeper hold what the next supervisor needs of an instance's channel.
    pub(super) fn keep(&mut self, id: &InstanceId, part: Part, file: &OwnedFd, token: Token) {
        let held = self.runs.get(id).map(|run| {
            let name = match part {
                Part::Inbox => run.tag.held(Held::Inbox),
                Part::Line(number) => run.tag.held_line(number),
            };
            (name, run.process.map(|process| process.pid.unsigned_abs()))
        });
        let kept = held.map(|(name, owner)| self.link.hold(&name, owner, file.as_fd()));
        match kept {
            // The next keeper gets it from us.
            Some(Ok(()) | Err(LinkError::Closed)) => self.unheld.push(token),
            Some(Err(error)) => {
                tracing::error!(instance = %id, %error, "a long message cannot be held");
                self.dispatch.send(Command::NotRecorded { token, errno: NO_DESCRIPTOR });
            }
            None => self.dispatch.send(Command::NotRecorded { token, errno: NO_DESCRIPTOR }),
        }
    }

    pub(super) fn remember(&mut self, id: &InstanceId, token: Token, change: impl FnOnce(&mut Run)) {
        if let Some(run) = self.runs.get_mut(id) {
            change(run);
            self.changes += 1;
        }
        self.unrecorded.push(token);
    }
}
