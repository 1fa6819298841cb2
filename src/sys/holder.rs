//! Who holds a port or a socket path, for the message "port 3000 is in use by node (pid 123)".
//!
//! Looks at /proc/net once and then through the descriptors of all processes we may look into. Used only after a bind
//! has failed: it costs some 10 ms on a busy machine.

use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use super::procfs::{self, Procfs};

/// The state TCP_LISTEN in /proc/net/tcp.
const LISTEN: &str = "0A";

/// A process that holds an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its pid.
    pub pid: i32,
    /// Its name.
    pub command: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (pid {})", self.command, self.pid)
    }
}

/// The processes that listen where binding `address` would conflict: same port, and the same address or one of the
/// two is the wildcard. Empty when nobody does, or when it is somebody whose descriptors we may not see.
///
/// # Errors
/// /proc cannot be read.
pub fn of_tcp(address: SocketAddr) -> io::Result<Vec<Holder>> {
    let mut inodes = Vec::new();
    for file in ["/proc/net/tcp", "/proc/net/tcp6"] {
        let table = match File::open(file) {
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            other => BufReader::new(other?),
        };
        for line in table.lines().skip(1) {
            let line = line?;
            // The kernel shows listeners first. Behind them are all connections, of which a busy server has tens of
            // thousands that have just ended: reading them takes seconds.
            if !is_listener(&line) {
                break;
            }
            inodes.extend(listener(&line, address));
        }
    }
    of_inodes(&inodes)
}

/// The processes that have a socket bound to this path. As [`of_tcp`].
///
/// # Errors
/// /proc cannot be read.
pub fn of_unix(path: &Path) -> io::Result<Vec<Holder>> {
    let table = fs::read("/proc/net/unix")?;
    let inodes: Vec<u64> =
        table.split(|&b| b == b'\n').filter_map(|line| unix_inode(line, path.as_os_str())).collect();
    of_inodes(&inodes)
}

fn is_listener(line: &str) -> bool {
    line.split_whitespace().nth(3) == Some(LISTEN)
}

/// The inode in a line of /proc/net/tcp{,6}, if it listens in the way of `wanted`.
fn listener(line: &str, wanted: SocketAddr) -> Option<u64> {
    let mut fields = line.split_whitespace();
    let (local, state) = (fields.nth(1)?, fields.nth(1)?);
    let inode = fields.nth(5)?.parse().ok().filter(|&inode| inode != 0)?;
    let (address, port) = local.split_once(':')?;
    if state != LISTEN || u16::from_str_radix(port, 16).ok()? != wanted.port() {
        return None;
    }
    let held = hex_address(address)?;
    let conflicts = held.is_unspecified() || wanted.ip().is_unspecified() || same(held, wanted.ip());
    conflicts.then_some(inode)
}

/// An IPv4 listener may show as an IPv6 one with a mapped address.
fn same(one: IpAddr, other: IpAddr) -> bool {
    one.to_canonical() == other.to_canonical()
}

/// Four bytes at a time, each four as one number in the machine's byte order.
fn hex_address(text: &str) -> Option<IpAddr> {
    let mut bytes = Vec::with_capacity(16);
    for word in text.as_bytes().chunks(8) {
        let word = u32::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok()?;
        bytes.extend(word.to_ne_bytes());
    }
    if let Ok(four) = <[u8; 4]>::try_from(bytes.as_slice()) {
        return Some(Ipv4Addr::from(four).into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(|sixteen| Ipv6Addr::from(sixteen).into())
}

/// `Num RefCount Protocol Flags Type St Inode Path`; connections accepted there carry the path as well, and belong to
/// the same holder.
fn unix_inode(line: &[u8], path: &OsStr) -> Option<u64> {
    let mut rest = line;
    let mut inode = None;
    for index in 0..7 {
        rest = rest.trim_ascii_start();
        let end = rest.iter().position(u8::is_ascii_whitespace)?;
        if index == 6 {
            inode = std::str::from_utf8(&rest[..end]).ok()?.parse().ok();
        }
        rest = &rest[end..];
    }
    (rest.strip_prefix(b" ")? == path.as_bytes()).then_some(inode).flatten()
}

fn of_inodes(inodes: &[u64]) -> io::Result<Vec<Holder>> {
    let mut holders = Vec::new();
    if inodes.is_empty() {
        return Ok(holders);
    }
    let links: Vec<String> = inodes.iter().map(|inode| format!("socket:[{inode}]")).collect();
    let mut procfs = Procfs::new();
    let mut pids = Vec::new();
    procfs::all_pids(&mut pids)?;
    for pid in pids {
        if holds(pid, &links)
            && let Some(stat) = procfs.stat(pid)?
        {
            // Programs rename their threads, the first one included: what is executed says more.
            let command = procfs.program(pid).unwrap_or_else(|| stat.comm.to_string());
            holders.push(Holder { pid, command });
        }
    }
    Ok(holders)
}

fn holds(pid: i32, links: &[String]) -> bool {
    // Processes of other users, and those that have just gone, are passed over: the answer is only a hint.
    let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    descriptors
        .flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .any(|target| links.iter().any(|link| target.as_os_str() == link.as_str()))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::unix::net::UnixListener;

    use super::*;

    fn me() -> i32 {
        i32::try_from(std::process::id()).unwrap()
    }

    #[test]
    fn the_holder_of_a_port_is_found_by_every_address_that_would_conflict() {
        for (bound, wanted, found) in [
            ("127.0.0.1", "127.0.0.1", true),
            ("127.0.0.1", "0.0.0.0", true),
            ("127.0.0.1", "::", true),
            ("127.0.0.1", "::ffff:127.0.0.1", true),
            ("::1", "::1", true),
            ("127.0.0.1", "127.0.0.2", false),
        ] {
            let listener = TcpListener::bind((bound.parse::<IpAddr>().unwrap(), 0)).unwrap();
            let port = listener.local_addr().unwrap().port();
            let holders = of_tcp(SocketAddr::new(wanted.parse().unwrap(), port)).unwrap();
            assert_eq!(holders.iter().any(|h| h.pid == me()), found, "{bound} {wanted}: {holders:?}");
        }
    }

    #[test]
    fn a_free_port_has_no_holder() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        assert_eq!(of_tcp(address).unwrap(), []);
    }

    #[test]
    fn the_holder_of_a_path_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("with space.sock");
        let _listener = UnixListener::bind(&path).unwrap();
        let holders = of_unix(&path).unwrap();
        assert_eq!(holders.iter().map(|h| h.pid).collect::<Vec<_>>(), [me()]);
        assert!(holders[0].to_string().ends_with(&format!("(pid {})", me())), "{}", holders[0]);
        assert_eq!(of_unix(&dir.path().join("other")).unwrap(), []);
    }
}
