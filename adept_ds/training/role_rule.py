"""Learning rates by which side a unit matters to (after Parenting), found anew every so many steps."""

from __future__ import annotations

from typing import Protocol

from adept_ds.base.progress import ProgressCallback
from adept_ds.ranks.unfinished import LongWork, Work
from adept_ds.training.rule import Refresh, TrainingRule, check_start
from adept_ds.units.roles import Role, roles_of_units
from adept_ds.units.unit_lr import UnitLR


class Estimate(Protocol):
    """Importance of every unit now, in registry order; on every rank alike (see `estimate_importance`)."""

    def __call__(self, *, progress: ProgressCallback | None = None, work: Work | None = None) -> list[float]: ...


class RoleRule(TrainingRule):
    """One multiplier for each role.

    Args:
        general, domain: importances on the text of either side.
        together: around each of them, before the first step.
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
        together: LongWork,
        *,
        important: float,
        rates: dict[Role, float],
        every: int,
        from_start: bool = True,
    ) -> None:
        self._unit_lr, self._general, self._domain, self._together = unit_lr, general, domain, together
        self._important, self._rates, self._every, self._from_start = important, rates, every, from_start

    def start(self) -> Refresh | None:
        if not self._from_start:
            return None
        with self._together("estimating importance for general text") as (bar, work):
            general = self._general(progress=bar, work=work)
        with self._together("estimating importance for the domain") as (bar, work):
            domain = self._domain(progress=bar, work=work)
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
