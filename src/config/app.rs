//! One app as written: what is set, and where. Defaults are not filled in here.

use std::collections::BTreeMap;
use std::time::Duration;

use super::error::{At, Place};
use super::listen::ListenConfig;
use super::process::Limits;
use crate::model::process::{Capability, IoPriority};
use crate::model::signal::Signal;
use crate::model::spec::{
    Balance, Dependency, ExecMode, Hook, KillMode, OnFailure, Overflow, Probe, Share, Stdin, StopMethod,
    Strategy,
};

/// Environment variables by name.
pub type Variables = BTreeMap<String, String>;

/// `instances` before the number of CPUs is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Instances {
    /// `"max"` or 0: one per CPU.
    Max,
    /// This many.
    Count(u32),
    /// One per CPU, less this many.
    CpusLess(u32),
}

/// The most instances one app can have.
pub const INSTANCES_MAX: u32 = 10_000;

/// A text that is no `instances`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "expected a number of instances, \"max\", 0 (one per CPU) or a negative number (CPUs less that many), up to {INSTANCES_MAX}"
)]
pub struct BadInstances;

impl TryFrom<i64> for Instances {
    type Error = BadInstances;

    fn try_from(number: i64) -> Result<Self, BadInstances> {
        let size = u32::try_from(number.unsigned_abs()).ok().filter(|&size| size <= INSTANCES_MAX);
        match (size.ok_or(BadInstances)?, number < 0) {
            (0, _) => Ok(Self::Max),
            (size, true) => Ok(Self::CpusLess(size)),
            (size, false) => Ok(Self::Count(size)),
        }
    }
}

impl std::str::FromStr for Instances {
    type Err = BadInstances;

    fn from_str(text: &str) -> Result<Self, BadInstances> {
        match text.trim() {
            "max" => Ok(Self::Max),
            number => Self::try_from(number.parse::<i64>().map_err(|_| BadInstances)?),
        }
    }
}

/// One app as written. Each field is the key of the same name; `None` where the file is silent.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "each field is a key, and config::schema says what each key means")]
pub struct AppConfig {
    /// The head of the app's table.
    pub place: Place,
    pub name: Option<At<String>>,
    pub namespace: Option<At<String>>,
    pub script: Option<At<String>>,
    pub shell: Option<At<bool>>,
    pub args: Option<At<Vec<String>>>,
    pub cwd: Option<At<String>>,
    pub interpreter: Option<At<String>>,
    pub interpreter_args: Option<At<Vec<String>>>,
    pub exec_mode: Option<At<ExecMode>>,
    pub instances: Option<At<Instances>>,
    pub listen: Option<Vec<ListenConfig>>,
    pub balance: Option<At<Balance>>,
    pub env: Variables,
    /// `env_<name>` by name.
    pub env_sections: BTreeMap<String, Variables>,
    pub env_file: Vec<At<String>>,
    pub inherit_env: Option<bool>,
    pub instance_var: Option<String>,
    pub increment_var: Option<At<String>>,
    pub port: Option<u16>,
    pub wait_ready: Option<bool>,
    pub listen_timeout: Option<Duration>,
    pub kill_timeout: Option<At<Duration>>,
    pub kill_signal: Option<Signal>,
    pub kill_mode: Option<KillMode>,
    pub stop_method: Option<StopMethod>,
    pub shutdown_with_message: Option<At<bool>>,
    pub drain_timeout: Option<At<Duration>>,
    pub agent: Option<bool>,
    pub max_surge: Option<At<Share>>,
    pub max_unavailable: Option<At<Share>>,
    pub on_failure: Option<OnFailure>,
    pub overlap: Option<bool>,
    pub min_uptime: Option<Duration>,
    pub max_restarts: Option<u32>,
    /// 0: none.
    pub max_memory_restart: Option<At<u64>>,
    pub restart_delay: Option<Duration>,
    pub exp_backoff_restart_delay: Option<Duration>,
    pub backoff_reset: Option<Duration>,
    pub autorestart: Option<bool>,
    pub autostart: Option<bool>,
    pub stop_exit_codes: Option<Vec<i32>>,
    pub out_file: Option<At<String>>,
    pub error_file: Option<At<String>>,
    pub merge_logs: Option<bool>,
    pub time: Option<bool>,
    pub log_date_format: Option<String>,
    pub log_overflow: Option<Overflow>,
    pub stdin: Option<Stdin>,
    pub health: Option<At<Probe>>,
    pub ready: Option<At<Probe>>,
    pub pre_start: Option<Hook>,
    pub pre_reload: Option<Hook>,
    pub post_stop: Option<Hook>,
    pub on_errored: Option<Hook>,
    pub depends_on: BTreeMap<String, At<Dependency>>,
    pub strategy: Option<Strategy>,
    pub min_healthy: Option<Duration>,
    pub max_draining: Option<u32>,
    pub reserve: Option<bool>,
    pub drain_websockets: Option<bool>,
    pub user: Option<At<String>>,
    pub group: Option<At<String>>,
    pub umask: Option<u32>,
    pub nice: Option<i32>,
    pub ionice: Option<IoPriority>,
    pub cpu_affinity: Option<Vec<u32>>,
    pub no_new_privs: Option<bool>,
    pub ambient_capabilities: Option<Vec<Capability>>,
    pub limits: Option<Limits>,
}

impl AppConfig {
    /// An app of which nothing is known but where it stands.
    #[must_use]
    pub fn new(place: Place) -> Self {
        Self {
            place,
            name: None,
            namespace: None,
            script: None,
            shell: None,
            args: None,
            cwd: None,
            interpreter: None,
            interpreter_args: None,
            exec_mode: None,
            instances: None,
            listen: None,
            balance: None,
            env: Variables::new(),
            env_sections: BTreeMap::new(),
            env_file: Vec::new(),
            inherit_env: None,
            instance_var: None,
            increment_var: None,
            port: None,
            wait_ready: None,
            listen_timeout: None,
            kill_timeout: None,
            kill_signal: None,
            kill_mode: None,
            stop_method: None,
            shutdown_with_message: None,
            drain_timeout: None,
            agent: None,
            max_surge: None,
            max_unavailable: None,
            on_failure: None,
            overlap: None,
            min_uptime: None,
            max_restarts: None,
            max_memory_restart: None,
            restart_delay: None,
            exp_backoff_restart_delay: None,
            backoff_reset: None,
            autorestart: None,
            autostart: None,
            stop_exit_codes: None,
            out_file: None,
            error_file: None,
            merge_logs: None,
            time: None,
            log_date_format: None,
            log_overflow: None,
            stdin: None,
            health: None,
            ready: None,
            pre_start: None,
            pre_reload: None,
            post_stop: None,
            on_errored: None,
            depends_on: BTreeMap::new(),
            strategy: None,
            min_healthy: None,
            max_draining: None,
            reserve: None,
            drain_websockets: None,
            user: None,
            group: None,
            umask: None,
            nice: None,
            ionice: None,
            cpu_affinity: None,
            no_new_privs: None,
            ambient_capabilities: None,
            limits: None,
        }
    }

    /// The name people will know it by: `name`, else what the script suggests. Unchecked.
    #[must_use]
    pub fn display_name(&self) -> Option<String> {
        match (&self.name, &self.script) {
            (Some(name), _) => Some(name.value.clone()),
            (None, Some(script)) => Some(super::command::default_name(&script.value)),
            (None, None) => None,
        }
    }
}
