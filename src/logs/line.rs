//! Keeps lines whole on their way from a pipe to a file.
//!
//! A pipe hands out chunks that end anywhere. Where a stream has its file to itself, chunks pass through as they are:
//! the file is byte for byte what the app wrote. Where several streams share a file, or where lines are stamped, only
//! whole lines are written, and an unfinished one is held for at most `PARTIAL_TIMEOUT` and `HELD_MAX` bytes.

use std::ops::Range;
use std::time::{Duration, Instant};

use jiff::Timestamp;

use super::journal::{Dropped, HELD_MAX, Journal, Piece, StreamKey};
use super::recent::Loss;
use super::stamp::Stamp;
use super::writer::{Outcome, Writer};
use crate::model::spec::Overflow;

/// How long an unfinished line waits for its end before it is written as it is.
pub(crate) const PARTIAL_TIMEOUT: Duration = Duration::from_millis(200);

/// Whether other streams write to the same file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Company {
    Alone,
    Shared,
}

/// What becomes of a line that has no end yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unfinished {
    /// It waits for it where it must not be torn.
    Held,
    /// It is written as it is.
    Written,
}

/// How far [`Framing::feed`] has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum Fed {
    /// Everything is done with.
    All,
    /// The file takes no more, and the app is to wait: what is held is to be fed again before anything else.
    Part,
}

/// The time of a turn: one reading of each clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Now {
    pub(crate) instant: Instant,
    pub(crate) wall: Timestamp,
}

/// What goes before each line of a stream.
#[derive(Debug)]
pub(crate) struct Prefix {
    pub(crate) stamp: Option<Stamp>,
    /// After the stamp.
    pub(crate) mark: String,
}

impl Prefix {
    const fn is_empty(&self) -> bool {
        self.stamp.is_none() && self.mark.is_empty()
    }

    fn begin_line(&mut self, journal: &mut Journal, now: Now) {
        if let Some(stamp) = &mut self.stamp {
            journal.stamp(stamp.prefix(now.wall));
        }
        journal.stamp(self.mark.as_bytes());
    }
}

/// What a stream has read and not yet written.
#[derive(Debug)]
pub(crate) struct Framing {
    stream: StreamKey,
    pub(crate) prefix: Prefix,
    pub(crate) overflow: Overflow,
    /// Also in the journal.
    held: Vec<u8>,
    held_since: Option<Instant>,
    /// A part of the current line is lost: the rest of it is skipped.
    skips_line: bool,
}

impl Framing {
    /// `skips_line` is for a stream of another supervisor that may be in the middle of a line that is partly lost.
    pub(crate) const fn new(stream: StreamKey, prefix: Prefix, overflow: Overflow, skips_line: bool) -> Self {
        Self { stream, prefix, overflow, held: Vec::new(), held_since: None, skips_line }
    }

    /// When what is held has to be written, finished or not.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.held_since.map(|since| since + PARTIAL_TIMEOUT)
    }

    /// The beginning of the line that has not ended.
    pub(crate) fn held(&self) -> &[u8] {
        &self.held
    }

    /// Writes what is due of what is in the journal, which is done with then.
    pub(crate) fn feed(
        &mut self,
        journal: &mut Journal,
        company: Company,
        unfinished: Unfinished,
        writer: &mut Writer,
        now: Now,
    ) -> Fed {
        let Range { mut start, end: all } = journal.range();
        if self.skips_line {
            let newline = memchr::memchr(b'\n', journal.zone(start..all));
            let count = newline.map_or(all - start, |end| end + 1);
            let dropped = Dropped { bytes: count as u64, lines: u64::from(newline.is_some()) };
            writer.count_skipped(count);
            journal.count_dropped(self.stream, dropped);
            start += count;
            self.skip_line(journal, newline.is_none());
        }
        let due = if company == Company::Alone || unfinished == Unfinished::Written {
            all
        } else {
            let newline = memchr::memrchr(b'\n', journal.zone(start..all));
            match newline.map_or(start, |newline| start + newline + 1) {
                end if all - end > HELD_MAX => all,
                end => end,
            }
        };
        let mut fed = Fed::All;
        let mut rest = due;
        if due > start {
            self.held_since = None;
            rest = self.write(start..due, journal, writer, now);
            if rest < due {
                fed = Fed::Part;
            } else if self.skips_line {
                rest = all;
            }
        }
        self.hold(journal.zone(rest..all).to_vec(), now);
        if fed == Fed::Part {
            self.held_since = None;
        }
        journal.done(rest..all);
        fed
    }

    /// Ends the line that is in the file already, if its end is at hand: what follows is held, for another file.
    /// Returns whether it was.
    pub(crate) fn end_line(&mut self, journal: &mut Journal, writer: &mut Writer, now: Now) -> (Fed, bool) {
        let Range { start, end: all } = journal.range();
        let newline = memchr::memchr(b'\n', journal.zone(start..all));
        let end = newline.map_or(all, |newline| start + newline + 1);
        let reached = self.write(start..end, journal, writer, now);
        self.hold(journal.zone(reached..all).to_vec(), now);
        journal.done(reached..all);
        self.held_since = None;
        (if reached == end { Fed::All } else { Fed::Part }, newline.is_some() && reached == end)
    }

    /// A part of the output was thrown away.
    pub(crate) fn lost(&mut self, journal: &Journal, loss: Loss) {
        journal.count_dropped(self.stream, loss.dropped);
        self.skip_line(journal, loss.ends_mid_line);
    }

    fn hold(&mut self, rest: Vec<u8>, now: Now) {
        if rest.is_empty() {
            self.held_since = None;
        } else {
            self.held_since.get_or_insert(now.instant);
        }
        self.held = rest;
    }

    fn skip_line(&mut self, journal: &Journal, skips: bool) {
        self.skips_line = skips;
        journal.set_skips(self.stream, skips);
    }

    /// Returns how far it has come; what is lost is done with.
    fn write(&mut self, range: Range<usize>, journal: &mut Journal, writer: &mut Writer, now: Now) -> usize {
        let ends_line = journal.zone(range.clone()).last() == Some(&b'\n');
        let end = range.end;
        let result = if self.prefix.is_empty() {
            self.append(Journal::as_arrived(&range), journal, writer, now)
        } else {
            self.write_stamped(range, journal, writer, now)
        };
        match result {
            Appended::Written => end,
            Appended::Lost => {
                if !ends_line {
                    self.skip_line(journal, true);
                }
                end
            }
            Appended::Refused { from } => from,
        }
    }

    fn write_stamped(
        &mut self,
        range: Range<usize>,
        journal: &mut Journal,
        writer: &mut Writer,
        now: Now,
    ) -> Appended {
        let mut result = Appended::Written;
        let mut first = range.start;
        let mut begins_line = !writer.is_mid_line_of(self.stream);
        let mut start = range.start;
        while start < range.end {
            let newline = memchr::memchr(b'\n', journal.zone(start..range.end));
            let end = newline.map_or(range.end, |newline| start + newline + 1);
            if begins_line {
                self.prefix.begin_line(journal, now);
            }
            journal.copy(start..end);
            begins_line = newline.is_some();
            start = end;
            if journal.is_batch_full() || start == range.end {
                let batch = journal.take_batch(&(first..start));
                result = self.append(batch, journal, writer, now);
                if matches!(result, Appended::Refused { .. }) {
                    break;
                }
                first = start;
            }
        }
        result
    }

    fn append(&self, piece: Piece, journal: &mut Journal, writer: &mut Writer, now: Now) -> Appended {
        match writer.append(journal, self.stream, piece, self.overflow, now.instant) {
            Outcome::Written => Appended::Written,
            Outcome::Refused(written) if piece.is_stamped() => {
                debug_assert_eq!(written, 0, "taken back");
                Appended::Refused { from: piece.from() }
            }
            Outcome::Refused(written) => Appended::Refused { from: piece.from() + written },
            Outcome::Dropped(lost) => {
                let bytes = journal.bytes(piece);
                let lines = memchr::memchr_iter(b'\n', &bytes[bytes.len() - lost..]).count() as u64;
                journal.count_dropped(self.stream, Dropped { bytes: lost as u64, lines });
                Appended::Lost
            }
        }
    }
}

/// What became of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Appended {
    Written,
    /// The end of them is lost.
    Lost,
    /// What is behind this place of the zone is to be tried again.
    Refused {
        from: usize,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::tz::TimeZone;

    fn now() -> Now {
        Now { instant: Instant::now(), wall: "2024-02-05T13:04:09Z".parse().unwrap() }
    }

    fn prefix(format: &str, mark: &str) -> Prefix {
        Prefix { stamp: Stamp::in_zone(format, TimeZone::UTC), mark: mark.to_owned() }
    }

    /// As if it had come from the pipe.
    fn feed(
        framing: &mut Framing,
        chunk: &[u8],
        company: Company,
        writer: &mut Writer,
        journal: &mut Journal,
        now: Now,
    ) {
        let (ours, theirs) = crate::sys::pipe::pipe_for_output().unwrap();
        assert_eq!(nix::unistd::write(&theirs, chunk), Ok(chunk.len()));
        assert_eq!(journal.receive(framing.stream, framing.held(), &ours, chunk.len()), Ok(chunk.len()));
        assert_eq!(framing.feed(journal, company, Unfinished::Held, writer, now), Fed::All);
    }

    fn flush(framing: &mut Framing, writer: &mut Writer, journal: &mut Journal, now: Now) {
        journal.resume(framing.stream, framing.held());
        assert_eq!(framing.feed(journal, Company::Shared, Unfinished::Written, writer, now), Fed::All);
    }

    /// Feeds chunks of two streams and says what the file holds before and after the last flush.
    fn check(format: &str, company: Company, chunks: &[(u64, &str)], before: &str, after: &str) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.log");
        let now = now();
        let mut writer = Writer::new(path.clone(), None, now.instant);
        let mut journal = Journal::private().unwrap();
        let mut framings = [1, 2].map(|key| Framing::new(key, prefix(format, ""), Overflow::Drop, false));
        for &(stream, chunk) in chunks {
            let framing = &mut framings[usize::try_from(stream - 1).unwrap()];
            feed(framing, chunk.as_bytes(), company, &mut writer, &mut journal, now);
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), before);
        for framing in &mut framings {
            flush(framing, &mut writer, &mut journal, now);
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
        let mut journal = Journal::private().unwrap();
        for (format, expected) in [("", "[hook] a\n[hook] b\n"), ("ss", "09: [hook] a\n09: [hook] b\n")] {
            let mut framing = Framing::new(1, prefix(format, "[hook] "), Overflow::Drop, false);
            feed(&mut framing, b"a\nb\n", Company::Alone, &mut writer, &mut journal, now);
            assert!(std::fs::read_to_string(&path).unwrap().ends_with(expected));
        }
    }

    #[test]
    fn a_line_without_end_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.log");
        let now = now();
        let mut writer = Writer::new(path.clone(), None, now.instant);
        let mut journal = Journal::private().unwrap();
        let mut framing = Framing::new(1, prefix("ss", ""), Overflow::Drop, false);
        for _ in 0..1000 {
            feed(&mut framing, &[b'x'; 10_000], Company::Shared, &mut writer, &mut journal, now);
            assert!(framing.held.capacity() <= 2 * HELD_MAX);
        }
        feed(&mut framing, b"\n", Company::Shared, &mut writer, &mut journal, now);
        let text = std::fs::read(&path).unwrap();
        assert_eq!(text.len(), 4 + 10_000_000 + 1);
        assert!(text.starts_with(b"09: xxx"));
    }

    #[test]
    fn a_line_that_lost_its_middle_is_not_glued_to_the_next() {
        let now = now();
        let mut writer = Writer::new("/dev/full".into(), None, now.instant);
        let mut journal = Journal::private().unwrap();
        let mut framing = Framing::new(1, prefix("", ""), Overflow::Drop, false);
        feed(&mut framing, b"lost par", Company::Alone, &mut writer, &mut journal, now);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.log");
        let mut writer = Writer::new(path.clone(), None, now.instant);
        feed(&mut framing, b"t\nwhole\n", Company::Alone, &mut writer, &mut journal, now);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "whole\n");
    }
}
