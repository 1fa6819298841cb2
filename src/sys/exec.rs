//! The executable of this process, and the name it shows.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

/// Opens the executable this process was started from. The descriptor keeps naming this very build after a package
/// upgrade has replaced or removed the file.
///
/// # Errors
/// See open(2) and proc(5).
pub fn own_executable() -> io::Result<OwnedFd> {
    Ok(File::open("/proc/self/exe")?.into())
}

/// Sets the name that ps and top show, cut at 15 bytes (PR_SET_NAME). A program started through a descriptor would
/// otherwise show that descriptor's number (before Linux 6.14).
///
/// # Errors
/// See prctl(2).
pub fn set_process_name(name: &CStr) -> io::Result<()> {
    Ok(nix::sys::prctl::set_name(name)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_executable_is_the_file_we_run() {
        use std::os::unix::fs::MetadataExt;
        let opened = File::from(own_executable().unwrap()).metadata().unwrap();
        let named = std::fs::metadata(std::env::current_exe().unwrap()).unwrap();
        assert_eq!((opened.dev(), opened.ino()), (named.dev(), named.ino()));
    }
}
