//! `pm init`: a config file to start from.

use std::fs::OpenOptions;
use std::io::{self, Write};

use crate::cli::Context;
use crate::cli::args::Init;
use crate::cli::error::CliError;
use crate::config::template::ECOSYSTEM;

pub(super) fn run(args: &Init, context: &mut Context) -> Result<(), CliError> {
    let failed = |source| CliError::File { what: "write", path: args.file.clone(), source };
    let mut file = match OpenOptions::new().write(true).create_new(true).open(&args.file) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            return Err(CliError::Usage {
                message: format!("{} exists already", args.file.display()),
                cause: None,
                hint: Some("Name another file, as in `pm init other.toml`.".to_owned()),
            });
        }
        Err(error) => return Err(failed(error)),
    };
    file.write_all(ECOSYSTEM.as_bytes()).map_err(failed)?;
    let file = args.file.display();
    if !context.json {
        context.terminal.say(&format!("Wrote {file}; edit it, then `pm start {file}`"))?;
    }
    Ok(())
}
