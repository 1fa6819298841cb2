#!/usr/bin/env python3
"""Reloads under clients that keep their connections, pm and PM2 side by side.

    bench/keepalive.sh                                   # everything; hours
    bench/keepalive.sh --reloads 50 --connections 16 --kinds http --handlers none --nodes 20,22

For each Node, kind (http, https, http2) and handler (textbook, naive, none) there is an app with two workers (or
--instances). Under pm all apps of one Node run in one daemon and are reloaded at the same time; under PM2 likewise. Clients
never retry; those of the control run for as long without a reload. A connection whose end was seen before a request is sent
is replaced and counts as nothing.
"""

import argparse
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
APP = ROOT / "tests/fixtures/apps/web-kinds.js"
CLIENT = ROOT / "tests/fixtures/load/keepalive.js"
FAILURES = ("refused", "reset", "truncated", "stalled")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Clients:
    """One process of clients; `node` is the same for all, so that only servers differ."""

    def __init__(self, kind, port, connections, idle):
        options = {"kind": kind, "port": port, "connections": connections, "idle": idle}
        self.out = tempfile.TemporaryFile(mode="w+")
        self.process = subprocess.Popen(
            ["node", str(CLIENT), json.dumps(options)], stdin=subprocess.PIPE, stdout=self.out
        )

    def stop(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.out.seek(0)
        return json.loads(self.out.read().splitlines()[-1])


class Tool:
    """pm or PM2 with a home of its own."""

    def __init__(self, name, command, variable):
        self.name, self.command = name, command
        self.home = tempfile.mkdtemp(prefix=f"keepalive-{name}-")
        self.env = dict(os.environ, **{variable: self.home}, NO_COLOR="1", PM2_DISABLE_VERSION_CHECK="true")

    def run(self, *args, check=True):
        done = subprocess.run([*self.command, *args], env=self.env, capture_output=True, text=True)
        if check and done.returncode != 0:
            sys.exit(f"{self.name} {args}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def start(self, cells, node, instances):
        apps = [
            {
                "name": cell.name,
                "script": str(APP),
                "exec_mode": "cluster",
                "instances": instances,
                "interpreter": node,
                "env": {"PORT": str(cell.port), "KIND": cell.kind, "HANDLER": cell.handler},
            }
            for cell in cells
        ]
        if self.name == "pm2":
            # Its cluster mode runs apps with the Node of its daemon.
            for app in apps:
                del app["interpreter"]
            self.env["PATH"] = f"{pathlib.Path(node).parent}:{os.environ['PATH']}"
        config = pathlib.Path(self.home) / "ecosystem.json"
        config.write_text(json.dumps({"apps": apps}))
        self.run("start", str(config))

    def end(self):
        self.run("kill", check=False)
        shutil.rmtree(self.home, ignore_errors=True)


class Pm(Tool):
    """pm reads TOML."""

    def start(self, cells, node, instances):
        text = "".join(
            f"[[apps]]\nname = '{cell.name}'\nscript = '{APP}'\nexec_mode = 'cluster'\ninstances = {instances}\n"
            f"interpreter = '{node}'\nenv = {{ PORT = '{cell.port}', KIND = '{cell.kind}', HANDLER = '{cell.handler}' }}\n"
            for cell in cells
        )
        config = pathlib.Path(self.home) / "apps.toml"
        config.write_text(text)
        self.run("start", str(config))


class Cell:
    def __init__(self, kind, handler):
        self.kind, self.handler = kind, handler
        self.name = f"{kind}-{handler}"
        self.port = free_port()


def wait_open(cells):
    for cell in cells:
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", cell.port), timeout=1).close()
                break
            except OSError:
                if time.monotonic() > deadline:
                    sys.exit(f"{cell.name} does not listen")
                time.sleep(0.05)


def measure(tool, node, args, reloads):
    """A row for each app: what its clients saw during the reloads, and in the control before them."""
    cells = [Cell(kind, handler) for kind in args.kinds for handler in args.handlers]
    try:
        tool.start(cells, node, args.instances)
        wait_open(cells)
        control = [Clients(c.kind, c.port, args.connections, args.idle) for c in cells]
        time.sleep(args.control)
        control = [clients.stop() for clients in control]
        clients = [Clients(c.kind, c.port, args.connections, args.idle) for c in cells]
        time.sleep(1)
        begin = time.monotonic()
        for _ in range(reloads):
            running = [
                subprocess.Popen([*tool.command, "reload", c.name], env=tool.env, stdout=subprocess.DEVNULL,
                                 stderr=subprocess.DEVNULL)
                for c in cells
            ]
            for reload in running:
                if reload.wait() != 0 and tool.name == "pm":
                    sys.exit("a reload failed")
        took = (time.monotonic() - begin) / reloads
        time.sleep(1)
        seen = [one.stop() for one in clients]
        return [(cell, before, after, took) for cell, before, after in zip(cells, control, seen)]
    finally:
        tool.end()


def failures(seen):
    return sum(seen[what] for what in FAILURES)


def main():
    words = lambda text: [word for word in text.split(",") if word]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pm", default=str(ROOT / "target/release/pm"))
    parser.add_argument("--pm2", default="", help="path of PM2's script; without it only pm is measured")
    parser.add_argument("--nodes", type=words, default=["node"], help="binaries")
    parser.add_argument("--kinds", type=words, default=["http", "https", "http2"])
    parser.add_argument("--handlers", type=words, default=["textbook", "naive", "none"])
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--instances", type=int, default=2)
    parser.add_argument("--idle", type=int, default=4000, help="ms")
    parser.add_argument("--reloads", type=int, default=50)
    parser.add_argument("--pm2-reloads", type=int, default=5)
    parser.add_argument("--control", type=float, default=10, help="seconds of clients without a reload")
    args = parser.parse_args()
    print("| tool | Node | app | connections | requests | refused | reset | truncated | stalled | reload | without a reload |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    bad = 0
    for node in args.nodes:
        node = shutil.which(node) or node
        version = subprocess.run([node, "--version"], capture_output=True, text=True).stdout.strip()
        tools = [(Pm("pm", [args.pm], "PM_HOME"), args.reloads)]
        if args.pm2:
            tools.append((Tool("pm2", [node, args.pm2], "PM2_HOME"), args.pm2_reloads))
        for tool, reloads in tools:
            for cell, control, seen, took in measure(tool, node, args, reloads):
                print(
                    f"| {tool.name}, {reloads} reloads | {version} | {cell.name} | {args.connections} | {seen['requests']:,} | "
                    + " | ".join(str(seen[what]) for what in FAILURES)
                    + f" | {took:.1f} s | {failures(control)} of {control['requests']:,} failed |",
                    flush=True,
                )
                if tool.name == "pm":
                    bad += failures(seen)
                    for why in seen["why"]:
                        print(f"  {why}", file=sys.stderr)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
