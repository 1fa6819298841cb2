//! Files of `KEY=value` lines: what `env_file` names.
//!
//! The daemon reads them anew at each spawn, so a parser that gives up would take a running app down; a line that
//! cannot be understood is skipped and reported instead. Nothing is expanded: `$HOME` stays `$HOME`.

use std::io;
use std::path::{Path, PathBuf};

use crate::sys::guarded;
use crate::sys::trust::{self, OpenError, Steered};

/// The largest file that is read, in bytes: the kernel takes no larger environment.
pub const FILE_MAX: u64 = 4 << 20;

/// What a file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EnvFile {
    /// Names and values in the order of the file; a later one of the same name counts.
    pub variables: Vec<(String, String)>,
    /// Lines that are no assignment.
    pub skipped: Vec<SkippedLine>,
}

/// A line that was skipped.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {number}: {reason}")]
pub struct SkippedLine {
    /// From 1.
    pub number: usize,
    /// Why, as a fragment. Never quotes the line: it may hold a secret.
    pub reason: &'static str,
}

/// Why a file was not read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// It cannot be opened or read.
    #[error("cannot read env file {path:?}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel says.
        source: io::Error,
    },
    /// Root does not take from it what everybody may put there.
    #[error(
        "root does not read env file {path:?}: {steered}; make it root's, `chown root` and `chmod o-w`, in a directory of root's, \
         or give PM_TRUST_FILES=1 to the daemon or, with `--update-env`, to the app's next start where that is no danger"
    )]
    Steered {
        /// The file.
        path: PathBuf,
        /// Who may.
        steered: Steered,
    },
    /// It has more than [`FILE_MAX`] bytes.
    #[error("env file {path:?} is larger than {} MiB", FILE_MAX >> 20)]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// It is no text.
    #[error("env file {path:?} is not UTF-8")]
    NotUtf8 {
        /// The file.
        path: PathBuf,
    },
}

/// Which files are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// By root, those only that nobody steers who should not ([`trust::steered_by_everybody`]).
    Unsteered,
    /// All: somebody has said that it is fine (PM_TRUST_FILES=1).
    All,
}

/// Reads and parses a file.
///
/// # Errors
/// [`ReadError`] names the file. Lines that are no assignment are no error.
pub fn read(path: &Path, trust: Trust) -> Result<EnvFile, ReadError> {
    use std::io::Read as _;
    let failed = |source| ReadError::Read { path: path.to_owned(), source };
    // The driver reads it: a FIFO in its place must not hold everybody up.
    let file = match trust {
        Trust::All => guarded::open_regular(path).map_err(failed)?,
        Trust::Unsteered => trust::open_unsteered(path).map_err(|error| match error {
            OpenError::Io(source) => failed(source),
            OpenError::Steered(steered) => ReadError::Steered { path: path.to_owned(), steered },
        })?,
    };
    let mut bytes = Vec::new();
    file.take(FILE_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > FILE_MAX {
        return Err(ReadError::TooLarge { path: path.to_owned() });
    }
    let text = String::from_utf8(bytes).map_err(|_| ReadError::NotUtf8 { path: path.to_owned() })?;
    Ok(parse(&text))
}

/// Parses the text of a file, by the rules of the dotenv package for Node:
/// - `KEY=value`, also `export KEY=value`, blanks around `=` allowed; empty lines and `#` lines are skipped;
/// - an unquoted value ends at a `#` after a blank (or at its start) and is trimmed;
/// - `'…'` and `` `…` `` are literal, in `"…"` `\n`, `\r`, `\t`, `\"` and `\\` are escapes; quoted values may span lines.
#[must_use]
pub fn parse(text: &str) -> EnvFile {
    let mut file = EnvFile::default();
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut rest = text;
    let mut number = 0;
    while !rest.is_empty() {
        number += 1;
        let (line, after) = rest.split_once('\n').unwrap_or((rest, ""));
        let whole = rest;
        rest = after;
        let trimmed = line.trim();
        if trimmed.is_empty() || trimmed.starts_with('#') {
            continue;
        }
        let mut skip = |reason| file.skipped.push(SkippedLine { number, reason });
        let assignment = trimmed.strip_prefix("export ").unwrap_or(trimmed);
        let Some((name, _)) = assignment.split_once('=') else {
            skip("expected KEY=value");
            continue;
        };
        let name = name.trim();
        if !is_name(name) {
            skip("the part before `=` is no name of a variable");
            continue;
        }
        // From here on in the whole rest: a quoted value may go on behind the end of the line.
        let equals = whole.find('=').map_or(whole.len(), |at| at + 1);
        let value_text = whole[equals..].trim_start_matches([' ', '\t']);
        let value = match value_text.chars().next() {
            Some(quote @ ('"' | '\'' | '`')) => match quoted(&value_text[1..], quote) {
                Some((value, used)) => {
                    let end = whole.len() - value_text.len() + 1 + used;
                    let lines_used = whole[..end].matches('\n').count();
                    number += lines_used;
                    // What follows the closing quote on its line is a comment or a mistake: skipped either way.
                    rest = whole[end..].split_once('\n').map_or("", |(_, after)| after);
                    value
                }
                // No closing quote: the value is what stands there, as dotenv has it.
                None => unquoted(value_text),
            },
            _ => unquoted(value_text),
        };
        if value.contains('\0') {
            file.skipped.push(SkippedLine { number, reason: "the value has a NUL character" });
            continue;
        }
        file.variables.push((name.to_owned(), value));
    }
    file
}

fn is_name(name: &str) -> bool {
    !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || "_.-".contains(c))
}

/// The value up to its closing quote, and how many bytes it took with that quote.
fn quoted(text: &str, quote: char) -> Option<(String, usize)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            c if c == quote => return Some((value, at + 1)),
            '\\' if quote == '"' => match chars.next()?.1 {
                'n' => value.push('\n'),
                'r' => value.push('\r'),
                't' => value.push('\t'),
                c @ ('"' | '\\') => value.push(c),
                c => value.extend(['\\', c]),
            },
            // Files written on Windows: one line end, as everywhere.
            '\r' if text[at..].starts_with("\r\n") => {}
            c => value.push(c),
        }
    }
    None
}

fn unquoted(text: &str) -> String {
    let line = text.split('\n').next().unwrap_or_default();
    let comment = line
        .char_indices()
        .find(|&(at, c)| c == '#' && line[..at].chars().next_back().is_none_or(char::is_whitespace));
    comment.map_or(line, |(at, _)| &line[..at]).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: &[(&str, &str)]) {
        let file = parse(text);
        let expected: Vec<_> = expected.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        assert_eq!(file.variables, expected, "{text:?}");
        assert_eq!(file.skipped, [], "{text:?}");
    }

    #[test]
    fn lines_of_every_kind() {
        check("", &[]);
        check("# comment\n\n  # another\n", &[]);
        check("A=1\nB=two words\nC=", &[("A", "1"), ("B", "two words"), ("C", "")]);
        check("export A=1\n  export B = 2  ", &[("A", "1"), ("B", "2")]);
        check("A=x # comment\nB=a#b\nC= # nothing\nD=#", &[("A", "x"), ("B", "a#b"), ("C", ""), ("D", "")]);
        check("A='x # y' # z\nB=\"it's\"\nC=`\"`", &[("A", "x # y"), ("B", "it's"), ("C", "\"")]);
        check(r#"A="a\nb\t\"c\" \\ \d""#, &[("A", "a\nb\t\"c\" \\ \\d")]);
        check(r"A='a\nb'", &[("A", r"a\nb")]);
        check("A=\"one\ntwo\"\nB=3", &[("A", "one\ntwo"), ("B", "3")]);
        check("A=1\r\nB=\"2\"\r\nC='x\r\ny'\r\n", &[("A", "1"), ("B", "2"), ("C", "x\ny")]);
        check("URL=postgres://u:p@h/db?a=b&c=d", &[("URL", "postgres://u:p@h/db?a=b&c=d")]);
        check("A=$HOME/${X}", &[("A", "$HOME/${X}")]);
        check("A=1\nA=2", &[("A", "1"), ("A", "2")]);
        check("\u{feff}A=1", &[("A", "1")]);
        check("A=\"never closed\nB=2", &[("A", "\"never closed"), ("B", "2")]);
    }

    #[test]
    fn lines_that_are_none_are_reported_by_number_without_their_text() {
        let file = parse("A=\"1\n2\"\nsecret words\nB C=3\n=4\nD=5");
        assert_eq!(file.variables, [("A".to_owned(), "1\n2".to_owned()), ("D".to_owned(), "5".to_owned())]);
        let lines: Vec<String> = file.skipped.iter().map(ToString::to_string).collect();
        assert_eq!(
            lines,
            [
                "line 3: expected KEY=value",
                "line 4: the part before `=` is no name of a variable",
                "line 5: the part before `=` is no name of a variable"
            ]
        );
    }

    #[test]
    fn unreadable_files_are_errors_with_the_path() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("missing.env");
        assert!(matches!(read(&missing, Trust::All), Err(ReadError::Read { path, .. }) if path == missing));
        let binary = dir.path().join("binary.env");
        std::fs::write(&binary, b"A=\xff\n").unwrap();
        assert!(matches!(read(&binary, Trust::All), Err(ReadError::NotUtf8 { .. })));
        let good = dir.path().join("good.env");
        std::fs::write(&good, "A=1\n").unwrap();
        assert_eq!(read(&good, Trust::All).unwrap().variables, [("A".to_owned(), "1".to_owned())]);
    }

    proptest::proptest! {
        /// Any text is parsed without a panic, and no name or value comes out that exec(3) would cut.
        #[test]
        fn any_text_parses(text in "(?s)[A-C =#'\"`\\\\\n\r\0xü]{0,60}") {
            for (name, value) in parse(&text).variables {
                assert!(!name.is_empty() && !name.contains(['=', '\0']) && !value.contains('\0'));
            }
        }
    }
}
