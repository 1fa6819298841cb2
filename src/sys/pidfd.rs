//! Descriptors that name one process for good: signals through them cannot hit a reused pid.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;

use super::child::{self, WaitStatus};
use super::fdpass::own;

/// `struct pidfd_info` in its first form (linux/pidfd.h).
#[repr(C)]
#[derive(Debug, Default)]
struct PidfdInfo {
    mask: u64,
    cgroup: u64,
    /// pid, tgid, ppid, then real, effective, saved and file system ids.
    ids: [u32; 11],
    exit_code: i32,
}

/// PIDFD_INFO_EXIT.
const INFO_EXIT: u64 = 1 << 3;

nix::ioctl_readwrite!(pidfd_get_info, 0xff, 11, PidfdInfo);

/// A descriptor for the process `pid` (pidfd_open, Linux 5.3; CLOEXEC). Readable once it has ended.
///
/// # Errors
/// ESRCH when there is no such process.
pub fn open(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).map_err(|_| Errno::ESRCH)?;
    // SAFETY: two integers in, a descriptor out.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    own(Errno::result(fd)?)
}

/// A descriptor for the process `pid` that started at `start_ticks`; `None` when that one is gone, also when its pid
/// has been given to another process since.
///
/// # Errors
/// Anything but the process being gone.
pub fn open_same(pid: u32, start_ticks: u64) -> io::Result<Option<OwnedFd>> {
    let fd = match open(pid) {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
        other => other?,
    };
    // Compared after opening: from then on the descriptor cannot change its meaning.
    match child::start_ticks(pid) {
        Ok(ticks) => Ok((ticks == start_ticks).then_some(fd)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Sends a signal (pidfd_send_signal, Linux 5.1); 0 only asks whether it could be sent.
///
/// # Errors
/// ESRCH when the process was reaped, EPERM, EINVAL.
pub fn send_signal(pidfd: impl AsFd, signal: i32) -> io::Result<()> {
    let fd = pidfd.as_fd().as_raw_fd();
    // SAFETY: a null siginfo asks the kernel to fill it in as kill(2) does.
    let rc = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, std::ptr::null::<libc::siginfo_t>(), 0)
    };
    Ok(Errno::result(rc).map(drop)?)
}

/// Kills the process group whose first process has this pid. To be called while that one cannot have been reaped: then the
/// number is not given to others.
pub fn kill_group(pid: u32) {
    if let Ok(pid @ 2..) = i32::try_from(pid) {
        // A group without a process.
        let _ = nix::sys::signal::killpg(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
    }
}

/// How the process ended (PIDFD_GET_INFO, Linux 6.15), also when it was not our child. `None` before it was reaped by
/// its parent, and on older kernels.
#[must_use]
pub fn exit_status(pidfd: impl AsFd) -> Option<WaitStatus> {
    let mut info = PidfdInfo { mask: INFO_EXIT, ..PidfdInfo::default() };
    // SAFETY: the number of the request says how long `info` is, and that much is valid for reading and writing.
    unsafe { pidfd_get_info(pidfd.as_fd().as_raw_fd(), &raw mut info) }.ok()?;
    (info.mask & INFO_EXIT != 0).then(|| WaitStatus::from_raw(info.exit_code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_how_a_process_ended_that_is_reaped() {
        let mut child = std::process::Command::new("sh").args(["-c", "exit 7"]).spawn().unwrap();
        let fd = open(child.id()).unwrap();
        child.wait().unwrap();
        // Older kernels say nothing; none says anything wrong.
        let status = exit_status(&fd);
        assert!(status.is_none_or(|status| status.code() == Some(7)), "{status:?}");
        assert_eq!(exit_status(open(std::process::id()).unwrap()), None, "still there");
    }

    #[test]
    fn names_one_process_and_no_other() {
        let me = std::process::id();
        let ticks = child::start_ticks(me).unwrap();
        let fd = open_same(me, ticks).unwrap().unwrap();
        send_signal(&fd, 0).unwrap();
        assert!(open_same(me, ticks + 1).unwrap().is_none(), "same pid, other process");
        assert!(open_same(0x7fff_fff0, ticks).unwrap().is_none());

        let mut sleeper = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let fd = open(sleeper.id()).unwrap();
        send_signal(&fd, libc::SIGKILL).unwrap();
        sleeper.wait().unwrap();
        assert_eq!(send_signal(&fd, 0).unwrap_err().raw_os_error(), Some(libc::ESRCH));
    }
}
