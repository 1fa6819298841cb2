//! Who is who: app, slot, generation.
//!
//! An instance is identified by these three and never by a pid: an exit of generation 6 cannot touch generation 7.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The longest app name, in characters.
pub const APP_NAME_MAX: usize = 128;

/// The name of a configured app: 1–128 characters of letters (any script), digits, space and `. _ - @ : + ~`; not
/// `all`, not a number, no leading `-` or `.`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AppName(Arc<str>);

/// Why a text is no app name. The text itself is quoted by the caller, shortened where it is long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadName {
    /// Nothing, or only spaces.
    #[error("a name needs at least one character")]
    Empty,
    /// More than [`APP_NAME_MAX`] characters.
    #[error("a name has at most {APP_NAME_MAX} characters")]
    TooLong,
    /// A character outside the allowed set.
    #[error("{0:?} is not allowed in a name; use letters, digits, space and . _ - @ : + ~")]
    Character(char),
    /// `-` would read as an option, `.` as a hidden file or a path.
    #[error("a name does not start with {0:?}")]
    Start(char),
    /// `all` selects every app.
    #[error("`all` stands for every app")]
    All,
    /// A number would read as an id.
    #[error("a number would be read as an id")]
    Number,
    /// Spaces at an end are invisible in every table.
    #[error("a name does not begin or end with a space")]
    OuterSpace,
}

impl AppName {
    /// Checks a text against the rules of names.
    ///
    /// # Errors
    /// [`BadName`] says which rule it breaks.
    pub fn new(text: &str) -> Result<Self, BadName> {
        let Some(first) = text.chars().next() else { return Err(BadName::Empty) };
        if text.chars().count() > APP_NAME_MAX {
            return Err(BadName::TooLong);
        }
        if let Some(bad) = text.chars().find(|c| !(c.is_alphanumeric() || " ._-@:+~".contains(*c))) {
            return Err(BadName::Character(bad));
        }
        if text.trim().is_empty() {
            return Err(BadName::Empty);
        }
        if text.trim() != text {
            return Err(BadName::OuterSpace);
        }
        if first == '-' || first == '.' {
            return Err(BadName::Start(first));
        }
        if text == "all" {
            return Err(BadName::All);
        }
        if text.chars().all(|c| c.is_ascii_digit()) {
            return Err(BadName::Number);
        }
        Ok(Self(text.into()))
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name as part of a file name: what is not `[A-Za-z0-9.-]` becomes `-`, as PM2 does it.
    #[must_use]
    pub fn file_stem(&self) -> String {
        self.0
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() || c == '.' || c == '-' { c } else { '-' })
            .collect()
    }
}

impl fmt::Display for AppName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl Serialize for AppName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for AppName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::new(&text).map_err(serde::de::Error::custom)
    }
}

/// The numbered place of an instance in its app, 0..n-1: stable across crash, reload and reboot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Slot(pub u32);

impl Slot {
    /// No place: stands in the identity of a hook, which is no instance, and never in an app's slots.
    pub const HOOK: Self = Self(u32::MAX);

    /// Whether it stands for a hook.
    #[must_use]
    pub const fn is_hook(self) -> bool {
        self.0 == Self::HOOK.0
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Counts the runs in a slot, from 1. Never used twice in the life of a slot, also across daemons.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Generation(pub u64);

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One run of an app in a slot.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct InstanceId {
    /// Whose instance it is.
    pub app: AppName,
    /// Its place among the app's instances.
    pub slot: Slot,
    /// Which run in that place.
    pub generation: Generation,
}

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}.{}", self.app, self.slot, self.generation)
    }
}

/// The number that tables show and commands take, one per slot; PM2's `pm_id`. Counts up; starts again from 0 when
/// the list becomes empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PmId(pub u32);

impl fmt::Display for PmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Names one mutating request. Chosen by the client, so that a client that lost its connection can ask for the
/// outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct OpId(pub u64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_and_are_not() {
        let long = "x".repeat(129);
        for (text, expected) in [
            ("api", Ok(())),
            ("überapp 2", Ok(())),
            ("web@1.2:blue+x~", Ok(())),
            ("", Err(BadName::Empty)),
            ("   ", Err(BadName::Empty)),
            (" api", Err(BadName::OuterSpace)),
            (long.as_str(), Err(BadName::TooLong)),
            ("a/b", Err(BadName::Character('/'))),
            ("..", Err(BadName::Start('.'))),
            ("-x", Err(BadName::Start('-'))),
            ("a\nb", Err(BadName::Character('\n'))),
            ("a'b", Err(BadName::Character('\''))),
            ("all", Err(BadName::All)),
            ("42", Err(BadName::Number)),
        ] {
            assert_eq!(AppName::new(text).map(|_| ()), expected, "{text:?}");
        }
    }

    #[test]
    fn file_stem_replaces_what_a_shell_would_trip_over() {
        assert_eq!(AppName::new("my app@2:ü").unwrap().file_stem(), "my-app-2--");
    }
}
