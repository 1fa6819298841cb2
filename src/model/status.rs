//! What a row of the table says, in PM2's words.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The state of a slot as people see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Status {
    /// Spawned or waiting for its turn, not ready yet.
    #[serde(rename = "launching")]
    Launching,
    /// Ready.
    #[serde(rename = "online")]
    Online,
    /// On the stop ladder: until wait() returned and the whole tree is gone.
    #[serde(rename = "stopping")]
    Stopping,
    /// Not running, and not meant to.
    #[serde(rename = "stopped")]
    Stopped,
    /// Ended, and will be started again after a delay.
    #[serde(rename = "waiting restart")]
    WaitingRestart,
    /// Given up after too many quick exits.
    #[serde(rename = "errored")]
    Errored,
}

impl Status {
    /// The word for tables and `jlist`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Launching => "launching",
            Self::Online => "online",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::WaitingRestart => "waiting restart",
            Self::Errored => "errored",
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}
