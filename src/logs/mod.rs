//! From an app's pipes to its log files, and from the files to a reader.
//!
//! [`spawn`] starts the one thread that reads the pipes of every instance and writes their files ([`pump`]); the
//! supervisor tells it which pipes there are through a [`LogHandle`] that never blocks. Lines are kept whole
//! ([`mod@line`]), what is on its way survives the process in the [`journal`], files are opened, shared and survived by [`writer`], time stamps come from [`stamp`]. [`tail`] reads the
//! files for `pm logs` and needs no daemon.
//!
//! Never: memory that grows with what an app writes, an app that stops because its disk is full, a driver that waits
//! for a disk.

pub mod console;
pub mod journal;
pub mod line;
pub mod naming;
pub mod pump;
pub mod recent;
mod recovery;
mod relief;
pub mod stamp;
pub mod tail;
pub mod watch;
pub mod writer;

pub use journal::Journal;
pub use pump::{Attachment, LogEvent, LogHandle, Pipe, spawn};
pub use writer::{Owner, Target};
