//! Lines of the protocol: writing one, reading one, and passing a large answer through without parsing it.

use std::io::{self, BufRead, Write};

use serde::Serialize;
use serde_json::value::RawValue;

use super::protocol::{Line, MAX_LINE};

/// Why a line is no line.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// The other side closed, in the middle of a line or between two.
    #[error("connection closed")]
    Closed,
    /// Nothing came within the receive timeout.
    #[error("no answer in time")]
    Silent,
    /// A line is longer than [`MAX_LINE`].
    #[error("a line of more than {MAX_LINE} bytes")]
    TooLong,
    /// A line is not what the protocol says.
    #[error("unexpected line {start:?}")]
    Content {
        /// How the line begins.
        start: String,
        /// Why it is not.
        source: serde_json::Error,
    },
    /// The socket failed.
    #[error("connection failed")]
    Io {
        /// How.
        source: io::Error,
    },
}

impl From<io::Error> for CodecError {
    /// The one place where socket errors become protocol errors; there is no path to lose.
    fn from(source: io::Error) -> Self {
        use io::ErrorKind as Kind;
        match source.kind() {
            Kind::WouldBlock | Kind::TimedOut => Self::Silent,
            Kind::ConnectionReset | Kind::BrokenPipe | Kind::UnexpectedEof | Kind::ConnectionAborted => {
                Self::Closed
            }
            _ => Self::Io { source },
        }
    }
}

/// Writes a message and its newline in one write.
///
/// # Errors
/// The socket's.
pub fn write_line(out: &mut impl Write, message: &impl Serialize) -> Result<(), CodecError> {
    let mut bytes =
        serde_json::to_vec(message).map_err(|source| CodecError::Content { start: String::new(), source })?;
    bytes.push(b'\n');
    out.write_all(&bytes)?;
    out.flush()?;
    Ok(())
}

/// Reads the next line into `buffer`, without its newline. What `buffer` held before is dropped.
///
/// # Errors
/// The other side closed or was silent, or the line is too long.
pub fn read_line(from: &mut impl BufRead, buffer: &mut Vec<u8>) -> Result<(), CodecError> {
    buffer.clear();
    let limit = u64::try_from(MAX_LINE).unwrap_or(u64::MAX).saturating_add(1);
    let mut limited = io::Read::take(from, limit);
    limited.read_until(b'\n', buffer)?;
    if buffer.last() == Some(&b'\n') {
        buffer.pop();
        Ok(())
    } else if buffer.len() > MAX_LINE {
        Err(CodecError::TooLong)
    } else {
        Err(CodecError::Closed)
    }
}

/// Parses a line of the server.
///
/// # Errors
/// It is not one.
pub fn parse(line: &[u8]) -> Result<Line, CodecError> {
    serde_json::from_slice(line).map_err(|source| CodecError::Content { start: start_of(line), source })
}

/// The JSON inside a `Raw` answer, as it came: a list of a thousand apps is megabytes, and only passes through.
/// `None`: the line says something else.
#[must_use]
pub fn raw_answer(line: &[u8]) -> Option<&[u8]> {
    if let Some(raw) = raw_by_shape(line) {
        return Some(raw);
    }
    // Another server may order or space its fields differently.
    #[derive(serde::Deserialize)]
    struct RawLine<'a> {
        #[serde(borrow)]
        reply: RawReply<'a>,
    }
    #[derive(serde::Deserialize)]
    struct RawReply<'a> {
        #[serde(borrow)]
        answer: RawAnswer<'a>,
    }
    #[derive(serde::Deserialize)]
    struct RawAnswer<'a> {
        #[serde(borrow)]
        raw: &'a RawValue,
    }
    let line: RawLine<'_> = serde_json::from_slice(line).ok()?;
    Some(line.reply.answer.raw.get().as_bytes())
}

/// [`raw_answer`] for a line exactly as our own server writes it.
fn raw_by_shape(line: &[u8]) -> Option<&[u8]> {
    let rest = line.strip_prefix(b"{\"op\":")?;
    let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
    rest.get(digits..)?.strip_prefix(b",\"reply\":{\"answer\":{\"raw\":")?.strip_suffix(b"}}}")
}

fn start_of(line: &[u8]) -> String {
    let start = line.get(..80).unwrap_or(line);
    String::from_utf8_lossy(start).into_owned()
}

#[cfg(test)]
mod tests {
    use std::io::BufReader;

    use super::*;
    use crate::ipc::protocol::{Answer, Reply};
    use crate::model::id::OpId;

    #[test]
    fn a_raw_answer_passes_through_in_every_spelling() {
        let raw = RawValue::from_string(r#"[{"a":1}, 2]"#.to_owned()).unwrap();
        let line = Line { op: OpId(7), reply: Reply::Answer(Answer::Raw(raw)) };
        let bytes = serde_json::to_vec(&line).unwrap();
        assert!(raw_by_shape(&bytes).is_some(), "the shape is our own server's: {bytes:?}");
        assert_eq!(raw_answer(&bytes), Some(&br#"[{"a":1}, 2]"#[..]));
        let spaced = br#"{ "reply": {"answer": {"raw": [{"a":1}, 2] }}, "op": 7, "new": true }"#;
        assert_eq!(raw_answer(spaced), Some(&br#"[{"a":1}, 2]"#[..]));
        assert_eq!(raw_answer(br#"{"op":7,"reply":"alive"}"#), None);
    }

    #[test]
    fn lines_come_whole_or_not_at_all() {
        let mut reader = BufReader::with_capacity(4, &b"first\n\nlast without end"[..]);
        let mut line = Vec::new();
        read_line(&mut reader, &mut line).unwrap();
        assert_eq!(line, b"first");
        read_line(&mut reader, &mut line).unwrap();
        assert_eq!(line, b"");
        assert!(matches!(read_line(&mut reader, &mut line), Err(CodecError::Closed)));
    }

    #[test]
    fn garbage_is_quoted_but_not_whole() {
        let CodecError::Content { start, .. } = parse(&[b'x'; 5000]).unwrap_err() else { panic!() };
        assert_eq!(start.len(), 80);
    }
}
