#!/usr/bin/env bash
# The examples as processes of their own: a coordinator and workers.
# Usage: example_test.sh CASE
. "$(dirname "$(readlink -f "$0")")/lib.sh"

DATA=$MODELSTATE_SOURCE/client/examples/linear_regression/iris.csv
WORKERS=3
STEPS=200

# worker INDEX FILE: in the background; its pid is in $!.
worker() {
  "$MODELSTATE_BIN/linear_regression_worker" "$ADDRESS" "$DATA" "$1" "$WORKERS" "$STEPS" >"$2" 2>&1 &
}

case_LinearRegressionSurvivesTheKillOfAWorker() {
  local pids=() coordinator line killed
  mkfifo "$WORK/coordinator" "$WORK/worker"
  "$MODELSTATE_BIN/linear_regression_coordinator" "$ADDRESS" "$DATA" "$WORKERS" "$STEPS" >"$WORK/coordinator" 2>&1 &
  coordinator=$!
  exec {said}<"$WORK/coordinator"
  read -r -t 60 -u "$said" line
  expect ready "$line" 'the first line of the coordinator'
  worker 0 "$WORK/worker0"; pids+=($!)
  worker 1 "$WORK/worker1"; pids+=($!)
  worker 2 "$WORK/worker"
  killed=$!
  exec {steps}<"$WORK/worker"
  while read -r -t 60 -u "$steps" line; do
    [[ $line != 'step 60 '* ]] || break
  done
  [[ $line == 'step 60 '* ]] || fail "the worker ended before it was killed: $line"
  kill -KILL "$killed"
  wait "$killed" 2>/dev/null
  worker 2 "$WORK/worker2"; pids+=($!)

  wait "$coordinator" || fail "the coordinator: exit code $?"
  for pid in "${pids[@]}"; do wait "$pid" || fail "a worker: exit code $?"; done
  cat <&"$said" >"$WORK/result"
  cat "$WORK/result" "$WORK"/worker[0-9]
  grep -qx "steps $STEPS" "$WORK/result" || fail 'the count of steps'
  # The least squares solution has 0.035869.
  awk '$1 == "loss" && NF == 2 { found = 1; exit !($2 < 0.0359) } END { if (!found) exit 1 }' "$WORK/result" ||
    fail 'the loss is not what least squares reaches'
  check GetModule '{"module": "iris"}' .step "\"$STEPS\""
  check ListCheckpoints '{}' '[.checkpoints[] | .path, .step]' "[\"iris\",\"$STEPS\"]"
}

# As the README of the example starts them, only that the coordinator is the last.
case_LinearRegressionWorkersMayBeStartedBeforeTheCoordinator() {
  local pids=() i STEPS=20
  for i in 0 1 2; do
    worker "$i" "$WORK/worker$i"
    pids+=($!)
  done
  "$MODELSTATE_BIN/linear_regression_coordinator" "$ADDRESS" "$DATA" "$WORKERS" "$STEPS" >"$WORK/result" 2>&1 ||
    fail "the coordinator: exit code $?: $(<"$WORK/result")"
  for i in 0 1 2; do
    wait "${pids[i]}" || fail "worker $i: exit code $?: $(<"$WORK/worker$i")"
  done
  grep -qx "steps $STEPS" "$WORK/result" || fail 'the count of steps'
}

case_LinearRegressionProgramsCheckTheirArguments() {
  local code index
  for index in 3 -1 one 1e0; do
    code=0
    "$MODELSTATE_BIN/linear_regression_worker" "$ADDRESS" "$DATA" "$index" 3 1 2>"$WORK/error" || code=$?
    expect 2 "$code" "a worker with index $index"
    grep -q '0 to WORKERS - 1' "$WORK/error" || fail "what is said of index $index: $(<"$WORK/error")"
  done
  code=0
  "$MODELSTATE_BIN/linear_regression_coordinator" "$ADDRESS" "$DATA" none 1 2>/dev/null || code=$?
  expect 2 "$code" 'a coordinator of "none" workers'
}

# The smallest run of it: its Python makes the stubs from proto/, so this shows that they still fit. The
# script compares with local torch itself.
case_TrainDigitsLearnsAsLocalTorchDoes() {
  needs_python torch sklearn grpc_tools
  "$PYTHON" "$MODELSTATE_SOURCE/client/examples/train_digits/train.py" --server "$ADDRESS" --workers 2 --epochs 1 ||
    fail "train.py: exit code $?"
  check GetModule '{"module": "digits"}' .step '"22"'
}

run_case "$1"
