//! How many processes can run at once: what the affinity mask and the CPU quotas of control groups leave. It is what
//! `instances = "max"` means.
//!
//! A quota binds wherever it is set between our own group and the root, and the tightest one counts: a container's limit
//! is usually at the root of what it can see, a Kubernetes pod's above its containers'. It is rounded down, as Node's
//! `os.availableParallelism()` and Rust's standard library do: of two processes on one and a half CPUs one would wait.

use std::fs;
use std::path::{Path, PathBuf};

use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;

/// How many processes can run at once, at least 1.
#[must_use]
pub fn available() -> usize {
    available_in(Path::new("/"), allowed())
}

/// How many CPUs the affinity mask has (sched_getaffinity(2)).
fn allowed() -> usize {
    let set = sched_getaffinity(Pid::from_raw(0));
    let count = |set: CpuSet| (0..CpuSet::count()).filter(|&cpu| set.is_set(cpu).unwrap_or(false)).count();
    // More CPUs than a fixed mask can name: the standard library asks with a larger one.
    set.map_or_else(|_| std::thread::available_parallelism().map_or(1, std::num::NonZero::get), count).max(1)
}

fn available_in(root: &Path, allowed: usize) -> usize {
    quota_in(root).map_or(allowed, |quota| allowed.min(quota)).max(1)
}

/// The tightest quota in whole CPUs; `None` where there is none.
fn quota_in(root: &Path) -> Option<usize> {
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
    let mounts = fs::read_to_string(root.join("proc/self/mountinfo")).unwrap_or_default();
    let mounts: Vec<Mount<'_>> = mounts.lines().filter_map(Mount::parse).collect();
    groups
        .lines()
        .filter_map(|line| {
            // hierarchy-ID:controller-list:cgroup-path (cgroups(7)).
            let mut parts = line.splitn(3, ':');
            let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
            let kind = match controllers {
                "" => Kind::Unified,
                list if list.split(',').any(|name| name == "cpu") => Kind::Cpu,
                _ => return None,
            };
            tightest(root, &mounts, kind, path)
        })
        .min()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// cgroup v2.
    Unified,
    /// The hierarchy of v1 that has the `cpu` controller.
    Cpu,
}

/// A mounted hierarchy.
struct Mount<'a> {
    /// Which of its groups is at the mount point.
    top: &'a str,
    point: &'a str,
    kind: Kind,
}

impl<'a> Mount<'a> {
    /// A line of proc_pid_mountinfo(5).
    fn parse(line: &'a str) -> Option<Self> {
        let (before, after) = line.split_once(" - ")?;
        let mut fields = before.split(' ').skip(3);
        let (top, point) = (fields.next()?, fields.next()?);
        let mut after = after.split(' ');
        let (fs, _, options) = (after.next()?, after.next()?, after.next()?);
        let kind = match fs {
            "cgroup2" => Kind::Unified,
            "cgroup" if options.split(',').any(|option| option == "cpu") => Kind::Cpu,
            _ => return None,
        };
        Some(Self { top, point, kind })
    }
}

fn tightest(root: &Path, mounts: &[Mount<'_>], kind: Kind, path: &str) -> Option<usize> {
    let below = |dir: &str| root.join(dir.trim_start_matches('/'));
    let mount = mounts.iter().filter(|mount| mount.kind == kind).max_by_key(|mount| {
        // Of several mounts the one that shows our own group.
        (relative(path, mount.top).is_some(), mount.top.len())
    })?;
    let top = below(mount.point);
    // A group that is not below the mount is that of a namespace we cannot see; what is mounted is our container's.
    let own =
        relative(path, mount.top).map_or_else(|| top.clone(), |rest| top.join(rest.trim_start_matches('/')));
    let mut quotas = Vec::new();
    let mut dir: PathBuf = own;
    loop {
        quotas.extend(quota_of(&dir, kind));
        if dir == top || !dir.pop() || !dir.starts_with(&top) {
            break;
        }
    }
    quotas.into_iter().min()
}

/// The part of a group's path below another one.
fn relative<'a>(path: &'a str, top: &str) -> Option<&'a str> {
    if top == "/" {
        return Some(path);
    }
    path.strip_prefix(top).filter(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// A group's own quota in whole CPUs.
fn quota_of(dir: &Path, kind: Kind) -> Option<usize> {
    let read = |name: &str| fs::read_to_string(dir.join(name)).ok();
    let (quota, period) = match kind {
        Kind::Unified => {
            // "max 100000" where there is none; the root has no such file.
            let text = read("cpu.max")?;
            let mut words = text.split_whitespace();
            (words.next()?.parse::<u64>().ok()?, words.next()?.parse::<u64>().ok()?)
        }
        Kind::Cpu => {
            // -1 where there is none.
            let quota = read("cpu.cfs_quota_us")?.trim().parse::<u64>().ok()?;
            (quota, read("cpu.cfs_period_us")?.trim().parse::<u64>().ok()?)
        }
    };
    let whole = quota.checked_div(period)?;
    Some(usize::try_from(whole).unwrap_or(usize::MAX).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const V2: &str = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";
    const V1: &str = "33 32 0:30 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
                      34 32 0:31 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                      35 32 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";

    /// A made-up machine with 8 CPUs.
    fn check(groups: &str, mounts: &str, files: &[(&str, &str)], expected: usize) {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("proc/self/cgroup", groups);
        write("proc/self/mountinfo", mounts);
        for (path, text) in files {
            write(path, text);
        }
        assert_eq!(available_in(root.path(), 8), expected, "{groups} {files:?}");
    }

    #[test]
    fn the_quota_of_the_own_group_or_of_any_above_it_counts() {
        let groups = "0::/system.slice/pm.service\n";
        let own = "sys/fs/cgroup/system.slice/pm.service/cpu.max";
        let above = "sys/fs/cgroup/system.slice/cpu.max";
        check(groups, V2, &[], 8);
        check(groups, V2, &[(own, "max 100000\n")], 8);
        check(groups, V2, &[(own, "200000 100000\n")], 2);
        check(groups, V2, &[(own, "350000 100000\n")], 3);
        check(groups, V2, &[(own, "50000 100000\n")], 1);
        check(groups, V2, &[(own, "max 100000\n"), (above, "400000 100000\n")], 4);
        check(groups, V2, &[(own, "600000 100000\n"), (above, "500000 100000\n")], 5);
        check(groups, V2, &[(own, "6400000 100000\n")], 8);
    }

    #[test]
    fn a_container_sees_its_limit_at_the_root_of_its_groups() {
        check("0::/\n", V2, &[("sys/fs/cgroup/cpu.max", "300000 100000\n")], 3);
        // The host's path, and the container's group at the mount point.
        let mounts = V2.replace(" / /sys", " /docker/abc /sys");
        check("0::/docker/abc\n", &mounts, &[("sys/fs/cgroup/cpu.max", "300000 100000\n")], 3);
        check("0::/../../elsewhere\n", &mounts, &[("sys/fs/cgroup/cpu.max", "300000 100000\n")], 3);
    }

    #[test]
    fn version_1_has_quota_and_period_in_files_of_their_own() {
        let groups = "5:memory:/x\n4:cpu,cpuacct:/docker/abc\n0::/\n";
        let dir = "sys/fs/cgroup/cpu,cpuacct/docker";
        let file = |dir: &str, name: &str| format!("{dir}/{name}");
        let with = |quota: &str| {
            let own = file(dir, "abc/cpu.cfs_quota_us");
            let period = file(dir, "abc/cpu.cfs_period_us");
            let above = file(dir, "cpu.cfs_quota_us");
            (own, quota.to_owned(), period, above)
        };
        for (quota, expected) in [("-1\n", 8), ("250000\n", 2), ("10000\n", 1)] {
            let (own, quota, period, above) = with(quota);
            let files = [(own.as_str(), quota.as_str()), (&period, "100000\n"), (&above, "-1\n")];
            check(groups, V1, &files, expected);
        }
        let above =
            [(file(dir, "cpu.cfs_quota_us"), "400000\n"), (file(dir, "cpu.cfs_period_us"), "100000\n")];
        let files: Vec<(&str, &str)> = above.iter().map(|(path, text)| (path.as_str(), *text)).collect();
        check(groups, V1, &files, 4);
    }

    #[test]
    fn without_control_groups_the_affinity_mask_counts() {
        check("", "", &[], 8);
        check("nonsense\n", "nonsense\n", &[], 8);
        assert!(available() >= 1);
        assert!(available() <= allowed());
    }

    #[test]
    fn this_machine_is_seen_as_the_standard_library_sees_it() {
        assert_eq!(available(), std::thread::available_parallelism().unwrap().get());
    }
}
