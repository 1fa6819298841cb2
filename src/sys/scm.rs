//! Stream sockets that carry lines, some of them with one descriptor: the calls behind a Node IPC channel.
//!
//! Nothing here blocks, and nothing here ever receives a descriptor: the receiving calls pass no control buffer, so
//! the kernel closes what a peer attaches (unix(7), MSG_CTRUNC).

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::sendfile::sendfile64;
use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, getsockopt, setsockopt};
use nix::unistd::{Whence, lseek64};
use nix::{getsockopt_impl, setsockopt_impl, sockopt_impl};

/// The longest line that [`send`] sends whole or not at all.
pub const WHOLE_MAX: usize = 32 * 1024;

sockopt_impl!(
    /// Where MSG_PEEK begins (socket(7), Linux 3.4); -1 is off. What is received lowers it, down to 0, in the same step
    /// in which it leaves the socket. It belongs to the socket, so it outlives whoever set it.
    PeekOffset, Both, libc::SOL_SOCKET, libc::SO_PEEK_OFF, i32
);

/// Has the kernel count: of the bytes received from now on, `count` are not received yet. Nothing may peek meanwhile.
///
/// # Errors
/// What setsockopt(2) says for something that is no unix socket.
pub fn count_down(socket: BorrowedFd<'_>, count: usize) -> nix::Result<()> {
    setsockopt(&socket, PeekOffset, &i32::try_from(count).unwrap_or(i32::MAX))
}

/// How many bytes of [`count_down`] are not received yet; `None` when it is off.
///
/// # Errors
/// What getsockopt(2) says for something that is no unix socket.
pub fn left_to_receive(socket: BorrowedFd<'_>) -> nix::Result<Option<usize>> {
    getsockopt(&socket, PeekOffset).map(|left| usize::try_from(left).ok())
}

/// From now on each peek sees what is behind what the one before it saw, beginning at the front.
///
/// # Errors
/// What setsockopt(2) says for something that is no unix socket.
pub fn peek_on(socket: BorrowedFd<'_>) -> nix::Result<()> {
    setsockopt(&socket, PeekOffset, &0)
}

/// Ends [`count_down`] and [`peek_on`]: every peek begins at the front again.
///
/// # Errors
/// As there.
pub fn peek_at_front(socket: BorrowedFd<'_>) -> nix::Result<()> {
    setsockopt(&socket, PeekOffset, &-1)
}

/// Sends of `file` what is behind its position. The kernel moves the position with what it takes, in one step, and the
/// position belongs to everybody who holds the file: so whoever goes on does so at the right byte (sendfile(2)).
/// Returns how many bytes are left.
///
/// # Errors
/// EAGAIN when the buffer is full, EPIPE when the peer is gone.
pub fn send_file(socket: BorrowedFd<'_>, file: impl AsFd, length: u64) -> nix::Result<u64> {
    loop {
        let left = left_in_file(&file, length)?;
        if left == 0 {
            return Ok(0);
        }
        let count = usize::try_from(left).unwrap_or(usize::MAX);
        if retry(|| sendfile64(socket, &file, None, count))? == 0 {
            // Shorter than it should be: there is nothing more to send.
            return Ok(0);
        }
    }
}

/// How many bytes of a file of this length are behind its position.
///
/// # Errors
/// ESPIPE for something that has no position.
pub fn left_in_file(file: impl AsFd, length: u64) -> nix::Result<u64> {
    let at = lseek64(file, 0, Whence::SeekCur)?;
    Ok(length.saturating_sub(u64::try_from(at).unwrap_or(0)))
}

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
    fn the_kernel_counts_what_is_received_for_whoever_asks() {
        let (ours, theirs) = line_pair().unwrap();
        let copy = ours.try_clone().unwrap();
        send(theirs.as_fd(), b"0123456789", None).unwrap();
        assert_eq!(left_to_receive(copy.as_fd()), Ok(None));
        count_down(ours.as_fd(), 8).unwrap();
        assert_eq!(left_to_receive(copy.as_fd()), Ok(Some(8)), "noted, and nothing is received");
        consume(ours.as_fd(), 5, &mut [0; 16]).unwrap();
        assert_eq!(left_to_receive(copy.as_fd()), Ok(Some(3)));
        consume(ours.as_fd(), 3, &mut [0; 16]).unwrap();
        assert_eq!(left_to_receive(copy.as_fd()), Ok(Some(0)));
        peek_at_front(copy.as_fd()).unwrap();
        let mut buffer = [0; 16];
        for _ in 0..2 {
            let seen = peek(ours.as_fd(), &mut buffer).unwrap();
            assert_eq!(&buffer[..seen.count], b"89");
        }
    }

    #[test]
    fn a_file_is_sent_from_where_anybody_stopped() {
        use std::io::{Seek as _, Write as _};

        let (ours, theirs) = line_pair().unwrap();
        let content: Vec<u8> =
            (0..3_000_000_u32).map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()[2]).collect();
        let mut file = std::fs::File::from(crate::sys::memfd::create(c"pm-test").unwrap());
        file.write_all(&content).unwrap();
        file.rewind().unwrap();
        let copy = file.try_clone().unwrap();
        let (mut got, mut buffer, mut turn) = (Vec::new(), vec![0; 100_000], 0);
        while got.len() < content.len() {
            turn += 1;
            let sender = if turn % 2 == 0 { &file } else { &copy };
            match send_file(ours.as_fd(), sender, content.len() as u64) {
                Ok(left) => assert_eq!(left, 0),
                Err(errno) => assert_eq!(errno, Errno::EAGAIN),
            }
            let count = nix::unistd::read(&theirs, &mut buffer).unwrap();
            got.extend_from_slice(&buffer[..count]);
        }
        assert!(turn > 10 && got == content, "{turn} turns");
        assert_eq!(send_file(ours.as_fd(), &file, content.len() as u64), Ok(0));
        assert_eq!(peek(theirs.as_fd(), &mut buffer), Err(Errno::EAGAIN));
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
