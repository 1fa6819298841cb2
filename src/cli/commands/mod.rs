//! The commands, a file each, and what several of them share.

mod act;
mod apply;
mod check;
mod describe;
mod env;
mod events;
mod id;
mod init;
mod jlist;
mod kill;
mod list;
mod logs;
mod origin;
mod pid;
mod ping;
mod reload_plan;
mod reset;
mod run;
mod save;
mod scale;
mod start;
mod startup;
mod unit;
mod unstartup;
mod upgrade;

use std::collections::BTreeSet;
use std::io;
use std::time::Instant;

use super::Context;
use super::args::{Command, Reload};
use super::connect::{Outcome, Session};
use super::error::{CliError, FailedApp, code};
use super::interrupt::UnderWay;
use super::output::Terminal;
use super::output::progress::{JsonLine, Progress, json_line};
use super::output::table::{self, Columns};
use crate::ipc::client::{Heard, Listen};
use crate::ipc::protocol::{
    Answer, AppResult, Failure, ListView, OperationView, PlanView, Refused, Request, Verb,
};
use crate::model::id::AppName;
use crate::store::state;

/// Runs a command; returns the exit code where that is no error's.
///
/// # Errors
/// Why it did not do what it was asked.
pub fn run(command: Command, context: &mut Context) -> Result<u8, CliError> {
    let done = |()| code::DONE;
    match command {
        Command::Start(args) => start::run(*args, context).map(done),
        Command::Run(args) => run::run(&args, context).map(done),
        Command::Stop(args) => act::without_file(Verb::Stop, args, context).map(done),
        Command::Delete(args) => act::without_file(Verb::Delete, args, context).map(done),
        Command::Restart(args) => act::with_file(Verb::Restart, args, context).map(done),
        Command::Apply(args) => apply::run(&args, context),
        Command::Reload(Reload { act, dry_run: true }) => reload_plan::run(act, context).map(done),
        Command::Reload(Reload { act, .. }) => act::with_file(Verb::Reload, act, context).map(done),
        Command::List(args) => list::run(&args, context).map(done),
        Command::Jlist(args) => jlist::run(&args, jlist::Form::Json, context).map(done),
        Command::Prettylist(args) => jlist::run(&args, jlist::Form::Pretty, context).map(done),
        Command::Describe(args) => describe::run(&args, context).map(done),
        Command::Logs(args) => logs::run(&args, context).map(done),
        Command::Events(args) => events::run(&args, context).map(done),
        Command::Scale(args) => scale::run(&args, context).map(done),
        Command::Env(args) => env::run(&args, context).map(done),
        Command::Id(args) => id::run(&args, context).map(done),
        Command::Pid(args) => pid::run(&args, context).map(done),
        Command::Reset(args) => reset::run(&args, context).map(done),
        Command::Save => save::save(context).map(done),
        Command::Resurrect(waiting) => save::resurrect(waiting, context).map(done),
        Command::Kill => kill::run(context).map(done),
        Command::Ping => ping::run(context).map(done),
        Command::Serve(options) => serve(options).map(done),
        Command::Init(args) => init::run(&args, context).map(done),
        Command::Startup(args) => startup::run(&args, context).map(done),
        Command::Unstartup(args) => unstartup::run(&args, context).map(done),
        Command::Upgrade(args) => upgrade::run(&args, context).map(done),
        Command::Unit(hook) => unit::run(&hook, context).map(done),
        Command::Check(args) => check::run(&args, context).map(done),
        // `parse` has taken these.
        Command::Daemon(_) | Command::Supervisor(_) => Err(CliError::Usage {
            message: "this command does not run here".to_owned(),
            cause: None,
            hint: None,
        }),
    }
}

fn serve(options: super::serve::ServeOptions) -> Result<(), CliError> {
    super::serve::run(options).map_err(|error| {
        let cause = std::error::Error::source(&error).map(ToString::to_string);
        CliError::Usage { message: error.to_string(), cause, hint: None }
    })
}

/// Prints an error for programs, on standard output beside the words on standard error.
pub(super) fn json_error(error: &CliError, terminal: &mut Terminal) {
    let refused = match error {
        // The result line has said it.
        CliError::Failed(_) | CliError::BrokenPipe | CliError::Reported(_) => return,
        CliError::Refused(refused) => refused.clone(),
        other => Refused {
            code: other.code(),
            message: other.to_string(),
            cause: other.cause(),
            hint: other.hint(),
        },
    };
    // Where standard output is closed, standard error still says it.
    let _ = json_line(&JsonLine::Refused(&refused), terminal);
}

/// Asks for a change and shows it. With `no_wait` returns as soon as the daemon has accepted it.
///
/// Returns the apps concerned; `None` where it goes on without us.
fn operate(
    request: Request,
    wording: &Wording,
    no_wait: bool,
    session: &mut Session,
    context: &mut Context,
) -> Result<Option<OperationView>, CliError> {
    // Only `apply` has a plan.
    operate_with(request, wording, Plain { no_wait, quiet: None }, session, context, |_, _, _| Ok(()))
}

/// How an operation is shown, where it is not shown in full.
struct Plain {
    /// Return as soon as the daemon has accepted it.
    no_wait: bool,
    /// For people results in these words are left out.
    quiet: Option<&'static str>,
}

/// The same with something to do when the plan is known.
fn operate_with(
    request: Request,
    wording: &Wording,
    plain: Plain,
    session: &mut Session,
    context: &mut Context,
    mut planned: impl FnMut(PlanView, bool, &mut Terminal) -> io::Result<()>,
) -> Result<Option<OperationView>, CliError> {
    let (no_wait, json) = (plain.no_wait, context.json);
    let mut progress = Progress::new(&context.terminal, context.json);
    let terminal = &mut context.terminal;
    let mut printing: Result<(), io::Error> = Ok(());
    let under_way = UnderWay::begin();
    let outcome = session.operate(request, |heard| {
        let told = match heard {
            Heard::Plan(plan) => planned(*plan, json, terminal).map(|()| Listen::On),
            Heard::Notice(text) => progress.notice(&text, terminal).map(|()| Listen::On),
            // The first step follows the save that makes the request durable.
            Heard::Step(_) if no_wait => Ok(Listen::Enough),
            Heard::Step(step) => progress.step(&step, Instant::now(), terminal).map(|()| Listen::On),
        };
        told.unwrap_or_else(|error| {
            printing = Err(error);
            // The operation does not depend on anybody watching.
            Listen::Enough
        })
    });
    drop(under_way);
    progress.clear();
    printing?;
    match outcome? {
        Outcome::Accepted => {
            if context.json {
                json_line(&JsonLine::Accepted(true), terminal)?;
            } else {
                terminal.say("Accepted; `pm list` shows how it goes.")?;
            }
            Ok(None)
        }
        Outcome::Done(view) => {
            if !json && let Some(quiet) = plain.quiet {
                let mut shown = view.clone();
                shown.apps.retain(|app| app.result != quiet);
                progress.result(&shown, terminal)?;
            } else {
                progress.result(&view, terminal)?;
            }
            let failed: Vec<FailedApp> =
                view.apps.iter().filter(|app| !app.ok).map(|app| wording.failed(app)).collect();
            if !failed.is_empty() {
                return Err(CliError::Failed(failed));
            }
            if !view.ok {
                return Err(CliError::Failed(vec![FailedApp {
                    message: format!("cannot {} everything", wording.verb),
                    failure: failure("the daemon did not say why"),
                }]));
            }
            Ok(Some(view))
        }
    }
}

/// What an operation is called in errors.
struct Wording {
    verb: &'static str,
}

impl Wording {
    const fn of(verb: Verb) -> Self {
        Self {
            verb: match verb {
                Verb::Start => "start",
                Verb::Stop => "stop",
                Verb::Restart => "restart",
                Verb::Reload => "reload",
                Verb::Delete => "delete",
            },
        }
    }

    fn failed(&self, app: &AppResult) -> FailedApp {
        FailedApp {
            message: format!("cannot {} `{}`", self.verb, app.app),
            // "superseded" and its like say all there is.
            failure: app.failure.clone().unwrap_or_else(|| failure(&app.result)),
        }
    }
}

fn failure(cause: &str) -> Failure {
    Failure {
        cause: cause.to_owned(),
        hint: None,
        last_lines: Vec::new(),
        replaced: Vec::new(),
        kept: Vec::new(),
        restored: Vec::new(),
    }
}

/// The table.
fn list_of(targets: &[String], session: &mut Session) -> Result<ListView, CliError> {
    list_with(targets, false, session)
}

/// The table, with what agents have measured or without.
fn list_with(targets: &[String], figures: bool, session: &mut Session) -> Result<ListView, CliError> {
    match session.ask(|| Request::List { targets: targets.to_vec(), figures })? {
        Answer::List(view) => Ok(view),
        _ => Err(CliError::WrongAnswer),
    }
}

/// Prints the table after a change, and where the apps concerned can be reached.
fn show_table(
    apps: &BTreeSet<AppName>,
    session: &mut Session,
    context: &mut Context,
) -> Result<(), CliError> {
    if context.json || context.terminal.look().silent {
        return Ok(());
    }
    let view = list_of(&[], session)?;
    table::print(&view, Columns::Fitting, &mut context.terminal)?;
    table::print_addresses(&view, |row| apps.contains(&row.app), &mut context.terminal)?;
    Ok(())
}

fn apps_of(view: Option<&OperationView>) -> BTreeSet<AppName> {
    view.into_iter().flat_map(|view| view.apps.iter().map(|app| app.app.clone())).collect()
}

/// Whether targets are satisfied by an empty list: `all`.
fn is_all(targets: &[String]) -> bool {
    targets.iter().all(|target| target == "all")
}

/// What to say where there is no daemon: nothing is wrong with `all`, but no name exists.
fn nothing_there(targets: &[String], context: &mut Context) -> Result<(), CliError> {
    if is_all(targets) {
        if !context.json {
            context.terminal.say("No daemon is running: nothing to do.")?;
        }
        return Ok(());
    }
    let target = targets.iter().find(|target| *target != "all").cloned().unwrap_or_default();
    Err(not_there(&target, context))
}

/// Why there is no such app where there is no daemon: there is none at all, or nobody looks after those there are.
fn not_there(target: &str, context: &Context) -> CliError {
    if state::remembers_apps(&context.home.state()) {
        CliError::NoDaemon { home: context.home.dir().to_owned() }
    } else {
        CliError::NoSuchApp { target: target.to_owned() }
    }
}
