//! `pm list`.

use super::list_with;
use crate::cli::Context;
use crate::cli::args::List;
use crate::cli::error::CliError;
use crate::cli::output::table::{self, Columns};
use crate::ipc::protocol::{HostView, ListView};

pub(super) fn run(args: &List, context: &mut Context) -> Result<(), CliError> {
    let view = match context.session()? {
        Some(mut session) => list_with(&args.targets, args.wide, &mut session)?,
        None => match args.targets.iter().find(|target| *target != "all") {
            Some(target) => return Err(CliError::NoSuchApp { target: target.clone() }),
            None => ListView { rows: Vec::new(), host: HostView::default(), warnings: Vec::new() },
        },
    };
    if context.json {
        let text = serde_json::to_string(&view).map_err(std::io::Error::other)?;
        return Ok(context.terminal.data_line(&text)?);
    }
    let columns = if args.wide { Columns::Every } else { Columns::Fitting };
    Ok(table::print(&view, columns, &mut context.terminal)?)
}
