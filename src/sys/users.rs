//! Users and groups by name or number, as the system knows them (NSS): asked anew at each spawn, in the daemon.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::unistd::{Gid, Group, Uid, User, getegid, geteuid, getgrouplist};

use super::spawn::Credentials;

/// Who a program is to run as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// Numbers, with the groups of `id USER`.
    pub credentials: Credentials,
    /// What login(1) sets, where the user has an entry.
    pub entry: Option<Entry>,
}

/// A user's entry in the user database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The name.
    pub name: String,
    /// The home directory.
    pub home: PathBuf,
    /// The login shell.
    pub shell: PathBuf,
}

/// Why there is no such account.
#[derive(Debug, thiserror::Error)]
pub enum AccountError {
    /// No user of this name.
    #[error("there is no user `{0}` on this machine")]
    NoUser(String),
    /// No group of this name.
    #[error("there is no group `{0}` on this machine")]
    NoGroup(String),
    /// A number without an entry has no group.
    #[error("uid {0} has no entry in the user database, so its group is not known; set `group` too")]
    NumberNeedsGroup(u32),
    /// The kernel takes it for "no change": the program would run as root.
    #[error(
        "4294967295 is no user or group: the kernel reads it as \"no change\", which would be root; take another number"
    )]
    NoId,
    /// The database does not answer.
    #[error("cannot look up `{name}`: {source}")]
    Lookup {
        /// Whom.
        name: String,
        /// Why.
        source: io::Error,
    },
}

/// Who `user` and `group` are. With `group` alone it is the user of this process.
///
/// # Errors
/// [`AccountError`].
pub fn account(user: Option<&str>, group: Option<&str>) -> Result<Account, AccountError> {
    let lookup = |name: &str| {
        let name = name.to_owned();
        move |errno: Errno| AccountError::Lookup { name, source: errno.into() }
    };
    let (uid, found) = match user {
        None => (geteuid(), User::from_uid(geteuid()).ok().flatten()),
        // A name of digits is a number, as chown(1) takes it when there is no such name.
        Some(name) => match (User::from_name(name).map_err(lookup(name))?, name.parse::<u32>()) {
            (Some(found), _) => (found.uid, Some(found)),
            (None, Ok(number)) => {
                let uid = Uid::from_raw(number);
                (uid, User::from_uid(uid).map_err(lookup(name))?)
            }
            (None, Err(_)) => return Err(AccountError::NoUser(name.to_owned())),
        },
    };
    let gid = match group {
        Some(name) => match (Group::from_name(name).map_err(lookup(name))?, name.parse::<u32>()) {
            (Some(found), _) => found.gid,
            (None, Ok(number)) => Gid::from_raw(number),
            (None, Err(_)) => return Err(AccountError::NoGroup(name.to_owned())),
        },
        None => found.as_ref().map(|entry| entry.gid).ok_or(AccountError::NumberNeedsGroup(uid.as_raw()))?,
    };
    // From a number, or from an entry with such a number.
    if [uid.as_raw(), gid.as_raw()].contains(&u32::MAX) {
        return Err(AccountError::NoId);
    }
    let mut groups = vec![gid.as_raw()];
    if let Some(entry) = &found
        && let Ok(name) = CString::new(entry.name.as_str())
    {
        let listed = getgrouplist(&name, gid).map_err(lookup(&entry.name))?;
        groups = listed.into_iter().map(Gid::as_raw).collect();
    }
    let entry = found.map(|entry| Entry { name: entry.name, home: entry.dir, shell: entry.shell });
    Ok(Account { credentials: Credentials { uid: uid.as_raw(), gid: gid.as_raw(), groups }, entry })
}

/// The groups of a user with this primary group, as far as they can be looked up.
#[must_use]
pub fn groups_of(uid: u32, gid: u32) -> Vec<u32> {
    let entry = User::from_uid(Uid::from_raw(uid)).ok().flatten();
    let name = entry.and_then(|entry| CString::new(entry.name).ok());
    let listed = name.and_then(|name| getgrouplist(&name, Gid::from_raw(gid)).ok());
    listed.map_or_else(|| vec![gid], |listed| listed.into_iter().map(Gid::as_raw).collect())
}

/// Whether this process may start others as anybody.
#[must_use]
pub fn may_change_user() -> bool {
    geteuid().is_root()
}

/// Whether this process is that already.
#[must_use]
pub fn is_own(credentials: &Credentials) -> bool {
    credentials.uid == geteuid().as_raw() && credentials.gid == getegid().as_raw()
}

/// Who owns this file; `None` where it cannot be looked at.
#[must_use]
pub fn owner_of(path: &Path) -> Option<u32> {
    fs::symlink_metadata(path).ok().map(|meta| meta.uid())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_mean_the_same() {
        let root = account(Some("root"), None).unwrap();
        assert_eq!(account(Some("0"), None).unwrap(), root);
        assert_eq!((root.credentials.uid, root.credentials.gid), (0, 0));
        assert_eq!(root.entry.as_ref().map(|entry| entry.name.as_str()), Some("root"));
        assert!(root.credentials.groups.contains(&0));
    }

    #[test]
    fn what_does_not_exist_is_named() {
        let text = |user, group| account(user, group).unwrap_err().to_string();
        assert_eq!(text(Some("no-such-user"), None), "there is no user `no-such-user` on this machine");
        assert_eq!(
            text(Some("root"), Some("no-such-group")),
            "there is no group `no-such-group` on this machine"
        );
        assert!(text(Some("4000000000"), None).contains("set `group` too"));
        let odd = account(Some("4000000000"), Some("7")).unwrap();
        assert_eq!(odd.credentials, Credentials { uid: 4_000_000_000, gid: 7, groups: vec![7] });
        assert_eq!(odd.entry, None);
        for (user, group) in [
            (Some("4294967295"), Some("7")),
            (Some("+4294967295"), Some("7")),
            (Some("7"), Some("4294967295")),
            (None, Some("4294967295")),
        ] {
            assert!(matches!(account(user, group), Err(AccountError::NoId)), "{user:?} {group:?}");
        }
    }
}
