//! `pm env`: the environment of an instance.

use crate::cli::Context;
use crate::cli::args::OneTarget;
use crate::cli::error::CliError;
use crate::ipc::protocol::{Answer, Request};

pub(super) fn run(args: &OneTarget, context: &mut Context) -> Result<(), CliError> {
    let Some(mut session) = context.session()? else {
        return Err(CliError::NoSuchApp { target: args.target.clone() });
    };
    let Answer::Env(env) = session.ask(|| Request::Env { target: args.target.clone() })? else {
        return Err(CliError::WrongAnswer);
    };
    if context.json {
        let text = serde_json::to_string(&env).map_err(std::io::Error::other)?;
        return Ok(context.terminal.data_line(&text)?);
    }
    env.iter().try_for_each(|(key, value)| context.terminal.data_line(&format!("{key}: {value}")))?;
    Ok(())
}
