//! What a unit's ExecStop and ExecStopPost run.
//!
//! ```text
//! systemctl restart   stop: the keeper leaves, apps and supervisor stay     cleanup: room for the next main process
//! systemctl stop      stop: nothing; systemd's SIGTERM ends daemon and apps   cleanup: what is left is ended
//! the daemon crashes  (not run)                                             cleanup: room for the next main process
//! ```

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use crate::cli::Context;
use crate::cli::args::{UnitHook, UnitMoment};
use crate::cli::connect::pause;
use crate::cli::error::CliError;
use crate::cli::systemctl::{Instance, version};
use crate::cli::unit::KNOWS_SUBGROUPS;
use crate::sys::cgroup::root::root_of_unit;
use crate::sys::notify::LEAVE_SIGNAL;
use crate::sys::poll::{self, Interest};
use crate::sys::{cgroup, pidfd};

/// The keeper may wait for starts that are under way.
const LEAVE_PATIENCE: Duration = Duration::from_secs(12);

/// What is left of apps whose daemon could not stop them gets SIGTERM, and this long.
const GRACE: Duration = Duration::from_secs(2);

/// Something that starts processes as fast as they are ended has lost by then.
const ROUNDS: u32 = 50;

pub(super) fn run(hook: &UnitHook, context: &mut Context) -> Result<(), CliError> {
    let instance = if hook.user { Instance::User } else { Instance::System };
    let job = instance.job(&hook.unit);
    match hook.moment {
        // Where nobody tells, it is a stop: apps that run on without their daemon would be worse than a downtime.
        UnitMoment::Stop if job.as_deref().is_some_and(|job| job.contains("restart")) => leave(context),
        UnitMoment::Cleanup if job.as_deref() == Some("stop") => clean_up(&hook.unit, context),
        UnitMoment::Cleanup => {
            make_room(&hook.unit);
            Ok(())
        }
        UnitMoment::Stop => Ok(()),
    }
}

/// systemd is about to put the next main process into the unit's own group. The kernel refuses that while controllers are
/// enabled for the groups of the apps below it; the next daemon enables them again, with every limit.
fn make_room(unit: &str) {
    // Run by hand there is no unit, and nothing is touched.
    if std::env::var_os("SERVICE_RESULT").is_none() {
        return;
    }
    if version().is_none_or(|version| version >= KNOWS_SUBGROUPS) {
        return;
    }
    if let Ok(Some(root)) = root_of_unit(unit) {
        // Where nothing is enabled, nothing is in the way; where this fails, the next start says so.
        let _ = root.disable_all();
    }
}

fn leave(context: &mut Context) -> Result<(), CliError> {
    let main = std::env::var("MAINPID").ok().and_then(|pid| pid.parse().ok());
    // A main process that is gone has left already.
    let Some(keeper) = main.and_then(|pid| pidfd::open(pid).ok()) else { return Ok(()) };
    if pidfd::send_signal(&keeper, LEAVE_SIGNAL).is_err() {
        return Ok(());
    }
    if ended(&keeper, LEAVE_PATIENCE) {
        context.terminal.say("The apps run on; the next daemon takes them over.")?;
    }
    Ok(())
}

fn clean_up(unit: &str, context: &mut Context) -> Result<(), CliError> {
    // Run by hand, or in a shell, there is no unit, and nothing is touched.
    if std::env::var_os("SERVICE_RESULT").is_none() {
        return Ok(());
    }
    let Ok(Some(group)) = cgroup::of_unit(unit) else { return Ok(()) };
    let own = std::process::id();
    let members = || -> Vec<(u32, OwnedFd)> {
        let pids = cgroup::members(&group).unwrap_or_default().into_iter().map(i32::unsigned_abs);
        pids.filter(|&pid| pid != own).filter_map(|pid| Some((pid, pidfd::open(pid).ok()?))).collect()
    };
    let left = members();
    if left.is_empty() {
        return Ok(());
    }
    context.terminal.say(&format!("{} processes are left after the stop, and are ended.", left.len()))?;
    for (pid, process) in &left {
        // A supervisor would start the next keeper.
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        let signal = if name.trim() == "pm supervisor" { KILL } else { TERM };
        let _ = pidfd::send_signal(process, signal);
    }
    let deadline = Instant::now() + GRACE;
    for (_, process) in &left {
        ended(process, deadline.saturating_duration_since(Instant::now()));
    }
    for _ in 0..ROUNDS {
        let left = members();
        if left.is_empty() {
            break;
        }
        for (_, process) in &left {
            let _ = pidfd::send_signal(process, KILL);
        }
        pause(Duration::from_millis(20));
    }
    Ok(())
}

const TERM: i32 = nix::sys::signal::Signal::SIGTERM as i32;

const KILL: i32 = nix::sys::signal::Signal::SIGKILL as i32;

fn ended(process: &OwnedFd, within: Duration) -> bool {
    poll::wait(&[(process.as_fd(), Interest::Read)], Some(within)).is_ok_and(|ready| ready[0])
}
