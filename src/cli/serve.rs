//! `pm serve`: a small static file server, and an app that does everything pm asks of one.
//!
//! It listens on the socket it inherits (`LISTEN_FDS`) or binds its own, says when it is ready on every channel there
//! is, and ends without cutting a request: after SIGINT or SIGTERM it stops accepting, answers what is in flight and
//! what still arrives on open connections with `Connection: close`, and exits when the last one is closed. An idle
//! connection is closed `KEEP_ALIVE` after its last request in any case, so that is how long this takes at most,
//! unless a download is slow; then `DRAIN_LIMIT` ends it.
//!
//! Never: a file outside the directory by way of the URL, a file whose name begins with a dot (`.well-known` excepted),
//! a directory listing.

use std::convert::Infallible;
use std::fs;
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net as unix;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, Method, Request, Response, StatusCode, header};
use clap::Args;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use nix::sys::socket::{AddressFamily, SockaddrLike as _, SockaddrStorage, getsockname};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};
use tower_http::services::ServeDir;

use crate::sys::inherited;

/// How long a connection may be idle, or take to send the head of a request. Node's value.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// From the signal to the end, whatever clients do. Below the default `kill_timeout` of 10 s.
const DRAIN_LIMIT: Duration = Duration::from_secs(9);
/// How long accepting pauses when the process or the host is out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What to serve, and where.
#[derive(Args, Clone, Debug)]
pub struct ServeOptions {
    /// The directory to serve.
    #[arg(default_value = ".", env = "PM_SERVE_PATH")]
    pub path: PathBuf,
    /// The port to listen on, unless a listening socket is inherited. 0 lets the kernel choose.
    #[arg(value_name = "PORT", default_value_t = 8080, env = "PM_SERVE_PORT")]
    pub port: u16,
    /// The port, as an option; counts more than the argument.
    #[arg(long = "port", value_name = "PORT")]
    pub port_option: Option<u16>,
    /// The address to listen on, unless a listening socket is inherited.
    #[arg(long, default_value = "0.0.0.0", env = "PM_SERVE_HOST")]
    pub host: String,
    /// Answer paths that are no file with index.html, for single page apps.
    #[arg(long, env = "PM_SERVE_SPA")]
    pub spa: bool,
    /// Ask for this user name.
    #[arg(long, requires = "basic_auth_password", env = "PM_SERVE_BASIC_AUTH_USERNAME")]
    pub basic_auth_username: Option<String>,
    /// Ask for this password. Give it in PM_SERVE_BASIC_AUTH_PASSWORD: arguments can be read by every user.
    #[arg(
        long,
        requires = "basic_auth_username",
        env = "PM_SERVE_BASIC_AUTH_PASSWORD",
        hide_env_values = true
    )]
    pub basic_auth_password: Option<String>,
}

/// Why nothing is served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The path is missing, not a directory, or not readable.
    #[error("cannot serve {path:?}")]
    Directory {
        /// As it was given.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The host name means nothing, or the port is taken.
    #[error("cannot listen on {host}:{port}")]
    Bind {
        /// As it was given.
        host: String,
        /// As it was given.
        port: u16,
        /// What the kernel said.
        source: io::Error,
    },
    /// LISTEN_FDS names something that cannot be accepted from.
    #[error("cannot use the inherited listening socket")]
    Inherited(#[source] io::Error),
    /// NOTIFY_SOCKET or PM_READY_FD is set, but takes nothing.
    #[error("cannot say that the server is ready")]
    Ready(#[source] io::Error),
    /// No runtime, no signal handler, or a standard output that takes nothing.
    #[error("cannot start the server")]
    Start(#[source] io::Error),
}

/// Serves until SIGINT or SIGTERM, then drains.
///
/// # Errors
/// [`ServeError`], before anything was served.
pub fn run(options: ServeOptions) -> Result<(), ServeError> {
    // One thread: whoever needs more runs more instances.
    // The blocking threads open and read files; each costs memory, and two keep a disk busy.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .max_blocking_threads(2)
        .enable_all()
        .build()
        .map_err(ServeError::Start)?;
    runtime.block_on(serve(options))
}

async fn serve(options: ServeOptions) -> Result<(), ServeError> {
    let site = Arc::new(Site::new(&options)?);
    let listeners = listeners(&options).await?;
    // Before "ready": a signal that arrives right after it must find the handlers in place.
    let mut interrupt = signal(SignalKind::interrupt()).map_err(ServeError::Start)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(ServeError::Start)?;

    announce(&options.path, &listeners).map_err(ServeError::Start)?;
    let (draining_tx, draining_rx) = watch::channel(false);
    let (alive_tx, mut alive_rx) = mpsc::channel::<Infallible>(1);
    for listener in listeners {
        let door = Door { site: Arc::clone(&site), draining: draining_rx.clone(), alive: alive_tx.clone() };
        tokio::spawn(door.accept(listener));
    }
    drop(alive_tx);
    say_ready().map_err(ServeError::Ready)?;

    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    draining_tx.send_replace(true);
    // Nobody ever sends: the channel closes when the last connection has dropped its end.
    let _ = timeout(DRAIN_LIMIT, alive_rx.recv()).await;
    Ok(())
}

/// A listening socket, and whether other processes accept from it too.
#[derive(Debug)]
enum Listener {
    Tcp(TcpListener, Origin),
    Unix(UnixListener, Origin),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// Stays open in whoever handed it out: what is queued there is served by others.
    Inherited,
    /// Ends with us, and with it the connections in its queue, so they are accepted first.
    Own,
}

impl Listener {
    fn from_inherited(fd: OwnedFd) -> io::Result<Self> {
        let address: SockaddrStorage = getsockname(std::os::fd::AsRawFd::as_raw_fd(&fd))?;
        if address.family() == Some(AddressFamily::Unix) {
            let listener = unix::UnixListener::from(fd);
            listener.set_nonblocking(true)?;
            return Ok(Self::Unix(UnixListener::from_std(listener)?, Origin::Inherited));
        }
        let listener = std::net::TcpListener::from(fd);
        listener.set_nonblocking(true)?;
        Ok(Self::Tcp(TcpListener::from_std(listener)?, Origin::Inherited))
    }

    const fn origin(&self) -> Origin {
        match self {
            Self::Tcp(_, origin) | Self::Unix(_, origin) => *origin,
        }
    }

    /// The next connection in the queue; `WouldBlock` when it is empty.
    fn accept_queued(&self) -> io::Result<Stream> {
        let fd = match self {
            Self::Tcp(listener, _) => listener.as_fd(),
            Self::Unix(listener, _) => listener.as_fd(),
        };
        let fd = fd.try_clone_to_owned()?;
        match self {
            Self::Tcp(..) => {
                let (stream, _) = std::net::TcpListener::from(fd).accept()?;
                stream.set_nonblocking(true)?;
                tokio::net::TcpStream::from_std(stream).map(Stream::Tcp)
            }
            Self::Unix(..) => {
                let (stream, _) = unix::UnixListener::from(fd).accept()?;
                stream.set_nonblocking(true)?;
                tokio::net::UnixStream::from_std(stream).map(Stream::Unix)
            }
        }
    }

    fn url(&self) -> String {
        match self {
            Self::Tcp(listener, _) => {
                listener.local_addr().map_or_else(|error| error.to_string(), |at| format!("http://{at}"))
            }
            Self::Unix(listener, _) => {
                let address = listener.local_addr();
                let path = address.as_ref().ok().and_then(|address| address.as_pathname());
                path.map_or_else(|| "a unix socket".to_owned(), |path| format!("unix:{}", path.display()))
            }
        }
    }
}

async fn listeners(options: &ServeOptions) -> Result<Vec<Listener>, ServeError> {
    let inherited = inherited::listeners().map_err(ServeError::Inherited)?;
    if !inherited.is_empty() {
        let listeners: io::Result<_> = inherited.into_iter().map(Listener::from_inherited).collect();
        return listeners.map_err(ServeError::Inherited);
    }
    let port = options.port_option.unwrap_or(options.port);
    match TcpListener::bind((options.host.as_str(), port)).await {
        Ok(listener) => Ok(vec![Listener::Tcp(listener, Origin::Own)]),
        Err(source) => Err(ServeError::Bind { host: options.host.clone(), port, source }),
    }
}

/// The one line on standard output.
fn announce(path: &Path, listeners: &[Listener]) -> io::Result<()> {
    let urls: Vec<String> = listeners.iter().map(Listener::url).collect();
    let slot =
        std::env::var("NODE_APP_INSTANCE").map_or_else(|_| String::new(), |slot| format!(", slot {slot}"));
    let (path, urls, pid) = (path.display(), urls.join(" "), std::process::id());
    writeln!(io::stdout(), "serving {path} at {urls} (pid {pid}{slot})")
}

/// Says "ready" wherever somebody may be waiting for it.
fn say_ready() -> io::Result<()> {
    if let Some(name) = std::env::var_os("NOTIFY_SOCKET") {
        let socket = unix::UnixDatagram::unbound()?;
        let bytes = name.as_encoded_bytes();
        let address = match bytes.strip_prefix(b"@") {
            Some(name) => unix::SocketAddr::from_abstract_name(name)?,
            None => unix::SocketAddr::from_pathname(&name)?,
        };
        socket.send_to_addr(b"READY=1", &address)?;
    }
    if let Some(pipe) = inherited::ready_pipe()? {
        fs::File::from(pipe).write_all(b"\n")?;
    }
    Ok(())
}

/// What one listener's connections need.
#[derive(Clone)]
struct Door {
    site: Arc<Site>,
    draining: watch::Receiver<bool>,
    /// Held while a connection is open.
    alive: mpsc::Sender<Infallible>,
}

impl Door {
    async fn accept(mut self, listener: Listener) {
        loop {
            let accepted = tokio::select! {
                biased;
                _ = self.draining.wait_for(|&draining| draining) => break,
                accepted = accept(&listener) => accepted,
            };
            if let Err(error) = self.admit(accepted)
                && !is_about_one_connection(&error)
            {
                sleep(ACCEPT_PAUSE).await;
            }
        }
        if listener.origin() == Origin::Own {
            // Past tokio, whose knowledge of the queue may be a turn old.
            while let Ok(stream) = listener.accept_queued() {
                let _ = self.admit(Ok(stream));
            }
        }
    }

    fn admit(&self, accepted: io::Result<Stream>) -> io::Result<()> {
        match accepted? {
            Stream::Tcp(stream) => {
                // Without it the last piece of a response waits for an acknowledgement of the one before.
                let _ = stream.set_nodelay(true);
                tokio::spawn(self.clone().converse(stream));
            }
            Stream::Unix(stream) => {
                tokio::spawn(self.clone().converse(stream));
            }
        }
        Ok(())
    }

    async fn converse(self, stream: impl AsyncRead + AsyncWrite + Unpin + 'static) {
        let Self { site, draining, alive } = self;
        let service = service_fn(move |request: Request<Incoming>| {
            let (site, draining) = (Arc::clone(&site), draining.clone());
            async move {
                let mut response = site.answer(request).await;
                // hyper closes the connection after a response that says so. Read when the answer is ready, not when
                // the request came.
                if *draining.borrow() {
                    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
                }
                Ok::<_, Infallible>(response)
            }
        });
        // The time limit for a request's head also runs while a connection is idle: it is the keep-alive timeout.
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(KEEP_ALIVE)
            .max_buf_size(64 * 1024)
            .serve_connection(TokioIo::new(stream), service);
        // Clients that vanish, stay silent or talk nonsense end their own connection and nothing else.
        let _ = connection.await;
        drop(alive);
    }
}

enum Stream {
    Tcp(tokio::net::TcpStream),
    Unix(tokio::net::UnixStream),
}

async fn accept(listener: &Listener) -> io::Result<Stream> {
    match listener {
        Listener::Tcp(listener, _) => listener.accept().await.map(|(stream, _)| Stream::Tcp(stream)),
        Listener::Unix(listener, _) => listener.accept().await.map(|(stream, _)| Stream::Unix(stream)),
    }
}

/// accept(2) also reports errors of the connection it would have returned.
fn is_about_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// The directory and the rules under which it is shown.
#[derive(Debug)]
struct Site {
    files: ServeDir,
    is_spa: bool,
    /// The one value of `Authorization` that is let in, without the scheme.
    credentials: Option<String>,
}

impl Site {
    fn new(options: &ServeOptions) -> Result<Self, ServeError> {
        let path = &options.path;
        fs::read_dir(path).map_err(|source| ServeError::Directory { path: path.clone(), source })?;
        let credentials = options
            .basic_auth_username
            .as_ref()
            .zip(options.basic_auth_password.as_ref())
            .map(|(user, password)| base64(format!("{user}:{password}").as_bytes()));
        Ok(Self { files: ServeDir::new(path), is_spa: options.spa, credentials })
    }

    async fn answer<B: Send + 'static>(&self, request: Request<B>) -> Response<Body> {
        if !self.lets_in(&request) {
            let mut response = plain(StatusCode::UNAUTHORIZED);
            let challenge = HeaderValue::from_static("Basic realm=\"pm serve\", charset=\"UTF-8\"");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
            return response;
        }
        if is_hidden(request.uri().path()) {
            return plain(StatusCode::NOT_FOUND);
        }
        let index = self.index_request(&request);
        let response = match (self.file(request).await, index) {
            (response, Some(index)) if response.status() == StatusCode::NOT_FOUND => self.file(index).await,
            (response, _) => response,
        };
        match response.status() {
            status @ (StatusCode::NOT_FOUND | StatusCode::INTERNAL_SERVER_ERROR) => plain(status),
            _ => response,
        }
    }

    async fn file<B: Send + 'static>(&self, request: Request<B>) -> Response<Body> {
        use io::ErrorKind::{InvalidFilename, NotADirectory, NotFound, PermissionDenied};
        // The clone is a path and a few flags; the service keeps no state between requests.
        match self.files.clone().try_call(request).await {
            Ok(response) => response.map(Body::new),
            // What must not be read is not there, as far as the world is concerned.
            Err(error) => plain(match error.kind() {
                NotFound | NotADirectory | PermissionDenied | InvalidFilename => StatusCode::NOT_FOUND,
                _ => StatusCode::INTERNAL_SERVER_ERROR,
            }),
        }
    }

    /// What to ask for instead when the path is no file: the single page. A name with a dot is meant to be a file;
    /// HTML in place of a missing script only moves the error to where nobody finds it.
    fn index_request<B>(&self, request: &Request<B>) -> Option<Request<Body>> {
        let name = request.uri().path().rsplit('/').next().unwrap_or_default();
        if !self.is_spa || name.contains('.') || !matches!(*request.method(), Method::GET | Method::HEAD) {
            return None;
        }
        let mut index = Request::new(Body::empty());
        *index.method_mut() = request.method().clone();
        *index.uri_mut() = axum::http::Uri::from_static("/index.html");
        *index.headers_mut() = request.headers().clone();
        Some(index)
    }

    fn lets_in<B>(&self, request: &Request<B>) -> bool {
        let Some(expected) = &self.credentials else { return true };
        let given = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let Some((scheme, given)) = given.and_then(|value| value.split_once(' ')) else { return false };
        scheme.eq_ignore_ascii_case("basic") && is_equal(given.trim().as_bytes(), expected.as_bytes())
    }
}

/// Compares in a time that depends on the lengths only.
fn is_equal(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}

/// RFC 4648, section 4.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let at = |index: usize| u32::from(chunk.get(index).copied().unwrap_or(0));
        let group = at(0) << 16 | at(1) << 8 | at(2);
        for sextet in 0..4 {
            let index = (group >> (18 - 6 * sextet)) & 63;
            let has_bits = sextet <= chunk.len();
            text.push(if has_bits { char::from(ALPHABET[index as usize]) } else { '=' });
        }
    }
    text
}

/// Whether a path, once decoded, names a dot file or something in a dot directory: `.git`, `.env` and the like.
/// `.well-known` (RFC 8615) is meant to be seen.
fn is_hidden(path: &str) -> bool {
    let decoded = percent_decoded(path);
    decoded.split(|&byte| byte == b'/').any(|part| part.starts_with(b".") && part != b".well-known")
}

fn percent_decoded(path: &str) -> Vec<u8> {
    let hex = |byte: Option<&u8>| char::from(*byte?).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let bytes = path.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        if byte == b'%'
            && let (Some(high), Some(low)) = (hex(bytes.get(at + 1)), hex(bytes.get(at + 2)))
        {
            decoded.push(high << 4 | low);
            at += 3;
        } else {
            decoded.push(byte);
            at += 1;
        }
    }
    decoded
}

/// A page that only says what its status is.
fn plain(status: StatusCode) -> Response<Body> {
    let text = format!("{} {}\n", status.as_u16(), status.canonical_reason().unwrap_or("").to_lowercase());
    let mut response = Response::new(Body::from(text));
    *response.status_mut() = status;
    let content_type = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, content_type);
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_of_the_rfc() {
        for (bytes, expected) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
        ] {
            assert_eq!(base64(bytes.as_bytes()), expected);
        }
    }

    #[test]
    fn dot_files_stay_hidden_however_they_are_spelled() {
        for (path, expected) in [
            ("/index.html", false),
            ("/a.b/c", false),
            ("/.well-known/acme", false),
            ("/.env", true),
            ("/%2eenv", true),
            ("/a%2F.git/config", true),
            ("/../etc/passwd", true),
            ("/%2e%2E/x", true),
            ("/100%", false),
        ] {
            assert_eq!(is_hidden(path), expected, "{path}");
        }
    }
}
