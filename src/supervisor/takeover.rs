//! A supervisor without a keeper: it waits for the next one, starts one where nobody else does, hands everything over
//! and ends.
//!
//! ```text
//! keeper gone ─→ waits ──────────→ frozen: reads, writes, accepts nothing ─→ handed over: exits
//!                  │ nobody came       ↑   │ the new keeper died in the middle
//!                  └→ starts `pm daemon` ──┘
//! ```
//!
//! While it waits, connections still go to workers and lines to files. Instances are not started again: that is a
//! matter of milliseconds, or of two seconds under a service manager.
//!
//! The next keeper finds it at a socket in the home. Where there is no room for one (a disk that is full or read-only),
//! the keeper that it starts itself gets a connection from the beginning.

use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::driver::Input;
use super::run::RunError;
use super::world::{Remains, World};
use crate::dispatch::{Command, DispatchEvent, DispatchHandle};
use crate::keeper::handover;
use crate::keeper::link::{Inventory, LinkError};
use crate::logs::pump::LogHandle;
use crate::store::paths::Home;
use crate::sys::child::{self, Zombie};
use crate::sys::procfs::{ProcessId, Procfs};
use crate::sys::spawn::{self, Confinement, Program, Target};
use crate::sys::{exec, lock, notify, peer, pipe, watch};

/// Whether somebody watches over the keeper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attended {
    /// A command started the daemon and went away: nobody will start it again.
    No,
    /// systemd, another service manager, or a person at a terminal runs it in the foreground.
    Yes,
}

/// A service manager gets this long to start the next keeper.
const ATTENDED_PATIENCE: Duration = Duration::from_secs(2);
/// A keeper that leaves says so because another one is on its way.
const ANNOUNCED_PATIENCE: Duration = Duration::from_secs(10);
/// A keeper that we have started gets this long to come. A busy machine takes seconds for a process.
const OWN_PATIENCE: Duration = Duration::from_secs(10);
/// The pause after a keeper that did not take everything; it doubles with each that follows.
const PAUSE_FIRST: Duration = Duration::from_millis(100);
/// The longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// A keeper that has everything, but did not dismiss us, is the daemon when it has lived for so long meanwhile. One
/// that has failed is gone at once.
const RIVAL_PATIENCE: Duration = Duration::from_secs(3);
/// For what was handed out to be settled. The dispatcher has its own, shorter limit.
const FREEZE_PATIENCE: Duration = Duration::from_secs(3);
/// Where a keeper that is connected to us from the beginning finds that connection.
const HEIR_FD: i32 = 3;
/// For lines to be in their files.
const LOGS_PATIENCE: Duration = Duration::from_secs(5);

/// Passes everything on to the next keeper. This process is the only one that has anything: nothing that fails ends it.
///
/// # Errors
/// When there can be no next keeper: the home is gone.
pub(super) async fn pass_on(
    home: &Home,
    attended: Attended,
    remains: Remains,
    mut inputs: UnboundedReceiver<Input>,
) -> Result<(), RunError> {
    let patience = match (remains.successor_announced, attended) {
        (true, _) => ANNOUNCED_PATIENCE,
        (false, Attended::Yes) => ATTENDED_PATIENCE,
        (false, Attended::No) => Duration::ZERO,
    };
    if remains.successor_announced {
        tracing::info!("the keeper has left; its successor gets everything");
    } else {
        tracing::error!("the keeper is gone; {} processes go on", remains.estate.children.len());
    }
    let mut place: Option<Place> = None;
    let (mut frozen, mut pause) = (false, PAUSE_FIRST);
    let mut came_to_nothing = false;
    let mut rival: Option<(ProcessId, Instant)> = None;
    let mut until = Instant::now() + patience;
    loop {
        if place.is_none() {
            match Place::open(home) {
                Ok(opened) => place = Some(opened),
                Err(source) if is_gone(home) => {
                    return Err(RunError::Io { step: "wait for the next keeper", source });
                }
                Err(error) => tracing::error!(%error, "nobody but our own keeper can take over"),
            }
        }
        let came = match &place {
            Some(place) => timeout_at(until, place.next()).await,
            None => timeout_at(until, std::future::pending()).await,
        };
        let socket = match came {
            Ok(Ok(socket)) => {
                came_to_nothing = false;
                socket
            }
            Ok(Err(error)) => {
                tracing::error!(%error, "cannot let the next keeper in");
                sleep(pause).await;
                pause = (pause * 2).min(PAUSE_MAX);
                continue;
            }
            // Where keepers cannot find us, or have not, the one that we start is connected to us from the beginning.
            Err(_) if place.is_none() || came_to_nothing => match start_heir(home, attended, &remains.estate)
            {
                Some(socket) => socket,
                None => {
                    until = Instant::now() + pause;
                    pause = (pause * 2).min(PAUSE_MAX);
                    continue;
                }
            },
            Err(_) => {
                start_keeper(home, attended, &remains.estate, None);
                came_to_nothing = true;
                until = Instant::now() + OWN_PATIENCE;
                continue;
            }
        };
        if !frozen {
            freeze(&remains.dispatch, &remains.logs, &mut inputs).await;
            frozen = true;
        }
        match handover::offer(socket, &remains.estate) {
            Ok(()) => {
                // The next one makes its own.
                let _ = fs::remove_file(home.takeover_sock());
                tracing::info!("handed over to the next keeper");
                return Ok(());
            }
            Err(error) => {
                tracing::error!(%error, "the next keeper did not take everything");
                let now = Instant::now();
                until = now + patience.max(pause);
                pause = (pause * 2).min(PAUSE_MAX);
                let holder =
                    holder_of(home).filter(|it| it.pid.cast_unsigned() != remains.estate.hello.keeper_pid);
                rival = holder.map(|it| rival.filter(|(known, _)| *known == it).unwrap_or((it, now)));
                if let Some((rival, since)) = rival
                    && now - since >= RIVAL_PATIENCE
                {
                    tracing::error!(pid = rival.pid, "another keeper has everything and lives on, so we end");
                    return Ok(());
                }
            }
        }
    }
}

/// Where the next keeper finds us.
struct Place {
    listener: AsyncFd<OwnedFd>,
}

impl Place {
    fn open(home: &Home) -> io::Result<Self> {
        match fs::remove_file(home.takeover_sock()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = pipe::packet_listener(home.takeover_address()?.as_path())?;
        Ok(Self { listener: watch::descriptor(listener, Interest::READABLE)? })
    }

    /// The next connection of somebody who may have everything.
    async fn next(&self) -> io::Result<OwnedFd> {
        loop {
            let mut ready = self.listener.readable().await?;
            match pipe::packet_accept(self.listener.get_ref()) {
                Ok(Some(socket)) => match peer::uid_of(socket.as_fd()) {
                    Ok(uid) if uid == peer::own_uid() => return Ok(socket),
                    _ => tracing::warn!("somebody else asked for everything and got nothing"),
                },
                Ok(None) => ready.clear_ready(),
                // Whoever that was has gone again.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted
                    ) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Whether there is no home any more, and not only no way to write there.
fn is_gone(home: &Home) -> bool {
    fs::metadata(home.dir()).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

/// The keeper that has written itself into the lock file, if it lives. It does so when it has everything.
fn holder_of(home: &Home) -> Option<ProcessId> {
    let pid = lock::holder(&home.lock())?.try_into().ok()?;
    Procfs::new().stat(pid).ok()?.map(|stat| stat.process)
}

/// Gets out of the way of the supervisor that an upgrade has started, and returns when that has everything. `Some`: the
/// keeper has died meanwhile, and everything goes to the next one.
///
/// # Errors
/// The keeper does nothing any more; it will find this process gone.
pub(super) async fn make_way(
    mut world: Box<World>,
    mut inputs: UnboundedReceiver<Input>,
) -> Result<Option<(Box<World>, UnboundedReceiver<Input>)>, RunError> {
    let (dispatch, logs) = world.frozen_parts();
    freeze(dispatch, logs, &mut inputs).await;
    match world.go() {
        Ok(()) => Ok(None),
        Err(LinkError::Closed) if world.goes_on() => Ok(Some((world, inputs))),
        // The new one had everything in time, and sees to the next keeper.
        Err(LinkError::Closed) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Leaves every descriptor where another supervisor can go on: channels at a line's end, lines in their files.
async fn freeze(dispatch: &DispatchHandle, logs: &LogHandle, inputs: &mut UnboundedReceiver<Input>) {
    dispatch.send(Command::Freeze);
    let frozen = async {
        while let Some(input) = inputs.recv().await {
            if matches!(input, Input::Dispatch(DispatchEvent::Frozen { .. } | DispatchEvent::Ended { .. })) {
                break;
            }
        }
    };
    if timeout(FREEZE_PATIENCE, frozen).await.is_err() {
        tracing::error!("connections are handed over in the middle of things");
    }
    if !logs.stop(LOGS_PATIENCE) {
        tracing::error!("some log lines have not reached their files");
    }
}

/// Starts a keeper that needs no place to find us at; returns our end of its connection.
fn start_heir(home: &Home, attended: Attended, estate: &Inventory) -> Option<OwnedFd> {
    match pipe::packet_pair() {
        Ok((ours, theirs)) => start_keeper(home, attended, estate, Some(theirs.as_fd())).then_some(ours),
        Err(error) => {
            tracing::error!(%error, "cannot start the next keeper");
            None
        }
    }
}

/// Starts `pm daemon` as it was started before: its original limits, and nothing of a service manager. Whether that
/// worked.
fn start_keeper(home: &Home, attended: Attended, estate: &Inventory, link: Option<BorrowedFd<'_>>) -> bool {
    // One that we started earlier and that has ended.
    while let Ok(Some(_)) = child::any_exited(Zombie::Reap) {}
    match try_start_keeper(home, attended, estate, link) {
        Ok(pid) => {
            tracing::info!(pid, "nobody has started the next keeper, so we have");
            true
        }
        Err(error) => {
            tracing::error!(%error, "cannot start the next keeper");
            false
        }
    }
}

fn try_start_keeper(
    home: &Home,
    attended: Attended,
    estate: &Inventory,
    link: Option<BorrowedFd<'_>>,
) -> io::Result<u32> {
    let text = |bytes: Vec<u8>| CString::new(bytes).map_err(io::Error::other);
    let mut args = vec![c"pm".to_owned(), c"daemon".to_owned(), c"--home".to_owned()];
    args.push(text(home.dir().as_os_str().as_bytes().to_vec())?);
    if attended == Attended::No {
        args.push(c"--detached".to_owned());
    }
    if link.is_some() {
        args.extend([c"--heir".to_owned(), text(HEIR_FD.to_string().into_bytes())?]);
    }
    let env = std::env::vars_os()
        .filter(|(key, _)| !notify::VARIABLES.iter().any(|name| key == name))
        .map(|(key, value)| text([key.into_vec(), value.into_vec()].join(&b'=')))
        .collect::<io::Result<Vec<CString>>>()?;
    let args: Vec<&CStr> = args.iter().map(AsRef::as_ref).collect();
    let env: Vec<&CStr> = env.iter().map(AsRef::as_ref).collect();
    let executable: OwnedFd = exec::own_executable()?;
    let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
    let mut fds = vec![stdin.as_fd(), stdout.as_fd(), stderr.as_fd()];
    // It becomes `HEIR_FD`.
    fds.extend(link);
    let started = spawn::start(&Program {
        target: Target::File(executable.as_fd()),
        args: &args,
        env: &env,
        listen_pid: false,
        cwd: Some(c"/"),
        credentials: None,
        umask: None,
        confinement: &Confinement::NONE,
        cgroup: None,
        oom_score_adj: Some(estate.hello.oom_score_adj),
        limits: &[estate.hello.open_files],
        die_with_us: false,
        fds: &fds,
    })
    .map_err(|failure| io::Error::other(failure.to_string()))?;
    Ok(started.pid)
}
