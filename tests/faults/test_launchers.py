"""A launcher that is killed takes its ranks with it, and the run goes on."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from harness.faults import CHECKPOINT_EVERY, Fault, Run, Undisturbed, go_on
from harness.launching import ROOT
from harness.waiting import until
from harness.workspace import Workspace

WHEN = {
    "while layers are probed": lambda run: any(run.root.glob("cache/tokens/*")),
    "while it trains": lambda run: run.steps_done >= 1,
    "after a checkpoint": lambda run: (run.files.checkpoints / "step_2").is_dir(),
    "while it exports": lambda run: run.files.export.is_dir(),
}


def descendants(process: int) -> list[psutil.Process]:
    return psutil.Process(process).children(recursive=True)


@pytest.mark.slow
@pytest.mark.parametrize("when", WHEN)
def test_nothing_trains_on_without_its_launcher(
    when: str, workspace: Workspace, tmp_path: Path, on_two_ranks: Undisturbed, fault: Fault
) -> None:
    run = Run(workspace, tmp_path / "run", 2)
    command = ["bash", str(ROOT / "launch" / "local.sh"), "2", "run", str(run.config())]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with (tmp_path / "out").open("w") as out:
        launcher = subprocess.Popen(command, stdout=out, stderr=out, env=environment, cwd=ROOT)
        until(lambda: WHEN[when](run) or launcher.poll() is not None, 300)
        ranks = descendants(launcher.pid) if launcher.poll() is None else []
        launcher.send_signal(signal.SIGKILL)
        launcher.wait()
    fault.injected("the launcher is killed")
    until(lambda: not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks), 60)
    lost = go_on(run, on_two_ranks.results)
    assert lost <= CHECKPOINT_EVERY
    fault.recovered(lost)
