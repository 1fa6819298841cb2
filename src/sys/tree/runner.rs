//! Who should get the stop signal.
//!
//! An app is often started by something that does not pass signals on: a shell that waits for its command, or a package
//! runner (`npm start` is npm → sh → node). A signal to the main process would then never reach the app's handler. So
//! the target is the main process or, while that is a shell or a package runner with exactly one child, that child, and
//! so on. Where such a runner has several (`node app.js | pino-pretty`), it and each of them is told, as by Ctrl-C at a
//! terminal: it waits for them, so that a signal to it alone would change nothing.

use std::io;
use std::path::Path;

use crate::sys::procfs::{self, ProcessId, Procfs, Stat};

const SHELLS: [&str; 4] = ["sh", "bash", "dash", "ash"];
const PACKAGE_RUNNERS: [&str; 5] = ["npm", "npx", "pnpm", "pnpx", "yarn"];

/// Deeper chains than this are taken for a mistake of ours.
const DEEPEST: usize = 32;

/// Of more processes than this nobody looks whether they run others.
const MOST: usize = 256;

/// The processes from the main one down to the target, which is the last. Empty when the main process has exited.
///
/// # Errors
/// /proc cannot be read.
pub fn target_chain(procfs: &mut Procfs, main: ProcessId) -> io::Result<Vec<ProcessId>> {
    let mut chain = Vec::new();
    let Some(mut stat) = procfs.stat(main.pid)?.filter(|stat| stat.process == main && stat.alive()) else {
        return Ok(chain);
    };
    loop {
        chain.push(stat.process);
        if chain.len() == DEEPEST || !is_runner(procfs, &stat)? {
            return Ok(chain);
        }
        let children = living_children(procfs, &stat)?;
        let &[only] = children.as_slice() else { return Ok(chain) };
        stat = only;
    }
}

/// Who gets the signal at the end of a chain: its last process and, when that only waits for several others, those.
///
/// # Errors
/// /proc cannot be read.
pub fn targets(procfs: &mut Procfs, chain: &[ProcessId]) -> io::Result<Vec<ProcessId>> {
    let Some(&last) = chain.last() else { return Ok(Vec::new()) };
    let mut found = vec![last];
    let mut at = 0;
    // Breadth first, so that runners below runners are looked at too; bounded against a tree that grows meanwhile.
    while let Some(&process) = found.get(at)
        && at < MOST
    {
        at += 1;
        let Some(stat) = procfs.stat(process.pid)?.filter(|stat| stat.process == process && stat.alive())
        else {
            continue;
        };
        if !is_runner(procfs, &stat)? {
            continue;
        }
        for child in living_children(procfs, &stat)? {
            found.push(child.process);
        }
    }
    Ok(found)
}

fn living_children(procfs: &mut Procfs, parent: &Stat) -> io::Result<Vec<Stat>> {
    let mut pids = Vec::new();
    if procfs.has_children_files() {
        procfs.children(parent.process.pid, parent.threads, &mut pids)?;
    } else {
        procfs::all_pids(&mut pids)?;
    }
    let mut children = Vec::new();
    for pid in pids {
        if let Some(stat) = procfs.stat(pid)?
            && stat.ppid == parent.process.pid
            && stat.alive()
        {
            children.push(stat);
        }
    }
    Ok(children)
}

fn is_runner(procfs: &mut Procfs, stat: &Stat) -> io::Result<bool> {
    let pid = stat.process.pid;
    let arguments = procfs.cmdline(pid)?.unwrap_or_default();
    let program = match procfs.program(pid) {
        Some(name) => name,
        // Another user's process: what it calls itself has to do.
        None => base(arguments.first().map_or("", |a| a.as_str())).trim_start_matches('-').to_owned(),
    };
    Ok(runs_others(&program, &arguments))
}

/// Whether a program with these arguments (its own name first) only runs others.
fn runs_others(program: &str, arguments: &[String]) -> bool {
    let argument = |index: usize| arguments.get(index).map_or("", |a| base(a).trim_start_matches('-'));
    if SHELLS.contains(&program) || PACKAGE_RUNNERS.contains(&program) {
        return true;
    }
    if program == "busybox" {
        return SHELLS.contains(&argument(0)) || argument(0) == "busybox" && SHELLS.contains(&argument(1));
    }
    if program != "node" && program != "nodejs" {
        return false;
    }
    // npm and the like put a title in place of their arguments: "npm start", "npm run web", "npm exec".
    if let [title] = arguments {
        let first = title.split([' ', ':']).next().unwrap_or("");
        return PACKAGE_RUNNERS.contains(&first);
    }
    node_script(arguments).is_some_and(|script| {
        let name = base(script);
        let name = [".js", ".cjs", ".mjs"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
        // npm-cli.js, npx-cli.js, pnpm.cjs, yarn.js, yarn-4.1.0.cjs, and their links in bin.
        PACKAGE_RUNNERS.contains(&name)
            || matches!(name, "npm-cli" | "npx-cli")
            || name.strip_prefix("yarn-").is_some_and(|v| v.starts_with(|c: char| c.is_ascii_digit()))
    })
}

/// The script among the arguments of node: the first that is neither an option nor the value of one.
fn node_script(arguments: &[String]) -> Option<&str> {
    let mut rest = arguments.iter().skip(1);
    while let Some(argument) = rest.next() {
        match argument.as_str() {
            "-r"
            | "--require"
            | "--import"
            | "--loader"
            | "--experimental-loader"
            | "-C"
            | "--conditions"
            | "--env-file" => {
                rest.next();
            }
            "-e" | "--eval" | "-p" | "--print" => return None,
            option if option.starts_with('-') => {}
            script => return Some(script),
        }
    }
    None
}

fn base(path: &str) -> &str {
    Path::new(path).file_name().and_then(|name| name.to_str()).unwrap_or("")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shells_and_package_runners_are_told_from_apps() {
        for (program, arguments, expected) in [
            ("dash", &["sh", "-c", "node x; true"][..], true),
            ("bash", &["/bin/bash", "./start.sh"], true),
            ("busybox", &["/bin/sh", "run"], true),
            ("busybox", &["busybox", "ash", "-c", "x"], true),
            ("busybox", &["httpd", "-f"], false),
            ("node", &["npm start"], true),
            ("node", &["npm run web"], true),
            ("node", &["npm exec"], true),
            ("node", &["/usr/bin/node", "/usr/bin/npm", "start"], true),
            (
                "node",
                &["node", "--no-warnings", "-r", "x.js", "/usr/lib/node_modules/npm/bin/npm-cli.js"],
                true,
            ),
            ("node", &["node", "/repo/.yarn/releases/yarn-4.1.0.cjs", "start"], true),
            ("node", &["node", "/usr/lib/node_modules/pnpm/bin/pnpm.cjs", "start"], true),
            ("pnpm", &["pnpm", "start"], true),
            ("node", &["node", "server.js", "npm"], false),
            ("node", &["node", "yarn-spinner.js"], false),
            ("node", &["node", "-e", "npm"], false),
            ("node", &["my app"], false),
            ("node", &["node"], false),
            ("python3.11", &["python3", "sh"], false),
            ("", &[], false),
        ] {
            let owned: Vec<String> = arguments.iter().map(|&a| a.to_owned()).collect();
            assert_eq!(runs_others(program, &owned), expected, "{program} {arguments:?}");
        }
    }
}
