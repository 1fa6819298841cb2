//! Sending: what the outbox offers, as far as the socket takes it.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags};

use super::run::{Channel, Deadline, Dispatcher, Flow, LongLine, Source};
use super::shelf::Record;
use super::{DispatchEvent, Part};
use crate::node::channel::{Author, Errand, Handed};
use crate::node::primary::WorkerIx;
use crate::sys::{memfd, scm};

/// After the kernel had no memory for a message.
const MEMORY_RETRY: Duration = Duration::from_millis(10);

impl Dispatcher {
    /// Sends until nothing may go or the socket is full.
    pub(super) fn flush(&mut self, serial: u64) {
        if self.flow == Flow::Frozen {
            return;
        }
        let Some(channel) = self.channels.get_mut(&serial) else { return };
        if channel.deaf {
            channel.outbox.clear();
            return;
        }
        let mut full = false;
        loop {
            if let Some(number) = channel.outbox.kept() {
                let Some(line) = channel.long.get(&number) else {
                    channel.outbox.kept_sent(0);
                    continue;
                };
                match scm::send_file(channel.socket.as_fd(), &line.file, line.length) {
                    Ok(_) => {
                        channel.outbox.kept_sent(0);
                        channel.long.remove(&number);
                        (self.sink)(DispatchEvent::LineGone { id: channel.id.clone(), number });
                    }
                    Err(Errno::EAGAIN) => {
                        let left = scm::left_in_file(&line.file, line.length);
                        channel.outbox.kept_sent(left.unwrap_or(line.length));
                        full = true;
                        break;
                    }
                    Err(Errno::ENOBUFS | Errno::ENOMEM) => {
                        let left = scm::left_in_file(&line.file, line.length);
                        channel.outbox.kept_sent(left.unwrap_or(line.length));
                        self.at(self.now + MEMORY_RETRY, Deadline::Flush(serial));
                        return;
                    }
                    Err(_) => {
                        channel.deafen();
                        break;
                    }
                }
                continue;
            }
            let errand = channel.outbox.next_handed().map(|handed| handed.errand);
            if let (Some(shelf), Some(Handed { handle, errand: Errand::Newconn(_) })) =
                (&mut self.shelf, channel.outbox.next_handed())
            {
                // If it lies there, then as one that waits: from here on it does not.
                shelf.remove(handle);
            }
            let Some((bytes, handle)) = channel.outbox.next() else { break };
            match scm::send(channel.socket.as_fd(), bytes, handle.map(|handle| handle.as_fd())) {
                Ok(count) => {
                    let handle = handle.map(Arc::clone);
                    channel.outbox.sent(count);
                    let app = channel.worker.as_ref().and_then(|worker| self.apps.get(&worker.app));
                    if let (Some(Errand::Newconn(seq)), Some(handle), Some(app), Some(shelf)) =
                        (errand, handle, app, &mut self.shelf)
                        && let Some(key) = app.primary.key_of_unanswered(WorkerIx(serial), seq)
                    {
                        let to = Some((channel.id.slot, channel.id.generation, seq));
                        let record = Record { app: channel.id.app.clone(), key: key.to_owned(), to };
                        shelf.put(&record, &handle);
                    }
                }
                Err(Errno::EAGAIN) => {
                    full = true;
                    break;
                }
                Err(Errno::ENOBUFS | Errno::ENOMEM | Errno::ETOOMANYREFS) => {
                    self.at(self.now + MEMORY_RETRY, Deadline::Flush(serial));
                    return;
                }
                Err(_) => {
                    channel.deafen();
                    break;
                }
            }
        }
        if full != channel.wants_write {
            channel.wants_write = full;
            let mut interest = EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
            interest.set(EpollFlags::EPOLLOUT, full);
            let mut event = EpollEvent::new(interest, Source::Channel(serial).pack());
            if let Err(errno) = self.epoll.modify(&channel.socket, &mut event) {
                tracing::error!(%errno, id = %channel.id, "cannot watch a channel for writing");
            }
        }
    }

    /// Queues a line too long for one piece: it goes when the keeper has its file, so that nobody is left with half of
    /// it.
    pub(super) fn post_long(&mut self, serial: u64, line: &[u8], author: Author) {
        let Some(channel) = self.channels.get_mut(&serial) else { return };
        if channel.deaf {
            return;
        }
        let number = channel.next_long;
        let dropped = DispatchEvent::MessageDropped { id: channel.id.clone() };
        let file = match file_of(line).and_then(|file| Ok((file.try_clone()?, file))) {
            Ok((copy, file)) if channel.outbox.push_kept(number, line.len(), author).is_ok() => {
                channel.next_long += 1;
                channel.long.insert(number, LongLine { file, length: line.len() as u64 });
                copy
            }
            Ok(_) => return self.emit(dropped),
            Err(error) => {
                tracing::error!(id = %channel.id, %error, "no memory for a message");
                return self.emit(dropped);
            }
        };
        let id = channel.id.clone();
        let token = self.next_token();
        self.placing.insert(token, (serial, number));
        self.emit(DispatchEvent::Keep { id, part: Part::Line(number), file: file.into(), token });
    }

    /// The keeper has the file of a line, or cannot have it.
    pub(super) fn placed(&mut self, serial: u64, number: u64, outcome: Result<(), i32>) {
        let Some(channel) = self.channels.get_mut(&serial) else { return };
        if outcome.is_ok() {
            channel.outbox.placed(number);
        } else {
            channel.outbox.unplaced(number);
            channel.long.remove(&number);
            let id = channel.id.clone();
            self.emit(DispatchEvent::MessageDropped { id });
        }
        self.flush(serial);
    }
}

impl Channel {
    /// EPIPE: the worker is going. Its last lines (`accepted` among them) are still to be read, and what it did not
    /// answer for is redispatched at the end of the stream.
    fn deafen(&mut self) {
        self.deaf = true;
        self.outbox.clear();
        self.long.clear();
    }
}

fn file_of(line: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd::create(c"pm-line")?);
    file.write_all(line)?;
    file.rewind()?;
    Ok(file)
}
