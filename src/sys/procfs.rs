//! Reads what we need of /proc (proc(5)) and nothing more.
//!
//! A process may vanish between any two reads, so every function answers `Ok(None)` for "no such process" and keeps
//! errors for what is really wrong (no descriptors left, no permission): a caller that wants to know whether
//! something is gone must never mistake one for the other. Nothing here caches, waits or sends signals.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use nix::unistd::{SysconfVar, sysconf};

/// A process, told apart from a later one with the same pid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProcessId {
    /// The process id.
    pub pid: i32,
    /// When it was started, in clock ticks since boot: field 22 of /proc/PID/stat.
    pub start_ticks: u64,
}

/// The kernel's name of a process: the file name of what it executes, or what it called itself, cut to 15 bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Comm {
    bytes: [u8; 16],
    len: u8,
}

impl Comm {
    fn new(text: &[u8]) -> Self {
        let mut bytes = [0; 16];
        let len = text.len().min(bytes.len());
        bytes[..len].copy_from_slice(&text[..len]);
        #[expect(clippy::cast_possible_truncation, reason = "at most 16")]
        Self { bytes, len: len as u8 }
    }

    /// The name as bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

impl std::fmt::Display for Comm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&String::from_utf8_lossy(self.as_bytes()))
    }
}

impl std::fmt::Debug for Comm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", String::from_utf8_lossy(self.as_bytes()))
    }
}

/// /proc/PID/stat. Times are in clock ticks ([`ticks_per_second`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    /// Which process.
    pub process: ProcessId,
    /// Its name.
    pub comm: Comm,
    /// `R`, `S`, `D`, `Z`, `T`, `X`, …
    pub state: u8,
    /// Its parent.
    pub ppid: i32,
    /// Its process group.
    pub pgrp: i32,
    /// Its session.
    pub session: i32,
    /// CPU time in user mode.
    pub utime: u64,
    /// CPU time in the kernel.
    pub stime: u64,
    /// User time of children it has waited for, and of theirs.
    pub cutime: u64,
    /// Kernel time of children it has waited for, and of theirs.
    pub cstime: u64,
    /// How many threads it has; 1 for a zombie.
    pub threads: u32,
    /// Address space in bytes; 0 once it has begun to exit, and for kernel threads.
    pub vsize: u64,
    /// Resident memory in pages.
    pub rss_pages: u64,
    /// The wait status of a zombie; 0 while it runs, or when we may not see it.
    pub exit_status: i32,
}

impl Stat {
    /// Parses the line. `None` when it is no such line.
    #[must_use]
    pub fn parse(line: &[u8]) -> Option<Self> {
        // The name may hold spaces and parentheses, so it ends at the last one.
        let open = line.iter().position(|&b| b == b'(')?;
        let close = line.iter().rposition(|&b| b == b')')?;
        let pid = number(line.get(..open)?.trim_ascii())?;
        let comm = Comm::new(line.get(open + 1..close)?);
        let mut fields = line.get(close + 1..)?.split(u8::is_ascii_whitespace).filter(|f| !f.is_empty());
        let state = *fields.next()?.first()?;
        let mut field = |skip: usize| number::<i64>(fields.nth(skip)?);
        let (ppid, pgrp, session) = (field(0)?, field(0)?, field(0)?);
        let (utime, stime, cutime, cstime) = (field(7)?, field(0)?, field(0)?, field(0)?);
        let (threads, start_ticks) = (field(2)?, field(1)?);
        let (vsize, rss) = (field(0)?, field(0)?);
        let exit_status = field(27).unwrap_or(0);
        let ticks = |value: i64| u64::try_from(value).unwrap_or(0);
        Some(Self {
            process: ProcessId { pid, start_ticks: ticks(start_ticks) },
            comm,
            state,
            ppid: i32::try_from(ppid).ok()?,
            pgrp: i32::try_from(pgrp).ok()?,
            session: i32::try_from(session).ok()?,
            utime: ticks(utime),
            stime: ticks(stime),
            cutime: ticks(cutime),
            cstime: ticks(cstime),
            threads: u32::try_from(threads).unwrap_or(0),
            vsize: ticks(vsize),
            rss_pages: ticks(rss),
            exit_status: i32::try_from(exit_status).unwrap_or(0),
        })
    }

    /// Whether it can still run code. A zombie cannot, unless only its first thread has ended.
    #[must_use]
    pub const fn alive(&self) -> bool {
        !matches!(self.state, b'Z' | b'X') || self.threads > 1
    }

    /// Its own CPU time in ticks.
    #[must_use]
    pub const fn own_ticks(&self) -> u64 {
        self.utime + self.stime
    }

    /// The CPU time, in ticks, of children it has waited for.
    #[must_use]
    pub const fn reaped_ticks(&self) -> u64 {
        self.cutime + self.cstime
    }
}

/// /proc/PID/statm, in pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Statm {
    /// Everything resident.
    pub resident: u64,
    /// Of that, what comes from files or shared memory.
    pub shared: u64,
}

/// /proc/PID/smaps_rollup, in bytes. Reading it costs about 10 µs per MB and holds the process's mmap lock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rollup {
    /// Resident.
    pub rss: u64,
    /// Resident, each page divided by the number of processes that map it.
    pub pss: u64,
    /// Resident in this process only: what its end would free.
    pub uss: u64,
    /// Resident and backed by no file.
    pub anonymous: u64,
}

/// A reader with buffers that are used again. One per thread.
#[derive(Debug)]
pub struct Procfs {
    buffer: Vec<u8>,
    path: String,
    children_files: bool,
}

impl Default for Procfs {
    fn default() -> Self {
        Self::new()
    }
}

impl Procfs {
    /// Looks whether the kernel has `children` files (CONFIG_PROC_CHILDREN).
    #[must_use]
    pub fn new() -> Self {
        let children_files = File::open(format!("/proc/self/task/{}/children", std::process::id())).is_ok();
        Self { buffer: vec![0; 8192], path: String::with_capacity(64), children_files }
    }

    /// A reader that does as if the kernel had no `children` files.
    #[must_use]
    pub fn without_children_files() -> Self {
        Self { children_files: false, ..Self::new() }
    }

    /// Whether [`Procfs::children`] works; otherwise only a scan of all processes tells who is whose child.
    #[must_use]
    pub const fn has_children_files(&self) -> bool {
        self.children_files
    }

    /// /proc/PID/stat.
    ///
    /// # Errors
    /// Anything but "no such process".
    pub fn stat(&mut self, pid: i32) -> io::Result<Option<Stat>> {
        Ok(self.read_line(pid, "stat")?.and_then(Stat::parse))
    }

    /// /proc/PID/statm.
    ///
    /// # Errors
    /// Anything but "no such process".
    pub fn statm(&mut self, pid: i32) -> io::Result<Option<Statm>> {
        let Some(text) = self.read_line(pid, "statm")? else { return Ok(None) };
        let mut fields = text.split(u8::is_ascii_whitespace).skip(1).map(number);
        Ok(match (fields.next().flatten(), fields.next().flatten()) {
            (Some(resident), Some(shared)) => Some(Statm { resident, shared }),
            _ => None,
        })
    }

    /// /proc/PID/smaps_rollup.
    ///
    /// # Errors
    /// Anything but "no such process"; EACCES for the process of another user.
    pub fn smaps_rollup(&mut self, pid: i32) -> io::Result<Option<Rollup>> {
        let Some(text) = self.read(pid, "smaps_rollup")? else { return Ok(None) };
        let mut rollup = Rollup::default();
        for line in text.split(|&b| b == b'\n') {
            let mut words = line.split(u8::is_ascii_whitespace).filter(|w| !w.is_empty());
            let (Some(key), Some(kib)) = (words.next(), words.next().and_then(number::<u64>)) else {
                continue;
            };
            match key {
                b"Rss:" => rollup.rss = kib * 1024,
                b"Pss:" => rollup.pss = kib * 1024,
                b"Private_Clean:" | b"Private_Dirty:" => rollup.uss += kib * 1024,
                b"Anonymous:" => rollup.anonymous = kib * 1024,
                _ => {}
            }
        }
        Ok(Some(rollup))
    }

    /// The arguments of a process, as it shows them; empty for a zombie or a kernel thread. A process may overwrite
    /// them with a title, which then is the only argument (`npm start`).
    ///
    /// # Errors
    /// Anything but "no such process".
    pub fn cmdline(&mut self, pid: i32) -> io::Result<Option<Vec<String>>> {
        let Some(text) = self.read(pid, "cmdline")? else { return Ok(None) };
        // A title leaves the rest of the old arguments as zeros.
        let end = text.iter().rposition(|&b| b != 0).map_or(0, |last| last + 1);
        if end == 0 {
            return Ok(Some(Vec::new()));
        }
        Ok(Some(text[..end].split(|&b| b == 0).map(|a| String::from_utf8_lossy(a).into_owned()).collect()))
    }

    /// The value of a variable in the environment a process was started with. `None` also when we may not look.
    ///
    /// # Errors
    /// Anything but "no such process" and "not allowed".
    pub fn environ(&mut self, pid: i32, name: &str) -> io::Result<Option<String>> {
        let text = match self.read(pid, "environ") {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Ok(None),
            other => other?,
        };
        Ok(text.and_then(|text| {
            text.split(|&b| b == 0)
                .find_map(|entry| entry.strip_prefix(name.as_bytes())?.strip_prefix(b"="))
                .map(|value| String::from_utf8_lossy(value).into_owned())
        }))
    }

    /// The file name of what a process executes: for a script that of its interpreter. `None` also when we may not
    /// look, or for a kernel thread.
    #[must_use]
    pub fn program(&mut self, pid: i32) -> Option<String> {
        self.set_path(pid, "exe");
        let path = fs::read_link(&self.path).ok()?;
        let name = path.file_name()?.to_string_lossy();
        // A package that was replaced under a running process.
        Some(name.strip_suffix(" (deleted)").unwrap_or(&name).to_owned())
    }

    /// Whether a process catches a signal: the SigCgt mask of /proc/PID/status. `None` when it is gone.
    ///
    /// # Errors
    /// Anything but "no such process".
    pub fn catches(&mut self, pid: i32, signal: i32) -> io::Result<Option<bool>> {
        let Some(text) = self.read(pid, "status")? else { return Ok(None) };
        let mask = text
            .split(|&b| b == b'\n')
            .find_map(|line| line.strip_prefix(b"SigCgt:"))
            .and_then(|hex| u64::from_str_radix(std::str::from_utf8(hex.trim_ascii()).ok()?, 16).ok());
        Ok(mask.map(|mask| (1..=64).contains(&signal) && mask >> (signal - 1) & 1 == 1))
    }

    /// Appends the children of a process, zombies included. The kernel lists them by the thread that started them,
    /// so `threads` (from its stat) tells whether one file is enough.
    ///
    /// The kernel may leave some out while others exit during the read; a caller that needs certainty reads twice.
    ///
    /// # Errors
    /// Anything but "no such process".
    pub fn children(&mut self, pid: i32, threads: u32, out: &mut Vec<i32>) -> io::Result<()> {
        if threads <= 1 {
            return self.children_of_thread(pid, pid, out);
        }
        self.set_path(pid, "task");
        let entries = match fs::read_dir(&self.path) {
            Err(error) if gone(&error) => return Ok(()),
            other => other?,
        };
        for entry in entries {
            let entry = match entry {
                // The process ended under the listing; its children have another parent by now.
                Err(error) if gone(&error) => return Ok(()),
                other => other?,
            };
            let Some(thread) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            self.children_of_thread(pid, thread, out)?;
        }
        Ok(())
    }

    fn children_of_thread(&mut self, pid: i32, thread: i32, out: &mut Vec<i32>) -> io::Result<()> {
        self.path.clear();
        let _ = write!(self.path, "/proc/{pid}/task/{thread}/children");
        if let Some(text) = self.read_path()? {
            out.extend(
                text.split(u8::is_ascii_whitespace).filter(|w| !w.is_empty()).filter_map(number::<i32>),
            );
        }
        Ok(())
    }

    fn set_path(&mut self, pid: i32, file: &str) {
        self.path.clear();
        let _ = write!(self.path, "/proc/{pid}/{file}");
    }

    fn read(&mut self, pid: i32, file: &str) -> io::Result<Option<&[u8]>> {
        self.set_path(pid, file);
        self.read_path()
    }

    /// A file that is one short line: the kernel gives it whole in the first read, and most of the cost is in calls.
    fn read_line(&mut self, pid: i32, file: &str) -> io::Result<Option<&[u8]>> {
        self.set_path(pid, file);
        let mut file = match File::open(&self.path) {
            Err(error) if gone(&error) => return Ok(None),
            other => other?,
        };
        loop {
            return match file.read(&mut self.buffer) {
                Ok(len) => Ok(Some(&self.buffer[..len])),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if gone(&error) => Ok(None),
                Err(error) => Err(error),
            };
        }
    }

    fn read_path(&mut self) -> io::Result<Option<&[u8]>> {
        let mut file = match File::open(&self.path) {
            Err(error) if gone(&error) => return Ok(None),
            other => other?,
        };
        match read_all(&mut file, &mut self.buffer) {
            Err(error) if gone(&error) => Ok(None),
            other => other.map(|len| Some(&self.buffer[..len])),
        }
    }
}

fn read_all(file: &mut File, buffer: &mut Vec<u8>) -> io::Result<usize> {
    let mut len = 0;
    loop {
        if len == buffer.len() {
            buffer.resize(buffer.len() * 2, 0);
        }
        match file.read(&mut buffer[len..]) {
            Ok(0) => return Ok(len),
            Ok(count) => len += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Whether an error means that the process is no more: open says ENOENT, a read after it ESRCH.
fn gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(nix::libc::ENOENT | nix::libc::ESRCH))
}

fn number<T: std::str::FromStr>(digits: &[u8]) -> Option<T> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// All process ids on the machine, ascending.
///
/// # Errors
/// /proc cannot be read.
pub fn all_pids(out: &mut Vec<i32>) -> io::Result<()> {
    out.clear();
    for entry in fs::read_dir("/proc")? {
        if let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) {
            out.push(pid);
        }
    }
    Ok(())
}

/// Clock ticks per second, the unit of the times in [`Stat`]; 100 on every Linux of today.
#[must_use]
pub fn ticks_per_second() -> u64 {
    sysconf(SysconfVar::CLK_TCK)
        .ok()
        .flatten()
        .and_then(|v| u64::try_from(v).ok())
        .filter(|&v| v > 0)
        .unwrap_or(100)
}

/// Bytes per page.
#[must_use]
pub fn page_size() -> u64 {
    sysconf(SysconfVar::PAGE_SIZE).ok().flatten().and_then(|v| u64::try_from(v).ok()).unwrap_or(4096)
}

/// Time since boot including suspend (CLOCK_BOOTTIME): the clock of [`ProcessId::start_ticks`].
#[must_use]
pub fn since_boot() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_parentheses_and_spaces_do_not_shift_the_fields() {
        let line = b"42 (a ) b (c) S 7 8 9 0 -1 4194560 1 2 3 4 11 12 13 14 20 0 3 0 855 5124096 941 \
            18446744073709551615 1 1 1 0 0 0 65536 4 1 1 0 0 17 1 0 0 0 0 0 9 9 9 9 9 9 9 1792\n";
        let stat = Stat::parse(line).unwrap();
        assert_eq!(stat.process, ProcessId { pid: 42, start_ticks: 855 });
        assert_eq!(stat.comm.to_string(), "a ) b (c");
        assert_eq!((stat.ppid, stat.pgrp, stat.session), (7, 8, 9));
        assert_eq!((stat.own_ticks(), stat.reaped_ticks()), (23, 27));
        assert_eq!((stat.threads, stat.rss_pages, stat.exit_status), (3, 941, 1792));
        assert!(stat.alive());
    }

    #[test]
    fn half_a_line_is_no_line() {
        for line in [&b""[..], b"42", b"42 (x", b"42 (x) S 1 2", b")("] {
            assert_eq!(Stat::parse(line), None);
        }
    }

    #[test]
    fn our_own_process_is_there_and_another_is_not() {
        let mut procfs = Procfs::new();
        let me = i32::try_from(std::process::id()).unwrap();
        let stat = procfs.stat(me).unwrap().unwrap();
        assert!(stat.alive());
        assert_eq!(stat.process.pid, me);
        assert!(!procfs.cmdline(me).unwrap().unwrap().is_empty());
        assert!(procfs.statm(me).unwrap().unwrap().resident > 0);
        let rollup = procfs.smaps_rollup(me).unwrap().unwrap();
        assert!(rollup.rss >= rollup.pss && rollup.pss >= rollup.uss && rollup.uss > 0, "{rollup:?}");
        assert_eq!(procfs.environ(me, "PATH").unwrap(), std::env::var("PATH").ok());
        // Above the largest pid_max (2^22).
        assert_eq!(procfs.stat(5_000_000).unwrap(), None);
        assert_eq!(procfs.environ(5_000_000, "PATH").unwrap(), None);
        let mut pids = Vec::new();
        all_pids(&mut pids).unwrap();
        assert!(pids.contains(&me));
    }

    #[test]
    fn children_of_any_thread_are_found() {
        let (child_tx, child_rx) = std::sync::mpsc::channel();
        let (end_tx, end_rx) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
            child_tx.send(i32::try_from(child.id()).unwrap()).unwrap();
            let _ = end_rx.recv();
            child.kill().unwrap();
            child.wait().unwrap();
        });
        let child = child_rx.recv().unwrap();
        let mut procfs = Procfs::new();
        let me = i32::try_from(std::process::id()).unwrap();
        let mut children = Vec::new();
        procfs.children(me, 2, &mut children).unwrap();
        assert!(!procfs.has_children_files() || children.contains(&child), "{children:?}");
        drop(end_tx);
        thread.join().unwrap();
    }
}
