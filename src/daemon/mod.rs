//! Wiring: how keeper and supervisor come up and go down.

pub mod keep;
pub mod supervise;
