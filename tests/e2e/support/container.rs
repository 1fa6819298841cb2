//! A container as far as a process manager sees one: a pid namespace whose first process is `pm run`.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;

use super::home::{Home, Run, run};
use super::{PATIENT, not_here, process, wait_until};

/// Whether namespaces can be made here; says why not.
pub(crate) fn possible() -> bool {
    let works = Command::new("unshare")
        .args(["--pid", "--fork", "--mount-proc", "--kill-child", "true"])
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !works {
        not_here("needs root and unshare(1) to make a pid namespace");
    }
    works
}

/// Ends with the test.
pub(crate) struct Container {
    child: Child,
    /// Its first process, as this machine counts, unless it had ended before it was seen.
    init: Option<i32>,
    out: Stream,
    err: Stream,
}

struct Stream {
    text: Arc<Mutex<Vec<u8>>>,
    reader: Option<JoinHandle<()>>,
}

impl Stream {
    fn of(mut from: impl Read + Send + 'static) -> Self {
        let text = Arc::new(Mutex::new(Vec::new()));
        let taken = text.clone();
        let reader = std::thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(count @ 1..) = from.read(&mut chunk) {
                taken.lock().unwrap().extend_from_slice(&chunk[..count]);
            }
        });
        Self { text, reader: Some(reader) }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.text.lock().unwrap()).into_owned()
    }
}

impl Container {
    /// `pm run` with these arguments as process 1.
    pub(crate) fn run(home: &Home, args: &[&str]) -> Self {
        Self::with(home, "", &format!("exec {} run {}", env!("CARGO_BIN_EXE_pm"), args.join(" ")))
    }

    /// This line of shell as process 1, in a mount namespace prepared by another one.
    pub(crate) fn with(home: &Home, mounts: &str, line: &str) -> Self {
        let mut command = Command::new("unshare");
        home.environment(&mut command);
        command.env_remove("PM_HOME").env_remove("HOME").env_remove("USER");
        command.args(["--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c"]);
        // Its own memory, as a container has.
        let line = format!("mount -t tmpfs tmpfs /dev/shm && chmod 1777 /dev/shm && {mounts} {line}");
        let mut child = command
            .arg(line)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let out = Stream::of(child.stdout.take().unwrap());
        let err = Stream::of(child.stderr.take().unwrap());
        let holder = i32::try_from(child.id()).unwrap();
        let init = wait_until("the first process", PATIENT, || match process::children(holder).first() {
            None if process::alive(holder) => Err(()),
            init => Ok(init.copied()),
        });
        Self { child, init, out, err }
    }

    /// Its first process, as this machine counts.
    #[track_caller]
    pub(crate) fn init(&self) -> i32 {
        self.init.expect("it was running when it was looked for")
    }

    pub(crate) fn out(&self) -> String {
        self.out.text()
    }

    pub(crate) fn err(&self) -> String {
        self.err.text()
    }

    /// Waits until an app has said this.
    #[track_caller]
    pub(crate) fn says(&self, wanted: &str) -> String {
        wait_until(&format!("{wanted:?} in the output"), PATIENT, || {
            let text = self.out() + &self.err();
            if text.contains(wanted) { Ok(text) } else { Err(text) }
        })
    }

    /// `docker exec`: a command in the same namespaces, without a hint where anything is.
    pub(crate) fn exec(&self, home: &Home, args: &[&str]) -> Run {
        let mut command = Command::new("nsenter");
        home.environment(&mut command);
        command.env_remove("PM_HOME").env_remove("HOME");
        command.args(["-t", &self.init().to_string(), "-p", "-m", "--"]).args(args);
        run(command, Duration::from_secs(60))
    }

    pub(crate) fn pm(&self, home: &Home, args: &[&str]) -> Run {
        self.exec(home, &[&[env!("CARGO_BIN_EXE_pm")], args].concat())
    }

    #[track_caller]
    pub(crate) fn jlist(&self, home: &Home) -> Vec<Value> {
        let run = self.pm(home, &["jlist"]);
        assert_eq!(run.code, 0, "{run:#?}");
        run.json().as_array().unwrap().clone()
    }

    /// Waits until every instance is online, and says which pids they have in the container.
    #[track_caller]
    pub(crate) fn online(&self, home: &Home, instances: usize) -> Vec<i64> {
        wait_until("everything is online", PATIENT, || {
            let rows = self.jlist(home);
            let online = rows.iter().filter(|row| row["pm2_env"]["status"] == "online");
            let pids: Vec<i64> = online.map(|row| row["pid"].as_i64().unwrap()).collect();
            if pids.len() == instances { Ok(pids) } else { Err(self.out() + &self.err()) }
        })
    }

    pub(crate) fn signal(&self, signal: Signal) {
        process::signal(self.init(), signal);
    }

    pub(crate) fn is_over(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Waits for its end: the exit code, and all output.
    #[track_caller]
    pub(crate) fn end(mut self, within: Duration) -> (i32, String, String) {
        wait_until("the container ends", within, || {
            if self.is_over() { Ok(()) } else { Err(self.out() + &self.err()) }
        });
        let code = self.child.wait().unwrap().code().unwrap_or(-1);
        for stream in [&mut self.out, &mut self.err] {
            stream.reader.take().unwrap().join().unwrap();
        }
        (code, self.out(), self.err())
    }

    /// Zombies among its processes.
    pub(crate) fn zombies(&self) -> Vec<String> {
        let namespace = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let own = namespace(self.init());
        let is_zombie = |pid: &i32| process::stat(*pid).is_some_and(|stat| stat.state == 'Z');
        let mut found: Vec<i32> = process::tree(self.init()).into_iter().filter(is_zombie).collect();
        found.retain(|pid| namespace(*pid).is_none_or(|place| Some(&place) == own.as_ref()));
        found.into_iter().map(process::describe).collect()
    }

    /// A file of the container.
    pub(crate) fn exists(&self, path: &str) -> bool {
        Path::new(&format!("/proc/{}/root{path}", self.init())).symlink_metadata().is_ok()
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // With it goes everything in its namespace.
            self.init.into_iter().for_each(process::end);
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
