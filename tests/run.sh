#!/usr/bin/env bash
# Sets up what the test suite needs and runs everything.
#
# Needs a Rust toolchain and a C linker; what else is missing comes from the distribution's packages (as root). Node
# packages, a second Node version and other languages (tests/languages.sh) go into a cache outside the repository:
#   PM_TEST_CACHE           where (default ~/.cache/pm-tests)
#   PM_TEST_NODE_VERSIONS   beside the installed one (default "22"; "18 22 24" is the full matrix)
# Arguments go to the test runner: `tests/run.sh reload::` runs the tests whose name contains `reload::`.
set -euo pipefail
cd "$(dirname "$0")/.."
export PM_TEST_CACHE="${PM_TEST_CACHE:-$HOME/.cache/pm-tests}"
versions=${PM_TEST_NODE_VERSIONS-22}

say() { printf '== %s\n' "$*"; }

missing=()
command -v node >/dev/null || missing+=(nodejs)
command -v npm >/dev/null || missing+=(npm)
command -v python3 >/dev/null || missing+=(python3)
command -v cc >/dev/null || missing+=(gcc libc6-dev)
command -v setsid >/dev/null || missing+=(util-linux)
command -v strace >/dev/null || missing+=(strace)
command -v go >/dev/null || missing+=(golang-go)
command -v puma >/dev/null || missing+=(ruby puma)
python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
# The tests under systemd boot one of their own; only root can.
if [[ $(id -u) == 0 ]]; then
  [[ -x /lib/systemd/systemd || -x /usr/lib/systemd/systemd ]] || missing+=(systemd)
  command -v dbus-daemon >/dev/null || missing+=(dbus)
fi
if ((${#missing[@]})); then
  say "installing ${missing[*]}"
  if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
    echo "please install: ${missing[*]}" >&2
    exit 1
  fi
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi
say "node $(node --version), npm $(npm --version 2>/dev/null), $(python3 --version)"

# One npm install per set of versions: the stamp is the wish list itself.
npm_into() { # directory, stamp
  [[ -f $1/.stamp && $(<"$1/.stamp") == "$2" ]] && return
  say "npm install in $1"
  (cd "$1" && npm install --no-audit --no-fund --loglevel=error >/dev/null)
  printf '%s' "$2" >"$1/.stamp"
}
mkdir -p "$PM_TEST_CACHE/apps"
cp tests/fixtures/npm/package.json "$PM_TEST_CACHE/apps/package.json"
npm_into "$PM_TEST_CACHE/apps" "$(<tests/fixtures/npm/package.json)"
tests/languages.sh "$PM_TEST_CACHE"

declare -A release=([18]=18.20.8 [20]=20.20.2 [22]=22.23.3 [24]=24.21.0)
case $(uname -m) in
  x86_64) arch=x64 ;;
  aarch64) arch=arm64 ;;
  *) arch= && versions= && say "no second Node for $(uname -m)" ;;
esac
# Paths of the other Nodes, for tests that take them from here.
export PM_TEST_NODES=
for major in $versions; do
  dir=$PM_TEST_CACHE/nodes/$major
  mkdir -p "$dir"
  printf '{"private":true,"dependencies":{"node-linux-%s":"%s"}}\n' "$arch" "${release[$major]}" >"$dir/package.json"
  npm_into "$dir" "$(<"$dir/package.json")"
  ln -sfn "node_modules/node-linux-$arch/bin" "$dir/bin"
  PM_TEST_NODES+=${PM_TEST_NODES:+:}$dir/bin/node
  say "also node $("$dir/bin/node" --version)"
done

say "building"
cargo build --locked --tests --bins
if cargo nextest --version >/dev/null 2>&1; then
  cargo nextest run --locked --no-fail-fast "$@"
  # nextest runs no documentation tests.
  cargo test --locked --doc --quiet
else
  cargo test --locked --no-fail-fast "$@" -- --test-threads="${PM_TEST_THREADS:-6}"
fi
