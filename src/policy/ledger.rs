//! Changes of the desired state on their way to the disk.
//!
//! One save is under way at a time; changes that arrive meanwhile wait and share the next one, so a hundred commands
//! cost two writes and not a hundred. What a change makes possible begins when it is durable. A failed save leaves the
//! desired state as it was, but for changes that are made all the same (stop, delete).

use std::collections::BTreeSet;

use crate::model::id::AppName;

use super::vocabulary::SaveId;
use super::wanted::{Change, Wanted};

/// Names one operation of one app, so that a save that comes back late cannot start another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Serial(pub(super) u64);

/// What follows when a change is durable, or is not.
#[derive(Clone, Debug)]
pub(super) enum After {
    /// The operation begins.
    Begin { app: AppName, serial: Serial },
    /// The operation is at its end.
    Close { app: AppName, serial: Serial },
    /// Generations may be used.
    Reserved { app: AppName },
    /// Everything goes down: `pm kill`.
    KillBegins,
    /// Everything is down and forgotten.
    KillEnds,
    /// Nothing waits for it.
    Nothing,
}

/// A change that waits for its save.
#[derive(Clone, Debug)]
pub(super) struct Pending {
    pub(super) change: Change,
    pub(super) after: After,
    /// A failed save does not keep it from being made.
    pub(super) regardless: bool,
}

/// A save under way.
#[derive(Clone, Debug)]
pub(super) struct Batch {
    pub(super) save: SaveId,
    /// The state as it is when the save succeeds.
    pub(super) candidate: Wanted,
    pub(super) pending: Vec<Pending>,
}

/// The desired state and what is to become of it.
#[derive(Clone, Debug, Default)]
pub(super) struct Ledger {
    /// As it is believed to be on disk, but for changes that were made regardless.
    pub(super) wanted: Wanted,
    pub(super) waiting: Vec<Pending>,
    pub(super) under_way: Option<Batch>,
    /// Why what is on disk is older than `wanted`: changes were made regardless.
    pub(super) unsaved: Option<String>,
    /// Apps that are on disk because of that, although they are deleted.
    pub(super) deleted: BTreeSet<AppName>,
    /// The last save succeeded, so that the disk has no slot that is not wanted.
    pub(super) current: bool,
    saves: u64,
}

impl Ledger {
    /// A ledger that begins with this state.
    pub(super) fn new(wanted: Wanted) -> Self {
        Self { wanted, ..Self::default() }
    }

    /// A change to be made with the next save.
    pub(super) fn push(&mut self, change: Change, after: After) {
        self.waiting.push(Pending { change, after, regardless: false });
    }

    /// Whether an operation of this app waits for its save, also one that was superseded meanwhile.
    pub(super) fn is_saving(&self, app: &AppName) -> bool {
        let pending = self.under_way.iter().flat_map(|batch| &batch.pending).chain(&self.waiting);
        pending.into_iter().any(|one| matches!(&one.after, After::Begin { app: of, .. } if of == app))
    }

    /// A change to be made with the next save, also when that fails.
    pub(super) fn push_regardless(&mut self, change: Change, after: After) {
        self.waiting.push(Pending { change, after, regardless: true });
    }

    /// The next save, when changes wait and none is under way; `reserve` adds generations to the candidate.
    pub(super) fn next_save(&mut self, reserve: impl FnOnce(&mut Wanted, &[Pending])) -> Option<&Batch> {
        if self.under_way.is_some() || self.waiting.is_empty() {
            return None;
        }
        let pending = std::mem::take(&mut self.waiting);
        let mut candidate = self.wanted.clone();
        for one in &pending {
            candidate.apply(&one.change);
        }
        reserve(&mut candidate, &pending);
        self.saves += 1;
        self.under_way = Some(Batch { save: SaveId(self.saves), candidate, pending });
        self.under_way.as_ref()
    }

    /// The save under way came back with success: its state is the truth. Nothing for a save that is not under way.
    pub(super) fn saved(&mut self, save: SaveId) -> Vec<Pending> {
        match self.under_way.take_if(|batch| batch.save == save) {
            Some(batch) => {
                self.wanted = batch.candidate;
                // Every save carries the whole state.
                self.unsaved = None;
                self.current = true;
                self.deleted.clear();
                batch.pending
            }
            None => Vec::new(),
        }
    }

    /// The save under way failed: only what is done regardless is done.
    pub(super) fn failed(&mut self, save: SaveId, error: &str) -> Vec<Pending> {
        match self.under_way.take_if(|batch| batch.save == save) {
            Some(batch) => {
                self.current = false;
                if batch.pending.iter().any(|one| one.regardless) {
                    self.unsaved = Some(error.to_owned());
                }
                for one in &batch.pending {
                    // A restart goes on without a release of its own: its number would not be known to the next
                    // supervisor, and be given out twice.
                    if one.regardless && !matches!(one.change, Change::Release { .. }) {
                        self.wanted.apply(&one.change);
                        if let Change::Remove { app } = &one.change {
                            self.deleted.insert(app.clone());
                        }
                    }
                }
                batch.pending
            }
            None => Vec::new(),
        }
    }
}
