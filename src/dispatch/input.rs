//! Receiving: lines are seen with MSG_PEEK and consumed when what they mean is done, or recorded by the driver.

use std::os::fd::AsFd;

use nix::errno::Errno;

use super::run::{Dispatcher, Flow};
use super::{DispatchEvent, OpenListener, Token};
use crate::node::channel::Piece;
use crate::node::messages::{self, AgentMessage, Incoming, Query};
use crate::node::primary::{ListenerIx, QueryAnswer, WorkerIx};
use crate::sys::listen;
use crate::sys::scm::{self, Peeked};

/// How many buffers one channel may fill in a turn before others have theirs.
const BUFFERS_PER_TURN: usize = 16;

/// How far a channel is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Until {
    /// Until the socket says that it is empty.
    Empty,
    /// What has arrived. For what comes later there will be another event: every arrival is an edge.
    Seen,
}

/// A control line that the driver has not recorded yet; it is the first in its socket.
pub(super) struct Awaiting {
    pub(super) token: Token,
    /// Its length, newline included.
    length: usize,
    then: Then,
}

/// What follows when it is recorded.
enum Then {
    Nothing,
    /// The worker gets the listener.
    Grant {
        listener: ListenerIx,
        query: Query,
        /// The listeners that were bound for it.
        made: Vec<ListenerIx>,
    },
}

/// What to do with a line.
enum Verdict {
    /// Done.
    Consume,
    /// Leave it in the socket until the driver has recorded the event that carries this token.
    Hold(Token, Then),
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
                    if !self.read_lines(serial, &buffer[..count], hides_more) || !more {
                        break;
                    }
                }
            }
        }
        self.peeked = buffer;
    }

    /// Handles the lines in what was peeked. Returns whether to look for more.
    fn read_lines(&mut self, serial: u64, seen: &[u8], hides_more: bool) -> bool {
        let mut used = 0;
        while used < seen.len() {
            let Some(channel) = self.channels.get_mut(&serial) else { return false };
            let may_hold = !channel.lines.is_midway();
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
                        if let Then::Grant { query, made, .. } = then {
                            self.refuse_grant(serial, &made, &query, messages::INVALID);
                        }
                    }
                    used += length;
                }
                Piece::Skipped { length: bytes } => {
                    let id = channel.id.clone();
                    self.emit(DispatchEvent::LongLineSkipped { id, bytes });
                    used += length;
                }
                Piece::Incomplete => {
                    used += length;
                    if used == 0 && hides_more {
                        // The rest of the line is not shown before these bytes are consumed.
                        channel.lines.keep_head(seen);
                        used = seen.len();
                    }
                    break;
                }
            }
        }
        let Some(channel) = self.channels.get(&serial) else { return false };
        if used > 0 && scm::consume(channel.socket.as_fd(), used, &mut self.scratch).is_err() {
            self.end_channel(serial);
            return false;
        }
        used > 0
    }

    fn hold(&mut self, serial: u64, awaiting: Awaiting) {
        self.tokens.insert(awaiting.token, serial);
        if let Some(channel) = self.channels.get_mut(&serial) {
            channel.awaiting = Some(awaiting);
        }
    }

    /// The driver has recorded an event, or could not.
    pub(super) fn recorded(&mut self, token: Token, outcome: Result<(), i32>) {
        let Some(serial) = self.tokens.remove(&token) else { return };
        let Some(channel) = self.channels.get_mut(&serial) else { return };
        let Some(Awaiting { length, then, .. }) = channel.awaiting.take() else { return };
        if let (Then::Grant { listener, .. }, Ok(())) = (&then, outcome)
            && !self.sockets.contains_key(listener)
        {
            // It was closed while the driver recorded that this worker has it too: its last user had closed it a moment
            // before. The query is still in the socket, and is asked anew.
            self.pump(serial);
            return;
        }
        match (then, outcome) {
            (Then::Nothing, _) => {}
            (Then::Grant { listener, query, .. }, Ok(())) => {
                self.open(serial, listener, query.clone());
                self.grant(serial, listener, &query);
            }
            (Then::Grant { query, made, .. }, Err(errno)) => {
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
            Incoming::SocketCount { key } => self.post(serial, messages::socket_count(&key), None),
            Incoming::SocketClose { key } => self.post(serial, messages::sockets_closed(&key), None),
            Incoming::Agent(message) => self.agent(serial, message),
            Incoming::Ready => {
                if !channel.ready {
                    channel.ready = true;
                    let id = channel.id.clone();
                    let token = self.next_token();
                    self.emit(DispatchEvent::Ready { id, token });
                    return Verdict::Hold(token, Then::Nothing);
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
                self.post(serial, messages::may_leave(ack, seq), None);
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
        let Some(listener) = app.primary.answered(WorkerIx(serial), ack, accepted) else { return };
        channel.accepted += u64::from(accepted);
        let settling = channel.settling;
        self.serve(listener);
        if settling {
            self.settled_if(serial, |unanswered| unanswered == 0);
        }
    }

    fn nack(&mut self, serial: u64) {
        let Some(channel) = self.channels.get_mut(&serial) else { return };
        let lost = channel.outbox.answered().and_then(|handed| handed.newconn);
        let app = channel.worker.as_ref().and_then(|worker| self.apps.get_mut(&worker.app));
        let listener = app.zip(lost).and_then(|(app, seq)| app.primary.lost(WorkerIx(serial), seq));
        self.flush(serial);
        if let Some(listener) = listener {
            self.serve(listener);
            self.settled_if(serial, |unanswered| unanswered == 0);
        }
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
        let open = OpenListener { key, query: query.clone() };
        self.emit(DispatchEvent::Opened { id, open, new, token });
        Verdict::Hold(token, Then::Grant { listener, query, made })
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
        Verdict::Hold(token, Then::Nothing)
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
        Verdict::Hold(token, Then::Nothing)
    }

    fn key_of(&self, app: u64, listener: ListenerIx) -> Option<String> {
        self.apps.get(&app)?.primary.key_and_data(listener).map(|(key, _)| key.to_owned())
    }

    const fn next_token(&mut self) -> Token {
        Token(self.next_serial())
    }
}
