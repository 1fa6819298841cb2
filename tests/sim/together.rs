//! Promises that one part of the policy kept for itself, and that another one broke: stories of faults that were found
//! where dependencies, restarts, strategies and overlapping commands meet.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use pm::model::exit::ExitReason;
use pm::model::spec::{AppSpec, Dependency, OnFailure, Strategy};
use pm::policy::fleet::Fleet;
use pm::policy::plan::Measure;
use pm::policy::vocabulary::{Command, Selected, Verb};

use crate::behaviour::{Behaviour, millis, secs};
use crate::scenarios::with_rules;
use crate::specs::{Like, name, spec};
use crate::world::World;

#[test]
fn after_an_aborted_switch_the_old_ones_that_are_left_serve_where_no_new_one_does() {
    // The old ones go one by one after the switch. The new ones die meanwhile: the last old one used to come back without
    // anybody saying so, while its slot was reported and saved as replaced.
    let mut world = with_rules(Like::Workers, 3, |rules| {
        rules.strategy = Strategy::BlueGreen;
        rules.on_failure = OnFailure::Abort;
        rules.max_draining = Some(1);
    });
    world.deploy("api", Behaviour { kill_listeners: Some(1), drains_after: None, ..Behaviour::default() });
    world.act(Verb::Reload, "api");
    world.run_for(secs(30));
    world.release("api", Behaviour::crashes_after(millis(300)));
    world.act(Verb::Reload, "api");
    world.run_for(secs(120));
    world
        .check("api", "0: errored | 1: online v2 | 2: online v2 | failed: 2 exit code 1, 1 replaced, 2 kept");
    world.check_converged();
    world.expect_no_breach();
}

#[test]
fn a_restart_that_a_stop_of_another_instance_supersedes_changes_nothing() {
    // Its release used to be saved all the same, so that an instance that nobody had touched counted as another one's.
    let mut world = World::with_app("api", Like::Workers, 2);
    world.unkind.save_delay = 2000;
    world.act_on(Verb::Restart, "api", Some(&[1]), None);
    world.run_for(millis(0));
    world.act_on(Verb::Stop, "api", Some(&[0]), None);
    world.run_for(secs(20));
    world.check("api", "0: stopped | 1: online v1 | stopped");
    world.check_converged();
    world.expect_no_breach();
}

/// An app that needs another one.
fn needing(app: &str, needs: &str, instances: u32) -> AppSpec {
    let mut spec = spec(app, Like::Workers, instances);
    spec.depends_on.insert(name(needs), Dependency::Ready);
    spec
}

#[test]
fn who_waits_for_another_app_is_told_of_when_the_rest_is_done() {
    let mut world = World::with_app("db", Like::Workers, 1);
    world.start(needing("api", "db", 2));
    world.run_for(secs(2));
    world.act_on(Verb::Stop, "api", Some(&[0]), None);
    world.act(Verb::Stop, "db");
    world.run_for(secs(20));
    // The first one has to wait, the second is restarted: the answer used to come before it was down.
    world.act(Verb::Restart, "api");
    world.run_for(secs(20));
    world.check("api", "0: launching | 1: online v1 | waiting for db, which is stopped");
}

#[test]
fn apps_that_come_to_need_each_other_start_and_stop_all_the_same() {
    // `api` needs `db`, but not in the release that is about to fail; meanwhile a release of `db` needs `api`. Starts and
    // stops of both, and `kill`, used to wait for ever.
    let mut world = World::new(1);
    world.verbose = true;
    world.start(spec("db", Like::Workers, 1));
    world.start(needing("api", "db", 1));
    world.run_for(secs(2));
    world.deploy("api", Behaviour::never_ready());
    world.act_on(Verb::Reload, "api", None, Some(spec("api", Like::Workers, 1)));
    world.run_for(secs(1));
    world.act_on(Verb::Reload, "db", None, Some(needing("db", "api", 1)));
    world.run_for(secs(20));
    world.check("api", "0: online v1 | reloaded");
    let all = |verb| Command::Act {
        verb,
        selection: ["api", "db"].map(|app| Selected { app: name(app), slots: None }).into(),
        specs: Vec::new(),
    };
    world.ask(all(Verb::Stop));
    world.run_for(secs(20));
    world.check("api", "0: stopped | stopped, stopped");
    world.deploy("api", Behaviour::default());
    world.ask(all(Verb::Start));
    world.run_for(secs(20));
    world.check("db", "0: online v1 | started, started");
    let op = world.ask(Command::Kill);
    world.run_for(secs(20));
    assert!(world.answer(op).is_some(), "{}", world.log.join("\n"));
}

#[test]
fn a_reload_of_what_is_down_waits_for_what_that_needs() {
    let mut world = World::with_app("db", Like::Workers, 1);
    world.start(needing("api", "db", 1));
    world.run_for(secs(2));
    for app in ["api", "db"] {
        world.act(Verb::Stop, app);
        world.run_for(secs(10));
    }
    world.act(Verb::Reload, "api");
    world.run_for(secs(10));
    world.check("api", "0: launching | waiting for db, which is stopped");
    world.act(Verb::Reload, "db");
    world.run_for(secs(10));
    world.check("api", "0: online v1 | started");
}

#[test]
fn a_start_with_another_spec_starts_nothing_from_the_old_one() {
    // Held back by what it needs, the app is started with another spec. What it needs comes up before that is durable:
    // the old spec used to be started then, and the start was said to be done.
    let mut world = World::new(1);
    world.verbose = true;
    world.start(needing("api", "db", 1));
    world.run_for(secs(1));
    world.start(spec("db", Like::Workers, 1));
    world.run_for(millis(40));
    world.unkind.save_delay = 200;
    let mut newer = needing("api", "db", 1);
    newer.env.vars.insert(String::from("RELEASE"), String::from("2"));
    world.start(newer);
    world.run_for(secs(20));
    world.check("api", "0: online v1 | started");
    world.check_converged();
    world.expect_no_breach();
}

#[test]
fn an_instance_that_was_replaced_alone_is_no_drift() {
    // `apply` used to reload the whole app after a health replacement or a `restart` of one instance.
    let spec = Arc::new(spec("api", Like::Workers, 3));
    let mut world = World::with_app("api", Like::Workers, 3);
    let changes = |world: &World| {
        let all = [spec.name.clone()];
        let plan = |fleet: &Fleet| fleet.plan(&[Arc::clone(&spec)], &all, Path::new("/srv/x.toml"), false);
        world.fleet.as_ref().map(plan).is_some_and(|plan| plan.changes())
    };
    for verb in [Verb::Restart, Verb::Reload] {
        world.act_on(verb, "api", Some(&[1]), None);
        world.run_for(secs(20));
        world.check(
            "api",
            &format!(
                "0: online v1 | 1: online v1 | 2: online v1 | {}",
                if verb == Verb::Restart { "restarted" } else { "reloaded" }
            ),
        );
        assert!(!changes(&world), "{verb:?}");
    }
    // What an aborted reload leaves behind is.
    let mut newer = AppSpec::clone(&spec);
    newer.reload.on_failure = OnFailure::Abort;
    newer.env.vars.insert(String::from("RELEASE"), String::from("2"));
    world.act_on(Verb::Reload, "api", None, Some(newer.clone()));
    world.run_for(millis(60));
    world.deploy("api", Behaviour::never_ready());
    world.run_for(secs(20));
    world.check(
        "api",
        "0: online v1 | 1: online v1 | 2: online v1 | failed: 2 not ready in time, 2 replaced, 1 kept",
    );
    let all = [spec.name.clone()];
    let plan = world.fleet.as_ref().unwrap().plan(&[Arc::new(newer)], &all, Path::new("/srv/x.toml"), false);
    assert_eq!(plan.steps[0].measure, Measure::Reload);
}

#[test]
fn what_an_aborted_reload_of_the_same_spec_leaves_behind_is_reloaded_by_apply() {
    // Only the files differed, so that `apply` used to find nothing to do.
    let mut world = with_rules(Like::Workers, 3, |rules| rules.on_failure = OnFailure::Abort);
    let spec = world.fleet.as_ref().unwrap().app(&name("api")).unwrap().spec;
    let apply = |prune| Command::Apply {
        specs: vec![Arc::clone(&spec)],
        all: vec![spec.name.clone()],
        file: PathBuf::from("/srv/x.toml"),
        prune,
    };
    let measure = |world: &World| {
        let file = Path::new("/srv/x.toml");
        let plan = world.fleet.as_ref().unwrap().plan(&[Arc::clone(&spec)], &[name("api")], file, false);
        plan.steps[0].measure
    };
    world.act(Verb::Reload, "api");
    world.run_for(millis(60));
    world.deploy("api", Behaviour::never_ready());
    world.run_for(secs(20));
    assert!(world.last().contains("replaced, "), "{}", world.last());
    assert_eq!(measure(&world), Measure::Reload);
    // The next supervisor knows it too, and one that is replaced alone changes nothing about the others.
    world.supervisor_dies();
    world.run_for(secs(5));
    world.mend_files();
    world.act_on(Verb::Restart, "api", Some(&[0]), None);
    world.run_for(secs(5));
    assert_eq!(measure(&world), Measure::Reload);
    world.ask(apply(false));
    world.run_for(secs(20));
    assert_eq!(measure(&world), Measure::Unchanged);
    world.act_on(Verb::Restart, "api", Some(&[0]), None);
    world.run_for(secs(5));
    assert_eq!(measure(&world), Measure::Unchanged, "what was replaced alone leaves nobody behind");
    world.check_converged();
    world.expect_no_breach();
}

#[test]
fn a_failed_reload_that_changes_no_process_counts_no_restart() {
    // The instances that did not fail themselves used to count one each, with the same pid as before.
    for strategy in [Strategy::Rolling, Strategy::BlueGreen] {
        let mut world = with_rules(Like::Workers, 4, |rules| rules.strategy = strategy);
        let (pids, restarts) = (world.pids("api"), world.restarts("api"));
        world.act(Verb::Reload, "api");
        world.run_for(millis(if strategy == Strategy::Rolling { 60 } else { 30 }));
        world.release("api", Behaviour::crashes_after(millis(1)));
        if strategy == Strategy::BlueGreen {
            let last = world.procs.keys().max_by_key(|id| (id.generation, id.slot)).unwrap().clone();
            world.crash_run(&last, &ExitReason::Code(3));
        }
        world.run_for(secs(20));
        world.expect_no_breach();
        assert!(world.last().starts_with("failed"), "{strategy:?}: {}", world.last());
        assert_eq!(world.pids("api"), pids, "{strategy:?}");
        assert_eq!(world.restarts("api"), restarts, "{strategy:?}");
    }
}
