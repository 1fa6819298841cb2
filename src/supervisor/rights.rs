//! What an app's process rules come to on this machine: numbers for the kernel, or why not.
//!
//! Names are looked up anew at each spawn, as everything that may change between two of them.

use crate::logs::writer::Owner;
use crate::model::process::{Controller, ProcessRules};
use crate::model::spec::AppSpec;
use crate::store::paths::user_name;
use crate::sys::cgroup::root::Root;
use crate::sys::guise::Guise;
use crate::sys::limits::Limit;
use crate::sys::peer;
use crate::sys::spawn::{Confinement, Credentials, Failure, Stage};
use crate::sys::users::{self, Account, AccountError};

/// Why an instance cannot have what its app is to have.
#[derive(Debug, thiserror::Error)]
pub enum RightsError {
    /// No such user or group.
    #[error(transparent)]
    Account(#[from] AccountError),
    /// Only root starts processes as somebody else.
    #[error(
        "cannot run as {wanted}: the daemon runs as {daemon}, and only a daemon of root starts processes as another user; \
         run it as root (`sudo pm startup`), or take `user` and `group` out"
    )]
    NotRoot {
        /// Who was asked for.
        wanted: String,
        /// Who runs the daemon.
        daemon: String,
    },
    /// A limit that must be enforced cannot be.
    #[error("{0}; `limits.required` is set, so it was not started")]
    Unenforced(String),
    /// The keeper is older than this supervisor.
    #[error(
        "the daemon's keeper is of an older version, which knows neither control groups nor nice, ionice, cpu_affinity, \
         no_new_privs or ambient_capabilities; replace it with `pm upgrade`, or `pm kill` and start again"
    )]
    OldKeeper,
}

/// What the kernel is told about an instance.
#[derive(Debug, Default)]
pub struct Rights {
    /// Who it runs as, when that is not who the daemon is.
    pub credentials: Option<Credentials>,
    /// umask(2).
    pub umask: Option<u32>,
    /// Limits of each process.
    pub limits: Vec<Limit>,
    /// Order and rights.
    pub confinement: Confinement,
}

impl Rights {
    /// What these rules come to.
    ///
    /// # Errors
    /// What is not there, or not allowed.
    pub fn of(rules: &ProcessRules) -> Result<Self, RightsError> {
        let ambient = rules.ambient_capabilities.iter().fold(0, |mask, capability| mask | capability.bit());
        Ok(Self {
            credentials: account_of(rules)?.map(|account| account.credentials),
            umask: rules.umask,
            limits: rules.rlimits.iter().map(|(limit, range)| Limit::of(*limit, *range)).collect(),
            confinement: Confinement {
                nice: rules.nice,
                io_priority: rules.ionice.map(crate::model::process::IoPriority::number),
                cpus: rules.cpu_affinity.clone(),
                no_new_privs: rules.no_new_privs,
                ambient,
            },
        })
    }

    /// With whose rights its unix sockets are made.
    #[must_use]
    pub fn guise(&self) -> Guise {
        self.credentials.clone().map_or(Guise::Own, Guise::User)
    }

    /// Who the files are to belong to that the daemon makes for it.
    #[must_use]
    pub fn owner(&self) -> Option<Owner> {
        self.credentials.as_ref().map(owner_of)
    }
}

/// Who owns the files of a program that runs as this user.
#[must_use]
pub const fn owner_of(credentials: &Credentials) -> Owner {
    Owner { uid: credentials.uid, gid: credentials.gid }
}

/// Who an app runs as; `None` when it is who the daemon is.
///
/// # Errors
/// No such account, or the daemon may not.
pub fn account_of(rules: &ProcessRules) -> Result<Option<Account>, RightsError> {
    if !rules.changes_user() {
        return Ok(None);
    }
    let account = users::account(rules.user.as_deref(), rules.group.as_deref())?;
    if users::may_change_user() {
        return Ok(Some(account));
    }
    if users::is_own(&account.credentials) {
        return Ok(None);
    }
    let wanted = match (&rules.user, &rules.group) {
        (Some(user), Some(group)) => format!("`{user}` with group `{group}`"),
        (Some(user), None) => format!("`{user}`"),
        (None, group) => format!("group `{}`", group.as_deref().unwrap_or_default()),
    };
    Err(RightsError::NotRoot { wanted, daemon: format!("`{}`", user_name(peer::own_uid())) })
}

/// With whose rights files are made where an app chooses the path, or may change what lies on it.
#[must_use]
pub fn guise_of(rules: &ProcessRules) -> Guise {
    match account_of(rules) {
        Ok(None) => Guise::Own,
        Ok(Some(account)) => Guise::User(account.credentials),
        // Adopted, and its user is gone. Root's rights would be the worst answer.
        Err(_) => Guise::Nobody,
    }
}

/// Why these limits of an app are not enforced here, in words for people: one for each reason.
#[must_use]
pub fn unenforced(spec: &AppSpec, root: Option<&Root>) -> Vec<String> {
    let set = spec.process.limits.set();
    let missing = |controller: Controller| root.is_none_or(|root| !root.available().contains(&controller));
    let mut reasons = Vec::new();
    if set.is_empty() {
        return reasons;
    }
    let Some(root) = root else {
        let keys: Vec<&str> = set.iter().map(|(key, ..)| *key).collect();
        reasons.push(format!(
            "{} not enforced: no control group is delegated to the daemon (`pm startup` makes a service that has one; \
             docs/limits.md)",
            named(&keys)
        ));
        return reasons;
    };
    for controller in Controller::ALL {
        let keys: Vec<&str> = set.iter().filter(|(.., of)| *of == controller).map(|(key, ..)| *key).collect();
        if !keys.is_empty() && missing(controller) {
            reasons.push(format!(
                "{} not enforced: the control group {} has no `{controller}` controller (docs/limits.md)",
                named(&keys),
                root.dir().display()
            ));
        }
    }
    reasons
}

fn named(keys: &[&str]) -> String {
    let keys: Vec<String> = keys.iter().map(|key| format!("limits.{key}")).collect();
    let verb = if keys.len() == 1 { "is" } else { "are" };
    format!("{} {verb}", keys.join(", "))
}

/// Why a program did not start, with what may be done about it.
#[must_use]
pub fn explain(failure: Failure, spec: &AppSpec) -> String {
    const EPERM: i32 = 1;
    const EACCES: i32 = 13;
    const EINVAL: i32 = 22;
    let rules = &spec.process;
    let user = rules.user.as_deref();
    let denied = matches!(failure.errno, EPERM | EACCES);
    let hint = match failure.stage {
        Stage::Chdir if denied => {
            user.map(|user| format!("user `{user}` may not enter {}", spec.cwd.display()))
        }
        Stage::Exec if denied => user.map(|user| {
            let script = spec.command.script.display().to_string();
            format!("user `{user}` may not execute {}", spec.command.interpreter.as_ref().unwrap_or(&script))
        }),
        Stage::Limits if denied && !rules.rlimits.is_empty() => {
            Some("only root raises a hard limit (`ulimit -H -a` shows them)".to_owned())
        }
        Stage::Scheduling if denied => {
            Some("only root takes a `nice` below the daemon's, or the realtime class of `ionice`".to_owned())
        }
        Stage::Scheduling if failure.errno == EINVAL && !rules.cpu_affinity.is_empty() => {
            Some("no CPU of `cpu_affinity` exists here, or the daemon may use none of them".to_owned())
        }
        Stage::Capabilities if denied => {
            Some("the daemon does not have all of `ambient_capabilities` itself".to_owned())
        }
        _ => None,
    };
    match hint {
        Some(hint) => format!("{failure}: {hint}"),
        None => failure.to_string(),
    }
}
