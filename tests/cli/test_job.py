"""`adept job`: what it starts, whom it signals, and when the job goes back into the queue.

Commands of Slurm's are stand-ins that say what they were called with; real ones, in `tests/cluster`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness.launching import ROOT
from harness.waiting import until
from harness.workspace import Workspace

# Ends with CODE; or waits until it is told, and ends with CODE then. Says what it was started with.
SRUN = f"""#!{sys.executable}
import json, os, pathlib, signal, sys, time
said = {{"arguments": sys.argv[1:], "environment": dict(os.environ)}}
code = int(os.environ["CODE"])
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(code))
pathlib.Path("srun.part").write_text(json.dumps(said))
pathlib.Path("srun.part").rename("srun.json")
keeps = os.environ.get("KEEPS")
if keeps:
    pathlib.Path(keeps).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(keeps).write_text("{{}}")
if os.environ.get("WAITS"):
    time.sleep(60)
sys.exit(code)
"""

SCONTROL = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>scontrol_calls
case "$*" in
  "show hostnames "*) printf 'gpu03\\ngpu04\\n' ;;
  "--oneliner show job "*) 
    printf 'JobId=7 JobState=%s Reason=%s Restarts=%s\\n' "${STATE:-RUNNING}" "${REASON:-None}" "${RESTARTS:-0}" ;;
  requeue*) [[ -z "${REFUSES:-}" ]] || { printf 'Requested operation is presently disabled\\n' >&2; exit 1; } ;;
esac
"""


@dataclass(frozen=True)
class Batch:
    """A batch script's process, and its directory."""

    folder: Path

    def start(self, *arguments: str, code: int = 0, **env: str) -> subprocess.Popen[str]:
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "gpu[03-04]", "SLURM_CPUS_PER_TASK": "4"}
        mine = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MASTER_ADDR")}
        environment = mine | slurm | {"PATH": f"{self.folder}/bin:{os.environ['PATH']}", "CODE": str(code)} | env
        environment |= {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "adept_ds", "job", *arguments, "config.yaml", "train.lr=1e-3"]
        return subprocess.Popen(
            command, cwd=self.folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def ends(self, *arguments: str, code: int = 0, **env: str) -> tuple[int, str]:
        """Its code, and what it says."""
        process = self.start(*arguments, code=code, **env)
        out, err = process.communicate(timeout=60)
        return process.returncode, out + err

    def told(self, number: signal.Signals, *arguments: str, code: int = 3, **env: str) -> tuple[int, str]:
        """The same, of one that gets a signal while ranks run."""
        process = self.start(*arguments, code=code, WAITS="1", **env)
        until((self.folder / "srun.json").exists)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        return process.returncode, out + err

    @property
    def requeues(self) -> list[str]:
        calls = self.folder / "scontrol_calls"
        lines = calls.read_text().splitlines() if calls.is_file() else []
        return [line for line in lines if line.startswith("requeue")]


@pytest.fixture
def batch(tmp_path: Path, workspace: Workspace) -> Batch:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)
    workspace.config(tmp_path / "run").rename(tmp_path / "config.yaml")
    return Batch(tmp_path)


def test_ranks_are_started_by_srun_with_what_they_need(batch: Batch) -> None:
    assert batch.ends(RANK="7", WORLD_SIZE="9")[0] == 0
    said = json.loads((batch.folder / "srun.json").read_text())
    assert said["arguments"] == [
        *("--kill-on-bad-exit=0", "--wait=120", "--cpus-per-task=4"),
        *(sys.executable, "-u", "-m", "adept_ds", "run", "config.yaml", "train.lr=1e-3"),
    ]
    environment = said["environment"]
    assert (environment["MASTER_ADDR"], environment["OMP_NUM_THREADS"]) == ("gpu03", "4")
    assert not {"RANK", "WORLD_SIZE"} & environment.keys()


def test_the_users_own_settings_stay(batch: Batch) -> None:
    batch.ends(MASTER_ADDR="10.0.0.1", OMP_NUM_THREADS="2")
    environment = json.loads((batch.folder / "srun.json").read_text())["environment"]
    assert (environment["MASTER_ADDR"], environment["OMP_NUM_THREADS"]) == ("10.0.0.1", "2")


def test_what_one_process_does_is_started_once(batch: Batch) -> None:
    batch.ends("--stage", "report")
    arguments = json.loads((batch.folder / "srun.json").read_text())["arguments"]
    assert {"--nodes=1", "--ntasks=1"} <= set(arguments)
    assert "report" in arguments


def test_a_warning_reaches_the_ranks_and_the_job_goes_back(batch: Batch) -> None:
    code, said = batch.told(signal.SIGUSR1)
    assert (code, batch.requeues) == (3, ["requeue 7"])
    assert "back into the queue, to resume" in said


def test_ranks_that_were_told_directly_go_back_too(batch: Batch) -> None:
    """As at preemption, of which the batch script hears nothing."""
    assert batch.ends(code=3)[0] == 3
    assert batch.requeues == ["requeue 7"]


@pytest.mark.parametrize("code", [128 + signal.SIGUSR1, 128 + signal.SIGTERM])
def test_ranks_that_were_told_before_they_had_met_go_back(code: int, batch: Batch) -> None:
    assert batch.ends(code=code)[0] == code
    assert batch.requeues == ["requeue 7"]


def test_a_batch_script_that_was_told_to_end_stays_ended(batch: Batch) -> None:
    """srun gets USR1 even so: it would answer TERM by killing the ranks."""
    code, said = batch.told(signal.SIGTERM)
    assert (code, batch.requeues) == (3, [])
    assert "told to end: not requeued" in said


def test_a_job_that_was_cancelled_stays_cancelled(batch: Batch) -> None:
    """Its ranks may have ended before its batch script hears of it."""
    code, said = batch.ends(code=3, STATE="COMPLETING")
    assert (code, batch.requeues) == (3, [])
    assert "told to end: not requeued" in said


def test_a_job_whose_time_is_over_goes_back(batch: Batch) -> None:
    """Slurm tells its batch script to end, as it does where somebody cancels it."""
    assert batch.told(signal.SIGTERM, STATE="COMPLETING", REASON="TimeLimit")[0] == 3
    assert batch.requeues == ["requeue 7"]


def test_a_job_that_slurm_puts_back_is_not_put_back_twice(batch: Batch) -> None:
    """Nor is a later start taken for one that goes back."""
    code, said = batch.told(signal.SIGTERM, STATE="COMPLETING", RESTARTS="1")
    assert (code, batch.requeues) == (3, [])
    assert "Slurm puts it back into the queue" in said
    batch.ends(code=3, RESTARTS="1", SLURM_RESTART_COUNT="1")
    assert batch.requeues == ["requeue 7"]


@pytest.mark.parametrize("code", [0, 1, 2, 4, 137])
def test_what_ended_by_itself_is_not_requeued(code: int, batch: Batch) -> None:
    assert batch.ends(code=code)[0] == code
    assert batch.requeues == []


@pytest.mark.parametrize(("code", "goes_back"), [(4, True), (137, True), (0, False), (1, False), (2, False)])
def test_faults_of_the_machine_are_requeued_where_that_is_asked_for(code: int, goes_back: bool, batch: Batch) -> None:
    assert batch.ends("--requeue-faults", code=code)[0] == code
    assert bool(batch.requeues) == goes_back


def test_a_task_of_an_array_is_requeued_by_the_arrays_number(batch: Batch) -> None:
    """The number of an array's last task is that of the whole array: by it all tasks would go back."""
    batch.ends(code=3, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="4")
    assert batch.requeues == ["requeue 7_4"]


def test_a_job_that_keeps_nothing_new_is_given_up(batch: Batch) -> None:
    for count in (1, 2):
        assert f"start {count} of 3 that kept nothing new" in batch.ends(code=3)[1]
    code, said = batch.ends(code=3)
    assert code == 3
    assert "not requeued: 3 starts in a row have kept nothing new" in said
    assert len(batch.requeues) == 2


def test_a_job_that_keeps_something_goes_back_as_often_as_it_needs(batch: Batch) -> None:
    for step in (20, 40, 60, 80):
        checkpoint = batch.folder / "run" / "checkpoints" / f"step_{step}" / "manifest.json"
        assert f"step {step} of training" in batch.ends("--fruitless-starts", "1", code=3, KEEPS=str(checkpoint))[1]
    assert len(batch.requeues) == 4


def test_how_many_starts_may_be_fruitless_can_be_chosen(batch: Batch) -> None:
    assert "its last start has kept nothing new" in batch.ends("--fruitless-starts", "1", code=3)[1]
    assert batch.requeues == []


def test_a_queue_that_refuses_is_said(batch: Batch) -> None:
    code, said = batch.ends(code=3, REFUSES="1")
    assert code == 3
    assert "could not be requeued (Requested operation is presently disabled)" in said


def test_a_mistake_is_said_before_anything_is_started(batch: Batch) -> None:
    def refused(expected: str, *arguments: str, **env: str) -> bool:
        code, said = batch.ends(*arguments, code=0, **env)
        return code == 2 and expected in said and said.count("\n") == 1

    assert refused("--stage: 'trian' is no command", "--stage", "trian")
    assert refused("SLURM_JOB_ID: it is not set", SLURM_JOB_ID="")
    assert refused("srun: it is not on PATH", PATH=str(batch.folder))
    (batch.folder / "config.yaml").unlink()
    assert refused("config.yaml")
    assert not (batch.folder / "srun.json").exists()


def test_the_stages_of_a_configuration_are_listed_in_their_order(tmp_path: Path, workspace: Workspace) -> None:
    from harness.inprocess import run_here

    def stages(**sections: object) -> str:
        return run_here(["job", "--list-stages", str(workspace.config(tmp_path / "run", **sections))], ROOT).out.strip()

    assert stages() == "probe expand train export eval report"
    assert stages(dial={}) == "probe expand train dial eval report"
    assert stages(expand={"k": None, "layers": [1]}) == "expand train export eval report"
    in_place = tmp_path / "full.yaml"
    in_place.write_text("{model: m, run_dir: r, method: full, data: {domain: [d]}}")
    assert run_here(["job", "--list-stages", str(in_place)], ROOT).out.strip() == "train export eval report"
