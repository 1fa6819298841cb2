//! The whole machine: CPU, load, memory.

use std::fs;
use std::io;
use std::time::Duration;

use nix::unistd::{SysconfVar, sysconf};

use crate::model::moment::Moment;
use crate::sys::{cpus, procfs};

/// CPU use is told over at least this time, so that two quick looks do not show a single tick.
const WINDOW: Duration = Duration::from_secs(1);

/// What the machine uses.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct HostUsage {
    /// Of all cores together, 0 to 100.
    pub cpu_percent: f64,
    /// Load averages over 1, 5 and 15 minutes.
    pub load: [f64; 3],
    /// Bytes that are not available to new programs: total less MemAvailable.
    pub memory_used: u64,
    /// Bytes of main memory.
    pub memory_total: u64,
    /// Since boot.
    pub uptime: Duration,
    /// Cores that are online.
    pub cpus: usize,
}

/// Looks at the machine. Make it when the daemon starts, so that the first answer has something to compare with, and
/// call it along with the background sampling: the CPU figure is that since the last call or two.
#[derive(Clone, Copy, Debug)]
pub struct HostSampler {
    older: CpuTimes,
    newer: CpuTimes,
    newer_taken: Moment,
}

/// The `cpu` line of /proc/stat, in clock ticks over all cores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct CpuTimes {
    busy: u64,
    idle: u64,
}

impl HostSampler {
    /// Takes the base line.
    ///
    /// # Errors
    /// /proc cannot be read.
    pub fn new(now: Moment) -> io::Result<Self> {
        let times = cpu_times()?;
        Ok(Self { older: times, newer: times, newer_taken: now })
    }

    /// The present state.
    ///
    /// # Errors
    /// /proc cannot be read.
    pub fn sample(&mut self, now: Moment) -> io::Result<HostUsage> {
        let times = cpu_times()?;
        let cpu_percent = times.percent_since(self.older).unwrap_or(0.0);
        if now.since(self.newer_taken) >= WINDOW {
            self.older = self.newer;
            self.newer = times;
            self.newer_taken = now;
        }
        let (memory_used, memory_total) = memory()?;
        Ok(HostUsage {
            cpu_percent,
            load: load()?,
            memory_used,
            memory_total,
            uptime: procfs::since_boot(),
            cpus: online_cpus(),
        })
    }
}

/// How many processes can run at once: what the affinity mask and the cgroup's CPU quota leave; at least 1. This is
/// what `instances = "max"` means.
#[must_use]
pub fn available_cpus() -> usize {
    cpus::available()
}

/// Cores that are online, whoever may use them.
#[must_use]
pub fn online_cpus() -> usize {
    sysconf(SysconfVar::_NPROCESSORS_ONLN)
        .ok()
        .flatten()
        .and_then(|count| usize::try_from(count).ok())
        .filter(|&count| count > 0)
        .unwrap_or_else(available_cpus)
}

impl CpuTimes {
    fn parse(line: &str) -> Option<Self> {
        // user nice system idle iowait irq softirq steal; guests are part of user and nice.
        let fields: Vec<u64> =
            line.strip_prefix("cpu ")?.split_whitespace().take(8).map_while(|f| f.parse().ok()).collect();
        let idle = fields.get(3)? + fields.get(4).unwrap_or(&0);
        Some(Self { busy: fields.iter().sum::<u64>() - idle, idle })
    }

    /// `None` when not a tick has passed.
    #[expect(clippy::cast_precision_loss, reason = "2^53 ticks are three million years")]
    fn percent_since(self, earlier: Self) -> Option<f64> {
        // iowait may run backwards (proc(5)).
        let (busy, idle) = (self.busy.saturating_sub(earlier.busy), self.idle.saturating_sub(earlier.idle));
        (busy + idle > 0).then(|| busy as f64 / (busy + idle) as f64 * 100.0)
    }
}

fn cpu_times() -> io::Result<CpuTimes> {
    let text = fs::read_to_string("/proc/stat")?;
    text.lines().next().and_then(CpuTimes::parse).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn load() -> io::Result<[f64; 3]> {
    let text = fs::read_to_string("/proc/loadavg")?;
    let mut numbers = text.split_whitespace().map_while(|word| word.parse().ok());
    Ok(std::array::from_fn(|_| numbers.next().unwrap_or(0.0)))
}

fn memory() -> io::Result<(u64, u64)> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let bytes = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
        Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
    };
    let total = bytes("MemTotal").unwrap_or(0);
    Ok((total.saturating_sub(bytes("MemAvailable").unwrap_or(total)), total))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percent_counts_waiting_as_idle() {
        let one = CpuTimes::parse("cpu  100 0 50 800 50 0 0 0 0 0").unwrap();
        assert_eq!(one, CpuTimes { busy: 150, idle: 850 });
        let two = CpuTimes::parse("cpu  130 0 60 840 70 0 0 0 25 0").unwrap();
        assert_eq!(two.percent_since(one), Some(40.0));
        assert_eq!(one.percent_since(one), None);
        assert_eq!(CpuTimes::parse("cpu0 1 2 3 4"), None);
    }

    #[test]
    fn this_machine_has_plausible_numbers() {
        let mut sampler = HostSampler::new(Moment::default()).unwrap();
        for second in 0..5 {
            let usage = sampler.sample(Moment::default() + Duration::from_secs(second)).unwrap();
            assert!((0.0..=100.0).contains(&usage.cpu_percent), "{usage:?}");
            assert!(usage.memory_used > 0 && usage.memory_used < usage.memory_total, "{usage:?}");
            assert!(usage.cpus >= available_cpus() && usage.uptime > Duration::from_secs(1), "{usage:?}");
        }
    }
}
