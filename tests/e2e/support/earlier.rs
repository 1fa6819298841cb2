//! `pm` as it was some commits ago, for tests in which versions meet.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use super::Home;

/// The `pm` that is tested.
pub(crate) const PRESENT: &str = env!("CARGO_BIN_EXE_pm");

/// `pm` of an earlier commit; in a clone without one, a copy of the present program that is another file with another
/// content.
pub(crate) fn earlier(home: &Home) -> String {
    static BUILT: OnceLock<Option<PathBuf>> = OnceLock::new();
    let built = BUILT.get_or_init(|| {
        let target = Path::new(PRESENT).ancestors().nth(2).expect("target/debug/pm");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/earlier.sh");
        let run = Command::new(script).arg(target).output().expect("tests/earlier.sh");
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        let path = String::from_utf8(run.stdout).expect("UTF-8");
        (!path.trim().is_empty()).then(|| PathBuf::from(path.trim()))
    });
    match built {
        Some(path) => path.to_str().expect("UTF-8").to_owned(),
        None => {
            eprintln!("no earlier commit in this clone: a copy of the present program plays its part");
            another_build(home, "pm-earlier")
        }
    }
}

/// The present program with another content, which the name decides.
pub(crate) fn another_build(home: &Home, name: &str) -> String {
    let path = home.work_file(name);
    fs::copy(PRESENT, &path).expect("a copy");
    fs::OpenOptions::new()
        .append(true)
        .open(&path)
        .and_then(|mut file| file.write_all(name.as_bytes()))
        .expect("a few bytes");
    path
}

/// A program that says it is pm and would take over, and then does what `-D` says; see the source.
pub(crate) fn impostor(home: &Home, name: &str, behaviour: &str) -> String {
    let path = home.work_file(name);
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/upgrade/impostor.c");
    let run = Command::new("cc").arg("-o").arg(&path).arg(format!("-D{behaviour}")).arg(source).output();
    let run = run.expect("cc");
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    path
}

/// The file that a process runs.
pub(crate) fn program_of(pid: i32) -> PathBuf {
    fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default()
}
