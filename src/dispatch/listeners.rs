//! Listening sockets: bound for a worker's `listen()`, given to workers, accepted from for those that wait their turn.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags};

use super::run::{Deadline, Dispatcher, Flow, Handle, Source};
use super::shelf::Record;
use super::slots::Seat;
use super::{DispatchEvent, KeptListener, Origin};
use crate::model::id::AppName;
use crate::node::channel::{Author, Errand, Handed};
use crate::node::choice::{client_of, is_by_turns};
use crate::node::messages::{self, BAD_DESCRIPTOR, Granted, INVALID, Place, Query};
use crate::node::primary::{HandOver, ListenerIx, WorkerIx};
use crate::sys::guise::Guise;
use crate::sys::listen::{self, Reuse, SocketKind, Stack};
use crate::sys::reuseport;

/// After accept(2) failed for want of descriptors or memory.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// A listening or UDP socket of an app.
pub(super) struct ListeningSocket {
    pub(super) app: u64,
    pub(super) socket: Handle,
    /// Where every slot has a socket of its own: which one this is.
    pub(super) seat: Option<Seat>,
    kind: SocketKind,
    origin: Origin,
    /// Internet address, for the worker's `server.address()`.
    pub(super) address: Option<SocketAddr>,
    /// Our epoll has it. Not while only workers accept from it that do so by themselves: every connection would wake
    /// us for nothing.
    watched: bool,
    /// A connection may be waiting: set by the edge, cleared by EAGAIN. Nobody accepts while no worker is free, so the
    /// kernel's queue is ours.
    pub(super) readable: bool,
    /// The last accept(2) failed for want of resources.
    failing: bool,
    newconn_head: Vec<u8>,
}

impl Dispatcher {
    /// Binds what a query asks for, or finds it among the app's configured listeners. The second value is for the
    /// keeper.
    pub(super) fn bind(
        &mut self,
        serial: u64,
        query: &Query,
        place: &Place,
    ) -> Result<(ListenerIx, Vec<KeptListener>), i32> {
        let channel = self.channels.get(&serial).ok_or(INVALID)?;
        let worker = channel.worker.as_ref().ok_or(INVALID)?;
        if worker.balance.is_slots() && matches!(place, Place::Tcp { .. } | Place::TcpAny { .. }) {
            return self.bind_slots(serial, query, place);
        }
        let app_serial = worker.app;
        let configured = match place {
            Place::Configured { .. } => {
                Some(Arc::clone(worker.configured_socket(query).ok_or(BAD_DESCRIPTOR)?))
            }
            _ => worker.configured.iter().find(|socket| is_at(socket, place)).map(Arc::clone),
        };
        // Workers that had a socket for each slot before this reload: the first one's is everybody's from now on.
        let first = self
            .apps
            .get(&app_serial)
            .and_then(|app| app.primary.listener(&messages::slot_key(&query.key(), 0)))
            .and_then(|ix| self.sockets.get(&ix));
        let (socket, origin) = match (configured, first) {
            (Some(socket), _) => (duplicate(&socket)?, Origin::Configured),
            (None, Some(first)) => (duplicate(&first.socket)?, first.origin),
            (None, None) => (
                bind_place(place, query.backlog, &worker.guise).map_err(|error| negative(&error))?,
                Origin::Bound,
            ),
        };
        let kept = duplicate(&socket)?;
        let (key, data) = (query.key(), query.data.clone());
        let listener = KeptListener { key: key.clone(), data: data.clone(), origin, socket };
        let ix = self.register_listener(app_serial, listener).ok_or(INVALID)?;
        Ok((ix, vec![KeptListener { key, data, origin, socket: kept }]))
    }

    /// Takes a listening socket into an app's table.
    pub(super) fn register_listener(
        &mut self,
        app_serial: u64,
        listener: KeptListener,
    ) -> Option<ListenerIx> {
        let KeptListener { key, data, origin, socket } = listener;
        let kind = listen::kind(socket.as_fd())?;
        let address = listen::local_address(socket.as_fd()).ok().flatten();
        // A blocking listener would hang us in accept, and Node 18 too.
        listen::set_nonblocking(socket.as_fd()).ok()?;
        let app = self.apps.get(&app_serial)?;
        if let Some(known) = app.primary.listener(&key) {
            return Some(known);
        }
        let ix = ListenerIx(self.next_serial());
        let newconn_head = messages::newconn_head(&key);
        let seat = self.seat(app_serial, &key, ix);
        self.apps.get_mut(&app_serial)?.primary.add_listener(ix, key, data);
        self.sockets.insert(
            ix,
            ListeningSocket {
                app: app_serial,
                socket: Arc::new(socket),
                seat,
                kind,
                origin,
                address,
                watched: false,
                readable: true,
                failing: false,
                newconn_head,
            },
        );
        Some(ix)
    }

    /// The worker has the listener from now on.
    pub(super) fn open(&mut self, serial: u64, listener: ListenerIx, query: Query) {
        let worker = self.channels.get(&serial).and_then(|channel| channel.worker.as_ref());
        if let Some(app) = worker.and_then(|worker| self.apps.get_mut(&worker.app)) {
            app.primary.open(WorkerIx(serial), listener, query);
        }
        self.watch(listener);
        self.unsteered = true;
    }

    /// Watches a listener while a worker that waits its turn has it open, and not otherwise.
    pub(super) fn watch(&mut self, listener: ListenerIx) {
        let Some(socket) = self.sockets.get_mut(&listener) else { return };
        let wanted = self.apps.get(&socket.app).is_some_and(|app| app.primary.is_by_turns(listener));
        if wanted == socket.watched {
            return;
        }
        let done = if wanted {
            // Whoever waits already may have come before the first edge.
            socket.readable = true;
            let interest = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
            self.epoll.add(&*socket.socket, EpollEvent::new(interest, Source::Listener(listener).pack()))
        } else {
            self.epoll.delete(&*socket.socket)
        };
        match done {
            Ok(()) => socket.watched = wanted,
            Err(errno) => tracing::error!(%errno, "cannot watch a listener"),
        }
    }

    /// Likewise for all listeners of an app.
    pub(super) fn watch_all(&mut self, app: u64) {
        let listeners: Vec<ListenerIx> = self
            .apps
            .get(&app)
            .map_or_else(Vec::new, |app| app.primary.listeners().map(|(ix, _)| ix).collect());
        for listener in listeners {
            self.watch(listener);
        }
    }

    /// Answers a worker's `listen()` with its listener.
    pub(super) fn grant(&mut self, serial: u64, listener: ListenerIx, query: &Query) {
        let seq = self.next_seq(serial);
        let Some(worker) = self.channels.get(&serial).and_then(|channel| channel.worker.as_ref()) else {
            return;
        };
        let key_and_data = self.apps.get(&worker.app).and_then(|app| app.primary.key_and_data(listener));
        let (Some((key, data)), Some(socket)) = (key_and_data, self.sockets.get(&listener)) else {
            // It was closed while the driver recorded it.
            self.refuse(serial, query, INVALID);
            return;
        };
        let granted = Granted { key, ack: query.seq, data, seq };
        let datagram = socket.kind == SocketKind::Datagram;
        if datagram || !is_by_turns(worker.balance) {
            let errand = Errand::Grant(query.seq);
            let handed = Handed { handle: Arc::clone(&socket.socket), errand };
            let line = messages::granted_shared(granted, datagram);
            self.reply(serial, line, Some(handed));
        } else {
            let line = messages::granted_by_turns(granted, socket.address);
            self.reply(serial, line, None);
        }
        self.serve(listener);
    }

    /// Fails a worker's `listen()`; `errno` may have either sign.
    pub(super) fn refuse(&mut self, serial: u64, query: &Query, errno: i32) {
        let Some(id) = self.channels.get(&serial).map(|channel| channel.id.clone()) else { return };
        let seq = self.next_seq(serial);
        self.reply(serial, messages::refused(&query.key(), query.seq, errno, seq), None);
        self.emit(DispatchEvent::ListenFailed { id, address: query.display(None), errno: errno.abs() });
    }

    /// Likewise for one whose listener exists; listeners that were made for it go.
    pub(super) fn refuse_grant(&mut self, serial: u64, made: &[ListenerIx], query: &Query, errno: i32) {
        for listener in made.iter().copied() {
            let Some(app) = self.sockets.get(&listener).map(|socket| socket.app) else { continue };
            let unused = self.apps.get(&app).is_some_and(|app| app.primary.usage(listener).workers == 0);
            if unused {
                self.close_listener(listener);
            }
        }
        self.refuse(serial, query, errno);
    }

    /// Hands out connections while somebody is free and somebody waits: one accept, one hand-over, so that a crash of
    /// ours loses at most one.
    pub(super) fn serve(&mut self, listener: ListenerIx) {
        while self.hand_out(listener) {
            let Some(socket) = self.sockets.get_mut(&listener) else { return };
            let Some(app) = self.apps.get_mut(&socket.app) else { return };
            if let Some(seat) = socket.seat {
                self.go_on_rescuing(seat);
                return;
            }
            // Others accept from a listener that we do not watch.
            if !socket.watched
                || !socket.readable
                || self.flow != Flow::Running
                || !app.primary.wants_connection(listener)
            {
                return;
            }
            match listen::accept(socket.socket.as_fd()) {
                Ok(connection) => {
                    socket.failing = false;
                    let peer = if app.primary.is_sticky(listener) {
                        reuseport::peer(connection.as_fd()).map(|peer| peer.ip())
                    } else {
                        None
                    };
                    app.primary.connection(listener, Arc::new(connection), peer.map(client_of));
                    if let Some(told) = peer.and_then(|peer| app.crowd.count(peer)) {
                        let app = app.name.clone();
                        self.emit(DispatchEvent::Crowd { app, address: told });
                    }
                }
                Err(Errno::EAGAIN) => {
                    socket.readable = false;
                    return;
                }
                // That client is gone again, or a signal came: the next one.
                Err(Errno::ECONNABORTED | Errno::EINTR | Errno::EPROTO | Errno::EPERM) => {}
                Err(errno) => {
                    let first = !socket.failing;
                    socket.failing = true;
                    let (app, key) = (app.name.clone(), app.primary.key_and_data(listener));
                    let key = key.map_or_else(String::new, |(key, _)| key.to_owned());
                    self.at(self.now + ACCEPT_RETRY, Deadline::Accept(listener));
                    if first {
                        self.emit(DispatchEvent::AcceptFailing { app, key, errno: errno as i32 });
                    }
                    return;
                }
            }
        }
    }

    /// Hands what was accepted to free workers. Returns whether more may be accepted.
    pub(super) fn hand_out(&mut self, listener: ListenerIx) -> bool {
        loop {
            let Some(socket) = self.sockets.get_mut(&listener) else { return false };
            let app_serial = socket.app;
            let Some(app) = self.apps.get_mut(&app_serial) else { return false };
            if let Some(HandOver { worker, seq, connection }) = app.primary.assign(listener, self.now) {
                let Some(channel) = self.channels.get_mut(&worker.0) else { continue };
                let mut line = channel.outbox.buffer();
                if channel.marked {
                    line.push(messages::BUN_MARK);
                }
                messages::newconn(&mut line, &socket.newconn_head, seq);
                let handed = Handed { handle: Arc::clone(&connection), errand: Errand::Newconn(seq) };
                // Only a user's lines are refused.
                let _ = channel.outbox.push(line, Some(handed), Author::Internal);
                self.flush(worker.0);
                let channel = self.channels.get(&worker.0);
                if channel.is_some_and(|channel| channel.outbox.newconn_in_flight() != Some(seq)) {
                    self.shelve(app_serial, listener, &connection);
                }
                continue;
            }
            if app.primary.has_pending(listener) {
                let waiting: Vec<Handle> = app.primary.waiting(listener).map(Arc::clone).collect();
                for connection in waiting {
                    self.shelve(app_serial, listener, &connection);
                }
                let Some(socket) = self.sockets.get(&listener) else { return false };
                if let Some(seat) = socket.seat
                    && self.move_on(listener, seat)
                {
                    continue;
                }
                let Some(app) = self.apps.get(&app_serial) else { return false };
                // Where clients belong to workers, others may be served meanwhile.
                let goes_on = app.primary.is_sticky(listener);
                let (at, retry) = (app.primary.next_retry(), Deadline::Retry(app_serial));
                if let Some(at) = at
                    && !self.has_deadline(retry)
                {
                    self.at(at, retry);
                }
                return goes_on;
            }
            return true;
        }
    }

    /// Has a connection that must wait wait where the next supervisor finds it.
    fn shelve(&mut self, app: u64, listener: ListenerIx, connection: &Handle) {
        let (Some(shelf), Some(app)) = (&mut self.shelf, self.apps.get(&app)) else { return };
        if shelf.has(connection) {
            return;
        }
        if let Some((key, _)) = app.primary.key_and_data(listener) {
            let record = Record { app: app.name.clone(), key: key.to_owned(), to: None };
            shelf.put(&record, connection);
        }
    }

    /// Closes an app's listeners, all or some; connections that wait are closed with them.
    pub(super) fn close_listeners(&mut self, app: &AppName, keys: Option<&[String]>) {
        let Some(app_serial) = self.app_serial(app) else { return };
        let Some(app) = self.apps.get(&app_serial) else { return };
        let chosen: Vec<ListenerIx> = app
            .primary
            .listeners()
            .filter(|(_, key)| keys.is_none_or(|keys| keys.iter().any(|wanted| wanted == key)))
            .map(|(ix, _)| ix)
            .collect();
        for listener in chosen {
            self.close_listener(listener);
        }
        self.forget_app_if_empty(app_serial);
    }

    fn close_listener(&mut self, listener: ListenerIx) {
        if let Some(seat) = self.sockets.get(&listener).and_then(|socket| socket.seat) {
            self.leave_group(listener, seat);
        }
        let Some(socket) = self.sockets.remove(&listener) else { return };
        self.closed_at = Some(self.now);
        if let Some(app) = self.apps.get_mut(&socket.app) {
            app.primary.remove_listener(listener);
        }
        if let Some(shelf) = &mut self.shelf {
            shelf.discard_dropped();
        }
        if socket.watched {
            // Explicitly: the keeper holds the same open file description. Fails for none that was registered.
            let _ = self.epoll.delete(&*socket.socket);
        }
        if socket.origin == Origin::Bound
            && let Err(error) = listen::unbind(socket.socket.as_fd())
        {
            let path = listen::local_path(socket.socket.as_fd());
            tracing::warn!(?path, %error, "cannot remove the socket file");
        }
    }
}

pub(super) fn bind_place(place: &Place, backlog: u32, guise: &Guise) -> io::Result<OwnedFd> {
    let backlog = if backlog == 0 { listen::BACKLOG } else { backlog };
    let stack = |v6_only: bool| if v6_only { Stack::V6Only } else { Stack::Dual };
    match place {
        Place::TcpAny { port } => listen::tcp_any(*port, backlog),
        Place::Tcp { address, v6_only } => listen::tcp(*address, stack(*v6_only), backlog),
        Place::Udp { address, v6_only, reuse } => {
            let reuse = if *reuse { Reuse::Address } else { Reuse::No };
            listen::udp(*address, stack(*v6_only), reuse)
        }
        Place::Unix { path, mode } => listen::unix(path, *mode, backlog, guise).map_err(|error| {
            // As libuv: a missing directory reads as EACCES.
            if error.raw_os_error() == Some(Errno::ENOENT as i32) {
                io::Error::from_raw_os_error(Errno::EACCES as i32)
            } else {
                error
            }
        }),
        Place::Configured { .. } => Err(io::Error::from_raw_os_error(Errno::EBADF as i32)),
    }
}

/// Whether a configured listener is what the app's own `listen(port)` asks for. Binding it again could only fail.
fn is_at(socket: &OwnedFd, place: &Place) -> bool {
    if listen::kind(socket.as_fd()) != Some(SocketKind::Stream) {
        return false;
    }
    match place {
        Place::Unix { path, .. } => listen::local_path(socket.as_fd()).is_some_and(|at| at == *path),
        Place::TcpAny { port } => {
            let at = listen::local_address(socket.as_fd()).ok().flatten();
            *port != 0 && at.is_some_and(|at| at.port() == *port && at.ip().is_unspecified())
        }
        Place::Tcp { address, .. } => {
            address.port() != 0 && listen::local_address(socket.as_fd()).ok().flatten() == Some(*address)
        }
        Place::Udp { .. } | Place::Configured { .. } => false,
    }
}

pub(super) fn duplicate(socket: &OwnedFd) -> Result<OwnedFd, i32> {
    socket.try_clone().map_err(|error| negative(&error))
}

pub(super) fn negative(error: &io::Error) -> i32 {
    match error.raw_os_error() {
        Some(errno) => -errno,
        // A link on the way that root does not follow.
        None if error.kind() == io::ErrorKind::PermissionDenied => -(Errno::EACCES as i32),
        // socket2's own check of a path's length.
        None => INVALID,
    }
}
