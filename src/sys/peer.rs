//! Who is at the other end of a unix socket.

use std::io;
use std::os::fd::BorrowedFd;

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
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

/// Whether a process of this uid may command a daemon of ours: the same user, or root.
#[must_use]
pub fn may_command(uid: u32) -> bool {
    uid == 0 || uid == geteuid().as_raw()
}

/// The uid this process acts as.
#[must_use]
pub fn own_uid() -> u32 {
    geteuid().as_raw()
}
