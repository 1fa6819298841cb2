//! Node's IPC channel and cluster protocol, spoken as the cluster primary. Values in, values out: no descriptor is
//! touched here (the one thing asked of the system is the number of a network interface in an address).
//!
//! The protocol is internal to Node; what is known of it for versions 18 to 24 was established by running them.

pub mod channel;
pub mod choice;
pub mod messages;
pub mod primary;

/// The preload that Node apps run with: `node --require <file> script`.
pub const AGENT: &str = include_str!("agent.cjs");
