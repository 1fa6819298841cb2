//! How everybody else asks the supervisor's driver for something.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, mpsc};

use super::room;
use crate::ipc::protocol::{Call, Reply};
use crate::sys::limits;

/// Requests that may wait for the driver; beyond that clients wait in their sockets.
pub const ASKS_MAX: usize = 256;

/// Connections of commands that may be served at once, under this process's limit on open files.
#[must_use]
pub fn connections_max() -> usize {
    // Where the limit cannot be read, the usual one.
    let limit = limits::open_files().map_or(1024, |limit| limit.soft);
    usize::try_from(room::connections(limit)).unwrap_or(usize::MAX)
}

/// Answers to one request, in order; the last one is an `Answer` or a `Refused`.
///
/// Unbounded, because it holds at most the steps of one operation, and a driver must not wait for a client.
pub type Replies = mpsc::UnboundedSender<Reply>;

/// A request with the way back.
#[derive(Debug)]
pub struct Ask {
    /// What is asked.
    pub call: Call,
    /// Where the answers go.
    pub replies: Replies,
}

/// Hands requests to the driver.
#[derive(Clone, Debug)]
pub struct SupervisorHandle {
    asks_tx: mpsc::Sender<Ask>,
    open: Arc<Open>,
}

/// Requests whose last line has not been written to the client yet.
#[derive(Debug, Default)]
struct Open {
    count: AtomicUsize,
    fewer: Notify,
}

/// A request that is under way until this is dropped.
#[derive(Debug)]
pub struct UnderWay(Arc<Open>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.count.fetch_sub(1, Ordering::AcqRel);
        self.0.fewer.notify_waiters();
    }
}

impl SupervisorHandle {
    /// A handle, and the end that the driver reads.
    #[must_use]
    pub fn new() -> (Self, mpsc::Receiver<Ask>) {
        let (asks_tx, asks_rx) = mpsc::channel(ASKS_MAX);
        (Self { asks_tx, open: Arc::default() }, asks_rx)
    }

    /// Counts a request as under way.
    #[must_use]
    pub fn begin(&self) -> UnderWay {
        self.open.count.fetch_add(1, Ordering::AcqRel);
        UnderWay(self.open.clone())
    }

    /// Waits until every client has its answer, for at most `patience`.
    pub async fn answered(&self, patience: Duration) {
        let all = async {
            loop {
                let fewer = self.open.fewer.notified();
                if self.open.count.load(Ordering::Acquire) == 0 {
                    return;
                }
                fewer.await;
            }
        };
        // A client that does not read cannot keep the daemon alive.
        let _ = tokio::time::timeout(patience, all).await;
    }

    /// Hands a request over. The receiver ends without an `Answer` only when the supervisor itself ends.
    pub async fn submit(&self, call: Call) -> mpsc::UnboundedReceiver<Reply> {
        let (replies, replies_rx) = mpsc::unbounded_channel();
        // A driver that is gone drops the sender, which ends the receiver.
        let _ = self.asks_tx.send(Ask { call, replies }).await;
        replies_rx
    }
}
