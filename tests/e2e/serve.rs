//! `pm serve`, and the first of the two commands of the README.

use super::support::home::Running;
use super::support::load::{self, Target};
use super::support::{Home, SOON, free_port, process, wait_until};

#[test]
fn serve_serves_a_directory_and_nothing_outside_it() {
    let home = Home::new();
    home.write("site/index.html", "<h1>hello</h1>");
    home.write("site/style.css", "body {}");
    home.write("site/deep/page.html", "deep");
    home.write("secret.txt", "secret");
    let port = free_port();
    let serve = Running::start(home.command(&["serve", "site", &port.to_string()]), b"");
    let get = |path: &str| load::get(port, path).unwrap();
    let reply = wait_until("it answers", SOON, || load::get(port, "/"));
    assert_eq!(reply.body, "<h1>hello</h1>");
    assert_eq!(get("/style.css").header("content-type"), "text/css");
    assert_eq!(get("/deep/page.html").body, "deep");
    assert_eq!(get("/nope").status, 404);
    for path in ["/../secret.txt", "/%2e%2e/secret.txt", "/..%2fsecret.txt", "//etc/passwd"] {
        let reply = load::get(port, path).unwrap();
        assert!(reply.status >= 400 && !reply.body.contains("secret"), "{path}: {reply:?}");
    }
    process::signal(serve.pid(), nix::sys::signal::Signal::SIGINT);
    let run = serve.end(SOON);
    assert_eq!(run.code, 0, "{run:?}");
}

#[test]
fn the_example_starts_with_one_command_and_reloads_without_losing_a_request() {
    let home = Home::loaded();
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let example = std::fs::read_to_string(root.join("ecosystem.example.toml")).unwrap();
    // The port of the example may be taken on this machine.
    let (port, original) = (free_port(), example_port(&example));
    let text = example.replace(&format!(":{original}"), &format!(":{port}"));
    home.write("ecosystem.example.toml", &text);
    let copied = std::process::Command::new("cp")
        .args(["-r", root.join("examples").to_str().unwrap(), &home.work_file("examples")])
        .status()
        .unwrap();
    assert!(copied.success());
    let run = home.ok(&["start", "ecosystem.example.toml"]);
    run.says("online").says(&port.to_string());
    let rows = home.rows();
    assert_eq!(rows.len(), 2, "two instances of pm serve: {rows:#?}");
    assert!(rows.iter().all(|row| row.status == "online" && row.env("exec_mode") == "cluster_mode"));
    let page = load::get(port, "/").unwrap();
    assert_eq!(page.status, 200, "{page:?}");
    let before: Vec<i32> = rows.iter().map(|row| row.pid).collect();
    // The static server's answers are not those of the fixtures, so this client counts for itself.
    let target = Target::from(port);
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let clients: Vec<_> = (0..8)
        .map(|_| {
            let (target, stop, body) = (target.clone(), std::sync::Arc::clone(&stop), page.body.clone());
            std::thread::spawn(move || {
                let mut served = 0;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    assert_eq!(load::get(target.clone(), "/").unwrap().body, body);
                    served += 1;
                }
                served
            })
        })
        .collect();
    for _ in 0..3 {
        home.ok(&["reload", "all"]);
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let served: u64 = clients.into_iter().map(|client| client.join().expect("a request failed")).sum();
    assert!(served > 100, "{served}");
    assert!(before.iter().all(|pid| !process::alive(*pid)));
}

/// The port of the first address in the file.
fn example_port(text: &str) -> String {
    let code = text.lines().filter(|line| !line.trim_start().starts_with('#'));
    code.filter(|line| line.contains("listen"))
        .flat_map(|line| line.split(':').skip(1))
        .map(|rest| rest.chars().take_while(char::is_ascii_digit).collect::<String>())
        .find(|port| !port.is_empty())
        .unwrap_or_else(|| panic!("no listen address in {text}"))
}

#[test]
fn the_readme_prints_the_two_commands() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = std::fs::read_to_string(root.join("README.md")).unwrap();
    for command in ["cargo run --release -- start ecosystem.example.toml", "tests/run.sh"] {
        assert!(readme.lines().any(|line| line.trim() == command), "{command:?} is not a line of the README");
    }
}
