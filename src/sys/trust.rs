//! Who else than its owner could change what a path leads to. Every directory on the way counts, and every symlink: who
//! may put another name into one of them decides what is read.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat};
use nix::unistd::{Uid, User, geteuid};

use super::guarded::{self, DIRECTORY, LINKS_MAX, SHARED, STICKY, kind};

/// May be written by everybody.
const WORLD_WRITABLE: u32 = 0o002;

/// Why root should not do what a file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Steered {
    /// The file itself may be written by everybody.
    File {
        /// Its owner.
        owner: u32,
    },
    /// Everybody may put another name into this directory on the way.
    Directory {
        /// Which.
        path: PathBuf,
        /// Its owner.
        owner: u32,
    },
    /// Somebody else than root has put this name, a file, a directory or a symlink, where everybody may.
    Planted {
        /// Which.
        path: PathBuf,
        /// Who.
        owner: u32,
    },
}

impl fmt::Display for Steered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { owner } => write!(f, "everybody may change it (it belongs to {})", Name(*owner)),
            Self::Directory { path, owner } => write!(
                f,
                "everybody may replace what is in {} (which belongs to {})",
                path.display(),
                Name(*owner)
            ),
            Self::Planted { path, owner } => {
                write!(f, "{} has put {} where everybody may write", Name(*owner), path.display())
            }
        }
    }
}

/// A user in words.
struct Name(u32);

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match User::from_uid(Uid::from_raw(self.0)) {
            Ok(Some(user)) => write!(f, "{}", user.name),
            Ok(None) | Err(_) => write!(f, "user {}", self.0),
        }
    }
}

/// Why a file was not opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// As open(2) says, or it is no regular file.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Everybody may change what is there.
    #[error("{0}")]
    Steered(Steered),
}

/// Opens a regular file for reading which, where we are root, nobody steers who should not. What is judged is what is
/// opened: nobody can put another file there in between.
///
/// # Errors
/// As open(2); `InvalidInput` for anything else than a regular file; and who could change it.
pub fn open_unsteered(path: &Path) -> Result<File, OpenError> {
    if !geteuid().is_root() {
        return Ok(guarded::open_regular(path)?);
    }
    match walk(path, &mut steered_at)? {
        Ok(found) => Ok(guarded::reopen_regular(&found)?),
        Err(steered) => Err(OpenError::Steered(steered)),
    }
}

/// Why root should not do what a file says: everybody may change or replace it. `None` for other users, whom their files
/// cannot make more powerful.
///
/// # Errors
/// As open(2); also for a pipe or the like that has no way to it, such as `/dev/stdin`.
pub fn steered_by_everybody(path: &Path) -> io::Result<Option<Steered>> {
    if !geteuid().is_root() {
        return Ok(None);
    }
    Ok(walk(path, &mut steered_at)?.err())
}

fn steered_at(step: &Step<'_>) -> Option<Steered> {
    let Step { directory, entry, path } = step;
    if directory.st_mode & WORLD_WRITABLE != 0 {
        if directory.st_mode & STICKY == 0 {
            let path = path.parent().unwrap_or(path).to_owned();
            return Some(Steered::Directory { path, owner: directory.st_uid });
        }
        if entry.st_uid != 0 {
            return Some(Steered::Planted { path: path.to_path_buf(), owner: entry.st_uid });
        }
    }
    let changeable = kind(entry) == SFlag::S_IFREG && entry.st_mode & WORLD_WRITABLE != 0;
    changeable.then_some(Steered::File { owner: entry.st_uid })
}

/// Who besides root could change the file at this path, or what the path leads to, in words: `bob can change it`.
///
/// # Errors
/// As open(2).
pub fn changeable_by_others(path: &Path) -> io::Result<Option<String>> {
    const OTHERS: &str = "users other than root";
    let mut judge = |step: &Step<'_>| {
        let Step { directory, entry, path } = step;
        let replaces = |who: &dyn fmt::Display| Some(format!("{who} can replace {}", path.display()));
        if directory.st_uid != 0 {
            return replaces(&Name(directory.st_uid));
        }
        if directory.st_mode & SHARED != 0 {
            if directory.st_mode & STICKY == 0 {
                return replaces(&OTHERS);
            }
            if entry.st_uid != 0 {
                return replaces(&Name(entry.st_uid));
            }
        }
        if kind(entry) != SFlag::S_IFREG {
            return None;
        }
        if entry.st_uid != 0 {
            return Some(format!("{} can change it", Name(entry.st_uid)));
        }
        (entry.st_mode & SHARED != 0).then(|| format!("{OTHERS} can change it"))
    };
    Ok(walk(path, &mut judge)?.err())
}

/// One name that is looked up on a way.
struct Step<'a> {
    /// The directory in which it is looked up.
    directory: &'a FileStat,
    /// What has the name; a symlink is not followed.
    entry: &'a FileStat,
    /// Where that is.
    path: &'a Path,
}

/// Goes to a file as the kernel does, from the root on, until `judge` finds fault with a step. Every step is taken from a
/// descriptor of the one before, so nobody can change what was judged.
fn walk<T>(path: &Path, judge: &mut dyn FnMut(&Step<'_>) -> Option<T>) -> io::Result<Result<OwnedFd, T>> {
    let root = || openat(AT_FDCWD, "/", DIRECTORY, Mode::empty());
    let (mut here, mut shown) = (root()?, PathBuf::from("/"));
    // The next one last.
    let mut left = names(&std::path::absolute(path)?);
    let mut links = 0;
    while let Some(name) = left.pop() {
        if name == ".." {
            here = openat(&here, "..", DIRECTORY, Mode::empty())?;
            shown.pop();
            continue;
        }
        // As a directory first: only that mounts what is mounted when somebody goes there.
        let next = match openat(&here, name.as_os_str(), DIRECTORY | OFlag::O_NOFOLLOW, Mode::empty()) {
            Err(Errno::ENOTDIR | Errno::ELOOP) => {
                let any = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                openat(&here, name.as_os_str(), any, Mode::empty())?
            }
            next => next?,
        };
        let (directory, entry) = (fstat(&here)?, fstat(&next)?);
        let at = shown.join(&name);
        if let Some(fault) = judge(&Step { directory: &directory, entry: &entry, path: &at }) {
            return Ok(Err(fault));
        }
        match kind(&entry) {
            SFlag::S_IFLNK => {
                links += 1;
                if links > LINKS_MAX {
                    return Err(Errno::ELOOP.into());
                }
                let target = readlinkat(&next, "")?;
                if target.as_bytes().starts_with(b"/") {
                    (here, shown) = (root()?, PathBuf::from("/"));
                }
                left.extend(names(Path::new(&target)));
            }
            SFlag::S_IFDIR => (here, shown) = (next, at),
            _ if left.is_empty() => return Ok(Ok(next)),
            _ => return Err(Errno::ENOTDIR.into()),
        }
    }
    Ok(Ok(here))
}

/// The names of a path, the first one last.
fn names(path: &Path) -> Vec<OsString> {
    let name = |component: Component<'_>| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some(OsStr::new("..").to_owned()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    };
    let mut names: Vec<OsString> = path.components().filter_map(name).collect();
    names.reverse();
    names
}

#[cfg(test)]
mod tests {
    use std::fs::{Permissions, create_dir, read_to_string, set_permissions, write};
    use std::io::Read as _;
    use std::os::unix::fs::{PermissionsExt as _, chown, lchown, symlink};

    use super::*;

    /// Nobody's uid, on purpose.
    const BOB: u32 = 54_321;

    /// A directory of root's; `None` where we are not root.
    fn of_root() -> Option<tempfile::TempDir> {
        geteuid().is_root().then(|| tempfile::tempdir().unwrap())
    }

    fn chmod(path: &Path, mode: u32) {
        set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    /// What is said of it, by the look and by the opening, which agree.
    fn says(path: &Path) -> Option<Steered> {
        let looked = steered_by_everybody(path).unwrap();
        let opened = match open_unsteered(path) {
            Ok(mut file) => {
                let mut text = String::new();
                file.read_to_string(&mut text).unwrap();
                assert_eq!(text, read_to_string(path).unwrap());
                None
            }
            Err(OpenError::Steered(steered)) => Some(steered),
            Err(OpenError::Io(error)) => panic!("{path:?}: {error}"),
        };
        assert_eq!(looked, opened, "{path:?}");
        looked
    }

    #[test]
    fn root_sees_who_may_change_a_file() {
        let Some(dir) = of_root() else { return };
        let file = dir.path().join("ecosystem.toml");
        write(&file, "# nothing").unwrap();
        let with = |dir_mode: u32, file_mode: u32, owner: u32| {
            chmod(dir.path(), dir_mode);
            chmod(&file, file_mode);
            chown(&file, Some(owner), None).unwrap();
            says(&file)
        };
        assert_eq!(with(0o755, 0o644, 0), None);
        assert_eq!(with(0o755, 0o664, BOB), None, "a deploy user's own directory is that user's affair");
        assert_eq!(with(0o755, 0o646, 0), Some(Steered::File { owner: 0 }));
        let replaced = Some(Steered::Directory { path: dir.path().to_owned(), owner: 0 });
        assert_eq!(with(0o777, 0o644, 0), replaced);
        assert_eq!(with(0o1777, 0o644, 0), None);
        let planted = Some(Steered::Planted { path: file.clone(), owner: BOB });
        assert_eq!(with(0o1777, 0o644, BOB), planted);
        let link = tempfile::tempdir().unwrap();
        symlink(&file, link.path().join("link.toml")).unwrap();
        assert_eq!(says(&link.path().join("link.toml")), planted);
        assert_eq!(steered_by_everybody(Path::new("/dev/null")).unwrap(), None);
        assert!(matches!(open_unsteered(Path::new("/dev/null")), Err(OpenError::Io(_))));
    }

    #[test]
    fn every_directory_and_symlink_on_the_way_counts() {
        let Some(dir) = of_root() else { return };
        let at = |name: &str| dir.path().join(name);
        for (name, mode, owner) in [
            ("roots", 0o755, 0),
            ("roots/app", 0o755, 0),
            ("open", 0o777, 0),
            ("open/app", 0o755, 0),
            ("sticky", 0o1777, 0),
            ("sticky/app", 0o755, 0),
            ("sticky/bobs", 0o755, BOB),
            ("bobs", 0o755, BOB),
        ] {
            create_dir(at(name)).unwrap();
            chmod(&at(name), mode);
            chown(at(name), Some(owner), None).unwrap();
            write(at(name).join("file"), name).unwrap();
            chown(at(name).join("file"), Some(owner), None).unwrap();
        }
        let link = |name: &str, target: &Path, owner: u32| {
            symlink(target, at(name)).unwrap();
            lchown(at(name), Some(owner), None).unwrap();
        };
        link("open/to-bob", &at("bobs/file"), BOB);
        link("open/to-root", &at("roots/file"), BOB);
        link("sticky/to-root", &at("roots/file"), BOB);
        link("sticky/dir", &at("roots"), BOB);
        link("sticky/fine", &at("roots"), 0);
        link("bobs/fine", &at("roots/app"), BOB);
        link("roots/to-open", &at("open/app"), 0);
        link("roots/relative", Path::new("../sticky/dir/app/file"), 0);
        link("roots/around", Path::new("../roots/./app/../file"), 0);
        for fine in [
            "roots/file",
            "roots/app/file",
            "roots/../roots/file",
            "roots/around",
            "bobs/file",
            "bobs/fine/file",
            "sticky/file",
            "sticky/app/file",
            "sticky/fine/file",
        ] {
            assert_eq!(says(&at(fine)), None, "{fine}");
        }
        let open = Steered::Directory { path: at("open"), owner: 0 };
        for name in ["open/file", "open/app/file", "open/to-bob", "open/to-root", "roots/to-open/file"] {
            assert_eq!(says(&at(name)), Some(open.clone()), "{name}");
        }
        for (name, put) in [
            ("sticky/to-root", "sticky/to-root"),
            ("sticky/dir/file", "sticky/dir"),
            ("sticky/bobs/file", "sticky/bobs"),
            ("roots/relative", "sticky/dir"),
        ] {
            assert_eq!(says(&at(name)), Some(Steered::Planted { path: at(put), owner: BOB }), "{name}");
        }
        link("roots/loop", Path::new("loop"), 0);
        assert!(open_unsteered(&at("roots/loop")).is_err() && open_unsteered(&at("roots/none")).is_err());
        assert!(open_unsteered(&at("roots/file/file")).is_err() && open_unsteered(&at("roots")).is_err());
    }

    #[test]
    fn words_name_the_owner() {
        let put = Steered::Planted { path: "/tmp/app.env".into(), owner: BOB };
        assert_eq!(put.to_string(), "user 54321 has put /tmp/app.env where everybody may write");
        assert_eq!(Steered::File { owner: 0 }.to_string(), "everybody may change it (it belongs to root)");
    }

    #[test]
    fn a_program_of_roots_is_changed_by_nobody_else_on_the_whole_way() {
        let Some(dir) = of_root() else { return };
        let at = |name: &str| dir.path().join(name);
        create_dir(at("bin")).unwrap();
        chmod(dir.path(), 0o755);
        write(at("bin/pm"), "").unwrap();
        let says = |name: &str| changeable_by_others(&at(name)).unwrap().unwrap_or_default();
        let bin = at("bin").display().to_string();
        assert_eq!(says("bin/pm"), "");
        symlink(at("bin/pm"), at("link")).unwrap();
        lchown(at("link"), Some(BOB), None).unwrap();
        assert_eq!(says("link"), "", "whose the link is counts only where its owner may replace it");
        chmod(&at("bin/pm"), 0o775);
        assert_eq!(says("bin/pm"), "users other than root can change it");
        chown(at("bin/pm"), Some(BOB), None).unwrap();
        assert_eq!(says("bin/pm"), "user 54321 can change it");
        chown(at("bin/pm"), Some(0), None).unwrap();
        chmod(&at("bin/pm"), 0o755);
        chmod(&at("bin"), 0o775);
        assert_eq!(says("link"), format!("users other than root can replace {bin}/pm"));
        chmod(&at("bin"), 0o755);
        chown(at("bin"), Some(BOB), None).unwrap();
        assert_eq!(says("link"), format!("user 54321 can replace {bin}/pm"));
        chown(at("bin"), Some(0), None).unwrap();
        chmod(dir.path(), 0o1777);
        assert_eq!(says("bin/pm"), "");
        assert_eq!(says("link"), format!("user 54321 can replace {}", at("link").display()));
    }
}
