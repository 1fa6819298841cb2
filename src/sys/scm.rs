//! Stream sockets that carry lines, some of them with one descriptor: the calls behind a Node IPC channel.
//!
//! Nothing here blocks, and nothing here ever receives a descriptor: the receiving calls pass no control buffer, so
//! the kernel closes what a peer attaches (unix(7), MSG_CTRUNC).

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType};

/// A connected pair of AF_UNIX stream sockets, both CLOEXEC and non-blocking.
///
/// # Errors
/// What socketpair(2) says; EMFILE above all.
pub fn line_pair() -> nix::Result<(OwnedFd, OwnedFd)> {
    nix::sys::socket::socketpair(
        AddressFamily::Unix,
        SockType::Stream,
        None,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
    )
}

/// What [`peek`] saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peeked {
    /// How many bytes; 0 means end of stream.
    pub count: usize,
    /// The last of them carry a descriptor. More may have arrived behind them, and is shown once they are consumed.
    pub hides_more: bool,
}

/// Copies what has arrived into `buffer` and leaves it in the socket.
///
/// # Errors
/// EAGAIN when nothing is there; ECONNRESET, once, when the peer closed with data of ours unread.
pub fn peek(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> nix::Result<Peeked> {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    retry(|| {
        let mut parts = [IoSliceMut::new(buffer)];
        let message = nix::sys::socket::recvmsg::<()>(socket.as_raw_fd(), &mut parts, None, flags)?;
        Ok(Peeked { count: message.bytes, hides_more: message.flags.contains(MsgFlags::MSG_CTRUNC) })
    })
}

/// Takes `count` bytes that were seen by [`peek`] out of the socket. `scratch` is overwritten.
///
/// # Errors
/// What recv(2) says, if fewer bytes are there than were seen.
pub fn consume(socket: BorrowedFd<'_>, count: usize, scratch: &mut [u8]) -> nix::Result<()> {
    let mut left = count;
    while left > 0 {
        let room = left.min(scratch.len());
        let taken = retry(|| {
            nix::sys::socket::recv(socket.as_raw_fd(), &mut scratch[..room], MsgFlags::MSG_DONTWAIT)
        })?;
        if taken == 0 {
            return Err(Errno::ECONNRESET);
        }
        left -= taken;
    }
    Ok(())
}

/// Sends bytes, and `handle` with the first of them. Returns how many bytes went; the handle has gone when any did.
///
/// Up to 32 KiB the kernel takes all or nothing (one buffer; measured up to 36,000 bytes on Linux 6.18).
///
/// # Errors
/// EAGAIN when the buffer is full, EPIPE when the peer is gone (without a SIGPIPE).
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], handle: Option<BorrowedFd<'_>>) -> nix::Result<usize> {
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    match handle {
        None => retry(|| nix::sys::socket::send(socket.as_raw_fd(), bytes, flags)),
        Some(handle) => {
            let handles = [handle.as_raw_fd()];
            let control = [ControlMessage::ScmRights(&handles)];
            retry(|| {
                nix::sys::socket::sendmsg::<()>(
                    socket.as_raw_fd(),
                    &[IoSlice::new(bytes)],
                    &control,
                    flags,
                    None,
                )
            })
        }
    }
}

nix::ioctl_read_bad!(output_queue, libc::TIOCOUTQ, libc::c_int);

/// Whether the peer has read everything that was sent (SIOCOUTQ, unix(7)).
///
/// # Errors
/// What ioctl(2) says for something that is no socket.
pub fn peer_has_read_all(socket: BorrowedFd<'_>) -> nix::Result<bool> {
    let mut unread: libc::c_int = 0;
    // SAFETY: the ioctl writes one int through the pointer, which is valid for the call, and the descriptor is
    // borrowed, hence open.
    unsafe { output_queue(socket.as_raw_fd(), &raw mut unread) }?;
    Ok(unread == 0)
}

fn retry<T>(mut call: impl FnMut() -> nix::Result<T>) -> nix::Result<T> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn peeked_bytes_stay_until_consumed() {
        let (ours, theirs) = line_pair().unwrap();
        send(theirs.as_fd(), b"one\ntwo\n", None).unwrap();
        let mut buffer = [0; 64];
        for _ in 0..2 {
            assert_eq!(peek(ours.as_fd(), &mut buffer), Ok(Peeked { count: 8, hides_more: false }));
        }
        consume(ours.as_fd(), 4, &mut [0; 3]).unwrap();
        let seen = peek(ours.as_fd(), &mut buffer).unwrap();
        assert_eq!(&buffer[..seen.count], b"two\n");
        consume(ours.as_fd(), 4, &mut [0; 16]).unwrap();
        assert_eq!(peek(ours.as_fd(), &mut buffer), Err(Errno::EAGAIN));
        drop(theirs);
        assert_eq!(peek(ours.as_fd(), &mut buffer).unwrap().count, 0);
    }

    #[test]
    fn descriptors_of_the_peer_never_arrive() {
        let (ours, theirs) = line_pair().unwrap();
        let (far, near) = line_pair().unwrap();
        send(theirs.as_fd(), b"line\n", Some(near.as_fd())).unwrap();
        send(theirs.as_fd(), b"more\n", None).unwrap();
        drop(near);
        let mut buffer = [0; 64];
        assert_eq!(peek(ours.as_fd(), &mut buffer), Ok(Peeked { count: 5, hides_more: true }));
        consume(ours.as_fd(), 5, &mut [0; 64]).unwrap();
        assert_eq!(peek(ours.as_fd(), &mut buffer), Ok(Peeked { count: 5, hides_more: false }));
        // The copy in flight was the last one: its peer sees the end of the stream.
        assert_eq!(peek(far.as_fd(), &mut buffer).unwrap().count, 0);
    }

    #[test]
    fn a_line_of_32_kib_goes_whole_or_not_at_all() {
        let (ours, theirs) = line_pair().unwrap();
        let line = vec![b'x'; 32 * 1024];
        let mut sent = 0;
        let refused = loop {
            match send(ours.as_fd(), &line, None) {
                Ok(n) => {
                    assert_eq!(n, line.len());
                    sent += 1;
                }
                Err(errno) => break errno,
            }
        };
        assert_eq!(refused, Errno::EAGAIN);
        assert!(sent > 0);
        assert_eq!(peer_has_read_all(ours.as_fd()), Ok(false));
        consume(theirs.as_fd(), sent * line.len(), &mut vec![0; 65536]).unwrap();
        assert_eq!(peer_has_read_all(ours.as_fd()), Ok(true));
    }
}
