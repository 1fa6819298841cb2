//! What is on disk: paths and the saved state.

pub mod container;
pub mod env_file;
pub mod environment;
pub mod events;
pub mod paths;
pub mod state;
