//! Pain 9: one way down for everything that ends an instance: the signal, `kill_timeout`, SIGKILL; `stopping` until the
//! process is gone; and what it said on the way is in the log.

use super::support::home::Running;
use super::support::{Home, PATIENT, Row, SOON, millis, process, wait_until};

/// Every command that ends instances, and those slots of the two that it ends.
const WAYS: [(&[&str], &[usize]); 5] = [
    (&["scale", "app", "1"], &[1]),
    (&["restart", "app"], &[0, 1]),
    (&["reload", "app"], &[0, 1]),
    (&["stop", "app"], &[0, 1]),
    (&["delete", "app"], &[0, 1]),
];

/// Says what it hears, and leaves when the test lets it.
const APP: &str = "import os, signal, sys, time\n\
    def heard(number, _):\n\
    \x20   print(os.getpid(), 'heard', signal.Signals(number).name, flush=True)\n\
    \x20   while not os.path.exists(f'leave-{os.getpid()}'):\n\
    \x20       time.sleep(0.01)\n\
    \x20   print(os.getpid(), 'last words', flush=True)\n\
    \x20   sys.stdout.write(f'{os.getpid()} no newline')\n\
    \x20   sys.exit(0)\n\
    signal.signal(signal.SIGINT, heard)\n\
    print(os.getpid(), 'up', flush=True)\n\
    while True: signal.pause()\n";

fn start(kill_timeout: &str) -> Home {
    let home = Home::new();
    home.write("app.py", APP);
    home.start(&format!(
        "[[apps]]\nname = 'app'\nscript = 'app.py'\nexec_mode = 'fork'\ninstances = 2\nmin_uptime = '50ms'\n\
         kill_timeout = '{kill_timeout}'\n"
    ));
    home
}

/// The pids that a command will end, each with its log, once all have their handlers.
fn all_up(home: &Home, slots: &[usize]) -> Vec<(i32, String)> {
    let rows = home.rows_of("app");
    // Ids count up: a slot that was scaled away and comes back has another one.
    let log_of = |row: &Row| format!("app-out-{}.log", row.id);
    for row in &rows {
        home.log_with(&log_of(row), &format!("{} up\n", row.pid));
    }
    slots.iter().map(|slot| (rows[*slot].pid, log_of(&rows[*slot]))).collect()
}

/// Brings back what a command has ended.
fn go_on(home: &Home, command: &[&str]) {
    match command[0] {
        "scale" => drop(home.ok(&["scale", "app", "2"])),
        "stop" => {
            assert_eq!(home.statuses("app"), ["stopped", "stopped"]);
            home.ok(&["start", "app"]);
        }
        "delete" => assert!(home.rows_of("app").is_empty()),
        _ => assert_eq!(home.statuses("app"), ["online", "online"]),
    }
}

#[test]
fn pain_09_stop_reload_restart_scale_down_and_delete_send_sigint_are_stopping_until_wait_and_lose_no_last_word()
 {
    let home = start("60s");
    for (command, slots) in WAYS {
        let pids = all_up(&home, slots);
        let mut running = Running::start(home.command(command), b"");
        for (pid, log) in &pids {
            home.log_with(log, &format!("{pid} heard SIGINT\n"));
            wait_until(&format!("{command:?}: {pid} is stopping"), SOON, || {
                let rows = home.rows_of("app");
                let stopping = rows.iter().any(|row| row.pid == *pid && row.status == "stopping");
                if stopping { Ok(()) } else { Err(rows) }
            });
            assert!(process::alive(*pid) && !running.is_done(), "{command:?} waits for it");
            home.write(&format!("leave-{pid}"), "");
            home.log_with(log, &format!("{pid} heard SIGINT\n{pid} last words\n{pid} no newline"));
        }
        let run = running.end(PATIENT);
        assert_eq!(run.code, 0, "{run:#?}");
        run.does_not_say("killed after");
        assert!(pids.iter().all(|(pid, _)| !process::alive(*pid)), "{command:?} has returned");
        go_on(&home, command);
    }
}

#[test]
fn pain_09_stop_reload_restart_scale_down_and_delete_kill_after_kill_timeout_and_not_before() {
    let home = start("400ms");
    for (command, slots) in WAYS {
        let pids = all_up(&home, slots);
        let run = home.ok(command);
        assert!(run.took >= millis(400), "{run:?}");
        // A line each; the summary counts them with "force-killed after".
        let text = run.text().replace("force-killed after", "");
        assert_eq!(text.matches("killed after").count(), pids.len(), "{run:#?}");
        for (pid, log) in &pids {
            assert!(!process::alive(*pid), "{command:?} has returned");
            let log = home.log(log);
            assert_eq!(log.matches(&format!("{pid} heard SIGINT\n")).count(), 1, "{command:?}: {log}");
            assert!(!log.contains(&format!("{pid} last words")), "{log}");
        }
        go_on(&home, command);
    }
}
