//! `pm logs`: the last lines of apps' log files, then what is added. Works on the files; a daemon is asked only which
//! they are.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use owo_colors::{AnsiColors, Style};
use serde::Deserialize;

use crate::cli::Context;
use crate::cli::args::Logs;
use crate::cli::connect::Session;
use crate::cli::error::CliError;
use crate::cli::output::Terminal;
use crate::ipc::codec::CodecError;
use crate::ipc::protocol::Request;
use crate::logs::recent::Stream;
use crate::logs::tail::{self, Follower, LastLines, Pieces, Position, Source, TailError};
use crate::model::id::PmId;

/// While following, how often the daemon is asked for files that are new.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Names of apps are told apart by these, in turn.
const COLORS: [AnsiColors; 6] = [
    AnsiColors::Cyan,
    AnsiColors::Yellow,
    AnsiColors::Magenta,
    AnsiColors::Blue,
    AnsiColors::Green,
    AnsiColors::BrightCyan,
];

pub(super) fn run(args: &Logs, context: &mut Context) -> Result<(), CliError> {
    let sources = match context.session()? {
        Some(mut session) => listed(args, &mut session)?,
        None => files_of(&context.home.logs_dir(), args)?,
    };
    if sources.is_empty() && context.session()?.is_some() && !context.json {
        context.terminal.say(
            "Nothing to show: these apps have no log files. Under `pm run` their output is that of the container: \
             `docker logs`, `kubectl logs`.",
        )?;
    }
    let width = sources.iter().map(|source| label(source).chars().count()).max().unwrap_or(0);
    let mut printer = Printer { raw: args.raw, json: context.json, width };
    let mut followed = HashSet::new();
    let from = show_last(sources, args, &printer, &mut followed, &mut context.terminal)?;
    if args.nostream {
        return Ok(());
    }
    let mut follower = Follower::new(if args.raw { Pieces::Raw } else { Pieces::Lines });
    from.into_iter().for_each(|(source, end)| follower.add(source, end));
    let mut next_look = Instant::now() + LOOK_EVERY;
    loop {
        let terminal = &mut context.terminal;
        let mut printing: io::Result<()> = Ok(());
        let mut sink = |source: &Source, bytes: &[u8]| match printer
            .piece(source, bytes, terminal)
            .and_then(|()| terminal.flush())
        {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                printing = Err(error);
                ControlFlow::Break(())
            }
        };
        let turn = follower.turn(LOOK_EVERY, &mut sink);
        printing?;
        if turn.map_err(failed)?.is_break() {
            return Ok(());
        }
        let now = Instant::now();
        if now >= next_look {
            next_look = now + LOOK_EVERY;
            // Without a daemon, or while it is replaced, the files that are followed stay what they are.
            if let Ok(Some(mut session)) = context.session()
                && let Ok(mut sources) = listed(args, &mut session)
            {
                sources.retain(|source| !followed.contains(&source.path));
                printer.width = sources
                    .iter()
                    .map(|source| label(source).chars().count())
                    .max()
                    .unwrap_or(0)
                    .max(printer.width);
                show_last(sources, args, &printer, &mut followed, &mut context.terminal)?
                    .into_iter()
                    .for_each(|(source, end)| follower.add(source, end));
            }
        }
    }
}

/// Prints the last lines of each file, the one that was written last coming last, as PM2 does; returns where to go
/// on.
fn show_last(
    sources: Vec<Source>,
    args: &Logs,
    printer: &Printer,
    followed: &mut HashSet<PathBuf>,
    terminal: &mut Terminal,
) -> Result<Vec<(Source, Position)>, CliError> {
    let mut seen: Vec<(Source, LastLines)> = Vec::with_capacity(sources.len());
    for source in sources {
        followed.insert(source.path.clone());
        let last = tail::last_lines(&source.path, args.lines).map_err(failed)?;
        seen.push((source, last));
    }
    seen.sort_by_key(|(_, last)| last.modified);
    for (source, last) in &seen {
        if last.lines.is_empty() {
            continue;
        }
        if !printer.raw && !printer.json {
            let title = format!("{} last {} lines:", source.path.display(), args.lines);
            let title = terminal.on_out(&title, Style::new().bright_black());
            terminal.say(&title)?;
        }
        last.lines.iter().try_for_each(|line| printer.line(source, line, terminal))?;
    }
    terminal.flush()?;
    Ok(seen.into_iter().map(|(source, last)| (source, last.end)).collect())
}

fn listed(args: &Logs, session: &mut Session) -> Result<Vec<Source>, CliError> {
    let request = || Request::Jlist { targets: args.targets.clone(), show_env: false };
    let mut sources = session.ask_raw(request, sources_of)?;
    sources.retain(|source| wanted(source.stream, args));
    Ok(sources)
}

fn failed(error: TailError) -> CliError {
    match error {
        TailError::Read { path, source } => CliError::File { what: "read", path, source },
        TailError::Wait(source) => CliError::Output { source },
    }
}

const fn wanted(stream: Stream, args: &Logs) -> bool {
    match stream {
        Stream::Out => !args.err,
        Stream::Err => !args.out,
    }
}

/// The files that the daemon names. Instances that share a file (`merge_logs`) count once.
fn sources_of(json: &[u8]) -> Result<Vec<Source>, CliError> {
    #[derive(Deserialize)]
    struct Entry {
        name: String,
        pm_id: PmId,
        pm2_env: Paths,
    }
    #[derive(Deserialize)]
    struct Paths {
        pm_out_log_path: String,
        pm_err_log_path: String,
    }
    let entries: Vec<Entry> = serde_json::from_slice(json).map_err(|source| CliError::Protocol {
        source: CodecError::Content { start: "the list".to_owned(), source },
    })?;
    let mut files = HashSet::new();
    let mut sources = Vec::new();
    for Entry { name, pm_id, pm2_env } in entries {
        for (path, stream) in [(pm2_env.pm_out_log_path, Stream::Out), (pm2_env.pm_err_log_path, Stream::Err)]
        {
            if path != "/dev/null" && files.insert(path.clone()) {
                sources.push(Source { path: path.into(), id: Some(pm_id), name: name.clone(), stream });
            }
        }
    }
    Ok(sources)
}

/// Without a daemon: the files in the home whose names are those of the targets.
fn files_of(logs_dir: &Path, args: &Logs) -> Result<Vec<Source>, CliError> {
    let targets = &args.targets;
    let failed = |source| CliError::File { what: "read", path: logs_dir.to_owned(), source };
    let entries = match fs::read_dir(logs_dir) {
        Ok(entries) => entries.collect::<io::Result<Vec<_>>>().map_err(failed)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(failed(error)),
    };
    let mut sources: Vec<Source> = entries
        .iter()
        .filter_map(|entry| {
            let (name, id, stream) = parse_name(entry.file_name().to_str()?)?;
            let named = |target: &String| {
                target == "all"
                    || *target == name
                    || file_stem(target) == name
                    || id.is_some_and(|id| *target == id.to_string())
            };
            (targets.is_empty() || targets.iter().any(named)).then_some(Source {
                path: entry.path(),
                id,
                name,
                stream,
            })
        })
        .collect();
    sources.sort_by(|a, b| a.path.cmp(&b.path));
    match targets.iter().find(|target| *target != "all") {
        Some(target) if sources.is_empty() => Err(CliError::NoSuchApp { target: target.clone() }),
        _ => {
            sources.retain(|source| wanted(source.stream, args));
            Ok(sources)
        }
    }
}

/// `api-out-3.log` is standard output of instance 3 of `api`; see `logs::naming`.
fn parse_name(file: &str) -> Option<(String, Option<PmId>, Stream)> {
    let stem = file.strip_suffix(".log")?;
    let kind = |stem: &str| {
        stem.strip_suffix("-out")
            .map(|name| (name.to_owned(), Stream::Out))
            .or_else(|| stem.strip_suffix("-error").map(|name| (name.to_owned(), Stream::Err)))
    };
    if let Some((name, stream)) = kind(stem) {
        return Some((name, None, stream));
    }
    let (rest, id) = stem.rsplit_once('-')?;
    let (name, stream) = kind(rest)?;
    Some((name, Some(PmId(id.parse().ok()?)), stream))
}

fn file_stem(target: &str) -> String {
    crate::model::id::AppName::new(target).map_or_else(|_| target.to_owned(), |name| name.file_stem())
}

/// `0|api`.
fn label(source: &Source) -> String {
    match source.id {
        Some(id) => format!("{id}|{}", source.name),
        None => source.name.clone(),
    }
}

/// How a line looks.
struct Printer {
    raw: bool,
    json: bool,
    width: usize,
}

impl Printer {
    fn piece(&self, source: &Source, bytes: &[u8], terminal: &mut Terminal) -> io::Result<()> {
        if self.raw && !self.json {
            return terminal.data(bytes);
        }
        let text = bytes.strip_suffix(b"\n").unwrap_or(bytes);
        text.split(|&byte| byte == b'\n').try_for_each(|line| self.line(source, line, terminal))
    }

    fn line(&self, source: &Source, line: &[u8], terminal: &mut Terminal) -> io::Result<()> {
        if self.json {
            let message = String::from_utf8_lossy(line);
            let kind = match source.stream {
                Stream::Out => "out",
                Stream::Err => "err",
            };
            let entry = serde_json::json!({
                "message": message, "type": kind, "process_id": source.id, "app_name": source.name,
            });
            return terminal.data_line(&entry.to_string());
        }
        if !self.raw {
            let label = format!("{:<width$} | ", label(source), width = self.width);
            let style = match source.stream {
                Stream::Out => Style::new().color(color_of(&source.name)),
                Stream::Err => Style::new().red(),
            };
            let label = terminal.on_out(&label, style);
            terminal.data(label.as_bytes())?;
        }
        terminal.data(line)?;
        terminal.data(b"\n")
    }
}

/// The same color for the same name on every run.
fn color_of(name: &str) -> AnsiColors {
    let sum = name.bytes().fold(0_usize, |sum, byte| sum.wrapping_mul(31).wrapping_add(usize::from(byte)));
    COLORS[sum % COLORS.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_names_tell_whose_they_are() {
        for (file, expected) in [
            ("api-out.log", Some(("api", None, Stream::Out))),
            ("api-error-12.log", Some(("api", Some(PmId(12)), Stream::Err))),
            ("my-out-app-out-0.log", Some(("my-out-app", Some(PmId(0)), Stream::Out))),
            ("api.log", None),
            ("api-out-x.log", None),
            ("api-out.log.1", None),
        ] {
            let expected = expected.map(|(name, id, stream)| (name.to_owned(), id, stream));
            assert_eq!(parse_name(file), expected, "{file}");
        }
    }

    #[test]
    fn a_shared_file_is_read_once() {
        let json = br#"[{"name":"a","pm_id":0,"pid":1,"pm2_env":{"pm_out_log_path":"/l/a-out.log","pm_err_log_path":"/dev/null"}},
            {"name":"a","pm_id":1,"pid":2,"pm2_env":{"pm_out_log_path":"/l/a-out.log","pm_err_log_path":"/l/a-error.log"}}]"#;
        let sources = sources_of(json).unwrap();
        let labels: Vec<String> = sources.iter().map(label).collect();
        assert_eq!(labels, ["0|a", "1|a"]);
    }
}
