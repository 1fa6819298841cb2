//! Frames with descriptors over a packet socket, without ever waiting. Knows nothing of their meaning.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::wire::FRAME_MAX;
use crate::sys::fdpass::{self, Take};

/// One end of the link, with the frames that still have to go out.
#[derive(Debug)]
pub(super) struct Packets {
    socket: OwnedFd,
    waiting: VecDeque<Packet>,
    /// The kernel refuses further descriptors until the other end has taken some; the socket seems writable all the
    /// while.
    congested: bool,
    buffer: Vec<u8>,
}

#[derive(Debug)]
struct Packet {
    frame: Vec<u8>,
    fds: Vec<OwnedFd>,
}

/// What arrived.
#[derive(Debug)]
pub(super) enum Incoming<'a> {
    /// A frame with its descriptors.
    Frame(&'a [u8], Vec<OwnedFd>),
    /// Nothing now.
    Nothing,
    /// The other end is closed.
    End,
}

impl Packets {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self { socket, waiting: VecDeque::new(), congested: false, buffer: vec![0; FRAME_MAX] }
    }

    /// How many frames wait for room in the socket.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Whether room in the socket would help. When not, and something waits, try again after a moment.
    pub(super) fn wants_room(&self) -> bool {
        !self.waiting.is_empty() && !self.congested
    }

    /// Sends a frame, or queues it behind others with copies of its descriptors.
    pub(super) fn send(&mut self, frame: Vec<u8>, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        if self.waiting.is_empty() {
            match fdpass::send(&self.socket, &frame, fds) {
                Err(error) if must_wait(&error) => self.congested = is_congestion(&error),
                other => return other.map(drop),
            }
        }
        let fds = fds.iter().map(BorrowedFd::try_clone_to_owned).collect::<io::Result<_>>()?;
        self.waiting.push_back(Packet { frame, fds });
        Ok(())
    }

    /// Sends what waits, as far as there is room.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        while let Some(packet) = self.waiting.front() {
            let fds: Vec<BorrowedFd<'_>> = packet.fds.iter().map(AsFd::as_fd).collect();
            match fdpass::send(&self.socket, &packet.frame, &fds) {
                Err(error) if must_wait(&error) => {
                    self.congested = is_congestion(&error);
                    return Ok(());
                }
                other => drop(other?),
            }
            self.congested = false;
            self.waiting.pop_front();
        }
        Ok(())
    }

    /// The next frame.
    ///
    /// # Errors
    /// InvalidData when a frame or descriptors were cut (MSG_TRUNC, MSG_CTRUNC): the link cannot be trusted any more.
    pub(super) fn receive(&mut self) -> io::Result<Incoming<'_>> {
        let got = loop {
            match fdpass::receive(&self.socket, &mut self.buffer, Take::Consume) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Incoming::Nothing),
                // The other end was closed with our frames unread. Told once, ahead of what it still had to say.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
                other => break other?,
            }
        };
        if got.bytes_lost || got.fds_lost {
            let what = if got.bytes_lost { "frame was cut" } else { "descriptors were lost" };
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        if got.len == 0 {
            return Ok(Incoming::End);
        }
        Ok(Incoming::Frame(&self.buffer[..got.len], got.fds))
    }
}

/// No room in the socket, or too many descriptors on their way in it: both pass as the other end reads.
fn must_wait(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock || is_congestion(error)
}

/// A user may have as many descriptors on their way in sockets as one of its processes may open (unix(7)).
fn is_congestion(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ETOOMANYREFS)
}

impl AsFd for Packets {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
