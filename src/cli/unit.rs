//! The systemd unit of a daemon, as text. Asks nobody and writes nothing.
//!
//! The unit lets the daemon crash, be killed and be restarted without any app noticing, and ends the apps when it is
//! stopped; docs/systemd.md gives the reasons line by line.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use crate::sys::cgroup::root::LEAF;

/// The first line of every unit that `pm startup` wrote.
pub const MARK: &str = "# Written by `pm startup`";

/// The oldest systemd that can run the unit: EXTEND_TIMEOUT_USEC is of 236.
pub const OLDEST: u32 = 236;

/// Since this version systemd puts a main process into a group below the unit's; before, the unit's own group has to be
/// free to take one.
pub const KNOWS_SUBGROUPS: u32 = 254;

/// Which service manager runs the daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The system's; the daemon is root's.
    System,
    /// The system's; the daemon is this user's.
    SystemFor {
        /// The user's name.
        user: String,
    },
    /// The user's own.
    User,
}

/// What the unit is to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// Who runs it.
    pub scope: Scope,
    /// An absolute path that stays the same when `pm` is upgraded.
    pub program: PathBuf,
    /// The daemon's home.
    pub home: PathBuf,
    /// The version of systemd it is for.
    pub version: u32,
}

impl Unit {
    /// The text of the unit file.
    #[must_use]
    pub fn text(&self) -> String {
        let pm = quoted(&self.program);
        let home = quoted(&self.home);
        let home_argument = written(&self.home);
        let (user_flag, target) = match self.scope {
            Scope::User => (" --user", "default.target"),
            Scope::System | Scope::SystemFor { .. } => ("", "multi-user.target"),
        };
        let system = self.scope != Scope::User;
        let mut text = format!(
            "{MARK}, which replaces it when it is run again; `pm unstartup` removes it.\n\
             # Changes of your own belong into a drop-in: systemctl{user_flag} edit NAME\n\
             [Unit]\n\
             Description=pm, process manager\n"
        );
        let mut line = |line: &str| {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{line}");
        };
        if system {
            line("Wants=network-online.target");
            line("After=network-online.target");
            line(&format!("RequiresMountsFor={home}"));
        }
        line("# Killed as often as you like: every daemon that follows finds the apps running.");
        line("StartLimitIntervalSec=0");
        line("");
        line("[Service]");
        line("Type=notify");
        line("NotifyAccess=main");
        if let Scope::SystemFor { user } = &self.scope {
            line(&format!("User={user}"));
        }
        line(&format!("ExecStart={pm} daemon --home {home_argument}"));
        line("# The daemon becomes the program that is installed now; what runs goes on.");
        line(&format!("ExecReload={pm} --home {home_argument} upgrade"));
        line(
            "# A restart leaves the apps to the next daemon; a stop ends them, and what is left after that.",
        );
        line(&format!("ExecStop=-{pm} unit stop %n{user_flag}"));
        line(&format!("ExecStopPost=-{pm} unit cleanup %n{user_flag}"));
        line("KillMode=process");
        line("# The daemon asks for more as long as apps take to stop.");
        line("TimeoutStopSec=90");
        line("WatchdogSec=60");
        line("Restart=on-failure");
        line("RestartPreventExitStatus=2");
        line("RestartSec=100ms");
        if self.version >= 254 {
            line("RestartSteps=6");
            line("RestartMaxDelaySec=5s");
        }
        line("Delegate=yes");
        if self.version >= KNOWS_SUBGROUPS {
            line("# No process may be in a group that is divided for the apps.");
            line(&format!("DelegateSubgroup={LEAF}"));
        }
        line("TasksMax=infinity");
        if self.version >= 243 {
            line("# One app that runs out of memory is one app.");
            line("OOMPolicy=continue");
        }
        if system {
            line("OOMScoreAdjust=-900");
            line("Environment=PM_APPS_OOM_SCORE_ADJ=0");
            line("LimitNOFILE=65536:1048576");
        }
        line("");
        line("[Install]");
        line(&format!("WantedBy={target}"));
        text
    }
}

/// A path as one word of a unit file, quoted where it has to be and without specifiers (systemd.unit(5)). Variables are
/// not replaced there, nor is `$$`: not in RequiresMountsFor=, and not in the first word of a command line.
fn quoted(path: &Path) -> String {
    word(path.display().to_string())
}

fn word(text: String) -> String {
    let text = text.replace('%', "%%");
    let plain = |c: char| c.is_alphanumeric() || "/._-+:@,=%$~".contains(c);
    if text.chars().all(plain) {
        return text;
    }
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

/// The version in the first line of `systemctl --version`: "systemd 252 (252.38-1~deb12u1)".
#[must_use]
pub fn version_in(text: &str) -> Option<u32> {
    let digits = text.split_whitespace().nth(1)?;
    digits.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// The job that systemd carries out for a unit, in the lines of `systemctl list-jobs`: "start", "stop", "restart", …
#[must_use]
pub fn job_of<'a>(unit: &str, jobs: &'a str) -> Option<&'a str> {
    jobs.lines().find_map(|line| {
        let mut words = line.split_whitespace().skip_while(|word| word.parse::<u64>().is_err()).skip(1);
        (words.next()? == unit).then(|| words.next()).flatten()
    })
}

/// The home that the unit in this text is for, as it is written there.
#[must_use]
pub fn home_line(text: &str) -> Option<&str> {
    let start = text.lines().find_map(|line| line.strip_prefix("ExecStart="))?;
    Some(start.split_once(" daemon --home ")?.1)
}

/// How a home is written in a unit: as an argument of a command line, which has no variables either
/// (systemd.service(5), COMMAND LINES).
#[must_use]
pub fn written(home: &Path) -> String {
    word(home.display().to_string().replace('$', "$$"))
}

/// Whether a name is one for a unit, without `.service`.
#[must_use]
pub fn is_unit_name(name: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || ":_.-".contains(c);
    !name.is_empty() && name.len() <= 200 && !name.starts_with(['.', '-']) && name.chars().all(fits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::systemctl::{Instance, complaints};

    fn unit(scope: Scope, version: u32) -> Unit {
        Unit { scope, program: "/usr/local/bin/pm".into(), home: "/var/lib/pm".into(), version }
    }

    fn has(text: &str, line: &str) -> bool {
        text.lines().any(|known| known == line)
    }

    #[test]
    fn directives_are_those_that_the_version_knows() {
        let text = |version| unit(Scope::System, version).text();
        assert!(!text(239).contains("OOMPolicy") && !text(239).contains("RestartSteps"));
        assert!(has(&text(252), "OOMPolicy=continue") && !text(252).contains("RestartSteps"));
        assert!(has(&text(254), "DelegateSubgroup=_daemon") && !text(253).contains("DelegateSubgroup"));
        assert!(has(&text(257), "RestartSteps=6") && has(&text(257), "RestartMaxDelaySec=5s"));
        for text in [text(239), text(252), text(257)] {
            assert!(text.starts_with(MARK));
            assert!(!text.contains("PIDFile"), "{text}");
            assert!(has(&text, "ExecReload=/usr/local/bin/pm --home /var/lib/pm upgrade"), "{text}");
        }
    }

    #[test]
    fn scopes_differ_in_what_a_user_may_not_do() {
        let system = unit(Scope::System, 252).text();
        assert!(has(&system, "WantedBy=multi-user.target") && has(&system, "OOMScoreAdjust=-900"));
        assert!(has(&system, "ExecStop=-/usr/local/bin/pm unit stop %n") && !system.contains("\nUser="));
        let ann = unit(Scope::SystemFor { user: "ann".into() }, 252).text();
        assert!(has(&ann, "User=ann") && has(&ann, "RequiresMountsFor=/var/lib/pm"));
        let own = unit(Scope::User, 252).text();
        assert!(has(&own, "WantedBy=default.target"));
        assert!(has(&own, "ExecStop=-/usr/local/bin/pm unit stop %n --user"));
        for line in ["User=", "OOMScoreAdjust", "network-online", "RequiresMountsFor", "LimitNOFILE"] {
            assert!(!own.contains(line), "{line}");
        }
    }

    #[test]
    fn odd_paths_stay_one_word_and_mean_nothing_else() {
        let odd = Unit {
            program: "/opt/my pm/100%/$x/pm".into(),
            home: "/srv/$a \"b\"".into(),
            ..unit(Scope::System, 252)
        };
        let text = odd.text();
        for line in [
            r#"ExecStart="/opt/my pm/100%%/$x/pm" daemon --home "/srv/$$a \"b\"""#,
            r#"ExecReload="/opt/my pm/100%%/$x/pm" --home "/srv/$$a \"b\"" upgrade"#,
            r#"ExecStop=-"/opt/my pm/100%%/$x/pm" unit stop %n"#,
            r#"RequiresMountsFor="/srv/$a \"b\"""#,
        ] {
            assert!(has(&text, line), "{line}\n{text}");
        }
        let odd = Unit { home: "/srv/my apps".into(), ..unit(Scope::System, 252) };
        assert_eq!(home_line(&odd.text()), Some(written(Path::new("/srv/my apps")).as_str()));
        assert_eq!(home_line("[Service]\nExecStart=/bin/true\n"), None);
    }

    #[test]
    fn systemd_finds_a_program_in_an_odd_place() {
        use std::os::unix::fs::symlink;
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("a $b ${c} $$d 100% e");
        std::fs::create_dir(&place).unwrap();
        symlink("/bin/true", place.join("pm")).unwrap();
        let unit = |program| Unit { program, ..unit(Scope::System, OLDEST) };
        let file = dir.path().join("odd.service");
        let complaints = |unit: &Unit| {
            std::fs::write(&file, unit.text()).unwrap();
            complaints(Instance::System, &file).unwrap_or_default()
        };
        let control = complaints(&unit(place.join("other")));
        if !control.contains("not executable") {
            return eprintln!("`systemd-analyze verify` does not work here: {control}");
        }
        assert_eq!(complaints(&unit(place.join("pm"))), "");
    }

    #[test]
    fn versions_and_jobs_are_read_as_systemctl_prints_them() {
        assert_eq!(version_in("systemd 252 (252.38-1~deb12u1)\n+PAM +AUDIT"), Some(252));
        assert_eq!(version_in("systemd 257~rc1 (257~rc1-1)"), Some(257));
        assert_eq!(version_in("command not found"), None);
        let jobs = "  71 pm.service            restart running\n ● 80 other.service stop waiting\n";
        assert_eq!(job_of("pm.service", jobs), Some("restart"));
        assert_eq!(job_of("other.service", jobs), Some("stop"));
        assert_eq!(job_of("m.service", jobs), None);
        assert_eq!(job_of("pm.service", "No jobs running.\n"), None);
    }

    #[test]
    fn names_of_units() {
        for good in ["pm", "pm-ann", "pm_2.x", "a:b"] {
            assert!(is_unit_name(good), "{good}");
        }
        for bad in ["", "-pm", ".pm", "a/b", "a b", "pm%n", "pm@x", "ü"] {
            assert!(!is_unit_name(bad), "{bad}");
        }
    }
}
