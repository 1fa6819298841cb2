//! Which operation may begin on an app while another is going on.
//!
//! One operation per app at a time. stop and delete win at once over everything but delete. A reload waits behind what
//! is going on, at most one does, and later ones join the waiting one: the running one may have started instances from
//! older files. What can neither wait nor join is refused, with the name of what is going on.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::model::id::Slot;
use crate::model::spec::AppSpec;

/// What is asked of one app.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Ask {
    /// `start FILE`: create, start, reload or leave alone. `run`: unless it has to be created and is not to run yet.
    StartSpec { spec: Arc<AppSpec>, run: bool },
    /// From a saved list: created unless it exists.
    Resurrect { spec: Arc<AppSpec>, stopped: BTreeSet<Slot> },
    /// `start NAME`: start what is down, restart what is up.
    StartName { slots: Slots },
    /// Down, and stay down.
    Stop { slots: Slots },
    /// Down, then up.
    Restart { slots: Slots, spec: Option<Arc<AppSpec>> },
    /// Replaced one by one.
    Reload { slots: Slots, spec: Option<Arc<AppSpec>> },
    /// Other rules or another number of slots, for the processes that run.
    Adjust { spec: Arc<AppSpec> },
    /// Down and forgotten.
    Delete,
    /// Another number of slots.
    Scale { instances: u32 },
}

/// Some slots; `None`: all.
pub(super) type Slots = Option<BTreeSet<Slot>>;

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Start,
    Restart,
    Reload,
    Scale,
    Stop,
    Delete,
}

impl Kind {
    /// Its name for people.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Restart => "restart",
            Self::Reload => "reload",
            Self::Scale => "scale",
            Self::Stop => "stop",
            Self::Delete => "delete",
        }
    }
}

/// How a request goes on that finds another operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing is in its way.
    Go,
    /// What is going on ends here and now.
    Supersede,
    /// It gets the outcome of what is going on.
    Join,
    /// It is so already.
    Already,
    /// It begins when what is going on has ended.
    Queue,
    /// Refused.
    Busy,
}

/// Whether what is asked brings a spec that differs from the one being brought about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Release {
    Same,
    Other,
}

/// The table. `running` is what goes on, `release` compares its spec with the one asked for.
pub(super) fn verdict(running: Option<Kind>, ask: &Ask, release: Release) -> Verdict {
    use Verdict::{Already, Busy, Go, Join, Queue, Supersede};
    let Some(running) = running else { return Go };
    match (ask, running, release) {
        (Ask::Stop { .. }, Kind::Stop | Kind::Delete, _) | (Ask::Delete, Kind::Delete, _) => Join,
        (Ask::Stop { .. }, Kind::Start | Kind::Restart | Kind::Reload | Kind::Scale, _)
        | (Ask::Delete, Kind::Start | Kind::Restart | Kind::Reload | Kind::Scale | Kind::Stop, _) => {
            Supersede
        }

        (Ask::Reload { .. }, Kind::Delete, _) | (Ask::Reload { .. }, Kind::Reload, Release::Other) => Busy,
        (Ask::Reload { .. }, Kind::Start | Kind::Restart | Kind::Reload | Kind::Scale | Kind::Stop, _) => {
            Queue
        }

        (Ask::Restart { .. }, Kind::Restart | Kind::Stop, _) => Queue,
        (Ask::Restart { .. }, Kind::Start | Kind::Reload | Kind::Scale | Kind::Delete, _) => Busy,

        (Ask::StartSpec { .. } | Ask::StartName { .. }, Kind::Stop, _) => Queue,
        (Ask::StartSpec { .. }, Kind::Start | Kind::Restart, Release::Same) => Join,
        (Ask::StartSpec { .. }, Kind::Reload | Kind::Scale, Release::Same) => Already,
        (Ask::StartName { .. }, Kind::Start, _) => Join,
        (Ask::StartSpec { .. }, Kind::Start | Kind::Restart | Kind::Reload | Kind::Scale, Release::Other)
        | (Ask::StartSpec { .. }, Kind::Delete, _)
        | (Ask::StartName { .. }, Kind::Restart | Kind::Reload | Kind::Scale | Kind::Delete, _) => Busy,

        (Ask::Scale { .. } | Ask::Adjust { .. }, Kind::Scale, Release::Same) => Join,
        (Ask::Scale { .. } | Ask::Adjust { .. }, Kind::Scale, Release::Other)
        | (
            Ask::Scale { .. } | Ask::Adjust { .. },
            Kind::Start | Kind::Restart | Kind::Reload | Kind::Stop | Kind::Delete,
            _,
        ) => Busy,

        (Ask::Resurrect { .. }, _, _) => Already,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table() {
        let (stop, reload) = (Ask::Stop { slots: None }, Ask::Reload { slots: None, spec: None });
        let (restart, scale) = (Ask::Restart { slots: None, spec: None }, Ask::Scale { instances: 3 });
        for (ask, running, release, expected) in [
            (&stop, Kind::Reload, Release::Same, Verdict::Supersede),
            (&stop, Kind::Delete, Release::Same, Verdict::Join),
            (&Ask::Delete, Kind::Stop, Release::Same, Verdict::Supersede),
            (&reload, Kind::Reload, Release::Same, Verdict::Queue),
            (&reload, Kind::Reload, Release::Other, Verdict::Busy),
            (&reload, Kind::Delete, Release::Same, Verdict::Busy),
            (&scale, Kind::Reload, Release::Same, Verdict::Busy),
            (&restart, Kind::Reload, Release::Same, Verdict::Busy),
            (&restart, Kind::Restart, Release::Same, Verdict::Queue),
            (&Ask::StartName { slots: None }, Kind::Stop, Release::Same, Verdict::Queue),
        ] {
            assert_eq!(verdict(Some(running), ask, release), expected, "{ask:?} during {running:?}");
            assert_eq!(verdict(None, ask, release), Verdict::Go);
        }
    }
}
