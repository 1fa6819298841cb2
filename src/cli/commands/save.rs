//! `pm save` and `pm resurrect`.

use super::{Wording, apps_of, operate, show_table};
use crate::cli::Context;
use crate::cli::args::Waiting;
use crate::cli::error::CliError;
use crate::cli::output::words;
use crate::ipc::protocol::{Answer, Request};

pub(super) fn save(context: &mut Context) -> Result<(), CliError> {
    let Some(mut session) = context.session()? else {
        return Err(CliError::NoDaemon { home: context.home.dir().to_owned() });
    };
    let Answer::Saved { path, apps } = session.ask(|| Request::Save)? else {
        return Err(CliError::WrongAnswer);
    };
    if context.json {
        let text = serde_json::json!({ "saved": { "path": path, "apps": apps } }).to_string();
        return Ok(context.terminal.data_line(&text)?);
    }
    let apps = words::count(usize::try_from(apps).unwrap_or(usize::MAX), "app");
    Ok(context.terminal.say(&format!("Saved {apps} in {}", path.display()))?)
}

pub(super) fn resurrect(waiting: Waiting, context: &mut Context) -> Result<(), CliError> {
    let mut session = context.session_or_start()?;
    let done =
        operate(Request::Resurrect, &Wording { verb: "resurrect" }, waiting.no_wait, &mut session, context)?;
    show_table(&apps_of(done.as_ref()), &mut session, context)
}
