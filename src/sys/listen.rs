//! Binding and accepting: listening TCP and unix sockets, UDP sockets.
//!
//! Every socket made here is CLOEXEC and non-blocking: O_NONBLOCK belongs to the open file description, which the
//! workers share, and a blocking listener hangs Node 18 for ever. Left-over socket files are never unlinked here.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::SockFlag;
use socket2::{Domain, SockAddr, SockRef, Socket, Type};

/// The backlog Node asks for, and hence everybody's default.
pub const BACKLOG: u32 = 511;

/// Whether an IPv6 socket also serves IPv4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stack {
    /// IPV6_V6ONLY off; means nothing for IPv4 addresses.
    Dual,
    /// IPV6_V6ONLY on.
    V6Only,
}

/// Listens on a TCP address with SO_REUSEADDR.
///
/// # Errors
/// EADDRINUSE, EACCES, EADDRNOTAVAIL and the like, from bind(2) or listen(2).
pub fn tcp(address: SocketAddr, stack: Stack, backlog: u32) -> io::Result<OwnedFd> {
    let socket = bound(address, stack, Type::STREAM, Reuse::Address)?;
    socket.listen(clamp(backlog))?;
    Ok(socket.into())
}

/// Listens on all addresses as Node does for `listen(port)`: `::` with IPv4, or `0.0.0.0` where IPv6 is missing.
///
/// # Errors
/// As [`tcp`].
pub fn tcp_any(port: u16, backlog: u32) -> io::Result<OwnedFd> {
    match tcp((Ipv6Addr::UNSPECIFIED, port).into(), Stack::Dual, backlog) {
        Err(error) if no_ipv6(&error) => tcp((Ipv4Addr::UNSPECIFIED, port).into(), Stack::Dual, backlog),
        other => other,
    }
}

/// Listens where a TCP socket of ours listens already, beside it ([`super::reuseport::share`]).
///
/// # Errors
/// As [`tcp`]; EADDRINUSE when the other socket does not share.
pub fn tcp_beside(other: BorrowedFd<'_>, backlog: u32) -> io::Result<OwnedFd> {
    let address = local_address(other)?.ok_or(io::ErrorKind::InvalidInput)?;
    let v6_only = address.is_ipv6() && SockRef::from(&other).only_v6()?;
    let socket =
        bound(address, if v6_only { Stack::V6Only } else { Stack::Dual }, Type::STREAM, Reuse::Port)?;
    socket.listen(clamp(backlog))?;
    Ok(socket.into())
}

/// Whether others may bind the same address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reuse {
    /// SO_REUSEADDR off.
    No,
    /// SO_REUSEADDR on.
    Address,
    /// SO_REUSEADDR and SO_REUSEPORT on.
    Port,
}

/// Binds a UDP socket.
///
/// # Errors
/// As bind(2).
pub fn udp(address: SocketAddr, stack: Stack, reuse: Reuse) -> io::Result<OwnedFd> {
    Ok(bound(address, stack, Type::DGRAM, reuse)?.into())
}

/// Listens on a unix stream socket; `extra_mode` is added to the file's mode after bind (0444 for `readableAll`, 0222
/// for `writableAll`).
///
/// # Errors
/// EADDRINUSE when the file exists, also when it is a left-over; EINVAL for a path of more than 107 bytes.
pub fn unix(path: &Path, extra_mode: u32, backlog: u32) -> io::Result<OwnedFd> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking().cloexec(), None)?;
    socket.bind(&SockAddr::unix(path)?)?;
    let listening = socket.listen(clamp(backlog)).and_then(|()| {
        if extra_mode == 0 {
            return Ok(());
        }
        let mode = std::fs::metadata(path)?.permissions().mode() | extra_mode;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
    });
    if let Err(error) = listening {
        // The file is ours since the bind above succeeded; a failure to remove it changes nothing for the caller.
        let _ = std::fs::remove_file(path);
        return Err(error);
    }
    Ok(socket.into())
}

/// Accepts one connection, non-blocking and CLOEXEC as Node's own (accept4(2)).
///
/// # Errors
/// EAGAIN when nobody is waiting, ECONNABORTED when that client is gone again, EMFILE and ENFILE.
pub fn accept(listener: BorrowedFd<'_>) -> nix::Result<OwnedFd> {
    let raw =
        nix::sys::socket::accept4(listener.as_raw_fd(), SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC)?;
    // SAFETY: accept4 has just returned this descriptor to us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// The address a socket is bound to, if it is an internet address.
///
/// # Errors
/// What getsockname(2) says.
pub fn local_address(socket: BorrowedFd<'_>) -> io::Result<Option<SocketAddr>> {
    Ok(SockRef::from(&socket).local_addr()?.as_socket())
}

/// The number of a network interface, as in the scope of a link-local address; `None` if there is none of that name.
#[must_use]
pub fn interface_index(name: &str) -> Option<u32> {
    nix::net::if_::if_nametoindex(name).ok()
}

/// The path a unix socket is bound to, if it is one and has one.
#[must_use]
pub fn local_path(socket: BorrowedFd<'_>) -> Option<PathBuf> {
    let address = SockRef::from(&socket).local_addr().ok()?;
    address.as_pathname().map(Path::to_owned)
}

/// What kind of socket a descriptor is, as far as a Node worker can use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketKind {
    /// A listening TCP or unix stream socket.
    Stream,
    /// A UDP socket.
    Datagram,
}

/// Tells the kind of a socket; `None` for what must never be sent to a Node worker (it aborts).
#[must_use]
pub fn kind(socket: BorrowedFd<'_>) -> Option<SocketKind> {
    let socket = SockRef::from(&socket);
    let domain = socket.domain().ok()?;
    match socket.r#type().ok()? {
        Type::STREAM if domain == Domain::UNIX || domain == Domain::IPV4 || domain == Domain::IPV6 => {
            Some(SocketKind::Stream)
        }
        Type::DGRAM if domain == Domain::IPV4 || domain == Domain::IPV6 => Some(SocketKind::Datagram),
        _ => None,
    }
}

/// The socket's inode: tells one socket from another, whatever descriptor it has.
///
/// # Errors
/// What fstat(2) says.
pub fn identity(socket: BorrowedFd<'_>) -> nix::Result<u64> {
    Ok(nix::sys::stat::fstat(socket)?.st_ino)
}

/// Clears O_NONBLOCK on the open file description, for everybody who shares it.
///
/// # Errors
/// What fcntl(2) says.
pub fn set_blocking(socket: BorrowedFd<'_>) -> io::Result<()> {
    SockRef::from(&socket).set_nonblocking(false)
}

/// Sets O_NONBLOCK on the open file description, for everybody who shares it.
///
/// # Errors
/// What fcntl(2) says.
pub fn set_nonblocking(socket: BorrowedFd<'_>) -> io::Result<()> {
    SockRef::from(&socket).set_nonblocking(true)
}

/// Sets TCP_NODELAY on a listener; accepted connections inherit it.
///
/// Servers turn Nagle's algorithm off for sockets they made themselves, and some forget it for inherited ones (uvicorn
/// with `--fd`): each keep-alive answer in two writes then waits 40 ms for the client's delayed acknowledgement.
///
/// # Errors
/// What setsockopt(2) says.
pub fn set_nodelay(listener: BorrowedFd<'_>) -> io::Result<()> {
    SockRef::from(&listener).set_tcp_nodelay(true)
}

fn bound(address: SocketAddr, stack: Stack, kind: Type, reuse: Reuse) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind.nonblocking().cloexec(), None)?;
    if reuse != Reuse::No {
        socket.set_reuse_address(true)?;
    }
    if reuse == Reuse::Port {
        socket.set_reuse_port(true)?;
    }
    if address.is_ipv6() {
        socket.set_only_v6(stack == Stack::V6Only)?;
    }
    socket.bind(&address.into())?;
    Ok(socket)
}

fn no_ipv6(error: &io::Error) -> bool {
    [Errno::EAFNOSUPPORT, Errno::EADDRNOTAVAIL, Errno::EPROTONOSUPPORT, Errno::EINVAL]
        .iter()
        .any(|errno| error.raw_os_error() == Some(*errno as i32))
}

fn clamp(backlog: u32) -> i32 {
    i32::try_from(backlog).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn an_address_is_bound_once() {
        let first = tcp_any(0, BACKLOG).unwrap();
        let address = local_address(first.as_fd()).unwrap().unwrap();
        let again = tcp_any(address.port(), BACKLOG).unwrap_err();
        assert_eq!(again.raw_os_error(), Some(Errno::EADDRINUSE as i32));
        assert_eq!(kind(first.as_fd()), Some(SocketKind::Stream));
    }

    #[test]
    fn accept_takes_one_and_never_waits() {
        let listener = tcp(([127, 0, 0, 1], 0).into(), Stack::Dual, BACKLOG).unwrap();
        assert_eq!(accept(listener.as_fd()).unwrap_err(), Errno::EAGAIN);
        let _client = TcpStream::connect(local_address(listener.as_fd()).unwrap().unwrap()).unwrap();
        accept(listener.as_fd()).unwrap();
        assert_eq!(accept(listener.as_fd()).unwrap_err(), Errno::EAGAIN);
    }

    #[test]
    fn nodelay_of_a_listener_is_inherited_by_its_connections() {
        let listener = tcp(([127, 0, 0, 1], 0).into(), Stack::Dual, BACKLOG).unwrap();
        set_nodelay(listener.as_fd()).unwrap();
        let _client = TcpStream::connect(local_address(listener.as_fd()).unwrap().unwrap()).unwrap();
        let accepted = accept(listener.as_fd()).unwrap();
        assert!(SockRef::from(&accepted).tcp_nodelay().unwrap());
    }

    #[test]
    fn unix_sockets_get_their_mode_and_refuse_long_paths() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("app.sock");
        let socket = unix(&path, 0o666, BACKLOG).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o666, 0o666);
        assert_eq!(kind(socket.as_fd()), Some(SocketKind::Stream));
        let again = unix(&path, 0, BACKLOG).unwrap_err();
        assert_eq!(again.raw_os_error(), Some(Errno::EADDRINUSE as i32));
        assert!(unix(&home.path().join("x".repeat(200)), 0, BACKLOG).is_err());
    }

    #[test]
    fn udp_and_what_is_no_socket_for_node() {
        let socket = udp(([127, 0, 0, 1], 0).into(), Stack::Dual, Reuse::No).unwrap();
        assert_eq!(kind(socket.as_fd()), Some(SocketKind::Datagram));
        let null = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(kind(null.as_fd()), None);
    }
}
