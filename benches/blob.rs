//! What the supervisor's memory costs in each turn: `cargo bench --bench blob`.

#![expect(clippy::print_stdout, clippy::unwrap_used, reason = "a program for people")]

use std::hint::black_box;
use std::sync::Arc;

use pm::model::id::{AppName, Generation, InstanceId, Slot};
use pm::model::moment::Moment;
use pm::model::saved::{InstanceMemo, Memo, SlotMemo, StartedFile, StartedFrom};
use pm::supervisor::blob::{self, Blob, Sealer};
use pm::sys::clock;

const ROUNDS: u32 = 300;

fn fleet(apps: u32) -> Blob {
    let memo = |index: u32| {
        let app = AppName::new(&format!("service-{index}")).unwrap();
        let slot = SlotMemo {
            app: app.clone(),
            slot: Slot(0),
            restarts: 1,
            unstable: 0,
            failures: 1,
            restart_at: None,
            errored: false,
            created: Moment::from_nanos(26_163_288_978_307),
            last_exit: None,
            by_itself: false,
            newest: Generation(17),
            ended: None,
            stop_unsaved: false,
            gated: false,
            relapses: 0,
            replace_after: None,
            overruns: 0,
            curb_after: None,
        };
        let file = StartedFile {
            path: format!("/srv/service-{index}/current/server.js").into(),
            device: 2049,
            inode: 1_234_567,
            size: 34_567,
            modified: 1_763_700_000_000_000_000,
        };
        let from = StartedFrom { cwd: format!("/srv/service-{index}/current").into(), script: Some(file) };
        let instance = InstanceMemo {
            id: InstanceId { app, slot: Slot(0), generation: Generation(17) },
            revision: 3,
            pid: Some(4711 + index),
            since: Moment::from_nanos(26_163_288_978_307),
            ready_at: Some(Moment::from_nanos(26_163_388_978_307)),
            in_rotation: true,
            stopping: None,
            keys: vec![format!("127.0.0.1:{}:4:-1", 3000 + index)],
            said_ready: true,
            left: None,
            probes: (0, 0),
            over_memory: (0, 0),
            reserve: false,
            from: Some(Arc::new(from)),
        };
        (slot, instance)
    };
    let (slots, instances) = (0..apps).map(memo).unzip();
    Blob { memo: Memo { slots, instances, ..Memo::default() }, ..Blob::default() }
}

fn main() {
    for apps in [100, 1000] {
        let blob = fleet(apps);
        let mut sealer = Sealer::default();
        let bytes = sealer.seal(blob.clone(), 0).len();
        // What has to be copied before anything can be written, in every form.
        let copy = measure(|round| drop(black_box((blob.clone(), round))));
        let same = measure(|round| drop(black_box(sealer.seal(blob.clone(), round))));
        let one = measure(|round| {
            let mut blob = blob.clone();
            blob.memo.slots[0].restarts = u32::try_from(round).unwrap();
            drop(black_box(sealer.seal(blob, round)));
        });
        let all = measure(|round| drop(black_box(Sealer::default().seal(blob.clone(), round))));
        let half = Sealer::default().seal(blob.clone(), 1);
        let open = measure(|_| drop(black_box(blob::open(&half).unwrap())));
        println!(
            "{apps} apps, {bytes} bytes: copy of the state {copy} µs; sealed with it, nothing new {same} µs, one \
             record new {one} µs, all new {all} µs; opened {open} µs"
        );
    }
}

/// Microseconds per round.
fn measure(mut work: impl FnMut(u64)) -> u128 {
    let from = clock::now();
    for round in 0..ROUNDS {
        work(u64::from(round));
    }
    clock::now().since(from).as_micros() / u128::from(ROUNDS)
}
