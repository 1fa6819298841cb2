//! Control groups, as the kernel shows them.

use std::fs;
use std::path::{Path, PathBuf};

/// Where cgroup v2 is mounted and may be written to.
///
/// # Errors
/// Why not, in words for the log of a test that cannot be run here.
pub(crate) fn mount() -> Result<PathBuf, String> {
    let text = fs::read_to_string("/proc/self/mountinfo").map_err(|error| error.to_string())?;
    let mount = text.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        if after.starts_with("cgroup2 ") { before.split(' ').nth(4) } else { None }
    });
    let mount = PathBuf::from(mount.ok_or("no cgroup v2 is mounted here")?);
    if !nix::unistd::geteuid().is_root() {
        return Err(format!("only root makes control groups below {}", mount.display()));
    }
    Ok(mount)
}

/// All processes in a group and below it.
pub(crate) fn members(group: &Path) -> Vec<i32> {
    let mut pids: Vec<i32> = fs::read_to_string(group.join("cgroup.procs"))
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.parse().ok())
        .collect();
    pids.extend(below(group).iter().flat_map(|below| members(below)));
    pids
}

/// The groups directly below one.
pub(crate) fn below(group: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(group) else { return Vec::new() };
    entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

/// The v2 group of a process.
pub(crate) fn of(pid: i32) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    text.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default().to_owned()
}

pub(super) fn remove(group: &Path) {
    for below in below(group) {
        remove(&below);
    }
    // One that is busy shows in the next test that counts.
    let _ = fs::remove_dir(group);
}
