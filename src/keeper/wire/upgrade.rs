//! What keeper and supervisor say to each other about an upgrade.

use super::codec::{Reader, Writer};
use super::{NOTIFY_MAX, WireError};

/// The longest version in bytes.
const VERSION_MAX: usize = 255;

/// An upgrade, as the keeper remembers it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upgrade {
    /// The operation of the client that asked for it.
    pub op: u64,
    /// The version it came from.
    pub from: String,
    /// How far it is.
    pub state: UpgradeState,
}

/// How far an upgrade is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UpgradeState {
    /// The new supervisor is started, or has yet to say that it has taken over, or the keeper has yet to replace
    /// itself.
    Pending,
    /// The new supervisor did not take over; the one before it goes on.
    Failed {
        /// Why.
        reason: String,
    },
    /// The supervisor is new. The keeper is as it was, because it is the same program or was not asked to change.
    Supervisor,
    /// The supervisor is new; the keeper was to be and could not.
    KeeperStays {
        /// Why.
        reason: String,
    },
    /// Both are new.
    Both,
}

impl Upgrade {
    pub(super) fn write(&self, w: &mut Writer) -> Result<(), WireError> {
        let (code, reason) = match &self.state {
            UpgradeState::Pending => (0, ""),
            UpgradeState::Failed { reason } => (1, reason.as_str()),
            UpgradeState::Supervisor => (2, ""),
            UpgradeState::KeeperStays { reason } => (3, reason.as_str()),
            UpgradeState::Both => (4, ""),
        };
        w.u64(self.op);
        w.bytes(self.from.as_bytes(), VERSION_MAX, "version")?;
        w.u8(code);
        w.bytes(reason.as_bytes(), NOTIFY_MAX, "reason")
    }

    pub(super) fn read(r: &mut Reader<'_>) -> Result<Self, WireError> {
        let (op, from) = (r.u64()?, r.text(VERSION_MAX, "version")?);
        let (code, reason) = (r.u8()?, r.text(NOTIFY_MAX, "reason")?);
        let state = match code {
            0 => UpgradeState::Pending,
            1 => UpgradeState::Failed { reason },
            2 => UpgradeState::Supervisor,
            3 => UpgradeState::KeeperStays { reason },
            4 => UpgradeState::Both,
            _ => return Err(WireError::Value("state of an upgrade")),
        };
        Ok(Self { op, from, state })
    }
}
