//! `pm run`: a daemon in the foreground, for as long as its apps have something to do; the first process of a container.
//!
//! Reads the config as `start` does, writes down what is to be started, and becomes the daemon: same pid, one keeper,
//! one supervisor, and nothing else.

use std::env;
use std::fs::{self, File, OpenOptions};
use std::io::{self, IsTerminal as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use crate::cli::Context;
use crate::cli::args::Run;
use crate::cli::error::{CliError, code};
use crate::cli::specs::{self, FileSettings, Wishes};
use crate::config::file::DEFAULT_NAME;
use crate::ipc::protocol::Request;
use crate::model::foreground::{Foreground, LineForm, VARIABLE};
use crate::model::spec::AppSpec;
use crate::store::container;
use crate::store::paths::Home;
use crate::sys::fdpass;
use crate::sys::lock::{self, LockError};

/// Returns only when there is nothing to run.
pub(super) fn run(args: &Run, context: &mut Context) -> Result<(), CliError> {
    let lock = context.temporary_home.take();
    let outcome = become_daemon(args, context, lock.as_ref());
    if let Some(lock) = lock {
        // It was made for nothing.
        container::remove(&context.home, &lock);
    }
    outcome
}

/// `made`: the lock of a home that was made for this.
fn become_daemon(args: &Run, context: &mut Context, made: Option<&File>) -> Result<(), CliError> {
    let wishes = Wishes::new(&args.app, &args.file, &args.args)?;
    let Wanted { specs, settings, on_hangup } = described(args, &wishes, context)?;
    let form = match (context.json, args.raw) {
        (true, _) => LineForm::Json,
        (false, true) => LineForm::Raw,
        (false, false) => LineForm::Text,
    };
    let cwd =
        env::current_dir().map_err(|source| CliError::File { what: "find", path: ".".into(), source })?;
    let colors = context.terminal.look().color_out && io::stdout().is_terminal();
    let temporary_home = made.is_some();
    let foreground = Foreground { form, colors, on_hangup, cwd, temporary_home };
    let requests: Vec<Request> =
        settings.requests().chain([Request::Start { specs, shell: specs::shell() }]).collect();
    context.home.create()?;
    let taken;
    let lock = match made {
        Some(lock) => lock,
        None => {
            taken = take_lock(&context.home)?;
            &taken
        }
    };
    prepare(&context.home, &requests)?;
    context.terminal.flush()?;
    let program = &context.surroundings.program;
    // The daemon goes on holding it: in between, somebody else would find a home that nobody has.
    fdpass::set_kept_over_exec(&[lock.as_fd()], true)
        .map_err(|source| CliError::HomeFile { path: context.home.lock(), source })?;
    let source = Command::new(program)
        .arg0("pm")
        .args(["daemon", "--home"])
        .arg(context.home.dir())
        .args(["--lock", &lock.as_raw_fd().to_string()])
        .env(VARIABLE, foreground.to_text())
        .env_remove("PM_HOME")
        .exec();
    Err(CliError::Spawn { program: program.clone(), source })
}

/// What the command line describes.
struct Wanted {
    specs: Vec<AppSpec>,
    /// What the file says of the whole daemon.
    settings: FileSettings,
    /// What SIGHUP does.
    on_hangup: Vec<String>,
}

fn described(args: &Run, wishes: &Wishes, context: &mut Context) -> Result<Wanted, CliError> {
    let target = args.target.as_deref().unwrap_or(DEFAULT_NAME);
    if !specs::is_config(target) {
        let spec = wishes.from_target(target, &mut context.terminal)?;
        let on_hangup = vec!["reload".to_owned(), "all".to_owned()];
        return Ok(Wanted { specs: vec![spec], settings: FileSettings::default(), on_hangup });
    }
    if args.target.is_none() && !Path::new(target).is_file() {
        return Err(CliError::Usage {
            message: format!("there is no {DEFAULT_NAME} here"),
            cause: Some("`pm run` without an argument runs what it says".to_owned()),
            hint: Some("`pm init` writes one; `pm run app.js` runs a script.".to_owned()),
        });
    }
    let file = wishes.from_file(target, "run", &mut context.terminal)?;
    if file.apps.is_empty() {
        return Err(CliError::Usage {
            message: format!("{target} has nothing to run"),
            cause: None,
            hint: Some("`pm check` shows what it would start.".to_owned()),
        });
    }
    let Some(path) = file.path.to_str() else {
        return Err(CliError::Usage {
            message: format!("the path of {target} is not UTF-8"),
            cause: None,
            hint: None,
        });
    };
    let mut on_hangup = vec!["reload".to_owned(), path.to_owned()];
    for (option, value) in [("--only", &args.file.only), ("--env", &args.file.env)] {
        if let Some(value) = value {
            on_hangup.extend([option.to_owned(), value.clone()]);
        }
    }
    Ok(Wanted { specs: file.apps, settings: file.settings, on_hangup })
}

/// Makes sure that nobody else uses a home that was named.
fn take_lock(home: &Home) -> Result<File, CliError> {
    lock::acquire(&home.lock()).map_err(|error| match error {
        LockError::Held { pid, .. } => CliError::Refused(crate::ipc::protocol::Refused {
            code: code::BUSY,
            message: format!("a daemon is running already for {}", home.dir().display()),
            cause: pid.map(|pid| format!("its pid is {pid}")),
            hint: Some(
                "`pm start` gives it apps to run; without --home and PM_HOME `pm run` has a home of its own."
                    .to_owned(),
            ),
        }),
        LockError::Io { path, source } => CliError::HomeFile { path, source },
    })
}

/// Leaves what is to be started in a home that holds nothing else of its past: the file is what counts.
fn prepare(home: &Home, requests: &[Request]) -> Result<(), CliError> {
    let file = |path: &Path| {
        let path = path.to_owned();
        move |source| CliError::HomeFile { path, source }
    };
    for path in [home.state(), home.state_before()] {
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => return Err(file(&path)(source)),
            _ => {}
        }
    }
    let path = home.first();
    let text = serde_json::to_vec(requests).map_err(|error| file(&path)(io::Error::other(error)))?;
    let mut first = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&path)
        .map_err(file(&path))?;
    first.write_all(&text).map_err(file(&path))
}
