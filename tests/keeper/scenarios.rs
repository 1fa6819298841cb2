//! What is tried. Each runs in a supervisor of its own keeper; after its death the next one begins at the top again
//! and tells by `deaths` where it is.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use pm::keeper::link::Child;
use pm::keeper::wire::{ChildState, FDS_MAX, FromKeeper, HeldFds, NAME_MAX, Spawn, TAG_MAX, ToKeeper};
use pm::sys::limits::Limit;
use pm::sys::spawn::{Credentials, Failure, Stage};
use pm::sys::{clock, fdpass, pidfd, pipe};

use crate::succession;
use crate::world::{OOM_SCORE_ADJ, World, command, process_exists, read_line, sh, status, until};

type Scenario = fn(&mut World);

/// All of them by name.
pub(crate) const ALL: &[(&str, Scenario)] = &[
    ("failed_start_names_its_stage_and_leaves_nothing", failed_start_names_its_stage_and_leaves_nothing),
    ("child_starts_in_a_clean_state", child_starts_in_a_clean_state),
    ("child_gets_what_was_asked_for", child_gets_what_was_asked_for),
    ("megabytes_of_arguments_and_environment", megabytes_of_arguments_and_environment),
    ("thousand_children_at_once", thousand_children_at_once),
    ("thousand_cycles_leave_no_trace", thousand_cycles_leave_no_trace),
    ("zombie_stays_until_confirmed", zombie_stays_until_confirmed),
    ("orphans_are_reaped_at_once", orphans_are_reaped_at_once),
    ("held_descriptors_follow_their_names", held_descriptors_follow_their_names),
    ("killed_supervisor_leaves_a_complete_inventory", killed_supervisor_leaves_a_complete_inventory),
    ("supervisor_killed_while_it_spawns", supervisor_killed_while_it_spawns),
    ("large_inventory_comes_in_batches", large_inventory_comes_in_batches),
    ("exits_while_nobody_listens_are_told_later", exits_while_nobody_listens_are_told_later),
    ("signals_to_the_keeper_reach_the_supervisor", signals_to_the_keeper_reach_the_supervisor),
    ("quick_deaths_cost_the_blob", quick_deaths_cost_the_blob),
    (FAILING_SUPERVISORS, a_foreground_keeper_ends_what_supervisors_fail_to_end),
    ("broken_frames_cost_the_supervisor_its_life", broken_frames_cost_the_supervisor_its_life),
    ("keeper_stays_small", keeper_stays_small),
    ("successor_of_one_that_dies_after_go", succession::successor_of_one_that_dies_after_go),
    ("upgrade_while_the_old_supervisor_hangs", succession::upgrade_while_the_old_supervisor_hangs),
    (NEXT_KEEPER, the_next_keeper_has_everything_of_one_that_was_killed),
    (LEAVING_KEEPER, a_keeper_that_leaves_settles_what_is_under_way),
];

/// In these the first keeper ends before its supervisor.
pub(crate) const NEXT_KEEPER: &str = "the_next_keeper_has_everything_of_one_that_was_killed";
pub(crate) const LEAVING_KEEPER: &str = "a_keeper_that_leaves_settles_what_is_under_way";

/// Starts three children, the last of which ends while nobody is their keeper, and hands over. True in the supervisor
/// of the next keeper.
fn is_heir(world: &mut World, leave: impl FnOnce(&mut World)) -> bool {
    if !world.inventory.children.is_empty() {
        return true;
    }
    let (ours, theirs) = pipe::pipe_for_output().unwrap();
    let held = world.null.try_clone().unwrap();
    let out = [("run/out", ours.as_fd()), ("run/released", held.as_fd())];
    let null = world.null.try_clone().unwrap();
    let request = world.ask("lives", &sh("echo one; exec sleep 600"), &[null.as_fd(), theirs.as_fd()], &out);
    world.answer(request).unwrap();
    world.link.release("run/released").unwrap();
    let ended = world.start("ended before", &sh("exit 7")).unwrap();
    assert_eq!(world.exit_of(ended).code(), Some(7));
    let fifo = world.dir.join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    world.start("ends between", &sh(&format!("read x <{}; exit 9", fifo.display()))).unwrap();
    world.link.hold("later", None, null.as_fd()).unwrap();
    leave(world);
    world.hand_over(move || std::fs::write(fifo, "go\n").unwrap());
}

fn the_next_keeper_has_everything_of_one_that_was_killed(world: &mut World) {
    let kill = |world: &mut World| {
        world.sync();
        let keeper = pidfd::open(world.inventory.hello.keeper_pid).unwrap();
        pidfd::send_signal(&keeper, libc::SIGKILL).unwrap();
    };
    if is_heir(world, kill) {
        check_estate(world);
    }
}

fn a_keeper_that_leaves_settles_what_is_under_way(world: &mut World) {
    let leave = |world: &mut World| {
        // Not answered yet when the keeper is told.
        world.ask("under way", &sh("exec sleep 600"), &[], &[]);
        let keeper = pidfd::open(world.inventory.hello.keeper_pid).unwrap();
        pidfd::send_signal(&keeper, pm::sys::notify::LEAVE_SIGNAL).unwrap();
        until("the keeper says that it leaves", || {
            // Behind its last word the link is closed.
            matches!(world.link.try_recv(), Ok(Some(FromKeeper::Leaving)))
        });
    };
    if is_heir(world, leave) {
        let child = world.inventory.children.iter().find(|child| child.tag == b"under way");
        assert!(process_exists(child.expect("it was asked for before the keeper left").pid));
        check_estate(world);
    }
}

fn check_estate(world: &mut World) {
    let find = |tag: &str| -> Child {
        let found = world.inventory.children.iter().find(|child| child.tag == tag.as_bytes());
        found.unwrap_or_else(|| panic!("no {tag} in {:?}", world.inventory.children)).clone()
    };
    let (lives, before, between) = (find("lives"), find("ended before"), find("ends between"));
    assert!(matches!(before.state, ChildState::Exited(status) if status.code() == Some(7)), "{before:?}");
    assert_eq!(lives.held, ["run/out"]);
    for name in ["from the start", "later", "run/out"] {
        assert!(world.held(name).is_some(), "{name} is not in {:?}", world.held_names());
    }
    assert!(world.held("run/released").is_none());
    assert!(!world.held_names().iter().any(|name| name.starts_with("pidfd:")), "{:?}", world.held_names());
    assert_eq!(read_line(world.held("run/out").unwrap()), "one");

    // It ended while there was no keeper. How is known where its zombie was still there, or the kernel remembers.
    let status = match between.state {
        ChildState::Exited(status) => status,
        _ => world.exit_of(between.pid),
    };
    assert!([Some(9), None].contains(&status.code()) && status.signal().is_none(), "{status}");
    world.confirm(between.pid, HeldFds::Release);
    world.confirm(before.pid, HeldFds::Release);

    // The children of the one before are followed, and new ones live beside them.
    let own = world.start("own", &sh("exec sleep 600")).unwrap();
    assert_eq!(status_ppid(own), world.inventory.hello.keeper_pid);
    assert_ne!(status_ppid(lives.pid), world.inventory.hello.keeper_pid);
    pidfd::send_signal(pidfd::open(lives.pid).unwrap(), libc::SIGKILL).unwrap();
    let status = world.exit_of(lives.pid);
    assert!([Some(libc::SIGKILL), None].contains(&status.signal()) && status.code().is_none(), "{status}");
    world.confirm(lives.pid, HeldFds::Release);
    world.sync();
}

fn status_ppid(pid: u32) -> u32 {
    status(pid, "PPid").parse().unwrap()
}

fn failed_start_names_its_stage_and_leaves_nothing(world: &mut World) {
    if world.inventory.hello.deaths > 0 {
        assert_eq!(world.inventory.children, []);
        assert_eq!(world.held_names(), ["from the start"]);
        return;
    }
    let file = |name: &str, mode, text: &str| {
        let path = world.dir.join(name);
        let mut file = std::fs::File::options().write(true).create_new(true).mode(mode).open(&path).unwrap();
        file.write_all(text.as_bytes()).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let no_format = file("no-format", 0o700, "neither ELF nor #!");
    let no_interpreter = file("no-interpreter", 0o700, "#!/no/such/interpreter\n");
    let not_executable = file("not-executable", 0o600, "#!/bin/sh\n");
    let closed = world.dir.join("closed");
    std::fs::DirBuilder::new().mode(0o700).create(&closed).unwrap();
    let before = world.keeper_fds();

    let mut cases = vec![
        (command(&["/no/such/program"]), Stage::Exec, libc::ENOENT),
        (command(&[&no_format]), Stage::Exec, libc::ENOEXEC),
        (command(&[&no_interpreter]), Stage::Exec, libc::ENOENT),
        (command(&[&not_executable]), Stage::Exec, libc::EACCES),
        (command(&["/bin/true", &"x".repeat(200_000)]), Stage::Exec, libc::E2BIG),
    ];
    let mut add = |stage, errno, change: &dyn Fn(&mut pm::keeper::wire::Command)| {
        let mut command = command(&["/bin/true"]);
        change(&mut command);
        cases.push((command, stage, errno));
    };
    add(Stage::Chdir, libc::ENOENT, &|command| command.cwd = c"/no/such/directory".into());
    add(Stage::Chdir, libc::EACCES, &|command| {
        // The directory is entered as the user, not as root.
        command.cwd = CString::new(closed.to_str().unwrap()).unwrap();
        command.credentials = Some(Credentials { uid: 65534, gid: 65534, groups: vec![] });
    });
    add(Stage::Credentials, libc::EINVAL, &|command| {
        command.credentials = Some(Credentials { uid: 1, gid: 1, groups: vec![1; 70_000] });
    });
    add(Stage::Limits, libc::EINVAL, &|command| {
        command.limits.push(Limit { resource: 999, soft: 1, hard: 1 });
    });
    add(Stage::Limits, libc::EINVAL, &|command| command.oom_score_adj = Some(4711));
    for (command, stage, errno) in cases {
        let null = world.null.try_clone().unwrap();
        let request = world.ask("never", &command, &[null.as_fd()], &[("never/held", null.as_fd())]);
        let outcome = world.answer(request);
        assert_eq!(outcome, Err(Failure { stage, errno }), "{:?} {:?}", command.program, command.cwd);
    }

    // A command that cannot be read, in the frame and attached.
    let garbage = |command| Spawn { request: 99, tag: vec![], child_fds: 0, held: vec![], command };
    world.link.try_send(&ToKeeper::Spawn(garbage(Some(vec![1, 2, 3]))), &[]).unwrap();
    assert_eq!(world.answer(99).unwrap_err(), Failure { stage: Stage::Request, errno: libc::EINVAL });
    let null = world.null.try_clone().unwrap();
    world.link.try_send(&ToKeeper::Spawn(garbage(None)), &[null.as_fd()]).unwrap();
    assert_eq!(world.answer(99).unwrap_err(), Failure { stage: Stage::Request, errno: libc::EINVAL });

    // Too long a tag is refused on this side, and the link goes on.
    let long = "x".repeat(TAG_MAX + 1);
    let command = command(&["/bin/true"]);
    let spawn = pm::keeper::link::SpawnRequest {
        request: 1,
        tag: long.as_bytes(),
        command: &command,
        fds: &[],
        held: &[],
    };
    world.link.try_spawn(&spawn).unwrap_err();
    world.sync();
    until("descriptors of failed starts are closed", || world.keeper_fds() == before);
    world.die();
}

fn child_starts_in_a_clean_state(world: &mut World) {
    // The keeper itself was started with INT, USR1 and PIPE ignored, a soft limit of 1024, umask 027 and fd 7 open.
    assert_eq!(world.inventory.hello.open_files.soft, 1024);
    assert!(world.inventory.hello.open_files.hard > 1024);
    let own = pm::sys::limits::open_files().unwrap();
    assert_eq!(own.soft, world.inventory.hello.open_files.hard, "the supervisor has all it can get");
    let limits =
        std::fs::read_to_string(format!("/proc/{}/limits", world.inventory.hello.keeper_pid)).unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    assert_eq!(line.split_whitespace().nth(3), Some(own.hard.to_string().as_str()), "so has the keeper");
    assert_eq!(pm::sys::limits::oom_score_adj().unwrap(), OOM_SCORE_ADJ);

    let (pid, text) = world.output("status", &command(&["/bin/cat", "/proc/self/status"]), &[]);
    for key in ["SigBlk", "SigIgn", "SigCgt"] {
        let line = text.lines().find(|line| line.starts_with(key)).unwrap();
        assert_eq!(line.split_whitespace().nth(1), Some("0000000000000000"), "{line}");
    }
    assert!(text.contains("Umask:\t0027"), "{text}");
    assert!(text.contains(&format!("PPid:\t{}\n", world.inventory.hello.keeper_pid)));
    assert_eq!(world.exit_of(pid).code(), Some(0));

    let (pid, text) = world.output("stat", &command(&["/bin/cat", "/proc/self/stat"]), &[]);
    let fields: Vec<&str> = text.split_whitespace().collect();
    let own_pid = pid.to_string();
    assert_eq!(fields[4..6], [&own_pid, &own_pid], "leads its own group and session");

    let (_, text) = world.output("limits", &command(&["/bin/cat", "/proc/self/limits"]), &[]);
    let line = text.lines().find(|line| line.starts_with("Max open files")).unwrap();
    assert_eq!(line.split_whitespace().nth(3), Some("1024"));

    let (_, text) = world.output("oom", &command(&["/bin/cat", "/proc/self/oom_score_adj"]), &[]);
    assert_eq!(text.trim(), world.inventory.hello.oom_score_adj.to_string());
    assert_ne!(world.inventory.hello.oom_score_adj, OOM_SCORE_ADJ);

    // Nothing but the listed descriptors; the last is the directory that ls itself reads.
    let (_, text) = world.output("fds", &command(&["/bin/ls", "-l", "/proc/self/fd"]), &[]);
    let fds: Vec<&str> =
        text.lines().filter_map(|line| line.split(" -> ").next()?.split(' ').next_back()).collect();
    assert_eq!(fds, ["total 0", "0", "1", "2", "3"].map(|fd| fd.trim_start_matches("total ")), "{text}");

    // No terminal, no descriptors at all: still 0 to 2.
    let pid = world.start("none", &sh("exec sleep 60")).unwrap();
    until("sleep runs", || status(pid, "Name") == "sleep");
    for fd in 0..3 {
        let target = std::fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap();
        assert_eq!(target.to_str(), Some("/dev/null"));
    }
    assert_eq!(std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count(), 3);
}

fn child_gets_what_was_asked_for(world: &mut World) {
    // Descriptors by position, also beyond the first ones, each its own.
    let pipes: Vec<(OwnedFd, OwnedFd)> = (0..20).map(|_| pipe::pipe_for_output().unwrap()).collect();
    let more: Vec<BorrowedFd<'_>> = pipes.iter().map(|(_, theirs)| theirs.as_fd()).collect();
    // dash takes descriptors of one digit only, so the others are named through /proc.
    let script = "for n in 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22; do echo this is $n >/proc/self/fd/$n; done";
    world.output("fds", &sh(script), &more);
    for (index, (ours, _)) in pipes.iter().enumerate() {
        assert_eq!(read_line(ours), format!("this is {}", index + 3));
    }

    let mut ask = sh(
        "echo $LISTEN_PID $$ $GREETING; pwd; umask; id -u; id -g; id -G; cat /proc/self/oom_score_adj; ulimit -n; ulimit -c",
    );
    ask.env.push(c"GREETING=hello".into());
    ask.listen_pid = true;
    ask.cwd = c"/usr/bin".into();
    ask.umask = Some(0o077);
    ask.credentials = Some(Credentials { uid: 12345, gid: 23456, groups: vec![777, 888] });
    ask.oom_score_adj = Some(500);
    ask.limits = vec![
        Limit { resource: libc::RLIMIT_NOFILE, soft: 99, hard: 100 },
        Limit { resource: libc::RLIMIT_CORE, soft: 0, hard: 0 },
    ];
    let (pid, text) = world.output("asked", &ask, &[]);
    let expected = format!("{pid} {pid} hello\n/usr/bin\n0077\n12345\n23456\n23456 777 888\n500\n99\n0\n");
    assert_eq!(text, expected);
}

fn megabytes_of_arguments_and_environment(world: &mut World) {
    let mut large = sh("echo ${#1} $#; ulimit -n; env | wc -c");
    large.args.push(c"sh".into());
    large.args.push(CString::new("a".repeat(100_000)).unwrap());
    large.args.extend((0..2_000).map(|n| CString::new(format!("argument {n}")).unwrap()));
    large.env.extend((0..16).map(|n| CString::new(format!("LARGE_{n}={}", "e".repeat(65_536))).unwrap()));
    let (pid, text) = world.output("large", &large, &[]);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[..2], ["100000 2001", "1024"]);
    assert!(lines[2].parse::<usize>().unwrap() > 1_048_576, "{}", lines[2]);
    assert_eq!(world.exit_of(pid).code(), Some(0));
    // More than the kernel takes is its word, not ours.
    large.args.extend((0..100).map(|_| CString::new("b".repeat(100_000)).unwrap()));
    let failure = world.start("too large", &large).unwrap_err();
    assert_eq!(failure, Failure { stage: Stage::Exec, errno: libc::E2BIG });
}

fn thousand_children_at_once(world: &mut World) {
    let sleep = command(&["/bin/sleep", "300"]);
    let begin = clock::now();
    let requests: Vec<u64> = (0..100).map(|n| world.ask(&format!("first {n}"), &sleep, &[], &[])).collect();
    for request in requests {
        world.answer(request).unwrap();
    }
    let hundred = clock::now().since(begin);
    let requests: Vec<u64> =
        (100..1_000).map(|n| world.ask(&format!("more {n}"), &sleep, &[], &[])).collect();
    let pids: BTreeSet<u32> = requests.into_iter().map(|request| world.answer(request).unwrap()).collect();
    let thousand = clock::now().since(begin);
    assert_eq!((pids.len(), world.alive.len()), (900, 1_000));
    // Generous: other tests run beside this one. What an idle machine does is printed.
    assert!(
        hundred < Duration::from_secs(2) && thousand < Duration::from_secs(15),
        "{hundred:?} {thousand:?}"
    );
    let begin = clock::now();
    world.end_all();
    eprintln!(
        "100 spawned in {hundred:?}, 1,000 in {thousand:?}, ended and confirmed in {:?}",
        clock::now().since(begin)
    );
    assert_eq!(world.mail().len(), 0, "nothing is told twice");
}

fn thousand_cycles_leave_no_trace(world: &mut World) {
    let before = world.keeper_fds();
    let (ours, theirs) = pipe::pipe_for_output().unwrap();
    for round in 0..20 {
        let requests: Vec<u64> = (0..50)
            .map(|n| {
                let tag = format!("{round}.{n}");
                let (a, b) = (format!("{tag}/out"), format!("{tag}/channel"));
                let held = [(a.as_str(), ours.as_fd()), (b.as_str(), theirs.as_fd())];
                world.ask(&tag, &command(&["/bin/true"]), &[], &held)
            })
            .collect();
        for request in requests {
            // The answer comes before the exit: `answer` and `exit_of` would wait for ever otherwise.
            let wanted = match world
                .expect(|message| matches!(message, FromKeeper::Spawned { request: r, .. } if *r == request))
            {
                FromKeeper::Spawned { pid, .. } => pid,
                other => panic!("{other:?}"),
            };
            assert_eq!(world.exit_of(wanted).code(), Some(0));
            world.confirm(wanted, HeldFds::Release);
        }
    }
    world.sync();
    assert_eq!(world.keeper_fds(), before);
    assert_eq!(world.mail().len(), 0);
}

fn zombie_stays_until_confirmed(world: &mut World) {
    if world.inventory.hello.deaths == 0 {
        let pid = world.start("seven", &sh("exit 7")).unwrap();
        assert_eq!(world.exit_of(pid).code(), Some(7));
        assert!(status(pid, "State").starts_with('Z'));
        world.confirm(pid, HeldFds::Release);
        world.sync();
        assert!(!process_exists(pid));

        // One that runs is not confirmed away.
        let pid = world.start("killed", &command(&["/bin/sleep", "300"])).unwrap();
        world.link.confirm(pid, HeldFds::Release).unwrap();
        world.link.confirm(4_000_000, HeldFds::Release).unwrap();
        world.sync();
        pidfd::send_signal(pidfd::open(pid).unwrap(), libc::SIGKILL).unwrap();
        let status = world.exit_of(pid);
        assert_eq!((status.code(), status.signal()), (None, Some(libc::SIGKILL)));
        // Told, not confirmed: the next supervisor is told again.
        world.die();
    }
    let [child] = &world.inventory.children[..] else { panic!("{:?}", world.inventory.children) };
    assert_eq!(child.tag, b"killed");
    let ChildState::Exited(killed) = child.state else { panic!("{child:?}") };
    assert_eq!(killed.signal(), Some(libc::SIGKILL));
    assert!(status(child.pid, "State").starts_with('Z'));
}

fn orphans_are_reaped_at_once(world: &mut World) {
    // An unconfirmed zombie is in the way of waitid for any child.
    let zombie = world.start("zombie", &sh("exit 0")).unwrap();
    world.exit_of(zombie);
    for round in 0..5 {
        // Ten that have left their session and their parent, and end soon.
        let script = "for n in 0 1 2 3 4 5 6 7 8 9; do setsid sh -c 'echo $$; exec sleep 0.05' & done";
        let (pid, text) = world.output(&format!("parent {round}"), &sh(script), &[]);
        let orphans: Vec<u32> = text.lines().map(|line| line.parse().unwrap()).collect();
        assert_eq!(orphans.len(), 10);
        world.exit_of(pid);
        until("orphans are reaped", || !orphans.iter().any(|&orphan| process_exists(orphan)));
        assert!(status(pid, "State").starts_with('Z'));
    }
    // They are adopted by the keeper, not by init.
    let (pid, text) = world.output("parent", &sh("sh -c 'sleep 60 >/dev/null 2>&1 & echo $!'"), &[]);
    let orphan: u32 = text.trim().parse().unwrap();
    assert_eq!(status(orphan, "PPid"), world.inventory.hello.keeper_pid.to_string());
    pidfd::send_signal(pidfd::open(orphan).unwrap(), libc::SIGKILL).unwrap();
    until("orphan is reaped", || !process_exists(orphan));
    world.exit_of(pid);
    world.sync();
    assert_eq!(world.mail().len(), 0, "nobody is told of orphans");
}

fn held_descriptors_follow_their_names(world: &mut World) {
    if world.inventory.hello.deaths == 0 {
        assert_eq!(world.held_names(), ["from the start"]);
        let (ours, theirs) = pipe::pipe_for_output().unwrap();
        for name in ["a/1", "a/2", "ab", "b/1", "twice"] {
            world.link.hold(name, None, ours.as_fd()).unwrap();
        }
        world.link.hold("twice", None, theirs.as_fd()).unwrap();
        world.link.release("b/1").unwrap();
        world.link.release("never held").unwrap();
        world.link.try_send(&ToKeeper::ReleasePrefix { prefix: "a/".into() }, &[]).unwrap();

        // Of a confirmed child: released, or kept without an owner.
        for (tag, fds) in [("gone", HeldFds::Release), ("kept", HeldFds::Keep)] {
            let name = format!("{tag}/out");
            let null = world.null.try_clone().unwrap();
            let request = world.ask(tag, &command(&["/bin/true"]), &[], &[(&name, null.as_fd())]);
            let pid = world.answer(request).unwrap();
            world.link.hold(&format!("{tag}/later"), Some(pid), null.as_fd()).unwrap();
            world.exit_of(pid);
            world.confirm(pid, fds);
        }
        // Of a living child: with its owner.
        let request =
            world.ask("lives", &command(&["/bin/sleep", "300"]), &[], &[("lives/out", theirs.as_fd())]);
        let pid = world.answer(request).unwrap();
        world.link.hold("lives/later", Some(pid), ours.as_fd()).unwrap();
        world.link.hold("lives/left", Some(pid), ours.as_fd()).unwrap();
        world.link.release("lives/left").unwrap();
        world.sync();
        world.die();
    }
    let expected = ["ab", "from the start", "kept/later", "kept/out", "lives/later", "lives/out", "twice"];
    assert_eq!(world.held_names(), expected);
    let [child] = &world.inventory.children[..] else { panic!("{:?}", world.inventory.children) };
    assert_eq!((child.tag.as_slice(), child.state), (&b"lives"[..], ChildState::Running));
    assert_eq!(child.held, ["lives/later", "lives/out"]);
    // The name has the descriptor that came last: the writing end.
    let twice = world.held("twice").unwrap().try_clone().unwrap();
    writeln!(std::fs::File::from(twice), "through a held pipe").unwrap();
    assert_eq!(read_line(world.held("ab").unwrap()), "through a held pipe");
}

fn killed_supervisor_leaves_a_complete_inventory(world: &mut World) {
    const LIVES: u32 = 5;
    const EACH: u32 = 10;
    let deaths = world.inventory.hello.deaths;
    if deaths > 0 {
        let death = world.inventory.hello.last_death.as_ref().unwrap();
        assert_eq!(death.status.signal(), Some(libc::SIGKILL));
    }
    let tags: Vec<String> = (0..deaths * EACH).map(|n| format!("app {n}")).collect();
    assert_eq!(world.inventory.children.len(), tags.len());
    for tag in &tags {
        let children = &world.inventory.children;
        let mine: Vec<&Child> = children.iter().filter(|child| child.tag == tag.as_bytes()).collect();
        let [child] = mine[..] else { panic!("{tag}: {mine:?}") };
        // The keeper may not have heard yet that the last ones run.
        assert!(!matches!(child.state, ChildState::Exited(_)), "{child:?}");
        assert_eq!(pm::sys::child::start_ticks(child.pid).unwrap(), child.start_ticks);
        let (stdin, stdout) = (format!("{tag}/stdin"), format!("{tag}/stdout"));
        assert_eq!(child.held, [stdin.clone(), stdout.clone()]);
        // The same process through the same pipes, once in each life.
        let stdin = world.held(&stdin).unwrap().try_clone().unwrap();
        writeln!(std::fs::File::from(stdin), "life {deaths}").unwrap();
        assert_eq!(read_line(world.held(&stdout).unwrap()), format!("{} got life {deaths}", child.pid));
    }
    if deaths == LIVES {
        return;
    }
    let script = "while read line; do echo $$ got $line; done";
    let requests: Vec<u64> = (deaths * EACH..(deaths + 1) * EACH)
        .map(|n| {
            let (reader, stdin) = pipe::stdin_pipe().unwrap();
            let (stdout, writer) = pipe::pipe_for_output().unwrap();
            let tag = format!("app {n}");
            let held = [(format!("{tag}/stdin"), stdin), (format!("{tag}/stdout"), stdout)];
            let held: Vec<(&str, BorrowedFd<'_>)> =
                held.iter().map(|(name, fd)| (name.as_str(), fd.as_fd())).collect();
            world.ask(&tag, &sh(script), &[reader.as_fd(), writer.as_fd()], &held)
        })
        .collect();
    // Each life dies with another share of the answers unread.
    for &request in requests.iter().take((deaths * 3) as usize) {
        world.answer(request).unwrap();
    }
    while world.link.pending() > 0 {
        world.receive();
    }
    world.die();
}

/// What was asked for before SIGKILL struck is there exactly once or not at all, with everything held for it; what was
/// answered is there.
fn supervisor_killed_while_it_spawns(world: &mut World) {
    let deaths = world.inventory.hello.deaths;
    let answered = std::fs::read_to_string(world.dir.join("answered")).unwrap_or_default();
    let mut tags = BTreeSet::new();
    for child in &world.inventory.children {
        let tag = String::from_utf8(child.tag.clone()).unwrap();
        assert_eq!(child.held, [format!("{tag}/a"), format!("{tag}/b")]);
        assert!(child.held.iter().all(|name| world.held(name).is_some()));
        assert!(tags.insert(tag), "twice: {child:?}");
    }
    assert_eq!(world.inventory.held.len(), tags.len() * 2 + 1, "nothing is held for nobody");
    for tag in answered.lines() {
        assert!(tags.contains(tag), "{tag} was answered and is gone");
    }
    if deaths == 6 {
        assert!(!tags.is_empty());
        return;
    }
    let mut log =
        std::fs::File::options().create(true).append(true).open(world.dir.join("answered")).unwrap();
    let delay = deaths * 7 + 5;
    let kill = format!("(sleep 0.{delay:03}; kill -9 {}) &", std::process::id());
    std::process::Command::new("/bin/sh").arg("-c").arg(kill).status().unwrap();
    for n in 0.. {
        let tag = format!("{deaths}.{n}");
        let (a, b) = (format!("{tag}/a"), format!("{tag}/b"));
        let null = world.null.try_clone().unwrap();
        let held = [(a.as_str(), null.as_fd()), (b.as_str(), null.as_fd())];
        let request = world.ask(&tag, &command(&["/bin/sleep", "300"]), &[], &held);
        // Some are asked for in bursts, so that unread requests are in the socket too.
        if n % 4 == 0 {
            world.answer(request).unwrap();
            // In one call, or SIGKILL would strike between tag and newline.
            log.write_all(format!("{tag}\n").as_bytes()).unwrap();
        }
        if n == 300 {
            until("somebody kills me", || false);
        }
    }
}

fn large_inventory_comes_in_batches(world: &mut World) {
    const CHILDREN: usize = 200;
    const FREE: usize = 300;
    let long = |n: usize| format!("{n:04}{}", "n".repeat(NAME_MAX - 4));
    if world.inventory.hello.deaths == 0 {
        let null = world.null.try_clone().unwrap();
        for n in 0..CHILDREN {
            let tag = format!("{n:04}{}", "t".repeat(TAG_MAX - 4));
            world.ask(&tag, &command(&["/bin/sleep", "300"]), &[], &[(&format!("child {n}"), null.as_fd())]);
        }
        for n in 0..FREE {
            world.link.hold(&long(n), None, null.as_fd()).unwrap();
        }
        // As many as fit with one child.
        let names: Vec<String> =
            (0..FDS_MAX).map(|n| format!("x{n:03}{}", "n".repeat(NAME_MAX - 4))).collect();
        let held: Vec<(&str, BorrowedFd<'_>)> =
            names.iter().map(|name| (name.as_str(), null.as_fd())).collect();
        let request = world.ask("many", &command(&["/bin/sleep", "300"]), &[], &held);
        world.answer(request).unwrap();
        world.sync();
        world.die();
    }
    assert_eq!(world.inventory.children.len(), CHILDREN + 1);
    assert_eq!(world.inventory.held.len(), CHILDREN + FREE + FDS_MAX + 1);
    assert!((0..FREE).all(|n| world.held(&long(n)).is_some()));
    let many = world.inventory.children.iter().find(|child| child.tag == b"many").unwrap();
    assert_eq!(many.held.len(), FDS_MAX);
}

fn exits_while_nobody_listens_are_told_later(world: &mut World) {
    const EACH: usize = 600;
    match world.inventory.hello.deaths {
        0 => {
            let requests: Vec<u64> = (0..EACH)
                .map(|n| {
                    let tag = format!("{n:04}{}", "t".repeat(TAG_MAX - 4));
                    world.ask(&tag, &command(&["/bin/sleep", "300"]), &[], &[])
                })
                .collect();
            for request in requests {
                world.answer(request).unwrap();
            }
            // Nothing is read while all of them end: more than the socket and the keeper's queue hold.
            for &pid in &world.alive {
                pidfd::send_signal(pidfd::open(pid).unwrap(), libc::SIGKILL).unwrap();
            }
            let keeper = world.inventory.hello.keeper_pid;
            let children = format!("/proc/{keeper}/task/{keeper}/children");
            until("all have ended", || {
                let text = std::fs::read_to_string(&children).unwrap();
                let ended = text
                    .split_whitespace()
                    .filter(|pid| status(pid.parse().unwrap(), "State").starts_with('Z'));
                ended.count() == EACH
            });
            let ended: BTreeSet<u32> = (0..EACH)
                .map(|_| match world.expect(|message| matches!(message, FromKeeper::Exited { .. })) {
                    FromKeeper::Exited { pid, .. } => pid,
                    other => panic!("{other:?}"),
                })
                .collect();
            assert_eq!(ended.len(), EACH);
            world.die();
        }
        _ => {
            // None was confirmed: all of them are told again.
            let children = &world.inventory.children;
            assert_eq!(children.len(), EACH);
            assert!(
                children.iter().all(
                    |child| matches!(child.state, ChildState::Exited(status) if status.signal() == Some(libc::SIGKILL))
                )
            );
            world.receive();
            assert_eq!(world.mail().len(), 0, "what the inventory says is not said again");
        }
    }
}

fn signals_to_the_keeper_reach_the_supervisor(world: &mut World) {
    let keeper = pidfd::open(world.inventory.hello.keeper_pid).unwrap();
    let terminate = world.inventory.hello.terminate;
    match world.inventory.hello.deaths {
        0 => {
            assert_eq!(terminate, None);
            pidfd::send_signal(&keeper, libc::SIGHUP).unwrap();
            world.expect(|message| *message == FromKeeper::Terminate { signal: libc::SIGHUP });
            // The keeper was started with SIGINT ignored, and so it stays.
            pidfd::send_signal(&keeper, libc::SIGINT).unwrap();
            world.sync();
            assert_eq!(world.mail().len(), 0);
            world.die();
        }
        1 => {
            assert_eq!(terminate, Some(libc::SIGHUP), "no supervisor has finished it");
            pidfd::send_signal(&keeper, libc::SIGTERM).unwrap();
            world.expect(|message| *message == FromKeeper::Terminate { signal: libc::SIGTERM });
            pidfd::send_signal(&keeper, libc::SIGHUP).unwrap();
            world.die();
        }
        2 => {
            assert_eq!(terminate, Some(libc::SIGTERM), "no supervisor has finished it");
            let child = world.start("lives on", &command(&["/bin/sleep", "300"])).unwrap();
            assert!(process_exists(child), "the keeper itself ends nothing");
            world.die();
        }
        _ => assert_eq!(terminate, Some(libc::SIGTERM)),
    }
}

fn quick_deaths_cost_the_blob(world: &mut World) {
    let hello = &world.inventory.hello;
    assert_eq!(hello.without_blob, hello.deaths >= 5);
    if hello.deaths < 5 {
        // Ends without saying Quit: a death like any other.
        std::process::exit(3);
    }
    let death = hello.last_death.clone().unwrap();
    assert_eq!(death.status.code(), Some(3));
    assert!(death.lived_ms < 2_000);
    // Restarted at once, then after 100, 200, 400 and 800 ms.
    let age = clock::now().since(clock::Moment::from_nanos(hello.started));
    assert!(age > Duration::from_millis(1_500), "{age:?}");
}

/// Its keeper is one in the foreground, and does not end with 0.
pub(crate) const FAILING_SUPERVISORS: &str = "a_foreground_keeper_ends_what_supervisors_fail_to_end";

fn a_foreground_keeper_ends_what_supervisors_fail_to_end(world: &mut World) {
    let hello = world.inventory.hello.clone();
    match hello.deaths {
        0 => {
            let (writer, reader) = pipe::ready_pipe().unwrap();
            // One that obeys, and one that does not and has put a process of its own into a session of its own.
            let obeys = world.start("obeys", &command(&["/bin/sleep", "300"])).unwrap();
            let script = "trap '' TERM; setsid sleep 300 & echo $!; while :; do sleep 1; done";
            let null = world.null.try_clone().unwrap();
            let fds = [null.as_fd(), writer.as_fd(), null.as_fd()];
            let request = world.ask("does not", &sh(script), &fds, &[]);
            let stubborn = world.answer(request).unwrap();
            let grandchild = read_line(&reader);
            std::fs::write(world.dir.join("pids"), format!("{obeys} {stubborn} {grandchild}")).unwrap();
            // Not counted: nobody has asked for an end.
            std::process::exit(3);
        }
        1 => {
            let keeper = pidfd::open(hello.keeper_pid).unwrap();
            pidfd::send_signal(&keeper, libc::SIGHUP).unwrap();
            world.expect(|message| *message == FromKeeper::Terminate { signal: libc::SIGHUP });
            pidfd::send_signal(&keeper, libc::SIGTERM).unwrap();
            world.expect(|message| *message == FromKeeper::Terminate { signal: libc::SIGTERM });
            std::process::exit(3);
        }
        deaths => {
            assert!(deaths < 9, "the keeper goes on for ever");
            for pid in pids_of_failed_end(&world.dir) {
                assert!(process_exists(pid), "too early");
            }
            std::fs::write(world.dir.join("deaths"), deaths.to_string()).unwrap();
            std::process::exit(3);
        }
    }
}

fn pids_of_failed_end(dir: &Path) -> Vec<u32> {
    let pids = std::fs::read_to_string(dir.join("pids")).unwrap();
    pids.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

/// How that went, seen from outside.
pub(crate) fn check_failed_end(dir: &Path, code: Option<i32>) -> Result<(), String> {
    let deaths = std::fs::read_to_string(dir.join("deaths")).unwrap_or_default();
    let result = std::fs::read_to_string(dir.join("result")).unwrap_or_default();
    // The second was told, and five more were tried.
    if (code, deaths.as_str(), result.as_str()) != (Some(1), "6", "") {
        return Err(format!("exit code {code:?}, {deaths} deaths, {result:?}"));
    }
    for pid in pids_of_failed_end(dir) {
        if process_exists(pid) && !status(pid, "State").starts_with('Z') {
            return Err(format!("process {pid} was left"));
        }
    }
    Ok(())
}

fn broken_frames_cost_the_supervisor_its_life(world: &mut World) {
    let hello = world.inventory.hello.clone();
    let reason = hello.last_death.map(|death| death.reason).unwrap_or_default();
    let null = world.null.try_clone().unwrap();
    if hello.deaths == 0 {
        // An unknown frame is no broken frame: it is answered, and its descriptors are closed.
        let before = world.keeper_fds();
        world.link.try_send(&ToKeeper::Unknown { kind: 4711 }, &[null.as_fd()]).unwrap();
        world.expect(|message| *message == FromKeeper::NotUnderstood { kind: 4711 });
        world.sync();
        assert_eq!(world.keeper_fds(), before);
        world.start("survivor", &command(&["/bin/sleep", "300"])).unwrap();
    }
    assert_eq!(hello.deaths == 0, world.inventory.children.is_empty());
    let (bytes, fds, expected) = match hello.deaths {
        0 => (vec![3, 0, 0, 0, 1], 0, ""),
        1 => (vec![9; 40_000], 0, "bad frame: frame is cut short"),
        2 => (vec![5, 0, 80, 0], 80, "link failed: frame was cut"),
        _ => {
            assert_eq!(reason, "link failed: descriptors were lost");
            return;
        }
    };
    assert_eq!(reason, expected);
    fdpass::send(&world.link, &bytes, &vec![null.as_fd(); fds]).unwrap();
    // Killed from outside: waiting for anything else would be the failure.
    world.expect(|_| false);
}

fn keeper_stays_small(world: &mut World) {
    assert_eq!(world.keeper_status("Threads"), "1");
    let keeper = world.inventory.hello.keeper_pid;
    for n in 0..100 {
        let null = world.null.try_clone().unwrap();
        let names: Vec<String> = (0..5).map(|k| format!("{n}/{k}")).collect();
        let held: Vec<(&str, BorrowedFd<'_>)> =
            names.iter().map(|name| (name.as_str(), null.as_fd())).collect();
        let mut sleep = command(&["/bin/sleep", "300"]);
        sleep.env.extend((0..16).map(|n| CString::new(format!("LARGE_{n}={}", "e".repeat(65_536))).unwrap()));
        let request = world.ask(&format!("{n}"), &sleep, &[], &held);
        world.answer(request).unwrap();
    }
    let text = std::fs::read_to_string(format!("/proc/{keeper}/smaps_rollup")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("Private_Dirty:")).unwrap();
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().unwrap();
    eprintln!("keeper of 100 children with 500 descriptors: {kib} KiB private dirty");
    // A debug build has more relocations.
    assert!(kib <= if cfg!(debug_assertions) { 4096 } else { 1024 }, "{kib} KiB");
}
