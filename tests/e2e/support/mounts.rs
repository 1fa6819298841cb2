//! File systems that a test makes for itself: in a mount namespace of the test's thread, which what it starts inherits
//! and nobody else sees.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use super::not_here;

/// A mounted file system. Declare it after the home it is for, and end the daemon before it goes.
#[derive(Debug)]
pub(crate) struct Mounted {
    at: PathBuf,
}

/// Gives this thread mounts of its own; `false`, with the reason on stderr, where only root may.
pub(crate) fn own_mounts() -> bool {
    let none: Option<&str> = None;
    let made = unshare(CloneFlags::CLONE_NEWNS)
        .and_then(|()| mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none));
    if let Err(errno) = made {
        assert!(!nix::unistd::geteuid().is_root(), "cannot make a mount namespace: {errno}");
        not_here(&format!("only root can mount file systems: {errno}"));
        return false;
    }
    true
}

impl Mounted {
    fn new(source: &str, at: &Path, kind: &str, flags: MsFlags, options: &str) -> Self {
        fs::create_dir_all(at).expect("a place to mount at");
        mount(Some(source), at, Some(kind), flags, Some(options))
            .unwrap_or_else(|errno| panic!("cannot mount {kind} at {}: {errno}", at.display()));
        Self { at: at.to_owned() }
    }

    /// An empty file system in memory, of so many KiB.
    pub(crate) fn small(at: &Path, kib: u32) -> Self {
        let options = format!("size={kib}k,mode=0700");
        Self::new("tmpfs", at, "tmpfs", MsFlags::empty(), &options)
    }

    /// What is there, once more, read-only: who opens a file from now on can only read it.
    pub(crate) fn read_only(at: &Path) -> Self {
        let place = at.to_str().expect("UTF-8");
        let mounted = Self::new(place, at, "", MsFlags::MS_BIND, "");
        let none: Option<&str> = None;
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(none, at, none, flags, none).expect("read-only");
        mounted
    }

    /// An ext4 in a file; `None`, with the reason on stderr, where there is none to be had.
    pub(crate) fn ext4(image: &Path, at: &Path) -> Option<Self> {
        if fs::symlink_metadata(image).is_err() {
            fs::File::create(image).and_then(|file| file.set_len(8 << 20)).expect("an image");
            let made = Command::new("mkfs.ext4").args(["-q", "-F"]).arg(image).status();
            if !made.is_ok_and(|status| status.success()) {
                not_here("no mkfs.ext4");
                return None;
            }
        }
        fs::create_dir_all(at).expect("a place to mount at");
        let mounted =
            Command::new("mount").args(["-o", "loop"]).arg(image).arg(at).output().expect("mount(8)");
        if !mounted.status.success() {
            not_here(&format!("no loop device or no ext4: {}", String::from_utf8_lossy(&mounted.stderr)));
            return None;
        }
        Some(Self { at: at.to_owned() })
    }

    /// From now on every access fails with EIO, as on a disk that is gone.
    pub(crate) fn fail(&self) {
        // EXT4_IOC_SHUTDOWN, without writing anything back (linux/ext4.h).
        let code = "import fcntl, os, struct, sys\n\
                    fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY), 0x8004587d, struct.pack('I', 2))";
        let done = Command::new(super::node::python()).args(["-c", code]).arg(&self.at).status();
        assert!(done.is_ok_and(|status| status.success()), "cannot shut the file system down");
    }

    /// Writes until nothing more fits.
    pub(crate) fn fill(&self) {
        let mut file = fs::File::create(self.at.join("filler")).expect("a file");
        for size in [4096, 1] {
            let block = vec![b'x'; size];
            while file.write_all(&block).is_ok() {}
        }
    }

    /// Makes room again.
    pub(crate) fn free(&self) {
        fs::remove_file(self.at.join("filler")).expect("it was full");
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.at, MntFlags::MNT_DETACH);
    }
}
