//! `pm supervisor`: what the keeper starts.

use std::ffi::OsString;
use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;

use super::foreground;
use super::keep::ATTENDED;
use crate::ipc::server;
use crate::store::paths::Home;
use crate::supervisor::run;
use crate::supervisor::takeover::Attended;
use crate::supervisor::upgrade;

/// Runs a supervisor with the arguments the keeper gave: `--home DIR`, and whether somebody watches over the keeper.
pub fn supervise(args: &[OsString]) -> ExitCode {
    if let [check, option, dir] = args
        && check == upgrade::CHECK
        && option == "--home"
    {
        return check_state(Path::new(dir));
    }
    let (home, attended) = match args {
        [option, dir] if option == "--home" => (Home::at(Path::new(dir)), Attended::No),
        [option, dir, attended] if option == "--home" && attended == ATTENDED => {
            (Home::at(Path::new(dir)), Attended::Yes)
        }
        _ => {
            tracing::error!("a supervisor is started by its keeper; run `pm daemon`");
            return ExitCode::from(2);
        }
    };
    // A thread that is gone would leave the others waiting for it for ever; the next supervisor has all of them.
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        tracing::error!(thread = thread.name(), "panic: {panic}");
        std::process::abort();
    }));
    let outcome = home.map_err(|error| error.to_string()).and_then(|home| {
        run::run(&home, attended, foreground::settings(), server::serve).map_err(|error| error.to_string())
    });
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Says whether this program would take over the state of a running daemon.
fn check_state(dir: &Path) -> ExitCode {
    let Ok(home) = Home::at(dir) else { return ExitCode::FAILURE };
    let findings = upgrade::check(&home, std::io::stdin().lock());
    let line = serde_json::to_string(&findings).unwrap_or_default();
    match writeln!(std::io::stdout(), "{line}") {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
