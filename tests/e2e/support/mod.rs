//! What every end-to-end test stands on: a home of its own that cleans up, waiting, processes, load, Node versions.

pub(crate) mod census;
pub(crate) mod container;
pub(crate) mod docs;
pub(crate) mod earlier;
pub(crate) mod genuine;
pub(crate) mod groups;
pub(crate) mod home;
pub(crate) mod load;
pub(crate) mod machine;
pub(crate) mod mounts;
pub(crate) mod node;
pub(crate) mod process;
pub(crate) mod wait;

use std::path::PathBuf;
use std::time::Duration;

pub(crate) use home::{Home, Row, Run};
pub(crate) use wait::{stays, wait_until};

/// For things that take milliseconds on an idle machine, and seconds on a loaded one.
pub(crate) const SOON: Duration = Duration::from_secs(10);

/// For a handful of Node starts on a loaded machine.
pub(crate) const PATIENT: Duration = Duration::from_secs(30);

pub(crate) fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

pub(crate) fn millis(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// Says, where people look for it, that a test could not be run.
pub(crate) fn not_here(why: &str) {
    eprintln!("NOT RUN HERE: {why}");
}

/// A program below `tests/fixtures/apps`.
pub(crate) fn fixture(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/apps").join(name);
    assert!(path.is_file(), "no fixture {}", path.display());
    path.to_str().expect("the repository's path is UTF-8").to_owned()
}

/// A port of nobody's, from the kernel, which gives it to nobody else for a minute: a connection to it lies in TIME_WAIT, which
/// bars port 0 and outgoing connections but not servers that bind it by number with SO_REUSEADDR, as all do.
pub(crate) fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a loopback port");
    let address = listener.local_addr().expect("its address");
    let client = std::net::TcpStream::connect(address).expect("a connection to ourselves");
    // Whoever closes first keeps its port in TIME_WAIT.
    drop(listener.accept().expect("that connection"));
    drop(client);
    address.port()
}

/// The first of two neighbours that nobody uses. Not of those that the kernel gives out: it prefers every other one for
/// connections, so that a neighbour of `free_port` is taken again before long.
pub(crate) fn two_free_ports() -> u16 {
    let free = |port: u16| std::net::TcpListener::bind(("127.0.0.1", port)).is_ok();
    let first = 20_000 + u16::try_from(std::process::id() % 5_000).expect("it is small") * 2;
    (first..32_000).step_by(2).find(|&port| free(port) && free(port + 1)).expect("two free ports")
}
