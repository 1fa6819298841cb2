//! The parent of every process: spawns, reaps, holds descriptors. Knows nothing of apps.
//!
//! ```text
//! run      the keeper itself: one thread, a poll loop, never waits for anybody; run/upgrade: another program;
//!          run/ending: the end that no supervisor brings about
//! restarts when the next supervisor is started
//! link     the supervisor's end of the link
//! wire     the frames between them        packet   frames with descriptors over a packet socket
//! claim    which of two supervisors goes on, when this one dies in the middle of an upgrade
//! children the children and what is held for them: the content of an inventory
//! mirror   the same, as the supervisor knows it        handover   from there to the next keeper, when this one dies
//! ```
//!
//! The keeper is the parent so that the supervisor may die at any instant: children keep their parent, exited ones
//! stay zombies until a supervisor has confirmed their exit, and descriptors are held under names. Everything a new
//! supervisor has to know is in the inventory.

mod children;
mod claim;
pub mod handover;
pub mod link;
pub mod mirror;
mod packet;
mod restarts;
pub mod run;
pub mod wire;

pub use run::{Config, Error, Resumed, run};
