//! `pm describe`.

use std::path::Path;

use jiff::tz::TimeZone;

use super::origin::{Origins, Said};
use crate::cli::Context;
use crate::cli::args::Describe;
use crate::cli::error::CliError;
use crate::cli::output::describe;
use crate::config::words::quote;
use crate::ipc::protocol::{Answer, Request};

pub(super) fn run(args: &Describe, context: &mut Context) -> Result<(), CliError> {
    let show_env = context.surroundings.show_env;
    let Some(mut session) = context.session()? else {
        return super::nothing_there(&args.targets, context);
    };
    let request = || Request::Describe { targets: args.targets.clone(), show_env };
    let Answer::Describe(mut details) = session.ask(request)? else { return Err(CliError::WrongAnswer) };
    let mut origins = Origins::default();
    for detail in &mut details {
        let Some(origin) = detail.spec.origin.clone() else { continue };
        let said = origins.says(&origin, &detail.row.app, show_env, &mut session)?;
        detail.notes.extend(note(&said, &origin.file));
    }
    if context.json {
        let text = serde_json::to_string(&details).map_err(std::io::Error::other)?;
        return Ok(context.terminal.data_line(&text)?);
    }
    // Looked up here and not earlier: no other command needs it.
    let zone = context.surroundings.zone.clone().unwrap_or_else(TimeZone::system);
    details.iter().try_for_each(|detail| describe::print(detail, &zone, &mut context.terminal))?;
    Ok(())
}

/// What the config file says otherwise: its keys, and how to bring that about.
fn note(said: &Said, file: &Path) -> Option<String> {
    let path = file.display().to_string();
    match said {
        Said::Changes(changes) if changes.is_empty() => None,
        Said::Changes(changes) => {
            let keys: Vec<&str> = changes.iter().map(|change| change.key.as_str()).collect();
            Some(format!(
                "its config file says otherwise: {}; `pm apply {}` brings that about",
                keys.join(", "),
                quote(&path)
            ))
        }
        Said::NotThere => {
            Some(format!("{path} does not have it any more; `pm apply {} --prune` removes it", quote(&path)))
        }
        Said::Unreadable => {
            Some(format!("its config file cannot be compared: see `pm check {}`", quote(&path)))
        }
    }
}
