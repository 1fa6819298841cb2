//! The last lines an instance wrote, for the message of a start or reload that failed.

/// How much of an instance's output is kept, in bytes.
const KEPT: usize = 4096;
/// How much may pile up before the oldest part is cut off; less would mean moving the rest at every line.
const LIMIT: usize = KEPT + KEPT / 2;
/// How many lines are handed out at most.
pub const LINES_MAX: usize = 40;

use super::journal::Dropped;

/// Which of its two streams an instance wrote to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stream {
    /// Standard output.
    Out,
    /// Standard error.
    Err,
}

/// The end of an instance's output, both streams in the order they were read. Never larger than 6 KiB.
#[derive(Debug, Default)]
pub(crate) struct Recent {
    bytes: Vec<u8>,
    /// Who wrote the last byte: the other stream begins a line of its own.
    last: Option<Stream>,
    /// The first line lost its beginning.
    is_cut: bool,
    /// What was dropped of each stream, as far as the pump has got.
    dropped: [Dropped; 2],
    /// What was dropped since.
    losses: [Loss; 2],
}

/// Output that was taken from a full pipe and thrown away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Loss {
    pub(crate) dropped: Dropped,
    /// What comes next is the rest of a line.
    pub(crate) ends_mid_line: bool,
}

impl Recent {
    /// Counts what is thrown away.
    pub(crate) fn lose(&mut self, stream: Stream, chunk: &[u8]) {
        let loss = &mut self.losses[stream as usize];
        loss.dropped.bytes += chunk.len() as u64;
        loss.dropped.lines += memchr::memchr_iter(b'\n', chunk).count() as u64;
        loss.ends_mid_line = chunk.last().is_some_and(|&last| last != b'\n');
    }

    /// What was thrown away since the last time.
    pub(crate) fn take_loss(&mut self, stream: Stream) -> Option<Loss> {
        let loss = std::mem::take(&mut self.losses[stream as usize]);
        (loss.dropped.bytes > 0).then_some(loss)
    }

    /// What was dropped of a stream, but for what [`take_loss`](Self::take_loss) still gives.
    pub(crate) const fn set_dropped(&mut self, stream: Stream, dropped: Dropped) {
        self.dropped[stream as usize] = dropped;
    }

    /// Everything that was dropped of the instance's output.
    pub(crate) fn dropped(&self) -> Dropped {
        let all = self.dropped.iter().chain(self.losses.iter().map(|loss| &loss.dropped));
        all.fold(Dropped::default(), |sum, next| Dropped {
            bytes: sum.bytes + next.bytes,
            lines: sum.lines + next.lines,
        })
    }

    /// Takes in what was read.
    pub(crate) fn push(&mut self, stream: Stream, chunk: &[u8]) {
        if self.last.is_some_and(|last| last != stream)
            && self.bytes.last().is_some_and(|&last| last != b'\n')
        {
            self.bytes.push(b'\n');
        }
        self.last = Some(stream);
        let chunk = if chunk.len() > KEPT {
            self.bytes.clear();
            self.is_cut = true;
            &chunk[chunk.len() - KEPT..]
        } else {
            chunk
        };
        if self.bytes.len() + chunk.len() > LIMIT {
            let surplus = self.bytes.len() + chunk.len() - KEPT;
            self.is_cut |= self.bytes.get(surplus.saturating_sub(1)) != Some(&b'\n');
            self.bytes.drain(..surplus.min(self.bytes.len()));
        }
        if self.bytes.capacity() < self.bytes.len() + chunk.len() && self.bytes.len() > KEPT / 4 {
            self.bytes.reserve_exact(LIMIT - self.bytes.len());
        }
        self.bytes.extend_from_slice(chunk);
    }

    /// The last `count` lines, oldest first, at most [`LINES_MAX`]. What is not UTF-8 is replaced; a line that lost its
    /// beginning is shown only when it is the only one.
    pub(crate) fn lines(&self, count: usize) -> Vec<String> {
        let text = String::from_utf8_lossy(&self.bytes);
        let all: Vec<&str> = text.lines().collect();
        let whole = if self.is_cut && all.len() > 1 { &all[1..] } else { &all[..] };
        let from = whole.len().saturating_sub(count.min(LINES_MAX));
        whole[from..].iter().map(|&line| line.to_owned()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_take_turns_without_mixing_lines() {
        let mut recent = Recent::default();
        recent.push(Stream::Out, b"one\ntw");
        recent.push(Stream::Err, b"oops\n");
        recent.push(Stream::Out, b"o\n");
        assert_eq!(recent.lines(9), ["one", "tw", "oops", "o"]);
        assert_eq!(recent.lines(2), ["oops", "o"]);
    }

    #[test]
    fn memory_is_bounded_and_a_cut_line_is_not_shown() {
        let mut recent = Recent::default();
        for n in 0..10_000 {
            recent.push(Stream::Out, format!("line number {n}\n").as_bytes());
            assert!(recent.bytes.len() <= LIMIT && recent.bytes.capacity() <= LIMIT, "{n}");
        }
        assert_eq!(recent.lines(1), ["line number 9999"]);
        let lines = recent.lines(1000);
        assert_eq!(lines.len(), LINES_MAX);
        assert!(lines.iter().all(|line| line.starts_with("line number ")), "{lines:?}");

        recent.push(Stream::Err, &[b'x'; 100_000]);
        assert!(recent.bytes.len() <= LIMIT);
        assert_eq!(recent.lines(5).len(), 1);
        recent.push(Stream::Err, b"y\nend\n");
        assert_eq!(recent.lines(5), ["end"]);
    }
}
