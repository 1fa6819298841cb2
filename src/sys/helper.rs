//! A program that answers a question by its exit code, run by this process itself and never for long.
//!
//! It leads a session of its own, so that all of it can be ended at once, and is killed by the kernel when this process
//! ends: nobody else would wait for its answer.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, pipe2};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, Interest};
use tokio::net::unix::pipe;

use super::child::{self, WaitStatus, Zombie};
use super::limits::Limit;
use super::spawn::{self, Confinement, Credentials, Failure, Outcome, Program, Report, Stage, Target};
use super::{pidfd, watch};

/// What to run.
#[derive(Debug)]
pub struct Question {
    /// The executable; relative ones start in `cwd`.
    pub program: CString,
    /// The arguments, beginning with the program's name.
    pub args: Vec<CString>,
    /// The environment, `KEY=value` each.
    pub env: Vec<CString>,
    /// The working directory.
    pub cwd: CString,
    /// Who it runs as, and what it may.
    pub bounds: Bounds,
}

/// What a program may, and where its life is accounted; by default as ours.
#[derive(Debug, Default)]
pub struct Bounds {
    /// Who it runs as; like us when `None`.
    pub credentials: Option<Credentials>,
    /// umask(2).
    pub umask: Option<u32>,
    /// Limits of each of its processes, set in this order.
    pub limits: Vec<Limit>,
    /// Its order and its rights.
    pub confinement: Confinement,
    /// The directory of the control group that it begins its life in.
    pub cgroup: Option<CString>,
    /// Its out-of-memory score adjustment.
    pub oom_score_adj: Option<i32>,
}

/// A program that runs, or has ended and not been asked for its answer. Dropping it ends its whole session.
#[derive(Debug)]
pub struct Helper {
    pid: u32,
    report: Report,
    output: pipe::Receiver,
    /// Readable when the process has ended; gone when it is reaped.
    ended: Option<AsyncFd<OwnedFd>>,
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// With this status.
    Exited(WaitStatus),
    /// It never ran.
    NotStarted(Failure),
}

/// Why it could not be started.
#[derive(Debug, thiserror::Error)]
pub enum HelperError {
    /// No process.
    #[error("cannot start a process: {0}")]
    Start(Failure),
    /// No descriptors left, or the like.
    #[error("cannot watch a process: {0}")]
    Watch(#[from] io::Error),
}

impl Helper {
    /// Starts it, with its stdout and stderr in one pipe.
    ///
    /// # Errors
    /// When there is no process, or it cannot be watched.
    pub fn start(question: &Question) -> Result<Self, HelperError> {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC).map_err(io::Error::from)?;
        super::pipe::set_nonblocking(&reader)?;
        let output = pipe::Receiver::from_owned_fd(reader)?;
        let null = std::fs::File::open("/dev/null")?;
        let args: Vec<_> = question.args.iter().map(CString::as_c_str).collect();
        let env: Vec<_> = question.env.iter().map(CString::as_c_str).collect();
        let bounds = &question.bounds;
        let fds = [null.as_fd(), writer.as_fd(), writer.as_fd()];
        let mut program = Program {
            target: Target::Path(&question.program),
            args: &args,
            env: &env,
            listen_pid: false,
            cwd: Some(&question.cwd),
            credentials: bounds.credentials.as_ref(),
            umask: bounds.umask,
            confinement: &bounds.confinement,
            cgroup: bounds.cgroup.as_deref(),
            oom_score_adj: bounds.oom_score_adj,
            limits: &bounds.limits,
            die_with_us: true,
            fds: &fds,
        };
        let started = match spawn::start(&program) {
            // Who lives there has divided its group, and the kernel lets nobody in any more.
            Err(Failure { stage: Stage::Cgroup, errno: libc::EBUSY }) => {
                program.cgroup = None;
                spawn::start(&program)
            }
            started => started,
        }
        .map_err(HelperError::Start)?;
        let ended = pidfd::open(started.pid).and_then(|fd| watch::descriptor(fd, Interest::READABLE));
        let mut helper = Self { pid: started.pid, report: started.report, output, ended: None };
        match ended {
            Ok(ended) => {
                helper.ended = Some(ended);
                Ok(helper)
            }
            Err(error) => {
                helper.kill();
                Err(error.into())
            }
        }
    }

    /// Waits for its end, and returns the first `keep` bytes of what it wrote.
    ///
    /// # Errors
    /// As waitid(2).
    pub async fn end(mut self, keep: usize) -> io::Result<(Ended, Vec<u8>)> {
        let mut words = Vec::new();
        let mut chunk = [0; 512];
        let mut open = true;
        loop {
            let Some(ended) = &self.ended else { return Err(io::ErrorKind::NotFound.into()) };
            tokio::select! {
                biased;
                count = self.output.read(&mut chunk), if open => match count {
                    Ok(0) | Err(_) => open = false,
                    Ok(count) => {
                        let room = keep.saturating_sub(words.len()).min(count);
                        words.extend_from_slice(&chunk[..room]);
                    }
                },
                ready = ended.readable() => {
                    drop(ready?);
                    break;
                }
            }
        }
        // What it left behind goes with it; while it is a zombie its group's number cannot be another's.
        self.kill();
        let status = child::exited(self.pid, Zombie::Reap)?;
        self.ended = None;
        // Its last words may have come with its end.
        while words.len() < keep && open {
            match self.output.try_read(&mut chunk) {
                Ok(count @ 1..) => {
                    let room = (keep - words.len()).min(count);
                    words.extend_from_slice(&chunk[..room]);
                }
                _ => break,
            }
        }
        let ended = match (self.report.outcome(), status) {
            (Outcome::Failed(failure), _) => Ended::NotStarted(failure),
            (_, Some(status)) => Ended::Exited(status),
            (_, None) => return Err(io::ErrorKind::WouldBlock.into()),
        };
        Ok((ended, words))
    }

    /// SIGKILL to the whole session's group.
    fn kill(&self) {
        // Before it leads a group of its own it has not run anything.
        let pid = Pid::from_raw(self.pid.cast_signed());
        if killpg(pid, Signal::SIGKILL).is_err() {
            let _ = nix::sys::signal::kill(pid, Signal::SIGKILL);
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let Some(ended) = self.ended.take() else { return };
        self.kill();
        let pid = self.pid;
        // It ends in its own time; nobody waits for it here.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                if ended.readable().await.is_ok() {
                    let _ = child::exited(pid, Zombie::Reap);
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn shell(line: &str) -> Question {
        let text = |text: &str| CString::new(text).unwrap();
        Question {
            program: text("/bin/sh"),
            args: ["sh", "-c", line].map(text).into(),
            env: vec![text("PATH=/usr/bin:/bin")],
            cwd: text("/"),
            bounds: Bounds::default(),
        }
    }

    fn on_runtime<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
    }

    #[test]
    fn answers_with_code_and_first_words() {
        on_runtime(async {
            let helper = Helper::start(&shell("echo one; echo two >&2; exit 3")).unwrap();
            let (ended, words) = helper.end(200).await.unwrap();
            let Ended::Exited(status) = ended else { panic!("{ended:?}") };
            assert_eq!((status.code(), String::from_utf8(words).unwrap().as_str()), (Some(3), "one\ntwo\n"));

            let helper = Helper::start(&shell("yes")).unwrap();
            let late = tokio::time::timeout(Duration::from_millis(100), helper.end(10)).await;
            assert!(late.is_err(), "a program that talks for ever is not waited for");

            let missing = Question { program: CString::new("/nonexistent").unwrap(), ..shell("") };
            let (ended, _) = Helper::start(&missing).unwrap().end(10).await.unwrap();
            assert!(
                matches!(ended, Ended::NotStarted(failure) if failure.errno == libc::ENOENT),
                "{ended:?}"
            );
        });
    }

    #[test]
    fn dropping_ends_the_whole_session() {
        on_runtime(async {
            let mut helper = Helper::start(&shell("sleep 1000 & echo $!; wait")).unwrap();
            let mut pid = [0; 32];
            let count = helper.output.read(&mut pid).await.unwrap();
            let pid: u32 = std::str::from_utf8(&pid[..count]).unwrap().trim().parse().unwrap();
            let grandchild = watch::descriptor(pidfd::open(pid).unwrap(), Interest::READABLE).unwrap();
            drop(helper);
            let gone = tokio::time::timeout(Duration::from_secs(20), grandchild.readable()).await;
            assert!(gone.is_ok(), "the sleep lives on");
        });
    }
}
