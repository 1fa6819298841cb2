//! `ready = {…}` and `health = {…}`: what an instance is asked, and how often.

use std::time::Duration;

use super::error::{Place, Problem, quoted};
use super::value::Value;
use crate::model::address;
use crate::model::spec::{Check, Probe};

/// What a probe is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// Whether a new instance may receive traffic.
    Ready,
    /// Whether a running one is well.
    Health,
}

/// The keys of a probe.
pub const TABLE_KEYS: [(&str, &str); 8] = [
    (
        "http",
        "A GET: \"http://127.0.0.1:{PORT}/ready\", \"http://unix:/run/app.sock:/ready\", or for a Node app a path alone, which goes to that very worker; 2xx and 3xx are good.",
    ),
    ("tcp", "A connection: \"127.0.0.1:{PORT}\" or \"unix:/run/app.sock\"."),
    ("exec", "A program with arguments: exit code 0 is good."),
    ("log", "A regular expression that a line of the instance's output matches (`ready` only)."),
    ("interval", "From one answer to the next question; 1s for `ready` (less at first), 10s for `health`."),
    ("timeout", "How long an answer may take; 2s."),
    ("threshold", "How many answers in a row decide: good ones for `ready` (1), bad ones for `health` (3)."),
    ("start_period", "How long after it became ready an instance is left alone (`health` only); 0s."),
];

const LEAST: Duration = Duration::from_millis(10);
const DAY: Duration = Duration::from_secs(86_400);

/// Reads the whole table.
pub(super) fn read(value: Value<'_, '_>, role: Role) -> Result<Probe, Problem> {
    let Some(table) = value.table() else {
        return Err(value.problem("expected a table such as { http = \"http://127.0.0.1:{PORT}/ready\" }"));
    };
    let mut check = None;
    let mut probe = match role {
        Role::Ready => (Duration::from_secs(1), 1),
        Role::Health => (Duration::from_secs(10), 3),
    };
    let (mut timeout, mut start_period) = (Duration::from_secs(2), Duration::ZERO);
    for (key, entry) in table {
        let entry = Value::new(entry);
        let place = || Place::Text(key.span());
        let name = &**key.get_ref();
        match name {
            "http" | "tcp" | "exec" | "log" => {
                if check.is_some() {
                    return Err(Problem::new(place(), "a probe asks one thing: http, tcp, exec or log"));
                }
                if name == "log" && role == Role::Health {
                    return Err(Problem::new(place(), "`log` is for `ready` only; use http, tcp or exec"));
                }
                check = Some(read_check(name, entry)?);
            }
            "interval" => probe.0 = entry.duration(LEAST..=DAY)?,
            "timeout" => timeout = entry.duration(LEAST..=DAY)?,
            "threshold" => probe.1 = entry.count(1..=1000)?,
            "start_period" if role == Role::Ready => {
                return Err(Problem::new(place(), "`start_period` is for `health` only")
                    .help("`listen_timeout` says how long an instance may take to become ready"));
            }
            "start_period" => start_period = entry.duration(Duration::ZERO..=DAY)?,
            other => {
                let known = TABLE_KEYS.map(|(key, _)| key);
                let message =
                    format!("unknown key {} of a probe; known are {}", quoted(other), known.join(", "));
                return Err(Problem::new(place(), message).did_you_mean(other, known));
            }
        }
    }
    let check = check.ok_or_else(|| value.problem("a probe needs one of http, tcp, exec or log"))?;
    Ok(Probe { check, interval: probe.0, timeout, threshold: probe.1, start_period })
}

/// An address as it could be for an instance: names in braces stand for what nobody knows yet.
fn filled_in(text: &str) -> String {
    address::expand(text, |_| Some("1")).unwrap_or_else(|_| text.to_owned())
}

fn read_check(name: &str, entry: Value<'_, '_>) -> Result<Check, Problem> {
    Ok(match name {
        "http" => {
            let text = entry.filled()?;
            address::http(&filled_in(&text)).map_err(|error| entry.problem(error.to_string()))?;
            Check::Http(text)
        }
        "tcp" => {
            let text = entry.filled()?;
            address::tcp(&filled_in(&text)).map_err(|error| entry.problem(error.to_string()))?;
            Check::Tcp(text)
        }
        "log" => {
            let pattern = entry.filled()?;
            regex_lite::Regex::new(&pattern)
                .map_err(|error| entry.problem(format!("no regular expression: {error}")))?;
            Check::Log(pattern)
        }
        _ => match entry.words()? {
            argv if argv.first().is_none_or(String::is_empty) => {
                return Err(entry.problem("`exec` needs a program to run"));
            }
            argv => Check::Exec(argv),
        },
    })
}
