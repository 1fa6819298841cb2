//! A home of its own, a supervisor made of a closure, and a terminal that remembers.

use std::cell::RefCell;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use pm::cli::output::{Look, Terminal};
use pm::cli::{Invocation, Surroundings, parse};
use pm::ipc::protocol::{Call, Line, Reply, Request};
use pm::store::paths::Home;
use tempfile::TempDir;

/// What the supervisor does with a connection after a request.
pub(crate) enum Then {
    /// Goes on reading.
    Stay,
    /// Closes it, as when it crashes.
    Crash,
    /// Holds it and says nothing more.
    Silence,
}

type Script = Box<dyn FnMut(&Request) -> (Vec<Reply>, Then) + Send>;

/// A supervisor that answers from a script, in a thread of its own.
pub(crate) struct Supervisor {
    path: PathBuf,
    asked: Arc<Mutex<Vec<String>>>,
    ending: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Supervisor {
    pub(crate) fn start(
        home: &Path,
        script: impl FnMut(&Request) -> (Vec<Reply>, Then) + Send + 'static,
    ) -> Self {
        let home = Home::at(home).unwrap();
        home.create().unwrap();
        let path = home.sock();
        let listener = UnixListener::bind(&path).unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let ending = Arc::new(AtomicBool::new(false));
        let (log, stop) = (Arc::clone(&asked), Arc::clone(&ending));
        let thread = std::thread::spawn(move || {
            let mut script: Script = Box::new(script);
            let mut held = Vec::new();
            for stream in listener.incoming() {
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                let stream = stream.unwrap();
                if let Some(silent) = converse(stream, &mut script, &log) {
                    held.push(silent);
                }
            }
        });
        Self { path, asked, ending, thread: Some(thread) }
    }

    /// One connection after the other is enough for one command.
    pub(crate) fn answering(
        home: &Path,
        mut answer: impl FnMut(&Request) -> Vec<Reply> + Send + 'static,
    ) -> Self {
        Self::start(home, move |request| (answer(request), Then::Stay))
    }

    /// The requests so far, as JSON.
    pub(crate) fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::SeqCst);
        // Wakes accept; the path goes away with the home.
        let _ = UnixStream::connect(&self.path);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Returns the stream when it is to be held without a word.
fn converse(stream: UnixStream, script: &mut Script, log: &Mutex<Vec<String>>) -> Option<UnixStream> {
    let mut lines = BufReader::new(stream.try_clone().unwrap());
    let mut text = String::new();
    loop {
        text.clear();
        if lines.read_line(&mut text).unwrap_or(0) == 0 {
            return None;
        }
        let call: Call = serde_json::from_str(&text).unwrap();
        log.lock().unwrap().push(serde_json::to_string(&call.request).unwrap());
        let (replies, then) = script(&call.request);
        for reply in replies {
            let mut bytes = serde_json::to_vec(&Line { op: call.op, reply }).unwrap();
            bytes.push(b'\n');
            if (&stream).write_all(&bytes).is_err() {
                return None;
            }
        }
        match then {
            Then::Stay => {}
            Then::Crash => return None,
            Then::Silence => return Some(stream),
        }
    }
}

/// What a command printed, and its exit code.
pub(crate) struct Ran {
    pub(crate) code: u8,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Ran {
    /// For snapshots.
    pub(crate) fn whole(&self) -> String {
        let mut text = format!("exit {}\n", self.code);
        if !self.out.is_empty() {
            text.push_str(&format!("--- out\n{}", self.out));
        }
        if !self.err.is_empty() {
            text.push_str(&format!("--- err\n{}", self.err));
        }
        text
    }
}

/// A home that goes away with it.
pub(crate) struct World {
    dir: TempDir,
    pub(crate) look: Look,
    pub(crate) program: PathBuf,
}

impl World {
    pub(crate) fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("pm").tempdir().unwrap();
        Self { dir, look: Look::PLAIN, program: "/nonexistent/pm".into() }
    }

    pub(crate) fn home(&self) -> PathBuf {
        self.dir.path().join("home")
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    /// Runs `pm` with these words.
    pub(crate) fn run(&self, line: &str) -> Ran {
        self.run_words(&line.split_whitespace().collect::<Vec<_>>())
    }

    pub(crate) fn run_words(&self, words: &[&str]) -> Ran {
        let surroundings = Surroundings {
            pm_home: Some(self.home().into_os_string()),
            show_env: false,
            program: self.program.clone(),
            zone: Some(jiff::tz::TimeZone::UTC),
        };
        let args = std::iter::once("pm").chain(words.iter().copied()).map(Into::into);
        let Invocation::Client(client) = parse(args, &surroundings) else { panic!("no command: {words:?}") };
        let (out, err) = (Kept::default(), Kept::default());
        let look = Look { silent: words.contains(&"-s"), ..self.look };
        let terminal = Terminal::of_streams(Box::new(out.clone()), Box::new(err.clone()), look);
        let code = client.run_on(terminal, surroundings);
        Ran { code, out: self.masked(&out), err: self.masked(&err) }
    }

    /// The directory has another name on every run.
    fn masked(&self, kept: &Kept) -> String {
        String::from_utf8(kept.0.borrow().clone())
            .unwrap()
            .replace(self.dir.path().to_str().unwrap(), "<dir>")
    }
}

/// A stream that keeps what is written.
#[derive(Clone, Default)]
struct Kept(Rc<RefCell<Vec<u8>>>);

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.borrow_mut().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
