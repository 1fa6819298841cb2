//! How far the driver is behind with what it was told: a worker that makes events without end must not fill our memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::{DispatchEvent, EVENTS};

/// Events that were told and not handled.
#[derive(Clone, Debug, Default)]
pub(super) struct Backlog(Arc<AtomicUsize>);

impl Backlog {
    /// The same sink, whose events count.
    pub(super) fn counting(
        &self,
        sink: Box<dyn Fn(DispatchEvent) + Send>,
    ) -> Box<dyn Fn(DispatchEvent) + Send> {
        let waiting = Arc::clone(&self.0);
        Box::new(move |event| {
            waiting.fetch_add(1, Ordering::Relaxed);
            sink(event);
        })
    }

    /// One less; none less than none.
    pub(super) fn handled(&self) {
        let less = |waiting: usize| waiting.checked_sub(1);
        let _ = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }

    /// How many there are.
    pub(super) fn waiting(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    /// Whether no more should be read that makes events.
    pub(super) fn is_long(&self) -> bool {
        self.waiting() >= EVENTS
    }
}
