//! Whose memory is measured.

use std::collections::HashMap;

use super::World;
use crate::model::id::InstanceId;
use crate::supervisor::memory::{MemoryWatcher, Notice};
use crate::sys::procfs::ProcessId;

/// Everything about memory limits. Empty, and without a thread, where no instance has one.
#[derive(Debug, Default)]
pub(super) struct MemoryLimits {
    /// The limits, in bytes.
    watched: HashMap<InstanceId, u64>,
    watcher: Option<MemoryWatcher>,
}

impl MemoryLimits {
    fn tell(&self, notice: Notice) {
        if let Some(watcher) = &self.watcher {
            watcher.tell(notice);
        }
    }

    /// An instance has a process.
    pub(super) fn appeared(&self, id: &InstanceId, process: ProcessId) {
        self.tell(Notice::Appeared(id.clone(), process));
    }

    /// An instance is no more.
    pub(super) fn gone(&mut self, id: &InstanceId) {
        self.tell(Notice::Gone(id.clone()));
        self.leave(id);
    }

    pub(super) fn unwatch(&mut self, id: &InstanceId) {
        self.tell(Notice::Unwatch(id.clone()));
        self.leave(id);
    }

    fn leave(&mut self, id: &InstanceId) {
        self.watched.remove(id);
        if self.watched.is_empty() {
            self.watcher = None;
        }
    }
}

impl World {
    pub(super) fn watch_memory(&mut self, id: InstanceId, limit: u64) {
        self.memory.watched.insert(id.clone(), limit);
        if self.memory.watcher.is_some() {
            return self.memory.tell(Notice::Watch(id, limit));
        }
        let watcher = match MemoryWatcher::start(self.keeper_pid.cast_signed(), self.inputs.clone()) {
            Ok(watcher) => watcher,
            // The next instance that has a limit tries again for all of them.
            Err(error) => {
                tracing::warn!(instance = %id, %error, "cannot watch memory limits: no thread");
                return;
            }
        };
        // Those without a limit too: what nobody claims would be looked at again and again.
        for (id, run) in &self.runs {
            if let Some(process) = run.process {
                watcher.tell(Notice::Appeared(id.clone(), process));
            }
        }
        for (id, limit) in &self.memory.watched {
            watcher.tell(Notice::Watch(id.clone(), *limit));
        }
        self.memory.watcher = Some(watcher);
    }
}
