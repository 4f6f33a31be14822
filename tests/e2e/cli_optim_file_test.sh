#!/usr/bin/env bash
# Training that moves between torch and a server in mid-run: `modelstate optim import` and `export`, with
# what torch wrote and went on to (tests/data/make_optimizer_files.py).
# Usage: cli_optim_file_test.sh CASE; each case has a server of its own. See lib.sh for its environment.
here=$(dirname "$(readlink -f "$0")")
source "$here/lib.sh"
GOLDENS=$MODELSTATE_SOURCE/tests/data/optimizer-torch-2.15.0

# load_before NAME MODULE: the parameters after torch's third step.
load_before() {
  cp "$GOLDENS/$1-before.safetensors" "$ROOT/"
  cli 0 load "$2" "$1-before.safetensors" >/dev/null
}
state_of() {
  cli 0 --json optim state "$1" --digests | jq -c '[.tensors[] | [.name, .slot, .xxh3]]'
}

case_TrainingMovesFromTorchToTheServerAndBack() {
  local name algorithm step state
  for name in adamw sgd; do
    load_before "$name" "$name"
    algorithm=$(jq -c '.algorithm | ascii_upcase' "$GOLDENS/$name.json")
    # torch's SGD counts no steps.
    step=3
    [ "$name" = adamw ] || step=0
    json '[.algorithm, .groups, .step]' "[$algorithm,2,$step]" \
      optim import "$name" "$GOLDENS/$name.pt" --order "$GOLDENS/$name-order.txt"
    json '[.groups[] | .parameters, .hyperparameters.weight_decay]' '[2,0.1,3,0]' optim show "$name"
    # At once back again: another module with it has the same state.
    json '[.groups, .parameters, .order]' '[2,5,["fc1.weight","fc2.weight","fc1.bias","scale","fc2.bias"]]' \
      optim export "$name" "$WORK/$name-3.pt" --order "$GOLDENS/$name-order.txt"
    load_before "$name" again
    cli 0 optim import again "$WORK/$name-3.pt" --order "$GOLDENS/$name-order.txt" >/dev/null
    state=$(state_of "$name")
    expect "$state" "$(state_of again)" "state of $name after export and import"
    cli 0 rm again >/dev/null

    for step in 4 5; do
      cli 0 step-from "$name" "$GOLDENS/$name-gradients-$step.safetensors" >/dev/null
    done
    cli 0 fetch "$name" "$WORK/$name-5.safetensors" >/dev/null
    # The server does not fuse multiplies and adds, torch may.
    expect '[]' "$("$MODELSTATE_BIN/modelstate" --json diff "$WORK/$name-5.safetensors" "$GOLDENS/$name-after.safetensors" |
      jq -c '[.differences[] | select(.max_abs_difference == null or .max_abs_difference > 1e-6)]')" \
      "$name two steps after the import, against torch"
    json .tensors "$(jq -n "if \"$name\" == \"sgd\" then 5 else 15 end")" \
      optim export "$name" "$WORK/$name-5.pt" --order "$GOLDENS/$name-order.txt"
    # The module has the groups by now: without an order both go by them and by its own order.
    state=$(state_of "$name")
    cli 0 optim export "$name" "$WORK/$name-own.pt" >/dev/null
    cli 0 optim import "$name" "$WORK/$name-own.pt" >/dev/null
    [ "$name" = sgd ] || expect "$state" "$(state_of "$name")" "state of $name after export and import by its groups"
  done
}

# With torch itself, which takes what the server wrote and goes on: tests/data/check_optimizer_file.py.
case_TorchGoesOnWithEachRuleFromWhatTheServerExports() {
  needs_python torch
  "$PYTHON" "$MODELSTATE_SOURCE/tests/data/check_optimizer_file.py" --mid-run "$MODELSTATE_BIN" ||
    fail "torch went on otherwise than it does uninterrupted: exit code $?"
}

case_WhatDoesNotFitIsRefusedWithTheWayOut() {
  load_before adamw net
  cli 4 optim import net "$GOLDENS/adamw.pt" >/dev/null
  grep -q 'different number of parameter groups: the file 2, the module 0.*give the order (--order FILE)' "$WORK/cli.err" ||
    fail "import without an order: $(<"$WORK/cli.err")"
  printf '%s\n' fc2.weight fc1.weight fc1.bias scale fc2.bias >"$WORK/order.txt"
  cli 4 optim import net "$GOLDENS/adamw.pt" --order "$WORK/order.txt" >/dev/null
  grep -q 'SHAPE_MISMATCH.*"fc2.weight"' "$WORK/cli.err" || fail "import in a wrong order: $(<"$WORK/cli.err")"
  cli 4 optim import net "$MODELSTATE_SOURCE/tests/data/optimizer-torch-1.13.1/adamw.pt" \
    --order "$GOLDENS/adamw-order.txt" >/dev/null
  grep -q 'give the algorithm (--algorithm)' "$WORK/cli.err" || fail "import of 1.13: $(<"$WORK/cli.err")"
  json .algorithm '"ADAMW"' optim import net "$MODELSTATE_SOURCE/tests/data/optimizer-torch-1.13.1/adamw.pt" \
    --order "$GOLDENS/adamw-order.txt" --algorithm adamw
  # The file says what it is of.
  cli 4 optim import net "$GOLDENS/adamw.pt" --order "$GOLDENS/adamw-order.txt" --algorithm radam >/dev/null
  grep -q 'the file is of adamw.*given is radam: leave --algorithm out' "$WORK/cli.err" ||
    fail "import as of another: $(<"$WORK/cli.err")"
  cli 3 optim export net "$WORK/nowhere/out.pt" --order "$GOLDENS/adamw-order.txt" >/dev/null
  grep -q "no folder for \"$WORK/nowhere/out.pt\"; make it" "$WORK/cli.err" ||
    fail "export to no folder: $(<"$WORK/cli.err")"
  head -c 2000 "$GOLDENS/adamw.pt" >"$WORK/short.pt"
  cli 6 optim import net "$WORK/short.pt" >/dev/null
  cli 3 optim import net "$WORK/none.pt" >/dev/null
  cli 3 optim export nothing "$WORK/out.pt" >/dev/null
  head -n 2 "$WORK/order.txt" >"$WORK/two.txt"
  cli 4 optim export net "$WORK/out.pt" --order "$WORK/two.txt" >/dev/null
  grep -q 'MISSING_KEY.*"fc1.bias", "fc2.bias", "scale"' "$WORK/cli.err" || fail "export of two: $(<"$WORK/cli.err")"
  [ -z "$(ls "$WORK" | grep out.pt)" ] || fail 'a refused export left a file'
}

run_case "$1"
