//! `pm describe`.

use jiff::tz::TimeZone;

use crate::cli::Context;
use crate::cli::args::Describe;
use crate::cli::error::CliError;
use crate::cli::output::describe;
use crate::ipc::protocol::{Answer, Request};

pub(super) fn run(args: &Describe, context: &mut Context) -> Result<(), CliError> {
    let show_env = args.show_env || context.surroundings.show_env;
    let Some(mut session) = context.session()? else {
        return super::nothing_there(&args.targets, context);
    };
    let request = || Request::Describe { targets: args.targets.clone(), show_env };
    let Answer::Describe(details) = session.ask(request)? else { return Err(CliError::WrongAnswer) };
    if context.json {
        let text = serde_json::to_string(&details).map_err(std::io::Error::other)?;
        return Ok(context.terminal.data_line(&text)?);
    }
    // Looked up here and not earlier: no other command needs it.
    let zone = context.surroundings.zone.clone().unwrap_or_else(TimeZone::system);
    details.iter().try_for_each(|detail| describe::print(detail, &zone, &mut context.terminal))?;
    Ok(())
}
