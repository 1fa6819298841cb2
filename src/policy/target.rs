//! Which apps and slots a target names: a name, a namespace, an id, `/pattern/`, or `all`.
//!
//! PM2's order: a text is tried as a name, then as a namespace, then, when it is a number, as the id of one slot.
//! Never decides what is done to them.

use std::collections::BTreeSet;

use regex_lite::Regex;

use crate::model::id::{AppName, PmId, Slot};

use super::vocabulary::Selected;
use super::wanted::slot_at;

/// An app as far as targets can name it.
#[derive(Clone, Debug)]
pub struct Known {
    /// Its name.
    pub name: AppName,
    /// Its namespace.
    pub namespace: String,
    /// The numbers of its slots, ascending by slot.
    pub pm_ids: Vec<PmId>,
}

/// Why a target names nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoTarget {
    /// No app, namespace or id of this name. Exit code 3.
    #[error("there is no app, namespace or id `{0}`")]
    Unknown(String),
    /// The pattern matches no name. Exit code 3.
    #[error("no app matches {0}")]
    NoMatch(String),
    /// The pattern is none. Exit code 2.
    #[error("{pattern} is no pattern: {why}")]
    Pattern {
        /// As it was written.
        pattern: String,
        /// What is wrong with it.
        why: String,
    },
}

/// What several targets name together: each app once, in the order first named; slots of one app are joined.
///
/// # Errors
/// The first target that names nothing; `all` of an empty list is no error.
pub fn resolve_all<T: AsRef<str>>(targets: &[T], apps: &[Known]) -> Result<Vec<Selected>, NoTarget> {
    let mut all: Vec<Selected> = Vec::new();
    for target in targets {
        for found in resolve(target.as_ref(), apps)? {
            match all.iter_mut().find(|one| one.app == found.app) {
                Some(one) => one.slots = joined(one.slots.take(), found.slots),
                None => all.push(found),
            }
        }
    }
    Ok(all)
}

/// What one target names.
///
/// # Errors
/// [`NoTarget`] when that is nothing.
pub fn resolve(target: &str, apps: &[Known]) -> Result<Vec<Selected>, NoTarget> {
    let whole = |app: &Known| Selected { app: app.name.clone(), slots: None };
    if target == "all" {
        return Ok(apps.iter().map(whole).collect());
    }
    if let Some(pattern) = target.strip_prefix('/').and_then(|rest| rest.strip_suffix('/')) {
        let regex = Regex::new(pattern)
            .map_err(|error| NoTarget::Pattern { pattern: target.to_owned(), why: error.to_string() })?;
        let found: Vec<_> = apps.iter().filter(|app| regex.is_match(app.name.as_str())).map(whole).collect();
        return if found.is_empty() { Err(NoTarget::NoMatch(target.to_owned())) } else { Ok(found) };
    }
    if let Some(app) = apps.iter().find(|app| app.name.as_str() == target) {
        return Ok(vec![whole(app)]);
    }
    let namespace: Vec<_> = apps.iter().filter(|app| app.namespace == target).map(whole).collect();
    if !namespace.is_empty() {
        return Ok(namespace);
    }
    let by_id = target.parse().ok().map(PmId).and_then(|id| {
        apps.iter().find_map(|app| {
            let index = app.pm_ids.iter().position(|one| *one == id)?;
            // The only slot of an app is the app.
            let slots = (app.pm_ids.len() > 1).then(|| vec![slot_at(index)]);
            Some(Selected { app: app.name.clone(), slots })
        })
    });
    by_id.map(|one| vec![one]).ok_or_else(|| NoTarget::Unknown(target.to_owned()))
}

fn joined(one: Option<Vec<Slot>>, other: Option<Vec<Slot>>) -> Option<Vec<Slot>> {
    let both: BTreeSet<Slot> = one?.into_iter().chain(other?).collect();
    Some(both.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn apps() -> Vec<Known> {
        let app = |name: &str, namespace: &str, ids: &[u32]| Known {
            name: AppName::new(name).unwrap(),
            namespace: namespace.to_owned(),
            pm_ids: ids.iter().copied().map(PmId).collect(),
        };
        vec![
            app("api", "front", &[0, 1]),
            app("worker", "back", &[2]),
            app("front", "back", &[3]),
            app("api-2", "9", &[9]),
        ]
    }

    fn text(found: Result<Vec<Selected>, NoTarget>) -> String {
        match found {
            Ok(found) => {
                let one = |one: &Selected| match &one.slots {
                    None => one.app.to_string(),
                    Some(slots) => {
                        format!("{}{:?}", one.app, slots.iter().map(|slot| slot.0).collect::<Vec<_>>())
                    }
                };
                found.iter().map(one).collect::<Vec<_>>().join(" ")
            }
            Err(error) => format!("error: {error}"),
        }
    }

    #[test]
    fn targets() {
        for (target, expected) in [
            ("api", "api"),
            ("all", "api worker front api-2"),
            // A name goes before a namespace of the same name.
            ("front", "front"),
            ("back", "worker front"),
            ("1", "api[1]"),
            ("2", "worker"),
            // A namespace goes before an id.
            ("9", "api-2"),
            ("7", "error: there is no app, namespace or id `7`"),
            ("-1", "error: there is no app, namespace or id `-1`"),
            ("/^api/", "api api-2"),
            ("/x/", "error: no app matches /x/"),
            ("nope", "error: there is no app, namespace or id `nope`"),
        ] {
            assert_eq!(text(resolve(target, &apps())), expected, "{target}");
        }
        assert!(matches!(resolve("/(/", &apps()), Err(NoTarget::Pattern { .. })));
    }

    #[test]
    fn several_targets_name_each_app_once() {
        for (targets, expected) in [
            (vec!["0", "1"], "api[0, 1]"),
            (vec!["1", "api"], "api"),
            (vec!["worker", "back"], "worker front"),
            (vec!["all", "0"], "api worker front api-2"),
        ] {
            assert_eq!(text(resolve_all(&targets, &apps())), expected, "{targets:?}");
        }
        assert_eq!(text(resolve_all(&["all"], &[])), "");
    }
}
