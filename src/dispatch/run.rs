//! The thread's loop: sockets, commands, deadlines.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::AssertUnwindSafe;
use std::sync::atomic::AtomicUsize;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::sync::{Arc, Weak};
use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::EventFd;
use nix::time::{ClockId, clock_gettime};

use super::backlog::Backlog;
use super::crowd::Crowd;
use super::inbox::Inbox;
use super::input::{Awaiting, Until};
use super::listeners::ListeningSocket;
use super::shelf::{Record, Shelf};
use super::slots::Group;
use super::{
    Adopted, ChannelKind, Command, DispatchEvent, InstanceStats, ListenerStats, Message, NewInstance,
    OpenListener, SETTLE_WITHIN, Stats, Token,
};
use crate::model::id::{AppName, InstanceId};
use crate::model::moment::Moment;
use crate::model::spec::Balance;
use crate::node::channel::{Author, Errand, Handed, Lines, Outbox};
use crate::node::choice::client_of;
use crate::node::messages::{self, Query, QueryKind};
use crate::node::primary::{ListenerIx, Primary, WorkerIx};
use crate::sys::guise::Guise;
use crate::sys::{listen, reuseport, scm};

/// What may be in flight to a worker: a connection or a shared listener.
pub(super) type Handle = Arc<OwnedFd>;

/// How long after adoption a handle of the former supervisor may still be unanswered.
const INHERITED_WITHIN: Duration = Duration::from_secs(1);
/// How often it is looked whether the worker has read it.
const INHERITED_LOOK: Duration = Duration::from_millis(5);

/// A channel and what is known of the instance behind it.
pub(super) struct Channel {
    pub(super) id: InstanceId,
    pub(super) socket: OwnedFd,
    /// `None` for a plain channel.
    pub(super) worker: Option<Worker>,
    pub(super) lines: Lines,
    pub(super) outbox: Outbox<Handle>,
    /// A control line that the driver has not recorded yet.
    pub(super) awaiting: Option<Awaiting>,
    /// It writes Bun's mark and wants it.
    pub(super) marked: bool,
    /// EPOLLOUT is asked for.
    pub(super) wants_write: bool,
    /// The peer takes nothing any more; its last lines may still be read.
    pub(super) deaf: bool,
    pub(super) ready: bool,
    /// TakeOut is unanswered.
    pub(super) settling: bool,
    pub(super) accepted: u64,
    /// The socket of the last probe, as long as the agent has not taken it.
    probe: Weak<OwnedFd>,
    /// User messages that were dropped because the driver has too many already.
    pub(super) messages_lost: u64,
    /// Lines for the app that are too long for one piece.
    pub(super) long: HashMap<u64, LongLine>,
    pub(super) next_long: u64,
    /// Made when the app says something that is too long to wait in the socket.
    pub(super) inbox: Option<Inbox>,
    /// The beginning of a line has been waiting alone: its rest may need the room.
    pub(super) unfinished: Unfinished,
    /// Numbers of `newconn`s of a former supervisor that are not answered.
    pub(super) inherited: Vec<u64>,
}

/// A line in a file that the keeper holds, or is about to.
pub(super) struct LongLine {
    pub(super) file: File,
    pub(super) length: u64,
}

/// What is done about a line without an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unfinished {
    /// There is none.
    No,
    /// It is looked at in a while.
    Waits,
    /// It is taken out of the socket, however short it is.
    Take,
}

/// The cluster side of a channel.
pub(super) struct Worker {
    pub(super) app: u64,
    pub(super) balance: Balance,
    pub(super) configured: Vec<Handle>,
    pub(super) guise: Guise,
}

/// The descriptor that an app's first configured listener has.
const FIRST_CONFIGURED: i64 = 3;

impl Worker {
    /// The configured listener that `listen({fd})` means. The number stands for the app's configuration and never for
    /// a descriptor of our own.
    pub(super) fn configured_socket(&self, query: &Query) -> Option<&Handle> {
        if query.kind != QueryKind::Descriptor {
            return None;
        }
        self.configured.get(usize::try_from(query.fd? - FIRST_CONFIGURED).ok()?)
    }
}

/// An app with cluster workers or listeners.
pub(super) struct App {
    pub(super) name: AppName,
    pub(super) primary: Primary<Handle>,
    /// Where its clients are, as far as that counts.
    pub(super) crowd: Crowd,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Deadline {
    /// A worker had time enough to answer.
    Settle(u64),
    /// Rejected connections are offered again.
    Retry(u64),
    /// Look whether a slot's worker accepts.
    Look(ListenerIx),
    /// A slot's worker gets connections again.
    Unstick(ListenerIx),
    /// Accepting failed; try again.
    Accept(ListenerIx),
    /// Sending failed for want of kernel memory; try again.
    Flush(u64),
    /// Look whether a former supervisor's handle has been read; give up at the moment.
    Inherited(u64, Moment),
    /// The beginning of a line has waited long enough.
    Unfinished(u64),
    /// A line that could not be answered is read again.
    Again(Token),
    /// A channel is read on: the driver had too much to do with what it was told.
    Read(u64),
    /// Enough waiting before a freeze.
    Freeze,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flow {
    Running,
    /// Accepts nothing, waits for answers.
    Freezing,
    /// Touches nothing.
    Frozen,
}

pub(super) struct Dispatcher {
    pub(super) epoll: Epoll,
    wake: Arc<EventFd>,
    commands_rx: Receiver<Command>,
    pub(super) sink: Box<dyn Fn(DispatchEvent) + Send>,
    pub(super) backlog: Backlog,
    pub(super) channels: HashMap<u64, Channel>,
    by_id: HashMap<InstanceId, u64>,
    pub(super) apps: HashMap<u64, App>,
    by_name: HashMap<AppName, u64>,
    pub(super) sockets: HashMap<ListenerIx, ListeningSocket>,
    /// Which channel waits for a token.
    pub(super) tokens: HashMap<Token, u64>,
    /// Which line of which channel waits for a token.
    pub(super) placing: HashMap<Token, (u64, u64)>,
    /// Where unanswered connections lie for the next supervisor.
    pub(super) shelf: Option<Shelf>,
    /// What lay there, and whose worker has not come yet.
    found: Vec<(Record, Handle)>,
    deadlines: BTreeMap<(Moment, u64), Deadline>,
    /// Sockets of which every slot has one.
    pub(super) groups: HashMap<u64, Group>,
    /// Who serves a slot may have changed in this turn.
    pub(super) unsteered: bool,
    /// Not all that a former supervisor had is known yet: the kernel does as that one told it.
    pub(super) adopting: bool,
    /// Channels with more to read than one turn allows.
    pub(super) again: Vec<u64>,
    pub(super) flow: Flow,
    /// Numbers channels, apps, listeners, tokens and deadlines.
    serial: u64,
    pub(super) now: Moment,
    /// When a listener was closed the last time, here or by a former supervisor.
    pub(super) closed_at: Option<Moment>,
    pub(super) peeked: Vec<u8>,
    pub(super) scratch: Vec<u8>,
    /// Bytes of user messages that the driver has not dropped yet.
    messages_waiting: Arc<AtomicUsize>,
}

/// What an epoll event is about, packed into its 64 bits.
#[derive(Debug, Clone, Copy)]
pub(super) enum Source {
    Wake,
    Channel(u64),
    Listener(ListenerIx),
}

impl Source {
    pub(super) const fn pack(self) -> u64 {
        match self {
            Self::Wake => 0,
            Self::Channel(serial) => serial << 2 | 1,
            Self::Listener(ListenerIx(serial)) => serial << 2 | 2,
        }
    }

    const fn unpack(bits: u64) -> Self {
        match bits & 3 {
            1 => Self::Channel(bits >> 2),
            2 => Self::Listener(ListenerIx(bits >> 2)),
            _ => Self::Wake,
        }
    }
}

impl Dispatcher {
    pub(super) fn new(
        wake: Arc<EventFd>,
        commands_rx: Receiver<Command>,
        sink: Box<dyn Fn(DispatchEvent) + Send>,
        backlog: Backlog,
    ) -> nix::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&*wake, EpollEvent::new(EpollFlags::EPOLLIN, Source::Wake.pack()))?;
        Ok(Self {
            epoll,
            wake,
            commands_rx,
            sink: backlog.counting(sink),
            backlog,
            channels: HashMap::new(),
            by_id: HashMap::new(),
            apps: HashMap::new(),
            by_name: HashMap::new(),
            sockets: HashMap::new(),
            groups: HashMap::new(),
            unsteered: false,
            adopting: false,
            tokens: HashMap::new(),
            placing: HashMap::new(),
            shelf: None,
            found: Vec::new(),
            deadlines: BTreeMap::new(),
            again: Vec::new(),
            flow: Flow::Running,
            serial: 0,
            now: clock(),
            closed_at: None,
            peeked: vec![0; 64 * 1024],
            scratch: vec![0; 64 * 1024],
            messages_waiting: Arc::default(),
        })
    }

    pub(super) fn run(mut self) {
        let panicked = std::panic::catch_unwind(AssertUnwindSafe(|| self.turns())).is_err();
        self.emit(DispatchEvent::Ended { panicked });
    }

    fn turns(&mut self) {
        let mut events = [EpollEvent::empty(); 128];
        loop {
            let count = match self.epoll.wait(&mut events, self.timeout()) {
                Ok(count) => count,
                Err(nix::errno::Errno::EINTR) => continue,
                Err(errno) => {
                    // EBADF and EINVAL only: our own descriptor is broken.
                    tracing::error!(%errno, "epoll_wait failed; dispatching ends");
                    return;
                }
            };
            self.now = clock();
            for event in &events[..count] {
                match Source::unpack(event.data()) {
                    Source::Wake => {
                        // Only resets the counter; EAGAIN means that a former turn did.
                        let _ = self.wake.read();
                        if !self.take_commands() {
                            return;
                        }
                    }
                    Source::Channel(serial) => self.channel_event(serial, event.events()),
                    Source::Listener(ix) => {
                        let Some(socket) = self.sockets.get_mut(&ix) else { continue };
                        if let Some(seat) = socket.seat {
                            self.slot_event(ix, seat);
                            continue;
                        }
                        socket.readable = true;
                        self.serve(ix);
                    }
                }
            }
            for serial in std::mem::take(&mut self.again) {
                self.pump(serial);
            }
            self.due();
            self.steer();
            if self.flow == Flow::Freezing {
                self.freeze_if_settled();
            }
        }
    }

    fn timeout(&self) -> EpollTimeout {
        if !self.again.is_empty() {
            return EpollTimeout::ZERO;
        }
        let Some(((at, _), _)) = self.deadlines.first_key_value() else { return EpollTimeout::NONE };
        // Rounded up: waking early would spin until the moment has come.
        let millis = at.since(clock()).as_nanos().div_ceil(1_000_000);
        EpollTimeout::try_from(i32::try_from(millis).unwrap_or(i32::MAX)).unwrap_or(EpollTimeout::MAX)
    }

    fn channel_event(&mut self, serial: u64, events: EpollFlags) {
        if events.contains(EpollFlags::EPOLLOUT) {
            self.flush(serial);
        }
        if events.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLERR) {
            // The end of the stream is behind the data, and has no event of its own any more.
            self.pump(serial);
        } else if events.contains(EpollFlags::EPOLLIN) {
            self.read_channel(serial, Until::Seen);
        }
    }

    /// Returns false when the thread shall end.
    fn take_commands(&mut self) -> bool {
        loop {
            match self.commands_rx.try_recv() {
                Ok(Command::Finish) | Err(TryRecvError::Disconnected) => return false,
                Ok(command) => self.perform(command),
                Err(TryRecvError::Empty) => return true,
            }
        }
    }

    fn perform(&mut self, command: Command) {
        match command {
            Command::UseShelf { put, take } => {
                let (shelf, found) = Shelf::adopt(put, take);
                self.shelf = Some(shelf);
                self.found = found;
            }
            Command::Adopted => {
                self.adopting = false;
                self.serve_found();
            }
            Command::AddInstance(new) => self.add_instance(*new),
            Command::AdoptListener { app, listener } => {
                let app = self.app(&app);
                self.register_listener(app, listener);
                self.adopting = true;
            }
            Command::PutIn { id } => self.put_in(&id),
            Command::TakeOut { id } => self.take_out(&id),
            Command::AskKillListeners { id, signal } => {
                self.post_to(&id, messages::agent_listeners(signal));
            }
            Command::Drain { id, drain } => self.post_to(&id, messages::agent_drain(drain)),
            Command::AskFigures { ids, ask } => {
                for id in &ids {
                    self.post_to(id, messages::agent_figures(ask));
                }
            }
            Command::Probe { id, socket } => self.hand_probe(&id, socket),
            Command::Disconnect { id } => {
                if let Some(serial) = self.by_id.get(&id).copied() {
                    let seq = self.next_seq(serial);
                    self.post(serial, messages::disconnect(seq), None);
                }
            }
            Command::SendShutdown { id } => self.post_message(&id, b"\"shutdown\"\n".to_vec()),
            Command::SendMessage { id, json } => {
                let mut line = json.into_bytes();
                // One newline inside would make it two broken lines, which end the app.
                line.retain(|byte| *byte != b'\n');
                line.push(b'\n');
                self.post_message(&id, line);
            }
            Command::Remove { id } => {
                if let Some(serial) = self.by_id.get(&id).copied() {
                    self.forget_channel(serial);
                }
            }
            Command::CloseListeners { app, keys } => self.close_listeners(&app, keys.as_deref()),
            Command::Recorded { token } => self.recorded(token, Ok(())),
            Command::NotRecorded { token, errno } => self.recorded(token, Err(errno)),
            Command::Freeze => {
                if self.flow == Flow::Running {
                    self.flow = Flow::Freezing;
                    self.at(self.now + SETTLE_WITHIN, Deadline::Freeze);
                }
            }
            Command::Thaw => self.thaw(),
            Command::Stats { reply } => reply(self.stats()),
            Command::Finish => {}
        }
    }

    fn add_instance(&mut self, new: NewInstance) {
        let NewInstance { id, channel, kind, agent, guise, adopted } = new;
        if let Some(former) = self.by_id.get(&id).copied() {
            self.forget_channel(former);
        }
        let serial = self.next_serial();
        let is_adopted = adopted.is_some();
        if is_adopted {
            self.closed_at = Some(self.now);
        }
        let Adopted { ready, open, inbox, lines: long } = adopted.unwrap_or_default();
        let mut unanswered = Vec::new();
        let worker = match kind {
            ChannelKind::Plain => None,
            ChannelKind::Cluster { balance, configured } => {
                let app = self.app(&id.app);
                // Beyond every number a former supervisor can have used: nobody sends one message a microsecond.
                let first_seq = if is_adopted { self.now.nanos() / 1_000 } else { 0 };
                if let Some(app) = self.apps.get_mut(&app) {
                    app.primary.add_worker(WorkerIx(serial), id.slot, balance, first_seq);
                    if is_adopted {
                        app.primary.expect(WorkerIx(serial), self.now);
                    }
                    for OpenListener { key, query, listening } in open {
                        if let Some(listener) = app.primary.listener(&key) {
                            if !listening && is_adopted {
                                unanswered.push((listener, query.clone()));
                            }
                            app.primary.open(WorkerIx(serial), listener, query);
                        }
                    }
                }
                Some(Worker { app, balance, configured, guise })
            }
        };
        let app = worker.as_ref().map(|worker| worker.app);
        let balance = worker.as_ref().map(|worker| worker.balance);
        if let Err(error) = listen::set_nonblocking(channel.as_fd()) {
            tracing::warn!(%id, %error, "cannot make the channel non-blocking");
        }
        let interest = EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
        let registered = self.epoll.add(&channel, EpollEvent::new(interest, Source::Channel(serial).pack()));
        let mut outbox = if is_adopted { Outbox::inherited() } else { Outbox::default() };
        let next_long = long.last_key_value().map_or(0, |(number, _)| number + 1);
        let long = self.adopt_long(&id, long, &mut outbox);
        let (inbox, lines) = self.adopt_inbox(&id, inbox, channel.as_fd());
        let inherited = self.inherit(&id, serial);
        self.channels.insert(
            serial,
            Channel {
                id: id.clone(),
                socket: channel,
                worker,
                lines,
                outbox,
                awaiting: None,
                marked: false,
                wants_write: false,
                deaf: false,
                ready,
                settling: false,
                accepted: 0,
                probe: Weak::new(),
                messages_lost: 0,
                long,
                next_long,
                inbox,
                unfinished: Unfinished::No,
                inherited,
            },
        );
        self.by_id.insert(id, serial);
        if let Err(errno) = registered {
            // ENOSPC or ENOMEM; without its channel the instance counts as unreachable, not as dead.
            tracing::error!(%errno, "cannot watch a channel");
            self.end_channel(serial);
            return;
        }
        if is_adopted {
            if let Some(app) = app {
                self.watch_all(app);
            }
            self.look_at_inherited(serial, self.now + INHERITED_WITHIN);
            // The former supervisor may have been killed between the query and our answer; a second one is ignored.
            for (listener, query) in unanswered {
                self.grant(serial, listener, &query);
            }
            self.flush(serial);
        }
        if let Some(greeting) = agent {
            self.post(serial, messages::agent_hello(greeting), None);
            if balance == Some(Balance::LeastConnections) {
                self.post(serial, messages::agent_watch(), None);
            }
        }
    }

    fn adopt_long(
        &self,
        id: &InstanceId,
        lines: BTreeMap<u64, OwnedFd>,
        outbox: &mut Outbox<Handle>,
    ) -> HashMap<u64, LongLine> {
        let mut long = HashMap::new();
        for (number, file) in lines {
            let file = File::from(file);
            let length = file.metadata().map_or(0, |metadata| metadata.len());
            let left = scm::left_in_file(&file, length).unwrap_or(0);
            if left == 0 {
                // It had gone, and nobody had time to say so.
                self.emit(DispatchEvent::LineGone { id: id.clone(), number });
                continue;
            }
            outbox.adopt_kept(number, usize::try_from(length).unwrap_or(usize::MAX), length - left);
            long.insert(number, LongLine { file, length });
        }
        long
    }

    fn adopt_inbox(
        &mut self,
        id: &InstanceId,
        file: Option<OwnedFd>,
        socket: BorrowedFd<'_>,
    ) -> (Option<Inbox>, Lines) {
        let Some(file) = file else { return (None, Lines::default()) };
        match Inbox::adopt(file, socket, &mut self.scratch) {
            Ok((inbox, lines)) => {
                if inbox.skipped() > 0 {
                    let (id, total) = (id.clone(), inbox.skipped());
                    self.emit(DispatchEvent::LongLineSkipped { id, bytes: 0, total });
                }
                (Some(inbox), lines)
            }
            Err(error) => {
                tracing::error!(%id, %error, "what was read of a message is lost");
                (None, Lines::default())
            }
        }
    }

    /// The connections that a former supervisor had handed to this worker become ours.
    fn inherit(&mut self, id: &InstanceId, serial: u64) -> Vec<u64> {
        let Some(app) = self.app_serial(&id.app).and_then(|app| self.apps.get_mut(&app)) else {
            return Vec::new();
        };
        let is_its = |record: &Record| {
            let worker = record.to.as_ref().map(|(slot, generation, _)| (*slot, *generation));
            record.app == id.app && worker == Some((id.slot, id.generation))
        };
        let mut inherited = Vec::new();
        for (record, connection) in self.found.extract_if(.., |(record, _)| is_its(record)) {
            let (Some((_, _, seq)), Some(listener)) = (record.to, app.primary.listener(&record.key)) else {
                tracing::warn!(?record, "a connection has no listener any more and is reset");
                continue;
            };
            let client = client_behind(&app.primary, listener, &connection);
            app.primary.inherit(WorkerIx(serial), listener, seq, connection, client, self.now);
            inherited.push(seq);
        }
        inherited
    }

    /// What lay on the shelf for nobody, or for a worker that is no more, is anybody's.
    fn serve_found(&mut self) {
        for (record, connection) in std::mem::take(&mut self.found) {
            let app_serial = self.app_serial(&record.app);
            let app = app_serial.and_then(|app| self.apps.get_mut(&app));
            let listener = app.as_ref().and_then(|app| app.primary.listener(&record.key));
            if let Some((app, listener)) = app.zip(listener) {
                let client = client_behind(&app.primary, listener, &connection);
                app.primary.connection(listener, connection, client);
                self.serve(listener);
            } else {
                tracing::warn!(?record, "a connection has no listener any more and is reset");
            }
        }
        if let Some(shelf) = &mut self.shelf {
            shelf.discard_dropped();
        }
    }

    /// A handle line that the worker has read is answered or about to be; only an unread one must not be followed by
    /// another handle.
    pub(super) fn look_at_inherited(&mut self, serial: u64, until: Moment) {
        let Some(channel) = self.channels.get_mut(&serial) else { return };
        if !channel.outbox.is_inherited() {
            return;
        }
        if self.now >= until || scm::peer_has_read_all(channel.socket.as_fd()) == Ok(true) {
            channel.outbox.answered();
            self.flush(serial);
        } else {
            self.at(self.now + INHERITED_LOOK, Deadline::Inherited(serial, until));
        }
    }

    fn put_in(&mut self, id: &InstanceId) {
        let Some(serial) = self.by_id.get(id).copied() else { return };
        let Some(channel) = self.channels.get_mut(&serial) else { return };
        channel.settling = false;
        let Some(app) = channel.worker.as_ref().and_then(|worker| self.apps.get_mut(&worker.app)) else {
            return;
        };
        for listener in app.primary.put_in(WorkerIx(serial)) {
            self.serve(listener);
        }
        self.unsteered = true;
    }

    fn take_out(&mut self, id: &InstanceId) {
        let Some(serial) = self.by_id.get(id).copied() else {
            // Its channel has ended: nothing is on its way.
            self.emit(DispatchEvent::Settled { id: id.clone(), unanswered: 0 });
            return;
        };
        self.unsteered = true;
        if let Some(channel) = self.channels.get_mut(&serial) {
            channel.settling = true;
            if let Some(app) = channel.worker.as_ref().and_then(|worker| self.apps.get_mut(&worker.app)) {
                app.primary.take_out(WorkerIx(serial));
            }
        }
        if !self.settled_if(serial, |unanswered| unanswered == 0) {
            self.at(self.now + SETTLE_WITHIN, Deadline::Settle(serial));
        }
    }

    fn hand_probe(&mut self, id: &InstanceId, socket: OwnedFd) {
        let Some(serial) = self.by_id.get(id).copied() else { return };
        let Some(channel) = self.channels.get_mut(&serial) else { return };
        if channel.deaf || channel.probe.strong_count() > 0 {
            return;
        }
        let handle = Arc::new(socket);
        channel.probe = Arc::downgrade(&handle);
        self.post(serial, messages::agent_probe(), Some(Handed { handle, errand: Errand::Probe }));
    }

    /// Answers TakeOut when the number of unanswered connections says so.
    pub(super) fn settled_if(&mut self, serial: u64, enough: impl Fn(usize) -> bool) -> bool {
        let Some(channel) = self.channels.get_mut(&serial) else { return true };
        if !channel.settling {
            return true;
        }
        let app = channel.worker.as_ref().and_then(|worker| self.apps.get(&worker.app));
        let unanswered = app.map_or(0, |app| app.primary.unanswered(WorkerIx(serial)));
        if !enough(unanswered) {
            return false;
        }
        channel.settling = false;
        let id = channel.id.clone();
        self.emit(DispatchEvent::Settled { id, unanswered });
        true
    }

    fn due(&mut self) {
        while let Some(entry) = self.deadlines.first_entry() {
            if entry.key().0 > self.now {
                return;
            }
            match entry.remove() {
                Deadline::Settle(serial) => {
                    self.settled_if(serial, |_| true);
                }
                Deadline::Retry(app) => {
                    if let Some(app) = self.apps.get_mut(&app) {
                        for listener in app.primary.retry_due(self.now) {
                            self.serve(listener);
                        }
                    }
                }
                Deadline::Look(listener) => self.look(listener),
                Deadline::Unstick(listener) => self.unstick(listener),
                Deadline::Accept(listener) => self.serve(listener),
                Deadline::Flush(serial) => self.flush(serial),
                Deadline::Inherited(serial, until) => self.look_at_inherited(serial, until),
                Deadline::Unfinished(serial) => {
                    if let Some(channel) = self.channels.get_mut(&serial)
                        && channel.unfinished == Unfinished::Waits
                    {
                        channel.unfinished = Unfinished::Take;
                        self.pump(serial);
                    }
                }
                Deadline::Again(token) => self.recorded(token, Ok(())),
                Deadline::Read(serial) => self.pump(serial),
                Deadline::Freeze => self.freeze(),
            }
        }
    }

    fn freeze_if_settled(&mut self) {
        let idle = self.channels.values().all(|channel| {
            !channel.outbox.is_midway() && (channel.deaf || !channel.outbox.is_handle_pending())
        });
        let answered = self.channels.iter().all(|(serial, channel)| {
            let app = channel.worker.as_ref().and_then(|worker| self.apps.get(&worker.app));
            app.is_none_or(|app| app.primary.unanswered(WorkerIx(*serial)) == 0)
        });
        let waiting = self
            .sockets
            .iter()
            .any(|(ix, socket)| self.apps.get(&socket.app).is_some_and(|app| app.primary.has_pending(*ix)));
        if idle && answered && !waiting {
            self.freeze();
        }
    }

    fn freeze(&mut self) {
        if self.flow != Flow::Freezing {
            return;
        }
        self.flow = Flow::Frozen;
        let midway = self
            .channels
            .values()
            .filter(|channel| {
                channel.outbox.is_midway() || (channel.lines.is_midway() && channel.inbox.is_none())
            })
            .map(|channel| channel.id.clone())
            .collect();
        self.emit(DispatchEvent::Frozen { midway });
    }

    fn thaw(&mut self) {
        self.flow = Flow::Running;
        let channels: Vec<u64> = self.channels.keys().copied().collect();
        for serial in channels {
            self.flush(serial);
            self.pump(serial);
        }
        let listeners: Vec<ListenerIx> = self.sockets.keys().copied().collect();
        for listener in listeners {
            self.serve(listener);
        }
    }

    /// The peer has closed, or the channel is of no use any more: others get what it did not answer for.
    pub(super) fn end_channel(&mut self, serial: u64) {
        let Some(id) = self.channels.get(&serial).map(|channel| channel.id.clone()) else { return };
        self.settled_if(serial, |_| true);
        self.forget_channel(serial);
        self.emit(DispatchEvent::ChannelClosed { id });
    }

    fn forget_channel(&mut self, serial: u64) {
        let Some(channel) = self.channels.remove(&serial) else { return };
        self.by_id.remove(&channel.id);
        if let Some(awaiting) = &channel.awaiting {
            self.tokens.remove(&awaiting.token);
        }
        // Explicitly: others hold the same open file description, so closing our descriptor would not unregister it.
        // Fails only for a channel that could not be registered.
        let _ = self.epoll.delete(&channel.socket);
        self.placing.retain(|_, (of, _)| *of != serial);
        let Some(worker) = &channel.worker else { return };
        let touched = match self.apps.get_mut(&worker.app) {
            Some(app) => {
                if let Some(shelf) = &mut self.shelf {
                    for (_, connection) in app.primary.unanswered_connections(WorkerIx(serial)) {
                        shelf.remove(connection);
                    }
                }
                app.primary.remove_worker(WorkerIx(serial))
            }
            None => Vec::new(),
        };
        for listener in touched {
            self.serve(listener);
        }
        self.watch_all(worker.app);
        self.unsteered = true;
        self.forget_app_if_empty(worker.app);
    }

    pub(super) fn forget_app_if_empty(&mut self, serial: u64) {
        if self.apps.get(&serial).is_some_and(|app| app.primary.is_empty())
            && let Some(app) = self.apps.remove(&serial)
        {
            self.by_name.remove(&app.name);
        }
    }

    /// The app's number; made when it is new.
    fn app(&mut self, name: &AppName) -> u64 {
        if let Some(serial) = self.by_name.get(name) {
            return *serial;
        }
        let serial = self.next_serial();
        self.apps
            .insert(serial, App { name: name.clone(), primary: Primary::default(), crowd: Crowd::default() });
        self.by_name.insert(name.clone(), serial);
        serial
    }

    pub(super) fn app_serial(&self, name: &AppName) -> Option<u64> {
        self.by_name.get(name).copied()
    }

    pub(super) const fn next_serial(&mut self) -> u64 {
        self.serial += 1;
        self.serial
    }

    pub(super) fn next_seq(&mut self, serial: u64) -> u64 {
        let worker = self.channels.get(&serial).and_then(|channel| channel.worker.as_ref());
        let app = worker.and_then(|worker| self.apps.get_mut(&worker.app));
        app.map_or(0, |app| app.primary.next_seq(WorkerIx(serial)))
    }

    pub(super) fn at(&mut self, moment: Moment, deadline: Deadline) {
        let serial = self.next_serial();
        self.deadlines.insert((moment, serial), deadline);
    }

    pub(super) fn has_deadline(&self, wanted: Deadline) -> bool {
        self.deadlines.values().any(|deadline| *deadline == wanted)
    }

    pub(super) fn emit(&self, event: DispatchEvent) {
        (self.sink)(event);
    }

    /// Passes a message of the app's on, unless the driver has too many: an app that talks without end must not fill
    /// our memory, and its channel must be read for the sake of what else is in it.
    pub(super) fn user_message(&mut self, serial: u64, bytes: &[u8], length: u64) {
        let Some(channel) = self.channels.get_mut(&serial) else { return };
        // bench/kills.py and bench/upgrade.py count these.
        tracing::trace!(instance = %channel.id, length, "message of the app");
        match Message::new(bytes, length, &self.messages_waiting) {
            Some(message) => {
                let id = channel.id.clone();
                self.emit(DispatchEvent::UserMessage { id, message });
            }
            None => channel.messages_lost += 1,
        }
    }

    fn post_to(&mut self, id: &InstanceId, line: Vec<u8>) {
        if let Some(serial) = self.by_id.get(id).copied() {
            self.post(serial, line, None);
        }
    }

    fn post_message(&mut self, id: &InstanceId, line: Vec<u8>) {
        let Some(serial) = self.by_id.get(id).copied() else { return };
        if line.len() > scm::WHOLE_MAX {
            return self.post_long(serial, &line, Author::User);
        }
        let Some(channel) = self.channels.get_mut(&serial) else { return };
        if channel.outbox.push(line, None, Author::User).is_err() {
            self.emit(DispatchEvent::MessageDropped { id: id.clone() });
            return;
        }
        self.flush(serial);
    }

    /// Queues a line of ours and sends what can be sent.
    pub(super) fn post(&mut self, serial: u64, line: Vec<u8>, handed: Option<Handed<Handle>>) {
        self.post_as(Author::Internal, serial, line, handed);
    }

    /// Answers a worker. One that asks without end and reads nothing gets no more, or it would fill our memory.
    pub(super) fn reply(&mut self, serial: u64, line: Vec<u8>, handed: Option<Handed<Handle>>) {
        self.post_as(Author::Answer, serial, line, handed);
    }

    fn post_as(&mut self, author: Author, serial: u64, mut line: Vec<u8>, handed: Option<Handed<Handle>>) {
        let Some(channel) = self.channels.get_mut(&serial) else { return };
        if channel.marked {
            line.insert(0, messages::BUN_MARK);
        }
        if line.len() > scm::WHOLE_MAX && handed.is_none() {
            return self.post_long(serial, &line, author);
        }
        if channel.outbox.push(line, handed, author).is_err() {
            channel.messages_lost += 1;
        }
        self.flush(serial);
    }

    fn stats(&self) -> Stats {
        let instances = self.channels.iter().map(|(serial, channel)| {
            let app = channel.worker.as_ref().and_then(|worker| self.apps.get(&worker.app));
            InstanceStats {
                id: channel.id.clone(),
                accepted: channel.accepted,
                unanswered: app.map_or(0, |app| app.primary.unanswered(WorkerIx(*serial))),
                queued: channel.outbox.len(),
                messages_lost: channel.messages_lost,
            }
        });
        let listeners = self.apps.values().flat_map(|app| {
            app.primary.listeners().map(|(ix, key)| {
                let usage = app.primary.usage(ix);
                ListenerStats {
                    app: app.name.clone(),
                    key: key.to_owned(),
                    workers: usage.workers,
                    free: usage.free,
                    pending: usage.pending,
                }
            })
        });
        let mut stats = Stats {
            instances: instances.collect(),
            listeners: listeners.collect(),
            events_waiting: self.backlog.waiting(),
        };
        stats.instances.sort_by(|a, b| a.id.cmp(&b.id));
        stats.listeners.sort_by(|a, b| (&a.app, &a.key).cmp(&(&b.app, &b.key)));
        stats
    }
}

/// Stands for the client's address, where that counts.
pub(super) fn client_behind(
    primary: &Primary<Handle>,
    listener: ListenerIx,
    connection: &Handle,
) -> Option<u64> {
    let peer = if primary.is_sticky(listener) { reuseport::peer(connection.as_fd()) } else { None };
    peer.map(|peer| client_of(peer.ip()))
}

fn clock() -> Moment {
    // CLOCK_MONOTONIC exists on every kernel we run on.
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
    Moment::from_nanos(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX))
}
