#!/usr/bin/env bash
# Builds the benchmarks, runs every row of the table in turns with its baselines, and writes table.txt,
# results.json and a plot per row. Usage:
#
#   bench/run.sh [--size 1GiB] [--rounds 7] [--runs 1] [--rows "fetch push ..."] [--out DIR]
#                [--wrap COMMAND]
#
# --size takes what numfmt does (64MiB for a quick look). --wrap is put before each measurement, as in
# --wrap "nice -n -5". The Python baseline needs grpcio and grpcio-tools, which pip puts into the build
# folder; without them it is not measured.
set -euo pipefail
cd "$(dirname "$0")/.."
source=$PWD
build=$source/build/release
size=1GiB rounds=7 runs=1 rows='fetch push file fanout small memory unary' out=$build/bench wrap=
while [ $# -gt 0 ]; do
  case $1 in
    --size) size=$2; shift 2 ;;
    --rounds) rounds=$2; shift 2 ;;
    --runs) runs=$2; shift 2 ;;
    --rows) rows=$2; shift 2 ;;
    --out) out=$2; shift 2 ;;
    --wrap) wrap=$2; shift 2 ;;
    *) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2 ;;
  esac
done
bytes=$(numfmt --from=auto "${size%B}")

[ -f "$build/build.ninja" ] || cmake --preset release
cmake --build "$build" -j"${JOBS:-2}" --target transfer_bench stub_server modelstate-server >/dev/null

python=
venv=$build/bench-venv stubs=$build/bench-stubs
mkdir -p "$out" "$stubs"
[ -x "$venv/bin/python" ] || python3 -m venv "$venv" || true
if "$venv/bin/python" -c 'import grpc_tools' 2>/dev/null ||
  "$venv/bin/python" -m pip install -q grpcio grpcio-tools; then
  (cd proto && "$venv/bin/python" -m grpc_tools.protoc -I. --python_out="$stubs" \
    --grpc_python_out="$stubs" modelstate/v1/*.proto)
  python="$venv/bin/python $source/bench/stub_server.py"
fi

rm -f "$out"/*.run*.json
for run in $(seq "$runs"); do
  for row in $rows; do
    echo "run $run: $row" >&2
    PYTHONPATH=$stubs $wrap "$build/bin/transfer_bench" --row="$row" --bytes="$bytes" \
      --rounds="$rounds" --json="$out/$row.run$run.json" --python="$python" >&2
  done
done
python3 bench/report.py "$out" --size="$size" --rounds="$rounds"
