//! What follows an exit nobody asked for.

use nix::sys::signal::Signal;

use super::support::{Home, SOON, millis, process, secs, stays, wait_until};

/// A script that notes each of its starts with the time in nanoseconds.
fn noting(rest: &str) -> String {
    format!("date +%s%N >>starts\n{rest}\n")
}

/// Milliseconds between the starts so far.
fn gaps(home: &Home) -> Vec<u64> {
    let starts: Vec<u64> = home.read("starts").lines().filter_map(|line| line.parse().ok()).collect();
    starts.windows(2).map(|pair| (pair[1] - pair[0]) / 1_000_000).collect()
}

fn wait_gaps(home: &Home, count: usize) -> Vec<u64> {
    wait_until(&format!("{count} restarts"), SOON, || {
        let seen = gaps(home);
        if seen.len() >= count { Ok(seen) } else { Err(seen) }
    })
}

/// Starts a file whose app is expected to fail at once. It is ready when it says so: on a busy machine it may take longer
/// to its exit than an app has to live otherwise.
fn start_failing(home: &Home, keys: &str) {
    let ready = "ready = { log = 'up' }\nlisten_timeout = '60s'";
    home.ecosystem(&format!("[[apps]]\nname = 'app'\nscript = 'app.sh'\n{ready}\n{keys}\n"));
    home.exits(1, &["start", "ecosystem.toml"]);
}

#[test]
fn pain_25_exponential_backoff_is_on_by_default() {
    let home = Home::alone();
    home.write("app.sh", &noting("exit 1"));
    start_failing(&home, "");
    let gaps = wait_gaps(&home, 6);
    assert!(gaps[0] < 90, "at once: {gaps:?}");
    // 100 ms × 1.5ⁿ, ± 10 %; what a start costs on a busy machine comes on top.
    for (n, step) in [100, 150, 225, 337, 506].into_iter().enumerate() {
        let gap = gaps[n + 1];
        assert!(gap >= step * 88 / 100, "gap {} of {gaps:?}", n + 1);
        assert!(gap <= step * 112 / 100 + 400, "gap {} of {gaps:?}", n + 1);
    }
    let row = home.wait_status("app", "waiting restart");
    assert_eq!(row.pid, 0, "no stale pid");
}

#[test]
fn a_run_of_quick_exits_ends_in_errored_after_max_restarts() {
    let home = Home::new();
    home.write("app.sh", &noting("exit 1"));
    start_failing(&home, "max_restarts = 4\nexp_backoff_restart_delay = '20ms'");
    let row = home.wait_status("app", "errored");
    assert_eq!(gaps(&home).len() + 1, 4, "as many starts as max_restarts");
    assert_eq!(row.env("exit_code"), 1);
    stays("it stays errored", secs(1), || {
        let row = home.row("app");
        if row.status == "errored" && row.pid == 0 { Ok(()) } else { Err(row) }
    });
    home.ok(&["list"]).says("errored");
    // A start by hand begins anew.
    home.write("app.sh", &noting("echo up; exec sleep 1000"));
    home.ok(&["restart", "app"]);
    assert_eq!(home.row("app").status, "online");
}

#[test]
fn exits_after_min_uptime_never_end_in_errored() {
    let home = Home::new();
    home.write("app.sh", &noting("sleep 0.3; exit 1"));
    home.start(
        "[[apps]]\nname = 'app'\nscript = 'app.sh'\nmax_restarts = 2\nmin_uptime = '100ms'\nbackoff_reset = '200ms'\n",
    );
    let gaps = wait_gaps(&home, 5);
    assert!(gaps.iter().all(|gap| *gap < 1000), "{gaps:?}");
    assert_ne!(home.row("app").status, "errored");
}

#[test]
fn exits_before_min_uptime_do() {
    let home = Home::new();
    home.write("app.sh", &noting("sleep 0.3; exit 1"));
    home.start("[[apps]]\nname = 'app'\nscript = 'app.sh'\nmax_restarts = 2\nmin_uptime = '5s'\n");
    home.wait_status("app", "errored");
    assert_eq!(gaps(&home).len(), 1);
}

#[test]
fn pain_25_backoff_is_reset_after_stable_uptime() {
    let home = Home::new();
    home.write("app.sh", &noting("sleep 0.4; exit 1"));
    home.start("[[apps]]\nname = 'app'\nscript = 'app.sh'\nbackoff_reset = '200ms'\n");
    let gaps = wait_gaps(&home, 4);
    assert!(gaps.iter().all(|gap| *gap < 400 + 250), "every restart at once: {gaps:?}");
}

#[test]
fn stop_exit_codes_end_in_stopped() {
    let home = Home::new();
    home.write("app.sh", &noting("sleep 0.3; exit 3"));
    home.start("[[apps]]\nname = 'app'\nscript = 'app.sh'\nstop_exit_codes = [0, 3]\n");
    let row = home.wait_status("app", "stopped");
    assert_eq!(row.env("exit_code"), 3);
    assert!(gaps(&home).is_empty());
}

#[test]
fn stop_exit_codes_never_match_a_signal() {
    let home = Home::new();
    home.start("[[apps]]\nname = 'app'\nscript = 'sleep'\nargs = ['1000']\nstop_exit_codes = [0, 9, 137]\n");
    let pid = home.pid("app");
    process::signal(pid, Signal::SIGKILL);
    let row = home.wait_row("app", "started again", |row| row.status == "online" && row.pid != pid);
    assert_eq!(row.restarts, 1);
}

#[test]
fn restart_delay_counts_for_the_first_restart_too() {
    let home = Home::new();
    home.write("app.sh", &noting("exit 1"));
    start_failing(&home, "restart_delay = '400ms'");
    let gaps = wait_gaps(&home, 3);
    assert!(gaps.iter().all(|gap| (400..900).contains(gap)), "fixed, not growing: {gaps:?}");
}

#[test]
fn exp_backoff_restart_delay_is_the_first_step() {
    let home = Home::new();
    home.write("app.sh", &noting("exit 1"));
    start_failing(&home, "exp_backoff_restart_delay = '400ms'");
    let gaps = wait_gaps(&home, 3);
    // Whether the first one comes at once is the backoff's business; the second waits one step, the third 1.5.
    assert!((350..800).contains(&gaps[1]), "{gaps:?}");
    assert!((530..1100).contains(&gaps[2]), "{gaps:?}");
}

#[test]
fn autorestart_false_leaves_it_stopped_with_its_code() {
    let home = Home::new();
    home.write("app.sh", &noting("sleep 0.3; exit 6"));
    home.start("[[apps]]\nname = 'app'\nscript = 'app.sh'\nautorestart = false\n");
    let row = home.wait_status("app", "stopped");
    assert_eq!(row.env("exit_code"), 6);
    stays("no restart", secs(1), || if gaps(&home).is_empty() { Ok(()) } else { Err(gaps(&home)) });
}

#[test]
fn pain_21_stop_wins_against_a_pending_restart() {
    let home = Home::new();
    home.write("app.sh", &noting("exit 1"));
    start_failing(&home, "restart_delay = '1500ms'");
    home.wait_status("app", "waiting restart");
    let run = home.ok(&["stop", "app"]);
    assert!(run.took < secs(1), "{run:?}");
    let starts = gaps(&home).len();
    stays("it stays stopped", secs(3), || {
        let row = home.row("app");
        if row.status == "stopped" && gaps(&home).len() == starts {
            Ok(())
        } else {
            Err((row.status, gaps(&home)))
        }
    });
}

#[test]
fn pain_21_delete_wins_against_a_pending_restart() {
    let home = Home::new();
    home.write("app.sh", &noting("exit 1"));
    start_failing(&home, "restart_delay = '1s'");
    home.wait_status("app", "waiting restart");
    home.ok(&["delete", "app"]);
    let starts = gaps(&home).len();
    stays("nothing starts", secs(2), || if gaps(&home).len() == starts { Ok(()) } else { Err(gaps(&home)) });
    assert!(home.rows().is_empty());
}

#[test]
fn an_exit_by_signal_is_shown_as_one() {
    let home = Home::new();
    home.start("[[apps]]\nname = 'app'\nscript = 'sleep'\nargs = ['1000']\nautorestart = false\n");
    process::signal(home.pid("app"), Signal::SIGSEGV);
    home.wait_status("app", "stopped");
    home.ok(&["describe", "app"]).says("SIGSEGV");
}

#[test]
fn a_killed_app_is_back_within_milliseconds() {
    let home = Home::alone();
    home.write("app.sh", &noting("exec sleep 1000"));
    home.start("[[apps]]\nname = 'app'\nscript = 'app.sh'\n");
    let pid = home.pid("app");
    process::signal(pid, Signal::SIGKILL);
    let killed = std::time::Instant::now();
    wait_until("its successor runs", SOON, || if gaps(&home).len() == 1 { Ok(()) } else { Err(gaps(&home)) });
    let took = std::time::Instant::now().duration_since(killed);
    assert!(took < millis(500), "{took:?}");
}

#[test]
fn pain_25_the_table_says_why_an_app_is_down_and_when_it_is_tried_again() {
    let home = Home::new();
    home.write("app.sh", &noting("exit 3"));
    start_failing(&home, "max_restarts = 3\nexp_backoff_restart_delay = '8s'");
    home.wait_status("app", "waiting restart");
    let list = home.ok(&["list"]);
    list.says("waiting restart").says("exit code 3").says("restart in");
    home.wait_status("app", "errored");
    home.ok(&["list"]).says("errored").says("exit code 3");
}
