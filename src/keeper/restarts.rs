//! When a supervisor that has died gets its successor, and whether that one may trust the state blob. No clock: it is
//! told how long they lived.

use std::time::Duration;

/// When the next supervisor is started.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Restarts {
    deaths: u32,
    /// How many in a row lived shorter than [`Restarts::QUICK`].
    quick: u32,
    delay: Duration,
}

impl Restarts {
    const QUICK: Duration = Duration::from_secs(2);
    const QUICK_IN_A_ROW: u32 = 5;
    const FIRST_DELAY: Duration = Duration::from_millis(100);
    /// Well below what a command waits for an answer.
    const LONGEST_DELAY: Duration = Duration::from_secs(1);

    /// Goes on counting in another program.
    pub(super) fn resume(&mut self, deaths: u32) {
        self.deaths = deaths;
    }

    /// How many supervisors have ended.
    pub(super) fn deaths(&self) -> u32 {
        self.deaths
    }

    /// How long to wait before the successor of one that lived so long.
    pub(super) fn after_death(&mut self, lived: Duration) -> Duration {
        self.deaths = self.deaths.saturating_add(1);
        self.quick = if lived < Self::QUICK { self.quick.saturating_add(1) } else { 0 };
        if lived >= Self::QUICK {
            self.delay = Duration::ZERO;
        }
        let delay = self.delay;
        self.delay = (delay * 2).clamp(Self::FIRST_DELAY, Self::LONGEST_DELAY);
        delay
    }

    /// Whether the state blob is suspected.
    pub(super) fn without_blob(&self) -> bool {
        self.quick >= Self::QUICK_IN_A_ROW
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_restart_is_immediate_and_the_next_ones_back_off() {
        let mut restarts = Restarts::default();
        let delays: Vec<u128> =
            (0..9).map(|_| restarts.after_death(Duration::from_secs(1)).as_millis()).collect();
        assert_eq!(delays, [0, 100, 200, 400, 800, 1000, 1000, 1000, 1000]);
        assert_eq!(
            restarts.after_death(Duration::from_secs(2)),
            Duration::ZERO,
            "a life that is not quick forgives"
        );
        assert_eq!(restarts.deaths, 10);
    }

    #[test]
    fn quick_deaths_in_a_row_cost_the_blob() {
        let mut restarts = Restarts::default();
        let mut after = |millis| {
            restarts.after_death(Duration::from_millis(millis));
            restarts.without_blob()
        };
        assert_eq!([1, 1, 1, 1].map(&mut after), [false; 4]);
        assert_eq!([2000, 1, 1, 1, 1].map(&mut after), [false; 5]);
        assert_eq!([1999, 0].map(&mut after), [true; 2]);
        assert!(!after(2000));
    }
}
