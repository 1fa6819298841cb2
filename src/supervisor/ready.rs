//! Ears for "ready": a notify socket and a pipe per instance.
//!
//! One socket and one pipe for each generation, so that a message needs no look-up of who sent it and a late one of an
//! older generation cannot be mistaken. Both are held by the keeper and read again by the next supervisor. The IPC
//! channel, the third source, belongs to the dispatcher.

use std::io;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram as StdDatagram};
use std::path::{Path, PathBuf};

use tokio::io::AsyncReadExt;
use tokio::net::UnixDatagram;
use tokio::net::unix::pipe;
use tokio::sync::mpsc::UnboundedSender;
use tokio::task::AbortHandle;

use super::driver::Input;
use crate::model::id::{Generation, InstanceId, PmId};

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

/// Binds a socket in `dir`, or an abstract one where the path would be too long for the kernel.
///
/// # Errors
/// As bind(2).
pub fn bind_notify(dir: &Path, pm_id: PmId, generation: Generation) -> io::Result<NotifySocket> {
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
        name = path.display().to_string();
    } else {
        let abstract_name = format!("pm-{}-{pm_id}.{generation}", std::process::id());
        socket = StdDatagram::bind_addr(&SocketAddr::from_abstract_name(&abstract_name)?)?;
        name = format!("@{abstract_name}");
    }
    socket.set_nonblocking(true)?;
    Ok(NotifySocket { socket, name })
}

/// Listens on a notify socket until the task is aborted.
///
/// # Errors
/// When the socket cannot be registered with the runtime.
pub fn listen_notify(
    id: InstanceId,
    socket: StdDatagram,
    inputs: UnboundedSender<Input>,
) -> io::Result<AbortHandle> {
    let socket = UnixDatagram::from_std(socket)?;
    let task = tokio::spawn(async move {
        let mut datagram = vec![0; DATAGRAM_MAX];
        loop {
            let Ok(length) = socket.recv(&mut datagram).await else { return };
            let says_ready = datagram[..length].split(|byte| *byte == b'\n').any(|line| line == b"READY=1");
            if says_ready {
                // Fails only when the driver has ended.
                let _ = inputs.send(Input::SaidReady(id.clone()));
            }
        }
    });
    Ok(task.abort_handle())
}

/// Waits for a newline on a ready pipe.
///
/// # Errors
/// When the pipe cannot be registered with the runtime.
pub fn listen_pipe(
    id: InstanceId,
    reader: OwnedFd,
    inputs: UnboundedSender<Input>,
) -> io::Result<AbortHandle> {
    let mut pipe = pipe::Receiver::from_owned_fd(reader)?;
    let task = tokio::spawn(async move {
        let mut bytes = [0; 64];
        loop {
            match pipe.read(&mut bytes).await {
                Ok(0) | Err(_) => return,
                Ok(length) if bytes[..length].contains(&b'\n') => {
                    let _ = inputs.send(Input::SaidReady(id));
                    return;
                }
                Ok(_) => {}
            }
        }
    });
    Ok(task.abort_handle())
}
