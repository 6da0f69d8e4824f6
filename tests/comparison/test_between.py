"""Losses between positions of the dial: those of a smooth curve through what was evaluated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from harness.made_up_study import FOUR, write_small

from adept_ds.comparison.arms import PLAIN, Criterion, Point, arms_of
from adept_ds.comparison.between import STEP, filled, misses
from adept_ds.comparison.measurements import read_measurements

EVALUATED = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)


def cubic(alpha: float) -> np.ndarray:
    """Of two documents."""
    return np.array([3 - 2 * alpha + alpha**2 + 0.5 * alpha**3, 5 - alpha**3])


def test_a_cubic_is_met_exactly_at_every_step_of_the_dial() -> None:
    found = filled({alpha: {"a": cubic(alpha)} for alpha in EVALUATED})
    assert list(found) == pytest.approx([STEP * number for number in range(101)])
    for alpha, of in found.items():
        assert of["a"] == pytest.approx(cubic(alpha), rel=1e-12)


def test_what_was_evaluated_stays_as_it_was() -> None:
    """Also beside the steps, and whatever it is."""
    noise = np.random.default_rng(0)
    given = {alpha: {"a": noise.normal(size=3)} for alpha in (0.0, 0.3, 0.512, 1.0)}
    found = filled(given)
    assert 0.512 in found
    assert all(np.array_equal(found[alpha]["a"], of["a"]) for alpha, of in given.items())


@pytest.mark.parametrize("positions", [(0.0, 1.0), (0.0, 0.5, 1.0)])
def test_of_too_few_positions_no_curve_is_made_up(positions: tuple[float, ...]) -> None:
    given = {alpha: {"a": cubic(alpha)} for alpha in positions}
    assert list(filled(given)) == list(positions)
    assert misses(given, {"a": 10}) == []


def test_nothing_is_said_of_positions_beyond_those_that_were_evaluated() -> None:
    """The trained weights may be lost."""
    assert max(filled({alpha: {"a": cubic(alpha)} for alpha in EVALUATED[:-1]})) == 0.75


def test_a_miss_is_that_of_the_mean_loss_of_a_source_without_the_position() -> None:
    """A fourth power through 0, 0.5, 0.75 and 1 is missed at 0.25 by the product of the distances."""
    given = {alpha: {"a": np.array([alpha**4, 0.0])} for alpha in (0.0, 0.25, 0.5, 0.75, 1.0)}
    first, *_ = misses(given, {"a": 10})
    assert first == pytest.approx(0.25 * 0.25 * 0.5 * 0.75 / 10)
    assert misses({alpha: {"a": cubic(alpha)} for alpha in EVALUATED}, {"a": 10}) == pytest.approx([0] * 4, abs=1e-12)


def test_a_bound_is_met_between_two_positions(tmp_path: Path) -> None:
    """A general loss that rises above the base's at 0.62: the point chosen is the last step before it, and trained
    weights are compared as they are."""
    tokens = {source: [10, 30] for source in FOUR}

    def losses(alpha: float) -> dict[str, list[float]]:
        rise, gain = alpha * (alpha - 0.62), -alpha
        return {source: [2 + (rise if source.startswith("general") else gain)] * 2 for source in FOUR}

    models = {"base": 0.0, "alpha=0.25": 0.25, "alpha=0.5": 0.5, "alpha=0.75": 0.75, "adapted": 1.0}
    trial = write_small(tmp_path, "full", 1e-4, 0, {model: losses(alpha) for model, alpha in models.items()}, tokens)
    (arm,) = arms_of(read_measurements([trial]))
    assert arm.choose(Criterion(0.0)) == Point(1e-4, 0.62)
    assert arm.choose(PLAIN) == Point(1e-4, 1.0)
    assert not arm.is_evaluated(Point(1e-4, 0.62)) and arm.is_evaluated(Point(1e-4, 0.5))
