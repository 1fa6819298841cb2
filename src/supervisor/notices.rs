//! What the service manager hears of the daemon (sd_notify(3)): that it is up, how its apps are, that it ends and how
//! long that may take. Decides what is due and when; sends nothing.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use crate::model::moment::Moment;
use crate::model::status::Status;
use crate::policy::fleet::Fleet;

/// News of the apps' state are told at most this often.
const STATUS_EVERY: Duration = Duration::from_secs(1);

/// While the daemon ends, more time is asked for this often …
const EXTEND_EVERY: Duration = Duration::from_secs(5);
/// … and this much from then on.
const EXTEND_BY: Duration = Duration::from_secs(20);

/// What stopping takes beyond the apps' own times: leftovers, pipes, log files.
const MARGIN: Duration = Duration::from_secs(30);

/// What is to be sent now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Due {
    /// Lines for the service manager.
    pub text: Option<String>,
    /// A sign of life for the keeper.
    pub beat: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Notices {
    listens: bool,
    beat_every: Option<Duration>,
    beat_due: Option<Moment>,
    /// The state of the fleet that was told last.
    told: Option<u64>,
    status: String,
    status_due: Option<Moment>,
    extend_due: Option<Moment>,
    extend_until: Option<Moment>,
}

impl Notices {
    /// For a service manager that listens or does not, and wants a sign of life so often.
    #[must_use]
    pub fn new(listens: bool, watchdog: Option<Duration>) -> Self {
        Self {
            listens,
            // A quarter: three may be late.
            beat_every: watchdog.map(|every| every / 4),
            beat_due: watchdog.map(|_| Moment::default()),
            told: None,
            status: String::new(),
            status_due: None,
            extend_due: None,
            extend_until: None,
        }
    }

    /// As the environment of this process says.
    #[must_use]
    pub fn from_environment(keeper: u32) -> Self {
        let text = |name: &str| std::env::var(name).ok();
        let watchdog = crate::sys::notify::watchdog(
            text("WATCHDOG_USEC").as_deref(),
            text("WATCHDOG_PID").as_deref(),
            keeper,
        );
        let listens = std::env::var_os("NOTIFY_SOCKET").is_some();
        Self::new(listens, watchdog.filter(|_| listens))
    }

    /// What to say when the daemon is up, with or without apps.
    #[must_use]
    pub fn up(&self, keeper: u32, status: &str) -> Option<String> {
        self.listens.then(|| format!("READY=1\nMAINPID={keeper}\nSTATUS={status}"))
    }

    /// What to say when another program takes this one's place; [`Self::up`] follows (sd_notify(3), RELOADING).
    #[must_use]
    pub fn reloading(&self, now: Moment) -> Option<String> {
        let at = now.nanos() / 1000;
        self.listens.then(|| format!("RELOADING=1\nMONOTONIC_USEC={at}\nSTATUS=upgrading"))
    }

    /// What to say when the daemon begins to end, and its slowest app may take `longest` for that.
    pub fn ends(&mut self, now: Moment, longest: Duration) -> Option<String> {
        if !self.listens || self.extend_until.is_some() {
            return None;
        }
        self.extend_until = Some(now + longest + MARGIN);
        self.extend_due = Some(now + EXTEND_EVERY);
        Some(format!("STOPPING=1\n{}", extension()))
    }

    /// When to ask for what is due.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Moment> {
        [self.beat_due, self.status_due, self.extend_due].into_iter().flatten().min()
    }

    /// What is due now. `changed` counts the fleet's changes, `status` words them.
    pub fn due(&mut self, now: Moment, changed: u64, status: impl FnOnce() -> String) -> Due {
        let mut due = Due::default();
        if self.beat_due.is_some_and(|at| at <= now) {
            due.beat = true;
            self.beat_due = self.beat_every.map(|every| now + every);
        }
        if !self.listens {
            return due;
        }
        let mut text = String::new();
        if self.told != Some(changed) && self.status_due.is_none() {
            // Whatever follows within the second is told with it.
            self.status_due = Some(if self.told.is_none() { now } else { now + STATUS_EVERY });
        }
        if self.status_due.is_some_and(|at| at <= now) {
            self.status_due = None;
            self.told = Some(changed);
            let status = status();
            if status != self.status {
                // Writing to a String cannot fail.
                let _ = writeln!(text, "STATUS={status}");
                self.status = status;
            }
        }
        if self.extend_due.is_some_and(|at| at <= now) {
            let more = self.extend_until.is_some_and(|until| now < until);
            self.extend_due = more.then(|| now + EXTEND_EVERY);
            if more {
                text.push_str(&extension());
            }
        }
        due.text = (!text.is_empty()).then_some(text);
        due
    }
}

fn extension() -> String {
    format!("EXTEND_TIMEOUT_USEC={}", EXTEND_BY.as_micros())
}

/// The state of all apps in a line: "3 apps: 5 instances online, 1 errored".
#[must_use]
pub fn status_of(fleet: &Fleet) -> String {
    let apps = fleet.view();
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    let mut online = 0;
    for slot in apps.iter().flat_map(|app| &app.slots) {
        match slot.status {
            Status::Online => online += 1,
            other => *counts.entry(other.as_str()).or_default() += 1,
        }
    }
    let mut text = match apps.len() {
        0 => return "no apps".to_owned(),
        1 => "1 app: ".to_owned(),
        many => format!("{many} apps: "),
    };
    let _ = write!(text, "{online} online");
    for (word, count) in counts {
        let _ = write!(text, ", {count} {word}");
    }
    text
}

/// How long the slowest app may take to stop, by its own rules.
#[must_use]
pub fn longest_stop(fleet: &Fleet) -> Duration {
    let times = fleet.view().into_iter().map(|app| {
        let stop = &app.spec.stop;
        stop.timeout + stop.drain_timeout.unwrap_or(stop.timeout)
    });
    times.max().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(secs: u64) -> Moment {
        Moment::default() + Duration::from_secs(secs)
    }

    #[test]
    fn nobody_who_listens_means_nothing_to_say() {
        let mut notices = Notices::new(false, None);
        assert_eq!(notices.up(1, "no apps"), None);
        assert_eq!(notices.ends(at(1), Duration::ZERO), None);
        assert_eq!(notices.due(at(1), 1, || unreachable!()), Due::default());
        assert_eq!(notices.next_deadline(), None);
    }

    #[test]
    fn changes_are_told_once_and_at_most_every_second() {
        let mut notices = Notices::new(true, None);
        let mut say = |secs, changed, status: &str| notices.due(at(secs), changed, || status.to_owned()).text;
        assert_eq!(say(1, 1, "1 online").as_deref(), Some("STATUS=1 online\n"));
        assert_eq!(say(2, 1, "1 online"), None, "nothing new");
        assert_eq!(say(3, 2, "2 online"), None, "the second is not over");
        assert_eq!(say(3, 3, "3 online"), None);
        assert_eq!(say(4, 3, "3 online").as_deref(), Some("STATUS=3 online\n"));
        assert_eq!(say(5, 4, "3 online"), None);
        assert_eq!(say(6, 4, "3 online"), None, "another state with the same words");
        assert_eq!(notices.next_deadline(), None);
    }

    #[test]
    fn an_end_asks_for_as_much_time_as_the_slowest_app_may_take() {
        let mut notices = Notices::new(true, None);
        let first = notices.ends(at(100), Duration::from_secs(60));
        assert_eq!(first.as_deref(), Some("STOPPING=1\nEXTEND_TIMEOUT_USEC=20000000"));
        assert_eq!(notices.ends(at(101), Duration::from_secs(60)), None, "told already");
        let mut last = 100;
        notices.due(at(100), 1, String::new);
        while let Some(next) = notices.next_deadline() {
            let text = notices.due(next, 1, || unreachable!()).text;
            let now = (next.nanos() - Moment::default().nanos()) / 1_000_000_000;
            assert!(now - last <= 5);
            if text.is_some() {
                assert_eq!(text.as_deref(), Some("EXTEND_TIMEOUT_USEC=20000000"));
                last = now;
            }
        }
        assert!((180..190).contains(&last), "60 s of the app and some more, then no longer: {last}");
    }

    #[test]
    fn signs_of_life_come_well_within_the_watchdog() {
        let mut notices = Notices::new(true, Some(Duration::from_secs(60)));
        assert!(notices.due(at(1), 1, String::new).beat);
        assert!(!notices.due(at(15), 1, String::new).beat);
        assert_eq!(notices.next_deadline(), Some(at(16)));
        assert!(notices.due(at(16), 1, String::new).beat);
    }
}
