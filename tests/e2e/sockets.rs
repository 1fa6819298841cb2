//! Pain 10: what listens goes on listening, whatever happens to those who accept, and nobody is "online" on a port that
//! is somebody else's.

use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::process::Command;

use super::support::genuine::{self, Helper};
use super::support::home;
use super::support::load::{self, Connections, Load, Manner, Target};
use super::support::node::find_in_path;
use super::support::{Home, PATIENT, SOON, fixture, free_port, millis, process, secs, wait_until};

const TIMES: usize = 20;

/// The inode of the socket that listens on a loopback port.
fn listener_of(port: u16) -> u64 {
    let wanted = format!(":{port:04X}");
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let found: Vec<u64> = table
        .lines()
        .map(|line| line.split_ascii_whitespace().collect::<Vec<_>>())
        // Local address, and the state: 0A is LISTEN (proc_net_tcp.txt in the kernel's documentation).
        .filter(|fields| {
            fields.get(1).is_some_and(|at| at.ends_with(&wanted)) && fields.get(3) == Some(&"0A")
        })
        .filter_map(|fields| fields.get(9)?.parse().ok())
        .collect();
    assert_eq!(found.len(), 1, "listeners on {port}: {found:?}");
    found[0]
}

#[test]
fn pain_10_inherited_port_and_unix_socket_survive_20_reloads_and_20_restarts_and_refuse_nobody() {
    let home = Home::new();
    let port = free_port();
    let source = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/languages/two-sockets.c");
    let mut compiler = Command::new(find_in_path("cc"));
    compiler.args(["-O1", "-Wall", "-o"]).arg(home.work().join("server")).arg(source);
    assert_eq!(home::run(compiler, secs(60)).code, 0);
    home.start(&format!(
        "[[apps]]\nname = 'web'\nscript = './server'\nlisten = ['127.0.0.1:{port}', 'unix:web.sock']\ninstances = 2\n\
         wait_ready = true\n"
    ));
    let path = home.work().join("web.sock");
    let before = (listener_of(port), std::fs::metadata(&path).unwrap().ino());
    let manner = Manner { pause: millis(5), ..Manner::strict(Connections::OnePerRequest) };
    let over_tcp = Load::with(port, 3, manner);
    let over_unix = Load::with(Target::Unix(path.clone()), 3, manner);
    let mut old = home.pids("web");
    for round in 0..2 * TIMES {
        // A restart ends both instances at once: clients wait in the queue of the socket, which nobody closes.
        let verb = if round % 2 == 0 { "reload" } else { "restart" };
        home.ok(&[verb, "web"]);
        let new = home.pids("web");
        assert!(new.iter().all(|pid| !old.contains(pid)), "{verb} {round}");
        old = new;
        load::get(port, "/").unwrap_or_else(|failure| panic!("port after {verb} {round}: {failure:?}"));
        load::get(Target::Unix(path.clone()), "/")
            .unwrap_or_else(|failure| panic!("unix socket after {verb} {round}: {failure:?}"));
    }
    for load in [over_tcp, over_unix] {
        wait_until("a thousand requests are answered", PATIENT, || {
            if load.done() >= 1000 { Ok(()) } else { Err(load.done()) }
        });
        load.stop().lost_nothing(1000);
    }
    assert_eq!(
        (listener_of(port), std::fs::metadata(&path).unwrap().ino()),
        before,
        "the same sockets all the time"
    );
    home.ok(&["stop", "web"]);
    load::get(port, "/").unwrap_err();
    load::get(Target::Unix(path), "/").unwrap_err();
}

#[test]
fn pain_10_port_and_unix_socket_of_a_node_cluster_survive_20_reloads_and_20_restarts() {
    let home = Home::new();
    let port = free_port();
    home.write(
        "app.js",
        "const http = require('http');\n\
         for (const at of [process.env.PORT, 'web.sock'])\n\
         http.createServer((q, r) => r.end(`ok ${process.pid} end\\n`)).listen(at);\n",
    );
    home.start(&format!(
        "[[apps]]\nname = 'web'\nscript = 'app.js'\ninstances = 1\nexec_mode = 'cluster'\nenv = {{ PORT = '{port}' }}\n"
    ));
    let path = home.work().join("web.sock");
    for round in 0..2 * TIMES {
        let verb = if round % 2 == 0 { "reload" } else { "restart" };
        home.ok(&[verb, "web"]);
        let served = format!("ok {} end\n", home.pid("web"));
        for target in [Target::from(port), Target::Unix(path.clone())] {
            // After a restart the worker is online with its first socket, and a moment later has the second.
            wait_until(&format!("{target:?} after {verb} {round}"), SOON, || {
                match load::get(target.clone(), "/") {
                    Ok(reply) if reply.body == served => Ok(()),
                    Ok(reply) => panic!("{target:?} after {verb} {round}: {reply:?}, not {served:?}"),
                    Err(failure) if verb == "restart" => Err(failure),
                    Err(failure) => panic!("{target:?} after {verb} {round}: {failure:?}"),
                }
            });
        }
    }
}

/// Holds a unix socket in a process of its own.
fn path_holder(home: &Home, path: &str) -> Helper {
    let mut command = Command::new(super::support::node::python());
    home.environment(&mut command);
    let program = "import socket, sys, threading\n\
                   listener = socket.socket(socket.AF_UNIX)\n\
                   listener.bind(sys.argv[1])\n\
                   listener.listen()\n\
                   threading.Event().wait()\n";
    command.args(["-c", program, path]);
    let helper = Helper::start(command);
    wait_until("the foreign process listens", SOON, || std::os::unix::net::UnixStream::connect(path));
    helper
}

#[test]
fn pain_10_a_foreign_process_on_the_port_or_path_makes_start_fail_naming_that_pid() {
    let home = Home::new();
    let port = free_port();
    let path = home.work_file("web.sock");
    let on_port = genuine::port_holder(&home, port);
    let on_path = path_holder(&home, &path);
    let by_port = on_port.pid().to_string();
    let by_path = on_path.pid().to_string();
    let app = |keys: &str| format!("[[apps]]\nname = 'web'\nmax_restarts = 2\n{keys}\n");
    let inherits = "script = 'sleep'\nargs = ['1000']\nmin_uptime = '100ms'";
    let cluster = format!("script = '{}'\nexec_mode = 'cluster'\ninstances = 2", fixture("web-plain.js"));
    for (config, place, holder) in [
        (app(&format!("{inherits}\nlisten = ['127.0.0.1:{port}']")), port.to_string(), &by_port),
        (app(&format!("{inherits}\nlisten = ['0.0.0.0:{port}']")), port.to_string(), &by_port),
        (app(&format!("{inherits}\nlisten = [{port}]")), port.to_string(), &by_port),
        (app(&format!("{inherits}\nlisten = ['unix:{path}']")), path.clone(), &by_path),
        (app(&format!("{cluster}\nenv = {{ PORT = '{port}' }}")), port.to_string(), &by_port),
    ] {
        home.ecosystem(&config);
        let run = home.exits(1, &["start", "ecosystem.toml"]);
        run.says(&place).says(holder);
        assert!(home.statuses("web").iter().all(|status| status != "online"), "{:?}", home.rows());
        home.ok(&["delete", "web"]);
    }
    assert!(process::alive(on_port.pid()) && process::alive(on_path.pid()), "the others are left alone");
    drop(on_port);
    home.start(&app(&format!("{inherits}\nlisten = ['127.0.0.1:{port}']")));
}

#[test]
fn pain_10_a_release_that_finds_its_port_taken_is_never_online_and_the_reload_says_so() {
    let home = Home::new();
    let port = free_port();
    home.write(
        "app.py",
        "import os, socket, sys, threading\n\
         listener = socket.socket()\n\
         listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n\
         listener.bind(('127.0.0.1', int(os.environ['PORT'])))\n\
         listener.listen()\n\
         print('listens', flush=True)\n\
         threading.Event().wait()\n",
    );
    let config = |overlap: bool| {
        format!(
            "[[apps]]\nname = 'web'\nscript = 'app.py'\noverlap = {overlap}\nmin_uptime = '5s'\nmax_restarts = 2\n\
             env = {{ PORT = '{port}' }}\n"
        )
    };
    home.start(&config(true));
    home.log_with("web-out.log", "listens");
    let old = home.pid("web");
    // Beside the old one the new one cannot bind: it never serves, and the old one does not go.
    let run = home.exits(1, &["reload", "web"]);
    run.says("Address already in use");
    assert_eq!((home.pid("web"), home.row("web").status.as_str()), (old, "online"));
    std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
}

#[test]
fn an_app_that_binds_what_it_should_inherit_is_told_what_to_do() {
    let home = Home::new();
    let port = free_port();
    home.write("app.py", "import os, socket\nsocket.socket().bind(('127.0.0.1', int(os.environ['PORT'])))\n");
    home.ecosystem(&format!(
        "[[apps]]\nname = 'web'\nscript = 'app.py'\nlisten = ['127.0.0.1:{port}']\nwait_ready = true\n\
         env = {{ PORT = '{port}' }}\n"
    ));
    let run = home.exits(1, &["start", "ecosystem.toml"]);
    run.says(&format!("it seems to bind 127.0.0.1:{port} itself")).says("descriptor 3").says("LISTEN_FDS");
}
