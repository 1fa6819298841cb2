//! Writes the desired state on a thread of its own: one fsync for all commands that wait for it.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::policy::vocabulary::SaveId;
use crate::store::state::{State, StateStore};

/// Nothing to write for this long is a pause. Commands that change something write, so it follows each of them.
const PAUSE: Duration = Duration::from_secs(1);

/// How a save ended.
#[derive(Debug)]
pub struct SaveDone {
    /// This save and every earlier one.
    pub save: SaveId,
    /// The error text, if the state is not durable.
    pub result: Result<(), String>,
}

/// Hands states to the thread. Dropping it ends the thread after the last state handed over is written.
#[derive(Debug)]
pub struct Saver {
    jobs_tx: Option<Sender<(SaveId, State)>>,
    thread: Option<JoinHandle<()>>,
}

impl Saver {
    /// Starts the thread. `done` is called on it, and `pause` once in every pause, the first one soon after the start:
    /// the time for housekeeping.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(
        store: StateStore,
        done: impl Fn(SaveDone) + Send + 'static,
        pause: impl Fn() + Send + 'static,
    ) -> std::io::Result<Self> {
        let (jobs_tx, jobs_rx) = channel();
        let thread =
            thread::Builder::new().name("saver".into()).spawn(move || run(store, &jobs_rx, &done, &pause))?;
        Ok(Self { jobs_tx: Some(jobs_tx), thread: Some(thread) })
    }

    /// Asks for a state to be written. Later states replace earlier ones that have not been begun.
    pub fn save(&self, save: SaveId, state: State) {
        if let Some(jobs_tx) = &self.jobs_tx {
            // The thread lives as long as this sender.
            let _ = jobs_tx.send((save, state));
        }
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        self.jobs_tx = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(
    mut store: StateStore,
    jobs_rx: &Receiver<(SaveId, State)>,
    done: &impl Fn(SaveDone),
    pause: &impl Fn(),
) {
    let next = || match jobs_rx.recv_timeout(PAUSE) {
        Err(RecvTimeoutError::Timeout) => {
            pause();
            jobs_rx.recv().ok()
        }
        job => job.ok(),
    };
    store.tidy();
    while let Some((mut save, mut state)) = next() {
        while let Ok((later, newer)) = jobs_rx.try_recv() {
            (save, state) = (later, newer);
        }
        let result = store.save(&state).map_err(|error| error.to_string());
        done(SaveDone { save, result });
    }
}
