//! Whether the kernel has killed a process for lack of memory, where no control group of its own counts that.
//!
//! The kernel counts such kills for the whole machine, and names each in its log. The log is read only when a process
//! was killed by nobody we know and the count is not zero; where it may not be read (dmesg_restrict, another pid
//! namespace) the end is told as the signal it was.

use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::time::Duration;

use super::clock;

/// The longest record of the kernel's log (`CONSOLE_EXT_LOG_MAX`), in bytes.
const RECORD_MAX: usize = 8192;

/// More records than this a log does not hold.
const RECORDS_MAX: usize = 100_000;

/// How old a record may be: the end of a process is noticed at once, or by the next supervisor.
const RECENT: Duration = Duration::from_secs(60);

/// Whether the kernel says that it has killed this process, which has ended by SIGKILL and is not reaped yet, so that its
/// pid is not another's.
#[must_use]
pub fn took(pid: u32) -> bool {
    kills_ever() > 0 && is_named(pid)
}

fn kills_ever() -> u64 {
    let text = fs::read_to_string("/proc/vmstat").unwrap_or_default();
    let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
    count.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
}

fn is_named(pid: u32) -> bool {
    let flags = libc::O_NONBLOCK;
    let Ok(mut log) = OpenOptions::new().read(true).custom_flags(flags).open("/dev/kmsg") else {
        return false;
    };
    let since = clock::now().nanos().saturating_sub(u64::try_from(RECENT.as_nanos()).unwrap_or(0)) / 1000;
    let mut record = vec![0; RECORD_MAX];
    for _ in 0..RECORDS_MAX {
        match log.read(&mut record) {
            Ok(len) if names(&String::from_utf8_lossy(&record[..len]), pid, since) => return true,
            Ok(_) => {}
            // EPIPE: records were overwritten before they were read; the next ones follow.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
            Err(_) => return false,
        }
    }
    false
}

/// Whether a record (`priority,number,microseconds,flags;text`) that is not older says that this process was killed.
fn names(record: &str, pid: u32, since: u64) -> bool {
    let Some((head, text)) = record.split_once(';') else { return false };
    let at = head.split(',').nth(2).and_then(|at| at.parse::<u64>().ok());
    // "Out of memory: Killed process 12 (node) …", "Memory cgroup out of memory: Killed process 12 (node) …", and with
    // memory.oom.group "Killed process 12 (node) …" too.
    let killed = text.split("Killed process ").nth(1).and_then(|rest| rest.split(' ').next());
    at.is_some_and(|at| at >= since) && killed.is_some_and(|killed| killed == pid.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_the_kernel_name_a_process() {
        let record = "3,1234,5000000,-;Memory cgroup out of memory: Killed process 4711 (node) total-vm:1kB, anon-rss:2kB\n";
        assert!(names(record, 4711, 4_000_000));
        assert!(!names(record, 471, 4_000_000) && !names(record, 4711, 6_000_000));
        assert!(!names("6,1,5000000,-;eth0: link up 4711\n", 4711, 0) && !names("", 1, 0));
    }
}
