//! Waiting for conditions: the only place where tests sleep, and never without a deadline.

use std::fmt::Debug;
use std::time::{Duration, Instant};

/// Between two looks.
const POLL: Duration = Duration::from_millis(10);

/// Looks until `look` gives a value; panics after `within` with what it saw last.
#[track_caller]
pub(crate) fn wait_until<T, Seen: Debug>(
    what: &str,
    within: Duration,
    mut look: impl FnMut() -> Result<T, Seen>,
) -> T {
    let deadline = Instant::now() + within;
    loop {
        // Asked before the look, so that the last look is never older than the deadline.
        let late = Instant::now() >= deadline;
        match look() {
            Ok(value) => return value,
            Err(seen) if late => panic!("not within {within:?}: {what}; last seen: {seen:?}"),
            Err(_) => pause(),
        }
    }
}

/// Looks again and again for the whole time and panics as soon as it is not as it should be.
#[track_caller]
pub(crate) fn stays<Seen: Debug>(what: &str, during: Duration, mut look: impl FnMut() -> Result<(), Seen>) {
    let end = Instant::now() + during;
    while Instant::now() < end {
        if let Err(seen) = look() {
            panic!("did not stay so for {during:?}: {what}; seen: {seen:?}");
        }
        pause();
    }
}

/// `Ok` when the two are equal, else what is there: for `wait_until` and `stays`.
pub(crate) fn equal<T: PartialEq>(seen: T, wanted: &T) -> Result<(), T> {
    if seen == *wanted { Ok(()) } else { Err(seen) }
}

#[expect(
    clippy::disallowed_methods,
    reason = "the one pause between two looks at a condition with a deadline"
)]
pub(crate) fn pause() {
    std::thread::sleep(POLL);
}

/// A client that thinks before its next request.
#[expect(clippy::disallowed_methods, reason = "load with pauses is the point; nothing is waited for")]
pub(crate) fn pause_for(time: Duration) {
    if !time.is_zero() {
        std::thread::sleep(time);
    }
}
