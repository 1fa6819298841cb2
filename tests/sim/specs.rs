//! Apps of every kind the policy distinguishes.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use pm::model::id::AppName;
use pm::model::signal::Signal;
use pm::model::spec::{
    AppSpec, Balance, CommandSpec, EnvSpec, ExecMode, KillMode, ListenAddress, ListenSpec, LogRules,
    OnFailure, ReadyRules, ReloadRules, RestartRules, Runtime, Stdin, StopMethod, StopRules,
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
}

pub(crate) const ALL: [Like; 6] =
    [Like::Plain, Like::NodeFork, Like::Workers, Like::PoliteWorkers, Like::BareWorkers, Like::Inheriting];

pub(crate) fn name(text: &str) -> AppName {
    AppName::new(text).unwrap()
}

pub(crate) fn spec(app: &str, like: Like, instances: u32) -> AppSpec {
    let node = !matches!(like, Like::Plain | Like::Inheriting);
    let cluster = !matches!(like, Like::Plain | Like::NodeFork);
    let listen = ListenSpec {
        name: String::from("3000"),
        address: ListenAddress::Tcp("127.0.0.1:3000".parse().unwrap()),
        backlog: 511,
        blocking: false,
    };
    AppSpec {
        name: name(app),
        namespace: String::from("default"),
        origin: None,
        command: CommandSpec {
            script: PathBuf::from("/srv/app"),
            interpreter: None,
            interpreter_args: Vec::new(),
            args: Vec::new(),
            runtime: if node { Runtime::Node } else { Runtime::Other },
        },
        cwd: PathBuf::from("/srv"),
        mode: if cluster { ExecMode::Cluster } else { ExecMode::Fork },
        instances,
        env: EnvSpec {
            inherit: true,
            files: Vec::new(),
            vars: BTreeMap::new(),
            instance_var: String::from("NODE_APP_INSTANCE"),
            increment_var: None,
        },
        listen: if like == Like::Inheriting { vec![listen] } else { Vec::new() },
        balance: Balance::RoundRobin,
        ready: ReadyRules {
            wait_ready: matches!(like, Like::PoliteWorkers | Like::Inheriting),
            listen_timeout: Duration::from_secs(5),
        },
        stop: StopRules {
            signal: Signal::INT,
            timeout: Duration::from_secs(10),
            mode: KillMode::Target,
            method: if like == Like::BareWorkers { StopMethod::Disconnect } else { StopMethod::Signal },
            with_message: false,
            drain_timeout: None,
        },
        restart: RestartRules {
            autorestart: true,
            max_restarts: 16,
            min_uptime: Duration::from_secs(1),
            restart_delay: None,
            backoff_base: Duration::from_millis(100),
            backoff_reset: Duration::from_secs(30),
            stop_exit_codes: Vec::new(),
        },
        reload: ReloadRules { max_surge: 1, max_unavailable: 0, on_failure: OnFailure::Abort, overlap: None },
        logs: LogRules { out_file: None, error_file: None, merge: None, date_format: None },
        agent: like != Like::BareWorkers,
        stdin: Stdin::Pipe,
        autostart: true,
    }
}
