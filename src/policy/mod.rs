//! Decisions: events and the time in, actions out.
//!
//! No clock, no randomness, no async, no files, no serde. The same `Fleet` runs in the daemon and in the simulation
//! of `tests/sim`.

mod admit;
mod app;
mod asked;
mod batch;
mod depends;
mod ending;
mod ends;
pub mod finished;
pub mod fleet;
mod health;
mod hooks;
mod instance;
mod ledger;
pub mod memory;
pub mod news;
mod operation;
pub mod plan;
mod reload;
pub mod reload_plan;
mod requests;
mod restart;
mod restore;
mod rollback;
mod rolling;
mod slot;
mod stop;
pub mod target;
pub mod vocabulary;
mod wanted;
