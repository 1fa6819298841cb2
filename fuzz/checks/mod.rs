//! What must hold for any input at the places where bytes come in. Used by the fuzz targets beside this directory and, on
//! stable and with the inputs in `corpus`, by `tests/fuzz_corpus.rs`.
#![allow(dead_code, unused_imports, reason = "a fuzz target uses one of them")]

mod cli;
mod config;
mod keeper;
mod logs;
mod node;

pub(crate) use cli::cli_protocol;
pub(crate) use config::config;
pub(crate) use keeper::keeper_wire;
pub(crate) use logs::log_framing;
pub(crate) use node::node_channel;
