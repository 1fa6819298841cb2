//! Whether a process does anything: what tells one that hangs from one that is slow.

use std::fs;
use std::io;

/// What a process is seen to do at an instant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Activity {
    /// A thread runs, waits for a processor or for a disk.
    pub busy: bool,
    /// The time that its threads have had on processors, nanoseconds.
    pub ran: u64,
}

impl Activity {
    /// What this process does.
    ///
    /// # Errors
    /// It is gone, or the kernel keeps no account (CONFIG_SCHED_INFO).
    pub fn of(pid: u32) -> io::Result<Self> {
        let mut activity = Self::default();
        for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
            let thread = entry?.path();
            let stat = fs::read_to_string(thread.join("stat"))?;
            // The name may contain anything, parentheses too.
            let state = stat.rsplit(')').next().and_then(|rest| rest.trim_start().chars().next());
            activity.busy |= matches!(state, Some('R' | 'D'));
            let account = fs::read_to_string(thread.join("schedstat"))?;
            let ran = account.split_whitespace().next().and_then(|ran| ran.parse::<u64>().ok());
            activity.ran = activity.ran.wrapping_add(ran.ok_or(io::ErrorKind::InvalidData)?);
        }
        Ok(activity)
    }

    /// Whether it has done anything since it was seen like this, or does now.
    #[must_use]
    pub const fn stirs_since(self, before: Self) -> bool {
        self.busy || self.ran != before.ran
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};
    use std::time::{Duration, Instant};

    use super::*;

    fn sh(script: &str) -> Child {
        Command::new("sh").args(["-c", script]).spawn().unwrap()
    }

    fn eventually(mut holds: impl FnMut() -> bool) -> bool {
        let until = Instant::now() + Duration::from_secs(30);
        while Instant::now() < until {
            if holds() {
                return true;
            }
            std::thread::yield_now();
        }
        false
    }

    #[test]
    fn one_that_sleeps_does_nothing_and_one_that_computes_does() {
        let (mut sleeps, mut computes) = (sh("exec sleep 60"), sh("while :; do :; done"));
        let quiet = |pid| {
            let before = Activity::of(pid).unwrap();
            std::thread::park_timeout(Duration::from_millis(100));
            !Activity::of(pid).unwrap().stirs_since(before)
        };
        assert!(eventually(|| quiet(sleeps.id())));
        assert!(!quiet(computes.id()));
        for child in [&mut sleeps, &mut computes] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert!(Activity::of(sleeps.id()).is_err(), "it is gone");
    }
}
