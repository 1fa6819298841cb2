//! Nothing escapes: stop returns when every process of the app is gone and its port is free.

use std::net::{TcpListener, TcpStream};

use super::support::load;
use super::support::{Home, PATIENT, SOON, fixture, free_port, millis, process, secs, wait_until};

fn assert_free(port: u16) {
    // No SO_REUSEADDR trick is needed: nobody listens.
    assert!(TcpStream::connect(("127.0.0.1", port)).is_err(), "somebody still answers on {port}");
    TcpListener::bind(("127.0.0.1", port)).unwrap();
}

fn escape_is_stopped(way: &str) {
    let home = Home::new();
    let port = free_port();
    home.start(&format!(
        "[[apps]]\nname = 'tree'\nscript = '{}'\nargs = ['{way}']\nenv = {{ PORT = '{port}' }}\nkill_timeout = '2s'\n",
        fixture("escapes.py")
    ));
    let escaped: i32 = home.file_with("escaped", "\n").trim().parse().unwrap();
    assert!(process::alive(escaped));
    let run = home.ok(&["stop", "tree"]);
    assert!(!process::alive(escaped), "{way}: {}", process::describe(escaped));
    assert_free(port);
    assert!(run.took < secs(8), "{run:?}");
    assert_eq!(home.row("tree").status, "stopped");
}

#[test]
fn a_child_that_ignores_signals_ends_with_its_app() {
    escape_is_stopped("child");
}

#[test]
fn a_child_in_a_session_of_its_own_ends_with_its_app() {
    escape_is_stopped("setsid");
}

#[test]
fn a_child_that_forked_twice_ends_with_its_app() {
    escape_is_stopped("double");
}

#[test]
fn a_child_that_forked_twice_into_a_session_of_its_own_ends_with_its_app() {
    escape_is_stopped("both");
}

#[test]
fn what_a_main_process_leaves_behind_is_ended_before_its_successor_starts() {
    let home = Home::new();
    let port = free_port();
    home.start(&format!(
        "[[apps]]\nname = 'tree'\nscript = '{}'\nargs = ['both', 'then-exit']\nenv = {{ PORT = '{port}' }}\n\
         autorestart = false\nmin_uptime = '100ms'\n",
        fixture("escapes.py")
    ));
    let escaped: i32 = home.file_with("escaped", "\n").trim().parse().unwrap();
    let row = home.wait_status("tree", "stopped");
    assert_eq!(row.env("exit_code"), 5);
    assert!(!process::alive(escaped), "{}", process::describe(escaped));
    assert_free(port);
}

#[test]
fn npm_start_stops_at_once_and_the_handler_of_the_app_has_run() {
    let home = Home::alone();
    let port = free_port();
    home.write(
        "package.json",
        "{\"name\":\"x\",\"version\":\"1.2.3\",\"scripts\":{\"start\":\"node app.js\"}}",
    );
    home.write(
        "app.js",
        "const server = require('http').createServer((q, r) => r.end('ok'));\n\
         server.listen(Number(process.env.PORT), '127.0.0.1');\n\
         process.on('SIGINT', () => server.close(() => {\n\
           require('fs').writeFileSync('handled', 'by the app\\n');\n  process.exit(0);\n}));\n",
    );
    home.start(&format!(
        "[[apps]]\nname = 'npm'\nscript = 'npm'\nargs = ['start']\nenv = {{ PORT = '{port}' }}\n"
    ));
    wait_until("the app answers", PATIENT, || load::get(port, "/"));
    let tree = process::tree(home.pid("npm"));
    assert!(tree.len() >= 2, "npm, perhaps a shell, and node: {tree:?}");
    let run = home.ok(&["stop", "npm"]);
    assert!(run.took < millis(200), "{run:?}");
    assert_eq!(home.read("handled"), "by the app\n");
    assert!(tree.iter().all(|pid| !process::alive(*pid)));
    assert_free(port);
}

#[test]
fn the_program_at_the_end_of_a_chain_of_shells_gets_the_signal() {
    let home = Home::new();
    let app = fixture("life.py");
    home.start(&format!(
        "[[apps]]\nname = 'chain'\nscript = 'sh'\nargs = ['-c', \"bash -c 'python3 {app}; true'; true\"]\n"
    ));
    home.file_with("life", "boot");
    home.ok(&["stop", "chain"]).does_not_say("killed after");
    assert_eq!(home.read("life"), "boot\nSIGINT\n");
}

#[test]
fn a_shell_script_with_a_trap_gets_to_run_it() {
    let home = Home::new();
    home.write(
        "app.sh",
        "trap 'echo trapped >trapped; exit 0' INT\necho up >up\nwhile :; do sleep 0.1; done\n",
    );
    home.start("[[apps]]\nname = 'trap'\nscript = 'app.sh'\nkill_timeout = '3s'\n");
    home.file_with("up", "up");
    home.ok(&["stop", "trap"]).does_not_say("killed after");
    assert_eq!(home.read("trapped"), "trapped\n");
}

#[test]
fn pain_09_kill_timeout_ends_what_does_not_listen_and_the_status_is_stopping_until_then() {
    let home = Home::new();
    home.write(
        "app.py",
        "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nopen('up', 'w').write('up')\n\
         while True: signal.pause()\n",
    );
    home.start("[[apps]]\nname = 'deaf'\nscript = 'app.py'\nkill_timeout = '4s'\n");
    home.file_with("up", "up");
    let pid = home.pid("deaf");
    let stop = super::support::home::Running::start(home.command(&["stop", "deaf"]), b"");
    home.wait_status("deaf", "stopping");
    assert!(process::alive(pid), "stopping as long as it lives");
    let run = stop.end(PATIENT);
    assert_eq!(run.code, 0, "{run:?}");
    // The default is 10 s.
    assert!(run.took >= millis(3900) && run.took < secs(10), "{run:?}");
    run.says("killed after");
    assert!(!process::alive(pid));
}

#[test]
fn a_stopped_process_is_woken_to_hear_its_signal() {
    let home = Home::new();
    let app = fixture("life.py");
    home.start(&format!("[[apps]]\nname = 'job'\nscript = '{app}'\n"));
    home.file_with("life", "boot");
    process::signal(home.pid("job"), nix::sys::signal::Signal::SIGSTOP);
    home.ok(&["stop", "job"]).does_not_say("killed after");
    assert_eq!(home.read("life"), "boot\nSIGINT\n");
}

#[test]
fn stop_cuts_no_request_in_flight() {
    let home = Home::new();
    let port = free_port();
    home.write(
        "app.js",
        "require('http').createServer((q, r) => setTimeout(() => r.end('whole'), q.url === '/slow' ? 700 : 0))\n\
         .listen(Number(process.env.PORT), '127.0.0.1', () => console.log('listening'))\n\
         .on('request', (q) => q.url === '/slow' && console.log('in flight'));\n",
    );
    home.start(&format!(
        "[[apps]]\nname = 'web'\nscript = 'app.js'\nexec_mode = 'cluster'\ninstances = 1\n\
         env = {{ PORT = '{port}' }}\n"
    ));
    let slow = std::thread::spawn(move || load::get(port, "/slow"));
    wait_until("the request is in flight", SOON, || {
        let log = home.log("web-out.log") + &home.log("web-out-0.log");
        if log.contains("in flight") { Ok(()) } else { Err(log) }
    });
    home.ok(&["stop", "web"]);
    assert_eq!(slow.join().unwrap().unwrap().body, "whole");
    assert_free(port);
}

#[test]
fn the_port_is_free_when_delete_returns_and_can_be_used_again_at_once() {
    let home = Home::new();
    let port = free_port();
    for _ in 0..5 {
        home.start(&format!(
            "[[apps]]\nname = 'web'\nscript = '{}'\nexec_mode = 'cluster'\ninstances = 2\n\
             env = {{ PORT = '{port}' }}\n",
            fixture("web-textbook.js")
        ));
        load::get(port, "/").unwrap();
        home.ok(&["delete", "web"]);
        assert_free(port);
    }
}
