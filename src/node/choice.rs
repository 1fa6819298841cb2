//! Which of the free workers gets a connection. Pure: numbers in, a place in the queue of free workers out.

use std::collections::VecDeque;

use super::primary::WorkerIx;
use crate::model::spec::Balance;

/// Whether connections are accepted by us and handed to such a worker. One that accepts by itself takes those too that we
/// hand to it: what had waited at a socket that nobody serves any more.
#[must_use]
pub const fn is_by_turns(balance: Balance) -> bool {
    match balance {
        Balance::RoundRobin | Balance::LeastConnections | Balance::Sticky => true,
        Balance::Shared | Balance::Slots | Balance::StickySlots => false,
    }
}

/// The worker that has been free for the longest time.
pub(super) fn next(free: &VecDeque<WorkerIx>, rejected_by: &[WorkerIx]) -> Option<usize> {
    free.iter().position(|worker| !rejected_by.contains(worker))
}

/// The worker with the fewest open connections; among equals the one that has been free for the longest time. Workers
/// whose number is not known take their turn among those with the fewest.
pub(super) fn fewest(
    free: &VecDeque<WorkerIx>,
    rejected_by: &[WorkerIx],
    open: impl Fn(WorkerIx) -> Option<u64>,
) -> Option<usize> {
    let known: Vec<(usize, Option<u64>)> = free
        .iter()
        .enumerate()
        .filter(|(_, worker)| !rejected_by.contains(worker))
        .map(|(place, worker)| (place, open(*worker)))
        .collect();
    let least = known.iter().filter_map(|(_, open)| *open).min().unwrap_or(0);
    known.into_iter().min_by_key(|(_, open)| open.unwrap_or(least)).map(|(place, _)| place)
}

/// How much a client wants a slot: it belongs to the slot with the highest number (rendezvous hashing). So it stays
/// where it is whatever happens to other slots, and when its own comes back so does it. The same in every build: the
/// next supervisor may be another one.
pub(super) fn attraction(client: u64, slot: u32) -> u64 {
    mix(client ^ mix(u64::from(slot) + 1))
}

/// Stands for a client's address.
#[must_use]
pub fn client_of(address: std::net::IpAddr) -> u64 {
    // A dual-stack socket shows an IPv4 client as ::ffff:a.b.c.d.
    match address.to_canonical() {
        std::net::IpAddr::V4(ip) => mix(u64::from(ip.to_bits())),
        std::net::IpAddr::V6(ip) => {
            let bits = ip.to_bits().to_be_bytes();
            let half = |at: usize| bits[at..at + 8].iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
            mix(half(0) ^ mix(half(8)))
        }
    }
}

/// The finalizer of SplitMix64: every bit of the input changes half of the output's.
const fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use super::*;

    fn free(workers: &[u64]) -> VecDeque<WorkerIx> {
        workers.iter().copied().map(WorkerIx).collect()
    }

    #[test]
    fn the_fewest_and_among_equals_the_longest_free() {
        let open = |counts: &'static [(u64, Option<u64>)]| {
            move |worker: WorkerIx| counts.iter().find(|(ix, _)| *ix == worker.0).and_then(|(_, open)| *open)
        };
        let three = free(&[7, 8, 9]);
        for (counts, rejected, expected) in [
            (&[(7, Some(3)), (8, Some(1)), (9, Some(2))][..], &[][..], Some(1)),
            (&[(7, Some(1)), (8, Some(1)), (9, Some(1))], &[], Some(0)),
            (&[(7, Some(3)), (8, Some(1)), (9, Some(2))], &[8], Some(2)),
            // Without numbers they take turns.
            (&[], &[], Some(0)),
            (&[], &[7], Some(1)),
            (&[(7, Some(5)), (8, None), (9, Some(2))], &[], Some(1)),
            (&[], &[7, 8, 9], None),
        ] {
            let rejected: Vec<WorkerIx> = rejected.iter().copied().map(WorkerIx).collect();
            assert_eq!(fewest(&three, &rejected, open(counts)), expected, "{counts:?} {rejected:?}");
        }
    }

    fn owner(client: u64, slots: &[u32]) -> u32 {
        *slots.iter().max_by_key(|slot| attraction(client, **slot)).unwrap()
    }

    #[test]
    fn clients_spread_over_slots_and_move_only_with_theirs() {
        let clients: Vec<u64> =
            (0..4000_u32).map(|n| client_of(IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 + n)))).collect();
        let all: Vec<u32> = (0..8).collect();
        let mut count = [0; 8];
        for client in &clients {
            count[owner(*client, &all) as usize] += 1;
        }
        assert!(count.iter().all(|n| (400..600).contains(n)), "{count:?}");
        // Slot 3 is gone: only its clients go elsewhere. A ninth slot takes clients, and moves none among the others.
        let without: Vec<u32> = all.iter().copied().filter(|slot| *slot != 3).collect();
        let more: Vec<u32> = (0..9).collect();
        for client in &clients {
            let now = owner(*client, &all);
            assert!(now == 3 || owner(*client, &without) == now);
            assert!([now, 8].contains(&owner(*client, &more)));
        }
    }

    #[test]
    fn an_address_is_the_same_client_through_every_socket_and_in_every_build() {
        let of = |text: &str| client_of(text.parse().unwrap());
        assert_eq!(of("10.1.2.3"), of("::ffff:10.1.2.3"));
        assert_ne!(of("10.1.2.3"), of("10.1.2.4"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_eq!(of("10.1.2.3"), 0x1142_8644_22fd_4b44);
    }
}
