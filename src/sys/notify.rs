//! Talking to a service manager: `NOTIFY_SOCKET` and the watchdog (sd_notify(3), sd_watchdog_enabled(3)).
//!
//! Never waits: a service manager that does not read loses news, and we lose nothing.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// The variables by which a service manager and the programs it started address each other; what we start is not
/// meant by them.
pub const VARIABLES: [&str; 8] = [
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_FDNAMES",
    "INVOCATION_ID",
    "JOURNAL_STREAM",
];

/// Asks a keeper to leave everything to the next one, which is about to come: a service manager restarts the daemon.
pub const LEAVE_SIGNAL: i32 = libc::SIGUSR1;

/// The way to the service manager.
#[derive(Debug)]
pub struct Notifier {
    socket: UnixDatagram,
    address: SocketAddr,
}

impl Notifier {
    /// The service manager at this value of `NOTIFY_SOCKET`: a path, or `@` and an abstract name.
    ///
    /// # Errors
    /// The value is no address of a unix socket; no descriptor is left.
    pub fn at(value: &OsStr) -> io::Result<Self> {
        let address = match value.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            [b'/', ..] => SocketAddr::from_pathname(value)?,
            _ => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "neither a path nor an abstract name",
                ));
            }
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, address })
    }

    /// Sends `KEY=value` lines.
    ///
    /// # Errors
    /// Nobody reads there, or too slowly.
    pub fn send(&self, lines: &str) -> io::Result<()> {
        self.socket.send_to_addr(lines.as_bytes(), &self.address).map(drop)
    }
}

/// How often the service manager wants to hear `WATCHDOG=1` of the process `pid`, from `WATCHDOG_USEC` and
/// `WATCHDOG_PID`.
#[must_use]
pub fn watchdog(usec: Option<&str>, watched: Option<&str>, pid: u32) -> Option<Duration> {
    if watched.is_some_and(|watched| watched.parse() != Ok(pid)) {
        return None;
    }
    let usec = usec?.parse().ok().filter(|&usec| usec > 0)?;
    Some(Duration::from_micros(usec))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(socket: &UnixDatagram) -> String {
        let mut buffer = [0; 100];
        let len = socket.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..len]).into_owned()
    }

    #[test]
    fn both_kinds_of_address_are_reached() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let named = UnixDatagram::bind(&path).unwrap();
        Notifier::at(path.as_os_str()).unwrap().send("READY=1").unwrap();
        assert_eq!(heard(&named), "READY=1");

        let name = format!("pm-notify-test-{}", std::process::id());
        let hidden = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        Notifier::at(OsStr::new(&format!("@{name}"))).unwrap().send("STATUS=two\nREADY=1").unwrap();
        assert_eq!(heard(&hidden), "STATUS=two\nREADY=1");

        Notifier::at(OsStr::new("vsock:1:2")).unwrap_err();
        drop(named);
        let gone = Notifier::at(path.as_os_str()).unwrap().send("READY=1").unwrap_err();
        assert_eq!(gone.kind(), io::ErrorKind::ConnectionRefused);
    }

    #[test]
    fn a_watchdog_is_meant_for_one_process() {
        let of = |usec, watched| watchdog(usec, watched, 42);
        assert_eq!(of(Some("2000000"), None), Some(Duration::from_secs(2)));
        assert_eq!(of(Some("2000000"), Some("42")), Some(Duration::from_secs(2)));
        assert_eq!(of(Some("2000000"), Some("43")), None, "a parent's");
        assert_eq!(of(None, Some("42")), None);
        assert_eq!(of(Some("0"), None), None);
        assert_eq!(of(Some("soon"), None), None);
    }
}
