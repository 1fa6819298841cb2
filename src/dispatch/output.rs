//! Sending: what the outbox offers, as far as the socket takes it.

use std::os::fd::AsFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags};

use super::run::{Deadline, Dispatcher, Flow, Source};
use crate::sys::scm;

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
        while let Some((bytes, handle)) = channel.outbox.next() {
            match scm::send(channel.socket.as_fd(), bytes, handle.map(|handle| handle.as_fd())) {
                Ok(count) => channel.outbox.sent(count),
                Err(Errno::EAGAIN) => {
                    full = true;
                    break;
                }
                Err(Errno::ENOBUFS | Errno::ENOMEM | Errno::ETOOMANYREFS) => {
                    self.at(self.now + MEMORY_RETRY, Deadline::Flush(serial));
                    return;
                }
                Err(_) => {
                    // EPIPE: the worker is going. Its last lines (`accepted` among them) are still to be read, and
                    // what it did not answer for is redispatched at the end of the stream.
                    channel.deaf = true;
                    channel.outbox.clear();
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
}
