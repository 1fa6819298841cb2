//! Ears for "ready": a notify socket and a pipe per instance.
//!
//! One socket and one pipe for each generation, so that a message needs no look-up of who sent it and a late one of an
//! older generation cannot be mistaken. Both are held by the keeper and read again by the next supervisor. The IPC
//! channel, the third source, belongs to the dispatcher.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::lchown;
use std::os::unix::net::{SocketAddr, UnixDatagram as StdDatagram};
use std::path::{Path, PathBuf};

use tokio::io::Interest;
use tokio::net::UnixDatagram;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;

use super::driver::Input;
use crate::logs::writer::Owner;
use crate::model::id::{Generation, InstanceId, PmId};
use crate::sys::pipe::peek_pipe;
use crate::sys::{peer, watch};

/// The longest path of a unix socket, unix(7), less the final zero.
const SOCKET_PATH_MAX: usize = 107;

/// The longest datagram of sd_notify(3) that is looked at, in bytes.
const DATAGRAM_MAX: usize = 8 * 1024;

/// The source of the "ready" of an instance, as `NOTIFY_SOCKET` names it.
#[derive(Debug)]
pub struct NotifySocket {
    /// Our end.
    pub socket: StdDatagram,
    /// What to put into `NOTIFY_SOCKET`.
    pub name: String,
}

/// Where the notify socket of a run lies; `None` where that would be too long for the kernel.
#[must_use]
pub fn notify_path(dir: &Path, pm_id: PmId, generation: Generation) -> Option<PathBuf> {
    let path = dir.join(format!("{pm_id}.{generation}.sock"));
    (path.as_os_str().len() <= SOCKET_PATH_MAX).then_some(path)
}

/// Binds a socket in `dir` that belongs to `owner`, or an abstract one where the path would be too long for the kernel.
///
/// # Errors
/// As bind(2).
pub fn bind_notify(
    dir: &Path,
    pm_id: PmId,
    generation: Generation,
    owner: Option<Owner>,
) -> io::Result<NotifySocket> {
    let socket;
    let name;
    if let Some(path) = notify_path(dir, pm_id, generation) {
        // A run of an earlier daemon may have left its socket; the stem names a generation, so nobody uses it.
        match std::fs::remove_file(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        socket = StdDatagram::bind(&path)?;
        if let Some(Owner { uid, gid }) = owner {
            // Only who may write to it may send to it.
            lchown(&path, Some(uid), Some(gid))?;
        }
        name = path.display().to_string();
    } else {
        let abstract_name = format!("pm-{}-{pm_id}.{generation}", std::process::id());
        socket = StdDatagram::bind_addr(&SocketAddr::from_abstract_name(&abstract_name)?)?;
        peer::note_senders(socket.as_fd())?;
        name = format!("@{abstract_name}");
    }
    socket.set_nonblocking(true)?;
    Ok(NotifySocket { socket, name })
}

/// Listens on a notify socket until the task is aborted. What says "ready" is taken from the socket only when that is
/// recorded: a supervisor that dies in between leaves it to the next one.
///
/// # Errors
/// When the socket cannot be registered with the runtime.
pub fn listen_notify(
    id: InstanceId,
    socket: StdDatagram,
    inputs: UnboundedSender<Input>,
) -> io::Result<AbortHandle> {
    // A path is kept from others by the directory that it is in. An abstract name can be found by anybody.
    let is_open_to_all = socket.local_addr()?.as_abstract_name().is_some();
    if is_open_to_all {
        peer::note_senders(socket.as_fd())?;
    }
    let socket = UnixDatagram::from_std(socket)?;
    let task = tokio::spawn(async move {
        let mut datagram = vec![0; DATAGRAM_MAX];
        loop {
            let peek = || peer::peek(socket.as_fd(), &mut datagram);
            let Ok((length, sender)) = socket.async_io(Interest::READABLE, peek).await else { return };
            let may_speak = !is_open_to_all || sender.is_some_and(peer::may_command);
            let says_ready =
                may_speak && datagram[..length].split(|byte| *byte == b'\n').any(|line| line == b"READY=1");
            if says_ready {
                let (recorded, is_recorded) = oneshot::channel();
                // Both fail only when the driver has ended.
                let _ = inputs.send(Input::SaidReady(id.clone(), Some(recorded)));
                if is_recorded.await.is_err() {
                    return;
                }
            }
            if socket.recv(&mut datagram).await.is_err() {
                return;
            }
        }
    });
    Ok(task.abort_handle())
}

/// Waits for a newline on a ready pipe, and leaves it there for the next supervisor: nothing else is ever read from it.
///
/// # Errors
/// When the pipe cannot be registered with the runtime.
pub fn listen_pipe(
    id: InstanceId,
    reader: OwnedFd,
    inputs: UnboundedSender<Input>,
) -> io::Result<AbortHandle> {
    let pipe = watch::descriptor(reader, Interest::READABLE)?;
    let task = tokio::spawn(async move {
        let mut bytes = [0; 64];
        loop {
            let Ok(mut ready) = pipe.readable().await else { return };
            match ready.try_io(|pipe| peek_pipe(pipe.get_ref(), &mut bytes)) {
                Ok(Ok(0) | Err(_)) => return,
                Ok(Ok(length)) if bytes[..length].contains(&b'\n') => {
                    let _ = inputs.send(Input::SaidReady(id, None));
                    return;
                }
                // Bytes without meaning are taken away, or nobody would hear what comes behind them.
                Ok(Ok(length)) => {
                    if nix::unistd::read(pipe.get_ref(), &mut bytes[..length]).is_err() {
                        return;
                    }
                }
                Err(_) => {}
            }
        }
    });
    Ok(task.abort_handle())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use tokio::sync::mpsc::unbounded_channel;

    use super::*;
    use crate::model::id::{AppName, Slot};
    use crate::sys::pipe::ready_pipe;

    fn id() -> InstanceId {
        InstanceId { app: AppName::new("api").unwrap(), slot: Slot(0), generation: Generation(1) }
    }

    #[tokio::test]
    async fn ready_stays_on_the_notify_socket_until_it_is_recorded() {
        let (theirs, ours) = StdDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let next = ours.try_clone().unwrap();
        let (inputs, mut heard) = unbounded_channel();
        let _ear = listen_notify(id(), ours, inputs).unwrap();
        theirs.send(b"STATUS=soon").unwrap();
        theirs.send(b"STATUS=now\nREADY=1\n").unwrap();
        let Some(Input::SaidReady(_, Some(recorded))) = heard.recv().await else { panic!("not heard") };
        // The supervisor dies here: the next one finds it, and it alone.
        let mut datagram = [0; 64];
        let (length, _) = peer::peek(next.as_fd(), &mut datagram).unwrap();
        assert_eq!(&datagram[..length], b"STATUS=now\nREADY=1\n");
        recorded.send(()).unwrap();
        // What comes later does not fill the socket.
        for _ in 0..2000 {
            theirs.send(b"WATCHDOG=1").unwrap();
            tokio::task::yield_now().await;
        }
        theirs.send(b"READY=1").unwrap();
        assert!(matches!(heard.recv().await, Some(Input::SaidReady(..))));
    }

    /// A process of another user, where this one may make one.
    fn shout_as_nobody(name: &str) -> bool {
        let script = format!(
            "import os, socket\nos.setgroups([])\nos.setgid(65534)\nos.setuid(65534)\n\
             socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'READY=1', '\\0{name}')"
        );
        let mut python = std::process::Command::new("python3");
        peer::own_uid() == 0 && python.args(["-c", &script]).status().unwrap().success()
    }

    #[tokio::test]
    async fn another_user_cannot_say_ready_where_the_name_of_the_socket_is_open_to_all() {
        let long = Path::new("/").join("x".repeat(200));
        let NotifySocket { socket, name } = bind_notify(&long, PmId(0), Generation(1), None).unwrap();
        let name = name.strip_prefix('@').unwrap();
        let (inputs, mut heard) = unbounded_channel();
        let _ear = listen_notify(id(), socket, inputs).unwrap();
        if shout_as_nobody(name) {
            let quiet = tokio::time::timeout(std::time::Duration::from_millis(200), heard.recv()).await;
            assert!(quiet.is_err(), "somebody else was heard");
        }
        let ours = StdDatagram::unbound().unwrap();
        ours.send_to_addr(b"READY=1", &SocketAddr::from_abstract_name(name).unwrap()).unwrap();
        assert!(matches!(heard.recv().await, Some(Input::SaidReady(..))));
    }

    #[tokio::test]
    async fn a_newline_stays_in_the_ready_pipe_for_the_next_supervisor() {
        let (theirs, ours) = ready_pipe().unwrap();
        let next = ours.try_clone().unwrap();
        let mut theirs = std::fs::File::from(theirs);
        let (inputs, mut heard) = unbounded_channel();
        let _ear = listen_pipe(id(), ours, inputs.clone()).unwrap();
        theirs.write_all(b"almost ").unwrap();
        tokio::task::yield_now().await;
        theirs.write_all(b"there\n").unwrap();
        assert!(matches!(heard.recv().await, Some(Input::SaidReady(_, None))));
        let _ear = listen_pipe(id(), next, inputs).unwrap();
        assert!(matches!(heard.recv().await, Some(Input::SaidReady(_, None))));
    }
}
