//! A plan in the words of the protocol.

use crate::ipc::protocol::{KeyChange, Measure as MeasureWord, PlanView, PlannedApp};
use crate::model::difference::{Difference, variable_of};
use crate::model::mask::{ShowEnv, shown};
use crate::policy::plan::{Measure, Plan, Planned};

/// A plan as it is shown: values of the environment masked unless asked otherwise.
#[must_use]
pub fn plan_view(plan: &Plan, show: ShowEnv) -> PlanView {
    PlanView {
        changes: plan.changes(),
        apps: plan.steps.iter().map(|step| planned(step, show)).collect(),
        left_over: plan.left_over.clone(),
    }
}

fn planned(step: &Planned, show: ShowEnv) -> PlannedApp {
    PlannedApp {
        app: step.app.clone(),
        measure: match step.measure {
            Measure::Remove => MeasureWord::Remove,
            Measure::Create => MeasureWord::Create,
            Measure::Start { .. } => MeasureWord::Start,
            Measure::Reload => MeasureWord::Reload,
            Measure::Restart => MeasureWord::Restart,
            Measure::Scale { .. } => MeasureWord::Scale,
            Measure::Update => MeasureWord::Update,
            Measure::Unchanged => MeasureWord::Unchanged,
        },
        instances: match step.measure {
            Measure::Start { instances } => instances,
            _ => step.spec.as_ref().map_or(0, |spec| spec.instances),
        },
        changes: key_changes(&step.differences, show),
        note: step.note.map(str::to_owned),
    }
}

/// Differences as they are shown.
#[must_use]
pub fn key_changes(differences: &[Difference], show: ShowEnv) -> Vec<KeyChange> {
    let value = |key: &str, value: &Option<String>| -> Option<String> {
        let value = value.as_ref()?;
        Some(variable_of(key).map_or(value.as_str(), |name| shown(name, value, show)).to_owned())
    };
    differences
        .iter()
        .map(|one| KeyChange {
            key: one.key.clone(),
            old: value(&one.key, &one.old),
            new: value(&one.key, &one.new),
        })
        .collect()
}
