//! Who is at the other end of a unix socket.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::sys::socket::sockopt::{PassCred, PeerCredentials};
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, UnixAddr, UnixCredentials, getsockopt, recvmsg, setsockopt,
};
use nix::unistd::geteuid;

/// The uid of the process that connected (SO_PEERCRED, unix(7)).
///
/// # Errors
/// When the descriptor is no connected unix socket.
pub fn uid_of(stream: BorrowedFd<'_>) -> io::Result<u32> {
    Ok(getsockopt(&stream, PeerCredentials)?.uid())
}

/// The pid of the process that connected, or that listens at the address connected to.
///
/// # Errors
/// When the descriptor is no connected unix socket.
pub fn pid_of(stream: BorrowedFd<'_>) -> io::Result<u32> {
    Ok(getsockopt(&stream, PeerCredentials)?.pid().unsigned_abs())
}

/// Has the kernel note the sender of every datagram (SO_PASSCRED, unix(7)).
///
/// # Errors
/// When the descriptor is no unix socket.
pub fn note_senders(socket: BorrowedFd<'_>) -> io::Result<()> {
    Ok(setsockopt(&socket, PassCred, &true)?)
}

/// Looks at the next datagram without taking it: its length, and the uid of its sender where that was noted.
///
/// # Errors
/// EAGAIN when there is none.
pub fn peek(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, Option<u32>)> {
    let mut parts = [IoSliceMut::new(buffer)];
    let mut space = nix::cmsg_space!(UnixCredentials);
    let message = recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_PEEK)?;
    let sender = message.cmsgs()?.find_map(|note| match note {
        ControlMessageOwned::ScmCredentials(credentials) => Some(credentials.uid()),
        _ => None,
    });
    Ok((message.bytes, sender))
}

/// Whether a process of this uid may command a daemon of ours: the same user, or root.
#[must_use]
pub fn may_command(uid: u32) -> bool {
    uid == 0 || uid == geteuid().as_raw()
}

/// Whether a daemon of this uid may be believed by us: our own, root's; root believes everybody.
#[must_use]
pub fn may_be_believed(uid: u32) -> bool {
    uid == 0 || uid == geteuid().as_raw() || geteuid().is_root()
}

/// The uid this process acts as.
#[must_use]
pub fn own_uid() -> u32 {
    geteuid().as_raw()
}
