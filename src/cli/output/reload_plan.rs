//! What a reload would do, for people.

use std::io;

use super::Terminal;
use super::words;
use crate::ipc::protocol::{PlannedSlotView, ReloadPlanView};

/// Prints the plans of `pm reload --dry-run`.
///
/// # Errors
/// Standard output's.
pub fn print(plans: &[ReloadPlanView], terminal: &mut Terminal) -> io::Result<()> {
    for plan in plans {
        for line in lines(plan) {
            terminal.say(&line)?;
        }
    }
    terminal.say("Nothing was changed.")
}

fn lines(plan: &ReloadPlanView) -> Vec<String> {
    let instances = words::count(plan.slots.len(), "instance");
    let going_on = plan.going_on.as_deref().unwrap_or_default();
    let mut lines = vec![match plan.action.as_str() {
        "start" => format!("{}: would be started with {instances}", plan.app),
        "wait" => {
            format!("{}: {} of {instances}, after the {going_on} that is going on", plan.app, manner(plan))
        }
        "refuse" => format!("{}: would be refused, because a {going_on} is going on", plan.app),
        _ => format!("{}: {} of {instances}", plan.app, manner(plan)),
    }];
    let mut say = |name: &str, text: String| lines.push(format!("  {name:<12}{text}"));
    if let Some(fault) = &plan.fault {
        say("problem", format!("an instance could not be started now: {fault}"));
    }
    if plan.action == "refuse" || plan.action == "start" {
        return lines;
    }
    say("config", if plan.changed { "changes" } else { "as it is" }.to_owned());
    for (index, slot) in plan.slots.iter().enumerate() {
        say(if index == 0 { "order" } else { "" }, slot_words(slot));
    }
    for (index, slot) in plan.given_up.iter().enumerate() {
        say(if index == 0 { "then stopped" } else { "" }, slot_words_old(slot));
    }
    say(
        "at a time",
        match plan.strategy.as_str() {
            "blue-green" => format!("all of them; up to {} at once, over when all are ready", plan.most),
            "in-place" => "1, the old one goes first".to_owned(),
            _ => format!("{}; up to {} launch or serve at once", plan.at_once, plan.most),
        },
    );
    let soak = if plan.min_healthy_ms == 0 {
        String::new()
    } else {
        format!(", and for {} after that", words::millis(plan.min_healthy_ms))
    };
    say("waits until", format!("{}{soak}", plan.ready));
    say(
        "old ones",
        if plan.reserve {
            format!(
                "in reserve until the last slot is ready, then drained; up to {} beside the others",
                plan.max_draining
            )
        } else {
            format!("drained at once; up to {} at a time", plan.max_draining)
        },
    );
    say(
        "on failure",
        match (plan.on_failure.as_str(), plan.reserve) {
            ("abort", _) => "finished slots stay new, the others stay old",
            (_, true) => "rolled back: the old ones come back from reserve",
            (_, false) => "rolled back: the old release is started again from the files it was started from",
        }
        .to_owned(),
    );
    say(
        "downtime",
        match (plan.downtime, plan.max_unavailable) {
            (true, _) => "yes, each slot while it is restarted: two of it cannot run side by side".to_owned(),
            (false, 0) => "none".to_owned(),
            (false, missing) => {
                format!("none; up to {} missing meanwhile", words::count(missing as usize, "instance"))
            }
        },
    );
    lines
}

fn manner(plan: &ReloadPlanView) -> String {
    if plan.strategy == "in-place" {
        "restart in place".to_owned()
    } else {
        format!("{} reload", plan.strategy)
    }
}

fn slot_words(slot: &PlannedSlotView) -> String {
    let next = slot.next.map_or_else(String::new, |next| format!(" -> generation {next}"));
    format!("{}{next}", slot_words_old(slot))
}

fn slot_words_old(slot: &PlannedSlotView) -> String {
    let id = slot.pm_id.map_or_else(String::new, |id| format!(" (id {id})"));
    let old = match (slot.pid, slot.generation) {
        (Some(pid), Some(generation)) => format!("pid {pid}, generation {generation}"),
        (None, Some(generation)) => format!("generation {generation}"),
        (_, None) => "not running".to_owned(),
    };
    format!("slot {}{id}: {old}", slot.slot)
}
