//! Large inputs and small limits.

use std::process::Command;

use super::support::home::run;
use super::support::{Home, PATIENT, fixture, free_port, load, process};

/// `pm …` with a soft limit of 1,024 descriptors, as login shells have it.
fn at_nofile_1024(home: &Home, args: &[&str]) -> super::support::Run {
    let mut command = Command::new("sh");
    home.environment(&mut command);
    command.args(["-c", "ulimit -Sn 1024; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_pm")]).args(args);
    run(command, PATIENT)
}

#[test]
fn a_megabyte_of_environment_a_long_argument_and_2000_arguments_arrive() {
    let home = Home::new();
    // A single string has at most 128 KiB in Linux, hence ten variables of 100 KB.
    let variables: Vec<String> =
        (0..10).map(|n| format!("BIG{n} = '{}'", char::from(b'a' + n).to_string().repeat(100_000))).collect();
    let long = "z".repeat(100_000);
    let mut args = vec![format!("'{long}'")];
    args.extend((0..2000).map(|n| format!("'arg {n}'")));
    home.ecosystem(&format!(
        "[[apps]]\nname = 'big'\nscript = '{}'\nargs = [{}]\n[apps.env]\n{}\n",
        fixture("report.py"),
        args.join(", "),
        variables.join("\n")
    ));
    let run = at_nofile_1024(&home, &["start", "ecosystem.toml"]);
    assert_eq!(run.code, 0, "{run:?}");
    let report: serde_json::Value = serde_json::from_str(&home.file_with("report-0.json", "}")).unwrap();
    let argv = report["argv"].as_array().unwrap();
    assert_eq!(argv.len(), 2001);
    assert_eq!(argv[0].as_str().unwrap().len(), 100_000);
    assert_eq!(argv[2000], "arg 1999");
    for n in 0..10 {
        assert_eq!(report["env"][format!("BIG{n}")].as_str().unwrap().len(), 100_000);
    }
    assert_eq!(home.row("big").status, "online");
    home.ok(&["restart", "big"]);
    assert_eq!(home.row("big").status, "online");
}

#[test]
fn a_long_argument_on_the_command_line_arrives() {
    let home = Home::new();
    let long = "z".repeat(100_000);
    let mut args = vec!["start", "sleep", "--name", "job", "-x", "--", "1000"];
    let script = fixture("report.py");
    args.splice(1..2, [script.as_str()]);
    args.push(&long);
    let run = at_nofile_1024(&home, &args);
    assert_eq!(run.code, 0, "{run:?}");
    let report: serde_json::Value = serde_json::from_str(&home.file_with("report-0.json", "}")).unwrap();
    assert_eq!(report["argv"][1].as_str().unwrap().len(), 100_000);
}

#[test]
fn pain_16_three_hundred_instances_run_at_a_soft_limit_of_1024_and_get_that_limit() {
    let home = Home::loaded();
    home.ecosystem(
        "[[apps]]\nname = 'job'\nscript = 'sleep'\nargs = ['1000']\ninstances = 300\nexec_mode = 'fork'\n",
    );
    let run = at_nofile_1024(&home, &["start", "ecosystem.toml"]);
    assert_eq!(run.code, 0, "{run:?}");
    let rows = home.rows_of("job");
    assert_eq!(rows.len(), 300);
    assert!(rows.iter().all(|row| row.status == "online"));
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", rows[0].pid)).unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    assert_eq!(line.split_whitespace().nth(3), Some("1024"), "{line}");
    home.ok(&["delete", "all"]);
    assert_eq!(process::children(home.keeper()).len(), 1, "only the supervisor is left");
}

#[test]
fn a_line_of_100_mb_on_the_channel_does_not_grow_the_daemon_or_stop_the_app() {
    let home = Home::loaded();
    let port = free_port();
    home.write(
        "app.js",
        "const fs = require('fs');\n\
         require('http').createServer((q, r) => r.end('ok')).listen(Number(process.env.PORT), '127.0.0.1', () => {\n\
           const part = Buffer.alloc(1 << 20, 'x');\n\
           fs.writeSync(3, Buffer.from('\"'));\n\
           let left = 100, at = 0;\n\
           const more = () => {\n\
             try { for (; left > 0; left--, at = 0) while (at < part.length) at += fs.writeSync(3, part, at); }\n\
             catch (error) { if (error.code === 'EAGAIN') return setTimeout(more, 1); throw error; }\n\
             const end = () => { try { fs.writeSync(3, Buffer.from('\"\\n')); } catch { return setTimeout(end, 1); }\n\
               process.send('ready'); fs.writeFileSync('sent', 'all\\n'); };\n\
             end();\n\
           };\n\
           more();\n\
         });\n",
    );
    home.ecosystem(&format!(
        "[[apps]]\nname = 'big'\nscript = 'app.js'\nexec_mode = 'cluster'\ninstances = 1\nwait_ready = true\n\
         env = {{ PORT = '{port}' }}\n"
    ));
    let run = home.ok(&["start", "ecosystem.toml"]);
    assert!(run.took < PATIENT, "{run:?}");
    home.file_with("sent", "all");
    assert_eq!(load::get(port, "/").unwrap().body, "ok");
    let own = process::smaps_kib(home.supervisor(), "Pss_Anon");
    assert!(own < 40 * 1024, "{own} KiB of the supervisor's own");
}
