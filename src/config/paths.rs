//! Paths made absolute by their text alone.
//!
//! Symlinks are never followed here: `current/app.js` must stay `current/app.js`, so that each spawn follows the link
//! of that moment.

use std::ffi::OsStr;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};

/// `path` as seen from `base` (absolute), with `.` and `..` taken out as text, as Node's `path.resolve` does it.
///
/// `..` after a symlink therefore means the directory that holds the link, which is what the writer sees.
#[must_use]
pub fn absolute(base: &Path, path: &Path) -> PathBuf {
    let mut result = PathBuf::new();
    for component in base.join(path).components() {
        match component {
            Component::CurDir => {}
            // At the root this pops nothing, as in the kernel.
            Component::ParentDir => {
                result.pop();
            }
            Component::RootDir | Component::Prefix(_) | Component::Normal(_) => result.push(component),
        }
    }
    result
}

/// Like [`absolute`], after `~` or `~/…` has become the home directory of the caller.
#[must_use]
pub fn absolute_from_home(base: &Path, home: Option<&Path>, text: &str) -> PathBuf {
    if let Some(home) = home {
        if text == "~" {
            return home.to_owned();
        }
        if let Some(rest) = text.strip_prefix("~/") {
            return absolute(home, Path::new(rest));
        }
    }
    absolute(base, Path::new(text))
}

/// The working directory as the caller's shell names it: `$PWD` while that is the same directory as `real`
/// (getcwd(3), which has symlinks resolved), else `real`. The rule of `pwd -L`.
///
/// A deployment script that did `cd current` means `current`, and not the release it points to today.
#[must_use]
pub fn logical_cwd(pwd: Option<&OsStr>, real: PathBuf) -> PathBuf {
    let Some(pwd) = pwd.map(Path::new).filter(|pwd| pwd.is_absolute()) else { return real };
    if pwd.components().any(|c| matches!(c, Component::CurDir | Component::ParentDir)) {
        return real;
    }
    let id = |path: &Path| std::fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
    if id(pwd).is_some() && id(pwd) == id(&real) { pwd.to_owned() } else { real }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absolute_by_text() {
        for (base, path, expected) in [
            ("/srv/app", "server.js", "/srv/app/server.js"),
            ("/srv/app", "./a/./b.js", "/srv/app/a/b.js"),
            ("/srv/app", "../shared/x", "/srv/shared/x"),
            ("/srv/app", "/abs/../y", "/y"),
            ("/", "../../x", "/x"),
            ("/srv/app", "", "/srv/app"),
        ] {
            assert_eq!(absolute(Path::new(base), Path::new(path)), Path::new(expected), "{base} {path}");
        }
    }

    #[test]
    fn tilde_is_the_callers_home() {
        let home = Some(Path::new("/home/ann"));
        let base = Path::new("/srv");
        assert_eq!(absolute_from_home(base, home, "~/logs/a.log"), Path::new("/home/ann/logs/a.log"));
        assert_eq!(absolute_from_home(base, home, "~"), Path::new("/home/ann"));
        assert_eq!(absolute_from_home(base, home, "~bob/x"), Path::new("/srv/~bob/x"));
        assert_eq!(absolute_from_home(base, None, "~/x"), Path::new("/srv/~/x"));
    }

    #[test]
    fn logical_cwd_keeps_the_symlink() {
        let dir = tempfile::tempdir().unwrap();
        let release = dir.path().join("releases/1");
        std::fs::create_dir_all(&release).unwrap();
        let current = dir.path().join("current");
        std::os::unix::fs::symlink(&release, &current).unwrap();
        assert_eq!(logical_cwd(Some(current.as_os_str()), release.clone()), current);
        // A PWD that is stale, relative or absent does not count.
        assert_eq!(logical_cwd(Some(dir.path().as_os_str()), release.clone()), release);
        assert_eq!(logical_cwd(Some(OsStr::new("current")), release.clone()), release);
        assert_eq!(logical_cwd(None, release.clone()), release);
    }
}
