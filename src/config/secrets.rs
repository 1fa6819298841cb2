//! Where in the text of a config file values of the environment stand, so that no excerpt of it shows them.
//!
//! Works on any text, also on one that is no TOML: it is for messages about files that are broken. When in doubt more is
//! hidden than needed, never less.

use std::ops::Range;

use crate::model::mask;

/// The bytes of every value in `[apps.env]`, `[apps.env_NAME]`, `env = { … }` and `env.KEY = …`, but for variables that
/// are never masked.
pub(super) fn secret_values(text: &str) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let mut in_env = false;
    let mut at = 0;
    while at < text.len() {
        let end = line_end(text, at);
        let line = &text[at..end];
        let start = at + (line.len() - line.trim_start().len());
        let trimmed = line.trim();
        let next = end + 1;
        if trimmed.starts_with('#') || trimmed.is_empty() {
            at = next;
        } else if trimmed.starts_with('[') {
            let name = trimmed.trim_start_matches('[').split(']').next().unwrap_or_default();
            in_env = keys(name).iter().skip(1).any(|key| holds_variables(key));
            at = next;
        } else {
            at = entry(text, start, end, in_env, &mut found).max(next);
        }
    }
    found
}

/// `KEY = value` from `start` on; returns where the value ends.
fn entry(text: &str, start: usize, end: usize, in_env: bool, found: &mut Vec<Range<usize>>) -> usize {
    let Some(equals) = unquoted(&text[start..end], &['=']).map(|at| start + at) else {
        // No assignment: what goes on from a line above, or nonsense.
        if in_env {
            found.push(start..end);
        }
        return end;
    };
    let value = skip_blanks(text, equals + 1);
    let path = keys(&text[start..equals]);
    let within = path.iter().position(|key| holds_variables(key));
    match within {
        _ if in_env => hide(text, value, path.last().map_or("", String::as_str), found),
        Some(index) if index + 1 < path.len() => {
            hide(text, value, path.last().map_or("", String::as_str), found)
        }
        Some(_) if text[value..].starts_with('{') => table(text, value, found),
        Some(_) => hide(text, value, "", found),
        // Anything may stand in an app that is written as one inline table.
        None if text[value..].starts_with(['{', '[']) => nested(text, value, found),
        None => value_end(text, value),
    }
}

fn hide(text: &str, value: usize, key: &str, found: &mut Vec<Range<usize>>) -> usize {
    let end = value_end(text, value);
    if !mask::is_open(key) && end > value {
        found.push(value..end);
    }
    end
}

/// `{ A = "x", B = "y" }` from its brace on.
fn table(text: &str, open: usize, found: &mut Vec<Range<usize>>) -> usize {
    let mut at = open + 1;
    while at < text.len() {
        at = skip_blanks(text, at);
        let rest = &text[at..];
        if rest.is_empty() || rest.starts_with('\n') {
            return at;
        }
        if rest.starts_with('}') {
            return at + 1;
        }
        if rest.starts_with(',') {
            at += 1;
            continue;
        }
        let stop = unquoted(rest, &['=', ',', '}', '\n']).unwrap_or(rest.len());
        if !rest[stop..].starts_with('=') {
            // No name: perhaps a value whose quote is missing.
            if stop > 0 {
                found.push(at..at + stop);
            }
            at += stop;
            continue;
        }
        let name = keys(&rest[..stop]);
        let value = skip_blanks(text, at + stop + 1);
        at = hide(text, value, name.last().map_or("", String::as_str), found);
    }
    at
}

/// Looks for `env = {` within another inline table or a list, to its end.
fn nested(text: &str, open: usize, found: &mut Vec<Range<usize>>) -> usize {
    let end = value_end(text, open);
    let mut at = open;
    while let Some(offset) = text[at..end].find('=') {
        let equals = at + offset;
        let before = text[..equals].trim_end();
        let name = before
            .rsplit(|c: char| !(c.is_alphanumeric() || "_-\"'.".contains(c)))
            .next()
            .unwrap_or_default();
        let value = skip_blanks(text, equals + 1);
        let path = keys(name);
        at = equals + 1;
        match path.iter().position(|key| holds_variables(key)) {
            Some(index) if index + 1 < path.len() => {
                at = hide(text, value, path.last().map_or("", String::as_str), found);
            }
            Some(_) if text[value..].starts_with('{') => at = table(text, value, found),
            _ => {}
        }
        at = at.clamp(equals + 1, end);
    }
    end
}

fn holds_variables(key: &str) -> bool {
    key == "env" || (key.starts_with("env_") && key != "env_file")
}

/// `apps."env"` → apps, env.
fn keys(path: &str) -> Vec<String> {
    path.split('.').map(|key| key.trim().trim_matches(['"', '\'']).trim().to_owned()).collect()
}

/// The end of the value that begins here: of its quotes or brackets, or of its word. What is never closed ends with the
/// line, or with the text where it may span lines.
fn value_end(text: &str, at: usize) -> usize {
    let rest = &text[at..];
    for quote in ["\"\"\"", "'''"] {
        if let Some(inside) = rest.strip_prefix(quote) {
            return inside.find(quote).map_or(text.len(), |end| at + end + 2 * quote.len());
        }
    }
    match rest.chars().next() {
        Some(quote @ ('"' | '\'')) => quoted_end(text, at, quote),
        Some('{' | '[') => brackets_end(text, at),
        _ => {
            let stop = rest.find([',', '}', ']', '\n']).unwrap_or(rest.len());
            // A bare word that no TOML has may hold any of these.
            let line = line_end(text, at) - at;
            let is_toml =
                rest[..stop].trim().chars().all(|c| c.is_ascii_alphanumeric() || "+-_.:".contains(c));
            at + if is_toml { rest[..stop].trim_end().len() } else { line }
        }
    }
}

fn quoted_end(text: &str, at: usize, quote: char) -> usize {
    let line = line_end(text, at);
    let mut escaped = false;
    for (offset, c) in text[at + 1..line].char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' if quote == '"' => escaped = true,
            c if c == quote => {
                // What follows the quote on its line belongs to it, should the quote have been meant otherwise.
                let end = at + 1 + offset + 1;
                let after = text[end..line].trim_start();
                return if after.is_empty() || after.starts_with([',', '}', ']', '#']) { end } else { line };
            }
            _ => {}
        }
    }
    line
}

fn brackets_end(text: &str, open: usize) -> usize {
    let (mut depth, mut at) = (0_usize, open);
    while let Some(c) = text[at..].chars().next() {
        match c {
            '{' | '[' => depth += 1,
            '}' | ']' => {
                depth -= 1;
                if depth == 0 {
                    return at + 1;
                }
            }
            '"' | '\'' => {
                at = value_end(text, at);
                continue;
            }
            _ => {}
        }
        at += c.len_utf8();
    }
    text.len()
}

/// Where the first of these stands outside of quotes; quotes that are never closed on their line are none.
fn unquoted(text: &str, wanted: &[char]) -> Option<usize> {
    let mut at = 0;
    while let Some(c) = text[at..].chars().next() {
        if wanted.contains(&c) {
            return Some(at);
        }
        at += c.len_utf8();
        if matches!(c, '"' | '\'')
            && let Some(end) = text[at..line_end(text, at)].find(c)
        {
            at += end + 1;
        }
    }
    None
}

fn skip_blanks(text: &str, at: usize) -> usize {
    let rest = &text[at..];
    at + (rest.len() - rest.trim_start_matches([' ', '\t']).len())
}

fn line_end(text: &str, at: usize) -> usize {
    text[at..].find('\n').map_or(text.len(), |offset| at + offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn masked(text: &str) -> String {
        let mut shown = String::new();
        let mut at = 0;
        for span in secret_values(text) {
            shown.push_str(&text[at..span.start]);
            shown.push('*');
            at = span.end;
        }
        shown + &text[at..]
    }

    #[test]
    fn values_of_the_environment_are_found_however_they_are_written() {
        for (text, expected) in [
            ("[apps.env]\nA = 'x'\nNODE_ENV = 'test'\n", "[apps.env]\nA = *\nNODE_ENV = 'test'\n"),
            ("[apps.env_production]\nA = 1 # why\n", "[apps.env_production]\nA = *\n"),
            (
                "[[apps]]\nenv = { A = \"x, y\", PORT = 1 }\nb = 2",
                "[[apps]]\nenv = { A = *, PORT = 1 }\nb = 2",
            ),
            ("env.A = '''x\ny'''\nb = 'c'", "env.A = *\nb = 'c'"),
            ("env = { 'A=B, C' = 'x', D = 'y' }", "env = { 'A=B, C' = *, D = * }"),
            ("[apps.env]\n'A=B' = 'x'", "[apps.env]\n'A=B' = *"),
            ("env_file = 'x.env'\nscript = 'a'", "env_file = 'x.env'\nscript = 'a'"),
            ("env = ['x', 'y']\n", "env = *\n"),
            ("apps = [{ script = 'a', env = { A = 'x' } }]", "apps = [{ script = 'a', env = { A = * } }]"),
            ("apps = [{ script = 'a', env.A = 'x', b = 1 }]", "apps = [{ script = 'a', env.A = *, b = 1 }]"),
            // Broken ones.
            ("[apps.env]\nA = \"x\nB = x y, z\nC: secret\n", "[apps.env]\nA = *\nB = *\n*\n"),
            ("env = { A = \"x\nb = 2", "env = { A = *\nb = 2"),
            ("[apps.env]\nA = \"x\"y\"\n", "[apps.env]\nA = *\n"),
            ("[apps.env\nA = 'x'", "[apps.env\nA = *"),
        ] {
            assert_eq!(masked(text), expected, "{text:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_has_spans_that_fit_it(text in "[\\[\\]{}a-e='\"., \\n#ü]{0,60}|\\PC*") {
            let mut last = 0;
            for span in secret_values(&format!("[apps.env]\n{text}")) {
                assert!(span.start >= last && span.end >= span.start);
                last = span.end;
            }
            for span in secret_values(&text) {
                assert!(text.get(span).is_some());
            }
        }
    }
}
