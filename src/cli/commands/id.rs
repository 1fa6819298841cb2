//! `pm id`: the ids of an app, as PM2 prints them: a JavaScript array. An unknown name has none, which is no error.

use super::list_of;
use crate::cli::Context;
use crate::cli::args::OneTarget;
use crate::cli::error::{CliError, code};
use crate::cli::output::inspect::{Js, inspect};

pub(super) fn run(args: &OneTarget, context: &mut Context) -> Result<(), CliError> {
    let ids: Vec<u32> = match context.session()? {
        None => Vec::new(),
        Some(mut session) => match list_of(std::slice::from_ref(&args.target), &mut session) {
            Ok(view) => view.rows.iter().map(|row| row.pm_id.0).collect(),
            Err(error) if error.code() == code::NO_SUCH_APP => Vec::new(),
            Err(error) => return Err(error),
        },
    };
    let text = if context.json {
        serde_json::to_string(&ids).map_err(std::io::Error::other)?
    } else {
        inspect(&Js::Array(ids.into_iter().map(|id| Js::Number(f64::from(id))).collect()))
    };
    Ok(context.terminal.data_line(&text)?)
}
