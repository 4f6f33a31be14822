#!/usr/bin/env bash
# The server on the fake GPU. Usage: server_test.sh Tour|ExitCode|Absent
# Needs from the environment: FAKE_SERVER, MODELSTATE_BIN (folder of the executables) and
# MODELSTATE_SOURCE.
set -uo pipefail
work=$(mktemp -d)
server=
trap 'kill $server 2>/dev/null; wait; rm -rf "$work"' EXIT
fail() { echo "FAILED: $*"; cat "$work"/*.log; exit 1; }

case $1 in
  Tour)
    mkdir "$work/bin"
    ln -s "$FAKE_SERVER" "$work/bin/modelstate-server"
    ln -s "$MODELSTATE_BIN/modelstate" "$work/bin/modelstate"
    exec bash "$MODELSTATE_SOURCE/tools/gpu_tour.sh" "$work/bin" \
      "$MODELSTATE_SOURCE/tests/data/crepe-tiny.pth" cuda:0 cuda:1
    ;;
  ExitCode)
    mkfifo "$work/lines"
    FAKE_CUDA_STICKY_AT=200 "$FAKE_SERVER" --listen=127.0.0.1:0 --checkpoint_root="$work/root" \
      --device=cuda:0 --drain_timeout=1s >"$work/lines" 2>"$work/server.log" &
    server=$!
    exec {lines}<"$work/lines"
    while IFS= read -r -t 60 -u "$lines" line; do
      case $line in 'listening on '*) break ;; esac
    done
    export MODELSTATE_SERVER=${line#listening on }
    mkdir -p "$work/root"
    cp "$MODELSTATE_SOURCE/tests/data/crepe-tiny.pth" "$work/root/"
    # Sooner or later one of them meets the failure.
    for _ in $(seq 20); do
      "$MODELSTATE_BIN/modelstate" load crepe crepe-tiny.pth >>"$work/client.log" 2>&1 || break
    done
    grep -q 'cudaErrorIllegalAddress' "$work/client.log" || fail 'no call was told what happened'
    wait "$server"
    code=$?
    server=
    [ "$code" -eq 3 ] || fail "exit code $code, expected 3"
    grep -q 'device cuda:0 failed' "$work/server.log" || fail 'the log does not say it'
    ;;
  Absent)
    "$FAKE_SERVER" --listen=127.0.0.1:0 --checkpoint_root="$work/root" --device=cuda:7 \
      >"$work/out.log" 2>&1 && fail 'it started'
    grep -q 'cuda:7: there is no GPU of this number, the NVIDIA driver shows 2' "$work/out.log" ||
      fail 'what was looked for is not said'
    ;;
esac
