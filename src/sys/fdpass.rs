//! Messages with descriptors over unix sockets.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{ControlMessage, MsgFlags, SockType, getsockopt, sendmsg, sockopt};

/// The most descriptors [`receive`] takes with one message.
pub const FDS_MAX: usize = 64;

/// Sends bytes and descriptors in one message; never waits and never raises SIGPIPE. Returns how many bytes went.
///
/// # Errors
/// WouldBlock when there is no room; EPIPE and ECONNRESET when the peer is gone; ETOOMANYREFS when too many
/// descriptors are on their way (unix(7)).
pub fn send(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[][..] } else { &rights[..] };
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    loop {
        match sendmsg::<()>(socket.as_fd().as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None) {
            Err(Errno::EINTR) => {}
            other => return Ok(other?),
        }
    }
}

/// What came with a message.
#[derive(Debug)]
pub struct Received {
    /// How many bytes of the buffer are filled; 0 is end of stream.
    pub len: usize,
    /// The descriptors, in the order they were sent, all CLOEXEC.
    pub fds: Vec<OwnedFd>,
    /// A packet was longer than the buffer and its rest is lost (MSG_TRUNC).
    pub bytes_lost: bool,
    /// Descriptors are lost: more than [`FDS_MAX`], or this process may not open so many (MSG_CTRUNC).
    pub fds_lost: bool,
}

/// Whether the message leaves the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Take {
    /// It is consumed.
    Consume,
    /// It stays and is received again (MSG_PEEK); descriptors that came along are copies.
    Peek,
}

/// Room for one SCM_RIGHTS message of [`FDS_MAX`] descriptors, aligned as cmsghdr wants it.
type Control = [u64; 40];

/// Receives one message (or what a stream has) with its descriptors; never waits.
///
/// # Errors
/// WouldBlock when there is nothing; see recvmsg(2).
pub fn receive(socket: impl AsFd, buffer: &mut [u8], take: Take) -> io::Result<Received> {
    let mut control: Control = [0; 40];
    let mut piece = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: msghdr is plain integers and pointers; all zeroes is a valid value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut piece;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = control_len() as _;
    let peek = if take == Take::Peek { libc::MSG_PEEK } else { 0 };
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC | peek;
    let len = loop {
        // SAFETY: `message` points to `piece`, `buffer` and `control`, which are valid for writing and outlive the call.
        let rc = unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &raw mut message, flags) };
        match Errno::result(rc) {
            Err(Errno::EINTR) => {}
            other => break other?,
        }
    };
    Ok(Received {
        len: len.unsigned_abs(),
        fds: rights(&message),
        bytes_lost: message.msg_flags & libc::MSG_TRUNC != 0,
        fds_lost: message.msg_flags & libc::MSG_CTRUNC != 0,
    })
}

fn control_len() -> usize {
    let bytes = u32::try_from(FDS_MAX * size_of::<RawFd>()).unwrap_or_default();
    // SAFETY: arithmetic on an integer.
    let len = unsafe { libc::CMSG_SPACE(bytes) };
    (len as usize).min(size_of::<Control>())
}

/// The descriptors of every SCM_RIGHTS message. A cut message still delivers the ones that fitted, and they have to
/// be owned or they would leak.
fn rights(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    // SAFETY: `message` was filled by recvmsg, and its control buffer is still there.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(message) };
    while !header.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR return null or a header within the control buffer.
        let entry = unsafe { header.read() };
        if entry.cmsg_level == libc::SOL_SOCKET && entry.cmsg_type == libc::SCM_RIGHTS {
            // SAFETY: arithmetic on an integer.
            let head = unsafe { libc::CMSG_LEN(0) } as usize;
            let count = (entry.cmsg_len as usize).saturating_sub(head) / size_of::<RawFd>();
            // SAFETY: the data begins behind the header; only the address is taken here.
            let data = unsafe { libc::CMSG_DATA(header) }.cast::<RawFd>();
            for index in 0..count {
                // SAFETY: `count` was derived from the length that the kernel wrote.
                let place = unsafe { data.add(index) };
                // SAFETY: as above; the place need not be aligned.
                let raw = unsafe { place.read_unaligned() };
                // SAFETY: the kernel has just installed this descriptor for us, and nobody else knows its number.
                fds.push(unsafe { OwnedFd::from_raw_fd(raw) });
            }
        }
        // SAFETY: `header` is a header within the control buffer of `message`.
        header = unsafe { libc::CMSG_NXTHDR(message, header) };
    }
    fds
}

/// Takes over a descriptor number that a system call has just returned.
pub(super) fn own(fd: impl TryInto<RawFd>) -> io::Result<OwnedFd> {
    let fd = fd.try_into().map_err(|_| Errno::EBADF)?;
    // SAFETY: callers within `sys` pass what the kernel returned a moment ago; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Takes over the packet socket that our parent placed at this number, once per process, and makes it CLOEXEC.
///
/// # Errors
/// EBADF when nothing is there, InvalidInput when it is no packet socket (a program started by hand).
pub fn inherited_packet_socket(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 3 {
        return Err(Errno::EBADF.into());
    }
    // SAFETY: the borrow ends with this function, which closes nothing; a number that is not open gives EBADF below.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    let flags = FdFlag::from_bits_retain(fcntl(borrowed, FcntlArg::F_GETFD)?);
    let kind = getsockopt(&borrowed, sockopt::SockType).ok();
    // CLOEXEC means that this process opened it, or has taken it over before.
    if kind != Some(SockType::SeqPacket) || flags.contains(FdFlag::FD_CLOEXEC) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("descriptor {fd} is no inherited link"),
        ));
    }
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    // SAFETY: an inherited descriptor (not CLOEXEC, and everything this program opens is) has no owner in this
    // process yet; the flag set above refuses a second take-over.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Takes over a descriptor that stayed open over execve(2), once per process, and makes it CLOEXEC.
///
/// # Errors
/// EBADF when nothing is there, InvalidInput when this process has opened or taken it over itself.
pub fn inherited(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 3 {
        return Err(Errno::EBADF.into());
    }
    // SAFETY: the borrow ends with this function, which closes nothing; a number that is not open gives EBADF below.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    let flags = FdFlag::from_bits_retain(fcntl(borrowed, FcntlArg::F_GETFD)?);
    if flags.contains(FdFlag::FD_CLOEXEC) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("descriptor {fd} was not inherited"),
        ));
    }
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    // SAFETY: an inherited descriptor (not CLOEXEC, and everything this program opens is) has no owner in this
    // process yet; the flag set above refuses a second take-over.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Lets these descriptors stay open over execve(2), or close as usual.
///
/// # Errors
/// See fcntl(2); the others are done all the same.
pub fn set_kept_over_exec(fds: &[BorrowedFd<'_>], kept: bool) -> io::Result<()> {
    let flags = if kept { FdFlag::empty() } else { FdFlag::FD_CLOEXEC };
    let mut outcome = Ok(());
    for fd in fds {
        if let Err(error) = fcntl(fd, FcntlArg::F_SETFD(flags)) {
            outcome = Err(error.into());
        }
    }
    outcome
}

/// Marks every descriptor from `first` on CLOEXEC: what we were started with does not leak into what we start.
///
/// # Errors
/// See close_range(2) and proc(5).
pub fn close_on_exec_from(first: RawFd) -> io::Result<()> {
    let from = u32::try_from(first).map_err(|_| Errno::EINVAL)?;
    // SAFETY: integers only; CLOSE_RANGE_CLOEXEC closes nothing.
    let rc = unsafe { libc::syscall(libc::SYS_close_range, from, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if rc == 0 {
        return Ok(());
    }
    // Before Linux 5.11 there is no such flag: one by one.
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let number = entry?.file_name().to_str().and_then(|name| name.parse::<RawFd>().ok());
        let Some(number) = number.filter(|&number| number >= first) else { continue };
        // SAFETY: the borrow ends within the loop; a descriptor that is closed meanwhile gives EBADF.
        let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
        match fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)) {
            Ok(_) | Err(Errno::EBADF) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::pipe::packet_pair;

    #[test]
    fn descriptors_arrive_in_order_and_close_on_exec() {
        let (left, right) = packet_pair().unwrap();
        let (reader, writer) = nix::unistd::pipe().unwrap();
        send(&left, b"two", &[reader.as_fd(), writer.as_fd()]).unwrap();
        let mut buffer = [0; 16];
        let peeked = receive(&right, &mut buffer, Take::Peek).unwrap();
        let got = receive(&right, &mut buffer, Take::Consume).unwrap();
        assert_eq!((&buffer[..got.len], peeked.fds.len(), got.fds.len()), (&b"two"[..], 2, 2));
        assert!(!got.bytes_lost && !got.fds_lost);
        nix::unistd::write(&got.fds[1], b"x").unwrap();
        assert_eq!(nix::unistd::read(&got.fds[0], &mut buffer), Ok(1));
        for fd in &got.fds {
            let flags = fcntl(fd, FcntlArg::F_GETFD).unwrap();
            assert!(FdFlag::from_bits_retain(flags).contains(FdFlag::FD_CLOEXEC));
        }
        assert_eq!(
            receive(&right, &mut buffer, Take::Consume).unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
        drop(left);
        assert_eq!(receive(&right, &mut buffer, Take::Consume).unwrap().len, 0);
    }

    #[test]
    fn losses_are_noticed_and_nothing_leaks() {
        let (left, right) = packet_pair().unwrap();
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let many = vec![writer.as_fd(); FDS_MAX + 1];
        send(&left, b"longer than the buffer", &many).unwrap();
        let got = receive(&right, &mut [0; 4], Take::Consume).unwrap();
        assert!(got.bytes_lost && got.fds_lost);
        assert_eq!(got.fds.len(), FDS_MAX);
        drop(got);
        drop(many);
        drop(writer);
        assert_eq!(nix::unistd::read(&reader, &mut [0; 4]), Ok(0), "every copy of the writing end is closed");
    }

    #[test]
    fn only_an_inherited_packet_socket_is_taken_over() {
        let (left, _right) = packet_pair().unwrap();
        inherited_packet_socket(left.as_raw_fd()).unwrap_err();
        inherited_packet_socket(1).unwrap_err();
        assert_eq!(inherited_packet_socket(54321).unwrap_err().raw_os_error(), Some(libc::EBADF));
    }
}
