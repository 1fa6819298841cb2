//! The memory the blob lives in: two memfds that the keeper holds, written in turn.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use super::blob::{self, Blob, Opened, Sealer};
use crate::sys::memfd;

/// The keeper's names of the two halves.
pub const HALVES: [&str; 2] = ["blob:0", "blob:1"];

/// Writes blobs, each beside the one before it.
#[derive(Debug)]
pub struct BlobMemory {
    halves: [File; 2],
    number: u64,
    sealer: Sealer,
    /// The change counters at the last write.
    recorded: Option<(u64, u64)>,
}

impl BlobMemory {
    /// New memory; give [`descriptors`](Self::descriptors) to the keeper.
    ///
    /// # Errors
    /// As memfd_create(2).
    pub fn create() -> io::Result<Self> {
        let half = || memfd::create(c"pm-blob").map(File::from);
        Ok(Self { halves: [half()?, half()?], number: 0, sealer: Sealer::default(), recorded: None })
    }

    /// New memory in the place of this one, with a blob in it that is newer than every one there was: there is no instant
    /// at which the keeper has memory without what nobody can do without.
    ///
    /// # Errors
    /// As memfd_create(2); ENOMEM.
    pub fn replaced(&self, blob: Blob) -> io::Result<Self> {
        let mut new = Self { number: self.number + 1, ..Self::create()? };
        new.write(blob)?;
        Ok(new)
    }

    /// Memory of an earlier supervisor, and the newest blob in it.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn adopt(halves: [OwnedFd; 2]) -> io::Result<(Self, Option<Blob>)> {
        let halves = halves.map(File::from);
        let mut newest: Option<Opened> = None;
        for half in &halves {
            let length = usize::try_from(half.metadata()?.len()).unwrap_or(0);
            let mut record = vec![0; length];
            half.read_exact_at(&mut record, 0)?;
            if let Some(opened) = blob::open(&record)
                && newest.as_ref().is_none_or(|known| opened.number > known.number)
            {
                newest = Some(opened);
            }
        }
        let number = newest.as_ref().map_or(0, |opened| opened.number);
        let memory = Self { halves, number, sealer: Sealer::default(), recorded: None };
        Ok((memory, newest.map(|opened| opened.blob)))
    }

    /// The two descriptors, in the order of [`HALVES`].
    ///
    /// # Errors
    /// EMFILE.
    pub fn descriptors(&self) -> io::Result<[OwnedFd; 2]> {
        let [first, second] = &self.halves;
        Ok([first.try_clone()?.into(), second.try_clone()?.into()])
    }

    /// A copy of the newest record; empty when there is none.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn newest(&self) -> io::Result<Vec<u8>> {
        let [first, second] = &self.halves;
        let half = if self.number.is_multiple_of(2) { first } else { second };
        let mut record = vec![0; usize::try_from(half.metadata()?.len()).unwrap_or(0)];
        half.read_exact_at(&mut record, 0)?;
        Ok(record)
    }

    /// Writes a blob if the fleet or what else goes into it has changed since the last time.
    ///
    /// # Errors
    /// ENOMEM; the blob before it stays valid.
    pub fn record(&mut self, changes: (u64, u64), blob: impl FnOnce() -> Blob) -> io::Result<()> {
        if self.recorded == Some(changes) {
            return Ok(());
        }
        self.number += 1;
        self.write(blob())?;
        self.recorded = Some(changes);
        Ok(())
    }

    fn write(&mut self, blob: Blob) -> io::Result<()> {
        let [first, second] = &self.halves;
        let half = if self.number.is_multiple_of(2) { first } else { second };
        half.write_all_at(&self.sealer.seal(blob, self.number), 0)
    }
}
