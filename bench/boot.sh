#!/bin/sh
# How long a daemon takes to bring up 50 apps that each need 10 s of CPU time before they can serve, a few at a time
# (`start_parallelism`). They compete for the CPUs, so all of them together take 500 s of CPU time at least: on two
# cores a little more than four minutes.
#
#   bench/boot.sh target/release/pm [APPS [SECONDS OF CPU EACH [START_PARALLELISM]]]
set -eu
pm=$(readlink -f "${1:-target/release/pm}")
apps=${2:-50} cpu=${3:-10} at_once=${4:-4}
dir=$(mktemp -d)
export PM_HOME="$dir/home"
trap '"$pm" kill >/dev/null 2>&1 || true; rm -rf "$dir"' EXIT
cd "$dir"
cat >app.py <<'EOF_APP'
import os, sys, time
while time.process_time() < float(sys.argv[1]):
    pass
os.write(int(os.environ["PM_READY_FD"]), b"\n")
time.sleep(100000)
EOF_APP
{
  echo "start_parallelism = $at_once"
  for n in $(seq "$apps"); do
    # The time that an app has counts from its own start, not from the daemon's.
    printf '[[apps]]\nname = "app-%s"\nscript = "app.py"\nargs = ["%s"]\nwait_ready = true\nlisten_timeout = "10m"\n' "$n" "$cpu"
  done
} >ecosystem.toml
# Into the list first, and then as at boot: a daemon that finds what is to run.
"$pm" start ecosystem.toml --no-wait >/dev/null
daemon=$(cat "$PM_HOME/pm.lock")
kill -TERM "$daemon"
while kill -0 "$daemon" 2>/dev/null; do sleep 0.1; done
begun=$(date +%s.%N)
"$pm" daemon >/dev/null 2>&1 &
until "$pm" ping >/dev/null 2>&1; do sleep 0.02; done
echo "the daemon answers after $(echo "$(date +%s.%N) - $begun" | bc) s"
online() { "$pm" jlist | grep -o '"status":"online"' | wc -l; }
while [ "$(online)" -lt "$apps" ]; do sleep 0.5; done
echo "all $apps apps are online after $(echo "$(date +%s.%N) - $begun" | bc) s, $at_once at a time, $cpu s of CPU each"
"$pm" jlist | grep -o '"restart_time":[0-9]*' | sort | uniq -c
