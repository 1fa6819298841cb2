//! `pm jlist` and `pm prettylist`: the list for programs, in PM2's form.

use crate::cli::Context;
use crate::cli::args::Jlist;
use crate::cli::error::CliError;
use crate::cli::output::Terminal;
use crate::cli::output::inspect::{Js, inspect};
use crate::ipc::codec::CodecError;
use crate::ipc::protocol::Request;

/// How it is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// As JSON, on one line.
    Json,
    /// As Node's `util.inspect` prints it, without a final newline, as PM2 does.
    Pretty,
}

pub(super) fn run(args: &Jlist, form: Form, context: &mut Context) -> Result<(), CliError> {
    let show_env = context.surroundings.show_env;
    let Some(mut session) = context.session()? else {
        return match args.targets.iter().find(|target| *target != "all") {
            Some(target) => Err(CliError::NoSuchApp { target: target.clone() }),
            None => print(b"[]", form, &mut context.terminal),
        };
    };
    let terminal = &mut context.terminal;
    session.ask_raw(
        || Request::Jlist { targets: args.targets.clone(), show_env },
        |json| print(json, form, terminal),
    )
}

fn print(json: &[u8], form: Form, terminal: &mut Terminal) -> Result<(), CliError> {
    match form {
        Form::Json => {
            terminal.data(json)?;
            terminal.data(b"\n")?;
        }
        Form::Pretty => {
            let list: Js = serde_json::from_slice(json).map_err(|source| CliError::Protocol {
                source: CodecError::Content { start: "the list".to_owned(), source },
            })?;
            terminal.data(inspect(&list).as_bytes())?;
        }
    }
    Ok(())
}
