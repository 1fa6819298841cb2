//! Connections that no worker has answered for, where the next supervisor finds them.
//!
//! A connection that was accepted is nowhere but in this process and, once it was handed over, on its way to a worker.
//! If that worker dies or says no while there is no supervisor, or if no worker has it yet, it would be reset. So a
//! copy waits in a pair of stream sockets of which the keeper holds both ends: what was put into one comes out of the
//! other, each with its connection. A connection that was handed over is put there *after* it was sent, and taken away
//! *before* it is sent again, so that two workers never have it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Weak};

use nix::sys::socket::{MsgFlags, recv};
use serde::{Deserialize, Serialize};

use super::run::Handle;
use crate::model::id::{AppName, Generation, Slot};
use crate::sys::fdpass::{self, Take};
use crate::sys::{clock, memfd};

/// The longest record: the keys of listeners are short, but a worker may ask for anything.
const RECORD_MAX: usize = 2048;

/// No record begins so: no name is as long as this would say.
const MARK: &[u8] = &[0xff; 8];

/// Whose a connection is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) app: AppName,
    /// The listener it came from.
    pub(super) key: String,
    /// The worker that it was handed to, with the number of the `newconn`; `None`: it waits for one.
    pub(super) to: Option<(Slot, Generation, u64)>,
}

/// One that lies there.
#[derive(Debug)]
struct Entry {
    connection: Weak<OwnedFd>,
    bytes: Vec<u8>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Shelf {
    put: OwnedFd,
    take: OwnedFd,
    /// As they lie in the sockets.
    entries: VecDeque<Entry>,
}

impl Shelf {
    /// Takes over the two ends, new ones or those of a former supervisor, and what lies there.
    pub(super) fn adopt(put: OwnedFd, take: OwnedFd) -> (Self, Vec<(Record, Handle)>) {
        let mut shelf = Self { put, take, entries: VecDeque::new() };
        let mut found = Vec::new();
        // What is put back comes again behind this mark. It has a descriptor too, as everything here: the kernel ends a
        // message of a stream where descriptors begin.
        let mut mark = MARK.to_vec();
        mark.extend(std::process::id().to_le_bytes());
        mark.extend(clock::now().nanos().to_le_bytes());
        let Ok(nothing) = memfd::create(c"pm-mark") else { return (shelf, found) };
        if fdpass::send(&shelf.put, &mark, &[nothing.as_fd()]).is_err() {
            return (shelf, found);
        }
        let mut buffer = vec![0; RECORD_MAX];
        while let Ok(received) = fdpass::receive(&shelf.take, &mut buffer, Take::Consume)
            && received.len > 0
        {
            let bytes = &buffer[..received.len];
            if bytes == mark {
                break;
            }
            // A mark is left by one that was killed while it did this.
            let record = postcard::from_bytes::<Record>(bytes).ok().filter(|_| !bytes.starts_with(MARK));
            if let Some((record, connection)) = record.zip(received.fds.into_iter().next()) {
                let connection = Arc::new(connection);
                shelf.put(&record, &connection);
                found.push((record, connection));
            }
        }
        (shelf, found)
    }

    /// Puts a copy of a connection there. Without room it is not there, which counts only if two things go wrong.
    pub(super) fn put(&mut self, record: &Record, connection: &Handle) {
        let Ok(bytes) = postcard::to_allocvec(record) else { return };
        if bytes.len() <= RECORD_MAX {
            self.put_entry(Entry { connection: Arc::downgrade(connection), bytes }, connection);
        }
    }

    fn put_entry(&mut self, entry: Entry, connection: &Handle) {
        if fdpass::send(&self.put, &entry.bytes, &[connection.as_fd()]).is_ok() {
            self.entries.push_back(entry);
        }
    }

    /// Whether a copy of this connection is there.
    pub(super) fn has(&self, connection: &Handle) -> bool {
        self.entries.iter().any(|entry| entry.is_of(connection))
    }

    /// Takes the copy of a connection away: with it open, the worker's close would send no FIN.
    pub(super) fn remove(&mut self, connection: &Handle) {
        let Some(place) = self.entries.iter().position(|entry| entry.is_of(connection)) else { return };
        // Those before it go to the end: there are as many as there are workers that have not answered.
        for _ in 0..place {
            self.discard_first().and_then(|entry| {
                let connection = entry.connection.upgrade()?;
                self.put_entry(entry, &connection);
                Some(())
            });
        }
        self.discard_first();
        self.discard_dropped();
    }

    /// Takes away what nobody has any more.
    pub(super) fn discard_dropped(&mut self) {
        for _ in 0..self.entries.len() {
            if self.entries.front().is_none_or(|entry| entry.connection.strong_count() > 0) {
                return;
            }
            self.discard_first();
        }
    }

    /// Whatever is attached to a message that is received without room for it is closed.
    fn discard_first(&mut self) -> Option<Entry> {
        let entry = self.entries.pop_front()?;
        let mut buffer = [0; RECORD_MAX];
        // Only this thread takes from it.
        let _ = recv(self.take.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT);
        Some(entry)
    }
}

impl Entry {
    fn is_of(&self, connection: &Handle) -> bool {
        std::ptr::eq(self.connection.as_ptr(), Arc::as_ptr(connection))
    }
}

/// The two ends of a new shelf, for the keeper to hold.
///
/// # Errors
/// EMFILE, ENFILE.
pub fn ends() -> io::Result<[OwnedFd; 2]> {
    let (put, take) = crate::sys::scm::line_pair()?;
    Ok([put, take])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::scm;

    fn record(seq: u64) -> Record {
        let to = (seq > 0).then_some((Slot(0), Generation(3), seq));
        Record { app: AppName::new("api").unwrap(), key: "0.0.0.0:80:4::0".into(), to }
    }

    /// A connection, and its other end, which sees when the last copy is closed.
    fn connection() -> (Handle, OwnedFd) {
        let (ours, theirs) = scm::line_pair().unwrap();
        (Arc::new(ours), theirs)
    }

    fn is_closed(far: &OwnedFd) -> bool {
        scm::peek(far.as_fd(), &mut [0; 4]).is_ok_and(|seen| seen.count == 0)
    }

    #[test]
    fn what_lies_there_is_found_by_every_next_one_and_what_was_taken_away_is_closed() {
        let [put, take] = ends().unwrap();
        let copy = || (put.try_clone().unwrap(), take.try_clone().unwrap());
        let (mut shelf, found) = Shelf::adopt(put.try_clone().unwrap(), take.try_clone().unwrap());
        assert!(found.is_empty());
        let all: Vec<(Handle, OwnedFd)> = (0..6).map(|_| connection()).collect();
        for ((ours, _), seq) in all.iter().zip(0..) {
            shelf.put(&record(seq), ours);
        }
        // Out of the middle, the front, the end.
        for gone in [2, 0, 5] {
            shelf.remove(&all[gone].0);
            assert!(!shelf.has(&all[gone].0));
        }
        drop(shelf);
        let far: Vec<OwnedFd> = all.into_iter().map(|(_, far)| far).collect();
        assert_eq!(far.iter().map(is_closed).collect::<Vec<_>>(), [true, false, true, false, false, true]);
        for _ in 0..3 {
            let (put, take) = copy();
            let (_, found) = Shelf::adopt(put, take);
            let mut seqs: Vec<u64> =
                found.iter().map(|(record, _)| record.to.as_ref().map_or(0, |to| to.2)).collect();
            seqs.sort_unstable();
            assert_eq!(seqs, [1, 3, 4]);
        }
        let (put, take) = copy();
        let (mut shelf, found) = Shelf::adopt(put, take);
        for (_, connection) in &found {
            shelf.remove(connection);
        }
        drop(found);
        assert!(far.iter().all(is_closed));
    }

    #[test]
    fn the_mark_of_one_that_was_killed_meanwhile_is_nobody_s() {
        let [put, take] = ends().unwrap();
        let (ours, far) = connection();
        let nothing = memfd::create(c"pm-test").unwrap();
        let mut other = MARK.to_vec();
        other.extend([7; 12]);
        fdpass::send(&put, &other, &[nothing.as_fd()]).unwrap();
        fdpass::send(&put, &postcard::to_allocvec(&record(0)).unwrap(), &[ours.as_fd()]).unwrap();
        fdpass::send(&put, b"garbage", &[nothing.as_fd()]).unwrap();
        drop(ours);
        let (mut shelf, found) = Shelf::adopt(put, take);
        assert_eq!(found.iter().map(|(record, _)| record.clone()).collect::<Vec<_>>(), [record(0)]);
        drop(found);
        assert!(!is_closed(&far));
        shelf.discard_dropped();
        assert!(is_closed(&far), "nobody has it any more");
    }

    #[test]
    fn without_room_nothing_is_there_and_nothing_breaks() {
        let [put, take] = ends().unwrap();
        let (mut shelf, _) = Shelf::adopt(put, take);
        let all: Vec<(Handle, OwnedFd)> = (0..600).map(|_| connection()).collect();
        for (ours, _) in &all {
            shelf.put(&record(1), ours);
        }
        let there = all.iter().filter(|(ours, _)| shelf.has(ours)).count();
        assert!((64..600).contains(&there), "{there}");
        for (ours, _) in &all {
            shelf.remove(ours);
        }
        assert!(shelf.entries.is_empty());
        let far: Vec<OwnedFd> = all.into_iter().map(|(_, far)| far).collect();
        assert!(far.iter().all(is_closed));
    }
}
