//! What is remembered: by itself over a crash, by `save` and `kill` for `resurrect`.

use super::support::{Home, process};

fn two(home: &Home) {
    home.start(
        "[[apps]]\nname = 'one'\nscript = 'sleep'\nargs = ['1000']\n\
         [[apps]]\nname = 'two'\nscript = 'sleep'\nargs = ['1000']\ninstances = 2\nexec_mode = 'fork'\n\
         env = { COLOUR = 'blue' }\n",
    );
}

fn rows(home: &Home) -> Vec<(String, String)> {
    let mut rows: Vec<_> = home.rows().into_iter().map(|row| (row.name, row.status)).collect();
    rows.sort();
    rows
}

#[test]
fn kill_saves_the_list_for_resurrect() {
    let home = Home::new();
    two(&home);
    home.ok(&["stop", "one"]);
    let before = rows(&home);
    home.ok(&["kill"]);
    assert_eq!(home.ok(&["jlist"]).out.trim(), "[]", "kill ends with an empty list");
    home.ok(&["resurrect"]);
    assert_eq!(rows(&home), before);
    assert_eq!(process::environ(home.pids("two")[0])["COLOUR"], "blue");
}

#[test]
fn after_kill_a_start_brings_only_what_it_names() {
    let home = Home::new();
    two(&home);
    home.ok(&["kill"]);
    home.ok(&["start", "sleep", "--name", "three", "--", "1000"]);
    assert_eq!(rows(&home), [("three".to_owned(), "online".to_owned())]);
}

#[test]
fn saved_apps_come_back_after_a_delete() {
    let home = Home::new();
    two(&home);
    home.ok(&["save"]);
    home.ok(&["delete", "all"]);
    assert!(home.rows().is_empty());
    home.ok(&["resurrect"]);
    assert_eq!(rows(&home).len(), 3);
    // Resurrecting what is there changes nothing.
    let before = home.pids("two");
    home.ok(&["resurrect"]);
    assert_eq!(home.pids("two"), before);
}

#[test]
fn resurrect_without_anything_saved_is_fine() {
    let home = Home::new();
    home.ok(&["resurrect"]);
    assert!(home.rows().is_empty());
}

#[test]
fn a_damaged_state_file_falls_back_to_the_previous_one() {
    let home = Home::new();
    two(&home);
    home.ok(&["stop", "one"]);
    let before = rows(&home);
    home.power_cut();
    let path = home.path().join("state.json");
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    home.ok(&["resurrect"]);
    let names: Vec<String> = rows(&home).into_iter().map(|(name, _)| name).collect();
    let expected: Vec<String> = before.into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, expected, "never an empty or partial list");
}

#[test]
fn the_acknowledged_state_is_on_disk_when_a_command_returns() {
    let home = Home::new();
    for n in 0..5 {
        let name = format!("app{n}");
        home.ok(&["start", "sleep", "--name", &name, "--", "1000"]);
        let state = std::fs::read_to_string(home.path().join("state.json")).unwrap();
        assert!(state.contains(&name), "{state}");
        let _: serde_json::Value = serde_json::from_str(&state).unwrap();
    }
    home.ok(&["delete", "app2"]);
    assert!(!std::fs::read_to_string(home.path().join("state.json")).unwrap().contains("app2"));
}
