//! Framing of a Node IPC channel: bytes to lines, and the order in which lines may go out.
//!
//! Pure: no socket is touched here. The incoming side works on bytes that are *peeked* and says how many may be
//! consumed; the outgoing side says what may be sent next and is told how much of it went.

use std::borrow::Cow;
use std::collections::VecDeque;

/// A longer line is skipped to its newline and only counted.
pub const LINE_LIMIT: u64 = 16 * 1024 * 1024;

/// How much of a line is kept. Control lines are far shorter; of longer user messages this much is shown.
pub const LINE_KEPT: usize = 64 * 1024;

/// An incomplete line below this length stays in the socket, where the next supervisor finds it whole. Node writes up to
/// 36,000 bytes in one piece.
const LEFT_IN_SOCKET: usize = 8 * 1024;

/// How many bytes of user messages wait for a worker that does not read.
pub const USER_BACKLOG: usize = 8 * 1024 * 1024;

/// How many bytes of answers wait for a worker that asks and does not read. Node asks for little at a time, and waits.
pub const ANSWER_BACKLOG: usize = 1024 * 1024;

/// How many ACKs of the worker's own handles wait. Node sends one handle at a time.
const ACKS: usize = 256;

/// Cuts a channel's input into lines.
#[derive(Debug, Default)]
pub struct Lines {
    /// The kept head of a line whose bytes were consumed before its newline came.
    head: Vec<u8>,
    /// How many bytes of that line were consumed.
    consumed: u64,
}

/// The next thing in the input.
#[derive(Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// A line without its newline; shortened to [`LINE_KEPT`] when `length` is larger than what is here.
    Line {
        /// The line, or its head.
        bytes: Cow<'a, [u8]>,
        /// Its true length.
        length: u64,
    },
    /// A line over [`LINE_LIMIT`] has ended.
    Skipped {
        /// Its true length.
        length: u64,
    },
    /// No newline yet; the line stays in the socket.
    Incomplete,
    /// No newline yet, and too much to stay: what is here is to be kept ([`Lines::keep`]) and consumed.
    Long,
}

impl Lines {
    /// The line of which a former supervisor had consumed the beginning.
    #[must_use]
    pub const fn resumed(head: Vec<u8>, consumed: u64) -> Self {
        Self { head, consumed }
    }

    /// Takes the first line of what was peeked. The number says how many bytes of `seen` belong to the piece. After
    /// a line they may also stay and be seen again, provided the line was whole in `seen` (see [`Lines::is_midway`]).
    pub fn first<'a>(&mut self, seen: &'a [u8]) -> (usize, Piece<'a>) {
        let Some(newline) = seen.iter().position(|byte| *byte == b'\n') else {
            if seen.is_empty() || (seen.len() < LEFT_IN_SOCKET && self.consumed == 0) {
                return (0, Piece::Incomplete);
            }
            return (seen.len(), Piece::Long);
        };
        if self.consumed == 0 {
            let line = &seen[..newline];
            let kept = &line[..line.len().min(LINE_KEPT)];
            return (newline + 1, Piece::Line { bytes: Cow::Borrowed(kept), length: line.len() as u64 });
        }
        self.keep(&seen[..newline]);
        let length = std::mem::take(&mut self.consumed);
        let head = std::mem::take(&mut self.head);
        if length > LINE_LIMIT {
            return (newline + 1, Piece::Skipped { length });
        }
        (newline + 1, Piece::Line { bytes: Cow::Owned(head), length })
    }

    /// How many bytes of the current line are consumed, and its head, as far as it is kept.
    #[must_use]
    pub fn kept(&self) -> (u64, &[u8]) {
        (self.consumed, &self.head)
    }

    /// Whether the head of the current line is consumed already.
    #[must_use]
    pub const fn is_midway(&self) -> bool {
        self.consumed > 0
    }

    /// Keeps the head of a line of which these bytes are about to be consumed.
    pub fn keep(&mut self, bytes: &[u8]) {
        let room = LINE_KEPT.saturating_sub(self.head.len()).min(bytes.len());
        self.head.extend_from_slice(&bytes[..room]);
        self.consumed += bytes.len() as u64;
    }
}

/// A handle on its way to the worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handed<H> {
    /// What is passed; held until the worker has answered, since some kernels lose a descriptor in flight otherwise.
    pub handle: H,
    /// What it is for.
    pub errand: Errand,
}

/// What a handle is passed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Errand {
    /// A connection, with the `newconn` of this number.
    Newconn(u64),
    /// A shared listener, in answer to the query of this number.
    Grant(u64),
    /// A probe's connection, for the agent.
    Probe,
}

/// What follows when a handle did not reach the worker.
#[derive(Debug, PartialEq, Eq)]
pub enum Nacked {
    /// It is not known which; a former supervisor's.
    Unknown,
    /// The connection of this `newconn` goes to anybody.
    Newconn(u64),
    /// It is sent again, as a Node primary does.
    Again,
    /// It was sent again often enough: the query of this number fails.
    Refuse(u64),
    /// Nothing.
    Dropped,
}

/// How often a handle that is for this worker alone is sent again (Node: `MAX_HANDLE_RETRANSMISSIONS`).
const RETRANSMISSIONS: u8 = 3;

/// Who wrote a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Author {
    /// The cluster protocol or the agent's.
    Internal,
    /// The same, where the worker has asked; capped.
    Answer,
    /// A user, for the app; capped.
    User,
}

#[derive(Debug)]
struct Line<H> {
    body: Body,
    handed: Option<Handed<H>>,
    author: Author,
    /// How often its handle was refused.
    refused: u8,
}

#[derive(Debug)]
enum Body {
    /// So short that it goes whole or not at all.
    Here(Vec<u8>),
    /// In a file of this number, which knows how much of it has gone.
    Kept {
        number: u64,
        length: usize,
        /// The keeper has the file: whatever happens to us, somebody goes on with it.
        placed: bool,
    },
}

impl Body {
    fn len(&self) -> usize {
        match self {
            Self::Here(bytes) => bytes.len(),
            Self::Kept { length, .. } => *length,
        }
    }
}

/// The worker does not read its messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the worker does not read its messages")]
pub struct Full;

/// What waits to be sent on a channel, in order.
///
/// Between a handle and its ACK or NACK nothing else goes out (node-cluster-protocol 3.2): a second handle could
/// overwrite the first in the worker. Only our own ACKs pass by.
#[derive(Debug)]
pub struct Outbox<H> {
    /// Our answers to the worker's own handles.
    urgent: VecDeque<Vec<u8>>,
    queue: VecDeque<Line<H>>,
    /// How much of the front of `urgent` (`Midway::Urgent`) or `queue` has gone.
    midway: Midway,
    /// Sent and not answered, with its line if it may have to go again.
    in_flight: Option<Flying<H>>,
    /// A handle may be in flight that a former supervisor sent.
    inherited: bool,
    user_bytes: usize,
    answer_bytes: usize,
    /// An emptied buffer, kept for the next line.
    spare: Vec<u8>,
}

#[derive(Debug)]
struct Flying<H> {
    handed: Handed<H>,
    line: Option<Vec<u8>>,
    refused: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Midway {
    No,
    Urgent(usize),
    Queue(usize),
    /// Of a line that a file has.
    Kept,
}

impl<H> Default for Outbox<H> {
    fn default() -> Self {
        Self {
            urgent: VecDeque::new(),
            queue: VecDeque::new(),
            midway: Midway::No,
            in_flight: None,
            inherited: false,
            user_bytes: 0,
            answer_bytes: 0,
            spare: Vec::new(),
        }
    }
}

impl<H> Outbox<H> {
    /// The outbox of a channel that a former supervisor wrote to: it may have left a handle unanswered.
    #[must_use]
    pub fn inherited() -> Self {
        Self { inherited: true, ..Self::default() }
    }

    /// An empty buffer to build a line in.
    pub fn buffer(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.spare)
    }

    /// Queues a line, newline included.
    ///
    /// # Errors
    /// [`Full`] for a user's line behind [`USER_BACKLOG`] bytes of unread ones, and for an answer behind
    /// [`ANSWER_BACKLOG`].
    pub fn push(&mut self, bytes: Vec<u8>, handed: Option<Handed<H>>, author: Author) -> Result<(), Full> {
        self.make_room(bytes.len(), author)?;
        self.queue.push_back(Line { body: Body::Here(bytes), handed, author, refused: 0 });
        Ok(())
    }

    /// Queues a line that is in a file; it goes when the keeper has that too ([`Outbox::placed`]).
    ///
    /// # Errors
    /// As [`Outbox::push`].
    pub fn push_kept(&mut self, number: u64, length: usize, author: Author) -> Result<(), Full> {
        self.make_room(length, author)?;
        let body = Body::Kept { number, length, placed: false };
        self.queue.push_back(Line { body, handed: None, author, refused: 0 });
        Ok(())
    }

    /// The bytes that count against a limit, and the limit.
    fn counted(&mut self, author: Author) -> Option<(&mut usize, usize)> {
        match author {
            Author::Internal => None,
            Author::Answer => Some((&mut self.answer_bytes, ANSWER_BACKLOG)),
            Author::User => Some((&mut self.user_bytes, USER_BACKLOG)),
        }
    }

    fn make_room(&mut self, length: usize, author: Author) -> Result<(), Full> {
        if let Some((bytes, most)) = self.counted(author) {
            if *bytes > 0 && *bytes + length > most {
                return Err(Full);
            }
            *bytes += length;
        }
        Ok(())
    }

    fn has_gone(&mut self, length: usize, author: Author) {
        if let Some((bytes, _)) = self.counted(author) {
            *bytes -= length;
        }
    }

    /// Queues a line that a former supervisor had put into a file, `sent` bytes of which have gone. In their order, and
    /// before everything else.
    pub fn adopt_kept(&mut self, number: u64, length: usize, sent: u64) {
        if sent > 0 && self.queue.is_empty() {
            self.midway = Midway::Kept;
            // It would not have been begun behind an unanswered handle.
            self.inherited = false;
        }
        self.user_bytes += length;
        let body = Body::Kept { number, length, placed: true };
        self.queue.push_back(Line { body, handed: None, author: Author::User, refused: 0 });
    }

    /// The keeper has the file of this line.
    pub fn placed(&mut self, wanted: u64) {
        for line in &mut self.queue {
            if let Body::Kept { number, placed, .. } = &mut line.body
                && *number == wanted
            {
                *placed = true;
            }
        }
    }

    /// The line of this number will not be sent: the keeper cannot have its file.
    pub fn unplaced(&mut self, wanted: u64) {
        let is_it = |line: &Line<H>| matches!(line.body, Body::Kept { number, .. } if number == wanted);
        if let Some(place) = self.queue.iter().position(is_it) {
            self.forget_line(place);
        }
    }

    /// The number of the line in a file whose turn it is.
    #[must_use]
    pub fn kept(&self) -> Option<u64> {
        let begun = self.midway == Midway::Kept;
        let may_begin = self.midway == Midway::No && self.urgent.is_empty() && !self.is_handle_pending();
        match self.queue.front()?.body {
            Body::Kept { number, placed: true, .. } if begun || may_begin => Some(number),
            _ => None,
        }
    }

    /// So many bytes of the line in a file have not gone yet.
    pub fn kept_sent(&mut self, left: u64) {
        if left > 0 {
            let length = self.queue.front().map_or(0, |line| line.body.len() as u64);
            self.midway = if left < length { Midway::Kept } else { Midway::No };
            return;
        }
        self.midway = Midway::No;
        self.forget_line(0);
    }

    fn forget_line(&mut self, place: usize) {
        if let Some(line) = self.queue.remove(place) {
            self.has_gone(line.body.len(), line.author);
        }
    }

    /// Queues an answer to the worker's own handle, before everything else. One that has not read so many gets no more.
    pub fn push_urgent(&mut self, bytes: Vec<u8>) {
        if self.urgent.len() < ACKS {
            self.urgent.push_back(bytes);
        }
    }

    /// What to send now, and the handle to send with it.
    #[must_use]
    pub fn next(&self) -> Option<(&[u8], Option<&H>)> {
        match self.midway {
            Midway::Urgent(sent) => self.urgent.front().map(|bytes| (&bytes[sent..], None)),
            // The handle went with the first part.
            Midway::Queue(sent) => match &self.queue.front()?.body {
                Body::Here(bytes) => Some((&bytes[sent..], None)),
                Body::Kept { .. } => None,
            },
            Midway::Kept => None,
            Midway::No => {
                if let Some(bytes) = self.urgent.front() {
                    return Some((bytes, None));
                }
                if self.is_handle_pending() {
                    return None;
                }
                let line = self.queue.front()?;
                match &line.body {
                    Body::Here(bytes) => {
                        Some((bytes.as_slice(), line.handed.as_ref().map(|handed| &handed.handle)))
                    }
                    Body::Kept { .. } => None,
                }
            }
        }
    }

    /// Notes that `count` bytes of what [`Outbox::next`] gave have gone.
    pub fn sent(&mut self, count: usize) {
        if count == 0 {
            return;
        }
        if let Midway::Urgent(before) = self.midway {
            self.sent_urgent(before + count);
            return;
        }
        if self.midway == Midway::No && !self.urgent.is_empty() {
            self.sent_urgent(count);
            return;
        }
        let before = if let Midway::Queue(before) = self.midway { before } else { 0 };
        let Some(line) = self.queue.front_mut() else { return };
        let Body::Here(bytes) = &line.body else { return };
        if let Some(handed) = line.handed.take() {
            let again = !matches!(handed.errand, Errand::Newconn(_));
            let line_again = again.then(|| bytes.clone());
            self.in_flight = Some(Flying { handed, line: line_again, refused: line.refused });
        }
        if before + count < bytes.len() {
            self.midway = Midway::Queue(before + count);
            return;
        }
        self.midway = Midway::No;
        if let Some(line) = self.queue.pop_front() {
            self.has_gone(line.body.len(), line.author);
            if let Body::Here(bytes) = line.body {
                self.recycle(bytes);
            }
        }
    }

    fn sent_urgent(&mut self, sent: usize) {
        let whole = self.urgent.front().is_none_or(|bytes| sent >= bytes.len());
        self.midway = if whole { Midway::No } else { Midway::Urgent(sent) };
        if whole {
            self.urgent.pop_front();
        }
    }

    fn recycle(&mut self, mut bytes: Vec<u8>) {
        if bytes.capacity() <= 4096 {
            bytes.clear();
            self.spare = bytes;
        }
    }

    /// An ACK has come: returns the handle it answers, and lets the queue go on.
    pub fn answered(&mut self) -> Option<Handed<H>> {
        self.inherited = false;
        Some(self.in_flight.take()?.handed)
    }

    /// A NACK has come: the worker got the line without the handle (it has no descriptor left, or no memory).
    pub fn nacked(&mut self) -> Nacked {
        self.inherited = false;
        let Some(Flying { handed, line, refused }) = self.in_flight.take() else { return Nacked::Unknown };
        match (handed.errand, line) {
            (Errand::Newconn(seq), _) => Nacked::Newconn(seq),
            (Errand::Grant(_), Some(bytes)) if refused < RETRANSMISSIONS => {
                let body = Body::Here(bytes);
                let line =
                    Line { body, handed: Some(handed), author: Author::Internal, refused: refused + 1 };
                // Before everything else; a line that has gone in part is finished first.
                self.queue.insert(usize::from(self.midway != Midway::No), line);
                Nacked::Again
            }
            (Errand::Grant(seq), _) => Nacked::Refuse(seq),
            (Errand::Probe, _) => Nacked::Dropped,
        }
    }

    /// The number of the `newconn` whose handle is on its way and unanswered.
    #[must_use]
    pub fn newconn_in_flight(&self) -> Option<u64> {
        match self.in_flight.as_ref()?.handed.errand {
            Errand::Newconn(seq) => Some(seq),
            Errand::Grant(_) | Errand::Probe => None,
        }
    }

    /// The handle that would go next.
    #[must_use]
    pub fn next_handed(&self) -> Option<&Handed<H>> {
        match self.midway {
            Midway::No if self.urgent.is_empty() && !self.is_handle_pending() => {
                self.queue.front()?.handed.as_ref()
            }
            _ => None,
        }
    }

    /// Whether a handle is on its way and unanswered.
    #[must_use]
    pub const fn is_handle_pending(&self) -> bool {
        self.in_flight.is_some() || self.inherited
    }

    /// Whether it is unknown if a former supervisor's handle is still unanswered.
    #[must_use]
    pub const fn is_inherited(&self) -> bool {
        self.inherited
    }

    /// Whether a line has gone in part whose rest only this process has.
    #[must_use]
    pub fn is_midway(&self) -> bool {
        !matches!(self.midway, Midway::No | Midway::Kept)
    }

    /// How many lines wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.urgent.len() + self.queue.len()
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.urgent.is_empty() && self.queue.is_empty()
    }

    /// Drops everything: the peer is gone.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Reads a stream the way a channel does: arrives in pieces, peeked, consumed as told.
    fn read_all(stream: &[u8], cuts: &[usize]) -> Vec<(Vec<u8>, u64)> {
        let mut lines = Lines::default();
        let mut found = Vec::new();
        let mut socket: Vec<u8> = Vec::new();
        let mut rest = stream;
        let mut cuts = cuts.iter().copied().cycle();
        while !rest.is_empty() {
            let count = cuts.next().unwrap_or(1).clamp(1, rest.len());
            socket.extend_from_slice(&rest[..count]);
            rest = &rest[count..];
            loop {
                let (used, piece) = lines.first(&socket);
                match piece {
                    Piece::Line { bytes, length } => found.push((bytes.into_owned(), length)),
                    Piece::Skipped { length } => found.push((Vec::new(), length)),
                    Piece::Long => lines.keep(&socket[..used]),
                    Piece::Incomplete => break,
                }
                socket.drain(..used);
            }
        }
        found
    }

    proptest! {
        #[test]
        fn any_cut_gives_the_same_lines(
            lines in prop::collection::vec("[a-zü\u{2}\"{}]{0,40}", 0..20),
            cuts in prop::collection::vec(1_usize..50, 1..10),
        ) {
            let stream: Vec<u8> = lines.iter().flat_map(|line| [line.as_bytes(), b"\n"].concat()).collect();
            let found: Vec<Vec<u8>> = read_all(&stream, &cuts).into_iter().map(|(bytes, _)| bytes).collect();
            let expected: Vec<Vec<u8>> = lines.iter().map(|line| line.as_bytes().to_vec()).collect();
            prop_assert_eq!(found, expected);
        }

        /// Whatever goes in and however little the socket takes: handles keep their order, one is in flight at a time,
        /// and the bytes come out as they went in.
        #[test]
        fn the_outbox_keeps_order_and_one_handle_in_flight(
            script in prop::collection::vec((0_u8..4, 1_usize..60), 1..80),
        ) {
            let mut outbox: Outbox<u32> = Outbox::default();
            let (mut wire, mut handles, mut expected, mut count) = (Vec::new(), Vec::new(), Vec::new(), 0_u32);
            let mut unanswered = false;
            for (step, size) in script {
                match step {
                    0 => {
                        let line = format!("{size}{}\n", "x".repeat(size));
                        expected.extend_from_slice(line.as_bytes());
                        outbox.push(line.into_bytes(), None, Author::Internal).unwrap();
                    }
                    1 => {
                        let line = format!("h{count}\n");
                        expected.extend_from_slice(line.as_bytes());
                        let handed = Handed { handle: count, errand: Errand::Probe };
                        outbox.push(line.into_bytes(), Some(handed), Author::Internal).unwrap();
                        count += 1;
                    }
                    2 => {
                        let next = outbox.next().map(|(bytes, handle)| (bytes.to_vec(), handle.copied()));
                        if let Some((bytes, handle)) = next {
                            if let Some(handle) = handle {
                                prop_assert!(!unanswered);
                                unanswered = true;
                                handles.push(handle);
                            }
                            let n = size.min(bytes.len());
                            wire.extend_from_slice(&bytes[..n]);
                            outbox.sent(n);
                        }
                    }
                    _ => {
                        outbox.answered();
                        unanswered = false;
                    }
                }
            }
            loop {
                while let Some((bytes, handle)) = outbox.next().map(|(b, h)| (b.to_vec(), h.copied())) {
                    handles.extend(handle);
                    wire.extend_from_slice(&bytes);
                    outbox.sent(bytes.len());
                }
                if outbox.is_empty() { break; }
                prop_assert!(outbox.answered().is_some());
            }
            prop_assert_eq!(wire, expected);
            prop_assert_eq!(handles, (0..count).collect::<Vec<_>>());
        }
    }

    #[test]
    fn long_lines_are_shortened_and_very_long_ones_skipped() {
        let mut stream = vec![b'a'; 3_000_000];
        stream.push(b'\n');
        stream.extend(vec![b'b'; usize::try_from(LINE_LIMIT).unwrap() + 1]);
        stream.extend(b"\n\"ready\"\n");
        let found = read_all(&stream, &[65536]);
        assert_eq!(found.len(), 3);
        assert_eq!((found[0].0.len(), found[0].1), (LINE_KEPT, 3_000_000));
        assert_eq!((found[1].0.len(), found[1].1), (0, LINE_LIMIT + 1));
        assert_eq!(found[2].0, b"\"ready\"");
    }

    #[test]
    fn a_short_incomplete_line_stays_in_the_socket() {
        let mut lines = Lines::default();
        assert_eq!(lines.first(b"\"rea"), (0, Piece::Incomplete));
        assert!(!lines.is_midway());
        let whole = b"\"ready\"\n";
        let (used, piece) = lines.first(whole);
        assert_eq!((used, piece), (8, Piece::Line { bytes: Cow::Borrowed(&whole[..7]), length: 7 }));
    }

    #[test]
    fn nothing_passes_a_pending_handle_but_an_answer_of_ours() {
        let mut outbox: Outbox<u8> = Outbox::default();
        outbox
            .push(
                b"handle\n".to_vec(),
                Some(Handed { handle: 1, errand: Errand::Newconn(7) }),
                Author::Internal,
            )
            .unwrap();
        outbox.push(b"user\n".to_vec(), None, Author::User).unwrap();
        assert_eq!(outbox.next(), Some((&b"handle\n"[..], Some(&1))));
        outbox.sent(3);
        assert_eq!(outbox.next(), Some((&b"dle\n"[..], None)));
        outbox.push_urgent(b"ack\n".to_vec());
        // The half line first, or the worker dies of a syntax error.
        outbox.sent(4);
        assert_eq!(outbox.next(), Some((&b"ack\n"[..], None)));
        outbox.sent(4);
        assert_eq!(outbox.next(), None);
        assert_eq!(outbox.answered(), Some(Handed { handle: 1, errand: Errand::Newconn(7) }));
        assert_eq!(outbox.next(), Some((&b"user\n"[..], None)));
        outbox.sent(5);
        assert!(outbox.is_empty());
    }

    #[test]
    fn a_line_in_a_file_waits_for_the_keeper_and_is_interrupted_by_nothing() {
        let mut outbox: Outbox<u8> = Outbox::default();
        outbox.push_kept(1, 3_000_000, Author::User).unwrap();
        outbox.push(b"after\n".to_vec(), None, Author::User).unwrap();
        assert_eq!((outbox.next(), outbox.kept()), (None, None), "order is kept");
        outbox.push_urgent(b"ack\n".to_vec());
        outbox.placed(1);
        assert_eq!((outbox.next(), outbox.kept()), (Some((&b"ack\n"[..], None)), None));
        outbox.sent(4);
        assert_eq!((outbox.next(), outbox.kept()), (None, Some(1)));
        outbox.kept_sent(1_000);
        outbox.push_urgent(b"ack\n".to_vec());
        assert_eq!(
            (outbox.next(), outbox.kept()),
            (None, Some(1)),
            "a line inside a line would end the worker"
        );
        assert!(!outbox.is_midway(), "somebody else may finish it");
        outbox.kept_sent(0);
        assert_eq!(outbox.next(), Some((&b"ack\n"[..], None)));
        outbox.sent(4);
        assert_eq!(outbox.next(), Some((&b"after\n"[..], None)));
        outbox.sent(6);
        assert!(outbox.is_empty());
    }

    #[test]
    fn the_next_supervisor_finishes_what_was_begun_before_it_says_anything() {
        let mut outbox: Outbox<u8> = Outbox::inherited();
        outbox.adopt_kept(4, 100_000, 40_000);
        outbox.adopt_kept(5, 200_000, 0);
        outbox.push(b"hello\n".to_vec(), None, Author::Internal).unwrap();
        assert_eq!((outbox.next(), outbox.kept()), (None, Some(4)));
        outbox.kept_sent(0);
        assert_eq!((outbox.next(), outbox.kept()), (None, Some(5)));
        outbox.kept_sent(0);
        assert_eq!(outbox.next(), Some((&b"hello\n"[..], None)));
        // Behind a handle that the former supervisor had sent nothing was begun.
        let mut outbox: Outbox<u8> = Outbox::inherited();
        outbox.adopt_kept(1, 100_000, 0);
        assert_eq!((outbox.next(), outbox.kept()), (None, None));
        outbox.answered();
        assert_eq!(outbox.kept(), Some(1));
        outbox.unplaced(1);
        assert!(outbox.is_empty());
    }

    #[test]
    fn a_listener_that_does_not_arrive_is_sent_again_and_then_refused() {
        let mut outbox: Outbox<u8> = Outbox::default();
        let handed = Handed { handle: 1, errand: Errand::Grant(9) };
        outbox.push(b"grant\n".to_vec(), Some(handed), Author::Internal).unwrap();
        outbox.push(b"after\n".to_vec(), None, Author::Internal).unwrap();
        for _ in 0..RETRANSMISSIONS {
            assert_eq!(outbox.next(), Some((&b"grant\n"[..], Some(&1))));
            outbox.sent(6);
            assert_eq!(outbox.nacked(), Nacked::Again);
        }
        outbox.sent(6);
        assert_eq!(outbox.nacked(), Nacked::Refuse(9));
        assert_eq!(outbox.next(), Some((&b"after\n"[..], None)));
        assert_eq!(outbox.nacked(), Nacked::Unknown);
    }

    #[test]
    fn a_worker_that_does_not_read_does_not_fill_our_memory() {
        let mut outbox: Outbox<u8> = Outbox::default();
        let line = vec![b'x'; 1024 * 1024];
        let accepted = (0..20).take_while(|_| outbox.push(line.clone(), None, Author::User).is_ok()).count();
        assert_eq!(accepted, USER_BACKLOG / line.len());
        assert!(outbox.push(line.clone(), None, Author::Answer).is_ok());
        assert!(outbox.push(b"answer\n".to_vec(), None, Author::Answer).is_err());
        assert!(outbox.push_kept(1, 40_000, Author::Answer).is_err());
        (0..1_000).for_each(|_| outbox.push_urgent(b"ack\n".to_vec()));
        assert_eq!(outbox.urgent.len(), ACKS);
        assert!(outbox.push(b"internal\n".to_vec(), None, Author::Internal).is_ok());
    }
}
