//! A worker's side of Node's IPC channel: any process that an app starts can write there.

use pm::model::id::Slot;
use pm::model::moment::Moment;
use pm::model::spec::Balance;
use pm::node::channel::{Lines, Piece};
use pm::node::messages::{self, Incoming, Query};
use pm::node::primary::{ListenerIx, Primary, QueryAnswer, WorkerIx};

/// The first byte says how many bytes arrive at a time. Lines are the same however they arrive, and the primary takes
/// any of them in any order.
pub(crate) fn node_channel(input: &[u8]) {
    let [step, stream @ ..] = input else { return };
    let whole = lines(stream, usize::MAX);
    let pieces = lines(stream, usize::from(*step).max(1));
    assert_eq!(whole, pieces, "lines do not depend on how their bytes arrive");
    let mut cluster = Cluster::new();
    for line in &whole {
        cluster.hear(line);
    }
    // A worker that goes leaves nothing behind.
    cluster.primary.remove_worker(WORKER);
    cluster.primary.remove_worker(OTHER);
    assert!(cluster.primary.listeners().all(|(ix, _)| cluster.primary.usage(ix).workers == 0));
}

/// As the dispatcher reads: it peeks at most so much, and consumes what it was told to.
fn lines(stream: &[u8], step: usize) -> Vec<Vec<u8>> {
    let (mut lines, mut found) = (Lines::default(), Vec::new());
    let (mut at, mut arrived) = (0, 0);
    while arrived < stream.len() {
        arrived = stream.len().min(arrived.saturating_add(step));
        loop {
            let (used, piece) = lines.first(&stream[at..arrived]);
            assert!(used <= arrived - at);
            if piece == Piece::Long {
                lines.keep(&stream[at..at + used]);
            }
            at += used;
            match piece {
                Piece::Line { bytes, length } => {
                    assert!(bytes.len() as u64 <= length);
                    found.push(bytes.into_owned());
                }
                Piece::Skipped { .. } => found.push(b"too long".to_vec()),
                Piece::Incomplete | Piece::Long => break,
            }
        }
    }
    found
}

const WORKER: WorkerIx = WorkerIx(1);
const OTHER: WorkerIx = WorkerIx(2);

struct Cluster {
    primary: Primary<u64>,
    made: u64,
    now: Moment,
}

impl Cluster {
    fn new() -> Self {
        let mut primary = Primary::default();
        primary.add_worker(WORKER, Slot(0), Balance::RoundRobin, 0);
        primary.add_worker(OTHER, Slot(1), Balance::Sticky, 0);
        primary.put_in(WORKER);
        primary.put_in(OTHER);
        Self { primary, made: 0, now: Moment::default() }
    }

    fn hear(&mut self, line: &[u8]) {
        match messages::read(line, true) {
            Incoming::Query(query) => self.query(query),
            Incoming::Listening(query) => {
                let _ = (self.primary.listening(WORKER, &query), query.display(Some(1)));
            }
            Incoming::Close { key } => {
                let _ = (messages::split_slot_key(&key), messages::common_key(&key));
                self.primary.close(WORKER, &key);
            }
            Incoming::Answer { ack, accepted } => {
                if let Some(listener) = self.primary.answered(WORKER, ack, accepted) {
                    let _ = self.primary.assign(listener, self.now);
                }
            }
            Incoming::Handle { message: Some(message) } => {
                serde_json::from_str::<serde_json::Value>(&message).expect("a message stays JSON");
            }
            Incoming::Leaving { seq } => one_line(&messages::may_leave(seq, 1)),
            Incoming::SocketCount { key } => one_line(&messages::socket_count(&key)),
            Incoming::SocketClose { key } => one_line(&messages::sockets_closed(&key)),
            _ => {}
        }
        // Of a long line only the head is read.
        let _ = messages::read(&line[..line.len() / 2], false);
    }

    fn query(&mut self, query: Query) {
        let (key, seq) = (query.key(), query.seq);
        one_line(&messages::refused(&key, seq, messages::INVALID, 2));
        match self.primary.query(WORKER, &query) {
            QueryAnswer::Bind(_) => {
                self.made += 1;
                let listener = ListenerIx(self.made);
                self.primary.add_listener(listener, key.clone(), query.data.clone());
                self.primary.open(WORKER, listener, query);
            }
            QueryAnswer::Existing(listener) => self.primary.open(WORKER, listener, query),
            QueryAnswer::Again(_) | QueryAnswer::Refuse(_) => {}
        }
        if let Some(listener) = self.primary.listener(&key) {
            self.primary.connection(listener, seq, Some(seq));
            let _ = self.primary.assign(listener, self.now);
        }
    }
}

/// What is answered is one line of JSON, whatever the worker called its sockets.
fn one_line(line: &[u8]) {
    let text = line.strip_suffix(b"\n").expect("a newline at its end");
    assert!(!text.contains(&b'\n'));
    serde_json::from_slice::<serde_json::Value>(text).expect("JSON");
}
