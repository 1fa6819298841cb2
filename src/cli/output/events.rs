//! Events in lines for people, or as they are for programs.

use std::io;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use owo_colors::Style;
use serde_json::{Map, Value};

use super::{Terminal, words};
use crate::config::error::quoted;
use crate::model::process::{self, rounded_size};

/// One event.
#[derive(Clone, Debug)]
pub struct Event {
    /// Its number.
    pub seq: u64,
    /// When it happened.
    pub at: Timestamp,
    text: String,
    fields: Map<String, Value>,
}

impl Event {
    /// Reads one line; `None` when it is no whole event.
    #[must_use]
    pub fn parse(line: &[u8]) -> Option<Self> {
        let fields: Map<String, Value> = serde_json::from_slice(line).ok()?;
        let at = fields.get("time")?.as_str()?.parse().ok()?;
        let seq = fields.get("seq")?.as_u64()?;
        let text = String::from_utf8_lossy(line).trim_end().to_owned();
        Some(Self { seq, at, text, fields })
    }

    /// The apps it is about.
    pub fn apps(&self) -> impl Iterator<Item = &str> {
        fn name(app: &Value) -> Option<&str> {
            app.as_str().or_else(|| app.get("app")?.as_str())
        }
        let several = self.fields.get("apps").and_then(Value::as_array).into_iter().flatten();
        self.fields.get("app").into_iter().chain(several).filter_map(name)
    }

    /// A number among its fields.
    #[must_use]
    pub fn number(&self, key: &str) -> Option<u64> {
        self.fields.get(key)?.as_u64()
    }

    fn word(&self, key: &str) -> &str {
        self.fields.get(key).and_then(Value::as_str).unwrap_or_default()
    }

    fn span(&self, key: &str) -> String {
        self.number(key).map_or_else(String::new, words::millis)
    }

    /// `api:1 #7`: slot 1 of `api`, generation 7.
    fn subject(&self) -> String {
        let app = self.word("app");
        match (self.number("slot"), self.number("generation")) {
            (Some(slot), Some(generation)) => format!("{app}:{slot} #{generation}"),
            _ if app.is_empty() => "pm".to_owned(),
            _ => app.to_owned(),
        }
    }

    fn sentence(&self) -> (String, Style) {
        let plain = Style::new();
        let (good, bad, busy) = (plain.green(), plain.red(), plain.yellow());
        let pid = self.number("pid").map_or_else(String::new, |pid| format!(" as process {pid}"));
        let reason = self.word("reason");
        match self.word("event") {
            "spawned" => (format!("spawned{pid}"), plain),
            "ready" => (format!("ready after {}", self.span("after_ms")), good),
            "in_rotation" => ("in rotation: gets new connections".to_owned(), good),
            "out_of_rotation" => ("out of rotation: gets no new connections".to_owned(), busy),
            "soaking" => ("ready, has to stay so before it gets connections".to_owned(), busy),
            "reserved" => ("in reserve: replaced, and back if the release fails".to_owned(), plain),
            "restored" => ("back from reserve".to_owned(), good),
            "draining" => ("draining: finishes what it has".to_owned(), busy),
            "signalled" => (format!("{} sent", self.word("signal")), busy),
            "killed" => (format!("killed after {}", self.span("after_ms")), bad),
            "gone" if self.fields.get("killed") == Some(&Value::Bool(true)) => {
                (format!("gone, killed after {}", self.span("after_ms")), bad)
            }
            "gone" => (format!("gone after {}", self.span("after_ms")), plain),
            "crashed" => (format!("crashed after {}: {reason}", self.span("uptime_ms")), bad),
            "exited" => (format!("exited after {}: {reason}", self.span("uptime_ms")), plain),
            "failed" => (format!("failed: {reason}"), bad),
            "memory_exceeded" => {
                let size =
                    |key: &str, shown: fn(u64) -> String| self.number(key).map_or_else(String::new, shown);
                let (used, limit) = (size("bytes", rounded_size), size("limit", process::size));
                (format!("uses {used} of memory, over its limit of {limit}"), busy)
            }
            "restart_scheduled" => match self.number("in_ms") {
                Some(0) => ("restarts at once".to_owned(), busy),
                _ => (format!("restarts in {}", self.span("in_ms")), busy),
            },
            "errored" => (format!("given up: {reason}"), bad),
            "ended" => (format!("ended for good: {reason}"), plain),
            "waiting" => (format!("waiting for {}", self.list("on").join(", ")), busy),
            "hook" => (format!("runs its hook {}", self.word("hook")), busy),
            "hook_ended" => match self.word("failure") {
                "" => (format!("hook {} done", self.word("hook")), plain),
                why => (format!("hook {} failed: {why}", self.word("hook")), bad),
            },
            "operation_begun" => {
                let apps: Vec<&str> = self.apps().collect();
                (format!("{} {}", self.word("verb"), apps.join(", ")).trim_end().to_owned(), plain.bold())
            }
            "operation_ended" => self.ended(good, bad),
            "daemon_started" => ("the daemon has started".to_owned(), plain.bold()),
            "supervisor_restarted" => ("the supervisor was started again; what ran goes on".to_owned(), busy),
            "daemon_ending" => ("the daemon ends".to_owned(), plain.bold()),
            // Of a newer daemon: at least everything it says.
            other => {
                let known =
                    ["time", "mono_ns", "seq", "event", "app", "slot", "generation", "pm_id", "pid", "op"];
                let rest = self.fields.iter().filter(|(key, _)| !known.contains(&key.as_str()));
                let rest: Vec<String> = rest.map(|(key, value)| format!("{key}={value}")).collect();
                (format!("{} {}", other.replace('_', " "), rest.join(" ")).trim_end().to_owned(), plain)
            }
        }
    }

    fn ended(&self, good: Style, bad: Style) -> (String, Style) {
        if let Some(refused) = self.fields.get("refused").and_then(Value::as_str) {
            return (format!("refused: {refused}"), bad);
        }
        let ok = self.fields.get("ok") == Some(&Value::Bool(true));
        let apps = self.fields.get("apps").and_then(Value::as_array).into_iter().flatten();
        let results: Vec<String> = apps
            .map(|app| {
                let word = |key: &str| app.get(key).and_then(Value::as_str).unwrap_or_default();
                match word("cause") {
                    "" => format!("{} {}", word("app"), word("result")),
                    cause => format!("{} {}: {cause}", word("app"), word("result")),
                }
            })
            .collect();
        let text = if results.is_empty() { "done".to_owned() } else { results.join(", ") };
        (text, if ok { good } else { bad })
    }

    fn list(&self, key: &str) -> Vec<&str> {
        let items = self.fields.get(key).and_then(Value::as_array).into_iter().flatten();
        items.filter_map(Value::as_str).collect()
    }
}

/// Prints events one after the other.
#[derive(Debug)]
pub struct Printer {
    zone: TimeZone,
    json: bool,
    day: Option<jiff::civil::Date>,
    width: usize,
}

impl Printer {
    /// Times are those of `zone`.
    #[must_use]
    pub const fn new(zone: TimeZone, json: bool) -> Self {
        Self { zone, json, day: None, width: 12 }
    }

    /// Prints one event.
    ///
    /// # Errors
    /// Standard output's.
    pub fn print(&mut self, event: &Event, terminal: &mut Terminal) -> io::Result<()> {
        if self.json {
            return terminal.data_line(&event.text);
        }
        let at = event.at.to_zoned(self.zone.clone());
        if self.day != Some(at.date()) {
            self.day = Some(at.date());
            let day = terminal.on_out(&at.strftime("%A, %F").to_string(), Style::new().bright_black());
            terminal.say(&day)?;
        }
        let subject = event.subject();
        self.width = self.width.max(subject.chars().count());
        let (sentence, style) = event.sentence();
        // An app chooses some of these words; none of them may move the cursor.
        let sentence = if sentence.chars().any(char::is_control) { quoted(&sentence) } else { sentence };
        let time = terminal.on_out(&at.strftime("%T%.6f").to_string(), Style::new().bright_black());
        let sentence = terminal.on_out(&sentence, style);
        terminal.say(&format!("{time}  {subject:<width$}  {sentence}", width = self.width))
    }
}
