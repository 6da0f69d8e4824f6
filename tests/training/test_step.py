"""One optimizer step: the learning rate that it has, and how far down its gradient goes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from harness.launching import counted
from harness.workspace import Workspace

from adept_ds.config.train_sections import TrainSection
from adept_ds.training.step import lr_factor


def factors(**options: Any) -> list[float]:
    train = TrainSection(**options)
    return [lr_factor(step, train) for step in range(train.steps)]


def test_warmup_rises_in_equal_steps_and_reaches_1() -> None:
    curve = factors(steps=100, warmup_ratio=0.1)
    assert curve[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert curve[10] == 1.0
    assert max(curve) == 1.0


@pytest.mark.parametrize(
    ("schedule", "middle", "last"),
    # Of the 90 steps after warmup the last has 89/90 behind it: cos gives 0.5 * (1 + cos(pi * 89 / 90)) = 3.05e-4.
    [("cosine", 0.5, 3.0459e-4), ("linear", 0.5, 1 / 90), ("constant", 1.0, 1.0)],
)
def test_after_warmup_the_schedule_runs_to_the_end(schedule: str, middle: float, last: float) -> None:
    curve = factors(steps=100, warmup_ratio=0.1, schedule=schedule)
    assert curve[55] == pytest.approx(middle)  # halfway between step 10 and step 100
    assert curve[-1] == pytest.approx(last, rel=1e-4)
    assert all(later <= earlier for earlier, later in pairwise(curve[10:]))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_every_step_of_a_short_run_moves(schedule: str, warmup_ratio: float, steps: int) -> None:
    assert all(0.0 < factor <= 1.0 for factor in factors(steps=steps, warmup_ratio=warmup_ratio, schedule=schedule))


def test_nothing_below_the_lowest_copy_has_a_backward_pass(workspace: Workspace, tmp_path: Path) -> None:
    """What leaves a layer below it needs no gradient, on two ranks under ZeRO-3, with and without recomputation."""
    found = counted(workspace.root, tmp_path / "found.pt", "backward")
    assert found["lowest"] == 2
    for kind in ("plain", "recomputed"):
        assert found[kind] == {layer: layer >= 2 for layer in range(7)}
