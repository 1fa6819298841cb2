//! An upgrade, as the loop sees it: examine the program, let the keeper start it, make way, and say how it went.

use super::super::handle::Replies;
use super::super::notices::status_of;
use super::super::upgrade::{Examined, PM_VERSION, Subject, Then as UpgradeThen, Wish as UpgradeWish};
use super::{Driver, Input, SAVE_PATIENCE, failed};
use crate::ipc::protocol::Refused;
use crate::keeper::wire::{self, UpgradeState};
use crate::model::id::OpId;
use crate::sys::clock;

impl Driver {
    pub(super) fn upgrade(&mut self, op: OpId, wish: UpgradeWish, replies: &Replies) -> Result<(), Refused> {
        if self.terminated.is_some() || self.quitting {
            return Err(Refused {
                code: 5,
                message: "the daemon is ending".to_owned(),
                cause: None,
                hint: Some("The next one that is started is the new version.".to_owned()),
            });
        }
        self.record(clock::now());
        let blob = self.world.blob_copy().map_err(|error| failed("cannot copy the live state", &error))?;
        let keeper_pid = self.world.keeper_pid();
        let subject = Subject { home: self.home.clone(), blob, keeper_pid, keeper_wire: self.keeper_wire };
        let inputs = self.inputs.clone();
        self.upgrades.begin(op, wish, replies, subject, move |examined| {
            // Fails only when the driver has ended.
            let _ = inputs.send(Input::Examined(Box::new(examined)));
        })
    }

    pub(super) fn examined(&mut self, examined: Examined) {
        let op = examined.op;
        let Some((candidate, supervisor_only)) = self.upgrades.examined(examined) else { return };
        if self.terminated.is_some() {
            return self.upgrades.give_up("the daemon is ending");
        }
        let to = &candidate.findings.pm;
        tracing::info!(from = PM_VERSION, to, "upgrade begins");
        if let Some(text) = self.notices.reloading(clock::now()) {
            self.world.notify(text);
        }
        if let Err(error) = self.world.prepare_upgrade(op, PM_VERSION, supervisor_only, &candidate.program) {
            self.upgrades.give_up(&error.to_string());
        }
    }

    pub(super) fn upgraded(&mut self, upgrade: wire::Upgrade) {
        match self.upgrades.told(upgrade) {
            UpgradeThen::Leave => self.leaving = Some(clock::now() + SAVE_PATIENCE),
            UpgradeThen::Stay => {
                // It may have ended between two words of the keeper.
                self.leaving = None;
                self.note_upgrade();
                if let Some(text) = self.notices.up(self.world.keeper_pid(), &status_of(&self.fleet)) {
                    self.world.notify(text);
                }
            }
            UpgradeThen::Ended => self.note_upgrade(),
        }
    }

    pub(super) fn note_upgrade(&mut self) {
        if let Some(last) = self.upgrades.last() {
            let (event, fields) = upgrade_event(last);
            tracing::info!(from = last.from, to = PM_VERSION, outcome = ?last.state, "upgrade has ended");
            self.journal.daemon(clock::now(), event, fields);
        }
    }

    /// Whether it is time to make way for the next supervisor.
    pub(super) fn leaves(&self) -> bool {
        self.leaving.is_some_and(|until| self.held.is_empty() || until <= clock::now())
    }
}

/// An upgrade in the stream of events.
fn upgrade_event(upgrade: &wire::Upgrade) -> (&'static str, serde_json::Value) {
    let (event, keeper, reason) = match &upgrade.state {
        UpgradeState::Failed { reason } => ("upgrade_failed", "unchanged", Some(reason)),
        UpgradeState::KeeperStays { reason } => ("daemon_upgraded", "unchanged", Some(reason)),
        UpgradeState::Supervisor => ("daemon_upgraded", "unchanged", None),
        UpgradeState::Pending | UpgradeState::Both => ("daemon_upgraded", "replaced", None),
    };
    let to = PM_VERSION;
    (event, serde_json::json!({ "from": upgrade.from, "to": to, "keeper": keeper, "reason": reason }))
}
