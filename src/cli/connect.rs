//! The way to the daemon: find it, start it where a command needs one, and ask it.
//!
//! Every wait has an end. Starting is guarded by a lock: of a hundred commands on a cold home one starts the daemon
//! and the others find it. Only `start`, `resurrect`, and `restart`/`reload` with a config file start one.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag};
use nix::poll::{PollTimeout, poll};

use super::error::CliError;
use super::specs::FileSettings;
use crate::ipc::client::{Connection, Ended, Heard, Listen, new_op};
use crate::ipc::codec::CodecError;
use crate::ipc::protocol::{
    Answer, AppResult, NOT_BEGUN, OperationView, Refused, Request, UpgradeView, Verb,
};
use crate::model::id::{AppName, OpId};
use crate::store::paths::{Home, user_name};
use crate::sys::clock::{self, Moment};
use crate::sys::peer;

/// How long a daemon may take from its start to its socket. Generous: a hundred commands may start at once.
const START_PATIENCE: Duration = Duration::from_secs(10);
/// How long the outcome of an operation is sought after the connection is lost: the keeper starts the next supervisor
/// well within it.
const OUTCOME_PATIENCE: Duration = Duration::from_secs(10);
/// How long an upgrade may take from one answer to the next: looking at the program and its trial have 5 s each.
const UPGRADE_PATIENCE: Duration = Duration::from_secs(30);
/// A connection that lasted so long was to a supervisor that worked.
const STEADY: Duration = Duration::from_secs(2);
/// How often a change is asked for of supervisors that die before they have begun it.
const ATTEMPTS: u32 = 3;
/// How long the daemon may take to end after it has said that everything is stopped.
const END_PATIENCE: Duration = Duration::from_secs(5);
/// Between two looks at something that cannot be waited for.
const LOOK_EVERY: Duration = Duration::from_millis(3);
/// Of the daemon's log, what an error shows.
const TAIL_BYTES: u64 = 4096;
const TAIL_LINES: usize = 8;

/// Of the caller's environment, what the daemon gets. Apps get theirs with each `start`; what is left over from the
/// shell that happened to start the daemon (or from an app, when that called `pm`) would only mislead.
const DAEMON_ENV: [&str; 13] = [
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "SHELL",
    "LANG",
    "LC_ALL",
    "TZ",
    "TMPDIR",
    "PM_LOG",
    "PM_CGROUP_ROOT",
    "RUST_BACKTRACE",
    "XDG_RUNTIME_DIR",
];

/// A conversation with the daemon of a home.
#[derive(Debug)]
pub struct Session {
    home: Home,
    connection: Connection,
    /// The daemon's uid.
    server: u32,
}

/// How an operation ended.
#[derive(Debug)]
pub enum Outcome {
    /// The daemon said so.
    Done(OperationView),
    /// It goes on without us.
    Accepted,
}

impl Session {
    /// Connects to the daemon, if there is one.
    ///
    /// # Errors
    /// It is there, but not for us, or does not accept.
    pub fn open(home: &Home) -> Result<Option<Self>, CliError> {
        let failed = |source| CliError::connecting(home, source);
        let address = match home.sock_address() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            address => address.map_err(failed)?,
        };
        match Connection::open(address.as_path()) {
            Ok(connection) => {
                let server = connection.server_uid().map_err(failed)?;
                // Whoever put a socket there could make us believe anything.
                if !peer::may_be_believed(server) {
                    return Err(CliError::NotYours { home: home.dir().to_owned(), owner: user_name(server) });
                }
                Ok(Some(Self { home: home.clone(), connection, server }))
            }
            Err(error) => match error.kind() {
                // No directory: a file is in the way of the home, which making the home complains about.
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::NotADirectory => {
                    Ok(None)
                }
                _ => Err(failed(error)),
            },
        }
    }

    /// Connects to the daemon, and starts one where there is none.
    ///
    /// # Errors
    /// As [`Self::open`]; the home cannot be made; the daemon did not start, with its last words.
    pub fn open_or_start(home: &Home, program: &Path) -> Result<Self, CliError> {
        if let Some(session) = Self::open(home)? {
            return Ok(session);
        }
        home.create()?;
        let deadline = Instant::now() + START_PATIENCE;
        let mut lock = open_lock(home)?;
        loop {
            match Flock::lock(lock, FlockArg::LockExclusiveNonblock) {
                Ok(held) => {
                    // Whoever held the lock before may have started it.
                    if let Some(session) = Self::open(home)? {
                        return Ok(session);
                    }
                    let session = start(home, program, deadline);
                    drop(held);
                    return session;
                }
                Err((unlocked, Errno::EWOULDBLOCK)) => lock = unlocked,
                Err((_, errno)) => {
                    return Err(CliError::HomeFile { path: home.start_lock(), source: errno.into() });
                }
            }
            if let Some(session) = Self::open(home)? {
                return Ok(session);
            }
            if Instant::now() >= deadline {
                return Err(no_socket(home, 0));
            }
            pause(LOOK_EVERY);
        }
    }

    /// Asks for an upgrade, and the supervisor after it how that ended.
    ///
    /// # Errors
    /// As [`Self::ask`]; the outcome could not be learnt.
    pub fn upgrade(&mut self, request: &Request) -> Result<UpgradeView, CliError> {
        let op = new_op();
        let mut ended = self.connection.call(op, request.clone(), |_| Listen::On);
        let mut attempts = 1;
        let mut deadline = Instant::now() + UPGRADE_PATIENCE;
        loop {
            match ended {
                Ok(Ended::Answer(answer)) => match *answer {
                    Answer::Upgrade(view) => return Ok(view),
                    // The supervisor that looked at the program has died.
                    Answer::NeverBegun if attempts < ATTEMPTS => {
                        attempts += 1;
                        deadline = Instant::now() + UPGRADE_PATIENCE;
                        ended = self.connection.call(op, request.clone(), |_| Listen::On);
                        continue;
                    }
                    Answer::NeverBegun => return Err(self.lost()),
                    _ => return Err(CliError::WrongAnswer),
                },
                Ok(Ended::Refused(refused)) => return Err(CliError::Refused(refused)),
                Ok(Ended::Left) => return Err(CliError::WrongAnswer),
                // Silent: the new supervisor is on trial, and may never answer.
                Err(CodecError::Closed | CodecError::Silent) => self.reconnect(deadline)?,
                Err(error) => return Err(self.failed(error)),
            }
            ended = self.connection.call(new_op(), Request::UpgradeOutcome { op }, |_| Listen::On);
        }
    }

    /// Passes on what a config file says of the whole daemon.
    ///
    /// # Errors
    /// As [`Self::ask`].
    pub fn apply_settings(&mut self, settings: FileSettings) -> Result<(), CliError> {
        for request in settings.requests() {
            self.ask(|| request.clone())?;
        }
        Ok(())
    }

    /// Asks for something that may be asked twice, once more where the supervisor is replaced meanwhile.
    ///
    /// # Errors
    /// The daemon's refusal, or it cannot be reached.
    pub fn ask(&mut self, request: impl Fn() -> Request) -> Result<Answer, CliError> {
        self.keep_shell(&request())?;
        let deadline = Instant::now() + OUTCOME_PATIENCE;
        loop {
            match self.connection.call(new_op(), request(), |_| Listen::On) {
                Ok(Ended::Answer(answer)) => return Ok(*answer),
                Ok(Ended::Refused(refused)) => return Err(CliError::Refused(refused)),
                Ok(Ended::Left) => return Err(CliError::WrongAnswer),
                Err(CodecError::Closed) => self.reconnect(deadline)?,
                Err(error) => return Err(self.failed(error)),
            }
        }
    }

    /// Asks for JSON that passes through, and hands it over.
    ///
    /// # Errors
    /// As [`Self::ask`], and whatever `with` fails with.
    pub fn ask_raw<T>(
        &mut self,
        request: impl Fn() -> Request,
        with: impl FnOnce(&[u8]) -> Result<T, CliError>,
    ) -> Result<T, CliError> {
        let deadline = Instant::now() + OUTCOME_PATIENCE;
        loop {
            match self.connection.call_raw(new_op(), request()) {
                Ok(Ok(raw)) => return with(raw),
                Ok(Err(refused)) => return Err(CliError::Refused(refused)),
                Err(CodecError::Closed) => {}
                Err(error) => return Err(self.failed(error)),
            }
            self.reconnect(deadline)?;
        }
    }

    /// Asks for a change, passing on its steps. When the connection is lost in the middle, the next supervisor is
    /// asked how it ended.
    ///
    /// # Errors
    /// As [`Self::ask`]; the outcome could not be learnt.
    pub fn operate(
        &mut self,
        request: Request,
        mut hear: impl FnMut(Heard) -> Listen,
    ) -> Result<Outcome, CliError> {
        self.keep_shell(&request)?;
        let mut op = new_op();
        let mut again = again(&request);
        let mut kept = request.clone();
        let mut done: Option<OperationView> = None;
        let mut attempts = 1;
        let mut asked = clock::now();
        let mut ended = self.connection.call(op, request, &mut hear);
        let mut deadline = None;
        let mut connected = Instant::now();
        loop {
            match ended {
                Ok(Ended::Answer(answer)) => {
                    match *answer {
                        Answer::Operation(view) => {
                            let view = match done.take() {
                                Some(before) => completed(before, view),
                                None => view,
                            };
                            match rest(&kept, &view) {
                                // Of a reload of many apps the supervisor before this one had not come to all.
                                Some(request) if attempts < ATTEMPTS => {
                                    attempts += 1;
                                    deadline = None;
                                    (op, kept, done) = (new_op(), request, Some(view));
                                    asked = clock::now();
                                    ended = self.connection.call(op, kept.clone(), &mut hear);
                                    continue;
                                }
                                Some(_) | None => return Ok(Outcome::Done(view)),
                            }
                        }
                        // The supervisor before this one died before it had read the request. A request that each of
                        // them dies of is not to be theirs for ever.
                        Answer::NeverBegun if attempts < ATTEMPTS => {
                            attempts += 1;
                            deadline = None;
                            asked = clock::now();
                            ended = self.connection.call(op, kept.clone(), &mut hear);
                            continue;
                        }
                        Answer::NeverBegun => return Err(self.lost()),
                        _ => return Err(CliError::WrongAnswer),
                    }
                }
                Ok(Ended::Refused(refused)) if deadline.is_some() => match again.take() {
                    Some(request) => {
                        ended = self.connection.call(new_op(), request, &mut hear);
                        deadline = None;
                        continue;
                    }
                    None => return Err(self.unknown(&refused)),
                },
                // What is left of it cannot be done any more; the rest has been.
                Ok(Ended::Refused(refused)) => match done {
                    Some(view) => return Ok(Outcome::Done(view)),
                    None => return Err(CliError::Refused(refused)),
                },
                Ok(Ended::Left) => {
                    // On this connection the next answer would come after the operation's.
                    self.reconnect(Instant::now() + OUTCOME_PATIENCE)?;
                    return Ok(Outcome::Accepted);
                }
                Err(CodecError::Closed) => {}
                // The supervisor that was to follow does not take over (`upgrade`), and the one before it comes back.
                Err(CodecError::Silent) if deadline.is_some() => {}
                Err(error) => return Err(self.failed(error)),
            }
            let now = Instant::now();
            // Each supervisor that has lived for a while is worth waiting for its successor; a long operation may outlive
            // several.
            if now.duration_since(connected) >= STEADY {
                deadline = None;
            }
            let deadline = *deadline.get_or_insert(now + OUTCOME_PATIENCE);
            self.reconnect(deadline)?;
            connected = Instant::now();
            ended = self.outcome(op, asked, &mut hear);
        }
    }

    /// Root may command everybody's daemon, but its environment goes to no other user.
    fn keep_shell(&self, request: &Request) -> Result<(), CliError> {
        let carries_shell = match request {
            Request::Start { shell, .. }
            | Request::Apply { shell, .. }
            | Request::PlanReload { shell, .. } => !shell.is_empty(),
            Request::Act { shell, .. } => shell.is_some(),
            _ => false,
        };
        if !carries_shell || self.server == peer::own_uid() {
            return Ok(());
        }
        Err(CliError::NotYours { home: self.home.dir().to_owned(), owner: user_name(self.server) })
    }

    /// Waits until nobody listens any more, so that `pm kill && pm start` starts anew.
    pub fn wait_for_end(self) {
        let deadline = Instant::now() + END_PATIENCE;
        let Self { home, connection, .. } = self;
        drop(connection);
        while Instant::now() < deadline && matches!(Self::open(&home), Ok(Some(_))) {
            pause(LOOK_EVERY);
        }
    }

    fn outcome(
        &mut self,
        op: OpId,
        asked: Moment,
        hear: &mut impl FnMut(Heard) -> Listen,
    ) -> Result<Ended, CodecError> {
        self.connection.call(new_op(), Request::Outcome { op, asked: Some(asked) }, hear)
    }

    fn reconnect(&mut self, deadline: Instant) -> Result<(), CliError> {
        loop {
            pause(LOOK_EVERY);
            match Self::open(&self.home) {
                // Also bounds a server that accepts and closes.
                Ok(Some(session)) if Instant::now() < deadline => {
                    self.connection = session.connection;
                    return Ok(());
                }
                Ok(Some(_)) => {}
                // Between two daemons there is no socket, or one that nobody accepts from.
                Ok(None) | Err(CliError::NotResponding { .. }) => {}
                Err(error) => return Err(error),
            }
            if Instant::now() >= deadline {
                return Err(self.lost());
            }
        }
    }

    fn failed(&self, error: CodecError) -> CliError {
        match error {
            CodecError::Silent => CliError::NotResponding { home: self.home.dir().to_owned() },
            source => CliError::Protocol { source },
        }
    }

    fn lost(&self) -> CliError {
        CliError::Lost { home: self.home.dir().to_owned() }
    }

    /// The next supervisor does not know the operation: it had not been accepted, or ended before the answer.
    fn unknown(&self, refused: &Refused) -> CliError {
        if refused.code == super::error::code::INTERNAL {
            CliError::Refused(refused.clone())
        } else {
            self.lost()
        }
    }
}

/// The request once more, where doing it twice is the same as doing it once: the next supervisor does not know the
/// operation, so the one before it ended early in it.
fn again(request: &Request) -> Option<Request> {
    match request {
        Request::Kill => Some(Request::Kill),
        Request::Act { verb: Verb::Stop, targets, .. } => Some(Request::Act {
            verb: Verb::Stop,
            targets: targets.clone(),
            specs: Vec::new(),
            shell: None,
            update_env: false,
        }),
        _ => None,
    }
}

/// The request for those apps that nobody has begun with.
fn rest(request: &Request, view: &OperationView) -> Option<Request> {
    let Request::Act { verb: Verb::Reload, targets, specs, shell, update_env } = request else { return None };
    // A single instance cannot be asked for by the name of its app.
    if targets.iter().any(|target| target.parse::<u32>().is_ok()) {
        return None;
    }
    let left: Vec<&AppName> =
        view.apps.iter().filter(|app| app.result == NOT_BEGUN).map(|app| &app.app).collect();
    (!left.is_empty()).then(|| Request::Act {
        verb: Verb::Reload,
        targets: left.iter().map(ToString::to_string).collect(),
        specs: specs.iter().filter(|spec| left.contains(&&spec.name)).cloned().collect(),
        shell: shell.clone(),
        update_env: *update_env,
    })
}

/// What became of all apps, when those that nobody had begun with were asked for once more.
fn completed(before: OperationView, later: OperationView) -> OperationView {
    let mut later: BTreeMap<AppName, AppResult> =
        later.apps.into_iter().map(|result| (result.app.clone(), result)).collect();
    let apps: Vec<AppResult> =
        before
            .apps
            .into_iter()
            .map(|result| {
                if result.result == NOT_BEGUN { later.remove(&result.app).unwrap_or(result) } else { result }
            })
            .collect();
    OperationView { ok: apps.iter().all(|app| app.ok), apps }
}

/// Waits a moment. For conditions of other processes that send no news; every loop around it has a deadline.
pub(super) fn pause(span: Duration) {
    let timeout = PollTimeout::try_from(span).unwrap_or(PollTimeout::ZERO);
    // A signal ends the pause early, which does no harm.
    let _ = poll(&mut [], timeout);
}

fn open_lock(home: &Home) -> Result<File, CliError> {
    let path = home.start_lock();
    OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .custom_flags(OFlag::O_NOFOLLOW.bits())
        .open(&path)
        .map_err(|source| CliError::HomeFile { path, source })
}

/// Starts the daemon and waits for its socket. The caller holds the start lock.
fn start(home: &Home, program: &Path, deadline: Instant) -> Result<Session, CliError> {
    let log = home.log_file();
    let log_start = fs::metadata(&log).map_or(0, |meta| meta.len());
    let mut child = spawn(home, program)?;
    loop {
        if let Some(session) = Session::open(home)? {
            return Ok(session);
        }
        match child.try_wait() {
            Ok(None) => {}
            // 5: another daemon holds the lock, on its way up or on its way down. If it is ending, ours may follow.
            Ok(Some(status)) if status.code() == Some(i32::from(super::error::code::BUSY)) => {
                if Instant::now() < deadline {
                    pause(Duration::from_millis(20));
                    if let Some(session) = Session::open(home)? {
                        return Ok(session);
                    }
                    child = spawn(home, program)?;
                } else {
                    return Err(no_socket(home, log_start));
                }
            }
            Ok(Some(status)) => {
                let cause = match status.code() {
                    Some(code) => format!("it exited with code {code}"),
                    None => format!("it ended by {status}"),
                };
                return Err(CliError::DaemonDied { cause, lines: tail(&log, log_start), log });
            }
            Err(source) => return Err(CliError::Spawn { program: program.to_owned(), source }),
        }
        if Instant::now() >= deadline {
            return Err(no_socket(home, log_start));
        }
        pause(LOOK_EVERY);
    }
}

/// The daemon leaves our session by itself (`--detached`), before it does anything else.
fn spawn(home: &Home, program: &Path) -> Result<Child, CliError> {
    let log = |path: &PathBuf| {
        OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .custom_flags(OFlag::O_NOFOLLOW.bits())
            .open(path)
    };
    let path = home.log_file();
    let file = log(&path).map_err(|source| CliError::HomeFile { path: path.clone(), source })?;
    let twin = file.try_clone().map_err(|source| CliError::HomeFile { path, source })?;
    Command::new(program)
        .arg("daemon")
        .arg("--home")
        .arg(home.dir())
        .arg("--detached")
        .env_clear()
        .envs(DAEMON_ENV.iter().filter_map(|name| Some((name, std::env::var_os(name)?))))
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(file)
        .stderr(twin)
        .spawn()
        .map_err(|source| CliError::Spawn { program: program.to_owned(), source })
}

fn no_socket(home: &Home, log_start: u64) -> CliError {
    let log = home.log_file();
    let cause = format!("it did not open its socket within {} s", START_PATIENCE.as_secs());
    CliError::DaemonDied { cause, lines: tail(&log, log_start), log }
}

/// The last lines of what was written to the log since `from`.
fn tail(log: &Path, from: u64) -> Vec<String> {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(log)?;
        let end = file.metadata()?.len();
        // A log that has been rotated meanwhile is shorter than it was.
        let from = if from <= end { from } else { 0 };
        file.seek(SeekFrom::Start(from.max(end.saturating_sub(TAIL_BYTES))))?;
        let mut bytes = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    // Without the log, the error says all there is.
    let text = String::from_utf8_lossy(&read().unwrap_or_default()).into_owned();
    let lines: Vec<String> = text.lines().map(str::to_owned).collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].to_vec()
}
