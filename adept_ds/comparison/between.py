"""Losses at positions of the dial that were not evaluated.

The dial is continuous, and a bound on forgetting is met between two of the few positions that a study evaluates: on
these alone, methods would differ by where their positions happen to lie. Weights move on a straight line with the dial
and losses on a smooth curve: between positions, each document's loss is that of the cubic spline through all of them,
the base and the trained weights included. What that misses is measured (`misses`) and stands beside the figures.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline

STEP = 0.01
"""Of the dial, between two positions."""

_FEWEST = 4
"""Positions through which a cubic goes in one way only."""

S = TypeVar("S", bound=Hashable)
Sums = Mapping[float, Mapping[S, NDArray[np.float64]]]
"""Position of the dial -> source -> sum of each document's token losses in nats, [documents]."""


def filled(sums: Sums[S]) -> Sums[S]:
    """With positions every `STEP` from the lowest to the highest one that was evaluated, in order; with too few of
    these, no more than they are."""
    evaluated = sorted(sums)
    if len(evaluated) < _FEWEST:
        return {alpha: sums[alpha] for alpha in evaluated}
    grid = [round(number * STEP, 6) for number in range(round(1 / STEP) + 1)]
    new = [alpha for alpha in grid if evaluated[0] < alpha < evaluated[-1] and alpha not in sums]
    curves = {source: _curve(sums, evaluated, source)(new) for source in sums[evaluated[0]]}
    found = dict(sums) | {
        alpha: {source: curve[number] for source, curve in curves.items()} for number, alpha in enumerate(new)
    }
    return {alpha: found[alpha] for alpha in sorted(found)}


def misses(sums: Sums[S], tokens: Mapping[S, int]) -> list[float]:
    """By how many nats per token the loss of a source is missed at each inner position, were it not evaluated; nothing
    where too few others are left. Gaps are then twice as wide as those across which `filled` goes."""
    evaluated = sorted(sums)
    if len(evaluated) <= _FEWEST:
        return []
    return [
        abs(float(_curve(sums, [a for a in evaluated if a != alpha], source)(alpha).sum() - of.sum())) / tokens[source]
        for alpha in evaluated[1:-1]
        for source, of in sums[alpha].items()
        if tokens[source]
    ]


def _curve(sums: Sums[S], positions: Sequence[float], source: S) -> CubicSpline:
    """Of every document: position -> sum of its token losses."""
    return CubicSpline(positions, np.stack([sums[alpha][source] for alpha in positions]), axis=0)
