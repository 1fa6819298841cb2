//! What to execute: the script, its interpreter, and the runtime that results.

use crate::model::spelling;
use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::io::Read as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use super::app::AppConfig;
use super::error::{At, Place, Problem, quoted};
use super::resolve::Context;
use super::{paths, words};
use crate::model::spec::{CommandSpec, Runtime};

/// The kernel reads no more of a `#!` line (BINPRM_BUF_SIZE).
const SHEBANG_MAX: u64 = 256;

/// The programs for extensions, as PM2 has them; the first that is in PATH counts.
const BY_EXTENSION: [(&str, &[&str]); 15] = [
    ("js", &["node"]),
    ("cjs", &["node"]),
    ("mjs", &["node"]),
    ("ts", &["bun", "node"]),
    ("tsx", &["bun", "node"]),
    ("mts", &["bun", "node"]),
    ("cts", &["bun", "node"]),
    ("py", &["python"]),
    ("sh", &["bash"]),
    ("bash", &["bash"]),
    ("rb", &["ruby"]),
    ("php", &["php"]),
    ("pl", &["perl"]),
    ("coffee", &["coffee"]),
    ("ls", &["lsc"]),
];

/// Node programs that start what somebody else has written.
const PACKAGE_RUNNERS: [&str; 5] = ["npm", "npx", "pnpm", "pnpx", "yarn"];

/// The app's name when none is given: the script's file name without its last extension; a shell line as it is, when
/// it can be a name, else the file name of its first word.
pub(super) fn default_name(script: &str) -> String {
    let stem = |text: &str| {
        let path = Path::new(text);
        path.file_stem().or(path.file_name()).unwrap_or(OsStr::new(text)).to_string_lossy().into_owned()
    };
    if !script.contains(char::is_whitespace) || Path::new(script).is_file() {
        return stem(script);
    }
    if crate::model::id::AppName::new(script).is_ok() {
        return script.to_owned();
    }
    stem(script.split_whitespace().next().unwrap_or(script))
}

/// Resolves script and interpreter of an app. `path` is the PATH the app will have.
pub(super) fn resolve(
    app: &AppConfig,
    cwd: &Path,
    path: &OsStr,
    context: &Context,
) -> Result<CommandSpec, Problem> {
    let Some(script) = &app.script else {
        return Err(Problem::new(app.place.clone(), "this app has no `script`"));
    };
    let args = app.args.as_ref().map(|args| args.value.clone()).unwrap_or_default();
    let interpreter_args = app.interpreter_args.as_ref().map(|args| args.value.clone()).unwrap_or_default();
    let given = app.interpreter.as_ref();
    let direct = |script: PathBuf, args| CommandSpec {
        script,
        interpreter: None,
        interpreter_args: Vec::new(),
        args,
        runtime: Runtime::Other,
    };

    if script.value == "pm" && given.is_none() {
        // The copy that runs now, so that examples work before anything is installed.
        return Ok(direct(context.current_exe.clone(), args));
    }
    if let Some(shell) = app.shell.as_ref().filter(|shell| shell.value) {
        if given.is_some() {
            let problem = Problem::new(shell.place.clone(), "the shell is the interpreter of a line");
            return Err(problem.help("remove `interpreter`, or `shell`"));
        }
        return shell_line(&script.value, &args, path).ok_or_else(|| {
            Problem::new(script.place.clone(), "neither bash nor sh is in PATH to run this line")
        });
    }
    let file = paths::absolute_from_home(cwd, context.home.as_deref(), &script.value);
    let found = match std::fs::metadata(&file) {
        Ok(meta) if meta.is_file() => Some(meta),
        Ok(meta) if meta.is_dir() && is_path(&script.value) => {
            return Err(Problem::new(script.place.clone(), format!("{} is a directory", file.display()))
                .help("`script` names a file in it"));
        }
        Ok(_) => None,
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            let message = format!("cannot look at {}: {error}", file.display());
            return Err(Problem::new(script.place.clone(), message));
        }
        Err(_) => None,
    };
    let Some(meta) = found else {
        if script.value.contains(char::is_whitespace) && given.is_none_or(|given| given.value == "none") {
            return without_shell(app, script, args, cwd, path, context);
        }
        return on_path(script, given, &file, path, context, direct, args, interpreter_args);
    };

    let executable = meta.permissions().mode() & 0o111 != 0;
    let (interpreter, found_args) = match given {
        Some(given) if given.value == "none" => (None, Vec::new()),
        Some(given) => (Some(interpreter(given, cwd, path, context)?), Vec::new()),
        None => by_file(&file, executable, script, path)?,
    };
    if interpreter.is_none() {
        if !executable {
            return Err(Problem::new(script.place.clone(), format!("{} is not executable", file.display()))
                .help(format!(
                    "run `chmod +x {}`, or set `interpreter`",
                    words::quote(&file.to_string_lossy())
                )));
        }
        if let Some(extra) = app.interpreter_args.as_ref().filter(|args| !args.value.is_empty()) {
            return Err(Problem::new(extra.place.clone(), "there is no interpreter that could take these")
                .help("set `interpreter`, or use `args`"));
        }
    }
    let runtime = interpreter.as_deref().map_or(Runtime::Other, runtime_of);
    let interpreter_args = found_args.into_iter().chain(interpreter_args).collect();
    Ok(CommandSpec { script: file, interpreter, interpreter_args, args, runtime })
}

/// A script that is no file under `cwd`: a command in PATH, or an error that says where it was looked for.
#[expect(
    clippy::too_many_arguments,
    reason = "the second half of `resolve`, with all it has found out so far"
)]
fn on_path(
    script: &At<String>,
    given: Option<&At<String>>,
    file: &Path,
    path: &OsStr,
    context: &Context,
    direct: impl Fn(PathBuf, Vec<String>) -> CommandSpec,
    args: Vec<String>,
    interpreter_args: Vec<String>,
) -> Result<CommandSpec, Problem> {
    if !is_path(&script.value)
        && let Some(found) = lookup(&script.value, path)
    {
        return match given {
            // Looked up again at each spawn.
            None => Ok(direct(PathBuf::from(&script.value), args)),
            Some(given) if given.value == "none" => Ok(direct(PathBuf::from(&script.value), args)),
            Some(given) => {
                let interpreter = interpreter(given, file.parent().unwrap_or(file), path, context)?;
                let runtime = runtime_of(&interpreter);
                Ok(CommandSpec {
                    script: found,
                    interpreter: Some(interpreter),
                    interpreter_args,
                    args,
                    runtime,
                })
            }
        };
    }
    let message = if is_path(&script.value) {
        format!("script not found: {}", file.display())
    } else {
        format!(
            "script not found: {} (and there is no command {} in PATH)",
            file.display(),
            quoted(&script.value)
        )
    };
    let problem = Problem::new(script.place.clone(), message);
    // `--cwd` moves the base of the script too; who wrote a path for the shell expects the other base.
    let from_caller = paths::absolute(&context.cwd, Path::new(&script.value));
    if from_caller != file && from_caller.is_file() {
        return Err(problem.help(format!("the path starts at `cwd`; there is {}", from_caller.display())));
    }
    Err(match sibling(file) {
        Some(likely) => problem.help(format!("did you mean `{likely}`?")),
        None => problem,
    })
}

/// A file in the same directory with nearly the same name.
fn sibling(file: &Path) -> Option<String> {
    let name = file.file_name()?.to_str()?;
    let names: Vec<String> = std::fs::read_dir(file.parent()?)
        .ok()?
        // A directory of a million files is not worth a hint.
        .take(2000)
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    spelling::closest(name, names.iter().map(String::as_str)).map(str::to_owned)
}

/// A command with its arguments, as one would type it, and no shell that could make something else of it: the first word
/// is the script, and what only a shell understands is an error.
fn without_shell(
    app: &AppConfig,
    script: &At<String>,
    args: Vec<String>,
    cwd: &Path,
    path: &OsStr,
    context: &Context,
) -> Result<CommandSpec, Problem> {
    let problem = |message: String| Problem::new(script.place.clone(), message);
    if let Some(syntax) = words::shell_syntax(&script.value) {
        let (shell, quotes) = match script.place {
            Place::Text(_) => ("set `shell = true`", "what is meant literally goes in single quotes"),
            Place::Option(_) | Place::CommandLine => ("add --shell", "quote what is meant literally"),
        };
        return Err(problem(format!("this line needs a shell, because of {syntax}"))
            .help(format!("{shell} to have one run it; {quotes}")));
    }
    let mut words = words::split(&script.value).map_err(|error| problem(error.to_string()))?.into_iter();
    let Some(program) = words.next().filter(|word| !word.is_empty()) else {
        return Err(problem("there is no command in this line".to_owned()));
    };
    let line = AppConfig {
        script: Some(At::new(program, script.place.clone())),
        args: Some(At::new(words.chain(args).collect(), script.place.clone())),
        ..app.clone()
    };
    // Once: a first word with a blank in it is the name of a file.
    match &line.script {
        Some(At { value, .. }) if value.contains(char::is_whitespace) && !cwd.join(value).is_file() => {
            Err(problem(format!("script not found: {}", cwd.join(value).display())))
        }
        _ => resolve(&line, cwd, path, context),
    }
}

/// A line for bash, or sh where there is no bash; only where `shell = true` asks for it.
fn shell_line(line: &str, args: &[String], path: &OsStr) -> Option<CommandSpec> {
    let shell = ["bash", "sh"].into_iter().find(|shell| lookup(shell, path).is_some())?;
    let mut line = line.to_owned();
    for arg in args {
        line.push(' ');
        line.push_str(&words::quote(arg));
    }
    Some(CommandSpec {
        script: PathBuf::from(shell),
        interpreter: None,
        interpreter_args: Vec::new(),
        args: vec!["-c".to_owned(), line],
        runtime: Runtime::Other,
    })
}

/// A given interpreter: a path made absolute, or a command that is in PATH.
fn interpreter(given: &At<String>, cwd: &Path, path: &OsStr, context: &Context) -> Result<String, Problem> {
    let text = &given.value;
    if is_path(text) {
        let file = paths::absolute_from_home(cwd, context.home.as_deref(), text);
        let problem = |what: &str| {
            Err(Problem::new(given.place.clone(), format!("interpreter {what}: {}", file.display())))
        };
        return match std::fs::metadata(&file) {
            Ok(meta) if meta.is_file() && meta.permissions().mode() & 0o111 != 0 => {
                Ok(file.to_string_lossy().into_owned())
            }
            Ok(_) => problem("is not executable"),
            Err(_) => problem("not found"),
        };
    }
    if in_path(text, path) {
        return Ok(text.clone());
    }
    let problem = Problem::new(given.place.clone(), format!("interpreter {} is not in PATH", quoted(text)));
    Err(if text.contains(char::is_whitespace) {
        problem.help("arguments of the interpreter go into `interpreter_args`")
    } else if text.starts_with("node@") {
        problem.help("give the path of that Node's executable")
    } else {
        let known = ["none", "node", "bun", "deno", "python", "python3", "bash", "sh", "ruby", "php", "perl"];
        match spelling::closest(text, known) {
            Some(likely) if likely != text => problem.help(format!("did you mean `{likely}`?")),
            _ => problem.help("install it, give its full path, or set PATH in `env`"),
        }
    })
}

/// The interpreter of a file: its own `#!` line when it may be executed, else by its extension.
fn by_file(
    file: &Path,
    executable: bool,
    script: &At<String>,
    path: &OsStr,
) -> Result<(Option<String>, Vec<String>), Problem> {
    if executable && let Some(shebang) = shebang(file) {
        // The kernel would do the same; written out it shows which runtime it is, which decides about the IPC channel.
        if let Some((program, args)) = runtime_line(&shebang)
            && in_path_or_file(&program, path)
        {
            return Ok((Some(program), args));
        }
        return Ok((None, Vec::new()));
    }
    let extension = file.extension().and_then(OsStr::to_str).unwrap_or_default().to_ascii_lowercase();
    let Some((_, programs)) = BY_EXTENSION.iter().find(|(known, _)| *known == extension) else {
        return Ok((None, Vec::new()));
    };
    match programs.iter().find(|program| in_path(program, path)) {
        Some(program) => Ok((Some((*program).to_owned()), Vec::new())),
        None => Err(Problem::new(
            script.place.clone(),
            format!("a .{extension} file is run by {}, which is not in PATH", programs.join(" or ")),
        )
        .help("install it, or set `interpreter` to its full path")),
    }
}

/// The words of a `#!` line; `None` for a file without one.
fn shebang(file: &Path) -> Option<Vec<String>> {
    let mut head = Vec::new();
    // A FIFO would wait for its writer.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(file).ok()?;
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    file.take(SHEBANG_MAX).read_to_end(&mut head).ok()?;
    let line = head.strip_prefix(b"#!")?.split(|&b| b == b'\n').next()?;
    Some(String::from_utf8_lossy(line).split_whitespace().map(str::to_owned).collect())
}

/// `/usr/bin/env node`, `/usr/bin/env -S node --flag`, `/opt/node/bin/node --flag` → program and arguments, when the
/// program is a runtime whose protocol we speak.
fn runtime_line(shebang: &[String]) -> Option<(String, Vec<String>)> {
    let (program, rest) = shebang.split_first()?;
    let (program, rest) = if Path::new(program).file_name() == Some(OsStr::new("env")) {
        let rest = if rest.first().is_some_and(|word| word == "-S") { &rest[1..] } else { rest };
        rest.split_first()?
    } else {
        (program, rest)
    };
    (runtime_of(program) != Runtime::Other).then(|| (program.clone(), rest.to_vec()))
}

/// The runtime an interpreter is, by its file name: `node`, `nodejs`, `node20`, `bun`, `deno`.
fn runtime_of(interpreter: &str) -> Runtime {
    let name = Path::new(interpreter).file_name().and_then(OsStr::to_str).unwrap_or_default();
    match name.trim_end_matches(|c: char| c.is_ascii_digit() || c == '.' || c == '-') {
        "node" | "nodejs" => Runtime::Node,
        "bun" => Runtime::Bun,
        "deno" => Runtime::Deno,
        _ => Runtime::Other,
    }
}

/// The package runner that an app is started through, also by a shell line.
pub(super) fn package_runner(command: &CommandSpec) -> Option<&str> {
    let words = || command.args.iter().flat_map(|arg| arg.split_whitespace());
    let program = command.script.file_name().and_then(OsStr::to_str)?;
    let program = match (program, command.args.first().map(String::as_str)) {
        ("bash" | "sh", Some("-c")) => words().skip(1).find(|word| *word != "exec")?,
        _ => program,
    };
    PACKAGE_RUNNERS.iter().copied().find(|runner| *runner == program)
}

/// Whether a program is a Python, which buffers its output unless told otherwise.
pub(super) fn is_python(command: &CommandSpec) -> bool {
    let by_interpreter = command.interpreter.as_deref().is_some_and(|interpreter| {
        Path::new(interpreter).file_name().is_some_and(|name| name.as_bytes().starts_with(b"python"))
    });
    by_interpreter || (command.interpreter.is_none() && command.script.extension() == Some(OsStr::new("py")))
}

fn is_path(text: &str) -> bool {
    text.contains('/') || text == "~"
}

fn in_path_or_file(program: &str, path: &OsStr) -> bool {
    if is_path(program) { Path::new(program).is_file() } else { in_path(program, path) }
}

/// Whether a spawn will find it. `python` falls back to `python3` there.
fn in_path(program: &str, path: &OsStr) -> bool {
    lookup(program, path).is_some() || (program == "python" && lookup("python3", path).is_some())
}

/// The first executable file of this name in a PATH, as execvp(3) finds it.
pub(super) fn lookup(program: &str, path: &OsStr) -> Option<PathBuf> {
    std::env::split_paths(path).filter(|dir| dir.is_absolute()).map(|dir| dir.join(program)).find(|file| {
        std::fs::metadata(file).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    })
}

/// The names in `{fd:NAME}` of the arguments that are no listener's.
pub(super) fn check_placeholders(command: &CommandSpec, place: &Place, listeners: &[&str]) -> Vec<Problem> {
    let mut problems = Vec::new();
    for arg in &command.args {
        for (at, _) in arg.match_indices("{fd:") {
            // `${fd:…}` is the shell's.
            if arg[..at].ends_with('$') {
                continue;
            }
            let Some((name, _)) = arg[at + 4..].split_once('}') else { continue };
            if listeners.contains(&name) {
                continue;
            }
            let problem = Problem::new(place.clone(), format!("{{fd:{name}}} names no listener of this app"));
            problems.push(if listeners.is_empty() {
                problem.help("the app has no `listen`")
            } else {
                problem.help(format!("its listeners: {}", listeners.join(", ")))
            });
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_scripts_suggest() {
        for (script, name) in [
            ("server.js", "server"),
            ("./dist/api.v2.mjs", "api.v2"),
            ("/srv/app/bin/worker", "worker"),
            (".hidden", ".hidden"),
            ("npm start", "npm start"),
            ("node server.js && echo 'x'", "node"),
            ("./bin/run.sh --fast", "run"),
        ] {
            assert_eq!(default_name(script), name, "{script}");
        }
    }

    #[test]
    fn runtimes_by_file_name() {
        for (interpreter, runtime) in [
            ("node", Runtime::Node),
            ("/opt/node-v20.1/bin/node", Runtime::Node),
            ("nodejs", Runtime::Node),
            ("node20", Runtime::Node),
            ("bun", Runtime::Bun),
            ("deno", Runtime::Deno),
            ("python3", Runtime::Other),
            ("nodemon", Runtime::Other),
            ("ts-node", Runtime::Other),
        ] {
            assert_eq!(runtime_of(interpreter), runtime, "{interpreter}");
        }
    }

    #[test]
    fn shebang_lines_of_known_runtimes() {
        let line = |text: &str| runtime_line(&text.split_whitespace().map(str::to_owned).collect::<Vec<_>>());
        assert_eq!(line("/usr/bin/env node"), Some(("node".to_owned(), vec![])));
        assert_eq!(
            line("/usr/bin/env -S node --enable-source-maps"),
            Some(("node".to_owned(), vec!["--enable-source-maps".to_owned()]))
        );
        assert_eq!(line("/opt/bun/bin/bun"), Some(("/opt/bun/bin/bun".to_owned(), vec![])));
        assert_eq!(line("/bin/sh -e"), None);
        assert_eq!(line("/usr/bin/env"), None);
    }
}
