"""What a study is at, from its files alone: whoever works on it, and its cells, each a run.

A cell that is planned and was not begun has no directory yet, and is not told of.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from adept_ds.base.activity import Bar
from adept_ds.base.errors import InputError
from adept_ds.base.records import Record
from adept_ds.base.run_dir import RunDirectory
from adept_ds.base.writer_lock import Holder
from adept_ds.report.status import RunStatus, State, is_run, read_sign, read_status
from adept_ds.study.cell_records import CellRecord, Failure
from adept_ds.study.directory import CELL_RECORD, FAILURE_RECORD, StudyDirectory

_WORKS = ("running", "stopping", "silent")
_ENDED_EARLY = ("stopped", "failed", "killed")


class CellStatus(Record):
    """Of a run in it."""

    name: str
    """Of its directory."""
    title: str
    """Method, learning rate, seed."""
    state: State
    why: str
    step: int
    steps: int | None
    loss: float | None
    left_seconds: float | None


class StudyStatus(Record):
    """Of the whole."""

    study: str
    state: State
    """As of a run; of a study that was submitted to Slurm, where nobody holds its lock, it follows from its cells."""
    why: str
    by: Holder | None
    doing: tuple[Bar, ...]
    cells: tuple[CellStatus, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Cells by state, the most frequent first."""
        states = [cell.state for cell in self.cells]
        return {state: states.count(state) for state in sorted(set(states), key=lambda state: -states.count(state))}


def is_study(directory: Path) -> bool:
    return StudyDirectory(directory).cells.is_dir()


def read_study_status(directory: Path, now: float | None = None) -> StudyStatus:
    """Of a directory that `is_study`."""
    now = time.time() if now is None else now
    study = StudyDirectory(directory)
    sign = read_sign(study.lock, study.activity, now)
    folders = sorted(folder for folder in study.cells.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    cells = tuple(_cell(folder, now) for folder in folders)
    works = sign.state in _WORKS
    state, why = sign.state, sign.why
    if not works and any(cell.state in _WORKS for cell in cells):
        state, why = "running", "nobody holds the study; its cells are run one by one, as by Slurm"
    elif state == "not begun" and cells:
        state = "unfinished"
    bars = sign.activity.bars if sign.activity and works else ()
    return StudyStatus(study=str(directory), state=state, why=why, by=sign.by, doing=bars, cells=cells)


def _cell(folder: Path, now: float) -> CellStatus:
    title, found = folder.name, read_status(folder, now) if is_run(folder) else None
    with suppress(InputError):
        record = CellRecord.load(folder / CELL_RECORD)
        title = ", ".join(filter(None, (record.label, record.setting, f"lr {record.lr:g}", f"seed {record.seed}")))
    state, why = _state(folder, found)
    return CellStatus(
        name=folder.name,
        title=title,
        state=state,
        why=why,
        step=found.step if found else 0,
        steps=found.steps if found else None,
        loss=found.loss if found else None,
        left_seconds=found.left_seconds if found else None,
    )


def _state(folder: Path, found: RunStatus | None) -> tuple[State, str]:
    """What is being run again counts as such; a cell whose results are there is finished, whatever was removed then."""
    if found and found.state in _WORKS:
        return found.state, found.why
    with suppress(InputError):
        if (folder / FAILURE_RECORD).is_file():
            return "failed", Failure.load(folder / FAILURE_RECORD).reason
    if found and found.state in _ENDED_EARLY:
        return found.state, found.why
    run = RunDirectory(folder)
    if run.evaluation.is_file() and run.document_losses.is_file():
        return "finished", "its results are there"
    return (found.state, found.why) if found else ("not begun", "its directory is there, and nothing else")
