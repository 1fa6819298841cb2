//! What people suffer from elsewhere, at the level at which ten thousand tries cost a second (`docs/pains.md`).

use pm::model::exit::ExitReason;
use pm::model::signal::Signal;
use pm::policy::news::What;
use pm::policy::vocabulary::Verb;

use crate::behaviour::{Behaviour, millis, secs};
use crate::rng::Rng;
use crate::specs::{Like, name, spec};
use crate::world::{Unkind, World};

/// One race: an app that dies when it likes, and somebody who stops or deletes it at any moment. Late and doubled news
/// of earlier generations come in between. Says whether a restart was pending when it was asked for.
fn race(seed: u64) -> Result<bool, String> {
    let mut rng = Rng::new(seed);
    let mut world = World::new(rng.next());
    world.unkind = Unkind { doubles: 30, save_delay: *rng.pick(&[0, 3, 50]), ..Unkind::default() };
    let mut app =
        spec("job", *rng.pick(&[Like::Plain, Like::NodeFork]), 1 + u32::try_from(rng.below(2)).unwrap());
    app.restart.restart_delay = *rng.pick(&[None, Some(millis(1)), Some(millis(30)), Some(secs(1))]);
    let life = millis(rng.below(120));
    world.files.insert(
        name("job"),
        (1, Behaviour { leftovers_for: millis(rng.below(50)), ..Behaviour::crashes_after(life) }),
    );
    world.start(app);
    world.run_for(millis(rng.below(400)));
    if rng.chance(50) {
        world.crash("job", 0, &ExitReason::Signal(Signal::KILL));
        world.run_for(millis(rng.below(4)));
    }
    let pending = world.picture("job").contains("waiting restart");
    let (verb, wanted) = *rng.pick(&[(Verb::Stop, "0: stopped"), (Verb::Delete, "")]);
    world.act(verb, "job");
    world.run_for(secs(15));
    let spawns = world.spawns;
    let picture = world.picture("job");
    world.run_for(secs(60));
    let story = |what: &str| Err::<bool, _>(format!("seed {seed}: {what}; {picture:?}, {}", world.last()));
    if let Some(broken) = &world.broken {
        return story(&format!("{broken:?}"));
    }
    if !world.pids("job").is_empty() || world.spawns != spawns {
        return story("something was started after it");
    }
    if !picture.starts_with(wanted) || picture.contains("waiting") || picture.contains("online") {
        return story("it is not what was asked for");
    }
    Ok(pending)
}

#[test]
fn pain_21_stop_and_delete_win_ten_thousand_races_against_exits_and_pending_restarts() {
    let (mut pending, mut failures) = (0, Vec::new());
    for seed in 0..10_000 {
        match race(seed) {
            Ok(was_pending) => pending += u32::from(was_pending),
            Err(why) => failures.push(why),
        }
    }
    assert!(failures.is_empty(), "{} failed: {:#?}", failures.len(), &failures[..failures.len().min(5)]);
    assert!(pending > 2_000, "a restart was pending in {pending} of them only");
}

#[test]
fn pain_25_an_app_that_crashes_every_2_s_ends_in_backoff_and_not_in_40_000_restarts() {
    let mut world = World::new(1);
    world.files.insert(name("job"), (1, Behaviour::crashes_after(secs(2))));
    world.start(spec("job", Like::Plain, 1));
    world.run_for(secs(24 * 3600));
    // 2 s of life and 15 s of pause, ± 10 %.
    let restarts = world.restarts("job")[0];
    assert!((4_800..5_500).contains(&restarts), "{restarts} in a day");
    assert!(
        !world.picture("job").contains("errored"),
        "it lives longer than min_uptime: {}",
        world.picture("job")
    );
    // Health forgives.
    world.deploy("job", Behaviour::crashes_after(secs(40)));
    world.run_for(secs(70));
    let before = world.spawns;
    world.run_for(secs(200));
    assert!(world.spawns - before >= 4, "every restart at once: {}", world.spawns - before);
}

#[test]
fn pain_26_slots_are_0_to_n_minus_1_over_crash_reload_scale_and_reboot() {
    let mut world = World::with_app("api", Like::Workers, 3);
    let slots = |world: &World| world.picture("api");
    world.crash("api", 0, &ExitReason::Code(1));
    world.run_for(secs(3));
    assert_eq!(slots(&world), "0: online v1 | 1: online v1 | 2: online v1");
    world.ask(pm::policy::vocabulary::Command::Scale { app: name("api"), instances: 2 });
    world.run_for(secs(15));
    assert_eq!(slots(&world), "0: online v1 | 1: online v1", "the highest goes");
    world.act(Verb::Reload, "api");
    world.run_for(secs(15));
    world.reboot();
    world.run_for(secs(5));
    assert_eq!(slots(&world), "0: online v1 | 1: online v1");
}

#[test]
fn pain_26_the_draining_one_is_told_in_the_same_instant_in_which_the_new_one_is_promoted() {
    let mut world = World::with_app("api", Like::Workers, 2);
    world.news.clear();
    world.act(Verb::Reload, "api");
    world.run_for(secs(20));
    for slot in 0..2 {
        let at = |what: &What| {
            let of_slot = |news: &&pm::policy::news::News| {
                news.what == *what && news.run.as_ref().is_some_and(|run| run.id.slot.0 == slot)
            };
            let found: Vec<_> = world
                .news
                .iter()
                .filter(of_slot)
                .map(|news| (news.at, news.run.as_ref().unwrap().id.generation))
                .collect();
            assert_eq!(found.len(), 1, "{what:?} in slot {slot}: {found:?}");
            found[0]
        };
        let (promoted, told) = (at(&What::InRotation), at(&What::OutOfRotation));
        assert_eq!(promoted.0, told.0, "in one turn");
        assert!(promoted.1 > told.1, "generations tell them apart");
    }
}
