//! Groups of TCP listeners on one address (SO_REUSEPORT, Linux 3.9), and the small program that says which member a new
//! connection goes to (SO_ATTACH_REUSEPORT_CBPF, socket(7), for TCP since Linux 4.6).
//!
//! The kernel numbers the members of a group in the order in which they began to listen, and runs the program for every
//! SYN. Classic BPF needs no privilege. The program belongs to the group and stays when its author is gone. A number
//! that no member has falls back to the kernel's own hash. Members are never taken out here: a socket that is closed
//! changes the number of another, and resets the connections in its queue.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use socket2::SockRef;

/// The most members a program can choose among: two instructions each, of the 4096 that the kernel takes (BPF_MAXINSNS).
pub const MEMBERS_MAX: usize = 2000;

/// Lets further sockets of the same user listen where this one does. May be set at any time: the others' bind(2) looks
/// at the flag as it is then, and their listen(2) makes the group.
///
/// # Errors
/// What setsockopt(2) says; EOPNOTSUPP for a unix socket on newer kernels.
pub fn share(socket: BorrowedFd<'_>) -> io::Result<()> {
    SockRef::from(&socket).set_reuse_port(true)
}

/// Lets the group of `socket` send each new connection to one of these members at random.
///
/// # Errors
/// EINVAL when `members` is empty or has more than [`MEMBERS_MAX`], or the socket does not listen.
pub fn steer(socket: BorrowedFd<'_>, members: &[u32]) -> io::Result<()> {
    let program = program(members).ok_or(io::ErrorKind::InvalidInput)?;
    attach(socket, &program)
}

/// What the program reads for a random number: `SKF_AD_OFF + SKF_AD_RANDOM` (linux/filter.h, Linux 3.16).
const RANDOM: u32 = (libc::SKF_AD_OFF + libc::SKF_AD_RANDOM).cast_unsigned();

fn program(members: &[u32]) -> Option<Vec<libc::sock_filter>> {
    if members.len() > MEMBERS_MAX {
        return None;
    }
    let count = u32::try_from(members.len()).ok()?;
    let (last, others) = members.split_last()?;
    if others.is_empty() {
        return Some(vec![ret(*last)]);
    }
    let mut program = vec![
        op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, RANDOM),
        op(libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K, count),
    ];
    if members.iter().copied().eq(0..count) {
        // What remains is the member itself.
        program.push(op(libc::BPF_RET | libc::BPF_A, 0));
        return Some(program);
    }
    for (number, member) in (0..).zip(others) {
        // Over the next instruction when it is another number.
        program.push(libc::sock_filter {
            jt: 0,
            jf: 1,
            ..op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, number)
        });
        program.push(ret(*member));
    }
    program.push(ret(*last));
    Some(program)
}

fn ret(member: u32) -> libc::sock_filter {
    op(libc::BPF_RET | libc::BPF_K, member)
}

fn op(code: u32, k: u32) -> libc::sock_filter {
    // Codes are 16 bits wide; libc's constants are not.
    libc::sock_filter { code: u16::try_from(code).unwrap_or(u16::MAX), jt: 0, jf: 0, k }
}

fn attach(socket: BorrowedFd<'_>, program: &[libc::sock_filter]) -> io::Result<()> {
    let length = u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = libc::sock_fprog { len: length, filter: program.as_ptr().cast_mut() };
    let size = libc::socklen_t::try_from(size_of_val(&program)).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: `program` and the instructions it points to live until the call returns, and the kernel copies them; it
    // never writes to them in spite of the pointer's type. `size` is the size of what the pointer points to.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_REUSEPORT_CBPF,
            (&raw const program).cast(),
            size,
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// What the kernel says of a TCP socket.
fn tcp_info(socket: BorrowedFd<'_>) -> io::Result<libc::tcp_info> {
    let mut info = std::mem::MaybeUninit::<libc::tcp_info>::zeroed();
    let mut size = libc::socklen_t::try_from(size_of::<libc::tcp_info>()).unwrap_or(0);
    // SAFETY: the kernel writes at most `size` bytes, which is the size of `info`, and its new length to `size`; both
    // live until the call returns.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut size,
        )
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `tcp_info` consists of integers and the memory was zeroed, so it is valid whatever the kernel filled in.
    Ok(unsafe { info.assume_init() })
}

/// How many connections wait in the queue of a listening TCP socket (`tcpi_unacked` in the state LISTEN).
///
/// # Errors
/// What getsockopt(2) says.
pub fn queued(listener: BorrowedFd<'_>) -> io::Result<u32> {
    Ok(tcp_info(listener)?.tcpi_unacked)
}

/// How long ago something came from the peer of a connection last, in milliseconds: for one that was accepted just now,
/// about the time it has waited (`tcpi_last_data_recv`).
///
/// # Errors
/// What getsockopt(2) says.
pub fn silent_ms(connection: BorrowedFd<'_>) -> io::Result<u32> {
    Ok(tcp_info(connection)?.tcpi_last_data_recv)
}

/// The address of a connection's peer, if it has one: none for unix sockets, nor when it is gone.
#[must_use]
pub fn peer(connection: BorrowedFd<'_>) -> Option<SocketAddr> {
    SockRef::from(&connection).peer_addr().ok()?.as_socket()
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;
    use std::os::fd::{AsFd, OwnedFd};

    use super::super::listen::{self, BACKLOG, Stack};
    use super::*;

    fn group(count: usize) -> (Vec<OwnedFd>, SocketAddr) {
        let first = listen::tcp(([127, 0, 0, 1], 0).into(), Stack::Dual, BACKLOG).unwrap();
        let at = listen::local_address(first.as_fd()).unwrap().unwrap();
        share(first.as_fd()).unwrap();
        let mut sockets = vec![first];
        for _ in 1..count {
            sockets.push(listen::tcp_beside(sockets[0].as_fd(), BACKLOG).unwrap());
        }
        (sockets, at)
    }

    /// How many connections each member has, after so many.
    fn spread(sockets: &[OwnedFd], at: SocketAddr, connections: usize) -> Vec<u32> {
        let clients: Vec<TcpStream> = (0..connections).map(|_| TcpStream::connect(at).unwrap()).collect();
        let spread = sockets.iter().map(|socket| queued(socket.as_fd()).unwrap()).collect();
        for socket in sockets {
            while listen::accept(socket.as_fd()).is_ok() {}
        }
        drop(clients);
        spread
    }

    #[test]
    fn a_program_sends_connections_to_its_members_only_and_to_each() {
        let (sockets, at) = group(4);
        for members in [vec![0, 1, 2, 3], vec![2], vec![1, 3], vec![0]] {
            steer(sockets[0].as_fd(), &members).unwrap();
            let spread = spread(&sockets, at, 120);
            assert_eq!(spread.iter().sum::<u32>(), 120);
            for (number, count) in (0..).zip(spread) {
                assert_eq!(members.contains(&number), count > 0, "{members:?} {number}: {count}");
            }
        }
    }

    #[test]
    fn a_socket_that_listened_alone_becomes_the_first_of_a_group() {
        let (sockets, at) = group(2);
        steer(sockets[1].as_fd(), &[0]).unwrap();
        assert_eq!(spread(&sockets, at, 10), [10, 0]);
        steer(sockets[1].as_fd(), &[1]).unwrap();
        assert_eq!(spread(&sockets, at, 10), [0, 10]);
    }

    #[test]
    fn nobody_and_too_many_are_refused() {
        let (sockets, _) = group(2);
        assert_eq!(steer(sockets[0].as_fd(), &[]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        let many: Vec<u32> = (0..5000).collect();
        assert_eq!(steer(sockets[0].as_fd(), &many).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        let odd: Vec<u32> = (0..2000).map(|n| n * 2).collect();
        steer(sockets[0].as_fd(), &odd).unwrap();
    }

    #[test]
    fn the_age_of_a_connection_counts_from_its_last_byte() {
        let (sockets, at) = group(1);
        let client = TcpStream::connect(at).unwrap();
        let accepted = listen::accept(sockets[0].as_fd()).unwrap();
        assert!(silent_ms(accepted.as_fd()).unwrap() < 10_000);
        assert_eq!(peer(accepted.as_fd()), Some(client.local_addr().unwrap()));
    }
}
