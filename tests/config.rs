//! Config files and command lines as people write them: what they become, and what is said about mistakes.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where it stopped")]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pm::config::app::Instances;
use pm::config::error::ConfigError;
use pm::config::file::{self, Argument};
use pm::config::listen::TABLE_KEYS;
use pm::config::overrides::{Overrides, command_line};
use pm::config::resolve::{Context, Resolved, resolve_file};
use pm::config::schema::{FILE_KEYS, KEYS};
use pm::config::template;
use pm::config::{probe, process};
use pm::model::id::AppName;
use pm::model::process::{IoPriority, Rlimit};
use pm::model::signal::Signal;
use pm::model::spec::{
    AppSpec, Balance, Check, Dependency, ExecMode, KillMode, ListenAddress, OnFailure, Overflow, Runtime,
    Share, Stdin, StopMethod, Strategy,
};

/// A directory with a few scripts and a PATH of its own, so that no test depends on what the machine has installed.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let place = Self { dir: tempfile::tempdir().unwrap() };
        for program in ["node", "python3", "bash", "gunicorn"] {
            place.executable(&format!("bin/{program}"), "\x7fELF, or so it says");
        }
        for script in ["server.js", "worker.py", "task.sh", "page.php", "tool.ts", "my app.js"] {
            place.write(script, "");
        }
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    }

    fn executable(&self, name: &str, text: &str) -> PathBuf {
        let path = self.write(name, text);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn context(&self) -> Context {
        Context {
            cwd: self.dir.path().to_owned(),
            home: Some(PathBuf::from("/home/ann")),
            path: OsString::from(self.path("bin")),
            cpus: 4,
            current_exe: PathBuf::from("/usr/local/bin/pm"),
            env_name: None,
        }
    }

    fn resolve(&self, text: &str, context: &Context) -> Result<Vec<Resolved>, ConfigError> {
        self.resolve_with(text, &Overrides::default(), context)
    }

    fn resolve_with(
        &self,
        text: &str,
        overrides: &Overrides,
        context: &Context,
    ) -> Result<Vec<Resolved>, ConfigError> {
        let path = self.write("ecosystem.toml", text);
        resolve_file(&file::load(&path, &context.cwd)?, overrides, context)
    }

    /// The spec of one app with these lines, and `script = "server.js"` unless they have one.
    fn app(&self, lines: &str) -> AppSpec {
        let script = if lines.contains("script") { "" } else { "script = \"server.js\"\n" };
        // Whom it may depend on.
        let db =
            if lines.contains("depends_on") { "\n[[apps]]\nname = 'db'\nscript = 'server.js'\n" } else { "" };
        let resolved = self.resolve(&format!("[[apps]]\n{script}{lines}{db}"), &self.context());
        let mut resolved = resolved.unwrap_or_else(|error| panic!("{lines}:\n{error}"));
        resolved.truncate(1);
        assert_eq!(resolved[0].warnings, [] as [String; 0], "{lines}");
        resolved.remove(0).spec
    }

    /// What is said about one app with these lines, without the temporary directory's name.
    fn error(&self, lines: &str) -> String {
        let script = if lines.contains("script") { "" } else { "script = \"server.js\"\n" };
        let error = self.resolve(&format!("[[apps]]\n{script}{lines}"), &self.context());
        self.clean(&error.expect_err(lines).to_string())
    }

    fn start(&self, target: &str, overrides: &Overrides) -> Result<AppSpec, String> {
        command_line(target, overrides, &self.context())
            .map(|resolved| resolved.spec)
            .map_err(|error| self.clean(&error.to_string()))
    }

    fn clean(&self, text: &str) -> String {
        text.replace(self.dir.path().to_str().unwrap(), "[dir]")
    }
}

fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn strings(list: &[&str]) -> Vec<String> {
    list.iter().map(|text| (*text).to_owned()).collect()
}

fn vars(list: &[(&str, &str)]) -> BTreeMap<String, String> {
    list.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

// ---- what keys do ----------------------------------------------------------------------------------------------------

#[test]
fn an_app_with_a_script_alone_gets_the_documented_defaults() {
    let place = Place::new();
    let spec = place.app("");
    assert_eq!(spec.name.as_str(), "server");
    assert_eq!(spec.namespace, "default");
    let origin = spec.origin.unwrap();
    assert_eq!((origin.file, origin.env_name), (place.path("ecosystem.toml"), None));
    assert_eq!(spec.command.script, place.path("server.js"));
    assert_eq!(spec.command.interpreter.as_deref(), Some("node"));
    assert_eq!(spec.command.runtime, Runtime::Node);
    assert_eq!(spec.cwd, place.path(""));
    assert_eq!((spec.mode, spec.instances), (ExecMode::Fork, 1));
    assert!(spec.env.inherit && spec.env.files.is_empty() && spec.env.vars.is_empty());
    assert_eq!((spec.env.instance_var.as_str(), spec.env.increment_var), ("NODE_APP_INSTANCE", None));
    assert_eq!((spec.listen, spec.balance), (vec![], Balance::RoundRobin));
    assert_eq!((spec.ready.wait_ready, spec.ready.listen_timeout), (false, millis(30_000)));
    assert_eq!((spec.stop.signal, spec.stop.timeout), (Signal::INT, millis(10_000)));
    assert_eq!((spec.stop.mode, spec.stop.method), (KillMode::Target, StopMethod::Signal));
    assert_eq!((spec.stop.with_message, spec.stop.drain_timeout), (false, None));
    assert_eq!((spec.restart.autorestart, spec.restart.max_restarts), (true, 16));
    assert_eq!((spec.restart.min_uptime, spec.restart.restart_delay), (millis(1000), None));
    assert_eq!((spec.restart.backoff_base, spec.restart.backoff_reset), (millis(100), millis(30_000)));
    assert!(spec.restart.stop_exit_codes.is_empty());
    assert_eq!((spec.reload.max_surge, spec.reload.max_unavailable), (Share::Count(1), Share::Count(0)));
    assert_eq!((spec.reload.on_failure, spec.reload.overlap), (OnFailure::Rollback, None));
    assert_eq!((spec.logs.out_file, spec.logs.error_file), (None, None));
    assert_eq!((spec.logs.merge, spec.logs.date_format), (None, None));
    assert!(spec.agent && spec.autostart);
    assert_eq!(spec.stdin, Stdin::Pipe);
}

/// A line of an app, and what it must do to the spec.
type Effect = (&'static str, fn(&Place, &AppSpec) -> bool);

const EFFECTS: &[Effect] = &[
    ("name = 'api v2'", |_, s| s.name.as_str() == "api v2"),
    ("namespace = 'shop'", |_, s| s.namespace == "shop"),
    ("script = 'worker.py'", |p, s| s.command.script == p.path("worker.py")),
    ("shell = true\nscript = 'a && b'\nname = 'x'", |_, s| {
        s.command.script == Path::new("bash") && s.command.args == ["-c", "a && b"]
    }),
    ("args = ['--a', 'b c', 3]", |_, s| s.command.args == ["--a", "b c", "3"]),
    (r#"args = "--a 'b c' 3""#, |_, s| s.command.args == ["--a", "b c", "3"]),
    ("cwd = './bin'\nscript = '../server.js'", |p, s| {
        s.cwd == p.path("bin") && s.command.script == p.path("server.js")
    }),
    ("cwd = '/'\nscript = 'bin/sh'", |_, s| {
        s.cwd == Path::new("/") && s.command.script == Path::new("/bin/sh")
    }),
    ("interpreter = 'python3'", |_, s| s.command.interpreter.as_deref() == Some("python3")),
    ("interpreter = 'none'\nscript = 'bin/node'", |p, s| {
        s.command.interpreter.is_none() && s.command.script == p.path("bin/node")
    }),
    ("interpreter = './bin/node'", |p, s| {
        s.command.interpreter.as_deref() == p.path("bin/node").to_str() && s.command.runtime == Runtime::Node
    }),
    ("interpreter_args = ['--x', '-y']", |_, s| s.command.interpreter_args == ["--x", "-y"]),
    ("node_args = '--x -y'", |_, s| s.command.interpreter_args == ["--x", "-y"]),
    ("exec_mode = 'cluster'", |_, s| s.mode == ExecMode::Cluster && s.instances == 1),
    ("exec_mode = 'fork'\ninstances = 2", |_, s| s.mode == ExecMode::Fork && s.instances == 2),
    ("exec_mode = 'fork_mode'\ninstances = 2", |_, s| s.mode == ExecMode::Fork),
    ("instances = 3", |_, s| s.instances == 3 && s.mode == ExecMode::Cluster),
    ("instances = '2'", |_, s| s.instances == 2),
    ("instances = 1", |_, s| s.instances == 1 && s.mode == ExecMode::Cluster),
    ("instances = 'max'", |_, s| s.instances == 4),
    ("instances = 0", |_, s| s.instances == 4),
    ("instances = -1", |_, s| s.instances == 3 && s.mode == ExecMode::Cluster),
    ("instances = 2\nscript = 'worker.py'", |_, s| s.mode == ExecMode::Fork),
    ("instances = 2\nscript = 'worker.py'\nlisten = 0", |_, s| {
        s.mode == ExecMode::Cluster && s.can_overlap()
    }),
    ("listen = [3000]", |_, s| {
        let l = &s.listen[0];
        (l.address.to_string().as_str(), l.name.as_str(), l.backlog, l.blocking)
            == ("[::]:3000", "3000", 511, false)
    }),
    ("listen = ['unix:run/app.sock']", |p, s| {
        s.listen[0].name == "app" && s.listen[0].address == ListenAddress::Unix(p.path("run/app.sock"))
    }),
    ("listen = [{ address = ':1', name = 'web', backlog = 5, blocking = true }]", |_, s| {
        let l = &s.listen[0];
        (l.name.as_str(), l.backlog, l.blocking) == ("web", 5, true)
    }),
    ("listen = ['127.0.0.1:1', '[::1]:1']", |_, s| s.listen[0].name == "1" && s.listen[1].name == "1-2"),
    ("listen = [{ address = 8080, name = 'web' }]\nargs = '--fd {fd:web}'", |_, s| {
        s.command.args == ["--fd", "{fd:web}"]
    }),
    ("instances = 2\nbalance = 'shared'", |_, s| s.balance == Balance::Shared),
    ("env = { A = 'x', N = 1, F = 1.5, B = true, J = { a = [1, 'b'] } }", |_, s| {
        s.env.vars == vars(&[("A", "x"), ("N", "1"), ("F", "1.5"), ("B", "true"), ("J", r#"{"a":[1,"b"]}"#)])
    }),
    ("env_production = { A = 'y' }\nenv.A = 'x'", |_, s| s.env.vars == vars(&[("A", "x")])),
    ("env_file = 'server.js'", |p, s| s.env.files == [p.path("server.js")]),
    ("env_file = ['server.js', 'task.sh']", |p, s| s.env.files == [p.path("server.js"), p.path("task.sh")]),
    ("inherit_env = false", |_, s| !s.env.inherit),
    ("instance_var = 'WORKER'", |_, s| s.env.instance_var == "WORKER"),
    ("increment_var = 'PORT'\nport = 3000\ninstances = 2\nexec_mode = 'fork'", |_, s| {
        s.env.increment_var.as_deref() == Some("PORT")
    }),
    ("port = 3000\nenv.PORT = 1", |_, s| s.env.vars == vars(&[("PORT", "3000")])),
    ("wait_ready = true", |_, s| s.ready.wait_ready),
    ("listen_timeout = '5s'", |_, s| s.ready.listen_timeout == millis(5000)),
    ("kill_timeout = 1600", |_, s| s.stop.timeout == millis(1600)),
    ("killTimeout = '1m 30s'", |_, s| s.stop.timeout == millis(90_000)),
    ("kill_signal = 'SIGTERM'", |_, s| s.stop.signal == Signal::TERM),
    ("kill_signal = 15", |_, s| s.stop.signal == Signal::TERM),
    ("kill_mode = 'group'", |_, s| s.stop.mode == KillMode::Group),
    ("stop_method = 'disconnect'", |_, s| s.stop.method == StopMethod::Disconnect),
    ("shutdown_with_message = true", |_, s| s.stop.with_message),
    ("drain_timeout = '2s'", |_, s| s.stop.drain_timeout == Some(millis(2000))),
    ("agent = false", |_, s| !s.agent && !s.has_agent()),
    ("strategy = 'rolling'", |_, _| true),
    ("max_surge = 2", |_, s| s.reload.max_surge == Share::Count(2)),
    ("max_surge = '25%'", |_, s| s.reload.max_surge == Share::Percent(25)),
    ("max_unavailable = 1\nmax_surge = 0", |_, s| {
        (s.reload.max_unavailable, s.reload.max_surge) == (Share::Count(1), Share::Count(0))
    }),
    ("max_draining = 2", |_, s| s.reload.max_draining == Some(2)),
    ("min_healthy = '5s'", |_, s| s.reload.min_healthy == millis(5_000)),
    ("strategy = 'blue-green'", |_, s| s.reload.strategy == Strategy::BlueGreen),
    ("reserve = false", |_, s| !s.reload.reserve),
    ("drain_websockets = true", |_, s| s.stop.drain_websockets),
    ("instances = 2\nbalance = 'least-connections'", |_, s| s.balance == Balance::LeastConnections),
    ("instances = 2\nbalance = 'sticky'", |_, s| s.balance == Balance::Sticky),
    ("instances = 2\nbalance = 'slots'", |_, s| s.balance == Balance::Slots),
    ("ready = { http = 'http://127.0.0.1:{PORT}/r', threshold = 2 }", |_, s| {
        let probe = s.ready.probe.as_ref().unwrap();
        (&probe.check, probe.threshold) == (&Check::Http("http://127.0.0.1:{PORT}/r".to_owned()), 2)
            && (probe.interval, probe.timeout) == (millis(1_000), millis(2_000))
    }),
    ("ready = { log = 'listening on \\d+' }", |_, s| {
        s.ready.probe.as_ref().unwrap().check == Check::Log(r"listening on \d+".to_owned())
    }),
    (
        "health = { exec = 'sh -c \"exit 0\"', interval = 500, timeout = '1s', start_period = '1m' }",
        |_, s| {
            let probe = s.health.as_ref().unwrap();
            probe.check == Check::Exec(strings(&["sh", "-c", "exit 0"]))
                && (probe.interval, probe.timeout) == (millis(500), millis(1_000))
                && (probe.threshold, probe.start_period) == (3, millis(60_000))
        },
    ),
    ("health = { tcp = '127.0.0.1:80' }", |_, s| {
        s.health.as_ref().unwrap().check == Check::Tcp("127.0.0.1:80".to_owned())
    }),
    ("pre_start = ['./migrate', '--all']", |_, s| {
        let hook = s.hooks.pre_start.as_ref().unwrap();
        hook.argv == strings(&["./migrate", "--all"]) && hook.timeout == millis(60_000)
    }),
    ("pre_reload = { run = 'npm run build', timeout = '5m' }", |_, s| {
        let hook = s.hooks.pre_reload.as_ref().unwrap();
        hook.argv == strings(&["npm", "run", "build"]) && hook.timeout == millis(300_000)
    }),
    ("post_stop = './cleanup'", |_, s| s.hooks.post_stop.as_ref().unwrap().argv == strings(&["./cleanup"])),
    ("depends_on = ['db']", |_, s| s.depends_on == [(AppName::new("db").unwrap(), Dependency::Ready)].into()),
    ("depends_on = { db = 'started' }", |_, s| {
        s.depends_on == [(AppName::new("db").unwrap(), Dependency::Started)].into()
    }),
    ("on_errored = './page'", |_, s| s.hooks.on_errored.as_ref().unwrap().argv == strings(&["./page"])),
    ("on_failure = 'abort'", |_, s| s.reload.on_failure == OnFailure::Abort),
    ("overlap = true", |_, s| s.reload.overlap == Some(true) && s.can_overlap()),
    ("min_uptime = '5s'", |_, s| s.restart.min_uptime == millis(5000)),
    ("max_restarts = 3", |_, s| s.restart.max_restarts == 3),
    ("max_memory_restart = '150M'", |_, s| s.max_memory == Some(150 << 20)),
    ("max_memory = '1.5G'", |_, s| s.max_memory == Some(1536 << 20)),
    ("maxMemoryRestart = 314572800", |_, s| s.max_memory == Some(300 << 20)),
    ("max_memory_restart = 0", |_, s| s.max_memory.is_none()),
    ("restart_delay = 500", |_, s| s.restart.restart_delay == Some(millis(500))),
    ("restart_delay = 0", |_, s| s.restart.restart_delay.is_none()),
    ("exp_backoff_restart_delay = 200", |_, s| s.restart.backoff_base == millis(200)),
    ("exp_backoff_restart_delay = 0", |_, s| s.restart.backoff_base == millis(100)),
    ("backoff_reset = '1m'", |_, s| s.restart.backoff_reset == millis(60_000)),
    ("autorestart = false", |_, s| !s.restart.autorestart),
    ("autostart = false", |_, s| !s.autostart),
    ("stop_exit_codes = [0, 143]", |_, s| s.restart.stop_exit_codes == [0, 143]),
    ("stop_exit_codes = 7", |_, s| s.restart.stop_exit_codes == [7]),
    ("out_file = 'logs/o.log'", |p, s| s.logs.out_file == Some(p.path("logs/o.log"))),
    ("output = 'NULL'", |_, s| s.logs.out_file.as_deref() == Some(Path::new("/dev/null"))),
    ("error_file = '~/e.log'", |_, s| s.logs.error_file.as_deref() == Some(Path::new("/home/ann/e.log"))),
    ("merge_logs = true", |_, s| s.logs.merge == Some(true)),
    ("time = true", |_, s| s.logs.date_format.as_deref() == Some("YYYY-MM-DDTHH:mm:ss")),
    ("log_date_format = 'HH:mm'\ntime = true", |_, s| s.logs.date_format.as_deref() == Some("HH:mm")),
    ("log_overflow = 'block'", |_, s| s.logs.overflow == Overflow::Block),
    ("stdin = 'null'", |_, s| s.stdin == Stdin::Null),
    ("user = 'www-data'", |_, s| s.process.user.as_deref() == Some("www-data")),
    ("uid = 33\ngid = '33'", |_, s| {
        (s.process.user.as_deref(), s.process.group.as_deref()) == (Some("33"), Some("33"))
    }),
    ("group = 'adm'", |_, s| s.process.group.as_deref() == Some("adm")),
    ("umask = '0027'", |_, s| s.process.umask == Some(0o27)),
    ("nice = -5", |_, s| s.process.nice == Some(-5)),
    ("ionice = 'idle'", |_, s| s.process.ionice == Some(IoPriority::Idle)),
    ("cpu_affinity = '0-2,5'", |_, s| s.process.cpu_affinity == [0, 1, 2, 5]),
    ("cpu_affinity = [3, 0]", |_, s| s.process.cpu_affinity == [0, 3]),
    ("no_new_privs = true", |_, s| s.process.no_new_privs),
    ("ambient_capabilities = ['CAP_KILL', 'net_bind_service']", |_, s| {
        let bits = s.process.ambient_capabilities.iter().map(|capability| capability.bit());
        bits.sum::<u64>() == 1 << 5 | 1 << 10
    }),
    (
        "limits = { memory_max = '300M', memory_high = 1048576, cpu_max = 1.5, pids_max = 9, required = true }",
        |_, s| {
            let limits = s.process.limits;
            (limits.memory_max, limits.memory_high) == (Some(300 << 20), Some(1 << 20))
                && (limits.cpu_max, limits.pids_max, limits.required) == (Some(150), Some(9), true)
                && limits.kills_together()
        },
    ),
    (
        "limits = { cpu_max = '25%', oom_group = false, nofile = 4096, core = 'unlimited', stack = '1M:2M', cpu = '1m' }",
        |_, s| {
            let range = |limit| s.process.rlimits.get(&limit).map(|range| (range.soft, range.hard));
            (s.process.limits.cpu_max, s.process.limits.oom_group) == (Some(25), Some(false))
                && range(Rlimit::Nofile) == Some((4096, 4096))
                && range(Rlimit::Core) == Some((u64::MAX, u64::MAX))
                && range(Rlimit::Stack) == Some((1 << 20, 2 << 20))
                && range(Rlimit::Cpu) == Some((60, 60))
        },
    ),
];

#[test]
fn every_key_has_its_effect() {
    let place = Place::new();
    for (lines, holds) in EFFECTS {
        let spec = place.app(lines);
        assert!(holds(&place, &spec), "{lines}\n{spec:#?}");
    }
}

#[test]
fn no_key_is_without_a_test_of_its_effect() {
    let lines: Vec<&str> = EFFECTS.iter().flat_map(|(lines, _)| lines.lines()).collect();
    for key in &KEYS {
        let name = if key.name == "env_NAME" { "env_production" } else { key.name };
        assert!(lines.iter().any(|line| line.starts_with(&format!("{name} ="))), "{name}");
    }
}

#[test]
fn mistakes_in_tables_say_what_would_work() {
    let place = Place::new();
    for (line, expected) in [
        ("strategy = 'canary'", "use \"rolling\" or \"blue-green\""),
        ("max_surge = '120%'", "a percentage such as \"25%\" (up to 100%)"),
        ("max_unavailable = 'half'", "a percentage such as \"25%\""),
        ("max_surge = '0%'", "could replace nothing"),
        ("ready = 'http://127.0.0.1'", "expected a table such as { http ="),
        ("ready = { interval = 100 }", "a probe needs one of http, tcp, exec or log"),
        ("ready = { http = '/a', tcp = '1' }", "a probe asks one thing"),
        ("ready = { log = '(' }", "no regular expression"),
        ("ready = { htp = '/a' }", "did you mean `http`?"),
        ("ready = { log = 'x', start_period = 1 }", "`start_period` is for `health` only"),
        ("health = { log = 'x' }", "`log` is for `ready` only"),
        ("health = { tcp = '127.0.0.1:80', threshold = 0 }", "out of range; allowed: 1 to 1000"),
        ("pre_start = []", "a hook needs a program to run"),
        ("pre_reload = { timeout = 5 }", "a hook needs `run`"),
        ("post_stop = { run = 'true', timout = 5 }", "did you mean `timeout`?"),
        ("user = 'a b'", "is neither a name nor a number"),
        ("user = ''", "must not be empty"),
        ("uid = 4294967295", "nobody's number"),
        ("group = '4294967295'", "nobody's number"),
        ("umask = 22", "write \"022\""),
        ("umask = '9'", "octal digits from \"000\" to \"777\""),
        ("nice = 20", "out of range; allowed: -20 to 19"),
        ("ionice = 'fast'", "expected \"idle\", \"best-effort\" or \"realtime\""),
        ("cpu_affinity = '3-1'", "expected CPUs such as \"0-3,6\""),
        ("ambient_capabilities = ['net_bind_servce']", "did you mean `net_bind_service`?"),
        ("limits = '300M'", "expected a table such as { memory_max ="),
        ("limits = { memory = '300M' }", "unknown key"),
        ("limits = { memmory_max = '300M' }", "did you mean `memory_max`?"),
        ("limits = { memory_max = 300 }", "allowed: 1M or more"),
        ("limits = { memory_max = '1X' }", "X"),
        ("limits = { memory_max = '1M', memory_high = '2M' }", "`memory_high` is above `memory_max`"),
        ("limits = { cpu_max = 'half' }", "expected \"150%\" of one CPU"),
        ("limits = { cpu_max = 0 }", "out of range; allowed: 1% to"),
        ("limits = { nofile = 'many' }", "is no limit"),
        ("limits = { nofile = '4096:1024' }", "is above the hard one"),
        ("depends_on = { db = 'up' }", "use \"ready\" or \"started\""),
        ("depends_on = ['all']", "cannot be the name of an app"),
        ("name = 'api'\ndepends_on = ['api']", "an app cannot depend on itself"),
    ] {
        let error = place.error(line);
        assert!(error.contains(expected), "{line}: {error}");
    }
}

#[test]
fn the_section_that_env_chooses_is_laid_over_env() {
    let place = Place::new();
    let text = "[[apps]]\nscript = 'server.js'\nenv = { A = 1, B = 1 }\nenv_production = { B = 2 }";
    let mut context = place.context();
    context.env_name = Some("production".to_owned());
    let resolved = place.resolve(text, &context).unwrap();
    assert_eq!(resolved[0].spec.env.vars, vars(&[("A", "1"), ("B", "2")]));
    assert_eq!(resolved[0].spec.origin.as_ref().unwrap().env_name.as_deref(), Some("production"));

    context.env_name = Some("prodution".to_owned());
    let resolved = place.resolve(text, &context).unwrap();
    assert_eq!(resolved[0].spec.env.vars, vars(&[("A", "1"), ("B", "1")]));
    assert_eq!(
        resolved[0].warnings.iter().map(|line| place.clean(line)).collect::<Vec<_>>(),
        [
            "[dir]/ecosystem.toml:1:1: this app has no section `env_prodution` for --env prodution; it has `env_production`; did you mean --env production?"
        ]
    );
}

#[test]
fn several_forks_on_one_port_are_doubted() {
    let place = Place::new();
    let text = "[[apps]]\nscript = 'worker.py'\ninstances = 2\nport = 3000";
    let resolved = place.resolve(text, &place.context()).unwrap();
    assert!(
        resolved[0].warnings[0].contains(":3:13: 2 instances in fork mode all get PORT=3000"),
        "{resolved:?}"
    );
}

#[test]
fn bun_is_a_cluster_worker_with_a_warning_and_takes_sockets_without_one() {
    let place = Place::new();
    place.executable("bin/bun", "");
    let text = "[[apps]]\nscript = 'worker.ts'\ninstances = 2\ninterpreter = 'bun'\n";
    place.write("worker.ts", "");
    let alone = place.resolve(text, &place.context()).unwrap();
    assert!(
        alone[0].warnings[0].contains(":3:13: bun's cluster workers bind the port themselves"),
        "{alone:?}"
    );
    assert!(alone[0].spec.is_node_cluster(), "what bun has of a cluster it keeps");
    let text = format!("{text}listen = [3000]\n");
    let inherits = place.resolve(&text, &place.context()).unwrap();
    assert_eq!(inherits[0].warnings, [] as [String; 0]);
    assert_eq!(inherits[0].spec.mode, ExecMode::Cluster);
    assert!(!inherits[0].spec.is_node_cluster(), "LISTEN_FDS, as every program but Node gets it");
    assert!(inherits[0].spec.can_overlap());
}

#[test]
fn package_runners_in_front_of_a_listener_are_doubted() {
    let place = Place::new();
    for runner in ["npm", "yarn", "bash"] {
        place.executable(&format!("bin/{runner}"), "");
    }
    for (script, doubted) in [
        ("script = 'npm'\nargs = 'start'", Some("npm")),
        ("script = 'npm run serve'", Some("npm")),
        ("script = 'exec yarn start'\nshell = true", Some("yarn")),
        ("script = 'bash'\nargs = ['start.sh']", None),
    ] {
        let text = format!("[[apps]]\nname = 'web'\n{script}\n");
        assert_eq!(
            place.resolve(&text, &place.context()).unwrap()[0].warnings,
            [] as [String; 0],
            "{script}"
        );
        let warnings =
            place.resolve(&format!("{text}listen = [3000]\n"), &place.context()).unwrap()[0].warnings.clone();
        match doubted {
            Some(runner) => {
                assert!(
                    warnings[0].contains(&format!(":3:10: {runner} does not hand inherited sockets on")),
                    "{warnings:?}"
                );
            }
            None => assert_eq!(warnings, [] as [String; 0], "{script}"),
        }
    }
}

#[test]
fn start_parallelism_is_a_key_of_the_file() {
    let place = Place::new();
    let path = place.write("e.toml", "start_parallelism = 7\n[[apps]]\nscript = 'x'");
    assert_eq!(file::load(&path, Path::new("/")).unwrap().start_parallelism, Some(7));
}

// ---- scripts and interpreters ----------------------------------------------------------------------------------------

#[test]
fn interpreters_by_extension_and_first_line() {
    let place = Place::new();
    place.executable("run.py", "#!/srv/venv/bin/python -u\n");
    place.executable("tool", "#!/usr/bin/env -S node --enable-source-maps\n");
    place.executable("binary", "\x7fELF");
    place.executable("app.mjs", "no first line");
    let none: Vec<String> = Vec::new();
    for (script, interpreter, args, runtime) in [
        ("server.js", Some("node"), none.clone(), Runtime::Node),
        ("app.mjs", Some("node"), none.clone(), Runtime::Node),
        // There is no bun in this PATH.
        ("tool.ts", Some("node"), none.clone(), Runtime::Node),
        // Only python3 is: the spawn falls back to it.
        ("worker.py", Some("python"), none.clone(), Runtime::Other),
        ("task.sh", Some("bash"), none.clone(), Runtime::Other),
        ("run.py", None, none.clone(), Runtime::Other),
        ("tool", Some("node"), strings(&["--enable-source-maps"]), Runtime::Node),
        ("binary", None, none.clone(), Runtime::Other),
        ("my app.js", Some("node"), none, Runtime::Node),
    ] {
        let command = place.app(&format!("script = '{script}'")).command;
        assert_eq!(command.interpreter.as_deref(), interpreter, "{script}");
        assert_eq!((command.interpreter_args, command.runtime), (args, runtime), "{script}");
        assert_eq!(command.script, place.path(script));
    }
    place.executable("bin/bun", "");
    assert_eq!(place.app("script = 'tool.ts'").command.runtime, Runtime::Bun);
}

#[test]
fn python_is_unbuffered_unless_told_otherwise() {
    let place = Place::new();
    assert_eq!(place.app("script = 'worker.py'").env.vars, vars(&[("PYTHONUNBUFFERED", "1")]));
    let spec = place.app("script = 'worker.py'\nenv.PYTHONUNBUFFERED = ''");
    assert_eq!(spec.env.vars, vars(&[("PYTHONUNBUFFERED", "")]));
}

#[test]
fn commands_shell_lines_and_pm_itself() {
    let place = Place::new();
    let gunicorn = place.app("script = 'gunicorn'\nargs = 'app:app'");
    assert_eq!(gunicorn.command.script, Path::new("gunicorn"), "looked up again at each spawn");
    assert_eq!(gunicorn.command.interpreter, None);

    place.executable("bin/npm", "");
    let line = place.app(
        r#"script = "npm start"
args = ["--", "it's"]"#,
    );
    assert_eq!(line.name.as_str(), "npm start");
    assert_eq!(line.command.script, Path::new("npm"), "and no shell");
    assert_eq!(line.command.args, ["start", "--", "it's"]);
    assert_eq!(line.command.runtime, Runtime::Other);

    let line = place.app("script = \"npm run 'a b'\"\nargs = [\"it's\"]\nshell = true\nname = 'x'");
    assert_eq!(line.command.script, Path::new("bash"));
    assert_eq!(line.command.args, ["-c", r"npm run 'a b' 'it'\''s'"]);
    std::fs::rename(place.path("bin/bash"), place.path("bin/sh")).unwrap();
    assert_eq!(place.app("script = 'a && b'\nname = 'x'\nshell = true").command.script, Path::new("sh"));

    let pm = place.app("script = 'pm'\nargs = ['serve']");
    assert_eq!((pm.command.script.to_str(), pm.name.as_str()), (Some("/usr/local/bin/pm"), "pm"));
}

#[test]
fn a_line_that_needs_a_shell_is_an_error_unless_there_is_to_be_one() {
    let place = Place::new();
    place.executable("bin/npm", "");
    for (line, because) in [
        ("npm start | cat", "`|`"),
        ("npm start && npm test", "`&`"),
        ("npm start; id", "`;`"),
        ("npm start > /tmp/x", "`>`"),
        ("npm start $(id)", "`$`"),
        ("npm start \"$HOME\"", "`$`"),
        ("npm start `id`", "```"),
        ("npm start *.js", "`*`"),
        ("npm start ~/x", "`~`"),
        ("npm start\nid", "`\\n`"),
        ("A=1 npm start", "`A=1`"),
        ("exec npm start", "`exec`"),
    ] {
        let error = place.error(&format!("name = 'x'\nscript = {}", toml::Value::from(line)));
        assert!(error.contains(&format!("this line needs a shell, because of {because}")), "{line}: {error}");
        assert!(error.contains("set `shell = true`"), "{error}");
    }
    for literal in ["npm 'a;b'", r"npm a\;b", "npm 'a b' \"c d\"", "npm a~b c#d"] {
        let app = place.app(&format!("name = 'x'\nscript = {}", toml::Value::from(literal)));
        assert_eq!(app.command.script, Path::new("npm"), "{literal}");
    }
    let error = place.error("name = 'x'\nscript = 'npm start'\nshell = true\ninterpreter = 'node'");
    assert!(error.contains("the shell is the interpreter of a line"), "{error}");
}

#[test]
fn messages_about_a_file_never_show_values_of_the_environment() {
    let place = Place::new();
    for text in [
        "[[apps]]\nscript = 'server.js'\n[apps.env]\nTOKEN = [\"hush\"] x\n",
        "[[apps]]\nscript = 'server.js'\n[apps.env]\nTOKEN = \"hush\n",
        "[[apps]]\nscript = 'server.js'\nenv = { TOKEN = 'hush', A = 'x', A = 'y' }\n",
        "[[apps]]\nscript = 'server.js'\nenv = 'hush'\n",
        "[[apps]]\nscript = 'server.js'\nenv_production.TOKEN = hush\n",
        "[[apps]]\nscript = 'server.js'\nenv.TOKEN = 'hush'\nenv.TOKEN = 'hush'\n",
        "[[apps]]\nscript = 'server.js'\nenv = { TOKEN = 'hush' }\nincrement_var = 'TOKEN'\n",
        "apps = [{ script = 'server.js', env = { TOKEN = 'hush' }, nonsense = 1 }]\n",
    ] {
        let error = place.resolve(text, &place.context()).unwrap_err();
        let (whole, lines): (_, Vec<String>) = (error.to_string(), error.lines().collect());
        assert!(!whole.contains("hush") && !lines.concat().contains("hush"), "{text}\n{whole}");
    }
    // The rest of a line is shown, with the carets where they belong.
    let text = "[[apps]]\nscript = 'server.js'\nenv = { TOKEN = 'a long secret', 'b=c' = 1 }\n";
    let error = place.resolve(text, &place.context()).unwrap_err().to_string();
    assert!(error.contains("env = { TOKEN = ********, 'b=c' = ******** }"), "{error}");
    let carets = error.lines().find(|line| line.contains('^')).unwrap().find('^');
    assert_eq!(carets, error.lines().find(|line| line.contains("TOKEN")).unwrap().find("'b=c'"), "{error}");
}

#[test]
fn the_path_of_the_app_is_what_counts() {
    let place = Place::new();
    place.executable("other/ruby", "");
    place.write("x.rb", "");
    assert!(place.error("script = 'x.rb'").contains("a .rb file is run by ruby, which is not in PATH"));
    let path = place.path("other");
    let spec = place.app(&format!("script = 'x.rb'\nenv.PATH = '{}'", path.display()));
    assert_eq!(spec.command.interpreter.as_deref(), Some("ruby"));
}

#[test]
fn symlinks_stay_as_they_are_written() {
    let place = Place::new();
    place.write("releases/1/app.js", "");
    std::os::unix::fs::symlink(place.path("releases/1"), place.path("current")).unwrap();
    let spec = place.app("cwd = './current'\nscript = 'app.js'");
    assert_eq!(spec.cwd, place.path("current"));
    assert_eq!(spec.command.script, place.path("current/app.js"));
}

// ---- the command line ------------------------------------------------------------------------------------------------

#[test]
fn a_script_on_the_command_line() {
    let place = Place::new();
    let overrides = Overrides {
        name: Some("api".to_owned()),
        instances: Some(Instances::Count(2)),
        args: Some(strings(&["--x"])),
        wait_ready: Some(true),
        listen_timeout: Some(millis(5)),
        kill_timeout: Some(millis(6)),
        kill_signal: Some(Signal::TERM),
        max_restarts: Some(2),
        max_memory_restart: Some(200 << 20),
        stop_exit_codes: Some(vec![3]),
        autorestart: Some(false),
        autostart: Some(false),
        namespace: Some("n".to_owned()),
        interpreter_args: Some(strings(&["--y"])),
        out_file: Some("o".to_owned()),
        error_file: Some("e".to_owned()),
        merge_logs: Some(true),
        time: Some(true),
        restart_delay: Some(millis(7)),
        exp_backoff_restart_delay: Some(millis(8)),
        shutdown_with_message: Some(true),
        listen: vec!["127.0.0.1:0".parse().unwrap()],
        ..Overrides::default()
    };
    let spec = place.start("./server.js", &overrides).unwrap();
    assert_eq!((spec.name.as_str(), spec.namespace.as_str(), spec.origin), ("api", "n", None));
    assert_eq!(spec.command.script, place.path("server.js"));
    assert_eq!((spec.command.args, spec.command.interpreter_args), (strings(&["--x"]), strings(&["--y"])));
    assert_eq!((spec.mode, spec.instances, spec.cwd), (ExecMode::Cluster, 2, place.path("")));
    assert_eq!((spec.ready.wait_ready, spec.ready.listen_timeout), (true, millis(5)));
    assert_eq!(
        (spec.stop.timeout, spec.stop.signal, spec.stop.with_message),
        (millis(6), Signal::TERM, true)
    );
    assert_eq!((spec.restart.max_restarts, spec.restart.stop_exit_codes), (2, vec![3]));
    assert_eq!(spec.max_memory, Some(200 << 20));
    assert_eq!((spec.restart.autorestart, spec.autostart), (false, false));
    assert_eq!((spec.restart.restart_delay, spec.restart.backoff_base), (Some(millis(7)), millis(8)));
    assert_eq!((spec.logs.out_file, spec.logs.error_file), (Some(place.path("o")), Some(place.path("e"))));
    assert_eq!((spec.logs.merge, spec.logs.date_format.is_some()), (Some(true), true));
    assert_eq!(spec.listen.len(), 1);
}

#[test]
fn fork_is_forced_and_cwd_moves_the_script() {
    let place = Place::new();
    place.write("sub/app.js", "");
    let overrides = Overrides {
        exec_mode: Some(ExecMode::Fork),
        instances: Some(Instances::Max),
        cwd: Some("sub".to_owned()),
        log_date_format: Some("HH".to_owned()),
        interpreter: Some("bash".to_owned()),
        ..Overrides::default()
    };
    let spec = place.start("app.js", &overrides).unwrap();
    assert_eq!((spec.mode, spec.instances), (ExecMode::Fork, 4));
    assert_eq!((spec.cwd, spec.command.script), (place.path("sub"), place.path("sub/app.js")));
    assert_eq!(spec.command.interpreter.as_deref(), Some("bash"));
    assert_eq!(spec.logs.date_format.as_deref(), Some("HH"));
    assert_eq!(
        place.start("server.js", &overrides).unwrap_err(),
        "script not found: [dir]/sub/server.js (and there is no command \"server.js\" in PATH)\n = the path starts at `cwd`; there is [dir]/server.js"
    );
}

#[test]
fn mistakes_on_the_command_line_name_the_option() {
    let place = Place::new();
    let with = |change: fn(&mut Overrides)| {
        let mut overrides = Overrides::default();
        change(&mut overrides);
        overrides
    };
    for (target, overrides, expected) in [
        (
            "./serve.js",
            Overrides::default(),
            "script not found: [dir]/serve.js\n = did you mean `server.js`?",
        ),
        (
            "server.js",
            with(|o| o.name = Some("a/b".to_owned())),
            "--name: \"a/b\" cannot be the name of an app: '/'",
        ),
        ("server.js", with(|o| o.name = Some("n".repeat(10_000))), "… (10000 characters) cannot be the name"),
        ("server.js", with(|o| o.name = Some("..".to_owned())), "--name: \"..\" cannot be"),
        ("server.js", with(|o| o.name = Some("a\nb".to_owned())), "--name: \"a\\nb\" cannot be"),
        ("server.js", with(|o| o.interpreter = Some("pythn3".to_owned())), "did you mean `python3`?"),
        (
            "server.js",
            with(|o| o.interpreter = Some("/no/node".to_owned())),
            "interpreter not found: /no/node",
        ),
        (
            "server.js",
            with(|o| o.instances = "-5".parse().ok()),
            "--instances: -5 leaves no instance on 4 CPUs; at least 1 is needed\n = allowed here: -3 to -1, 0, \"max\"",
        ),
        (
            "server.js",
            with(|o| o.cwd = Some("nowhere".to_owned())),
            "--cwd: `cwd` is no directory: [dir]/nowhere",
        ),
        ("page.php", Overrides::default(), "a .php file is run by php, which is not in PATH"),
        ("bin", Overrides::default(), "script not found: [dir]/bin"),
        ("./bin", Overrides::default(), "[dir]/bin is a directory"),
    ] {
        let error = place.start(target, &overrides).unwrap_err();
        assert!(error.contains(expected), "{target}: {error}");
    }
}

#[test]
fn options_are_laid_over_every_selected_app() {
    let place = Place::new();
    let text = "[[apps]]\nscript = 'server.js'\n[[apps]]\nname = 'task'\nscript = 'gone.sh'\n";
    let only = |names: &[&str]| Overrides {
        only: strings(names),
        instances: Some(Instances::Count(3)),
        ..Overrides::default()
    };
    // The script of the app that is not selected does not have to be there.
    let resolved = place.resolve_with(text, &only(&["server"]), &place.context()).unwrap();
    assert_eq!((resolved.len(), resolved[0].spec.instances), (1, 3));
    let error = place.resolve_with(text, &only(&["sever"]), &place.context()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "--only: the file has no app \"sever\"; it has server, task\n = did you mean `server`?"
    );
    let named = Overrides { name: Some("x".to_owned()), ..Overrides::default() };
    let error = place.resolve_with(text, &named, &place.context()).unwrap_err();
    assert!(error.to_string().contains("--name: the file has 2 apps"), "{error}");
}

#[test]
fn arguments_that_are_config_files() {
    for (argument, expected) in [
        ("ecosystem.toml", Argument::Config),
        ("/srv/app/prod.TOML", Argument::Config),
        ("ecosystem.config.js", Argument::ForeignConfig),
        ("apps.yaml", Argument::ForeignConfig),
        ("process.json", Argument::ForeignConfig),
        ("server.js", Argument::Other),
        ("api", Argument::Other),
        ("node app.js --config x.toml", Argument::Other),
    ] {
        assert_eq!(file::classify(argument), expected, "{argument}");
    }
    let error = file::load(Path::new("ecosystem.config.js"), Path::new("/")).unwrap_err();
    insta::assert_snapshot!(error, @r"
    cannot read ecosystem.config.js: this version of pm reads TOML only
     = `pm init` writes an ecosystem.toml to start from; its keys are those of PM2
    ");
}

// ---- bad files -------------------------------------------------------------------------------------------------------

/// Every file in tests/fixtures/config/bad, with all that is said about it.
#[test]
fn bad_files_get_errors_with_line_column_and_what_would_work() {
    let place = Place::new();
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/config/bad");
    let mut names: Vec<String> = std::fs::read_dir(&fixtures)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".toml"))
        .collect();
    names.sort();
    assert!(names.len() >= 15, "{names:?}");
    let context = Context { cpus: 2, ..place.context() };
    for name in names {
        std::fs::copy(fixtures.join(&name), place.path(&name)).unwrap();
        let error = file::check(Path::new(&name), &Overrides::default(), &context).expect_err(&name);
        for line in error.lines() {
            assert!(line.starts_with(&format!("{name}:")), "every problem of a file has its place: {line}");
        }
        insta::with_settings!({
            snapshot_path => "fixtures/config/snapshots",
            prepend_module_to_snapshot => false,
            omit_expression => true,
        }, {
            insta::assert_snapshot!(name.trim_end_matches(".toml"), place.clean(&error.to_string()));
        });
    }
}

#[test]
fn files_that_cannot_be_read() {
    let place = Place::new();
    let load = |name: &str| file::load(Path::new(name), &place.context().cwd).unwrap_err().to_string();
    assert_eq!(load("missing.toml"), "cannot read missing.toml: No such file or directory (os error 2)");
    std::fs::create_dir(place.path("dir.toml")).unwrap();
    assert_eq!(load("dir.toml"), "cannot read dir.toml: Is a directory (os error 21)");
    std::fs::write(place.path("latin1.toml"), b"[[apps]]\nname = \"caf\xe9\"\n").unwrap();
    assert!(
        load("latin1.toml").starts_with("latin1.toml:2:12: this is not UTF-8"),
        "{}",
        load("latin1.toml")
    );
    let huge = std::fs::File::create(place.path("huge.toml")).unwrap();
    huge.set_len(1 << 40).unwrap();
    assert_eq!(load("huge.toml"), "cannot read huge.toml: it is larger than 8 MiB");
}

#[test]
fn a_name_of_ten_thousand_characters_is_refused_in_a_few_lines() {
    let place = Place::new();
    let error = place.error(&format!("name = \"{}\"", "n".repeat(10_000)));
    assert!(error.contains("ecosystem.toml:3:8: ") && error.contains("(10000 characters)"), "{error}");
    assert!(error.len() < 600, "{error}");
    let error = place.error(&format!("{} = 1", "k".repeat(10_000)));
    assert!(error.contains("unknown key") && error.len() < 600, "{error}");
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { cases: 300, ..Default::default() })]

    /// Whatever stands in a file, there is an answer and no panic, and every place lies in the file.
    #[test]
    fn any_text_is_read_or_refused(text in r#"(?s)(\[\[apps\]\]\n)?([a-z_]{1,6} ?= ?["'\[{]?[a-zü0-9. ,=]{0,9}["'\]}]?\n){0,6}.{0,20}"#) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("e.toml");
        std::fs::write(&path, &text).unwrap();
        let lines = text.matches('\n').count() + 1;
        if let Err(error) = file::load(&path, Path::new("/")) {
            let _ = error.to_string();
            for line in error.lines() {
                let number: usize = line.rsplit_once("e.toml:").unwrap().1.split(':').next().unwrap().parse().unwrap();
                assert!((1..=lines).contains(&number), "{line}");
            }
        }
    }
}

// ---- documents -------------------------------------------------------------------------------------------------------

fn repository(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// Compares a part of a document with what the schema says; with PM_WRITE_DOCS=1 writes it.
fn keep_part(document: &str, begin: &str, end: Option<&str>, expected: &str) {
    let path = repository(document);
    let text = std::fs::read_to_string(&path).unwrap();
    let start = text.find(begin).unwrap_or_else(|| panic!("{document} has no line {begin:?}")) + begin.len();
    let stop = end.map_or(text.len(), |end| start + text[start..].find(end).unwrap());
    if text[start..stop] == *expected {
        return;
    }
    if std::env::var_os("PM_WRITE_DOCS").is_some() {
        std::fs::write(&path, format!("{}{expected}{}", &text[..start], &text[stop..])).unwrap();
        return;
    }
    panic!("{document} is behind src/config/schema.rs; run the test once with PM_WRITE_DOCS=1");
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

fn is_toml(text: &str) -> bool {
    toml::de::DeValue::parse(text).is_ok()
}

fn code_if_toml(text: &str) -> String {
    if is_toml(text) || text.starts_with('<') { format!("`{text}`") } else { text.to_owned() }
}

#[test]
fn the_reference_lists_every_key() {
    let mut table = String::from("\n| key | value | default | meaning |\n| --- | --- | --- | --- |\n");
    for key in &FILE_KEYS {
        table +=
            &format!("| `{}` | {} | {} | {} |\n", key.name, cell(key.takes), key.default, cell(key.meaning));
    }
    keep_part(
        "docs/config.md",
        "<!-- file keys: written by tests/config.rs -->\n",
        Some("<!-- end of file keys -->"),
        &format!("{table}\n"),
    );

    let mut table = String::from("\n| key | value | default | meaning |\n| --- | --- | --- | --- |\n");
    for key in &KEYS {
        let aliases = key.aliases.iter().map(|alias| format!("`{alias}`")).collect::<Vec<_>>().join(", ");
        let aliases = if aliases.is_empty() { aliases } else { format!(" ({aliases})") };
        let (name, default) = (key.name, cell(&code_if_toml(key.default)));
        table +=
            &format!("| `{name}`{aliases} | {} | {default} | {} |\n", cell(key.takes), cell(key.meaning));
    }
    keep_part(
        "docs/config.md",
        "<!-- app keys: written by tests/config.rs -->\n",
        Some("<!-- end of app keys -->"),
        &format!("{table}\n"),
    );

    let mut table = String::from("\n| key | meaning |\n| --- | --- |\n");
    for (key, meaning) in TABLE_KEYS {
        table += &format!("| `{key}` | {meaning} |\n");
    }
    keep_part(
        "docs/config.md",
        "<!-- listener keys: written by tests/config.rs -->\n",
        Some("<!-- end of listener keys -->"),
        &format!("{table}\n"),
    );

    let mut table = String::from("\n| key | meaning |\n| --- | --- |\n");
    for (key, meaning) in probe::TABLE_KEYS {
        table += &format!("| `{key}` | {} |\n", cell(meaning));
    }
    keep_part(
        "docs/config.md",
        "<!-- probe keys: written by tests/config.rs -->\n",
        Some("<!-- end of probe keys -->"),
        &format!("{table}\n"),
    );

    let mut table = String::from("\n| key | meaning |\n| --- | --- |\n");
    for (key, meaning) in process::LIMIT_KEYS {
        table += &format!("| `{key}` | {} |\n", cell(meaning));
    }
    keep_part(
        "docs/config.md",
        "<!-- keys of limits: written by tests/config.rs -->\n",
        Some("<!-- end of keys of limits -->"),
        &format!("{table}\n"),
    );
}

const EXAMPLE: &str = "ecosystem.example.toml";
const EVERY_KEY: &str = "PM2's spellings (killTimeout, exec_interpreter, …) work too.\n";

#[test]
fn the_example_shows_every_key_with_its_default() {
    let mut part = String::from(
        "\n# How many instances may be launching at once; default: 2 × CPUs. Stands above the first [[apps]].\n# start_parallelism = 4\n\n# [[apps]]\n",
    );
    for key in &KEYS {
        part += "\n";
        part += &format!("# {}", key.meaning);
        let value = if is_toml(key.default) {
            key.default
        } else {
            part += &match key.default {
                "required" => " Required.".to_owned(),
                default => format!(" Default: {default}."),
            };
            key.example
        };
        part += &format!("\n# {} = {value}\n", key.name);
    }
    keep_part(EXAMPLE, EVERY_KEY, None, &part);
}

/// Takes the `# ` from lines that are TOML in a comment.
fn activated(text: &str) -> String {
    let is_toml_line = |line: &str| {
        line == "[[apps]]"
            || line.split_once(" = ").is_some_and(|(key, _)| {
                !key.is_empty() && key.chars().all(|c| c.is_ascii_alphabetic() || c == '_')
            })
    };
    text.lines()
        .map(|line| line.strip_prefix("# ").filter(|rest| is_toml_line(rest)).unwrap_or(line))
        .fold(String::new(), |text, line| text + line + "\n")
}

#[test]
fn the_example_works_as_it_is_and_with_everything_switched_on() {
    let place = Place::new();
    place.write("examples/hello.js", "");
    place.write(".env", "");
    let text = std::fs::read_to_string(repository(EXAMPLE)).unwrap();

    let resolved = place.resolve(&text, &place.context()).unwrap();
    assert_eq!(resolved.len(), 1);
    let www = &resolved[0].spec;
    assert_eq!((www.name.as_str(), www.instances, www.mode), ("www", 2, ExecMode::Cluster));
    assert_eq!(www.command.script, Path::new("/usr/local/bin/pm"), "it needs nothing but pm");
    assert_eq!(www.command.args, ["serve", "examples/www"]);
    assert_eq!(www.listen[0].address, ListenAddress::Tcp("127.0.0.1:8080".parse().unwrap()));
    assert!(www.ready.wait_ready && www.can_overlap());

    let (apps, keys) = text.split_once(EVERY_KEY).unwrap();
    let resolved = place.resolve(&activated(apps), &place.context()).unwrap();
    let hello = &resolved[1].spec;
    assert_eq!((hello.name.as_str(), hello.instances, hello.mode), ("hello", 2, ExecMode::Cluster));
    assert!(hello.is_node_cluster() && hello.ready.wait_ready);

    // The one section that shows how `env_NAME` is written gets a name here; a working directory must exist.
    let keys = activated(keys).replace("env_NAME", "env_production").replace("/srv/api/current", "/");
    let script = place.path("server.js");
    let keys = keys.replace("\"server.js\"", &format!("{:?}", script.to_str().unwrap()));
    let keys = keys.replace("\".env\"", &format!("{:?}", script.to_str().unwrap()));
    for key in &KEYS {
        let name = if key.name == "env_NAME" { "env_production" } else { key.name };
        assert!(keys.lines().any(|line| line.starts_with(&format!("{name} = "))), "{name} is missing");
    }
    let resolved = place.resolve(&keys, &place.context());
    let spec = resolved.unwrap_or_else(|error| panic!("{}", place.clean(&error.to_string()))).remove(0).spec;
    assert_eq!(spec.name.as_str(), "api");
}

#[test]
fn the_template_of_init_works() {
    let place = Place::new();
    let resolved = place.resolve(template::ECOSYSTEM, &place.context()).unwrap();
    assert_eq!((resolved[0].spec.name.as_str(), resolved[0].spec.instances), ("app", 2));
    let mut context = place.context();
    context.env_name = Some("production".to_owned());
    let resolved = place.resolve(template::ECOSYSTEM, &context).unwrap();
    assert_eq!(resolved[0].spec.env.vars, vars(&[("NODE_ENV", "production")]));
    assert_eq!(resolved[0].warnings, [] as [String; 0]);
}
