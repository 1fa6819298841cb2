//! What apps of other users must reach: the Node agent and notify sockets, in a directory beside the home, which nobody but
//! the daemon's user may enter. Only root has such apps.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::tag::HomeMark;
use crate::node;
use crate::sys::peer;

/// Emptied at boot, and only root writes there.
const PARENT: &str = "/run/pm";

/// Everybody may pass through, nobody may look around.
const MODE: u32 = 0o711;

/// The directory of one home.
#[derive(Debug)]
pub struct Outside {
    dir: PathBuf,
    is_made: bool,
}

impl Outside {
    /// That of this home; nothing is made before it is needed.
    #[must_use]
    pub fn of(mark: HomeMark) -> Self {
        Self { dir: Path::new(PARENT).join(mark.to_string()), is_made: false }
    }

    /// Where notify sockets of other users lie.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The agent's file.
    #[must_use]
    pub fn agent(&self) -> PathBuf {
        self.dir.join("agent.cjs")
    }

    /// Makes the directory with the agent in it, if that was not done.
    ///
    /// # Errors
    /// It cannot be made, or somebody else owns it.
    pub fn make(&mut self) -> io::Result<()> {
        if self.is_made && fs::symlink_metadata(self.agent()).is_ok() {
            return Ok(());
        }
        for dir in [Path::new(PARENT), &self.dir] {
            match DirBuilder::new().mode(MODE).create(dir) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
            let meta = fs::symlink_metadata(dir)?;
            if !meta.is_dir() || meta.uid() != peer::own_uid() {
                return Err(io::Error::other(format!("{} is not a directory of ours", dir.display())));
            }
            // Whatever the umask has left of it.
            fs::set_permissions(dir, Permissions::from_mode(MODE))?;
        }
        let aside = self.dir.join("agent.cjs.new");
        fs::write(&aside, node::AGENT)?;
        fs::set_permissions(&aside, Permissions::from_mode(0o444))?;
        fs::rename(&aside, self.agent())?;
        self.is_made = true;
        Ok(())
    }

    /// The daemon ends, and with it the last app.
    pub fn remove(&self) {
        // Most daemons never made it.
        let _ = fs::remove_dir_all(&self.dir);
        // Another home's may be there.
        let _ = fs::remove_dir(PARENT);
    }
}
