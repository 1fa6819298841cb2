//! Running an app's hooks: as children of the keeper, as instances are, so that nothing that they start escapes.
//!
//! A hook's process is known by an identity whose slot is `Slot::HOOK`. One that a supervisor leaves behind is ended by
//! the next one, before it runs another of the same app: nobody knows any more what was to follow.

use std::collections::HashMap;
use std::sync::Arc;

use super::World;
use super::start::NotStarted;
use crate::keeper::link::Child;
use crate::keeper::wire::{ChildState, HeldFds, ToKeeper};
use crate::model::exit::ExitReason;
use crate::model::id::{AppName, InstanceId, PmId, Slot};
use crate::model::saved::HookKind;
use crate::model::spec::{AppSpec, CommandSpec, ExecMode, ReadyRules, Runtime, Stdin};
use crate::policy::vocabulary::{Event, HookEnd};
use crate::store::state::Shell;
use crate::supervisor::tag::Tag;
use crate::sys::procfs::ProcessId;
use crate::sys::tree::Root;
use crate::sys::tree::worker::{Instance, TreeOp};

/// Which hook it is, in its environment.
const PM_HOOK: &str = "PM_HOOK";

/// Hooks that run, and those that wait for what an earlier supervisor left.
#[derive(Debug, Default)]
pub(super) struct HookProcesses {
    /// How the main process of each ended, until its tree is gone.
    ended: HashMap<InstanceId, ExitReason>,
    /// What an earlier supervisor left.
    left: Vec<InstanceId>,
    waiting: Vec<Order>,
    /// To be killed as soon as their process is known.
    doomed: Vec<InstanceId>,
}

/// A hook that is to run.
#[derive(Clone, Debug)]
pub(super) struct Order {
    pub(super) id: InstanceId,
    pub(super) kind: HookKind,
    pub(super) pm_id: PmId,
    pub(super) spec: Arc<AppSpec>,
    pub(super) errored: Option<(Slot, String)>,
    pub(super) shell: Shell,
}

impl World {
    pub(super) fn run_hook(&mut self, order: Order) -> Option<Event> {
        if self.hooks.left.iter().any(|left| left.app == order.id.app) {
            self.hooks.waiting.push(order);
            return None;
        }
        let Order { id, kind, pm_id, shell, .. } = &order;
        let spec = Arc::new(as_app(&order)?);
        tracing::info!(app = %id.app, hook = %kind, "hook runs");
        match self.start(id, *pm_id, &spec, 0, shell) {
            Ok(_) => None,
            Err(NotStarted { error, .. }) => {
                tracing::warn!(app = %id.app, hook = %kind, %error, "hook not started");
                Some(Event::HookEnded { id: id.clone(), end: HookEnd::Failed(error) })
            }
        }
    }

    pub(super) fn kill_hook(&mut self, id: &InstanceId) -> Option<Event> {
        let waiting = self.hooks.waiting.len();
        self.hooks.waiting.retain(|order| order.id != *id);
        if self.hooks.waiting.len() < waiting {
            return Some(Event::HookEnded { id: id.clone(), end: HookEnd::Failed("killed".to_owned()) });
        }
        if self.runs.get(id).is_some_and(|run| run.process.is_none()) {
            self.hooks.doomed.push(id.clone());
        }
        self.ask_tree(id, TreeOp::KillAll);
        None
    }

    /// The process of a hook is known.
    pub(super) fn hook_spawned(&mut self, id: &InstanceId) {
        if self.hooks.doomed.iter().any(|doomed| doomed == id) {
            self.hooks.doomed.retain(|doomed| doomed != id);
            self.ask_tree(id, TreeOp::KillAll);
        }
    }

    /// The main process has ended; what it left behind goes with it.
    pub(super) fn hook_exited(&mut self, id: &InstanceId, reason: ExitReason) {
        self.hooks.ended.insert(id.clone(), reason);
        let grace = super::LEFTOVERS_GRACE;
        self.ask_tree(id, TreeOp::EndLeftovers { signal: crate::model::signal::Signal::TERM, grace });
    }

    /// Nothing of it is left, and what it wrote is read.
    pub(super) fn hook_gone(&mut self, id: &InstanceId) -> Event {
        let end = match self.hooks.ended.remove(id) {
            Some(ExitReason::Code(0)) => HookEnd::Succeeded,
            Some(reason) => HookEnd::Failed(reason.to_string()),
            None => HookEnd::Failed(ExitReason::Unknown.to_string()),
        };
        tracing::info!(app = %id.app, ?end, "hook ended");
        self.forget(id);
        Event::HookEnded { id: id.clone(), end }
    }

    /// A hook that an earlier supervisor was waiting for.
    pub(super) fn end_left_hook(&mut self, child: &Child, tag: &Tag) {
        tracing::warn!(app = %tag.id.app, pid = child.pid, "a hook of an earlier supervisor is ended");
        let main = ProcessId { pid: child.pid.cast_signed(), start_ticks: child.start_ticks };
        if matches!(child.state, ChildState::Exited(_)) {
            self.tell_keeper(&ToKeeper::Confirm { pid: child.pid, fds: HeldFds::Release });
        }
        let root = Root { main, token: tag.token(), group: self.groups.existing(tag) };
        self.hooks.left.push(tag.id.clone());
        self.trees.ask(Instance { id: tag.id.clone(), root }, TreeOp::KillAll);
    }

    /// What an earlier supervisor left is gone: who waited for that may run.
    pub(super) fn left_hook_gone(&mut self, id: &InstanceId) -> Option<Event> {
        let index = self.hooks.left.iter().position(|left| left == id)?;
        self.hooks.left.swap_remove(index);
        let app: &AppName = &id.app;
        if self.hooks.left.iter().any(|left| left.app == *app) {
            return None;
        }
        let waiting = self.hooks.waiting.iter().position(|order| order.id.app == *app)?;
        let order = self.hooks.waiting.swap_remove(waiting);
        self.run_hook(order)
    }
}

/// What stands before each line that a hook writes.
pub(super) fn mark(id: &InstanceId, spec: &AppSpec) -> String {
    match spec.env.vars.get(PM_HOOK) {
        Some(hook) if id.slot.is_hook() => format!("[{hook}] "),
        _ => String::new(),
    }
}

/// Variables that say which instance somebody is: a hook is none.
pub(super) fn names_an_instance(name: &str, spec: &AppSpec) -> bool {
    name == spec.env.instance_var || name == "pm_id" || name == "PM_GENERATION"
}

/// The hook as an app that runs once: the app's environment and directory, and nothing that makes it serve.
fn as_app(order: &Order) -> Option<AppSpec> {
    let hook = order.spec.hooks.of(order.kind)?;
    let (program, args) = hook.argv.split_first()?;
    let command = CommandSpec {
        script: program.into(),
        interpreter: None,
        interpreter_args: Vec::new(),
        args: args.to_vec(),
        runtime: Runtime::Other,
    };
    let mut spec = AppSpec::clone(&order.spec);
    spec.command = command;
    (spec.mode, spec.listen, spec.agent, spec.stdin) = (ExecMode::Fork, Vec::new(), false, Stdin::Null);
    (spec.ready, spec.health) = (ReadyRules::default(), None);
    spec.env.increment_var = None;
    let mut set = |name: &str, value: String| spec.env.vars.insert(name.to_owned(), value);
    set(PM_HOOK, order.kind.to_string());
    set("PM_APP", order.id.app.to_string());
    if let Some((slot, reason)) = &order.errored {
        set("PM_SLOT", slot.to_string());
        set("PM_REASON", reason.clone());
    }
    Some(spec)
}
