//! A thread that measures the memory of instances that have a limit.
//!
//! It is there only while any has one, and sleeps between two passes: a daemon without limits measures nothing. What it
//! finds goes to the driver; what follows from it is the fleet's to decide.

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;

use tokio::sync::mpsc::UnboundedSender;

use super::driver::Input;
use crate::metrics::watch::{CALM, MemoryWatch, SUSPICIOUS};
use crate::model::id::InstanceId;
use crate::model::moment::Moment;
use crate::policy::memory::SAMPLES;
use crate::sys::clock;
use crate::sys::procfs::ProcessId;

// Whoever crosses the limit is found out within two seconds.
const _: () = {
    let worst = CALM.as_millis() + (SAMPLES as u128 - 1) * SUSPICIOUS.as_millis();
    assert!(worst <= 2000, "replaced too late");
};

/// What the thread is told.
#[derive(Debug)]
pub(super) enum Notice {
    /// An instance has a process.
    Appeared(InstanceId, ProcessId),
    /// An instance is no more.
    Gone(InstanceId),
    /// Measure it against this limit, in bytes.
    Watch(InstanceId, u64),
    /// Measure it no more.
    Unwatch(InstanceId),
}

/// The thread's handle; it ends when this is dropped.
#[derive(Debug)]
pub(super) struct MemoryWatcher {
    notices_tx: Sender<Notice>,
}

impl MemoryWatcher {
    /// Starts the thread. Process trees are found below `keeper`.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub(super) fn start(keeper: i32, inputs: UnboundedSender<Input>) -> io::Result<Self> {
        let (notices_tx, notices_rx) = channel();
        thread::Builder::new().name("memory".into()).spawn(move || run(keeper, &notices_rx, &inputs))?;
        Ok(Self { notices_tx })
    }

    pub(super) fn tell(&self, notice: Notice) {
        // The thread lives as long as this sender.
        let _ = self.notices_tx.send(notice);
    }
}

fn run(keeper: i32, notices_rx: &Receiver<Notice>, inputs: &UnboundedSender<Input>) {
    let mut watch = MemoryWatch::new(SAMPLES);
    let mut last = Moment::default();
    let mut failing = false;
    loop {
        let notice = match watch.interval() {
            None => notices_rx.recv().map_err(|_| RecvTimeoutError::Disconnected),
            // Counted from the end of the last pass: however slow the machine is, this thread rests in between.
            Some(interval) => notices_rx.recv_timeout((last + interval).since(clock::now())),
        };
        match notice {
            Ok(Notice::Appeared(id, main)) => watch.appeared(id, main),
            Ok(Notice::Gone(id)) => watch.gone(&id),
            Ok(Notice::Watch(id, limit)) => watch.watch(id, limit),
            Ok(Notice::Unwatch(id)) => watch.unwatch(&id),
            Err(RecvTimeoutError::Timeout) => {
                let told = watch.pass(clock::now(), keeper);
                last = clock::now();
                if let Err(error) = &told
                    && !failing
                {
                    tracing::warn!(%error, "cannot measure memory; trying again every second");
                }
                failing = told.is_err();
                let told = told.unwrap_or_default();
                // Fails only when the driver has ended.
                if !told.is_empty() && inputs.send(Input::Measured(told)).is_err() {
                    return;
                }
            }
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}
