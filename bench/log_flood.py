"""Ten apps print 10,000 lines of 100 bytes per second each, onto a disk that takes 1 MB/s and then nothing.

    python3 bench/log_flood.py --pm target/release/pm [--minutes 30]

Two thirds of the time the disk is slow, then full. Fails when the supervisor ever uses 40 MB (RSS), when an app ever
waited more than a second for a write, when what was dropped is not shown, or when a process was replaced. Needs root and
/dev/fuse.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIMIT_KIB = 40 * 1000 * 1000 // 1024

FLOOD = """
import os, time
me = os.environ['NODE_APP_INSTANCE']
text = b''.join(b'%08d ' % i + b'y' * 90 + b'\\n' for i in range(50))
lines, longest, begin, told = 0, 0.0, time.monotonic(), 0.0
while True:
    due = (time.monotonic() - begin) * 10000
    while lines < due:
        before = time.monotonic()
        left = text
        while left:
            left = left[os.write(1, left):]
        longest = max(longest, time.monotonic() - before)
        lines += 50
    if time.monotonic() - told > 1:
        told = time.monotonic()
        open('new-' + me, 'w').write(f'{lines} {longest}')
        os.rename('new-' + me, 'sofar-' + me)
    time.sleep(0.005)
"""

CONFIG = """
[[apps]]
name = "flood"
script = "flood.py"
instances = 10
exec_mode = "fork"
merge_logs = false
out_file = "disk/flood.log"
"""


def kib(pid, field):
    for line in open(f"/proc/{pid}/status"):
        if line.startswith(field):
            return int(line.split()[1])
    raise KeyError(field)


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--pm", default="target/release/pm")
    options.add_argument("--minutes", type=float, default=30)
    options = options.parse_args()
    pm = os.path.abspath(options.pm)
    home = tempfile.mkdtemp(prefix="log-flood-")
    work = pathlib.Path(home, "work")
    (work / "disk").mkdir(parents=True)
    (work / "flood.py").write_text(FLOOD)
    (work / "ecosystem.toml").write_text(CONFIG)
    speed = work / "speed"

    def disk_is(how):
        (work / "speed.new").write_text(how)
        (work / "speed.new").rename(speed)

    def run(*args):
        env = dict(os.environ, PM_HOME=os.path.join(home, "home"), NO_COLOR="1")
        done = subprocess.run([pm, *args], env=env, cwd=work, capture_output=True, text=True, check=True)
        return done.stdout if args == ("jlist",) else done.stdout + done.stderr

    disk_is("1000000")
    disk = subprocess.Popen(
        [sys.executable, ROOT / "tests/fixtures/slow_disk.py", work / "disk", speed],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )
    faults = []
    try:
        if disk.stdout.readline() != "mounted\n":
            sys.exit("cannot mount a slow disk: are you root, and is there /dev/fuse?")
        run("start", "ecosystem.toml")
        rows = json.loads(run("jlist"))
        pids = sorted(row["pid"] for row in rows)
        keeper = int(open(os.path.join(home, "home/pm.lock")).read())
        children = open(f"/proc/{keeper}/task/{keeper}/children").read().split()
        supervisor = next(pid for pid in children if b"supervisor" in open(f"/proc/{pid}/cmdline", "rb").read())
        begin, full, most = time.monotonic(), False, 0
        while (passed := time.monotonic() - begin) < options.minutes * 60:
            if not full and passed > options.minutes * 40:
                full = True
                print(f"slow for {passed:.0f} s: supervisor at most {most} KiB", flush=True)
                disk_is("full")
            most = max(most, kib(supervisor, "VmRSS"))
            time.sleep(0.5)
        sofar = [(work / f"sofar-{n}").read_text().split() for n in range(10)]
        lines, waits = [int(one[0]) for one in sofar], [float(one[1]) for one in sofar]
        took = time.monotonic() - begin
        print(f"{took:.0f} s, {sum(lines):,} lines, {min(lines) / took:,.0f} to {max(lines) / took:,.0f} per second and app")
        print(f"longest write of an app: {max(waits) * 1000:.0f} ms")
        print(f"supervisor: {most} KiB at most (VmHWM {kib(supervisor, 'VmHWM')}), keeper {kib(keeper, 'VmHWM')} KiB")
        notes = [line.strip() for line in run("describe", "flood").splitlines() if "were dropped" in line]
        print(f"{len(notes)} notes in describe, such as: {notes[0] if notes else None}")
        if most >= LIMIT_KIB:
            faults.append(f"the supervisor has used {most} KiB")
        if max(waits) > 1:
            faults.append(f"an app has waited {max(waits):.1f} s for a write")
        if len(notes) < 10 or "were dropped" not in run("list"):
            faults.append("what was dropped is not shown")
        if sorted(row["pid"] for row in json.loads(run("jlist"))) != pids:
            faults.append("processes were replaced")
    finally:
        disk_is("fast")
        run("kill")
        disk.stdin.close()
        disk.wait(timeout=30)
        shutil.rmtree(home, ignore_errors=True)
    for fault in faults:
        print(f"FAILED: {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
