//! The real daemon with real processes: each module a subject, each test a sentence.
//!
//! Every test has a home of its own and leaves no process behind (`support::home`); waiting has deadlines
//! (`support::wait`); tests that put load on or measure time have the machine to themselves (`support::machine`).
#![expect(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test that cannot go on has failed, and says why"
)]

mod agent;
mod apply;
mod bad_input;
mod balance;
mod config_keys;
mod confinement;
mod crash;
mod crash_daemon;
mod daemon;
mod depends_on;
mod disk;
mod env;
mod events;
mod exhaustion;
mod groups;
mod harness;
mod hooks;
mod jlist_format;
mod keepalive;
mod kills;
mod languages;
mod limits;
mod log_lines;
mod logs;
mod memory;
mod mix;
mod node_apps;
mod numbers;
mod offline;
mod overlap;
mod pains;
mod probes;
mod ready;
mod reload;
mod restart_policy;
mod run;
mod save_resurrect;
mod security;
mod serve;
mod sockets;
mod start_list;
mod stopping;
mod strategies;
mod support;
mod surprises;
mod targets;
mod trees;
mod upgrade;
