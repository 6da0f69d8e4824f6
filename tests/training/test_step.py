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


def test_wsd_is_flat_until_its_last_share_and_then_falls_to_0_in_equal_steps() -> None:
    """From the definition: 10 steps of warmup, 65 flat ones, 25 that decay and would reach 0 after the last."""
    curve = factors(steps=100, warmup_ratio=0.1, schedule="wsd", decay_ratio=0.25)
    warmup, decay = [(step + 1) / 10 for step in range(10)], [1 - step / 25 for step in range(25)]
    assert curve == pytest.approx([*warmup, *[1.0] * 65, *decay])
    assert curve[10:75] == [1.0] * 65, "exactly: a branch repeats the trunk's rates bit for bit"


@pytest.mark.parametrize("decay_ratio", [0.1, 0.2, 0.3, 1 / 3, 0.7, 0.999])
def test_a_run_decayed_from_any_step_has_its_flat_part_end_there(decay_ratio: float) -> None:
    """And it is the shortest such run; 0.1, 0.2 and 0.3 are decimal fractions here, whatever their floats are."""
    for step in range(1, 400):
        steps = TrainSection(schedule="wsd", decay_ratio=decay_ratio).steps_if_decayed_from(step)
        long, short = (
            TrainSection(schedule="wsd", decay_ratio=decay_ratio, steps=n, warmup_steps=0)
            for n in (steps, steps - 1 or 1)
        )
        assert long.flat_until == step
        assert short.flat_until < step or steps == 1


def test_warmup_counted_in_steps_is_the_same_in_runs_of_any_length() -> None:
    short, long = (factors(steps=steps, warmup_steps=7, schedule="wsd") for steps in (20, 200))
    assert short[:16] == long[:16]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
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
