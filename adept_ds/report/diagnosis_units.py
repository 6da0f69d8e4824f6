"""How units moved, and whether that followed their importance: from a run's logs alone."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from pydantic import ConfigDict, NonNegativeInt, PositiveInt
from scipy.stats import rankdata

from adept_ds.base.records import Record
from adept_ds.base.run_dir import RunDirectory
from adept_ds.base.run_records import LogLine, read_log
from adept_ds.report.diagnosis import UnitCourse


class _Moved(Record):
    model_config = ConfigDict(extra="ignore")

    unit: str
    kind: str
    numel: PositiveInt
    multiplier: float
    moved_since_start: float | None
    """None: not finite."""


class _MovementLine(LogLine):
    since: NonNegativeInt
    units: tuple[_Moved, ...]


class _Refreshed(Record):
    model_config = ConfigDict(extra="ignore")

    unit: str
    importance: float | None


class _RefreshLine(LogLine):
    units: tuple[_Refreshed, ...]


def unit_courses(run: RunDirectory) -> tuple[UnitCourse, ...]:
    """Of every unit; none if training has come to no refresh and no end.

    Raises:
        InputError: a line of a log is damaged.
    """
    intervals = _without_repeats([line for _, line in read_log(run.unit_movement, _MovementLine)])
    if not intervals:
        return ()
    importance = _mean_importance(run, intervals)
    multiplier: dict[str, float] = {}
    steps = sum(line.step - line.since for line in intervals)
    for line in intervals:
        for unit in line.units:
            share = (line.step - line.since) / steps
            multiplier[unit.unit] = multiplier.get(unit.unit, 0.0) + share * unit.multiplier
    courses = [
        UnitCourse(
            unit=unit.unit,
            kind=unit.kind,
            numel=unit.numel,
            multiplier=multiplier[unit.unit],
            importance=importance.get(unit.unit),
            change=unit.moved_since_start / math.sqrt(unit.numel),
            against=None,
        )
        for unit in intervals[-1].units
        if unit.moved_since_start is not None
    ]
    return _with_conflicts(courses)


def _without_repeats(lines: Sequence[_MovementLine]) -> list[_MovementLine]:
    """A run that went on from a checkpoint repeats what came after that: the later lines count."""
    kept: list[_MovementLine] = []
    for line in lines:
        if line.since >= line.step:
            continue
        while kept and kept[-1].step >= line.step:
            kept.pop()
        kept.append(line)
    return kept


def _mean_importance(run: RunDirectory, intervals: Sequence[_MovementLine]) -> dict[str, float]:
    """Over the steps of all intervals, of the refresh that was in force."""
    refreshes = [line for _, line in read_log(run.unit_importance, _RefreshLine)]
    kept = [line for line, after in pairwise(refreshes) if line.step < after.step] + refreshes[-1:]
    steps, sums, weights = [line.step for line in kept], dict[str, float](), dict[str, int]()
    for interval in intervals:
        number, weight = bisect_right(steps, interval.since) - 1, interval.step - interval.since
        if number < 0:
            continue  # multipliers were 1, whatever the importances
        for unit in kept[number].units:
            if unit.importance is not None:
                sums[unit.unit] = sums.get(unit.unit, 0.0) + weight * unit.importance
                weights[unit.unit] = weights.get(unit.unit, 0) + weight
    return {unit: total / weights[unit] for unit, total in sums.items()}


def _with_conflicts(courses: Sequence[UnitCourse]) -> tuple[UnitCourse, ...]:
    """With `against`: norms among norms, all others among themselves, as importances are scaled.

    Ranks, because importances differ by orders of magnitude, and since what was silent has no norm at the start that a
    change could be a share of. Where every unit moved the less, the more important it is, all are 0.
    """
    found: dict[str, float] = {}
    for norms in (True, False):
        group = [c for c in courses if (c.kind == "norm") == norms and c.importance is not None]
        if len(group) > 1:
            ranks = [rank_shares([getattr(c, key) for c in group]) for key in ("change", "importance")]
            found |= {c.unit: float(moved + matters - 1) for c, moved, matters in zip(group, *ranks, strict=True)}
    return tuple(course.model_copy(update={"against": found.get(course.unit)}) for course in courses)


def rank_shares(values: Sequence[float]) -> np.ndarray:
    """Ranks from 0 to 1; equal values share theirs."""
    ranks: np.ndarray = (rankdata(values) - 1) / (len(values) - 1)
    return ranks
