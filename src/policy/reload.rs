//! Which slot of a reload moves next.
//!
//! A picture of the app goes in, moves come out. The promises, as counts that hold at every instant:
//!
//! - runs that launch or serve, or have not got their signal yet, are at most `instances + max_surge`; what is kept in
//!   reserve is beyond that;
//! - no serving run is taken away that would leave fewer than `instances − max_unavailable`, unless its successor serves
//!   already;
//! - at most `max_draining` replaced runs are there at the same time, in reserve or on their way out.
//!
//! A rollback is the same thing with the releases in exchanged parts (see `rollback`). What becomes of a failure is
//! decided in `operation`.

use crate::model::id::Slot;

/// What a reload knows of an app.
#[derive(Clone, Debug)]
pub(super) struct Picture {
    /// Slots that are meant to run, those included that the release is going to give up.
    pub(super) places: usize,
    /// Slots that the release is meant to run in.
    pub(super) instances: usize,
    pub(super) max_surge: usize,
    pub(super) max_unavailable: usize,
    /// Whether two generations of a slot may run side by side.
    pub(super) overlap: bool,
    /// Whether what is replaced stays in reserve until nothing is left to be replaced.
    pub(super) reserve: bool,
    /// Whether everything is replaced in one step, so that nothing waits for places.
    pub(super) at_once: bool,
    /// How many replaced runs may be there, in reserve or on their way out.
    pub(super) max_draining: usize,
    /// How many are: runs that neither launch nor serve.
    pub(super) lingering: usize,
    /// Every run of the app that counts towards the surge, slots outside the reload included. A slot that is meant to run
    /// has a place also while it is empty: its next run may be started at any moment.
    pub(super) counted: usize,
    /// Every run in rotation, slots outside the reload included.
    pub(super) serving: usize,
    /// The slots of the reload, ascending.
    pub(super) slots: Vec<SlotPicture>,
}

impl Picture {
    /// Whether what is to serve in this slot does.
    pub(super) fn serves(&self, slot: Slot) -> bool {
        self.slots.iter().any(|one| one.slot == slot && one.new == NewRun::Serving)
    }
}

/// What a reload knows of a slot.
#[derive(Clone, Copy, Debug)]
pub(super) struct SlotPicture {
    pub(super) slot: Slot,
    pub(super) new: NewRun,
    pub(super) old: OldRun,
}

/// The successor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NewRun {
    /// Not begun.
    None,
    /// Queued or launching.
    Launching,
    /// In rotation, but not for long enough yet (`min_healthy`, where nothing runs beside it).
    Soaking,
    /// In rotation.
    Serving,
    /// It served, and has ended since: it is being started again.
    Lost,
}

/// What is to be replaced. Ordered: of several runs the last in this order tells what the slot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum OldRun {
    /// No process of it is left.
    Gone,
    /// On its way out, and without claim to a place: it has its signal, or has exited after that.
    Leaving,
    /// Alive, but out of rotation: it may come back.
    Reserve,
    /// It exited by itself; what it left behind has to end before anything is started in its slot.
    Crashed,
    /// On its way out, before its signal.
    Draining,
    /// Queued or launching.
    Launching,
    /// In rotation.
    Serving,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Move {
    /// Start the successor.
    Launch(Slot),
    /// Put the old run on the stop ladder.
    TakeDown(Slot),
    /// Take the old run out of rotation, and keep it.
    Keep(Slot),
    /// Put the old run that was kept on the stop ladder.
    GiveUp(Slot),
}

/// The moves that are allowed now. Each is allowed together with those before it.
pub(super) fn moves(picture: &Picture) -> Vec<Move> {
    let mut moves = Vec::new();
    // Who has been replaced goes, whatever else waits: its successor serves.
    for slot in &picture.slots {
        match (slot.new, slot.old) {
            (NewRun::Serving, OldRun::Serving) if picture.reserve => moves.push(Move::Keep(slot.slot)),
            (NewRun::Serving, OldRun::Serving | OldRun::Launching) => moves.push(Move::TakeDown(slot.slot)),
            _ => {}
        }
    }
    // A new release that does not keep up is not spread any further.
    if picture.slots.iter().any(|slot| slot.new == NewRun::Lost) {
        // It is started again when its slot is empty. That this was no failure says that nobody goes back any more.
        let beside =
            picture.slots.iter().filter(|slot| (slot.new, slot.old) == (NewRun::Lost, OldRun::Reserve));
        moves.extend(beside.map(|slot| Move::GiveUp(slot.slot)));
        return moves;
    }
    if picture.slots.iter().all(|slot| slot.new == NewRun::Serving) {
        give_up_reserve(picture, &mut moves);
    } else if picture.overlap {
        side_by_side(picture, &mut moves);
    } else {
        in_place(picture, &mut moves);
    }
    moves
}

/// The last one is ready: nobody has to come back.
fn give_up_reserve(picture: &Picture, moves: &mut Vec<Move>) {
    let reserve: Vec<Slot> =
        picture.slots.iter().filter(|slot| slot.old == OldRun::Reserve).map(|slot| slot.slot).collect();
    let draining = picture.lingering.saturating_sub(reserve.len());
    let places = picture.max_draining.max(1).saturating_sub(draining);
    moves.extend(reserve.into_iter().take(places).map(Move::GiveUp));
}

fn side_by_side(picture: &Picture, moves: &mut Vec<Move>) {
    // With neither surge nor unavailability nothing could ever move.
    let surge = if picture.max_unavailable == 0 { picture.max_surge.max(1) } else { picture.max_surge };
    let limit = picture.places + surge;
    let least = picture.instances.saturating_sub(picture.max_unavailable);
    let (mut counted, mut serving) = (picture.counted, picture.serving);
    // The end of those that were replaced above is not counted as a place yet: they count until their signal, and in
    // reserve not at all. As serving they do not count any more.
    serving -= moves.len().min(serving);
    counted -= moves.iter().filter(|one| matches!(one, Move::Keep(_))).count().min(counted);
    // Everyone that is being replaced now will linger soon.
    let replacing = picture.slots.iter().filter(|slot| {
        slot.new == NewRun::Launching && matches!(slot.old, OldRun::Serving | OldRun::Launching)
    });
    let mut lingering = picture.lingering + moves.len() + replacing.count();
    let most = picture.max_draining.max(1);
    for slot in picture.slots.iter().filter(|slot| slot.new == NewRun::None && slot.old != OldRun::Crashed) {
        match slot.old {
            // It has its own place, unless what came back from reserve has taken that for a moment.
            OldRun::Gone | OldRun::Leaving | OldRun::Reserve => {
                if counted <= limit {
                    moves.push(Move::Launch(slot.slot));
                }
                continue;
            }
            OldRun::Crashed | OldRun::Draining | OldRun::Launching | OldRun::Serving => {}
        }
        if slot.old == OldRun::Draining {
            if counted < limit {
                moves.push(Move::Launch(slot.slot));
                counted += 1;
            }
            continue;
        }
        if lingering >= most && !picture.at_once {
            make_room(picture, moves);
            // Slots behind it may be empty, and have their own places.
            continue;
        }
        if counted < limit {
            moves.push(Move::Launch(slot.slot));
            (counted, lingering) = (counted + 1, lingering + 1);
            continue;
        }
        match slot.old {
            OldRun::Launching => {
                moves.push(Move::TakeDown(slot.slot));
                lingering += 1;
            }
            OldRun::Serving if serving > least => {
                moves.push(Move::TakeDown(slot.slot));
                (serving, lingering) = (serving - 1, lingering + 1);
            }
            OldRun::Serving
            | OldRun::Gone
            | OldRun::Leaving
            | OldRun::Reserve
            | OldRun::Crashed
            | OldRun::Draining => {}
        }
    }
}

/// Where everyone that lingers is in reserve, nobody would ever go: the one that has been there longest does.
fn make_room(picture: &Picture, moves: &mut Vec<Move>) {
    let reserve = || picture.slots.iter().filter(|slot| slot.old == OldRun::Reserve);
    let leaves = picture.lingering > reserve().count()
        || moves.iter().any(|one| matches!(one, Move::TakeDown(_) | Move::GiveUp(_)));
    if let Some(first) = reserve().next()
        && !leaves
    {
        moves.push(Move::GiveUp(first.slot));
    }
}

fn in_place(picture: &Picture, moves: &mut Vec<Move>) {
    let untouched = || picture.slots.iter().filter(|slot| slot.new == NewRun::None);
    let mut busy = picture.slots.iter().any(|slot| matches!(slot.new, NewRun::Launching | NewRun::Soaking));
    for slot in untouched() {
        match slot.old {
            // Nobody serves here: there is nothing to lose.
            OldRun::Gone => moves.push(Move::Launch(slot.slot)),
            OldRun::Leaving | OldRun::Reserve | OldRun::Crashed | OldRun::Draining => {}
            OldRun::Launching | OldRun::Serving => continue,
        }
        busy = true;
    }
    if !busy && let Some(slot) = untouched().next() {
        moves.push(Move::TakeDown(slot.slot));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use NewRun::{Launching, Lost, None as NotYet, Serving};

    fn picture(overlap: bool, surge: usize, unavailable: usize, slots: &[(NewRun, OldRun)]) -> Picture {
        let slots: Vec<_> = slots
            .iter()
            .enumerate()
            .map(|(n, &(new, old))| SlotPicture { slot: Slot(u32::try_from(n).unwrap()), new, old })
            .collect();
        let counted = slots
            .iter()
            .map(|slot| {
                let new = usize::from(matches!(slot.new, Launching | Serving));
                let old = matches!(slot.old, OldRun::Serving | OldRun::Launching | OldRun::Draining);
                (new + usize::from(old)).max(1)
            })
            .sum();
        let serving = slots
            .iter()
            .map(|slot| usize::from(slot.new == Serving) + usize::from(slot.old == OldRun::Serving))
            .sum();
        Picture {
            places: slots.len(),
            instances: slots.len(),
            max_surge: surge,
            max_unavailable: unavailable,
            overlap,
            reserve: false,
            at_once: false,
            max_draining: slots.len(),
            lingering: slots
                .iter()
                .filter(|slot| {
                    use OldRun::{Crashed, Draining, Leaving, Reserve};
                    matches!(slot.old, Leaving | Reserve | Crashed | Draining)
                })
                .count(),
            counted,
            serving,
            slots,
        }
    }

    #[test]
    fn cases() {
        use Move::{Launch, TakeDown};
        use OldRun::{Draining, Gone, Leaving, Serving as Old};
        let (a, b, c) = (Slot(0), Slot(1), Slot(2));
        for (name, picture, expected) in [
            ("one beside the old", picture(true, 1, 0, &[(NotYet, Old), (NotYet, Old)]), vec![Launch(a)]),
            ("the next waits", picture(true, 1, 0, &[(Launching, Old), (NotYet, Old)]), vec![]),
            ("cut-over", picture(true, 1, 0, &[(Serving, Old), (NotYet, Old)]), vec![TakeDown(a)]),
            (
                "a place is taken until the signal",
                picture(true, 1, 0, &[(Serving, Draining), (NotYet, Old)]),
                vec![],
            ),
            ("signalled", picture(true, 1, 0, &[(Serving, Leaving), (NotYet, Old)]), vec![Launch(b)]),
            ("two at a time", picture(true, 2, 0, &[(NotYet, Old); 3]), vec![Launch(a), Launch(b)]),
            ("out first", picture(true, 0, 1, &[(NotYet, Old), (NotYet, Old)]), vec![TakeDown(a)]),
            (
                "stopped app: all at once",
                picture(true, 1, 0, &[(NotYet, Gone); 3]),
                vec![Launch(a), Launch(b), Launch(c)],
            ),
            ("a lost new one holds up the rest", picture(true, 1, 0, &[(Lost, Gone), (NotYet, Old)]), vec![]),
            ("never stuck", picture(true, 0, 0, &[(NotYet, Old)]), vec![Launch(a)]),
            ("in place", picture(false, 1, 0, &[(NotYet, Old), (NotYet, Old)]), vec![TakeDown(a)]),
            ("in place: gone first", picture(false, 1, 0, &[(NotYet, Leaving), (NotYet, Old)]), vec![]),
            ("in place: then up", picture(false, 1, 0, &[(NotYet, Gone), (NotYet, Old)]), vec![Launch(a)]),
            ("in place: one by one", picture(false, 1, 0, &[(Launching, Gone), (NotYet, Old)]), vec![]),
            ("in place: next", picture(false, 1, 0, &[(Serving, Gone), (NotYet, Old)]), vec![TakeDown(b)]),
        ] {
            assert_eq!(moves(&picture), expected, "{name}");
        }
    }

    #[test]
    fn reserve_cases() {
        use Move::{GiveUp, Keep, Launch, TakeDown};
        use OldRun::{Draining, Gone, Leaving, Reserve, Serving as Old};
        let (a, b, c) = (Slot(0), Slot(1), Slot(2));
        let kept = |slots: &[(NewRun, OldRun)]| Picture { reserve: true, ..picture(true, 1, 0, slots) };
        let lean = |slots: &[(NewRun, OldRun)]| Picture { max_draining: 1, ..kept(slots) };
        let wide = |slots: &[(NewRun, OldRun)]| Picture {
            at_once: true,
            max_draining: 1,
            ..picture(true, 3, 0, slots)
        };
        for (name, picture, expected) in [
            (
                "kept at cut-over, the next goes on",
                kept(&[(Serving, Old), (NotYet, Old)]),
                vec![Keep(a), Launch(b)],
            ),
            ("kept while others wait", kept(&[(Serving, Reserve), (Launching, Old)]), vec![]),
            ("the last one is ready", kept(&[(Serving, Reserve), (Serving, Old)]), vec![Keep(b), GiveUp(a)]),
            ("and goes too", kept(&[(Serving, Leaving), (Serving, Reserve)]), vec![GiveUp(b)]),
            ("a new one was lost", kept(&[(Lost, Reserve), (NotYet, Old)]), vec![GiveUp(a)]),
            ("no room: the first is given up", lean(&[(Serving, Reserve), (NotYet, Old)]), vec![GiveUp(a)]),
            ("no room before it is gone", lean(&[(Serving, Leaving), (NotYet, Old)]), vec![]),
            ("room again", lean(&[(Serving, Gone), (NotYet, Old)]), vec![Launch(b)]),
            ("the next lingers soon", lean(&[(Launching, Old), (NotYet, Old)]), vec![]),
            ("given up one by one", lean(&[(Serving, Reserve), (Serving, Reserve)]), vec![GiveUp(a)]),
            ("one is draining", lean(&[(Serving, Draining), (Serving, Reserve)]), vec![]),
            (
                "all at once",
                wide(&[(NotYet, Old), (NotYet, Old), (NotYet, Old)]),
                vec![Launch(a), Launch(b), Launch(c)],
            ),
            (
                "on probation in place",
                picture(false, 1, 0, &[(NewRun::Soaking, Gone), (NotYet, Old)]),
                vec![],
            ),
            (
                "it has proved itself",
                picture(false, 1, 0, &[(Serving, Gone), (NotYet, Old)]),
                vec![TakeDown(b)],
            ),
        ] {
            assert_eq!(moves(&picture), expected, "{name}");
        }
    }

    const NEWS: [NewRun; 5] = [NotYet, Launching, NewRun::Soaking, Serving, Lost];
    const OLDS: [OldRun; 7] = [
        OldRun::Gone,
        OldRun::Leaving,
        OldRun::Reserve,
        OldRun::Crashed,
        OldRun::Draining,
        OldRun::Launching,
        OldRun::Serving,
    ];

    fn every_small_picture(check: impl Fn(&Picture)) {
        let all: Vec<_> = NEWS.iter().flat_map(|&new| OLDS.iter().map(move |&old| (new, old))).collect();
        for &first in &all {
            for &second in &all {
                for (surge, unavailable) in [(0, 0), (1, 0), (0, 1), (1, 1), (2, 2)] {
                    for (reserve, at_once, max_draining) in [
                        (false, false, 2),
                        (true, false, 2),
                        (true, false, 1),
                        (true, true, 1),
                        (false, false, 1),
                    ] {
                        let surge = if at_once { 2 } else { surge };
                        let picture = picture(true, surge, unavailable, &[first, second]);
                        check(&Picture { reserve, at_once, max_draining, ..picture });
                    }
                }
            }
        }
    }

    #[test]
    fn counts_hold_for_every_small_picture() {
        every_small_picture(|picture| {
            let limit = picture.instances + picture.max_surge.max(usize::from(picture.max_unavailable == 0));
            let (mut counted, mut serving) = (picture.counted, picture.serving);
            for one in moves(picture) {
                match one {
                    Move::Launch(slot) => {
                        let old = picture.slots[slot.0 as usize].old;
                        if !matches!(old, OldRun::Gone | OldRun::Leaving | OldRun::Reserve) {
                            counted += 1;
                            assert!(counted <= limit, "{picture:?}");
                        }
                    }
                    Move::TakeDown(slot) | Move::Keep(slot) => {
                        let old = picture.slots[slot.0 as usize];
                        if old.old == OldRun::Serving {
                            serving -= 1;
                            let floor = picture.instances.saturating_sub(picture.max_unavailable);
                            assert!(serving >= floor || old.new == Serving, "{picture:?}");
                        }
                        counted -= usize::from(matches!(one, Move::Keep(_)));
                    }
                    Move::GiveUp(slot) => {
                        assert_eq!(picture.slots[slot.0 as usize].old, OldRun::Reserve, "{picture:?}");
                    }
                }
            }
        });
    }

    #[test]
    fn what_is_replaced_never_piles_up() {
        every_small_picture(|picture| {
            // Whoever lingers or is about to, after these moves.
            let replacing = |slot: &&SlotPicture| {
                slot.new == Launching && matches!(slot.old, OldRun::Serving | OldRun::Launching)
            };
            let before = picture.lingering + picture.slots.iter().filter(replacing).count();
            let mut after = before;
            for one in moves(picture) {
                match one {
                    Move::Launch(slot) | Move::TakeDown(slot) | Move::Keep(slot) => {
                        let slot = picture.slots[slot.0 as usize];
                        let adds = matches!(slot.old, OldRun::Serving | OldRun::Launching);
                        after += usize::from(adds && slot.new != Serving);
                    }
                    // It lingers on, until it is gone.
                    Move::GiveUp(_) => {}
                }
            }
            assert!(after == before || after <= picture.max_draining || picture.at_once, "{picture:?}");
        });
    }

    /// Every picture in which nothing is going on has a move, unless everything is done: no reload waits for ever.
    #[test]
    fn there_is_always_a_way_on() {
        every_small_picture(|picture| {
            let waits = picture.slots.iter().any(|slot| {
                matches!(slot.new, Launching | NewRun::Soaking | Lost)
                    || matches!(
                        slot.old,
                        OldRun::Leaving | OldRun::Crashed | OldRun::Draining | OldRun::Launching
                    )
            });
            let done = picture.slots.iter().all(|slot| slot.new == Serving && slot.old == OldRun::Gone);
            assert!(waits || done || !moves(picture).is_empty(), "{picture:?}");
        });
    }
}
