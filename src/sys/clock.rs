//! The two clocks: one that only runs forward, one that people read.

use std::time::{SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};

pub use crate::model::moment::Moment;

/// Now, on CLOCK_MONOTONIC: does not jump when the wall clock is set, stands still while the machine is suspended.
#[must_use]
pub fn now() -> Moment {
    // clock_gettime(2) fails for unknown clocks only, and this one is as old as Linux 2.6.
    let Ok(time) = clock_gettime(ClockId::CLOCK_MONOTONIC) else { return Moment::default() };
    let seconds = u64::try_from(time.tv_sec()).unwrap_or_default();
    let nanos = u64::try_from(time.tv_nsec()).unwrap_or_default();
    Moment::from_nanos(seconds.saturating_mul(1_000_000_000).saturating_add(nanos))
}

/// Milliseconds since 1970, UTC: for display and log stamps only. Zero for a clock set before 1970.
#[must_use]
pub fn wall_millis() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_run_forward_and_are_plausible() {
        let (first, second) = (now(), now());
        assert!(first.nanos() > 0 && second >= first);
        assert!(wall_millis() > 1_700_000_000_000, "later than 2023");
    }
}
