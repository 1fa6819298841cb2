//! `pm ping`.

use crate::cli::Context;
use crate::cli::error::CliError;
use crate::ipc::protocol::{Answer, Request};

pub(super) fn run(context: &mut Context) -> Result<(), CliError> {
    let Some(mut session) = context.session()? else {
        return Err(CliError::NoDaemon { home: context.home.dir().to_owned() });
    };
    let Answer::Pong { version, daemon_pid, supervisor_pid, warnings } = session.ask(|| Request::Ping)?
    else {
        return Err(CliError::WrongAnswer);
    };
    if context.json {
        let pong = serde_json::json!({
            "version": version, "daemon_pid": daemon_pid, "supervisor_pid": supervisor_pid, "warnings": warnings,
        });
        return Ok(context.terminal.data_line(&pong.to_string())?);
    }
    let home = context.home.dir().display();
    context
        .terminal
        .say(&format!("pong: pm {version}, daemon {daemon_pid}, supervisor {supervisor_pid}, home {home}"))?;
    Ok(warnings.iter().try_for_each(|warning| context.terminal.error_line("warning:", warning))?)
}
