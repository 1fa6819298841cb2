//! `pm daemon`: prepares the home, makes sure that it is the only one, and becomes the keeper.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::process::ExitCode;

use crate::keeper::run::{self, Config};
use crate::store::paths::Home;
use crate::sys::lock::{self, LockError};

/// Exit codes (design: command line).
const FAILED: u8 = 1;
const USAGE: u8 = 2;
const BUSY: u8 = 5;

/// A daemon that dies of a lack of memory takes nothing along, but it is the last one that should.
const OOM_SCORE_ADJ: i32 = -900;

/// Runs the keeper of this home until the daemon is told to end.
pub fn keep(home: &Home) -> ExitCode {
    if let Err(error) = home.create() {
        return fail(USAGE, &error);
    }
    let lock = match lock::acquire(&home.lock()) {
        Ok(lock) => lock,
        Err(LockError::Held { pid, .. }) => {
            let by = pid.map_or_else(|| "another process".to_owned(), |pid| format!("pid {pid}"));
            say(&format!("error: a daemon is running already for {} ({by})", home.dir().display()));
            return ExitCode::from(BUSY);
        }
        Err(error) => return fail(USAGE, &error),
    };
    // Releases come and go; the daemon keeps none of their directories busy.
    if let Err(error) = std::env::set_current_dir("/") {
        say(&format!("warning: cannot change to /: {error}"));
    }
    let args = [c"pm".to_owned(), c"supervisor".to_owned(), c"--home".to_owned()];
    let Ok(dir) = CString::new(home.dir().as_os_str().as_bytes()) else { return ExitCode::from(USAGE) };
    let mut config = Config::new(args.into_iter().chain([dir]).collect());
    config.held.push(("lock".to_owned(), lock.into()));
    config.oom_score_adj = Some(OOM_SCORE_ADJ);
    match run::run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(FAILED, &error),
    }
}

fn fail(code: u8, error: &dyn std::error::Error) -> ExitCode {
    let cause = error.source().map(|source| format!(": {source}")).unwrap_or_default();
    say(&format!("error: {error}{cause}"));
    ExitCode::from(code)
}

/// The keeper has no logger: it would be the largest part of it.
#[expect(clippy::print_stderr, reason = "the daemon's stderr is its log")]
fn say(text: &str) {
    eprintln!("{text}");
}
