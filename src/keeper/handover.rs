//! From a keeper that is gone to the next one: its supervisor offers everything it knows and holds, and the next
//! keeper takes it.
//!
//! ```text
//! supervisor without a keeper              the next keeper
//!                                     ←    connects
//! Hello, Children, Held, InventoryEnd ↔    as between a keeper and its supervisor
//!                                     ←    Quit: I have everything
//! exits                               →    end of the connection: nobody else reads these descriptors any more
//! ```
//!
//! A keeper that dies before it said Quit has taken nothing: the supervisor offers it all again.

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
    match offer.hear()? {
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
        let deadline = clock::now() + STEP;
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

/// Takes everything from the supervisor at the other end, and sees it end.
///
/// # Errors
/// It did not give everything; it goes on waiting for a keeper then.
pub fn take(socket: OwnedFd) -> Result<Inventory, LinkError> {
    let supervisor = peer::pid_of(socket.as_fd()).ok().and_then(|pid| pidfd::open(pid).ok());
    let mut link = Link::new(socket);
    let inventory = link.handshake()?;
    link.try_send(&ToKeeper::Quit, &[])?;
    let deadline = clock::now() + EXIT;
    let gone = loop {
        match link.try_recv() {
            // It ends with our Quit read, or without.
            Err(_) => break true,
            Ok(Some(_)) => {}
            Ok(None) if clock::now() >= deadline => break false,
            Ok(None) => wait(link.as_fd(), Interest::Read, deadline, EXIT)?,
        }
    };
    // Its connection ends when its process does, except where something keeps it: two of them must never be.
    if let Some(supervisor) = supervisor {
        let patience = if gone { deadline.since(clock::now()) } else { Duration::ZERO };
        let ended = poll::wait(&[(supervisor.as_fd(), Interest::Read)], Some(patience));
        if !ended.is_ok_and(|ended| ended[0]) {
            // An error means that it has just ended.
            let _ = pidfd::send_signal(&supervisor, libc::SIGKILL);
            let _ = poll::wait(&[(supervisor.as_fd(), Interest::Read)], Some(EXIT));
        }
    }
    Ok(inventory)
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
