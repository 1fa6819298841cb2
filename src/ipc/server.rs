//! The supervisor's end of the socket: connections in, calls to the driver, lines back.
//!
//! Never decides anything; a client that is slow, silent, dead or hostile costs its own connection only.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use interprocess::local_socket::tokio::{Listener, Stream};
use interprocess::local_socket::traits::tokio::Listener as _;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::sync::{Notify, Semaphore, oneshot};
use tokio::time::{Instant, interval, sleep, sleep_until, timeout};

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

/// When there is no place for another one, the one on which nothing has been asked for longest gives way, after this.
const SCARCE_IDLE_PATIENCE: Duration = Duration::from_secs(1);

/// Likewise for one that has never asked: whoever connects has something to ask.
const FIRST_PATIENCE: Duration = Duration::from_secs(3);

/// How long a client is waited for.
#[derive(Clone, Copy, Debug)]
struct Patience {
    first: Duration,
    write: Duration,
}

/// Accepts connections for ever: so many at once as descriptors allow, one more waits for a place, others in the kernel's
/// queue.
pub async fn serve(listener: Listener, handle: SupervisorHandle) {
    let max = connections_max();
    serve_at_once(max, listener, handle).await;
}

async fn serve_at_once(max: usize, listener: Listener, handle: SupervisorHandle) {
    let places = Arc::new(Semaphore::new(max));
    let idle = Arc::new(Idle::default());
    let mut refused = false;
    loop {
        match listener.accept().await {
            Ok(stream) => {
                refused = false;
                let place = tokio::select! {
                    biased;
                    place = places.clone().acquire_owned() => place,
                    never = idle.give_way() => match never {},
                };
                // The semaphore is never closed.
                let Ok(place) = place else { return };
                let (handle, idle) = (handle.clone(), idle.clone());
                let patience = if places.available_permits() < max / 2 {
                    Patience { first: SCARCE_FIRST_PATIENCE, write: SCARCE_WRITE_PATIENCE }
                } else {
                    Patience { first: FIRST_PATIENCE, write: WRITE_PATIENCE }
                };
                tokio::spawn(async move {
                    if let Err(error) = converse(stream, patience, &handle, &idle).await {
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

/// The connections on which something was asked before and nothing is now, the one for longest first.
#[derive(Debug, Default)]
struct Idle {
    waiting: Mutex<BTreeMap<u64, (Instant, oneshot::Sender<()>)>>,
    numbers: AtomicU64,
    more: Notify,
}

/// A connection is idle until this is dropped.
struct IsIdle<'a> {
    all: &'a Idle,
    number: u64,
}

impl Drop for IsIdle<'_> {
    fn drop(&mut self) {
        self.all.lock().remove(&self.number);
    }
}

impl Idle {
    /// The connection is idle from now on; the second part ends when it is to give way.
    fn begin(&self) -> (IsIdle<'_>, oneshot::Receiver<()>) {
        let (leave, left) = oneshot::channel();
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        self.lock().insert(number, (Instant::now(), leave));
        self.more.notify_one();
        (IsIdle { all: self, number }, left)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, (Instant, oneshot::Sender<()>)>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends the one that is idle for longest away as soon as it is for a second, and so on until this is dropped.
    async fn give_way(&self) -> Infallible {
        loop {
            let first = self.lock().first_key_value().map(|(&number, (since, _))| (number, *since));
            let Some((number, since)) = first else {
                self.more.notified().await;
                continue;
            };
            let due = since + SCARCE_IDLE_PATIENCE;
            if due > Instant::now() {
                sleep_until(due).await;
                continue;
            }
            if let Some((_, leave)) = self.lock().remove(&number) {
                // One that goes by itself at this moment leaves a place too.
                let _ = leave.send(());
            }
            // Its place is taken before the next one has to go.
            sleep(SCARCE_FIRST_PATIENCE).await;
        }
    }
}

async fn converse(
    stream: Stream,
    bounds: Patience,
    handle: &SupervisorHandle,
    idle: &Idle,
) -> io::Result<()> {
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
    let mut has_asked = false;
    loop {
        let mut text = Vec::new();
        let mut line = (&mut lines).take(MAX_LINE as u64 + 1);
        let line = line.read_until(b'\n', &mut text);
        let read = if has_asked {
            let (_idle, leave) = idle.begin();
            tokio::select! {
                // What was asked in this moment is answered.
                biased;
                read = timeout(IDLE_PATIENCE, line) => read,
                _ = leave => return Ok(()),
            }
        } else {
            timeout(bounds.first, line).await
        };
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
                has_asked = true;
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

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader as Lines, Read as _, Write as _};
    use std::os::unix::net::UnixStream;
    use std::path::Path;
    use std::sync::mpsc;

    use interprocess::local_socket::{GenericFilePath, ListenerOptions, ToFsName as _};

    use super::*;
    use crate::ipc::protocol::{Request, VERSION};

    /// A server with so many places, whose driver answers pings and nothing else.
    async fn server(socket: &Path, places: usize, listens: mpsc::Sender<()>) {
        let name = socket.to_fs_name::<GenericFilePath>().unwrap();
        let listener = ListenerOptions::new().name(name).create_tokio().unwrap();
        listens.send(()).unwrap();
        let (handle, mut asks) = SupervisorHandle::new();
        tokio::spawn(serve_at_once(places, listener, handle));
        let mut unanswered = Vec::new();
        while let Some(ask) = asks.recv().await {
            if matches!(ask.call.request, Request::Ping) {
                let pong = Answer::Pong {
                    version: String::new(),
                    daemon_pid: 1,
                    supervisor_pid: 2,
                    warnings: Vec::new(),
                };
                ask.replies.send(Reply::Answer(pong)).unwrap();
            } else {
                unanswered.push(ask);
            }
        }
    }

    struct Client(Lines<UnixStream>);

    impl Client {
        /// Connects, asks, and hears this. Once more when it was too slow for a server that has few places.
        fn new(socket: &Path, request: &Request, wanted: &str) -> Self {
            loop {
                let stream = UnixStream::connect(socket).unwrap();
                stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
                let mut client = Self(Lines::new(stream));
                if client.asks(request, wanted) {
                    return client;
                }
            }
        }

        /// Whether this was heard, and the connection is still there.
        fn asks(&mut self, request: &Request, wanted: &str) -> bool {
            let call = Call { v: VERSION, op: OpId(1), request: request.clone() };
            let text = serde_json::to_string(&call).unwrap() + "\n";
            if self.0.get_mut().write_all(text.as_bytes()).is_err() {
                return false;
            }
            let mut line = String::new();
            while !line.contains(wanted) {
                line.clear();
                if !matches!(self.0.read_line(&mut line), Ok(1..)) {
                    return false;
                }
            }
            true
        }

        fn is_cut_off(&mut self) -> bool {
            self.0.get_mut().set_nonblocking(true).unwrap();
            let read = self.0.read(&mut [0]);
            self.0.get_mut().set_nonblocking(false).unwrap();
            matches!(read, Ok(0))
        }
    }

    #[test]
    fn whoever_asks_nothing_for_longest_gives_way_when_places_are_scarce() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("sock");
        let path = socket.clone();
        // The socket's file is there before anybody listens: bind and listen are two steps.
        let (listens, listening) = mpsc::channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(server(&path, 4, listens));
        });
        listening.recv().unwrap();
        // The first to come has something under way, the second was the first to have its answer.
        let list = Request::List { targets: Vec::new(), figures: false };
        let ping = || Client::new(&socket, &Request::Ping, "pong");
        let mut all = [Client::new(&socket, &list, "alive"), ping(), ping(), ping()];
        assert!(!all.iter_mut().any(Client::is_cut_off), "there is room");
        let mut late = ping();
        let cut_off: Vec<bool> = all.iter_mut().map(Client::is_cut_off).collect();
        assert_eq!(cut_off, [false, true, false, false]);
        // One that asks again is not the one for longest any more.
        assert!(all[2].asks(&Request::Ping, "pong"));
        let _last = ping();
        assert!(all[3].is_cut_off() && !all[2].is_cut_off() && !all[0].is_cut_off() && !late.is_cut_off());
    }
}
