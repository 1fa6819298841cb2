//! `pm check`: what is wrong with a config file, or what it would start.

use crate::cli::Context;
use crate::cli::args::Check;
use crate::cli::error::CliError;
use crate::cli::output::words;
use crate::cli::specs::Wishes;
use crate::config::words::quote;
use crate::model::mask;
use crate::model::spec::AppSpec;
use crate::sys::cgroup::root::of_machine;
use crate::sys::users;

pub(super) fn run(args: &Check, context: &mut Context) -> Result<(), CliError> {
    let resolved = Wishes::of_file(&args.options).check(&args.file)?;
    if context.json {
        let show = context.surroundings.show_env.into();
        let specs: Vec<AppSpec> = resolved.iter().map(|app| mask::spec(&app.spec, show)).collect();
        let text = serde_json::to_string(&specs).map_err(std::io::Error::other)?;
        return Ok(context.terminal.data_line(&text)?);
    }
    let terminal = &mut context.terminal;
    for app in &resolved {
        for warning in &app.warnings {
            terminal.error_line("warning:", warning)?;
        }
        for warning in on_this_machine(&app.spec) {
            terminal.error_line("warning:", &format!("{}: {warning}", app.spec.name))?;
        }
        terminal.say(&summary(&app.spec))?;
    }
    terminal.say(&format!(
        "{}: {}, no problems.",
        args.file.display(),
        words::count(resolved.len(), "app")
    ))?;
    Ok(())
}

/// What of an app's rules cannot be had here, whoever runs the daemon.
fn on_this_machine(spec: &AppSpec) -> Vec<String> {
    let rules = &spec.process;
    let mut doubts = Vec::new();
    if rules.changes_user()
        && let Err(error) = users::account(rules.user.as_deref(), rules.group.as_deref())
    {
        doubts.push(error.to_string());
    }
    let effect = if rules.limits.required {
        "so the app will not start here"
    } else {
        "so it will not be enforced here"
    };
    let machine = of_machine();
    for (key, _, controller) in rules.limits.set() {
        match &machine {
            Some((_, controllers)) if controllers.contains(&controller) => {}
            Some((mount, _)) => doubts.push(format!(
                "limits.{key} needs the `{controller}` controller, which cgroup v2 at {} does not have, {effect}",
                mount.display()
            )),
            None => doubts.push(format!("limits.{key} needs cgroup v2, which is not mounted, {effect}")),
        }
    }
    doubts
}

/// "api: 2 instances (cluster) of node server.js in /srv/api, listens on 0.0.0.0:3000, reload without downtime".
fn summary(spec: &AppSpec) -> String {
    let mode = spec.mode;
    let command = &spec.command;
    let script = command.script.display().to_string();
    let line: Vec<String> = command
        .interpreter
        .iter()
        .chain(&command.interpreter_args)
        .chain([&script])
        .chain(&command.args)
        .map(|word| quote(word))
        .collect();
    let instances = words::count(usize::try_from(spec.instances).unwrap_or(usize::MAX), "instance");
    let mut text =
        format!("{}: {instances} ({mode}) of `{}` in {}", spec.name, line.join(" "), spec.cwd.display());
    if !spec.listen.is_empty() {
        let addresses: Vec<String> = spec.listen.iter().map(|listen| listen.address.to_string()).collect();
        text.push_str(&format!(", listens on {}", addresses.join(", ")));
    }
    text.push_str(if spec.can_overlap() { ", reload without downtime" } else { ", reload means downtime" });
    if !spec.autostart {
        text.push_str(", not started until asked for by name");
    }
    text
}
