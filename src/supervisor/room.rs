//! How many descriptors there are, and what instances take: a start that would leave none for what runs is refused with
//! the number, before anything is done. Estimates from above; what runs into the limit all the same fails and is tried
//! again with backoff.

use crate::model::spec::AppSpec;

/// What the daemon has open without any instance.
const OWN: u64 = 32;

/// What a start, a save and a sample open for a moment.
const PASSING: u64 = 8;

/// Connections of commands that are served at once, where the limit on open files allows so many.
const CONNECTIONS_MAX: u64 = 256;

/// Connections of commands that are served at once under this limit on open files: a sixteenth of it, so that a flood of
/// them leaves room for what runs.
#[must_use]
pub fn connections(limit: u64) -> u64 {
    (limit / 16).clamp(8, CONNECTIONS_MAX)
}

/// What instances of this app take each: our ends of its pipes and its channel twice (one in use, one for the keeper that
/// might have to be replaced), and its log files.
#[must_use]
pub fn of_instance(spec: &AppSpec) -> u64 {
    let ends = 3 + u64::from(spec.has_channel()) + 2 * u64::from(spec.ready.wait_ready);
    2 * ends + 2
}

/// What its listeners take, however many instances there are.
#[must_use]
pub fn of_listeners(spec: &AppSpec) -> u64 {
    let each = if spec.inherits_slots() { u64::from(spec.instances) } else { 1 };
    2 * each * u64::try_from(spec.listen.len()).unwrap_or(u64::MAX)
}

/// What is left for instances under this limit.
#[must_use]
pub fn for_instances(limit: u64) -> u64 {
    limit.saturating_sub(OWN + PASSING + connections(limit))
}

/// What apps take, and what they would.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Need {
    /// Instances that run or are about to.
    pub instances: u64,
    /// Descriptors for them and their listeners.
    pub descriptors: u64,
}

impl Need {
    /// Adds instances of an app.
    pub fn add(&mut self, spec: &AppSpec, instances: u64) {
        if instances > 0 {
            self.instances += instances;
            self.descriptors += of_instance(spec) * instances + of_listeners(spec);
        }
    }
}

/// Why what is asked for does not fit: cause and hint.
#[must_use]
pub fn refusal(limit: u64, now: Need, then: Need) -> Option<(String, String)> {
    let room = for_instances(limit);
    // Whatever there is too much of already is not made more by this.
    if then.descriptors <= room || then.descriptors <= now.descriptors {
        return None;
    }
    let more = then.instances.saturating_sub(now.instances).max(1);
    let each = (then.descriptors - now.descriptors).div_ceil(more);
    let left = room.saturating_sub(now.descriptors) / each.max(1);
    let cause = format!(
        "{more} more would need {} descriptors, and of the {limit} that the daemon may open {} are left; there is \
         room for {left} more",
        then.descriptors - now.descriptors,
        room.saturating_sub(now.descriptors),
    );
    let hint = "Raise the hard limit of open files the daemon is started with (`LimitNOFILE=` in its unit, `ulimit -Hn` \
                in a shell), then `pm kill` and `pm resurrect`.";
    Some((cause, hint.to_owned()))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::model::id::AppName;
    use crate::model::spec::{CommandSpec, Runtime};

    fn spec(runtime: Runtime) -> AppSpec {
        let command = CommandSpec {
            script: PathBuf::from("/srv/app"),
            interpreter: None,
            interpreter_args: Vec::new(),
            args: Vec::new(),
            runtime,
        };
        AppSpec::new(AppName::new("app").unwrap(), command, PathBuf::from("/srv"))
    }

    fn need(spec: &AppSpec, instances: u64) -> Need {
        let mut need = Need::default();
        need.add(spec, instances);
        need
    }

    #[test]
    fn what_fits_is_not_refused_and_what_does_not_is_with_the_number() {
        let plain = spec(Runtime::Other);
        assert_eq!(of_instance(&plain), 8);
        assert_eq!(of_instance(&spec(Runtime::Node)), 10);
        assert_eq!(for_instances(64), 16);
        assert_eq!(refusal(64, need(&plain, 0), need(&plain, 2)), None);
        let (cause, hint) = refusal(64, need(&plain, 1), need(&plain, 4)).unwrap();
        assert_eq!(
            cause,
            "3 more would need 24 descriptors, and of the 64 that the daemon may open 8 are left; there is room for 1 \
             more"
        );
        assert!(hint.contains("LimitNOFILE"));
    }

    #[test]
    fn what_does_not_grow_is_never_refused() {
        let plain = spec(Runtime::Other);
        assert_eq!(refusal(64, need(&plain, 50), need(&plain, 50)), None, "a reload");
        assert_eq!(refusal(64, need(&plain, 50), need(&plain, 20)), None, "scaled down");
        assert!(refusal(64, need(&plain, 50), need(&plain, 51)).unwrap().0.ends_with("room for 0 more"));
    }

    #[test]
    fn the_usual_limits_hold_hundreds() {
        assert!(for_instances(1024) / 8 >= 100);
        assert!(for_instances(20_000) / 10 >= 1_900);
        assert_eq!(connections(1 << 20), 256);
    }
}
