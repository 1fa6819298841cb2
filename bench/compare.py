"""Alternates pm and PM2 in one run and prints medians and ratios. Started by compare.sh; see README.md."""

import argparse
import contextlib
import json
import os
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
LIMIT = 300  # seconds that any command may take


class Tool:
    """One of the two, with a home of its own."""

    def __init__(self, name, binary, root):
        self.name = name
        self.binary = binary
        self.home = os.path.join(root, name)
        os.makedirs(self.home, mode=0o700)
        self.env = {k: os.environ[k] for k in ("PATH", "HOME", "LANG", "USER") if k in os.environ}
        self.env.update({"PM_HOME": self.home, "PM2_HOME": self.home, "PM2_DISABLE_VERSION_CHECK": "true"})

    def run(self, *args, check=True, env=None):
        """Runs a command and returns seconds and standard output."""
        start = time.perf_counter()
        done = subprocess.run([self.binary, *args], env={**self.env, **(env or {})}, cwd=self.home, timeout=LIMIT,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        took = time.perf_counter() - start
        if check and done.returncode != 0:
            raise SystemExit(f"{self.name} {' '.join(args)} failed with {done.returncode}:\n{done.stdout.decode()}")
        return took, done.stdout.decode(errors="replace")

    def rows(self):
        text = self.run("jlist")[1]
        return json.loads(text[text.index("["):])

    def kill(self):
        with contextlib.suppress(Exception):
            self.run("kill", check=False)

    def start(self, apps, *more, env=None):
        return self.run("start", self.config(apps), *more, env=env)[0]

    def daemon_pss(self, apps):
        """KiB of all daemon processes: those with this home that are no apps (given by pid)."""
        total = 0
        for pid in self.daemons():
            if pid not in apps:
                with open(f"/proc/{pid}/smaps_rollup") as file:
                    total += int(re.search(r"^Pss:\s+(\d+)", file.read(), re.M).group(1))
        return total

    def daemon_cpu(self):
        """Seconds of CPU time that all daemon processes have used."""
        return cpu_of(self.daemons())

    def daemon_holds(self):
        """KiB of private memory, descriptors and threads of all daemon processes."""
        held = [0, 0, 0]
        for pid in self.daemons():
            with open(f"/proc/{pid}/smaps_rollup") as file:
                held[0] += int(re.search(r"^Private_Dirty:\s+(\d+)", file.read(), re.M).group(1))
            held[1] += len(os.listdir(f"/proc/{pid}/fd"))
            held[2] += len(os.listdir(f"/proc/{pid}/task"))
        return held


def cpu_of(pids):
    """Seconds of CPU time that these processes have used."""
    nanoseconds = 0
    for pid in pids:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(FileNotFoundError), open(f"/proc/{pid}/task/{thread}/schedstat") as file:
                nanoseconds += int(file.read().split()[0])
    return nanoseconds / 1e9


class Pm(Tool):
    def config(self, apps):
        path = os.path.join(self.home, "bench.toml")
        with open(path, "w") as file:
            for app in apps:
                file.write("[[apps]]\n")
                for key, value in app.items():
                    if value is not None:
                        pairs = "{ " + ", ".join(f"{k} = {json.dumps(v)}" for k, v in value.items()) + " }" \
                            if isinstance(value, dict) else json.dumps(value)
                        file.write(f"{key} = {pairs}\n")
        return path

    def daemons(self):
        found = []
        for entry in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                args = open(f"/proc/{entry}/cmdline", "rb").read().split(b"\0")
                env = open(f"/proc/{entry}/environ", "rb").read().split(b"\0")
                here = f"PM_HOME={self.home}".encode() in env or self.home.encode() in args
                if here and (b"daemon" in args or b"supervisor" in args):
                    found.append(int(entry))
        return found


class Pm2(Tool):
    def config(self, apps):
        path = os.path.join(self.home, "bench.config.js")
        shown = [{k: v for k, v in app.items() if k not in ("balance", "min_uptime") and v is not None} for app in apps]
        with open(path, "w") as file:
            file.write("module.exports = " + json.dumps({"apps": shown}))
        return path

    def daemons(self):
        with open(os.path.join(self.home, "pm2.pid")) as file:
            return [int(file.read())]


def idle(count):
    return [{"name": f"idle-{n}", "script": "/bin/sleep", "args": ["100000"], "interpreter": "none"}
            for n in range(count)]


def web(port, balance="round-robin"):
    return [{"name": "web", "script": os.path.join(HERE, "web.js"), "exec_mode": "cluster", "instances": 2,
             "wait_ready": True, "balance": balance, "env": {"PORT": str(port)}}]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def show(what, ours, theirs, unit, better="less"):
    a, b = statistics.median(ours), statistics.median(theirs)
    ratio = (b / a if better == "less" else a / b) if a and b else float("nan")
    print(f"{what:<52} {a:>11.1f} {b:>11.1f} {unit:<4} {ratio:>7.2f} x", flush=True)


def alternate(rounds, *measures):
    """Calls the measures in turn and returns their results."""
    results = [[] for _ in measures]
    for _ in range(rounds):
        for n, measure in enumerate(measures):
            results[n].append(measure())
    return results


def measure_jlist(pm, pm2, options):
    for count in (0, 100) if options.quick else (0, 100, 1000):
        for tool in (pm, pm2):
            tool.kill()
            # A first app and its deletion, so that a daemon runs with 0 apps, too.
            tool.start(idle(max(count, 1)))
            if count == 0:
                tool.run("delete", "all")
            assert len(tool.rows()) == count, f"{tool.name} runs {len(tool.rows())} of {count}"
        # The first call after a start may have more to do than later ones.
        rounds = 5 if count == 1000 else 11
        ours, theirs = alternate(rounds, lambda: pm.run("jlist")[0] * 1000, lambda: pm2.run("jlist")[0] * 1000)
        show(f"jlist, {count} apps", ours, theirs, "ms")
    pm.kill()
    pm2.kill()


def measure_memory(pm, pm2, options):
    for count in (0, 100):
        for tool in (pm, pm2):
            tool.kill()
            tool.start(idle(max(count, 1)))
            if count == 0:
                tool.run("delete", "all")
        # Fresh files, the program itself among them, count as private until they are on the disk.
        os.sync()
        apps = {row["pid"] for tool in (pm, pm2) for row in tool.rows()}
        time.sleep(3)
        show(f"memory of the daemon (PSS), {count} apps", [pm.daemon_pss(apps) / 1024], [pm2.daemon_pss(apps) / 1024],
             "MiB")
    pm.kill()
    pm2.kill()


def measure_bulk(pm, pm2, options):
    rounds = 1 if options.quick else 3
    times = {}

    def cycle(tool, *more):
        tool.kill()
        tool.start(idle(1))
        tool.run("delete", "all")
        note = lambda what, took: times.setdefault((tool.name, what), []).append(took * 1000)
        note("start" + "".join(more), tool.start(idle(100), *more))
        if not more:
            note("restart", tool.run("restart", "all")[0])
            assert all(row["pm2_env"]["status"] == "online" for row in tool.rows())
            note("delete", tool.run("delete", "all")[0])
        else:
            tool.run("delete", "all")

    alternate(rounds, lambda: cycle(pm), lambda: cycle(pm, "--no-wait"), lambda: cycle(pm2))
    show("start 100, pm --no-wait", times["pm", "start--no-wait"], times["pm2", "start"], "ms")
    show("start 100, pm waits until they run", times["pm", "start"], times["pm2", "start"], "ms")
    show("restart 100", times["pm", "restart"], times["pm2", "restart"], "ms")
    show("delete 100", times["pm", "delete"], times["pm2", "delete"], "ms")
    pm.kill()
    pm2.kill()


def measure_respawn(pm, pm2, options):
    rounds = 5 if options.quick else 15

    def once(tool):
        # A fresh app each time: the first crash restarts at once.
        stamps = os.path.join(tool.home, "stamps")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(stamps)
        script = os.path.join(tool.home, "stamp.sh")
        with open(script, "w") as file:
            file.write(f"date +%s%N >>{stamps}\nexec sleep 100000\n")
        tool.start([{"name": "stamp", "script": script, "interpreter": "sh"}])
        wait(lambda: os.path.exists(stamps) and lines(stamps) == 1)
        time.sleep(0.3)
        pid = tool.rows()[0]["pid"]
        killed = time.time_ns()
        os.kill(pid, signal.SIGKILL)
        wait(lambda: lines(stamps) == 2)
        took = (int(open(stamps).read().split()[1]) - killed) / 1e6
        tool.run("delete", "all")
        return took

    ours, theirs = alternate(rounds, lambda: once(pm), lambda: once(pm2))
    show("SIGKILL until the successor runs", ours, theirs, "ms")
    pm.kill()
    pm2.kill()


def measure_idle(pm, pm2, options):
    seconds = 10 if options.quick else 60
    used = {}
    for tool in (pm, pm2):
        tool.kill()
        tool.start(idle(100))
    time.sleep(3)
    before = {tool.name: tool.daemon_cpu() for tool in (pm, pm2)}
    time.sleep(seconds)
    for tool in (pm, pm2):
        used[tool.name] = (tool.daemon_cpu() - before[tool.name]) / seconds * 100
    show(f"CPU of the daemon, 100 idle apps, {seconds} s", [used["pm"]], [used["pm2"]], "%")
    pm.kill()
    pm2.kill()


def measure_logs(pm, pm2, options):
    size = (50 if options.quick else 200) << 20
    line = b"x" * 99 + b"\n"
    source = os.path.join(pm.home, "lines.txt")
    with open(source, "wb") as file:
        for _ in range(size // len(line) // 1000):
            file.write(line * 1000)
    size = os.path.getsize(source)
    times = {}

    def through(tool, stamps):
        out = os.path.join(tool.home, "out.log")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(out)
        # Beside the daemon nothing runs that could be counted as its children.
        tool.start(idle(1))
        before, began = tool.daemon_cpu(), time.perf_counter()
        tool.start([{"name": "lines", "script": "/bin/cat", "args": [source], "interpreter": "none",
                     "autorestart": False, "out_file": out, "time": stamps}], *(["--no-wait"] if tool is pm else []))
        grown = lambda: os.path.exists(out) and os.path.getsize(out) >= size
        wait(grown, 120)
        if stamps:
            # Stamps come on top: wait until it grows no more.
            last = -1
            while last != os.path.getsize(out):
                last = os.path.getsize(out)
                time.sleep(0.05)
        took = time.perf_counter() - began
        times.setdefault((tool.name, stamps), []).append((took, tool.daemon_cpu() - before))
        tool.run("delete", "all")

    def floor():
        out = os.path.join(pm.home, "floor.log")
        began = time.perf_counter()
        with subprocess.Popen(["cat", source], stdout=subprocess.PIPE) as writer, open(out, "wb") as file:
            reader = subprocess.Popen(["cat"], stdin=writer.stdout, stdout=file)
            _, _, usage = os.wait4(reader.pid, 0)
        times.setdefault("cat", []).append((time.perf_counter() - began, usage.ru_utime + usage.ru_stime))

    for tool in (pm, pm2):
        tool.kill()
    alternate(1 if options.quick else 3, floor, lambda: through(pm, False), lambda: through(pm2, False),
              lambda: through(pm, True), lambda: through(pm2, True))
    for stamps in (False, True):
        how = "with time stamps" if stamps else "raw"
        for n, what in enumerate(("time", "CPU of the daemon")):
            show(f"{size >> 20} MB of log lines {how}, {what}", [t[n] * 1000 for t in times["pm", stamps]],
                 [t[n] * 1000 for t in times["pm2", stamps]], "ms")
    print(f"{'  (cat > file: time, CPU)':<52} {statistics.median(t[0] for t in times['cat']) * 1000:>11.1f} "
          f"{statistics.median(t[1] for t in times['cat']) * 1000:>11.1f} ms", flush=True)
    os.unlink(source)
    pm.kill()
    pm2.kill()


def measure_growth(pm, pm2, options):
    del pm2  # Its delays after a crash would make this a long wait.
    goal = 500 if options.quick else 2000
    pm.kill()
    script = os.path.join(pm.home, "crash.sh")
    with open(script, "w") as file:
        file.write("echo a line\nsleep 0.05\nexit 1\n")
    pm.start([{"name": "crash", "script": script, "interpreter": "sh", "exec_mode": "fork", "instances": 20,
               "restart_delay": "1ms", "min_uptime": "1ms", "max_restarts": 1000000}], "--no-wait")
    restarts = lambda: sum(row["pm2_env"]["restart_time"] for row in pm.rows())

    def after(more):
        end = restarts() + more
        wait(lambda: restarts() >= end, 300)
        # The least of several looks: children between fork and exec look like the daemon, and descriptors come and go
        # with each restart.
        looks = []
        for _ in range(20):
            looks.append(pm.daemon_holds())
            time.sleep(0.02)
        return [min(column) for column in zip(*looks)]

    first, then = after(goal // 2), after(goal)
    print(f"\nafter {goal // 2} crashes and {goal} more: private memory {first[0]} and {then[0]} KiB, "
          f"descriptors {first[1]} and {then[1]}, threads {first[2]} and {then[2]}", flush=True)
    pm.kill()


def lines(path):
    with open(path) as file:
        return len(file.read().split())


def wait(condition, limit=30):
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            raise SystemExit("waited in vain")
        time.sleep(0.005)


def answers(port):
    def look():
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 1).close()
            return True
        return False
    wait(look)


def wrk(port, keep_alive, seconds, pids):
    """Requests per second, and µs of these processes' CPU time per request."""
    args = ["wrk", "-t2", "-c32", f"-d{seconds}s", f"http://127.0.0.1:{port}/"]
    if not keep_alive:
        args[1:1] = ["-H", "Connection: close"]
    before = cpu_of(pids)
    text = subprocess.run(args, capture_output=True, text=True, timeout=LIMIT).stdout
    requests = int(re.search(r"(\d+) requests in", text).group(1))
    return (float(re.search(r"Requests/sec:\s+([\d.]+)", text).group(1)),
            (cpu_of(pids) - before) / max(requests, 1) * 1e6)


def measure_throughput(pm, pm2, options):
    seconds, rounds = (2, 2) if options.quick else (4, 5)

    def through(tool, balance, keep_alive):
        def once():
            port = free_port()
            tool.start(web(port, balance))
            answers(port)
            rate = wrk(port, keep_alive, seconds, [*tool.daemons(), *(row["pid"] for row in tool.rows())])
            tool.run("delete", "all")
            return rate
        return once

    def genuine(policy, keep_alive):
        def once():
            port = free_port()
            env = {**pm.env, "PORT": str(port), "NODE_CLUSTER_SCHED_POLICY": policy}
            # In a session of its own, as both tools run their workers: the kernel schedules by session, and in ours it
            # would share with wrk.
            with subprocess.Popen(["node", os.path.join(HERE, "primary.js")], env=env, start_new_session=True,
                                  stderr=subprocess.DEVNULL) as primary:
                try:
                    answers(port)
                    with open(f"/proc/{primary.pid}/task/{primary.pid}/children") as file:
                        workers = [int(pid) for pid in file.read().split()]
                    return wrk(port, keep_alive, seconds, [primary.pid, *workers])
                finally:
                    primary.kill()
        return once

    for keep_alive in (False, True):
        how = "keep-alive" if keep_alive else "new connections"
        ours, shared, theirs, node_rr, node_none = alternate(
            rounds, through(pm, "round-robin", keep_alive), through(pm, "shared", keep_alive),
            through(pm2, None, keep_alive), genuine("rr", keep_alive), genuine("none", keep_alive))
        pairs = (("round robin", ours, theirs), ("shared (PM2 has round robin only)", shared, theirs),
                 ("round robin against Node's own", ours, node_rr),
                 ("shared against Node's own SCHED_NONE", shared, node_none))
        for n, unit, better, more in ((0, "/s", "more", ""), (1, "µs", "less", ": CPU")):
            for what, left, right in pairs:
                show(f"{how}, {what}{more}", [one[n] for one in left], [one[n] for one in right], unit, better)
    pm.kill()
    pm2.kill()


class Load:
    """A closed loop of connections that never retry."""

    def __init__(self, port, keep_alive, connections=16):
        self.port, self.keep_alive = port, keep_alive
        self.stop, self.ok, self.failed, self.stalled = False, 0, 0, 0
        self.lock = threading.Lock()
        self.threads = [threading.Thread(target=self.loop) for _ in range(connections)]
        for thread in self.threads:
            thread.start()

    def loop(self):
        connection = None
        while not self.stop:
            start = time.monotonic()
            fine, connection = self.request(connection)
            took = time.monotonic() - start
            with self.lock:
                self.ok += fine
                self.failed += not fine
                self.stalled += took > 1
        if connection:
            connection.close()

    def request(self, connection):
        try:
            if connection is None:
                connection = socket.create_connection(("127.0.0.1", self.port), 10)
            word = "keep-alive" if self.keep_alive else "close"
            connection.sendall(f"GET / HTTP/1.1\r\nHost: x\r\nConnection: {word}\r\n\r\n".encode())
            answer = b""
            while b"hello\n" not in answer:
                part = connection.recv(4096)
                if not part:
                    raise OSError("cut")
                answer += part
            if not self.keep_alive or b"connection: close" in answer.lower():
                connection.close()
                connection = None
            return True, connection
        except OSError:
            if connection:
                connection.close()
            return False, None

    def end(self):
        self.stop = True
        for thread in self.threads:
            thread.join()
        return self.ok, self.failed, self.stalled


def measure_reload(pm, pm2, options):
    print(f"\n{'three reloads under load':<40} {'requests':>9} {'failed':>7} {'stalled':>8} {'median reload':>14}")
    for keep_alive in (False, True):
        how = "keep-alive" if keep_alive else "new connections"
        for tool, balance in ((pm, "round-robin"), (pm2, None), (pm, "shared")):
            tool.kill()
            port = free_port()
            tool.start(web(port, balance))
            answers(port)
            load = Load(port, keep_alive)
            wait(lambda: load.ok > 100)
            times = [tool.run("reload", "web")[0] * 1000 for _ in range(3)]
            ok, failed, stalled = load.end()
            name = f"{tool.name} {balance or 'round-robin'}, {how}"
            print(f"{name:<40} {ok + failed:>9} {failed:>7} {stalled:>8} {statistics.median(times):>11.0f} ms", flush=True)
            tool.kill()
    quiet = {}
    for tool in (pm, pm2):
        port = free_port()
        tool.start(web(port))
        answers(port)
        quiet[tool.name] = [tool.run("reload", "web")[0] * 1000 for _ in range(3)]
        tool.kill()
    show("reload of two workers without connections", quiet["pm"], quiet["pm2"], "ms")


MEASURES = {"jlist": measure_jlist, "memory": measure_memory, "bulk": measure_bulk, "respawn": measure_respawn,
            "throughput": measure_throughput, "reload": measure_reload, "logs": measure_logs, "idle": measure_idle,
            "growth": measure_growth}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pm", required=True)
    parser.add_argument("--pm2", required=True)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no 1,000 apps")
    parser.add_argument("measures", nargs="*", metavar="MEASURE", help=f"of {', '.join(MEASURES)} (default: all)")
    options = parser.parse_args()
    unknown = set(options.measures) - set(MEASURES)
    if unknown:
        parser.error(f"no such measurement: {', '.join(unknown)}")
    root = tempfile.mkdtemp(prefix="pm-bench-")
    pm, pm2 = Pm("pm", options.pm, root), Pm2("pm2", options.pm2, root)
    try:
        node = subprocess.run(["node", "--version"], capture_output=True, text=True).stdout.strip()
        print(f"node {node}, {os.cpu_count()} cores, {pm.run('--version')[1].strip()}, PM2 {pm2.run('--version')[1].split()[-1]}")
        print(f"Linux {os.uname().release}, load {os.getloadavg()[0]:.1f} before")
        print(f"{'':<52} {'pm':>11} {'PM2':>11}")
        for name in options.measures or MEASURES:
            MEASURES[name](pm, pm2, options)
        print(f"load {os.getloadavg()[0]:.1f} after")
    finally:
        pm.kill()
        pm2.kill()
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
