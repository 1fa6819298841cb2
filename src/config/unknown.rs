//! Keys that are not known: what was probably meant, and what people of other tools use here instead.

use super::error::{Place, Problem, quoted};
use super::schema::{KEYS, snake_case};
use crate::model::spelling;

/// Keys of PM2 and of other tools that are not here: what to say instead of guessing.
const FOREIGN: [(&str, &str); 35] = [
    ("treekill", "use `kill_mode = \"group\"` for treekill = true, `kill_mode = \"main\"` for false"),
    ("log_file", "set `out_file` and `error_file` to the same path"),
    ("log", "set `out_file` and `error_file` to the same path"),
    ("disable_logs", "set `out_file` and `error_file` to \"/dev/null\""),
    ("filter_env", "use `inherit_env = false`"),
    ("kill_retry_time", "leave it out: pm is told when a process ends and does not poll"),
    ("vizion", "leave it out: pm does not read git metadata"),
    ("pmx", "leave it out; the small agent for Node is switched with `agent`"),
    ("automation", "leave it out; the small agent for Node is switched with `agent`"),
    ("source_map_support", "use `interpreter_args = [\"--enable-source-maps\"]`"),
    ("disable_source_map_support", "leave it out: source maps are off unless asked for"),
    ("instance_id_env", "use `instance_var`"),
    ("force", "leave it out: names are unique here"),
    ("working_directory", "use `cwd`"),
    ("directory", "use `cwd`"),
    ("workdir", "use `cwd`"),
    ("environment", "use `env`"),
    ("program", "use `script`"),
    ("path", "use `script`"),
    ("workers", "use `instances`"),
    ("numprocs", "use `instances`"),
    ("replicas", "use `instances`"),
    ("stopsignal", "use `kill_signal`"),
    ("stop_signal", "use `kill_signal`"),
    ("stop_timeout", "use `kill_timeout`"),
    ("stopwaitsecs", "use `kill_timeout`"),
    ("watch", LATER),
    ("ignore_watch", LATER),
    ("watch_delay", LATER),
    ("watch_options", LATER),
    ("cron_restart", LATER),
    ("cron", LATER),
    ("pid_file", LATER),
    ("log_type", LATER),
    ("post_update", LATER),
];
const LATER: &str = "this version of pm does not have it; remove the line";

/// Whether a key belongs to another tool and has a hint of its own.
#[cfg(test)]
pub(super) fn is_foreign(name: &str) -> bool {
    FOREIGN.iter().any(|(foreign, _)| *foreign == name)
}

/// The problem of an unknown key of an app, with the most useful hint there is.
pub(super) fn problem(text: &str, place: Place) -> Problem {
    let problem = Problem::new(place, format!("unknown key {}", key_quoted(text)));
    let snake = snake_case(text);
    if let Some((_, help)) = FOREIGN.iter().find(|(name, _)| *name == snake) {
        return problem.help(*help);
    }
    let spellings = || KEYS.iter().filter(|key| key.name != "env_NAME");
    let names = spellings().map(|key| key.name);
    let aliases = spellings().flat_map(|key| key.aliases.iter().copied());
    if let Some(likely) = spelling::closest(&snake, names.chain(aliases)) {
        return problem.help(format!("did you mean `{likely}`?"));
    }
    if text.starts_with("env_") {
        return problem.help(format!("write `[apps.{text}]` and the variables below it"));
    }
    if text.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_') {
        return problem.help(format!("variables stand below `[apps.env]`, or in `env = {{ {text} = … }}`"));
    }
    problem.help("docs/config.md lists every key")
}

/// A key for a message: in backticks while it is short and plain.
pub(super) fn key_quoted(text: &str) -> String {
    if text.len() <= 40 && text.chars().all(|c| !c.is_control()) { format!("`{text}`") } else { quoted(text) }
}
