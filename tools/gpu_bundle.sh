#!/usr/bin/env bash
# Puts the server, the CUDA tests and benchmarks with all the libraries they need into build/gpu_bundle, and
# that into build/gpu_bundle.tar.gz: for a Linux x86-64 machine with an NVIDIA driver and nothing
# else. There: tar xzf gpu_bundle.tar.gz && gpu_bundle/run_gpu_checks.sh
# Usage: tools/gpu_bundle.sh [BUILD_FOLDER]   (default build/cuda, preset cuda, which it builds)
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
case ${1:-} in
  -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
esac
build=${1:-build/cuda}
bundle=build/gpu_bundle
tests=(device_test cuda_device_test cuda_step_test optimizer_golden_test module_test rpc_gpu_test)
binaries=(modelstate-server modelstate cuda_optimizer_bench gpu_flows_bench step_bench
  step_latency_bench)
programs=("${tests[@]/#/tests/}" "${binaries[@]/#/bin/}")

[ -f "$build/build.ninja" ] || cmake --preset cuda -B "$build" >&2
cmake --build "$build" --target "${tests[@]}" "${binaries[@]}" >&2

rm -rf "$bundle"
# The C library apart: where the machine's own is newer, programs run with that.
mkdir -p "$bundle/bin" "$bundle/lib" "$bundle/libc"
for program in "${programs[@]}"; do
  strip -o "$bundle/bin/${program##*/}" "$build/$program"
  # Lines are `NAME => PATH (ADDRESS)`, and `PATH (ADDRESS)` for the loader.
  ldd "$build/$program" | awk '/=> \//{print $3} /^[ \t]*\/.*ld-linux/{print $1}'
done | sort -u | while read -r library; do
  case ${library##*/} in
    ld-linux* | libc.so* | libm.so* | libdl.so* | libpthread.so* | librt.so*) cp -L "$library" "$bundle/libc/" ;;
    *) cp -L "$library" "$bundle/lib/" ;;
  esac
done
# The driver's library asks for these names of the C library too.
for name in libdl.so.2 libpthread.so.0 librt.so.1; do
  cp -L "$(dirname "$(ldd "$build/${programs[1]}" | awk '/libc\.so/{print $3}')")/$name" "$bundle/libc/"
done
cp tools/run_gpu_checks.sh tools/gpu_tour.sh bench/torch_cuda_optim.py "$bundle/"
mkdir -p "$bundle/tests"
cp -r tests/data "$bundle/tests/"
tar -C build -czf build/gpu_bundle.tar.gz gpu_bundle
du -sh "$bundle" build/gpu_bundle.tar.gz
