//! What follows the end of a run that nobody asked for.
//!
//! Pure arithmetic on counters: nothing is spawned, slept or logged here. Never decides about runs that were stopped
//! on purpose.

use std::time::Duration;

use crate::model::exit::ExitReason;
use crate::model::id::InstanceId;
use crate::model::moment::Moment;
use crate::model::spec::RestartRules;

/// The longest pause between two tries.
pub(super) const BACKOFF_MAX: Duration = Duration::from_secs(15);

/// Failures in a row, as two counters: they answer different questions and are reset by different spans of health.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Streak {
    /// Exits in a row that each came before `min_uptime`: `errored` is decided by it.
    pub(super) unstable: u32,
    /// Exits since the start or since `backoff_reset` of health: the pause is decided by it.
    pub(super) failures: u32,
}

/// What follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Start the successor at this moment.
    StartAt(Moment),
    /// Too many quick exits: `errored`.
    GiveUp,
    /// The app ended for good, as its rules say: `stopped`.
    Ended,
}

/// Says what follows the end of the run `id`, which lasted for `uptime`, and how the counters stand then.
pub(super) fn after_exit(
    now: Moment,
    id: &InstanceId,
    uptime: Duration,
    reason: &ExitReason,
    rules: &RestartRules,
    before: Streak,
) -> (Next, Streak) {
    let mut streak = before;
    // A run that never got ready is a failed start, however long it was given.
    let quick =
        uptime < rules.min_uptime || matches!(reason, ExitReason::NotReady | ExitReason::NotStarted(_));
    streak.unstable = if quick { before.unstable.saturating_add(1) } else { 0 };
    if uptime >= rules.backoff_reset && !matches!(reason, ExitReason::NotReady) {
        streak.failures = 0;
    }
    if !rules.autorestart || reason.code().is_some_and(|code| rules.stop_exit_codes.contains(&code)) {
        return (Next::Ended, streak);
    }
    if quick && streak.unstable >= rules.max_restarts {
        return (Next::GiveUp, streak);
    }
    let delay = delay(id, streak.failures, rules);
    streak.failures = streak.failures.saturating_add(1);
    (Next::StartAt(now + delay), streak)
}

/// The pause before the successor of a run with so many failures before it.
fn delay(id: &InstanceId, failures: u32, rules: &RestartRules) -> Duration {
    if let Some(fixed) = rules.restart_delay {
        return fixed;
    }
    let Some(steps) = failures.checked_sub(1) else { return Duration::ZERO };
    let mut pause = rules.backoff_base.min(BACKOFF_MAX);
    for _ in 0..steps {
        if pause >= BACKOFF_MAX || pause.is_zero() {
            break;
        }
        pause = (pause * 3 / 2).min(BACKOFF_MAX);
    }
    // ± 10 %, so that instances that fell together do not rise together. A hash and not a random number: the same
    // history gives the same times, in the simulation and in a bug report.
    pause * (900 + hash(id, failures) % 201) / 1000
}

/// FNV-1a over the identity of a run and its failures.
fn hash(id: &InstanceId, failures: u32) -> u32 {
    let numbers = [u64::from(id.slot.0), id.generation.0, u64::from(failures)];
    let bytes = id.app.as_str().bytes().chain(numbers.into_iter().flat_map(u64::to_le_bytes));
    bytes.fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::id::{AppName, Generation, Slot};
    use crate::model::signal::Signal;

    const NOW: Moment = Moment::from_nanos(1_000_000_000);

    fn rules() -> RestartRules {
        RestartRules { stop_exit_codes: vec![0, 9], ..RestartRules::default() }
    }

    fn id(generation: u64) -> InstanceId {
        InstanceId { app: AppName::new("api").unwrap(), slot: Slot(0), generation: Generation(generation) }
    }

    fn pause(next: Next) -> u128 {
        match next {
            Next::StartAt(at) => at.since(NOW).as_millis(),
            Next::GiveUp | Next::Ended => panic!("{next:?}"),
        }
    }

    #[test]
    fn pauses_grow_by_half_up_to_fifteen_seconds() {
        let mut streak = Streak::default();
        for (n, expected) in
            [0_u128, 100, 150, 225, 337, 506, 759, 1139, 1708, 2562, 3844, 5766, 8649, 12974, 15000]
                .into_iter()
                .enumerate()
        {
            let uptime = Duration::from_secs(2);
            let (next, after) =
                after_exit(NOW, &id(n as u64), uptime, &ExitReason::Code(1), &rules(), streak);
            let got = pause(next);
            assert!(
                got >= expected * 9 / 10 - u128::from(expected > 0) && got <= expected * 11 / 10 + 1,
                "{n}: {got}"
            );
            streak = after;
        }
        let (next, _) =
            after_exit(NOW, &id(99), Duration::from_secs(30), &ExitReason::Code(1), &rules(), streak);
        assert_eq!(pause(next), 0, "30 s of health reset the backoff");
    }

    #[test]
    fn sixteen_quick_exits_in_a_row_are_enough() {
        let mut streak = Streak::default();
        for n in 1..=15 {
            let (next, after) =
                after_exit(NOW, &id(n), Duration::from_millis(10), &ExitReason::Code(1), &rules(), streak);
            assert!(matches!(next, Next::StartAt(_)), "{n}");
            streak = after;
        }
        let quick = after_exit(NOW, &id(16), Duration::ZERO, &ExitReason::Code(1), &rules(), streak).0;
        assert_eq!(quick, Next::GiveUp);
        let (slow, after) =
            after_exit(NOW, &id(16), Duration::from_secs(1), &ExitReason::Code(1), &rules(), streak);
        assert!(matches!(slow, Next::StartAt(_)));
        assert_eq!(after.unstable, 0);
    }

    #[test]
    fn stop_codes_match_codes_and_never_signals() {
        let after = |reason: ExitReason, rules: &RestartRules| {
            after_exit(NOW, &id(1), Duration::from_secs(5), &reason, rules, Streak::default()).0
        };
        assert_eq!(after(ExitReason::Code(0), &rules()), Next::Ended);
        assert_eq!(after(ExitReason::Signal(Signal::KILL), &rules()), Next::StartAt(NOW));
        assert_eq!(after(ExitReason::Oom, &rules()), Next::StartAt(NOW));
        let once = RestartRules { autorestart: false, ..rules() };
        assert_eq!(after(ExitReason::Signal(Signal::KILL), &once), Next::Ended);
        let fixed = RestartRules { restart_delay: Some(Duration::from_secs(3)), ..rules() };
        assert_eq!(after(ExitReason::Code(1), &fixed), Next::StartAt(NOW + Duration::from_secs(3)));
    }

    #[test]
    fn a_run_that_never_got_ready_is_a_failed_start() {
        let (next, streak) = after_exit(
            NOW,
            &id(1),
            Duration::from_secs(40),
            &ExitReason::NotReady,
            &rules(),
            Streak { unstable: 15, failures: 15 },
        );
        assert_eq!((next, streak.unstable), (Next::GiveUp, 16));
    }
}
