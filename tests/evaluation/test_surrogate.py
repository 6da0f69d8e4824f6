"""The quadratic model of several copies: exact where functions are of its kind, its minimum that of a fine grid."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from adept_ds.evaluation.surrogate import AxisValues, SeparableQuadratic, axis_places, lowest

Floats = NDArray[np.float64]


def quadratic(seed: int, copies: int) -> SeparableQuadratic:
    noise = np.random.default_rng(seed)
    return SeparableQuadratic(
        noise.random(copies), float(noise.normal()), noise.normal(0, 1, copies), noise.normal(0, 1, copies)
    )


def through_places(of: SeparableQuadratic, centre: list[float], step: float) -> SeparableQuadratic:
    axes = []
    for copy, middle in enumerate(centre):
        places = axis_places(middle, step)
        at = [np.array([*centre[:copy], place, *centre[copy + 1 :]]) for place in places]
        axes.append(AxisValues(places, (of(at[0]), of(at[1]))))
    return SeparableQuadratic.through(centre, of(np.array(centre)), axes)


@pytest.mark.parametrize("centre", [[0.0, 1.0, 0.5], [0.75, 0.1, 0.9]], ids=str)
def test_a_separable_quadratic_is_found_from_three_values_on_each_axis(centre: list[float]) -> None:
    """Everywhere, to the rounding of solving two equations."""
    truth = quadratic(3, 3)
    found = through_places(truth, centre, 0.25)
    for x in np.random.default_rng(0).random((20, 3)):
        assert found(x) == pytest.approx(truth(x), abs=1e-12)


@pytest.mark.parametrize("middle", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_places_on_an_axis_are_two_others_on_the_dial(middle: float) -> None:
    places = axis_places(middle, 0.25)
    assert len({middle, *places}) == 3
    assert all(0 <= place <= 1 for place in places)


def test_the_gradient_is_that_of_differences() -> None:
    of, x, step = quadratic(5, 4), np.array([0.2, 0.7, 0.1, 0.9]), 1e-6
    differences = [(of(x + step * axis) - of(x - step * axis)) / (2 * step) for axis in np.eye(4)]
    assert of.gradient(x) == pytest.approx(differences, abs=1e-8)


def by_brute_force(
    objective: SeparableQuadratic, constraints: list[SeparableQuadratic], bound: float, steps: int
) -> float | None:
    """The lowest value on a grid; a point of it may miss no constraint at all."""
    copies = len(objective.centre)
    values = [
        objective(x)
        for x in map(np.array, itertools.product(np.linspace(0, 1, steps), repeat=copies))
        if all(of(x) <= bound for of in constraints)
    ]
    return min(values, default=None)


@pytest.mark.parametrize("sources", [1, 3])
@pytest.mark.parametrize(("copies", "steps"), [(1, 1001), (2, 101), (3, 31)])
@pytest.mark.parametrize("seed", range(6))
def test_no_point_of_a_fine_grid_that_keeps_the_constraints_is_lower(
    seed: int, copies: int, steps: int, sources: int
) -> None:
    """Curved either way, so that there are several local minima. Slopes are of order 1: a grid's best point is within a
    step of the minimum, and never lower than it."""
    objective = quadratic(seed, copies)
    constraints = [quadratic(100 + 10 * seed + source, copies) for source in range(sources)]
    wanted = by_brute_force(objective, constraints, 0.0, steps)
    found = lowest(objective, constraints, 0.0)
    if wanted is None:
        return  # what is allowed may lie between points of the grid
    assert found is not None
    assert ((found >= 0) & (found <= 1)).all()
    assert all(of(found) <= 1e-8 for of in constraints)
    assert objective(found) <= wanted + 1e-6


def test_where_nothing_keeps_the_constraints_there_is_no_proposal() -> None:
    never = SeparableQuadratic(np.zeros(2), 1.0, np.zeros(2), np.zeros(2))
    assert lowest(quadratic(0, 2), [never], 0.0) is None
