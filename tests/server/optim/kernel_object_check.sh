#!/usr/bin/env bash
# kernel_object_check.sh OBJECT: what block_kernels.cc promises of each of its objects. No fused
# multiply-add, so that every instruction set rounds alike; and no function that the linker could
# share with other code, which would then run instructions that the machine may lack.
set -uo pipefail
object=$1
failures=0

fused=$(objdump -d --no-show-raw-insn "$object" | grep -cE '\bvfn?m(add|sub)')
if [ "$fused" -ne 0 ]; then
  echo "$object: $fused fused multiply-adds; build it with -ffp-contract=off"
  failures=1
fi
# W and V are weak definitions, u unique ones; DW.ref.* are pointers to a personality routine.
shared=$(nm -C --defined-only "$object" | awk '$2 ~ /^[WVu]$/ && $3 !~ /^DW\.ref\./')
if [ -n "$shared" ]; then
  echo "$object: shares with other code:"
  echo "$shared"
  failures=1
fi
# Names of functions that are local are not shown by every objdump: what it does show is code.
vectors=$(objdump -d --no-show-raw-insn "$object" | grep -cE '\b(v?sqrtps|v?divps|vdivpd|divpd)\b')
[ "$vectors" -gt 0 ] || { echo "$object: has no vector loops: look at this check"; failures=1; }
exit "$failures"
