//! Upgrades whose supervisors end, or do not, at the wrong moment. Each is an upgrade to this same program.

use std::os::fd::AsFd;
use std::process::Command;
use std::time::Duration;

use pm::keeper::wire::{FromKeeper, ToKeeper, UpgradeState};
use pm::sys::{exec, pidfd, poll};

use crate::world::{World, process_exists, status, until};

/// The old supervisor says Go and is gone before the keeper looks: the new one is nobody else, and goes on.
pub(crate) fn successor_of_one_that_dies_after_go(world: &mut World) {
    let hello = world.inventory.hello.clone();
    match hello.upgrade.as_ref().map(|upgrade| (upgrade.op, &upgrade.state)) {
        None => {
            prepare(world, 1);
            go_and_die(world, None);
        }
        Some((1, UpgradeState::Pending)) => {
            assert_eq!((hello.deaths, hello.last_death), (0, None), "it had said that it goes");
            world.link.try_send(&ToKeeper::TookOver, &[]).unwrap();
            told(world, 1, &UpgradeState::Supervisor);
            // This time there will be none to go on.
            let prepared = prepare(world, 2);
            go_and_die(world, Some(prepared));
        }
        Some((2, UpgradeState::Failed { .. })) if hello.deaths == 0 => world.die(),
        other => {
            let (op, state) = other.unwrap();
            assert!(
                op == 2 && matches!(state, UpgradeState::Failed { .. }) && hello.deaths == 1,
                "{hello:?}"
            );
        }
    }
}

/// An old supervisor that does not end is killed, also when the one after it has been replaced meanwhile.
pub(crate) fn upgrade_while_the_old_supervisor_hangs(world: &mut World) {
    let first = world.dir.join("first");
    match world.inventory.hello.upgrade.as_ref().map(|upgrade| upgrade.op) {
        None => {
            std::fs::write(&first, std::process::id().to_string()).unwrap();
            prepare(world, 1);
            world.link.go().unwrap();
            // Does as it is not told, as long as there is a keeper.
            while std::os::unix::process::parent_id() == world.inventory.hello.keeper_pid {
                poll::wait(&[], Some(Duration::from_millis(20))).unwrap();
            }
            std::process::exit(1);
        }
        Some(1) => {
            world.link.try_send(&ToKeeper::TookOver, &[]).unwrap();
            prepare(world, 2);
            world.link.go().unwrap();
            world.expect(|message| *message == FromKeeper::Dismissed);
            std::process::exit(0);
        }
        _ if world.inventory.hello.deaths == 0 => {
            world.link.try_send(&ToKeeper::TookOver, &[]).unwrap();
            let first = std::fs::read_to_string(first).unwrap().parse().unwrap();
            until("the first supervisor is gone", || !process_exists(first));
            told(world, 2, &UpgradeState::Supervisor);
            world.die();
        }
        // Nothing was in the way of this one.
        _ => {}
    }
}

/// Returns the pid of the supervisor that waits for its Hello.
fn prepare(world: &mut World, op: u64) -> u32 {
    let keeper = world.inventory.hello.keeper_pid;
    let before = children(keeper);
    let program = exec::own_executable().unwrap();
    let wish = ToKeeper::Upgrade { op, from: "this one".to_owned(), supervisor_only: true };
    world.link.try_send(&wish, &[program.as_fd()]).unwrap();
    told(world, op, &UpgradeState::Pending);
    children(keeper).into_iter().find(|pid| !before.contains(pid)).unwrap()
}

fn told(world: &mut World, op: u64, state: &UpgradeState) {
    world.expect(|message| {
        matches!(message, FromKeeper::Upgraded(upgrade) if upgrade.op == op && upgrade.state == *state)
    });
}

fn children(keeper: u32) -> Vec<u32> {
    let text = std::fs::read_to_string(format!("/proc/{keeper}/task/{keeper}/children")).unwrap();
    text.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

/// Says Go and dies while the keeper is stopped, which then finds both at once; before that, `other` dies.
#[expect(clippy::zombie_processes, reason = "it outlives this process, and is the keeper's to reap")]
fn go_and_die(world: &mut World, other: Option<u32>) -> ! {
    const GO_ON: &str =
        r#"until grep -q "^State:.Z" /proc/$0/status; do sleep 0.01; done; exec kill -CONT "$1""#;
    let keeper = world.inventory.hello.keeper_pid;
    let pids = [std::process::id(), keeper].map(|pid| pid.to_string());
    Command::new("/bin/sh").args(["-c", GO_ON]).args(pids).spawn().unwrap();
    pidfd::send_signal(pidfd::open(keeper).unwrap(), libc::SIGSTOP).unwrap();
    until("the keeper is stopped", || status(keeper, "State").starts_with('T'));
    if let Some(other) = other {
        pidfd::send_signal(pidfd::open(other).unwrap(), libc::SIGKILL).unwrap();
        until("it is dead", || status(other, "State").starts_with('Z'));
    }
    world.link.go().unwrap();
    assert_eq!(world.link.pending(), 0);
    world.die()
}
