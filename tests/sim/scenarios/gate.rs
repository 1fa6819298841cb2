//! A reload: the new one is ready before the old one goes.

use super::*;

#[test]
fn worker_that_never_gets_ready_leaves_the_old_one_serving() {
    let mut world = World::with_app("api", Like::Workers, 2);
    let old = world.pids("api");
    world.deploy("api", Behaviour::never_ready());
    world.act(Verb::Reload, "api");
    // listen_timeout is 5 s; the command ends no later than 1 s after it.
    world.run_for(secs(6));
    world.check("api", "0: online v1 | 1: online v1 | failed: 0 not ready in time, 0 replaced, 2 kept");
    assert_eq!(world.pids("api"), old);
    world.deploy("api", Behaviour::default());
    world.act(Verb::Reload, "api");
    world.run_for(secs(6));
    world.check("api", "0: online v3 | 1: online v3 | reloaded");
}

#[test]
fn release_that_crashes_at_boot_leaves_the_old_one_serving() {
    let mut world = World::with_app("api", Like::PoliteWorkers, 3);
    let old = world.pids("api");
    world.deploy("api", Behaviour::crashes_after(millis(20)));
    world.act(Verb::Reload, "api");
    world.run_for(millis(100));
    world.check(
        "api",
        "0: online v1 | 1: online v1 | 2: online v1 | failed: 0 exit code 1, 0 replaced, 3 kept",
    );
    assert_eq!(world.pids("api"), old);
}

#[test]
fn release_that_crashes_just_after_ready_is_not_spread() {
    let mut world = World::with_app("api", Like::Workers, 3);
    world.deploy("api", Behaviour { exits_after: Some((millis(70), 3)), ..Behaviour::default() });
    world.act(Verb::Reload, "api");
    world.run_for(secs(1));
    let seen = world.last();
    assert!(seen.starts_with("failed: 0 exit code 3"), "{seen}");
    let picture = world.picture("api");
    assert!(picture.contains("1: online v1 | 2: online v1"), "{picture}");
    world.expect_no_breach();
}

#[test]
fn reload_of_idle_workers_takes_no_longer_than_their_start() {
    let mut world = World::with_app("api", Like::Workers, 2);
    world.act(Verb::Reload, "api");
    // 50 ms until each is ready, a few more for the ladder.
    world.run_for(millis(150));
    world.check("api", "0: online v1 | 1: online v1 | reloaded");
    let ready = world.steps.iter().filter(|(_, step)| matches!(step.kind, StepKind::Ready { .. })).count();
    assert_eq!(ready, 2 + 2, "the start and the reload report each instance that gets ready");
}

#[test]
fn new_worker_takes_over_only_when_it_listens_wherever_the_old_one_serves() {
    let mut world = World::with_app("api", Like::PoliteWorkers, 1);
    world.deploy("api", Behaviour { listens_after: Some(secs(3)), ..Behaviour::default() });
    world.act(Verb::Reload, "api");
    world.run_for(secs(2));
    world.check("api", "0: online v1 + launching v2 | no reply");
    world.run_for(secs(2));
    world.check("api", "0: online v2 | reloaded");
}

#[test]
fn new_worker_on_another_port_need_not_listen_on_the_old_one() {
    let mut world = World::with_app("api", Like::PoliteWorkers, 1);
    world.deploy("api", Behaviour { keys: 0, ..Behaviour::default() });
    let mut moved = spec("api", Like::PoliteWorkers, 1);
    moved.env.vars.insert(String::from("PORT"), String::from("4000"));
    world.act_on(Verb::Reload, "api", None, Some(moved));
    world.run_for(secs(1));
    world.check("api", "0: online v2 | reloaded");
}

#[test]
fn reload_without_overlap_goes_one_slot_at_a_time() {
    let mut world = World::with_app("job", Like::Plain, 2);
    world.deploy("job", Behaviour::default());
    world.act(Verb::Reload, "job");
    // Ready after min_uptime of 1 s.
    world.run_for(millis(500));
    world.check("job", "0: launching v2 | 1: online v1 | no reply");
    world.run_for(secs(1));
    world.check("job", "0: online v2 | 1: launching v2 | no reply");
    world.run_for(secs(1));
    world.check("job", "0: online v2 | 1: online v2 | reloaded");
}

#[test]
fn failed_reload_in_place_leaves_the_other_slots_alone() {
    let mut world = World::with_app("job", Like::Plain, 2);
    world.deploy("job", Behaviour::crashes_after(millis(200)));
    world.act(Verb::Reload, "job");
    world.run_for(millis(260));
    world.check("job", "0: launching v2 | 1: online v1 | failed: 0 exit code 1, 0 replaced, 1 kept, 0 restored, 0 did not come back: not started: EAGAIN");
}

#[test]
fn max_unavailable_takes_the_old_one_out_first() {
    let mut world = World::new(1);
    world.verbose = true;
    let mut lean = spec("api", Like::Workers, 3);
    (lean.reload.max_surge, lean.reload.max_unavailable) = (Share::Count(0), Share::Count(1));
    world.start(lean);
    world.run_for(secs(1));
    world.act(Verb::Reload, "api");
    world.run_for(millis(30));
    assert_eq!(world.pids("api").len(), 3, "never more than three");
    world.run_for(secs(1));
    world.check("api", "0: online v1 | 1: online v1 | 2: online v1 | reloaded");
}

#[test]
fn second_reload_waits_and_a_third_joins_it() {
    let mut world = World::with_app("api", Like::Workers, 1);
    world.deploy("api", Behaviour { ready_after: Some(secs(1)), ..Behaviour::default() });
    let first = world.ask(reload("api"));
    world.run_for(millis(100));
    world.deploy("api", Behaviour { ready_after: Some(secs(1)), ..Behaviour::default() });
    let second = world.ask(reload("api"));
    let third = world.ask(reload("api"));
    world.run_for(millis(1100));
    assert!(world.outcomes.iter().any(|(op, _)| *op == first));
    assert!(!world.outcomes.iter().any(|(op, _)| *op == second));
    world.run_for(secs(2));
    world.check("api", "0: online v3 | reloaded");
    assert!(world.outcomes.iter().any(|(op, _)| *op == second));
    assert!(world.outcomes.iter().any(|(op, _)| *op == third));
}

#[test]
fn stop_puts_an_end_to_a_reload_and_scale_is_refused() {
    let mut world = World::with_app("api", Like::Workers, 2);
    world.deploy("api", Behaviour::never_ready());
    let reloading = world.ask(reload("api"));
    world.run_for(secs(1));
    world.ask(Command::Scale { app: name("api"), instances: 3 });
    world.check("api", "0: online v1 + launching v2 | 1: online v1 | refused: a reload of `api` is going on");
    world.act(Verb::Stop, "api");
    world.run_for(millis(100));
    world.check("api", "0: stopped | 1: stopped | stopped");
    let outcome = format!("{:?}", world.outcomes.iter().find(|(op, _)| *op == reloading));
    assert!(outcome.contains("Superseded { by: \"stop\" }"), "{outcome}");
}
