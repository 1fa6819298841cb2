//! pm under a real systemd. One machine is booted in private namespaces (`with-systemd`, beside this file), and this
//! program runs every scenario in it, one after the other; each starts without a daemon and leaves none.
//!
//! Where a systemd cannot be booted (no root, no packages, a kernel that forbids it) nothing is tried, and it says why.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a test program with its own main function, which clippy does not take for a test"
)]

mod machine;
mod scenarios;

use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use libtest_mimic::{Arguments, Failed, Trial};

/// with-systemd's "cannot be done here".
const CANNOT: i32 = 77;

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some("inside") {
        return machine::run(scenarios::ALL, std::env::args().nth(2));
    }
    let trial = Trial::test("everything_pm_promises_under_a_real_systemd", boot);
    libtest_mimic::run(&Arguments::from_args(), vec![trial]).exit_code()
}

/// Boots a machine and runs every scenario in it; `PM_SYSTEMD_SCENARIO` names a single one.
fn boot() -> Result<(), Failed> {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR"));
    let wrapper = sources.join("tests/systemd/with-systemd");
    let mut command = Command::new(wrapper);
    command.arg(std::env::current_exe()?).arg("inside").args(std::env::var("PM_SYSTEMD_SCENARIO").ok());
    command.env("TIMEOUT", "300").stdin(Stdio::null());
    if sources.starts_with("/tmp") {
        command.env("SHARE", sources);
    }
    let output = command.output()?;
    let text = String::from_utf8_lossy(&[output.stdout.as_slice(), &output.stderr].concat()).into_owned();
    if output.status.code() == Some(CANNOT) {
        eprintln!("nothing was tried under systemd: {}", text.trim());
        // Where the suite is meant to be complete, this is a failure.
        return match std::env::var_os("PM_TEST_SYSTEMD") {
            Some(_) => Err(text.into()),
            None => Ok(()),
        };
    }
    println!("{text}");
    if output.status.success() { Ok(()) } else { Err(format!("{}\n{text}", output.status).into()) }
}
