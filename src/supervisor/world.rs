//! Effects: what the fleet's actions do to processes, sockets and files, and what comes back.
//!
//! Decides nothing. Every descriptor that must outlive this supervisor is at the keeper before anybody can use it.

pub mod adopt;
mod groups;
mod hooks;
mod memory;
mod probes;
mod start;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;

use super::blob::{Blob, ChannelMemo, ListenerMemo, ToldMemo};
use super::blob_memory::BlobMemory;
use super::closings::Closings;
use super::driver::Input;
use super::journal::Journal;
use super::launch::{self, FIRST_FD};
use super::listeners::{self, Listeners};
use super::operations::Operations;
use super::outcome::Witness;
use super::outside::Outside;
use super::publish::{Inside, SlotInfo};
use super::rights;
use super::steering::{self, Steering};
use super::tag::{Held, HomeMark, Tag};
use super::variables::Variables;
use crate::dispatch::{
    Command, DispatchEvent, DispatchHandle, Drain, Idle, InFlight, KeptListener, OpenListener, Part, Token,
};
use crate::keeper::link::{Inventory, Link, LinkError};
use crate::keeper::mirror::Sought;
use crate::keeper::wire::{FromKeeper, HeldFds, Hello, ToKeeper};
use crate::logs::console::Console;
use crate::logs::naming::{is_merged, log_paths};
use crate::logs::pump::{LogEvent, LogHandle};
use crate::model::id::{AppName, InstanceId, OpId, PmId};
use crate::model::moment::{Moment, millis};
use crate::model::saved::StartedFrom;
use crate::model::spec::AppSpec;
use crate::node::messages::{common_key, split_slot_key};
use crate::policy::fleet::{AppView, Fleet};
use crate::policy::vocabulary::{Action, Event, HookEnd, IdleConnections, RequestsInFlight, Retry, SlotView};
use crate::store::paths::Home;
use crate::store::state::Shell;
use crate::sys::cgroup::group::Group;
use crate::sys::cgroup::root::Root as CgroupRoot;
use crate::sys::procfs::ProcessId;
use crate::sys::reuseport::Pick;
use crate::sys::tree::Root;
use crate::sys::tree::worker::{self as tree_worker, Instance, TreeEvent, TreeOp, TreeWorker};
use crate::sys::{clock, guarded, orphans, poll};
use groups::Groups;
use hooks::HookProcesses;
use memory::MemoryLimits;
pub use probes::Heard;
use probes::Probes;

/// What the app left behind when its main process ended gets the kill signal, then this long.
const LEFTOVERS_GRACE: Duration = Duration::from_secs(1);

/// What a worker's `listen()` fails with when its listener cannot be held: EMFILE.
const NO_DESCRIPTOR: i32 = 24;

/// Runs whose last lines are kept after they are forgotten, for the message that is being made.
const RECENT_RUNS: usize = 64;

/// How long a listener stays open that an app has closed without going down.
const LISTENER_LINGER: Duration = Duration::from_secs(5);

/// How long the keeper may take to read our last words.
const DISMISSAL_PAUSE: Duration = Duration::from_millis(5);

/// A keeper that does not start the next supervisor by then hangs.
const DISMISSAL_PATIENCE: Duration = Duration::from_secs(30);

const QUIT_PATIENCE: Duration = Duration::from_secs(5);

/// How many of the last lines a failure shows.
const LAST_LINES: usize = 24;

/// One run as the effects know it.
#[derive(Debug)]
struct Run {
    spec: Arc<AppSpec>,
    tag: Tag,
    process: Option<ProcessId>,
    env: Variables,
    version: String,
    node_version: Option<String>,
    /// Tasks that wait for "ready".
    ears: Vec<AbortHandle>,
    /// The file of its notify socket.
    notify_path: Option<PathBuf>,
    /// Its control group.
    group: Option<Group>,
    /// We have killed it: that it was killed needs no other reason.
    killed: bool,
    /// Whether the dispatcher has its channel.
    channel: bool,
    /// `"ready"` was recorded.
    ready: bool,
    /// The listeners it has open, as a worker of a Node cluster.
    open: Vec<OpenListener>,
    end: End,
    /// Which of its processes got the kill signal.
    told: Option<Vec<ProcessId>>,
    /// Messages of its own that were over 16 MiB and are not read.
    skipped_lines: u64,
}

/// How far the end of a run has come: the main process and the tree can go in either order, then the pipes are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct End {
    exited: bool,
    tree_gone: bool,
    draining: bool,
}

impl Run {
    fn channel_memo(&self, id: &InstanceId) -> ChannelMemo {
        ChannelMemo {
            id: id.clone(),
            ready: self.ready,
            node_version: self.node_version.clone(),
            open: self.open.clone(),
        }
    }
}

/// The effects of one supervisor.
#[derive(Debug)]
pub struct World {
    link: Link,
    keeper_pid: u32,
    mark: HomeMark,
    home: Home,
    agent: PathBuf,
    username: String,
    inputs: UnboundedSender<Input>,
    dispatch: DispatchHandle,
    logs: LogHandle,
    trees: TreeWorker,
    listeners: Listeners,
    blob: BlobMemory,
    runs: HashMap<InstanceId, Run>,
    by_pid: HashMap<u32, InstanceId>,
    spawning: HashMap<u64, InstanceId>,
    next_request: u64,
    /// Counts what goes into the blob beside the fleet.
    changes: u64,
    /// Dispatcher tokens to acknowledge when the blob is written.
    unrecorded: Vec<Token>,
    /// Likewise when the keeper has what it was told to hold.
    unheld: Vec<Token>,
    /// Who waits for the same beside the dispatcher.
    waiting: Vec<oneshot::Sender<()>>,
    /// Listeners that workers asked for, by app and key.
    cluster_listeners: BTreeMap<(AppName, String), ListenerMemo>,
    closings: Closings,
    /// `listen_timeout` of each app, for messages.
    listen_timeouts: HashMap<AppName, Duration>,
    recent: VecDeque<InstanceId>,
    /// The wall clock when the machine was booted, as of this supervisor's start; milliseconds since 1970.
    boot_ms: u64,
    /// The address that makes most of an app's connections, where that counts.
    crowds: HashMap<AppName, IpAddr>,
    /// Which slots of apps with inherited listeners get connections.
    steering: Steering,
    /// Why a `listen()` of these runs failed.
    listen_failures: HashMap<InstanceId, String>,
    probes: Probes,
    memory: MemoryLimits,
    hooks: HookProcesses,
    /// The keeper has said that another one follows.
    successor_announced: bool,
    groups: Groups,
    outside: Outside,
    run_dir: PathBuf,
    /// Our own output, where lines of apps go to it.
    console: Option<Console>,
}

/// What a world is made of.
#[derive(Debug)]
pub struct Tools {
    /// To the keeper.
    pub link: Link,
    /// Its pid.
    pub keeper_pid: u32,
    /// The daemon's files.
    pub home: Home,
    /// The Node agent's file.
    pub agent: PathBuf,
    /// Who runs the daemon.
    pub username: String,
    /// To the driver.
    pub inputs: UnboundedSender<Input>,
    /// IPC channels and connections.
    pub dispatch: DispatchHandle,
    /// Pipes to files.
    pub logs: LogHandle,
    /// Process trees.
    pub trees: TreeWorker,
    /// Inherited listeners.
    pub listeners: Listeners,
    /// For the next supervisor.
    pub blob: BlobMemory,
    /// The control group that is ours to divide.
    pub cgroup: Option<CgroupRoot>,
    /// The version that the keeper speaks.
    pub keeper_version: u16,
    /// Our own output, where lines of apps go to it.
    pub console: Option<Console>,
}

/// What the fleet hears at once of a start.
fn begun(id: InstanceId, started: Result<StartedFrom, start::NotStarted>) -> Event {
    match started {
        Ok(from) => Event::StartedFrom { id, from },
        Err(start::NotStarted { error, retry }) => {
            tracing::warn!(instance = %id, %error, "not started");
            Event::SpawnFailed { id, error, retry }
        }
    }
}

impl World {
    /// A world without any run.
    #[must_use]
    pub fn new(tools: Tools) -> Self {
        let Tools {
            link,
            keeper_pid,
            home,
            agent,
            username,
            inputs,
            dispatch,
            logs,
            trees,
            listeners,
            blob,
            cgroup,
            keeper_version,
            console,
        } = tools;
        Self {
            link,
            keeper_pid,
            mark: HomeMark::of(home.dir()),
            outside: Outside::of(HomeMark::of(home.dir())),
            run_dir: home.run_dir(),
            home,
            agent,
            username,
            inputs,
            dispatch,
            logs,
            trees,
            listeners,
            blob,
            runs: HashMap::new(),
            by_pid: HashMap::new(),
            spawning: HashMap::new(),
            next_request: 1,
            changes: 0,
            unrecorded: Vec::new(),
            unheld: Vec::new(),
            waiting: Vec::new(),
            cluster_listeners: BTreeMap::new(),
            closings: Closings::default(),
            listen_timeouts: HashMap::new(),
            recent: VecDeque::new(),
            boot_ms: boot_ms_now(),
            crowds: HashMap::new(),
            steering: Steering::default(),
            listen_failures: HashMap::new(),
            probes: Probes::default(),
            memory: MemoryLimits::default(),
            hooks: HookProcesses::default(),
            successor_announced: false,
            groups: Groups::new(cgroup, keeper_version),
            console,
        }
    }

    /// The keeper's pid, which people know as the daemon's.
    #[must_use]
    pub const fn keeper_pid(&self) -> u32 {
        self.keeper_pid
    }

    /// Where `save` writes.
    #[must_use]
    pub fn dump_path(&self) -> PathBuf {
        self.home.dump()
    }

    /// The link, to be watched for messages.
    ///
    /// # Errors
    /// EMFILE.
    pub fn keeper_fd(&self) -> io::Result<OwnedFd> {
        self.link.as_fd().try_clone_to_owned()
    }

    /// The next message of the keeper, if there is one.
    ///
    /// # Errors
    /// When the keeper is gone or speaks nonsense.
    pub fn receive(&mut self) -> Result<Option<FromKeeper>, LinkError> {
        self.link.try_recv()
    }

    /// Sends what the keeper had no room for.
    ///
    /// # Errors
    /// When the keeper is gone.
    pub fn flush(&mut self) -> Result<(), LinkError> {
        self.link.flush()?;
        if self.link.pending() == 0 {
            // It is in the socket, which the keeper reads to its end also when we are gone.
            for token in self.unheld.drain(..) {
                self.dispatch.send(Command::Recorded { token });
            }
        }
        Ok(())
    }

    /// Whether messages to the keeper wait for room.
    #[must_use]
    pub fn wants_room(&self) -> bool {
        self.link.pending() > 0
    }

    /// Writes the blob if anything has changed, then lets the dispatcher consume what is now recorded.
    pub fn record(&mut self, now: Moment, fleet: &Fleet, operations: &Operations, journal: &Journal) {
        let Self { runs, cluster_listeners, blob, .. } = self;
        let content = || Blob {
            memo: fleet.memo(),
            channels: runs
                .iter()
                .filter(|(_, run)| run.channel)
                .map(|(id, run)| run.channel_memo(id))
                .collect(),
            listeners: cluster_listeners.values().cloned().collect(),
            told: runs.iter().filter_map(|(id, run)| Some(ToldMemo::of(id, run.told.as_ref()?))).collect(),
            operations: Some(operations.memo(now)),
            journal: journal.memo(),
        };
        if let Err(error) =
            blob.record((fleet.changed(), self.changes + operations.changes() + journal.changes()), content)
        {
            tracing::warn!(%error, "cannot write the blob");
        }
        for token in self.unrecorded.drain(..) {
            self.dispatch.send(Command::Recorded { token });
        }
        for waiting in self.waiting.drain(..) {
            // Who has gone meanwhile waits no more.
            let _ = waiting.send(());
        }
    }

    /// Says when what happens in this turn is in the blob.
    pub fn tell_when_recorded(&mut self, waiting: Option<oneshot::Sender<()>>) {
        self.waiting.extend(waiting);
    }

    /// Forgets what is kept for messages about apps that are no more.
    pub fn retain(&mut self, is_known: impl Fn(&AppName) -> bool) {
        self.listen_timeouts.retain(|app, _| is_known(app));
    }

    /// Performs one action; what is known at once comes back as events.
    pub fn perform(&mut self, now: Moment, action: Action, shells: &BTreeMap<AppName, Shell>) -> Vec<Event> {
        tracing::trace!(?action, ?now, "perform");
        match action {
            Action::Spawn { id, pm_id, spec, revision } => {
                let shell = shell_of(shells, &id.app);
                self.listen_timeouts.insert(id.app.clone(), spec.ready.listen_timeout);
                let started = self.start(&id, pm_id, &spec, revision, &shell);
                vec![begun(id, started)]
            }
            Action::SpawnFrom { id, pm_id, spec, revision, from } => {
                let shell = shell_of(shells, &id.app);
                let started = match launch::as_it_was(&spec, &from) {
                    Ok(spec) => self.start(&id, pm_id, &Arc::new(spec), revision, &shell),
                    // What the paths lead to now is what its restarts go on with, as after a crash.
                    Err(error) => Err(start::NotStarted { error: error.to_string(), retry: Retry::Backoff }),
                };
                vec![begun(id, started)]
            }
            Action::Preflight { app, check, spec } => {
                let shell = shell_of(shells, &app);
                let fault = launch::check(&spec, &shell).err().map(|error| error.to_string());
                vec![Event::Checked { app, check, fault }]
            }
            Action::TakeOver { app, spec, revision } => {
                self.follow(&app, &spec, revision);
                Vec::new()
            }
            Action::PutIn { id } => {
                if let Some(run) = self.runs.get(&id).filter(|run| run.spec.inherits_slots()) {
                    self.steering.put_in(&id, Pick::of(run.spec.balance));
                    self.listeners.steer(&id.app, &self.steering);
                    return Vec::new();
                }
                self.dispatch(Command::PutIn { id })
            }
            Action::TakeOut { id } if self.steering.is_in(&id) => {
                self.leave_out(id);
                Vec::new()
            }
            Action::TakeOut { id } => {
                if self.runs.get(&id).is_some_and(|run| run.channel) {
                    self.dispatch(Command::TakeOut { id })
                } else {
                    // Nothing is on its way to an instance that accepts by itself.
                    vec![Event::Settled { id }]
                }
            }
            Action::AskKillListeners { id, signal } => {
                self.dispatch(Command::AskKillListeners { id, signal })
            }
            Action::Drain { id, idle, patience, in_flight, websockets, within } => {
                let idle = match idle {
                    IdleConnections::Wait => Idle::Wait,
                    IdleConnections::Close => Idle::CloseNow,
                };
                let in_flight = match in_flight {
                    RequestsInFlight::Finish => InFlight::Finish,
                    RequestsInFlight::Leave => InFlight::Leave,
                };
                let drain = Drain { idle, patience, in_flight, websockets, within };
                self.dispatch(Command::Drain { id, drain })
            }
            Action::Probe { id, role, delay } => {
                self.probe(id, role, delay);
                Vec::new()
            }
            Action::RunHook { id, kind, pm_id, spec, errored } => {
                let shell = shell_of(shells, &id.app);
                let order = hooks::Order { id, kind, pm_id, spec, errored, shell };
                self.run_hook(order).into_iter().collect()
            }
            Action::KillHook { id } => self.kill_hook(&id).into_iter().collect(),
            Action::StopProbing { id } => {
                self.stop_probing(&id);
                Vec::new()
            }
            Action::WatchMemory { id, limit } => {
                self.watch_memory(id, limit);
                Vec::new()
            }
            Action::UnwatchMemory { id } => {
                self.memory.unwatch(&id);
                Vec::new()
            }
            Action::Disconnect { id } => self.dispatch(Command::Disconnect { id }),
            Action::SendShutdown { id } => self.dispatch(Command::SendShutdown { id }),
            Action::Signal { id, signal, mode } => {
                self.ask_tree(&id, TreeOp::Stop { mode, signal });
                Vec::new()
            }
            Action::Follow { id, signal } => {
                let told = self.runs.get(&id).and_then(|run| run.told.as_ref());
                if let Some(target) = told.and_then(|told| told.first().copied()) {
                    self.ask_tree(&id, TreeOp::Follow { target, signal });
                }
                Vec::new()
            }
            Action::KillTree { id } => {
                self.ask_tree(&id, TreeOp::KillAll);
                Vec::new()
            }
            Action::EndLeftovers { id, signal } => {
                self.ask_tree(&id, TreeOp::EndLeftovers { signal, grace: LEFTOVERS_GRACE });
                Vec::new()
            }
            Action::Forget { id } => {
                self.forget(&id);
                Vec::new()
            }
            Action::CloseListeners { app, keep } => {
                self.close_listeners(&app, keep.as_deref());
                Vec::new()
            }
            Action::Save { .. } | Action::Progress { .. } | Action::Reply { .. } | Action::Quit => {
                unreachable!("the driver performs these itself")
            }
        }
    }

    /// What is shown of these runs, and said of their failures, follows the new rules.
    fn follow(&mut self, app: &AppName, spec: &Arc<AppSpec>, revision: u64) {
        self.listen_timeouts.insert(app.clone(), spec.ready.listen_timeout);
        let mut redirected = Vec::new();
        for (id, run) in &mut self.runs {
            if id.app == *app && run.tag.revision == revision {
                if run.spec.logs != spec.logs || is_merged(&run.spec) != is_merged(spec) {
                    redirected.push((id.clone(), run.tag.pm_id));
                }
                // How it says that it is ready was settled when it was spawned.
                let ready = run.spec.ready.clone();
                run.spec = Arc::new(AppSpec { ready, ..AppSpec::clone(spec) });
            }
        }
        for (id, pm_id) in redirected {
            self.logs.redirect(self.route(&id, spec, pm_id));
        }
    }

    /// Asks agents what they have measured; the answers come as `DispatchEvent::Figures`.
    pub fn ask_figures(&self, ids: Vec<InstanceId>, ask: u64) {
        self.dispatch.send(Command::AskFigures { ids, ask });
    }

    fn dispatch(&self, command: Command) -> Vec<Event> {
        self.dispatch.send(command);
        Vec::new()
    }

    /// Keeps new connections from an instance that inherits sockets of its slot, and lets it accept what it has.
    fn leave_out(&mut self, id: InstanceId) {
        let run = self.runs.get(&id);
        let sockets = run.and_then(|run| self.listeners.copies(&run.spec, id.slot).ok()).unwrap_or_default();
        let is_last = self.steering.take_out(&id);
        self.listeners.steer(&id.app, &self.steering);
        let inputs = self.inputs.clone();
        tokio::spawn(async move {
            // Otherwise another instance of the slot accepts from them.
            if is_last {
                steering::emptied(sockets).await;
            }
            // Fails only when the driver has ended.
            let _ = inputs.send(Input::Dispatch(DispatchEvent::Settled { id, unanswered: 0 }));
        });
    }

    fn ask_tree(&mut self, id: &InstanceId, op: TreeOp) {
        let Some(run) = self.runs.get_mut(id) else { return };
        run.killed |= op == TreeOp::KillAll;
        if let Some(process) = run.process {
            let root = Root { main: process, token: run.tag.token(), group: run.group.clone() };
            self.trees.ask(Instance { id: id.clone(), root }, op);
        }
    }

    fn close_listeners(&mut self, app: &AppName, keep: Option<&AppSpec>) {
        if keep.is_some() {
            self.close_unserved(app);
        } else {
            self.dispatch.send(Command::CloseListeners { app: app.clone(), keys: None });
            self.cluster_listeners.retain(|(owner, _), _| owner != app);
            self.changes += 1;
            self.tell_keeper(&ToKeeper::ReleasePrefix { prefix: Listeners::key_prefix(app) });
        }
        for name in self.listeners.close(app, keep) {
            self.tell_keeper(&ToKeeper::Release { name });
        }
    }

    /// Closes what workers of the app asked for and no run of it has open any more.
    fn close_unserved(&mut self, app: &AppName) {
        let served: BTreeSet<&str> = self
            .runs
            .iter()
            .filter(|(id, _)| id.app == *app)
            .flat_map(|(_, run)| run.open.iter().map(|open| group_of(&open.key)))
            .collect();
        let keys: Vec<String> = self
            .cluster_listeners
            .keys()
            .filter(|(owner, key)| owner == app && !served.contains(group_of(key)))
            .map(|(_, key)| key.clone())
            .collect();
        self.close_keys(app, keys);
    }

    fn close_keys(&mut self, app: &AppName, keys: Vec<String>) {
        if keys.is_empty() {
            return;
        }
        // Before the keeper's copies: what waits in the socket of a slot is handed to others.
        self.dispatch.send(Command::CloseListeners { app: app.clone(), keys: Some(keys.clone()) });
        for key in keys {
            self.tell_keeper(&ToKeeper::Release { name: Listeners::key_name(app, &key) });
            self.cluster_listeners.remove(&(app.clone(), key));
        }
        self.changes += 1;
    }

    /// The last worker of an app has closed a listener that it had asked for. Most likely it is about to exit, and its
    /// successor wants the port with the clients that wait there.
    pub fn look_later(&mut self, app: AppName, key: String) {
        let closing = self.closings.note(&app, group_of(&key));
        let inputs = self.inputs.clone();
        tokio::spawn(async move {
            tokio::time::sleep(LISTENER_LINGER).await;
            // Fails only when the driver has ended.
            let _ = inputs.send(Input::PerhapsUnused { app, key, closing });
        });
    }

    /// Whether a listener was not opened and closed once more since.
    pub fn was_last_closing(&mut self, app: &AppName, key: &str, closing: u64) -> bool {
        self.closings.was_last(app, group_of(key), closing)
    }

    /// Closes a listener that no worker has open: its port is free for others, as with a genuine primary.
    pub fn close_if_unused(&mut self, app: &AppName, key: &str) {
        let group = group_of(key);
        let in_use = self
            .runs
            .iter()
            .any(|(id, run)| id.app == *app && run.open.iter().any(|open| group_of(&open.key) == group));
        if !in_use {
            let unused =
                self.cluster_listeners.keys().filter(|(owner, key)| owner == app && group_of(key) == group);
            let keys = unused.map(|(_, key)| key.clone()).collect();
            self.close_keys(app, keys);
        }
    }

    fn forget(&mut self, id: &InstanceId) {
        let Some(run) = self.runs.remove(id) else { return };
        self.stop_probing(id);
        self.memory.gone(id);
        // A release that did not come to stay leaves the file to the one that does.
        let other = self.runs.iter().filter(|(other, _)| other.app == id.app && other.slot == id.slot);
        let newest = other.max_by_key(|(other, _)| other.generation);
        let left = newest.and_then(|(_, run)| run.process);
        for ear in &run.ears {
            ear.abort();
        }
        if run.channel {
            self.dispatch.send(Command::Remove { id: id.clone() });
        }
        if let Some(process) = run.process {
            let pid = process.pid.unsigned_abs();
            self.by_pid.remove(&pid);
            self.tell_keeper(&ToKeeper::Confirm { pid, fds: HeldFds::Release });
            // Only our own run's file: a successor has written its pid there by now.
            let pid_file = self.pid_file(&id.app, run.tag.pm_id);
            if std::fs::read_to_string(&pid_file).is_ok_and(|text| text.trim() == pid.to_string()) {
                match left {
                    Some(process) => self.write_pid_file(&id.app, run.tag.pm_id, process.pid.unsigned_abs()),
                    None => drop(std::fs::remove_file(pid_file)),
                }
            }
        }
        self.tell_keeper(&ToKeeper::ReleasePrefix { prefix: run.tag.held_prefix() });
        if let Some(socket) = run.notify_path {
            let _ = std::fs::remove_file(socket);
        }
        self.groups.remove(run.group);
        self.changes += 1;
        self.recent.push_back(id.clone());
        if self.recent.len() > RECENT_RUNS
            && let Some(oldest) = self.recent.pop_front()
        {
            self.logs.forget(&oldest);
            self.listen_failures.remove(&oldest);
            self.forget_probes(&oldest);
        }
    }

    /// Asks the keeper whether it is there; it answers `Synced` with this number.
    pub fn ask_keeper(&mut self, request: u64) {
        self.tell_keeper(&ToKeeper::Sync { request });
    }

    fn tell_keeper(&mut self, message: &ToKeeper) {
        if let Err(error) = self.link.try_send(message, &[]) {
            // A broken link ends the loop at the next read; a message too long is a bug.
            tracing::error!(%error, ?message, "cannot tell the keeper");
        }
    }

    /// What the keeper's message means to the fleet.
    pub fn told(&mut self, message: FromKeeper) -> Option<Event> {
        match message {
            FromKeeper::Spawned { request, pid, start_ticks } => {
                let id = self.spawning.remove(&request)?;
                self.has_process(&id, pid, start_ticks);
                if id.slot.is_hook() {
                    self.hook_spawned(&id);
                    return None;
                }
                Some(Event::Spawned { id, pid })
            }
            FromKeeper::SpawnFailed { request, pid, failure } => {
                // One that an earlier supervisor asked for is known by its pid.
                let id = self.spawning.remove(&request).or_else(|| self.by_pid.get(&pid).cloned())?;
                let error = self.runs.get(&id).map(|run| rights::explain(failure, &run.spec));
                self.never_ran(&id);
                if id.slot.is_hook() {
                    let error = error.unwrap_or_else(|| failure.to_string());
                    return Some(Event::HookEnded { id, end: HookEnd::Failed(error) });
                }
                let retry = start::retry_of(failure.errno);
                let error = error.unwrap_or_else(|| failure.to_string());
                Some(Event::SpawnFailed { id, error, retry })
            }
            FromKeeper::Exited { pid, status, .. } => {
                let Some(id) = self.by_pid.get(&pid).cloned() else {
                    // Of no app: nobody else will confirm it.
                    self.tell_keeper(&ToKeeper::Confirm { pid, fds: HeldFds::Release });
                    return None;
                };
                let run = self.runs.get_mut(&id)?;
                run.end.exited = true;
                let reason = groups::reason_of(status, pid, run.group.as_ref(), run.killed);
                if self.steering.take_out(&id) {
                    self.listeners.steer(&id.app, &self.steering);
                }
                self.finish_logs(&id);
                if id.slot.is_hook() {
                    self.hook_exited(&id, reason);
                    return None;
                }
                Some(Event::Exited { id, reason })
            }
            FromKeeper::NotUnderstood { kind } => {
                tracing::error!(kind, "the keeper does not know a message");
                None
            }
            FromKeeper::Leaving => {
                self.successor_announced = true;
                None
            }
            FromKeeper::Hello(_)
            | FromKeeper::Upgraded(_)
            | FromKeeper::Dismissed
            | FromKeeper::Children { .. }
            | FromKeeper::Held { .. }
            | FromKeeper::InventoryEnd
            | FromKeeper::Terminate { .. }
            | FromKeeper::Synced { .. }
            | FromKeeper::Unknown { .. } => None,
        }
    }

    fn has_process(&mut self, id: &InstanceId, pid: u32, start_ticks: u64) {
        let Some(run) = self.runs.get_mut(id) else { return };
        let process = ProcessId { pid: pid.cast_signed(), start_ticks };
        run.process = Some(process);
        self.memory.appeared(id, process);
        let pm_id = run.tag.pm_id;
        self.by_pid.insert(pid, id.clone());
        if !id.slot.is_hook() {
            self.write_pid_file(&id.app, pm_id, pid);
        }
    }

    fn write_pid_file(&self, app: &AppName, pm_id: PmId, pid: u32) {
        let pid_file = self.pid_file(app, pm_id);
        if let Err(error) = guarded::write_private(&pid_file, pid.to_string().as_bytes()) {
            tracing::warn!(path = %pid_file.display(), %error, "cannot write the pid file");
        }
    }

    /// A spawn that failed leaves nothing: no descriptors, no ears, no log files held open.
    fn never_ran(&mut self, id: &InstanceId) {
        self.logs.finish(id.clone());
        self.forget(id);
    }

    /// When the main process and the tree are both gone, what is left in the pipes is read.
    fn finish_logs(&mut self, id: &InstanceId) {
        if let Some(run) = self.runs.get_mut(id)
            && run.end.exited
            && run.end.tree_gone
            && !run.end.draining
        {
            run.end.draining = true;
            self.logs.finish(id.clone());
        }
    }

    /// What the tree worker's answer means to the fleet.
    pub fn tree(&mut self, event: TreeEvent) -> Option<Event> {
        let TreeEvent { id, outcome, .. } = event;
        match outcome {
            tree_worker::Outcome::Signalled(told) => {
                tracing::debug!(instance = %id, ?told, "signalled");
                if let Some(run) = self.runs.get_mut(&id) {
                    run.told = Some(told);
                    self.changes += 1;
                }
                return None;
            }
            tree_worker::Outcome::Empty => {}
            tree_worker::Outcome::Left(left) => {
                tracing::error!(instance = %id, ?left, "processes survive SIGKILL");
            }
            tree_worker::Outcome::Failed(error) => {
                tracing::error!(instance = %id, %error, "cannot see processes");
            }
        }
        if id.slot.is_hook() && !self.runs.contains_key(&id) {
            return self.left_hook_gone(&id);
        }
        self.runs.get_mut(&id)?.end.tree_gone = true;
        self.finish_logs(&id);
        None
    }

    /// What the log pump's event means to the fleet.
    pub fn logged(&mut self, event: LogEvent) -> Option<Event> {
        match event {
            LogEvent::Drained { id } if id.slot.is_hook() => {
                self.runs.contains_key(&id).then(|| self.hook_gone(&id))
            }
            LogEvent::Drained { id } => self.runs.contains_key(&id).then_some(Event::TreeGone { id }),
            LogEvent::Trouble(trouble) => {
                tracing::warn!(
                    path = %trouble.path.display(), reason = trouble.reason, dropped = trouble.dropped,
                    "log file takes no output"
                );
                None
            }
            LogEvent::Matched { id, line } => self.line_matched(id, &line),
            LogEvent::Detached { .. } | LogEvent::Reopened => None,
        }
    }

    /// What the dispatcher's event means to the fleet.
    pub fn dispatched(&mut self, event: DispatchEvent) -> Option<Event> {
        match event {
            DispatchEvent::Ready { id, token } => {
                self.remember(&id, token, |run| run.ready = true);
                Some(Event::Ready { id })
            }
            DispatchEvent::Opened { id, open, new, token } => {
                if let Err(error) = self.hold_listeners(&id.app, new) {
                    tracing::error!(instance = %id, %error, "cannot hold a listener");
                    self.dispatch.send(Command::NotRecorded { token, errno: NO_DESCRIPTOR });
                    return None;
                }
                self.remember(&id, token, |run| {
                    run.open.retain(|known| known.key != open.key);
                    run.open.push(open);
                });
                None
            }
            DispatchEvent::Listening { id, key, address, token } => {
                let listens = |run: &mut Run| {
                    for open in run.open.iter_mut().filter(|open| Some(&open.key) == key.as_ref()) {
                        open.listening = true;
                    }
                };
                self.remember(&id, token, listens);
                let key = key.unwrap_or_else(|| address.clone());
                let known = self.cluster_listeners.get_mut(&(id.app.clone(), key.clone()));
                if let Some(listener) = known
                    && listener.address != address
                {
                    listener.address = address;
                    self.changes += 1;
                }
                Some(Event::Listening { id, key: common_key(&key).to_owned() })
            }
            DispatchEvent::ListenerClosed { id, key, left, token } => {
                self.remember(&id, token, |run| run.open.retain(|known| known.key != key));
                tracing::debug!(instance = %id, key, left, "listener closed");
                Some(Event::ListenerClosed { id, key: common_key(&key).to_owned() })
            }
            DispatchEvent::ListenFailed { id, address, errno } => {
                let why = Listeners::why_not(&address, &io::Error::from_raw_os_error(errno));
                tracing::warn!(instance = %id, why, "listen failed");
                self.listen_failures.insert(id, why);
                None
            }
            DispatchEvent::ChannelClosed { id } => Some(Event::ChannelClosed { id }),
            DispatchEvent::Settled { id, unanswered } => {
                if unanswered > 0 {
                    tracing::warn!(instance = %id, unanswered, "does not answer for connections");
                }
                Some(Event::Settled { id })
            }
            DispatchEvent::AgentHello { id, version } => {
                if let Some(run) = self.runs.get_mut(&id) {
                    run.node_version = Some(version.trim_start_matches('v').to_owned());
                    self.changes += 1;
                }
                None
            }
            DispatchEvent::KillListeners { id, count, .. } => Some(Event::KillListeners { id, count }),
            DispatchEvent::Drained { id } => Some(Event::Drained { id }),
            DispatchEvent::LongLineSkipped { id, bytes, total } => {
                if bytes > 0 {
                    tracing::warn!(instance = %id, bytes, total, "an IPC message over 16 MiB was skipped");
                }
                if let Some(run) = self.runs.get_mut(&id) {
                    run.skipped_lines = run.skipped_lines.max(total);
                    self.changes += 1;
                }
                None
            }
            DispatchEvent::Keep { id, part, file, token } => {
                self.keep(&id, part, &file, token);
                None
            }
            DispatchEvent::LineGone { id, number } => {
                let name = self.runs.get(&id).map(|run| run.tag.held_line(number));
                if let Some(name) = name {
                    self.tell_keeper(&ToKeeper::Release { name });
                }
                None
            }
            DispatchEvent::AcceptFailing { app, key, errno } => {
                let error = io::Error::from_raw_os_error(errno);
                tracing::error!(%app, key, %error, "cannot accept connections");
                None
            }
            DispatchEvent::Ended { panicked } => {
                // The next supervisor starts with a new thread; workers keep serving what they have.
                assert!(!panicked, "the dispatch thread has panicked");
                None
            }
            DispatchEvent::Crowd { app, address } => {
                match address {
                    Some(address) => self.crowds.insert(app, address),
                    None => self.crowds.remove(&app),
                };
                None
            }
            DispatchEvent::Online { .. }
            | DispatchEvent::Figures { .. }
            | DispatchEvent::UserMessage { .. }
            | DispatchEvent::MessageDropped { .. }
            | DispatchEvent::Frozen { .. } => None,
        }
    }

    /// Has the keeper hold what the next supervisor needs of an instance's channel.
    fn keep(&mut self, id: &InstanceId, part: Part, file: &OwnedFd, token: Token) {
        let held = self.runs.get(id).map(|run| {
            let name = match part {
                Part::Inbox => run.tag.held(Held::Inbox),
                Part::Line(number) => run.tag.held_line(number),
            };
            (name, run.process.map(|process| process.pid.unsigned_abs()))
        });
        let kept = held.map(|(name, owner)| self.link.hold(&name, owner, file.as_fd()));
        match kept {
            // The next keeper gets it from us.
            Some(Ok(()) | Err(LinkError::Closed)) => self.unheld.push(token),
            Some(Err(error)) => {
                tracing::error!(instance = %id, %error, "a long message cannot be held");
                self.dispatch.send(Command::NotRecorded { token, errno: NO_DESCRIPTOR });
            }
            None => self.dispatch.send(Command::NotRecorded { token, errno: NO_DESCRIPTOR }),
        }
    }

    fn remember(&mut self, id: &InstanceId, token: Token, change: impl FnOnce(&mut Run)) {
        if let Some(run) = self.runs.get_mut(id) {
            change(run);
            self.changes += 1;
        }
        self.unrecorded.push(token);
    }

    fn hold_listeners(&mut self, app: &AppName, listeners: Vec<KeptListener>) -> io::Result<()> {
        for listener in listeners {
            let KeptListener { key, data, origin, socket } = listener;
            let name = Listeners::key_name(app, &key);
            match self.link.hold(&name, None, socket.as_fd()) {
                // A keeper that is gone is no fault of the worker; the next one gets the listener from us.
                Ok(()) | Err(LinkError::Closed) => {}
                Err(error) => return Err(io::Error::other(error)),
            }
            let memo =
                ListenerMemo { app: app.clone(), key: key.clone(), data, origin, address: String::new() };
            self.cluster_listeners.insert((app.clone(), key), memo);
            self.changes += 1;
        }
        Ok(())
    }

    fn pid_file(&self, app: &AppName, pm_id: PmId) -> PathBuf {
        self.home.pids_dir().join(format!("{}-{pm_id}.pid", app.file_stem()))
    }

    /// Whether the main process of this run has ended, and what it wrote is not all read yet.
    #[must_use]
    pub fn is_being_read(&self, id: &InstanceId) -> bool {
        self.runs.get(id).is_some_and(|run| run.end.exited)
    }

    /// What people should know about the effects.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = self.unenforced_warnings();
        let dropped = self.logs.dropped_bytes();
        if dropped > 0 {
            warnings.push(format!(
                "{dropped} bytes of log output were dropped because a log file did not take them; see {}",
                self.home.log_file().display()
            ));
        }
        warnings
    }

    /// When the machine was booted: always the same answer, so that a moment is always shown as the same time, until
    /// the wall clock is set or the machine has slept.
    fn boot_ms(&self) -> u64 {
        let now = boot_ms_now();
        if now.abs_diff(self.boot_ms) > 1000 { now } else { self.boot_ms }
    }

    /// Everything there is to show about a slot.
    #[must_use]
    pub fn slot_info(&self, now: Moment, app: &AppView, view: SlotView) -> SlotInfo {
        let spec = &app.spec;
        let run = view.current.as_ref().and_then(|current| self.runs.get(&current.id));
        let merged = is_merged(spec);
        let paths = log_paths(&self.home.logs_dir(), &spec.name, &spec.logs, merged, view.pm_id);
        let boot_ms = self.boot_ms();
        let wall_of = |moment: Moment| boot_ms.saturating_add(moment.nanos() / 1_000_000);
        SlotInfo {
            spec: run.map_or_else(|| spec.clone(), |run| run.spec.clone()),
            revision: app.revision,
            process: run.and_then(|run| {
                let process = run.process?;
                Some((view.current.as_ref()?.id.clone(), process.pid, process.start_ticks))
            }),
            env: run.map(|run| run.env.clone()).unwrap_or_default(),
            out_file: paths.out,
            error_file: paths.err,
            pid_file: self.pid_file(&spec.name, view.pm_id),
            merged_logs: merged,
            created_ms: wall_of(view.created),
            started_ms: view.current.as_ref().map(|run| wall_of(run.since)),
            restart_in_ms: view.restart_at.map(|at| millis(at.since(now))),
            version: run.map_or_else(|| "N/A".to_owned(), |run| run.version.clone()),
            node_version: run.and_then(|run| run.node_version.clone()),
            agent: run
                .filter(|run| run.channel && run.node_version.is_some())
                .and(view.current.as_ref())
                .map(|run| run.id.clone()),
            inside: Inside::Unknown,
            username: self.username.clone(),
            unique_id: run.map(|run| run.tag.nonce.as_uuid()).unwrap_or_default(),
            listen: self.addresses(spec),
            crowd: self.crowds.get(&spec.name).copied(),
            skipped_lines: run.map_or(0, |run| run.skipped_lines),
            dropped: view.current.as_ref().map(|run| self.logs.dropped(&run.id)).unwrap_or_default(),
            probe: view.current.as_ref().and_then(|run| self.last_heard(&run.id)).cloned(),
            not_enforced: self.limits_not_enforced(spec),
            cgroup: run.and_then(|run| run.group.as_ref()).map(|group| group.dir().to_owned()),
            view,
        }
    }

    fn addresses(&self, spec: &AppSpec) -> Vec<String> {
        if !spec.is_node_cluster() {
            return spec.listen.iter().map(|listener| listener.address.to_string()).collect();
        }
        let mut addresses: Vec<String> = Vec::new();
        for ((app, _), listener) in &self.cluster_listeners {
            let address = &listener.address;
            if *app != spec.name || address.is_empty() {
                continue;
            }
            let address = configured(spec, address).unwrap_or_else(|| address.clone());
            // The sockets of all slots have one address.
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        addresses
    }

    /// Tells the service manager, through the keeper.
    pub fn notify(&mut self, text: String) {
        self.tell_keeper(&ToKeeper::Notify { text });
    }

    /// Tells the keeper that this supervisor is alive, and will tell so again.
    pub fn beat(&mut self) {
        self.tell_keeper(&ToKeeper::Beat);
    }

    /// A copy of what is remembered.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn blob_copy(&self) -> std::io::Result<Vec<u8>> {
        self.blob.newest()
    }

    /// Lets the keeper start the next supervisor from another program.
    ///
    /// # Errors
    /// When the keeper is gone.
    pub fn prepare_upgrade(
        &mut self,
        op: OpId,
        from: &str,
        supervisor_only: bool,
        program: &OwnedFd,
    ) -> Result<(), LinkError> {
        let message = ToKeeper::Upgrade { op: op.0, from: from.to_owned(), supervisor_only };
        self.link.try_send(&message, &[program.as_fd()])
    }

    /// This supervisor, which an upgrade has started, is up.
    pub fn took_over(&mut self) {
        self.tell_keeper(&ToKeeper::TookOver);
    }

    /// Lets the next supervisor have everything, and waits until it has. Only after everything that this one reads,
    /// writes and accepts is frozen.
    ///
    /// # Errors
    /// [`LinkError::Closed`]: the keeper is gone, and this supervisor has everything that there is.
    pub fn go(&mut self) -> Result<(), LinkError> {
        self.link.go()?;
        loop {
            while let Some(message) = self.link.try_recv()? {
                if message == FromKeeper::Dismissed {
                    return Ok(());
                }
            }
            let room = self.link.pending() > 0;
            let interest = if room { poll::Interest::ReadWrite } else { poll::Interest::Read };
            // Descriptors on their way can only be tried again; everything else is told.
            let pause = if room { DISMISSAL_PAUSE } else { DISMISSAL_PATIENCE };
            let ready = poll::wait(&[(self.link.as_fd(), interest)], Some(pause));
            let ready = ready.map_err(|source| LinkError::Io { step: "wait for the keeper", source })?;
            if !ready[0] && !room {
                return Err(LinkError::Silent);
            }
            self.link.flush()?;
        }
    }

    /// The keeper has died after [`World::go`]: whether this supervisor goes on, and not the new one.
    pub fn goes_on(&mut self) -> bool {
        self.link.goes_on()
    }

    /// The threads that have to be frozen.
    pub fn frozen_parts(&self) -> (&DispatchHandle, &LogHandle) {
        (&self.dispatch, &self.logs)
    }

    /// The keeper is gone: what it had, those who still work on it, and whether the next keeper is on its way.
    #[must_use]
    pub fn into_remains(self, hello: Hello) -> Remains {
        let missing = self.link.missing();
        if missing > 0 {
            tracing::error!(missing, "descriptors are gone with the keeper: there was no room for copies");
        }
        let estate = self.link.into_estate(hello, find_unanswered);
        Remains {
            estate,
            dispatch: self.dispatch,
            logs: self.logs,
            successor_announced: self.successor_announced,
        }
    }

    /// Ends the daemon: the keeper exits after this process.
    ///
    /// # Errors
    /// When the keeper is gone already.
    pub fn quit(mut self) -> Result<(), LinkError> {
        self.outside.remove();
        self.link.try_send(&ToKeeper::Quit, &[])?;
        let deadline = clock::now() + QUIT_PATIENCE;
        // The end of a thousand apps is more than the socket holds at once. A keeper that waits for us to read would
        // not read.
        while self.link.pending() > 0 {
            while self.link.try_recv()?.is_some() {}
            let left = deadline.since(clock::now());
            if left.is_zero() {
                return Err(LinkError::Silent);
            }
            let wait = poll::wait(&[(self.link.as_fd(), poll::Interest::ReadWrite)], Some(left));
            wait.map_err(|source| LinkError::Io { step: "wait for the keeper", source })?;
            self.link.flush()?;
        }
        Ok(())
    }
}

/// What is left of a world without a keeper.
#[derive(Debug)]
pub struct Remains {
    /// For the next keeper.
    pub estate: Inventory,
    /// Still hands connections to workers.
    pub dispatch: DispatchHandle,
    /// Still writes what apps say.
    pub logs: LogHandle,
    /// The keeper has said that another one follows.
    pub successor_announced: bool,
}

/// The processes that the keeper may have started without saying so: of those with the token, the one that started
/// first is the instance and the others are its offspring.
fn find_unanswered(sought: &[(u64, Sought)]) -> Vec<(u64, u32, u64)> {
    let tokens: BTreeMap<String, u64> = sought
        .iter()
        .filter_map(|(request, sought)| Some((Tag::decode(&sought.tag)?.token(), *request)))
        .collect();
    let mut first: BTreeMap<u64, ProcessId> = BTreeMap::new();
    let orphans = orphans::find(&|token| tokens.contains_key(token)).unwrap_or_default();
    for orphan in orphans {
        let Some(request) = tokens.get(&orphan.token) else { continue };
        let known = first.entry(*request).or_insert(orphan.process);
        if (orphan.process.start_ticks, orphan.process.pid) < (known.start_ticks, known.pid) {
            *known = orphan.process;
        }
    }
    let found = first.into_iter();
    found.map(|(request, process)| (request, process.pid.unsigned_abs(), process.start_ticks)).collect()
}

impl World {
    /// What to say of an app that asked the kernel for a socket it has been given.
    fn binds_what_it_inherits(&self, id: &InstanceId) -> Option<String> {
        let lines = self.logs.last_lines(id, LAST_LINES);
        let address = listeners::bound_again(self.listeners.of(&id.app), &lines)?;
        Some(format!(
            "it seems to bind {address} itself, but that socket is open already and waits for it as descriptor {FIRST_FD} \
             (LISTEN_FDS; docs/zero-downtime.md)"
        ))
    }
}

impl Witness for World {
    fn last_lines(&self, id: &InstanceId) -> Vec<String> {
        self.logs.last_lines(id, LAST_LINES)
    }

    fn listen_failure(&self, id: &InstanceId) -> Option<String> {
        self.listen_failures.get(id).cloned().or_else(|| self.binds_what_it_inherits(id))
    }

    fn listen_timeout(&self, app: &AppName) -> Option<Duration> {
        self.listen_timeouts.get(app).copied()
    }

    fn last_probe(&self, id: &InstanceId) -> Option<String> {
        self.last_heard(id).map(|heard| heard.finding.text.clone())
    }
}

/// The shell that an app takes its environment from.
fn shell_of(shells: &BTreeMap<AppName, Shell>, app: &AppName) -> Shell {
    shells.get(app).cloned().unwrap_or_default()
}

/// Sockets that are used or unused together: those of all slots, or the one that all slots share.
fn group_of(key: &str) -> &str {
    split_slot_key(key).map_or(key, |(common, _)| &key[..=common.len()])
}

/// The configured address behind `fd 3`, as a worker calls it that listens on one of LISTEN_FDS.
fn configured(spec: &AppSpec, address: &str) -> Option<String> {
    let fd: usize = address.strip_prefix("fd ")?.parse().ok()?;
    Some(spec.listen.get(fd.checked_sub(FIRST_FD)?)?.address.to_string())
}

fn boot_ms_now() -> u64 {
    clock::wall_millis().saturating_sub(clock::now().nanos() / 1_000_000)
}
