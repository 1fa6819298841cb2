//! `pm start`: what exists, a config file, a script, a binary, a line; several in sequence.

use std::collections::BTreeSet;
use std::path::Path;

use super::{Wording, apps_of, list_of, operate, show_table};
use crate::cli::Context;
use crate::cli::args::Start;
use crate::cli::connect::Session;
use crate::cli::error::{CliError, code};
use crate::cli::specs::{self, FileSettings, Wishes};
use crate::config::file::DEFAULT_NAME;
use crate::ipc::protocol::{Answer, ListView, Request, Verb};
use crate::model::id::AppName;
use crate::model::spec::AppSpec;
use crate::store::state;

/// What one or several targets in a row come to.
#[derive(Debug)]
enum Part {
    /// These exist.
    Existing(Vec<String>),
    /// These are described.
    New(Vec<AppSpec>),
}

pub(super) fn run(mut args: Start, context: &mut Context) -> Result<(), CliError> {
    if args.targets.is_empty() {
        args.targets.push(default_file()?);
    }
    let wishes = Wishes::new(&args.app, &args.file, &args.args)?;
    // A daemon is started only when all that is to be started makes sense.
    let mut session = context.session()?;
    let by_name = |target: &String| may_be_name(target) && !specs::is_config(target);
    if session.is_none() && args.targets.iter().any(by_name) && state::remembers_apps(&context.home.state()) {
        // The daemon is gone, the list is not: names mean what they meant.
        session = Some(context.session_or_start()?);
    }
    let known = match &mut session {
        Some(session) if args.targets.iter().any(|target| may_be_name(target)) => {
            Some(list_of(&[], session)?)
        }
        _ => None,
    };
    let mut parts: Vec<Part> = Vec::new();
    let mut settings = FileSettings::default();
    for target in &args.targets {
        match part(target, known.as_ref(), &wishes, session.as_mut(), context, &mut settings)? {
            // What follows each other is started together.
            Part::Existing(more) => match parts.last_mut() {
                Some(Part::Existing(targets)) => targets.extend(more),
                _ => parts.push(Part::Existing(more)),
            },
            Part::New(more) => match parts.last_mut() {
                Some(Part::New(specs)) => specs.extend(more),
                _ => parts.push(Part::New(more)),
            },
        }
    }
    check_twice(&parts)?;
    let mut session = match session {
        Some(session) => session,
        None => context.session_or_start()?,
    };
    session.apply_settings(settings)?;
    let mut apps = BTreeSet::new();
    let mut failed = Vec::new();
    for part in parts {
        match start(part, &args, &mut session, context) {
            Ok(started) => apps.extend(started),
            // As PM2 does: one that fails does not keep the others from starting.
            Err(CliError::Failed(more)) => failed.extend(more),
            Err(error) => return Err(error),
        }
    }
    show_table(&apps, &mut session, context)?;
    if failed.is_empty() { Ok(()) } else { Err(CliError::Failed(failed)) }
}

fn start(
    part: Part,
    args: &Start,
    session: &mut Session,
    context: &mut Context,
) -> Result<BTreeSet<AppName>, CliError> {
    let request = match part {
        Part::New(specs) => Request::Start { specs, shell: specs::shell() },
        Part::Existing(targets) => Request::Act {
            verb: Verb::Start,
            targets,
            specs: Vec::new(),
            shell: args.update_env.then(specs::shell),
            update_env: args.update_env,
        },
    };
    let done = operate(request, &Wording::of(Verb::Start), args.waiting.no_wait, session, context)?;
    Ok(apps_of(done.as_ref()))
}

/// In PM2's order: name, namespace, id; then what there is on disk.
fn part(
    target: &str,
    known: Option<&ListView>,
    wishes: &Wishes,
    session: Option<&mut Session>,
    context: &mut Context,
    settings: &mut FileSettings,
) -> Result<Part, CliError> {
    if specs::is_config(target) {
        let file = wishes.from_file(target, "start", &mut context.terminal)?;
        *settings = file.settings.or(*settings);
        return Ok(Part::New(file.apps));
    }
    if target == "all" || is_regex(target) || known.is_some_and(|view| names(view, target)) {
        if wishes.change_an_app() {
            return Err(CliError::Usage {
                message: format!("`{target}` exists, so options for a new app do not apply"),
                cause: None,
                hint: Some(format!(
                    "`pm delete {target}` first, name the script instead, or change its config file and `pm reload` that."
                )),
            });
        }
        return Ok(Part::Existing(vec![target.to_owned()]));
    }
    if target.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(CliError::NoSuchApp { target: target.to_owned() });
    }
    let spec = wishes.from_target(target, &mut context.terminal)?;
    let Some(session) = session else { return Ok(Part::New(vec![spec])) };
    match running(&spec.name, known, session)? {
        Some(known) if known.command.script != spec.command.script && !wishes.names_it() => {
            Err(CliError::Usage {
                message: format!("there is another `{}` already", spec.name),
                cause: Some(format!("it runs {}", known.command.script.display())),
                hint: Some(format!("Give this one a name of its own: `pm start {target} --name NAME`.")),
            })
        }
        // Only what is named changes.
        Some(known) => Ok(Part::New(vec![wishes.laid_over(&known, spec)])),
        None => Ok(Part::New(vec![spec])),
    }
}

/// What an app of that name runs, if there is one.
fn running(
    name: &AppName,
    known: Option<&ListView>,
    session: &mut Session,
) -> Result<Option<AppSpec>, CliError> {
    let exists = |view: &ListView| view.rows.iter().any(|row| row.app == *name);
    if !known.map_or_else(|| list_of(&[], session).map(|view| exists(&view)), |view| Ok(exists(view)))? {
        return Ok(None);
    }
    // The spec goes back as it is, so it must not be masked.
    let request = || Request::Describe { targets: vec![name.to_string()], show_env: true };
    let details = match session.ask(request) {
        Ok(Answer::Describe(details)) => details,
        Ok(_) => return Err(CliError::WrongAnswer),
        // It was on its way out, and is gone since the list was made.
        Err(CliError::Refused(refused)) if refused.code == code::NO_SUCH_APP => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok(details.into_iter().find(|detail| detail.row.app == *name).map(|detail| detail.spec))
}

fn names(view: &ListView, target: &str) -> bool {
    may_be_name(target)
        && view.rows.iter().any(|row| {
            row.app.as_str() == target || row.namespace == target || row.pm_id.to_string() == target
        })
}

/// A path is never looked up as a name, unless an app is called so: `api.js` may be both, and then the app is meant
/// only when there is no such file.
fn may_be_name(target: &str) -> bool {
    let is_file = Path::new(target).extension().is_some() && Path::new(target).is_file();
    !target.contains('/') && !is_file
}

fn is_regex(target: &str) -> bool {
    target.len() > 2 && target.starts_with('/') && target.ends_with('/') && !Path::new(target).is_dir()
}

fn default_file() -> Result<String, CliError> {
    match Path::new(DEFAULT_NAME).try_exists() {
        Ok(true) => Ok(DEFAULT_NAME.to_owned()),
        Ok(false) => Err(CliError::Usage {
            message: format!("there is no {DEFAULT_NAME} here"),
            cause: Some("`pm start` without an argument starts what it says".to_owned()),
            hint: Some("`pm init` writes one; `pm start app.js` starts a script.".to_owned()),
        }),
        Err(source) => Err(CliError::File { what: "read", path: DEFAULT_NAME.into(), source }),
    }
}

/// Two targets that come to one name would overwrite each other.
fn check_twice(parts: &[Part]) -> Result<(), CliError> {
    let mut seen = BTreeSet::new();
    for part in parts {
        let Part::New(specs) = part else { continue };
        for spec in specs {
            if !seen.insert(spec.name.clone()) {
                return Err(CliError::Usage {
                    message: format!("two of the apps to start have the name `{}`", spec.name),
                    cause: None,
                    hint: Some("Start them one by one, each with its own --name.".to_owned()),
                });
            }
        }
    }
    Ok(())
}
