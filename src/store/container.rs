//! The home of a daemon in the foreground: found where nothing is prepared for it, and found again by commands that are
//! run beside it (`docker exec … pm list`).
//!
//! A container may have no home directory, no `/tmp`, no writable file system and no entry for its user. What it has is
//! memory: `/dev/shm`. Commands need no variable and no option: when the first process of their pid namespace is such a
//! daemon, or an init program whose child is one, its command line says where its home is.

use std::env;
use std::ffi::OsStr;
use std::fs;
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

/// Programs that are the first process of a container for the sake of another one.
const INITS: [&[u8]; 6] = [b"docker-init", b"tini", b"dumb-init", b"catatonit", b"podman-init", b"init"];

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

/// Makes a home that nobody uses, in memory where there is such a directory.
///
/// # Errors
/// Nothing can be written to.
pub fn temporary_home() -> Result<Home, NoPlace> {
    let own = |name: &str| env::var_os(name).filter(|dir| !dir.is_empty()).map(PathBuf::from);
    let places: Vec<PathBuf> = [own("XDG_RUNTIME_DIR")]
        .into_iter()
        .flatten()
        .chain(PLACES.map(PathBuf::from))
        .chain(own("TMPDIR"))
        .collect();
    temporary_home_in(&places)
}

fn temporary_home_in(places: &[PathBuf]) -> Result<Home, NoPlace> {
    let mut tried = Vec::new();
    for place in places {
        match home_in(place) {
            Ok(home) => return Ok(home),
            Err(why) => tried.push((place.clone(), why)),
        }
    }
    Err(NoPlace { tried })
}

fn home_in(place: &Path) -> Result<Home, String> {
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
        match home.create() {
            Ok(()) => {}
            Err(HomeError::Create { source, .. }) => return Err(words(&source)),
            Err(error) => return Err(error.to_string()),
        }
        match lock::acquire(&home.lock()) {
            Ok(_) => return Ok(home),
            Err(lock::LockError::Held { .. }) => {}
            Err(lock::LockError::Io { source, .. }) => return Err(words(&source)),
        }
    }
    Err("all names are in use".to_owned())
}

fn words(error: &io::Error) -> String {
    // Without the number: it is a list.
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_lowercase()
}

/// The home of the daemon in the foreground that this process shares a container with.
#[must_use]
pub fn home_of_container() -> Option<PathBuf> {
    home_of_container_in(Path::new("/proc"))
}

fn home_of_container_in(proc: &Path) -> Option<PathBuf> {
    let first = proc.join("1");
    if let Some(home) = home_of_keeper(&first) {
        return Some(home);
    }
    let name = fs::read(first.join("comm")).ok()?;
    if !INITS.contains(&name.trim_ascii()) {
        return None;
    }
    let children = fs::read_to_string(first.join("task/1/children")).ok()?;
    children.split_whitespace().find_map(|pid| home_of_keeper(&proc.join(pid)))
}

/// The home in the command line of a keeper; `None` for any other process.
fn home_of_keeper(process: &Path) -> Option<PathBuf> {
    let text = fs::read(process.join("cmdline")).ok()?;
    let words: Vec<&[u8]> = text.split(|&byte| byte == 0).collect();
    match words.as_slice() {
        [_, b"daemon", b"--home", home, ..] if home.starts_with(b"/") => {
            Some(PathBuf::from(OsStr::from_bytes(home)))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(proc: &Path, pid: u32, comm: &str, cmdline: &str, children: &str) {
        let dir = proc.join(pid.to_string());
        fs::create_dir_all(dir.join(format!("task/{pid}"))).unwrap();
        fs::write(dir.join("comm"), format!("{comm}\n")).unwrap();
        fs::write(dir.join("cmdline"), cmdline.replace(' ', "\0") + "\0").unwrap();
        fs::write(dir.join(format!("task/{pid}/children")), children).unwrap();
    }

    fn check(init: (&str, &str), expected: Option<&str>) {
        let proc = tempfile::tempdir().unwrap();
        process(proc.path(), 1, init.0, init.1, "7 8 ");
        process(proc.path(), 7, "sh", "sh -c x", "");
        process(proc.path(), 8, "pm", "pm daemon --home /dev/shm/pm-0", "");
        assert_eq!(home_of_container_in(proc.path()), expected.map(PathBuf::from), "{init:?}");
    }

    #[test]
    fn a_container_is_known_by_its_first_process() {
        check(("pm", "pm daemon --home /run/pm-5"), Some("/run/pm-5"));
        check(("tini", "tini -- pm run"), Some("/dev/shm/pm-0"));
        check(("systemd", "/sbin/init"), None);
        check(("pm", "pm daemon"), None);
        check(("pm", "pm daemon --home relative"), None);
    }

    #[test]
    fn two_daemons_do_not_share_a_home_and_a_directory_of_others_is_left_alone() {
        let place = tempfile::tempdir().unwrap();
        let places = ["/proc/nonexistent".into(), place.path().to_owned()];
        let first = temporary_home_in(&places).unwrap();
        let uid = Uid::effective();
        assert_eq!(first.dir(), place.path().join(format!("pm-{uid}")));
        let held = lock::acquire(&first.lock()).unwrap();
        std::os::unix::fs::symlink("/etc", place.path().join(format!("pm-{uid}-2"))).unwrap();
        assert_eq!(temporary_home_in(&places).unwrap().dir(), place.path().join(format!("pm-{uid}-3")));
        drop(held);
        assert_eq!(temporary_home_in(&places).unwrap().dir(), first.dir());
    }

    #[test]
    fn where_nothing_can_be_written_every_place_is_named() {
        let error = temporary_home_in(&["/proc".into(), "/sys".into()]).unwrap_err().to_string();
        assert!(error.contains("/proc (") && error.contains("/sys ("), "{error}");
    }
}
