"""What ends training in the middle: a loss that is no number any more."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.launching import adept, launch, start
from harness.workspace import Workspace

from adept_ds.base.files import read_json_lines
from adept_ds.base.run_dir import RunDirectory, checkpoint_steps

PROGRAM = """
import sys
import deepspeed, torch
from adept_ds.base.errors import InputError
from adept_ds.cli.app import main
from adept_ds.training import trainer
from harness.lab import whole_master_weights

whole_step, whole_gradient = trainer.Trainer._train_step, trainer.accumulate_gradient
place, broken = sys.argv.pop(1), float(sys.argv.pop(1))

def state(training):
    weights = {name: weight.tolist() for name, weight in whole_master_weights(training.engine).items()}
    folder = training.run_dir.checkpoints
    return repr(weights), {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

def watched(training, step):
    if step != 4:
        return whole_step(training, step)
    if place == "weight":
        trained = next(p for p in training.engine.module.parameters() if p.requires_grad)
        with deepspeed.zero.GatheredParameters([trained], modifier_rank=0):
            trained.data.flatten()[:1] = broken
    before = state(training)
    try:
        return whole_step(training, step)
    except InputError:
        weights, files = state(training)
        assert weights == before[0], "a weight moved"
        assert files == before[1], "a checkpoint was touched"
        raise

taken = 0

def planted(engine, data, entries, train, ranks, online=None, further=()):
    global taken
    losses, taken = whole_gradient(engine, data, entries, train, ranks, online, further), taken + 1
    is_last = ranks.rank == ranks.world_size - 1
    return (broken, losses[1]) if taken == 5 and place == "loss" and is_last else losses

trainer.Trainer._train_step, trainer.accumulate_gradient = watched, planted
main()
"""
"""Step 5 finds a loss that is no number: on the last rank alone, or on all of them because of a trained weight."""


@pytest.mark.parametrize(
    ("world_size", "place", "broken"), [(1, "loss", "nan"), (2, "loss", "inf"), (2, "weight", "nan")]
)
def test_a_loss_that_is_no_number_ends_the_run_before_weights_change(
    workspace: Workspace, tmp_path: Path, world_size: int, place: str, broken: str
) -> None:
    """On every rank, and rank 0 says why. PROGRAM itself compares weights and checkpoints before and after."""
    config = workspace.config(tmp_path / "run")
    processes = start(world_size, ["-c", PROGRAM, place, broken, "run", str(config)])
    try:
        said = [process.communicate(timeout=180)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [2] * world_size, said
    (line,) = said[0].splitlines()
    assert line.startswith(f"adept: train.lr: with 0.01 the loss of step 5 is {broken}, before any weight changed; ")
    assert not any(said[1:])
    run = RunDirectory(tmp_path / "run")
    assert [record["step"] for record in read_json_lines(run.metrics) if "loss" in record] == [1, 2, 3, 4]
    assert checkpoint_steps(run.checkpoints) == [3]
    assert not [path for path in run.checkpoints.iterdir() if path.name.startswith(".")], "nothing half-written"


def test_the_checkpoint_before_it_is_one_to_go_on_from(workspace: Workspace, tmp_path: Path) -> None:
    """The remedy may be in the texts: nothing is lost. What a killed save left behind is swept away on the way."""
    config = workspace.config(tmp_path / "run")
    assert launch(1, ["-c", PROGRAM, "loss", "nan", "run", str(config)]).returncode == 2
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
