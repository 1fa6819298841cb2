//! The machine as a scenario sees it: commands, processes, units, and the order in which scenarios run.

use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use pm::sys::{clock, poll};

/// How long anything may take on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(40);

/// Where the program under test is installed in the private machine.
pub(crate) const PM: &str = "/usr/local/bin/pm";

/// Where a scenario's files are.
pub(crate) const DIR: &str = "/root/scenario";

/// A scenario by its name.
pub(crate) type Scenario = (&'static str, fn());

/// Runs all scenarios, or one of this name, and says how each went.
pub(crate) fn run(all: &[Scenario], only: Option<String>) -> ExitCode {
    assert_eq!(fs::read_to_string("/proc/1/comm").unwrap().trim(), "systemd", "not on this machine");
    fs::copy(env!("CARGO_BIN_EXE_pm"), PM).unwrap();
    let mut failed = Vec::new();
    for (name, play) in all.iter().filter(|(name, _)| only.as_deref().is_none_or(|only| name.contains(only)))
    {
        let begun = clock::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            clean_up();
            fs::create_dir_all(DIR).unwrap();
            play();
        }));
        let word = if outcome.is_ok() { "ok" } else { "FAILED" };
        println!("scenario {name}: {word} ({:.1} s)", clock::now().since(begun).as_secs_f64());
        if outcome.is_err() {
            failed.push(*name);
            println!(
                "{}",
                sh("systemctl status 'pm*' --no-pager --full; journalctl --no-pager -n 60; ps -ef").text
            );
        }
    }
    if failed.is_empty() {
        return ExitCode::SUCCESS;
    }
    println!("failed: {}", failed.join(", "));
    ExitCode::FAILURE
}

/// No unit, no daemon, no app, no home.
fn clean_up() {
    sh("for unit in $(systemctl list-units --all --plain --no-legend 'pm*.service' | cut -d' ' -f1); do \
          systemctl kill -s KILL $unit; systemctl stop $unit; systemctl reset-failed $unit; done; \
        rm -rf /etc/systemd/system/pm* /run/systemd/system/pm* /etc/systemd/system/*/pm*.service /root/scenario \
          /var/lib/pm; systemctl daemon-reload");
}

/// What a command did.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) line: String,
    pub(crate) code: i32,
    /// Standard output, then standard error.
    pub(crate) text: String,
}

impl Run {
    #[track_caller]
    pub(crate) fn succeeds(self) -> Self {
        assert_eq!(self.code, 0, "{}\n{}", self.line, self.text);
        self
    }

    #[track_caller]
    pub(crate) fn code_is(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{}\n{}", self.line, self.text);
        self
    }

    #[track_caller]
    pub(crate) fn says(self, what: &str) -> Self {
        assert!(self.text.contains(what), "`{}` does not say {what:?}:\n{}", self.line, self.text);
        self
    }

    #[track_caller]
    pub(crate) fn says_not(self, what: &str) -> Self {
        assert!(!self.text.contains(what), "`{}` says {what:?}:\n{}", self.line, self.text);
        self
    }
}

/// Runs a line of shell.
pub(crate) fn sh(line: &str) -> Run {
    let output = Command::new("/bin/sh")
        .args(["-c", line])
        .env("PATH", "/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin")
        .env("HOME", "/root")
        .env_remove("PM_HOME")
        .env_remove("XDG_RUNTIME_DIR")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    Run {
        line: line.to_owned(),
        code: output.status.code().unwrap_or(-1),
        text: String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned(),
    }
}

/// Runs a line of shell, which must succeed; what it says, trimmed.
#[track_caller]
pub(crate) fn ok(line: &str) -> String {
    sh(line).succeeds().text.trim().to_owned()
}

/// Writes a file of the scenario.
pub(crate) fn write(name: &str, text: &str) {
    let path = Path::new(DIR).join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

/// Writes a config file and starts what it says.
#[track_caller]
pub(crate) fn start(apps: &str) {
    write("ecosystem.toml", apps);
    ok(&format!("cd {DIR} && pm start ecosystem.toml"));
}

/// A property of pm's unit.
pub(crate) fn unit(property: &str) -> String {
    sh(&format!("systemctl show pm.service --value --property {property}")).text.trim().to_owned()
}

/// A drop-in for pm's unit.
pub(crate) fn drop_in(lines: &str) {
    fs::create_dir_all("/etc/systemd/system/pm.service.d").unwrap();
    fs::write("/etc/systemd/system/pm.service.d/test.conf", format!("[Service]\n{lines}\n")).unwrap();
    ok("systemctl daemon-reload");
}

/// The pids of all instances that are online, by `name:id`.
pub(crate) fn pids() -> BTreeMap<String, i32> {
    pids_of("pm")
}

/// The same of another daemon, whose `pm` is called so.
pub(crate) fn pids_of(pm: &str) -> BTreeMap<String, i32> {
    let text = ok(&format!("{pm} jlist"));
    let list: serde_json::Value =
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    let rows = list.as_array().unwrap().iter();
    rows.filter(|row| row["pm2_env"]["status"] == "online")
        .map(|row| {
            let pid = i32::try_from(row["pid"].as_i64().unwrap()).unwrap();
            (format!("{}:{}", row["name"].as_str().unwrap(), row["pm_id"]), pid)
        })
        .collect()
}

/// Keeper and supervisor of root's daemon. There must be one of each.
#[track_caller]
pub(crate) fn daemon() -> (i32, i32) {
    let mut found = (0, 0);
    until("one keeper and one supervisor", || {
        let (keepers, supervisors) = daemons();
        if let ([keeper], [supervisor]) = (keepers.as_slice(), supervisors.as_slice()) {
            found = (*keeper, *supervisor);
            return Ok(());
        }
        Err(format!("keepers {keepers:?}, supervisors {supervisors:?}"))
    });
    found
}

fn daemons() -> (Vec<i32>, Vec<i32>) {
    let mut found = (Vec::new(), Vec::new());
    for (pid, words) in processes() {
        match words.get(1).map(String::as_str) {
            Some("daemon") => found.0.push(pid),
            Some("supervisor") => found.1.push(pid),
            _ => {}
        }
    }
    found
}

/// Every process of pm itself, with its command line.
pub(crate) fn processes() -> Vec<(i32, Vec<String>)> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words: Vec<String> =
            words.split(|&b| b == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
        if words[0] == "pm" || words[0] == PM {
            found.push((pid, words));
        }
    }
    found
}

pub(crate) fn alive(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().unwrap().trim_start().starts_with('Z'))
}

/// Waits for a condition; what it says last is in the failure.
#[track_caller]
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> Result<(), String>) {
    let deadline = clock::now() + PATIENCE;
    loop {
        match holds() {
            Ok(()) => return,
            Err(seen) => assert!(clock::now() < deadline, "{what}: not within {PATIENCE:?}; {seen}"),
        }
        poll::wait(&[], Some(Duration::from_millis(20))).unwrap();
    }
}

/// Waits until a shell line prints exactly this.
#[track_caller]
pub(crate) fn until_says(line: &str, wanted: &str) {
    until(line, || {
        let run = sh(line);
        if run.text.trim() == wanted { Ok(()) } else { Err(format!("it says {:?}", run.text)) }
    });
}
