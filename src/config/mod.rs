//! The user's file or command line becomes resolved specs, or an error with file, line and key.
//!
//! The way of a value: [`mod@file`] reads TOML by the table of keys in [`schema`] into an [`app::AppConfig`], where
//! each value knows its place; [`overrides`] lays the command line over it; [`resolve`] checks it against the machine
//! and makes an [`crate::model::spec::AppSpec`] of it.
//!
//! This layer looks at files (does the script exist, is the interpreter in PATH) and never changes, starts or
//! connects to anything. It runs in the command line as the caller, never in the daemon.

pub mod app;
pub mod balance;
mod command;
mod depends;
pub mod error;
pub mod file;
pub mod listen;
pub mod overrides;
pub mod paths;
pub mod probe;
pub mod process;
pub mod resolve;
pub mod schema;
mod secrets;
pub mod template;
pub mod units;
mod unknown;
mod value;
pub mod words;
