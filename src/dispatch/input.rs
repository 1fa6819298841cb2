//! Receiving: lines are seen with MSG_PEEK and consumed when what they mean is done, or recorded by the driver.

use std::os::fd::AsFd;
use std::time::Duration;

use nix::errno::Errno;

use super::inbox::{Inbox, Then};
use super::run::{Deadline, Dispatcher, Flow, Unfinished};
use super::{DispatchEvent, OpenListener, Part, Token};
use crate::node::channel::{Nacked, Piece};
use crate::node::messages::{self, AgentMessage, Incoming, Query};
use crate::node::primary::{ListenerIx, QueryAnswer, WorkerIx};
use crate::sys::listen;
use crate::sys::scm::{self, Peeked};

/// How many buffers one channel may fill in a turn before others have theirs.
const BUFFERS_PER_TURN: usize = 16;

/// How long the beginning of a line may wait alone in its socket. One that is written byte by byte has no room for its
/// end there.
const UNFINISHED: Duration = Duration::from_secs(1);

/// The keeper closes a listener a moment after us, or after a supervisor that died before it could say that it has one.
/// Whoever asks for the same address within this time …
const CLOSED_LATELY: Duration = Duration::from_secs(3);
/// … gets it when it is free, which is looked at this often.
const ADDRESS_RETRY: Duration = Duration::from_millis(5);

/// A driver that is behind with events is given so much time before a channel is read on.
const READ_RETRY: Duration = Duration::from_millis(5);

/// How long the name of a listener and the TLS keys that go with it may be: our answer has to go in one piece.
const LISTENER_MAX: usize = 8 * 1024;

/// How far a channel is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Until {
    /// Until the socket says that it is empty.
    Empty,
    /// What has arrived. For what comes later there will be another event: every arrival is an edge.
    Seen,
}

/// What became of what was peeked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Read {
    /// Nothing can be done with it now.
    Nothing,
    /// Its lines are handled.
    Some,
    /// A piece of a long line is handled; what is behind it has not been looked at.
    Piece,
}

/// A control line that the driver has not recorded yet; it is the first in its socket.
pub(super) struct Awaiting {
    pub(super) token: Token,
    /// Its length, newline included.
    length: usize,
    then: After,
}

/// What follows when it is recorded.
enum After {
    Nothing,
    /// The worker gets the listener.
    Grant {
        listener: ListenerIx,
        query: Query,
        /// The listeners that were bound for it.
        made: Vec<ListenerIx>,
    },
    /// It is read again.
    Again,
}

/// What to do with a line.
enum Verdict {
    /// Done.
    Consume,
    /// Leave it in the socket until the driver has recorded the event that carries this token.
    Hold(Token, After),
}

impl Dispatcher {
    /// Reads a channel until it is empty, or a line has to wait.
    pub(super) fn pump(&mut self, serial: u64) {
        self.read_channel(serial, Until::Empty);
    }

    /// Reads a channel as far as `until` says.
    pub(super) fn read_channel(&mut self, serial: u64, until: Until) {
        let mut buffer = std::mem::take(&mut self.peeked);
        let mut turns = 0;
        while self.flow != Flow::Frozen {
            let Some(channel) = self.channels.get(&serial) else { break };
            if channel.awaiting.is_some() {
                break;
            }
            if turns == BUFFERS_PER_TURN {
                self.again.push(serial);
                break;
            }
            if self.backlog.is_long() {
                let again = Deadline::Read(serial);
                if !self.has_deadline(again) {
                    self.at(self.now + READ_RETRY, again);
                }
                break;
            }
            turns += 1;
            match scm::peek(channel.socket.as_fd(), &mut buffer) {
                Err(Errno::EAGAIN) => break,
                // ECONNRESET comes when the worker left lines of ours unread; everything it wrote was read before.
                Ok(Peeked { count: 0, .. }) | Err(_) => {
                    self.end_channel(serial);
                    break;
                }
                Ok(Peeked { count, hides_more }) => {
                    let more = hides_more || count == buffer.len() || until == Until::Empty;
                    match self.read_lines(serial, &buffer[..count], hides_more) {
                        Read::Some if more => {}
                        Read::Piece => {}
                        Read::Some | Read::Nothing => break,
                    }
                }
            }
        }
        self.peeked = buffer;
    }

    /// Handles the lines in what was peeked.
    fn read_lines(&mut self, serial: u64, seen: &[u8], hides_more: bool) -> Read {
        let mut used = 0;
        while used < seen.len() {
            let Some(channel) = self.channels.get_mut(&serial) else { return Read::Nothing };
            let may_hold = !channel.lines.is_midway();
            let forced = used == 0 && (hides_more || channel.unfinished == Unfinished::Take);
            let (length, piece) = channel.lines.first(&seen[used..]);
            match piece {
                Piece::Line { bytes, length: true_length } => {
                    let verdict = self.line(serial, &bytes, true_length);
                    if let Verdict::Hold(token, then) = verdict {
                        if may_hold {
                            self.hold(serial, Awaiting { token, length, then });
                            break;
                        }
                        // Its head is gone from the socket, so it cannot wait there. No control line is that long.
                        if let After::Grant { query, made, .. } = then {
                            self.refuse_grant(serial, &made, &query, messages::INVALID);
                        }
                    }
                    if !may_hold {
                        return self.take(serial, length, Then::Ends);
                    }
                    used += length;
                }
                Piece::Skipped { length: bytes } => {
                    let more = self.take(serial, length, Then::Skipped);
                    if let Some(channel) = self.channels.get_mut(&serial) {
                        let id = channel.id.clone();
                        let total = channel.inbox.as_ref().map_or(1, Inbox::skipped);
                        self.emit(DispatchEvent::LongLineSkipped { id, bytes, total });
                    }
                    return more;
                }
                Piece::Long if used == 0 => return self.take_piece(serial, seen),
                // The rest of the line is not shown before these bytes are consumed, or has no room beside them.
                Piece::Incomplete if forced => return self.take_piece(serial, seen),
                Piece::Long => break,
                Piece::Incomplete => {
                    if used == 0 && channel.unfinished == Unfinished::No {
                        channel.unfinished = Unfinished::Waits;
                        self.at(self.now + UNFINISHED, Deadline::Unfinished(serial));
                    }
                    break;
                }
            }
        }
        if used > 0
            && let Some(channel) = self.channels.get_mut(&serial)
        {
            channel.unfinished = Unfinished::No;
        }
        let Some(channel) = self.channels.get(&serial) else { return Read::Nothing };
        if used > 0 && scm::consume(channel.socket.as_fd(), used, &mut self.scratch).is_err() {
            self.end_channel(serial);
            return Read::Nothing;
        }
        if used > 0 { Read::Some } else { Read::Nothing }
    }

    /// Takes the beginning of a line, or more of it, out of the socket: it is too long to wait there. First the keeper
    /// holds what is known of it.
    fn take_piece(&mut self, serial: u64, seen: &[u8]) -> Read {
        let Some(channel) = self.channels.get_mut(&serial) else { return Read::Nothing };
        if channel.inbox.is_none() {
            match Inbox::create().and_then(|inbox| Ok((inbox.descriptor()?, inbox))) {
                Ok((file, inbox)) => {
                    channel.inbox = Some(inbox);
                    let id = channel.id.clone();
                    let token = self.next_token();
                    self.emit(DispatchEvent::Keep { id, part: Part::Inbox, file, token });
                    self.hold(serial, Awaiting { token, length: 0, then: After::Nothing });
                    return Read::Nothing;
                }
                Err(error) => {
                    tracing::warn!(id = %channel.id, %error, "a long message would be cut by our death");
                }
            }
        }
        let Some(channel) = self.channels.get_mut(&serial) else { return Read::Nothing };
        channel.unfinished = Unfinished::No;
        channel.lines.keep(seen);
        self.take(serial, seen.len(), Then::GoesOn)
    }

    /// Takes a part of a long line out of the socket; `lines` knows of it already.
    fn take(&mut self, serial: u64, count: usize, then: Then) -> Read {
        let Some(channel) = self.channels.get_mut(&serial) else { return Read::Nothing };
        let socket = channel.socket.as_fd();
        let taken = match &mut channel.inbox {
            Some(inbox) => inbox.take(socket, count, &channel.lines, then, &mut self.scratch),
            None => scm::consume(socket, count, &mut self.scratch),
        };
        if taken.is_err() {
            self.end_channel(serial);
            return Read::Nothing;
        }
        Read::Piece
    }

    fn hold(&mut self, serial: u64, awaiting: Awaiting) {
        self.tokens.insert(awaiting.token, serial);
        if let Some(channel) = self.channels.get_mut(&serial) {
            channel.awaiting = Some(awaiting);
        }
    }

    /// The driver has recorded an event, or could not.
    pub(super) fn recorded(&mut self, token: Token, outcome: Result<(), i32>) {
        if let Some((serial, number)) = self.placing.remove(&token) {
            return self.placed(serial, number, outcome);
        }
        let Some(serial) = self.tokens.remove(&token) else { return };
        let Some(channel) = self.channels.get_mut(&serial) else { return };
        let Some(Awaiting { length, then, .. }) = channel.awaiting.take() else { return };
        if let (After::Grant { listener, .. }, Ok(())) = (&then, outcome)
            && !self.sockets.contains_key(listener)
        {
            // It was closed while the driver recorded that this worker has it too: its last user had closed it a moment
            // before. The query is still in the socket, and is asked anew.
            self.pump(serial);
            return;
        }
        match (then, outcome) {
            (After::Nothing, _) => {}
            (After::Again, _) => return self.pump(serial),
            (After::Grant { listener, query, .. }, Ok(())) => {
                self.open(serial, listener, query.clone());
                self.grant(serial, listener, &query);
            }
            (After::Grant { query, made, .. }, Err(errno)) => {
                self.refuse_grant(serial, &made, &query, errno);
            }
        }
        let Some(channel) = self.channels.get(&serial) else { return };
        if scm::consume(channel.socket.as_fd(), length, &mut self.scratch).is_err() {
            self.end_channel(serial);
            return;
        }
        self.pump(serial);
    }

    fn line(&mut self, serial: u64, line: &[u8], length: u64) -> Verdict {
        let whole = line.len() as u64 == length;
        let Some(channel) = self.channels.get_mut(&serial) else { return Verdict::Consume };
        let (line, marked) = match line.strip_prefix(&[messages::BUN_MARK]) {
            Some(rest) => (rest, true),
            None => (line, false),
        };
        channel.marked |= marked;
        match messages::read(line, whole) {
            Incoming::HandleAck => {
                channel.outbox.answered();
                self.flush(serial);
            }
            Incoming::HandleNack => self.nack(serial),
            Incoming::Answer { ack, accepted } => self.answer(serial, ack, accepted),
            Incoming::Handle { message } => {
                channel.outbox.push_urgent(messages::handle_ack());
                self.flush(serial);
                if let Some(message) = message {
                    self.user_message(serial, message.as_bytes(), message.len() as u64);
                }
            }
            Incoming::SocketCount { key } => self.reply(serial, messages::socket_count(&key), None),
            Incoming::SocketClose { key } => self.reply(serial, messages::sockets_closed(&key), None),
            Incoming::Agent(message) => self.agent(serial, message),
            Incoming::Ready => {
                if !channel.ready {
                    channel.ready = true;
                    let id = channel.id.clone();
                    let token = self.next_token();
                    self.emit(DispatchEvent::Ready { id, token });
                    return Verdict::Hold(token, After::Nothing);
                }
            }
            Incoming::User => self.user_message(serial, line, length),
            Incoming::Ignored => {}
            // On a plain channel nobody is a cluster's primary; an app may well run a cluster of its own inside.
            _ if channel.worker.is_none() => {}
            Incoming::Online => {
                let id = channel.id.clone();
                self.emit(DispatchEvent::Online { id });
            }
            Incoming::Query(query) => return self.query(serial, query),
            Incoming::Listening(message) => return self.listening(serial, &message),
            Incoming::Close { key } => return self.closed(serial, key),
            Incoming::Leaving { seq: ack } => {
                let seq = self.next_seq(serial);
                self.reply(serial, messages::may_leave(ack, seq), None);
            }
        }
        Verdict::Consume
    }

    fn agent(&mut self, serial: u64, message: AgentMessage) {
        let Some(channel) = self.channels.get(&serial) else { return };
        let id = channel.id.clone();
        match message {
            AgentMessage::Hello { version } => self.emit(DispatchEvent::AgentHello { id, version }),
            AgentMessage::Listeners { signal, count } => {
                self.emit(DispatchEvent::KillListeners { id, signal, count });
            }
            AgentMessage::Drained => self.emit(DispatchEvent::Drained { id }),
            AgentMessage::Figures { ask, figures } => {
                self.emit(DispatchEvent::Figures { id, ask, figures });
            }
            AgentMessage::Closed { received, closed } => {
                let worker = channel.worker.as_ref();
                if let Some(app) = worker.and_then(|worker| self.apps.get_mut(&worker.app)) {
                    app.primary.reported(WorkerIx(serial), received, closed);
                }
            }
        }
    }

    fn answer(&mut self, serial: u64, ack: u64, accepted: bool) {
        let Some(channel) = self.channels.get_mut(&serial) else { return };
        let Some(app) = channel.worker.as_ref().and_then(|worker| self.apps.get_mut(&worker.app)) else {
            return;
        };
        if let Some(shelf) = &mut self.shelf
            && let Some((_, connection)) =
                app.primary.unanswered_connections(WorkerIx(serial)).find(|(seq, _)| *seq == ack)
        {
            shelf.remove(connection);
        }
        channel.inherited.retain(|seq| *seq != ack);
        let Some(listener) = app.primary.answered(WorkerIx(serial), ack, accepted) else { return };
        channel.accepted += u64::from(accepted);
        let settling = channel.settling;
        self.serve(listener);
        if settling {
            self.settled_if(serial, |unanswered| unanswered == 0);
        }
    }

    /// The handle on its way did not reach the worker.
    fn nack(&mut self, serial: u64) {
        let Some(channel) = self.channels.get_mut(&serial) else { return };
        let lost = match channel.outbox.nacked() {
            Nacked::Newconn(seq) => Some(seq),
            Nacked::Unknown => channel.inherited.pop(),
            Nacked::Refuse(seq) => {
                self.refuse_opened(serial, seq);
                None
            }
            Nacked::Again | Nacked::Dropped => None,
        };
        let listener = lost.and_then(|seq| {
            let worker = self.channels.get(&serial)?.worker.as_ref()?;
            let app = self.apps.get_mut(&worker.app)?;
            if let Some(shelf) = &mut self.shelf
                && let Some((_, connection)) =
                    app.primary.unanswered_connections(WorkerIx(serial)).find(|(known, _)| *known == seq)
            {
                shelf.remove(connection);
            }
            app.primary.lost(WorkerIx(serial), seq)
        });
        self.flush(serial);
        if let Some(listener) = listener {
            self.serve(listener);
            self.settled_if(serial, |unanswered| unanswered == 0);
        }
    }

    /// A listener that was granted does not reach the worker, which has no descriptor for it.
    fn refuse_opened(&mut self, serial: u64, seq: u64) {
        let Some(channel) = self.channels.get(&serial) else { return };
        let Some(app) = channel.worker.as_ref().and_then(|worker| self.apps.get_mut(&worker.app)) else {
            return;
        };
        let Some((listener, query)) = app.primary.opened_by(WorkerIx(serial), seq) else { return };
        let query = query.clone();
        let Some(key) = app.primary.key_and_data(listener).map(|(key, _)| key.to_owned()) else { return };
        app.primary.close(WorkerIx(serial), &key);
        let left = app.primary.usage(listener).workers;
        let id = channel.id.clone();
        self.refuse(serial, &query, Errno::EMFILE as i32);
        let token = self.next_token();
        self.emit(DispatchEvent::ListenerClosed { id, key, left, token });
        self.watch(listener);
        self.unsteered = true;
    }

    fn query(&mut self, serial: u64, mut query: Query) -> Verdict {
        let Some(channel) = self.channels.get(&serial) else { return Verdict::Consume };
        let Some(worker) = channel.worker.as_ref() else { return Verdict::Consume };
        if let Some(socket) = worker.configured_socket(&query) {
            let identity = listen::identity(socket.as_fd()).unwrap_or(0);
            query.index = i64::try_from(identity).unwrap_or(i64::MAX);
        }
        let app_serial = worker.app;
        let Some(app) = self.apps.get(&app_serial) else { return Verdict::Consume };
        let id = channel.id.clone();
        if query.key().len() + query.data.len() > LISTENER_MAX {
            self.refuse(serial, &query, messages::INVALID);
            return Verdict::Consume;
        }
        let (listener, new) = match app.primary.query(WorkerIx(serial), &query) {
            QueryAnswer::Refuse(errno) => {
                self.refuse(serial, &query, errno);
                return Verdict::Consume;
            }
            QueryAnswer::Again(listener) => {
                self.grant(serial, listener, &query);
                return Verdict::Consume;
            }
            QueryAnswer::Existing(listener) => (listener, Vec::new()),
            QueryAnswer::Bind(place) => match self.bind(serial, &query, &place) {
                Ok((listener, new)) => (listener, new),
                Err(errno) if errno == -(Errno::EADDRINUSE as i32) && self.closed_lately() => {
                    let token = self.next_token();
                    self.at(self.now + ADDRESS_RETRY, Deadline::Again(token));
                    return Verdict::Hold(token, After::Again);
                }
                Err(errno) => {
                    self.refuse(serial, &query, errno);
                    return Verdict::Consume;
                }
            },
        };
        let Some(key) = self.key_of(app_serial, listener) else { return Verdict::Consume };
        let token = self.next_token();
        let primary = self.apps.get(&app_serial).map(|app| &app.primary);
        let made = new.iter().filter_map(|kept| primary?.listener(&kept.key)).collect();
        let open = OpenListener { key, query: query.clone(), listening: false };
        self.emit(DispatchEvent::Opened { id, open, new, token });
        Verdict::Hold(token, After::Grant { listener, query, made })
    }

    /// Whether an address that is in use may be so only because the keeper has not closed it yet.
    fn closed_lately(&self) -> bool {
        self.closed_at.is_some_and(|at| self.now < at + CLOSED_LATELY)
    }

    fn listening(&mut self, serial: u64, message: &Query) -> Verdict {
        let Some(channel) = self.channels.get(&serial) else { return Verdict::Consume };
        let Some(worker) = channel.worker.as_ref() else { return Verdict::Consume };
        let listener =
            self.apps.get(&worker.app).and_then(|app| app.primary.listening(WorkerIx(serial), message));
        let key = listener.and_then(|listener| self.key_of(worker.app, listener));
        let port =
            listener.and_then(|ix| self.sockets.get(&ix)).and_then(|socket| socket.address).map(|a| a.port());
        let (id, token) = (channel.id.clone(), self.next_token());
        self.emit(DispatchEvent::Listening { id, key, address: message.display(port), token });
        Verdict::Hold(token, After::Nothing)
    }

    fn closed(&mut self, serial: u64, key: String) -> Verdict {
        let Some(channel) = self.channels.get(&serial) else { return Verdict::Consume };
        let Some(worker) = channel.worker.as_ref() else { return Verdict::Consume };
        let Some(app) = self.apps.get_mut(&worker.app) else { return Verdict::Consume };
        app.primary.close(WorkerIx(serial), &key);
        let listener = app.primary.listener(&key);
        let left = listener.map_or(0, |listener| app.primary.usage(listener).workers);
        let id = channel.id.clone();
        if let Some(listener) = listener {
            self.watch(listener);
        }
        self.unsteered = true;
        let token = self.next_token();
        self.emit(DispatchEvent::ListenerClosed { id, key, left, token });
        Verdict::Hold(token, After::Nothing)
    }

    fn key_of(&self, app: u64, listener: ListenerIx) -> Option<String> {
        self.apps.get(&app)?.primary.key_and_data(listener).map(|(key, _)| key.to_owned())
    }

    pub(super) const fn next_token(&mut self) -> Token {
        Token(self.next_serial())
    }
}
