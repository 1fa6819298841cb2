//! What earlier versions saved is loaded by this one, and what later ones add is skipped: `tests/fixtures/state` has the
//! home of each version that had another form. A field that is added needs `#[serde(default)]`; a test fails where it has
//! none. (The forms of blob, keeper frames and tags are tested beside their code, with fixtures of their own.)

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed, and says why")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pm::model::saved::Desired;
use pm::store::state::{Loaded, StateStore};
use serde_json::{Value, json};

fn homes() -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/state");
    let homes: Vec<PathBuf> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(!homes.is_empty());
    homes
}

fn load(home: &Path) -> Loaded {
    StateStore::new(home.join("state.json"), home.join("env")).load().unwrap()
}

#[test]
fn the_state_of_every_earlier_version_is_loaded() {
    for home in homes() {
        let loaded = load(&home);
        assert_eq!(loaded.warning, None, "{}", home.display());
        let fleet = loaded.state.fleet;
        assert_eq!((fleet.next_pm_id, fleet.start_parallelism), (3, Some(4)));
        let [api, worker] = fleet.apps.as_slice() else { panic!("{}", home.display()) };
        assert_eq!((api.spec.name.as_str(), worker.spec.name.as_str()), ("api", "worker"));
        assert_eq!((api.spec.namespace.as_str(), api.spec.instances), ("shop", 2));
        assert_eq!(api.spec.stop.timeout, Duration::from_secs(2));
        assert_eq!(api.spec.restart.restart_delay, Some(Duration::from_secs(1)));
        let desired = |app: &pm::model::saved::SavedApp| -> Vec<Desired> {
            app.slots.iter().map(|slot| slot.desired).collect()
        };
        assert_eq!(desired(api), [Desired::Running, Desired::Running]);
        assert_eq!(desired(worker), [Desired::Stopped]);
        let shell = &loaded.state.shells[&api.spec.name];
        assert_eq!(shell["USER"], "shop");
    }
}

#[test]
fn what_a_later_version_adds_to_the_state_is_skipped() {
    for home in homes() {
        let later = tempfile::tempdir().unwrap();
        let mut state: Value = serde_json::from_slice(&fs::read(home.join("state.json")).unwrap()).unwrap();
        let mut add = |pointer: &str| {
            let object = state.pointer_mut(pointer).unwrap().as_object_mut().unwrap();
            object.insert("of_a_later_version".into(), json!({ "a": [1, null] }));
        };
        for pointer in ["", "/fleet"] {
            add(pointer);
        }
        for app in ["/fleet/apps/0", "/fleet/apps/1"] {
            for part in [
                "",
                "/spec",
                "/spec/command",
                "/spec/env",
                "/spec/ready",
                "/spec/stop",
                "/spec/restart",
                "/spec/reload",
                "/spec/logs",
                "/spec/hooks",
                "/slots/0",
            ] {
                add(&format!("{app}{part}"));
            }
        }
        fs::write(later.path().join("state.json"), state.to_string()).unwrap();
        fs::create_dir(later.path().join("env")).unwrap();
        for entry in fs::read_dir(home.join("env")).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), later.path().join("env").join(entry.file_name())).unwrap();
        }
        assert_eq!(load(later.path()).state, load(&home).state);
    }
}
