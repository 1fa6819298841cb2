//! Readiness and health that are asked for.

use super::*;

#[test]
fn readiness_probe_opens_the_gate_after_its_threshold() {
    let mut world = World::with_app("api", Like::ProbedWorkers, 2);
    world.deploy("api", Behaviour { ready_after: Some(secs(2)), ..Behaviour::default() });
    world.act(Verb::Reload, "api");
    world.run_for(millis(2000));
    world.check("api", "0: online v1 + launching v2 | 1: online v1 | no reply");
    world.run_for(secs(4));
    world.check("api", "0: online v2 | 1: online v2 | reloaded");
}

#[test]
fn probe_that_never_succeeds_is_a_failed_release() {
    let mut world = World::with_app("api", Like::Probed, 1);
    world.deploy("api", Behaviour::never_ready());
    world.act(Verb::Reload, "api");
    world.run_for(secs(7));
    // It was replaced in place, and the files of the release before are gone.
    let last = world.last();
    assert!(last.starts_with("failed: 0 not ready in time, 0 replaced, 0 kept, 0 restored"), "{last}");
    world.expect_no_breach();
}

#[test]
fn unhealthy_instance_is_replaced_through_the_gate() {
    let mut world = World::with_app("api", Like::ProbedWorkers, 3);
    let old = world.pids("api");
    world.sicken("api", 1);
    // Three answers, one a second; the fresh one is ready 200 ms after its start.
    world.run_for(secs(5));
    world.check("api", "0: online v1 | 1: online v1 | 2: online v1 | started");
    let new = world.pids("api");
    assert_eq!(new.iter().filter(|pid| old.contains(pid)).count(), 2, "{old:?} {new:?}");
    assert_eq!(world.last_exit("api", 1), Some(ExitReason::Health));
    assert_eq!(world.restarts("api"), [0, 1, 0]);
}

#[test]
fn instances_that_all_fail_are_left_alone_and_shown() {
    let mut world = World::with_app("api", Like::ProbedWorkers, 3);
    let old = world.pids("api");
    for slot in 0..3 {
        world.sicken("api", slot);
    }
    world.run_for(secs(600));
    world.expect_no_breach();
    assert_eq!(world.pids("api"), old, "nobody is ended");
    assert_eq!(world.healths("api"), [Some(Health::Unhealthy); 3]);
    // What they depend on is back.
    for slot in 0..3 {
        world.cure("api", slot);
    }
    world.run_for(secs(3));
    assert_eq!(world.healths("api"), [Some(Health::Healthy); 3]);
    assert_eq!(world.pids("api"), old);
}

#[test]
fn the_last_healthy_instance_waits_until_others_are_well() {
    let mut world = World::with_app("api", Like::ProbedWorkers, 2);
    world.sicken("api", 0);
    world.sicken("api", 1);
    world.run_for(secs(30));
    let old = world.pids("api");
    world.cure("api", 1);
    world.run_for(secs(5));
    world.expect_no_breach();
    assert_eq!(world.pids("api").iter().filter(|pid| old.contains(pid)).count(), 1);
    assert_eq!(world.healths("api"), [Some(Health::Healthy); 2]);
}

#[test]
fn a_single_instance_is_replaced_and_ever_more_rarely() {
    let mut world = World::with_app("job", Like::Probed, 1);
    world.deploy("job", Behaviour::sick_after(millis(500)));
    world.sicken("job", 0);
    world.run_for(secs(60));
    world.expect_no_breach();
    // At 3 s, then no sooner than 15 s and 45 s after that.
    assert_eq!(world.restarts("job"), [3]);
    world.run_for(secs(600));
    let restarts = world.restarts("job")[0];
    assert!((5..9).contains(&restarts), "{restarts}");
}

#[test]
fn health_waits_for_a_reload_and_is_dropped_when_that_replaced_the_instance() {
    let mut world = World::with_app("api", Like::ProbedWorkers, 2);
    world.deploy("api", Behaviour { ready_after: Some(secs(4)), ..Behaviour::default() });
    world.act(Verb::Reload, "api");
    world.sicken("api", 1);
    world.run_for(secs(20));
    world.check("api", "0: online v2 | 1: online v2 | reloaded");
    assert_eq!(world.restarts("api"), [1, 1], "the reload's own and no other");
}

#[test]
fn a_deploy_during_a_replacement_waits_and_is_not_refused() {
    let mut world = World::with_app("api", Like::ProbedWorkers, 2);
    world.deploy("api", Behaviour { ready_after: Some(secs(3)), ..Behaviour::default() });
    world.sicken("api", 0);
    world.run_for(secs(4));
    let mut newer = spec("api", Like::ProbedWorkers, 2);
    newer.env.vars.insert(String::from("RELEASE"), String::from("2"));
    world.act_on(Verb::Reload, "api", None, Some(newer));
    assert_eq!(world.last(), "no reply");
    world.run_for(secs(20));
    world.check("api", "0: online v2 | 1: online v2 | reloaded");
    assert_eq!(world.restarts("api"), [2, 1]);
}

#[test]
fn a_replacement_that_does_not_get_ready_leaves_the_unhealthy_one() {
    let mut world = World::with_app("api", Like::ProbedWorkers, 2);
    let old = world.pids("api");
    world.deploy("api", Behaviour::never_ready());
    world.sicken("api", 0);
    world.run_for(secs(12));
    world.check("api", "0: online v1 | 1: online v1 | started");
    assert_eq!(world.pids("api"), old);
    assert_eq!(world.healths("api")[0], Some(Health::Unhealthy));
}

#[test]
fn the_next_supervisor_goes_on_with_probes_and_counts() {
    let mut world = World::with_app("api", Like::ProbedWorkers, 2);
    let old = world.pids("api");
    world.sicken("api", 0);
    world.run_for(millis(2500));
    world.supervisor_dies();
    world.run_for(secs(6));
    world.expect_no_breach();
    assert_eq!(world.pids("api").iter().filter(|pid| old.contains(pid)).count(), 1);
    assert_eq!(world.healths("api"), [Some(Health::Healthy); 2]);
}
