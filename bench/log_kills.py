"""Kills the supervisor at random moments while apps write numbered lines, and counts what is lost, doubled or out of order.

    python3 bench/log_kills.py --pm target/release/pm [--kills 200] [--seed N]

Four apps write some thousand lines per second: raw, with time stamps, two instances into one file, and lines of up to 3 KB in
pieces. (Not into one file: a line whose end does not come within 200 ms is written as it is, and a busy machine takes that long.)
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time

COUNT = """
import os, sys, time
me = sys.argv[1] + os.environ['NODE_APP_INSTANCE']
n = 0
while not os.path.exists('end'):
    for _ in range(100):
        line = b'%s %d %s\\n' % (me.encode(), n, b'x' * (n * 37 % int(sys.argv[2])))
        cut = len(line) // 2 if len(line) > 1000 else len(line)
        os.write(1, line[:cut])
        if cut < len(line): os.write(1, line[cut:])
        n += 1
    time.sleep(0.02)
open('count-' + me, 'w').write(f'{n}.')
time.sleep(1000)
"""

CONFIG = """
[[apps]]
name = "raw"
script = "count.py"
args = ["raw", "90"]
[[apps]]
name = "stamped"
script = "count.py"
args = ["stamped", "90"]
time = true
[[apps]]
name = "merged"
script = "count.py"
args = ["merged", "90"]
instances = 2
exec_mode = "fork"
merge_logs = true
[[apps]]
name = "long"
script = "count.py"
args = ["long", "3000"]
log_date_format = "HH:mm:ss.SSS"
"""
WRITERS = [("raw0", "raw", 0), ("stamped0", "stamped", 21), ("merged0", "merged", 0), ("merged1", "merged", 0),
           ("long0", "long", 14)]


def supervisor(home):
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            args = open(f"/proc/{entry}/cmdline", "rb").read().split(b"\0")
        except OSError:
            continue
        if b"supervisor" in args and home.encode() in args:
            return int(entry)
    return None


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--pm", required=True)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**9)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    root = tempfile.mkdtemp(prefix="pm-log-kills-")
    home = os.path.join(root, "home")
    env = {**os.environ, "PM_HOME": home}
    pm = lambda *args: subprocess.run([os.path.abspath(options.pm), *args], cwd=root, env=env, check=True,
                                      stdout=subprocess.DEVNULL)
    with open(os.path.join(root, "count.py"), "w") as file:
        file.write(COUNT)
    with open(os.path.join(root, "ecosystem.toml"), "w") as file:
        file.write(CONFIG)
    faults = 0
    try:
        pm("start", "ecosystem.toml")
        kills, began = 0, time.monotonic()
        while kills < options.kills:
            # Mostly long-lived ones: those that die at once get their successor late.
            time.sleep(chance.choice([0.01, 0.1, 0.5, 2.1]) * chance.random() * 2)
            pid = supervisor(home)
            if pid:
                os.kill(pid, signal.SIGKILL)
                kills += 1
        open(os.path.join(root, "end"), "w").close()
        print(f"seed {options.seed}: {kills} kills in {time.monotonic() - began:.0f} s")
        for me, app, prefix in WRITERS:
            path, counted = os.path.join(home, "logs", f"{app}-out.log"), os.path.join(root, f"count-{me}")
            deadline = time.monotonic() + 60
            text = lambda file: open(file).read() if os.path.exists(file) else ""
            while not text(counted).endswith(".") and time.monotonic() < deadline:
                time.sleep(0.1)
            count = int(text(counted).rstrip("."))
            while f"{me} {count - 1} " not in text(path)[-100_000:] and time.monotonic() < deadline:
                time.sleep(0.1)
            wrong, following, dropped = 0, 0, 0
            with open(path) as file:
                for line in file:
                    words = line[prefix:].rstrip("\n").split(" ")
                    dropped += line.startswith("[pm] ")
                    if words[0] != me:
                        continue
                    limit = 3000 if app == "long" else 90
                    whole = len(words) == 3 and words[2] == "x" * (following * 37 % limit)
                    if words[1] != str(following) or not whole:
                        wrong += 1
                        print(f"{me}: line {following} expected: {line[:60]!r} … {line[-60:]!r}")
                    following = int(words[1]) + 1 if words[1].isdigit() else following + 1
            wrong += following != count
            print(f"{me:<10} {count:>9} lines, {os.path.getsize(path) / 1e6:>7.1f} MB in its file, {wrong} wrong"
                  + (f", {dropped} notices of a slow disk" if dropped else ""))
            faults += wrong
    finally:
        subprocess.run([os.path.abspath(options.pm), "kill"], env=env, cwd=root, stdout=subprocess.DEVNULL)
        shutil.rmtree(root, ignore_errors=True)
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
