//! Which slot of a reload moves next.
//!
//! A picture of the app goes in, moves come out. The two promises, as counts that hold at every instant:
//! runs that launch or serve, or have not got their signal yet, are at most `instances + max_surge`; and no serving run
//! is taken away that would leave fewer than `instances − max_unavailable`, unless its successor serves already. What
//! becomes of a failure is decided in `operation`.

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
    /// Every run of the app that counts towards the surge, slots outside the reload included. A slot that is meant to run
    /// has a place also while it is empty: its next run may be started at any moment.
    pub(super) counted: usize,
    /// Every run in rotation, slots outside the reload included.
    pub(super) serving: usize,
    /// The slots of the reload, ascending.
    pub(super) slots: Vec<SlotPicture>,
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
}

/// The moves that are allowed now. Each is allowed together with those before it.
pub(super) fn moves(picture: &Picture) -> Vec<Move> {
    let mut moves = Vec::new();
    // Who has been replaced goes, whatever else waits: its successor serves.
    for slot in &picture.slots {
        if slot.new == NewRun::Serving && matches!(slot.old, OldRun::Serving | OldRun::Launching) {
            moves.push(Move::TakeDown(slot.slot));
        }
    }
    // A new release that does not keep up is not spread any further.
    if picture.slots.iter().any(|slot| slot.new == NewRun::Lost) {
        return moves;
    }
    if picture.overlap {
        side_by_side(picture, &mut moves);
    } else {
        in_place(picture, &mut moves);
    }
    moves
}

fn side_by_side(picture: &Picture, moves: &mut Vec<Move>) {
    // With neither surge nor unavailability nothing could ever move.
    let surge = if picture.max_unavailable == 0 { picture.max_surge.max(1) } else { picture.max_surge };
    let limit = picture.places + surge;
    let least = picture.instances.saturating_sub(picture.max_unavailable);
    let (mut counted, mut serving) = (picture.counted, picture.serving);
    // The end of those that were replaced above is not counted as a place yet: they count until their signal. As
    // serving they do not count any more.
    serving -= moves.len().min(serving);
    for slot in picture.slots.iter().filter(|slot| slot.new == NewRun::None && slot.old != OldRun::Crashed) {
        if matches!(slot.old, OldRun::Gone | OldRun::Leaving) {
            moves.push(Move::Launch(slot.slot));
            continue;
        }
        if counted < limit {
            moves.push(Move::Launch(slot.slot));
            counted += 1;
            continue;
        }
        match slot.old {
            OldRun::Launching => moves.push(Move::TakeDown(slot.slot)),
            OldRun::Serving if serving > least => {
                moves.push(Move::TakeDown(slot.slot));
                serving -= 1;
            }
            // Slots behind it may be empty, and have their own places.
            OldRun::Serving | OldRun::Gone | OldRun::Leaving | OldRun::Crashed | OldRun::Draining => {}
        }
    }
}

fn in_place(picture: &Picture, moves: &mut Vec<Move>) {
    let untouched = || picture.slots.iter().filter(|slot| slot.new == NewRun::None);
    let mut busy = picture.slots.iter().any(|slot| slot.new == NewRun::Launching);
    for slot in untouched() {
        match slot.old {
            // Nobody serves here: there is nothing to lose.
            OldRun::Gone => moves.push(Move::Launch(slot.slot)),
            OldRun::Leaving | OldRun::Crashed | OldRun::Draining => {}
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
    fn counts_hold_for_every_small_picture() {
        let news = [NotYet, Launching, Serving, Lost];
        let olds = [
            OldRun::Gone,
            OldRun::Leaving,
            OldRun::Crashed,
            OldRun::Draining,
            OldRun::Launching,
            OldRun::Serving,
        ];
        let all: Vec<_> = news.iter().flat_map(|&new| olds.iter().map(move |&old| (new, old))).collect();
        for &first in &all {
            for &second in &all {
                for (surge, unavailable) in [(0, 0), (1, 0), (0, 1), (1, 1), (2, 2)] {
                    let picture = picture(true, surge, unavailable, &[first, second]);
                    let limit = picture.instances + surge.max(usize::from(unavailable == 0));
                    let (mut counted, mut serving) = (picture.counted, picture.serving);
                    for one in moves(&picture) {
                        match one {
                            Move::Launch(slot) => {
                                let old = picture.slots[slot.0 as usize].old;
                                if !matches!(old, OldRun::Gone | OldRun::Leaving) {
                                    counted += 1;
                                    assert!(counted <= limit, "{picture:?}");
                                }
                            }
                            Move::TakeDown(slot) => {
                                let old = picture.slots[slot.0 as usize];
                                if old.old == OldRun::Serving {
                                    serving -= 1;
                                    let floor = picture.instances - unavailable.min(picture.instances);
                                    assert!(serving >= floor || old.new == Serving, "{picture:?}");
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}
