//! The beginning of a line that is too long to wait in its socket, in memory that the keeper holds.
//!
//! What is about to be taken out of the socket is noted first, together with what is then known of the line; the
//! kernel counts how much of it was taken ([`scm::count_down`]). So the next supervisor finishes the taking, whenever
//! this one was killed, and goes on at the right byte: it neither takes the end of a long message for a message nor
//! counts a skipped one twice.

use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use crate::node::channel::{LINE_KEPT, Lines};
use crate::sys::{memfd, scm};

const MAGIC: u64 = 0x706d_5f69_6e62_6f78;
const WORDS: usize = 6;
/// Where the head of the line begins.
const HEAD_AT: u64 = 64;

/// What becomes of the line with what is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Then {
    /// Its end has not come yet.
    GoesOn = 0,
    /// It is over.
    Ends = 1,
    /// It is over and was longer than is read.
    Skipped = 2,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Note {
    /// How many bytes of the line are consumed when what is noted is taken.
    consumed: u64,
    /// How many bytes of its head are here.
    head: u64,
    /// How many bytes are being taken.
    taking: u64,
    /// A [`Then`].
    then: u64,
    /// How many lines were skipped in the channel's life.
    skipped: u64,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Inbox {
    file: File,
    note: Note,
}

impl Inbox {
    /// New memory, for [`Inbox::descriptor`] to be held.
    pub(super) fn create() -> io::Result<Self> {
        let inbox = Self { file: memfd::create(c"pm-inbox")?.into(), note: Note::default() };
        inbox.write()?;
        Ok(inbox)
    }

    pub(super) fn descriptor(&self) -> io::Result<OwnedFd> {
        Ok(self.file.try_clone()?.into())
    }

    /// What a former supervisor left: takes what it was taking, and says what is known of the line.
    pub(super) fn adopt(
        file: OwnedFd,
        socket: BorrowedFd<'_>,
        scratch: &mut [u8],
    ) -> io::Result<(Self, Lines)> {
        let file = File::from(file);
        let mut bytes = [0; WORDS * 8];
        file.read_exact_at(&mut bytes, 0)?;
        let words: Vec<u64> = bytes
            .chunks_exact(8)
            .map(|word| word.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
            .collect();
        let &[MAGIC, consumed, head, taking, then, skipped] = words.as_slice() else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        let mut inbox = Self { file, note: Note { consumed, head, taking, then, skipped } };
        if taking > 0 {
            let all = usize::try_from(taking).unwrap_or(0);
            // Not begun when nobody has told the kernel to count.
            let left = scm::left_to_receive(socket)?.unwrap_or(all).min(all);
            scm::count_down(socket, left)?;
            scm::consume(socket, left, scratch)?;
            inbox.taken()?;
        }
        scm::peek_at_front(socket)?;
        let mut head = vec![0; usize::try_from(inbox.note.head).unwrap_or(0).min(LINE_KEPT)];
        inbox.file.read_exact_at(&mut head, HEAD_AT)?;
        let lines = Lines::resumed(head, inbox.note.consumed);
        Ok((inbox, lines))
    }

    /// How many lines were skipped.
    pub(super) const fn skipped(&self) -> u64 {
        self.note.skipped
    }

    /// Takes `count` bytes out of the socket. `lines` is what is known of the line with them.
    pub(super) fn take(
        &mut self,
        socket: BorrowedFd<'_>,
        count: usize,
        lines: &Lines,
        then: Then,
        scratch: &mut [u8],
    ) -> nix::Result<()> {
        if let Err(error) = self.note_down(count, lines, then) {
            // ENOMEM: then it is only this supervisor that knows.
            tracing::warn!(%error, "cannot note what is read of a long message");
        }
        scm::count_down(socket, count)?;
        scm::consume(socket, count, scratch)?;
        if let Err(error) = self.taken() {
            tracing::warn!(%error, "cannot note what was read of a long message");
        }
        scm::peek_at_front(socket)
    }

    fn note_down(&mut self, count: usize, lines: &Lines, then: Then) -> io::Result<()> {
        let (consumed, head) = lines.kept();
        let here = usize::try_from(self.note.head).unwrap_or(0).min(head.len());
        if head.len() > here {
            self.file.write_all_at(&head[here..], HEAD_AT + here as u64)?;
        }
        let (head, taking, then) = (head.len() as u64, count as u64, then as u64);
        self.note = Note { consumed, head, taking, then, skipped: self.note.skipped };
        self.write()
    }

    /// What was noted is taken.
    fn taken(&mut self) -> io::Result<()> {
        self.note.taking = 0;
        if self.note.then != Then::GoesOn as u64 {
            self.note.skipped += u64::from(self.note.then == Then::Skipped as u64);
            self.note = Note { skipped: self.note.skipped, ..Note::default() };
        }
        self.write()
    }

    /// One short write, which a SIGKILL does not cut.
    fn write(&self) -> io::Result<()> {
        let Note { consumed, head, taking, then, skipped } = self.note;
        let words: [u64; WORDS] = [MAGIC, consumed, head, taking, then, skipped];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.file.write_all_at(&bytes, 0)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    /// Reads "aaaa…\n" of 30 bytes in three pieces of ten, is killed at one of the steps of the second (or of the last)
    /// piece, and is followed by another.
    #[track_caller]
    fn check(killed_at: usize, last: bool, expected: (u64, &[u8], u64, &[u8])) {
        let (ours, theirs) = scm::line_pair().unwrap();
        let mut scratch = [0; 64];
        scm::send(theirs.as_fd(), b"0123456789abcdefghijABCDEFGHI\nnext\n", None).unwrap();
        let mut inbox = Inbox::create().unwrap();
        let mut lines = Lines::default();
        lines.keep(b"0123456789");
        inbox.take(ours.as_fd(), 10, &lines, Then::GoesOn, &mut scratch).unwrap();
        lines.keep(b"abcdefghij");
        let (rest, then) = if last {
            inbox.take(ours.as_fd(), 10, &lines, Then::GoesOn, &mut scratch).unwrap();
            (Lines::default(), Then::Skipped)
        } else {
            (lines, Then::GoesOn)
        };
        let steps: [&mut dyn FnMut(&mut Inbox); 5] = [
            &mut |inbox| inbox.note_down(10, &rest, then).unwrap(),
            &mut |_| scm::count_down(ours.as_fd(), 10).unwrap(),
            &mut |_| scm::consume(ours.as_fd(), 4, &mut [0; 64]).unwrap(),
            &mut |_| scm::consume(ours.as_fd(), 6, &mut [0; 64]).unwrap(),
            &mut |inbox| inbox.taken().unwrap(),
        ];
        for step in steps.into_iter().take(killed_at) {
            step(&mut inbox);
        }
        let file = inbox.descriptor().unwrap();
        drop(inbox);
        let (inbox, lines) = Inbox::adopt(file, ours.as_fd(), &mut scratch).unwrap();
        let mut buffer = [0; 64];
        let seen = scm::peek(ours.as_fd(), &mut buffer).unwrap();
        let (consumed, head) = lines.kept();
        assert_eq!(
            (consumed, head, inbox.skipped(), &buffer[..seen.count]),
            expected,
            "killed at {killed_at}"
        );
    }

    #[test]
    fn a_supervisor_killed_at_any_step_loses_no_byte_and_reads_none_twice() {
        check(0, false, (10, b"0123456789", 0, b"abcdefghijABCDEFGHI\nnext\n"));
        check(0, true, (20, b"0123456789abcdefghij", 0, b"ABCDEFGHI\nnext\n"));
        for killed_at in 1..=5 {
            check(killed_at, false, (20, b"0123456789abcdefghij", 0, b"ABCDEFGHI\nnext\n"));
            check(killed_at, true, (0, b"", 1, b"next\n"));
        }
    }

    #[test]
    fn what_is_no_inbox_is_not_believed() {
        let (ours, _theirs) = scm::line_pair().unwrap();
        for content in [&b""[..], &[7; 200]] {
            let file = memfd::create(c"pm-test").unwrap();
            File::from(file.try_clone().unwrap()).write_all_at(content, 0).unwrap();
            assert!(Inbox::adopt(file, ours.as_fd(), &mut [0; 64]).is_err());
        }
    }
}
