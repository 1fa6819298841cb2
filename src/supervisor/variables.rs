//! The environment an instance was started with, kept small: it is the largest thing there is to remember of one.

use std::sync::Arc;

/// Names and values, in order, in one block of memory. A copy is a pointer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Variables {
    /// `NAME=value`, each ended by a zero, as execve(2) has them.
    block: Option<Arc<str>>,
}

impl Variables {
    /// Every name and its value.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        let block = self.block.as_deref().unwrap_or_default();
        block.split_terminator('\0').filter_map(|entry| entry.split_once('='))
    }
}

impl<'a> FromIterator<(&'a str, &'a str)> for Variables {
    /// Names have no `=`, and nothing has a zero: neither could be handed to a program.
    fn from_iter<I: IntoIterator<Item = (&'a str, &'a str)>>(variables: I) -> Self {
        let mut block = String::new();
        for (name, value) in variables {
            block.extend([name, "=", value, "\0"]);
        }
        Self { block: (!block.is_empty()).then(|| block.into()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_in_comes_out() {
        let pairs = [("PATH", "/bin:/usr/bin"), ("EMPTY", ""), ("OPTS", "a=b\nc=d"), ("ÜMLAUT", "ä")];
        let variables: Variables = pairs.into_iter().collect();
        assert_eq!(variables.iter().collect::<Vec<_>>(), pairs);
        assert_eq!(Variables::default().iter().count(), 0);
    }
}
