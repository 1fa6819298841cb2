//! Resource limits and oom_score_adj: ours, and those we were started with.

use std::io;
use std::os::fd::{AsFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::fdpass::own;
use crate::model::process::{Rlimit, RlimitRange};

/// One resource limit for setrlimit(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// RLIMIT_… number.
    pub resource: u32,
    /// What the kernel enforces; `u64::MAX` is no limit.
    pub soft: u64,
    /// How far the process itself may raise the soft limit.
    pub hard: u64,
}

impl Limit {
    /// A configured limit as setrlimit(2) takes it.
    #[must_use]
    pub const fn of(limit: Rlimit, range: RlimitRange) -> Self {
        let resource = match limit {
            Rlimit::Nofile => libc::RLIMIT_NOFILE,
            Rlimit::Nproc => libc::RLIMIT_NPROC,
            Rlimit::Core => libc::RLIMIT_CORE,
            Rlimit::Stack => libc::RLIMIT_STACK,
            Rlimit::Memlock => libc::RLIMIT_MEMLOCK,
            Rlimit::Fsize => libc::RLIMIT_FSIZE,
            Rlimit::Data => libc::RLIMIT_DATA,
            Rlimit::As => libc::RLIMIT_AS,
            Rlimit::Cpu => libc::RLIMIT_CPU,
            Rlimit::Msgqueue => libc::RLIMIT_MSGQUEUE,
            Rlimit::Sigpending => libc::RLIMIT_SIGPENDING,
            Rlimit::Rtprio => libc::RLIMIT_RTPRIO,
        };
        Self { resource, soft: range.soft, hard: range.hard }
    }
}

/// The limit on open descriptors of this process.
///
/// # Errors
/// See getrlimit(2).
pub fn open_files() -> io::Result<Limit> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(Limit { resource: libc::RLIMIT_NOFILE, soft, hard })
}

/// Raises the limit on open descriptors to the hard limit and returns the limit as it was before.
///
/// # Errors
/// See setrlimit(2).
pub fn raise_open_files() -> io::Result<Limit> {
    let before = open_files()?;
    setrlimit(Resource::RLIMIT_NOFILE, before.hard, before.hard)?;
    Ok(before)
}

/// Makes the kernel's table of this process's descriptors that long, as far as the limit allows; it never gets shorter.
/// For as long as there is one thread that costs nothing. With several, whoever needs a descriptor beyond the table's end
/// waits for an RCU grace period while it grows (`expand_fdtable`, Linux 6.18): 10 to 30 ms on a busy machine, and
/// accept(2) does so with the connection almost in its hand.
///
/// # Errors
/// ENOMEM.
pub fn lengthen_descriptor_table(any: impl AsFd, length: u64) -> io::Result<()> {
    let last = length.min(open_files()?.soft).saturating_sub(1);
    match fcntl(any, FcntlArg::F_DUPFD_CLOEXEC(RawFd::try_from(last).unwrap_or(RawFd::MAX))) {
        Ok(number) => own(number).map(drop),
        // The last number is taken: the table is that long.
        Err(Errno::EMFILE) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// How eagerly the out-of-memory killer picks this process: -1000 never, 1000 first.
///
/// # Errors
/// See proc(5).
pub fn oom_score_adj() -> io::Result<i32> {
    score("/proc/self/oom_score_adj")
}

/// The same of another process.
///
/// # Errors
/// See proc(5).
pub fn oom_score_adj_of(pid: u32) -> io::Result<i32> {
    score(&format!("/proc/{pid}/oom_score_adj"))
}

fn score(file: &str) -> io::Result<i32> {
    let text = std::fs::read_to_string(file)?;
    text.trim().parse().map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "oom_score_adj is no number"))
}

/// Sets [`oom_score_adj`]; children inherit it.
///
/// # Errors
/// EACCES when it is lowered without CAP_SYS_RESOURCE.
pub fn set_oom_score_adj(value: i32) -> io::Result<()> {
    std::fs::write("/proc/self/oom_score_adj", value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table_length() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("FDSize:")).unwrap();
        line.trim().parse().unwrap()
    }

    #[test]
    fn the_table_is_as_long_as_was_asked_for_and_nothing_stays_open() {
        let any = std::fs::File::open("/dev/null").unwrap();
        let length = table_length() * 2;
        assert!(open_files().unwrap().soft >= length);
        lengthen_descriptor_table(&any, length).unwrap();
        assert_eq!(table_length(), length);
        let last = format!("/proc/self/fd/{}", length - 1);
        assert!(std::fs::read_link(last).is_err());
    }
}
