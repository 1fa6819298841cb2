//! What the kernel is told about an app's processes before its program starts: who they are and what they may use.
//!
//! Names are as in the config file. Nothing here knows what this machine can enforce.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// Who an app's processes are and what they may use. The default is: as the daemon was started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProcessRules {
    /// A user by name or number, looked up anew at each spawn.
    pub user: Option<String>,
    /// The primary group by name or number; `None`: the user's.
    pub group: Option<String>,
    /// The file mode creation mask, umask(2).
    pub umask: Option<u32>,
    /// From -20 (most of the CPU) to 19, nice(2).
    pub nice: Option<i32>,
    /// The order at the disk, `ioprio_set(2)`.
    pub ionice: Option<IoPriority>,
    /// The CPUs that may be used, ascending; empty: all.
    pub cpu_affinity: Vec<u32>,
    /// Programs gain no rights by exec, `PR_SET_NO_NEW_PRIVS`.
    pub no_new_privs: bool,
    /// Capabilities that a process has without being root, capabilities(7); ascending.
    pub ambient_capabilities: Vec<Capability>,
    /// What an instance and all its offspring may use together.
    pub limits: GroupLimits,
    /// What each process may use, setrlimit(2).
    pub rlimits: BTreeMap<Rlimit, RlimitRange>,
}

impl ProcessRules {
    /// Whether processes are somebody else than the daemon may be.
    #[must_use]
    pub const fn changes_user(&self) -> bool {
        self.user.is_some() || self.group.is_some()
    }
}

/// Limits of a whole instance, all its processes together: what only a control group can enforce.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GroupLimits {
    /// Beyond this many bytes the kernel kills.
    pub memory_max: Option<u64>,
    /// Beyond this many bytes the kernel slows down and reclaims.
    pub memory_high: Option<u64>,
    /// CPU time in percent of one CPU.
    pub cpu_max: Option<u32>,
    /// How many processes and threads.
    pub pids_max: Option<u32>,
    /// When memory runs out, all processes of the instance are killed and not only the largest. `None`: yes with
    /// `memory_max`.
    pub oom_group: Option<bool>,
    /// An instance does not start where one of these cannot be enforced.
    pub required: bool,
}

impl GroupLimits {
    /// The limits that are set: the key, its value for people, and the controller of the kernel that enforces it.
    #[must_use]
    pub fn set(&self) -> Vec<(&'static str, String, Controller)> {
        let mut set = Vec::new();
        let mut add = |key, value: Option<String>, controller| {
            set.extend(value.map(|value| (key, value, controller)));
        };
        add("memory_max", self.memory_max.map(size), Controller::Memory);
        add("memory_high", self.memory_high.map(size), Controller::Memory);
        add("cpu_max", self.cpu_max.map(|percent| format!("{percent}%")), Controller::Cpu);
        add("pids_max", self.pids_max.map(|count| count.to_string()), Controller::Pids);
        add("oom_group", self.oom_group.map(|on| on.to_string()), Controller::Memory);
        set
    }

    /// Whether any is set.
    #[must_use]
    pub fn any(&self) -> bool {
        *self != Self { required: self.required, ..Self::default() }
    }

    /// Whether all processes are killed together when memory runs out.
    #[must_use]
    pub fn kills_together(&self) -> bool {
        self.oom_group.unwrap_or(self.memory_max.is_some())
    }
}

/// A part of the kernel that limits control groups (cgroups(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Controller {
    /// `memory.max`, `memory.high`, `memory.oom.group`.
    Memory,
    /// `cpu.max`.
    Cpu,
    /// `pids.max`.
    Pids,
}

impl Controller {
    /// All that we use.
    pub const ALL: [Self; 3] = [Self::Memory, Self::Cpu, Self::Pids];

    /// Its name in `cgroup.controllers`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Cpu => "cpu",
            Self::Pids => "pids",
        }
    }
}

impl fmt::Display for Controller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Bytes in the largest unit that leaves no rest, as config files write it.
#[must_use]
pub fn size(bytes: u64) -> String {
    for (unit, shift) in [("G", 30), ("M", 20), ("K", 10)] {
        if bytes >= 1 << shift && bytes.is_multiple_of(1 << shift) {
            return format!("{}{unit}", bytes >> shift);
        }
    }
    bytes.to_string()
}

/// Bytes as they are measured, with a decimal: `214.3M`.
#[must_use]
pub fn rounded_size(bytes: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "one decimal is shown")]
    let mut amount = bytes as f64 / 1024.0;
    for unit in ["K", "M"] {
        // 1023.95 would print as 1024.0 of the smaller unit.
        if amount < 1023.95 {
            return format!("{amount:.1}{unit}");
        }
        amount /= 1024.0;
    }
    format!("{amount:.1}G")
}

/// The order in which processes reach the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum IoPriority {
    /// Before everybody else; 0 (first) to 7.
    Realtime(u8),
    /// As everybody; 0 (first) to 7, 4 unless set.
    BestEffort(u8),
    /// Only when nobody else wants it.
    Idle,
}

impl IoPriority {
    /// The number that the kernel takes: class and level.
    #[must_use]
    pub const fn number(self) -> u16 {
        const CLASS_SHIFT: u16 = 13;
        match self {
            Self::Realtime(level) => 1 << CLASS_SHIFT | level as u16,
            Self::BestEffort(level) => 2 << CLASS_SHIFT | level as u16,
            Self::Idle => 3 << CLASS_SHIFT,
        }
    }
}

impl fmt::Display for IoPriority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Realtime(level) => write!(f, "realtime:{level}"),
            Self::BestEffort(level) => write!(f, "best-effort:{level}"),
            Self::Idle => f.write_str("idle"),
        }
    }
}

/// A text that is no order at the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "expected \"idle\", \"best-effort\" or \"realtime\", with \":0\" (first) to \":7\" behind the last two"
)]
pub struct BadIoPriority;

impl std::str::FromStr for IoPriority {
    type Err = BadIoPriority;

    fn from_str(text: &str) -> Result<Self, BadIoPriority> {
        let (class, level) = match text.split_once(':') {
            Some((class, level)) => {
                let level = level.parse().ok().filter(|level| *level <= 7);
                (class, Some(level.ok_or(BadIoPriority)?))
            }
            None => (text, None),
        };
        match (class, level) {
            ("idle", None) => Ok(Self::Idle),
            ("best-effort", level) => Ok(Self::BestEffort(level.unwrap_or(4))),
            ("realtime", level) => Ok(Self::Realtime(level.unwrap_or(4))),
            _ => Err(BadIoPriority),
        }
    }
}

/// CPUs as people write them: `0-3,6`.
#[must_use]
pub fn cpu_list(cpus: &[u32]) -> String {
    let mut parts: Vec<String> = Vec::new();
    let mut rest = cpus;
    while let [first, ..] = rest {
        let run = rest.iter().zip(*first..).take_while(|(cpu, expected)| **cpu == *expected).count();
        parts.push(if run > 1 { format!("{first}-{}", rest[run - 1]) } else { first.to_string() });
        rest = &rest[run..];
    }
    parts.join(",")
}

/// A text that is no list of CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected CPUs such as \"0-3,6\", each from 0 to {CPU_LAST}")]
pub struct BadCpuList;

/// The last CPU that a list can name: the kernel's largest configuration has 8,192.
pub const CPU_LAST: u32 = 8191;

/// Reads `0-3,6`; ascending, each once.
///
/// # Errors
/// It is no such list, or is empty.
pub fn read_cpu_list(text: &str) -> Result<Vec<u32>, BadCpuList> {
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let number =
            |text: &str| text.trim().parse::<u32>().ok().filter(|cpu| *cpu <= CPU_LAST).ok_or(BadCpuList);
        let (first, last) = match part.split_once('-') {
            Some((first, last)) => (number(first)?, number(last)?),
            None => (number(part)?, number(part)?),
        };
        if first > last {
            return Err(BadCpuList);
        }
        cpus.extend(first..=last);
    }
    cpus.sort_unstable();
    cpus.dedup();
    Ok(cpus)
}

/// A limit that each process has on its own (setrlimit(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[expect(missing_docs, reason = "each is the RLIMIT_ of its name")]
pub enum Rlimit {
    Nofile,
    Nproc,
    Core,
    Stack,
    Memlock,
    Fsize,
    Data,
    As,
    Cpu,
    Msgqueue,
    Sigpending,
    Rtprio,
}

/// What a limit counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Things.
    Count,
    /// Bytes.
    Bytes,
    /// Seconds.
    Seconds,
}

impl Rlimit {
    /// Every limit with its key and what it counts, in the order of the documentation.
    pub const NAMES: &'static [(&'static str, Self, Unit)] = &[
        ("nofile", Self::Nofile, Unit::Count),
        ("nproc", Self::Nproc, Unit::Count),
        ("core", Self::Core, Unit::Bytes),
        ("stack", Self::Stack, Unit::Bytes),
        ("memlock", Self::Memlock, Unit::Bytes),
        ("fsize", Self::Fsize, Unit::Bytes),
        ("data", Self::Data, Unit::Bytes),
        ("as", Self::As, Unit::Bytes),
        ("cpu", Self::Cpu, Unit::Seconds),
        ("msgqueue", Self::Msgqueue, Unit::Bytes),
        ("sigpending", Self::Sigpending, Unit::Count),
        ("rtprio", Self::Rtprio, Unit::Count),
    ];

    /// Its key.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        Self::NAMES.iter().find(|(_, known, _)| *known == self).map_or("", |(name, ..)| name)
    }

    /// What it counts.
    #[must_use]
    pub fn unit(self) -> Unit {
        Self::NAMES.iter().find(|(_, known, _)| *known == self).map_or(Unit::Count, |(_, _, unit)| *unit)
    }
}

/// How far a limit goes; [`RlimitRange::UNLIMITED`] is no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RlimitRange {
    /// What the kernel enforces.
    pub soft: u64,
    /// How far the process itself may raise that.
    pub hard: u64,
}

impl RlimitRange {
    /// No limit, as the kernel writes it.
    pub const UNLIMITED: u64 = u64::MAX;

    /// As config files write it.
    #[must_use]
    pub fn show(self, unit: Unit) -> String {
        let one = |value: u64| match (value, unit) {
            (Self::UNLIMITED, _) => "unlimited".to_owned(),
            (bytes, Unit::Bytes) => size(bytes),
            (seconds, Unit::Seconds) => format!("{seconds}s"),
            (count, Unit::Count) => count.to_string(),
        };
        if self.soft == self.hard { one(self.soft) } else { format!("{}:{}", one(self.soft), one(self.hard)) }
    }
}

/// A right that root has and others may be given (capabilities(7)), by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Capability(u8);

/// The names of capabilities in the order of their numbers, up to Linux 5.9.
const CAPABILITIES: [&str; 41] = [
    "chown",
    "dac_override",
    "dac_read_search",
    "fowner",
    "fsetid",
    "kill",
    "setgid",
    "setuid",
    "setpcap",
    "linux_immutable",
    "net_bind_service",
    "net_broadcast",
    "net_admin",
    "net_raw",
    "ipc_lock",
    "ipc_owner",
    "sys_module",
    "sys_rawio",
    "sys_chroot",
    "sys_ptrace",
    "sys_pacct",
    "sys_admin",
    "sys_boot",
    "sys_nice",
    "sys_resource",
    "sys_time",
    "sys_tty_config",
    "mknod",
    "lease",
    "audit_write",
    "audit_control",
    "setfcap",
    "mac_override",
    "mac_admin",
    "syslog",
    "wake_alarm",
    "block_suspend",
    "audit_read",
    "perfmon",
    "bpf",
    "checkpoint_restore",
];

impl Capability {
    /// The capability of this name, with or without `CAP_`, in any case.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        let name = name.to_ascii_lowercase();
        let name = name.strip_prefix("cap_").unwrap_or(&name);
        let number = CAPABILITIES.iter().position(|known| *known == name)?;
        u8::try_from(number).ok().map(Self)
    }

    /// Every name.
    pub fn names() -> impl Iterator<Item = &'static str> {
        CAPABILITIES.into_iter()
    }

    /// Its bit in the kernel's masks.
    #[must_use]
    pub const fn bit(self) -> u64 {
        1 << self.0
    }
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(CAPABILITIES.get(usize::from(self.0)).copied().unwrap_or("unknown"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cpus_are_read_as_they_are_written() {
        for text in ["0", "0-3", "0-3,6", "1,3,5-6"] {
            assert_eq!(cpu_list(&read_cpu_list(text).unwrap()), text);
        }
        assert_eq!(read_cpu_list("3,1-2, 2"), Ok(vec![1, 2, 3]));
        for text in ["", "a", "3-1", "-1", "1,,2", "99999", "0-99999"] {
            assert_eq!(read_cpu_list(text), Err(BadCpuList), "{text}");
        }
    }

    #[test]
    fn orders_at_the_disk() {
        for priority in [IoPriority::Idle, IoPriority::BestEffort(0), IoPriority::Realtime(7)] {
            assert_eq!(priority.to_string().parse(), Ok(priority));
        }
        assert_eq!("best-effort".parse(), Ok(IoPriority::BestEffort(4)));
        for text in ["", "idle:1", "best-effort:8", "realtime:", "fast"] {
            assert_eq!(text.parse::<IoPriority>(), Err(BadIoPriority), "{text}");
        }
        assert_eq!(IoPriority::BestEffort(4).number(), 0x4004);
        assert_eq!(IoPriority::Idle.number(), 0x6000);
    }

    #[test]
    fn capabilities_have_the_numbers_of_the_kernel() {
        for (name, bit) in [("CAP_NET_BIND_SERVICE", 10), ("sys_admin", 21), ("cap_checkpoint_restore", 40)] {
            assert_eq!(Capability::from_name(name).map(Capability::bit), Some(1 << bit), "{name}");
        }
        assert_eq!(Capability::from_name("net_bind"), None);
        assert_eq!(Capability::from_name("Kill").unwrap().to_string(), "kill");
    }

    #[test]
    fn limits_are_shown_in_their_units() {
        let range = |soft, hard| RlimitRange { soft, hard };
        assert_eq!(range(1024, 4096).show(Unit::Count), "1024:4096");
        assert_eq!(range(1 << 20, u64::MAX).show(Unit::Bytes), "1M:unlimited");
        assert_eq!(range(60, 60).show(Unit::Seconds), "60s");
        assert_eq!([size(0), size(1000), size(3 << 30)], ["0", "1000", "3G"]);
        let limits = GroupLimits { required: true, ..GroupLimits::default() };
        assert!(!limits.any() && limits.set().is_empty());
        let limits = GroupLimits { memory_max: Some(1), ..limits };
        assert!(limits.any() && limits.kills_together());
    }
}
