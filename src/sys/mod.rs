//! Processes, sockets, locks and clocks: the thin layer over the kernel, and the only home of unsafe code.

pub mod cgroup;
pub mod child;
pub mod clock;
pub mod cpus;
pub mod exec;
pub mod fdpass;
pub mod helper;
pub mod holder;
pub mod inherited;
pub mod limits;
pub mod listen;
pub mod lock;
pub mod memfd;
pub mod memory;
pub mod notify;
pub mod orphans;
pub mod peer;
pub mod pidfd;
pub mod pipe;
pub mod poll;
pub mod procfs;
pub mod reuseport;
pub mod scm;
pub mod spawn;
pub mod tree;
pub mod watch;
