//! `pm startup`: pm and its apps come back after a reboot. Writes a unit, has systemd check, enable and start it, and
//! looks whether all of that is so.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use nix::unistd::{Uid, User};
use serde_json::json;

use crate::cli::args::{Startup, UnitOptions};
use crate::cli::connect::Session;
use crate::cli::error::CliError;
use crate::cli::systemctl::{self, Instance, refused};
use crate::cli::unit::{self, MARK, Scope, Unit};
use crate::cli::{Context, Surroundings};
use crate::ipc::protocol::{Answer, Request};
use crate::store::paths::{Home, user_name};
use crate::sys::trust;

/// Recipes for other service managers.
const RECIPES: [(&str, &str); 3] = [
    ("openrc", include_str!("../recipes/openrc.txt")),
    ("runit", include_str!("../recipes/runit.txt")),
    ("launchd", include_str!("../recipes/launchd.txt")),
];

/// The version a unit is written for where nothing tells.
const USUAL_VERSION: u32 = 252;

/// What is to be set up, and where.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) instance: Instance,
    pub(super) unit: Unit,
    /// With `.service`.
    pub(super) name: String,
    pub(super) home: Home,
    /// The words after `pm` that lead here again as root.
    again: String,
}

pub(super) fn run(args: &Startup, context: &mut Context) -> Result<(), CliError> {
    let options = &args.unit;
    if let Some(platform) = options.platform.as_deref().filter(|platform| *platform != "systemd") {
        return recipe(platform, context);
    }
    let plan = Plan::new(options, context, "startup")?;
    if args.print {
        return Ok(context.terminal.data(plan.unit.text().as_bytes())?);
    }
    plan.check_machine()?;
    plan.check_caller("startup")?;
    set_up(&plan, context)
}

fn recipe(platform: &str, context: &mut Context) -> Result<(), CliError> {
    let Some((_, text)) = RECIPES.iter().find(|(name, _)| *name == platform) else {
        return Err(CliError::Usage {
            message: format!("`{platform}` is not a service manager that pm knows"),
            cause: None,
            hint: Some(
                "Known are systemd (which is set up), openrc, runit and launchd (whose recipe is printed). \
                 For the daemon of a certain user: `pm startup -u USER`."
                    .to_owned(),
            ),
        });
    };
    let program = stable_program(&context.surroundings)?;
    let text = text
        .replace("{pm}", &program.display().to_string())
        .replace("{home}", &context.home.dir().display().to_string());
    Ok(context.terminal.data(text.as_bytes())?)
}

impl Plan {
    pub(super) fn new(args: &UnitOptions, context: &Context, verb: &str) -> Result<Self, CliError> {
        let surroundings = &context.surroundings;
        let program = stable_program(surroundings)?;
        let caller = user_name(Uid::effective().as_raw());
        let usual_home = Home::resolve(None, None).is_ok_and(|usual| usual == context.home);
        let user = args.run_as.as_deref().filter(|user| *user != "root" || Uid::effective().is_root());
        let scope = match user {
            _ if args.user => Scope::User,
            Some("root") => Scope::System,
            Some(user) => Scope::SystemFor { user: user.to_owned() },
            None if Uid::effective().is_root() => Scope::System,
            None => Scope::SystemFor { user: caller },
        };
        let home = match &scope {
            Scope::SystemFor { user } if usual_home => home_of(user)?,
            Scope::SystemFor { user } => {
                home_of(user)?;
                context.home.clone()
            }
            Scope::System | Scope::User => context.home.clone(),
        };
        let name = match (&args.service_name, &scope) {
            (Some(name), _) => name.strip_suffix(".service").unwrap_or(name).to_owned(),
            (None, Scope::SystemFor { user }) => format!("pm-{user}"),
            (None, Scope::System | Scope::User) => "pm".to_owned(),
        };
        if !unit::is_unit_name(&name) {
            return Err(CliError::Usage {
                message: format!("`{name}` is not a name for a unit"),
                cause: None,
                hint: Some("Use letters, digits and `:_.-`, with --service-name.".to_owned()),
            });
        }
        let version = systemctl::version().unwrap_or(USUAL_VERSION);
        if version < unit::OLDEST {
            return Err(refused(
                &format!("systemd {version} is too old"),
                &format!("what keeps apps alive over a restart of the daemon needs systemd {}", unit::OLDEST),
                Some("`pm startup runit` prints a recipe for another service manager.".to_owned()),
            ));
        }
        let mut again = format!("{} {verb}", shell_word(&program));
        if let Scope::SystemFor { user } = &scope {
            again = format!("{again} -u {}", shell_word(Path::new(user)));
        }
        if !usual_home {
            again = format!("{again} --home {}", shell_word(context.home.dir()));
        }
        if let Some(name) = &args.service_name {
            again = format!("{again} --service-name {}", shell_word(Path::new(name)));
        }
        let instance = if scope == Scope::User { Instance::User } else { Instance::System };
        let unit = Unit { scope, program, home: home.dir().to_owned(), version };
        Ok(Self { instance, unit, name: format!("{name}.service"), home, again })
    }

    pub(super) fn file(&self) -> Result<PathBuf, CliError> {
        Ok(self.instance.unit_dir()?.join(&self.name))
    }

    pub(super) fn check_machine(&self) -> Result<(), CliError> {
        if systemctl::is_booted() {
            return Ok(());
        }
        let other = [("/sbin/openrc-run", "openrc"), ("/etc/runit", "runit"), ("/etc/sv", "runit")];
        let found = other.iter().find(|(path, _)| fs::metadata(path).is_ok()).map(|(_, name)| *name);
        let hint = match found {
            Some(name) => format!("`pm startup {name}` prints what {name} needs."),
            None => {
                "`pm startup openrc` and `pm startup runit` print recipes; in a container run `pm daemon` as \
                     its main process. `pm startup --print` shows the unit for another machine."
                    .to_owned()
            }
        };
        Err(refused(
            "systemd does not run this machine, so there is nothing to set up",
            "/run/systemd/system does not exist",
            Some(hint),
        ))
    }

    /// A unit for the whole machine is root's to write, one of the user's own is not.
    pub(super) fn check_caller(&self, verb: &str) -> Result<(), CliError> {
        let is_root = Uid::effective().is_root();
        if self.unit.scope == Scope::User || is_root {
            return Ok(());
        }
        let own = format!("{} {verb} --user", shell_word(&self.unit.program));
        Err(refused(
            "setting up a service of the machine takes root",
            &format!("you are {}", user_name(Uid::effective().as_raw())),
            Some(format!(
                "Run this command:\n\n    sudo {}\n\nor without root, for a service of your own:\n\n    {own}\n",
                self.again
            )),
        ))
    }

    /// The unit that is there, if it is ours.
    pub(super) fn present(&self, file: &Path) -> Result<Option<String>, CliError> {
        let text = match fs::read_to_string(file) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(CliError::File { what: "read", path: file.to_owned(), source }),
        };
        let hint = "`--service-name NAME` names another unit.";
        if !text.starts_with(MARK) {
            return Err(refused(
                &format!("{} is not a unit that `pm startup` wrote", file.display()),
                "it belongs to somebody else",
                Some(format!("Look at it, and move it away if nobody needs it. {hint}")),
            ));
        }
        if let Some(home) = unit::home_line(&text)
            && home != unit::written(self.home.dir())
        {
            return Err(refused(
                &format!("{} is for another home", file.display()),
                &format!("it runs the daemon of {home}, and not that of {}", self.home.dir().display()),
                Some(hint.to_owned()),
            ));
        }
        Ok(Some(text))
    }
}

fn set_up(plan: &Plan, context: &mut Context) -> Result<(), CliError> {
    let Plan { instance, name, .. } = plan;
    let file = plan.file()?;
    let text = plan.unit.text();
    let present = plan.present(&file)?;
    for warning in warnings(plan) {
        context.terminal.error_line("warning:", &warning)?;
    }
    let changed = present.as_deref() != Some(&text);
    if changed {
        write(&file, &text)?;
        if let Some(complaints) = systemctl::complaints(*instance, &file) {
            // As it was before; nobody has read it yet.
            let undone = match &present {
                Some(before) => write(&file, before),
                None => fs::remove_file(&file).map_err(|source| CliError::File {
                    what: "remove",
                    path: file.clone(),
                    source,
                }),
            };
            undone?;
            return Err(refused(&format!("systemd does not accept {name}"), &complaints, None));
        }
        instance.run(&["daemon-reload"])?;
    }
    // Left by `pm unstartup` until the next reboot; the one just written counts.
    let runtime = instance.runtime_unit_dir().join(name);
    if fs::read_to_string(&runtime).is_ok_and(|text| text.starts_with(MARK)) {
        let _ = fs::remove_file(&runtime);
        instance.run(&["daemon-reload"])?;
    }
    let was_enabled = instance.ask(&["is-enabled", name]).as_deref() == Some("enabled");
    if !was_enabled {
        instance.run(&["enable", "--quiet", name])?;
    }
    let lingers = linger(plan);
    let was_active = instance.ask(&["is-active", name]).as_deref() == Some("active");
    let before = if was_active { None } else { daemon_pid(&plan.home) };
    if !was_active {
        start(plan)?;
    }
    let pid = instance.property(name, "MainPID");
    let enabled = instance.ask(&["is-enabled", name]).as_deref() == Some("enabled");
    let active = instance.ask(&["is-active", name]).as_deref() == Some("active");
    if !enabled || !active {
        return Err(refused(
            &format!("{name} is {}", if enabled { "not running" } else { "not enabled" }),
            "",
            Some(format!("See `{}`.", instance.line(&["status", name]))),
        ));
    }
    if context.json {
        let told = json!({
            "unit": name, "path": file, "changed": changed, "enabled": enabled, "active": active,
            "pid": pid.parse::<u32>().ok(), "taken_over": before.is_some(),
        });
        context.terminal.data_line(&told.to_string())?;
    } else {
        let first = if !changed && was_enabled && was_active {
            format!("{name} is set up already: pm and its apps come back after a reboot.")
        } else {
            format!("{name} is set up: pm and its apps come back after a reboot.")
        };
        let daemon = match before {
            Some(_) => format!("pid {pid}; it took over from the one that was running, with every app"),
            None => format!("pid {pid}"),
        };
        let undo = plan.again.replacen(" startup", " unstartup", 1);
        let undo = if plan.unit.scope == Scope::User { format!("{undo} --user") } else { undo };
        context.terminal.say(&first)?;
        for (key, value) in [
            ("unit", file.display().to_string()),
            ("daemon", daemon),
            ("state", instance.line(&["status", name.trim_end_matches(".service")])),
            ("undo", undo),
        ] {
            context.terminal.say(&format!("  {key:<7} {value}"))?;
        }
    }
    if let Err(error) = lingers {
        context.terminal.error_line(
            "warning:",
            "without lingering the service runs only while you are logged in, and ends with your last session",
        )?;
        if let Some(cause) = error.cause() {
            context.terminal.complain(&format!("  cause: {cause}"))?;
        }
        let user = user_name(Uid::effective().as_raw());
        context.terminal.hint_line(&format!("Run `sudo loginctl enable-linger {user}`."))?;
    }
    Ok(())
}

fn start(plan: &Plan) -> Result<(), CliError> {
    let Plan { instance, name, .. } = plan;
    // A start that failed before is none of this one's business.
    let _ = instance.ask(&["reset-failed", name]);
    instance.run(&["start", name]).map_err(|_| {
        let words = ["--no-pager", "--lines=12", "--full", "status", name];
        let journal = match instance {
            Instance::System => format!("journalctl -u {name}"),
            Instance::User => format!("journalctl --user -u {name}"),
        };
        // `status` of a unit that failed is itself a failure, with its text on standard output.
        let state = ["Result", "ExecMainStatus", "StatusText"]
            .map(|key| format!("{key}={}", instance.property(name, key)));
        refused(
            &format!("{name} did not start"),
            &state.join(", "),
            Some(format!("See `{}` and `{journal}`.", instance.line(&words))),
        )
    })
}

/// A user's services run without the user only when that is wished for.
fn linger(plan: &Plan) -> Result<(), CliError> {
    if plan.unit.scope != Scope::User {
        return Ok(());
    }
    let user = user_name(Uid::effective().as_raw());
    if fs::metadata(Path::new("/var/lib/systemd/linger").join(&user)).is_ok() {
        return Ok(());
    }
    systemctl::tool("loginctl", &["enable-linger", &user])
}

fn daemon_pid(home: &Home) -> Option<u32> {
    let mut session = Session::open(home).ok().flatten()?;
    match session.ask(|| Request::Ping).ok()? {
        Answer::Pong { daemon_pid, .. } => Some(daemon_pid),
        _ => None,
    }
}

fn warnings(plan: &Plan) -> Vec<String> {
    let mut warnings = Vec::new();
    let program = &plan.unit.program;
    let text = program.display();
    let passing = ["/.nvm/", "/node_modules/", "/target/debug/", "/target/release/"];
    if program.starts_with("/tmp") || passing.iter().any(|part| program.to_string_lossy().contains(part)) {
        warnings.push(format!(
            "{text} may be gone by the next reboot; install pm where it stays, such as /usr/local/bin/pm, and run \
             `pm startup` from there"
        ));
    }
    if plan.unit.scope == Scope::System
        && let Ok(Some(why)) = trust::changeable_by_others(program)
    {
        warnings.push(format!("root will run {text} at every boot, and {why}"));
    }
    warnings
}

/// The way to this program that stays when it is upgraded: as it is found in PATH, symbolic links and all.
fn stable_program(surroundings: &Surroundings) -> Result<PathBuf, CliError> {
    let own = &surroundings.program;
    let real =
        fs::canonicalize(own).map_err(|source| CliError::File { what: "find", path: own.clone(), source })?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .filter(|dir| dir.is_absolute())
        .map(|dir| dir.join("pm"))
        .find(|candidate| fs::canonicalize(candidate).is_ok_and(|candidate| candidate == real));
    Ok(found.unwrap_or(real))
}

fn home_of(user: &str) -> Result<Home, CliError> {
    let entry = User::from_name(user).ok().flatten().ok_or_else(|| CliError::Usage {
        message: format!("there is no user `{user}`"),
        cause: None,
        hint: Some("`-u` takes the name of the user whose apps are to come back.".to_owned()),
    })?;
    Ok(Home::at(&entry.dir.join(".pm"))?)
}

/// A unit file is read by others than its owner; a reader never finds half of it.
fn write(file: &Path, text: &str) -> Result<(), CliError> {
    let failed = |source| CliError::File { what: "write", path: file.to_owned(), source };
    if let Some(dir) = file.parent() {
        fs::create_dir_all(dir).map_err(failed)?;
    }
    // Not a name that systemd would take for a unit.
    let aside = file.with_extension("service.new");
    fs::write(&aside, text).map_err(failed)?;
    fs::set_permissions(&aside, fs::Permissions::from_mode(0o644)).map_err(failed)?;
    fs::rename(&aside, file).map_err(failed)
}

/// A path as a word for a shell.
fn shell_word(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@,=%".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text;
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_for_shells() {
        for (path, word) in [("/usr/bin/pm", "/usr/bin/pm"), ("/a b", "'/a b'"), ("it's", r"'it'\''s'")] {
            assert_eq!(shell_word(Path::new(path)), word);
        }
    }

    #[test]
    fn the_docs_have_every_recipe() {
        let docs = include_str!("../../../docs/systemd.md");
        for (name, text) in RECIPES {
            let text = text.replace("{pm}", "/usr/local/bin/pm").replace("{home}", "/var/lib/pm");
            assert!(
                docs.contains(text.trim_end()),
                "docs/systemd.md lacks the recipe for {name}, or has an old one"
            );
        }
    }
}
