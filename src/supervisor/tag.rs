//! What the keeper stores with each child, so that a supervisor without its blob still knows every one.

use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::fnv;
use crate::model::id::{InstanceId, PmId};
use crate::sys::cgroup::group::GROUP_PREFIX;

/// Tells the runs of one home from those of every other: half of each nonce.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HomeMark(u32);

impl fmt::Display for HomeMark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

impl HomeMark {
    /// The mark of the home in this directory, by whatever path it is reached.
    #[must_use]
    pub fn of(dir: &Path) -> Self {
        let dir = std::fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned());
        let [high, low] = halves(fnv::hash(dir.as_os_str().as_bytes()));
        Self(high ^ low)
    }

    /// Whether a token is that of a run of this home.
    #[must_use]
    pub fn made(self, token: &str) -> bool {
        self.is_in(token.rsplit(':').next())
    }

    /// Whether a control group is that of a run of this home.
    #[must_use]
    pub fn made_group(self, name: &str) -> bool {
        self.is_in(name.rsplit('-').next())
    }

    fn is_in(self, nonce: Option<&str>) -> bool {
        let nonce = nonce.filter(|nonce| nonce.len() == 16);
        let nonce = nonce.and_then(|nonce| u64::from_str_radix(nonce, 16).ok());
        nonce.is_some_and(|nonce| halves(nonce)[0] == self.0)
    }
}

/// Tells one spawn from every other, also of an earlier daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Nonce(u64);

impl Nonce {
    /// The home's mark and a number nobody can foresee, which only the run's own user gets to see.
    #[must_use]
    pub fn new(home: HomeMark) -> Self {
        Self(u64::from(home.0) << 32 | u64::from(random()))
    }

    /// In the form of a UUID, as PM2's `unique_id`.
    #[must_use]
    pub fn as_uuid(self) -> String {
        let [high, low] = halves(self.0);
        let [_, second, _, third] = [high >> 16, high & 0xffff, low >> 16, low & 0xffff];
        format!("{low:08x}-{second:04x}-{third:04x}-0000-{high:012x}")
    }
}

/// A number nobody can foresee: the keys of std's hash maps come from the kernel's random numbers.
fn random() -> u32 {
    halves(RandomState::new().build_hasher().finish())[1]
}

fn halves(number: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = number.to_be_bytes();
    [u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes([e, f, g, h])]
}

impl fmt::Display for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Room for the fields of an earlier version's tag that it did not have.
const LATER_FIELDS: usize = 64;

/// What the keeper stores with a child.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tag {
    /// Which run.
    pub id: InstanceId,
    /// Its slot's number for people.
    pub pm_id: PmId,
    /// The revision of its spec.
    pub revision: u64,
    /// Names its held descriptors, and is part of its token.
    pub nonce: Nonce,
    /// Tells its control group from every other one. Not the nonce: everybody may read the group's name in
    /// /proc/PID/cgroup. 0 for a run of an earlier version, whose group has the nonce in its name.
    group: u32,
}

impl Tag {
    /// That of a new run.
    #[must_use]
    pub fn new(id: InstanceId, pm_id: PmId, revision: u64, home: HomeMark) -> Self {
        Self { id, pm_id, revision, nonce: Nonce::new(home), group: random().max(1) }
    }

    /// The bytes for the keeper.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        // Plain values: cannot fail.
        postcard::to_allocvec(self).unwrap_or_default()
    }

    /// The tag in the keeper's bytes. Fields are only ever appended: those of a later version are left over, and those
    /// that an earlier one did not know are zero.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        postcard::from_bytes(&[bytes, &[0; LATER_FIELDS]].concat()).ok()
    }

    /// The value of `PM_INSTANCE`: proves that a process belongs to this run.
    #[must_use]
    pub fn token(&self) -> String {
        let InstanceId { app, slot, generation } = &self.id;
        format!("{app}:{slot}:{generation}:{}", self.nonce)
    }

    /// The name of its control group.
    #[must_use]
    pub fn group_name(&self) -> String {
        let InstanceId { app, slot, generation } = &self.id;
        let name = format!("{GROUP_PREFIX}{}-{slot}-{generation}", app.file_stem());
        match (self.group, halves(self.nonce.0)) {
            (0, _) => format!("{name}-{}", self.nonce),
            (group, [home, _]) => format!("{name}-{home:08x}{group:08x}"),
        }
    }

    /// The keeper's name for one of the run's descriptors.
    #[must_use]
    pub fn held(&self, kind: Held) -> String {
        format!("{}{}", self.held_prefix(), kind.as_str())
    }

    /// The keeper's name for a long line on its way to the run.
    #[must_use]
    pub fn held_line(&self, number: u64) -> String {
        format!("{}line:{number:016x}", self.held_prefix())
    }

    /// The number of the line that the keeper holds under this name.
    #[must_use]
    pub fn line_number(&self, name: &str) -> Option<u64> {
        let number = name.strip_prefix(&self.held_prefix())?.strip_prefix("line:")?;
        u64::from_str_radix(number, 16).ok()
    }

    /// What the names of all its descriptors begin with.
    #[must_use]
    pub fn held_prefix(&self) -> String {
        format!("run:{}:", self.nonce)
    }
}

/// The descriptors of a run that outlive a supervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// The write end of its stdin.
    Stdin,
    /// The read end of its stdout.
    Out,
    /// The read end of its stderr.
    Err,
    /// Our end of its IPC channel.
    Channel,
    /// What is known of a long line that is being read from its channel; there is none before the first of them.
    Inbox,
    /// Its notify socket.
    Notify,
    /// The read end of its ready pipe.
    Ready,
}

impl Held {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Stdin => "stdin",
            Self::Out => "out",
            Self::Err => "err",
            Self::Channel => "channel",
            Self::Inbox => "inbox",
            Self::Notify => "notify",
            Self::Ready => "ready",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keeper::wire::{NAME_MAX, TAG_MAX};
    use crate::model::id::{APP_NAME_MAX, AppName, Generation, Slot};

    #[test]
    fn a_home_knows_its_own_runs() {
        let [ours, theirs] = ["/var/lib/pm-one", "/var/lib/pm-two"].map(|dir| HomeMark::of(Path::new(dir)));
        let id = InstanceId { app: AppName::new("a:b").unwrap(), slot: Slot(0), generation: Generation(3) };
        let tag = |home| Tag::new(id.clone(), PmId(1), 1, home);
        assert!(ours.made(&tag(ours).token()));
        assert!(!theirs.made(&tag(ours).token()));
        assert_ne!(tag(ours).token(), tag(ours).token());
        for foreign in ["", "a", "api:0:1:f00", "api:0:1:zzzzzzzzzzzzzzzz"] {
            assert!(!ours.made(foreign), "{foreign}");
        }
        assert_eq!(tag(ours).nonce.as_uuid().len(), 36);
    }

    #[test]
    fn tags_of_other_versions_are_read() {
        let id = InstanceId { app: AppName::new("api").unwrap(), slot: Slot(2), generation: Generation(300) };
        let tag = Tag { id, pm_id: PmId(5), revision: 200, nonce: Nonce(0x0123_4567_89ab_cdef), group: 0 };
        // As 0.1.0 wrote it at first, without a number for the group.
        let first = &b"\x03api\x02\xac\x02\x05\xc8\x01\xef\x9b\xaf\xcd\xf8\xac\xd1\x91\x01"[..];
        assert_eq!(Tag::decode(first), Some(tag.clone()));
        assert_eq!(tag.group_name(), format!("{GROUP_PREFIX}api-2-300-0123456789abcdef"));
        let tag = Tag { group: 0xfedc, ..tag };
        let present = [first, b"\xdc\xfd\x03"].concat();
        assert_eq!(tag.encode(), present);
        assert_eq!(Tag::decode(&present), Some(tag.clone()));
        assert_eq!(tag.group_name(), format!("{GROUP_PREFIX}api-2-300-012345670000fedc"));
        assert_eq!(Tag::decode(&[&present, &b"what a later version adds"[..]].concat()), Some(tag));
        assert_eq!(Tag::decode(b"\xff\xff"), None);
    }

    #[test]
    fn the_name_of_a_control_group_does_not_tell_the_token() {
        let home = HomeMark::of(Path::new("/var/lib/pm"));
        let id = InstanceId { app: AppName::new("api").unwrap(), slot: Slot(0), generation: Generation(3) };
        let tag = Tag::new(id, PmId(1), 1, home);
        let nonce = tag.nonce.to_string();
        let (mark, secret) = nonce.split_at(8);
        let name = tag.group_name();
        assert!(name.contains(mark) && !name.contains(secret), "{name} {nonce}");
        assert!(tag.token().ends_with(secret));
        assert!(home.made_group(&name), "a group that nobody knows is found by its home's mark");
        assert_eq!(Tag::decode(&tag.encode()).unwrap().group_name(), name);
    }

    #[test]
    fn the_longest_name_fits_the_wire() {
        let name = "\u{10400}".repeat(APP_NAME_MAX);
        let id = InstanceId {
            app: AppName::new(&name).unwrap(),
            slot: Slot(u32::MAX),
            generation: Generation(u64::MAX),
        };
        let home = HomeMark::of(Path::new("/"));
        let tag = Tag { group: u32::MAX, ..Tag::new(id, PmId(u32::MAX), u64::MAX, home) };
        let bytes = tag.encode();
        assert!(bytes.len() <= TAG_MAX, "{}", bytes.len());
        assert!(tag.held(Held::Channel).len() <= NAME_MAX);
        assert!(tag.held_line(u64::MAX).len() <= NAME_MAX);
        assert_eq!(tag.line_number(&tag.held_line(70_000)), Some(70_000));
        assert_eq!(tag.line_number(&tag.held(Held::Inbox)), None);
        assert_eq!(Tag::decode(&bytes), Some(tag));
    }
}
