//! Children of this process: how they ended, and reaping them with or without leaving the zombie.
//!
//! Also the identity that survives pid reuse: pid plus start ticks.

use std::fmt;
use std::io;

use nix::errno::Errno;

/// How a process ended, as wait(2) encodes it: code and signal are never mixed up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WaitStatus(i32);

impl WaitStatus {
    /// The process has ended, and how is not known: neither a code nor a signal.
    pub const UNKNOWN: Self = Self(0x7f);

    /// The status with this raw encoding (`wstatus` of wait(2), last field of `/proc/PID/stat`).
    #[must_use]
    pub const fn from_raw(raw: i32) -> Self {
        Self(raw)
    }

    /// The raw encoding.
    #[must_use]
    pub const fn raw(self) -> i32 {
        self.0
    }

    /// The exit code, when it ended by itself.
    #[must_use]
    pub const fn code(self) -> Option<i32> {
        if self.0 & 0x7f == 0 { Some((self.0 >> 8) & 0xff) } else { None }
    }

    /// The number of the signal that ended it.
    #[must_use]
    pub const fn signal(self) -> Option<i32> {
        match self.0 & 0x7f {
            0 | 0x7f => None,
            signal => Some(signal),
        }
    }

    /// Whether the kernel wrote a core image.
    #[must_use]
    pub const fn core_dumped(self) -> bool {
        self.signal().is_some() && self.0 & 0x80 != 0
    }
}

impl fmt::Display for WaitStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.code(), self.signal()) {
            (Some(code), _) => write!(f, "exit code {code}"),
            (None, Some(signal)) => write!(f, "signal {signal}"),
            (None, None) => write!(f, "wait status {:#x}", self.0),
        }
    }
}

/// What becomes of a child that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zombie {
    /// It stays (WNOWAIT): its pid and group id cannot be used again.
    Keep,
    /// It is reaped and its pid is free.
    Reap,
}

/// The exit of the child `pid`, if it has ended; never blocks.
///
/// # Errors
/// ECHILD when `pid` is no child of ours. See waitid(2).
pub fn exited(pid: u32, zombie: Zombie) -> io::Result<Option<WaitStatus>> {
    Ok(wait(libc::P_PID, pid, zombie)?.map(|(_, status)| status))
}

/// Any child that has ended, and how; never blocks. With [`Zombie::Keep`] the same one is returned again and again.
///
/// # Errors
/// See waitid(2). Having no child at all is `None`.
pub fn any_exited(zombie: Zombie) -> io::Result<Option<(u32, WaitStatus)>> {
    match wait(libc::P_ALL, 0, zombie) {
        Err(error) if error.raw_os_error() == Some(libc::ECHILD) => Ok(None),
        other => other,
    }
}

fn wait(kind: libc::idtype_t, id: u32, zombie: Zombie) -> io::Result<Option<(u32, WaitStatus)>> {
    let keep = if zombie == Zombie::Keep { libc::WNOWAIT } else { 0 };
    // SAFETY: siginfo_t is plain integers and pointers; all zeroes is a valid value.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: `info` is valid for writing during the call.
    let rc = unsafe { libc::waitid(kind, id, &raw mut info, libc::WEXITED | libc::WNOHANG | keep) };
    Errno::result(rc)?;
    // SAFETY: waitid fills the SIGCHLD part of the union, or leaves the zeroes from above.
    let pid = unsafe { info.si_pid() };
    // SAFETY: as above.
    let status = unsafe { info.si_status() };
    // WNOHANG without a child that has ended leaves the pid zero.
    let Ok(pid @ 1..) = u32::try_from(pid) else { return Ok(None) };
    let raw = match info.si_code {
        libc::CLD_EXITED => (status & 0xff) << 8,
        libc::CLD_DUMPED => status | 0x80,
        _ => status,
    };
    Ok(Some((pid, WaitStatus(raw))))
}

/// Orphaned descendants become children of this process (PR_SET_CHILD_SUBREAPER, Linux 3.4; kept over execve).
///
/// # Errors
/// See prctl(2).
pub fn become_subreaper() -> io::Result<()> {
    Ok(nix::sys::prctl::set_child_subreaper(true)?)
}

/// All children of this (single-threaded) process, zombies and adopted orphans included.
///
/// # Errors
/// NotFound on kernels without CONFIG_PROC_CHILDREN.
pub fn children() -> io::Result<Vec<u32>> {
    let text = std::fs::read_to_string("/proc/thread-self/children")?;
    Ok(text.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).collect())
}

/// When the process started, in clock ticks since boot (field 22 of `/proc/PID/stat`). Pid and start ticks together
/// name one process of this boot. Zombies still have it.
///
/// # Errors
/// NotFound when there is no such process.
pub fn start_ticks(pid: u32) -> io::Result<u64> {
    let path = format!("/proc/{pid}/stat");
    let stat = std::fs::read(&path).map_err(|error| match error.raw_os_error() {
        // The process was reaped between open and read.
        Some(libc::ESRCH) => io::ErrorKind::NotFound.into(),
        _ => error,
    })?;
    parse_start_ticks(&stat)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("cannot parse {path}")))
}

/// The second field is the name in parentheses and may itself hold parentheses and spaces, so counting starts after
/// the last one.
fn parse_start_ticks(stat: &[u8]) -> Option<u64> {
    fields(stat)?.nth(19)?.parse().ok()
}

/// The fields from the third on.
fn fields(stat: &[u8]) -> Option<impl Iterator<Item = &str>> {
    let end = stat.iter().rposition(|&byte| byte == b')')?;
    Some(std::str::from_utf8(stat.get(end + 1..)?).ok()?.split_ascii_whitespace())
}

/// How a process that is no child of ours ended, as long as its parent has not reaped it (the last field of
/// `/proc/PID/stat`). `None` when it still runs, is gone, or has started at another time.
#[must_use]
pub fn status_of_zombie(pid: u32, start_ticks: u64) -> Option<WaitStatus> {
    parse_zombie(&std::fs::read(format!("/proc/{pid}/stat")).ok()?, start_ticks)
}

fn parse_zombie(stat: &[u8], start_ticks: u64) -> Option<WaitStatus> {
    let fields: Vec<&str> = fields(stat)?.collect();
    let same = fields.get(19)?.parse() == Ok(start_ticks);
    // The 52nd field, the 50th from the state on (Linux 3.5).
    let status = fields.get(49)?.parse().ok()?;
    (same && matches!(*fields.first()?, "Z" | "X")).then_some(WaitStatus(status))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wait_statuses_keep_code_and_signal_apart() {
        for (raw, code, signal, core) in [
            (0, Some(0), None, false),
            (1792, Some(7), None, false),
            (9, None, Some(9), false),
            (139, None, Some(11), true),
        ] {
            let status = WaitStatus::from_raw(raw);
            assert_eq!((status.code(), status.signal(), status.core_dumped()), (code, signal, core), "{raw}");
        }
    }

    #[test]
    fn a_zombie_tells_how_it_ended_to_everybody() {
        let mut child = std::process::Command::new("sh").args(["-c", "exit 7"]).spawn().unwrap();
        let ticks = start_ticks(child.id()).unwrap();
        let ended = crate::sys::pidfd::open(child.id()).unwrap();
        let interest = crate::sys::poll::Interest::Read;
        crate::sys::poll::wait(&[(std::os::fd::AsFd::as_fd(&ended), interest)], None).unwrap();
        let status = status_of_zombie(child.id(), ticks);
        assert_eq!(status.and_then(WaitStatus::code), Some(7));
        assert_eq!(status_of_zombie(child.id(), ticks + 1), None, "another process of this pid");
        child.wait().unwrap();
        assert_eq!(status_of_zombie(child.id(), ticks), None);
        assert_eq!(status_of_zombie(std::process::id(), start_ticks(std::process::id()).unwrap()), None);
        assert_eq!((WaitStatus::UNKNOWN.code(), WaitStatus::UNKNOWN.signal()), (None, None));
    }

    #[test]
    fn start_ticks_survive_names_made_to_confuse() {
        let stat = b"42 (a) S (b) 1) S 1 42 42 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 98765 1 2 3";
        assert_eq!(parse_start_ticks(stat), Some(98765));
        assert_eq!(parse_start_ticks(b"42 (a"), None);
        assert_eq!(parse_start_ticks(b"42 (a) S 1"), None);
        assert!(start_ticks(std::process::id()).unwrap() > 0);
        assert_eq!(start_ticks(0x7fff_fff0).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
