#!/usr/bin/env bash
# Every implemented RPC through the real grpcurl, by JSON typed by hand, against a real server.
# Usage: grpcurl_test.sh CASE; each case has a server of its own. See lib.sh for its environment.
here=$(dirname "$(readlink -f "$0")")
source "$here/lib.sh"

CREPE=$MODELSTATE_SOURCE/tests/data/crepe-tiny.pth

# floats JSON: the F32 elements of every chunk in a stream's answer, as `1 2 3.5`.
floats() {
  jq -r 'select(.chunk) | .chunk.data' <<<"$1" | while read -r data; do base64 -d <<<"$data"; done |
    od -An -v -tf4 -w4 | xargs
}

values='(.tensor.values.doubles.values // .tensor.values.ints.values)'

case_ListAndDescribeShowTheWholeContract() {
  local services text rpc message
  services=$("$GRPCURL" -plaintext "$ADDRESS" list) || fail "list: $services"
  for text in $SERVICE grpc.health.v1.Health grpc.reflection.v1.ServerReflection \
    grpc.reflection.v1alpha.ServerReflection; do
    grep -qxF "$text" <<<"$services" || fail "list does not show $text but: $services"
  done
  text=$("$GRPCURL" -plaintext "$ADDRESS" describe $SERVICE) || fail "describe: $text"
  while read -r rpc message; do
    grep -q "rpc $rpc " <<<"$text" || fail "describe does not show $rpc"
    "$GRPCURL" -plaintext "$ADDRESS" describe "modelstate.v1.$message" >/dev/null ||
      fail "describe modelstate.v1.$message"
  done < <(sed -nE 's/^ *rpc (\w+)\((stream )?(\w+)\).*/\1 \3/p' \
    "$MODELSTATE_SOURCE/proto/modelstate/v1/service.proto")
  "$GRPCURL" -plaintext "$ADDRESS" describe google.rpc.ErrorInfo >/dev/null ||
    fail 'describe google.rpc.ErrorInfo: details of errors cannot be shown'
}

case_HealthOfTheServer() {
  local answer
  answer=$("$GRPCURL" -plaintext -d '{}' "$ADDRESS" grpc.health.v1.Health/Check) || fail "$answer"
  expect SERVING "$(jq -r .status <<<"$answer")" 'health of the server'
}

# health SERVICE: the status, or grpcurl's exit code where there is none.
health() {
  local answer
  answer=$("$GRPCURL" -plaintext -d "{\"service\": \"$1\"}" "$ADDRESS" grpc.health.v1.Health/Check \
    2>/dev/null) || { echo $?; return; }
  jq -r .status <<<"$answer"
}

case_HealthOfEachModule() {
  expect 69 "$(health tiny)" 'health of a module that is not there (64 + NOT_FOUND)'
  create_tiny || return
  ok CreateModule '{"name": "empty"}' >/dev/null || fail 'create empty'
  expect SERVING "$(health $SERVICE)" 'health of the service'
  expect SERVING "$(health tiny)" 'health of a module'
  expect NOT_SERVING "$(health empty)" 'health of an empty module'
  ok LoadStateDict '{"header": {"module": "empty", "tensor_count": 1}}
    {"tensors": {"tensors": [{"name": "w", "dtype": "F32", "shape": [1], "values": {"doubles": {"values": [3]}}}]}}
    {"trailer": {}}' >/dev/null || fail 'load'
  expect SERVING "$(health empty)" 'health of the module that a load has filled'
  ok DeleteModule '{"module": "tiny"}' >/dev/null || fail 'delete'
  expect NOT_SERVING "$(health tiny)" 'health of a deleted module'
}

# Which version a client speaks must make no difference; this grpcurl itself may know only one.
case_BothVersionsOfReflectionAnswerAlike() {
  local version method answer first=''
  for version in v1 v1alpha; do
    method=grpc.reflection.$version.ServerReflection/ServerReflectionInfo
    answer=$("$GRPCURL" -plaintext -d '{"list_services": "*"}
      {"file_containing_symbol": "modelstate.v1.ModelState"}
      {"file_by_filename": "modelstate/v1/module.proto"}
      {"file_containing_symbol": "google.rpc.ErrorInfo"}
      {"file_containing_symbol": "no.such.Symbol"}' "$ADDRESS" "$method") || fail "$method: $answer"
    expect '["grpc.health.v1.Health","grpc.reflection.v1.ServerReflection","grpc.reflection.v1alpha.ServerReflection","modelstate.v1.ModelState"]' \
      "$(jq -c 'select(.listServicesResponse) | [.listServicesResponse.service[].name]' <<<"$answer")" "$method: services"
    expect 5 "$(jq 'select(.errorResponse) | .errorResponse.errorCode' <<<"$answer")" "$method: an unknown symbol"
    expect 3 "$(jq -s '[.[] | select(.fileDescriptorResponse)] | length' <<<"$answer")" "$method: files"
    # Fields carry their JSON names: every client prints them the same way.
    jq -r '.fileDescriptorResponse.fileDescriptorProto[]?' <<<"$answer" |
      while read -r file; do base64 -d <<<"$file"; done | grep -a parameterCount >/dev/null || fail "$method: no JSON names"
    answer=$(jq -c 'del(.originalRequest)' <<<"$answer")
    [ -z "$first" ] || [ "$first" = "$answer" ] || fail "$method: another answer than v1"
    first=$answer
  done
}

case_ServerInfo() {
  check GetServerInfo '{}' '.devices[0].name' '"cpu"'
  check GetServerInfo '{}' '(.version | length > 0) and (.incarnation | tonumber > 0)' true
  check GetServerInfo '{}' '[.limits.maxChunkBytes, .limits.pushMemoryLimitBytes] | map(tonumber > 0)' '[true,true]'
  check GetServerInfo '{}' '.checkpointFormats | map(test("safetensors|torch")) | any' true
  check GetServerInfo '{}' '.optimizers | map(ascii_upcase) | sort | join(" ") | test("ADAMW.*SGD")' true
}

case_CreateFromASpecWithValues() {
  create_tiny
  check GetModule '{"module": "tiny"}' '[.name, .state, .version.number, .parameterCount, .bufferCount, .totalBytes]' \
    '["tiny","READY","1","1","1","24"]'
  check GetTensor '{"module": "tiny", "name": "weight"}' "$values" '[1,2,3,4]'
  check GetTensor '{"module": "tiny", "name": "weight"}' '[.statistics.count, .statistics.min, .statistics.max, .statistics.mean]' '["4",1,4,2.5]'
  check GetTensor '{"module": "tiny", "name": "weight", "first": 1, "count": 2}' "$values" '[2,3]'
  check GetTensor '{"module": "tiny", "name": "running_mean"}' "$values" '[0,0]'
  check ListParameters '{"module": "tiny"}' '[.tensors[] | .name, .kind, .dtype, .shape, .requiresGrad]' \
    '["weight","PARAMETER","F32",["2","2"],true]'
  check ListBuffers '{"module": "tiny", "digests": true}' '[.tensors[] | .name, .kind, .persistent, (.xxh3 | length)]' \
    '["running_mean","BUFFER",true,16]'
}

case_CreateWithInitializersTiesAndMetadata() {
  ok CreateModule '{"name": "tied", "spec": {"metadata": {"architecture": "two towers"}, "tensors": [
    {"name": "a.weight", "kind": "PARAMETER", "dtype": "F32", "shape": [3], "initializer": {"constant": 0.5}},
    {"name": "b.weight", "kind": "PARAMETER", "aliasOf": "a.weight"},
    {"name": "frozen", "kind": "PARAMETER", "dtype": "F64", "shape": [1], "requires_grad": false, "initializer": {"ones": true}},
    {"name": "mask", "kind": "BUFFER", "dtype": "BOOL", "shape": [2], "persistent": false, "values": {"ints": {"values": [1, 0]}}},
    {"name": "count", "kind": "BUFFER", "dtype": "I64", "values": {"ints": {"values": [-7]}}}]}}' >/dev/null ||
    { fail 'create'; return; }
  check GetModule '{"module": "tied"}' '.metadata.architecture' '"two towers"'
  check GetTensor '{"module": "tied", "name": "b.weight"}' "$values" '[0.5,0.5,0.5]'
  check ListParameters '{"module": "tied"}' '[.tensors[] | .name, .aliasOf // "-"]' \
    '["a.weight","-","b.weight","a.weight","frozen","-"]'
  check ListParameters '{"module": "tied", "selection": {"names": ["frozen"]}}' '.tensors[0].requiresGrad' false
  check GetTensor '{"module": "tied", "name": "mask"}' "$values | map(tostring)" '["1","0"]'
  check GetTensor '{"module": "tied", "name": "count"}' "$values | map(tostring)" '["-7"]'
}

case_EveryDTypeByHand() {
  local dtype tensors='' separator='' json
  for dtype in F64 F32 F16 BF16 F8_E4M3 F8_E5M2; do
    tensors+="$separator{\"name\": \"$dtype\", \"kind\": \"PARAMETER\", \"dtype\": \"$dtype\", \"shape\": [2], \"values\": {\"doubles\": {\"values\": [0.5, -2]}}}"
    separator=,
  done
  for dtype in I64 I32 I16 I8 U64 U32 U16 U8 BOOL; do
    tensors+=",{\"name\": \"$dtype\", \"kind\": \"BUFFER\", \"dtype\": \"$dtype\", \"shape\": [2], \"values\": {\"ints\": {\"values\": [0, 1]}}}"
  done
  tensors+=',{"name": "C64", "kind": "BUFFER", "dtype": "C64", "shape": [1], "values": {"doubles": {"values": [0.5, -2]}}}'
  json="{\"name\": \"types\", \"spec\": {\"tensors\": [$tensors]}}"
  ok CreateModule "$json" >/dev/null || return
  for dtype in F64 F32 F16 BF16 F8_E4M3 F8_E5M2 C64; do
    check GetTensor "{\"module\": \"types\", \"name\": \"$dtype\"}" "$values" '[0.5,-2]'
  done
  for dtype in I64 I32 I16 I8 U64 U32 U16 U8 BOOL; do
    check GetTensor "{\"module\": \"types\", \"name\": \"$dtype\"}" "$values | map(tonumber)" '[0,1]'
  done
  check GetModule '{"module": "types"}' '.totalBytes' '"106"'
}

case_AStepByHand() {
  local step
  create_tiny && configure_sgd || return
  step=$(step_json '{"module": "tiny", "worker": "me", "sequence": 1, "tensor_count": 1}' \
    '{"name": "weight", "dtype": "F32", "shape": [2, 2], "values": {"doubles": {"values": [0.5, 0, 0, -1]}}}')
  check ApplyStep "$step" '[.outcome, .replayed // false, .step, .updated]' '["APPLIED",false,"1","1"]'
  check GetTensor '{"module": "tiny", "name": "weight"}' "$values" '[0.5,2,3,5]'
  check GetTensor '{"module": "tiny", "name": "running_mean"}' "$values" '[0,0]'
  # The same step again changes nothing and gets the first answer; so does its header alone.
  check ApplyStep "$step" '[.outcome, .replayed, .step]' '["APPLIED",true,"1"]'
  check ApplyStep '{"header": {"module": "tiny", "worker": "me", "sequence": 1}}' '[.outcome, .replayed, .step]' '["APPLIED",true,"1"]'
  check GetTensor '{"module": "tiny", "name": "weight"}' "$values" '[0.5,2,3,5]'
  # A buffer's value arrives in the same version as the step.
  step=$(step_json '{"module": "tiny", "worker": "me", "sequence": 2, "tensor_count": 2}' \
    '{"name": "weight", "dtype": "F32", "shape": [2, 2], "values": {"doubles": {"values": [0, 1, 0, 0]}}},
     {"name": "running_mean", "kind": "BUFFER", "dtype": "F32", "shape": [2], "values": {"doubles": {"values": [7, 8]}}}')
  local version
  version=$(ok ApplyStep "$step" '.version.number')
  check ListBuffers '{"module": "tiny"}' '.tensors[0].changedVersion' "$version"
  check ListParameters '{"module": "tiny"}' '.tensors[0].changedVersion' "$version"
  check GetTensor '{"module": "tiny", "name": "running_mean"}' "$values" '[7,8]'
  # A step for this time only at another rate.
  step=$(step_json '{"module": "tiny", "group_overrides": [{"hyperparameters": {"lr": 10}}], "tensor_count": 1}' \
    '{"name": "weight", "dtype": "F32", "shape": [2, 2], "values": {"doubles": {"values": [0, 0, 1, 0]}}}')
  check ApplyStep "$step" '.step' '"3"'
  check GetTensor '{"module": "tiny", "name": "weight"}' "$values" '[0.5,1,-7,5]'
  # Not finite: nothing changes.
  step=$(step_json '{"module": "tiny", "tensor_count": 1}' \
    '{"name": "weight", "dtype": "F32", "shape": [2, 2], "values": {"doubles": {"values": ["NaN", 0, 0, 0]}}}')
  check ApplyStep "$step" '[.outcome, .nonfinite[0]]' '["SKIPPED_NONFINITE","weight"]'
  check GetTensor '{"module": "tiny", "name": "weight"}' "$values" '[0.5,1,-7,5]'
}

case_OptimizerIsConfiguredAndShown() {
  create_tiny || return
  check ConfigureOptimizer '{"module": "tiny", "optimizer": {"algorithm": "ADAMW", "hyperparameters": {"lr": 0.01},
    "groups": [{"name": "slow", "selection": {"globs": ["w*"]}, "hyperparameters": {"weight_decay": 0}}],
    "max_grad_norm": 1}}' '.config.algorithm' '"ADAMW"'
  check GetOptimizer '{"module": "tiny"}' '.groups[0] | [.name, .parameterCount, .hyperparameters.lr, .hyperparameters.weightDecay, .hyperparameters.beta2]' \
    '["slow","1",0.01,0,0.999]'
  check GetModule '{"module": "tiny"}' '.hasOptimizer' true
}

case_StreamByHand() {
  local answer version
  create_tiny || return
  answer=$(ok StreamStateDict '{"module": "tiny"}') || { fail 'stream'; return; }
  expect '["2","24"]' "$(jq -c 'select(.header) | .header | [.tensorCount, .totalBytes]' <<<"$answer")" header
  expect 'weight running_mean' "$(jq -r 'select(.tensors) | .tensors.tensors[].name' <<<"$answer" | xargs)" table
  expect '"24"' "$(jq -c 'select(.trailer) | .trailer.totalBytes' <<<"$answer")" trailer
  expect trailer "$(jq -r 'keys[0]' <<<"$answer" | tail -n 1)" 'the last message'
  # Where each tensor lies is its offset.
  local order
  order=$(jq -r 'select(.tensors) | .tensors.tensors | sort_by(.offset // "0" | tonumber) | map(.name) | join(" ")' <<<"$answer")
  case $order in
    'weight running_mean') expect '1 2 3 4 0 0' "$(floats "$answer")" chunks ;;
    'running_mean weight') expect '0 0 1 2 3 4' "$(floats "$answer")" chunks ;;
    *) fail "offsets: $order" ;;
  esac
  # Selections.
  answer=$(ok StreamStateDict '{"module": "tiny", "selection": {"kinds": ["PARAMETER"]}}')
  expect '1 2 3 4' "$(floats "$answer")" 'of kind PARAMETER'
  answer=$(ok StreamStateDict '{"module": "tiny", "selection": {"prefixes": ["running_"]}}')
  expect '0 0' "$(floats "$answer")" 'of prefix running_'
  answer=$(ok StreamStateDict '{"module": "tiny", "selection": {"globs": ["*ght"]}}')
  expect '1 2 3 4' "$(floats "$answer")" 'of glob *ght'
  # A range.
  answer=$(ok StreamStateDict '{"module": "tiny", "selection": {"names": ["weight"]}, "ranges": [{"begin": 4, "end": 12}]}')
  expect '2 3' "$(floats "$answer")" 'range [4, 12)'
  expect '4' "$(jq -r 'select(.chunk) | .chunk.offset' <<<"$answer" | xargs)" 'its offset'
  # Cast to half the width: bytes of BF16 1, 2, 3, 4.
  answer=$(ok StreamStateDict '{"module": "tiny", "selection": {"names": ["weight"], "float_dtype": "BF16"}}')
  expect '803f 0040 4040 8040' "$(jq -r 'select(.chunk) | .chunk.data' <<<"$answer" | base64 -d | od -An -v -tx1 | xargs | sed 's/\(..\) \(..\)/\1\2/g')" 'as BF16'
  # Nothing new.
  version=$(ok GetModule '{"module": "tiny"}' '.version')
  check StreamStateDict "{\"module\": \"tiny\", \"if_newer_than\": $version}" '.header.notModified' true
}

case_LoadStateDictByHand() {
  create_tiny || return
  check LoadStateDict '{"header": {"module": "tiny", "options": {"strict": false}, "tensor_count": 1}}
    {"tensors": {"tensors": [{"name": "running_mean", "dtype": "F32", "shape": [2], "values": {"doubles": {"values": [0.5, 1]}}}]}}
    {"trailer": {}}' '[.loaded, .missingKeys, .module.version.number]' '["1",["weight"],"2"]'
  check GetTensor '{"module": "tiny", "name": "running_mean"}' "$values" '[0.5,1]'
  check GetTensor '{"module": "tiny", "name": "weight"}' "$values" '[1,2,3,4]'
  # In chunks: the bytes of 1.0f and 2.0f are 0000803f 00000040.
  check LoadStateDict '{"header": {"module": "tiny", "options": {"strict": false}, "tensor_count": 1, "total_bytes": 8}}
    {"tensors": {"tensors": [{"name": "running_mean", "dtype": "F32", "shape": [2], "nbytes": 8}]}}
    {"chunk": {"data": "AACAPw=="}} {"chunk": {"offset": 4, "data": "AAAAQA=="}}
    {"trailer": {"total_bytes": 8}}' '.loaded' '"1"'
  check GetTensor '{"module": "tiny", "name": "running_mean"}' "$values" '[1,2]'
  # Into an empty module: the table makes the schema.
  ok CreateModule '{"name": "empty"}' >/dev/null || fail 'create empty'
  check GetModule '{"module": "empty"}' '.state' '"EMPTY"'
  check LoadStateDict '{"header": {"module": "empty", "options": {"buffers": ["*.scale"]}, "tensor_count": 2}}
    {"tensors": {"tensors": [{"name": "fc.weight", "dtype": "F32", "shape": [1], "values": {"doubles": {"values": [3]}}},
      {"name": "fc.scale", "dtype": "F32", "shape": [1], "values": {"doubles": {"values": [4]}}}]}}
    {"trailer": {}}' '.module | [.state, .parameterCount, .bufferCount]' '["READY","1","1"]'
}

case_LoadAndSaveACheckpoint() {
  local digests
  cp "$CREPE" "$ROOT/crepe-tiny.pth"
  check ListCheckpoints '{}' '[.checkpoints[].path]' '["crepe-tiny.pth"]'
  check LoadCheckpoint '{"module": "crepe", "path": "crepe-tiny.pth", "create_module": true}' \
    'select(.result) | .result.load | [.loaded, .module.parameterCount, .module.bufferCount]' '["44","26","18"]'
  check ListBuffers '{"module": "crepe", "selection": {"globs": ["conv1_BN.*"]}}' '[.tensors[].name]' \
    '["conv1_BN.running_mean","conv1_BN.running_var","conv1_BN.num_batches_tracked"]'
  check SaveCheckpoint '{"module": "crepe", "path": "saved/first"}' 'select(.result) | .result | [.path, .module, .tensorCount]' \
    '["saved/first","crepe","44"]'
  check ListCheckpoints '{"directory": "saved", "verify": true}' '[.checkpoints[] | .path, .verified, .problem // ""]' \
    '["saved/first",true,""]'
  check SaveCheckpoint '{"module": "crepe", "path": "saved/first", "overwrite": true}' 'select(.result) | .result.path' '"saved/first"'
  check LoadCheckpoint '{"module": "again", "path": "saved/first", "create_module": true}' \
    'select(.result) | .result.load.module | [.parameterCount, .bufferCount]' '["26","18"]'
  local filter='[.tensors[] | {name, kind, xxh3}]' list
  for list in ListParameters ListBuffers; do
    digests=$(ok $list '{"module": "crepe", "digests": true}' "$filter")
    check $list '{"module": "again", "digests": true}' "$filter" "$digests"
  done
  ok DeleteCheckpoint '{"path": "saved/first"}' >/dev/null || fail 'delete'
  [ ! -e "$ROOT/saved/first" ] || fail 'the deleted checkpoint is still there'
}

case_APinHoldsItsVersion() {
  local pin id answer step
  create_tiny && configure_sgd || return
  pin=$(ok PinSnapshot '{"module": "tiny", "lease": "600s"}') || { fail 'pin'; return; }
  id=$(jq -r .snapshotId <<<"$pin")
  step=$(step_json '{"module": "tiny", "tensor_count": 1}' \
    '{"name": "weight", "dtype": "F32", "shape": [2, 2], "values": {"doubles": {"values": [1, 1, 1, 1]}}}')
  check ApplyStep "$step" '.outcome' '"APPLIED"'
  check GetTensor '{"module": "tiny", "name": "weight"}' "$values" '[0,1,2,3]'
  check GetTensor "{\"module\": \"tiny\", \"name\": \"weight\", \"snapshot_id\": \"$id\"}" "$values" '[1,2,3,4]'
  answer=$(ok StreamStateDict "{\"module\": \"tiny\", \"snapshot_id\": \"$id\", \"selection\": {\"names\": [\"weight\"]}}")
  expect '1 2 3 4' "$(floats "$answer")" 'the pinned version'
  check PinSnapshot "{\"module\": \"tiny\", \"snapshot_id\": \"$id\", \"lease\": \"30s\"}" \
    '[.snapshotId, .version.number]' "$(jq -c '[.snapshotId, .version.number]' <<<"$pin")"
  ok ReleaseSnapshot "{\"snapshot_id\": \"$id\"}" >/dev/null || fail 'release'
  refused StreamStateDict "{\"module\": \"tiny\", \"snapshot_id\": \"$id\"}" NOT_FOUND SNAPSHOT_NOT_FOUND "$id"
  refused ReleaseSnapshot "{\"snapshot_id\": \"$id\"}" NOT_FOUND SNAPSHOT_NOT_FOUND "$id"
}

case_FreezeAndUnfreeze() {
  local step='{"name": "weight", "dtype": "F32", "shape": [2, 2], "values": {"doubles": {"values": [1, 1, 1, 1]}}}'
  step=$(step_json '{"module": "tiny", "tensor_count": 1}' "$step")
  create_tiny && configure_sgd || return
  check SetRequiresGrad '{"module": "tiny", "selection": {"globs": ["*"]}, "requires_grad": false}' '.changed' '"1"'
  check ListParameters '{"module": "tiny"}' '.tensors[0].requiresGrad' false
  refused ApplyStep "$step" FAILED_PRECONDITION PARAMETER_FROZEN weight
  check SetRequiresGrad '{"module": "tiny", "selection": {"names": ["weight"]}, "requires_grad": true}' '.changed' '"1"'
  check ApplyStep "$step" '.outcome' '"APPLIED"'
}

case_WatchShowsEachNewState() {
  local line
  create_tiny && configure_sgd || return
  exec {watch}< <(exec "$GRPCURL" -plaintext -max-time 60 -d '{"module": "tiny"}' "$ADDRESS" $SERVICE/WatchModule 2>"$WORK/watch.err" |
    jq -c --unbuffered '[.module.step // "0", .lastMutation]')
  read -r -t 60 -u "$watch" line || fail 'no first state'
  expect '"0"' "$(jq -c '.[0]' <<<"$line")" 'the state at the start'
  check ApplyStep "$(step_json '{"module": "tiny", "tensor_count": 1}' \
    '{"name": "weight", "dtype": "F32", "shape": [2, 2], "values": {"doubles": {"values": [1, 1, 1, 1]}}}')" '.step' '"1"'
  read -r -t 60 -u "$watch" line || fail 'no second state'
  expect '["1","STEP"]' "$line" 'the state after a step'
  ok DeleteModule '{"module": "tiny"}' >/dev/null || fail 'delete'
  # The stream ends with the module.
  while read -r -t 60 -u "$watch" line; do :; done
  exec {watch}<&-
  grep -q MODULE_DELETED "$WORK/watch.err" || fail "the end of the watch: $(<"$WORK/watch.err")"
}

case_ModulesAreListedInPagesAndDeleted() {
  local name token
  for name in a b c; do ok CreateModule "{\"name\": \"$name\"}" >/dev/null || fail "create $name"; done
  check ListModules '{"page_size": 2}' '[.modules[].name]' '["a","b"]'
  token=$(ok ListModules '{"page_size": 2}' '.nextPageToken')
  check ListModules "{\"page_size\": 2, \"page_token\": $token}" '[.modules[].name, .nextPageToken // ""]' '["c",""]'
  ok DeleteModule '{"module": "b"}' >/dev/null || fail 'delete'
  check ListModules '{}' '[.modules[].name]' '["a","c"]'
  refused GetModule '{"module": "b"}' NOT_FOUND MODULE_NOT_FOUND '"b"'
}

case_TensorsAreListedInPages() {
  local token
  cp "$CREPE" "$ROOT/crepe-tiny.pth"
  ok LoadCheckpoint '{"module": "crepe", "path": "crepe-tiny.pth", "create_module": true}' >/dev/null || return
  check ListBuffers '{"module": "crepe", "page_size": 10}' '[(.tensors | length), .totalSize]' '[10,"18"]'
  token=$(ok ListBuffers '{"module": "crepe", "page_size": 10}' '.nextPageToken')
  check ListBuffers "{\"module\": \"crepe\", \"page_size\": 10, \"page_token\": $token}" '[(.tensors | length), .nextPageToken // ""]' '[8,""]'
  refused ListParameters "{\"module\": \"crepe\", \"page_size\": 10, \"page_token\": $token}" INVALID_ARGUMENT INVALID_FIELD page_token
}

case_ChangedSinceSaysWhatItDoesNotGoWith() {
  create_tiny || return
  refused StreamStateDict "{\"module\": \"tiny\", \"ranges\": [{\"end\": 4}], \"changed_since\": $(ok GetModule '{"module": "tiny"}' '.version')}" INVALID_ARGUMENT INVALID_FIELD changed_since
}

case_OptimizerStateIsLoadedAndStreamed() {
  local step='{"name": "weight", "slot": "step", "dtype": "F32", "values": {"doubles": {"values": [3]}}}'
  local buffer='{"name": "weight", "slot": "momentum_buffer", "dtype": "F32", "shape": [2, 2], "values": {"doubles": {"values": [0, 0.5, 0, 0]}}}'
  local optimizer='"optimizer": {"algorithm": "SGD", "hyperparameters": {"lr": 0.1, "momentum": 0.9}}'
  create_tiny || return
  refused LoadOptimizerState "$(step_json '{"module": "tiny", "tensor_count": 1}' "$step")" \
    FAILED_PRECONDITION NO_OPTIMIZER '"tiny"' ConfigureOptimizer
  refused LoadOptimizerState "$(step_json "{\"module\": \"tiny\", $optimizer, \"tensor_count\": 1}" "$step")" \
    INVALID_ARGUMENT MISSING_KEY '"weight"' '"momentum_buffer"'
  check LoadOptimizerState "$(step_json "{\"module\": \"tiny\", $optimizer, \"step\": 3, \"tensor_count\": 2}" "$step, $buffer")" \
    '[.step, .stateBytes, .version.number]' '["3","16","2"]'
  check ListOptimizerState '{"module": "tiny"}' '[.tensors[].slot]' '["step","momentum_buffer"]'
  check StreamStateDict '{"module": "tiny", "optimizer_state": true, "selection": {"kinds": ["OPTIMIZER_STATE"]}}' \
    'select(.tensors) | [.tensors.tensors[] | [.name, .slot, .nbytes]]' '[["weight","step","4"],["weight","momentum_buffer","16"]]'
  check PinSnapshot '{"module": "tiny", "optimizer_state": true}' .optimizerState true
}

case_ModuleIsMovedCastAndItsPastIsTold() {
  create_tiny && configure_sgd || return
  check MoveModule '{"module": "tiny", "dtype": "BF16"}' '.version.number' '"3"'
  check ListParameters '{"module": "tiny"}' '.tensors[0].dtype' '"BF16"'
  check MoveModule '{"module": "tiny", "device": "cpu"}' '.version.number' '"3"'
  refused MoveModule '{"module": "tiny", "dtype": "I64"}' INVALID_ARGUMENT INVALID_FIELD \
    'only accepts floating point' 'torch.int64'
  refused MoveModule '{"module": "tiny", "device": "cuda:7"}' INVALID_ARGUMENT INVALID_FIELD 'cuda:7' '"cpu"'
  check ListVersions '{"module": "tiny"}' '[.versions[].mutation] == ["MOVE", "CONFIGURE_OPTIMIZER", "CREATE"]' true
  check GetModuleSpec '{"module": "tiny"}' '[.spec.tensors[].dtype] | unique' '["BF16"]'
  check ListOptimizerState '{"module": "tiny"}' '.tensors // [] | length' 0
}

# Each text names the tensor or field, then the rule, then the way out.
case_WrongCallsSayWhatRuleAndWayOut() {
  local weight='"dtype": "F32", "shape": [2, 2], "values": {"doubles": {"values": [1, 1, 1, 1]}}'
  local header='{"module": "tiny", "tensor_count": 1}'
  create_tiny || return
  refused ApplyStep "$(step_json "$header" "{\"name\": \"weight\", $weight}")" \
    FAILED_PRECONDITION NO_OPTIMIZER '"tiny"' ConfigureOptimizer
  configure_sgd || return
  # 1. A gradient for a buffer.
  refused ApplyStep "$(step_json "$header" '{"name": "running_mean", "kind": "GRADIENT", "dtype": "F32", "shape": [2], "values": {"doubles": {"values": [1, 1]}}}')" \
    INVALID_ARGUMENT NOT_A_PARAMETER '"running_mean"' buffer
  # 2. A name that is not there.
  refused ApplyStep "$(step_json "$header" "{\"name\": \"wieght\", $weight}")" \
    INVALID_ARGUMENT UNKNOWN_KEY '"wieght"' 'no tensor' 'list its parameters'
  # 3. Another shape.
  refused ApplyStep "$(step_json "$header" '{"name": "weight", "dtype": "F32", "shape": [4], "values": {"doubles": {"values": [1, 1, 1, 1]}}}')" \
    INVALID_ARGUMENT SHAPE_MISMATCH '"weight"' '[4]' '[2, 2]'
  # 4. Another dtype.
  refused ApplyStep "$(step_json "$header" '{"name": "weight", "dtype": "F64", "shape": [2, 2], "values": {"doubles": {"values": [1, 1, 1, 1]}}}')" \
    INVALID_ARGUMENT DTYPE_MISMATCH '"weight"' F64 F32
  # 5. No trailer.
  refused ApplyStep "{\"header\": $header} {\"tensors\": {\"tensors\": [{\"name\": \"weight\", $weight}]}}" \
    INVALID_ARGUMENT CHUNK_INVALID trailer
  # 6. A stale base.
  ok ConfigureOptimizer '{"module": "tiny", "optimizer": {"algorithm": "SGD", "hyperparameters": {"lr": 1}, "max_staleness": 0}}' >/dev/null || fail configure
  local base
  base=$(ok GetModule '{"module": "tiny"}' '.version')
  ok ApplyStep "$(step_json "$header" "{\"name\": \"weight\", $weight}")" >/dev/null || fail 'the step before'
  refused ApplyStep "$(step_json "{\"module\": \"tiny\", \"base\": $base, \"tensor_count\": 1}" "{\"name\": \"weight\", $weight}")" \
    ABORTED STALE_BASE "$(jq -r .number <<<"$base")" max_staleness
  # 7. A sequence that another payload has used.
  ok ApplyStep "$(step_json '{"module": "tiny", "worker": "me", "sequence": 5, "tensor_count": 1}' "{\"name\": \"weight\", $weight}")" >/dev/null || fail 'sequence 5'
  refused ApplyStep "$(step_json '{"module": "tiny", "worker": "me", "sequence": 4, "tensor_count": 1}' "{\"name\": \"weight\", $weight}")" \
    ABORTED SEQUENCE_REUSED '"me"' 4 5
  # 8. A value that the dtype cannot hold.
  refused CreateModule '{"name": "bad", "spec": {"tensors": [{"name": "mask", "kind": "BUFFER", "dtype": "U8", "shape": [1], "values": {"ints": {"values": [300]}}}]}}' \
    INVALID_ARGUMENT NOT_REPRESENTABLE '"mask"' 300 U8
  # 9. A strict load with a key missing.
  refused LoadStateDict '{"header": {"module": "tiny", "tensor_count": 1}} {"tensors": {"tensors": [{"name": "running_mean", "dtype": "F32", "shape": [2], "values": {"doubles": {"values": [0, 0]}}}]}} {"trailer": {}}' \
    INVALID_ARGUMENT MISSING_KEY '"weight"' strict
  # 10. A path that leaves the checkpoint root.
  refused LoadCheckpoint '{"module": "tiny", "path": "../outside.pth"}' INVALID_ARGUMENT INVALID_FIELD path '"../outside.pth"' 'relative to the root'
  refused SaveCheckpoint '{"module": "tiny", "path": "/tmp/outside"}' INVALID_ARGUMENT INVALID_FIELD path '"/tmp/outside"' absolute 'relative to the root'
  # 11. A file that is not there.
  refused LoadCheckpoint '{"module": "tiny", "path": "none.pth"}' NOT_FOUND CHECKPOINT_NOT_FOUND '"none.pth"' 'there is no' 'list the directory'
  # 12. A range outside the layout.
  refused StreamStateDict '{"module": "tiny", "ranges": [{"begin": 0, "end": 25}]}' OUT_OF_RANGE RANGE_OUTSIDE_LAYOUT 25 24
  # 13. A module that exists.
  refused CreateModule '{"name": "tiny"}' ALREADY_EXISTS MODULE_EXISTS '"tiny"'
  # 14. A module that does not.
  refused GetModule '{"module": "tyni"}' NOT_FOUND MODULE_NOT_FOUND '"tyni"' 'no module' 'hosts: "tiny"'
  # 15. A parameter that nothing can train.
  refused CreateModule '{"name": "bad", "spec": {"tensors": [{"name": "count", "kind": "PARAMETER", "dtype": "I64", "shape": [1]}]}}' \
    INVALID_ARGUMENT INVALID_FIELD '"count"' 'floating point' 'make it a buffer'
  # 16. Freezing a buffer.
  refused SetRequiresGrad '{"module": "tiny", "selection": {"names": ["running_mean"]}, "requires_grad": false}' INVALID_ARGUMENT NOT_A_PARAMETER '"running_mean"' buffer
}

case_EachRpcOfTheContractIsCalledHere() {
  local rpc
  for rpc in $(sed -nE 's/^ *rpc (\w+)\(.*/\1/p' "$MODELSTATE_SOURCE/proto/modelstate/v1/service.proto"); do
    grep -qE "((check|ok|refused) |\\\$SERVICE/)$rpc\\b" "$here/grpcurl_test.sh" ||
      [[ $rpc == ListParameters || $rpc == ListBuffers ]] || fail "no case calls $rpc"
  done
}

# await WHAT JSON_FILTER: polls GetServerInfo, for at most a minute, until the filter says true.
await() {
  local end=$((SECONDS + 60))
  until [ "$(ok GetServerInfo '{}' "$2")" = true ]; do
    ((SECONDS < end)) || { fail "$1, after a minute: $(ok GetServerInfo '{}' .limits)"; return 1; }
  done
}

# A push whose client is killed: HEADER and TABLE have gone out, and half of the 1 MiB of data.
kill_in_mid_push() { # METHOD HEADER TABLE
  local client push used='(.limits.pushMemoryUsedBytes // "0" | tonumber)'
  await 'push memory is used before' "$used == 0" || return
  mkfifo "$WORK/push"
  "$GRPCURL" -plaintext -max-time 120 -d @ "$ADDRESS" "$SERVICE/$1" <"$WORK/push" >"$WORK/push.out" 2>&1 &
  client=$!
  exec {push}>"$WORK/push"
  rm "$WORK/push"
  printf '{"header": %s}\n{"tensors": {"tensors": [%s]}}\n{"chunk": {"data": "%s"}}\n' "$2" "$3" \
    "$(head -c 524288 /dev/zero | base64 -w 0)" >&"$push"
  await "$1 is under way" "$used >= 1048576"
  kill -KILL "$client"
  wait "$client" 2>/dev/null
  exec {push}>&-
  await "$1 of a killed client leaves its memory" "$used == 0"
}

case_AClientKilledInMidPushLeavesNoTrace() {
  local before table='"dtype": "F32", "shape": [512, 512], "nbytes": 1048576'
  ok CreateModule '{"name": "wide", "spec": {"tensors": [
    {"name": "weight", "kind": "PARAMETER", "dtype": "F32", "shape": [512, 512], "initializer": {"ones": true}},
    {"name": "mean", "kind": "BUFFER", "dtype": "F32", "shape": [512, 512], "initializer": {"ones": true}}]}}' \
    >/dev/null || return
  ok ConfigureOptimizer '{"module": "wide", "optimizer": {"algorithm": "SGD", "hyperparameters": {"lr": 1}}}' \
    >/dev/null || fail 'configure'
  # Module, digests and what the optimizer has seen.
  state() {
    local method
    for method in GetModule GetOptimizer; do ok $method '{"module": "wide"}'; done
    for method in ListParameters ListBuffers; do ok $method '{"module": "wide", "digests": true}'; done
  }
  before=$(state)
  kill_in_mid_push ApplyStep '{"module": "wide", "worker": "me", "sequence": 7, "tensor_count": 1, "total_bytes": 1048576}' \
    "{\"name\": \"weight\", $table}"
  expect "$before" "$(state)" 'the module after a killed step'
  kill_in_mid_push LoadStateDict '{"module": "wide", "options": {"strict": false}, "tensor_count": 1, "total_bytes": 1048576}' \
    "{\"name\": \"mean\", $table}"
  expect "$before" "$(state)" 'the module after a killed load'
  # The killed step did not use up its sequence.
  check ApplyStep '{"header": {"module": "wide", "worker": "me", "sequence": 7, "tensor_count": 0}} {"trailer": {}}' \
    '[.outcome, .replayed // false, .step]' '["APPLIED",false,"1"]'
}

case_SigtermEndsTheServerCleanly() {
  create_tiny || return
  stop_server || fail "exit code $? after SIGTERM"
}

run_case "$1"
