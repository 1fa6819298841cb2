//! Whether the keeper answers. Nothing can be started without it, and nothing that ends is heard of, so whoever waits
//! for such a thing is told when it has stopped answering, instead of waiting for ever.
//!
//! It is asked only while somebody waits. Decides when; sends nothing.

use std::time::Duration;

use crate::model::moment::Moment;

/// While somebody waits, the keeper is asked this often.
const EVERY: Duration = Duration::from_secs(1);

/// A keeper that has not answered for this long hangs. It answers within microseconds of getting the processor; together
/// with [`EVERY`] a command ends within five seconds.
const PATIENCE: Duration = Duration::from_millis(3000);

/// See the module.
#[derive(Debug, Default)]
pub struct Silence {
    /// The question that is open, and since when.
    open: Option<(u64, Moment)>,
    answered: Option<Moment>,
    last: u64,
}

/// What follows from the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// Nothing.
    Nothing,
    /// The keeper is to be asked, with this number.
    Ask(u64),
    /// It hangs: whoever waits is to be told.
    Tell,
}

impl Silence {
    /// What is due, while somebody waits.
    pub fn due(&mut self, now: Moment) -> Due {
        match self.open {
            Some((_, since)) if now.since(since) >= PATIENCE => Due::Tell,
            Some(_) => Due::Nothing,
            None if self.answered.is_some_and(|at| now.since(at) < EVERY) => Due::Nothing,
            None => {
                self.last += 1;
                self.open = Some((self.last, now));
                Due::Ask(self.last)
            }
        }
    }

    /// When to look again, while somebody waits.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Moment> {
        match (self.open, self.answered) {
            (Some((_, since)), _) => Some(since + PATIENCE),
            (None, Some(at)) => Some(at + EVERY),
            (None, None) => None,
        }
    }

    /// The keeper has answered.
    pub fn answered(&mut self, now: Moment, request: u64) {
        if self.open.take_if(|(open, _)| *open == request).is_some() {
            self.answered = Some(now);
        }
    }

    /// Whether it has answered within the last second.
    #[must_use]
    pub fn answered_lately(&self, now: Moment) -> bool {
        self.open.is_none() && self.answered.is_some_and(|at| now.since(at) < EVERY)
    }

    /// Whether it is known to hang.
    #[must_use]
    pub fn hangs(&self, now: Moment) -> bool {
        self.open.is_some_and(|(_, since)| now.since(since) >= PATIENCE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Moment {
        Moment::default() + Duration::from_millis(millis)
    }

    #[test]
    fn a_keeper_that_answers_is_asked_once_a_second() {
        let mut silence = Silence::default();
        assert_eq!(silence.due(at(0)), Due::Ask(1));
        assert_eq!(silence.due(at(1)), Due::Nothing);
        silence.answered(at(2), 1);
        assert_eq!(silence.due(at(500)), Due::Nothing);
        assert_eq!(silence.next_deadline(), Some(at(1002)));
        assert_eq!(silence.due(at(1002)), Due::Ask(2));
        assert!(!silence.hangs(at(4000)));
    }

    #[test]
    fn a_keeper_that_does_not_answer_hangs_until_it_does() {
        let mut silence = Silence::default();
        assert_eq!(silence.due(at(0)), Due::Ask(1));
        assert_eq!(silence.due(at(2999)), Due::Nothing);
        assert_eq!(silence.due(at(3000)), Due::Tell);
        assert!(silence.hangs(at(9000)));
        silence.answered(at(9000), 7);
        assert!(silence.hangs(at(9000)), "an answer to something else");
        silence.answered(at(9000), 1);
        assert!(!silence.hangs(at(9000)));
        assert_eq!(silence.due(at(10_000)), Due::Ask(2));
    }
}
