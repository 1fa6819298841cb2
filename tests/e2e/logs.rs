//! Log files: their names, their lines, and the command that shows them.

use nix::sys::signal::Signal;

use super::support::home::Running;
use super::support::{Home, SOON, process, wait_until};

const TALK: &str = "echo to out\necho to err >&2\nexec sleep 1000\n";

fn talking(home: &Home, keys: &str) {
    home.write("app.sh", TALK);
    home.start(&format!("[[apps]]\nname = 'my app'\nscript = 'app.sh'\n{keys}\n"));
}

fn files(home: &Home) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(home.path().join("logs"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_single_instance_writes_to_name_out_and_name_error() {
    let home = Home::new();
    talking(&home, "");
    assert_eq!(home.log_with("my-app-out.log", "out"), "to out\n");
    assert_eq!(home.log_with("my-app-error.log", "err"), "to err\n");
    assert_eq!(files(&home), ["my-app-error.log", "my-app-out.log"]);
    let row = home.row("my app");
    let path = home.path().join("logs/my-app-out.log");
    assert_eq!(row.env("pm_out_log_path"), path.to_str().unwrap());
}

#[test]
fn several_instances_have_their_id_in_the_name() {
    let home = Home::new();
    talking(&home, "instances = 2\nexec_mode = 'fork'");
    for id in [0, 1] {
        home.log_with(&format!("my-app-out-{id}.log"), "to out\n");
        home.log_with(&format!("my-app-error-{id}.log"), "to err\n");
    }
    assert_eq!(files(&home).len(), 4);
}

#[test]
fn merge_logs_puts_all_instances_into_one_file() {
    let home = Home::new();
    talking(&home, "instances = 3\nexec_mode = 'fork'\nmerge_logs = true");
    wait_until("three lines in one file", SOON, || {
        let log = home.log("my-app-out.log");
        if log == "to out\n".repeat(3) { Ok(()) } else { Err(log) }
    });
    assert_eq!(files(&home), ["my-app-error.log", "my-app-out.log"]);
}

#[test]
fn merge_logs_false_puts_the_id_into_the_name_of_a_single_instance() {
    let home = Home::new();
    talking(&home, "merge_logs = false");
    home.log_with("my-app-out-0.log", "to out\n");
}

#[test]
fn out_file_and_error_file_are_where_output_goes_and_missing_directories_are_made() {
    let home = Home::new();
    talking(&home, "out_file = 'deep/er/out.txt'\nerror_file = '/dev/null'");
    assert_eq!(home.file_with("deep/er/out.txt", "out"), "to out\n");
    assert!(files(&home).is_empty(), "{:?}", files(&home));
}

#[test]
fn time_puts_a_stamp_before_each_line() {
    let home = Home::new();
    talking(&home, "time = true");
    let log = home.log_with("my-app-out.log", "out");
    let (stamp, text) = log.split_once(": ").unwrap();
    assert_eq!(text, "to out\n");
    let shape: String = stamp.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
    assert_eq!(shape, "0000-00-00T00:00:00");
}

#[test]
fn log_date_format_is_the_shape_of_the_stamp() {
    let home = Home::new();
    talking(&home, "log_date_format = 'DD/MM/YY HH:mm:ss.SSS Z'");
    let log = home.log_with("my-app-out.log", "out");
    let stamp = log.strip_suffix(": to out\n").unwrap_or_else(|| panic!("{log}"));
    let shape: String = stamp.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
    assert_eq!(shape, "00/00/00 00:00:00.000 +00:00");
}

#[test]
fn each_line_has_one_stamp_however_it_was_written() {
    let home = Home::new();
    home.write(
        "app.py",
        "import os, time\nos.write(1, b'one\\ntwo\\nthr')\ntime.sleep(0.1)\nos.write(1, b'ee\\nfour')\ntime.sleep(1000)\n",
    );
    home.start("[[apps]]\nname = 'app'\nscript = 'app.py'\ntime = true\n");
    // A line that is not ended may wait for its end for a while, but not for ever.
    let log = home.log_with("app-out.log", "four");
    let texts: Vec<&str> =
        log.lines().map(|line| line.split_once(": ").map_or(line, |(_, text)| text)).collect();
    assert_eq!(texts, ["one", "two", "three", "four"]);
}

#[test]
fn last_words_are_captured_however_the_app_ends() {
    for (n, end) in ["os._exit(1)", "os.kill(os.getpid(), 9)"].into_iter().enumerate() {
        let home = Home::new();
        home.write(
            "app.py",
            &format!(
                "import os, time\ntime.sleep(0.3)\n\
                 for i in range(600): os.write(1, b'%04d ' % i + b'x' * 94 + b'\\n')\n\
                 os.write(2, b'last words, not even a whole line')\n{end}\n"
            ),
        );
        home.start(&format!("[[apps]]\nname = 'app{n}'\nscript = 'app.py'\nautorestart = false\n"));
        home.wait_status(&format!("app{n}"), "stopped");
        // When the row says stopped, everything is in the file.
        let log = home.log(&format!("app{n}-out.log"));
        assert_eq!(log.lines().count(), 600, "{end}");
        assert!(log.ends_with(&format!("0599 {}\n", "x".repeat(94))), "{end}");
        assert!(home.log(&format!("app{n}-error.log")).starts_with("last words, not even a whole line"));
    }
}

#[test]
fn pain_09_what_a_handler_says_while_stopping_is_in_the_log() {
    let home = Home::new();
    home.write(
        "app.js",
        "process.on('SIGINT', () => { console.log('goodbye from the handler'); process.exit(0); });\n\
         console.log('up');\nsetInterval(() => {}, 1e6);\n",
    );
    home.start("[[apps]]\nname = 'app'\nscript = 'app.js'\n");
    home.log_with("app-out.log", "up\n");
    home.ok(&["stop", "app"]);
    assert_eq!(home.log("app-out.log"), "up\ngoodbye from the handler\n");
}

#[test]
fn lines_are_neither_lost_nor_doubled_over_restarts_and_reloads() {
    let home = Home::new();
    home.write(
        "app.py",
        "import os, signal, sys\n\
         def end(*_):\n    os.write(1, b'end %d\\n' % os.getpid()); os._exit(0)\n\
         signal.signal(signal.SIGINT, end)\nos.write(1, b'begin %d\\n' % os.getpid())\n\
         while True: signal.pause()\n",
    );
    home.start("[[apps]]\nname = 'app'\nscript = 'app.py'\nmin_uptime = '300ms'\n");
    home.log_with("app-out.log", "begin");
    for _ in 0..3 {
        home.ok(&["reload", "app"]);
    }
    home.ok(&["stop", "app"]);
    let log = home.log("app-out.log");
    let lines: Vec<&str> = log.lines().collect();
    assert_eq!(lines.len(), 8, "{log}");
    for pair in lines.chunks(2) {
        assert_eq!(pair[0].replace("begin", "end"), pair[1], "{log}");
    }
}

#[test]
fn binary_bytes_and_broken_utf8_arrive_as_they_are() {
    let home = Home::new();
    home.write(
        "app.py",
        "import os, time\nos.write(1, bytes(range(1, 256)) + b'\\n\\xff\\xfe\\xc3\\ndone\\n')\ntime.sleep(1000)\n",
    );
    home.start("[[apps]]\nname = 'app'\nscript = 'app.py'\n");
    home.log_with("app-out.log", "done\n");
    let bytes = std::fs::read(home.path().join("logs/app-out.log")).unwrap();
    let mut expected: Vec<u8> = (1..=255).collect();
    expected.extend(b"\n\xff\xfe\xc3\ndone\n");
    assert_eq!(bytes, expected);
}

#[test]
fn a_log_storm_does_not_grow_the_daemon_and_arrives_whole() {
    let home = Home::alone();
    home.write(
        "app.py",
        "import os, time\nline = b'y' * 99 + b'\\n'\n\
         for _ in range(500): os.write(1, line * 600)\n\
         os.write(2, b'done\\n')\ntime.sleep(1000)\n",
    );
    home.start("[[apps]]\nname = 'storm'\nscript = 'app.py'\n");
    home.log_with("storm-error.log", "done");
    let path = home.path().join("logs/storm-out.log");
    wait_until("30 MB are in the file", SOON, || {
        let size = std::fs::metadata(&path).unwrap().len();
        if size == 30_000_000 { Ok(()) } else { Err(size) }
    });
    let rss: u64 = process::smaps_kib(home.supervisor(), "Pss_Anon");
    assert!(rss < 24 * 1024, "{rss} KiB of the supervisor's own");
}

#[test]
fn logs_nostream_shows_the_last_lines_and_ends() {
    let home = Home::new();
    home.write("app.sh", "for n in $(seq 50); do echo out $n; echo err $n >&2; done\nexec sleep 1000\n");
    home.start("[[apps]]\nname = 'app'\nscript = 'app.sh'\n");
    home.log_with("app-out.log", "out 50\n");
    home.log_with("app-error.log", "err 50\n");
    let all = home.ok(&["logs", "app", "--nostream"]);
    all.says("out 50").says("err 50").says("out 36").does_not_say("out 35\n");
    let few = home.ok(&["logs", "app", "--nostream", "--lines", "2"]);
    few.says("out 49").says("out 50").does_not_say("out 48");
    home.ok(&["logs", "app", "--nostream", "--err"]).says("err 50").does_not_say("out 50");
    home.ok(&["logs", "app", "--nostream", "--out"]).says("out 50").does_not_say("err 50");
    let raw = home.ok(&["logs", "app", "--nostream", "--out", "--raw", "--lines", "3"]);
    assert_eq!(raw.out, "out 48\nout 49\nout 50\n");
}

#[test]
fn logs_names_the_app_before_each_line_unless_raw() {
    let home = Home::new();
    talking(&home, "");
    home.log_with("my-app-out.log", "to out");
    let run = home.ok(&["logs", "--nostream", "--out"]);
    assert!(run.out.lines().any(|line| line.contains("my app") && line.ends_with("to out")), "{run:?}");
}

#[test]
fn logs_follows_new_lines_until_it_is_interrupted() {
    let home = Home::new();
    home.write("app.sh", "n=0; while :; do n=$((n+1)); echo tick $n; sleep 0.05; done\n");
    home.start("[[apps]]\nname = 'app'\nscript = 'app.sh'\n");
    home.log_with("app-out.log", "tick 3\n");
    // Follows into a file: the pipe of a command is read only at its end.
    let mut shell = std::process::Command::new("sh");
    home.environment(&mut shell);
    shell.args(["-c", "exec \"$0\" logs app --raw --out --lines 0 >followed", env!("CARGO_BIN_EXE_pm")]);
    let follow = Running::start(shell, b"");
    let text = wait_until("ten followed lines", SOON, || {
        let text = home.read("followed");
        if text.lines().count() >= 10 { Ok(text) } else { Err(text) }
    });
    let numbers: Vec<u32> =
        text.lines().filter_map(|line| line.strip_prefix("tick ")?.parse().ok()).collect();
    assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "{text}");
    process::signal(follow.pid(), Signal::SIGINT);
    follow.end(SOON);
    assert_eq!(home.row("app").status, "online", "Ctrl-C ends the command, not the app");
}

#[test]
fn logs_follows_an_app_through_its_reload() {
    let home = Home::new();
    home.write("app.sh", "echo hello from $$\nexec sleep 1000\n");
    home.start("[[apps]]\nname = 'app'\nscript = 'app.sh'\nmin_uptime = '100ms'\n");
    let mut shell = std::process::Command::new("sh");
    home.environment(&mut shell);
    shell.args(["-c", "exec \"$0\" logs app --raw --lines 10 >followed", env!("CARGO_BIN_EXE_pm")]);
    let follow = Running::start(shell, b"");
    home.file_with("followed", "hello");
    home.ok(&["reload", "app"]);
    let pid = home.pid("app");
    home.file_with("followed", &format!("hello from {pid}\n"));
    process::signal(follow.pid(), Signal::SIGINT);
    follow.end(SOON);
}
