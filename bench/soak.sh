#!/bin/sh
# A long random mix of overlapping commands, deaths and interruptions; see README.md.
#     bench/soak.sh [STEPS]          PM_MIX_SEED=n bench/soak.sh plays a mix again
set -eu
cd "$(dirname "$0")/.."
PM_MIX_STEPS=${1:-1000} exec cargo test --test e2e pain_04_after_any_mix -- --nocapture
