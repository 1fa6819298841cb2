//! Who belongs to which instance, remembered from pass to pass.
//!
//! The kill path looks at everything anew each time (`sys::tree`). Sampling may not cost that much: here only processes
//! that were not there in the last pass are looked at, and one listing of /proc tells which these are. Attribution
//! follows the same rules: descent, then the token `PM_INSTANCE`, then the session.

use std::collections::{HashMap, HashSet};
use std::io;
use std::time::Duration;

use crate::model::id::InstanceId;
use crate::model::moment::Moment;
use crate::sys::procfs::{self, ProcessId, Procfs, Stat};
use crate::sys::tree::TOKEN_VARIABLE;

/// After this time everybody is looked at again: a pid that was somebody else's may have come round.
const FORGET_FOREIGN: Duration = Duration::from_secs(60);

/// An instance to be measured: who it is, and its main process.
pub type Main = (InstanceId, ProcessId);

/// Which processes belong to which instance. An instance is known by its main process here.
#[derive(Debug, Default)]
pub struct Census {
    members: HashMap<i32, Belonging>,
    /// Seen, and nobody's.
    foreign: HashSet<i32>,
    foreign_since: Moment,
    pids: Vec<i32>,
}

/// What is known of a member.
#[derive(Clone, Copy, Debug)]
struct Belonging {
    process: ProcessId,
    main: ProcessId,
}

/// Processes that were looked at in this pass, so that nobody reads them twice.
pub(super) type Fresh = HashMap<i32, Stat>;

impl Census {
    /// Brings the census up to date. Returns what was read of new processes.
    ///
    /// # Errors
    /// /proc cannot be read.
    pub(super) fn update(
        &mut self,
        procfs: &mut Procfs,
        now: Moment,
        keeper: i32,
        instances: &[Main],
    ) -> io::Result<Fresh> {
        procfs::all_pids(&mut self.pids)?;
        self.pids.sort_unstable();
        let mains: HashMap<i32, ProcessId> =
            instances.iter().map(|(_, process)| (process.pid, *process)).collect();
        let pids = &self.pids;
        self.members.retain(|pid, member| {
            pids.binary_search(pid).is_ok() && mains.get(&member.main.pid) == Some(&member.main)
        });
        if now.since(self.foreign_since) >= FORGET_FOREIGN
            || mains.keys().any(|pid| self.foreign.contains(pid))
        {
            self.foreign.clear();
            self.foreign_since = now;
        } else {
            self.foreign.retain(|pid| pids.binary_search(pid).is_ok());
        }

        let mut fresh = Fresh::new();
        for &pid in &self.pids {
            if !self.members.contains_key(&pid)
                && !self.foreign.contains(&pid)
                && let Some(stat) = procfs.stat(pid)?
            {
                fresh.insert(pid, stat);
            }
        }
        self.attribute(procfs, keeper, instances, &mains, &fresh)?;
        Ok(fresh)
    }

    /// The processes of every instance, by main process.
    pub(super) fn trees(&self) -> HashMap<ProcessId, Vec<ProcessId>> {
        let mut trees: HashMap<ProcessId, Vec<ProcessId>> = HashMap::new();
        for member in self.members.values() {
            trees.entry(member.main).or_default().push(member.process);
        }
        trees
    }

    /// The pid means another process by now: it is looked at again in the next pass.
    pub(super) fn forget(&mut self, pid: i32) {
        self.members.remove(&pid);
    }

    fn attribute(
        &mut self,
        procfs: &mut Procfs,
        keeper: i32,
        instances: &[Main],
        mains: &HashMap<i32, ProcessId>,
        fresh: &Fresh,
    ) -> io::Result<()> {
        // Adopted instances have another parent than the keeper, and their orphans go there.
        let mut reapers = HashSet::from([keeper]);
        let mut open: Vec<&Stat> = Vec::with_capacity(fresh.len());
        for stat in fresh.values() {
            if mains.get(&stat.process.pid) == Some(&stat.process) {
                self.own(stat, stat.process);
                reapers.insert(stat.ppid);
            } else {
                open.push(stat);
            }
        }
        // Parents mostly have smaller pids than their children, so this goes round once or twice.
        open.sort_unstable_by_key(|stat| stat.process.pid);
        let mut tokens: Option<HashMap<String, ProcessId>> = None;
        let mut unattributed = HashSet::new();
        loop {
            let before = open.len();
            let mut rest = Vec::new();
            for stat in open {
                let pid = stat.process.pid;
                if let Some(parent) = self.members.get(&stat.ppid) {
                    self.own(stat, parent.main);
                } else if pid == keeper || u32::try_from(pid) == Ok(std::process::id()) {
                    // The daemon itself, whatever environment it was started in.
                    self.foreign.insert(pid);
                } else if reapers.contains(&stat.ppid) {
                    let tokens = tokens.get_or_insert_with(|| token_prefixes(instances));
                    let main = match procfs.environ(pid, TOKEN_VARIABLE)? {
                        Some(token) => token.rfind(':').and_then(|end| tokens.get(&token[..end])),
                        None => mains.get(&stat.session),
                    };
                    match main {
                        Some(&main) => self.own(stat, main),
                        // A new instance before its exec, or one that is not in the list yet: asked again next time.
                        None => {
                            unattributed.insert(pid);
                        }
                    }
                } else if unattributed.contains(&stat.ppid) {
                    unattributed.insert(pid);
                } else if stat.ppid == 0 || self.foreign.contains(&stat.ppid) {
                    self.foreign.insert(pid);
                } else {
                    rest.push(stat);
                }
            }
            // What remains lost its parent during the pass and has its turn in the next.
            if rest.is_empty() || rest.len() == before {
                return Ok(());
            }
            open = rest;
        }
    }

    fn own(&mut self, stat: &Stat, main: ProcessId) {
        self.members.insert(stat.process.pid, Belonging { process: stat.process, main });
    }
}

/// Tokens without their nonce: among the children of one keeper the rest tells instances apart.
fn token_prefixes(instances: &[Main]) -> HashMap<String, ProcessId> {
    instances
        .iter()
        .map(|(id, process)| (format!("{}:{}:{}", id.app, id.slot, id.generation), *process))
        .collect()
}
