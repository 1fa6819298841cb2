//! Why a run ended.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::signal::Signal;

/// How a run ended. Code and signal are kept apart: `stop_exit_codes` never match a signal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitReason {
    /// It called exit(2) with this code.
    Code(i32),
    /// A signal ended it.
    Signal(Signal),
    /// The kernel's out-of-memory killer ended it.
    Oom,
    /// It was removed because it was not ready within `listen_timeout`.
    NotReady,
    /// It was removed because its health check failed.
    Health,
    /// It was removed because it used more memory than `max_memory_restart` allows.
    Memory,
    /// It never ran: the spawn failed, with this text.
    NotStarted(String),
    /// It ended while nobody could see how.
    Unknown,
}

impl ExitReason {
    /// The exit code, if it exited by itself.
    #[must_use]
    pub const fn code(&self) -> Option<i32> {
        match self {
            Self::Code(code) => Some(*code),
            _ => None,
        }
    }
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(signal) => write!(f, "{signal}"),
            Self::Oom => f.write_str("oom-killed (out of memory)"),
            Self::NotReady => f.write_str("not ready in time"),
            Self::Health => f.write_str("failed health check"),
            Self::Memory => f.write_str("over its memory limit"),
            Self::NotStarted(text) => write!(f, "not started: {text}"),
            Self::Unknown => f.write_str("unknown"),
        }
    }
}
