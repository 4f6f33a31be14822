#!/usr/bin/env bash
# Checks the tree's structure: who includes whom, where CUDA sources live, how long files are, and
# that no file names a path of somebody's machine. Prints every violation; exit 1 when there is one.
# Usage: check.sh ROOT
set -uo pipefail
export LC_ALL=C
here=$(dirname "$(readlink -f "$0")")
cd "$1" || exit 2

# In a git tree what is committed or about to be, elsewhere every file but the build's.
project_files() {
  if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
    git ls-files --cached --others --exclude-standard
  else
    find . -type f -not -path './build/*' -not -path './.git/*' | sed 's|^\./||'
  fi | while read -r file; do [ -f "$file" ] && printf '%s\n' "$file"; done
}
files=$(project_files | sort -u)
matching() { grep -E "$1" <<<"$files"; }

sources=$(matching '^(common|server|client)/.*\.(h|cc|cu|cuh)$')
if [ -z "$sources" ]; then
  echo "no sources under $1: nothing was checked"
  exit 1
fi

violations=$(
  # shellcheck disable=SC2086 # one word per file
  awk -f "$here/check.awk" "$here/edges.txt" $sources

  matching '\.cuh?$' | grep -vE '^server/(device|optim)/cuda/' |
    sed 's/$/: a .cu file outside server\/device\/cuda and server\/optim\/cuda/'

  # A file with a second thing inside wants to be two.
  while read -r file; do
    case $file in
      tests/*.cc | bench/*.cc) limit=900 ;;
      *.h | *.cuh) limit=300 ;;
      *) limit=650 ;;
    esac
    lines=$(wc -l <"$file")
    [ "$lines" -le "$limit" ] || echo "$file: $lines lines, the limit is $limit"
  done < <(matching '^(common|server|client|tests|bench)/.*\.(h|cc|cu|cuh)$')

  # The brackets keep these patterns from finding themselves.
  text=$(matching '\.(h|cc|cu|cuh|proto|sh|awk|py|cmake|md|json|ya?ml|txt|supp)$|Dockerfile|^\.ci/')
  # shellcheck disable=SC2086
  grep -nE '(^|[^A-Za-z0-9_.])/([w]ork|[f]arm|[h]ome/[a-z]|tmp/[v]env)(/|$|[^A-Za-z0-9_])' $text /dev/null |
    sed 's/$/  <- a path of one machine/'
)
if [ -n "$violations" ]; then
  printf '%s\n' "$violations"
  exit 1
fi
echo "$(wc -l <<<"$sources") sources keep to the layers"
