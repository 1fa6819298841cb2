//! Which slots of an app get connections, where every slot inherits sockets of its own (`listen` with
//! `balance = "slots"`).
//!
//! The same as the dispatcher does for the workers of a Node cluster, but for programs that we cannot hand a connection
//! to: what waits at a slot stays there for the next instance of that slot. So a slot is left out before its instance is
//! told to stop, and the signal comes when its queue is empty.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use crate::model::id::{AppName, InstanceId};
use crate::sys::reuseport::{self, Pick};

/// For clients in the middle of a handshake when their slot was left out: they are in no queue yet.
const HANDSHAKES: Duration = Duration::from_millis(20);

/// Between two looks at a queue.
const LOOK: Duration = Duration::from_millis(5);

/// What a slot's queue may take to empty. The stop goes on then.
const EMPTY_WITHIN: Duration = Duration::from_secs(1);

/// Who is in rotation, and what the kernel was told.
#[derive(Debug, Default)]
pub struct Steering {
    serving: BTreeMap<AppName, BTreeMap<InstanceId, Pick>>,
}

impl Steering {
    /// An instance gets connections from now on.
    pub fn put_in(&mut self, id: &InstanceId, pick: Pick) {
        self.serving.entry(id.app.clone()).or_default().insert(id.clone(), pick);
    }

    /// An instance gets no connections any more. Returns whether its slot has none now that does.
    pub fn take_out(&mut self, id: &InstanceId) -> bool {
        let Some(serving) = self.serving.get_mut(&id.app) else { return false };
        let was = serving.remove(id).is_some();
        let left = serving.keys().any(|other| other.slot == id.slot);
        if serving.is_empty() {
            self.serving.remove(&id.app);
        }
        was && !left
    }

    /// Whether an instance gets connections.
    #[must_use]
    pub fn is_in(&self, id: &InstanceId) -> bool {
        self.serving.get(&id.app).is_some_and(|serving| serving.contains_key(id))
    }

    /// Tells the kernel which of an app's sockets get connections; `sockets` are those of one address, by slot. With
    /// nobody in rotation the program stays as it is: clients wait where the last ones were, or anywhere.
    pub fn steer<'a>(&self, app: &AppName, sockets: impl Iterator<Item = (u32, &'a OwnedFd)>) {
        let sockets: Vec<(u32, &OwnedFd)> = sockets.collect();
        let Some(serving) = self.serving.get(app) else { return };
        let slots: BTreeSet<u32> = serving.keys().map(|id| id.slot.0).collect();
        // In a reload from one to the other, as soon as one instance has it.
        let pick = serving.values().copied().find(|pick| *pick == Pick::ByAddress).unwrap_or(Pick::Random);
        let chosen: Vec<u32> =
            slots.into_iter().filter(|slot| sockets.iter().any(|(number, _)| number == slot)).collect();
        // A single socket is no group, and has no program.
        if let [(_, first), _, ..] = sockets.as_slice()
            && !chosen.is_empty()
            && let Err(error) = reuseport::steer(first.as_fd(), &chosen, pick)
        {
            tracing::error!(%app, %error, "cannot steer connections to slots");
        }
    }
}

/// Waits until nothing is in these queues, or it has taken too long.
pub async fn emptied(sockets: Vec<OwnedFd>) {
    tokio::time::sleep(HANDSHAKES).await;
    let all_empty = || sockets.iter().all(|socket| reuseport::queued(socket.as_fd()).unwrap_or(0) == 0);
    let wait = async {
        while !all_empty() {
            tokio::time::sleep(LOOK).await;
        }
    };
    // A program that does not accept is not going to; its queue is there for the next one.
    let _ = tokio::time::timeout(EMPTY_WITHIN, wait).await;
}
