"""`adept launch --submit` on a real Slurm."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.faults import Run
from harness.slurm_cluster import PROGRAMS, SlurmCluster
from harness.system_packages import need
from harness.workspace import Workspace

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def slurm(pytestconfig: pytest.Config) -> Iterator[SlurmCluster]:
    need(pytestconfig, PROGRAMS)
    with SlurmCluster().running() as cluster:
        yield cluster


@pytest.mark.parametrize("gpus", [0, 2])
def test_a_job_of_adept_launch_has_what_was_asked_for_and_runs(
    gpus: int, slurm: SlurmCluster, workspace: Workspace, tmp_path: Path
) -> None:
    """The GPUs are Slurm's word alone: ranks run on the CPU."""
    run = Run(workspace, tmp_path / "run", 2)
    hosts = ["--gpus-per-node", str(gpus), *([] if gpus else ["--ranks-per-node", "2"])]
    partition = ["--sbatch=--partition=gpu"] if gpus else []
    options = ["--sbatch=--cpus-per-task=1", "--sbatch=--time=00:30:00", *partition, "--submit"]
    command = [sys.executable, "-m", "adept_ds", "launch", *hosts, *options, str(run.config()), "train.steps=4"]
    submitted = slurm.run(*command, directory=tmp_path, env={})
    assert submitted.returncode == 0, submitted.stderr
    job = slurm.job(submitted.stdout.split()[-1], tmp_path)
    assert job.ends() == ("COMPLETED", "0:0"), job.said
    assert (job.says("NumNodes"), job.says("NumTasks"), job.says("TimeLimit")) == ("1", "2", "00:30:00")
    assert run.steps_done == 4, "with the override"
    assert "2 ranks" in job.said
