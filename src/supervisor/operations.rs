//! Who waits for which operation, and how the last ones ended.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::handle::Replies;
use super::recovery::{Aim, OperationMemo};
use crate::ipc::protocol::{Answer, OperationView, Refused, Reply};
use crate::model::id::{AppName, OpId};
use crate::model::moment::Moment;
use crate::model::saved::SavedFleet;
use crate::policy::fleet::Fleet;

/// Outcomes that are kept for clients that lost their connection.
const REMEMBERED: usize = 256;

/// The same, counted in apps: outcomes of `restart all` are as long as the list. The newest is kept in any case.
const REMEMBERED_APPS: usize = 256;

/// How long an outcome is kept for the next supervisor: longer than a client asks for it, unless it was stopped (Ctrl-Z).
const ASKED_WITHIN: Duration = Duration::from_secs(15);

/// How an operation ended.
pub type Ended = Result<OperationView, Refused>;

/// Operations under way and those that ended lately.
#[derive(Debug, Default)]
pub struct Operations {
    under_way: BTreeMap<OpId, UnderWay>,
    ended: VecDeque<Past>,
    /// Everything that an earlier supervisor was asked is known, so that what is not was never begun.
    complete: bool,
    /// When the last operation ended that is not known any more. What was asked for later is known.
    forgotten: Moment,
    changes: u64,
}

/// An operation that has ended.
#[derive(Debug)]
struct Past {
    op: OpId,
    at: Moment,
    ended: Ended,
    /// The same for the memo, which is asked for in every turn: written once.
    text: String,
}

impl Past {
    fn new(op: OpId, at: Moment, ended: Ended) -> Self {
        let text = serde_json::to_string(&ended).unwrap_or_default();
        Self { op, at, ended, text }
    }
}

#[derive(Debug, Default)]
struct UnderWay {
    clients: Vec<Replies>,
    memo: Option<OperationMemo>,
    /// An earlier supervisor was asked: the fleet finishes or undoes it, but does not reply.
    inherited: bool,
    /// What that one had not come to.
    not_begun: Vec<AppName>,
}

/// What the next supervisor has to know of operations.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct OperationsMemo {
    under_way: Vec<OperationMemo>,
    /// What an earlier supervisor had not come to in some of them. Judged once: what began and was undone is no more to
    /// be told from it later.
    not_begun: Vec<(OpId, Vec<AppName>)>,
    /// With the outcome as JSON: the protocol's types are made for that.
    ended: Vec<(OpId, Moment, String)>,
    /// When the last operation ended that is in none of these.
    forgotten: Moment,
}

/// What is known of an operation that a client asks about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    /// The client has its outcome, or will get it.
    Joined,
    /// Nobody has begun it.
    NeverBegun,
    /// What was known is lost.
    Lost,
}

impl Operations {
    /// Takes over what an earlier supervisor was asked; `None` when that is lost, or there was none. Returns the
    /// operations that have to be asked for again.
    pub fn adopt(&mut self, memo: Option<OperationsMemo>, saved: &SavedFleet) -> Vec<OpId> {
        let Some(OperationsMemo { under_way, not_begun, ended, forgotten }) = memo else { return Vec::new() };
        let mut judged: BTreeMap<OpId, Vec<AppName>> = not_begun.into_iter().collect();
        self.complete = true;
        self.forgotten = forgotten;
        for (op, at, text) in ended {
            match serde_json::from_str::<Ended>(&text) {
                Ok(ended) => self.ended.push_back(Past { op, at, ended, text }),
                Err(_) => self.forgotten = self.forgotten.max(at),
            }
        }
        let mut again = Vec::new();
        for memo in under_way.into_iter().filter(|memo| memo.has_begun(saved)) {
            if memo.aim == Aim::Kill {
                again.push(memo.op);
            }
            let op = memo.op;
            let operation = UnderWay {
                clients: Vec::new(),
                inherited: memo.aim != Aim::Kill,
                not_begun: judged.remove(&op).unwrap_or_else(|| memo.not_begun(saved)),
                memo: Some(memo),
            };
            self.under_way.insert(op, operation);
        }
        again
    }

    /// For the next supervisor.
    #[must_use]
    pub fn memo(&self, now: Moment) -> OperationsMemo {
        let (kept, dropped): (Vec<&Past>, Vec<&Past>) =
            self.ended.iter().partition(|past| now.since(past.at) < ASKED_WITHIN);
        OperationsMemo {
            under_way: self.under_way.values().filter_map(|operation| operation.memo.clone()).collect(),
            not_begun: self
                .under_way
                .iter()
                .filter(|(_, operation)| operation.inherited)
                .map(|(op, operation)| (*op, operation.not_begun.clone()))
                .collect(),
            ended: kept.into_iter().map(|past| (past.op, past.at, past.text.clone())).collect(),
            forgotten: dropped.into_iter().map(|past| past.at).fold(self.forgotten, Moment::max),
        }
    }

    /// Counts what changes the memo.
    #[must_use]
    pub const fn changes(&self) -> u64 {
        self.changes
    }

    /// An operation begins; its steps and its outcome go to `client`.
    pub fn begin(&mut self, op: OpId, memo: Option<OperationMemo>, client: Replies) {
        let operation = self.under_way.entry(op).or_default();
        operation.clients.push(client);
        if memo.is_some() {
            operation.memo = memo;
            self.changes += 1;
        }
    }

    /// Another client waits for the same operation, which was `asked` for then, or gets its outcome at once.
    pub fn join(&mut self, now: Moment, op: OpId, asked: Option<Moment>, client: &Replies) -> Known {
        if let Some(operation) = self.under_way.get_mut(&op) {
            operation.clients.push(client.clone());
            return Known::Joined;
        }
        match self.ended.iter().find(|past| past.op == op) {
            Some(past) => {
                let _ = client.send(reply(past.ended.clone()));
                Known::Joined
            }
            None if self.complete && self.knows_all_since(now, asked) => Known::NeverBegun,
            None => Known::Lost,
        }
    }

    /// Whether an operation that was asked for then, or that a client asks about who does not say when, would be known: it
    /// cannot have ended before.
    fn knows_all_since(&self, now: Moment, asked: Option<Moment>) -> bool {
        match asked {
            Some(asked) => asked > self.forgotten,
            None => self.forgotten == Moment::default() || now.since(self.forgotten) >= ASKED_WITHIN,
        }
    }

    /// The operation under way that an earlier supervisor was asked for this app.
    #[must_use]
    pub fn about(&self, app: &AppName) -> Option<OpId> {
        let memos = self.under_way.values().filter(|operation| operation.inherited);
        memos
            .filter_map(|operation| operation.memo.as_ref())
            .find(|memo| memo.is_about(app))
            .map(|memo| memo.op)
    }

    /// Ends operations of an earlier supervisor whose apps have come to rest, and says which.
    pub fn end_inherited(&mut self, now: Moment, fleet: &Fleet) -> Vec<(OpId, Ended)> {
        if !self.under_way.values().any(|operation| operation.inherited) {
            return Vec::new();
        }
        let saved = fleet.saved();
        let ended: Vec<(OpId, Ended)> = self
            .under_way
            .iter()
            .filter(|(_, operation)| operation.inherited)
            .filter_map(|(op, operation)| Some((*op, Ok(operation.memo.as_ref()?.ended(fleet, &saved)?))))
            .collect();
        for (op, ended) in &ended {
            self.end(now, *op, ended.clone());
        }
        ended
    }

    /// Says something to everybody who waits. A client that has gone is no reason to stop.
    pub fn tell(&self, op: OpId, say: impl Fn() -> Reply) {
        for client in self.under_way.get(&op).into_iter().flat_map(|operation| &operation.clients) {
            let _ = client.send(say());
        }
    }

    /// Whether any client waits for an outcome.
    #[must_use]
    pub fn is_waited_for(&self) -> bool {
        self.under_way.values().any(|operation| !operation.clients.is_empty())
    }

    /// Everybody who waits is told this instead of an outcome; what they wait for goes on.
    pub fn tell_all(&mut self, refused: &Refused) {
        for client in self.under_way.values_mut().flat_map(|operation| operation.clients.drain(..)) {
            let _ = client.send(Reply::Refused(refused.clone()));
        }
    }

    /// The operation has ended.
    pub fn end(&mut self, now: Moment, op: OpId, ended: Ended) {
        let operation = self.under_way.remove(&op).unwrap_or_default();
        let mut ended = ended;
        if let Ok(view) = &mut ended {
            mark_not_begun(view, &operation.not_begun);
        }
        for client in operation.clients {
            let _ = client.send(reply(ended.clone()));
        }
        self.ended.push_back(Past::new(op, now, ended));
        let mut apps: usize = self.ended.iter().map(|past| size(&past.ended)).sum();
        while self.ended.len() > 1 && (self.ended.len() > REMEMBERED || apps > REMEMBERED_APPS) {
            let Some(past) = self.ended.pop_front() else { break };
            apps -= size(&past.ended);
            self.forgotten = self.forgotten.max(past.at);
        }
        self.changes += 1;
    }
}

/// What nobody has begun has not failed.
fn mark_not_begun(view: &mut OperationView, not_begun: &[AppName]) {
    for result in view.apps.iter_mut().filter(|result| !result.ok && not_begun.contains(&result.app)) {
        crate::ipc::protocol::NOT_BEGUN.clone_into(&mut result.result);
        if let Some(failure) = &mut result.failure {
            "the supervisor was started again before its turn came".clone_into(&mut failure.cause);
            failure.hint = Some(format!("`pm reload {}` does it now.", result.app));
        }
    }
}

fn size(ended: &Ended) -> usize {
    ended.as_ref().map_or(0, |view| view.apps.len())
}

fn reply(ended: Ended) -> Reply {
    match ended {
        Ok(view) => Reply::Answer(Answer::Operation(view)),
        Err(refused) => Reply::Refused(refused),
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc::unbounded_channel;

    use super::*;
    use crate::supervisor::recovery::AppAim;

    const OP: OpId = OpId(7);

    fn at(seconds: u64) -> Moment {
        Moment::default() + Duration::from_secs(seconds)
    }

    fn next_after(operations: &Operations, now: Moment) -> Operations {
        let mut next = Operations::default();
        assert_eq!(next.adopt(Some(operations.memo(now)), &SavedFleet::default()), []);
        next
    }

    #[test]
    fn what_nobody_noted_was_never_begun_unless_the_notes_are_lost() {
        let (client, _) = unbounded_channel();
        assert_eq!(Operations::default().join(at(1), OP, Some(at(1)), &client), Known::Lost);
        let mut next = next_after(&Operations::default(), at(1));
        assert_eq!(next.join(at(2), OP, Some(at(1)), &client), Known::NeverBegun);
        assert_eq!(next.join(at(2), OP, None, &client), Known::NeverBegun);
    }

    #[test]
    fn what_is_forgotten_is_not_called_never_begun() {
        let ended = || Ok(OperationView { ok: true, apps: Vec::new() });
        let (client, _) = unbounded_channel();
        let mut operations = Operations::default();
        operations.end(at(100), OP, ended());
        // Two supervisors later; the client was stopped meanwhile.
        let second = next_after(&operations, at(120));
        let mut third = next_after(&second, at(200));
        assert_eq!(third.join(at(200), OP, Some(at(99)), &client), Known::Lost);
        assert_eq!(third.join(at(200), OpId(8), Some(at(199)), &client), Known::NeverBegun);
        // Nor is what there were too many of, a moment ago.
        let mut busy = next_after(&Operations::default(), at(1));
        for op in 0..=REMEMBERED as u64 {
            busy.end(at(300), OpId(op), ended());
        }
        for operations in [&mut next_after(&busy, at(301)), &mut busy] {
            assert_eq!(operations.join(at(301), OpId(0), Some(at(299)), &client), Known::Lost);
            assert_eq!(operations.join(at(301), OpId(0), None, &client), Known::Lost);
            assert_eq!(operations.join(at(301), OpId(1), Some(at(299)), &client), Known::Joined);
            assert_eq!(operations.join(at(302), OpId(9999), Some(at(301)), &client), Known::NeverBegun);
        }
    }

    #[test]
    fn an_outcome_that_did_not_reach_its_client_is_told_by_the_next_supervisor_for_a_while() {
        let mut operations = Operations::default();
        let before = operations.changes();
        operations.end(at(1), OP, Ok(OperationView { ok: false, apps: Vec::new() }));
        assert_ne!(operations.changes(), before);
        let (client, mut replies) = unbounded_channel();
        assert_eq!(next_after(&operations, at(5)).join(at(5), OP, Some(at(0)), &client), Known::Joined);
        let reply = replies.try_recv().unwrap();
        assert!(
            matches!(reply, Reply::Answer(Answer::Operation(OperationView { ok: false, .. }))),
            "{reply:?}"
        );
        assert_eq!(next_after(&operations, at(60)).join(at(60), OP, Some(at(0)), &client), Known::Lost);
    }

    #[test]
    fn what_was_noted_but_not_saved_may_be_asked_for_again_and_kill_always_is() {
        let (client, _) = unbounded_channel();
        let mut operations = Operations::default();
        let delete = AppAim::deletion_of(AppName::new("api").unwrap());
        let start = AppAim::start_of(AppName::new("api").unwrap());
        for (op, aim) in
            [(OP, Aim::Apps(vec![start])), (OpId(8), Aim::Apps(vec![delete])), (OpId(9), Aim::Kill)]
        {
            operations.begin(op, Some(OperationMemo { op, aim, entries: Vec::new() }), client.clone());
        }
        let mut next = Operations::default();
        assert_eq!(next.adopt(Some(operations.memo(at(1))), &SavedFleet::default()), [OpId(9)]);
        let mut join = |op| next.join(at(2), op, Some(at(1)), &client);
        assert_eq!(join(OP), Known::NeverBegun, "there is no such app");
        assert_eq!(join(OpId(8)), Known::Joined, "it is gone already");
        assert_eq!(join(OpId(9)), Known::Joined);
    }
}
