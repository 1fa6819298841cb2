//! `pm`: a process manager and zero-downtime deploy daemon.
//!
//! The layers and what each may import are described in `docs/architecture.md`; `tests/tidy.rs` guards them.

pub mod cli;
pub mod config;
pub mod daemon;
pub mod dispatch;
pub mod ipc;
pub mod keeper;
pub mod logs;
pub mod metrics;
pub mod model;
pub mod node;
pub mod policy;
pub mod store;
pub mod supervisor;
pub mod sys;
