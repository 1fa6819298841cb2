//! Runs `checks::log_framing` on whatever libfuzzer thinks of.
#![no_main]

#[path = "../checks/mod.rs"]
mod checks;

libfuzzer_sys::fuzz_target!(|input: &[u8]| checks::log_framing(input));
