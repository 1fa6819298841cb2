#!/usr/bin/env bash
# Builds `pm` of an earlier commit, for the tests of upgrades, and prints where it is. Takes a minute once for a build
# directory; dependencies that are built there already are used.
#   tests/earlier.sh [target directory]
# The commit is the first one in this clone with the present form of the state that passes between versions. Prints
# nothing where there is no such commit before this one: an export without history, or a clone of depth 1.
set -euo pipefail
cd "$(dirname "$0")/.."
target=$(mkdir -p "${1:-target}" && cd "${1:-target}" && pwd)

commit=$(git log --diff-filter=A --format=%H -- tests/fixtures/blob 2>/dev/null | tail -n 1 || true)
if [[ -z $commit || $commit == "$(git rev-parse HEAD)" ]]; then
  exit 0
fi
home=$target/earlier
program=$home/${commit:0:12}/pm
mkdir -p "${program%/*}"
exec 9>"$home/lock"
flock 9
if [[ ! -x $program ]]; then
  sources=$home/sources
  rm -rf "$sources"
  mkdir -p "$sources" "$home/build/debug"
  git archive "$commit" | tar -x -C "$sources"
  # Everything that is not of this crate.
  for kind in .fingerprint build deps; do
    if [[ -d $target/debug/$kind && ! -d $home/build/debug/$kind ]]; then
      mkdir -p "$home/build/debug/$kind"
      find "$target/debug/$kind" -mindepth 1 -maxdepth 1 \
        ! -name 'pm-*' ! -name 'libpm-*' ! -name '*.long-type-*' \( -type d -o -name '*.rlib' -o -name '*.rmeta' -o -name '*.d' -o -name '*.so' \) \
        -exec cp -a --reflink=auto -t "$home/build/debug/$kind" {} +
    fi
  done
  cargo build --quiet --locked --manifest-path "$sources/Cargo.toml" --bin pm --target-dir "$home/build" >&2
  cp "$home/build/debug/pm" "$program.new"
  mv "$program.new" "$program"
  rm -rf "$sources" "$home/build"
fi
echo "$program"
