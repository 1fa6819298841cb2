//! Processes that an earlier daemon left behind when it and its supervisor were killed together: nobody is their
//! parent any more, but the token in their environment tells whose they are.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use super::procfs::{self, ProcessId, Procfs};
use super::tree::TOKEN_VARIABLE;
use super::tree::pidfd::{Pidfd, signal_process};
use super::{clock, poll};

/// An orphan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Orphan {
    /// Which process.
    pub process: ProcessId,
    /// The value of `PM_INSTANCE` it was started with.
    pub token: String,
}

/// Scans that may find something new after SIGKILL: a process that forks faster than we look is not waited for.
const SCANS_MAX: u32 = 20;

/// Finds living processes whose token is wanted. Never finds this process or one that it descends from, nor one of another
/// pid namespace: homes of the same name in several containers are different homes, and nothing that a daemon left
/// behind can have moved to another namespace.
///
/// # Errors
/// /proc cannot be read.
pub fn find(wanted: &dyn Fn(&str) -> bool) -> io::Result<Vec<Orphan>> {
    let mut procfs = Procfs::new();
    let ours = ancestors(&mut procfs)?;
    let own_namespace = pid_namespace("self");
    let mut pids = Vec::new();
    procfs::all_pids(&mut pids)?;
    let mut found = Vec::new();
    for pid in pids {
        if ours.contains(&pid) {
            continue;
        }
        // A process that ends while we look, or that is not ours to look at, is none of them.
        let Ok(Some(token)) = procfs.environ(pid, TOKEN_VARIABLE) else { continue };
        if !wanted(&token) || pid_namespace(&pid.to_string()) != own_namespace {
            continue;
        }
        if let Ok(Some(stat)) = procfs.stat(pid)
            && stat.alive()
        {
            found.push(Orphan { process: stat.process, token });
        }
    }
    Ok(found)
}

/// Which pid namespace a process is in; `None` where the kernel has none, or it is not ours to look at.
fn pid_namespace(pid: &str) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/ns/pid")).ok()
}

fn ancestors(procfs: &mut Procfs) -> io::Result<Vec<i32>> {
    let mut chain = Vec::new();
    let mut pid = std::process::id().cast_signed();
    while pid > 0 && !chain.contains(&pid) {
        chain.push(pid);
        pid = procfs.stat(pid)?.map_or(0, |stat| stat.ppid);
    }
    Ok(chain)
}

/// Ends all processes whose token is wanted: the signal that `signal` names, then `grace`, then SIGKILL until a scan
/// finds nothing. Blocks. Returns those that were found first.
///
/// # Errors
/// /proc cannot be read.
pub fn end(
    wanted: &dyn Fn(&str) -> bool,
    signal: &dyn Fn(&str) -> i32,
    grace: Duration,
) -> io::Result<Vec<Orphan>> {
    let first = find(wanted)?;
    if first.is_empty() {
        return Ok(first);
    }
    let mut procfs = Procfs::new();
    for orphan in &first {
        // One that is gone, or that another user runs, shows in the next scan or not at all.
        let _ = signal_process(&mut procfs, orphan.process, &[signal(&orphan.token), libc::SIGCONT]);
    }
    await_end(&mut procfs, &first, grace)?;
    for _ in 0..SCANS_MAX {
        let left = find(wanted)?;
        if left.is_empty() {
            break;
        }
        for orphan in &left {
            let _ = signal_process(&mut procfs, orphan.process, &[libc::SIGKILL]);
        }
        await_end(&mut procfs, &left, Duration::from_millis(200))?;
    }
    Ok(first)
}

fn await_end(procfs: &mut Procfs, orphans: &[Orphan], within: Duration) -> io::Result<()> {
    let deadline = clock::now() + within;
    for orphan in orphans {
        let Some(pidfd) = Pidfd::open(procfs, orphan.process)? else { continue };
        let left = deadline.since(clock::now());
        poll::wait(&[(pidfd.as_fd(), poll::Interest::Read)], Some(left))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use super::*;

    fn marked(token: &str, script: &str) -> Child {
        Command::new("sh")
            .args(["-c", script])
            .env(TOKEN_VARIABLE, token)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    }

    #[test]
    fn only_those_with_the_token_end_and_the_deaf_ones_too() {
        let mark = format!("orphans-test-{}", std::process::id());
        let token = |index: u32| format!("{mark}:{index}");
        let mut obedient = marked(&token(1), "exec sleep 1000");
        let mut deaf = marked(&token(2), "trap '' TERM; echo; while :; do sleep 0.01; done");
        let mut other = marked("orphans-test-other", "exec sleep 1000");
        // Its first word says that the trap is set.
        let mut word = [0];
        io::Read::read_exact(deaf.stdout.as_mut().unwrap(), &mut word).unwrap();
        let wanted = |token: &str| token.starts_with(&mark);
        let deadline = clock::now() + Duration::from_secs(5);
        while find(&wanted).unwrap().iter().filter(|orphan| orphan.token.ends_with('1')).count() == 0 {
            assert!(clock::now() < deadline, "the environment shows after exec");
        }
        let found = end(&wanted, &|_| libc::SIGTERM, Duration::from_millis(100)).unwrap();
        let pid = |child: &Child| child.id().cast_signed();
        let pids: Vec<i32> = found.iter().map(|orphan| orphan.process.pid).collect();
        assert!(pids.contains(&pid(&obedient)) && pids.contains(&pid(&deaf)), "{pids:?}");
        assert!(!pids.contains(&pid(&other)));
        use std::os::unix::process::ExitStatusExt as _;
        assert_eq!(obedient.wait().unwrap().signal(), Some(libc::SIGTERM));
        assert_eq!(deaf.wait().unwrap().signal(), Some(libc::SIGKILL));
        assert!(other.try_wait().unwrap().is_none());
        other.kill().unwrap();
        other.wait().unwrap();
    }
}
