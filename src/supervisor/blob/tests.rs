//! What is sealed opens, whatever other versions add or leave out, and nothing that is torn does.

use std::path::PathBuf;
use std::sync::Arc;

use serde_json::{Value, json};

use super::*;
use crate::model::exit::ExitReason;
use crate::model::id::Generation;
use crate::model::moment::Moment;
use crate::model::saved::{HookKind, StartedFile, StartedFrom, Trigger};

fn app(name: &str) -> AppName {
    AppName::new(name).unwrap()
}

fn instance(name: &str, slot: u32) -> InstanceMemo {
    let script = StartedFile { path: "/srv/api.js".into(), device: 1, inode: 2, size: 3, modified: -4 };
    InstanceMemo {
        id: InstanceId { app: app(name), slot: Slot(slot), generation: Generation(7) },
        revision: 3,
        pid: Some(4711),
        since: Moment::from_nanos(1),
        ready_at: Some(Moment::from_nanos(2)),
        in_rotation: true,
        stopping: Some((Moment::from_nanos(3), None)),
        keys: vec!["127.0.0.1:3000:4:-1".into()],
        said_ready: false,
        left: Some(ExitReason::Signal(crate::model::signal::Signal::INT)),
        probes: (1, 2),
        over_memory: (0, 0),
        reserve: true,
        from: Some(Arc::new(StartedFrom { cwd: PathBuf::from("/srv"), script: Some(script) })),
    }
}

fn slot(name: &str, slot: u32) -> SlotMemo {
    SlotMemo {
        app: app(name),
        slot: Slot(slot),
        restarts: 3,
        unstable: 1,
        failures: 2,
        restart_at: Some(Moment::from_nanos(9)),
        errored: false,
        created: Moment::from_nanos(1),
        last_exit: Some(ExitReason::Code(7)),
        by_itself: true,
        newest: Generation(7),
        ended: None,
        stop_unsaved: false,
        gated: false,
        relapses: 0,
        overruns: 0,
        curb_after: None,
        replace_after: None,
    }
}

/// Something of everything.
fn blob() -> Blob {
    let listener = ListenerMemo {
        app: app("api"),
        key: "k".into(),
        data: "null".into(),
        origin: Origin::Bound,
        address: "*:80".into(),
    };
    let channel = ChannelMemo {
        id: InstanceId { app: app("api"), slot: Slot(0), generation: Generation(7) },
        ready: true,
        node_version: Some("v22.1.0".into()),
        open: Vec::new(),
    };
    Blob {
        memo: Memo {
            slots: vec![slot("api", 0), slot("über uns", 1)],
            instances: vec![instance("api", 0), instance("über uns", 1)],
            hooks: vec![HookMemo { app: app("api"), kind: HookKind::PostStop }],
            reloads: Vec::new(),
            deleted: vec![app("gone")],
            retired: vec![InstanceId { app: app("api"), slot: Slot(3), generation: Generation(9) }],
        },
        channels: vec![channel],
        listeners: vec![listener],
        operations: Some(OperationsMemo::default()),
        told: vec![ToldMemo {
            id: InstanceId { app: app("api"), slot: Slot(0), generation: Generation(7) },
            processes: vec![(4711, 123_456)],
        }],
        journal: JournalMemo { seq: 12, pending: vec![(12, Arc::from("{\"seq\":12}"))] },
    }
}

fn seal(blob: &Blob, number: u64) -> Vec<u8> {
    Sealer::default().seal(blob.clone(), number)
}

/// The records of a half, each with its kind, to be changed and put together again.
fn records(half: &[u8]) -> Vec<(u32, Vec<u8>)> {
    let mut body = &half[HEADER..];
    let mut records = Vec::new();
    while let Some((head, rest)) = body.split_first_chunk::<RECORD_HEADER>() {
        let length = u32::from_le_bytes(head[4..].try_into().unwrap()) as usize;
        records.push((u32::from_le_bytes(head[..4].try_into().unwrap()), rest[..length].to_vec()));
        body = &rest[length..];
    }
    records
}

fn put_together(number: u64, records: &[(u32, Vec<u8>)]) -> Vec<u8> {
    let mut half = vec![0; HEADER];
    for (kind, bytes) in records {
        append(&mut half, *kind, bytes);
    }
    let head = [MAGIC, number, (half.len() - HEADER) as u64, checksum(number, &half[HEADER..])];
    for (place, word) in half.chunks_exact_mut(8).zip(head) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    half
}

#[test]
fn what_is_sealed_opens() {
    assert_eq!(open(&seal(&blob(), 9)), Some(Opened { blob: blob(), number: 9, unread: 0 }));
}

#[test]
fn a_half_cut_anywhere_or_with_any_byte_changed_does_not_open() {
    let half = seal(&blob(), 9);
    for end in 0..half.len() {
        assert_eq!(open(&half[..end]), None, "cut at {end}");
    }
    for index in 0..half.len() {
        for bit in [0x01, 0x40, 0x80] {
            let mut torn = half.clone();
            torn[index] ^= bit;
            assert_eq!(open(&torn), None, "byte {index}");
        }
    }
}

#[test]
fn what_has_not_changed_is_written_as_before_and_what_has_is_not() {
    let mut sealer = Sealer::default();
    assert_eq!(sealer.seal(blob(), 1), seal(&blob(), 1));
    assert_eq!(sealer.seal(blob(), 2), seal(&blob(), 2));
    let mut changed = blob();
    changed.memo.slots[1].restarts += 1;
    changed.memo.instances.remove(0);
    changed.channels[0].ready = false;
    assert_eq!(open(&sealer.seal(changed.clone(), 3)).unwrap().blob, changed);
    assert_eq!(open(&sealer.seal(blob(), 4)).unwrap().blob, blob());
}

#[test]
fn what_a_later_version_adds_is_skipped() {
    fn add_a_field(value: &mut Value) {
        match value {
            Value::Object(fields) => {
                fields.values_mut().for_each(add_a_field);
                fields.insert("of_a_later_version".into(), json!({ "a": [1, 2] }));
            }
            Value::Array(values) => values.iter_mut().for_each(add_a_field),
            _ => {}
        }
    }
    // An exit reason is an object with one field, its name; another one would be another reason.
    let mut plain = blob();
    plain.memo.slots.iter_mut().for_each(|slot| slot.last_exit = None);
    plain.memo.instances.iter_mut().for_each(|instance| instance.left = None);
    let mut later = records(&seal(&plain, 5));
    for (_, bytes) in &mut later {
        let mut value: Value = serde_json::from_slice(bytes).unwrap();
        add_a_field(&mut value);
        *bytes = value.to_string().into_bytes();
    }
    later.push((4_000_000, b"of a later version".to_vec()));
    assert_eq!(open(&put_together(6, &later)), Some(Opened { blob: plain, number: 6, unread: 1 }));
}

#[test]
fn what_is_known_of_memory_and_of_a_replacement_is_kept() {
    let mut kept = blob();
    (kept.memo.slots[0].overruns, kept.memo.slots[0].curb_after) = (2, Some(Moment::from_nanos(7)));
    kept.memo.instances[0].over_memory = (3, 300 << 20);
    kept.memo.reloads = vec![ReloadMemo {
        app: app("api"),
        revision: 3,
        failure: None,
        restored: Vec::new(),
        from: Vec::new(),
        trigger: Trigger::Memory,
    }];
    assert_eq!(open(&seal(&kept, 5)).unwrap().blob, kept);
    // Of a version that did not know who wanted it.
    let mut half = records(&seal(&kept, 5));
    let reload = half.iter_mut().find(|(kind, _)| *kind == super::kind::RELOAD).unwrap();
    let mut value: Value = serde_json::from_slice(&reload.1).unwrap();
    value.as_object_mut().unwrap().remove("trigger").unwrap();
    reload.1 = value.to_string().into_bytes();
    let opened = open(&put_together(6, &half)).unwrap();
    assert_eq!((opened.blob.memo.reloads[0].trigger, opened.unread), (Trigger::Asked, 0));
}

#[test]
fn a_record_that_makes_no_sense_costs_what_it_is_about() {
    let mut half = records(&seal(&blob(), 5));
    let mut value: Value = serde_json::from_slice(&half[0].1).unwrap();
    value["last_exit"] = json!({ "of_a_later_version": 3 });
    half[0].1 = value.to_string().into_bytes();
    let opened = open(&put_together(6, &half)).unwrap();
    let mut expected = blob();
    expected.memo.slots.remove(0);
    assert_eq!((opened.blob, opened.unread), (expected, 1));
}

/// What versions wrote, in their order. A change of the format adds one and leaves those that are there.
#[test]
fn what_older_versions_wrote_still_opens() {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/blob");
    let newest = dir.join("2.blob");
    if std::env::var_os("PM_WRITE_FIXTURES").is_some() {
        std::fs::write(&newest, seal(&blob(), 5)).unwrap();
    }
    let mut seen = 0;
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let opened = open(&std::fs::read(&path).unwrap());
        let mut expected = blob();
        if path.ends_with("1.blob") {
            // What it did not know yet.
            (expected.memo.deleted, expected.memo.retired, expected.told) = Default::default();
            expected.memo.instances.iter_mut().for_each(|memo| memo.over_memory = (0, 0));
        }
        assert_eq!(opened, Some(Opened { blob: expected, number: 5, unread: 0 }), "{}", path.display());
        seen += 1;
    }
    assert!(seen > 0);
}

#[test]
fn only_what_names_the_thing_has_to_be_there() {
    let record = br#"{"app":"api","slot":0,"restarts":1,"unstable":0,"failures":0,"restart_at":null,
        "errored":false,"created":1,"last_exit":null}"#;
    let opened = open(&put_together(1, &[(kind::SLOT, record.to_vec())])).unwrap();
    assert_eq!((opened.unread, opened.blob.memo.slots.len()), (0, 1), "as the first version wrote it");
}
