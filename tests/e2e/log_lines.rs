//! Log lines over the death of the supervisor, changed log files, and disks that are slow or full.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};

use super::support::wait::pause_for;
use super::support::{Home, PATIENT, SOON, millis, node, not_here, process, wait_until};

/// Numbered lines as fast as they are taken, until a file `end` is there; then says how many.
const COUNT: &str = "import os, sys, time\n\
    me = os.environ['NODE_APP_INSTANCE'] if len(sys.argv) < 2 else sys.argv[1]\n\
    n = 0\n\
    while not os.path.exists('end'):\n    \
        for _ in range(100):\n        \
            line = b'%s %d %s\\n' % (me.encode(), n, b'x' * (n % 90))\n        \
            os.write(1, line)\n        \
            n += 1\n    \
        time.sleep(0.002)\n\
    open('count-' + me, 'w').write(str(n) + '.')\n\
    time.sleep(1000)\n";

/// The numbers of one writer's lines, which must be whole and in order, without their prefix.
#[track_caller]
fn numbers(text: &str, me: &str, prefix: usize) -> usize {
    let mut next = 0;
    for line in text.lines() {
        let line = &line[prefix..];
        let Some(rest) = line.strip_prefix(me).and_then(|rest| rest.strip_prefix(' ')) else { continue };
        let expected = format!("{next} {}", "x".repeat(next % 90));
        assert_eq!(rest, expected, "line {next} of {me}");
        next += 1;
    }
    next
}

#[test]
fn lines_are_complete_and_in_order_however_often_the_supervisor_is_killed() {
    let home = Home::loaded();
    home.write("count.py", COUNT);
    home.start(
        "[[apps]]\nname = 'raw'\nscript = 'count.py'\nargs = ['raw']\n\
         [[apps]]\nname = 'stamped'\nscript = 'count.py'\nargs = ['stamped']\nlog_date_format = 'YYYY'\n\
         [[apps]]\nname = 'merged'\nscript = 'count.py'\ninstances = 2\nexec_mode = 'fork'\nmerge_logs = true\n",
    );
    let pids: Vec<i32> = home.rows().iter().map(|row| row.pid).collect();
    for kill in 0..8u64 {
        pause_for(millis(kill * 79 % 190));
        let supervisor = home.supervisor();
        process::end(supervisor);
        wait_until("it is gone", SOON, || if process::alive(supervisor) { Err(()) } else { Ok(()) });
    }
    home.write("end", "");
    let count = |me: &str| -> usize {
        let text = home.file_with(&format!("count-{me}"), ".");
        text.trim_end_matches('.').parse().unwrap()
    };
    for (me, file, prefix) in [
        ("raw", "raw-out.log", 0),
        ("stamped", "stamped-out.log", "2026: ".len()),
        ("0", "merged-out.log", 0),
        ("1", "merged-out.log", 0),
    ] {
        let written = count(me);
        assert!(written > 1000, "{me}: {written}");
        let last = format!("{me} {} ", written - 1);
        let log = home.log_with(file, &last);
        assert_eq!(numbers(&log, me, prefix), written, "{me}");
    }
    assert_eq!(home.rows().iter().map(|row| row.pid).collect::<Vec<_>>(), pids);
}

#[test]
fn apply_moves_the_output_of_a_running_process_from_one_line_to_the_next() {
    let home = Home::new();
    home.write("tick.sh", "n=0\nwhile :; do echo tick $n; echo err $n >&2; n=$((n+1)); sleep 0.02; done\n");
    let config = |keys: &str| format!("[[apps]]\nname = 'app'\nscript = 'tick.sh'\n{keys}\n");
    home.start(&config("out_file = 'one.log'"));
    home.file_with("one.log", "tick 3\n");
    let pid = home.pid("app");
    home.ecosystem(&config("out_file = 'two.log'\nerror_file = 'err.log'\nlog_date_format = '[at] YYYY'"));
    home.ok(&["apply", "ecosystem.toml"]);
    let described = home.ok(&["describe", "app"]);
    described.says("two.log").says("err.log");
    let last: u32 = home.read("one.log").lines().last().unwrap()["tick ".len()..].parse().unwrap();
    let two = home.file_with("two.log", &format!("tick {}\n", last + 5));
    assert!(two.lines().all(|line| line.starts_with("at 20")), "{two}");
    home.file_with("err.log", "err");
    let text = |log: &str| -> Vec<u32> {
        log.lines().filter_map(|line| line.rsplit_once("tick ")?.1.parse().ok()).collect()
    };
    let mut all = text(&home.read("one.log"));
    assert_eq!(all.last(), Some(&last), "nothing has gone to the old file since");
    all.extend(text(&two));
    assert!(all.iter().copied().eq(0..u32::try_from(all.len()).unwrap()), "{all:?}");
    // The next supervisor knows, too.
    process::end(home.supervisor());
    let seen = text(&home.read("two.log")).last().copied().unwrap();
    home.file_with("two.log", &format!("tick {}\n", seen + 5));
    assert_eq!(text(&home.read("one.log")).last(), Some(&last));
    // And back, by `reload FILE` of an app that stays: nothing but its stamp goes.
    home.ecosystem(&config("out_file = 'two.log'\nerror_file = 'err.log'"));
    home.ok(&["apply", "ecosystem.toml"]);
    home.file_with("two.log", "\ntick ");
    assert_eq!(home.pid("app"), pid, "the process has stayed");
}

/// A file system that is as slow, or as full, as it is told to be.
struct SlowDisk<'a> {
    home: &'a Home,
    server: Child,
    input: Option<ChildStdin>,
}

impl<'a> SlowDisk<'a> {
    /// `None` where file systems cannot be mounted.
    fn mount(home: &'a Home) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() || fs::File::open("/dev/fuse").is_err() {
            return None;
        }
        fs::create_dir(home.work().join("disk")).unwrap();
        home.write("speed", "fast");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/slow_disk.py");
        let mut server = Command::new(node::python())
            .arg(script)
            .args([home.work_file("disk"), home.work_file("speed")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = server.stdin.take();
        let mut line = String::new();
        BufReader::new(server.stdout.take().unwrap()).read_line(&mut line).unwrap();
        if line != "mounted\n" {
            let _ = server.wait();
            return None;
        }
        Some(Self { home, server, input })
    }

    fn is(&self, speed: &str) {
        self.home.write("speed.new", speed);
        fs::rename(self.home.work_file("speed.new"), self.home.work_file("speed")).unwrap();
    }
}

impl Drop for SlowDisk<'_> {
    fn drop(&mut self) {
        self.is("fast");
        drop(self.input.take());
        let _ = self.server.wait();
    }
}

/// 10,000 numbered lines of 100 bytes per second, and how many bytes that were so far in a file of its own.
const FLOOD: &str = "import os, sys, time\n\
    me = sys.argv[1] + os.environ['NODE_APP_INSTANCE']\n\
    n, begin = 0, time.monotonic()\n\
    while True:\n    \
        for _ in range(20):\n        \
            if n >= (time.monotonic() - begin) * 10000: break\n        \
            os.write(1, b''.join(b'%08d ' % (n + i) + b'y' * 90 + b'\\n' for i in range(50)))\n        \
            n += 50\n    \
        open('new-' + me, 'w').write(str(n))\n    \
        os.rename('new-' + me, 'sofar-' + me)\n    \
        time.sleep(0.005)\n";

#[test]
fn pain_15_ten_apps_that_flood_a_slow_and_then_full_disk_grow_nothing_and_wait_for_nothing() {
    let home = Home::loaded();
    let Some(disk) = SlowDisk::mount(&home) else {
        return not_here("only root can mount a slow file system, and /dev/fuse must be there");
    };
    home.write("flood.py", FLOOD);
    let app = |name: &str, instances: u32, keys: &str| {
        format!(
            "[[apps]]\nname = '{name}'\nscript = 'flood.py'\nargs = ['{name}']\ninstances = {instances}\n\
             exec_mode = 'fork'\nmerge_logs = false\nout_file = 'disk/{name}.log'\n{keys}\n"
        )
    };
    // A five-hundredth of what comes.
    disk.is("20000");
    home.start(&(app("goes", 10, "") + &app("waits", 1, "log_overflow = 'block'")));
    let lines = |who: &str| home.read(&format!("sofar-{who}")).parse::<u64>().unwrap_or(0);
    let all = || (0..10).map(|n| lines(&format!("goes{n}"))).collect::<Vec<u64>>();
    let waiter = home.rows_of("waits")[0].slot;
    let waits = || lines(&format!("waits{waiter}"));
    let every = |more: u64| {
        let goal: Vec<u64> = all().iter().map(|lines| lines + more).collect();
        wait_until("every app has written", PATIENT, || {
            let now = all();
            if now.iter().zip(&goal).all(|(now, goal)| now >= goal) {
                Ok(())
            } else {
                Err((now, goal.clone()))
            }
        });
    };
    // 10 MB in all; the disk would take eight minutes, and the apps with it.
    every(10_000);
    let behind = waits();
    assert!(behind < 8_000, "the one that is to wait has written {behind} lines");
    disk.is("full");
    every(5_000);
    home.ok(&["describe", "goes"]).says("of its output were dropped");
    let peak = fs::read_to_string(format!("/proc/{}/status", home.supervisor())).unwrap();
    let peak = peak.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap().trim().to_owned();
    let kib: u64 = peak.trim_end_matches(" kB").trim().parse().unwrap();
    assert!(kib < 40 * 1024, "{kib} KiB");
    // What the files did not take is summed up a moment after it is counted for each app.
    wait_until("the table says so", SOON, || {
        let list = home.ok(&["list"]).text();
        if list.contains("bytes of log output were dropped") { Ok(()) } else { Err(list) }
    });
    disk.is("fast");
    home.file_with("disk/goes-0.log", "bytes of output were lost here: ");
    // The one that waits has lost nothing, and goes on.
    let goal = waits() + 2_000;
    wait_until("the one that waits goes on", PATIENT, || {
        let now = waits();
        if now >= goal { Ok(()) } else { Err((now, goal)) }
    });
    home.ok(&["stop", "all"]);
    let log = home.read(&format!("disk/waits-{}.log", home.rows_of("waits")[0].id));
    // One that is told to stop in the middle of a write has written a part of a line.
    let log = &log[..=log.rfind('\n').unwrap()];
    let first_wrong = log.lines().enumerate().find(|(n, line)| *line != format!("{n:08} {}", "y".repeat(90)));
    assert_eq!(first_wrong, None, "of {} lines", log.lines().count());
    assert!(log.lines().count() as u64 >= goal - 1_000);
    home.ok(&["describe", "waits"]).does_not_say("of its output were dropped");
    home.ok(&["delete", "all"]);
    wait_until("nothing of it runs", SOON, || {
        let left = home.rows().len();
        if left == 0 { Ok(()) } else { Err(left) }
    });
}
