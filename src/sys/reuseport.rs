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

use crate::model::spec::Balance;

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

/// How a member is chosen for a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pick {
    /// Any of them.
    Random,
    /// The one that the client's address belongs to. While its member is away a client goes to another, and all others
    /// stay where they are (rendezvous hashing).
    ByAddress,
}

impl Pick {
    /// As workers with this balance have it.
    #[must_use]
    pub const fn of(balance: Balance) -> Self {
        if matches!(balance, Balance::StickySlots) { Self::ByAddress } else { Self::Random }
    }
}

/// Lets the group of `socket` send each new connection to one of these members.
///
/// # Errors
/// EINVAL when `members` is empty or there are too many ([`MEMBERS_MAX`], [`Balance::STICKY_SLOTS_MAX`]), or the socket
/// does not listen.
pub fn steer(socket: BorrowedFd<'_>, members: &[u32], pick: Pick) -> io::Result<()> {
    let program = match pick {
        _ if members.len() == 1 => vec![ret(members[0])],
        Pick::Random => at_random(members).ok_or(io::ErrorKind::InvalidInput)?,
        Pick::ByAddress => by_address(members).ok_or(io::ErrorKind::InvalidInput)?,
    };
    attach(socket, &program)
}

/// What the program reads for a random number: `SKF_AD_OFF + SKF_AD_RANDOM` (linux/filter.h, Linux 3.16).
const RANDOM: u32 = (libc::SKF_AD_OFF + libc::SKF_AD_RANDOM).cast_unsigned();

fn at_random(members: &[u32]) -> Option<Vec<libc::sock_filter>> {
    if members.len() > MEMBERS_MAX {
        return None;
    }
    let count = u32::try_from(members.len()).ok()?;
    let (last, others) = members.split_last()?;
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
        program.push(jump(libc::BPF_JEQ | libc::BPF_K, number, 0, 1));
        program.push(ret(*member));
    }
    program.push(ret(*last));
    Some(program)
}

/// Where a byte or word of the IP header is (`SKF_NET_OFF`, linux/filter.h).
fn header(offset: u32) -> u32 {
    libc::SKF_NET_OFF.cast_unsigned() + offset
}

/// Odd numbers whose bits look random: the golden ratio, and a prime of xxHash.
const MIX: [u32; 2] = [0x9e37_79b1, 0x85eb_ca77];

/// A is mixed so that all of its bits depend on all others.
fn mix() -> [libc::sock_filter; 5] {
    [
        op(libc::BPF_ALU | libc::BPF_MUL | libc::BPF_K, MIX[0]),
        op(libc::BPF_MISC | libc::BPF_TAX, 0),
        op(libc::BPF_ALU | libc::BPF_RSH | libc::BPF_K, 15),
        op(libc::BPF_ALU | libc::BPF_XOR | libc::BPF_X, 0),
        op(libc::BPF_ALU | libc::BPF_MUL | libc::BPF_K, MIX[1]),
    ]
}

/// Each member has a number for the client, and the highest wins. The source address is in the IP header: its four
/// bytes of version 4, the two words of a version 6 network (/64), within which a client may change its address.
fn by_address(members: &[u32]) -> Option<Vec<libc::sock_filter>> {
    /// The client, the highest number so far, and whose it is.
    const CLIENT: u32 = 0;
    const HIGHEST: u32 = 1;
    const WINNER: u32 = 2;
    let load = |size, offset| op(libc::BPF_LD | size | libc::BPF_ABS, header(offset));
    if members.is_empty() || members.len() > Balance::STICKY_SLOTS_MAX as usize {
        return None;
    }
    let mut program = vec![
        load(libc::BPF_B, 0),
        op(libc::BPF_ALU | libc::BPF_RSH | libc::BPF_K, 4),
        jump(libc::BPF_JEQ | libc::BPF_K, 6, 2, 0),
        load(libc::BPF_W, 12),
        // Over what version 6 needs.
        jump(libc::BPF_JA, 9, 0, 0),
        load(libc::BPF_W, 8),
    ];
    program.extend(mix());
    program.extend([
        op(libc::BPF_MISC | libc::BPF_TAX, 0),
        load(libc::BPF_W, 12),
        op(libc::BPF_ALU | libc::BPF_XOR | libc::BPF_X, 0),
    ]);
    program.extend(mix());
    program.extend([
        op(libc::BPF_ST, CLIENT),
        op(libc::BPF_LD | libc::BPF_IMM, 0),
        op(libc::BPF_ST, HIGHEST),
        op(libc::BPF_LD | libc::BPF_IMM, members[0]),
        op(libc::BPF_ST, WINNER),
    ]);
    for member in members {
        program.push(op(libc::BPF_LD | libc::BPF_MEM, CLIENT));
        program.push(op(libc::BPF_ALU | libc::BPF_XOR | libc::BPF_K, (member + 1).wrapping_mul(MIX[1])));
        program.extend(mix());
        program.extend([
            op(libc::BPF_LDX | libc::BPF_MEM, HIGHEST),
            jump(libc::BPF_JGT | libc::BPF_X, 0, 0, 3),
            op(libc::BPF_ST, HIGHEST),
            op(libc::BPF_LD | libc::BPF_IMM, *member),
            op(libc::BPF_ST, WINNER),
        ]);
    }
    program.push(op(libc::BPF_LD | libc::BPF_MEM, WINNER));
    program.push(op(libc::BPF_RET | libc::BPF_A, 0));
    Some(program)
}

/// Over `yes` instructions when it is so, else over `no`; `BPF_JA` over `k`.
fn jump(code: u32, k: u32, yes: u8, no: u8) -> libc::sock_filter {
    libc::sock_filter { jt: yes, jf: no, ..op(libc::BPF_JMP | code, k) }
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
            steer(sockets[0].as_fd(), &members, Pick::Random).unwrap();
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
        steer(sockets[1].as_fd(), &[0], Pick::Random).unwrap();
        assert_eq!(spread(&sockets, at, 10), [10, 0]);
        steer(sockets[1].as_fd(), &[1], Pick::ByAddress).unwrap();
        assert_eq!(spread(&sockets, at, 10), [0, 10]);
    }

    /// The member that a client of this loopback address reaches.
    fn member_of(client: u8, sockets: &[OwnedFd], at: SocketAddr) -> usize {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::from(([127, 0, 3, client], 0)).into()).unwrap();
        socket.connect(&at.into()).unwrap();
        let queued = |socket: &OwnedFd| queued(socket.as_fd()).unwrap() > 0;
        let member = sockets.iter().position(queued).unwrap();
        listen::accept(sockets[member].as_fd()).unwrap();
        member
    }

    #[test]
    fn by_address_a_client_keeps_its_member_and_only_those_of_one_that_is_away_move() {
        let (sockets, at) = group(4);
        let all = |members: &[u32]| -> Vec<usize> {
            steer(sockets[2].as_fd(), members, Pick::ByAddress).unwrap();
            (1..=100).map(|client| member_of(client, &sockets, at)).collect()
        };
        let first = all(&[0, 1, 2, 3]);
        assert_eq!(all(&[0, 1, 2, 3]), first);
        for member in 0..4 {
            let clients = first.iter().filter(|each| **each == member).count();
            assert!((10..=45).contains(&clients), "{member}: {clients} of 100");
        }
        for (now, before) in all(&[0, 1, 3]).into_iter().zip(&first) {
            assert!(now != 2 && (now == *before || *before == 2), "{before} -> {now}");
        }
        assert_eq!(all(&[0, 1, 2, 3]), first);
    }

    #[test]
    fn by_address_the_network_of_a_version_6_client_decides() {
        let Ok(first) = listen::tcp("[::1]:0".parse().unwrap(), Stack::Dual, BACKLOG) else {
            println!("no IPv6 here: not tried");
            return;
        };
        let at = listen::local_address(first.as_fd()).unwrap().unwrap();
        share(first.as_fd()).unwrap();
        let second = listen::tcp_beside(first.as_fd(), BACKLOG).unwrap();
        steer(first.as_fd(), &[0, 1], Pick::ByAddress).unwrap();
        let sockets = [first, second];
        let spread = spread(&sockets, at, 20);
        assert!(spread.contains(&0) && spread.contains(&20), "one client, one member: {spread:?}");
    }

    #[test]
    fn nobody_and_too_many_are_refused() {
        let (sockets, _) = group(2);
        assert_eq!(
            steer(sockets[0].as_fd(), &[], Pick::Random).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
        let many: Vec<u32> = (0..5000).collect();
        assert_eq!(
            steer(sockets[0].as_fd(), &many, Pick::Random).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
        let most: Vec<u32> = (0..300).collect();
        steer(sockets[0].as_fd(), &most, Pick::ByAddress).unwrap();
        let more: Vec<u32> = (0..301).collect();
        let refused = steer(sockets[0].as_fd(), &more, Pick::ByAddress).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
        let odd: Vec<u32> = (0..2000).map(|n| n * 2).collect();
        steer(sockets[0].as_fd(), &odd, Pick::Random).unwrap();
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
