#!/usr/bin/env bash
# Proves docker/Dockerfile where no container engine runs: carries out its own instructions in Debian
# roots made by debootstrap, one per stage, then starts its entrypoint as its user, runs its health
# check, and stops it with its signal. Knows the instructions that the file uses, and fails on others.
# Usage (as root): tools/prove_dockerfile.sh [--file FILE] [--base ROOT] [--keep]
#   --file FILE  another one, as docker/Dockerfile.cuda
#   --base ROOT  a bare `debootstrap --variant=minbase bookworm` root to copy; made when absent
#   --keep       leave the stages' roots for a look
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
context=$PWD
dockerfile=docker/Dockerfile
base=
keep=false
while [ $# -gt 0 ]; do
  case $1 in
    --base) base=$(readlink -m "$2"); shift ;;
    --file) dockerfile=$2; shift ;;
    --keep) keep=true ;;
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    *) echo "$0: unknown argument '$1'; see --help" >&2; exit 2 ;;
  esac
  shift
done
[ "$(id -u)" -eq 0 ] || { echo "$0: needs root, for chroot" >&2; exit 2; }
command -v jq >/dev/null || { echo "$0: needs jq" >&2; exit 2; }

say() { echo "prove: $*"; }
die() { say "FAILED: $*"; exit 1; }

work=$(mktemp -d)
stages=()  # folders of the roots
server=
clean_up() {
  local code=$? root
  trap - EXIT
  set +e
  [ -z "$server" ] || kill -KILL "$server" 2>/dev/null
  for root in "${stages[@]}"; do umount "$root/proc" "$root/dev" 2>/dev/null; done
  if $keep; then say "roots are under $work"; else rm -rf --one-file-system "$work"; fi
  exit "$code"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

# How this machine reaches its package mirrors, which is no part of a Dockerfile.
host_settings() { # ROOT
  local file
  for file in /etc/resolv.conf /etc/hosts /etc/ssl/certs/ca-certificates.crt; do
    [ -e "$file" ] && install -D -m 644 "$(readlink -f "$file")" "$1$file"
  done
  if grep -q '^ID=debian' /etc/os-release && [ -f /etc/apt/sources.list.d/debian.sources ]; then
    : >"$1/etc/apt/sources.list"
    cp /etc/apt/sources.list.d/debian.sources "$1/etc/apt/sources.list.d/"
    { grep -lE '^(Acquire|APT::Acquire)' /etc/apt/apt.conf.d/* 2>/dev/null || true; } |
      xargs -r cp -t "$1/etc/apt/apt.conf.d/"
  fi
}
proxies=()
while IFS='=' read -r name value; do
  case $name in *_proxy | *_PROXY | SSL_CERT_FILE | CURL_CA_BUNDLE) proxies+=("$name=$value") ;; esac
done < <(env)

# Instructions, one a line: comments dropped, continued lines joined.
instructions=$(awk '
  /^[ \t]*#/ { next }
  /^[ \t]*$/ && text == "" { next }
  { line = $0; sub(/^[ \t]+/, "", line)
    if (sub(/\\$/, "", line)) { text = text line; next }
    print text line; text = "" }' $dockerfile)

# State of the stage at hand.
root= workdir= user= entrypoint= healthcheck= stopsignal= exposed= volumes=()
declare -A root_of env_of

new_stage() { # IMAGE [as NAME]
  case $1 in debian:bookworm | debian:bookworm-slim) ;; *) die "unknown base image $1" ;; esac
  if [ -z "$base" ]; then
    command -v debootstrap >/dev/null || die 'needs debootstrap, or --base ROOT'
    base=$work/base
    local mirror
    mirror=$(awk '/^URIs:/{print $2; exit}' /etc/apt/sources.list.d/debian.sources 2>/dev/null || true)
    say 'debootstrap'
    debootstrap --variant=minbase bookworm "$base" "${mirror:-http://deb.debian.org/debian}" \
      >"$work/debootstrap.log" || { tail "$work/debootstrap.log"; die debootstrap; }
  fi
  [ -x "$base/bin/sh" ] || die "no root at $base"
  root=$work/stage${#stages[@]}
  mkdir "$root"
  stages+=("$root")
  cp -a "$base/." "$root/"
  host_settings "$root"
  mount --bind /dev "$root/dev"
  mount -t proc proc "$root/proc"
  root_of[${#stages[@]}]=$root
  if [ "${2-}" = AS ] || [ "${2-}" = as ]; then root_of[$3]=$root; fi
  workdir=/ user=root entrypoint='' healthcheck='' stopsignal=TERM exposed='' volumes=() env_of=()
}

# inside [--host] COMMAND...: in the stage, as its user, in its folder, with its environment only;
# with --host also the variables that lead to the mirrors.
inside() {
  local variables=(PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin) name
  if [ "$1" = --host ]; then
    shift
    variables+=("${proxies[@]}" DEBIAN_FRONTEND=noninteractive)
  fi
  for name in "${!env_of[@]}"; do variables+=("$name=${env_of[$name]}"); done
  local ids=(--userspec=root:root)
  if [ "$user" != root ]; then ids=(--userspec="$user:$user" --groups=); fi
  # exec where the caller runs this in the background, so that $! is the command itself.
  ${EXEC:+exec} chroot "${ids[@]}" "$root" /usr/bin/env -i "${variables[@]}" \
    /bin/sh -c 'cd "$0" && exec "$@"' "$workdir" "$@"
}

copy() { # [--from=STAGE] SOURCE... DESTINATION
  local from=$context owner=root:root sources=() source destination target
  while [[ ${1-} == --* ]]; do
    case $1 in
      --from=*) from=${root_of[${1#--from=}]-} ; [ -n "$from" ] || die "COPY $1: no such stage" ;;
      --chown=*) owner=${1#--chown=} ;;
      *) die "COPY $1 is not known here" ;;
    esac
    shift
  done
  sources=("${@:1:$#-1}")
  destination=${*: -1}
  [[ $destination == /* ]] || destination=$workdir/$destination
  target=$root$destination
  if [ ${#sources[@]} -gt 1 ] || [[ $destination == */ ]] || [ "${sources[0]}" = . ]; then
    mkdir -p "$target"
  else
    mkdir -p "$(dirname "$target")"
  fi
  for source in "${sources[@]}"; do
    if [ "$from" = "$context" ]; then
      # .dockerignore here holds top-level names only, which tar can leave out.
      local ignored=()
      while read -r line; do
        [[ $line =~ ^[A-Za-z0-9._-]+$ ]] || die ".dockerignore: cannot do '$line'"
        ignored+=(--exclude="./$line")
      done < <(grep -vE '^(#|$)' .dockerignore)
      if [ "$source" = . ]; then
        tar -C "$context" --anchored "${ignored[@]}" -cf - . | tar -C "$target" --no-same-owner -xf -
        continue
      fi
    fi
    cp -a --no-preserve=ownership "$from/${source#/}" "$target"
  done
  [ "$owner" = root:root ] || chroot "$root" chown -R "$owner" "$destination"
}

started=$SECONDS
while IFS= read -r instruction; do
  word=${instruction%% *}
  rest=${instruction#* }
  say "$(cut -c1-110 <<<"$instruction")"
  read -ra words <<<"$rest"
  case $word in
    FROM) new_stage "${words[@]}" ;;
    WORKDIR) workdir=$rest; mkdir -p "$root$rest" ;;
    COPY) copy "${words[@]}" ;;
    ENV) env_of[${rest%%=*}]=${rest#*=} ;;
    USER) user=$rest; chroot "$root" id "$user" >/dev/null || die "no user $user" ;;
    RUN) inside --host /bin/sh -c "$rest" >"$work/run.log" 2>&1 </dev/null ||
      { tail -n 40 "$work/run.log"; die "RUN $rest"; } ;;
    ENTRYPOINT) entrypoint=$rest ;;
    HEALTHCHECK) healthcheck=${rest#*CMD } ;;
    STOPSIGNAL) stopsignal=$rest ;;
    EXPOSE) exposed=$rest ;;
    VOLUME) volumes+=("$rest") ;;
    *) die "the instruction $word is not known here" ;;
  esac
done <<<"$instructions"
say "built in $((SECONDS - started)) s; the last stage has $(du -sxm --exclude=./proc --exclude=./dev "$root" | cut -f1) MiB, \
the bare root $(du -sxm "$base" | cut -f1)"

# What an image is good for.
[ "$user" != root ] || die 'the entrypoint would run as root'
[ -n "$healthcheck" ] || die 'no HEALTHCHECK'
for volume in "${volumes[@]}"; do
  inside test -w "$volume" || die "$user cannot write to $volume"
done
inside test ! -w /usr/local/bin || die "$user can write to /usr/local/bin"
if inside sh -c 'command -v g++ cmake protoc' >/dev/null; then die 'the last stage has build tools'; fi
missing=$(inside sh -c 'ldd /usr/local/bin/*' | grep 'not found' || true)
[ -z "$missing" ] || die "libraries are missing: $missing"

mapfile -t command < <(jq -r '.[]' <<<"$entrypoint")
mapfile -t probe < <(jq -r '.[]' <<<"$healthcheck")
if inside "${probe[@]}" >/dev/null 2>&1; then die 'the health check passes without a server'; fi

say "start as $user: ${command[*]}"
mkfifo "$work/lines"
(EXEC=1 inside "${command[@]}" >"$work/lines" 2>"$work/server.log") &
server=$!
exec {lines}<"$work/lines"
ready=false
while IFS= read -r -t 60 -u "$lines" line; do
  say "server: $line"
  case $line in 'listening on '*":$exposed") ready=true; break ;; esac
done
$ready || { cat "$work/server.log"; die "the server does not listen on port $exposed"; }
[ "$(stat -c %U:%u "/proc/$server" | cut -d: -f2)" != 0 ] || die 'the server runs as root'
say "health check: ${probe[*]}"
inside "${probe[@]}" || die 'the health check failed'
kill -s "${stopsignal#SIG}" "$server"
code=0
wait "$server" || code=$?
server=
[ "$code" -eq 0 ] || { tail "$work/server.log"; die "exit code $code after $stopsignal"; }
if inside "${probe[@]}" >/dev/null 2>&1; then die 'the health check passes after the stop'; fi
say 'ok: built, ran unprivileged, healthy, stopped cleanly'
