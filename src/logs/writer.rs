//! One log file, written by one or more streams.
//!
//! The file is opened O_APPEND. That costs nothing and makes everything else that touches it harmless: after a
//! `copytruncate` or `pm flush` the next write lands at the new end instead of behind a hole, and during an upgrade two
//! supervisors cannot overwrite each other. There is one writer per path, so what has arrived of a batch can still be
//! told from the file's size ([`journal`](super::journal)).
//!
//! A full disk never stops an app: what cannot be written is dropped and counted, and the file says so as soon as it
//! takes bytes again. A disk that hangs holds up the pump's thread and, once their pipes are full, the apps, as if they
//! wrote their files themselves; it never holds up the driver.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{
    FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::libc;
use nix::unistd::{Gid, Uid, fchown};

use super::journal::{Destination, Journal, Lines, Piece, StreamKey};
use crate::model::spec::Overflow;
use crate::sys::guarded::{self, Way};
use crate::sys::peer;

/// Log files are readable by their group, not by the world.
const MODE: u32 = 0o640;
/// How often the path is compared with the open file.
const IDENTITY_CHECK: Duration = Duration::from_secs(1);
/// How long after a failed write or open the next one is tried: a storm of lines on a full disk costs no system calls.
const RETRY: Duration = Duration::from_millis(100);
/// How often the same trouble is reported.
const REPORT_EVERY: Duration = Duration::from_secs(10);

/// Who owns a log file that we create.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Numeric user id.
    pub uid: u32,
    /// Numeric group id.
    pub gid: u32,
}

/// Who is to own a log file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heir {
    /// The app's user.
    pub owner: Owner,
    /// The file lies in the home's own directory of logs, where a file of ours is a log that we have made.
    pub home: bool,
}

/// Where a stream goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Read and thrown away (the last lines are kept in memory all the same).
    Discard,
    /// Appended to a file.
    File {
        /// Absolute. Created with its parents; a symlink is refused, except below `/dev` and `/proc`.
        path: PathBuf,
        /// Given to the file when we create it.
        heir: Option<Heir>,
    },
}

impl Target {
    /// The target for a log path: `/dev/null` needs no file.
    #[must_use]
    pub fn file(path: PathBuf, owner: Option<Owner>) -> Self {
        let heir = owner.map(|owner| Heir { owner, home: false });
        if path == Path::new("/dev/null") { Self::Discard } else { Self::File { path, heir } }
    }

    /// The same target, by the home's directory of logs.
    #[must_use]
    pub fn in_home(mut self, logs_dir: &Path) -> Self {
        if let Self::File { path, heir: Some(heir) } = &mut self {
            heir.home = path.parent() == Some(logs_dir);
        }
        self
    }
}

/// Output that a file did not take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// The file.
    pub path: PathBuf,
    /// Why, in the kernel's words.
    pub reason: String,
    /// Bytes lost in this file since the last time it took any.
    pub dropped: u64,
}

/// Stands for whoever wrote before us. Keys of streams count up from 0.
const SOMEBODY: StreamKey = StreamKey::MAX - 1;

/// What became of bytes handed to a [`Writer`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum Outcome {
    Written,
    /// So many of the last bytes are lost; the caller skips to its next line start so that what follows is whole.
    Dropped(usize),
    /// So many of the first bytes are written, and the others are to be tried again.
    Refused(usize),
}

/// An open file.
#[derive(Debug)]
pub(super) struct Open {
    pub(super) file: File,
    /// Device and inode; `None` for anything but a regular file, which is never rotated.
    identity: Option<(u64, u64)>,
}

/// An open log file.
#[derive(Debug)]
pub(crate) struct Writer {
    path: PathBuf,
    heir: Option<Heir>,
    open: Option<Open>,
    checked: Instant,
    /// The file was moved away: go on in a new one at the next line start.
    is_stale: bool,
    /// The stream whose unfinished line is the end of the file.
    mid_line: Option<StreamKey>,
    failure: Option<Failure>,
    dropped_ever: u64,
    reported: Option<Instant>,
    report: Option<Trouble>,
}

#[derive(Debug)]
struct Failure {
    reason: String,
    dropped: u64,
    retry_at: Instant,
}

impl Writer {
    /// Opens the file. When that fails, it is tried again as long as there is output for it.
    pub(crate) fn new(path: PathBuf, heir: Option<Heir>, now: Instant) -> Self {
        let mut writer = Self {
            path,
            heir,
            open: None,
            checked: now,
            is_stale: false,
            mid_line: None,
            failure: None,
            dropped_ever: 0,
            reported: None,
            report: None,
        };
        match open_file(&writer.path, writer.heir) {
            Ok(open) => writer.open = Some(open),
            Err(error) => writer.fail(&error, 0, now),
        }
        writer
    }

    /// A program begins to write that has not written here before: when the file ends in somebody's unfinished line, as
    /// after a crash, that line is ended first.
    pub(crate) fn begin_line(&mut self) {
        let Some(identity) = self.open.as_ref().and_then(|open| open.identity) else { return };
        if self.mid_line.is_none() && ends_mid_line(&self.path, identity).unwrap_or(false) {
            self.mid_line = Some(SOMEBODY);
        }
    }

    /// Whether the file ends in an unfinished line of this stream.
    pub(crate) fn is_mid_line_of(&self, stream: StreamKey) -> bool {
        self.mid_line == Some(stream)
    }

    /// The stream whose unfinished line is the end of the file, as the supervisor before this one left it.
    pub(crate) fn goes_on(&mut self, stream: StreamKey) {
        let Some(identity) = self.open.as_ref().and_then(|open| open.identity) else { return };
        if self.mid_line.is_none_or(|other| other == SOMEBODY)
            && ends_mid_line(&self.path, identity).unwrap_or(false)
        {
            self.mid_line = Some(stream);
        }
    }

    /// Appends bytes of a stream. When the file ends in another stream's unfinished line, that line is ended first.
    pub(crate) fn append(
        &mut self,
        journal: &mut Journal,
        stream: StreamKey,
        piece: Piece,
        overflow: Overflow,
        now: Instant,
    ) -> Outcome {
        if piece.is_empty() {
            return Outcome::Written;
        }
        if self.failure.is_some() && self.recover(journal, piece, now).is_err() {
            return match overflow {
                Overflow::Drop => self.lose(piece.len()),
                Overflow::Block => Outcome::Refused(0),
            };
        }
        let before = self.mid_line;
        self.follow_rotation(now);
        let mut rest = piece;
        if self.is_stale {
            // The line that is open stays in the file where it began, if its end is at hand.
            if self.mid_line == Some(stream)
                && let Some(end) = memchr::memchr(b'\n', journal.bytes(rest))
            {
                let (first, others) = rest.split(end + 1);
                if let Err((error, written)) = self.write(journal, Some(stream), first) {
                    return match overflow {
                        Overflow::Drop => self.fail_after(&error, rest.len() - written, now),
                        Overflow::Block => self.refuse(journal, &error, first, written, before, now),
                    };
                }
                rest = others;
            }
            if let Err(error) = self.reopen(journal, now) {
                // What was stamped and is half written has no way back.
                let must_drop = overflow == Overflow::Drop || piece.is_stamped() && rest.len() < piece.len();
                return match must_drop {
                    true => self.fail_after(&error, rest.len(), now),
                    false => {
                        self.fail(&error, 0, now);
                        Outcome::Refused(piece.len() - rest.len())
                    }
                };
            }
        }
        let overflow = match overflow {
            Overflow::Block if piece.is_stamped() && rest.len() < piece.len() => Overflow::Drop,
            overflow => overflow,
        };
        let first = piece.len() - rest.len();
        if self.mid_line.is_some_and(|other| other != stream) {
            let newline = journal.note(b"\n", rest);
            if let Err((error, _)) = self.write(journal, None, newline) {
                return match overflow {
                    Overflow::Drop => self.fail_after(&error, rest.len(), now),
                    Overflow::Block => {
                        self.fail(&error, 0, now);
                        Outcome::Refused(first)
                    }
                };
            }
        }
        let before = self.mid_line;
        match (self.write(journal, Some(stream), rest), overflow) {
            (Ok(()), _) => Outcome::Written,
            (Err((error, written)), Overflow::Drop) => self.fail_after(&error, rest.len() - written, now),
            (Err((error, written)), Overflow::Block) => {
                match self.refuse(journal, &error, rest, written, before, now) {
                    Outcome::Refused(written) => Outcome::Refused(first + written),
                    other => other,
                }
            }
        }
    }

    /// The rest of a piece is to be tried again. What is stamped is taken back: how far a part of it reaches in what has
    /// arrived is not known.
    fn refuse(
        &mut self,
        journal: &Journal,
        error: &io::Error,
        piece: Piece,
        written: usize,
        before: Option<StreamKey>,
        now: Instant,
    ) -> Outcome {
        self.fail(error, 0, now);
        if written == 0 || !piece.is_stamped() {
            return Outcome::Refused(written);
        }
        let undone = self.open.as_ref().map_or(Ok(()), |open| {
            let size = open.file.metadata()?.len();
            open.file.set_len(size.saturating_sub(written as u64))
        });
        if undone.is_err() {
            return self.fail_after(error, piece.len() - written, now);
        }
        if let Some(stream) = self.mid_line {
            journal.set_mid_line(stream, false);
        }
        if let Some(stream) = before {
            journal.set_mid_line(stream, true);
        }
        self.mid_line = before;
        Outcome::Refused(0)
    }

    /// Output was thrown away because the disk is slow; the file says so before anything else.
    pub(crate) fn lose_to_slowness(&mut self, lost: u64, now: Instant) {
        let dropped = self.failure.as_ref().map_or(0, |failure| failure.dropped) + lost;
        self.dropped_ever += lost;
        self.note_failure("the disk is slower than the output", dropped, now, now);
    }

    /// Says in the file what is missing, if it takes anything by now.
    pub(crate) fn say_losses(&mut self, journal: &mut Journal, now: Instant) {
        let is_due =
            self.failure.as_ref().is_some_and(|failure| failure.dropped > 0 && failure.retry_at <= now);
        if is_due {
            journal.resume(StreamKey::MAX, &[]);
            let nothing = Journal::as_arrived(&journal.range());
            // It is tried again.
            let _ = self.recover(journal, nothing, now);
            let end = journal.range().end;
            journal.done(end..end);
        }
    }

    /// Whether there is something to be said that the file has not taken.
    pub(crate) fn owes_notice(&self) -> bool {
        self.failure.as_ref().is_some_and(|failure| failure.dropped > 0)
    }

    /// Closes the file and opens its path again, whatever is there now. The old file stays open when that fails.
    pub(crate) fn reopen(&mut self, journal: &Journal, now: Instant) -> io::Result<()> {
        let open = open_file(&self.path, self.heir)?;
        if self.open.as_ref().is_none_or(|old| old.identity.is_none() || old.identity != open.identity)
            && let Some(stream) = self.mid_line.take()
        {
            journal.set_mid_line(stream, false);
        }
        self.open = Some(open);
        self.checked = now;
        self.is_stale = false;
        Ok(())
    }

    /// Trouble that is to be reported, at most once in ten seconds.
    pub(crate) const fn take_report(&mut self) -> Option<Trouble> {
        self.report.take()
    }

    /// Bytes lost since the last call.
    pub(crate) const fn take_dropped(&mut self) -> u64 {
        std::mem::replace(&mut self.dropped_ever, 0)
    }

    /// Counts the rest of a line whose beginning is lost.
    pub(crate) const fn count_skipped(&mut self, count: usize) {
        self.dropped_ever += count as u64;
    }

    /// Notices, at most once a second, that somebody moved or removed the file.
    fn follow_rotation(&mut self, now: Instant) {
        if now.saturating_duration_since(self.checked) < IDENTITY_CHECK {
            return;
        }
        self.checked = now;
        let Some(identity) = self.open.as_ref().and_then(|open| open.identity) else { return };
        let at_path = fs::symlink_metadata(&self.path).map(|meta| (meta.dev(), meta.ino()));
        self.is_stale = at_path.ok() != Some(identity);
    }

    fn recover(&mut self, journal: &mut Journal, before: Piece, now: Instant) -> io::Result<()> {
        let Some(failure) = &self.failure else { return Ok(()) };
        if now < failure.retry_at {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let notice = (failure.dropped > 0).then(|| {
            let newline = if self.mid_line.is_some() { "\n" } else { "" };
            format!("{newline}[pm] {} bytes of output were lost here: {}\n", failure.dropped, failure.reason)
        });
        let attempt = if self.open.is_none() { self.reopen(journal, now) } else { Ok(()) };
        let attempt = attempt.and_then(|()| match notice {
            Some(notice) => {
                let notice = journal.note(notice.as_bytes(), before);
                self.write(journal, None, notice).map_err(|(error, _)| error)
            }
            None => Ok(()),
        });
        match attempt {
            Ok(()) => self.failure = None,
            Err(ref error) => self.fail(error, 0, now),
        }
        attempt
    }

    /// Writes everything, or says how far it came. What belongs to no stream ends the line that is open.
    fn write(
        &mut self,
        journal: &mut Journal,
        owner: Option<StreamKey>,
        piece: Piece,
    ) -> Result<(), (io::Error, usize)> {
        if piece.is_empty() {
            return Ok(());
        }
        let Some(open) = &self.open else { return Err((io::ErrorKind::NotFound.into(), 0)) };
        let to = Destination { file: &open.file, path: &self.path, identity: open.identity };
        let ends = self.mid_line.filter(|&other| Some(other) != owner);
        let result = journal.write(to, piece, Lines { owner, ends });
        let written = result.as_ref().map_or_else(|(_, written)| *written, |()| piece.len());
        if let Some(last) = written.checked_sub(1).map(|last| journal.bytes(piece)[last]) {
            self.mid_line = (last != b'\n').then_some(owner.unwrap_or(SOMEBODY));
        }
        result
    }

    fn fail_after(&mut self, error: &io::Error, lost: usize, now: Instant) -> Outcome {
        self.fail(error, lost, now);
        Outcome::Dropped(lost)
    }

    fn fail(&mut self, error: &io::Error, lost: usize, now: Instant) {
        let lost = lost as u64;
        let dropped = self.failure.as_ref().map_or(0, |failure| failure.dropped) + lost;
        self.dropped_ever += lost;
        self.note_failure(&error.to_string(), dropped, now + RETRY, now);
    }

    fn note_failure(&mut self, reason: &str, dropped: u64, retry_at: Instant, now: Instant) {
        self.failure = Some(Failure { reason: reason.to_owned(), dropped, retry_at });
        if self.reported.is_none_or(|at| now.saturating_duration_since(at) >= REPORT_EVERY) {
            self.reported = Some(now);
            self.report = Some(Trouble { path: self.path.clone(), reason: reason.to_owned(), dropped });
        }
    }

    fn lose(&mut self, count: usize) -> Outcome {
        if let Some(failure) = &mut self.failure {
            failure.dropped += count as u64;
        }
        self.dropped_ever += count as u64;
        Outcome::Dropped(count)
    }
}

/// Opens a log file for appending and creates it, and its parents, where they are missing.
///
/// O_NONBLOCK means nothing for a regular file; it keeps a FIFO without a reader, or a terminal that is held, from
/// blocking every app's output.
pub(super) fn open_file(path: &Path, heir: Option<Heir>) -> io::Result<Open> {
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY | if may_be_link(path) { 0 } else { libc::O_NOFOLLOW };
    // The directory may be another user's, who must not send root elsewhere.
    let way = if may_be_link(path) { None } else { Some(guarded::way_to(path)?) };
    // The links below /dev and /proc are root's too.
    let is_roots = way.as_ref().is_none_or(Way::is_roots);
    let path = way.as_ref().map_or(path, Way::as_path);
    let mut options = OpenOptions::new();
    options.append(true).mode(MODE).custom_flags(flags);
    let file = match options.open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent)?;
            }
            match options.clone().create_new(true).open(path) {
                Ok(file) => {
                    // Whatever the umask of the shell that started the daemon was.
                    file.set_permissions(fs::Permissions::from_mode(MODE))?;
                    if let Some(Heir { owner: Owner { uid, gid }, .. }) = heir {
                        fchown(&file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
                    }
                    file
                }
                // Somebody else, logrotate perhaps, was quicker.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => options.open(path)?,
                Err(error) => return Err(error),
            }
        }
        Err(error) => return Err(error),
    };
    let meta = file.metadata()?;
    if meta.file_type().is_block_device() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a block device is no log file"));
    }
    if let Some(Heir { owner: Owner { uid, gid }, home }) = heir
        && meta.is_file()
    {
        if meta.nlink() > 1 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a file with several names is no log file of this user",
            ));
        }
        // Ours, from the time before the app had a user, or anything of root's that lay in a directory of the user's, who
        // has renamed it to get it or to write in it.
        if meta.uid() != uid && meta.uid() == peer::own_uid() {
            if !is_roots {
                let reason = format!(
                    "this file is root's, and not root alone can put files there; `chown {uid}:{gid}` makes it the log \
                     of the app's user, if it is one, or move it away"
                );
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, reason));
            }
            if home && way.is_some() {
                fchown(&file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
            }
        }
    }
    let identity = meta.file_type().is_file().then(|| (meta.dev(), meta.ino()));
    Ok(Open { file, identity })
}

/// Through a descriptor of its own: the one for appending cannot read, and one that can would make a FIFO its own reader.
fn ends_mid_line(path: &Path, identity: (u64, u64)) -> io::Result<bool> {
    let flags = libc::O_NONBLOCK | libc::O_NOFOLLOW;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let meta = file.metadata()?;
    let mut last = [b'\n'];
    if (meta.dev(), meta.ino()) == identity && meta.len() > 0 {
        file.read_exact_at(&mut last, meta.len() - 1)?;
    }
    Ok(last != [b'\n'])
}

/// `/dev/stdout` and its like are symlinks that root made. `/dev/shm` and `/dev/mqueue` are anybody's.
fn may_be_link(path: &Path) -> bool {
    let ours = path.starts_with("/dev") || path.starts_with("/proc");
    ours && !path.starts_with("/dev/shm") && !path.starts_with("/dev/mqueue")
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;

    use super::*;

    /// A writer and the memory that its streams are in.
    struct Desk {
        writer: Writer,
        journal: Journal,
    }

    impl Desk {
        fn new(path: PathBuf, now: Instant) -> Self {
            Self { writer: Writer::new(path, None, now), journal: Journal::private().unwrap() }
        }

        fn append(&mut self, stream: StreamKey, bytes: &[u8], now: Instant) -> Outcome {
            self.journal.resume(stream, bytes);
            let all = self.journal.range();
            let piece = Journal::as_arrived(&all);
            let outcome = self.writer.append(&mut self.journal, stream, piece, Overflow::Drop, now);
            self.journal.done(all.end..all.end);
            outcome
        }
    }

    fn later(now: Instant) -> Instant {
        now + Duration::from_secs(2)
    }

    #[test]
    fn creates_parents_and_a_file_that_is_not_for_everybody() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/x.log");
        let now = Instant::now();
        let mut desk = Desk::new(path.clone(), now);
        assert_eq!(desk.append(1, b"hello\n", now), Outcome::Written);
        assert_eq!(fs::read(&path).unwrap(), b"hello\n");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o640);
    }

    #[test]
    fn a_symlink_is_refused_and_a_device_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let (victim, link) = (dir.path().join("victim"), dir.path().join("x.log"));
        fs::write(&victim, "precious").unwrap();
        std::os::unix::fs::symlink(&victim, &link).unwrap();
        let now = Instant::now();
        let mut desk = Desk::new(link, now);
        assert_eq!(desk.append(1, b"gotcha\n", later(now)), Outcome::Dropped(7));
        assert_eq!(desk.writer.take_dropped(), 7);
        assert!(desk.writer.take_report().is_some());
        assert_eq!(fs::read(&victim).unwrap(), b"precious");

        let mut desk = Desk::new("/dev/fd/2".into(), now);
        assert!(desk.writer.take_report().is_none());
        assert_eq!(desk.append(1, b"", now), Outcome::Written);
    }

    #[test]
    fn two_streams_do_not_share_a_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.log");
        let now = Instant::now();
        let mut desk = Desk::new(path.clone(), now);
        for (stream, bytes) in [(1, &b"pa"[..]), (1, b"rt"), (2, b"whole\n"), (1, b" rest\n"), (2, b"end\n")]
        {
            assert_eq!(desk.append(stream, bytes, now), Outcome::Written);
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), "part\nwhole\n rest\nend\n");
    }

    #[test]
    fn a_new_program_begins_a_line_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.log");
        let now = Instant::now();
        for (before, expected) in
            [("last wor", "last wor\nfirst\n"), ("done\n", "done\nfirst\n"), ("", "first\n")]
        {
            fs::write(&path, before).unwrap();
            let mut desk = Desk::new(path.clone(), now);
            desk.writer.begin_line();
            assert_eq!(desk.append(1, b"first\n", now), Outcome::Written);
            assert_eq!(fs::read_to_string(&path).unwrap(), expected);
        }
    }

    #[test]
    fn a_new_file_belongs_to_the_owner_that_was_named() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: only root can give files away");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.log");
        let heir = Heir { owner: Owner { uid: 12345, gid: 23456 }, home: false };
        let _writer = Writer::new(path.clone(), Some(heir), Instant::now());
        let meta = fs::metadata(&path).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (12345, 23456));
    }

    #[test]
    fn what_root_has_is_given_away_in_the_home_only_and_not_written_where_others_can_put_it() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: only root can give files away");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for (name, owner) in [("logs", 0), ("elsewhere", 0), ("theirs", 12345), ("theirs/roots", 0)] {
            fs::create_dir(at(name)).unwrap();
            std::os::unix::fs::chown(at(name), Some(owner), None).unwrap();
        }
        let owner = Owner { uid: 12345, gid: 23456 };
        for (name, taken, uid) in [
            ("logs/x.log", true, 12345),
            ("elsewhere/x.log", true, 0),
            ("theirs/x.log", false, 0),
            ("theirs/roots/x.log", false, 0),
        ] {
            fs::write(at(name), "secret\n").unwrap();
            let Target::File { path, heir } = Target::file(at(name), Some(owner)).in_home(&at("logs")) else {
                panic!("a file");
            };
            let opened = open_file(&path, heir);
            assert_eq!(opened.is_ok(), taken, "{name}: {opened:?}");
            assert_eq!(fs::metadata(at(name)).unwrap().uid(), uid, "{name}");
            if let Err(error) = opened {
                assert!(error.to_string().contains("chown 12345:23456"), "{error}");
            }
        }
        // Given by hand, or made by us, it is a log like any other, also when it is opened again.
        std::os::unix::fs::chown(at("theirs/x.log"), Some(12345), None).unwrap();
        for name in ["theirs/x.log", "theirs/new.log", "theirs/new.log"] {
            open_file(&at(name), Some(Heir { owner, home: false })).unwrap();
            assert_eq!(fs::metadata(at(name)).unwrap().uid(), 12345, "{name}");
        }
    }

    #[test]
    fn rotation_by_rename_is_followed_at_a_line_end() {
        let dir = tempfile::tempdir().unwrap();
        let (path, old) = (dir.path().join("x.log"), dir.path().join("x.log.1"));
        let now = Instant::now();
        let mut desk = Desk::new(path.clone(), now);
        let _ = desk.append(1, b"one\ntw", now);
        fs::rename(&path, &old).unwrap();
        let _ = desk.append(1, b"o\nthree\n", later(now));
        assert_eq!(fs::read_to_string(&old).unwrap(), "one\ntwo\n");
        assert_eq!(fs::read_to_string(&path).unwrap(), "three\n");
    }

    #[test]
    fn truncation_leaves_no_hole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.log");
        let now = Instant::now();
        let mut desk = Desk::new(path.clone(), now);
        let _ = desk.append(1, b"one\n", now);
        File::create(&path).unwrap();
        let _ = desk.append(1, b"two\n", now);
        assert_eq!(fs::read_to_string(&path).unwrap(), "two\n");
    }

    #[test]
    fn what_a_full_target_refuses_is_counted_and_said() {
        // A FIFO whose reader is slow: the portable kind of "full".
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        mkfifo(&path, Mode::from_bits_truncate(0o600)).unwrap();
        let mut reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        let mut now = Instant::now();
        let mut desk = Desk::new(path, now);
        let mut line = vec![b'x'; 1023];
        line.push(b'\n');
        let mut lost = 0;
        for _ in 0..1024 {
            if desk.append(1, &line, now) != Outcome::Written {
                lost += 1;
            }
        }
        assert!(lost > 0);
        assert_eq!(
            desk.writer.take_report().unwrap().reason,
            "Resource temporarily unavailable (os error 11)"
        );
        let mut text = Vec::new();
        let _ = reader.read_to_end(&mut text);
        now = later(now);
        assert_eq!(desk.append(1, b"after\n", now), Outcome::Written);
        let dropped = desk.writer.take_dropped();
        text.clear();
        let _ = reader.read_to_end(&mut text);
        let text = String::from_utf8(text).unwrap();
        assert!(text.contains(&format!("[pm] {dropped} bytes of output were lost here: ")), "{text}");
        assert!(text.ends_with("\nafter\n"), "{text}");
    }
}
