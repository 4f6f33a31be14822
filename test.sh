#!/usr/bin/env bash
# Installs what is missing, builds preset release and runs every test.
# Usage: ./test.sh [--full] [NAME...]
#   NAME    regular expressions: only the tests whose name one of them matches
#   --full  also the long suites, a clang build with thread-safety analysis, the format check, short
#           fuzzing, and the tests under AddressSanitizer, UndefinedBehaviorSanitizer and
#           ThreadSanitizer
# The build has the CUDA code, for one architecture (docs/gpu.md): its tests run on a CUDA runtime on
# the host. MODELSTATE_TEST_CUDA=OFF leaves it out, and fetches no compiler for it.
# The last line is `N passed, N failed, N skipped`; exit 0 when nothing failed and something ran.
set -uo pipefail
cd "$(dirname "$(readlink -f "$0")")"

full=false
names=()
for argument in "$@"; do
  case $argument in
    --full) full=true ;;
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    -*) echo "$0: unknown option '$argument'; see --help" >&2; exit 2 ;;
    *) names+=("$argument") ;;
  esac
done

passed=0 failed=0 skipped=0
problems=()

finish() {
  trap - EXIT INT TERM
  if [ $((passed + failed)) -eq 0 ]; then
    problems+=("nothing ran${names[*]:+ (no test matches: ${names[*]})}")
  fi
  [ ${#problems[@]} -eq 0 ] || printf '%s\n' '' 'Failed:' "${problems[@]/#/  }"
  printf '\n%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
  # A code of its own: a bare exit in a trap would end with the status from before it.
  if [ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]; then exit 0; else exit 1; fi
}
trap finish EXIT
trap 'failed=$((failed + 1)); problems+=(interrupted); finish' INT TERM

# check WHAT COMMAND...: a step without tests of its own that counts as one.
check() {
  local what=$1
  shift
  echo "== $what"
  if "$@"; then
    passed=$((passed + 1))
  else
    failed=$((failed + 1))
    problems+=("$what")
    return 1
  fi
}

# must WHAT COMMAND...: a step that everything after it needs.
must() {
  local what=$1
  shift
  echo "== $what"
  "$@" && return
  failed=$((failed + 1))
  problems+=("$what")
  finish
}

build() { # PRESET [OPTION...]
  local preset=$1
  shift
  cmake --preset "$preset" -DMODELSTATE_BUILD_TESTS=ON "$@" >"build/configure-$preset.log" ||
    { cat "build/configure-$preset.log"; return 1; }
  cmake --build "build/$preset" -j "$(nproc)"
}

# run_tests PRESET: runs ctest and adds its results to the counts.
run_tests() {
  local preset=$1 results="build/$1/results.xml" pattern='' arguments=() counts
  [ ${#names[@]} -eq 0 ] || pattern=$(IFS='|'; echo "${names[*]}")
  [ -z "$pattern" ] || arguments+=(-R "$pattern")
  $full || arguments+=(-LE '^long$')
  rm -f "$results"
  ctest --test-dir "build/$preset" -j "$(nproc)" --output-on-failure --no-tests=ignore \
    --output-junit "$PWD/$results" "${arguments[@]}"
  local code=$?
  if [ ! -f "$results" ]; then
    failed=$((failed + 1))
    problems+=("$preset: ctest wrote no results (exit $code)")
    return
  fi
  # Lines are `passed NAME`, `failed NAME`, `skipped NAME`.
  counts=$(awk -f tools/junit_results.awk "$results")
  local p f s
  p=$(grep -c '^passed ' <<<"$counts")
  f=$(grep -c '^failed ' <<<"$counts")
  s=$(grep -c '^skipped ' <<<"$counts")
  # ctest's own verdict counts too: a result that the parser took for success must not hide it.
  if [ "$code" -ne 0 ] && [ "$f" -eq 0 ]; then
    f=1
    problems+=("$preset: ctest exit $code")
  fi
  passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
  while read -r _ name; do problems+=("$preset: $name"); done < <(grep '^failed ' <<<"$counts")
  grep '^skipped ' <<<"$counts"
  return 0
}

check_format() {
  git ls-files -z -- '*.h' '*.cc' '*.cu' '*.cuh' |
    xargs -0 clang-format --dry-run -Werror
}

mkdir -p build
if command -v ccache >/dev/null; then export CMAKE_CXX_COMPILER_LAUNCHER=ccache; fi
# A finding of a sanitizer ends the test.
export ASAN_OPTIONS="detect_leaks=1:detect_stack_use_after_return=1:${ASAN_OPTIONS:-}"
export UBSAN_OPTIONS="halt_on_error=1:print_stacktrace=1:${UBSAN_OPTIONS:-}"
export LSAN_OPTIONS="suppressions=$PWD/tests/lsan.supp:print_suppressions=0:${LSAN_OPTIONS:-}"
export TSAN_OPTIONS="suppressions=$PWD/tests/tsan.supp:halt_on_error=1:second_deadlock_stack=1:${TSAN_OPTIONS:-}"

install_flags=(--tests)
$full && install_flags+=(--full)
must 'install dependencies' tools/install_dependencies.sh "${install_flags[@]}"
cuda=${MODELSTATE_TEST_CUDA:-ON}
[ "$(uname -sm)" = 'Linux x86_64' ] || cuda=OFF
must 'build release' build release "-DMODELSTATE_CUDA=$cuda" -DMODELSTATE_CUDA_ARCHITECTURES=90
$full && export MODELSTATE_FULL=1
echo '== run the tests'
run_tests release

if $full; then
  # The long suites have run once; under sanitizers the short ones do.
  unset MODELSTATE_FULL
  full=false
  check 'clang-format' check_format
  check 'build with clang and thread-safety analysis' build clang
  check 'fuzz each reader for a while' tests/fuzz/run.sh
  for preset in asan tsan; do
    check "build $preset" build "$preset" || continue
    echo "== run the tests under $preset"
    run_tests "$preset"
  done
fi
