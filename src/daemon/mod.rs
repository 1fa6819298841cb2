//! Wiring: how keeper and supervisor come up and go down.

pub mod foreground;
mod inherit;
pub mod keep;
pub mod supervise;
