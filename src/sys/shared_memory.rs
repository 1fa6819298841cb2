//! Memory that outlives a process: a memfd whose pages are mapped by whoever holds a copy of its descriptor.
//!
//! What is stored here is there for the next process at the instant in which it is stored, also when this one is killed in
//! the next. A write system call for each change would do the same, slower.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, SpliceFFlags, fallocate, fcntl, splice};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::unistd::{Whence, ftruncate, lseek};

/// The size of a word in bytes.
const WORD: usize = size_of::<AtomicU64>();

/// An anonymous file (CLOEXEC) of `size` zero bytes that can grow and never shrinks, so that what is mapped of it stays there.
///
/// # Errors
/// See memfd_create(2) and ftruncate(2).
pub fn create(name: &CStr, size: u64) -> io::Result<OwnedFd> {
    let file = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    let size = i64::try_from(size).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
    ftruncate(&file, size)?;
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK))?;
    Ok(file)
}

/// A part of such a file, mapped. Only one process at a time may use it: the one before is dead, or has stopped to.
#[derive(Debug)]
struct Mapping {
    at: NonNull<libc::c_void>,
    len: usize,
}

// SAFETY: the mapping belongs to the process and not to a thread, and `Mapping` is the only one to know its address.
unsafe impl Send for Mapping {}

impl Mapping {
    fn new(file: impl AsFd, offset: u64, len: usize) -> io::Result<Self> {
        let refused = |why| io::Error::new(io::ErrorKind::InvalidInput, why);
        let seals = fcntl(&file, FcntlArg::F_GET_SEALS).map_err(|_| refused("not a memfd"))?;
        if !SealFlag::from_bits_truncate(seals).contains(SealFlag::F_SEAL_SHRINK) {
            return Err(refused("memfd could shrink"));
        }
        let size = u64::try_from(nix::sys::stat::fstat(&file)?.st_size).unwrap_or(0);
        if offset.checked_add(len as u64).is_none_or(|end| end > size) {
            return Err(refused("memfd is too short"));
        }
        let length = NonZeroUsize::new(len).ok_or_else(|| refused("nothing to map"))?;
        let offset = i64::try_from(offset).map_err(|_| refused("offset is too large"))?;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no memory of ours.
        let at = unsafe {
            mmap(
                None,
                length,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
                file,
                offset,
            )
        }?;
        Ok(Self { at, len })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `new` mapped exactly this range, and what was borrowed from `self` has ended.
        let unmapped = unsafe { munmap(self.at, self.len) };
        debug_assert!(unmapped.is_ok(), "the range was mapped by us");
    }
}

/// Bytes in such a file.
#[derive(Debug)]
pub struct Bytes(Mapping);

impl Bytes {
    /// Maps `len` bytes at `offset`, which is a multiple of the page size.
    ///
    /// # Errors
    /// InvalidInput when the file does not come from [`create`] or is too short; see mmap(2).
    pub fn map(file: impl AsFd, offset: u64, len: usize) -> io::Result<Self> {
        Ok(Self(Mapping::new(file, offset, len)?))
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `new` mapped `len` bytes here, the seal keeps them there, the mapping lives as long as `self`, and no
        // other process or system call writes to them meanwhile.
        unsafe { std::slice::from_raw_parts(self.0.at.as_ptr().cast::<u8>(), self.0.len) }
    }
}

impl DerefMut for Bytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `deref`, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.0.at.as_ptr().cast::<u8>(), self.0.len) }
    }
}

/// Words in such a file. A thread that is killed has stored what precedes a store before it.
#[derive(Debug)]
pub struct Words(Mapping);

// SAFETY: the only access is through atomics.
unsafe impl Sync for Words {}

impl Words {
    /// Maps `count` words at `offset`, which is a multiple of the page size.
    ///
    /// # Errors
    /// As for [`Bytes::map`].
    pub fn map(file: impl AsFd, offset: u64, count: usize) -> io::Result<Self> {
        Ok(Self(Mapping::new(file, offset, count * WORD)?))
    }
}

impl Deref for Words {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: `new` mapped this many words at an address aligned to pages, the seal keeps them there, the mapping
        // lives as long as `self`, and any bytes are a valid word.
        unsafe { std::slice::from_raw_parts(self.0.at.as_ptr().cast::<AtomicU64>(), self.0.len / WORD) }
    }
}

/// Moves up to `limit` bytes from a pipe to where the file's position is ([`seek`]), without waiting. The position, which
/// everybody with a copy of its descriptor can ask for ([`position`]), moves with them in the same system call: no kill
/// comes in between.
///
/// # Errors
/// EAGAIN when the pipe is empty; see splice(2).
pub fn receive(pipe: impl AsFd, file: &File, limit: usize) -> nix::Result<usize> {
    splice(pipe, None, file, None, limit, SpliceFFlags::SPLICE_F_NONBLOCK)
}

/// Sets the file's position.
///
/// # Errors
/// See lseek(2).
pub fn seek(file: &File, offset: u64) -> nix::Result<()> {
    let offset = i64::try_from(offset).map_err(|_| nix::errno::Errno::EOVERFLOW)?;
    lseek(file, offset, Whence::SeekSet)?;
    Ok(())
}

/// The file's position.
///
/// # Errors
/// See lseek(2).
pub fn position(file: &File) -> nix::Result<u64> {
    Ok(u64::try_from(lseek(file, 0, Whence::SeekCur)?).unwrap_or(0))
}

/// Gives the memory of a range back, which reads as zeroes then.
///
/// # Errors
/// See fallocate(2).
pub fn give_back(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let range = (i64::try_from(offset), i64::try_from(len));
    let (Ok(offset), Ok(len)) = range else { return Err(io::ErrorKind::InvalidInput.into()) };
    fallocate(file, mode, offset, len)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;
    use std::sync::atomic::Ordering;

    use nix::errno::Errno;
    use nix::unistd::write;

    use super::*;
    use crate::sys::pipe;

    #[test]
    fn what_is_stored_is_there_for_whoever_has_the_descriptor() {
        let file = create(c"test", 3 * 65_536).unwrap();
        let mut bytes = Bytes::map(&file, 65_536, 100).unwrap();
        let words = Words::map(&file, 131_072, 4).unwrap();
        bytes[..5].copy_from_slice(b"hello");
        words[3].store(7, Ordering::Release);
        let again = file.try_clone().unwrap();
        assert_eq!(&Bytes::map(&again, 65_536, 100).unwrap()[..6], b"hello\0");
        assert_eq!(Words::map(&again, 131_072, 4).unwrap()[3].load(Ordering::Acquire), 7);
        give_back(&File::from(again), 65_536, 65_536).unwrap();
        assert_eq!(bytes[0], 0);
    }

    #[test]
    fn what_could_vanish_is_not_mapped() {
        let plain = crate::sys::memfd::create(c"test").unwrap();
        assert_eq!(Bytes::map(&plain, 0, 1).unwrap_err().to_string(), "memfd could shrink");
        let file = create(c"test", 4096).unwrap();
        assert_eq!(Bytes::map(&file, 0, 4097).unwrap_err().to_string(), "memfd is too short");
        ftruncate(&file, 10).unwrap_err();
    }

    #[test]
    fn the_position_says_how_much_has_arrived() {
        let file = File::from(create(c"test", 131_072).unwrap());
        let (ours, theirs) = pipe::pipe_for_output().unwrap();
        write(&theirs, b"some lines\n").unwrap();
        seek(&file, 65_536).unwrap();
        assert_eq!(receive(&ours, &file, 65_536), Ok(11));
        assert_eq!(position(&file.try_clone().unwrap()), Ok(65_547));
        let mut arrived = [0; 11];
        file.read_exact_at(&mut arrived, 65_536).unwrap();
        assert_eq!(&arrived, b"some lines\n");
        seek(&file, 65_536).unwrap();
        assert_eq!(receive(&ours, &file, 65_536), Err(Errno::EAGAIN));
        assert_eq!(position(&file), Ok(65_536));
    }
}
