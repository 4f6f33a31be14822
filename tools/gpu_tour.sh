#!/usr/bin/env bash
# The same life of a module on a GPU and in host memory, by the command line: loaded, trained, moved
# there and back, saved, loaded, fetched. Both must end with the same bits. Exit 0 when they do.
# Usage: gpu_tour.sh BIN CHECKPOINT.pth [DEVICE [OTHER]]
#   BIN holds modelstate and modelstate-server; OTHER is where the module moves to (cpu)
set -euo pipefail
bin=$1 checkpoint=$2 device=${3:-cuda:0} other=${4:-cpu}
work=$(mktemp -d)
server=
trap 'kill $server 2>/dev/null || true; wait; rm -rf "$work"' EXIT
mkdir "$work/root"
cp "$checkpoint" "$work/root/crepe.pth"

# live DEVICE OTHER: a server whose modules begin on DEVICE; leaves DEVICE.safetensors.
live() {
  local out=$work/${1/:/-}
  "$bin/modelstate-server" --listen=127.0.0.1:0 --checkpoint_root="$work/root" --device="$1,$2" \
    --log_level=warn >"$out.log" 2>&1 &
  server=$!
  for _ in $(seq 200); do
    grep -q '^listening on ' "$out.log" && break
    kill -0 $server 2>/dev/null || { cat "$out.log"; return 1; }
    sleep 0.05
  done
  export MODELSTATE_SERVER
  MODELSTATE_SERVER=$(sed -n 's/^listening on //p' "$out.log")
  "$bin/modelstate" load crepe crepe.pth
  "$bin/modelstate" optim set crepe --adamw --lr 0.001 --max-grad-norm 1
  "$bin/modelstate" push crepe --random --steps 5 --seed 7
  "$bin/modelstate" move crepe --device "$2"
  "$bin/modelstate" push crepe --random --steps 1 --seed 8
  "$bin/modelstate" move crepe --device "$1"
  "$bin/modelstate" move crepe --dtype bf16
  "$bin/modelstate" push crepe --random --steps 3 --seed 9
  "$bin/modelstate" save crepe "saved-${1/:/-}"
  "$bin/modelstate" load again "saved-${1/:/-}"
  "$bin/modelstate" stats crepe --glob 'conv1.*'
  "$bin/modelstate" fetch again "$out.safetensors"
  "$bin/modelstate" checkpoints --verify
  kill $server
  wait $server
}
live "$device" "$other"
live cpu cpu:1
"$bin/modelstate" diff "$work/${device/:/-}.safetensors" "$work/cpu.safetensors"
echo "the same bits on $device and on the host"
