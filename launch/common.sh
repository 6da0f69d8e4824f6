#!/usr/bin/env bash
# What local.sh and multinode.sh share; sourced, not started.
#
# The ranks of one start are found by the environment variable ADEPT_LAUNCH_ID: deepspeed's launcher has no way to
# pass a request on (it ends ranks, and then reports 1), and a process name is not unique on a shared host.

repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# The comment at the top of a script, as its help.
show_header() {
  sed -n '2,/^[^#]/{/^[^#]/q;s/^# \{0,1\}//p}' "$1"
}

die() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 2
}

# Sets `offered`: the numbers in CUDA_VISIBLE_DEVICES; none where it is not set, or nobody looks at it.
read_offered() {
  offered=()
  [[ "${DS_ACCELERATOR:-}" != cpu && -n "${CUDA_VISIBLE_DEVICES+set}" ]] || return 0
  [[ -n "$CUDA_VISIBLE_DEVICES" ]] \
    || die "CUDA_VISIBLE_DEVICES='' hides all devices; unset it, or set DS_ACCELERATOR=cpu"
  [[ "$CUDA_VISIBLE_DEVICES" =~ ^[0-9]+(,[0-9]+)*$ ]] \
    || die "CUDA_VISIBLE_DEVICES='$CUDA_VISIBLE_DEVICES' is not a list of numbers such as 0,1, which deepspeed needs"
  # shellcheck disable=SC2034  # the scripts that source this read it
  IFS=, read -ra offered <<<"$CUDA_VISIBLE_DEVICES"
}

# Sets `python`: the active environment's, else this checkout's .venv, else what PATH has.
find_python() {
  local environment="${VIRTUAL_ENV:-${CONDA_PREFIX:-$repo/.venv}}"
  if [[ -n "${ADEPT_PYTHON:-}" ]]; then
    python="$ADEPT_PYTHON"
  elif [[ -x "$environment/bin/python" ]]; then
    python="$environment/bin/python"
  else
    python="$(command -v python3 || command -v python)" || die "no python found; activate the environment of adept-ds"
  fi
}

# Sets `python`, and the `deepspeed` that goes with it.
find_programs() {
  find_python
  deepspeed="$(dirname "$python")/deepspeed"
  [[ -x "$deepspeed" ]] || deepspeed="$(command -v deepspeed)" \
    || die "no deepspeed next to $python or on PATH; activate the environment of adept-ds or set ADEPT_PYTHON"
}

# Ranks of a surrounding launcher must not reach the launcher that is started here. By ADEPT_LAUNCHER (process, its
# namespace, machine) ranks know this script, and stop with a checkpoint when it is gone, whatever killed it.
start_launch() {
  local namespace machine
  namespace="$(readlink /proc/self/ns/pid 2>/dev/null || true)"
  machine="$(cat /proc/sys/kernel/random/boot_id 2>/dev/null || uname -n)"
  ADEPT_LAUNCHER="$$,${namespace//[!0-9]/},$machine"
  ADEPT_LAUNCH_ID="$(od -An -N8 -tx1 /dev/urandom | tr -d ' \n')"
  export ADEPT_LAUNCHER ADEPT_LAUNCH_ID
  export PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}"
  unset RANK WORLD_SIZE LOCAL_RANK LOCAL_SIZE LOCAL_WORLD_SIZE
}

# Process ids on this host of the ranks of start $1. A rank's own helpers inherit its environment and are left out.
ranks_of() {
  local file pid parent
  { grep -zlx -- "ADEPT_LAUNCH_ID=$1" /proc/[0-9]*/environ 2>/dev/null || true; } | while IFS= read -r file; do
    pid="${file#/proc/}" pid="${pid%/environ}"
    grep -zq '^RANK=' "$file" 2>/dev/null || continue
    parent="$(sed -n 's/^PPid:[[:space:]]*//p' "/proc/$pid/status" 2>/dev/null)" || continue
    grep -zq '^RANK=' "/proc/$parent/environ" 2>/dev/null || printf '%s\n' "$pid"
  done
}

# Sends signal $2 to this host's ranks of start $1; fails if there are none.
signal_ranks() {
  local pids
  mapfile -t pids < <(ranks_of "$1")
  ((${#pids[@]})) && kill -s "$2" -- "${pids[@]}" 2>/dev/null
}

# The exit code of background process $1, however often a trapped signal interrupts the wait.
wait_for() {
  while kill -0 "$1" 2>/dev/null; do wait "$1" || true; done
  wait "$1"
}

# Arguments as every shell takes them.
quoted() {
  local text separator='' quote="'\\''"
  for text in "$@"; do
    printf "%s'%s'" "$separator" "${text//\'/$quote}"
    separator=' '
  done
}

free_port() {
  "$1" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

# One line: that this host has Python $1 and directory $2, where ranks of other hosts find it, and a free port; or why not.
check_host() {
  local address port
  [[ -x "$1" ]] || die "there is no Python at '$1'; install the environment under the same path on every host"
  [[ -d "$2" ]] || die "there is no directory '$2'; every host must see the working directory under the same path"
  # The address at which ssh has come here, unless it came from this very host.
  read -r _ _ address _ <<<"${SSH_CONNECTION:-}"
  if [[ -z "$address" || "$address" == 127.* || "$address" == ::1 ]]; then
    read -r address _ < <(hostname -I 2>/dev/null) || address=127.0.0.1
  fi
  port="$(free_port "$1")" || die "'$1' does not work there; install the environment on every host"
  printf 'ready at %s %s\n' "$address" "$port"
}

# multinode.sh runs this file on every host.
if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
  set -euo pipefail
  case "$#,${1:-}" in
    3,signal_ranks | 3,check_host) "$@" ;;
    *) die "is used by local.sh and multinode.sh; start one of these" ;;
  esac
fi
