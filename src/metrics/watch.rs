//! The memory of instances that have a limit, again and again: who is above it, and who is not any more.
//!
//! The same number as in the table (`sample`), without its CPU times, which belong to those who look at the table.
//! Every instance has to be known, also without a limit: who belongs to whom is found out by the census, and what
//! nobody claims would be looked at in every pass.

use std::collections::HashMap;
use std::io;
use std::time::Duration;

use super::sample::own_pages;
use super::tree::{Census, Main};
use crate::model::id::InstanceId;
use crate::model::moment::Moment;
use crate::sys::procfs::{self, ProcessId, Procfs};

/// From one pass to the next while everybody is below the limit.
pub const CALM: Duration = Duration::from_secs(1);
/// Likewise while somebody has just been found above it.
pub const SUSPICIOUS: Duration = Duration::from_millis(400);

/// What is known of instances and their limits.
#[derive(Debug)]
pub struct MemoryWatch {
    procfs: Procfs,
    census: Census,
    page: u64,
    mains: Vec<Main>,
    limits: HashMap<InstanceId, Limit>,
    /// So many samples above the limit are told, in a row.
    told: u32,
}

#[derive(Clone, Copy, Debug)]
struct Limit {
    bytes: u64,
    /// Samples in a row above it.
    over: u32,
    /// Nothing has been told of it yet.
    fresh: bool,
}

impl MemoryWatch {
    /// Nobody is watched. Of samples above a limit the first `told` in a row are told.
    #[must_use]
    pub fn new(told: u32) -> Self {
        Self {
            procfs: Procfs::new(),
            census: Census::default(),
            page: procfs::page_size(),
            mains: Vec::new(),
            limits: HashMap::new(),
            told,
        }
    }

    /// An instance has a process.
    pub fn appeared(&mut self, id: InstanceId, main: ProcessId) {
        self.gone(&id);
        self.mains.push((id, main));
    }

    /// An instance is no more.
    pub fn gone(&mut self, id: &InstanceId) {
        self.mains.retain(|(other, _)| other != id);
        self.limits.remove(id);
    }

    /// An instance is to be measured against this limit, in bytes; the next sample is told in any case.
    pub fn watch(&mut self, id: InstanceId, bytes: u64) {
        self.limits.insert(id, Limit { bytes, over: 0, fresh: true });
    }

    /// An instance is not to be measured any more.
    pub fn unwatch(&mut self, id: &InstanceId) {
        self.limits.remove(id);
    }

    /// How long after a pass the next one is due; `None`: nobody is watched.
    #[must_use]
    pub fn interval(&self) -> Option<Duration> {
        let suspicious = self.limits.values().any(|limit| limit.over > 0 && limit.over < self.told);
        (!self.limits.is_empty()).then_some(if suspicious { SUSPICIOUS } else { CALM })
    }

    /// Measures everybody that has a limit, once. Returns the bytes of those of which something is to be told: the first
    /// sample, the first few in a row above the limit, and the first one below it after that.
    ///
    /// # Errors
    /// /proc cannot be read.
    pub fn pass(&mut self, now: Moment, keeper: i32) -> io::Result<Vec<(InstanceId, u64)>> {
        let fresh = self.census.update(&mut self.procfs, now, keeper, &self.mains)?;
        let trees = self.census.trees();
        let mut told = Vec::new();
        for (id, main) in &self.mains {
            let Some(limit) = self.limits.get_mut(id) else { continue };
            // It has ended, and its end is on its way.
            let Some(members) = trees.get(main) else { continue };
            let mut pages = 0;
            for member in members {
                let stat = match fresh.get(&member.pid) {
                    Some(stat) => Some(*stat),
                    None => self.procfs.stat(member.pid)?,
                };
                match stat.filter(|stat| stat.process == *member) {
                    Some(stat) => pages += own_pages(&mut self.procfs, &stat, *main)?,
                    None => self.census.forget(member.pid),
                }
            }
            let bytes = pages * self.page;
            let before = limit.over;
            limit.over = if bytes > limit.bytes { before.saturating_add(1) } else { 0 };
            let news = if limit.over > 0 { limit.over <= self.told } else { before > 0 };
            if news || std::mem::take(&mut limit.fresh) {
                limit.fresh = false;
                told.push((id.clone(), bytes));
            }
        }
        Ok(told)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::id::{AppName, Generation, Slot};

    const MEBIBYTE: u64 = 1 << 20;

    /// This very process as an instance: what it uses is known, and it can use more.
    #[test]
    fn the_first_sample_is_told_then_only_those_that_matter() {
        let own = i32::try_from(std::process::id()).unwrap();
        let stat = Procfs::new().stat(own).unwrap().unwrap();
        let id = InstanceId { app: AppName::new("api").unwrap(), slot: Slot(0), generation: Generation(1) };
        let mut watch = MemoryWatch::new(3);
        watch.appeared(id.clone(), stat.process);
        assert_eq!(watch.interval(), None, "nobody is watched");
        let mut second = 0;
        let mut pass = |watch: &mut MemoryWatch| {
            second += 1;
            let told = watch.pass(Moment::from_nanos(second * 1_000_000_000), 1).unwrap();
            told.first().map(|(told, bytes)| {
                assert_eq!(*told, id);
                *bytes
            })
        };
        watch.watch(id.clone(), 1 << 40);
        let first = pass(&mut watch).expect("the first one is told");
        assert!(first > MEBIBYTE, "{first}");
        assert_eq!((pass(&mut watch), watch.interval()), (None, Some(CALM)));
        watch.watch(id.clone(), first / 2);
        for _ in 0..3 {
            assert!(pass(&mut watch).is_some_and(|bytes| bytes > first / 2));
        }
        assert_eq!((pass(&mut watch), watch.interval()), (None, Some(CALM)), "that is known by now");
        // Back below it: as if the limit were another one, without being told so.
        watch.limits.get_mut(&id).unwrap().bytes = 1 << 40;
        assert!(pass(&mut watch).is_some());
        assert_eq!(pass(&mut watch), None);
        watch.limits.get_mut(&id).unwrap().bytes = 1;
        assert!(pass(&mut watch).is_some());
        assert_eq!(watch.interval(), Some(SUSPICIOUS));
        watch.gone(&id);
        assert_eq!((pass(&mut watch), watch.interval()), (None, None));
    }
}
