//! What the config file that an app came from says now, compared with what the daemon has of it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::cli::args::FileOptions;
use crate::cli::connect::Session;
use crate::cli::error::CliError;
use crate::cli::specs::Wishes;
use crate::ipc::protocol::{Answer, KeyChange, PlannedApp, Request};
use crate::model::id::AppName;
use crate::model::spec::Origin;

/// What a file says of an app.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// These keys differ; none: it says the same.
    Changes(Vec<KeyChange>),
    /// The file has no such app.
    NotThere,
    /// The file cannot be read, or has problems.
    Unreadable,
}

/// Files that were read, so that a command about many apps reads each once.
#[derive(Debug, Default)]
pub(super) struct Origins {
    known: BTreeMap<(PathBuf, Option<String>, bool), Option<Vec<PlannedApp>>>,
}

impl Origins {
    /// Reads the file as the caller, and asks the daemon what differs. Says nothing about problems of the file.
    ///
    /// # Errors
    /// The daemon cannot be reached.
    pub(super) fn says(
        &mut self,
        origin: &Origin,
        app: &AppName,
        show_env: bool,
        session: &mut Session,
    ) -> Result<Said, CliError> {
        let key = (origin.file.clone(), origin.env_name.clone(), show_env);
        if !self.known.contains_key(&key) {
            let planned = read(origin, show_env, session)?;
            self.known.insert(key.clone(), planned);
        }
        let Some(Some(apps)) = self.known.get(&key) else { return Ok(Said::Unreadable) };
        Ok(apps
            .iter()
            .find(|planned| planned.app == *app)
            .map_or(Said::NotThere, |planned| Said::Changes(planned.changes.clone())))
    }
}

fn read(origin: &Origin, show_env: bool, session: &mut Session) -> Result<Option<Vec<PlannedApp>>, CliError> {
    // Whoever may write there could have put a FIFO in its place, and nobody has asked for this file now.
    if !origin.file.is_file() {
        return Ok(None);
    }
    let options = FileOptions { only: None, env: origin.env_name.clone() };
    let Ok(file) = Wishes::of_file(&options).read_quietly(&origin.file) else { return Ok(None) };
    let request = || Request::Apply {
        specs: file.apps.clone(),
        all: file.all.clone(),
        file: file.path.clone(),
        prune: false,
        act: false,
        shell: BTreeMap::new(),
        show_env,
    };
    match session.ask(request)? {
        Answer::Plan(plan) => Ok(Some(plan.apps)),
        _ => Err(CliError::WrongAnswer),
    }
}
