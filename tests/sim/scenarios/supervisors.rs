//! Disks that refuse, supervisors that die, machines that reboot.

use super::*;

#[test]
fn full_disk_refuses_start_and_lets_stop_act() {
    let mut world = World::with_app("api", Like::Workers, 1);
    world.unkind.save_fails = 100;
    world.start(spec("web", Like::Workers, 1));
    world.run_for(millis(100));
    world.check("web", "unknown | not saved");
    world.act(Verb::Reload, "api");
    world.run_for(millis(100));
    world.check("api", "0: online v1 | not saved");
    world.act(Verb::Restart, "api");
    world.run_for(millis(200));
    world.check("api", "0: online v1 | restarted");
    world.act(Verb::Stop, "api");
    world.run_for(millis(100));
    world.check("api", "0: stopped | stopped, not remembered");
    world.supervisor_dies();
    world.run_for(secs(5));
    world.check("api", "0: stopped | stopped, not remembered");
    world.unkind.save_fails = 0;
    world.run_for(secs(5));
    world.reboot();
    world.run_for(secs(5));
    world.check("api", "0: stopped | stopped, not remembered");
}

#[test]
fn a_second_stop_on_a_full_disk_says_again_that_it_is_not_remembered() {
    let mut world = World::with_app("api", Like::Workers, 1);
    world.unkind.save_fails = 100;
    for _ in 0..2 {
        world.act(Verb::Stop, "api");
        world.run_for(millis(100));
        world.check("api", "0: stopped | stopped, not remembered");
    }
    world.unkind.save_fails = 0;
    world.act(Verb::Stop, "api");
    world.run_for(millis(100));
    world.check("api", "0: stopped | stopped");
    world.act(Verb::Stop, "api");
    world.run_for(millis(100));
    world.check("api", "0: stopped | already stopped");
}

#[test]
fn what_was_deleted_on_a_full_disk_stays_away_over_the_supervisor_s_death() {
    let mut world = World::with_app("api", Like::Workers, 1);
    world.unkind.save_fails = 100;
    world.act(Verb::Delete, "api");
    world.run_for(millis(100));
    world.check("api", "unknown | deleted, not remembered");
    world.supervisor_dies();
    world.run_for(secs(5));
    world.check("api", "unknown | deleted, not remembered");
    world.unkind.save_fails = 0;
    world.run_for(secs(5));
    world.reboot();
    world.run_for(secs(5));
    world.check("api", "unknown | deleted, not remembered");
}

#[test]
fn a_stop_that_takes_longer_than_the_disk_is_full_is_remembered() {
    let mut world = World::with_app("api", Like::Workers, 1);
    world.deploy("api", Behaviour { obeys_after: None, ..Behaviour::default() });
    world.act(Verb::Restart, "api");
    world.run_for(secs(30));
    world.unkind.save_fails = 100;
    world.act(Verb::Stop, "api");
    world.run_for(secs(1));
    world.unkind.save_fails = 0;
    world.run_for(secs(30));
    world.check("api", "0: stopped | stopped");
}

#[test]
fn a_full_disk_keeps_no_app_down_after_a_boot_or_after_many_crashes() {
    let mut world = World::with_app("api", Like::Workers, 1);
    world.unkind.save_fails = 100;
    world.reboot();
    world.run_for(secs(10));
    world.check("api", "0: online v1 | started");
    for _ in 0..40 {
        world.crash("api", 0, &ExitReason::Code(1));
        world.run_for(secs(40));
    }
    world.check("api", "0: online v1 | started");
    world.supervisor_dies();
    world.run_for(secs(5));
    world.crash("api", 0, &ExitReason::Code(1));
    world.run_for(secs(40));
    world.unkind.save_fails = 0;
    world.run_for(secs(5));
    world.check("api", "0: online v1 | started");
}

#[test]
fn new_supervisor_adopts_what_lives_and_accounts_for_what_died() {
    let mut world = World::with_app("api", Like::Workers, 2);
    let old = world.pids("api");
    world.supervisor_dies();
    world.crash("api", 1, &ExitReason::Code(7));
    world.run_for(secs(5));
    world.check("api", "0: online v1 | 1: online v1 | started");
    assert_eq!(world.pids("api")[0], old[0]);
    let rows = world.fleet.as_ref().unwrap().app(&name("api")).unwrap().slots;
    assert_eq!((rows[0].restarts, rows[1].restarts), (0, 1));
    assert_eq!(rows[1].last_exit, Some(ExitReason::Code(7)));
}

#[test]
fn new_supervisor_finishes_a_reload() {
    let mut world = World::with_app("api", Like::Workers, 3);
    world.deploy("api", Behaviour { ready_after: Some(secs(1)), ..Behaviour::default() });
    world.act(Verb::Reload, "api");
    world.run_for(millis(1500));
    world.supervisor_dies();
    world.run_for(secs(10));
    world.check("api", "0: online v2 | 1: online v2 | 2: online v2 | no reply");
}

#[test]
fn reboot_starts_what_was_running_and_nothing_else() {
    let mut world = World::with_app("api", Like::Workers, 2);
    world.start(spec("job", Like::Plain, 1));
    world.run_for(secs(1));
    world.act(Verb::Stop, "job");
    world.run_for(secs(1));
    world.reboot();
    world.run_for(secs(5));
    world.check("api", "0: online v1 | 1: online v1 | stopped");
    world.check("job", "0: stopped | stopped");
}

#[test]
fn kill_forgets_everything_and_terminate_nothing() {
    let mut world = World::with_app("api", Like::Workers, 2);
    world.ask(Command::Terminate);
    world.run_for(secs(1));
    assert!(world.quit && world.pids("api").is_empty());
    world.new_daemon();
    world.run_for(secs(5));
    world.check("api", "0: online v1 | 1: online v1 | stopped");
    world.ask(Command::Kill);
    world.run_for(secs(1));
    assert!(world.quit && world.disk.apps.is_empty() && world.disk.next_pm_id == 0);
}

/// The number of a run that the disk never heard of was given out a second time, because its slot had been given up
/// before the supervisor died.
#[test]
fn no_number_names_two_runs_when_a_slot_comes_back_that_a_full_disk_never_gave_up() {
    let mut world = World::with_app("api", Like::Workers, 2);
    world.unkind.save_fails = 100;
    for _ in 0..40 {
        world.crash("api", 1, &ExitReason::Code(1));
        world.run_for(secs(40));
    }
    world.check("api", "0: online v1 | 1: online v1 | started");
    // It goes down although the disk does not take it.
    world.act(Verb::Delete, "api");
    world.run_for(secs(1));
    world.supervisor_dies();
    world.run_for(secs(5));
    world.unkind.save_fails = 0;
    world.start(spec("api", Like::Workers, 2));
    world.run_for(secs(5));
    world.check("api", "0: online v1 | 1: online v1 | started");
    world.expect_no_breach();
}

/// Two of three were on their way down when the restart failed and the memory was lost. They came back, and stayed.
#[test]
fn what_was_on_its_way_down_when_the_memory_was_lost_is_replaced() {
    let mut world = World::new(1);
    world.verbose = true;
    world.files.insert(name("api"), (1, Behaviour { drains_after: Some(secs(8)), ..Behaviour::default() }));
    world.start(spec("api", Like::Workers, 2));
    world.run_for(secs(3));
    world.act(Verb::Restart, "api");
    world.run_for(millis(100));
    world.deploy("api", Behaviour { no_spawn: Some(Retry::Never), ..Behaviour::default() });
    world.crash("api", 1, &ExitReason::Code(0));
    world.run_for(secs(1));
    world.mend_files();
    world.unkind.forgets = 100;
    world.supervisor_dies();
    world.run_for(secs(60));
    world.check_converged();
    world.expect_no_breach();
}
