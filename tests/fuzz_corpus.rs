//! Replays the inputs of the fuzzers, which come from real traffic and from what fuzzing has found, on stable.
//!
//! `fuzz/run.sh` looks for new ones; an input that breaks something is put into `fuzz/corpus` with its fix.

#![expect(clippy::unwrap_used, clippy::print_stderr, reason = "a test that fails says which input it was")]

use std::fs;
use std::path::Path;

#[path = "../fuzz/checks/mod.rs"]
mod checks;

/// Runs every input of a target; at least so many, so that a lost corpus is noticed.
fn replay(target: &str, at_least: usize, check: fn(&[u8])) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut inputs: Vec<_> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    inputs.sort();
    assert!(inputs.len() >= at_least, "{} inputs in {}", inputs.len(), dir.display());
    for path in inputs {
        let input = fs::read(&path).unwrap();
        if let Err(panic) = std::panic::catch_unwind(|| check(&input)) {
            eprintln!("this came of {}", path.display());
            std::panic::resume_unwind(panic);
        }
    }
}

#[test]
fn pain_43_frames_between_keeper_and_supervisor() {
    replay("keeper_wire", 30, checks::keeper_wire);
}

#[test]
fn pain_43_lines_between_commands_and_supervisor() {
    replay("cli_protocol", 30, checks::cli_protocol);
}

#[test]
fn pain_43_channels_of_node_workers() {
    replay("node_channel", 30, checks::node_channel);
}

#[test]
fn pain_43_config_files() {
    replay("config", 30, checks::config);
}

#[test]
fn pain_43_lines_of_logs() {
    replay("log_framing", 30, checks::log_framing);
}
