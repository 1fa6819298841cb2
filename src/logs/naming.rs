//! Where an instance's output goes: the file names PM2 users know.
//!
//! A pure function of the spec and the instance's number, so that the supervisor that writes a file and the command
//! that reads it never disagree.

use std::path::{Path, PathBuf};

use crate::model::id::{AppName, PmId};
use crate::model::spec::{AppSpec, ExecMode, LogRules};

/// The two log files of an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogPaths {
    /// Standard output.
    pub out: PathBuf,
    /// Standard error.
    pub err: PathBuf,
}

/// Whether all instances of an app share one pair of files: as `merge_logs` says, else for a single fork-mode
/// instance (PM2's rule).
#[must_use]
pub fn is_merged(spec: &AppSpec) -> bool {
    spec.logs.merge.unwrap_or(matches!(spec.mode, ExecMode::Fork) && spec.instances == 1)
}

/// The log files of the instance that `id` stands for: `<logs_dir>/<stem>-out.log` and `-error.log` unless the rules
/// name others, with `-<id>` before a `.log` suffix unless they are merged. `/dev/null` stays what it is.
#[must_use]
pub fn log_paths(logs_dir: &Path, app: &AppName, rules: &LogRules, merged: bool, id: PmId) -> LogPaths {
    let named = |given: &Option<PathBuf>, kind: &str| {
        let path = given.clone().unwrap_or_else(|| logs_dir.join(format!("{}-{kind}.log", app.file_stem())));
        if merged { path } else { numbered(path, id) }
    };
    LogPaths { out: named(&rules.out_file, "out"), err: named(&rules.error_file, "error") }
}

fn numbered(path: PathBuf, id: PmId) -> PathBuf {
    let Some(stem) = path.to_str().and_then(|text| text.strip_suffix(".log")) else { return path };
    PathBuf::from(format!("{stem}-{id}.log"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(out_file: Option<&str>, merged: bool, expected: &str) {
        let rules =
            LogRules { out_file: out_file.map(PathBuf::from), error_file: None, ..LogRules::default() };
        let app = AppName::new("my app").unwrap();
        let paths = log_paths(Path::new("/home/logs"), &app, &rules, merged, PmId(7));
        assert_eq!(paths.out, PathBuf::from(expected));
    }

    #[test]
    fn names_are_those_of_pm2() {
        check(None, true, "/home/logs/my-app-out.log");
        check(None, false, "/home/logs/my-app-out-7.log");
        check(Some("/var/log/a.log"), false, "/var/log/a-7.log");
        check(Some("/var/log/a.log"), true, "/var/log/a.log");
        check(Some("/var/log/a.txt"), false, "/var/log/a.txt");
        check(Some("/dev/null"), false, "/dev/null");
    }
}
