//! How a daemon runs that `pm run` has started: in the foreground, for as long as its apps have something to do.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The variable that carries a [`Foreground`], as JSON, from `pm run` to keeper and supervisor and to those that follow
/// them.
pub const VARIABLE: &str = "PM_FOREGROUND";

/// What `pm run` was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Foreground {
    /// How lines look.
    pub form: LineForm,
    /// Colors before lines, where these are for people.
    #[serde(default)]
    pub colors: bool,
    /// The arguments of the `pm` that SIGHUP runs.
    pub on_hangup: Vec<String>,
    /// Where that runs.
    pub cwd: PathBuf,
    /// The home was made for this run, and goes with it.
    #[serde(default)]
    pub temporary_home: bool,
}

/// How a line of an app is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LineForm {
    /// `name | line`.
    #[default]
    Text,
    /// A JSON object with `time`, `app`, `instance`, `stream` and `line`.
    Json,
    /// Byte for byte what the app wrote.
    Raw,
}

impl Foreground {
    /// The value of [`VARIABLE`].
    #[must_use]
    pub fn to_text(&self) -> String {
        // Nothing in it can fail to become JSON.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Reads the value of [`VARIABLE`].
    #[must_use]
    pub fn from_text(text: &str) -> Option<Self> {
        serde_json::from_str(text).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn survives_the_environment() {
        let foreground = Foreground {
            form: LineForm::Json,
            colors: false,
            on_hangup: vec!["reload".into(), "/app/ecosystem.toml".into()],
            cwd: "/app".into(),
            temporary_home: true,
        };
        assert_eq!(Foreground::from_text(&foreground.to_text()), Some(foreground));
        assert_eq!(Foreground::from_text(""), None);
    }
}
