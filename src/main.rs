//! The `pm` binary: keeper, supervisor or command.
//!
//! No runtime and no thread before it is known which: the keeper never has either.

use std::process::ExitCode;

use pm::cli::{self, Invocation, Surroundings};
use pm::daemon::{keep, supervise};

fn main() -> ExitCode {
    let surroundings = Surroundings::of_process();
    match cli::parse(std::env::args_os(), &surroundings) {
        Invocation::Daemon { home, detached, resume } => keep::keep(&home, detached, resume),
        Invocation::Supervisor { args } => {
            log_to_stderr();
            supervise::supervise(&args)
        }
        Invocation::Client(client) => client.run(surroundings),
        Invocation::Exit(code) => code,
    }
}

/// The daemon's own log goes to stderr: the terminal, the journal, or `pm.log` when a command started the daemon.
fn log_to_stderr() {
    use std::io::IsTerminal;
    use tracing::level_filters::LevelFilter;
    use tracing_subscriber::filter::Targets;
    use tracing_subscriber::prelude::*;
    // Not EnvFilter: its regular expressions would be a twentieth of the daemon.
    let asked = std::env::var("PM_LOG").ok().and_then(|text| text.parse().ok());
    let filter: Targets = asked.unwrap_or_else(|| Targets::new().with_default(LevelFilter::INFO));
    let lines = tracing_subscriber::fmt::layer()
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    tracing_subscriber::registry().with(lines).with(filter).init();
}
