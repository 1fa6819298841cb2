//! The plan of `apply`: one line for each app, and for each key that differs.

use std::io;

use owo_colors::Style;

use super::{Terminal, words};
use crate::config::error::quoted;
use crate::ipc::protocol::{KeyChange, MASK, Measure, PlanView, PlannedApp};

/// Prints a plan.
///
/// # Errors
/// Standard output's.
pub fn print(plan: &PlanView, file: &str, terminal: &mut Terminal) -> io::Result<()> {
    let changing = plan.apps.iter().filter(|app| app.measure != Measure::Unchanged);
    let width = changing.map(|app| app.app.as_str().chars().count()).max().unwrap_or(0);
    for app in plan.apps.iter().filter(|app| app.measure != Measure::Unchanged) {
        print_app(app, width, terminal)?;
    }
    for app in &plan.left_over {
        let text = format!("  {app} came from {file} and is not in it any more; --prune removes it.");
        terminal.say(&text)?;
    }
    terminal.say(&summary(plan, file))
}

fn print_app(app: &PlannedApp, width: usize, terminal: &mut Terminal) -> io::Result<()> {
    let (symbol, style) = match app.measure {
        Measure::Create | Measure::Start => ("+", Style::new().green()),
        Measure::Remove => ("-", Style::new().red()),
        Measure::Restart => ("~", Style::new().red()),
        Measure::Reload | Measure::Scale | Measure::Update => ("~", Style::new().yellow()),
        Measure::Unchanged => ("=", Style::new()),
    };
    let word = word(app.measure);
    let count = || words::count(usize::try_from(app.instances).unwrap_or(usize::MAX), "instance");
    let mut reasons = Vec::new();
    match app.measure {
        Measure::Create | Measure::Start => reasons.push(count()),
        Measure::Restart => reasons.push("with downtime: two of it cannot run side by side".to_owned()),
        Measure::Update => reasons.push("its processes stay".to_owned()),
        Measure::Remove | Measure::Reload | Measure::Scale | Measure::Unchanged => {}
    }
    reasons.extend(app.note.clone());
    let head = format!("{symbol} {:<width$}  {word:<7}", app.app.as_str());
    let head = terminal.on_out(&head, style);
    let indent = " ".repeat(width + 15);
    let keys = app.changes.iter().map(|change| change.key.chars().count()).max().unwrap_or(0);
    let mut lines =
        app.changes.iter().map(|change| format!("{:<keys$}  {}", change.key, value_change(change)));
    // The only reason stands beside what is done.
    let first = if reasons.is_empty() { lines.next().unwrap_or_default() } else { reasons.join("; ") };
    terminal.say(format!("  {head}  {first}").trim_end())?;
    lines.try_for_each(|line| terminal.say(&format!("{indent}{line}")))
}

/// `2 → 4`, `not set → "x"`.
#[must_use]
pub fn value_change(change: &KeyChange) -> String {
    let hidden = |value: &Option<String>| value.as_deref() == Some(MASK);
    match (hidden(&change.old), hidden(&change.new)) {
        (true, true) => return "changed (hidden)".to_owned(),
        (true, false) if change.new.is_none() => return "removed (hidden)".to_owned(),
        (false, true) if change.old.is_none() => return "added (hidden)".to_owned(),
        _ => {}
    }
    let show = |value: &Option<String>| match value {
        None => "not set".to_owned(),
        Some(text) if text.is_empty() || text.chars().any(char::is_control) || text.chars().count() > 200 => {
            quoted(text)
        }
        Some(text) => text.clone(),
    };
    format!("{} → {}", show(&change.old), show(&change.new))
}

const fn word(measure: Measure) -> &'static str {
    match measure {
        Measure::Remove => "remove",
        Measure::Create => "create",
        Measure::Start => "start",
        Measure::Reload => "reload",
        Measure::Restart => "restart",
        Measure::Scale => "scale",
        Measure::Update => "update",
        Measure::Unchanged => "unchanged",
    }
}

/// "Plan: 1 to create, 2 to reload, 3 unchanged."
fn summary(plan: &PlanView, file: &str) -> String {
    let count = |measure: Measure| plan.apps.iter().filter(|app| app.measure == measure).count();
    let unchanged = count(Measure::Unchanged);
    if !plan.changes {
        return match unchanged {
            0 => format!("Nothing of {file} is to be done."),
            1 => format!("The app is as {file} says; nothing to do."),
            _ => format!("All {unchanged} apps are as {file} says; nothing to do."),
        };
    }
    let order = [
        Measure::Remove,
        Measure::Create,
        Measure::Start,
        Measure::Reload,
        Measure::Restart,
        Measure::Scale,
        Measure::Update,
    ];
    let mut parts: Vec<String> = order
        .into_iter()
        .filter(|measure| count(*measure) > 0)
        .map(|measure| format!("{} to {}", count(measure), word(measure)))
        .collect();
    if unchanged > 0 {
        parts.push(format!("{unchanged} unchanged"));
    }
    format!("Plan: {}.", parts.join(", "))
}
