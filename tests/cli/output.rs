//! What people and programs read.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use insta::assert_snapshot;
use pm::cli::output::Look;
use pm::ipc::protocol::{
    Answer, AppResult, DrainingView, Failure, HostView, InstanceDetail, ListView, OperationView, ProcessView,
    Refused, Reply, Request, Row, StepKind, StepView,
};
use pm::model::figures::{HttpFigures, NodeFigures, Spread};
use pm::model::id::{AppName, Generation, PmId, Slot};
use pm::model::spec::{AppSpec, CommandSpec, ExecMode, ListenAddress, ListenSpec, Origin, Runtime};
use pm::model::status::Status;
use serde_json::value::RawValue;

use crate::world::{Supervisor, Then, World};

fn row(id: u32, app: &str, slot: u32, status: Status) -> Row {
    let runs = matches!(status, Status::Online | Status::Launching | Status::Stopping);
    Row {
        pm_id: PmId(id),
        app: AppName::new(app).unwrap(),
        namespace: "default".to_owned(),
        slot: Slot(slot),
        generation: Some(Generation(3)),
        mode: "cluster".to_owned(),
        pid: runs.then_some(4000 + id),
        uptime_ms: runs.then_some(65_000),
        restarts: id,
        status,
        unhealthy: false,
        note: None,
        cpu: runs.then_some(1.25),
        memory: runs.then_some(48_234_496),
        listen: Vec::new(),
        figures: (status == Status::Online).then(figures),
    }
}

fn listing() -> ListView {
    let mut first = row(0, "api", 0, Status::Online);
    first.note = Some("draining 1 (12 s left)".to_owned());
    first.listen = vec!["0.0.0.0:3000".to_owned(), "unix:/run/api.sock".to_owned()];
    let mut second = row(1, "api", 1, Status::Launching);
    second.listen = first.listen.clone();
    let mut worker = row(2, "worker", 0, Status::WaitingRestart);
    worker.mode = "fork".to_owned();
    worker.note = Some("restart in 3 s, exit code 1".to_owned());
    ListView {
        rows: vec![
            first,
            second,
            worker,
            row(3, "old", 0, Status::Stopped),
            row(4, "bad", 0, Status::Errored),
        ],
        host: HostView {
            cpu: 12.4,
            cores: 2,
            load: [0.5, 0.4, 0.25],
            memory_used: 1_288_490_188,
            memory_total: 4_080_218_931,
        },
        warnings: vec!["the supervisor was started 3 times in a minute; see pm.log".to_owned()],
    }
}

fn list_answer(request: &Request) -> Option<Vec<Reply>> {
    matches!(request, Request::List { .. })
        .then(|| vec![Reply::Alive, Reply::Answer(Answer::List(listing()))])
}

fn step(slot: u32, generation: u64, step: StepKind) -> Reply {
    Reply::Progress(StepView {
        app: AppName::new("api").unwrap(),
        pm_id: PmId(slot),
        slot: Slot(slot),
        generation: Generation(generation),
        step,
    })
}

fn gone(after_ms: u64, killed: bool, reason: &str) -> StepKind {
    StepKind::Gone { after_ms, killed, reason: reason.to_owned() }
}

fn done(result: &str, slots: u32) -> Reply {
    let app = AppResult {
        app: AppName::new("api").unwrap(),
        ok: true,
        result: result.to_owned(),
        slots,
        failure: None,
    };
    Reply::Answer(Answer::Operation(OperationView { ok: true, apps: vec![app] }))
}

fn not_done(result: &str, failure: Option<Failure>) -> Reply {
    let app = AppResult {
        app: AppName::new("api").unwrap(),
        ok: false,
        result: result.to_owned(),
        slots: 2,
        failure,
    };
    Reply::Answer(Answer::Operation(OperationView { ok: false, apps: vec![app] }))
}

fn reloading() -> Vec<Reply> {
    vec![
        Reply::Alive,
        step(0, 4, StepKind::Queued),
        step(0, 4, StepKind::Launching),
        step(0, 4, StepKind::Spawned { pid: 4100 }),
        step(0, 4, StepKind::Ready { after_ms: 120, lived: false }),
        step(0, 3, StepKind::Draining),
        step(0, 3, StepKind::Signalled { signal: "SIGINT".to_owned() }),
        step(0, 3, gone(35, false, "exit code 0")),
        step(1, 4, StepKind::Launching),
        step(1, 4, StepKind::Ready { after_ms: 1_500, lived: false }),
        step(1, 3, StepKind::Draining),
        step(1, 3, gone(10_040, true, "SIGKILL")),
        done("reloaded", 2),
    ]
}

#[test]
fn the_table_in_a_pipe() {
    let world = World::new();
    let _supervisor = Supervisor::answering(&world.home(), |request| list_answer(request).unwrap());
    assert_snapshot!("list_pipe", world.run("list").whole());
    assert_snapshot!("list_wide", world.run("ls --wide").whole());
    assert_snapshot!("list_json", world.run("list --json").whole());
    assert_eq!(world.run("-s list").out, "");
}

#[test]
fn the_table_on_narrow_terminals_loses_columns_before_it_wraps() {
    let mut world = World::new();
    let _supervisor = Supervisor::answering(&world.home(), |request| list_answer(request).unwrap());
    for width in [100, 80, 60] {
        world.look = Look { width: Some(width), ..Look::PLAIN };
        let ran = world.run("list");
        let widest =
            ran.out.lines().filter(|line| !line.starts_with("host")).map(|line| line.chars().count()).max();
        assert!(widest.unwrap() <= usize::from(width), "{}", ran.out);
        assert_snapshot!(format!("list_{width}"), ran.out);
    }
    world.look = Look { color_out: true, color_err: true, ..Look::PLAIN };
    assert_snapshot!("list_color", world.run("list").whole().replace('\u{1b}', "ESC"));
}

#[test]
fn a_namespace_shows_its_column() {
    let world = World::new();
    let _supervisor = Supervisor::answering(&world.home(), |_| {
        let mut view = listing();
        view.rows[2].namespace = "jobs".to_owned();
        vec![Reply::Answer(Answer::List(view))]
    });
    assert!(world.run("list").out.contains("namespace"));
}

#[test]
fn a_reload_in_a_pipe() {
    let world = World::new();
    let supervisor =
        Supervisor::answering(&world.home(), |request| list_answer(request).unwrap_or_else(reloading));
    let ran = world.run("reload api");
    assert_snapshot!("reload_pipe", ran.whole());
    assert_eq!(
        supervisor.asked()[0],
        r#"{"act":{"verb":"reload","targets":["api"],"specs":[],"shell":null,"update_env":false}}"#
    );
    assert_snapshot!("reload_json", world.run("reload api --json").whole());
    assert_eq!(world.run("reload api -s").out, "");
}

#[test]
fn no_wait_ends_with_the_first_step() {
    let world = World::new();
    let _supervisor = Supervisor::start(&world.home(), |request| match list_answer(request) {
        Some(replies) => (replies, Then::Stay),
        // Nothing after the first step: who waits for more fails.
        None => (vec![Reply::Alive, step(0, 4, StepKind::Queued)], Then::Stay),
    });
    let ran = world.run("restart api --no-wait");
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(ran.out.starts_with("Accepted"), "{}", ran.out);
    assert_eq!(world.run("restart api --no-wait --json").out, "{\"accepted\":true}\n");
}

#[test]
fn a_restart_in_place_is_announced_and_tells_its_downtime() {
    let world = World::new();
    let _supervisor = Supervisor::answering(&world.home(), |request| {
        list_answer(request).unwrap_or_else(|| {
            vec![
                Reply::Notice("`api` is restarted in place: this is not zero-downtime".to_owned()),
                step(0, 1, StepKind::Signalled { signal: "SIGINT".to_owned() }),
                step(0, 1, gone(3, false, "SIGINT")),
                step(0, 2, StepKind::Launching),
                step(0, 2, StepKind::Ready { after_ms: 100, lived: false }),
                done("reloaded", 1),
            ]
        })
    });
    let ran = world.run("reload api");
    assert_eq!(ran.code, 0);
    assert!(ran.err.contains("not zero-downtime"), "{}", ran.err);
    assert!(ran.out.contains("api: reloaded, 1 instance, downtime "), "{}", ran.out);
}

/// bench/state-kills.py started an app while a delete that had been interrupted was finished: the app was in the list, and
/// gone when it was looked at.
#[test]
fn an_app_that_goes_while_one_of_its_name_is_started_is_not_missed() {
    let world = World::new();
    let supervisor = Supervisor::answering(&world.home(), |request| match request {
        Request::Describe { .. } => vec![Reply::Refused(Refused {
            code: 3,
            message: "there is no app, namespace or id `api`".to_owned(),
            cause: None,
            hint: None,
        })],
        Request::Start { .. } => vec![done("started", 1)],
        other => list_answer(other).unwrap(),
    });
    let ran = world.run("start /bin/sleep --name api --silent");
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(
        supervisor.asked().iter().any(|asked| asked.starts_with(r#"{"start""#)),
        "{:?}",
        supervisor.asked()
    );
}

#[test]
fn a_failed_release_shows_its_last_words() {
    let world = World::new();
    let _supervisor = Supervisor::answering(&world.home(), |_| {
        let failure = Failure {
            cause: "worker 0 was not ready within 5s".to_owned(),
            hint: Some("The old workers are still serving. See `pm logs api --err`.".to_owned()),
            last_lines: vec![
                "Error: no such table: users".to_owned(),
                "    at boot (/srv/api.js:7:9)".to_owned(),
            ],
            replaced: vec![],
            kept: vec![Slot(0), Slot(1)],
            restored: Vec::new(),
        };
        vec![
            step(0, 4, StepKind::Launching),
            step(0, 4, StepKind::Failed { reason: "not ready in time".to_owned() }),
            not_done("failed", Some(failure)),
        ]
    });
    assert_snapshot!("reload_failed", world.run("reload api").whole());
    assert_snapshot!("reload_failed_json", world.run("reload api --json").whole());
}

#[test]
fn an_aborted_operation_says_superseded() {
    let world = World::new();
    let _supervisor = Supervisor::answering(&world.home(), |_| vec![not_done("superseded by stop", None)]);
    let ran = world.run("reload api");
    assert_eq!(ran.code, 1);
    assert_eq!(ran.err, "error: cannot reload `api`\n  cause: superseded by stop\n");
}

#[test]
fn refusals_keep_their_code_and_words() {
    for code in [1, 2, 3, 5, 70] {
        let world = World::new();
        let _supervisor = Supervisor::answering(&world.home(), move |_| {
            vec![Reply::Refused(Refused {
                code,
                message: "cannot reload `api`".to_owned(),
                cause: Some("a reload of `api` is going on".to_owned()),
                hint: Some("Wait for it, or `pm stop api` ends it.".to_owned()),
            })]
        });
        let ran = world.run("reload api");
        assert_eq!(ran.code, code);
        assert_eq!(
            ran.err,
            "error: cannot reload `api`\n  cause: a reload of `api` is going on\nhint: Wait for it, or `pm stop api` ends it.\n"
        );
        let json = world.run("reload api --json");
        assert_eq!(json.code, code);
        assert!(json.out.starts_with(&format!("{{\"refused\":{{\"code\":{code},")), "{}", json.out);
    }
}

#[test]
fn lists_for_programs() {
    let world = World::new();
    let _supervisor = Supervisor::answering(&world.home(), |request| {
        if let Some(replies) = list_answer(request) {
            return replies;
        }
        match request {
            Request::Jlist { show_env, targets } => {
                let json =
                    format!(r#"[{{"pid":12,"name":"api","shown":{show_env},"targets":{}}}]"#, targets.len());
                let raw = RawValue::from_string(json).unwrap();
                vec![Reply::Alive, Reply::Answer(Answer::Raw(raw))]
            }
            Request::Env { .. } => {
                let env = [("NODE_ENV", "production"), ("TOKEN", "s3cret")];
                let env = env.map(|(key, value)| (key.to_owned(), value.to_owned()));
                vec![Reply::Answer(Answer::Env(BTreeMap::from(env)))]
            }
            Request::Ping => {
                vec![Reply::Answer(Answer::Pong {
                    version: "1.2.3".to_owned(),
                    daemon_pid: 7,
                    supervisor_pid: 8,
                    warnings: Vec::new(),
                })]
            }
            Request::Save => vec![Reply::Answer(Answer::Saved { path: "/h/dump.json".into(), apps: 2 })],
            other => panic!("{other:?}"),
        }
    });
    assert_eq!(world.run("jlist").out, "[{\"pid\":12,\"name\":\"api\",\"shown\":false,\"targets\":0}]\n");
    assert_eq!(
        world.run("prettylist api --show-env").out,
        "[ { pid: 12, name: 'api', shown: true, targets: 1 } ]"
    );
    assert_eq!(world.run("-s jlist").out, world.run("jlist").out, "silent keeps what programs read");
    assert_eq!(world.run("id api").out, "[ 0, 1, 2, 3, 4 ]\n");
    assert_eq!(world.run("pid api").out, "4000\n4001\n");
    assert_eq!(world.run("pid").out, "4000\n4001\n");
    assert_eq!(world.run("env 0").out, "NODE_ENV: production\nTOKEN: s3cret\n");
    assert_eq!(world.run("ping").out, "pong: pm 1.2.3, daemon 7, supervisor 8, home <dir>/home\n");
    assert_eq!(world.run("save").out, "Saved 2 apps in /h/dump.json\n");
}

#[test]
fn unknown_names_are_empty_for_id_and_pid_and_errors_elsewhere() {
    let world = World::new();
    let _supervisor = Supervisor::answering(&world.home(), |_| {
        let message = "there is no app `nope`".to_owned();
        vec![Reply::Refused(Refused { code: 3, message, cause: None, hint: None })]
    });
    assert_eq!((world.run("id nope").out.as_str(), world.run("id nope").code), ("[]\n", 0));
    assert_eq!((world.run("pid nope").out.as_str(), world.run("pid nope").code), ("", 0));
    for command in
        ["describe nope", "stop nope", "env nope", "scale nope 2", "list nope", "jlist nope", "logs nope"]
    {
        assert_eq!(world.run(command).code, 3, "{command}");
    }
}

fn detail() -> InstanceDetail {
    let mut row = row(0, "api", 0, Status::Online);
    row.listen = vec!["0.0.0.0:3000".to_owned()];
    row.figures = Some(figures());
    InstanceDetail {
        row,
        spec: spec(),
        revision: 2,
        out_file: "/home/logs/api-out-0.log".into(),
        error_file: "/home/logs/api-error-0.log".into(),
        created_ms: 1_700_000_000_000,
        started_ms: Some(1_700_000_100_000),
        ready_after_ms: Some(120),
        unstable: 0,
        last_exit: Some("exit code 1".to_owned()),
        pss: Some(31_457_280),
        rss: Some(52_428_800),
        processes: vec![ProcessView {
            pid: 4000,
            command: "node server.js".to_owned(),
            cpu: 1.25,
            rss: 52_428_800,
            pss: 31_457_280,
        }],
        draining: vec![DrainingView {
            generation: Generation(2),
            pid: Some(3999),
            kill_in_ms: Some(8_500),
            state: "draining".to_owned(),
        }],
        env: [("NODE_ENV", "production"), ("TOKEN", pm::ipc::protocol::MASK)]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into(),
        probe: None,
        health: None,
        notes: vec!["agent = false: idle keep-alive connections may be cut".to_owned()],
        node_version: Some("20.19.2".to_owned()),
    }
}

fn figures() -> NodeFigures {
    NodeFigures {
        heap_used: 12_900_000,
        heap_total: 21_000_000,
        external: 2_100_000,
        array_buffers: 524_288,
        loop_delay: Some(Spread { p50: 0.42, p95: 1.31, p99: 12.4 }),
        handles: 7,
        requests: 0,
        connections: 12,
        http: Some(HttpFigures {
            per_second: 103.4,
            latency: Some(Spread { p50: 2.1, p95: 8.9, p99: 31.0 }),
        }),
    }
}

fn spec() -> AppSpec {
    let command = CommandSpec {
        script: "/srv/current/server.js".into(),
        interpreter: Some("node".to_owned()),
        interpreter_args: vec!["--max-old-space-size=256".to_owned()],
        args: vec!["--title".to_owned(), "it's me".to_owned()],
        runtime: Runtime::Node,
    };
    let mut spec = AppSpec::new(AppName::new("api").unwrap(), command, "/srv/current".into());
    spec.origin =
        Some(Origin { file: "/srv/ecosystem.toml".into(), env_name: Some("production".to_owned()) });
    spec.mode = ExecMode::Cluster;
    spec.instances = 2;
    spec.env.files = vec![PathBuf::from("/srv/.env")];
    spec.listen = vec![ListenSpec {
        name: "3000".to_owned(),
        address: ListenAddress::Tcp("0.0.0.0:3000".parse().unwrap()),
        backlog: 511,
        blocking: false,
    }];
    spec.ready.wait_ready = true;
    spec.stop.timeout = Duration::from_millis(1_600);
    spec.restart.stop_exit_codes = vec![0, 2];
    spec.agent = false;
    spec
}

#[test]
fn describe_has_everything() {
    let world = World::new();
    let _supervisor =
        Supervisor::answering(&world.home(), |_| vec![Reply::Answer(Answer::Describe(vec![detail()]))]);
    assert_snapshot!("describe", world.run("describe api").whole());
    let json: serde_json::Value = serde_json::from_str(&world.run("describe api --json").out).unwrap();
    assert_eq!(json[0]["row"]["app"], "api");
}

#[test]
fn a_start_prints_the_table_and_the_address() {
    let world = World::new();
    let config = world.write(
        "ecosystem.toml",
        "[[apps]]\nname = \"api\"\nscript = \"/bin/sleep\"\nargs = [\"9\"]\n[[apps]]\nname = \"other\"\nscript = \"/bin/true\"\n",
    );
    let supervisor = Supervisor::answering(&world.home(), |request| {
        list_answer(request).unwrap_or_else(|| vec![Reply::Alive, done("started", 2)])
    });
    let ran = world.run(&format!("start {} --only api", config.display()));
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(ran.out.starts_with("api: started, 2 instances\n┌"), "{}", ran.out);
    assert!(ran.out.ends_with("api: http://127.0.0.1:3000 unix:/run/api.sock\n"), "{}", ran.out);
    let asked: serde_json::Value = serde_json::from_str(&supervisor.asked()[0]).unwrap();
    let specs = asked["start"]["specs"].as_array().unwrap();
    assert_eq!((specs.len(), &specs[0]["name"]), (1, &"api".into()));
    assert!(asked["start"]["shell"]["PATH"].is_string());
}

#[test]
fn start_knows_names_ids_and_scripts_apart() {
    let world = World::new();
    let script = world.write("job.sh", "#!/bin/sh\n");
    let supervisor = Supervisor::answering(&world.home(), |request| {
        list_answer(request).unwrap_or_else(|| vec![Reply::Alive, done("started", 1)])
    });
    let script = script.to_str().unwrap();
    let ran = world.run(&format!("start old 4 {script}"));
    assert_eq!(ran.code, 0, "{}{}", ran.out, ran.err);
    let asked = supervisor.asked();
    let existing =
        r#"{"act":{"verb":"start","targets":["old","4"],"specs":[],"shell":null,"update_env":false}}"#;
    assert_eq!(asked[1], existing);
    assert!(asked[2].starts_with(r#"{"start":{"specs":[{"name":"job""#), "{}", asked[2]);
    assert_eq!(world.run("start 99").code, 3);
    assert_eq!(world.run("start nope-no-such-command").code, 2);
}

#[test]
fn a_name_is_no_place_for_options_of_a_new_app() {
    let world = World::new();
    let _supervisor = Supervisor::answering(&world.home(), |request| list_answer(request).unwrap());
    let ran = world.run("start api -i 4");
    assert_eq!(ran.code, 2);
    assert_snapshot!("start_name_with_options", ran.err);
}
