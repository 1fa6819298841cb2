//! CPU and memory of process trees and of the host.
//!
//! [`sample`] turns what /proc says into numbers per instance, [`tree`] remembers which process belongs to which
//! instance, [`watch`] measures those that have a memory limit, [`host`] looks at the whole machine. Everything is synchronous and meant for a thread that may take some
//! milliseconds; nothing here sends signals or decides anything.

pub mod host;
pub mod sample;
pub mod tree;
pub mod watch;
