//! `pm env`: the environment of an instance, and how it differs from what is configured.

use serde::Serialize;

use super::origin::{Origins, Said};
use crate::cli::Context;
use crate::cli::args::Env;
use crate::cli::error::CliError;
use crate::cli::output::plan::value_change;
use crate::config::words::quote;
use crate::ipc::protocol::{Answer, KeyChange, Request};
use crate::model::difference::variable_of;

pub(super) fn run(args: &Env, context: &mut Context) -> Result<(), CliError> {
    let target = &args.target;
    let Some(mut session) = context.session()? else {
        return Err(CliError::NoSuchApp { target: target.clone() });
    };
    if args.diff {
        return diff(target, context);
    }
    let Answer::Env(env) = session.ask(|| Request::Env { target: target.clone() })? else {
        return Err(CliError::WrongAnswer);
    };
    if context.json {
        let text = serde_json::to_string(&env).map_err(std::io::Error::other)?;
        return Ok(context.terminal.data_line(&text)?);
    }
    env.iter().try_for_each(|(key, value)| context.terminal.data_line(&format!("{key}: {value}")))?;
    Ok(())
}

/// What `--diff --json` prints.
#[derive(Serialize)]
struct Diff<'a> {
    /// What the next start or reload by name changes.
    reload: &'a [KeyChange],
    /// What the config file says otherwise, beyond that.
    file: &'a [KeyChange],
}

fn diff(target: &str, context: &mut Context) -> Result<(), CliError> {
    let Some(mut session) = context.session()? else {
        return Err(CliError::NoSuchApp { target: target.to_owned() });
    };
    let Answer::EnvDiff { app, changes } = session.ask(|| Request::EnvDiff { target: target.to_owned() })?
    else {
        return Err(CliError::WrongAnswer);
    };
    let request = || Request::Describe { targets: vec![target.to_owned()], show_env: false };
    let Answer::Describe(details) = session.ask(request)? else { return Err(CliError::WrongAnswer) };
    let origin = details.first().and_then(|detail| detail.spec.origin.clone());
    let mut file = Vec::new();
    let mut path = String::new();
    if let Some(origin) = origin {
        path = origin.file.display().to_string();
        if let Said::Changes(changes) = Origins::default().says(&origin, &app, true, &mut session)? {
            file = changes;
            file.retain(|change| variable_of(&change.key).is_some() || change.key == "env_file");
        }
    }
    if context.json {
        let text =
            serde_json::to_string(&Diff { reload: &changes, file: &file }).map_err(std::io::Error::other)?;
        return Ok(context.terminal.data_line(&text)?);
    }
    let terminal = &mut context.terminal;
    if changes.is_empty() && file.is_empty() {
        terminal.say(&format!("{app} runs with the environment that is configured."))?;
        return Ok(());
    }
    let app = quote(app.as_str());
    let blocks = [
        (&changes, format!("`pm reload {app}` would change:")),
        (&file, format!("{path} says otherwise; `pm apply {}` would change:", quote(&path))),
    ];
    for (changes, title) in blocks {
        if changes.is_empty() {
            continue;
        }
        terminal.say(&title)?;
        let name = |change: &KeyChange| variable_of(&change.key).unwrap_or(&change.key).to_owned();
        let width = changes.iter().map(|change| name(change).chars().count()).max().unwrap_or(0);
        for change in changes {
            let symbol = match (&change.old, &change.new) {
                (None, _) => "+",
                (_, None) => "-",
                _ => "~",
            };
            terminal.say(&format!("  {symbol} {:<width$}  {}", name(change), value_change(change)))?;
        }
    }
    Ok(())
}
