//! Whether one client address makes most of the connections, as behind a proxy: then there is nothing to balance by
//! address. In bounded memory, whoever connects (the Space-Saving counters of Metwally, Agrawal and El Abbadi).

use std::net::IpAddr;

/// How many addresses are counted at a time. The share of one that is not among them is below 1/8.
const COUNTERS: usize = 8;

/// So many connections say something.
const ENOUGH: u32 = 100;

/// Then all numbers are halved: what was long ago counts less and less.
const MANY: u32 = 4000;

/// Above this share, in percent, an address is a crowd…
const CROWD: u32 = 80;
/// …and below this one it is none any more.
const NO_CROWD: u32 = 70;

/// The clients of one app.
#[derive(Debug, Default)]
pub(super) struct Crowd {
    counters: Vec<Counter>,
    total: u32,
    told: Option<IpAddr>,
}

#[derive(Debug)]
struct Counter {
    address: IpAddr,
    count: u32,
    /// What of the count may be others'.
    error: u32,
}

impl Crowd {
    /// Counts a connection. Returns what is to be told when that has changed: the address that makes most of the
    /// connections, or that there is none any more.
    pub(super) fn count(&mut self, address: IpAddr) -> Option<Option<IpAddr>> {
        let address = address.to_canonical();
        self.total += 1;
        if let Some(known) = self.counters.iter_mut().find(|counter| counter.address == address) {
            known.count += 1;
        } else if self.counters.len() < COUNTERS {
            self.counters.push(Counter { address, count: 1, error: 0 });
        } else if let Some(rarest) = self.counters.iter_mut().min_by_key(|counter| counter.count) {
            *rarest = Counter { address, count: rarest.count + 1, error: rarest.count };
        }
        if self.total >= MANY {
            self.total /= 2;
            for counter in &mut self.counters {
                counter.count /= 2;
                counter.error /= 2;
            }
        }
        let now = self.crowd();
        if now == self.told {
            return None;
        }
        self.told = now;
        Some(now)
    }

    fn crowd(&self) -> Option<IpAddr> {
        let sure = |counter: &&Counter| counter.count.saturating_sub(counter.error);
        let most = self.counters.iter().max_by_key(sure)?;
        let threshold = if self.told == Some(most.address) { NO_CROWD } else { CROWD };
        let is_crowd = self.total >= ENOUGH && sure(&most) * 100 > self.total * threshold;
        is_crowd.then_some(most.address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(n: u32) -> IpAddr {
        IpAddr::V4(n.into())
    }

    /// Counts so many connections, of which every `nth` is of a new address each, and says what was told.
    fn told(connections: u32, nth: u32) -> Vec<Option<IpAddr>> {
        let mut crowd = Crowd::default();
        let clients = (0..connections).map(|n| if n % nth == 0 { address(1000 + n) } else { address(1) });
        clients.filter_map(|client| crowd.count(client)).collect()
    }

    #[test]
    fn a_proxy_is_told_once_and_many_clients_never() {
        assert_eq!(told(20_000, 1000), [Some(address(1))]);
        assert_eq!(told(20_000, 7), [Some(address(1))]);
        assert_eq!(told(20_000, 3), []);
        assert_eq!(told(20_000, 1), []);
        assert_eq!(told(99, 1000), [], "too few to say");
    }

    #[test]
    fn a_proxy_that_goes_is_forgotten() {
        let mut crowd = Crowd::default();
        let told: Vec<_> =
            (0..12_000).filter_map(|n| crowd.count(if n < 5000 { address(1) } else { address(n) })).collect();
        assert_eq!(told, [Some(address(1)), None]);
        assert!(crowd.counters.len() <= COUNTERS);
    }
}
