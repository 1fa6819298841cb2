//! What is built in, and under which terms: the part of `cargo deny check` that needs neither the tool nor the network.
//! `deny.toml` has the rules; this reads them from there.

#![expect(clippy::unwrap_used, reason = "a test that cannot read its inputs has failed")]

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

const CRATES_IO: &str = "registry+https://github.com/rust-lang/crates.io-index";

fn repository(name: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap()
}

fn rules() -> toml::Table {
    repository("deny.toml").parse().unwrap()
}

/// Every package that is built for Linux, or needed to build or test.
fn packages() -> Vec<Value> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--locked", "--offline", "--format-version=1"])
        .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    // `packages` also has those of other platforms; what is resolved for this one stands here.
    let nodes = metadata["resolve"]["nodes"].as_array().unwrap();
    let built: BTreeSet<&str> = nodes.iter().map(|node| node["id"].as_str().unwrap()).collect();
    let all = metadata["packages"].as_array().unwrap();
    all.iter().filter(|package| built.contains(package["id"].as_str().unwrap())).cloned().collect()
}

/// Whether an SPDX expression can be met with these licences: one side of an OR, both of an AND.
fn is_met(expression: &str, allowed: &BTreeSet<String>) -> bool {
    let text = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<&str> = text.split_whitespace().collect();
    let (met, rest) = any_of(&words, allowed);
    met && rest.is_empty()
}

fn any_of<'a, 'b>(words: &'a [&'b str], allowed: &BTreeSet<String>) -> (bool, &'a [&'b str]) {
    let (mut met, mut rest) = all_of(words, allowed);
    while let ["OR", more @ ..] = rest {
        let (other, after) = all_of(more, allowed);
        (met, rest) = (met || other, after);
    }
    (met, rest)
}

fn all_of<'a, 'b>(words: &'a [&'b str], allowed: &BTreeSet<String>) -> (bool, &'a [&'b str]) {
    let (mut met, mut rest) = one(words, allowed);
    while let ["AND", more @ ..] = rest {
        let (other, after) = one(more, allowed);
        (met, rest) = (met && other, after);
    }
    (met, rest)
}

fn one<'a, 'b>(words: &'a [&'b str], allowed: &BTreeSet<String>) -> (bool, &'a [&'b str]) {
    match words {
        ["(", rest @ ..] => {
            let (met, rest) = any_of(rest, allowed);
            (met && rest.first() == Some(&")"), rest.get(1..).unwrap_or_default())
        }
        [license, "WITH", exception, rest @ ..] => {
            (allowed.contains(&format!("{license} WITH {exception}")), rest)
        }
        [license, rest @ ..] => (allowed.contains(*license), rest),
        [] => (false, words),
    }
}

#[test]
fn pain_43_every_dependency_has_a_permissive_licence_and_comes_from_crates_io() {
    let rules = rules();
    let allowed = rules["licenses"]["allow"].as_array().unwrap();
    let allowed: BTreeSet<String> = allowed.iter().map(|name| name.as_str().unwrap().to_owned()).collect();
    let banned = rules["bans"]["deny"].as_array().unwrap();
    let banned: BTreeSet<&str> = banned.iter().map(|entry| entry["name"].as_str().unwrap()).collect();
    assert_eq!(rules["sources"]["unknown-registry"].as_str(), Some("deny"));
    assert_eq!(rules["sources"]["unknown-git"].as_str(), Some("deny"));
    let packages = packages();
    assert!(packages.len() > 50, "{} packages", packages.len());
    let mut wrong = Vec::new();
    for package in &packages {
        let name = package["name"].as_str().unwrap();
        let license = package["license"].as_str().unwrap_or_default();
        if !is_met(license, &allowed) {
            wrong.push(format!("{name}: licence {license:?}"));
        }
        if name != "pm" && package["source"] != CRATES_IO {
            wrong.push(format!("{name}: from {}", package["source"]));
        }
        if banned.contains(name) {
            wrong.push(format!("{name}: banned"));
        }
    }
    assert_eq!(wrong, [] as [String; 0]);
}

#[test]
fn control_what_is_not_permissive_is_seen() {
    let allowed = BTreeSet::from(["MIT", "Apache-2.0", "Unicode-3.0"].map(str::to_owned));
    for fine in ["MIT", "MIT/Apache-2.0", "GPL-3.0 OR MIT", "(MIT OR Apache-2.0) AND Unicode-3.0"] {
        assert!(is_met(fine, &allowed), "{fine}");
    }
    for wrong in ["", "GPL-3.0", "MIT AND GPL-3.0", "(MIT OR GPL-3.0) AND MPL-2.0", "MIT WITH x", "(MIT"] {
        assert!(!is_met(wrong, &allowed), "{wrong}");
    }
}

#[test]
fn pm_itself_is_mit_or_apache_and_says_so() {
    let manifest: toml::Table = repository("Cargo.toml").parse().unwrap();
    assert_eq!(manifest["package"]["license"].as_str(), Some("MIT OR Apache-2.0"));
    assert!(repository("LICENSE-MIT").contains("Permission is hereby granted, free of charge"));
    assert!(repository("LICENSE-APACHE").contains("Apache License"));
    let readme = repository("README.md");
    assert!(readme.contains("MIT") && readme.contains("Apache"), "the README names the licences");
}
