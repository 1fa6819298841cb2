//! What the agent in a Node process measures, as it reports it.

use serde::{Deserialize, Serialize};

/// The inside of a Node process.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeFigures {
    /// Bytes of V8's heap in use.
    pub heap_used: u64,
    /// Bytes of V8's heap.
    pub heap_total: u64,
    /// Bytes of C++ objects that JavaScript objects hold.
    pub external: u64,
    /// Bytes of buffers; part of `external`.
    pub array_buffers: u64,
    /// How late timers were in the last 15 to 30 seconds, milliseconds; `None` before the first.
    pub loop_delay: Option<Spread>,
    /// Sockets, servers, child processes and the like that keep the process alive.
    pub handles: u32,
    /// File operations, name lookups and the like that are under way.
    pub requests: u32,
    /// Open connections of its servers.
    pub connections: u64,
    /// `None` before its first request.
    pub http: Option<HttpFigures>,
}

/// HTTP requests of the last 15 to 30 seconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HttpFigures {
    /// Answered requests per second.
    pub per_second: f64,
    /// From the request's head to the end of the response, milliseconds; `None` when there was none.
    pub latency: Option<Spread>,
}

/// How values are spread, to 5 %.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// Half are below.
    pub p50: f64,
    /// 95 % are below.
    pub p95: f64,
    /// 99 % are below.
    pub p99: f64,
}
