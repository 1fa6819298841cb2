//! Who may use the machine: most tests share it, those that measure time or load have it for themselves.
//!
//! Two lock files, so that it works between the processes of nextest and the threads of `cargo test` alike. The gate
//! is held while one waits for the machine: a test that wants it alone is not overtaken for ever by sharing ones.

use std::fs::File;

use nix::fcntl::{Flock, FlockArg};

/// Held for the life of a test's home.
#[derive(Debug)]
pub(crate) struct Machine {
    _lock: Flock<File>,
}

impl Machine {
    /// Beside other tests.
    pub(crate) fn shared() -> Self {
        Self::lock(FlockArg::LockShared)
    }

    /// Beside no other test.
    pub(crate) fn alone() -> Self {
        Self::lock(FlockArg::LockExclusive)
    }

    fn lock(kind: FlockArg) -> Self {
        let gate = Flock::lock(open("gate"), FlockArg::LockExclusive).expect("the gate's lock");
        let lock = Flock::lock(open("machine"), kind).expect("the machine's lock");
        drop(gate);
        Self { _lock: lock }
    }
}

fn open(name: &str) -> File {
    let user = nix::unistd::getuid();
    let path = std::env::temp_dir().join(format!("pm-tests-{user}-{name}.lock"));
    File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .unwrap_or_else(|error| panic!("cannot open {}: {error}", path.display()))
}
