//! Which processes belong to an instance.
//!
//! A process belongs to an instance by descent from its main process, by session (every instance is started in one of
//! its own) or by the token `PM_INSTANCE` in its environment. Descent alone is not enough: when a process between
//! main and grandchild exits, the kernel gives the grandchild to the keeper, which is a child subreaper. Such orphans
//! are attributed by token first, then by session; those that match nothing are listed and never touched. Where an
//! instance has a control group of its own, everything in it belongs to it, however well it hides.
//!
//! This module only looks. [`worker`] sends the signals, [`runner`] says who should get a stop signal.
//!
//! Two ways lead to the same result. With few instances their trees are walked down through the `children` files, and
//! the keeper's own file lists mains and orphans in one read. With many, or where these files do not exist or the
//! instances were adopted and have another parent, all of /proc is read once.

mod job;
pub mod pidfd;
pub mod runner;
pub mod worker;

use std::collections::{HashMap, HashSet};
use std::io;
use std::time::Duration;

use super::cgroup::group::Group;
use super::procfs::{self, ProcessId, Procfs, Stat};

/// The variable that carries the token: `PM_INSTANCE=<app>:<slot>:<generation>:<nonce>`.
pub const TOKEN_VARIABLE: &str = "PM_INSTANCE";

/// With more instances than this, one pass over /proc is cheaper than walking every tree.
const WALK_AT_MOST: usize = 64;

/// How long a token once read is believed. A pid would have to come round again within this time to be mistaken.
const TOKEN_AGE: Duration = Duration::from_secs(10);

/// How often a walk looks again for processes that became orphans under it.
const RECHECKS: usize = 10;

/// Where the tree of an instance starts.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Root {
    /// The main process: leader of the instance's session. It may be a zombie; it must not have been reaped yet, else
    /// its pid could mean another process and the search costs a pass over /proc.
    pub main: ProcessId,
    /// The value of `PM_INSTANCE` that it was started with.
    pub token: String,
    /// The control group that holds nothing but the instance; `None` where groups are not ours to make.
    pub group: Option<Group>,
}

/// The processes of one instance.
#[derive(Clone, Debug, Default)]
pub struct Tree {
    /// All of them, zombies included; the main process first, if it is still there.
    pub members: Vec<Stat>,
}

impl Tree {
    /// Those that can still run code.
    pub fn living(&self) -> impl Iterator<Item = &Stat> {
        self.members.iter().filter(|stat| stat.alive())
    }

    /// Whether nothing of the instance runs any more. A main process that is only waiting to be reaped does not count.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.living().next().is_none()
    }
}

/// The trees of some instances at one time.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// In the order of the roots that were asked for.
    pub trees: Vec<Tree>,
    /// Living children of the keeper that match none of the roots and carry no token of another instance. A child
    /// between fork and exec, which has no token yet, shows up here too.
    pub unattributed: Vec<Stat>,
    /// Whether the keeper's children stood still long enough to be looked at one by one. Otherwise something may be
    /// missing, and no tree may be called empty.
    pub settled: bool,
}

impl Snapshot {
    /// Looks at all instances in one pass. `keeper` is their parent, which also inherits their orphans.
    ///
    /// What is found is certain to belong; something may be missing only if it was started during the pass.
    /// Zombies among the orphans are listed as members when their session tells.
    ///
    /// # Errors
    /// /proc cannot be read (no descriptors left); nothing may be concluded then.
    pub fn take(scanner: &mut Scanner, keeper: i32, roots: &[Root]) -> io::Result<Self> {
        scanner.snapshot(keeper, roots)
    }
}

/// Reads trees; keeps its buffers and the tokens it has seen. One per thread.
#[derive(Debug, Default)]
pub struct Scanner {
    procfs: Procfs,
    tokens: HashMap<i32, (Duration, Box<str>)>,
}

/// A snapshot in the making.
struct Pass<'a> {
    keeper: i32,
    roots: &'a [Root],
    by_token: HashMap<&'a str, usize>,
    by_session: HashMap<i32, usize>,
    owned: HashSet<i32>,
    trees: Vec<Tree>,
    unattributed: Vec<Stat>,
    /// Children of the keeper that were looked at.
    judged: HashSet<i32>,
}

impl Pass<'_> {
    fn own(&mut self, tree: usize, stat: Stat) -> bool {
        let fresh = self.owned.insert(stat.process.pid);
        if fresh {
            self.trees[tree].members.push(stat);
        }
        fresh
    }
}

impl Scanner {
    /// A scanner with an empty memory.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A scanner that does as if the kernel had no `children` files.
    #[must_use]
    pub fn without_children_files() -> Self {
        Self { procfs: Procfs::without_children_files(), tokens: HashMap::new() }
    }

    /// The reader, for questions about single processes.
    pub const fn procfs(&mut self) -> &mut Procfs {
        &mut self.procfs
    }

    /// Whether nothing of an instance runs any more.
    ///
    /// # Errors
    /// As [`Snapshot::take`].
    pub fn is_empty(&mut self, keeper: i32, root: &Root) -> io::Result<bool> {
        let snapshot = self.snapshot(keeper, std::slice::from_ref(root))?;
        Ok(snapshot.settled && snapshot.trees.iter().all(Tree::is_empty))
    }

    fn snapshot(&mut self, keeper: i32, roots: &[Root]) -> io::Result<Snapshot> {
        let mut pass = Pass {
            keeper,
            roots,
            by_token: roots.iter().enumerate().map(|(index, root)| (root.token.as_str(), index)).collect(),
            by_session: HashMap::with_capacity(roots.len()),
            owned: HashSet::new(),
            trees: vec![Tree::default(); roots.len()],
            unattributed: Vec::new(),
            judged: HashSet::new(),
        };
        if !self.procfs.has_children_files() || roots.len() > WALK_AT_MOST || !self.walk(&mut pass)? {
            self.scan(&mut pass)?;
        }
        // A parent that exits during the pass hands its children to the keeper, behind our back if they had their turn
        // before. So the keeper's list is read until it shows nothing unknown; twice where "nothing is left" would
        // be the answer, because the kernel may skip an entry when another is reaped during the read.
        let mut clean = if self.procfs.has_children_files() { 0 } else { 2 };
        for _ in 0..RECHECKS {
            if clean >= 2 || clean == 1 && !pass.trees.iter().any(Tree::is_empty) {
                break;
            }
            clean = if self.judge_orphans(&mut pass)? { 0 } else { clean + 1 };
        }
        self.join_groups(&mut pass)?;
        let settled = clean >= 2 || clean == 1 && !pass.trees.iter().any(Tree::is_empty);
        Ok(Snapshot { trees: pass.trees, unattributed: pass.unattributed, settled })
    }

    /// Adds what is in the instances' control groups and was not found by descent: it may have left the session, cleared
    /// its environment and lost its parent.
    fn join_groups(&mut self, pass: &mut Pass<'_>) -> io::Result<()> {
        let mut pids = Vec::new();
        for (index, root) in pass.roots.iter().enumerate() {
            let Some(group) = &root.group else { continue };
            pids.clear();
            group.members(&mut pids)?;
            for &pid in &pids {
                if !pass.owned.contains(&pid)
                    && let Some(stat) = self.procfs.stat(pid)?
                {
                    pass.own(index, stat);
                    // It was taken for nobody's before it was looked for here.
                    pass.unattributed.retain(|other| other.process != stat.process);
                }
            }
        }
        Ok(())
    }

    /// Walks down from the mains and through the keeper's orphans. `false`: an instance is not the keeper's child, so
    /// its orphans are elsewhere.
    fn walk(&mut self, pass: &mut Pass<'_>) -> io::Result<bool> {
        for (index, root) in pass.roots.iter().enumerate() {
            match self.procfs.stat(root.main.pid)? {
                Some(main) if main.process == root.main && main.ppid == pass.keeper => {
                    pass.by_session.insert(root.main.pid, index);
                    self.descend(pass, index, main)?;
                }
                _ => return Ok(false),
            }
        }
        Ok(true)
    }

    fn descend(&mut self, pass: &mut Pass<'_>, tree: usize, top: Stat) -> io::Result<()> {
        let mut open = vec![top];
        let mut children = Vec::new();
        while let Some(stat) = open.pop() {
            let expand = stat.alive();
            if !pass.own(tree, stat) || !expand {
                continue;
            }
            children.clear();
            self.procfs.children(stat.process.pid, stat.threads, &mut children)?;
            for &child in &children {
                if !pass.owned.contains(&child)
                    && let Some(stat) = self.procfs.stat(child)?
                {
                    open.push(stat);
                }
            }
        }
        Ok(())
    }

    /// Looks at those children of the keeper that were not seen yet; whether there were any that could have left
    /// something behind.
    fn judge_orphans(&mut self, pass: &mut Pass<'_>) -> io::Result<bool> {
        let mut listed = Vec::new();
        self.procfs.children(pass.keeper, 1, &mut listed)?;
        self.forget_tokens(listed.len());
        let now = procfs::since_boot();
        let mut fresh = false;
        for pid in listed {
            if pass.owned.contains(&pid) || !pass.judged.insert(pid) {
                continue;
            }
            if self.known_foreign(pass, pid, now) {
                continue;
            }
            let Some(stat) = self.procfs.stat(pid)? else {
                fresh = true;
                continue;
            };
            match self.attribute(pass, &stat, now)? {
                Verdict::Tree(index) => {
                    fresh = true;
                    self.descend(pass, index, stat)?;
                }
                Verdict::Foreign => fresh |= !stat.alive(),
                Verdict::Unattributed => match self.procfs.stat(pid)? {
                    Some(again) if again.alive() && again.vsize > 0 => pass.unattributed.push(again),
                    // It is on its way out: its environment is gone already, and it may still leave a child to the
                    // keeper. Look at it again until it is a zombie, whose children have been handed over.
                    _ => {
                        pass.judged.remove(&pid);
                        fresh = true;
                    }
                },
            }
        }
        Ok(fresh)
    }

    /// Whether a recent look at this child of the keeper found the token of an instance that is not asked for.
    fn known_foreign(&self, pass: &Pass<'_>, pid: i32, now: Duration) -> bool {
        self.tokens.get(&pid).is_some_and(|(read, token)| {
            now.saturating_sub(*read) < TOKEN_AGE && !pass.by_token.contains_key(token.as_ref())
        })
    }

    fn attribute(&mut self, pass: &Pass<'_>, stat: &Stat, now: Duration) -> io::Result<Verdict> {
        let pid = stat.process.pid;
        // Ourselves: the supervisor is a child of the keeper like everything else.
        if u32::try_from(pid) == Ok(std::process::id()) {
            return Ok(Verdict::Foreign);
        }
        let token = self.procfs.environ(pid, TOKEN_VARIABLE)?;
        if let Some(token) = &token {
            self.tokens.insert(pid, (now, token.as_str().into()));
            if let Some(&index) = pass.by_token.get(token.as_str()) {
                return Ok(Verdict::Tree(index));
            }
        } else {
            self.tokens.remove(&pid);
        }
        if token.is_none()
            && let Some(&index) = pass.by_session.get(&stat.session)
        {
            return Ok(Verdict::Tree(index));
        }
        Ok(if stat.alive() && token.is_none() { Verdict::Unattributed } else { Verdict::Foreign })
    }

    fn forget_tokens(&mut self, children: usize) {
        if self.tokens.len() > 2 * children + 64 {
            let now = procfs::since_boot();
            self.tokens.retain(|_, (read, _)| now.saturating_sub(*read) < TOKEN_AGE);
        }
    }

    /// Reads the whole process table once and sorts it out.
    fn scan(&mut self, pass: &mut Pass<'_>) -> io::Result<()> {
        pass.owned.clear();
        pass.judged.clear();
        pass.by_session.clear();
        pass.unattributed.clear();
        pass.trees.iter_mut().for_each(|tree| tree.members.clear());

        let mut pids = Vec::new();
        procfs::all_pids(&mut pids)?;
        let mut table = HashMap::with_capacity(pids.len());
        for &pid in &pids {
            if let Some(stat) = self.procfs.stat(pid)? {
                table.insert(pid, stat);
            }
        }
        // A parent may have gone between its turn and its child's: the child has a new parent by now.
        for &pid in &pids {
            if let Some(stat) = table.get(&pid)
                && stat.ppid != 0
                && !table.contains_key(&stat.ppid)
            {
                match self.procfs.stat(pid)? {
                    Some(again) => table.insert(pid, again),
                    None => table.remove(&pid),
                };
            }
        }
        let mut children: HashMap<i32, Vec<i32>> = HashMap::with_capacity(table.len());
        for &pid in &pids {
            if let Some(stat) = table.get(&pid) {
                children.entry(stat.ppid).or_default().push(pid);
            }
        }

        // The keeper's orphans are judged later, from its own list, where that exists.
        let mut reapers = Vec::new();
        for (index, root) in pass.roots.iter().enumerate() {
            match table.get(&root.main.pid) {
                Some(main) if main.process == root.main => {
                    pass.by_session.insert(root.main.pid, index);
                    reapers.push(main.ppid);
                    own_all(pass, index, main, &table, &children);
                }
                // The pid is in use for something else, and with it perhaps the session.
                Some(_) => reapers.push(1),
                None => {
                    pass.by_session.insert(root.main.pid, index);
                    reapers.push(1);
                }
            }
        }
        reapers.retain(|&reaper| reaper != pass.keeper);
        if !self.procfs.has_children_files() {
            reapers.push(pass.keeper);
        }
        reapers.sort_unstable();
        reapers.dedup();
        let now = procfs::since_boot();
        for reaper in reapers {
            for pid in children.get(&reaper).into_iter().flatten() {
                if pass.owned.contains(pid) || self.known_foreign(pass, *pid, now) {
                    continue;
                }
                let stat = table[pid];
                match self.attribute(pass, &stat, now)? {
                    Verdict::Tree(index) => own_all(pass, index, &stat, &table, &children),
                    Verdict::Unattributed if reaper == pass.keeper => pass.unattributed.push(stat),
                    Verdict::Foreign | Verdict::Unattributed => {}
                }
            }
        }
        self.forget_tokens(pass.roots.len());
        Ok(())
    }
}

enum Verdict {
    Tree(usize),
    Foreign,
    Unattributed,
}

fn own_all(
    pass: &mut Pass<'_>,
    tree: usize,
    top: &Stat,
    table: &HashMap<i32, Stat>,
    children: &HashMap<i32, Vec<i32>>,
) {
    let mut open = vec![*top];
    while let Some(stat) = open.pop() {
        if pass.own(tree, stat) {
            open.extend(
                children.get(&stat.process.pid).into_iter().flatten().filter_map(|pid| table.get(pid)),
            );
        }
    }
}
