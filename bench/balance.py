"""Compares the ways to balance the connections of a Node cluster; see README.md beside this file.

    bench/balance.py --pm target/release/pm [--rounds N] [--json FILE] [POLICY ...]

Every measurement takes the policies in turn (and in another order each round), so that whatever else the machine does
hits all of them. Prints a table in Markdown.
"""

import argparse
import asyncio
import collections
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
POLICIES = ["round-robin", "least-connections", "sticky", "shared", "slots", "sticky-slots"]
SERVER = os.path.join(HERE, "balance.js")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class App:
    """One app under `pm`, with a daemon of its own."""

    def __init__(self, pm, root, balance, instances):
        self.pm = pm
        self.port = free_port()
        self.home = tempfile.mkdtemp(dir=root)
        self.env = {k: os.environ[k] for k in ("PATH", "HOME", "LANG") if k in os.environ}
        self.env["PM_HOME"] = self.home
        config = os.path.join(self.home, "bench.toml")
        with open(config, "w") as file:
            file.write(f"[[apps]]\nname = 'web'\nscript = '{SERVER}'\nexec_mode = 'cluster'\n"
                       f"instances = {instances}\nbalance = '{balance}'\nenv = {{ PORT = '{self.port}' }}\n")
        self.run("start", config)

    def run(self, *args):
        done = subprocess.run([self.pm, *args], env=self.env, cwd=self.home, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120)
        if done.returncode != 0:
            raise SystemExit(f"pm {' '.join(args)} failed:\n{done.stdout.decode()}")
        return done.stdout.decode()

    def workers(self):
        return [row["pid"] for row in json.loads(self.run("jlist"))]

    def supervisor(self):
        """The present one; a moment after the last one's death there is none."""
        while True:
            for entry in filter(str.isdigit, os.listdir("/proc")):
                try:
                    args = open(f"/proc/{entry}/cmdline", "rb").read().split(b"\0")
                    env = open(f"/proc/{entry}/environ", "rb").read().split(b"\0")
                except OSError:
                    continue
                if b"supervisor" in args and (self.home.encode() in args or f"PM_HOME={self.home}".encode() in env):
                    return int(entry)
            time.sleep(0.01)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.run("kill")


def client_address(n):
    """Clients have different addresses, or a policy that looks at them would have nothing to do."""
    return f"127.0.{1 + n // 250}.{1 + n % 250}"


def connect(port, n):
    stream = socket.socket()
    stream.settimeout(10)
    stream.bind((client_address(n), 0))
    stream.connect(("127.0.0.1", port))
    return stream


def ask(stream):
    stream.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    text = b""
    while not text.endswith(b"ok\n\r\n0\r\n\r\n") and not text.endswith(b"\r\n\r\nok\n"):
        more = stream.recv(4096)
        if not more:
            raise OSError("closed")
        text += more
    return re.search(rb"x-slot: (\d+)", text).group(1).decode()


def evenness(app, connections=200, rate=200):
    """Opens connections that stay, at most `rate` a second; returns how many each worker has."""
    kept, held = [], collections.Counter()
    begin = time.perf_counter()
    for n in range(connections):
        ahead = begin + n / rate - time.perf_counter()
        if ahead > 0:
            time.sleep(ahead)
        stream = connect(app.port, n)
        held[ask(stream)] += 1
        kept.append(stream)
    for stream in kept:
        stream.close()
    return [held.get(str(slot), 0) for slot in range(8)]


def per_second(app, seconds=3):
    """New connections per second, with a request on each."""
    done = subprocess.run(["wrk", "-t1", "-c32", f"-d{seconds}s", "-H", "Connection: close",
                           f"http://127.0.0.1:{app.port}/"], stdout=subprocess.PIPE, check=True)
    text = done.stdout.decode()
    errors = re.search(r"Socket errors: (.*)", text)
    if errors:
        print(f"wrk: {errors.group(1)}")
    return float(re.search(r"Requests/sec:\s+([\d.]+)", text).group(1))


def latencies(app, rate=100, seconds=5):
    """Requests at fixed times, each on a new connection, one in twenty blocks its worker for 40 ms."""
    async def one(at, n, path, out):
        await asyncio.sleep(max(0, at - loop_time()))
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", app.port,
                                                           local_addr=(client_address(n % 1000), 0))
            writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            await reader.read()
            writer.close()
            out.append((loop_time() - at) * 1000)
        except OSError as error:
            print(f"request failed: {error}")

    def loop_time():
        return asyncio.get_running_loop().time()

    async def every():
        out, dice = [], random.Random(7)
        begin = loop_time() + 0.1
        paths = ["/block" if dice.random() < 0.05 else "/" for _ in range(rate * seconds)]
        await asyncio.gather(*(one(begin + n / rate, n, path, out) for n, path in enumerate(paths)))
        return out

    out = sorted(asyncio.run(every()))
    return [out[int(len(out) * share)] for share in (0.5, 0.9, 0.99)]


def lost(app, victims, pause=0.7):
    """Sixteen clients that never retry; each victim is killed in turn. Returns requests and failures."""
    stop, done, failures = threading.Event(), [0] * 16, [0] * 16

    def client(n):
        turn = 0
        while not stop.is_set():
            turn += 1
            try:
                with connect(app.port, n * 60 + turn % 60) as stream:
                    ask(stream)
                done[n] += 1
            except (OSError, AttributeError):
                failures[n] += 1

    threads = [threading.Thread(target=client, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for victim in victims:
        time.sleep(pause)
        os.kill(victim(), signal.SIGKILL)
    time.sleep(1.5)
    stop.set()
    for thread in threads:
        thread.join()
    return sum(done), sum(failures)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--pm", default=os.path.join(HERE, "../target/release/pm"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write every number to this file")
    parser.add_argument("policies", nargs="*", default=POLICIES)
    asked = parser.parse_args()
    pm, policies = os.path.abspath(asked.pm), asked.policies
    root = tempfile.mkdtemp(prefix="pm-balance-")
    result = {policy: collections.defaultdict(list) for policy in policies}
    try:
        for policy in policies:
            with App(pm, root, policy, 8) as app:
                for _ in range(3):
                    result[policy]["held"].append(evenness(app))
                result[policy]["supervisor"].append(lost(app, [app.supervisor] * 3))
                workers = app.workers()
                result[policy]["worker"].append(lost(app, [lambda pid=pid: pid for pid in workers[:3]]))
        for measure, instances, key in ((per_second, 2, "rate"), (latencies, 4, "latency")):
            apps = {policy: App(pm, root, policy, instances) for policy in policies}
            try:
                for _ in range(asked.rounds):
                    for policy in random.sample(policies, len(policies)):
                        result[policy][key].append(measure(apps[policy]))
            finally:
                for app in apps.values():
                    app.run("kill")
    finally:
        shutil.rmtree(root, ignore_errors=True)
    if asked.json:
        with open(asked.json, "w") as file:
            json.dump(result, file, indent=1)
    show(result)


def show(result):
    base = result.get("shared") or next(iter(result.values()))
    print("| balance | connections of 8 workers, least–most of 200 | connections/s, 2 workers | of shared | "
          "p50 | p90 | p99, 4 workers, 5 % block 40 ms | lost: supervisor killed × 3 | lost: worker killed × 3 |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for policy, numbers in result.items():
        widest = max(numbers["held"], key=lambda held: max(held) - min(held))
        rate = statistics.median(numbers["rate"])
        ratio = statistics.median(mine / theirs for mine, theirs in zip(numbers["rate"], base["rate"]))
        late = [statistics.median(round_[n] for round_ in numbers["latency"]) for n in range(3)]
        killed = [f"{failed} of {done + failed:,}" for done, failed in (numbers["supervisor"][0], numbers["worker"][0])]
        print(f"| {policy} | {min(widest)}–{max(widest)} | {rate:,.0f} | {ratio:.2f} × | {late[0]:.1f} | {late[1]:.1f} | "
              f"{late[2]:.1f} | {killed[0]} | {killed[1]} |")


if __name__ == "__main__":
    main()
