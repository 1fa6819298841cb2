//! Starting a program: fork, a clean process state, exec.
//!
//! Never waits for the program: whether exec succeeded is read later from [`Started::report`]. Between fork and exec
//! the child makes only these calls, all async-signal-safe, on memory that was laid out before the fork: sigaction,
//! setsid, open, fcntl, dup2, close_range, write, close, setpriority, ioprio_set, sched_setaffinity, setrlimit, umask,
//! setgroups, setresgid, setresuid, getresuid, getresgid, capget, capset, prctl, chdir, getpid, sigprocmask, execve or
//! execveat, _exit.

mod confine;

use std::ffi::{CStr, CString, c_char};
use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::pipe2;

pub use self::confine::Confinement;
use self::confine::CpuSet;
pub(super) use self::confine::drop_capabilities;
use super::limits::Limit;

/// Which executable to run.
#[derive(Clone, Copy, Debug)]
pub enum Target<'a> {
    /// The file at this path; relative ones start in the new working directory. PATH is not searched.
    Path(&'a CStr),
    /// An open executable (execveat with AT_EMPTY_PATH). Scripts need a path.
    File(BorrowedFd<'a>),
}

/// Who the program runs as.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Credentials {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Supplementary groups; they replace ours.
    pub groups: Vec<u32>,
}

/// A program and the state it starts in.
///
/// Always: a session of its own, every signal at its default and none blocked (SIG_IGN would survive exec),
/// no descriptor but the listed ones.
#[derive(Debug)]
pub struct Program<'a> {
    /// What to run.
    pub target: Target<'a>,
    /// The arguments, beginning with the program's name.
    pub args: &'a [&'a CStr],
    /// The environment, `KEY=value` each.
    pub env: &'a [&'a CStr],
    /// Append `LISTEN_PID=` with the program's own pid to the environment (sd_listen_fds(3)).
    pub listen_pid: bool,
    /// The working directory; ours when `None`.
    pub cwd: Option<&'a CStr>,
    /// Who it runs as; like us when `None`.
    pub credentials: Option<&'a Credentials>,
    /// The file mode creation mask; ours when `None`.
    pub umask: Option<u32>,
    /// The out-of-memory score adjustment; ours when `None`.
    pub oom_score_adj: Option<i32>,
    /// Resource limits to set, in this order.
    pub limits: &'a [Limit],
    /// Its order and its rights.
    pub confinement: &'a Confinement,
    /// The directory of the control group (v2) that it begins its life in; ours when `None`.
    pub cgroup: Option<&'a CStr>,
    /// It is killed when the thread that starts it ends (PR_SET_PDEATHSIG, prctl(2)).
    pub die_with_us: bool,
    /// The descriptors: the first becomes 0, the next 1, and so on. What is missing of 0–2 is /dev/null.
    pub fds: &'a [BorrowedFd<'a>],
}

/// How far a program got that did not start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// The request itself could not be carried out (too large, not readable).
    Request,
    /// A new process could not be made.
    Fork,
    /// setsid.
    Session,
    /// Placing its descriptors.
    Descriptors,
    /// Setting limits or the out-of-memory score.
    Limits,
    /// Changing user and groups.
    Credentials,
    /// Entering the working directory, as the user it runs as.
    Chdir,
    /// execve.
    Exec,
    /// nice, ionice, CPU affinity.
    Scheduling,
    /// Ambient capabilities, or no_new_privs.
    Capabilities,
    /// Beginning its life in a control group.
    Cgroup,
    /// One that this version does not know.
    Other(u8),
}

impl Stage {
    /// The number on the wire; never changes its meaning.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Request => 0,
            Self::Fork => 1,
            Self::Session => 2,
            Self::Descriptors => 3,
            Self::Limits => 4,
            Self::Credentials => 5,
            Self::Chdir => 6,
            Self::Exec => 7,
            Self::Scheduling => 8,
            Self::Capabilities => 9,
            Self::Cgroup => 10,
            Self::Other(code) => code,
        }
    }

    /// The stage with this number.
    #[must_use]
    pub const fn from_code(code: u8) -> Self {
        match code {
            0 => Self::Request,
            1 => Self::Fork,
            2 => Self::Session,
            3 => Self::Descriptors,
            4 => Self::Limits,
            5 => Self::Credentials,
            6 => Self::Chdir,
            7 => Self::Exec,
            8 => Self::Scheduling,
            9 => Self::Capabilities,
            10 => Self::Cgroup,
            other => Self::Other(other),
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Request => "request",
            Self::Fork => "fork",
            Self::Session => "session",
            Self::Descriptors => "descriptors",
            Self::Limits => "limits",
            Self::Credentials => "credentials",
            Self::Chdir => "chdir",
            Self::Exec => "exec",
            Self::Scheduling => "scheduling (nice, ionice, cpu_affinity)",
            Self::Capabilities => "capabilities",
            Self::Cgroup => "control group",
            Self::Other(_) => "unknown stage",
        })
    }
}

/// Why a program did not start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The step that failed.
    pub stage: Stage,
    /// Its errno.
    pub errno: i32,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.stage, io::Error::from_raw_os_error(self.errno))
    }
}

/// A process that was forked; whether its program runs is not known yet.
#[derive(Debug)]
pub struct Started {
    /// Its pid. It is our child: somebody has to wait for it.
    pub pid: u32,
    /// Where the outcome arrives.
    pub report: Report,
}

/// Tells how a start went. Readable once that is known.
#[derive(Debug)]
pub struct Report(OwnedFd);

/// How a start went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Not known yet.
    Open,
    /// The program was started, or its process was killed before.
    Running,
    /// It was not; its process has ended with exit code 127 or is about to.
    Failed(Failure),
}

impl Report {
    /// How the start went so far; never waits.
    #[must_use]
    pub fn outcome(&self) -> Outcome {
        let mut text = [0; REPORT_LEN];
        match nix::unistd::read(&self.0, &mut text) {
            Err(Errno::EAGAIN | Errno::EINTR) => Outcome::Open,
            // A report is written whole (pipe(7): up to PIPE_BUF bytes), so anything else is the end of stream: exec
            // has closed the writing end.
            Ok(REPORT_LEN) => {
                let [stage, errno @ ..] = text;
                Outcome::Failed(Failure { stage: Stage::from_code(stage), errno: i32::from_ne_bytes(errno) })
            }
            _ => Outcome::Running,
        }
    }

    /// Waits until the outcome is known.
    ///
    /// # Errors
    /// See read(2).
    pub fn wait(self) -> io::Result<Result<(), Failure>> {
        use super::poll::{Interest, wait};
        use std::os::fd::AsFd;
        loop {
            match self.outcome() {
                Outcome::Open => drop(wait(&[(self.0.as_fd(), Interest::Read)], None)?),
                Outcome::Running => return Ok(Ok(())),
                Outcome::Failed(failure) => return Ok(Err(failure)),
            }
        }
    }
}

impl std::os::fd::AsFd for Report {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Stage and errno.
const REPORT_LEN: usize = 5;

/// `LISTEN_PID=`, the digits of any pid, and the end of the string.
const LISTEN_PID: &[u8; 11] = b"LISTEN_PID=";
type ListenPid = [u8; 24];

/// Everything the child needs, laid out before the fork.
struct Plan<'a> {
    program: &'a Program<'a>,
    args: Vec<*const c_char>,
    env: Vec<*const c_char>,
    listen_pid: Box<ListenPid>,
    /// Where each descriptor is parked while the final places are filled.
    parked: Vec<RawFd>,
    oom_score_adj: Option<String>,
    cpus: Option<Box<CpuSet>>,
    /// Where to write that it joins its control group, when the kernel has not put it there.
    join: Option<CString>,
    report: RawFd,
}

/// Starts a program. Returns as soon as its process exists.
///
/// # Errors
/// A [`Failure`] in stage [`Stage::Fork`]; everything later is told by the report.
pub fn start(program: &Program<'_>) -> Result<Started, Failure> {
    let failed = |errno: Errno| Failure { stage: Stage::Fork, errno: errno as i32 };
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(failed)?;

    let mut listen_pid = Box::new([0; 24]);
    listen_pid[..LISTEN_PID.len()].copy_from_slice(LISTEN_PID);
    let mut args: Vec<_> = program.args.iter().map(|arg| arg.as_ptr()).collect();
    args.push(std::ptr::null());
    let mut env: Vec<_> = program.env.iter().map(|entry| entry.as_ptr()).collect();
    if program.listen_pid {
        env.push(listen_pid.as_ptr().cast());
    }
    env.push(std::ptr::null());
    let mut plan = Plan {
        program,
        args,
        env,
        listen_pid,
        parked: vec![-1; program.fds.len()],
        oom_score_adj: program.oom_score_adj.map(|value| value.to_string()),
        cpus: program.confinement.cpu_set(),
        join: None,
        report: writer.as_raw_fd(),
    };
    let group = match program.cgroup {
        Some(dir) => Some(open_group(dir)?),
        None => None,
    };
    let mut forked = fork(group.as_ref());
    if let (Err(Errno::ENOSYS | Errno::EPERM), Some(dir)) = (forked, program.cgroup) {
        // A sandbox may know no clone3, or forbid it: then the child joins by itself.
        plan.join = CString::new([dir.to_bytes(), b"/cgroup.procs"].concat()).ok();
        forked = fork(None);
    }
    match forked {
        Ok(0) => become_program(&mut plan),
        Ok(pid) => Ok(Started { pid, report: Report(reader) }),
        // ENOENT, EBADF: the group is gone, or is none. EBUSY: it has groups below it that are limited. EAGAIN may mean
        // pids.max of a group above.
        Err(errno @ (Errno::ENOENT | Errno::ENODEV | Errno::EBADF | Errno::EBUSY | Errno::EOPNOTSUPP)) => {
            Err(Failure { stage: Stage::Cgroup, errno: errno as i32 })
        }
        Err(errno) => Err(failed(errno)),
    }
}

fn open_group(dir: &CStr) -> Result<OwnedFd, Failure> {
    nix::fcntl::open(
        dir,
        OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        nix::sys::stat::Mode::empty(),
    )
    .map_err(|errno| Failure { stage: Stage::Cgroup, errno: errno as i32 })
}

/// A new process, in this control group from its first instant; 0 on the child's side. Moving it later would make every
/// start wait for a grace period of the kernel.
fn fork(group: Option<&OwnedFd>) -> Result<u32, Errno> {
    let pid = match group {
        // SAFETY: the child runs `become_program` only, which makes async-signal-safe calls on memory owned by the plan,
        // and ends in exec or _exit; so neither locks nor buffers copied from other threads are ever used.
        None => i64::from(unsafe { libc::fork() }),
        Some(group) => {
            let arguments = CloneArguments {
                flags: CLONE_INTO_CGROUP,
                exit_signal: libc::SIGCHLD.cast_unsigned().into(),
                cgroup: group.as_raw_fd().unsigned_abs().into(),
                ..CloneArguments::default()
            };
            let size = size_of::<CloneArguments>();
            // SAFETY: as above. Without CLONE_VM the child has a stack of its own, as after fork; the C library's
            // bookkeeping, which this does without, is not used by the child.
            unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size) }
        }
    };
    u32::try_from(pid).map_err(|_| Errno::last())
}

/// clone3(2), Linux 5.7.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// clone3(2)'s `struct clone_args`.
#[repr(C)]
#[derive(Default)]
struct CloneArguments {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// The child's way from fork to exec.
fn become_program(plan: &mut Plan<'_>) -> ! {
    let failure = match prepare(plan) {
        Ok(executable) => Failure { stage: Stage::Exec, errno: exec(plan, executable) },
        Err(failure) => failure,
    };
    let mut text = [failure.stage.code(); REPORT_LEN];
    text[1..].copy_from_slice(&failure.errno.to_ne_bytes());
    // SAFETY: `text` is valid for reading. The pipe is empty, so the write is whole; if it fails all the same, the
    // exit code tells the rest.
    unsafe { libc::write(plan.report, text.as_ptr().cast(), text.len()) };
    // SAFETY: ends the process without running handlers that belong to the parent.
    unsafe { libc::_exit(127) }
}

/// Returns the descriptor of the executable, if it is run from one.
fn prepare(plan: &mut Plan<'_>) -> Result<Option<RawFd>, Failure> {
    let program = plan.program;
    reset_signals();
    // SAFETY: no memory is involved; a freshly forked process leads no group, so this does not fail.
    check(Stage::Session, unsafe { libc::setsid() })?;
    let executable = place_descriptors(plan)?;
    if let Some(group) = &plan.join {
        write_file(Stage::Cgroup, group, b"0")?;
    }
    if let Some(value) = &plan.oom_score_adj {
        write_file(Stage::Limits, c"/proc/self/oom_score_adj", value.as_bytes())?;
    }
    confine::schedule(program.confinement, plan.cpus.as_deref())?;
    for limit in program.limits {
        let value = libc::rlimit { rlim_cur: limit.soft, rlim_max: limit.hard };
        // SAFETY: `value` is valid for reading.
        check(Stage::Limits, unsafe { libc::setrlimit(limit.resource as _, &raw const value) })?;
    }
    if let Some(mask) = program.umask {
        // SAFETY: no memory is involved; umask never fails.
        unsafe { libc::umask(mask) };
    }
    if let Some(credentials) = program.credentials {
        confine::keep_capabilities(program.confinement)?;
        change_user(credentials)?;
    }
    confine::restrict(program.confinement, program.credentials.is_some_and(|new| new.uid != 0))?;
    if program.die_with_us {
        // After the change of user, which takes it back. SAFETY: three integers.
        check(Stage::Session, unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) })?;
    }
    if let Some(cwd) = program.cwd {
        // SAFETY: `cwd` is a C string.
        check(Stage::Chdir, unsafe { libc::chdir(cwd.as_ptr()) })?;
    }
    fill_in_pid(&mut plan.listen_pid);
    unblock_signals();
    Ok(executable)
}

/// The kernel's own sigaction (handler, flags, restorer, mask: 32 bytes, or fewer), all zeroes: SIG_DFL.
static DEFAULT: [u64; 4] = [0; 4];

/// Every signal back to its default. The bare system call, because the C library refuses the two it uses itself (32
/// and 33), and parents that ignore those exist. SIGKILL and SIGSTOP refuse, and need no reset.
fn reset_signals() {
    for signal in 1..=64 {
        // SAFETY: `DEFAULT` is valid for reading, installs no code, and a null old action is allowed.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, DEFAULT.as_ptr(), 0, size_of::<u64>()) };
    }
}

/// The last step before exec: what arrived since the fork is delivered to the default dispositions now.
fn unblock_signals() {
    let mut none = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `none` is valid for writing.
    unsafe { libc::sigemptyset(none.as_mut_ptr()) };
    // SAFETY: sigemptyset has filled `none`; a null old set is allowed.
    unsafe { libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut()) };
}

/// Parks every source above the last target, then fills the targets: a target may be the number of another source.
fn place_descriptors(plan: &mut Plan<'_>) -> Result<Option<RawFd>, Failure> {
    let program = plan.program;
    let targets = RawFd::try_from(program.fds.len()).unwrap_or(RawFd::MAX).max(3);
    plan.report = park(plan.report, targets)?;
    let executable = match program.target {
        Target::File(file) => Some(park(file.as_raw_fd(), targets)?),
        Target::Path(_) => None,
    };
    for (place, fd) in plan.parked.iter_mut().zip(program.fds) {
        *place = park(fd.as_raw_fd(), targets)?;
    }
    let mut target = 0;
    for &parked in &plan.parked {
        // SAFETY: no memory is involved; dup2 clears CLOEXEC on the target.
        check(Stage::Descriptors, unsafe { libc::dup2(parked, target) })?;
        target += 1;
    }
    while target < 3 {
        // SAFETY: a C string constant.
        let null = unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
        check(Stage::Descriptors, null)?;
        let null = park(null, targets)?;
        // SAFETY: as above.
        check(Stage::Descriptors, unsafe { libc::dup2(null, target) })?;
        target += 1;
    }
    // A second line of defence: everything this program opens is CLOEXEC already, so a kernel without this flag
    // (before 5.11) loses nothing.
    // SAFETY: integers only; CLOSE_RANGE_CLOEXEC closes nothing.
    unsafe { libc::syscall(libc::SYS_close_range, targets, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    Ok(executable)
}

fn park(fd: RawFd, above: RawFd) -> Result<RawFd, Failure> {
    // SAFETY: no memory is involved.
    check(Stage::Descriptors, unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, above) })
}

fn write_file(stage: Stage, path: &CStr, value: &[u8]) -> Result<(), Failure> {
    // SAFETY: a C string.
    let fd = check(stage, unsafe { libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC) })?;
    // SAFETY: `value` is valid for reading.
    let written = unsafe { libc::write(fd, value.as_ptr().cast(), value.len()) };
    let outcome = check(stage, if written < 0 { -1 } else { 0 });
    // SAFETY: opened above and used by nobody else.
    unsafe { libc::close(fd) };
    outcome.map(drop)
}

/// Groups before group before user: afterwards the right to change them is gone. The bare system calls, because the C
/// library's wrappers would signal threads that do not exist on this side of the fork.
///
/// The number -1 means "no change" to the kernel: with it the program would run as root. So it is refused, and who we are
/// is looked at afterwards.
fn change_user(to: &Credentials) -> Result<(), Failure> {
    if to.uid == u32::MAX || to.gid == u32::MAX {
        return Err(Failure { stage: Stage::Credentials, errno: libc::EINVAL });
    }
    // SAFETY: the kernel reads `len` group ids of 32 bits each.
    let rc = unsafe { libc::syscall(libc::SYS_setgroups, to.groups.len(), to.groups.as_ptr()) };
    check(Stage::Credentials, if rc < 0 { -1 } else { 0 })?;
    // SAFETY: integers only.
    let rc = unsafe { libc::syscall(libc::SYS_setresgid, to.gid, to.gid, to.gid) };
    check(Stage::Credentials, if rc < 0 { -1 } else { 0 })?;
    // SAFETY: integers only.
    let rc = unsafe { libc::syscall(libc::SYS_setresuid, to.uid, to.uid, to.uid) };
    check(Stage::Credentials, if rc < 0 { -1 } else { 0 })?;
    if three_ids(libc::SYS_getresuid)? == [to.uid; 3] && three_ids(libc::SYS_getresgid)? == [to.gid; 3] {
        Ok(())
    } else {
        Err(Failure { stage: Stage::Credentials, errno: libc::EPERM })
    }
}

/// Real, effective and saved.
fn three_ids(call: i64) -> Result<[u32; 3], Failure> {
    let mut ids = [0; 3];
    let [real, effective, saved] = ids.each_mut().map(std::ptr::from_mut::<u32>);
    // SAFETY: getresuid and getresgid write three numbers of 32 bits.
    let rc = unsafe { libc::syscall(call, real, effective, saved) };
    check(Stage::Credentials, if rc < 0 { -1 } else { 0 })?;
    Ok(ids)
}

/// Writes our pid in decimal behind `LISTEN_PID=`; the zeroes behind it end the string.
fn fill_in_pid(text: &mut ListenPid) {
    // SAFETY: no memory is involved; getpid never fails.
    let mut rest = unsafe { libc::getpid() }.unsigned_abs();
    let mut digits = [0; 10];
    let mut count = 0;
    for digit in &mut digits {
        *digit = b'0' + u8::try_from(rest % 10).unwrap_or(0);
        rest /= 10;
        count += 1;
        if rest == 0 {
            break;
        }
    }
    let places = text[LISTEN_PID.len()..].iter_mut();
    for (place, digit) in places.zip(digits[..count].iter().rev()) {
        *place = *digit;
    }
}

/// Returns only when it fails, with the errno.
fn exec(plan: &Plan<'_>, executable: Option<RawFd>) -> i32 {
    let (args, env) = (plan.args.as_ptr(), plan.env.as_ptr());
    match (plan.program.target, executable) {
        (Target::Path(path), _) => {
            // SAFETY: C strings, and arrays of C strings that end in null, all borrowed by the plan.
            unsafe { libc::execve(path.as_ptr(), args, env) };
        }
        (Target::File(file), parked) => {
            let fd = parked.unwrap_or(file.as_raw_fd());
            // SAFETY: as above.
            unsafe { libc::syscall(libc::SYS_execveat, fd, c"".as_ptr(), args, env, libc::AT_EMPTY_PATH) };
        }
    }
    Errno::last_raw()
}

fn check(stage: Stage, rc: i32) -> Result<i32, Failure> {
    if rc < 0 { Err(Failure { stage, errno: Errno::last_raw() }) } else { Ok(rc) }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::AsFd;

    use super::*;
    use crate::sys::child::{WaitStatus, Zombie, exited};

    fn run(change: impl FnOnce(&mut Program<'_>)) -> Result<(String, WaitStatus), Failure> {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let null = File::open("/dev/null").unwrap();
        let fds = [null.as_fd(), writer.as_fd(), writer.as_fd()];
        let script = c"echo $LISTEN_PID/$$; ls /proc/self/fd | tr '\\n' ' '";
        let mut program = Program {
            target: Target::Path(c"/bin/sh"),
            args: &[c"sh", c"-c", script],
            env: &[c"PATH=/usr/bin:/bin"],
            listen_pid: false,
            cwd: None,
            credentials: None,
            umask: None,
            confinement: &Confinement::NONE,
            cgroup: None,
            oom_score_adj: None,
            die_with_us: false,
            limits: &[],
            fds: &fds,
        };
        change(&mut program);
        let started = start(&program)?;
        drop(writer);
        let outcome = started.report.wait().unwrap();
        let mut text = String::new();
        File::from(reader).read_to_string(&mut text).unwrap();
        let deadline = crate::sys::clock::now() + std::time::Duration::from_secs(10);
        let status = loop {
            if let Some(status) = exited(started.pid, Zombie::Reap).unwrap() {
                break status;
            }
            assert!(crate::sys::clock::now() < deadline, "the child does not end");
            std::thread::yield_now();
        };
        outcome.map(|()| (text, status))
    }

    #[test]
    fn runs_with_its_own_pid_and_the_listed_descriptors_only() {
        let _leak = nix::unistd::dup(io::stderr()).unwrap();
        let (text, status) = run(|program| program.listen_pid = true).unwrap();
        let (pids, fds) = text.split_once('\n').unwrap();
        let (listen_pid, own) = pids.split_once('/').unwrap();
        assert_eq!(listen_pid, own);
        // The fourth is the directory that ls reads.
        assert_eq!(fds.trim(), "0 1 2 3");
        assert_eq!(status.code(), Some(0));
    }

    #[test]
    fn failures_name_their_stage() {
        type Change = fn(&mut Program<'_>);
        let cases: [(Change, Stage, i32); 5] = [
            (|p| p.target = Target::Path(c"/no/such/program"), Stage::Exec, libc::ENOENT),
            (|p| p.target = Target::Path(c"/etc/passwd"), Stage::Exec, libc::EACCES),
            (|p| p.cwd = Some(c"/no/such/dir"), Stage::Chdir, libc::ENOENT),
            (|p| p.limits = &[Limit { resource: 999, soft: 1, hard: 1 }], Stage::Limits, libc::EINVAL),
            (|p| p.oom_score_adj = Some(5000), Stage::Limits, libc::EINVAL),
        ];
        for (change, stage, errno) in cases {
            assert_eq!(run(change).unwrap_err(), Failure { stage, errno });
        }
    }

    #[test]
    fn the_number_that_means_no_change_to_the_kernel_does_not_run_as_root() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        for (uid, gid) in [(u32::MAX, 7), (7, u32::MAX)] {
            let credentials = Box::leak(Box::new(Credentials { uid, gid, groups: vec![7] }));
            let failure = run(|program| program.credentials = Some(credentials)).unwrap_err();
            assert_eq!(failure, Failure { stage: Stage::Credentials, errno: libc::EINVAL }, "{uid} {gid}");
        }
        let new = Credentials { uid: 54_321, gid: 54_322, groups: vec![54_323] };
        let new = Box::leak(Box::new(new));
        let (text, _) = run(|program| {
            program.args = &[c"sh", c"-c", c"id -u; id -g; id -G"];
            program.credentials = Some(new);
        })
        .unwrap();
        assert_eq!(text.split_whitespace().collect::<Vec<_>>(), ["54321", "54322", "54322", "54323"]);
    }

    #[test]
    fn stages_keep_their_numbers() {
        for code in 0..=u8::MAX {
            assert_eq!(Stage::from_code(code).code(), code);
        }
    }
}
