//! What stands in the lines of a Node IPC channel: reading the worker's, writing ours.
//!
//! A line that is no message we know, or no JSON at all, is a message of the app's own and never an error.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::model::figures::{HttpFigures, NodeFigures, Spread};
use crate::model::signal::Signal;
use crate::sys::listen::interface_index;

/// Bun writes this byte before its internal messages.
pub const BUN_MARK: u8 = 0x02;

/// A line from a worker.
#[derive(Debug, PartialEq)]
pub enum Incoming {
    /// The worker has received a handle.
    HandleAck,
    /// A handle line reached the worker without its handle.
    HandleNack,
    /// The worker passes a handle; `message` is what came with it, when it could be read.
    Handle {
        /// The app's message, as JSON.
        message: Option<String>,
    },
    /// `server.getConnections` of a server whose socket was passed to us.
    SocketCount {
        /// Names the server; echoed.
        key: String,
    },
    /// `server.close` of such a server.
    SocketClose {
        /// Names the server; echoed.
        key: String,
    },
    /// The answer to our cluster message `ack`.
    Answer {
        /// The sequence number of our message.
        ack: u64,
        /// For a `newconn`: whether the worker serves it.
        accepted: bool,
    },
    /// The worker has started.
    Online,
    /// `listen()` or `bind()`.
    Query(Query),
    /// A `listen()` is complete.
    Listening(Query),
    /// A server was closed.
    Close {
        /// The listener's key, as we chose it.
        key: String,
    },
    /// The worker leaves by itself and waits for an answer.
    Leaving {
        /// To be answered.
        seq: u64,
    },
    /// From our preload.
    Agent(AgentMessage),
    /// `"ready"`.
    Ready,
    /// A `NODE_` message that concerns nobody here.
    Ignored,
    /// Everything else: the app's own.
    User,
}

/// What the preload says.
#[derive(Debug, PartialEq)]
pub enum AgentMessage {
    /// It is there.
    Hello {
        /// `process.version`.
        version: String,
    },
    /// How many listeners the app has for a signal.
    Listeners {
        /// Which signal.
        signal: Signal,
        /// How many; ours are not counted.
        count: u32,
    },
    /// No connection is open any more.
    Drained,
    /// Of the connections that we handed over since we asked for it first, so many are closed.
    Closed {
        /// How many had reached the worker when it answered; only in the answer to [`agent_watch`].
        received: Option<u64>,
        /// How many of all are closed by now; those that the worker rejected or dropped are among them.
        closed: u64,
    },
    /// What it has measured.
    Figures {
        /// The number of [`agent_figures`] that it answers.
        ask: u64,
        /// The figures.
        figures: Box<NodeFigures>,
    },
}

/// A `queryServer`, or the `listening` that follows it. Saved with the worker, so that the next supervisor knows
/// which of a worker's messages it has answered.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Query {
    /// To be answered.
    pub seq: u64,
    /// A numeric address, a unix path, or nothing for all addresses.
    pub address: Option<String>,
    /// `None` for `listen({fd})`, -1 for unix paths.
    pub port: Option<i64>,
    /// 4, 6, -1, "udp4", "udp6" or nothing.
    pub kind: QueryKind,
    /// For `listen({fd})`: the number; udp sends -1.
    pub fd: Option<i64>,
    /// Counts the `listen(0)`s of a worker. For `listen({fd})` we put the socket's inode here: after a reload with
    /// other listeners the same number means another socket.
    pub index: i64,
    /// libuv's bind flags.
    pub flags: i64,
    /// 0 stands for the default.
    pub backlog: u32,
    /// `readableAll` 0444 and `writableAll` 0222, of a unix path.
    pub mode: u32,
    /// TLS ticket keys of the first worker, as JSON; `null` otherwise.
    pub data: String,
}

/// `addressType`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum QueryKind {
    /// 4
    #[default]
    Tcp4,
    /// 6
    Tcp6,
    /// -1
    Unix,
    /// "udp4"
    Udp4,
    /// "udp6"
    Udp6,
    /// null: `listen({fd})`
    Descriptor,
}

/// What a query asks to be bound.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// TCP on every address.
    TcpAny {
        /// 0 for a free one.
        port: u16,
    },
    /// TCP on one address.
    Tcp {
        /// Where.
        address: SocketAddr,
        /// IPV6_V6ONLY.
        v6_only: bool,
    },
    /// UDP.
    Udp {
        /// Where.
        address: SocketAddr,
        /// IPV6_V6ONLY.
        v6_only: bool,
        /// SO_REUSEADDR.
        reuse: bool,
    },
    /// A unix stream socket.
    Unix {
        /// Absolute.
        path: PathBuf,
        /// Added to the file's mode.
        mode: u32,
    },
    /// One of the app's configured listeners, by the descriptor it would have.
    Configured {
        /// The first configured listener is 3.
        fd: i64,
    },
}

/// EINVAL as the negative number that workers expect.
pub const INVALID: i32 = -22;
/// EBADF, likewise.
pub const BAD_DESCRIPTOR: i32 = -9;
/// EADDRINUSE, likewise.
pub const ADDRESS_IN_USE: i32 = -98;

impl Query {
    /// The listener's key, in the format of Node 22 and later: the index counts only for port 0.
    #[must_use]
    pub fn key(&self) -> String {
        let text = |value: Option<i64>| value.map_or_else(|| "null".to_owned(), |value| value.to_string());
        let kind = match self.kind {
            QueryKind::Tcp4 => "4",
            QueryKind::Tcp6 => "6",
            QueryKind::Unix => "-1",
            QueryKind::Udp4 => "udp4",
            QueryKind::Udp6 => "udp6",
            QueryKind::Descriptor => "null",
        };
        let address = self.address.as_deref().unwrap_or("null");
        let fd = self.fd.map_or_else(|| "undefined".to_owned(), |fd| fd.to_string());
        let mut key = format!("{address}:{}:{kind}:{fd}", text(self.port));
        if self.port == Some(0) || self.kind == QueryKind::Descriptor {
            key.push_str(&format!(":{}", self.index));
        }
        key
    }

    /// What is to be bound.
    ///
    /// # Errors
    /// A negative errno, ready for the reply.
    pub fn place(&self) -> Result<Place, i32> {
        if self.kind == QueryKind::Unix {
            let path = self.address.clone().ok_or(INVALID)?;
            if !path.starts_with('/') || path.contains('\0') {
                return Err(INVALID);
            }
            return Ok(Place::Unix { path: PathBuf::from(path), mode: self.mode });
        }
        if let Some(fd) = self.fd.filter(|fd| *fd >= 0) {
            return Ok(Place::Configured { fd });
        }
        let port = self.port.and_then(|port| u16::try_from(port).ok()).ok_or(INVALID)?;
        let v6_only = self.flags & 1 != 0;
        let address = |text: &str| {
            // A zone (`fe80::1%eth0`) is part of the text.
            let parsed = if text.contains('%') {
                scoped(text, port)
            } else {
                text.parse::<IpAddr>().ok().map(|ip| SocketAddr::new(ip, port))
            };
            parsed.ok_or(INVALID)
        };
        match self.kind {
            QueryKind::Tcp4 | QueryKind::Tcp6 => match self.address.as_deref() {
                None | Some("") => Ok(Place::TcpAny { port }),
                Some(text) => Ok(Place::Tcp { address: address(text)?, v6_only }),
            },
            QueryKind::Udp4 | QueryKind::Udp6 => {
                let any = if self.kind == QueryKind::Udp4 { "0.0.0.0" } else { "::" };
                let address = address(self.address.as_deref().unwrap_or(any))?;
                Ok(Place::Udp { address, v6_only, reuse: self.flags & 4 != 0 })
            }
            QueryKind::Unix | QueryKind::Descriptor => Err(INVALID),
        }
    }

    /// UDP sockets are shared whatever the balance.
    #[must_use]
    pub const fn is_datagram(&self) -> bool {
        matches!(self.kind, QueryKind::Udp4 | QueryKind::Udp6)
    }

    /// Whether this `listening` message belongs to that query: the port is then the real one, where 0 was asked for.
    #[must_use]
    pub fn completes(&self, query: &Self) -> bool {
        self.address == query.address
            && self.kind == query.kind
            && self.fd == query.fd
            && match query.port {
                None => true,
                Some(0) => self.index == query.index,
                port => self.port == port,
            }
    }

    /// The place for people: `*:8080`, `127.0.0.1:8080`, `unix:/run/x.sock`, `fd 3`.
    #[must_use]
    pub fn display(&self, real_port: Option<u16>) -> String {
        let udp = if self.is_datagram() { "udp:" } else { "" };
        let port = real_port.map(i64::from).or(self.port).unwrap_or(0);
        match (self.kind, self.address.as_deref()) {
            (QueryKind::Unix, path) => format!("unix:{}", path.unwrap_or("?")),
            (QueryKind::Descriptor, _) => format!("fd {}", self.fd.unwrap_or(-1)),
            (_, None) => format!("{udp}*:{port}"),
            (_, Some(address)) if address.contains(':') => format!("{udp}[{address}]:{port}"),
            (_, Some(address)) => format!("{udp}{address}:{port}"),
        }
    }

    fn read(value: &Value) -> Self {
        let kind = match value.get("addressType") {
            Some(Value::String(text)) if text == "udp4" => QueryKind::Udp4,
            Some(Value::String(text)) if text == "udp6" => QueryKind::Udp6,
            Some(Value::Number(number)) if number.as_i64() == Some(6) => QueryKind::Tcp6,
            Some(Value::Number(number)) if number.as_i64() == Some(-1) => QueryKind::Unix,
            Some(Value::Number(_)) => QueryKind::Tcp4,
            _ => QueryKind::Descriptor,
        };
        let number = |name: &str| value.get(name).and_then(Value::as_i64);
        let flag = |name: &str, mode: u32| match value.get(name) {
            Some(Value::Bool(true)) => mode,
            _ => 0,
        };
        Self {
            seq: value.get("seq").and_then(Value::as_u64).unwrap_or(0),
            address: value.get("address").and_then(Value::as_str).map(str::to_owned),
            port: number("port"),
            kind,
            fd: number("fd"),
            index: number("index").unwrap_or(0),
            flags: number("flags").unwrap_or(0),
            backlog: number("backlog").and_then(|n| u32::try_from(n).ok()).unwrap_or(0),
            mode: flag("readableAll", 0o444) | flag("writableAll", 0o222),
            data: value.get("data").map_or_else(|| "null".to_owned(), Value::to_string),
        }
    }
}

/// The key of one slot's socket, where every slot listens with a socket of its own.
#[must_use]
pub fn slot_key(key: &str, slot: u32) -> String {
    format!("{key}#{slot}")
}

/// The key that all slots' sockets have in common, and the slot; `None` for a listener that all slots share. No other
/// key ends like that: the last part is a number or a word.
#[must_use]
pub fn split_slot_key(key: &str) -> Option<(&str, u32)> {
    let (common, slot) = key.rsplit_once('#')?;
    Some((common, slot.parse().ok()?))
}

/// The part of a key that says what the app asked for.
#[must_use]
pub fn common_key(key: &str) -> &str {
    split_slot_key(key).map_or(key, |(common, _)| common)
}

fn scoped(text: &str, port: u16) -> Option<SocketAddr> {
    let (ip, zone) = text.split_once('%')?;
    let ip: Ipv6Addr = ip.parse().ok()?;
    let scope = zone.parse().ok().or_else(|| interface_index(zone))?;
    Some(SocketAddr::V6(std::net::SocketAddrV6::new(ip, port, 0, scope)))
}

const ACK_LINE: &[u8] = br#"{"cmd":"NODE_HANDLE_ACK"}"#;
const NACK_LINE: &[u8] = br#"{"cmd":"NODE_HANDLE_NACK"}"#;
const ANSWER_HEAD: &[u8] = br#"{"cmd":"NODE_CLUSTER","ack":"#;
const ACCEPTED: &[u8] = br#","accepted":true"#;
const HANDLE_HEAD: &[u8] = br#"{"cmd":"NODE_HANDLE","#;
const INTERNAL: &[u8] = br#""cmd":"NODE_"#;
/// A longer line is internal only when it begins as Node's own do.
const SNIFFED_WHOLE: usize = 8 * 1024;

/// Reads a line; `whole` is false when only its head is here. The mark of Bun must be gone.
#[must_use]
pub fn read(line: &[u8], whole: bool) -> Incoming {
    // Two of these come for every connection.
    if line == ACK_LINE {
        return Incoming::HandleAck;
    }
    if let Some(incoming) = read_accepted(line) {
        return incoming;
    }
    if line == NACK_LINE {
        return Incoming::HandleNack;
    }
    if line == br#""ready""# || line == b"ready" {
        return Incoming::Ready;
    }
    // Before any parsing: the worker waits for the ACK also when its message is one that serde_json refuses.
    if line.starts_with(HANDLE_HEAD) {
        let message = if whole { serde_json::from_slice::<Value>(line).ok() } else { None };
        return Incoming::Handle { message: message.and_then(|v| v.get("msg").map(Value::to_string)) };
    }
    let internal = line.starts_with(b"{")
        && (line[1..].starts_with(INTERNAL)
            || (line.len() <= SNIFFED_WHOLE && line.windows(INTERNAL.len()).any(|part| part == INTERNAL)));
    if !internal || !whole {
        return Incoming::User;
    }
    let Ok(value) = serde_json::from_slice::<Value>(line) else { return Incoming::User };
    let cmd = value.get("cmd").and_then(Value::as_str).unwrap_or_default();
    let text = |name: &str| value.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    match cmd {
        "NODE_CLUSTER" => read_cluster(&value),
        "NODE_HANDLE_ACK" => Incoming::HandleAck,
        "NODE_HANDLE_NACK" => Incoming::HandleNack,
        "NODE_HANDLE" => Incoming::Handle { message: value.get("msg").map(Value::to_string) },
        "NODE_SOCKET_GET_COUNT" => Incoming::SocketCount { key: text("key") },
        "NODE_SOCKET_NOTIFY_CLOSE" => Incoming::SocketClose { key: text("key") },
        "NODE_PM_HELLO" => Incoming::Agent(AgentMessage::Hello { version: text("version") }),
        "NODE_PM_LISTENERS" => {
            let count = value.get("count").and_then(Value::as_u64).and_then(|n| u32::try_from(n).ok());
            match (Signal::from_name(&text("signal")), count) {
                (Some(signal), Some(count)) => Incoming::Agent(AgentMessage::Listeners { signal, count }),
                _ => Incoming::Ignored,
            }
        }
        "NODE_PM_DRAINED" => Incoming::Agent(AgentMessage::Drained),
        "NODE_PM_CLOSED" => match value.get("closed").and_then(Value::as_u64) {
            Some(closed) => {
                let received = value.get("received").and_then(Value::as_u64);
                Incoming::Agent(AgentMessage::Closed { received, closed })
            }
            None => Incoming::Ignored,
        },
        "NODE_PM_STATS" => {
            let ask = value.get("ask").and_then(Value::as_u64).unwrap_or(0);
            Incoming::Agent(AgentMessage::Figures { ask, figures: Box::new(read_figures(&value)) })
        }
        _ if cmd.len() > 5 && cmd.starts_with("NODE_") => Incoming::Ignored,
        _ => Incoming::User,
    }
}

/// `{"cmd":"NODE_CLUSTER","ack":7,"accepted":true,…}` without a parser.
fn read_accepted(line: &[u8]) -> Option<Incoming> {
    let rest = line.strip_prefix(ANSWER_HEAD)?;
    let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
    if digits == 0 || digits > 18 || !rest[digits..].starts_with(ACCEPTED) {
        return None;
    }
    let ack = rest[..digits].iter().fold(0, |sum: u64, digit| sum * 10 + u64::from(digit - b'0'));
    Some(Incoming::Answer { ack, accepted: true })
}

/// What is missing or no number counts as not measured.
fn read_figures(value: &Value) -> NodeFigures {
    let count = |value: &Value| value.as_u64().unwrap_or(0);
    let spread = |values: &[Value]| match values {
        [p50, p95, p99] => Some(Spread { p50: p50.as_f64()?, p95: p95.as_f64()?, p99: p99.as_f64()? }),
        _ => None,
    };
    let list = |name: &str| value.get(name).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let heap = |index: usize| list("heap").get(index).map_or(0, count);
    let small = |name: &str| value.get(name).map_or(0, count).try_into().unwrap_or(u32::MAX);
    NodeFigures {
        heap_used: heap(0),
        heap_total: heap(1),
        external: heap(2),
        array_buffers: heap(3),
        loop_delay: spread(list("loop")),
        handles: small("handles"),
        requests: small("requests"),
        connections: value.get("connections").map_or(0, count),
        http: list("http").split_first().map(|(rate, latency)| HttpFigures {
            per_second: rate.as_f64().unwrap_or(0.0),
            latency: spread(latency),
        }),
    }
}

fn read_cluster(value: &Value) -> Incoming {
    if let Some(ack) = value.get("ack").and_then(Value::as_u64) {
        let accepted = value.get("accepted") == Some(&Value::Bool(true));
        return Incoming::Answer { ack, accepted };
    }
    match value.get("act").and_then(Value::as_str).unwrap_or_default() {
        "online" => Incoming::Online,
        "queryServer" => Incoming::Query(Query::read(value)),
        "listening" => Incoming::Listening(Query::read(value)),
        "close" => {
            Incoming::Close { key: value.get("key").and_then(Value::as_str).unwrap_or_default().to_owned() }
        }
        "exitedAfterDisconnect" => {
            Incoming::Leaving { seq: value.get("seq").and_then(Value::as_u64).unwrap_or(0) }
        }
        _ => Incoming::Ignored,
    }
}

/// The text as a JSON string, quotes included.
#[must_use]
pub fn json(text: &str) -> String {
    Value::from(text).to_string()
}

/// Acknowledges a handle of the worker's.
#[must_use]
pub fn handle_ack() -> Vec<u8> {
    [ACK_LINE, b"\n"].concat()
}

/// The part of a `newconn` line before its sequence number; the key does not change in a listener's life.
#[must_use]
pub fn newconn_head(key: &str) -> Vec<u8> {
    format!(
        r#"{{"cmd":"NODE_HANDLE","type":"net.Native","msg":{{"cmd":"NODE_CLUSTER","act":"newconn","key":{},"seq":"#,
        json(key)
    )
    .into_bytes()
}

/// Completes a `newconn` line in `buffer`.
pub fn newconn(buffer: &mut Vec<u8>, head: &[u8], seq: u64) {
    use std::io::Write as _;

    buffer.extend_from_slice(head);
    // Writing to a Vec cannot fail.
    let _ = writeln!(buffer, "{seq}}}}}");
}

/// A worker's listener, for the reply to its query.
#[derive(Debug, Clone, Copy)]
pub struct Granted<'a> {
    /// The listener's key.
    pub key: &'a str,
    /// The query's number.
    pub ack: u64,
    /// TLS ticket keys of the first worker, as JSON.
    pub data: &'a str,
    /// Ours.
    pub seq: u64,
}

/// The reply after which a worker awaits connections from us.
#[must_use]
pub fn granted_by_turns(granted: Granted<'_>, address: Option<SocketAddr>) -> Vec<u8> {
    let Granted { key, ack, data, seq } = granted;
    // `sockname` is what `server.address()` returns in the worker.
    let sockname = address.map_or_else(String::new, |address| {
        let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
        format!(
            r#","sockname":{{"address":"{}","family":"{family}","port":{}}}"#,
            address.ip(),
            address.port()
        )
    });
    format!(
        "{{\"cmd\":\"NODE_CLUSTER\",\"errno\":null,\"key\":{},\"ack\":{ack},\"data\":{data}{sockname},\"seq\":{seq}}}\n",
        json(key)
    )
    .into_bytes()
}

/// The reply that carries the listening socket itself.
#[must_use]
pub fn granted_shared(granted: Granted<'_>, datagram: bool) -> Vec<u8> {
    let Granted { key, ack, data, seq } = granted;
    let kind = if datagram { "dgram.Native" } else { "net.Native" };
    format!(
        "{{\"cmd\":\"NODE_HANDLE\",\"type\":\"{kind}\",\"msg\":{{\"cmd\":\"NODE_CLUSTER\",\"errno\":0,\"key\":{},\"ack\":{ack},\"data\":{data},\"seq\":{seq}}}}}\n",
        json(key)
    )
    .into_bytes()
}

/// The reply that makes `listen()` fail; `errno` is negative (a positive one throws in the worker).
#[must_use]
pub fn refused(key: &str, ack: u64, errno: i32, seq: u64) -> Vec<u8> {
    let errno = -errno.saturating_abs();
    format!(
        "{{\"cmd\":\"NODE_CLUSTER\",\"errno\":{errno},\"key\":{},\"ack\":{ack},\"data\":null,\"seq\":{seq}}}\n",
        json(key)
    )
    .into_bytes()
}

/// The reply to `exitedAfterDisconnect`.
#[must_use]
pub fn may_leave(ack: u64, seq: u64) -> Vec<u8> {
    format!("{{\"cmd\":\"NODE_CLUSTER\",\"ack\":{ack},\"seq\":{seq}}}\n").into_bytes()
}

/// Asks a worker to close its servers, and its channel once their connections have ended.
#[must_use]
pub fn disconnect(seq: u64) -> Vec<u8> {
    format!("{{\"cmd\":\"NODE_CLUSTER\",\"act\":\"disconnect\",\"seq\":{seq}}}\n").into_bytes()
}

/// We keep no socket of a worker: none is open here.
#[must_use]
pub fn socket_count(key: &str) -> Vec<u8> {
    format!("{{\"cmd\":\"NODE_SOCKET_COUNT\",\"key\":{},\"count\":0}}\n", json(key)).into_bytes()
}

/// Likewise; without it `server.close` in that worker never completes.
#[must_use]
pub fn sockets_closed(key: &str) -> Vec<u8> {
    format!("{{\"cmd\":\"NODE_SOCKET_ALL_CLOSED\",\"key\":{}}}\n", json(key)).into_bytes()
}

/// What the preload is to do from the beginning.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Greeting {
    /// Follow websockets: a drain will close them.
    pub websockets: bool,
}

/// Wakes the preload.
#[must_use]
pub fn agent_hello(greeting: Greeting) -> Vec<u8> {
    format!("{{\"cmd\":\"NODE_PM_HELLO\",\"websockets\":{}}}\n", greeting.websockets).into_bytes()
}

/// Asks the preload what it has measured.
#[must_use]
pub fn agent_figures(ask: u64) -> Vec<u8> {
    format!("{{\"cmd\":\"NODE_PM_STATS\",\"ask\":{ask}}}\n").into_bytes()
}

/// Asks the preload how many listeners the app has for a signal.
#[must_use]
pub fn agent_listeners(signal: Signal) -> Vec<u8> {
    format!("{{\"cmd\":\"NODE_PM_LISTENERS\",\"signal\":\"{signal}\"}}\n").into_bytes()
}

/// Hands a socket to the preload, which gives it to the app's HTTP server as a connection of its own.
#[must_use]
pub fn agent_probe() -> Vec<u8> {
    b"{\"cmd\":\"NODE_HANDLE\",\"type\":\"net.Native\",\"msg\":{\"cmd\":\"NODE_PM_PROBE\"}}\n".to_vec()
}

/// Asks the preload to report how many of the connections that we hand over are closed again: at once, then whenever
/// some have ended.
#[must_use]
pub fn agent_watch() -> Vec<u8> {
    b"{\"cmd\":\"NODE_PM_WATCH\"}\n".to_vec()
}

/// What happens to idle keep-alive connections while an instance drains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Idle {
    /// They are closed at once: nobody else serves.
    CloseNow,
    /// They may send one more request, whose response says `Connection: close`; closed when the time is over.
    Wait,
}

/// What happens to requests that are in flight when patience is at its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InFlight {
    /// They are left to the app's own handler.
    Leave,
    /// They are waited for: nobody else would.
    Finish,
}

/// How connections are to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drain {
    /// Idle ones.
    pub idle: Idle,
    /// How long idle ones may wait for their next request; `None`: as long as the app's server would, and a second.
    pub patience: Option<Duration>,
    /// Requests.
    pub in_flight: InFlight,
    /// Close websockets with 1001, "going away", instead of leaving them.
    pub websockets: bool,
    /// How long everything may take.
    pub within: Duration,
}

/// Asks the preload to let the app's connections end.
#[must_use]
pub fn agent_drain(drain: Drain) -> Vec<u8> {
    let idle = match drain.idle {
        Idle::CloseNow => "close",
        Idle::Wait => "wait",
    };
    let requests = match drain.in_flight {
        InFlight::Leave => "leave",
        InFlight::Finish => "finish",
    };
    let patience = drain.patience.map_or_else(|| "null".to_owned(), |time| time.as_millis().to_string());
    let (websockets, within) = (drain.websockets, drain.within.as_millis());
    format!(
        "{{\"cmd\":\"NODE_PM_DRAIN\",\"idle\":\"{idle}\",\"patience\":{patience},\"requests\":\"{requests}\",\"websockets\":{websockets},\"within\":{within}}}\n"
    )
    .into_bytes()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn query(line: &str) -> Query {
        match read(line.as_bytes(), true) {
            Incoming::Query(query) => query,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn lines_as_workers_write_them() {
        for (line, expected) in [
            (r#"{"cmd":"NODE_HANDLE_ACK"}"#, Incoming::HandleAck),
            (r#"{"cmd":"NODE_HANDLE_NACK"}"#, Incoming::HandleNack),
            (
                r#"{"cmd":"NODE_CLUSTER","ack":71,"accepted":true,"seq":3}"#,
                Incoming::Answer { ack: 71, accepted: true },
            ),
            (
                r#"{"cmd":"NODE_CLUSTER","ack":1,"accepted":false,"seq":4}"#,
                Incoming::Answer { ack: 1, accepted: false },
            ),
            (
                r#"{ "accepted":true, "ack":1, "cmd":"NODE_CLUSTER" }"#,
                Incoming::Answer { ack: 1, accepted: true },
            ),
            (r#"{"cmd":"NODE_CLUSTER","act":"online","seq":0}"#, Incoming::Online),
            (r#"{"cmd":"NODE_CLUSTER","act":"exitedAfterDisconnect","seq":5}"#, Incoming::Leaving { seq: 5 }),
            (
                r#"{"cmd":"NODE_CLUSTER","act":"close","key":"null:80:4:undefined","seq":4}"#,
                Incoming::Close { key: "null:80:4:undefined".to_owned() },
            ),
            (
                r#"{"cmd":"NODE_SOCKET_GET_COUNT","key":"4:null:29180"}"#,
                Incoming::SocketCount { key: "4:null:29180".to_owned() },
            ),
            (r#"{"cmd":"NODE_DEBUG_ENABLED"}"#, Incoming::Ignored),
            (
                r#"{"cmd":"NODE_HANDLE","type":"net.Socket","msg":{"a":1}}"#,
                Incoming::Handle { message: Some(r#"{"a":1}"#.to_owned()) },
            ),
            // A lone surrogate is fine for JSON.stringify and not for serde_json.
            (
                r#"{"cmd":"NODE_HANDLE","type":"net.Socket","msg":"\ud800"}"#,
                Incoming::Handle { message: None },
            ),
            (
                r#"{"cmd":"NODE_PM_LISTENERS","signal":"SIGINT","count":2}"#,
                Incoming::Agent(AgentMessage::Listeners { signal: Signal::INT, count: 2 }),
            ),
            (
                r#"{"cmd":"NODE_PM_CLOSED","received":5,"closed":3}"#,
                Incoming::Agent(AgentMessage::Closed { received: Some(5), closed: 3 }),
            ),
            (
                r#"{"cmd":"NODE_PM_CLOSED","closed":4}"#,
                Incoming::Agent(AgentMessage::Closed { received: None, closed: 4 }),
            ),
            (
                r#"{"cmd":"NODE_PM_STATS","ask":7,"heap":[5,9,2,1],"loop":[0.5,2,30.25],"handles":6,"requests":1,"connections":4,"http":[12.5,1,2,3.5]}"#,
                Incoming::Agent(AgentMessage::Figures {
                    ask: 7,
                    figures: Box::new(NodeFigures {
                        heap_used: 5,
                        heap_total: 9,
                        external: 2,
                        array_buffers: 1,
                        loop_delay: Some(Spread { p50: 0.5, p95: 2.0, p99: 30.25 }),
                        handles: 6,
                        requests: 1,
                        connections: 4,
                        http: Some(HttpFigures {
                            per_second: 12.5,
                            latency: Some(Spread { p50: 1.0, p95: 2.0, p99: 3.5 }),
                        }),
                    }),
                }),
            ),
            // Nothing measured yet.
            (
                r#"{"cmd":"NODE_PM_STATS","ask":8,"heap":[5,9,2,"x"],"loop":[null,null,null],"http":null}"#,
                Incoming::Agent(AgentMessage::Figures {
                    ask: 8,
                    figures: Box::new(NodeFigures {
                        heap_used: 5,
                        heap_total: 9,
                        external: 2,
                        ..NodeFigures::default()
                    }),
                }),
            ),
            (r#"{"cmd":"NODE_PM_CLOSED","closed":"4"}"#, Incoming::Ignored),
            (r#""ready""#, Incoming::Ready),
        ] {
            assert_eq!(read(line.as_bytes(), true), expected, "{line}");
        }
        for line in [
            "null",
            "1",
            "",
            "[",
            "{}",
            r#"{"cmd":"NODE_"}"#,
            r#"{"cmd":7}"#,
            "{\"cmd\":\"NODE_CLUSTER\"",
            "\u{2}",
        ] {
            assert_eq!(read(line.as_bytes(), true), Incoming::User, "{line}");
        }
    }

    #[test]
    fn queries_become_places_and_keys() {
        for (fields, key, place) in [
            (
                r#""address":null,"port":18081,"addressType":4,"flags":0,"backlog":0"#,
                "null:18081:4:undefined",
                Ok(Place::TcpAny { port: 18081 }),
            ),
            (
                r#""address":"127.0.0.1","port":80,"addressType":4"#,
                "127.0.0.1:80:4:undefined",
                Ok(Place::Tcp { address: ([127, 0, 0, 1], 80).into(), v6_only: false }),
            ),
            (
                r#""address":"::","port":80,"addressType":6,"flags":1,"backlog":77"#,
                ":::80:6:undefined",
                Ok(Place::Tcp { address: (Ipv6Addr::UNSPECIFIED, 80).into(), v6_only: true }),
            ),
            (
                r#""address":null,"port":0,"addressType":4,"index":1"#,
                "null:0:4:undefined:1",
                Ok(Place::TcpAny { port: 0 }),
            ),
            (
                r#""address":"/run/x.sock","port":-1,"addressType":-1,"readableAll":true"#,
                "/run/x.sock:-1:-1:undefined",
                Ok(Place::Unix { path: "/run/x.sock".into(), mode: 0o444 }),
            ),
            (
                r#""address":"/cwd/\u0000x","port":-1,"addressType":-1"#,
                "/cwd/\0x:-1:-1:undefined",
                Err(INVALID),
            ),
            (
                r#""address":null,"port":null,"addressType":null,"fd":3"#,
                "null:null:null:3:0",
                Ok(Place::Configured { fd: 3 }),
            ),
            (
                r#""address":"0.0.0.0","port":53,"addressType":"udp4","fd":-1,"flags":4"#,
                "0.0.0.0:53:udp4:-1",
                Ok(Place::Udp { address: ([0, 0, 0, 0], 53).into(), v6_only: false, reuse: true }),
            ),
            (r#""address":"nonsense","port":80,"addressType":4"#, "nonsense:80:4:undefined", Err(INVALID)),
            (r#""address":null,"port":70000,"addressType":4"#, "null:70000:4:undefined", Err(INVALID)),
        ] {
            let line = format!(r#"{{"cmd":"NODE_CLUSTER","act":"queryServer",{fields},"seq":1}}"#);
            let query = query(&line);
            assert_eq!(query.key(), key);
            assert_eq!(query.place(), place, "{fields}");
        }
    }

    #[test]
    fn replies_as_a_genuine_primary_writes_them() {
        let granted = Granted { key: "null:18081:4:undefined", ack: 1, data: "null", seq: 0 };
        assert_eq!(
            String::from_utf8(granted_by_turns(granted, Some((Ipv6Addr::UNSPECIFIED, 18081).into())))
                .unwrap(),
            "{\"cmd\":\"NODE_CLUSTER\",\"errno\":null,\"key\":\"null:18081:4:undefined\",\"ack\":1,\"data\":null,\"sockname\":{\"address\":\"::\",\"family\":\"IPv6\",\"port\":18081},\"seq\":0}\n"
        );
        assert_eq!(
            String::from_utf8(refused("null:1:4:undefined", 1, 98, 0)).unwrap(),
            "{\"cmd\":\"NODE_CLUSTER\",\"errno\":-98,\"key\":\"null:1:4:undefined\",\"ack\":1,\"data\":null,\"seq\":0}\n"
        );
        let mut line = Vec::new();
        newconn(&mut line, &newconn_head("a\"b"), 7);
        let value: Value = serde_json::from_slice(&line).unwrap();
        assert_eq!(value["msg"]["key"], "a\"b");
        assert_eq!(value["msg"]["seq"], 7);
    }

    proptest! {
        #[test]
        fn no_line_is_harmful(line in prop::collection::vec(any::<u8>(), 0..200), whole: bool) {
            let _ = read(&line, whole);
        }

        #[test]
        fn no_query_is_harmful(
            address in prop::option::of("[a-z0-9:./%]{0,30}"),
            port in any::<i64>(), kind in prop::sample::select(vec!["4", "6", "-1", "\"udp4\"", "\"udp6\"", "null", "{}"]),
            fd in any::<i64>(),
        ) {
            let address = address.map_or_else(|| "null".to_owned(), |text| json(&text));
            let line = format!(
                r#"{{"cmd":"NODE_CLUSTER","act":"queryServer","address":{address},"port":{port},"addressType":{kind},"fd":{fd}}}"#
            );
            let query = query(&line);
            let _ = (query.key(), query.place(), query.display(None));
        }
    }
}
