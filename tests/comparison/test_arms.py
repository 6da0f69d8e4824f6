"""What is chosen: by validation documents, within bounds, by the seeds that searched; and when that is doubtful."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import pytest
from harness.made_up_study import FOUR, write_small

from adept_ds.comparison.arms import (
    AT_BASE,
    BOUNDS,
    CRITERIA,
    PLAIN,
    Arm,
    Criterion,
    Point,
    arms_of,
    best_rates,
    search_warnings,
)
from adept_ds.comparison.measurements import read_measurements
from adept_ds.comparison.trials import Trial
from adept_ds.study.schema import CriterionName

ONE_TOKEN = dict.fromkeys(FOUR, (1,))
Losses = Mapping[str, float]


def trial(folder: Path, lr: float, seed: int, models: Mapping[str, Sequence[float]], label: str = "m") -> Trial:
    """Losses by model, each in the order of `FOUR`: general validation and test, domain validation and test."""
    losses = {model: {source: [value] for source, value in zip(FOUR, of, strict=True)} for model, of in models.items()}
    return write_small(folder, label, lr, seed, {"base": {source: [3.0] for source in FOUR}} | losses, ONE_TOKEN)


def arm_of(trials: Sequence[Trial]) -> Arm:
    (arm,) = arms_of(read_measurements(trials))
    return arm


def chosen_by_loops(points: Mapping[Point, Sequence[Sequence[float]]], bound: float) -> Point | None:
    """`points`: for each seed the four losses."""
    best, lowest = None, math.inf
    for point, seeds in points.items():
        general = sum(of[0] for of in seeds) / len(seeds)
        domain = sum(of[2] for of in seeds) / len(seeds)
        if general - 3.0 <= bound and domain < lowest:
            best, lowest = point, domain
    return best


@pytest.mark.parametrize("seed", range(4))
def test_d_of_x_is_that_of_plain_loops(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    points: dict[Point, list[list[float]]] = {AT_BASE: [[3.0] * 4]}
    trials = []
    for lr, run in itertools.product((1e-4, 2e-4, 4e-4), (0, 1)):
        models = {model: [3 + draw.uniform(-0.05, 0.1) for _ in FOUR] for model in ("alpha=0.5", "adapted")}
        trials.append(trial(tmp_path, lr, run, models))
        for alpha, model in ((0.5, "alpha=0.5"), (1.0, "adapted")):
            points.setdefault(Point(lr, alpha), []).append(models[model])
    arm = arm_of(trials)
    for bound in (*BOUNDS, -0.06, 0.2):
        found = arm.choose(Criterion(bound))
        assert found == chosen_by_loops(points, bound)
        if found is not None:
            expected = sum(of[3] for of in points[found]) / len(points[found])
            assert arm.loss(found, arm.measured.sources("domain", "test")) == pytest.approx(expected)


def test_test_documents_choose_nothing(tmp_path: Path) -> None:
    """The rate and the dial that test documents would choose are others."""
    trials = [
        trial(tmp_path, 1e-4, 0, {"adapted": (3.0, 9.0, 2.0, 2.9)}),
        trial(tmp_path, 2e-4, 0, {"adapted": (3.0, 2.0, 2.1, 1.0)}),
    ]
    arm = arm_of(trials)
    assert [arm.choose(criterion) for criterion in (PLAIN, Criterion(0.0))] == [Point(1e-4, 1.0)] * 2


def test_every_general_source_has_to_keep_the_bound(tmp_path: Path) -> None:
    """A rise of one is not made good by a fall of another."""
    sources = ("general/validation/a", "general/validation/b", *FOUR[1:])
    tokens = dict.fromkeys(sources, (1,))
    losses = {"base": {source: [3.0] for source in sources}, "adapted": {source: [2.0] for source in sources}}
    losses["adapted"]["general/validation/b"] = [3.03]
    arm = arm_of([write_small(tmp_path, "m", 1e-4, 0, losses, tokens)])
    chosen = {bound: arm.choose(Criterion(bound)) for bound in BOUNDS}
    assert chosen == {-0.02: None, 0.0: AT_BASE, 0.02: AT_BASE, 0.05: Point(1e-4, 1.0)}


def test_the_base_holds_its_own_loss_exactly_whatever_rounding_does(tmp_path: Path) -> None:
    """Means over seeds of numbers that are no binary fractions must not lift it above itself."""
    tokens = dict.fromkeys(FOUR, (7, 11, 13))
    base = {source: [3.1, 2.7, 1.3] for source in FOUR}
    worse = {source: [9.1, 9.7, 9.3] for source in FOUR}
    trials = [write_small(tmp_path, "m", 1e-4, seed, {"base": base, "adapted": worse}, tokens) for seed in range(3)]
    arm = arm_of(trials)
    assert arm.choose(Criterion(0.0)) == AT_BASE
    assert arm.largest_rise(AT_BASE, "test")[0] == 0


def test_seeds_that_tried_one_rate_only_choose_nothing(tmp_path: Path) -> None:
    """Seed 0 searched; seed 1 exists at its best rate, and counts in what is reported alone."""
    trials = [
        trial(tmp_path, 1e-4, 0, {"adapted": (3.0, 3.0, 2.4, 2.4)}),
        trial(tmp_path, 2e-4, 0, {"adapted": (3.0, 3.0, 2.3, 2.3)}),
        trial(tmp_path, 2e-4, 1, {"adapted": (3.0, 3.0, 2.9, 2.9)}),
        trial(tmp_path, 4e-4, 0, {"adapted": (3.0, 3.0, 2.5, 2.5)}),
    ]
    arm = arm_of(trials)
    assert (arm.search_seeds, arm.seeds) == ([0], [0, 1])
    assert arm.choose(PLAIN) == Point(2e-4, 1.0)
    assert arm.loss(Point(2e-4, 1.0), arm.measured.sources("domain", "test")) == pytest.approx(2.6)
    assert best_rates(arm.measured, [PLAIN.name]) == {"m": [2e-4]}


def test_rates_deserve_further_seeds_by_the_criteria_that_are_named(tmp_path: Path) -> None:
    trials = [
        trial(tmp_path, 1e-4, 0, {"adapted": (2.99, 2.99, 2.6, 2.6)}),
        trial(tmp_path, 2e-4, 0, {"adapted": (3.03, 3.03, 2.4, 2.4)}),
        trial(tmp_path, 4e-4, 0, {"adapted": (3.3, 3.3, 2.2, 2.2)}),
    ]
    measured = arm_of(trials).measured
    for names, rates in {
        ("plain",): [4e-4],
        ("D(0)",): [1e-4],
        ("D(0.05)", "D(0)"): [1e-4, 2e-4],
        get_args(CriterionName): [1e-4, 2e-4, 4e-4],
    }.items():
        assert best_rates(measured, names) == {"m": rates}
    assert get_args(CriterionName) == tuple(criterion.name for criterion in CRITERIA)


@pytest.mark.parametrize(
    ("best", "words"),
    [
        (1e-4, "1e-4, is the lowest of its grid (as trained); extend the grid downwards, to 5e-5."),
        (4e-4, "4e-4, is the highest of its grid (as trained); extend the grid upwards, to 8e-4."),
        (2e-4, None),
    ],
)
def test_a_best_rate_at_the_edge_of_its_grid_is_told(tmp_path: Path, best: float, words: str | None) -> None:
    rates = (1e-4, 2e-4, 4e-4)
    trials = [trial(tmp_path, lr, 0, {"adapted": (9.0, 9.0, 2.5 - (lr == best), 2.5)}) for lr in rates]
    arm = arm_of(trials)
    choices = {criterion: arm.choose(criterion) for criterion in CRITERIA}
    assert search_warnings(arm, choices) == ([f"m: the best learning rate, {words}"] if words else [])


def test_a_grid_of_one_rate_and_positions_without_numbers_are_told(tmp_path: Path) -> None:
    nan = float("nan")
    arm = arm_of([trial(tmp_path, 1e-4, 0, {"alpha=0.5": (3.0, 3.0, 2.0, 2.0), "adapted": (nan, 3.0, 2.0, 2.0)})])
    assert arm.points == [AT_BASE, Point(1e-4, 0.5)]
    assert arm.choose(PLAIN) is None
    lost, only = search_warnings(arm, {})
    assert "m, learning rate 1e-4, seed 0: the loss at dial 1 is no finite number" in lost
    assert "only one learning rate, 1e-4, was tried" in only
