#!/usr/bin/env bash
# Runs a test program with the orders of a hundred seeds. Usage: seeds_test.sh PROGRAM FILTER
set -uo pipefail
failed=0
for seed in $(seq 100); do
  log=$(FAKE_CUDA_SEED=$seed "$1" --gtest_filter="$2" 2>&1) && continue
  failed=$((failed + 1))
  printf 'seed %d:\n%s\n' "$seed" "$(tail -20 <<<"$log")"
done
[ "$failed" -eq 0 ] || { echo "$failed of 100 seeds failed"; exit 1; }
