//! Counting from outside: what the kernel says runs and listens, against what the table says.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader};

use super::home::{Home, Row};
use super::{PATIENT, process, wait_until};

/// What runs and listens in a home, as the kernel sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Census {
    /// The processes of each run, by `app:slot:generation` of the token that every process of it inherits.
    pub(crate) runs: BTreeMap<String, BTreeSet<i32>>,
    /// TCP ports of listeners that the daemon or an app holds.
    pub(crate) ports: BTreeSet<u16>,
}

impl Census {
    pub(crate) fn take(home: &Home) -> Self {
        let mut census = Self::default();
        let mut inodes = BTreeSet::new();
        for pid in home.processes() {
            if let Some(token) = process::environ(pid).get("PM_INSTANCE") {
                // The last part is the nonce.
                let run = token.rsplit_once(':').map_or(token.as_str(), |(run, _)| run);
                census.runs.entry(run.to_owned()).or_default().insert(pid);
            }
            inodes.extend(process::descriptors(pid).into_values());
        }
        for file in ["/proc/net/tcp", "/proc/net/tcp6"] {
            let Ok(table) = fs::File::open(file) else { continue };
            // Listeners come first; of connections that load leaves behind there are tens of thousands.
            for line in BufReader::new(table).lines().skip(1).map_while(Result::ok) {
                let fields: Vec<&str> = line.split_whitespace().collect();
                if fields.get(3) != Some(&"0A") {
                    break;
                }
                let ours = fields.get(9).is_some_and(|inode| inodes.contains(&format!("socket:[{inode}]")));
                let port = fields.get(1).and_then(|address| address.rsplit_once(':'));
                if let (true, Some((_, port))) = (ours, port) {
                    census.ports.extend(u16::from_str_radix(port, 16));
                }
            }
        }
        census
    }

    /// What is wrong with the table.
    pub(crate) fn complaints(&self, rows: &[Row]) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut claimed = BTreeSet::new();
        for row in rows {
            match row.status.as_str() {
                "online" => {
                    let holder = self.runs.iter().find(|(_, pids)| pids.contains(&row.pid));
                    let of_slot = format!("{}:{}:", row.name, row.slot);
                    match holder {
                        Some((run, _)) if run.starts_with(&of_slot) => {
                            claimed.insert(run.clone());
                        }
                        _ => wrong.push(format!(
                            "{}/{} is online as {}, which is not",
                            row.name, row.slot, row.pid
                        )),
                    }
                }
                "stopped" | "errored" => {}
                passing => wrong.push(format!("{}/{} is {passing}", row.name, row.slot)),
            }
        }
        for (run, pids) in &self.runs {
            if !claimed.contains(run) {
                wrong.push(format!("{run} has the processes {pids:?} and no row"));
            }
        }
        wrong
    }

    /// Waits until everything has come to rest, and every process has a row and every row its process.
    #[track_caller]
    pub(crate) fn balances(home: &Home) -> Self {
        wait_until("processes are rows", PATIENT, || {
            // A process may end between the two looks; then the next look is right.
            let (rows, census) =
                if home.has_daemon() { (home.rows(), Self::take(home)) } else { Default::default() };
            let wrong = census.complaints(&rows);
            if wrong.is_empty() { Ok(census) } else { Err(wrong) }
        })
    }
}
