//! Who may use the machine: most tests share it, those that put load on it do so one at a time, and those that measure
//! time or processor time have it for themselves.
//!
//! Lock files, so that it works between the processes of nextest and the threads of `cargo test` alike. The gate
//! is held while one waits for the machine: a test that wants it alone is not overtaken for ever by sharing ones.

use std::fs::File;

use nix::fcntl::{Flock, FlockArg};

/// Held for the life of a test's home.
#[derive(Debug)]
pub(crate) struct Machine {
    _machine: Flock<File>,
    _load: Option<Flock<File>>,
}

impl Machine {
    /// Beside other tests.
    pub(crate) fn shared() -> Self {
        Self::lock(FlockArg::LockShared, None)
    }

    /// Beside tests that put no load on it.
    pub(crate) fn loaded() -> Self {
        // First, so that one that waits for its turn does not keep others from having the machine alone.
        let load = Flock::lock(open("load"), FlockArg::LockExclusive).expect("the load's lock");
        Self::lock(FlockArg::LockShared, Some(load))
    }

    /// Beside no other test.
    pub(crate) fn alone() -> Self {
        Self::lock(FlockArg::LockExclusive, None)
    }

    fn lock(kind: FlockArg, load: Option<Flock<File>>) -> Self {
        let gate = Flock::lock(open("gate"), FlockArg::LockExclusive).expect("the gate's lock");
        let machine = Flock::lock(open("machine"), kind).expect("the machine's lock");
        drop(gate);
        Self { _machine: machine, _load: load }
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
