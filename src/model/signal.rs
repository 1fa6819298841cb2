//! Signals by their names, as Linux numbers them on every architecture we run on.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A signal number of Linux (signal(7)), 1..=64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Signal(i32);

const NAMES: [(&str, i32); 31] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("PWR", 30),
    ("SYS", 31),
];

impl Signal {
    /// SIGINT, the default of `kill_signal`.
    pub const INT: Self = Self(2);
    /// SIGKILL.
    pub const KILL: Self = Self(9);
    /// SIGTERM.
    pub const TERM: Self = Self(15);
    /// SIGCONT, sent after every kill signal so that a stopped process can act on it.
    pub const CONT: Self = Self(18);

    /// The signal with this number; `None` outside 1..=64.
    #[must_use]
    pub const fn from_number(number: i32) -> Option<Self> {
        if number >= 1 && number <= 64 { Some(Self(number)) } else { None }
    }

    /// The signal of this name, with or without `SIG`, in either case, or of this decimal number.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        if let Ok(number) = name.parse::<i32>() {
            return Self::from_number(number);
        }
        let upper = name.to_ascii_uppercase();
        let bare = upper.strip_prefix("SIG").unwrap_or(&upper);
        NAMES.iter().find(|(known, _)| *known == bare).map(|&(_, number)| Self(number))
    }

    /// The number for kill(2).
    #[must_use]
    pub const fn number(self) -> i32 {
        self.0
    }
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match NAMES.iter().find(|&&(_, number)| number == self.0) {
            Some((name, _)) => write!(f, "SIG{name}"),
            None => write!(f, "signal {}", self.0),
        }
    }
}

impl Serialize for Signal {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_i32(self.0)
    }
}

impl<'de> Deserialize<'de> for Signal {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = i32::deserialize(deserializer)?;
        Self::from_number(number).ok_or_else(|| serde::de::Error::custom("no signal has this number"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_numbers_and_nonsense() {
        for (text, expected) in [
            ("SIGINT", Some(2)),
            ("int", Some(2)),
            ("sigUSR2", Some(12)),
            ("15", Some(15)),
            ("0", None),
            ("99", None),
            ("SIGNOPE", None),
        ] {
            assert_eq!(Signal::from_name(text).map(Signal::number), expected, "{text}");
        }
        assert_eq!(Signal::TERM.to_string(), "SIGTERM");
    }
}
