//! What is refused, or said, before an operation begins.

use std::sync::Arc;

use super::super::handle::Replies;
use super::super::outcome::refused;
use super::super::room::{self, Need};
use super::{Driver, usage};
use crate::ipc::protocol::{Refused, Reply, Verb as AskedVerb};
use crate::model::id::AppName;
use crate::model::spec::AppSpec;
use crate::model::status::Status;
use crate::policy::vocabulary::{Refusal, Selected, SlotView};
use crate::store::state::Shell;
use crate::sys::limits;

impl Driver {
    /// Instances that an operation has yet to start would get another environment than those it has started.
    pub(super) fn check_shell(&self, selection: &[Selected], shell: &Shell) -> Result<(), Refused> {
        for Selected { app, .. } in selection {
            if let Some(operation) = self.fleet.app(app).and_then(|view| view.operation)
                && self.shells.present().get(app) != Some(shell)
            {
                return Err(refused(&Refusal::Busy { app: app.clone(), operation }));
            }
        }
        Ok(())
    }

    /// Two apps with one address would take each other's connections.
    pub(super) fn check_addresses(
        &self,
        specs: &[Arc<AppSpec>],
        removed: &[&AppName],
    ) -> Result<(), Refused> {
        let running = self.fleet.view();
        for spec in specs {
            let others = running
                .iter()
                .map(|app| &app.spec)
                .filter(|other| !specs.iter().any(|spec| spec.name == other.name))
                .filter(|other| !removed.contains(&&other.name))
                .chain(specs)
                .filter(|other| other.name != spec.name);
            for other in others {
                let shared = spec.listen.iter().find(|a| other.listen.iter().any(|b| a.address == b.address));
                if let Some(listener) = shared {
                    return Err(usage(
                        &format!("`{}` and `{}` both listen on {}", other.name, spec.name, listener.address),
                        Some("Give one of them another address, or delete it first."),
                    ));
                }
            }
        }
        Ok(())
    }

    /// What would leave no descriptors for what runs is not begun. `specs` run when this is done, and the named slots too.
    pub(super) fn check_room(&self, specs: &[Arc<AppSpec>], selection: &[Selected]) -> Result<(), Refused> {
        let Ok(limit) = limits::open_files() else { return Ok(()) };
        let count = |slots: usize| u64::try_from(slots).unwrap_or(u64::MAX);
        let (mut now, mut then) = (Need::default(), Need::default());
        let running = self.fleet.view();
        for app in &running {
            let is_up = |slot: &&SlotView| {
                slot.current.is_some() || !matches!(slot.status, Status::Stopped | Status::Errored)
            };
            let up = app.slots.iter().filter(is_up).count();
            now.add(&app.spec, count(up));
            let named = selection.iter().find(|selected| selected.app == app.spec.name);
            match (specs.iter().find(|spec| spec.name == app.spec.name), named) {
                (Some(spec), _) => then.add(spec, u64::from(spec.instances)),
                (None, None) => then.add(&app.spec, count(up)),
                (None, Some(selected)) => {
                    let is_named = |slot: &&SlotView| {
                        is_up(slot) || selected.slots.as_ref().is_none_or(|slots| slots.contains(&slot.slot))
                    };
                    then.add(&app.spec, count(app.slots.iter().filter(is_named).count()));
                }
            }
        }
        for spec in specs {
            if spec.autostart && !running.iter().any(|app| app.spec.name == spec.name) {
                then.add(spec, u64::from(spec.instances));
            }
        }
        match room::refusal(limit.soft, now, then) {
            None => Ok(()),
            Some((cause, hint)) => Err(Refused {
                code: 1,
                message: "there are not enough descriptors for so many instances".to_owned(),
                cause: Some(cause),
                hint: Some(hint),
            }),
        }
    }

    pub(super) fn announce_downtime(
        &self,
        verb: AskedVerb,
        selection: &[Selected],
        specs: &[Arc<AppSpec>],
        replies: &Replies,
    ) {
        if verb != AskedVerb::Reload {
            return;
        }
        for Selected { app, .. } in selection {
            let Some(view) = self.fleet.app(app) else { continue };
            let spec = specs.iter().find(|spec| spec.name == *app).unwrap_or(&view.spec);
            let runs = view.slots.iter().any(|slot| slot.current.is_some());
            if runs && !spec.can_overlap() {
                let _ = replies.send(Reply::Notice(format!(
                    "`{app}` is restarted in place, with downtime: two of it cannot run side by side. Set `listen` and \
                     take the socket from LISTEN_FDS, or use cluster mode, to reload without it."
                )));
            }
        }
    }
}
