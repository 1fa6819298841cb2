//! JSON as Node 20's `util.inspect(value, { depth: null })` prints it: the form of `prettylist`.
//!
//! The layout (what goes on one line, how long arrays are grouped in columns) follows the behaviour of Node's
//! documented defaults: breakLength 80, compact 3, maxArrayLength 100, maxStringLength 10000, no colors. Lengths count
//! UTF-16 units, as JavaScript does. A test compares it with a real `node`.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

const BREAK_LENGTH: usize = 80;
const COMPACT: usize = 3;
const MAX_ARRAY: usize = 100;
const MAX_STRING: usize = 10_000;
/// Strings up to this length are never split into lines.
const MIN_LINE: usize = 16;

/// A JSON value as JavaScript sees it after `JSON.parse`.
#[derive(Clone, Debug, PartialEq)]
pub enum Js {
    /// null
    Null,
    /// true, false
    Bool(bool),
    /// Every JSON number is a double.
    Number(f64),
    /// A string.
    String(String),
    /// An array.
    Array(Vec<Self>),
    /// An object, in JavaScript's order of keys.
    Object(Vec<(String, Self)>),
}

impl<'de> Deserialize<'de> for Js {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct JsVisitor;
        impl<'de> Visitor<'de> for JsVisitor {
            type Value = Js;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("JSON")
            }
            fn visit_unit<E>(self) -> Result<Js, E> {
                Ok(Js::Null)
            }
            fn visit_bool<E>(self, value: bool) -> Result<Js, E> {
                Ok(Js::Bool(value))
            }
            #[expect(clippy::cast_precision_loss, reason = "JSON.parse makes a double of it too")]
            fn visit_i64<E>(self, value: i64) -> Result<Js, E> {
                Ok(Js::Number(value as f64))
            }
            #[expect(clippy::cast_precision_loss, reason = "JSON.parse makes a double of it too")]
            fn visit_u64<E>(self, value: u64) -> Result<Js, E> {
                Ok(Js::Number(value as f64))
            }
            fn visit_f64<E>(self, value: f64) -> Result<Js, E> {
                Ok(Js::Number(value))
            }
            fn visit_str<E>(self, value: &str) -> Result<Js, E> {
                Ok(Js::String(value.to_owned()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Js, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = seq.next_element()? {
                    items.push(item);
                }
                Ok(Js::Array(items))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Js, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry::<String, Js>()? {
                    entries.push(entry);
                }
                Ok(Js::Object(in_js_order(entries)))
            }
        }
        deserializer.deserialize_any(JsVisitor)
    }
}

/// Array indices ascending, then the others as they came; of a repeated key the first place and the last value.
fn in_js_order(entries: Vec<(String, Js)>) -> Vec<(String, Js)> {
    let mut places: std::collections::HashMap<String, usize> = std::collections::HashMap::new();
    let mut unique: Vec<(String, Js)> = Vec::with_capacity(entries.len());
    for (key, value) in entries {
        if let Some(&place) = places.get(&key) {
            unique[place].1 = value;
        } else {
            places.insert(key.clone(), unique.len());
            unique.push((key, value));
        }
    }
    let (mut indices, others): (Vec<_>, Vec<_>) =
        unique.into_iter().partition(|(key, _)| array_index(key).is_some());
    indices.sort_by_key(|(key, _)| array_index(key));
    indices.extend(others);
    indices
}

/// "0" to "4294967294", without leading zeros (ECMA-262, array index).
fn array_index(key: &str) -> Option<u32> {
    let canonical = key == "0" || (!key.starts_with('0') && key.bytes().all(|byte| byte.is_ascii_digit()));
    if !canonical {
        return None;
    }
    key.parse().ok().filter(|&index| index < u32::MAX)
}

/// Prints a value as Node does, without a final newline.
#[must_use]
pub fn inspect(value: &Js) -> String {
    let mut context = Context { indentation: 0, current_depth: 0 };
    context.value(value, 0)
}

struct Context {
    /// Columns that are taken by the lines above.
    indentation: usize,
    /// The depth of the object that was formatted last: tells how deep an entry is nested.
    current_depth: usize,
}

impl Context {
    fn value(&mut self, value: &Js, depth: usize) -> String {
        match value {
            Js::Null => "null".to_owned(),
            Js::Bool(value) => value.to_string(),
            Js::Number(value) => number(*value),
            Js::String(text) => self.string(text),
            Js::Array(items) if items.is_empty() => "[]".to_owned(),
            Js::Object(entries) if entries.is_empty() => "{}".to_owned(),
            Js::Array(items) => self.array(items, depth + 1),
            Js::Object(entries) => self.object(entries, depth + 1),
        }
    }

    fn array(&mut self, items: &[Js], depth: usize) -> String {
        self.current_depth = depth;
        let mut output: Vec<String> =
            items.iter().take(MAX_ARRAY).map(|item| self.nested(item, depth)).collect();
        let rest = items.len().saturating_sub(MAX_ARRAY);
        if rest > 0 {
            output.push(format!("... {rest} more item{}", if rest > 1 { "s" } else { "" }));
        }
        let entries = output.len();
        if entries > 6 {
            output = self.grouped(output, items);
        }
        // Grouped entries are never joined into a single line.
        let grouped = output.len() != entries;
        self.braced(&output, ['[', ']'], depth, grouped)
    }

    fn object(&mut self, entries: &[(String, Js)], depth: usize) -> String {
        self.current_depth = depth;
        let output: Vec<String> = entries
            .iter()
            .map(|(key, value)| {
                let value = self.nested(value, depth);
                format!("{}: {value}", property(key))
            })
            .collect();
        self.braced(&output, ['{', '}'], depth, false)
    }

    fn nested(&mut self, value: &Js, depth: usize) -> String {
        self.indentation += 2;
        let text = self.value(value, depth);
        self.indentation -= 2;
        text
    }

    /// On one line, if the innermost levels fit there; else an entry per line.
    fn braced(&self, output: &[String], [open, close]: [char; 2], depth: usize, grouped: bool) -> String {
        if self.current_depth - depth < COMPACT && !grouped {
            let start = output.len() + self.indentation + 1 + 10;
            if fits(output, start) && !output.iter().any(|entry| entry.contains('\n')) {
                return format!("{open} {} {close}", output.join(", "));
            }
        }
        let indentation = format!("\n{}", " ".repeat(self.indentation));
        let entries = output.join(&format!(",{indentation}  "));
        format!("{open}{indentation}  {entries}{indentation}{close}")
    }

    /// Entries of a long array in columns, where at least three fit beside each other and their lengths are alike.
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the numbers are lengths of at most a hundred entries, and JavaScript computes them as doubles"
    )]
    fn grouped(&self, output: Vec<String>, items: &[Js]) -> Vec<String> {
        const SEPARATOR: usize = 2;
        // "... n more items" does not count.
        let shown = if output.len() > MAX_ARRAY { output.len() - 1 } else { output.len() };
        let lengths: Vec<usize> = output[..shown].iter().map(|entry| columns_of(entry)).collect();
        let total: usize = lengths.iter().map(|length| length + SEPARATOR).sum();
        let max = lengths.iter().copied().max().unwrap_or(0);
        let actual_max = max + SEPARATOR;
        let alike = total as f64 / actual_max as f64 > 5.0 || max <= 6;
        if actual_max * 3 + self.indentation >= BREAK_LENGTH || !alike {
            return output;
        }
        let bias = (actual_max as f64 - total as f64 / output.len() as f64).sqrt();
        let biased_max = (actual_max as f64 - 3.0 - bias).max(1.0);
        // A square, where a character is two and a half times as high as wide. Math.round rounds halves up.
        let square = ((2.5 * biased_max * shown as f64).sqrt() / biased_max + 0.5).floor() as usize;
        let columns = square.min((BREAK_LENGTH - self.indentation) / actual_max).min(COMPACT * 4).min(15);
        if columns <= 1 {
            return output;
        }
        let widths: Vec<usize> = (0..columns)
            .map(|column| {
                let widest = lengths.iter().skip(column).step_by(columns).copied().max().unwrap_or(0);
                widest + SEPARATOR
            })
            .collect();
        // Numbers are right-aligned; a text among them aligns everything left. Node looks at as many items as there
        // are lines of output, the "more items" line included.
        let numbers = items.iter().take(output.len()).all(|item| matches!(item, Js::Number(_)));
        let mut lines = Vec::new();
        for start in (0..shown).step_by(columns) {
            let end = (start + columns).min(shown);
            let mut line = String::new();
            for index in start..end {
                let last = index + 1 == end;
                let width = widths[index - start];
                let entry = &output[index];
                match (numbers, last) {
                    (true, false) => {
                        pad_start(&mut line, &format!("{entry}, "), width, lengths[index] + SEPARATOR);
                    }
                    (true, true) => pad_start(&mut line, entry, width - SEPARATOR, lengths[index]),
                    (false, false) => {
                        line.push_str(entry);
                        line.push_str(", ");
                        line.extend(std::iter::repeat_n(' ', width - lengths[index] - SEPARATOR));
                    }
                    (false, true) => line.push_str(entry),
                }
            }
            lines.push(line);
        }
        if shown < output.len() {
            lines.extend(output.into_iter().nth(shown));
        }
        lines
    }

    fn string(&self, text: &str) -> String {
        let length = utf16(text);
        if length <= MIN_LINE {
            return quoted(text);
        }
        let cut;
        let (text, trailer) = if length > MAX_STRING {
            let rest = length - MAX_STRING;
            cut = first_units(text, MAX_STRING);
            (cut.as_slice(), format!("... {rest} more character{}", if rest > 1 { "s" } else { "" }))
        } else {
            cut = text.encode_utf16().collect();
            (cut.as_slice(), String::new())
        };
        // The limit is signed in JavaScript: deep inside, every string is too long.
        let room = BREAK_LENGTH.saturating_sub(self.indentation + 4);
        if text.len() > room {
            let lines: Vec<String> =
                text.split_inclusive(|&unit| unit == u16::from(b'\n')).map(quoted_units).collect();
            let separator = format!(" +\n{}", " ".repeat(self.indentation + 2));
            return lines.join(&separator) + &trailer;
        }
        quoted_units(text) + &trailer
    }
}

fn pad_start(line: &mut String, entry: &str, width: usize, length: usize) {
    line.extend(std::iter::repeat_n(' ', width.saturating_sub(length)));
    line.push_str(entry);
}

fn fits(output: &[String], start: usize) -> bool {
    let mut total = output.len() + start;
    if total + output.len() > BREAK_LENGTH {
        return false;
    }
    for entry in output {
        total += utf16(entry);
        if total > BREAK_LENGTH {
            return false;
        }
    }
    true
}

fn utf16(text: &str) -> usize {
    if text.is_ascii() { text.len() } else { text.encode_utf16().count() }
}

fn first_units(text: &str, units: usize) -> Vec<u16> {
    text.encode_utf16().take(units).collect()
}

/// Terminal columns, as far as entries of arrays need them.
fn columns_of(text: &str) -> usize {
    if text.is_ascii() {
        return text.bytes().filter(|byte| *byte >= 32).count();
    }
    unicode_width::UnicodeWidthStr::width(text)
}

fn property(key: &str) -> String {
    let mut bytes = key.bytes();
    let bare = bytes.next().is_some_and(|byte| byte.is_ascii_alphabetic() || byte == b'_')
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    if key == "__proto__" {
        // Otherwise it would read as the prototype.
        "['__proto__']".to_owned()
    } else if bare {
        key.to_owned()
    } else {
        quoted(key)
    }
}

fn quoted(text: &str) -> String {
    quoted_units(&text.encode_utf16().collect::<Vec<_>>())
}

/// In single quotes, or those that need no escapes; a half surrogate pair (from cutting) becomes `\ud83d`.
fn quoted_units(units: &[u16]) -> String {
    let has = |wanted: char| units.iter().any(|&unit| u32::from(unit) == u32::from(wanted));
    let template = units.windows(2).any(|pair| pair == [u16::from(b'$'), u16::from(b'{')]);
    let quote = match (has('\''), has('"'), has('`') || template) {
        (false, _, _) => '\'',
        (true, false, _) => '"',
        (true, true, false) => '`',
        (true, true, true) => '\'',
    };
    let mut result = String::with_capacity(units.len() + 2);
    result.push(quote);
    for decoded in char::decode_utf16(units.iter().copied()) {
        match decoded {
            Ok('\'') if quote == '\'' => result.push_str("\\'"),
            Ok('\\') => result.push_str("\\\\"),
            Ok('\u{8}') => result.push_str("\\b"),
            Ok('\t') => result.push_str("\\t"),
            Ok('\n') => result.push_str("\\n"),
            Ok('\u{c}') => result.push_str("\\f"),
            Ok('\r') => result.push_str("\\r"),
            Ok(c @ ('\0'..' ' | '\u{7f}'..'\u{a0}')) => result.push_str(&format!("\\x{:02X}", u32::from(c))),
            Ok(c) => result.push(c),
            Err(half) => result.push_str(&format!("\\u{:x}", half.unpaired_surrogate())),
        }
    }
    result.push(quote);
    result
}

/// A double as `String(number)` prints it (ECMA-262, Number::toString), and `-0` as inspect does.
fn number(value: f64) -> String {
    if value == 0.0 {
        return if value.is_sign_negative() { "-0".to_owned() } else { "0".to_owned() };
    }
    // Rust's shortest digits are JavaScript's; only the place of the point differs.
    let scientific = format!("{:e}", value.abs());
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let digits: String = mantissa.chars().filter(|c| *c != '.').collect();
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let sign = if value < 0.0 { "-" } else { "" };
    let (count, point) = (i32::try_from(digits.len()).unwrap_or(i32::MAX), exponent + 1);
    let zeros = |n: i32| "0".repeat(usize::try_from(n).unwrap_or(0));
    let body = if (count..=21).contains(&point) {
        format!("{digits}{}", zeros(point - count))
    } else if (1..=21).contains(&point) {
        let (whole, part) = digits.split_at(usize::try_from(point).unwrap_or(0));
        format!("{whole}.{part}")
    } else if (-5..=0).contains(&point) {
        format!("0.{}{digits}", zeros(-point))
    } else {
        let (first, rest) = digits.split_at(1);
        let dot = if rest.is_empty() { "" } else { "." };
        format!("{first}{dot}{rest}e{}{}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
    };
    format!("{sign}{body}")
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn ours(json: &str) -> String {
        inspect(&serde_json::from_str(json).unwrap())
    }

    /// Prints each line of JSON on standard input with the real `util.inspect`; answers end with a form feed.
    fn by_node(samples: &[String]) -> Vec<String> {
        const SCRIPT: &str = "const { inspect } = require('util');
            const lines = require('fs').readFileSync(0, 'utf8').split('\\n').filter(Boolean);
            process.stdout.write(lines.map((l) => inspect(JSON.parse(l), { depth: null })).join('\\f'));";
        let mut node = Command::new("node")
            .args(["-e", SCRIPT])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("node is installed where the suite runs");
        let mut stdin = node.stdin.take().unwrap();
        let text = samples.join("\n");
        let writer = std::thread::spawn(move || std::io::Write::write_all(&mut stdin, text.as_bytes()));
        let output = node.wait_with_output().unwrap();
        writer.join().unwrap().unwrap();
        String::from_utf8(output.stdout).unwrap().split('\u{c}').map(str::to_owned).collect()
    }

    fn check(samples: &[String]) {
        let expected = by_node(samples);
        assert_eq!(expected.len(), samples.len());
        for (sample, expected) in samples.iter().zip(expected) {
            assert_eq!(ours(sample), expected, "of {sample}");
        }
    }

    #[test]
    fn what_jlist_holds() {
        assert_eq!(ours("[]"), "[]");
        assert_eq!(
            ours(
                r#"[{"pid":12,"name":"it's","pm2_env":{"args":["--a"],"env":{}},"monit":{"memory":1,"cpu":0.1}}]"#
            ),
            "[\n  {\n    pid: 12,\n    name: \"it's\",\n    pm2_env: { args: [ '--a' ], env: {} },\n    monit: { memory: 1, cpu: 0.1 }\n  }\n]"
        );
    }

    #[test]
    fn edges_are_nodes() {
        let long_line = "ab ".repeat(60);
        let lines = format!("{}\\n{}\\n", "x".repeat(50), "y".repeat(50));
        let numbers = |count: usize| {
            format!("[{}]", (0..count).map(|n| (n * 37).to_string()).collect::<Vec<_>>().join(","))
        };
        let words = |count: usize| {
            format!(
                "[{}]",
                (0..count).map(|n| format!("\"w{}\"", "o".repeat(n % 7))).collect::<Vec<_>>().join(",")
            )
        };
        let mut samples: Vec<String> = [
            "null",
            "true",
            "0",
            "-0",
            "-0.0",
            "1e21",
            "1e20",
            "123456789012345680000",
            "1.5e-7",
            "0.000001",
            "1e-6",
            "5e-324",
            "0.1",
            "100",
            "1.7976931348623157e308",
            "9007199254740993",
            "-12.50",
            "\"\"",
            "{}",
            "[]",
            "[[]]",
            "[[[[[[1]]]]]]",
            "[{}]",
            "[null]",
            r#""it's""#,
            r#""it's \"q\"""#,
            r#""it's \"q\" `b`""#,
            r#""it's \"q\" ${x}""#,
            r#""$ { '\"""#,
            r#""tab\t nl\n bs\\ nul\u0000 del\u007f nel\u0085 esc\u001b bell\u0007 b\b f\f r\r""#,
            r#""\ud83d\ude00 é ü 漢字""#,
            r#"{"a-b":1,"a b":2,"1a":3,"a1":4,"_":5,"$":6,"":7,"é":8,"__proto__":9,"it's":1}"#,
            r#"{"b":1,"a":2,"10":3,"2":4,"01":5,"4294967295":6,"4294967294":7}"#,
            r#"{"a":1,"b":2,"a":3}"#,
            r#"{"a":{"b":{"c":{}}}}"#,
            r#"{"a":{"b":{"c":{"d":1}}}}"#,
            r#"{"a":{"b":{"c":{"d":{"e":1}}}}}"#,
            r#"[[1,2,[3,4,[5,6,[7]]]],1]"#,
            "[1,2,3,4,5,6]",
            "[1,2,3,4,5,6,7]",
            "[1.5,-2,33333,4,5,6,7,8,9]",
            r#"["a",1,2,3,4,5,6,7,8]"#,
            r#"["漢字","b","c","d","e","f","g","é"]"#,
            r#"[{"a":1},{"a":2},{"a":3},{"a":4},{"a":5},{"a":6},{"a":7}]"#,
            r#"["a long entry that is longer than the others","b","c","d","e","f","g","h"]"#,
        ]
        .iter()
        .map(|sample| (*sample).to_owned())
        .collect();
        samples.extend([
            format!("\"{long_line}\""),
            format!("{{\"k\":\"{long_line}\",\"l\":[\"{lines}\"]}}"),
            format!("\"{lines}\""),
            format!("{{\"deep\":{{\"er\":{{\"text\":\"{lines}\"}}}}}}"),
            format!("\"{}\"", "z".repeat(10_001)),
            format!("[\"{}\"]", "z\\n".repeat(6_000)),
            format!("\"{}😀😀\"", "z".repeat(9_999)),
        ]);
        samples.extend([6, 7, 16, 26, 27, 99, 100, 101, 102, 150].map(numbers));
        samples.extend([6, 7, 16, 26, 27, 99, 100, 101, 102, 150].map(words));
        // Every width around the break, in an array and in an object.
        samples.extend((50..90).map(|width| format!("[\"{}\",1]", "w".repeat(width))));
        samples.extend((50..90).map(|width| format!("{{\"key\":{{\"inner\":\"{}\"}}}}", "w".repeat(width))));
        samples.extend((2..40).map(|count| format!("{{\"a\":{}}}", numbers(count))));
        check(&samples);
    }

    /// A generator that is the same on every run (xorshift64*).
    struct Chance(u64);

    impl Chance {
        fn below(&mut self, bound: u64) -> u64 {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % bound
        }

        fn json(&mut self, depth: u64) -> String {
            match self.below(if depth > 5 { 5 } else { 9 }) {
                0 => ["null", "true", "false", "-0", "0"][usize::try_from(self.below(5)).unwrap()].to_owned(),
                1 => self.below(1 << 30).to_string(),
                2 => format!(
                    "{}.{}e{}",
                    self.below(1000),
                    self.below(1 << 20),
                    i64::try_from(self.below(50)).unwrap() - 25
                ),
                3 | 4 => self.text(),
                5 | 6 => {
                    let alike = self.below(2) == 0;
                    let count = self.below(if alike { 130 } else { 12 });
                    let items: Vec<String> = (0..count)
                        .map(|_| if alike { self.below(1 << 14).to_string() } else { self.json(depth + 1) })
                        .collect();
                    format!("[{}]", items.join(","))
                }
                _ => {
                    let entries: Vec<String> = (0..self.below(8))
                        .map(|_| format!("{}:{}", self.text(), self.json(depth + 1)))
                        .collect();
                    format!("{{{}}}", entries.join(","))
                }
            }
        }

        fn text(&mut self) -> String {
            const LETTERS: [&str; 20] = [
                "a", "b", "c", "Z", "0", "9", "_", "-", " ", ".", "/", "'", "\"", "`", "$", "{", "\n", "\\",
                "é", "\u{1b}",
            ];
            let plain = self.below(3) > 0;
            let length = if self.below(8) == 0 { 100 } else { 20 };
            let letters = if plain { 11 } else { 20 };
            let text: String = (0..self.below(length))
                .map(|_| LETTERS[usize::try_from(self.below(letters)).unwrap()])
                .collect();
            serde_json::to_string(&text).unwrap()
        }
    }

    #[test]
    fn random_values_are_nodes() {
        let mut chance = Chance(0x9E37_79B9_7F4A_7C15);
        let samples: Vec<String> = (0..4000).map(|_| chance.json(0)).collect();
        check(&samples);
    }
}
