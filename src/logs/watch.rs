//! Lines that somebody waits for: a readiness probe of kind `log`.

use regex_lite::Regex;

/// How much of a line is looked at, in bytes.
const LINE_MAX: usize = 8 * 1024;

/// Looks for lines in one stream. Lines are cut at 8 KiB.
#[derive(Clone, Debug)]
pub struct Watch {
    regex: Regex,
    /// How many matches are still of interest.
    left: u32,
    /// The beginning of a line whose end has not come.
    held: Vec<u8>,
}

impl Watch {
    /// Waits for so many matching lines.
    #[must_use]
    pub const fn new(regex: Regex, count: u32) -> Self {
        Self { regex, left: count, held: Vec::new() }
    }

    /// Whether nothing more is of interest.
    #[must_use]
    pub const fn is_over(&self) -> bool {
        self.left == 0
    }

    /// Takes a chunk as it was read and hands matching lines to `found`. A line counts when its end is there, and also
    /// without it: a prompt has none.
    pub fn feed(&mut self, chunk: &[u8], mut found: impl FnMut(&[u8])) {
        let mut rest = chunk;
        while self.left > 0 && !rest.is_empty() {
            let end = memchr::memchr(b'\n', rest);
            let part = &rest[..end.unwrap_or(rest.len())];
            let room = LINE_MAX.saturating_sub(self.held.len()).min(part.len());
            self.held.extend_from_slice(&part[..room]);
            let line = String::from_utf8_lossy(&self.held);
            let line = line.trim_end_matches('\r');
            if !line.is_empty() && self.regex.is_match(line) {
                found(line.as_bytes());
                self.left -= 1;
                // The rest of this line is not looked at again.
                self.held.clear();
                if end.is_none() {
                    return;
                }
            }
            let Some(end) = end else { return };
            self.held.clear();
            rest = &rest[end + 1..];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, count: u32, chunks: &[&str]) -> Vec<String> {
        let mut watch = Watch::new(Regex::new(pattern).unwrap(), count);
        let mut found = Vec::new();
        for chunk in chunks {
            watch.feed(chunk.as_bytes(), |line| found.push(String::from_utf8(line.to_vec()).unwrap()));
        }
        found
    }

    #[test]
    fn lines_are_found_however_they_are_cut() {
        let whole = ["booting\nlistening on 3000\r\nmore\n"];
        assert_eq!(matches(r"^listening on \d+$", 1, &whole), ["listening on 3000"]);
        for cut in 1..whole[0].len() {
            let (one, other) = whole[0].split_at(cut);
            let found = matches("^listening on", 1, &[one, other]);
            assert_eq!(found.len(), 1, "{cut}");
            assert!(found[0].starts_with("listening on"), "{cut}: {found:?}");
        }
        assert_eq!(matches("ready>", 1, &["boot\nready> "]), ["ready> "]);
        assert!(matches("^on", 1, &["listening ", "on 3000\n"]).is_empty(), "a chunk is no line");
    }

    #[test]
    fn no_more_than_were_asked_for_and_bounded_memory() {
        assert_eq!(matches("x", 2, &["x\nx\nx\n"]).len(), 2);
        let mut watch = Watch::new(Regex::new("end").unwrap(), 1);
        for _ in 0..1000 {
            watch.feed(&[b'a'; 1000], |_| panic!());
        }
        assert!(watch.held.len() <= LINE_MAX);
    }
}
