//! Questions that wait for what agents have measured.
//!
//! An agent is asked when somebody wants to see its figures, and at no other time; it answers within a millisecond
//! unless its event loop is busy. An answer waits for it, a little, and goes out without it then; one that did not
//! answer is not waited for again until it has. Nothing else waits: this is a list of jobs in the driver.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::time::Duration;

use super::publish::{Inside, Job, Question};
use crate::metrics::sample::FRESH_FOR;
use crate::model::figures::NodeFigures;
use crate::model::id::InstanceId;
use crate::model::moment::Moment;

/// How long a table waits for agents.
const TABLE_WAITS: Duration = Duration::from_millis(50);
/// How long the details of a few instances wait.
const DETAILS_WAIT: Duration = Duration::from_millis(250);

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Surveys {
    next_ask: u64,
    open: Vec<Survey>,
    known: HashMap<InstanceId, (Moment, NodeFigures)>,
    /// Agents that did not answer in time the last time.
    silent: HashSet<InstanceId>,
}

#[derive(Debug)]
struct Survey {
    job: Job,
    /// Agents that have not answered.
    missing: BTreeSet<InstanceId>,
    until: Moment,
}

/// What follows a question.
#[derive(Debug)]
pub(super) enum Then {
    /// Answer it.
    Answer(Box<Job>),
    /// Ask these agents; the answer follows.
    Ask {
        /// Who.
        ids: Vec<InstanceId>,
        /// Comes back with their answers.
        ask: u64,
    },
}

impl Surveys {
    /// Takes a question that shows figures.
    pub(super) fn begin(&mut self, job: Job) -> Then {
        let now = job.now;
        let agents: BTreeSet<InstanceId> = job.slots.iter().filter_map(|slot| slot.agent.clone()).collect();
        self.known.retain(|_, (at, _)| now.since(*at) < FRESH_FOR);
        let ids: Vec<InstanceId> = agents.into_iter().filter(|id| !self.is_fresh(id, now)).collect();
        let missing: BTreeSet<InstanceId> =
            ids.iter().filter(|id| !self.silent.contains(id)).cloned().collect();
        if ids.is_empty() {
            return Then::Answer(Box::new(self.filled(job)));
        }
        let wait = match job.question {
            Question::Describe(_) => DETAILS_WAIT,
            Question::List { .. } | Question::Jlist(_) => TABLE_WAITS,
        };
        self.next_ask += 1;
        self.open.push(Survey { job, missing, until: now + wait });
        Then::Ask { ids, ask: self.next_ask }
    }

    /// An agent has answered.
    pub(super) fn answered(&mut self, now: Moment, id: &InstanceId, figures: NodeFigures) {
        self.silent.remove(id);
        self.known.insert(id.clone(), (now, figures));
        for survey in &mut self.open {
            survey.missing.remove(id);
        }
    }

    /// The questions that can be answered.
    pub(super) fn ready(&mut self, now: Moment) -> Vec<Job> {
        let mut ready = Vec::new();
        let mut index = 0;
        while let Some(survey) = self.open.get(index) {
            if !survey.missing.is_empty() && now < survey.until {
                index += 1;
                continue;
            }
            let Survey { job, missing, .. } = self.open.remove(index);
            self.silent.extend(missing);
            ready.push(self.filled(job));
        }
        ready
    }

    /// When [`Surveys::ready`] has something at the latest.
    pub(super) fn next_deadline(&self) -> Option<Moment> {
        self.open.iter().map(|survey| survey.until).min()
    }

    /// A run is over.
    pub(super) fn forget(&mut self, id: &InstanceId) {
        self.known.remove(id);
        self.silent.remove(id);
        for survey in &mut self.open {
            survey.missing.remove(id);
        }
    }

    fn is_fresh(&self, id: &InstanceId, now: Moment) -> bool {
        self.known.get(id).is_some_and(|(at, _)| now.since(*at) < FRESH_FOR)
    }

    fn filled(&self, mut job: Job) -> Job {
        for slot in &mut job.slots {
            slot.inside = match &slot.agent {
                None => Inside::Unknown,
                Some(id) => match self.known.get(id) {
                    Some((at, figures)) if job.now.since(*at) < FRESH_FOR => Inside::Known(figures.clone()),
                    _ => Inside::Silent,
                },
            };
        }
        job
    }
}
