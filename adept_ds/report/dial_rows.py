"""Positions of the dial as the report shows them: what each gains on the domain, and costs on general text."""

from __future__ import annotations

from typing import Any, NamedTuple

from adept_ds.base.dial_record import label_of
from adept_ds.report.run_files import RunFiles, finite


class Cost(NamedTuple):
    """Of a position, on the documents of one half."""

    domain: float
    """Loss."""
    rise: float
    """Of the general source with the highest limit."""
    limit: float


class PositionRow(NamedTuple):
    label: str
    """'0.5', or of each copy: '0.5, 1, 0'."""
    keeps: bool
    chosen: bool
    together: bool
    """All copies are turned alike."""
    validation: Cost
    test: Cost


def position_rows(run: RunFiles) -> list[PositionRow]:
    """In the order in which they were tried; those of which all is known."""
    rows = []
    for position in run.dial.get("positions") or ():
        costs = [_cost(position.get(half) or {}) for half in ("validation", "test")]
        if costs[0] is not None and costs[1] is not None:
            alphas = position["alphas"]
            rows.append(
                PositionRow(
                    label=label_of(alphas),
                    keeps=bool(position.get("keeps")),
                    chosen=alphas == run.dial.get("chosen"),
                    together=len(set(alphas)) == 1,
                    validation=costs[0],
                    test=costs[1],
                )
            )
    return rows


def _cost(half: dict[str, Any]) -> Cost | None:
    general = [of for of in (half.get("general") or {}).values() if finite(of.get("rise")) and finite(of.get("limit"))]
    domain: float | None = (half.get("domain") or {}).get("loss")
    if not general or domain is None or not finite(domain):
        return None
    worst = max(general, key=lambda of: of["limit"])
    return Cost(domain, worst["rise"], worst["limit"])
