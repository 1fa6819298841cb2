//! Any language: the examples of `docs/zero-downtime.md` as they stand there, reloaded under load.
//!
//! Each example is started from the files of the page (only the port is another one), compiled where it has to be, and
//! reloaded while two kinds of clients come in: with a new connection for each request, and with connections that
//! are kept. Every client pauses at random between its requests, so that connections are idle, about to send, and in
//! the middle of an answer when their server is told to end.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::support::docs::{self, Files};
use super::support::home::{self, Run};
use super::support::load::{self, Connections, Failure, Load, Manner, Reply};
use super::support::node::{cache, find_in_path, packages};
use super::support::{Home, PATIENT, free_port, millis, process, secs, wait_until};

const PAGE: &str = "zero-downtime.md";

/// The port of every example.
const DOCUMENTED_PORT: &str = "3000";

/// Of each kind.
const CLIENTS: usize = 5;

/// A compiler on a loaded machine.
const COMPILED: Duration = Duration::from_secs(120);

/// A running example.
#[derive(Debug)]
struct Example {
    home: Home,
    port: u16,
    path: String,
}

impl Example {
    #[track_caller]
    fn start(heading: &str) -> Self {
        Self::start_changed(heading, |_| {})
    }

    /// Starts the example of a heading after a change to its files.
    #[track_caller]
    fn start_changed(heading: &str, change: impl FnOnce(&mut Files)) -> Self {
        let mut files =
            docs::examples(PAGE).remove(heading).unwrap_or_else(|| panic!("no example {heading:?}"));
        let home = Home::new();
        let port = free_port();
        let mut said = 0;
        for text in files.values_mut() {
            said += text.matches(DOCUMENTED_PORT).count();
            *text = text.replace(DOCUMENTED_PORT, &port.to_string());
        }
        assert!(said > 0, "{heading:?} names no port {DOCUMENTED_PORT}");
        change(&mut files);
        for (name, text) in &files {
            home.write(name, text);
        }
        compile(&home, &files);
        std::os::unix::fs::symlink(packages(), home.work().join("node_modules")).unwrap();
        let example = Self { path: search_path(), home, port };
        let run = example.pm(&["start", "ecosystem.toml"]);
        assert_eq!(run.code, 0, "{heading}: {run:#?}");
        assert!(example.home.statuses("web").iter().all(|status| status == "online"), "{run:#?}");
        wait_until("the example answers", PATIENT, || load::get(port, "/"));
        example
    }

    /// `pm` in a shell that finds the runtimes.
    #[track_caller]
    fn pm(&self, args: &[&str]) -> Run {
        let mut command = self.home.command(args);
        command.env("PATH", &self.path);
        home::run(command, secs(60))
    }

    fn clients(&self, count: usize, kind: Connections) -> Load {
        Load::with(self.port, count, manner(kind, millis(5)))
    }

    /// Who answers: the instances themselves or their workers.
    fn answers(&self, requests: usize) -> BTreeSet<i32> {
        (0..requests).map(|_| greeter(&load::get(self.port, "/").unwrap()).expect("a pid")).collect()
    }

    /// Everybody below the present instances.
    fn family(&self) -> BTreeSet<i32> {
        self.home.pids("web").into_iter().flat_map(process::tree).collect()
    }

    /// Two reloads, each of which replaces everything, in the middle of at least a thousand requests of each kind.
    #[track_caller]
    fn reloads_lose_nothing(&self) {
        let fresh = self.clients(CLIENTS, Connections::OnePerRequest);
        let kept = self.clients(CLIENTS, Connections::KeepAlive);
        for _ in 0..2 {
            let old = self.family();
            let run = self.pm(&["reload", "web"]);
            assert_eq!(run.code, 0, "{run:#?}");
            run.says("old one").does_not_say("killed after").does_not_say("downtime");
            assert!(self.home.statuses("web").iter().all(|status| status == "online"), "{run:#?}");
            let new = self.family();
            assert!(old.is_disjoint(&new), "{new:?} after {old:?}");
            let answered = self.answers(20);
            assert!(answered.is_subset(&new), "{answered:?} answer, not one of {new:?}");
            assert!(old.iter().all(|pid| !process::alive(*pid)), "{}", self.home.process_list());
        }
        for load in [fresh, kept] {
            wait_until("a thousand requests are answered", PATIENT, || {
                let done = load.done();
                if done >= 1000 { Ok(()) } else { Err(done) }
            });
            load.stop().lost_nothing(1000);
        }
    }

    /// The control: the same clients do see it when instances end without draining.
    #[track_caller]
    fn kills_lose_requests(&self) {
        // Without a pause: a client is nearly always in the middle of a request.
        let fresh = Load::with(self.port, CLIENTS, manner(Connections::OnePerRequest, Duration::ZERO));
        let kept = Load::with(self.port, CLIENTS, manner(Connections::KeepAlive, Duration::ZERO));
        // On a busy machine a kill may find every client between two requests all the same.
        for _ in 0..20 {
            let killed = self.family();
            killed.iter().rev().for_each(|pid| process::end(*pid));
            wait_until("all slots run again", PATIENT, || {
                let rows = self.home.rows_of("web");
                let again = rows.iter().all(|row| row.status == "online" && !killed.contains(&row.pid));
                if again { Ok(()) } else { Err(rows) }
            });
            fresh.more(20);
            kept.more(20);
            if fresh.failed() + kept.failed() > 0 {
                return;
            }
        }
        panic!("a client that sees no failure proves nothing: {:?} {:?}", fresh.stop(), kept.stop());
    }
}

fn manner(kind: Connections, pause: Duration) -> Manner {
    Manner { kind, pause, looks_first: true, check }
}

/// The answer of every example, and who gave it.
fn check(mut reply: Reply) -> Result<Reply, Failure> {
    match greeter(&reply) {
        Some(pid) if reply.status == 200 => {
            reply.headers.insert("x-pid".to_owned(), pid.to_string());
            Ok(reply)
        }
        _ => Err(Failure::Wrong(format!("{} {}", reply.status, reply.body))),
    }
}

fn greeter(reply: &Reply) -> Option<i32> {
    reply.body.strip_prefix("hello from ")?.strip_suffix('\n')?.parse().ok()
}

/// The runtimes that `tests/languages.sh` has fetched, before everything else.
fn search_path() -> String {
    let languages = cache().join("languages");
    let venv = languages.join("venv/bin");
    assert!(venv.join("uvicorn").is_file(), "no {}; tests/run.sh sets it up", venv.display());
    format!("{}:{}:{}", venv.display(), languages.join("bin").display(), std::env::var("PATH").unwrap())
}

// Compiling. ------------------------------------------------------------------------------------------------------

/// Does what the comment in the example's config says, if it has one.
fn compile(home: &Home, files: &Files) {
    let languages = cache().join("languages");
    if files.contains_key("server.c") {
        build(
            Command::new(find_in_path("cc"))
                .current_dir(home.work())
                .args(["-O2", "-Wall", "-Wextra", "-Werror", "-o", "server", "server.c"]),
        );
    } else if files.contains_key("main.go") {
        build(
            Command::new(find_in_path("go"))
                .current_dir(home.work())
                .args(["build", "-o", "server", "main.go"])
                .env("GO111MODULE", "off")
                .env("GOCACHE", languages.join("go/cache")),
        );
    } else if let Some(main) = files.get("src/main.rs") {
        // In one place, where its dependencies are compiled already, and in the quicker of the two profiles.
        let package = languages.join("axum");
        write_if_other(&package.join("Cargo.toml"), &files["Cargo.toml"]);
        write_if_other(&package.join("src/main.rs"), main);
        let target = package.join("target");
        build(
            Command::new(env!("CARGO"))
                .current_dir(&package)
                .args(["build", "--quiet", "--locked", "--offline"])
                .env("CARGO_TARGET_DIR", &target),
        );
        let place = home.work().join("target/release");
        std::fs::create_dir_all(&place).unwrap();
        std::fs::copy(target.join("debug/server"), place.join("server")).unwrap();
    }
}

/// Cargo goes by the time of a file.
fn write_if_other(path: &Path, text: &str) {
    if std::fs::read_to_string(path).ok().as_deref() != Some(text) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
}

#[track_caller]
fn build(command: &mut Command) {
    let said = format!("{command:?}");
    let command = std::mem::replace(command, Command::new("true"));
    let run = home::run(command, COMPILED);
    assert_eq!(run.code, 0, "{said} (tests/run.sh sets up what it needs): {run:#?}");
}

// The same test for everybody. ------------------------------------------------------------------------------------

macro_rules! lossless {
    ($($(#[$only:meta])* $name:ident: $heading:literal $(, $control:ident)?;)*) => {
        $(
            $(#[$only])*
            #[test]
            fn $name() {
                let example = Example::start($heading);
                example.reloads_lose_nothing();
                $(example.$control();)?
            }
        )*
        /// The headings of the tests above.
        const LOSSLESS: &[&str] = &[$($heading),*];
    };
}

// Node has its controls in `reload.rs`; one here shows that these clients see it as well.
lossless! {
    pain_06_reloads_lose_nothing_node_cluster: "Node", kills_lose_requests;
    pain_06_reloads_lose_nothing_express: "Express";
    pain_06_reloads_lose_nothing_fastify: "Fastify";
    pain_06_reloads_lose_nothing_tsx: "TypeScript with tsx";
    pain_06_reloads_lose_nothing_node_inherited: "Node on an inherited socket";
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    pain_06_reloads_lose_nothing_bun: "Bun", kills_lose_requests;
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    pain_06_reloads_lose_nothing_deno: "Deno", kills_lose_requests;
    pain_06_reloads_lose_nothing_uvicorn: "uvicorn", kills_lose_requests;
    pain_06_reloads_lose_nothing_gunicorn: "gunicorn", kills_lose_requests;
    pain_06_reloads_lose_nothing_go: "Go", kills_lose_requests;
    pain_06_reloads_lose_nothing_rust_axum: "Rust", kills_lose_requests;
    pain_06_reloads_lose_nothing_c: "C", kills_lose_requests;
    pain_06_reloads_lose_nothing_puma: "Ruby", kills_lose_requests;
}

/// Examples that the page says are not lossless; each has a test of its own below.
const OTHERS: &[&str] = &["uvicorn's own command line"];

#[test]
fn every_example_of_the_page_is_run_by_a_test() {
    let documented: BTreeSet<String> = docs::examples(PAGE).into_keys().collect();
    let tested: BTreeSet<String> =
        LOSSLESS.iter().chain(OTHERS).map(|heading| (*heading).to_owned()).collect();
    assert_eq!(documented, tested);
}

// What the page says besides. -------------------------------------------------------------------------------------

#[test]
fn uvicorn_by_its_own_command_line_reloads_and_resets_hardly_any_new_connection() {
    let example = Example::start("uvicorn's own command line");
    let load = example.clients(CLIENTS, Connections::OnePerRequest);
    for _ in 0..2 {
        let old = example.family();
        assert_eq!(example.pm(&["reload", "web"]).code, 0);
        assert!(example.family().is_disjoint(&old));
        load.more(100);
    }
    wait_until("a thousand requests are answered", PATIENT, || {
        if load.done() >= 1000 { Ok(()) } else { Err(load.done()) }
    });
    let tally = load.stop();
    // It closes what it has just accepted; what waits in the queue, and what is in flight, it does not lose.
    assert!(tally.failures.keys().all(|failure| *failure == Failure::Reset), "{tally:?}");
    assert!(tally.failed() * 100 <= tally.ok, "{tally:?}");
}

#[test]
fn every_signal_of_the_term_family_drains() {
    // The example says by its exit code which signal it got.
    let example = Example::start_changed("C", |files| {
        let server = files.get_mut("server.c").unwrap();
        for (from, to) in [
            ("(void)signal; draining = 1;", "draining = signal;"),
            ("\treturn 0;\n}", "\treturn draining;\n}"),
        ] {
            let at = server.rfind(from).unwrap_or_else(|| panic!("no {from:?} in {server}"));
            server.replace_range(at..at + from.len(), to);
        }
    });
    let config = example.home.read("ecosystem.toml");
    let fresh = example.clients(CLIENTS, Connections::OnePerRequest);
    let kept = example.clients(CLIENTS, Connections::KeepAlive);
    for (signal, number) in
        [("SIGINT", 2), ("SIGTERM", 15), ("SIGHUP", 1), ("SIGUSR1", 10), ("USR2", 12), ("3", 3)]
    {
        let key = format!("kill_signal = \"{signal}\"");
        example.home.write("ecosystem.toml", &config.replace("kill_signal = \"SIGQUIT\"", &key));
        // The first reload brings the key, the second ends instances that have it.
        assert_eq!(example.pm(&["reload", "ecosystem.toml"]).code, 0);
        let run = example.pm(&["reload", "web"]);
        assert_eq!(run.code, 0, "{run:?}");
        assert_eq!(run.out.matches(&format!("(exit code {number})")).count(), 2, "{signal}: {run:#?}");
        run.does_not_say("killed after");
    }
    for load in [fresh, kept] {
        wait_until("a thousand requests are answered", PATIENT, || {
            if load.done() >= 1000 { Ok(()) } else { Err(load.done()) }
        });
        load.stop().lost_nothing(1000);
    }
}

#[test]
fn a_release_that_does_not_load_changes_nothing_on_an_inherited_socket() {
    let example = Example::start("gunicorn");
    let old = example.family();
    let load = example.clients(CLIENTS, Connections::KeepAlive);
    let good = example.home.read("app.py");
    example.home.write("app.py", "def app(environ, start_response:\n");
    let run = example.pm(&["reload", "web"]);
    assert_eq!(run.code, 1, "{run:#?}");
    run.says("SyntaxError");
    assert_eq!(example.family(), old);
    load.more(200);
    example.home.write("app.py", &good);
    let run = example.pm(&["reload", "web"]);
    assert_eq!(run.code, 0, "{run:#?}");
    load.more(200);
    load.stop().lost_nothing(400);
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[test]
fn bun_in_cluster_mode_serves_and_reloads_and_the_command_says_what_that_may_cost() {
    let home = Home::new();
    let port = free_port();
    home.write(
        "app.js",
        "const http = require('node:http');\n\
         http.createServer((q, r) => r.end(`hello from ${process.pid}\\n`)).listen(process.env.PORT, '127.0.0.1');\n\
         process.on('SIGINT', () => process.exit(0));\n",
    );
    home.ecosystem(&format!(
        "[[apps]]\nname = 'web'\nscript = 'app.js'\ninterpreter = 'bun'\ninstances = 2\nenv = {{ PORT = '{port}' }}\n"
    ));
    let example = Example { home, port, path: search_path() };
    let run = example.pm(&["start", "ecosystem.toml"]);
    assert_eq!(run.code, 0, "{run:#?}");
    run.says("bun's cluster workers bind the port themselves").says("zero-downtime.md");
    for _ in 0..2 {
        let workers: BTreeSet<i32> = example.home.pids("web").into_iter().collect();
        assert_eq!(example.answers(60), workers, "both answer on one port");
        let run = example.pm(&["reload", "web"]);
        assert_eq!(run.code, 0, "{run:#?}");
        assert!(example.home.pids("web").iter().all(|pid| !workers.contains(pid)));
    }
}
