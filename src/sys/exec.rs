//! The executable of this process, what it is replaced by, and the name it shows.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};

use super::fdpass;

/// Opens the executable this process was started from. The descriptor keeps naming this very build after a package
/// upgrade has replaced or removed the file.
///
/// # Errors
/// See open(2) and proc(5).
pub fn own_executable() -> io::Result<OwnedFd> {
    Ok(File::open("/proc/self/exe")?.into())
}

/// Replaces this program by another one, of which the pid, the children and the descriptors in `kept` remain. Returns
/// only when that is not possible, and then everything is as before. For processes with one thread.
#[must_use]
pub fn replace(
    program: BorrowedFd<'_>,
    args: &[CString],
    env: &[CString],
    kept: &[BorrowedFd<'_>],
) -> io::Error {
    let failed = match fdpass::set_kept_over_exec(kept, true) {
        Ok(()) => match nix::unistd::fexecve(program, args, env) {
            Ok(never) => match never {},
            Err(errno) => errno.into(),
        },
        Err(error) => error,
    };
    // A descriptor that cannot be marked is not open.
    let _ = fdpass::set_kept_over_exec(kept, false);
    failed
}

/// Whether two open files have the same content: the same file, or copies of it.
///
/// # Errors
/// See read(2).
pub fn is_same_program(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> io::Result<bool> {
    let [one, other] = [File::from(one.try_clone_to_owned()?), File::from(other.try_clone_to_owned()?)];
    let [a, b] = [one.metadata()?, other.metadata()?];
    if (a.dev(), a.ino()) == (b.dev(), b.ino()) {
        return Ok(true);
    }
    if a.len() != b.len() {
        return Ok(false);
    }
    let (mut left, mut right) = (vec![0; 64 * 1024], vec![0; 64 * 1024]);
    let mut at = 0;
    while at < a.len() {
        let wanted = usize::try_from(a.len() - at).unwrap_or(usize::MAX).min(left.len());
        let (left, right) = (&mut left[..wanted], &mut right[..wanted]);
        one.read_exact_at(left, at)?;
        other.read_exact_at(right, at)?;
        if left != right {
            return Ok(false);
        }
        at += wanted as u64;
    }
    Ok(true)
}

/// Sets the name that ps and top show, cut at 15 bytes (PR_SET_NAME). A program started through a descriptor would
/// otherwise show that descriptor's number (before Linux 6.14).
///
/// # Errors
/// See prctl(2).
pub fn set_process_name(name: &CStr) -> io::Result<()> {
    Ok(nix::sys::prctl::set_name(name)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_executable_is_the_file_we_run() {
        let opened = File::from(own_executable().unwrap()).metadata().unwrap();
        let named = std::fs::metadata(std::env::current_exe().unwrap()).unwrap();
        assert_eq!((opened.dev(), opened.ino()), (named.dev(), named.ino()));
    }
}
