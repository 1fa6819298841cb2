//! An upgrade, as the supervisor sees it: the new program is looked at and tried on a copy of the live state, then the
//! keeper starts it and this supervisor gets out of the way (`takeover`).
//!
//! The trial runs in a process of its own (`pm supervisor --check`) that gets the blob on its standard input, reads
//! state.json, and touches nothing else: no descriptor, no process, no socket.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::blob;
use super::handle::Replies;
use crate::ipc::protocol::{Answer, KeeperFate, Refused, Reply, UpgradeResult, UpgradeView};
use crate::keeper::wire::{Upgrade, UpgradeState, VERSION as WIRE_VERSION};
use crate::metrics::host::available_cpus;
use crate::model::id::OpId;
use crate::policy::fleet::{Fleet, Settings};
use crate::store::paths::Home;
use crate::store::state::StateStore;
use crate::sys::{clock, exec, guarded, memfd, pidfd};

/// The version of this program.
pub const PM_VERSION: &str = env!("CARGO_PKG_VERSION");

/// The argument of `pm supervisor` that has it look at a state and say whether it would take it over.
pub const CHECK: &str = "--check";

/// The keepers that know upgrades.
const KEEPER_MIN: u16 = 2;

/// A program that has not said by then whether it fits is not one of ours, or hangs.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a program may say.
const WORDS_MAX: u64 = 64 * 1024;

/// What a new program says of itself and of a copy of the live state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Findings {
    /// The version of pm.
    pub pm: String,
    /// The version of the frames between keeper and supervisor that it speaks.
    pub keeper_wire: u16,
    /// Why it cannot take over.
    #[serde(default)]
    pub fault: Option<String>,
    /// Apps in the state.
    #[serde(default)]
    pub apps: usize,
}

/// A program that was looked at.
#[derive(Debug)]
pub struct Examined {
    /// For whom.
    pub op: OpId,
    /// The open program and what it says, or why it will not do.
    pub outcome: Result<Candidate, Refused>,
}

/// A program that would take over.
#[derive(Debug)]
pub struct Candidate {
    /// The open executable: what was checked is what will run.
    pub program: OwnedFd,
    /// What it says.
    pub findings: Findings,
    /// The supervisor runs it already.
    pub supervisor_has_it: bool,
    /// The keeper runs it already.
    pub keeper_has_it: bool,
}

/// What was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    /// The new program.
    pub program: PathBuf,
    /// Not the keeper.
    pub supervisor_only: bool,
    /// Only look.
    pub check: bool,
}

/// The upgrades of one supervisor.
#[derive(Debug, Default)]
pub struct Upgrades {
    under_way: Option<UnderWay>,
    /// The last one that the keeper knows of.
    last: Option<Upgrade>,
    /// Clients that wait for its end.
    waiting: Vec<Replies>,
}

#[derive(Debug)]
struct UnderWay {
    op: OpId,
    wish: Wish,
    replies: Replies,
}

/// What follows from news of the keeper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// The new supervisor waits: this one leaves.
    Leave,
    /// It did not work out, and nothing has changed.
    Stay,
    /// An upgrade has ended, well or not.
    Ended,
}

impl Upgrades {
    /// Goes on from what the keeper says.
    #[must_use]
    pub fn new(last: Option<Upgrade>) -> Self {
        Self { last, ..Self::default() }
    }

    /// Whether this supervisor has yet to say that it has taken over.
    #[must_use]
    pub fn is_on_trial(&self) -> bool {
        self.last.as_ref().is_some_and(|last| last.state == UpgradeState::Pending)
    }

    /// Begins to look at a program; the finding comes through `found`.
    ///
    /// # Errors
    /// Another one is under way; the copy cannot be made.
    pub fn begin(
        &mut self,
        op: OpId,
        wish: Wish,
        replies: &Replies,
        subject: Subject,
        found: impl FnOnce(Examined) + Send + 'static,
    ) -> Result<(), Refused> {
        if self.under_way.is_some() || self.is_on_trial() {
            return Err(Refused {
                code: 5,
                message: "another upgrade is under way".to_owned(),
                cause: None,
                hint: Some("It takes seconds; try again after it.".to_owned()),
            });
        }
        let program = wish.program.clone();
        thread::Builder::new()
            .name("upgrade".into())
            .spawn(move || found(Examined { op, outcome: examine(&program, &subject) }))
            .map_err(|error| refused(1, "cannot look at the new program", &error.to_string(), None))?;
        self.under_way = Some(UnderWay { op, wish, replies: replies.clone() });
        Ok(())
    }

    /// The program was looked at. Returns what the keeper is to start, if it is.
    pub fn examined(&mut self, examined: Examined) -> Option<(Candidate, bool)> {
        let under_way = self.under_way.take_if(|under_way| under_way.op == examined.op)?;
        let candidate = match examined.outcome {
            Ok(candidate) => candidate,
            Err(refused) => {
                let _ = under_way.replies.send(Reply::Refused(refused));
                return None;
            }
        };
        let wish = &under_way.wish;
        let there = candidate.supervisor_has_it && (candidate.keeper_has_it || wish.supervisor_only);
        let result = match (wish.check, there) {
            (_, true) => UpgradeResult::Already,
            (true, false) => UpgradeResult::Fits,
            (false, false) => {
                let supervisor_only = wish.supervisor_only;
                self.under_way = Some(under_way);
                return Some((candidate, supervisor_only));
            }
        };
        let view = UpgradeView {
            result,
            from: PM_VERSION.to_owned(),
            to: candidate.findings.pm,
            keeper: if candidate.keeper_has_it { KeeperFate::Same } else { KeeperFate::Older },
            reason: None,
        };
        let _ = under_way.replies.send(Reply::Answer(Answer::Upgrade(view)));
        None
    }

    /// It cannot be begun after all.
    pub fn give_up(&mut self, why: &str) {
        if let Some(under_way) = self.under_way.take() {
            let message = format!("cannot upgrade to {}", under_way.wish.program.display());
            let hint = format!("pm {PM_VERSION} goes on, and nothing of the apps has changed.");
            let _ = under_way.replies.send(Reply::Refused(refused(1, &message, why, Some(&hint))));
        }
    }

    /// News of the keeper.
    pub fn told(&mut self, upgrade: Upgrade) -> Then {
        let ours = self.under_way.as_ref().is_some_and(|under_way| under_way.op.0 == upgrade.op);
        match (&upgrade.state, ours) {
            // The client hears the rest from whoever comes next.
            (UpgradeState::Pending, true) => Then::Leave,
            (UpgradeState::Failed { reason }, true) => {
                let reason = reason.clone();
                self.give_up(&reason);
                self.last = Some(upgrade);
                Then::Stay
            }
            _ => {
                if upgrade.state != UpgradeState::Pending {
                    for client in self.waiting.drain(..) {
                        let _ = client.send(Reply::Answer(Answer::Upgrade(view_of(&upgrade))));
                    }
                }
                self.last = Some(upgrade);
                Then::Ended
            }
        }
    }

    /// The last upgrade.
    #[must_use]
    pub fn last(&self) -> Option<&Upgrade> {
        self.last.as_ref()
    }

    /// A client asks how its upgrade ended.
    pub fn outcome(&mut self, op: OpId, replies: &Replies) {
        match &self.last {
            Some(last) if last.op == op.0 && last.state == UpgradeState::Pending => {
                self.waiting.push(replies.clone());
            }
            Some(last) if last.op == op.0 => {
                let _ = replies.send(Reply::Answer(Answer::Upgrade(view_of(last))));
            }
            _ => {
                let _ = replies.send(Reply::Answer(Answer::NeverBegun));
            }
        }
    }
}

/// An upgrade that has ended, for clients.
fn view_of(upgrade: &Upgrade) -> UpgradeView {
    let (result, keeper, reason) = match &upgrade.state {
        UpgradeState::Failed { reason } => (UpgradeResult::Failed, KeeperFate::Older, Some(reason.clone())),
        UpgradeState::Supervisor => (UpgradeResult::Replaced, KeeperFate::Same, None),
        UpgradeState::KeeperStays { reason } => {
            (UpgradeResult::Replaced, KeeperFate::Older, Some(reason.clone()))
        }
        UpgradeState::Pending | UpgradeState::Both => (UpgradeResult::Replaced, KeeperFate::Replaced, None),
    };
    UpgradeView { result, from: upgrade.from.clone(), to: PM_VERSION.to_owned(), keeper, reason }
}

/// What a program is tried on.
#[derive(Debug)]
pub struct Subject {
    /// The home with state.json.
    pub home: Home,
    /// The newest blob.
    pub blob: Vec<u8>,
    /// The keeper.
    pub keeper_pid: u32,
    /// The version of the frames that it speaks.
    pub keeper_wire: u16,
}

fn refused(code: u8, message: &str, cause: &str, hint: Option<&str>) -> Refused {
    Refused {
        code,
        message: message.to_owned(),
        cause: Some(cause.to_owned()),
        hint: hint.map(str::to_owned),
    }
}

/// Looks at a program and tries it on a copy of the live state.
fn examine(path: &Path, subject: &Subject) -> Result<Candidate, Refused> {
    let unfit = |cause: &str, hint: Option<&str>| {
        refused(2, &format!("cannot upgrade to {}", path.display()), cause, hint)
    };
    if subject.keeper_wire < KEEPER_MIN {
        return Err(unfit(
            "the keeper of the running daemon is older than upgrades",
            Some("`systemctl restart pm` replaces both, and the apps go on."),
        ));
    }
    let file = guarded::open_regular(path).map_err(|error| match error.kind() {
        io::ErrorKind::InvalidInput => unfit("it is not a file", Some("Name the new `pm` program itself.")),
        _ => unfit(&error.to_string(), None),
    })?;
    if !is_executable(path) {
        return Err(unfit("it is not executable", Some("chmod +x it, if it is the new `pm`.")));
    }
    let mut head = [0; 20];
    let read = file.read_at(&mut head, 0).unwrap_or(0);
    if let Some(fault) = foreign(&head[..read]) {
        return Err(unfit(&fault, Some("Name a `pm` for this machine.")));
    }
    let own = exec::own_executable().map_err(|error| unfit(&error.to_string(), None))?;
    let program = OwnedFd::from(file);
    let same = |running: &OwnedFd| exec::is_same_program(running.as_fd(), program.as_fd()).unwrap_or(false);
    let keeper = File::open(format!("/proc/{}/exe", subject.keeper_pid)).map(OwnedFd::from);
    let (supervisor_has_it, keeper_has_it) = (same(&own), keeper.is_ok_and(|keeper| same(&keeper)));
    let findings = try_on(&program, subject).map_err(|fault| match fault {
        Fault::NotPm(said) => unfit(&format!("it is not pm: {said}"), Some("Name the new `pm` program.")),
        Fault::TooOld(version) => unfit(
            &format!("{version} is too old to take over from a running daemon"),
            Some("Stop the daemon with `pm kill` to go back to it; `pm resurrect` starts the apps again."),
        ),
        Fault::Failed(cause) => unfit(&cause, None),
    })?;
    if findings.keeper_wire < KEEPER_MIN {
        return Err(unfit("it does not speak to this keeper", None));
    }
    if let Some(fault) = &findings.fault {
        return Err(refused(
            1,
            &format!("cannot upgrade to pm {}", findings.pm),
            &format!("it cannot take over what there is: {fault}"),
            Some("Nothing was changed; the running version goes on."),
        ));
    }
    Ok(Candidate { program, findings, supervisor_has_it, keeper_has_it })
}

fn is_executable(path: &Path) -> bool {
    nix::unistd::access(path, nix::unistd::AccessFlags::X_OK).is_ok()
}

/// Why the beginning of a file is not that of a program for this machine (elf(5)).
fn foreign(head: &[u8]) -> Option<String> {
    if head.len() < 20 || head[..4] != *b"\x7fELF" {
        return Some("it is not a program (an ELF file)".to_owned());
    }
    let own = own_head().ok()?;
    // Class, byte order, and the machine.
    if head[4..6] == own[4..6] && head[18..20] == own[18..20] {
        return None;
    }
    let machine = match u16::from_le_bytes([head[18], head[19]]) {
        3 => "x86".to_owned(),
        40 => "arm".to_owned(),
        62 => "x86_64".to_owned(),
        183 => "aarch64".to_owned(),
        243 => "riscv".to_owned(),
        other => format!("machine {other}"),
    };
    Some(format!("it is for another kind of machine ({machine}; this one is {})", std::env::consts::ARCH))
}

fn own_head() -> io::Result<[u8; 20]> {
    let mut head = [0; 20];
    File::open("/proc/self/exe")?.read_exact_at(&mut head, 0)?;
    Ok(head)
}

enum Fault {
    /// With its first words.
    NotPm(String),
    /// With what it says it is.
    TooOld(String),
    Failed(String),
}

fn try_on(program: &OwnedFd, subject: &Subject) -> Result<Findings, Fault> {
    let home = subject.home.dir().as_os_str();
    let args = ["supervisor".as_ref(), CHECK.as_ref(), "--home".as_ref(), home];
    let (status, said) = run(program, &args, &subject.blob).map_err(Fault::Failed)?;
    let line = said.lines().next_back().unwrap_or_default();
    if let Ok(findings) = serde_json::from_str::<Findings>(line) {
        return Ok(findings);
    }
    let (_, version) = run(program, &["--version".as_ref()], &[]).map_err(Fault::Failed)?;
    let version = version.lines().next().unwrap_or_default();
    if version.starts_with("pm ") {
        // One that knows the question ends well, or dies of the state.
        return Err(match status.code() {
            Some(2) => Fault::TooOld(version.to_owned()),
            _ => Fault::Failed(format!("{version} ended while it looked at the state: {status}")),
        });
    }
    let said: String = version.chars().take(60).collect();
    Err(Fault::NotPm(if said.is_empty() {
        "it says nothing".to_owned()
    } else {
        format!("it says {said:?}")
    }))
}

/// Runs the open program and collects what it says.
fn run(program: &OwnedFd, args: &[&std::ffi::OsStr], input: &[u8]) -> Result<(ExitStatus, String), String> {
    let words = |step: &str, error: &io::Error| format!("cannot {step} it: {error}");
    let mut stdin = File::from(memfd::create(c"pm-check").map_err(|error| words("ask", &error))?);
    stdin.write_all(input).and_then(|()| stdin.rewind()).map_err(|error| words("ask", &error))?;
    let mut child = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()))
        .arg0("pm")
        .args(args)
        .stdin(Stdio::from(stdin))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .env_remove("NOTIFY_SOCKET")
        .spawn()
        .map_err(|error| words("run", &error))?;
    let said = read_within(&mut child, PATIENCE);
    if said.is_none() {
        let _ = child.kill();
    }
    let status = child.wait().map_err(|error| words("wait for", &error))?;
    match said {
        Some(said) => Ok((status, String::from_utf8_lossy(&said).into_owned())),
        None => Err(format!("it did not answer within {} s", PATIENCE.as_secs())),
    }
}

fn read_within(child: &mut Child, patience: Duration) -> Option<Vec<u8>> {
    let stdout = child.stdout.take()?;
    let ended = pidfd::open(child.id()).ok()?;
    let (said_tx, said_rx) = mpsc::channel();
    // Ends with the program: whatever that leaves behind is not waited for.
    thread::spawn(move || {
        let mut said = Vec::new();
        let _ = stdout.take(WORDS_MAX).read_to_end(&mut said);
        let _ = said_tx.send(said);
    });
    let said = said_rx.recv_timeout(patience).ok()?;
    let wait = crate::sys::poll::wait(&[(ended.as_fd(), crate::sys::poll::Interest::Read)], Some(patience));
    wait.is_ok_and(|ready| ready[0]).then_some(said)
}

/// What `pm supervisor --check` does: loads a copy of the live state as the next supervisor would, and says how that
/// went. Changes nothing.
#[must_use]
pub fn check(home: &Home, mut blob: impl Read) -> Findings {
    let mut findings =
        Findings { pm: PM_VERSION.to_owned(), keeper_wire: WIRE_VERSION, fault: None, apps: 0 };
    let mut record = Vec::new();
    let memo = match blob.read_to_end(&mut record) {
        Ok(0) => None,
        Ok(_) => match blob::open(&record) {
            Some(opened) => Some(opened.blob.memo),
            None => {
                findings.fault =
                    Some("what the supervisor remembers is in a form it does not know".to_owned());
                return findings;
            }
        },
        Err(error) => {
            findings.fault = Some(error.to_string());
            return findings;
        }
    };
    match StateStore::new(home.state(), home.env_dir()).load() {
        Ok(loaded) => {
            findings.apps = loaded.state.fleet.apps.len();
            let settings = Settings::for_cpus(u32::try_from(available_cpus()).unwrap_or(u32::MAX));
            let _ = Fleet::restore(settings, clock::now(), loaded.state.fleet, memo, Vec::new());
        }
        Err(error) => findings.fault = Some(error.to_string()),
    }
    findings
}
