"""Which of two arms is better, where the evidence says so.

The difference of two arms at one criterion is of their domain losses on test documents, over the seeds that both have.
One is called better only if the interval of the difference excludes 0 and every seed has the sign of the mean; else the
two are not told apart, and no sentence says anything else. Intervals are not widened for the number of comparisons.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from adept_ds.base.records import Record
from adept_ds.base.resampling import Stratum, resampled_losses
from adept_ds.comparison import wording
from adept_ds.comparison.arms import AT_BASE, Arm, Criterion, Point
from adept_ds.comparison.bootstrap import Interval, interval, resampled_mean
from adept_ds.comparison.measurements import Measurements
from adept_ds.comparison.trials import Floats

Choices = Mapping[Criterion, Point | None]
"""Of an arm."""


class Gap(NamedTuple):
    """A difference as one of the two arms sees it; negative is better."""

    value: float
    low: float
    high: float
    num_seeds: int
    told_apart: bool


class Difference(Record):
    """Domain loss on test documents of the first arm less that of the second, in nats, at one criterion's points."""

    criterion: str
    first: str
    second: str
    seeds: list[int]
    """That both have."""
    difference: float
    low: float
    high: float
    by_seed: list[float]
    better: str | None
    """Name of the arm that is better; None: not told apart."""
    sentence: str | None
    """The claim, only where one is better."""

    def seen_from(self, arm: str) -> Gap:
        """Domain loss of this one of the two less that of the other."""
        sign = 1 if arm == self.first else -1
        low, high = sorted((sign * self.low, sign * self.high))
        return Gap(sign * self.difference, low, high, len(self.seeds), self.better is not None)


class TestLosses:
    """Domain losses on test documents, as measured and over all bootstrap samples."""

    __test__ = False

    def __init__(self, measured: Measurements, chosen: Iterable[tuple[Arm, Point]]) -> None:
        """`chosen`: the points that will be asked for; the base is always there."""
        self._sources = measured.sources("domain", "test")
        self._measured = measured
        columns = {self._key(arm, point, seed): arm.sums(point, seed)
                   for arm, point in chosen for seed in arm.seeds_at(point)}  # fmt: skip
        columns = {self._key(None, AT_BASE, 0): measured.base} | columns
        self._column = {key: number for number, key in enumerate(columns)}
        strata = [
            Stratum(measured.documents[source].tokens, np.array([sums[source] for sums in columns.values()]))
            for source in self._sources
        ]
        self._samples = resampled_losses(strata)

    def samples(self, arm: Arm | None, point: Point, seeds: Iterable[int]) -> Floats:
        """[samples, seeds]"""
        return self._samples[:, [self._column[self._key(arm, point, seed)] for seed in seeds]]

    def interval_of_mean(self, arm: Arm, point: Point) -> Interval:
        return interval(resampled_mean(self.samples(arm, point, arm.seeds_at(point))))

    def interval_of_change(self, arm: Arm, point: Point) -> Interval:
        """Of the loss less the base's."""
        seeds = arm.seeds_at(point)
        base = self.samples(None, AT_BASE, seeds)
        return interval(resampled_mean(self.samples(arm, point, seeds) - base))

    def by_seed(self, arm: Arm, point: Point, seeds: Iterable[int]) -> list[float]:
        """As measured."""
        return [self._measured.loss(arm.sums(point, seed), self._sources) for seed in seeds]

    @staticmethod
    def _key(arm: Arm | None, point: Point, seed: int) -> tuple[str, Point, int]:
        return ("", AT_BASE, 0) if arm is None or point == AT_BASE else (arm.name, point, seed)


def difference(
    losses: TestLosses, criterion: Criterion, first: tuple[Arm, Point], second: tuple[Arm, Point]
) -> Difference | None:
    """Of two arms, each at its point; None where no seed is common to both."""
    (one, at_one), (two, at_two) = first, second
    seeds = _common_seeds(first, second)
    if not seeds:
        return None
    pairs = zip(losses.by_seed(one, at_one, seeds), losses.by_seed(two, at_two, seeds), strict=True)
    by_seed = [mine - theirs for mine, theirs in pairs]
    low, high = interval(resampled_mean(losses.samples(one, at_one, seeds) - losses.samples(two, at_two, seeds)))
    winner, loser = {-1: (first, second), 0: (None, None), 1: (second, first)}[agreed_sign(by_seed, low, high)]
    return Difference(
        criterion=criterion.name,
        first=one.name,
        second=two.name,
        seeds=seeds,
        difference=float(np.mean(by_seed)),
        low=low,
        high=high,
        by_seed=by_seed,
        better=winner and winner[0].name,
        sentence=winner and loser and _claim(winner, loser, (by_seed, low, high), criterion),
    )


def agreed_sign(by_seed: list[float], low: float, high: float) -> int:
    """-1 or 1 where an interval excludes 0 and all seeds lie on the same side; else 0."""
    if high < 0 and all(value < 0 for value in by_seed):
        return -1
    return int(low > 0 and all(value > 0 for value in by_seed))


def condition(criterion: Criterion) -> str:
    """What holds at the points of a criterion, as the end of a sentence."""
    x = criterion.bound
    if x is None:
        return "each at its best learning rate, whatever it forgets"
    if x == 0:
        return "with no general source above the base"
    amount = f"most {x:g} nats above" if x > 0 else f"least {-x:g} nats below"
    return f"with every general source at {amount} the base"


def excess_on_test(arm: Arm, point: Point, criterion: Criterion) -> tuple[float, str] | None:
    """By how many nats a test source's general loss is beyond the bound that validation documents held, and which;
    None where the bound holds, or there is none."""
    if criterion.bound is None:
        return None
    rise, source = arm.largest_rise(point, "test")
    return (rise - criterion.bound, source.name) if rise > criterion.bound else None


def _common_seeds(first: tuple[Arm, Point], second: tuple[Arm, Point]) -> list[int]:
    """The base has no seeds of its own: it has those of whatever it is compared with."""
    (one, at_one), (two, at_two) = first, second
    mine, theirs = set(one.seeds_at(at_one)), set(two.seeds_at(at_two))
    if AT_BASE in (at_one, at_two):
        return sorted(theirs if at_one == AT_BASE else mine)
    return sorted(mine & theirs)


def _claim(
    better: tuple[Arm, Point],
    worse: tuple[Arm, Point],
    found: tuple[list[float], float, float],
    criterion: Criterion,
) -> str:
    by_seed, *ends = found
    low, high = sorted(map(abs, ends))
    excess = excess_on_test(*better, criterion)
    beyond = excess and f" On test documents it is {wording.excess(excess[0])} nats beyond that bound ({excess[1]})."
    return (
        f"{better[0].name} reaches a domain loss {abs(float(np.mean(by_seed))):.3f} nats lower than {worse[0].name} "
        f"(95% {low:.3f} to {high:.3f}; {wording.seeds(len(by_seed))}), {condition(criterion)}.{beyond or ''}"
    )
