//! What is different in a daemon that `pm run` has started: its own words go where the apps' lines go, in their form,
//! and its home goes with it.

use std::fmt;
use std::io::{self, IsTerminal as _, Write as _};

use jiff::Timestamp;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::{FmtContext, MakeWriter};
use tracing_subscriber::prelude::*;
use tracing_subscriber::registry::LookupSpan;

use crate::logs::console::{json_line, print_at_once};
use crate::model::foreground::{Foreground, LineForm, VARIABLE};
use crate::store::container;
use crate::store::paths::Home;
use crate::sys::lock;

/// What an app could not be called in the lines of the daemon itself.
const OWN_NAME: &str = "pm";

/// What `pm run` was asked for, if this daemon is one of its.
#[must_use]
pub fn settings() -> Option<Foreground> {
    std::env::var(VARIABLE).ok().and_then(|text| Foreground::from_text(&text))
}

/// The daemon's own log goes to stderr: the terminal, the journal, `pm.log` when a command started the daemon; or among
/// the lines of the apps.
pub fn log_to_stderr() {
    // Not EnvFilter: its regular expressions would be a twentieth of the daemon.
    let asked = std::env::var("PM_LOG").ok().and_then(|text| text.parse().ok());
    let filter = |level: Level| asked.unwrap_or_else(|| Targets::new().with_default(level));
    if let Some(Foreground { form, .. }) = settings() {
        // Who wants nothing but the apps' bytes wants to know what is wrong all the same.
        let level = if form == LineForm::Raw { Level::WARN } else { Level::INFO };
        let lines = tracing_subscriber::fmt::layer().event_format(Own { form }).with_writer(AtOnce);
        tracing_subscriber::registry().with(lines).with(filter(level)).init();
        return;
    }
    let lines = tracing_subscriber::fmt::layer()
        .with_target(false)
        .with_ansi(io::stderr().is_terminal())
        // A full disk would be told on stderr, which is what lies there, and failing at that is a panic.
        .log_internal_errors(false)
        .with_writer(io::stderr);
    tracing_subscriber::registry().with(lines).with(filter(Level::INFO)).init();
}

/// Words of the keeper, which has no logger.
pub(super) fn say(text: &str) {
    match settings() {
        Some(Foreground { form, .. }) => {
            let line = own_line(form, Level::INFO, text.strip_prefix("pm daemon: ").unwrap_or(text));
            print_at_once(io::stderr(), line.as_bytes());
        }
        None => print_plainly(text),
    }
}

fn print_plainly(text: &str) {
    // On a full disk there is nobody left to tell.
    let _ = writeln!(io::stderr(), "{text}");
}

/// Removes the home of a daemon that has ended, unless another one has it by now.
pub(super) fn remove_home(home: &Home) {
    // Given back with everything the keeper held.
    if let Ok(lock) = lock::acquire(&home.lock()) {
        container::remove(home, &lock);
    }
}

fn own_line(form: LineForm, level: Level, words: &str) -> String {
    let word = match level {
        Level::ERROR => "error: ",
        Level::WARN => "warning: ",
        _ => "",
    };
    match form {
        LineForm::Json => {
            json_line(Timestamp::now(), OWN_NAME, None, OWN_NAME, &format!("{word}{words}")) + "\n"
        }
        LineForm::Text | LineForm::Raw => format!("{OWN_NAME} | {word}{words}\n"),
    }
}

/// A line for each event, beside the lines of the apps.
struct Own {
    form: LineForm,
}

impl<S, N> FormatEvent<S, N> for Own
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut words = Words::default();
        event.record(&mut words);
        let text = format!("{}{}", words.message, words.fields);
        writer.write_str(&own_line(self.form, *event.metadata().level(), &text.replace('\n', " ")))
    }
}

/// The message of an event, and its fields after it.
#[derive(Default)]
struct Words {
    message: String,
    fields: String,
}

impl Visit for Words {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, format!("{value:?}"));
    }
}

impl Words {
    fn put(&mut self, field: &Field, value: String) {
        if field.name() == "message" {
            self.message = value;
        } else {
            self.fields.push_str(&format!(" {}={value}", field.name()));
        }
    }
}

/// Standard error, for as long as it takes what it gets: nobody supervises while waiting for a reader.
struct AtOnce;

impl io::Write for AtOnce {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        print_at_once(io::stderr(), bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for AtOnce {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        Self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_lines_look_like_those_of_apps() {
        assert_eq!(own_line(LineForm::Text, Level::WARN, "api:0 ended"), "pm | warning: api:0 ended\n");
        let line = own_line(LineForm::Json, Level::INFO, "a \"b\"");
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(
            (&value["app"], &value["instance"], &value["line"]),
            (&"pm".into(), &None::<u32>.into(), &"a \"b\"".into())
        );
    }
}
