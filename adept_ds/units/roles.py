"""Which of two sides a unit matters to: general competence, the domain, both or neither.

The four cases of methods that find task-specific and task-shared parts of a model by the importance of units on either
side: TaSL (Feng et al., ACL 2024) and Parenting (Xu et al., ACL 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from adept_ds.units.lr_policy import checked_importance
from adept_ds.units.registry import Unit

Role = Literal["general", "domain", "shared", "idle"]
"""Important to one side only, to both, or to neither."""


def roles_of_units(
    general: Sequence[float], domain: Sequence[float], units: Sequence[Unit], share: float
) -> list[Role]:
    """The role of every unit, in the order of `units`.

    Args:
        general, domain: importances; only their order matters, so the two may be of different scales.
        share: of the units, in (0, 1), that count as important on each side.

    Raises:
        ValueError: an importance is negative or not finite; the message names the unit.
    """
    role: dict[tuple[bool, bool], Role] = {
        (True, False): "general",
        (False, True): "domain",
        (True, True): "shared",
        (False, False): "idle",
    }
    sides = [_important(checked_importance(side, units), units, share) for side in (general, domain)]
    return [role[bool(first), bool(second)] for first, second in zip(*sides, strict=True)]


def _important(importance: NDArray[np.float64], units: Sequence[Unit], share: float) -> NDArray[np.bool_]:
    """Above the quantile 1 - share, among norms and among all else: importances of norms are magnitudes larger."""
    is_norm = np.array([unit.kind == "norm" for unit in units], dtype=bool)
    important = np.zeros(len(units), dtype=bool)
    for members in (is_norm, ~is_norm):
        if members.any():
            important[members] = importance[members] > np.quantile(importance[members], 1.0 - share)
    return important
