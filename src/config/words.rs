//! Splits a line into words the way a shell does, without running one; and the way back.

/// Why a line cannot be split.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadWords {
    /// A quote without its partner.
    #[error("the {0} quote is never closed")]
    Open(char),
    /// Nothing follows the last backslash.
    #[error("nothing follows the backslash at the end")]
    Backslash,
}

/// Splits on blanks; `'…'` is literal, in `"…"` a backslash escapes `"` `\` `$` and backtick, elsewhere anything.
pub fn split(line: &str) -> Result<Vec<String>, BadWords> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match c {
            c if c.is_whitespace() => words.extend(word.take()),
            '\'' => {
                let word = word.get_or_insert_default();
                loop {
                    match chars.next().ok_or(BadWords::Open('\''))? {
                        '\'' => break,
                        c => word.push(c),
                    }
                }
            }
            '"' => {
                let word = word.get_or_insert_default();
                loop {
                    match chars.next().ok_or(BadWords::Open('"'))? {
                        '"' => break,
                        '\\' => match chars.next().ok_or(BadWords::Open('"'))? {
                            c @ ('"' | '\\' | '$' | '`') => word.push(c),
                            c => word.extend(['\\', c]),
                        },
                        c => word.push(c),
                    }
                }
            }
            '\\' => word.get_or_insert_default().push(chars.next().ok_or(BadWords::Backslash)?),
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    Ok(words)
}

/// What a shell does before it runs a program, and nobody else can.
const BUILTINS: [&str; 14] = [
    ".", ":", "alias", "cd", "eval", "exec", "export", "if", "for", "set", "source", "trap", "ulimit",
    "while",
];

/// The first thing in a line that only a shell understands, in words: a pipe, a variable, a redirection, a pattern. In
/// single quotes, or after a backslash, everything is literal.
pub fn shell_syntax(line: &str) -> Option<String> {
    let mut quote = None;
    let mut at_start = true;
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (Some('\''), _) => {}
            (None, '\'' | '"') => quote = Some(c),
            (_, '\\') => {
                chars.next();
            }
            (_, '$' | '`') => return Some(format!("`{c}`")),
            (Some(_), _) => {}
            (None, '|' | '&' | ';' | '<' | '>' | '(' | ')' | '*' | '?' | '[' | '\n') => {
                return Some(format!("`{}`", c.escape_debug()));
            }
            (None, '~' | '#') if at_start => return Some(format!("`{c}`")),
            (None, _) => {}
        }
        at_start = quote.is_none() && c.is_whitespace();
    }
    let first = split(line).ok()?.into_iter().next()?;
    // With a quote in it the name is none.
    let assigns = line.trim_start().split_once('=').is_some_and(|(name, _)| {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
        !name.is_empty() && name.chars().all(plain) && !name.starts_with(|c: char| c.is_ascii_digit())
    });
    (assigns || BUILTINS.contains(&first.as_str())).then(|| format!("`{first}`"))
}

/// The word as a shell reads it back, quoted only where needed.
pub fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./:=@%+,{}".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_as_a_shell_sees_them() {
        for (line, expected) in [
            ("", vec![]),
            ("  --port 3000  ", vec!["--port", "3000"]),
            (r#"--name "two words" 'it is'"#, vec!["--name", "two words", "it is"]),
            (r#"a"b c"d"#, vec!["ab cd"]),
            (r#""" x"#, vec!["", "x"]),
            (r"one\ word \\", vec!["one word", r"\"]),
            (r#""\"\n""#, vec![r#""\n"#]),
            ("tab\tand\nline", vec!["tab", "and", "line"]),
        ] {
            assert_eq!(split(line), Ok(expected.into_iter().map(str::to_owned).collect()), "{line:?}");
        }
        assert_eq!(split("'open"), Err(BadWords::Open('\'')));
        assert_eq!(split("x \"open\\"), Err(BadWords::Open('"')));
        assert_eq!(split("end\\"), Err(BadWords::Backslash));
    }

    #[test]
    fn quoted_words_split_back() {
        for word in ["plain", "", "two words", "it's", r#"a"b"#, "$HOME", "{fd:web}", "ü", "a\nb"] {
            assert_eq!(split(&quote(word)), Ok(vec![word.to_owned()]), "{word:?}");
        }
    }
}
