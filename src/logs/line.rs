//! Keeps lines whole on their way from a pipe to a file.
//!
//! A pipe hands out chunks that end anywhere. Where a stream has its file to itself, chunks pass through as they are:
//! the file is byte for byte what the app wrote. Where several streams share a file, or where lines are stamped, only
//! whole lines are written, and an unfinished one is held for at most `PARTIAL_TIMEOUT` and `HELD_MAX` bytes.

use std::time::{Duration, Instant};

use jiff::Timestamp;

use super::stamp::Stamp;
use super::writer::{Outcome, StreamKey, Writer};

/// How long an unfinished line waits for its end before it is written as it is.
pub(crate) const PARTIAL_TIMEOUT: Duration = Duration::from_millis(200);
/// How much of an unfinished line is held, in bytes; longer ones are written in pieces.
const HELD_MAX: usize = 64 * 1024;
/// Stamped lines are collected up to this size before they are written, in bytes.
const BATCH: usize = 128 * 1024;

/// Whether other streams write to the same file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Company {
    Alone,
    Shared,
}

/// The time of a turn: one reading of each clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Now {
    pub(crate) instant: Instant,
    pub(crate) wall: Timestamp,
}

/// What a stream has read and not yet written.
#[derive(Debug)]
pub(crate) struct Framing {
    stream: StreamKey,
    stamp: Option<Stamp>,
    /// What goes before each line, after the stamp.
    mark: String,
    held: Vec<u8>,
    held_since: Option<Instant>,
    /// A part of the current line is lost: the rest of it is skipped.
    skips_line: bool,
}

impl Framing {
    pub(crate) const fn new(stream: StreamKey, stamp: Option<Stamp>, mark: String) -> Self {
        Self { stream, stamp, mark, held: Vec::new(), held_since: None, skips_line: false }
    }

    /// When what is held has to be written, finished or not.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.held_since.map(|since| since + PARTIAL_TIMEOUT)
    }

    /// Takes a chunk as it was read and writes what is due. `batch` is scratch memory.
    pub(crate) fn feed(
        &mut self,
        mut chunk: &[u8],
        company: Company,
        writer: &mut Writer,
        batch: &mut Vec<u8>,
        now: Now,
    ) {
        if self.skips_line {
            match memchr::memchr(b'\n', chunk) {
                Some(end) => {
                    self.skips_line = false;
                    writer.count_skipped(end + 1);
                    chunk = &chunk[end + 1..];
                }
                None => return writer.count_skipped(chunk.len()),
            }
        }
        let alone = company == Company::Alone;
        let end =
            if alone { chunk.len() } else { memchr::memrchr(b'\n', chunk).map_or(0, |newline| newline + 1) };
        let (due, rest) = chunk.split_at(end);
        if end > 0 {
            if !self.held.is_empty() {
                let held = std::mem::take(&mut self.held);
                self.write(&held, writer, batch, now);
            }
            self.held_since = None;
            self.write(due, writer, batch, now);
        }
        self.hold(rest, writer, batch, now);
    }

    /// Writes what is held, without waiting for the end of its line.
    pub(crate) fn flush(&mut self, writer: &mut Writer, batch: &mut Vec<u8>, now: Now) {
        self.held_since = None;
        let held = std::mem::take(&mut self.held);
        self.write(&held, writer, batch, now);
    }

    fn hold(&mut self, rest: &[u8], writer: &mut Writer, batch: &mut Vec<u8>, now: Now) {
        if rest.is_empty() || self.skips_line {
            return;
        }
        if self.held.len() + rest.len() > HELD_MAX {
            self.flush(writer, batch, now);
            return self.write(rest, writer, batch, now);
        }
        self.held.extend_from_slice(rest);
        self.held_since.get_or_insert(now.instant);
    }

    fn write(&mut self, bytes: &[u8], writer: &mut Writer, batch: &mut Vec<u8>, now: Now) {
        if bytes.is_empty() || self.skips_line {
            return;
        }
        let stream = self.stream;
        if self.stamp.is_none() && self.mark.is_empty() {
            if writer.append(stream, bytes, now.instant) == Outcome::Dropped {
                self.skips_line = bytes.last() != Some(&b'\n');
            }
            return;
        }
        let mut begin_line = |batch: &mut Vec<u8>| {
            if let Some(stamp) = &mut self.stamp {
                batch.extend_from_slice(stamp.prefix(now.wall));
            }
            batch.extend_from_slice(self.mark.as_bytes());
        };
        let mut outcome = Outcome::Written;
        let mut begins_line = !writer.is_mid_line_of(stream);
        let mut start = 0;
        batch.clear();
        for newline in memchr::memchr_iter(b'\n', bytes) {
            if begins_line {
                begin_line(batch);
            }
            batch.extend_from_slice(&bytes[start..=newline]);
            begins_line = true;
            start = newline + 1;
            if batch.len() >= BATCH {
                outcome = writer.append(stream, batch, now.instant);
                batch.clear();
            }
        }
        if start < bytes.len() {
            if begins_line {
                begin_line(batch);
            }
            batch.extend_from_slice(&bytes[start..]);
        }
        if !batch.is_empty() {
            outcome = writer.append(stream, batch, now.instant);
        }
        if outcome == Outcome::Dropped {
            self.skips_line = bytes.last() != Some(&b'\n');
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::tz::TimeZone;

    fn now() -> Now {
        Now { instant: Instant::now(), wall: "2024-02-05T13:04:09Z".parse().unwrap() }
    }

    /// Feeds chunks of two streams and says what the file holds before and after the last flush.
    fn check(format: &str, company: Company, chunks: &[(u64, &str)], before: &str, after: &str) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.log");
        let now = now();
        let mut writer = Writer::new(path.clone(), None, now.instant);
        let mut batch = Vec::new();
        let mut framings =
            [1, 2].map(|key| Framing::new(key, Stamp::in_zone(format, TimeZone::UTC), String::new()));
        for &(stream, chunk) in chunks {
            let framing = &mut framings[usize::try_from(stream - 1).unwrap()];
            framing.feed(chunk.as_bytes(), company, &mut writer, &mut batch, now);
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), before);
        for framing in &mut framings {
            framing.flush(&mut writer, &mut batch, now);
            assert_eq!(framing.deadline(), None);
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), after);
    }

    #[test]
    fn alone_and_unstamped_is_byte_for_byte() {
        check("", Company::Alone, &[(1, "a\nb"), (1, "c"), (1, "\n\nd")], "a\nbc\n\nd", "a\nbc\n\nd");
    }

    #[test]
    fn shared_lines_are_whole() {
        let chunks = [(1, "on"), (2, "tw"), (1, "e\nthr"), (2, "o\n"), (1, "ee\nlast")];
        check("", Company::Shared, &chunks, "one\ntwo\nthree\n", "one\ntwo\nthree\nlast");
    }

    #[test]
    fn every_line_gets_one_stamp() {
        let chunks = [(1, "a\nb"), (1, "c\n"), (1, "\nd")];
        let text = "09: a\n09: bc\n09: \n09: d";
        check("ss", Company::Alone, &chunks, text, text);
        check("ss", Company::Shared, &chunks, "09: a\n09: bc\n09: \n", text);
    }

    #[test]
    fn a_mark_follows_the_stamp() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.log");
        let now = now();
        let mut writer = Writer::new(path.clone(), None, now.instant);
        let stamps = [None, Stamp::in_zone("ss", TimeZone::UTC)];
        for (stamp, expected) in
            stamps.into_iter().zip(["[hook] a\n[hook] b\n", "09: [hook] a\n09: [hook] b\n"])
        {
            let mut framing = Framing::new(1, stamp, String::from("[hook] "));
            framing.feed(b"a\nb\n", Company::Alone, &mut writer, &mut Vec::new(), now);
            assert!(std::fs::read_to_string(&path).unwrap().ends_with(expected));
        }
    }

    #[test]
    fn a_line_without_end_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.log");
        let now = now();
        let mut writer = Writer::new(path.clone(), None, now.instant);
        let mut batch = Vec::new();
        let mut framing = Framing::new(1, Stamp::in_zone("ss", TimeZone::UTC), String::new());
        for _ in 0..1000 {
            framing.feed(&[b'x'; 10_000], Company::Shared, &mut writer, &mut batch, now);
            assert!(framing.held.capacity() <= 2 * HELD_MAX);
        }
        framing.feed(b"\n", Company::Shared, &mut writer, &mut batch, now);
        let text = std::fs::read(&path).unwrap();
        assert_eq!(text.len(), 4 + 10_000_000 + 1);
        assert!(text.starts_with(b"09: xxx"));
    }

    #[test]
    fn a_line_that_lost_its_middle_is_not_glued_to_the_next() {
        let now = now();
        let mut writer = Writer::new("/dev/full".into(), None, now.instant);
        let mut batch = Vec::new();
        let mut framing = Framing::new(1, None, String::new());
        framing.feed(b"lost par", Company::Alone, &mut writer, &mut batch, now);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.log");
        let mut writer = Writer::new(path.clone(), None, now.instant);
        framing.feed(b"t\nwhole\n", Company::Alone, &mut writer, &mut batch, now);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "whole\n");
    }
}
