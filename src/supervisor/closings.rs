//! Which listeners workers have closed lately. Decides whether nobody has wanted one since; closes none.

use std::collections::BTreeMap;

use crate::model::id::AppName;

/// The last time that each listener was closed, by app and key.
#[derive(Debug, Default)]
pub struct Closings {
    last: BTreeMap<(AppName, String), u64>,
    count: u64,
}

impl Closings {
    /// It was closed; the number stands for this time.
    pub fn note(&mut self, app: &AppName, key: &str) -> u64 {
        self.count += 1;
        self.last.insert((app.clone(), key.to_owned()), self.count);
        self.count
    }

    /// Whether that was the last time. What was opened and closed again since has a time of its own to wait for.
    pub fn was_last(&mut self, app: &AppName, key: &str, number: u64) -> bool {
        let name = (app.clone(), key.to_owned());
        let is_last = self.last.get(&name) == Some(&number);
        if is_last {
            self.last.remove(&name);
        }
        is_last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An app that listened for a moment every few seconds got EADDRINUSE: five seconds after it had closed its listener it
    /// was closed for good, however often it had been used in between, and the keeper had not done so yet when it was
    /// asked for the next time.
    #[test]
    fn a_listener_that_was_used_again_is_not_closed_for_the_time_before() {
        let app = AppName::new("api").unwrap();
        let mut closings = Closings::default();
        let first = closings.note(&app, "80");
        let other = closings.note(&app, "81");
        let second = closings.note(&app, "80");
        assert!(!closings.was_last(&app, "80", first));
        assert!(closings.was_last(&app, "80", second));
        assert!(closings.was_last(&app, "81", other));
        assert!(closings.last.is_empty());
    }
}
