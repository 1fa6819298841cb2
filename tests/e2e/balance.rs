//! How connections reach workers: each policy is as even as it says, and loses nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::Command;
use std::time::Instant;

use nix::sys::signal::Signal;
use socket2::{Domain, Socket, Type};

use super::support::home::run;
use super::support::load::{Connections, Load};
use super::support::node::{self, Node};
use super::support::{Home, PATIENT, SOON, fixture, free_port, process, secs, wait_until};

const POLICIES: [&str; 6] = ["round-robin", "least-connections", "sticky", "shared", "slots", "sticky-slots"];

fn app(port: u16, balance: &str, instances: u32, keys: &str) -> String {
    format!(
        "[[apps]]\nname = 'web'\nscript = '{}'\nexec_mode = 'cluster'\ninstances = {instances}\n\
         balance = '{balance}'\n{keys}\nenv = {{ PORT = '{port}' }}\n",
        fixture("web-patient.js")
    )
}

/// A connection that stays open, and the worker that has it.
struct Client {
    stream: BufReader<TcpStream>,
    slot: String,
    pid: String,
}

impl Client {
    /// Connects from an address of the loopback network and asks once.
    fn from(source: Ipv4Addr, port: u16) -> Result<Self, String> {
        let text = |error: std::io::Error| error.to_string();
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).map_err(text)?;
        // Or the port of a client could be in the way of a server that is to listen on all addresses.
        socket.set_reuse_address(true).map_err(text)?;
        socket.bind(&SocketAddr::from((source, 0)).into()).map_err(text)?;
        socket.connect(&SocketAddr::from(([127, 0, 0, 1], port)).into()).map_err(text)?;
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(PATIENT)).map_err(text)?;
        let mut client = Self { stream: BufReader::new(stream), slot: String::new(), pid: String::new() };
        client.ask()?;
        client.answer()?;
        Ok(client)
    }

    fn ask(&mut self) -> Result<(), String> {
        let request = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
        self.stream.get_mut().write_all(request).map_err(|error| error.to_string())
    }

    fn answer(&mut self) -> Result<(), String> {
        let mut length = 0;
        loop {
            let mut line = String::new();
            self.stream.read_line(&mut line).map_err(|error| error.to_string())?;
            let Some((name, value)) = line.trim_end().split_once(':') else {
                match line.as_str() {
                    "\r\n" => break,
                    "HTTP/1.1 200 OK\r\n" => continue,
                    _ => return Err(format!("{line:?}")),
                }
            };
            let value = value.trim();
            match name.to_lowercase().as_str() {
                "x-slot" => value.clone_into(&mut self.slot),
                "x-pid" => value.clone_into(&mut self.pid),
                "content-length" => length = value.parse().map_err(|error| format!("{error}"))?,
                _ => {}
            }
        }
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body).map_err(|error| error.to_string())
    }
}

/// The slot that answers a client of this address on a new connection.
fn slot_of(source: Ipv4Addr, port: u16) -> String {
    Client::from(source, port).unwrap().slot
}

/// Stops a process, and returns when it does nothing any more.
fn freeze(pid: i32) {
    process::signal(pid, Signal::SIGSTOP);
    wait_until("the process is stopped", SOON, || match process::stat(pid).map(|stat| stat.state) {
        Some('T') => Ok(()),
        other => Err(other),
    });
}

fn local(n: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(0x7f00_0100 + n)
}

fn held(clients: &[Client]) -> BTreeMap<String, usize> {
    let mut held = BTreeMap::new();
    for client in clients {
        *held.entry(client.slot.clone()).or_default() += 1;
    }
    held
}

/// The most and the fewest that a worker has.
fn unevenness(clients: &[Client], workers: usize) -> usize {
    let held = held(clients);
    assert_eq!(held.len(), workers, "{held:?}");
    held.values().max().unwrap() - held.values().min().unwrap()
}

fn connect(count: u32, port: u16) -> Vec<Client> {
    (0..count).map(|n| Client::from(local(n % 200), port).unwrap()).collect()
}

// Even. -----------------------------------------------------------------------------------------------------------

#[test]
fn round_robin_keeps_workers_within_three_connections() {
    let home = Home::new();
    let port = free_port();
    home.start(&app(port, "round-robin", 4, ""));
    assert!(unevenness(&connect(80, port), 4) <= 3);
}

#[test]
fn least_connections_keeps_workers_within_one_and_fills_up_what_others_have_lost() {
    let home = Home::new();
    let port = free_port();
    home.start(&app(port, "least-connections", 4, ""));
    let mut clients = connect(80, port);
    assert!(unevenness(&clients, 4) <= 1, "{:?}", held(&clients));
    // A third of all leave, most of them of one worker. The agents tell; then the new ones go where the others went.
    let mut kept = 0;
    clients.retain(|client| {
        kept += usize::from(client.slot == "2");
        client.slot != "2" || kept > 18
    });
    wait_until("the worker that lost its connections gets the next ones", SOON, || {
        let probe = [(); 3].map(|()| slot_of(local(1), port));
        if probe.iter().all(|slot| slot == "2") { Ok(()) } else { Err(probe) }
    });
    clients.extend(connect(18, port));
    assert!(unevenness(&clients, 4) <= 1, "{:?}", held(&clients));
    // The next supervisor asks how many there are.
    let supervisor = home.supervisor();
    process::end(supervisor);
    clients.retain(|client| client.slot != "3");
    let left = clients.len();
    wait_until("the worker that lost its connections gets the next ones again", SOON, || {
        let probe = [(); 3].map(|()| slot_of(local(1), port));
        if probe.iter().all(|slot| slot == "3") { Ok(()) } else { Err(probe) }
    });
    clients.extend(connect(u32::try_from(80 - left).unwrap(), port));
    assert!(unevenness(&clients, 4) <= 1, "{:?}", held(&clients));
    // Control: without the agent nobody knows, and the turns go on as before.
    let port = free_port();
    home.start(&app(port, "least-connections", 4, "agent = false").replace("'web'", "'blind'"));
    let mut clients = connect(40, port);
    clients.retain(|client| client.slot != "2");
    clients.extend(connect(12, port));
    assert!(unevenness(&clients, 4) > 3, "{:?}", held(&clients));
    home.ok(&["describe", "blind"]).says("least-connections needs the agent");
}

#[test]
fn spread_of_connections_over_4_workers_is_within_20_percent() {
    for balance in ["round-robin", "slots"] {
        let home = Home::new();
        let port = free_port();
        home.start(&app(port, balance, 4, ""));
        let load = Load::start(port, 8, Connections::OnePerRequest);
        load.more(2000);
        let tally = load.stop();
        assert_eq!(tally.failed(), 0, "{tally:?}");
        let mean = tally.ok / 4;
        assert_eq!(tally.pids.len(), 4, "{tally:?}");
        for (pid, count) in &tally.pids {
            assert!(count.abs_diff(mean) <= mean / 5, "{balance} {pid}: {tally:?}");
        }
    }
}

// Sticky. ---------------------------------------------------------------------------------------------------------

fn a_client_stays_at_its_slot_over_reloads_and_supervisors_and_comes_back_after_a_crash(balance: &str) {
    let home = Home::new();
    let port = free_port();
    home.start(&app(port, balance, 4, ""));
    let slots = || -> Vec<String> { (0..40).map(|n| slot_of(local(n), port)).collect() };
    let first = slots();
    assert_eq!(first.iter().collect::<BTreeSet<_>>().len(), 4, "{first:?}");
    assert_eq!(slots(), first);
    home.ok(&["reload", "web"]);
    assert_eq!(slots(), first, "after a reload");
    process::end(home.supervisor());
    assert_eq!(slots(), first, "after the supervisor's death");
    // A worker that is away: its clients go to others, everybody else stays.
    home.ok(&["stop", &home.rows_of("web")[2].id.to_string()]);
    for (now, before) in slots().iter().zip(&first) {
        assert!(now != "2" && (now == before || before == "2"), "{before} -> {now}");
    }
    home.ok(&["start", &home.rows_of("web")[2].id.to_string()]);
    assert_eq!(slots(), first, "everybody is back");
    // One more slot takes clients from all, and moves none among the others.
    home.ok(&["scale", "web", "5"]);
    let more = slots();
    assert!(more.iter().zip(&first).all(|(now, before)| now == before || now == "4"), "{more:?} {first:?}");
    // Control: by turns they do not stay.
    let port = free_port();
    home.start(&app(port, "round-robin", 4, "").replace("'web'", "'turns'"));
    let turns: BTreeSet<String> = (0..8).map(|_| slot_of(local(1), port)).collect();
    assert!(turns.len() > 1, "{turns:?}");
}

#[test]
fn a_client_stays_at_its_slot_over_reloads_and_supervisors_and_comes_back_after_a_crash_sticky() {
    a_client_stays_at_its_slot_over_reloads_and_supervisors_and_comes_back_after_a_crash("sticky");
}

#[test]
fn a_client_stays_at_its_slot_over_reloads_and_supervisors_and_comes_back_after_a_crash_sticky_slots() {
    a_client_stays_at_its_slot_over_reloads_and_supervisors_and_comes_back_after_a_crash("sticky-slots");
}

#[test]
fn a_client_of_a_slot_that_hangs_goes_to_another_until_it_is_back() {
    let home = Home::new();
    let port = free_port();
    home.start(&app(port, "sticky-slots", 2, "kill_timeout = '1s'"));
    let hung = (0..100).map(local).find(|client| slot_of(*client, port) == "0").unwrap();
    let pid = home.rows_of("web")[0].pid;
    freeze(pid);
    let clients: Vec<_> = (0..5).map(|_| std::thread::spawn(move || slot_of(hung, port))).collect();
    for client in clients {
        assert_eq!(client.join().unwrap(), "1");
    }
    process::signal(pid, Signal::SIGCONT);
    wait_until("its clients are back", PATIENT, || {
        let slot = slot_of(hung, port);
        if slot == "0" { Ok(()) } else { Err(slot) }
    });
}

#[test]
fn a_client_of_a_worker_that_hangs_goes_to_another_and_holds_nobody_up() {
    let home = Home::new();
    let port = free_port();
    home.start(&app(port, "sticky", 2, "kill_timeout = '1s'"));
    let of = |slot: &str| (0..100).map(local).find(|client| slot_of(*client, port) == slot).unwrap();
    let (hung, well) = (of("0"), of("1"));
    let pid = home.rows_of("web")[0].pid;
    freeze(pid);
    // The first of these is in the hands of the worker that hangs; the others are to go elsewhere after a while.
    let (answers_tx, answers) = std::sync::mpsc::channel();
    for _ in 0..5 {
        let answers_tx = answers_tx.clone();
        std::thread::spawn(move || {
            let _ = answers_tx.send(Client::from(hung, port).map(|client| client.slot));
        });
    }
    for _ in 0..4 {
        assert_eq!(answers.recv_timeout(SOON), Ok(Ok("1".to_owned())));
    }
    for _ in 0..20 {
        assert_eq!(slot_of(well, port), "1");
    }
    process::signal(pid, Signal::SIGCONT);
    assert_eq!(answers.recv_timeout(SOON), Ok(Ok("0".to_owned())));
    assert_eq!(slot_of(hung, port), "0");
}

fn socket_io_over_long_polling(balance: &str) -> super::support::Run {
    let home = Home::new();
    let port = free_port();
    std::os::unix::fs::symlink(node::packages(), home.work().join("node_modules")).unwrap();
    for (from, to) in [("socketio.js", "socketio.js"), ("socketio-polling-client.js", "client.js")] {
        fs::copy(fixture(from), home.work().join(to)).unwrap();
    }
    home.start(&format!(
        "[[apps]]\nname = 'app'\nscript = 'socketio.js'\nexec_mode = 'cluster'\ninstances = 2\n\
         balance = '{balance}'\nenv = {{ PORT = '{port}' }}\n"
    ));
    let mut client = Command::new(Node::installed().binary);
    home.environment(&mut client);
    client.arg("client.js").env("PORT", port.to_string());
    run(client, PATIENT)
}

#[test]
fn socket_io_long_polling_works_with_two_workers_when_they_are_sticky() {
    let run = socket_io_over_long_polling("sticky");
    assert_eq!(run.code, 0, "{run:?}");
    assert_eq!(run.json().as_array().unwrap().len(), 1, "one address, one worker: {run:?}");
}

#[test]
fn control_socket_io_long_polling_fails_with_two_workers_by_turns() {
    let run = socket_io_over_long_polling("round-robin");
    assert_eq!(run.code, 1, "{run:?}");
}

#[test]
fn describe_tells_when_one_address_makes_most_connections_of_a_sticky_app() {
    let home = Home::new();
    let port = free_port();
    home.start(&app(port, "sticky", 2, ""));
    let warns = || home.ok(&["describe", "web"]).text().contains("of the connections come from");
    let every = |sources: u32| {
        for n in 0..150 {
            load_from(local(n % sources), port);
        }
    };
    every(50);
    assert!(!warns(), "many clients");
    for _ in 0..7 {
        every(1);
    }
    wait_until("describe warns", SOON, || if warns() { Ok(()) } else { Err(()) });
    home.ok(&["describe", "web"]).says("127.0.1.0").says("proxy");
}

/// One request on a connection of its own.
fn load_from(source: Ipv4Addr, port: u16) {
    Client::from(source, port).unwrap();
}

// Nothing is lost. ------------------------------------------------------------------------------------------------

/// Reloads, a scaling down and up, under load.
fn reloads_lose_nothing(balance: &str) {
    let home = Home::loaded();
    let port = free_port();
    home.start(&app(port, balance, 2, ""));
    let load = Load::start(port, 16, Connections::OnePerRequest);
    home.ok(&["reload", "web"]);
    load.more(350);
    home.ok(&["scale", "web", "1"]);
    load.more(150);
    home.ok(&["scale", "web", "3"]);
    load.more(150);
    home.ok(&["reload", "web"]);
    load.more(350);
    load.stop().lost_nothing(1000);
}

#[test]
fn reloads_and_scaling_under_load_lose_nothing_least_connections() {
    reloads_lose_nothing("least-connections");
}

#[test]
fn reloads_and_scaling_under_load_lose_nothing_sticky() {
    reloads_lose_nothing("sticky");
}

#[test]
fn reloads_and_scaling_under_load_lose_nothing_slots() {
    reloads_lose_nothing("slots");
}

#[test]
fn control_workers_killed_under_load_lose_requests_slots() {
    let home = Home::new();
    let port = free_port();
    home.start(&app(port, "slots", 2, ""));
    let load = Load::start(port, 8, Connections::OnePerRequest);
    for _ in 0..3 {
        for pid in home.pids("web") {
            process::end(pid);
        }
        load.more(100);
        wait_until("both run again", PATIENT, || {
            let statuses = home.statuses("web");
            if statuses == ["online", "online"] { Ok(()) } else { Err(statuses) }
        });
    }
    let tally = load.stop();
    assert!(tally.failed() > 0, "a client that sees no failure here proves nothing: {tally:?}");
}

#[test]
fn supervisor_killed_under_load_loses_nothing_in_slots_mode() {
    let home = Home::loaded();
    let port = free_port();
    home.start(&app(port, "slots", 2, ""));
    let before: Vec<_> = home.pids("web").into_iter().map(process::identity).collect();
    let load = Load::start(port, 16, Connections::OnePerRequest);
    for _ in 0..3 {
        let old = home.supervisor();
        process::end(old);
        load.more(200);
        wait_until("the next supervisor answers", SOON, || {
            let run = home.pm(&["jlist"]);
            if run.code == 0 && home.supervisor() != old { Ok(()) } else { Err(run) }
        });
        load.more(200);
    }
    let after: Vec<_> = home.pids("web").into_iter().map(process::identity).collect();
    assert_eq!(after, before, "same pids and start ticks");
    // The next one knows which socket belongs to which slot.
    home.ok(&["reload", "web"]);
    home.ok(&["scale", "web", "3"]);
    load.more(300);
    let tally = load.stop();
    assert_eq!(tally.pids.len(), 5, "{tally:?}");
    tally.lost_nothing(1000);
}

#[test]
fn a_reload_to_any_other_balance_loses_nothing() {
    let home = Home::loaded();
    let port = free_port();
    home.start(&app(port, "round-robin", 2, ""));
    let load = Load::start(port, 8, Connections::OnePerRequest);
    for balance in [
        "slots",
        "shared",
        "sticky-slots",
        "sticky",
        "slots",
        "sticky-slots",
        "least-connections",
        "round-robin",
    ] {
        home.ecosystem(&app(port, balance, 2, ""));
        home.ok(&["reload", "ecosystem.toml"]);
        load.more(150);
    }
    load.stop().lost_nothing(1000);
    // As many as before: the sockets of slots are closed.
    assert_eq!(listening(port), 1);
}

/// How many sockets listen on this port.
fn listening(port: u16) -> usize {
    let table = fs::read_to_string("/proc/net/tcp").unwrap();
    let rows = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    rows.filter(|fields| fields[3] == "0A" && fields[1].ends_with(&format!(":{port:04X}"))).count()
}

/// Clients that have connected and sent a request, and wait.
fn waiting(count: u32, port: u16) -> Vec<TcpStream> {
    (0..count)
        .map(|_| {
            let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
            stream.set_read_timeout(Some(PATIENT)).unwrap();
            stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
            stream
        })
        .collect()
}

/// How many of them get a whole answer.
fn answered(clients: Vec<TcpStream>) -> usize {
    let whole = |mut client: TcpStream| {
        let mut text = String::new();
        client.read_to_string(&mut text).is_ok() && text.contains(" 200 OK\r\n") && text.ends_with(" end\n")
    };
    clients.into_iter().filter_map(|client| whole(client).then_some(())).count()
}

fn with_the_syn_backlog_deliberately_filled_closing_a_draining_worker_loses_0_connections(balance: &str) {
    let home = Home::new();
    let port = free_port();
    home.start(&app(port, balance, 2, "kill_timeout = '500ms'\ndrain_timeout = '300ms'"));
    let old = home.pids("web");
    // Workers that are stopped accept nothing, so everything waits in the kernel's queues.
    for pid in &old {
        freeze(*pid);
    }
    let clients = waiting(400, port);
    home.ok(&["reload", "web"]);
    assert!(old.iter().all(|pid| !process::alive(*pid)), "{balance}: old workers are gone");
    assert_eq!(answered(clients), 400, "{balance}");

    // One worker less: what waits at its slot goes to the other.
    let pids = home.pids("web");
    for pid in &pids {
        freeze(*pid);
    }
    let clients = waiting(200, port);
    process::signal(pids[0], Signal::SIGCONT);
    home.ok(&["scale", "web", "1"]);
    assert_eq!(answered(clients), 200, "{balance}");
}

#[test]
fn with_the_syn_backlog_deliberately_filled_closing_a_draining_worker_loses_0_connections_slots() {
    with_the_syn_backlog_deliberately_filled_closing_a_draining_worker_loses_0_connections("slots");
}

#[test]
fn with_the_syn_backlog_deliberately_filled_closing_a_draining_worker_loses_0_connections_shared() {
    with_the_syn_backlog_deliberately_filled_closing_a_draining_worker_loses_0_connections("shared");
}

#[test]
fn with_the_syn_backlog_deliberately_filled_closing_a_draining_worker_loses_0_connections_round_robin() {
    with_the_syn_backlog_deliberately_filled_closing_a_draining_worker_loses_0_connections("round-robin");
}

#[test]
fn control_connections_in_the_backlog_are_lost_when_the_listener_is_closed() {
    for balance in ["round-robin", "slots"] {
        let home = Home::new();
        let port = free_port();
        home.start(&app(port, balance, 2, "kill_timeout = '200ms'\nagent = false"));
        for pid in home.pids("web") {
            freeze(pid);
        }
        let clients = waiting(50, port);
        home.ok(&["stop", "web"]);
        // Those in the hands of a worker already may be answered.
        let answered = answered(clients);
        assert!(answered < 50, "{balance}: {answered}");
    }
}

#[test]
fn a_worker_that_hangs_holds_up_nobody_in_slots_mode() {
    let home = Home::new();
    let port = free_port();
    home.start(&app(port, "slots", 3, ""));
    let hung = home.pids("web")[1];
    freeze(hung);
    // Whoever is handed to it before that shows waits for it; everybody else is answered.
    let clients = waiting(60, port);
    let rest = std::thread::spawn(move || answered(clients));
    let mut slots = BTreeSet::new();
    for n in 0..120 {
        let begin = Instant::now();
        slots.insert(slot_of(local(n), port));
        assert!(Instant::now().duration_since(begin) < secs(3));
    }
    assert!(!slots.contains("1") && slots.len() == 2, "{slots:?}");
    process::signal(hung, Signal::SIGCONT);
    assert_eq!(rest.join().unwrap(), 60);
    wait_until("it has its share again", PATIENT, || {
        if (0..30).any(|n| slot_of(local(n), port) == "1") { Ok(()) } else { Err(()) }
    });
}

// Programs of any language, with inherited sockets. -----------------------------------------------------------------

fn python(port: u16, balance: &str, instances: u32) -> String {
    format!(
        "[[apps]]\nname = 'web'\nscript = '{}'\ninterpreter = '{}'\nexec_mode = 'cluster'\n\
         listen = ['127.0.0.1:{port}']\ninstances = {instances}\nbalance = '{balance}'\nmin_uptime = '300ms'\n",
        fixture("web.py"),
        node::python()
    )
}

#[test]
fn inherited_sockets_of_slots_lose_nothing_in_reloads_scaling_and_without_a_supervisor() {
    let home = Home::loaded();
    let port = free_port();
    home.start(&python(port, "shared", 2));
    let load = Load::start(port, 8, Connections::OnePerRequest);
    home.ecosystem(&python(port, "slots", 3));
    home.ok(&["reload", "ecosystem.toml"]);
    home.ok(&["scale", "web", "3"]);
    assert_eq!(listening(port), 3, "a socket for each slot");
    load.more(200);
    process::end(home.supervisor());
    load.more(200);
    home.ok(&["scale", "web", "2"]);
    load.more(200);
    home.ok(&["scale", "web", "4"]);
    home.ok(&["reload", "web"]);
    load.more(300);
    let four: BTreeSet<String> = home.pids("web").iter().map(ToString::to_string).collect();
    let tally = load.stop();
    assert!(four.iter().all(|pid| tally.pids.contains_key(pid)), "{four:?} {tally:?}");
    tally.lost_nothing(1000);
    home.ecosystem(&python(port, "shared", 4));
    home.ok(&["reload", "ecosystem.toml"]);
    assert_eq!(listening(port), 1, "one socket for all again");
}

#[test]
fn what_waits_at_an_inherited_slot_that_crashes_is_for_its_successor_and_others_go_elsewhere() {
    let home = Home::new();
    let port = free_port();
    home.start(&python(port, "slots", 2));
    let victim = home.pids("web")[1];
    freeze(victim);
    let clients = waiting(40, port);
    process::end(victim);
    assert_eq!(answered(clients), 40);
    // A slot that is stopped gets nothing.
    home.ok(&["stop", &home.rows_of("web")[1].id.to_string()]);
    assert_eq!(answered(waiting(40, port)), 40);
}

// Who has the connection. -----------------------------------------------------------------------------------------

/// The inodes of the connections that clients have to this port.
fn connections_to(port: u16) -> BTreeSet<String> {
    let table = fs::read_to_string("/proc/net/tcp").unwrap();
    let established = |fields: &[&str]| fields[3] == "01" && fields[1].ends_with(&format!(":{port:04X}"));
    let rows = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    rows.filter(|fields| established(fields)).map(|fields| format!("socket:[{}]", fields[9])).collect()
}

#[test]
fn the_daemon_never_touches_payload_bytes() {
    for balance in POLICIES {
        let home = Home::new();
        let port = free_port();
        home.start(&app(port, balance, 2, ""));
        let mut clients = connect(6, port);
        let sockets = connections_to(port);
        assert_eq!(sockets.len(), 6, "{balance}: {sockets:?}");
        // Who has no descriptor of a connection can neither read nor write it.
        let holders =
            |pid: i32| process::descriptors(pid).values().filter(|name| sockets.contains(*name)).count();
        for pid in [home.keeper(), home.supervisor()] {
            wait_until("the daemon has let go", SOON, || if holders(pid) == 0 { Ok(()) } else { Err(pid) });
        }
        assert_eq!(home.pids("web").into_iter().map(holders).sum::<usize>(), 6, "{balance}");
        // And the bytes go on when there is no daemon that could.
        let (keeper, supervisor) = (home.keeper(), home.supervisor());
        process::signal(supervisor, Signal::SIGSTOP);
        process::signal(keeper, Signal::SIGSTOP);
        for client in &mut clients {
            client.ask().and_then(|()| client.answer()).unwrap();
        }
        process::signal(keeper, Signal::SIGCONT);
        process::signal(supervisor, Signal::SIGCONT);
    }
}
