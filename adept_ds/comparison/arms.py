"""What a study compares, and the operating points that are chosen for it on validation documents.

An arm is a method with its setting. Each of its operating points is a learning rate with a position of the dial (1: as
training left the weights, 0: the base), evaluated or between two that were. For a bound x the point is chosen that has
the lowest domain loss among those whose every general source is at most x nats above the base; D(x) is its domain loss
on test documents. Both the bound and the order are of validation documents: nothing is chosen by what is reported.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from adept_ds.comparison import wording
from adept_ds.comparison.measurements import Measurements
from adept_ds.comparison.trials import ADAPTED, BASE, Cell, Floats, Source

BOUNDS = (-0.02, 0.0, 0.02, 0.05)
"""x of D(x), in nats per token."""


class Point(NamedTuple):
    """An operating point of an arm."""

    lr: float | None
    """None: the base, which no learning rate leads to."""
    alpha: float
    """Position of the dial."""


AT_BASE = Point(None, BASE)


class Criterion(NamedTuple):
    """By what a point is chosen."""

    bound: float | None
    """x of D(x); None: the lowest domain loss of the trained models, however much is forgotten, and without dial."""

    @property
    def name(self) -> str:
        return "plain" if self.bound is None else f"D({self.bound:g})"


PLAIN = Criterion(None)
CRITERIA = (PLAIN, *map(Criterion, BOUNDS))


@dataclass(frozen=True)
class Arm:
    """A method with its setting, and what its trials measured."""

    label: str
    setting: str
    name: str
    cells: Mapping[tuple[float, int], Cell]
    """By learning rate and seed; not every rate has every seed."""
    measured: Measurements

    @cached_property
    def rates(self) -> list[float]:
        return sorted({lr for lr, _ in self.cells})

    def seeds_of(self, lr: float) -> list[int]:
        return sorted(seed for rate, seed in self.cells if rate == lr)

    @cached_property
    def seeds(self) -> list[int]:
        return sorted({seed for _, seed in self.cells})

    @cached_property
    def search_seeds(self) -> list[int]:
        """Those that every rate has, by which points are compared; all where there is none."""
        return [seed for seed in self.seeds if all(seed in self.seeds_of(lr) for lr in self.rates)] or self.seeds

    def seeds_at(self, point: Point) -> list[int]:
        """Of the trials that have this point; the base is the same for every seed of the arm."""
        return self.seeds if point.lr is None else self.seeds_of(point.lr)

    @cached_property
    def points(self) -> list[Point]:
        """All that every seed of a rate has, the base first."""
        positions = {
            lr: set.intersection(*(set(self.cells[lr, seed].sums) - {BASE} for seed in self.seeds_of(lr)))
            for lr in self.rates
        }
        return [AT_BASE, *(Point(lr, alpha) for lr in self.rates for alpha in sorted(positions[lr]))]

    def is_evaluated(self, point: Point) -> bool:
        """By every seed."""
        lr = point.lr
        return lr is None or all(point.alpha in self.cells[lr, seed].evaluated for seed in self.seeds_of(lr))

    def sums(self, point: Point, seed: int) -> Mapping[Source, Floats]:
        """Sums of token losses by source, [documents]."""
        return self.measured.base if point.lr is None else self.cells[point.lr, seed].sums[point.alpha]

    def loss(self, point: Point, sources: Sequence[Source], seeds: Iterable[int] | None = None) -> float:
        """Of these sources together; mean over these seeds, or over all that have the point."""
        if point == AT_BASE:
            return self.measured.loss(self.measured.base, sources)
        chosen = list(self.seeds_at(point) if seeds is None else seeds)
        return math.fsum(self.measured.loss(self.sums(point, seed), sources) for seed in chosen) / len(chosen)

    def rise(self, point: Point, source: Source, seeds: Iterable[int] | None = None) -> float:
        """Of a source's loss above the base's, in nats; of the base itself exactly 0, which every bound has to hold."""
        return self.loss(point, [source], seeds) - self.measured.loss(self.measured.base, [source])

    def largest_rise(self, point: Point, role: str, seeds: Iterable[int] | None = None) -> tuple[float, Source]:
        """Over the general sources of a role: how much the one rises that rises most."""
        chosen = list(self.seeds_at(point) if seeds is None else seeds)
        return max((self.rise(point, source, chosen), source) for source in self.measured.sources("general", role))

    def search_scores(self, point: Point) -> tuple[float, float]:
        """What points are chosen by: domain loss and largest general rise, on validation documents."""
        seeds = [seed for seed in self.search_seeds if seed in self.seeds_at(point)] or self.seeds_at(point)
        domain = self.loss(point, self.measured.sources("domain", "validation"), seeds)
        return domain, self.largest_rise(point, "validation", seeds)[0]

    def choose(self, criterion: Criterion) -> Point | None:
        """The point for a criterion; None where no point meets it."""
        fitting = [point for point in self.points if self._meets(criterion, point)]
        return min(fitting, key=lambda point: self.search_scores(point)[0], default=None)

    def _meets(self, criterion: Criterion, point: Point) -> bool:
        if criterion.bound is None:
            return point.alpha == ADAPTED
        return self.search_scores(point)[1] <= criterion.bound


def arms_of(measured: Measurements) -> list[Arm]:
    """In the order in which their first trials are given."""
    cells: dict[str, dict[tuple[float, int], Cell]] = {}
    for cell in measured.cells:
        cells.setdefault(cell.trial.arm, {})[cell.trial.lr, cell.trial.seed] = cell
    firsts = {name: next(iter(of.values())).trial for name, of in cells.items()}
    return [Arm(firsts[name].label, firsts[name].setting, name, of, measured) for name, of in cells.items()]


def best_rates(measured: Measurements, names: Collection[str]) -> dict[str, list[float]]:
    """Of each arm by name: the learning rates that one of the criteria of these names chooses, which deserve further
    seeds."""
    criteria = [criterion for criterion in CRITERIA if criterion.name in names]
    chosen = {arm.name: {arm.choose(criterion) for criterion in criteria} for arm in arms_of(measured)}
    return {
        name: sorted({point.lr for point in points if point is not None and point.lr is not None})
        for name, points in chosen.items()
    }


def search_warnings(arm: Arm, chosen: Mapping[Criterion, Point | None]) -> list[str]:
    """Sentences about an arm whose search may have missed its best: nothing says that the grid holds it."""
    found = [
        f"{cell.trial.name}: the loss at dial {alpha:g} is no finite number; this position is left out."
        for cell in arm.cells.values()
        for alpha in cell.lost
    ]
    if not all(seed in arm.seeds_of(lr) for lr in arm.rates for seed in arm.search_seeds):
        found.append(f"{arm.name}: no seed has every learning rate; rates are compared by means over different seeds.")
    if len(arm.rates) == 1:
        only = wording.rate(arm.rates[0])
        return [*found, f"{arm.name}: only one learning rate, {only}, was tried; others may be better."]
    return found + [
        sentence
        for rate, end, towards, factor in (
            (arm.rates[0], "lowest", "downwards", 0.5),
            (arm.rates[-1], "highest", "upwards", 2.0),
        )
        if (sentence := _at_the_edge(arm.name, rate, end, f"{towards}, to {wording.rate(factor * rate)}", chosen))
    ]


def _at_the_edge(arm: str, rate: float, end: str, beyond: str, chosen: Mapping[Criterion, Point | None]) -> str | None:
    criteria = [wording.criterion(of.name) for of, point in chosen.items() if point is not None and point.lr == rate]
    if not criteria:
        return None
    return (
        f"{arm}: the best learning rate, {wording.rate(rate)}, is the {end} of its grid ({', '.join(criteria)}); "
        f"extend the grid {beyond}."
    )
