"""What ends training in the middle: a loss that is no number any more."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.launching import adept, launch
from harness.workspace import Workspace

from adept_ds.base.files import read_json_lines
from adept_ds.base.run_dir import RunDirectory, checkpoint_steps

PROGRAM = """
import sys
from adept_ds.cli.app import main
from adept_ds.training import trainer

whole, broken = trainer.accumulate_gradient, float(sys.argv.pop(1))

def planted(engine, data, step, train, ranks, online=None):
    losses = whole(engine, data, step, train, ranks, online)
    if step != 4:
        return losses
    def moved():
        raise AssertionError("the step was taken")
    engine.step = moved
    return (broken, losses[1]) if ranks.is_main is (ranks.world_size == 1) else losses

trainer.accumulate_gradient = planted
main()
"""
"""Step 5 finds a loss that is no number, on the last rank alone."""


@pytest.mark.parametrize(("world_size", "broken"), [(1, "nan"), (2, "inf")])
def test_a_loss_that_is_no_number_ends_the_run_before_weights_change(
    workspace: Workspace, tmp_path: Path, world_size: int, broken: str
) -> None:
    config = workspace.config(tmp_path / "run")
    result = launch(world_size, ["-c", PROGRAM, broken, "run", str(config)])
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"adept: train.lr: with 0.01 the loss of step 5 is {broken}, before any weight changed; ")
    run = RunDirectory(tmp_path / "run")
    assert [record["step"] for record in read_json_lines(run.metrics) if "loss" in record] == [1, 2, 3, 4]
    assert checkpoint_steps(run.checkpoints) == [3]
    assert not [path for path in run.checkpoints.iterdir() if path.name.startswith(".")], "nothing half-written"


def test_the_checkpoint_before_it_is_one_to_go_on_from(workspace: Workspace, tmp_path: Path) -> None:
    """The remedy may be in the texts: nothing is lost. What a killed save left behind is swept away on the way."""
    config = workspace.config(tmp_path / "run")
    assert launch(1, ["-c", PROGRAM, "nan", "run", str(config)]).returncode == 2
    abandoned = RunDirectory(tmp_path / "run").checkpoints / f".step_4.{'0' * 32}.tmp"
    abandoned.mkdir()
    (abandoned / "half").write_text("x")
    again, whole = adept(1, "run", config), adept(1, "run", workspace.config(tmp_path / "whole"))
    assert again.returncode == whole.returncode == 0, again.stderr + whole.stderr
    assert not abandoned.exists()
    records = [read_json_lines(RunDirectory(tmp_path / name).metrics) for name in ("run", "whole")]
    losses = [[record["loss"] for record in lines if "loss" in record] for lines in records]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 7
