//! Time stamps before log lines, in dayjs's format language (PM2's `log_date_format`).
//!
//! Formatting a time costs fifty times what copying a line does, so the text of the current second is kept. Nothing
//! here reads a clock: the caller passes the time.

use jiff::Timestamp;
use jiff::tz::TimeZone;
use jiff::{Zoned, civil::Weekday};

/// What `time = true` means.
pub const DEFAULT_FORMAT: &str = "YYYY-MM-DDTHH:mm:ss";

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// A piece of a format: text, or a field of the time. Named after dayjs's tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Text(String),
    Year2,
    Year4,
    Month,
    Month2,
    MonthShort,
    MonthName,
    Day,
    Day2,
    Weekday,
    Weekday2,
    WeekdayShort,
    WeekdayName,
    Hour24,
    Hour24Two,
    Hour12,
    Hour12Two,
    Meridiem,
    MeridiemUpper,
    Minute,
    Minute2,
    Second,
    Second2,
    Millis,
    Offset,
    OffsetBare,
}

/// Turns a time into the `<stamp>: ` in front of a line.
#[derive(Clone, Debug)]
pub struct Stamp {
    pieces: Vec<Piece>,
    zone: TimeZone,
    has_millis: bool,
    /// The second (or millisecond, where the format shows them) that `text` is for.
    cached: Option<i64>,
    text: Vec<u8>,
}

impl Stamp {
    /// A stamp of this dayjs format in the local time zone (`TZ`, else `/etc/localtime`). `None` for an empty format,
    /// which means no stamp.
    #[must_use]
    pub fn new(format: &str) -> Option<Self> {
        Self::in_zone(format, TimeZone::system())
    }

    /// The same in a given time zone.
    #[must_use]
    pub fn in_zone(format: &str, zone: TimeZone) -> Option<Self> {
        if format.is_empty() {
            return None;
        }
        let pieces = parse(format);
        let has_millis = pieces.contains(&Piece::Millis);
        Some(Self { pieces, zone, has_millis, cached: None, text: Vec::new() })
    }

    /// The bytes to put before a line that was read at `now`: the stamp, a colon, a space.
    pub fn prefix(&mut self, now: Timestamp) -> &[u8] {
        let key = if self.has_millis { now.as_millisecond() } else { now.as_second() };
        if self.cached != Some(key) {
            let zoned = now.to_zoned(self.zone.clone());
            let mut text = String::with_capacity(self.text.capacity().max(32));
            for piece in &self.pieces {
                push(&mut text, piece, &zoned);
            }
            text.push_str(": ");
            self.text = text.into_bytes();
            self.cached = Some(key);
        }
        &self.text
    }
}

/// dayjs's own pattern: `[escaped]`, or the longest run of one letter that is a token. What is no token is text.
fn parse(format: &str) -> Vec<Piece> {
    const TOKENS: [(&str, Piece); 25] = [
        ("YYYY", Piece::Year4),
        ("YY", Piece::Year2),
        ("MMMM", Piece::MonthName),
        ("MMM", Piece::MonthShort),
        ("MM", Piece::Month2),
        ("M", Piece::Month),
        ("DD", Piece::Day2),
        ("D", Piece::Day),
        ("dddd", Piece::WeekdayName),
        ("ddd", Piece::WeekdayShort),
        ("dd", Piece::Weekday2),
        ("d", Piece::Weekday),
        ("HH", Piece::Hour24Two),
        ("H", Piece::Hour24),
        ("hh", Piece::Hour12Two),
        ("h", Piece::Hour12),
        ("a", Piece::Meridiem),
        ("A", Piece::MeridiemUpper),
        ("mm", Piece::Minute2),
        ("m", Piece::Minute),
        ("ss", Piece::Second2),
        ("s", Piece::Second),
        ("SSS", Piece::Millis),
        ("ZZ", Piece::OffsetBare),
        ("Z", Piece::Offset),
    ];
    let mut pieces: Vec<Piece> = Vec::new();
    let mut text = String::new();
    let mut rest = format;
    while let Some(first) = rest.chars().next() {
        if let Some(inner) = rest.strip_prefix('[')
            && let Some(end) = inner.find(']')
            && end > 0
        {
            text.push_str(&inner[..end]);
            rest = &inner[end + 1..];
            continue;
        }
        if let Some((token, piece)) = TOKENS.iter().find(|(token, _)| rest.starts_with(token)) {
            if !text.is_empty() {
                pieces.push(Piece::Text(std::mem::take(&mut text)));
            }
            pieces.push(piece.clone());
            rest = &rest[token.len()..];
            continue;
        }
        text.push(first);
        rest = &rest[first.len_utf8()..];
    }
    if !text.is_empty() {
        pieces.push(Piece::Text(text));
    }
    pieces
}

fn push(text: &mut String, piece: &Piece, at: &Zoned) {
    use std::fmt::Write as _;

    let hour12 = match at.hour() % 12 {
        0 => 12,
        hour => hour,
    };
    let month = &MONTHS[usize::try_from(at.month() - 1).unwrap_or(0)];
    let weekday = weekday_number(at.weekday());
    let day_name = DAYS[usize::from(weekday)];
    let offset = at.offset().seconds();
    let (sign, offset) = (if offset < 0 { '-' } else { '+' }, offset.unsigned_abs() / 60);
    // Writing to a String cannot fail.
    let _ = match piece {
        Piece::Text(literal) => text.write_str(literal),
        Piece::Year2 => write!(text, "{:02}", at.year().rem_euclid(100)),
        Piece::Year4 => write!(text, "{:04}", at.year()),
        Piece::Month => write!(text, "{}", at.month()),
        Piece::Month2 => write!(text, "{:02}", at.month()),
        Piece::MonthShort => text.write_str(&month[..3]),
        Piece::MonthName => text.write_str(month),
        Piece::Day => write!(text, "{}", at.day()),
        Piece::Day2 => write!(text, "{:02}", at.day()),
        Piece::Weekday => write!(text, "{weekday}"),
        Piece::Weekday2 => text.write_str(&day_name[..2]),
        Piece::WeekdayShort => text.write_str(&day_name[..3]),
        Piece::WeekdayName => text.write_str(day_name),
        Piece::Hour24 => write!(text, "{}", at.hour()),
        Piece::Hour24Two => write!(text, "{:02}", at.hour()),
        Piece::Hour12 => write!(text, "{hour12}"),
        Piece::Hour12Two => write!(text, "{hour12:02}"),
        Piece::Meridiem => text.write_str(if at.hour() < 12 { "am" } else { "pm" }),
        Piece::MeridiemUpper => text.write_str(if at.hour() < 12 { "AM" } else { "PM" }),
        Piece::Minute => write!(text, "{}", at.minute()),
        Piece::Minute2 => write!(text, "{:02}", at.minute()),
        Piece::Second => write!(text, "{}", at.second()),
        Piece::Second2 => write!(text, "{:02}", at.second()),
        Piece::Millis => write!(text, "{:03}", at.millisecond()),
        Piece::Offset => write!(text, "{sign}{:02}:{:02}", offset / 60, offset % 60),
        Piece::OffsetBare => write!(text, "{sign}{:02}{:02}", offset / 60, offset % 60),
    };
}

fn weekday_number(day: Weekday) -> u8 {
    u8::try_from(day.to_sunday_zero_offset()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(format: &str, expected: &str) {
        // 2024-02-05 is a Monday.
        let at: Timestamp = "2024-02-05T13:04:09.007Z".parse().unwrap();
        let zone = TimeZone::fixed(jiff::tz::Offset::from_seconds(-12_600).unwrap());
        let mut stamp = Stamp::in_zone(format, zone).unwrap();
        assert_eq!(String::from_utf8_lossy(stamp.prefix(at)), format!("{expected}: "), "{format}");
    }

    #[test]
    fn every_token_of_dayjs() {
        check(DEFAULT_FORMAT, "2024-02-05T09:34:09");
        check("YY M D H h m s", "24 2 5 9 9 34 9");
        check("MMM MMMM d dd ddd dddd", "Feb February 1 Mo Mon Monday");
        check("hh a A", "09 am AM");
        check("HH:mm:ss.SSS Z ZZ", "09:34:09.007 -03:30 -0330");
        check("[YYYY] YYYY [at] x", "YYYY 2024 at x");
        check("[] é [x", "[] é [x");
    }

    #[test]
    fn noon_and_midnight_are_twelve() {
        let mut stamp = Stamp::in_zone("h hh A", TimeZone::UTC).unwrap();
        assert_eq!(stamp.prefix("2024-02-05T00:00:00Z".parse().unwrap()), b"12 12 AM: ");
        assert_eq!(stamp.prefix("2024-02-05T12:00:00Z".parse().unwrap()), b"12 12 PM: ");
    }

    #[test]
    fn a_new_second_is_a_new_text() {
        let mut stamp = Stamp::in_zone("ss", TimeZone::UTC).unwrap();
        assert_eq!(stamp.prefix("2024-02-05T00:00:01.9Z".parse().unwrap()), b"01: ");
        assert_eq!(stamp.prefix("2024-02-05T00:00:02.0Z".parse().unwrap()), b"02: ");
        let mut stamp = Stamp::in_zone("SSS", TimeZone::UTC).unwrap();
        assert_eq!(stamp.prefix("2024-02-05T00:00:01.900Z".parse().unwrap()), b"900: ");
        assert_eq!(stamp.prefix("2024-02-05T00:00:01.901Z".parse().unwrap()), b"901: ");
    }

    #[test]
    fn an_empty_format_is_no_stamp() {
        assert!(Stamp::new("").is_none());
    }
}
