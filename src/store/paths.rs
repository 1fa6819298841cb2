//! The home: where everything a daemon owns lies, and how the directory is found.
//!
//! Never creates anything but the directories themselves, and never guesses a second place when the first does not
//! work: two homes would mean two daemons.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::unistd::{Uid, User};

use super::container;

/// The longest path that fits into a `sockaddr_un` with its final zero (unix(7)), in bytes.
pub const SOCKET_PATH_MAX: usize = 107;

/// The home of root, with and without systemd: one daemon.
const ROOT_HOME: &str = "/var/lib/pm";

/// The socket of a supervisor without a keeper.
const TAKEOVER: &str = "takeover.sock";

/// Why there is no home.
#[derive(Debug, thiserror::Error)]
pub enum HomeError {
    /// The caller has no passwd entry, so there is no `~`.
    #[error("user {uid} has no entry in the password database, so there is no home directory to put .pm in")]
    NoUser {
        /// The caller's uid.
        uid: u32,
    },
    /// The password database cannot be read.
    #[error("cannot look up user {uid}")]
    Lookup {
        /// The caller's uid.
        uid: u32,
        /// Why.
        source: nix::Error,
    },
    /// A relative path that cannot be made absolute.
    #[error("cannot find the current directory")]
    Cwd {
        /// Why.
        source: io::Error,
    },
    /// A directory of the home cannot be made or changed.
    #[error("cannot create {path:?}")]
    Create {
        /// Which directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The home exists, and others may enter it or somebody else owns it.
    #[error("{path:?} belongs to user {owner}, not to {caller}")]
    Owner {
        /// The home.
        path: PathBuf,
        /// Its owner's name or number.
        owner: String,
        /// The caller's name or number.
        caller: String,
    },
    /// The home is something else.
    #[error("{path:?} is not a directory")]
    NotDirectory {
        /// The home.
        path: PathBuf,
    },
}

/// The directory that holds everything of one daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Home {
    dir: PathBuf,
}

/// A path to bind or connect the socket at. Keeps the directory open while a short name leads through it.
#[derive(Debug)]
pub struct SocketPath {
    path: PathBuf,
    _dir: Option<OwnedFd>,
}

impl SocketPath {
    /// At most [`SOCKET_PATH_MAX`] bytes; valid as long as `self`.
    #[must_use]
    pub fn as_path(&self) -> &Path {
        &self.path
    }
}

impl Home {
    /// The home at this directory; a relative one is taken from the current directory.
    ///
    /// # Errors
    /// The current directory is gone.
    pub fn at(dir: &Path) -> Result<Self, HomeError> {
        let dir = std::path::absolute(dir).map_err(|source| HomeError::Cwd { source })?;
        Ok(Self { dir })
    }

    /// The home to use: `--home`, else PM_HOME, else that of the daemon this container was started for (`pm run`), else
    /// `/var/lib/pm` for root, else `~/.pm` from the passwd entry (`HOME` is not asked: under sudo it is somebody
    /// else's).
    ///
    /// # Errors
    /// There is no such user, or no current directory for a relative path.
    pub fn resolve(option: Option<&Path>, pm_home: Option<&OsStr>) -> Result<Self, HomeError> {
        if let Some(dir) = option {
            return Self::at(dir);
        }
        if let Some(dir) = pm_home.filter(|dir| !dir.is_empty()) {
            return Self::at(Path::new(dir));
        }
        if let Some(dir) = container::home_of_container() {
            return Self::at(&dir);
        }
        let uid = Uid::effective();
        if uid.is_root() {
            return Self::at(Path::new(ROOT_HOME));
        }
        match User::from_uid(uid) {
            Ok(Some(user)) => Self::at(&user.dir.join(".pm")),
            Ok(None) => Err(HomeError::NoUser { uid: uid.as_raw() }),
            Err(source) => Err(HomeError::Lookup { uid: uid.as_raw(), source }),
        }
    }

    /// Makes the home and its directories where they are missing, and the home 0700.
    ///
    /// # Errors
    /// A directory cannot be made, or the home belongs to another user.
    pub fn create(&self) -> Result<(), HomeError> {
        let create = |path: &Path| {
            DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|source| {
                if source.kind() == io::ErrorKind::AlreadyExists {
                    HomeError::NotDirectory { path: path.to_owned() }
                } else {
                    HomeError::Create { path: path.to_owned(), source }
                }
            })
        };
        create(&self.dir)?;
        let failed = |source| HomeError::Create { path: self.dir.clone(), source };
        let meta = fs::metadata(&self.dir).map_err(failed)?;
        let caller = Uid::effective();
        if meta.uid() != caller.as_raw() {
            let (owner, caller) = (user_name(meta.uid()), user_name(caller.as_raw()));
            return Err(HomeError::Owner { path: self.dir.clone(), owner, caller });
        }
        if meta.permissions().mode() & 0o077 != 0 {
            fs::set_permissions(&self.dir, fs::Permissions::from_mode(0o700)).map_err(failed)?;
        }
        for path in [self.env_dir(), self.dump_env_dir(), self.logs_dir(), self.pids_dir(), self.run_dir()] {
            create(&path)?;
        }
        Ok(())
    }

    /// The directory itself, absolute.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The command line's socket.
    #[must_use]
    pub fn sock(&self) -> PathBuf {
        self.dir.join("pm.sock")
    }

    /// The socket under a name that fits into a socket address: of a long home, the way leads through an open
    /// descriptor of its directory in /proc.
    ///
    /// # Errors
    /// The home is long and cannot be opened.
    pub fn sock_address(&self) -> io::Result<SocketPath> {
        self.address_of("pm.sock")
    }

    /// Where a supervisor without a keeper waits for the next one.
    #[must_use]
    pub fn takeover_sock(&self) -> PathBuf {
        self.dir.join(TAKEOVER)
    }

    /// That socket as [`Self::sock_address`].
    ///
    /// # Errors
    /// As there.
    pub fn takeover_address(&self) -> io::Result<SocketPath> {
        self.address_of(TAKEOVER)
    }

    fn address_of(&self, name: &str) -> io::Result<SocketPath> {
        let path = self.dir.join(name);
        if path.as_os_str().as_bytes().len() <= SOCKET_PATH_MAX {
            return Ok(SocketPath { path, _dir: None });
        }
        let dir = open(&self.dir, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
        let path = PathBuf::from(format!("/proc/self/fd/{}/{name}", dir.as_raw_fd()));
        Ok(SocketPath { path, _dir: Some(dir) })
    }

    /// Held with flock by the one daemon of this home.
    #[must_use]
    pub fn lock(&self) -> PathBuf {
        self.dir.join("pm.lock")
    }

    /// Held with flock by the one command that starts the daemon.
    #[must_use]
    pub fn start_lock(&self) -> PathBuf {
        self.dir.join("start.lock")
    }

    /// The desired state.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.dir.join("state.json")
    }

    /// The desired state before the present one.
    #[must_use]
    pub fn state_before(&self) -> PathBuf {
        self.dir.join("state.json.prev")
    }

    /// What `pm run` wants to have started, until that is part of the state.
    #[must_use]
    pub fn first(&self) -> PathBuf {
        self.dir.join("first.json")
    }

    /// What has happened, one JSON object per line; see `store::events`.
    #[must_use]
    pub fn events(&self) -> PathBuf {
        self.dir.join("events.jsonl")
    }

    /// What `save` writes and `resurrect` reads.
    #[must_use]
    pub fn dump(&self) -> PathBuf {
        self.dir.join("dump.json")
    }

    /// Snapshots of shell environments, 0600 each.
    #[must_use]
    pub fn env_dir(&self) -> PathBuf {
        self.dir.join("env")
    }

    /// The daemon's own log.
    #[must_use]
    pub fn log_file(&self) -> PathBuf {
        self.dir.join("pm.log")
    }

    /// Log files of apps.
    #[must_use]
    pub fn logs_dir(&self) -> PathBuf {
        self.dir.join("logs")
    }

    /// Pid files of apps.
    #[must_use]
    pub fn pids_dir(&self) -> PathBuf {
        self.dir.join("pids")
    }

    /// What only lives as long as the daemon: notify sockets, the Node agent.
    #[must_use]
    pub fn run_dir(&self) -> PathBuf {
        self.dir.join("run")
    }

    /// Shell snapshots that the saved list refers to: apart from those of the present state, which come and go.
    #[must_use]
    pub fn dump_env_dir(&self) -> PathBuf {
        self.dir.join("saved-env")
    }
}

/// The name of a user, or the number where the password database does not know it.
#[must_use]
pub fn user_name(uid: u32) -> String {
    match User::from_uid(Uid::from_raw(uid)) {
        Ok(Some(user)) => user.name,
        Ok(None) | Err(_) => uid.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn an_option_beats_the_variable_and_an_empty_variable_is_none() {
        let from_option = Home::resolve(Some(Path::new("/a")), Some(OsStr::new("/b"))).unwrap();
        assert_eq!(from_option.dir(), Path::new("/a"));
        assert_eq!(Home::resolve(None, Some(OsStr::new("/b"))).unwrap().dir(), Path::new("/b"));
        let by_user = Home::resolve(None, Some(OsStr::new(""))).unwrap();
        assert_eq!(by_user, Home::resolve(None, None).unwrap());
        assert!(by_user.dir().is_absolute());
        assert_eq!(from_option.sock(), Path::new("/a/pm.sock"));
    }

    #[test]
    fn a_home_is_made_private_also_when_it_was_not() {
        let temp = tempfile::tempdir().unwrap();
        let home = Home::at(&temp.path().join("deep/er")).unwrap();
        home.create().unwrap();
        assert_eq!(fs::metadata(home.dir()).unwrap().permissions().mode() & 0o777, 0o700);
        assert!(fs::metadata(home.logs_dir()).unwrap().is_dir());
        fs::set_permissions(home.dir(), fs::Permissions::from_mode(0o755)).unwrap();
        home.create().unwrap();
        assert_eq!(fs::metadata(home.dir()).unwrap().permissions().mode() & 0o777, 0o700);
    }

    #[test]
    fn a_file_in_the_way_is_named() {
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("file");
        fs::write(&file, "").unwrap();
        let error = Home::at(&file).unwrap().create().unwrap_err();
        assert!(matches!(error, HomeError::NotDirectory { .. }), "{error:?}");
    }

    #[test]
    fn a_home_of_300_bytes_has_a_socket_all_the_same() {
        let temp = tempfile::tempdir().unwrap();
        let home = Home::at(&temp.path().join("x".repeat(150)).join("y".repeat(150))).unwrap();
        home.create().unwrap();
        let address = home.sock_address().unwrap();
        assert!(address.as_path().as_os_str().len() <= SOCKET_PATH_MAX);
        let _listener = UnixListener::bind(address.as_path()).unwrap();
        assert!(home.sock().symlink_metadata().is_ok());
        UnixStream::connect(home.sock_address().unwrap().as_path()).unwrap();
    }
}
