//! The end of this supervisor: an upgrade, a keeper that is gone, or the end of the daemon.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use super::super::tag::Tag;
use super::World;
use crate::dispatch::DispatchHandle;
use crate::keeper::link::{Inventory, LinkError};
use crate::keeper::mirror::Sought;
use crate::keeper::wire::{FromKeeper, Hello, ToKeeper};
use crate::logs::pump::LogHandle;
use crate::model::id::OpId;
use crate::sys::procfs::ProcessId;
use crate::sys::{clock, orphans, poll};

/// How long the keeper may take to read our last words.
const QUIT_PATIENCE: Duration = Duration::from_secs(5);

/// Descriptors on their way to the keeper are tried again so often.
const DISMISSAL_PAUSE: Duration = Duration::from_millis(5);

/// A keeper that does not start the next supervisor by then hangs.
const DISMISSAL_PATIENCE: Duration = Duration::from_secs(30);

impl World {
    /// A copy of what is remembered.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn blob_copy(&self) -> std::io::Result<Vec<u8>> {
        self.blob.newest()
    }

    /// Lets the keeper start the next supervisor from another program.
    ///
    /// # Errors
    /// When the keeper is gone.
    pub fn prepare_upgrade(
        &mut self,
        op: OpId,
        from: &str,
        supervisor_only: bool,
        program: &OwnedFd,
    ) -> Result<(), LinkError> {
        let message = ToKeeper::Upgrade { op: op.0, from: from.to_owned(), supervisor_only };
        self.link.try_send(&message, &[program.as_fd()])
    }

    /// This supervisor, which an upgrade has started, is up.
    pub fn took_over(&mut self) {
        self.tell_keeper(&ToKeeper::TookOver);
    }

    /// Lets the next supervisor have everything, and waits until it has. Only after everything that this one reads,
    /// writes and accepts is frozen.
    ///
    /// # Errors
    /// [`LinkError::Closed`]: the keeper is gone, and this supervisor has everything that there is.
    pub fn go(&mut self) -> Result<(), LinkError> {
        self.link.go()?;
        loop {
            while let Some(message) = self.link.try_recv()? {
                if message == FromKeeper::Dismissed {
                    return Ok(());
                }
            }
            let room = self.link.pending() > 0;
            let interest = if room { poll::Interest::ReadWrite } else { poll::Interest::Read };
            // Descriptors on their way can only be tried again; everything else is told.
            let pause = if room { DISMISSAL_PAUSE } else { DISMISSAL_PATIENCE };
            let ready = poll::wait(&[(self.link.as_fd(), interest)], Some(pause));
            let ready = ready.map_err(|source| LinkError::Io { step: "wait for the keeper", source })?;
            if !ready[0] && !room {
                return Err(LinkError::Silent);
            }
            self.link.flush()?;
        }
    }

    /// The keeper has died after [`World::go`]: whether this supervisor goes on, and not the new one.
    pub fn goes_on(&mut self) -> bool {
        self.link.goes_on()
    }

    /// The threads that have to be frozen.
    pub fn frozen_parts(&self) -> (&DispatchHandle, &LogHandle) {
        (&self.dispatch, &self.logs)
    }

    /// The keeper is gone: what it had, those who still work on it, and whether the next keeper is on its way.
    #[must_use]
    pub fn into_remains(self, hello: Hello) -> Remains {
        let missing = self.link.missing();
        if missing > 0 {
            tracing::error!(missing, "descriptors are gone with the keeper: there was no room for copies");
        }
        let estate = self.link.into_estate(hello, find_unanswered);
        Remains {
            estate,
            dispatch: self.dispatch,
            logs: self.logs,
            successor_announced: self.successor_announced,
        }
    }

    /// Ends the daemon: the keeper exits after this process.
    ///
    /// # Errors
    /// When the keeper is gone already.
    pub fn quit(mut self) -> Result<(), LinkError> {
        self.outside.remove();
        self.link.try_send(&ToKeeper::Quit, &[])?;
        let deadline = clock::now() + QUIT_PATIENCE;
        // The end of a thousand apps is more than the socket holds at once. A keeper that waits for us to read would
        // not read.
        while self.link.pending() > 0 {
            while self.link.try_recv()?.is_some() {}
            let left = deadline.since(clock::now());
            if left.is_zero() {
                return Err(LinkError::Silent);
            }
            let wait = poll::wait(&[(self.link.as_fd(), poll::Interest::ReadWrite)], Some(left));
            wait.map_err(|source| LinkError::Io { step: "wait for the keeper", source })?;
            self.link.flush()?;
        }
        Ok(())
    }
}

/// What is left of a world without a keeper.
#[derive(Debug)]
pub struct Remains {
    /// For the next keeper.
    pub estate: Inventory,
    /// Still hands connections to workers.
    pub dispatch: DispatchHandle,
    /// Still writes what apps say.
    pub logs: LogHandle,
    /// The keeper has said that another one follows.
    pub successor_announced: bool,
}

/// The processes that the keeper may have started without saying so: of those with the token, the one that started
/// first is the instance and the others are its offspring.
fn find_unanswered(sought: &[(u64, Sought)]) -> Vec<(u64, u32, u64)> {
    let tokens: BTreeMap<String, u64> = sought
        .iter()
        .filter_map(|(request, sought)| Some((Tag::decode(&sought.tag)?.token(), *request)))
        .collect();
    let mut first: BTreeMap<u64, ProcessId> = BTreeMap::new();
    let orphans = orphans::find(&|token| tokens.contains_key(token)).unwrap_or_default();
    for orphan in orphans {
        let Some(request) = tokens.get(&orphan.token) else { continue };
        let known = first.entry(*request).or_insert(orphan.process);
        if (orphan.process.start_ticks, orphan.process.pid) < (known.start_ticks, known.pid) {
            *known = orphan.process;
        }
    }
    let found = first.into_iter();
    found.map(|(request, process)| (request, process.pid.unsigned_abs(), process.start_ticks)).collect()
}
