#!/usr/bin/env bash
# Runs the CUDA tests and benchmarks of a bundle (tools/gpu_bundle.sh) and prints one table. Without
# a GPU all of them say skipped. Exit 0 when nothing failed.
# Usage: run_gpu_checks.sh [--tests | --bench]   (default: both)
set -uo pipefail
here=$(dirname "$(readlink -f "$0")")
what=${1:-}
case $what in
  '' | --tests | --bench) ;;
  *) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 2 ;;
esac
logs=${OUT:-$(mktemp -d)}
# The machine's own C library where it is new enough, else the bundle's, with its loader.
start=(env "LD_LIBRARY_PATH=$here/lib")
if ! "${start[@]}" "$here/bin/cuda_device_test" --gtest_list_tests >/dev/null 2>&1; then
  start=("$here/libc/ld-linux-x86-64.so.2" --library-path
    "$here/lib:$here/libc:/usr/local/nvidia/lib64:/usr/lib/x86_64-linux-gnu:/usr/lib64")
fi

rows=()
failures=0
# check NAME COMMAND...: passed, failed or skipped, with GoogleTest's counts.
check() {
  local name=$1 log=$logs/$1.log begin=$SECONDS result
  shift
  timeout 240 "$@" >"$log" 2>&1
  local code=$?
  local passed failed skipped
  passed=$(sed -n 's/^\[  PASSED  \] \([0-9]*\) test.*/\1/p' "$log" | tail -1)
  failed=$(sed -n 's/^\[  FAILED  \] \([0-9]*\) test.*/\1/p' "$log" | tail -1)
  skipped=$(sed -n 's/^\[  SKIPPED \] \([0-9]*\) test.*/\1/p' "$log" | tail -1)
  if [ "$code" -ne 0 ]; then
    result=FAILED
    failures=$((failures + 1))
    tail -40 "$log"
  elif [ -n "$skipped" ] && [ "$skipped" -gt 0 ]; then
    result=skipped
  else
    result=passed
  fi
  rows+=("$(printf '| %-28s | %-7s | %3s passed, %s failed, %s skipped | %4d s |' "$name" "$result" \
    "${passed:-0}" "${failed:-0}" "${skipped:-0}" $((SECONDS - begin)))")
}

if command -v nvidia-smi >/dev/null; then
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
else
  echo 'no nvidia-smi'
fi
if [ "$what" != --bench ]; then
  check device_conformance "${start[@]}" "$here/bin/device_test" --gtest_filter="Devices/*"
  check cuda_device_test "${start[@]}" "$here/bin/cuda_device_test"
  check cuda_step_test "${start[@]}" "$here/bin/cuda_step_test"
  # The suites of calls, on modules of the GPU, and the same life of a module there and on the host.
  check optimizer_golden_test env MODELSTATE_TEST_DEVICE=cuda:0 MODELSTATE_SOURCE_DIR="$here" \
    "${start[@]}" "$here/bin/optimizer_golden_test"
  check module_test env MODELSTATE_TEST_DEVICE=cuda:0 \
    "${start[@]}" "$here/bin/module_test" --gtest_filter='-Move*:*History*'
  check rpc_gpu_test env MODELSTATE_TEST_DEVICE=cuda:0 MODELSTATE_SOURCE_DIR="$here" \
    "${start[@]}" "$here/bin/rpc_gpu_test"
  # (Its programs find the bundle's libraries by themselves only where the loader is the machine's.)
  [ "${start[0]}" != env ] ||
    check tour "${start[@]}" bash "$here/gpu_tour.sh" "$here/bin" "$here/tests/data/crepe-tiny.pth"
  if command -v compute-sanitizer >/dev/null; then
    check memcheck_device env "LD_LIBRARY_PATH=$here/lib" compute-sanitizer --error-exitcode 9 \
      "$here/bin/cuda_device_test" --gtest_filter='CudaDeviceTest.An*'
    check memcheck_conformance env "LD_LIBRARY_PATH=$here/lib" compute-sanitizer --error-exitcode 9 \
      "$here/bin/device_test" --gtest_filter='Devices/*Cuda'
    check memcheck_step env "LD_LIBRARY_PATH=$here/lib" compute-sanitizer --error-exitcode 9 \
      "$here/bin/cuda_step_test" --gtest_filter='*Lion*:*lion*:*Norm*:*Accumulate*'
  else
    rows+=("| memcheck                     | skipped | no compute-sanitizer               |      |")
  fi
fi
if [ "$what" != --tests ]; then
  "${start[@]}" "$here/bin/cuda_optimizer_bench" | tee "$logs/bench.txt"
  code=${PIPESTATUS[0]}
  if [ "$code" -ne 0 ]; then failures=$((failures + 1)); fi
  rows+=("| cuda_optimizer_bench         | exit $code | |      |")
  for bench in 'gpu_flows_bench --rows=fetch,load,push' 'gpu_flows_bench --rows=save --rounds=3' \
    'step_latency_bench --device=cuda:0' \
    'step_bench --sections=latency --device=cuda:0'; do
    # shellcheck disable=SC2086
    timeout 120 "${start[@]}" "$here/bin/"$bench | tee "$logs/${bench%% *}.txt"
    code=${PIPESTATUS[0]}
    if [ "$code" -ne 0 ]; then failures=$((failures + 1)); fi
    rows+=("$(printf '| %-28s | exit %s | |      |' "${bench%% *}" "$code")")
  done
  if command -v python3 >/dev/null; then timeout 120 python3 "$here/torch_cuda_optim.py"; fi
fi
printf '\n| check | result | cases | time |\n|---|---|---|---|\n'
printf '%s\n' "${rows[@]}"
[ "$failures" -eq 0 ]
