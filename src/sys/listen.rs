//! Binding and accepting: listening TCP and unix sockets, UDP sockets.
//!
//! Every socket made here is CLOEXEC and non-blocking: O_NONBLOCK belongs to the open file description, which the
//! workers share, and a blocking listener hangs Node 18 for ever. Left-over socket files are never unlinked here.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::socket::SockFlag;
use nix::sys::stat::Mode;
use socket2::{Domain, SockAddr, SockRef, Socket, Type};

use super::guarded;
use super::guise::Guise;
use super::spawn::Credentials;
use super::users;

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
/// Where an app has a user, the app chooses the path, or may change what lies on it while we look: root would make a
/// socket, change a mode and remove a file wherever the app likes. So all of it is done in the guise of that user, and
/// the path stays as the app wrote it, which getsockname(2) and clients see. The socket is made in that guise too:
/// fstat(2) of any of its descriptors then names the user for as long as it lives, whoever closes it ([`unbind`]).
///
/// # Errors
/// EADDRINUSE when the file exists, also when it is a left-over; EINVAL for a path of more than 107 bytes; EACCES where
/// the user may not.
pub fn unix(path: &Path, extra_mode: u32, backlog: u32, guise: &Guise) -> io::Result<OwnedFd> {
    guise.run(|| {
        let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking().cloexec(), None)?;
        socket.bind(&SockAddr::unix(path)?)?;
        let widened = if extra_mode == 0 { Ok(()) } else { widen(path, extra_mode, guise) };
        if let Err(error) = widened.and_then(|()| socket.listen(clamp(backlog))) {
            // The file is ours since the bind above succeeded; a failure to remove it changes nothing for the caller.
            let _ = remove(path, guise);
            return Err(error);
        }
        Ok(socket.into())
    })
}

/// Removes the file of a listening unix socket that [`unix`] made, if it still is a socket; with the rights of the user
/// that it was made for, also when that was another process of ours. Means nothing for other sockets.
///
/// # Errors
/// As unlink(2), but none when it is gone already.
pub fn unbind(socket: BorrowedFd<'_>) -> io::Result<()> {
    let Some(path) = local_path(socket) else { return Ok(()) };
    let owner = nix::sys::stat::fstat(socket)?;
    let (uid, gid) = (owner.st_uid, owner.st_gid);
    if uid == 0 || !users::may_change_user() {
        return remove_socket(&path, &Guise::Own);
    }
    let of_user = |groups| Guise::User(Credentials { uid, gid, groups });
    match remove_socket(&path, &of_user(vec![gid])) {
        // By its other groups then, which take a look into the user database.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            remove_socket(&path, &of_user(users::groups_of(uid, gid)))
        }
        other => other,
    }
}

/// Removes the file of a unix socket, and nothing that is none.
///
/// # Errors
/// As unlink(2), but none when it is gone already.
pub fn remove_socket(path: &Path, guise: &Guise) -> io::Result<()> {
    match guise.run(|| remove(path, guise)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Within the guise.
fn remove(path: &Path, guise: &Guise) -> io::Result<()> {
    reached(path, guise, |path| {
        if std::fs::symlink_metadata(path)?.file_type().is_socket() {
            std::fs::remove_file(path)
        } else {
            Err(not_a_socket())
        }
    })
}

/// Adds to the mode of a socket's file, within the guise. Not through the path, which may have become another file's, and
/// no link.
fn widen(path: &Path, extra_mode: u32, guise: &Guise) -> io::Result<()> {
    reached(path, guise, |path| {
        let found = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = std::fs::File::from(nix::fcntl::open(path, found, Mode::empty())?);
        let meta = file.metadata()?;
        if !meta.file_type().is_socket() {
            return Err(not_a_socket());
        }
        let mode = std::fs::Permissions::from_mode(meta.mode() | extra_mode);
        std::fs::set_permissions(format!("/proc/self/fd/{}", file.as_raw_fd()), mode)
    })
}

/// Root goes through the directory's descriptor, and over no link of another user to what is not that user's. Others get
/// where their rights let them.
fn reached<T>(path: &Path, guise: &Guise, act: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    if guise.is_root() { act(guarded::way_in(path)?.as_path()) } else { act(path) }
}

fn not_a_socket() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "not a socket")
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
        let socket = unix(&path, 0o666, BACKLOG, &Guise::Own).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o666, 0o666);
        assert_eq!(kind(socket.as_fd()), Some(SocketKind::Stream));
        let again = unix(&path, 0, BACKLOG, &Guise::Own).unwrap_err();
        assert_eq!(again.raw_os_error(), Some(Errno::EADDRINUSE as i32));
        assert!(unix(&home.path().join("x".repeat(200)), 0, BACKLOG, &Guise::Own).is_err());
        unbind(socket.as_fd()).unwrap();
        assert!(!path.try_exists().unwrap());
        unbind(socket.as_fd()).unwrap();
        std::fs::write(&path, "no socket").unwrap();
        unbind(socket.as_fd()).unwrap_err();
        assert!(path.try_exists().unwrap());
    }

    /// Directories of root's and of bob's, for whom bob's guise is; `None` where only root could tell.
    fn two_users() -> Option<(tempfile::TempDir, Guise)> {
        if !users::may_change_user() {
            return None;
        }
        let home = tempfile::tempdir().unwrap();
        std::fs::set_permissions(home.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        for (name, owner) in [("roots", 0), ("bobs", 54_321), ("bobs/d", 54_321)] {
            std::fs::create_dir(home.path().join(name)).unwrap();
            std::os::unix::fs::chown(home.path().join(name), Some(owner), None).unwrap();
        }
        Some((home, Guise::User(Credentials { uid: 54_321, gid: 54_321, groups: vec![54_321] })))
    }

    #[test]
    fn a_unix_socket_of_a_user_is_made_and_removed_only_where_that_user_may() {
        let Some((home, bob)) = two_users() else { return };
        let at = |name: &str| home.path().join(name);
        let refused = unix(&at("roots/x"), 0o666, BACKLOG, &bob).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
        let [first, second] = ["bobs/d/file", "bobs/d/socket"].map(|name| {
            let socket = unix(&at(name), 0o666, BACKLOG, &bob).unwrap();
            let meta = std::fs::metadata(at(name)).unwrap();
            assert_eq!((meta.uid(), meta.gid(), meta.mode() & 0o666), (54_321, 54_321, 0o666));
            assert_eq!(local_path(socket.as_fd()).unwrap(), at(name), "as it was asked for");
            let socket_itself = nix::sys::stat::fstat(&socket).unwrap();
            assert_eq!((socket_itself.st_uid, socket_itself.st_gid), (54_321, 54_321));
            std::os::unix::net::UnixStream::connect(at(name)).unwrap();
            socket
        });
        let third = unix(&at("bobs/third"), 0, BACKLOG, &bob).unwrap();
        // The way leads to root's directory meanwhile, where the same names are.
        std::fs::rename(at("bobs/d"), at("bobs/old")).unwrap();
        std::os::unix::fs::symlink(at("roots"), at("bobs/d")).unwrap();
        std::os::unix::fs::lchown(at("bobs/d"), Some(54_321), None).unwrap();
        std::fs::write(at("roots/file"), "root's").unwrap();
        let _roots = unix(&at("roots/socket"), 0, BACKLOG, &Guise::Own).unwrap();
        for socket in [&first, &second] {
            unbind(socket.as_fd()).unwrap_err();
        }
        assert!(at("roots/file").try_exists().unwrap() && at("roots/socket").try_exists().unwrap());
        // One that root made there, as earlier versions did, is no way around that.
        let by_root = unix(&at("bobs/old/by-root"), 0, BACKLOG, &Guise::Own).unwrap();
        assert!(remove_socket(&at("bobs/d/socket"), &Guise::Own).is_err());
        assert!(at("roots/socket").try_exists().unwrap());
        unbind(by_root.as_fd()).unwrap();
        unbind(third.as_fd()).unwrap();
        assert!(!at("bobs/third").try_exists().unwrap() && !at("bobs/old/by-root").try_exists().unwrap());
    }

    #[test]
    fn a_mode_is_changed_of_a_users_own_socket_only_whatever_lies_on_its_path_by_then() {
        let Some((home, bob)) = two_users() else { return };
        let at = |name: &str| home.path().join(name);
        let _roots = unix(&at("roots/socket"), 0, BACKLOG, &Guise::Own).unwrap();
        std::fs::write(at("roots/shadow"), "root's").unwrap();
        std::fs::set_permissions(at("roots/shadow"), std::fs::Permissions::from_mode(0o600)).unwrap();
        // What is found between bind and the change.
        std::os::unix::fs::symlink(at("roots/shadow"), at("bobs/link")).unwrap();
        std::os::unix::fs::symlink(at("roots"), at("bobs/dir")).unwrap();
        for link in ["bobs/link", "bobs/dir"] {
            std::os::unix::fs::lchown(at(link), Some(54_321), None).unwrap();
        }
        let modes =
            || ["roots/shadow", "roots/socket"].map(|name| std::fs::metadata(at(name)).unwrap().mode());
        let before = modes();
        for path in ["bobs/link", "bobs/dir/shadow", "bobs/dir/socket"] {
            for guise in [&bob, &Guise::Own] {
                assert!(guise.run(|| widen(&at(path), 0o666, guise)).is_err(), "{path} {guise:?}");
            }
        }
        assert_eq!(modes(), before);
    }

    #[test]
    fn udp_and_what_is_no_socket_for_node() {
        let socket = udp(([127, 0, 0, 1], 0).into(), Stack::Dual, Reuse::No).unwrap();
        assert_eq!(kind(socket.as_fd()), Some(SocketKind::Datagram));
        let null = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(kind(null.as_fd()), None);
    }
}
