#!/usr/bin/env bash
# Submit a job for each stage of a configuration to Slurm: each begins when the one before has finished.
#
#   launch/slurm_stages.sh [--option=value ...] TEMPLATE CONFIG [key=value ...]
#   launch/slurm_stages.sh --time=08:00:00 launch/slurm.sbatch config.yaml train.lr=1e-4
#
# Options are sbatch's, for every stage, and win over the #SBATCH lines of TEMPLATE.
# TEMPLATE is a batch script that hands its arguments to `adept job`: launch/slurm.sbatch, slurm_cpu.sbatch,
# slurm_nodes.sbatch, or a copy of yours. A job that is stopped goes back into the queue, and those behind it wait for
# its end. When one fails, those behind it are cancelled. Submitted again, stages that have finished are not run again.
#
# Environment, all optional:
#   ADEPT_STAGES    the stages, instead of all that CONFIG has, as in: ADEPT_STAGES='export eval report'
#   ADEPT_OPTIONS_probe, ADEPT_OPTIONS_expand, ...   options of sbatch for one stage, which win over all others, as in:
#                   ADEPT_OPTIONS_train='--nodes=4 --time=24:00:00'
#   ADEPT_PYTHON    the Python that reads CONFIG (default: the active environment's, else that of .venv)
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# One process does these; more would be idle.
export ADEPT_OPTIONS_expand="${ADEPT_OPTIONS_expand---nodes=1 --ntasks-per-node=1}"
export ADEPT_OPTIONS_report="${ADEPT_OPTIONS_report---nodes=1 --ntasks-per-node=1}"

if [[ "${1:-}" == --help || "${1:-}" == -h ]]; then
  show_header "$0"
  exit 0
fi
common=()
while [[ "${1:-}" == --?* ]]; do
  [[ "$1" == *=* ]] || die "option '$1' has no value; write --name=value"
  common+=("$1")
  shift
done
[[ $# -ge 2 ]] || die "usage: launch/slurm_stages.sh TEMPLATE CONFIG [key=value ...] (--help shows an example)"
template="$1"
shift
[[ -f "$template" ]] || die "TEMPLATE '$template' does not exist; give a batch script such as launch/slurm.sbatch"
command -v sbatch >/dev/null || die "sbatch is not installed; submit on a host that has Slurm's commands"

find_python
export PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}"
stages="${ADEPT_STAGES:-}"
[[ -n "$stages" ]] || stages="$("$python" -m adept_ds job --list-stages "$@")"

after=()
for stage in $stages; do
  name="ADEPT_OPTIONS_$stage"
  read -ra options <<<"${!name:-}"
  options=("${common[@]}" "${options[@]}" "${after[@]}")
  job="$(sbatch --parsable --job-name="adept-$stage" "${options[@]}" "$template" --stage "$stage" "$@")"
  job="${job%%;*}"
  printf '%-8s job %s%s\n' "$stage" "$job" "${after:+, after ${after[0]##*:}}"
  after=("--dependency=afterok:$job" --kill-on-invalid-dep=yes)
done
