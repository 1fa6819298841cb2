//! Control groups (cgroups(7)). This page tells which processes are in a unit's group, from /proc alone: no mount of a
//! cgroup file system is needed, and both versions look the same. What we make ourselves is v2: [`root`] is the group
//! that is ours to divide, [`group`] that of an instance.

pub mod group;
pub mod root;

use std::collections::BTreeSet;
use std::fs;
use std::io;

use super::procfs::{self, Procfs};

/// The control group that systemd put this process into, up to and with the component `unit`; `None` when it is not in
/// a unit of that name.
///
/// # Errors
/// /proc cannot be read.
pub fn of_unit(unit: &str) -> io::Result<Option<String>> {
    Ok(unit_path(&fs::read_to_string("/proc/self/cgroup")?, unit))
}

/// All processes in this control group and those below it.
///
/// # Errors
/// /proc cannot be read.
pub fn members(group: &str) -> io::Result<Vec<i32>> {
    let mut pids = Vec::new();
    procfs::all_pids(&mut pids)?;
    pids.retain(|pid| {
        // One that ends while we look is in no group.
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        paths(&text).any(|path| is_below(path, group))
    });
    Ok(pids)
}

/// Moves these processes and everything that descends from them, or is in their sessions, into the control group of
/// this process. Returns how many had to be moved, and of those how many could not be.
///
/// # Errors
/// /proc cannot be read, or this process is in no control group of its own.
pub fn join(roots: &[i32]) -> io::Result<(usize, usize)> {
    let own = fs::read_to_string("/proc/self/cgroup")?;
    let own = paths(&own).find(|path| *path != "/").ok_or(io::ErrorKind::NotFound)?;
    let mounts = ["/sys/fs/cgroup", "/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified"];
    let list = mounts.iter().map(|mount| format!("{mount}{own}/cgroup.procs"));
    let list = list.into_iter().find(|list| fs::metadata(list).is_ok()).ok_or(io::ErrorKind::NotFound)?;
    let inside: BTreeSet<i32> = members(own)?.into_iter().collect();
    let (mut moved, mut failed) = (0, 0);
    for pid in family(roots)?.difference(&inside) {
        moved += 1;
        match fs::write(&list, pid.to_string()) {
            Err(error) if error.raw_os_error() != Some(libc::ESRCH) => failed += 1,
            _ => {}
        }
    }
    Ok((moved, failed))
}

/// These processes and everything that descends from them, or is in their sessions.
///
/// # Errors
/// /proc cannot be read.
pub fn family(roots: &[i32]) -> io::Result<BTreeSet<i32>> {
    let mut procfs = Procfs::new();
    let mut pids = Vec::new();
    procfs::all_pids(&mut pids)?;
    let mut stats = Vec::new();
    for pid in pids {
        if let Ok(Some(stat)) = procfs.stat(pid) {
            stats.push(stat);
        }
    }
    let mut family: BTreeSet<i32> = roots.iter().copied().collect();
    loop {
        let before = family.len();
        for stat in &stats {
            if family.contains(&stat.ppid) || roots.contains(&stat.session) {
                family.insert(stat.process.pid);
            }
        }
        if family.len() == before {
            return Ok(family);
        }
    }
}

/// The paths in systemd's own hierarchies: cgroup v2, and v1's named one.
fn paths(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (hierarchy, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        (hierarchy == "0" || controllers == "name=systemd").then_some(path)
    })
}

fn unit_path(text: &str, unit: &str) -> Option<String> {
    paths(text).find_map(|path| {
        let mut group = String::new();
        for part in path.split('/').skip(1) {
            group.extend(["/", part]);
            if part == unit {
                return Some(group);
            }
        }
        None
    })
}

fn is_below(path: &str, group: &str) -> bool {
    path.strip_prefix(group).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_is_a_whole_component_of_the_path() {
        let v2 = "0::/system.slice/pm.service/.control\n";
        assert_eq!(unit_path(v2, "pm.service").as_deref(), Some("/system.slice/pm.service"));
        assert_eq!(unit_path(v2, "m.service"), None);
        let v1 =
            "4:memory:/pm.service\n1:name=systemd:/user.slice/user@7.service/app.slice/pm.service\n0::/\n";
        let path = "/user.slice/user@7.service/app.slice/pm.service";
        assert_eq!(unit_path(v1, "pm.service").as_deref(), Some(path));
        assert_eq!(unit_path("0::/\n", "pm.service"), None, "the root is nobody's");
    }

    #[test]
    fn members_are_those_below_and_not_those_beside() {
        assert!(is_below("/a/pm.service", "/a/pm.service"));
        assert!(is_below("/a/pm.service/x", "/a/pm.service"));
        assert!(!is_below("/a/pm.service2", "/a/pm.service"));
        assert!(!is_below("/a", "/a/pm.service"));
    }
}
