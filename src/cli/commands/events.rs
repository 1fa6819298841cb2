//! `pm events`: what has happened to apps, from the file that the daemon appends to. Works without a daemon too.

use std::io;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Duration;

use jiff::civil;
use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};
use regex_lite::Regex;

use crate::cli::Context;
use crate::cli::args::Events;
use crate::cli::error::CliError;
use crate::cli::output::events::{self, Event};
use crate::config::units;
use crate::ipc::protocol::{Answer, Request};
use crate::logs::recent::Stream;
use crate::logs::tail::{self, Follower, Pieces, Position, Source, TailError};
use crate::store::events::previous_of;

/// While following, how long one wait lasts at most.
const TURN: Duration = Duration::from_secs(2);

/// How many of the latest events come first with `--follow`, where nothing else is asked for.
const BEFORE_FOLLOWING: usize = 10;

pub(super) fn run(args: &Events, context: &mut Context) -> Result<(), CliError> {
    let zone = context.surroundings.zone.clone().unwrap_or_else(TimeZone::system);
    let since = args.since.as_deref().map(|text| moment_of(text, &zone)).transpose()?;
    let chosen = Chosen::of(&args.targets, context)?;
    let path = context.home.events();
    let (events, end) = history(&path)?;
    let mut last = events.last().map_or(0, |event| event.seq);
    let mut shown: Vec<Event> = events
        .into_iter()
        .filter(|event| chosen.includes(event) && since.is_none_or(|since| event.at >= since))
        .collect();
    let lines = args.lines.or((args.follow && since.is_none()).then_some(BEFORE_FOLLOWING));
    let skip = lines.map_or(0, |lines| shown.len().saturating_sub(lines));
    shown.drain(..skip);
    if shown.is_empty() && !args.follow && !context.json {
        context.terminal.say(if since.is_some() || !args.targets.is_empty() {
            "No such events."
        } else {
            "Nothing has happened yet."
        })?;
    }
    let mut printer = events::Printer::new(zone, context.json);
    shown.iter().try_for_each(|event| printer.print(event, &mut context.terminal))?;
    context.terminal.flush()?;
    if !args.follow {
        return Ok(());
    }
    let mut follower = Follower::new(Pieces::Lines);
    follower.add(source(&path), end);
    loop {
        let terminal = &mut context.terminal;
        let mut printing: io::Result<()> = Ok(());
        let mut sink = |_: &Source, bytes: &[u8]| {
            for event in bytes.split(|&byte| byte == b'\n').filter_map(Event::parse) {
                // After a rotation the new file is read from its beginning.
                if event.seq <= last {
                    continue;
                }
                last = event.seq;
                if chosen.includes(&event)
                    && let Err(error) = printer.print(&event, terminal).and_then(|()| terminal.flush())
                {
                    printing = Err(error);
                    return ControlFlow::Break(());
                }
            }
            ControlFlow::Continue(())
        };
        let turn = follower.turn(TURN, &mut sink);
        printing?;
        if turn.map_err(failed)?.is_break() {
            return Ok(());
        }
    }
}

/// Every event that is kept, oldest first, and where the file ends.
fn history(path: &Path) -> Result<(Vec<Event>, Position), CliError> {
    // The newer file first: if it becomes the older one meanwhile it is read twice, and not missed.
    let newer = tail::last_lines(path, usize::MAX - 1).map_err(failed)?;
    let older = tail::last_lines(&previous_of(path), usize::MAX - 1).map_err(failed)?;
    let parse =
        |lines: &[Vec<u8>]| -> Vec<Event> { lines.iter().filter_map(|line| Event::parse(line)).collect() };
    let newer_events = parse(&newer.lines);
    let mut events = parse(&older.lines);
    if let Some(first) = newer_events.first() {
        events.retain(|event| event.seq < first.seq);
    }
    events.extend(newer_events);
    Ok((events, newer.end))
}

fn source(path: &Path) -> Source {
    Source { path: path.to_owned(), id: None, name: "events".to_owned(), stream: Stream::Out }
}

fn failed(error: TailError) -> CliError {
    match error {
        TailError::Read { path, source } => CliError::File { what: "read", path, source },
        TailError::Wait(source) => CliError::Output { source },
    }
}

/// Which events are asked for. Apps that are deleted have events too, so a name need not be one of the list.
struct Chosen {
    names: Vec<String>,
    ids: Vec<u64>,
    patterns: Vec<Regex>,
    everything: bool,
}

impl Chosen {
    fn of(targets: &[String], context: &Context) -> Result<Self, CliError> {
        let mut chosen =
            Self { names: Vec::new(), ids: Vec::new(), patterns: Vec::new(), everything: targets.is_empty() };
        for target in targets {
            if target == "all" {
                chosen.everything = true;
            } else if let Some(pattern) = target.strip_prefix('/').and_then(|rest| rest.strip_suffix('/')) {
                chosen.patterns.push(Regex::new(pattern).map_err(|error| CliError::Usage {
                    message: format!("{target} is no pattern: {error}"),
                    cause: None,
                    hint: None,
                })?);
            } else if let Ok(id) = target.parse() {
                chosen.ids.push(id);
            } else {
                chosen.names.push(target.clone());
                chosen.names.extend(apps_of_namespace(target, context));
            }
        }
        Ok(chosen)
    }

    fn includes(&self, event: &Event) -> bool {
        let named = |app: &str| {
            self.names.iter().any(|name| name == app)
                || self.patterns.iter().any(|pattern| pattern.is_match(app))
        };
        self.everything
            || event.apps().any(named)
            || event.number("pm_id").is_some_and(|id| self.ids.contains(&id))
    }
}

/// Without a daemon a namespace means nothing.
fn apps_of_namespace(target: &str, context: &Context) -> Vec<String> {
    let Ok(Some(mut session)) = context.session() else { return Vec::new() };
    let Ok(Answer::List(view)) = session.ask(|| Request::List { targets: Vec::new(), figures: false }) else {
        return Vec::new();
    };
    view.rows.iter().filter(|row| row.namespace == target).map(|row| row.app.to_string()).collect()
}

/// `10m` ago, `2026-11-21T08:00:00Z`, `2026-11-21 08:00` or `08:00` (today) of this time zone.
fn moment_of(text: &str, zone: &TimeZone) -> Result<Timestamp, CliError> {
    let bad = |cause: &str| CliError::Usage {
        message: format!("--since {text:?} is no time"),
        cause: Some(cause.to_owned()),
        hint: Some(
            "Write how long ago, as in `10m` or `1h 30m`, or a time, as in `08:00` or `2026-11-21 08:00`."
                .to_owned(),
        ),
    };
    if let Ok(stamp) = text.parse::<Timestamp>() {
        return Ok(stamp);
    }
    let now = Zoned::now().with_time_zone(zone.clone());
    let civil = text
        .parse::<civil::DateTime>()
        .or_else(|_| text.parse::<civil::Time>().map(|time| now.date().to_datetime(time)));
    if let Ok(civil) = civil {
        let zoned = civil.to_zoned(zone.clone()).map_err(|error| bad(&error.to_string()))?;
        return Ok(zoned.timestamp());
    }
    let ago = units::duration(text).map_err(|error| bad(&error.to_string()))?;
    Timestamp::now().checked_sub(ago).map_err(|_| bad("that is before there were clocks"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn since_takes_spans_and_times() {
        let zone = TimeZone::UTC;
        let at = |text: &str| moment_of(text, &zone).unwrap();
        assert_eq!(at("2026-11-21T08:00:00Z").to_string(), "2026-11-21T08:00:00Z");
        assert_eq!(at("2026-11-21 08:00").to_string(), "2026-11-21T08:00:00Z");
        assert_eq!(at("2026-11-21"), at("2026-11-21 00:00"));
        let ago = Timestamp::now().duration_since(at("10m")).as_secs();
        assert!((599..=601).contains(&ago), "{ago}");
        let error = moment_of("soon", &zone).unwrap_err();
        assert_eq!(error.code(), 2);
    }
}
