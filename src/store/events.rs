//! events.jsonl: what has happened, one JSON object per line, in two files of bounded size.
//!
//! Lines carry a number that counts up (`seq`). Appended and never changed; when the file is full it becomes
//! `events.jsonl.1`, in place of the one before. Nothing is synced: a crash of the supervisor loses nothing, one of the
//! machine may lose the last seconds.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;

/// How large one of the two files becomes, in bytes: some forty thousand events.
pub const FILE_MAX: u64 = 8 << 20;

/// No event is longer, so the last one is within this many bytes of the end.
const LAST_LINE_MAX: u64 = 1 << 20;

/// The file that events are appended to.
#[derive(Debug)]
pub struct EventFile {
    path: PathBuf,
    file: File,
    len: u64,
    limit: u64,
}

/// The file of older events.
#[must_use]
pub fn previous_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

/// The number of a line, if it is one of ours and whole.
#[must_use]
pub fn seq_of(line: &[u8]) -> Option<u64> {
    #[derive(serde::Deserialize)]
    struct Numbered {
        seq: u64,
    }
    serde_json::from_slice::<Numbered>(line).ok().map(|line| line.seq)
}

/// Operations that have begun, and whose end is not among the last lines, in the words of the file.
#[must_use]
pub fn unended_operations(path: &Path) -> Vec<String> {
    #[derive(serde::Deserialize)]
    struct Line {
        event: String,
        op: Option<String>,
    }
    let tail = || {
        let mut file = File::open(path).ok()?;
        let len = file.metadata().ok()?.len();
        tail_of(&mut file, len).ok()
    };
    let mut unended = Vec::new();
    for line in tail().unwrap_or_default().split(|&byte| byte == b'\n') {
        let Ok(Line { event, op: Some(op) }) = serde_json::from_slice(line) else { continue };
        match event.as_str() {
            "operation_begun" => unended.push(op),
            "operation_ended" => unended.retain(|known| *known != op),
            _ => {}
        }
    }
    unended
}

impl EventFile {
    /// Opens the file for appending, and says which number its last line has. What a writer left unfinished that died in
    /// the middle of a line is cut off.
    ///
    /// # Errors
    /// It cannot be opened, read or repaired.
    pub fn open(path: &Path, limit: u64) -> io::Result<(Self, Option<u64>)> {
        let mut file = open(path)?;
        let len = file.metadata()?.len();
        let tail = tail_of(&mut file, len)?;
        let whole = tail.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        let torn = (tail.len() - whole) as u64;
        if torn > 0 {
            file.set_len(len - torn)?;
        }
        let last = last_seq(&tail[..whole]).or_else(|| {
            let mut previous = File::open(previous_of(path)).ok()?;
            let len = previous.metadata().ok()?.len();
            last_seq(&tail_of(&mut previous, len).ok()?)
        });
        Ok((Self { path: path.to_owned(), file, len: len - torn, limit }, last))
    }

    /// Appends whole lines. When that fails the file ends where it ended before.
    ///
    /// # Errors
    /// The disk's.
    pub fn append(&mut self, lines: &[u8]) -> io::Result<()> {
        let is_ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|meta| self.file.metadata().is_ok_and(|own| own.ino() == meta.ino()));
        if !is_ours {
            // Somebody has moved or removed it.
            self.anew()?;
        } else if self.len > 0 && self.len.saturating_add(lines.len() as u64) > self.limit {
            fs::rename(&self.path, previous_of(&self.path))?;
            self.anew()?;
        }
        match self.file.write_all(lines) {
            Ok(()) => {
                self.len += lines.len() as u64;
                Ok(())
            }
            Err(error) => {
                // Half a line would spoil the next one.
                self.file.set_len(self.len)?;
                Err(error)
            }
        }
    }

    fn anew(&mut self) -> io::Result<()> {
        self.file = open(&self.path)?;
        self.len = self.file.metadata()?.len();
        Ok(())
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .read(true)
        .append(true)
        .mode(0o600)
        .custom_flags(OFlag::O_NOFOLLOW.bits())
        .open(path)
}

fn tail_of(file: &mut File, len: u64) -> io::Result<Vec<u8>> {
    file.seek(SeekFrom::Start(len.saturating_sub(LAST_LINE_MAX)))?;
    let mut tail = Vec::new();
    file.take(LAST_LINE_MAX).read_to_end(&mut tail)?;
    Ok(tail)
}

fn last_seq(text: &[u8]) -> Option<u64> {
    text.split(|&byte| byte == b'\n').rev().find_map(seq_of)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn line(seq: u64) -> Vec<u8> {
        format!("{{\"seq\":{seq},\"event\":\"ready\"}}\n").into_bytes()
    }

    fn numbers(path: &Path) -> Vec<u64> {
        let text = fs::read(path).unwrap_or_default();
        text.split(|&byte| byte == b'\n').filter_map(seq_of).collect()
    }

    #[test]
    fn numbers_go_on_and_half_a_line_is_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.jsonl");
        let (mut file, last) = EventFile::open(&path, FILE_MAX).unwrap();
        assert_eq!(last, None);
        file.append(&[line(1), line(2)].concat()).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"seq\":3,\"ev").unwrap();
        let (mut file, last) = EventFile::open(&path, FILE_MAX).unwrap();
        assert_eq!(last, Some(2));
        file.append(&line(3)).unwrap();
        assert_eq!(numbers(&path), [1, 2, 3]);
    }

    #[test]
    fn what_began_and_did_not_end_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.jsonl");
        assert!(unended_operations(&path).is_empty());
        let (mut file, _) = EventFile::open(&path, FILE_MAX).unwrap();
        for (event, op) in [("begun", "0a"), ("begun", "0b"), ("ended", "0a"), ("begun", "0c")] {
            file.append(
                format!("{{\"seq\":1,\"event\":\"operation_{event}\",\"op\":\"{op}\"}}\n").as_bytes(),
            )
            .unwrap();
        }
        file.append(b"{\"seq\":2,\"event\":\"operation_en").unwrap();
        assert_eq!(unended_operations(&path), ["0b", "0c"]);
    }

    #[test]
    fn a_full_file_becomes_the_previous_one_and_there_are_never_more_than_two() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.jsonl");
        let limit = line(10).len() as u64 * 10;
        let (mut file, _) = EventFile::open(&path, limit).unwrap();
        for seq in 10..45 {
            file.append(&line(seq)).unwrap();
        }
        assert_eq!(numbers(&previous_of(&path)), (30..40).collect::<Vec<_>>());
        assert_eq!(numbers(&path), (40..45).collect::<Vec<_>>());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
        // An empty file after a rotation: the number comes from the one before.
        fs::write(&path, b"").unwrap();
        assert_eq!(EventFile::open(&path, limit).unwrap().1, Some(39));
    }

    #[test]
    fn a_file_that_was_moved_away_is_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.jsonl");
        let (mut file, _) = EventFile::open(&path, FILE_MAX).unwrap();
        file.append(&line(1)).unwrap();
        fs::remove_file(&path).unwrap();
        file.append(&line(2)).unwrap();
        assert_eq!(numbers(&path), [2]);
    }
}
