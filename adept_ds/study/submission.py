"""`adept compare STUDY --submit`: the cells that are still to run, as one Slurm array for each phase.

Which cell a task is depends on the plan alone: the search is listed, and so are all cells that the second phase may
need, of which those run whose learning rate the search has chosen by then. Cells that share a probe, tokens or the
base's evaluation wait for the first of them, which makes these.

    leaders -> search -> confirm -> report          each after the end of the one before, whatever that was
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from adept_ds.base.errors import AdeptError, InputError
from adept_ds.base.files import write_text
from adept_ds.base.records import Record
from adept_ds.ranks.start_scripts import sbatch_line
from adept_ds.study.cells import Cell
from adept_ds.study.running import StudyState, begin

Phase = Literal["search", "confirm"]

_SCRIPT = "study.sbatch"
_STUDY = "study.yaml"
"""The study as it was submitted: tasks start later, when the file may be another."""


class Job(Record):
    """One call of sbatch."""

    name: str
    phase: str
    """Argument of the script."""
    array: str | None
    """Indices, as sbatch takes them."""
    after: str | None
    """Name of the job whose end it waits for."""
    cells: tuple[str, ...]
    """Directories, where they are known."""


class Submission(Record):
    """Of a whole study."""

    script: str
    jobs: list[Job]
    at_once: int | None = None
    ids: dict[str, str]
    """Slurm's, by name; none after a dry run."""

    def lines(self) -> Iterable[str]:
        for job in self.jobs:
            placeholder = {job.after: f"<{job.after}>"} if job.after and job.after not in self.ids else {}
            number = f"{self.ids[job.name]}  " if job.name in self.ids else ""
            command = shlex.join(self.command(job, self.ids | placeholder))
            yield f"{job.name:<8} {len(job.cells)} cells  {number}{command}"

    def command(self, job: Job, ids: dict[str, str]) -> list[str]:
        limit = f"%{self.at_once}" if self.at_once and job.array else ""
        return [
            "sbatch",
            "--parsable",
            *([f"--dependency=afterany:{ids[job.after]}"] if job.after else []),
            *([f"--array={job.array}{limit}"] if job.array else []),
            self.script,
            job.phase,
        ]


@dataclass(frozen=True)
class _Places:
    """What stands behind the indices of a phase."""

    state: StudyState

    def of(self, phase: Phase) -> list[Cell]:
        plan = self.state.plan
        if phase == "search":
            return plan.search
        return plan.possible_confirmations

    def waiting(self, phase: Phase) -> dict[int, Cell]:
        cells = self.of(phase)
        wanted = self.state.wanted(cells)
        return {index: cell for index, cell in enumerate(cells) if cell in wanted and not cell.is_finished}


def submit(state: StudyState, *, dry_run: bool) -> Submission:
    """Write the script, and call sbatch for each job unless it is a dry run.

    Raises:
        InputError: nothing is left to run.
        AdeptError: sbatch failed.
    """
    script = _write_script(state)
    slurm = state.plan.study.slurm
    planned = Submission(script=str(script), jobs=_jobs(state), at_once=slurm.at_once, ids={})
    if dry_run:
        return planned
    ids = dict[str, str]()
    for job in planned.jobs:
        ids[job.name] = _sbatch(planned.command(job, ids))
    return planned.model_copy(update={"ids": ids})


def cell_at(state: StudyState, address: str) -> str | None:
    """Make a cell of a submitted study ready; its configuration, or None where there is nothing to run.

    Args:
        address: PHASE:INDEX.
    """
    phase, _, number = address.partition(":")
    if phase not in ("search", "confirm") or not number.isdigit():
        raise InputError(f"--cell: '{address}' is none; write search:INDEX or confirm:INDEX")
    waiting = _Places(state).waiting("search" if phase == "search" else "confirm")
    cell = waiting.get(int(number))
    if cell is None:
        return None
    if phase == "confirm" and cell not in state.confirmations():
        return None
    state.tidy()
    begin(cell, state.shared)
    return str(cell.run.config)


def _jobs(state: StudyState) -> list[Job]:
    places = _Places(state)
    search, confirm = places.waiting("search"), places.waiting("confirm")
    if not search:  # what it has chosen is known
        chosen = state.confirmations()
        confirm = {index: cell for index, cell in confirm.items() if cell in chosen}
    leaders, others = _leaders(state, search)
    jobs = list[Job]()
    phases = (("leaders", "search", leaders), ("search", "search", others), ("confirm", "confirm", confirm))
    for name, phase, cells in phases:
        if cells:
            after = jobs[-1].name if jobs else None
            names = tuple(cell.run.root.name for cell in cells.values())
            jobs.append(Job(name=name, phase=phase, array=ranges(sorted(cells)), after=after, cells=names))
    if not jobs:
        raise InputError("--submit: every cell has finished; `adept compare STUDY --report` writes the page")
    return [*jobs, Job(name="report", phase="report", array=None, after=jobs[-1].name, cells=())]


def _leaders(state: StudyState, cells: dict[int, Cell]) -> tuple[dict[int, Cell], dict[int, Cell]]:
    """Those that make what others share, and the others; all are others where it is there."""
    leaders, keys = dict[int, Cell](), set[str]()
    for index, cell in cells.items():
        key = state.shared.key(cell.inputs)
        if not state.shared.has(cell.inputs) and key not in keys:
            keys.add(key)
            leaders[index] = cell
    others = {index: cell for index, cell in cells.items() if index not in leaders}
    return (leaders, others) if others else ({}, leaders)


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as sbatch takes them: 0-2,5."""
    parts = list[list[int]]()
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def _write_script(state: StudyState) -> Path:
    plan = state.plan
    folder = plan.directory.submission
    write_text(folder / _STUDY, plan.checked.path.read_text(encoding="utf-8"))
    script = folder / _SCRIPT
    arguments = [*plan.checked.overrides, *([f"--scale={state.scale:g}"] if state.scale != 1 else [])]
    env = Environment(loader=FileSystemLoader(Path(__file__).parent / "templates"), undefined=StrictUndefined,
                      trim_blocks=True, keep_trailing_newline=True)  # fmt: skip
    text = env.get_template("study.sbatch.j2").render(
        script=script,
        options=list(map(sbatch_line, [f"--output={folder / '%x-%A_%a.out'}", *plan.study.slurm.options])),
        python=shlex.quote(sys.executable),
        study=shlex.quote(str(folder / _STUDY)),
        arguments=list(map(shlex.quote, arguments)),
    )
    write_text(script, text)
    return script


def _sbatch(command: Sequence[str]) -> str:
    """The number of the job."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise InputError(f"--submit: sbatch cannot be started ({error.strerror}); run it where Slurm is") from None
    if done.returncode:
        raise AdeptError(f"--submit: `{shlex.join(command)}` failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip().partition(";")[0]
