//! Reserve, roll-back, blue-green, and how many go at a time.

use super::*;

/// Replays the steps of the last request: the fewest that were in rotation.
fn fewest_in_rotation(world: &World, from: usize, instances: usize) -> usize {
    let steps = &world.steps[from..];
    let launched: BTreeSet<_> = steps
        .iter()
        .filter(|(_, step)| matches!(step.kind, StepKind::Queued | StepKind::Launching))
        .map(|(_, step)| step.id.clone())
        .collect();
    let mut serving: BTreeSet<_> =
        steps.iter().map(|(_, step)| step.id.clone()).filter(|id| !launched.contains(id)).collect();
    let silent = instances - serving.len().min(instances);
    let mut least = instances;
    for (_, step) in steps {
        match step.kind {
            StepKind::Ready { .. } | StepKind::Restored => {
                serving.insert(step.id.clone());
            }
            StepKind::Reserved
            | StepKind::Draining
            | StepKind::Signalled { .. }
            | StepKind::Gone { .. }
            | StepKind::Failed { .. } => {
                serving.remove(&step.id);
            }
            StepKind::Queued
            | StepKind::Launching
            | StepKind::Spawned { .. }
            | StepKind::Soaking { .. }
            | StepKind::Hook { .. } => {}
        }
        least = least.min(serving.len() + silent);
    }
    least
}

/// Files that are good in the first slots: the third launch of a reload dies.
fn dies_in_third(world: &mut World) {
    world.deploy("api", Behaviour::default());
    world.act(Verb::Reload, "api");
    while world.spawns < 4 + 2 {
        let end = world.now + millis(20);
        while world.next(end) && world.spawns < 4 + 2 {}
        world.now = world.now.max(end);
    }
    let version = world.files[&name("api")].0;
    world.files.insert(name("api"), (version, Behaviour::crashes_after(millis(10))));
}

#[test]
fn release_that_dies_in_its_third_slot_is_rolled_back_from_reserve() {
    for like in [Like::Workers, Like::PoliteWorkers, Like::BareWorkers, Like::Inheriting] {
        let mut world = with_rules(like, 4, |_| {});
        let (old, from) = (world.pids("api"), world.steps.len());
        dies_in_third(&mut world);
        world.run_for(secs(3));
        world.check(
            "api",
            "0: online v1 | 1: online v1 | 2: online v1 | 3: online v1 | \
             failed: 2 exit code 1, 0 replaced, 4 kept, 2 restored",
        );
        assert_eq!(world.pids("api"), old, "{like:?}");
        assert_eq!(fewest_in_rotation(&world, from, 4), 4, "{like:?}");
    }
}

#[test]
fn without_reserve_the_old_release_is_started_again_if_its_files_are_there() {
    let mut world = with_rules(Like::Workers, 4, |rules| rules.reserve = false);
    let from = world.steps.len();
    world.release("api", Behaviour::default());
    let version = world.files[&name("api")].0;
    world.act(Verb::Reload, "api");
    world.run_for(millis(120));
    world.files.insert(name("api"), (version, Behaviour::crashes_after(millis(10))));
    world.run_for(secs(5));
    let seen = world.last();
    assert!(seen.starts_with("failed: ") && seen.contains(" 0 replaced, 4 kept, "), "{seen}");
    assert_eq!(
        world.picture("api"),
        "0: online v1 | 1: online v1 | 2: online v1 | 3: online v1",
        "{}",
        world.log.join("\n")
    );
    world.expect_no_breach();
    assert_eq!(fewest_in_rotation(&world, from, 4), 4);
}

#[test]
fn without_reserve_nothing_is_left_to_go_back_to_when_the_files_were_overwritten() {
    let mut world = with_rules(Like::Workers, 4, |rules| rules.reserve = false);
    dies_in_third(&mut world);
    world.run_for(secs(5));
    world.check(
        "api",
        "0: online v2 | 1: online v2 | 2: online v1 | 3: online v1 | failed: 2 exit code 1, 2 replaced, 2 kept, \
         0 restored, 0 did not come back: not started: EAGAIN",
    );
}

#[test]
fn abort_leaves_finished_slots_new() {
    let mut world = with_rules(Like::Workers, 4, |rules| rules.on_failure = OnFailure::Abort);
    dies_in_third(&mut world);
    world.run_for(secs(3));
    world.check(
        "api",
        "0: online v2 | 1: online v2 | 2: online v1 | 3: online v1 | failed: 2 exit code 1, 2 replaced, 2 kept",
    );
}

#[test]
fn worker_that_dies_after_it_took_over_takes_its_release_back_until_the_last_slot_is_ready() {
    let mut world = with_rules(Like::Workers, 3, |_| {});
    let old = world.pids("api");
    world.deploy("api", Behaviour { ready_after: Some(secs(2)), ..Behaviour::default() });
    world.act(Verb::Reload, "api");
    world.run_for(millis(5500));
    assert_eq!(
        world.picture("api"),
        "0: online v2 + reserve v1 | 1: online v2 + reserve v1 | 2: online v1 + launching v2"
    );
    let new =
        world.procs.iter().find(|(id, proc)| id.slot == Slot(0) && proc.version == 2).unwrap().0.clone();
    world.crash_run(&new, &ExitReason::Code(9));
    world.run_for(secs(3));
    world.check(
        "api",
        "0: online v1 | 1: online v1 | 2: online v1 | failed: 0 exit code 9, 0 replaced, 3 kept, 2 restored",
    );
    assert_eq!(world.pids("api"), old);
}

#[test]
fn reserve_that_dies_is_not_restarted_and_the_way_back_starts_another() {
    let mut world = with_rules(Like::Workers, 3, |_| {});
    let old = world.pids("api");
    world.release("api", Behaviour { ready_after: Some(secs(2)), ..Behaviour::default() });
    world.act(Verb::Reload, "api");
    world.run_for(millis(2500));
    let spawns = world.spawns;
    world.crash("api", 0, &ExitReason::Signal(Signal::KILL));
    world.run_for(millis(500));
    assert_eq!(
        (world.spawns, world.picture("api").as_str()),
        (spawns, "0: online v2 | 1: online v1 + launching v2 | 2: online v1",)
    );
    let next =
        world.procs.iter().find(|(id, proc)| id.slot == Slot(1) && proc.version == 2).unwrap().0.clone();
    world.crash_run(&next, &ExitReason::Code(9));
    world.run_for(secs(5));
    world.check(
        "api",
        "0: online v1 | 1: online v1 | 2: online v1 | failed: 1 exit code 9, 0 replaced, 3 kept, 1 restored",
    );
    assert_eq!(world.pids("api")[1..], old[1..]);
}

#[test]
fn stop_in_the_middle_ends_reserve_as_well_and_stop_of_one_slot_puts_the_others_back() {
    let mut world = with_rules(Like::Workers, 3, |_| {});
    let old = world.pids("api");
    world.deploy("api", Behaviour { ready_after: Some(secs(2)), ..Behaviour::default() });
    world.act(Verb::Reload, "api");
    world.run_for(millis(4500));
    world.act_on(Verb::Stop, "api", Some(&[2]), None);
    world.run_for(secs(2));
    world.check("api", "0: online v1 | 1: online v1 | 2: stopped | stopped");
    assert_eq!(world.pids("api"), old[..2]);
    world.act(Verb::Reload, "api");
    world.run_for(millis(2500));
    world.act(Verb::Stop, "api");
    world.run_for(secs(2));
    world.check("api", "0: stopped | 1: stopped | 2: stopped | stopped");
    assert!(world.procs.is_empty(), "{:?}", world.procs.keys());
}

#[test]
fn next_supervisor_knows_who_is_in_reserve() {
    let mut world = with_rules(Like::Workers, 3, |_| {});
    let old = world.pids("api");
    world.deploy("api", Behaviour { ready_after: Some(secs(4)), ..Behaviour::default() });
    world.act(Verb::Reload, "api");
    world.run_for(millis(8500));
    world.supervisor_dies();
    world.run_for(millis(2100));
    assert_eq!(world.picture("api").matches("reserve").count(), 2, "{}", world.picture("api"));
    let third = world.procs.iter().rfind(|(id, proc)| id.slot == Slot(2) && proc.version == 2);
    let third = third.unwrap().0.clone();
    world.crash_run(&third, &ExitReason::Code(9));
    // It dies once more, on the way back.
    world.supervisor_dies();
    world.run_for(secs(6));
    world.check("api", "0: online v1 | 1: online v1 | 2: online v1 | no reply");
    assert_eq!(world.pids("api"), old);
}

#[test]
fn blue_green_goes_over_in_one_turn() {
    let mut world = with_rules(Like::Workers, 3, |rules| rules.strategy = Strategy::BlueGreen);
    let (old, from) = (world.pids("api"), world.steps.len());
    world.deploy("api", Behaviour { ready_after: Some(millis(500)), ..Behaviour::default() });
    world.act(Verb::Reload, "api");
    world.run_for(millis(400));
    world.check(
        "api",
        "0: online v1 + launching v2 | 1: online v1 + launching v2 | 2: online v1 + launching v2 | no reply",
    );
    world.run_for(secs(1));
    world.check("api", "0: online v2 | 1: online v2 | 2: online v2 | reloaded");
    assert!(world.pids("api").iter().all(|pid| !old.contains(pid)));
    let place = |wanted: fn(&StepKind) -> bool| {
        world.steps[from..].iter().map(|(_, step)| wanted(&step.kind)).collect::<Vec<_>>()
    };
    let ready = place(|kind| matches!(kind, StepKind::Ready { .. }));
    let out = place(|kind| matches!(kind, StepKind::Reserved));
    assert!(ready.iter().rposition(|is| *is).unwrap() < out.iter().position(|is| *is).unwrap());
    assert_eq!(fewest_in_rotation(&world, from, 3), 3);
}

#[test]
fn blue_green_never_switches_without_the_last_one() {
    let mut world = with_rules(Like::Workers, 3, |rules| rules.strategy = Strategy::BlueGreen);
    let old = world.pids("api");
    world.deploy("api", Behaviour::default());
    world.act(Verb::Reload, "api");
    let end = world.now + secs(1);
    while world.spawns < 3 + 3 && world.next(end) {}
    let last = world.procs.iter_mut().rfind(|(id, _)| id.slot == Slot(2)).unwrap().1;
    last.behaviour = Behaviour::never_ready();
    world.run_for(secs(4));
    world.check(
        "api",
        "0: online v1 + soaking v2 | 1: online v1 + soaking v2 | 2: online v1 + launching v2 | no reply",
    );
    world.run_for(secs(3));
    world.check(
        "api",
        "0: online v1 | 1: online v1 | 2: online v1 | failed: 2 not ready in time, 0 replaced, 3 kept",
    );
    assert_eq!(world.pids("api"), old);
}

#[test]
fn min_healthy_keeps_the_old_one_until_the_new_one_has_lived_on() {
    let mut world = with_rules(Like::Workers, 2, |rules| rules.min_healthy = secs(5));
    world.deploy("api", Behaviour::default());
    world.act(Verb::Reload, "api");
    world.run_for(secs(4));
    world.check("api", "0: online v1 + soaking v2 | 1: online v1 | no reply");
    world.run_for(secs(8));
    world.check("api", "0: online v2 | 1: online v2 | reloaded");
    // Its death in that time is a failed reload.
    let old = world.pids("api");
    world.deploy("api", Behaviour { exits_after: Some((secs(3), 7)), ..Behaviour::default() });
    world.act(Verb::Reload, "api");
    world.run_for(secs(4));
    world.check("api", "0: online v2 | 1: online v2 | failed: 0 exit code 7, 0 replaced, 2 kept");
    assert_eq!(world.pids("api"), old);
}

#[test]
fn max_draining_gives_up_reserve_one_by_one() {
    let mut world = with_rules(Like::Workers, 3, |rules| rules.max_draining = Some(1));
    world.deploy("api", Behaviour::default());
    world.act(Verb::Reload, "api");
    let end = world.now + secs(5);
    let mut most = 0;
    while world.next(end) {
        let rows = world.fleet.as_ref().unwrap().app(&name("api")).unwrap().slots;
        let lingering = rows
            .iter()
            .flat_map(|row| &row.draining)
            .filter(|run| matches!(run.state, RunState::Reserve | RunState::Draining | RunState::Stopping));
        most = most.max(lingering.count());
    }
    world.check("api", "0: online v2 | 1: online v2 | 2: online v2 | reloaded");
    assert_eq!(most, 1);
}

#[test]
fn max_surge_replaces_several_at_a_time() {
    for (share, expected) in [(Share::Count(2), 2), (Share::Percent(50), 3), (Share::Percent(1), 1)] {
        let mut world = with_rules(Like::Workers, 6, |rules| rules.max_surge = share);
        world.deploy("api", Behaviour { ready_after: Some(secs(1)), ..Behaviour::default() });
        world.act(Verb::Reload, "api");
        world.run_for(millis(500));
        let picture = world.picture("api");
        assert_eq!(picture.matches("launching v2").count(), expected, "{share:?}: {picture}");
        world.run_for(secs(9));
        assert_eq!(world.last(), "reloaded", "{share:?}");
        world.expect_no_breach();
    }
}

#[test]
fn what_could_not_be_started_again_is_not_taken_down() {
    for (like, verb) in
        [(Like::Plain, Verb::Restart), (Like::Plain, Verb::Reload), (Like::Workers, Verb::Restart)]
    {
        let mut world = World::with_app("job", like, 2);
        let old = world.pids("job");
        world.deploy("job", Behaviour { no_spawn: Some(Retry::Backoff), ..Behaviour::default() });
        world.act(verb, "job");
        world.run_for(secs(3));
        world.check("job", "0: online v1 | 1: online v1 | unfit: no such directory");
        assert_eq!(world.pids("job"), old);
    }
}

#[test]
fn failed_restart_in_place_goes_back_in_every_slot() {
    let mut world = World::with_app("job", Like::Plain, 3);
    world.release("job", Behaviour::default());
    let version = world.files[&name("job")].0;
    world.act(Verb::Reload, "job");
    world.run_for(millis(1500));
    assert_eq!(world.picture("job"), "0: online v2 | 1: launching v2 | 2: online v1");
    world.files.insert(name("job"), (version, Behaviour::crashes_after(millis(10))));
    let second = world.procs.iter().find(|(id, proc)| id.slot == Slot(1) && proc.version == 2);
    let second = second.unwrap().0.clone();
    world.crash_run(&second, &ExitReason::Code(9));
    world.run_for(secs(4));
    world.check(
        "job",
        "0: online v1 | 1: online v1 | 2: online v1 | failed: 1 exit code 9, 0 replaced, 3 kept, 1 restored",
    );
}

/// An instance may be taken out before its successor runs: not before it is known that one could.
#[test]
fn with_max_unavailable_nothing_is_taken_down_for_what_cannot_be_started() {
    let mut world = World::new(1);
    world.verbose = true;
    let mut api = spec("api", Like::Workers, 2);
    api.reload.max_unavailable = Share::Count(1);
    world.start(api);
    world.run_for(secs(3));
    world.deploy("api", Behaviour { no_spawn: Some(Retry::Never), ..Behaviour::default() });
    world.act(Verb::Reload, "api");
    world.run_for(millis(10));
    world.check("api", "0: online v1 | 1: online v1 | unfit: no such directory");
}
