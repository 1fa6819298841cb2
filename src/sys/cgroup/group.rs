//! The control group of one instance: its limits, who is in it, and the end of all of them at once.
//!
//! No process leaves it by forking, by a session of its own or by changing its environment, so nothing escapes.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use crate::model::process::GroupLimits;

/// What the names of instances' groups begin with: no file of the kernel does.
pub const GROUP_PREFIX: &str = "app-";

/// The period over which `cpu.max` counts, in microseconds: the kernel's default.
const CPU_PERIOD: u64 = 100_000;

/// Groups may be below groups: an app may divide its own. No deeper than this is looked.
const DEPTH_MAX: usize = 16;

/// Why an instance has no group.
#[derive(Debug, thiserror::Error)]
pub enum GroupError {
    /// It cannot be made.
    #[error("cannot make the control group {path:?}: {source}")]
    Create {
        /// Its directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A limit is not taken.
    #[error("cannot set {file} to {value} in the control group {path:?}: {source}")]
    Limit {
        /// The kernel's file.
        file: &'static str,
        /// What it did not take.
        value: String,
        /// The group's directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A group; it need not exist any more.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Group {
    dir: PathBuf,
}

impl Group {
    /// The group in this directory.
    #[must_use]
    pub const fn at(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Makes it, with these limits.
    ///
    /// # Errors
    /// [`GroupError`]; nothing is left then.
    pub fn create(dir: PathBuf, limits: &GroupLimits) -> Result<Self, GroupError> {
        match fs::create_dir(&dir) {
            Ok(()) => {}
            // Of a run whose supervisor died before it asked for it.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(source) => return Err(GroupError::Create { path: dir, source }),
        }
        let group = Self { dir };
        group.limit(limits).inspect_err(|_| _ = group.remove())?;
        Ok(group)
    }

    /// Sets limits; what is `None` stays as it is.
    ///
    /// # Errors
    /// [`GroupError::Limit`].
    pub fn limit(&self, limits: &GroupLimits) -> Result<(), GroupError> {
        for (file, value) in values(limits) {
            // Never created: where the kernel has no such file there is no such limit.
            let written = File::options()
                .write(true)
                .open(self.dir.join(file))
                .and_then(|mut f| f.write_all(value.as_bytes()));
            written.map_err(|source| GroupError::Limit { file, value, path: self.dir.clone(), source })?;
        }
        Ok(())
    }

    /// Its directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Adds the pids of all processes in it and in groups below it. Nothing is added by a group that is gone.
    ///
    /// # Errors
    /// It cannot be read (no descriptors left).
    pub fn members(&self, pids: &mut Vec<i32>) -> io::Result<()> {
        members(&self.dir, pids, 0)
    }

    /// Kills everything in it and below it, also what is being forked at this moment (Linux 5.14).
    ///
    /// # Errors
    /// ENOENT: it is gone, or the kernel is older.
    pub fn kill(&self) -> io::Result<()> {
        File::options().write(true).open(self.dir.join("cgroup.kill"))?.write_all(b"1")
    }

    /// How many of its processes the kernel has killed for lack of memory; `None` where nobody counts.
    #[must_use]
    pub fn oom_kills(&self) -> Option<u64> {
        let text = fs::read_to_string(self.dir.join("memory.events")).ok()?;
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "))?;
        count.trim().parse().ok()
    }

    /// Moves a process into it, with all its threads.
    ///
    /// # Errors
    /// ESRCH: there is no such process.
    pub fn take(&self, pid: i32) -> io::Result<()> {
        fs::write(self.dir.join("cgroup.procs"), pid.to_string())
    }

    /// Removes it, if nothing lives in it; whether it is gone.
    pub fn remove(&self) -> bool {
        let removed = || match fs::remove_dir(&self.dir) {
            Ok(()) => true,
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        };
        removed() || {
            remove_below(&self.dir, 0);
            removed()
        }
    }

    /// Whether a process lives in it or below it.
    #[must_use]
    pub fn is_populated(&self) -> bool {
        fs::read_to_string(self.dir.join("cgroup.events"))
            .is_ok_and(|text| text.lines().any(|line| line == "populated 1"))
    }
}

/// What to write into which file.
fn values(limits: &GroupLimits) -> Vec<(&'static str, String)> {
    let mut values = Vec::new();
    let mut add = |file, value: Option<String>| values.extend(value.map(|value| (file, value)));
    add("memory.max", limits.memory_max.map(|bytes| bytes.to_string()));
    add("memory.high", limits.memory_high.map(|bytes| bytes.to_string()));
    add(
        "cpu.max",
        limits.cpu_max.map(|percent| format!("{} {CPU_PERIOD}", u64::from(percent) * CPU_PERIOD / 100)),
    );
    add("pids.max", limits.pids_max.map(|count| count.to_string()));
    add("memory.oom.group", limits.kills_together().then(|| "1".to_owned()));
    values
}

fn members(dir: &Path, pids: &mut Vec<i32>, depth: usize) -> io::Result<()> {
    match fs::read_to_string(dir.join("cgroup.procs")) {
        // 0 stands for a process of another pid namespace.
        Ok(text) => {
            pids.extend(text.lines().filter_map(|pid| pid.parse::<i32>().ok()).filter(|&pid| pid > 0));
        }
        // ENODEV: it was removed while it was read. EOPNOTSUPP: a threaded group, whose processes are listed above.
        Err(error)
            if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::EOPNOTSUPP)) => {}
        Err(error) => return Err(error),
    }
    if depth < DEPTH_MAX {
        for below in below(dir) {
            members(&below, pids, depth + 1)?;
        }
    }
    Ok(())
}

fn remove_below(dir: &Path, depth: usize) {
    if depth < DEPTH_MAX {
        for below in below(dir) {
            remove_below(&below, depth + 1);
            let _ = fs::remove_dir(below);
        }
    }
}

fn below(dir: &Path) -> Vec<PathBuf> {
    // The number of links of a group's directory is that of the groups below it and two.
    use std::os::unix::fs::MetadataExt as _;
    if fs::symlink_metadata(dir).is_ok_and(|meta| meta.nlink() == 2) {
        return Vec::new();
    }
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let dirs = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    dirs.map(|entry| entry.path()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory with the files that the kernel makes in a group with these controllers.
    fn fake(files: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for file in files {
            fs::write(dir.path().join(file), "").unwrap();
        }
        dir
    }

    const ALL: GroupLimits = GroupLimits {
        memory_max: Some(300 << 20),
        memory_high: Some(250 << 20),
        cpu_max: Some(150),
        pids_max: Some(64),
        oom_group: None,
        required: false,
    };

    #[test]
    fn limits_are_written_as_the_kernel_reads_them() {
        let dir = fake(&["memory.max", "memory.high", "memory.oom.group", "cpu.max", "pids.max"]);
        Group::create(dir.path().to_owned(), &ALL).unwrap();
        let text = |file: &str| fs::read_to_string(dir.path().join(file)).unwrap();
        assert_eq!([text("memory.max"), text("memory.high")], ["314572800", "262144000"]);
        assert_eq!([text("cpu.max"), text("pids.max")], ["150000 100000", "64"]);
        assert_eq!(text("memory.oom.group"), "1");
    }

    #[test]
    fn what_is_not_set_is_left_alone() {
        let dir = fake(&["memory.max", "memory.oom.group"]);
        let limits = GroupLimits { memory_max: Some(1), oom_group: Some(false), ..GroupLimits::default() };
        Group::create(dir.path().to_owned(), &limits).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("memory.oom.group")).unwrap(), "");
    }

    #[test]
    fn a_limit_that_the_kernel_does_not_have_is_an_error_that_names_it() {
        let dir = fake(&["memory.max", "memory.high"]);
        let error = Group::create(dir.path().to_owned(), &ALL).unwrap_err();
        assert!(error.to_string().contains("cannot set cpu.max to 150000 100000"), "{error}");
        assert!(fs::symlink_metadata(dir.path().join("cpu.max")).is_err(), "no file was made up");
    }

    #[test]
    fn oom_kills_are_counted_by_the_kernel() {
        let dir = fake(&[]);
        let group = Group::at(dir.path().to_owned());
        assert_eq!(group.oom_kills(), None);
        let events = "low 0\nhigh 12\nmax 80\noom 3\noom_kill 2\noom_group_kill 1\n";
        fs::write(dir.path().join("memory.events"), events).unwrap();
        assert_eq!(group.oom_kills(), Some(2));
    }

    #[test]
    fn members_of_all_levels_are_found() {
        let dir = fake(&[]);
        fs::write(dir.path().join("cgroup.procs"), "12\n0\n13\n").unwrap();
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        fs::write(dir.path().join("a/b/cgroup.procs"), "14\n").unwrap();
        let mut pids = Vec::new();
        Group::at(dir.path().to_owned()).members(&mut pids).unwrap();
        pids.sort_unstable();
        assert_eq!(pids, [12, 13, 14]);
        pids.clear();
        Group::at(dir.path().join("gone")).members(&mut pids).unwrap();
        assert!(pids.is_empty());
    }
}
