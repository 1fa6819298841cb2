//! Descriptors that whoever started us left open: listening sockets (`LISTEN_FDS`, sd_listen_fds(3)) and the ready pipe
//! (`PM_READY_FD`).
//!
//! The other side of what the supervisor does for an app; used where `pm` itself is the app (`pm serve`). Never
//! changes the environment.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

/// The first descriptor of LISTEN_FDS, `SD_LISTEN_FDS_START`.
const LISTEN_FDS_START: RawFd = 3;

/// Descriptors that were taken already: an `OwnedFd` must be the only owner.
static TAKEN: Mutex<BTreeSet<RawFd>> = Mutex::new(BTreeSet::new());

/// The listening sockets handed to this very process, in their order, CLOEXEC from now on. Empty when there are none
/// or when LISTEN_PID names another process, such as a parent that was given them.
///
/// # Errors
/// When LISTEN_FDS promises a descriptor that is not open, or this was called before.
pub fn listeners() -> io::Result<Vec<OwnedFd>> {
    let number = |name: &str| std::env::var(name).ok()?.parse::<u32>().ok();
    if number("LISTEN_PID") != Some(std::process::id()) {
        return Ok(Vec::new());
    }
    let count = number("LISTEN_FDS").and_then(|count| RawFd::try_from(count).ok()).unwrap_or(0);
    (0..count).map(|offset| take(LISTEN_FDS_START.saturating_add(offset))).collect()
}

/// The write end of the pipe on which a newline means "ready", if `PM_READY_FD` names one.
///
/// # Errors
/// When the descriptor is not open, or this was called before.
pub fn ready_pipe() -> io::Result<Option<OwnedFd>> {
    let Some(number) = std::env::var("PM_READY_FD").ok().and_then(|text| text.parse().ok()) else {
        return Ok(None);
    };
    take(number).map(Some)
}

/// Becomes the owner of an inherited descriptor. Refuses 0–2, what is not open, and what was taken before.
fn take(number: RawFd) -> io::Result<OwnedFd> {
    if number < LISTEN_FDS_START {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("descriptor {number} is a standard stream"),
        ));
    }
    let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
    if taken.contains(&number) {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, format!("descriptor {number} is taken")));
    }
    {
        // SAFETY: the number is not -1, and the borrow ends before anything could close the descriptor. If it is not
        // open, the kernel answers EBADF and nothing happened.
        let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
        fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    }
    taken.insert(number);
    // SAFETY: it is open, and nobody else owns it: the environment says that it was left for us, std opens nothing by
    // number, and `TAKEN` sees to it that this happens once.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
