#!/usr/bin/env bash
# The `modelstate` command line against a real server: what it prints for programs, its exit codes, and
# what happens when it or the server is ended in the middle.
# Usage: cli_test.sh CASE; each case has a server of its own. See lib.sh for its environment.
here=$(dirname "$(readlink -f "$0")")
source "$here/lib.sh"

# Without a server.
case_FilesAreInspectedVerifiedAndConverted() {
  local in=$MODELSTATE_SOURCE/tests/data/crepe-tiny.pth
  json '[.format, (.tensors | length)]' '["torch zip",44]' inspect "$in"
  json '[.tensors, .files]' '[44,1]' convert "$in" "$WORK/crepe.safetensors"
  prints '44 tensors' inspect "$WORK/crepe.safetensors"
  json '[.equal, .differences]' '[44,[]]' diff "$in" "$WORK/crepe.safetensors"
  cli 0 verify "$WORK/crepe.safetensors" >/dev/null
  cli 0 convert "$WORK/crepe.safetensors" "$WORK/back.pt" >/dev/null
  json '[.equal, .differences]' '[44,[]]' diff "$in" "$WORK/back.pt"
  cli 0 convert "$in" "$WORK/shards" --max-shard-size 500KB >/dev/null
  json '[.equal, .differences]' '[44,[]]' diff "$in" "$WORK/shards"
  cli 4 convert "$in" "$WORK/back.pt" >/dev/null
  cli 3 convert "$in" "$WORK/none/back.pt" >/dev/null
  grep -q 'there is no folder' "$WORK/cli.err" || fail "convert to no folder: $(<"$WORK/cli.err")"
  printf X | dd of="$WORK/crepe.safetensors" bs=1 seek=500000 conv=notrunc 2>/dev/null
  cli 6 verify "$WORK/crepe.safetensors" >/dev/null
  expect 0 "$(find "$WORK" -name '*.tmp*' | wc -l)" 'temporary files'
}

case_TheWholePath() {
  local buffers version
  expect "$(ulimit -Hn)" "$(awk '/^Max open files/ { print $4 }' "/proc/$SERVER_PID/limits")" \
    'open files that the server may have'
  load_crepe || return
  json '[.modules[] | .name, .state]' '["crepe","READY"]' ls
  json '[.name, .parameters, .buffers]' '["crepe",26,18]' info crepe
  json '.tensors | length' 26 params crepe
  json '[.tensors[].name]' '["conv1_BN.running_mean","conv1_BN.running_var","conv1_BN.num_batches_tracked"]' \
    buffers crepe --glob 'conv1_BN.*'
  prints conv1_BN.running_var buffers crepe
  buffers=$(cli 0 --json buffers crepe --digests | jq -c '[.tensors[] | [.name, .xxh3]]')
  expect 18 "$(jq 'map(select(.[1] | length == 16)) | length' <<<"$buffers")" 'buffers with a digest'
  json '[.algorithm, .groups[0].hyperparameters.lr]' '["ADAMW",0.001]' optim set crepe --adamw --lr 0.001
  json '.algorithm' '"ADAMW"' optim show crepe
  json '[.steps | length, .[-1].outcome, .[-1].step, .[-1].updated]' '[3,"APPLIED",3,26]' \
    push crepe --random --steps 3 --seed 7
  json '[.tensors[] | [.name, .xxh3]]' "$buffers" buffers crepe --digests
  json '[.tensors, .digests_verified, .digests, .resumed, .step]' '[44,44,44,false,3]' fetch crepe "$WORK/a.safetensors"
  prints '44 of 44 digests verified' fetch crepe "$WORK/b.safetensors"
  json '[.path, .module, .step, .tensors, .has_optimizer]' '["step3","crepe",3,44,true]' save crepe step3
  json '[.checkpoints[] | .path, .verified]' '["crepe-tiny.pth",true,"step3",true]' checkpoints --verify
  prints step3 checkpoints --verify
  # A file that records nothing can only be read.
  cp "$MODELSTATE_SOURCE/tests/data/silero-vad-16k.safetensors" "$ROOT/plain.safetensors"
  prints 'read; no digest of' checkpoints --verify
  rm "$ROOT/plain.safetensors"
  json '[.equal, .differences]' '[44,[]]' diff "$ROOT/step3/model.safetensors" "$WORK/a.safetensors"
  # The optimizer comes back with its state: the next step of both is the same.
  json '[.optimizer_loaded, .module.step]' '[true,3]' load again step3
  json '.steps[0].step' 4 push crepe --random --seed 9
  json '.steps[0].step' 4 push again --random --seed 9
  json '.tensors' 44 fetch crepe "$WORK/c.safetensors"
  json '.tensors' 44 fetch again "$WORK/d.safetensors"
  json '.equal' 44 diff "$WORK/c.safetensors" "$WORK/d.safetensors"
  # A pin, and a watch that ends by itself.
  version=$(cli 0 --json info crepe | jq .version.number)
  json '.module.version.number' "$version" watch crepe --count 1
  local pin
  pin=$(cli 0 --json pin crepe --lease 5m | jq -r .snapshot_id)
  json .released "\"$pin\"" pin --release "$pin"
  json .deleted '"again"' rm again
  json '[.modules[].name]' '["crepe"]' ls
}

# As `modelstate --help` documents them.
case_ExitCodes() {
  local output
  load_crepe || return
  output=$(cli 0 --help)
  for code in 0 1 2 3 4 5 6 130; do
    grep -qE "^ +$code  " <<<"$output" || fail "--help does not explain exit code $code"
  done
  cli 0 fetch crepe "$WORK/a.safetensors" >/dev/null
  cli 0 optim set crepe --sgd --lr 1 >/dev/null
  cli 0 push crepe --random >/dev/null
  cli 0 fetch crepe "$WORK/b.safetensors" >/dev/null
  # 1: a difference or a negative answer.
  output=$(cli 1 diff "$WORK/a.safetensors" "$WORK/b.safetensors")
  [[ $output == *'18 tensors equal, 26 different'* ]] || fail "diff after a step: $output"
  output=$(cli 1 --json diff "$WORK/a.safetensors" "$WORK/b.safetensors")
  expect '[18,26]' "$(jq -c '[.equal, (.differences | length)]' <<<"$output")" 'diff --json after a step'
  cli 0 save crepe saved >/dev/null
  printf 'X' | dd of="$ROOT/saved/model.safetensors" bs=1 seek="$(($(stat -c %s "$ROOT/saved/model.safetensors") - 1))" \
    conv=notrunc status=none
  output=$(cli 1 --json checkpoints --verify)
  expect '[false]' "$(jq -c '[.checkpoints[] | select(.path == "saved") | .verified]' <<<"$output")" 'a damaged checkpoint'
  # 6: a copy that is not whole, whatever of it is missing.
  cli 0 save crepe whole >/dev/null
  cp -r "$ROOT/whole" "$WORK/copy"
  cli 0 verify "$WORK/copy" >/dev/null
  for file in model.safetensors manifest.json; do
    mv "$WORK/copy/$file" "$WORK/kept"
    cli 6 verify "$WORK/copy" >/dev/null
    grep -q "manifest.json" "$WORK/cli.err" || fail "verify without $file: $(<"$WORK/cli.err")"
    mv "$WORK/kept" "$WORK/copy/$file"
  done
  rm "$WORK/copy/manifest.json"
  cli 6 verify "$WORK/copy" >/dev/null
  cli 0 verify "$WORK/copy/model.safetensors" >/dev/null
  # 2: wrong usage.
  cli 2 >/dev/null
  cli 2 nonsense >/dev/null
  cli 2 fetch crepe >/dev/null
  cli 2 pin crepe --lease soon >/dev/null
  cli 2 push crepe --gradients x >/dev/null
  cli 2 convert "$WORK/a.safetensors" "$WORK/shards" --max-shard-size 0 >/dev/null
  # 3: not found.
  cli 3 info tyni >/dev/null
  grep -q 'MODULE_NOT_FOUND: no module "tyni"' "$WORK/cli.err" || fail "info tyni: $(<"$WORK/cli.err")"
  cli 3 load crepe none.pth >/dev/null
  cli 3 pin --release nothing >/dev/null
  cli 3 diff "$WORK/none" "$WORK/a.safetensors" >/dev/null
  # 4: refused.
  cli 4 save crepe saved >/dev/null
  cli 4 save crepe ../saved >/dev/null
  cli 0 create empty >/dev/null
  cli 4 fetch empty "$WORK/empty.safetensors" >/dev/null
  [ ! -e "$WORK/empty.safetensors" ] || fail 'a refused fetch left a file'
  output=$(cli 4 --json push empty --random)
  expect '"MODULE_EMPTY"' "$(jq -c .error.reason <<<"$output")" 'push --json to an empty module'
  # 6: corrupt.
  head -c 300 "$WORK/a.safetensors" >"$WORK/cut.safetensors"
  cli 6 diff "$WORK/cut.safetensors" "$WORK/a.safetensors" >/dev/null
  cli 6 load crepe saved >/dev/null
  grep -q DIGEST_MISMATCH "$WORK/cli.err" || fail "load of a damaged checkpoint: $(<"$WORK/cli.err")"
  # 5: nobody there.
  stop_server || fail "the server's exit code $?"
  cli 5 ls >/dev/null
}

# 50 parameters of 4 MiB, each of another value, so that a hole or a mix-up in a file would show.
create_big() {
  local i tensors=''
  for ((i = 0; i < 50; ++i)); do
    tensors+="${tensors:+,}{\"name\": \"layer$i.weight\", \"kind\": \"PARAMETER\", \"dtype\": \"F32\",
      \"shape\": [1024, 1024], \"initializer\": {\"constant\": $i.5}}"
  done
  ok CreateModule "{\"name\": \"big\", \"spec\": {\"tensors\": [$tensors]}}" >/dev/null || { fail 'create'; return 1; }
}
BIG_BYTES=$((50 << 22))

# break_off SIGNAL OUT: a fetch of `big` to OUT that gets SIGNAL while the server holds still in the
# middle of it. The exit code is the fetch's.
break_off() {
  local fetch tries end
  for ((tries = 0; tries < 20; ++tries)); do
    rm -f "$2" "$2".partial*
    MODELSTATE_SERVER=$ADDRESS "$CLI" fetch big "$2" >"$WORK/fetch.out" 2>&1 &
    fetch=$!
    end=$((SECONDS + 60))
    until [ -e "$2.partial.record" ] && [ "$(stat -c %s "$2.partial")" -gt 10000000 ] || [ -e "$2" ]; do
      ((SECONDS < end)) || break
    done 2>/dev/null
    kill -STOP "$SERVER_PID"
    # On its way may be the rest of it all: then once more.
    kill -s "$1" "$fetch"
    wait "$fetch" 2>/dev/null
    local code=$?
    kill -CONT "$SERVER_PID"
    if [ ! -e "$2" ]; then return "$code"; fi
  done
  fail 'no fetch could be broken off in the middle'
  return 1
}

# Bytes that the record of a broken fetch to OUT says are there.
recorded() {
  awk 'NR > 1 { bytes += $2 - $1 } END { print bytes + 0 }' "$1.partial.record"
}

case_AnInterruptedFetchIsResumed() {
  local out=$WORK/big.safetensors code=0 done_bytes
  create_big || return
  cli 0 fetch big "$WORK/whole.safetensors" >/dev/null
  break_off INT "$out" || code=$?
  expect 130 "$code" "the interrupted fetch: $(<"$WORK/fetch.out")"
  done_bytes=$(recorded "$out")
  ((done_bytes >= 10000000 && done_bytes < BIG_BYTES)) || { fail "the record says $done_bytes bytes are there"; return; }
  # The module goes on meanwhile; the resumed file is of the version that it began with.
  cli 0 optim set big --sgd --lr 1 >/dev/null
  cli 0 push big --random >/dev/null
  json '[.resumed, .received_bytes, .version.number, .note]' "[true,$((BIG_BYTES - done_bytes)),1,null]" \
    fetch big "$out" --resume
  json '[.equal, .differences]' '[50,[]]' diff "$WORK/whole.safetensors" "$out"
  [ ! -e "$out.partial" ] && [ ! -e "$out.partial.record" ] || fail 'the partial file is still there'
}

case_AKilledFetchIsResumed() {
  local out=$WORK/big.safetensors code=0 done_bytes
  create_big || return
  cli 0 fetch big "$WORK/whole.safetensors" >/dev/null
  break_off KILL "$out" || code=$?
  expect 137 "$code" 'the killed fetch'
  # The record may know one chunk less than the file has; never more.
  done_bytes=$(recorded "$out")
  ((done_bytes > 0 && done_bytes < BIG_BYTES)) || { fail "the record says $done_bytes bytes are there"; return; }
  json '[.resumed, .received_bytes, .digests_verified, .note]' "[true,$((BIG_BYTES - done_bytes)),50,null]" \
    fetch big "$out" --resume
  json '[.equal, .differences]' '[50,[]]' diff "$WORK/whole.safetensors" "$out"
  cmp "$WORK/whole.safetensors" "$out" || fail 'the resumed file is not equal'
  # With nothing to go on with, it begins anew and says so.
  json '[.resumed, .received_bytes, (.note | startswith("began anew"))]' "[false,$BIG_BYTES,true]" fetch big "$out" --resume
}

# SIGTERM: a watch is told, a push that is under way may finish, and the server ends with 0.
case_SigtermLetsAPushFinish() {
  local push client code=0 line
  create_tiny && configure_sgd || return
  exec {watch}< <(MODELSTATE_SERVER=$ADDRESS exec "$CLI" --json watch tiny 2>&1)
  read -r -t 60 -u "$watch" line || fail 'no first state'
  mkfifo "$WORK/push"
  "$GRPCURL" -plaintext -max-time 120 -d @ "$ADDRESS" "$SERVICE/ApplyStep" <"$WORK/push" >"$WORK/push.out" 2>&1 &
  client=$!
  exec {push}>"$WORK/push"
  rm "$WORK/push"
  echo '{"header": {"module": "tiny", "tensor_count": 1, "total_bytes": 16}}
    {"tensors": {"tensors": [{"name": "weight", "dtype": "F32", "shape": [2, 2], "nbytes": 16}]}}' >&"$push"
  local end=$((SECONDS + 60))
  until [ "$(ok GetServerInfo '{}' '.limits.pushMemoryUsedBytes // "0" | tonumber > 0')" = true ]; do
    ((SECONDS < end)) || { fail 'the push never began'; break; }
  done
  kill -TERM "$SERVER_PID"
  # Draining has begun when a new call is turned away.
  end=$((SECONDS + 60))
  until rpc GetServerInfo '{}' >"$WORK/refusal" 2>&1; (($? != 0)); do
    ((SECONDS < end)) || { fail 'new calls go on'; break; }
  done
  grep -q DRAINING "$WORK/refusal" || fail "a call while draining: $(<"$WORK/refusal")"
  printf '{"chunk": {"data": "%s"}}\n{"trailer": {"total_bytes": 16}}\n' \
    "$(head -c 16 /dev/zero | base64)" >&"$push"
  exec {push}>&-
  wait "$client" || fail "the push under way: $(<"$WORK/push.out")"
  expect '"APPLIED"' "$(jq -c .outcome "$WORK/push.out")" 'the push under way'
  wait "$SERVER_PID" || code=$?
  SERVER_PID=
  expect 0 "$code" "the server's exit code"
  while read -r -t 60 -u "$watch" line; do :; done
  exec {watch}<&-
}

run_case "$1"
