#!/bin/sh
# Starts of apps that say "ready" as the very first thing they do, in five ways; see README.md.
#     bench/ready.sh [ROUNDS]        26 starts each
set -eu
cd "$(dirname "$0")/.."
PM_READY_ROUNDS=${1:-40} exec cargo test --test e2e pain_02_ready_as_the_first -- --nocapture
