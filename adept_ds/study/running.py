"""Running a study: cells one after another, the search first, then further seeds at the rates that it found.

Nothing is remembered but what runs leave behind. So a study can be stopped or killed at any moment, and the same
command goes on: finished cells are known by their results and inputs, and the one in progress by its checkpoints.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from adept_ds.base.errors import InputError
from adept_ds.base.files import write_text
from adept_ds.base.run_records import MetricsLine, read_log
from adept_ds.base.terminal import Terminal
from adept_ds.comparison.arms import best_rates
from adept_ds.comparison.findings import Findings
from adept_ds.comparison.measurements import read_measurements
from adept_ds.comparison.page import write_comparison
from adept_ds.comparison.trials import Timing, Trial
from adept_ds.config.loading import dump_config
from adept_ds.study.cell_records import Failure
from adept_ds.study.cells import Cell
from adept_ds.study.children import last_words
from adept_ds.study.describing import Progress, describe
from adept_ds.study.directory import CELL_RECORD
from adept_ds.study.executing import Executor
from adept_ds.study.plan import Plan
from adept_ds.study.shared import SharedWork, probe_seconds

_PAGE_SHARE = 0.05
"""Of the time that cells take, which may go into the page on the way."""


@dataclass
class StudyState:
    """What is there of a study, and what is left to do."""

    plan: Plan
    scale: float = 1.0
    overlaps: Sequence[str] = ()
    only: Sequence[str] = ()
    """Labels of the methods that are run now; all where there are none. The page is about all in any case."""

    @property
    def shared(self) -> SharedWork:
        return SharedWork(self.plan.directory.shared)

    @property
    def search(self) -> list[Cell]:
        return self.plan.search

    def confirmations(self) -> list[Cell]:
        """Of the methods whose search has finished at least one cell; see `arms.best_rates`."""
        trials = self._trials(self.search)
        best = best_rates(read_measurements(trials), self.plan.study.seeds.confirm_for) if trials else {}
        return self.plan.confirmations(best)

    def cells(self) -> list[Cell]:
        """All that are known to be needed."""
        return [*self.search, *self.confirmations()]

    def failed(self) -> dict[Cell, Failure]:
        return {cell: Failure.load(cell.failure) for cell in self.cells() if cell.failure.is_file()}

    def tidy(self) -> None:
        """After cells that ended while nobody looked."""
        for cell in [*self.search, *self.plan.possible_confirmations]:
            if cell.is_finished:
                tidy(cell, self.shared, self.plan.study.keep)

    def write_page(self) -> Findings:
        """From what is there. Raises `InputError`: there is nothing, or it cannot be compared."""
        cells, failed = self.cells(), self.failed()
        finished = [cell for cell in cells if cell.is_finished]
        missing = [cell for cell in cells if cell not in finished and cell not in failed]
        description = describe(self.plan, Progress(finished, missing, failed), self.overlaps, self.scale)
        return write_comparison(self.plan.directory.root, description, self._trials(finished))

    def _trials(self, cells: Sequence[Cell]) -> list[Trial]:
        """Of the finished ones."""
        return [
            cell.trial(probe_seconds(cell.run) if cell.config.needs_probe else 0.0, self._timing(cell))
            for cell in cells
            if cell.is_finished
        ]

    def _timing(self, cell: Cell) -> Timing | None:
        rate = self.plan.rates.get(cell.variant.name)
        if rate is None:
            return None
        return Timing(
            step_seconds=rate.step_seconds, refresh_seconds=rate.refresh_seconds, before_seconds=rate.before_training
        )

    def wanted(self, cells: Sequence[Cell]) -> list[Cell]:
        """Those that are run now."""
        return [cell for cell in cells if not self.only or cell.variant.label in self.only]


def begin(cell: Cell, shared: SharedWork) -> None:
    """Make the directory of a cell, from which `adept run` goes on; one that was begun stays as it is."""
    if not cell.is_begun:
        cell.run.root.mkdir(parents=True, exist_ok=True)
        shared.take_over(cell.run, cell.inputs)
        write_text(cell.run.config, dump_config(cell.config))
        cell.record.save(cell.run.root / CELL_RECORD)


def tidy(cell: Cell, shared: SharedWork, keep: str) -> None:
    """After its end: others may use its work, and what is not kept goes."""
    shared.keep(cell.run, cell.inputs)
    cell.failure.unlink(missing_ok=True)
    run = cell.run
    unwanted = {"all": [], "model": [run.checkpoints], "results": [run.checkpoints, run.export, run.expanded]}[keep]
    for folder in unwanted:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class StudyRun:
    """Works through the cells of a study."""

    state: StudyState
    executor: Executor
    terminal: Terminal
    stop_on_failure: bool = False
    failed: list[Cell] = field(default_factory=list)
    _page_seconds: float = 0.0
    _cell_seconds: float = 0.0
    _cells: int = 0

    def run(self) -> None:
        """The search, then what follows from it.

        Raises:
            StopRequestedError: see `Executor.execute`.
        """
        self.state.tidy()
        self._phase("search", lambda: self.state.search)
        if not (self.failed and self.stop_on_failure):
            self._phase("confirm", self.state.confirmations)

    def _phase(self, name: str, cells_of: Callable[[], list[Cell]]) -> None:
        cells = self.state.wanted(cells_of())
        waiting = [cell for cell in cells if not cell.is_finished]
        self.terminal.stage(name, f"{len(cells)} cells, {len(cells) - len(waiting)} of them finished before")
        with self.terminal.progress(name) as bar:
            for number, cell in enumerate(waiting):
                begun, share = time.monotonic(), 1 / len(waiting)

                def look(cell: Cell = cell, before: float = number * share, share: float = share) -> None:
                    bar(before + share * _done(cell), f"{cell.title}: {last_words(cell.log)}")

                self._run_cell(cell, look)
                self._cell_seconds += time.monotonic() - begun
                if self.failed and self.stop_on_failure:
                    return
                self._say_time_left(number + 1, len(waiting))
                self._page_on_the_way()

    def _run_cell(self, cell: Cell, look: Callable[[], None]) -> None:
        state = self.state
        begin(cell, state.shared)
        begun = time.monotonic()
        code = self.executor.execute(["run", str(cell.run.config)], cell.log, _now_and_then(look))
        if code == 0 and cell.is_finished:
            tidy(cell, state.shared, state.plan.study.keep)
            self.terminal.stage("cell", f"{cell.title}: {time.monotonic() - begun:.0f} s")
            return
        failure = Failure(code=code, reason=last_words(cell.log) or "it said nothing")
        failure.save(cell.failure)
        self.failed.append(cell)
        self.terminal.stage("cell", f"{cell.title}: [bold red]failed[/]")
        self.terminal.say(f"         {failure.reason}; all that it said is in '{cell.log}'")

    def _say_time_left(self, done: int, cells: int) -> None:
        """If the rest take as long as those of this session have taken."""
        self._cells += 1
        left = (cells - done) * self._cell_seconds / self._cells
        if left:
            self.terminal.stage("", f"{done} of {cells}, about {_duration(left)} left of this phase")

    def _page_on_the_way(self) -> None:
        """As long as it costs little."""
        if self._page_seconds <= _PAGE_SHARE * self._cell_seconds:
            begun = time.monotonic()
            try:
                self.state.write_page()
            except InputError:
                pass  # a study that is not done need not be one that can be compared
            except Exception as error:  # hours of training do not end for a page that is written again at the end
                self.terminal.stage("page", f"not written yet: {type(error).__name__}: {error}")
            self._page_seconds += time.monotonic() - begun


def _duration(seconds: float) -> str:
    return (
        f"{seconds / 3600:.1f} h"
        if seconds > 5400
        else f"{seconds / 60:.0f} min"
        if seconds > 90
        else f"{seconds:.0f} s"
    )


def _done(cell: Cell) -> float:
    """Share of a cell's training that is done, by its own record."""
    with suppress(InputError):
        steps = [line.step for _, line in read_log(cell.run.metrics, MetricsLine)]
        return max(steps, default=0) / cell.config.train.steps
    return 0.0


def _now_and_then(look: Callable[[], None], seconds: float = 2.0) -> Callable[[], None]:
    last = time.monotonic()

    def sparing() -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            look()

    return sparing
