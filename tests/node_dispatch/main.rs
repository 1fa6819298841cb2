//! Real Node workers against the dispatch thread: what an unmodified app sees of its cluster primary.
//!
//! Runs on the installed Node, and on every other that `PM_TEST_NODES` names (paths with colons between).

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests; the exemption in .clippy.toml covers test functions only"
)]

mod agent;
mod connections;
mod handover;
mod killed;
mod listening;
mod messages;
mod replacement;
mod world;
