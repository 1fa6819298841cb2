//! Wiring: how keeper and supervisor come up and go down.

mod inherit;
pub mod keep;
pub mod supervise;
