//! Durations and sizes as people write them.

use std::fmt::Write as _;
use std::time::Duration;

/// Why a text is no duration or size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadUnit {
    /// Not a number with a unit at all.
    #[error("expected a duration such as \"10s\", \"1m 30s\", \"1600ms\" or a number of milliseconds")]
    Duration,
    /// Not a size at all.
    #[error("expected a size such as \"300M\", \"1.5G\" or a number of bytes")]
    Size,
    /// A number, but with a unit nobody knows.
    #[error("unknown unit {0:?}; durations take ms, s, m, h and d")]
    DurationUnit(String),
    /// A number, but with a unit nobody knows.
    #[error("unknown unit {0:?}; sizes take K, M, G and T (of 1024)")]
    SizeUnit(String),
    /// More than fits.
    #[error("the number is too large")]
    TooLarge,
}

/// A century: below it a float tells every microsecond.
const LONGEST: Duration = Duration::from_secs(100 * 365 * 86_400);

/// Reads `10s`, `1m 30s`, `1600ms`, `1.5h` or plain milliseconds (`1600`).
///
/// # Errors
/// [`BadUnit`] says what is wrong with the text.
pub fn duration(text: &str) -> Result<Duration, BadUnit> {
    let mut rest = text.trim();
    let mut total = Duration::ZERO;
    let mut terms = 0;
    while !rest.is_empty() {
        let (number, unit, after) = term(rest).ok_or(BadUnit::Duration)?;
        let seconds = match unit {
            "ms" => 0.001,
            "s" | "sec" => 1.0,
            "m" | "min" => 60.0,
            "h" => 3600.0,
            "d" => 86_400.0,
            // Only a lone number is milliseconds: "1m 30" leaves open what was meant.
            "" if terms == 0 && after.is_empty() => 0.001,
            "" => return Err(BadUnit::Duration),
            other => return Err(BadUnit::DurationUnit(other.to_owned())),
        };
        let number: f64 = number.parse().map_err(|_| BadUnit::Duration)?;
        let part = Duration::try_from_secs_f64(number * seconds).map_err(|_| BadUnit::TooLarge)?;
        total = total.checked_add(part).filter(|total| *total <= LONGEST).ok_or(BadUnit::TooLarge)?;
        terms += 1;
        rest = after.trim_start();
    }
    if terms == 0 { Err(BadUnit::Duration) } else { Ok(round_to_micros(total)) }
}

/// Reads `300M`, `1.5G`, `64K`, `300MB`, `300MiB` or plain bytes. All units count in 1024, as in PM2.
///
/// # Errors
/// [`BadUnit`] says what is wrong with the text.
pub fn size(text: &str) -> Result<u64, BadUnit> {
    let (number, unit, after) = term(text.trim()).ok_or(BadUnit::Size)?;
    if !after.trim().is_empty() {
        return Err(BadUnit::Size);
    }
    let shift = match unit.to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KB" | "KIB" => 10,
        "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        "T" | "TB" | "TIB" => 40,
        _ => return Err(BadUnit::SizeUnit(unit.to_owned())),
    };
    let factor = 1u64 << shift;
    // Whole and broken part apart: a float would not carry large byte counts exactly.
    let (whole, broken) = number.split_once('.').unwrap_or((number, ""));
    let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| BadUnit::TooLarge)? };
    let bytes = whole.checked_mul(factor).ok_or(BadUnit::TooLarge)?;
    // Twelve digits are finer than a byte of a terabyte, and their product fits.
    let digits = &broken[..broken.len().min(12)];
    let scale = 10u128.pow(u32::try_from(digits.len()).unwrap_or(0));
    let part = digits.parse::<u128>().unwrap_or(0) * u128::from(factor) / scale;
    bytes.checked_add(u64::try_from(part).map_err(|_| BadUnit::TooLarge)?).ok_or(BadUnit::TooLarge)
}

/// A duration in the shortest spelling that [`duration`] reads back: `1m 30s`, `1600ms`.
#[must_use]
pub fn show_duration(span: Duration) -> String {
    if span.is_zero() {
        return "0s".to_owned();
    }
    let (millis, micros) = (span.as_millis(), span.subsec_micros() % 1000);
    if micros > 0 {
        let fraction = format!("{micros:03}");
        return format!("{millis}.{}ms", fraction.trim_end_matches('0'));
    }
    if !millis.is_multiple_of(1000) {
        return format!("{millis}ms");
    }
    let mut seconds = millis / 1000;
    let mut text = String::new();
    for (unit, length) in [("d", 86_400), ("h", 3600), ("m", 60), ("s", 1)] {
        if seconds >= length {
            let space = if text.is_empty() { "" } else { " " };
            // Writing to a String cannot fail.
            let _ = write!(text, "{space}{}{unit}", seconds / length);
            seconds %= length;
        }
    }
    text
}

/// Splits "30s rest" into ("30", "s", " rest"); `None` when it does not begin with a number.
fn term(text: &str) -> Option<(&str, &str, &str)> {
    let number_end = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, rest) = text.split_at(number_end);
    if !number.bytes().any(|b| b.is_ascii_digit()) || number.matches('.').count() > 1 {
        return None;
    }
    // A space may stand between number and unit: "30 s".
    let unit_text = rest.trim_start();
    let unit_end = unit_text.find(|c: char| !c.is_alphabetic()).unwrap_or(unit_text.len());
    let (unit, after) = unit_text.split_at(unit_end);
    Some((number, unit, after))
}

/// Floats leave dust: "1.1s" is 1100 ms, not 1100.000000000089 ms.
fn round_to_micros(span: Duration) -> Duration {
    let micros = (span.as_nanos() + 500) / 1000;
    Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_in_every_spelling() {
        for (text, millis) in [
            ("10s", 10_000),
            ("1m 30s", 90_000),
            ("1m30s", 90_000),
            ("1600ms", 1600),
            ("1600", 1600),
            ("0", 0),
            ("1.5s", 1500),
            (" 2 h ", 7_200_000),
            ("1d", 86_400_000),
            ("1.1s", 1100),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(millis)), "{text:?}");
        }
        for (text, error) in [
            ("", BadUnit::Duration),
            ("fast", BadUnit::Duration),
            ("-1s", BadUnit::Duration),
            ("1m 30", BadUnit::Duration),
            ("1.2.3s", BadUnit::Duration),
            (".", BadUnit::Duration),
            ("10 parsecs", BadUnit::DurationUnit("parsecs".to_owned())),
            ("99999999999999999999999d", BadUnit::TooLarge),
            ("36501d", BadUnit::TooLarge),
        ] {
            assert_eq!(duration(text), Err(error), "{text:?}");
        }
    }

    #[test]
    fn sizes_in_every_spelling() {
        for (text, bytes) in [
            ("300M", 300 << 20),
            ("300m", 300 << 20),
            ("300MB", 300 << 20),
            ("300 MiB", 300 << 20),
            ("1.5G", 3 << 29),
            ("64K", 65_536),
            ("1234", 1234),
            ("0", 0),
            ("16777217T", 0),
        ] {
            let expected = if text == "16777217T" { Err(BadUnit::TooLarge) } else { Ok(bytes) };
            assert_eq!(size(text), expected, "{text:?}");
        }
        assert_eq!(size("300X"), Err(BadUnit::SizeUnit("X".to_owned())));
        assert_eq!(size("much"), Err(BadUnit::Size));
        assert_eq!(size("1M 2K"), Err(BadUnit::Size));
    }

    #[test]
    fn shown_durations_read_back() {
        for (micros, text) in [
            (0, "0s"),
            (100, "0.1ms"),
            (1_600_025, "1600.025ms"),
            (1_600_000, "1600ms"),
            (90_000_000, "1m 30s"),
            (86_400_000_000, "1d"),
            (30_000_000, "30s"),
            (LONGEST.as_secs() * 1_000_000 - 1, "3153599999999.999ms"),
        ] {
            let span = Duration::from_micros(micros);
            assert_eq!(show_duration(span), text);
            assert_eq!(duration(text), Ok(span));
        }
    }
}
