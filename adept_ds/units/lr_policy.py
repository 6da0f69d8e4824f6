"""From unit importance to learning-rate multipliers (paper, equation 6): lr_U = 2 * (1 - I_U) * lr_base.

Other maps than the paper's, and what is scaled together with what, are choices of `LrPolicySection`; their formulas
and uses are in docs/lr_policy.md. The map `ratio`, which goes by importances for the domain too, is in `units.ratio`.
Everything here is a pure function of its arguments, so that ranks which hold the same importances compute the same
multipliers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from adept_ds.config.rate_sections import LrPolicySection
from adept_ds.units.ratio import ratio_multipliers
from adept_ds.units.registry import Unit

Vector = NDArray[np.float64]


_SCOPE_OF: dict[str, Callable[[Unit], Hashable]] = {
    "all": lambda unit: None,
    "norms_apart": lambda unit: unit.kind == "norm",
    "per_kind": lambda unit: unit.part,
    "per_layer": lambda unit: (unit.layer, unit.kind == "norm"),
}
"""Units with equal values are scaled together."""


_MAPS: dict[str, Callable[[Vector, LrPolicySection], Vector]] = {
    "linear": lambda scaled, _: 2.0 * (1.0 - scaled),
    "power": lambda scaled, policy: 2.0 * (1.0 - scaled) ** policy.power,
    "exponential": lambda scaled, policy: _exponential(scaled, policy.temperature),
    "step": lambda scaled, policy: np.where(scaled < policy.threshold, policy.high, policy.low),
    "rank": lambda scaled, _: 2.0 * (1.0 - scaled),
    "constant": lambda scaled, _: np.ones_like(scaled),
}
"""From scaled importances in [0, 1] to multipliers; none of them increases. `rank` differs in how it is scaled."""


def multipliers_from_importance(
    importance: Sequence[float],
    units: Sequence[Unit],
    policy: LrPolicySection,
    domain: Sequence[float] | None = None,
) -> list[float]:
    """One multiplier per unit, in the order of `units`.

    Importances are scaled to [0, 1] inside each scope, by min-max or by their ranks; a scope whose importances are all
    equal has multiplier 1. `min_multiplier` and `max_multiplier` act last, and may thus move a preserved mean; of the
    map `ratio` both hold.

    Args:
        importance: for general competence.
        domain: importance for the domain, which the map `ratio` needs and no other looks at.

    Raises:
        ValueError: an importance is negative or not finite (the message names the unit), their number is wrong, or
            those for the domain are missing.
    """
    values = checked_importance(importance, units)
    if policy.map == "ratio":
        if domain is None:
            raise ValueError("the map ratio needs importances for the domain too")
        return _by_ratio(values, checked_importance(domain, units, "for the domain"), units, policy).tolist()
    if policy.preset == "official":
        return _official(values, units).tolist()
    numel = np.array([unit.numel for unit in units], dtype=np.float64)
    multipliers = np.ones_like(values)
    for members in _scopes(units, policy.scope):
        multipliers[members] = _multipliers_of_scope(values[members], numel[members], policy)
    return np.clip(multipliers, policy.min_multiplier, policy.max_multiplier).tolist()


def smooth(previous: Sequence[float] | None, new: Sequence[float], share: float) -> list[float]:
    """Moving average of importances over refreshes: `share` of the previous value, the rest of the new one.

    Args:
        previous: what this function returned at the last refresh; None at the first, which `new` passes unchanged.
        share: in [0, 1).

    Raises:
        ValueError: the two differ in length.
    """
    if previous is None:
        return list(new)
    if len(previous) != len(new):
        raise ValueError(f"{len(new)} importances cannot be averaged with {len(previous)} previous ones")
    return (share * np.asarray(previous, dtype=np.float64) + (1.0 - share) * np.asarray(new, dtype=np.float64)).tolist()


def checked_importance(importance: Sequence[float], units: Sequence[Unit], side: str = "") -> Vector:
    """[n_units], once they are seen to be what importances can be.

    Args:
        side: what they are importances for, in messages.

    Raises:
        ValueError: one is negative or not finite (the message names the unit), or their number is wrong.
    """
    if len(importance) != len(units):
        raise ValueError(f"{len(importance)} importances{side and f' {side}'} for {len(units)} units")
    values = np.asarray(importance, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(values) | (values < 0))
    if bad.size:
        first = bad[0]
        raise ValueError(
            f"importance of unit '{units[first].name}'{side and f' {side}'} is {values[first]}: "
            "it must be finite and not negative"
        )
    return values


def _scopes(units: Sequence[Unit], scope: str) -> list[NDArray[np.int64]]:
    """Indices of the units of each scope."""
    scope_of = _SCOPE_OF[scope]
    members: dict[Hashable, list[int]] = {}
    for index, unit in enumerate(units):
        members.setdefault(scope_of(unit), []).append(index)
    return [np.array(indices) for indices in members.values()]


def _multipliers_of_scope(values: Vector, numel: Vector, policy: LrPolicySection) -> Vector:
    if np.ptp(values) == 0:
        return np.ones_like(values)
    scaled = _mean_ranks(values) if policy.map == "rank" else _min_max(values, values)
    multipliers = _MAPS[policy.map](scaled, policy)
    if policy.preserve_mean:
        # fsum is exact, so that the order of the units does not matter.
        mean = math.fsum(multipliers * numel) / math.fsum(numel)
        return multipliers / mean if mean > 0 else multipliers
    return multipliers


def _by_ratio(general: Vector, domain: Vector, units: Sequence[Unit], policy: LrPolicySection) -> Vector:
    """Inside each scope."""
    numel = np.array([unit.numel for unit in units], dtype=np.float64)
    multipliers = np.ones_like(general)
    high = math.inf if policy.max_multiplier is None else policy.max_multiplier
    for members in _scopes(units, policy.scope):
        multipliers[members] = ratio_multipliers(
            general[members],
            domain[members],
            numel[members],
            power=policy.ratio_power,
            low=policy.min_multiplier,
            high=high,
        )
    return multipliers


def _official(values: Vector, units: Sequence[Unit]) -> Vector:
    """The paper's published implementation: 2 (1 - s), norms scaled by the range of *all* units, matrices by their own.

    Whatever is no norm counts as a matrix.
    """
    is_norm = np.array([unit.kind == "norm" for unit in units], dtype=bool)
    multipliers = np.ones_like(values)
    for members, reference in ((is_norm, values), (~is_norm, values[~is_norm])):
        if members.any() and np.ptp(reference) > 0:
            multipliers[members] = np.clip(2.0 * (1.0 - _min_max(values[members], reference)), 0.0, 2.0)
    return multipliers


def _min_max(values: Vector, reference: Vector) -> Vector:
    """Scale so that the range of `reference`, which must not be constant, becomes [0, 1]."""
    return (values - reference.min()) / np.ptp(reference)


def _exponential(scaled: Vector, temperature: float) -> Vector:
    """2 (exp(-t s) - exp(-t)) / (1 - exp(-t)); written with expm1, it neither cancels nor overflows for any t."""
    return 2.0 * np.exp(-temperature * scaled) * np.expm1(-temperature * (1.0 - scaled)) / np.expm1(-temperature)


def _mean_ranks(values: Vector) -> Vector:
    """Ranks from 0 to 1; equal values share their mean rank, and the mean of all ranks is 1/2."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    first_of_group = np.cumsum(counts) - counts
    return ((first_of_group + (counts - 1) / 2) / (len(values) - 1))[group]
