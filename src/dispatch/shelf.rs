//! Connections that no worker has answered for, where the next supervisor finds them.
//!
//! A connection that was accepted is nowhere but in this process and, once it was handed over, on its way to a worker.
//! If that worker dies or says no while there is no supervisor, or if no worker has it yet, it would be reset. So a
//! copy waits in a pair of stream sockets of which the keeper holds both ends: what was put into one comes out of the
//! other, each with its connection. A connection that was handed over is put there *after* it was sent, and taken away
//! *before* it is sent again, so that two workers never have it. Whatever else is done here, the others lie there all the
//! while: the next supervisor looks at them where they are, and what has to move is put to its new place first.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Weak};

use nix::sys::socket::{MsgFlags, recv};
use nix::sys::stat::fstat;
use serde::{Deserialize, Serialize};

use super::run::Handle;
use crate::model::id::{AppName, Generation, Slot};
use crate::sys::fdpass::{self, Take};
use crate::sys::scm;

/// The longest record: the keys of listeners are short, but a worker may ask for anything.
const RECORD_MAX: usize = 2048;

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
#[derive(Clone, Debug)]
struct Entry {
    /// Dropped: it is nobody's.
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
        let mut buffer = vec![0; RECORD_MAX];
        // Fails for no unix socket; the first one alone would be found again and again.
        if scm::peek_on(shelf.take.as_fd()).is_err() {
            return (shelf, found);
        }
        while let Ok(received) = fdpass::receive(&shelf.take, &mut buffer, Take::Peek)
            && received.len > 0
        {
            let bytes = buffer[..received.len].to_vec();
            let record = postcard::from_bytes::<Record>(&bytes).ok();
            let mut entry = Entry { connection: Weak::new(), bytes };
            if let Some((record, connection)) = record.zip(received.fds.into_iter().next()) {
                let connection = Arc::new(connection);
                // Moved by one that was killed before it had taken it from its old place.
                if let Some(old) = shelf.entries.iter_mut().find(|old| old.is_twin(&entry, &connection)) {
                    entry.connection = std::mem::take(&mut old.connection);
                } else {
                    entry.connection = Arc::downgrade(&connection);
                    found.push((record, connection));
                }
            }
            shelf.entries.push_back(entry);
        }
        // As above.
        let _ = scm::peek_at_front(shelf.take.as_fd());
        shelf.discard_dropped();
        (shelf, found)
    }

    /// Puts a copy of a connection there. Without room it is not there, which counts only if two things go wrong.
    pub(super) fn put(&mut self, record: &Record, connection: &Handle) {
        let Ok(bytes) = postcard::to_allocvec(record) else { return };
        if bytes.len() <= RECORD_MAX {
            self.put_entry(Entry { connection: Arc::downgrade(connection), bytes }, connection);
        }
    }

    /// Whether there was room.
    fn put_entry(&mut self, entry: Entry, connection: &Handle) -> bool {
        let put = fdpass::send(&self.put, &entry.bytes, &[connection.as_fd()]).is_ok();
        if put {
            self.entries.push_back(entry);
        }
        put
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
            self.move_first_to_the_end();
        }
        self.discard_first();
        self.discard_dropped();
    }

    fn move_first_to_the_end(&mut self) {
        let moved = self.entries.front().and_then(|first| Some((first.clone(), first.connection.upgrade()?)));
        let there =
            moved.as_ref().is_some_and(|(entry, connection)| self.put_entry(entry.clone(), connection));
        self.discard_first();
        // There was no room for both.
        if let Some((entry, connection)) = moved.filter(|_| !there) {
            self.put_entry(entry, &connection);
        }
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
    fn discard_first(&mut self) {
        if self.entries.pop_front().is_some() {
            let mut buffer = [0; RECORD_MAX];
            // Only this thread takes from it.
            let _ = recv(self.take.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT);
        }
    }
}

impl Entry {
    fn is_of(&self, connection: &Handle) -> bool {
        std::ptr::eq(self.connection.as_ptr(), Arc::as_ptr(connection))
    }

    /// Whether this is the same record of the same connection, found through another descriptor.
    fn is_twin(&self, other: &Self, connection: &Handle) -> bool {
        let number = |connection: &Handle| fstat(connection).map(|stat| stat.st_ino).ok();
        self.bytes == other.bytes
            && self
                .connection
                .upgrade()
                .and_then(|own| number(&own))
                .is_some_and(|own| Some(own) == number(connection))
    }
}

/// The two ends of a new shelf, for the keeper to hold.
///
/// # Errors
/// EMFILE, ENFILE.
pub fn ends() -> io::Result<[OwnedFd; 2]> {
    let (put, take) = scm::line_pair()?;
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
    fn what_is_no_record_is_nobody_s() {
        let [put, take] = ends().unwrap();
        let (ours, far) = connection();
        let (nothing, _) = connection();
        fdpass::send(&put, &[0xff; 20], &[nothing.as_fd()]).unwrap();
        fdpass::send(&put, &postcard::to_allocvec(&record(0)).unwrap(), &[ours.as_fd()]).unwrap();
        fdpass::send(&put, b"garbage", &[nothing.as_fd()]).unwrap();
        drop(ours);
        let (mut shelf, found) = Shelf::adopt(put, take);
        assert_eq!(found.iter().map(|(record, _)| record.clone()).collect::<Vec<_>>(), [record(0)]);
        drop(found);
        assert!(!is_closed(&far));
        shelf.discard_dropped();
        assert!(is_closed(&far), "nobody has it any more");
        assert!(shelf.entries.is_empty());
    }

    #[test]
    fn what_was_on_its_way_to_another_place_is_found_once_and_goes_as_a_whole() {
        let [put, take] = ends().unwrap();
        let all: Vec<(Handle, OwnedFd)> = (0..3).map(|_| connection()).collect();
        let (mut shelf, _) = Shelf::adopt(put.try_clone().unwrap(), take.try_clone().unwrap());
        for ((ours, _), seq) in all.iter().zip(1..) {
            shelf.put(&record(seq), ours);
        }
        // Killed between the two steps of moving the first one; the second connection happens to have the same record.
        for (moved, seq) in [(0, 1), (1, 1)] {
            let bytes = postcard::to_allocvec(&record(seq)).unwrap();
            fdpass::send(&put, &bytes, &[all[moved].0.as_fd()]).unwrap();
        }
        drop(shelf);
        let far: Vec<OwnedFd> = all.into_iter().map(|(_, far)| far).collect();
        let (mut shelf, found) = Shelf::adopt(put, take);
        let seqs: Vec<u64> =
            found.iter().map(|(record, _)| record.to.as_ref().map_or(0, |to| to.2)).collect();
        assert_eq!(seqs, [1, 2, 3, 1], "two records of the second connection are two");
        let first = &found[0].1;
        shelf.remove(first);
        assert!(!shelf.has(first));
        drop(found);
        shelf.discard_dropped();
        assert!(far.iter().all(is_closed));
        assert!(shelf.entries.is_empty());
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
