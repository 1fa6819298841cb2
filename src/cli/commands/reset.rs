//! `pm reset`.

use super::{Wording, apps_of, nothing_there, operate, show_table};
use crate::cli::Context;
use crate::cli::args::Targets;
use crate::cli::error::CliError;
use crate::ipc::protocol::Request;

pub(super) fn run(args: &Targets, context: &mut Context) -> Result<(), CliError> {
    let Some(mut session) = context.session()? else { return nothing_there(&args.targets, context) };
    let request = Request::Reset { targets: args.targets.clone() };
    let done = operate(request, &Wording { verb: "reset" }, false, &mut session, context)?;
    show_table(&apps_of(done.as_ref()), &mut session, context)
}
