#!/usr/bin/env python3
"""Upgrades in a row, under load: nothing may fail, and nothing may grow.

    bench/upgrade.py [--pm target/release/pm] [--other OTHER] [--upgrades 20] [--connections 16]

A daemon of one build is replaced by the other and back again while clients that never retry ask apps of three ways to
balance (round-robin, shared, slots), with a new connection for each request and with connections that are kept, while
an app writes numbered lines, and while one sends messages of 3 MB over its IPC channel and listens after each. `--other` is
a build of an earlier commit (tests/earlier.sh) unless given. Printed are failed requests, the slowest answer, how long
upgrades took, whether every pid stayed, whether every line is there once, whether every message was seen at least once
(where both builds log that) and every question behind one was answered, the exit code of an app that ends afterwards, and
memory, descriptors and threads of keeper and supervisor after the second upgrade and after the last. The exit code is 1
when anything of that is not as it should be.

`--control` replaces the daemon by `pm kill` and `pm resurrect`, which must fail requests.
"""

import argparse
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
SERVER = ROOT / "tests/fixtures/apps/web-textbook.js"
TALK = ROOT / "bench/talk.js"
# What the daemon logs of each message.
SEEN = "message of the app"
BALANCES = ("round-robin", "shared", "slots")
LIMIT = 15


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Clients:
    """Threads that ask until they are told to stop, and never twice for one answer."""

    def __init__(self, port, connections, keep):
        self.port, self.keep, self.stopped = port, keep, False
        self.ok, self.failed, self.slowest, self.why = 0, 0, 0.0, {}
        self.lock = threading.Lock()
        self.threads = [threading.Thread(target=self.ask) for _ in range(connections)]
        for thread in self.threads:
            thread.start()

    def ask(self):
        word = b"keep-alive" if self.keep else b"close"
        stream = None
        while not self.stopped:
            began = time.monotonic()
            try:
                if stream is None:
                    stream = socket.create_connection(("127.0.0.1", self.port), LIMIT)
                stream.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: " + word + b"\r\n\r\n")
                answer = b""
                while not answer.endswith(b" end\n"):
                    part = stream.recv(65536)
                    if not part:
                        raise ConnectionError("ended within an answer" if answer else "closed without an answer")
                    answer += part
                if not answer.startswith(b"HTTP/1.1 200"):
                    raise ConnectionError(repr(answer[:40]))
                failure = None
                if not self.keep or b"connection: close" in answer.lower().split(b"\r\n\r\n")[0]:
                    stream.close()
                    stream = None
            except OSError as error:
                failure, stream = f"{type(error).__name__}: {error}", None
            with self.lock:
                self.slowest = max(self.slowest, time.monotonic() - began)
                if failure:
                    self.failed += 1
                    self.why[failure] = self.why.get(failure, 0) + 1
                else:
                    self.ok += 1

    def stop(self):
        self.stopped = True
        for thread in self.threads:
            thread.join()


def census(pid):
    status = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
    pss = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("Pss:"))
    return {
        "pss_kib": pss,
        "fds": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": len(os.listdir(f"/proc/{pid}/task")),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pm", default=str(ROOT / "target/debug/pm"))
    parser.add_argument("--other")
    parser.add_argument("--upgrades", type=int, default=20)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--control", action="store_true")
    options = parser.parse_args()
    home = tempfile.mkdtemp(prefix="pm-upgrade-")
    other = options.other or subprocess.run([ROOT / "tests/earlier.sh"], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    if not other:
        print("no earlier commit in this clone: a copy with another content is the other build")
        other = f"{home}/pm-other"
        shutil.copy(options.pm, other)
        with open(other, "ab") as file:
            file.write(b"\n")
    programs = [options.pm, other]
    env = dict(os.environ, PM_HOME=f"{home}/home", NO_COLOR="1", PM_LOG="info,pm::dispatch=trace")

    def pm(*args, program=options.pm, check=True):
        run = subprocess.run([program, *args], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if check and run.returncode != 0:
            sys.exit(f"pm {args}: {run.returncode}\n{run.stdout}")
        return run

    ports = {balance: free_port() for balance in BALANCES}
    config = "".join(
        f"[[apps]]\nname = '{balance}'\nscript = '{SERVER}'\nexec_mode = 'cluster'\ninstances = 2\n"
        f"balance = '{balance}'\nenv = {{ PORT = '{port}' }}\n"
        for balance, port in ports.items()
    )
    config += f"[[apps]]\nname = 'talk'\nscript = '{TALK}'\nexec_mode = 'cluster'\ninstances = 1\nenv = {{ PORT = '{free_port()}' }}\n"
    (pathlib.Path(home) / "count.sh").write_text("i=0\nwhile :; do i=$((i+1)); echo $i; sleep 0.002; done\n")
    (pathlib.Path(home) / "ends.sh").write_text("trap 'exit 7' TERM\nwhile :; do sleep 0.05; done\n")
    for name, more in (("count", ""), ("ends", "autorestart = false\n")):
        config += f"[[apps]]\nname = '{name}'\nscript = '{home}/{name}.sh'\n{more}"
    (pathlib.Path(home) / "ecosystem.toml").write_text(config)
    good = True
    try:
        pm("start", f"{home}/ecosystem.toml", program=programs[0])
        rows = lambda: {f"{row['name']}:{row['pm_id']}": row for row in json.loads(pm("jlist").stdout)}
        pids = lambda: {name: row["pid"] for name, row in rows().items()}
        daemon = lambda: json.loads(pm("ping", "--json").stdout)
        answered = lambda: int(next((pathlib.Path(home) / "home/logs").glob("talk-out*")).read_text().split()[-1])
        before, keeper = pids(), daemon()["daemon_pid"]
        clients = {
            (balance, keep): Clients(port, 4 if keep else options.connections, keep)
            for balance, port in ports.items()
            for keep in (False, True)
        }
        time.sleep(1)
        took, first = [], None
        for number in range(options.upgrades):
            began = time.monotonic()
            if options.control:
                pm("kill")
                pm("resurrect", program=programs[(number + 1) % 2])
            else:
                pm("upgrade", programs[(number + 1) % 2])
            took.append(time.monotonic() - began)
            if number == 1:
                first = daemon()
                first = {"keeper": census(first["daemon_pid"]), "supervisor": census(first["supervisor_pid"])}
            # At another moment of messages and lines each time.
            time.sleep(random.uniform(0.2, 0.5))
        for some in clients.values():
            some.stop()
        now = daemon()
        final = {"keeper": census(now["daemon_pid"]), "supervisor": census(now["supervisor_pid"])}
        print(f"{options.upgrades} upgrades, median {statistics.median(took) * 1000:.0f} ms, longest {max(took) * 1000:.0f} ms")
        print("| app | connections | requests | failed | slowest |\n| --- | --- | ---: | ---: | ---: |")
        for (balance, keep), some in clients.items():
            kind = "kept" if keep else "one per request"
            print(f"| {balance} | {kind} | {some.ok:,} | {some.failed} | {some.slowest * 1000:.0f} ms |", some.why or "")
            good &= some.failed == 0
        same = pids() == before and now["daemon_pid"] == keeper
        print("every pid, the keeper's too, is as before:", same)
        present = pids()
        os.kill(present[next(name for name in present if name.startswith("ends"))], signal.SIGTERM)
        time.sleep(0.5)
        code = next(row for name, row in rows().items() if name.startswith("ends"))["pm2_env"].get("exit_code")
        print("exit code of an app that ended afterwards:", code)
        behind, deadline = answered(), time.monotonic() + LIMIT
        while (further := answered()) == behind and time.monotonic() < deadline:
            time.sleep(0.1)
        pm("stop", "count", "talk")
        last = answered()
        print(f"{last} messages of 3 MB, every question behind one answered:", further > behind)
        good &= further > behind
        if all(SEEN.encode() in pathlib.Path(program).read_bytes() for program in programs):
            log = (pathlib.Path(home) / "home/pm.log").read_text()
            lengths = {len('{"n":,"text":""}') + len(str(n)) + 3_000_000 + n: n for n in range(1, last + 2)}
            seen = [lengths.get(int(found[1])) for found in re.finditer(rf"{SEEN} .*?length=(\d{{7,}})", log)]
            missing, torn = sum(n not in seen for n in range(1, last + 1)), seen.count(None)
            print(f"messages seen: {len(seen)}, {len(seen) - len(set(seen))} of them again, {missing} missing, {torn} torn")
            good &= missing == torn == 0
        else:
            print("messages seen: not told by one of the builds")
        lines = [int(line) for line in (pathlib.Path(home) / "home/logs/count-out.log").read_text().split()]
        whole = lines == list(range(1, len(lines) + 1))
        print(f"{len(lines):,} numbered lines, every one once:", whole)
        for name in ("keeper", "supervisor"):
            print(f"{name}: after 2 upgrades {first[name]}, after {options.upgrades} {final[name]}")
            # A listener or a long message that is on its way may be there in one moment and not in another.
            flat = final[name]["fds"] <= first[name]["fds"] + 2 and final[name]["threads"] <= first[name]["threads"]
            good &= flat and final[name]["pss_kib"] < first[name]["pss_kib"] * 1.25 + 512
        good &= same and whole and code == 7
    finally:
        pm("kill", check=False)
        shutil.rmtree(home, ignore_errors=True)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
