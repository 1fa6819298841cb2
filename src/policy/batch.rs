//! Requests over many apps: one reply when every app has an outcome.
//!
//! `reload` of several apps goes two at a time, so that a deploy does not launch a whole machine's worth of instances
//! beside the old ones; everything else goes at once. A failure does not end the rest.

use std::collections::{BTreeMap, VecDeque};

use crate::model::id::{AppName, OpId};

use super::admit::Ask;
use super::vocabulary::{Action, AppOutcome, Outcome};

/// How many apps of one request are reloaded at the same time.
pub(super) const RELOADS_AT_ONCE: usize = 2;

/// Names a request in this supervisor. Not the client's `OpId`: two clients may choose the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct RequestKey(u64);

/// Requests without a reply yet.
#[derive(Clone, Debug, Default)]
pub(super) struct Requests {
    open: BTreeMap<RequestKey, Request>,
    last: u64,
    /// Requests that may go on with another app.
    may_go_on: Vec<RequestKey>,
}

#[derive(Clone, Debug)]
struct Request {
    op: OpId,
    order: Vec<AppName>,
    results: BTreeMap<AppName, AppOutcome>,
    todo: VecDeque<(AppName, Ask)>,
    running: usize,
    at_once: usize,
}

impl Requests {
    /// Opens a request. Its parts are handed out by `next_part`.
    pub(super) fn open(&mut self, op: OpId, parts: Vec<(AppName, Ask)>, at_once: usize) -> RequestKey {
        self.last += 1;
        let key = RequestKey(self.last);
        let order = parts.iter().map(|(app, _)| app.clone()).collect();
        let request =
            Request { op, order, results: BTreeMap::new(), todo: parts.into(), running: 0, at_once };
        self.open.insert(key, request);
        self.may_go_on.push(key);
        key
    }

    /// The client's name of a request.
    pub(super) fn op(&self, key: RequestKey) -> Option<OpId> {
        self.open.get(&key).map(|request| request.op)
    }

    /// A part that may begin now.
    pub(super) fn next_part(&mut self) -> Option<(RequestKey, AppName, Ask)> {
        while let Some(&key) = self.may_go_on.last() {
            if let Some(request) = self.open.get_mut(&key)
                && request.running < request.at_once
                && let Some((app, ask)) = request.todo.pop_front()
            {
                request.running += 1;
                return Some((key, app, ask));
            }
            self.may_go_on.pop();
        }
        None
    }

    /// Parts that have not begun end like this: the daemon is ending.
    pub(super) fn give_up_waiting_parts(&mut self, outcome: &AppOutcome, actions: &mut Vec<Action>) {
        let keys: Vec<_> = self.open.keys().copied().collect();
        for key in keys {
            let Some(request) = self.open.get_mut(&key) else { continue };
            let waiting: Vec<_> = std::mem::take(&mut request.todo).into_iter().collect();
            request.running += waiting.len();
            for (app, _) in waiting {
                self.settle(key, app, outcome.clone(), actions);
            }
        }
    }

    /// One app of a request has an outcome; the last one brings the reply.
    pub(super) fn settle(
        &mut self,
        key: RequestKey,
        app: AppName,
        outcome: AppOutcome,
        actions: &mut Vec<Action>,
    ) {
        let Some(request) = self.open.get_mut(&key) else { return };
        if request.results.insert(app, outcome).is_none() {
            request.running = request.running.saturating_sub(1);
        }
        if request.results.len() < request.order.len() {
            self.may_go_on.push(key);
            return;
        }
        if let Some(mut request) = self.open.remove(&key) {
            let apps: Vec<_> = request
                .order
                .iter()
                .filter_map(|app| request.results.remove(app).map(|outcome| (app.clone(), outcome)))
                .collect();
            let well = |outcome: &AppOutcome| match outcome {
                AppOutcome::Done { .. } | AppOutcome::Already { .. } => true,
                AppOutcome::Failed { .. }
                | AppOutcome::Superseded { .. }
                | AppOutcome::NotRemembered { .. }
                | AppOutcome::NotSaved { .. } => false,
            };
            let outcome = if apps.iter().all(|(_, outcome)| well(outcome)) {
                Outcome::Done { apps }
            } else {
                Outcome::Failed { apps }
            };
            actions.push(Action::Reply { op: request.op, outcome });
        }
    }
}
