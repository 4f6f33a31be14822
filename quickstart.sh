#!/usr/bin/env bash
# Installs what is missing, builds the release server and command line, and shows a tour of them on a
# real PyTorch checkpoint: load, list, train while readers fetch, save, fetch, compare.
# Usage: ./quickstart.sh [CHECKPOINT]    (a .pth, .pt, .bin or .safetensors file)
# Prints every command it runs and what came back. Ends by itself and leaves nothing behind but
# build/; exit 0 when all of it went as it says.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
case ${1-} in
  -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
esac
checkpoint=$(readlink -f "${1:-$here/tests/data/crepe-tiny.pth}")
if [ ! -f "$checkpoint" ]; then
  echo "$0: no file ${1:-tests/data/crepe-tiny.pth}" >&2
  exit 2
fi
cd "$here"

steps=20
readers=4
work=$(mktemp -d)
root=$work/checkpoints
server=
readers_running=()

clean_up() {
  local code=$?
  trap - EXIT INT TERM
  set +e
  # Each is a process group, so that what it runs ends with it.
  for pid in "${readers_running[@]}"; do kill -TERM -- "-$pid" && wait "$pid"; done 2>/dev/null
  if [ -n "$server" ]; then
    kill -TERM "$server" 2>/dev/null
    wait "$server" 2>/dev/null
  fi
  if [ "$code" -ne 0 ] && [ -s "$work/server.log" ]; then
    echo "the server's last lines:"
    tail -n 20 "$work/server.log"
  fi
  rm -rf "$work"
  exit "$code"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

bold=$(tput bold 2>/dev/null || true)
plain=$(tput sgr0 2>/dev/null || true)
title() { printf '\n%s== %s%s\n' "$bold" "$*" "$plain"; }
say() { printf '%s\n' "-> $*"; }
wrong() {
  echo "quickstart: $*" >&2
  exit 1
}

# show COMMAND...: prints it as one would type it, also where its output goes to a file, then runs it.
exec 3>&1
show() {
  local word line='$'
  for word in "$@"; do
    case $word in
      *[!A-Za-z0-9_./:=-]*) line+=" '${word//\'/\'\\\'\'}'" ;;
      *) line+=" $word" ;;
    esac
  done
  printf '%s\n' "$line" >&3
  "$@"
}

call() { # METHOD JSON: what the tour itself needs to know, not shown
  grpcurl -plaintext -d "$2" "$MODELSTATE_SERVER" "modelstate.v1.ModelState/$1"
}

# buffer_digests: `NAME DIGEST` per buffer.
buffer_digests() {
  call ListBuffers "{\"module\": \"$module\", \"digests\": true}" |
    jq -r '.tensors[]? | "\(.name) \(.xxh3)"'
}

title 'Install and build (the first time takes some minutes)'
show tools/install_dependencies.sh --tests
if command -v ccache >/dev/null; then export CMAKE_CXX_COMPILER_LAUNCHER=ccache; fi
mkdir -p build
show cmake --preset release >build/configure-release.log ||
  { cat build/configure-release.log; wrong 'cmake failed'; }
# The same build folder as test.sh, so that nothing is compiled twice; without the tests.
show cmake --build build/release -j "$(nproc)" --target bin/modelstate-server bin/modelstate
export PATH=$here/build/release/bin:$here/build/tools/bin:$PATH

title 'Start a server on a free loopback port'
mkdir "$root"
file=$(basename "$checkpoint")
cp "$checkpoint" "$root/$file"
mkfifo "$work/lines"
echo "\$ modelstate-server --listen=127.0.0.1:0 --checkpoint_root=$root &"
modelstate-server --listen=127.0.0.1:0 --checkpoint_root="$root" \
  >"$work/lines" 2>"$work/server.log" &
server=$!
exec {lines}<"$work/lines"
while IFS= read -r -t 60 -u "$lines" line; do
  echo "$line"
  case $line in 'listening on '*) export MODELSTATE_SERVER=${line#listening on }; break ;; esac
done
[ -n "${MODELSTATE_SERVER-}" ] || wrong 'the server did not start'
say "MODELSTATE_SERVER=$MODELSTATE_SERVER is where the commands below connect to"

module=$(sed -E 's/\.[A-Za-z]+$//; s/[^A-Za-z0-9._-]+/_/g; s/^[^A-Za-z0-9]+//' <<<"$file")
case $module in crepe-tiny) module=crepe ;; '') module=model ;; esac

title "Load $file: what is a parameter, what a buffer, and by which rule"
show modelstate load "$module" "$file"
show modelstate ls

title 'The buffers, as any gRPC client sees them'
first_buffers=$(call ListBuffers "{\"module\": \"$module\"}" | jq -r '.tensors[0:3][]?.name')
buffers=$(buffer_digests)
buffer_count=$(grep -c . <<<"$buffers" || true)
if [ "$buffer_count" -gt 0 ]; then
  show grpcurl -plaintext -d "{\"module\": \"$module\", \"pageSize\": 3, \"digests\": true}" \
    "$MODELSTATE_SERVER" modelstate.v1.ModelState/ListBuffers
  say "the first of $buffer_count: $(xargs <<<"$first_buffers")"
else
  say 'this checkpoint has none'
fi

title 'Configure AdamW'
show modelstate optim set "$module" --adamw --lr 0.001 --weight-decay 0.01

title "Push $steps steps of random gradients while $readers readers fetch without pause"
reader() { # NUMBER: one line per snapshot: `VERSION SHA256`
  local out=$work/reader$1 answer
  # At least once, and until the pushes are over.
  while :; do
    answer=$(modelstate fetch "$module" "$out.safetensors" --json) || return 1
    printf '%s %s\n' "$(jq -r '.version.number? // .version' <<<"$answer")" \
      "$(sha256sum <"$out.safetensors" | cut -d' ' -f1)" >>"$out.seen"
    rm "$out.safetensors"
    [ ! -e "$work/pushed" ] || return 0
  done
}
before=$(call GetModule "{\"module\": \"$module\"}" | jq -r .version.number)
echo "\$ modelstate fetch $module READER.safetensors --json    ($readers times in parallel, over and over)"
set -m
for ((i = 1; i <= readers; ++i)); do
  reader "$i" &
  readers_running+=($!)
done
set +m
show modelstate push "$module" --random --seed 1 --steps "$steps" --scale 0.01
touch "$work/pushed"
for pid in "${readers_running[@]}"; do wait "$pid" || wrong 'a reader failed'; done
readers_running=()
after=$(call GetModule "{\"module\": \"$module\"}" | jq -r .version.number)
snapshots=$(cat "$work"/reader*.seen | wc -l)
# Every fetch checks the digest of every tensor. What that cannot see (tensors of two versions in one
# snapshot, each right) shows here: readers that met the same version must hold the same bytes.
versions=$(cut -d' ' -f1 "$work"/reader*.seen | sort -nu)
torn=$(sort -u "$work"/reader*.seen | cut -d' ' -f1 | uniq -d)
[ -z "$torn" ] || wrong "readers of version $torn got different bytes"
for v in $versions; do
  ((v >= before && v <= after)) || wrong "a reader saw version $v, outside [$before, $after]"
done
say "$snapshots snapshots by $readers readers, of versions $(xargs <<<"$versions")"
say "all digests right, one content per version: every snapshot is one whole version"

title 'A gradient for a buffer is refused, and nothing changes'
victim=$(grep -m1 -oE '^\S*running_mean ' <<<"$buffers" || grep -m1 -oE '^\S+ ' <<<"$buffers" || true)
victim=${victim% }
if [ -n "$victim" ]; then
  entry=$(call ListBuffers "{\"module\": \"$module\", \"selection\": {\"names\": [\"$victim\"]}}" |
    jq -c '.tensors[0] | {name, kind: "GRADIENT", dtype, shape: ((.shape // []) | map(tonumber)), nbytes}')
  bytes=$(jq -r .nbytes <<<"$entry")
  push="{\"header\": {\"module\": \"$module\", \"tensorCount\": 1, \"totalBytes\": $bytes}}
{\"tensors\": {\"tensors\": [$entry]}}
{\"chunk\": {\"data\": \"$(head -c "$bytes" /dev/zero | base64 -w 0)\"}}
{\"trailer\": {\"totalBytes\": $bytes}}"
  printf "\$ grpcurl -plaintext -d '%s' %s %s\n" "$(cut -c1-120 <<<"$push")" "$MODELSTATE_SERVER" \
    modelstate.v1.ModelState/ApplyStep
  if answer=$(call ApplyStep "$push" 2>&1); then wrong "it was not refused: $answer"; fi
  printf '%s\n' "$answer"
  grep -q NOT_A_PARAMETER <<<"$answer" || wrong 'it was refused for another reason'
  [ "$(call GetModule "{\"module\": \"$module\"}" | jq -r .version.number)" = "$after" ] ||
    wrong 'the refused push changed the module'
  say "still version $after"
else
  say 'this checkpoint has no buffer to try it on'
fi

title "All $buffer_count buffers still have the digest they were loaded with"
show modelstate buffers "$module" --digests
[ "$(buffer_digests)" = "$buffers" ] || wrong 'a buffer has changed'
say "$buffer_count of $buffer_count equal"

title 'Save a checkpoint on the server'
saved=$module-step$steps
show modelstate save "$module" "$saved"
show modelstate checkpoints --verify

title 'Fetch over the network into a .safetensors file, and compare'
show modelstate fetch "$module" "$work/fetched.safetensors"
show ls -l "$root/$saved"
show modelstate diff "$root/$saved/model.safetensors" "$work/fetched.safetensors"

title 'Stop the server'
echo "\$ kill -TERM $server"
kill -TERM "$server"
stopped=$server
server=
wait "$stopped" || wrong "the server ended with exit code $?"
say 'it drained and ended; that was the tour'
