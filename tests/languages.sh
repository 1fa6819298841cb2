#!/usr/bin/env bash
# The languages that tests/e2e/languages.rs reloads under load, beside Node and Python: Go, Ruby with Puma, uvicorn and
# gunicorn, bun, deno, and the dependencies of the axum example. Called by tests/run.sh with the cache directory, when that
# has installed the distribution's packages.
#
# Versions are pinned, except for what comes as a package of the distribution. What is there already is left alone.
set -euo pipefail
cd "$(dirname "$0")/.."
dir=$1/languages
mkdir -p "$dir/bin"

say() { printf '== %s\n' "$*"; }

# What was asked for last time; the stamp is the wish list itself.
fresh() { # stamp file, wish
  [[ -f $1 && $(<"$1") == "$2" ]]
}

wish="$(python3 -c 'import sys; print(sys.executable, sys.version)') $(<tests/fixtures/languages/requirements.txt)"
if ! fresh "$dir/venv/.stamp" "$wish"; then
  say "pip install in $dir/venv"
  rm -rf "$dir/venv"
  python3 -m venv "$dir/venv"
  "$dir/venv/bin/pip" install --quiet --disable-pip-version-check -r tests/fixtures/languages/requirements.txt
  printf '%s' "$wish" >"$dir/venv/.stamp"
fi

case $(uname -m) in
  x86_64) bun=@oven/bun-linux-x64 deno=@deno/linux-x64-glibc ;;
  aarch64) bun=@oven/bun-linux-aarch64 deno=@deno/linux-arm64-glibc ;;
  *) bun='' && say "no bun and no deno for $(uname -m): their tests are left out" ;;
esac
if [[ -n $bun ]]; then
  mkdir -p "$dir/npm"
  wish=$(printf '{"private":true,"dependencies":{"%s":"1.4.5","%s":"2.9.6"}}' "$bun" "$deno")
  if ! fresh "$dir/npm/.stamp" "$wish"; then
    say "npm install in $dir/npm"
    printf '%s\n' "$wish" >"$dir/npm/package.json"
    (cd "$dir/npm" && npm install --no-audit --no-fund --loglevel=error >/dev/null)
    printf '%s' "$wish" >"$dir/npm/.stamp"
  fi
  ln -sfn "../npm/node_modules/$bun/bin/bun" "$dir/bin/bun"
  ln -sfn "../npm/node_modules/$deno/deno" "$dir/bin/deno"
fi

# The files of docs/zero-downtime.md, so that the tests find the dependencies compiled.
block() { awk -v fence="\`\`\`$1" '$0 == fence { on = 1; next } /^```/ { on = 0 } on' docs/zero-downtime.md; }

go_dir=$dir/go
mkdir -p "$go_dir"
block 'go main.go' >"$go_dir/main.go"
(cd "$go_dir" && GOCACHE=$go_dir/cache GO111MODULE=off go build -o server main.go)

rust_dir=$dir/axum
mkdir -p "$rust_dir/src"
# Left alone when nothing has changed: cargo goes by the time of the file.
update() { # file, text
  [[ -f $1 && $(<"$1") == "$2" ]] || printf '%s\n' "$2" >"$1"
}
update "$rust_dir/Cargo.toml" "$(block 'toml Cargo.toml')"
update "$rust_dir/Cargo.lock" "$(<tests/fixtures/languages/axum/Cargo.lock)"
update "$rust_dir/src/main.rs" "$(block 'rust src/main.rs')"
(cd "$rust_dir" && CARGO_TARGET_DIR=$rust_dir/target cargo build --quiet --locked)

say "$(go version | cut -d' ' -f3), $(puma --version), $("$dir/venv/bin/gunicorn" --version)${bun:+, bun $("$dir/bin/bun" --version), $("$dir/bin/deno" --version | head -1)}"
