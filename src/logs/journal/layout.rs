//! Where everything is in the memory. Another layout is another version.

use super::{BATCH_MAX, STREAMS, ZONE};

pub(super) const HEADER_WORDS: usize = 512;
pub(super) const NOTES_AT: u64 = 64 * 1024;
pub(super) const TABLE_AT: u64 = 128 * 1024;
pub(super) const ZONE_AT: u64 = TABLE_AT + STREAMS * PLACE_WORDS as u64 * 8;
pub(super) const BATCH_AT: u64 = ZONE_AT + ZONE as u64;
/// Beginnings of lines, each with room for all of a zone: a chunk nobody was left to work on is kept too. Not mapped.
pub(super) const POOL_AT: u64 = BATCH_AT + BATCH_MAX as u64;
pub(super) const POOL_SLOT: u64 = ZONE as u64;
/// Up to this a slot's memory stays when it is free: the next to use it needs as much.
pub(super) const SLOT_KEPT: usize = 4096;

/// Words of the header.
pub(super) mod word {
    pub(in crate::logs::journal) const MAGIC: usize = 0;
    pub(in crate::logs::journal) const VERSION: usize = 1;
    pub(in crate::logs::journal) const STATE: usize = 2;
    pub(in crate::logs::journal) const STREAM: usize = 3;
    pub(in crate::logs::journal) const BEGIN: usize = 4;
    pub(in crate::logs::journal) const END: usize = 5;
    /// How many supervisors in a row have begun to open it and not come to the end of that.
    pub(in crate::logs::journal) const OPENED: usize = 6;
    /// Two records of writes, used in turn: the state says which one counts.
    pub(in crate::logs::journal) const WRITES: [usize; 2] = [32, 64];
}

/// Words of a record of a write.
pub(super) mod field {
    pub(in crate::logs::journal) const DEVICE: usize = 0;
    pub(in crate::logs::journal) const INODE: usize = 1;
    pub(in crate::logs::journal) const SIZE: usize = 2;
    pub(in crate::logs::journal) const SOURCE: usize = 3;
    pub(in crate::logs::journal) const START: usize = 4;
    pub(in crate::logs::journal) const LEN: usize = 5;
    pub(in crate::logs::journal) const TAIL: usize = 6;
    pub(in crate::logs::journal) const CURSOR: usize = 7;
    pub(in crate::logs::journal) const OWNER: usize = 8;
    pub(in crate::logs::journal) const ENDS: usize = 9;
    pub(in crate::logs::journal) const PATH_LEN: usize = 10;
    pub(in crate::logs::journal) const FROM: usize = 11;
}

/// States.
pub(super) mod state {
    pub(in crate::logs::journal) const IDLE: u64 = 0;
    pub(in crate::logs::journal) const LANDING: u64 = 1;
    pub(in crate::logs::journal) const LANDED: u64 = 2;
    pub(in crate::logs::journal) const WRITING: [u64; 2] = [3, 4];
}

/// Words of a stream's place.
pub(super) const PLACE_WORDS: usize = 8;

pub(super) mod place {
    pub(in crate::logs::journal) const KEY_LOW: usize = 0;
    pub(in crate::logs::journal) const KEY_HIGH: usize = 1;
    pub(in crate::logs::journal) const FLAGS: usize = 2;
    /// What is kept: the slot's number and 1 above, the length below. One word, so that they change together.
    pub(in crate::logs::journal) const KEPT: usize = 3;
    pub(in crate::logs::journal) const DROPPED_BYTES: usize = 4;
    pub(in crate::logs::journal) const DROPPED_LINES: usize = 5;
}

/// The end of its file is an unfinished line of this stream.
pub(super) const MID_LINE: u64 = 1;
/// A part of the stream's line is lost: the rest of it is skipped.
pub(super) const SKIPS: u64 = 2;
