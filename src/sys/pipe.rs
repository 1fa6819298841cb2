//! The pipes and socket pairs between us and an application.
//!
//! O_NONBLOCK belongs to the open file description, so only ends that stay with us ever get it: an application that
//! inherited it would lose output on EAGAIN.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::fcntl::{OFlag, SpliceFFlags, tee};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::pipe2;
use socket2::{Domain, SockAddr, Socket, Type};

/// A pipe for an application's stdout or stderr: our reading end (non-blocking), its writing end (blocking).
///
/// The writing end is opened for reading too, so that the application is a reader of its own output and never dies of
/// EPIPE while nobody else reads. Its end of stream therefore is: process gone and pipe drained. Both are CLOEXEC.
///
/// # Errors
/// See pipe(2); EMFILE and ENFILE.
pub fn pipe_for_output() -> io::Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
    // Opening through /proc gives a description of its own, with its own flags.
    let both = reopen(&writer, OpenOptions::new().read(true).write(true))?;
    let reader = reopen(&reader, OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK))?;
    Ok((reader, both))
}

/// A pipe for an application's stdin: its reading end, and our writing end (non-blocking). While somebody holds the
/// writing end and writes nothing, stdin is open and silent. Both are CLOEXEC.
///
/// # Errors
/// See pipe(2); EMFILE and ENFILE.
pub fn stdin_pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
    let writer = reopen(&writer, OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK))?;
    Ok((reader, writer))
}

/// A pipe on which an application says that it is ready: the application's end (blocking), ours (non-blocking).
///
/// # Errors
/// See pipe2(2); EMFILE and ENFILE.
pub fn ready_pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
    set_nonblocking(&reader)?;
    Ok((writer, reader))
}

/// Reads what is in a pipe and leaves it there, tee(2): at most 64 KiB or what `bytes` has room for. 0 at its end.
///
/// # Errors
/// EAGAIN when it is empty; EMFILE and ENFILE.
pub fn peek_pipe(pipe: &OwnedFd, bytes: &mut [u8]) -> io::Result<usize> {
    let (copy, writer) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    let length = tee(pipe, &writer, bytes.len(), SpliceFFlags::SPLICE_F_NONBLOCK)?;
    Ok(if length == 0 { 0 } else { nix::unistd::read(&copy, bytes)? })
}

/// The two ends of a Node channel (AF_UNIX, SOCK_STREAM, CLOEXEC): ours (non-blocking), the application's (blocking,
/// until its runtime decides otherwise).
///
/// # Errors
/// See socketpair(2); EMFILE and ENFILE.
pub fn channel_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)?;
    set_nonblocking(&ours)?;
    Ok((ours, theirs))
}

/// The two ends of a packet socket (AF_UNIX, SOCK_SEQPACKET, CLOEXEC), both blocking.
///
/// # Errors
/// See socketpair(2); EMFILE and ENFILE.
pub fn packet_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?)
}

/// Listens for packet sockets (AF_UNIX, SOCK_SEQPACKET, CLOEXEC, non-blocking) at a path, which must be free.
///
/// # Errors
/// See bind(2) and unix(7).
pub fn packet_listener(path: &Path) -> io::Result<OwnedFd> {
    let socket = Socket::new(Domain::UNIX, Type::SEQPACKET.nonblocking(), None)?;
    socket.bind(&SockAddr::unix(path)?)?;
    // Nobody can connect before listen(2), so there is no instant at which the umask counts.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    socket.listen(4)?;
    Ok(socket.into())
}

/// The next connection of such a listener; `None` when there is none now.
///
/// # Errors
/// See accept(2).
pub fn packet_accept(listener: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    match Socket::from(listener.try_clone()?).accept() {
        Ok((socket, _)) => Ok(Some(socket.into())),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}

/// Connects to such a listener.
///
/// # Errors
/// NotFound and ConnectionRefused when there is none; see connect(2).
pub fn packet_connect(path: &Path) -> io::Result<OwnedFd> {
    let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None)?;
    socket.connect(&SockAddr::unix(path)?)?;
    Ok(socket.into())
}

/// Connects to a listener for streams; waits for a place in its queue no longer than `patience`.
///
/// # Errors
/// `TimedOut` when its queue stays full; NotFound and ConnectionRefused when there is none; see connect(2).
pub fn stream_connect(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // Bounds connect(2) too, which then says EAGAIN (unix(7)). A socket that does not wait would say so at once.
    socket.set_write_timeout(Some(patience))?;
    match socket.connect(&SockAddr::unix(path)?) {
        Ok(()) => Ok(OwnedFd::from(socket).into()),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(io::ErrorKind::TimedOut.into()),
        Err(error) => Err(error),
    }
}

/// Makes reads and writes on this open file description return instead of waiting.
///
/// # Errors
/// See fcntl(2).
pub fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, fcntl};
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

nix::ioctl_read_bad!(bytes_waiting, libc::FIONREAD, libc::c_int);

/// How many bytes wait in a pipe.
///
/// # Errors
/// See ioctl(2) and pipe(7).
pub fn waiting(pipe: &OwnedFd) -> io::Result<usize> {
    let mut count = 0;
    // SAFETY: the ioctl writes one int through the pointer, which is valid for the call, and the descriptor is open.
    unsafe { bytes_waiting(pipe.as_raw_fd(), &raw mut count) }?;
    Ok(usize::try_from(count).unwrap_or(0))
}

fn reopen(fd: &OwnedFd, how: &OpenOptions) -> io::Result<OwnedFd> {
    Ok(how.open(format!("/proc/self/fd/{}", fd.as_raw_fd()))?.into())
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;
    use nix::fcntl::{FcntlArg, fcntl};
    use nix::unistd::{read, write};

    use super::*;

    fn is_nonblocking(fd: &OwnedFd) -> bool {
        OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL).unwrap()).contains(OFlag::O_NONBLOCK)
    }

    #[test]
    fn only_our_end_is_nonblocking() {
        let (ours, theirs) = pipe_for_output().unwrap();
        assert!(is_nonblocking(&ours) && !is_nonblocking(&theirs));
        let (theirs, ours) = stdin_pipe().unwrap();
        assert!(is_nonblocking(&ours) && !is_nonblocking(&theirs));
        let (ours, theirs) = channel_pair().unwrap();
        assert!(is_nonblocking(&ours) && !is_nonblocking(&theirs));
    }

    #[test]
    fn a_connection_waits_for_a_place_in_a_full_queue_but_not_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        let listener = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        listener.bind(&SockAddr::unix(&path).unwrap()).unwrap();
        listener.listen(0).unwrap();
        let patience = Duration::from_millis(100);
        let mut places = Vec::new();
        let error = loop {
            match stream_connect(&path, patience) {
                Ok(stream) => places.push(stream),
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(!places.is_empty());
        // A place that becomes free is taken.
        let waiting = std::thread::spawn({
            let path = path.clone();
            move || stream_connect(&path, Duration::from_secs(60))
        });
        listener.accept().unwrap();
        waiting.join().unwrap().unwrap();
        drop(listener);
        let error = stream_connect(&path, patience).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }

    #[test]
    fn output_survives_its_reader() {
        let (ours, theirs) = pipe_for_output().unwrap();
        drop(ours);
        assert_eq!(write(&theirs, b"nobody reads this"), Ok(17), "no EPIPE: the writer is a reader too");
    }

    #[test]
    fn output_is_read_without_waiting() {
        let (ours, theirs) = pipe_for_output().unwrap();
        let mut buffer = [0; 8];
        assert_eq!(read(&ours, &mut buffer), Err(Errno::EAGAIN));
        write(&theirs, b"line").unwrap();
        assert_eq!(waiting(&ours).unwrap(), 4);
        assert_eq!(read(&ours, &mut buffer), Ok(4));
        drop(theirs);
        assert_eq!(read(&ours, &mut buffer), Ok(0), "end of stream once the application is gone");
    }
}
