//! The supervisor of a daemon in the foreground (`pm run`): what it starts first, what signals mean, when it ends and
//! with which exit code.
//!
//! ```text
//! first requests ─→ apps run ─┬─ every app came to its end by itself ─→ the apps' exit code
//!                      ↑      ├─ SIGTERM, SIGINT, SIGQUIT ─→ drain ─→ 0; with the same again ─→ SIGKILL ─→ 137
//!               SIGHUP ┘      └─ `pm kill` ─→ 0
//! ```
//!
//! Decides; the driver does. Everything it needs to know is in the environment, in the home and in the fleet, so a
//! supervisor that takes over in the middle goes on where the one before it was.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::time::Duration;

use crate::ipc::protocol::{Refused, Request};
use crate::keeper::wire::Hello;
use crate::model::exit::ExitReason;
use crate::model::foreground::{Foreground, LineForm, VARIABLE};
use crate::model::id::OpId;
use crate::model::moment::Moment;
use crate::model::process::{rounded_size, size};
use crate::model::spec::AppSpec;
use crate::policy::finished::{self, Finished};
use crate::policy::news::{News, What};
use crate::policy::vocabulary::{AppOutcome, Outcome, StepKind};
use crate::store::paths::Home;
use crate::sys::child::WaitStatus;
use crate::sys::helper::{Bounds, Ended, Helper, Question};

/// Where the first requests are counted.
pub(super) const FIRST_OP: OpId = OpId(1);

/// A signal that follows another one within this time is the same wish: `timeout` signals a process and then its group,
/// a terminal that is closed sends SIGHUP and SIGTERM.
const SAME_WISH: Duration = Duration::from_millis(500);

/// What is kept of what a reload said.
const WORDS_MAX: usize = 16 * 1024;

/// The exit code where something had to be ended by force: a shell's for SIGKILL, and that of a container that was not
/// done in time.
const FORCED: u8 = 137;

/// What a signal comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    /// Take everything down.
    End,
    /// And do not wait for it any longer.
    EndNow,
    /// The config file is to be read again.
    Reload,
    /// It has been said already.
    Nothing,
}

/// See the module.
#[derive(Debug)]
pub struct Front {
    settings: Foreground,
    home: Home,
    /// When it was asked to end.
    asked: Option<Moment>,
    /// Something was ended by force after that.
    forced: bool,
    /// What has been decided about the exit code.
    code: Option<u8>,
}

impl Front {
    /// For a daemon of this home.
    #[must_use]
    pub const fn new(settings: Foreground, home: Home) -> Self {
        Self { settings, home, asked: None, forced: false, code: None }
    }

    /// What `pm run` wants to have done first, until that is durable.
    pub(super) fn first_requests(&self) -> Vec<Request> {
        let path = self.home.first();
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
            Err(error) => {
                tracing::error!(path = %path.display(), %error, "cannot read what is to be started");
                return Vec::new();
            }
        };
        serde_json::from_slice(&text).unwrap_or_else(|error| {
            tracing::error!(path = %path.display(), %error, "cannot read what is to be started");
            Vec::new()
        })
    }

    /// The state is durable, and what was to be done first is part of it.
    pub(super) fn saved(&self) {
        // Gone already, most of the time.
        let _ = fs::remove_file(self.home.first());
    }

    /// A first request was refused: there is nothing to run.
    pub(super) fn refused(&mut self, refused: &Refused) {
        let cause = refused.cause.as_ref().map(|cause| format!(": {cause}")).unwrap_or_default();
        tracing::error!("{}{cause}", refused.message);
        self.code = Some(refused.code);
    }

    /// How the first start went. `false`: nothing of it came to be, and nothing will.
    pub(super) fn started(&mut self, outcome: &Outcome, knows_apps: bool) -> bool {
        let apps = match outcome {
            Outcome::Done { apps } | Outcome::Failed { apps } => apps.as_slice(),
            Outcome::Refused(refusal) => {
                tracing::error!("not started: {refusal}");
                &[]
            }
        };
        for (app, outcome) in apps {
            match outcome {
                AppOutcome::NotSaved { error } => tracing::error!("{app} not started: {error}"),
                AppOutcome::Unfit { why } => tracing::error!("{app} not started: {why}"),
                AppOutcome::HookFailed { why, .. } => tracing::error!("{app}: its hook failed: {why}"),
                _ => {}
            }
        }
        if !knows_apps {
            self.code = Some(1);
        }
        knows_apps
    }

    /// Output of apps goes to ours and to no file, unless the config names one.
    pub(super) fn lead(spec: &mut AppSpec) {
        for file in [&mut spec.logs.out_file, &mut spec.logs.error_file] {
            file.get_or_insert_with(|| "/dev/null".into());
        }
    }

    /// What a signal to the daemon means.
    pub(super) fn signalled(&mut self, now: Moment, signal: i32) -> Wish {
        match self.asked {
            // Whoever hangs up in the middle of it cannot mean a reload.
            Some(_) if signal == libc::SIGHUP => Wish::Nothing,
            None if signal == libc::SIGHUP => Wish::Reload,
            None => {
                self.asked = Some(now);
                Wish::End
            }
            Some(at) if now.since(at) < SAME_WISH => Wish::Nothing,
            Some(_) => Wish::EndNow,
        }
    }

    /// Every app has come to its end: from here on the daemon ends.
    pub(super) fn finished(&mut self, now: Moment, all: &[Finished]) {
        let code = finished::exit_code(all);
        let words: Vec<String> =
            all.iter().map(|one| format!("{}:{} {}", one.app, one.slot, one.reason)).collect();
        tracing::info!("every app has ended ({}); exits with {code}", words.join(", "));
        self.code = Some(code);
        self.asked = Some(now);
    }

    /// Whether it is still open how this ends.
    pub(super) const fn is_open(&self) -> bool {
        self.asked.is_none() && self.code.is_none()
    }

    /// The exit code of the daemon, when it ends.
    pub(super) fn code(&self) -> u8 {
        self.code.unwrap_or(if self.forced { FORCED } else { 0 })
    }

    /// Something happened: people who look at the container's log want to know the half of it.
    pub(super) fn heard(&mut self, news: &News) {
        let subject = news.run.as_ref().map_or_else(
            || news.app.to_string(),
            |run| {
                if run.id.slot.is_hook() {
                    news.app.to_string()
                } else {
                    format!("{}:{}", news.app, run.id.slot)
                }
            },
        );
        match &news.what {
            What::Step(StepKind::Ready { .. }) => {
                let pid = news.run.as_ref().and_then(|run| run.pid);
                let pid = pid.map(|pid| format!(" as process {pid}")).unwrap_or_default();
                tracing::info!("{subject} is online{pid}");
            }
            What::Step(StepKind::Failed { reason }) => tracing::warn!("{subject} failed: {reason}"),
            What::Exited { reason, by_itself: true, uptime } => {
                let uptime = seconds(*uptime);
                if matches!(reason, ExitReason::Code(0)) {
                    tracing::info!("{subject} ended after {uptime}: {reason}");
                } else {
                    tracing::warn!("{subject} ended after {uptime}: {reason}");
                }
            }
            What::RestartScheduled { delay } if !delay.is_zero() => {
                tracing::info!("{subject} starts again in {}", seconds(*delay));
            }
            What::MemoryExceeded { bytes, limit } => {
                tracing::warn!(
                    "{subject} uses {} of memory, over its limit of {}",
                    rounded_size(*bytes),
                    size(*limit)
                );
            }
            What::Errored { reason } => tracing::error!("{subject} is given up: {reason}"),
            What::Killed { after } => {
                self.forced |= self.asked.is_some();
                tracing::warn!("{subject} did not end, killed after {}", seconds(*after));
            }
            What::Waiting { on } => {
                let on: Vec<String> = on.iter().map(ToString::to_string).collect();
                tracing::info!("{subject} waits for {}", on.join(", "));
            }
            What::HookEnded { kind, failure: Some(failure) } => {
                tracing::warn!("{subject}: the {} hook failed: {failure}", kind.as_str());
            }
            What::Step(_)
            | What::HookEnded { .. }
            | What::InRotation
            | What::OutOfRotation
            | What::Exited { .. }
            | What::RestartScheduled { .. }
            | What::Ended { .. } => {}
        }
    }

    /// Reads the config file again, as `pm reload FILE` does, in a process of its own; says what came of it.
    pub(super) fn reload(&self) {
        let question = match self.question() {
            Ok(question) => question,
            Err(error) => return tracing::error!(%error, "cannot reload"),
        };
        tokio::spawn(async move {
            let ended = match Helper::start(&question) {
                Ok(helper) => helper.end(WORDS_MAX).await.map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            match ended {
                Ok((Ended::Exited(status), words)) => said(status, &String::from_utf8_lossy(&words)),
                Ok((Ended::NotStarted(failure), _)) => tracing::error!(%failure, "cannot reload"),
                Err(error) => tracing::error!(error, "cannot reload"),
            }
        });
    }

    fn question(&self) -> io::Result<Question> {
        let text = |bytes: Vec<u8>| CString::new(bytes).map_err(io::Error::other);
        let home = self.home.dir().as_os_str().to_owned().into_vec();
        let mut args = vec![c"pm".to_owned(), c"--home".to_owned(), text(home)?];
        for arg in &self.settings.on_hangup {
            args.push(text(arg.clone().into_bytes())?);
        }
        let env = std::env::vars_os()
            .filter(|(key, _)| key != VARIABLE)
            .map(|(key, value)| text([key.into_vec(), value.into_vec()].join(&b'=')))
            .collect::<io::Result<_>>()?;
        let cwd = text(self.settings.cwd.clone().into_os_string().into_vec())?;
        // This very build, whatever lies under its name by now.
        Ok(Question { program: c"/proc/self/exe".to_owned(), args, env, cwd, bounds: Bounds::default() })
    }
}

fn said(status: WaitStatus, words: &str) {
    let well = status.code() == Some(0);
    for line in words.lines().filter(|line| !line.trim().is_empty()) {
        if well {
            tracing::info!("reload: {line}");
        } else {
            tracing::error!("reload: {line}");
        }
    }
    if !well {
        tracing::error!("the reload failed: {status}; what ran before goes on");
    }
}

fn seconds(span: Duration) -> String {
    match span.as_millis() {
        millis @ 0..1000 => format!("{millis} ms"),
        _ => format!("{:.1} s", span.as_secs_f64()),
    }
}

/// What the next keeper of a foreground daemon is told: whoever has killed the first one wants no other in its place, so
/// the apps are taken down by the book.
#[must_use]
pub(super) fn bequeath(hello: Hello) -> Hello {
    Hello { terminate: hello.terminate.or(Some(libc::SIGTERM)), ..hello }
}

/// The console that this process's own streams are.
///
/// # Errors
/// EMFILE.
pub(super) fn console(settings: &Foreground) -> io::Result<crate::logs::console::Console> {
    use std::os::fd::AsFd as _;
    let (out, err) = (io::stdout().as_fd().try_clone_to_owned()?, io::stderr().as_fd().try_clone_to_owned()?);
    let colors = settings.colors && settings.form == LineForm::Text;
    Ok(crate::logs::console::Console::new(settings.form, colors, out, err))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn front() -> Front {
        let settings = Foreground {
            form: LineForm::Text,
            colors: false,
            on_hangup: Vec::new(),
            cwd: "/".into(),
            temporary_home: true,
        };
        Front::new(settings, Home::at(std::path::Path::new("/nonexistent")).unwrap())
    }

    fn at(millis: u64) -> Moment {
        Moment::default() + Duration::from_millis(millis)
    }

    #[test]
    fn the_second_wish_to_end_is_not_the_echo_of_the_first() {
        let mut front = front();
        let wishes = [
            (0, libc::SIGHUP, Wish::Reload),
            (10, libc::SIGTERM, Wish::End),
            (20, libc::SIGTERM, Wish::Nothing),
            (400, libc::SIGINT, Wish::Nothing),
            (800, libc::SIGHUP, Wish::Nothing),
            (900, libc::SIGINT, Wish::EndNow),
        ];
        for (millis, signal, wish) in wishes {
            assert_eq!(front.signalled(at(millis), signal), wish, "{millis}");
        }
    }

    #[test]
    fn the_code_is_0_when_asked_to_end_unless_something_was_killed() {
        let mut front = front();
        assert!(front.is_open());
        front.signalled(at(0), libc::SIGTERM);
        assert!(!front.is_open());
        assert_eq!(front.code(), 0);
        let app = crate::model::id::AppName::new("a").unwrap();
        let what = What::Killed { after: Duration::from_secs(10) };
        front.heard(&News { at: at(1), op: None, app, run: None, what });
        assert_eq!(front.code(), 137);
    }
}
