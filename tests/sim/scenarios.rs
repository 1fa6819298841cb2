//! Stories about single promises. `check` shows what a person would see: the rows, and how the last request ended.

use std::collections::BTreeSet;
use std::sync::Arc;

use pm::model::exit::ExitReason;
use pm::model::id::Slot;
use pm::model::signal::Signal;
use pm::model::spec::{AppSpec, OnFailure, ReloadRules, Share, Strategy};
use pm::policy::vocabulary::{Command, Health, HookEnd, Retry, RunState, Selected, StepKind, Verb};

use crate::behaviour::{Behaviour, millis, secs};
use crate::specs::{Like, hooks, name, spec};
use crate::world::World;

mod gate;
mod hooks;
mod instances;
mod probes;
mod restarts;
mod stops;
mod strategies;
mod supervisors;
/// An app with these rules, online at version 1.
pub(crate) fn with_rules(like: Like, instances: u32, rules: impl FnOnce(&mut ReloadRules)) -> World {
    let mut world = World::new(1);
    world.verbose = true;
    let mut spec = spec("api", like, instances);
    rules(&mut spec.reload);
    world.start(spec);
    world.run_for(secs(3));
    world.expect_no_breach();
    world
}

fn reload(app: &str) -> Command {
    let selection = vec![Selected { app: name(app), slots: None }];
    Command::Act { verb: Verb::Reload, selection, specs: Vec::new() }
}
