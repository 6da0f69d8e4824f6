"""Real runs, watched from outside: what `adept status` says of each end, and that trackers change nothing of them."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from harness.finished_run import Finished
from harness.inprocess import run_here
from harness.launching import ROOT, adept, start
from harness.marks import slow
from harness.trained_run import TrainedRun
from harness.waiting import until
from harness.workspace import Workspace

from adept_ds.base.run_dir import RunDirectory
from adept_ds.report.status import RunStatus, read_status

SMALL: dict[str, Any] = {"expand": {"k": None, "layers": [1]}, "importance": {"initial": "ones"}}


def test_a_run_is_told_as_running_stopped_killed_and_failed_as_it_is(workspace: Workspace, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    train = {"steps": 4000, "checkpoint_every": 5, "eval_every": 0}
    config = workspace.config(run.root, **SMALL, train=train)
    command = ["-m", "adept_ds", "run", str(config)]

    def begun(after: int) -> RunStatus:
        until(lambda: run.metrics.is_file() and read_status(run.root).step > after, timeout=600)
        return read_status(run.root)

    (process,) = start(1, command)
    found = begun(5)
    assert (found.state, found.steps, found.by and found.by.pid) == ("running", 4000, process.pid)
    until(lambda: read_status(run.root).stage == "train")
    until(lambda: [bar.title for bar in read_status(run.root).doing] == ["training"])
    process.send_signal(signal.SIGTERM)
    assert process.wait(600) == 3
    found = read_status(run.root)
    assert found.state == "stopped"
    assert f"stopped after step {found.step} of 4000; checkpoint written" in found.why
    assert found.checkpoint == found.step
    prom = tmp_path / "adept.prom"
    (process,) = start(1, [*command, f"logging.prometheus={prom}"])  # the same run, whoever is told
    begun(found.step)
    until(lambda: prom.is_file() and 'adept_train_up{run="run"} 1.0\n' in prom.read_text())
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = read_status(run.root)
    assert (found.state, found.doing) == ("killed", ())
    assert f"process {process.pid} on " in found.why
    other = workspace.config(run.root, **SMALL, train=train | {"lr": 0.5})
    refused = adept(1, "run", other)
    assert refused.returncode == 2
    found = read_status(run.root)
    assert found.state == "failed"
    assert refused.stderr.strip().removeprefix("adept: ") in found.why


def test_a_finished_run_is_told_as_such_with_all_its_stages(trained_run: TrainedRun) -> None:
    found = json.loads(run_here(["status", str(trained_run.files.root), "--json"], ROOT).out)
    assert (found["state"], found["step"], found["steps"], found["checkpoint"]) == ("finished", 4, 4, 4)
    assert {"probe", "expand", "train", "export", "eval"} <= set(found["done"])
    assert found["held_out"].keys() == {"general", "domain"}


@pytest.mark.parametrize("stops", [slow(False), True])
def test_a_tracked_run_computes_the_same_on_two_ranks_whatever_trackers_do(
    workspace: Workspace, tmp_path: Path, stops: bool
) -> None:
    """One of them cannot be reached; the run is as one without, to the last bit, and its last numbers are told."""
    plain, tracked = tmp_path / "plain", tmp_path / "tracked"
    sections: dict[str, Any] = {**SMALL, "train": {"steps": 4}}
    assert adept(2, "run", workspace.config(plain, **sections)).returncode == 0
    logging: dict[str, str] = {"prometheus": str(tmp_path / "adept.prom")}
    if pytest.importorskip("mlflow", reason="pip install 'adept-ds[tracking]'"):
        logging["mlflow"] = "http://127.0.0.1:9" if stops else str(tmp_path / "mlruns")
    result = adept(2, "run", workspace.config(tracked, **sections, logging=logging))
    assert result.returncode == 0, result.stderr
    assert "logging.mlflow: " in result.stdout or not stops
    first, second = Finished(plain), Finished(tracked)
    assert first.losses() == second.losses()
    assert all((first.weights()[name] == tensor).all() for name, tensor in second.weights().items())
    text = (tmp_path / "adept.prom").read_text()
    assert 'adept_train_step{run="tracked"} 4.0\n' in text or 'adept_train_step{run="tracked"} 4\n' in text
    assert 'adept_train_up{run="tracked"} 0.0\n' in text
