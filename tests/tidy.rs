//! Reads the sources and says which line breaks which rule of `docs/architecture.md`.
//!
//! Each rule is a function from a file's path and text to complaints (`path:line: what`), so that every one has a
//! control below: planted bad text must be found at its line. Comments and string contents are blanked first where a
//! rule is about code; line numbers stay.
#![expect(clippy::unwrap_used, reason = "a test that cannot read the sources has failed")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Which `crate::X` (or `crate::X::y`) a file below `src/<layer>/` may import, besides its own layer.
const LAYERS: &[(&str, &[&str])] = &[
    ("model", &[]),
    ("policy", &["model"]),
    ("config", &["model"]),
    ("sys", &["model"]),
    ("store", &["model", "sys"]),
    ("keeper", &["sys"]),
    ("node", &["model", "sys"]),
    ("dispatch", &["model", "sys", "node"]),
    ("logs", &["model", "sys", "policy::rotate"]),
    ("metrics", &["model", "sys"]),
    ("ipc", &["model", "sys", "supervisor::handle"]),
    (
        "supervisor",
        &[
            "model",
            "policy",
            "sys",
            "store",
            "keeper",
            "node",
            "dispatch",
            "logs",
            "metrics",
            "ipc::protocol",
        ],
    ),
    (
        "cli",
        &[
            "model",
            "config",
            "ipc",
            "store::paths",
            "store::container",
            "store::environment",
            "store::events",
            "store::state",
            "logs",
            "sys",
        ],
    ),
    (
        "daemon",
        &[
            "model",
            "policy",
            "config",
            "sys",
            "store",
            "keeper",
            "node",
            "dispatch",
            "logs",
            "metrics",
            "supervisor",
            "ipc",
            "cli",
        ],
    ),
];

/// What `model` and `policy` may not know: clocks, randomness, async, files, system calls.
const IMPURE: &[&str] = &[
    "std::fs",
    "std::env",
    "std::thread",
    "std::process",
    "std::io",
    "std::time::Instant",
    "std::time::SystemTime",
    "Instant::now",
    "SystemTime",
    "tokio",
    "rand",
    "nix",
    "libc",
    "async",
];

/// Only the wait helper sleeps: everybody else waits for a condition with a deadline through it.
const WAIT_HELPER: &str = "tests/e2e/support/wait.rs";

// The rules. ------------------------------------------------------------------------------------------------------

fn layer_rule(path: &str, text: &str) -> Vec<String> {
    let Some((layer, rest)) = path.strip_prefix("src/").and_then(|p| p.split_once('/')) else {
        return Vec::new();
    };
    let Some((_, allowed)) = LAYERS.iter().find(|(name, _)| *name == layer) else {
        return vec![format!("{path}:1: `{layer}` is not in the table of layers")];
    };
    let code = code_only(text);
    let mut found = Vec::new();
    let depth = 1 + rest.matches('/').count() + usize::from(!rest.ends_with("mod.rs"));
    for (offset, target) in crate_paths(&code, depth) {
        let top = target.split("::").next().unwrap_or_default();
        let known = LAYERS.iter().any(|(name, _)| *name == top);
        let fine = top == layer
            || allowed.iter().any(|a| *a == top || target == *a || target.starts_with(&format!("{a}::")));
        if known && !fine {
            found.push(format!(
                "{path}:{}: `{layer}` must not import `crate::{target}` (it may import {})",
                line_of(&code, offset),
                if allowed.is_empty() { "nobody".to_owned() } else { allowed.join(", ") }
            ));
        }
    }
    found
}

fn module_doc_rule(path: &str, text: &str) -> Vec<String> {
    let first = text.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
    if first.starts_with("//!") {
        Vec::new()
    } else {
        vec![format!("{path}:1: no `//!` text says what this file is for")]
    }
}

fn unsafe_rule(path: &str, text: &str) -> Vec<String> {
    if !path.starts_with("src/") || path.starts_with("src/sys/") {
        return Vec::new();
    }
    let code = code_only(text);
    words(&code, "unsafe")
        .map(|at| format!("{path}:{}: `unsafe` belongs to src/sys", line_of(&code, at)))
        .collect()
}

fn purity_rule(path: &str, text: &str) -> Vec<String> {
    let policy = path.starts_with("src/policy/");
    if !policy && !path.starts_with("src/model/") {
        return Vec::new();
    }
    let code = code_only(text);
    IMPURE
        .iter()
        .copied()
        .chain(policy.then_some("serde"))
        .flat_map(|word| words(&code, word).map(move |at| (word, at)))
        .map(|(word, at)| format!("{path}:{}: `{word}` has no place in model and policy", line_of(&code, at)))
        .collect()
}

/// Words no file of the repository may hold: whole-machine killers, and paths of the machine it was written on.
fn banned_words_rule(path: &str, text: &str) -> Vec<String> {
    let killers = [concat!("pk", "ill"), concat!("kill", "all")];
    let places = [concat!("/wo", "rk/"), concat!("../sha", "red/")];
    let mut found = Vec::new();
    for (number, line) in text.lines().enumerate() {
        for word in killers.iter().filter(|word| words(line, word).next().is_some()) {
            found
                .push(format!("{path}:{}: `{word}` ends strangers; end by pid what you started", number + 1));
        }
        for word in places {
            let hit = line.match_indices(word).any(|(at, _)| {
                !line[..at].chars().next_back().is_some_and(|c| c.is_alphanumeric() || "._-/".contains(c))
            });
            // A release's `shared` directory is a fine example; a note of another repository is not.
            if hit && (word.starts_with('/') || line.contains(".md")) {
                found.push(format!("{path}:{}: `{word}` exists on one machine only", number + 1));
            }
        }
    }
    found
}

fn ignored_tests_rule(path: &str, text: &str) -> Vec<String> {
    let code = code_only(text);
    code.match_indices("#[ignore")
        .map(|(at, _)| {
            let line = line_of(&code, at);
            format!("{path}:{line}: an ignored test; assert today's behaviour with a note instead")
        })
        .collect()
}

fn sleep_rule(path: &str, text: &str) -> Vec<String> {
    if path == WAIT_HELPER {
        return Vec::new();
    }
    let code = code_only(text);
    // In src only the tests are meant; the lints of clippy watch over the rest.
    let tests_from = if path.starts_with("tests/") { Some(0) } else { code.find("#[cfg(test)]") };
    let Some(start) = tests_from else { return Vec::new() };
    let calls: &[&str] =
        if path.starts_with("tests/") { &["sleep", "sleep_until", "sleep_ms"] } else { &["thread::sleep"] };
    calls
        .iter()
        .flat_map(|call| words(&code, call))
        .filter(|at| {
            *at >= start
                && code[*at..]
                    .trim_start_matches(|c| c == ':' || c == '_' || char::is_alphanumeric(c))
                    .starts_with('(')
        })
        .map(|at| {
            format!("{path}:{}: a sleep that hopes; wait for a condition with a deadline", line_of(&code, at))
        })
        .collect()
}

/// Files that no `mod` declares are compiled by nobody. Takes all files of one crate below `root`.
fn forgotten_files_rule(root: &str, entries: &[&str], files: &BTreeMap<String, String>) -> Vec<String> {
    let mut found = Vec::new();
    for path in files.keys() {
        let Some(rest) = path.strip_prefix(root) else { continue };
        if entries.contains(&rest) {
            continue;
        }
        let (dir, name) = rest
            .strip_suffix("/mod.rs")
            .unwrap_or(rest)
            .trim_end_matches(".rs")
            .rsplit_once('/')
            .map_or(("", rest.trim_end_matches("/mod.rs").trim_end_matches(".rs")), |(dir, name)| {
                (dir, name)
            });
        let parents: Vec<String> = if dir.is_empty() {
            entries.iter().map(|entry| format!("{root}{entry}")).collect()
        } else {
            vec![format!("{root}{dir}/mod.rs"), format!("{root}{dir}.rs")]
        };
        let declared = parents
            .iter()
            .filter_map(|parent| files.get(parent))
            .any(|text| words(&code_only(text), &format!("mod {name}")).next().is_some());
        // Tests beside their file: `#[path = "wire_tests.rs"] mod tests;` in a neighbour.
        let place = path.rsplit_once('/').map_or("", |(place, _)| place);
        let declared = declared
            || files.iter().any(|(neighbour, text)| {
                neighbour.rsplit_once('/').map_or("", |(place, _)| place) == place
                    && text.contains(&format!("#[path = \"{name}.rs\"]"))
            });
        if !declared {
            found.push(format!("{path}:1: no `mod {name};` in {}", parents.join(" or ")));
        }
    }
    found
}

/// The pains of other process managers that must have tests named after them (`docs/pains.md`).
fn pains() -> impl Iterator<Item = u32> {
    (1..=33).chain(37..=38).chain(42..=43)
}

/// Which pains no test of these files is named after, and which the page does not list.
fn pains_rule(tests: &BTreeMap<String, String>, page: &str) -> Vec<String> {
    let code: Vec<String> = tests.values().map(|text| code_only(text)).collect();
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let has_test = |number: u32| {
        let prefix = format!("pain_{number:02}_");
        code.iter().any(|text| {
            text.match_indices(&prefix).any(|(at, _)| {
                let name = text[at..].split(|c| !is_name(c)).next().unwrap_or_default();
                // A function, or the name that a macro makes one of.
                text[..at].ends_with("fn ") || text[at + name.len()..].starts_with(':')
            })
        })
    };
    let untested = pains().filter(|number| !has_test(*number));
    let unlisted = pains().filter(|number| !page.contains(&format!("| {number} |")));
    untested
        .map(|number| format!("tests/:0: no test is named `pain_{number:02}_…`"))
        .chain(unlisted.map(|number| format!("docs/pains.md:0: does not list pain {number}")))
        .collect()
}

// Reading Rust, roughly. ------------------------------------------------------------------------------------------

/// The text with comments and the contents of strings and chars blanked; every newline stays where it was.
fn code_only(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    let blank = |out: &mut Vec<u8>, part: &[u8]| {
        out.extend(part.iter().map(|b| if *b == b'\n' { b'\n' } else { b' ' }));
    };
    while i < bytes.len() {
        let rest = &bytes[i..];
        let end = if rest.starts_with(b"//") {
            rest.iter().position(|b| *b == b'\n').unwrap_or(rest.len())
        } else if rest.starts_with(b"/*") {
            rest.windows(2).position(|w| w == b"*/").map_or(rest.len(), |p| p + 2)
        } else if let Some(hashes) = raw_string(rest, i.checked_sub(1).map(|p| bytes[p])) {
            let close = format!("\"{}", "#".repeat(hashes));
            let from = hashes + 2;
            find(&rest[from..], close.as_bytes()).map_or(rest.len(), |p| from + p + close.len())
        } else if rest[0] == b'"' {
            let mut p = 1;
            while p < rest.len() && rest[p] != b'"' {
                p += if rest[p] == b'\\' { 2 } else { 1 };
            }
            (p + 1).min(rest.len())
        } else if rest[0] == b'\'' && rest.len() > 2 && rest[1] == b'\\' {
            rest[2..].iter().position(|b| *b == b'\'').map_or(1, |p| p + 3)
        } else if rest[0] == b'\'' && rest.len() > 2 && rest[2] == b'\'' {
            3
        } else {
            out.push(rest[0]);
            i += 1;
            continue;
        };
        blank(&mut out, &rest[..end]);
        i += end;
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// The number of hashes when a raw string starts here.
fn raw_string(rest: &[u8], before: Option<u8>) -> Option<usize> {
    if rest[0] != b'r' || before.is_some_and(|b| b.is_ascii_alphanumeric() && b != b'b' || b == b'_') {
        return None;
    }
    let hashes = rest[1..].iter().take_while(|b| **b == b'#').count();
    (rest.get(1 + hashes) == Some(&b'"')).then_some(hashes)
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|w| w == needle)
}

fn line_of(text: &str, offset: usize) -> usize {
    text[..offset].matches('\n').count() + 1
}

/// Where `word` stands as a word of its own.
fn words<'a>(text: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(word).map(|(at, _)| at).filter(move |at| {
        !text[..*at].chars().next_back().is_some_and(part)
            && !text[at + word.len()..].chars().next().is_some_and(part)
    })
}

/// Every path that starts at the crate's root, written `crate::…` or with enough `super::`, groups taken apart.
fn crate_paths(code: &str, depth: usize) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let supers = "super::".repeat(depth);
    for prefix in ["crate::", supers.as_str()] {
        for (at, _) in code.match_indices(prefix) {
            let before = code[..at].chars().next_back();
            if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':' || c == '$') {
                continue;
            }
            let start = at + prefix.len();
            if code[start..].starts_with('{') {
                found.extend(group_members(&code[start + 1..], start + 1));
            } else {
                found.push((start, leading_path(&code[start..])));
            }
        }
    }
    found
}

/// `ident::ident…` at the start of a text.
fn leading_path(text: &str) -> String {
    let end = text.find(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':')).unwrap_or(text.len());
    let path = text[..end].trim_end_matches(':').to_owned();
    // `crate::store::{paths, state}`: one module below is all the table knows about.
    let inner = text[end..].strip_prefix('{').filter(|_| text[..end].ends_with("::"));
    match inner.map(|inner| group_members(inner, 0)) {
        Some(members) if members.len() == 1 => format!("{path}::{}", members[0].1),
        _ => path,
    }
}

fn group_members(text: &str, base: usize) -> Vec<(usize, String)> {
    let mut members = Vec::new();
    let mut depth = 0_usize;
    let mut expect = true;
    for (at, c) in text.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => expect = true,
            c if expect && depth == 0 && (c.is_alphanumeric() || c == '_') => {
                members.push((base + at, leading_path(&text[at..])));
                expect = false;
            }
            _ => {}
        }
    }
    members
}

// The repository. -------------------------------------------------------------------------------------------------

fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// All text files below the given places, by path relative to the repository.
fn files_in(places: &[&str], wanted: impl Fn(&Path) -> bool) -> BTreeMap<String, String> {
    let root = repository();
    let mut found = BTreeMap::new();
    let mut open: Vec<PathBuf> = places.iter().map(|p| root.join(p)).collect();
    while let Some(path) = open.pop() {
        let Ok(kind) = path.metadata() else { continue };
        let name = path.file_name().unwrap_or_default();
        if kind.is_dir() {
            if name != "node_modules" && name != "target" {
                open.extend(path.read_dir().unwrap().map(|entry| entry.unwrap().path()));
            }
        } else if wanted(&path)
            && let Ok(text) = std::fs::read_to_string(&path)
        {
            found.insert(path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned(), text);
        }
    }
    found
}

fn rust_files(place: &str) -> BTreeMap<String, String> {
    let found = files_in(&[place], |path| path.extension().is_some_and(|e| e == "rs"));
    assert!(!found.is_empty(), "no sources below {place}: this test reads the wrong directory");
    found
}

fn check(files: &BTreeMap<String, String>, rule: impl Fn(&str, &str) -> Vec<String>) {
    let complaints: Vec<String> = files.iter().flat_map(|(path, text)| rule(path, text)).collect();
    assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
}

/// A control: the rule must name `path:line`.
#[track_caller]
fn finds(complaints: &[String], place: &str) {
    assert!(
        complaints.iter().any(|c| c.starts_with(&format!("{place}:"))),
        "{place} was not found in {complaints:?}"
    );
}

#[test]
fn layers_import_only_what_their_row_allows() {
    check(&rust_files("src"), layer_rule);
}

#[test]
fn every_pain_has_a_test_that_is_named_after_it() {
    let page = std::fs::read_to_string(repository().join("docs/pains.md")).unwrap();
    let missing = pains_rule(&rust_files("tests"), &page);
    assert!(missing.is_empty(), "\n{}\n", missing.join("\n"));
}

/// Names of tests on a page that no file has.
fn tests_rule<'a>(page: &'a str, code: &[&String]) -> Vec<&'a str> {
    let is_name = |word: &&str| {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        word.len() > 30 && word.chars().all(plain) && word.contains('_')
    };
    let names = page.split('`').skip(1).step_by(2).filter(is_name);
    names.filter(|name| !code.iter().any(|text| text.contains(name))).collect()
}

#[test]
fn every_claim_about_security_names_a_test_that_there_is() {
    let page = std::fs::read_to_string(repository().join("docs/security.md")).unwrap();
    let files = [rust_files("tests"), rust_files("src")];
    let code: Vec<&String> = files.iter().flat_map(BTreeMap::values).collect();
    assert_eq!(tests_rule(&page, &code), [] as [&str; 0]);
    let (gone, there) =
        ("a_name_of_a_test_that_is_not_there", "fn a_name_of_a_test_that_is_there_now() {}".to_owned());
    let page = format!("see `{gone}`, `a_name_of_a_test_that_is_there_now`");
    assert_eq!(tests_rule(&page, &[&there]), [gone], "control");
}

#[test]
fn control_a_pain_without_a_test_or_a_line_is_named() {
    let file = |text: &str| BTreeMap::from([("tests/a.rs".to_owned(), text.to_owned())]);
    let complaints = pains_rule(&file("fn pain_01_a() {}\npain_02_b: C;\n// fn pain_03_c()"), "| 1 | x |");
    let has = |part: &str| complaints.iter().any(|complaint| format!("{complaint}\"").contains(part));
    assert!(!has("`pain_01_") && !has("`pain_02_") && has("`pain_03_") && has("`pain_33_"), "{complaints:?}");
    assert!(!has("list pain 1\"") && has("list pain 28"), "{complaints:?}");
}

#[test]
fn control_an_upward_import_is_named_with_its_line() {
    finds(&layer_rule("src/policy/stop.rs", "//! Doc.\nuse crate::sys::spawn;\n"), "src/policy/stop.rs:2");
    finds(
        &layer_rule("src/policy/stop.rs", "use crate::{\n    model::X,\n    sys::Y,\n};\n"),
        "src/policy/stop.rs:3",
    );
    finds(&layer_rule("src/keeper/wire.rs", "fn f() -> crate::model::AppName {}"), "src/keeper/wire.rs:1");
    finds(&layer_rule("src/cli/args.rs", "use crate::store::secret;"), "src/cli/args.rs:1");
    finds(&layer_rule("src/sys/lock.rs", "use super::super::store;"), "src/sys/lock.rs:1");
    finds(&layer_rule("src/logs/mod.rs", "use crate::policy::{restart, rotate};"), "src/logs/mod.rs:1");
    finds(&layer_rule("src/surprise/x.rs", ""), "src/surprise/x.rs:1");
    for fine in [
        ("src/cli/args.rs", "use crate::store::paths::Home; use crate::store::{paths};"),
        ("src/logs/line.rs", "use crate::policy::rotate::Rotation;"),
        ("src/policy/stop.rs", "// crate::sys is not for us\nuse crate::model::id; use super::restart;"),
        ("src/node/channel.rs", "const TEXT: &str = \"crate::supervisor\";"),
        ("src/daemon/run.rs", "use crate::supervisor::driver;"),
    ] {
        assert_eq!(layer_rule(fine.0, fine.1), Vec::<String>::new());
    }
}

#[test]
fn every_module_says_what_it_is_for() {
    check(&rust_files("src"), module_doc_rule);
    check(&rust_files("tests"), module_doc_rule);
}

#[test]
fn control_a_module_without_a_text_is_named() {
    finds(&module_doc_rule("src/a.rs", "// Not a module doc.\n"), "src/a.rs:1");
}

#[test]
fn unsafe_code_is_in_sys_only() {
    check(&rust_files("src"), unsafe_rule);
}

#[test]
fn control_unsafe_elsewhere_is_named_with_its_line() {
    finds(
        &unsafe_rule("src/keeper/run.rs", "//! Nothing unsafe.\n\nfn f() { unsafe { g() } }"),
        "src/keeper/run.rs:3",
    );
    assert!(unsafe_rule("src/sys/fdpass.rs", "unsafe { g() }").is_empty());
    assert!(unsafe_rule("src/model/id.rs", "//! unsafe names\nconst UNSAFE: &str = \"unsafe\";").is_empty());
}

#[test]
fn model_and_policy_are_pure() {
    check(&rust_files("src"), purity_rule);
}

#[test]
fn control_a_clock_or_file_in_policy_is_named_with_its_line() {
    for bad in [
        "use std::fs;",
        "let t = Instant::now();",
        "async fn f() {}",
        "use tokio::time;",
        "use serde::Serialize;",
    ] {
        finds(&purity_rule("src/policy/fleet.rs", &format!("//! Doc.\n{bad}\n")), "src/policy/fleet.rs:2");
    }
    finds(&purity_rule("src/model/id.rs", "use libc::pid_t;"), "src/model/id.rs:1");
    assert!(purity_rule("src/model/id.rs", "use serde::Serialize; // no tokio\n").is_empty());
}

#[test]
fn nothing_names_a_machine_or_ends_strangers() {
    let places = [
        "src",
        "tests",
        "bench",
        "benches",
        "docs",
        "examples",
        ".ci",
        "README.md",
        "CHANGELOG.md",
        "Cargo.toml",
        "ecosystem.example.toml",
        ".config",
    ];
    check(&files_in(&places, |_| true), banned_words_rule);
}

#[test]
fn control_banned_words_are_named_with_their_line() {
    finds(&banned_words_rule("a.sh", concat!("true\npk", "ill node\n")), "a.sh:2");
    finds(&banned_words_rule("a.sh", concat!("cd /wo", "rk/main\n")), "a.sh:1");
    finds(&banned_words_rule("a.md", concat!("see ../sha", "red/design.md\n")), "a.md:1");
    assert!(banned_words_rule("a.md", concat!("/srv/wo", "rk/x, roadkill alleys")).is_empty());
}

#[test]
fn no_test_is_ignored() {
    check(&rust_files("src"), ignored_tests_rule);
    check(&rust_files("tests"), ignored_tests_rule);
}

#[test]
fn control_an_ignored_test_is_named_with_its_line() {
    finds(&ignored_tests_rule("tests/a.rs", "#[test]\n#[ignore = \"slow\"]\nfn f() {}"), "tests/a.rs:2");
}

#[test]
fn no_test_sleeps_and_hopes() {
    check(&rust_files("src"), sleep_rule);
    check(&rust_files("tests"), sleep_rule);
}

#[test]
fn control_a_sleep_is_named_with_its_line() {
    finds(&sleep_rule("tests/e2e/a.rs", "fn f() {\n    thread::sleep(x);\n}"), "tests/e2e/a.rs:2");
    finds(&sleep_rule("tests/e2e/a.rs", "tokio::time::sleep(x).await;"), "tests/e2e/a.rs:1");
    finds(
        &sleep_rule("src/a.rs", "fn f() {}\n#[cfg(test)]\nmod tests { fn g() { std::thread::sleep(x) } }"),
        "src/a.rs:3",
    );
    assert!(sleep_rule(WAIT_HELPER, "thread::sleep(x);").is_empty());
    assert!(sleep_rule("tests/e2e/a.rs", "// sleep\nlet script = \"sleep 5\";").is_empty());
}

#[test]
fn every_file_is_declared() {
    let complaints = forgotten_files_rule("src/", &["main.rs", "lib.rs"], &rust_files("src"));
    assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
    let complaints = forgotten_files_rule("tests/e2e/", &["main.rs"], &rust_files("tests/e2e"));
    assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
}

#[test]
fn control_a_forgotten_file_is_named() {
    let crate_of = |files: &[(&str, &str)]| -> BTreeMap<String, String> {
        files.iter().map(|(path, text)| ((*path).to_owned(), (*text).to_owned())).collect()
    };
    let files = crate_of(&[
        ("src/lib.rs", "pub mod sys; mod top;"),
        ("src/top.rs", ""),
        ("src/sys/mod.rs", "mod lock; // mod ghost;"),
        ("src/sys/lock.rs", ""),
        ("src/sys/ghost.rs", ""),
        ("src/lost.rs", ""),
    ]);
    let complaints = forgotten_files_rule("src/", &["main.rs", "lib.rs"], &files);
    finds(&complaints, "src/sys/ghost.rs:1");
    finds(&complaints, "src/lost.rs:1");
    assert_eq!(complaints.len(), 2, "{complaints:?}");
}
