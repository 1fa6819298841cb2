//! The lock that makes sure there is one daemon per home.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

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
/// was handed a copy. The file stays: removing it would let two processes lock two files of the same name.
///
/// # Errors
/// [`LockError::Held`] names the holder.
pub fn acquire(path: &Path) -> Result<File, LockError> {
    let failed = |source| LockError::Io { path: path.to_owned(), source };
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .map_err(failed)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(std::fs::TryLockError::WouldBlock) => {
            return Err(LockError::Held { path: path.to_owned(), pid: holder(path) });
        }
        Err(std::fs::TryLockError::Error(source)) => return Err(failed(source)),
    }
    claim(&mut file).map_err(failed)?;
    Ok(file)
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
    fn unusable_path_is_named() {
        let error = acquire(Path::new("/proc/no/such/lock")).unwrap_err();
        assert_eq!(error.to_string(), "cannot lock \"/proc/no/such/lock\"");
    }
}
