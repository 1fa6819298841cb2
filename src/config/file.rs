//! Reads a config file: TOML text in, apps with the place of every value out.

use crate::model::spelling;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read as _;
use std::path::Path;
use std::sync::Arc;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::app::AppConfig;
use super::error::{At, ConfigError, Place, Problem, Source};
use super::overrides::Overrides;
use super::paths;
use super::resolve::{self, Context, Resolved};
use super::schema::{self, FILE_KEYS};
use super::unknown::key_quoted;
use super::value::Value;

/// The file that commands without an argument look for.
pub const DEFAULT_NAME: &str = "ecosystem.toml";
/// More than any honest configuration, and little enough to read.
const TEXT_MAX: u64 = 8 << 20;
/// A broken line can make the parser stumble on; the first problems are the true ones.
const SYNTAX_PROBLEMS_MAX: usize = 5;

/// A config file as written.
#[derive(Clone, Debug)]
pub struct File {
    /// Its text and path, for messages about its values.
    pub source: Arc<Source>,
    /// Its apps, in the order of the file.
    pub apps: Vec<AppConfig>,
    /// How many instances may be launching at once; `None`: 2 × CPUs.
    pub start_parallelism: Option<u32>,
    /// Whether values of the environment are shown to everybody who asks; `None`: as before.
    pub show_env: Option<bool>,
}

impl File {
    /// The path, absolute, symlinks unresolved.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.source.path
    }
}

/// What an argument of `start` and the like names, judged by its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Argument {
    /// A config file that [`load`] reads.
    Config,
    /// A config file of PM2 in a format that is not read yet; [`load`] says so.
    ForeignConfig,
    /// An app's name, a script, a command.
    Other,
}

/// Whether an argument is a config file. As in PM2 its ending decides and not its content.
#[must_use]
pub fn classify(argument: &str) -> Argument {
    let lower = argument.to_ascii_lowercase();
    let foreign =
        [".json", ".json5", ".yml", ".yaml", ".config.js", ".config.cjs", ".config.mjs", ".config.ts"];
    // A shell line such as `node app.js --config x.toml` is none.
    if argument.contains(char::is_whitespace) && !Path::new(argument).is_file() {
        Argument::Other
    } else if lower.ends_with(".toml") {
        Argument::Config
    } else if foreign.iter().any(|ending| lower.ends_with(ending)) {
        Argument::ForeignConfig
    } else {
        Argument::Other
    }
}

/// Reads a config file. A relative `path` starts at `cwd`, the caller's working directory.
///
/// # Errors
/// Every problem of the file's text: syntax, unknown keys, values that do not fit. What depends on the machine is
/// checked by [`resolve::resolve_file`].
pub fn load(path: &Path, cwd: &Path) -> Result<File, ConfigError> {
    let read = read(path, cwd)?;
    if read.problems.is_empty() {
        Ok(read.file)
    } else {
        Err(ConfigError::in_file(read.file.source, read.problems))
    }
}

/// Everything that is wrong with a file, at once: its text, and for the apps that could be read, what
/// [`resolve::resolve_file`] finds.
///
/// # Errors
/// All problems, in the order of the text.
pub fn check(path: &Path, overrides: &Overrides, context: &Context) -> Result<Vec<Resolved>, ConfigError> {
    let Reading { mut file, mut problems, broken } = read(path, &context.cwd)?;
    let mut index = 0;
    file.apps.retain(|_| {
        index += 1;
        !broken.contains(&(index - 1))
    });
    // Without one whole app there is nothing left that could be resolved.
    if file.apps.is_empty() && !problems.is_empty() {
        return Err(ConfigError::in_file(file.source, problems));
    }
    match resolve::resolve_file(&file, overrides, context) {
        Ok(resolved) if problems.is_empty() => Ok(resolved),
        Ok(_) => Err(ConfigError::in_file(file.source, problems)),
        Err(error) => {
            problems.extend_from_slice(error.problems());
            Err(ConfigError::in_file(file.source, problems))
        }
    }
}

/// A file, what is wrong with it, and the indexes of the apps where something is.
struct Reading {
    file: File,
    problems: Vec<Problem>,
    broken: BTreeSet<usize>,
}

fn read(path: &Path, cwd: &Path) -> Result<Reading, ConfigError> {
    let shown = path.display();
    let refuse =
        |message: String| ConfigError::of_command_line(vec![Problem::new(Place::CommandLine, message)]);
    if path.to_str().is_some_and(|path| classify(path) == Argument::ForeignConfig) {
        return Err(ConfigError::of_command_line(vec![
            Problem::new(
                Place::CommandLine,
                format!("cannot read {shown}: this version of pm reads TOML only"),
            )
            .help("`pm init` writes an ecosystem.toml to start from; its keys are those of PM2"),
        ]));
    }
    let absolute = paths::absolute(cwd, path);
    let file =
        std::fs::File::open(&absolute).map_err(|error| refuse(format!("cannot read {shown}: {error}")))?;
    let mut bytes = Vec::new();
    file.take(TEXT_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| refuse(format!("cannot read {shown}: {error}")))?;
    if bytes.len() as u64 > TEXT_MAX {
        return Err(refuse(format!("cannot read {shown}: it is larger than {} MiB", TEXT_MAX >> 20)));
    }
    match String::from_utf8(bytes) {
        Ok(text) => Ok(parse(Source::new(absolute, path, text))),
        Err(error) => {
            let at = error.utf8_error().valid_up_to();
            let text = String::from_utf8_lossy(error.as_bytes()).into_owned();
            let source = Arc::new(Source::new(absolute, path, text));
            let problem =
                Problem::new(Place::Text(at..at + 1), "this is not UTF-8").help("save the file as UTF-8");
            Err(ConfigError::in_file(source, vec![problem]))
        }
    }
}

fn parse(source: Source) -> Reading {
    let source = Arc::new(source);
    let mut file =
        File { source: Arc::clone(&source), apps: Vec::new(), start_parallelism: None, show_env: None };
    let mut problems = Vec::new();
    let mut broken = BTreeSet::new();
    let (document, syntax) = DeTable::parse_recoverable(source.text());
    if !syntax.is_empty() {
        problems.extend(
            syntax.iter().take(SYNTAX_PROBLEMS_MAX).map(|error| syntax_problem(error, source.text())),
        );
        // What the parser made of the rest is guesswork: nothing more is said about it.
        return Reading { file, problems, broken };
    }
    for (key, value) in document.get_ref() {
        let text = &**key.get_ref();
        let place = Place::Text(key.span());
        match text {
            "apps" => read_apps(value, &mut file, &mut problems, &mut broken),
            "start_parallelism" => match Value::new(value).count(1..=1000) {
                Ok(number) => file.start_parallelism = Some(number),
                Err(problem) => problems.push(problem),
            },
            "show_env" => match Value::new(value).boolean() {
                Ok(show) => file.show_env = Some(show),
                Err(problem) => problems.push(problem),
            },
            _ => problems.push(unknown_file_key(text, place)),
        }
    }
    if file.apps.is_empty() && problems.is_empty() {
        problems.push(
            Problem::new(Place::Text(0..0), "the file has no apps")
                .help("begin an app with a line `[[apps]]` and a line `script = \"…\"`"),
        );
    }
    Reading { file, problems, broken }
}

fn syntax_problem(error: &toml::de::Error, text: &str) -> Problem {
    let span = error.span().unwrap_or(text.len()..text.len());
    let message = error.message().lines().collect::<Vec<_>>().join(", ");
    Problem::new(Place::Text(span), message)
}

fn unknown_file_key(text: &str, place: Place) -> Problem {
    let problem = Problem::new(place, format!("unknown key {} outside of `[[apps]]`", key_quoted(text)));
    if text == "app" || text == "pm2" {
        return problem.help("did you mean `[[apps]]`?");
    }
    if schema::find(text).is_some() {
        return problem.help("it belongs to an app: put a line `[[apps]]` above it");
    }
    match text {
        "deploy" | "static" => problem.help("this version of pm does not have it; remove the table"),
        _ => match spelling::closest(text, FILE_KEYS.iter().map(|key| key.name)) {
            Some("apps") => problem.help("did you mean `[[apps]]`?"),
            Some(likely) => problem.help(format!("did you mean `{likely}`?")),
            None => problem.help("known here are `[[apps]]`, `start_parallelism` and `show_env`"),
        },
    }
}

fn read_apps(
    value: &Spanned<DeValue<'_>>,
    file: &mut File,
    problems: &mut Vec<Problem>,
    broken: &mut BTreeSet<usize>,
) {
    let Some(items) = value.get_ref().as_array() else {
        let problem = Value::new(value).problem("`apps` is not a list of apps");
        problems.push(problem.help("begin each app with a line `[[apps]]`, with two brackets"));
        return;
    };
    for (index, item) in items.iter().enumerate() {
        let before = problems.len();
        match item.get_ref().as_table() {
            Some(table) => file.apps.push(read_app(table, Place::Text(item.span()), problems)),
            None => {
                problems.push(Value::new(item).problem("an app is a table"));
                file.apps.push(AppConfig::new(Place::Text(item.span())));
            }
        }
        if problems.len() > before {
            broken.insert(index);
        }
    }
}

fn read_app(table: &DeTable<'_>, place: Place, problems: &mut Vec<Problem>) -> AppConfig {
    let mut app = AppConfig::new(place.clone());
    let mut seen: BTreeMap<String, Place> = BTreeMap::new();
    let before = problems.len();
    // The table is sorted by key; what is reported second should stand second.
    let mut entries: Vec<_> = table.iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    for (key, value) in entries {
        let place = Place::Text(key.span());
        match schema::read_key(&mut app, At::new(&**key.get_ref(), place.clone()), Value::new(value)) {
            Ok(name) => {
                if let Some(first) = seen.insert(name.clone(), place.clone()) {
                    problems.push(
                        Problem::new(place, format!("`{name}` is set twice"))
                            .with(first, "it is set here too: two spellings of one key"),
                    );
                }
            }
            Err(problem) => problems.push(problem),
        }
    }
    // A key that is there but unreadable has been complained about.
    if app.script.is_none() && problems.len() == before {
        problems.push(Problem::new(place, "this app has no `script`").help("add a line `script = \"…\"`"));
    }
    app
}
