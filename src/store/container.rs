//! The home of a daemon in the foreground: found where nothing is prepared for it, and found again by commands that are
//! run beside it (`docker exec … pm list`).
//!
//! A container may have no home directory, no `/tmp`, no writable file system and no entry for its user. What it has is
//! memory: `/dev/shm`. Commands need no variable and no option: when the first process of their pid namespace is such a
//! daemon, or an init program of containers whose child is one, its command line says where its home is.
//!
//! Whoever obeys a foreign daemon gives it what it starts, with its environment. So nothing counts that anybody could have
//! laid there: a daemon that a command has started is a child of the first process too, and so is every orphan.

use std::env;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::unistd::Uid;

use super::paths::{Home, HomeError};
use crate::sys::lock;

/// Where a home may be made, the best first. `/run` is root's as a rule.
const PLACES: [&str; 4] = ["/dev/shm", "/run", "/tmp", "/var/tmp"];

/// How many daemons in the foreground one user has at the same time.
const AT_ONCE: u32 = 1000;

/// Programs that are the first process of a container for the sake of another one. None that machines have as well, as
/// `init`: there it has all kinds of children.
const INITS: [&[u8]; 5] = [b"docker-init", b"tini", b"dumb-init", b"catatonit", b"podman-init"];

/// How often a home is made again that was removed meanwhile.
const TRIES: u32 = 10;

/// Why there is no place for a home.
#[derive(Debug, thiserror::Error)]
#[error("there is no directory that can be written to: {}", reasons(.tried))]
pub struct NoPlace {
    /// What was tried, and why it did not do.
    pub tried: Vec<(PathBuf, String)>,
}

fn reasons(tried: &[(PathBuf, String)]) -> String {
    tried.iter().map(|(path, why)| format!("{} ({why})", path.display())).collect::<Vec<_>>().join(", ")
}

/// Makes a home that nobody uses, in memory where there is such a directory. It is the caller's as long as the lock is held
/// that comes with it.
///
/// # Errors
/// Nothing can be written to.
pub fn temporary_home() -> Result<(Home, File), NoPlace> {
    let own = |name: &str| env::var_os(name).filter(|dir| !dir.is_empty()).map(PathBuf::from);
    let places: Vec<PathBuf> = [own("XDG_RUNTIME_DIR")]
        .into_iter()
        .flatten()
        .chain(PLACES.map(PathBuf::from))
        .chain(own("TMPDIR"))
        .collect();
    temporary_home_in(&places)
}

fn temporary_home_in(places: &[PathBuf]) -> Result<(Home, File), NoPlace> {
    let mut tried = Vec::new();
    for place in places {
        match home_in(place) {
            Ok(home) => return Ok(home),
            Err(why) => tried.push((place.clone(), why)),
        }
    }
    Err(NoPlace { tried })
}

fn home_in(place: &Path) -> Result<(Home, File), String> {
    let uid = Uid::effective();
    for number in 1..=AT_ONCE {
        let name = if number == 1 { format!("pm-{uid}") } else { format!("pm-{uid}-{number}") };
        let dir = place.join(name);
        match fs::symlink_metadata(&dir) {
            // Somebody else's, in a directory where everybody may write: perhaps laid for us.
            Ok(meta) if !meta.is_dir() || meta.uid() != uid.as_raw() => continue,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(words(&error)),
        }
        let home = Home::at(&dir).map_err(|error| error.to_string())?;
        if let Some(lock) = take(&home)? {
            return Ok((home, lock));
        }
    }
    Err("all names are in use".to_owned())
}

/// Makes a home and locks it; `None` when it is somebody's.
fn take(home: &Home) -> Result<Option<File>, String> {
    let create = || match home.create() {
        Ok(()) => Ok(true),
        // Removed while it was made; the second one was there, and when it was looked at it was not.
        Err(HomeError::Create { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(HomeError::NotDirectory { .. }) => Ok(false),
        Err(HomeError::Create { source, .. }) => Err(words(&source)),
        Err(error) => Err(error.to_string()),
    };
    for _ in 0..TRIES {
        if !create()? {
            continue;
        }
        match lock::acquire(&home.lock()) {
            // Once more: whoever had it may have removed a part of it, and cannot any longer.
            Ok(lock) if create()? => return Ok(Some(lock)),
            Ok(_) => {}
            Err(lock::LockError::Held { .. }) => return Ok(None),
            Err(lock::LockError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            Err(lock::LockError::Io { source, .. }) => return Err(words(&source)),
        }
    }
    Ok(None)
}

/// Removes a home that was made by [`temporary_home`], as far as that goes: what stays lies in memory or in /tmp, and is
/// used again by the next one. The lock is held, so that nobody else's home is removed.
pub fn remove(home: &Home, _lock: &File) {
    let path = home.lock();
    for entry in fs::read_dir(home.dir()).into_iter().flatten().flatten().map(|entry| entry.path()) {
        if entry != path {
            let _ = fs::remove_file(&entry).or_else(|_| fs::remove_dir_all(&entry));
        }
    }
    // From here on it is anybody's: nothing goes that is not empty.
    let _ = fs::remove_file(&path);
    let _ = fs::remove_dir(home.dir());
}

fn words(error: &io::Error) -> String {
    // Without the number: it is a list.
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_lowercase()
}

/// The home of the daemon in the foreground that this process shares a container with.
#[must_use]
pub fn home_of_container() -> Option<PathBuf> {
    home_of_container_in(Path::new("/proc"), Uid::effective().as_raw())
}

fn home_of_container_in(proc: &Path, caller: u32) -> Option<PathBuf> {
    let first = proc.join("1");
    if let Some(home) = home_of_keeper(&first) {
        // Whoever can be the first process has made all of this container.
        return Some(home);
    }
    let name = fs::read(first.join("comm")).ok()?;
    if !INITS.contains(&name.trim_ascii()) {
        return None;
    }
    let owner = owner(&first);
    let children = fs::read_to_string(first.join("task/1/children")).ok()?;
    // The init program's own child comes first, orphans behind it.
    children.split_whitespace().find_map(|pid| {
        let process = proc.join(pid);
        let uid = self::owner(&process)?;
        let is_trusted = uid == caller || uid == 0 || Some(uid) == owner;
        let home = home_of_keeper(&process).filter(|_| is_trusted)?;
        let meta = fs::metadata(&home).ok()?;
        (meta.is_dir() && meta.uid() == uid).then_some(home)
    })
}

/// The home in the command line of a keeper in the foreground; `None` for any other process.
fn home_of_keeper(process: &Path) -> Option<PathBuf> {
    let text = fs::read(process.join("cmdline")).ok()?;
    let text = text.strip_suffix(b"\0").unwrap_or(&text);
    let words: Vec<&[u8]> = text.split(|&byte| byte == 0).collect();
    match words.as_slice() {
        // One that a command has started says so.
        [_, b"daemon", b"--home", home] | [_, b"daemon", b"--home", home, b"--lock" | b"--resume", _]
            if home.starts_with(b"/") =>
        {
            Some(PathBuf::from(OsStr::from_bytes(home)))
        }
        _ => None,
    }
}

/// Whose process it is. Not the owner of its directory in /proc: that is root for one that nobody may look into.
fn owner(process: &Path) -> Option<u32> {
    let text = fs::read_to_string(process.join("status")).ok()?;
    let uids = text.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    let mut uids = uids.split_whitespace().map_while(|uid| uid.parse::<u32>().ok());
    let (real, effective) = (uids.next()?, uids.next()?);
    (real == effective).then_some(real)
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    /// A container as /proc shows it.
    struct Container {
        proc: TempDir,
        /// A home of whoever runs this test.
        home: TempDir,
        uid: u32,
    }

    impl Container {
        fn new() -> Self {
            let [proc, home] = [(); 2].map(|()| tempfile::tempdir().unwrap());
            Self { proc, home, uid: Uid::effective().as_raw() }
        }

        fn process(&self, pid: u32, uid: u32, cmdline: &str, children: &str) {
            let dir = self.proc.path().join(pid.to_string());
            let comm = cmdline.split([' ', '/']).next().unwrap();
            fs::create_dir_all(dir.join(format!("task/{pid}"))).unwrap();
            fs::write(dir.join("comm"), format!("{comm}\n")).unwrap();
            fs::write(dir.join("status"), format!("Name:\tx\nUid:\t{uid}\t{uid}\t{uid}\t{uid}\n")).unwrap();
            let cmdline = cmdline.replace("HOME", self.home.path().to_str().unwrap());
            fs::write(dir.join("cmdline"), cmdline.replace(' ', "\0") + "\0").unwrap();
            fs::write(dir.join(format!("task/{pid}/children")), children).unwrap();
        }

        /// Whether a command of this user goes to the daemon there.
        #[track_caller]
        fn is_found_by(&self, caller: u32, expected: bool) {
            let found = home_of_container_in(self.proc.path(), caller);
            assert_eq!(found, expected.then(|| self.home.path().to_owned()), "{:?}", self.proc.path());
        }
    }

    #[test]
    fn a_container_is_known_by_its_first_process() {
        for (init, expected) in [
            ("pm daemon --home HOME", true),
            ("pm daemon --home HOME --lock 3", true),
            ("pm daemon --home HOME --resume 12", true),
            ("pm daemon --home HOME --detached", false),
            ("pm daemon", false),
            ("pm daemon --home relative", false),
        ] {
            let container = Container::new();
            container.process(1, 54321, init, "");
            container.is_found_by(0, expected);
        }
        for (init, expected) in [("tini -- pm run", true), ("init", false), ("systemd", false)] {
            let container = Container::new();
            container.process(1, 0, init, "7 8 ");
            container.process(7, container.uid, "sh -c x", "");
            container.process(8, container.uid, "pm daemon --home HOME --lock 3", "");
            container.is_found_by(container.uid, expected);
        }
    }

    #[test]
    fn a_daemon_that_anybody_could_have_laid_there_is_not_obeyed() {
        const ROOT: u32 = 0;
        const OTHER: u32 = 54322;
        // Whose processes init and its child are, the child's words, and who asks.
        let own = Uid::effective().as_raw();
        let home = "pm daemon --home HOME --lock 3";
        for (init, child, words, caller, expected) in [
            (ROOT, own, home, own, true),
            (own, own, home, OTHER, true),
            // Of the user of the whole container, but root has processes of its own there.
            (OTHER, own, home, OTHER, own == ROOT),
            // Its home is not its own, so that somebody else waits there.
            (ROOT, OTHER, home, OTHER, false),
            // What `pm start` leaves behind, which is an orphan.
            (ROOT, own, "pm daemon --home HOME --detached", own, false),
            (own, own, "pm daemon --home HOME --detached --resume 9", own, false),
        ] {
            let container = Container::new();
            container.process(1, init, "docker-init -- pm run", "8");
            container.process(8, child, words, "");
            container.is_found_by(caller, expected);
        }
    }

    #[test]
    fn two_daemons_do_not_share_a_home_and_a_directory_of_others_is_left_alone() {
        let place = tempfile::tempdir().unwrap();
        let places = ["/proc/nonexistent".into(), place.path().to_owned()];
        let (first, held) = temporary_home_in(&places).unwrap();
        let uid = Uid::effective();
        assert_eq!(first.dir(), place.path().join(format!("pm-{uid}")));
        std::os::unix::fs::symlink("/etc", place.path().join(format!("pm-{uid}-2"))).unwrap();
        assert_eq!(temporary_home_in(&places).unwrap().0.dir(), place.path().join(format!("pm-{uid}-3")));
        drop(held);
        assert_eq!(temporary_home_in(&places).unwrap().0.dir(), first.dir());
    }

    /// As when many containers share a /tmp, or somebody starts two at once.
    #[test]
    fn whoever_makes_a_home_has_it_until_it_removes_it() {
        let place = tempfile::tempdir().unwrap();
        let places = [place.path().to_owned()];
        std::thread::scope(|scope| {
            for number in 0..4 {
                let places = &places;
                scope.spawn(move || {
                    for round in 0..100 {
                        let (home, lock) = temporary_home_in(places).unwrap();
                        let text = format!("{number} {round}");
                        fs::write(home.first(), &text).unwrap();
                        std::thread::yield_now();
                        assert_eq!(fs::read_to_string(home.first()).unwrap(), text);
                        assert!(home.logs_dir().is_dir() && home.run_dir().is_dir());
                        assert!(matches!(lock::acquire(&home.lock()), Err(lock::LockError::Held { .. })));
                        remove(&home, &lock);
                    }
                });
            }
        });
        let left: Vec<_> = fs::read_dir(place.path()).unwrap().collect();
        assert!(left.len() <= 4, "{left:?}");
        // What stays is free.
        for _ in 0..left.len() {
            let (home, lock) = temporary_home_in(&places).unwrap();
            assert!(!home.first().try_exists().unwrap(), "{home:?}");
            drop(lock);
        }
    }

    #[test]
    fn where_nothing_can_be_written_every_place_is_named() {
        let error = temporary_home_in(&["/proc".into(), "/sys".into()]).unwrap_err().to_string();
        assert!(error.contains("/proc (") && error.contains("/sys ("), "{error}");
    }
}
