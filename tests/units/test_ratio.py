"""What learning rates by the ratio of both importances promise."""

from __future__ import annotations

import math
import random
import statistics
from itertools import pairwise

import numpy as np
import pytest

from adept_ds.units.ratio import ratio_multipliers

LIMITS = [(0.25, 4.0), (0.0, 4.0), (0.25, math.inf), (0.0, math.inf), (0.9, 1.05), (1.0, 4.0), (0.25, 1.0)]


def multipliers(
    general: list[float],
    domain: list[float],
    numel: list[float] | None = None,
    *,
    power: float = 0.5,
    low: float = 0.25,
    high: float = 4.0,
) -> list[float]:
    sizes = np.array(numel or [1.0] * len(general))
    return ratio_multipliers(
        np.array(general, float), np.array(domain, float), sizes, power=power, low=low, high=high
    ).tolist()


def plain(
    general: list[float], domain: list[float], numel: list[float], power: float, low: float, high: float
) -> list[float]:
    """The definition, with the factor of proportion found by halving; of ratios that are neither 0 nor all equal."""
    eps = 0.01 * statistics.median(general)
    ratios = [(d / (g + eps)) ** power for g, d in zip(general, domain, strict=True)]

    def limited(factor: float) -> list[float]:
        return [min(max(factor * ratio, low), high) for ratio in ratios]

    below, above = 0.0, 1e12
    for _ in range(300):
        middle = (below + above) / 2
        mean = math.fsum(n * m for n, m in zip(numel, limited(middle), strict=True)) / math.fsum(numel)
        below, above = (middle, above) if mean < 1 else (below, middle)
    return limited(above)


def draw(seed: int, count: int = 24) -> tuple[list[float], list[float], list[float]]:
    """Importances over three decades each, and sizes over two."""
    chance = random.Random(seed)
    general, domain = ([10 ** chance.uniform(-6, -3) for _ in range(count)] for _ in range(2))
    return general, domain, [float(chance.randint(10, 1000)) for _ in range(count)]


def mean_of(found: list[float], numel: list[float]) -> float:
    return math.fsum(n * m for n, m in zip(numel, found, strict=True)) / math.fsum(numel)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [  # importances for the domain 1, 2, 3, 10, those for general competence alike; by hand, four units sum up to 4
        pytest.param(0.0, math.inf, [0.25, 0.5, 0.75, 2.5], id="a proportion"),
        pytest.param(0.0, 2.0, [1 / 3, 2 / 3, 1.0, 2.0], id="the highest is lowered, the others rise"),
        pytest.param(0.5, 2.0, [0.5, 0.6, 0.9, 2.0], id="one more is raised, the others fall again"),
        pytest.param(1.0, 4.0, [1.0] * 4, id="no room below"),
        pytest.param(0.25, 1.0, [1.0] * 4, id="no room above"),
    ],
)
def test_limits_and_the_mean_both_hold_by_hand(low: float, high: float, expected: list[float]) -> None:
    found = multipliers([5.0] * 4, [1.0, 2.0, 3.0, 10.0], power=1.0, low=low, high=high)
    assert found == pytest.approx(expected, rel=1e-14)  # rounding of a few operations


def test_the_mean_is_one_by_parameter() -> None:
    found = multipliers([1.0, 1.0], [1.0, 3.0], [300.0, 100.0], power=1.0)
    assert found == pytest.approx([2 / 3, 2.0], rel=1e-14)  # 3 * 2/3 + 1 * 2 = 4


@pytest.mark.parametrize(("low", "high"), LIMITS)
@pytest.mark.parametrize("power", [0.25, 0.5, 1.0, 3.0])
def test_multipliers_are_the_definition_and_keep_limits_to_the_bit(low: float, high: float, power: float) -> None:
    """The mean to 1e-12; the halving of the plain one leaves as much."""
    for seed in range(10):
        general, domain, numel = draw(seed)
        found = multipliers(general, domain, numel, power=power, low=low, high=high)
        assert all(low <= multiplier <= high for multiplier in found)
        assert mean_of(found, numel) == pytest.approx(1.0, abs=1e-12)
        assert found == pytest.approx(plain(general, domain, numel, power, low, high), rel=1e-9)


def test_a_unit_with_twice_the_ratio_is_faster_by_the_power() -> None:
    general, domain, _ = draw(0)
    general[1], domain[1] = general[0], 2 * domain[0]
    found = multipliers(general, domain, low=0.0, high=math.inf)
    assert found[1] / found[0] == pytest.approx(2**0.5, rel=1e-12)


def test_a_unit_with_a_larger_ratio_is_never_slower() -> None:
    for seed in range(10):
        general, domain, numel = draw(seed)
        eps = 0.01 * statistics.median(general)
        found = multipliers(general, domain, numel)
        order = sorted(range(len(found)), key=lambda unit: domain[unit] / (general[unit] + eps))
        assert all(found[slower] <= found[faster] for slower, faster in pairwise(order))
        assert found[order[0]] < found[order[-1]]


@pytest.mark.parametrize(("general_scale", "domain_scale"), [(1e-290, 1e300), (1e300, 1e-290), (1e300, 1e300)])
def test_each_side_has_a_scale_of_its_own(general_scale: float, domain_scale: float) -> None:
    """Also those at which a quotient, or a sum, would overflow."""
    general, domain, numel = draw(1)
    scaled = multipliers(
        [value * general_scale for value in general], [value * domain_scale for value in domain], numel, power=3.0
    )
    assert scaled == pytest.approx(multipliers(general, domain, numel, power=3.0), rel=1e-12)


def test_steep_ratios_without_limits_are_finite_numbers() -> None:
    """Ratios to this power are far beyond what a float holds."""
    general, domain, numel = draw(2)
    for low in (0.0, 0.25):
        found = multipliers(general, domain, numel, power=1e6, low=low, high=math.inf)
        assert all(map(math.isfinite, found))
        assert mean_of(found, numel) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("general", [[0.0] * 4, [1.0, 2.0, 3.0, 4.0]])
def test_where_the_domain_needs_nothing_every_multiplier_is_1(general: list[float]) -> None:
    assert multipliers(general, [0.0] * 4) == [1.0] * 4


def test_equal_ratios_change_nothing() -> None:
    assert multipliers([3e-7] * 5, [9e-4] * 5, [1.0, 2.0, 3.0, 4.0, 5.0]) == [1.0] * 5
    assert multipliers([0.0] * 5, [9e-4] * 5) == [1.0] * 5
    assert multipliers([0.0], [0.0]) == multipliers([3.0], [0.1]) == [1.0], "a unit alone"


def test_where_general_competence_needs_nothing_the_domain_decides() -> None:
    found = multipliers([0.0] * 3, [1.0, 4.0, 16.0], low=0.0, high=math.inf)
    assert found == pytest.approx([3 / 7, 6 / 7, 12 / 7], rel=1e-14)  # square roots 1, 2, 4 with mean 1


def test_eps_goes_by_the_importances_above_zero_where_most_are_zero() -> None:
    """General 0, 0, 0, 8, 8: the median of all is 0, of what is above it 8; eps is 0.08. By hand, p = 1."""
    found = multipliers([0.0, 0.0, 0.0, 8.0, 8.0], [1.0] * 5, power=1.0, low=0.0, high=math.inf)
    ratios = [1 / 0.08] * 3 + [1 / 8.08] * 2
    assert found == pytest.approx([5 * ratio / sum(ratios) for ratio in ratios], rel=1e-12)


def test_what_the_domain_does_not_need_has_the_lower_limit() -> None:
    found = multipliers([1.0] * 4, [0.0, 1.0, 1.0, 1.0], power=1.0)
    assert found == pytest.approx([0.25, 1.25, 1.25, 1.25], rel=1e-14)


@pytest.mark.parametrize("low", [0.0, 0.25])
def test_and_is_raised_where_the_mean_could_not_hold_otherwise(low: float) -> None:
    """One unit of ten matters; at 4 it gives 0.4 of the mean, and the nine others share 0.6."""
    found = multipliers([1.0] * 10, [1.0] + [0.0] * 9, low=low)
    assert found == pytest.approx([4.0] + [6 / 9] * 9, rel=1e-14)


def test_the_order_of_the_units_does_not_matter() -> None:
    general, domain, numel = draw(3)
    order = random.Random(0).sample(range(len(numel)), len(numel))
    shuffled = multipliers(*([values[unit] for unit in order] for values in (general, domain, numel)))
    straight = multipliers(general, domain, numel)
    # numpy's exp may round the last elements of a vector, which fill no register, in another way
    assert shuffled == pytest.approx([straight[unit] for unit in order], rel=1e-14)


def test_sixty_thousand_units_have_mean_1_within_their_limits() -> None:
    general, domain, numel = draw(4, count=60_000)
    found = multipliers(general, domain, numel)
    assert mean_of(found, numel) == pytest.approx(1.0, abs=1e-12)
    assert min(found) == 0.25
    assert max(found) == 4.0
