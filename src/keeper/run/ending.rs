//! The end without a supervisor: whoever waits for a daemon in the foreground has asked it to end, and one supervisor after
//! the other fails at that.
//!
//! ```text
//! asked to end ─→ FAILURES supervisors have ended ─→ SIGTERM ─→ all have ended, or GRACE ─→ SIGKILL to all that is left
//! ```
//!
//! The keeper knows nothing of apps, so all get the same signal. What is nobody's child is killed after the others.

use std::io;
use std::time::Duration;

use super::upgrade::kill;
use super::{Error, Keeper, say};
use crate::sys::child;
use crate::sys::clock::Moment;

/// So many may fail: the last of them has begun without what those before it remembered.
const FAILURES: u32 = 6;
/// What the children have to end by themselves.
const GRACE: Duration = Duration::from_secs(5);
/// What is left after SIGKILL for so long cannot be ended.
const KILLED: Duration = Duration::from_secs(2);

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// It is a supervisor's. So many have ended since they were told.
    Theirs { failed: u32 },
    /// The children were told, and are killed then.
    Told { kill: Moment },
    /// They are killed.
    Killed { done: Moment },
}

impl Default for Ending {
    fn default() -> Self {
        Self::Theirs { failed: 0 }
    }
}

impl Ending {
    /// Whether no supervisor is to come any more.
    pub(super) const fn is_ours(self) -> bool {
        matches!(self, Self::Told { .. } | Self::Killed { .. })
    }

    pub(super) const fn next_deadline(self) -> Option<Moment> {
        match self {
            Self::Theirs { .. } => None,
            Self::Told { kill: at } | Self::Killed { done: at } => Some(at),
        }
    }
}

impl Keeper {
    /// A supervisor has ended that was to end everything, or another one.
    pub(super) fn supervisor_failed(&mut self, now: Moment) {
        // SIGHUP asks for something else there.
        let asked = self.terminate.is_some_and(|signal| signal != libc::SIGHUP);
        if !self.config.foreground || !asked {
            return;
        }
        self.ending = match self.ending {
            Ending::Theirs { failed } if failed + 1 < FAILURES => Ending::Theirs { failed: failed + 1 },
            Ending::Theirs { .. } => {
                say(&format!("{FAILURES} supervisors have failed to end the apps; they get SIGTERM"));
                self.children.signal(libc::SIGTERM);
                Ending::Told { kill: now + GRACE }
            }
            ours => ours,
        };
    }

    /// Ends what is left when that is due.
    ///
    /// # Errors
    /// When nothing is left: the daemon has ended, but not as it should.
    pub(super) fn act_on_ending(&mut self, now: Moment) -> Result<(), Error> {
        if let Ending::Told { kill: at } = self.ending
            && (at <= now || self.children.alive().is_empty())
        {
            self.ending = Ending::Killed { done: now + KILLED };
        }
        let Ending::Killed { done } = self.ending else { return Ok(()) };
        // Again at every turn: whoever loses its parent becomes our child.
        self.children.signal(libc::SIGKILL);
        let mut orphans = child::children().unwrap_or_default();
        orphans.retain(|&pid| !self.children.contains(pid));
        for &pid in &orphans {
            kill(pid);
        }
        if done > now && !(self.children.alive().is_empty() && orphans.is_empty()) {
            return Ok(());
        }
        let source = io::Error::other(format!("{FAILURES} of them failed, one after the other"));
        Err(Error { step: "leave the end of the apps to a supervisor", source })
    }
}
