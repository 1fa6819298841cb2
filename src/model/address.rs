//! Addresses of probes, as they are written in a config file.
//!
//! `{NAME}` stands for a variable of the instance's environment; it is replaced before an address is read here.

use std::path::PathBuf;

/// Where a probe goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A host (a name, or an address without brackets) and a port.
    Tcp {
        /// Host.
        host: String,
        /// Port.
        port: u16,
    },
    /// A unix stream socket.
    Unix(PathBuf),
    /// The HTTP server of that very process, by way of its IPC channel.
    Worker,
}

/// An HTTP question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpAddress {
    /// Where it goes.
    pub place: Place,
    /// What it says in `Host`.
    pub host: String,
    /// What it asks for, beginning with `/`.
    pub path: String,
}

/// A text that is no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadAddress {
    /// No TLS is spoken.
    #[error(
        "https is not spoken by probes; ask over a plain port or unix socket of the app's own, by a path alone (Node), or with `exec = [\"curl\", \"-fsS\", …]`"
    )]
    Https,
    /// Of no known form.
    #[error(
        "expected \"http://host:port/path\", \"http://unix:/run/app.sock:/path\" or, for a Node app, a path alone"
    )]
    Http,
    /// Of no known form.
    #[error("expected \"host:port\" or \"unix:/run/app.sock\"")]
    Tcp,
    /// A character that cannot be sent.
    #[error("a path has no spaces and no control characters; write %20 for a space")]
    Path,
}

/// Reads the address of an HTTP probe.
///
/// # Errors
/// When it is none.
pub fn http(text: &str) -> Result<HttpAddress, BadAddress> {
    if text.starts_with("https://") {
        return Err(BadAddress::Https);
    }
    if text.bytes().any(|byte| byte <= b' ' || byte == 0x7f) {
        return Err(BadAddress::Path);
    }
    if text.starts_with('/') {
        return Ok(HttpAddress { place: Place::Worker, host: "localhost".to_owned(), path: text.to_owned() });
    }
    let rest = text.strip_prefix("http://").ok_or(BadAddress::Http)?;
    if let Some(rest) = rest.strip_prefix("unix:") {
        let (socket, path) = rest.split_once(':').unwrap_or((rest, "/"));
        let place = unix(socket).ok_or(BadAddress::Http)?;
        let path = if path.is_empty() { "/" } else { path };
        if !path.starts_with('/') {
            return Err(BadAddress::Http);
        }
        return Ok(HttpAddress { place, host: "localhost".to_owned(), path: path.to_owned() });
    }
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    let place = host_and_port(authority, Some(80)).ok_or(BadAddress::Http)?;
    let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
    Ok(HttpAddress { place, host: authority.to_owned(), path })
}

/// Reads the address of a TCP probe.
///
/// # Errors
/// When it is none.
pub fn tcp(text: &str) -> Result<Place, BadAddress> {
    match text.strip_prefix("unix:") {
        Some(path) => unix(path),
        None => host_and_port(text, None),
    }
    .ok_or(BadAddress::Tcp)
}

fn unix(path: &str) -> Option<Place> {
    (path.starts_with('/') && path.len() > 1).then(|| Place::Unix(path.into()))
}

fn host_and_port(text: &str, default: Option<u16>) -> Option<Place> {
    let (host, port) = if let Some(rest) = text.strip_prefix('[') {
        let (host, rest) = rest.split_once(']')?;
        let port = match rest.strip_prefix(':') {
            Some(port) => Some(port),
            None if rest.is_empty() => None,
            None => return None,
        };
        host.parse::<std::net::Ipv6Addr>().ok()?;
        (host, port)
    } else {
        match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        }
    };
    let port = match port {
        Some(port) if port.bytes().all(|byte| byte.is_ascii_digit()) => {
            port.parse().ok().filter(|port| *port > 0)?
        }
        Some(_) => return None,
        None => default?,
    };
    let named = !host.is_empty() && !host.contains(['@', '/', ' ']);
    named.then(|| Place::Tcp { host: host.to_owned(), port })
}

/// Replaces every `{NAME}` by the variable of that name.
///
/// # Errors
/// The name of a variable that is not there.
pub fn expand<'v>(text: &str, variable: impl Fn(&str) -> Option<&'v str>) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find('{') {
        let name = rest[start + 1..].split_once('}').map(|(name, _)| name).filter(|name| is_name(name));
        let Some(name) = name else {
            out.push_str(&rest[..=start]);
            rest = &rest[start + 1..];
            continue;
        };
        out.push_str(&rest[..start]);
        out.push_str(variable(name).ok_or_else(|| name.to_owned())?);
        rest = &rest[start + name.len() + 2..];
    }
    out.push_str(rest);
    Ok(out)
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(host: &str, port: u16) -> Place {
        Place::Tcp { host: host.to_owned(), port }
    }

    #[test]
    fn http_addresses() {
        for (text, place, path) in [
            ("/healthz", Place::Worker, "/healthz"),
            ("http://127.0.0.1:3000/a?b=c", at("127.0.0.1", 3000), "/a?b=c"),
            ("http://localhost", at("localhost", 80), "/"),
            ("http://[::1]:8080/x", at("::1", 8080), "/x"),
            ("http://h?q", at("h", 80), "/?q"),
            ("http://unix:/run/app-0.sock:/healthz", Place::Unix("/run/app-0.sock".into()), "/healthz"),
            ("http://unix:/run/app.sock", Place::Unix("/run/app.sock".into()), "/"),
        ] {
            let address = http(text).unwrap();
            assert_eq!((address.place, address.path.as_str()), (place, path), "{text}");
        }
        assert_eq!(http("https://127.0.0.1/"), Err(BadAddress::Https));
        assert_eq!(http("/a b"), Err(BadAddress::Path));
        for text in [
            "",
            "healthz",
            "ftp://x/",
            "http://",
            "http://:80/",
            "http://h:port/",
            "http://h:0/",
            "http://h:99999/",
            "http://unix:run.sock",
            "http://unix:/run/a.sock:healthz",
            "http://[::g]:1/",
            "http://[::1]x/",
        ] {
            assert_eq!(http(text), Err(BadAddress::Http), "{text}");
        }
    }

    #[test]
    fn tcp_addresses() {
        assert_eq!(tcp("127.0.0.1:80"), Ok(at("127.0.0.1", 80)));
        assert_eq!(tcp("[::1]:80"), Ok(at("::1", 80)));
        assert_eq!(tcp("unix:/a"), Ok(Place::Unix("/a".into())));
        for text in ["80", "h", "h:", "unix:", "unix:a", "http://h:1/"] {
            assert_eq!(tcp(text), Err(BadAddress::Tcp), "{text}");
        }
    }

    #[test]
    fn names_in_braces_are_variables() {
        let variable = |name: &str| (name == "PORT").then_some("3001");
        assert_eq!(expand("http://h:{PORT}/x", variable).unwrap(), "http://h:3001/x");
        assert_eq!(expand("/a{1,2}{", variable).unwrap(), "/a{1,2}{");
        assert_eq!(expand("{PROT}", variable), Err("PROT".to_owned()));
    }
}
