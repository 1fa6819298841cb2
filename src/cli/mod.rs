//! The command line: arguments, commands, output.
//!
//! A command is one synchronous conversation with the supervisor over the home's socket; no runtime, and
//! little work before the first byte is sent. Never acts on a process itself.
//!
//! `main` calls [`parse`] and then either runs the daemon or the supervisor, or [`Client::run`]s the command.

pub mod args;
pub mod commands;
pub mod connect;
pub mod error;
pub mod interrupt;
pub mod output;
pub mod serve;
mod silent;
pub mod specs;
pub mod systemctl;
pub mod unit;

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use jiff::tz::TimeZone;

use self::args::{Cli, Command, Global};
use self::connect::Session;
use self::error::{CliError, code};
use self::output::Terminal;
use crate::store::container;
use crate::store::paths::Home;

/// What the process is to be.
#[derive(Debug)]
pub enum Invocation {
    /// `pm daemon`: the keeper.
    Daemon {
        /// Its home.
        home: Home,
        /// A command has started it, and nobody watches over it.
        detached: bool,
        /// Descriptors that another program has left for it.
        left: Left,
    },
    /// `pm supervisor`, with the arguments that the keeper gave.
    Supervisor {
        /// Passed on unread.
        args: Vec<OsString>,
    },
    /// A command.
    Client(Box<Client>),
    /// Everything is said: help, version, wrong usage.
    Exit(ExitCode),
}

/// Descriptors that another program has left open for the daemon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Left {
    /// What a keeper had that has replaced itself.
    pub resume: Option<i32>,
    /// The home's lock, held.
    pub lock: Option<i32>,
    /// Where a supervisor without a keeper, which has started this one, offers everything.
    pub heir: Option<i32>,
}

/// A command that is to be run.
#[derive(Debug)]
pub struct Client {
    global: Global,
    command: Command,
}

/// What the process was started with, as far as commands care.
#[derive(Clone, Debug, Default)]
pub struct Surroundings {
    /// `PM_HOME`.
    pub pm_home: Option<OsString>,
    /// `PM_SHOW_ENV` is 1, or `--show-env` was given.
    pub show_env: bool,
    /// Starts the daemon; this executable.
    pub program: PathBuf,
    /// The time zone of dates; `None`: the system's.
    pub zone: Option<TimeZone>,
}

impl Surroundings {
    /// Those of this process.
    #[must_use]
    pub fn of_process() -> Self {
        Self {
            pm_home: std::env::var_os("PM_HOME"),
            show_env: std::env::var_os("PM_SHOW_ENV").is_some_and(|value| value == "1"),
            // Without /proc there is no pm either; the error then names an empty program.
            program: std::env::current_exe().unwrap_or_default(),
            zone: None,
        }
    }
}

/// Reads the arguments, the program's own name first. Prints help and usage errors itself.
///
/// The keeper and the supervisor stay small: their usual forms are recognised without the parser of commands. A
/// daemon that a command has started leaves the caller's session here.
#[must_use]
pub fn parse(args: impl IntoIterator<Item = OsString>, surroundings: &Surroundings) -> Invocation {
    let args: Vec<OsString> = args.into_iter().collect();
    let words: Vec<&OsStr> = args.iter().skip(1).map(OsString::as_os_str).collect();
    match words.as_slice() {
        [first, ..] if *first == "supervisor" => {
            return Invocation::Supervisor { args: args.get(2..).unwrap_or_default().to_vec() };
        }
        [first, option, home, detached]
            if *first == "daemon" && *option == "--home" && *detached == "--detached" =>
        {
            return daemon(Some(Path::new(*home)), true, Left::default(), surroundings);
        }
        [only] if *only == "daemon" => return daemon(None, false, Left::default(), surroundings),
        [first, option, home] if *first == "daemon" && *option == "--home" => {
            return daemon(Some(Path::new(*home)), false, Left::default(), surroundings);
        }
        // As `pm run` becomes it.
        [first, option, home, lock, number]
            if *first == "daemon" && *option == "--home" && *lock == "--lock" =>
        {
            if let Some(number) = number.to_str().and_then(|number| number.parse().ok()) {
                let left = Left { lock: Some(number), ..Left::default() };
                return daemon(Some(Path::new(*home)), false, left, surroundings);
            }
        }
        _ => {}
    }
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(error) => {
            // Help that nobody reads (`pm --help | head`) is no failure.
            let _ = error.print();
            return Invocation::Exit(ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(code::USAGE)));
        }
    };
    match cli.command {
        Command::Daemon(daemon_args) => {
            let left = Left { resume: daemon_args.resume, lock: daemon_args.lock, heir: daemon_args.heir };
            daemon(cli.global.home.as_deref(), daemon_args.detached, left, surroundings)
        }
        Command::Supervisor(supervisor) => Invocation::Supervisor { args: supervisor.args },
        command => Invocation::Client(Box::new(Client { global: cli.global, command })),
    }
}

fn daemon(home: Option<&Path>, detached: bool, left: Left, surroundings: &Surroundings) -> Invocation {
    if detached && left.resume.is_none() {
        // Fails only for a leader of a process group, which a process that a command has just started is not.
        let _ = nix::unistd::setsid();
    }
    match Home::resolve(home, surroundings.pm_home.as_deref()) {
        Ok(home) => Invocation::Daemon { home, detached, left },
        Err(error) => {
            let error = CliError::from(error);
            error.print(&mut Terminal::of_process(false, false));
            Invocation::Exit(ExitCode::from(error.code()))
        }
    }
}

impl Client {
    /// Runs the command on the process's streams.
    #[must_use]
    pub fn run(self, surroundings: Surroundings) -> ExitCode {
        let terminal = Terminal::of_process(self.global.no_color, self.global.silent);
        ExitCode::from(self.run_on(terminal, surroundings))
    }

    /// The home to use, and its lock where it was made for this command.
    fn home(&self, surroundings: &Surroundings) -> Result<(Home, Option<File>), CliError> {
        let (option, pm_home) = (self.global.home.as_deref(), surroundings.pm_home.as_deref());
        let is_named = option.is_some() || pm_home.is_some_and(|dir| !dir.is_empty());
        if matches!(self.command, Command::Run(_)) && !is_named {
            let (home, lock) = container::temporary_home()?;
            return Ok((home, Some(lock)));
        }
        Ok((Home::resolve(option, pm_home)?, None))
    }

    /// Runs the command on any streams; returns the exit code.
    #[must_use]
    pub fn run_on(self, mut terminal: Terminal, mut surroundings: Surroundings) -> u8 {
        let (home, temporary) = match self.home(&surroundings) {
            Ok(home) => home,
            Err(error) => {
                error.print(&mut terminal);
                return error.code();
            }
        };
        surroundings.show_env |= self.global.show_env;
        let mut context =
            Context { home, temporary_home: temporary, terminal, json: self.global.json, surroundings };
        let result = commands::run(self.command, &mut context)
            .and_then(|code| context.terminal.flush().map_err(CliError::from).map(|()| code));
        match result {
            Ok(code) => code,
            Err(error) => {
                if context.json {
                    commands::json_error(&error, &mut context.terminal);
                }
                error.print(&mut context.terminal);
                error.code()
            }
        }
    }
}

/// What every command works with.
#[derive(Debug)]
pub struct Context {
    /// Whose daemon.
    pub home: Home,
    /// The lock of a home that was made for this command.
    pub temporary_home: Option<File>,
    /// Where output goes.
    pub terminal: Terminal,
    /// For programs.
    pub json: bool,
    /// What the process was started with.
    pub surroundings: Surroundings,
}

impl Context {
    /// The daemon, if there is one.
    ///
    /// # Errors
    /// As of [`Session::open`].
    pub fn session(&self) -> Result<Option<Session>, CliError> {
        Session::open(&self.home)
    }

    /// The daemon, started where there is none.
    ///
    /// # Errors
    /// As of [`Session::open_or_start`].
    pub fn session_or_start(&self) -> Result<Session, CliError> {
        Session::open_or_start(&self.home, &self.surroundings.program)
    }
}
