//! Waiting for descriptors and signals without a runtime.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// What to wait for on a descriptor. Errors and hang-ups wake every waiter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// Until there is something to read.
    Read,
    /// Until there is room to write.
    Write,
    /// Until either.
    ReadWrite,
    /// Until it hangs up.
    Hangup,
}

/// Waits until one of the descriptors is ready or the time is over, and returns for each whether it is ready. A
/// signal that interrupts the wait ends it with nothing ready.
///
/// # Errors
/// See poll(2).
pub fn wait(wanted: &[(BorrowedFd<'_>, Interest)], timeout: Option<Duration>) -> io::Result<Vec<bool>> {
    let mut fds: Vec<PollFd<'_>> = wanted
        .iter()
        .map(|&(fd, interest)| {
            let flags = match interest {
                Interest::Read => PollFlags::POLLIN,
                Interest::Write => PollFlags::POLLOUT,
                Interest::ReadWrite => PollFlags::POLLIN | PollFlags::POLLOUT,
                Interest::Hangup => PollFlags::empty(),
            };
            PollFd::new(fd, flags)
        })
        .collect();
    let timeout = match timeout {
        None => PollTimeout::NONE,
        // Rounded up: a wait that ends a fraction too early would spin until its deadline.
        Some(span) => PollTimeout::try_from(span.as_nanos().div_ceil(1_000_000)).unwrap_or(PollTimeout::MAX),
    };
    match poll(&mut fds, timeout) {
        Ok(_) => Ok(fds.iter().map(|fd| fd.any().unwrap_or(false)).collect()),
        Err(Errno::EINTR) => Ok(vec![false; wanted.len()]),
        Err(error) => Err(error.into()),
    }
}

/// Signals taken from a descriptor instead of interrupting this thread.
#[derive(Debug)]
pub struct Signals(SignalFd);

/// One signal, as it was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrived {
    /// The signal's number.
    pub signal: i32,
    /// Who sent it; for SIGCHLD, the child (several exits may share one signal).
    pub pid: u32,
}

impl Signals {
    /// Blocks these signals for this thread and collects them here. To be called before other threads exist.
    ///
    /// # Errors
    /// EINVAL for a number that is no standard signal; see signalfd(2).
    pub fn block(signals: &[i32]) -> io::Result<Self> {
        let mut set = SigSet::empty();
        for &signal in signals {
            set.add(Signal::try_from(signal)?);
        }
        set.thread_block()?;
        Ok(Self(SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?))
    }

    /// The next signal that has arrived; never blocks.
    ///
    /// # Errors
    /// See signalfd(2).
    pub fn next(&self) -> io::Result<Option<Arrived>> {
        Ok(self.0.read_signal()?.map(|info| Arrived {
            signal: i32::try_from(info.ssi_signo).unwrap_or_default(),
            pid: info.ssi_pid,
        }))
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Whether this process was started with the signal ignored, as background jobs of scripts have SIGINT.
#[must_use]
pub fn is_ignored(signal: i32) -> bool {
    // SAFETY: sigaction is plain integers and pointers; all zeroes is a valid value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: a null new action only reads, into memory valid for writing.
    let rc = unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut action) };
    rc == 0 && action.sa_sigaction == libc::SIG_IGN
}

/// Lets writes beyond a limit on file sizes (`ulimit -f`) fail with EFBIG instead of ending this process. What it starts by
/// exec(2) inherits that, unless it is given its dispositions anew.
///
/// # Errors
/// See sigaction(2).
pub fn ignore_sigxfsz() -> io::Result<()> {
    // SAFETY: sigaction is plain integers and pointers; all zeroes is a valid value (SIG_DFL, empty mask).
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = libc::SIG_IGN;
    // SAFETY: SIG_IGN installs no code of ours, and a null old action is allowed.
    let rc = unsafe { libc::sigaction(libc::SIGXFSZ, &raw const action, std::ptr::null_mut()) };
    Ok(Errno::result(rc).map(drop)?)
}

/// Gives SIGCHLD its default disposition, told of exits only. Started with SIGCHLD ignored, a parent's children would
/// vanish without a zombie and without a status.
///
/// # Errors
/// See sigaction(2).
pub fn default_sigchld() -> io::Result<()> {
    // SAFETY: sigaction is plain integers and pointers; all zeroes is a valid value (SIG_DFL, empty mask).
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = libc::SIG_DFL;
    action.sa_flags = libc::SA_NOCLDSTOP;
    // SAFETY: SIG_DFL installs no code of ours, and a null old action is allowed.
    let rc = unsafe { libc::sigaction(libc::SIGCHLD, &raw const action, std::ptr::null_mut()) };
    Ok(Errno::result(rc).map(drop)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_is_told_per_descriptor() {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let wanted = [(reader.as_fd(), Interest::Read), (writer.as_fd(), Interest::Write)];
        assert_eq!(wait(&wanted, Some(Duration::ZERO)).unwrap(), [false, true]);
        nix::unistd::write(&writer, b"x").unwrap();
        assert_eq!(wait(&wanted, None).unwrap(), [true, true]);
        let only = [(reader.as_fd(), Interest::Hangup)];
        assert_eq!(wait(&only, Some(Duration::from_micros(10))).unwrap(), [false]);
        drop(writer);
        assert_eq!(wait(&only, None).unwrap(), [true]);
    }
}
