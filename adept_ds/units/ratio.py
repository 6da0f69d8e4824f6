"""Learning rates by importance on both sides: proportional to (I_domain / (I_general + eps))^p.

The paper slows what general competence needs; whether the domain needs a unit, it leaves open. Here a unit moves the
faster, the more the domain needs it and the less general competence does.

A ratio does not say how fast units move altogether, so the factor of proportion c is what makes the mean over
parameters 1. Limits hold at the same time: multipliers have mean 1 *after* they were limited,

    m_U = clip(c r_U, low, high),    sum_U n_U m_U = sum_U n_U,    low <= 1 <= high,

with n_U parameters in unit U. The mean of limited multipliers never falls as c grows, so there is one solution. Ratios
are kept as logarithms: importances may be any finite numbers, zeros among them.
"""

from __future__ import annotations

import math
from bisect import bisect_right

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

EPS = 0.01
"""eps, as a share of the median general importance of the units that are compared: how far below the usual importance
differences stop to count."""


def ratio_multipliers(
    general: Vector, domain: Vector, numel: Vector, *, power: float, low: float, high: float
) -> Vector:
    """[n_units], of units that are compared with each other; their mean, weighted by `numel`, is 1.

    Where all ratios are equal, or no unit matters to the domain, every multiplier is 1.

    Args:
        general, domain: importances, finite and not negative; each side in a scale of its own.
        power: p, above 0.
        low, high: limits of multipliers, low <= 1 <= high; high may be infinite.
    """
    ratios = power * _log_ratios(general, domain)
    if (ratios == ratios[0]).all():
        return np.ones_like(ratios)
    return _with_mean_1(ratios, numel / math.fsum(numel), low, high)


def _log_ratios(general: Vector, domain: Vector) -> Vector:
    """log(I_domain / (I_general + eps)) but for a constant; -inf where the domain does not need a unit.

    The median that eps goes by is that of positive importances where the median of all is 0. Where none is positive,
    any eps gives the same proportions.
    """
    general, domain = (side / (side.max() or 1.0) for side in (general, domain))
    median = float(np.median(general) or np.median(general[general > 0])) if general.any() else 1.0
    with np.errstate(divide="ignore"):
        return np.log(domain) - np.log(general + max(EPS * median, np.finfo(np.float64).tiny))


def _with_mean_1(ratios: Vector, shares: Vector, low: float, high: float) -> Vector:
    """The multiple of exp(ratios), limited to [low, high], whose mean is 1.

    Args:
        ratios: logarithms; one at least is finite.
        shares: of all parameters, by unit.
    """
    needed = ratios > -math.inf
    if not needed.all():
        fast, slow = math.fsum(shares[needed]) * high, math.fsum(shares[~needed])
        if fast + slow * low < 1:  # what the domain needs is as fast as it may be, and the others share what is left
            return np.where(needed, high, max((1 - fast) / slow, low))

    def mean(factor: float) -> float:
        with np.errstate(over="ignore"):
            return math.fsum(shares * np.clip(np.exp(ratios + factor), low, high))

    # log(c) at which a unit leaves the lower limit and comes to the upper one. Between two neighbours among all of them
    # the mean is linear in c.
    with np.errstate(divide="ignore"):
        leaves, arrives = (np.where(needed, np.log(limit) - ratios, math.inf) for limit in (low, high))
    turns = np.unique([turn for turn in (*leaves, *arrives) if math.isfinite(turn)])
    passed = bisect_right(range(len(turns)), 1.0, key=lambda number: mean(float(turns[number])))
    at_high = arrives <= turns[passed - 1] if passed else np.zeros_like(needed)
    at_low = leaves >= (turns[passed] if passed < len(turns) else math.inf)
    free = ~(at_low | at_high)
    multipliers = np.where(at_high, high, low)
    if free.any():
        multiples = np.exp(ratios[free] - ratios[free].max())
        left = 1 - math.fsum(shares[~free] * multipliers[~free])
        multipliers[free] = left * multiples / math.fsum(shares[free] * multiples)
    return np.clip(multipliers, low, high)
