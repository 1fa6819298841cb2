//! Ctrl-C while the daemon works: the command ends, the operation does not, and people are told so.
//!
//! The signal is blocked and waited for by a thread, so that a message can be written without a signal handler.

use std::io::Write;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use nix::sys::signal::{SigSet, Signal};

/// What a shell reports for a program that SIGINT ended.
const INTERRUPTED: i32 = 130;

/// Whether an operation is under way. One per process, as the signal is.
static UNDER_WAY: AtomicBool = AtomicBool::new(false);

static WATCH: Once = Once::new();

/// An operation is under way until this is dropped.
#[derive(Debug)]
pub struct UnderWay(());

impl UnderWay {
    /// From now on Ctrl-C says that the operation goes on.
    #[must_use]
    pub fn begin() -> Self {
        WATCH.call_once(watch);
        UNDER_WAY.store(true, Ordering::Relaxed);
        Self(())
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        UNDER_WAY.store(false, Ordering::Relaxed);
    }
}

fn watch() {
    let mut interrupt = SigSet::empty();
    interrupt.add(Signal::SIGINT);
    if interrupt.thread_block().is_err() {
        return;
    }
    let waiting = thread::Builder::new().name("interrupt".into()).spawn(move || {
        if interrupt.wait().is_err() {
            return;
        }
        if UNDER_WAY.load(Ordering::Relaxed) {
            // Nobody is left to tell when this fails.
            let _ = writeln!(
                std::io::stderr().lock(),
                "\nIt goes on without this command: `pm list` shows how far it is."
            );
        }
        #[expect(
            clippy::exit,
            reason = "the main thread waits for the daemon; nobody waits for it any more"
        )]
        std::process::exit(INTERRUPTED);
    });
    if waiting.is_err() {
        // Without the thread Ctrl-C has to end the command the usual way.
        let _ = interrupt.thread_unblock();
    }
}
