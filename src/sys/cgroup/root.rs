//! The control group (v2, cgroups(7)) that is ours to divide: where it is, and which controllers it has.
//!
//! A group is ours when systemd has delegated it to the daemon's unit (`Delegate=yes`) or when somebody has named it.
//! The shell's own group is never touched: other processes are in it, and somebody else divides what is above it.
//!
//! ```text
//! pm.service/            delegated; no process in here, or no controller may be enabled for what is below
//!  ├─ _daemon/           keeper and supervisor
//!  ├─ app-api-0-1-…/     an instance and everything that it starts
//!  └─ app-api-1-1-…/
//! ```

use std::ffi::{CString, OsStr};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use nix::unistd::{AccessFlags, access};

use super::group::{GROUP_PREFIX, Group, GroupError};
use crate::model::process::{Controller, GroupLimits};

/// The group of the daemon's own processes, below the one that is ours.
pub const LEAF: &str = "_daemon";

/// The variable that names a group that the daemon may divide.
pub const ROOT_VARIABLE: &str = "PM_CGROUP_ROOT";

/// systemd.exec(5): set for every process of a service, and not passed on to a daemon that a command starts.
const INVOCATION: &str = "INVOCATION_ID";

/// How systemd marks a group that it has delegated: by the first for everybody since 251, by the second for root.
const DELEGATED: [&std::ffi::CStr; 2] = [c"user.delegate", c"trusted.delegate"];

/// Why the group that somebody named cannot be ours.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// It is not absolute.
    #[error("{0:?} is not an absolute path")]
    Relative(PathBuf),
    /// It cannot be made, or looked at.
    #[error("cannot use the control group {path:?}")]
    Io {
        /// The group.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is somewhere else.
    #[error("{path:?} is not in a cgroup v2 file system{}", hint(.mount))]
    NotCgroup2 {
        /// The path.
        path: PathBuf,
        /// Where there is one.
        mount: Option<PathBuf>,
    },
    /// It is the root of all groups.
    #[error("{0:?} is the root of all control groups, which is nobody's; name a group below it")]
    Everything(PathBuf),
}

fn hint(mount: &Option<PathBuf>) -> String {
    match mount {
        Some(mount) => format!("; here it is mounted at {}", mount.display()),
        None => "; none is mounted here".to_owned(),
    }
}

/// A group that is ours to divide.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root {
    dir: PathBuf,
}

impl Root {
    /// Makes a group ours, as the keeper, before it starts anything: the one at this path, or the one that systemd has
    /// delegated to our unit. The processes of the daemon go into a group of their own below it where they are in it.
    ///
    /// # Errors
    /// The named group cannot be used. What systemd did not delegate is no error.
    pub fn claim(named: Option<&Path>) -> Result<Option<Self>, RootError> {
        let own = own_dir();
        if let Some(path) = named {
            let root = Self::named(path)?;
            if own.as_deref() == Some(&*root.dir) {
                root.enter_leaf().map_err(|source| RootError::Io { path: root.dir.clone(), source })?;
            }
            return Ok(Some(root));
        }
        let Some(own) = own else { return Ok(None) };
        if let Some(root) = Self::above_leaf(&own) {
            return Ok(Some(root));
        }
        let root = Self { dir: own };
        // A shell's group may be delegated too (user@.service); a service has an invocation of its own.
        let is_service = std::env::var_os(INVOCATION).is_some() && is_delegated(&root.dir);
        if !is_service || !(root.is_a_service() || root.is_only_ours()) {
            return Ok(None);
        }
        // The unit says that it is ours; if the kernel says otherwise we do without.
        Ok(root.enter_leaf().is_ok().then_some(root))
    }

    /// The group that the keeper of this process has made ours.
    ///
    /// # Errors
    /// As [`Root::claim`].
    pub fn of_daemon(named: Option<&Path>) -> Result<Option<Self>, RootError> {
        match named {
            Some(path) => Self::named(path).map(Some),
            None => Ok(own_dir().and_then(|own| Self::above_leaf(&own))),
        }
    }

    /// The directory as a group, whatever it is.
    #[must_use]
    pub const fn at(dir: PathBuf) -> Self {
        Self { dir }
    }

    fn named(path: &Path) -> Result<Self, RootError> {
        let failed = |source| RootError::Io { path: path.to_owned(), source };
        if !path.is_absolute() {
            return Err(RootError::Relative(path.to_owned()));
        }
        let is_there = |dir: &Path| statfs(dir).map(|fs| fs.filesystem_type() == CGROUP2_SUPER_MAGIC);
        let parent = path.parent().unwrap_or(path);
        // Nothing is made in another file system.
        let inside = is_there(path).or_else(|_| is_there(parent)).map_err(|errno| failed(errno.into()))?;
        if !inside {
            return Err(RootError::NotCgroup2 { path: path.to_owned(), mount: mount().map(|m| m.point) });
        }
        match fs::create_dir(path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(failed(error)),
        }
        let dir = fs::canonicalize(path).map_err(failed)?;
        // Every group but the root of all of them tells whether there are processes in it.
        if fs::symlink_metadata(dir.join("cgroup.events")).is_err() {
            return Err(RootError::Everything(dir));
        }
        access(&dir, AccessFlags::W_OK).map_err(|errno| failed(errno.into()))?;
        Ok(Self { dir })
    }

    fn above_leaf(own: &Path) -> Option<Self> {
        if own.file_name() != Some(OsStr::new(LEAF)) {
            return None;
        }
        own.parent().map(|dir| Self { dir: dir.to_owned() })
    }

    /// Whether everything in it was started by the service of that name.
    fn is_a_service(&self) -> bool {
        self.dir.extension() == Some(OsStr::new("service"))
    }

    /// Whether nobody is in it but this process.
    fn is_only_ours(&self) -> bool {
        let own = std::process::id().to_string();
        fs::read_to_string(self.dir.join("cgroup.procs")).is_ok_and(|text| text.lines().all(|pid| pid == own))
    }

    fn enter_leaf(&self) -> io::Result<()> {
        let leaf = self.dir.join(LEAF);
        match fs::create_dir(&leaf) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let list = leaf.join("cgroup.procs");
        fs::write(&list, "0")?;
        // What a daemon left that knew no groups: the supervisor takes each app from here to a group of its own.
        for pid in fs::read_to_string(self.dir.join("cgroup.procs"))?.lines() {
            // One that has ended meanwhile needs no place.
            let _ = fs::write(&list, pid);
        }
        Ok(())
    }

    /// Its directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The controllers that could be enabled for the groups below it.
    #[must_use]
    pub fn available(&self) -> Vec<Controller> {
        controllers_in(&self.dir.join("cgroup.controllers"))
    }

    /// Enables a controller for the groups below it, if it is not.
    ///
    /// # Errors
    /// ENOENT: there is no such controller; EBUSY: there are processes in this group itself.
    pub fn enable(&self, controller: Controller) -> io::Result<()> {
        let file = self.dir.join("cgroup.subtree_control");
        if controllers_in(&file).contains(&controller) {
            return Ok(());
        }
        if !self.available().contains(&controller) {
            return Err(io::ErrorKind::NotFound.into());
        }
        fs::write(file, format!("+{controller}"))
    }

    /// Disables what is enabled, so that processes can be put into this group itself: systemd does that with a new main
    /// process (before 254, which can put it elsewhere).
    ///
    /// # Errors
    /// As write(2).
    pub fn disable_all(&self) -> io::Result<()> {
        let file = self.dir.join("cgroup.subtree_control");
        for controller in fs::read_to_string(&file)?.split_whitespace() {
            fs::write(&file, format!("-{controller}"))?;
        }
        Ok(())
    }

    /// The group of this name below it; it need not exist.
    #[must_use]
    pub fn group(&self, name: &str) -> Group {
        Group::at(self.dir.join(name))
    }

    /// Makes a group with these limits.
    ///
    /// # Errors
    /// The directory cannot be made, or the kernel does not take a limit; nothing is left then.
    pub fn create(&self, name: &str, limits: &GroupLimits) -> Result<Group, GroupError> {
        for (_, _, controller) in limits.set() {
            // What is not available has been found out before; what is in the way shows when the limit is written.
            let _ = self.enable(controller);
        }
        Group::create(self.dir.join(name), limits)
    }

    /// The groups of instances that exist, by name.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn groups(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let name = entry?.file_name();
            names.extend(name.to_str().filter(|name| name.starts_with(GROUP_PREFIX)).map(str::to_owned));
        }
        Ok(names)
    }
}

/// The group that systemd has delegated to a unit, in which no process of it may be when a new main process is put there.
///
/// # Errors
/// /proc cannot be read.
pub fn root_of_unit(unit: &str) -> io::Result<Option<Root>> {
    let Some(path) = super::of_unit(unit)? else { return Ok(None) };
    Ok(mount().and_then(|mount| mount.dir_of(&path)).map(Root::at))
}

/// The controllers that this machine gives to cgroup v2 at all, and where that is mounted; `None` where it is not.
#[must_use]
pub fn of_machine() -> Option<(PathBuf, Vec<Controller>)> {
    let mount = mount()?;
    let controllers = controllers_in(&mount.point.join("cgroup.controllers"));
    Some((mount.point, controllers))
}

fn controllers_in(file: &Path) -> Vec<Controller> {
    let text = fs::read_to_string(file).unwrap_or_default();
    Controller::ALL.into_iter().filter(|c| text.split_whitespace().any(|word| word == c.as_str())).collect()
}

fn is_delegated(dir: &Path) -> bool {
    let Ok(path) = CString::new(dir.as_os_str().as_bytes()) else { return false };
    DELEGATED.iter().any(|name| {
        let mut value = [0_u8; 8];
        // SAFETY: two C strings, and a buffer with its length.
        let len =
            unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
        len > 0 && value[0] == b'1'
    })
}

/// A mounted cgroup v2 file system.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mount {
    point: PathBuf,
    /// The group that shows there.
    root: String,
}

impl Mount {
    fn dir_of(&self, group: &str) -> Option<PathBuf> {
        let rest = if self.root == "/" { group } else { group.strip_prefix(self.root.as_str())? };
        Some(self.point.join(rest.trim_start_matches('/')))
    }
}

fn mount() -> Option<Mount> {
    mount_in(&fs::read_to_string("/proc/self/mountinfo").ok()?)
}

/// The first mount of the kind in the text of /proc/PID/mountinfo (proc(5)).
fn mount_in(text: &str) -> Option<Mount> {
    text.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        if after.split(' ').next()? != "cgroup2" {
            return None;
        }
        let mut fields = before.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        Some(Mount { point: unescaped(point).into(), root: unescaped(root) })
    })
}

/// Spaces and the like are written as three octal digits.
fn unescaped(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        match part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                plain.push(char::from(byte));
                plain.push_str(&part[3..]);
            }
            None => {
                plain.push('\\');
                plain.push_str(part);
            }
        }
    }
    plain
}

/// The group of this process.
fn own_dir() -> Option<PathBuf> {
    let text = fs::read_to_string("/proc/self/cgroup").ok()?;
    let group = text.lines().find_map(|line| line.strip_prefix("0::"))?;
    mount()?.dir_of(group)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_is_found_wherever_it_is() {
        let hybrid = "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw\n\
                      35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:4 - cgroup2 cgroup2 rw\n";
        let mount = mount_in(hybrid).unwrap();
        assert_eq!(mount.point, Path::new("/sys/fs/cgroup/unified"));
        assert_eq!(mount.dir_of("/a.slice/b"), Some("/sys/fs/cgroup/unified/a.slice/b".into()));
        let odd = "1 2 0:3 /docker/x /mnt/my\\040groups rw - cgroup2 none rw\n";
        let mount = mount_in(odd).unwrap();
        assert_eq!(mount.point, Path::new("/mnt/my groups"));
        assert_eq!(mount.dir_of("/docker/x/y"), Some("/mnt/my groups/y".into()));
        assert_eq!(mount.dir_of("/elsewhere"), None);
        assert_eq!(mount_in("35 31 0:32 / /sys/fs/cgroup rw - cgroup cgroup rw,memory\n"), None);
    }

    #[test]
    fn a_directory_that_is_no_group_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("group");
        let error = Root::claim(Some(&path)).unwrap_err();
        assert!(matches!(error, RootError::NotCgroup2 { .. }), "{error}");
        assert!(fs::symlink_metadata(&path).is_err());
        assert!(matches!(Root::claim(Some(Path::new("x"))), Err(RootError::Relative(_))));
        if let Some((mount, _)) = of_machine() {
            assert!(matches!(Root::claim(Some(&mount)), Err(RootError::Everything(_))));
        }
    }

    #[test]
    fn controllers_are_whole_words() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("cgroup.controllers"), "cpuset io memory pids\n").unwrap();
        fs::write(dir.path().join("cgroup.subtree_control"), "pids\n").unwrap();
        let root = Root::at(dir.path().to_owned());
        assert_eq!(root.available(), [Controller::Memory, Controller::Pids]);
        assert_eq!(root.enable(Controller::Cpu).unwrap_err().kind(), io::ErrorKind::NotFound);
        root.enable(Controller::Pids).unwrap();
        let control = || fs::read_to_string(dir.path().join("cgroup.subtree_control")).unwrap();
        assert_eq!(control(), "pids\n");
        root.enable(Controller::Memory).unwrap();
        assert_eq!(control(), "+memory");
    }
}
