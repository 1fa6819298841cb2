//! Who goes on when the keeper dies in the middle of an upgrade. Between the end of the inventory and the dismissal of the
//! old supervisor there are two that have everything, and neither can hear from the keeper any more which of them it is.
//!
//! Both have the reading end of one pipe with one byte in it. Whoever gets the byte goes on, the other one ends.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::sys::pipe;

/// The keeper's name of the pipe.
pub(super) const CLAIM: &str = "claim";

/// The right to go on, as long as nobody has taken it.
#[derive(Debug)]
pub(super) struct Claim(OwnedFd);

impl Claim {
    /// A claim that nobody has taken.
    ///
    /// # Errors
    /// EMFILE and ENFILE.
    pub(super) fn new() -> io::Result<Self> {
        let (writer, reader) = pipe::ready_pipe()?;
        nix::unistd::write(&writer, &[1])?;
        Ok(Self(reader))
    }

    /// That of the supervisor before this one.
    pub(super) const fn of(pipe: OwnedFd) -> Self {
        Self(pipe)
    }

    /// Takes it; whether it was there. Once only, over all copies.
    pub(super) fn take(&self) -> bool {
        // Nothing to read, and the end of the stream: somebody else was here.
        nix::unistd::read(&self.0, &mut [0]) == Ok(1)
    }
}

impl AsFd for Claim {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keeper::link::{Link, LinkError};
    use crate::keeper::packet::{Incoming, Packets};
    use crate::keeper::wire::{FromKeeper, HeldRecord, Hello, ToKeeper, Upgrade, UpgradeState};

    fn hello(upgrade: Option<Upgrade>) -> Hello {
        Hello { upgrade, ..Hello::of_a_test() }
    }

    /// A keeper that is about to die, an old supervisor that has said Go, and what it lets the keeper hold.
    fn go() -> (Packets, Link, OwnedFd) {
        let (ours, theirs) = pipe::packet_pair().unwrap();
        let (mut keeper, mut old) = (Packets::new(ours), Link::new(theirs));
        old.go().unwrap();
        let Incoming::Frame(frame, mut fds) = keeper.receive().unwrap() else { panic!("nothing came") };
        let said = ToKeeper::decode(frame, fds.len()).unwrap();
        assert_eq!(said, ToKeeper::Hold { names: vec![CLAIM.to_owned()], owner: None });
        (keeper, old, fds.remove(0))
    }

    /// What a new supervisor makes of an inventory that a keeper has sent before it died.
    fn greeted(claim: &OwnedFd, state: UpgradeState, frames: usize) -> Result<Vec<String>, LinkError> {
        let (ours, theirs) = pipe::packet_pair().unwrap();
        let mut keeper = Packets::new(ours);
        let hello = hello(Some(Upgrade { op: 1, from: String::from("0.1.0"), state }));
        let held = [CLAIM, "lock"].map(|name| HeldRecord { name: name.to_owned(), owner: None }).to_vec();
        let fds = [claim.as_fd(), claim.as_fd()];
        let messages =
            [FromKeeper::Hello(hello), FromKeeper::Held { batch: 1, held }, FromKeeper::InventoryEnd];
        for message in &messages[..frames] {
            let fds = if matches!(message, FromKeeper::Held { .. }) { &fds[..] } else { &[] };
            keeper.send(message.encode(fds.len()).unwrap(), fds).unwrap();
        }
        let mut new = Link::new(theirs);
        let dies = std::thread::spawn(move || {
            // Its answers are read, so that it gets as far as it can.
            let said = |keeper: &mut Packets| matches!(keeper.receive(), Ok(Incoming::Frame(..)));
            let until = std::time::Instant::now() + std::time::Duration::from_secs(30);
            let mut answers = 0;
            while answers < 2 && std::time::Instant::now() < until {
                answers += usize::from(said(&mut keeper));
                std::thread::yield_now();
            }
        });
        let inventory = new.handshake();
        dies.join().unwrap();
        Ok(inventory?.held.into_iter().map(|(name, _)| name).collect())
    }

    /// Both used to go on: two that read the same channels, each with a keeper of its own to start.
    #[test]
    fn of_two_that_have_everything_when_the_keeper_dies_one_goes_on() {
        // The new one had the end of the inventory.
        let (keeper, mut old, claim) = go();
        assert_eq!(greeted(&claim, UpgradeState::Pending, 3).unwrap(), ["lock"]);
        drop(keeper);
        assert!(matches!(old.try_recv(), Err(LinkError::Closed)));
        assert!(!old.goes_on());
        // The old one was quicker.
        let (_keeper, mut old, claim) = go();
        assert!(old.goes_on());
        assert!(matches!(greeted(&claim, UpgradeState::Pending, 3), Err(LinkError::Superseded)));
    }

    #[test]
    fn one_that_never_had_everything_takes_nothing() {
        let (_keeper, mut old, claim) = go();
        assert!(matches!(greeted(&claim, UpgradeState::Pending, 2), Err(LinkError::Closed)));
        assert!(old.goes_on());
    }

    #[test]
    fn what_a_trial_that_failed_has_taken_keeps_nobody_from_going_on() {
        let (_keeper, _old, claim) = go();
        assert_eq!(greeted(&claim, UpgradeState::Pending, 3).unwrap(), ["lock"]);
        let failed = UpgradeState::Failed { reason: String::from("exit code 3") };
        assert_eq!(greeted(&claim, failed, 3).unwrap(), ["lock"]);
    }

    #[test]
    fn the_next_keeper_does_not_get_it() {
        let (keeper, mut old, claim) = go();
        drop((keeper, claim));
        assert!(matches!(old.try_recv(), Err(LinkError::Closed)));
        assert!(old.goes_on());
        assert!(old.into_estate(hello(None), |_| Vec::new()).held.is_empty());
        // Nor that of an upgrade that failed before, which nobody asked about any more.
        let (keeper, mut old, claim) = go();
        drop((keeper, claim));
        assert!(matches!(old.try_recv(), Err(LinkError::Closed)));
        assert!(old.into_estate(hello(None), |_| Vec::new()).held.is_empty());
    }
}
