# Sourced by the end-to-end tests: a real server on a free loopback port, grpcurl, and checks.
# Needs from the environment: MODELSTATE_BIN (folder of the executables), MODELSTATE_GRPCURL and
# MODELSTATE_SOURCE. A test that finds no grpcurl is skipped (exit 77). Cases that hold us against torch
# take a Python that has it from MODELSTATE_PYTHON (else python3), or are skipped.

set -uo pipefail
GRPCURL=${MODELSTATE_GRPCURL:-grpcurl}
[ -x "$GRPCURL" ] || GRPCURL=$(command -v grpcurl) ||
  { echo 'skipped: no grpcurl; tools/install_dependencies.sh --tests builds it'; exit 77; }
command -v jq >/dev/null || { echo 'skipped: no jq'; exit 77; }

# As a login often has it: the server raises its own limit.
ulimit -Sn 1024

SERVICE=modelstate.v1.ModelState
WORK=$(mktemp -d)
ROOT=$WORK/checkpoints
SERVER_PID=
ADDRESS=

cleanup() {
  local code=$?
  trap - EXIT
  if [ -n "$SERVER_PID" ]; then
    kill -TERM "$SERVER_PID" 2>/dev/null
    wait "$SERVER_PID"
  fi
  rm -rf "$WORK"
  exit "$code"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# start_server [FLAG...]: sets ADDRESS. The first line it waits for is the server's own.
start_server() {
  mkdir -p "$ROOT"
  # A pipe, not a poll: read returns when the server says its port or ends.
  mkfifo "$WORK/lines"
  "$MODELSTATE_BIN/modelstate-server" --listen=127.0.0.1:0 --checkpoint_root="$ROOT" "$@" \
    >"$WORK/lines" 2>"$WORK/server.err" &
  SERVER_PID=$!
  exec {lines}<"$WORK/lines"
  rm "$WORK/lines"
  local line
  while IFS= read -r -t 60 -u "$lines" line; do
    case $line in
      'listening on '*) ADDRESS=${line#listening on }; return ;;
    esac
  done
  echo 'the server did not start:'
  cat "$WORK/server.err"
  exit 1
}

# stop_server: SIGTERM; returns the server's exit code.
stop_server() {
  local pid=$SERVER_PID
  SERVER_PID=
  kill -TERM "$pid" && wait "$pid"
}

# Counts in a file, since much of a case runs in $(...).
fail() {
  echo "FAILED: $*" >&2
  echo "$*" >>"$WORK/failures"
}

# rpc METHOD [JSON]: the answer on stdout. Its exit code is grpcurl's.
rpc() {
  "$GRPCURL" -plaintext -max-time 60 -d "${2-}" "$ADDRESS" "$SERVICE/$1"
}

# ok METHOD JSON [FILTER]: the call must succeed; prints the answer, through jq where FILTER is given.
# Answers of a stream are one JSON value after the other.
ok() {
  local output
  if ! output=$(rpc "$1" "$2" 2>&1); then
    fail "$1 $2: $output"
    return 1
  fi
  if [ $# -gt 2 ]; then jq -c "$3" <<<"$output"; else printf '%s\n' "$output"; fi
}

# expect WANTED GOT WHAT
expect() {
  [ "$1" = "$2" ] || fail "$3: wanted $1, got $2"
}

# check METHOD JSON FILTER WANTED: the answer through jq (compact) is WANTED.
check() {
  local got
  got=$(ok "$1" "$2" "$3") || return
  expect "$4" "$got" "$1 $2 | $3"
}

# refused METHOD JSON CODE REASON TEXT...: the call must fail with that code and reason, and its message
# must hold each TEXT: the tensor or field, the rule, the way out. All on one server, whose module
# `tiny` must be as before.
refused() {
  local method=$1 json=$2 code=$3 reason=$4 output message text before after
  shift 4
  before=$(rpc ListModules '{}' 2>&1)
  if output=$("$GRPCURL" -plaintext -max-time 60 -format-error -d "$json" "$ADDRESS" \
    "$SERVICE/$method" 2>&1 >/dev/null); then
    fail "$method $json: was not refused"
    return
  fi
  # grpcurl prints the status as JSON: code as a number, details with their types resolved.
  local status
  if ! status=$(jq -c . <<<"$output" 2>/dev/null); then
    fail "$method $json: no status but: $output"
    return
  fi
  message=$(jq -r '.message // ""' <<<"$status")
  expect "$(code_number "$code")" "$(jq '.code' <<<"$status")" "$method $json: code of: $message"
  if [ -n "$reason" ]; then
    local info='.details[]? | select(.["@type"] | endswith("google.rpc.ErrorInfo"))'
    expect "$reason" "$(jq -r "$info | .reason" <<<"$status")" "$method $json: reason of: $message"
    expect modelstate "$(jq -r "$info | .domain" <<<"$status")" "$method $json: domain"
  fi
  for text in "$@"; do
    [[ $message == *"$text"* ]] || fail "$method $json: '$text' is not in: $message"
  done
  [ ${#message} -le 1024 ] || fail "$method $json: a message of ${#message} bytes"
  after=$(rpc ListModules '{}' 2>&1)
  expect "$before" "$after" "$method $json: the modules after the refusal"
}

code_number() {
  local names=(OK CANCELLED UNKNOWN INVALID_ARGUMENT DEADLINE_EXCEEDED NOT_FOUND ALREADY_EXISTS
    PERMISSION_DENIED RESOURCE_EXHAUSTED FAILED_PRECONDITION ABORTED OUT_OF_RANGE UNIMPLEMENTED
    INTERNAL UNAVAILABLE DATA_LOSS UNAUTHENTICATED) i
  for i in "${!names[@]}"; do
    if [ "${names[i]}" = "$1" ]; then
      echo "$i"
      return
    fi
  done
}

# The module that the contract's examples use: one parameter [[1, 2], [3, 4]], one buffer [0, 0].
create_tiny() {
  ok CreateModule '{"name": "tiny", "spec": {"tensors": [
    {"name": "weight", "kind": "PARAMETER", "dtype": "F32", "shape": [2, 2],
     "values": {"doubles": {"values": [1, 2, 3, 4]}}},
    {"name": "running_mean", "kind": "BUFFER", "dtype": "F32", "shape": [2]}]}}' >/dev/null
}

# SGD with lr 1: a step subtracts its gradient.
configure_sgd() {
  ok ConfigureOptimizer '{"module": "tiny", "optimizer": {"algorithm": "SGD",
    "hyperparameters": {"lr": 1}}}' >/dev/null
}

# step_json HEADER TABLE: the three messages of a push with inline values.
step_json() {
  printf '{"header": %s} {"tensors": {"tensors": [%s]}} {"trailer": {}}' "$1" "$2"
}

# needs_python MODULE...: sets PYTHON, or skips the case where it has not all of these modules.
needs_python() {
  local module
  PYTHON=${MODELSTATE_PYTHON:-python3}
  export PYTHONDONTWRITEBYTECODE=1 # the scripts lie in the source tree
  for module in "$@"; do
    "$PYTHON" -c "import $module" 2>"$WORK/python.err" ||
      { echo "skipped: no $module in $PYTHON (MODELSTATE_PYTHON): $(tail -n 1 "$WORK/python.err")"; exit 77; }
  done
}

CLI=$MODELSTATE_BIN/modelstate

# cli CODE ARGUMENT...: runs it and checks the exit code; stdout is passed on, stderr is in $WORK/cli.err.
cli() {
  local wanted=$1 code=0
  shift
  MODELSTATE_SERVER=$ADDRESS "$CLI" "$@" 2>"$WORK/cli.err" || code=$?
  [ "$code" -eq "$wanted" ] || fail "modelstate $*: exit code $code, not $wanted: $(<"$WORK/cli.err")"
  [ "$code" -eq "$wanted" ]
}

# json FILTER WANTED ARGUMENT...: with --json stdout is one JSON document (watch: one a line) and nothing
# else; through jq it is WANTED.
json() {
  local filter=$1 wanted=$2 output got
  shift 2
  output=$(cli 0 --json "$@") || return 1
  expect 1 "$(jq -s length <<<"$output")" "JSON documents of modelstate $*"
  got=$(jq -c "$filter" <<<"$output") || { fail "modelstate --json $*: no JSON: $output"; return 1; }
  expect "$wanted" "$got" "modelstate --json $* | $filter"
}

# prints TEXT ARGUMENT...: the output for people has TEXT.
prints() {
  local text=$1 output
  shift
  output=$(cli 0 "$@") || return 1
  [[ $output == *"$text"* ]] || fail "modelstate $*: '$text' is not in: $output"
}

# A checkpoint of 26 parameters and 18 buffers, in a module "crepe".
load_crepe() {
  cp "$MODELSTATE_SOURCE/tests/data/crepe-tiny.pth" "$ROOT/crepe-tiny.pth"
  json '[.loaded, .module.parameters, .module.buffers, .format]' '[44,26,18,"torch zip"]' load crepe crepe-tiny.pth
}

# run_case NAME: runs case_NAME and ends the test with its result.
run_case() {
  if ! declare -F "case_$1" >/dev/null; then
    echo "no case $1"
    exit 2
  fi
  start_server
  "case_$1"
  if [ -e "$WORK/failures" ]; then
    echo "checks failed; the server's log:"
    tail -n 30 "$WORK/server.err"
    exit 1
  fi
}
