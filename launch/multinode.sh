#!/usr/bin/env bash
# Start adept on several hosts through pdsh and, on each of them, the deepspeed launcher.
#
#   launch/multinode.sh HOSTFILE adept-arguments...
#   GLOO_SOCKET_IFNAME=eth0 launch/multinode.sh hostfile run config.yaml
#
# HOSTFILE has a line 'host slots=N' for each host (N ranks there; # starts a comment line). Every host must be
# reachable by ssh without a password and must see this checkout, the Python environment and the working directory
# under the same paths; that is looked at first.
#
# Ctrl-C, SIGTERM and SIGUSR1 ask the ranks on all hosts to stop with a checkpoint; a second Ctrl-C or SIGTERM ends
# them at once. The exit code is the largest of the hosts': 0 done, 2 bad input, 3 stopped on request with a checkpoint.
#
# Environment, all optional:
#   ADEPT_PYTHON            the Python to use, on every host (default: the active environment's, else .venv in this
#                           checkout)
#   ADEPT_EXPORT            more names of variables that the ranks need, separated by spaces
#   CUDA_VISIBLE_DEVICES    the devices to use on every host, as numbers; the first N of them
#   DS_ENV_FILE             file of NAME=value lines for the ranks (default .deepspeed_env, here and in the home
#                           directory)
#   MASTER_ADDR             address of the first host (default: at which ssh reaches it from here)
#   MASTER_PORT             default a free port of the first host
#   OMP_NUM_THREADS         default the cores of a host / the ranks on it
#   PDSH_SSH_ARGS_APPEND    more options of ssh, such as -p 2222
# Variables whose names begin with DS_, GLOO_, HF_, MKL_, NCCL_, OMP_, PYTHON, TOKENIZERS_, TORCH_, TRANSFORMERS_ or
# TRITON_ reach the ranks by themselves, except *TOKEN, *KEY, *SECRET and *PASSWORD: those would show in the process list
# of every host.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# Sets `hosts`, and `world`, which deepspeed's launcher takes: {"host": [0, 1], ...}.
read_hostfile() {
  local line host slots number=0 offered=() devices
  read_offered
  [[ -r "$1" ]] || die "hostfile '$1' does not exist; write one line 'host slots=N' for each host"
  while IFS= read -r line || [[ -n "$line" ]]; do
    number=$((number + 1))
    [[ "$line" =~ ^[[:space:]]*(#|$) ]] && continue
    [[ "$line" =~ ^[[:space:]]*([][A-Za-z0-9_.@:-]+)[[:space:]]+slots=([1-9][0-9]{0,3})[[:space:]]*(#.*)?$ ]] \
      || die "$1:$number: '$line' is not of the form 'host slots=N'"
    host="${BASH_REMATCH[1]}" slots="${BASH_REMATCH[2]}"
    [[ " ${hosts[*]} " != *" $host "* ]] || die "$1:$number: host '$host' is there twice; give it one line"
    hosts+=("$host")
    devices="$(seq -s, 0 $((slots - 1)))"
    if ((${#offered[@]})); then
      ((slots <= ${#offered[@]})) \
        || die "$1:$number: slots=$slots is more than CUDA_VISIBLE_DEVICES='$CUDA_VISIBLE_DEVICES' offers"
      devices="$(IFS=,; printf '%s' "${offered[*]:0:slots}")"
    fi
    world+="${world:+, }\"$host\": [$devices]"
  done <"$1"
  ((${#hosts[@]})) || die "hostfile '$1' names no host; write one line 'host slots=N' for each host"
  world="{$world}"
}

# A text for bash on every host, which knows by NODE_RANK which one it is. ssh must neither ask for a password nor wait
# for ever for a host that is gone; pdsh replaces %n and the like.
on_hosts() {
  local options='-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10 -o ServerAliveCountMax=3'
  PDSH_RCMD_TYPE=ssh PDSH_SSH_ARGS_APPEND="$options ${PDSH_SSH_ARGS_APPEND:-}" \
    pdsh -S -f "${#hosts[@]}" -w "$(IFS=,; printf '%s' "${hosts[*]}")" \
    "exec env NODE_RANK=%n bash -c $(quoted "${1//%/%%}")" </dev/null
}

# deepspeed's launcher would wait for hosts that cannot be reached. Sets `address` and `port`, of the first host.
check_hosts() {
  local answers answer host unready=0
  answers="$(on_hosts "$(quoted bash "$repo/launch/common.sh" check_host "$python" "$PWD")" 2>&1)" || true
  for host in "${hosts[@]}"; do
    answer="$(sed -n "s/^${host##*@}: //p" <<<"$answers" | tail -n 1)"
    if [[ "$answer" =~ ^ready\ at\ ([^ ]*)\ ([0-9]+)$ ]]; then
      [[ "$host" != "${hosts[0]}" ]] || address="${BASH_REMATCH[1]}" port="${BASH_REMATCH[2]}"
    else
      unready=1
      printf 'multinode.sh: %s: %s\n' "$host" "${answer:-pdsh does not reach it}" >&2
    fi
  done
  ((!unready)) || die "nothing was started, because of the hosts above; mend them, or remove them from '$hostfile'"
}

# `export` commands for the ranks: pdsh passes nothing on. First the user's own files, as deepspeed reads them: NAME=value
# lines for a shell. What this shell has set wins over them.
exports() {
  local name file user_file="${DS_ENV_FILE:-.deepspeed_env}"
  for file in "$HOME/$user_file" "$user_file"; do
    [[ ! -f "$file" ]] || { grep -E '^[[:space:]]*[A-Za-z_][A-Za-z0-9_]*=' "$file" || true; } | sed 's/^[[:space:]]*/export /'
  done
  for name in $(compgen -e); do
    case "$name" in
      DS_ENV_FILE | *TOKEN | *KEY | *SECRET | *PASSWORD) ;;
      DS_* | GLOO_* | HF_* | MKL_* | NCCL_* | OMP_* | PYTHON* | TOKENIZERS_* | TORCH_* | TRANSFORMERS_* | TRITON_* | UCX_*)
        printf 'export %s=%s\n' "$name" "$(quoted "${!name}")"
        ;;
    esac
  done
  for name in ADEPT_LAUNCHER ADEPT_LAUNCH_ID ${ADEPT_EXPORT:-}; do
    [[ "$name" =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || die "ADEPT_EXPORT: '$name' is not the name of a variable"
    printf 'export %s=%s\n' "$name" "$(quoted "${!name-}")"
  done
}

# What ranks say on stderr, without what every host says again, and what pdsh says of exit codes.
said_once() {
  trap '' INT TERM HUP USR1
  exec awk '/^pdsh@[^ ]*: [^ ]*: ssh exited with exit code/ { next }
    { words = $0; sub(/^[^ ]*: /, "", words) }
    words ~ /^adept: / && said[words]++ { next }
    { print; fflush() }'
}

signal_hosts() {
  on_hosts "$(quoted bash "$repo/launch/common.sh" signal_ranks "$ADEPT_LAUNCH_ID" "$1")"
}

# Called by traps.
# shellcheck disable=SC2317,SC2329
on_signal() {
  if ((stop_requests++ == 0)); then
    signal_hosts "$1" 2>/dev/null || printf 'multinode.sh: not every host had a rank to stop; once more ends the run\n' >&2
  elif [[ "$1" == TERM ]]; then
    signal_hosts KILL 2>/dev/null || true
    kill -s TERM -- "-$launcher" 2>/dev/null || true
  fi
}

if [[ "${1:-}" == --help || "${1:-}" == -h ]]; then
  show_header "$0"
  exit 0
fi
[[ $# -ge 2 ]] || die "usage: launch/multinode.sh HOSTFILE adept-arguments... (--help shows an example)"
hostfile="$1"
shift
hosts=() world=
read_hostfile "$hostfile"
command -v pdsh >/dev/null || die "pdsh is not installed; install it, or start with torchrun on every host"

find_programs
start_launch
variables="$(exports)"
address='' port=''
check_hosts
ranks="$variables
cd $(quoted "$PWD")
exec $(quoted "$python" -u -m deepspeed.launcher.launch) --world_info=$(base64 -w 0 <<<"$world" | tr +/ -_) \\
  --node_rank=\"\$NODE_RANK\" --master_addr=$(quoted "${MASTER_ADDR:-$address}") --master_port=$(quoted "${MASTER_PORT:-$port}") \\
  --log_level critical --no_local_rank --module adept_ds $(quoted "$@")"

# A process group of its own keeps Ctrl-C from pdsh, which would end the ranks in the middle of a checkpoint.
stop_requests=0
launcher=
trap 'on_signal TERM' INT TERM HUP
trap 'on_signal USR1' USR1
exec {words}> >(said_once >&2)
filter=$!
set -m
on_hosts "$ranks" 2>&"$words" {words}>&- &
launcher=$!
# Where this host has no ranks, none sees this script end. Job control keeps the watch apart from what kills the script.
(
  trap - INT TERM HUP USR1
  while kill -0 "$$" 2>/dev/null; do sleep 1; done
  signal_hosts TERM
) >/dev/null 2>&1 {words}>&- &
watch=$!
set +m
exec {words}>&-

code=0
wait_for "$launcher" || code=$?
kill -s TERM -- "-$watch" 2>/dev/null || true
wait_for "$filter" || true
# ssh's own code: the connection to a host broke.
((code != 255)) || code=4
exit "$code"
