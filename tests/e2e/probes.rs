//! Readiness and health probes: what is asked of which instance, and what follows from the answers.

use super::support::load;
use super::support::{
    Home, PATIENT, SOON, fixture, free_port, millis, process, secs, stays, two_free_ports, wait_until,
};

/// A server whose health is what the file `state-<slot>` says: "200", "503 db not connected", "hang". It listens on
/// {PORT}, or on the unix socket `sock-<slot>`, or as a cluster worker.
const SERVER: &str = r"
const fs = require('node:fs');
const slot = process.env.NODE_APP_INSTANCE;
const answer = (req, res) => {
  if (!/ready|healthz/.test(req.url)) return res.end('ok ' + process.pid + ' end\n');
  fs.appendFileSync('asked-' + slot, process.pid + ' ' + req.url + '\n');
  let state = '200';
  try { state = fs.readFileSync('state-' + slot, 'utf8').trim(); } catch {}
  if (process.env.HEALED && process.env.HEALED < process.env.PM_GENERATION) state = '200';
  if (state === 'hang') return;
  const [code, ...words] = state.split(' ');
  res.statusCode = Number(code);
  res.end(words.join(' '));
};
";

/// A cluster of two Node workers on one port, each asked over its own channel.
fn workers(home: &Home, keys: &str) -> u16 {
    let port = free_port();
    home.write(
        "app.js",
        &format!("{SERVER}require('node:http').createServer(answer).listen({port}, '127.0.0.1');\n"),
    );
    home.start(&format!(
        "[[apps]]\nname = 'api'\nscript = 'app.js'\nexec_mode = 'cluster'\ninstances = 2\n{keys}\n"
    ));
    port
}

fn asked(home: &Home, slot: u32, pid: i32) -> usize {
    home.read(&format!("asked-{slot}")).lines().filter(|line| line.starts_with(&format!("{pid} "))).count()
}

#[test]
fn pain_33_each_probe_hits_a_specific_worker_also_on_a_shared_port() {
    let home = Home::new();
    workers(&home, "ready = { http = '/ready' }\nhealth = { http = '/healthz', interval = '50ms' }");
    let pids = home.pids("api");
    for (slot, pid) in (0_u32..).zip(&pids) {
        let lines = wait_until("it is asked", PATIENT, || {
            let text = home.read(&format!("asked-{slot}"));
            if text.matches("/healthz").count() >= 5 { Ok(text) } else { Err(text) }
        });
        assert!(lines.starts_with(&format!("{pid} /ready\n")), "{lines}");
        assert!(lines.lines().all(|line| line.starts_with(&pid.to_string())), "another was asked: {lines}");
    }
}

#[test]
fn pain_33_each_probe_hits_a_specific_worker_by_its_own_port_or_socket() {
    let home = Home::new();
    let port = two_free_ports();
    home.write(
        "port.js",
        &format!(
            "{SERVER}require('node:http').createServer(answer).listen(+process.env.PORT, '127.0.0.1');\n"
        ),
    );
    home.write(
        "sock.js",
        &format!("{SERVER}require('node:http').createServer(answer).listen('sock-' + slot);\n"),
    );
    let dir = home.work();
    home.start(&format!(
        "[[apps]]\nname = 'port'\nscript = 'port.js'\nexec_mode = 'fork'\ninstances = 2\nincrement_var = 'PORT'\n\
         env = {{ PORT = '{port}' }}\nready = {{ http = 'http://127.0.0.1:{{PORT}}/ready?x=1' }}\n\
         [[apps]]\nname = 'sock'\nscript = 'sock.js'\nexec_mode = 'fork'\n\
         ready = {{ http = 'http://unix:{}/sock-{{NODE_APP_INSTANCE}}:/ready' }}\n\
         [[apps]]\nname = 'tcp'\nscript = 'port.js'\nexec_mode = 'fork'\nenv = {{ PORT = '{}' }}\n\
         ready = {{ tcp = 'localhost:{{PORT}}' }}\n",
        dir.display(),
        free_port(),
    ));
    let probe = |app: &str| home.rows_of(app)[0].pm("probe")["text"].as_str().unwrap().to_owned();
    assert_eq!(probe("port"), "GET http://127.0.0.1:{PORT}/ready?x=1 → 200", "as it is written");
    assert_eq!(home.rows_of("port")[1].pm("probe")["ok"], true);
    assert!(probe("sock").ends_with("sock-{NODE_APP_INSTANCE}:/ready → 200"), "{}", probe("sock"));
    assert!(probe("tcp").ends_with(" → connected"), "{}", probe("tcp"));
}

#[test]
fn the_address_of_a_probe_is_shown_as_it_is_written_because_a_variable_may_be_a_secret() {
    const SECRET: &str = "hush-hush-7531";
    let home = Home::new();
    home.write(
        "app.js",
        "require('node:http').createServer((req, res) => {\n\
         \x20 res.statusCode = req.url === '/h?key=hush-hush-7531' && process.env.WELL ? 200 : 503;\n\
         \x20 res.end('x');\n}).listen(+process.env.PORT, '127.0.0.1');\n",
    );
    let app = |name: &str, more: &str, probe: &str| {
        format!(
            "[[apps]]\nname = '{name}'\nscript = 'app.js'\nexec_mode = 'fork'\nlisten_timeout = '2s'\nautorestart = false\n\
             env = {{ PORT = '{}', KEY = '{SECRET}'{more} }}\nready = {{ {probe}, interval = '100ms' }}\n",
            free_port()
        )
    };
    let http = "http = 'http://127.0.0.1:{PORT}/h?key={KEY}'";
    home.start(&app("well", ", WELL = '1'", http));
    let said = home.row("well").pm("probe")["text"].clone();
    assert_eq!(said, "GET http://127.0.0.1:{PORT}/h?key={KEY} → 200 'x'");
    for (name, probe, shown) in [
        ("ill", http, "GET http://127.0.0.1:{PORT}/h?key={KEY} → 503"),
        ("none", "tcp = '127.0.0.1:{KEY}'", "tcp 127.0.0.1:{KEY} → expected"),
    ] {
        home.write("ill.toml", &app(name, "", probe));
        home.exits(1, &["start", "ill.toml"]).says(shown).does_not_say(SECRET);
    }
    for command in [&["describe", "well"][..], &["describe", "ill"], &["jlist"], &["events"], &["list"]] {
        home.ok(command).does_not_say(SECRET);
    }
    for file in ["pm.log", "events.jsonl"] {
        let text = std::fs::read_to_string(home.path().join(file)).unwrap();
        assert!(!text.contains(SECRET) && text.contains("well"), "{file}: {text}");
    }
    // The control.
    home.ok(&["env", "well"]).says(SECRET);
}

#[test]
fn a_probe_over_the_channel_reaches_https_and_says_what_is_missing() {
    let home = Home::new();
    let port = free_port();
    home.write(
        "tls.js",
        &format!(
            "{SERVER}const fs2 = require('node:fs');\n\
             require('node:https').createServer({{ key: fs2.readFileSync('key.pem'), cert: fs2.readFileSync('cert.pem') }},\n\
             (req, res) => {{ res.statusCode = req.socket.encrypted ? 200 : 500; res.end(req.socket.remoteAddress); }}).listen({port}, '127.0.0.1');\n"
        ),
    );
    for name in ["key.pem", "cert.pem"] {
        let pem = std::fs::read_to_string(fixture(&format!("../tls/{name}"))).unwrap();
        home.write(name, &pem);
    }
    home.start("[[apps]]\nname = 'tls'\nscript = 'tls.js'\nready = { http = '/' }\n");
    assert_eq!(home.row("tls").pm("probe")["text"], "GET / → 200 '127.0.0.1'");

    home.write("none.js", "setInterval(() => {}, 1e6);\n");
    home.write(
        "none.toml",
        "[[apps]]\nname = 'none'\nscript = 'none.js'\nready = { http = '/' }\nlisten_timeout = '1s'\nautorestart = false\n",
    );
    home.exits(1, &["start", "none.toml"]).says("the app has no HTTP server that listens");
}

#[test]
fn pain_33_exec_probes_run_as_the_instance_and_are_killed_with_all_they_started() {
    let home = Home::new();
    home.write(
        "check.sh",
        "echo $PM_PROBE_PID $WHO $NODE_APP_INSTANCE $(pwd) >>checks\n\
         [ -e late ] && { sleep 1000 & echo $! >>sleepers; sleep 1000; }\necho all good\n",
    );
    home.start(
        "[[apps]]\nname = 'job'\nscript = 'sleep'\nargs = ['1000']\nenv = { WHO = 'me' }\n\
         ready = { exec = 'sh check.sh' }\n\
         health = { exec = ['sh', 'check.sh'], interval = '100ms', timeout = '300ms', threshold = 1000 }\n",
    );
    let pid = home.pid("job");
    let first = home.file_with("checks", "\n");
    assert_eq!(first.lines().next().unwrap(), format!("{pid} me 0 {}", home.work().display()));
    wait_until("a good answer", SOON, || {
        let row = home.row("job");
        if row.pm("health") == "healthy" { Ok(()) } else { Err(row.pm("probe").clone()) }
    });
    assert_eq!(home.row("job").pm("probe")["text"], "exec sh check.sh → exit code 0 'all good'");
    home.write("late", "");
    let sleeper: i32 = home.file_with("sleepers", "\n").lines().next().unwrap().parse().unwrap();
    wait_until("the time-out ends its whole session", SOON, || {
        if process::alive(sleeper) { Err(process::describe(sleeper)) } else { Ok(()) }
    });
    wait_until("it is told", SOON, || {
        let text = home.row("job").pm("probe")["text"].as_str().unwrap().to_owned();
        if text.ends_with("no answer within 300ms") { Ok(()) } else { Err(text) }
    });
    assert_eq!(home.pid("job"), pid, "below the threshold nothing follows");
    home.ok(&["stop", "job"]);
    let checks = home.read("checks").lines().count();
    stays("nobody is asked after the stop", millis(500), || {
        if home.read("checks").lines().count() == checks { Ok(()) } else { Err(home.read("checks")) }
    });
}

#[test]
fn a_log_line_makes_it_ready_and_only_one_of_its_own_generation() {
    let home = Home::new();
    home.write(
        "app.sh",
        "echo starting\nsleep 0.$WAIT\nprintf 'now liste'\nsleep 0.1\necho 'ning on 80'\nexec sleep 1000\n",
    );
    let run = home.start(
        "[[apps]]\nname = 'app'\nscript = 'app.sh'\nready = { log = '^now listening on \\d+$' }\n\
         env = { WAIT = '5' }\nlisten_timeout = '8s'\n",
    );
    assert!(run.took >= millis(600) && run.took < secs(6), "{run:?}");
    assert_eq!(home.row("app").pm("probe")["text"], "log /^now listening on \\d+$/ → 'now listening on 80'");
    // The line of the generation before does not make the next one ready.
    home.write("app.sh", "echo loading for ever\nexec sleep 1000\n");
    home.ecosystem(
        "[[apps]]\nname = 'app'\nscript = 'app.sh'\nready = { log = '^now listening on \\d+$' }\n\
         env = { WAIT = '5' }\nlisten_timeout = '1s'\n",
    );
    home.exits(1, &["restart", "ecosystem.toml"]).says("loading for ever");
}

#[test]
fn not_ready_in_time_shows_what_the_last_probe_heard() {
    let home = Home::new();
    let port = workers(&home, "ready = { http = '/ready', interval = '100ms' }\nlisten_timeout = '2s'");
    let old = home.pids("api");
    for slot in 0..2 {
        home.write(&format!("state-{slot}"), "503 db not connected");
    }
    let run = home.exits(1, &["reload", "api"]);
    run.says("was not ready within 2s; last probe: GET /ready → 503 'db not connected'");
    assert_eq!(home.pids("api"), old);
    load::get(port, "/who").unwrap();
}

#[test]
fn pain_33_live_failure_x_n_is_a_one_at_a_time_graceful_replacement() {
    let home = Home::new();
    let port = workers(
        &home,
        "ready = { http = '/ready' }\nenv = { HEALED = '1' }\n\
         health = { http = '/healthz', interval = '200ms', threshold = 3, timeout = '10s' }",
    );
    let old = home.pids("api");
    wait_until("both are well", PATIENT, || {
        let rows = home.rows_of("api");
        if rows.iter().all(|row| row.pm("health") == "healthy") { Ok(()) } else { Err(rows) }
    });
    home.write("state-1", "503 wedged");
    let load = load::Load::start(port, 4, load::Connections::KeepAlive);
    load.more(50);
    let new = wait_until("the second worker is replaced", PATIENT, || {
        let rows = home.rows_of("api");
        let done =
            rows[1].pid != old[1] && rows[1].pid > 0 && rows[1].pm("draining").as_array().unwrap().is_empty();
        if done {
            Ok(rows)
        } else {
            Err(rows.iter().map(|row| (row.pid, row.status.clone())).collect::<Vec<_>>())
        }
    });
    load.more(1000);
    load.stop().lost_nothing(1000);
    assert_eq!(new[0].pid, old[0], "the healthy one is not touched");
    assert_eq!((new[0].restarts, new[1].restarts), (0, 1));
    home.ok(&["describe", "1"]).says("failed health check");
    let before = asked(&home, 1, old[1]);
    assert!(before >= 3, "{before}");
}

#[test]
fn pain_33_never_all_workers_at_once_and_last_status_and_body_in_describe() {
    let home = Home::new();
    let port = workers(&home, "health = { http = '/healthz', interval = '100ms', threshold = 2 }");
    let old = home.pids("api");
    for slot in 0..2 {
        home.write(&format!("state-{slot}"), "503 overloaded");
    }
    let unhealthy = || {
        let rows = home.rows_of("api");
        if rows.iter().all(|row| row.pm("health") == "unhealthy") { Ok(()) } else { Err(rows) }
    };
    wait_until("both are unhealthy", PATIENT, unhealthy);
    stays("nobody is ended", secs(2), || {
        if home.pids("api") == old { Ok(()) } else { Err(home.process_list()) }
    });
    load::get(port, "/who").unwrap();
    home.ok(&["list"]).says("unhealthy");
    home.ok(&["describe", "api"]).says("GET /healthz → 503 'overloaded'").says("bad answers in a row");
    assert!(home.rows_of("api").iter().all(|row| row.status == "online"), "PM2's words stay PM2's");
    // They recover together, and nobody is ended for having been asked a moment later.
    for slot in 0..2 {
        home.write(&format!("state-{slot}"), "200");
    }
    wait_until("both are well", PATIENT, || {
        let rows = home.rows_of("api");
        if rows.iter().all(|row| row.pm("health") == "healthy") { Ok(()) } else { Err(rows) }
    });
    assert_eq!(home.pids("api"), old);
}

#[test]
fn a_single_instance_that_hangs_is_restarted_after_its_start_period() {
    let home = Home::new();
    let port = free_port();
    home.write(
        "app.js",
        &format!("{SERVER}require('node:http').createServer(answer).listen({port}, '127.0.0.1');\n"),
    );
    home.write("state-0", "hang");
    let begin = std::time::Instant::now();
    home.start(&format!(
        "[[apps]]\nname = 'job'\nscript = 'app.js'\nmin_uptime = '100ms'\nenv = {{ HEALED = '1' }}\n\
         health = {{ http = 'http://127.0.0.1:{port}/healthz', interval = '100ms', timeout = '2s', threshold = 2, \
         start_period = '1s' }}\n"
    ));
    let old = home.pid("job");
    wait_until("another and well", PATIENT, || {
        let row = home.row("job");
        if row.pid != old && row.pm("health") == "healthy" { Ok(()) } else { Err(row) }
    });
    assert_eq!(home.row("job").restarts, 1);
    // The successor was ready after its min_uptime, and well after another start period.
    let took = std::time::Instant::now().duration_since(begin);
    assert!(took >= millis(2100), "{took:?}");
}

#[test]
fn probes_go_on_under_the_next_supervisor() {
    let home = Home::new();
    workers(
        &home,
        "ready = { http = '/ready' }\nhealth = { http = '/healthz', interval = '100ms', threshold = 2 }",
    );
    let old = home.pids("api");
    process::end(home.supervisor());
    wait_until("both are asked again", PATIENT, || {
        let rows = home.rows_of("api");
        if rows.iter().all(|row| row.pm("health") == "healthy") { Ok(()) } else { Err(rows) }
    });
    assert_eq!(home.pids("api"), old);
    home.write("state-0", "500");
    wait_until("the first is replaced", PATIENT, || {
        let rows = home.rows_of("api");
        // The file makes its successor fail too, but readiness asks the same.
        if rows[0].pm("health") == "unhealthy" { Ok(()) } else { Err(rows) }
    });
    assert_eq!(home.pids("api")[1], old[1]);
}

#[test]
fn what_is_heard_at_the_port_of_all_workers_says_that_it_is_not_this_one_s() {
    let home = Home::new();
    let port = free_port();
    let listens = format!("{SERVER}require('node:http').createServer(answer).listen({port}, '127.0.0.1');\n");
    home.write("app.js", &listens);
    let app = "[[apps]]\nname = 'api'\nscript = 'app.js'\nexec_mode = 'cluster'\ninstances = 2\n";
    let ready = format!(
        "ready = {{ http = 'http://127.0.0.1:{port}/', timeout = '100ms' }}\nlisten_timeout = '1s'\n"
    );
    let health =
        format!("health = {{ http = 'http://127.0.0.1:{port}/', interval = '50ms', timeout = '100ms' }}\n");
    let says = "at that port only workers that are ready answer";
    // No worker is in rotation yet, so nobody answers.
    home.ecosystem(&format!("{app}{ready}"));
    home.exits(1, &["start", "ecosystem.toml"]).says(says).says("a path alone");
    home.ok(&["delete", "all"]);
    // Another may have answered, however well that sounds.
    home.ecosystem(&format!("{app}{health}"));
    home.ok(&["start", "ecosystem.toml"]);
    wait_until("it is asked", PATIENT, || {
        let text = home.ok(&["describe", "api"]).out;
        if text.contains(says) { Ok(()) } else { Err(text) }
    });
    // One on its own has nobody who could have.
    home.ok(&["scale", "api", "1"]);
    wait_until("it is asked again", PATIENT, || {
        let text = home.ok(&["describe", "api"]).out;
        if text.contains("→ 200") && !text.contains(says) { Ok(()) } else { Err(text) }
    });
}

#[test]
fn mistakes_in_probes_are_config_errors_that_say_what_would_work() {
    let home = Home::new();
    let script = home.write("app.py", "import time\ntime.sleep(1000)\n");
    for (keys, expected) in [
        ("ready = { http = '/healthz' }", "a path alone goes over the IPC channel"),
        ("ready = { http = 'https://127.0.0.1/' }", "https is not spoken by probes"),
        ("health = { http = 'localhost:80' }", "expected \"http://host:port/path\""),
        ("health = { tcp = '{PORT}' }", "expected \"host:port\""),
        ("wait_ready = true\nready = { tcp = '127.0.0.1:80' }", "one of them"),
    ] {
        home.ecosystem(&format!("[[apps]]\nname = 'app'\nscript = '{script}'\n{keys}\n"));
        home.exits(2, &["start", "ecosystem.toml"]).says(expected);
    }
    home.ecosystem(&format!(
        "[[apps]]\nname = 'app'\nscript = '{script}'\nready = {{ tcp = '127.0.0.1:{{PROT}}' }}\nlisten_timeout = '1s'\n"
    ));
    home.exits(1, &["start", "ecosystem.toml"]).says("the instance has no variable PROT");
}
