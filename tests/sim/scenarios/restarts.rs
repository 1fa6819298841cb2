//! Crashes, and starts after them.

use super::*;

#[test]
fn first_crash_restarts_at_once_and_the_next_ones_wait() {
    let mut world = World::with_app("job", Like::Plain, 1);
    world.crash("job", 0, &ExitReason::Signal(Signal::KILL));
    world.run_for(millis(5));
    world.check("job", "0: launching v1 | started");
    world.run_for(secs(2));
    world.crash("job", 0, &ExitReason::Code(1));
    world.run_for(millis(50));
    world.check("job", "0: waiting restart | started");
    world.run_for(millis(80));
    world.check("job", "0: launching v1 | started");
}

#[test]
fn sixteen_quick_crashes_are_enough() {
    let mut world = World::new(1);
    world.verbose = true;
    world.files.insert(name("job"), (1, Behaviour::crashes_after(millis(30))));
    world.start(spec("job", Like::Plain, 1));
    world.run_for(millis(200));
    world.check("job", "0: waiting restart | failed: 0 exit code 1, 0 replaced, 0 kept");
    world.run_for(secs(200));
    world.check("job", "0: errored | failed: 0 exit code 1, 0 replaced, 0 kept");
    assert_eq!(world.spawns, 16);
    world.deploy("job", Behaviour::default());
    world.act(Verb::Start, "job");
    world.run_for(secs(1));
    world.check("job", "0: online v2 | started");
}

#[test]
fn stop_wins_against_a_pending_restart() {
    let mut world = World::new(1);
    world.verbose = true;
    let mut patient = spec("job", Like::Plain, 1);
    patient.restart.restart_delay = Some(secs(5));
    world.start(patient);
    world.run_for(secs(1));
    world.crash("job", 0, &ExitReason::Code(1));
    world.run_for(secs(1));
    world.check("job", "0: waiting restart | started");
    world.act(Verb::Stop, "job");
    world.run_for(secs(60));
    world.check("job", "0: stopped | stopped");
    assert_eq!(world.spawns, 1);
}

#[test]
fn what_a_crashed_process_left_behind_ends_before_its_successor_starts() {
    let mut world = World::new(1);
    world.verbose = true;
    world.files.insert(name("job"), (1, Behaviour { leftovers_for: millis(800), ..Behaviour::default() }));
    world.start(spec("job", Like::Plain, 1));
    world.run_for(secs(1));
    world.crash("job", 0, &ExitReason::Code(1));
    world.run_for(millis(700));
    world.check("job", "0: stopping v1 | started");
    world.run_for(millis(400));
    world.check("job", "0: online v1 | started");
}

#[test]
fn job_that_is_not_to_be_restarted_keeps_its_code_and_stays_down() {
    let mut world = World::new(1);
    world.verbose = true;
    world
        .files
        .insert(name("job"), (1, Behaviour { exits_after: Some((millis(40), 0)), ..Behaviour::default() }));
    let mut once = spec("job", Like::Plain, 1);
    once.restart.autorestart = false;
    world.start(once);
    world.run_for(secs(1));
    // It did what it was started for, also when that took less than 100 ms.
    world.check("job", "0: stopped | started");
    let row = world.fleet.as_ref().unwrap().app(&name("job")).unwrap().slots[0].clone();
    assert_eq!(row.last_exit, Some(ExitReason::Code(0)));
    world.reboot();
    world.run_for(secs(5));
    assert_eq!(world.spawns, 1, "what ended for good does not come back with a reboot");
}

#[test]
fn missing_script_fails_at_once_and_is_not_tried_again() {
    let mut world = World::new(1);
    world.verbose = true;
    world.files.insert(name("job"), (1, Behaviour { no_spawn: Some(Retry::Never), ..Behaviour::default() }));
    world.start(spec("job", Like::Plain, 1));
    world.run_for(secs(60));
    world.check("job", "0: errored | failed: 0 not started: EAGAIN, 0 replaced, 0 kept");
    assert_eq!(world.spawns, 1);
}

#[test]
fn two_starts_of_one_file_make_one_app() {
    let mut world = World::new(1);
    world.verbose = true;
    world.start(spec("api", Like::Workers, 2));
    world.start(spec("api", Like::Workers, 2));
    world.run_for(secs(1));
    world.check("api", "0: online v1 | 1: online v1 | started");
    assert_eq!((world.outcomes.len(), world.spawns), (2, 2));
    world.start(spec("api", Like::Workers, 2));
    world.check("api", "0: online v1 | 1: online v1 | already running");
}
