//! The frames between keeper and supervisor.
//!
//! A frame is one packet: its kind (u16), the number of descriptors that come with it (u16), then its fields, integers
//! in little-endian order. The format only ever grows: new fields are appended to a frame or to a record within it and
//! readers skip what they do not know; unknown kinds are answered with [`FromKeeper::NotUnderstood`] or ignored. So a
//! new supervisor works with an old keeper and the reverse.
//!
//! ```text
//! keeper                                   supervisor
//! Hello                              →
//!                                    ←     Welcome
//! Children, Held (with descriptors)  →     after each batch
//!                                    ←     Taken
//! InventoryEnd                       →
//! Spawned, SpawnFailed, Exited, …    ↔     Spawn, Confirm, Hold, Release, …
//!
//! An upgrade, with the new supervisor on a link of its own from Hello on:
//!                                    ←     Upgrade (with the executable)
//! Upgraded (pending)                 →     freezes
//!                                    ←     Go
//! Dismissed                          →     exits: the new one has the inventory
//!                                    ←     TookOver, from the new one
//! Upgraded                           →     or else the program before it is started again
//! ```

mod codec;
pub(super) mod own;
mod upgrade;

use std::ffi::{CStr, CString};

use self::codec::{Reader, Writer};
pub use self::upgrade::{Upgrade, UpgradeState};
use crate::sys::child::WaitStatus;
use crate::sys::limits::Limit;
use crate::sys::spawn::{Confinement, Credentials, Failure, Stage};

/// The version this build speaks: 2 knows upgrades, control groups, order and rights.
pub const VERSION: u16 = 2;
/// The longest frame in bytes.
pub const FRAME_MAX: usize = 32 * 1024;
/// The most descriptors with one frame.
pub const FDS_MAX: usize = crate::sys::fdpass::FDS_MAX;
/// The longest tag of a child in bytes.
pub const TAG_MAX: usize = 1024;
/// The longest name of a held descriptor in bytes.
pub const NAME_MAX: usize = 255;
/// The longest text for the service manager in bytes.
pub const NOTIFY_MAX: usize = 4096;
/// The longest command in bytes; the kernel itself takes about 6 MB of arguments and environment.
pub const COMMAND_MAX: usize = 16 * 1024 * 1024;

/// From the supervisor to the keeper.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToKeeper {
    /// Answers Hello: send the inventory.
    Welcome {
        /// The version the supervisor speaks.
        version: u16,
    },
    /// An inventory batch has arrived.
    Taken {
        /// Its number.
        batch: u32,
    },
    /// Start a program. Its descriptors come first, then the ones to hold, then the command if it is attached.
    Spawn(Spawn),
    /// The exit of this child is recorded: its zombie may go.
    Confirm {
        /// The pid; unambiguous, because the zombie has kept it.
        pid: u32,
        /// What becomes of the descriptors held for it.
        fds: HeldFds,
    },
    /// Hold the descriptors that come with this frame, each under its name; a name in use gets the new descriptor.
    Hold {
        /// One name for each descriptor.
        names: Vec<String>,
        /// The child they belong to.
        owner: Option<u32>,
    },
    /// Close the descriptor of this name; nothing happens when there is none.
    Release {
        /// Its name.
        name: String,
    },
    /// Close every descriptor whose name begins so.
    ReleasePrefix {
        /// The beginning; empty means all.
        prefix: String,
    },
    /// Answer when everything before this frame is done.
    Sync {
        /// Comes back with the answer.
        request: u64,
    },
    /// Everything is stopped: exit once this supervisor has.
    Quit,
    /// Pass these lines on to the service manager (sd_notify(3)), which listens to its main process only.
    Notify {
        /// `KEY=value` lines.
        text: String,
    },
    /// The supervisor is alive. Said once, it has to be said again within the time the service manager's watchdog
    /// gives.
    Beat,
    /// Start the supervisor that comes after this one from the executable that comes with this frame, and let it wait
    /// for [`ToKeeper::Go`]. Answered with [`FromKeeper::Upgraded`]: pending, or failed.
    Upgrade {
        /// The operation it belongs to.
        op: u64,
        /// The version of the present supervisor.
        from: String,
        /// The keeper is not to be replaced after it.
        supervisor_only: bool,
    },
    /// This supervisor reads and writes nothing any more: its successor may have everything.
    Go,
    /// This supervisor, which an upgrade has started, is up.
    TookOver,
    /// A frame of a newer version.
    Unknown {
        /// Its kind.
        kind: u16,
    },
}

/// What becomes of a child's held descriptors when its exit is confirmed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeldFds {
    /// They stay, with no owner, until they are released by name (its pipes are still being read).
    Keep,
    /// They are closed.
    Release,
}

/// A request to start a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spawn {
    /// Comes back with the answer.
    pub request: u64,
    /// Says whose child it is; opaque, at most [`TAG_MAX`] bytes.
    pub tag: Vec<u8>,
    /// How many of the frame's descriptors become the program's, 0 upwards.
    pub child_fds: u16,
    /// The names of the descriptors to hold for it, from the instant it exists.
    pub held: Vec<String>,
    /// The encoded [`Command`]; `None` when it is in a sealed memfd, the frame's last descriptor.
    pub command: Option<Vec<u8>>,
}

/// From the keeper to the supervisor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromKeeper {
    /// The first frame on every link.
    Hello(Hello),
    /// A part of the inventory: children.
    Children {
        /// The number of this batch.
        batch: u32,
        /// The children.
        children: Vec<ChildRecord>,
    },
    /// A part of the inventory: held descriptors, which come with this frame in this order.
    Held {
        /// The number of this batch.
        batch: u32,
        /// Name and owner of each.
        held: Vec<HeldRecord>,
    },
    /// The inventory is complete; from now on changes are reported.
    InventoryEnd,
    /// The program of this request runs.
    Spawned {
        /// The request.
        request: u64,
        /// The child's pid, also the id of its session and group.
        pid: u32,
        /// Its start time in clock ticks since boot.
        start_ticks: u64,
    },
    /// The program of this request does not run; its tag and descriptors are forgotten.
    SpawnFailed {
        /// The request; 0 when another supervisor made it and this one knows the child by its pid.
        request: u64,
        /// The pid it had, 0 when there never was a process.
        pid: u32,
        /// Why.
        failure: Failure,
    },
    /// A child has ended. Its zombie stays until it is confirmed.
    Exited {
        /// Its pid.
        pid: u32,
        /// Its tag.
        tag: Vec<u8>,
        /// How it ended.
        status: WaitStatus,
    },
    /// The keeper got a signal that asks the daemon to end (SIGTERM, SIGINT, SIGHUP).
    Terminate {
        /// Its number.
        signal: i32,
    },
    /// The keeper exits and leaves everything to another one, which is about to ask for it.
    Leaving,
    /// The supervisor that follows an upgrade has everything: this one exits.
    Dismissed,
    /// How far an upgrade is.
    Upgraded(Upgrade),
    /// Everything before the Sync is done.
    Synced {
        /// The request.
        request: u64,
    },
    /// The keeper does not know this kind of frame.
    NotUnderstood {
        /// The kind.
        kind: u16,
    },
    /// A frame of a newer version.
    Unknown {
        /// Its kind.
        kind: u16,
    },
}

/// What the keeper says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The version the keeper speaks.
    pub version: u16,
    /// Its pid.
    pub keeper_pid: u32,
    /// When it started, in nanoseconds of CLOCK_MONOTONIC.
    pub started: u64,
    /// The limit on open descriptors the daemon was started with; children get it.
    pub open_files: Limit,
    /// The out-of-memory score adjustment the daemon was started with; children get it.
    pub oom_score_adj: i32,
    /// How many supervisors have ended before this one.
    pub deaths: u32,
    /// How the last one ended, if there was one.
    pub last_death: Option<Death>,
    /// The state blob is suspected of killing supervisors: start without it.
    pub without_blob: bool,
    /// A signal that asks the daemon to end and that no supervisor has finished acting on.
    pub terminate: Option<i32>,
    /// The last upgrade, if there was one. Version 2.
    pub upgrade: Option<Upgrade>,
}

/// How a supervisor ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Death {
    /// Its pid; 0 when it never had one.
    pub pid: u32,
    /// Its wait status.
    pub status: WaitStatus,
    /// How long it lived, in milliseconds.
    pub lived_ms: u64,
    /// What the keeper knows beyond that (a broken link, a failed exec); empty if nothing.
    pub reason: String,
}

/// A child in the inventory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChildRecord {
    /// Its pid.
    pub pid: u32,
    /// Its start time in clock ticks since boot.
    pub start_ticks: u64,
    /// Its tag.
    pub tag: Vec<u8>,
    /// How far it is.
    pub state: ChildState,
}

/// How far a child is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChildState {
    /// Forked; not known yet whether its program runs. [`FromKeeper::SpawnFailed`] tells if it does not.
    Starting,
    /// Alive.
    Running,
    /// Ended, and not confirmed.
    Exited(WaitStatus),
}

/// A held descriptor in the inventory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldRecord {
    /// Its name.
    pub name: String,
    /// The pid of the child it belongs to.
    pub owner: Option<u32>,
}

/// A program to start, as it travels. See [`crate::sys::spawn::Program`] for what always holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Command {
    /// The path of the executable.
    pub program: CString,
    /// The arguments, beginning with the program's name.
    pub args: Vec<CString>,
    /// The environment, `KEY=value` each.
    pub env: Vec<CString>,
    /// The working directory; empty is the keeper's.
    pub cwd: CString,
    /// Append `LISTEN_PID=` with the program's own pid to the environment.
    pub listen_pid: bool,
    /// Who it runs as; like the keeper when `None`.
    pub credentials: Option<Credentials>,
    /// The file mode creation mask; the keeper's when `None`.
    pub umask: Option<u32>,
    /// The out-of-memory score adjustment; the one the daemon was started with when `None`.
    pub oom_score_adj: Option<i32>,
    /// Further resource limits. That on open descriptors is the original one unless it is listed.
    pub limits: Vec<Limit>,
    /// Its order and its rights. A keeper of version 1 ignores this and what follows.
    pub confinement: Confinement,
    /// The directory of its control group; empty is the keeper's own group.
    pub cgroup: CString,
}

/// A [`Command`] that borrows from its encoded form.
#[derive(Debug, PartialEq, Eq)]
pub struct CommandView<'a> {
    /// The path of the executable.
    pub program: &'a CStr,
    /// The arguments.
    pub args: Vec<&'a CStr>,
    /// The environment.
    pub env: Vec<&'a CStr>,
    /// The working directory; empty is the keeper's.
    pub cwd: &'a CStr,
    /// Append `LISTEN_PID=`.
    pub listen_pid: bool,
    /// Who it runs as.
    pub credentials: Option<Credentials>,
    /// The file mode creation mask.
    pub umask: Option<u32>,
    /// The out-of-memory score adjustment.
    pub oom_score_adj: Option<i32>,
    /// Further resource limits.
    pub limits: Vec<Limit>,
    /// Its order and its rights.
    pub confinement: Confinement,
    /// The directory of its control group; empty is the keeper's own group.
    pub cgroup: &'a CStr,
}

/// Why bytes are no frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// It ends within a field.
    #[error("frame is cut short")]
    Short,
    /// A field has a value that no version gives it.
    #[error("bad value in {0}")]
    Value(&'static str),
    /// A field is longer than it may be.
    #[error("{0} is too long")]
    TooLong(&'static str),
    /// Not as many descriptors came as the frame says.
    #[error("descriptors do not match the frame")]
    Descriptors,
}

impl ToKeeper {
    /// The frame for this message with this many descriptors.
    ///
    /// # Errors
    /// [`WireError::TooLong`], [`WireError::Descriptors`].
    pub fn encode(&self, fds: usize) -> Result<Vec<u8>, WireError> {
        let mut w = Writer::default();
        let kind = match self {
            Self::Welcome { version } => {
                w.u16(*version);
                1
            }
            Self::Taken { batch } => {
                w.u32(*batch);
                2
            }
            Self::Spawn(spawn) => {
                w.u64(spawn.request);
                w.bytes(&spawn.tag, TAG_MAX, "tag")?;
                w.u16(spawn.child_fds);
                w.list(&spawn.held, |w, name| w.bytes(name.as_bytes(), NAME_MAX, "name"))?;
                w.option(spawn.command.as_ref(), |w, command| w.bytes(command, FRAME_MAX, "command"))?;
                3
            }
            Self::Confirm { pid, fds } => {
                w.u32(*pid);
                w.u8(u8::from(*fds == HeldFds::Keep));
                4
            }
            Self::Hold { names, owner } => {
                w.list(names, |w, name| w.bytes(name.as_bytes(), NAME_MAX, "name"))?;
                w.u32(owner.unwrap_or(0));
                5
            }
            Self::Release { name } => {
                w.bytes(name.as_bytes(), NAME_MAX, "name")?;
                6
            }
            Self::ReleasePrefix { prefix } => {
                w.bytes(prefix.as_bytes(), NAME_MAX, "prefix")?;
                7
            }
            Self::Sync { request } => {
                w.u64(*request);
                8
            }
            Self::Quit => 9,
            Self::Notify { text } => {
                w.bytes(text.as_bytes(), NOTIFY_MAX, "notification")?;
                10
            }
            Self::Beat => 11,
            Self::Upgrade { op, from, supervisor_only } => {
                w.u64(*op);
                w.bytes(from.as_bytes(), NAME_MAX, "version")?;
                w.u8(u8::from(*supervisor_only));
                12
            }
            Self::Go => 13,
            Self::TookOver => 14,
            Self::Unknown { kind } => *kind,
        };
        w.frame(kind, fds)
    }

    /// The message in a frame that came with this many descriptors.
    ///
    /// # Errors
    /// [`WireError`]; never panics, whatever the bytes.
    pub fn decode(frame: &[u8], fds: usize) -> Result<Self, WireError> {
        let (kind, mut r) = Reader::frame(frame, fds)?;
        let message = match kind {
            1 => Self::Welcome { version: r.u16()? },
            2 => Self::Taken { batch: r.u32()? },
            3 => Self::Spawn(Spawn {
                request: r.u64()?,
                tag: r.bytes(TAG_MAX, "tag")?.to_vec(),
                child_fds: r.u16()?,
                held: r.list(|r| r.text(NAME_MAX, "name"))?,
                command: r.option(|r| Ok(r.bytes(FRAME_MAX, "command")?.to_vec()))?,
            }),
            4 => Self::Confirm {
                pid: r.u32()?,
                fds: match r.u8()? {
                    0 => HeldFds::Release,
                    1 => HeldFds::Keep,
                    _ => return Err(WireError::Value("confirm")),
                },
            },
            5 => Self::Hold { names: r.list(|r| r.text(NAME_MAX, "name"))?, owner: r.pid()? },
            6 => Self::Release { name: r.text(NAME_MAX, "name")? },
            7 => Self::ReleasePrefix { prefix: r.text(NAME_MAX, "prefix")? },
            8 => Self::Sync { request: r.u64()? },
            9 => Self::Quit,
            10 => Self::Notify { text: r.text(NOTIFY_MAX, "notification")? },
            11 => Self::Beat,
            12 => Self::Upgrade {
                op: r.u64()?,
                from: r.text(NAME_MAX, "version")?,
                supervisor_only: r.u8()? != 0,
            },
            13 => Self::Go,
            14 => Self::TookOver,
            kind => return Ok(Self::Unknown { kind }),
        };
        let expected = match &message {
            Self::Spawn(spawn) => {
                usize::from(spawn.child_fds) + spawn.held.len() + usize::from(spawn.command.is_none())
            }
            Self::Hold { names, .. } => names.len(),
            Self::Upgrade { .. } => 1,
            _ => 0,
        };
        if expected == fds { Ok(message) } else { Err(WireError::Descriptors) }
    }
}

impl FromKeeper {
    /// The frame for this message with this many descriptors.
    ///
    /// # Errors
    /// [`WireError::TooLong`], [`WireError::Descriptors`].
    pub fn encode(&self, fds: usize) -> Result<Vec<u8>, WireError> {
        let mut w = Writer::default();
        let kind = match self {
            Self::Hello(hello) => {
                hello.write(&mut w)?;
                0x101
            }
            Self::Children { batch, children } => {
                w.u32(*batch);
                w.list(children, |w, child| w.record(|w| child.write(w)))?;
                0x102
            }
            Self::Held { batch, held } => {
                w.u32(*batch);
                w.list(held, |w, held| w.record(|w| held.write(w)))?;
                0x103
            }
            Self::InventoryEnd => 0x104,
            Self::Spawned { request, pid, start_ticks } => {
                w.u64(*request);
                w.u32(*pid);
                w.u64(*start_ticks);
                0x105
            }
            Self::SpawnFailed { request, pid, failure } => {
                w.u64(*request);
                w.u32(*pid);
                w.u8(failure.stage.code());
                w.i32(failure.errno);
                0x106
            }
            Self::Exited { pid, tag, status } => {
                w.u32(*pid);
                w.bytes(tag, TAG_MAX, "tag")?;
                w.i32(status.raw());
                0x107
            }
            Self::Terminate { signal } => {
                w.i32(*signal);
                0x108
            }
            Self::Synced { request } => {
                w.u64(*request);
                0x109
            }
            Self::NotUnderstood { kind } => {
                w.u16(*kind);
                0x10a
            }
            Self::Leaving => 0x10b,
            Self::Dismissed => 0x10c,
            Self::Upgraded(upgrade) => {
                upgrade.write(&mut w)?;
                0x10d
            }
            Self::Unknown { kind } => *kind,
        };
        w.frame(kind, fds)
    }

    /// The message in a frame that came with this many descriptors.
    ///
    /// # Errors
    /// [`WireError`]; never panics, whatever the bytes.
    pub fn decode(frame: &[u8], fds: usize) -> Result<Self, WireError> {
        let (kind, mut r) = Reader::frame(frame, fds)?;
        let message = match kind {
            0x101 => Self::Hello(Hello::read(&mut r)?),
            0x102 => {
                let batch = r.u32()?;
                Self::Children { batch, children: r.list(|r| ChildRecord::read(&mut r.record()?))? }
            }
            0x103 => {
                let batch = r.u32()?;
                Self::Held { batch, held: r.list(|r| HeldRecord::read(&mut r.record()?))? }
            }
            0x104 => Self::InventoryEnd,
            0x105 => Self::Spawned { request: r.u64()?, pid: r.u32()?, start_ticks: r.u64()? },
            0x106 => Self::SpawnFailed {
                request: r.u64()?,
                pid: r.u32()?,
                failure: Failure { stage: Stage::from_code(r.u8()?), errno: r.i32()? },
            },
            0x107 => Self::Exited {
                pid: r.u32()?,
                tag: r.bytes(TAG_MAX, "tag")?.to_vec(),
                status: WaitStatus::from_raw(r.i32()?),
            },
            0x108 => Self::Terminate { signal: r.i32()? },
            0x109 => Self::Synced { request: r.u64()? },
            0x10a => Self::NotUnderstood { kind: r.u16()? },
            0x10b => Self::Leaving,
            0x10c => Self::Dismissed,
            0x10d => Self::Upgraded(Upgrade::read(&mut r)?),
            kind => return Ok(Self::Unknown { kind }),
        };
        let expected = if let Self::Held { held, .. } = &message { held.len() } else { 0 };
        if expected == fds { Ok(message) } else { Err(WireError::Descriptors) }
    }
}

impl Hello {
    /// What a keeper that has seen nothing yet says.
    #[cfg(test)]
    pub(super) const fn of_a_test() -> Self {
        Self {
            version: VERSION,
            keeper_pid: 1,
            started: 0,
            open_files: Limit { resource: libc::RLIMIT_NOFILE, soft: 1024, hard: 4096 },
            oom_score_adj: 0,
            deaths: 0,
            last_death: None,
            without_blob: false,
            terminate: None,
            upgrade: None,
        }
    }

    fn write(&self, w: &mut Writer) -> Result<(), WireError> {
        w.u16(self.version);
        w.u32(self.keeper_pid);
        w.u64(self.started);
        w.u64(self.open_files.soft);
        w.u64(self.open_files.hard);
        w.i32(self.oom_score_adj);
        w.u32(self.deaths);
        w.option(self.last_death.as_ref(), |w, death| {
            w.u32(death.pid);
            w.i32(death.status.raw());
            w.u64(death.lived_ms);
            w.bytes(death.reason.as_bytes(), FRAME_MAX, "reason")
        })?;
        w.u8(u8::from(self.without_blob));
        w.i32(self.terminate.unwrap_or(0));
        w.option(self.upgrade.as_ref(), |w, upgrade| w.record(|w| upgrade.write(w)))
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, WireError> {
        Ok(Self {
            version: r.u16()?,
            keeper_pid: r.u32()?,
            started: r.u64()?,
            open_files: Limit { resource: libc::RLIMIT_NOFILE, soft: r.u64()?, hard: r.u64()? },
            oom_score_adj: r.i32()?,
            deaths: r.u32()?,
            last_death: r.option(|r| {
                Ok(Death {
                    pid: r.u32()?,
                    status: WaitStatus::from_raw(r.i32()?),
                    lived_ms: r.u64()?,
                    reason: r.text(FRAME_MAX, "reason")?,
                })
            })?,
            without_blob: r.u8()? != 0,
            terminate: Some(r.i32()?).filter(|&signal| signal != 0),
            upgrade: if r.is_empty() { None } else { r.option(|r| Upgrade::read(&mut r.record()?))? },
        })
    }
}

impl ChildRecord {
    fn write(&self, w: &mut Writer) -> Result<(), WireError> {
        w.u32(self.pid);
        w.u64(self.start_ticks);
        w.bytes(&self.tag, TAG_MAX, "tag")?;
        match self.state {
            ChildState::Starting => w.u8(0),
            ChildState::Running => w.u8(1),
            ChildState::Exited(status) => {
                w.u8(2);
                w.i32(status.raw());
            }
        }
        Ok(())
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, WireError> {
        Ok(Self {
            pid: r.u32()?,
            start_ticks: r.u64()?,
            tag: r.bytes(TAG_MAX, "tag")?.to_vec(),
            state: match r.u8()? {
                0 => ChildState::Starting,
                1 => ChildState::Running,
                2 => ChildState::Exited(WaitStatus::from_raw(r.i32()?)),
                _ => return Err(WireError::Value("child state")),
            },
        })
    }
}

impl HeldRecord {
    fn write(&self, w: &mut Writer) -> Result<(), WireError> {
        w.bytes(self.name.as_bytes(), NAME_MAX, "name")?;
        w.u32(self.owner.unwrap_or(0));
        Ok(())
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, WireError> {
        Ok(Self { name: r.text(NAME_MAX, "name")?, owner: r.pid()? })
    }
}

impl Command {
    /// The encoded form: what [`Spawn::command`] or the attached memfd holds.
    ///
    /// # Errors
    /// [`WireError::TooLong`] beyond [`COMMAND_MAX`].
    pub fn encode(&self) -> Result<Vec<u8>, WireError> {
        let mut w = Writer::default();
        w.text(&self.program);
        w.list(&self.args, |w, arg| {
            w.text(arg);
            Ok(())
        })?;
        w.list(&self.env, |w, entry| {
            w.text(entry);
            Ok(())
        })?;
        w.text(&self.cwd);
        w.u8(u8::from(self.listen_pid));
        w.option(self.credentials.as_ref(), |w, credentials| {
            w.u32(credentials.uid);
            w.u32(credentials.gid);
            w.list(&credentials.groups, |w, &group| {
                w.u32(group);
                Ok(())
            })
        })?;
        w.option(self.umask.as_ref(), |w, &mask| {
            w.u32(mask);
            Ok(())
        })?;
        w.option(self.oom_score_adj.as_ref(), |w, &value| {
            w.i32(value);
            Ok(())
        })?;
        w.list(&self.limits, |w, limit| {
            w.u32(limit.resource);
            w.u64(limit.soft);
            w.u64(limit.hard);
            Ok(())
        })?;
        write_confinement(&self.confinement, &mut w)?;
        w.text(&self.cgroup);
        w.command()
    }
}

impl<'a> CommandView<'a> {
    /// Reads an encoded [`Command`]; its texts are borrowed, so a megabyte of environment is not copied.
    ///
    /// # Errors
    /// [`WireError`]; never panics, whatever the bytes.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, WireError> {
        let mut r = Reader::new(bytes);
        let mut view = Self {
            program: r.c_text()?,
            args: r.list(Reader::c_text)?,
            env: r.list(Reader::c_text)?,
            cwd: r.c_text()?,
            listen_pid: r.u8()? != 0,
            credentials: r
                .option(|r| Ok(Credentials { uid: r.u32()?, gid: r.u32()?, groups: r.list(Reader::u32)? }))?,
            umask: r.option(Reader::u32)?,
            oom_score_adj: r.option(Reader::i32)?,
            limits: r.list(|r| Ok(Limit { resource: r.u32()?, soft: r.u64()?, hard: r.u64()? }))?,
            confinement: Confinement::NONE,
            cgroup: c"",
        };
        // A supervisor of version 1 ends here.
        if !r.is_empty() {
            view.confinement = read_confinement(&mut r)?;
            view.cgroup = r.c_text()?;
        }
        Ok(view)
    }

    /// A copy that borrows nothing.
    #[must_use]
    pub fn to_command(&self) -> Command {
        let owned = |texts: &[&CStr]| texts.iter().map(|&text| text.to_owned()).collect();
        Command {
            program: self.program.to_owned(),
            args: owned(&self.args),
            env: owned(&self.env),
            cwd: self.cwd.to_owned(),
            listen_pid: self.listen_pid,
            credentials: self.credentials.clone(),
            umask: self.umask,
            oom_score_adj: self.oom_score_adj,
            limits: self.limits.clone(),
            confinement: self.confinement.clone(),
            cgroup: self.cgroup.to_owned(),
        }
    }
}

/// A record of its own, so that more can be appended to it.
fn write_confinement(confinement: &Confinement, w: &mut Writer) -> Result<(), WireError> {
    let Confinement { nice, io_priority, cpus, no_new_privs, ambient } = confinement;
    w.record(|w| {
        w.option(nice.as_ref(), |w, &nice| {
            w.i32(nice);
            Ok(())
        })?;
        w.option(io_priority.as_ref(), |w, &priority| {
            w.u16(priority);
            Ok(())
        })?;
        w.list(cpus, |w, &cpu| {
            w.u32(cpu);
            Ok(())
        })?;
        w.u8(u8::from(*no_new_privs));
        w.u64(*ambient);
        Ok(())
    })
}

fn read_confinement(r: &mut Reader<'_>) -> Result<Confinement, WireError> {
    let mut r = r.record()?;
    Ok(Confinement {
        nice: r.option(Reader::i32)?,
        io_priority: r.option(Reader::u16)?,
        cpus: r.list(Reader::u32)?,
        no_new_privs: r.u8()? != 0,
        ambient: r.u64()?,
    })
}

/// How many bytes a child takes in a frame, at most.
pub(super) fn child_len(child: &ChildRecord) -> usize {
    // Record length, pid, start ticks, tag length, state, status.
    child.tag.len() + 4 + 4 + 8 + 4 + 1 + 4
}

/// How many bytes a held descriptor takes in a frame, at most.
pub(super) fn held_len(held: &HeldRecord) -> usize {
    // Record length, name length, owner.
    held.name.len() + 4 + 4 + 4
}

#[cfg(test)]
mod tests;
