//! An operation while it runs, and what became of it.
//!
//! On a terminal: one line per slot with its state and the time since. In a pipe: a line per step that matters. With
//! `--json`: every step as a JSON line. What is said at the end comes from the same steps.

use std::collections::BTreeMap;
use std::io;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use super::Terminal;
use super::words;
use crate::ipc::protocol::{OperationView, PlanView, Refused, StepKind, StepView};
use crate::model::id::{AppName, Generation, PmId, Slot};

/// More slots than this get no lines of their own on a terminal.
const LIVE_LINES: usize = 16;

/// How the steps are shown.
enum Show {
    Nothing,
    Json,
    Lines,
    Live(Live),
}

struct Live {
    lines: MultiProgress,
    slots: BTreeMap<(AppName, Slot), ProgressBar>,
    rest: Option<ProgressBar>,
}

/// One operation, as its steps tell it.
pub struct Progress {
    show: Show,
    slots: BTreeMap<(AppName, Slot), Story>,
}

impl std::fmt::Debug for Progress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Progress").field("slots", &self.slots).finish_non_exhaustive()
    }
}

/// What happened in a slot.
#[derive(Debug)]
struct Story {
    pm_id: PmId,
    runs: BTreeMap<Generation, Run>,
}

/// What happened to one run.
#[derive(Debug, Default)]
struct Run {
    began: Option<Instant>,
    spawned: Option<Instant>,
    ready: Option<Ready>,
    /// Since when it got no new requests.
    out: Option<Instant>,
    drained: bool,
    gone: Option<Gone>,
    failed: Option<String>,
}

/// When a run was ready, and how anybody knows.
#[derive(Clone, Copy, Debug)]
struct Ready {
    at: Instant,
    after_ms: u64,
    /// Nothing but having lived for that long says so.
    lived: bool,
}

/// For how long nothing served in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Downtime {
    /// From the last request of the old run until the new one was ready.
    Measured(Duration),
    /// Until the new one ran; when it served is its own secret.
    AtLeast(Duration),
}

impl Downtime {
    const fn span(self) -> Duration {
        match self {
            Self::Measured(span) | Self::AtLeast(span) => span,
        }
    }

    fn words(self) -> String {
        match self {
            Self::Measured(span) => format!("downtime {}", words::span(span)),
            Self::AtLeast(span) => format!("downtime {} and its boot", words::span(span)),
        }
    }
}

#[derive(Clone, Debug)]
struct Gone {
    after_ms: u64,
    killed: bool,
    reason: String,
}

/// What a program reads, one per line.
#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum JsonLine<'a> {
    /// Words before it acts.
    Notice(&'a str),
    /// What is going to be done.
    Plan(&'a PlanView),
    /// A step.
    Step(&'a StepView),
    /// The end.
    Result(&'a OperationView),
    /// The end, with `--no-wait`.
    Accepted(bool),
    /// The end: nothing was done.
    Refused(&'a Refused),
}

/// Prints one line of `--json`.
///
/// # Errors
/// Standard output's.
pub fn json_line(line: &JsonLine<'_>, terminal: &mut Terminal) -> io::Result<()> {
    let text = serde_json::to_string(line).map_err(io::Error::other)?;
    terminal.data_line(&text)?;
    // A program may wait for the step.
    terminal.flush()
}

impl Progress {
    /// Shows the steps of one operation.
    #[must_use]
    pub fn new(terminal: &Terminal, json: bool) -> Self {
        let look = terminal.look();
        let show = if json {
            Show::Json
        } else if look.silent {
            Show::Nothing
        } else if look.live {
            let lines = MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
            Show::Live(Live { lines, slots: BTreeMap::new(), rest: None })
        } else {
            Show::Lines
        };
        Self { show, slots: BTreeMap::new() }
    }

    /// Words of the daemon before it acts.
    ///
    /// # Errors
    /// A stream's.
    pub fn notice(&mut self, text: &str, terminal: &mut Terminal) -> io::Result<()> {
        match &self.show {
            Show::Json => json_line(&JsonLine::Notice(text), terminal),
            Show::Live(live) => live.lines.suspend(|| terminal.error_line("note:", text)),
            Show::Lines => terminal.error_line("note:", text),
            Show::Nothing => Ok(()),
        }
    }

    /// A step that happened at `now`.
    ///
    /// # Errors
    /// A stream's.
    pub fn step(&mut self, step: &StepView, now: Instant, terminal: &mut Terminal) -> io::Result<()> {
        if let StepKind::Hook { hook } = step.step {
            let line = format!("{}: runs its hook {hook}", step.app);
            return match &self.show {
                Show::Nothing => Ok(()),
                Show::Json => json_line(&JsonLine::Step(step), terminal),
                Show::Live(live) => live.lines.suspend(|| terminal.say(&line)),
                Show::Lines => terminal.say(&line),
            };
        }
        let key = (step.app.clone(), step.slot);
        let story = self
            .slots
            .entry(key.clone())
            .or_insert_with(|| Story { pm_id: step.pm_id, runs: BTreeMap::new() });
        story.record(step, now);
        let words = story.words(step);
        match &mut self.show {
            Show::Nothing => Ok(()),
            Show::Json => json_line(&JsonLine::Step(step), terminal),
            Show::Live(live) => {
                live.show(key, story.pm_id, &words);
                Ok(())
            }
            // A program's log is no place for every signal.
            Show::Lines => match step.step {
                StepKind::Queued | StepKind::Spawned { .. } | StepKind::Signalled { .. } => Ok(()),
                _ => terminal.say(&format!("{} {}: {words}", step.app, step.slot)),
            },
        }
    }

    /// Takes the live lines away; the end is printed in their place.
    pub fn clear(&mut self) {
        if let Show::Live(live) = &mut self.show {
            for bar in live.slots.values().chain(&live.rest) {
                bar.finish_and_clear();
            }
            // Nothing depends on it: the lines are gone already where a terminal shows them.
            let _ = live.lines.clear();
        }
    }

    /// Prints the end.
    ///
    /// # Errors
    /// Standard output's.
    pub fn result(&mut self, view: &OperationView, terminal: &mut Terminal) -> io::Result<()> {
        self.clear();
        if let Show::Json = self.show {
            return json_line(&JsonLine::Result(view), terminal);
        }
        for app in &view.apps {
            let mut line = format!("{}: {}", app.app, app.result);
            if app.slots > 0 && app.ok {
                line.push_str(&format!(
                    ", {}",
                    words::count(usize::try_from(app.slots).unwrap_or(usize::MAX), "instance")
                ));
            }
            let forced: Vec<u64> = self.of(&app.app).flat_map(Story::forced).collect();
            if let Some(longest) = forced.iter().max() {
                line.push_str(&format!(
                    ", {} force-killed after {}",
                    words::count(forced.len(), "worker"),
                    words::millis(*longest)
                ));
            }
            if let Some(gap) =
                self.of(&app.app).filter_map(Story::downtime).max_by_key(|downtime| downtime.span())
            {
                line.push_str(&format!(", {}", gap.words()));
            }
            terminal.say(&line)?;
            // In a pipe the steps have said it.
            if matches!(self.show, Show::Live(_)) {
                for (slot, story) in self.slots.iter().filter(|((name, _), _)| *name == app.app) {
                    let told = story.told();
                    if !told.is_empty() {
                        terminal.say(&format!("  {}: {told}", slot.1))?;
                    }
                }
            }
        }
        Ok(())
    }

    fn of(&self, app: &AppName) -> impl Iterator<Item = &Story> {
        self.slots.iter().filter(move |((name, _), _)| name == app).map(|(_, story)| story)
    }
}

impl Live {
    fn show(&mut self, key: (AppName, Slot), id: PmId, words: &str) {
        if !self.slots.contains_key(&key) && self.slots.len() >= LIVE_LINES {
            let rest = self.rest.get_or_insert_with(|| added(&self.lines, String::new()));
            rest.set_message(format!("and more: {} {} {words}", key.0, key.1));
            return;
        }
        let prefix = format!("{id:>3} {} {}", key.0, key.1);
        let bar = self.slots.entry(key).or_insert_with(|| added(&self.lines, prefix));
        if bar.message() != words {
            bar.reset_elapsed();
            bar.set_message(words.to_owned());
        }
    }
}

fn added(lines: &MultiProgress, prefix: String) -> ProgressBar {
    // The template is a constant; without it the bar shows its default look.
    let style = ProgressStyle::with_template("{spinner} {prefix}  {msg}  {elapsed}")
        .unwrap_or_else(|_| ProgressStyle::default_spinner());
    let bar = lines.add(ProgressBar::new_spinner().with_style(style).with_prefix(prefix));
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

impl Story {
    fn record(&mut self, step: &StepView, now: Instant) {
        let run = self.runs.entry(step.generation).or_default();
        match &step.step {
            StepKind::Queued | StepKind::Launching => {
                run.began.get_or_insert(now);
            }
            StepKind::Spawned { .. } => {
                run.began.get_or_insert(now);
                run.spawned.get_or_insert(now);
            }
            StepKind::Ready { after_ms, lived } => {
                run.ready = Some(Ready { at: now, after_ms: *after_ms, lived: *lived });
            }
            StepKind::Soaking { .. } => {}
            StepKind::Restored => run.out = None,
            StepKind::Reserved => {
                run.out.get_or_insert(now);
            }
            StepKind::Draining => {
                run.out.get_or_insert(now);
                run.drained = true;
            }
            StepKind::Signalled { .. } => {
                run.out.get_or_insert(now);
            }
            StepKind::Gone { after_ms, killed, reason } => {
                run.out.get_or_insert(now);
                run.gone = Some(Gone { after_ms: *after_ms, killed: *killed, reason: reason.clone() });
            }
            StepKind::Failed { reason } => run.failed = Some(reason.clone()),
            StepKind::Hook { .. } => {}
        }
    }

    /// A step in words, the older of two runs being "the old one".
    fn words(&self, step: &StepView) -> String {
        let old = self.runs.keys().any(|generation| *generation > step.generation);
        let whose = if old { "old one " } else { "" };
        match &step.step {
            StepKind::Queued => "queued".to_owned(),
            StepKind::Launching => "launching".to_owned(),
            StepKind::Spawned { pid } => format!("launching, pid {pid}"),
            StepKind::Ready { after_ms, .. } => format!("{whose}ready after {}", words::millis(*after_ms)),
            StepKind::Soaking { after_ms, span_ms } => {
                format!(
                    "ready after {}, on probation for {}",
                    words::millis(*after_ms),
                    words::millis(*span_ms)
                )
            }
            StepKind::Reserved => format!("{whose}in reserve"),
            StepKind::Restored => format!("{whose}back in rotation"),
            StepKind::Draining => format!("{whose}draining"),
            StepKind::Signalled { signal } => format!("{whose}got {signal}"),
            StepKind::Gone { after_ms, killed, reason } => {
                let drained = self.runs.get(&step.generation).is_some_and(|run| run.drained);
                let gone = Gone { after_ms: *after_ms, killed: *killed, reason: reason.clone() };
                format!("{whose}{}", gone.words(drained))
            }
            StepKind::Failed { reason } => format!("failed: {reason}"),
            StepKind::Hook { hook } => format!("hook {hook}"),
        }
    }

    /// How long those runs took that had to be ended by force, milliseconds.
    fn forced(&self) -> impl Iterator<Item = u64> {
        self.runs
            .values()
            .filter_map(|run| run.gone.as_ref())
            .filter(|gone| gone.killed)
            .map(|gone| gone.after_ms)
    }

    /// How long nothing served: from the old run's last request to the new one's readiness, where they did not
    /// overlap.
    fn downtime(&self) -> Option<Downtime> {
        let mut runs = self.runs.values().rev();
        let (new, old) = (runs.next()?, runs.next()?);
        let (ready, out, began) = (new.ready?, old.out?, new.began?);
        if out > began {
            return None;
        }
        let since = |at: Instant| at.saturating_duration_since(out);
        // That it has lived for a second says that it works, not that it was away for a second.
        Some(match new.spawned {
            Some(spawned) if ready.lived => Downtime::AtLeast(since(spawned)),
            Some(_) | None => Downtime::Measured(since(ready.at)),
        })
    }

    /// The slot's story in one line.
    fn told(&self) -> String {
        let mut parts = Vec::new();
        let newest = self.runs.len().saturating_sub(1);
        for (index, run) in self.runs.values().enumerate().rev() {
            if let Some(reason) = &run.failed {
                parts.push(format!("failed: {reason}"));
            } else if let (Some(ready), true) = (run.ready, index == newest) {
                let after = words::millis(ready.after_ms);
                parts.push(if ready.lived {
                    format!("up for {after}")
                } else {
                    format!("ready after {after}")
                });
            }
            if let (Some(gone), true) = (&run.gone, run.failed.is_none()) {
                let whose = if index < newest { "old one " } else { "" };
                parts.push(format!("{whose}{}", gone.words(run.drained)));
            }
        }
        if let Some(gap) = self.downtime() {
            parts.push(gap.words());
        }
        parts.join(", ")
    }
}

impl Gone {
    fn words(&self, drained: bool) -> String {
        let after = words::millis(self.after_ms);
        match (self.killed, drained) {
            (true, _) => format!("killed after {after}"),
            (false, true) => format!("drained after {after} ({})", self.reason),
            (false, false) => format!("gone after {after} ({})", self.reason),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn story(steps: &[(u64, u64, StepKind)]) -> Story {
        let start = Instant::now();
        let mut story = Story { pm_id: PmId(0), runs: BTreeMap::new() };
        for (at, generation, step) in steps {
            let step = StepView {
                app: AppName::new("api").unwrap(),
                pm_id: PmId(0),
                slot: Slot(0),
                generation: Generation(*generation),
                step: step.clone(),
            };
            story.record(&step, start + Duration::from_millis(*at));
        }
        story
    }

    fn gone(after_ms: u64, killed: bool) -> StepKind {
        StepKind::Gone { after_ms, killed, reason: "exit code 0".to_owned() }
    }

    #[test]
    fn overlapping_generations_have_no_downtime_and_a_forced_end_says_so() {
        let story = story(&[
            (0, 2, StepKind::Launching),
            (120, 2, StepKind::Ready { after_ms: 120, lived: false }),
            (121, 1, StepKind::Draining),
            (10_121, 1, gone(10_000, true)),
        ]);
        assert_eq!(story.told(), "ready after 120 ms, old one killed after 10.0 s");
    }

    #[test]
    fn a_restart_in_place_tells_its_downtime() {
        let story = story(&[
            (0, 1, StepKind::Signalled { signal: "SIGINT".to_owned() }),
            (30, 1, gone(30, false)),
            (31, 2, StepKind::Launching),
            (331, 2, StepKind::Ready { after_ms: 300, lived: false }),
        ]);
        assert_eq!(
            story.told(),
            "ready after 300 ms, old one gone after 30 ms (exit code 0), downtime 331 ms"
        );
    }

    #[test]
    fn what_only_has_to_live_was_not_away_for_that_long() {
        let story = story(&[
            (0, 1, StepKind::Signalled { signal: "SIGINT".to_owned() }),
            (30, 1, gone(30, false)),
            (31, 2, StepKind::Launching),
            (36, 2, StepKind::Spawned { pid: 7 }),
            (1036, 2, StepKind::Ready { after_ms: 1000, lived: true }),
        ]);
        assert_eq!(
            story.told(),
            "up for 1.0 s, old one gone after 30 ms (exit code 0), downtime 36 ms and its boot"
        );
    }

    #[test]
    fn who_comes_back_from_reserve_was_not_away() {
        let story = story(&[
            (0, 2, StepKind::Launching),
            (120, 2, StepKind::Ready { after_ms: 120, lived: false }),
            (121, 1, StepKind::Reserved),
            (300, 1, StepKind::Restored),
            (301, 2, StepKind::Draining),
            (310, 2, gone(9, false)),
        ]);
        assert_eq!(story.downtime(), None);
    }

    #[test]
    fn a_failed_new_one_leaves_the_old_one_unmentioned() {
        let story = story(&[
            (0, 2, StepKind::Launching),
            (50, 2, StepKind::Failed { reason: "exit code 1".to_owned() }),
            (51, 2, gone(1, false)),
        ]);
        assert_eq!(story.told(), "failed: exit code 1");
    }

    #[test]
    fn a_stop() {
        let story = story(&[(0, 4, StepKind::Draining), (40, 4, gone(40, false))]);
        assert_eq!(story.told(), "drained after 40 ms (exit code 0)");
        assert_eq!(story.downtime(), None);
    }
}
