//! Asking an instance how it is: HTTP, TCP, a program. (Log probes are answered by the log pump.)
//!
//! One task for each instance that is asked, which asks one question after the other and never two at once. Says what it
//! heard and decides nothing: what the answers mean is the fleet's.

use std::ffi::CString;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::Duration;

use hyper::body::Body;
use hyper::header::{CONNECTION, HOST, USER_AGENT};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::mpsc::UnboundedSender;
use tokio::task::AbortHandle;

use super::driver::Input;
use super::launch;
use super::rights::Rights;
use super::variables::Variables;
use crate::model::address::{self, HttpAddress, Place};
use crate::model::id::InstanceId;
use crate::model::moment::{Moment, spelled};
use crate::model::process::ProcessRules;
use crate::model::spec::{Check, Probe};
use crate::policy::vocabulary::{ProbeResult, ProbeRole};
use crate::sys::clock;
use crate::sys::helper::{Bounds, Ended, Helper, Question};
use crate::sys::limits::{self, Limit};

/// How much of a body or of a program's output is kept, in bytes.
pub const KEPT: usize = 200;

/// The first pause of a readiness probe; it grows up to the interval. Most instances boot faster than an interval.
const FIRST_PAUSE: Duration = Duration::from_millis(50);

/// How long the rest of a body is awaited once the answer is known.
const BODY_WITHIN: Duration = Duration::from_millis(200);

/// Who is asked, and what.
#[derive(Clone, Debug)]
pub struct Subject {
    /// Which run.
    pub id: InstanceId,
    /// What for.
    pub role: ProbeRole,
    /// How.
    pub probe: Probe,
    /// The instance's environment.
    pub env: Variables,
    /// The app's working directory.
    pub cwd: PathBuf,
    /// Its main process.
    pub pid: Option<u32>,
    /// What it may.
    pub process: ProcessRules,
    /// The control group that it is in.
    pub group: Option<PathBuf>,
    /// The limit on open files that it was started with, but for its own rules.
    pub open_files: Limit,
}

/// What an instance answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Which run.
    pub id: InstanceId,
    /// What it was asked for.
    pub role: ProbeRole,
    /// How it went.
    pub result: ProbeResult,
    /// In one line: `GET /healthz → 503 'db not connected'`.
    pub text: String,
    /// When the answer came.
    pub at: Moment,
    /// How long it took.
    pub took: Duration,
}

/// Asks again and again, until the task is aborted: then a program that is running is ended too.
pub fn start(subject: Subject, delay: Duration, inputs: UnboundedSender<Input>) -> AbortHandle {
    let task = tokio::spawn(async move {
        tokio::time::sleep(delay).await;
        let interval = subject.probe.interval;
        let mut pause = match subject.role {
            ProbeRole::Ready => FIRST_PAUSE.min(interval),
            ProbeRole::Health => interval,
        };
        loop {
            let answer = ask(&subject, &inputs).await;
            // Fails only when the driver has ended.
            if inputs.send(Input::Probed(Box::new(answer))).is_err() {
                return;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 3 / 2).min(interval);
        }
    });
    task.abort_handle()
}

async fn ask(subject: &Subject, inputs: &UnboundedSender<Input>) -> Finding {
    let begin = clock::now();
    let (what, outcome) = match &subject.probe.check {
        Check::Http(text) => http(subject, text, inputs).await,
        Check::Tcp(text) => tcp(subject, text).await,
        Check::Exec(argv) => exec(subject, argv).await,
        // Never asked: the log pump answers by itself.
        Check::Log(pattern) => (format!("log /{pattern}/"), Err("no line yet".to_owned())),
    };
    let at = clock::now();
    let (result, heard) = match outcome {
        Ok(heard) => (ProbeResult::Passed, heard),
        Err(heard) => (ProbeResult::Failed, heard),
    };
    let Subject { id, role, .. } = subject;
    Finding {
        id: id.clone(),
        role: *role,
        result,
        text: format!("{what} → {heard}"),
        at,
        took: at.since(begin),
    }
}

/// What was asked, and what was heard.
type Heard = (String, Result<String, String>);

/// The same, within the probe's time.
async fn within(
    limit: Duration,
    work: impl Future<Output = Result<String, String>>,
) -> Result<String, String> {
    match tokio::time::timeout(limit, work).await {
        Ok(heard) => heard,
        Err(_) => Err(format!("no answer within {}", spelled(limit))),
    }
}

fn expanded(env: &Variables, text: &str) -> Result<String, String> {
    let variable = |name: &str| env.iter().find(|(key, _)| *key == name).map(|(_, value)| value);
    address::expand(text, variable).map_err(|name| format!("the instance has no variable {name}"))
}

fn http_address(env: &Variables, text: &str) -> Result<HttpAddress, String> {
    address::http(&expanded(env, text)?).map_err(|error| error.to_string())
}

fn tcp_place(env: &Variables, text: &str) -> Result<Place, String> {
    address::tcp(&expanded(env, text)?).map_err(|error| error.to_string())
}

/// Where an instance with this environment is asked; `None`: nowhere.
///
/// # Errors
/// In words, when the address is none with this environment.
pub fn place(check: &Check, env: &Variables) -> Result<Option<Place>, String> {
    match check {
        Check::Http(text) => Ok(Some(http_address(env, text)?.place)),
        Check::Tcp(text) => Ok(Some(tcp_place(env, text)?)),
        Check::Exec(_) | Check::Log(_) => Ok(None),
    }
}

/// What is said of an address is what the config has: a variable may be a secret.
async fn http(subject: &Subject, text: &str, inputs: &UnboundedSender<Input>) -> Heard {
    let what = format!("GET {text}");
    let address = match http_address(&subject.env, text) {
        Ok(address) => address,
        Err(error) => return (what, Err(error)),
    };
    let heard = within(subject.probe.timeout, async {
        match &address.place {
            Place::Tcp { host, port } => {
                let stream = connect(host, *port).await.map_err(|error| plain(&error))?;
                get(stream, &address.host, &address.path).await
            }
            Place::Unix(path) => {
                let stream = UnixStream::connect(path).await.map_err(|error| plain(&error))?;
                get(stream, &address.host, &address.path).await
            }
            Place::Worker => {
                let ours = hand_over(&subject.id, inputs).map_err(|error| plain(&error))?;
                get(ours, &address.host, &address.path).await.map_err(|error| match &*error {
                    // The agent has closed it, or nobody has taken the one before.
                    CLOSED => {
                        "the app has no HTTP server that listens, or its event loop is blocked".to_owned()
                    }
                    _ => error,
                })
            }
        }
    })
    .await;
    (what, heard)
}

/// A connection to the very process of this instance: its end goes over the IPC channel to the agent.
fn hand_over(id: &InstanceId, inputs: &UnboundedSender<Input>) -> io::Result<UnixStream> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    theirs.set_nonblocking(true)?;
    let _ = inputs.send(Input::HandProbe { id: id.clone(), socket: OwnedFd::from(theirs) });
    UnixStream::from_std(ours)
}

/// A name is looked up by a thread; the usual one needs none.
async fn connect(host: &str, port: u16) -> io::Result<TcpStream> {
    if host == "localhost" {
        return match TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await {
            Ok(stream) => Ok(stream),
            Err(_) => TcpStream::connect((Ipv6Addr::LOCALHOST, port)).await,
        };
    }
    TcpStream::connect((host, port)).await
}

/// The connection ended without an answer.
const CLOSED: &str = "the connection was closed without an answer";

/// A GET; redirects are not followed. 2xx and 3xx are good.
async fn get(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send,
    host: &str,
    path: &str,
) -> Result<String, String> {
    let said = |error: hyper::Error| {
        if error.is_incomplete_message() || error.is_closed() || error.is_canceled() {
            CLOSED.to_owned()
        } else if error.is_parse() {
            "an answer that is no HTTP/1".to_owned()
        } else {
            match std::error::Error::source(&error) {
                Some(cause) => match cause.downcast_ref::<io::Error>().map(io::Error::kind) {
                    Some(io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe) => CLOSED.to_owned(),
                    _ => cause.to_string(),
                },
                None => error.to_string(),
            }
        }
    };
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(said)?;
    let request = hyper::Request::get(path)
        .header(HOST, host)
        .header(USER_AGENT, concat!("pm/", env!("CARGO_PKG_VERSION"), " (probe)"))
        .header(CONNECTION, "close")
        .body(String::new())
        .map_err(|error| error.to_string())?;
    let mut connection = pin!(async move {
        // Its error reaches the one who waits for the answer.
        let _ = connection.await;
        std::future::pending::<()>().await;
    });
    let response = tokio::select! {
        response = sender.send_request(request) => response.map_err(said)?,
        () = &mut connection => return Err(CLOSED.to_owned()),
    };
    let status = response.status();
    let mut body = pin!(response.into_body());
    let mut kept = Vec::new();
    let read = async {
        while kept.len() < KEPT {
            let frame = std::future::poll_fn(|context| body.as_mut().poll_frame(context)).await;
            let Some(Ok(frame)) = frame else { break };
            if let Some(bytes) = frame.data_ref() {
                kept.extend_from_slice(&bytes[..bytes.len().min(KEPT - kept.len())]);
            }
        }
    };
    // The answer is known; what follows is only for people.
    tokio::select! {
        _ = tokio::time::timeout(BODY_WITHIN, read) => {}
        () = &mut connection => {}
    }
    let words = quoted(&kept);
    let text =
        if words.is_empty() { status.as_u16().to_string() } else { format!("{} {words}", status.as_u16()) };
    if status.is_success() || status.is_redirection() { Ok(text) } else { Err(text) }
}

async fn tcp(subject: &Subject, text: &str) -> Heard {
    let heard = match tcp_place(&subject.env, text) {
        Err(error) => Err(error),
        Ok(place) => {
            within(subject.probe.timeout, async {
                let connected = match &place {
                    Place::Tcp { host, port } => connect(host, *port).await.map(drop),
                    Place::Unix(path) => UnixStream::connect(path).await.map(drop),
                    Place::Worker => Err(io::ErrorKind::Unsupported.into()),
                };
                connected.map(|()| "connected".to_owned()).map_err(|error| plain(&error))
            })
            .await
        }
    };
    (format!("tcp {text}"), heard)
}

async fn exec(subject: &Subject, argv: &[String]) -> Heard {
    let what = format!("exec {}", argv.join(" "));
    let heard = match question(subject, argv) {
        Err(error) => Err(error),
        Ok(question) => match Helper::start(&question) {
            Err(error) => Err(error.to_string()),
            // When its time is over it is dropped, and ends with everything that it has started.
            Ok(helper) => {
                within(subject.probe.timeout, async {
                    match helper.end(KEPT).await {
                        Err(error) => Err(error.to_string()),
                        Ok((Ended::NotStarted(failure), _)) => Err(failure.to_string()),
                        Ok((Ended::Exited(status), words)) => {
                            let words = quoted(&words);
                            let text = if words.is_empty() {
                                status.to_string()
                            } else {
                                format!("{status} {words}")
                            };
                            if status.code() == Some(0) { Ok(text) } else { Err(text) }
                        }
                    }
                })
                .await
            }
        },
    };
    (what, heard)
}

fn question(subject: &Subject, argv: &[String]) -> Result<Question, String> {
    let zero = |_| "an argument or variable has a zero byte".to_owned();
    let [program, ..] = argv else { return Err("no program".to_owned()) };
    let path = subject.env.iter().find(|(key, _)| *key == "PATH").map(|(_, value)| value);
    let program = launch::find_program(Path::new(program), path, &subject.cwd)
        .ok_or_else(|| format!("`{program}` is not there, or not executable"))?;
    let text = |bytes: Vec<u8>| CString::new(bytes).map_err(zero);
    let mut env = Vec::new();
    for (key, value) in subject.env.iter().filter(|(key, _)| !is_of_instance_alone(key)) {
        env.push(text(format!("{key}={value}").into_bytes())?);
    }
    if let Some(pid) = subject.pid {
        env.push(text(format!("PM_PROBE_PID={pid}").into_bytes())?);
    }
    Ok(Question {
        program: text(program.into_os_string().into_encoded_bytes())?,
        args: argv.iter().map(|word| text(word.clone().into_bytes())).collect::<Result<_, _>>()?,
        env,
        cwd: text(subject.cwd.clone().into_os_string().into_encoded_bytes())?,
        bounds: bounds(subject)?,
    })
}

/// A program that asks may no more than the instance that it asks, and is accounted to it.
fn bounds(subject: &Subject) -> Result<Bounds, String> {
    let rights = Rights::of(&subject.process).map_err(|error| error.to_string())?;
    let mut limits = vec![subject.open_files];
    limits.extend(rights.limits);
    let cgroup = subject.group.clone().map(|dir| CString::new(dir.into_os_string().into_encoded_bytes()));
    // The supervisor is spared by the kernel; not so what it runs for an app. Only privilege lowers the score again.
    let own = limits::oom_score_adj().unwrap_or(0);
    let oom_score_adj = subject.pid.and_then(|pid| limits::oom_score_adj_of(pid).ok());
    Ok(Bounds {
        credentials: rights.credentials,
        umask: rights.umask,
        limits,
        confinement: rights.confinement,
        cgroup: cgroup.transpose().map_err(|_| "the control group has a zero byte".to_owned())?,
        oom_score_adj: oom_score_adj.filter(|score| *score > own),
    })
}

/// What names a descriptor or a channel that only the instance has. A Node program that found the channel's number would
/// fail at its start.
fn is_of_instance_alone(name: &str) -> bool {
    const ALONE: [&str; 5] = [
        "NODE_CHANNEL_FD",
        "NODE_CHANNEL_SERIALIZATION_MODE",
        "NODE_UNIQUE_ID",
        "NOTIFY_SOCKET",
        "PM_READY_FD",
    ];
    ALONE.contains(&name) || name.starts_with("LISTEN_") || name.starts_with("PM_LISTEN_FD_")
}

/// One line in quotes; nothing for nothing.
pub(super) fn quoted(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut line = String::new();
    for word in text.split_whitespace() {
        if !line.is_empty() {
            line.push(' ');
        }
        line.extend(word.chars().filter(|c| !c.is_control()));
    }
    if line.is_empty() { line } else { format!("'{line}'") }
}

fn plain(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "connection refused".to_owned(),
        io::ErrorKind::NotFound => "no such socket".to_owned(),
        _ => error.to_string(),
    }
}
