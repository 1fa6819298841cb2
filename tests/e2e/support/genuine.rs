//! A genuine Node cluster primary, to compare with; and other helpers that are not `pm`.

use std::process::Command;

use super::home::{Home, Running};
use super::node::Node;
use super::{SOON, fixture, process, wait_until};

/// A process of a test that is not run by `pm`; its tree is ended with it.
#[derive(Debug)]
pub(crate) struct Helper {
    running: Running,
}

impl Helper {
    pub(crate) fn start(command: Command) -> Self {
        Self { running: Running::start(command, b"") }
    }

    pub(crate) fn pid(&self) -> i32 {
        self.running.pid()
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        for pid in process::tree(self.pid()) {
            process::end(pid);
        }
        let _ = self.running.child.wait();
    }
}

/// Runs `script` in `workers` workers of a genuine primary. Workers find `variables` in their environment.
pub(crate) fn primary(
    home: &Home,
    node: &Node,
    script: &str,
    workers: usize,
    policy: &str,
    variables: &[(&str, &str)],
) -> Helper {
    let mut command = Command::new(&node.binary);
    home.environment(&mut command);
    command
        .arg(fixture("primary.js"))
        .args([script, &workers.to_string()])
        .env("NODE_CLUSTER_SCHED_POLICY", policy)
        .envs(variables.iter().copied());
    Helper::start(command)
}

/// Holds a TCP port in a process of its own, and returns when it listens.
pub(crate) fn port_holder(home: &Home, port: u16) -> Helper {
    let mut command = Command::new(super::node::python());
    home.environment(&mut command);
    command.args([&fixture("hold-port.py"), &port.to_string()]);
    let helper = Helper::start(command);
    wait_until("the foreign process listens", SOON, || {
        std::net::TcpStream::connect(("127.0.0.1", port)).map_err(|error| error.to_string())
    });
    helper
}
