//! What the keeper has, as its supervisor knows it: children, and copies of everything held.
//!
//! A keeper that dies takes its descriptors along, and with them the channels and listeners of every app. The link
//! notes here whatever passes over it, so that the next keeper gets all of it from the supervisor.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::link::{Child, Inventory};
use super::wire::{ChildState, FromKeeper, HeldFds, Hello, Spawn, ToKeeper};
use crate::sys::child::WaitStatus;
use crate::sys::pidfd;

/// The name under which the pidfd of a child travels to the next keeper.
#[must_use]
pub(super) fn pidfd_name(pid: u32) -> String {
    format!("{PIDFD_PREFIX}{pid}")
}

const PIDFD_PREFIX: &str = "pidfd:";

/// A process that may or may not have come to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sought {
    /// The tag it was to have.
    pub tag: Vec<u8>,
}

#[derive(Debug)]
struct Asked {
    tag: Vec<u8>,
    held: Vec<String>,
}

#[derive(Debug)]
struct Held {
    fd: OwnedFd,
    owner: Option<u32>,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Mirror {
    children: BTreeMap<u32, Child>,
    held: BTreeMap<String, Held>,
    /// Starts that have not been answered.
    asked: BTreeMap<u64, Asked>,
    /// Descriptors of which there was no room for a copy.
    missing: usize,
}

impl Mirror {
    /// As the keeper's inventory says.
    pub(super) fn of(inventory: &Inventory) -> Self {
        let mut mirror = Self::default();
        let mut owners: BTreeMap<&str, u32> = BTreeMap::new();
        for child in &inventory.children {
            owners.extend(child.held.iter().map(|name| (name.as_str(), child.pid)));
            mirror.children.insert(child.pid, child.clone());
        }
        for (name, fd) in &inventory.held {
            mirror.hold(name, fd.as_fd(), owners.get(name.as_str()).copied());
        }
        mirror
    }

    /// How many descriptors are not here.
    pub(super) fn missing(&self) -> usize {
        self.missing
    }

    /// What this supervisor has just said.
    pub(super) fn said(&mut self, message: &ToKeeper, fds: &[BorrowedFd<'_>]) {
        match message {
            ToKeeper::Spawn(spawn) => self.asked(spawn, fds),
            ToKeeper::Confirm { pid, fds } => self.confirmed(*pid, *fds),
            ToKeeper::Hold { names, owner } => {
                for (name, fd) in names.iter().zip(fds) {
                    self.hold(name, *fd, *owner);
                }
            }
            ToKeeper::Release { name } => self.release(name),
            ToKeeper::ReleasePrefix { prefix } => {
                let names = with_prefix(&self.held, prefix);
                for name in names {
                    self.release(&name);
                }
            }
            ToKeeper::Welcome { .. }
            | ToKeeper::Taken { .. }
            | ToKeeper::Sync { .. }
            | ToKeeper::Notify { .. }
            | ToKeeper::Beat
            | ToKeeper::Upgrade { .. }
            | ToKeeper::Go
            | ToKeeper::TookOver
            | ToKeeper::Quit
            | ToKeeper::Unknown { .. } => {}
        }
    }

    fn asked(&mut self, spawn: &Spawn, fds: &[BorrowedFd<'_>]) {
        let ours = fds.iter().skip(usize::from(spawn.child_fds));
        for (name, fd) in spawn.held.iter().zip(ours) {
            self.hold(name, *fd, None);
        }
        let asked = Asked { tag: spawn.tag.clone(), held: spawn.held.clone() };
        self.asked.insert(spawn.request, asked);
    }

    /// What the keeper has just said.
    pub(super) fn heard(&mut self, message: &FromKeeper) {
        match message {
            FromKeeper::Spawned { request, pid, start_ticks } => {
                let Some(Asked { tag, held }) = self.asked.remove(request) else { return };
                self.began(*pid, *start_ticks, tag, held);
            }
            FromKeeper::SpawnFailed { request, pid, .. } => {
                let held = match self.asked.remove(request) {
                    Some(asked) => asked.held,
                    None => self.children.remove(pid).map(|child| child.held).unwrap_or_default(),
                };
                for name in held {
                    self.held.remove(&name);
                }
            }
            FromKeeper::Exited { pid, status, .. } => {
                if let Some(child) = self.children.get_mut(pid) {
                    child.state = ChildState::Exited(*status);
                }
            }
            FromKeeper::Hello(_)
            | FromKeeper::Children { .. }
            | FromKeeper::Held { .. }
            | FromKeeper::InventoryEnd
            | FromKeeper::Terminate { .. }
            | FromKeeper::Leaving
            | FromKeeper::Dismissed
            | FromKeeper::Upgraded(_)
            | FromKeeper::Synced { .. }
            | FromKeeper::NotUnderstood { .. }
            | FromKeeper::Unknown { .. } => {}
        }
    }

    fn began(&mut self, pid: u32, start_ticks: u64, tag: Vec<u8>, mut held: Vec<String>) {
        held.retain(|name| match self.held.get_mut(name) {
            Some(held) => {
                held.owner = Some(pid);
                true
            }
            // Released before the answer came.
            None => false,
        });
        self.children.insert(pid, Child { pid, start_ticks, tag, state: ChildState::Running, held });
    }

    fn hold(&mut self, name: &str, fd: BorrowedFd<'_>, owner: Option<u32>) {
        let Ok(fd) = fd.try_clone_to_owned() else {
            self.missing += 1;
            return;
        };
        let owner = owner.filter(|pid| self.children.contains_key(pid));
        if let Some(child) = owner.and_then(|pid| self.children.get_mut(&pid))
            && !child.held.iter().any(|held| held == name)
        {
            child.held.push(name.to_owned());
        }
        self.held.insert(name.to_owned(), Held { fd, owner });
    }

    /// This is of no use to the next keeper.
    pub(super) fn forget(&mut self, name: &str) {
        self.release(name);
    }

    fn release(&mut self, name: &str) {
        let owner = self.held.remove(name).and_then(|held| held.owner);
        if let Some(child) = owner.and_then(|pid| self.children.get_mut(&pid)) {
            child.held.retain(|held| held != name);
        }
    }

    fn confirmed(&mut self, pid: u32, fds: HeldFds) {
        let Some(child) = self.children.remove(&pid) else { return };
        for name in &child.held {
            match fds {
                HeldFds::Release => drop(self.held.remove(name)),
                HeldFds::Keep => {
                    if let Some(held) = self.held.get_mut(name) {
                        held.owner = None;
                    }
                }
            }
        }
    }

    /// The starts that the keeper has not answered.
    pub(super) fn sought(&self) -> Vec<(u64, Sought)> {
        self.asked.iter().map(|(&request, asked)| (request, Sought { tag: asked.tag.clone() })).collect()
    }

    /// The keeper is gone: how the children can be followed from now on, and everything there is for the next keeper.
    /// `found` are the processes of starts that were not answered; the others never came to be.
    pub(super) fn into_inventory(mut self, hello: Hello, found: Vec<(u64, u32, u64)>) -> Inventory {
        for (request, pid, start_ticks) in found {
            if let Some(Asked { tag, held }) = self.asked.remove(&request) {
                self.began(pid, start_ticks, tag, held);
            }
        }
        for Asked { held, .. } in std::mem::take(&mut self.asked).into_values() {
            for name in held {
                self.held.remove(&name);
            }
        }
        for child in self.children.values_mut() {
            if matches!(child.state, ChildState::Exited(_)) {
                continue;
            }
            match pidfd::open_same(child.pid, child.start_ticks) {
                Ok(Some(fd)) => {
                    child.state = ChildState::Running;
                    let name = pidfd_name(child.pid);
                    child.held.push(name.clone());
                    self.held.insert(name, Held { fd, owner: Some(child.pid) });
                }
                Ok(None) => child.state = ChildState::Exited(WaitStatus::UNKNOWN),
                // No descriptor left: the next keeper may have one.
                Err(_) => child.state = ChildState::Running,
            }
        }
        let held = self.held.into_iter().map(|(name, held)| (name, held.fd)).collect();
        Inventory { hello, children: self.children.into_values().collect(), held }
    }
}

/// The names that begin like this.
pub(super) fn with_prefix<T>(held: &BTreeMap<String, T>, prefix: &str) -> Vec<String> {
    let from = held.range(prefix.to_owned()..).map(|(name, _)| name);
    from.take_while(|name| name.starts_with(prefix)).cloned().collect()
}

/// A copy of every descriptor of an inventory.
///
/// # Errors
/// EMFILE.
pub(super) fn copies(held: &[(String, OwnedFd)]) -> io::Result<Vec<(String, OwnedFd)>> {
    held.iter().map(|(name, fd)| Ok((name.clone(), fd.try_clone()?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::pipe;

    fn spawn(request: u64, tag: &str, held: &[&str]) -> ToKeeper {
        ToKeeper::Spawn(Spawn {
            request,
            tag: tag.as_bytes().to_vec(),
            child_fds: 1,
            held: held.iter().map(|&name| name.to_owned()).collect(),
            command: Some(Vec::new()),
        })
    }

    fn names(inventory: &Inventory) -> Vec<&str> {
        inventory.held.iter().map(|(name, _)| name.as_str()).collect()
    }

    #[test]
    fn what_passed_over_the_link_is_what_the_next_keeper_gets() {
        let (one, two) = pipe::packet_pair().unwrap();
        let fds = [one.as_fd(), two.as_fd(), one.as_fd()];
        let mut mirror = Mirror::default();
        let hold = |name: &str| ToKeeper::Hold { names: vec![name.to_owned()], owner: None };
        mirror.said(&hold("lock"), &fds[..1]);
        mirror.said(&hold("gone"), &fds[..1]);
        mirror.said(&ToKeeper::Release { name: "gone".into() }, &[]);

        // One that runs, one that has ended, one that was confirmed, one that failed, and three without an answer.
        let mut me = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let ticks = crate::sys::child::start_ticks(me.id()).unwrap();
        let spawned = |request, pid, start_ticks| FromKeeper::Spawned { request, pid, start_ticks };
        mirror.said(&spawn(1, "runs", &["1:out", "1:err"]), &fds);
        mirror.heard(&spawned(1, me.id(), ticks));
        mirror.said(&spawn(2, "ended", &["2:out", "2:err"]), &fds);
        mirror.heard(&spawned(2, 0x7fff_fff0, 5));
        let status = WaitStatus::from_raw(1792);
        mirror.heard(&FromKeeper::Exited { pid: 0x7fff_fff0, tag: b"ended".to_vec(), status });
        mirror.said(&spawn(3, "confirmed", &["3:out", "3:err"]), &fds);
        mirror.heard(&spawned(3, 0x7fff_fff1, 5));
        mirror.said(&ToKeeper::Confirm { pid: 0x7fff_fff1, fds: HeldFds::Release }, &[]);
        mirror.said(&spawn(4, "failed", &["4:out", "4:err"]), &fds);
        let failure =
            crate::sys::spawn::Failure { stage: crate::sys::spawn::Stage::Exec, errno: libc::ENOENT };
        mirror.heard(&FromKeeper::SpawnFailed { request: 4, pid: 9, failure });
        mirror.said(&spawn(5, "found", &["5:out", "5:err"]), &fds);
        mirror.said(&spawn(6, "never", &["6:out", "6:err"]), &fds);
        mirror.said(&spawn(7, "gone meanwhile", &["7:out", "7:err"]), &fds);
        mirror.heard(&spawned(7, 0x7fff_fff2, 5));
        mirror.said(&ToKeeper::ReleasePrefix { prefix: "7:e".into() }, &[]);
        assert_eq!(mirror.sought().len(), 2);

        let own = std::process::id();
        let own_ticks = crate::sys::child::start_ticks(own).unwrap();
        let inventory = mirror.into_inventory(Hello::of_a_test(), vec![(5, own, own_ticks)]);
        me.kill().unwrap();
        me.wait().unwrap();
        let mut expected = vec!["1:err", "1:out", "2:err", "2:out", "5:err", "5:out", "7:out", "lock"]
            .into_iter()
            .map(String::from)
            .collect::<Vec<_>>();
        expected.extend([pidfd_name(me.id()), pidfd_name(own)]);
        expected.sort();
        assert_eq!(names(&inventory), expected);
        let mut children: Vec<(String, ChildState, usize)> = inventory
            .children
            .iter()
            .map(|child| (String::from_utf8_lossy(&child.tag).into_owned(), child.state, child.held.len()))
            .collect();
        children.sort_by(|a, b| a.0.cmp(&b.0));
        assert_eq!(
            children,
            [
                ("ended".to_owned(), ChildState::Exited(status), 2),
                ("found".to_owned(), ChildState::Running, 3),
                ("gone meanwhile".to_owned(), ChildState::Exited(WaitStatus::UNKNOWN), 1),
                ("runs".to_owned(), ChildState::Running, 3),
            ]
        );
        let copied = copies(&inventory.held).unwrap();
        assert_eq!(copied.len(), inventory.held.len());
        let again = Mirror::of(&inventory);
        assert_eq!((again.children.len(), again.held.len(), again.missing()), (4, 10, 0));
    }
}
