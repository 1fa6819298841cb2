//! The one loop that owns the fleet.
//!
//! Whatever happens arrives here as an [`Input`] or a request, becomes an `Event`, and the fleet's answer becomes
//! effects through [`World`]. Nobody else has the fleet; there are no locks around state.
//!
//! ```text
//! keeper link ─┐
//! dispatcher   ├─ Input ─┐                       ┌─ World: keeper, dispatcher, logs, trees
//! trees, logs  ┘         ├─ Event ─ Fleet ─ Action┼─ Saver (a barrier: what follows waits for it)
//! clients ── Ask ────────┘                       └─ replies to clients
//! ```

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::Interest;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until};

use super::figures::{Surveys, Then};
use super::foreground::{FIRST_OP, Front, Wish};
use super::handle::{Ask, Replies};
use super::journal::Journal;
use super::launch::{self, configured_environment};
use super::notices::{Notices, longest_stop, status_of};
use super::operations::{Known, Operations};
use super::outcome::{operation_view, refused, reload_plan_view, step_view};
use super::plan_view::plan_view;
use super::probe::Finding;
use super::publish::{Job, Publisher, Question};
use super::recovery::OperationMemo;
use super::room::{self, Need};
use super::saver::{SaveDone, Saver};
use super::shells::Shells;
use super::silence::{self, Silence};
use super::upgrade::{Examined, PM_VERSION, Subject, Then as UpgradeThen, Upgrades, Wish as UpgradeWish};
use super::variables::Variables;
use super::world::World;
use crate::dispatch::DispatchEvent;
use crate::ipc::protocol::{
    Answer, Call, KeyChange, OperationView, Refused, Reply, Request, ScaleTo, Verb as AskedVerb,
};
use crate::keeper::link::LinkError;
use crate::keeper::wire::{self, FromKeeper, UpgradeState};
use crate::logs::naming::is_merged;
use crate::logs::pump::LogEvent;
use crate::model::difference::{Weight, differences};
use crate::model::id::{AppName, InstanceId, OpId};
use crate::model::mask::ShowEnv;
use crate::model::moment::Moment;
use crate::model::saved::{SavedApp, SavedOperation};
use crate::model::spec::AppSpec;
use crate::model::spelling;
use crate::model::status::Status;
use crate::policy::fleet::Fleet;
use crate::policy::reload_plan::ReloadPlan;
use crate::policy::target::{self, NoTarget};
use crate::policy::vocabulary::{
    Action, AppOutcome, Command, Event, Outcome, Refusal, SaveId, Selected, SlotView, Verb,
};
use crate::store::environment::is_scrubbed;
use crate::store::paths::Home;
use crate::store::state::{Shell, State, StateStore};
use crate::sys::procfs::Procfs;
use crate::sys::tree::worker::TreeEvent;
use crate::sys::{clock, limits, watch};

/// Inputs handled in one turn of the loop before timers and clients get their chance.
const BATCH: usize = 256;

/// Requests taken in one turn.
const ASKS_BATCH: usize = 16;

/// Everything that reaches the driver beside requests.
#[derive(Debug)]
pub enum Input {
    /// An instance said "ready" on its notify socket or ready pipe; who heard it may want to know when that is
    /// recorded.
    SaidReady(InstanceId, Option<oneshot::Sender<()>>),
    /// An instance was asked how it is.
    Probed(Box<Finding>),
    /// What these instances use of memory, in bytes; they have a limit.
    Measured(Vec<(InstanceId, u64)>),
    /// A connection to be handed to an instance by its agent.
    HandProbe {
        /// Whom.
        id: InstanceId,
        /// The instance's end.
        socket: OwnedFd,
    },
    /// From the dispatcher.
    Dispatch(DispatchEvent),
    /// From the tree worker.
    Tree(TreeEvent),
    /// From the log pump.
    Logs(LogEvent),
    /// From the saver.
    Saved(SaveDone),
    /// A program was looked at, for an upgrade.
    Examined(Box<Examined>),
    /// A while ago the last worker of an app closed this listener.
    PerhapsUnused {
        /// Whose.
        app: AppName,
        /// Which.
        key: String,
        /// Which time.
        closing: u64,
    },
}

/// How long an answer waits for the last words of a run that failed: as long as it takes to read two full pipes, and
/// not as long as something that the run left behind may keep them open.
const LAST_WORDS: Duration = Duration::from_millis(300);

/// How long a supervisor that is to be replaced waits for the disk. What is not saved by then has not been answered.
const SAVE_PATIENCE: Duration = Duration::from_secs(1);

/// Why a supervisor cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// Nothing can be supervised without the keeper.
    #[error("link to the keeper: {0}")]
    Link(#[from] LinkError),
    /// The runtime cannot watch the link.
    #[error("cannot watch the keeper: {0}")]
    Watch(#[from] io::Error),
}

/// Where a request that the daemon makes of itself is counted.
const OWN_OP: OpId = OpId(0);

/// The owner of the fleet.
#[derive(Debug)]
pub struct Driver {
    fleet: Fleet,
    world: World,
    saver: Saver,
    publisher: Publisher,
    surveys: Surveys,
    operations: Operations,
    /// Whether the keeper answers.
    silence: Silence,
    /// Who wants to know that.
    pings: Vec<Replies>,
    journal: Journal,
    shells: Shells,
    /// Actions that wait for a save, oldest first.
    held: VecDeque<(SaveId, Vec<Action>)>,
    /// Outcomes that wait for the last words of a run, until then at most.
    unsaid: Vec<(OpId, Outcome, Moment)>,
    /// What the fleet decided in this turn of the loop, a list for each event.
    decided: VecDeque<Vec<Action>>,
    /// Events that effects raised at once.
    raised: VecDeque<Event>,
    /// The list for `resurrect`.
    dump: StateStore,
    /// The list that the disk did not take when `kill` began.
    unwritten_dump: Option<State>,
    warnings: Vec<String>,
    /// Operations of an earlier supervisor that end everything.
    kills: Vec<OpId>,
    /// What the service manager hears.
    notices: Notices,
    /// The signal that asked the daemon to end.
    terminated: Option<i32>,
    /// `Quit` was reached.
    quitting: bool,
    upgrades: Upgrades,
    /// The next supervisor waits for this one to leave, which it does when what it saves is saved, or by then.
    leaving: Option<Moment>,
    home: Home,
    keeper_wire: u16,
    inputs: mpsc::UnboundedSender<Input>,
    /// Somebody waits for this daemon's end.
    front: Option<Front>,
}

/// How a driver's life ends.
#[derive(Debug)]
pub enum Ended {
    /// Everything is down.
    Quit {
        /// As it is.
        world: Box<World>,
        /// The exit code of the daemon.
        code: u8,
    },
    /// Another program follows.
    Replaced {
        /// As it is.
        world: Box<World>,
        /// What still comes in.
        inputs: mpsc::UnboundedReceiver<Input>,
        /// The signal that had asked the daemon to end.
        terminated: Option<i32>,
    },
    /// The keeper is gone: everything goes to the next one.
    Orphaned {
        /// As it is.
        world: Box<World>,
        /// What still comes in.
        inputs: mpsc::UnboundedReceiver<Input>,
        /// The signal that had asked the daemon to end.
        terminated: Option<i32>,
    },
}

/// What the driver is made of.
#[derive(Debug)]
pub struct Parts {
    /// The fleet, restored.
    pub fleet: Fleet,
    /// Effects.
    pub world: World,
    /// Writes the state.
    pub saver: Saver,
    /// Answers questions.
    pub publisher: Publisher,
    /// The shell each app takes its environment from.
    pub shells: BTreeMap<AppName, Shell>,
    /// The list for `resurrect`.
    pub dump: StateStore,
    /// What people should know.
    pub warnings: Vec<String>,
    /// What clients wait for.
    pub operations: Operations,
    /// Events.
    pub journal: Journal,
    /// Operations of an earlier supervisor that end everything.
    pub kills: Vec<OpId>,
    /// What the service manager hears.
    pub notices: Notices,
    /// Upgrades.
    pub upgrades: Upgrades,
    /// Whose daemon.
    pub home: Home,
    /// The version of the frames that the keeper speaks.
    pub keeper_wire: u16,
    /// Where what happens arrives.
    pub inputs: mpsc::UnboundedSender<Input>,
    /// Somebody waits for this daemon's end.
    pub front: Option<Front>,
}

impl Driver {
    /// A driver that has not turned yet.
    #[must_use]
    pub fn new(parts: Parts) -> Self {
        let Parts {
            fleet,
            world,
            saver,
            publisher,
            shells,
            dump,
            warnings,
            operations,
            journal,
            kills,
            notices,
            upgrades,
            home,
            keeper_wire,
            inputs,
            front,
        } = parts;
        Self {
            fleet,
            world,
            saver,
            publisher,
            surveys: Surveys::default(),
            operations,
            silence: Silence::default(),
            pings: Vec::new(),
            journal,
            kills,
            shells: Shells::new(shells),
            held: VecDeque::new(),
            unsaid: Vec::new(),
            decided: VecDeque::new(),
            raised: VecDeque::new(),
            dump,
            unwritten_dump: None,
            warnings,
            notices,
            terminated: None,
            quitting: false,
            upgrades,
            leaving: None,
            home,
            keeper_wire,
            inputs,
            front,
        }
    }

    /// Performs what the restored fleet wants, then turns until everything is down after `kill` or SIGTERM.
    ///
    /// # Errors
    /// When the link to the keeper is broken in another way than by the keeper's end.
    pub async fn run(
        mut self,
        first: Vec<Action>,
        mut inputs: mpsc::UnboundedReceiver<Input>,
        asks: mpsc::Receiver<Ask>,
        terminate: Option<i32>,
    ) -> Result<Ended, DriverError> {
        match self.turns(first, &mut inputs, asks, terminate).await {
            Ok(()) if self.quitting => {
                let code = self.front.as_ref().map_or(0, Front::code);
                Ok(Ended::Quit { world: Box::new(self.world), code })
            }
            Ok(()) => {
                Ok(Ended::Replaced { world: Box::new(self.world), inputs, terminated: self.terminated })
            }
            Err(DriverError::Link(LinkError::Closed)) => {
                Ok(Ended::Orphaned { world: Box::new(self.world), inputs, terminated: self.terminated })
            }
            Err(error) => Err(error),
        }
    }

    async fn turns(
        &mut self,
        first: Vec<Action>,
        inputs: &mut mpsc::UnboundedReceiver<Input>,
        mut asks: mpsc::Receiver<Ask>,
        terminate: Option<i32>,
    ) -> Result<(), DriverError> {
        let keeper = watch::descriptor(self.world.keeper_fd()?, Interest::READABLE | Interest::WRITABLE)?;
        self.decided.push_back(first);
        self.note_news();
        for op in std::mem::take(&mut self.kills) {
            let command = self.kill_command();
            self.turn(Event::Asked { op, command });
        }
        if let Some(signal) = terminate {
            self.terminate(signal);
        }
        self.begin();
        self.settle();
        if let Some(text) = self.notices.up(self.world.keeper_pid(), &status_of(&self.fleet)) {
            self.world.notify(text);
        }
        if self.upgrades.is_on_trial() {
            self.world.took_over();
        }
        while !self.quitting && !self.leaves() {
            self.give_notice();
            let words = self.unsaid.iter().map(|(_, _, until)| *until).min();
            let answer = if self.is_waited_for() { self.silence.next_deadline() } else { None };
            let others = words
                .into_iter()
                .chain(answer)
                .chain(self.surveys.next_deadline())
                .chain(self.notices.next_deadline())
                .chain(self.leaving);
            let deadline = self.fleet.next_deadline().into_iter().chain(others).min().map(instant_of);
            tokio::select! {
                biased;
                // An exit outranks a grace period that has just run out: a worker that left in time must not be
                // reported as killed.
                ready = keeper.readable() => {
                    let mut ready = ready?;
                    for _ in 0..BATCH {
                        match self.world.receive()? {
                            Some(message) => self.told_by_keeper(message),
                            None => { ready.clear_ready(); break; }
                        }
                    }
                }
                // What had no room goes out when there is some.
                ready = keeper.writable(), if self.world.wants_room() => ready?.clear_ready(),
                Some(input) = inputs.recv() => {
                    self.happened(input);
                    for _ in 0..BATCH {
                        let Ok(input) = inputs.try_recv() else { break };
                        self.happened(input);
                    }
                }
                () = sleep_until(deadline.unwrap_or_else(far_future)), if deadline.is_some() => {
                    self.turn(Event::DeadlineReached);
                }
                Some(ask) = asks.recv(), if self.leaving.is_none() => self.asked(ask),
            }
            // Apps that talk without end do not keep clients waiting.
            for _ in 0..ASKS_BATCH {
                if self.leaving.is_some() {
                    break;
                }
                let Ok(ask) = asks.try_recv() else { break };
                self.asked(ask);
            }
            self.settle();
            self.mind_the_keeper();
            for job in self.surveys.ready(clock::now()) {
                self.publisher.ask(job);
            }
            self.world.flush()?;
        }
        Ok(())
    }

    /// Does what a daemon in the foreground was started for.
    fn begin(&mut self) {
        let first = self.front.as_ref().filter(|front| front.is_open()).map(Front::first_requests);
        for request in first.unwrap_or_default() {
            let (replies, _) = mpsc::unbounded_channel();
            if let Err(refused) = self.answer(FIRST_OP, request, &replies) {
                if let Some(front) = &mut self.front {
                    front.refused(&refused);
                }
                return self.turn(Event::Asked { op: OWN_OP, command: Command::Terminate });
            }
        }
    }

    /// A daemon in the foreground ends with its apps.
    fn end_with_apps(&mut self) {
        let Some(front) = self.front.as_mut().filter(|front| front.is_open()) else { return };
        // What waits for the disk may start something.
        if !self.held.is_empty() {
            return;
        }
        if let Some(finished) = self.fleet.finished() {
            front.finished(clock::now(), &finished);
            self.raised.push_back(Event::Asked { op: OWN_OP, command: Command::Terminate });
        }
    }

    fn is_waited_for(&self) -> bool {
        self.operations.is_waited_for() || !self.pings.is_empty()
    }

    /// Nobody waits for a keeper that does not answer.
    fn mind_the_keeper(&mut self) {
        if !self.is_waited_for() {
            return;
        }
        match self.silence.due(clock::now()) {
            silence::Due::Nothing => {}
            silence::Due::Ask(request) => self.world.ask_keeper(request),
            silence::Due::Tell => {
                let refused = keeper_hangs(
                    self.world.keeper_pid(),
                    "What was asked for goes on when it answers again.",
                );
                tracing::warn!(pid = self.world.keeper_pid(), "the keeper does not answer");
                self.operations.tell_all(&refused);
                for client in self.pings.drain(..) {
                    let _ = client.send(Reply::Refused(refused.clone()));
                }
            }
        }
    }

    fn pong(&self) -> Answer {
        Answer::Pong {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            daemon_pid: self.world.keeper_pid(),
            supervisor_pid: std::process::id(),
            warnings: self.warnings(),
        }
    }

    fn give_notice(&mut self) {
        let Self { fleet, notices, world, .. } = self;
        let due = notices.due(clock::now(), fleet.changed(), || status_of(fleet));
        if due.beat {
            world.beat();
        }
        if let Some(text) = due.text {
            world.notify(text);
        }
    }

    /// The daemon begins to end, which takes as long as its slowest app.
    fn announce_end(&mut self) {
        if let Some(text) = self.notices.ends(clock::now(), longest_stop(&self.fleet)) {
            self.world.notify(text);
        }
    }

    /// Ends a turn of the loop: the blob, then what is to be done, then the events that this raised. In this order,
    /// because a supervisor that dies in between must not have done to a process what the next one cannot know of.
    fn settle(&mut self) {
        loop {
            self.end_with_apps();
            while let Some(event) = self.raised.pop_front() {
                self.turn(event);
            }
            if self.decided.is_empty() {
                break;
            }
            self.record(clock::now());
            while let Some(actions) = self.decided.pop_front() {
                self.perform(actions);
            }
        }
        let now = clock::now();
        self.answer_ended(now, self.quitting);
        for (op, ended) in self.operations.end_inherited(now, &self.fleet) {
            self.journal.ended(now, op, &ended);
        }
        self.record(now);
    }

    /// Writes the blob; what it has now of events may be in the file before the blob changes again.
    fn record(&mut self, now: Moment) {
        self.world.record(now, &self.fleet, &self.operations, &self.journal);
        self.journal.hand_over();
    }

    fn note_news(&mut self) {
        for news in self.fleet.take_news() {
            let asked = if news.op.is_none() { self.operations.about(&news.app) } else { None };
            if let Some(front) = &mut self.front {
                front.heard(&news);
            }
            self.journal.news(news, asked);
        }
    }

    /// Lets the fleet decide; what it decides is done when the loop's turn ends.
    fn turn(&mut self, event: Event) {
        let actions = self.fleet.handle(clock::now(), event);
        self.note_news();
        if !actions.is_empty() {
            self.decided.push_back(actions);
        }
    }

    fn perform(&mut self, actions: Vec<Action>) {
        let mut actions = actions.into_iter();
        while let Some(action) = actions.next() {
            match action {
                Action::Save { save, state } => {
                    let shells = self.shells_of(&state);
                    self.saver.save(save, State { fleet: state, shells });
                    self.held.push_back((save, actions.collect()));
                    return;
                }
                Action::Progress { op, step } => {
                    let step = step_view(step);
                    self.operations.tell(op, || Reply::Progress(step.clone()));
                }
                Action::Reply { op, outcome } => self.end(op, outcome),
                Action::Quit => {
                    if let Some(state) = self.unwritten_dump.take() {
                        // The client knows already that it may not be there.
                        let _ = self
                            .dump
                            .save(&state)
                            .inspect_err(|error| tracing::error!(%error, "list not saved"));
                    }
                    self.quitting = true;
                }
                action => {
                    let now = clock::now();
                    self.raised.extend(self.world.perform(now, action, self.shells.present()));
                }
            }
        }
    }

    fn shells_of(&self, state: &crate::model::saved::SavedFleet) -> BTreeMap<AppName, Shell> {
        state
            .apps
            .iter()
            .filter_map(|app| {
                Some((app.spec.name.clone(), self.shells.present().get(&app.spec.name)?.clone()))
            })
            .collect()
    }

    fn saved(&mut self, done: SaveDone) {
        while self.held.front().is_some_and(|(save, _)| *save <= done.save) {
            let Some((save, actions)) = self.held.pop_front() else { return };
            match &done.result {
                Ok(()) => {
                    if let Some(front) = &self.front {
                        front.saved();
                    }
                    let fleet = &self.fleet;
                    self.shells.retain(|app| fleet.knows(app));
                    self.world.retain(|app| fleet.knows(app));
                    self.decided.push_back(actions);
                    self.raised.push_back(Event::Saved { save });
                }
                Err(error) => {
                    tracing::error!(%error, "state not saved");
                    self.raised.push_back(Event::SaveFailed { save, error: error.clone() });
                }
            }
        }
    }

    fn end(&mut self, op: OpId, outcome: Outcome) {
        self.shells.ended(op, &outcome);
        if op == FIRST_OP
            && let Some(front) = &mut self.front
            && !front.started(&outcome, !self.fleet.saved().apps.is_empty())
        {
            self.raised.push_back(Event::Asked { op: OWN_OP, command: Command::Terminate });
        }
        if op != OWN_OP {
            self.unsaid.push((op, outcome, clock::now() + LAST_WORDS));
        }
    }

    /// Answers what can be answered: the last words of a run that failed may still be on their way through its pipes.
    fn answer_ended(&mut self, now: Moment, all: bool) {
        let waits = |outcome: &Outcome| {
            let Outcome::Failed { apps } = outcome else { return false };
            apps.iter().any(|(_, outcome)| match outcome {
                AppOutcome::Failed { id, .. } => self.world.is_being_read(id),
                _ => false,
            })
        };
        let ready: Vec<bool> =
            self.unsaid.iter().map(|(_, outcome, until)| all || now >= *until || !waits(outcome)).collect();
        for (index, ready) in ready.into_iter().enumerate().rev() {
            if ready {
                let (op, outcome, _) = self.unsaid.remove(index);
                let ended = operation_view(outcome, &self.world);
                self.journal.ended(now, op, &ended);
                self.operations.end(now, op, ended);
            }
        }
    }

    fn told_by_keeper(&mut self, message: FromKeeper) {
        if let FromKeeper::Terminate { signal } = message {
            return self.terminate(signal);
        }
        if let FromKeeper::Upgraded(upgrade) = message {
            return self.upgraded(upgrade);
        }
        if let FromKeeper::Synced { request } = message {
            self.silence.answered(clock::now(), request);
            for client in std::mem::take(&mut self.pings) {
                let _ = client.send(Reply::Answer(self.pong()));
            }
            return;
        }
        if let Some(event) = self.world.told(message) {
            self.turn(event);
        }
    }

    fn terminate(&mut self, signal: i32) {
        let wish = self.front.as_mut().map_or(Wish::End, |front| front.signalled(clock::now(), signal));
        match (wish, &self.front) {
            (Wish::Reload, Some(front)) => return front.reload(),
            (Wish::EndNow, _) => {
                tracing::warn!(signal, "asked to end once more: what is left is killed");
                return self.turn(Event::Hurried);
            }
            (Wish::Nothing, _) => return,
            (Wish::End | Wish::Reload, _) => {}
        }
        tracing::info!(signal, "asked to end");
        self.journal.daemon(clock::now(), "daemon_ending", serde_json::json!({ "signal": signal }));
        self.terminated = Some(signal);
        self.announce_end();
        self.turn(Event::Asked { op: OWN_OP, command: Command::Terminate });
    }

    fn happened(&mut self, input: Input) {
        let event = match input {
            Input::SaidReady(id, recorded) => {
                self.world.tell_when_recorded(recorded);
                Some(Event::Ready { id })
            }
            Input::Dispatch(DispatchEvent::Figures { id, figures, .. }) => {
                self.surveys.answered(clock::now(), &id, *figures);
                None
            }
            Input::Probed(answer) => self.world.probed(*answer),
            Input::Measured(measured) => {
                for (id, bytes) in measured {
                    self.turn(Event::Measured { id, bytes });
                }
                None
            }
            Input::HandProbe { id, socket } => {
                self.world.hand_probe(id, socket);
                None
            }
            Input::Dispatch(event) => {
                if let DispatchEvent::ChannelClosed { id } = &event {
                    self.surveys.forget(id);
                }
                if let DispatchEvent::ListenerClosed { id, key, left: 0, .. } = &event {
                    self.world.look_later(id.app.clone(), key.clone());
                }
                self.world.dispatched(event)
            }
            Input::PerhapsUnused { app, key, closing } => {
                if self.world.was_last_closing(&app, &key, closing) && self.runs_undisturbed(&app) {
                    self.world.close_if_unused(&app, &key);
                }
                None
            }
            Input::Tree(event) => self.world.tree(event),
            Input::Logs(event) => self.world.logged(event),
            Input::Saved(done) => {
                self.saved(done);
                None
            }
            Input::Examined(examined) => {
                self.examined(*examined);
                None
            }
        };
        if let Some(event) = event {
            self.turn(event);
        }
    }

    /// Whether an app's workers close listeners because the app wants it, and not because they are going down: then
    /// their ports stay open for those that follow.
    fn runs_undisturbed(&self, app: &AppName) -> bool {
        self.fleet.app(app).is_some_and(|view| {
            view.operation.is_none()
                && view.slots.iter().all(|slot| slot.status == Status::Online && slot.draining.is_empty())
        })
    }

    fn asked(&mut self, ask: Ask) {
        let Ask { call: Call { op, request, .. }, replies } = ask;
        if let Err(refused) = self.answer(op, request, &replies) {
            let _ = replies.send(Reply::Refused(refused));
        }
    }

    fn answer(&mut self, op: OpId, request: Request, replies: &Replies) -> Result<(), Refused> {
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
            Request::Outcome { op: asked } => match self.operations.join(asked, replies) {
                Known::Joined => {}
                Known::NeverBegun => {
                    let _ = replies.send(Reply::Answer(Answer::NeverBegun));
                }
                Known::Lost => {
                    return Err(Refused {
                            code: 1,
                            message: "the outcome of this operation is not known".into(),
                            cause: Some(
                                "the supervisor was started again in the middle of it, without what it remembered; \
                                 what was begun is finished or undone"
                                    .into(),
                            ),
                            hint: Some("`pm list` shows what is true now.".into()),
                        });
                }
            },
        }
        Ok(())
    }

    /// Whether the caller gets values: it asked for them, or the daemon's setting lets everybody have them.
    fn show(&self, asked: bool) -> ShowEnv {
        (asked || self.fleet.shows_env()).into()
    }

    /// A turn in which nothing has happened saves them.
    fn settings_changed(&mut self, replies: &Replies) {
        self.turn(Event::DeadlineReached);
        let done = OperationView { ok: true, apps: Vec::new() };
        let _ = replies.send(Reply::Answer(Answer::Operation(done)));
    }

    fn env_diff(&self, target: &str) -> Result<Answer, Refused> {
        let slots = self.slots(&[target.to_owned()])?;
        let Some(slot) = slots.first() else { return Err(usage("this names no instance", None)) };
        let app = slot.spec.name.clone();
        let (Some(view), Some(run)) = (self.fleet.app(&app), &slot.view.current) else {
            return Ok(Answer::EnvDiff { app, changes: Vec::new() });
        };
        let shell = self.shells.present().get(&app).cloned().unwrap_or_default();
        let mut next = configured_environment(&view.spec, &shell, &run.id, slot.view.pm_id)
            .map_err(|error| failed("cannot tell what the next start would get", &error))?;
        let mut changes = Vec::new();
        for (name, value) in slot.env.iter().filter(|(name, _)| !is_scrubbed(name)) {
            let new = next.remove(name);
            if new.as_deref() != Some(value) {
                changes.push(KeyChange { key: name.to_owned(), old: Some(value.to_owned()), new });
            }
        }
        changes.extend(next.into_iter().map(|(key, value)| KeyChange { key, old: None, new: Some(value) }));
        Ok(Answer::EnvDiff { app, changes })
    }

    fn upgrade(&mut self, op: OpId, wish: UpgradeWish, replies: &Replies) -> Result<(), Refused> {
        if self.terminated.is_some() || self.quitting {
            return Err(Refused {
                code: 5,
                message: "the daemon is ending".to_owned(),
                cause: None,
                hint: Some("The next one that is started is the new version.".to_owned()),
            });
        }
        self.record(clock::now());
        let blob = self.world.blob_copy().map_err(|error| failed("cannot copy the live state", &error))?;
        let keeper_pid = self.world.keeper_pid();
        let subject = Subject { home: self.home.clone(), blob, keeper_pid, keeper_wire: self.keeper_wire };
        let inputs = self.inputs.clone();
        self.upgrades.begin(op, wish, replies, subject, move |examined| {
            // Fails only when the driver has ended.
            let _ = inputs.send(Input::Examined(Box::new(examined)));
        })
    }

    fn examined(&mut self, examined: Examined) {
        let op = examined.op;
        let Some((candidate, supervisor_only)) = self.upgrades.examined(examined) else { return };
        if self.terminated.is_some() {
            return self.upgrades.give_up("the daemon is ending");
        }
        let to = &candidate.findings.pm;
        tracing::info!(from = PM_VERSION, to, "upgrade begins");
        if let Some(text) = self.notices.reloading(clock::now()) {
            self.world.notify(text);
        }
        if let Err(error) = self.world.prepare_upgrade(op, PM_VERSION, supervisor_only, &candidate.program) {
            self.upgrades.give_up(&error.to_string());
        }
    }

    fn upgraded(&mut self, upgrade: wire::Upgrade) {
        match self.upgrades.told(upgrade) {
            UpgradeThen::Leave => self.leaving = Some(clock::now() + SAVE_PATIENCE),
            UpgradeThen::Stay => {
                // It may have ended between two words of the keeper.
                self.leaving = None;
                self.note_upgrade();
                if let Some(text) = self.notices.up(self.world.keeper_pid(), &status_of(&self.fleet)) {
                    self.world.notify(text);
                }
            }
            UpgradeThen::Ended => self.note_upgrade(),
        }
    }

    fn note_upgrade(&mut self) {
        if let Some(last) = self.upgrades.last() {
            let (event, fields) = upgrade_event(last);
            tracing::info!(from = last.from, to = PM_VERSION, outcome = ?last.state, "upgrade has ended");
            self.journal.daemon(clock::now(), event, fields);
        }
    }

    /// Whether it is time to make way for the next supervisor.
    fn leaves(&self) -> bool {
        self.leaving.is_some_and(|until| self.held.is_empty() || until <= clock::now())
    }

    fn command(&mut self, op: OpId, command: Command, replies: &Replies) {
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

    fn start(
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
    fn plan_reload(
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

    fn scale(&mut self, op: OpId, target: &str, to: ScaleTo, replies: &Replies) -> Result<(), Refused> {
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
    fn kill_command(&mut self) -> Command {
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
    fn listed(&self) -> State {
        let mut fleet = self.fleet.saved();
        fleet.apps.retain(|app| !is_condemned(app));
        let shells = self.shells_of(&fleet);
        State { fleet, shells }
    }

    fn write_dump(&mut self) -> Result<Answer, Refused> {
        let state = self.listed();
        let apps = u32::try_from(state.fleet.apps.len()).unwrap_or(u32::MAX);
        self.dump.save(&state).map_err(|error| failed("cannot save the list", &error))?;
        Ok(Answer::Saved { path: self.world.dump_path(), apps })
    }

    /// Apps that are new get the caller's environment.
    fn remember_shell(&mut self, specs: &[Arc<AppSpec>], shell: BTreeMap<String, String>) {
        let shell = Arc::new(shell);
        for spec in specs {
            if self.fleet.app(&spec.name).is_none() {
                self.shells.set(&spec.name, &shell);
            }
        }
    }

    /// Whether log files are merged is decided once: neither a later `scale` nor another number in the file renames them.
    fn settled(&self, specs: Vec<AppSpec>) -> Vec<Arc<AppSpec>> {
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

    /// Instances that an operation has yet to start would get another environment than those it has started.
    fn check_shell(&self, selection: &[Selected], shell: &Shell) -> Result<(), Refused> {
        for Selected { app, .. } in selection {
            if let Some(operation) = self.fleet.app(app).and_then(|view| view.operation)
                && self.shells.present().get(app) != Some(shell)
            {
                return Err(refused(&Refusal::Busy { app: app.clone(), operation }));
            }
        }
        Ok(())
    }

    /// Two apps with one address would take each other's connections.
    fn check_addresses(&self, specs: &[Arc<AppSpec>], removed: &[&AppName]) -> Result<(), Refused> {
        let running = self.fleet.view();
        for spec in specs {
            let others = running
                .iter()
                .map(|app| &app.spec)
                .filter(|other| !specs.iter().any(|spec| spec.name == other.name))
                .filter(|other| !removed.contains(&&other.name))
                .chain(specs)
                .filter(|other| other.name != spec.name);
            for other in others {
                let shared = spec.listen.iter().find(|a| other.listen.iter().any(|b| a.address == b.address));
                if let Some(listener) = shared {
                    return Err(usage(
                        &format!("`{}` and `{}` both listen on {}", other.name, spec.name, listener.address),
                        Some("Give one of them another address, or delete it first."),
                    ));
                }
            }
        }
        Ok(())
    }

    /// What would leave no descriptors for what runs is not begun. `specs` run when this is done, and the named slots too.
    fn check_room(&self, specs: &[Arc<AppSpec>], selection: &[Selected]) -> Result<(), Refused> {
        let Ok(limit) = limits::open_files() else { return Ok(()) };
        let count = |slots: usize| u64::try_from(slots).unwrap_or(u64::MAX);
        let (mut now, mut then) = (Need::default(), Need::default());
        let running = self.fleet.view();
        for app in &running {
            let is_up = |slot: &&SlotView| {
                slot.current.is_some() || !matches!(slot.status, Status::Stopped | Status::Errored)
            };
            let up = app.slots.iter().filter(is_up).count();
            now.add(&app.spec, count(up));
            let named = selection.iter().find(|selected| selected.app == app.spec.name);
            match (specs.iter().find(|spec| spec.name == app.spec.name), named) {
                (Some(spec), _) => then.add(spec, u64::from(spec.instances)),
                (None, None) => then.add(&app.spec, count(up)),
                (None, Some(selected)) => {
                    let is_named = |slot: &&SlotView| {
                        is_up(slot) || selected.slots.as_ref().is_none_or(|slots| slots.contains(&slot.slot))
                    };
                    then.add(&app.spec, count(app.slots.iter().filter(is_named).count()));
                }
            }
        }
        for spec in specs {
            if spec.autostart && !running.iter().any(|app| app.spec.name == spec.name) {
                then.add(spec, u64::from(spec.instances));
            }
        }
        match room::refusal(limit.soft, now, then) {
            None => Ok(()),
            Some((cause, hint)) => Err(Refused {
                code: 1,
                message: "there are not enough descriptors for so many instances".to_owned(),
                cause: Some(cause),
                hint: Some(hint),
            }),
        }
    }

    fn announce_downtime(
        &self,
        verb: AskedVerb,
        selection: &[Selected],
        specs: &[Arc<AppSpec>],
        replies: &Replies,
    ) {
        if verb != AskedVerb::Reload {
            return;
        }
        for Selected { app, .. } in selection {
            let Some(view) = self.fleet.app(app) else { continue };
            let spec = specs.iter().find(|spec| spec.name == *app).unwrap_or(&view.spec);
            let runs = view.slots.iter().any(|slot| slot.current.is_some());
            if runs && !spec.can_overlap() {
                let _ = replies.send(Reply::Notice(format!(
                    "`{app}` is restarted in place, with downtime: two of it cannot run side by side. Set `listen` and \
                     take the socket from LISTEN_FDS, or use cluster mode, to reload without it."
                )));
            }
        }
    }

    fn known(&self) -> Vec<target::Known> {
        self.fleet
            .view()
            .iter()
            .map(|app| target::Known {
                name: app.spec.name.clone(),
                namespace: app.spec.namespace.clone(),
                pm_ids: app.slots.iter().map(|slot| slot.pm_id).collect(),
            })
            .collect()
    }

    fn select(&self, targets: &[String]) -> Result<Vec<Selected>, Refused> {
        target::resolve_all(targets, &self.known()).map_err(|error| match error {
            NoTarget::Unknown(_) | NoTarget::NoMatch(_) => Refused {
                code: 3,
                message: error.to_string(),
                cause: None,
                hint: Some(self.hint_for(&error)),
            },
            NoTarget::Pattern { .. } => usage(&error.to_string(), None),
        })
    }

    fn hint_for(&self, error: &NoTarget) -> String {
        let known = self.known();
        let names = known.iter().map(|app| app.name.as_str());
        let meant = match error {
            NoTarget::Unknown(target) => spelling::closest(target, names),
            NoTarget::NoMatch(_) | NoTarget::Pattern { .. } => None,
        };
        match meant {
            Some(name) => format!("Did you mean `{name}`? `pm list` shows what there is."),
            None => "`pm list` shows what there is.".to_owned(),
        }
    }

    fn slots(&self, targets: &[String]) -> Result<Vec<super::publish::SlotInfo>, Refused> {
        let selection = if targets.is_empty() { None } else { Some(self.select(targets)?) };
        let wanted = |app: &AppName, slot| match &selection {
            None => true,
            Some(selection) => selection.iter().any(|chosen| {
                chosen.app == *app && chosen.slots.as_ref().is_none_or(|slots| slots.contains(&slot))
            }),
        };
        let now = clock::now();
        let mut infos = Vec::new();
        for app in self.fleet.view() {
            for slot in &app.slots {
                if wanted(&app.spec.name, slot.slot) {
                    infos.push(self.world.slot_info(now, &app, slot.clone()));
                }
            }
        }
        Ok(infos)
    }

    /// What people should know whichever app they ask about.
    fn daemon_warnings(&self) -> Vec<String> {
        let unsaved = self.fleet.unsaved().map(|why| {
            format!(
                "the list on disk is not this one: {why}. What was stopped or deleted since would start again after a \
                 reboot. It is tried again every 2 s"
            )
        });
        self.warnings.iter().cloned().chain(unsaved).collect()
    }

    /// What people should know about the daemon and all of its apps.
    fn warnings(&self) -> Vec<String> {
        let mut warnings = self.daemon_warnings();
        warnings.extend(self.world.warnings());
        warnings
    }

    fn publish(&mut self, question: Question, targets: &[String], replies: &Replies) -> Result<(), Refused> {
        let slots = self.slots(targets)?;
        let warnings = match question {
            // Each instance has notes of its own.
            Question::Describe(_) => self.daemon_warnings(),
            Question::List { .. } | Question::Jlist(_) => self.warnings(),
        };
        let job = Job { question, slots, warnings, now: clock::now(), replies: replies.clone() };
        if let Question::List { figures: false } = question {
            self.publisher.ask(job);
            return Ok(());
        }
        match self.surveys.begin(job) {
            Then::Answer(job) => self.publisher.ask(*job),
            Then::Ask { ids, ask } => self.world.ask_figures(ids, ask),
        }
        Ok(())
    }
}

/// An upgrade in the stream of events.
fn upgrade_event(upgrade: &wire::Upgrade) -> (&'static str, serde_json::Value) {
    let (event, keeper, reason) = match &upgrade.state {
        UpgradeState::Failed { reason } => ("upgrade_failed", "unchanged", Some(reason)),
        UpgradeState::KeeperStays { reason } => ("daemon_upgraded", "unchanged", Some(reason)),
        UpgradeState::Supervisor => ("daemon_upgraded", "unchanged", None),
        UpgradeState::Pending | UpgradeState::Both => ("daemon_upgraded", "replaced", None),
    };
    let to = PM_VERSION;
    (event, serde_json::json!({ "from": upgrade.from, "to": to, "keeper": keeper, "reason": reason }))
}

fn is_condemned(app: &SavedApp) -> bool {
    app.operation == Some(SavedOperation::Delete)
}

fn whole(app: &AppName) -> Selected {
    Selected { app: app.clone(), slots: None }
}

fn pairs(variables: &Variables) -> BTreeMap<String, String> {
    variables.iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
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

fn keeper_hangs(pid: u32, and: &str) -> Refused {
    let state = Procfs::new().stat(pid.cast_signed()).ok().flatten().map_or(b'?', |stat| stat.state);
    let cause = match state {
        b'T' | b't' => format!("its keeper (pid {pid}) is stopped, as by SIGSTOP or a debugger"),
        _ => format!("its keeper (pid {pid}) has said nothing for 3 seconds"),
    };
    Refused {
        code: 4,
        message: "the daemon is not responding".to_owned(),
        cause: Some(cause),
        hint: Some(format!(
            "{and} `kill -CONT {pid}` lets it go on; `kill -9 {pid}` has it replaced. The apps run on either way."
        )),
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

fn usage(message: &str, hint: Option<&str>) -> Refused {
    Refused { code: 2, message: message.to_owned(), cause: None, hint: hint.map(str::to_owned) }
}

fn failed(message: &str, error: &dyn std::error::Error) -> Refused {
    Refused { code: 1, message: message.to_owned(), cause: Some(error.to_string()), hint: None }
}

/// The runtime's clock and ours are both CLOCK_MONOTONIC.
fn instant_of(moment: Moment) -> Instant {
    Instant::now() + moment.since(clock::now())
}

fn far_future() -> Instant {
    Instant::now() + Duration::from_secs(3600)
}
