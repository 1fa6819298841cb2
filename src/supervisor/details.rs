//! The numbers of single processes, which cost more than the rest of a list together.
//!
//! A proportional set size takes the kernel 50 µs for a small process and 1 ms for a hundred megabytes. `describe` is
//! about few instances and always measures. `jlist` is asked by exporters, about all of them: there a call measures as
//! many as its budget allows, those first that were never measured or longest ago, and repeats what is young.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use super::publish::{Numbers, SlotInfo, round};
use crate::ipc::protocol::ProcessView;
use crate::metrics::sample::Sampler;
use crate::model::id::InstanceId;
use crate::model::moment::Moment;
use crate::sys::clock;

/// How long one `jlist` may measure.
const BUDGET: Duration = Duration::from_millis(1);

/// Numbers older than this are not repeated.
const YOUNG: Duration = Duration::from_secs(10);

/// What was measured of late.
#[derive(Debug, Default)]
pub(super) struct Details {
    known: HashMap<InstanceId, Measured>,
}

#[derive(Debug)]
struct Measured {
    at: Moment,
    rss: u64,
    pss: Option<u64>,
    processes: Vec<ProcessView>,
}

impl Details {
    /// Measures every slot, for `describe`.
    pub(super) fn add_all(sampler: &mut Sampler, slots: &[SlotInfo], numbers: &mut [Numbers]) {
        for (slot, numbers) in slots.iter().zip(numbers) {
            if let Some((id, ..)) = &slot.process {
                measure(sampler, id, clock::now()).show(numbers);
            }
        }
    }

    /// Measures what the budget allows and adds what is known, for `jlist`. The others keep `None`.
    pub(super) fn add_some(&mut self, sampler: &mut Sampler, slots: &[SlotInfo], numbers: &mut [Numbers]) {
        let begin = clock::now();
        let ids = || slots.iter().filter_map(|slot| slot.process.as_ref()).map(|(id, ..)| id);
        let listed: HashSet<&InstanceId> = ids().collect();
        self.known.retain(|id, measured| listed.contains(id) && begin.since(measured.at) < YOUNG);
        let mut order: Vec<(Option<Moment>, &InstanceId)> =
            ids().map(|id| (self.known.get(id).map(|measured| measured.at), id)).collect();
        // Stable: what was never measured goes first, in the order of the list.
        order.sort_by_key(|(at, _)| *at);
        for (_, id) in order {
            let now = clock::now();
            if now.since(begin) >= BUDGET {
                break;
            }
            self.known.insert(id.clone(), measure(sampler, id, now));
        }
        for (slot, numbers) in slots.iter().zip(numbers) {
            if let Some(measured) = slot.process.as_ref().and_then(|(id, ..)| self.known.get(id)) {
                measured.show(numbers);
            }
        }
    }
}

fn measure(sampler: &mut Sampler, id: &InstanceId, at: Moment) -> Measured {
    // A process that ends meanwhile is no error worth a word.
    let processes = sampler.details(id).unwrap_or_default();
    Measured {
        at,
        rss: processes.iter().map(|process| process.rss).sum(),
        pss: processes.iter().map(|process| process.pss).sum(),
        processes: processes
            .into_iter()
            .map(|process| ProcessView {
                pid: process.pid.unsigned_abs(),
                command: process.command,
                cpu: round(process.cpu_percent),
                rss: process.rss,
                pss: process.pss.unwrap_or(0),
            })
            .collect(),
    }
}

impl Measured {
    fn show(&self, numbers: &mut Numbers) {
        numbers.rss = Some(self.rss);
        numbers.pss = self.pss;
        numbers.processes.clone_from(&self.processes);
    }
}
