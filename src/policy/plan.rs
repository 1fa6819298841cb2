//! What `apply FILE` does: a file and the fleet go in, one measure for each app comes out.
//!
//! The plan is made in the turn in which it is acted on, so that the two cannot disagree. Nothing is decided twice: what
//! a measure does to an app is `asked`'s and `operation`'s.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use crate::model::difference::{Difference, Weight, differences};
use crate::model::id::AppName;
use crate::model::spec::AppSpec;

/// What is there of an app.
#[derive(Clone, Debug)]
pub(super) struct Present {
    /// What is wanted of it.
    pub(super) spec: Arc<AppSpec>,
    /// Slots that run or are about to.
    pub(super) up: u32,
    /// Slots that ended for good by themselves, as their rules say.
    pub(super) ended: u32,
    /// Every other slot: stopped by somebody, or given up.
    pub(super) down: u32,
    /// A slot runs an older release, after a reload that failed.
    pub(super) mixed: bool,
}

/// What `apply` makes of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// One step for each app, in the order in which they begin.
    pub steps: Vec<Planned>,
    /// Apps that came from this file, are not in it any more, and stay.
    pub left_over: Vec<AppName>,
}

impl Plan {
    /// Whether anything would change.
    #[must_use]
    pub fn changes(&self) -> bool {
        self.steps.iter().any(|step| step.measure != Measure::Unchanged)
    }
}

/// What is to become of one app.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    /// Which.
    pub app: AppName,
    /// As the file has it; `None` where it is to be removed.
    pub spec: Option<Arc<AppSpec>>,
    /// What is done.
    pub measure: Measure,
    /// Why: the keys that differ.
    pub differences: Vec<Difference>,
    /// Why, where no key says it.
    pub note: Option<&'static str>,
}

/// What is done to an app.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// It came from the file and is not in it any more.
    Remove,
    /// It is new.
    Create,
    /// Instances that are down are started.
    Start {
        /// How many.
        instances: u32,
    },
    /// Every process is replaced, without a gap.
    Reload,
    /// Every process is replaced, with a gap: two of it cannot run side by side.
    Restart,
    /// Instances are added or removed, the others stay.
    Scale {
        /// How many there are.
        from: u32,
        /// How many there will be.
        to: u32,
    },
    /// Its rules change, its processes stay.
    Update,
    /// Nothing.
    Unchanged,
}

/// The plan. `all` names every app of the file; `specs` are those that are chosen of them, in the file's order.
pub(super) fn plan(
    specs: &[Arc<AppSpec>],
    all: &[AppName],
    file: &Path,
    prune: bool,
    present: &BTreeMap<AppName, Present>,
) -> Plan {
    let gone = |(name, app): (&AppName, &Present)| {
        let ours = app.spec.origin.as_ref().is_some_and(|origin| origin.file == file);
        (ours && !all.contains(name)).then(|| name.clone())
    };
    let gone: Vec<AppName> = present.iter().filter_map(gone).collect();
    let (removed, left_over) = if prune { (gone, Vec::new()) } else { (Vec::new(), gone) };
    let removed = removed.into_iter().map(|app| Planned {
        app,
        spec: None,
        measure: Measure::Remove,
        differences: Vec::new(),
        note: Some("not in the file any more"),
    });
    // Room first: what is new may want a port of what goes.
    let steps = removed.chain(in_order(specs).into_iter().map(|spec| of_one(spec, present.get(&spec.name))));
    Plan { steps: steps.collect(), left_over }
}

fn of_one(spec: &Arc<AppSpec>, present: Option<&Present>) -> Planned {
    let planned = |measure: Measure, differences: Vec<Difference>, note: Option<&'static str>| Planned {
        app: spec.name.clone(),
        spec: Some(Arc::clone(spec)),
        measure,
        differences,
        note,
    };
    let Some(present) = present else {
        let note = (!spec.autostart).then_some("autostart = false: listed as stopped");
        return planned(Measure::Create, Vec::new(), note);
    };
    let differences = differences(&present.spec, spec);
    let weight = differences.iter().map(|one| one.weight).max();
    let replace = if spec.can_overlap() { Measure::Reload } else { Measure::Restart };
    // Who says `autostart` wants it to run, whoever stopped it.
    if present.up == 0 {
        let down = present.down + if weight == Some(Weight::Process) { present.ended } else { 0 };
        let measure = match (spec.autostart && down > 0, weight) {
            (true, _) => Measure::Start { instances: spec.instances },
            (false, Some(_)) => Measure::Update,
            (false, None) => Measure::Unchanged,
        };
        let note = match measure {
            Measure::Start { .. } => "it is down",
            _ if present.ended > 0 => "it has ended by itself",
            _ => "autostart = false: stays stopped",
        };
        return planned(measure, differences, Some(note));
    }
    match weight {
        Some(Weight::Process) => planned(replace, differences, None),
        _ if present.mixed => {
            planned(replace, differences, Some("some instances still run an older release"))
        }
        Some(Weight::Instances) => {
            let measure = Measure::Scale { from: present.spec.instances, to: spec.instances };
            planned(measure, differences, None)
        }
        Some(Weight::Rule) => planned(Measure::Update, differences, None),
        None if present.down > 0 && spec.autostart => {
            let measure = Measure::Start { instances: present.down };
            planned(measure, differences, Some("some of its instances are down"))
        }
        None => planned(Measure::Unchanged, differences, None),
    }
}

/// Dependencies before those that need them, else as in the file. A circle, which the config refuses, stays as it is.
pub(super) fn in_order(specs: &[Arc<AppSpec>]) -> Vec<&Arc<AppSpec>> {
    let mut done: BTreeSet<&AppName> = BTreeSet::new();
    let mut order = Vec::with_capacity(specs.len());
    while order.len() < specs.len() {
        let waits = |spec: &&Arc<AppSpec>| {
            let inside = |name: &&AppName| specs.iter().any(|spec| spec.name == **name);
            spec.depends_on.keys().filter(inside).any(|name| !done.contains(name))
        };
        let mut rest = specs.iter().filter(|spec| !done.contains(&spec.name));
        let next = rest.clone().find(|spec| !waits(spec)).or_else(|| rest.next());
        let Some(next) = next else { break };
        done.insert(&next.name);
        order.push(next);
    }
    order
}

/// A circle among what apps wait for, each before the one it waits for; `None` where there is none.
pub(super) fn circle<'a>(
    apps: impl Fn(&AppName) -> Option<&'a AppSpec>,
    from: &AppName,
) -> Option<Vec<AppName>> {
    let mut trail: Vec<AppName> = vec![from.clone()];
    let mut dead: BTreeSet<AppName> = BTreeSet::new();
    // Depth first; what leads nowhere is looked at once.
    loop {
        let here = trail.last()?.clone();
        let next =
            apps(&here).and_then(|spec| spec.depends_on.keys().find(|name| !dead.contains(*name)).cloned());
        match next {
            Some(next) => {
                if let Some(start) = trail.iter().position(|name| *name == next) {
                    let mut found = trail.split_off(start);
                    found.push(next);
                    return Some(found);
                }
                trail.push(next);
            }
            None => {
                dead.insert(here);
                trail.pop();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::Duration;

    use super::*;
    use crate::model::spec::{CommandSpec, Dependency, ExecMode, Origin, Runtime};

    const FILE: &str = "/srv/ecosystem.toml";

    fn name(text: &str) -> AppName {
        AppName::new(text).unwrap()
    }

    fn spec(app: &str, change: impl FnOnce(&mut AppSpec)) -> Arc<AppSpec> {
        let command = CommandSpec {
            script: PathBuf::from("/srv/app.js"),
            interpreter: Some("node".to_owned()),
            interpreter_args: Vec::new(),
            args: Vec::new(),
            runtime: Runtime::Node,
        };
        let mut spec = AppSpec::new(name(app), command, PathBuf::from("/srv"));
        spec.mode = ExecMode::Cluster;
        spec.instances = 2;
        spec.origin = Some(Origin { file: PathBuf::from(FILE), env_name: None });
        change(&mut spec);
        Arc::new(spec)
    }

    fn present(spec: &Arc<AppSpec>) -> Present {
        Present { spec: Arc::clone(spec), up: spec.instances, ended: 0, down: 0, mixed: false }
    }

    fn measure(new: &Arc<AppSpec>, present: Option<Present>) -> Measure {
        let present: BTreeMap<_, _> = present.into_iter().map(|one| (new.name.clone(), one)).collect();
        let all = [new.name.clone()];
        plan(std::slice::from_ref(new), &all, Path::new(FILE), true, &present).steps[0].measure
    }

    #[test]
    fn measures() {
        let same = spec("api", |_| {});
        let rule = spec("api", |spec| spec.stop.timeout = Duration::from_secs(3));
        let scaled = spec("api", |spec| spec.instances = 4);
        let both = spec("api", |spec| {
            spec.instances = 4;
            spec.restart.max_restarts = 3;
        });
        let released = spec("api", |spec| {
            spec.instances = 4;
            spec.env.vars.insert("RELEASE".to_owned(), "2".to_owned());
        });
        let alone = spec("api", |spec| {
            spec.mode = ExecMode::Fork;
            spec.cwd = PathBuf::from("/srv/2");
        });
        let asleep = spec("api", |spec| spec.autostart = false);
        let scale = Measure::Scale { from: 2, to: 4 };
        let down = |up, ended, down| Present { up, ended, down, ..present(&same) };
        for (what, new, present, expected) in [
            ("it is not there", &same, None, Measure::Create),
            ("nothing differs", &same, Some(present(&same)), Measure::Unchanged),
            ("a rule", &rule, Some(present(&same)), Measure::Update),
            ("a number", &scaled, Some(present(&same)), scale),
            ("a number and a rule", &both, Some(present(&same)), scale),
            ("the environment", &released, Some(present(&same)), Measure::Reload),
            ("the directory of one that cannot overlap", &alone, Some(present(&same)), Measure::Restart),
            ("somebody stopped it", &same, Some(down(0, 0, 2)), Measure::Start { instances: 2 }),
            ("somebody stopped a part", &same, Some(down(1, 0, 1)), Measure::Start { instances: 1 }),
            (
                "it is not meant to start",
                &asleep,
                Some(Present { up: 0, down: 2, ..present(&asleep) }),
                Measure::Unchanged,
            ),
            ("it has ended by itself", &same, Some(down(0, 2, 0)), Measure::Unchanged),
            (
                "it has ended, and is another now",
                &released,
                Some(down(0, 2, 0)),
                Measure::Start { instances: 4 },
            ),
            ("a failed reload", &same, Some(Present { mixed: true, ..present(&same) }), Measure::Reload),
        ] {
            assert_eq!(measure(new, present), expected, "{what}");
        }
    }

    #[test]
    fn only_apps_of_the_file_are_left_over_or_removed() {
        let mut there = BTreeMap::new();
        for (app, file) in
            [("api", Some(FILE)), ("old", Some(FILE)), ("other", Some("/x.toml")), ("hand", None)]
        {
            let spec = spec(app, |spec| {
                spec.origin = file.map(|file| Origin { file: PathBuf::from(file), env_name: None });
            });
            there.insert(name(app), present(&spec));
        }
        let api = [spec("api", |_| {})];
        // `--only` chooses none of them: what is in the file stays.
        for specs in [&api[..], &[]] {
            let kept = plan(specs, &[name("api")], Path::new(FILE), false, &there);
            assert_eq!((kept.changes(), kept.left_over), (false, vec![name("old")]));
            let pruned = plan(specs, &[name("api")], Path::new(FILE), true, &there);
            assert_eq!((&pruned.steps[0].app, pruned.steps[0].measure), (&name("old"), Measure::Remove));
            assert!(pruned.left_over.is_empty() && pruned.changes());
        }
    }

    fn chain(links: &[(&str, &[&str])]) -> Vec<Arc<AppSpec>> {
        let one = |(app, needs): &(&str, &[&str])| {
            spec(app, |spec| {
                spec.depends_on = needs.iter().map(|need| (name(need), Dependency::Ready)).collect();
            })
        };
        links.iter().map(one).collect()
    }

    #[test]
    fn dependencies_go_first() {
        let specs = chain(&[
            ("web", &["api", "cache"]),
            ("api", &["db"]),
            ("job", &[]),
            ("db", &[]),
            ("cache", &["elsewhere"]),
        ]);
        let order: Vec<&str> = in_order(&specs).iter().map(|spec| spec.name.as_str()).collect();
        assert_eq!(order, ["job", "db", "api", "cache", "web"]);
    }

    #[test]
    fn a_circle_is_found_from_wherever_it_is_looked_for() {
        let specs = chain(&[
            ("web", &["api"]),
            ("api", &["cache", "db"]),
            ("db", &["web"]),
            ("cache", &[]),
            ("job", &["web"]),
        ]);
        let find = |name: &AppName| specs.iter().find(|spec| spec.name == *name).map(|spec| &**spec);
        let text = |from: &str| {
            let names = circle(find, &name(from))?;
            Some(names.iter().map(|name| name.as_str().to_owned()).collect::<Vec<_>>().join(" "))
        };
        assert_eq!(text("api").as_deref(), Some("api db web api"));
        assert_eq!(text("job").as_deref(), Some("web api db web"));
        assert_eq!(text("cache"), None);
    }
}
