//! What the worker does for one request: a step per look at its tree.
//!
//! A step sends signals and says what to wait for; it never waits itself.
//!
//! ```text
//! Follow ──────────────────────▶ Following
//! Stop ──▶ signalled, answered ──▶ Following (a shell that outlives its command) ──▶ done
//! EndLeftovers ──▶ Ending ──grace──▶ Freezing ──▶ Dying ──▶ Empty, or Left
//! KillAll ─────────────────────────▶ Freezing ──▶ Dying ──▶ Empty, or Left
//! AwaitEmpty ──▶ Awaiting ──▶ Empty, or Left
//! ```
//!
//! Killing a tree that keeps forking: SIGSTOP to everything that is found, look again, until a look finds nothing new.
//! A fork that is under way when its parent gets a signal is aborted by the kernel, so after SIGSTOP all children of
//! a process can be seen, and their ancestry stays readable because nobody has died yet. Only then comes SIGKILL.

use std::collections::{HashMap, HashSet};
use std::io;
use std::time::Duration;

use super::pidfd::{Pidfd, signal_group, signal_process};
use super::runner::{target_chain, targets};
use super::worker::{Instance, Outcome, RETRY, TreeOp};
use super::{Root, Scanner, Tree};
use crate::model::moment::Moment;
use crate::model::signal::Signal;
use crate::model::spec::KillMode;
use crate::sys::procfs::ProcessId;

/// How long SIGKILL may take to show. Only a process that hangs in the kernel (a dead NFS server) needs longer.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// How many looks a tree gets to stand still before it is killed as it is, and looked at again.
const FREEZE_ROUNDS: u32 = 20;

/// How long a shell may outlive the command it ran before it gets the signal too. A loop such as
/// `while :; do sleep 1; done` would otherwise go on for ever; `node x; cleanup` should not be cut short.
const RUNNER_LINGER: Duration = Duration::from_millis(300);

/// A request that is being worked on.
pub(super) struct Job {
    pub(super) instance: Instance,
    pub(super) op: TreeOp,
    phase: Phase,
    /// Wants a look at its tree in the next round.
    pub(super) due: bool,
    /// When it is due at the latest.
    pub(super) wake_at: Option<Moment>,
    /// Processes whose exit is awaited; without a pidfd only `wake_at` helps.
    pub(super) watched: HashMap<i32, Option<Pidfd>>,
    pub(super) failures: u32,
}

enum Phase {
    /// A single signal, not sent yet.
    Signalling { mode: KillMode, signal: Signal },
    /// The target has the signal. Answered already.
    Following { signal: Signal, target: ProcessId, gone_at: Option<Moment> },
    /// Nothing done yet.
    EndingFirst,
    /// What was left behind has the signal.
    Ending { told: HashSet<ProcessId>, until: Moment },
    /// Being stopped until a look finds nothing new.
    Freezing { stopped: HashSet<ProcessId>, rounds: u32, until: Moment },
    /// Everything found has SIGKILL.
    Dying { killed: HashSet<ProcessId>, until: Moment },
    /// Just waiting.
    Awaiting { until: Moment },
}

/// What a round has found of an instance.
pub(super) struct Look<'a> {
    pub(super) tree: &'a Tree,
    pub(super) settled: bool,
    /// Nothing lives, and nothing can have been missed.
    pub(super) empty: bool,
}

impl Look<'_> {
    fn wait(&self, now: Moment, until: Moment) -> Step {
        if self.tree.is_empty() { Step::Sleep(until.min(now + RETRY)) } else { Step::Wait(until) }
    }
}

pub(super) enum Step {
    /// Another look at once.
    Again,
    /// Wait for what lives of the tree, at most until then; if nothing does, look again.
    Wait(Moment),
    /// Wait for this process alone. These got the signal: the answer, unless it is empty.
    Follow(ProcessId, Vec<ProcessId>),
    /// Wait until then.
    Sleep(Moment),
    /// Over; answered already.
    Forget,
    /// The answer.
    Done(Outcome),
}

impl Job {
    /// A request that has just come in.
    pub(super) fn new(instance: Instance, op: TreeOp, now: Moment) -> Self {
        let phase = match op {
            TreeOp::Signal { mode, signal } | TreeOp::Stop { mode, signal } => {
                Phase::Signalling { mode, signal }
            }
            TreeOp::Follow { target, signal } => Phase::Following { signal, target, gone_at: None },
            TreeOp::KillAll => freezing(now),
            TreeOp::EndLeftovers { .. } => Phase::EndingFirst,
            TreeOp::AwaitEmpty { deadline } => Phase::Awaiting { until: deadline },
        };
        Self { instance, op, phase, due: true, wake_at: None, watched: HashMap::new(), failures: 0 }
    }

    /// Whether it has been answered, and only sees to it that a shell follows its command.
    pub(super) const fn is_following(&self) -> bool {
        matches!(self.phase, Phase::Following { .. })
    }

    /// Whether the next step wants to know the whole tree.
    pub(super) const fn needs_tree(&self) -> bool {
        !matches!(
            self.phase,
            Phase::Following { .. } | Phase::Signalling { mode: KillMode::Target | KillMode::Main, .. }
        )
    }

    pub(super) fn step(&mut self, scanner: &mut Scanner, look: &Look<'_>, now: Moment) -> io::Result<Step> {
        let tree = look.tree;
        let main = self.instance.root.main;
        match &mut self.phase {
            Phase::Signalling { mode, signal } => {
                let (mode, signal) = (*mode, *signal);
                let chain = match mode {
                    KillMode::Target => target_chain(scanner.procfs(), main)?,
                    KillMode::Main => scanner
                        .procfs()
                        .stat(main.pid)?
                        .filter(|stat| stat.process == main && stat.alive())
                        .map_or_else(Vec::new, |stat| vec![stat.process]),
                    KillMode::Group => tree.living().map(|stat| stat.process).collect(),
                };
                let many;
                let to = if mode == KillMode::Target {
                    many = targets(scanner.procfs(), &chain)?;
                    &many
                } else {
                    &chain
                };
                let told = tell(scanner, to, signal)?;
                let follow =
                    matches!(self.op, TreeOp::Stop { .. }) && mode == KillMode::Target && chain.len() > 1;
                match to.first() {
                    Some(&target) if follow && !told.is_empty() => {
                        self.phase = Phase::Following { signal, target, gone_at: None };
                        Ok(Step::Follow(target, told))
                    }
                    _ => Ok(Step::Done(Outcome::Signalled(told))),
                }
            }
            Phase::Following { signal, target, gone_at } => match *gone_at {
                None => {
                    let stat = scanner.procfs().stat(target.pid)?;
                    if stat.is_some_and(|stat| stat.process == *target && stat.alive()) {
                        return Ok(Step::Follow(*target, Vec::new()));
                    }
                    *gone_at = Some(now);
                    Ok(Step::Sleep(now + RUNNER_LINGER))
                }
                Some(_) => {
                    let chain = target_chain(scanner.procfs(), main)?;
                    tell(scanner, &chain, *signal)?;
                    Ok(Step::Forget)
                }
            },
            Phase::EndingFirst => {
                let TreeOp::EndLeftovers { grace, .. } = self.op else { return Ok(Step::Forget) };
                self.phase = Phase::Ending { told: HashSet::new(), until: now + grace };
                self.step(scanner, look, now)
            }
            Phase::Ending { told, until } => {
                let TreeOp::EndLeftovers { signal, .. } = self.op else { return Ok(Step::Forget) };
                let fresh: Vec<ProcessId> =
                    tree.living().map(|stat| stat.process).filter(|process| told.insert(*process)).collect();
                if look.empty {
                    return Ok(Step::Done(Outcome::Empty));
                }
                if now >= *until {
                    self.phase = freezing(now);
                    return self.step(scanner, look, now);
                }
                let until = *until;
                // What may not be signalled now will be killed, or reported, at the end of the grace period.
                let _ = tell(scanner, &fresh, signal);
                Ok(look.wait(now, until))
            }
            Phase::Freezing { stopped, rounds, until } => {
                if look.empty {
                    return Ok(Step::Done(Outcome::Empty));
                }
                let until = *until;
                if now >= until {
                    kill(scanner, &self.instance.root, tree);
                    return Ok(Step::Done(Outcome::Left(tree.living().copied().collect())));
                }
                let before = stopped.len();
                stopped.extend(tree.living().map(|stat| stat.process));
                if (stopped.len() == before && look.settled) || *rounds == FREEZE_ROUNDS {
                    let killed = std::mem::take(stopped);
                    kill(scanner, &self.instance.root, tree);
                    self.phase = Phase::Dying { killed, until };
                    return Ok(Step::Wait(until));
                }
                *rounds += 1;
                strike(scanner, main, tree, libc::SIGSTOP);
                Ok(Step::Again)
            }
            Phase::Dying { killed, until } => {
                if look.empty {
                    return Ok(Step::Done(Outcome::Empty));
                }
                if now >= *until {
                    return Ok(Step::Done(Outcome::Left(tree.living().copied().collect())));
                }
                let until = *until;
                if tree.living().any(|stat| !killed.contains(&stat.process)) {
                    // Something was started in between: once more from the beginning, within the same time.
                    self.phase = Phase::Freezing { stopped: HashSet::new(), rounds: 0, until };
                    return self.step(scanner, look, now);
                }
                Ok(Step::Wait(until))
            }
            Phase::Awaiting { until } => Ok(if look.empty {
                Step::Done(Outcome::Empty)
            } else if now >= *until {
                Step::Done(Outcome::Left(tree.living().copied().collect()))
            } else {
                look.wait(now, *until)
            }),
        }
    }
}

fn freezing(now: Moment) -> Phase {
    Phase::Freezing { stopped: HashSet::new(), rounds: 0, until: now + KILL_LIMIT }
}

/// Sends a signal and SIGCONT, so that a stopped process can act on it. Which processes were still there.
///
/// # Errors
/// The last one, if nothing could be signalled.
fn tell(scanner: &mut Scanner, processes: &[ProcessId], signal: Signal) -> io::Result<Vec<ProcessId>> {
    let mut told = Vec::new();
    let mut failed = None;
    for &process in processes {
        // A stopped process acts on the signal only when it is continued. It may have ended of the signal already.
        match signal_process(scanner.procfs(), process, &[signal.number(), libc::SIGCONT]) {
            Ok(true) => told.push(process),
            Ok(false) => {}
            Err(error) => failed = Some(error),
        }
    }
    match failed {
        Some(error) if told.is_empty() => Err(error),
        _ => Ok(told),
    }
}

/// SIGKILL to everything: the whole control group in one write that nothing forks away from, where there is one, and what
/// is not in it.
fn kill(scanner: &mut Scanner, root: &Root, tree: &Tree) {
    if let Some(group) = &root.group {
        // Before Linux 5.14 there is no such file, and its members are killed like the others.
        let _ = group.kill();
    }
    strike(scanner, root.main, tree, libc::SIGKILL);
}

/// Sends a signal to everything that lives in a tree: to the main process's group in one call, which no fork in it
/// can slip past, and to the rest one by one. Who may not be signalled shows as left over in the end.
fn strike(scanner: &mut Scanner, main: ProcessId, tree: &Tree, signal: i32) {
    // The group is surely ours while its leader is there, alive or not yet reaped.
    let group = tree.members.first().is_some_and(|first| first.process == main && first.pgrp == main.pid)
        && signal_group(main.pid, signal).unwrap_or(false);
    for stat in tree.living() {
        if !group || stat.pgrp != main.pid {
            let _ = signal_process(scanner.procfs(), stat.process, &[signal]);
        }
    }
}
