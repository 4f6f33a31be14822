#!/usr/bin/env bash
# `modelstate optim` and `modelstate step-from` against a real server.
# Usage: cli_optim_test.sh CASE; each case has a server of its own. See lib.sh for its environment.
here=$(dirname "$(readlink -f "$0")")
source "$here/lib.sh"

# Module `tiny`, and a file in which its weights [1, 2, 3, 4] are gradients.
create_tiny_and_gradients() {
  create_tiny || return
  cli 0 fetch tiny "$WORK/gradients.safetensors" --kind parameter >/dev/null
}
weight_is() {
  json .values "$1" cat tiny weight
}
# said TEXT WHAT: the last error has TEXT.
said() {
  grep -q "$1" "$WORK/cli.err" || fail "$2: $(<"$WORK/cli.err")"
}

case_SetTakesEveryAlgorithmAndItsHyperparameters() {
  local name
  create_tiny || return
  for name in sgd adamw adam adagrad rmsprop nadam radam adamax adadelta lion; do
    json '[.algorithm, .groups[0].hyperparameters.lr]' "[\"${name^^}\",0.25]" optim set tiny "--$name" --lr 0.25
    json .algorithm "\"${name^^}\"" optim set tiny --algorithm "$name" --lr 0.5
  done
  json .algorithm '"RMSPROP"' optim set tiny --algorithm RMSprop
  json '.groups[0].hyperparameters | [.lr, .alpha, .centered, .weight_decay]' '[0.125,0.5,true,0.25]' \
    optim set tiny --rmsprop --lr 0.125 --alpha 0.5 --centered --weight-decay 0.25
  json '.groups[0].hyperparameters | [.lr, .alpha, .centered]' '[0.125,0.5,false]' optim set tiny --no-centered
  prints 'centered false' optim show tiny
  json '.groups[0].hyperparameters | [.lr, .amsgrad, .maximize, .beta2]' '[0.001,true,true,0.5]' \
    optim set tiny --adam --amsgrad --maximize --beta2 0.5
  cli 4 optim set tiny --momentum 0.9 >/dev/null
  said 'INVALID_FIELD.*momentum' 'a hyper-parameter that the algorithm has not'
  cli 2 optim set tiny --adam --sgd >/dev/null
  cli 2 optim set tiny --algorithm speed >/dev/null
  cli 2 optim set tiny --speed 3 >/dev/null
  cli 2 optim tiny >/dev/null
  cli 2 optim >/dev/null
}

case_SetChangesWhatIsGiven() {
  create_tiny || return
  cli 4 optim show tiny >/dev/null
  said 'NO_OPTIMIZER.*modelstate optim set MODULE' 'none configured'
  cli 4 optim set tiny --lr 0.1 >/dev/null
  said NO_OPTIMIZER 'a part of none'
  cli 0 optim set tiny --adamw --lr 0.1 --max-grad-norm 2 --max-staleness 3 >/dev/null
  json '[.max_grad_norm, .max_staleness, .groups[0].hyperparameters.lr]' '[2,3,0.2]' optim set tiny --lr 0.2
  json '[.max_grad_norm, .max_grad_value]' '[null,0.5]' optim set tiny --max-grad-value 0.5
  json '[.max_grad_norm, .max_grad_value]' '[null,null]' optim set tiny --no-clipping
  json .max_staleness null optim set tiny --any-staleness
  json .master_weights false optim set tiny --no-master-weights
  json .master_weights true optim set tiny --master-weights
  # Another algorithm begins with its own defaults.
  json '.groups[0].hyperparameters.lr' 0.001 optim set tiny --sgd
  cli 2 optim set tiny --max-grad-norm 1 --max-grad-value 1 >/dev/null
  cli 3 optim set nobody --sgd >/dev/null
  cli 3 optim show nobody >/dev/null
}

# The times of a round come together; 0 of one is the end of both.
case_SetRefusesHalfATimeout() {
  create_tiny || return
  local times='[.rounds.min_contributions, .rounds.round_timeout_seconds]'
  cli 4 optim set tiny --sgd --quorum 2 --round-timeout 5 >/dev/null
  said 'INVALID_FIELD.*round_timeout.*set both above 0, or neither' 'a timeout alone'
  cli 4 optim set tiny --sgd --quorum 2 --min-contributions 1 >/dev/null
  said 'INVALID_FIELD.*set both above 0, or neither' 'a minimum alone'
  json "$times" '[1,5]' optim set tiny --sgd --quorum 2 --min-contributions 1 --round-timeout 5
  json "$times" '[1,7]' optim set tiny --round-timeout 7
  json "$times" '[0,0]' optim set tiny --min-contributions 0
  json "$times" '[1,5]' optim set tiny --min-contributions 1 --round-timeout 5
  json "$times" '[0,0]' optim set tiny --round-timeout 0
}

case_SetTakesGroups() {
  load_crepe || return
  json '[.groups[] | .name, .parameters, .hyperparameters.weight_decay, .hyperparameters.lr]' \
    '["no_decay",19,0,0.1,"default",7,0.01,0.1]' \
    optim set crepe --adamw --lr 0.1 --group 'no_decay:*.bias,*_BN.*:weight_decay=0'
  json '[.groups[] | .name, .hyperparameters.lr]' '["a",0.5,"b",0.25,"default",0.1]' \
    optim set crepe --group 'a:conv1.*:lr=0.5' --group 'b:conv2.*:lr=0.25'
  json '.groups | length' 3 optim set crepe --lr 0.2
  json '[.parameters[] | select(.group_name == "b") | .name, .group]' \
    '["conv2.weight",1,"conv2.bias",1]' optim groups crepe
  json '[.parameters | length, (map(select(.group == 2)) | length)]' '[26,22]' optim groups crepe
  json '[.groups[].parameters]' '[26]' optim set crepe --no-groups
  cli 2 optim set crepe --group 'no_decay' >/dev/null
  cli 2 optim set crepe --group 'x:*:speed=3' >/dev/null
  said 'no hyper-parameter "speed"' 'a wrong key'
}

case_ParametersMayBeInNoGroup() {
  load_crepe || return
  json '[.ungrouped.count, (.ungrouped.first | length), .groups[].name]' '[24,10,"a"]' \
    optim set crepe --adamw --group 'a:conv1.*:' --no-default-group
  prints 'in no group: 24 parameters' optim show crepe
  json '[.parameters[] | select(.group == null)] | length' 24 optim groups crepe
  cli 4 push crepe --random >/dev/null
  said NOT_IN_A_GROUP 'a gradient for one in no group'
  json .ungrouped.count 0 optim set crepe --default-group
}

case_StateIsListedKeptAndDropped() {
  create_tiny_and_gradients && cli 0 optim set tiny --adamw >/dev/null || return
  cli 0 step-from tiny "$WORK/gradients.safetensors" >/dev/null
  json '[.tensors[] | .name, .slot]' '["weight","step","weight","exp_avg","weight","exp_avg_sq"]' optim state tiny
  prints exp_avg_sq optim state tiny
  # ADAM and ADAMW keep the same.
  json '[.dropped.count, .algorithm]' '[0,"ADAM"]' optim set tiny --adam
  json '[.dropped.first[] | select(startswith("exp_avg"))]' '["exp_avg/weight","exp_avg_sq/weight"]' optim set tiny --sgd
  json '.tensors | length' 0 optim state tiny
  cli 0 optim set tiny --sgd --momentum 0.9 >/dev/null
  cli 0 step-from tiny "$WORK/gradients.safetensors" >/dev/null
  prints 'momentum_buffer/weight' optim set tiny --reset-state
}

# Gradients by parameter name, and wrong ones.
case_AStepFromAFile() {
  create_tiny_and_gradients && configure_sgd || return
  json '[.outcome, .step, .updated, .replayed]' '["APPLIED",1,1,false]' step-from tiny "$WORK/gradients.safetensors"
  # Each weight was its own gradient at a rate of 1.
  weight_is '[0,0,0,0]'
  json .outcome '"APPLIED"' step-from tiny "$WORK/gradients.safetensors" --lr 0.5
  weight_is '[-0.5,-1,-1.5,-2]'
  json .outcome '"APPLIED"' step-from tiny "$WORK/gradients.safetensors" --grad-scale 4 --weight-decay 1
  weight_is '[-0.25,-0.5,-0.75,-1]'
  prints 'step 4  version 6  APPLIED' step-from tiny "$WORK/gradients.safetensors"
  ok CreateModule '{"name": "other", "spec": {"tensors": [{"name": "weight", "kind": "PARAMETER", "dtype": "F32", "shape": [3]}]}}' \
    >/dev/null || fail 'create other'
  cli 0 optim set other --sgd --lr 1 >/dev/null
  cli 4 step-from other "$WORK/gradients.safetensors" >/dev/null
  said 'SHAPE_MISMATCH.*"weight"' 'another shape'
  cli 3 step-from tiny "$WORK/none.safetensors" >/dev/null
  cli 2 step-from tiny >/dev/null
  cli 2 push tiny --gradients "$WORK/gradients.safetensors" >/dev/null
}

# header_of FILE: of a safetensors file, as JSON.
header_of() {
  tail -c +9 "$1" | head -c "$(od -An -tu8 -N8 "$1" | tr -d ' ')"
}
# floats NUMBER...: as they lie in memory, of those used here.
floats() {
  local number
  for number; do
    case $number in
      1) printf '\0\0\x80\x3f' ;;
      2) printf '\0\0\0\x40' ;;
      3) printf '\0\0\x40\x40' ;;
    esac
  done
}
# plain_file HEADER FLOAT...: a safetensors file as others write it, without metadata.
plain_file() {
  printf "\\x$(printf '%02x' "${#1}")\\0\\0\\0\\0\\0\\0\\0%s" "$1"
  floats "${@:2}"
}

# Neither a PyTorch file nor a plain safetensors file says what is a buffer: the module does.
case_AStepAssignsTheBuffersOfAnyFile() {
  create_tiny && configure_sgd || return
  plain_file '{"weight":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"running_mean":{"dtype":"F32","shape":[2],"data_offsets":[16,24]}}' \
    1 1 1 1 2 3 >"$WORK/plain.safetensors"
  json '[.outcome, .updated]' '["APPLIED",1]' step-from tiny "$WORK/plain.safetensors"
  weight_is '[0,1,2,3]'
  json .values '[2,3]' cat tiny running_mean
  load_crepe || return
  cli 0 spec crepe --out "$WORK/crepe.json" >/dev/null
  cli 0 create zeros --spec "$WORK/crepe.json" >/dev/null
  cli 0 optim set zeros --sgd --lr 1 >/dev/null
  json '[.outcome, .updated]' '["APPLIED",26]' step-from zeros "$MODELSTATE_SOURCE/tests/data/crepe-tiny.pth"
  json '.versions[0] | [.changed_parameters, .changed_buffers]' '[26,18]' history zeros
  # The buffers are those of the file; the parameters have gone from zero by its negative.
  expect 18 "$(cli 1 --json diff zeros crepe | jq .equal)" 'equal tensors after the step'
}

# The same command again, with the step's own name, gets the first answer and applies nothing.
case_AStepThatIsSentAgainIsAppliedOnce() {
  create_tiny_and_gradients && configure_sgd || return
  local step=(step-from tiny "$WORK/gradients.safetensors" --worker me --sequence 7)
  json '[.step, .replayed, .worker, .sequence]' '[1,false,"me",7]' "${step[@]}"
  json '[.step, .replayed]' '[1,true]' "${step[@]}"
  check GetModule '{"module": "tiny"}' '.step' '"1"'
  cli 4 step-from tiny "$WORK/gradients.safetensors" --worker me --sequence 6 >/dev/null
  said 'SEQUENCE_REUSED.*go on with 8' 'a lower sequence'
  cli 2 step-from tiny "$WORK/gradients.safetensors" --sequence 7 >/dev/null
  cli 2 push tiny --random --sequence 7 >/dev/null
}

# Names are for those who repeat: each takes a place among the workers that the server remembers.
case_StepsWithoutAWorkerTakeNoPlace() {
  create_tiny_and_gradients && configure_sgd || return
  json '[.worker, .sequence, .step]' '[null,null,1]' step-from tiny "$WORK/gradients.safetensors"
  json '[.worker, .last_sequence, (.steps | length)]' '[null,null,2]' push tiny --random --steps 2
  json .workers 0 optim show tiny
  # Rounds are made of workers.
  cli 0 optim set tiny --quorum 2 >/dev/null
  cli 4 push tiny --random >/dev/null
  said 'INVALID_FIELD.*worker' 'no worker in a round'
}

case_AWorkerGoesOnAfterItsLastSequence() {
  create_tiny_and_gradients && configure_sgd || return
  local file=$WORK/gradients.safetensors
  json '[.sequence, .replayed]' '[1,false]' step-from tiny "$file" --worker a
  json '[.sequence, .replayed]' '[2,false]' step-from tiny "$file" --worker a
  # A number of one's own is above those, and is gone on from.
  json '[.sequence, .replayed]' '[99,false]' step-from tiny "$file" --worker a --sequence 99
  json '[.last_sequence, .steps[].step]' '[101,4,5]' push tiny --random --steps 2 --worker a
  json .sequence 1 step-from tiny "$file" --worker b
  json '[.workers, .step]' '[2,6]' optim show tiny
}

case_PushesWaitForTheirRounds() {
  create_tiny && cli 0 optim set tiny --sgd --quorum 2 >/dev/null || return
  json '[.steps[] | .outcome, .step]' '["APPLIED",1,"APPLIED",2]' push tiny --random --steps 2 --worker a --wait &
  json '[.steps[] | .outcome, .step]' '["APPLIED",1,"APPLIED",2]' push tiny --random --steps 2 --worker b --wait
  wait $!
}

case_HyperparametersOfOneGroupForOneStep() {
  ok CreateModule '{"name": "two", "spec": {"tensors": [
    {"name": "first", "kind": "PARAMETER", "dtype": "F32", "shape": [1]},
    {"name": "second", "kind": "PARAMETER", "dtype": "F32", "shape": [1]}]}}' >/dev/null || return
  local file=$WORK/gradients.safetensors
  plain_file '{"first":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"second":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}' \
    1 1 >"$file"
  cli 0 optim set two --sgd --lr 1 --group 'head:first:' >/dev/null
  cli 0 step-from two "$file" --override head:lr=3 >/dev/null
  json .values '[-3]' cat two first
  json .values '[-1]' cat two second
  cli 0 step-from two "$file" --override 0:lr=2 --override 1:lr=5,weight_decay=1 >/dev/null
  json .values '[-5]' cat two first
  json .values '[-1]' cat two second
  # Once more as they were configured.
  cli 0 step-from two "$file" >/dev/null
  json .values '[-6]' cat two first
  cli 4 step-from two "$file" --override tail:lr=2 >/dev/null
  said 'no group "tail".*"head"' 'an unknown group'
  local wrong
  for wrong in lr=2 head: head:speed=1 head:lr=1,lr=2; do
    cli 2 step-from two "$file" --override "$wrong" >/dev/null
  done
}

case_WrongValuesAreToldInWords() {
  create_tiny_and_gradients || return
  local file=$WORK/gradients.safetensors
  cli 2 step-from tiny "$file" --weight -1 >/dev/null
  said '^--weight: -1 is not more than 0$' 'a negative weight'
  cli 2 step-from tiny "$file" --worker a --sequence 0 >/dev/null
  said '^--sequence: 0 is not more than 0$' 'sequence 0'
  cli 2 fetch tiny "$WORK/x" --version 0 >/dev/null
  said '^--version: 0 is not more than 0$' 'version 0'
  cli 2 optim set tiny --sgd --quorum 2 --min-contributions 1 --round-timeout 1e300 >/dev/null
  said '^--round-timeout: 1e300 is not 0 to 315576000000 seconds$' 'a timeout without end'
  cli 2 pin tiny --lease 1e300h >/dev/null
  cli 2 optim set tiny --sgd --group 'a:*:lr=1,lr=2' >/dev/null
  said '"lr" is given twice' 'a hyper-parameter twice'
  # A glob that takes nothing is no error, but hardly meant.
  cli 0 optim set tiny --sgd --group 'head:haed.*:lr=1' --group 'rest:*:' >/dev/null
  said 'warning: group 0 "head" has no parameter' 'a group of none'
  ! grep -q rest "$WORK/cli.err" || fail "a group of some: $(<"$WORK/cli.err")"
}

# CLI11 would take -1, and what is larger, for the largest number.
case_NumbersThatDoNotFitAreRefused() {
  create_tiny_and_gradients || return
  local file=$WORK/gradients.safetensors huge=99999999999999999999999 value
  local wide="is not a whole number from 0 to 18446744073709551615" narrow="is not a whole number from 0 to 4294967295"
  for value in -1 "$huge"; do
    refuses_number "$wide" "$value" --max-staleness optim set tiny --sgd
    refuses_number "$narrow" "$value" --quorum optim set tiny --sgd
    refuses_number "$narrow" "$value" --min-contributions optim set tiny --sgd
    refuses_number "$wide" "$value" --step optim import tiny x.pt
    refuses_number "$narrow" "$value" --accumulated step-from tiny "$file" --worker a
    refuses_number "$wide" "$value" --steps push tiny --random
    refuses_number "$wide" "$value" --seed push tiny --random
    refuses_number "$wide" "$value" --seed create other
    refuses_number "$wide" "$value" --limit history tiny
    refuses_number "$wide" "$value" --count watch tiny
    refuses_number "$wide" "$value" --versions follow tiny --to x.safetensors
    refuses_number "$wide" "$value" --first cat tiny weight
    refuses_number "$narrow" "$value" --count cat tiny weight
    refuses_number "$wide" "$value" --size bench
    refuses_number "$wide" "$value" --max-shard-size convert "$file" "$WORK/shards"
  done
  # The others are held against 0 before.
  refuses_number "$wide" "$huge" --sequence step-from tiny "$file" --worker a
  refuses_number "$wide" "$huge" --sequence push tiny --random --worker a
  refuses_number "$wide" "$huge" --version fetch tiny "$WORK/x"
  refuses_number 'is not more than 0' -1 --sequence step-from tiny "$file" --worker a
  cli 2 convert "$file" "$WORK/shards" --max-shard-size 99999999999GB >/dev/null
  cli 0 optim set tiny --sgd --max-staleness 18446744073709551615 >/dev/null
}
# refuses_number WHY VALUE OPTION COMMAND...
refuses_number() {
  cli 2 "${@:4}" "$3=$2" >/dev/null
  said "^$3: $2 $1\$" "$2 of ${*:3}"
}

case_JsonErrorsSayWhenToTryAgain() {
  create_tiny && cli 0 optim set tiny --sgd --quorum 2 >/dev/null || return
  cli 0 push tiny --random --worker a >/dev/null
  local output
  output=$(cli 4 --json push tiny --random --worker a)
  expect '["ALREADY_CONTRIBUTED",true]' "$(jq -c '.error | [.reason, .retry_after_seconds > 0]' <<<"$output")" 'a second contribution'
  output=$(cli 3 --json optim show nobody)
  expect '["MODULE_NOT_FOUND",null]' "$(jq -c '.error | [.reason, .retry_after_seconds]' <<<"$output")" 'no module'
}

case_OptimizerStateIsFetched() {
  create_tiny_and_gradients && cli 0 optim set tiny --adamw >/dev/null || return
  cli 0 step-from tiny "$WORK/gradients.safetensors" >/dev/null
  local out=$WORK/all.safetensors pin
  cli 4 fetch tiny "$WORK/nowhere/x.safetensors" >/dev/null
  said "create $WORK/nowhere/x.safetensors, " 'a folder that is not there'
  json '[.tensors, .digests_verified]' '[5,5]' fetch tiny "$out" --optimizer-state
  expect '["exp_avg/weight","exp_avg_sq/weight","running_mean","step/weight","weight"]' \
    "$(header_of "$out" | jq -c 'del(.__metadata__) | keys')" 'names in the file'
  json '.tensors' 3 fetch tiny "$WORK/state.safetensors" --kind optimizer-state
  expect '[true,"[]"]' "$(header_of "$WORK/state.safetensors" | jq -c '[has("exp_avg/weight"), (.__metadata__."modelstate.kinds" | fromjson | .buffers | tostring)]')" \
    'state alone'
  json .tensors 2 fetch tiny "$WORK/weights.safetensors"
  json '[.equal, (.differences | length)]' '[2,0]' diff "$WORK/weights.safetensors" tiny
  # What a pin holds is said when it is made.
  pin=$(cli 0 --json pin tiny | jq -r .snapshot_id)
  cli 4 fetch tiny "$out" --optimizer-state --snapshot "$pin" >/dev/null
  said INVALID_FIELD 'a pin without it'
  pin=$(cli 0 --json pin tiny --optimizer-state | jq -r .snapshot_id)
  cli 0 step-from tiny "$WORK/gradients.safetensors" >/dev/null
  json '[.tensors, .step]' '[5,1]' fetch tiny "$out" --optimizer-state --snapshot "$pin"
}

case_NamesAreEscapedForTheTerminal() {
  local name='we\u001b[31might' esc=$'\e' output command
  ok CreateModule "{\"name\": \"m\", \"spec\": {\"metadata\": {\"git\": \"\\u001b[2J\"}, \"tensors\": [
    {\"name\": \"$name\", \"kind\": \"PARAMETER\", \"dtype\": \"F32\", \"shape\": [1]},
    {\"name\": \"b\\u202e\\nuffer\", \"kind\": \"BUFFER\", \"dtype\": \"F32\", \"shape\": [1]}]}}" >/dev/null || return
  ok ConfigureOptimizer '{"module": "m", "optimizer": {"algorithm": "SGD", "groups": [
    {"name": "gr\u202eoup", "selection": {"globs": ["*"]}}]}}' >/dev/null
  cli 0 push m --random >/dev/null
  for command in 'info m' 'params m' 'buffers m' 'stats m' 'optim show m' 'optim groups m' 'optim state m' 'history m' "cat m we${esc}[31might"; do
    IFS=' ' read -ra words <<<"$command"
    output=$(cli 0 "${words[@]}")
    [[ $output != *"$esc"* && $output != *$'\xe2\x80\xae'* ]] || fail "modelstate $command prints an escape: $output"
    case $command in
      'params m' | 'stats m' | 'optim groups m' | cat*) [[ $output == *'we\x1b[31might'* ]] || fail "modelstate $command: $output" ;;&
      'optim '[sg][hr]*) [[ $output == *'gr\u202eoup'* ]] || fail "modelstate $command: $output" ;;
      'buffers m') [[ $output == *'b\u202e\nuffer'* ]] || fail "modelstate $command: $output" ;;
    esac
  done
  cli 3 cat m "no${esc}[31m" >/dev/null
  ! grep -q "$esc" "$WORK/cli.err" || fail "an error prints an escape: $(<"$WORK/cli.err")"
  # JSON has its own way.
  json '.tensors[0].name' "\"$name\"" params m
}

case_StepsAccumulate() {
  create_tiny_and_gradients && configure_sgd || return
  local file=$WORK/gradients.safetensors
  json '[.outcome, .accumulated, .step]' '["ACCUMULATED",1,0]' step-from tiny "$file" --worker a --sequence 1 --accumulate
  prints 'ACCUMULATED  accumulated 2' step-from tiny "$file" --worker a --sequence 2 --accumulate --accumulated 1
  cli 4 step-from tiny "$file" --worker a --sequence 3 --accumulated 5 >/dev/null
  said ACCUMULATION_LOST 'another count'
  json '[.outcome, .step]' '["APPLIED",1]' step-from tiny "$file" --worker a --sequence 3 --accumulated 2
  weight_is '[-2,-4,-6,-8]'
  cli 2 step-from tiny "$file" --accumulate >/dev/null
}

case_StepsOfSeveralWorkersMakeARound() {
  create_tiny_and_gradients || return
  local file=$WORK/gradients.safetensors
  json '.rounds | [.quorum, .min_contributions, .round_timeout_seconds, .contributions, .memory_bytes > 0]' \
    '[2,1,3600,0,true]' optim set tiny --sgd --lr 1 --quorum 2 --min-contributions 1 --round-timeout 3600
  json '[.outcome, .contributions, .quorum]' '["PENDING",1,2]' step-from tiny "$file" --worker a --sequence 1
  json '.rounds | [.contributions, .workers]' '[1,["a"]]' optim show tiny
  prints 'rounds of 2 workers, or 1 after 1h' optim show tiny
  # (1 * g + 3 * g / 2) / 4
  json '[.outcome, .contributions, .step]' '["APPLIED",2,1]' \
    step-from tiny "$file" --worker b --sequence 1 --weight 3 --grad-scale 2 --wait
  weight_is '[0.375,0.75,1.125,1.5]'
  json '[.outcome, .replayed]' '["APPLIED",true]' step-from tiny "$file" --worker a --sequence 1
  # Without rounds there is nothing to time out.
  json .rounds null optim set tiny --quorum 1
  json '.rounds | [.quorum, .min_contributions]' '[3,0]' optim set tiny --quorum 3
}

case_ANonfiniteStepIsToldByTheExitCode() {
  create_tiny_and_gradients && configure_sgd || return
  local output
  output=$(cli 1 --json step-from tiny "$WORK/gradients.safetensors" --grad-scale 3e-39)
  expect '["SKIPPED_NONFINITE",["weight"],0]' "$(jq -c '[.outcome, .nonfinite, .step]' <<<"$output")" 'an overflow'
  weight_is '[1,2,3,4]'
}

run_case "$1"
