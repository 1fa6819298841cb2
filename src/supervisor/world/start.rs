//! Starting a run: its listeners, its descriptors, its log files, and the request to the keeper.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use super::super::launch::{self, Descriptors, Launch, Role};
use super::super::ready;
use super::super::rights::{self, Rights, owner_of};
use super::super::tag::{Held, Tag};
use super::probes::log_watch;
use super::{End, Run, World, hooks};
use crate::dispatch::{ChannelKind, Command, Greeting, NewInstance};
use crate::keeper::link::{LinkError, SpawnRequest};
use crate::keeper::wire;
use crate::logs::naming::{is_merged, log_paths};
use crate::logs::pump::{Attachment, Pipe, Route};
use crate::logs::stamp::Stamp;
use crate::logs::writer::Target;
use crate::model::id::{InstanceId, PmId, Slot};
use crate::model::saved::StartedFrom;
use crate::model::spec::{AppSpec, Runtime, Stdin};
use crate::policy::vocabulary::Retry;
use crate::store::state::Shell;
use crate::sys::cgroup::group::Group;
use crate::sys::guise::Guise;
use crate::sys::{guarded, pipe, users};

/// Why a run did not start.
pub(super) struct NotStarted {
    pub(super) error: String,
    pub(super) retry: Retry,
}

impl NotStarted {
    fn never(error: &impl ToString) -> Self {
        Self { error: error.to_string(), retry: Retry::Never }
    }

    /// Something outside of the app is not as it should be. A restart may fall into the minute in which a package is
    /// upgraded, a release is copied or another program still has the port, so it is tried again as after an exit.
    fn missing(error: &impl ToString) -> Self {
        Self { error: error.to_string(), retry: Retry::Backoff }
    }

    fn kernel(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |error| Self { error: format!("cannot {what}: {error}"), retry: Retry::Backoff }
    }
}

/// Whether trying again could help. Errors of the program itself (not executable, no access) stay; one that is missing
/// may be on its way.
pub(super) fn retry_of(errno: i32) -> Retry {
    const ENOENT: i32 = 2;
    const EAGAIN: i32 = 11;
    const ENOMEM: i32 = 12;
    const ENFILE: i32 = 23;
    const EMFILE: i32 = 24;
    const ETXTBSY: i32 = 26;
    if [ENOENT, EAGAIN, ENOMEM, ENFILE, EMFILE, ETXTBSY].contains(&errno) {
        Retry::Backoff
    } else {
        Retry::Never
    }
}

/// Both ends of everything a run has.
struct Ends {
    /// The child's descriptors, 0 upwards.
    child: Vec<OwnedFd>,
    /// Ours, each with what it is.
    ours: Vec<(Held, OwnedFd)>,
}

impl Ends {
    fn take(&mut self, kind: Held) -> Option<OwnedFd> {
        let index = self.ours.iter().position(|(known, _)| *known == kind)?;
        Some(self.ours.swap_remove(index).1)
    }
}

impl World {
    /// Asks the keeper for a process; `Spawned` or `SpawnFailed` of the keeper follows.
    pub(super) fn start(
        &mut self,
        id: &InstanceId,
        pm_id: PmId,
        spec: &Arc<AppSpec>,
        revision: u64,
        shell: &Shell,
    ) -> Result<StartedFrom, NotStarted> {
        let tag = Tag::new(id.clone(), pm_id, revision, self.mark);
        let token = tag.token();
        let rights = Rights::of(&spec.process).map_err(|error| NotStarted::never(&error))?;
        for reason in self.groups.unenforced(spec).map_err(|error| NotStarted::never(&error))? {
            tracing::warn!(instance = %id, reason, "limit");
        }
        let is_other_user = rights.credentials.is_some();
        if is_other_user {
            self.outside
                .make()
                .map_err(NotStarted::kernel("make a directory that the app's user can reach"))?;
        }
        let agent = if is_other_user { self.outside.agent() } else { self.agent.clone() };
        let notify = if spec.ready.wait_ready {
            Some(
                ready::bind_notify(self.notify_dir(spec), pm_id, id.generation, rights.owner())
                    .map_err(NotStarted::kernel("make a notify socket"))?,
            )
        } else {
            None
        };
        let role = Role {
            id,
            pm_id,
            token: &token,
            worker: spec.is_node_cluster().then(|| worker_number(id)),
            notify: notify.as_ref().map(|socket| OsStr::new(&socket.name)),
            agent: &agent,
        };
        let mut launch = launch::launch(spec, shell, &role).map_err(|error| NotStarted::missing(&error))?;
        if id.slot.is_hook() {
            launch.env.retain(|(name, _)| !hooks::names_an_instance(name, spec));
        }
        let from = launch::started_from(spec, &launch);
        let env = launch.env.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        self.open_listeners(spec, &rights.guise(), id.slot)?;
        let mut ends = self.ends(spec, id.slot)?;
        let notify_path = notify
            .as_ref()
            .filter(|socket| !socket.name.starts_with('@'))
            .map(|socket| socket.name.clone().into());
        if let Some(socket) = notify {
            ends.ours.push((Held::Notify, socket.socket.into()));
        }
        let group = self.groups.create(&tag, spec).map_err(|error| NotStarted::missing(&error))?;
        if let Err(error) = self.request(&tag, spec, launch, rights, group.as_ref(), &ends) {
            self.groups.remove(group);
            return Err(error);
        }
        let run = Run {
            spec: spec.clone(),
            tag,
            process: None,
            env,
            version: version_of(spec),
            node_version: None,
            ears: Vec::new(),
            notify_path,
            group,
            killed: false,
            channel: spec.has_channel(),
            ready: false,
            open: Vec::new(),
            end: End::default(),
            told: None,
            skipped_lines: 0,
            failed_listens: 0,
        };
        self.runs.insert(id.clone(), run);
        self.connect(id, &mut ends);
        Ok(from)
    }

    fn open_listeners(&mut self, spec: &AppSpec, guise: &Guise, slot: Slot) -> Result<(), NotStarted> {
        let opened = self.listeners.open(spec, guise, slot).map_err(|error| NotStarted::missing(&error))?;
        if spec.inherits_slots() && !opened.is_empty() {
            // A group that grows keeps its program; one that has just begun has none.
            self.listeners.steer(&spec.name, &self.steering);
        }
        for opened in opened {
            match self.link.hold(&opened.name, None, opened.socket.as_fd()) {
                // As with the start itself: the next keeper gets it from us.
                Ok(()) | Err(LinkError::Closed) => {}
                Err(error) => return Err(NotStarted::kernel("hold a listener")(io::Error::other(error))),
            }
        }
        Ok(())
    }

    /// Where the notify socket of an app lies: its user has to reach it.
    pub(super) fn notify_dir(&self, spec: &AppSpec) -> &Path {
        if spec.process.changes_user() && users::may_change_user() {
            self.outside.dir()
        } else {
            &self.run_dir
        }
    }

    fn ends(&self, spec: &AppSpec, slot: Slot) -> Result<Ends, NotStarted> {
        let pipes = NotStarted::kernel("make pipes");
        let mut ends = Ends { child: Vec::new(), ours: Vec::new() };
        match spec.stdin {
            Stdin::Pipe => {
                let (theirs, ours) = pipe::stdin_pipe().map_err(&pipes)?;
                ends.child.push(theirs);
                ends.ours.push((Held::Stdin, ours));
            }
            Stdin::Null => ends.child.push(File::open("/dev/null").map_err(&pipes)?.into()),
        }
        for kind in [Held::Out, Held::Err] {
            let (ours, theirs) = pipe::pipe_for_output().map_err(&pipes)?;
            ends.child.push(theirs);
            ends.ours.push((kind, ours));
        }
        let wanted = Descriptors::of(spec);
        if wanted.listeners > 0 {
            ends.child.extend(self.listeners.copies(spec, slot).map_err(&pipes)?);
        }
        if wanted.channel {
            let (ours, theirs) = pipe::channel_pair().map_err(&pipes)?;
            ends.child.push(theirs);
            ends.ours.push((Held::Channel, ours));
        }
        if wanted.ready {
            let (theirs, ours) = pipe::ready_pipe().map_err(&pipes)?;
            ends.child.push(theirs);
            ends.ours.push((Held::Ready, ours));
        }
        Ok(ends)
    }

    fn request(
        &mut self,
        tag: &Tag,
        spec: &AppSpec,
        launch: Launch,
        rights: Rights,
        group: Option<&Group>,
        ends: &Ends,
    ) -> Result<(), NotStarted> {
        let command = command_of(launch, Descriptors::of(spec), rights, group)
            .map_err(|error| NotStarted::never(&error))?;
        self.groups.check(&command).map_err(|error| NotStarted::never(&error))?;
        let request = self.next_request;
        self.next_request += 1;
        let fds: Vec<BorrowedFd<'_>> = ends.child.iter().map(AsFd::as_fd).collect();
        let names: Vec<(String, BorrowedFd<'_>)> =
            ends.ours.iter().map(|(kind, fd)| (tag.held(*kind), fd.as_fd())).collect();
        let held: Vec<(&str, BorrowedFd<'_>)> = names.iter().map(|(name, fd)| (name.as_str(), *fd)).collect();
        let spawn = SpawnRequest { request, tag: &tag.encode(), command: &command, fds: &fds, held: &held };
        match self.link.try_spawn(&spawn) {
            // The keeper is gone, which is no failure of the app: the next one finds that it was never started.
            Ok(()) | Err(LinkError::Closed) => {}
            Err(error @ LinkError::Wire(_)) => {
                return Err(NotStarted::never(&format!("cannot be asked for: {error:?}")));
            }
            Err(error) => return Err(NotStarted::kernel("ask the keeper")(io::Error::other(error))),
        }
        self.spawning.insert(request, tag.id.clone());
        Ok(())
    }

    /// Gives our ends to those who read them.
    pub(super) fn connect_parts(&mut self, id: &InstanceId, parts: Parts) {
        let Some(run) = self.runs.get_mut(id) else { return };
        let spec = run.spec.clone();
        let pm_id = run.tag.pm_id;
        let mut ears = Vec::new();
        if let Some(socket) = parts.notify {
            match ready::listen_notify(id.clone(), socket.into(), self.inputs.clone()) {
                Ok(ear) => ears.push(ear),
                Err(error) => tracing::error!(instance = %id, %error, "cannot listen on its notify socket"),
            }
        }
        if let Some(pipe) = parts.ready {
            match ready::listen_pipe(id.clone(), pipe, self.inputs.clone()) {
                Ok(ear) => ears.push(ear),
                Err(error) => tracing::error!(instance = %id, %error, "cannot listen on its ready pipe"),
            }
        }
        run.ears = ears;
        let Route { out, err, stamp, overflow, .. } = self.route(id, &spec, pm_id);
        let pipe = |fd: Option<OwnedFd>, target: Target| fd.map(|fd| Pipe { fd, target });
        let mark = hooks::mark(id, &spec);
        if let Some(console) = &self.console {
            self.logs.print(id.clone(), console.tap(id, spec.instances == 1, &mark));
        }
        let attachment = Attachment {
            id: id.clone(),
            out: pipe(parts.out, out),
            err: pipe(parts.err, err),
            stamp,
            overflow,
            mark,
            watch: log_watch(&spec),
        };
        let attached =
            if parts.adopted.is_some() { self.logs.adopt(attachment) } else { self.logs.attach(attachment) };
        if let Err(error) = attached {
            tracing::error!(instance = %id, %error, "cannot read its output");
        }
        if let Some(channel) = parts.channel {
            let kind = if spec.is_node_cluster() {
                let configured = self
                    .listeners
                    .copies(&spec, id.slot)
                    .unwrap_or_default()
                    .into_iter()
                    .map(Arc::new)
                    .collect();
                ChannelKind::Cluster { balance: spec.balance, configured }
            } else {
                ChannelKind::Plain
            };
            let new = NewInstance {
                id: id.clone(),
                channel,
                kind,
                agent: spec.has_agent().then_some(Greeting { websockets: spec.stop.drain_websockets }),
                guise: rights::guise_of(&spec.process),
                adopted: parts.adopted,
            };
            self.dispatch.send(Command::AddInstance(Box::new(new)));
        }
    }

    /// Where the output of a run goes.
    pub(super) fn route(&self, id: &InstanceId, spec: &AppSpec, pm_id: PmId) -> Route {
        let logs_dir = self.home.logs_dir();
        let paths = log_paths(&logs_dir, &spec.name, &spec.logs, is_merged(spec), pm_id);
        // Who could not be found was not started either; an adopted one whose user is gone keeps its files.
        let owner =
            rights::account_of(&spec.process).ok().flatten().map(|account| owner_of(&account.credentials));
        Route {
            id: id.clone(),
            out: Target::file(paths.out, owner).in_home(&logs_dir),
            err: Target::file(paths.err, owner).in_home(&logs_dir),
            stamp: spec.logs.date_format.as_deref().and_then(Stamp::new),
            overflow: spec.logs.overflow,
        }
    }

    fn connect(&mut self, id: &InstanceId, ends: &mut Ends) {
        let parts = Parts {
            out: ends.take(Held::Out),
            err: ends.take(Held::Err),
            channel: ends.take(Held::Channel),
            notify: ends.take(Held::Notify),
            ready: ends.take(Held::Ready),
            adopted: None,
        };
        self.connect_parts(id, parts);
    }
}

/// Our ends of what a run has.
#[derive(Debug, Default)]
pub(super) struct Parts {
    pub(super) out: Option<OwnedFd>,
    pub(super) err: Option<OwnedFd>,
    pub(super) channel: Option<OwnedFd>,
    pub(super) notify: Option<OwnedFd>,
    pub(super) ready: Option<OwnedFd>,
    pub(super) adopted: Option<crate::dispatch::Adopted>,
}

fn command_of(
    launch: Launch,
    descriptors: Descriptors,
    rights: Rights,
    group: Option<&Group>,
) -> Result<wire::Command, std::ffi::NulError> {
    let text = |text: &OsStr| CString::new(text.as_bytes());
    Ok(wire::Command {
        program: text(launch.program.as_os_str())?,
        args: launch.argv.iter().map(|argument| text(argument)).collect::<Result<_, _>>()?,
        env: launch
            .env
            .iter()
            .map(|(key, value)| CString::new(format!("{key}={value}")))
            .collect::<Result<_, _>>()?,
        cwd: text(launch.cwd.as_os_str())?,
        listen_pid: descriptors.listeners > 0,
        credentials: rights.credentials,
        umask: rights.umask,
        oom_score_adj: None,
        limits: rights.limits,
        confinement: rights.confinement,
        cgroup: text(group.map_or(OsStr::new(""), |group| group.dir().as_os_str()))?,
    })
}

/// `cluster.worker.id`: unique for every run of an app, and 1 to n for the first ones, as a genuine primary counts.
fn worker_number(id: &InstanceId) -> u32 {
    const SLOTS: u64 = 4096;
    let before = id.generation.0.saturating_sub(1).saturating_mul(SLOTS);
    let number = before.saturating_add(u64::from(id.slot.0)).saturating_add(1);
    u32::try_from(number % u64::from(u32::MAX)).unwrap_or(1).max(1)
}

/// What the app's package.json says, as PM2 shows it.
pub(super) fn version_of(spec: &AppSpec) -> String {
    #[derive(serde::Deserialize)]
    struct Package {
        version: String,
    }
    /// Far more than any real one has, in bytes.
    const PACKAGE_MAX: u64 = 1 << 20;
    const VERSION_MAX: usize = 256;
    let none = || "N/A".to_owned();
    if spec.command.runtime == Runtime::Other {
        return none();
    }
    let script = spec.cwd.join(&spec.command.script);
    let dirs = [script.parent(), Some(spec.cwd.as_path())];
    dirs.into_iter()
        .flatten()
        .find_map(|dir| {
            // The app may have put anything there, and everybody waits for the driver.
            let text = guarded::read_regular(&dir.join("package.json"), PACKAGE_MAX).ok()?;
            serde_json::from_slice::<Package>(&text).ok()
        })
        .filter(|Package { version }| version.len() <= VERSION_MAX && !version.chars().any(char::is_control))
        .map_or_else(none, |package| package.version)
}
