//! `user`, `limits = {…}` and their kin: who an app's processes are and what they may use.

use std::collections::BTreeMap;
use std::time::Duration;

use super::app::AppConfig;
use super::error::{Place, Problem, quoted};
use super::units;
use super::value::Value;
use crate::model::process::{
    BadCpuList, CPU_LAST, Capability, GroupLimits, IoPriority, ProcessRules, Rlimit, RlimitRange, Unit,
    read_cpu_list,
};

/// The keys of `limits`.
pub const LIMIT_KEYS: [(&str, &str); 18] = [
    (
        "memory_max",
        "\"300M\": beyond it the kernel kills; exit reason `oom`. All processes of an instance together.",
    ),
    ("memory_high", "\"250M\": beyond it the kernel slows the instance down and reclaims."),
    ("cpu_max", "\"150%\" of one CPU, or a number of CPUs: 1.5."),
    ("pids_max", "How many processes and threads an instance may have."),
    ("oom_group", "Kill all processes of the instance when memory runs out; true with `memory_max`."),
    (
        "required",
        "Do not start where one of the keys above cannot be enforced; without it that is a warning.",
    ),
    ("nofile", "Open descriptors of each process: 4096, or \"1024:4096\" (soft:hard)."),
    ("nproc", "Processes of the user, all apps of that user together."),
    ("core", "Size of a core dump: 0, \"1G\" or \"unlimited\"."),
    ("stack", "Size of the stack."),
    ("memlock", "Locked memory."),
    ("fsize", "Size of a file that is written."),
    ("data", "Size of the heap."),
    ("as", "Size of the address space; Node and Go reserve far more than they use."),
    ("cpu", "CPU time of each process: \"60s\"; the kernel ends it then."),
    ("msgqueue", "Bytes in POSIX message queues."),
    ("sigpending", "Signals that wait."),
    ("rtprio", "The highest real-time priority."),
];

/// The largest `cpu_max`: as many CPUs as a kernel can have.
const CPU_MAX: f64 = 8192.0;

/// What `limits` says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Of the whole instance.
    pub group: GroupLimits,
    /// Of each process.
    pub each: BTreeMap<Rlimit, RlimitRange>,
}

/// Reads the table.
pub(super) fn read_limits(value: Value<'_, '_>) -> Result<Limits, Problem> {
    let Some(table) = value.table() else {
        return Err(value.problem("expected a table such as { memory_max = \"300M\", nofile = 4096 }"));
    };
    let mut limits = Limits::default();
    for (key, entry) in table {
        let entry = Value::new(entry);
        let name = &**key.get_ref();
        let group = &mut limits.group;
        match name {
            "memory_max" => group.memory_max = Some(memory(entry)?),
            "memory_high" => group.memory_high = Some(memory(entry)?),
            "cpu_max" => group.cpu_max = Some(cpu_share(entry)?),
            "pids_max" => group.pids_max = Some(entry.count(1..=4_194_304)?),
            "oom_group" => group.oom_group = Some(entry.boolean()?),
            "required" => group.required = entry.boolean()?,
            _ => {
                let Some((_, limit, unit)) = Rlimit::NAMES.iter().find(|(known, ..)| *known == name) else {
                    let known = LIMIT_KEYS.iter().map(|(key, _)| *key);
                    let list = known.clone().collect::<Vec<_>>().join(", ");
                    let message = format!("unknown key {} of `limits`; known are {list}", quoted(name));
                    return Err(Problem::new(Place::Text(key.span()), message).did_you_mean(name, known));
                };
                limits.each.insert(*limit, range(entry, *unit)?);
            }
        }
    }
    if let (Some(high), Some(max)) = (limits.group.memory_high, limits.group.memory_max)
        && high > max
    {
        return Err(value.problem("`memory_high` is above `memory_max`, which kills before it is reached"));
    }
    Ok(limits)
}

/// Less than this no program starts with: its own code does not fit.
const MEMORY_LEAST: u64 = 1 << 20;

/// Reads any size; what makes sense of it is [`memory_limit`]'s to say.
pub(super) fn read_size(value: Value<'_, '_>) -> Result<u64, Problem> {
    size(value, &value.text())
}

/// `max_memory_restart`, from a file or the command line; 0 is none.
pub(super) fn memory_limit(app: &AppConfig) -> Result<Option<u64>, Problem> {
    let Some(limit) = app.max_memory_restart.as_ref().filter(|limit| limit.value > 0) else {
        return Ok(None);
    };
    if limit.value < MEMORY_LEAST {
        let message = "this is out of range; allowed: 0 (none), and 1M or more";
        return Err(Problem::new(limit.place.clone(), message)
            .help("write \"300M\" or \"1.5G\"; a number alone counts bytes"));
    }
    if let Some(max) = app.limits.as_ref().and_then(|limits| limits.group.memory_max)
        && limit.value >= max
    {
        let message = "`max_memory_restart` is not below `limits.memory_max`, where the kernel kills";
        return Err(Problem::new(limit.place.clone(), message)
            .help("keep it well below, so that there is room and time for a successor"));
    }
    Ok(Some(limit.value))
}

fn memory(value: Value<'_, '_>) -> Result<u64, Problem> {
    let bytes = size(value, &value.text())?;
    if bytes < MEMORY_LEAST {
        return Err(value
            .problem("this is out of range; allowed: 1M or more")
            .help("write \"300M\" or \"1.5G\""));
    }
    Ok(bytes)
}

fn size(value: Value<'_, '_>, text: &str) -> Result<u64, Problem> {
    units::size(text).map_err(|error| value.problem(error.to_string()))
}

fn cpu_share(value: Value<'_, '_>) -> Result<u32, Problem> {
    let text = value.text();
    let number = |text: &str| text.trim().parse::<f64>().ok();
    let share = match text.strip_suffix('%') {
        Some(percent) => number(percent).map(|percent| percent / 100.0),
        None => number(&text),
    };
    // The kernel takes a thousandth of its period at least.
    match share {
        Some(share) if (0.01..=CPU_MAX).contains(&share) => {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "within the range")]
            let percent = (share * 100.0).round() as u32;
            Ok(percent)
        }
        Some(_) => Err(value.problem(format!("this is out of range; allowed: 1% to {CPU_MAX} CPUs"))),
        None => Err(value.problem("expected \"150%\" of one CPU, or a number of CPUs such as 1.5")),
    }
}

/// `4096`, `"unlimited"` or `"1024:4096"`.
fn range(value: Value<'_, '_>, unit: Unit) -> Result<RlimitRange, Problem> {
    let text = value.text();
    let one = |text: &str| one_limit(value, text.trim(), unit);
    let range = match text.split_once(':') {
        Some((soft, hard)) => RlimitRange { soft: one(soft)?, hard: one(hard)? },
        None => {
            let limit = one(&text)?;
            RlimitRange { soft: limit, hard: limit }
        }
    };
    if range.soft > range.hard {
        return Err(value.problem("the soft limit, which stands first, is above the hard one"));
    }
    Ok(range)
}

fn one_limit(value: Value<'_, '_>, text: &str, unit: Unit) -> Result<u64, Problem> {
    if matches!(text, "unlimited" | "infinity") {
        return Ok(RlimitRange::UNLIMITED);
    }
    let plain = text.parse::<u64>();
    match unit {
        Unit::Bytes => size(value, text),
        Unit::Seconds if plain.is_err() => {
            let span = units::duration(text).map_err(|error| value.problem(error.to_string()))?;
            if span < Duration::from_secs(1) {
                Err(value.problem("this counts whole seconds"))
            } else {
                Ok(span.as_secs())
            }
        }
        Unit::Seconds | Unit::Count => plain.map_err(|_| {
            value.problem(format!(
                "{} is no limit; write a number, \"unlimited\" or \"1024:4096\"",
                quoted(text)
            ))
        }),
    }
}

/// Whether a text can be the name or number of a user or group.
#[must_use]
pub fn is_account(text: &str) -> bool {
    let odd = |c: char| c.is_whitespace() || c.is_control() || ":,/".contains(c);
    !text.is_empty() && !text.starts_with('-') && !text.contains(odd)
}

/// A name, or a number as PM2 takes it.
pub(super) fn read_account(value: Value<'_, '_>) -> Result<String, Problem> {
    let text = if value.is_integer() { value.text() } else { value.filled()? };
    if !is_account(&text) {
        return Err(value.problem(format!("{} is neither a name nor a number", quoted(&text))));
    }
    if text.parse() == Ok(u32::MAX) {
        return Err(value.problem("4294967295 is nobody's number: the kernel reads it as \"no change\""));
    }
    Ok(text)
}

/// `"0027"`: a number would leave open whether it is octal.
pub(super) fn read_umask(value: Value<'_, '_>) -> Result<u32, Problem> {
    let Some(text) = value.as_str() else {
        return Err(value.problem("expected octal digits in quotes").help("write \"022\""));
    };
    u32::from_str_radix(text.trim_start_matches("0o"), 8)
        .ok()
        .filter(|mask| *mask <= 0o777)
        .ok_or_else(|| value.problem("expected octal digits from \"000\" to \"777\""))
}

pub(super) fn read_io_priority(value: Value<'_, '_>) -> Result<IoPriority, Problem> {
    value
        .string()?
        .parse()
        .map_err(|error: crate::model::process::BadIoPriority| value.problem(error.to_string()))
}

/// `"0-3,6"`, a number, or an array of both.
pub(super) fn read_cpus(value: Value<'_, '_>) -> Result<Vec<u32>, Problem> {
    let bad = |BadCpuList| {
        value.problem(format!("expected CPUs such as \"0-3,6\" or [0, 2], each from 0 to {CPU_LAST}"))
    };
    let parts: Vec<String> = value.items().into_iter().map(Value::text).collect();
    read_cpu_list(&parts.join(",")).map_err(bad)
}

pub(super) fn read_capabilities(value: Value<'_, '_>) -> Result<Vec<Capability>, Problem> {
    let mut capabilities = Vec::new();
    for item in value.items() {
        let name = item.filled()?;
        let capability = Capability::from_name(&name).ok_or_else(|| {
            let plain = name.to_ascii_lowercase();
            let plain = plain.strip_prefix("cap_").unwrap_or(&plain);
            item.problem(format!("{} is no capability (capabilities(7))", quoted(&name)))
                .did_you_mean(plain, Capability::names())
        })?;
        capabilities.push(capability);
    }
    capabilities.sort_unstable();
    capabilities.dedup();
    Ok(capabilities)
}

/// What an app's keys come to.
pub(super) fn rules(app: &AppConfig) -> ProcessRules {
    let limits = app.limits.clone().unwrap_or_default();
    ProcessRules {
        user: app.user.as_ref().map(|at| at.value.clone()),
        group: app.group.as_ref().map(|at| at.value.clone()),
        umask: app.umask,
        nice: app.nice,
        ionice: app.ionice,
        cpu_affinity: app.cpu_affinity.clone().unwrap_or_default(),
        no_new_privs: app.no_new_privs.unwrap_or(false),
        ambient_capabilities: app.ambient_capabilities.clone().unwrap_or_default(),
        limits: limits.group,
        rlimits: limits.each,
    }
}
