//! Apps of every kind the policy distinguishes.

use std::path::PathBuf;
use std::time::Duration;

use pm::model::id::AppName;
use pm::model::spec::{
    AppSpec, Check, CommandSpec, ExecMode, Hook, Hooks, ListenAddress, ListenSpec, Probe, Runtime, StopMethod,
};

/// What a spec is like, as far as policy cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Like {
    /// Any program that binds its own port.
    Plain,
    /// A Node script in fork mode, with the agent.
    NodeFork,
    /// Workers of a Node cluster, with the agent.
    Workers,
    /// Workers of a Node cluster that say "ready".
    PoliteWorkers,
    /// Workers without the agent, ended by `disconnect`.
    BareWorkers,
    /// Any program on an inherited listener that says "ready".
    Inheriting,
    /// Any program that binds its own port, with a readiness and a health probe.
    Probed,
    /// Workers of a Node cluster, with a readiness and a health probe.
    ProbedWorkers,
}

pub(crate) const ALL: [Like; 8] = [
    Like::Plain,
    Like::NodeFork,
    Like::Workers,
    Like::PoliteWorkers,
    Like::BareWorkers,
    Like::Inheriting,
    Like::Probed,
    Like::ProbedWorkers,
];

/// Every hook.
pub(crate) fn hooks() -> Hooks {
    let hook = Some(Hook { argv: vec![String::from("./hook")], timeout: Duration::from_secs(4) });
    Hooks { pre_start: hook.clone(), pre_reload: hook.clone(), post_stop: hook.clone(), on_errored: hook }
}

/// What an instance may use in bytes, where it has a limit.
pub(crate) const LIMIT: u64 = 100 << 20;

pub(crate) fn name(text: &str) -> AppName {
    AppName::new(text).unwrap()
}

pub(crate) fn spec(app: &str, like: Like, instances: u32) -> AppSpec {
    let node = !matches!(like, Like::Plain | Like::Inheriting | Like::Probed);
    let cluster = !matches!(like, Like::Plain | Like::NodeFork | Like::Probed);
    let listen = ListenSpec {
        name: String::from("3000"),
        address: ListenAddress::Tcp("127.0.0.1:3000".parse().unwrap()),
        backlog: 511,
        blocking: false,
    };
    let command = CommandSpec {
        script: PathBuf::from("/srv/app"),
        interpreter: None,
        interpreter_args: Vec::new(),
        args: Vec::new(),
        runtime: if node { Runtime::Node } else { Runtime::Other },
    };
    let mut spec = AppSpec::new(name(app), command, PathBuf::from("/srv"));
    spec.mode = if cluster { ExecMode::Cluster } else { ExecMode::Fork };
    spec.instances = instances;
    spec.listen = if like == Like::Inheriting { vec![listen] } else { Vec::new() };
    spec.ready.wait_ready = matches!(like, Like::PoliteWorkers | Like::Inheriting);
    spec.ready.listen_timeout = Duration::from_secs(5);
    spec.stop.method = if like == Like::BareWorkers { StopMethod::Disconnect } else { StopMethod::Signal };
    spec.agent = like != Like::BareWorkers;
    if matches!(like, Like::Probed | Like::ProbedWorkers) {
        let probe = |interval, threshold| Probe {
            check: Check::Tcp(String::from("127.0.0.1:{PORT}")),
            interval: Duration::from_millis(interval),
            timeout: Duration::from_secs(2),
            threshold,
            start_period: Duration::ZERO,
        };
        spec.ready.probe = Some(probe(100, 2));
        spec.health = Some(probe(1000, 3));
    }
    spec
}
