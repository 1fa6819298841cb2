//! Looking at processes through /proc, and ending by pid what a test started.

use std::collections::BTreeMap;
use std::fs;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// What `/proc/<pid>/stat` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stat {
    pub(crate) name: String,
    pub(crate) state: char,
    pub(crate) parent: i32,
    pub(crate) session: i32,
    /// User and system time, in clock ticks.
    pub(crate) cpu_ticks: u64,
    pub(crate) threads: u64,
    /// In clock ticks since boot: with the pid, it identifies a process.
    pub(crate) start_ticks: u64,
}

pub(crate) fn stat(pid: i32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name is in parentheses and may hold any character, also `)`.
    let (head, tail) = text.rsplit_once(") ")?;
    let fields: Vec<&str> = tail.split_ascii_whitespace().collect();
    let number = |index: usize| fields.get(index)?.parse::<u64>().ok();
    Some(Stat {
        name: head.split_once('(')?.1.to_owned(),
        state: fields.first()?.chars().next()?,
        parent: fields.get(1)?.parse().ok()?,
        session: fields.get(3)?.parse().ok()?,
        cpu_ticks: number(11)? + number(12)?,
        threads: number(17)?,
        start_ticks: number(19)?,
    })
}

/// Running or sleeping: there, and not a zombie.
pub(crate) fn alive(pid: i32) -> bool {
    stat(pid).is_some_and(|stat| !matches!(stat.state, 'Z' | 'X'))
}

/// Pid and start ticks: equal only for the same process.
pub(crate) fn identity(pid: i32) -> (i32, Option<u64>) {
    (pid, stat(pid).map(|stat| stat.start_ticks))
}

pub(crate) fn pids() -> Vec<i32> {
    fs::read_dir("/proc")
        .expect("/proc")
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect()
}

pub(crate) fn children(pid: i32) -> Vec<i32> {
    pids().into_iter().filter(|child| stat(*child).is_some_and(|stat| stat.parent == pid)).collect()
}

/// The process and everything below it.
pub(crate) fn tree(pid: i32) -> Vec<i32> {
    let mut found = vec![pid];
    let mut next = 0;
    while let Some(parent) = found.get(next).copied() {
        found.extend(children(parent));
        next += 1;
    }
    found
}

pub(crate) fn environ(pid: i32) -> BTreeMap<String, String> {
    strings(pid, "environ")
        .iter()
        .filter_map(|entry| entry.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

pub(crate) fn cmdline(pid: i32) -> Vec<String> {
    strings(pid, "cmdline")
}

fn strings(pid: i32, file: &str) -> Vec<String> {
    let bytes = fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
    bytes
        .split(|b| *b == 0)
        .filter(|s| !s.is_empty())
        .map(|s| String::from_utf8_lossy(s).into_owned())
        .collect()
}

/// A sum of `/proc/<pid>/smaps_rollup`, in KiB.
pub(crate) fn smaps_kib(pid: i32, field: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))
        .unwrap_or_else(|error| panic!("smaps of {pid}: {error}"));
    text.lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
        .and_then(|value| value.trim().strip_suffix("kB")?.trim().parse().ok())
        .unwrap_or_else(|| panic!("no {field} in {text}"))
}

/// A figure of `/proc/<pid>/status`; sizes are in KiB.
pub(crate) fn status_figure(pid: i32, field: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))
        .unwrap_or_else(|error| panic!("status of {pid}: {error}"));
    text.lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
        .and_then(|value| value.trim_end_matches("kB").trim().parse().ok())
        .unwrap_or_else(|| panic!("no {field} in {text}"))
}

/// `Private_Dirty` in KiB. What relocation has written into a build without optimisation (four times as much as into a
/// release) is left out there: read-only pages of the executable itself.
pub(crate) fn private_dirty_kib(pid: i32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps"))
        .unwrap_or_else(|error| panic!("smaps of {pid}: {error}"));
    let executable = fs::read_link(format!("/proc/{pid}/exe")).expect("its executable");
    let mut relocated = false;
    let mut sum = 0;
    for line in text.lines() {
        let first = line.split(' ').next().unwrap_or_default();
        if !first.ends_with(':') {
            relocated = cfg!(debug_assertions)
                && line.contains(" r--p ")
                && line.ends_with(&*executable.to_string_lossy());
        } else if first == "Private_Dirty:" && !relocated {
            let number = line.trim_start_matches("Private_Dirty:").trim().trim_end_matches(" kB");
            sum += number.parse::<u64>().unwrap_or_else(|error| panic!("{line}: {error}"));
        }
    }
    sum
}

pub(crate) fn descriptors(pid: i32) -> BTreeMap<u32, String> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { return BTreeMap::new() };
    entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let target = fs::read_link(entry.path()).ok()?;
            Some((entry.file_name().to_str()?.parse().ok()?, target.to_string_lossy().into_owned()))
        })
        .collect()
}

/// Sends a signal to a process that this test started (or that `pm` started for it).
pub(crate) fn signal(pid: i32, signal: Signal) {
    assert!(pid > 1, "not a process of a test: {pid}");
    kill(Pid::from_raw(pid), signal).unwrap_or_else(|error| panic!("cannot send {signal} to {pid}: {error}"));
}

/// Ends a process if it is still there.
pub(crate) fn end(pid: i32) {
    if pid > 1 {
        // Gone already is as good.
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

/// One line per process, for messages.
pub(crate) fn describe(pid: i32) -> String {
    match stat(pid) {
        Some(stat) => format!(
            "{pid} ({} {}, parent {}, session {}) {}",
            stat.name,
            stat.state,
            stat.parent,
            stat.session,
            cmdline(pid).join(" ")
        ),
        None => format!("{pid} (gone)"),
    }
}
