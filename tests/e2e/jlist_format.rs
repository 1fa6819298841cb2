//! `jlist` and `prettylist` have the shape that PM2's users and tools read.

use serde_json::Value;

use super::support::home::run;
use super::support::node::Node;
use super::support::{Home, SOON, fixture, free_port};

fn started(home: &Home) {
    let port = free_port();
    home.write("package.json", "{\"name\":\"x\",\"version\":\"1.2.3\"}");
    std::fs::copy(fixture("web-plain.js"), home.work().join("web-plain.js")).unwrap();
    std::fs::copy(fixture("common.js"), home.work().join("common.js")).unwrap();
    home.start(&format!(
        "[[apps]]\nname = 'web'\nscript = 'web-plain.js'\nexec_mode = 'cluster'\ninstances = 2\n\
         env = {{ PORT = '{port}', NODE_ENV = 'production' }}\n\
         [[apps]]\nname = 'job'\nscript = 'sleep'\nargs = ['1000']\n"
    ));
}

#[test]
fn entries_have_the_fields_that_known_clients_read() {
    let home = Home::new();
    started(&home);
    let list = home.jlist();
    assert_eq!(list.as_array().unwrap().len(), 3);
    for entry in list.as_array().unwrap() {
        for key in ["pid", "name", "pm_id", "pm2_env", "monit"] {
            assert!(!entry[key].is_null(), "{key}: {entry}");
        }
        assert!(entry["monit"]["memory"].is_u64(), "{entry}");
        assert!(entry["monit"]["cpu"].is_number(), "{entry}");
        let env = &entry["pm2_env"];
        for key in [
            "status",
            "name",
            "namespace",
            "exec_mode",
            "exec_interpreter",
            "pm_exec_path",
            "pm_cwd",
            "pm_out_log_path",
            "pm_err_log_path",
            "version",
            "unique_id",
            "username",
        ] {
            assert!(env[key].is_string(), "{key}: {env}");
        }
        for key in [
            "pm_id",
            "pm_uptime",
            "created_at",
            "restart_time",
            "unstable_restarts",
            "instances",
            "NODE_APP_INSTANCE",
        ] {
            assert!(env[key].is_number(), "{key}: {env}");
        }
        for key in ["watch", "autorestart", "merge_logs"] {
            assert!(env[key].is_boolean(), "{key}: {env}");
        }
        for key in ["axm_actions", "node_args"] {
            assert!(env[key].is_array(), "{key}: {env}");
        }
        for key in ["env", "axm_monitor", "axm_options"] {
            assert!(env[key].is_object(), "{key}: {env}");
        }
    }
    let web = home.rows_of("web").remove(0);
    assert_eq!(web.env("version"), "1.2.3");
    assert_eq!(web.env("node_version"), Node::installed().version.trim_start_matches('v'));
    assert_eq!(web.env("exec_mode"), "cluster_mode");
    assert_eq!(web.env("instances"), 2);
    assert_eq!(web.env("env")["NODE_ENV"], "production");
    assert_eq!(home.row("job").env("exec_mode"), "fork_mode");
    assert_eq!(home.row("job").env("args"), &serde_json::json!(["1000"]));
    assert_eq!(home.row("job").env("namespace"), "default");
    assert!(web.pm("draining").is_array(), "{}", web.entry["pm"]);
}

#[test]
fn prettylist_is_what_util_inspect_prints() {
    let home = Home::new();
    started(&home);
    // CPU and memory change between two calls, so their digits are left out of the comparison.
    let inspect = "const list = JSON.parse(require('fs').readFileSync(0, 'utf8'));\n\
        process.stdout.write(require('util').inspect(list, { depth: null, colors: false, maxArrayLength: null,\n\
          maxStringLength: null }));";
    let node = Node::installed();
    for args in [&["jlist"][..], &["jlist", "--show-env"]] {
        super::support::wait_until("both show the same moment", SOON, || {
            let json = home.ok(args);
            let mut command = std::process::Command::new(&node.binary);
            home.environment(&mut command);
            command.args(["-e", inspect]);
            let by_node =
                steady(&super::support::home::Running::start(command, json.out.as_bytes()).end(SOON).out);
            let mut ours = vec!["prettylist"];
            ours.extend(&args[1..]);
            let pretty = steady(&home.ok(&ours).out);
            if pretty == by_node { Ok(()) } else { Err(first_difference(&pretty, &by_node)) }
        });
    }
}

/// The text with each number that follows a name of a measured value as `N`.
fn steady(text: &str) -> String {
    let mut out = String::new();
    for line in text.split_inclusive('\n') {
        let mut rest = line;
        while let Some((before, after)) = rest.split_once(": ") {
            out.push_str(before);
            out.push_str(": ");
            rest = after;
            let key = before.rsplit([' ', '{']).next().unwrap_or_default();
            // The agent's figures are a value each; PM2 has some of them as text.
            if ["cpu", "memory", "rss", "pss", "value"].contains(&key) {
                let number = rest.trim_start_matches(|c: char| c.is_ascii_digit() || ".-e'".contains(c));
                if number.len() < rest.len() {
                    out.push('N');
                }
                rest = number;
            }
        }
        out.push_str(rest);
    }
    out
}

fn first_difference(ours: &str, theirs: &str) -> String {
    for (a, b) in ours.lines().zip(theirs.lines()) {
        if a != b {
            return format!("ours:   {a}\ntheirs: {b}");
        }
    }
    format!("{} and {} lines", ours.lines().count(), theirs.lines().count())
}

#[test]
fn an_empty_list_is_empty_in_both() {
    let home = Home::new();
    home.start("[[apps]]\nname = 'job'\nscript = 'sleep'\nargs = ['1000']\n");
    home.ok(&["delete", "job"]);
    assert_eq!(home.jlist(), Value::Array(Vec::new()));
    assert_eq!(home.ok(&["prettylist"]).out, "[]");
}

#[test]
fn jlist_is_one_line_of_json_whatever_the_terminal() {
    let home = Home::new();
    started(&home);
    let mut command = home.command(&["jlist"]);
    command.env("TERM", "xterm-256color").env("FORCE_COLOR", "1").env("CLICOLOR_FORCE", "1");
    let run = run(command, SOON);
    assert_eq!(run.out.trim_end().lines().count(), 1);
    run.json();
}
