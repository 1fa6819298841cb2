//! A supervisor that is killed with SIGKILL in the middle of long messages.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command as Process, Stdio};
use std::time::{Duration, Instant};

use pm::dispatch::{self, Adopted, ChannelKind, Command, DispatchEvent, NewInstance, Part};
use pm::sys::fdpass;
use pm::sys::guise::Guise;

use super::world::{PATIENCE, World, instance};

/// What the supervisor that is to be killed is given: the channel, the shelf and what the keeper holds for it come as
/// descriptors.
#[derive(serde::Serialize, serde::Deserialize)]
struct Legacy {
    inbox: bool,
    lines: Vec<u64>,
    /// The number of the message it shall send.
    send: Option<u64>,
}

const TO_BE_KILLED: &str = "PM_TEST_TO_BE_KILLED";

/// No test but the process that `killed_in_the_middle_of_3_mb_each_way_…` kills: a dispatch thread whose driver has
/// everything held by its parent, which is the keeper here.
#[test]
fn helper_of_the_kills_below() {
    if std::env::var_os(TO_BE_KILLED).is_none() {
        return;
    }
    let keeper = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let mut buffer = vec![0; 4096];
    let received = loop {
        match fdpass::receive(&keeper, &mut buffer, fdpass::Take::Consume) {
            Ok(received) => break received,
            Err(_) => std::thread::park_timeout(Duration::from_millis(1)),
        }
    };
    let legacy: Legacy = serde_json::from_slice(&buffer[..received.len]).unwrap();
    let mut fds = received.fds.into_iter();
    let mut next = || fds.next().unwrap();
    let (channel, put, take) = (next(), next(), next());
    let inbox = legacy.inbox.then(&mut next);
    let lines: BTreeMap<u64, OwnedFd> = legacy.lines.iter().map(|number| (*number, next())).collect();
    let (tokens_tx, tokens_rx) = std::sync::mpsc::channel();
    let told = keeper.try_clone().unwrap();
    // Told before the thread goes on: what is done about a line is done before the line is consumed.
    let handle = dispatch::spawn(Box::new(move |event| {
        let tell = |text: String, fds: &[std::os::fd::BorrowedFd<'_>]| {
            while fdpass::send(&told, text.as_bytes(), fds).is_err() {
                std::thread::park_timeout(Duration::from_millis(1));
            }
        };
        match event {
            DispatchEvent::Keep { part, file, token, .. } => {
                let text = match part {
                    Part::Inbox => "inbox".to_owned(),
                    Part::Line(number) => format!("line:{number}"),
                };
                tell(text, &[file.as_fd()]);
                let _ = tokens_tx.send(token);
            }
            DispatchEvent::LineGone { number, .. } => tell(format!("gone:{number}"), &[]),
            DispatchEvent::UserMessage { message, .. } => {
                let head = &message.bytes()[..message.bytes().len().min(60)];
                tell(format!("said:{}:{}", message.length(), String::from_utf8_lossy(head)), &[]);
            }
            _ => {}
        }
    }));
    let handle = handle.unwrap();
    let id = instance("talk", 0, 1);
    handle.send(Command::UseShelf { put, take });
    handle.send(Command::AddInstance(Box::new(NewInstance {
        id: id.clone(),
        channel,
        kind: ChannelKind::Plain,
        agent: None,
        guise: Guise::Own,
        adopted: Some(Adopted { ready: true, open: Vec::new(), inbox, lines }),
    })));
    handle.send(Command::Adopted);
    if let Some(number) = legacy.send {
        let json = format!(r#"{{"number":{number},"text":"{}"}}"#, "y".repeat(3_000_000));
        handle.send(Command::SendMessage { id, json });
    }
    fdpass::send(&keeper, b"up", &[]).unwrap();
    for token in tokens_rx {
        handle.send(Command::Recorded { token });
    }
}

/// A keeper with a supervisor that is killed with SIGKILL at any instant, in whatever system call.
struct KilledAgain {
    channel: OwnedFd,
    shelf: [OwnedFd; 2],
    inbox: Option<OwnedFd>,
    lines: BTreeMap<u64, OwnedFd>,
    /// Lengths and heads of what the worker was heard saying.
    said: Vec<(u64, String)>,
    placed: usize,
}

/// Killed also when its test has failed.
struct Mortal(Child);

impl Mortal {
    fn end(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Mortal {
    fn drop(&mut self) {
        self.end();
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum From {
    Birth,
    Placed,
}

impl KilledAgain {
    /// Lets a supervisor live until `enough` says so, or so long from its birth, or from when it has put its message
    /// where the next one finds it.
    fn supervise(&mut self, send: Option<u64>, life: (From, Duration), enough: impl Fn(&Self) -> bool) {
        let (from, life) = life;
        let placed = self.placed;
        let (ours, theirs) = pm::sys::pipe::packet_pair().unwrap();
        let child = Process::new(std::env::current_exe().unwrap())
            .args(["--exact", "killed::helper_of_the_kills_below", "--nocapture"])
            .env(TO_BE_KILLED, "1")
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut child = Mortal(child);
        let legacy =
            Legacy { inbox: self.inbox.is_some(), lines: self.lines.keys().copied().collect(), send };
        let mut fds = vec![self.channel.as_fd(), self.shelf[0].as_fd(), self.shelf[1].as_fd()];
        fds.extend(self.inbox.as_ref().map(AsFd::as_fd));
        fds.extend(self.lines.values().map(AsFd::as_fd));
        fdpass::send(&ours, &serde_json::to_vec(&legacy).unwrap(), &fds).unwrap();
        let mut until = None;
        let limit = Instant::now() + PATIENCE;
        while until.is_none_or(|until| Instant::now() < until) && !enough(self) {
            assert!(Instant::now() < limit, "{:?} lines {:?}", self.said, self.lines.keys());
            let up = self.hear(&ours);
            if (from == From::Birth && up)
                || (from == From::Placed && until.is_none() && self.placed > placed)
            {
                until = Some(Instant::now() + life);
            }
            std::thread::park_timeout(Duration::from_micros(300));
        }
        child.end();
        // What it had said counts.
        self.hear(&ours);
    }

    /// Takes what was said. Whether the supervisor has said that it is up.
    fn hear(&mut self, from: &OwnedFd) -> bool {
        let mut buffer = vec![0; 4096];
        let mut up = false;
        while let Ok(received) = fdpass::receive(from, &mut buffer, fdpass::Take::Consume)
            && received.len > 0
        {
            let text = String::from_utf8_lossy(&buffer[..received.len]).into_owned();
            let file = received.fds.into_iter().next();
            match text.split_once(':').unwrap_or((&text, "")) {
                ("up", _) => up = true,
                ("inbox", _) => self.inbox = file,
                ("line", number) => {
                    self.lines.insert(number.parse().unwrap(), file.unwrap());
                    self.placed += 1;
                }
                ("gone", number) => drop(self.lines.remove(&number.parse().unwrap())),
                (_, rest) => {
                    let (length, head) = rest.split_once(':').unwrap();
                    let said = (length.parse().unwrap(), head.to_owned());
                    // Killed between the event and the end of the line: it is told again. Each has a number of its own.
                    if !self.said.contains(&said) {
                        self.said.push(said);
                    }
                }
            }
        }
        up
    }
}

#[test]
fn killed_in_the_middle_of_3_mb_each_way_nothing_is_lost_or_doubled_and_the_worker_lives() {
    const MESSAGES: u64 = 12;
    let mut world = World::new(Path::new("node"));
    let id = instance("talk", 0, 1);
    let channel = world.spawn_process(&id, false, false, None, &["dialogue", &MESSAGES.to_string()]);
    let mut keeper = KilledAgain {
        channel,
        shelf: dispatch::shelf_ends().unwrap(),
        inbox: None,
        lines: BTreeMap::new(),
        said: Vec::new(),
        placed: 0,
    };
    let heard =
        |keeper: &KilledAgain| keeper.said.iter().filter(|(_, head)| head.starts_with(r#"{"heard""#)).count();
    let all_said = |keeper: &KilledAgain| {
        keeper.said.iter().filter(|(length, _)| *length > 1_000_000).count() as u64 >= MESSAGES
    };
    let (mut moment, mut midway, mut kills) = (3_u64, 0, 0);
    // On a slow machine more of them come too early.
    while kills < 25 || (kills < 200 && (keeper.placed < 5 || midway < 3)) {
        moment = (moment * 131 + 7) % 211;
        let next = keeper.placed as u64 + 1;
        // A third one would be refused: the worker does not read.
        let send = (keeper.lines.len() < 2).then_some(next);
        let from = if kills % 2 == 0 && send.is_some() { From::Placed } else { From::Birth };
        keeper.supervise(send, (from, Duration::from_micros(moment * 100)), |_| false);
        kills += 1;
        midway += usize::from(!keeper.lines.is_empty());
    }
    let placed = keeper.placed;
    keeper.supervise(None, (From::Birth, PATIENCE), |keeper| {
        all_said(keeper) && heard(keeper) == placed && keeper.lines.is_empty()
    });
    assert!(world.children[0].try_wait().unwrap().is_none(), "the worker lives");
    assert!(placed >= 5 && midway >= 3, "{placed} messages, {midway} kills with one under way");
    let (long, short): (Vec<_>, Vec<_>) =
        keeper.said.into_iter().partition(|(length, _)| *length > 1_000_000);
    let long: Vec<(u64, String)> =
        long.into_iter().map(|(length, head)| (length, head.split_once(',').unwrap().0.to_owned())).collect();
    let expected = |n: u64| {
        let head = format!(r#"{{"said":{n}"#);
        (head.len() as u64 + 3_000_000 + r#","text":""}"#.len() as u64, head)
    };
    assert_eq!(long, (1..=MESSAGES).map(expected).collect::<Vec<_>>());
    let short: Vec<String> = short.into_iter().map(|(_, text)| text).collect();
    let expected: Vec<String> =
        (1..=placed).map(|n| format!(r#"{{"heard":{n},"number":{n},"length":3000000}}"#)).collect();
    assert_eq!(short, expected, "each message once, and whole");
}
