//! Signals that cannot hit the wrong process.
//!
//! A pid may be given to another process at any time once its owner is reaped. A pidfd cannot: it is opened first, then
//! the start time behind the pid is compared, and from then on only the descriptor is used.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};

use crate::sys::procfs::{ProcessId, Procfs};

/// A process that stays the same one. Readable (epoll, poll) once it has exited, reaped or not.
#[derive(Debug)]
pub struct Pidfd(OwnedFd);

impl Pidfd {
    /// Opens a process (pidfd_open(2), Linux 5.3); `None` when that process is no more, even if its pid is in use.
    ///
    /// # Errors
    /// No descriptors left.
    pub fn open(procfs: &mut Procfs, process: ProcessId) -> io::Result<Option<Self>> {
        // SAFETY: the call takes two integers and touches no memory of ours.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, process.pid, 0) };
        let Ok(fd) = RawFd::try_from(fd) else { return Err(io::ErrorKind::InvalidData.into()) };
        if fd < 0 {
            let error = io::Error::last_os_error();
            // EINVAL: the number is a thread by now.
            let gone = matches!(error.raw_os_error(), Some(libc::ESRCH | libc::EINVAL));
            return if gone { Ok(None) } else { Err(error) };
        }
        // SAFETY: the kernel has just made this descriptor for us (close-on-exec); nobody else knows its number.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(match procfs.stat(process.pid)? {
            Some(stat) if stat.process == process => Some(Self(fd)),
            _ => None,
        })
    }

    /// Sends a signal (pidfd_send_signal(2), Linux 5.1); whether the process was still there.
    ///
    /// # Errors
    /// Not allowed (EPERM) or no such signal (EINVAL).
    pub fn signal(&self, signal: i32) -> io::Result<bool> {
        // SAFETY: a null siginfo asks for that of kill(2); the other arguments are integers.
        let result = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.0.as_raw_fd(),
                signal,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        sent(result == 0)
    }
}

impl AsFd for Pidfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Sends signals to one process, if it is still that one. Whether it was there for the first; the others may come too
/// late.
///
/// # Errors
/// Not allowed (EPERM) or no such signal (EINVAL), for the first.
pub fn signal_process(procfs: &mut Procfs, process: ProcessId, signals: &[i32]) -> io::Result<bool> {
    let each = |send: &dyn Fn(i32) -> io::Result<bool>| {
        let Some((&first, others)) = signals.split_first() else { return Ok(true) };
        let there = send(first)?;
        for &signal in others {
            let _ = send(signal);
        }
        Ok(there)
    };
    match Pidfd::open(procfs, process) {
        Ok(Some(pidfd)) => each(&|signal| pidfd.signal(signal)),
        Ok(None) => Ok(false),
        // No descriptor left: a process that must be stopped is worth the small window between look and kill. If not
        // even the look is possible, that error is told.
        Err(_) => match procfs.stat(process.pid)? {
            Some(stat) if stat.process == process => each(&|signal| kill(process.pid, signal)),
            _ => Ok(false),
        },
    }
}

/// Sends a signal to all processes of a group at once: none of them can fork past it. Whether there was one.
///
/// The caller knows that the group is still the one it means, because its leader has not been reaped.
///
/// # Errors
/// Not allowed for any of them (EPERM) or no such signal (EINVAL).
pub fn signal_group(leader: i32, signal: i32) -> io::Result<bool> {
    // 0 and 1 would mean our own group and everything on the machine.
    if leader <= 1 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    kill(-leader, signal)
}

fn kill(pid: i32, signal: i32) -> io::Result<bool> {
    // SAFETY: kill(2) takes two integers and touches no memory of ours.
    sent(unsafe { libc::kill(pid, signal) } == 0)
}

fn sent(done: bool) -> io::Result<bool> {
    if done {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::ESRCH) { Ok(false) } else { Err(error) }
}
