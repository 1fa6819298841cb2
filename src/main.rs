//! The `pm` binary: keeper, supervisor or command.
//!
//! No runtime and no thread before it is known which: the keeper never has either.

use std::process::ExitCode;

use pm::cli::{self, Invocation, Surroundings};
use pm::daemon::{foreground, keep, supervise};

fn main() -> ExitCode {
    let surroundings = Surroundings::of_process();
    match cli::parse(std::env::args_os(), &surroundings) {
        Invocation::Daemon { home, detached, left } => keep::keep(&home, detached, left),
        Invocation::Supervisor { args } => {
            foreground::log_to_stderr();
            supervise::supervise(&args)
        }
        Invocation::Client(client) => client.run(surroundings),
        Invocation::Exit(code) => code,
    }
}
