//! The client's end of the socket: one connection, one call at a time, with a bound on every wait.
//!
//! Synchronous: a command is one question, and a runtime would cost more than the answer. Never starts a daemon.

use std::collections::hash_map::RandomState;
use std::fmt;
use std::hash::{BuildHasher, Hasher};
use std::io::{self, BufReader};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::codec::{self, CodecError};
use super::protocol::{Answer, Call, Line, PlanView, Refused, Reply, Request, StepView, VERSION};
use crate::model::id::OpId;
use crate::sys::{peer, pipe};

/// How long connecting may take: a daemon that is flooded by others accepts thousands of them in a second.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a supervisor may say nothing while a call is under way. It speaks every second.
pub const SILENCE_MAX: Duration = Duration::from_secs(4);

/// Connecting and silence together: a command ends within five seconds of a daemon that does not answer.
const PATIENCE: Duration = Duration::from_millis(4_500);

/// Large enough that a list of a hundred apps takes a handful of reads.
const BUFFER: usize = 128 * 1024;

/// A connection to a supervisor.
pub struct Connection {
    stream: BufReader<UnixStream>,
    line: Vec<u8>,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").finish_non_exhaustive()
    }
}

/// What a running call says.
#[derive(Debug)]
pub enum Heard {
    /// Words before it acts.
    Notice(String),
    /// What is going to be done.
    Plan(Box<PlanView>),
    /// A step.
    Step(Box<StepView>),
}

/// How a call ended.
#[derive(Debug)]
pub enum Ended {
    /// With an answer.
    Answer(Box<Answer>),
    /// With a refusal.
    Refused(Refused),
    /// The listener said that it has heard enough; the operation goes on.
    Left,
}

/// Whether to go on listening.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listen {
    /// Until the end.
    On,
    /// No longer: `--no-wait`.
    Enough,
}

impl Connection {
    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// `NotFound` and `ConnectionRefused` mean that there is no daemon, `TimedOut` that it does not accept.
    pub fn open(path: &std::path::Path) -> io::Result<Self> {
        let begun = Instant::now();
        let stream = pipe::stream_connect(path, CONNECT_TIMEOUT)?;
        let took = Instant::now().saturating_duration_since(begun);
        let silence = PATIENCE.saturating_sub(took).clamp(Duration::from_secs(1), SILENCE_MAX);
        stream.set_read_timeout(Some(silence))?;
        stream.set_write_timeout(Some(silence))?;
        Ok(Self { stream: BufReader::with_capacity(BUFFER, stream), line: Vec::new() })
    }

    /// The uid of the daemon at the other end.
    ///
    /// # Errors
    /// As getsockopt(2).
    pub fn server_uid(&self) -> io::Result<u32> {
        peer::uid_of(self.stream.get_ref().as_fd())
    }

    /// Asks, passes on what is said meanwhile, and returns the end.
    ///
    /// # Errors
    /// The connection closed, was silent for [`SILENCE_MAX`], or talks something else.
    pub fn call(
        &mut self,
        op: OpId,
        request: Request,
        mut hear: impl FnMut(Heard) -> Listen,
    ) -> Result<Ended, CodecError> {
        self.send(op, request)?;
        loop {
            self.next_line()?;
            let line = codec::parse(&self.line)?;
            if !belongs(&line, op) {
                continue;
            }
            let heard = match line.reply {
                Reply::Alive => continue,
                Reply::Notice(text) => Heard::Notice(text),
                Reply::Plan(plan) => Heard::Plan(Box::new(plan)),
                Reply::Progress(step) => Heard::Step(Box::new(step)),
                Reply::Answer(answer) => return Ok(Ended::Answer(Box::new(answer))),
                Reply::Refused(refused) => return Ok(Ended::Refused(refused)),
            };
            if hear(heard) == Listen::Enough {
                return Ok(Ended::Left);
            }
        }
    }

    /// Asks for something that answers `Raw`, and returns the JSON unparsed.
    ///
    /// # Errors
    /// As of [`Self::call`]. The inner result is the refusal.
    pub fn call_raw(&mut self, op: OpId, request: Request) -> Result<Result<&[u8], Refused>, CodecError> {
        self.send(op, request)?;
        loop {
            self.next_line()?;
            if codec::raw_answer(&self.line).is_some() {
                break;
            }
            let line = codec::parse(&self.line)?;
            if !belongs(&line, op) {
                continue;
            }
            if let Reply::Refused(refused) = line.reply {
                return Ok(Err(refused));
            }
        }
        // Looked up twice because the borrow of the first cannot leave the loop; it costs a comparison of 40 bytes.
        codec::raw_answer(&self.line).map(Ok).ok_or(CodecError::Closed)
    }

    fn send(&mut self, op: OpId, request: Request) -> Result<(), CodecError> {
        codec::write_line(self.stream.get_mut(), &Call { v: VERSION, op, request })
    }

    fn next_line(&mut self) -> Result<(), CodecError> {
        codec::read_line(&mut self.stream, &mut self.line)
    }
}

/// Whether a line answers the call. A request that the server cannot read has no id; its refusal carries 0.
const fn belongs(line: &Line, op: OpId) -> bool {
    line.op.0 == op.0 || (line.op.0 == 0 && matches!(line.reply, Reply::Refused(_)))
}

/// A fresh name for an operation. At random, so that no two clients agree by accident; 53 bits, so that JavaScript
/// reads it unchanged.
#[must_use]
pub fn new_op() -> OpId {
    // std seeds RandomState from the kernel; that is the only randomness a client needs.
    // 0 is nobody's.
    OpId((RandomState::new().build_hasher().finish() >> 11).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_have_different_names() {
        let names: std::collections::BTreeSet<_> = (0..1000).map(|_| new_op()).collect();
        assert_eq!(names.len(), 1000);
        assert!(names.iter().all(|op| op.0 < 1 << 53));
    }
}
