//! `pm kill`: everything ends, the daemon last.

use super::{Wording, operate};
use crate::cli::Context;
use crate::cli::error::CliError;
use crate::ipc::protocol::Request;

pub(super) fn run(context: &mut Context) -> Result<(), CliError> {
    let Some(mut session) = context.session()? else {
        if !context.json {
            context.terminal.say("No daemon is running.")?;
        }
        return Ok(());
    };
    let ended = operate(Request::Kill, &Wording { verb: "kill" }, false, &mut session, context);
    if matches!(ended, Ok(_) | Err(CliError::Failed(_))) {
        // Also when not everything went well: the daemon ends all the same, and what follows must not meet it.
        session.wait_for_end();
    }
    ended?;
    if !context.json {
        context.terminal.say("The daemon has ended. `pm resurrect` starts what was running.")?;
    }
    Ok(())
}
