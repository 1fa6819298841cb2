//! Prints how long a sampling pass takes with 100 and 1,000 idle processes, and a look at all their trees.
//!
//! `cargo bench --bench sampling`. A main of its own: what counts is the cost of one pass over real processes, which
//! a loop around the same warm call would hide.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pm::metrics::sample::Sampler;
use pm::model::id::{AppName, Generation, InstanceId, Slot};
use pm::model::moment::Moment;
use pm::sys::procfs::{ProcessId, Procfs};
use pm::sys::tree::{Root, Scanner, Snapshot};

const PASSES: u64 = 21;

struct Processes(Vec<Child>);

impl Drop for Processes {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
        }
        for child in &mut self.0 {
            let _ = child.wait();
        }
    }
}

#[expect(clippy::print_stdout, reason = "prints its results")]
fn main() {
    for count in [100, 1000] {
        let processes = Processes(
            (0..count)
                .map_while(|_| Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().ok())
                .collect(),
        );
        let (first, sample, walk) = measure(&processes.0);
        println!(
            "{count} processes: first sample {:.2} ms, sample {}, snapshot of all trees {}",
            millis(first),
            spread(&sample),
            spread(&walk)
        );
    }
}

fn measure(children: &[Child]) -> (Duration, Vec<Duration>, Vec<Duration>) {
    let mut procfs = Procfs::new();
    let app = AppName::new("bench").expect("a good name");
    let mut instances = Vec::new();
    let mut roots = Vec::new();
    for (slot, child) in (0..).zip(children) {
        let pid = i32::try_from(child.id()).expect("a pid");
        let Ok(Some(stat)) = procfs.stat(pid) else { continue };
        let id = InstanceId { app: app.clone(), slot: Slot(slot), generation: Generation(1) };
        instances.push((id, pid, stat.process.start_ticks));
        let main = ProcessId { pid, start_ticks: stat.process.start_ticks };
        roots.push(Root { main, token: format!("bench:{slot}:1:0"), group: None });
    }
    let keeper = i32::try_from(std::process::id()).expect("a pid");
    let mut sampler = Sampler::new();
    let mut pass = |second: u64| {
        let begin = Instant::now();
        let usages = sampler.sample(Moment::from_nanos(second * 1_000_000_000), keeper, &instances);
        assert_eq!(usages.map(|u| u.len()).unwrap_or(0), instances.len());
        begin.elapsed_time()
    };
    let first = pass(1);
    let mut sampled: Vec<Duration> = (2..2 + PASSES).map(&mut pass).collect();
    let mut scanner = Scanner::new();
    let mut looked: Vec<Duration> = (0..PASSES)
        .map(|_| {
            let begin = Instant::now();
            let snapshot = Snapshot::take(&mut scanner, keeper, &roots);
            assert!(snapshot.is_ok_and(|s| s.trees.iter().all(|tree| !tree.is_empty())));
            begin.elapsed_time()
        })
        .collect();
    sampled.sort_unstable();
    looked.sort_unstable();
    (first, sampled, looked)
}

/// The least, which other work on the machine disturbs least, and the median.
fn spread(sorted: &[Duration]) -> String {
    format!("{:.2} ms (median {:.2})", millis(sorted[0]), millis(sorted[sorted.len() / 2]))
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// The time since then, by subtraction: reading the clock is the point here.
trait ElapsedTime {
    fn elapsed_time(self) -> Duration;
}

impl ElapsedTime for Instant {
    fn elapsed_time(self) -> Duration {
        Self::now() - self
    }
}
