//! What a keeper leaves for the program that it replaces itself by, beyond the inventory: numbers of descriptors that
//! stay open over execve(2), and what only it knows. Grows as frames do.

use std::os::fd::RawFd;

use super::codec::{Reader, Writer};
use super::{ChildRecord, HeldRecord, Hello, WireError};

/// Says what the bytes are.
const MAGIC: u32 = 0x706d_6b31;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::keeper) struct Own {
    /// What every supervisor is told.
    pub(in crate::keeper) hello: Hello,
    /// The children.
    pub(in crate::keeper) children: Vec<ChildRecord>,
    /// Those whose parent is an earlier keeper, with the descriptor that tells of their end.
    pub(in crate::keeper) adopted: Vec<(u32, Option<RawFd>)>,
    /// The held descriptors.
    pub(in crate::keeper) held: Vec<(HeldRecord, RawFd)>,
    /// The supervisor.
    pub(in crate::keeper) supervisor: u32,
    /// When it was started, in nanoseconds of CLOCK_MONOTONIC.
    pub(in crate::keeper) supervisor_started: u64,
    /// The link to it.
    pub(in crate::keeper) link: RawFd,
    /// It gives signs of life.
    pub(in crate::keeper) beats: bool,
    /// What it was started from.
    pub(in crate::keeper) executable: RawFd,
    /// The out-of-memory score adjustment of children.
    pub(in crate::keeper) children_oom_score_adj: Option<i32>,
}

impl Own {
    pub(in crate::keeper) fn encode(&self) -> Result<Vec<u8>, WireError> {
        let mut w = Writer::default();
        w.u32(MAGIC);
        w.record(|w| self.hello.write(w))?;
        w.list(&self.children, |w, child| w.record(|w| child.write(w)))?;
        w.list(&self.adopted, |w, (pid, fd)| {
            w.u32(*pid);
            w.i32(fd.unwrap_or(-1));
            Ok(())
        })?;
        w.list(&self.held, |w, (held, fd)| {
            w.record(|w| {
                held.write(w)?;
                w.i32(*fd);
                Ok(())
            })
        })?;
        w.u32(self.supervisor);
        w.u64(self.supervisor_started);
        w.i32(self.link);
        w.u8(u8::from(self.beats));
        w.i32(self.executable);
        w.option(self.children_oom_score_adj.as_ref(), |w, &value| {
            w.i32(value);
            Ok(())
        })?;
        w.command()
    }

    pub(in crate::keeper) fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut r = Reader::new(bytes);
        if r.u32()? != MAGIC {
            return Err(WireError::Value("what the keeper before this one left"));
        }
        Ok(Self {
            hello: Hello::read(&mut r.record()?)?,
            children: r.list(|r| ChildRecord::read(&mut r.record()?))?,
            adopted: r.list(|r| Ok((r.u32()?, Some(r.i32()?).filter(|&fd| fd >= 0))))?,
            held: r.list(|r| {
                let mut r = r.record()?;
                Ok((HeldRecord::read(&mut r)?, r.i32()?))
            })?,
            supervisor: r.u32()?,
            supervisor_started: r.u64()?,
            link: r.i32()?,
            beats: r.u8()? != 0,
            executable: r.i32()?,
            children_oom_score_adj: r.option(Reader::i32)?,
        })
    }
}
