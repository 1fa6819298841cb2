//! The protocol between the command line and the supervisor.
//!
//! JSON lines over a unix stream socket: the client writes one [`protocol::Call`] per request, the server answers
//! with [`protocol::Line`]s that carry the call's id; the last one is an `Answer` or a `Refused`.

pub mod client;
pub mod codec;
pub mod protocol;
pub mod server;
pub mod strict;
