//! Ready is an event: who may say it, and what happens until then.

use std::time::Duration;

use super::support::load;
use super::support::{Home, fixture, free_port, millis, secs};

/// Starts an app with `wait_ready` and says how long that took.
fn starts_within(home: &Home, file: &str, text: &str, keys: &str) -> Duration {
    home.write(file, text);
    let run = home.start(&format!(
        "[[apps]]\nname = 'app'\nscript = '{file}'\nwait_ready = true\nlisten_timeout = '8s'\n{keys}\n"
    ));
    assert!(home.statuses("app").iter().all(|status| status == "online"));
    assert!(run.took < secs(6), "ready was not heard: {run:?}");
    run.took
}

#[test]
fn ready_over_the_ipc_channel_of_a_fork_mode_app() {
    let home = Home::new();
    let took = starts_within(
        &home,
        "app.js",
        "setTimeout(() => process.send('ready'), 500);\nsetInterval(() => {}, 1e6);\n",
        "",
    );
    assert!(took >= millis(500), "not before the app says so: {took:?}");
}

#[test]
fn ready_as_a_line_on_the_channel_from_any_language() {
    let home = Home::new();
    starts_within(
        &home,
        "app.py",
        "import os, time\nos.write(int(os.environ['NODE_CHANNEL_FD']), b'\"ready\"\\n')\ntime.sleep(1000)\n",
        "",
    );
}

#[test]
fn ready_as_a_datagram_on_the_notify_socket() {
    let home = Home::new();
    let text = "import os, socket, time\n\
        time.sleep(0.3)\n\
        address = os.environ['NOTIFY_SOCKET'].replace('@', '\\0', 1)\n\
        notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\n\
        notify.sendto(b'STATUS=loading\\n', address)\n\
        notify.sendto(b'STATUS=done\\nREADY=1\\n', address)\n\
        time.sleep(1000)\n";
    let took = starts_within(&home, "app.py", text, "");
    assert!(took >= millis(300), "{took:?}");
}

#[test]
fn ready_as_a_newline_on_the_ready_descriptor() {
    let home = Home::new();
    starts_within(
        &home,
        "app.sh",
        "sleep 0.2\nprintf 'almost ' >&$PM_READY_FD\nprintf 'there\\n' >&$PM_READY_FD\nexec sleep 1000\n",
        "",
    );
}

#[test]
fn descriptors_are_contiguous_from_3() {
    let home = Home::new();
    let port = free_port();
    home.write(
        "app.py",
        &format!(
            "import os, runpy\nos.write(int(os.environ['PM_READY_FD']), b'\\n')\n\
             runpy.run_path('{}', run_name='__main__')\n",
            fixture("report.py")
        ),
    );
    home.start(&format!(
        "[[apps]]\nname = 'app'\nscript = 'app.py'\nwait_ready = true\nlisten = ['127.0.0.1:{port}']\n\
         exec_mode = 'cluster'\ninstances = 1\n"
    ));
    let report: serde_json::Value = serde_json::from_str(&home.file_with("report-0.json", "}")).unwrap();
    assert_eq!(report["env"]["LISTEN_FDS"], "1");
    assert_eq!(report["env"]["LISTEN_PID"], report["pid"].to_string().as_str());
    assert_eq!(report["env"]["NODE_CHANNEL_FD"], "4");
    assert_eq!(report["env"]["PM_READY_FD"], "5");
}

#[test]
fn the_channel_of_a_node_app_is_descriptor_3_and_not_inherited_by_its_children() {
    let home = Home::new();
    home.write(
        "app.js",
        "const { execSync } = require('child_process');\n\
         const fs = require('fs');\n\
         const inChild = execSync('ls -l /proc/self/fd').toString();\n\
         fs.writeFileSync('fds', JSON.stringify({ channel: fs.readlinkSync('/proc/self/fd/3'), inChild }) + '\\n');\n\
         process.send('ready');\nsetInterval(() => {}, 1e6);\n",
    );
    home.start("[[apps]]\nname = 'app'\nscript = 'app.js'\nwait_ready = true\n");
    let fds: serde_json::Value = serde_json::from_str(&home.read("fds")).unwrap();
    let channel = fds["channel"].as_str().unwrap();
    assert!(channel.starts_with("socket:"), "{fds}");
    assert!(!fds["inChild"].as_str().unwrap().contains(channel), "{fds}");
}

#[test]
fn not_ready_in_time_is_a_failure_of_start() {
    let home = Home::new();
    home.write("app.js", "console.log('still loading');\nsetInterval(() => {}, 1e6);\n");
    home.ecosystem("[[apps]]\nname = 'app'\nscript = 'app.js'\nwait_ready = true\nlisten_timeout = '1s'\n");
    let run = home.exits(1, &["start", "ecosystem.toml"]);
    assert!(run.took >= millis(900) && run.took < secs(5), "{run:?}");
    run.says("still loading");
    assert_eq!(home.rows_of("app").len(), 1, "the row stays");
}

#[test]
fn other_messages_are_not_ready() {
    let home = Home::new();
    home.write(
        "app.js",
        "for (const m of ['READY', ['ready'], { ready: true }, 'ready ', null, 0, '']) process.send(m);\n\
         setInterval(() => {}, 1e6);\n",
    );
    home.ecosystem("[[apps]]\nname = 'app'\nscript = 'app.js'\nwait_ready = true\nlisten_timeout = '1s'\n");
    home.exits(1, &["start", "ecosystem.toml"]);
}

#[test]
fn a_cluster_worker_is_ready_when_it_listens() {
    let home = Home::new();
    let port = free_port();
    home.write("app.js", &format!("setTimeout(() => require('{}'), 600);\n", fixture("web-plain.js")));
    let run = home.start(&format!(
        "[[apps]]\nname = 'web'\nscript = 'app.js'\nexec_mode = 'cluster'\ninstances = 2\nenv = {{ PORT = '{port}' }}\n"
    ));
    assert!(run.took >= millis(600), "{run:?}");
    load::get(port, "/").unwrap();
}

#[test]
fn a_fork_mode_app_that_exits_at_once_is_not_started() {
    // At once is within 100 ms.
    let home = Home::alone();
    home.write("app.sh", "echo goodbye\nexit 4\n");
    home.ecosystem("[[apps]]\nname = 'app'\nscript = 'app.sh'\nautorestart = false\n");
    home.exits(1, &["start", "ecosystem.toml"]).says("goodbye");
    let row = home.row("app");
    assert_eq!((row.status.as_str(), row.env("exit_code").as_i64()), ("stopped", Some(4)));
}
