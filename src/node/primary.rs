//! The cluster primary of one app as a value: which listeners there are, which workers have them open, who is free.
//!
//! ```text
//!            opened / put in / answered
//!   busy ───────────────────────────────▶ free        a worker, per listener
//!    ▲                                     │
//!    └──────────── newconn ◀── connection ─┘          at most one unanswered per worker and listener
//! ```
//!
//! A connection leaves this module only when a worker has said `accepted:true`. Until then it goes to another worker
//! when the first rejects it, loses it, or dies. No socket is touched here; `C` is a connection, or a number in tests.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use super::choice::{self, is_by_turns};
use super::messages::{ADDRESS_IN_USE, Place, Query, slot_key};
use crate::model::id::Slot;
use crate::model::moment::Moment;
use crate::model::spec::Balance;

/// Names a worker; chosen by the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerIx(pub u64);

/// Names a listener; chosen by the caller and never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ListenerIx(pub u64);

/// The number of a query that nobody has made: of a worker that is taken to have a listener because what was known of it
/// is lost.
pub const PRESUMED: u64 = u64::MAX;

/// When every worker has rejected a connection, all are asked again after this time…
const RETRY_FIRST: Duration = Duration::from_millis(10);
/// …which doubles up to this.
const RETRY_MAX: Duration = Duration::from_millis(100);

/// How long a client that belongs to a worker waits for it; then, and until this worker answers again, it goes where it
/// would go if that worker were gone.
pub const STICKY_PATIENCE: Duration = Duration::from_secs(1);

/// How many accepted connections may wait for the workers they belong to. A client of a busy worker must not hold up
/// the others; a supervisor that is killed loses those that wait.
const STICKY_WAITING: usize = 8;

/// Whether a worker gets new connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rotation {
    /// It does.
    In,
    /// It gets nothing new, and answers what it has.
    Out,
}

/// See the module.
#[derive(Debug)]
pub struct Primary<C> {
    listeners: BTreeMap<ListenerIx, Listener<C>>,
    by_key: HashMap<String, ListenerIx>,
    workers: HashMap<WorkerIx, Worker<C>>,
}

#[derive(Debug)]
struct Listener<C> {
    key: String,
    /// TLS ticket keys of the first worker, as JSON.
    data: String,
    /// How connections are handed out: as the worker wants it that opened it last.
    balance: Balance,
    /// Workers in rotation that have answered their last newconn, longest free first.
    free: VecDeque<WorkerIx>,
    /// Accepted and not assigned.
    pending: VecDeque<Pending<C>>,
    /// When rejected connections are offered to everybody again.
    retry_at: Option<Moment>,
    retry_delay: Duration,
}

#[derive(Debug)]
struct Pending<C> {
    connection: C,
    /// Stands for the client's address, where it counts.
    client: Option<u64>,
    rejected_by: Vec<WorkerIx>,
}

#[derive(Debug)]
struct Worker<C> {
    slot: Slot,
    balance: Balance,
    rotation: Rotation,
    /// A former supervisor had it: until then it counts as one that will be put in, so that its clients wait for it.
    expected_until: Option<Moment>,
    open: Vec<Open>,
    unanswered: Vec<Unanswered<C>>,
    next_seq: u64,
    /// Connections sent to it and not lost on the way, rejected ones included.
    handed: u64,
    /// What its agent says of them.
    reported: Option<Reported>,
}

#[derive(Debug, Clone, Copy)]
struct Reported {
    /// How many a former supervisor had handed over.
    before: u64,
    /// How many of these and ours are closed.
    closed: u64,
}

#[derive(Debug)]
struct Open {
    listener: ListenerIx,
    query: Query,
}

#[derive(Debug)]
struct Unanswered<C> {
    seq: u64,
    listener: ListenerIx,
    pending: Pending<C>,
    since: Moment,
}

/// What to do about a query.
#[derive(Debug, PartialEq, Eq)]
pub enum QueryAnswer {
    /// Fails with this negative errno.
    Refuse(i32),
    /// The worker has it open through this very query: a former supervisor may not have answered it.
    Again(ListenerIx),
    /// The listener is there; record that the worker has it, then call [`Primary::open`].
    Existing(ListenerIx),
    /// It has to be bound; then [`Primary::add_listener`].
    Bind(Place),
}

/// A connection for a worker: send it, and hold it until the answer.
#[derive(Debug)]
pub struct HandOver<C> {
    /// To whom.
    pub worker: WorkerIx,
    /// The number of the `newconn`.
    pub seq: u64,
    /// The connection.
    pub connection: C,
}

impl<C> Default for Primary<C> {
    fn default() -> Self {
        Self { listeners: BTreeMap::new(), by_key: HashMap::new(), workers: HashMap::new() }
    }
}

impl<C: Clone> Primary<C> {
    /// The worker of a slot has a channel. `first_seq` is where our numbers start: for an adopted worker beyond everything a former
    /// supervisor can have used.
    pub fn add_worker(&mut self, worker: WorkerIx, slot: Slot, balance: Balance, first_seq: u64) {
        self.workers.insert(
            worker,
            Worker {
                slot,
                balance,
                rotation: Rotation::Out,
                expected_until: None,
                open: Vec::new(),
                unanswered: Vec::new(),
                next_seq: first_seq,
                handed: 0,
                reported: None,
            },
        );
    }

    /// A worker that a former supervisor had: it will be told in a moment whether it is in rotation.
    pub fn expect(&mut self, worker: WorkerIx, now: Moment) {
        if let Some(record) = self.workers.get_mut(&worker) {
            record.expected_until = Some(now + STICKY_PATIENCE);
        }
    }

    /// The next number of ours for a worker.
    pub fn next_seq(&mut self, worker: WorkerIx) -> u64 {
        let Some(worker) = self.workers.get_mut(&worker) else { return 0 };
        let seq = worker.next_seq;
        worker.next_seq += 1;
        seq
    }

    /// What to do about a query.
    #[must_use]
    pub fn query(&self, worker: WorkerIx, query: &Query) -> QueryAnswer {
        let place = match query.place() {
            Ok(place) => place,
            Err(errno) => return QueryAnswer::Refuse(errno),
        };
        let key = self.key_for(worker, query, &place);
        let Some(&listener) = self.by_key.get(&key) else { return QueryAnswer::Bind(place) };
        let open =
            self.workers.get(&worker).and_then(|w| w.open.iter().find(|open| open.listener == listener));
        match open {
            None => QueryAnswer::Existing(listener),
            Some(open) if open.query.seq == query.seq => QueryAnswer::Again(listener),
            // It was only taken to have it; who asks has not.
            Some(open) if open.query.seq == PRESUMED => QueryAnswer::Existing(listener),
            // Two successful replies with one key would kill the worker.
            Some(_) => QueryAnswer::Refuse(ADDRESS_IN_USE),
        }
    }

    /// The key of what a worker asks for: a socket of its slot's own in slots mode, where the kernel can spread
    /// connections over several.
    fn key_for(&self, worker: WorkerIx, query: &Query, place: &Place) -> String {
        let key = query.key();
        match (self.workers.get(&worker), place) {
            (Some(Worker { balance, slot, .. }), Place::Tcp { .. } | Place::TcpAny { .. })
                if balance.is_slots() =>
            {
                slot_key(&key, slot.0)
            }
            _ => key,
        }
    }

    /// A socket is bound for `key`, or was given to us by a former supervisor.
    pub fn add_listener(&mut self, ix: ListenerIx, key: String, data: String) {
        self.by_key.insert(key.clone(), ix);
        self.listeners.insert(
            ix,
            Listener {
                key,
                data,
                balance: Balance::RoundRobin,
                free: VecDeque::new(),
                pending: VecDeque::new(),
                retry_at: None,
                retry_delay: RETRY_FIRST,
            },
        );
    }

    /// The listener of a key.
    #[must_use]
    pub fn listener(&self, key: &str) -> Option<ListenerIx> {
        self.by_key.get(key).copied()
    }

    /// Key and TLS data of a listener.
    #[must_use]
    pub fn key_and_data(&self, listener: ListenerIx) -> Option<(&str, &str)> {
        self.listeners.get(&listener).map(|l| (l.key.as_str(), l.data.as_str()))
    }

    /// A worker has a listener from now on.
    pub fn open(&mut self, worker: WorkerIx, listener: ListenerIx, query: Query) {
        let Some(record) = self.workers.get_mut(&worker) else { return };
        match record.open.iter_mut().find(|open| open.listener == listener) {
            None => record.open.push(Open { listener, query }),
            Some(open) if open.query.seq == PRESUMED => open.query = query,
            Some(_) => {}
        }
        if let Some(listener) = self.listeners.get_mut(&listener) {
            listener.balance = record.balance;
        }
        self.set_free(worker, listener);
    }

    /// Which of the worker's listeners a `listening` message is about.
    #[must_use]
    pub fn listening(&self, worker: WorkerIx, message: &Query) -> Option<ListenerIx> {
        let open = &self.workers.get(&worker)?.open;
        open.iter().find(|open| message.completes(&open.query)).map(|open| open.listener)
    }

    /// A worker has closed a listener. It stays for the others and the next ones.
    pub fn close(&mut self, worker: WorkerIx, key: &str) {
        let Some(listener) = self.listener(key) else { return };
        if let Some(record) = self.workers.get_mut(&worker) {
            record.open.retain(|open| open.listener != listener);
        }
        if let Some(record) = self.listeners.get_mut(&listener) {
            record.free.retain(|free| *free != worker);
        }
    }

    /// A worker gets connections from now on. Returns the listeners that may go on.
    pub fn put_in(&mut self, worker: WorkerIx) -> Vec<ListenerIx> {
        let Some(record) = self.workers.get_mut(&worker) else { return Vec::new() };
        record.rotation = Rotation::In;
        record.expected_until = None;
        let listeners: Vec<ListenerIx> = record.open.iter().map(|open| open.listener).collect();
        for listener in &listeners {
            self.set_free(worker, *listener);
        }
        listeners
    }

    /// A worker gets nothing new from now on.
    pub fn take_out(&mut self, worker: WorkerIx) {
        if let Some(record) = self.workers.get_mut(&worker) {
            record.rotation = Rotation::Out;
            record.expected_until = None;
        }
        for listener in self.listeners.values_mut() {
            listener.free.retain(|free| *free != worker);
        }
    }

    /// A former supervisor handed this connection to the worker, which has not answered.
    pub fn inherit(
        &mut self,
        worker: WorkerIx,
        listener: ListenerIx,
        seq: u64,
        connection: C,
        client: Option<u64>,
        now: Moment,
    ) {
        let Some(record) = self.workers.get_mut(&worker) else { return };
        let pending = Pending { connection, client, rejected_by: Vec::new() };
        record.unanswered.push(Unanswered { seq, listener, pending, since: now });
        if let Some(listener) = self.listeners.get_mut(&listener) {
            listener.free.retain(|free| *free != worker);
        }
    }

    /// The connections that a worker has not answered for, with the numbers of their `newconn`.
    pub fn unanswered_connections(&self, worker: WorkerIx) -> impl Iterator<Item = (u64, &C)> {
        let unanswered = self.workers.get(&worker).into_iter().flat_map(|record| &record.unanswered);
        unanswered.map(|unanswered| (unanswered.seq, &unanswered.pending.connection))
    }

    /// The key of the listener that a connection came from which a worker has not answered for.
    #[must_use]
    pub fn key_of_unanswered(&self, worker: WorkerIx, seq: u64) -> Option<&str> {
        let unanswered = self.workers.get(&worker)?.unanswered.iter().find(|one| one.seq == seq)?;
        Some(&self.listeners.get(&unanswered.listener)?.key)
    }

    /// The connections that wait for a worker of this listener.
    pub fn waiting(&self, listener: ListenerIx) -> impl Iterator<Item = &C> {
        let pending = self.listeners.get(&listener).into_iter().flat_map(|listener| &listener.pending);
        pending.map(|pending| &pending.connection)
    }

    /// What a worker asked with the query of this number, if it was granted, and which listener it got.
    #[must_use]
    pub fn opened_by(&self, worker: WorkerIx, seq: u64) -> Option<(ListenerIx, &Query)> {
        let open = self.workers.get(&worker)?.open.iter().find(|open| open.query.seq == seq)?;
        Some((open.listener, &open.query))
    }

    /// How many connections a worker has not answered for.
    #[must_use]
    pub fn unanswered(&self, worker: WorkerIx) -> usize {
        self.workers.get(&worker).map_or(0, |w| w.unanswered.len())
    }

    /// Whether a connection should be accepted: somebody is free and nobody waits before it. Where clients belong to
    /// workers, somebody else's may wait.
    #[must_use]
    pub fn wants_connection(&self, listener: ListenerIx) -> bool {
        self.listeners.get(&listener).is_some_and(|l| {
            let waiting = if l.balance == Balance::Sticky { STICKY_WAITING } else { 1 };
            l.pending.len() < waiting && !l.free.is_empty()
        })
    }

    /// Whether it counts for this listener where a connection comes from.
    #[must_use]
    pub fn is_sticky(&self, listener: ListenerIx) -> bool {
        self.listeners.get(&listener).is_some_and(|l| l.balance == Balance::Sticky)
    }

    /// A connection was accepted; `client` stands for its address, where that counts ([`choice::client_of`]).
    pub fn connection(&mut self, listener: ListenerIx, connection: C, client: Option<u64>) {
        if let Some(listener) = self.listeners.get_mut(&listener) {
            listener.pending.push_back(Pending { connection, client, rejected_by: Vec::new() });
        }
    }

    /// Whether connections wait that nobody in rotation could have.
    #[must_use]
    pub fn is_deserted(&self, listener: ListenerIx) -> bool {
        self.has_pending(listener) && self.served(listener) != Some(Rotation::In)
    }

    /// Moves the connection that waits first at a listener to another listener with a free worker that has not rejected
    /// it. Returns whether it did.
    pub fn move_waiting(&mut self, from: ListenerIx, to: ListenerIx) -> bool {
        let Some(pending) = self.listeners.get(&from).and_then(|from| from.pending.front()) else {
            return false;
        };
        let Some(target) = self.listeners.get(&to) else { return false };
        if from == to
            || !target.pending.is_empty()
            || choice::next(&target.free, &pending.rejected_by).is_none()
        {
            return false;
        }
        let moved = self.listeners.get_mut(&from).and_then(|from| from.pending.pop_front());
        if let Some((pending, target)) = moved.zip(self.listeners.get_mut(&to)) {
            target.pending.push_back(pending);
        }
        true
    }

    /// Hands the next waiting connection to a free worker, if there are both. To be called until there is nothing.
    pub fn assign(&mut self, listener_ix: ListenerIx, now: Moment) -> Option<HandOver<C>> {
        let workers = &self.workers;
        let listener = self.listeners.get_mut(&listener_ix)?;
        let found = listener.pending.iter().enumerate().find_map(|(waiting, pending)| {
            let (free, rejected_by) = (&listener.free, &pending.rejected_by);
            let place = match (listener.balance, pending.client) {
                (Balance::LeastConnections, _) => {
                    choice::fewest(free, rejected_by, |worker| workers.get(&worker)?.open_connections())
                }
                (Balance::Sticky, Some(client)) => {
                    let owner = owner(workers, listener_ix, client, rejected_by, now)?;
                    free.iter().position(|worker| *worker == owner)
                }
                _ => choice::next(free, rejected_by),
            }?;
            Some((waiting, place))
        });
        let Some((waiting, free)) = found else {
            self.plan_retry(listener_ix, now);
            return None;
        };
        let (Some(pending), Some(worker)) = (listener.pending.remove(waiting), listener.free.remove(free))
        else {
            return None;
        };
        let connection = pending.connection.clone();
        let record = self.workers.get_mut(&worker)?;
        let seq = record.next_seq;
        record.next_seq += 1;
        record.handed += 1;
        record.unanswered.push(Unanswered { seq, listener: listener_ix, pending, since: now });
        Some(HandOver { worker, seq, connection })
    }

    /// When nobody is left who has not rejected a waiting connection, all are asked again a little later: at once would
    /// be ten thousand rejections a second (a server at `maxConnections`).
    fn plan_retry(&mut self, listener_ix: ListenerIx, now: Moment) {
        let Some(listener) = self.listeners.get_mut(&listener_ix) else { return };
        if listener.retry_at.is_some() {
            return;
        }
        if listener.balance == Balance::Sticky && !listener.pending.is_empty() {
            // The worker that a client belongs to may never answer.
            listener.retry_at = Some(now + STICKY_PATIENCE);
        }
        if listener.free.is_empty() {
            return;
        }
        let hopeless = listener.pending.iter().any(|pending| {
            // Somebody busy may still take it.
            !self.workers.iter().any(|(worker, record)| {
                record.rotation == Rotation::In
                    && record.open.iter().any(|open| open.listener == listener_ix)
                    && !pending.rejected_by.contains(worker)
            })
        });
        if hopeless {
            listener.retry_at = Some(now + listener.retry_delay);
            listener.retry_delay = (listener.retry_delay * 2).min(RETRY_MAX);
        }
    }

    /// The first moment at which [`Primary::retry_due`] has something to do.
    #[must_use]
    pub fn next_retry(&self) -> Option<Moment> {
        self.listeners.values().filter_map(|listener| listener.retry_at).min()
    }

    /// Forgets rejections whose time is over; returns the listeners that may go on.
    pub fn retry_due(&mut self, now: Moment) -> Vec<ListenerIx> {
        let mut due = Vec::new();
        for (ix, listener) in &mut self.listeners {
            if listener.retry_at.is_some_and(|at| at <= now) {
                listener.retry_at = None;
                for pending in &mut listener.pending {
                    pending.rejected_by.clear();
                }
                due.push(*ix);
            }
        }
        due
    }

    /// A worker answered a newconn. Returns the listener that may go on; `None` for numbers we do not know (a former
    /// supervisor's).
    pub fn answered(&mut self, worker: WorkerIx, seq: u64, accepted: bool) -> Option<ListenerIx> {
        let record = self.workers.get_mut(&worker)?;
        let position = record.unanswered.iter().position(|unanswered| unanswered.seq == seq)?;
        let Unanswered { listener: ix, pending, .. } = record.unanswered.swap_remove(position);
        if let Some(listener) = self.listeners.get_mut(&ix) {
            if accepted {
                // Our copy goes with `pending`: with it open the worker's destroy() would send no FIN.
                listener.retry_delay = RETRY_FIRST;
            } else {
                let mut pending = pending;
                pending.rejected_by.push(worker);
                listener.pending.push_front(pending);
            }
        }
        self.set_free(worker, ix);
        Some(ix)
    }

    /// A newconn reached the worker without its handle: the connection is offered again, to anybody.
    pub fn lost(&mut self, worker: WorkerIx, seq: u64) -> Option<ListenerIx> {
        let record = self.workers.get_mut(&worker)?;
        let position = record.unanswered.iter().position(|unanswered| unanswered.seq == seq)?;
        let Unanswered { listener: ix, pending, .. } = record.unanswered.swap_remove(position);
        record.handed = record.handed.saturating_sub(1);
        if let Some(listener) = self.listeners.get_mut(&ix) {
            listener.pending.push_front(pending);
        }
        self.set_free(worker, ix);
        Some(ix)
    }

    /// A worker's agent says how many of the connections handed to it are closed. `received` comes with its answer to
    /// our asking, which is the first thing a supervisor says to a worker: none of our own are in it.
    pub fn reported(&mut self, worker: WorkerIx, received: Option<u64>, closed: u64) {
        let Some(record) = self.workers.get_mut(&worker) else { return };
        let before = received.or(record.reported.map(|reported| reported.before));
        record.reported = Some(Reported { before: before.unwrap_or(0), closed });
    }

    /// How many connections of ours a worker has open, those on their way to it included; `None` while its agent has
    /// not said.
    #[must_use]
    pub fn open_connections(&self, worker: WorkerIx) -> Option<u64> {
        self.workers.get(&worker)?.open_connections()
    }

    /// A worker's channel has ended: what it did not answer for goes to others. It writes its answer before it touches
    /// a connection, so no byte of those was read.
    pub fn remove_worker(&mut self, worker: WorkerIx) -> Vec<ListenerIx> {
        let Some(record) = self.workers.remove(&worker) else { return Vec::new() };
        for listener in self.listeners.values_mut() {
            listener.free.retain(|free| *free != worker);
        }
        let mut touched = Vec::new();
        for unanswered in record.unanswered.into_iter().rev() {
            if let Some(listener) = self.listeners.get_mut(&unanswered.listener) {
                listener.pending.push_front(unanswered.pending);
                touched.push(unanswered.listener);
            }
        }
        touched
    }

    /// Forgets a listener; waiting connections are dropped with it.
    pub fn remove_listener(&mut self, listener: ListenerIx) {
        let Some(record) = self.listeners.remove(&listener) else { return };
        self.by_key.remove(&record.key);
        for worker in self.workers.values_mut() {
            worker.open.retain(|open| open.listener != listener);
        }
    }

    /// Whether a worker that waits its turn has this listener open, in rotation or not.
    #[must_use]
    pub fn is_by_turns(&self, listener: ListenerIx) -> bool {
        self.workers.values().any(|worker| {
            is_by_turns(worker.balance)
                && worker.open.iter().any(|open| open.listener == listener && !open.query.is_datagram())
        })
    }

    /// Whether workers accept from this listener by themselves: those in rotation, or else those that are not yet or
    /// not any more.
    #[must_use]
    pub fn served(&self, listener: ListenerIx) -> Option<Rotation> {
        let rotations = self
            .workers
            .values()
            .filter(|worker| worker.open.iter().any(|open| open.listener == listener))
            .map(|worker| if worker.expected_until.is_some() { Rotation::In } else { worker.rotation });
        rotations.reduce(|a, b| if a == Rotation::In { a } else { b })
    }

    /// Whether a worker has this balance.
    #[must_use]
    pub fn balances(&self, balance: Balance) -> bool {
        self.workers.values().any(|worker| worker.balance == balance)
    }

    /// Whether the app has neither workers nor listeners.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.workers.is_empty() && self.listeners.is_empty()
    }

    /// Whether connections wait for a worker of this listener.
    #[must_use]
    pub fn has_pending(&self, listener: ListenerIx) -> bool {
        self.listeners.get(&listener).is_some_and(|listener| !listener.pending.is_empty())
    }

    /// All listeners.
    pub fn listeners(&self) -> impl Iterator<Item = (ListenerIx, &str)> {
        self.listeners.iter().map(|(ix, listener)| (*ix, listener.key.as_str()))
    }

    /// How a listener is used.
    #[must_use]
    pub fn usage(&self, listener: ListenerIx) -> Usage {
        let open = |record: &&Worker<C>| record.open.iter().any(|open| open.listener == listener);
        Usage {
            workers: self.workers.values().filter(open).count(),
            free: self.listeners.get(&listener).map_or(0, |l| l.free.len()),
            pending: self.listeners.get(&listener).map_or(0, |l| l.pending.len()),
        }
    }

    fn set_free(&mut self, worker: WorkerIx, listener_ix: ListenerIx) {
        let Some(record) = self.workers.get(&worker) else { return };
        let serves = record.rotation == Rotation::In
            && record.open.iter().any(|open| open.listener == listener_ix && !open.query.is_datagram())
            && !record.unanswered.iter().any(|unanswered| unanswered.listener == listener_ix);
        if let Some(listener) = self.listeners.get_mut(&listener_ix)
            && serves
            && !listener.free.contains(&worker)
        {
            listener.free.push_back(worker);
        }
    }
}

impl<C> Worker<C> {
    fn open_connections(&self) -> Option<u64> {
        let Reported { before, closed } = self.reported?;
        Some((before + self.handed).saturating_sub(closed))
    }

    /// Whether it has left a connection unanswered for so long that nothing more should wait for it.
    fn is_stuck(&self, now: Moment) -> bool {
        self.unanswered.iter().any(|unanswered| now.since(unanswered.since) >= STICKY_PATIENCE)
    }
}

/// The worker that a client belongs to: of the slot it is drawn to most among those that are served. Of two in one slot
/// the later one.
fn owner<C>(
    workers: &HashMap<WorkerIx, Worker<C>>,
    listener: ListenerIx,
    client: u64,
    rejected_by: &[WorkerIx],
    now: Moment,
) -> Option<WorkerIx> {
    let serving = workers.iter().filter(|(ix, worker)| {
        (worker.rotation == Rotation::In || worker.expected_until.is_some_and(|until| now < until))
            && worker.open.iter().any(|open| open.listener == listener)
            && !rejected_by.contains(ix)
            && !worker.is_stuck(now)
    });
    serving.max_by_key(|(ix, worker)| (choice::attraction(client, worker.slot.0), **ix)).map(|(ix, _)| *ix)
}

/// How a listener is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Workers that have it open.
    pub workers: usize,
    /// Of these, free ones in rotation.
    pub free: usize,
    /// Connections that wait for a worker.
    pub pending: usize,
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::node::messages::QueryKind;

    const NOW: Moment = Moment::from_nanos(1_000_000_000);

    fn query(port: i64, seq: u64) -> Query {
        Query { seq, port: Some(port), kind: QueryKind::Tcp4, data: "null".to_owned(), ..Query::default() }
    }

    fn with_workers(count: u64) -> (Primary<u32>, ListenerIx) {
        let mut primary = Primary::default();
        let listener = ListenerIx(1);
        primary.add_listener(listener, query(80, 1).key(), "null".to_owned());
        for ix in (0..count).map(WorkerIx) {
            primary.add_worker(ix, Slot(0), Balance::RoundRobin, 0);
            primary.open(ix, listener, query(80, 1));
            primary.put_in(ix);
        }
        (primary, listener)
    }

    #[test]
    fn connections_alternate_between_free_workers() {
        let (mut primary, listener) = with_workers(2);
        let mut served = [0, 0];
        for connection in 0..20 {
            primary.connection(listener, connection, None);
            let hand_over = primary.assign(listener, NOW).unwrap();
            served[usize::try_from(hand_over.worker.0).unwrap()] += 1;
            primary.answered(hand_over.worker, hand_over.seq, true);
        }
        assert_eq!(served, [10, 10]);
    }

    #[test]
    fn one_unanswered_connection_per_worker() {
        let (mut primary, listener) = with_workers(2);
        for connection in 0..2 {
            assert!(primary.wants_connection(listener));
            primary.connection(listener, connection, None);
            primary.assign(listener, NOW).unwrap();
        }
        assert!(!primary.wants_connection(listener));
        primary.connection(listener, 3, None);
        assert!(primary.assign(listener, NOW).is_none());
    }

    #[test]
    fn a_fresh_worker_gets_nothing_before_it_is_put_in() {
        let mut primary: Primary<u32> = Primary::default();
        let listener = ListenerIx(1);
        primary.add_listener(listener, query(80, 1).key(), "null".to_owned());
        primary.add_worker(WorkerIx(0), Slot(0), Balance::RoundRobin, 0);
        primary.open(WorkerIx(0), listener, query(80, 1));
        assert!(!primary.wants_connection(listener));
        primary.put_in(WorkerIx(0));
        assert!(primary.wants_connection(listener));
        primary.take_out(WorkerIx(0));
        assert!(!primary.wants_connection(listener));
    }

    #[test]
    fn a_rejected_connection_goes_to_another_and_then_waits() {
        let (mut primary, listener) = with_workers(2);
        primary.connection(listener, 7, None);
        let first = primary.assign(listener, NOW).unwrap();
        primary.answered(first.worker, first.seq, false);
        let second = primary.assign(listener, NOW).unwrap();
        assert_ne!(first.worker, second.worker);
        assert_eq!(second.connection, 7);
        primary.answered(second.worker, second.seq, false);
        assert!(primary.assign(listener, NOW).is_none());
        assert_eq!(primary.next_retry(), Some(NOW + RETRY_FIRST));
        assert_eq!(primary.retry_due(NOW + RETRY_FIRST), vec![listener]);
        assert_eq!(primary.assign(listener, NOW).unwrap().connection, 7);
    }

    #[test]
    fn open_connections_are_what_was_handed_over_and_is_not_reported_closed() {
        let (mut primary, listener) = with_workers(1);
        let worker = WorkerIx(0);
        assert_eq!(primary.open_connections(worker), None);
        primary.reported(worker, Some(0), 0);
        let hand_over = |primary: &mut Primary<u32>| {
            primary.connection(listener, 1, None);
            primary.assign(listener, NOW).unwrap().seq
        };
        let seq = hand_over(&mut primary);
        assert_eq!(primary.open_connections(worker), Some(1), "also on its way");
        primary.answered(worker, seq, true);
        assert_eq!(primary.open_connections(worker), Some(1));
        // Lost on the way: the agent has not seen it, and sees it the second time.
        let seq = hand_over(&mut primary);
        primary.lost(worker, seq);
        assert_eq!(primary.open_connections(worker), Some(1));
        let seq = primary.assign(listener, NOW).unwrap().seq;
        primary.answered(worker, seq, true);
        assert_eq!(primary.open_connections(worker), Some(2));
        primary.reported(worker, None, 1);
        assert_eq!(primary.open_connections(worker), Some(1));
    }

    #[test]
    fn open_connections_of_an_adopted_worker_include_those_of_the_former_supervisor() {
        let (mut primary, listener) = with_workers(1);
        let worker = WorkerIx(0);
        // Said to the former supervisor, and still unread.
        primary.reported(worker, None, 7);
        primary.connection(listener, 1, None);
        primary.assign(listener, NOW).unwrap();
        primary.reported(worker, Some(10), 8);
        assert_eq!(primary.open_connections(worker), Some(3));
        primary.reported(worker, None, 11);
        assert_eq!(primary.open_connections(worker), Some(0));
    }

    #[test]
    fn what_a_dead_worker_had_goes_first() {
        let (mut primary, listener) = with_workers(1);
        primary.connection(listener, 1, None);
        primary.assign(listener, NOW).unwrap();
        primary.connection(listener, 2, None);
        assert_eq!(primary.remove_worker(WorkerIx(0)), vec![listener]);
        assert!(primary.assign(listener, NOW).is_none());
        primary.add_worker(WorkerIx(1), Slot(0), Balance::RoundRobin, 0);
        primary.open(WorkerIx(1), listener, query(80, 1));
        primary.put_in(WorkerIx(1));
        let next = primary.assign(listener, NOW).unwrap();
        assert_eq!((next.worker, next.connection), (WorkerIx(1), 1));
    }

    #[test]
    fn queries() {
        let (mut primary, listener) = with_workers(1);
        primary.add_worker(WorkerIx(1), Slot(0), Balance::Shared, 0);
        for (worker, asked, expected) in [
            (0, query(80, 1), QueryAnswer::Again(listener)),
            (0, query(80, 2), QueryAnswer::Refuse(ADDRESS_IN_USE)),
            (1, query(80, 1), QueryAnswer::Existing(listener)),
            (1, query(81, 1), QueryAnswer::Bind(Place::TcpAny { port: 81 })),
            (1, query(99_999, 1), QueryAnswer::Refuse(super::super::messages::INVALID)),
        ] {
            assert_eq!(primary.query(WorkerIx(worker), &asked), expected, "{asked:?}");
        }
        // Closed and opened again by the same worker.
        primary.close(WorkerIx(0), &query(80, 1).key());
        assert_eq!(primary.query(WorkerIx(0), &query(80, 3)), QueryAnswer::Existing(listener));
        // A supervisor that has lost what it remembered takes every worker to listen. One that boots, and asks, was refused.
        primary.open(WorkerIx(0), listener, query(80, PRESUMED));
        assert_eq!(primary.query(WorkerIx(0), &query(80, 4)), QueryAnswer::Existing(listener));
        primary.open(WorkerIx(0), listener, query(80, 4));
        assert_eq!(primary.query(WorkerIx(0), &query(80, 4)), QueryAnswer::Again(listener));
        assert_eq!(primary.query(WorkerIx(0), &query(80, 5)), QueryAnswer::Refuse(ADDRESS_IN_USE));
        primary.remove_listener(listener);
        assert_eq!(primary.query(WorkerIx(0), &query(80, 4)), QueryAnswer::Bind(Place::TcpAny { port: 80 }));
    }

    #[test]
    fn listening_finds_its_query_also_for_port_0() {
        let mut primary: Primary<u32> = Primary::default();
        primary.add_worker(WorkerIx(0), Slot(0), Balance::RoundRobin, 0);
        let asked = [Query { index: 0, ..query(0, 1) }, Query { index: 1, ..query(0, 2) }];
        let listeners = asked.clone().map(|asked| {
            let listener = ListenerIx(asked.seq);
            primary.add_listener(listener, asked.key(), "null".to_owned());
            primary.open(WorkerIx(0), listener, asked);
            listener
        });
        let message = Query { index: 1, ..query(40_000, 5) };
        assert_eq!(primary.listening(WorkerIx(0), &message), Some(listeners[1]));
    }

    proptest! {
        /// Whatever workers do, no connection is lost or served twice, none goes to a worker out of rotation, and
        /// none has two at a time.
        #[test]
        fn no_connection_is_lost(script in prop::collection::vec((0_u8..8, 0_u64..4), 1..200)) {
            let mut primary: Primary<u32> = Primary::default();
            let listener = ListenerIx(1);
            primary.add_listener(listener, query(80, 1).key(), "null".to_owned());
            let (mut accepted, mut served) = (0_u32, BTreeSet::new());
            let mut held: BTreeMap<u64, (u64, u32)> = BTreeMap::new();
            let (mut alive, mut rotation) = (BTreeSet::new(), BTreeSet::new());
            let mut now = NOW;
            for (step, who) in script {
                let worker = WorkerIx(who);
                match step {
                    0 => {
                        if alive.insert(who) {
                            primary.add_worker(worker, Slot(0), Balance::RoundRobin, 0);
                            primary.open(worker, listener, query(80, 1));
                        }
                    }
                    1 => {
                        if alive.contains(&who) {
                            primary.put_in(worker);
                            rotation.insert(who);
                        }
                    }
                    2 => {
                        primary.take_out(worker);
                        rotation.remove(&who);
                    }
                    3 => {
                        primary.remove_worker(worker);
                        alive.remove(&who);
                        rotation.remove(&who);
                        held.remove(&who);
                    }
                    4 => {
                        if let Some((seq, connection)) = held.remove(&who) {
                            primary.answered(worker, seq, true);
                            prop_assert!(served.insert(connection));
                        }
                    }
                    5 => {
                        if let Some((seq, _)) = held.remove(&who) {
                            primary.answered(worker, seq, false);
                        }
                    }
                    6 => {
                        if let Some((seq, _)) = held.remove(&who) {
                            primary.lost(worker, seq);
                        }
                    }
                    _ => {
                        if primary.wants_connection(listener) {
                            primary.connection(listener, accepted, None);
                            accepted += 1;
                        }
                    }
                }
                now = now + Duration::from_millis(20);
                primary.retry_due(now);
                while let Some(hand_over) = primary.assign(listener, now) {
                    prop_assert!(rotation.contains(&hand_over.worker.0));
                    let before = held.insert(hand_over.worker.0, (hand_over.seq, hand_over.connection));
                    prop_assert_eq!(before, None);
                }
            }
            let waiting = primary.usage(listener).pending;
            prop_assert_eq!(served.len() + held.len() + waiting, accepted as usize);
        }
    }
}
