//! The blob: actual state in keeper-held memory, for the next supervisor of the same boot.
//!
//! Two halves written in turn, each with a checksum and a number that counts up: a supervisor killed in the middle of
//! a write leaves the other half whole.

use serde::{Deserialize, Serialize};

use super::fnv;
use super::journal::JournalMemo;
use super::operations::OperationsMemo;
use crate::dispatch::{OpenListener, Origin};
use crate::model::id::{AppName, InstanceId};
use crate::model::saved::Memo;

/// Grows with what has to survive a supervisor. Older versions are ignored, which costs counters and nothing else.
pub const VERSION: u32 = 4;

const MAGIC: u64 = 0x706d_2062_6c6f_6231;
const HEADER: usize = 32;

/// What a supervisor leaves for the next one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blob {
    /// [`VERSION`].
    pub version: u32,
    /// The fleet's actual state.
    pub memo: Memo,
    /// What the next dispatcher has to know of each IPC channel.
    pub channels: Vec<ChannelMemo>,
    /// Listeners that workers asked for; the keeper holds their sockets.
    pub listeners: Vec<ListenerMemo>,
    /// Operations that clients may ask for.
    pub operations: OperationsMemo,
    /// Events that may not be in their file.
    pub journal: JournalMemo,
}

/// What the next dispatcher has to know of an IPC channel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelMemo {
    /// Whose channel.
    pub id: InstanceId,
    /// `"ready"` was recorded.
    pub ready: bool,
    /// The version of Node that the agent reported.
    pub node_version: Option<String>,
    /// The listeners it has open.
    pub open: Vec<OpenListener>,
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
    pub address: String,
}

/// Puts a checksummed, numbered record around the blob.
#[must_use]
pub fn seal(blob: &Blob, number: u64) -> Vec<u8> {
    // Plain values without maps of foreign keys: cannot fail.
    let body = postcard::to_allocvec(blob).unwrap_or_default();
    let mut record = Vec::with_capacity(HEADER + body.len());
    record.extend_from_slice(&MAGIC.to_le_bytes());
    record.extend_from_slice(&number.to_le_bytes());
    record.extend_from_slice(&(body.len() as u64).to_le_bytes());
    record.extend_from_slice(&checksum(number, &body).to_le_bytes());
    record.extend_from_slice(&body);
    record
}

/// The blob in a record, and its number; `None` when it is torn, foreign or of another version.
#[must_use]
pub fn open(record: &[u8]) -> Option<(Blob, u64)> {
    let word = |index: usize| -> Option<u64> {
        Some(u64::from_le_bytes(record.get(index * 8..index * 8 + 8)?.try_into().ok()?))
    };
    if word(0)? != MAGIC {
        return None;
    }
    let number = word(1)?;
    let length = usize::try_from(word(2)?).ok()?;
    let body = record.get(HEADER..HEADER.checked_add(length)?)?;
    if word(3)? != checksum(number, body) {
        return None;
    }
    let blob: Blob = postcard::from_bytes(body).ok()?;
    (blob.version == VERSION).then_some((blob, number))
}

/// Finds torn writes; nobody forges what only we can write.
fn checksum(number: u64, body: &[u8]) -> u64 {
    fnv::hash(body) ^ number
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blob() -> Blob {
        let app = AppName::new("api").unwrap();
        let listener = ListenerMemo {
            app,
            key: "k".into(),
            data: "null".into(),
            origin: Origin::Bound,
            address: "*:80".into(),
        };
        Blob {
            version: VERSION,
            memo: Memo::default(),
            channels: Vec::new(),
            listeners: vec![listener],
            operations: OperationsMemo::default(),
            journal: JournalMemo::default(),
        }
    }

    #[test]
    fn what_is_sealed_opens() {
        assert_eq!(open(&seal(&blob(), 9)), Some((blob(), 9)));
    }

    #[test]
    fn a_record_cut_anywhere_or_with_any_byte_changed_does_not_open() {
        let record = seal(&blob(), 9);
        for end in 0..record.len() {
            assert_eq!(open(&record[..end]), None, "cut at {end}");
        }
        for index in 0..record.len() {
            let mut torn = record.clone();
            torn[index] ^= 0x40;
            assert_eq!(open(&torn), None, "byte {index}");
        }
    }
}
