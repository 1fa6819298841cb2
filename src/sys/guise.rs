//! Doing as root what a user may do, with that user's rights: making and removing files where that user chose the path.
//!
//! Whoever may write in a directory of a path can lead root anywhere, in the instant between two calls too: no check of
//! ours is as good as the kernel's. So it is the kernel that refuses. The user id for files (setfsuid(2)) belongs to a
//! thread, and a thread that ends afterwards needs no way back. It is not setresuid(2): whoever has the user id of a
//! thread may signal it, and with it the whole daemon.

use std::io;
use std::sync::OnceLock;

use nix::errno::Errno;

use super::spawn::{Credentials, drop_capabilities};

/// With whose rights something is done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Guise {
    /// This process's own.
    #[default]
    Own,
    /// A user's; only root takes them on.
    User(Credentials),
    /// Those of a user who is not known any more: none.
    Nobody,
}

impl Guise {
    /// Does something with these rights. Everything is refused where they cannot be had.
    ///
    /// # Errors
    /// What `act` says; `PermissionDenied` for nobody; as setgroups(2), and EAGAIN when there can be no thread.
    pub fn run<T: Send>(&self, act: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        let credentials = match self {
            Self::Own => return act(),
            Self::User(credentials) => credentials,
            Self::Nobody => return Err(Errno::EACCES.into()),
        };
        // The kernel makes the whole process undumpable when a thread of it changes its user, and with that hides its
        // /proc from root without CAP_SYS_PTRACE, as in containers.
        static DUMPABLE: OnceLock<i32> = OnceLock::new();
        let dumpable = *DUMPABLE.get_or_init(dumpable);
        let outcome = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("guise".to_owned()).spawn_scoped(scope, || {
                put_on(credentials)?;
                act()
            })?;
            thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
        });
        set_dumpable(dumpable);
        outcome
    }

    /// Whether these are the rights of root, who may do everything everywhere.
    #[must_use]
    pub fn is_root(&self) -> bool {
        match self {
            Self::Own => nix::unistd::geteuid().is_root(),
            Self::User(credentials) => credentials.uid == 0,
            Self::Nobody => false,
        }
    }
}

fn dumpable() -> i32 {
    // SAFETY: integers only.
    unsafe { libc::prctl(libc::PR_GET_DUMPABLE, 0, 0, 0, 0) }
}

fn set_dumpable(to: i32) {
    // Refused for 2 (only root reads core files), which the kernel sets itself then. SAFETY: integers only.
    unsafe { libc::prctl(libc::PR_SET_DUMPABLE, to, 0, 0, 0) };
}

/// For the rest of this thread's life. The bare system calls, because the C library's setgroups is for all threads.
fn put_on(credentials: &Credentials) -> io::Result<()> {
    let Credentials { uid, gid, groups } = credentials;
    // SAFETY: the kernel reads `len` group ids of 32 bits each.
    if unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) } < 0 {
        return Err(Errno::last().into());
    }
    change_to(libc::SYS_setfsgid, *gid)?;
    // Takes the capabilities too that count for files.
    change_to(libc::SYS_setfsuid, *uid)?;
    if *uid != 0 {
        // The others would still open the ways through /proc/PID that are for whoever may trace PID.
        drop_capabilities()?;
    }
    Ok(())
}

/// setfsuid(2) and setfsgid(2) say who it was before, and not whether it worked.
fn change_to(call: i64, id: u32) -> io::Result<()> {
    // SAFETY: integers only.
    unsafe { libc::syscall(call, id) };
    // SAFETY: integers only. -1 is nobody's number, so this only asks.
    let now = unsafe { libc::syscall(call, u32::MAX) };
    if now == i64::from(id) { Ok(()) } else { Err(Errno::EPERM.into()) }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};

    use super::*;

    fn bob() -> Guise {
        Guise::User(Credentials { uid: 54_321, gid: 54_322, groups: vec![54_322, 54_323] })
    }

    fn writes(guise: &Guise, path: &std::path::Path) -> io::Result<()> {
        guise.run(|| fs::write(path, "a line"))
    }

    #[test]
    fn a_guise_may_what_its_user_may_and_is_over_afterwards() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        for (name, uid, gid, mode) in
            [("roots", 0, 0, 0o755), ("bobs", 54_321, 0, 0o700), ("groups", 0, 54_323, 0o770)]
        {
            fs::create_dir(at(name)).unwrap();
            fs::set_permissions(at(name), fs::Permissions::from_mode(mode)).unwrap();
            chown(at(name), Some(uid), Some(gid)).unwrap();
        }
        let before = dumpable();
        for (guise, name, allowed) in [
            (bob(), "roots/a", false),
            (bob(), "bobs/a", true),
            (bob(), "groups/a", true),
            (Guise::User(Credentials { uid: 54_321, gid: 54_322, groups: vec![] }), "groups/b", false),
            (Guise::User(Credentials { uid: u32::MAX, gid: 7, groups: vec![] }), "roots/b", false),
            (Guise::User(Credentials { uid: 7, gid: u32::MAX, groups: vec![] }), "roots/b", false),
            (Guise::Nobody, "roots/b", false),
            (Guise::Own, "roots/c", true),
        ] {
            let outcome = writes(&guise, &at(name));
            assert_eq!(outcome.is_ok(), allowed, "{guise:?} {name}: {outcome:?}");
            assert_eq!(at(name).try_exists().unwrap(), allowed, "{guise:?} {name}");
        }
        let meta = fs::metadata(at("bobs/a")).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (54_321, 54_322));
        // What root alone may, through a door that is for whoever may trace a process of root's.
        let door = format!("/proc/{}/root", nix::unistd::getppid());
        assert!(bob().run(|| fs::read_link(&door)).is_err());
        fs::read_link(&door).unwrap();
        // Other threads, and this one, are who they were.
        fs::write(at("roots/d"), "").unwrap();
        assert_eq!(fs::metadata(at("roots/d")).unwrap().uid(), 0);
        assert_eq!(dumpable(), before);
    }
}
