"""Distance and separability of samples, against what is known of Gaussians and against the definitions written out."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.stats import norm

from adept_ds.probing.overlap import energy_coefficient, separability


def gaussians(count: int, dim: int, apart: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two samples of unit variance whose means differ by `apart` in a random direction."""
    generator = np.random.default_rng(seed)
    direction = generator.normal(size=dim)
    x, y = generator.normal(size=(2, count, dim))
    return x, y + apart * direction / np.linalg.norm(direction)


@pytest.mark.parametrize("apart", [0.0, 1.0, 2.0, 4.0])
def test_accuracy_is_what_the_best_plane_reaches(apart: float) -> None:
    """Between two such Gaussians that is Phi(apart / 2); 1,200 vectors have it to 0.014 (one standard error)."""
    found = separability(*gaussians(600, 8, apart))
    assert found.accuracy == pytest.approx(norm.cdf(apart / 2), abs=0.04)


def test_a_direction_of_little_variance_parts_samples_as_well_as_any() -> None:
    """What is far apart in units of its own spread, but not beside what else varies: no nearest mean would see it."""
    x, y = gaussians(300, 6, 0.0)
    spread = np.geomspace(100, 0.01, 6)
    x, y = x * spread, y * spread
    y[:, -1] += 4 * spread[-1]
    assert separability(x, y).accuracy == pytest.approx(norm.cdf(2), abs=0.04)


def test_more_dimensions_than_vectors_part_nothing_by_themselves() -> None:
    """Fitted to all vectors, a plane would part any two samples here without a mistake."""
    accuracies = [separability(*gaussians(24, 400, 0.0, seed)).accuracy for seed in range(8)]
    assert np.mean(accuracies) == pytest.approx(0.5, abs=0.08)  # 48 vectors, 8 times: one standard error is 0.026
    assert separability(*gaussians(24, 400, 12.0)).accuracy == 1.0


def test_a_small_sample_counts_as_much_as_a_large_one() -> None:
    x, y = gaussians(400, 4, 0.0)
    assert separability(x, y[:20]).accuracy == pytest.approx(0.5, abs=0.15)


def test_scores_are_on_the_side_that_accuracy_counts() -> None:
    found = separability(*gaussians(50, 5, 3.0))
    right = np.mean(np.array(found.x_scores) > 0) + np.mean(np.array(found.y_scores) < 0)
    assert found.accuracy == pytest.approx(right / 2)
    assert (len(found.x_scores), len(found.y_scores)) == (50, 50)


def test_units_of_length_and_the_origin_do_not_matter() -> None:
    x, y = gaussians(60, 10, 2.0)
    moved_x, moved_y = (1e-4 * z + 3.0 for z in (x, y))
    assert separability(moved_x, moved_y).accuracy == separability(x, y).accuracy
    # 3.0 beside differences of 1e-4 leaves twelve digits of them.
    assert energy_coefficient(moved_x, moved_y) == pytest.approx(energy_coefficient(x, y), rel=1e-8)


def test_the_energy_coefficient_is_its_definition() -> None:
    x, y = gaussians(9, 3, 1.5)
    y = y[:7]
    between = cdist(x, y).mean()
    inside = sum(cdist(z, z)[~np.eye(len(z), dtype=bool)].mean() for z in (x, y))
    assert energy_coefficient(x, y) == pytest.approx((2 * between - inside) / (2 * between), rel=1e-12)


def test_of_one_distribution_it_is_zero_on_average_however_few_there_are() -> None:
    found = [energy_coefficient(*gaussians(5, 20, 0.0, seed)) for seed in range(200)]
    assert abs(np.mean(found)) < 3 * np.std(found) / len(found) ** 0.5
    assert min(found) < 0 < max(found)


def test_it_is_one_for_two_points_and_zero_for_one() -> None:
    ones = np.ones((4, 3))
    assert energy_coefficient(ones, 5 * ones) == 1.0
    assert energy_coefficient(ones, ones) == 0.0


def test_vectors_that_are_all_the_same_are_parted_by_chance_at_most() -> None:
    assert separability(np.zeros((6, 3)), np.zeros((6, 3))).accuracy <= 0.5


def test_a_different_spread_is_seen_by_the_distance_and_by_no_plane() -> None:
    """The two answer different questions, which is why there are two."""
    x, y = gaussians(300, 4, 0.0)
    assert energy_coefficient(x, 6 * y) > 0.1
    assert separability(x, 6 * y).accuracy == pytest.approx(0.5, abs=0.08)
