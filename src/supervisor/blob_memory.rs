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
        let mut new = Self { number: self.number, ..Self::create()? };
        new.write_next(blob)?;
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
        self.write_next(blob())?;
        self.recorded = Some(changes);
        Ok(())
    }

    fn write_next(&mut self, blob: Blob) -> io::Result<()> {
        let number = self.number + 1;
        let [first, second] = &self.halves;
        let half = if number.is_multiple_of(2) { first } else { second };
        half.write_all_at(&self.sealer.seal(blob, number), 0)?;
        // What was not written whole is written again in the same place: the other half is the last one that is valid.
        self.number = number;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::os::fd::AsRawFd;

    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;
    use crate::model::id::InstanceId;
    use crate::supervisor::blob::ToldMemo;

    fn of(count: i32) -> Blob {
        let id: InstanceId = serde_json::from_str(r#"{"app":"web","slot":0,"generation":1}"#).unwrap();
        let told = (0..count).map(|pid| ToldMemo { id: id.clone(), processes: vec![(pid, 7)] }).collect();
        Blob { told, ..Blob::default() }
    }

    fn what_the_next_one_finds(memory: &BlobMemory) -> Option<Blob> {
        BlobMemory::adopt(memory.descriptors().unwrap()).unwrap().1
    }

    /// Memory of which as much can be had as is in use.
    fn sealed() -> BlobMemory {
        let half = || File::from(memfd_create(c"test", MFdFlags::MFD_ALLOW_SEALING).unwrap());
        BlobMemory { halves: [half(), half()], ..BlobMemory::create().unwrap() }
    }

    #[test]
    fn writes_that_fail_never_touch_the_last_valid_half() {
        let mut memory = sealed();
        // Each of several pages: the first ones of them are overwritten before the last one finds no room.
        memory.record((1, 0), || of(400)).unwrap();
        memory.record((2, 0), || of(401)).unwrap();
        for half in &memory.halves {
            fcntl(half, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW)).unwrap();
        }
        for change in 3..7 {
            memory.record((change, 0), || of(2_000)).unwrap_err();
            assert_eq!(
                what_the_next_one_finds(&memory),
                Some(of(401)),
                "after the attempt of change {change}"
            );
            assert_eq!(blob::open(&memory.newest().unwrap()).unwrap().blob, of(401));
        }
        // One that finds room again goes on beside it.
        memory.record((7, 0), || of(1)).unwrap();
        assert_eq!(what_the_next_one_finds(&memory), Some(of(1)));
    }

    #[test]
    fn a_write_that_fails_is_tried_again_in_the_same_half() {
        let mut memory = BlobMemory::create().unwrap();
        memory.record((1, 0), || of(1)).unwrap();
        let path = format!("/proc/self/fd/{}", memory.halves[0].as_raw_fd());
        let closed = OpenOptions::new().read(true).open(path).unwrap();
        let open = std::mem::replace(&mut memory.halves[0], closed);
        for _ in 0..2 {
            memory.record((2, 0), || of(2)).unwrap_err();
            assert_eq!(what_the_next_one_finds(&memory), Some(of(1)));
        }
        memory.halves[0] = open;
        memory.record((2, 0), || of(2)).unwrap();
        assert_eq!(what_the_next_one_finds(&memory), Some(of(2)));
    }
}
