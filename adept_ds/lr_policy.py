"""From unit importance to learning-rate multipliers (paper, equation 6): lr_U = 2 * (1 - I_U) * lr_base."""

from __future__ import annotations

import math
from collections.abc import Sequence

from adept_ds.config import LrPolicySection
from adept_ds.units import UnitRegistry


def multipliers_from_importance(
    importance: Sequence[float], registry: UnitRegistry, policy: LrPolicySection
) -> list[float]:
    """One multiplier in [0, 2] per unit, in registry order.

    Importances are scaled to [0, 1] by min-max inside each scope; with `norms_apart`, norms and matrices are
    separate scopes because their importances differ by orders of magnitude.

    Raises:
        ValueError: an importance is negative or not finite; the message names the unit.
    """
    for unit, value in zip(registry.units, importance, strict=True):
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"importance of unit '{unit.name}' is {value}: it must be finite and not negative")
    if policy.map == "constant":
        return [1.0] * len(registry)
    multipliers = [1.0] * len(registry)
    for kind in ("matrix", "norm"):
        members = [index for index, unit in enumerate(registry.units) if unit.kind == kind]
        for index, scaled in zip(members, _min_max([importance[index] for index in members]), strict=True):
            multipliers[index] = 2.0 * (1.0 - scaled)
    return multipliers


def _min_max(values: Sequence[float]) -> list[float]:
    """Scale to [0, 1]; a constant vector becomes 1/2 (multiplier 1), never 0/0."""
    if not values:
        return []
    low, high = min(values), max(values)
    if high == low:
        return [0.5] * len(values)
    return [(value - low) / (high - low) for value in values]
