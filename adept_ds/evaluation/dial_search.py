"""Which positions of the dial are evaluated, one after the other, and which of them is chosen.

Chosen is the position with the lowest domain loss among those that keep the promise, all by validation documents.
First all copies are turned alike: to the usual positions, and to where curves through these expect the best between
them. Then, from the best common position on, each copy by itself to two further places: 2 k evaluations, from which
separable quadratics of the domain loss and of each limit propose a position for all copies (see `surrogate`). A
proposal counts only by its own evaluation, like every other position.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy.interpolate import CubicSpline

from adept_ds.base.dial_record import Alphas
from adept_ds.evaluation.surrogate import AxisValues, SeparableQuadratic, axis_places, lowest

STEP = 0.25
"""From the best common position to the places where a copy is turned alone: the distance of the usual positions."""

BETWEEN = 2
"""At most so many further common positions are evaluated: after one that breaks the promise, the next is better
known."""

_FEWEST, _FINEST, _WORTH = 4, 0.01, 1e-3
"""Positions through which a cubic goes in one way only; the distance between those that it is asked for; and the nats
for which one of these is evaluated."""

PROPOSALS = 3
"""At most so many are evaluated: after one that breaks the promise, one that is half as far from the best position."""

_DIGITS = 3
"""Of a proposal: finer than anything that held-out text can tell apart."""


class Scores(NamedTuple):
    """Of a position, on validation documents."""

    domain: float
    """Loss, in nats per token."""
    limits: tuple[float, ...]
    """Of each general source, the upper limit of the rise of its loss above the base's."""


class Trial(NamedTuple):
    """A position that is to be evaluated."""

    alphas: Alphas
    tried_as: Literal["common", "single", "proposed"]


Found = Mapping[Alphas, Scores]


def search(
    positions: Sequence[float], copies: int, max_rise: float, *, per_copy: bool
) -> Generator[Trial, Scores, Alphas]:
    """Yields each position to be evaluated, is sent what it scores, and returns the one that is chosen.

    Args:
        positions: at which all copies are turned alike; 0, the base, is among them.
        copies: how many numbers a position has; 1 where nothing is copied.
        per_copy: also turn copies by themselves.
    """
    found = dict[Alphas, Scores]()
    for alpha in positions:
        common = (float(alpha),) * copies
        found[common] = yield Trial(common, "common")
    for _ in range(BETWEEN):
        between = _between(found, max_rise)
        if between is None:
            break
        found[between] = yield Trial(between, "common")
        if max(found[between].limits) <= max_rise:
            break
    centre = choose(found, max_rise)
    if not per_copy:
        return centre
    axes = [[_moved(centre, copy, place) for place in axis_places(centre[copy], STEP)] for copy in range(copies)]
    for single in (single for pair in axes for single in pair):
        if single not in found:  # of one copy, a common position is the same
            found[single] = yield Trial(single, "single")
    proposal = _proposal(found, centre, axes, max_rise)
    for _ in range(PROPOSALS):
        if proposal not in found:
            found[proposal] = yield Trial(proposal, "proposed")
        if max(found[proposal].limits) <= max_rise:  # better or not: less of it is no better
            break
        best = choose(found, max_rise)
        proposal = _rounded((here + there) / 2 for here, there in zip(best, proposal, strict=True))
    return choose(found, max_rise)


def choose(found: Found, max_rise: float) -> Alphas:
    """The lowest domain loss among those that keep every limit; of equal ones the lowest position."""
    keeping = [alphas for alphas, scores in found.items() if max(scores.limits) <= max_rise]
    assert keeping, "the base keeps every promise"
    return min(keeping, key=lambda alphas: (found[alphas].domain, alphas))


def _between(found: Found, max_rise: float) -> Alphas | None:
    """The common position at which cubic splines through all of them expect the lowest domain loss that keeps the
    promise; None: nothing that is worth an evaluation."""
    known = sorted(found)
    if len(known) < _FEWEST:
        return None
    places = [alphas[0] for alphas in known]
    grid = np.arange(places[0], places[-1] + _FINEST / 2, _FINEST)
    domain = CubicSpline(places, [found[alphas].domain for alphas in known])(grid)
    limits = CubicSpline(places, [found[alphas].limits for alphas in known])(grid)
    domain[(limits > max_rise).any(axis=1)] = np.inf
    best = int(np.argmin(domain))
    if not domain[best] < found[choose(found, max_rise)].domain - _WORTH:
        return None
    return _rounded([float(grid[best])] * len(known[0]))


def _proposal(found: Found, centre: Alphas, axes: Sequence[Sequence[Alphas]], max_rise: float) -> Alphas:
    """Where the quadratics through these evaluations expect the lowest domain loss that keeps the promise."""

    def through(values: Mapping[Alphas, float]) -> SeparableQuadratic:
        on_axes = []
        for copy, (first, second) in enumerate(axes):
            on_axes.append(AxisValues((first[copy], second[copy]), (values[first], values[second])))
        return SeparableQuadratic.through(centre, values[centre], on_axes)

    limits = [{at: of.limits[source] for at, of in found.items()} for source in range(len(found[centre].limits))]
    place = lowest(through({at: of.domain for at, of in found.items()}), list(map(through, limits)), max_rise)
    assert place is not None, "the centre keeps the promise"
    return _rounded(place)


def _moved(alphas: Alphas, copy: int, place: float) -> Alphas:
    """With one copy turned elsewhere."""
    return (*alphas[:copy], round(place, _DIGITS), *alphas[copy + 1 :])


def _rounded(alphas: Iterable[float]) -> Alphas:
    return tuple(float(np.clip(round(float(alpha), _DIGITS), 0.0, 1.0)) for alpha in alphas)
