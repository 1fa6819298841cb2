//! Effects: what the fleet's actions do to processes, sockets and files, and what comes back.
//!
//! Decides nothing. Every descriptor that must outlive this supervisor is at the keeper before anybody can use it.

pub mod adopt;
mod groups;
mod hooks;
mod leaving;
mod listening;
mod memory;
mod probes;
mod shown;
mod start;
mod told;

use std::collections::{BTreeMap, HashMap, VecDeque};
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
use super::launch::{self};
use super::listeners::Listeners;
use super::operations::Operations;
use super::outside::Outside;
use super::steering::Steering;
use super::tag::{HomeMark, Tag};
use super::variables::Variables;
use crate::dispatch::{Command, DispatchHandle, Drain, Idle, InFlight, OpenListener, Token};
use crate::keeper::link::{Link, LinkError};
use crate::keeper::wire::{FromKeeper, HeldFds, ToKeeper};
use crate::logs::console::Console;
use crate::logs::naming::is_merged;
use crate::logs::pump::LogHandle;
use crate::model::id::{AppName, InstanceId, PmId};
use crate::model::moment::Moment;
use crate::model::saved::StartedFrom;
use crate::model::spec::AppSpec;
use crate::policy::fleet::Fleet;
use crate::policy::vocabulary::{Action, Event, IdleConnections, RequestsInFlight, Retry};
use crate::store::paths::Home;
use crate::store::state::Shell;
use crate::sys::cgroup::group::Group;
use crate::sys::cgroup::root::Root as CgroupRoot;
use crate::sys::limits::Limit;
use crate::sys::procfs::ProcessId;
use crate::sys::reuseport::Pick;
use crate::sys::tree::Root;
use crate::sys::tree::worker::{Instance, TreeOp, TreeWorker};
use crate::sys::{clock, guarded};
use groups::Groups;
use hooks::HookProcesses;
pub use leaving::Remains;
use memory::MemoryLimits;
pub use probes::Heard;
use probes::Probes;

/// What the app left behind when its main process ended gets the kill signal, then this long.
const LEFTOVERS_GRACE: Duration = Duration::from_secs(1);

/// Runs whose last lines are kept after they are forgotten, for the message that is being made.
const RECENT_RUNS: usize = 64;

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
    /// How often a `listen()` of it has failed.
    failed_listens: u32,
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
    /// The limit on open files that instances are started with.
    open_files: Limit,
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
    /// The limit on open files that it gives to instances.
    pub open_files: Limit,
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
            open_files,
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
            open_files,
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

    /// An event of the dispatcher is handled.
    pub fn dispatch_handled(&self) {
        self.dispatch.handled();
    }

    fn dispatch(&self, command: Command) -> Vec<Event> {
        self.dispatch.send(command);
        Vec::new()
    }

    fn ask_tree(&mut self, id: &InstanceId, op: TreeOp) {
        let Some(run) = self.runs.get_mut(id) else { return };
        run.killed |= op == TreeOp::KillAll;
        if let Some(process) = run.process {
            let root = Root { main: process, token: run.tag.token(), group: run.group.clone() };
            self.trees.ask(Instance { id: id.clone(), root }, op);
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

    fn write_pid_file(&self, app: &AppName, pm_id: PmId, pid: u32) {
        let pid_file = self.pid_file(app, pm_id);
        if let Err(error) = guarded::write_private(&pid_file, pid.to_string().as_bytes()) {
            tracing::warn!(path = %pid_file.display(), %error, "cannot write the pid file");
        }
    }

    fn pid_file(&self, app: &AppName, pm_id: PmId) -> PathBuf {
        self.home.pids_dir().join(format!("{}-{pm_id}.pid", app.file_stem()))
    }

    /// Tells the service manager, through the keeper.
    pub fn notify(&mut self, text: String) {
        self.tell_keeper(&ToKeeper::Notify { text });
    }

    /// Tells the keeper that this supervisor is alive, and will tell so again.
    pub fn beat(&mut self) {
        self.tell_keeper(&ToKeeper::Beat);
    }
}

impl World {}

/// The shell that an app takes its environment from.
fn shell_of(shells: &BTreeMap<AppName, Shell>, app: &AppName) -> Shell {
    shells.get(app).cloned().unwrap_or_default()
}

fn boot_ms_now() -> u64 {
    clock::wall_millis().saturating_sub(clock::now().nanos() / 1_000_000)
}
