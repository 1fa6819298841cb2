//! Everything that can end a command early: text, cause, hint and exit code in one place.

use std::io;
use std::path::{Path, PathBuf};

use crate::config::words::quote;
use crate::ipc::codec::CodecError;
use crate::ipc::protocol::{Failure, Refused};
use crate::store::container::NoPlace;
use crate::store::paths::{Home, HomeError, user_name};

use super::output::Terminal;
use super::silent;

/// Exit codes (design: command line).
pub mod code {
    /// Done, or already so.
    pub const DONE: u8 = 0;
    /// It failed.
    pub const FAILED: u8 = 1;
    /// Wrong usage or config.
    pub const USAGE: u8 = 2;
    /// No such app.
    pub const NO_SUCH_APP: u8 = 3;
    /// The daemon is not reachable or does not answer.
    pub const NO_DAEMON: u8 = 4;
    /// Refused because something else is going on.
    pub const BUSY: u8 = 5;
    /// `--check` found something that would change.
    pub const CHANGES: u8 = 6;
    /// A bug.
    pub const INTERNAL: u8 = 70;
}

/// Why a command did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The command line or what it names makes no sense.
    #[error("{message}")]
    Usage {
        /// What is wrong.
        message: String,
        /// Why.
        cause: Option<String>,
        /// What would work.
        hint: Option<String>,
    },
    /// A config file, or an app described on the command line, has problems; each already worded with its place.
    #[error("{summary}")]
    Config {
        /// What could not be done because of them.
        summary: String,
        /// One text per problem, of one or more lines.
        problems: Vec<String>,
    },
    /// There is no daemon, so there is no such app.
    #[error("there is no app `{target}`")]
    NoSuchApp {
        /// What was asked for.
        target: String,
    },
    /// There is no home, or it cannot be made.
    #[error("cannot use the home directory")]
    Home {
        /// Why.
        source: HomeError,
    },
    /// Nothing can be written to, so there is no place for a home.
    #[error("cannot make a home directory for this run")]
    NoPlace {
        /// What was tried.
        source: NoPlace,
    },
    /// A file of the home cannot be used.
    #[error("cannot open {path:?}")]
    HomeFile {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Nobody listens.
    #[error("no daemon is running in {home:?}")]
    NoDaemon {
        /// The home.
        home: PathBuf,
    },
    /// The socket is there and the caller may not use it.
    #[error("the daemon in {home:?} belongs to {owner}")]
    NotYours {
        /// The home.
        home: PathBuf,
        /// Who owns it.
        owner: String,
    },
    /// The socket is there and connecting fails.
    #[error("cannot connect to {path:?}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The daemon is there and says nothing.
    #[error("the daemon is not responding")]
    NotResponding {
        /// The home.
        home: PathBuf,
    },
    /// The daemon was started and did not open its socket.
    #[error("the daemon did not start")]
    DaemonDied {
        /// "it exited with code 1", "it did not open its socket within 10 s".
        cause: String,
        /// The last lines it wrote.
        lines: Vec<String>,
        /// Where the rest is.
        log: PathBuf,
    },
    /// The program to start the daemon with cannot be run.
    #[error("cannot start {program:?} as the daemon")]
    Spawn {
        /// The program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The connection was lost, and the outcome could not be learnt.
    #[error("the connection to the daemon was lost; whether it was done is not known")]
    Lost {
        /// The home.
        home: PathBuf,
    },
    /// The daemon talks in a way this client does not understand.
    #[error("cannot understand the daemon")]
    Protocol {
        /// What it said.
        source: CodecError,
    },
    /// The daemon said no.
    #[error("{}", .0.message)]
    Refused(Refused),
    /// An operation ended, and not everything is as asked.
    #[error("{}", one_of_them(.0))]
    Failed(Vec<FailedApp>),
    /// An answer that does not belong to the question.
    #[error("unexpected answer from the daemon")]
    WrongAnswer,
    /// Standard output is closed: the reader has seen enough.
    #[error("nobody reads the output")]
    BrokenPipe,
    /// Standard output cannot be written.
    #[error("cannot write the output")]
    Output {
        /// Why.
        source: io::Error,
    },
    /// A file of the caller cannot be read or written.
    #[error("cannot {what} {path:?}")]
    File {
        /// "read", "write".
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The error has been printed already (as JSON); only the code is left.
    #[error("failed")]
    Reported(u8),
}

/// What went wrong with one app of an operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FailedApp {
    /// "cannot reload `api`".
    pub message: String,
    /// What is known about it.
    pub failure: Failure,
}

fn one_of_them(apps: &[FailedApp]) -> &str {
    apps.first().map_or("it failed", |app| &app.message)
}

impl From<io::Error> for CliError {
    /// Errors of standard output; every file names its path in a variant of its own.
    fn from(source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::BrokenPipe => Self::BrokenPipe,
            _ => Self::Output { source },
        }
    }
}

impl From<NoPlace> for CliError {
    fn from(source: NoPlace) -> Self {
        Self::NoPlace { source }
    }
}

impl From<HomeError> for CliError {
    fn from(source: HomeError) -> Self {
        Self::Home { source }
    }
}

impl CliError {
    /// The process's exit code.
    #[must_use]
    pub fn code(&self) -> u8 {
        match self {
            // A closed pipe is how `pm logs | head` ends.
            Self::BrokenPipe => code::DONE,
            Self::Usage { .. } | Self::Config { .. } | Self::Home { .. } | Self::HomeFile { .. } => {
                code::USAGE
            }
            Self::File { .. } | Self::NoPlace { .. } => code::USAGE,
            Self::NoSuchApp { .. } => code::NO_SUCH_APP,
            Self::NoDaemon { .. }
            | Self::NotYours { .. }
            | Self::Connect { .. }
            | Self::NotResponding { .. }
            | Self::DaemonDied { .. }
            | Self::Spawn { .. } => code::NO_DAEMON,
            Self::Lost { .. } | Self::Failed(_) | Self::Output { .. } => code::FAILED,
            Self::Refused(refused) => refused.code,
            Self::Protocol { .. } | Self::WrongAnswer => code::INTERNAL,
            Self::Reported(code) => *code,
        }
    }

    /// Why, where the text alone does not say.
    #[must_use]
    pub fn cause(&self) -> Option<String> {
        match self {
            Self::Usage { cause, .. } => cause.clone(),
            Self::Home { source } => Some(chain(source)),
            Self::NoPlace { source } => Some(source.to_string()),
            Self::HomeFile { source, .. }
            | Self::Connect { source, .. }
            | Self::Spawn { source, .. }
            | Self::Output { source }
            | Self::File { source, .. } => Some(plain(source)),
            Self::Protocol { source } => Some(chain(source)),
            Self::DaemonDied { cause, .. } => Some(cause.clone()),
            Self::Refused(refused) => refused.cause.clone(),
            Self::NotResponding { home } => Some(
                silent::why(home).map_or_else(|| "it said nothing for 4 seconds".to_owned(), |why| why.0),
            ),
            _ => None,
        }
    }

    /// What would work.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Usage { hint, .. } => hint.clone(),
            Self::Refused(refused) => refused.hint.clone(),
            Self::NoSuchApp { .. } => {
                Some("No daemon is running, so the list is empty. See `pm start --help`.".to_owned())
            }
            Self::NoDaemon { .. } => {
                Some("`pm start FILE` starts the daemon, `pm resurrect` also the saved list.".to_owned())
            }
            Self::NotYours { owner, home } => Some(format!(
                "It is {owner}'s: run `sudo -u {owner} {}`, or use a home of your own with --home.",
                command_for(home)
            )),
            Self::NotResponding { home } => Some(silent::why(home).map_or_else(
                || {
                    let log = home.join("pm.log");
                    format!("It may be stopped or overloaded: see `ps -o pid,stat,args -C pm` and {log:?}.")
                },
                |why| why.1,
            )),
            Self::DaemonDied { log, .. } => {
                Some(format!("`pm daemon` runs it in the foreground; its log is {log:?}."))
            }
            Self::Home { source: HomeError::Owner { owner, .. } } => Some(format!(
                "Run `sudo -u {owner} pm ...`, or name a directory of your own with --home or PM_HOME."
            )),
            Self::Home { .. } | Self::HomeFile { .. } => Some(format!(
                "You are {}. Name a directory you can write with --home or PM_HOME.",
                user_name(nix::unistd::geteuid().as_raw())
            )),
            Self::NoPlace { .. } => Some(
                "Give the container some memory to write to (`docker run --tmpfs /run`, a Kubernetes emptyDir with \
                 `medium: Memory`), or name a directory with --home or PM_HOME."
                    .to_owned(),
            ),
            Self::Lost { .. } => Some("See `pm list`.".to_owned()),
            Self::Protocol { .. } | Self::WrongAnswer => Some(
                "`pm` and its daemon may be of different versions; compare `pm --version` and `pm ping`."
                    .to_owned(),
            ),
            _ => None,
        }
    }

    /// Prints it on standard error. Errors of standard error itself are ignored: there is nowhere left to say so.
    pub fn print(&self, terminal: &mut Terminal) {
        let _ = match self {
            Self::BrokenPipe | Self::Reported(_) => Ok(()),
            Self::Failed(apps) => apps.iter().try_for_each(|app| print_failed(app, terminal)),
            _ => self.print_one(terminal),
        };
        let _ = terminal.flush();
    }

    fn print_one(&self, terminal: &mut Terminal) -> io::Result<()> {
        terminal.error_line("error:", &self.to_string())?;
        if let Some(cause) = self.cause() {
            terminal.complain(&format!("  cause: {}", indented(&cause)))?;
        }
        match self {
            Self::Config { problems, .. } => {
                for problem in problems {
                    terminal.complain(&format!("  {}", problem.replace('\n', "\n  ")))?;
                }
            }
            Self::DaemonDied { lines, .. } => print_lines(lines, terminal)?,
            _ => {}
        }
        if let Some(hint) = self.hint() {
            terminal.hint_line(&hint)?;
        }
        Ok(())
    }

    /// A failure to reach a daemon, in words: the home, its owner, and what is wrong with it.
    #[must_use]
    pub fn connecting(home: &Home, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::TimedOut => Self::NotResponding { home: home.dir().to_owned() },
            io::ErrorKind::PermissionDenied => {
                Self::NotYours { home: home.dir().to_owned(), owner: owner_of(home) }
            }
            _ => Self::Connect { path: home.sock(), source },
        }
    }
}

/// This very command, with the home named: sudo drops PM_HOME, and another user's default is another directory.
fn command_for(home: &Path) -> String {
    let mut words = vec!["pm".to_owned(), "--home".to_owned(), quote(&home.display().to_string())];
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        if arg == "--home" {
            args.next();
        } else if !arg.starts_with("--home=") {
            words.push(quote(&arg));
        }
    }
    words.join(" ")
}

fn owner_of(home: &Home) -> String {
    use std::os::unix::fs::MetadataExt;
    // The socket itself lies behind a directory that the caller may not search.
    let meta = std::fs::metadata(home.sock()).or_else(|_| std::fs::metadata(home.dir()));
    meta.map_or_else(|_| "another user".to_owned(), |meta| user_name(meta.uid()))
}

fn print_failed(app: &FailedApp, terminal: &mut Terminal) -> io::Result<()> {
    terminal.error_line("error:", &app.message)?;
    terminal.complain(&format!("  cause: {}", indented(&app.failure.cause)))?;
    print_lines(&app.failure.last_lines, terminal)?;
    match &app.failure.hint {
        Some(hint) => terminal.hint_line(hint),
        None => Ok(()),
    }
}

fn print_lines(lines: &[String], terminal: &mut Terminal) -> io::Result<()> {
    if lines.is_empty() {
        return Ok(());
    }
    terminal.complain("  last lines:")?;
    lines.iter().try_for_each(|line| terminal.complain(&format!("    {line}")))
}

fn indented(text: &str) -> String {
    text.replace('\n', "\n         ")
}

/// An error and its sources on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text.push_str(": ");
        text.push_str(&match source.downcast_ref::<io::Error>() {
            Some(source) => plain(source),
            None => source.to_string(),
        });
        next = source.source();
    }
    text
}

/// The system's words without "(os error 13)", in lower case as all fragments.
fn plain(error: &io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    let mut chars = text.chars();
    match chars.next() {
        Some(first) => first.to_lowercase().chain(chars).collect(),
        None => String::new(),
    }
}
