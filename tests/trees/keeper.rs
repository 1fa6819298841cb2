//! A process that plays the keeper: a child subreaper and the parent of the instances.

use std::fs;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pm::model::id::{AppName, Generation, InstanceId, Slot};
use pm::model::moment::Moment;
use pm::model::signal::Signal;
use pm::model::spec::KillMode;
use pm::sys::procfs::Procfs;
use pm::sys::tree::worker::{Instance, Outcome, TreeEvent, TreeOp, TreeWorker};
use pm::sys::tree::{Root, Scanner, Snapshot};

pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
const ROLE: &str = "PM_TEST_KEEPER";

/// Runs a test again in a child process that is a subreaper, where `body` does the work.
pub(crate) fn as_keeper(test: &str, body: impl FnOnce(&mut Keeper)) {
    if std::env::var_os(ROLE).is_some() {
        nix::sys::prctl::set_child_subreaper(true).unwrap();
        let (event_tx, event_rx) = mpsc::channel();
        let worker = TreeWorker::start(me(), move |event| {
            let _ = event_tx.send(event);
        })
        .unwrap();
        let mut keeper = Keeper {
            worker,
            events: event_rx,
            scanner: Scanner::new(),
            dir: tempfile::tempdir().unwrap(),
            instances: Vec::new(),
        };
        body(&mut keeper);
        return;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(ROLE, "1")
        .output()
        .unwrap();
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

pub(crate) struct Keeper {
    pub(crate) worker: TreeWorker,
    pub(crate) events: Receiver<TreeEvent>,
    pub(crate) scanner: Scanner,
    pub(crate) dir: tempfile::TempDir,
    pub(crate) instances: Vec<Instance>,
}

impl Keeper {
    /// Starts a command in a session of its own, as the keeper does.
    pub(crate) fn start(&mut self, command: &[&str]) -> Instance {
        let slot = u32::try_from(self.instances.len()).unwrap();
        let id =
            InstanceId { app: AppName::new("tree").unwrap(), slot: Slot(slot), generation: Generation(1) };
        let token = format!("tree:{slot}:1:{}", me());
        let child = Command::new("setsid")
            .args(command)
            .current_dir(self.dir.path())
            .env("PM_INSTANCE", &token)
            .env_remove(ROLE)
            .env("npm_config_update_notifier", "false")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        // Reaped by nobody until this process ends: a zombie, as the keeper leaves it.
        drop(child);
        let stat = self.scanner.procfs().stat(pid).unwrap().unwrap();
        let instance = Instance { id, root: Root { main: stat.process, token, group: None } };
        self.instances.push(instance.clone());
        wait_for("setsid", || {
            self.scanner
                .procfs()
                .stat(pid)
                .unwrap()
                .is_none_or(|s| s.session == pid && s.comm.as_bytes() != b"setsid")
        });
        instance
    }

    pub(crate) fn file(&self, name: &str, text: &str) {
        fs::write(self.dir.path().join(name), text).unwrap();
    }

    /// Waits until the app has written this file, and returns its text.
    pub(crate) fn said(&self, name: &str) -> String {
        let path = self.dir.path().join(name);
        wait_for(name, || fs::read_to_string(&path).is_ok_and(|text| text.ends_with('\n')));
        fs::read_to_string(&path).unwrap().trim().to_owned()
    }

    pub(crate) fn living(&mut self, instance: &Instance) -> Vec<String> {
        let snapshot = Snapshot::take(&mut self.scanner, me(), std::slice::from_ref(&instance.root)).unwrap();
        let mut names = Vec::new();
        for stat in snapshot.trees[0].living() {
            // Newer versions of Node give their first thread another name.
            let program = self.scanner.procfs().program(stat.process.pid);
            let comm = stat.comm.to_string();
            let renamed = program.as_deref() == Some("node") && !comm.starts_with("npm");
            names.push(if renamed { "node".to_owned() } else { comm });
        }
        names.sort();
        names
    }

    pub(crate) fn wait_for_living(&mut self, instance: &Instance, expected: &[&str]) {
        let mut last = Vec::new();
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            last = self.living(instance);
            if last == expected {
                return;
            }
            pause();
        }
        panic!("expected {expected:?}, have {last:?}");
    }

    pub(crate) fn ask(&self, instance: &Instance, op: TreeOp) -> Outcome {
        self.worker.ask(instance.clone(), op);
        let event = self.events.recv_timeout(PATIENCE).unwrap();
        assert_eq!((&event.id, event.op), (&instance.id, op));
        event.outcome
    }

    pub(crate) fn ask_until_empty(&mut self, instance: &Instance, op: TreeOp) -> Duration {
        let begin = Instant::now();
        let outcome = self.ask(instance, op);
        let took = Instant::now() - begin;
        assert!(matches!(outcome, Outcome::Empty), "{outcome:?}");
        assert_eq!(self.living(instance), [""; 0]);
        took
    }

    pub(crate) fn stop(&mut self, instance: &Instance) -> Vec<i32> {
        match self.ask(instance, TreeOp::Stop { mode: KillMode::Target, signal: Signal::INT }) {
            Outcome::Signalled(told) => told.into_iter().map(|process| process.pid).collect(),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn kill_main(&mut self, instance: &Instance) {
        let told = self.ask(instance, TreeOp::Signal { mode: KillMode::Main, signal: Signal::KILL });
        assert!(matches!(&told, Outcome::Signalled(pids) if pids[..] == [instance.root.main]), "{told:?}");
        let pid = instance.root.main.pid;
        wait_for("main to end", || !self.scanner.procfs().stat(pid).unwrap().unwrap().alive());
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // Also after a failed assertion nothing may stay behind.
        let mut asked = self.instances.len();
        for instance in std::mem::take(&mut self.instances) {
            self.worker.ask(instance, TreeOp::KillAll);
        }
        let end = Instant::now() + PATIENCE;
        while asked > 0
            && let Ok(event) = self.events.recv_timeout(end.saturating_duration_since(Instant::now()))
        {
            asked -= usize::from(event.op == TreeOp::KillAll);
        }
    }
}

/// Reaps what was inherited, as the keeper does: everything but main processes.
pub(crate) fn reap_orphans(mains: Arc<Mutex<Vec<i32>>>) {
    std::thread::spawn(move || {
        let mut procfs = Procfs::new();
        let mut listed = Vec::new();
        loop {
            listed.clear();
            procfs.children(me(), 1, &mut listed).unwrap();
            let mains = mains.lock().unwrap();
            for &pid in &listed {
                let stat = procfs.stat(pid).unwrap();
                if !mains.contains(&pid) && stat.is_some_and(|stat| !stat.alive()) {
                    let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None);
                }
            }
            drop(mains);
            pause();
        }
    });
}

pub(crate) fn me() -> i32 {
    i32::try_from(std::process::id()).unwrap()
}

pub(crate) fn pause() {
    std::thread::park_timeout(Duration::from_millis(5));
}

pub(crate) fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < end, "waited in vain for {what}");
        pause();
    }
}

pub(crate) fn await_empty() -> TreeOp {
    TreeOp::AwaitEmpty { deadline: moment() + PATIENCE }
}

pub(crate) fn moment() -> Moment {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap();
    Moment::from_nanos(u64::try_from(Duration::from(now).as_nanos()).unwrap())
}
