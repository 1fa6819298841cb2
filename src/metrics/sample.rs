//! CPU and memory per instance, its whole process tree counted.
//!
//! CPU time of a tree is that of its processes plus what they have inherited from children they waited for, so that
//! short-lived children count too. A process that ends takes its time to its parent; what was counted while it lived
//! is taken off there. Memory is the resident set of the main process plus what the others have beyond shared pages:
//! adding up whole resident sets would count the libraries once per process.

use std::collections::{HashMap, HashSet};
use std::io;
use std::time::Duration;

use super::tree::{Census, Fresh, Main};
use crate::model::id::InstanceId;
use crate::model::moment::Moment;
use crate::sys::procfs::{self, ProcessId, Procfs, Stat};

/// Numbers younger than this are given again instead of being taken anew.
pub const FRESH_FOR: Duration = Duration::from_millis(500);

/// What an instance uses.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// CPU time in % of one core: since the last sample, in the first one since the start of the process.
    pub cpu_percent: f64,
    /// Bytes: the main process's resident set, and of the others what they do not share.
    pub memory: u64,
    /// Living processes.
    pub processes: usize,
}

/// What one process of an instance uses.
#[derive(Clone, Debug, PartialEq)]
pub struct ProcessUsage {
    /// Its pid.
    pub pid: i32,
    /// Its parent.
    pub ppid: i32,
    /// Its arguments, or its name where there are none.
    pub command: String,
    /// CPU time in % of one core, as in [`Usage`], without its children.
    pub cpu_percent: f64,
    /// Resident bytes.
    pub rss: u64,
    /// Resident bytes, shared pages divided among those who share them; `None` when we may not look.
    pub pss: Option<u64>,
    /// Resident bytes that are its alone; likewise.
    pub uss: Option<u64>,
}

/// Takes the samples. One for all instances; keeps only what is needed of processes that live.
#[derive(Debug)]
pub struct Sampler {
    procfs: Procfs,
    census: Census,
    instances: HashMap<InstanceId, Record>,
    clock: Clock,
}

/// The last sample of an instance.
#[derive(Debug)]
struct Record {
    main: ProcessId,
    taken: Moment,
    /// The same on the clock of start times.
    taken_at: Duration,
    usage: Usage,
    processes: HashMap<i32, Last>,
}

#[derive(Clone, Copy, Debug)]
struct Last {
    stat: Stat,
    cpu_percent: f64,
}

#[derive(Clone, Copy, Debug)]
struct Clock {
    hertz: f64,
    page: u64,
    /// Nothing can use more: the rest is rounding in short times.
    most_percent: f64,
}

impl Clock {
    #[expect(clippy::cast_precision_loss, reason = "2^53 ticks are three million years")]
    fn percent(&self, ticks: u64, time: Duration) -> f64 {
        // A tick is the least that can be told apart.
        let seconds = time.as_secs_f64().max(1.0 / self.hertz);
        (ticks as f64 / self.hertz / seconds * 100.0).min(self.most_percent)
    }

    #[expect(clippy::cast_precision_loss, reason = "2^53 ticks are three million years")]
    fn started(&self, process: ProcessId) -> Duration {
        Duration::from_secs_f64(process.start_ticks as f64 / self.hertz)
    }
}

impl Default for Sampler {
    fn default() -> Self {
        Self::new()
    }
}

impl Sampler {
    /// A sampler that has seen nothing yet.
    #[must_use]
    pub fn new() -> Self {
        #[expect(clippy::cast_precision_loss, reason = "100, and some cores")]
        let clock = Clock {
            hertz: procfs::ticks_per_second() as f64,
            page: procfs::page_size(),
            most_percent: super::host::online_cpus() as f64 * 100.0,
        };
        Self { procfs: Procfs::new(), census: Census::default(), instances: HashMap::new(), clock }
    }

    /// The numbers of these instances, given by id, pid and start ticks of their main processes. Those sampled within
    /// [`FRESH_FOR`] are not looked at again. Instances that are not in the list any more are forgotten.
    ///
    /// # Errors
    /// /proc cannot be read; the numbers of the last time are kept.
    pub fn sample(
        &mut self,
        now: Moment,
        keeper: i32,
        instances: &[(InstanceId, i32, u64)],
    ) -> io::Result<HashMap<InstanceId, Usage>> {
        let mains: Vec<Main> = instances
            .iter()
            .map(|(id, pid, start_ticks)| (id.clone(), ProcessId { pid: *pid, start_ticks: *start_ticks }))
            .collect();
        let listed: HashMap<&InstanceId, ProcessId> = mains.iter().map(|(id, main)| (id, *main)).collect();
        self.instances.retain(|id, record| listed.get(id) == Some(&record.main));
        let due: Vec<&Main> = mains
            .iter()
            .filter(|(id, _)| self.instances.get(id).is_none_or(|r| now.since(r.taken) >= FRESH_FOR))
            .collect();
        if !due.is_empty() {
            let fresh = self.census.update(&mut self.procfs, now, keeper, &mains)?;
            let trees = self.census.trees();
            let mut source = Source {
                procfs: &mut self.procfs,
                census: &mut self.census,
                fresh: &fresh,
                clock: self.clock,
            };
            for (id, main) in due {
                let members = trees.get(main).map_or(&[][..], Vec::as_slice);
                let record = source.take(now, *main, members, self.instances.get(id))?;
                self.instances.insert(id.clone(), record);
            }
        }
        Ok(self.instances.iter().map(|(id, record)| (id.clone(), record.usage)).collect())
    }

    /// The processes of an instance that was sampled before, main process first. Costs about 10 µs per MB.
    ///
    /// # Errors
    /// /proc cannot be read.
    pub fn details(&mut self, id: &InstanceId) -> io::Result<Vec<ProcessUsage>> {
        let Some(record) = self.instances.get(id) else { return Ok(Vec::new()) };
        let mut processes: Vec<Last> = record.processes.values().copied().collect();
        let main = record.main;
        processes.sort_unstable_by_key(|last| (last.stat.process != main, last.stat.process));
        let mut usages = Vec::with_capacity(processes.len());
        for last in processes {
            let pid = last.stat.process.pid;
            let Some(stat) = self.procfs.stat(pid)?.filter(|s| s.process == last.stat.process && s.alive())
            else {
                continue;
            };
            let rollup = match self.procfs.smaps_rollup(pid) {
                Ok(rollup) => rollup,
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => None,
                Err(error) => return Err(error),
            };
            let command = match self.procfs.cmdline(pid)? {
                Some(arguments) if !arguments.is_empty() => arguments.join(" "),
                _ => stat.comm.to_string(),
            };
            usages.push(ProcessUsage {
                pid,
                ppid: stat.ppid,
                command,
                cpu_percent: last.cpu_percent,
                rss: rollup.map_or(stat.rss_pages * self.clock.page, |r| r.rss),
                pss: rollup.map(|r| r.pss),
                uss: rollup.map(|r| r.uss),
            });
        }
        Ok(usages)
    }
}

/// Where the numbers come from.
struct Source<'a> {
    procfs: &'a mut Procfs,
    census: &'a mut Census,
    fresh: &'a Fresh,
    clock: Clock,
}

impl Source<'_> {
    fn take(
        &mut self,
        now: Moment,
        main: ProcessId,
        members: &[ProcessId],
        before: Option<&Record>,
    ) -> io::Result<Record> {
        let clock = self.clock;
        let mut stats: HashMap<i32, Stat> = HashMap::with_capacity(members.len());
        let mut memory = 0;
        let mut living = 0;
        for member in members {
            let stat = match self.fresh.get(&member.pid) {
                Some(stat) => Some(*stat),
                None => self.procfs.stat(member.pid)?,
            };
            let Some(stat) = stat.filter(|stat| stat.process == *member) else {
                self.census.forget(member.pid);
                continue;
            };
            living += usize::from(stat.alive());
            memory += clock.page * own_pages(self.procfs, &stat, main)?;
            stats.insert(member.pid, stat);
        }
        let taken_at = procfs::since_boot();
        let processes: HashMap<i32, Last> = stats
            .iter()
            .map(|(&pid, &stat)| {
                let last = before.and_then(|record| record.last(stat.process));
                let (ticks, time) = match (last, before) {
                    (Some(last), Some(record)) => (
                        stat.own_ticks().saturating_sub(last.own_ticks()),
                        taken_at.saturating_sub(record.taken_at),
                    ),
                    _ => (stat.own_ticks(), taken_at.saturating_sub(clock.started(stat.process))),
                };
                (pid, Last { stat, cpu_percent: clock.percent(ticks, time) })
            })
            .collect();
        let cpu_percent = match before {
            None => {
                let ticks = stats.values().map(|stat| stat.own_ticks() + stat.reaped_ticks()).sum();
                clock.percent(ticks, taken_at.saturating_sub(clock.started(main)))
            }
            Some(record) => clock.percent(
                used_since(record, &stats, taken_at, clock),
                taken_at.saturating_sub(record.taken_at),
            ),
        };
        let usage = Usage { cpu_percent, memory, processes: living };
        Ok(Record { main, taken: now, taken_at, usage, processes })
    }
}

/// The pages that a process of a tree adds to what its main process has.
pub(super) fn own_pages(procfs: &mut Procfs, stat: &Stat, main: ProcessId) -> io::Result<u64> {
    Ok(if stat.process == main {
        stat.rss_pages
    } else if stat.rss_pages == 0 {
        0
    } else {
        procfs.statm(stat.process.pid)?.map_or(0, |m| m.resident.saturating_sub(m.shared))
    })
}

impl Record {
    fn last(&self, process: ProcessId) -> Option<&Stat> {
        self.processes.get(&process.pid).map(|last| &last.stat).filter(|stat| stat.process == process)
    }
}

/// CPU ticks of a tree since the last sample.
fn used_since(before: &Record, stats: &HashMap<i32, Stat>, taken_at: Duration, clock: Clock) -> u64 {
    let lives = |stat: &Stat| stats.get(&stat.process.pid).is_some_and(|now| now.process == stat.process);
    // What ended since has left its whole time to the parent that waited for it, the part that is counted already
    // included. If that parent has ended as well, it went on to the next.
    let mut counted: HashMap<i32, u64> = HashMap::new();
    for last in before.processes.values().filter(|last| !lives(&last.stat)) {
        let mut heir = last.stat.ppid;
        let mut seen = HashSet::new();
        while let Some(parent) = before.processes.get(&heir)
            && !lives(&parent.stat)
            && seen.insert(heir)
        {
            heir = parent.stat.ppid;
        }
        *counted.entry(heir).or_default() += last.stat.own_ticks() + last.stat.reaped_ticks();
    }
    let mut used = 0;
    for stat in stats.values() {
        let (own, reaped) = match before.last(stat.process) {
            Some(last) => (
                stat.own_ticks().saturating_sub(last.own_ticks()),
                stat.reaped_ticks().saturating_sub(last.reaped_ticks()),
            ),
            None => {
                // One that was not seen to belong before, although it was there, counts for this interval only.
                let started = clock.started(stat.process);
                let (life, late) =
                    (taken_at.saturating_sub(started), before.taken_at.saturating_sub(started));
                let part = |ticks: u64| {
                    if late.is_zero() || life.is_zero() {
                        return ticks;
                    }
                    let share =
                        (life.saturating_sub(late)).as_micros() * u128::from(ticks) / life.as_micros().max(1);
                    u64::try_from(share).unwrap_or(ticks)
                };
                (part(stat.own_ticks()), part(stat.reaped_ticks()))
            }
        };
        let counted = counted.get(&stat.process.pid).copied().unwrap_or(0);
        used += own + reaped.saturating_sub(counted);
    }
    used
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stat(pid: i32, ppid: i32, own: u64, reaped: u64) -> Stat {
        let line = format!(
            "{pid} (x) S {ppid} 1 1 0 -1 0 0 0 0 0 {own} 0 {reaped} 0 20 0 1 0 {pid} 4096 1 0 0 0 0 0 0 0 0 0 0"
        );
        Stat::parse(line.as_bytes()).unwrap()
    }

    fn check(before: &[Stat], after: &[Stat], expected: u64) {
        let clock = Clock { hertz: 100.0, page: 4096, most_percent: 400.0 };
        let record = Record {
            main: before[0].process,
            taken: Moment::default(),
            taken_at: Duration::from_secs(1),
            usage: Usage::default(),
            processes: before.iter().map(|&s| (s.process.pid, Last { stat: s, cpu_percent: 0.0 })).collect(),
        };
        let stats = after.iter().map(|&s| (s.process.pid, s)).collect();
        assert_eq!(used_since(&record, &stats, Duration::from_secs(2), clock), expected);
    }

    #[test]
    fn time_is_counted_once_wherever_it_goes() {
        // Everybody lives.
        check(&[stat(1, 0, 10, 0), stat(2, 1, 20, 0)], &[stat(1, 0, 15, 0), stat(2, 1, 50, 0)], 35);
        // The child has ended after 5 more ticks; its parent inherits all 25.
        check(&[stat(1, 0, 10, 0), stat(2, 1, 20, 0)], &[stat(1, 0, 10, 25)], 5);
        // A child that came and went in between.
        check(&[stat(1, 0, 10, 0)], &[stat(1, 0, 10, 7)], 7);
        // A grandchild and its parent have ended, each with one more tick.
        check(&[stat(1, 0, 10, 0), stat(2, 1, 20, 0), stat(3, 2, 40, 0)], &[stat(1, 0, 10, 62)], 2);
        // Nobody waited for the child: its time is lost, and nothing becomes negative.
        check(&[stat(1, 0, 10, 3), stat(2, 1, 20, 0)], &[stat(1, 0, 11, 3)], 1);
    }

    #[test]
    fn late_comers_count_for_the_interval_only() {
        // Started at 1.5 s (tick 150), after the last sample at 1 s.
        check(&[stat(1, 0, 0, 0)], &[stat(1, 0, 0, 0), stat(150, 1, 40, 0)], 40);
        // Started at 0 s but not seen to belong: half of its two seconds.
        check(&[stat(1, 0, 0, 0)], &[stat(1, 0, 0, 0), stat(2, 1, 200, 0)], 101);
    }
}
