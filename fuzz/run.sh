#!/usr/bin/env bash
# Runs every fuzz target for a minute (FUZZ_SECONDS) and says what broke. Needs a nightly toolchain and cargo-fuzz
# (`cargo install cargo-fuzz`). What it finds new is kept in fuzz/found; an input that breaks something lies in
# fuzz/artifacts, and belongs into fuzz/corpus once its bug is fixed: tests/fuzz_corpus.rs replays that on stable.
#   fuzz/run.sh [TARGET…]
# FUZZ_SANITIZER=address looks for broken memory too; all unsafe code is in src/sys, and the build takes twice as long.
set -euo pipefail
cd "$(dirname "$0")"
seconds=${FUZZ_SECONDS:-60}
targets=("$@")
((${#targets[@]})) || targets=(keeper_wire cli_protocol node_channel config log_framing)

cargo +nightly fuzz build -s "${FUZZ_SANITIZER:-none}"
broken=()
for target in "${targets[@]}"; do
  mkdir -p "found/$target"
  # Inputs of real traffic are short; what is longer is only slower. No input may take ten seconds or a gigabyte.
  cargo +nightly fuzz run -s "${FUZZ_SANITIZER:-none}" "$target" "found/$target" "corpus/$target" -- \
    -max_total_time="$seconds" -max_len=8192 -timeout=10 -rss_limit_mb=1024 -print_final_stats=1 \
    >"found/$target.log" 2>&1 || broken+=("$target")
  grep -E "^Done|stat::(number_of_executed_units|peak_rss_mb)" "found/$target.log" | sed "s/^/$target: /" || true
done
if ((${#broken[@]})); then
  echo "broken: ${broken[*]}; see fuzz/found/*.log and fuzz/artifacts" >&2
  exit 1
fi
