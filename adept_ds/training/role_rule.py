"""Learning rates by which side a unit matters to (after Parenting), found anew every so many steps."""

from __future__ import annotations

from collections.abc import Callable

from adept_ds.training.rule import Refresh, TrainingRule, check_start
from adept_ds.units.roles import Role, roles_of_units
from adept_ds.units.unit_lr import UnitLR

Estimate = Callable[[], list[float]]
"""Importance of every unit now, in registry order; on every rank alike."""


class RoleRule(TrainingRule):
    """One multiplier for each role.

    Args:
        general, domain: importances on the text of either side.
        important: share of the units that count as important on each side.
        rates: the multiplier of each role.
        every: optimizer steps between refreshes.
        from_start: estimate before the first step; else every multiplier is 1 until the first refresh.
    """

    def __init__(
        self,
        unit_lr: UnitLR,
        general: Estimate,
        domain: Estimate,
        *,
        important: float,
        rates: dict[Role, float],
        every: int,
        from_start: bool = True,
    ) -> None:
        self._unit_lr, self._general, self._domain = unit_lr, general, domain
        self._important, self._rates, self._every, self._from_start = important, rates, every, from_start

    def start(self) -> Refresh | None:
        if not self._from_start:
            return None
        general, domain = self._general(), self._domain()
        check_start([*general, *domain])
        return self._refreshed(general, domain)

    def refreshes_after(self, step: int) -> bool:
        return step % self._every == 0

    def refresh(self) -> Refresh:
        return self._refreshed(self._general(), self._domain())

    def _refreshed(self, general: list[float], domain: list[float]) -> Refresh:
        registry = self._unit_lr.registry
        roles = roles_of_units(general, domain, registry.units, self._important)
        multipliers = [self._rates[role] for role in roles]
        self._unit_lr.set(dict(zip(registry.names, multipliers, strict=True)))
        return Refresh(general, multipliers, domain)
