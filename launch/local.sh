#!/usr/bin/env bash
# Start adept on one host through the deepspeed launcher.
#
#   launch/local.sh NUM_RANKS adept-arguments...
#   launch/local.sh 2 run config.yaml train.lr=1e-4
#
# NUM_RANKS is one per accelerator, or any number on a host that has none.
#
# Ctrl-C, SIGTERM and SIGUSR1 ask the ranks to stop with a checkpoint; a second Ctrl-C or SIGTERM ends them at once.
# The exit code is adept's: 0 done, 2 bad input, 3 stopped on request with a checkpoint.
#
# Environment, all optional:
#   ADEPT_PYTHON          the Python to use (default: the active environment's, else .venv in this checkout)
#   CUDA_VISIBLE_DEVICES  the devices to use, as numbers; the first NUM_RANKS of them
#   DS_ACCELERATOR        default cpu where no accelerator exists, else DeepSpeed's own choice
#   MASTER_PORT           default a free port
#   OMP_NUM_THREADS       default cores / NUM_RANKS
#   TORCH_EXTENSIONS_DIR  each environment builds in a directory of its own below it (default
#                         ${XDG_CACHE_HOME:-~/.cache}/adept_ds/torch_extensions)
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

has_accelerator() {
  local pattern
  [[ "$(uname -s)" == Darwin ]] && return 0
  for pattern in '/dev/nvidia[0-9]*' /dev/nvidiactl /dev/dxg /dev/kfd '/dev/dri/renderD*' '/dev/davinci[0-9]*' \
    '/dev/accel/*' '/dev/hl[0-9]*'; do
    compgen -G "$pattern" >/dev/null && return 0
  done
  return 1
}

# deepspeed ignores CUDA_VISIBLE_DEVICES beside --num_gpus and would take devices that the user did not offer.
choose_devices() {
  local offered=()
  devices=(--num_gpus "$num_ranks")
  read_offered
  if ((${#offered[@]})); then
    ((num_ranks <= ${#offered[@]})) \
      || die "NUM_RANKS=$num_ranks is more than CUDA_VISIBLE_DEVICES='$CUDA_VISIBLE_DEVICES' offers"
    devices=(--include "localhost:$(IFS=,; printf '%s' "${offered[*]:0:num_ranks}")")
  fi
  unset CUDA_VISIBLE_DEVICES
}

# Called by traps.
# shellcheck disable=SC2317,SC2329
on_signal() {
  if ((stop_requests++ == 0)); then
    # Before there are ranks, there is nothing to save.
    signal_ranks "$ADEPT_LAUNCH_ID" "$1" || kill -s TERM -- "-$launcher" 2>/dev/null || true
  elif [[ "$1" == TERM ]]; then
    signal_ranks "$ADEPT_LAUNCH_ID" KILL || kill -s TERM -- "-$launcher" 2>/dev/null || true
  fi
}

if [[ "${1:-}" == --help || "${1:-}" == -h ]]; then
  show_header "$0"
  exit 0
fi
[[ $# -ge 2 ]] || die "usage: launch/local.sh NUM_RANKS adept-arguments... (--help shows an example)"
[[ "$1" =~ ^[1-9][0-9]{0,3}$ ]] \
  || die "NUM_RANKS='$1' is not a positive number, as in: launch/local.sh 2 run config.yaml"
num_ranks="$1"
shift

find_programs
if [[ -z "${DS_ACCELERATOR:-}" ]] && ! has_accelerator; then
  export DS_ACCELERATOR=cpu
fi
choose_devices
port="${MASTER_PORT:-$(free_port "$python")}"
start_launch

# Job control gives the launcher a process group of its own: Ctrl-C then reaches this script only, not a launcher that
# would end the ranks in the middle of a checkpoint. /dev/null as host file: never the cluster in /job/hostfile.
stop_requests=0
launcher=
trap 'on_signal TERM' INT TERM HUP
trap 'on_signal USR1' USR1
set -m
"$deepspeed" --hostfile /dev/null "${devices[@]}" --master_port "$port" --log_level critical --no_local_rank \
  --module adept_ds "$@" </dev/null &
launcher=$!
set +m
((stop_requests == 0)) || kill -s TERM -- "-$launcher" 2>/dev/null || true

code=0
wait_for "$launcher" || code=$?
# deepspeed reports 0 when its own launcher was killed, and nobody is left to end the ranks.
if signal_ranks "$ADEPT_LAUNCH_ID" KILL; then
  printf 'local.sh: the deepspeed launcher ended before its ranks did; ended them\n' >&2
  ((code)) || code=1
fi
exit "$code"
