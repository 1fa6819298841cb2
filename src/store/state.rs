//! state.json: the desired state, and the shell environments it refers to.
//!
//! A write goes to a file aside, fsync, rename, fsync of the directory; the state before it stays as `state.json.prev`.
//! So a crash at any instant, or a full disk, leaves the last acknowledged state readable. Environments lie in
//! `env/` under the hash of their content, 0600 and never in state.json: a hundred apps started from one shell share
//! one file.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::model::id::AppName;
use crate::model::saved::SavedFleet;

/// The version this build writes. Older ones are read.
pub const VERSION: u32 = 1;

/// The environment of a shell, as it was when an app was first started from it.
pub type Shell = Arc<BTreeMap<String, String>>;

/// What could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A file cannot be written.
    #[error("cannot write {path:?}: {source}")]
    Write {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file cannot be read.
    #[error("cannot read {path:?}: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is no state file.
    #[error("{path:?} is not a state file: {source}")]
    Content {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// A file comes from a newer pm.
    #[error("{path:?} has version {version}, this pm reads up to {VERSION}")]
    Version {
        /// Which file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
}

/// The desired state with everything it refers to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// The apps.
    pub fleet: SavedFleet,
    /// The shell each app was started from.
    pub shells: BTreeMap<AppName, Shell>,
}

#[derive(Serialize, Deserialize)]
struct StateFile {
    version: u32,
    fleet: SavedFleet,
    /// App to the name of its file in `env/`.
    #[serde(default)]
    shells: BTreeMap<AppName, String>,
}

#[derive(Deserialize)]
struct VersionOnly {
    version: u32,
}

/// Reads and writes states in one home. Used from one thread.
#[derive(Debug)]
pub struct StateStore {
    file: PathBuf,
    env_dir: PathBuf,
    /// Files known to lie in `env/`.
    written: BTreeSet<String>,
}

/// What was loaded, and what is to be said about it.
#[derive(Debug, Default)]
pub struct Loaded {
    /// The state; empty when there is none.
    pub state: State,
    /// `state.json` was unreadable, and this is the one before it, or none.
    pub warning: Option<String>,
}

impl StateStore {
    /// A store that keeps its state in `file` and environments in `env_dir`.
    #[must_use]
    pub fn new(file: PathBuf, env_dir: PathBuf) -> Self {
        Self { file, env_dir, written: BTreeSet::new() }
    }

    /// Reads the state, or the one before it when the newest is unreadable.
    ///
    /// # Errors
    /// When neither can be read although one is there: starting empty would forget what was acknowledged.
    pub fn load(&mut self) -> Result<Loaded, StateError> {
        let newest = self.read(&self.file.clone());
        let previous = previous_of(&self.file);
        match newest {
            Ok(Some(state)) => Ok(Loaded { state, warning: None }),
            Ok(None) => Ok(match self.read(&previous)? {
                // Between the two renames of a write there is only the previous state.
                Some(state) => Loaded { state, warning: None },
                None => Loaded::default(),
            }),
            Err(error) => match self.read(&previous) {
                Ok(Some(state)) => {
                    let warning = Some(format!("{error}; the state before it was loaded"));
                    Ok(Loaded { state, warning })
                }
                _ => Err(error),
            },
        }
    }

    fn read(&mut self, path: &Path) -> Result<Option<State>, StateError> {
        let text = match fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(StateError::Read { path: path.to_owned(), source }),
        };
        let content = |source| StateError::Content { path: path.to_owned(), source };
        let VersionOnly { version } = serde_json::from_slice(&text).map_err(content)?;
        if version > VERSION {
            return Err(StateError::Version { path: path.to_owned(), version });
        }
        let file: StateFile = serde_json::from_slice(&text).map_err(content)?;
        let mut known: BTreeMap<String, Shell> = BTreeMap::new();
        let mut shells = BTreeMap::new();
        for (app, name) in file.shells {
            let shell = if let Some(shell) = known.get(&name) {
                shell.clone()
            } else {
                let shell = Arc::new(read_shell(&self.env_dir.join(&name))?);
                self.written.insert(name.clone());
                known.insert(name.clone(), shell.clone());
                shell
            };
            shells.insert(app, shell);
        }
        Ok(Some(State { fleet: file.fleet, shells }))
    }

    /// Writes the state durably, then removes environments that nothing refers to any more.
    ///
    /// # Errors
    /// When any step fails; the state that was on disk before is still readable then.
    pub fn save(&mut self, state: &State) -> Result<(), StateError> {
        let mut shells = BTreeMap::new();
        for (app, shell) in &state.shells {
            let name = shell_file_name(shell);
            if !self.written.contains(&name) {
                let text = serde_json::to_vec(&**shell).unwrap_or_default();
                write_durably(&self.env_dir.join(&name), &text, None)?;
                self.written.insert(name.clone());
            }
            shells.insert(app.clone(), name);
        }
        let in_use: BTreeSet<String> = shells.values().cloned().collect();
        let file = StateFile { version: VERSION, fleet: state.fleet.clone(), shells };
        let text = serde_json::to_vec(&file)
            .map_err(|source| StateError::Content { path: self.file.clone(), source })?;
        write_durably(&self.file, &text, Some(&previous_of(&self.file)))?;
        // The previous state may still refer to them; should it ever be needed, its apps get a bare environment.
        let gone: Vec<String> = self.written.difference(&in_use).cloned().collect();
        if gone.len() > 16 {
            for name in gone {
                if fs::remove_file(self.env_dir.join(&name)).is_ok() {
                    self.written.remove(&name);
                }
            }
        }
        Ok(())
    }
}

/// Whether a state file names any app. `false` also when it cannot be read: whoever starts a daemon is told why.
#[must_use]
pub fn remembers_apps(file: &Path) -> bool {
    #[derive(Deserialize)]
    struct Names {
        fleet: Apps,
    }
    #[derive(Deserialize)]
    struct Apps {
        apps: Vec<serde::de::IgnoredAny>,
    }
    let text = fs::read(file).unwrap_or_default();
    serde_json::from_slice(&text).is_ok_and(|Names { fleet }: Names| !fleet.apps.is_empty())
}

fn previous_of(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".prev");
    name.into()
}

fn shell_file_name(shell: &BTreeMap<String, String>) -> String {
    let mut hasher = DefaultHasher::new();
    shell.hash(&mut hasher);
    format!("{:016x}.json", hasher.finish())
}

fn read_shell(path: &Path) -> Result<BTreeMap<String, String>, StateError> {
    match fs::read(path) {
        Ok(text) => serde_json::from_slice(&text)
            .map_err(|source| StateError::Content { path: path.to_owned(), source }),
        // An app without its shell's variables is better than no app.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(BTreeMap::new()),
        Err(source) => Err(StateError::Read { path: path.to_owned(), source }),
    }
}

/// Writes `text` to `path` so that after a crash at any instant either the old or the new content is there.
fn write_durably(path: &Path, text: &[u8], previous: Option<&Path>) -> Result<(), StateError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| StateError::Write { path, source }
    };
    let dir = path.parent().unwrap_or(Path::new("."));
    let mut aside = path.as_os_str().to_owned();
    aside.push(".new");
    let aside = PathBuf::from(aside);
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&aside)?;
        file.write_all(text)?;
        file.sync_all()
    })();
    if let Err(source) = written {
        // A full disk must not stay full because of us.
        let _ = fs::remove_file(&aside);
        return Err(StateError::Write { path: aside, source });
    }
    if let Some(previous) = previous {
        match fs::rename(path, previous) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(failed(previous)(source)),
        }
    }
    fs::rename(&aside, path).map_err(failed(path))?;
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed(dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(dir: &Path) -> StateStore {
        fs::create_dir_all(dir.join("env")).unwrap();
        StateStore::new(dir.join("state.json"), dir.join("env"))
    }

    fn state(next_pm_id: u32) -> State {
        let shell = Arc::new(BTreeMap::from([("SECRET".to_owned(), "hush".to_owned())]));
        State {
            fleet: SavedFleet { apps: Vec::new(), next_pm_id, start_parallelism: None },
            shells: BTreeMap::from([(AppName::new("api").unwrap(), shell)]),
        }
    }

    #[test]
    fn what_is_saved_is_loaded() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(store(dir.path()).load().unwrap().state, State::default());
        store(dir.path()).save(&state(7)).unwrap();
        let loaded = store(dir.path()).load().unwrap();
        assert_eq!(loaded.state, state(7));
        assert!(loaded.warning.is_none());
    }

    #[test]
    fn secrets_are_not_in_the_state_file() {
        let dir = tempfile::tempdir().unwrap();
        store(dir.path()).save(&state(7)).unwrap();
        assert!(!fs::read_to_string(dir.path().join("state.json")).unwrap().contains("hush"));
    }

    #[test]
    fn a_damaged_state_falls_back_to_the_one_before() {
        let dir = tempfile::tempdir().unwrap();
        let mut saved = store(dir.path());
        saved.save(&state(1)).unwrap();
        saved.save(&state(2)).unwrap();
        for damage in [&b""[..], b"{\"version\":1,\"fle", b"garbage"] {
            fs::write(dir.path().join("state.json"), damage).unwrap();
            let loaded = store(dir.path()).load().unwrap();
            assert_eq!(loaded.state.fleet.next_pm_id, 1);
            assert!(loaded.warning.unwrap().contains("state.json"));
        }
    }

    #[test]
    fn a_crash_between_the_renames_leaves_the_state_before() {
        let dir = tempfile::tempdir().unwrap();
        store(dir.path()).save(&state(1)).unwrap();
        fs::rename(dir.path().join("state.json"), dir.path().join("state.json.prev")).unwrap();
        assert_eq!(store(dir.path()).load().unwrap().state, state(1));
    }

    #[test]
    fn two_damaged_states_are_an_error_and_not_an_empty_list() {
        let dir = tempfile::tempdir().unwrap();
        let mut saved = store(dir.path());
        saved.save(&state(1)).unwrap();
        saved.save(&state(2)).unwrap();
        fs::write(dir.path().join("state.json"), "x").unwrap();
        fs::write(dir.path().join("state.json.prev"), "x").unwrap();
        assert!(store(dir.path()).load().is_err());
    }

    #[test]
    fn a_newer_version_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("state.json"), r#"{"version":99,"fleet":{"apps":[],"next_pm_id":0}}"#)
            .unwrap();
        assert!(matches!(store(dir.path()).load(), Err(StateError::Version { version: 99, .. })));
    }
}
