//! How many instances there are, and which are meant.

use super::*;

#[test]
fn another_number_of_instances_touches_no_other_instance() {
    let mut world = World::with_app("api", Like::Workers, 2);
    let old = world.pids("api");
    world.start(spec("api", Like::Workers, 4));
    world.run_for(secs(1));
    world.check("api", "0: online v1 | 1: online v1 | 2: online v1 | 3: online v1 | scaled");
    assert_eq!(world.pids("api")[..2], old[..]);
    world.ask(Command::Scale { app: name("api"), instances: 1 });
    world.run_for(secs(1));
    world.check("api", "0: online v1 | scaled");
    assert_eq!(world.pids("api"), old[..1]);
}

#[test]
fn reload_may_change_the_number_of_instances() {
    let mut world = World::with_app("api", Like::Workers, 3);
    world.deploy("api", Behaviour::default());
    let mut fewer = spec("api", Like::Workers, 1);
    fewer.namespace = String::from("other");
    world.act_on(Verb::Reload, "api", None, Some(fewer));
    world.run_for(secs(8));
    world.check("api", "0: online v2 | reloaded");
    world.deploy("api", Behaviour::never_ready());
    world.act_on(Verb::Reload, "api", None, Some(spec("api", Like::Workers, 3)));
    world.run_for(secs(8));
    world.check("api", "0: online v2 | failed: 0 not ready in time, 0 replaced, 1 kept");
}

#[test]
fn a_single_slot_can_be_restarted_and_stopped() {
    let mut world = World::with_app("api", Like::Workers, 2);
    let old = world.pids("api");
    world.deploy("api", Behaviour::default());
    world.act_on(Verb::Restart, "api", Some(&[1]), None);
    world.run_for(secs(1));
    world.check("api", "0: online v1 | 1: online v2 | restarted");
    assert_eq!(world.pids("api")[0], old[0]);
    world.act_on(Verb::Stop, "api", Some(&[0]), None);
    world.run_for(secs(1));
    world.check("api", "0: stopped | 1: online v2 | stopped");
    world.act_on(Verb::Delete, "api", Some(&[0]), None);
    world.check(
        "api",
        "0: stopped | 1: online v2 | refused: only the highest instances of `api` can be deleted alone; \
         `pm scale api 1` does that",
    );
}

#[test]
fn hundred_plain_processes_do_not_wait_for_each_other() {
    let mut world = World::new(1);
    let specs = (0..100).map(|n| Arc::new(spec(&format!("job{n}"), Like::Plain, 1))).collect();
    world.ask(Command::Start { specs });
    world.run_for(millis(200));
    world.expect_no_breach();
    assert_eq!(world.last().matches("started").count(), 100, "{}", world.last());
}

#[test]
fn only_a_few_workers_launch_at_the_same_time() {
    let mut world = World::new(1);
    world.verbose = true;
    world.start(spec("api", Like::Workers, 10));
    world.run_for(millis(30));
    assert_eq!(world.pids("api").len(), 4, "start_parallelism");
    world.run_for(secs(1));
    assert_eq!(world.pids("api").len(), 10);
}

#[test]
fn reload_of_everything_goes_two_apps_at_a_time_and_past_failures() {
    let mut world = World::new(1);
    for app in ["a", "b", "c"] {
        world.start(spec(app, Like::Workers, 1));
    }
    world.run_for(secs(1));
    for app in ["a", "b", "c"] {
        world.deploy(app, Behaviour { ready_after: Some(secs(1)), ..Behaviour::default() });
    }
    world.deploy("b", Behaviour::crashes_after(millis(10)));
    let selection = ["a", "b", "c"].map(|app| Selected { app: name(app), slots: None }).to_vec();
    world.ask(Command::Act { verb: Verb::Reload, selection, specs: Vec::new() });
    world.run_for(millis(5));
    assert_eq!(world.procs.len(), 5, "two of three are being reloaded");
    world.run_for(secs(4));
    assert_eq!(world.last(), "reloaded, failed: 0 exit code 1, 0 replaced, 1 kept, reloaded");
    world.expect_no_breach();
}
