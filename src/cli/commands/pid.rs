//! `pm pid`: process ids, one per line; without a name, those of all apps. An unknown name has none, which is no
//! error (PM2).

use super::list_of;
use crate::cli::Context;
use crate::cli::args::OptionalTarget;
use crate::cli::error::{CliError, code};

pub(super) fn run(args: &OptionalTarget, context: &mut Context) -> Result<(), CliError> {
    let Some(mut session) = context.session()? else { return Ok(()) };
    let pids: Vec<u32> = match list_of(args.target.as_slice(), &mut session) {
        Ok(view) => view.rows.iter().filter_map(|row| row.pid).collect(),
        Err(error) if error.code() == code::NO_SUCH_APP => Vec::new(),
        Err(error) => return Err(error),
    };
    pids.iter().try_for_each(|pid| context.terminal.data_line(&pid.to_string()))?;
    Ok(())
}
