//! What the log pump costs, beside `cat > file` in the same minute: prints CPU seconds and ratios.
//!
//! `cargo bench --bench logs [-- MEGABYTES]`. The writer is this program itself, run again with `--write`.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike as _;
use nix::unistd::pipe2;
use pm::logs::stamp::{DEFAULT_FORMAT, Stamp};
use pm::logs::{Attachment, Journal, LogEvent, Pipe, Target, spawn};
use pm::model::id::{AppName, Generation, InstanceId, Slot};
use pm::model::spec::Overflow;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    if let [flag, megabytes, size] = &args[..]
        && flag == "--write"
    {
        return write_lines(megabytes.parse()?, size.parse()?);
    }
    let megabytes: usize = args.first().map_or(Ok(200), |text| text.parse())?;
    let dir = tempfile::tempdir()?;
    let mut out = io::stdout().lock();
    writeln!(out, "{megabytes} MB of 100-byte lines      wall      CPU   CPU of cat")?;
    // How the app writes decides how often a reader wakes up.
    for (what, write_size) in [("64 KiB per write", 65_500), ("one line per write", 100)] {
        let cat = median(|| run_cat(dir.path(), megabytes, write_size))?;
        show(&mut out, &format!("cat > file, {what}"), cat, cat)?;
        for (name, stamp) in [("raw", None), ("stamped", Stamp::new(DEFAULT_FORMAT))] {
            let ours = median(|| run_pump(dir.path(), megabytes, write_size, stamp.clone()))?;
            show(&mut out, &format!("pump {name}, {what}"), ours, cat)?;
        }
    }
    Ok(())
}

#[derive(Clone, Copy)]
struct Cost {
    wall: Duration,
    cpu: Duration,
}

fn show(out: &mut impl io::Write, what: &str, cost: Cost, cat: Cost) -> io::Result<()> {
    let ratio = cost.cpu.as_secs_f64() / cat.cpu.as_secs_f64();
    let (wall, cpu) = (cost.wall.as_secs_f64(), cost.cpu.as_secs_f64());
    writeln!(out, "{what:<32} {wall:>7.2} s {cpu:>7.2} s   {ratio:>5.2} x")
}

fn median(mut run: impl FnMut() -> Result<Cost, Failure>) -> Result<Cost, Failure> {
    let mut costs = [run()?, run()?, run()?];
    costs.sort_by_key(|cost| cost.cpu);
    Ok(costs[1])
}

fn write_lines(megabytes: usize, write_size: usize) -> Result<(), Failure> {
    let mut line = vec![b'x'; 99];
    line.push(b'\n');
    let block = line.repeat(write_size / 100);
    let mut left = megabytes * 1_000_000;
    let mut out = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    while left > 0 {
        let count = left.min(block.len());
        out.write_all(&block[..count])?;
        left -= count;
    }
    Ok(())
}

fn writer(megabytes: usize, write_size: usize, out: Stdio) -> io::Result<std::process::Child> {
    Command::new(std::env::current_exe()?)
        .args(["--write", &megabytes.to_string(), &write_size.to_string()])
        .stdout(out)
        .spawn()
}

fn run_cat(dir: &Path, megabytes: usize, write_size: usize) -> Result<Cost, Failure> {
    let path = dir.join("cat.log");
    let (read_end, write_end) = pipe2(OFlag::O_CLOEXEC)?;
    let begin = Instant::now();
    // cat is a grandchild: the shell prints what `times` says of its children.
    let cat = Command::new("sh")
        .args(["-c", "cat > \"$0\"; times"])
        .arg(&path)
        .stdin(read_end)
        .stdout(Stdio::piped())
        .spawn()?;
    writer(megabytes, write_size, write_end.into())?.wait()?;
    let times = String::from_utf8(cat.wait_with_output()?.stdout)?;
    let wall = Instant::now().duration_since(begin);
    assert_eq!(fs::metadata(&path)?.len(), megabytes as u64 * 1_000_000);
    fs::remove_file(&path)?;
    let children = times.lines().nth(1).ok_or("no times")?;
    let cpu = children.split_whitespace().map(seconds).sum::<Option<f64>>().ok_or("no times")?;
    Ok(Cost { wall, cpu: Duration::from_secs_f64(cpu) })
}

/// `0m1.250000s`
fn seconds(text: &str) -> Option<f64> {
    let (minutes, seconds) = text.trim_end_matches('s').split_once('m')?;
    Some(minutes.parse::<f64>().ok()? * 60.0 + seconds.parse::<f64>().ok()?)
}

fn run_pump(dir: &Path, megabytes: usize, write_size: usize, stamp: Option<Stamp>) -> Result<Cost, Failure> {
    let path = dir.join("pump.log");
    let (drained_tx, drained_rx) = mpsc::channel();
    let id = InstanceId { app: AppName::new("bench")?, slot: Slot(0), generation: Generation(1) };
    let (read_end, write_end) = pipe2(OFlag::O_CLOEXEC)?;
    let begin = Instant::now();
    let cpu_before = own_cpu()?;
    let logs = spawn(Journal::private()?, move |event| {
        if matches!(event, LogEvent::Drained { .. }) {
            let _ = drained_tx.send(());
        }
    })?;
    let out = Some(Pipe { fd: read_end, target: Target::file(path.clone(), None) });
    let is_raw = stamp.is_none();
    logs.attach(Attachment {
        id: id.clone(),
        out,
        err: None,
        stamp,
        mark: String::new(),
        overflow: Overflow::Drop,
        watch: None,
    })?;
    writer(megabytes, write_size, write_end.into())?.wait()?;
    logs.finish(id);
    drained_rx.recv_timeout(Duration::from_secs(60))?;
    let cost =
        Cost { wall: Instant::now().duration_since(begin), cpu: own_cpu()?.saturating_sub(cpu_before) };
    let size = fs::metadata(&path)?.len();
    assert!(size == megabytes as u64 * 1_000_000 || (!is_raw && size > megabytes as u64 * 1_000_000));
    fs::remove_file(&path)?;
    Ok(cost)
}

fn own_cpu() -> Result<Duration, Failure> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Ok(Duration::from_micros(u64::try_from(micros)?))
}
