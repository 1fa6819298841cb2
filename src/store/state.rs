//! state.json: the desired state, and the shell environments it refers to.
//!
//! A write goes to a file aside, fsync, rename, fsync of the directory; the state before it stays as `state.json.prev`.
//! So a crash at any instant, a full disk or a failing one leaves the last acknowledged state readable. What fails is
//! taken back, because whoever asked is told that nothing was changed. Environments lie in `env/` under the hash of
//! their content, 0600 and never in state.json: a hundred apps started from one shell share one file. Those that neither
//! state refers to are removed, also what an earlier life left that was killed in the middle: secrets are in them.
//!
//! Never goes back in time by itself: the state before is read only when the newest one is not there or is no state.
//! One that cannot be read now, or is of a newer pm, is an error.

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
    /// Files known to lie in `env/`, whole.
    written: BTreeSet<String>,
    /// Those of the state before, which nobody has looked into.
    others: BTreeSet<String>,
    /// What lies in `file` is no state, and must not take the place of the one before it.
    damaged: bool,
    /// What earlier lives left in `env/` is gone.
    tidied: bool,
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
        let (written, others) = (BTreeSet::new(), BTreeSet::new());
        Self { file, env_dir, written, others, damaged: false, tidied: false }
    }

    /// Reads the state, or the one before it when the newest is no state or is not there.
    ///
    /// # Errors
    /// When neither can be read although one is there: starting empty would forget what was acknowledged. Also when the
    /// newest cannot be read now, or by this pm: the one before it would undo what was acknowledged since.
    pub fn load(&mut self) -> Result<Loaded, StateError> {
        let mut complaints = Vec::new();
        let newest = self.read(&self.file.clone(), &mut complaints);
        let previous = previous_of(&self.file);
        let state = match newest {
            Ok(Some(state)) => state,
            // Between the two renames of a write there is only the previous state.
            Ok(None) => self.read(&previous, &mut complaints)?.unwrap_or_default(),
            Err(error @ StateError::Content { .. }) => {
                complaints.clear();
                let Ok(Some(state)) = self.read(&previous, &mut complaints) else { return Err(error) };
                self.damaged = true;
                let kept = damaged_of(&self.file);
                complaints.insert(
                    0,
                    format!(
                        "{error}; the state before it was loaded, without the last change. The damaged file is kept \
                         as {}",
                        kept.display()
                    ),
                );
                state
            }
            Err(error) => return Err(error),
        };
        let warning = (!complaints.is_empty()).then(|| complaints.join("; "));
        Ok(Loaded { state, warning })
    }

    fn read(&mut self, path: &Path, complaints: &mut Vec<String>) -> Result<Option<State>, StateError> {
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
                let (shell, whole) = read_shell(&self.env_dir.join(&name))?;
                match whole {
                    Ok(()) => drop(self.written.insert(name.clone())),
                    // An app without its shell's variables is better than no app.
                    Err(why) => complaints.push(format!(
                        "{why}; `{app}` gets its next start without the variables of the shell it was started from, \
                         until `pm restart {app} --update-env`"
                    )),
                }
                let shell = Arc::new(shell);
                known.insert(name.clone(), shell.clone());
                shell
            };
            shells.insert(app, shell);
        }
        Ok(Some(State { fleet: file.fleet, shells }))
    }

    /// Removes what earlier lives left in `env/` and no state refers to. Only for the one who writes: an environment is
    /// written before the state that refers to it.
    pub fn tidy(&mut self) {
        self.tidied = true;
        let Some(named) = self.named() else { return };
        let is_stale = |name: &str| {
            // One that is being written when nobody writes.
            let whole = name.strip_suffix(".new");
            is_shell_file_name(whole.unwrap_or(name)) && (whole.is_some() || !named.contains(name))
        };
        // What cannot be listed or removed is looked at again by the next life.
        for entry in fs::read_dir(&self.env_dir).into_iter().flatten().flatten() {
            if entry.file_name().to_str().is_some_and(is_stale) {
                let _ = fs::remove_file(entry.path());
            }
        }
        self.others = named;
    }

    /// The environments that the state and the one before it refer to. `None` when one of them cannot be read, or both are
    /// missing: what they refer to may be needed once they are back.
    fn named(&self) -> Option<BTreeSet<String>> {
        let states = [names_in(&self.file), names_in(&previous_of(&self.file))];
        if states.iter().all(|names| matches!(names, Ok(None))) {
            return None;
        }
        let mut named = BTreeSet::new();
        for names in states {
            named.extend(names.ok()?.unwrap_or_default());
        }
        Some(named)
    }

    /// Writes the state durably, then removes environments that nothing refers to any more.
    ///
    /// # Errors
    /// When any step fails; the state that was on disk before is the one that will be read then.
    pub fn save(&mut self, state: &State) -> Result<(), StateError> {
        if !self.tidied {
            self.tidy();
        }
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
        let keep = if self.damaged { damaged_of(&self.file) } else { previous_of(&self.file) };
        write_durably(&self.file, &text, Some(&keep))?;
        self.damaged = false;
        let known = self.written.union(&self.others);
        let stale: Vec<String> = known.filter(|name| !in_use.contains(*name)).cloned().collect();
        if !stale.is_empty()
            && let Some(named) = self.named()
        {
            for name in stale.into_iter().filter(|name| !named.contains(name)) {
                let gone = match fs::remove_file(self.env_dir.join(&name)) {
                    Ok(()) => true,
                    Err(error) => error.kind() == io::ErrorKind::NotFound,
                };
                if gone {
                    self.written.remove(&name);
                    self.others.remove(&name);
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
    let names = |file: &Path| {
        let text = fs::read(file).ok()?;
        serde_json::from_slice::<Names>(&text).ok()
    };
    // As a daemon would read it.
    names(file).or_else(|| names(&previous_of(file))).is_some_and(|names| !names.fleet.apps.is_empty())
}

fn with_suffix(file: &Path, suffix: &str) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn previous_of(file: &Path) -> PathBuf {
    with_suffix(file, ".prev")
}

/// What was found in place of a state, for whoever wants to look at it.
fn damaged_of(file: &Path) -> PathBuf {
    with_suffix(file, ".damaged")
}

fn shell_file_name(shell: &BTreeMap<String, String>) -> String {
    let mut hasher = DefaultHasher::new();
    shell.hash(&mut hasher);
    format!("{:016x}.json", hasher.finish())
}

fn is_shell_file_name(name: &str) -> bool {
    let hash = name.strip_suffix(".json").unwrap_or_default();
    hash.len() == 16 && hash.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The environments that a state file refers to; `None` where there is no such file.
fn names_in(file: &Path) -> io::Result<Option<BTreeSet<String>>> {
    #[derive(Deserialize)]
    struct Names {
        #[serde(default)]
        shells: BTreeMap<String, String>,
    }
    match fs::read(file) {
        Ok(text) => {
            let names: Names = serde_json::from_slice(&text)?;
            Ok(Some(names.shells.into_values().collect()))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The variables in a file, and whether they are all there: `Err` says why not.
///
/// # Errors
/// When it cannot be read now, but perhaps later.
#[expect(clippy::type_complexity, reason = "a name for it would say less")]
fn read_shell(path: &Path) -> Result<(BTreeMap<String, String>, Result<(), String>), StateError> {
    let lost = |why: String| Ok((BTreeMap::new(), Err(why)));
    match fs::read(path) {
        Ok(text) => match serde_json::from_slice(&text) {
            Ok(shell) => Ok((shell, Ok(()))),
            Err(error) => lost(format!("{path:?} is damaged: {error}")),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => lost(format!("{path:?} is missing")),
        Err(source) => Err(StateError::Read { path: path.to_owned(), source }),
    }
}

/// Writes `text` to `path` so that after a crash at any instant either the old or the new content is there. The old
/// content stays under the name `previous`.
fn write_durably(path: &Path, text: &[u8], previous: Option<&Path>) -> Result<(), StateError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| StateError::Write { path, source }
    };
    let dir = path.parent().unwrap_or(Path::new("."));
    let aside = with_suffix(path, ".new");
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&aside)?;
        file.write_all(text)?;
        file.sync_data()
    })();
    if let Err(source) = written {
        // A full disk must not stay full because of us.
        let _ = fs::remove_file(&aside);
        return Err(StateError::Write { path: path.to_owned(), source });
    }
    let kept = match previous {
        None => false,
        Some(previous) => match fs::rename(path, previous) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(source) => {
                let _ = fs::remove_file(&aside);
                return Err(failed(previous)(source));
            }
        },
    };
    let placed = fs::rename(&aside, path)
        .map_err(failed(path))
        .and_then(|()| File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed(dir)));
    if placed.is_err() {
        // Whoever asked is told that it was not saved, so the next one to read must not find it. Where this fails too
        // there is nothing left to try: without the newest state the one before is read.
        let _ = fs::rename(path, &aside);
        if let (Some(previous), true) = (previous, kept) {
            let _ = fs::rename(previous, path);
        }
        let _ = fs::remove_file(&aside);
    }
    placed
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
            fleet: SavedFleet { next_pm_id, ..SavedFleet::default() },
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
    fn a_damaged_state_does_not_take_the_place_of_the_one_before_and_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let mut saved = store(dir.path());
        saved.save(&state(1)).unwrap();
        saved.save(&state(2)).unwrap();
        fs::write(dir.path().join("state.json"), "garbage").unwrap();
        let mut next = store(dir.path());
        assert!(next.load().unwrap().warning.unwrap().contains("state.json.damaged"));
        next.save(&state(3)).unwrap();
        // Should the new one be lost in its turn, the last good one is still there.
        fs::write(dir.path().join("state.json"), "").unwrap();
        assert_eq!(store(dir.path()).load().unwrap().state, state(1));
        assert_eq!(fs::read_to_string(dir.path().join("state.json.damaged")).unwrap(), "garbage");
    }

    #[test]
    fn a_state_that_cannot_be_read_now_is_not_undone_by_the_one_before() {
        let dir = tempfile::tempdir().unwrap();
        let mut saved = store(dir.path());
        saved.save(&state(1)).unwrap();
        saved.save(&state(2)).unwrap();
        fs::remove_file(dir.path().join("state.json")).unwrap();
        fs::create_dir(dir.path().join("state.json")).unwrap();
        assert!(matches!(store(dir.path()).load(), Err(StateError::Read { .. })));
        fs::remove_dir(dir.path().join("state.json")).unwrap();
        fs::write(dir.path().join("state.json"), r#"{"version":99}"#).unwrap();
        assert!(matches!(store(dir.path()).load(), Err(StateError::Version { version: 99, .. })));
    }

    #[test]
    fn a_damaged_environment_costs_its_variables_and_not_the_app() {
        let dir = tempfile::tempdir().unwrap();
        store(dir.path()).save(&state(7)).unwrap();
        let shell = fs::read_dir(dir.path().join("env")).unwrap().next().unwrap().unwrap().path();
        for damage in [Some(&b""[..]), Some(b"{\"SECRET\":\"hu"), None] {
            match damage {
                Some(text) => fs::write(&shell, text).unwrap(),
                None => fs::remove_file(&shell).unwrap(),
            }
            let loaded = store(dir.path()).load().unwrap();
            assert_eq!(loaded.state.fleet, state(7).fleet);
            assert_eq!(loaded.state.shells.values().next().unwrap().len(), 0);
            let warning = loaded.warning.unwrap();
            assert!(warning.contains("`api`") && warning.contains("--update-env"), "{warning}");
        }
        // The same environment is written again, not believed to be there.
        let mut next = store(dir.path());
        next.load().unwrap();
        next.save(&state(7)).unwrap();
        assert_eq!(store(dir.path()).load().unwrap().state, state(7));
    }

    fn with_shell(number: u32) -> State {
        let mut state = state(number);
        let shell = Arc::new(BTreeMap::from([("SECRET".to_owned(), number.to_string())]));
        state.shells.values_mut().for_each(|known| *known = Arc::clone(&shell));
        state
    }

    fn environments(dir: &Path) -> BTreeSet<String> {
        let entries = fs::read_dir(dir.join("env")).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn environments_of_many_lives_do_not_pile_up_and_what_either_state_refers_to_stays() {
        let dir = tempfile::tempdir().unwrap();
        for life in 1..30 {
            let mut own = store(dir.path());
            own.load().unwrap();
            own.save(&with_shell(2 * life)).unwrap();
            own.save(&with_shell(2 * life + 1)).unwrap();
            // Killed when the environment was written and not the state, or in the middle of it.
            fs::write(dir.path().join(format!("env/{life:016x}.json")), r#"{"SECRET":"x"}"#).unwrap();
            fs::write(dir.path().join(format!("env/{:016x}.json.new", life + 99)), r#"{"SEC"#).unwrap();
            assert!(environments(dir.path()).len() <= 4, "{life}: {:?}", environments(dir.path()));
        }
        fs::write(dir.path().join("env/README"), "somebody's").unwrap();
        let mut last = store(dir.path());
        assert_eq!(last.load().unwrap().state, with_shell(59));
        assert_eq!(environments(dir.path()).len(), 5, "only to load changes nothing");
        last.tidy();
        assert_eq!(environments(dir.path()).len(), 3);
        fs::remove_file(dir.path().join("state.json")).unwrap();
        let before = store(dir.path()).load().unwrap();
        assert_eq!((before.state, before.warning), (with_shell(58), None));
    }

    #[test]
    fn nothing_is_tidied_while_it_is_not_known_what_is_needed() {
        let dir = tempfile::tempdir().unwrap();
        store(dir.path()).save(&with_shell(1)).unwrap();
        store(dir.path()).save(&with_shell(2)).unwrap();
        let all = environments(dir.path());
        assert_eq!(all.len(), 2);
        let file = |suffix: &str| dir.path().join(format!("state.json{suffix}"));
        fs::rename(file(""), file(".kept")).unwrap();
        fs::write(file(""), "garbage").unwrap();
        store(dir.path()).tidy();
        assert_eq!(environments(dir.path()), all);
        // Moved away, to begin with an empty list for a while.
        fs::rename(file(".prev"), file(".prev.kept")).unwrap();
        fs::remove_file(file("")).unwrap();
        store(dir.path()).tidy();
        assert_eq!(environments(dir.path()), all);
    }

    #[test]
    fn an_environment_is_gone_when_neither_state_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut own = store(dir.path());
        for number in 1..40 {
            own.save(&with_shell(number)).unwrap();
            assert!(environments(dir.path()).len() <= 2);
        }
        own.save(&State::default()).unwrap();
        own.save(&State::default()).unwrap();
        assert_eq!(environments(dir.path()), BTreeSet::new());
    }

    /// Runs something on a thread whose system calls of these numbers fail with `errno`.
    fn without<T: Send>(calls: &[i64], errno: i32, act: impl FnOnce() -> T + Send) -> T {
        use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};
        let filter: BpfProgram = SeccompFilter::new(
            calls.iter().map(|call| (*call, Vec::new())).collect(),
            SeccompAction::Allow,
            SeccompAction::Errno(errno.cast_unsigned()),
            std::env::consts::ARCH.try_into().unwrap(),
        )
        .unwrap()
        .try_into()
        .unwrap();
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                apply_filter(&filter).unwrap();
                act()
            });
            thread.join().unwrap()
        })
    }

    #[test]
    fn pain_11_whatever_step_of_a_save_the_disk_fails_the_last_acknowledged_state_is_read() {
        #[cfg(target_arch = "x86_64")]
        const RENAME: &[i64] = &[libc::SYS_rename, libc::SYS_renameat, libc::SYS_renameat2];
        #[cfg(not(target_arch = "x86_64"))]
        const RENAME: &[i64] = &[libc::SYS_renameat, libc::SYS_renameat2];
        let steps: [(&str, &[i64]); 4] = [
            ("write", &[libc::SYS_write]),
            ("fsync of the file", &[libc::SYS_fdatasync]),
            ("rename", RENAME),
            ("fsync of the directory", &[libc::SYS_fsync]),
        ];
        for (step, calls) in steps {
            for errno in [libc::EIO, libc::ENOSPC, libc::EROFS] {
                for before in [None, Some(1)] {
                    let dir = tempfile::tempdir().unwrap();
                    let mut saved = store(dir.path());
                    if let Some(before) = before {
                        saved.save(&state(before)).unwrap();
                    }
                    let error = without(calls, errno, || saved.save(&state(2))).expect_err(step);
                    let text = io::Error::from_raw_os_error(errno).to_string();
                    assert!(error.to_string().ends_with(&text), "{step}: {error}");
                    let loaded = store(dir.path()).load().unwrap();
                    assert_eq!(loaded.state, before.map(state).unwrap_or_default(), "{step}");
                    assert_eq!(loaded.warning, None, "{step}");
                    assert!(!dir.path().join("state.json.new").try_exists().unwrap(), "{step}");
                    // The disk recovers.
                    saved.save(&state(3)).unwrap();
                    assert_eq!(store(dir.path()).load().unwrap().state, state(3), "{step}");
                }
            }
        }
    }

    #[test]
    fn a_crash_between_the_renames_leaves_the_state_before() {
        let dir = tempfile::tempdir().unwrap();
        store(dir.path()).save(&state(1)).unwrap();
        fs::rename(dir.path().join("state.json"), dir.path().join("state.json.prev")).unwrap();
        assert_eq!(store(dir.path()).load().unwrap().state, state(1));
        assert!(!remembers_apps(&dir.path().join("state.json")));
        fs::write(dir.path().join("state.json.prev"), r#"{"version":1,"fleet":{"apps":[{}]}}"#).unwrap();
        assert!(remembers_apps(&dir.path().join("state.json")));
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
