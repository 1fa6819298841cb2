//! The blob: actual state in keeper-held memory, for the next supervisor of the same boot, which may be of another
//! version.
//!
//! Two halves written in turn, each with a checksum and a number that counts up: a supervisor killed in the middle of
//! a write leaves the other half whole.
//!
//! ```text
//! half     magic, number, length, checksum (u64 each, little-endian), records
//! record   kind (u32), length (u32), JSON
//! ```
//!
//! Versions understand each other record by record: unknown kinds and fields are skipped, missing fields get their
//! default, and a record that makes no sense costs what it is about and nothing else. So new fields need
//! `#[serde(default)]`, and the meaning of a field never changes. tests/fixtures/blob has what older versions wrote.
//!
//! Most records are the same from one write to the next; their bytes are kept, which makes a write as cheap as a copy.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::journal::JournalMemo;
use super::operations::OperationsMemo;
use crate::dispatch::{OpenListener, Origin};
use crate::model::id::{AppName, InstanceId, Slot};
use crate::model::saved::{HookMemo, InstanceMemo, Memo, ReloadMemo, SlotMemo};
use crate::sys::procfs::ProcessId;

const MAGIC: u64 = 0x706d_2062_6c6f_6232;
const HEADER: usize = 32;
const RECORD_HEADER: usize = 8;

/// What a record is about. Numbers are never used again for something else.
mod kind {
    pub(super) const SLOT: u32 = 1;
    pub(super) const INSTANCE: u32 = 2;
    pub(super) const HOOK: u32 = 3;
    pub(super) const RELOAD: u32 = 4;
    pub(super) const CHANNEL: u32 = 5;
    pub(super) const LISTENER: u32 = 6;
    pub(super) const OPERATIONS: u32 = 7;
    pub(super) const JOURNAL: u32 = 8;
    pub(super) const TOLD: u32 = 9;
    pub(super) const DELETED: u32 = 10;
    pub(super) const RETIRED: u32 = 11;
}

/// What a supervisor leaves for the next one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Blob {
    /// The fleet's actual state.
    pub memo: Memo,
    /// What the next dispatcher has to know of each IPC channel.
    pub channels: Vec<ChannelMemo>,
    /// Listeners that workers asked for; the keeper holds their sockets.
    pub listeners: Vec<ListenerMemo>,
    /// Operations that clients may ask for; `None` when they are not known, so that none may be taken for never begun.
    pub operations: Option<OperationsMemo>,
    /// Events that may not be in their file.
    pub journal: JournalMemo,
    /// Who got a kill signal.
    pub told: Vec<ToldMemo>,
}

/// What the next dispatcher has to know of an IPC channel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelMemo {
    /// Whose channel.
    pub id: InstanceId,
    /// `"ready"` was recorded.
    #[serde(default)]
    pub ready: bool,
    /// The version of Node that the agent reported.
    #[serde(default)]
    pub node_version: Option<String>,
    /// The listeners it has open.
    #[serde(default)]
    pub open: Vec<OpenListener>,
}

/// The processes of an instance that got its kill signal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToldMemo {
    /// Whose.
    pub id: InstanceId,
    /// Their pids and start times in clock ticks; none when there was nothing to signal.
    pub processes: Vec<(i32, u64)>,
}

impl ToldMemo {
    /// What is noted of these.
    #[must_use]
    pub fn of(id: &InstanceId, told: &[ProcessId]) -> Self {
        let processes = told.iter().map(|process| (process.pid, process.start_ticks)).collect();
        Self { id: id.clone(), processes }
    }

    /// The processes.
    #[must_use]
    pub fn told(&self) -> Vec<ProcessId> {
        self.processes.iter().map(|&(pid, start_ticks)| ProcessId { pid, start_ticks }).collect()
    }
}

/// A listener that a worker asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListenerMemo {
    /// Whose.
    pub app: AppName,
    /// Its key.
    pub key: String,
    /// TLS ticket keys of the first worker; secret, which is why this memory has no name in any file system.
    pub data: String,
    /// Who made the socket.
    pub origin: Origin,
    /// For people.
    #[serde(default)]
    pub address: String,
}

/// Writes blobs, and keeps the bytes of what is the same in the next one.
#[derive(Debug, Default)]
pub struct Sealer {
    slots: Kept<(AppName, Slot), SlotMemo>,
    instances: Kept<InstanceId, InstanceMemo>,
    channels: Kept<InstanceId, ChannelMemo>,
}

/// Records of one kind as they were written last, with their bytes.
type Kept<K, T> = BTreeMap<K, (T, Box<[u8]>)>;

impl Sealer {
    /// Puts a checksummed, numbered frame around the blob.
    #[must_use]
    pub fn seal(&mut self, blob: Blob, number: u64) -> Vec<u8> {
        let Blob { memo, channels, listeners, operations, journal, told } = blob;
        let Memo { slots, instances, hooks, reloads, deleted, retired } = memo;
        let mut half = vec![0; HEADER];
        let known = kept(&mut half, kind::SLOT, &mut self.slots, slots, |memo| (memo.app.clone(), memo.slot));
        self.slots = known;
        let known = kept(&mut half, kind::INSTANCE, &mut self.instances, instances, |memo| memo.id.clone());
        self.instances = known;
        let known = kept(&mut half, kind::CHANNEL, &mut self.channels, channels, |memo| memo.id.clone());
        self.channels = known;
        for hook in &hooks {
            append(&mut half, kind::HOOK, &json(hook));
        }
        for reload in &reloads {
            append(&mut half, kind::RELOAD, &json(reload));
        }
        for app in &deleted {
            append(&mut half, kind::DELETED, &json(app));
        }
        for run in &retired {
            append(&mut half, kind::RETIRED, &json(run));
        }
        for listener in &listeners {
            append(&mut half, kind::LISTENER, &json(listener));
        }
        if let Some(operations) = &operations {
            append(&mut half, kind::OPERATIONS, &json(operations));
        }
        append(&mut half, kind::JOURNAL, &json(&journal));
        for told in &told {
            append(&mut half, kind::TOLD, &json(told));
        }
        let body = &half[HEADER..];
        let head = [MAGIC, number, body.len() as u64, checksum(number, body)];
        for (place, word) in half.chunks_exact_mut(8).zip(head) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        half
    }
}

/// Appends the records, those that have not changed as the bytes they were before. Returns what to keep.
fn kept<K: Ord, T: Serialize + PartialEq>(
    half: &mut Vec<u8>,
    kind: u32,
    before: &mut Kept<K, T>,
    memos: Vec<T>,
    key: impl Fn(&T) -> K,
) -> Kept<K, T> {
    let mut now = BTreeMap::new();
    for memo in memos {
        let key = key(&memo);
        let bytes = match before.remove(&key) {
            Some((known, bytes)) if known == memo => bytes,
            _ => json(&memo).into(),
        };
        append(half, kind, &bytes);
        now.insert(key, (memo, bytes));
    }
    now
}

fn json(memo: &impl Serialize) -> Vec<u8> {
    // Fails for a path that is no UTF-8; such a record is empty, which opens as one that makes no sense.
    serde_json::to_vec(memo).unwrap_or_default()
}

fn append(half: &mut Vec<u8>, kind: u32, bytes: &[u8]) {
    // Nothing here comes near 4 GiB; a wrapped length would be found by whoever opens it.
    half.extend_from_slice(&kind.to_le_bytes());
    half.extend_from_slice(&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes());
    half.extend_from_slice(bytes);
}

/// A blob that was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Opened {
    /// What it says.
    pub blob: Blob,
    /// Its number.
    pub number: u64,
    /// Records that another version wrote and this one cannot read.
    pub unread: u32,
}

/// The blob in a half; `None` when it is torn or foreign.
#[must_use]
pub fn open(half: &[u8]) -> Option<Opened> {
    let word = |index: usize| -> Option<u64> {
        Some(u64::from_le_bytes(half.get(index * 8..index * 8 + 8)?.try_into().ok()?))
    };
    if word(0)? != MAGIC {
        return None;
    }
    let number = word(1)?;
    let length = usize::try_from(word(2)?).ok()?;
    let mut body = half.get(HEADER..HEADER.checked_add(length)?)?;
    if word(3)? != checksum(number, body) {
        return None;
    }
    let mut opened = Opened { number, ..Opened::default() };
    while let Some((head, rest)) = body.split_first_chunk::<RECORD_HEADER>() {
        let [a, b, c, d, e, f, g, h] = *head;
        let length = usize::try_from(u32::from_le_bytes([e, f, g, h])).ok()?;
        let (record, rest) = rest.split_at_checked(length)?;
        body = rest;
        if !opened.take(u32::from_le_bytes([a, b, c, d]), record) {
            opened.unread += 1;
        }
    }
    Some(opened)
}

impl Opened {
    /// `false`: this version cannot read it.
    fn take(&mut self, kind: u32, record: &[u8]) -> bool {
        let Blob { memo, channels, listeners, operations, journal, told } = &mut self.blob;
        match kind {
            kind::SLOT => read::<SlotMemo>(record).map(|read| memo.slots.push(read)),
            kind::INSTANCE => read::<InstanceMemo>(record).map(|read| memo.instances.push(read)),
            kind::HOOK => read::<HookMemo>(record).map(|read| memo.hooks.push(read)),
            kind::RELOAD => read::<ReloadMemo>(record).map(|read| memo.reloads.push(read)),
            kind::DELETED => read(record).map(|read| memo.deleted.push(read)),
            kind::RETIRED => read(record).map(|read| memo.retired.push(read)),
            kind::CHANNEL => read(record).map(|read| channels.push(read)),
            kind::LISTENER => read(record).map(|read| listeners.push(read)),
            kind::OPERATIONS => read(record).map(|read| *operations = Some(read)),
            kind::JOURNAL => read(record).map(|read| *journal = read),
            kind::TOLD => read(record).map(|read| told.push(read)),
            _ => None,
        }
        .is_some()
    }
}

fn read<T: DeserializeOwned>(record: &[u8]) -> Option<T> {
    serde_json::from_slice(record)
        .inspect_err(|error| {
            tracing::warn!(%error, "the supervisor before this one remembered something that is not understood");
        })
        .ok()
}

/// Finds torn writes; nobody forges what only we can write. A word at a time (FNV-1a over words), because it is
/// computed in every turn.
fn checksum(number: u64, body: &[u8]) -> u64 {
    const PRIME: u64 = 0x0100_0000_01b3;
    let words = body.chunks_exact(8);
    let rest = words.remainder().iter().map(|&byte| u64::from(byte));
    let whole = words.map(|word| word.try_into().map_or(0, u64::from_le_bytes));
    let sum = whole.clone().chain(rest).fold(0xcbf2_9ce4_8422_2325, |sum: u64, word| {
        // The product alone would carry a word's upper bits nowhere.
        (sum ^ word).wrapping_mul(PRIME).rotate_left(29)
    });
    sum ^ number ^ body.len() as u64
}

#[cfg(test)]
mod tests;
