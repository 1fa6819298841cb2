//! Whether everything has come to its end by itself: then a daemon that runs in the foreground, as the first process of
//! a container, has nothing left to wait for.
//!
//! An end counts when the app's own rules made it one: given up after too many quick exits, a program that cannot be
//! run, `autorestart = false`, `stop_exit_codes`. What somebody has stopped is neither a reason to go on nor one to end;
//! where there is nothing else, whoever stopped it may want to start it again.

use crate::model::exit::ExitReason;
use crate::model::id::{AppName, PmId, Slot};

use super::app::App;
use super::fleet::Fleet;
use super::slot::{Rest, SlotState};

/// A slot that has come to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finished {
    /// Of which app.
    pub app: AppName,
    /// Which.
    pub slot: Slot,
    /// How its last run ended.
    pub reason: ExitReason,
    /// It was given up, and did not end as its rules allow.
    pub errored: bool,
}

impl Finished {
    /// What a shell would show for it: the exit code, or 128 and the signal's number. What was given up is never 0.
    #[must_use]
    pub fn code(&self) -> u8 {
        match &self.reason {
            ExitReason::Code(0) => u8::from(self.errored),
            // As the kernel cuts it.
            ExitReason::Code(code) => code.to_le_bytes()[0],
            ExitReason::Signal(signal) => u8::try_from(128 + signal.number()).unwrap_or(1),
            ExitReason::Oom => 137,
            ExitReason::NotStarted(_) => 127,
            ExitReason::NotReady | ExitReason::Health | ExitReason::Memory | ExitReason::Unknown => 1,
        }
    }
}

/// The exit code of all of them together: that of the first one, in this order, that did not end well.
#[must_use]
pub fn exit_code(all: &[Finished]) -> u8 {
    all.iter().map(Finished::code).find(|code| *code != 0).unwrap_or(0)
}

/// What keeps a slot from having come to its end.
enum Standing {
    /// It runs, is about to, or something is being done to it.
    Up,
    /// It waits for another app, for as long as that is not there.
    Waits,
    /// It came to its end by itself.
    Over(Finished),
    /// Somebody has stopped it, or it was never started.
    Down,
}

impl Fleet {
    /// Every slot that has come to its end by itself, in the order in which apps were created; `None` while anything
    /// runs or will run without being asked for, and where nothing has ended by itself.
    #[must_use]
    pub fn finished(&self) -> Option<Vec<Finished>> {
        let mut ended: Vec<(PmId, Finished)> = Vec::new();
        for app in self.apps.values() {
            if app.operation.is_some() || app.next.is_some() || !app.hooks.is_idle() {
                return None;
            }
            for (slot, state) in &app.slots {
                match standing(app, *slot, state) {
                    Standing::Up => return None,
                    Standing::Over(finished) => ended.push((state.pm_id, finished)),
                    Standing::Waits | Standing::Down => {}
                }
            }
        }
        ended.sort_by_key(|(pm_id, _)| *pm_id);
        (!ended.is_empty()).then(|| ended.into_iter().map(|(_, finished)| finished).collect())
    }
}

fn standing(app: &App, slot: Slot, state: &SlotState) -> Standing {
    if !state.runs.is_empty() {
        return Standing::Up;
    }
    let over = |errored| {
        Standing::Over(Finished {
            app: app.name.clone(),
            slot,
            reason: state.last_exit.clone().unwrap_or(ExitReason::Unknown),
            errored,
        })
    };
    match state.rest {
        Rest::Due if state.gated => Standing::Waits,
        Rest::Due | Rest::Waiting { .. } | Rest::Held => Standing::Up,
        Rest::Errored => over(true),
        Rest::Stopped if state.ended.is_some() => over(false),
        Rest::Stopped => Standing::Down,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::signal::Signal;

    fn check(reason: ExitReason, errored: bool, expected: u8) {
        let app = AppName::new("a").unwrap();
        let finished = Finished { app, slot: Slot(0), reason, errored };
        assert_eq!(finished.code(), expected, "{finished:?}");
    }

    #[test]
    fn codes_are_those_a_shell_shows() {
        check(ExitReason::Code(0), false, 0);
        check(ExitReason::Code(0), true, 1);
        check(ExitReason::Code(3), true, 3);
        check(ExitReason::Code(255), false, 255);
        check(ExitReason::Signal(Signal::TERM), false, 143);
        check(ExitReason::Signal(Signal::KILL), true, 137);
        check(ExitReason::Oom, true, 137);
        check(ExitReason::NotStarted("no such file".into()), true, 127);
        check(ExitReason::NotReady, true, 1);
    }

    #[test]
    fn of_several_the_first_that_did_not_end_well_decides() {
        let of = |codes: &[i32]| {
            let finished = |code: &i32| Finished {
                app: AppName::new("a").unwrap(),
                slot: Slot(0),
                reason: ExitReason::Code(*code),
                errored: false,
            };
            exit_code(&codes.iter().map(finished).collect::<Vec<_>>())
        };
        assert_eq!(of(&[0, 0]), 0);
        assert_eq!(of(&[0, 3, 1]), 3);
    }
}
