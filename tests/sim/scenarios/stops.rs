//! How instances go down.

use super::*;

#[test]
fn stop_of_an_idle_app_takes_milliseconds() {
    for like in crate::specs::ALL {
        let mut world = World::with_app("api", like, 2);
        world.act(Verb::Stop, "api");
        world.run_for(millis(20));
        world.check("api", "0: stopped | 1: stopped | stopped");
    }
}

#[test]
fn requests_in_flight_are_finished_before_the_signal() {
    let mut world = World::new(1);
    world.verbose = true;
    world.files.insert(name("api"), (1, Behaviour { drains_after: Some(secs(2)), ..Behaviour::default() }));
    world.start(spec("api", Like::NodeFork, 1));
    world.run_for(secs(1));
    world.act(Verb::Stop, "api");
    world.run_for(millis(1900));
    world.check("api", "0: stopping v1 | no reply");
    world.run_for(millis(200));
    world.check("api", "0: stopped | stopped");
}

/// The signal is the end of an app that does not listen for it: its requests come first, up to kill_timeout. Another
/// app's own handler knows what to do after the time that idle connections have.
#[test]
fn requests_of_an_app_without_a_handler_have_until_kill_timeout() {
    for (listeners, drains, signalled) in [(0, 8_000, 8_000), (0, 30_000, 10_000), (1, 8_000, 8_000)] {
        let mut world = World::new(1);
        world.verbose = true;
        let behaviour = Behaviour {
            drains_after: Some(millis(drains)),
            kill_listeners: Some(listeners),
            ..Behaviour::default()
        };
        world.files.insert(name("api"), (1, behaviour));
        world.start(spec("api", Like::NodeFork, 1));
        world.run_for(secs(1));
        world.act(Verb::Stop, "api");
        world.run_for(millis(signalled - 100));
        world.check("api", "0: stopping v1 | no reply");
        world.run_for(millis(200));
        world.check("api", "0: stopped | stopped");
        let forced =
            world.steps.iter().any(|(_, step)| matches!(step.kind, StepKind::Gone { killed: true, .. }));
        assert_eq!(forced, drains > 10_000, "{listeners} {drains}");
    }
}

#[test]
fn app_that_ignores_its_signal_is_killed_after_kill_timeout() {
    let mut world = World::new(1);
    world.verbose = true;
    world.files.insert(name("api"), (1, Behaviour::ignores_signals()));
    world.start(spec("api", Like::Plain, 1));
    world.run_for(secs(1));
    world.act(Verb::Stop, "api");
    world.run_for(millis(9900));
    world.check("api", "0: stopping v1 | no reply");
    world.run_for(millis(200));
    world.check("api", "0: stopped | stopped");
    let killed = world.steps.iter().any(|(_, step)| matches!(step.kind, StepKind::Gone { killed: true, .. }));
    assert!(killed);
}

#[test]
fn nobody_is_late_after_a_sleep() {
    let mut world = World::new(1);
    world.verbose = true;
    world.files.insert(name("api"), (1, Behaviour { obeys_after: Some(secs(5)), ..Behaviour::default() }));
    world.start(spec("api", Like::Plain, 1));
    world.run_for(secs(1));
    world.act(Verb::Stop, "api");
    world.run_for(secs(1));
    world.sleep_for(secs(3600));
    world.run_for(secs(6));
    world.check("api", "0: stopped | stopped");
    let killed = world.steps.iter().any(|(_, step)| matches!(step.kind, StepKind::Gone { killed: true, .. }));
    assert!(!killed, "it had 10 s, and slept for most of them");
}

/// The end of the first app was saved before its pipes were read, and forgotten then: nothing had ended by itself any
/// more, and the container went on for ever.
#[test]
fn an_end_that_is_saved_while_something_is_left_behind_is_not_forgotten() {
    let mut world = World::new(1);
    world.remembers = true;
    let like =
        Behaviour { exits_after: Some((millis(300), 3)), leftovers_for: secs(1), ..Behaviour::default() };
    world.files.insert(name("job"), (1, like));
    let mut job = spec("job", Like::Plain, 1);
    job.restart.autorestart = false;
    world.start(job);
    world.run_for(millis(200));
    assert_eq!(world.exit_code(), None, "it runs");
    world.run_for(secs(5));
    world.check("job", "0: stopped | started");
    assert_eq!(world.exit_code(), Some(3));
    // The next supervisor knows it too.
    world.supervisor_dies();
    world.run_for(secs(5));
    assert_eq!(world.exit_code(), Some(3));
}

#[test]
fn nothing_has_finished_while_anything_runs_waits_or_was_only_stopped() {
    let mut world = World::with_app("web", Like::Plain, 1);
    assert_eq!(world.exit_code(), None);
    world.act(Verb::Stop, "web");
    world.run_for(secs(5));
    assert_eq!(world.exit_code(), None, "somebody stopped it, and may start it again");
    world.files.insert(name("bad"), (1, Behaviour::crashes_after(millis(30))));
    world.start(spec("bad", Like::Plain, 1));
    world.run_for(secs(3));
    assert!(world.picture("bad").contains("waiting restart"), "{}", world.picture("bad"));
    assert_eq!(world.exit_code(), None, "it is in backoff");
    world.run_for(secs(300));
    assert!(world.picture("bad").contains("errored"), "{}", world.picture("bad"));
    assert_eq!(world.exit_code(), Some(1));
}

#[test]
fn what_is_waited_for_no_longer_is_killed_also_when_it_begins_to_go_down_later() {
    let mut world = World::new(1);
    world.verbose = true;
    for app in ["db", "web"] {
        world.files.insert(name(app), (1, Behaviour::ignores_signals()));
    }
    world.start(spec("db", Like::Plain, 1));
    let mut web = spec("web", Like::Plain, 1);
    web.depends_on = std::collections::BTreeMap::from([(name("db"), pm::model::spec::Dependency::Started)]);
    world.start(web);
    world.run_for(secs(3));
    world.ask(Command::Terminate);
    world.run_for(secs(1));
    assert!(!world.quit, "they have 10 s each, one after the other");
    world.hurry();
    world.run_for(secs(3));
    assert!(world.quit, "db: {} web: {}", world.picture("db"), world.picture("web"));
    world.expect_no_breach();
}
