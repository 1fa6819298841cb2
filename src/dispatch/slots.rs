//! A socket for each slot (`balance = "slots"`): the kernel sends a new connection to one of them at random, and the
//! workers of that slot accept it by themselves. We are not in the path.
//!
//! What is left to do here: the kernel's program is rewritten whenever a slot gains or loses its workers, and what waits
//! at a slot that nobody serves is accepted by us and handed to a worker of another slot, as in taking turns. So is what
//! waits at a worker that has stopped to accept, blocked or hung: it gets nothing new for a while.
//!
//! ```text
//!              worker in rotation                   something waits too long
//!   unserved ─────────────────────▶ served ──────────────────────────────────▶ stuck
//!      ▲                             │ ▲                                          │
//!      └───────── taken out ─────────┘ └────────────── after a pause ─────────────┘
//!   watched: handed to others        looked at                    watched: handed to others
//! ```
//!
//! The kernel numbers the sockets of a group in the order in which they began to listen ([`reuseport`]). They are bound
//! in the order of their slots and closed together, so a socket's number is its slot. A slot that is gone (`scale`)
//! leaves its socket in the group, out of use.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags};

use super::listeners::{bind_place, duplicate, negative};
use super::run::{Deadline, Dispatcher, Flow, Source};
use super::{KeptListener, Origin};
use crate::model::spec::Balance;
use crate::node::messages::{INVALID, Place, Query, slot_key, split_slot_key};
use crate::node::primary::{ListenerIx, Rotation};
use crate::sys::listen;
use crate::sys::reuseport::{self, Pick};

/// How long after a connection has come, and how often from then on, it is looked whether the slot's queue is empty.
const LOOK: Duration = Duration::from_millis(LOOK_MS as u64);
const LOOK_MS: u32 = 10;

/// A worker whose oldest waiting connection is this old does not accept at present.
const STUCK_AFTER_MS: u32 = 20;
/// The same where clients belong to slots: being away costs them more than waiting (`sticky` has the same time).
const AWAY_AFTER_MS: u32 = 1000;
/// So often something must have waited before it is looked how old it is.
const LOOKS: u32 = 2;
/// The same where clients belong to slots.
const AWAY_LOOKS: u32 = AWAY_AFTER_MS / LOOK_MS;

/// How long a stuck worker gets nothing new…
const STUCK_FIRST: Duration = Duration::from_millis(50);
/// …which doubles up to this while it stays stuck.
const STUCK_MAX: Duration = Duration::from_secs(5);

/// The sockets of all slots for one `listen()` of an app.
pub(super) struct Group {
    app: u64,
    /// The key that their keys have in common.
    common: String,
    members: BTreeMap<u32, Member>,
    /// The slots in the kernel's program, and how it chooses.
    steered: Vec<u32>,
    pick: Pick,
    /// Where the search for a free worker begins.
    turn: u32,
    /// Members with waiting connections for which no worker was free.
    waiting: Vec<ListenerIx>,
}

struct Member {
    listener: ListenerIx,
    /// Our epoll knows it. Whether it is armed is the kernel's business: once per event.
    watched: bool,
    /// How often in a row something waited when we looked.
    looks: u32,
    /// It gets nothing before the next [`Deadline::Unstick`].
    stuck: bool,
    /// How long the next such time is.
    pause: Duration,
}

/// A socket's place in its group.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seat {
    group: u64,
    slot: u32,
}

impl Dispatcher {
    /// Binds the sockets that are missing up to the worker's slot: all or none.
    pub(super) fn bind_slots(
        &mut self,
        serial: u64,
        query: &Query,
        place: &Place,
    ) -> Result<(ListenerIx, Vec<KeptListener>), i32> {
        let channel = self.channels.get(&serial).ok_or(INVALID)?;
        let worker = channel.worker.as_ref().ok_or(INVALID)?;
        let (wanted, app_serial) = (channel.id.slot.0, worker.app);
        let app = self.apps.get(&app_serial).ok_or(INVALID)?;
        let common = query.key();
        let backlog = if query.backlog == 0 { listen::BACKLOG } else { query.backlog };
        let known = |key: &str| {
            let socket = app.primary.listener(key).and_then(|ix| self.sockets.get(&ix));
            socket.map(|socket| Arc::clone(&socket.socket))
        };
        // The socket of the workers before, when the balance is changed by a reload: it becomes the first slot's.
        let former = known(&common);
        let mut beside = (0..=wanted).find_map(|slot| known(&slot_key(&common, slot)));
        let mut fresh: Vec<(String, OwnedFd)> = Vec::new();
        for slot in 0..=wanted {
            let key = slot_key(&common, slot);
            if app.primary.listener(&key).is_some() {
                continue;
            }
            let socket = match (&beside, &former) {
                (None, Some(former)) => {
                    let socket = duplicate(former)?;
                    reuseport::share(socket.as_fd()).map_err(|error| negative(&error))?;
                    socket
                }
                // Not shared before it has the address: nobody else may listen there, of whatever kind.
                (None, None) => {
                    let socket =
                        bind_place(place, query.backlog, &worker.guise).map_err(|error| negative(&error))?;
                    reuseport::share(socket.as_fd()).map_err(|error| negative(&error))?;
                    socket
                }
                (Some(beside), _) => {
                    listen::tcp_beside(beside.as_fd(), backlog).map_err(|error| negative(&error))?
                }
            };
            if beside.is_none() {
                beside = Some(Arc::new(duplicate(&socket)?));
            }
            fresh.push((key, socket));
        }
        let mut kept = Vec::new();
        for (key, socket) in fresh {
            let copy = duplicate(&socket)?;
            let data = query.data.clone();
            let listener =
                KeptListener { key: key.clone(), data: data.clone(), origin: Origin::Bound, socket };
            self.register_listener(app_serial, listener).ok_or(INVALID)?;
            kept.push(KeptListener { key, data, origin: Origin::Bound, socket: copy });
        }
        let app = self.apps.get(&app_serial).ok_or(INVALID)?;
        let listener = app.primary.listener(&slot_key(&common, wanted)).ok_or(INVALID)?;
        Ok((listener, kept))
    }

    /// The place of a new listener in the group that its key names; `None` for a listener that all slots share.
    pub(super) fn seat(&mut self, app: u64, key: &str, listener: ListenerIx) -> Option<Seat> {
        let (common, slot) = split_slot_key(key)?;
        let known = self.groups.iter().find(|(_, group)| group.app == app && group.common == common);
        let number = match known {
            Some((number, _)) => *number,
            None => {
                let number = self.next_serial();
                let group = Group {
                    app,
                    common: common.to_owned(),
                    members: BTreeMap::new(),
                    steered: Vec::new(),
                    pick: Pick::Random,
                    turn: 0,
                    waiting: Vec::new(),
                };
                self.groups.insert(number, group);
                number
            }
        };
        let member = Member { listener, watched: false, looks: 0, stuck: false, pause: STUCK_FIRST };
        let group = self.groups.get_mut(&number)?;
        group.members.insert(slot, member);
        // The second one makes it a group in the kernel, without a program.
        group.steered.clear();
        self.unsteered = true;
        Some(Seat { group: number, slot })
    }

    /// A listener is about to be closed: what waits there goes to others, as far as there are any.
    pub(super) fn leave_group(&mut self, listener: ListenerIx, seat: Seat) {
        self.rescue(seat, listener);
        let Some(group) = self.groups.get_mut(&seat.group) else { return };
        let member = group.members.remove(&seat.slot);
        group.waiting.retain(|waiting| *waiting != listener);
        if member.is_some_and(|member| member.watched)
            && let Some(socket) = self.sockets.get(&listener)
        {
            // Explicitly: the keeper holds the same open file description.
            let _ = self.epoll.delete(&*socket.socket);
        }
        if group.members.is_empty() {
            self.groups.remove(&seat.group);
        }
        self.unsteered = true;
    }

    /// Brings the kernel's programs up to date. At the end of a turn: what happened together is decided together.
    pub(super) fn steer(&mut self) {
        if self.adopting || !std::mem::take(&mut self.unsteered) {
            return;
        }
        let groups: Vec<u64> = self.groups.keys().copied().collect();
        for group in groups {
            self.steer_group(group);
        }
    }

    fn steer_group(&mut self, number: u64) {
        let Some(group) = self.groups.get_mut(&number) else { return };
        let Some(app) = self.apps.get(&group.app) else { return };
        let former = app.primary.listener(&group.common);
        let sticky = app.primary.balances(Balance::StickySlots);
        let pick = if sticky { Pick::ByAddress } else { Pick::Random };
        let (mut inside, mut outside) = (Vec::new(), Vec::new());
        for (slot, member) in &group.members {
            let mut served = app.primary.served(member.listener);
            if *slot == 0
                && let Some(former) = former
                && served != Some(Rotation::In)
            {
                // Workers of another balance, before or after a reload: they have the first slot's socket.
                served = app.primary.served(former).or(served);
            }
            match served {
                Some(Rotation::In) => inside.push(*slot),
                Some(Rotation::Out) => outside.push(*slot),
                None => {}
            }
        }
        let well = |slot: &u32| group.members.get(slot).is_some_and(|member| !member.stuck);
        let mut chosen: Vec<u32> = inside.iter().copied().filter(well).collect();
        if chosen.is_empty() {
            // All are stuck, or none is in rotation yet: somebody has to have them.
            chosen = if inside.is_empty() { outside } else { inside };
        }
        let listeners: Vec<(u32, ListenerIx)> =
            group.members.iter().map(|(slot, member)| (*slot, member.listener)).collect();
        if listeners.len() == 1 {
            // No group yet, and hence no program: the kernel has nothing to choose.
            group.steered.clone_from(&chosen);
        } else if !chosen.is_empty()
            && (chosen != group.steered || pick != group.pick)
            && let Some(socket) = listeners.first().and_then(|(_, ix)| self.sockets.get(ix))
        {
            match reuseport::steer(socket.socket.as_fd(), &chosen, pick) {
                Ok(()) => {
                    group.steered.clone_from(&chosen);
                    group.pick = pick;
                }
                Err(error) => {
                    tracing::error!(%error, key = group.common, "cannot steer connections to slots");
                }
            }
        }
        for (slot, listener) in listeners {
            if chosen.contains(&slot) {
                self.arm(number, slot);
            } else {
                self.rescue(Seat { group: number, slot }, listener);
            }
        }
        if let Some(former) = former {
            // Accepted for workers that are all out of rotation, since a reload to slots.
            while self.is_deserted(former) && self.move_on(former, Seat { group: number, slot: 0 }) {}
        }
    }

    fn is_deserted(&self, listener: ListenerIx) -> bool {
        let app = self.sockets.get(&listener).and_then(|socket| self.apps.get(&socket.app));
        app.is_some_and(|app| app.primary.is_deserted(listener))
    }

    /// Asks for one event when something waits at a slot. Nobody is to be woken for the only one.
    fn arm(&mut self, group: u64, slot: u32) {
        let Some(group) = self.groups.get_mut(&group) else { return };
        let alone = group.members.len() == 1;
        let Some(member) = group.members.get_mut(&slot) else { return };
        let Some(socket) = self.sockets.get(&member.listener) else { return };
        if alone && !member.watched {
            return;
        }
        let interest =
            if alone { EpollFlags::empty() } else { EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT };
        let mut event = EpollEvent::new(interest, Source::Listener(member.listener).pack());
        let done = if member.watched {
            self.epoll.modify(&*socket.socket, &mut event)
        } else {
            self.epoll.add(&*socket.socket, event)
        };
        match done {
            Ok(()) => member.watched = true,
            Err(errno) => tracing::error!(%errno, "cannot watch a slot's listener"),
        }
    }

    fn member(&mut self, seat: Seat) -> Option<&mut Member> {
        self.groups.get_mut(&seat.group)?.members.get_mut(&seat.slot)
    }

    fn is_sticky(&self, seat: Seat) -> bool {
        self.groups.get(&seat.group).is_some_and(|group| group.pick == Pick::ByAddress)
    }

    fn is_chosen(&self, seat: Seat) -> bool {
        self.groups.get(&seat.group).is_some_and(|group| group.steered.contains(&seat.slot))
    }

    /// Something waits at a slot.
    pub(super) fn slot_event(&mut self, listener: ListenerIx, seat: Seat) {
        if self.is_chosen(seat) {
            self.at(self.now + LOOK, Deadline::Look(listener));
        } else {
            self.rescue(seat, listener);
        }
    }

    /// Looks whether a worker accepts what came a moment ago. Something waits most of the time when there is much to
    /// do, so the age of what waits decides, and it takes accepting one to know it.
    pub(super) fn look(&mut self, listener: ListenerIx) {
        let Some(socket) = self.sockets.get(&listener) else { return };
        let Some(seat) = socket.seat else { return };
        let queued = reuseport::queued(socket.socket.as_fd()).unwrap_or(0);
        let Some(member) = self.member(seat) else { return };
        if queued == 0 {
            member.looks = 0;
            member.pause = STUCK_FIRST;
            self.arm(seat.group, seat.slot);
            return;
        }
        member.looks += 1;
        let looks = member.looks;
        let sticky = self.is_sticky(seat);
        let (enough, limit) = if sticky { (AWAY_LOOKS, AWAY_AFTER_MS) } else { (LOOKS, STUCK_AFTER_MS) };
        if looks >= enough && self.flow == Flow::Running && self.is_chosen(seat) {
            let age = self.take_one(seat, listener);
            if age.is_some_and(|age| age >= limit) {
                self.is_stuck(seat, listener);
                return;
            }
            if sticky && let Some(member) = self.member(seat) {
                member.looks = 0;
            }
        }
        self.at(self.now + LOOK, Deadline::Look(listener));
    }

    fn is_stuck(&mut self, seat: Seat, listener: ListenerIx) {
        let Some(member) = self.member(seat) else { return };
        member.stuck = true;
        member.looks = 0;
        let pause = member.pause;
        member.pause = (pause * 2).min(STUCK_MAX);
        self.at(self.now + pause, Deadline::Unstick(listener));
        self.unsteered = true;
    }

    /// Its worker may have come to itself; if not, that shows soon.
    pub(super) fn unstick(&mut self, listener: ListenerIx) {
        let Some(seat) = self.sockets.get(&listener).and_then(|socket| socket.seat) else { return };
        if let Some(member) = self.member(seat) {
            member.stuck = false;
            self.unsteered = true;
        }
    }

    /// Accepts what waits at a slot, as long as workers of others are free.
    pub(super) fn rescue(&mut self, seat: Seat, listener: ListenerIx) {
        while self.flow == Flow::Running && self.take_one(seat, listener).is_some() {}
    }

    /// Accepts one connection that waits at a slot and hands it to a worker of another (to its own where the client
    /// belongs to it, and has not waited for long); returns how many milliseconds it has waited. `None` when there is no
    /// connection, or nobody to have it.
    fn take_one(&mut self, seat: Seat, listener: ListenerIx) -> Option<u32> {
        let sticky = self.is_sticky(seat) && self.is_chosen(seat);
        loop {
            let target = self.free_elsewhere(seat);
            let group = self.groups.get_mut(&seat.group)?;
            let Some(target) = target else {
                // The first answer of a worker goes on with it.
                if !group.waiting.contains(&listener) {
                    group.waiting.push(listener);
                }
                return None;
            };
            let socket = self.sockets.get(&listener)?;
            match listen::accept(socket.socket.as_fd()) {
                Ok(connection) => {
                    let age = reuseport::silent_ms(connection.as_fd()).unwrap_or(0);
                    let app = self.apps.get_mut(&group.app)?;
                    let stays = sticky && age < AWAY_AFTER_MS && app.primary.wants_connection(listener);
                    let target = if stays { listener } else { target };
                    app.primary.connection(target, Arc::new(connection), None);
                    self.hand_out(target);
                    return Some(age);
                }
                Err(Errno::ECONNABORTED | Errno::EINTR | Errno::EPROTO | Errno::EPERM) => {}
                Err(errno) => {
                    group.waiting.retain(|waiting| *waiting != listener);
                    if errno != Errno::EAGAIN {
                        // Out of descriptors or memory: the queue is safe where it is.
                        self.at(self.now + LOOK, Deadline::Look(listener));
                    } else {
                        self.arm(seat.group, seat.slot);
                    }
                    return None;
                }
            }
        }
    }

    /// A listener whose worker is free, of another slot that is well.
    fn free_elsewhere(&mut self, seat: Seat) -> Option<ListenerIx> {
        let group = self.groups.get_mut(&seat.group)?;
        let app = self.apps.get(&group.app)?;
        let former = app.primary.listener(&group.common);
        let after = group.members.range(group.turn + 1..).chain(group.members.range(..=group.turn));
        let found = after
            .filter(|(slot, member)| **slot != seat.slot && !member.stuck)
            .map(|(slot, member)| (*slot, member.listener))
            .chain(former.map(|former| (0, former)))
            .find(|(_, listener)| app.primary.wants_connection(*listener))?;
        group.turn = found.0;
        Some(found.1)
    }

    /// A worker of the group is free: members whose connections waited for one go on.
    pub(super) fn go_on_rescuing(&mut self, seat: Seat) {
        let Some(group) = self.groups.get_mut(&seat.group) else { return };
        for listener in std::mem::take(&mut group.waiting) {
            let Some(from) = self.sockets.get(&listener).and_then(|socket| socket.seat) else { continue };
            if self.is_chosen(from) {
                self.at(self.now + LOOK, Deadline::Look(listener));
            } else {
                self.rescue(from, listener);
            }
        }
    }

    /// Offers what waits at a listener for workers of its own to those of the group: they have rejected it, or are gone.
    pub(super) fn move_on(&mut self, listener: ListenerIx, seat: Seat) -> bool {
        let Some(group) = self.groups.get(&seat.group) else { return false };
        let mut targets: Vec<ListenerIx> =
            group.members.values().filter(|member| !member.stuck).map(|member| member.listener).collect();
        let Some(app) = self.apps.get_mut(&group.app) else { return false };
        targets.extend(app.primary.listener(&group.common));
        let moved = targets.into_iter().find(|target| app.primary.move_waiting(listener, *target));
        if let Some(target) = moved {
            self.hand_out(target);
        }
        moved.is_some()
    }
}
