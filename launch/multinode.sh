#!/usr/bin/env bash
# Start adept on several hosts through the deepspeed launcher and pdsh.
#
#   launch/multinode.sh HOSTFILE adept-arguments...
#   MASTER_ADDR=10.0.0.1 GLOO_SOCKET_IFNAME=eth0 launch/multinode.sh hostfile run config.yaml
#
# HOSTFILE has a line 'host slots=N' for each host (N ranks there; # starts a comment line). Every host must be
# reachable by ssh without a password and must see this checkout, the Python environment and the working directory
# under the same paths.
#
# Ctrl-C, SIGTERM and SIGUSR1 ask the ranks on all hosts to stop with a checkpoint; a second Ctrl-C or SIGTERM ends
# them at once. The exit code is the largest of the hosts': 0 done, 2 bad input, 3 stopped on request with a checkpoint.
#
# Environment, all optional:
#   ADEPT_PYTHON   the Python to use, on every host (default: the active environment's, else .venv in this checkout)
#   ADEPT_EXPORT   more names of variables that the ranks need, separated by spaces
#   DS_ENV_FILE    file of NAME=value lines for the ranks (default .deepspeed_env, here and in the home directory)
#   MASTER_ADDR    address of the first host (default: the first that `hostname -I` prints there)
#   MASTER_PORT    default a random one between 20000 and 29999
# Variables whose names begin with DS_, GLOO_, HF_, MKL_, NCCL_, OMP_, TOKENIZERS_, TORCH_, TRANSFORMERS_ or TRITON_
# reach the ranks by themselves, except *TOKEN, *KEY, *SECRET and *PASSWORD: those would show in the process list of
# every host.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# Sets `hosts`, by the rules of deepspeed's own reader, which answers a bad line with a traceback.
read_hostfile() {
  local line host number=0
  [[ -f "$1" ]] || die "hostfile '$1' does not exist; write one line 'host slots=N' for each host"
  while IFS= read -r line || [[ -n "$line" ]]; do
    number=$((number + 1))
    [[ "$line" =~ ^[[:space:]]*(#|$) ]] && continue
    [[ "$line" =~ ^[[:space:]]*([^[:space:]]+)[[:space:]]+slots=([1-9][0-9]*)[[:space:]]*(#.*)?$ ]] \
      || die "$1:$number: '$line' is not of the form 'host slots=N'"
    host="${BASH_REMATCH[1]}"
    [[ " ${hosts[*]} " != *" $host "* ]] || die "$1:$number: host '$host' is there twice; give it one line"
    hosts+=("$host")
  done <"$1"
  ((${#hosts[@]})) || die "hostfile '$1' names no host; write one line 'host slots=N' for each host"
}

# pdsh passes on PYTHON*, MLFLOW*, MV2* and UCX* only. The rest goes through a file of NAME=value lines, for which
# deepspeed looks at DS_ENV_FILE; ours holds the user's own file too, and what this shell has set wins over it.
write_env_file() {
  local name file
  for file in "$HOME/$user_env_file" "$user_env_file"; do
    [[ ! -f "$file" ]] || { grep -E '^[[:space:]]*[A-Za-z_][A-Za-z0-9_]*=' "$file" || true; }
  done
  for name in $(compgen -e); do
    case "$name" in
      DS_ENV_FILE | *TOKEN | *KEY | *SECRET | *PASSWORD) ;;
      DS_* | GLOO_* | HF_* | MKL_* | NCCL_* | OMP_* | TOKENIZERS_* | TORCH_* | TRANSFORMERS_* | TRITON_*)
        print_variable "$name"
        ;;
    esac
  done
  for name in ADEPT_LAUNCHER ADEPT_LAUNCH_ID ${ADEPT_EXPORT:-}; do
    [[ "$name" =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || die "ADEPT_EXPORT: '$name' is not the name of a variable"
    print_variable "$name"
  done
}

print_variable() {
  local value="${!1-}"
  [[ "$value" != *[\"\$\`\\%$'\n']* ]] \
    || die "$1='$value' cannot be passed through pdsh; put it into the configuration or a profile of every host"
  printf '%s=%s\n' "$1" "$value"
}

# deepspeed hands arguments to a remote shell unquoted, except that it puts one with a blank into double quotes.
quote_argument() {
  local text="$1"
  if [[ "$text" == *[%$'\n\t']* ]]; then
    die "argument '$text' cannot be passed through pdsh; put it into the configuration file"
  elif [[ "$text" == *' '* ]]; then
    text="${text//\\/\\\\}" text="${text//\$/\\\$}" text="${text//\`/\\\`}"
  else
    text="$(printf '%q' "$text")"
  fi
  printf '%s' "$text"
}

signal_hosts() {
  PDSH_RCMD_TYPE=ssh pdsh -S -w "$(IFS=,; printf '%s' "${hosts[*]}")" \
    "bash $(printf '%q' "$repo/launch/common.sh") signal_ranks $ADEPT_LAUNCH_ID $1" </dev/null
}

# Called by traps.
# shellcheck disable=SC2317,SC2329
on_signal() {
  if ((stop_requests++ == 0)); then
    signal_hosts "$1" || printf 'multinode.sh: not every host had a rank to stop; once more ends the run\n' >&2
  elif [[ "$1" == TERM ]]; then
    signal_hosts KILL || true
    kill -s TERM "$launcher" 2>/dev/null || true
  fi
}

if [[ "${1:-}" == --help || "${1:-}" == -h ]]; then
  show_header "$0"
  exit 0
fi
[[ $# -ge 2 ]] || die "usage: launch/multinode.sh HOSTFILE adept-arguments... (--help shows an example)"
hostfile="$1"
shift
hosts=()
read_hostfile "$hostfile"
command -v pdsh >/dev/null || die "pdsh is not installed; install it, or start with torchrun on every host"
arguments=()
for argument in "$@"; do
  quoted="$(quote_argument "$argument")" || exit 2
  arguments+=("$quoted")
done

find_programs
start_launch
master=(--master_port "${MASTER_PORT:-$((20000 + RANDOM % 10000))}")
[[ -z "${MASTER_ADDR:-}" ]] || master+=(--master_addr "$MASTER_ADDR")

user_env_file="${DS_ENV_FILE:-.deepspeed_env}"
env_file="$(mktemp "${TMPDIR:-/tmp}/adept_ds_env.XXXXXX")"
trap 'rm -f -- "$env_file"' EXIT
write_env_file >"$env_file"

# A process group of its own keeps Ctrl-C from the launcher, which would end the ranks in the middle of a checkpoint.
# --force_multi: with one line in the host file deepspeed would start the ranks here instead of there.
stop_requests=0
launcher=
trap 'on_signal TERM' INT TERM HUP
trap 'on_signal USR1' USR1
set -m
DS_ENV_FILE="$env_file" "$deepspeed" --hostfile "$hostfile" --launcher pdsh --force_multi "${master[@]}" \
  --log_level critical --no_local_rank --module adept_ds "${arguments[@]}" </dev/null &
launcher=$!
# Where this host has no ranks, none sees this script end. Job control keeps the watch apart from what kills the script.
(
  trap - INT TERM HUP USR1 EXIT
  while kill -0 "$$" 2>/dev/null; do sleep 1; done
  rm -f -- "$env_file"
  signal_hosts TERM
) >/dev/null 2>&1 &
watch=$!
set +m

code=0
wait_for "$launcher" || code=$?
kill -s TERM -- "-$watch" 2>/dev/null || true
exit "$code"
