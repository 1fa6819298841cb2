//! Every frame comes back as it went, and no bytes make a reader panic.

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use super::*;

fn name() -> impl Strategy<Value = String> {
    "[a-zß/:0-9]{0,40}"
}

fn c_text() -> impl Strategy<Value = CString> {
    vec(1_u8.., 0..200).prop_map(|bytes| CString::new(bytes).unwrap())
}

fn limit() -> impl Strategy<Value = Limit> {
    any::<(u32, u64, u64)>().prop_map(|(resource, soft, hard)| Limit { resource, soft, hard })
}

fn status() -> impl Strategy<Value = WaitStatus> {
    any::<i32>().prop_map(WaitStatus::from_raw)
}

fn pid() -> impl Strategy<Value = Option<u32>> {
    option::of(1_u32..)
}

fn spawn() -> impl Strategy<Value = Spawn> {
    let command = option::of(vec(any::<u8>(), 0..2000));
    (any::<u64>(), vec(any::<u8>(), 0..=TAG_MAX), 0_u16..40, vec(name(), 0..20), command)
        .prop_map(|(request, tag, child_fds, held, command)| Spawn { request, tag, child_fds, held, command })
}

fn to_keeper() -> impl Strategy<Value = (ToKeeper, usize)> {
    prop_oneof![
        any::<u16>().prop_map(|version| (ToKeeper::Welcome { version }, 0)),
        any::<u32>().prop_map(|batch| (ToKeeper::Taken { batch }, 0)),
        spawn().prop_map(|spawn| {
            let fds = usize::from(spawn.child_fds) + spawn.held.len() + usize::from(spawn.command.is_none());
            (ToKeeper::Spawn(spawn), fds)
        }),
        any::<(u32, bool)>().prop_map(|(pid, keep)| {
            let fds = if keep { HeldFds::Keep } else { HeldFds::Release };
            (ToKeeper::Confirm { pid, fds }, 0)
        }),
        (vec(name(), 0..FDS_MAX), pid()).prop_map(|(names, owner)| {
            let fds = names.len();
            (ToKeeper::Hold { names, owner }, fds)
        }),
        name().prop_map(|name| (ToKeeper::Release { name }, 0)),
        name().prop_map(|prefix| (ToKeeper::ReleasePrefix { prefix }, 0)),
        any::<u64>().prop_map(|request| (ToKeeper::Sync { request }, 0)),
        Just((ToKeeper::Quit, 0)),
        Just((ToKeeper::Go, 0)),
        Just((ToKeeper::TookOver, 0)),
        (any::<u64>(), ".{0,20}", any::<bool>())
            .prop_map(|(op, from, supervisor_only)| { (ToKeeper::Upgrade { op, from, supervisor_only }, 1) }),
        (500_u16..).prop_map(|kind| (ToKeeper::Unknown { kind }, 3)),
    ]
}

fn hello() -> impl Strategy<Value = Hello> {
    let death = (any::<u32>(), status(), any::<u64>(), ".{0,50}")
        .prop_map(|(pid, status, lived_ms, reason)| Death { pid, status, lived_ms, reason });
    let numbers = any::<(u16, u32, u64, u64, u64, i32, u32)>();
    (numbers, option::of(death), any::<bool>(), option::of(1..65), option::of(upgrade())).prop_map(
        |(numbers, last_death, without_blob, terminate, upgrade)| {
            let (version, keeper_pid, started, soft, hard, oom_score_adj, deaths) = numbers;
            let open_files = Limit { resource: libc::RLIMIT_NOFILE, soft, hard };
            Hello {
                version,
                keeper_pid,
                started,
                open_files,
                oom_score_adj,
                deaths,
                last_death,
                without_blob,
                terminate,
                upgrade,
            }
        },
    )
}

fn upgrade() -> impl Strategy<Value = Upgrade> {
    let state = prop_oneof![
        Just(UpgradeState::Pending),
        ".{0,50}".prop_map(|reason| UpgradeState::Failed { reason }),
        Just(UpgradeState::Supervisor),
        ".{0,50}".prop_map(|reason| UpgradeState::KeeperStays { reason }),
        Just(UpgradeState::Both),
    ];
    (any::<u64>(), ".{0,20}", state).prop_map(|(op, from, state)| Upgrade { op, from, state })
}

fn child() -> impl Strategy<Value = ChildRecord> {
    let state = prop_oneof![
        Just(ChildState::Starting),
        Just(ChildState::Running),
        status().prop_map(ChildState::Exited)
    ];
    (any::<u32>(), any::<u64>(), vec(any::<u8>(), 0..=TAG_MAX), state)
        .prop_map(|(pid, start_ticks, tag, state)| ChildRecord { pid, start_ticks, tag, state })
}

fn from_keeper() -> impl Strategy<Value = (FromKeeper, usize)> {
    let held = (name(), pid()).prop_map(|(name, owner)| HeldRecord { name, owner });
    prop_oneof![
        hello().prop_map(|hello| (FromKeeper::Hello(hello), 0)),
        (any::<u32>(), vec(child(), 0..20))
            .prop_map(|(batch, children)| (FromKeeper::Children { batch, children }, 0)),
        (any::<u32>(), vec(held, 0..FDS_MAX)).prop_map(|(batch, held)| {
            let fds = held.len();
            (FromKeeper::Held { batch, held }, fds)
        }),
        Just((FromKeeper::InventoryEnd, 0)),
        any::<(u64, u32, u64)>().prop_map(|(request, pid, start_ticks)| {
            (FromKeeper::Spawned { request, pid, start_ticks }, 0)
        }),
        any::<(u64, u32, u8, i32)>().prop_map(|(request, pid, stage, errno)| {
            let failure = Failure { stage: Stage::from_code(stage), errno };
            (FromKeeper::SpawnFailed { request, pid, failure }, 0)
        }),
        (any::<u32>(), vec(any::<u8>(), 0..=TAG_MAX), status())
            .prop_map(|(pid, tag, status)| (FromKeeper::Exited { pid, tag, status }, 0)),
        any::<i32>().prop_map(|signal| (FromKeeper::Terminate { signal }, 0)),
        any::<u64>().prop_map(|request| (FromKeeper::Synced { request }, 0)),
        Just((FromKeeper::Dismissed, 0)),
        upgrade().prop_map(|upgrade| (FromKeeper::Upgraded(upgrade), 0)),
        any::<u16>().prop_map(|kind| (FromKeeper::NotUnderstood { kind }, 0)),
        (500_u16..).prop_map(|kind| (FromKeeper::Unknown { kind }, 3)),
    ]
}

fn command() -> impl Strategy<Value = Command> {
    let credentials =
        any::<(u32, u32, Vec<u32>)>().prop_map(|(uid, gid, groups)| Credentials { uid, gid, groups });
    let texts = (c_text(), vec(c_text(), 0..20), vec(c_text(), 0..20), c_text());
    let numbers = any::<(bool, Option<u32>, Option<i32>)>();
    let confinement = any::<(Option<i32>, Option<u16>, Vec<u32>, bool, u64)>().prop_map(
        |(nice, io_priority, cpus, no_new_privs, ambient)| Confinement {
            nice,
            io_priority,
            cpus,
            no_new_privs,
            ambient,
        },
    );
    let place = (confinement, c_text());
    (texts, numbers, option::of(credentials), vec(limit(), 0..5), place).prop_map(
        |(
            (program, args, env, cwd),
            (listen_pid, umask, oom_score_adj),
            credentials,
            limits,
            (confinement, cgroup),
        )| Command {
            program,
            args,
            env,
            cwd,
            listen_pid,
            credentials,
            umask,
            oom_score_adj,
            limits,
            confinement,
            cgroup,
        },
    )
}

/// How many bytes version 2 appends: a record and a text, each with its length.
fn appended(command: &Command) -> usize {
    let Confinement { nice, io_priority, cpus, .. } = &command.confinement;
    let options = 1 + nice.map_or(0, |_| 4) + 1 + io_priority.map_or(0, |_| 2);
    let record = options + 4 + 4 * cpus.len() + 1 + 8;
    4 + record + 4 + command.cgroup.count_bytes() + 1
}

#[test]
fn a_command_of_version_1_has_no_order_no_rights_and_no_group() {
    let command = Command { program: c"/bin/true".into(), ..Command::default() };
    let mut bytes = command.encode().unwrap();
    bytes.truncate(bytes.len() - appended(&command));
    let view = CommandView::decode(&bytes).unwrap();
    assert_eq!(view.to_command(), command);
}

proptest! {
    #[test]
    fn orders_come_back_as_they_went((message, fds) in to_keeper()) {
        let frame = message.encode(fds).unwrap();
        prop_assert_eq!(ToKeeper::decode(&frame, fds).unwrap(), message);
    }

    #[test]
    fn reports_come_back_as_they_went((message, fds) in from_keeper()) {
        let frame = message.encode(fds).unwrap();
        prop_assert_eq!(FromKeeper::decode(&frame, fds).unwrap(), message);
    }

    #[test]
    fn commands_come_back_as_they_went(command in command()) {
        let bytes = command.encode().unwrap();
        prop_assert_eq!(CommandView::decode(&bytes).unwrap().to_command(), command);
    }

    #[test]
    fn fields_of_newer_versions_are_skipped(
        (order, order_fds) in to_keeper(),
        (report, report_fds) in from_keeper(),
        command in command(),
        more in vec(any::<u8>(), 0..50),
    ) {
        let mut frame = order.encode(order_fds).unwrap();
        frame.extend(&more);
        prop_assert_eq!(ToKeeper::decode(&frame, order_fds).unwrap(), order);
        let mut frame = report.encode(report_fds).unwrap();
        frame.extend(&more);
        prop_assert_eq!(FromKeeper::decode(&frame, report_fds).unwrap(), report);
        let mut bytes = command.encode().unwrap();
        bytes.extend(&more);
        prop_assert_eq!(CommandView::decode(&bytes).unwrap().to_command(), command);
    }

    #[test]
    fn cut_frames_are_errors(
        (order, order_fds) in to_keeper(),
        (report, report_fds) in from_keeper(),
        command in command(),
        cut in any::<prop::sample::Index>(),
    ) {
        let frame = order.encode(order_fds).unwrap();
        let cut_frame = &frame[..cut.index(frame.len())];
        if !matches!(order, ToKeeper::Unknown { .. }) || cut_frame.len() < 4 {
            prop_assert!(ToKeeper::decode(cut_frame, order_fds).is_err());
        }
        let frame = report.encode(report_fds).unwrap();
        let cut_frame = &frame[..cut.index(frame.len())];
        // A greeting without its last field is one of version 1.
        let whole = match &report {
            FromKeeper::Unknown { .. } => 4,
            FromKeeper::Hello(hello) => {
                let first = FromKeeper::Hello(Hello { upgrade: None, ..hello.clone() });
                first.encode(0).unwrap().len() - 1
            }
            _ => frame.len(),
        };
        if cut_frame.len() < whole {
            prop_assert!(FromKeeper::decode(cut_frame, report_fds).is_err());
        }
        let bytes = command.encode().unwrap();
        let cut = cut.index(bytes.len());
        // What ends before the fields of version 2 is whole for a supervisor of version 1.
        let of_version_1 = bytes.len() - appended(&command);
        prop_assert_eq!(CommandView::decode(&bytes[..cut]).is_ok(), cut == of_version_1);
    }

    #[test]
    fn garbage_never_panics(mut bytes in vec(any::<u8>(), 0..400), kind in 0_u8..16, side in 0_u8..2, fds in 0..4_usize) {
        for round in 0..2 {
            let _ = ToKeeper::decode(&bytes, fds);
            let _ = FromKeeper::decode(&bytes, fds);
            let _ = CommandView::decode(&bytes);
            // The second time behind a valid header.
            if round == 0 && bytes.len() >= 4 {
                bytes[..4].copy_from_slice(&[kind, side, u8::try_from(fds).unwrap(), 0]);
            }
        }
    }

    #[test]
    fn flipped_bits_never_panic((order, fds) in to_keeper(), at in any::<prop::sample::Index>(), flip in 1_u8..) {
        let mut frame = order.encode(fds).unwrap();
        let index = at.index(frame.len());
        frame[index] ^= flip;
        let _ = ToKeeper::decode(&frame, fds);
    }
}

#[test]
fn records_of_newer_versions_are_skipped() {
    // A child record with four more bytes than today's, followed by an ordinary one.
    let child = |pid| ChildRecord { pid, start_ticks: 7, tag: b"tag".to_vec(), state: ChildState::Running };
    let mut w = Writer::default();
    w.u32(1);
    w.list(&[child(1), child(2)], |w, child| {
        w.record(|w| {
            child.write(w)?;
            if child.pid == 1 {
                w.u32(4711);
            }
            Ok(())
        })
    })
    .unwrap();
    let frame = w.frame(0x102, 0).unwrap();
    let expected = FromKeeper::Children { batch: 1, children: vec![child(1), child(2)] };
    assert_eq!(FromKeeper::decode(&frame, 0).unwrap(), expected);
}

#[test]
fn too_much_is_refused_when_it_is_sent() {
    let spawn = |tag: usize, names: usize, command: usize| {
        let spawn = Spawn {
            request: 1,
            tag: vec![0; tag],
            child_fds: 0,
            held: vec!["n".repeat(NAME_MAX); names],
            command: Some(vec![0; command]),
        };
        ToKeeper::Spawn(spawn).encode(names)
    };
    spawn(TAG_MAX, FDS_MAX, 100).unwrap();
    assert_eq!(spawn(TAG_MAX + 1, 0, 0), Err(WireError::TooLong("tag")));
    assert_eq!(spawn(0, FDS_MAX + 1, 0), Err(WireError::Descriptors));
    assert_eq!(spawn(0, 0, FRAME_MAX), Err(WireError::TooLong("frame")));
    let name = "n".repeat(NAME_MAX + 1);
    assert_eq!(ToKeeper::Release { name }.encode(0), Err(WireError::TooLong("name")));
}

#[test]
fn a_frame_with_other_descriptors_than_it_says_is_refused() {
    let hold = ToKeeper::Hold { names: vec!["a".into(), "b".into()], owner: None };
    let frame = hold.encode(2).unwrap();
    assert_eq!(ToKeeper::decode(&frame, 1), Err(WireError::Descriptors));
    // The header agrees with what came, the names do not.
    let frame = hold.encode(1).unwrap();
    assert_eq!(ToKeeper::decode(&frame, 1), Err(WireError::Descriptors));
}

type Sample<T> = (&'static str, T, usize);

/// A message of each kind, with the descriptors that come with it.
fn samples() -> (Vec<Sample<ToKeeper>>, Vec<Sample<FromKeeper>>) {
    let limit = Limit { resource: libc::RLIMIT_NOFILE, soft: 1024, hard: 4096 };
    let status = WaitStatus::from_raw(1792);
    let spawn = Spawn {
        request: 7,
        tag: b"tag".to_vec(),
        child_fds: 3,
        held: vec!["run:1:out".into()],
        command: Some(b"command".to_vec()),
    };
    let death = Death { pid: 9, status, lived_ms: 5, reason: "link failed".into() };
    let hello = Hello {
        version: 1,
        keeper_pid: 10,
        started: 11,
        open_files: limit,
        oom_score_adj: -3,
        deaths: 2,
        last_death: Some(death),
        without_blob: true,
        terminate: Some(15),
        upgrade: None,
    };
    let failed = UpgradeState::Failed { reason: "too slow".into() };
    let upgrade = Upgrade { op: 77, from: "0.1.0".into(), state: failed };
    let child = |pid, state| ChildRecord { pid, start_ticks: 6, tag: b"tag".to_vec(), state };
    let children = vec![
        child(1, ChildState::Starting),
        child(2, ChildState::Running),
        child(3, ChildState::Exited(status)),
    ];
    let held = vec![
        HeldRecord { name: "lock".into(), owner: None },
        HeldRecord { name: "run:1:out".into(), owner: Some(2) },
    ];
    let failure = Failure { stage: Stage::Exec, errno: libc::ENOENT };
    let names = || vec!["a".to_owned(), "b".to_owned()];
    let orders = vec![
        ("welcome", ToKeeper::Welcome { version: 1 }, 0),
        ("taken", ToKeeper::Taken { batch: 4 }, 0),
        ("spawn", ToKeeper::Spawn(spawn), 4),
        ("confirm-keep", ToKeeper::Confirm { pid: 2, fds: HeldFds::Keep }, 0),
        ("confirm-release", ToKeeper::Confirm { pid: 2, fds: HeldFds::Release }, 0),
        ("hold", ToKeeper::Hold { names: names(), owner: Some(2) }, 2),
        ("release", ToKeeper::Release { name: "a".into() }, 0),
        ("release-prefix", ToKeeper::ReleasePrefix { prefix: "run:1:".into() }, 0),
        ("sync", ToKeeper::Sync { request: 8 }, 0),
        ("quit", ToKeeper::Quit, 0),
        ("notify", ToKeeper::Notify { text: "READY=1".into() }, 0),
        ("beat", ToKeeper::Beat, 0),
        ("upgrade", ToKeeper::Upgrade { op: 77, from: "0.1.0".into(), supervisor_only: true }, 1),
        ("go", ToKeeper::Go, 0),
        ("took-over", ToKeeper::TookOver, 0),
    ];
    let reports = vec![
        ("hello", FromKeeper::Hello(hello.clone()), 0),
        ("hello-upgraded", FromKeeper::Hello(Hello { upgrade: Some(upgrade.clone()), ..hello }), 0),
        ("children", FromKeeper::Children { batch: 1, children }, 0),
        ("held", FromKeeper::Held { batch: 2, held }, 2),
        ("inventory-end", FromKeeper::InventoryEnd, 0),
        ("spawned", FromKeeper::Spawned { request: 7, pid: 2, start_ticks: 6 }, 0),
        ("spawn-failed", FromKeeper::SpawnFailed { request: 7, pid: 2, failure }, 0),
        ("exited", FromKeeper::Exited { pid: 3, tag: b"tag".to_vec(), status }, 0),
        ("terminate", FromKeeper::Terminate { signal: 15 }, 0),
        ("synced", FromKeeper::Synced { request: 8 }, 0),
        ("not-understood", FromKeeper::NotUnderstood { kind: 99 }, 0),
        ("leaving", FromKeeper::Leaving, 0),
        ("dismissed", FromKeeper::Dismissed, 0),
        ("upgraded", FromKeeper::Upgraded(upgrade), 0),
    ];
    (orders, reports)
}

/// What the program before leaves for the one that replaces it.
fn own() -> own::Own {
    let (_, reports) = samples();
    let mut own = None;
    for (_, report, _) in reports {
        let FromKeeper::Hello(hello) = report else { continue };
        let child = ChildRecord { pid: 2, start_ticks: 6, tag: b"tag".to_vec(), state: ChildState::Running };
        own = Some(own::Own {
            hello,
            children: vec![child],
            adopted: vec![(2, Some(9)), (3, None)],
            held: vec![(HeldRecord { name: "lock".into(), owner: None }, 12)],
            supervisor: 40,
            supervisor_started: 41,
            link: 5,
            beats: true,
            executable: 4,
            children_oom_score_adj: Some(0),
        });
    }
    own.unwrap()
}

/// What the versions of the frames looked like on the wire, a file for each. A change adds one, and leaves those that are
/// there: `PM_WRITE_FIXTURES=1` writes that of the present version.
#[test]
fn frames_of_older_versions_are_read() {
    use std::fmt::Write as _;
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/keeper");
    let hex = |bytes: &[u8]| {
        bytes.iter().fold(String::new(), |mut text, byte| {
            write!(text, "{byte:02x}").unwrap();
            text
        })
    };
    let (orders, reports) = samples();
    if std::env::var_os("PM_WRITE_FIXTURES").is_some() {
        let mut text = String::new();
        for (name, order, fds) in &orders {
            writeln!(text, "{name} {}", hex(&order.encode(*fds).unwrap())).unwrap();
        }
        for (name, report, fds) in &reports {
            writeln!(text, "{name} {}", hex(&report.encode(*fds).unwrap())).unwrap();
        }
        writeln!(text, "own {}", hex(&own().encode().unwrap())).unwrap();
        std::fs::write(dir.join(format!("frames-{VERSION}.txt")), text).unwrap();
    }
    let mut seen = 0;
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        for line in std::fs::read_to_string(&path).unwrap().lines() {
            let (name, text) = line.split_once(' ').unwrap();
            let frame: Vec<u8> = text
                .as_bytes()
                .chunks(2)
                .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
                .collect();
            let place = format!("{name} in {}", path.display());
            if name == "own" {
                assert_eq!(own::Own::decode(&frame), Ok(own()), "{place}");
            } else if let Some((_, order, fds)) = orders.iter().find(|(known, ..)| *known == name) {
                assert_eq!(ToKeeper::decode(&frame, *fds), Ok(order.clone()), "{place}");
            } else {
                let (_, report, fds) = reports.iter().find(|(known, ..)| *known == name).expect(&place);
                assert_eq!(FromKeeper::decode(&frame, *fds), Ok(report.clone()), "{place}");
            }
            seen += 1;
        }
    }
    assert!(seen >= orders.len() + reports.len(), "a file for the present version is missing");
}
