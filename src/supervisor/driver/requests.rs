//! Requests of clients that change something: what is checked, what becomes a command, and what is answered at once.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::super::foreground::Front;
use super::super::handle::{Ask, Replies};
use super::super::launch;
use super::super::operations::Known;
use super::super::outcome::{refused, reload_plan_view};
use super::super::plan_view::plan_view;
use super::super::publish::Question;
use super::super::recovery::OperationMemo;
use super::super::upgrade::Wish as UpgradeWish;
use super::questions::pairs;
use super::{Driver, failed, keeper_hangs, usage};
use crate::ipc::protocol::{
    Answer, Call, OperationView, Refused, Reply, Request, ScaleTo, Verb as AskedVerb,
};
use crate::logs::naming::is_merged;
use crate::model::difference::{Weight, differences};
use crate::model::id::{AppName, OpId};
use crate::model::saved::{SavedApp, SavedOperation};
use crate::model::spec::AppSpec;
use crate::policy::reload_plan::ReloadPlan;
use crate::policy::vocabulary::{Command, Event, Refusal, Selected, Verb};
use crate::store::state::State;
use crate::sys::clock;

impl Driver {
    pub(super) fn asked(&mut self, ask: Ask) {
        let Ask { call: Call { op, request, .. }, replies } = ask;
        if let Err(refused) = self.answer(op, request, &replies) {
            let _ = replies.send(Reply::Refused(refused));
        }
    }

    pub(super) fn answer(&mut self, op: OpId, request: Request, replies: &Replies) -> Result<(), Refused> {
        if needs_the_keeper(&request) && self.silence.hangs(clock::now()) {
            return Err(keeper_hangs(self.world.keeper_pid(), "Nothing was begun."));
        }
        match request {
            // Whoever is well that long ago is well.
            Request::Ping if self.silence.answered_lately(clock::now()) => {
                let _ = replies.send(Reply::Answer(self.pong()));
            }
            Request::Ping => self.pings.push(replies.clone()),
            Request::List { targets, figures } => {
                self.publish(Question::List { figures }, &targets, replies)?;
            }
            Request::Describe { targets, show_env } => {
                let show = self.show(show_env);
                self.publish(Question::Describe(show), &targets, replies)?;
            }
            Request::Jlist { targets, show_env } => {
                let show = self.show(show_env);
                self.publish(Question::Jlist(show), &targets, replies)?;
            }
            Request::EnvDiff { target } => {
                let answer = self.env_diff(&target)?;
                let _ = replies.send(Reply::Answer(answer));
            }
            Request::Env { target } => {
                let slots = self.slots(&[target])?;
                let env = slots.first().map(|slot| pairs(&slot.env)).unwrap_or_default();
                let _ = replies.send(Reply::Answer(Answer::Env(env)));
            }
            Request::LimitStarts { at_once } => {
                self.fleet.limit_starts(at_once);
                self.settings_changed(replies);
            }
            Request::ShowEnv { show } => {
                self.fleet.show_env(show);
                self.settings_changed(replies);
            }
            Request::Start { specs, shell } => self.start(op, specs, shell, replies)?,
            Request::Apply { specs, all, file, prune, act, shell, show_env } => {
                let specs = self.settled(specs);
                let plan = self.fleet.plan(&specs, &all, &file, prune);
                let shown = plan_view(&plan, self.show(show_env));
                if !act {
                    let _ = replies.send(Reply::Answer(Answer::Plan(shown)));
                    return Ok(());
                }
                let removed: Vec<&AppName> =
                    plan.steps.iter().filter(|step| step.spec.is_none()).map(|step| &step.app).collect();
                self.check_addresses(&specs, &removed)?;
                self.check_room(&specs, &[])?;
                let _ = replies.send(Reply::Plan(shown));
                self.remember_shell(&specs, shell);
                self.command(op, Command::Apply { specs, all, file, prune }, replies);
            }
            Request::Act { verb, targets, specs, shell, update_env } => {
                let specs = self.settled(specs);
                self.check_addresses(&specs, &[])?;
                let mut selection = self.select(&targets)?;
                let asked_by_file = targets.is_empty() && !specs.is_empty();
                if asked_by_file {
                    selection = specs.iter().map(|spec| whole(&spec.name)).collect();
                }
                if matches!(verb, AskedVerb::Start | AskedVerb::Restart | AskedVerb::Reload) {
                    self.check_room(&specs, &selection)?;
                }
                if let Some(shell) = shell {
                    let shell = Arc::new(shell);
                    if update_env {
                        self.check_shell(&selection, &shell)?;
                    }
                    for Selected { app, .. } in &selection {
                        if update_env {
                            self.shells.replace(op, verb == AskedVerb::Reload, app, &shell);
                        } else {
                            self.shells.give(app, &shell);
                        }
                    }
                }
                self.announce_downtime(verb, &selection, &specs, replies);
                self.command(op, Command::Act { verb: verb_of(verb), selection, specs }, replies);
            }
            Request::PlanReload { targets, specs, shell } => {
                let plan = self.plan_reload(&targets, specs, &shell)?;
                let _ = replies.send(Reply::Answer(plan));
            }
            Request::Scale { target, to } => self.scale(op, &target, to, replies)?,
            Request::Reset { targets } => {
                let selection = self.select(&targets)?;
                self.command(op, Command::Reset { selection }, replies);
            }
            Request::Upgrade { program, supervisor_only, check } => {
                self.upgrade(op, UpgradeWish { program, supervisor_only, check }, replies)?;
            }
            Request::UpgradeOutcome { op } => self.upgrades.outcome(op, replies),
            Request::Save => {
                let saved = self.write_dump()?;
                let _ = replies.send(Reply::Answer(saved));
            }
            Request::Resurrect => {
                let loaded =
                    self.dump.load().map_err(|error| failed("cannot read the saved list", &error))?;
                if let Some(warning) = loaded.warning {
                    let _ = replies.send(Reply::Notice(warning));
                }
                let specs: Vec<Arc<AppSpec>> =
                    loaded.state.fleet.apps.iter().map(|app| app.spec.clone()).collect();
                self.check_room(&specs, &[])?;
                for (app, shell) in loaded.state.shells {
                    self.shells.give(&app, &shell);
                }
                self.command(op, Command::Resurrect { saved: loaded.state.fleet }, replies);
            }
            Request::Kill => {
                let command = self.kill_command();
                self.announce_end();
                self.command(op, command, replies);
            }
            Request::Outcome { op, asked } => match self.operations.join(clock::now(), op, asked, replies) {
                Known::Joined => {}
                Known::NeverBegun => {
                    let _ = replies.send(Reply::Answer(Answer::NeverBegun));
                }
                Known::Lost => {
                    return Err(Refused {
                            code: 1,
                            message: "the outcome of this operation is not known".into(),
                            cause: Some(
                                "the supervisor was started again meanwhile, and does not remember operations of so long \
                                 ago; what was begun is finished or undone"
                                    .into(),
                            ),
                            hint: Some("`pm list` shows what is true now.".into()),
                        });
                }
            },
        }
        Ok(())
    }

    /// A turn in which nothing has happened saves them.
    pub(super) fn settings_changed(&mut self, replies: &Replies) {
        self.turn(Event::DeadlineReached);
        let done = OperationView { ok: true, apps: Vec::new() };
        let _ = replies.send(Reply::Answer(Answer::Operation(done)));
    }

    pub(super) fn command(&mut self, op: OpId, command: Command, replies: &Replies) {
        let (verb, apps) = described(&command);
        self.journal.begun(clock::now(), op, verb, &apps);
        let memo = OperationMemo::of(op, &command, &self.fleet);
        if memo.is_some() {
            // Noted before the fleet hears of it: what is not noted has never begun.
            self.operations.begin(op, memo, replies.clone());
            self.record(clock::now());
        } else {
            self.operations.begin(op, None, replies.clone());
        }
        self.turn(Event::Asked { op, command });
    }

    pub(super) fn start(
        &mut self,
        op: OpId,
        specs: Vec<AppSpec>,
        shell: BTreeMap<String, String>,
        replies: &Replies,
    ) -> Result<(), Refused> {
        let specs = self.settled(specs);
        self.check_addresses(&specs, &[])?;
        self.check_room(&specs, &[])?;
        self.remember_shell(&specs, shell);
        let selection: Vec<Selected> = specs.iter().map(|spec| whole(&spec.name)).collect();
        // A start of something that runs another program is a reload.
        let replaced = |old: &AppSpec, new: &AppSpec| {
            differences(old, new).iter().any(|difference| difference.weight == Weight::Process)
        };
        let changed: Vec<Selected> = selection
            .into_iter()
            .filter(|selected| {
                self.fleet.app(&selected.app).is_some_and(|app| {
                    specs.iter().any(|spec| spec.name == selected.app && replaced(&app.spec, spec))
                })
            })
            .collect();
        self.announce_downtime(AskedVerb::Reload, &changed, &specs, replies);
        self.command(op, Command::Start { specs }, replies);
        Ok(())
    }

    /// What a reload would do. Looks at files as a start would, and changes nothing.
    pub(super) fn plan_reload(
        &self,
        targets: &[String],
        specs: Vec<AppSpec>,
        shell: &BTreeMap<String, String>,
    ) -> Result<Answer, Refused> {
        let specs = self.settled(specs);
        self.check_addresses(&specs, &[])?;
        let mut selection = self.select(targets)?;
        if targets.is_empty() {
            selection = specs.iter().map(|spec| whole(&spec.name)).collect();
        }
        let plans = self.fleet.plan_reload(selection, &specs).map_err(|refusal| refused(&refusal))?;
        let view = |plan: ReloadPlan| {
            let shell = self.shells.present().get(&plan.app).map_or(shell, |shell| &**shell);
            let fault = launch::check(&plan.spec, shell).err().map(|error| error.to_string());
            reload_plan_view(plan, fault)
        };
        Ok(Answer::ReloadPlan(plans.into_iter().map(view).collect()))
    }

    pub(super) fn scale(
        &mut self,
        op: OpId,
        target: &str,
        to: ScaleTo,
        replies: &Replies,
    ) -> Result<(), Refused> {
        let selection = self.select(&[target.to_owned()])?;
        let [selected] = selection.as_slice() else {
            return Err(usage("scale takes one app", Some("Name one of them.")));
        };
        let app = selected.app.clone();
        let view = self.fleet.app(&app);
        // What it comes to would depend on how far the other one is; two of "one more" at once would be one more.
        if let (ScaleTo::Up(_) | ScaleTo::Down(_), Some(operation)) =
            (&to, view.as_ref().and_then(|view| view.operation))
        {
            return Err(refused(&Refusal::Busy { app, operation }));
        }
        let now = view.as_ref().map_or(0, |view| view.spec.instances);
        let instances = match to {
            ScaleTo::To(number) => number,
            ScaleTo::Up(more) => now.saturating_add(more),
            ScaleTo::Down(fewer) => now.saturating_sub(fewer),
        };
        if instances == 0 {
            return Err(usage(
                "an app has at least 1 instance",
                Some("`pm stop` keeps the app and ends its instances."),
            ));
        }
        if let Some(view) = view {
            let mut spec = AppSpec::clone(&view.spec);
            spec.instances = instances;
            self.check_room(&[Arc::new(spec)], &[])?;
        }
        self.command(op, Command::Scale { app, instances }, replies);
        Ok(())
    }

    /// Saves the list for `resurrect`, then everything may be forgotten. Nothing that is wrong with the disk keeps the daemon
    /// from ending; but then the only list there is stays.
    pub(super) fn kill_command(&mut self) -> Command {
        // An empty list would overwrite what the last `kill` saved.
        if self.fleet.saved().apps.iter().all(is_condemned) {
            return Command::Kill;
        }
        match self.dump.save(&self.listed()) {
            Ok(()) => Command::Kill,
            Err(error) => {
                // What is stopped leaves room on a full disk.
                self.unwritten_dump = Some(self.listed());
                Command::KillUnlisted { error: error.to_string() }
            }
        }
    }

    /// The list as `save` writes it. What is on its way out is no part of it; above all when `kill` is asked again by a
    /// client whose supervisor died in the middle of it.
    pub(super) fn listed(&self) -> State {
        let mut fleet = self.fleet.saved();
        fleet.apps.retain(|app| !is_condemned(app));
        let shells = self.shells_of(&fleet);
        State { fleet, shells }
    }

    pub(super) fn write_dump(&mut self) -> Result<Answer, Refused> {
        let state = self.listed();
        let apps = u32::try_from(state.fleet.apps.len()).unwrap_or(u32::MAX);
        self.dump.save(&state).map_err(|error| failed("cannot save the list", &error))?;
        Ok(Answer::Saved { path: self.world.dump_path(), apps })
    }

    /// Apps that are new get the caller's environment.
    pub(super) fn remember_shell(&mut self, specs: &[Arc<AppSpec>], shell: BTreeMap<String, String>) {
        let shell = Arc::new(shell);
        for spec in specs {
            if self.fleet.app(&spec.name).is_none() {
                self.shells.set(&spec.name, &shell);
            }
        }
    }

    /// Whether log files are merged is decided once: neither a later `scale` nor another number in the file renames them.
    pub(super) fn settled(&self, specs: Vec<AppSpec>) -> Vec<Arc<AppSpec>> {
        specs
            .into_iter()
            .map(|mut spec| {
                if self.front.is_some() {
                    Front::lead(&mut spec);
                }
                if spec.logs.merge.is_none() {
                    let known = self.fleet.app(&spec.name).and_then(|view| view.spec.logs.merge);
                    spec.logs.merge = Some(known.unwrap_or_else(|| is_merged(&spec)));
                }
                Arc::new(spec)
            })
            .collect()
    }
}

fn is_condemned(app: &SavedApp) -> bool {
    app.operation == Some(SavedOperation::Delete)
}

fn whole(app: &AppName) -> Selected {
    Selected { app: app.clone(), slots: None }
}

/// What a command is called in the stream of events, and which apps it names.
fn described(command: &Command) -> (&'static str, Vec<String>) {
    let names = |selection: &[Selected]| selection.iter().map(|one| one.app.to_string()).collect();
    match command {
        Command::Start { specs } => ("start", specs.iter().map(|spec| spec.name.to_string()).collect()),
        Command::Apply { specs, .. } => ("apply", specs.iter().map(|spec| spec.name.to_string()).collect()),
        Command::Act { verb, selection, .. } => {
            let verb = match verb {
                Verb::Start => "start",
                Verb::Stop => "stop",
                Verb::Restart => "restart",
                Verb::Reload => "reload",
                Verb::Delete => "delete",
            };
            (verb, names(selection))
        }
        Command::Scale { app, .. } => ("scale", vec![app.to_string()]),
        Command::Resurrect { saved } => {
            ("resurrect", saved.apps.iter().map(|app| app.spec.name.to_string()).collect())
        }
        Command::Kill | Command::KillUnlisted { .. } => ("kill", Vec::new()),
        Command::Terminate => ("shutdown", Vec::new()),
        Command::Reset { selection } => ("reset", names(selection)),
    }
}

/// Whether a request changes what runs.
const fn needs_the_keeper(request: &Request) -> bool {
    match request {
        Request::Start { .. }
        | Request::Act { .. }
        | Request::Scale { .. }
        | Request::Resurrect
        | Request::Ping
        | Request::Upgrade { .. }
        | Request::Kill => true,
        Request::Apply { act, .. } => *act,
        Request::List { .. }
        | Request::Describe { .. }
        | Request::Jlist { .. }
        | Request::EnvDiff { .. }
        | Request::Env { .. }
        | Request::LimitStarts { .. }
        | Request::ShowEnv { .. }
        | Request::PlanReload { .. }
        | Request::Reset { .. }
        | Request::Save
        | Request::UpgradeOutcome { .. }
        | Request::Outcome { .. } => false,
    }
}

const fn verb_of(verb: AskedVerb) -> Verb {
    match verb {
        AskedVerb::Start => Verb::Start,
        AskedVerb::Stop => Verb::Stop,
        AskedVerb::Restart => Verb::Restart,
        AskedVerb::Reload => Verb::Reload,
        AskedVerb::Delete => Verb::Delete,
    }
}
