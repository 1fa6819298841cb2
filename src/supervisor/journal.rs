//! The stream of events: numbered here, remembered in the blob until it is on disk, written on a thread of its own.
//!
//! A line gets its number and its text in the turn in which it happens, is in the blob before that turn's actions are
//! performed, and goes to the thread afterwards. So a supervisor that dies loses none: the next one writes what the blob
//! has and the file has not, and the numbers keep it from writing one twice.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::operations::Ended;
use super::outcome::step_view;
use crate::model::exit::ExitReason;
use crate::model::id::OpId;
use crate::model::moment::{Moment, millis};
use crate::policy::news::{News, What};
use crate::policy::vocabulary::Step;
use crate::store::events::EventFile;
use crate::sys::clock;

/// Lines that wait for a disk that takes none; the oldest go first.
const PENDING_MAX: usize = 4096;

/// A wall clock that differs by this many nanoseconds has been set.
const CLOCK_MOVED: u128 = 1_000_000;

/// A line with its number.
pub type Numbered = (u64, Arc<str>);

/// The lines of one supervisor.
#[derive(Debug)]
pub struct Journal {
    seq: u64,
    epoch: Epoch,
    /// Lines that are not known to be written, oldest first.
    pending: VecDeque<Numbered>,
    /// The last line that was handed to the thread.
    handed: u64,
    /// The last line that the thread has written, or given up.
    written: Arc<AtomicU64>,
    changes: u64,
    jobs_tx: Option<Sender<Vec<Numbered>>>,
    thread: Option<JoinHandle<()>>,
}

/// What the next supervisor has to know of the stream.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct JournalMemo {
    /// The number of the last line.
    pub seq: u64,
    /// Lines that may not be in the file.
    pub pending: Vec<Numbered>,
}

impl Journal {
    /// Goes on where the file and the memo of an earlier supervisor end. A file that cannot be written costs the events
    /// and nothing else.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(path: PathBuf, limit: u64, memo: Option<JournalMemo>) -> std::io::Result<Self> {
        let memo = memo.unwrap_or_default();
        let opened = EventFile::open(&path, limit);
        let last = match &opened {
            Ok((_, last)) => last.unwrap_or(0),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "cannot write events");
                0
            }
        };
        let written = Arc::new(AtomicU64::new(last));
        let (jobs_tx, jobs_rx) = channel();
        let known = written.clone();
        let file = opened.ok().map(|(file, _)| file);
        let thread = thread::Builder::new()
            .name("events".into())
            .spawn(move || run(&Place { path, limit }, file, &jobs_rx, &known))?;
        let pending: VecDeque<_> = memo.pending.into_iter().filter(|(seq, _)| *seq > last).collect();
        Ok(Self {
            seq: memo.seq.max(last),
            epoch: Epoch::now(),
            pending,
            handed: last,
            written,
            changes: 1,
            jobs_tx: Some(jobs_tx),
            thread: Some(thread),
        })
    }

    /// Something happened to the fleet. `asked` says who asked for it where the fleet does not know any more.
    pub fn news(&mut self, news: News, asked: Option<OpId>) {
        let News { at, op, app, run, what } = news;
        let mut line = self.line(at);
        let (name, fields) = match (&what, &run) {
            (What::Step(kind), Some(subject)) => {
                let step = Step { id: subject.id.clone(), pm_id: subject.pm_id, kind: kind.clone() };
                named(json!(step_view(step).step))
            }
            _ => named(words(&what)),
        };
        line.put("event", name);
        line.put("app", app.as_str());
        // A hook has no place of its own: it is its app's.
        if let Some(subject) = run.filter(|subject| !subject.id.slot.is_hook()) {
            line.put("slot", subject.id.slot.0);
            line.put("generation", subject.id.generation.0);
            line.put("pm_id", subject.pm_id.0);
            line.put("pid", subject.pid);
        }
        if let Some(op) = op.or(asked) {
            line.put_op(op);
        }
        line.0.extend(fields);
        self.add(line);
    }

    /// Somebody asked for something.
    pub fn begun(&mut self, at: Moment, op: OpId, verb: &str, apps: &[String]) {
        let mut line = self.line(at);
        line.put("event", "operation_begun");
        line.put_op(op);
        line.put("verb", verb);
        line.put("apps", json!(apps));
        self.add(line);
    }

    /// What became of it.
    pub fn ended(&mut self, at: Moment, op: OpId, ended: &Ended) {
        let mut line = self.line(at);
        line.put("event", "operation_ended");
        line.put_op(op);
        match ended {
            Ok(view) => {
                line.put("ok", view.ok);
                // What an app wrote belongs into its log.
                let apps: Vec<Value> = view
                    .apps
                    .iter()
                    .map(|app| match &app.failure {
                        None => json!({ "app": app.app, "ok": app.ok, "result": app.result }),
                        Some(failure) => json!({
                            "app": app.app, "ok": app.ok, "result": app.result, "cause": failure.cause,
                            "replaced": failure.replaced, "kept": failure.kept,
                        }),
                    })
                    .collect();
                line.put("apps", json!(apps));
            }
            Err(refused) => {
                line.put("ok", false);
                line.put("refused", refused.message.as_str());
            }
        }
        self.add(line);
    }

    /// What was remembered is lost, and with it who was to tell the end of these operations.
    pub fn lost(&mut self, at: Moment, ops: &[String]) {
        let told: Vec<String> = self.pending.iter().map(|(_, line)| line.to_string()).collect();
        for op in ops {
            let is_end = |line: &String| line.contains("\"operation_ended\"") && line.contains(op.as_str());
            if told.iter().any(is_end) {
                continue;
            }
            let mut line = self.line(at);
            line.put("event", "operation_ended");
            line.put("op", op.as_str());
            line.put("ok", false);
            line.put(
                "refused",
                "the daemon was killed in the middle of it; what was begun is finished or undone",
            );
            self.add(line);
        }
    }

    /// Something that concerns the daemon itself.
    pub fn daemon(&mut self, at: Moment, event: &str, fields: Value) {
        let mut line = self.line(at);
        line.put("event", event);
        if let Value::Object(fields) = fields {
            line.0.extend(fields);
        }
        self.add(line);
    }

    fn line(&mut self, at: Moment) -> Line {
        Line::new(at, self.epoch.time_of(at))
    }

    fn add(&mut self, line: Line) {
        self.seq += 1;
        let text = line.numbered(self.seq);
        self.pending.push_back((self.seq, text.into()));
        self.changes += 1;
    }

    /// For the blob.
    #[must_use]
    pub fn memo(&self) -> JournalMemo {
        let written = self.written.load(Ordering::Acquire);
        let pending = self.pending.iter().filter(|(seq, _)| *seq > written).cloned().collect();
        JournalMemo { seq: self.seq, pending }
    }

    /// Counts what changes the memo, what is written excepted: to remember too much does no harm.
    #[must_use]
    pub const fn changes(&self) -> u64 {
        self.changes
    }

    /// Hands over what the blob has by now.
    pub fn hand_over(&mut self) {
        let written = self.written.load(Ordering::Acquire);
        while self.pending.front().is_some_and(|(seq, _)| *seq <= written) {
            self.pending.pop_front();
        }
        if self.handed == self.seq {
            return;
        }
        let new: Vec<_> = self.pending.iter().filter(|(seq, _)| *seq > self.handed).cloned().collect();
        self.handed = self.seq;
        if let Some(jobs_tx) = &self.jobs_tx {
            // The thread lives as long as this sender.
            let _ = jobs_tx.send(new);
        }
        let over = self.pending.len().saturating_sub(PENDING_MAX);
        self.pending.drain(..over);
    }
}

impl Drop for Journal {
    /// Waits until everything that was handed over is written.
    fn drop(&mut self) {
        self.jobs_tx = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A line that has no number yet: its fields in the order in which people read them.
struct Line(Vec<(String, Value)>);

/// The wall clock at the moment zero of ours. Looked up once, so that moments and times have the same order; again when
/// somebody has set the clock, or the machine has slept.
#[derive(Debug)]
struct Epoch(i128);

impl Epoch {
    fn now() -> Self {
        Self(Timestamp::now().as_nanosecond() - i128::from(clock::now().nanos()))
    }

    fn time_of(&mut self, at: Moment) -> Timestamp {
        let now = Self::now();
        if self.0.abs_diff(now.0) > CLOCK_MOVED {
            *self = now;
        }
        Timestamp::from_nanosecond(self.0 + i128::from(at.nanos())).unwrap_or_default()
    }
}

impl Line {
    fn new(at: Moment, time: Timestamp) -> Self {
        let mut line = Self(Vec::new());
        // RFC 3339 in UTC, always with six digits, so that text order is time order.
        line.put("time", time.strftime("%Y-%m-%dT%H:%M:%S%.6fZ").to_string());
        line.put("mono_ns", at.nanos());
        line
    }

    fn put(&mut self, key: &str, value: impl Into<Value>) {
        self.0.push((key.to_owned(), value.into()));
    }

    /// The name of an operation: a text, because it has more digits than a number of JavaScript.
    fn put_op(&mut self, op: OpId) {
        self.put("op", format!("{:016x}", op.0));
    }

    fn numbered(self, seq: u64) -> String {
        let mut text = format!("{{\"seq\":{seq}");
        for (key, value) in self.0 {
            text.push_str(&format!(",{}:{value}", Value::String(key)));
        }
        text.push_str("}\n");
        text
    }
}

/// `"queued"`, or `{"ready": {"after_ms": 3}}`: the name, and the fields.
fn named(value: Value) -> (String, Map<String, Value>) {
    match value {
        Value::String(name) => (name, Map::new()),
        Value::Object(map) => match map.into_iter().next() {
            Some((name, Value::Object(fields))) => (name, fields),
            Some((name, _)) => (name, Map::new()),
            None => (String::new(), Map::new()),
        },
        _ => (String::new(), Map::new()),
    }
}

fn words(what: &What) -> Value {
    let ms = |span: &Duration| millis(*span);
    match what {
        // Only runs take steps.
        What::Step(_) => Value::Null,
        What::InRotation => json!("in_rotation"),
        What::OutOfRotation => json!("out_of_rotation"),
        What::Exited { reason, by_itself: true, uptime } if *reason != ExitReason::Code(0) => {
            json!({ "crashed": { "reason": reason.to_string(), "uptime_ms": ms(uptime) } })
        }
        What::Exited { reason, by_itself, uptime } => {
            let by_itself = *by_itself;
            json!({ "exited": { "reason": reason.to_string(), "by_itself": by_itself, "uptime_ms": ms(uptime) } })
        }
        What::Killed { after } => json!({ "killed": { "after_ms": ms(after) } }),
        What::MemoryExceeded { bytes, limit } => {
            json!({ "memory_exceeded": { "bytes": bytes, "limit": limit } })
        }
        What::RestartScheduled { delay } => json!({ "restart_scheduled": { "in_ms": ms(delay) } }),
        What::Errored { reason } => json!({ "errored": { "reason": reason.to_string() } }),
        What::Ended { reason } => json!({ "ended": { "reason": reason.to_string() } }),
        What::HookEnded { kind, failure } => {
            json!({ "hook_ended": { "hook": kind.to_string(), "failure": failure } })
        }
        What::Waiting { on } => {
            let on: Vec<&str> = on.iter().map(|app| app.as_str()).collect();
            json!({ "waiting": { "on": on } })
        }
    }
}

/// Where the file is.
struct Place {
    path: PathBuf,
    limit: u64,
}

fn run(place: &Place, mut file: Option<EventFile>, jobs_rx: &Receiver<Vec<Numbered>>, written: &AtomicU64) {
    let mut lost = 0_u64;
    while let Ok(mut lines) = jobs_rx.recv() {
        lines.extend(jobs_rx.try_iter().flatten());
        let Some(last) = lines.last().map(|(seq, _)| *seq) else { continue };
        if file.is_none() {
            file = EventFile::open(&place.path, place.limit).ok().map(|(file, _)| file);
        }
        let text: Vec<u8> = lines.iter().flat_map(|(_, line)| line.bytes()).collect();
        match file.as_mut().map(|file| file.append(&text)) {
            Some(Ok(())) => {
                if lost > 0 {
                    tracing::warn!(lost, "events could not be written");
                    lost = 0;
                }
            }
            Some(Err(error)) => {
                if lost == 0 {
                    tracing::warn!(path = %place.path.display(), %error, "cannot write events");
                }
                lost += lines.len() as u64;
                file = None;
            }
            None => lost += lines.len() as u64,
        }
        // What the disk does not take is given up: nothing waits for an event.
        written.store(last, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::ipc::protocol::OperationView;
    use crate::model::id::{AppName, Generation, InstanceId, PmId, Slot};
    use crate::model::saved::HookKind;
    use crate::policy::news::Subject;
    use crate::policy::vocabulary::StepKind;
    use crate::store::events::{FILE_MAX, seq_of, unended_operations};

    fn news(what: What) -> News {
        let app = AppName::new("api").unwrap();
        let id = InstanceId { app: app.clone(), slot: Slot(1), generation: Generation(7) };
        let run = Some(Subject { id, pm_id: PmId(3), pid: Some(99) });
        News { at: clock::now(), op: Some(OpId(5)), app, run, what }
    }

    #[test]
    fn a_line_says_who_when_and_what() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.jsonl");
        let mut journal = Journal::start(path.clone(), FILE_MAX, None).unwrap();
        journal
            .news(news(What::Step(StepKind::Ready { after: Duration::from_millis(12), lived: false })), None);
        journal.news(news(What::InRotation), None);
        journal.hand_over();
        drop(journal);
        let text = fs::read_to_string(path).unwrap();
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 2);
        let first = &lines[0];
        assert_eq!((&first["event"], &first["after_ms"]), (&json!("ready"), &json!(12)));
        for (key, value) in [("app", json!("api")), ("slot", json!(1)), ("generation", json!(7))] {
            assert_eq!(first[key], value);
        }
        assert_eq!((&first["pm_id"], &first["pid"], &first["seq"]), (&json!(3), &json!(99), &json!(1)));
        let time = first["time"].as_str().unwrap();
        assert!(time.len() == 27 && time.parse::<Timestamp>().is_ok(), "{time}");
        assert_eq!((&lines[1]["event"], &lines[1]["seq"]), (&json!("in_rotation"), &json!(2)));
    }

    #[test]
    fn operations_of_a_daemon_that_was_killed_get_an_end_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.jsonl");
        let mut journal = Journal::start(path.clone(), FILE_MAX, None).unwrap();
        for op in [1, 2] {
            journal.begun(clock::now(), OpId(op), "stop", &["api".to_owned()]);
        }
        journal.hand_over();
        drop(journal);
        let lost = unended_operations(&path);
        assert_eq!(lost, ["0000000000000001", "0000000000000002"]);
        // The blob had the end of one, which the file does not have yet.
        let mut before = Journal::start(path.clone(), FILE_MAX, None).unwrap();
        before.ended(clock::now(), OpId(2), &Ok(OperationView { ok: true, apps: Vec::new() }));
        let memo = before.memo();
        let mut journal = Journal::start(path.clone(), FILE_MAX, Some(memo)).unwrap();
        journal.lost(clock::now(), &lost);
        journal.hand_over();
        drop(journal);
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(
            text.matches("\"operation_ended\",\"op\":\"0000000000000001\",\"ok\":false").count(),
            1,
            "{text}"
        );
        assert_eq!(
            text.matches("\"operation_ended\",\"op\":\"0000000000000002\",\"ok\":true").count(),
            1,
            "{text}"
        );
        assert_eq!(text.lines().count(), 4);
    }

    #[test]
    fn a_hook_is_its_apps_and_no_instance() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.jsonl");
        let mut journal = Journal::start(path.clone(), FILE_MAX, None).unwrap();
        let kind = HookKind::PreReload;
        for what in [
            What::Step(StepKind::Hook { kind }),
            What::HookEnded { kind, failure: Some("exit code 4".into()) },
        ] {
            let mut news = news(what);
            news.run.as_mut().unwrap().id.slot = Slot::HOOK;
            journal.news(news, None);
        }
        journal.hand_over();
        drop(journal);
        let text = fs::read_to_string(path).unwrap();
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!((&lines[0]["event"], &lines[0]["hook"]), (&json!("hook"), &json!("pre_reload")));
        assert_eq!((&lines[1]["event"], &lines[1]["failure"]), (&json!("hook_ended"), &json!("exit code 4")));
        assert!(lines.iter().all(|line| line["app"] == "api" && line.get("slot").is_none()), "{lines:?}");
    }

    /// Killed after any number of written lines: the next one has the rest from the blob, and none twice.
    #[test]
    fn what_the_blob_has_and_the_file_has_not_is_written_by_the_next_supervisor_once() {
        for written in 0..=3 {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("events.jsonl");
            let mut journal = Journal::start(path.clone(), FILE_MAX, None).unwrap();
            for _ in 0..3 {
                journal.news(news(What::InRotation), None);
            }
            let memo = journal.memo();
            assert_eq!(memo.pending.len(), 3);
            journal.hand_over();
            drop(journal);
            // As if it had died after so many.
            let text = fs::read_to_string(&path).unwrap();
            fs::write(&path, text.lines().take(written).map(|line| format!("{line}\n")).collect::<String>())
                .unwrap();
            let mut next = Journal::start(path.clone(), FILE_MAX, Some(memo)).unwrap();
            next.daemon(clock::now(), "supervisor_started", json!({ "pid": 1 }));
            next.hand_over();
            drop(next);
            let numbers: Vec<_> = fs::read_to_string(&path)
                .unwrap()
                .lines()
                .filter_map(|line| seq_of(line.as_bytes()))
                .collect();
            assert_eq!(numbers, [1, 2, 3, 4], "{written} were written");
        }
    }
}
