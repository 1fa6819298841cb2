//! The pump's loop: pipes that are ready, orders, files that refuse, and what it has to wake up for.

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::ppoll;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::EventFd;
use nix::sys::time::TimeSpec;

use super::super::console::{Lines, Tap};
use super::super::journal::{self, CHUNK, Dropped, Journal, StreamKey};
use super::super::line::{Company, Fed, Framing, Now, Prefix, Unfinished};
use super::super::recent::{Loss, Recent, Stream};
use super::super::relief::{Outlet, Relief};
use super::super::watch::Watch;
use super::super::writer::{Target, Trouble, Writer};
use super::{Attachment, LogEvent, ORDERS, Order, Origin, Pipe, Route, Turnoff, lock};
use crate::model::id::InstanceId;
use crate::model::spec::Overflow;

/// How often what a file refused is tried again.
const RETRY: Duration = Duration::from_millis(100);
/// Ready pipes handled per turn of the loop.
const EVENTS: usize = 64;
/// Turns that follow each other within this time make a storm.
const QUICK: Duration = Duration::from_micros(500);
/// How long pipes fill during a storm.
const REST: Duration = Duration::from_micros(50);

/// Keeps the loop from waking up for every line of a storm.
///
/// A program that writes a line at a time would otherwise be read a line at a time: two system calls and a wake-up for
/// 100 bytes. When turns follow each other quickly and bring little, the loop rests for [`REST`] and lets the pipes
/// fill: a third of the CPU time, and, being shorter than it takes to fill a pipe, no wait for the app (benches/logs.rs;
/// 200 µs would double the time of the fastest writer).
#[derive(Debug, Default)]
struct Pace {
    last: Option<Instant>,
    needs_rest: bool,
}

impl Pace {
    fn note(&mut self, now: Instant, bytes: usize) {
        let is_quick = self.last.is_some_and(|last| now.saturating_duration_since(last) < QUICK);
        self.needs_rest = is_quick && bytes > 0 && bytes < CHUNK / 4;
        self.last = Some(now);
    }

    fn rest(&self) {
        if self.needs_rest {
            // Ending early, by a signal, only makes this turn a small one.
            let _ = ppoll(&mut [], Some(TimeSpec::from_duration(REST)), None);
        }
    }
}

/// Tells whether the loop goes on.
#[derive(PartialEq, Eq)]
enum Turn {
    Next,
    Last,
}

pub(super) struct Source {
    id: InstanceId,
    fd: Arc<OwnedFd>,
    stream: Stream,
    /// Its place in the journal.
    place: StreamKey,
    /// `None` discards.
    writer: Option<u64>,
    framing: Framing,
    /// Where it goes as soon as its line has ended.
    turnoff: Option<Box<Turnoff>>,
    /// What was dropped, as it is shown.
    dropped: Dropped,
    recent: Arc<Mutex<Recent>>,
    watch: Option<Box<Watch>>,
    console: Option<Box<Lines>>,
}

pub(super) struct SharedWriter {
    writer: Writer,
    path: PathBuf,
    streams: usize,
}

pub(super) struct Pump {
    pub(super) epoll: Epoll,
    pub(super) wake: Arc<EventFd>,
    pub(super) orders: Receiver<Order>,
    pub(super) streams: HashMap<u64, Source>,
    pub(super) next_key: u64,
    pub(super) writers: HashMap<u64, SharedWriter>,
    /// Of instances that are about to be attached.
    pub(super) taps: HashMap<InstanceId, Tap>,
    pub(super) next_writer: u64,
    /// Streams that hold an unfinished line; usually none, and then the loop sleeps without a timeout.
    pub(super) holding: Vec<u64>,
    /// Streams that wait for their file, and are not read meanwhile.
    pub(super) paused: Vec<u64>,
    /// When they, and files that owe a notice, are tried again.
    pub(super) retry_at: Option<Instant>,
    pub(super) relief: Arc<Relief>,
    pub(super) journal: Journal,
    pub(super) dropped: Arc<AtomicU64>,
    pub(super) on_event: Box<dyn FnMut(LogEvent) + Send>,
}

impl Pump {
    pub(super) fn run(mut self) {
        let mut events = [EpollEvent::empty(); EVENTS];
        let mut now = clocks();
        let mut pace = Pace::default();
        self.relief.is_for_this_thread();
        loop {
            pace.rest();
            let count = match self.epoll.wait(&mut events, self.timeout(now.instant)) {
                Ok(count) => count,
                Err(Errno::EINTR) => 0,
                // Anything else means that the epoll descriptor is gone, and with it every way to go on.
                Err(_) => return,
            };
            now = clocks();
            let mut has_orders = false;
            let mut bytes = 0;
            for event in &events[..count] {
                if event.data() == ORDERS {
                    has_orders = true;
                } else {
                    bytes += self.read_once(event.data(), now);
                }
            }
            pace.note(now.instant, bytes);
            self.flush_overdue(now);
            self.retry_overdue(now);
            // After the reads: an order may remove a stream whose event is in the list.
            if has_orders && self.obey(now) == Turn::Last {
                return;
            }
        }
    }

    fn timeout(&self, now: Instant) -> EpollTimeout {
        let due = self.holding.iter().filter_map(|key| self.streams.get(key)?.framing.deadline()).min();
        let due = due.into_iter().chain(self.retry_at).min();
        due.map_or(EpollTimeout::NONE, |due| {
            // One more, or the timer ends in the millisecond before the deadline and the loop spins through it.
            let millis = due.saturating_duration_since(now).as_millis() + 1;
            EpollTimeout::from(u16::try_from(millis).unwrap_or(u16::MAX))
        })
    }

    fn obey(&mut self, now: Now) -> Turn {
        let _ = self.wake.read();
        loop {
            match self.orders.try_recv() {
                Ok(Order::Attach(attachment, origin, recent)) => {
                    self.attach(*attachment, origin, &recent, now);
                }
                Ok(Order::Print(id, tap)) => drop(self.taps.insert(id, *tap)),
                Ok(Order::Finish(id)) => {
                    for key in self.streams_of(&id) {
                        self.drain(key, now);
                        self.close(key, now);
                    }
                    (self.on_event)(LogEvent::Drained { id });
                }
                Ok(Order::Detach(id)) => {
                    for key in self.streams_of(&id) {
                        self.close(key, now);
                    }
                    (self.on_event)(LogEvent::Detached { id });
                }
                Ok(Order::Unwatch(id)) => {
                    for source in self.streams.values_mut().filter(|source| source.id == id) {
                        source.watch = None;
                    }
                }
                Ok(Order::Redirect(route)) => self.redirect(*route, now),
                Ok(Order::Reopen) => self.reopen(now),
                Ok(Order::Settle) => {
                    let places: HashSet<StreamKey> =
                        self.streams.values().map(|source| source.place).collect();
                    self.journal.settle(|place| places.contains(&place));
                }
                Ok(Order::Stop(done)) => {
                    let _ = done.send(());
                    return Turn::Last;
                }
                Err(TryRecvError::Empty) => return Turn::Next,
                Err(TryRecvError::Disconnected) => return Turn::Last,
            }
        }
    }

    fn attach(&mut self, attachment: Attachment, origin: Origin, recent: &Arc<Mutex<Recent>>, now: Now) {
        let Attachment { id, out, err, stamp, mark, overflow, watch } = attachment;
        let tap = self.taps.remove(&id);
        let pipes =
            [(Stream::Out, out), (Stream::Err, err)].into_iter().filter_map(|(s, pipe)| Some((s, pipe?)));
        for (stream, Pipe { fd, target }) in pipes {
            let key = self.next_key;
            self.next_key += 1;
            let writer = self.writer_of(target, origin, now);
            if let Err(error) = self.epoll.add(&fd, EpollEvent::new(EpollFlags::EPOLLIN, key)) {
                let path = writer.and_then(|key| Some(self.writers.get(&key)?.path.clone()));
                let reason = format!("output of {id} cannot be watched: {error}");
                (self.on_event)(LogEvent::Trouble(Trouble {
                    path: path.unwrap_or_default(),
                    reason,
                    dropped: 0,
                }));
            }
            let place = self.journal.enter(journal::name_of(&id, stream));
            if origin == Origin::Spawned {
                self.journal.reset(place);
            }
            let left = self.journal.remembered(place);
            let shared = writer.and_then(|number| self.writers.get_mut(&number));
            if let Some(shared) = shared.filter(|_| left.is_mid_line) {
                shared.writer.goes_on(place);
            }
            let prefix = Prefix { stamp: stamp.clone(), mark: mark.clone() };
            let framing = Framing::new(place, prefix, overflow, left.skips_line);
            let (recent, watch) = (Arc::clone(recent), watch.clone().map(Box::new));
            let console = tap.clone().map(|tap| Box::new(Lines::new(tap, stream)));
            let source = Source {
                id: id.clone(),
                fd: Arc::new(fd),
                stream,
                place,
                writer,
                framing,
                turnoff: None,
                dropped: Dropped::default(),
                recent,
                watch,
                console,
            };
            self.streams.insert(key, source);
            self.offer_relief(key);
            if !left.held.is_empty() {
                self.journal.resume(place, &left.held);
                if let Some(source) = self.streams.get_mut(&key) {
                    hear(source, &left.held, &mut self.on_event, now);
                }
                self.work(key, Unfinished::Held, now);
            }
            self.note_dropped(key);
            self.report(writer);
        }
    }

    /// The writer of a target, which has one stream more from now on. `None` discards.
    fn writer_of(&mut self, target: Target, origin: Origin, now: Now) -> Option<u64> {
        let Target::File { path, heir } = target else { return None };
        let known = self.writers.iter().find(|(_, known)| known.path.as_os_str() == path.as_os_str());
        let number = known.map(|(&number, _)| number).unwrap_or_else(|| {
            let number = self.next_writer;
            self.next_writer += 1;
            let writer = Writer::new(path.clone(), heir, now.instant);
            self.writers.insert(number, SharedWriter { writer, path, streams: 0 });
            number
        });
        if let Some(shared) = self.writers.get_mut(&number) {
            shared.streams += 1;
            if shared.streams == 1 && origin == Origin::Spawned {
                shared.writer.begin_line();
            }
        }
        Some(number)
    }

    fn leave_writer(&mut self, number: Option<u64>, now: Now) {
        let Some(number) = number else { return };
        let Some(shared) = self.writers.get_mut(&number) else { return };
        shared.streams -= 1;
        if shared.streams == 0 {
            // The last chance to say what is missing.
            shared.writer.say_losses(&mut self.journal, now.instant);
            self.writers.remove(&number);
        }
    }

    /// Lets the pipe be emptied while a disk is slow.
    fn offer_relief(&self, key: u64) {
        let Some(source) = self.streams.get(&key) else { return };
        if source.writer.is_some() && source.framing.overflow == Overflow::Drop {
            let (fd, recent) = (Arc::clone(&source.fd), Arc::clone(&source.recent));
            self.relief.add(key, Outlet { fd, stream: source.stream, recent });
        } else {
            self.relief.remove(key);
        }
    }

    fn redirect(&mut self, route: Route, now: Now) {
        let Route { id, out, err, stamp, overflow } = route;
        for key in self.streams_of(&id) {
            let Some(source) = self.streams.get_mut(&key) else { continue };
            let target = match source.stream {
                Stream::Out => out.clone(),
                Stream::Err => err.clone(),
            };
            let turnoff = Turnoff { target, stamp: stamp.clone(), overflow };
            let shared = source.writer.and_then(|number| self.writers.get(&number));
            let is_same = match (&turnoff.target, shared) {
                (Target::Discard, None) => true,
                (Target::File { path, .. }, Some(shared)) => *path == shared.path,
                _ => false,
            };
            let is_mid_line = shared.is_some_and(|shared| shared.writer.is_mid_line_of(source.place));
            source.turnoff = Some(Box::new(turnoff));
            // The same file goes on with the line that is open.
            if is_same || !is_mid_line {
                self.turn_off(key, now);
            }
        }
    }

    /// From here on the stream goes where it was redirected to. What is held goes there too.
    fn turn_off(&mut self, key: u64, now: Now) {
        let turnoff = self.streams.get_mut(&key).and_then(|source| source.turnoff.take());
        let Some(turnoff) = turnoff else { return };
        let Turnoff { target, stamp, overflow } = *turnoff;
        let before = self.streams.get(&key).and_then(|source| source.writer);
        let writer = self.writer_of(target, Origin::Spawned, now);
        self.leave_writer(before, now);
        let Some(source) = self.streams.get_mut(&key) else { return };
        if writer != before {
            self.journal.set_mid_line(source.place, false);
        }
        source.writer = writer;
        source.framing.prefix.stamp = stamp;
        source.framing.overflow = overflow;
        self.offer_relief(key);
        self.report(writer);
    }

    /// Reads one chunk. Returns how much there was; 0 when the pipe is empty or ended.
    fn read_once(&mut self, key: u64, now: Now) -> usize {
        let Some(source) = self.streams.get_mut(&key) else { return 0 };
        let taking = self.relief.taking();
        let loss = lock(&source.recent).take_loss(source.stream);
        if let Some(loss) = loss {
            drop(taking);
            self.lose(key, loss, now);
            return 1;
        }
        let received = self.journal.receive(source.place, source.framing.held(), &source.fd, CHUNK);
        drop(taking);
        match received {
            Ok(0) | Err(Errno::EIO | Errno::ECONNRESET | Errno::EINVAL) => {
                // Every writer has closed it. It stays readable for ever, so it is not watched any more; the
                // stream ends, like all others, with the instance.
                let _ = self.epoll.delete(source.fd.as_fd());
                0
            }
            Ok(count) => {
                hear(source, self.journal.arrived(), &mut self.on_event, now);
                self.work(key, Unfinished::Held, now);
                count
            }
            Err(_) => 0,
        }
    }

    /// What was in the pipe was thrown away while a disk was slow.
    fn lose(&mut self, key: u64, loss: Loss, now: Now) {
        self.flush(key, now);
        let Some(source) = self.streams.get_mut(&key) else { return };
        source.framing.lost(&self.journal, loss);
        if let Some(shared) = source.writer.and_then(|number| self.writers.get_mut(&number)) {
            shared.writer.lose_to_slowness(loss.dropped.bytes, now.instant);
        }
        let writer = source.writer;
        self.note_dropped(key);
        self.report(writer);
    }

    /// Writes what is due of what is in the journal.
    fn work(&mut self, key: u64, unfinished: Unfinished, now: Now) {
        self.relief.begin();
        let is_turning = self.streams.get(&key).is_some_and(|source| source.turnoff.is_some());
        if !is_turning || self.end_line(key, now) {
            self.feed(key, unfinished, now);
        }
        self.relief.end();
        self.note_dropped(key);
    }

    /// The stream is to go elsewhere when its line has ended. Returns whether it does, and has held something.
    fn end_line(&mut self, key: u64, now: Now) -> bool {
        let Some(source) = self.streams.get_mut(&key) else { return false };
        let Some(shared) = source.writer.and_then(|number| self.writers.get_mut(&number)) else {
            self.turn_off(key, now);
            return true;
        };
        let (fed, has_ended) = source.framing.end_line(&mut self.journal, &mut shared.writer, now);
        self.pause_or_go_on(key, fed, now);
        if !has_ended {
            return false;
        }
        self.turn_off(key, now);
        let Some(source) = self.streams.get(&key) else { return false };
        self.journal.resume(source.place, source.framing.held());
        true
    }

    fn feed(&mut self, key: u64, unfinished: Unfinished, now: Now) {
        let Some(source) = self.streams.get_mut(&key) else { return };
        let shared = source.writer.and_then(|number| self.writers.get_mut(&number));
        let Some(shared) = shared else {
            let end = self.journal.range().end;
            return self.journal.done(end..end);
        };
        let was_holding = source.framing.deadline().is_some();
        let company = if shared.streams == 1 { Company::Alone } else { Company::Shared };
        let fed = source.framing.feed(&mut self.journal, company, unfinished, &mut shared.writer, now);
        if shared.writer.owes_notice() {
            self.retry_at.get_or_insert(now.instant + RETRY);
        }
        match (was_holding, source.framing.deadline().is_some()) {
            (false, true) => self.holding.push(key),
            (true, false) => self.holding.retain(|&other| other != key),
            _ => {}
        }
        let writer = source.writer;
        self.pause_or_go_on(key, fed, now);
        self.report(writer);
    }

    /// What is in the pipe of a stream whose file takes nothing stays there.
    fn pause_or_go_on(&mut self, key: u64, fed: Fed, now: Now) {
        let Some(source) = self.streams.get(&key) else { return };
        match (fed, self.paused.contains(&key)) {
            (Fed::Part, false) => {
                let _ = self.epoll.delete(source.fd.as_fd());
                self.paused.push(key);
                self.retry_at.get_or_insert(now.instant + RETRY);
            }
            (Fed::All, true) => {
                self.paused.retain(|&other| other != key);
                let _ = self.epoll.add(source.fd.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, key));
            }
            (Fed::Part, true) | (Fed::All, false) => {}
        }
    }

    /// Tries what files have refused.
    fn retry_overdue(&mut self, now: Now) {
        if self.retry_at.is_none_or(|at| at > now.instant) {
            return;
        }
        self.retry_at = None;
        for key in self.paused.clone() {
            let Some(source) = self.streams.get(&key) else { continue };
            self.journal.resume(source.place, source.framing.held());
            self.work(key, Unfinished::Held, now);
        }
        let mut owes = false;
        self.relief.begin();
        for shared in self.writers.values_mut() {
            shared.writer.say_losses(&mut self.journal, now.instant);
            owes |= shared.writer.owes_notice();
        }
        self.relief.end();
        if owes || !self.paused.is_empty() {
            self.retry_at = Some(now.instant + RETRY);
        }
    }

    /// Shows what was dropped of a stream.
    fn note_dropped(&mut self, key: u64) {
        let Some(source) = self.streams.get_mut(&key) else { return };
        let dropped = self.journal.dropped(source.place);
        if dropped != source.dropped {
            source.dropped = dropped;
            lock(&source.recent).set_dropped(source.stream, dropped);
        }
    }

    fn flush_overdue(&mut self, now: Now) {
        for at in (0..self.holding.len()).rev() {
            let key = self.holding[at];
            let deadline = self.streams.get(&key).and_then(|source| source.framing.deadline());
            if deadline.is_none_or(|deadline| deadline <= now.instant) {
                self.holding.swap_remove(at);
                self.flush(key, now);
            }
        }
    }

    fn flush(&mut self, key: u64, now: Now) {
        let Some(source) = self.streams.get(&key).filter(|source| !source.framing.held().is_empty()) else {
            return;
        };
        self.journal.resume(source.place, source.framing.held());
        self.work(key, Unfinished::Written, now);
    }

    /// Reads what was in the pipe when the processes ended, which is never more than the pipe holds: a process that
    /// escaped and goes on writing does not keep the instance from being finished.
    fn drain(&mut self, key: u64, now: Now) {
        let Some(source) = self.streams.get_mut(&key) else { return };
        // Nobody waits any more: last words that no file takes are lost.
        source.framing.overflow = Overflow::Drop;
        if self.paused.contains(&key) {
            self.flush(key, now);
        }
        let Some(source) = self.streams.get(&key) else { return };
        let capacity = fcntl(&source.fd, FcntlArg::F_GETPIPE_SZ).ok();
        let capacity = capacity.and_then(|size| usize::try_from(size).ok()).unwrap_or(CHUNK);
        let mut total = 0;
        while total < capacity {
            match self.read_once(key, now) {
                0 => return,
                count => total += count,
            }
        }
    }

    fn close(&mut self, key: u64, now: Now) {
        self.flush(key, now);
        self.relief.remove(key);
        self.holding.retain(|&other| other != key);
        self.paused.retain(|&other| other != key);
        let Some(mut source) = self.streams.remove(&key) else { return };
        if let Some(console) = &mut source.console {
            console.finish(now.wall);
        }
        self.journal.leave(source.place);
        // Closing is not enough: the keeper has the same open file description, which would stay registered.
        let _ = self.epoll.delete(source.fd.as_fd());
        let writer = source.writer;
        self.leave_writer(writer, now);
    }

    fn reopen(&mut self, now: Now) {
        for shared in self.writers.values_mut() {
            if let Err(error) = shared.writer.reopen(&self.journal, now.instant) {
                let (path, reason) = (shared.path.clone(), format!("cannot open it again: {error}"));
                (self.on_event)(LogEvent::Trouble(Trouble { path, reason, dropped: 0 }));
            }
        }
        (self.on_event)(LogEvent::Reopened);
    }

    fn streams_of(&self, id: &InstanceId) -> Vec<u64> {
        let mut keys: Vec<u64> =
            self.streams.iter().filter(|(_, source)| source.id == *id).map(|(&key, _)| key).collect();
        keys.sort_unstable();
        keys
    }

    fn report(&mut self, writer: Option<u64>) {
        let Some(shared) = writer.and_then(|number| self.writers.get_mut(&number)) else { return };
        let dropped = shared.writer.take_dropped();
        if dropped > 0 {
            self.dropped.fetch_add(dropped, Ordering::Relaxed);
        }
        if let Some(trouble) = shared.writer.take_report() {
            (self.on_event)(LogEvent::Trouble(trouble));
        }
    }
}

/// Keeps what was read for messages, and looks for lines that somebody waits for.
fn hear(source: &mut Source, bytes: &[u8], on_event: &mut dyn FnMut(LogEvent), now: Now) {
    lock(&source.recent).push(source.stream, bytes);
    if let Some(console) = &mut source.console {
        console.feed(bytes, now.wall);
    }
    let Some(watch) = &mut source.watch else { return };
    let id = &source.id;
    watch.feed(bytes, |line| on_event(LogEvent::Matched { id: id.clone(), line: line.to_vec() }));
    if watch.is_over() {
        source.watch = None;
    }
}

fn clocks() -> Now {
    Now { instant: Instant::now(), wall: Timestamp::now() }
}
