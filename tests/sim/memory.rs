//! Instances that cross their memory limit: beside everything else that may be going on, and at every instant of it.

use std::sync::Arc;
use std::time::Duration;

use pm::model::exit::ExitReason;
use pm::model::spec::AppSpec;
use pm::policy::news::What;
use pm::policy::vocabulary::{Command, StepKind, Verb};

use crate::behaviour::{Behaviour, millis, secs};
use crate::specs::{LIMIT, Like, name, spec};
use crate::world::World;

fn limited(like: Like, instances: u32) -> AppSpec {
    AppSpec { max_memory: Some(LIMIT), ..spec("api", like, instances) }
}

fn world_of(spec: AppSpec) -> World {
    let mut world = World::new(1);
    world.verbose = true;
    world.start(spec);
    world.run_for(secs(3));
    world.expect_no_breach();
    world
}

/// How many of these are still there.
fn left(world: &World, old: &[u32]) -> usize {
    world.pids("api").iter().filter(|pid| old.contains(pid)).count()
}

#[test]
fn an_instance_over_its_limit_is_replaced_through_the_gate() {
    for like in [Like::Workers, Like::PoliteWorkers, Like::Inheriting, Like::ProbedWorkers] {
        let mut world = world_of(limited(like, 3));
        let old = world.pids("api");
        world.news.clear();
        world.fatten("api", 1);
        world.run_for(secs(6));
        world.check("api", "0: online v1 | 1: online v1 | 2: online v1 | started");
        assert_eq!(left(&world, &old), 2, "{like:?}");
        assert_eq!(world.last_exit("api", 1), Some(ExitReason::Memory));
        assert_eq!(world.restarts("api"), [0, 1, 0]);
        assert_eq!(world.unstable("api"), [0, 0, 0], "no crash");
        let said: Vec<_> = world.news.iter().map(|news| &news.what).collect();
        let at = |wanted: &dyn Fn(&What) -> bool| said.iter().position(|what| wanted(what)).unwrap();
        let exceeded = at(&|what| matches!(what, What::MemoryExceeded { limit: LIMIT, .. }));
        let launched = at(&|what| matches!(what, What::Step(StepKind::Launching)));
        let (came, went) = (at(&|what| *what == What::InRotation), at(&|what| *what == What::OutOfRotation));
        assert!(exceeded < launched && launched < came && came <= went, "{said:?}");
    }
}

#[test]
fn two_samples_are_not_enough() {
    let mut world = world_of(limited(Like::Workers, 1));
    let old = world.pids("api");
    for _ in 0..20 {
        world.fatten("api", 0);
        world.run_for(secs(2));
        world.cure("api", 0);
        world.run_for(secs(1));
    }
    assert_eq!((world.pids("api"), world.own_reloads), (old, 0));
    world.expect_no_breach();
}

#[test]
fn all_of_them_are_replaced_one_after_the_other() {
    for (like, floor) in [(Like::Workers, 4), (Like::Plain, 3)] {
        let mut world = world_of(limited(like, 4));
        let old = world.pids("api");
        for slot in 0..4 {
            world.fatten("api", slot);
        }
        let mut fewest = 4;
        for _ in 0..3000 {
            world.run_for(millis(10));
            fewest = fewest.min(world.online_count("api"));
        }
        world.expect_no_breach();
        assert_eq!((left(&world, &old), world.own_reloads), (0, 4), "{like:?}");
        assert_eq!(fewest, floor, "{like:?}: side by side nobody is missing, in place one at a time");
    }
}

/// In place the old one goes first: not while nobody else serves.
#[test]
fn in_place_the_last_one_that_serves_stays() {
    let mut world = world_of(limited(Like::Plain, 2));
    world.deploy("api", Behaviour::crashes_after(millis(10)));
    world.crash("api", 1, &ExitReason::Code(1));
    world.run_for(secs(1));
    let old = world.pids("api");
    world.fatten("api", 0);
    world.run_for(secs(60));
    assert!(world.pids("api").contains(&old[0]) && world.own_reloads == 0, "{:?}", world.picture("api"));
    world.deploy("api", Behaviour::default());
    world.run_for(secs(60));
    world.expect_no_breach();
    assert_eq!(left(&world, &old[..1]), 0, "now somebody else does");
    // An app of one instance has nobody else.
    let mut world = world_of(limited(Like::Plain, 1));
    let old = world.pids("api");
    world.fatten("api", 0);
    world.run_for(secs(6));
    world.expect_no_breach();
    assert_eq!((left(&world, &old), world.last_exit("api", 0)), (0, Some(ExitReason::Memory)));
}

#[test]
fn a_successor_that_is_not_ready_leaves_the_old_one_and_is_tried_ever_more_rarely() {
    let mut world = world_of(limited(Like::Workers, 2));
    world.run_for(secs(120));
    let old = world.pids("api");
    world.deploy("api", Behaviour::never_ready());
    world.fatten("api", 0);
    world.run_for(secs(600));
    world.expect_no_breach();
    assert_eq!(world.pids("api"), old);
    // At 0 s, and then 15, 30, 60, 120 and 240 s apart.
    assert_eq!(world.own_reloads, 6);
    world.check("api", "0: online v1 | 1: online v1 | started");
}

#[test]
fn a_limit_that_does_not_fit_does_not_loop_and_a_slow_leak_does_not_wait() {
    let mut world = world_of(limited(Like::Workers, 1));
    world.deploy("api", Behaviour::fat_after(millis(500)));
    world.fatten("api", 0);
    world.run_for(secs(3600));
    // After 15, 45, 105, 225, 465 and 945 s, then every 10 minutes.
    assert_eq!(world.own_reloads, 11, "in an hour");
    let mut world = world_of(limited(Like::Workers, 1));
    world.deploy("api", Behaviour::fat_after(secs(90)));
    world.fatten("api", 0);
    world.run_for(secs(3600));
    world.expect_no_breach();
    assert!((37..=40).contains(&world.own_reloads), "{} of every 93 s in an hour", world.own_reloads);
    assert_eq!(world.unstable("api"), [0]);
}

#[test]
fn another_limit_holds_at_once_and_restarts_nothing() {
    let mut world = world_of(spec("api", Like::Workers, 2));
    let old = world.pids("api");
    for slot in 0..2 {
        world.fatten("api", slot);
    }
    let set = |world: &mut World, limit: Option<u64>, verb: Option<Verb>| {
        let spec = AppSpec { max_memory: limit, ..spec("api", Like::Workers, 2) };
        match verb {
            Some(verb) => world.act_on(verb, "api", None, Some(spec)),
            None => drop(world.ask(Command::Start { specs: vec![Arc::new(spec)] })),
        }
    };
    // Far above what they use: measured, and nothing follows.
    set(&mut world, Some(LIMIT * 10), None);
    world.run_for(secs(30));
    world.check("api", "0: online v1 | 1: online v1 | updated");
    assert_eq!(world.pids("api"), old);
    set(&mut world, Some(LIMIT), None);
    world.run_for(secs(30));
    world.check("api", "0: online v1 | 1: online v1 | updated");
    assert_eq!(left(&world, &old), 0);
    // A pause that another limit had earned is over with it.
    world.deploy("api", Behaviour::fat_after(millis(100)));
    world.fatten("api", 0);
    world.run_for(secs(200));
    let before = world.pids("api");
    set(&mut world, Some(LIMIT - 1), None);
    world.run_for(secs(5));
    assert!(left(&world, &before) < 2, "not when the pause of minutes is over");
    // None at all: nobody is measured any more.
    set(&mut world, None, None);
    world.run_for(secs(30));
    let (old, own) = (world.pids("api"), world.own_reloads);
    world.run_for(secs(1200));
    world.expect_no_breach();
    assert_eq!((world.pids("api"), world.own_reloads), (old, own));
}

/// A replacement gives its slot a release of its own; another limit has to reach the others too.
#[test]
fn another_limit_reaches_instances_that_were_not_replaced_when_another_one_was() {
    let mut world = world_of(limited(Like::Workers, 3));
    world.fatten("api", 0);
    world.run_for(secs(20));
    let old = world.pids("api");
    assert_eq!(world.own_reloads, 1);
    for slot in 0..3 {
        world.fatten("api", slot);
    }
    let spec = AppSpec { max_memory: Some(LIMIT * 10), ..limited(Like::Workers, 3) };
    world.ask(Command::Start { specs: vec![Arc::new(spec)] });
    world.run_for(secs(60));
    world.check("api", "0: online v1 | 1: online v1 | 2: online v1 | updated");
    assert_eq!((world.pids("api"), world.own_reloads), (old.clone(), 1));
    world.supervisor_dies();
    world.run_for(secs(60));
    assert_eq!(world.pids("api"), old, "and the next supervisor knows");
    world.ask(Command::Start { specs: vec![Arc::new(limited(Like::Workers, 3))] });
    world.run_for(secs(60));
    world.expect_no_breach();
    assert_eq!(left(&world, &old), 0);
}

/// What somebody asks for, and what happens to the daemon, at every instant of a replacement.
#[test]
fn at_every_instant_of_a_replacement_stop_delete_reload_and_death_do_what_they_do_without_it() {
    type Deed = fn(&mut World);
    let deeds: [(&str, Deed, &str, usize); 6] = [
        ("reload", |world| world.act(Verb::Reload, "api"), "0: online v1 | 1: online v1", 0),
        ("stop", |world| world.act(Verb::Stop, "api"), "0: stopped | 1: stopped", 0),
        ("delete", |world| world.act(Verb::Delete, "api"), "unknown", 0),
        ("restart", |world| world.act(Verb::Restart, "api"), "0: online v1 | 1: online v1", 0),
        ("death", World::supervisor_dies, "0: online v1 | 1: online v1", 1),
        (
            "crash of the other",
            |world| world.crash("api", 1, &ExitReason::Code(1)),
            "0: online v1 | 1: online v1",
            0,
        ),
    ];
    for like in [Like::Workers, Like::Plain] {
        for (what, deed, picture, stay) in deeds {
            for instant in 0..50_u64 {
                let mut world = world_of(AppSpec {
                    stop: pm::model::spec::StopRules { timeout: secs(2), ..Default::default() },
                    ..limited(like, 2)
                });
                // A thousand stories are not told.
                (world.remembers, world.verbose) = (true, false);
                let old = world.pids("api");
                world.fatten("api", 0);
                // The samples, then the replacement, 15 ms for 15 ms.
                world.run_for(if instant < 8 { millis(instant * 500) } else { millis(2860 + instant * 15) });
                deed(&mut world);
                world.run_for(secs(40));
                world.expect_no_breach();
                assert_eq!(world.picture("api"), picture, "{like:?}, {what} at {instant}");
                assert_eq!(left(&world, &old), stay, "{like:?}, {what} at {instant}");
                assert!(world.own_reloads <= 1, "{like:?}, {what} at {instant}");
            }
        }
    }
}

/// The reload replaces it anyway: there is nothing left to do.
#[test]
fn a_reload_that_is_going_on_is_not_disturbed_and_makes_the_trigger_moot() {
    let mut world = world_of(limited(Like::Workers, 2));
    world.deploy("api", Behaviour { ready_after: Some(secs(4)), ..Behaviour::default() });
    world.act(Verb::Reload, "api");
    world.fatten("api", 1);
    world.run_for(secs(60));
    world.check("api", "0: online v2 | 1: online v2 | reloaded");
    assert_eq!((world.restarts("api"), world.own_reloads), (vec![1, 1], 0));
    // One that fails leaves it where it is; then it is its turn.
    let mut world = world_of(limited(Like::Workers, 2));
    world.deploy("api", Behaviour { ready_after: Some(secs(20)), ..Behaviour::default() });
    world.act(Verb::Reload, "api");
    world.fatten("api", 1);
    world.run_for(secs(4));
    world.mend_files();
    world.run_for(secs(10));
    assert!(world.last().starts_with("failed: 0 not ready in time"), "{}", world.last());
    assert_eq!((world.own_reloads, world.last_exit("api", 1)), (1, Some(ExitReason::Memory)));
    world.expect_no_breach();
}

#[test]
fn the_next_supervisor_measures_on_and_knows_why_an_instance_goes() {
    // Dies with two samples counted: the third is the next one's.
    let mut world = world_of(limited(Like::Workers, 2));
    let old = world.pids("api");
    world.fatten("api", 0);
    world.run_for(millis(2500));
    world.supervisor_dies();
    world.run_for(secs(5));
    assert_eq!(left(&world, &old), 1);
    assert_eq!(world.last_exit("api", 0), Some(ExitReason::Memory));
    // Dies while the successor is on its way.
    let mut world = world_of(limited(Like::PoliteWorkers, 2));
    world.deploy("api", Behaviour { ready_after: Some(secs(2)), ..Behaviour::default() });
    world.fatten("api", 0);
    world.run_for(secs(4));
    assert_eq!(world.own_reloads, 1);
    world.supervisor_dies();
    world.run_for(secs(10));
    world.check("api", "0: online v2 | 1: online v1 | started");
    assert_eq!(world.last_exit("api", 0), Some(ExitReason::Memory));
    // A pause is one also for the next supervisor.
    world.deploy("api", Behaviour::fat_after(Duration::ZERO));
    world.fatten("api", 0);
    world.run_for(secs(60));
    let spawns = world.spawns;
    world.supervisor_dies();
    world.run_for(secs(10));
    world.expect_no_breach();
    assert_eq!(world.spawns, spawns, "{:?}", world.files.get(&name("api")).map(|files| files.0));
}

#[test]
fn without_autorestart_it_is_only_shown() {
    let mut one_shot = limited(Like::Workers, 1);
    one_shot.restart.autorestart = false;
    let mut world = world_of(one_shot);
    let old = world.pids("api");
    world.fatten("api", 0);
    world.run_for(secs(60));
    world.expect_no_breach();
    assert_eq!((world.pids("api"), world.over_memory("api")), (old, vec![Some(LIMIT * 2)]));
}
