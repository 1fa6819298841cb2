//! The memory of this process: how the allocator spreads it, and giving back what is free.

/// Blocks from this size on are mapped and unmapped one by one. The default grows with the largest block ever freed,
/// so that one list of a thousand apps would keep its megabytes for good.
#[cfg(target_env = "gnu")]
const MAPPED_FROM: libc::c_int = 256 * 1024;

/// Makes the allocator frugal: one arena for all threads, whose free memory goes back to the system. Call it before
/// there are threads. Does nothing where the allocator is not glibc's.
pub fn be_frugal() {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in
        [(libc::M_ARENA_MAX, 1), (libc::M_MMAP_THRESHOLD, MAPPED_FROM), (libc::M_TRIM_THRESHOLD, MAPPED_FROM)]
    {
        // SAFETY: mallopt(3) takes two numbers and only changes the allocator's parameters.
        let _ = unsafe { libc::mallopt(parameter, value) };
    }
}

/// Gives free memory inside the heap back to the system, not only at its end. Takes a millisecond for ten megabytes,
/// in which other threads wait that allocate.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim(3) touches only memory that nobody has.
    let _ = unsafe { libc::malloc_trim(0) };
}
