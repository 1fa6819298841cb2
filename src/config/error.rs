//! What is wrong with a configuration, where, and what would work.

use crate::model::mask::MASK;
use crate::model::spelling;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::secrets;

/// The longest part of a source line that an excerpt shows, in characters.
const EXCERPT_MAX: usize = 100;
/// The longest value that a message quotes, in characters.
const QUOTE_MAX: usize = 60;

/// Where a value stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// These bytes of the config file.
    Text(Range<usize>),
    /// This option of the command line, with its dashes.
    Option(&'static str),
    /// The command line as such.
    CommandLine,
}

/// A value and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct At<T> {
    /// The value.
    pub value: T,
    /// Where it stands.
    pub place: Place,
}

impl<T> At<T> {
    /// A value and its place.
    pub const fn new(value: T, place: Place) -> Self {
        Self { value, place }
    }
}

/// The text of a config file and the name people know it by.
#[derive(Debug)]
pub struct Source {
    /// Absolute, symlinks unresolved.
    pub path: PathBuf,
    shown: String,
    text: String,
}

impl Source {
    /// A source whose messages begin with `shown`, the path as the caller gave it.
    #[must_use]
    pub fn new(path: PathBuf, shown: &Path, text: String) -> Self {
        Self { path, shown: shown.display().to_string(), text }
    }

    /// The whole text.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Line and column, both from 1, the column in characters.
    #[must_use]
    pub fn position(&self, offset: usize) -> (usize, usize) {
        let before = &self.text[..self.floor(offset)];
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
    }

    fn floor(&self, offset: usize) -> usize {
        let mut offset = offset.min(self.text.len());
        while !self.text.is_char_boundary(offset) {
            offset -= 1;
        }
        offset
    }

    /// A line with its secrets masked, and in which columns of that two places of the line stand.
    fn masked(&self, line: Range<usize>, start: usize, end: usize) -> (String, usize, usize) {
        let (mut shown, mut at) = (String::new(), line.start);
        let mut columns = [start, end].map(|place| (place, None));
        for secret in secrets::secret_values(&self.text) {
            let secret = secret.start.max(line.start)..secret.end.min(line.end);
            if secret.is_empty() {
                continue;
            }
            shown.push_str(&self.text[at..secret.start]);
            let before = shown.chars().count();
            shown.push_str(MASK);
            at = secret.end;
            for (index, (place, column)) in columns.iter_mut().enumerate() {
                if *place <= secret.start {
                    let text = &self.text;
                    column.get_or_insert_with(|| before - text[*place..secret.start].chars().count());
                } else if *place <= secret.end {
                    column.get_or_insert_with(|| before + if index == 0 { 0 } else { MASK.len() });
                }
            }
        }
        shown.push_str(&self.text[at..line.end]);
        let whole = shown.chars().count();
        let [start, end] = columns.map(|(place, column)| {
            column.unwrap_or_else(|| whole - self.text[place..line.end].chars().count())
        });
        (shown, start, end)
    }

    /// The line a span begins in, and the carets below it.
    fn excerpt(&self, span: &Range<usize>) -> (String, String) {
        let start = self.floor(span.start);
        let line_start = self.text[..start].rfind('\n').map_or(0, |at| at + 1);
        let line_end = self.text[start..].find('\n').map_or(self.text.len(), |at| start + at);
        let (line, start, end) =
            self.masked(line_start..line_end, start, self.floor(span.end).clamp(start, line_end));
        let line: Vec<char> = line.trim_end_matches('\r').chars().collect();
        let (column, width) = (start, end.saturating_sub(start).max(1));
        // A window around the span, where the line is too long to show.
        let from = if line.len() > EXCERPT_MAX { column.saturating_sub(20) } else { 0 };
        let to = line.len().min(from + EXCERPT_MAX);
        // A tab would put the carets somewhere else than on a terminal.
        let mut shown: String =
            line[from.min(to)..to].iter().map(|&c| if c.is_control() { ' ' } else { c }).collect();
        if to < line.len() {
            shown.push('…');
        }
        let carets = width.min((to.saturating_sub(column)).max(1));
        (shown, format!("{}{}", " ".repeat(column - from), "^".repeat(carets)))
    }
}

/// One thing that is wrong, or in a warning: doubtful.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where it is.
    pub place: Place,
    /// What it is: a lower-case fragment without a period.
    pub message: String,
    /// A second place that belongs to it, and what is there.
    pub other: Option<(Place, String)>,
    /// What would work.
    pub help: Option<String>,
}

impl Problem {
    /// A problem at a place.
    pub fn new(place: Place, message: impl Into<String>) -> Self {
        Self { place, message: message.into(), other: None, help: None }
    }

    /// Adds what would work.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// Adds "did you mean" when one of `known` is close to `given`; else the fallback, if any.
    #[must_use]
    pub fn did_you_mean<'a>(self, given: &str, known: impl IntoIterator<Item = &'a str>) -> Self {
        match spelling::closest(given, known) {
            Some(likely) => self.help(format!("did you mean `{likely}`?")),
            None => self,
        }
    }

    /// Adds a second place.
    #[must_use]
    pub fn with(mut self, place: Place, what: impl Into<String>) -> Self {
        self.other = Some((place, what.into()));
        self
    }

    /// One line: place and message.
    #[must_use]
    pub fn line(&self, source: Option<&Source>) -> String {
        match (&self.place, source) {
            (Place::Text(span), Some(source)) => {
                let (line, column) = source.position(span.start);
                format!("{}:{line}:{column}: {}", source.shown, self.message)
            }
            (Place::Option(option), _) => format!("{option}: {}", self.message),
            (Place::CommandLine | Place::Text(_), _) => self.message.clone(),
        }
    }

    fn render(&self, source: Option<&Source>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.line(source))?;
        let mut margin = String::new();
        if let (Place::Text(span), Some(source)) = (&self.place, source) {
            margin = " ".repeat(Self::excerpt(source, span, f)?);
        }
        if let Some((place, what)) = &self.other {
            match (place, source) {
                (Place::Text(span), Some(source)) => {
                    let (line, column) = source.position(span.start);
                    write!(f, "\n{}:{line}:{column}: {what}", source.shown)?;
                    Self::excerpt(source, span, f)?;
                }
                (Place::Option(option), _) => write!(f, "\n{option}: {what}")?,
                (Place::CommandLine | Place::Text(_), _) => write!(f, "\n{what}")?,
            }
        }
        match &self.help {
            Some(help) => write!(f, "\n{margin} = {help}"),
            None => Ok(()),
        }
    }

    /// Writes the line and its carets; returns the width of the line number.
    fn excerpt(
        source: &Source,
        span: &Range<usize>,
        f: &mut fmt::Formatter<'_>,
    ) -> Result<usize, fmt::Error> {
        let number = source.position(span.start).0.to_string();
        let (line, carets) = source.excerpt(span);
        let margin = " ".repeat(number.len());
        write!(f, "\n{number} | {}\n{margin} | {carets}", line.trim_end())?;
        Ok(number.len())
    }
}

/// Everything that is wrong with one configuration. The command line answers it with exit code 2.
#[derive(Clone, Debug)]
pub struct ConfigError {
    source: Option<Arc<Source>>,
    problems: Vec<Problem>,
}

impl ConfigError {
    /// An error of the command line, which has no file.
    #[must_use]
    pub fn of_command_line(problems: Vec<Problem>) -> Self {
        Self { source: None, problems }
    }

    /// An error in a file; problems are put in the order of the text.
    #[must_use]
    pub fn in_file(source: Arc<Source>, mut problems: Vec<Problem>) -> Self {
        problems.sort_by_key(|problem| match &problem.place {
            Place::Text(span) => span.start,
            Place::Option(_) | Place::CommandLine => usize::MAX,
        });
        problems.dedup();
        Self { source: Some(source), problems }
    }

    /// The problems, in the order of the text.
    #[must_use]
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// One line per problem, `file:line:column: message`, without excerpts: for programs and logs.
    pub fn lines(&self) -> impl Iterator<Item = String> {
        self.problems.iter().map(|problem| problem.line(self.source.as_deref()))
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            if index > 0 {
                f.write_str("\n\n")?;
            }
            problem.render(self.source.as_deref(), f)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}

/// A value for a message: quoted, escaped and of bounded length.
#[must_use]
pub fn quoted(text: &str) -> String {
    if text.chars().count() <= QUOTE_MAX {
        return format!("{text:?}");
    }
    let head: String = text.chars().take(QUOTE_MAX / 2).collect();
    format!("{head:?}… ({} characters)", text.chars().count())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(text: &str) -> Source {
        Source::new(PathBuf::from("/srv/eco.toml"), Path::new("eco.toml"), text.to_owned())
    }

    #[test]
    fn positions_count_characters_from_one() {
        let source = source("a = 1\nü = 'x'\n");
        assert_eq!(source.position(0), (1, 1));
        assert_eq!(source.position(6), (2, 1));
        // `ü` has two bytes: an offset within it is the same column.
        assert_eq!(source.position(7), (2, 1));
        assert_eq!(source.position(8), (2, 2));
        assert_eq!(source.position(10_000), (3, 1));
    }

    #[test]
    fn excerpt_of_a_long_line_is_a_window_around_the_span() {
        let text = format!("{} bad {}", "x".repeat(500), "y".repeat(500));
        let (line, carets) = source(&text).excerpt(&(501..504));
        assert!(line.chars().count() <= EXCERPT_MAX + 1, "{line}");
        assert_eq!(line.chars().skip(carets.find('^').unwrap()).take(3).collect::<String>(), "bad");
    }

    #[test]
    fn long_values_are_shortened_in_messages() {
        assert_eq!(quoted("api"), "\"api\"");
        let text = quoted(&"n".repeat(10_000));
        assert!(text.ends_with("… (10000 characters)") && text.len() < 80, "{text}");
    }
}
