//! Why a daemon does not answer, as far as /proc tells, and what would help. Looks, and does nothing.

use std::fs;
use std::path::Path;

use crate::sys::lock;

/// A process of the daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Part {
    /// "daemon" or "supervisor".
    what: &'static str,
    pid: u32,
    /// As in /proc/PID/stat: `T` is stopped, `D` waits for a device.
    state: char,
}

/// What is wrong, and what would help; `None` when nothing can be seen.
pub(super) fn why(home: &Path) -> Option<(String, String)> {
    let keeper = part("daemon", lock::holder(&home.join("pm.lock"))?)?;
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", keeper.pid)).unwrap_or_default();
    let is_supervisor = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).nth(1) == Some(b"supervisor")
    };
    let pids = children.split_whitespace().filter_map(|pid| pid.parse().ok());
    let supervisor = pids.into_iter().find(is_supervisor).and_then(|pid| part("supervisor", pid));
    Some(told(&keeper, supervisor.as_ref()))
}

fn part(what: &'static str, pid: u32) -> Option<Part> {
    let line = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold spaces and parentheses.
    let state = line.rsplit_once(')')?.1.trim_start().chars().next()?;
    Some(Part { what, pid, state })
}

fn told(keeper: &Part, supervisor: Option<&Part>) -> (String, String) {
    let parts = [Some(keeper), supervisor];
    let stopped = parts.into_iter().flatten().find(|part| matches!(part.state, 'T' | 't'));
    if let Some(Part { what, pid, .. }) = stopped {
        return (
            format!("its {what} (pid {pid}) is stopped, as by SIGSTOP or a debugger"),
            format!(
                "`kill -CONT {pid}` lets it go on; `kill -9 {pid}` has it replaced. The apps run on either way."
            ),
        );
    }
    let Some(Part { pid, state, .. }) = supervisor else {
        return (
            format!("the daemon (pid {}) has no supervisor at the moment", keeper.pid),
            "It starts the next one by itself; pm.log in the home says what the last one ended of."
                .to_owned(),
        );
    };
    let how = match state {
        'D' => "waits for a device, as a disk or a network file system that does not answer",
        'R' => "is busy, or gets no processor time",
        _ => "said nothing for 4 seconds",
    };
    (
        format!("its supervisor (pid {pid}) {how}"),
        format!("Try again; if that does not help, `kill -9 {pid}` has it replaced. The apps run on."),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_stopped_is_named_with_what_helps() {
        let part = |what, pid, state| Part { what, pid, state };
        let (keeper, supervisor) = (part("daemon", 10, 'S'), part("supervisor", 11, 'T'));
        let (cause, hint) = told(&keeper, Some(&supervisor));
        assert!(cause.contains("supervisor (pid 11) is stopped"), "{cause}");
        assert!(hint.contains("kill -CONT 11") && hint.contains("kill -9 11"), "{hint}");
        let (cause, _) = told(&part("daemon", 10, 'T'), Some(&supervisor));
        assert!(cause.contains("daemon (pid 10) is stopped"), "nothing helps before that: {cause}");
        let (cause, _) = told(&keeper, Some(&part("supervisor", 11, 'D')));
        assert!(cause.contains("waits for a device"), "{cause}");
        let (cause, hint) = told(&keeper, None);
        assert!(cause.contains("no supervisor") && hint.contains("pm.log"), "{cause} {hint}");
    }

    #[test]
    fn a_home_without_a_daemon_tells_nothing() {
        assert_eq!(why(Path::new("/nonexistent")), None);
    }
}
