//! Ends a write that a killed supervisor may have begun, so that every byte of it is in its file once.
//!
//! The size of the file before the write is known, and nobody else writes there: what is behind it is the beginning of
//! what was to be written. Files that were moved meanwhile are found beside their path; a file that was cut meanwhile
//! (`copytruncate`, `pm flush`) is looked at.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::libc;

use super::journal::Unfinished;
use super::writer;
use crate::sys::guarded;

/// Writes what is missing.
///
/// # Errors
/// When a file does not take it; nothing of it is there then, so that it can be tried again as if it was never begun.
pub(super) fn finish(write: &Unfinished) -> io::Result<()> {
    let Some(identity) = write.identity else {
        // A terminal or a FIFO does not say what it has got. Once at most, there.
        return Ok(());
    };
    match find(&write.path, identity) {
        Some(path) => {
            let present = present(&path, write)?;
            if let Err(error) = append(&path, &write.bytes[present..]) {
                let flags = libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_NOFOLLOW;
                let file = OpenOptions::new().write(true).custom_flags(flags).open(&path)?;
                if file.metadata()?.len() > write.size {
                    file.set_len(write.size)?;
                }
                return Err(error);
            }
        }
        // Nobody can read what was written there.
        None => append_anew(&write.path, &write.bytes)?,
    }
    append_anew(&write.path, &write.tail)
}

/// Where the file is now: at its path, or beside it under the name a rotation gave it.
fn find(path: &Path, identity: (u64, u64)) -> Option<PathBuf> {
    let is_it = |path: &Path| {
        fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file() && (meta.dev(), meta.ino()) == identity)
    };
    if is_it(path) {
        return Some(path.to_owned());
    }
    let beside = fs::read_dir(path.parent()?).ok()?;
    beside.filter_map(|entry| Some(entry.ok()?.path())).find(|path| is_it(path))
}

/// How many bytes of the write are in the file.
fn present(path: &Path, write: &Unfinished) -> io::Result<usize> {
    let file = guarded::open_regular(path)?;
    let size = file.metadata()?.len();
    let wanted = write.bytes.len();
    let grown = size.checked_sub(write.size).map(|grown| usize::try_from(grown).unwrap_or(usize::MAX));
    if let Some(grown) = grown
        && is_at(&file, write.size, &write.bytes[..grown.min(wanted)])?
    {
        return Ok(grown.min(wanted));
    }
    // It was cut, or somebody else has written: what it ends with says more than its size.
    let mut end = vec![0; usize::try_from(size).unwrap_or(usize::MAX).min(wanted)];
    let offset = size - end.len() as u64;
    file.read_exact_at(&mut end, offset)?;
    Ok((0..=end.len()).rev().find(|&count| end.ends_with(&write.bytes[..count])).unwrap_or(0))
}

fn is_at(file: &File, offset: u64, expected: &[u8]) -> io::Result<bool> {
    let mut found = vec![0; expected.len()];
    file.read_exact_at(&mut found, offset)?;
    Ok(found == expected)
}

fn append(path: &Path, bytes: &[u8]) -> io::Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_NOFOLLOW;
    OpenOptions::new().append(true).custom_flags(flags).open(path)?.write_all(bytes)
}

fn append_anew(path: &Path, bytes: &[u8]) -> io::Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    writer::open_file(path, None)?.file.write_all(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unfinished(path: &Path, size: u64, bytes: &str) -> Unfinished {
        let meta = fs::metadata(path).unwrap();
        Unfinished {
            path: path.to_owned(),
            identity: Some((meta.dev(), meta.ino())),
            size,
            bytes: bytes.as_bytes().to_vec(),
            tail: Vec::new(),
        }
    }

    #[test]
    fn every_byte_is_there_once_wherever_the_write_was_cut() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.log");
        let batch = "one\ntwo\nthree\n";
        for count in 0..=batch.len() {
            fs::write(&path, format!("before\n{}", &batch[..count])).unwrap();
            finish(&unfinished(&path, 7, batch)).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), format!("before\n{batch}"), "{count}");
            finish(&unfinished(&path, 7, batch)).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), format!("before\n{batch}"), "{count}, repeated");
        }
    }

    #[test]
    fn a_file_that_was_moved_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let (path, moved) = (dir.path().join("x.log"), dir.path().join("x.log.1"));
        fs::write(&path, "before\non").unwrap();
        let mut write = unfinished(&path, 7, "one\n");
        write.tail = b"two\n".to_vec();
        fs::rename(&path, &moved).unwrap();
        fs::write(&path, "new\n").unwrap();
        finish(&write).unwrap();
        assert_eq!(fs::read_to_string(&moved).unwrap(), "before\none\n");
        assert_eq!(fs::read_to_string(&path).unwrap(), "new\ntwo\n");
    }

    #[test]
    fn a_file_that_is_gone_begins_anew_with_everything() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.log");
        fs::write(&path, "before\non").unwrap();
        let write = unfinished(&path, 7, "one\n");
        fs::remove_file(&path).unwrap();
        finish(&write).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "one\n");
    }

    #[test]
    fn a_file_that_was_cut_is_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.log");
        let batch = "one\ntwo\nthree\n";
        for (left, expected) in [
            ("", batch),
            ("one\ntw", batch),
            ("later\none\n", "later\none\ntwo\nthree\n"),
            ("later\n", "later\none\ntwo\nthree\n"),
        ] {
            fs::write(&path, left).unwrap();
            finish(&unfinished(&path, 700, batch)).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), expected, "{left:?}");
        }
    }

    #[test]
    fn what_somebody_else_has_appended_stays_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.log");
        fs::write(&path, "before\nby hand\n").unwrap();
        finish(&unfinished(&path, 7, "one two three four\n")).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "before\nby hand\none two three four\n");
    }
}
