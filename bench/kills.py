#!/usr/bin/env python3
"""Kills the supervisor with SIGKILL, 200 times at random moments of a mixed load, and says what came of it.

    bench/kills.py [--pm target/release/pm] [--kills 200] [--balance shared|round-robin]

The load: HTTP requests on a connection each, which are never retried; commands that start, stop, restart, scale and reload
other apps; an app that prints numbered lines; an app that sends messages of 3 MB over its IPC channel. Exits 1 when a
promise is broken: 0 failed requests (round-robin: at most one for each kill, the connection in the accept path), pids
unchanged, lines complete, desired = actual, descriptors, threads and memory of keeper and supervisor flat.
"""
import argparse, json, os, random, shutil, signal, socket, subprocess, sys, tempfile, threading, time

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--pm", default="target/release/pm")
parser.add_argument("--kills", type=int, default=200)
parser.add_argument("--balance", default="shared", choices=["shared", "round-robin"])
parser.add_argument("--clients", type=int, default=6)
parser.add_argument("--every", type=float, default=5, help="seconds between kills at most (below 2: what was remembered is not believed)")
parser.add_argument("--seed", type=int, default=1)
options = parser.parse_args()
random.seed(options.seed)
PM = os.path.abspath(options.pm)
DIR = tempfile.mkdtemp(prefix="pm-kills-")
ENV = {**os.environ, "PM_HOME": DIR + "/home"}


def pm(*args, limit=120):
    return subprocess.run([PM, *args], cwd=DIR, env=ENV, capture_output=True, text=True, timeout=limit)


def write(name, text):
    with open(f"{DIR}/{name}", "w") as file:
        file.write(text)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


PORT, OTHER = free_port(), free_port()
WEB = """require('http').createServer((q, r) => r.end('ok')).listen(+process.env.PORT, '127.0.0.1', () => process.send('ready'))
process.on('SIGINT', () => process.exit(0))
"""
write("web.js", WEB)
write("talk.js", "const text='x'.repeat(3e6); let n=0; const say=()=>process.send({n:n+=1,text},()=>setTimeout(say,20)); say()\n")
write("lines.sh", "n=0\nwhile :; do n=$((n+1)); echo line $n; sleep 0.004; done\n")
write("ecosystem.toml", f"""
[[apps]]
name = 'web'
script = 'web.js'
exec_mode = 'cluster'
instances = 2
balance = '{options.balance}'
wait_ready = true
env = {{ PORT = '{PORT}' }}
[[apps]]
name = 'other'
script = 'web.js'
exec_mode = 'cluster'
instances = 1
wait_ready = true
env = {{ PORT = '{OTHER}' }}
[[apps]]
name = 'talk'
script = 'talk.js'
[[apps]]
name = 'lines'
script = 'lines.sh'
""" + "".join(f"[[apps]]\nname = '{name}'\nscript = 'sleep'\nargs = ['100000']\n" for name in ["a", "b", "c"]))

over = threading.Event()
failures, requests, latencies = [], [0], [0.0]
lock = threading.Lock()


def client():
    while not over.is_set():
        began = time.monotonic()
        try:
            with socket.create_connection(("127.0.0.1", PORT), timeout=30) as s:
                s.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                text = b""
                while piece := s.recv(4096):
                    text += piece
            why = None if b" 200 " in text and text.endswith(b"ok") or b"\r\n2\r\nok\r\n" in text else repr(text)
        except OSError as error:
            why = repr(error)
        with lock:
            requests[0] += 1
            latencies[0] = max(latencies[0], time.monotonic() - began)
            if why:
                failures.append((time.monotonic(), why))
        time.sleep(0.002)


wanted = {"a": 1, "b": 1, "c": 1}
commands, refused = [0], []


def commander():
    steps = [("restart", "a"), ("stop", "b"), ("scale", "c", "3"), ("start", "b"), ("restart", "c"), ("scale", "c", "1"),
             ("reload", "other"), ("stop", "a"), ("start", "a")]
    while not over.is_set():
        for step in steps:
            run = pm(*step)
            commands[0] += 1
            if run.returncode != 0:
                refused.append((step, run.returncode, run.stdout + run.stderr))
            if step[0] == "scale":
                wanted[step[1]] = int(step[2])
            elif step[0] != "reload":
                wanted[step[1]] = 0 if step[0] == "stop" else max(1, wanted[step[1]])
            if over.is_set():
                return


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def supervisor(keeper):
    for child in children(keeper):
        try:
            with open(f"/proc/{child}/cmdline") as file:
                if "supervisor" in file.read().split("\0"):
                    return child
        except OSError:
            pass
    return None


def rows(name):
    return [row for row in json.loads(pm("jlist").stdout) if row["name"] == name]


def identity(pid):
    with open(f"/proc/{pid}/stat") as file:
        return pid, file.read().rsplit(")", 1)[1].split()[19]


def figures(pid):
    with open(f"/proc/{pid}/status") as file:
        status = dict(line.split(":", 1) for line in file)
    with open(f"/proc/{pid}/smaps_rollup") as file:
        own = next(int(line.split()[1]) for line in file if line.startswith("Pss_Anon:"))
    return {"fds": len(os.listdir(f"/proc/{pid}/fd")), "threads": int(status["Threads"]), "own_kib": own}


def settled(keeper):
    pm("jlist")
    time.sleep(3)
    return {"keeper": figures(keeper), "supervisor": figures(supervisor(keeper))}


broken = []
try:
    start = pm("start", "ecosystem.toml")
    assert start.returncode == 0, start.stdout + start.stderr
    pong = json.loads(pm("ping", "--json").stdout)
    keeper = pong["daemon_pid"]
    lasting = [identity(row["pid"]) for name in ["web", "talk", "lines"] for row in rows(name)]
    threads = [threading.Thread(target=client) for _ in range(options.clients)] + [threading.Thread(target=commander)]
    for thread in threads:
        thread.start()
    # One that has taken over holds what every later one holds.
    os.kill(supervisor(keeper), signal.SIGKILL)
    time.sleep(3)
    before, killed = None, 1
    before = settled(keeper)
    while killed < options.kills:
        time.sleep(random.uniform(0, options.every))
        pid = supervisor(keeper)
        if pid is None:
            continue
        os.kill(pid, signal.SIGKILL)
        killed += 1
    time.sleep(2)
    over.set()
    for thread in threads:
        thread.join()
    after = settled(keeper)
    print(f"{options.balance}: {killed} kills, {requests[0]} requests, {len(failures)} failed, slowest {latencies[0]:.2f} s, "
          f"{commands[0]} commands, {len(refused)} not done")
    for _, why in failures[:5]:
        print("  failed:", why)
    for step, code, text in refused[:5]:
        print("  not done:", step, code, text.strip())
    if len(failures) > (0 if options.balance == "shared" else killed):
        broken.append("requests failed")
    if refused:
        broken.append("commands were not done")
    now = [identity(row["pid"]) for name in ["web", "talk", "lines"] for row in rows(name)]
    print("pids:", "unchanged" if now == lasting else f"{lasting} → {now}")
    if now != lasting:
        broken.append("pids have changed")
    actual = {name: sum(row["pm2_env"]["status"] == "online" for row in rows(name)) for name in wanted}
    print("desired = actual:", actual == wanted, actual)
    if actual != wanted:
        broken.append(f"wanted {wanted}")
    slots = {}
    for proc in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{proc}/environ") as file:
                entries = file.read().split("\0")
        except OSError:
            continue
        token = next((e.split("=", 1)[1] for e in entries if e.startswith("PM_INSTANCE=")), None)
        if token and f"PM_HOME={DIR}/home" in entries and not token.startswith("lines:"):
            slots.setdefault(":".join(token.split(":")[:2]), set()).add(proc)
    double = {slot: procs for slot, procs in slots.items() if len(procs) > 1}
    print("runs twice:", double or "nothing")
    if double:
        broken.append("something runs twice")
    pm("stop", "lines")
    log = next(name for name in os.listdir(DIR + "/home/logs") if name.startswith("lines-out"))
    with open(f"{DIR}/home/logs/{log}") as file:
        numbers = [int(line.split()[1]) for line in file if line.startswith("line ") and line.split()[1].isdigit()]
    expected = numbers[-1] if numbers else 0
    gaps, doubles = expected - len(set(numbers)), len(numbers) - len(set(numbers))
    print(f"log lines: {expected}, {gaps} missing, {doubles} twice, order {'kept' if numbers == sorted(numbers) else 'broken'}")
    if gaps or doubles:
        broken.append("log lines are not complete")
    for who in ["keeper", "supervisor"]:
        print(f"{who}: {before[who]} → {after[who]}")
        grown = after[who]["own_kib"] - before[who]["own_kib"]
        if after[who]["fds"] > before[who]["fds"] + 2 or after[who]["threads"] > before[who]["threads"] or grown > 1024:
            broken.append(f"the {who} grows")
finally:
    over.set()
    pm("kill")
    shutil.rmtree(DIR, ignore_errors=True)
print("broken:", "; ".join(broken) if broken else "nothing")
sys.exit(1 if broken else 0)
