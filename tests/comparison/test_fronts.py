"""Hypervolumes and fronts, against areas that are counted and points that are compared one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from harness.made_up_study import METHODS, make_study

from adept_ds.comparison.arms import arms_of
from adept_ds.comparison.fronts import front, front_hypervolume, hypervolume, on_test
from adept_ds.comparison.measurements import read_measurements


@pytest.mark.parametrize("seed", range(5))
def test_a_hypervolume_is_the_area_that_points_dominate(seed: int) -> None:
    """Counted on a grid of 400 x 400 cells; corners lie on its lines, so that the count is exact."""
    noise = np.random.default_rng(seed)
    corners = noise.integers(-100, 401, (12, 2))
    covered = np.zeros((400, 400), dtype=bool)
    for x, y in corners:
        covered[: max(x, 0), : max(y, 0)] = True
    found = hypervolume([(x / 400, y / 400) for x, y in corners.tolist()])
    assert found == pytest.approx(covered.sum() / 400**2)


def test_the_order_of_points_and_dominated_ones_do_not_matter() -> None:
    corners = [(3.0, 1.0), (1.0, 3.0), (2.0, 2.0)]
    assert hypervolume(corners) == 6.0
    assert hypervolume([*reversed(corners), (1.0, 1.0), (2.0, 2.0)]) == 6.0
    assert hypervolume([]) == 0.0


def test_a_front_has_the_points_that_validation_does_not_dominate(tmp_path: Path) -> None:
    measured = read_measurements(make_study(tmp_path, {"full": METHODS["full"]}))
    (arm,) = arms_of(measured)
    expected = set()
    for point in arm.points:
        domain, rise = arm.search_scores(point)
        others = [arm.search_scores(other) for other in arm.points if other != point]
        if not any(d <= domain and r <= rise and (d, r) != (domain, rise) for d, r in others):
            expected.add(point)
    assert set(front(arm)) == expected
    assert 3 <= len(expected) < len(arm.points)
    base = measured.loss(measured.base, measured.sources("domain", "test"))
    corners = [(base - domain, 0.2 - rise) for domain, rise in (on_test(arm, point) for point in expected)]
    assert front_hypervolume(arm) == pytest.approx(hypervolume(corners))
