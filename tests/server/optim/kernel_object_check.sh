#!/usr/bin/env bash
# kernel_object_check.sh OBJECT SET: what block_kernels.cc promises of each of its objects. No fused
# multiply-add, so that every instruction set rounds alike; no function that the linker could share
# with other code, which would then run instructions that the machine may lack; and vectors of the
# set's width in every loop of every rule.
set -uo pipefail
object=$1
# Wider than the pairs that a compiler makes of two operations of a loop that is otherwise scalar,
# where the set has wider ones.
case $2 in
  baseline) vector='%xmm' ;;
  *) vector='%[yz]mm' ;;
esac
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
# A rule's loop is missing where it is the same code as another's.
objdump -dC --no-show-raw-insn "$object" | awk -v object="$object" -v vector="$vector" '
  /^[0-9a-f]+ </ {
    loop = match($0, /RuleLoop<[^>]*>/) ? substr($0, RSTART, RLENGTH) : ""
    if (loop != "") operations[loop] += 0
  }
  loop != "" && /\tv?(add|sub|mul|div|sqrt)p[sd]/ && $0 ~ vector { ++operations[loop] }
  END {
    for (loop in operations) {
      ++loops
      if (operations[loop] == 0) { print object ": no vectors in " loop; failed = 1 }
    }
    if (!loops) { print object ": has no RuleLoop: look at this check"; failed = 1 }
    exit failed
  }' || failures=1
exit "$failures"
