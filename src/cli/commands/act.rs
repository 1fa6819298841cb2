//! `pm stop`, `restart`, `reload`, `delete`.

use std::collections::BTreeSet;

use super::{Wording, apps_of, nothing_there, operate, show_table};
use crate::cli::Context;
use crate::cli::args::{Act, ActFile, FileOptions};
use crate::cli::error::CliError;
use crate::cli::specs::{self, FileSettings};
use crate::ipc::protocol::{Request, Verb};
use crate::model::spec::AppSpec;

/// `stop` and `delete`: of a config file only the names count.
pub(super) fn without_file(verb: Verb, args: Act, context: &mut Context) -> Result<(), CliError> {
    let file = FileOptions { only: args.only, env: None };
    check_file_options(&args.targets, &file)?;
    let mut targets = Vec::new();
    for target in args.targets {
        if specs::is_config(&target) {
            let specs = context.specs_of(&target, &file, Wording::of(verb).verb)?;
            targets.extend(specs.apps.into_iter().map(|spec| spec.name.to_string()));
        } else {
            targets.push(target);
        }
    }
    let Some(mut session) = context.session()? else { return nothing_there(&targets, context) };
    let request = Request::Act { verb, targets, specs: Vec::new(), shell: None, update_env: false };
    let done = operate(request, &Wording::of(verb), args.waiting.no_wait, &mut session, context)?;
    show_table(&apps_of(done.as_ref()), &mut session, context)
}

/// `restart` and `reload`: a config file also brings what it says now.
pub(super) fn with_file(verb: Verb, args: ActFile, context: &mut Context) -> Result<(), CliError> {
    let Chosen { targets, specs, settings } = Chosen::by(verb, &args, context)?;
    let mut session = if specs.is_empty() {
        let Some(session) = context.session()? else { return nothing_there(&targets, context) };
        session
    } else {
        context.session_or_start()?
    };
    session.apply_settings(settings)?;
    let shell = (args.update_env || !specs.is_empty()).then(specs::shell);
    let request = Request::Act { verb, targets, specs, shell, update_env: args.update_env };
    let done = operate(request, &Wording::of(verb), args.waiting.no_wait, &mut session, context)?;
    let apps: BTreeSet<_> = apps_of(done.as_ref());
    show_table(&apps, &mut session, context)
}

/// What targets come to: what exists, and what files say.
pub(super) struct Chosen {
    pub(super) targets: Vec<String>,
    pub(super) specs: Vec<AppSpec>,
    settings: FileSettings,
}

impl Chosen {
    pub(super) fn by(verb: Verb, args: &ActFile, context: &mut Context) -> Result<Self, CliError> {
        check_file_options(&args.targets, &args.file)?;
        let mut chosen = Self { targets: Vec::new(), specs: Vec::new(), settings: FileSettings::default() };
        for target in &args.targets {
            if specs::is_config(target) {
                let file = context.specs_of(target, &args.file, Wording::of(verb).verb)?;
                chosen.specs.extend(file.apps);
                chosen.settings = file.settings.or(chosen.settings);
            } else {
                chosen.targets.push(target.clone());
            }
        }
        // Names of the files' apps beside other targets would otherwise be left out.
        if !chosen.targets.is_empty() {
            chosen.targets.extend(chosen.specs.iter().map(|spec| spec.name.to_string()));
        }
        Ok(chosen)
    }
}

fn check_file_options(targets: &[String], options: &FileOptions) -> Result<(), CliError> {
    let given = [("--only", options.only.is_some()), ("--env", options.env.is_some())];
    let Some((option, _)) = given.into_iter().find(|(_, given)| *given) else { return Ok(()) };
    if targets.iter().any(|target| specs::is_config(target)) {
        return Ok(());
    }
    Err(CliError::Usage {
        message: format!("{option} needs a config file"),
        cause: Some("it selects from what the file says".to_owned()),
        hint: Some("Name the file, as in `pm reload ecosystem.toml --env production`.".to_owned()),
    })
}
