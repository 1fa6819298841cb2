//! Asking systemd, through its own tools.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use super::error::{CliError, code};
use super::unit;
use crate::ipc::protocol::Refused;

/// The directory that systemd, and nobody else, makes at boot (sd_booted(3)).
const BOOTED: &str = "/run/systemd/system";

/// Which instance of systemd is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Instance {
    /// The machine's.
    System,
    /// The caller's own.
    User,
}

/// Whether systemd runs this machine.
#[must_use]
pub fn is_booted() -> bool {
    std::fs::metadata(BOOTED).is_ok_and(|meta| meta.is_dir())
}

/// Systemd's version; `None` where its tools are not installed.
#[must_use]
pub fn version() -> Option<u32> {
    let output = Command::new("systemctl").arg("--version").stdin(Stdio::null()).output().ok()?;
    unit::version_in(&String::from_utf8_lossy(&output.stdout))
}

impl Instance {
    fn systemctl(self) -> Command {
        let mut command = Command::new("systemctl");
        command.stdin(Stdio::null()).env("SYSTEMD_PAGER", "").env("SYSTEMD_COLORS", "0");
        if self == Self::User {
            command.arg("--user");
            // A shell that was not logged in to (su, sudo) lacks the way to the user's systemd.
            let dir = user_runtime_dir();
            if std::env::var_os("XDG_RUNTIME_DIR").is_none() && dir.is_dir() {
                command.env("XDG_RUNTIME_DIR", dir);
            }
        }
        command
    }

    /// Runs `systemctl` with these words, which must succeed.
    ///
    /// # Errors
    /// With what it complained about.
    pub fn run(self, words: &[&str]) -> Result<(), CliError> {
        let output =
            self.systemctl().args(words).output().map_err(|error| cannot_run("systemctl", &error))?;
        if output.status.success() {
            return Ok(());
        }
        Err(refused(&format!("`{}` failed", self.line(words)), &said(&output), None))
    }

    /// What `systemctl` prints for these words; `None` when it fails.
    #[must_use]
    pub fn ask(self, words: &[&str]) -> Option<String> {
        let output = self.systemctl().args(words).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// A property of a unit, as `systemctl show` has it; empty where there is none.
    #[must_use]
    pub fn property(self, unit: &str, name: &str) -> String {
        self.ask(&["show", "--property", name, "--value", unit]).unwrap_or_default()
    }

    /// The job that is carried out for this unit; `None` when there is none, or nobody answers.
    #[must_use]
    pub fn job(self, unit: &str) -> Option<String> {
        let jobs = self.ask(&["list-jobs", "--no-legend", "--no-pager", "--full"])?;
        unit::job_of(unit, &jobs).map(str::to_owned)
    }

    /// The words as a person would type them.
    #[must_use]
    pub fn line(self, words: &[&str]) -> String {
        let user = if self == Self::User { "--user " } else { "" };
        format!("systemctl {user}{}", words.join(" "))
    }

    /// Where units that the administrator, or the user, has written lie.
    ///
    /// # Errors
    /// The user has no home.
    pub fn unit_dir(self) -> Result<PathBuf, CliError> {
        if self == Self::System {
            return Ok("/etc/systemd/system".into());
        }
        if let Some(dir) = std::env::var_os("XDG_CONFIG_HOME").filter(|dir| Path::new(dir).is_absolute()) {
            return Ok(Path::new(&dir).join("systemd/user"));
        }
        let user = nix::unistd::User::from_uid(nix::unistd::Uid::effective()).ok().flatten();
        let user = user.ok_or_else(|| refused("you have no entry in the password database", "", None))?;
        Ok(user.dir.join(".config/systemd/user"))
    }

    /// Where units lie that are gone after a reboot.
    #[must_use]
    pub fn runtime_unit_dir(self) -> PathBuf {
        match self {
            Self::System => "/run/systemd/system".into(),
            Self::User => {
                let dir = std::env::var_os("XDG_RUNTIME_DIR").map_or_else(user_runtime_dir, PathBuf::from);
                dir.join("systemd/user")
            }
        }
    }
}

fn user_runtime_dir() -> PathBuf {
    PathBuf::from(format!("/run/user/{}", nix::unistd::Uid::effective()))
}

/// Lets `systemd-analyze` read a unit file; what it has against it.
#[must_use]
pub fn complaints(instance: Instance, file: &Path) -> Option<String> {
    let mut command = Command::new("systemd-analyze");
    if instance == Instance::User {
        command.arg("--user");
    }
    // Not everywhere there is one, and then systemd itself reads the file soon enough.
    let output = command.args(["verify", "--man=no"]).arg(file).stdin(Stdio::null()).output().ok()?;
    let text = said(&output);
    // It also reads the units ours refers to; what is wrong with those is not for us to say.
    let name = file.file_name().and_then(OsStr::to_str).unwrap_or_default();
    let ours: Vec<&str> = text.lines().filter(|line| line.contains(name)).collect();
    (!ours.is_empty()).then(|| ours.join("\n"))
}

/// Runs another tool, which must succeed.
///
/// # Errors
/// With what it complained about.
pub fn tool(program: &str, words: &[&str]) -> Result<(), CliError> {
    let output = Command::new(program)
        .args(words)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| cannot_run(program, &error))?;
    if output.status.success() {
        return Ok(());
    }
    Err(refused(&format!("`{program} {}` failed", words.join(" ")), &said(&output), None))
}

fn said(output: &Output) -> String {
    let text = [output.stderr.as_slice(), &output.stdout].concat();
    String::from_utf8_lossy(&text).trim().to_owned()
}

fn cannot_run(program: &str, error: &io::Error) -> CliError {
    refused(&format!("cannot run `{program}`"), &error.to_string(), None)
}

/// "It failed", in the form of all errors.
#[must_use]
pub fn refused(message: &str, cause: &str, hint: Option<String>) -> CliError {
    CliError::Refused(Refused {
        code: code::FAILED,
        message: message.to_owned(),
        cause: (!cause.is_empty()).then(|| cause.to_owned()),
        hint,
    })
}
