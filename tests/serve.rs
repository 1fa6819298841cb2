//! The static file server as a process of its own: what it answers, how it says "ready", how it ends.

#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use std::fs;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pm::cli::serve::{ServeOptions, run};

const LIMIT: Duration = Duration::from_secs(20);

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    options: ServeOptions,
}

/// Not a test of its own: with `PM_TEST_SERVE` set, this process is the server.
#[test]
fn the_server() {
    let Ok(line) = std::env::var("PM_TEST_SERVE") else { return };
    run(Line::parse_from(["serve"].into_iter().chain(line.lines())).options).unwrap();
}

struct Server {
    child: Child,
    address: SocketAddr,
    _stdout: BufReader<ChildStdout>,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    /// Starts it on a port of the kernel's choice.
    fn start(args: &[&str]) -> Self {
        let mut args = args.to_vec();
        args.extend(["--host", "127.0.0.1", "--port", "0"]);
        Self::spawn(
            Command::new(std::env::current_exe().unwrap()).args(["--exact", "the_server", "--nocapture"]),
            &args,
        )
    }

    /// Starts it on an inherited listener: the shell makes its standard input descriptor 3 (and 4 the ready pipe).
    fn start_inherited(args: &[&str], listener: &TcpListener, redirections: &str) -> Self {
        let script = format!(
            "exec 3<&0 0</dev/null {redirections}; export LISTEN_FDS=1 LISTEN_PID=$$; exec \"$0\" --exact the_server --nocapture"
        );
        let mut command = Command::new("sh");
        command.args(["-c", &script]).arg(std::env::current_exe().unwrap());
        command.stdin(std::os::fd::OwnedFd::from(listener.try_clone().unwrap()));
        Self::spawn(&mut command, args)
    }

    fn spawn(command: &mut Command, args: &[&str]) -> Self {
        let mut child = command.env("PM_TEST_SERVE", args.join("\n")).stdout(Stdio::piped()).spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        let address = loop {
            line.clear();
            assert_ne!(stdout.read_line(&mut line).unwrap(), 0, "the server ended");
            if let Some((_, rest)) = line.split_once("http://") {
                assert!(line.contains(&format!("pid {}", child.id())), "{line}");
                break rest.split(' ').next().unwrap().trim().parse().unwrap();
            }
        };
        Self { child, address, _stdout: stdout }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream
    }

    fn ask(&self, head: &str) -> Answer {
        let mut stream = self.connect();
        stream.write_all(format!("{head}\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        Answer::parse(&text)
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().try_into().unwrap()), signal).unwrap();
    }

    /// Waits for the end by the end of its standard output, then asks for the code.
    fn exit_code(mut self) -> Option<i32> {
        let mut rest = String::new();
        self._stdout.read_to_string(&mut rest).unwrap();
        self.child.wait().unwrap().code()
    }
}

#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn parse(text: &str) -> Self {
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Self { status, head: head.to_lowercase(), body: body.to_owned() }
    }

    /// Reads one answer with a Content-Length from a connection that stays open.
    fn read(stream: &mut BufReader<TcpStream>) -> io::Result<Self> {
        let mut text = String::new();
        while !text.ends_with("\r\n\r\n") {
            if stream.read_line(&mut text)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        let length = text.to_lowercase();
        let length = length.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
        let mut body = vec![0; length.parse().unwrap()];
        stream.read_exact(&mut body)?;
        text.push_str(&String::from_utf8(body).unwrap());
        Ok(Self::parse(&text))
    }
}

fn site() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("index.html"), "<h1>home</h1>").unwrap();
    fs::write(dir.path().join("a.js"), "0123456789").unwrap();
    fs::write(dir.path().join(".env"), "SECRET=1").unwrap();
    fs::create_dir(dir.path().join("sub")).unwrap();
    fs::write(dir.path().join("sub/index.html"), "sub").unwrap();
    dir
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn answers_as_a_file_server_should() {
    let dir = site();
    let server = Server::start(&[text(dir.path())]);
    let check = |head: &str, status: u16, body: &str, contains: &str| {
        let answer = server.ask(head);
        assert_eq!((answer.status, answer.body.as_str()), (status, body), "{head}: {answer:?}");
        assert!(answer.head.contains(contains), "{head}: {answer:?}");
    };
    check("GET / HTTP/1.1", 200, "<h1>home</h1>", "content-type: text/html");
    check("GET /a.js?x=1 HTTP/1.1", 200, "0123456789", "content-type: text/javascript");
    check("HEAD /a.js HTTP/1.1", 200, "", "content-length: 10");
    check("GET /a.js HTTP/1.1\r\nRange: bytes=2-4", 206, "234", "content-range: bytes 2-4/10");
    check("GET /a.js HTTP/1.1\r\nRange: bytes=20-", 416, "", "content-range: bytes */10");
    check("GET /sub/ HTTP/1.1", 200, "sub", "text/html");
    check("GET /sub HTTP/1.1", 307, "", "location: /sub/");
    check("GET /none HTTP/1.1", 404, "404 not found\n", "text/plain");
    check("GET /.env HTTP/1.1", 404, "404 not found\n", "text/plain");
    check("GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1", 404, "404 not found\n", "text/plain");
    check("GET /../../etc/passwd HTTP/1.1", 404, "404 not found\n", "text/plain");
    check("POST / HTTP/1.1\r\nContent-Length: 0", 405, "", "allow: get,head");

    let modified = server.ask("GET /a.js HTTP/1.1").head;
    let modified = modified.lines().find_map(|line| line.strip_prefix("last-modified: ")).unwrap().to_owned();
    let date = modified.replace("gmt", "GMT");
    // The head was lowercased for comparing; dates are not case-insensitive.
    let date: Vec<String> = date
        .split(' ')
        .map(|word| if word == "GMT" { word.to_owned() } else { word[..1].to_uppercase() + &word[1..] })
        .collect();
    check(&format!("GET /a.js HTTP/1.1\r\nIf-Modified-Since: {}", date.join(" ")), 304, "", "");
}

#[test]
fn a_single_page_app_gets_its_page_and_no_missing_scripts() {
    let dir = site();
    let server = Server::start(&[text(dir.path()), "--spa"]);
    let answer = server.ask("GET /users/7 HTTP/1.1");
    assert_eq!((answer.status, answer.body.as_str()), (200, "<h1>home</h1>"));
    assert_eq!(server.ask("GET /missing.js HTTP/1.1").status, 404);
    assert_eq!(server.ask("GET /.env HTTP/1.1").status, 404);
}

#[test]
fn a_password_is_asked_for() {
    let dir = site();
    let args = [text(dir.path()), "--basic-auth-username", "ann", "--basic-auth-password", "x:y"];
    let server = Server::start(&args);
    let answer = server.ask("GET / HTTP/1.1");
    assert_eq!(answer.status, 401);
    assert!(answer.head.contains("www-authenticate: basic"), "{answer:?}");
    assert_eq!(server.ask("GET / HTTP/1.1\r\nAuthorization: Basic YW5uOng6eg==").status, 401);
    assert_eq!(server.ask("GET / HTTP/1.1\r\nAuthorization: basic YW5uOng6eQ==").status, 200);
}

#[test]
fn without_the_directory_nothing_starts() {
    let options = Line::parse_from(["serve", "/nonexistent/x"]).options;
    let error = run(options).unwrap_err().to_string();
    assert_eq!(error, "cannot serve \"/nonexistent/x\"");
}

#[test]
fn says_ready_on_every_channel_once_it_accepts() {
    let dir = site();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (notify, pipe) = (dir.path().join("notify"), dir.path().join("ready"));
    let socket = UnixDatagram::bind(&notify).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    let redirections = format!(
        "4>'{}'; export PM_READY_FD=4 NODE_APP_INSTANCE=3 NOTIFY_SOCKET='{}'",
        text(&pipe),
        text(&notify)
    );
    let server = Server::start_inherited(&[text(dir.path())], &listener, &redirections);
    assert_eq!(server.address, listener.local_addr().unwrap());
    let mut message = [0; 64];
    let count = socket.recv(&mut message).unwrap();
    assert_eq!(&message[..count], b"READY=1");
    assert_eq!(server.ask("GET / HTTP/1.1").status, 200);
    assert_eq!(fs::read(&pipe).unwrap(), b"\n");
}

#[test]
fn listen_fds_of_another_process_are_left_alone() {
    let dir = site();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let args = [text(dir.path()), "--host", "127.0.0.1", "--port", "0"];
    // $$ is the outer shell's; the server is another process.
    let script = "exec 3<&0 0</dev/null; export LISTEN_FDS=1 LISTEN_PID=$$; \"$0\" --exact the_server --nocapture & wait";
    let mut command = Command::new("sh");
    command.args(["-c", script]).arg(std::env::current_exe().unwrap()).env("PM_TEST_SERVE", args.join("\n"));
    command.stdin(std::os::fd::OwnedFd::from(listener.try_clone().unwrap())).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut text = String::new();
    while !text.contains("http://") {
        text.clear();
        assert_ne!(stdout.read_line(&mut text).unwrap(), 0);
    }
    let inherited = listener.local_addr().unwrap().to_string();
    assert!(!text.contains(&inherited), "{text}");
    // The server names its own pid: the shell's words would land anywhere among those of the test harness.
    let (_, rest) = text.split_once("pid ").unwrap();
    let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    kill(Pid::from_raw(rest[..digits].parse().unwrap()), Signal::SIGTERM).unwrap();
    child.wait().unwrap();
}

#[test]
fn drains_keep_alive_connections_with_a_last_answer() {
    let dir = site();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let server = Server::start_inherited(&[text(dir.path())], &listener, "");
    let mut stream = BufReader::new(server.connect());
    let request = b"GET /a.js HTTP/1.1\r\nHost: x\r\n\r\n";
    stream.get_mut().write_all(request).unwrap();
    let answer = Answer::read(&mut stream).unwrap();
    assert!(!answer.head.contains("connection: close"), "{answer:?}");

    // A second connection is in the middle of its request when the signal arrives.
    let mut slow = BufReader::new(server.connect());
    slow.get_mut().write_all(&request[..20]).unwrap();
    // Its connection is known to be accepted: the server answers on a third, connected later.
    assert_eq!(server.ask("GET / HTTP/1.1").status, 200);

    server.signal(Signal::SIGINT);
    // The listener's queue belongs to us: nobody accepts any more, and nobody is refused. A connection that is not
    // answered although the others are is the proof, so wait for the drain to begin by its answer.
    let begin = Instant::now();
    let last = loop {
        stream.get_mut().write_all(request).unwrap();
        let answer = Answer::read(&mut stream).unwrap();
        if answer.head.contains("connection: close") {
            break answer;
        }
        assert!(Instant::now().duration_since(begin) < LIMIT);
    };
    assert_eq!((last.status, last.body.as_str()), (200, "0123456789"));
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0, "closed after the last answer");

    slow.get_mut().write_all(&request[20..]).unwrap();
    let answer = Answer::read(&mut slow).unwrap();
    assert_eq!(answer.status, 200);
    assert!(answer.head.contains("connection: close"), "{answer:?}");
    assert_eq!(server.exit_code(), Some(0));
    assert!(Instant::now().duration_since(begin) < Duration::from_secs(4), "nothing was left to wait for");
}

#[test]
fn an_idle_connection_does_not_hold_up_the_end_for_long() {
    let dir = site();
    let server = Server::start(&[text(dir.path())]);
    let mut stream = BufReader::new(server.connect());
    stream.get_mut().write_all(b"GET /a.js HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    assert_eq!(Answer::read(&mut stream).unwrap().status, 200);
    let begin = Instant::now();
    server.signal(Signal::SIGTERM);
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    assert_eq!(server.exit_code(), Some(0));
    let took = Instant::now().duration_since(begin);
    assert!(took > Duration::from_secs(3) && took < Duration::from_secs(8), "{took:?}");
}

#[test]
fn serves_on_an_inherited_unix_socket() {
    let dir = site();
    let path = dir.path().join("web.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let script = "exec 3<&0 0</dev/null; export LISTEN_FDS=1 LISTEN_PID=$$; exec \"$0\" --exact the_server --nocapture";
    let mut command = Command::new("sh");
    command.args(["-c", script]).arg(std::env::current_exe().unwrap()).env("PM_TEST_SERVE", text(dir.path()));
    let mut child =
        command.stdin(std::os::fd::OwnedFd::from(listener)).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains(&format!("unix:{}", text(&path))) {
        line.clear();
        assert_ne!(stdout.read_line(&mut line).unwrap(), 0);
    }
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.write_all(b"GET /a.js HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.ends_with("0123456789"), "{answer}");
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Asks for the same file until told to stop, never twice for one answer.
fn load(address: SocketAddr, keeps_alive: bool, stop: &AtomicBool, answers: &AtomicUsize) {
    let request = b"GET /a.js HTTP/1.1\r\nHost: x\r\n\r\n";
    let connect = || {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        BufReader::new(stream)
    };
    let mut stream = connect();
    while !stop.load(Ordering::Relaxed) {
        stream.get_mut().write_all(request).unwrap();
        let answer = Answer::read(&mut stream).unwrap();
        assert_eq!((answer.status, answer.body.as_str()), (200, "0123456789"));
        answers.fetch_add(1, Ordering::Relaxed);
        if !keeps_alive || answer.head.contains("connection: close") {
            stream = connect();
        }
    }
}

#[test]
fn one_server_after_another_and_no_request_lost() {
    let dir = site();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, answers) = (AtomicBool::new(false), AtomicUsize::new(0));
    let mut server = Server::start_inherited(&[text(dir.path())], &listener, "");
    std::thread::scope(|scope| {
        for keeps_alive in [true, true, false, false] {
            let (stop, answers) = (&stop, &answers);
            scope.spawn(move || load(address, keeps_alive, stop, answers));
        }
        for _ in 0..10 {
            let next = Server::start_inherited(&[text(dir.path())], &listener, "");
            let old = std::mem::replace(&mut server, next);
            old.signal(Signal::SIGINT);
            assert_eq!(old.exit_code(), Some(0));
            // Every server gets its share of the load.
            let (target, end) = (answers.load(Ordering::Relaxed) + 200, Instant::now() + LIMIT);
            while answers.load(Ordering::Relaxed) < target {
                assert!(Instant::now() < end, "no answers any more");
                std::thread::park_timeout(Duration::from_millis(1));
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
}
