#!/usr/bin/env bash
# Installs what compiles CUDA code, from NVIDIA's PyPI wheels, into build/tools/cuda: for machines
# without a local toolkit. About 100 MB to fetch, 300 MB on disk; needs python3 with pip. Does
# nothing when it is there already. Prints the folder.
# Usage: tools/install_cuda_toolkit.sh
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
case ${1:-} in
  '') ;;
  -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
  *) echo "$0: unknown argument '$1'; see --help" >&2; exit 2 ;;
esac

target=$PWD/build/tools/cuda
stamp=13.0.88-2 # raise the last number when what is installed changes
if [ "$(cat "$target/stamp" 2>/dev/null)" = "$stamp" ]; then
  echo "$target"
  exit 0
fi
if [ "$(uname -sm)" != 'Linux x86_64' ]; then
  echo "$0: the pinned wheels are for Linux x86-64; install a CUDA toolkit and put nvcc in PATH" >&2
  exit 1
fi
if ! python3 -m pip --version >/dev/null 2>&1; then
  echo "$0: python3 has no pip; install python3-pip, or a CUDA toolkit with nvcc in PATH" >&2
  exit 1
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/requirements.txt" <<'REQUIREMENTS'
nvidia-cuda-nvcc==13.0.88 --hash=sha256:56fe502eb77625a12f25172caa3cdddb4e4c8ba2c8c17dba44b164761b380f03
nvidia-nvvm==13.0.88 --hash=sha256:c5f41ffeb6466944a026dfa5317d7d85355c119bbec279205d22f1869d1054e0
nvidia-cuda-crt==13.0.88 --hash=sha256:2c8043c7c9e02492716426e9919fc78d2c5b3b2a7a768a88e952676b08aa55a4
nvidia-cuda-runtime==13.0.96 --hash=sha256:7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548
nvidia-cuda-cccl==13.0.85 --hash=sha256:e0da7ad981f3a8aff08241b5bfc1af868742a63e2762f53a5171c492ef242649
REQUIREMENTS
echo 'Installing the CUDA 13.0 compiler into build/tools/cuda' >&2
python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore \
  --no-deps --only-binary=:all: --require-hashes --target "$work/wheels" \
  -r "$work/requirements.txt" >&2

rm -rf "$target"
mkdir -p "$(dirname "$target")"
mv "$work/wheels/nvidia/cu13" "$target"
# The names that nvcc and CMake look for.
[ -e "$target/lib64" ] || ln -s lib "$target/lib64"
[ -e "$target/lib/libcudart.so" ] || ln -s libcudart.so.13 "$target/lib/libcudart.so"
chmod +x "$target"/bin/* "$target"/nvvm/bin/*
echo "$stamp" >"$target/stamp"
echo "$target"
