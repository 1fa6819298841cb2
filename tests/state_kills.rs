//! The state file under SIGKILL: this program starts itself as a writer of one state after the other, kills it at a
//! random moment, and reads what is there. It must be the last state that was acknowledged, or the one in flight.
//!
//! `PM_STATE_KILLS` is the number of kills, 250 by default; `PM_STATE_DIR` where the file lies, by default in memory,
//! where a write is not one long fsync. (`bench/state-kills.py` does the same to a whole daemon.)

#![expect(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test program with its own main function, which clippy does not take for a test"
)]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::hash::{BuildHasher, RandomState};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::Duration;

use libtest_mimic::{Arguments, Failed, Trial};
use pm::model::id::{AppName, Generation, PmId};
use pm::model::saved::{Desired, SavedApp, SavedFleet, SavedSlot};
use pm::model::spec::{AppSpec, CommandSpec, Runtime};
use pm::store::state::{State, StateStore};

/// How a state is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    /// By the store.
    Durably,
    /// As many programs do it: over the old file.
    InPlace,
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    match args.get(1).map(String::as_str) {
        Some("durably") => write_for_ever(Path::new(&args[2]), Manner::Durably),
        Some("in-place") => write_for_ever(Path::new(&args[2]), Manner::InPlace),
        _ => {
            let kills = std::env::var("PM_STATE_KILLS").ok().and_then(|text| text.parse().ok());
            let trials = vec![
                Trial::test(
                    "pain_11_kill_9_at_any_of_many_random_instants_never_yields_an_empty_or_partial_list",
                    move || durable(kills.unwrap_or(250)),
                ),
                Trial::test("control_a_file_that_is_written_in_place_is_found_broken", control),
            ];
            libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
        }
    }
}

/// The state of this number: every part of it tells which one it is.
fn state(number: u32) -> State {
    let mut state =
        State { fleet: SavedFleet { next_pm_id: number, ..SavedFleet::default() }, ..State::default() };
    for index in 0..12 {
        let name = AppName::new(&format!("app-{index}")).unwrap();
        let command = CommandSpec {
            script: PathBuf::from("/srv/app/server.js"),
            interpreter: None,
            interpreter_args: Vec::new(),
            args: vec![format!("--release={number}"), "x".repeat(2000)],
            runtime: Runtime::Other,
        };
        let slot = SavedSlot {
            pm_id: PmId(index),
            desired: if number.is_multiple_of(2) { Desired::Running } else { Desired::Stopped },
            reserved: Generation(u64::from(number)),
            revision: 1,
            before: 0,
            behind: false,
        };
        state.fleet.apps.push(SavedApp {
            spec: Arc::new(AppSpec::new(name.clone(), command, PathBuf::from("/srv/app"))),
            revision: u64::from(number),
            previous: None,
            older: Vec::new(),
            slots: vec![slot],
            operation: None,
        });
        let shell = BTreeMap::from([("RELEASE".to_owned(), (number / 3).to_string())]);
        state.shells.insert(name, Arc::new(shell));
    }
    state
}

fn store(dir: &Path) -> StateStore {
    StateStore::new(dir.join("state.json"), dir.join("env"))
}

fn write_for_ever(dir: &Path, manner: Manner) -> ExitCode {
    let loaded = store(dir).load().unwrap();
    let mut own = store(dir);
    let mut out = std::io::stdout();
    for number in loaded.state.fleet.next_pm_id + 1.. {
        own.save(&state(number)).unwrap();
        if manner == Manner::InPlace {
            let text = fs::read(dir.join("state.json")).unwrap();
            fs::remove_file(dir.join("state.json.prev")).unwrap_or_default();
            let mut file = File::create(dir.join("state.json")).unwrap();
            text.chunks(512).for_each(|part| file.write_all(part).unwrap());
        }
        // The parent kills us, and nothing else ends us.
        if writeln!(out, "{number}").and_then(|()| out.flush()).is_err() {
            break;
        }
    }
    ExitCode::FAILURE
}

/// Lets a writer write for this long after its first word, kills it, and says what it acknowledged last.
fn killed_writer(dir: &Path, manner: &str, after: Duration) -> u32 {
    let mut writer = Command::new(std::env::current_exe().unwrap())
        .args([manner, dir.to_str().unwrap()])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(writer.stdout.take().unwrap());
    let mut said = String::new();
    lines.read_line(&mut said).unwrap();
    // The moment of the kill is what is random: nothing is waited for, and nobody ever sends.
    let (_tx, rx) = std::sync::mpsc::channel::<()>();
    let _ = rx.recv_timeout(after);
    writer.kill().unwrap();
    writer.wait().unwrap();
    lines.read_line(&mut said).unwrap();
    let mut last = said;
    for line in lines.lines().map_while(Result::ok) {
        last = format!("{line}\n");
    }
    // A line that it was killed in is no acknowledgement; writes of a few bytes to a pipe are whole.
    last.lines().last().and_then(|line| line.parse().ok()).unwrap_or(0)
}

/// Numbers that differ from run to run.
fn random(seed: &RandomState, index: u32, below: u64) -> u64 {
    seed.hash_one(index) % below
}

/// Kills writers, and says after which of them the state was not what it has to be.
fn broken(manner: &str, kills: u32) -> Result<Vec<String>, Failed> {
    let place = std::env::var_os("PM_STATE_DIR").map_or_else(|| PathBuf::from("/dev/shm"), PathBuf::from);
    let dir = tempfile::tempdir_in(&place).or_else(|_| tempfile::tempdir())?;
    fs::create_dir(dir.path().join("env"))?;
    let seed = RandomState::new();
    let mut wrong = Vec::new();
    let (mut newest, mut in_flight) = (0, 0);
    for index in 0..kills {
        let after = Duration::from_micros(random(&seed, index, 4000));
        let acknowledged = killed_writer(dir.path(), manner, after);
        match store(dir.path()).load() {
            Err(error) => wrong.push(format!("after {acknowledged}: {error}")),
            Ok(loaded) => {
                let number = loaded.state.fleet.next_pm_id;
                if let Some(warning) = loaded.warning {
                    wrong.push(format!("after {acknowledged}: {warning}"));
                } else if number != acknowledged && number != acknowledged + 1 {
                    wrong.push(format!("after {acknowledged}: {number}"));
                } else if loaded.state != state(number) {
                    wrong.push(format!("after {acknowledged}: not the whole of it"));
                }
                let environments = fs::read_dir(dir.path().join("env"))?.count();
                // Of the state, the one before it, one that was to come, and one half written.
                if environments > 4 {
                    wrong.push(format!("after {acknowledged}: {environments} environments"));
                }
                let before = StateStore::new(dir.path().join("state.json.prev"), dir.path().join("env"));
                if let Some(warning) = { before }.load()?.warning {
                    wrong.push(format!("before {acknowledged}: {warning}"));
                }
                in_flight += u32::from(number != acknowledged);
                newest = number;
            }
        }
        if !wrong.is_empty() {
            break;
        }
    }
    eprintln!(
        "{manner}: {kills} kills, {newest} states written, {in_flight} times the one in flight was read, wrong: {wrong:?}"
    );
    Ok(wrong)
}

fn durable(kills: u32) -> Result<(), Failed> {
    let wrong = broken("durably", kills)?;
    if wrong.is_empty() { Ok(()) } else { Err(wrong.join("\n").into()) }
}

fn control() -> Result<(), Failed> {
    if broken("in-place", 1000)?.is_empty() { Err("1000 kills went unnoticed".into()) } else { Ok(()) }
}
