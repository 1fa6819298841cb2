//! A load client that never retries and says of each request how it ended.
//!
//! Closed loop: every connection is a thread that sends its next request when the answer to the last one is complete.
//! It is deliberately strict: a keep-alive connection that ends without a `Connection: close` before it counts as a
//! reset, since a browser's user would see that as an error for a POST.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::wait_until;

/// For connecting and for each answer.
const LIMIT: Duration = Duration::from_secs(10);

/// Where the load goes.
#[derive(Clone, Debug)]
pub(crate) enum Target {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl From<u16> for Target {
    fn from(port: u16) -> Self {
        Self::Tcp(SocketAddr::from(([127, 0, 0, 1], port)))
    }
}

/// Whether a connection serves one request or many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Connections {
    OnePerRequest,
    KeepAlive,
}

/// How clients behave.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Manner {
    pub(crate) kind: Connections,
    /// Before each request a client pauses for a random time below this.
    pub(crate) pause: Duration,
    /// Whether a kept connection that ended before the next request was sent is opened anew, as every client in the
    /// world does, instead of counted as a reset.
    pub(crate) looks_first: bool,
    /// What a right answer is; may add the headers that are counted.
    pub(crate) check: fn(Reply) -> Result<Reply, Failure>,
}

impl Manner {
    /// No pauses, the fixtures' answers, and an unannounced end is a failure at any time.
    pub(crate) fn strict(kind: Connections) -> Self {
        Self { kind, pause: Duration::ZERO, looks_first: false, check }
    }
}

/// A complete answer.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    /// Names in lower case.
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: String,
}

impl Reply {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    fn closes(&self) -> bool {
        self.header("connection").eq_ignore_ascii_case("close")
    }
}

/// How a request failed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Failure {
    Refused,
    /// Reset or closed before the first byte of an answer.
    Reset,
    /// Ended within an answer.
    Truncated,
    Timeout,
    /// A complete answer that is not the right one.
    Wrong(String),
}

/// What came of the requests.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) ok: u64,
    pub(crate) failures: BTreeMap<Failure, u64>,
    /// Answers by the header `x-pid`.
    pub(crate) pids: BTreeMap<String, u64>,
    /// Answers by the header `x-version`.
    pub(crate) versions: BTreeMap<String, u64>,
    pub(crate) slowest: Duration,
}

impl Tally {
    pub(crate) fn failed(&self) -> u64 {
        self.failures.values().sum()
    }

    fn count(&mut self, result: &Result<Reply, Failure>) {
        match result {
            Ok(reply) => {
                self.ok += 1;
                *self.pids.entry(reply.header("x-pid").to_owned()).or_default() += 1;
                *self.versions.entry(reply.header("x-version").to_owned()).or_default() += 1;
            }
            Err(failure) => *self.failures.entry(failure.clone()).or_default() += 1,
        }
    }

    fn add(&mut self, other: Self) {
        self.ok += other.ok;
        self.slowest = self.slowest.max(other.slowest);
        for (mine, theirs) in [(&mut self.pids, other.pids), (&mut self.versions, other.versions)] {
            for (key, n) in theirs {
                *mine.entry(key).or_default() += n;
            }
        }
        for (failure, n) in other.failures {
            *self.failures.entry(failure).or_default() += n;
        }
    }

    /// Nothing failed, and it was a load worth the name.
    #[track_caller]
    pub(crate) fn lost_nothing(&self, at_least: u64) {
        eprintln!("load: {self:?}");
        assert_eq!(self.failed(), 0, "failed requests: {self:#?}");
        assert!(self.ok >= at_least, "only {} requests: {self:#?}", self.ok);
    }
}

/// Load that runs until it is stopped.
#[derive(Debug)]
pub(crate) struct Load {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<Tally>>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    done: AtomicU64,
    failed: AtomicU64,
}

impl Load {
    /// Starts the load and returns when the first answers are there.
    #[track_caller]
    pub(crate) fn start(target: impl Into<Target>, connections: usize, kind: Connections) -> Self {
        Self::with(target, connections, Manner::strict(kind))
    }

    /// Starts clients that behave in this manner and returns when the first answers are there.
    #[track_caller]
    pub(crate) fn with(target: impl Into<Target>, connections: usize, manner: Manner) -> Self {
        let target = target.into();
        let shared = Arc::new(Shared::default());
        let threads = (0..connections)
            .map(|client| {
                let (target, shared) = (target.clone(), Arc::clone(&shared));
                std::thread::spawn(move || closed_loop(&target, manner, client, &shared))
            })
            .collect();
        let load = Self { shared, threads };
        load.more(u64::try_from(connections).expect("small"));
        load
    }

    /// Requests that have ended so far.
    pub(crate) fn done(&self) -> u64 {
        self.shared.done.load(Ordering::Relaxed)
    }

    /// Requests that have failed so far.
    pub(crate) fn failed(&self) -> u64 {
        self.shared.failed.load(Ordering::Relaxed)
    }

    /// Waits until this many further requests have ended.
    #[track_caller]
    pub(crate) fn more(&self, requests: u64) {
        let goal = self.done() + requests;
        wait_until("requests are answered", Duration::from_secs(30), || {
            let done = self.done();
            if done >= goal { Ok(()) } else { Err(format!("{done} of {goal}")) }
        });
    }

    /// Ends every connection after its present request.
    pub(crate) fn stop(mut self) -> Tally {
        self.shared.stop.store(true, Ordering::Relaxed);
        let mut all = Tally::default();
        for thread in std::mem::take(&mut self.threads) {
            all.add(thread.join().expect("a load thread"));
        }
        all
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

fn closed_loop(target: &Target, manner: Manner, client: usize, shared: &Shared) -> Tally {
    let Manner { kind, pause, looks_first, check } = manner;
    let mut tally = Tally::default();
    let mut pauses = Pauses::below(pause, client);
    let mut open: Option<BufReader<Box<dyn Connection>>> = None;
    while !shared.stop.load(Ordering::Relaxed) {
        super::wait::pause_for(pauses.next());
        if looks_first && open.as_ref().is_some_and(|connection| connection.get_ref().has_ended()) {
            open = None;
        }
        let from = Instant::now();
        let result = match open.take().map_or_else(|| connect(target).map(BufReader::new), Ok) {
            Ok(mut connection) => exchange(&mut connection, kind, "/").and_then(check).inspect(|reply| {
                if kind == Connections::KeepAlive && !reply.closes() {
                    open = Some(connection);
                }
            }),
            Err(failure) => Err(failure),
        };
        tally.slowest = tally.slowest.max(Instant::now().duration_since(from));
        tally.count(&result);
        shared.failed.fetch_add(u64::from(result.is_err()), Ordering::Relaxed);
        shared.done.fetch_add(1, Ordering::Relaxed);
        if result == Err(Failure::Refused) {
            // Refusals come back at once; without a pause they would be all the machine does.
            super::wait::pause();
        }
    }
    tally
}

impl PartialEq for Reply {
    fn eq(&self, other: &Self) -> bool {
        self.status == other.status && self.body == other.body
    }
}

/// The fixtures' answers begin and end so, with filling between.
fn check(reply: Reply) -> Result<Reply, Failure> {
    if reply.status == 200 && reply.body.starts_with("ok ") && reply.body.ends_with(" end\n") {
        Ok(reply)
    } else {
        let start: String = reply.body.chars().take(60).collect();
        Err(Failure::Wrong(format!("{} {start}", reply.status)))
    }
}

/// One request on a connection of its own.
pub(crate) fn get(target: impl Into<Target>, path: &str) -> Result<Reply, Failure> {
    let connection = connect(&target.into())?;
    exchange(&mut BufReader::new(connection), Connections::OnePerRequest, path)
}

trait Connection: Read + Write + Send {
    /// Whether the other side has said that nothing more comes. A reset is not an end but a failure: the next request
    /// will find it.
    fn has_ended(&self) -> bool;
}

impl<T: Read + Write + Send + AsFd> Connection for T {
    fn has_ended(&self) -> bool {
        use nix::sys::socket::{MsgFlags, recv};
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        recv(self.as_fd().as_raw_fd(), &mut [0], flags) == Ok(0)
    }
}

/// Random pauses, the same for a client in each run (xorshift).
#[derive(Debug)]
struct Pauses {
    below: u64,
    state: u64,
}

impl Pauses {
    fn below(pause: Duration, client: usize) -> Self {
        let seed = u64::try_from(client).expect("small").wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        Self { below: u64::try_from(pause.as_micros()).expect("short"), state: seed }
    }

    fn next(&mut self) -> Duration {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        Duration::from_micros(self.state.checked_rem(self.below).unwrap_or(0))
    }
}

fn connect(target: &Target) -> Result<Box<dyn Connection>, Failure> {
    let failed = |error: std::io::Error| match error.kind() {
        ErrorKind::ConnectionRefused | ErrorKind::NotFound => Failure::Refused,
        ErrorKind::TimedOut | ErrorKind::WouldBlock => Failure::Timeout,
        ErrorKind::ConnectionReset => Failure::Reset,
        _ => Failure::Wrong(error.to_string()),
    };
    match target {
        Target::Tcp(address) => {
            let stream = TcpStream::connect_timeout(address, LIMIT).map_err(failed)?;
            stream.set_read_timeout(Some(LIMIT)).map_err(failed)?;
            stream.set_write_timeout(Some(LIMIT)).map_err(failed)?;
            stream.set_nodelay(true).map_err(failed)?;
            Ok(Box::new(stream))
        }
        Target::Unix(path) => {
            let stream = UnixStream::connect(path).map_err(failed)?;
            stream.set_read_timeout(Some(LIMIT)).map_err(failed)?;
            Ok(Box::new(stream))
        }
    }
}

fn exchange(
    connection: &mut BufReader<Box<dyn Connection>>,
    kind: Connections,
    path: &str,
) -> Result<Reply, Failure> {
    let word = if kind == Connections::KeepAlive { "keep-alive" } else { "close" };
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: {word}\r\n\r\n");
    let before = |error: std::io::Error| match error.kind() {
        ErrorKind::TimedOut | ErrorKind::WouldBlock => Failure::Timeout,
        _ => Failure::Reset,
    };
    let within = |error: std::io::Error| match error.kind() {
        ErrorKind::TimedOut | ErrorKind::WouldBlock => Failure::Timeout,
        _ => Failure::Truncated,
    };
    connection.get_mut().write_all(request.as_bytes()).map_err(before)?;
    if connection.fill_buf().map_err(before)?.is_empty() {
        return Err(Failure::Reset);
    }
    let mut reply = Reply::default();
    let mut line = String::new();
    connection.read_line(&mut line).map_err(within)?;
    reply.status = line.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
    loop {
        line.clear();
        connection.read_line(&mut line).map_err(within)?;
        if !line.ends_with('\n') {
            return Err(Failure::Truncated);
        }
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        reply.headers.insert(name.to_lowercase(), value.trim().to_owned());
    }
    let mut body = Vec::new();
    if let Ok(length) = reply.header("content-length").parse::<usize>() {
        body.resize(length, 0);
        connection.read_exact(&mut body).map_err(within)?;
    } else if reply.header("transfer-encoding") == "chunked" {
        loop {
            line.clear();
            connection.read_line(&mut line).map_err(within)?;
            let length = usize::from_str_radix(line.trim(), 16).map_err(|_| Failure::Truncated)?;
            let mut chunk = vec![0; length + 2];
            connection.read_exact(&mut chunk).map_err(within)?;
            if length == 0 {
                break;
            }
            body.extend_from_slice(&chunk[..length]);
        }
    } else {
        connection.read_to_end(&mut body).map_err(within)?;
    }
    reply.body = String::from_utf8_lossy(&body).into_owned();
    Ok(reply)
}
