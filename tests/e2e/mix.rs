//! A random mix of commands, crashes and interruptions against three apps, on top of each other.
//!
//! `web` and `api` are under load and never stopped: not one of their requests may fail. `job` gets everything. At every
//! point of rest the processes that the kernel knows are the rows of the table, and the ports that are open are those
//! of apps that run; in the end the daemon holds as many descriptors as in the beginning.
//!
//! Each run has another seed, which is printed; `PM_MIX_SEED=n` plays it again (commands and pauses, not the machine's
//! mood), `PM_MIX_STEPS=n` makes it longer (`bench/soak.sh`), `PM_MIX_STORY=1` prints what was done.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::support::census::Census;
use super::support::home::Running;
use super::support::load::{self, Connections, Load};
use super::support::node;
use super::support::{Home, PATIENT, Run, fixture, free_port, millis, process, stays, wait_until};

#[path = "../sim/rng.rs"]
mod rng;

use rng::Rng;

/// Steps of the short run that is part of the suite.
const STEPS: u64 = 18;

/// Steps between two points of rest.
const BURST: u64 = 9;

/// A command that goes on.
#[derive(Debug)]
struct Background {
    what: String,
    running: Running,
    /// The test itself has ended it.
    killed: bool,
}

struct Mix {
    home: Home,
    rng: Rng,
    web: u16,
    api: u16,
    job: u16,
    background: Vec<Background>,
    /// What was done, for the message of a failure.
    story: String,
    started: Instant,
    commands: u64,
    /// When keeper or supervisor was last killed.
    murdered: Instant,
}

impl Mix {
    fn start(seed: u64) -> Self {
        let mix = Self {
            home: Home::new(),
            rng: Rng::new(seed),
            web: free_port(),
            api: free_port(),
            job: free_port(),
            background: Vec::new(),
            story: String::new(),
            started: Instant::now(),
            commands: 0,
            murdered: Instant::now(),
        };
        mix.release(true);
        let Self { web, api, job, .. } = mix;
        mix.home.ecosystem(&format!(
            "[[apps]]\nname = 'web'\nscript = 'web.js'\nexec_mode = 'cluster'\ninstances = 2\nbalance = 'shared'\n\
             env = {{ PORT = '{web}' }}\n\
             [[apps]]\nname = 'api'\nscript = '{}'\ninterpreter = '{}'\nexec_mode = 'cluster'\ninstances = 2\n\
             listen = ['127.0.0.1:{api}']\nmin_uptime = '300ms'\n\
             [[apps]]\nname = 'job'\nscript = '{}'\nexec_mode = 'cluster'\ninstances = 2\nkill_timeout = '2s'\n\
             exp_backoff_restart_delay = '20ms'\nenv = {{ PORT = '{job}' }}\n",
            fixture("web.py"),
            node::python(),
            fixture("with-child.js"),
        ));
        mix.home.ok(&["start", "ecosystem.toml"]);
        for port in [web, api, job] {
            wait_until("the app answers", PATIENT, || load::get(port, "/"));
        }
        mix
    }

    /// The files of `web`: a release that serves, or one that throws at boot.
    fn release(&self, good: bool) {
        let text = if good {
            format!("require('{}');\n", fixture("web-textbook.js"))
        } else {
            "throw new Error('bad release');\n".to_owned()
        };
        self.home.write("web.js", &text);
    }

    fn note(&mut self, what: &str) {
        let at = Instant::now().duration_since(self.started);
        let _ = writeln!(self.story, "{:8.3} {what}", at.as_secs_f64());
    }

    /// A command whose end nobody waits for yet.
    fn begin(&mut self, args: &[&str]) {
        let what = args.join(" ");
        self.note(&format!("{what} &"));
        self.commands += 1;
        let running = Running::start(self.home.command(args), b"");
        self.background.push(Background { what, running, killed: false });
    }

    /// Something that takes its time, on top of whatever else goes on.
    fn act(&mut self) {
        let instances = (1 + self.rng.below(3)).to_string();
        match self.rng.below(20) {
            0..=2 => self.begin(&["reload", "web"]),
            3..=4 => self.begin(&["reload", "api"]),
            5 => self.begin(&["reload", "all"]),
            6..=7 => self.begin(&["scale", "web", &instances]),
            8 => self.begin(&["scale", "api", &instances]),
            9 => self.begin(&["scale", "job", &instances]),
            10 => self.begin(&["reload", "job"]),
            11 => self.begin(&["restart", "job"]),
            12..=13 => self.begin(&["stop", "job"]),
            14 => self.begin(&["start", "job"]),
            15 => self.begin(&["delete", "job"]),
            16..=17 => self.begin(&["start", "ecosystem.toml", "--only", "job"]),
            18 => self.begin(&["reload", "ecosystem.toml"]),
            _ => self.begin(&["reload", "web", "job"]),
        }
    }

    /// A death, or an interruption.
    fn hurt(&mut self) {
        match self.rng.below(4) {
            0 if Instant::now().duration_since(self.murdered) > Duration::from_secs(3) => {
                let keeper = self.rng.chance(30);
                self.note(if keeper { "the keeper is killed" } else { "the supervisor is killed" });
                process::end(if keeper { self.home.keeper() } else { self.home.supervisor() });
                self.murdered = Instant::now();
            }
            0 | 1 => {
                let census = Census::take(&self.home);
                let of_job: Vec<i32> = census
                    .runs
                    .into_iter()
                    .filter(|(run, _)| run.starts_with("job:"))
                    .flat_map(|(_, pids)| pids)
                    .collect();
                if !of_job.is_empty() {
                    let pid = *self.rng.pick(&of_job);
                    self.note(&format!("{} is killed", process::describe(pid)));
                    process::end(pid);
                }
            }
            _ => {
                let signal = *self.rng.pick(&[Signal::SIGKILL, Signal::SIGINT, Signal::SIGTERM]);
                let index = self.rng.next();
                let mut alive: Vec<&mut Background> = self
                    .background
                    .iter_mut()
                    .filter_map(|one| (!one.running.is_done()).then_some(one))
                    .collect();
                let count = alive.len() as u64;
                if count > 0 {
                    let one = &mut alive[usize::try_from(index % count).unwrap()];
                    one.killed = true;
                    process::signal(one.running.pid(), signal);
                    let what = format!("{signal} to `pm {}`", one.what);
                    self.note(&what);
                }
            }
        }
    }

    fn step(&mut self) {
        match self.rng.below(10) {
            0..=5 => self.act(),
            6..=7 => self.hurt(),
            8 => {
                let good = self.rng.chance(60);
                self.note(if good { "a good release" } else { "a bad release" });
                self.release(good);
                self.begin(&["reload", "web"]);
            }
            _ => {
                let args = *self.rng.pick(&[&["list"][..], &["jlist"], &["describe", "web"]]);
                self.note(&args.join(" "));
                let run = self.home.pm(args);
                assert_eq!(run.code, 0, "{run:#?}");
            }
        }
        let span = millis(*self.rng.pick(&[0, 0, 5, 30, 120, 250]));
        stays("a pause", span, || Ok::<_, ()>(()));
    }

    /// Everything ends; then the table, the kernel and the exit codes must agree.
    fn rest(&mut self) {
        for Background { what, running, killed } in std::mem::take(&mut self.background) {
            let run = running.end(Duration::from_secs(60));
            self.note(&format!("`pm {what}` ended with {}", run.code));
            // Done, failed or superseded, refused as busy, or deleted meanwhile: nothing else can come of an overlap.
            // `start` of a name that is no app takes it for a script, and finds none.
            let no_script = what == "start job" && run.code == 2 && run.err.contains("script not found");
            assert!(killed || no_script || matches!(run.code, 0 | 1 | 3 | 5), "`pm {what}`: {run:#?}");
        }
        self.release(true);
        let census = Census::balances(&self.home);
        let rows = self.home.rows();
        let up = |app: &str| rows.iter().filter(|row| row.name == app && row.status == "online").count();
        for app in ["web", "api"] {
            assert!(up(app) >= 1, "{app} is down: {rows:#?}");
            assert!(rows.iter().filter(|row| row.name == app).all(|row| row.status == "online"));
        }
        let mut ports = BTreeSet::from([self.web, self.api]);
        if up("job") > 0 {
            ports.insert(self.job);
        }
        assert_eq!(census.ports, ports, "open ports");
    }

    #[track_caller]
    fn ok(&mut self, args: &[&str]) -> Run {
        self.note(&args.join(" "));
        let run = self.home.pm(args);
        assert_eq!(run.code, 0, "{run:#?}");
        run
    }

    /// Two instances each, and descriptors of keeper and supervisor.
    fn canonical(&mut self) -> (usize, usize) {
        self.release(true);
        for app in ["web", "api"] {
            self.ok(&["scale", app, "2"]);
        }
        if !self.home.rows_of("job").is_empty() {
            self.ok(&["delete", "job"]);
        }
        self.ok(&["start", "ecosystem.toml"]);
        self.ok(&["reload", "all"]);
        self.rest();
        let count = |pid| process::descriptors(pid).len();
        // What was just closed may be on its way between the two.
        let mut last = (0, 0);
        wait_until("descriptors come to rest", PATIENT, || {
            let now = (count(self.home.keeper()), count(self.home.supervisor()));
            let same = now == last;
            last = now;
            if same { Ok(now) } else { Err(now) }
        })
    }
}

impl Drop for Mix {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.story);
        }
    }
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

#[test]
fn pain_04_after_any_mix_of_commands_and_deaths_processes_are_rows_and_no_request_is_lost() {
    let seed = number("PM_MIX_SEED").unwrap_or_else(|| {
        let since = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
        u64::from(since.subsec_nanos())
    });
    let steps = number("PM_MIX_STEPS").unwrap_or(STEPS);
    eprintln!("PM_MIX_SEED={seed} plays this mix again");
    let mut mix = Mix::start(seed);
    let before = mix.canonical();
    let loads = [mix.web, mix.api].map(|port| Load::start(port, 2, Connections::OnePerRequest));
    for step in 1..=steps {
        mix.step();
        if step % BURST == 0 || step == steps {
            mix.rest();
        }
        if step % 500 == 0 {
            eprintln!(
                "{step} steps, {} commands, {} requests",
                mix.commands,
                loads[0].done() + loads[1].done()
            );
        }
    }
    loads[0].more(100);
    let mut requests = 0;
    for load in loads {
        let tally = load.stop();
        requests += tally.ok;
        assert_eq!(tally.failed(), 0, "{tally:#?}");
    }
    assert!(requests >= 1000, "only {requests} requests");
    let after = mix.canonical();
    eprintln!(
        "{steps} steps, {} commands, {requests} requests, 0 failed; descriptors of keeper and supervisor {before:?} \
         before, {after:?} after",
        mix.commands
    );
    if number("PM_MIX_STORY").is_some() {
        eprintln!("{}", mix.story);
    }
    // A keeper that has taken over from another one may need fewer.
    assert!(after.0 <= before.0 && after.1 <= before.1, "descriptors: {before:?} before, {after:?} after");
}
