//! Stories about single promises. `check` shows what a person would see: the rows, and how the last request ended.

use std::collections::BTreeSet;
use std::sync::Arc;

use pm::model::exit::ExitReason;
use pm::model::id::Slot;
use pm::model::signal::Signal;
use pm::model::spec::{AppSpec, OnFailure, ReloadRules, Share, Strategy};
use pm::policy::vocabulary::{Command, Health, HookEnd, Retry, RunState, Selected, StepKind, Verb};

use crate::behaviour::{Behaviour, millis, secs};
use crate::specs::{Like, hooks, name, spec};
use crate::world::World;

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

// Strategies, and the way back. -------------------------------------------------------------------------------------

/// An app with these rules, online at version 1.
pub(crate) fn with_rules(like: Like, instances: u32, rules: impl FnOnce(&mut ReloadRules)) -> World {
    let mut world = World::new(1);
    world.verbose = true;
    let mut spec = spec("api", like, instances);
    rules(&mut spec.reload);
    world.start(spec);
    world.run_for(secs(3));
    world.expect_no_breach();
    world
}

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

fn reload(app: &str) -> Command {
    let selection = vec![Selected { app: name(app), slots: None }];
    Command::Act { verb: Verb::Reload, selection, specs: Vec::new() }
}

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

fn hooked(app: &str, like: Like, instances: u32) -> AppSpec {
    AppSpec { hooks: hooks(), ..spec(app, like, instances) }
}

#[test]
fn hooks_run_once_each_where_they_should() {
    let mut world = World::new(1);
    world.verbose = true;
    world.start(hooked("api", Like::Workers, 2));
    assert_eq!(world.last(), "no reply");
    world.run_for(millis(10));
    assert_eq!(world.picture("api"), "0: launching | 1: launching", "nothing runs before its hook has");
    world.run_for(secs(1));
    world.check("api", "0: online v1 | 1: online v1 | started");
    world.act(Verb::Reload, "api");
    world.run_for(secs(5));
    world.act(Verb::Restart, "api");
    world.run_for(secs(5));
    world.check("api", "0: online v1 | 1: online v1 | restarted");
    world.act(Verb::Stop, "api");
    world.run_for(secs(5));
    world.check("api", "0: stopped | 1: stopped | stopped");
    assert_eq!(world.hooks_run, ["pre_start", "pre_reload", "pre_start", "post_stop"]);
    world.act(Verb::Delete, "api");
    world.run_for(secs(1));
    assert_eq!(world.hooks_run.len(), 4, "it was down already");
    assert_eq!(world.last(), "deleted");
}

#[test]
fn a_pre_start_that_fails_leaves_an_errored_row() {
    let mut world = World::new(1);
    world.verbose = true;
    world.hook_like = Some((millis(20), HookEnd::Failed(String::from("exit code 3"))));
    world.start(hooked("api", Like::Workers, 2));
    world.run_for(secs(30));
    world.check("api", "0: errored | 1: errored | hook pre_start failed: exit code 3");
    world.hook_like = None;
    world.act(Verb::Start, "api");
    world.run_for(secs(2));
    world.check("api", "0: online v1 | 1: online v1 | started");
}

#[test]
fn a_pre_reload_or_pre_start_that_fails_changes_nothing() {
    let mut world = World::new(1);
    world.verbose = true;
    world.start(hooked("api", Like::Workers, 2));
    world.run_for(secs(2));
    let (old, disk) = (world.pids("api"), world.disk.clone());
    world.hook_like = Some((millis(20), HookEnd::Failed(String::from("exit code 3"))));
    for (verb, hook) in [(Verb::Reload, "pre_reload"), (Verb::Restart, "pre_start")] {
        let mut newer = hooked("api", Like::Workers, 2);
        newer.env.vars.insert(String::from("RELEASE"), String::from("2"));
        world.act_on(verb, "api", None, Some(newer));
        world.run_for(secs(2));
        world.check("api", &format!("0: online v1 | 1: online v1 | hook {hook} failed: exit code 3"));
        assert_eq!((world.pids("api"), &world.disk), (old.clone(), &disk));
    }
}

#[test]
fn a_hook_that_hangs_is_killed_when_its_time_is_over() {
    let mut world = World::new(1);
    world.verbose = true;
    world.start(hooked("api", Like::Workers, 1));
    world.run_for(secs(2));
    world.hook_like = Some((secs(1000), HookEnd::Succeeded));
    world.act(Verb::Reload, "api");
    world.run_for(secs(3));
    assert_eq!(world.last(), "no reply");
    world.run_for(secs(2));
    world.check("api", "0: online v1 | hook pre_reload failed: no end within 4s, so it was killed");
}

#[test]
fn a_stop_does_not_wait_for_the_hook_of_what_it_supersedes() {
    let mut world = World::new(1);
    world.verbose = true;
    world.start(hooked("api", Like::Workers, 1));
    world.run_for(secs(2));
    world.hook_like = Some((secs(3), HookEnd::Succeeded));
    world.act(Verb::Reload, "api");
    world.run_for(millis(100));
    world.act(Verb::Stop, "api");
    world.run_for(secs(2));
    assert_eq!(world.picture("api"), "0: stopped");
    world.run_for(secs(3));
    world.check("api", "0: stopped | stopped");
    assert_eq!(world.hooks_run, ["pre_start", "pre_reload failed", "post_stop"]);
}

#[test]
fn a_failed_post_stop_is_told_and_changes_nothing() {
    let mut world = World::new(1);
    world.verbose = true;
    world.start(hooked("api", Like::Workers, 1));
    world.run_for(secs(2));
    world.hook_like = Some((millis(20), HookEnd::Failed(String::from("exit code 9"))));
    world.act(Verb::Stop, "api");
    world.run_for(secs(5));
    world.check("api", "0: stopped | stopped, hook post_stop failed: exit code 9");
    world.hook_like = None;
    world.act(Verb::Start, "api");
    world.run_for(secs(2));
    world.act(Verb::Delete, "api");
    world.run_for(secs(5));
    assert_eq!(world.last(), "deleted");
    assert_eq!(world.hooks_run, ["pre_start", "post_stop failed", "pre_start", "post_stop"]);
}

#[test]
fn somebody_is_told_when_an_app_is_given_up() {
    let mut world = World::new(1);
    world.verbose = true;
    let mut job = hooked("job", Like::Plain, 1);
    job.restart.max_restarts = 3;
    world.start(job);
    world.run_for(secs(2));
    world.deploy("job", Behaviour::crashes_after(millis(10)));
    world.crash("job", 0, &ExitReason::Code(1));
    world.run_for(secs(30));
    assert_eq!(world.picture("job"), "0: errored");
    assert_eq!(world.hooks_run, ["pre_start", "on_errored"]);
}

#[test]
fn a_reboot_starts_with_the_hook_and_the_next_supervisor_does_what_is_owed() {
    let mut world = World::new(1);
    world.verbose = true;
    world.start(hooked("api", Like::Workers, 1));
    world.run_for(secs(2));
    world.reboot();
    world.run_for(secs(5));
    world.expect_no_breach();
    assert_eq!(world.picture("api"), "0: online v1");
    assert_eq!(world.hooks_run, ["pre_start", "pre_start"]);
    // In the middle of post_stop.
    world.hook_like = Some((secs(2), HookEnd::Succeeded));
    world.act(Verb::Stop, "api");
    world.run_for(secs(1));
    world.supervisor_dies();
    world.run_for(secs(10));
    assert_eq!(world.hooks_run[2..], ["post_stop"]);
    // In the middle of pre_start.
    world.act(Verb::Start, "api");
    world.run_for(secs(1));
    world.supervisor_dies();
    world.run_for(secs(10));
    world.expect_no_breach();
    assert_eq!(world.picture("api"), "0: online v1");
    assert_eq!(world.hooks_run[3..], ["pre_start"]);
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
