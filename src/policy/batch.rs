//! Requests over many apps: one reply when every app has an outcome.
//!
//! Reloads of several apps go two at a time, so that a deploy does not launch a whole machine's worth of instances
//! beside the old ones; everything else goes at once. A failure does not end the rest, but for parts that were to come
//! after the one that failed.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

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

/// What a request is about to do to an app.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) app: AppName,
    /// What is asked of it, or how it ends without anything being done.
    pub(super) ask: Result<Ask, AppOutcome>,
    /// It begins when these parts of the request have ended well, and not at all when one of them has not.
    pub(super) after: BTreeSet<AppName>,
}

#[derive(Clone, Debug)]
struct Request {
    op: OpId,
    order: Vec<AppName>,
    results: BTreeMap<AppName, AppOutcome>,
    todo: VecDeque<Part>,
    /// Apps that are being reloaded.
    reloading: BTreeSet<AppName>,
}

impl Requests {
    /// Opens a request of independent parts. They are handed out by `next_part`.
    pub(super) fn open(&mut self, op: OpId, parts: Vec<(AppName, Ask)>) -> RequestKey {
        let part = |(app, ask)| Part { app, ask: Ok(ask), after: BTreeSet::new() };
        self.open_parts(op, parts.into_iter().map(part).collect())
    }

    /// Opens a request. Its parts are handed out by `next_part`.
    pub(super) fn open_parts(&mut self, op: OpId, parts: Vec<Part>) -> RequestKey {
        self.last += 1;
        let key = RequestKey(self.last);
        let order = parts.iter().map(|part| part.app.clone()).collect();
        let request =
            Request { op, order, results: BTreeMap::new(), todo: parts.into(), reloading: BTreeSet::new() };
        self.open.insert(key, request);
        self.may_go_on.push(key);
        key
    }

    /// The client's name of a request.
    pub(super) fn op(&self, key: RequestKey) -> Option<OpId> {
        self.open.get(&key).map(|request| request.op)
    }

    /// A part that may begin now. Parts that never will are answered.
    pub(super) fn next_part(&mut self, actions: &mut Vec<Action>) -> Option<(RequestKey, AppName, Ask)> {
        while let Some(&key) = self.may_go_on.last() {
            let Some((part, verdict)) = self.open.get_mut(&key).and_then(Request::next_part) else {
                self.may_go_on.pop();
                continue;
            };
            match (verdict, part.ask) {
                (Some(failed), _) => self.settle(key, part.app, AppOutcome::Skipped { on: failed }, actions),
                (None, Err(outcome)) => self.settle(key, part.app, outcome, actions),
                (None, Ok(ask)) => return Some((key, part.app, ask)),
            }
        }
        None
    }

    /// Parts that have not begun end like this: the daemon is ending.
    pub(super) fn give_up_waiting_parts(&mut self, outcome: &AppOutcome, actions: &mut Vec<Action>) {
        let keys: Vec<_> = self.open.keys().copied().collect();
        for key in keys {
            let Some(request) = self.open.get_mut(&key) else { continue };
            for part in std::mem::take(&mut request.todo) {
                self.settle(key, part.app, outcome.clone(), actions);
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
        request.reloading.remove(&app);
        request.results.insert(app, outcome);
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
            let outcome = if apps.iter().all(|(_, outcome)| well(outcome)) {
                Outcome::Done { apps }
            } else {
                Outcome::Failed { apps }
            };
            actions.push(Action::Reply { op: request.op, outcome });
        }
    }
}

impl Request {
    /// The first part whose turn it is, and the app whose failure keeps it from beginning.
    fn next_part(&mut self) -> Option<(Part, Option<AppName>)> {
        let results = &self.results;
        let reloads = self.reloading.len();
        let index = self.todo.iter().position(|part| {
            let room = reloads < RELOADS_AT_ONCE || !matches!(part.ask, Ok(Ask::Reload { .. }));
            room && part.after.iter().all(|app| results.contains_key(app))
        })?;
        let part = self.todo.remove(index)?;
        let failed = part.after.iter().find(|app| !results.get(*app).is_some_and(well)).cloned();
        if failed.is_none() && matches!(part.ask, Ok(Ask::Reload { .. })) {
            self.reloading.insert(part.app.clone());
        }
        Some((part, failed))
    }
}

fn well(outcome: &AppOutcome) -> bool {
    match outcome {
        AppOutcome::Done { .. } | AppOutcome::Already { .. } => true,
        AppOutcome::Failed { .. }
        | AppOutcome::Waiting { .. }
        | AppOutcome::Skipped { .. }
        | AppOutcome::HookFailed { .. }
        | AppOutcome::Unfit { .. }
        | AppOutcome::Superseded { .. }
        | AppOutcome::NotRemembered { .. }
        | AppOutcome::StillListed { .. }
        | AppOutcome::NotSaved { .. } => false,
    }
}
