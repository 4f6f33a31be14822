#!/usr/bin/env bash
# Reads the kernels' PTX for what would change their bits: fused multiply-adds, flushing of
# subnormals, approximate divisions and roots. Then assembles it and prints registers and spills of
# every kernel; a spill fails.
# Usage: ptx_check.sh PTXAS ARCHITECTURE FILE.ptx...   (architecture: 90)
set -uo pipefail
ptxas=$1 architecture=$2
shift 2
failures=0
fail() { echo "FAILED: $*"; failures=$((failures + 1)); }

[ $# -gt 0 ] || fail 'no PTX was given'
kernels=$(cat "$@" | grep -c '^\.visible \.entry\|^\.entry')
# Such arithmetic is written nowhere in the sources, so any of it is the compiler's own doing.
for pattern in 'fma\.' 'mad\.(rn\.)?(ftz\.)?f(32|64)' '\.ftz' '\.approx' 'div\.full' 'mul\.f16' 'add\.f16'; do
  if found=$(grep -nE "^[[:space:]]+(@%?[a-z0-9!]+ )?[a-z].*$pattern|^[[:space:]]+[a-z0-9.]*$pattern" "$@"); then
    fail "$pattern: $(wc -l <<<"$found") times, first: $(head -1 <<<"$found")"
  fi
done
# Else the search above would find nothing because there is nothing.
for needed in 'div\.rn\.f32' 'sqrt\.rn\.f32' 'div\.rn\.f64' 'sqrt\.rn\.f64' 'mul(\.rn)?\.f32' 'add(\.rn)?\.f64' \
  'ld\.global[a-z.]*\.v4\.' 'st\.global[a-z.]*\.v4\.'; do
  grep -qE "$needed" "$@" || fail "there is no $needed"
done
# 39 variants of the rules but AdamW, plain and not, in F32 and F64; norm and accumulate in both.
[ "$kernels" -ge 160 ] || fail "only $kernels kernels"

report=$(for file in "$@"; do "$ptxas" -v -arch="sm_$architecture" "$file" -o /dev/null 2>&1 || echo "error in $file"; done)
grep -E 'error' <<<"$report" && fail 'ptxas'
printf '%9s %6s  %s\n' registers spills kernel
awk '/Compiling entry/ { name = $7; gsub(/[^A-Za-z0-9_]/, "", name) }
     /spill/ { for (i = 2; i <= NF; ++i) if ($i == "spill") spills[name] += $(i - 2) }
     /Used/ { for (i = 2; i <= NF; ++i) if ($i ~ /^registers/) registers[name] = $(i - 1) }
     END { for (name in registers) printf "%9d %6d  %s\n", registers[name], spills[name], name }' <<<"$report" |
  sort -k1,1nr | { if command -v c++filt >/dev/null; then c++filt; else cat; fi; }
spilling=$(grep -c -E ' [1-9][0-9]* bytes spill stores| [1-9][0-9]* bytes spill loads' <<<"$report")
[ "$spilling" -eq 0 ] || fail "$spilling kernels spill registers"
counted=$(grep -c 'bytes spill' <<<"$report")
[ "$counted" -eq "$kernels" ] || fail "$counted of $kernels kernels in the report"
echo "$kernels kernels for sm_$architecture, $failures failures"
[ "$failures" -eq 0 ]
