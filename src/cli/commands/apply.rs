//! `pm apply`: make the apps of a config file what it says, or say what that would change.

use super::{Plain, Wording, apps_of, operate_with, show_table};
use crate::cli::Context;
use crate::cli::args::Apply;
use crate::cli::error::{CliError, code};
use crate::cli::output::plan;
use crate::cli::output::progress::{JsonLine, json_line};
use crate::cli::specs::{self, FileSpecs};
use crate::ipc::protocol::{Answer, Measure, PlanView, PlannedApp, Request};
use crate::model::spec::AppSpec;
use crate::store::state;

pub(super) fn run(args: &Apply, context: &mut Context) -> Result<u8, CliError> {
    if !specs::is_config(&args.file) {
        return Err(CliError::Usage {
            message: format!("{:?} is no config file", args.file),
            cause: Some("`apply` makes the apps of a file what it says".to_owned()),
            hint: Some(
                "Name the file, as in `pm apply ecosystem.toml`; `pm start` starts a script.".to_owned(),
            ),
        });
    }
    let FileSpecs { apps, settings, all, path } = context.specs_of(&args.file, &args.options, "apply")?;
    let only_look = args.check || args.dry_run;
    let request = |act| Request::Apply {
        specs: apps.clone(),
        all: all.clone(),
        file: path.clone(),
        prune: args.prune,
        act,
        shell: specs::shell(),
        show_env: context.surroundings.show_env,
    };
    if only_look {
        let request = request(false);
        let plan = match context.session()? {
            Some(mut session) => match session.ask(|| request.clone())? {
                Answer::Plan(plan) => plan,
                _ => return Err(CliError::WrongAnswer),
            },
            None if state::remembers_apps(&context.home.state()) => return Err(not_running(context)),
            None => everything_is_new(&apps),
        };
        show(&plan, args, context)?;
        return Ok(if args.check && plan.changes { code::CHANGES } else { code::DONE });
    }
    let request = request(true);
    let mut session = context.session_or_start()?;
    session.apply_settings(settings)?;
    let mut seen = None;
    let done = operate_with(
        request,
        &Wording { verb: "apply" },
        Plain { no_wait: args.waiting.no_wait, quiet: Some("already up to date") },
        &mut session,
        context,
        |plan, json, terminal| {
            seen = Some(plan.changes);
            if json {
                json_line(&JsonLine::Plan(&plan), terminal)
            } else {
                plan::print(&plan, &args.file, terminal).and_then(|()| terminal.flush())
            }
        },
    )?;
    if seen == Some(true) {
        show_table(&apps_of(done.as_ref()), &mut session, context)?;
    }
    Ok(code::DONE)
}

fn show(plan: &PlanView, args: &Apply, context: &mut Context) -> Result<(), CliError> {
    if context.json {
        json_line(&JsonLine::Plan(plan), &mut context.terminal)?;
    } else {
        plan::print(plan, &args.file, &mut context.terminal)?;
    }
    Ok(())
}

/// Without a daemon nothing runs, and a look does not start one.
fn everything_is_new(apps: &[AppSpec]) -> PlanView {
    let new = |spec: &AppSpec| PlannedApp {
        app: spec.name.clone(),
        measure: Measure::Create,
        instances: spec.instances,
        changes: Vec::new(),
        note: None,
    };
    PlanView { changes: !apps.is_empty(), apps: apps.iter().map(new).collect(), left_over: Vec::new() }
}

fn not_running(context: &Context) -> CliError {
    CliError::NoDaemon { home: context.home.dir().to_owned() }
}
