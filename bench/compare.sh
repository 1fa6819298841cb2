#!/usr/bin/env bash
# Runs pm and PM2 side by side and prints ratios; see README.md beside this file.
set -euo pipefail
cd "$(dirname "$0")/.."
cache=${PM_BENCH_CACHE:-$HOME/.cache/pm-bench}
version=7.0.4

missing=()
command -v node >/dev/null || missing+=(nodejs)
command -v npm >/dev/null || missing+=(npm)
command -v python3 >/dev/null || missing+=(python3)
command -v wrk >/dev/null || missing+=(wrk)
if ((${#missing[@]})); then
  echo "installing ${missing[*]}" >&2
  DEBIAN_FRONTEND=noninteractive apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi
if [[ ! -x $cache/node_modules/.bin/pm2 ]]; then
  mkdir -p "$cache"
  printf '{"private":true,"dependencies":{"pm2":"%s"}}\n' "$version" >"$cache/package.json"
  (cd "$cache" && npm install --no-audit --no-fund --loglevel=error >/dev/null)
fi
cargo build --release --locked --bin pm
exec python3 bench/compare.py --pm "$PWD/target/release/pm" --pm2 "$cache/node_modules/.bin/pm2" "$@"
