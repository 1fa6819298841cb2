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

mod checks;
mod questions;
mod requests;
mod upgrading;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use tokio::io::Interest;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until};

use super::figures::Surveys;
use super::foreground::{FIRST_OP, Front, Wish};
use super::handle::{Ask, Replies};
use super::journal::Journal;
use super::notices::{Notices, longest_stop, status_of};
use super::operations::Operations;
use super::outcome::{operation_view, step_view};
use super::probe::Finding;
use super::publish::Publisher;
use super::saver::{SaveDone, Saver};
use super::shells::Shells;
use super::silence::{self, Silence};
use super::upgrade::{Examined, Upgrades};
use super::world::World;
use crate::dispatch::DispatchEvent;
use crate::ipc::protocol::{Answer, Refused, Reply};
use crate::keeper::link::LinkError;
use crate::keeper::wire::FromKeeper;
use crate::logs::pump::LogEvent;
use crate::model::id::{AppName, InstanceId, OpId};
use crate::model::moment::Moment;
use crate::model::status::Status;
use crate::policy::fleet::Fleet;
use crate::policy::vocabulary::{Action, AppOutcome, Command, Event, Outcome, SaveId};
use crate::store::paths::Home;
use crate::store::state::{Shell, State, StateStore};
use crate::sys::procfs::Procfs;
use crate::sys::tree::worker::TreeEvent;
use crate::sys::{clock, watch};

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
        if matches!(input, Input::Dispatch(_)) {
            self.world.dispatch_handled();
        }
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
