//! What apps of a file say of each other: whether whom they wait for is there, and does not wait for them.

use super::app::AppConfig;
use super::error::{Place, Problem, quoted};
use super::file::File;

/// Every dependency that can never be met.
pub(super) fn check(file: &File) -> Vec<Problem> {
    let names: Vec<Option<String>> = file.apps.iter().map(AppConfig::display_name).collect();
    let mut problems = Vec::new();
    for app in &file.apps {
        for (needed, at) in &app.depends_on {
            if !names.iter().flatten().any(|name| name == needed) {
                let known: Vec<&str> = names.iter().flatten().map(String::as_str).collect();
                let message = format!("the file has no app {} to depend on", quoted(needed));
                let has = format!("it has {}", known.join(", "));
                problems.push(Problem::new(at.place.clone(), message).help(has).did_you_mean(needed, known));
            }
        }
    }
    problems.extend(circles(file, &names));
    problems
}

/// Apps that wait for each other, each circle once.
fn circles(file: &File, names: &[Option<String>]) -> Vec<Problem> {
    let index_of = |name: &String| names.iter().position(|other| other.as_ref() == Some(name));
    let mut problems = Vec::new();
    // 0: not looked at, 1: on the way, 2: done.
    let mut state = vec![0_u8; file.apps.len()];
    for start in 0..file.apps.len() {
        if state[start] != 0 {
            continue;
        }
        // The way here, and which dependency is looked at next at each place.
        let mut trail: Vec<(usize, usize)> = vec![(start, 0)];
        state[start] = 1;
        while let Some((here, next)) = trail.last_mut() {
            let Some(needed) = file.apps[*here].depends_on.keys().nth(*next) else {
                state[*here] = 2;
                trail.pop();
                continue;
            };
            *next += 1;
            // An app that depends on itself is complained about where it is read.
            let Some(there) = index_of(needed).filter(|there| there != here) else { continue };
            match state[there] {
                0 => {
                    state[there] = 1;
                    trail.push((there, 0));
                }
                1 => {
                    let from = trail.iter().position(|(app, _)| *app == there).unwrap_or(0);
                    let circle: Vec<usize> = trail[from..].iter().map(|(app, _)| *app).collect();
                    problems.extend(problem(file, names, &circle));
                }
                _ => {}
            }
        }
    }
    problems
}

fn problem(file: &File, names: &[Option<String>], circle: &[usize]) -> Option<Problem> {
    let name = |app: usize| names[app].as_deref().unwrap_or_default();
    let mut round: Vec<usize> = circle.to_vec();
    round.push(*circle.first()?);
    let chain: Vec<&str> = round.iter().map(|app| name(*app)).collect();
    let links: Vec<String> = round
        .windows(2)
        .filter_map(|pair| {
            let at = file.apps[pair[0]].depends_on.get(name(pair[1]))?;
            let line = match &at.place {
                Place::Text(span) => format!(" (line {})", file.source.position(span.start).0),
                Place::Option(_) | Place::CommandLine => String::new(),
            };
            Some(format!("{} waits for {}{line}", name(pair[0]), name(pair[1])))
        })
        .collect();
    let place = file.apps[circle[0]].depends_on.get(chain[1])?.place.clone();
    let message = format!("these apps wait for each other: {}", chain.join(" → "));
    Some(Problem::new(place, message).help(format!("{}; remove one of these", links.join(", "))))
}
