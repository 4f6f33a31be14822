#!/usr/bin/env bash
# linked_kernel_check.sh PROGRAM: what kernel_object_check.sh asks of objects, of the program that
# they are linked into: no fused multiply-add, which linking with -flto or a library could bring in
# again; and the AVX-512 kernels are there.
set -uo pipefail
program=$1

objdump -d --no-show-raw-insn "$program" | awk -v program="$program" '
  /^[0-9a-f]+ </ { where = $0 }
  /\tvfn?m(add|sub)/ { if (fused++ == 0) first = where }
  /%zmm/ { ++wide }
  END {
    if (fused) print program ": " fused " fused multiply-adds, the first in " first
    if (!wide) print program ": uses no 512-bit register: are the x86-64-v4 kernels in it?"
    exit fused || !wide
  }'
