#!/usr/bin/env python3
"""Kills supervisor or keeper with SIGKILL, 200 times at random moments of a mixed load, and says what came of it.

    bench/kills.py [--pm target/release/pm] [--kills 200] [--balance shared|round-robin] [--who supervisor|keeper|both]

The load: HTTP requests on a connection each, which are never retried; commands that start, stop, restart, scale and reload
other apps; an app that prints numbered lines; an app that sends messages of 3 MB over its IPC channel and listens after
each. Exits 1 when a promise is broken: 0 failed requests (round-robin: at most one for each kill, the connection in the
accept path), pids unchanged, lines complete, every message seen and every question behind one answered, each operation
with its end in the stream of events, desired = actual, descriptors, threads and memory of keeper and supervisor flat.

`--who both` kills the two in the same moment, and starts the daemon again as a service manager would. Channels, pipes and
listeners are gone with the last descriptor, so apps are started again: then requests may fail until the app serves again and at no other time, runs may lose
their last lines and no other, and a command may end without being done when it says so. All else is as above.
"""
import argparse, collections, contextlib, json, os, random, re, shutil, signal, socket, subprocess, sys, tempfile, threading, time

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--pm", default="target/release/pm")
parser.add_argument("--kills", type=int, default=200)
parser.add_argument("--balance", default="shared", choices=["shared", "round-robin"])
parser.add_argument("--who", default="supervisor", choices=["supervisor", "keeper", "both"])
parser.add_argument("--clients", type=int, default=6)
parser.add_argument("--every", type=float, default=5, help="seconds between kills at most (below 2: what was remembered is not believed)")
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--keep", action="store_true", help="leave the files there")
options = parser.parse_args()
random.seed(options.seed)
PM = os.path.abspath(options.pm)
TALK = os.path.join(os.path.dirname(os.path.abspath(__file__)), "talk.js")
DIR = tempfile.mkdtemp(prefix="pm-kills-")
HOME = DIR + "/home"
ENV = {**os.environ, "PM_HOME": HOME, "PM_LOG": "info,pm::dispatch=trace"}
# How long nobody may serve when keeper and supervisor are gone.
DOWN = 60


def pm(*args, limit=120):
    return subprocess.run([PM, *args], cwd=DIR, env=ENV, capture_output=True, text=True, timeout=limit)


def write(name, text):
    with open(f"{DIR}/{name}", "w") as file:
        file.write(text)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


PORT, OTHER, THIRD = free_port(), free_port(), free_port()
WEB = """require('http').createServer((q, r) => r.end('ok')).listen(+process.env.PORT, '127.0.0.1', () => process.send('ready'))
process.on('SIGINT', () => process.exit(0))
"""
write("web.js", WEB)
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
script = '{TALK}'
exec_mode = 'cluster'
instances = 1
balance = '{options.balance}'
env = {{ PORT = '{THIRD}' }}
[[apps]]
name = 'lines'
script = 'lines.sh'
""" + "".join(f"[[apps]]\nname = '{name}'\nscript = 'sleep'\nargs = ['100000']\n" for name in ["a", "b", "c"]))

over = threading.Event()
failures, requests, latencies = [], [0], [0.0]
lock = threading.Lock()


def ask(timeout=30):
    """Why a request failed."""
    try:
        with socket.create_connection(("127.0.0.1", PORT), timeout=timeout) as s:
            s.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            text = b""
            while piece := s.recv(4096):
                text += piece
        return None if b" 200 " in text and text.endswith(b"ok") or b"\r\n2\r\nok\r\n" in text else repr(text)
    except OSError as error:
        return repr(error)


def client():
    while not over.is_set():
        began = time.monotonic()
        why = ask()
        with lock:
            requests[0] += 1
            latencies[0] = max(latencies[0], time.monotonic() - began)
            if why:
                failures.append((began, time.monotonic(), why))
        # Nobody needs a million refusals of a daemon that is down.
        time.sleep(0.05 if why else 0.002)


wanted = {"a": 1, "b": 1, "c": 1}
commands, refused, undone = [0], [], [0]
STEPS = [("restart", "a"), ("stop", "b"), ("scale", "c", "3"), ("start", "b"), ("restart", "c"), ("scale", "c", "1"),
         ("reload", "other"), ("stop", "a"), ("start", "a")]
# What a command says that does not know its end. A supervisor that is started without what was remembered, after five that
# lived for less than two seconds, does not know what those were asked; what it was asked next may meet what they have begun.
UNKNOWN = ["the outcome of this operation is not known", "whether it was done is not known", "is going on",
           "has no supervisor at the moment"]
UNKNOWN = {"supervisor": UNKNOWN, "keeper": [], "both": [*UNKNOWN, "no daemon is running"]}


def command(step):
    run = pm(*step)
    commands[0] += 1
    if run.returncode != 0:
        said = run.stdout + run.stderr
        if any(words in said for words in UNKNOWN[options.who]):
            undone[0] += 1
        else:
            refused.append((step, run.returncode, said))
    if step[0] == "scale":
        wanted[step[1]] = int(step[2])
    elif step[0] != "reload":
        wanted[step[1]] = 0 if step[0] == "stop" else max(1, wanted[step[1]])


def commander():
    while not over.is_set():
        for step in STEPS:
            command(step)
            if over.is_set():
                return


def part(word):
    """Pids of this home's keeper or supervisor."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/cmdline") as file:
                args = file.read().split("\0")
            with open(f"/proc/{name}/stat") as file:
                zombie = file.read().rsplit(")", 1)[1].split()[0] == "Z"
        except OSError:
            continue
        if len(args) > 2 and args[1] == word and HOME in args and not zombie:
            found.append(int(name))
    return found


def end(pids):
    killed = False
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
            killed = True
        except ProcessLookupError:
            pass
    return killed


def kill_one():
    """Whether somebody was there to be killed."""
    keeper, supervisor = part("daemon"), part("supervisor")
    if options.who == "supervisor":
        return end(supervisor)
    if options.who == "keeper":
        return end(keeper)
    if not (keeper and supervisor):
        return False
    victims = keeper + supervisor
    random.shuffle(victims)
    return end(victims)


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
    return {"fds": len(descriptors(pid)), "threads": int(status["Threads"]), "own_kib": own}


def descriptors(pid):
    """What is open, by kind."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found.append(re.sub(r"[0-9]+", "#", os.readlink(f"/proc/{pid}/fd/{fd}")))
    return found


def settled():
    pm("jlist")
    time.sleep(3)
    pong = json.loads(pm("ping", "--json").stdout)
    pids = {"keeper": pong["daemon_pid"], "supervisor": pong["supervisor_pid"]}
    return {who: (figures(pid), collections.Counter(descriptors(pid))) for who, pid in pids.items()}


def answered():
    """The last question that the talking app got an answer to."""
    name = next((name for name in os.listdir(HOME + "/logs") if name.startswith("talk-out")), None)
    with open(f"{HOME}/logs/{name}") as file:
        return int(file.read().split()[-1])


def read_lines():
    """How many lines of the numbered app there are in how many runs, and what is wrong with them."""
    log = next(name for name in os.listdir(HOME + "/logs") if name.startswith("lines-out"))
    runs, last, wrong, count = 1, 0, [], 0
    with open(f"{HOME}/logs/{log}") as file:
        for text in file:
            found = re.fullmatch(r"line (\d+)\n", text)
            number = int(found[1]) if found else None
            if number == 1 and last > 0:
                runs += 1
            elif number != last + 1:
                wrong.append(f"{text.strip()!r} after {last}")
            last = number or last
            count += 1
    return count, runs, wrong


def unended():
    """Operations that have begun, and have no end in the stream of events."""
    begun, ended = [], set()
    for name in ("events.jsonl.1", "events.jsonl"):
        if os.path.exists(f"{HOME}/{name}"):
            with open(f"{HOME}/{name}") as file:
                for event in map(json.loads, file):
                    if event["event"] == "operation_begun":
                        begun.append((event["op"], event["verb"], event["time"]))
                    elif event["event"] == "operation_ended":
                        ended.add(event["op"])
    return len(begun), [one for one in begun if one[0] not in ended]


broken = []
try:
    start = pm("start", "ecosystem.toml")
    assert start.returncode == 0, start.stdout + start.stderr
    lasting = [identity(row["pid"]) for name in ["web", "talk", "lines"] for row in rows(name)]
    threads = [threading.Thread(target=client) for _ in range(options.clients)]
    for thread in threads:
        thread.start()
    # One that has taken over holds what every later one holds.
    down, longest, strikes = [], 0.0, []

    def strike():
        """Kills; with nobody left waits until the app serves again."""
        global longest
        began = time.monotonic()
        while not kill_one():
            time.sleep(0.01)
            if time.monotonic() > began + DOWN:
                sys.exit("nobody is there to be killed:\n" + open(HOME + "/pm.log").read()[-2000:])
        strikes.append(time.monotonic())
        if options.who != "both":
            return
        pm("resurrect")
        # The worker that was there is not the one that counts.
        while not part("supervisor") or ask(5):
            time.sleep(0.02)
            if time.monotonic() > began + DOWN:
                sys.exit("nothing serves again:\n" + pm("list").stdout)
        # A request may have waited in the queue of a listener that is gone.
        down.append((began, time.monotonic() + 1))
        longest = max(longest, time.monotonic() - began)

    strike()
    time.sleep(3)
    killed = 1
    # The commands end with what they began with.
    before = settled()
    threads.append(threading.Thread(target=commander))
    threads[-1].start()
    while killed < options.kills:
        time.sleep(random.uniform(0, options.every))
        strike()
        killed += 1
    time.sleep(2)
    behind = answered()
    over.set()
    for thread in threads:
        thread.join()
    # What a command without an end has left is as the next one wants it.
    for step in STEPS:
        command(step)
    after = settled()
    print(f"{options.balance}, {options.who}: {killed} kills, {requests[0]} requests, {len(failures)} failed, "
          f"slowest {latencies[0]:.2f} s, {commands[0]} commands, {len(refused)} not done, "
          f"{undone[0]} of unknown end"
          + (f", at most {longest:.1f} s until served again" if options.who == "both" else ""))
    bad = [(began, at, why) for began, at, why in failures if not any(begin <= at <= until for begin, until in down)]
    for began, at, why in bad[:20]:
        past = [strike for strike in strikes if strike <= at]
        clock = time.strftime("%H:%M:%S", time.gmtime(time.time() - time.monotonic() + at))
        print(f"  failed: {why} at {clock}, {(at - past[-1]) * 1e3:.1f} ms after kill {len(past)}, "
              f"begun {(at - began) * 1e3:.1f} ms before")
    for step, code, text in refused[:5]:
        print("  not done:", step, code, text.strip())
    if len(bad) > (killed if options.balance == "round-robin" and options.who == "supervisor" else 0):
        broken.append("requests failed")
    if refused:
        broken.append("commands were not done")
    now = [identity(row["pid"]) for name in ["web", "talk", "lines"] for row in rows(name)]
    if options.who != "both":
        print("pids:", "unchanged" if now == lasting else f"{lasting} → {now}")
        if now != lasting:
            broken.append("pids have changed")
    actual = {name: sum(row["pm2_env"]["status"] == "online" for row in rows(name)) for name in wanted}
    print("desired = actual:", actual == wanted, actual)
    if actual != wanted or len(now) != 4:
        broken.append(f"wanted {wanted}")
    slots = {}
    for proc in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{proc}/environ") as file:
                entries = file.read().split("\0")
        except OSError:
            continue
        token = next((e.split("=", 1)[1] for e in entries if e.startswith("PM_INSTANCE=")), None)
        if token and f"PM_HOME={HOME}" in entries and not token.startswith("lines:"):
            slots.setdefault(":".join(token.split(":")[:2]), set()).add(proc)
    double = {slot: procs for slot, procs in slots.items() if len(procs) > 1}
    print("runs twice:", double or "nothing")
    if double:
        broken.append("something runs twice")
    begun, open_ended = unended()
    print(f"events: {begun} operations, {len(open_ended)} without an end", open_ended[:5] or "")
    if open_ended and options.who != "both":
        broken.append("operations have no end")
    deadline = time.monotonic() + 60
    while (further := answered()) == behind and time.monotonic() < deadline:
        time.sleep(0.1)
    pm("stop", "talk", "lines")
    count, runs, wrong = read_lines()
    print(f"log lines: {count} of {runs} runs, {len(wrong)} out of order", wrong[:5] or "")
    if wrong or options.who != "both" and runs > 1:
        broken.append("log lines are not complete")
    with open(HOME + "/pm.log") as file:
        seen = [int(found[1]) for found in re.finditer(r"message of the app .*?length=(\d{7,})", file.read())]
    lengths = {len('{"n":,"text":""}') + len(str(n)) + 3_000_000 + n: n for n in range(1, 10_000)}
    numbers = [lengths.get(length) for length in seen]
    torn, last = numbers.count(None), answered()
    missing = [n for n in range(1, last + 1) if n not in numbers]
    print(f"messages of 3 MB: {last} answered, {len(numbers)} seen, {len(numbers) - len(set(numbers))} of them again, "
          f"{len(missing)} missing, {torn} torn")
    if torn or missing or further == behind:
        broken.append("messages are lost")
    for who in ["keeper", "supervisor"]:
        (old, had), (new, has) = before[who], after[who]
        print(f"{who}: {old} → {new}; more than before: {dict(has - had)}, fewer: {dict(had - has)}")
        if new["fds"] > old["fds"] + 2 or new["threads"] > old["threads"] or new["own_kib"] > old["own_kib"] + 1024:
            broken.append(f"the {who} grows")
finally:
    over.set()
    pm("kill")
    if options.keep:
        print("files:", DIR)
    else:
        shutil.rmtree(DIR, ignore_errors=True)
print("broken:", "; ".join(broken) if broken else "nothing")
sys.exit(1 if broken else 0)
