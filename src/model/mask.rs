//! Which values of an environment may be seen.
//!
//! Secrets reach apps through their environment, and lists are pasted into tickets. So a value leaves the supervisor
//! only where somebody has asked for it, or where its name says that it is no secret.

use super::spec::AppSpec;

/// What stands in place of a value that is nobody's business.
pub const MASK: &str = "********";

/// Variables that are never masked: what people look for, and what pm itself sets.
const OPEN: [&str; 16] = [
    "NODE_ENV",
    "PORT",
    "NODE_APP_INSTANCE",
    "pm_id",
    "name",
    "namespace",
    "PM_GENERATION",
    "PM_INSTANCE",
    "PM_READY_FD",
    "NODE_CHANNEL_FD",
    "NODE_CHANNEL_SERIALIZATION_MODE",
    "NODE_UNIQUE_ID",
    "NOTIFY_SOCKET",
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
    "LISTEN_PID",
];

/// What the variables of that kind begin with: `PM_LISTEN_FD_web`.
const OPEN_PREFIX: &str = "PM_LISTEN_FD_";

/// Whether values of the environment are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShowEnv {
    /// Masked.
    No,
    /// As they are.
    Yes,
}

impl From<bool> for ShowEnv {
    fn from(show: bool) -> Self {
        if show { Self::Yes } else { Self::No }
    }
}

/// Whether a variable of this name is never masked.
#[must_use]
pub fn is_open(key: &str) -> bool {
    OPEN.contains(&key) || key.starts_with(OPEN_PREFIX)
}

/// The value to show for a variable.
#[must_use]
pub fn shown<'a>(key: &str, value: &'a str, show: ShowEnv) -> &'a str {
    if show == ShowEnv::Yes || is_open(key) { value } else { MASK }
}

/// A spec to show: its own variables are part of the environment, and as secret.
#[must_use]
pub fn spec(spec: &AppSpec, show: ShowEnv) -> AppSpec {
    let mut spec = spec.clone();
    for (key, value) in &mut spec.env.vars {
        *value = shown(key, value, show).to_owned();
    }
    spec
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_are_known_to_be_harmless_show_their_value() {
        for open in ["NODE_ENV", "PORT", "PM_LISTEN_FD_web", "pm_id"] {
            assert_eq!(shown(open, "x", ShowEnv::No), "x");
        }
        for secret in ["TOKEN", "NODE_ENV_SECRET", "XPORT", "port", "PM_TOKEN", "PATH", ""] {
            assert_eq!(shown(secret, "x", ShowEnv::No), MASK);
            assert_eq!(shown(secret, "x", ShowEnv::Yes), "x");
        }
    }
}
