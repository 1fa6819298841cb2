//! The command line against a supervisor that says what the test wants: output, exit codes, and every way in which a
//! daemon can be missing, silent or gone.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

mod output;
mod reach;
mod world;
