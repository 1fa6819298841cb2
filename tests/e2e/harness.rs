//! Controls of the harness itself: a load client that saw no failure where there was one would prove nothing.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::process::Command;

use super::support::census::Census;
use super::support::genuine::Helper;
use super::support::load::{self, Connections, Failure, Load};
use super::support::node::Node;
use super::support::{Home, PATIENT, SOON, fixture, free_port, process, wait_until};

fn plain_server(home: &Home, port: u16) -> Helper {
    let mut command = Command::new(&Node::installed().binary);
    home.environment(&mut command);
    command.arg(fixture("web-plain.js")).env("PORT", port.to_string()).env("VERSION", "v1");
    let helper = Helper::start(command);
    wait_until("the server answers", PATIENT, || load::get(port, "/"));
    helper
}

#[test]
fn load_on_a_steady_server_has_no_failures_in_both_modes() {
    let home = Home::new();
    let port = free_port();
    let server = plain_server(&home, port);
    for kind in [Connections::OnePerRequest, Connections::KeepAlive] {
        let load = Load::start(port, 8, kind);
        load.more(300);
        let tally = load.stop();
        tally.lost_nothing(300);
        assert_eq!(tally.versions.keys().collect::<Vec<_>>(), ["v1"]);
        assert_eq!(tally.pids.keys().collect::<Vec<_>>(), [&server.pid().to_string()]);
    }
}

#[test]
fn load_sees_a_server_that_is_killed() {
    let home = Home::new();
    let port = free_port();
    let server = plain_server(&home, port);
    let load = Load::start(port, 8, Connections::OnePerRequest);
    process::end(server.pid());
    load.more(50);
    let tally = load.stop();
    assert!(tally.failures.contains_key(&Failure::Refused), "{tally:?}");
    assert!(tally.failures.contains_key(&Failure::Reset), "{tally:?}");
}

#[test]
fn load_tells_truncated_and_wrong_answers_from_right_ones() {
    for (answer, expected) in [
        ("", Failure::Reset),
        ("HTTP/1.1 200 OK\r\nContent-Le", Failure::Truncated),
        ("HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\nok", Failure::Truncated),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nok", Failure::Truncated),
        ("HTTP/1.1 500 No\r\nContent-Length: 3\r\n\r\nno\n", Failure::Wrong("500 no\n".to_owned())),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = std::thread::spawn(move || {
            // Ends when the client has gone and no further connection comes within its lifetime.
            for _ in 0..3 {
                let Ok((mut stream, _)) = listener.accept() else { return };
                let mut request = [0; 1000];
                let _ = stream.read(&mut request);
                let _ = stream.write_all(answer.as_bytes());
            }
        });
        let load = Load::start(port, 1, Connections::OnePerRequest);
        wait_until("three answers", SOON, || if load.done() >= 3 { Ok(()) } else { Err(load.done()) });
        let tally = load.stop();
        server.join().unwrap();
        assert!(tally.failures.contains_key(&expected), "{answer:?} gave {tally:?}");
        assert_eq!(tally.ok, 0, "{answer:?}");
    }
}

#[test]
fn processes_of_a_home_are_found_by_their_mark() {
    let home = Home::new();
    let mut command = Command::new("sh");
    home.environment(&mut command);
    command.args(["-c", "sleep 100 & wait"]);
    let helper = Helper::start(command);
    wait_until("shell and sleep are there", SOON, || {
        let found = home.processes();
        if found.len() == 2 && found.contains(&helper.pid()) { Ok(()) } else { Err(found) }
    });
    drop(helper);
    wait_until("nothing is left", SOON, || {
        let found = home.processes();
        if found.is_empty() { Ok(()) } else { Err(found) }
    });
}

#[test]
fn the_census_finds_processes_without_a_row_rows_without_a_process_and_open_ports() {
    let home = Home::new();
    let port = free_port();
    home.start(&format!(
        "[[apps]]\nname = 'job'\nscript = 'sleep'\nargs = ['1000']\nexec_mode = 'cluster'\ninstances = 1\n\
         listen = ['127.0.0.1:{port}']\nmin_uptime = '50ms'\n"
    ));
    let census = Census::balances(&home);
    assert_eq!(census.ports, [port].into());
    let mut rows = home.rows();
    // A process that says it is an instance of an earlier generation, as a leak would.
    let mut ghost = Command::new("sleep");
    home.environment(&mut ghost);
    ghost.arg("1000").env("PM_INSTANCE", "job:0:7:beef");
    let ghost = Helper::start(ghost);
    let wrong = Census::take(&home).complaints(&rows);
    assert_eq!(wrong.len(), 1, "{wrong:?}");
    assert!(wrong[0].contains("job:0:7"), "{wrong:?}");
    drop(ghost);
    assert!(Census::take(&home).complaints(&rows).is_empty());
    rows[0].pid += 1;
    assert_eq!(
        Census::take(&home).complaints(&rows).len(),
        2,
        "a wrong pid: no such process, and one without a row"
    );
}
