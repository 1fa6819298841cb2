//! Writes that are written down before they are done, and what the next supervisor makes of one that was under way.

use std::io::{self, Write as _};
use std::ops::Range;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::sync::atomic::Ordering::{Acquire, Release};

use nix::sys::stat::fstat;

use super::super::recovery;
use super::layout::{ZONE_AT, field, state, word};
use super::{Destination, Journal, LANDING, Lines, NOBODY, PATH, Piece, Source, Unfinished, ZONE, at};
use crate::sys::shared_memory;

impl Journal {
    /// Writes a piece, or says why not, and how much of it was written. It is written down before.
    pub(crate) fn write(
        &mut self,
        to: Destination<'_>,
        piece: Piece,
        lines: Lines,
    ) -> Result<(), (io::Error, usize)> {
        let size = match to.identity {
            Some(_) => fstat(to.file).map_err(|error| (error.into(), 0))?.st_size,
            None => 0,
        };
        self.intend(&to, piece, lines, u64::try_from(size).unwrap_or(0));
        if let Some(other) = lines.ends {
            self.set_mid_line(other, false);
        }
        let mut file = to.file;
        let bytes = self.bytes(piece);
        let mut written = 0;
        let result = loop {
            if written == bytes.len() {
                break Ok(());
            }
            match file.write(&bytes[written..]) {
                Ok(0) => break Err((io::ErrorKind::WriteZero.into(), written)),
                Ok(count) => written += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break Err((error, written)),
            }
        };
        if let (Some(owner), Some(&last)) = (lines.owner, bytes[..written].last()) {
            self.set_mid_line(owner, last != b'\n');
        }
        result
    }

    fn intend(&mut self, to: &Destination<'_>, piece: Piece, lines: Lines, size: u64) {
        let turn = self.turn;
        self.turn = 1 - turn;
        let path = to.path.as_os_str().as_bytes();
        let path = &path[..path.len().min(PATH)];
        self.notes[turn * PATH..turn * PATH + path.len()].copy_from_slice(path);
        let (device, inode) = to.identity.unwrap_or((0, 0));
        let source = match piece.source {
            Source::Zone => 0,
            Source::Batch => 1,
            Source::Note => 2,
        };
        let record = [
            (field::DEVICE, device),
            (field::INODE, inode),
            (field::SIZE, size),
            (field::SOURCE, source),
            (field::START, piece.start as u64),
            (field::LEN, piece.len as u64),
            (field::TAIL, piece.tail as u64),
            (field::FROM, piece.from as u64),
            (field::CURSOR, piece.cursor as u64),
            (field::OWNER, lines.owner.unwrap_or(NOBODY)),
            (field::ENDS, lines.ends.unwrap_or(NOBODY)),
            (field::PATH_LEN, path.len() as u64),
        ];
        for (field, value) in record {
            self.header[word::WRITES[turn] + field].store(value, Release);
        }
        self.header[word::STATE].store(state::WRITING[turn], Release);
    }

    /// The chunk is done with but for `rest`, which is kept for its stream.
    pub(crate) fn done(&mut self, rest: Range<usize>) {
        let (stream, rest) = (self.stream, rest.start..rest.end.max(rest.start));
        self.keep(stream, rest);
        self.header[word::STATE].store(state::IDLE, Release);
        (self.begin, self.end) = (LANDING, LANDING);
    }

    /// Ends what was on its way: what was to be written is, and what is left is kept for its stream.
    pub(super) fn recover(&mut self) {
        let state = self.header[word::STATE].load(Acquire);
        let begin = at(self.header[word::BEGIN].load(Acquire));
        let stream = self.header[word::STREAM].load(Acquire);
        let end = at(self.header[word::END].load(Acquire));
        let rest = match state {
            state::LANDING => {
                let position = shared_memory::position(&self.file).unwrap_or(0);
                let end = at(position.saturating_sub(ZONE_AT));
                // Otherwise nothing has left the pipe, and what was held still is.
                (end > LANDING).then_some(begin..end)
            }
            state::LANDED => Some(begin..end),
            _ => {
                let which = state::WRITING.iter().position(|&writing| writing == state);
                which.map(|which| self.end_write(which)..end)
            }
        };
        if let Some(rest) = rest.filter(|rest| rest.start <= rest.end && rest.end <= ZONE) {
            self.keep(stream, rest);
        }
        self.header[word::STATE].store(state::IDLE, Release);
    }

    fn end_write(&mut self, which: usize) -> usize {
        let field = |field: usize| self.header[word::WRITES[which] + field].load(Acquire);
        let (owner, ends) = (field(field::OWNER), field(field::ENDS));
        let cursor = at(field(field::CURSOR));
        if let Some(unfinished) = self.unfinished(which) {
            if ends != NOBODY {
                self.set_mid_line(ends, false);
            }
            let last = unfinished.tail.last().or_else(|| unfinished.bytes.last());
            if owner != NOBODY
                && let Some(&last) = last
            {
                self.set_mid_line(owner, last != b'\n');
            }
            if let Err(error) = recovery::finish(&unfinished) {
                tracing::warn!(path = %unfinished.path.display(), %error, "log file takes no output");
                return at(self.header[word::WRITES[which] + field::FROM].load(Acquire));
            }
        }
        cursor
    }

    /// The write that is written down.
    pub(super) fn unfinished(&self, which: usize) -> Option<Unfinished> {
        let field = |field: usize| self.header[word::WRITES[which] + field].load(Acquire);
        let (start, len, tail) = (at(field(field::START)), at(field(field::LEN)), at(field(field::TAIL)));
        let region: &[u8] = match field(field::SOURCE) {
            0 => &self.zone,
            1 => &self.batch,
            2 => &self.notes,
            _ => return None,
        };
        let middle = start.checked_add(len)?;
        let path_len = at(field(field::PATH_LEN)).min(PATH);
        let path = &self.notes[which * PATH..which * PATH + path_len];
        let (device, inode) = (field(field::DEVICE), field(field::INODE));
        Some(Unfinished {
            path: PathBuf::from(std::ffi::OsStr::from_bytes(path)),
            identity: (inode != 0).then_some((device, inode)),
            size: field(field::SIZE),
            bytes: region.get(start..middle)?.to_vec(),
            tail: region.get(middle..middle.checked_add(tail)?)?.to_vec(),
        })
    }
}
