//! What hurts with other process managers, each sentence a test: `pain_NN_…` (`docs/pains.md` has the list).
//!
//! Those that are about something else stand with their subject; this file has what is about nothing but the pain.

use std::time::Duration;

use super::support::{Home, PATIENT, fixture, free_port, millis, secs};

fn paced(home: &Home, instances: u32, more: &str) {
    home.start(&format!(
        "[[apps]]\nname = 'web'\nscript = '{}'\nexec_mode = 'cluster'\ninstances = {instances}\nwait_ready = true\n\
         listen_timeout = '60s'\nenv = {{ PORT = '{}', BOOT_MS = '300', LEAVE_MS = '700' }}\n{more}\n",
        fixture("paced.js"),
        free_port()
    ));
}

#[test]
fn pain_02_a_reload_takes_as_long_as_its_boots_in_turn_and_one_drain_never_as_long_as_listen_timeout() {
    // Everything is compared within this run: what a boot takes on this machine at this time is measured first.
    let home = Home::alone();
    let reload = |home: &Home| home.ok(&["reload", "web"]).took;
    paced(&home, 1, "");
    let one = reload(&home);
    home.ok(&["scale", "web", "4"]);
    let four = reload(&home);
    home.ok(&["delete", "web"]);
    paced(&home, 4, "max_surge = 2");
    let two_at_a_time = reload(&home);
    eprintln!("one {one:?}, four in turn {four:?}, four by twos {two_at_a_time:?}");
    assert!(four >= millis(4 * 300), "in turn: {four:?}");
    // Four boots and one drain; with a drain after each boot it would be four times as long as one.
    assert!(four < one * 3, "drains overlap with boots: {four:?}, one takes {one:?}");
    assert!(two_at_a_time < four.mul_f64(0.85), "{two_at_a_time:?} by twos, {four:?} in turn");
    assert!(two_at_a_time >= millis(2 * 300 + 700), "{two_at_a_time:?}");
}

/// How often every app of the next test is started again; `bench/ready.sh` does it for long.
const ROUNDS: u64 = 2;

/// Five ways of saying "ready" with the very first thing an app does. The shells have said it a millisecond after
/// exec(2), long before a supervisor knows their pid.
fn ready_at_once(home: &Home) -> u64 {
    home.write("pipe.sh", "printf '\\n' >&$PM_READY_FD\nexec sleep 1000\n");
    home.write("channel.sh", "printf '\"ready\"\\n' >&$NODE_CHANNEL_FD\nexec sleep 1000\n");
    home.write("node.js", "process.send('ready');\nsetInterval(() => {}, 1e6);\n");
    home.write(
        "notify.py",
        "import os, socket, time\n\
         socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'READY=1\\n', os.environ['NOTIFY_SOCKET'])\n\
         time.sleep(1000)\n",
    );
    let app = |name: &str, script: &str, instances: u32, mode: &str| {
        format!(
            "[[apps]]\nname = '{name}'\nscript = '{script}'\ninstances = {instances}\nexec_mode = '{mode}'\n\
             wait_ready = true\nlisten_timeout = '20s'\n"
        )
    };
    home.start(
        &[
            app("pipe", "pipe.sh", 8, "fork"),
            app("channel", "channel.sh", 8, "fork"),
            app("node", "node.js", 4, "fork"),
            app("worker", "node.js", 4, "cluster"),
            app("notify", "notify.py", 2, "fork"),
        ]
        .concat(),
    );
    8 + 8 + 4 + 4 + 2
}

#[test]
fn pain_02_ready_as_the_first_statement_is_never_missed() {
    let home = Home::new();
    let rounds = std::env::var("PM_READY_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(ROUNDS);
    let each = ready_at_once(&home);
    let mut slowest = Duration::ZERO;
    for round in 1..=rounds {
        // A ready that is missed makes this fail after listen_timeout.
        let run = home.ok(&["restart", "all"]);
        slowest = slowest.max(run.took);
        if round % 10 == 0 {
            eprintln!("{round} rounds of {each} starts, the slowest took {slowest:?}");
        }
    }
    assert!(
        home.rows()
            .iter()
            .all(|row| row.status == "online" && row.restarts == i64::try_from(rounds).unwrap())
    );
    eprintln!("{} starts, none missed; the slowest round of {each} took {slowest:?}", (rounds + 1) * each);
}

#[test]
fn pain_02_one_ready_is_enough_and_a_reload_by_name_honours_every_timeout_of_the_config() {
    let home = Home::new();
    home.write(
        "app.js",
        "process.send('ready');\nprocess.on('SIGINT', () => {});\nsetInterval(() => {}, 1e6);\n",
    );
    home.start(
        "[[apps]]\nname = 'app'\nscript = 'app.js'\nexec_mode = 'cluster'\ninstances = 1\nwait_ready = true\n\
         listen_timeout = '2s'\nkill_timeout = '500ms'\n",
    );
    // The file is not read again.
    home.ecosystem("broken on purpose");
    // wait_ready by one message; and kill_timeout: the old one ignores its signal.
    let old = home.pid("app");
    home.ok(&["reload", "app"]).says("killed after 5");
    assert_ne!(home.pid("app"), old);
    // wait_ready and listen_timeout: this one runs, and says nothing.
    let old = home.pid("app");
    home.write("app.js", "setInterval(() => {}, 1e6);\n");
    let run = home.exits(1, &["reload", "app"]);
    run.says("not ready within 2");
    assert!(run.took >= secs(2) && run.took < PATIENT, "{run:?}");
    assert_eq!(home.pid("app"), old, "a time-out is a failure, and changes nothing");
}
