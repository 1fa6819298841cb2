//! The lock is held: by a keeper that lives, or by a supervisor whose keeper is gone. From the latter everything is
//! taken over. One that was started by hand is asked to leave when a service manager starts another.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, RawFd};
use std::time::Duration;

use crate::keeper::handover;
use crate::keeper::link::Inventory;
use crate::store::paths::Home;
use crate::sys::clock;
use crate::sys::lock::{self, LockError};
use crate::sys::notify::LEAVE_SIGNAL;
use crate::sys::{child, fdpass, peer, pidfd, pipe, poll};

/// How long a supervisor may take to notice that its keeper is gone, or a keeper to leave.
const PATIENCE: Duration = Duration::from_secs(12);
/// Between two looks: nothing tells when a supervisor begins to wait.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// What becomes of a keeper that is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Other {
    /// It stays, and this one does not.
    Stays,
    /// It is asked to leave: this one is watched over.
    Leaves,
}

/// What was found behind the lock.
#[derive(Debug)]
pub(super) enum Found {
    /// The lock is ours now, and nobody was there.
    Free(File),
    /// A supervisor without a keeper gave everything.
    Everything(Box<Inventory>),
    /// Another daemon is there.
    Taken {
        /// Its pid.
        pid: Option<u32>,
    },
}

/// Looks who holds the lock, and takes over what can be taken over. Waits for that.
pub(super) fn inherit(home: &Home, mut holder: Option<u32>, other: Other) -> Result<Found, LockError> {
    let deadline = clock::now() + PATIENCE;
    let mut asked = false;
    loop {
        match supervisor(home) {
            Ok(Some(inventory)) => return Ok(Found::Everything(Box::new(inventory))),
            Ok(None) => {}
            // It goes on offering everything.
            Err(error) => super::keep::say(&format!("warning: cannot take over: {error}")),
        }
        match lock::acquire(&home.lock()) {
            Ok(lock) => return Ok(Found::Free(lock)),
            Err(LockError::Held { pid, .. }) => holder = pid.or(holder),
            Err(error) => return Err(error),
        }
        if !asked && let Some(pid) = holder.filter(|&pid| is_keeper(pid)) {
            if other == Other::Stays || !leaves(pid) {
                return Ok(Found::Taken { pid: Some(pid) });
            }
            asked = true;
        }
        if clock::now() >= deadline {
            return Ok(Found::Taken { pid: holder });
        }
        let _ = poll::wait(&[], Some(LOOK_EVERY));
    }
}

/// Everything of the supervisor that waits for a keeper, if one does.
fn supervisor(home: &Home) -> Result<Option<Inventory>, String> {
    let words = |error: io::Error| error.to_string();
    let address = home.takeover_address().map_err(words)?;
    let socket = match pipe::packet_connect(address.as_path()) {
        Ok(socket) => socket,
        Err(error) => match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => return Ok(None),
            _ => return Err(error.to_string()),
        },
    };
    if peer::uid_of(socket.as_fd()).map_err(words)? != peer::own_uid() {
        return Err("the supervisor belongs to another user".to_owned());
    }
    handover::take(socket).map(Some).map_err(|error| error.to_string())
}

/// Everything of the supervisor that has started this process, and gave it a connection at this number.
pub(super) fn left_at(number: RawFd) -> Result<Inventory, String> {
    let socket = fdpass::inherited_packet_socket(number).map_err(|error| error.to_string())?;
    handover::take(socket).map_err(|error| error.to_string())
}

/// Whether this pid, which may be an old note, is a keeper.
fn is_keeper(pid: u32) -> bool {
    // A zombie holds no lock, and is not one.
    let alive = child::start_ticks(pid).is_ok_and(|ticks| child::status_of_zombie(pid, ticks).is_none());
    let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    alive && pid != std::process::id() && words.split(|&byte| byte == 0).skip(1).any(|word| word == b"daemon")
}

/// Asks a keeper to leave everything to us. `false`: it is one that does not know how.
fn leaves(pid: u32) -> bool {
    let Ok(keeper) = pidfd::open(pid) else { return true };
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let blocked = status.lines().find_map(|line| line.strip_prefix("SigBlk:"));
    // It takes its signals from a descriptor, so those it knows are blocked.
    let blocked = blocked.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    if blocked & (1 << (LEAVE_SIGNAL - 1)) == 0 {
        return false;
    }
    pidfd::send_signal(&keeper, LEAVE_SIGNAL).is_ok()
}
