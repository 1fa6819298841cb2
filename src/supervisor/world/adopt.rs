//! Taking over what an earlier supervisor left: processes, descriptors, channels, listeners.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::super::blob::{ChannelMemo, ListenerMemo, ToldMemo};
use super::super::tag::{Held, Tag};
use super::super::variables::Variables;
use super::groups::reason_of;
use super::start::Parts;
use super::{End, Run, World};
use crate::dispatch::{Adopted, Command, KeptListener, OpenListener, Query};
use crate::keeper::link::Child;
use crate::keeper::wire::{ChildState, HeldFds, ToKeeper};
use crate::model::id::{AppName, InstanceId, Slot};
use crate::model::saved::{Found, SavedFleet};
use crate::model::spec::AppSpec;
use crate::node::messages::split_slot_key;
use crate::node::primary::PRESUMED;
use crate::supervisor::listeners::Listeners;
use crate::supervisor::ready;
use crate::sys::procfs::ProcessId;
use crate::sys::reuseport::Pick;
use crate::sys::tree::Root;
use crate::sys::tree::worker::{Instance, TreeOp};

/// What an earlier supervisor left.
#[derive(Debug)]
pub struct Legacy {
    /// From the keeper.
    pub children: Vec<Child>,
    /// Descriptors from the keeper, by name.
    pub held: BTreeMap<String, OwnedFd>,
    /// From the blob.
    pub channels: Vec<ChannelMemo>,
    /// From the blob.
    pub listeners: Vec<ListenerMemo>,
    /// From the blob.
    pub told: Vec<ToldMemo>,
    /// Whether what a blob said of instances and channels is there, and believed.
    pub remembered: bool,
}

impl World {
    /// Takes over every child whose app is known. A child nobody knows (its tag is foreign, or its app was deleted
    /// and the deletion is durable) cannot be shown or stopped by name; it is ended.
    pub fn adopt(&mut self, saved: &SavedFleet, mut legacy: Legacy) -> Vec<Found> {
        let specs: BTreeMap<(AppName, u64), Arc<AppSpec>> = saved
            .apps
            .iter()
            .flat_map(|app| {
                let name = app.spec.name.clone();
                let current = [((name.clone(), app.revision), app.spec.clone())];
                current.into_iter().chain(
                    app.previous
                        .iter()
                        .chain(&app.older)
                        .map(move |(spec, revision)| ((name.clone(), *revision), spec.clone())),
                )
            })
            .collect();
        self.listeners.adopt(specs.values().map(|spec| &**spec), &mut legacy.held);
        let known = legacy.remembered;
        self.adopt_cluster_listeners(&mut legacy);
        let mut channels: HashMap<InstanceId, ChannelMemo> =
            legacy.channels.drain(..).map(|memo| (memo.id.clone(), memo)).collect();
        let mut told: HashMap<InstanceId, Vec<ProcessId>> =
            legacy.told.drain(..).map(|memo| (memo.id.clone(), memo.told())).collect();
        let mut found = Vec::new();
        for child in &legacy.children {
            let Some(tag) = Tag::decode(&child.tag) else {
                tracing::error!(pid = child.pid, "a child with a foreign tag is left alone");
                if matches!(child.state, ChildState::Exited(_)) {
                    self.tell_keeper(&ToKeeper::Confirm { pid: child.pid, fds: HeldFds::Release });
                }
                continue;
            };
            if tag.id.slot.is_hook() {
                self.end_left_hook(child, &tag);
                continue;
            }
            let newest = saved.apps.iter().find(|app| app.spec.name == tag.id.app);
            let spec = specs.get(&(tag.id.app.clone(), tag.revision)).or_else(|| newest.map(|app| &app.spec));
            let Some(spec) = spec else {
                tracing::warn!(instance = %tag.id, pid = child.pid, "its app is gone, so it is ended");
                self.end_stranger(child, &tag);
                continue;
            };
            let memo = match channels.remove(&tag.id) {
                None if !known && spec.is_node_cluster() => Some(self.presumed(&tag.id)),
                memo => memo,
            };
            found.push(Found {
                id: tag.id.clone(),
                revision: tag.revision,
                pid: child.pid,
                exited: match child.state {
                    ChildState::Exited(status) => {
                        Some(reason_of(status, child.pid, self.groups.existing(&tag).as_ref(), false))
                    }
                    ChildState::Starting | ChildState::Running => None,
                },
                signalled: told.contains_key(&tag.id),
            });
            self.take_over(child, tag, spec.clone(), memo, &mut legacy.held);
        }
        for (id, run) in &mut self.runs {
            run.told = told.remove(id);
        }
        self.dispatch.send(Command::Adopted);
        self.adopt_steering();
        self.sweep_groups();
        self.write_pid_files();
        // Left by a run that was forgotten, or by an app that was deleted, in the instant its supervisor died: a port
        // that nobody serves must not stay taken.
        let ours = ["run:", Listeners::PREFIX, Listeners::KEY_PREFIX];
        for name in legacy.held.into_keys() {
            if ours.iter().any(|prefix| name.starts_with(prefix)) {
                self.tell_keeper(&ToKeeper::Release { name });
            }
        }
        found
    }

    /// The supervisor before us may have died before it could.
    fn write_pid_files(&self) {
        let mut newest: BTreeMap<(&AppName, Slot), (&InstanceId, &Run)> = BTreeMap::new();
        for (id, run) in self.runs.iter().filter(|(_, run)| !run.end.exited) {
            let shown = newest.entry((&id.app, id.slot)).or_insert((id, run));
            if shown.0.generation < id.generation {
                *shown = (id, run);
            }
        }
        for (id, run) in newest.into_values() {
            if let Some(process) = run.process {
                self.write_pid_file(&id.app, run.tag.pm_id, process.pid.unsigned_abs());
            }
        }
    }

    /// The kernel still does as it was told; those that run are told to it again as soon as one of them comes or goes.
    fn adopt_steering(&mut self) {
        let running = self.runs.iter().filter(|(_, run)| run.spec.inherits_slots() && !run.end.exited);
        for (id, run) in running {
            self.steering.put_in(id, Pick::of(run.spec.balance));
        }
    }

    fn adopt_cluster_listeners(&mut self, legacy: &mut Legacy) {
        for memo in legacy.listeners.drain(..) {
            let Some(socket) = legacy.held.remove(&Listeners::key_name(&memo.app, &memo.key)) else {
                continue;
            };
            let listener =
                KeptListener { key: memo.key.clone(), data: memo.data.clone(), origin: memo.origin, socket };
            self.dispatch.send(Command::AdoptListener { app: memo.app.clone(), listener });
            self.cluster_listeners.insert((memo.app.clone(), memo.key.clone()), memo);
        }
    }

    /// What a worker is taken to be when the blob is lost or not believed: ready, and listening wherever its app does. One that does not
    /// listen there rejects what it is handed, and another gets it.
    fn presumed(&self, id: &InstanceId) -> ChannelMemo {
        let open = self
            .cluster_listeners
            .keys()
            .filter(|(app, key)| {
                *app == id.app && split_slot_key(key).is_none_or(|(_, slot)| slot == id.slot.0)
            })
            // No query has this number, so none is mistaken for one that was answered.
            .map(|(_, key)| OpenListener {
                key: key.clone(),
                query: Query { seq: PRESUMED, ..Query::default() },
                listening: true,
            })
            .collect();
        ChannelMemo { id: id.clone(), ready: true, node_version: None, open }
    }

    fn end_stranger(&mut self, child: &Child, tag: &Tag) {
        if matches!(child.state, ChildState::Exited(_)) {
            self.tell_keeper(&ToKeeper::Confirm { pid: child.pid, fds: HeldFds::Release });
        } else {
            // Its exit is confirmed when it is reported.
            let main = ProcessId { pid: child.pid.cast_signed(), start_ticks: child.start_ticks };
            let root = Root { main, token: tag.token(), group: self.groups.existing(tag) };
            self.trees.ask(Instance { id: tag.id.clone(), root }, TreeOp::KillAll);
        }
    }

    fn take_over(
        &mut self,
        child: &Child,
        tag: Tag,
        spec: Arc<AppSpec>,
        memo: Option<ChannelMemo>,
        held: &mut BTreeMap<String, OwnedFd>,
    ) {
        let id = tag.id.clone();
        let lines = take_lines(&tag, held);
        let mut take = |kind: Held| held.remove(&tag.held(kind));
        let (ready, node_version, open) =
            memo.map_or((false, None, Vec::new()), |memo| (memo.ready, memo.node_version, memo.open));
        let inbox = take(Held::Inbox);
        let parts = Parts {
            out: take(Held::Out),
            err: take(Held::Err),
            channel: take(Held::Channel),
            notify: take(Held::Notify),
            ready: take(Held::Ready),
            adopted: Some(Adopted { ready, open: open.clone(), inbox, lines }),
        };
        // The keeper keeps the app's stdin open; our copy is not needed.
        drop(take(Held::Stdin));
        let notify_path = parts
            .notify
            .as_ref()
            .and_then(|_| ready::notify_path(self.notify_dir(&spec), tag.pm_id, id.generation));
        let version = super::start::version_of(&spec);
        let group = self.adopt_group(&tag, &spec, child.pid);
        self.by_pid.insert(child.pid, id.clone());
        self.listen_timeouts.insert(id.app.clone(), spec.ready.listen_timeout);
        let exited = matches!(child.state, ChildState::Exited(_));
        let run = Run {
            spec,
            process: Some(ProcessId { pid: child.pid.cast_signed(), start_ticks: child.start_ticks }),
            env: environment_of(child.pid),
            version,
            node_version,
            ears: Vec::new(),
            notify_path,
            group,
            killed: false,
            channel: parts.channel.is_some(),
            ready,
            open,
            end: End { exited, ..End::default() },
            told: None,
            skipped_lines: 0,
            failed_listens: 0,
            tag,
        };
        self.runs.insert(id.clone(), run);
        self.connect_parts(&id, parts);
    }
}

/// The long lines for an app that an earlier supervisor had not sent whole.
fn take_lines(tag: &Tag, held: &mut BTreeMap<String, OwnedFd>) -> BTreeMap<u64, OwnedFd> {
    let names: Vec<(String, u64)> =
        held.keys().filter_map(|name| Some((name.clone(), tag.line_number(name)?))).collect();
    names.into_iter().filter_map(|(name, number)| Some((number, held.remove(&name)?))).collect()
}

/// The environment a process was started with, from the kernel; empty for a zombie.
fn environment_of(pid: u32) -> Variables {
    let text = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    // A process that writes a title over it may leave a name twice.
    text.split('\0')
        .filter_map(|entry| entry.split_once('='))
        .collect::<BTreeMap<_, _>>()
        .into_iter()
        .collect()
}
