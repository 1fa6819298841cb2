//! `pm supervisor`: what the keeper starts.

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use super::keep::ATTENDED;
use crate::ipc::server;
use crate::store::paths::Home;
use crate::supervisor::run;
use crate::supervisor::takeover::Attended;

/// Runs a supervisor with the arguments the keeper gave: `--home DIR`, and whether somebody watches over the keeper.
pub fn supervise(args: &[OsString]) -> ExitCode {
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
    let outcome = home
        .map_err(|error| error.to_string())
        .and_then(|home| run::run(&home, attended, server::serve).map_err(|error| error.to_string()));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}
