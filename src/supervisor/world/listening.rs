//! The listeners of apps: who has them open, when they are closed, and what they are called.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use super::super::blob::ListenerMemo;
use super::super::driver::Input;
use super::super::launch::FIRST_FD;
use super::super::listeners::Listeners;
use super::super::steering;
use super::World;
use crate::dispatch::{Command, DispatchEvent, KeptListener};
use crate::keeper::link::LinkError;
use crate::keeper::wire::ToKeeper;
use crate::model::id::{AppName, InstanceId};
use crate::model::spec::AppSpec;
use crate::node::messages::split_slot_key;

/// How long a listener stays open that an app has closed without going down.
const LISTENER_LINGER: Duration = Duration::from_secs(5);

impl World {
    /// Keeps new connections from an instance that inherits sockets of its slot, and lets it accept what it has.
    pub(super) fn leave_out(&mut self, id: InstanceId) {
        let run = self.runs.get(&id);
        let sockets = run.and_then(|run| self.listeners.copies(&run.spec, id.slot).ok()).unwrap_or_default();
        let is_last = self.steering.take_out(&id);
        self.listeners.steer(&id.app, &self.steering);
        let inputs = self.inputs.clone();
        tokio::spawn(async move {
            // Otherwise another instance of the slot accepts from them.
            if is_last {
                steering::emptied(sockets).await;
            }
            // Fails only when the driver has ended.
            let _ = inputs.send(Input::Dispatch(DispatchEvent::Settled { id, unanswered: 0 }));
        });
    }

    pub(super) fn hold_listeners(&mut self, app: &AppName, listeners: Vec<KeptListener>) -> io::Result<()> {
        for listener in listeners {
            let KeptListener { key, data, origin, socket } = listener;
            let name = Listeners::key_name(app, &key);
            match self.link.hold(&name, None, socket.as_fd()) {
                // A keeper that is gone is no fault of the worker; the next one gets the listener from us.
                Ok(()) | Err(LinkError::Closed) => {}
                Err(error) => return Err(io::Error::other(error)),
            }
            let memo =
                ListenerMemo { app: app.clone(), key: key.clone(), data, origin, address: String::new() };
            self.cluster_listeners.insert((app.clone(), key), memo);
            self.changes += 1;
        }
        Ok(())
    }

    pub(super) fn close_listeners(&mut self, app: &AppName, keep: Option<&AppSpec>) {
        if keep.is_some() {
            self.close_unserved(app);
        } else {
            self.dispatch.send(Command::CloseListeners { app: app.clone(), keys: None });
            self.cluster_listeners.retain(|(owner, _), _| owner != app);
            self.changes += 1;
            self.tell_keeper(&ToKeeper::ReleasePrefix { prefix: Listeners::key_prefix(app) });
        }
        for name in self.listeners.close(app, keep) {
            self.tell_keeper(&ToKeeper::Release { name });
        }
    }

    /// Closes what workers of the app asked for and no run of it has open any more.
    pub(super) fn close_unserved(&mut self, app: &AppName) {
        let served: BTreeSet<&str> = self
            .runs
            .iter()
            .filter(|(id, _)| id.app == *app)
            .flat_map(|(_, run)| run.open.iter().map(|open| group_of(&open.key)))
            .collect();
        let keys: Vec<String> = self
            .cluster_listeners
            .keys()
            .filter(|(owner, key)| owner == app && !served.contains(group_of(key)))
            .map(|(_, key)| key.clone())
            .collect();
        self.close_keys(app, keys);
    }

    pub(super) fn close_keys(&mut self, app: &AppName, keys: Vec<String>) {
        if keys.is_empty() {
            return;
        }
        // Before the keeper's copies: what waits in the socket of a slot is handed to others.
        self.dispatch.send(Command::CloseListeners { app: app.clone(), keys: Some(keys.clone()) });
        for key in keys {
            self.tell_keeper(&ToKeeper::Release { name: Listeners::key_name(app, &key) });
            self.cluster_listeners.remove(&(app.clone(), key));
        }
        self.changes += 1;
    }

    /// The last worker of an app has closed a listener that it had asked for. Most likely it is about to exit, and its
    /// successor wants the port with the clients that wait there.
    pub fn look_later(&mut self, app: AppName, key: String) {
        let closing = self.closings.note(&app, group_of(&key));
        let inputs = self.inputs.clone();
        tokio::spawn(async move {
            tokio::time::sleep(LISTENER_LINGER).await;
            // Fails only when the driver has ended.
            let _ = inputs.send(Input::PerhapsUnused { app, key, closing });
        });
    }

    /// Whether a listener was not opened and closed once more since.
    pub fn was_last_closing(&mut self, app: &AppName, key: &str, closing: u64) -> bool {
        self.closings.was_last(app, group_of(key), closing)
    }

    /// Closes a listener that no worker has open: its port is free for others, as with a genuine primary.
    pub fn close_if_unused(&mut self, app: &AppName, key: &str) {
        let group = group_of(key);
        let in_use = self
            .runs
            .iter()
            .any(|(id, run)| id.app == *app && run.open.iter().any(|open| group_of(&open.key) == group));
        if !in_use {
            let unused =
                self.cluster_listeners.keys().filter(|(owner, key)| owner == app && group_of(key) == group);
            let keys = unused.map(|(_, key)| key.clone()).collect();
            self.close_keys(app, keys);
        }
    }

    pub(super) fn addresses(&self, spec: &AppSpec) -> Vec<String> {
        if !spec.is_node_cluster() {
            return spec.listen.iter().map(|listener| listener.address.to_string()).collect();
        }
        let mut addresses: Vec<String> = Vec::new();
        for ((app, _), listener) in &self.cluster_listeners {
            let address = &listener.address;
            if *app != spec.name || address.is_empty() {
                continue;
            }
            let address = configured(spec, address).unwrap_or_else(|| address.clone());
            // The sockets of all slots have one address.
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        addresses
    }
}

/// Sockets that are used or unused together: those of all slots, or the one that all slots share.
fn group_of(key: &str) -> &str {
    split_slot_key(key).map_or(key, |(common, _)| &key[..=common.len()])
}

/// The configured address behind `fd 3`, as a worker calls it that listens on one of LISTEN_FDS.
fn configured(spec: &AppSpec, address: &str) -> Option<String> {
    let fd: usize = address.strip_prefix("fd ")?.parse().ok()?;
    Some(spec.listen.get(fd.checked_sub(FIRST_FD)?)?.address.to_string())
}
