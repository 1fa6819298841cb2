//! The only owner of a `Fleet`: turns what happens into events, and actions into effects.
//!
//! May die at any instant: the keeper starts the next one, which takes over from the inventory, the blob and
//! state.json. Nothing here is needed for an app to go on serving.

pub mod blob;
pub mod blob_memory;
pub mod closings;
mod details;
pub mod driver;
mod figures;
mod fnv;
pub mod foreground;
pub mod handle;
pub mod jlist;
pub mod journal;
pub mod launch;
pub mod listeners;
mod memory;
pub mod notices;
pub mod operations;
pub mod outcome;
pub mod outside;
pub mod plan_view;
pub mod probe;
pub mod publish;
pub mod ready;
pub mod recovery;
pub mod rights;
pub mod room;
pub mod run;
pub mod saver;
pub mod shells;
pub mod silence;
pub mod steering;
pub mod tag;
pub mod takeover;
pub mod upgrade;
pub mod variables;
pub mod world;
