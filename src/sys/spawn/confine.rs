//! What a child is told about its place among others before exec: its order at the CPU and the disk, and its rights.
//!
//! All of it runs between fork and exec: bare system calls on memory that was laid out before.

use super::{Failure, Stage, check};

/// The words of the kernel's largest CPU set: 8,192 CPUs.
const CPU_WORDS: usize = 8192 / u64::BITS as usize;

/// CPUs in the kernel's form.
pub(super) type CpuSet = [u64; CPU_WORDS];

/// The order and the rights of a program; the default changes nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Confinement {
    /// nice(2), from -20 to 19.
    pub nice: Option<i32>,
    /// `ioprio_set(2)`: class and level.
    pub io_priority: Option<u16>,
    /// The CPUs that it may run on; empty: ours.
    pub cpus: Vec<u32>,
    /// PR_SET_NO_NEW_PRIVS.
    pub no_new_privs: bool,
    /// The capabilities that it has although it is not root, a bit each; as a change of user would take them away.
    pub ambient: u64,
}

impl Confinement {
    /// Changes nothing.
    pub const NONE: Self =
        Self { nice: None, io_priority: None, cpus: Vec::new(), no_new_privs: false, ambient: 0 };

    /// The CPUs in the kernel's form.
    pub(super) fn cpu_set(&self) -> Option<Box<CpuSet>> {
        if self.cpus.is_empty() {
            return None;
        }
        let mut set = Box::new([0; CPU_WORDS]);
        for &cpu in &self.cpus {
            if let Some(word) = usize::try_from(cpu / u64::BITS).ok().and_then(|index| set.get_mut(index)) {
                *word |= 1 << (cpu % u64::BITS);
            }
        }
        Some(set)
    }
}

/// The order at CPU and disk; before the user changes, who may perhaps not do this.
pub(super) fn schedule(to: &Confinement, cpus: Option<&CpuSet>) -> Result<(), Failure> {
    if let Some(nice) = to.nice {
        // SAFETY: three integers; 0 is this process.
        check(Stage::Scheduling, unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) })?;
    }
    if let Some(priority) = to.io_priority {
        const THIS_PROCESS: i32 = 1;
        // SAFETY: three integers; 0 is this process.
        let rc = unsafe { libc::syscall(libc::SYS_ioprio_set, THIS_PROCESS, 0, i32::from(priority)) };
        check(Stage::Scheduling, if rc < 0 { -1 } else { 0 })?;
    }
    if let Some(cpus) = cpus {
        // SAFETY: the kernel reads as many bytes as the set has.
        let rc = unsafe { libc::syscall(libc::SYS_sched_setaffinity, 0, size_of_val(cpus), cpus.as_ptr()) };
        check(Stage::Scheduling, if rc < 0 { -1 } else { 0 })?;
    }
    Ok(())
}

/// Keeps the permitted capabilities over a change of user; effective ones are dropped all the same.
pub(super) fn keep_capabilities(to: &Confinement) -> Result<(), Failure> {
    if to.ambient == 0 {
        return Ok(());
    }
    // SAFETY: integers only.
    check(Stage::Capabilities, unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0) }).map(drop)
}

/// `_LINUX_CAPABILITY_VERSION_3`: two words of 32 capabilities each.
const VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Word {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// The last rights: ambient capabilities, and none by exec. `new_user`: the user has changed, and what root had is not
/// to stay permitted.
pub(super) fn restrict(to: &Confinement, new_user: bool) -> Result<(), Failure> {
    if to.ambient != 0 {
        raise(to.ambient, new_user)?;
    }
    if to.no_new_privs {
        // SAFETY: integers only.
        check(Stage::Capabilities, unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
    }
    Ok(())
}

/// Takes every capability from the calling thread, for good.
///
/// # Errors
/// As capset(2).
pub(in crate::sys) fn drop_capabilities() -> nix::Result<()> {
    let header = Header { version: VERSION_3, pid: 0 };
    let none = [Word::default(); 2];
    // SAFETY: the kernel reads the two words that version 3 has.
    let rc = unsafe { libc::syscall(libc::SYS_capset, &raw const header, none.as_ptr()) };
    if rc < 0 { Err(nix::errno::Errno::last()) } else { Ok(()) }
}

fn raise(mask: u64, new_user: bool) -> Result<(), Failure> {
    let header = Header { version: VERSION_3, pid: 0 };
    let mut words = [Word::default(); 2];
    // SAFETY: the kernel fills the two words that version 3 has.
    let rc = unsafe { libc::syscall(libc::SYS_capget, &raw const header, words.as_mut_ptr()) };
    check(Stage::Capabilities, if rc < 0 { -1 } else { 0 })?;
    #[expect(clippy::cast_possible_truncation, reason = "the two halves of the mask")]
    for (word, wanted) in words.iter_mut().zip([mask as u32, (mask >> 32) as u32]) {
        if new_user {
            *word = Word { effective: wanted, permitted: wanted, inheritable: wanted };
        } else {
            word.inheritable |= wanted;
        }
    }
    // SAFETY: the kernel reads the two words.
    let rc = unsafe { libc::syscall(libc::SYS_capset, &raw const header, words.as_ptr()) };
    check(Stage::Capabilities, if rc < 0 { -1 } else { 0 })?;
    for number in (0..u64::BITS).filter(|number| mask >> number & 1 == 1) {
        let (ambient, raise) = (libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE);
        // SAFETY: integers only.
        check(Stage::Capabilities, unsafe { libc::prctl(ambient, raise, number, 0, 0) })?;
    }
    Ok(())
}
