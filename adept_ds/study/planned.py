"""`adept compare STUDY --dry-run`: what would be run, and how long it would take as far as that is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from adept_ds.base.records import Record
from adept_ds.base.run_records import RunSummary
from adept_ds.study.budget import refreshed_every, tokens_per_step
from adept_ds.study.cells import Cell
from adept_ds.study.describing import budget_in_words
from adept_ds.study.running import StudyState


class PlannedCell(Record):
    """A cell, and where it stands."""

    name: str
    """Of its directory."""
    title: str
    state: str
    """'finished', 'failed', 'begun' or 'to run'"""
    steps: int
    tokens: int
    seconds: float | None
    """That it took or will take to train; None where no cell of its method has been timed."""


class Planned(Record):
    """Of the whole study."""

    budget: str
    cells: list[PlannedCell]
    confirmed_later: int
    """At most so many more cells: further seeds, at rates that the search has yet to find."""

    def lines(self) -> Iterable[str]:
        yield self.budget
        for cell in self.cells:
            seconds = "" if cell.seconds is None else f", {cell.seconds:.0f} s of training"
            yield f"{cell.state:<9} {cell.title}: {cell.steps:,} steps, {cell.tokens:,} tokens{seconds}"
        waiting = [cell for cell in self.cells if cell.state != "finished"]
        known = [cell.seconds for cell in waiting if cell.seconds is not None]
        time = f", {sum(known) / 3600:.1f} h of training" if waiting and len(known) == len(waiting) else ""
        yield f"{len(waiting)} of {len(self.cells)} cells to run{time}"
        if self.confirmed_later:
            yield f"and at most {self.confirmed_later} more, with further seeds, when the search is done"


def planned(state: StudyState) -> Planned:
    """Writes nothing."""
    search, cells = state.wanted(state.search), state.wanted(state.cells())
    timed = _seconds_by_variant(cells)
    unknown = 0
    if not all(cell.is_finished for cell in search):
        seeds = state.plan.study.seeds
        rates = Counter(cell.variant.name for cell in search if cell.seed == search[0].seed)
        best = sum(min(number, len(seeds.confirm_for)) for number in rates.values())
        unknown = best * len(seeds.confirm) - (len(cells) - len(search))
    return Planned(
        budget=budget_in_words(state.plan),
        cells=[_planned(state, cell, timed) for cell in cells],
        confirmed_later=max(0, unknown),
    )


def _planned(state: StudyState, cell: Cell, timed: dict[str, float]) -> PlannedCell:
    config, name = cell.config, cell.variant.name
    rate = state.plan.rates.get(name)
    seconds = rate.seconds(config.train.steps, refreshed_every(config)) if rate else timed.get(name)
    return PlannedCell(
        name=cell.run.root.name,
        title=cell.title,
        state=_state(cell),
        steps=config.train.steps,
        tokens=config.train.steps * tokens_per_step(config),
        seconds=seconds,
    )


def _state(cell: Cell) -> str:
    if cell.is_finished:
        return "finished"
    return "failed" if cell.failure.is_file() else "begun" if cell.is_begun else "to run"


def _seconds_by_variant(cells: list[Cell]) -> dict[str, float]:
    """What a finished cell of each has taken."""
    found = dict[str, float]()
    for cell in cells:
        if cell.is_finished and cell.run.summary.is_file():
            summary = RunSummary.load(cell.run.summary)
            if summary.seconds is not None:
                found[cell.variant.name] = summary.seconds + (summary.overhead_seconds or 0.0)
    return found
