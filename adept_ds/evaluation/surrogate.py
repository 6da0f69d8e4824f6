"""Functions of several copies' positions, known at 2 k + 1 of them, as separable quadratics, and their minimum.

    f(x) = f(c) + sum_i [ g_i (x_i - c_i) + h_i (x_i - c_i)^2 ]

through f(c) and two more values on each axis. What copies do together beyond the sum of what each does is left out, so
that a minimum is a proposal: it has to be evaluated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

Floats = NDArray[np.float64]

_STARTS, _SEED = 24, 0
"""Random starting points beside the centre and corners: constraints may curve the wrong way."""

_TOLERANCE = 1e-9
"""By which a constraint may be missed. The solver itself stops within about 1e-10 nats of one."""


class AxisValues(NamedTuple):
    """Of a function at two places on an axis through the centre."""

    places: tuple[float, float]
    values: tuple[float, float]


@dataclass(frozen=True)
class SeparableQuadratic:
    """As above."""

    centre: Floats
    """c, [k]"""
    value: float
    """f(c)"""
    slopes: Floats
    """g, [k]"""
    curvatures: Floats
    """h, [k]; half of the second derivatives."""

    @classmethod
    def through(cls, centre: Sequence[float], value: float, axes: Sequence[AxisValues]) -> SeparableQuadratic:
        """Args: axes: of each axis, two places that differ from each other and from the centre's."""
        slopes, curvatures = [], []
        for middle, (places, values) in zip(centre, axes, strict=True):
            steps = np.array(places) - middle
            slope, curvature = np.linalg.solve(np.stack([steps, steps**2], axis=1), np.array(values) - value)
            slopes.append(slope)
            curvatures.append(curvature)
        return cls(np.array(centre), value, np.array(slopes), np.array(curvatures))

    def __call__(self, x: Floats) -> float:
        step = x - self.centre
        return float(self.value + self.slopes @ step + self.curvatures @ step**2)

    def gradient(self, x: Floats) -> Floats:
        """[k]"""
        gradient: Floats = self.slopes + 2 * self.curvatures * (x - self.centre)
        return gradient


def axis_places(middle: float, step: float) -> tuple[float, float]:
    """Two places within [0, 1] for a quadratic through `middle`: on both sides of it where there is room."""
    low, high = middle - step, middle + step
    if low < 0:
        return middle + step, middle + 2 * step
    if high > 1:
        return middle - step, middle - 2 * step
    return low, high


def lowest(objective: SeparableQuadratic, constraints: Sequence[SeparableQuadratic], bound: float) -> Floats | None:
    """Where in the unit cube the objective is lowest, with every constraint at most `bound`; None: nowhere known.

    By sequential quadratic programming (scipy's SLSQP) from many starts, of which the best that fits counts.
    """
    size = len(objective.centre)
    random = np.random.default_rng(_SEED)
    starts = [objective.centre, np.zeros(size), np.ones(size), *random.random((_STARTS, size))]
    limits = [
        {"type": "ineq", "fun": lambda x, of=of: bound - of(x), "jac": lambda x, of=of: -of.gradient(x)}
        for of in constraints
    ]

    def fits(x: Floats) -> bool:
        return bool(np.isfinite(x).all()) and all(of(x) <= bound + _TOLERANCE for of in constraints)

    best = objective.centre if fits(objective.centre) else None
    for start in starts:
        found = minimize(
            objective,
            start,
            jac=objective.gradient,
            bounds=[(0.0, 1.0)] * size,
            constraints=limits,
            method="SLSQP",
            options={"maxiter": 200, "ftol": 1e-12},
        )
        x = np.clip(found.x, 0.0, 1.0)
        if fits(x) and (best is None or objective(x) < objective(best)):
            best = x
    return best
