#!/usr/bin/env bash
# Reloads under clients that keep their connections, on Node 18 to 24, pm and PM2 side by side; see keepalive.py.
set -euo pipefail
cd "$(dirname "$0")/.."
cache=${PM_BENCH_CACHE:-$HOME/.cache/pm-bench}

mkdir -p "$cache"
if [[ ! -f $cache/node_modules/pm2/bin/pm2 ]]; then
  printf '{"private":true,"dependencies":{"pm2":"7.0.4"}}\n' >"$cache/package.json"
  (cd "$cache" && npm install --no-audit --no-fund --loglevel=error >/dev/null)
fi
nodes=$(command -v node)
for major in 18 22 24; do
  dir=$cache/nodes/$major
  if [[ ! -x $dir/node_modules/node/bin/node ]]; then
    mkdir -p "$dir"
    echo '{"private":true}' >"$dir/package.json"
    (cd "$dir" && npm install --no-audit --no-fund --loglevel=error "node@$major" >/dev/null)
  fi
  nodes+=,$dir/node_modules/node/bin/node
done
cargo build --release --locked --bin pm
exec python3 bench/keepalive.py --pm2 "$cache/node_modules/pm2/bin/pm2" --nodes "$nodes" "$@"
