#!/usr/bin/env python3
"""Kills a daemon at random moments while its state changes, and reads what is on disk each time.

    bench/state-kills.py [--pm target/release/pm] [--kills 1000] [--dir DIR] [--seed N]

Commands that change the desired state run one after the other: start, stop, scale, delete. In the middle of them the
supervisor is killed with SIGKILL, every tenth time the keeper, every twentieth time both and all apps, as when the
machine goes down. After each kill state.json has to be there and whole, and equal to what was acknowledged last, or to
that with the command in flight. Exit code 1 when it was not once.
"""
import argparse, json, os, random, shutil, signal, subprocess, sys, tempfile, time

arguments = argparse.ArgumentParser()
arguments.add_argument("--pm", default="target/release/pm")
arguments.add_argument("--kills", type=int, default=1000)
arguments.add_argument("--dir", default=None)
arguments.add_argument("--seed", type=int, default=random.randrange(1 << 30))
options = arguments.parse_args()
PM = os.path.abspath(options.pm)
rng = random.Random(options.seed)
place = tempfile.mkdtemp(prefix="pm-kills-", dir=options.dir)
home = os.path.join(place, "home")
env = {"PATH": os.environ["PATH"], "HOME": place, "PM_HOME": home, "LANG": "C.UTF-8"}


def pm(*words):
    return subprocess.Popen([PM, *words], env=env, cwd=place, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def stat(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            text = file.read()
    except OSError:
        return None
    fields = text[text.rindex(")") + 2:].split()
    return fields[0], int(fields[1])


def processes():
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            line = open(f"/proc/{name}/cmdline", "rb").read().split(b"\0")
            text = open(f"/proc/{name}/environ", "rb").read()
        except OSError:
            continue
        if home.encode() in line or f"HOME={place}".encode() in text.split(b"\0"):
            state = stat(name)
            if state and state[0] != "Z":
                found.append((int(name), line))
    return found


def part(word):
    return [pid for pid, line in processes() if len(line) > 2 and line[1] == word.encode() and home.encode() in line]


def kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def on_disk():
    """What a daemon would read: each app with what its slots are to do."""
    for name in ("state.json", "state.json.prev"):
        try:
            with open(os.path.join(home, name)) as file:
                text = file.read()
        except FileNotFoundError:
            continue
        state = json.loads(text)
        return {app["spec"]["name"]: tuple(slot["desired"].capitalize() for slot in app["slots"])
                for app in state["fleet"]["apps"] if app["operation"] != "delete"}
    return {}


# What is wanted, as acknowledged; None for the app of a command whose end is not known.
wanted = {}
names = ["a", "b", "c", "d"]


def choose():
    """A command, and what is wanted when it is done."""
    name = rng.choice(names)
    after = dict(wanted)
    if name not in wanted:
        count = rng.randint(1, 3)
        after[name] = ("Running",) * count
        return ["start", "sleep", "--name", name, "-i", str(count), "--silent", "--", "1000"], after
    now = wanted[name]
    verb = rng.choice(["stop", "scale", "delete", "start"])
    if verb == "stop":
        after[name] = ("Stopped",) * len(now)
        return ["stop", name, "--silent"], after
    if verb == "start":
        after[name] = ("Running",) * len(now)
        return ["start", name, "--silent"], after
    if verb == "delete":
        del after[name]
        return ["delete", name, "--silent"], after
    count = rng.choice([n for n in (1, 2, 3, 4) if n != len(now)])
    after[name] = (now + (now[0],) * count)[:count]
    return ["scale", name, str(count), "--silent"], after


def wait_up():
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        done = subprocess.run([PM, "ping"], env=env, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode == 0:
            return
        time.sleep(0.01)
    sys.exit(f"no daemon after 30 s: {done.stdout.decode()}")


def spelled(state):
    return {name: slots for name, slots in state.items()}


subprocess.run([PM, "start", "sleep", "--name", "z", "--silent", "--", "1000"], env=env, cwd=place, check=True)
wanted["z"] = ("Running",)
kills = dict(supervisor=0, keeper=0, everything=0)
commands = in_flight = 0
wrong = []
began = time.monotonic()
while sum(kills.values()) < options.kills and not wrong:
    # A few undisturbed, then one with a kill in its middle.
    for _ in range(rng.randint(0, 2)):
        words, after = choose()
        said, deadline = " is going on", time.monotonic() + 20
        # What a kill has interrupted may still be going on.
        while " is going on" in said and time.monotonic() < deadline:
            child = pm(*words)
            said = child.communicate()[0].decode()
            commands += 1
        if child.returncode != 0:
            wrong.append(f"{words}: {child.returncode}: {said}")
            break
        wanted = after
        if on_disk() != wanted:
            wrong.append(f"acknowledged {words}, on disk {on_disk()}, wanted {wanted}")
            break
    words, after = choose()
    number = sum(kills.values()) + 1
    what = "everything" if number % 20 == 0 else "keeper" if number % 10 == 0 else "supervisor"
    victims = {"supervisor": part("supervisor"), "keeper": part("daemon")}
    child = pm(*words)
    time.sleep(rng.random() * rng.choice([0.005, 0.02, 0.06]))
    if what == "everything":
        for _ in range(200):
            left = [pid for pid, line in processes() if pid != child.pid]
            # The daemon first: it would see its apps end.
            daemon = [pid for pid in part("daemon") + part("supervisor")]
            left = daemon + [pid for pid in left if pid not in daemon]
            if not left:
                break
            for pid in left:
                kill(pid)
        kill(child.pid)
    else:
        for pid in victims[what]:
            kill(pid)
    kills[what] += 1
    try:
        state = on_disk()
    except ValueError as error:
        wrong.append(f"kill {number} of the {what} in {words}: not whole: {error}")
        break
    possible = [wanted, after]
    if state not in possible:
        wrong.append(f"kill {number} of the {what} in {words}: {state}, not {wanted} or {after}")
        break
    in_flight += state == after and after != wanted
    child.communicate(timeout=60)
    commands += 1
    if what == "everything":
        subprocess.run([PM, "resurrect", "--silent"], env=env, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_up()
    # Whatever became of the command: it is done, or it is not.
    deadline = time.monotonic() + 20
    while True:
        state = on_disk()
        if state in possible:
            if child.returncode == 0 and state != after and what != "everything":
                wrong.append(f"{words} was acknowledged, and {state} is on disk")
            break
        if time.monotonic() > deadline:
            wrong.append(f"after kill {number} of the {what} in {words}: {state}")
            break
        time.sleep(0.01)
    wanted = state
    if number % 100 == 0:
        print(f"{number} kills, {commands} commands, {time.monotonic() - began:.0f} s", flush=True)
# Desired is actual in the end.
deadline = time.monotonic() + 30
while not wrong:
    rows = json.loads(subprocess.run([PM, "jlist"], env=env, cwd=place, stdout=subprocess.PIPE).stdout)
    actual = {}
    for row in rows:
        up = {"online": "Running", "launching": "Running", "stopped": "Stopped"}.get(row["pm2_env"]["status"], row["pm2_env"]["status"])
        actual.setdefault(row["name"], []).append(up)
    if {name: tuple(slots) for name, slots in actual.items()} == wanted:
        break
    if time.monotonic() > deadline:
        wrong.append(f"actual {actual}, wanted {wanted}")
    time.sleep(0.1)
sleeps = [pid for pid, line in processes() if b"1000" in line and line[0].endswith(b"sleep")]
expected = sum(slots.count("Running") for slots in wanted.values())
if not wrong and len(sleeps) != expected:
    wrong.append(f"{len(sleeps)} processes, {expected} wanted")
subprocess.run([PM, "kill"], env=env, cwd=place, stdout=subprocess.DEVNULL)
print(f"seed {options.seed}: {kills} kills, {commands} commands, {in_flight} times the command in flight was on disk, "
      f"{time.monotonic() - began:.0f} s; wrong: {wrong or 'nothing'}")
if not wrong:
    shutil.rmtree(place, ignore_errors=True)
sys.exit(1 if wrong else 0)
