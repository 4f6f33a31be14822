#!/usr/bin/env bash
# Builds the fuzz targets with libFuzzer and runs each for a while from its seeds; what fails is left
# in build/fuzz/artifacts. Usage: tests/fuzz/run.sh [SECONDS [NAME...]]
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/../.."
seconds=${1:-30}
shift || true
names=("$@")
[ ${#names[@]} -gt 0 ] || names=(manifest safetensors sharded_index torch_legacy torch_pickle torch_zip)

cmake --preset fuzz >/dev/null
cmake --build build/fuzz -j "$(nproc)" --target fuzzers
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
for name in "${names[@]}"; do
  # What it finds stays there for the next run; the seeds stay as they are.
  mkdir -p "build/fuzz/corpus/$name" build/fuzz/artifacts
  log=build/fuzz/corpus/$name.log
  # Leaks are looked for where the corpora are replayed: after each input that takes most of the time.
  if ! build/fuzz/tests/fuzz_"$name" -max_total_time="$seconds" -max_len=4096 -timeout=10 \
    -rss_limit_mb=1024 -detect_leaks=0 -entropic=0 -print_final_stats=1 \
    -artifact_prefix="build/fuzz/artifacts/$name-" \
    "build/fuzz/corpus/$name" "tests/fuzz/corpus/$name" >"$log" 2>&1; then
    tail -40 "$log"
    echo "$name: failed" >&2
    exit 1
  fi
  awk -v name="$name" '/^stat::number_of_executed_units/ { print name ": " $2 " inputs" }' "$log"
done
