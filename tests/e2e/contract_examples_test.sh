#!/usr/bin/env bash
# Runs the example of every RPC in service.proto, and those of docs/api.md, as a reader would paste
# them, so that none goes stale.
here=$(dirname "$(readlink -f "$0")")
source "$here/lib.sh"

# `METHOD<tab>COMMAND` per RPC; the command of a comment over several lines on one.
examples() {
  awk '
    /^  \/\/ Example: / { sub(/^  \/\/ Example: /, ""); command = $0; inside = 1; next }
    inside && /^  \/\/ / { sub(/^  \/\/ +/, ""); command = command " " $0; next }
    /^  rpc / {
      method = $2
      sub(/\(.*/, "", method)
      print method "\t" command
      command = ""
    }
    { inside = 0 }' "$MODELSTATE_SOURCE/proto/modelstate/v1/service.proto"
}

# The order in which a reader could run them all; each name once.
order=(GetServerInfo CreateModule GetModule GetModuleSpec ListModules ListParameters ListBuffers GetTensor
  StreamStateDict LoadStateDict ConfigureOptimizer GetOptimizer ApplyStep SetRequiresGrad
  PinSnapshot ReleaseSnapshot LoadCheckpoint SaveCheckpoint ListCheckpoints DeleteCheckpoint
  ListOptimizerState LoadOptimizerState MoveModule WatchModule ListVersions DeleteModule)

grpcurl() { "$GRPCURL" "$@"; }

case_EveryExampleRuns() {
  declare -A command_of
  local method command output code wanted snapshot=''
  while IFS=$'\t' read -r method command; do command_of[$method]=$command; done < <(examples)
  [ ${#command_of[@]} -ge 25 ] || fail "only ${#command_of[@]} RPCs found in service.proto"
  for method in "${!command_of[@]}"; do
    [[ " ${order[*]} " == *" $method "* ]] || fail "$method has no place in the order of this test"
  done
  cp "$MODELSTATE_SOURCE/tests/data/crepe-tiny.pth" "$ROOT/crepe-tiny.pth"

  for method in "${order[@]}"; do
    command=${command_of[$method]-}
    if [[ $command != grpcurl\ * ]]; then
      fail "$method has no example"
      continue
    fi
    [[ $command == *"localhost:50051 modelstate.v1.ModelState/$method" ]] ||
      fail "the example of $method is not a call of it: $command"
    command=${command//localhost:50051/$ADDRESS}
    command=${command//\"...\"/\"$snapshot\"}
    # Watching ends only by its deadline: a short one is enough here.
    command=${command//-max-time 5/-max-time 1}
    output=$(eval "$command" 2>&1)
    code=$?
    # grpcurl's exit code for a status is 64 + its code.
    wanted=0
    if [ "$method" = WatchModule ]; then
      wanted=68
      [[ $output == *'"tiny"'* ]] || fail "$method showed no module: $output"
    fi
    [ "$code" -eq "$wanted" ] || fail "$method: exit $code, not $wanted: $command: $output"
    if [ "$method" = PinSnapshot ]; then snapshot=$(jq -r .snapshotId <<<"$output"); fi
  done
}

# The blocks of docs/api.md that call grpcurl, in their order.
case_EveryExampleOfTheGuideRuns() {
  local blocks=0 block
  create_tiny && configure_sgd || return
  while IFS= read -r -d $'\1' block; do
    [[ $block == grpcurl\ * ]] || continue
    blocks=$((blocks + 1))
    output=$(set -e; eval "${block//localhost:50051/$ADDRESS}" 2>&1) || fail "$block: $output"
  done < <(awk '/^```/ { if (inside) printf "\1"; inside = !inside; next } inside' "$MODELSTATE_SOURCE/docs/api.md")
  [ "$blocks" -ge 2 ] || fail "only $blocks blocks found in docs/api.md"
  check GetModule '{"module": "tiny"}' '.step' '"1"'
}

run_case "$1"
