//! `pm reload --dry-run`: what would happen, and nothing does.

use super::act::Chosen;
use super::nothing_there;
use crate::cli::Context;
use crate::cli::args::ActFile;
use crate::cli::error::CliError;
use crate::cli::output::reload_plan;
use crate::cli::specs;
use crate::ipc::protocol::{Answer, Request, Verb};

pub(super) fn run(args: ActFile, context: &mut Context) -> Result<(), CliError> {
    let Chosen { targets, specs, .. } = Chosen::by(Verb::Reload, &args, context)?;
    let Some(mut session) = context.session()? else {
        // A dry run starts no daemon either.
        if specs.is_empty() {
            return nothing_there(&targets, context);
        }
        for spec in &specs {
            let line = format!(
                "{}: would be started with {}, and a daemon before it. Nothing was changed.",
                spec.name,
                crate::cli::output::words::count(spec.instances as usize, "instance")
            );
            context.terminal.say(&line)?;
        }
        return Ok(());
    };
    let request =
        || Request::PlanReload { targets: targets.clone(), specs: specs.clone(), shell: specs::shell() };
    let Answer::ReloadPlan(plans) = session.ask(request)? else { return Err(CliError::WrongAnswer) };
    if context.json {
        let text = serde_json::to_string(&plans).map_err(std::io::Error::other)?;
        context.terminal.data_line(&text)?;
        return Ok(());
    }
    reload_plan::print(&plans, &mut context.terminal)?;
    Ok(())
}
