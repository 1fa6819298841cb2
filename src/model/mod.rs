//! Plain values that every layer shares: names, specs, signals, exit reasons, what is saved and what is shown.
//!
//! No I/O, no clock, no randomness. The types derive serde so that the state file, the blob and the command line's
//! protocol carry the same values instead of three mirrors of sixty fields; fixtures keep old formats loadable.

pub mod address;
pub mod difference;
pub mod exit;
pub mod figures;
pub mod foreground;
pub mod id;
pub mod mask;
pub mod moment;
pub mod process;
pub mod saved;
pub mod signal;
pub mod spec;
pub mod spelling;
pub mod status;
