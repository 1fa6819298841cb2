//! Node versions, npm packages and Python, as `tests/run.sh` has put them there.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A Node to run apps with.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    /// Absolute path of the binary.
    pub(crate) binary: String,
    /// As in `v20.20.2`.
    pub(crate) version: String,
}

/// Where `tests/run.sh` installs what the tests need from npm.
pub(crate) fn cache() -> PathBuf {
    std::env::var_os("PM_TEST_CACHE").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").expect("HOME")).join(".cache/pm-tests"),
        PathBuf::from,
    )
}

impl Node {
    fn at(binary: &Path) -> Self {
        let output = Command::new(binary).arg("--version").output().unwrap_or_else(|error| {
            panic!("{}: {error}; tests/run.sh sets up what tests need", binary.display())
        });
        Self {
            binary: binary.to_str().expect("UTF-8").to_owned(),
            version: String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        }
    }

    /// The installed one.
    pub(crate) fn installed() -> Self {
        Self::at(&find_in_path("node"))
    }

    /// One more version: the first of those that `tests/run.sh` has fetched.
    pub(crate) fn other() -> Self {
        all_fetched().into_iter().next().expect("no second Node; tests/run.sh fetches one")
    }

    /// Those that `PM_TEST_NODES` names (paths with colons between); without it the other fetched one.
    pub(crate) fn others() -> Vec<Self> {
        let named = std::env::var("PM_TEST_NODES").unwrap_or_default();
        let named: Vec<Self> =
            named.split(':').filter(|path| !path.is_empty()).map(|path| Self::at(Path::new(path))).collect();
        if named.is_empty() { vec![Self::other()] } else { named }
    }
}

fn all_fetched() -> Vec<Node> {
    let Ok(entries) = cache().join("nodes").read_dir() else { return Vec::new() };
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path().join("bin/node")))
        .filter(|path| path.is_file())
        .collect();
    found.sort();
    found.iter().map(|path| Node::at(path)).collect()
}

/// `node_modules` with express, fastify, socket.io and its client.
pub(crate) fn packages() -> String {
    let path = cache().join("apps/node_modules");
    assert!(path.is_dir(), "no {}; tests/run.sh fetches the packages", path.display());
    path.to_str().expect("UTF-8").to_owned()
}

/// The real interpreter behind `python3`, also where a version manager puts a script in front.
pub(crate) fn python() -> String {
    let output =
        Command::new("python3").args(["-c", "import sys; print(sys.executable)"]).output().expect("python3");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

pub(crate) fn find_in_path(program: &str) -> PathBuf {
    let path = std::env::var_os("PATH").expect("PATH");
    std::env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|candidate| candidate.is_file())
        .unwrap_or_else(|| panic!("no {program} in PATH; tests/run.sh installs what tests need"))
}
