//! A home of its own for each test: runs `pm` in it, reads its tables, and leaves nothing behind.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use super::machine::Machine;
use super::wait::{pause, wait_until};
use super::{PATIENT, SOON, groups, node, process};

/// No command of a test may take longer than this.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);

/// Marks every process of a test through its environment; `pm` passes it on as it passes on any variable of the shell.
const MARK: &str = "PMTEST_HOME";

/// A daemon's home, a working directory beside it, and the guard that ends and checks everything.
#[derive(Debug)]
pub(crate) struct Home {
    // Dropped last: the next test may start when the directory is gone.
    dir: TempDir,
    /// The control group that the daemon divides.
    groups: Option<PathBuf>,
    _machine: Machine,
}

/// What a command did.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    /// The exit code; negative for a signal.
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
    pub(crate) took: Duration,
}

impl Run {
    /// Both outputs, for texts that may stand in either.
    pub(crate) fn text(&self) -> String {
        format!("{}{}", self.out, self.err)
    }

    #[track_caller]
    pub(crate) fn says(&self, wanted: &str) -> &Self {
        assert!(self.text().contains(wanted), "{wanted:?} is not in the output of {self:#?}");
        self
    }

    #[track_caller]
    pub(crate) fn does_not_say(&self, unwanted: &str) -> &Self {
        assert!(!self.text().contains(unwanted), "{unwanted:?} is in the output of {self:#?}");
        self
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("no JSON ({error}): {self:#?}"))
    }
}

/// One entry of `jlist`.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) id: i64,
    pub(crate) pid: i32,
    pub(crate) status: String,
    pub(crate) restarts: i64,
    pub(crate) slot: i64,
    pub(crate) entry: Value,
}

impl Row {
    fn of(entry: &Value) -> Self {
        let env = &entry["pm2_env"];
        Self {
            name: entry["name"].as_str().unwrap_or_default().to_owned(),
            id: entry["pm_id"].as_i64().unwrap_or(-1),
            pid: entry["pid"].as_i64().and_then(|pid| pid.try_into().ok()).unwrap_or(0),
            status: env["status"].as_str().unwrap_or_default().to_owned(),
            restarts: env["restart_time"].as_i64().unwrap_or(-1),
            slot: env["NODE_APP_INSTANCE"].as_i64().unwrap_or(-1),
            entry: entry.clone(),
        }
    }

    /// A field of `pm2_env`.
    pub(crate) fn env(&self, key: &str) -> &Value {
        &self.entry["pm2_env"][key]
    }

    /// Our own part of the entry.
    pub(crate) fn pm(&self, key: &str) -> &Value {
        &self.entry["pm"][key]
    }
}

impl Home {
    /// Beside other tests.
    pub(crate) fn new() -> Self {
        Self::with(Machine::shared())
    }

    /// Beside tests that put no load on the machine: for those that do.
    pub(crate) fn loaded() -> Self {
        Self::with(Machine::loaded())
    }

    /// With the machine to itself: for tests that measure time or processor time.
    pub(crate) fn alone() -> Self {
        Self::with(Machine::alone())
    }

    fn with(machine: Machine) -> Self {
        let dir = tempfile::Builder::new().prefix("pm-test-").tempdir().expect("a temporary directory");
        fs::create_dir(dir.path().join("work")).expect("work");
        fs::create_dir(dir.path().join("user")).expect("user");
        Self { dir, groups: None, _machine: machine }
    }

    /// Gives the daemon a control group of its own to divide, named by `PM_CGROUP_ROOT`.
    ///
    /// # Errors
    /// Why that cannot be done here.
    pub(crate) fn with_groups(mut self) -> Result<Self, String> {
        let name = self.dir.path().file_name().expect("a name").to_owned();
        let path = groups::mount()?.join(name);
        fs::create_dir(&path).map_err(|error| format!("cannot make {}: {error}", path.display()))?;
        self.groups = Some(path);
        Ok(self)
    }

    /// The control group that the daemon divides.
    pub(crate) fn groups(&self) -> Option<&Path> {
        self.groups.as_deref()
    }

    /// Lets other users reach the working directory.
    pub(crate) fn open_to_others(&self) {
        for dir in [self.dir.path().to_owned(), self.work()] {
            fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).expect("our directory");
        }
    }

    /// `pm` for users who may not go where it was built.
    pub(crate) fn program_for_others(&self) -> String {
        self.open_to_others();
        let program = self.work_file("pm");
        if fs::hard_link(env!("CARGO_BIN_EXE_pm"), &program).is_err() {
            fs::copy(env!("CARGO_BIN_EXE_pm"), &program).expect("a copy of pm");
        }
        program
    }

    /// The home that PM_HOME names.
    pub(crate) fn path(&self) -> PathBuf {
        self.dir.path().join("home")
    }

    /// Where commands run and configs lie.
    pub(crate) fn work(&self) -> PathBuf {
        self.dir.path().join("work")
    }

    pub(crate) fn work_file(&self, name: &str) -> String {
        self.work().join(name).to_str().expect("UTF-8").to_owned()
    }

    /// Writes a file below the working directory and returns its absolute path.
    pub(crate) fn write(&self, name: &str, text: &str) -> String {
        let path = self.work().join(name);
        fs::create_dir_all(path.parent().expect("a parent")).expect("its directory");
        fs::write(&path, text).unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
        path.to_str().expect("UTF-8").to_owned()
    }

    /// The text of a file below the working directory, "" while it is not there.
    pub(crate) fn read(&self, name: &str) -> String {
        fs::read(self.work().join(name)).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default()
    }

    /// The text of a log file in the home, "" while it is not there.
    pub(crate) fn log(&self, name: &str) -> String {
        let bytes = fs::read(self.path().join("logs").join(name)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until a log file holds a text, and returns all of it.
    #[track_caller]
    pub(crate) fn log_with(&self, name: &str, wanted: &str) -> String {
        wait_until(&format!("{wanted:?} in {name}"), SOON, || {
            let log = self.log(name);
            if log.contains(wanted) { Ok(log) } else { Err(log) }
        })
    }

    /// Waits until a file of the working directory holds a text, and returns all of it.
    #[track_caller]
    pub(crate) fn file_with(&self, name: &str, wanted: &str) -> String {
        wait_until(&format!("{wanted:?} in {name}"), SOON, || {
            let text = self.read(name);
            if text.contains(wanted) { Ok(text) } else { Err(text) }
        })
    }

    // Commands. ---------------------------------------------------------------------------------------------------

    /// A shell's environment: nothing of the test runner's but PATH.
    pub(crate) fn environment(&self, command: &mut Command) {
        let path = std::env::var("PATH").expect("PATH");
        let python = PathBuf::from(node::python());
        let first = python.parent().unwrap_or(Path::new("/usr/bin")).display();
        command
            .env_clear()
            .env("PATH", format!("{first}:{path}"))
            .env("HOME", self.dir.path().join("user"))
            .env("USER", "tester")
            .env("LANG", "C.UTF-8")
            .env("TZ", "UTC")
            .env("PM_HOME", self.path())
            .env(MARK, self.dir.path())
            .envs(self.groups.iter().map(|dir| ("PM_CGROUP_ROOT", dir)))
            .current_dir(self.work());
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        self.command_of(env!("CARGO_BIN_EXE_pm"), args)
    }

    /// A command of another `pm`.
    pub(crate) fn command_of(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(args);
        self.environment(&mut command);
        command
    }

    /// Runs `pm` and says what it did.
    #[track_caller]
    pub(crate) fn pm(&self, args: &[&str]) -> Run {
        run(self.command(args), COMMAND_LIMIT)
    }

    /// Runs `pm`, which must succeed.
    #[track_caller]
    pub(crate) fn ok(&self, args: &[&str]) -> Run {
        self.exits(0, args)
    }

    /// Runs `pm`, which must end with this exit code.
    #[track_caller]
    pub(crate) fn exits(&self, code: i32, args: &[&str]) -> Run {
        let run = self.pm(args);
        assert_eq!(run.code, code, "exit code of pm {args:?}: {run:#?}");
        run
    }

    /// Writes `ecosystem.toml`.
    pub(crate) fn ecosystem(&self, text: &str) {
        self.write("ecosystem.toml", text);
    }

    /// Writes `ecosystem.toml` and starts it.
    #[track_caller]
    pub(crate) fn start(&self, text: &str) -> Run {
        self.ecosystem(text);
        self.ok(&["start", "ecosystem.toml"])
    }

    // Tables. -----------------------------------------------------------------------------------------------------

    #[track_caller]
    pub(crate) fn jlist(&self) -> Value {
        self.ok(&["jlist"]).json()
    }

    #[track_caller]
    pub(crate) fn rows(&self) -> Vec<Row> {
        let list = self.jlist();
        list.as_array().unwrap_or_else(|| panic!("no array: {list}")).iter().map(Row::of).collect()
    }

    /// The rows of an app, by slot.
    #[track_caller]
    pub(crate) fn rows_of(&self, name: &str) -> Vec<Row> {
        let mut rows: Vec<Row> = self.rows().into_iter().filter(|row| row.name == name).collect();
        rows.sort_by_key(|row| row.slot);
        rows
    }

    /// The only row of an app.
    #[track_caller]
    pub(crate) fn row(&self, name: &str) -> Row {
        let rows = self.rows_of(name);
        assert_eq!(rows.len(), 1, "rows of {name}: {rows:#?}");
        rows.into_iter().next().expect("one")
    }

    #[track_caller]
    pub(crate) fn pids(&self, name: &str) -> Vec<i32> {
        self.rows_of(name).iter().map(|row| row.pid).collect()
    }

    #[track_caller]
    pub(crate) fn pid(&self, name: &str) -> i32 {
        self.row(name).pid
    }

    /// The status words of an app's slots.
    #[track_caller]
    pub(crate) fn statuses(&self, name: &str) -> Vec<String> {
        self.rows_of(name).into_iter().map(|row| row.status).collect()
    }

    #[track_caller]
    pub(crate) fn wait_status(&self, name: &str, status: &str) -> Row {
        self.wait_row(name, status, |row| row.status == status)
    }

    /// Waits until the only row of an app is as wanted.
    #[track_caller]
    pub(crate) fn wait_row(&self, name: &str, what: &str, wanted: impl Fn(&Row) -> bool) -> Row {
        wait_until(&format!("{name} is {what}"), SOON, || {
            let rows = self.rows_of(name);
            match rows.as_slice() {
                [row] if wanted(row) => Ok(row.clone()),
                _ => Err(rows.iter().map(|r| (r.pid, r.status.clone(), r.restarts)).collect::<Vec<_>>()),
            }
        })
    }

    // Processes. --------------------------------------------------------------------------------------------------

    /// Every live process of this test, except the test itself and commands it has just ended.
    pub(crate) fn processes(&self) -> Vec<i32> {
        let own = i32::try_from(std::process::id()).expect("a pid");
        let place = self.dir.path().to_str().expect("UTF-8");
        process::pids()
            .into_iter()
            .filter(|pid| *pid != own && process::alive(*pid) && belongs(*pid, place))
            .collect()
    }

    fn daemon_process(&self, word: &str) -> Option<i32> {
        self.processes().into_iter().find(|pid| process::cmdline(*pid).iter().skip(1).any(|arg| arg == word))
    }

    #[track_caller]
    pub(crate) fn keeper(&self) -> i32 {
        self.daemon_process("daemon").unwrap_or_else(|| panic!("no keeper: {}", self.process_list()))
    }

    /// The present supervisor, once there is one.
    #[track_caller]
    pub(crate) fn supervisor(&self) -> i32 {
        wait_until("a supervisor runs", SOON, || {
            self.daemon_process("supervisor").ok_or_else(|| self.process_list())
        })
    }

    /// Ends supervisors as soon as they run, until one is started without what those before it remembered; returns what
    /// `pm list` says then.
    #[track_caller]
    pub(crate) fn wear_out_supervisors(&self) -> Run {
        let keeper = self.keeper();
        let (mut last, mut ended) = (0, 0);
        // Looks at the keeper's children alone, which is quick on a busy machine too.
        wait_until("six supervisors have ended", PATIENT, || {
            let is_new =
                |pid: &i32| *pid != last && process::cmdline(*pid).iter().any(|arg| arg == "supervisor");
            if let Some(pid) = process::children(keeper).into_iter().find(is_new) {
                process::end(pid);
                (last, ended) = (pid, ended + 1);
            }
            if ended < 6 { Err(ended) } else { Ok(()) }
        });
        wait_until("one is started without what it remembered", PATIENT, || {
            let run = self.pm(&["list"]);
            if run.text().contains("without what it remembered") { Ok(run) } else { Err(run) }
        })
    }

    pub(crate) fn has_daemon(&self) -> bool {
        self.daemon_process("daemon").is_some() || self.daemon_process("supervisor").is_some()
    }

    /// As when the machine goes down: nobody lives on.
    pub(crate) fn power_cut(&self) {
        wait_until("all are gone", SOON, || {
            // A supervisor whose keeper is gone may have begun to start the next one.
            self.processes().into_iter().for_each(process::end);
            let left = self.process_list();
            if left.is_empty() { Ok(()) } else { Err(left) }
        });
    }

    pub(crate) fn process_list(&self) -> String {
        let lines: Vec<String> = self.processes().into_iter().map(process::describe).collect();
        lines.join("\n")
    }

    /// What helps to understand a failure.
    fn dump(&self) {
        eprintln!("---- processes\n{}", self.process_list());
        if let Some(list) = attempt(self.command(&["list"]), Duration::from_secs(6)) {
            eprintln!("---- pm list: {}\n{}{}", list.code, list.out, list.err);
        }
        let mut files = vec![self.path().join("pm.log")];
        if let Ok(entries) = fs::read_dir(self.path().join("logs")) {
            files.extend(entries.filter_map(|entry| Some(entry.ok()?.path())));
        }
        for file in files {
            let text = fs::read(&file).unwrap_or_default();
            let tail = &text[text.len().saturating_sub(6000)..];
            eprintln!("---- {}\n{}", file.display(), String::from_utf8_lossy(tail));
        }
    }
}

fn belongs(pid: i32, place: &str) -> bool {
    let names = |text: &str| text == place || text.starts_with(&format!("{place}/"));
    process::environ(pid).iter().any(|(key, value)| (key == MARK || key == "PM_HOME") && names(value))
        || process::cmdline(pid).iter().any(|arg| names(arg))
        || fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| names(&cwd.to_string_lossy()))
}

impl Drop for Home {
    fn drop(&mut self) {
        let failed = std::thread::panicking();
        if failed {
            self.dump();
            // What a failed test has stopped would never obey.
            for pid in self.processes() {
                let _ = nix::sys::signal::kill(
                    nix::unistd::Pid::from_raw(pid),
                    nix::sys::signal::Signal::SIGCONT,
                );
            }
        }
        let killed = if self.processes().is_empty() {
            None
        } else {
            attempt(self.command(&["kill"]), Duration::from_secs(40))
        };
        let deadline = Instant::now() + Duration::from_secs(5);
        while !self.processes().is_empty() && Instant::now() < deadline {
            pause();
        }
        let left = self.process_list();
        while let Some(pid) = self.processes().first() {
            process::end(*pid);
            pause();
        }
        if let Some(groups) = &self.groups {
            groups::remove(groups);
        }
        if !failed && !left.is_empty() {
            panic!("`pm kill` ({killed:?}) left processes behind:\n{left}");
        }
    }
}

// Running commands. -----------------------------------------------------------------------------------------------

/// Runs a command to its end, which must come within `limit`.
#[track_caller]
pub(crate) fn run(command: Command, limit: Duration) -> Run {
    let what = format!("{command:?}");
    attempt(command, limit).unwrap_or_else(|| panic!("not done within {limit:?}: {what}"))
}

/// Runs a command; `None` when it (or whoever inherited its output) is not done within `limit`.
pub(crate) fn attempt(command: Command, limit: Duration) -> Option<Run> {
    let mut running = Running::start(command, b"");
    let deadline = Instant::now() + limit;
    loop {
        if running.is_done() {
            return Some(running.finish());
        }
        if Instant::now() >= deadline {
            let _ = running.child.kill();
            return None;
        }
        pause();
    }
}

/// A command that is still running.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) child: Child,
    out: JoinHandle<Vec<u8>>,
    err: JoinHandle<Vec<u8>>,
    started: Instant,
}

impl Running {
    pub(crate) fn start(mut command: Command, input: &[u8]) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let started = Instant::now();
        let mut child = command.spawn().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
        let mut stdin = child.stdin.take().expect("piped");
        // A command that does not read its input is fine.
        let _ = stdin.write_all(input);
        let out = reader(child.stdout.take().expect("piped"));
        let err = reader(child.stderr.take().expect("piped"));
        Self { child, out, err, started }
    }

    pub(crate) fn pid(&self) -> i32 {
        self.child.id().try_into().expect("a pid")
    }

    /// Exited, and nobody holds its output any more.
    pub(crate) fn is_done(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(_))) && self.out.is_finished() && self.err.is_finished()
    }

    pub(crate) fn finish(mut self) -> Run {
        use std::os::unix::process::ExitStatusExt as _;
        let status = self.child.wait().expect("its end");
        let took = Instant::now().duration_since(self.started);
        let text =
            |reader: JoinHandle<Vec<u8>>| String::from_utf8_lossy(&reader.join().expect("read")).into_owned();
        Run {
            code: status.code().unwrap_or_else(|| -status.signal().unwrap_or(0)),
            out: text(self.out),
            err: text(self.err),
            took,
        }
    }

    /// Waits for its end.
    #[track_caller]
    pub(crate) fn end(mut self, within: Duration) -> Run {
        wait_until("the command ends", within, || if self.is_done() { Ok(()) } else { Err("running") });
        self.finish()
    }
}

fn reader(mut from: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = from.read_to_end(&mut bytes);
        bytes
    })
}
