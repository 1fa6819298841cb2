//! Operations that meet: one at a time per app, other apps are not held up, and whoever wants an app down gets it down.
//!
//! The app of these tests boots and leaves when the test lets it (`gated.js`), so nothing here depends on how fast the
//! machine is.

use std::collections::BTreeSet;

use nix::sys::signal::Signal;

use super::support::census::Census;
use super::support::home::Running;
use super::support::load::{self, Connections, Load};
use super::support::{Home, PATIENT, SOON, fixture, free_port, millis, process, secs, stays, wait_until};

/// A cluster app of two workers whose boot and end the test decides.
struct Gated {
    home: Home,
    port: u16,
}

impl Gated {
    /// Version 1 is online.
    fn start(more: &str) -> Self {
        let gated = Self { home: Home::new(), port: free_port() };
        gated.release("v1");
        gated.open("v1");
        gated.home.start(&gated.config(more));
        gated
    }

    fn config(&self, more: &str) -> String {
        format!(
            "[[apps]]\nname = 'web'\nscript = 'app.js'\nexec_mode = 'cluster'\ninstances = 2\nbalance = 'shared'\n\
             wait_ready = true\nlisten_timeout = '60s'\nkill_timeout = '60s'\nenv = {{ PORT = '{}' }}\n{more}\n",
            self.port
        )
    }

    /// New files; they boot when their gate is open.
    fn release(&self, version: &str) {
        let place = self.home.work().display().to_string();
        self.home.write(
            "app.js",
            &format!(
                "Object.assign(process.env, {{ VERSION: '{version}', GATE: '{place}/gate-{version}', \
                 HOLD: '{place}/hold-{version}', LIFE: '{place}/life' }});\nrequire('{}');\n",
                fixture("gated.js")
            ),
        );
    }

    /// This version may boot.
    fn open(&self, version: &str) {
        self.home.write(&format!("gate-{version}"), "");
    }

    /// This version does not leave when it is told to.
    fn hold(&self, version: &str) {
        self.home.write(&format!("hold-{version}"), "");
    }

    fn let_go(&self, version: &str) {
        std::fs::remove_file(self.home.work_file(&format!("hold-{version}"))).unwrap();
    }

    /// How many instances of this version have noted this step so far.
    fn count(&self, step: &str, version: &str) -> usize {
        let of_kind =
            |line: &&str| line.starts_with(&format!("{step} ")) && line.ends_with(&format!(" {version}"));
        self.home.read("life").lines().filter(of_kind).count()
    }

    #[track_caller]
    fn wait_for(&self, step: &str, version: &str, count: usize) {
        wait_until(&format!("{count} × {step} {version}"), PATIENT, || {
            if self.count(step, version) >= count { Ok(()) } else { Err(self.home.read("life")) }
        });
    }

    /// The pid of the last instance that noted this step.
    fn last(&self, step: &str) -> i32 {
        let life = self.home.read("life");
        let line = life.lines().rev().find(|line| line.starts_with(&format!("{step} "))).unwrap();
        line.split(' ').nth(2).unwrap().parse().unwrap()
    }

    /// Begins a command that goes on.
    fn begin(&self, args: &[&str]) -> Running {
        Running::start(self.home.command(args), b"")
    }

    /// Begins a reload to v2, which stands at the gate in slot 0.
    fn reload_at_the_gate(&self) -> Running {
        self.release("v2");
        let reload = self.begin(&["reload", "web"]);
        self.wait_for("boot", "v2", 1);
        reload
    }

    /// Begins a reload to v2, whose first instance serves and whose predecessor does not leave.
    fn reload_that_drains(&self) -> Running {
        self.release("v2");
        self.open("v2");
        self.hold("v1");
        let reload = self.begin(&["reload", "web"]);
        self.wait_for("stop", "v1", 1);
        reload
    }

    /// Nothing runs that has no row, and every row says the truth.
    #[track_caller]
    fn balanced(&self) {
        Census::balances(&self.home);
    }

    /// Everybody who answers is of this version.
    #[track_caller]
    fn serves(&self, version: &str) {
        for _ in 0..20 {
            assert_eq!(load::get(self.port, "/").unwrap().header("x-version"), version);
        }
    }
}

#[track_caller]
fn ends(running: Running, code: i32) -> super::support::Run {
    let run = running.end(PATIENT);
    assert_eq!(run.code, code, "{run:#?}");
    run
}

// A reload and another one. ---------------------------------------------------------------------------------------

#[test]
fn pain_04_a_second_reload_waits_for_the_first_and_later_ones_join_the_second() {
    let web = Gated::start("");
    let first = web.reload_at_the_gate();
    // Files that came after the first one began: only an instance that starts from now on may be of them.
    web.release("v3");
    let mut others: Vec<Running> = (0..3).map(|_| web.begin(&["reload", "web"])).collect();
    stays("nobody begins before the first has ended", millis(300), || {
        let early = others.iter_mut().any(Running::is_done);
        if early || web.count("boot", "v3") > 0 { Err(web.home.read("life")) } else { Ok(()) }
    });
    // The one in slot 0 boots; slot 1 starts from the files as they are by then.
    web.open("v2");
    web.wait_for("boot", "v3", 1);
    web.open("v3");
    ends(first, 0);
    for other in others {
        ends(other, 0).says("reloaded");
    }
    // v3: slot 1 of the first reload, both slots of the one that the other three share.
    assert_eq!(web.count("boot", "v3"), 3, "{}", web.home.read("life"));
    web.serves("v3");
    web.balanced();
}

#[test]
fn pain_04_a_reload_with_another_spec_during_a_reload_is_refused_with_exit_code_5() {
    let web = Gated::start("");
    let reload = web.reload_at_the_gate();
    web.home.ecosystem(&web.config("kill_signal = 'SIGTERM'"));
    web.home.exits(5, &["reload", "ecosystem.toml"]).says("a reload of `web` is going on");
    web.home.exits(5, &["start", "ecosystem.toml"]).says("a reload of `web` is going on");
    web.open("v2");
    ends(reload, 0);
    assert_eq!(web.count("boot", "v2"), 2);
    web.balanced();
    // What was refused works now.
    web.home.ok(&["reload", "ecosystem.toml"]);
    assert_eq!(web.count("boot", "v2"), 4);
}

#[test]
fn a_refused_update_env_leaves_the_environment_as_it_was() {
    let web = Gated::start("");
    let with_colour = |args: &[&str]| {
        let mut command = web.home.command(args);
        command.env("COLOUR", "green");
        Running::start(command, b"").end(PATIENT)
    };
    let reload = web.reload_at_the_gate();
    for args in [["restart", "web", "--update-env"], ["reload", "web", "--update-env"]] {
        let run = with_colour(&args);
        assert_eq!(run.code, 5, "{run:?}");
        run.says("a reload of `web` is going on");
    }
    web.open("v2");
    ends(reload, 0);
    // The second slot was started after the refusals.
    let colours = || web.home.pids("web").into_iter().map(|pid| process::environ(pid).get("COLOUR").cloned());
    assert!(colours().all(|colour| colour.is_none()), "the environment of a refused command");
    // A release that fails takes its environment along: nobody may come up with it later.
    web.home.write("app.js", "throw new Error('no');\n");
    assert_eq!(with_colour(&["reload", "web", "--update-env"]).code, 1);
    web.release("v2");
    let before = web.home.pids("web");
    process::end(before[0]);
    wait_until("it is back", PATIENT, || {
        let rows = web.home.rows_of("web");
        let back = rows.iter().all(|row| row.status == "online") && rows[0].pid != before[0];
        if back { Ok(()) } else { Err(rows) }
    });
    assert!(colours().all(|colour| colour.is_none()), "the environment of a failed release");
    assert_eq!(with_colour(&["reload", "web", "--update-env"]).code, 0);
    assert!(colours().all(|colour| colour.as_deref() == Some("green")));
}

#[test]
fn scale_restart_and_start_are_refused_during_a_reload_and_say_what_goes_on() {
    let web = Gated::start("");
    let reload = web.reload_at_the_gate();
    for args in [&["scale", "web", "4"][..], &["scale", "web", "+1"], &["restart", "web"], &["start", "web"]]
    {
        web.home.exits(5, args).says("a reload of `web` is going on");
    }
    assert_eq!(web.home.rows_of("web").len(), 2);
    web.open("v2");
    ends(reload, 0);
    web.balanced();
}

#[test]
fn pain_04_other_apps_are_reloaded_restarted_and_stopped_while_one_hangs_in_its_reload() {
    let web = Gated::start(
        "[[apps]]\nname = 'two'\nscript = 'sleep'\nargs = ['1000']\nmin_uptime = '50ms'\n\
         [[apps]]\nname = 'three'\nscript = 'sleep'\nargs = ['1000']\n",
    );
    let mut reload = web.reload_at_the_gate();
    let before = web.home.pid("two");
    web.home.ok(&["reload", "two"]);
    assert_ne!(web.home.pid("two"), before);
    web.home.ok(&["restart", "three"]);
    web.home.ok(&["scale", "three", "2"]);
    web.home.ok(&["stop", "three"]);
    web.home.ok(&["delete", "two"]);
    assert!(!reload.is_done(), "it hangs");
    web.open("v2");
    ends(reload, 0);
    web.balanced();
}

// Whoever wants it down. ------------------------------------------------------------------------------------------

#[test]
fn delete_during_a_reload_leaves_no_process_no_row_and_no_listener() {
    for draining in [false, true] {
        let web = Gated::start("");
        let reload = if draining { web.reload_that_drains() } else { web.reload_at_the_gate() };
        let delete = web.begin(&["delete", "web"]);
        ends(reload, 1).says("superseded");
        if draining {
            web.let_go("v1");
        }
        ends(delete, 0).does_not_say("killed after");
        assert!(web.home.rows().is_empty());
        assert_eq!(load::get(web.port, "/").unwrap_err(), load::Failure::Refused);
        web.balanced();
    }
}

#[test]
fn stop_during_a_reload_stops_both_generations_and_a_start_brings_back_the_spec_from_before() {
    let web = Gated::start("");
    web.home.ecosystem(&web.config("kill_signal = 'SIGTERM'"));
    web.release("v2");
    let reload = web.begin(&["reload", "ecosystem.toml"]);
    web.wait_for("boot", "v2", 1);
    web.home.ok(&["stop", "web"]);
    ends(reload, 1).says("superseded");
    assert_eq!(load::get(web.port, "/").unwrap_err(), load::Failure::Refused);
    web.balanced();
    web.open("v2");
    web.home.ok(&["start", "web"]);
    // v1's handler is for SIGINT: the release that was given up took its kill_signal along.
    web.home.ok(&["stop", "web"]).does_not_say("killed after");
    assert_eq!(web.count("end", "v2"), 2, "{}", web.home.read("life"));
}

#[test]
fn kill_during_a_reload_ends_everything_and_resurrect_brings_the_app_back() {
    for draining in [false, true] {
        let web = Gated::start("");
        let reload = if draining { web.reload_that_drains() } else { web.reload_at_the_gate() };
        let kill = web.begin(&["kill"]);
        ends(reload, 1).says("superseded");
        if draining {
            web.let_go("v1");
        }
        ends(kill, 0);
        wait_until("nothing is left", SOON, || {
            let left = web.home.processes();
            if left.is_empty() { Ok(()) } else { Err(web.home.process_list()) }
        });
        web.open("v2");
        web.home.ok(&["resurrect"]);
        web.serves("v2");
        web.balanced();
    }
}

#[test]
fn sigterm_of_the_daemon_during_a_reload_ends_everything_and_the_next_daemon_brings_the_app_back() {
    for draining in [false, true] {
        let web = Gated::start("");
        let reload = if draining { web.reload_that_drains() } else { web.reload_at_the_gate() };
        process::signal(web.home.keeper(), Signal::SIGTERM);
        ends(reload, 1);
        if draining {
            web.let_go("v1");
        }
        wait_until("nothing is left", PATIENT, || {
            let left = web.home.processes();
            if left.is_empty() { Ok(()) } else { Err(web.home.process_list()) }
        });
        web.open("v2");
        web.home.ok(&["resurrect"]);
        wait_until("both serve", PATIENT, || {
            let statuses = web.home.statuses("web");
            if statuses == ["online", "online"] { Ok(()) } else { Err(statuses) }
        });
        web.serves("v2");
        web.balanced();
    }
}

#[test]
fn a_keeper_that_is_killed_in_a_reload_is_followed_by_one_that_goes_on_with_it() {
    let web = Gated::start("");
    let reload = web.reload_at_the_gate();
    let before = (web.home.pids("web"), web.last("boot"));
    process::end(web.home.keeper());
    wait_until("another daemon knows of the reload", PATIENT, || {
        let run = web.home.pm(&["scale", "web", "3"]);
        if run.code == 5 { Ok(()) } else { Err(run) }
    });
    assert_eq!((web.home.pids("web"), web.last("boot")), before, "nobody was ended, nothing was started");
    web.serves("v1");
    web.open("v2");
    ends(reload, 0).says("reloaded");
    assert_eq!(web.count("boot", "v2"), 2, "{}", web.home.read("life"));
    web.serves("v2");
    web.balanced();
}

#[test]
fn a_daemon_that_is_killed_as_a_whole_in_a_reload_is_followed_by_one_that_finishes_it_and_nothing_runs_twice()
{
    let web = Gated::start("");
    let reload = web.reload_at_the_gate();
    let (keeper, supervisor) = (web.home.keeper(), web.home.supervisor());
    // The other order would start another supervisor, or another keeper.
    process::signal(keeper, Signal::SIGSTOP);
    process::end(supervisor);
    process::end(keeper);
    // The workers of a cluster end with their channels. A start waits for what the next daemon has begun by itself: nothing serves yet.
    let mut start = web.begin(&["start", "ecosystem.toml"]);
    web.wait_for("boot", "v2", 3);
    // What this daemon remembered is gone with it.
    ends(reload, 1);
    stays("it waits", millis(200), || if start.is_done() { Err("already running") } else { Ok(()) });
    web.open("v2");
    ends(start, 0);
    web.serves("v2");
    assert_eq!(web.count("boot", "v2"), 3, "one before, two after: {}", web.home.read("life"));
    web.balanced();
}

// Deaths. ---------------------------------------------------------------------------------------------------------

#[test]
fn a_new_worker_that_is_killed_while_it_boots_leaves_the_old_ones_untouched() {
    let web = Gated::start("");
    let before: Vec<_> = web.home.pids("web").into_iter().map(process::identity).collect();
    let reload = web.reload_at_the_gate();
    process::end(web.last("boot"));
    ends(reload, 1).says("SIGKILL");
    let after: Vec<_> = web.home.pids("web").into_iter().map(process::identity).collect();
    assert_eq!(after, before);
    web.serves("v1");
    web.balanced();
    web.open("v2");
    web.home.ok(&["reload", "web"]);
    web.serves("v2");
}

#[test]
fn an_old_worker_that_is_killed_while_it_drains_does_not_hold_up_the_reload() {
    let web = Gated::start("");
    let reload = web.reload_that_drains();
    // Until its end the reload goes on with the next slot, and then waits for both.
    web.wait_for("stop", "v1", 2);
    web.home.read("life").lines().filter(|line| line.starts_with("stop ")).for_each(|line| {
        process::end(line.split(' ').nth(2).unwrap().parse().unwrap());
    });
    ends(reload, 0).says("SIGKILL");
    web.serves("v2");
    assert_eq!(web.home.rows_of("web").iter().map(|row| row.restarts).collect::<Vec<_>>(), [1, 1]);
    web.balanced();
}

#[test]
fn old_workers_that_are_killed_before_their_turn_are_replaced_by_the_release() {
    for slot in [0, 1] {
        let web = Gated::start("");
        let reload = web.reload_at_the_gate();
        process::end(web.home.pids("web")[slot]);
        // The other old one serves on.
        web.serves("v1");
        web.open("v2");
        ends(reload, 0);
        web.serves("v2");
        web.balanced();
    }
}

#[test]
fn a_supervisor_that_is_killed_at_the_gate_or_while_draining_finishes_the_reload_and_the_command_learns_it() {
    for draining in [false, true] {
        let web = Gated::start("");
        let load = Load::start(web.port, 2, Connections::OnePerRequest);
        let reload = if draining { web.reload_that_drains() } else { web.reload_at_the_gate() };
        process::end(web.home.supervisor());
        // A second command meets the reload that the next supervisor goes on with.
        wait_until("it is still going on", SOON, || {
            let run = web.home.pm(&["scale", "web", "3"]);
            if run.code == 5 { Ok(()) } else { Err(run) }
        });
        if draining {
            web.let_go("v1");
        } else {
            web.open("v2");
        }
        ends(reload, 0).says("reloaded");
        load.more(50);
        load.stop().lost_nothing(100);
        web.serves("v2");
        assert_eq!(web.count("boot", "v2"), 2, "nothing is started twice: {}", web.home.read("life"));
        web.balanced();
    }
}

#[test]
fn a_reload_of_many_apps_comes_to_all_of_them_although_the_supervisor_is_killed_on_the_way() {
    let home = Home::new();
    let app = |n: u32| {
        format!("[[apps]]\nname = 'app{n}'\nscript = 'sleep'\nargs = ['100{n}']\nmin_uptime = '400ms'\n")
    };
    home.start(&(0..6).map(app).collect::<String>());
    let before: Vec<i32> = home.rows().iter().map(|row| row.pid).collect();
    let reload = Running::start(home.command(&["reload", "all"]), b"");
    // Two at a time: the others have not been begun with.
    wait_until("it is under way", PATIENT, || {
        let left = before.iter().filter(|pid| process::alive(**pid)).count();
        if left == 4 { Ok(()) } else { Err(left) }
    });
    process::end(home.supervisor());
    let run = ends(reload, 0);
    (0..6).for_each(|n| {
        run.says(&format!("app{n}: reloaded"));
    });
    let rows = home.rows();
    assert!(rows.iter().all(|row| !before.contains(&row.pid) && row.restarts == 1), "each once: {rows:#?}");
    Census::balances(&home);
}

#[test]
fn a_command_that_is_killed_or_interrupted_leaves_its_reload_going_on_and_the_result_can_be_asked_for() {
    for signal in [Signal::SIGKILL, Signal::SIGINT] {
        let web = Gated::start("");
        let reload = web.reload_at_the_gate();
        process::signal(reload.pid(), signal);
        let run = reload.end(SOON);
        if signal == Signal::SIGINT {
            run.says("goes on");
        }
        assert_eq!(run.code, if signal == Signal::SIGINT { 130 } else { -9 }, "{run:?}");
        web.home.exits(5, &["scale", "web", "3"]).says("a reload of `web` is going on");
        // What the next command in line gets is not the outcome of the first one.
        let second = web.begin(&["reload", "web"]);
        web.open("v2");
        ends(second, 0);
        assert_eq!(web.count("boot", "v2"), 4, "{}", web.home.read("life"));
        web.serves("v2");
        web.balanced();
    }
}

#[test]
fn a_client_that_vanishes_while_it_waits_in_the_queue_does_not_take_its_reload_along() {
    let web = Gated::start("");
    let first = web.reload_at_the_gate();
    web.release("v3");
    let second = web.begin(&["reload", "web"]);
    let mut third = web.begin(&["reload", "web"]);
    stays("both wait", millis(200), || if third.is_done() { Err("done") } else { Ok(()) });
    process::signal(second.pid(), Signal::SIGKILL);
    assert_eq!(second.end(SOON).code, -9);
    web.open("v2");
    web.open("v3");
    ends(first, 0);
    ends(third, 0);
    web.serves("v3");
    web.balanced();
}

// Starts, stops and restarts in each other's way. -------------------------------------------------------------------

#[test]
fn a_start_during_a_stop_waits_and_the_app_is_up_in_the_end() {
    let web = Gated::start("");
    web.hold("v1");
    let stop = web.begin(&["stop", "web"]);
    web.wait_for("stop", "v1", 2);
    let mut start = web.begin(&["start", "web"]);
    stays("the old ones first", millis(200), || if start.is_done() { Err("started") } else { Ok(()) });
    web.let_go("v1");
    ends(stop, 0);
    ends(start, 0);
    assert_eq!(web.home.statuses("web"), ["online", "online"]);
    assert_eq!(web.count("boot", "v1"), 4);
    web.balanced();
}

#[test]
fn a_second_stop_joins_the_first_and_a_delete_overtakes_it() {
    let web = Gated::start("");
    web.hold("v1");
    let stops: Vec<Running> = (0..2).map(|_| web.begin(&["stop", "web"])).collect();
    web.wait_for("stop", "v1", 2);
    let delete = web.begin(&["delete", "web"]);
    for stop in stops {
        ends(stop, 1).says("superseded");
    }
    web.let_go("v1");
    ends(delete, 0);
    assert!(web.home.rows().is_empty());
    // Each got one signal: a second one in the middle of a clean end would cut it short.
    assert_eq!(web.count("stop", "v1"), 2, "{}", web.home.read("life"));
    web.balanced();
}

#[test]
fn a_restart_does_not_wait_for_the_backoff_and_a_stop_ends_it() {
    let home = Home::new();
    home.write("app.sh", "echo run >> runs\n[ -e fine ] && echo up && exec sleep 1000\nexit 1\n");
    let keys = "restart_delay = '60s'\nmin_uptime = '50ms'\nready = { log = 'up' }\nlisten_timeout = '60s'";
    home.ecosystem(&format!("[[apps]]\nname = 'job'\nscript = 'app.sh'\n{keys}\n"));
    home.exits(1, &["start", "ecosystem.toml"]);
    home.wait_status("job", "waiting restart");
    home.write("fine", "");
    let run = home.ok(&["restart", "job"]);
    assert!(run.took < secs(30), "{run:?}");
    assert_eq!(home.read("runs").lines().count(), 2);
    std::fs::remove_file(home.work_file("fine")).unwrap();
    process::end(home.pid("job"));
    home.wait_status("job", "waiting restart");
    home.ok(&["stop", "job"]);
    assert_eq!(home.statuses("job"), ["stopped"]);
    Census::balances(&home);
}

#[test]
fn scale_up_and_down_overtaken_by_stop_leave_the_number_that_was_asked_for_and_nothing_running() {
    let web = Gated::start("");
    web.release("v2");
    let up = web.begin(&["scale", "web", "4"]);
    web.wait_for("boot", "v2", 2);
    web.home.exits(5, &["scale", "web", "3"]).says("a scale of `web` is going on");
    // The same number joins; one more than the number on its way would be anybody's guess.
    web.home.exits(5, &["scale", "web", "+2"]).says("a scale of `web` is going on");
    web.home.ok(&["stop", "web"]);
    ends(up, 1).says("superseded");
    assert_eq!(web.home.statuses("web"), ["stopped"; 4]);
    web.balanced();
    web.open("v2");
    web.home.ok(&["start", "web"]);
    web.hold("v2");
    let down = web.begin(&["scale", "web", "1"]);
    web.wait_for("stop", "v2", 3);
    let delete = web.begin(&["delete", "web"]);
    ends(down, 1).says("superseded");
    web.let_go("v2");
    ends(delete, 0);
    assert!(web.home.rows().is_empty());
    web.balanced();
}

#[test]
fn pain_26_slots_keep_their_numbers_over_a_reload_a_scale_and_a_crash_that_meet() {
    let web = Gated::start("");
    let reload = web.reload_at_the_gate();
    process::end(web.home.pids("web")[1]);
    web.open("v2");
    ends(reload, 0);
    web.home.ok(&["scale", "web", "3"]);
    web.home.ok(&["scale", "web", "2"]);
    let rows = web.home.rows_of("web");
    assert_eq!(rows.iter().map(|row| row.slot).collect::<Vec<_>>(), [0, 1]);
    let generations: BTreeSet<String> = rows
        .iter()
        .map(|row| {
            let environ = process::environ(row.pid);
            assert_eq!(environ["NODE_APP_INSTANCE"], row.slot.to_string());
            environ["PM_GENERATION"].clone()
        })
        .collect();
    assert!(!generations.contains("1"), "{generations:?}");
    web.balanced();
}
