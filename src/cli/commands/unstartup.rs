//! `pm unstartup`: undoes `pm startup`. Nothing that runs is ended: the unit of a daemon that runs stays known to
//! systemd until the next reboot.

use std::fs;
use std::io;
use std::path::Path;

use serde_json::json;

use super::startup::Plan;
use crate::cli::Context;
use crate::cli::args::UnitOptions;
use crate::cli::error::CliError;

pub(super) fn run(args: &UnitOptions, context: &mut Context) -> Result<(), CliError> {
    if let Some(platform) = args.platform.as_deref().filter(|platform| *platform != "systemd") {
        return Err(CliError::Usage {
            message: format!("pm has set nothing up for `{platform}`"),
            cause: Some("`pm startup` prints recipes for what is not systemd".to_owned()),
            hint: Some(format!("Undo by hand what `pm startup {platform}` told.")),
        });
    }
    let plan = Plan::new(args, context, "unstartup")?;
    plan.check_machine()?;
    let Plan { instance, name, .. } = &plan;
    let file = plan.file()?;
    let Some(text) = plan.present(&file)? else {
        if context.json {
            context.terminal.data_line(&json!({ "unit": name, "removed": false }).to_string())?;
        } else {
            context.terminal.say(&format!("{name} is not set up: nothing to do."))?;
        }
        return Ok(());
    };
    plan.check_caller("unstartup")?;
    let active = matches!(instance.ask(&["is-active", name]).as_deref(), Some("active"));
    instance.run(&["disable", "--quiet", name])?;
    if active {
        // Without its unit systemd would end the apps together with the daemon.
        let runtime = instance.runtime_unit_dir();
        let copy = runtime.join(name);
        let failed = |source| CliError::File { what: "write", path: copy.clone(), source };
        fs::create_dir_all(&runtime).map_err(failed)?;
        fs::write(&copy, text).map_err(failed)?;
    }
    remove(&file)?;
    instance.run(&["daemon-reload"])?;
    if !active {
        // So that it is not listed as failed; there may be nothing to reset.
        let _ = instance.ask(&["reset-failed", name]);
    }
    if context.json {
        let told = json!({ "unit": name, "path": file, "removed": true, "active": active });
        context.terminal.data_line(&told.to_string())?;
        return Ok(());
    }
    context.terminal.say(&format!("{name} is removed: pm does not come back after a reboot."))?;
    if active {
        context.terminal.say(&format!(
            "The daemon and its apps run on until then. `{}` ends them.",
            instance.line(&["stop", name.trim_end_matches(".service")])
        ))?;
    }
    Ok(())
}

fn remove(file: &Path) -> Result<(), CliError> {
    match fs::remove_file(file) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(CliError::File { what: "remove", path: file.to_owned(), source })
        }
        _ => Ok(()),
    }
}
