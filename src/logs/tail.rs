//! Reads log files for people: the last lines of each, then what is added to them.
//!
//! Works on the files alone, without a daemon. Rotation (by rename or by copy and truncate), removal and files that do
//! not exist yet are ordinary. While nothing is written it sleeps in poll(2) on inotify and wakes every two seconds,
//! for file systems that do not report changes; where inotify is not to be had it looks four times a second.
//!
//! Never holds more of a file than [`LAST_LINES_MAX`] in memory.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};

use super::recent::Stream;
use crate::model::id::PmId;
use crate::sys::guarded;

/// How far back [`last_lines`] looks, in bytes.
pub const LAST_LINES_MAX: u64 = 8 * 1024 * 1024;
const BLOCK: usize = 64 * 1024;
/// How often everything is looked at when inotify reports nothing.
const TICK: Duration = Duration::from_secs(2);
/// The same without inotify, or while a directory does not exist.
const POLL_TICK: Duration = Duration::from_millis(250);
/// Changes are collected for this long, so that a file that gets a line at a time costs no wake-up for each.
const COLLECT: Duration = Duration::from_millis(10);
/// How long the end of a line is waited for.
const PARTIAL_TIMEOUT: Duration = Duration::from_millis(300);
/// How long a file that was moved away is still read: its writer notices within a second.
const RETIRED_FOR: Duration = Duration::from_secs(2);

/// A log file and whose it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The file.
    pub path: PathBuf,
    /// The number in front of its lines; `None` where a file is not an instance's.
    pub id: Option<PmId>,
    /// The name in front of its lines.
    pub name: String,
    /// Which of the two it is.
    pub stream: Stream,
}

/// A place in a file, valid while the path names the same file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// Device and inode; `None`: there was no file.
    identity: Option<(u64, u64)>,
    offset: u64,
}

/// Why nothing more is shown.
#[derive(Debug, thiserror::Error)]
pub enum TailError {
    /// The file is there and cannot be read.
    #[error("cannot read log file {path:?}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// poll(2) failed.
    #[error("cannot wait for log files")]
    Wait(#[source] io::Error),
}

/// The end of a file.
#[derive(Clone, Debug, Default)]
pub struct LastLines {
    /// Oldest first, without their newlines.
    pub lines: Vec<Vec<u8>>,
    /// Where they end: following from here shows every later byte once.
    pub end: Position,
    /// When the file was last written to; `None` when there is none. PM2 shows the latest file last.
    pub modified: Option<SystemTime>,
}

/// The last `count` lines of a file. A file that does not exist has none, and neither has anything that is not a
/// regular file.
///
/// # Errors
/// [`TailError::Read`].
pub fn last_lines(path: &Path, count: usize) -> Result<LastLines, TailError> {
    read_last_lines(path, count).map_err(|source| TailError::Read { path: path.to_owned(), source })
}

fn read_last_lines(path: &Path, count: usize) -> io::Result<LastLines> {
    let Some((file, meta)) = open_regular(path)? else { return Ok(LastLines::default()) };
    let (end, modified) =
        (Position { identity: Some(identity(&meta)), offset: meta.len() }, meta.modified().ok());
    if count == 0 {
        return Ok(LastLines { lines: Vec::new(), end, modified });
    }
    let floor = meta.len().saturating_sub(LAST_LINES_MAX);
    let mut start = meta.len();
    let mut blocks: Vec<Vec<u8>> = Vec::new();
    let mut newlines = 0;
    // The newline that ends the last line separates it from nothing: one more than lines are needed.
    while start > floor && newlines <= count {
        let from = start.saturating_sub(BLOCK as u64).max(floor);
        let mut block = vec![0; usize::try_from(start - from).unwrap_or(BLOCK)];
        if let Err(error) = file.read_exact_at(&mut block, from) {
            // Truncated this moment: what is left is shown by whoever follows it.
            return if error.kind() == io::ErrorKind::UnexpectedEof {
                Ok(LastLines::default())
            } else {
                Err(error)
            };
        }
        newlines += memchr::memchr_iter(b'\n', &block).count();
        blocks.push(block);
        start = from;
    }
    blocks.reverse();
    let bytes = blocks.concat();
    let text = bytes.strip_suffix(b"\n").unwrap_or(&bytes);
    let mut lines: Vec<Vec<u8>> = Vec::new();
    if !bytes.is_empty() {
        lines.extend(text.rsplit(|&byte| byte == b'\n').take(count).map(<[u8]>::to_vec));
        lines.reverse();
    }
    Ok(LastLines { lines, end, modified })
}

/// What a follower hands out at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pieces {
    /// One or more whole lines; an unfinished one only when its end does not come within 300 ms or 64 KiB.
    Lines,
    /// Bytes as they arrive.
    Raw,
}

/// Follows files until `sink` breaks. It gets a source and the bytes that were added to it.
///
/// # Errors
/// [`TailError`].
pub fn follow(
    sources: Vec<(Source, Position)>,
    pieces: Pieces,
    mut sink: impl FnMut(&Source, &[u8]) -> ControlFlow<()>,
) -> Result<(), TailError> {
    let mut follower = Follower::new(pieces);
    for (source, from) in sources {
        follower.add(source, from);
    }
    loop {
        if follower.turn(TICK, &mut sink)?.is_break() {
            return Ok(());
        }
    }
}

/// Follows files that are added one by one; [`follow`] as a loop of the caller's.
#[derive(Debug)]
pub struct Follower {
    pieces: Pieces,
    files: Vec<Followed>,
    watcher: Option<Watcher>,
    next_tick: Instant,
    block: Vec<u8>,
}

#[derive(Debug)]
struct Followed {
    source: Source,
    current: Option<Opened>,
    /// Where to begin in the file that is opened first.
    begin: Position,
    /// Moved away, and perhaps not finished.
    retired: Option<(Opened, Instant)>,
    is_dirty: bool,
}

#[derive(Debug)]
struct Opened {
    file: File,
    identity: (u64, u64),
    offset: u64,
    partial_since: Option<Instant>,
}

impl Follower {
    /// Follows nothing yet.
    #[must_use]
    pub fn new(pieces: Pieces) -> Self {
        let watcher = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).ok();
        let watcher =
            watcher.map(|inotify| Watcher { inotify, by_dir: HashMap::new(), dirs: HashMap::new() });
        Self { pieces, files: Vec::new(), watcher, next_tick: Instant::now(), block: vec![0; BLOCK] }
    }

    /// Follows a file from a position, or from its beginning when the path now names another file.
    pub fn add(&mut self, source: Source, from: Position) {
        self.files.push(Followed { source, current: None, begin: from, retired: None, is_dirty: true });
        self.next_tick = Instant::now();
    }

    /// Waits for at most `limit` and hands out what was added meanwhile.
    ///
    /// # Errors
    /// [`TailError`].
    pub fn turn(
        &mut self,
        limit: Duration,
        sink: &mut dyn FnMut(&Source, &[u8]) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, TailError> {
        let now = Instant::now();
        let deadline = (now + limit).min(self.next_tick).min(self.next_deadline().unwrap_or(now + limit));
        self.wait(if self.files.iter().any(|file| file.is_dirty) { now } else { deadline })
            .map_err(TailError::Wait)?;

        let now = Instant::now();
        let is_tick = now >= self.next_tick;
        if is_tick {
            let complete = self.watch_dirs();
            self.next_tick = now + if complete { TICK } else { POLL_TICK };
        }
        for file in &mut self.files {
            if is_tick || file.is_dirty || file.deadline().is_some() {
                file.is_dirty = false;
                let flow = file
                    .read(self.pieces, &mut self.block, now, sink)
                    .map_err(|source| TailError::Read { path: file.source.path.clone(), source })?;
                if flow.is_break() {
                    return Ok(flow);
                }
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    fn next_deadline(&self) -> Option<Instant> {
        self.files.iter().filter_map(Followed::deadline).min()
    }

    fn wait(&mut self, until: Instant) -> io::Result<()> {
        let limit = poll_timeout(until.saturating_duration_since(Instant::now()));
        let Some(watcher) = &mut self.watcher else {
            return poll_quietly(&mut [], limit).map(|_| ());
        };
        let mut fds = [PollFd::new(watcher.inotify.as_fd(), PollFlags::POLLIN)];
        if poll_quietly(&mut fds, limit)? == 0 {
            return Ok(());
        }
        poll_quietly(&mut [], poll_timeout(COLLECT))?;
        match watcher.changed() {
            Changed::Names(names) => {
                for file in &mut self.files {
                    file.is_dirty |= names.contains(&file.source.path);
                }
            }
            Changed::Anything => self.next_tick = Instant::now(),
        }
        Ok(())
    }

    /// Watches every directory that is not watched yet. Returns whether all are.
    fn watch_dirs(&mut self) -> bool {
        let Some(watcher) = &mut self.watcher else { return false };
        let dirs: HashSet<&Path> = self.files.iter().filter_map(|file| file.source.path.parent()).collect();
        let mut complete = true;
        for dir in dirs {
            complete &= watcher.watch(dir);
        }
        complete
    }
}

impl Followed {
    fn deadline(&self) -> Option<Instant> {
        let partial = self.current.as_ref().and_then(|open| Some(open.partial_since? + PARTIAL_TIMEOUT));
        // It is read whenever there is a turn, and a last time then.
        let retired = self.retired.as_ref().map(|(_, until)| *until);
        partial.into_iter().chain(retired).min()
    }

    fn read(
        &mut self,
        pieces: Pieces,
        block: &mut [u8],
        now: Instant,
        sink: &mut dyn FnMut(&Source, &[u8]) -> ControlFlow<()>,
    ) -> io::Result<ControlFlow<()>> {
        let Self { source, current, begin, retired, is_dirty } = self;
        if let Some((mut old, until)) = retired.take() {
            let is_last = now >= until;
            if old.read(source, if is_last { Pieces::Raw } else { pieces }, block, now, sink)?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
            if !is_last {
                *retired = Some((old, until));
            }
        }
        if let Some(open) = current
            && open.read(source, pieces, block, now, sink)?.is_break()
        {
            return Ok(ControlFlow::Break(()));
        }
        let at_path = match fs::metadata(&source.path) {
            Ok(meta) if meta.is_file() => Some(identity(&meta)),
            _ => None,
        };
        if at_path.is_none() || at_path == current.as_ref().map(|open| open.identity) {
            return Ok(ControlFlow::Continue(()));
        }
        let Some((file, meta)) = open_regular(&source.path)? else { return Ok(ControlFlow::Continue(())) };
        let identity = identity(&meta);
        let offset = if begin.identity == Some(identity) { begin.offset } else { 0 };
        *begin = Position::default();
        if let Some(old) = current.replace(Opened { file, identity, offset, partial_since: None }) {
            *retired = Some((old, now + RETIRED_FOR));
        }
        // Read in the next turn, after the rest of the old one.
        *is_dirty = true;
        Ok(ControlFlow::Continue(()))
    }
}

impl Opened {
    fn read(
        &mut self,
        source: &Source,
        pieces: Pieces,
        block: &mut [u8],
        now: Instant,
        sink: &mut dyn FnMut(&Source, &[u8]) -> ControlFlow<()>,
    ) -> io::Result<ControlFlow<()>> {
        if self.file.metadata()?.len() < self.offset {
            // Emptied by `pm flush` or copytruncate.
            self.offset = 0;
            self.partial_since = None;
        }
        loop {
            let count = match self.file.read_at(block, self.offset) {
                Ok(0) => return Ok(ControlFlow::Continue(())),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            let bytes = &block[..count];
            let mut end = match pieces {
                Pieces::Raw => count,
                Pieces::Lines => memchr::memrchr(b'\n', bytes).map_or(0, |newline| newline + 1),
            };
            if end == 0 {
                let since = *self.partial_since.get_or_insert(now);
                if count < block.len() && now.saturating_duration_since(since) < PARTIAL_TIMEOUT {
                    return Ok(ControlFlow::Continue(()));
                }
                end = count;
            }
            self.partial_since = None;
            self.offset += end as u64;
            if sink(source, &bytes[..end]).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
    }
}

#[derive(Debug)]
struct Watcher {
    inotify: Inotify,
    by_dir: HashMap<PathBuf, WatchDescriptor>,
    dirs: HashMap<WatchDescriptor, PathBuf>,
}

enum Changed {
    Names(HashSet<PathBuf>),
    /// The queue ran over, or a directory went away.
    Anything,
}

impl Watcher {
    fn watch(&mut self, dir: &Path) -> bool {
        if self.by_dir.contains_key(dir) {
            return true;
        }
        let flags = AddWatchFlags::IN_MODIFY
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF
            | AddWatchFlags::IN_ONLYDIR;
        let Ok(watch) = self.inotify.add_watch(dir, flags) else { return false };
        self.by_dir.insert(dir.to_owned(), watch);
        self.dirs.insert(watch, dir.to_owned());
        true
    }

    fn changed(&mut self) -> Changed {
        let mut names = HashSet::new();
        let mut anything = false;
        while let Ok(events) = self.inotify.read_events() {
            for event in events {
                let gone =
                    AddWatchFlags::IN_DELETE_SELF | AddWatchFlags::IN_MOVE_SELF | AddWatchFlags::IN_IGNORED;
                if event.mask.intersects(AddWatchFlags::IN_Q_OVERFLOW | gone) {
                    anything = true;
                    if let Some(dir) = self.dirs.remove(&event.wd) {
                        self.by_dir.remove(&dir);
                        let _ = self.inotify.rm_watch(event.wd);
                    }
                } else if let (Some(dir), Some(name)) = (self.dirs.get(&event.wd), event.name) {
                    names.insert(dir.join(name));
                }
            }
        }
        if anything { Changed::Anything } else { Changed::Names(names) }
    }
}

/// `None` when there is nothing, or nothing that has lines.
fn open_regular(path: &Path) -> io::Result<Option<(File, fs::Metadata)>> {
    // Opening a FIFO would wait for its writer, and eat what belongs to its reader.
    match guarded::open_regular(path) {
        Ok(file) => {
            let meta = file.metadata()?;
            Ok(Some((file, meta)))
        }
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidInput) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn identity(meta: &fs::Metadata) -> (u64, u64) {
    (meta.dev(), meta.ino())
}

fn poll_timeout(span: Duration) -> PollTimeout {
    // Rounded up: a timer that ends just before the deadline would make the caller spin.
    PollTimeout::try_from(span + Duration::from_micros(999)).unwrap_or(PollTimeout::MAX)
}

fn poll_quietly(fds: &mut [PollFd<'_>], limit: PollTimeout) -> io::Result<i32> {
    match poll(fds, limit) {
        Err(nix::errno::Errno::EINTR) => Ok(0),
        result => Ok(result?),
    }
}

/// Whether escape sequences are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colours {
    /// Green for output, red for errors.
    Always,
    /// Plain text.
    Never,
}

/// Writes lines the way PM2 shows them: `0|api  | line`, or bytes as they are.
#[derive(Clone, Copy, Debug)]
pub struct Printer {
    colours: Colours,
    /// `None`: raw.
    name_width: Option<usize>,
}

impl Printer {
    /// A prefix before each line, with names padded to the longest of `sources`.
    #[must_use]
    pub fn prefixed<'a>(sources: impl IntoIterator<Item = &'a Source>, colours: Colours) -> Self {
        let width = sources.into_iter().map(|source| source.name.chars().count()).max().unwrap_or(0);
        Self { colours, name_width: Some(width) }
    }

    /// Bytes as they are.
    #[must_use]
    pub const fn raw() -> Self {
        Self { colours: Colours::Never, name_width: None }
    }

    /// Which pieces it wants to be given.
    #[must_use]
    pub const fn pieces(&self) -> Pieces {
        if self.name_width.is_some() { Pieces::Lines } else { Pieces::Raw }
    }

    /// Writes what was added to a source.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn print(&self, out: &mut impl Write, source: &Source, bytes: &[u8]) -> io::Result<()> {
        let Some(width) = self.name_width else { return out.write_all(bytes) };
        let prefix = self.prefix(source, width);
        for line in bytes.strip_suffix(b"\n").unwrap_or(bytes).split(|&byte| byte == b'\n') {
            out.write_all(prefix.as_bytes())?;
            out.write_all(line)?;
            out.write_all(b"\n")?;
        }
        Ok(())
    }

    fn prefix(&self, source: &Source, width: usize) -> String {
        let id = source.id.map_or_else(String::new, |id| format!("{id}|"));
        let text = format!("{id}{:<width$} | ", source.name);
        match (self.colours, source.stream) {
            (Colours::Never, _) => text,
            (Colours::Always, Stream::Out) => format!("\x1b[32m{text}\x1b[39m"),
            (Colours::Always, Stream::Err) => format!("\x1b[31m{text}\x1b[39m"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;

    use super::*;

    fn source(path: &Path) -> Source {
        Source { path: path.to_owned(), id: Some(PmId(0)), name: "api".into(), stream: Stream::Out }
    }

    fn append(path: &Path, text: &str) {
        let mut file = OpenOptions::new().append(true).create(true).open(path).unwrap();
        file.write_all(text.as_bytes()).unwrap();
    }

    /// Turns until what was seen is what is expected.
    fn expect(follower: &mut Follower, seen: &mut String, expected: &str) {
        let end = Instant::now() + Duration::from_secs(10);
        while seen != expected {
            assert!(Instant::now() < end, "seen {seen:?}, expected {expected:?}");
            let flow = follower.turn(Duration::from_secs(1), &mut |_, bytes| {
                seen.push_str(std::str::from_utf8(bytes).unwrap());
                ControlFlow::Continue(())
            });
            assert_eq!(flow.unwrap(), ControlFlow::Continue(()));
        }
    }

    #[test]
    fn last_lines_of_files_of_all_sizes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.log");
        let check = |text: &[u8], count: usize, expected: &[&[u8]]| {
            fs::write(&path, text).unwrap();
            let last = last_lines(&path, count).unwrap();
            assert_eq!(last.lines, expected);
            assert_eq!(last.end.offset, text.len() as u64);
        };
        check(b"", 3, &[]);
        check(b"a", 3, &[b"a"]);
        check(b"a\n", 3, &[b"a"]);
        check(b"\n", 3, &[b""]);
        check(b"a\n\nb\nc\n", 3, &[b"", b"b", b"c"]);
        check(b"a\nb\nc", 2, &[b"b", b"c"]);
        check(b"a\nb", 0, &[]);
        let long = vec![b'x'; 3 * BLOCK];
        check(&[b"first\n", &long[..], b"\nlast\n"].concat(), 2, &[&long, b"last"]);
        check(&[b"\n".repeat(BLOCK), b"y".to_vec()].concat(), 2, &[b"", b"y"]);
        assert!(last_lines(&dir.path().join("none"), 3).unwrap().lines.is_empty());
        assert!(last_lines(dir.path(), 3).unwrap().lines.is_empty());
    }

    #[test]
    fn follows_from_where_the_last_lines_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.log");
        append(&path, "old\n");
        let last = last_lines(&path, 5).unwrap();
        append(&path, "between\n");
        let mut follower = Follower::new(Pieces::Lines);
        follower.add(source(&path), last.end);
        let mut seen = String::new();
        expect(&mut follower, &mut seen, "between\n");
        append(&path, "new\nhalf");
        append(&path, " line\n");
        expect(&mut follower, &mut seen, "between\nnew\nhalf line\n");
        append(&path, "prompt> ");
        expect(&mut follower, &mut seen, "between\nnew\nhalf line\nprompt> ");
    }

    #[test]
    fn survives_rotation_truncation_and_a_directory_that_is_not_there_yet() {
        let dir = tempfile::tempdir().unwrap();
        let logs = dir.path().join("logs");
        let path = logs.join("x.log");
        let mut follower = Follower::new(Pieces::Lines);
        follower.add(source(&path), Position::default());
        let mut seen = String::new();
        expect(&mut follower, &mut seen, "");
        fs::create_dir(&logs).unwrap();
        append(&path, "1\n");
        expect(&mut follower, &mut seen, "1\n");
        // Renamed; its writer goes on for a moment.
        let old = logs.join("x.log.1");
        fs::rename(&path, &old).unwrap();
        append(&old, "2\n");
        append(&path, "4\n");
        expect(&mut follower, &mut seen, "1\n2\n4\n");
        append(&old, "3\n");
        expect(&mut follower, &mut seen, "1\n2\n4\n3\n");
        // Copied and truncated.
        File::create(&path).unwrap();
        expect(&mut follower, &mut seen, "1\n2\n4\n3\n");
        assert!(follower.turn(Duration::ZERO, &mut |_, _| ControlFlow::Break(())).unwrap().is_continue());
        append(&path, "5\n");
        expect(&mut follower, &mut seen, "1\n2\n4\n3\n5\n");
    }

    #[test]
    fn the_sink_ends_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.log");
        append(&path, "a\nb\n");
        let mut calls = 0;
        follow(vec![(source(&path), Position::default())], Pieces::Raw, |_, bytes| {
            assert_eq!(bytes, b"a\nb\n");
            calls += 1;
            ControlFlow::Break(())
        })
        .unwrap();
        assert_eq!(calls, 1);
    }

    #[test]
    fn prefixes_are_those_of_pm2() {
        let mut long = source(Path::new("/x"));
        long.name = "worker".into();
        long.stream = Stream::Err;
        let short = source(Path::new("/y"));
        let printed = |printer: Printer, source: &Source, bytes: &[u8]| {
            let mut out = Vec::new();
            printer.print(&mut out, source, bytes).unwrap();
            String::from_utf8(out).unwrap()
        };
        let plain = Printer::prefixed([&long, &short], Colours::Never);
        assert_eq!(printed(plain, &short, b"a\n\nb\n"), "0|api    | a\n0|api    | \n0|api    | b\n");
        let coloured = Printer::prefixed([&long, &short], Colours::Always);
        assert_eq!(printed(coloured, &long, b"x"), "\x1b[31m0|worker | \x1b[39mx\n");
        assert_eq!(printed(Printer::raw(), &long, b"x\xff"[..1].as_ref()), "x");
    }
}
