//! The supervisor's side of a scenario.

use std::collections::{BTreeSet, VecDeque};
use std::ffi::CString;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use pm::keeper::link::{Child, Inventory, Link, SpawnRequest};
use pm::keeper::wire::{ChildState, Command, FromKeeper, HeldFds, ToKeeper};
use pm::sys::child::WaitStatus;
use pm::sys::clock::{self, Moment};
use pm::sys::poll::{self, Interest};
use pm::sys::spawn::Failure;
use pm::sys::{pidfd, pipe};

use crate::scenarios;

/// What keeper and supervisor run with; children must not.
pub(crate) const OOM_SCORE_ADJ: i32 = 321;

/// Where a supervisor without a keeper waits.
pub(crate) const TAKEOVER: &str = "takeover.sock";

/// Holds the pid of the next keeper.
pub(crate) const NEXT: &str = "next";

/// How long any single thing may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// A supervisor that knows what it has started.
pub(crate) struct World {
    pub(crate) link: Link,
    pub(crate) inventory: Inventory,
    pub(crate) dir: PathBuf,
    pub(crate) null: OwnedFd,
    mail: VecDeque<FromKeeper>,
    requests: u64,
    /// Children to end at the end.
    pub(crate) alive: BTreeSet<u32>,
    /// Those of them whose end was told.
    ended: BTreeSet<u32>,
}

/// Plays a scenario and ends the keeper.
pub(crate) fn supervise(scenario: &str, dir: &Path) -> ExitCode {
    let write = |result: &str| std::fs::write(dir.join("result"), result).unwrap();
    let default_hook = std::panic::take_hook();
    let text = dir.join("result");
    std::panic::set_hook(Box::new(move |panic| {
        std::fs::write(&text, panic.to_string()).unwrap();
        default_hook(panic);
    }));
    let mut link = Link::inherited().unwrap();
    let inventory = link.handshake().unwrap();
    let pids = |children: &[Child], wanted: fn(&ChildState) -> bool| {
        children.iter().filter(|child| wanted(&child.state)).map(|child| child.pid).collect()
    };
    let alive = pids(&inventory.children, |_| true);
    let ended = pids(&inventory.children, |state| matches!(state, ChildState::Exited(_)));
    let null = File::options().read(true).write(true).open("/dev/null").unwrap().into();
    let mut world = World {
        link,
        inventory,
        dir: dir.to_owned(),
        null,
        mail: VecDeque::new(),
        requests: 0,
        alive,
        ended,
    };
    let (_, play) = scenarios::ALL.iter().find(|(name, _)| *name == scenario).unwrap();
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        play(&mut world);
        world.end_all();
    }));
    if outcome.is_ok() {
        write("ok");
    }
    for &pid in &world.alive {
        let _ = pidfd::open(pid).and_then(|fd| pidfd::send_signal(fd, libc::SIGKILL));
    }
    world.link.try_send(&ToKeeper::Quit, &[]).unwrap();
    ExitCode::SUCCESS
}

impl World {
    pub(crate) fn request(&mut self) -> u64 {
        self.requests += 1;
        self.requests
    }

    /// Asks for a program without waiting for the answer.
    pub(crate) fn ask(
        &mut self,
        tag: &str,
        command: &Command,
        fds: &[BorrowedFd<'_>],
        held: &[(&str, BorrowedFd<'_>)],
    ) -> u64 {
        let request = self.request();
        self.link.try_spawn(&SpawnRequest { request, tag: tag.as_bytes(), command, fds, held }).unwrap();
        request
    }

    /// Starts a program with /dev/null as stdin and stdout.
    pub(crate) fn start(&mut self, tag: &str, command: &Command) -> Result<u32, Failure> {
        let request = self.ask(tag, command, &[], &[]);
        self.answer(request)
    }

    /// Starts a program and returns everything it writes to stdout until all of its writers are gone.
    pub(crate) fn output(&mut self, tag: &str, command: &Command, more: &[BorrowedFd<'_>]) -> (u32, String) {
        let (ours, theirs) = pipe::pipe_for_output().unwrap();
        let null = self.null.try_clone().unwrap();
        let mut fds = vec![null.as_fd(), theirs.as_fd(), theirs.as_fd()];
        fds.extend(more);
        let request = self.ask(tag, command, &fds, &[]);
        drop(fds);
        while self.link.pending() > 0 {
            self.wait(Interest::ReadWrite, clock::now() + PATIENCE);
        }
        drop(theirs);
        let pid = self.answer(request).unwrap();
        (pid, read_all(ours))
    }

    #[track_caller]
    pub(crate) fn answer(&mut self, wanted: u64) -> Result<u32, Failure> {
        let message = self.expect(|message| match message {
            FromKeeper::Spawned { request, .. } | FromKeeper::SpawnFailed { request, .. } => {
                *request == wanted
            }
            _ => false,
        });
        match message {
            FromKeeper::Spawned { pid, start_ticks, .. } => {
                assert_eq!(pm::sys::child::start_ticks(pid).unwrap(), start_ticks);
                self.alive.insert(pid);
                Ok(pid)
            }
            FromKeeper::SpawnFailed { failure, .. } => Err(failure),
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    pub(crate) fn exit_of(&mut self, wanted: u32) -> WaitStatus {
        match self.expect(|message| matches!(message, FromKeeper::Exited { pid, .. } if *pid == wanted)) {
            FromKeeper::Exited { status, .. } => {
                self.ended.insert(wanted);
                status
            }
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn confirm(&mut self, pid: u32, fds: HeldFds) {
        self.link.confirm(pid, fds).unwrap();
        self.alive.remove(&pid);
        self.ended.remove(&pid);
    }

    /// Waits until the keeper has done everything asked for so far.
    #[track_caller]
    pub(crate) fn sync(&mut self) {
        let wanted = self.request();
        self.link.try_send(&ToKeeper::Sync { request: wanted }, &[]).unwrap();
        self.expect(|message| matches!(message, FromKeeper::Synced { request } if *request == wanted));
    }

    /// The first message that fits, now or within a while; others are kept.
    #[track_caller]
    pub(crate) fn expect(&mut self, fits: impl Fn(&FromKeeper) -> bool) -> FromKeeper {
        let deadline = clock::now() + PATIENCE;
        let mut seen = 0;
        loop {
            if let Some(index) = self.mail.iter().skip(seen).position(&fits) {
                return self.mail.remove(seen + index).unwrap();
            }
            seen = self.mail.len();
            self.wait(Interest::Read, deadline);
            self.receive();
        }
    }

    pub(crate) fn receive(&mut self) {
        self.link.flush().unwrap();
        while let Some(message) = self.link.try_recv().unwrap() {
            self.mail.push_back(message);
        }
    }

    /// What has arrived and was not asked for.
    pub(crate) fn mail(&self) -> &VecDeque<FromKeeper> {
        &self.mail
    }

    #[track_caller]
    fn wait(&mut self, interest: Interest, deadline: Moment) {
        let left = deadline.since(clock::now());
        assert!(!left.is_zero(), "nothing fits: {:.3000}", format!("{:?}", self.mail));
        let interest = if self.link.pending() > 0 { Interest::ReadWrite } else { interest };
        poll::wait(&[(self.link.as_fd(), interest)], Some(left)).unwrap();
        self.link.flush().unwrap();
    }

    /// Ends, hears of and confirms every child.
    pub(crate) fn end_all(&mut self) {
        for &pid in &self.alive {
            pidfd::send_signal(pidfd::open(pid).unwrap(), libc::SIGKILL).unwrap();
        }
        for pid in self.alive.clone() {
            if !self.ended.contains(&pid) {
                self.exit_of(pid);
            }
            self.confirm(pid, HeldFds::Release);
        }
        self.sync();
    }

    pub(crate) fn keeper_fds(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.inventory.hello.keeper_pid)).unwrap().count()
    }

    /// A line of /proc/PID/status of the keeper.
    pub(crate) fn keeper_status(&self, key: &str) -> String {
        status(self.inventory.hello.keeper_pid, key)
    }

    pub(crate) fn held(&self, name: &str) -> Option<&OwnedFd> {
        self.inventory.held.iter().find(|(held, _)| held == name).map(|(_, fd)| fd)
    }

    pub(crate) fn held_names(&self) -> Vec<&str> {
        self.inventory.held.iter().map(|(name, _)| name.as_str()).collect()
    }

    /// Starts the next keeper, gives everything to it, and ends. `between` happens while there is no keeper.
    pub(crate) fn hand_over(&mut self, between: impl FnOnce()) -> ! {
        let (spare, _) = pipe::packet_pair().unwrap();
        let link = std::mem::replace(&mut self.link, Link::new(spare));
        let old = self.inventory.hello.keeper_pid;
        until("the keeper is gone", || !process_exists(old) || status(old, "State").starts_with('Z'));
        let estate = link.into_estate(self.inventory.hello.clone(), |_| Vec::new());
        between();
        let listener = pipe::packet_listener(&self.dir.join(TAKEOVER)).unwrap();
        let args: Vec<String> = std::env::args().collect();
        let mut next = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["keeper", &args[2], &args[3]])
            .spawn()
            .unwrap();
        std::fs::write(self.dir.join("next.new"), next.id().to_string()).unwrap();
        std::fs::rename(self.dir.join("next.new"), self.dir.join(NEXT)).unwrap();
        let deadline = clock::now() + PATIENCE;
        let socket = loop {
            match pipe::packet_accept(&listener).unwrap() {
                Some(socket) => break socket,
                None => wait_readable(listener.as_fd(), deadline),
            }
        };
        pm::keeper::handover::offer(socket, &estate).unwrap();
        // What is left is the next one's.
        let _ = next.try_wait();
        std::process::exit(0)
    }

    /// Dies as hard as can be.
    pub(crate) fn die(&self) -> ! {
        pidfd::send_signal(pidfd::open(std::process::id()).unwrap(), libc::SIGKILL).unwrap();
        unreachable!("SIGKILL to oneself is delivered before the call returns")
    }
}

pub(crate) fn status(pid: u32, key: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {key} in {text}")).trim().to_owned()
}

pub(crate) fn sh(script: &str) -> Command {
    command(&["/bin/sh", "-c", script])
}

pub(crate) fn command(args: &[&str]) -> Command {
    let args: Vec<CString> = args.iter().map(|&arg| CString::new(arg).unwrap()).collect();
    let env = vec![c"PATH=/usr/bin:/bin".to_owned()];
    Command { program: args[0].clone(), args, env, ..Command::default() }
}

/// Reads until the end of the stream.
pub(crate) fn read_all(fd: OwnedFd) -> String {
    let deadline = clock::now() + PATIENCE;
    let mut file = File::from(fd);
    let mut text = Vec::new();
    loop {
        match file.read_to_end(&mut text) {
            Ok(_) => return String::from_utf8(text).unwrap(),
            Err(error) if error.kind() == ErrorKind::WouldBlock => wait_readable(file.as_fd(), deadline),
            Err(error) => panic!("{error}"),
        }
    }
}

/// Reads one line byte by byte, so that nothing behind it is taken.
pub(crate) fn read_line(fd: &OwnedFd) -> String {
    let deadline = clock::now() + PATIENCE;
    let mut file = File::from(fd.try_clone().unwrap());
    let mut text = String::new();
    loop {
        let mut byte = [0];
        match file.read(&mut byte) {
            Ok(0) => return text,
            Ok(_) if byte == [b'\n'] => return text,
            Ok(_) => text.push(char::from(byte[0])),
            Err(error) if error.kind() == ErrorKind::WouldBlock => wait_readable(fd.as_fd(), deadline),
            Err(error) => panic!("{error}"),
        }
    }
}

fn wait_readable(fd: BorrowedFd<'_>, deadline: Moment) {
    let left = deadline.since(clock::now());
    assert!(!left.is_zero(), "descriptor {} has nothing to read", fd.as_raw_fd());
    poll::wait(&[(fd, Interest::Read)], Some(left)).unwrap();
}

/// Waits until a condition holds.
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = clock::now() + PATIENCE;
    while !holds() {
        assert!(clock::now() < deadline, "{what}: not within {PATIENCE:?}");
        poll::wait(&[], Some(Duration::from_millis(2))).unwrap();
    }
}

pub(crate) fn process_exists(pid: u32) -> bool {
    Path::new("/proc").join(pid.to_string()).try_exists().unwrap()
}
