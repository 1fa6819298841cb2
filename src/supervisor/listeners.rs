//! Listening sockets that instances inherit: opened before the first of them, held by the keeper, closed when the app
//! is down. Their queues belong to the sockets, so connections survive any instance.

use std::collections::BTreeMap;
use std::io;
use std::net::Ipv6Addr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::fnv;
use super::steering::Steering;
use crate::keeper::wire::NAME_MAX;
use crate::model::id::{AppName, Slot};
use crate::model::spec::{AppSpec, ListenAddress, ListenSpec};
use crate::sys::guarded;
use crate::sys::guise::Guise;
use crate::sys::holder;
use crate::sys::listen::{self, Stack};
use crate::sys::{pipe, reuseport, users};

/// Stands for a text that is too long for the keeper's names.
fn digest(text: &str) -> u64 {
    fnv::hash(text.as_bytes())
}

/// The inherited listeners of all apps.
#[derive(Debug, Default)]
pub struct Listeners {
    open: BTreeMap<Place, OwnedFd>,
}

/// Which socket.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    app: AppName,
    address: ListenAddress,
    /// `None`: every instance inherits it.
    slot: Option<Slot>,
}

/// A socket that was opened just now, to be given to the keeper.
#[derive(Debug)]
pub struct Opened {
    /// The keeper's name for it.
    pub name: String,
    /// The socket.
    pub socket: OwnedFd,
}

/// Why a socket cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Somebody else listens there.
    #[error("{address} is in use{by}")]
    InUse {
        /// Where.
        address: String,
        /// " by node (pid 123)", as far as it can be seen.
        by: String,
    },
    /// Anything else.
    #[error("cannot listen on {address}: {source}")]
    Other {
        /// Where.
        address: String,
        /// Why.
        source: io::Error,
    },
}

impl Listeners {
    /// What the keeper's names of inherited listeners begin with.
    pub const PREFIX: &'static str = "listen:";

    /// What the keeper's names of listeners that workers asked for begin with.
    pub const KEY_PREFIX: &'static str = "key:";

    /// What the keeper's names of listeners that workers of this app asked for begin with.
    #[must_use]
    pub fn key_prefix(app: &AppName) -> String {
        format!("{}{:016x}:", Self::KEY_PREFIX, digest(app.as_str()))
    }

    /// The keeper's name of a listener that a worker asked for.
    #[must_use]
    pub fn key_name(app: &AppName, key: &str) -> String {
        let prefix = Self::key_prefix(app);
        // A key is an address and its kind; only an exotic one is too long to stand there itself.
        if prefix.len() + key.len() <= NAME_MAX {
            prefix + key
        } else {
            format!("{prefix}{:016x}", digest(key))
        }
    }

    fn name(place: &Place) -> String {
        let (app, address) = (digest(place.app.as_str()), digest(&place.address.to_string()));
        let slot = place.slot.map_or_else(String::new, |slot| format!(":{slot}"));
        format!("{}{app:016x}:{address:016x}{slot}", Self::PREFIX)
    }

    /// Takes over sockets that the keeper held; what belongs to no listener of these specs stays in `held`.
    pub fn adopt<'a>(
        &mut self,
        specs: impl IntoIterator<Item = &'a AppSpec>,
        held: &mut BTreeMap<String, OwnedFd>,
    ) {
        for spec in specs {
            for listener in &spec.listen {
                let slots = (0..).map(|slot| Some(Slot(slot)));
                for slot in std::iter::once(None).chain(slots) {
                    let place = Place { app: spec.name.clone(), address: listener.address.clone(), slot };
                    match held.remove(&Self::name(&place)) {
                        Some(socket) => drop(self.open.insert(place, socket)),
                        // Slots are opened in order and closed together.
                        None if slot.is_some() && !self.open.contains_key(&place) => break,
                        None => {}
                    }
                }
            }
        }
    }

    /// The addresses that are open for an app.
    pub fn of(&self, app: &AppName) -> impl Iterator<Item = &ListenAddress> {
        self.open.keys().filter(move |place| place.app == *app).map(|place| &place.address)
    }

    /// Opens those listeners of the spec that an instance in this slot inherits and that are not open yet. All or none.
    ///
    /// Sockets of slots are opened in the order of the slots: the kernel numbers them so ([`reuseport`]). Unix sockets are
    /// made in the guise of the app's user, where that user may; elsewhere by root, if nobody else can change the way there.
    ///
    /// # Errors
    /// [`OpenError`] names who holds the address.
    pub fn open(&mut self, spec: &AppSpec, guise: &Guise, slot: Slot) -> Result<Vec<Opened>, OpenError> {
        let mut fresh: Vec<(Place, OwnedFd)> = Vec::new();
        for listener in &spec.listen {
            let slots = if spec.inherits_slots() {
                (0..=slot.0).map(|n| Some(Slot(n))).collect()
            } else {
                vec![None]
            };
            for slot in slots {
                let place = Place { app: spec.name.clone(), address: listener.address.clone(), slot };
                if !self.open.contains_key(&place) {
                    let socket = self.socket(&place, listener, guise, &fresh)?;
                    fresh.push((place, socket));
                }
            }
        }
        let mut opened = Vec::new();
        for (place, socket) in fresh {
            let copy = copy(&place.address, &socket)?;
            opened.push(Opened { name: Self::name(&place), socket: copy });
            self.open.insert(place, socket);
        }
        Ok(opened)
    }

    /// A socket for a place that has none. When the balance is changed by a reload, the socket that all instances shared
    /// becomes the first slot's, or the other way round.
    fn socket(
        &self,
        place: &Place,
        listener: &ListenSpec,
        guise: &Guise,
        fresh: &[(Place, OwnedFd)],
    ) -> Result<OwnedFd, OpenError> {
        let at = |slot: Option<Slot>| {
            let wanted = Place { slot, ..place.clone() };
            let new = fresh.iter().find(|(place, _)| *place == wanted).map(|(_, socket)| socket);
            new.or_else(|| self.open.get(&wanted))
        };
        let other = |source| OpenError::Other { address: place.address.to_string(), source };
        let first = at(Some(Slot(0)));
        match (place.slot, first) {
            (None, Some(first)) => copy(&place.address, first),
            (None, None) => bind(listener, guise),
            (Some(Slot(0)), _) => {
                let socket = match at(None) {
                    Some(shared) => copy(&place.address, shared)?,
                    None => bind(listener, guise)?,
                };
                reuseport::share(socket.as_fd()).map_err(other)?;
                Ok(socket)
            }
            (Some(_), Some(first)) => {
                let socket = listen::tcp_beside(first.as_fd(), listener.backlog).map_err(other)?;
                set_mode(&socket, listener).map_err(other)?;
                Ok(socket)
            }
            (Some(_), None) => Err(other(io::ErrorKind::NotConnected.into())),
        }
    }

    /// Copies of what an instance in this slot inherits, in the order of the spec.
    ///
    /// # Errors
    /// EMFILE; a listener that is not open is a bug and an error too.
    pub fn copies(&self, spec: &AppSpec, slot: Slot) -> io::Result<Vec<OwnedFd>> {
        let slot = spec.inherits_slots().then_some(slot);
        spec.listen
            .iter()
            .map(|listener| {
                let place = Place { app: spec.name.clone(), address: listener.address.clone(), slot };
                let socket = self.open.get(&place).ok_or(io::ErrorKind::NotConnected)?;
                socket.as_fd().try_clone_to_owned()
            })
            .collect()
    }

    /// Tells the kernel which slots of an app get connections.
    pub fn steer(&self, app: &AppName, steering: &Steering) {
        let mut groups: BTreeMap<&ListenAddress, Vec<(u32, &OwnedFd)>> = BTreeMap::new();
        for (place, socket) in self.open.iter().filter(|(place, _)| place.app == *app) {
            if let Some(slot) = place.slot {
                groups.entry(&place.address).or_default().push((slot.0, socket));
            }
        }
        for sockets in groups.into_values() {
            steering.steer(app, sockets.into_iter());
        }
    }

    /// Closes those of the app that are not in `keep`; returns the keeper's names of what it has to close too.
    pub fn close(&mut self, app: &AppName, keep: Option<&AppSpec>) -> Vec<String> {
        let stays = |place: &Place| {
            keep.is_some_and(|spec| {
                spec.inherits_slots() == place.slot.is_some()
                    && spec.listen.iter().any(|listener| listener.address == place.address)
            })
        };
        let gone: Vec<Place> =
            self.open.keys().filter(|place| place.app == *app && !stays(place)).cloned().collect();
        gone.into_iter()
            .map(|place| {
                let name = Self::name(&place);
                if let Some(socket) = self.open.remove(&place)
                    && let Err(error) = listen::unbind(socket.as_fd())
                {
                    tracing::warn!(address = %place.address, %error, "cannot remove the socket file");
                }
                name
            })
            .collect()
    }
}

fn copy(address: &ListenAddress, socket: &OwnedFd) -> Result<OwnedFd, OpenError> {
    let copy = socket.as_fd().try_clone_to_owned();
    copy.map_err(|source| OpenError::Other { address: address.to_string(), source })
}

fn set_mode(socket: &OwnedFd, listener: &ListenSpec) -> io::Result<()> {
    let blocking = if listener.blocking { listen::set_blocking } else { listen::set_nonblocking };
    blocking(socket.as_fd())
}

impl Listeners {
    /// Why nobody can listen on an address that a worker asked for, with who holds it as far as that can be seen.
    #[must_use]
    pub fn why_not(address: &str, error: &io::Error) -> String {
        let holder =
            if error.kind() == io::ErrorKind::AddrInUse { holder_of(address) } else { String::new() };
        if holder.is_empty() {
            format!("cannot listen on {address}: {error}")
        } else {
            format!("{address} is in use{holder}")
        }
    }
}

/// Who holds an address as it is shown to people: `127.0.0.1:80`, `*:80`, a path.
fn holder_of(address: &str) -> String {
    if address.starts_with('/') {
        return by_whom(&ListenAddress::Unix(address.into()));
    }
    let any = address.strip_prefix('*').map(|port| format!("[::]{port}"));
    any.as_deref()
        .unwrap_or(address)
        .parse()
        .map_or_else(|_| String::new(), |at| by_whom(&ListenAddress::Tcp(at)))
}

/// Which of these addresses, open for a program to inherit, the program has tried to bind by the look of its last lines.
#[must_use]
pub fn bound_again<'a>(
    open: impl Iterator<Item = &'a ListenAddress>,
    lines: &[String],
) -> Option<&'a ListenAddress> {
    // libc's text, which most languages print; Node's code; musl's text.
    let taken = |line: &&String| {
        let line = line.to_ascii_lowercase();
        ["address already in use", "eaddrinuse", "address in use"].iter().any(|text| line.contains(text))
    };
    let complaint = lines.iter().find(taken)?;
    let mut open = open.peekable();
    let first = open.peek().copied();
    let named = open.find(|address| {
        let place = match address {
            ListenAddress::Tcp(at) => at.port().to_string(),
            ListenAddress::Unix(path) => path.display().to_string(),
        };
        complaint.contains(&place)
    });
    // Go, Node and uvicorn say which address it was, Rust and Python's socket do not.
    let bytes = complaint.as_bytes();
    let names_some =
        bytes.windows(2).any(|pair| matches!(pair[0], b':' | b'/') && pair[1].is_ascii_alphanumeric());
    named.or_else(|| first.filter(|_| !names_some))
}

fn bind(listener: &ListenSpec, guise: &Guise) -> Result<OwnedFd, OpenError> {
    let address = listener.address.to_string();
    let bound = match &listener.address {
        ListenAddress::Tcp(at) if at.ip() == Ipv6Addr::UNSPECIFIED => {
            // A host without IPv6 still has all of its IPv4 addresses.
            listen::tcp_any(at.port(), listener.backlog)
        }
        ListenAddress::Tcp(at) => listen::tcp(*at, Stack::V6Only, listener.backlog),
        ListenAddress::Unix(path) => bind_unix(path, listener.backlog, guise),
    };
    let socket = bound.map_err(|source| {
        if source.kind() == io::ErrorKind::AddrInUse {
            OpenError::InUse { by: by_whom(&listener.address), address: address.clone() }
        } else {
            OpenError::Other { address: address.clone(), source }
        }
    })?;
    let blocking = if listener.blocking { listen::set_blocking } else { listen::set_nonblocking };
    let nodelay = |socket: BorrowedFd<'_>| match listener.address {
        ListenAddress::Tcp(_) => listen::set_nodelay(socket),
        ListenAddress::Unix(_) => Ok(()),
    };
    blocking(socket.as_fd())
        .and_then(|()| nodelay(socket.as_fd()))
        .map_err(|source| OpenError::Other { address, source })?;
    Ok(socket)
}

/// As the app's user, who may have written the way there. Where that user may not, the path is the operator's choice, such
/// as one in /run: root makes the socket if nobody else can change what lies on the way.
fn bind_unix(path: &Path, backlog: u32, guise: &Guise) -> io::Result<OwnedFd> {
    match bind_or_replace(path, backlog, guise) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied && !guise.is_root() => {
            match guarded::way_in(path) {
                Ok(way) if way.is_roots() => bind_or_replace(path, backlog, &Guise::Own),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Err(error),
                _ if users::may_change_user() => {
                    let advice = "the app's user may make no socket there, and root makes one only where others can \
                                  change nothing on the way; give the directory to that user";
                    Err(io::Error::new(error.kind(), format!("{error}: {advice}")))
                }
                _ => Err(error),
            }
        }
        other => other,
    }
}

/// A socket file that nobody listens on is a left-over of a crash; one that somebody listens on is theirs.
fn bind_or_replace(path: &Path, backlog: u32, guise: &Guise) -> io::Result<OwnedFd> {
    match listen::unix(path, 0, backlog, guise) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_left_over(path, guise) => {
            listen::remove_socket(path, guise)?;
            listen::unix(path, 0, backlog, guise)
        }
        other => other,
    }
}

fn is_left_over(path: &Path, guise: &Guise) -> bool {
    // One whose queue is full is somebody's.
    let connected = guise.run(|| pipe::stream_connect(path, Duration::from_millis(100)).map(drop));
    connected.is_err_and(|error| match error.kind() {
        io::ErrorKind::ConnectionRefused => true,
        // Root's, from the time before the app had a user.
        io::ErrorKind::PermissionDenied => holder::of_unix(path).is_ok_and(|holders| holders.is_empty()),
        _ => false,
    })
}

fn by_whom(address: &ListenAddress) -> String {
    let holders = match address {
        ListenAddress::Tcp(at) => holder::of_tcp(*at),
        ListenAddress::Unix(path) => holder::of_unix(&PathBuf::from(path)),
    };
    match holders.unwrap_or_default().first() {
        Some(holder) => format!(" by {} (pid {})", holder.command, holder.pid),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{Permissions, set_permissions};
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};

    use super::*;
    use crate::sys::spawn::Credentials;

    #[test]
    fn a_configured_unix_socket_is_its_users_or_lies_where_nobody_but_root_could_put_it() {
        if !users::may_change_user() {
            return;
        }
        let home = tempfile::tempdir().unwrap();
        let at = |name: &str| home.path().join(name);
        set_permissions(home.path(), Permissions::from_mode(0o755)).unwrap();
        for (name, owner) in [("roots", 0), ("bobs", 54_321), ("deploys", 1000), ("deploys/roots", 0)] {
            std::fs::create_dir(at(name)).unwrap();
            chown(at(name), Some(owner), None).unwrap();
        }
        let credentials = Credentials { uid: 54_321, gid: 54_321, groups: vec![54_321] };
        let bob = Guise::User(credentials);
        let bind = |name: &str| bind_unix(&at(name), 16, &bob);
        for (name, owner) in [("roots/a", 0), ("bobs/a", 54_321)] {
            let socket = bind(name).unwrap();
            assert_eq!(std::fs::metadata(at(name)).unwrap().uid(), owner, "{name}");
            assert_eq!(bind(name).unwrap_err().kind(), io::ErrorKind::AddrInUse, "{name}");
            // Left over.
            drop(socket);
            let socket = bind(name).unwrap();
            listen::unbind(socket.as_fd()).unwrap();
            assert!(!at(name).try_exists().unwrap(), "{name}");
        }
        for name in ["deploys/a", "deploys/roots/a"] {
            let error = bind(name).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{name}");
            assert!(error.to_string().contains("give the directory to that user"), "{error}");
            assert!(!at(name).try_exists().unwrap(), "{name}");
        }
        assert_eq!(bind("missing/a").unwrap_err().kind(), io::ErrorKind::NotFound);
        // From the time before the app had a user: in use, or left over.
        let roots = listen::unix(&at("bobs/b"), 0, 16, &Guise::Own).unwrap();
        assert_eq!(bind("bobs/b").unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(roots);
        bind("bobs/b").unwrap();
        // Nothing listens on a file that is none, and it is nobody's left-over.
        for name in ["roots/file", "bobs/file"] {
            std::fs::write(at(name), "precious").unwrap();
            bind(name).unwrap_err();
            assert_eq!(std::fs::read(at(name)).unwrap(), b"precious");
        }
    }

    #[test]
    fn a_program_that_binds_what_it_should_inherit_is_known_by_its_last_words() {
        let open =
            [ListenAddress::Tcp(([127, 0, 0, 1], 3000).into()), ListenAddress::Unix("/run/web.sock".into())];
        let of = |line: &str| bound_again(open.iter(), &["starting".to_owned(), line.to_owned()]);
        for (line, expected) in [
            ("Error: listen EADDRINUSE: address already in use 127.0.0.1:3000", Some(&open[0])),
            ("listen tcp 127.0.0.1:3000: bind: address already in use", Some(&open[0])),
            (
                "[Errno 98] error while attempting to bind on address ('127.0.0.1', 3000): address already in use",
                Some(&open[0]),
            ),
            ("Error: listen EADDRINUSE: address already in use /run/web.sock", Some(&open[1])),
            ("OSError: [Errno 98] Address already in use", Some(&open[0])),
            ("Os { code: 98, kind: AddrInUse, message: \"Address already in use\" }", Some(&open[0])),
            ("listen tcp 127.0.0.1:9100: bind: address already in use", None),
            ("connection refused 127.0.0.1:3000", None),
        ] {
            assert_eq!(of(line), expected, "{line}");
        }
        assert_eq!(bound_again([].into_iter(), &["Address already in use".to_owned()]), None);
    }
}
