//! `pm daemon`: prepares the home, makes sure that it is the only one, and becomes the keeper.

use std::ffi::CString;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::process::ExitCode;

use super::foreground;
use super::inherit::{self, Found, Other};
use crate::cli::Left;
use crate::keeper::link::Inventory;
use crate::keeper::run::{self, Config, Resumed};
use crate::store::paths::Home;
use crate::sys::cgroup;
use crate::sys::cgroup::root::{ROOT_VARIABLE, Root};
use crate::sys::lock::{self, LockError};
use crate::sys::notify::{self, Notifier};

/// Exit codes (design: command line).
const FAILED: u8 = 1;
const USAGE: u8 = 2;
const BUSY: u8 = 5;

/// A daemon that dies of a lack of memory takes nothing along, but it is the last one that should.
const OOM_SCORE_ADJ: i32 = -900;

/// The variable in which a unit says what apps get, when it had to lower the score for the daemon itself.
const APPS_OOM_SCORE_ADJ: &str = "PM_APPS_OOM_SCORE_ADJ";

/// What the supervisor gets to know of how the daemon was started.
pub(super) const ATTENDED: &str = "--attended";

/// Runs the keeper of this home until the daemon is told to end. `detached`: a command has started it, and nobody
/// watches over it. `left`: an upgrade has put this program in the place of another one, or `pm run` has, or a supervisor
/// without a keeper has started it.
pub fn keep(home: &Home, detached: bool, left: Left) -> ExitCode {
    // Before any other descriptor is opened: what this process had is told apart by not being closed on exec.
    let resumed = match left.resume.map(Resumed::from_descriptor).transpose() {
        Ok(resumed) => resumed,
        Err(reason) => {
            say(&format!("error: {reason}"));
            return ExitCode::from(FAILED);
        }
    };
    let offered = match left.heir.map(inherit::left_at).transpose() {
        Ok(offered) => offered,
        Err(reason) => {
            say(&format!("error: cannot take over: {reason}"));
            return ExitCode::from(FAILED);
        }
    };
    let handed = match left.lock.map(|number| lock::inherit(&home.lock(), number)).transpose() {
        Ok(handed) => handed,
        Err(error) => return fail(FAILED, &error),
    };
    match home.create() {
        Ok(()) => {}
        // Whoever has everything cannot choose.
        Err(error) if offered.is_some() => say(&format!("warning: {error}")),
        Err(error) => return fail(USAGE, &error),
    }
    // Before there is a child that would have to come along.
    let named = std::env::var_os(ROOT_VARIABLE).filter(|value| !value.is_empty()).map(PathBuf::from);
    match Root::claim(named.as_deref()) {
        Ok(_) => {}
        // After an upgrade there are apps, which have theirs.
        Err(error) if resumed.is_some() || offered.is_some() => say(&format!("warning: {error}")),
        Err(error) => return fail(USAGE, &error),
    }
    let manager = std::env::var_os("NOTIFY_SOCKET").filter(|value| !value.is_empty());
    let mut lock = handed;
    let mut estate = None;
    if resumed.is_none() && lock.is_none() {
        let taken = match offered {
            Some(offered) => take_over(home, offered, manager.is_some()),
            None => take_lock(home, manager.is_some()),
        };
        match taken {
            Ok((file, left)) => (lock, estate) = (Some(file), left),
            Err(code) => return code,
        }
    }
    // Releases come and go; the daemon keeps none of their directories busy.
    if let Err(error) = std::env::set_current_dir("/") {
        say(&format!("warning: cannot change to /: {error}"));
    }
    let args = [c"pm".to_owned(), c"supervisor".to_owned(), c"--home".to_owned()];
    let Ok(dir) = CString::new(home.dir().as_os_str().as_bytes()) else { return ExitCode::from(USAGE) };
    let attended = (!detached).then(|| CString::new(ATTENDED).unwrap_or_default());
    let own = [c"pm".to_owned(), c"daemon".to_owned(), c"--home".to_owned(), dir.clone()];
    let mut config = Config::new(args.into_iter().chain([dir]).chain(attended).collect());
    config.own_args = own.into_iter().chain(detached.then(|| c"--detached".to_owned())).collect();
    config.held.extend(lock.map(|lock| (LOCK.to_owned(), lock.into())));
    config.resumed = resumed;
    config.oom_score_adj = Some(OOM_SCORE_ADJ);
    config.children_oom_score_adj =
        std::env::var(APPS_OOM_SCORE_ADJ).ok().and_then(|value| value.parse().ok());
    config.estate = estate;
    if let Some(address) = manager {
        match Notifier::at(&address) {
            Ok(notifier) => config.notifier = Some(notifier),
            Err(error) => say(&format!("warning: NOTIFY_SOCKET {}: {error}", address.display())),
        }
        let text = |name: &str| std::env::var(name).ok();
        let (usec, watched) = (text("WATCHDOG_USEC"), text("WATCHDOG_PID"));
        config.watchdog = notify::watchdog(usec.as_deref(), watched.as_deref(), std::process::id());
    }
    let foreground = foreground::settings();
    config.foreground = foreground.is_some();
    if config.foreground {
        run::speak_through(foreground::say);
    }
    let outcome = run::run(config);
    if foreground.as_ref().is_some_and(|settings| settings.temporary_home) {
        foreground::remove_home(home);
    }
    match outcome {
        Ok(Some(status)) if foreground.is_some() => {
            ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(FAILED))
        }
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => fail(FAILED, &error),
    }
}

/// The keeper's name of the lock.
const LOCK: &str = "lock";

/// The lock, and what an earlier keeper left, if there was one. A keeper that is there leaves when `watched`: a
/// service manager has started us in its place.
fn take_lock(home: &Home, watched: bool) -> Result<(File, Option<Inventory>), ExitCode> {
    let failed = |error: LockError| fail(USAGE, &error);
    let holder = match lock::acquire(&home.lock()) {
        Ok(lock) => return Ok((lock, None)),
        Err(LockError::Held { pid, .. }) => pid,
        Err(error) => return Err(failed(error)),
    };
    let other = if watched { Other::Leaves } else { Other::Stays };
    match inherit::inherit(home, holder, other).map_err(failed)? {
        Found::Free(lock) => Ok((lock, None)),
        Found::Taken { pid } => {
            let by = pid.map_or_else(|| "another process".to_owned(), |pid| format!("pid {pid}"));
            say(&format!("error: a daemon is running already for {} ({by})", home.dir().display()));
            Err(ExitCode::from(BUSY))
        }
        Found::Everything(estate) => take_over(home, *estate, watched),
    }
}

/// The lock is among what an earlier keeper left.
fn take_over(
    home: &Home,
    mut estate: Inventory,
    watched: bool,
) -> Result<(File, Option<Inventory>), ExitCode> {
    let index = estate.held.iter().position(|(name, _)| name == LOCK);
    let Some(index) = index else {
        say("error: the supervisor has no lock to hand over");
        return Err(ExitCode::from(FAILED));
    };
    let mut lock = File::from(estate.held.swap_remove(index).1);
    if let Err(error) = lock::claim(&mut lock) {
        say(&format!("warning: cannot write {}: {error}", home.lock().display()));
    }
    say(&format!("pm daemon: takes over {} processes", estate.children.len()));
    if watched {
        bring_along(&estate);
    }
    Ok((lock, Some(estate)))
}

/// Apps of a daemon that a command had started are in the control group of that session, and end with it where
/// logind is told so. They belong to the unit.
fn bring_along(estate: &Inventory) {
    let pids: Vec<i32> = estate.children.iter().map(|child| child.pid.cast_signed()).collect();
    match cgroup::join(&pids) {
        Ok((_, 0)) => {}
        Ok((moved, failed)) => say(&format!(
            "warning: {failed} of {moved} processes stay in the session that started them, and end with it if \
             logind.conf has KillUserProcesses=yes; a restart of their app brings them here"
        )),
        Err(error) => say(&format!("warning: cannot move what was taken over to this unit: {error}")),
    }
}

fn fail(code: u8, error: &dyn std::error::Error) -> ExitCode {
    let cause = error.source().map(|source| format!(": {source}")).unwrap_or_default();
    say(&format!("error: {error}{cause}"));
    ExitCode::from(code)
}

/// The keeper has no logger: it would be the largest part of it.
pub(super) fn say(text: &str) {
    foreground::say(text);
}
