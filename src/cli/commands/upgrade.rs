//! `pm upgrade`.

use std::path::{Path, PathBuf};

use crate::cli::Context;
use crate::cli::args::Upgrade;
use crate::cli::error::{CliError, code};
use crate::cli::specs;
use crate::ipc::protocol::{KeeperFate, Refused, Request, UpgradeResult, UpgradeView};

/// What `/proc/PID/exe` shows behind the path of a file that is not there any more.
const DELETED: &str = " (deleted)";

pub(super) fn run(options: &Upgrade, context: &mut Context) -> Result<(), CliError> {
    let Upgrade { program, supervisor_only, check } = options;
    let program = match program {
        Some(program) => absolute(program)?,
        None => own(&context.surroundings.program)?,
    };
    specs::trust(&program, "upgrade to")?;
    let Some(mut session) = context.session()? else {
        if *check {
            return Err(CliError::NoDaemon { home: context.home.dir().to_owned() });
        }
        let text =
            "No daemon is running, so there is nothing to replace: the next one is whatever `pm` starts it.";
        if context.json {
            return Ok(context.terminal.data_line(r#"{"result":"no_daemon"}"#)?);
        }
        return Ok(context.terminal.say(text)?);
    };
    let request =
        Request::Upgrade { program: program.clone(), supervisor_only: *supervisor_only, check: *check };
    let view = match session.upgrade(&request) {
        Err(CliError::Refused(refused)) if is_unknown(&refused) => return Err(too_old()),
        view => view?,
    };
    if context.json {
        let text = serde_json::to_string(&view).unwrap_or_default();
        context.terminal.data_line(&text)?;
    } else if view.result != UpgradeResult::Failed {
        context.terminal.say(&words(&view, &program, *supervisor_only))?;
    }
    if view.result == UpgradeResult::Failed {
        return Err(CliError::Refused(Refused {
            code: code::FAILED,
            message: format!("cannot upgrade to {}", program.display()),
            cause: view.reason,
            hint: Some(format!(
                "pm {} goes on, and nothing of the apps has changed. The daemon's log says more: {}",
                view.from,
                context.home.log_file().display()
            )),
        }));
    }
    Ok(())
}

fn words(view: &UpgradeView, program: &Path, supervisor_only: bool) -> String {
    let UpgradeView { from, to, keeper, reason, .. } = view;
    let path = program.display();
    let versions =
        if from == to { format!("another build of pm {to}") } else { format!("pm {from} by pm {to}") };
    match (view.result, keeper, reason) {
        (UpgradeResult::Already, ..) => format!("The daemon runs {path} (pm {to}) already."),
        (UpgradeResult::Fits, ..) => {
            format!("{path} (pm {to}) would take over from pm {from}. Nothing was changed.")
        }
        (_, KeeperFate::Older, Some(reason)) => format!(
            "Replaced {versions}, but for the keeper, which goes on as it was: {reason}. Run `pm upgrade` again to \
             replace it too."
        ),
        (_, KeeperFate::Replaced, _) => format!("Replaced {versions}; every process has gone on."),
        _ if supervisor_only => {
            format!(
                "Replaced the supervisor: {versions}; the keeper is as it was, and every process has gone on."
            )
        }
        _ => format!("Replaced {versions}; every process has gone on."),
    }
}

fn absolute(program: &Path) -> Result<PathBuf, CliError> {
    std::path::absolute(program).map_err(|error| wrong(program, &error.to_string()))
}

/// The program of this very command.
fn own(program: &Path) -> Result<PathBuf, CliError> {
    let text = program.to_string_lossy();
    match text.strip_suffix(DELETED) {
        Some(before) => {
            Err(wrong(Path::new(before), "it was replaced while this command started; run it again"))
        }
        None => absolute(program),
    }
}

fn wrong(program: &Path, cause: &str) -> CliError {
    CliError::Refused(Refused {
        code: code::USAGE,
        message: format!("cannot upgrade to {}", program.display()),
        cause: Some(cause.to_owned()),
        hint: None,
    })
}

/// A daemon from before upgrades does not know the request.
fn is_unknown(refused: &Refused) -> bool {
    refused.cause.as_ref().is_some_and(|cause| cause.contains("unknown variant"))
}

fn too_old() -> CliError {
    CliError::Refused(Refused {
        code: code::FAILED,
        message: "the running daemon is older than `pm upgrade`".to_owned(),
        cause: None,
        hint: Some(
            "Under systemd, `systemctl restart pm` replaces it and the apps go on. Otherwise `pm kill` and then \
             `pm resurrect`, which restarts them."
                .to_owned(),
        ),
    })
}
