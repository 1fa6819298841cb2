//! From a spec to what execve(2) takes: program, arguments, environment, descriptors.
//!
//! Everything that may change between two spawns is looked up here, anew each time: env files, the interpreter in the
//! *app's* PATH, the working directory, symlinks on the way to the script.

use std::collections::BTreeMap;
use std::error::Error;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::rights::{self, RightsError};
use crate::model::id::{Generation, InstanceId, PmId, Slot};
use crate::model::saved::{StartedFile, StartedFrom};
use crate::model::spec::{AppSpec, ListenSpec};
use crate::store::env_file::{self, Trust};
use crate::store::environment::{self, OwnVariables, TRUST_FILES};
use crate::sys::users::Account;

/// The first descriptor after stdin, stdout and stderr (`SD_LISTEN_FDS_START`).
pub(super) const FIRST_FD: usize = 3;

/// Where PATH is looked for when the environment has none; what execvp(3) does.
const DEFAULT_PATH: &str = "/usr/local/bin:/usr/bin:/bin";

/// What to hand to the keeper.
#[derive(Debug)]
pub struct Launch {
    /// The file to execute.
    pub program: PathBuf,
    /// Its arguments, the zeroth included.
    pub argv: Vec<OsString>,
    /// Its whole environment.
    pub env: Vec<(String, String)>,
    /// Its working directory.
    pub cwd: PathBuf,
}

/// Why an instance cannot be launched.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The script is not there.
    #[error("script {0:?} does not exist")]
    NoScript(PathBuf),
    /// The script is a directory.
    #[error("script {0:?} is a directory")]
    Directory(PathBuf),
    /// The script cannot be executed.
    #[error("{0:?} is not executable; make it so, or set an interpreter")]
    NotExecutable(PathBuf),
    /// The interpreter is not there.
    #[error("interpreter `{name}` is not in the app's PATH ({path})")]
    NoInterpreter {
        /// Its name.
        name: String,
        /// The PATH.
        path: String,
    },
    /// The interpreter that is named by its path is not there.
    #[error("interpreter {0:?} does not exist or is not executable")]
    NoInterpreterFile(PathBuf),
    /// The command is not there.
    #[error("command `{name}` is not in the app's PATH ({path})")]
    NoCommand {
        /// Its name.
        name: String,
        /// The PATH.
        path: String,
    },
    /// The working directory is not there.
    #[error("working directory {0:?} does not exist")]
    NoCwd(PathBuf),
    /// An env file cannot be read.
    #[error("{}", with_cause(.0))]
    EnvFile(env_file::ReadError),
    /// It cannot run as whom it is to.
    #[error(transparent)]
    Rights(#[from] RightsError),
}

/// An error and what is below it, in one line.
fn with_cause(error: &dyn Error) -> String {
    match error.source() {
        Some(cause) => format!("{error}: {}", with_cause(cause)),
        None => error.to_string(),
    }
}

/// Who is launched, and with which descriptors.
#[derive(Debug)]
pub struct Role<'a> {
    /// Which run.
    pub id: &'a InstanceId,
    /// Its slot's number for people.
    pub pm_id: PmId,
    /// Proves in `/proc/PID/environ` that a process belongs to this run.
    pub token: &'a str,
    /// `NODE_UNIQUE_ID`, for a worker of a Node cluster.
    pub worker: Option<u32>,
    /// The notify socket, when the app is to say that it is ready.
    pub notify: Option<&'a OsStr>,
    /// The agent's file.
    pub agent: &'a Path,
}

/// The numbers of an instance's descriptors, contiguous from 3: listeners, channel, ready pipe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptors {
    /// How many listeners.
    pub listeners: usize,
    /// Whether there is a channel.
    pub channel: bool,
    /// Whether there is a ready pipe.
    pub ready: bool,
}

impl Descriptors {
    /// What an instance of this spec gets.
    #[must_use]
    pub fn of(spec: &AppSpec) -> Self {
        Self {
            listeners: if spec.is_node_cluster() { 0 } else { spec.listen.len() },
            channel: spec.has_channel(),
            ready: spec.ready.wait_ready,
        }
    }

    const fn channel_fd(self) -> Option<usize> {
        if self.channel { Some(FIRST_FD + self.listeners) } else { None }
    }

    const fn ready_fd(self) -> Option<usize> {
        let before = FIRST_FD + self.listeners;
        if self.ready { Some(if self.channel { before + 1 } else { before }) } else { None }
    }
}

/// Where systemd has put what LoadCredential= and the like name for the daemon's unit; apps read it there.
const CREDENTIALS: &str = "CREDENTIALS_DIRECTORY";

/// Works out what to execute.
///
/// # Errors
/// When something that is needed is not there; nothing has been started then.
pub fn launch(
    spec: &AppSpec,
    shell: &BTreeMap<String, String>,
    role: &Role<'_>,
) -> Result<Launch, LaunchError> {
    let descriptors = Descriptors::of(spec);
    let mut env = environment_of(spec, shell, role)?;
    env.extend(descriptor_variables(spec, role, descriptors));
    if !is_dir(&spec.cwd) {
        return Err(LaunchError::NoCwd(spec.cwd.clone()));
    }
    let path = env.iter().find(|(key, _)| key == "PATH").map_or(DEFAULT_PATH, |(_, value)| value.as_str());
    let command = &spec.command;
    let script = &command.script;
    let mut argv: Vec<OsString> = Vec::new();
    let program = if let Some(interpreter) = &command.interpreter {
        if names_a_file(spec) {
            check_script(&spec.cwd.join(script))?;
        }
        let program = find_interpreter(interpreter, path, &spec.cwd)?;
        argv.push(interpreter.into());
        argv.extend(command.interpreter_args.iter().map(OsString::from));
        if spec.has_agent() {
            argv.push("--require".into());
            argv.push(role.agent.into());
        }
        argv.push(script.into());
        program
    } else {
        let program = if has_slash(script) {
            let program = spec.cwd.join(script);
            check_script(&program)?;
            if !is_executable(&program) {
                return Err(LaunchError::NotExecutable(program));
            }
            program
        } else {
            find_in_path(script, path, &spec.cwd).ok_or_else(|| LaunchError::NoCommand {
                name: script.display().to_string(),
                path: path.to_owned(),
            })?
        };
        argv.push(script.into());
        program
    };
    argv.extend(command.args.iter().map(|argument| expand_descriptors(argument, spec, descriptors).into()));
    Ok(Launch { program, argv, env, cwd: spec.cwd.clone() })
}

/// The variables that the next start in this slot would have, but for those of pm itself.
///
/// # Errors
/// An env file cannot be read.
pub fn configured_environment(
    spec: &AppSpec,
    shell: &BTreeMap<String, String>,
    id: &InstanceId,
    pm_id: PmId,
) -> Result<BTreeMap<String, String>, LaunchError> {
    let role = Role { id, pm_id, token: "", worker: None, notify: None, agent: Path::new("") };
    let all = environment_of(spec, shell, &role)?;
    Ok(all.into_iter().filter(|(name, _)| !environment::is_scrubbed(name)).collect())
}

/// Whether an instance of a spec could be launched now, as far as can be known without doing it.
///
/// # Errors
/// What is not there.
pub fn check(spec: &AppSpec, shell: &BTreeMap<String, String>) -> Result<(), LaunchError> {
    let id = InstanceId { app: spec.name.clone(), slot: Slot(0), generation: Generation(0) };
    let role =
        Role { id: &id, pm_id: PmId(0), token: "", worker: None, notify: None, agent: Path::new("agent") };
    rights::account_of(&spec.process)?;
    launch(spec, shell, &role).map(drop)
}

/// The files a launch uses, symlinks resolved. What cannot be looked at is left out: there is no way back to it.
#[must_use]
pub fn started_from(spec: &AppSpec, launch: &Launch) -> StartedFrom {
    let script = match &spec.command.interpreter {
        Some(_) if names_a_file(spec) => started_file(&spec.cwd.join(&spec.command.script)),
        Some(_) => None,
        None => started_file(&launch.program),
    };
    StartedFrom { cwd: fs::canonicalize(&launch.cwd).unwrap_or_else(|_| launch.cwd.clone()), script }
}

fn started_file(path: &Path) -> Option<StartedFile> {
    let path = fs::canonicalize(path).ok()?;
    let meta = fs::metadata(&path).ok()?;
    let modified = meta.mtime().saturating_mul(1_000_000_000).saturating_add(meta.mtime_nsec());
    Some(StartedFile { path, device: meta.dev(), inode: meta.ino(), size: meta.size(), modified })
}

/// A spec whose paths lead to the files that an earlier instance was started from.
///
/// # Errors
/// When those are not the same files any more.
pub fn as_it_was(spec: &AppSpec, from: &StartedFrom) -> Result<AppSpec, ChangedSince> {
    let mut spec = spec.clone();
    spec.cwd.clone_from(&from.cwd);
    if let Some(file) = &from.script {
        match started_file(&file.path) {
            Some(now) if now == *file => spec.command.script.clone_from(&file.path),
            Some(_) => return Err(ChangedSince::Changed(file.path.clone())),
            None => return Err(ChangedSince::Gone(file.path.clone())),
        }
    }
    Ok(spec)
}

/// Why there is nothing to go back to.
#[derive(Debug, thiserror::Error)]
pub enum ChangedSince {
    /// Somebody wrote to it.
    #[error("{0:?} has changed since it was started, so there is nothing to go back to")]
    Changed(PathBuf),
    /// Somebody removed it.
    #[error("{0:?}, which it was started from, is gone, so there is nothing to go back to")]
    Gone(PathBuf),
}

/// Whoever started the app, or the daemon, may have said that its files are fine wherever they lie.
fn trust(shell: &BTreeMap<String, String>) -> Trust {
    let says = |value: &OsStr| value == "1";
    let is_fine = shell.get(TRUST_FILES).is_some_and(|value| says(value.as_ref()))
        || std::env::var_os(TRUST_FILES).is_some_and(|value| says(&value));
    if is_fine { Trust::All } else { Trust::Unsteered }
}

fn environment_of(
    spec: &AppSpec,
    shell: &BTreeMap<String, String>,
    role: &Role<'_>,
) -> Result<Vec<(String, String)>, LaunchError> {
    let mut files = Vec::new();
    let trust = trust(shell);
    for path in &spec.env.files {
        let path = spec.cwd.join(path);
        match env_file::read(&path, trust) {
            Ok(file) => {
                for line in &file.skipped {
                    tracing::warn!(path = %path.display(), line = line.number, reason = line.reason, "env file line skipped");
                }
                files.extend(file.variables);
            }
            Err(error) => return Err(LaunchError::EnvFile(error)),
        }
    }
    let InstanceId { slot, generation, .. } = *role.id;
    let own = OwnVariables { slot, pm_id: role.pm_id, generation, token: role.token };
    let mut env = environment::instance_environment(spec, shell, &files, &own);
    if let Ok(Some(Account { entry: Some(entry), .. })) = rights::account_of(&spec.process) {
        // Those of the shell are of another user.
        let path = |path: PathBuf| path.to_string_lossy().into_owned();
        let login = [
            ("HOME", path(entry.home)),
            ("USER", entry.name.clone()),
            ("LOGNAME", entry.name),
            ("SHELL", path(entry.shell)),
        ];
        for (name, value) in login {
            if !spec.env.vars.contains_key(name) && !files.iter().any(|(known, _)| known == name) {
                env.retain(|(known, _)| known != name);
                env.push((name.to_owned(), value));
            }
        }
    }
    let is_set = spec.env.vars.contains_key(CREDENTIALS) || files.iter().any(|(name, _)| name == CREDENTIALS);
    if !is_set && let Ok(directory) = std::env::var(CREDENTIALS) {
        // The caller's shell may have run in another unit.
        env.retain(|(name, _)| name != CREDENTIALS);
        env.push((CREDENTIALS.to_owned(), directory));
    }
    Ok(env)
}

fn descriptor_variables(spec: &AppSpec, role: &Role<'_>, descriptors: Descriptors) -> Vec<(String, String)> {
    let mut variables = Vec::new();
    let mut set = |key: &str, value: String| variables.push((key.to_owned(), value));
    if descriptors.listeners > 0 {
        // LISTEN_PID is the child's own pid: the keeper fills it in.
        set("LISTEN_FDS", descriptors.listeners.to_string());
        let names: Vec<&str> = spec.listen.iter().map(|listener| listener.name.as_str()).collect();
        set("LISTEN_FDNAMES", names.join(":"));
        for (index, listener) in spec.listen.iter().enumerate() {
            set(&variable_of(listener), (FIRST_FD + index).to_string());
        }
    }
    if let Some(fd) = descriptors.channel_fd() {
        set("NODE_CHANNEL_FD", fd.to_string());
        set("NODE_CHANNEL_SERIALIZATION_MODE", "json".into());
    }
    if let Some(worker) = role.worker {
        set("NODE_UNIQUE_ID", worker.to_string());
    }
    if let Some(fd) = descriptors.ready_fd() {
        set("PM_READY_FD", fd.to_string());
    }
    if let Some(notify) = role.notify {
        set("NOTIFY_SOCKET", notify.to_string_lossy().into_owned());
    }
    variables
}

fn variable_of(listener: &ListenSpec) -> String {
    let name: String = listener
        .name
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' })
        .collect();
    format!("PM_LISTEN_FD_{name}")
}

fn expand_descriptors(argument: &str, spec: &AppSpec, descriptors: Descriptors) -> String {
    let mut text = argument.to_owned();
    if descriptors.listeners > 0 && text.contains("{fd:") {
        for (index, listener) in spec.listen.iter().enumerate() {
            text = text.replace(&format!("{{fd:{}}}", listener.name), &(FIRST_FD + index).to_string());
        }
    }
    text
}

/// A runtime's `-e CODE`, `-m MODULE` and a shell's `-c LINE` `-m MODULE` name no file.
fn names_a_file(spec: &AppSpec) -> bool {
    !matches!(spec.command.interpreter_args.last().map(String::as_str), Some("-c" | "-lc" | "-e" | "-m"))
}

fn has_slash(path: &Path) -> bool {
    path.as_os_str().as_encoded_bytes().contains(&b'/')
}

fn is_dir(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.is_dir())
}

fn check_script(path: &Path) -> Result<(), LaunchError> {
    match fs::metadata(path) {
        Ok(meta) if meta.is_dir() => Err(LaunchError::Directory(path.to_owned())),
        // Whether it can be read is the interpreter's to say, as its own user.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(LaunchError::NoScript(path.to_owned())),
        _ => Ok(()),
    }
}

fn is_executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// The executable that a command names: by its path, from `cwd`, or in `path`.
pub(super) fn find_program(name: &Path, path: Option<&str>, cwd: &Path) -> Option<PathBuf> {
    if has_slash(name) {
        return Some(cwd.join(name)).filter(|program| is_executable(program));
    }
    find_in_path(name, path.unwrap_or(DEFAULT_PATH), cwd)
}

/// Looks a command up as execvp(3) does; empty entries of PATH are the working directory.
fn find_in_path(name: &Path, path: &str, cwd: &Path) -> Option<PathBuf> {
    path.split(':').map(|dir| cwd.join(dir).join(name)).find(|candidate| is_executable(candidate))
}

fn find_interpreter(name: &str, path: &str, cwd: &Path) -> Result<PathBuf, LaunchError> {
    let missing = || LaunchError::NoInterpreter { name: name.to_owned(), path: path.to_owned() };
    if name.contains('/') {
        let program = cwd.join(name);
        return if is_executable(&program) {
            Ok(program)
        } else {
            Err(LaunchError::NoInterpreterFile(program))
        };
    }
    let fallback = match name {
        "python" => Some("python3"),
        "node" => Some("nodejs"),
        _ => None,
    };
    find_in_path(Path::new(name), path, cwd)
        .or_else(|| fallback.and_then(|fallback| find_in_path(Path::new(fallback), path, cwd)))
        .ok_or_else(missing)
}
