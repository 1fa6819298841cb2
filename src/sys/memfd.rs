//! Anonymous files: sealed ones that carry a message, and plain ones that keep state across processes.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::ops::Deref;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

const SEALED: SealFlag = SealFlag::F_SEAL_SHRINK.union(SealFlag::F_SEAL_GROW).union(SealFlag::F_SEAL_WRITE);

/// An empty anonymous file (CLOEXEC), for keeping bytes that a process holding a copy of the descriptor will find.
///
/// # Errors
/// See memfd_create(2).
pub fn create(name: &CStr) -> io::Result<OwnedFd> {
    Ok(memfd_create(name, MFdFlags::MFD_CLOEXEC)?)
}

/// An anonymous file with this content that nobody can change any more.
///
/// # Errors
/// See memfd_create(2), write(2), fcntl(2).
pub fn sealed(name: &CStr, content: &[u8]) -> io::Result<OwnedFd> {
    let mut file = File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    file.write_all(content)?;
    fcntl(&file, FcntlArg::F_ADD_SEALS(SEALED | SealFlag::F_SEAL_SEAL))?;
    Ok(file.into())
}

/// The bytes of a sealed anonymous file, mapped read-only.
#[derive(Debug)]
pub struct Mapped {
    at: NonNull<libc::c_void>,
    len: usize,
}

impl Mapped {
    /// Maps the whole of a file made by [`sealed`].
    ///
    /// # Errors
    /// InvalidInput when it is not sealed against changes, is empty, or is longer than `limit` bytes.
    pub fn new(fd: impl AsFd, limit: usize) -> io::Result<Self> {
        let refused = |why| io::Error::new(io::ErrorKind::InvalidInput, why);
        let seals = fcntl(&fd, FcntlArg::F_GET_SEALS).map_err(|_| refused("not a memfd"))?;
        if !SealFlag::from_bits_truncate(seals).contains(SEALED) {
            return Err(refused("memfd is not sealed"));
        }
        let size = nix::sys::stat::fstat(&fd)?.st_size;
        let len = usize::try_from(size)
            .ok()
            .filter(|&len| len <= limit)
            .ok_or_else(|| refused("memfd is too long"))?;
        let length = NonZeroUsize::new(len).ok_or_else(|| refused("memfd is empty"))?;
        // SAFETY: a fresh private read-only mapping at an address of the kernel's choice touches no memory of ours.
        let at = unsafe { mmap(None, length, ProtFlags::PROT_READ, MapFlags::MAP_PRIVATE, fd, 0) }?;
        Ok(Self { at, len })
    }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `new` mapped `len` bytes here, the seals keep the file from shrinking or changing below us, and the
        // mapping lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr().cast::<u8>(), self.len) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: `new` mapped exactly this range, and the slices borrowed from `self` have ended.
        let unmapped = unsafe { munmap(self.at, self.len) };
        debug_assert!(unmapped.is_ok(), "the range was mapped by us");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sealed_bytes_arrive_and_cannot_change() {
        let fd = sealed(c"test", b"hello").unwrap();
        assert_eq!(&*Mapped::new(&fd, 5).unwrap(), b"hello");
        assert_eq!(Mapped::new(&fd, 4).unwrap_err().to_string(), "memfd is too long");
        File::from(fd).write_all(b"x").unwrap_err();
    }

    #[test]
    fn what_could_change_below_us_is_not_mapped() {
        let fd = create(c"test").unwrap();
        assert_eq!(Mapped::new(&fd, 10).unwrap_err().to_string(), "memfd is not sealed");
        assert_eq!(Mapped::new(io::stderr(), 10).unwrap_err().to_string(), "not a memfd");
        assert_eq!(Mapped::new(sealed(c"test", b"").unwrap(), 10).unwrap_err().to_string(), "memfd is empty");
    }
}
