//! Programs beside an app's life.

use super::*;

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
