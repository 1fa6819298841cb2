//! What people write: config files, env files, units, lines that are split into words, names.

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use pm::config::overrides::Overrides;
use pm::config::resolve::Context;
use pm::config::{file, units, words};
use pm::model::difference;
use pm::model::id::AppName;
use pm::model::mask;
use pm::store::env_file;

thread_local! {
    /// One directory for all inputs of a thread.
    static PLACE: RefCell<Option<tempfile::TempDir>> = const { RefCell::new(None) };
}

/// The input is a config file, and everything else that is read as text.
pub(crate) fn config(input: &[u8]) {
    PLACE.with_borrow_mut(|place| {
        let place = place.get_or_insert_with(|| {
            let place = tempfile::tempdir().expect("a directory");
            std::fs::write(place.path().join("app.js"), "").expect("a script");
            place
        });
        file(input, place.path());
    });
    if let Ok(text) = std::str::from_utf8(input) {
        env(text);
        short(text);
    }
}

fn file(input: &[u8], dir: &Path) {
    let path = dir.join("ecosystem.toml");
    std::fs::write(&path, input).expect("the file");
    let context = Context {
        cwd: dir.to_owned(),
        home: None,
        path: "/bin".into(),
        cpus: 2,
        current_exe: PathBuf::from("/bin/pm"),
        env_name: Some("production".to_owned()),
    };
    match file::check(&path, &Overrides::default(), &context) {
        Ok(apps) => {
            for app in apps {
                assert!(difference::differences(&app.spec, &app.spec).is_empty());
                let json = serde_json::to_string(&app.spec).expect("a spec can be saved");
                assert_eq!(
                    serde_json::from_str::<pm::model::spec::AppSpec>(&json).expect("and loaded"),
                    app.spec
                );
            }
        }
        Err(error) => {
            let (shown, lines) = (error.to_string(), error.lines().count());
            assert!(!shown.is_empty() && lines > 0, "an error says something");
            for secret in secrets(&String::from_utf8_lossy(input)) {
                assert!(!shown.contains(&secret), "{secret:?} in {shown}");
            }
        }
    }
}

/// Values of the environment that stand nowhere else in the text, where it can be read as TOML.
fn secrets(text: &str) -> Vec<String> {
    let Ok(document) = text.parse::<toml::Table>() else { return Vec::new() };
    let apps = document.get("apps").and_then(toml::Value::as_array);
    let tables = apps.into_iter().flatten().filter_map(toml::Value::as_table).flatten();
    let env = tables.filter(|(key, _)| *key == "env" || (key.starts_with("env_") && *key != "env_file"));
    let variables = env.filter_map(|(_, value)| value.as_table()).flatten();
    variables
        .filter(|(key, _)| !mask::is_open(key))
        .filter_map(|(_, value)| value.as_str())
        .filter(|value| value.len() > 5 && text.matches(value).count() == 1)
        .map(str::to_owned)
        .collect()
}

fn env(text: &str) {
    let file = env_file::parse(text);
    for (name, value) in &file.variables {
        assert!(!name.is_empty() && !name.contains(['=', '\0']) && !value.contains('\0'), "{name:?}");
    }
    // What is said about lines never quotes them.
    assert!(file.skipped.iter().all(|line| line.number > 0));
}

fn short(text: &str) {
    if let Ok(span) = units::duration(text) {
        assert_eq!(units::duration(&units::show_duration(span)).expect("what is shown is read"), span);
    }
    let _ = (units::size(text), file::classify(text));
    if let Ok(found) = words::split(text) {
        let line: Vec<String> = found.iter().map(|word| words::quote(word)).collect();
        assert_eq!(words::split(&line.join(" ")).as_ref(), Ok(&found), "quoted words split back");
        assert_eq!(
            words::shell_syntax(&line.join(" ")).filter(|_| line.first().is_none_or(|w| w.starts_with('\''))),
            None
        );
    }
    if let Ok(name) = AppName::new(text) {
        let stem = name.file_stem();
        assert!(!stem.contains('/') && !stem.starts_with('.') && !stem.is_empty(), "{stem:?}");
    }
}
