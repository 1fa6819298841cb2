//! What keeps log lines from being lost or written twice when the supervisor is killed: a memory that the keeper holds.
//!
//! Output goes from a pipe into this memory and from there to its file. Every step is written down here before it is
//! taken, in such a way that the next supervisor can tell whether it was:
//!
//! ```text
//! idle ─→ landing: the memory's file position counts what has left the pipe, in the same system call
//!           └→ landed: so many bytes, none of them written
//!                └→ writing: which bytes, to which file, and how long it was before ─┐ as often as needed
//!                     │   (what of them is in the file is told by how long it is now)┘
//!                     └→ idle: what is left is the beginning of a line, kept for its stream
//! ```
//!
//! Stamped lines are put together here too, so that one that was half written gets its other half and not another stamp.
//! One chunk is on its way at a time. Never: a copy of what is in its file already; a file of its own on any disk.

mod layout;
mod writes;

use std::collections::HashMap;
use std::fs::File;
use std::io::{self};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::{Acquire, Release};

use self::layout::{
    BATCH_AT, HEADER_WORDS, MID_LINE, NOTES_AT, PLACE_WORDS, POOL_AT, POOL_SLOT, SKIPS, SLOT_KEPT, TABLE_AT,
    ZONE_AT, place, state, word,
};
use super::recent::Stream;
use crate::model::id::InstanceId;
use crate::sys::shared_memory::{self, Bytes, Words};

/// The keeper's name of the memory.
pub const HELD: &str = "logs";

/// Identifies a stream within the pump; where it is below [`STREAMS`], the stream's place in the memory.
pub(crate) type StreamKey = u64;

const MAGIC: u64 = 0x706d_206c_6f67_7331;
/// Another layout is another version. What an unknown one holds is not touched.
const VERSION: u64 = 1;

/// One read; also the capacity of a pipe unless somebody changed it.
pub(crate) const CHUNK: usize = 64 * 1024;
/// The longest beginning of a line that is kept for its end, in bytes.
pub(crate) const HELD_MAX: usize = 64 * 1024;
/// Where a chunk lands: what was kept of its stream goes right before it.
const LANDING: usize = HELD_MAX;
const ZONE: usize = LANDING + CHUNK;
/// Stamped lines are collected up to this size before they are written, in bytes.
const BATCH: usize = 128 * 1024;
/// What a batch may have: a line more than [`BATCH`], and its stamp.
const BATCH_MAX: usize = 4 * BATCH;
/// Paths are as long as the kernel takes them.
const PATH: usize = 4096;
/// What is written that no app has said.
const NOTE: usize = 4096;
/// Streams that have a place. Those beyond are written like the others, but not remembered.
pub(crate) const STREAMS: u64 = 16_384;

/// So many supervisors may end over what is in the memory.
const SUSPECT: u64 = 5;

/// Stands for no stream.
const NOBODY: StreamKey = StreamKey::MAX;

/// Where bytes are that are to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// As they have arrived.
    Zone,
    /// Stamped.
    Batch,
    /// Said by us.
    Note,
}

/// Bytes in the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    source: Source,
    start: usize,
    len: usize,
    /// How far the zone is done with before they are written.
    from: usize,
    /// How far it is when they are.
    cursor: usize,
    /// How many bytes that follow these belong to what moves the cursor so far.
    tail: usize,
}

impl Piece {
    pub(crate) const fn len(self) -> usize {
        self.len
    }

    pub(crate) const fn is_empty(self) -> bool {
        self.len == 0
    }

    /// Where in the zone it begins, or what it was made of does.
    pub(crate) const fn from(self) -> usize {
        self.from
    }

    /// Whether the bytes are not those that have arrived, so that a part of them says nothing about how far that is done.
    pub(crate) const fn is_stamped(self) -> bool {
        matches!(self.source, Source::Batch)
    }

    /// The first `at` bytes, and the others.
    pub(crate) const fn split(self, at: usize) -> (Self, Self) {
        let (mut first, mut second) = (self, self);
        first.len = at;
        second.start += at;
        second.len -= at;
        match self.source {
            Source::Zone => {
                first.cursor = self.start + at;
                second.from = first.cursor;
            }
            Source::Batch | Source::Note => first.tail = self.tail + second.len,
        }
        (first, second)
    }
}

/// The file of a write.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Destination<'a> {
    pub(crate) file: &'a File,
    pub(crate) path: &'a Path,
    /// Device and inode of a regular file.
    pub(crate) identity: Option<(u64, u64)>,
}

/// Whose line a write is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lines {
    /// Who may be in the middle of a line after it; `None` when it is nobody's.
    pub(crate) owner: Option<StreamKey>,
    /// Whose unfinished line it ends.
    pub(crate) ends: Option<StreamKey>,
}

/// What the supervisor before this one was about to write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unfinished {
    pub(crate) path: PathBuf,
    pub(crate) identity: Option<(u64, u64)>,
    /// The size of the file before.
    pub(crate) size: u64,
    pub(crate) bytes: Vec<u8>,
    /// What was to be written after them, to the same path.
    pub(crate) tail: Vec<u8>,
}

/// What is remembered of a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Remembered {
    /// The beginning of a line, or a chunk that nobody has worked on.
    pub(crate) held: Vec<u8>,
    pub(crate) is_mid_line: bool,
    pub(crate) skips_line: bool,
}

/// Output that was dropped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dropped {
    /// Bytes, stamps included.
    pub bytes: u64,
    /// Ends of lines among them.
    pub lines: u64,
}

/// The memory, and what is on its way.
#[derive(Debug)]
pub struct Journal {
    file: File,
    header: Words,
    table: Words,
    notes: Bytes,
    zone: Bytes,
    batch: Bytes,
    batch_len: usize,
    places: HashMap<u128, usize>,
    free_places: Vec<usize>,
    next_place: usize,
    /// The number of the next stream that gets no place.
    next_homeless: StreamKey,
    free_slots: Vec<u32>,
    next_slot: u32,
    turn: usize,
    stream: StreamKey,
    begin: usize,
    end: usize,
}

/// New memory for the keeper to hold.
///
/// # Errors
/// See memfd_create(2).
pub fn create() -> io::Result<OwnedFd> {
    let memory = shared_memory::create(c"pm-logs", POOL_AT)?;
    let header = Words::map(&memory, 0, HEADER_WORDS)?;
    header[word::VERSION].store(VERSION, Release);
    header[word::MAGIC].store(MAGIC, Release);
    Ok(memory)
}

/// Names a stream the same in every supervisor: FNV-1a with 128 bits.
pub(crate) fn name_of(id: &InstanceId, stream: Stream) -> u128 {
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    let text = format!("{id}\0{stream:?}");
    text.bytes().fold(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d, |hash, byte| {
        (hash ^ u128::from(byte)).wrapping_mul(PRIME)
    })
}

const fn low(key: u128) -> u64 {
    #[expect(clippy::cast_possible_truncation, reason = "the lower half")]
    let low = key as u64;
    low
}

fn at(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

fn refused(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

impl Journal {
    /// Opens the memory, and ends what was on its way when the supervisor before this one did. What it leaves of a stream
    /// is there for whoever adopts it.
    ///
    /// # Errors
    /// When it is none of ours, or cannot be mapped.
    pub fn open(memory: OwnedFd) -> io::Result<Self> {
        let header = Words::map(&memory, 0, HEADER_WORDS)?;
        if (header[word::MAGIC].load(Acquire), header[word::VERSION].load(Acquire)) != (MAGIC, VERSION) {
            return Err(refused("another version of the log memory"));
        }
        if header[word::OPENED].fetch_add(1, Release) >= SUSPECT {
            return Err(refused("the supervisors that opened the log memory have ended over it"));
        }
        let mut journal = Self {
            header,
            table: Words::map(&memory, TABLE_AT, at(STREAMS) * PLACE_WORDS)?,
            notes: Bytes::map(&memory, NOTES_AT, 2 * (PATH + NOTE))?,
            zone: Bytes::map(&memory, ZONE_AT, ZONE)?,
            batch: Bytes::map(&memory, BATCH_AT, BATCH_MAX)?,
            batch_len: 0,
            file: File::from(memory),
            places: HashMap::new(),
            free_places: Vec::new(),
            next_place: 0,
            next_homeless: STREAMS,
            free_slots: Vec::new(),
            next_slot: 0,
            turn: 0,
            stream: NOBODY,
            begin: LANDING,
            end: LANDING,
        };
        journal.find_places();
        journal.recover();
        journal.header[word::OPENED].store(0, Release);
        Ok(journal)
    }

    /// A memory of its own, which ends with the process.
    ///
    /// # Errors
    /// As [`create`].
    pub fn private() -> io::Result<Self> {
        Self::open(create()?)
    }

    fn find_places(&mut self) {
        // A place is entered after those before it: the first empty one in a row of empty ones ends the search only at
        // the end of the table, which is read once in a supervisor's life.
        let mut slots = Vec::new();
        for index in 0..at(STREAMS) {
            let place = self.place(index);
            let key = u128::from(place[place::KEY_HIGH].load(Acquire)) << 64
                | u128::from(place[place::KEY_LOW].load(Acquire));
            if key != 0 {
                let kept = place[place::KEPT].load(Acquire);
                if let Some((slot, _)) = kept_of(kept) {
                    slots.push(slot);
                }
                self.places.insert(key, index);
                self.next_place = index + 1;
            }
        }
        let used: std::collections::HashSet<usize> = self.places.values().copied().collect();
        self.free_places = (0..self.next_place).rev().filter(|index| !used.contains(index)).collect();
        self.next_slot = slots.iter().max().map_or(0, |slot| slot + 1);
        self.free_slots = (0..self.next_slot).rev().filter(|slot| !slots.contains(slot)).collect();
    }

    // Streams. ------------------------------------------------------------------------------------------------------

    fn place(&self, index: usize) -> &[std::sync::atomic::AtomicU64] {
        &self.table[index * PLACE_WORDS..(index + 1) * PLACE_WORDS]
    }

    fn place_of(&self, stream: StreamKey) -> Option<&[std::sync::atomic::AtomicU64]> {
        (stream < STREAMS).then(|| self.place(at(stream)))
    }

    /// Gives a stream its place, which may be the one it has had in another supervisor.
    pub(crate) fn enter(&mut self, name: u128) -> StreamKey {
        if let Some(&index) = self.places.get(&name) {
            return index as u64;
        }
        let index = self.free_places.pop().or_else(|| {
            let index = self.next_place;
            (index < at(STREAMS)).then(|| {
                self.next_place += 1;
                index
            })
        });
        let Some(index) = index else {
            self.next_homeless += 1;
            return self.next_homeless;
        };
        let place = self.place(index);
        for word in &place[place::FLAGS..] {
            word.store(0, Release);
        }
        place[place::KEY_LOW].store(low(name), Release);
        place[place::KEY_HIGH].store(low(name >> 64), Release);
        self.places.insert(name, index);
        index as u64
    }

    /// The stream has ended.
    pub(crate) fn leave(&mut self, stream: StreamKey) {
        self.keep(stream, 0..0);
        let Some(place) = self.place_of(stream) else { return };
        place[place::KEY_HIGH].store(0, Release);
        place[place::KEY_LOW].store(0, Release);
        let index = at(stream);
        self.places.retain(|_, known| *known != index);
        self.free_places.push(index);
    }

    /// Everything in it has been adopted: streams that have a place and that `is_known` does not know leave.
    pub(crate) fn settle(&mut self, is_known: impl Fn(StreamKey) -> bool) {
        let gone: Vec<usize> =
            self.places.values().copied().filter(|&index| !is_known(index as u64)).collect();
        for index in gone {
            self.leave(index as u64);
        }
    }

    /// What an earlier supervisor left of a stream.
    pub(crate) fn remembered(&self, stream: StreamKey) -> Remembered {
        let Some(place) = self.place_of(stream) else { return Remembered::default() };
        let flags = place[place::FLAGS].load(Acquire);
        let mut held = Vec::new();
        if let Some((slot, len)) = kept_of(place[place::KEPT].load(Acquire)) {
            held.resize(len.min(ZONE), 0);
            if self.file.read_exact_at(&mut held, slot_at(slot)).is_err() {
                held.clear();
            }
        }
        Remembered { held, is_mid_line: flags & MID_LINE != 0, skips_line: flags & SKIPS != 0 }
    }

    /// Forgets what was remembered of a stream whose instance begins anew.
    pub(crate) fn reset(&mut self, stream: StreamKey) {
        self.keep(stream, 0..0);
        if let Some(place) = self.place_of(stream) {
            place[place::FLAGS].store(0, Release);
        }
    }

    fn flag(&self, stream: StreamKey, flag: u64, is_set: bool) {
        let Some(place) = self.place_of(stream) else { return };
        let before = place[place::FLAGS].load(Acquire);
        let after = if is_set { before | flag } else { before & !flag };
        if before != after {
            place[place::FLAGS].store(after, Release);
        }
    }

    pub(crate) fn set_skips(&self, stream: StreamKey, skips: bool) {
        self.flag(stream, SKIPS, skips);
    }

    pub(crate) fn set_mid_line(&self, stream: StreamKey, is_mid_line: bool) {
        self.flag(stream, MID_LINE, is_mid_line);
    }

    /// Counts output that is lost.
    pub(crate) fn count_dropped(&self, stream: StreamKey, dropped: Dropped) {
        let Some(place) = self.place_of(stream) else { return };
        place[place::DROPPED_BYTES].fetch_add(dropped.bytes, Release);
        place[place::DROPPED_LINES].fetch_add(dropped.lines, Release);
    }

    /// What was lost of this stream since its instance began.
    pub(crate) fn dropped(&self, stream: StreamKey) -> Dropped {
        let Some(place) = self.place_of(stream) else { return Dropped::default() };
        Dropped {
            bytes: place[place::DROPPED_BYTES].load(Acquire),
            lines: place[place::DROPPED_LINES].load(Acquire),
        }
    }

    // A chunk on its way. -------------------------------------------------------------------------------------------

    /// Takes what is in a pipe. `held` is the beginning of its line. What is there is worked on until [`done`](Self::done);
    /// nothing has happened when this fails or there is nothing (0).
    pub(crate) fn receive(
        &mut self,
        stream: StreamKey,
        held: &[u8],
        pipe: impl AsFd,
        limit: usize,
    ) -> nix::Result<usize> {
        self.prepare(stream, held)?;
        let landed = shared_memory::receive(pipe, &self.file, limit.min(CHUNK));
        match landed {
            Ok(count) if count > 0 => {
                self.landed(LANDING + count);
                Ok(count)
            }
            nothing => {
                self.header[word::STATE].store(state::IDLE, Release);
                nothing
            }
        }
    }

    /// Works on what is held, or was left by another supervisor, without anything from the pipe.
    pub(crate) fn resume(&mut self, stream: StreamKey, held: &[u8]) {
        let begin = ZONE - held.len().min(ZONE);
        self.header[word::STREAM].store(stream, Release);
        self.header[word::BEGIN].store(begin as u64, Release);
        self.zone[begin..].copy_from_slice(&held[..ZONE - begin]);
        (self.stream, self.begin) = (stream, begin);
        self.landed(ZONE);
    }

    /// From here on the memory's file position says how much has left the pipe.
    fn prepare(&mut self, stream: StreamKey, held: &[u8]) -> nix::Result<()> {
        let begin = LANDING - held.len().min(LANDING);
        self.zone[begin..LANDING].copy_from_slice(&held[..LANDING - begin]);
        (self.stream, self.begin) = (stream, begin);
        self.header[word::STREAM].store(stream, Release);
        self.header[word::BEGIN].store(begin as u64, Release);
        // It still counts the chunk before: whoever finds it beyond the landing point takes that for what has arrived.
        shared_memory::seek(&self.file, ZONE_AT + LANDING as u64)?;
        self.header[word::STATE].store(state::LANDING, Release);
        Ok(())
    }

    fn landed(&mut self, end: usize) {
        self.end = end;
        self.header[word::END].store(end as u64, Release);
        self.header[word::STATE].store(state::LANDED, Release);
    }

    /// All of what is there, what was held first.
    pub(crate) const fn range(&self) -> Range<usize> {
        self.begin..self.end
    }

    /// What has come from the pipe by the last [`receive`](Self::receive).
    pub(crate) fn arrived(&self) -> &[u8] {
        &self.zone[LANDING..self.end]
    }

    /// Bytes of the zone.
    pub(crate) fn zone(&self, range: Range<usize>) -> &[u8] {
        &self.zone[range]
    }

    /// A piece of the zone as it is.
    pub(crate) const fn as_arrived(range: &Range<usize>) -> Piece {
        let Range { start, end } = *range;
        Piece { source: Source::Zone, start, len: end - start, from: start, cursor: end, tail: 0 }
    }

    /// Whether a batch is to be written before another line is added.
    pub(crate) const fn is_batch_full(&self) -> bool {
        self.batch_len >= BATCH
    }

    /// Adds what goes before a line to the batch. A stamp of more than 64 KiB is cut.
    pub(crate) fn stamp(&mut self, text: &[u8]) {
        let len = text.len().min(HELD_MAX);
        self.batch[self.batch_len..self.batch_len + len].copy_from_slice(&text[..len]);
        self.batch_len += len;
    }

    /// Adds a line, or a part of one, to the batch.
    pub(crate) fn copy(&mut self, line: Range<usize>) {
        let to = self.batch_len..self.batch_len + line.len();
        self.batch_len = to.end;
        self.batch[to].copy_from_slice(&self.zone[line]);
    }

    /// The batch, whose lines are these of the zone. The next one begins.
    pub(crate) const fn take_batch(&mut self, lines: &Range<usize>) -> Piece {
        let len = self.batch_len;
        self.batch_len = 0;
        Piece { source: Source::Batch, start: 0, len, from: lines.start, cursor: lines.end, tail: 0 }
    }

    pub(crate) fn bytes(&self, piece: Piece) -> &[u8] {
        let range = piece.start..piece.start + piece.len;
        match piece.source {
            Source::Zone => &self.zone[range],
            Source::Batch => &self.batch[range],
            Source::Note => &self.notes[range],
        }
    }

    /// Text of ours to be written; cut at 4 KiB. It does not move the cursor.
    pub(crate) fn note(&mut self, text: &[u8], before: Piece) -> Piece {
        let len = text.len().min(NOTE);
        let start = 2 * PATH + self.turn * NOTE;
        self.notes[start..start + len].copy_from_slice(&text[..len]);
        // What is stamped and not written is stamped again.
        Piece { source: Source::Note, start, len, from: before.from, cursor: before.from, tail: 0 }
    }

    fn keep(&mut self, stream: StreamKey, rest: Range<usize>) {
        let Some(place) = self.place_of(stream) else { return };
        let kept = kept_of(place[place::KEPT].load(Acquire));
        if rest.is_empty() {
            if let Some((slot, len)) = kept {
                place[place::KEPT].store(0, Release);
                if len > SLOT_KEPT {
                    // It would be used again.
                    let _ = shared_memory::give_back(&self.file, slot_at(slot), POOL_SLOT);
                }
                self.free_slots.push(slot);
            }
            return;
        }
        let slot = kept.map(|(slot, _)| slot).or_else(|| self.free_slots.pop()).unwrap_or_else(|| {
            self.next_slot += 1;
            self.next_slot - 1
        });
        let len = rest.len() as u64;
        let written = self.file.write_all_at(&self.zone[rest], slot_at(slot)).is_ok();
        if let Some(place) = self.place_of(stream) {
            // Without memory for it it is in this process alone.
            let value = if written { (u64::from(slot) + 1) << 32 | len } else { 0 };
            place[place::KEPT].store(value, Release);
        }
        if !written {
            self.free_slots.push(slot);
        }
    }

    // After a kill. -------------------------------------------------------------------------------------------------
}

fn kept_of(word: u64) -> Option<(u32, usize)> {
    let slot = u32::try_from((word >> 32).checked_sub(1)?).ok()?;
    Some((slot, at(word & 0xffff_ffff)))
}

fn slot_at(slot: u32) -> u64 {
    POOL_AT + u64::from(slot) * POOL_SLOT
}

#[cfg(test)]
mod tests {
    use nix::unistd::write;

    use super::*;
    use crate::model::id::{AppName, Generation, Slot};
    use crate::sys::pipe;

    fn stream(app: &str) -> u128 {
        let app = AppName::new(app).unwrap();
        name_of(&InstanceId { app, slot: Slot(0), generation: Generation(1) }, Stream::Out)
    }

    #[test]
    fn a_chunk_that_is_done_is_not_taken_for_what_arrives_next() {
        let (ours, theirs) = pipe::pipe_for_output().unwrap();
        let memory = create().unwrap();
        let mut killed = Journal::open(memory.try_clone().unwrap()).unwrap();
        let api = killed.enter(stream("api"));
        let web = killed.enter(stream("web"));
        write(&theirs, b"api is in its file\n").unwrap();
        assert_eq!(killed.receive(api, b"", &ours, CHUNK), Ok(19));
        killed.done(0..0);
        // Killed before anything has left the pipe of the other one.
        killed.prepare(web, b"").unwrap();
        drop(killed);
        let mut next = Journal::open(memory.try_clone().unwrap()).unwrap();
        let web = next.enter(stream("web"));
        assert_eq!(next.remembered(web), Remembered::default());
        // Killed after it.
        write(&theirs, b"from the pipe\n").unwrap();
        next.prepare(web, b"held ").unwrap();
        assert_eq!(shared_memory::receive(&ours, &next.file, CHUNK), Ok(14));
        drop(next);
        let mut last = Journal::open(memory).unwrap();
        let web = last.enter(stream("web"));
        assert_eq!(last.remembered(web).held, b"held from the pipe\n");
    }
}
