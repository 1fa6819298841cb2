//! One value of the file, read as what its key wants.

use crate::model::spelling;
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeInteger, DeTable, DeValue};

use super::error::{At, Place, Problem, quoted};
use super::{units, words};

/// A value of the file with its place. Every reader says what it wanted when it finds something else.
#[derive(Clone, Copy, Debug)]
pub(super) struct Value<'a, 'i>(&'a Spanned<DeValue<'i>>);

type Read<T> = Result<T, Problem>;

impl<'a, 'i> Value<'a, 'i> {
    pub(super) const fn new(value: &'a Spanned<DeValue<'i>>) -> Self {
        Self(value)
    }

    pub(super) fn place(self) -> Place {
        Place::Text(self.0.span())
    }

    pub(super) fn problem(self, message: impl Into<String>) -> Problem {
        Problem::new(self.place(), message)
    }

    /// Wraps a value read here with its place.
    pub(super) fn at<T>(self, value: T) -> At<T> {
        At::new(value, self.place())
    }

    fn kind(self) -> &'static str {
        match self.0.get_ref() {
            DeValue::String(_) => "a string",
            DeValue::Integer(_) => "a number",
            DeValue::Float(_) => "a number with a point",
            DeValue::Boolean(_) => "true or false",
            DeValue::Datetime(_) => "a date",
            DeValue::Array(_) => "an array",
            DeValue::Table(_) => "a table",
        }
    }

    fn wanted(self, what: impl Display) -> Problem {
        self.problem(format!("expected {what}, found {}", self.kind()))
    }

    pub(super) fn table(self) -> Option<&'a DeTable<'i>> {
        self.0.get_ref().as_table()
    }

    pub(super) fn array(self) -> Option<impl Iterator<Item = Value<'a, 'i>>> {
        self.0.get_ref().as_array().map(|array| array.iter().map(Value::new))
    }

    pub(super) fn is_integer(self) -> bool {
        self.0.get_ref().is_integer()
    }

    pub(super) fn as_str(self) -> Option<&'a str> {
        self.0.get_ref().as_str()
    }

    pub(super) fn string(self) -> Read<String> {
        let text = self.as_str().ok_or_else(|| self.wanted("a string"))?;
        // The kernel takes paths, arguments and variables up to the first NUL.
        if text.contains('\0') {
            return Err(self.problem("a text cannot contain a NUL character"));
        }
        Ok(text.to_owned())
    }

    /// A string that is not empty.
    pub(super) fn filled(self) -> Read<String> {
        let text = self.string()?;
        if text.trim().is_empty() { Err(self.problem("this must not be empty")) } else { Ok(text) }
    }

    pub(super) fn boolean(self) -> Read<bool> {
        match self.0.get_ref() {
            DeValue::Boolean(value) => Ok(*value),
            DeValue::String(text) if matches!(&**text, "true" | "false") => {
                Err(self.wanted("true or false").help(format!("write {text} without quotes")))
            }
            _ => Err(self.wanted("true or false")),
        }
    }

    /// A whole number, also when it is written as a string, as PM2 takes it.
    pub(super) fn integer(self, allowed: RangeInclusive<i64>) -> Read<i64> {
        let range = format!("{} to {}", allowed.start(), allowed.end());
        let number = match self.0.get_ref() {
            DeValue::Integer(integer) => i64_of(integer),
            DeValue::String(text) => Some(text.trim().parse().map_err(|_| {
                self.problem(format!("expected a number ({range}), found the text {}", quoted(text)))
            })?),
            _ => return Err(self.wanted(format_args!("a whole number ({range})"))),
        };
        match number {
            Some(number) if allowed.contains(&number) => Ok(number),
            _ => Err(self.problem(format!("this is out of range; allowed: {range}"))),
        }
    }

    pub(super) fn count(self, allowed: RangeInclusive<u32>) -> Read<u32> {
        let number = self.integer(i64::from(*allowed.start())..=i64::from(*allowed.end()))?;
        u32::try_from(number).map_err(|_| self.problem("this is out of range"))
    }

    /// A duration: `"10s"` or milliseconds.
    pub(super) fn duration(self, allowed: RangeInclusive<Duration>) -> Read<Duration> {
        let bounds = || {
            format!("{} to {}", units::show_duration(*allowed.start()), units::show_duration(*allowed.end()))
        };
        let out_of_range = || self.problem(format!("this is out of range; allowed: {}", bounds()));
        let span = match self.0.get_ref() {
            DeValue::String(text) if text.trim_start().starts_with('-') => return Err(out_of_range()),
            DeValue::String(text) => units::duration(text).map_err(|error| match error {
                units::BadUnit::TooLarge => out_of_range(),
                other => self.problem(other.to_string()),
            })?,
            DeValue::Integer(integer) => {
                let millis = i64_of(integer).and_then(|n| u64::try_from(n).ok()).ok_or_else(out_of_range)?;
                Duration::from_millis(millis)
            }
            _ => return Err(self.wanted("a duration").help("write \"10s\", or milliseconds: 10000")),
        };
        if allowed.contains(&span) { Ok(span) } else { Err(out_of_range()) }
    }

    /// An array of strings, or one string that is split as a shell splits it.
    pub(super) fn words(self) -> Read<Vec<String>> {
        match self.array() {
            Some(items) => items.map(Value::word).collect(),
            None if self.as_str().is_some() => {
                words::split(&self.string()?).map_err(|error| self.problem(error.to_string()))
            }
            None if self.is_integer() => Ok(vec![self.word()?]),
            None => Err(self.wanted("an array of strings, or one string")),
        }
    }

    /// A string; numbers and booleans as written.
    fn word(self) -> Read<String> {
        match self.0.get_ref() {
            DeValue::String(_) => self.string(),
            DeValue::Integer(_) | DeValue::Float(_) | DeValue::Boolean(_) => Ok(self.text()),
            DeValue::Datetime(_) | DeValue::Array(_) | DeValue::Table(_) => Err(self.wanted("a string")),
        }
    }

    /// An array, or a single value where one is enough.
    pub(super) fn items(self) -> Vec<Self> {
        self.array().map_or_else(|| vec![self], Iterator::collect)
    }

    /// One of a few words.
    pub(super) fn one_of<T: Copy>(self, known: &[(&str, T)]) -> Read<T> {
        let list = || {
            let words: Vec<_> = known.iter().map(|(word, _)| format!("\"{word}\"")).collect();
            match words.split_last() {
                Some((last, [])) => last.clone(),
                Some((last, others)) => format!("{} or {last}", others.join(", ")),
                None => String::new(),
            }
        };
        let text = self.as_str().ok_or_else(|| self.wanted(list()))?;
        if let Some((_, value)) = known.iter().find(|(word, _)| *word == text) {
            return Ok(*value);
        }
        let problem = self.problem(format!("{} is not possible here; use {}", quoted(text), list()));
        Err(match spelling::closest(text, known.iter().map(|(word, _)| *word)) {
            Some(likely) => problem.help(format!("did you mean \"{likely}\"?")),
            None => problem,
        })
    }

    /// The value as an environment variable carries it: text as it is, numbers and booleans as JavaScript prints them,
    /// arrays and tables as JSON, as PM2 does it.
    pub(super) fn text(self) -> String {
        match self.0.get_ref() {
            DeValue::String(text) => text.clone().into_owned(),
            DeValue::Array(_) | DeValue::Table(_) => self.json().to_string(),
            DeValue::Integer(integer) => {
                i64_of(integer).map_or_else(|| integer.to_string(), |n| n.to_string())
            }
            DeValue::Float(float) => {
                float.as_str().parse::<f64>().map_or_else(|_| float.to_string(), |number| number.to_string())
            }
            DeValue::Boolean(value) => value.to_string(),
            DeValue::Datetime(date) => date.to_string(),
        }
    }

    fn json(self) -> serde_json::Value {
        match self.0.get_ref() {
            DeValue::Array(items) => items.iter().map(|item| Value(item).json()).collect(),
            DeValue::Table(table) => {
                let entries = table
                    .iter()
                    .map(|(key, value)| (key.get_ref().clone().into_owned(), Value(value).json()));
                serde_json::Value::Object(entries.collect())
            }
            DeValue::Integer(integer) => match i64_of(integer) {
                Some(number) => number.into(),
                None => self.text().into(),
            },
            DeValue::Float(float) => match float.as_str().parse::<f64>() {
                Ok(number) => number.into(),
                Err(_) => self.text().into(),
            },
            DeValue::Boolean(value) => (*value).into(),
            DeValue::String(_) | DeValue::Datetime(_) => self.text().into(),
        }
    }
}

fn i64_of(integer: &DeInteger<'_>) -> Option<i64> {
    i64::from_str_radix(integer.as_str(), integer.radix()).ok()
}
