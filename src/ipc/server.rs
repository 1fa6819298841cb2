//! The supervisor's end of the socket: connections in, calls to the driver, lines back.
//!
//! Never decides anything; a client that is slow, silent, dead or hostile costs its own connection only.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use interprocess::local_socket::tokio::{Listener, Stream};
use interprocess::local_socket::traits::tokio::Listener as _;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::sync::Semaphore;
use tokio::time::{interval, timeout};

use super::protocol::{ALIVE_EVERY, Answer, Call, Line, MAX_LINE, Refused, Reply};
use super::strict;
use crate::model::id::OpId;
use crate::supervisor::handle::{SupervisorHandle, connections_max};
use crate::sys::peer;

/// A client that takes nothing for this long is cut off.
const WRITE_PATIENCE: Duration = Duration::from_secs(30);

/// Both, while less than half of the places are free: whoever floods the daemon waits, and not everybody else. What a
/// command sends is there before it is accepted.
const SCARCE_FIRST_PATIENCE: Duration = Duration::from_millis(100);
const SCARCE_WRITE_PATIENCE: Duration = Duration::from_secs(1);

/// A connection on which nothing is asked for this long is closed.
const IDLE_PATIENCE: Duration = Duration::from_secs(300);

/// Likewise for one that has never asked: whoever connects has something to ask.
const FIRST_PATIENCE: Duration = Duration::from_secs(3);

/// How long a client is waited for.
#[derive(Clone, Copy, Debug)]
struct Patience {
    first: Duration,
    write: Duration,
}

/// Accepts connections for ever: so many at once as descriptors allow, others wait in the kernel's queue.
pub async fn serve(listener: Listener, handle: SupervisorHandle) {
    let max = connections_max();
    let places = Arc::new(Semaphore::new(max));
    let mut refused = false;
    loop {
        // The semaphore is never closed.
        let Ok(place) = places.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok(stream) => {
                refused = false;
                let handle = handle.clone();
                let patience = if places.available_permits() < max / 2 {
                    Patience { first: SCARCE_FIRST_PATIENCE, write: SCARCE_WRITE_PATIENCE }
                } else {
                    Patience { first: FIRST_PATIENCE, write: WRITE_PATIENCE }
                };
                tokio::spawn(async move {
                    if let Err(error) = converse(stream, patience, &handle).await {
                        tracing::debug!(%error, "client connection ended");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                // EMFILE and its like last a while; spinning on them would cost a core, and a line for each try the disk.
                if !std::mem::replace(&mut refused, true) {
                    tracing::warn!(%error, "cannot accept clients");
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn converse(stream: Stream, bounds: Patience, handle: &SupervisorHandle) -> io::Result<()> {
    let peer = {
        let Stream::UdSocket(socket) = &stream;
        peer::uid_of(socket.as_fd())?
    };
    if !peer::may_command(peer) {
        tracing::warn!(uid = peer, "refused a client of another user");
        return Ok(());
    }
    let (read, mut write) = tokio::io::split(stream);
    let mut lines = BufReader::new(read);
    let mut patience = bounds.first;
    loop {
        let mut text = Vec::new();
        let limit = MAX_LINE as u64 + 1;
        let read = timeout(patience, (&mut lines).take(limit).read_until(b'\n', &mut text)).await;
        let Ok(read) = read else { return Ok(()) };
        if read? == 0 {
            return Ok(());
        }
        if text.len() > MAX_LINE {
            let refused = refuse(&format!("the request is longer than {MAX_LINE} bytes"));
            return send(&mut write, bounds.write, OpId(0), Reply::Refused(refused)).await;
        }
        if text.last() != Some(&b'\n') {
            // The client went away in the middle of a request: nothing is half-done.
            return Ok(());
        }
        match serde_json::from_slice::<Call>(&text) {
            Ok(call) => {
                patience = IDLE_PATIENCE;
                if let Some(key) = strict::unknown_key(&call.request, &text) {
                    send(&mut write, bounds.write, call.op, Reply::Refused(too_old(&key))).await?;
                } else {
                    answer(call, bounds.write, handle, &mut write).await?;
                }
            }
            Err(error) => {
                let refused = refuse(&format!("this is not a request: {error}"));
                send(&mut write, bounds.write, OpId(0), Reply::Refused(refused)).await?;
            }
        }
    }
}

fn refuse(cause: &str) -> Refused {
    Refused { code: 2, message: "cannot read the request".into(), cause: Some(cause.into()), hint: None }
}

fn too_old(key: &str) -> Refused {
    Refused {
        code: 2,
        message: format!("this daemon is too old for `{key}`"),
        cause: Some(
            concat!("it is pm ", env!("CARGO_PKG_VERSION"), ", an earlier build than the command's").into(),
        ),
        hint: Some("`pm upgrade` replaces it by this version while everything runs.".into()),
    }
}

async fn answer(
    call: Call,
    patience: Duration,
    handle: &SupervisorHandle,
    write: &mut (impl AsyncWriteExt + Unpin),
) -> io::Result<()> {
    let op = call.op;
    let _under_way = handle.begin();
    send(write, patience, op, Reply::Alive).await?;
    let mut replies = handle.submit(call).await;
    let mut alive = interval(ALIVE_EVERY);
    alive.tick().await;
    loop {
        tokio::select! {
            biased;
            reply = replies.recv() => match reply {
                Some(reply) => {
                    let last = matches!(reply, Reply::Answer(_) | Reply::Refused(_));
                    send(write, patience, op, reply).await?;
                    if last {
                        return Ok(());
                    }
                }
                // The supervisor ends; the client asks the next one by the operation's id.
                None => return Err(io::ErrorKind::ConnectionAborted.into()),
            },
            _ = alive.tick() => send(write, patience, op, Reply::Alive).await?,
        }
    }
}

async fn send(
    write: &mut (impl AsyncWriteExt + Unpin),
    patience: Duration,
    op: OpId,
    reply: Reply,
) -> io::Result<()> {
    // A list of a thousand apps is megabytes: room for it at once, instead of moving it ten times.
    let raw = if let Reply::Answer(Answer::Raw(raw)) = &reply { raw.get().len() } else { 0 };
    let mut text = Vec::with_capacity(256 + raw);
    serde_json::to_writer(&mut text, &Line { op, reply }).map_err(io::Error::other)?;
    text.push(b'\n');
    match timeout(patience, write.write_all(&text)).await {
        Ok(written) => written,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}
