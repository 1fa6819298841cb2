//! What an app writes to its pipes, on its way to a file, and what is read back.

use std::fs;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use pm::logs::{Attachment, Journal, LogEvent, LogHandle, Pipe, Target, spawn, tail};
use pm::model::id::{AppName, Generation, InstanceId, Slot};
use pm::model::spec::Overflow;

/// A pump, and the directory that it writes to.
struct World {
    logs: LogHandle,
    events: Receiver<LogEvent>,
    dir: tempfile::TempDir,
    generation: u64,
}

thread_local! {
    /// One pump for all inputs of a thread.
    static WORLD: std::cell::RefCell<Option<World>> = const { std::cell::RefCell::new(None) };
}

/// The first byte says whether two streams share a file and whether lines are marked, the second how many bytes are
/// written at a time; the rest goes to both streams in turn. What is in the files is what was written, line by line.
pub(crate) fn log_framing(input: &[u8]) {
    let [how, step, bytes @ ..] = input else { return };
    // More than a pipe holds would need a second thread.
    let bytes = &bytes[..bytes.len().min(4000)];
    WORLD.with_borrow_mut(|world| {
        world.get_or_insert_with(World::new).write(
            how & 1 == 1,
            how & 2 == 2,
            usize::from(*step).max(1),
            bytes,
        );
    });
}

impl World {
    fn new() -> Self {
        let (events_tx, events) = channel();
        let journal = Journal::private().expect("memory");
        let logs = spawn(journal, move |event| drop(events_tx.send(event))).expect("a pump");
        Self { logs, events, dir: tempfile::tempdir().expect("a directory"), generation: 0 }
    }

    fn write(&mut self, shared: bool, marked: bool, step: usize, bytes: &[u8]) {
        self.generation += 1;
        let id = InstanceId {
            app: AppName::new("app").expect("a name"),
            slot: Slot(0),
            generation: Generation(self.generation),
        };
        let paths = ["out", if shared { "out" } else { "err" }]
            .map(|name| self.dir.path().join(format!("{name}-{}", self.generation)));
        let (mut writers, mut pipes) = (Vec::new(), Vec::new());
        for path in &paths {
            let (read, write) = std::io::pipe().expect("a pipe");
            writers.push(write);
            pipes.push(Pipe { fd: OwnedFd::from(read), target: Target::file(path.clone(), None) });
        }
        let (err, out) = (pipes.pop(), pipes.pop());
        let mark = if marked { "> ".to_owned() } else { String::new() };
        // Nothing may be dropped on a slow disk: each line is looked for.
        let overflow = Overflow::Block;
        let attachment = Attachment { id: id.clone(), out, err, stamp: None, overflow, mark, watch: None };
        self.logs.attach(attachment).expect("attached");
        let mut sent = [Vec::new(), Vec::new()];
        for (index, chunk) in bytes.chunks(step).enumerate() {
            writers[index % 2].write_all(chunk).expect("written");
            sent[index % 2].extend_from_slice(chunk);
        }
        drop(writers);
        self.logs.finish(id.clone());
        let drained = LogEvent::Drained { id: id.clone() };
        while self.events.recv_timeout(Duration::from_secs(20)).expect("drained in time") != drained {}
        self.logs.forget(&id);
        if shared {
            check_shared(&fs::read(&paths[0]).unwrap_or_default(), &sent, marked);
        } else {
            for (path, sent) in paths.iter().zip(&sent) {
                check(&fs::read(path).unwrap_or_default(), sent, marked);
            }
        }
        check_tail(&paths[0]);
        for path in paths {
            let _ = fs::remove_file(path);
        }
    }
}

/// A stream that has its file for itself.
fn check(file: &[u8], sent: &[u8], marked: bool) {
    if !marked {
        return assert_eq!(text(file), text(sent), "byte for byte");
    }
    assert_eq!(unmarked(file), lines(sent));
}

/// Streams that share a file: no line is torn or lost, and each stream's lines are in order.
fn check_shared(file: &[u8], sent: &[Vec<u8>; 2], marked: bool) {
    let written = if marked { unmarked(file) } else { lines(file) };
    let mut all: Vec<Vec<u8>> = sent.iter().flat_map(|stream| lines(stream)).collect();
    let mut found = written;
    all.sort();
    found.sort();
    assert_eq!(found, all, "every line once");
}

fn unmarked(file: &[u8]) -> Vec<Vec<u8>> {
    let strip = |line: &Vec<u8>| line.strip_prefix(b"> ").expect("a mark before each line").to_vec();
    lines(file).iter().map(strip).collect()
}

fn lines(bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut lines: Vec<Vec<u8>> = bytes.split(|&byte| byte == b'\n').map(<[u8]>::to_vec).collect();
    // Nothing stands behind the last newline.
    if lines.last().is_some_and(Vec::is_empty) {
        lines.pop();
    }
    lines
}

fn check_tail(path: &std::path::Path) {
    let all = lines(&fs::read(path).unwrap_or_default());
    let last = tail::last_lines(path, 3).expect("the last lines").lines;
    assert_eq!(last, all[all.len().saturating_sub(3)..]);
}

fn text(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string()
}
