//! Runs `checks::cli_protocol` on whatever libfuzzer thinks of.
#![no_main]

#[path = "../checks/mod.rs"]
mod checks;

libfuzzer_sys::fuzz_target!(|input: &[u8]| checks::cli_protocol(input));
