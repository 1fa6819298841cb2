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
        (500_u16..).prop_map(|kind| (ToKeeper::Unknown { kind }, 3)),
    ]
}

fn hello() -> impl Strategy<Value = Hello> {
    let death = (any::<u32>(), status(), any::<u64>(), ".{0,50}")
        .prop_map(|(pid, status, lived_ms, reason)| Death { pid, status, lived_ms, reason });
    let numbers = any::<(u16, u32, u64, u64, u64, i32, u32)>();
    (numbers, option::of(death), any::<bool>(), option::of(1..65)).prop_map(
        |(numbers, last_death, without_blob, terminate)| {
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
            }
        },
    )
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
        any::<u16>().prop_map(|kind| (FromKeeper::NotUnderstood { kind }, 0)),
        (500_u16..).prop_map(|kind| (FromKeeper::Unknown { kind }, 3)),
    ]
}

fn command() -> impl Strategy<Value = Command> {
    let credentials =
        any::<(u32, u32, Vec<u32>)>().prop_map(|(uid, gid, groups)| Credentials { uid, gid, groups });
    let texts = (c_text(), vec(c_text(), 0..20), vec(c_text(), 0..20), c_text());
    (texts, any::<(bool, Option<u32>, Option<i32>)>(), option::of(credentials), vec(limit(), 0..5)).prop_map(
        |((program, args, env, cwd), (listen_pid, umask, oom_score_adj), credentials, limits)| Command {
            program,
            args,
            env,
            cwd,
            listen_pid,
            credentials,
            umask,
            oom_score_adj,
            limits,
        },
    )
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
        if !matches!(report, FromKeeper::Unknown { .. }) || cut_frame.len() < 4 {
            prop_assert!(FromKeeper::decode(cut_frame, report_fds).is_err());
        }
        let bytes = command.encode().unwrap();
        prop_assert!(CommandView::decode(&bytes[..cut.index(bytes.len())]).is_err());
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
