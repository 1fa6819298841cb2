//! Output of apps on our own standard output and standard error, for a daemon in the foreground.
//!
//! Whole lines, each with its app's name before it or as a JSON object; or byte for byte. Two lanes, as there are two
//! streams; an app's stdout goes to ours and its stderr to ours, so that whoever collects them can still tell them
//! apart.
//!
//! A reader that is slow slows the apps down, as it would without us, for at most `PATIENCE`: one that has gone away
//! or hangs stops nobody. What it did not take is counted, and said as soon as it takes lines again.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::write;

use super::recent::Stream;
use crate::model::foreground::LineForm;
use crate::model::id::{AppName, InstanceId};

/// How long a reader that takes nothing is waited for.
const PATIENCE: Duration = Duration::from_secs(5);
/// A pipe that is ready has room for so much (PIPE_BUF, pipe(7)): a write of it never waits.
const PIECE: usize = 4096;
/// How much of a line without an end is held.
const HELD_MAX: usize = 64 * 1024;

/// Our own two streams, and how lines look on them. Clones are the same streams.
#[derive(Clone, Debug)]
pub struct Console {
    form: LineForm,
    colors: bool,
    out: Arc<Mutex<Lane>>,
    err: Arc<Mutex<Lane>>,
}

impl Console {
    /// Prints on these descriptors.
    #[must_use]
    pub fn new(form: LineForm, colors: bool, out: OwnedFd, err: OwnedFd) -> Self {
        let lane = |fd| Arc::new(Mutex::new(Lane { fd, state: State::Taking, patience: PATIENCE }));
        Self { form, colors, out: lane(out), err: lane(err) }
    }

    /// The way of one stream of an instance. `alone`: its app has no other one, so its number says nothing. `mark` goes
    /// before each line.
    #[must_use]
    pub fn tap(&self, id: &InstanceId, alone: bool, mark: &str) -> Tap {
        let name =
            if alone || id.slot.is_hook() { id.app.to_string() } else { format!("{}:{}", id.app, id.slot) };
        let head = match (self.form, self.colors) {
            (LineForm::Text, false) => format!("{name} | {mark}"),
            (LineForm::Text, true) => format!("\x1b[{}m{name} |\x1b[0m {mark}", color_of(&id.app)),
            (LineForm::Json | LineForm::Raw, _) => mark.to_owned(),
        };
        let instance = (!id.slot.is_hook()).then_some(id.slot.0);
        Tap { console: self.clone(), app: id.app.clone(), instance, head }
    }
}

/// The same color for the same name on every run.
fn color_of(app: &AppName) -> u8 {
    const COLORS: [u8; 6] = [36, 33, 35, 34, 32, 96];
    let sum =
        app.as_str().bytes().fold(0_usize, |sum, byte| sum.wrapping_mul(31).wrapping_add(usize::from(byte)));
    COLORS[sum % COLORS.len()]
}

/// How the lines of an instance look, and where they go.
#[derive(Clone, Debug)]
pub struct Tap {
    console: Console,
    app: AppName,
    instance: Option<u32>,
    head: String,
}

/// One stream of an instance on its way to the console.
pub(crate) struct Lines {
    tap: Tap,
    stream: Stream,
    held: Vec<u8>,
}

impl fmt::Debug for Lines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lines").field("app", &self.tap.app).finish_non_exhaustive()
    }
}

impl Lines {
    pub(crate) const fn new(tap: Tap, stream: Stream) -> Self {
        Self { tap, stream, held: Vec::new() }
    }

    /// Takes a chunk as it was read, and prints what is complete.
    pub(crate) fn feed(&mut self, chunk: &[u8], now: Timestamp) {
        if self.tap.console.form == LineForm::Raw {
            return self.print(chunk);
        }
        let end = memchr::memrchr(b'\n', chunk).map_or(0, |newline| newline + 1);
        let (whole, rest) = chunk.split_at(end);
        if !whole.is_empty() {
            let mut text = Vec::with_capacity(whole.len() * 2);
            let held = std::mem::take(&mut self.held);
            let mut first = Some(held);
            for line in whole.split_inclusive(|&byte| byte == b'\n') {
                let line = line.strip_suffix(b"\n").unwrap_or(line);
                match first.take().filter(|held| !held.is_empty()) {
                    Some(mut begun) => {
                        begun.extend_from_slice(line);
                        self.put(&begun, now, &mut text);
                    }
                    None => self.put(line, now, &mut text),
                }
            }
            self.print(&text);
        }
        self.held.extend_from_slice(rest);
        if self.held.len() > HELD_MAX {
            self.finish(now);
        }
    }

    /// Prints a line that has no end.
    pub(crate) fn finish(&mut self, now: Timestamp) {
        if self.held.is_empty() {
            return;
        }
        let held = std::mem::take(&mut self.held);
        let mut text = Vec::new();
        self.put(&held, now, &mut text);
        self.print(&text);
    }

    fn put(&self, line: &[u8], now: Timestamp, text: &mut Vec<u8>) {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let Tap { console, app, instance, head } = &self.tap;
        if console.form == LineForm::Json {
            let stream = match self.stream {
                Stream::Out => "stdout",
                Stream::Err => "stderr",
            };
            let line = String::from_utf8_lossy(line);
            let line = if head.is_empty() { line } else { format!("{head}{line}").into() };
            text.extend_from_slice(json_line(now, app.as_str(), *instance, stream, &line).as_bytes());
        } else {
            text.extend_from_slice(head.as_bytes());
            text.extend_from_slice(line);
        }
        text.push(b'\n');
    }

    fn print(&self, bytes: &[u8]) {
        let lane = match self.stream {
            Stream::Out => &self.tap.console.out,
            Stream::Err => &self.tap.console.err,
        };
        lane.lock().unwrap_or_else(PoisonError::into_inner).print(bytes);
    }
}

/// A line as an object for programs, without its end.
#[must_use]
pub fn json_line(now: Timestamp, app: &str, instance: Option<u32>, stream: &str, line: &str) -> String {
    // In this order, which a map of serde_json would not keep.
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    let instance = instance.map_or_else(|| "null".to_owned(), |number| number.to_string());
    format!(
        r#"{{"time":"{now:.3}","app":{},"instance":{instance},"stream":"{stream}","line":{}}}"#,
        quoted(app),
        quoted(line)
    )
}

/// One of our two streams.
#[derive(Debug)]
struct Lane {
    fd: OwnedFd,
    state: State,
    patience: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Taking,
    /// It took nothing for as long as anybody waits. So many bytes are lost since.
    Lost {
        bytes: u64,
        mid_line: bool,
    },
}

impl Lane {
    fn print(&mut self, bytes: &[u8]) {
        if let State::Lost { bytes: lost, mid_line } = self.state {
            if !self.is_ready(Duration::ZERO) {
                self.lose(lost, bytes, mid_line);
                return;
            }
            let newline = if mid_line { "\n" } else { "" };
            let notice = format!("{newline}[pm] {lost} bytes of output were lost here: nobody took them\n");
            self.state = State::Taking;
            if let Err(written) = self.write_all(notice.as_bytes()) {
                // It is still owed, and what there is of it is in the way.
                return self.lose(lost, bytes, written > 0);
            }
        }
        if let Err(written) = self.write_all(bytes) {
            let mid_line = written > 0 && bytes.get(written - 1) != Some(&b'\n');
            self.lose(0, &bytes[written..], mid_line);
        }
    }

    fn lose(&mut self, before: u64, bytes: &[u8], mid_line: bool) {
        self.state = State::Lost { bytes: before + bytes.len() as u64, mid_line };
    }

    /// Writes everything, or says how far it came.
    fn write_all(&self, bytes: &[u8]) -> Result<(), usize> {
        let mut written = 0;
        while written < bytes.len() {
            if !self.is_ready(self.patience) {
                return Err(written);
            }
            let rest = &bytes[written..];
            let room = rest.len().min(PIECE);
            // At a line's end where there is one: others print on the same terminal.
            let piece = memchr::memrchr(b'\n', &rest[..room]).map_or(room, |newline| newline + 1);
            match write(&self.fd, &rest[..piece]) {
                Ok(0) => return Err(written),
                Ok(count) => written += count,
                Err(Errno::EINTR | Errno::EAGAIN) => {}
                Err(_) => return Err(written),
            }
        }
        Ok(())
    }

    fn is_ready(&self, patience: Duration) -> bool {
        let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::ZERO);
        let mut polled = [PollFd::new(self.fd.as_fd(), PollFlags::POLLOUT)];
        match poll(&mut polled, timeout) {
            Ok(_) => {
                let events = polled[0].revents().unwrap_or(PollFlags::empty());
                // A pipe without a reader is ready for an error, and nobody waits for that.
                events.contains(PollFlags::POLLOUT)
                    && !events.intersects(PollFlags::POLLERR | PollFlags::POLLNVAL)
            }
            // A signal; the write decides.
            Err(_) => true,
        }
    }
}

/// Prints a piece of text on a descriptor if that takes it at once, for news that nobody waits with.
pub fn print_at_once(fd: impl AsFd, bytes: &[u8]) {
    let mut polled = [PollFd::new(fd.as_fd(), PollFlags::POLLOUT)];
    let ready = poll(&mut polled, PollTimeout::ZERO);
    let events = polled[0].revents().unwrap_or(PollFlags::empty());
    if ready.is_ok() && events.contains(PollFlags::POLLOUT) {
        let _ = write(fd, &bytes[..bytes.len().min(PIECE)]);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read as _;

    use nix::unistd::pipe;

    use super::*;
    use crate::model::id::{Generation, Slot};

    fn now() -> Timestamp {
        "2024-02-05T13:04:09.1234Z".parse().unwrap()
    }

    fn id(app: &str) -> InstanceId {
        InstanceId { app: AppName::new(app).unwrap(), slot: Slot(2), generation: Generation(1) }
    }

    /// What chunks of one stream look like.
    fn check(form: LineForm, alone: bool, mark: &str, chunks: &[&[u8]], expected: &str) {
        let (reader, writer) = pipe().unwrap();
        let console = Console::new(form, false, writer, File::open("/dev/null").unwrap().into());
        let mut lines = Lines::new(console.tap(&id("api"), alone, mark), Stream::Out);
        for chunk in chunks {
            lines.feed(chunk, now());
        }
        lines.finish(now());
        drop((lines, console));
        let mut text = String::new();
        File::from(reader).read_to_string(&mut text).unwrap();
        assert_eq!(text, expected);
    }

    #[test]
    fn lines_are_whole_and_say_whose_they_are() {
        let chunks: [&[u8]; 4] = [b"o", b"ne\ntw", b"o\r\n\n", b"end"];
        check(LineForm::Text, true, "", &chunks, "api | one\napi | two\napi | \napi | end\n");
        check(LineForm::Text, false, "[hook] ", &chunks[..2], "api:2 | [hook] one\napi:2 | [hook] tw\n");
        check(LineForm::Raw, true, "", &chunks, "one\ntwo\r\n\nend");
    }

    #[test]
    fn json_holds_exact_text() {
        let line = |text: &str| {
            format!(
                "{{\"time\":\"2024-02-05T13:04:09.123Z\",\"app\":\"api\",\"instance\":2,\"stream\":\"stdout\",\"line\":{text}}}\n"
            )
        };
        let expected = [line("\"a \\\"b\\\" \\t\""), line("\"\u{fffd}\"")].concat();
        check(LineForm::Json, true, "", &[b"a \"b\" \t\n\xff"], &expected);
        check(LineForm::Json, true, "[hook] ", &[b"x\n"], &line("\"[hook] x\""));
    }

    #[test]
    fn a_line_without_end_is_bounded() {
        let (_, writer) = pipe().unwrap();
        let console = Console::new(LineForm::Text, false, writer, File::open("/dev/null").unwrap().into());
        let mut lines = Lines::new(console.tap(&id("api"), true, ""), Stream::Out);
        for _ in 0..100 {
            lines.feed(&[b'x'; 10_000], now());
            assert!(lines.held.capacity() <= 2 * (HELD_MAX + 10_000));
        }
    }

    #[test]
    fn a_reader_that_takes_nothing_is_waited_for_once_and_hears_what_it_lost() {
        let (reader, writer) = pipe().unwrap();
        let mut lane = Lane { fd: writer, state: State::Taking, patience: Duration::from_millis(20) };
        let line = [b"x".repeat(1023).as_slice(), b"\n"].concat();
        for _ in 0..100 {
            lane.print(&line);
        }
        let State::Lost { bytes, .. } = lane.state else { panic!("{lane:?}") };
        assert!(bytes > 0 && bytes < 100 * 1024, "{bytes}");
        let mut reader = File::from(reader);
        let mut taken = vec![0; 100 * 1024 - usize::try_from(bytes).unwrap()];
        reader.read_exact(&mut taken).unwrap();
        lane.print(b"after\n");
        drop(lane);
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, format!("[pm] {bytes} bytes of output were lost here: nobody took them\nafter\n"));
    }

    #[test]
    fn a_reader_that_is_gone_costs_nothing() {
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let mut lane = Lane { fd: writer, state: State::Taking, patience: Duration::from_secs(600) };
        lane.print(b"one\n");
        lane.print(b"two\n");
        assert_eq!(lane.state, State::Lost { bytes: 8, mid_line: false });
    }
}
