//! The environment of an instance: which variables it gets, and from whom.
//!
//! Pure functions: the snapshot of the shell, the env files' contents and pm's own values are handed in.

use std::collections::BTreeMap;
use std::ffi::OsString;

use crate::model::id::{Generation, PmId, Slot};
use crate::model::spec::AppSpec;

/// What `inherit_env = false` leaves of the shell.
pub const KEPT_WITHOUT_INHERITANCE: [&str; 6] = ["PATH", "HOME", "USER", "LANG", "TZ", "SHELL"];

/// Variables of the shell that would tell an app about somebody else's process, by name …
const SCRUBBED: [&str; 9] = [
    // Node's channel to *its* parent and its place in *that* cluster.
    "NODE_CHANNEL_FD",
    "NODE_CHANNEL_SERIALIZATION_MODE",
    "NODE_UNIQUE_ID",
    "NODE_APP_INSTANCE",
    // systemd's talk with the unit the shell ran in.
    "NOTIFY_SOCKET",
    "INVOCATION_ID",
    "JOURNAL_STREAM",
    // `npm run` leaves it.
    "INIT_CWD",
    "pm_id",
];
/// … and by the beginning of the name.
const SCRUBBED_PREFIXES: [&str; 4] = ["LISTEN_", "WATCHDOG_", "npm_", "PM_"];

/// Is 1 where root's files may lie where everybody may write. Kept with the shell, which apps are started from again; it
/// reaches no app.
pub const TRUST_FILES: &str = "PM_TRUST_FILES";

/// Whether a variable of the caller's shell must not reach an app.
#[must_use]
pub fn is_scrubbed(name: &str) -> bool {
    SCRUBBED.contains(&name) || SCRUBBED_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// The snapshot of the caller's environment that is kept with an app: scrubbed, and without what is not UTF-8
/// (the saved state is JSON; a mangled value would be worse than none).
#[must_use]
pub fn shell_snapshot(vars: impl IntoIterator<Item = (OsString, OsString)>) -> BTreeMap<String, String> {
    vars.into_iter()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .filter(|(name, _)| !is_scrubbed(name) || name == TRUST_FILES)
        .collect()
}

/// pm's own variables of one run.
#[derive(Clone, Copy, Debug)]
pub struct OwnVariables<'a> {
    /// `NODE_APP_INSTANCE`, or what `instance_var` names.
    pub slot: Slot,
    /// `pm_id`
    pub pm_id: PmId,
    /// `PM_GENERATION`
    pub generation: Generation,
    /// `PM_INSTANCE`: by this token pm finds the processes of the instance again.
    pub token: &'a str,
}

/// The variables of one instance, sorted by name, each name once.
///
/// Later ones win: the shell's snapshot (all of it, or [`KEPT_WITHOUT_INHERITANCE`]), the env files in their order,
/// `env` of the config, `increment_var`, pm's own. Variables that hold descriptor numbers (NODE_CHANNEL_FD, LISTEN_FDS,
/// NOTIFY_SOCKET, …) are not known here; who places the descriptors adds them.
#[must_use]
pub fn instance_environment(
    spec: &AppSpec,
    shell: &BTreeMap<String, String>,
    files: &[(String, String)],
    own: &OwnVariables<'_>,
) -> Vec<(String, String)> {
    let inherited = |name: &str| {
        // Scrubbed again: a snapshot may have been saved by a version that scrubbed less.
        !is_scrubbed(name) && (spec.env.inherit || KEPT_WITHOUT_INHERITANCE.contains(&name))
    };
    let mut env: BTreeMap<String, String> =
        shell.iter().filter(|(name, _)| inherited(name)).map(|(n, v)| (n.clone(), v.clone())).collect();
    // The shell's PWD is where the *caller* stood. A path through a symlink is kept, as a shell's `cd` keeps it.
    if let Some(pwd) = env.get_mut("PWD")
        && let Some(cwd) = spec.cwd.to_str()
    {
        cwd.clone_into(pwd);
    }
    env.extend(files.iter().cloned());
    env.extend(spec.env.vars.iter().map(|(name, value)| (name.clone(), value.clone())));

    if let Some(name) = &spec.env.increment_var {
        // Not from the shell: a PORT that happens to be exported there is not this app's.
        let configured = spec.env.vars.get(name).map(String::as_str);
        let from_file = files.iter().rev().find(|(n, _)| n == name).map(|(_, value)| value.as_str());
        let first: u64 = configured.or(from_file).and_then(|text| text.trim().parse().ok()).unwrap_or(0);
        env.insert(name.clone(), first.saturating_add(u64::from(own.slot.0)).to_string());
    }
    let own_variables = [
        (spec.env.instance_var.as_str(), own.slot.to_string()),
        ("pm_id", own.pm_id.to_string()),
        ("name", spec.name.to_string()),
        ("namespace", spec.namespace.clone()),
        ("PM_GENERATION", own.generation.to_string()),
        ("PM_INSTANCE", own.token.to_owned()),
    ];
    env.extend(own_variables.map(|(name, value)| (name.to_owned(), value)));
    env.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt as _;
    use std::path::PathBuf;

    use super::*;
    use crate::model::id::AppName;
    use crate::model::spec::*;

    fn spec() -> AppSpec {
        let command = CommandSpec {
            script: PathBuf::from("/srv/current/api"),
            interpreter: None,
            interpreter_args: Vec::new(),
            args: Vec::new(),
            runtime: Runtime::Other,
        };
        let mut spec = AppSpec::new(AppName::new("api").unwrap(), command, PathBuf::from("/srv/current"));
        "shop".clone_into(&mut spec.namespace);
        spec
    }

    fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    fn environment(
        spec: &AppSpec,
        shell: &[(&str, &str)],
        files: &[(&str, &str)],
        slot: u32,
    ) -> BTreeMap<String, String> {
        let own = OwnVariables {
            slot: Slot(slot),
            pm_id: PmId(7),
            generation: Generation(3),
            token: "api:1:3:f00",
        };
        let list = instance_environment(spec, &pairs(shell).into_iter().collect(), &pairs(files), &own);
        assert!(list.is_sorted_by(|a, b| a.0 < b.0), "each name once: {list:?}");
        list.into_iter().collect()
    }

    #[test]
    fn later_sources_win() {
        let mut spec = spec();
        spec.env.vars = pairs(&[("C", "config"), ("D", "config"), ("name", "mine")]).into_iter().collect();
        let shell =
            [("A", "shell"), ("B", "shell"), ("C", "shell"), ("pm_id", "1"), ("NODE_APP_INSTANCE", "9")];
        let files = [("B", "first"), ("B", "file"), ("C", "file"), ("D", "file")];
        let env = environment(&spec, &shell, &files, 1);
        let expected = pairs(&[
            ("A", "shell"),
            ("B", "file"),
            ("C", "config"),
            ("D", "config"),
            ("NODE_APP_INSTANCE", "1"),
            ("PM_GENERATION", "3"),
            ("PM_INSTANCE", "api:1:3:f00"),
            ("name", "api"),
            ("namespace", "shop"),
            ("pm_id", "7"),
        ]);
        assert_eq!(env, expected.into_iter().collect());
    }

    #[test]
    fn without_inheritance_the_basics_stay() {
        let mut spec = spec();
        spec.env.inherit = false;
        let shell = [("PATH", "/bin"), ("HOME", "/h"), ("SECRET", "x"), ("LANG", "C"), ("PWD", "/")];
        let env = environment(&spec, &shell, &[], 0);
        assert_eq!(env.get("PATH").map(String::as_str), Some("/bin"));
        assert_eq!(env.get("LANG").map(String::as_str), Some("C"));
        assert!(!env.contains_key("SECRET") && !env.contains_key("PWD"));
    }

    #[test]
    fn pwd_is_where_the_app_stands() {
        let env = environment(&spec(), &[("PWD", "/home/ann")], &[], 0);
        assert_eq!(env["PWD"], "/srv/current");
        assert!(!environment(&spec(), &[], &[], 0).contains_key("PWD"));
    }

    #[test]
    fn increment_var_counts_from_config_then_file_then_zero_but_not_from_the_shell() {
        let mut spec = spec();
        spec.env.increment_var = Some("PORT".to_owned());
        assert_eq!(environment(&spec, &[("PORT", "80")], &[], 2)["PORT"], "2");
        assert_eq!(environment(&spec, &[], &[("PORT", "4000")], 2)["PORT"], "4002");
        spec.env.vars.insert("PORT".to_owned(), "3000".to_owned());
        assert_eq!(environment(&spec, &[], &[("PORT", "4000")], 2)["PORT"], "3002");
    }

    #[test]
    fn instance_var_replaces_nodes_name() {
        let mut spec = spec();
        spec.env.instance_var = "WORKER".to_owned();
        let env = environment(&spec, &[("NODE_APP_INSTANCE", "5")], &[], 3);
        assert_eq!(env["WORKER"], "3");
        assert!(!env.contains_key("NODE_APP_INSTANCE"));
    }

    #[test]
    fn the_snapshot_is_scrubbed() {
        let shell = [
            "NODE_CHANNEL_FD",
            "NODE_CHANNEL_SERIALIZATION_MODE",
            "NODE_UNIQUE_ID",
            "NODE_APP_INSTANCE",
            "LISTEN_FDS",
            "LISTEN_PID",
            "NOTIFY_SOCKET",
            "WATCHDOG_USEC",
            "INVOCATION_ID",
            "JOURNAL_STREAM",
            "npm_config_x",
            "INIT_CWD",
            "pm_id",
            "PM_HOME",
            "PM_INSTANCE",
        ];
        let kept = ["PATH", "NODE_ENV", "NODE_OPTIONS", "LISTENER", "PM2_HOME", "NPM_TOKEN", "pm_idea"];
        let all = shell.iter().chain(&kept).map(|name| (OsString::from(name), OsString::from("1")));
        let broken = (OsString::from("BROKEN"), OsString::from_vec(vec![0xff]));
        let snapshot = shell_snapshot(all.chain([broken]));
        let mut expected = kept.to_vec();
        expected.sort_unstable();
        assert_eq!(snapshot.keys().map(String::as_str).collect::<Vec<_>>(), expected);
    }
}
