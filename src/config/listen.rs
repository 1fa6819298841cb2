//! `listen = […]`: the addresses whose sockets instances inherit.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

use super::error::{At, Place, Problem, quoted};
use super::paths;
use super::value::Value;
use crate::model::spec::{ListenAddress, ListenSpec};

/// listen(2)'s backlog unless configured: Node's.
pub const DEFAULT_BACKLOG: u32 = 511;
/// sun_path of unix(7) holds 108 bytes with the NUL at the end.
const UNIX_PATH_MAX: usize = 107;
const NAME_MAX: usize = 64;

/// One entry of `listen`, as written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenConfig {
    /// Where to listen.
    pub address: At<ListenText>,
    /// The name of the descriptor; by default the port or the socket's file stem.
    pub name: Option<At<String>>,
    /// listen(2)'s backlog.
    pub backlog: Option<u32>,
    /// Leave O_NONBLOCK off.
    pub blocking: Option<bool>,
}

/// An address before relative paths are resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenText {
    /// IP and port.
    Tcp(SocketAddr),
    /// A path, relative to the app's `cwd`.
    Unix(String),
}

/// Why a text is no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadAddress {
    /// Not of any known form.
    #[error("{0} is no address; use \"3000\", \"127.0.0.1:3000\", \"[::1]:3000\" or \"unix:/run/app.sock\"")]
    Form(String),
    /// A port that is no number up to 65535.
    #[error("{0} is no port; allowed: 0 to 65535 (0 lets the kernel choose)")]
    Port(String),
    /// A name that would have to be looked up.
    #[error("{0} is a host name; an address to listen on is an IP address, such as 127.0.0.1 or [::]")]
    Host(String),
    /// IPv6 without brackets.
    #[error("an IPv6 address stands in brackets: \"[{0}]:3000\"")]
    Brackets(String),
    /// `unix:` without a path.
    #[error("a path has to follow \"unix:\"")]
    NoPath,
}

impl std::str::FromStr for ListenText {
    type Err = BadAddress;

    /// A port alone (`3000`, `:3000`) means every address, IPv6 and IPv4: `[::]:3000`, as Node and Go do it.
    fn from_str(text: &str) -> Result<Self, BadAddress> {
        let text = text.trim();
        if let Some(path) = text.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            return if path.is_empty() { Err(BadAddress::NoPath) } else { Ok(Self::Unix(path.to_owned())) };
        }
        let text = text.strip_prefix("tcp://").unwrap_or(text);
        if let Ok(address) = text.parse::<SocketAddr>() {
            return Ok(Self::Tcp(address));
        }
        if text.parse::<Ipv6Addr>().is_ok() {
            return Err(BadAddress::Brackets(text.to_owned()));
        }
        let (host, port) = text.rsplit_once(':').unwrap_or(("", text));
        if host.is_empty() && !text.contains(':') && !port.starts_with(|c: char| c.is_ascii_digit()) {
            return Err(BadAddress::Form(quoted(text)));
        }
        let ip: IpAddr = match host {
            "" | "*" => Ipv6Addr::UNSPECIFIED.into(),
            "localhost" => Ipv4Addr::LOCALHOST.into(),
            host => {
                let bare = host.trim_start_matches('[').trim_end_matches(']');
                bare.parse().map_err(|_| {
                    if host.starts_with('[') || host.contains(['/', ' ']) {
                        BadAddress::Form(quoted(text))
                    } else {
                        BadAddress::Host(quoted(host))
                    }
                })?
            }
        };
        if port.is_empty() || !port.bytes().all(|b| b.is_ascii_digit()) {
            return Err(BadAddress::Port(quoted(port)));
        }
        let port = port.parse().map_err(|_| BadAddress::Port(quoted(port)))?;
        Ok(Self::Tcp(SocketAddr::new(ip, port)))
    }
}

/// The keys of a listener written as a table.
pub const TABLE_KEYS: [(&str, &str); 4] = [
    ("address", "Where to listen; required."),
    ("name", "The name in LISTEN_FDNAMES, PM_LISTEN_FD_<NAME> and {fd:NAME}."),
    ("backlog", "How many connections may wait, 1 to 65535."),
    ("blocking", "Leave O_NONBLOCK off, for servers that expect a blocking accept."),
];

/// Reads the whole key: one entry or an array of them.
pub(super) fn read(value: Value<'_, '_>) -> Result<Vec<ListenConfig>, Problem> {
    value.items().into_iter().map(read_one).collect()
}

fn read_one(value: Value<'_, '_>) -> Result<ListenConfig, Problem> {
    let Some(table) = value.table() else {
        return Ok(ListenConfig { address: read_address(value)?, name: None, backlog: None, blocking: None });
    };
    let (mut address, mut name, mut backlog, mut blocking) = (None, None, None, None);
    for (key, entry) in table {
        let entry = Value::new(entry);
        match &**key.get_ref() {
            "address" => address = Some(read_address(entry)?),
            "name" => name = Some(entry.at(read_name(entry)?)),
            "backlog" => backlog = Some(entry.count(1..=65_535)?),
            "blocking" => blocking = Some(entry.boolean()?),
            other => {
                let known = TABLE_KEYS.map(|(key, _)| key);
                return Err(Problem::new(
                    Place::Text(key.span()),
                    format!("unknown key {} of a listener; known are {}", quoted(other), known.join(", ")),
                )
                .did_you_mean(other, known));
            }
        }
    }
    let address = address.ok_or_else(|| value.problem("a listener needs an `address`"))?;
    Ok(ListenConfig { address, name, backlog, blocking })
}

fn read_address(value: Value<'_, '_>) -> Result<At<ListenText>, Problem> {
    let text = if value.is_integer() { value.text() } else { value.filled()? };
    text.parse()
        .map(|address| value.at(address))
        .map_err(|error: BadAddress| value.problem(error.to_string()))
}

fn read_name(value: Value<'_, '_>) -> Result<String, Problem> {
    let name = value.filled()?;
    let fits = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    if name.len() > NAME_MAX || !name.chars().all(fits) {
        return Err(value.problem(format!(
            "{} is no name of a listener; use up to {NAME_MAX} letters, digits and _ - .",
            quoted(&name)
        )));
    }
    Ok(name)
}

/// Makes the listeners of an app: paths absolute, names given to those without one, each name once.
pub(super) fn resolve(
    entries: &[ListenConfig],
    cwd: &Path,
    home: Option<&Path>,
    problems: &mut Vec<Problem>,
) -> Vec<At<ListenSpec>> {
    let mut listeners: Vec<At<ListenSpec>> = Vec::new();
    // Given names first: a default name steps aside for one that somebody chose.
    let given: Vec<&str> = entries.iter().filter_map(|e| e.name.as_ref()).map(|n| n.value.as_str()).collect();
    for entry in entries {
        let address = match &entry.address.value {
            ListenText::Tcp(address) => ListenAddress::Tcp(*address),
            ListenText::Unix(path) => {
                let path = paths::absolute_from_home(cwd, home, path);
                if path.as_os_str().len() > UNIX_PATH_MAX {
                    problems.push(Problem::new(
                        entry.address.place.clone(),
                        format!(
                            "the path {} is too long for a socket (at most {UNIX_PATH_MAX} bytes)",
                            path.display()
                        ),
                    ));
                }
                ListenAddress::Unix(path)
            }
        };
        let name = match &entry.name {
            Some(name) => {
                if let Some(twin) = listeners.iter().find(|l| l.value.name == name.value) {
                    problems.push(
                        Problem::new(
                            name.place.clone(),
                            format!("two listeners have the name {:?}", name.value),
                        )
                        .with(twin.place.clone(), "the first is here"),
                    );
                }
                name.value.clone()
            }
            None => {
                let taken =
                    |name: &str| given.contains(&name) || listeners.iter().any(|l| l.value.name == name);
                let base = default_name(&address);
                let mut name = base.clone();
                let mut number = 2;
                while taken(&name) {
                    name = format!("{base}-{number}");
                    number += 1;
                }
                name
            }
        };
        let spec = ListenSpec {
            name,
            address,
            backlog: entry.backlog.unwrap_or(DEFAULT_BACKLOG),
            blocking: entry.blocking.unwrap_or(false),
        };
        listeners.push(At::new(spec, entry.address.place.clone()));
    }
    listeners
}

fn default_name(address: &ListenAddress) -> String {
    match address {
        ListenAddress::Tcp(address) => address.port().to_string(),
        ListenAddress::Unix(path) => {
            let stem = path.file_stem().map(|stem| stem.to_string_lossy()).unwrap_or_default();
            let fits = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
            stem.chars().map(|c| if fits(c) { c } else { '-' }).take(NAME_MAX).collect()
        }
    }
}

/// Whether a second bind(2) would fail, or would take connections from the first.
#[must_use]
pub fn collide(a: &ListenAddress, b: &ListenAddress) -> bool {
    match (a, b) {
        (ListenAddress::Unix(a), ListenAddress::Unix(b)) => a == b,
        (ListenAddress::Tcp(a), ListenAddress::Tcp(b)) => {
            let dual = |address: &SocketAddr| address.ip() == IpAddr::from(Ipv6Addr::UNSPECIFIED);
            let any = |address: &SocketAddr| address.ip().is_unspecified();
            // The kernel chooses another port for every 0.
            a.port() == b.port()
                && a.port() != 0
                && (a.ip() == b.ip()
                    || dual(a)
                    || dual(b)
                    || ((any(a) || any(b)) && a.is_ipv4() == b.is_ipv4()))
        }
        (ListenAddress::Tcp(_), ListenAddress::Unix(_)) | (ListenAddress::Unix(_), ListenAddress::Tcp(_)) => {
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_in_every_spelling() {
        for (text, expected) in [
            ("3000", "[::]:3000"),
            (":3000", "[::]:3000"),
            ("*:3000", "[::]:3000"),
            ("0.0.0.0:3000", "0.0.0.0:3000"),
            ("[::1]:80", "[::1]:80"),
            ("localhost:0", "127.0.0.1:0"),
            ("tcp://127.0.0.1:1", "127.0.0.1:1"),
        ] {
            assert_eq!(text.parse(), Ok(ListenText::Tcp(expected.parse().unwrap())), "{text}");
        }
        assert_eq!("unix:run/a.sock".parse(), Ok(ListenText::Unix("run/a.sock".to_owned())));
        assert_eq!("unix:///run/a.sock".parse(), Ok(ListenText::Unix("/run/a.sock".to_owned())));
        for (text, message) in [
            ("web", "is no address"),
            ("example.com:80", "is a host name"),
            ("127.0.0.1:65536", "is no port"),
            ("127.0.0.1:", "is no port"),
            ("70000", "is no port"),
            ("::1", "stands in brackets"),
            ("unix:", "a path has to follow"),
            ("[zz]:1", "is no address"),
        ] {
            let error = text.parse::<ListenText>().unwrap_err().to_string();
            assert!(error.contains(message), "{text}: {error}");
        }
    }

    #[test]
    fn addresses_that_collide() {
        let tcp = |text: &str| ListenAddress::Tcp(text.parse().unwrap());
        for (a, b, expected) in [
            ("127.0.0.1:80", "127.0.0.1:80", true),
            ("0.0.0.0:80", "127.0.0.1:80", true),
            ("[::]:80", "127.0.0.1:80", true),
            ("[::]:80", "[::1]:80", true),
            ("0.0.0.0:80", "[::1]:80", false),
            ("127.0.0.1:80", "127.0.0.2:80", false),
            ("127.0.0.1:80", "127.0.0.1:81", false),
            ("127.0.0.1:0", "127.0.0.1:0", false),
        ] {
            assert_eq!(collide(&tcp(a), &tcp(b)), expected, "{a} {b}");
            assert_eq!(collide(&tcp(b), &tcp(a)), expected, "{b} {a}");
        }
    }
}
