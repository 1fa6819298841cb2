//! Runs `checks::keeper_wire` on whatever libfuzzer thinks of.
#![no_main]

#[path = "../checks/mod.rs"]
mod checks;

libfuzzer_sys::fuzz_target!(|input: &[u8]| checks::keeper_wire(input));
