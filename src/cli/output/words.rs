//! Numbers as people read them.

use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::ipc::protocol::Row;

/// A time span as tables show it: `0s`, `59s`, `3m`, `2h`, `4D`; PM2's spelling.
#[must_use]
pub fn uptime(millis: u64) -> String {
    let seconds = millis / 1000;
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3_600 => format!("{}m", seconds / 60),
        3_600..86_400 => format!("{}h", seconds / 3_600),
        _ => format!("{}D", seconds / 86_400),
    }
}

/// How long something took: `35 ms`, `1.2 s`, `3 min 5 s`.
#[must_use]
pub fn span(span: Duration) -> String {
    let millis = span.as_millis();
    if millis < 1_000 {
        return format!("{millis} ms");
    }
    let seconds = span.as_secs();
    if seconds < 60 {
        // Rounded down, so that a deadline of 10 s never reads as 10.1 s by rounding alone.
        return format!("{seconds}.{} s", span.subsec_millis() / 100);
    }
    format!("{} min {} s", seconds / 60, seconds % 60)
}

/// [`span`] of milliseconds.
#[must_use]
pub fn millis(millis: u64) -> String {
    span(Duration::from_millis(millis))
}

/// Milliseconds of which fractions matter: `0.35 ms`, `4.2 ms`, `120 ms`, `1.5 s`.
#[must_use]
pub fn fine_millis(millis: f64) -> String {
    match millis {
        millis if millis < 0.995 => format!("{millis:.2} ms"),
        millis if millis < 9.95 => format!("{millis:.1} ms"),
        millis if millis < 999.5 => format!("{millis:.0} ms"),
        millis => format!("{:.1} s", millis / 1_000.0),
    }
}

/// How often in a second: `0`, `0.25`, `3.4`, `1200`.
#[must_use]
pub fn rate(per_second: f64) -> String {
    match per_second {
        rate if rate < 0.005 => "0".to_owned(),
        rate if rate < 0.995 => format!("{rate:.2}"),
        rate if rate < 9.95 => format!("{rate:.1}"),
        rate => format!("{rate:.0}"),
    }
}

/// A setting: `30s`, `1500ms`, `2m`.
#[must_use]
pub fn setting(span: Duration) -> String {
    let millis = span.as_millis();
    if millis > 0 && millis.is_multiple_of(60_000) {
        format!("{}m", millis / 60_000)
    } else if millis.is_multiple_of(1_000) {
        format!("{}s", millis / 1_000)
    } else {
        format!("{millis}ms")
    }
}

/// Bytes in units of 1024, as PM2 counts them: `512 B`, `34.5 MB`, `1.2 GB`.
#[must_use]
pub fn bytes(bytes: u64) -> String {
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    #[expect(clippy::cast_precision_loss, reason = "one decimal is shown")]
    let mut amount = bytes as f64 / 1024.0;
    for unit in ["KB", "MB", "GB"] {
        // 1023.95 would print as 1024.0 of the smaller unit.
        if amount < 1023.95 {
            return format!("{amount:.1} {unit}");
        }
        amount /= 1024.0;
    }
    format!("{amount:.1} TB")
}

/// A share of a core: `0%`, `0.4%`, `12%`, `150%`.
#[must_use]
pub fn percent(share: f64) -> String {
    if share < 0.05 {
        "0%".to_owned()
    } else if share < 9.95 {
        format!("{share:.1}%")
    } else {
        format!("{share:.0}%")
    }
}

/// `1 instance`, `2 instances`.
#[must_use]
pub fn count(number: usize, one: &str) -> String {
    if number == 1 { format!("1 {one}") } else { format!("{number} {one}s") }
}

/// A row's status: PM2's word, or what is worse.
#[must_use]
pub fn status(row: &Row) -> String {
    if row.unhealthy { "unhealthy".to_owned() } else { row.status.to_string() }
}

/// A point in time, given as milliseconds since 1970, in this time zone.
#[must_use]
pub fn date(millis: u64, zone: &TimeZone) -> String {
    i64::try_from(millis)
        .ok()
        .and_then(|millis| Timestamp::from_millisecond(millis).ok())
        .map_or_else(|| "-".to_owned(), |stamp| stamp.to_zoned(zone.clone()).strftime("%F %T %Z").to_string())
}

/// The address to type into a browser, for a TCP listener; `None` for a unix socket.
#[must_use]
pub fn url(listen: &str) -> Option<String> {
    // A Node app that listens on every interface is listed as `*:3000`.
    let listen = listen.strip_prefix('*').map_or_else(|| listen.to_owned(), |port| format!("[::]{port}"));
    let address: std::net::SocketAddr = listen.parse().ok()?;
    // An address of every interface cannot be dialled everywhere; `[::]` is dual stack.
    let host = if address.ip().is_unspecified() {
        "127.0.0.1".to_owned()
    } else if address.is_ipv6() {
        format!("[{}]", address.ip())
    } else {
        address.ip().to_string()
    };
    Some(match address.port() {
        80 => format!("http://{host}"),
        port => format!("http://{host}:{port}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans() {
        for (given, expected) in
            [(0, "0s"), (59_999, "59s"), (60_000, "1m"), (7_200_000, "2h"), (200_000_000, "2D")]
        {
            assert_eq!(uptime(given), expected);
        }
        for (given, expected) in
            [(0, "0 ms"), (999, "999 ms"), (1_290, "1.2 s"), (10_000, "10.0 s"), (185_000, "3 min 5 s")]
        {
            assert_eq!(millis(given), expected);
        }
        for (given, expected) in [(0, "0s"), (1_500, "1500ms"), (30_000, "30s"), (120_000, "2m")] {
            assert_eq!(setting(Duration::from_millis(given)), expected);
        }
    }

    #[test]
    fn fine_numbers() {
        for (given, expected) in
            [(0.0, "0.00 ms"), (0.354, "0.35 ms"), (4.21, "4.2 ms"), (9.97, "10 ms"), (1_490.0, "1.5 s")]
        {
            assert_eq!(fine_millis(given), expected);
        }
        for (given, expected) in [(0.0, "0"), (0.25, "0.25"), (3.44, "3.4"), (1_200.4, "1200")] {
            assert_eq!(rate(given), expected);
        }
    }

    #[test]
    fn amounts() {
        for (given, expected) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KB"),
            (36_175_872, "34.5 MB"),
            (1_073_700_000, "1.0 GB"),
        ] {
            assert_eq!(bytes(given), expected);
        }
        for (given, expected) in [(0.0, "0%"), (0.42, "0.4%"), (9.97, "10%"), (150.3, "150%")] {
            assert_eq!(percent(given), expected);
        }
    }

    #[test]
    fn urls() {
        for (given, expected) in [
            ("0.0.0.0:8080", Some("http://127.0.0.1:8080")),
            ("[::]:3000", Some("http://127.0.0.1:3000")),
            ("*:3000", Some("http://127.0.0.1:3000")),
            ("[::1]:3000", Some("http://[::1]:3000")),
            ("10.0.0.7:80", Some("http://10.0.0.7")),
            ("unix:/run/app.sock", None),
        ] {
            assert_eq!(url(given).as_deref(), expected);
        }
    }

    #[test]
    fn dates() {
        assert_eq!(date(1_700_000_000_000, &TimeZone::UTC), "2023-11-14 22:13:20 UTC");
        assert_eq!(date(u64::MAX, &TimeZone::UTC), "-");
    }
}
