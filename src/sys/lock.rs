//! The lock that makes sure there is one daemon per home.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Seek, Write};
use std::os::fd::RawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::fdpass;

/// Why the lock was not taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody else has it. The pid is missing only in the instant between taking the lock and writing it down.
    #[error("{path:?} is held by {}", match pid { Some(pid) => format!("pid {pid}"), None => "another process".into() })]
    Held {
        /// The lock file.
        path: PathBuf,
        /// Who holds it, from the file's content.
        pid: Option<u32>,
    },
    /// The file cannot be opened, locked or written.
    #[error("cannot lock {path:?}")]
    Io {
        /// The lock file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Takes the lock file (flock(2), mode 0600) and writes this process's pid into it; never waits.
///
/// The lock lasts until the last copy of the returned descriptor is closed, in this process or in another one that
/// was handed a copy. Only who holds it may remove the file, so one that was removed between opening and locking it is no
/// lock: two processes would lock two files of the same name.
///
/// # Errors
/// [`LockError::Held`] names the holder.
pub fn acquire(path: &Path) -> Result<File, LockError> {
    let failed = |source| LockError::Io { path: path.to_owned(), source };
    loop {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(path)
            .map_err(failed)?;
        take(&file, path)?;
        if is_at(&file, path).map_err(failed)? {
            claim(&mut file).map_err(failed)?;
            return Ok(file);
        }
    }
}

/// Goes on holding the lock that the program before this one in the same process held, or that whoever started us has
/// handed over with its descriptor.
///
/// # Errors
/// [`LockError::Io`] when the descriptor is not that of the lock file, [`LockError::Held`] when the lock had been given
/// back and somebody else has it.
pub fn inherit(path: &Path, descriptor: RawFd) -> Result<File, LockError> {
    let failed = |source| LockError::Io { path: path.to_owned(), source };
    let mut file = File::from(fdpass::inherited(descriptor).map_err(failed)?);
    if !is_at(&file, path).map_err(failed)? {
        let what = format!("descriptor {descriptor} is another file");
        return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, what)));
    }
    // Nothing happens where it is held, which it is by its descriptor and not by a process.
    take(&file, path)?;
    claim(&mut file).map_err(failed)?;
    Ok(file)
}

fn take(file: &File, path: &Path) -> Result<(), LockError> {
    match file.try_lock() {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(LockError::Held { path: path.to_owned(), pid: holder(path) }),
        Err(TryLockError::Error(source)) => Err(LockError::Io { path: path.to_owned(), source }),
    }
}

/// Whether this is the file of that name.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let held = file.metadata()?;
    match fs::symlink_metadata(path) {
        Ok(named) => Ok((named.dev(), named.ino()) == (held.dev(), held.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Who wrote its pid into the lock file last. It may have ended since.
#[must_use]
pub fn holder(path: &Path) -> Option<u32> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Writes this process's pid into a lock file that it holds, by itself or through a copy it was handed.
///
/// # Errors
/// As write(2).
pub fn claim(file: &mut File) -> io::Result<()> {
    // Emptied first, so that nobody reads the predecessor's pid joined with ours.
    file.set_len(0)?;
    file.rewind()?;
    file.write_all(format!("{}\n", std::process::id()).as_bytes())
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd as _, IntoRawFd as _, OwnedFd};

    use super::*;

    #[test]
    fn second_one_is_told_who_holds_the_lock() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pm.lock");
        std::fs::write(&path, "a stale text that is longer than any pid").unwrap();
        let first = acquire(&path).unwrap();
        match acquire(&path).unwrap_err() {
            LockError::Held { pid, .. } => assert_eq!(pid, Some(std::process::id())),
            other @ LockError::Io { .. } => panic!("{other}"),
        }
        let copy = first.try_clone().unwrap();
        drop(first);
        assert!(
            matches!(acquire(&path), Err(LockError::Held { .. })),
            "a copy of the descriptor keeps the lock"
        );
        drop(copy);
        acquire(&path).unwrap();
    }

    #[test]
    fn a_lock_that_was_handed_over_stays_held_and_no_other_descriptor_is_taken_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pm.lock");
        // Copies that stay open over exec, as the next program finds them.
        let pass_on = |file: &File| {
            let copy: OwnedFd = file.try_clone().unwrap().into();
            fdpass::set_kept_over_exec(&[copy.as_fd()], true).unwrap();
            copy.into_raw_fd()
        };
        let first = acquire(&path).unwrap();
        let number = pass_on(&first);
        drop(first);
        let second = inherit(&path, number).unwrap();
        assert!(matches!(acquire(&path), Err(LockError::Held { .. })));
        assert!(matches!(inherit(&path, number), Err(LockError::Io { .. })), "once only");
        // Opened, and never locked.
        let free = pass_on(&File::open(&path).unwrap());
        assert!(matches!(inherit(&path, free), Err(LockError::Held { .. })));
        let other = pass_on(&File::open("/dev/null").unwrap());
        let error = inherit(&path, other).unwrap_err();
        assert!(std::error::Error::source(&error).unwrap().to_string().contains("another file"), "{error:?}");
        drop(second);
        acquire(&path).unwrap();
    }

    #[test]
    fn a_file_that_is_not_there_any_more_is_no_lock() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pm.lock");
        let first = acquire(&path).unwrap();
        fs::remove_file(&path).unwrap();
        assert!(!is_at(&first, &path).unwrap());
        let second = acquire(&path).unwrap();
        assert!(is_at(&second, &path).unwrap() && !is_at(&first, &path).unwrap());
    }

    #[test]
    fn unusable_path_is_named() {
        let error = acquire(Path::new("/proc/no/such/lock")).unwrap_err();
        assert_eq!(error.to_string(), "cannot lock \"/proc/no/such/lock\"");
    }
}
