//! Files that somebody else must not steer: written for nobody else, and read without being held up.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, mkdirat};
use nix::unistd::geteuid;

/// Writes a file that only we may read, in place of what was there, whatever the umask; a symlink is refused.
///
/// # Errors
/// As open(2) and write(2).
pub fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    options.open(path)?.write_all(bytes)
}

/// Opens a regular file for reading. A FIFO or a terminal would hold its reader up for ever, and a device may do what
/// nobody asked for as soon as it is opened, so those are not even opened.
///
/// # Errors
/// As open(2); `InvalidInput` for anything else than a regular file.
pub fn open_regular(path: &Path) -> io::Result<File> {
    let found = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path)?;
    reopen_regular(&found)
}

/// The same for what was found by O_PATH.
///
/// # Errors
/// As [`open_regular`].
pub fn reopen_regular(found: &impl AsFd) -> io::Result<File> {
    let kind = kind(&fstat(found)?);
    if kind != SFlag::S_IFREG {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let path = format!("/proc/self/fd/{}", found.as_fd().as_raw_fd());
    OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)
}

/// The whole of a regular file of at most `max` bytes.
///
/// # Errors
/// As [`open_regular`] and read(2); `FileTooLarge`.
pub fn read_regular(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open_regular(path)?.take(max.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(bytes)
}

/// A path that leads to its directory through a descriptor, so that nobody can change the way any more.
#[derive(Debug)]
pub struct Way {
    path: PathBuf,
    _directory: Option<OwnedFd>,
    is_roots: bool,
}

impl Way {
    /// Valid as long as `self`.
    #[must_use]
    pub fn as_path(&self) -> &Path {
        &self.path
    }

    /// Whether only root can change the way or put anything at its end: what is there is what root wants there.
    #[must_use]
    pub const fn is_roots(&self) -> bool {
        self.is_roots
    }
}

/// How many symlinks may be on a way, as for the kernel (path_resolution(7)).
pub(super) const LINKS_MAX: u32 = 40;
/// May be written by others than the owner: the group, or everybody. An access list shows in the group's bits.
pub(super) const SHARED: u32 = 0o022;
/// In such a directory only their owners may remove and rename files, as in /tmp.
pub(super) const STICKY: u32 = 0o1000;
/// How a directory on a way is opened.
pub(super) const DIRECTORY: OFlag = OFlag::O_PATH.union(OFlag::O_DIRECTORY).union(OFlag::O_CLOEXEC);

/// The way to a file that root is to create or write at an absolute path: missing directories are made, and a symlink of
/// another user is followed only to a directory of the same user's. Otherwise that user would choose where root writes.
/// For other processes than root's the path as it is: they can write no more than their user can.
///
/// # Errors
/// As openat(2) and mkdirat(2); `PermissionDenied` names the symlink.
pub fn way_to(path: &Path) -> io::Result<Way> {
    way(path, Missing::Made)
}

/// Likewise, without making directories.
///
/// # Errors
/// As openat(2); `PermissionDenied` names the symlink.
pub fn way_in(path: &Path) -> io::Result<Way> {
    way(path, Missing::Error)
}

fn way(path: &Path, missing: Missing) -> io::Result<Way> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    if !geteuid().is_root() {
        return Ok(Way { path: path.to_owned(), _directory: None, is_roots: false });
    }
    let mut walk = Walk { missing, links: 0, is_roots: true };
    let directory = openat(AT_FDCWD, "/", DIRECTORY, Mode::empty())?;
    let directory = walk.along(directory, parent)?;
    let is_roots = walk.is_roots && !is_writable_for_others(&fstat(&directory)?);
    let path = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())).join(name);
    Ok(Way { path, _directory: Some(directory), is_roots })
}

/// What lies there, by its mode.
pub(super) fn kind(meta: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(meta.st_mode) & SFlag::S_IFMT
}

fn is_writable_for_others(meta: &FileStat) -> bool {
    meta.st_mode & SHARED != 0
}

/// What becomes of directories that are not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Missing {
    Made,
    Error,
}

/// A walk through directories.
struct Walk {
    missing: Missing,
    links: u32,
    /// Nobody else than root can have another way lie here.
    is_roots: bool,
}

impl Walk {
    fn along(&mut self, from: OwnedFd, path: &Path) -> io::Result<OwnedFd> {
        let mut here = from;
        for component in path.components() {
            let name = match component {
                Component::RootDir => {
                    here = openat(AT_FDCWD, "/", DIRECTORY, Mode::empty())?;
                    continue;
                }
                Component::CurDir | Component::Prefix(_) => continue,
                Component::ParentDir => "..".as_ref(),
                Component::Normal(name) => name,
            };
            here = self.step(here, name)?;
        }
        Ok(here)
    }

    /// One directory further, by its name or by the symlink of that name.
    fn step(&mut self, here: OwnedFd, name: &OsStr) -> io::Result<OwnedFd> {
        let found = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let next = match openat(&here, name, found, Mode::empty()) {
            Err(Errno::ENOENT) if self.missing == Missing::Made => {
                match mkdirat(&here, name, Mode::from_bits_truncate(0o755)) {
                    // Somebody else was quicker.
                    Ok(()) | Err(Errno::EEXIST) => {}
                    Err(error) => return Err(error.into()),
                }
                openat(&here, name, found, Mode::empty())?
            }
            next => next?,
        };
        let meta = fstat(&next)?;
        self.is_roots &= meta.st_uid == 0;
        match kind(&meta) {
            SFlag::S_IFDIR => {
                // Directories of root's in a sticky one stay where they are: their owner alone may move them.
                self.is_roots &= meta.st_mode & STICKY != 0 || !is_writable_for_others(&meta);
                return Ok(next);
            }
            // One of root's in a sticky directory may have been brought there from elsewhere.
            SFlag::S_IFLNK => self.is_roots &= !is_writable_for_others(&fstat(&here)?),
            _ => return Err(Errno::ENOTDIR.into()),
        }
        self.links += 1;
        if self.links > LINKS_MAX {
            return Err(Errno::ELOOP.into());
        }
        let target = readlinkat(&next, "")?;
        let there = self.along(here, Path::new(&target))?;
        if meta.st_uid != 0 && fstat(&there)?.st_uid != meta.st_uid {
            let message = format!(
                "the symlink {} of user {} leads to what is not that user's",
                name.display(),
                meta.st_uid
            );
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, message));
        }
        Ok(there)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{Permissions, set_permissions};
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink};

    use nix::unistd::mkfifo;

    use super::*;

    #[test]
    fn a_private_file_is_private_and_follows_no_link() {
        let dir = tempfile::tempdir().unwrap();
        let (path, victim) = (dir.path().join("pid"), dir.path().join("victim"));
        write_private(&path, b"12345").unwrap();
        write_private(&path, b"7").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"7");
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        std::fs::write(&victim, "precious").unwrap();
        std::fs::remove_file(&path).unwrap();
        symlink(&victim, &path).unwrap();
        assert!(write_private(&path, b"7").is_err());
        assert_eq!(std::fs::read(&victim).unwrap(), b"precious");
    }

    #[test]
    fn root_follows_a_symlink_of_another_user_only_to_what_is_that_users() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for (name, owner) in [("roots", 0), ("bobs", 1000), ("bobs/release", 1000)] {
            std::fs::create_dir(at(name)).unwrap();
            if geteuid().is_root() {
                chown(at(name), Some(owner), None).unwrap();
            }
        }
        let link = |target: &Path, name: &str, owner: u32| {
            symlink(target, at(name)).unwrap();
            if geteuid().is_root() {
                std::os::unix::fs::lchown(at(name), Some(owner), None).unwrap();
            }
        };
        link(Path::new("release"), "bobs/current", 1000);
        link(&at("roots"), "bobs/logs", 1000);
        link(Path::new("../../../../../../../etc"), "bobs/etc", 1000);
        link(&at("bobs"), "to-bob", 0);
        link(Path::new("loop"), "loop", 0);
        let write = |name: &str| {
            let way = way_to(&at(name))?;
            std::fs::write(way.as_path(), "a line")
        };
        for fine in ["a", "new/er/a", "bobs/current/a", "to-bob/current/b", "roots/../a"] {
            write(fine).unwrap();
            assert_eq!(std::fs::read(at(fine)).unwrap(), b"a line", "{fine}");
        }
        assert!(write("a/b").is_err() && write("loop/a").is_err());
        if geteuid().is_root() {
            for planted in ["bobs/logs/a", "bobs/etc/a", "to-bob/logs/a", "bobs/logs/../a"] {
                let error = write(planted).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{planted}: {error}");
            }
            assert_eq!(std::fs::read_dir(at("roots")).unwrap().count(), 0);
        }
    }

    #[test]
    fn a_way_is_roots_where_nobody_else_can_change_it() {
        if !geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for (name, owner, mode) in [
            ("roots", 0, 0o755),
            ("roots/deeper", 0, 0o700),
            ("groups", 0, 0o775),
            ("groups/deeper", 0, 0o755),
            ("all", 0, 0o1777),
            ("all/deeper", 0, 0o755),
            ("bobs", 1000, 0o755),
            ("bobs/roots", 0, 0o755),
        ] {
            std::fs::create_dir(at(name)).unwrap();
            set_permissions(at(name), Permissions::from_mode(mode)).unwrap();
            chown(at(name), Some(owner), None).unwrap();
        }
        for (target, name) in [("roots", "link"), ("bobs", "to-bob"), ("../roots", "all/link")] {
            symlink(target, at(name)).unwrap();
        }
        for (path, expected) in [
            ("roots/a", true),
            ("roots/deeper/a", true),
            ("link/a", true),
            ("all/deeper/a", true),
            ("all/a", false),
            ("all/link/a", false),
            ("groups/a", false),
            ("groups/deeper/a", false),
            ("bobs/a", false),
            ("bobs/roots/a", false),
            ("to-bob/roots/a", false),
        ] {
            assert_eq!(way_in(&at(path)).unwrap().is_roots(), expected, "{path}");
        }
        assert_eq!(way_in(&at("missing/a")).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(!at("missing").try_exists().unwrap());
    }

    #[test]
    fn what_is_no_file_holds_nobody_up() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        mkfifo(&fifo, Mode::from_bits_truncate(0o600)).unwrap();
        for path in [fifo.as_path(), dir.path(), Path::new("/dev/zero")] {
            assert_eq!(open_regular(path).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{path:?}");
        }
        let file = dir.path().join("package.json");
        std::fs::write(&file, "{}").unwrap();
        assert_eq!(read_regular(&file, 2).unwrap(), b"{}");
        assert_eq!(read_regular(&file, 1).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
    }
}
