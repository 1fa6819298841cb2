#!/usr/bin/env python3
"""What a control group for each instance costs: start, restart and delete of 100 processes, with and without, in turn.

    bench/groups.py [PM] [ROUNDS]

Needs root and cgroup v2; prints medians of all rounds and of the quotient of each pair.
"""
import os
import statistics
import subprocess
import sys
import tempfile
import time

PM = os.path.abspath(sys.argv[1] if len(sys.argv) > 1 else "target/release/pm")
ROUNDS = int(sys.argv[2]) if len(sys.argv) > 2 else 15
MOUNT = next(line.split(" ")[4] for line in open("/proc/self/mountinfo") if " - cgroup2 " in line)
APPS = "[[apps]]\nname = 'job'\nscript = 'sleep'\nargs = ['1000']\ninstances = 100\nexec_mode = 'fork'\n"


def once(group):
    with tempfile.TemporaryDirectory() as home:
        env = {"PATH": os.environ["PATH"], "HOME": home, "PM_HOME": home + "/pm"}
        if group:
            env["PM_CGROUP_ROOT"] = f"{MOUNT}/pm-bench"
        open(home + "/e.toml", "w").write(APPS)

        def pm(*args):
            begun = time.monotonic()
            subprocess.run([PM, *args], env=env, cwd=home, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            return time.monotonic() - begun

        # The daemon is there before anything is measured.
        pm("start", "sleep", "--name", "first", "--", "1000")
        times = {"start": pm("start", "e.toml"), "restart": pm("restart", "job"), "delete": pm("delete", "job")}
        pm("kill")
    if group:
        os.rmdir(f"{MOUNT}/pm-bench")
    return times


pairs = []
for number in range(ROUNDS):
    # Who goes first changes, so that neither profits from the other.
    order = [False, True] if number % 2 else [True, False]
    pairs.append({group: once(group) for group in order})
for what in ("start", "restart", "delete"):
    without, with_group = ([pair[group][what] for pair in pairs] for group in (False, True))
    ratio = statistics.median(b / a for a, b in zip(without, with_group))
    print(
        f"{what:8} without {statistics.median(without) * 1000:6.0f} ms, with {statistics.median(with_group) * 1000:6.0f} ms, "
        f"median of pairs {100 * (ratio - 1):+.1f} %"
    )
