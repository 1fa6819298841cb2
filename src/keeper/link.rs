//! The supervisor's end of the link. Knows no runtime: wait for the descriptor with whatever is at hand, then receive
//! until nothing is left; while something is [`Link::pending`], flush when there is room, and after receiving.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use super::claim::{CLAIM, Claim};
use super::handover::{self, PREDECESSOR};
use super::mirror::{Mirror, Sought};
use super::packet::{Incoming, Packets};
use super::wire::{
    ChildState, Command, FRAME_MAX, FromKeeper, HeldFds, Hello, Spawn, ToKeeper, UpgradeState, VERSION,
    WireError,
};
use crate::sys::{clock, exec, fdpass, memfd, poll};

/// Where a supervisor finds its end of the link.
pub const LINK_FD: RawFd = 3;

/// A keeper sends its inventory as fast as we take it; one that is silent for this long is not there.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(30);

/// Commands beyond this travel in a memfd: the frame has to hold tag and names too.
const INLINE_MAX: usize = FRAME_MAX / 2 - 2 * super::wire::TAG_MAX;

/// What went wrong on the link. Nothing can be sent any more; the supervisor ends and the keeper starts the next.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// There is no link: this process was not started by a keeper.
    #[error("not started by a keeper")]
    NotInherited {
        /// What is wrong with the descriptor.
        source: io::Error,
    },
    /// The keeper is gone.
    #[error("keeper is gone")]
    Closed,
    /// The keeper said nothing for too long.
    #[error("keeper does not answer")]
    Silent,
    /// The keeper died in the middle of an upgrade, and the supervisor before this one goes on.
    #[error("the keeper is gone, and the supervisor before this one goes on")]
    Superseded,
    /// The socket failed.
    #[error("cannot {step}")]
    Io {
        /// What was tried.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// What came makes no sense, or what should go cannot be said.
    #[error("bad frame")]
    Wire(#[source] WireError),
}

/// The link to the keeper.
#[derive(Debug)]
pub struct Link {
    packets: Packets,
    mirror: Mirror,
    /// What decides between this supervisor and the one that is to replace it.
    claim: Option<Claim>,
}

/// Everything the keeper has, as of the handshake. Changes follow as frames.
#[derive(Debug)]
pub struct Inventory {
    /// About the keeper and the supervisors before this one.
    pub hello: Hello,
    /// The children, by pid.
    pub children: Vec<Child>,
    /// The held descriptors, by name. These are copies: the keeper's stay open until they are released.
    pub held: Vec<(String, OwnedFd)>,
}

/// A child in the inventory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Child {
    /// Its pid, also the id of its session and group.
    pub pid: u32,
    /// Its start time in clock ticks since boot.
    pub start_ticks: u64,
    /// The tag it was spawned with.
    pub tag: Vec<u8>,
    /// How far it is.
    pub state: ChildState,
    /// The names of the descriptors held for it.
    pub held: Vec<String>,
}

/// A program to start.
#[derive(Debug)]
pub struct SpawnRequest<'a> {
    /// Comes back with the answer; not 0.
    pub request: u64,
    /// Whose child it is; see [`super::wire::TAG_MAX`].
    pub tag: &'a [u8],
    /// What to run.
    pub command: &'a Command,
    /// Its descriptors, 0 upwards.
    pub fds: &'a [BorrowedFd<'a>],
    /// What the keeper holds for it from the instant it exists.
    pub held: &'a [(&'a str, BorrowedFd<'a>)],
}

impl Link {
    /// The link this process was started with, once per process; also names the process, which would otherwise be
    /// called after a descriptor.
    ///
    /// # Errors
    /// [`LinkError::NotInherited`].
    pub fn inherited() -> Result<Self, LinkError> {
        let socket =
            fdpass::inherited_packet_socket(LINK_FD).map_err(|source| LinkError::NotInherited { source })?;
        // Only a label in ps.
        let _ = exec::set_process_name(c"pm supervisor");
        Ok(Self::new(socket))
    }

    /// A link over this packet socket.
    #[must_use]
    pub fn new(socket: OwnedFd) -> Self {
        Self { packets: Packets::new(socket), mirror: Mirror::default(), claim: None }
    }

    /// Greets the keeper and takes the inventory. Waits for the keeper.
    ///
    /// # Errors
    /// [`LinkError`]; see there.
    pub fn handshake(&mut self) -> Result<Inventory, LinkError> {
        let mut children = Vec::new();
        let mut held = Vec::new();
        let mut owned: BTreeMap<u32, Vec<String>> = BTreeMap::new();
        let mut greeting = None;
        loop {
            let (message, fds) = self.wait_for_frame()?;
            match message {
                FromKeeper::Hello(hello) => {
                    greeting = Some(hello);
                    self.try_send(&ToKeeper::Welcome { version: VERSION }, &[])?;
                }
                FromKeeper::Children { batch, children: records } => {
                    children.extend(records.into_iter().map(|record| Child {
                        pid: record.pid,
                        start_ticks: record.start_ticks,
                        tag: record.tag,
                        state: record.state,
                        held: Vec::new(),
                    }));
                    self.try_send(&ToKeeper::Taken { batch }, &[])?;
                }
                FromKeeper::Held { batch, held: records } => {
                    for (record, fd) in records.into_iter().zip(fds) {
                        if let Some(owner) = record.owner {
                            owned.entry(owner).or_default().push(record.name.clone());
                        }
                        held.push((record.name, fd));
                    }
                    self.try_send(&ToKeeper::Taken { batch }, &[])?;
                }
                FromKeeper::InventoryEnd => break,
                FromKeeper::Unknown { .. } => {}
                FromKeeper::Spawned { .. }
                | FromKeeper::SpawnFailed { .. }
                | FromKeeper::Exited { .. }
                | FromKeeper::Terminate { .. }
                | FromKeeper::Leaving
                | FromKeeper::Dismissed
                | FromKeeper::Upgraded(_)
                | FromKeeper::Synced { .. }
                | FromKeeper::NotUnderstood { .. } => {
                    return Err(LinkError::Wire(WireError::Value("order of frames")));
                }
            }
        }
        for child in &mut children {
            child.held = owned.remove(&child.pid).unwrap_or_default();
        }
        let hello = greeting.ok_or(LinkError::Wire(WireError::Value("order of frames")))?;
        let predecessor = held.iter().position(|(name, _)| name == PREDECESSOR);
        let predecessor = predecessor.map(|index| held.swap_remove(index).1);
        if let Some(index) = held.iter().position(|(name, _)| name == CLAIM) {
            let claim = Claim::of(held.swap_remove(index).1);
            // After a trial that failed the one before it is gone, and so is the claim.
            let contested = hello.upgrade.as_ref().is_some_and(|last| last.state == UpgradeState::Pending);
            if !claim.take() && contested {
                return Err(LinkError::Superseded);
            }
            self.give_up(CLAIM)?;
        }
        let inventory = Inventory { hello, children, held };
        self.mirror = Mirror::of(&inventory);
        if let Some(socket) = predecessor {
            // From here on we hold what it holds.
            handover::dismiss(socket);
            self.give_up(PREDECESSOR)?;
        }
        Ok(inventory)
    }

    /// Releases what was for this process. A keeper that has just died is found to be gone when it is needed.
    fn give_up(&mut self, name: &str) -> Result<(), LinkError> {
        match self.release(name) {
            Ok(()) | Err(LinkError::Closed) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Lets the prepared supervisor have everything; [`FromKeeper::Dismissed`] is the answer.
    ///
    /// # Errors
    /// As for [`Link::try_send`].
    pub fn go(&mut self) -> Result<(), LinkError> {
        // Without it only the keeper's death within microseconds would do harm.
        if let Ok(claim) = Claim::new() {
            self.hold(CLAIM, None, claim.as_fd())?;
            self.claim = Some(claim);
        }
        self.try_send(&ToKeeper::Go, &[])
    }

    /// The keeper has died after [`Link::go`]: whether this supervisor is the one that goes on.
    pub fn goes_on(&mut self) -> bool {
        self.claim.take().is_none_or(|claim| claim.take())
    }

    /// How many descriptors the keeper alone has, because there was no room for a copy of them here.
    #[must_use]
    pub fn missing(&self) -> usize {
        self.mirror.missing()
    }

    /// The keeper is gone: everything it had, for the next one. `find` looks for the processes of starts that it did
    /// not answer, and returns request, pid and start ticks of those there are.
    #[must_use]
    pub fn into_estate(
        mut self,
        hello: Hello,
        find: impl FnOnce(&[(u64, Sought)]) -> Vec<(u64, u32, u64)>,
    ) -> Inventory {
        // Its last words count.
        while let Ok(Some(_)) = self.receive() {}
        // Nobody contests this: the first keeper that came would take what an upgrade has left.
        self.mirror.forget(CLAIM);
        let sought = self.mirror.sought();
        let found = if sought.is_empty() { Vec::new() } else { find(&sought) };
        self.mirror.into_inventory(hello, found)
    }

    fn wait_for_frame(&mut self) -> Result<(FromKeeper, Vec<OwnedFd>), LinkError> {
        let deadline = clock::now() + HANDSHAKE_TIMEOUT;
        loop {
            if let Some(got) = self.receive()? {
                return Ok(got);
            }
            let left = deadline.since(clock::now());
            if left.is_zero() {
                return Err(LinkError::Silent);
            }
            let interest =
                if self.packets.wants_room() { poll::Interest::ReadWrite } else { poll::Interest::Read };
            poll::wait(&[(self.packets.as_fd(), interest)], Some(left))
                .map_err(|source| LinkError::Io { step: "wait for the keeper", source })?;
            self.flush()?;
        }
    }

    /// Asks for a program. The answer is [`FromKeeper::Spawned`] or [`FromKeeper::SpawnFailed`] with this request.
    /// The caller's copies of the descriptors may be closed as soon as this returns.
    ///
    /// # Errors
    /// [`LinkError::Wire`] when tag, names, command or the number of descriptors exceed their limits; nothing was
    /// sent and the link is as good as before. Anything else as for [`Link::try_send`].
    pub fn try_spawn(&mut self, spawn: &SpawnRequest<'_>) -> Result<(), LinkError> {
        let io = |source| LinkError::Io { step: "hand over a command", source };
        let command = spawn.command.encode().map_err(LinkError::Wire)?;
        let child_fds =
            u16::try_from(spawn.fds.len()).map_err(|_| LinkError::Wire(WireError::Descriptors))?;
        let mut fds: Vec<BorrowedFd<'_>> = spawn.fds.to_vec();
        fds.extend(spawn.held.iter().map(|&(_, fd)| fd));
        let attached = if command.len() > INLINE_MAX {
            Some(memfd::sealed(c"pm-command", &command).map_err(io)?)
        } else {
            None
        };
        let command = if attached.is_some() { None } else { Some(command) };
        fds.extend(attached.as_ref().map(AsFd::as_fd));
        let held = spawn.held.iter().map(|&(name, _)| name.to_owned()).collect();
        let tag = spawn.tag.to_vec();
        let message = Spawn { request: spawn.request, tag, child_fds, held, command };
        self.try_send(&ToKeeper::Spawn(message), &fds)
    }

    /// Confirms the exit of `pid`, so that its zombie may go.
    ///
    /// # Errors
    /// As for [`Link::try_send`].
    pub fn confirm(&mut self, pid: u32, fds: HeldFds) -> Result<(), LinkError> {
        self.try_send(&ToKeeper::Confirm { pid, fds }, &[])
    }

    /// Lets the keeper hold a copy of this descriptor.
    ///
    /// # Errors
    /// As for [`Link::try_send`].
    pub fn hold(&mut self, name: &str, owner: Option<u32>, fd: BorrowedFd<'_>) -> Result<(), LinkError> {
        self.try_send(&ToKeeper::Hold { names: vec![name.to_owned()], owner }, &[fd])
    }

    /// Lets the keeper close what it holds under this name.
    ///
    /// # Errors
    /// As for [`Link::try_send`].
    pub fn release(&mut self, name: &str) -> Result<(), LinkError> {
        self.try_send(&ToKeeper::Release { name: name.to_owned() }, &[])
    }

    /// Sends a message, or queues it behind others when there is no room (with copies of the descriptors). The queue is
    /// as long as its users let it grow: the keeper reads as fast as it can spawn.
    ///
    /// # Errors
    /// [`LinkError::Wire`] when the message cannot be said; [`LinkError::Closed`], [`LinkError::Io`].
    pub fn try_send(&mut self, message: &ToKeeper, fds: &[BorrowedFd<'_>]) -> Result<(), LinkError> {
        let frame = message.encode(fds.len()).map_err(LinkError::Wire)?;
        let sent = self.packets.send(frame, fds).map_err(sending);
        // A keeper that is gone starts nothing, but what it was told to forget is forgotten.
        if sent.is_ok() || !matches!(message, ToKeeper::Spawn(_)) {
            self.mirror.said(message, fds);
        }
        sent
    }

    /// How many messages wait for room.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.packets.waiting()
    }

    /// Sends what waits, as far as there is room.
    ///
    /// # Errors
    /// [`LinkError::Closed`], [`LinkError::Io`].
    pub fn flush(&mut self) -> Result<(), LinkError> {
        self.packets.flush().map_err(sending)
    }

    /// The next message, `None` when there is none now.
    ///
    /// # Errors
    /// [`LinkError::Closed`] when the keeper is gone; otherwise the link is broken.
    pub fn try_recv(&mut self) -> Result<Option<FromKeeper>, LinkError> {
        Ok(self.receive()?.map(|(message, _)| message))
    }

    fn receive(&mut self) -> Result<Option<(FromKeeper, Vec<OwnedFd>)>, LinkError> {
        let reading = |source| LinkError::Io { step: "read from the keeper", source };
        match self.packets.receive().map_err(reading)? {
            Incoming::Nothing => Ok(None),
            Incoming::End => Err(LinkError::Closed),
            Incoming::Frame(frame, fds) => {
                let message = FromKeeper::decode(frame, fds.len()).map_err(LinkError::Wire)?;
                self.mirror.heard(&message);
                Ok(Some((message, fds)))
            }
        }
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.packets.as_fd()
    }
}

impl std::os::fd::AsRawFd for Link {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

fn sending(source: io::Error) -> LinkError {
    match source.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => LinkError::Closed,
        _ => LinkError::Io { step: "write to the keeper", source },
    }
}
