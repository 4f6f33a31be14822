#!/usr/bin/env bash
# Installs what the build needs on Debian 12: apt packages, and with --tests the real grpcurl under
# build/tools/bin. Asks dpkg first: when nothing is missing it takes no time and no network.
# Usage: tools/install_dependencies.sh [--tests] [--full]
#   --tests  also what the tests and the quickstart need
#   --full   also what `test.sh --full` needs: clang, clang-format, clang-tidy
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."

build=(
  ca-certificates cmake g++ git make ninja-build pkg-config
  grpc-proto libgrpc++-dev libprotobuf-dev protobuf-compiler protobuf-compiler-grpc
  libabsl-dev libasio-dev libcli11-dev libdeflate-dev librandom123-dev libspdlog-dev libxxhash-dev nlohmann-json3-dev
)
tests=(jq libgmock-dev libgtest-dev python3 python3-pip)
full=(clang clang-format clang-tidy libclang-rt-14-dev)
grpcurl_version=v1.8.9 # newer ones need a newer Go than Debian 12's
tool_dir=$PWD/build/tools/bin

wanted=("${build[@]}")
with_grpcurl=false
for argument in "$@"; do
  case $argument in
    --tests)
      wanted+=("${tests[@]}")
      [ -x "$tool_dir/grpcurl" ] || with_grpcurl=true
      ;;
    --full) wanted+=("${full[@]}") ;;
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    *) echo "$0: unknown argument '$argument'; see --help" >&2; exit 2 ;;
  esac
done
if $with_grpcurl && ! command -v go >/dev/null; then wanted+=(golang-go); fi

if ! command -v dpkg-query >/dev/null; then
  echo "$0: this is no Debian system; install the equivalents of: ${wanted[*]}" >&2
  exit 1
fi

missing=()
for package in "${wanted[@]}"; do
  state=$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null || true)
  [ "$state" = 'install ok installed' ] || missing+=("$package")
done

if [ ${#missing[@]} -gt 0 ]; then
  as_root=(env DEBIAN_FRONTEND=noninteractive)
  if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null; then
      echo "$0: not root and no sudo; as root run: apt-get install ${missing[*]}" >&2
      exit 1
    fi
    as_root=(sudo "${as_root[@]}")
  fi
  echo "Installing ${missing[*]}"
  apt=("${as_root[@]}" apt-get -q -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3)
  # The lists may be absent or older than the mirror: fetch them only when something is to install.
  "${apt[@]}" update
  "${apt[@]}" install -y --no-install-recommends "${missing[@]}"
fi

if $with_grpcurl; then
  echo "Building grpcurl $grpcurl_version into build/tools/bin"
  GOBIN=$tool_dir go install "github.com/fullstorydev/grpcurl/cmd/grpcurl@$grpcurl_version"
fi
