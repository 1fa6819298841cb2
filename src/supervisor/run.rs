//! A supervisor's life: take over what is there, drive the fleet, hand over or end.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use interprocess::local_socket::tokio::Listener;
use interprocess::local_socket::{GenericFilePath, ListenerOptions, ToFsName};
use interprocess::os::unix::local_socket::ListenerOptionsExt;
use interprocess::os::unix::uds_local_socket::tokio::Listener as UdsListener;
use tokio::sync::mpsc;

use super::blob::Blob;
use super::blob_memory::{BlobMemory, HALVES};
use super::driver::{Driver, DriverError, Ended, Input, Parts};
use super::foreground::{self, Front};
use super::handle::{Ask, SupervisorHandle};
use super::journal::Journal;
use super::listeners::Listeners;
use super::notices::Notices;
use super::operations::Operations;
use super::publish::Publisher;
use super::saver::Saver;
use super::tag::HomeMark;
use super::takeover::{self, Attended};
use super::upgrade::Upgrades;
use super::world::adopt::Legacy;
use super::world::{Tools, World};
use crate::ipc::protocol::{Refused, Reply};
use crate::keeper::link::{Inventory, Link, LinkError};
use crate::keeper::wire::{Hello, ToKeeper};
use crate::metrics::host::available_cpus;
use crate::model::foreground::Foreground;
use crate::model::saved::{Memo, SavedFleet};
use crate::model::signal::Signal;
use crate::policy::fleet::{Fleet, Settings};
use crate::store::events::{FILE_MAX, unended_operations};
use crate::store::paths::{Home, user_name};
use crate::store::state::{Loaded, StateError, StateStore};
use crate::sys::cgroup::root::{ROOT_VARIABLE, Root};
use crate::sys::{clock, limits, memory, orphans, peer, poll};
use crate::{dispatch, logs, node};

/// Descriptors that there is room for from the beginning: hundreds of instances, and 33 KiB of the kernel's memory.
const DESCRIPTOR_TABLE: u64 = 4096;

/// The keeper's names of the two ends between which connections wait.
const SHELF: [&str; 2] = ["shelf:in", "shelf:out"];

/// The keeper's name of the command line's socket.
const SOCKET: &str = "sock";

/// How long log lines may take to reach their files when the daemon ends.
const LOGS_PATIENCE: Duration = Duration::from_secs(5);

/// How long clients may take to read their last answer when the daemon ends.
const CLIENTS_PATIENCE: Duration = Duration::from_secs(2);

/// What an earlier daemon left has this long after the kill signal: a command that waits for us gives up after 4 s.
const ORPHANS_GRACE: Duration = Duration::from_secs(2);

/// How long a supervisor that cannot read its state says so, before the next one tries. Longer than what the keeper
/// takes for a crash.
const REFUSING: Duration = Duration::from_secs(3);

/// Why a supervisor could not begin, or go on.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The keeper.
    #[error("link to the keeper: {0}")]
    Link(#[from] LinkError),
    /// The saved state.
    #[error(transparent)]
    State(#[from] StateError),
    /// Anything of the operating system.
    #[error("cannot {step}: {source}")]
    Io {
        /// What was tried.
        step: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The driver.
    #[error(transparent)]
    Driver(#[from] DriverError),
}

fn step(step: &'static str) -> impl Fn(io::Error) -> RunError {
    move |source| RunError::Io { step, source }
}

/// Runs a supervisor until the daemon is told to end, or has nothing left to do in the foreground; returns the daemon's
/// exit code. `serve` accepts commands on the socket.
///
/// # Errors
/// When something that it cannot do without fails; the keeper starts the next one then.
pub fn run<S>(
    home: &Home,
    attended: Attended,
    foreground: Option<Foreground>,
    serve: impl FnOnce(Listener, SupervisorHandle) -> S,
) -> Result<u8, RunError>
where
    S: Future<Output = ()> + Send + 'static,
{
    memory::be_frugal();
    let mut link = Link::inherited()?;
    let inventory = link.handshake()?;
    poll::ignore_sigxfsz().map_err(step("ignore SIGXFSZ"))?;
    limits::raise_open_files().map_err(step("raise the limit of open files"))?;
    let table = DESCRIPTOR_TABLE.max(2 * u64::try_from(inventory.held.len()).unwrap_or(0));
    if let Err(error) = limits::lengthen_descriptor_table(&link, table) {
        tracing::warn!(%error, "accepting a connection may take long now and then");
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(step("start the runtime"))?;
    runtime.block_on(supervise(home, Manner { attended, foreground }, link, inventory, serve))
}

/// How the daemon was started.
struct Manner {
    attended: Attended,
    foreground: Option<Foreground>,
}

async fn supervise<S>(
    home: &Home,
    Manner { attended, foreground }: Manner,
    link: Link,
    inventory: Inventory,
    serve: impl FnOnce(Listener, SupervisorHandle) -> S,
) -> Result<u8, RunError>
where
    S: Future<Output = ()> + Send + 'static,
{
    let Inventory { hello, children, held } = inventory;
    let mut held: BTreeMap<String, OwnedFd> = held.into_iter().collect();
    if let Some(death) = &hello.last_death {
        tracing::warn!(
            pid = death.pid, status = ?death.status, lived_ms = death.lived_ms, reason = death.reason,
            "the supervisor before this one has ended; its {} processes are taken over", children.len()
        );
    }
    let mut store = StateStore::new(home.state(), home.env_dir());
    let (inputs_tx, inputs_rx) = mpsc::unbounded_channel();
    let mut link = link;
    let listener = socket_of(home, &mut link, &mut held)?;
    let loaded = match store.load() {
        Ok(loaded) => loaded,
        // Whoever ends the daemon need not repair it first.
        Err(error) if hello.terminate.is_some() => {
            tracing::error!(%error, "cannot read the state");
            Loaded::default()
        }
        Err(error) => {
            let (handle, asks) = SupervisorHandle::new();
            let server = tokio::spawn(serve(listener, handle.clone()));
            // The daemon is there, and says what is wrong: nobody needs to end it, and with it what runs.
            let notices = Notices::from_environment(hello.keeper_pid);
            if let Some(text) = notices.up(hello.keeper_pid, &format!("supervises nothing: {error}")) {
                link.try_send(&ToKeeper::Notify { text }, &[])?;
            }
            refuse_everything(&error, asks).await;
            server.abort();
            return Err(error.into());
        }
    };
    let mut warnings: Vec<String> = loaded.warning.into_iter().collect();
    if hello.without_blob {
        warnings.push(format!(
            "the supervisor has ended {} times, so it was started without what it remembered; see {}",
            hello.deaths,
            home.log_file().display()
        ));
    }
    let (blob, remembered) = blob_of(&mut link, &mut held, hello.without_blob)?;
    let log_journal = journal_of(&mut link, &mut held)?;
    let keeper = hello.keeper_pid;
    let mut tools = Tools {
        keeper_pid: keeper,
        home: home.clone(),
        agent: write_agent(home)?,
        username: user_name(peer::own_uid()),
        dispatch: dispatch::spawn(Box::new(sink(&inputs_tx, Input::Dispatch)))
            .map_err(step("start the dispatcher"))?,
        logs: logs::pump::spawn(log_journal, sink(&inputs_tx, Input::Logs))
            .map_err(step("start the log pump"))?,
        trees: crate::sys::tree::worker::TreeWorker::start(
            keeper.cast_signed(),
            sink(&inputs_tx, Input::Tree),
        )
        .map_err(step("start the tree worker"))?,
        listeners: Listeners::default(),
        inputs: inputs_tx.clone(),
        link,
        blob,
        cgroup: cgroup_of_daemon(&mut warnings),
        keeper_version: hello.version,
        open_files: hello.open_files,
        console: foreground
            .as_ref()
            .map(foreground::console)
            .transpose()
            .map_err(step("print on its own output"))?,
    };
    let [put, take] = shelf_of(&mut tools.link, &mut held)?;
    tools.dispatch.send(dispatch::Command::UseShelf { put, take });
    let logs = tools.logs.clone();
    let mut world = World::new(tools);
    let known = remembered.is_some() && !hello.without_blob;
    let told = remembered.as_ref().map(|blob| blob.told.clone()).unwrap_or_default();
    let (memo, channels, listeners, asked, journal) = match remembered {
        Some(blob) if hello.without_blob => (None, Vec::new(), blob.listeners, None, Some(blob.journal)),
        Some(blob) => (Some(blob.memo), blob.channels, blob.listeners, blob.operations, Some(blob.journal)),
        None => (None::<Memo>, Vec::new(), Vec::new(), None, None),
    };
    let mut operations = Operations::default();
    let lost = if asked.is_none() { unended_operations(&home.events()) } else { Vec::new() };
    let kills = operations.adopt(asked, &loaded.state.fleet);
    let legacy = Legacy { children, held, channels, listeners, told, remembered: known };
    if legacy.children.is_empty()
        && let Some(warning) = end_orphans(home, &loaded.state.fleet)
    {
        warnings.push(warning);
    }
    let found = world.adopt(&loaded.state.fleet, legacy);
    logs.settle();
    let settings = Settings::for_cpus(u32::try_from(available_cpus()).unwrap_or(u32::MAX));
    let (fleet, first) = Fleet::restore(settings, clock::now(), loaded.state.fleet, memo, found);
    let (handle, asks_rx) = SupervisorHandle::new();
    let saver = Saver::start(store, sink(&inputs_tx, Input::Saved), memory::give_back)
        .map_err(step("start the saver"))?;
    let mut journal =
        Journal::start(home.events(), FILE_MAX, journal).map_err(step("start the writer of events"))?;
    let event = if hello.last_death.is_some() { "supervisor_restarted" } else { "daemon_started" };
    let pids = serde_json::json!({ "pid": std::process::id(), "daemon_pid": keeper, "deaths": hello.deaths });
    journal.daemon(clock::now(), event, pids);
    journal.lost(clock::now(), &lost);
    let publisher = Publisher::start(keeper.cast_signed()).map_err(step("start the publisher"))?;
    let upgrades = Upgrades::new(hello.upgrade.clone());
    let driver = Driver::new(Parts {
        fleet,
        world,
        saver,
        publisher,
        shells: loaded.state.shells,
        dump: StateStore::new(home.dump(), home.dump_env_dir()),
        warnings,
        operations,
        journal,
        kills,
        notices: Notices::from_environment(keeper),
        upgrades,
        home: home.clone(),
        keeper_wire: hello.version,
        inputs: inputs_tx.clone(),
        front: foreground.clone().map(|settings| Front::new(settings, home.clone())),
    });
    let server = tokio::spawn(serve(listener, handle.clone()));
    tracing::info!(pid = std::process::id(), home = %home.dir().display(), "supervisor is up");
    let (world, code) = match driver.run(first, inputs_rx, asks_rx, hello.terminate).await? {
        Ended::Quit { world, code } => (world, code),
        Ended::Replaced { world, inputs, terminated } => {
            server.abort();
            let _ = server.await;
            let Some((world, inputs)) = takeover::make_way(world, inputs).await? else {
                tracing::info!("replaced by the next version");
                return Ok(0);
            };
            let hello = Hello { terminate: terminated.or(hello.terminate), ..hello };
            return takeover::pass_on(home, attended, world.into_remains(hello), inputs).await.map(|()| 0);
        }
        Ended::Orphaned { world, inputs, terminated } => {
            // Who connects from now on waits for the next supervisor.
            server.abort();
            let _ = server.await;
            let mut hello = Hello { terminate: terminated.or(hello.terminate), ..hello };
            let mut attended = attended;
            if foreground.is_some() {
                // Nobody is going to start another one.
                (hello, attended) = (foreground::bequeath(hello), Attended::No);
            }
            return takeover::pass_on(home, attended, world.into_remains(hello), inputs).await.map(|()| 0);
        }
    };
    server.abort();
    handle.answered(CLIENTS_PATIENCE).await;
    if !logs.stop(LOGS_PATIENCE) {
        tracing::error!("some log lines have not reached their files");
    }
    world.quit()?;
    // From here on a command finds no daemon and may start the next one, which waits for the keeper to end. Not before
    // the keeper knows: a supervisor started anew would be behind a socket that nobody can find.
    let _ = fs::remove_file(home.sock());
    tracing::info!("daemon ends");
    Ok(code)
}

/// Without knowing what is wanted nothing may be started, and nothing ended: what runs goes on, and whoever asks is told
/// why. After a while the next supervisor looks again.
async fn refuse_everything(error: &StateError, mut asks: mpsc::Receiver<Ask>) {
    tracing::error!(%error, "cannot read the state; nothing is supervised");
    let deadline = tokio::time::Instant::now() + REFUSING;
    while let Ok(Some(ask)) = tokio::time::timeout_at(deadline, asks.recv()).await {
        // The client may have gone.
        let _ = ask.replies.send(Reply::Refused(Refused {
            code: 1,
            message: "the daemon cannot read its state, so it supervises nothing".to_owned(),
            cause: Some(error.to_string()),
            hint: Some(
                "What runs goes on. Repair the file, or move it away to begin with an empty list, which ends what runs."
                    .to_owned(),
            ),
        }));
    }
}

/// Ends what an earlier daemon left when its keeper was killed too: it cannot be adopted, and what the app's new
/// instances need (its port, its files) may be in its hands. Only a new daemon has no children.
fn end_orphans(home: &Home, saved: &SavedFleet) -> Option<String> {
    let mark = HomeMark::of(home.dir());
    let signal = |token: &str| {
        let app = saved
            .apps
            .iter()
            .find(|app| token.strip_prefix(app.spec.name.as_str()).is_some_and(|rest| rest.starts_with(':')));
        app.map_or(Signal::INT, |app| app.spec.stop.signal).number()
    };
    match orphans::end(&|token| mark.made(token), &signal, ORPHANS_GRACE) {
        Ok(found) if found.is_empty() => None,
        Ok(found) => {
            for orphan in &found {
                tracing::warn!(
                    pid = orphan.process.pid,
                    instance = orphan.token,
                    "left by an earlier daemon, ended"
                );
            }
            Some(format!(
                "the daemon before this one was killed; {} processes that it left were ended before their apps were \
                 started again",
                found.len()
            ))
        }
        Err(error) => {
            tracing::error!(%error, "cannot look for what an earlier daemon left");
            None
        }
    }
}

/// The control group that the keeper has made ours. One that cannot be used after all is said and done without.
fn cgroup_of_daemon(warnings: &mut Vec<String>) -> Option<Root> {
    let named = std::env::var_os(ROOT_VARIABLE).filter(|value| !value.is_empty()).map(PathBuf::from);
    Root::of_daemon(named.as_deref()).unwrap_or_else(|error| {
        let cause = std::error::Error::source(&error).map(|source| format!(": {source}")).unwrap_or_default();
        warnings.push(format!("instances have no control groups: {error}{cause}"));
        None
    })
}

fn sink<T: Send + 'static>(
    inputs: &mpsc::UnboundedSender<Input>,
    wrap: impl Fn(T) -> Input + Send + 'static,
) -> impl Fn(T) + Send + 'static {
    let inputs = inputs.clone();
    move |event| {
        // Fails only when the driver has ended.
        let _ = inputs.send(wrap(event));
    }
}

/// The blob to write to, and what an earlier supervisor wrote; with `without_blob` they are different ones.
fn blob_of(
    link: &mut Link,
    held: &mut BTreeMap<String, OwnedFd>,
    without_blob: bool,
) -> Result<(BlobMemory, Option<Blob>), RunError> {
    if let [Some(first), Some(second)] = HALVES.map(|name| held.remove(name)) {
        let (blob, newest) = BlobMemory::adopt([first, second]).map_err(step("read the blob"))?;
        if !without_blob {
            return Ok((blob, newest));
        }
        // Whatever the supervisors died of: without its listeners an app cannot serve, and this one may die before it has
        // written anything.
        let kept = newest.map(|blob| Blob {
            listeners: blob.listeners,
            journal: blob.journal,
            told: blob.told,
            ..Blob::default()
        });
        let blob =
            blob.replaced(kept.clone().unwrap_or_default()).map_err(step("make memory for the blob"))?;
        give_halves(link, &blob)?;
        return Ok((blob, kept));
    }
    let blob = BlobMemory::create().map_err(step("make memory for the blob"))?;
    give_halves(link, &blob)?;
    Ok((blob, None))
}

fn give_halves(link: &mut Link, blob: &BlobMemory) -> Result<(), RunError> {
    let halves = blob.descriptors().map_err(step("make memory for the blob"))?;
    for (name, half) in HALVES.iter().zip(halves) {
        hold(link, name, half.as_fd())?;
    }
    Ok(())
}

/// Where connections lie that no worker has answered for: what the keeper has, or a new one.
fn shelf_of(link: &mut Link, held: &mut BTreeMap<String, OwnedFd>) -> Result<[OwnedFd; 2], RunError> {
    if let [Some(put), Some(take)] = SHELF.map(|name| held.remove(name)) {
        return Ok([put, take]);
    }
    let ends = dispatch::shelf_ends().map_err(step("make room for connections"))?;
    for (name, end) in SHELF.iter().zip(&ends) {
        hold(link, name, end.as_fd())?;
    }
    Ok(ends)
}

/// The memory that log lines pass through: the one that the supervisor before this one had, whose last write is ended,
/// or a new one. It does not need the blob, and notices by itself when supervisors end over it.
fn journal_of(link: &mut Link, held: &mut BTreeMap<String, OwnedFd>) -> Result<logs::Journal, RunError> {
    let failed = step("make memory for log lines");
    if let Some(memory) = held.remove(logs::journal::HELD) {
        match logs::Journal::open(memory) {
            Ok(journal) => return Ok(journal),
            Err(error) => tracing::error!(%error, "the log lines that were on their way are lost"),
        }
    }
    let memory = logs::journal::create().map_err(&failed)?;
    hold(link, logs::journal::HELD, memory.as_fd())?;
    logs::Journal::open(memory).map_err(failed)
}

/// Lets the keeper hold a descriptor. One that has just died is found to be gone by the driver, who passes everything
/// on, this too.
fn hold(link: &mut Link, name: &str, fd: BorrowedFd<'_>) -> Result<(), LinkError> {
    match link.hold(name, None, fd) {
        Ok(()) | Err(LinkError::Closed) => Ok(()),
        Err(error) => Err(error),
    }
}

/// The command line's socket: the one the keeper holds, so that commands queue while no supervisor is there, or a new
/// one.
fn socket_of(
    home: &Home,
    link: &mut Link,
    held: &mut BTreeMap<String, OwnedFd>,
) -> Result<Listener, RunError> {
    let failed = step("listen for commands");
    // Somebody may have tidied up in our home: a socket without a name cannot be found.
    let is_there = fs::symlink_metadata(home.sock()).is_ok();
    if let Some(socket) = held.remove(SOCKET)
        && is_there
    {
        return Ok(UdsListener::try_from(socket).map_err(failed)?.into());
    }
    // A socket file that is there is a left-over: the lock says that we are the only daemon of this home.
    match fs::remove_file(home.sock()) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    let address = home.sock_address().map_err(&failed)?;
    let name = address.as_path().to_fs_name::<GenericFilePath>().map_err(&failed)?;
    let listener = ListenerOptions::new()
        .name(name)
        .mode(0o600)
        .reclaim_name(false)
        .create_tokio_as::<UdsListener>()
        .map_err(&failed)?;
    hold(link, SOCKET, listener.as_fd())?;
    Ok(listener.into())
}

/// Writes the preload that Node apps are started with.
fn write_agent(home: &Home) -> Result<PathBuf, RunError> {
    let path = home.run_dir().join("agent.cjs");
    // What is there already needs no room on a full disk, and no leave to write.
    if fs::read(&path).is_ok_and(|there| there == node::AGENT.as_bytes()) {
        return Ok(path);
    }
    let aside = home.run_dir().join("agent.cjs.new");
    let written = fs::write(&aside, node::AGENT)
        .and_then(|()| fs::set_permissions(&aside, fs::Permissions::from_mode(0o444)))
        .and_then(|()| fs::rename(&aside, &path));
    match written {
        Ok(()) => Ok(path),
        Err(error) => {
            let _ = fs::remove_file(&aside);
            // One of an earlier version serves until the disk takes this one.
            if fs::symlink_metadata(&path).is_err() {
                return Err(step("write the Node agent")(error));
            }
            tracing::warn!(%error, "cannot write the Node agent; the one that is there is used");
            Ok(path)
        }
    }
}
