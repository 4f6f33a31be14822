#!/usr/bin/env bash
# The commands of `modelstate` about modules and their tensors, against a real server.
# Usage: cli_module_test.sh CASE; each case has a server of its own. See lib.sh for its environment.
here=$(dirname "$(readlink -f "$0")")
source "$here/lib.sh"

# A module with everything that a spec can say of values: one frozen parameter, a tied name, a buffer that
# is not persistent.
write_spec() {
  cat >"$WORK/net.json" <<'JSON'
{"metadata": {"git": "abc", "tokenizer": "bpe"}, "seed": 3,
 "tensors": [
  {"name": "conv.weight", "kind": "PARAMETER", "dtype": "F32", "shape": [2, 3, 2], "initializer": {"constant": 0.5}},
  {"name": "conv.bias", "kind": "PARAMETER", "dtype": "F32", "shape": [2], "requires_grad": false},
  {"name": "bn.running_mean", "kind": "BUFFER", "dtype": "F32", "shape": [4], "values": {"doubles": {"values": [1, -2, "NaN", "Infinity"]}}},
  {"name": "bn.count", "kind": "BUFFER", "dtype": "I64", "values": {"ints": {"values": [7]}}},
  {"name": "scratch", "kind": "BUFFER", "dtype": "BOOL", "shape": [2], "persistent": false, "values": {"ints": {"values": [1, 0]}}},
  {"name": "tied", "alias_of": "conv.weight"}]}
JSON
}
create_net() {
  write_spec
  json '[.state, .parameters, .buffers, .metadata]' '["READY",2,3,{"git":"abc","tokenizer":"wp"}]' \
    create net --spec "$WORK/net.json" --metadata tokenizer=wp
}

case_CreateTakesASpecAsJsonOrTextProto() {
  create_net || return
  json '[.tensors[] | .name, .requires_grad, .alias_of]' \
    '["conv.weight",true,null,"conv.bias",false,null,"tied",true,"conv.weight"]' params net
  json '[.tensors[] | .name, .persistent]' '["bn.running_mean",true,"bn.count",true,"scratch",false]' buffers net
  # By content from stdin, in both formats.
  cli 0 create json --spec - <"$WORK/net.json" >/dev/null
  local output
  output=$(printf 'tensors { name: "w" kind: PARAMETER dtype: BF16 shape: [2, 2] }' | cli 0 create text --spec - --seed 9)
  expect 'created text on cpu: 1 parameter, 0 buffers, 8 B, version 1' "$output" 'create from text proto'
  json '[.state, .device]' '["EMPTY","cpu"]' create empty --device cpu
}

case_CreateSaysWhereASpecIsWrong() {
  printf '{"tensors": [\n  {"name": "w" "dtype": "F32"}]}' >"$WORK/syntax.json"
  cli 4 create m --spec "$WORK/syntax.json"
  grep -q "INVALID_FIELD: $WORK/syntax.json: parse error at line 2, column" "$WORK/cli.err" || fail "syntax: $(<"$WORK/cli.err")"
  printf '{"tensors": [{"name": "w", "dtype": "F33"}]}' >"$WORK/field.json"
  cli 4 create m --spec "$WORK/field.json"
  grep -q 'field.json: .*tensors\[0\].dtype.*F33' "$WORK/cli.err" || fail "field: $(<"$WORK/cli.err")"
  printf 'tensors {\n  nome: "w"\n}' >"$WORK/wrong.textproto"
  cli 4 create m --spec "$WORK/wrong.textproto"
  grep -q 'wrong.textproto: line 2, column .*nome' "$WORK/cli.err" || fail "text: $(<"$WORK/cli.err")"
  # What the server refuses is in torch's words.
  printf '{"tensors": [{"name": "a.b", "kind": "PARAMETER", "dtype": "I64", "shape": [1]}]}' >"$WORK/integer.json"
  cli 4 create m --spec "$WORK/integer.json"
  printf '{"tensors": [{"name": "a", "kind": "PARAMETER", "dtype": "F32", "shape": [1], "persistent": false}]}' >"$WORK/flag.json"
  cli 4 create m --spec "$WORK/flag.json"
  grep -q 'not persistent' "$WORK/cli.err" || fail "a flag of a buffer: $(<"$WORK/cli.err")"
  cli 4 create m --spec "$WORK"
  cli 4 create m --device cuda:7
  grep -q 'cuda:7' "$WORK/cli.err" || fail "device: $(<"$WORK/cli.err")"
  cli 3 create m --spec "$WORK/none.json"
  cli 2 create m --metadata novalue
  cli 0 create m >/dev/null
  cli 4 create m
  grep -q MODULE_EXISTS "$WORK/cli.err" || fail "taken: $(<"$WORK/cli.err")"
}

case_FreezeTakesNamesGlobsAndPrefixes() {
  create_net || return
  prints 'froze 1 parameter of net' freeze net conv.weight
  prints 'unfroze 2 parameters of net' unfreeze net '*'
  json .changed 2 freeze net --prefix conv.
  json .changed 0 freeze net 'conv.?ias' conv.weight
  json .changed 2 unfreeze net '[c]onv.[bw]*'
  json .changed 2 freeze net 'conv.[!x]*[ts]'
  json '[.tensors[].requires_grad]' '[false,false,false]' params net
  cli 4 freeze net bn.count >/dev/null
  grep -q 'NOT_A_PARAMETER.*bn.count' "$WORK/cli.err" || fail "a buffer: $(<"$WORK/cli.err")"
  cli 3 freeze net nothing >/dev/null
  cli 3 freeze nobody '*' >/dev/null
  cli 2 freeze net >/dev/null
  # Gradients of frozen parameters are refused, or left out where that is asked for.
  cli 0 unfreeze net conv.weight >/dev/null
  cli 0 optim set net --sgd --lr 1 >/dev/null
  cli 0 fetch net "$WORK/gradients.safetensors" --kind parameter >/dev/null
  cli 4 step-from net "$WORK/gradients.safetensors" >/dev/null
  grep -q 'PARAMETER_FROZEN.*conv.bias' "$WORK/cli.err" || fail "a frozen gradient: $(<"$WORK/cli.err")"
  json '[.outcome, .updated, .ignored]' '["APPLIED",1,1]' \
    step-from net "$WORK/gradients.safetensors" --ignore-frozen
}

# CLI11 reads [a] as a list where an option takes several values.
case_NamesMayHaveBrackets() {
  ok CreateModule '{"name": "m", "spec": {"tensors": [
    {"name": "[w]", "kind": "PARAMETER", "dtype": "F32", "shape": [1]},
    {"name": "v", "kind": "PARAMETER", "dtype": "F32", "shape": [1]},
    {"name": "u", "kind": "PARAMETER", "dtype": "F32", "shape": [1]}]}}' >/dev/null || return
  json .tensor.name '"[w]"' cat m '[w]'
  json '[.tensors[].name]' '["[w]"]' params m --names '[w]'
  json '[.tensors[].name]' '["v","u"]' params m --glob '[uv]'
  json .tensors 1 fetch m "$WORK/w.safetensors" --names '[w]'
  json .changed 2 freeze m --glob '[uv]'
  json .changed 1 unfreeze m --glob '[v]'
  json .changed 1 freeze m --names '[w]'
  json .changed 2 unfreeze m --names '[w]' u
}

case_CatPrintsNestedRowsAndParts() {
  create_net || return
  local output
  output=$(cli 0 cat net conv.weight)
  expect 'conv.weight  parameter  F32  [2, 3, 2]
[[[0.5, 0.5],
  [0.5, 0.5],
  [0.5, 0.5]],

 [[0.5, 0.5],
  [0.5, 0.5],
  [0.5, 0.5]]]
min 0.5  max 0.5  mean 0.5  norm 1.73205  non-finite 0 of 12  version 1  step 0' "$output" 'cat'
  output=$(cli 0 cat net conv.weight --first 1 --count 4 | sed -n '2,4p')
  expect '[[[..., 0.5],
  [0.5, 0.5],
  [0.5, ...]]]' "$output" 'cat of a part'
  prints '[1, -2, nan, inf]' cat net bn.running_mean
  prints 'non-finite 2 of 4' cat net bn.running_mean
  prints '[true, false]' cat net scratch
  json '[.values, .tensor.shape, .statistics.max]' '[[7],[],7]' cat net bn.count
  json '.values' '[1,-2,"nan","inf"]' cat net bn.running_mean
  json '[.values, .first]' '[[-2],1]' cat net bn.running_mean --first 1 --count 1
  output=$(cli 0 cat net conv.weight --slice '-1, ::2, :1')
  [[ $output == *'slice [-1, ::2, :1] of shape [2, 1]
[[0.5],
 [0.5]]'* ]] || fail "cat of a slice: $output"
  json '[.values, .slice_shape]' '[[-2],[]]' cat net bn.running_mean --slice 1
  cli 4 cat net conv.weight --slice '7' >/dev/null
  cli 3 cat net nothing >/dev/null
  grep -q TENSOR_NOT_FOUND "$WORK/cli.err" || fail "an unknown tensor: $(<"$WORK/cli.err")"
  cli 4 cat net bn.count --first 5 >/dev/null
  cli 2 cat net >/dev/null
}

case_ListingsCountTiedNamesOnce() {
  create_net || return
  prints '2 parameters (1 tied name), 56 B, version 1' params net
  prints '2 parameters (1 tied name) with 14 elements' info net
  json '[.parameters, .tied_names]' '[2,1]' info net
}

case_SelectionsTakeOneValueEach() {
  create_net || return
  json '[.tensors[].name]' '["conv.weight","conv.bias"]' params --glob 'conv.*' net
  json '[.tensors[].name]' '["conv.bias","tied"]' params --names conv.bias --names tied net
  json '[.tensors[].name]' '["bn.running_mean","bn.count","scratch"]' buffers --prefix bn. --prefix scr net
  json '.tensors' 1 fetch --names conv.bias net "$WORK/bias.safetensors"
  cli 2 params net --names conv.bias tied >/dev/null
}

case_ListingsHaveBothViews() {
  create_net || return
  json '[.tensors[].name]' '["conv.weight","conv.bias"]' params net --view named
  json '[.tensors[].name]' '["conv.weight","conv.bias","tied"]' params net --view state_dict
  json '[.tensors[].name]' '["bn.running_mean","bn.count","scratch"]' buffers net --view named
  json '[.tensors[].name]' '["bn.running_mean","bn.count"]' buffers net --view state_dict
  cli 2 params net --view all >/dev/null
}

case_StatsFindNonFiniteElements() {
  create_net || return
  json '[.nonfinite, (.tensors | length), .tensors[3].name, .tensors[3].statistics]' \
    '[2,6,"bn.running_mean",{"count":4,"min":-2,"max":1,"mean":-0.5,"norm":2.23606797749979,"nonfinite":2}]' \
    stats net
  json '[.tensors[].name]' '["bn.running_mean"]' stats net --buffers --glob '*mean'
  json '[.nonfinite, (.tensors | length), (.tensors[0].xxh3 | length)]' '[0,3,16]' stats net --params --check --digests
  json '[.parameters_version.number, .buffers_version.number]' '[1,1]' stats net
  json '[.parameters_version.number, .buffers_version]' '[1,null]' stats net --params
  prints '6 tensors, 2 non-finite elements, version 1, step 0' stats net
  cli 1 stats net --check >/dev/null
  cli 2 stats net --params --buffers >/dev/null
  cli 3 stats nobody >/dev/null
}

# What is dumped makes the same module again: in both formats, also for more tensors than fit in one message.
case_SpecsMakeTheSameModuleAgain() {
  create_net || return
  local format flag layout
  layout=$(cli 0 --json info net | jq -c '[.layout_digest, .parameters, .buffers, .metadata]')
  for format in json textproto; do
    flag=
    [ "$format" = json ] || flag=--textproto
    prints "wrote the spec of net with 6 tensors to $WORK/again.$format" spec net $flag --out "$WORK/again.$format"
    cli 0 spec net $flag | cmp - "$WORK/again.$format" || fail "$format on stdout is not what --out wrote"
    json '[.layout_digest, .parameters, .buffers, .metadata]' "$layout" create "$format" --spec "$WORK/again.$format"
    json '[.tensors[] | .name, .requires_grad]' \
      '["conv.weight",true,"conv.bias",false,"tied",true]' params "$format"
    json '[.tensors[] | .name, .persistent]' \
      '["bn.running_mean",true,"bn.count",true,"scratch",false]' buffers "$format"
  done
  cli 3 spec nobody >/dev/null
}

case_ASpecOf100000Tensors() {
  local code=0
  jq -nc '{seed: 5, metadata: {git: "abc"}, tensors: [range(100000) | {name: "layers.\(.).weight", kind: "PARAMETER",
    dtype: "F32", shape: [1], initializer: {normal: {}}}]}' >"$WORK/many.json"
  json '[.state, .parameters, .metadata]' '["READY",100000,{"git":"abc"}]' create many --spec "$WORK/many.json"
  json .tensors 100000 spec many --out "$WORK/again.json"
  expect 100000 "$(jq '.tensors | length' "$WORK/again.json")" 'tensors in the spec'
  # The elements are those of a small module: they depend on seed, name and position alone.
  jq -c '.tensors |= .[70000:70001]' "$WORK/many.json" >"$WORK/one.json"
  cli 0 create one --spec "$WORK/one.json" >/dev/null
  json .values "$(cli 0 --json cat one layers.70000.weight | jq -c .values)" cat many layers.70000.weight
  # Every missing key on request, and a readable error without.
  cp "$MODELSTATE_SOURCE/tests/data/crepe-tiny.pth" "$ROOT/crepe-tiny.pth"
  cli 1 --json load many crepe-tiny.pth --dry-run >"$WORK/dry.json"
  expect '[100000,100000,"layers.99999.weight",44]' "$(jq -c '[.missing_count, (.missing_keys | unique | length),
    .missing_keys[-1], (.unexpected_keys | length)]' "$WORK/dry.json")" 'load --dry-run'
  cli 4 load many crepe-tiny.pth
  [ "$(wc -c <"$WORK/cli.err")" -lt 1200 ] || fail "an error of $(wc -c <"$WORK/cli.err") bytes"
  grep -q 'layers.0.weight.*and 99990 more' "$WORK/cli.err" || fail "a strict load: $(<"$WORK/cli.err")"
  # Nothing is left of one that is refused.
  jq -c '.tensors[99999].shape = [1099511627776]' "$WORK/many.json" >"$WORK/large.json"
  cli 4 create large --spec "$WORK/large.json"
  json '[.modules[].name]' '["many","one"]' ls
}

case_HistoryTellsWhatChangedAndWhy() {
  create_net || return
  cli 0 freeze net conv.weight >/dev/null
  cli 0 optim set net --sgd --lr 1 >/dev/null
  cli 0 unfreeze net '*' >/dev/null
  cli 0 push net --random --worker w3 --sequence 17 >/dev/null
  json '[.versions[] | .version.number, .mutation]' \
    '[5,"STEP",4,"FREEZE",3,"CONFIGURE_OPTIMIZER",2,"FREEZE",1,"CREATE"]' history net
  json '[.versions[] | .mutation]' '["STEP","FREEZE"]' history net --limit 2
  json '.versions[0] | [.changed_parameters, .changed_buffers, .changed_bytes, .detail, .held, .step]' \
    '[2,0,56,"worker w3, sequence 17",true,1]' history net
  prints 'conv.weight, conv.bias' history net
  cli 3 history nobody >/dev/null
}

case_MoveCastsAndMoves() {
  stop_server || fail "the server's exit code $?"
  start_server --device=cpu,cpu:1
  create_net || return
  cli 0 optim set net --adamw >/dev/null
  cli 0 unfreeze net '*' >/dev/null
  cli 0 push net --random >/dev/null
  prints 'moved net: version 5 on cpu:1, 80 B' move net --device cpu:1
  json '[.device, .version.number]' '["cpu",6]' move net --device cpu --dtype bf16
  prints 'net is so already: version 6 on cpu' move net --dtype BF16
  json '[.tensors[].dtype]' '["BF16","I64","BOOL"]' buffers net
  json '[.tensors[] | .slot] | unique' '["exp_avg","exp_avg_sq","step"]' optim state net
  json '[.tensors[] | .name, .slot]' '["conv.bias","step","conv.bias","exp_avg","conv.bias","exp_avg_sq"]' optim state net --names conv.bias
  json '[.devices[].name]' '["cpu","cpu:1"]' info
  cli 4 move net --device cuda:9 >/dev/null
  cli 3 move nobody --dtype f32 >/dev/null
  cli 2 move net >/dev/null
  cli 2 move net --dtype i32 >/dev/null
}

case_ADryRunPrintsEveryKey() {
  load_crepe || return
  local output
  cli 0 create tiny --spec - <<<'tensors { name: "conv1.bias" kind: PARAMETER dtype: F32 shape: [3] }
    tensors { name: "only.here" kind: PARAMETER dtype: F32 shape: [3] }' >/dev/null
  output=$(cli 1 --json load tiny crepe-tiny.pth --dry-run)
  expect '[true,["only.here"],43,43,1]' "$(jq -c '[.refused, .missing_keys, .unexpected_count,
    (.unexpected_keys | length), .size_mismatch_count]' <<<"$output")" 'load --dry-run'
  [[ $(jq -r '.size_mismatches[0]' <<<"$output") == *'size mismatch for conv1.bias'* ]] || fail "torch's words: $output"
  output=$(cli 1 load tiny crepe-tiny.pth --dry-run --no-strict)
  [[ $output == *'classifier.weight'*'would be refused; nothing has changed'* ]] || fail "load --dry-run: $output"
  json '[.refused, .loaded, .module.version.number]' '[false,44,2]' load crepe crepe-tiny.pth --dry-run
  prints 'would load 44 tensors; nothing has changed' load crepe crepe-tiny.pth --dry-run
  # A module that the load would make is not made.
  cli 0 load fresh crepe-tiny.pth --dry-run >/dev/null
  json '[.modules[] | .name, .version.number]' '["crepe",2,"tiny",1]' ls
}

case_LoadMatchesKeysAsAsked() {
  load_crepe || return
  json '[.loaded, .module.parameters]' '[44,26]' load long crepe-tiny.pth --add-prefix net.
  json '[.tensors[].name]' '["net.conv1.bias"]' params long --names net.conv1.bias
  cli 0 save long long >/dev/null
  json .loaded 44 load crepe long/model.safetensors --strip-prefix net.
  json .equal 44 diff crepe "$MODELSTATE_SOURCE/tests/data/crepe-tiny.pth"
  cli 4 load crepe long/model.safetensors >/dev/null
  grep -q 'net.conv1.bias' "$WORK/cli.err" || fail "a strict load: $(<"$WORK/cli.err")"
  # Not missing, as in torch: the six num_batches_tracked.
  json '[.loaded, .missing_count, .unexpected_count]' '[0,38,44]' load crepe long/model.safetensors --no-strict
  prints '38 missing keys: "conv1.weight"' load crepe long/model.safetensors --no-strict
  # A copy keeps the module's dtype; assign takes the file's.
  cli 0 move crepe --dtype f16 >/dev/null
  cli 0 load crepe crepe-tiny.pth >/dev/null
  json '.tensors[0].dtype' '"F16"' params crepe
  cli 0 load crepe crepe-tiny.pth --assign >/dev/null
  json '.tensors[0].dtype' '"F32"' params crepe
  json '[.module.parameters, .module.buffers]' '[12,32]' load other crepe-tiny.pth --buffers '*_BN*' --buffers 'conv1.*'
}

case_InfoShowsEveryBudgetAndItsUse() {
  create_net || return
  local pin
  pin=$(cli 0 --json pin net | jq -r .snapshot_id)
  cli 0 unfreeze net conv.bias >/dev/null
  json '[(.devices | length > 0), .pins, .held_versions, .running_calls, .push_memory_used,
    .snapshot_memory_used > 0, .snapshot_memory_limit > 0, .stream_stall_timeout_seconds > 0]' \
    '[true,1,1,1,0,true,true,true]' info
  prints 'held versions' info
  prints '1 (1 pin)' info
  prints 'pushes and loads that arrive' info
}

case_DiffComparesVersionsAndFiles() {
  create_net || return
  local pin output
  cli 0 unfreeze net conv.bias >/dev/null
  pin=$(cli 0 --json pin net --lease 5m | jq -r .snapshot_id)
  cli 0 optim set net --sgd --lr 1 >/dev/null
  cli 0 push net --random --seed 1 >/dev/null
  local first="net@pin:$pin"
  json '[.equal, .differences]' '[5,[]]' diff net net@current
  output=$(cli 1 --json diff "$first" net)
  expect '["net, version 2",2,["conv.weight","conv.bias","tied"],[12,2,12]]' \
    "$(jq -c '[.a, .equal, [.differences[].name], [.differences[].different]]' <<<"$output")" 'diff of two versions'
  output=$(cli 1 diff "$first" net@4 --all)
  [[ $output == *'bn.running_mean: equal, non-finite 2 and 2'*'2 tensors equal, 3 different'* ]] || fail "diff --all: $output"
  # Another dtype is a difference, and the values are compared.
  cli 0 fetch net "$WORK/a.safetensors" --snapshot "$pin" >/dev/null
  cli 0 fetch net "$WORK/b.safetensors" --snapshot "$pin" --float-dtype BF16 >/dev/null
  json .equal 5 diff "$WORK/a.safetensors" "$first"
  output=$(cli 1 diff "$WORK/a.safetensors" "$WORK/b.safetensors")
  [[ $output == *'conv.weight: dtype F32 and BF16, values equal'* ]] || fail "diff of dtypes: $output"
  cli 1 diff "$MODELSTATE_SOURCE/tests/data/crepe-tiny.pth" net >"$WORK/diff.out"
  grep -q '^conv.weight: only in net, version 4$' "$WORK/diff.out" || fail "names: $(head -3 "$WORK/diff.out")"
  # A file that has a module's name is taken; @current names the module.
  (cd "$WORK" && cp a.safetensors net && json .b '"net"' diff "$first" net; json .b '"net, version 4"' diff net@4 net@current)
  cli 3 diff net net@3 >/dev/null
  grep -q SNAPSHOT_NOT_FOUND "$WORK/cli.err" || fail "a version that is gone: $(<"$WORK/cli.err")"
  cli 3 diff net nobody >/dev/null
  cli 3 diff net net@pin:nothing >/dev/null
  cli 4 diff net net@newest >/dev/null
  cli 2 diff net >/dev/null
  # The pins that diff made are gone again.
  json .pins 1 info
}

case_FetchTakesAPinOrAVersion() {
  create_net || return
  local pin
  pin=$(cli 0 --json pin net --lease 5m | jq -r .snapshot_id)
  cli 0 freeze net '*' >/dev/null
  json '[.version.number, .digests_verified]' '[1,4]' fetch net "$WORK/a.safetensors" --snapshot "$pin"
  json .version.number 1 fetch net "$WORK/b.safetensors" --version 1
  json .version.number 2 fetch net "$WORK/c.safetensors" --version 2
  json .version.number 2 fetch net "$WORK/c.safetensors"
  # The pin was not ended by that, and its lease is renewed and ended by its owner.
  json '[.snapshot_id, .version.number]' "[\"$pin\",1]" pin net --renew "$pin" --lease 5m
  cli 0 pin --release "$pin" >/dev/null
  cli 3 pin net --renew "$pin" >/dev/null
  cli 3 fetch net "$WORK/d.safetensors" --snapshot "$pin" >/dev/null
  cli 3 fetch net "$WORK/d.safetensors" --version 1 >/dev/null
  [ ! -e "$WORK/d.safetensors" ] || fail 'a refused fetch left a file'
  cli 2 fetch net "$WORK/d.safetensors" --version 1 --snapshot x >/dev/null
  cli 2 pin --renew x >/dev/null
}

case_FollowWritesEachVersionWithWhatChanged() {
  create_net || return
  cli 0 optim set net --sgd --lr 1 >/dev/null
  cli 0 fetch net "$WORK/gradients.safetensors" --kind parameter --names conv.weight >/dev/null
  prints 'all 5 tensors' follow net --to "$WORK/copy.safetensors" --versions 1
  mkdir "$WORK/all"
  MODELSTATE_SERVER=$ADDRESS "$CLI" --json follow net --to "$WORK/all" --versions 3 >"$WORK/follow.out" &
  local follower=$!
  local deadline=$((SECONDS + 60))
  local n
  for n in 1 2; do
    # The next step comes when the last version is written: none is skipped.
    until [ "$(wc -l <"$WORK/follow.out")" -ge "$n" ] || [ $SECONDS -gt $deadline ]; do :; done
    cli 0 step-from net "$WORK/gradients.safetensors" >/dev/null
  done
  wait "$follower" || fail "follow ended with $?"
  expect '[true,5][false,2][false,2]' "$(jq -c '[.whole, .changed]' "$WORK/follow.out" | tr -d '\n')" 'what came'
  cli 0 fetch net "$WORK/fetched.safetensors" >/dev/null
  cli 0 diff "$WORK/fetched.safetensors" "$(jq -r .file "$WORK/follow.out" | tail -1)" >/dev/null
}

case_BenchLeavesNoModuleBehind() {
  create_net || return
  json '[.bytes, .rounds, .unary.calls, .fetch.mb_per_second > 0, .push.mb_per_second > 0, .unary.p99_us >= .unary.p50_us]' \
    '[1048576,2,10,true,true,true]' bench "$ADDRESS" --size 1MiB --rounds 2 --calls 10
  json '[.modules[].name]' '["net"]' ls
  prints 'GetModule: p50' bench --size 1MiB --rounds 1 --calls 1
  cli 2 bench --size 0
  # Interrupted while it runs: its module is seen, then gone.
  MODELSTATE_SERVER=$ADDRESS "$CLI" bench --size 1MiB --rounds 1000 --calls 1000000 >/dev/null 2>&1 &
  local bench=$! deadline=$((SECONDS + 60)) code=0
  until cli 0 ls | grep -q modelstate-bench || [ $SECONDS -gt $deadline ]; do :; done
  kill -TERM "$bench"
  wait "$bench" || code=$?
  expect 130 "$code" 'exit code of an interrupted bench'
  json '[.modules[].name]' '["net"]' ls
}

case_CheckpointsAreDeleted() {
  load_crepe || return
  cli 0 save crepe a/b >/dev/null
  json '[.checkpoints[].path]' '["a/b"]' checkpoints a
  json .deleted '"a/b"' checkpoints delete a/b
  json '.checkpoints' '[]' checkpoints a
  cli 3 checkpoints delete a/b >/dev/null
  grep -q CHECKPOINT_NOT_FOUND "$WORK/cli.err" || fail "a second delete: $(<"$WORK/cli.err")"
  cli 2 checkpoints delete >/dev/null
}

# What a shell offers for the words of a command line, of which the last is being typed.
complete_words() {
  (
    MODELSTATE_SERVER=$ADDRESS
    export MODELSTATE_SERVER
    # shellcheck disable=SC1090
    source <("$CLI" completion bash)
    COMP_WORDS=("$CLI" "$@")
    COMP_CWORD=$#
    COMPREPLY=()
    _modelstate
    echo "${COMPREPLY[*]}"
  )
}

case_BashCompletesCommandsOptionsAndModules() {
  create_net || return
  cli 0 create other >/dev/null
  expect 'spec' "$(complete_words spe)" 'a command'
  expect 'freeze fetch follow' "$(complete_words f)" 'three commands'
  expect 'net' "$(complete_words info n)" 'a module'
  expect 'net other' "$(complete_words --server "$ADDRESS" params '')" 'modules of a server'
  expect '--digests' "$(complete_words params net --dig)" 'an option'
  expect '--json' "$(complete_words params net --js)" 'a global option'
  expect 'named state_dict' "$(complete_words params net --view '')" 'values of an option'
  expect 'bf16' "$(complete_words move net --dtype b)" 'values of another option'
  expect 'delete' "$(complete_words checkpoints del)" 'a command of a command'
  expect 'show set state' "$(complete_words optim s)" 'commands of a command'
  expect 'net' "$(complete_words optim set n)" 'a module after a command of a command'
  expect '--momentum --momentum-decay' "$(complete_words optim set net --mom)" 'options of a command of a command'
  expect '--adamw --adam' "$(complete_words optim set net --adam | tr ' ' '\n' | grep -v max | xargs)" 'options that exclude each other'
  expect 'zsh' "$(complete_words completion z)" 'a shell'
  expect '' "$(complete_words params net --glob n)" 'the value of an option'
  expect '' "$(complete_words spec --out o)" 'a file'
  local command fish
  fish=$(cli 0 completion fish)
  for command in $(cli 0 --help | awk '/^[A-Z].*:$/ { inside = !/^(Options|Usage|Exit)/ } inside && /^  [a-z]/ { print $1 }'); do
    [[ " $(complete_words '') " == *" $command "* ]] || fail "$command of --help is not completed"
    [[ $fish == *" -a $command "* ]] || fail "$command is not in fish's script"
  done
  prints 'bashcompinit' completion zsh
  cli 2 completion csh >/dev/null
  # Where nobody answers nothing is offered, and nobody waits long.
  stop_server || fail "the server's exit code $?"
  expect '' "$(complete_words info n 2>&1)" 'modules of no server'
}

run_case "$1"
