//! CPU and memory of real process trees.

use std::time::Duration;

use pm::metrics::sample::{Sampler, Usage};
use pm::model::id::InstanceId;
use pm::model::moment::Moment;
use pm::sys::procfs::Procfs;
use pm::sys::tree::worker::Instance;

use super::keeper::{as_keeper, me, moment, wait_for};

fn measured(instances: &[&Instance]) -> Vec<(InstanceId, i32, u64)> {
    instances.iter().map(|i| (i.id.clone(), i.root.main.pid, i.root.main.start_ticks)).collect()
}

fn sample(sampler: &mut Sampler, now: Moment, instance: &Instance) -> Usage {
    sampler.sample(now, me(), &measured(&[instance])).unwrap()[&instance.id]
}

fn wait_until(moment: Moment) {
    wait_for("the time", || super::keeper::moment() >= moment);
}

/// The machine may be busy, so the figure is compared with the CPU time the kernel has noted for the app itself.
#[test]
fn cpu_of_a_spinner_below_a_shell_is_right_in_the_first_and_the_second_sample() {
    as_keeper(
        "sampling::cpu_of_a_spinner_below_a_shell_is_right_in_the_first_and_the_second_sample",
        |keeper| {
            keeper.file(
                "spin.js",
                "
const { Worker, isMainThread } = require('worker_threads');
const spin = () => { for (;;); };
if (!isMainThread) spin();
new Worker(__filename).on('online', () => { require('fs').writeFileSync('spins', 'on\\n'); spin(); });
",
            );
            let app = keeper.start(&["sh", "-c", "node spin.js; true"]);
            keeper.said("spins");
            let mut sampler = Sampler::new();
            // The kernel's ticks are coarse: some time has to pass before they say anything.
            wait_until(moment() + Duration::from_millis(700));
            let first = sample(&mut sampler, moment(), &app);
            let begin = moment();
            assert_eq!(first.processes, 2);
            let node =
                sampler.details(&app.id).unwrap().into_iter().find(|p| p.command == "node spin.js").unwrap();
            let mut procfs = Procfs::new();
            let mut ticks = || procfs.stat(node.pid).unwrap().unwrap().own_ticks();
            let before = ticks();
            let hertz = pm::sys::procfs::ticks_per_second();
            let started = Duration::from_millis(app.root.main.start_ticks * 1000 / hertz);
            let expected = percent(before, hertz, pm::sys::procfs::since_boot() - started);
            assert!((first.cpu_percent / expected - 1.0).abs() < 0.1, "{first:?}, expected {expected}");

            wait_until(begin + Duration::from_millis(1000));
            let second = sample(&mut sampler, moment(), &app);
            let expected = percent(ticks() - before, hertz, moment().since(begin));
            println!("first {first:?}, second {second:?}, expected {expected}");
            assert!((second.cpu_percent / expected - 1.0).abs() < 0.1, "{second:?}, expected {expected}");
        },
    );
}

#[expect(clippy::cast_precision_loss, reason = "small numbers")]
fn percent(ticks: u64, hertz: u64, time: Duration) -> f64 {
    ticks as f64 / hertz as f64 / time.as_secs_f64() * 100.0
}

#[test]
fn short_lived_children_count() {
    as_keeper("sampling::short_lived_children_count", |keeper| {
        let app = keeper.start(&[
            "sh",
            "-c",
            "while :; do python3 -c 'for i in range(300000): pass'; echo on > loops; done",
        ]);
        keeper.said("loops");
        let mut sampler = Sampler::new();
        sample(&mut sampler, moment(), &app);
        let begin = moment();
        let mut procfs = Procfs::new();
        let mut ticks = || procfs.stat(app.root.main.pid).unwrap().unwrap().reaped_ticks();
        let before = ticks();
        wait_until(begin + Duration::from_millis(1500));
        let usage = sample(&mut sampler, moment(), &app);
        let span = moment().since(begin);
        let per_second = pm::sys::procfs::ticks_per_second();
        let expected = percent(ticks() - before, per_second, span);
        println!("{usage:?}, expected {expected}");
        assert!(expected > 5.0, "the loop hardly ran: {expected}");
        // One child is under way at either end, each with up to 0.1 s.
        let children = percent(per_second / 10, per_second, span);
        assert!(
            (usage.cpu_percent - expected).abs() < 0.1 * expected + children,
            "{usage:?}, expected {expected}"
        );
    });
}

#[test]
fn memory_of_a_tree_is_right() {
    as_keeper("sampling::memory_of_a_tree_is_right", |keeper| {
        keeper.file(
            "hold.py",
            "
import subprocess, sys, time
size, name = int(sys.argv[1]), sys.argv[2]
held = bytearray(b'x') * (size << 20)
if size > 40:
    subprocess.Popen([sys.executable, 'hold.py', '30', 'child'])
open(name, 'w').write('on\\n')
time.sleep(1000)
",
        );
        let app = keeper.start(&["python3", "hold.py", "50", "main"]);
        keeper.said("main");
        keeper.said("child");
        let mut sampler = Sampler::new();
        let usage = sample(&mut sampler, moment(), &app);
        let details = sampler.details(&app.id).unwrap();
        assert_eq!((usage.processes, details.len()), (2, 2));
        assert_eq!(details[0].pid, app.root.main.pid);
        assert!(details[1].command.ends_with("hold.py 30 child"), "{details:?}");
        assert!(details.iter().all(|p| p.rss >= p.pss.unwrap() && p.pss >= p.uss), "{details:?}");
        let child = Procfs::new().smaps_rollup(details[1].pid).unwrap().unwrap();
        let truth = details[0].rss + child.anonymous;
        println!("{usage:?}, truth {truth}, {details:?}");
        assert!(truth > 80 << 20);
        assert!(usage.memory.abs_diff(truth) < truth / 20, "{usage:?}, truth {truth}");
    });
}

#[test]
fn samples_are_kept_for_a_moment_and_forgotten_with_their_instance() {
    as_keeper("sampling::samples_are_kept_for_a_moment_and_forgotten_with_their_instance", |keeper| {
        let app = keeper.start(&["sh", "-c", "(setsid sleep 1000 &); exec sleep 2000"]);
        keeper.wait_for_living(&app, &["sleep", "sleep"]);
        let mut sampler = Sampler::new();
        let now = moment();
        assert_eq!(sample(&mut sampler, now, &app).processes, 2);
        keeper.kill_main(&app);
        assert_eq!(sample(&mut sampler, now + Duration::from_millis(499), &app).processes, 2);
        assert_eq!(sample(&mut sampler, now + Duration::from_millis(500), &app).processes, 1);
        // A new instance is sampled at once, without the others.
        let other = keeper.start(&["sleep", "1000"]);
        let usages =
            sampler.sample(now + Duration::from_millis(600), me(), &measured(&[&app, &other])).unwrap();
        assert_eq!((usages[&app.id].processes, usages[&other.id].processes), (1, 1));
        let usages = sampler.sample(now + Duration::from_secs(2), me(), &measured(&[&other])).unwrap();
        assert_eq!(usages.keys().collect::<Vec<_>>(), [&other.id]);
        assert_eq!(sampler.details(&app.id).unwrap(), []);
    });
}
