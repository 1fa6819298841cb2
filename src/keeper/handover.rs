//! From a keeper that is gone to the next one: its supervisor offers everything it knows and holds, and the next
//! keeper takes it.
//!
//! ```text
//! supervisor without a keeper              the next keeper, then its supervisor
//!                                     ←    connects
//! Hello, Children, Held, InventoryEnd ↔    as between a keeper and its supervisor
//!                                          (the keeper passes the connection on to its supervisor)
//!                                     ←    Quit: I have everything too
//! exits                               →    end of the connection: nobody else reads these descriptors any more
//! ```
//!
//! So at every instant there are two processes that hold everything, or one that has just lost the other and offers it
//! again: when the connection ends without Quit, nothing has been taken.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use super::children::Children;
use super::link::{Inventory, Link, LinkError};
use super::mirror;
use super::packet::{Incoming, Packets};
use super::wire::{FromKeeper, ToKeeper, WireError};
use crate::sys::clock::{self, Moment};
use crate::sys::poll::{self, Interest};
use crate::sys::{peer, pidfd};

/// How long the other side may take for each step.
const STEP: Duration = Duration::from_secs(10);

/// How long a supervisor may take to exit after its last word.
const EXIT: Duration = Duration::from_secs(5);

/// Offers everything to the keeper at the other end. Returns when it has taken all of it; from then on nothing may be
/// done but to exit.
///
/// # Errors
/// It did not take everything, so it has taken nothing.
pub fn offer(socket: OwnedFd, inventory: &Inventory) -> Result<(), LinkError> {
    let copy = Inventory {
        hello: inventory.hello.clone(),
        children: inventory.children.clone(),
        held: mirror::copies(&inventory.held)
            .map_err(|source| LinkError::Io { step: "copy descriptors", source })?,
    };
    let mut children = Children::to_pass_on(copy);
    let mut offer = Offer { packets: Packets::new(socket) };
    offer.send(&FromKeeper::Hello(inventory.hello.clone()))?;
    let ToKeeper::Welcome { .. } = offer.hear()? else { return Err(out_of_order()) };
    let (mut batch, mut after) = (0, 0);
    while let Some((records, last)) = children.batch_of_children(after) {
        (batch, after) = (batch + 1, last);
        offer.send(&FromKeeper::Children { batch, children: records })?;
        offer.taken(batch)?;
    }
    let mut after: Option<String> = None;
    while let Some((held, fds, last)) = children.batch_of_held(after.as_deref()) {
        batch += 1;
        let frame = (FromKeeper::Held { batch, held }).encode(fds.len()).map_err(LinkError::Wire)?;
        offer.packets.send(frame, &fds).map_err(broken)?;
        offer.taken(batch)?;
        after = Some(last);
    }
    offer.send(&FromKeeper::InventoryEnd)?;
    // From its supervisor, whenever that is up; there is nothing to be done meanwhile.
    match offer.hear_within(Duration::MAX)? {
        ToKeeper::Quit => Ok(()),
        _ => Err(out_of_order()),
    }
}

struct Offer {
    packets: Packets,
}

impl Offer {
    fn send(&mut self, message: &FromKeeper) -> Result<(), LinkError> {
        self.packets.send(message.encode(0).map_err(LinkError::Wire)?, &[]).map_err(broken)
    }

    fn taken(&mut self, sent: u32) -> Result<(), LinkError> {
        match self.hear()? {
            ToKeeper::Taken { batch } if batch == sent => Ok(()),
            _ => Err(out_of_order()),
        }
    }

    fn hear(&mut self) -> Result<ToKeeper, LinkError> {
        self.hear_within(STEP)
    }

    fn hear_within(&mut self, patience: Duration) -> Result<ToKeeper, LinkError> {
        let deadline = clock::now() + patience;
        loop {
            self.packets.flush().map_err(broken)?;
            match self.packets.receive().map_err(broken)? {
                Incoming::Frame(frame, fds) => {
                    return ToKeeper::decode(frame, fds.len()).map_err(LinkError::Wire);
                }
                Incoming::End => return Err(LinkError::Closed),
                Incoming::Nothing => {}
            }
            let interest = if self.packets.wants_room() { Interest::ReadWrite } else { Interest::Read };
            // What waits for descriptors on their way can only be tried again.
            let pause = if self.packets.waiting() > 0 { Duration::from_millis(10) } else { STEP };
            wait(self.packets.as_fd(), interest, deadline, pause)?;
        }
    }
}

/// Takes everything from the supervisor at the other end. The connection comes along, as one more descriptor to hold:
/// whoever gets the inventory from this keeper dismisses the supervisor before it (see `dismiss`).
///
/// # Errors
/// It did not give everything; it goes on waiting for a keeper then.
pub fn take(socket: OwnedFd) -> Result<Inventory, LinkError> {
    let ours = socket.try_clone().map_err(|source| LinkError::Io { step: "copy a descriptor", source })?;
    let mut inventory = Link::new(socket).handshake()?;
    inventory.held.push((PREDECESSOR.to_owned(), ours));
    Ok(inventory)
}

/// The keeper's name of the connection to a supervisor that waits to be dismissed.
pub(super) const PREDECESSOR: &str = "predecessor";

/// Tells a supervisor without a keeper that it is not needed any more, and sees it end.
pub(super) fn dismiss(socket: OwnedFd) {
    let supervisor = peer::pid_of(socket.as_fd()).ok().filter(|&pid| pid != std::process::id());
    let supervisor = supervisor.and_then(|pid| pidfd::open(pid).ok());
    let mut packets = Packets::new(socket);
    let quit = ToKeeper::Quit.encode(0).unwrap_or_default();
    // One that is gone needs no word.
    let _ = packets.send(quit, &[]);
    let deadline = clock::now() + EXIT;
    let hangs = loop {
        match packets.receive() {
            Ok(Incoming::Nothing | Incoming::Frame(..)) => {}
            Ok(Incoming::End) | Err(_) => break false,
        }
        if wait(packets.as_fd(), Interest::Read, deadline, EXIT).is_err() {
            break true;
        }
    };
    let Some(supervisor) = supervisor else { return };
    if hangs {
        // Two of them must never be. Its end of the connection is open, so the pid is still its own.
        let _ = pidfd::send_signal(&supervisor, libc::SIGKILL);
    }
    // The connection ends a little before the process does.
    let _ = poll::wait(&[(supervisor.as_fd(), Interest::Read)], Some(EXIT));
}

fn wait(
    fd: std::os::fd::BorrowedFd<'_>,
    interest: Interest,
    deadline: Moment,
    at_most: Duration,
) -> Result<(), LinkError> {
    let left = deadline.since(clock::now());
    if left.is_zero() {
        return Err(LinkError::Silent);
    }
    poll::wait(&[(fd, interest)], Some(left.min(at_most)))
        .map(drop)
        .map_err(|source| LinkError::Io { step: "wait for the other side", source })
}

fn broken(source: io::Error) -> LinkError {
    match source.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => LinkError::Closed,
        _ => LinkError::Io { step: "hand over", source },
    }
}

const fn out_of_order() -> LinkError {
    LinkError::Wire(WireError::Value("order of frames"))
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::keeper::link::Child;
    use crate::keeper::wire::{ChildState, Hello};
    use crate::sys::child::WaitStatus;
    use crate::sys::pipe;

    fn inventory(children: u32) -> Inventory {
        let (one, _two) = pipe::packet_pair().unwrap();
        let name = |pid: u32| format!("run:{pid}:out");
        let child = |pid: u32| Child {
            pid,
            start_ticks: u64::from(pid) * 3,
            tag: format!("tag of {pid}").into_bytes(),
            state: if pid.is_multiple_of(5) {
                ChildState::Exited(WaitStatus::from_raw(1792))
            } else {
                ChildState::Running
            },
            held: vec![name(pid)],
        };
        let mut held: Vec<(String, OwnedFd)> =
            (1..=children).map(|pid| (name(pid), one.try_clone().unwrap())).collect();
        held.push(("lock".to_owned(), one.try_clone().unwrap()));
        let hello =
            Hello { started: 7, oom_score_adj: 3, deaths: 2, terminate: Some(15), ..Hello::of_a_test() };
        Inventory { hello, children: (1..=children).map(child).collect(), held }
    }

    #[test]
    fn everything_arrives_whole_and_in_order_however_much_it_is() {
        let (ours, theirs) = pipe::packet_pair().unwrap();
        let offered = inventory(700);
        let offers = thread::spawn(move || offer(ours, &offered).map(|()| offered));
        let mut taken = take(theirs).unwrap();
        let (name, connection) = taken.held.pop().unwrap();
        assert_eq!(name, PREDECESSOR);
        assert!(!offers.is_finished(), "it stays until it is dismissed");
        dismiss(connection);
        let offered = offers.join().unwrap().unwrap();
        assert_eq!(taken.hello, offered.hello);
        assert_eq!(taken.children, offered.children);
        let names = |inventory: &Inventory| -> Vec<String> {
            let mut names: Vec<String> = inventory.held.iter().map(|(name, _)| name.clone()).collect();
            names.sort();
            names
        };
        assert_eq!(names(&taken), names(&offered));
    }

    #[test]
    fn a_taker_that_dies_in_the_middle_has_taken_nothing() {
        let offered = inventory(200);
        for step in 0..4 {
            let (ours, theirs) = pipe::packet_pair().unwrap();
            let dies = thread::spawn(move || {
                if step == 3 {
                    // As a keeper that is killed before its supervisor has taken anything.
                    return drop(take(theirs).unwrap());
                }
                let mut link = Link::new(theirs);
                if step > 0 {
                    link.handshake().unwrap();
                }
                if step > 1 {
                    link.try_send(&ToKeeper::Welcome { version: 1 }, &[]).unwrap();
                }
            });
            offer(ours, &offered).unwrap_err();
            dies.join().unwrap();
        }
        let (ours, theirs) = pipe::packet_pair().unwrap();
        let takes = thread::spawn(move || {
            let mut taken = take(theirs).unwrap();
            dismiss(taken.held.pop().unwrap().1);
            taken.children.len()
        });
        offer(ours, &offered).unwrap();
        assert_eq!(takes.join().unwrap(), 200);
    }
}
