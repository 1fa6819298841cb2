//! The keeper for real: this program starts itself as a keeper, which starts it as the supervisor, which plays a
//! scenario and writes down how it went.

#![expect(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::exit,
    reason = "a test program with its own main function, which clippy does not take for a test"
)]

mod scenarios;
mod succession;
mod world;

use std::ffi::CString;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use libtest_mimic::{Arguments, Failed, Trial};
use pm::keeper;
use pm::sys::poll::{self, Interest};
use pm::sys::{clock, pidfd, pipe};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    match args.get(1).map(String::as_str) {
        Some("keeper") => keep(&args[2], &args[3]),
        Some("supervisor") => world::supervise(&args[2], Path::new(&args[3])),
        _ => {
            let trials =
                scenarios::ALL.iter().map(|&(name, _)| Trial::test(name, move || test(name))).collect();
            libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
        }
    }
}

fn keep(scenario: &str, dir: &str) -> ExitCode {
    let args = ["pm", "supervisor", scenario, dir].map(|arg| CString::new(arg).unwrap());
    let mut config = keeper::Config::new(args.to_vec());
    match pipe::packet_connect(&Path::new(dir).join(world::TAKEOVER)) {
        Ok(socket) => config.estate = Some(keeper::handover::take(socket).unwrap()),
        Err(_) => {
            config.held.push(("from the start".into(), std::fs::File::open(dir).unwrap().into()));
        }
    }
    config.oom_score_adj = Some(world::OOM_SCORE_ADJ);
    config.foreground = scenario == scenarios::FAILING_SUPERVISORS;
    match keeper::run(config) {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}: {}", error.source);
            ExitCode::FAILURE
        }
    }
}

/// Runs a keeper with a supervisor that plays this scenario, in the state a careless parent leaves: signals ignored, a
/// low limit on open files, foreign descriptors open.
fn test(scenario: &str) -> Result<(), Failed> {
    let dir = tempfile::tempdir()?;
    let own = std::env::current_exe()?;
    let mut keeper = Command::new("/bin/sh")
        .arg("-c")
        .arg("trap '' INT USR1 PIPE; ulimit -S -n 1024; umask 027; exec 7</dev/null; exec \"$0\" keeper \"$@\"")
        .arg(own)
        .arg(scenario)
        .arg(dir.path())
        .stdin(Stdio::null())
        .spawn()?;
    let pidfd = pidfd::open(keeper.id())?;
    let deadline = clock::now() + Duration::from_secs(50);
    while !poll::wait(&[(pidfd.as_fd(), Interest::Read)], Some(deadline.since(clock::now())))?[0] {
        if clock::now() >= deadline {
            keeper.kill()?;
            keeper.wait()?;
            return Err(format!("no end in sight; {}", result(dir.path())).into());
        }
    }
    let mut status = keeper.wait()?;
    if [scenarios::NEXT_KEEPER, scenarios::LEAVING_KEEPER].contains(&scenario) {
        // Killed, or gone before its time: the next one counts, which is nobody's child any more.
        status = std::process::ExitStatus::default();
        let next = dir.path().join(world::NEXT);
        let is_there = || std::fs::read_to_string(&next).ok().and_then(|pid| pid.parse().ok());
        while is_there().is_none() && clock::now() < deadline {
            poll::wait(&[], Some(Duration::from_millis(5)))?;
        }
        let pid: u32 = is_there().ok_or_else(|| format!("no next keeper; {}", result(dir.path())))?;
        if let Ok(pidfd) = pidfd::open(pid) {
            poll::wait(&[(pidfd.as_fd(), Interest::Read)], Some(deadline.since(clock::now())))?;
        }
    }
    if scenario == scenarios::FAILING_SUPERVISORS {
        return Ok(scenarios::check_failed_end(dir.path(), status.code())?);
    }
    let result = result(dir.path());
    if result == "ok" && status.success() { Ok(()) } else { Err(format!("{status}: {result}").into()) }
}

fn result(dir: &Path) -> String {
    std::fs::read_to_string(dir.join("result")).unwrap_or_else(|error| format!("no result: {error}"))
}
