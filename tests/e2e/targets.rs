//! Targets: name, id, namespace, pattern, `all`, file.

use super::support::Home;

/// Three apps, `api` and `web` in the namespace `site`; `web` has two instances.
fn three(home: &Home) {
    home.start(
        "[[apps]]\nname = 'api'\nnamespace = 'site'\nscript = 'sleep'\nargs = ['1000']\n\
         [[apps]]\nname = 'web'\nnamespace = 'site'\nscript = 'sleep'\nargs = ['1000']\ninstances = 2\n\
         exec_mode = 'fork'\n\
         [[apps]]\nname = 'job'\nscript = 'sleep'\nargs = ['1000']\n",
    );
}

/// The names of stopped rows, in order of their ids.
fn stopped(home: &Home) -> Vec<String> {
    home.rows().into_iter().filter(|row| row.status == "stopped").map(|row| row.name).collect()
}

#[test]
fn a_name_selects_all_its_instances() {
    let home = Home::new();
    three(&home);
    home.ok(&["stop", "web"]);
    assert_eq!(stopped(&home), ["web", "web"]);
}

#[test]
fn a_number_selects_one_instance() {
    let home = Home::new();
    three(&home);
    let id = home.rows_of("web")[1].id.to_string();
    home.ok(&["stop", &id]);
    assert_eq!(stopped(&home), ["web"]);
    assert_eq!(home.statuses("web"), ["online", "stopped"]);
    home.ok(&["restart", &id]);
    assert_eq!(home.statuses("web"), ["online", "online"]);
}

#[test]
fn a_namespace_selects_its_apps() {
    let home = Home::new();
    three(&home);
    home.ok(&["stop", "site"]);
    assert_eq!(stopped(&home), ["api", "web", "web"]);
    home.ok(&["start", "site"]);
    assert!(stopped(&home).is_empty());
}

#[test]
fn a_pattern_between_slashes_selects_by_name() {
    let home = Home::new();
    three(&home);
    home.ok(&["stop", "/^(api|job)$/"]);
    assert_eq!(stopped(&home), ["api", "job"]);
}

#[test]
fn all_selects_everything_and_several_targets_add_up() {
    let home = Home::new();
    three(&home);
    home.ok(&["stop", "api", "job"]);
    assert_eq!(stopped(&home), ["api", "job"]);
    home.ok(&["restart", "all"]);
    assert!(stopped(&home).is_empty());
    home.ok(&["delete", "all"]);
    assert!(home.rows().is_empty());
    home.ok(&["stop", "all"]);
}

#[test]
fn a_file_selects_the_apps_it_names() {
    let home = Home::new();
    three(&home);
    home.write("some.toml", "[[apps]]\nname = 'job'\nscript = 'sleep'\nargs = ['1000']\n");
    home.ok(&["stop", "some.toml"]);
    assert_eq!(stopped(&home), ["job"]);
    home.ok(&["delete", "some.toml"]);
    assert!(home.rows_of("job").is_empty());
}

#[test]
fn an_unknown_target_exits_3_names_it_and_the_likely_one_and_changes_nothing() {
    let home = Home::new();
    three(&home);
    for command in ["stop", "restart", "reload", "delete", "describe"] {
        home.exits(3, &[command, "wbe"]).says("wbe").says("web");
    }
    home.exits(3, &["scale", "wbe", "3"]);
    home.exits(3, &["stop", "99"]);
    home.exits(3, &["stop", "api", "wbe"]);
    assert!(stopped(&home).is_empty(), "an unknown name among others stops nothing");
}

#[test]
fn a_bad_pattern_is_wrong_usage() {
    let home = Home::new();
    three(&home);
    home.exits(2, &["stop", "/(unclosed/"]);
    assert!(stopped(&home).is_empty());
}
