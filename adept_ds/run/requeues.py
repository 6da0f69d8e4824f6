"""How far a run has come, and whether a job that was stopped goes back into the queue.

A job may be started for ever as long as each start keeps something new; one that keeps nothing new is given up after a
few. What counts is what the next start goes on with, never what was computed and is lost:

    stages that have finished > the newest checkpoint > steps of works that are kept > tokens that are written

Works go when their stage has finished, so the former count for more than the latter. Imports no torch.
"""

from __future__ import annotations

from contextlib import suppress
from functools import total_ordering
from pathlib import Path

from pydantic import NonNegativeInt

from adept_ds.base.errors import InputError
from adept_ds.base.files import read_json
from adept_ds.base.records import Record
from adept_ds.base.run_dir import RunDirectory, checkpoint_steps


@total_ordering
class Kept(Record):
    """Of a run, at some time; what is farther is greater."""

    stages: NonNegativeInt = 0
    """That have finished."""
    step: NonNegativeInt = 0
    """Of the newest checkpoint."""
    work_steps: NonNegativeInt = 0
    """Of all works that are unfinished (see `ranks.unfinished`)."""
    tokens: NonNegativeInt = 0
    """Of all texts that are tokenised, or were begun to be."""

    @classmethod
    def by(cls, run: RunDirectory) -> Kept:
        """As the files of the run tell it; what cannot be read counts for nothing."""
        return cls(
            stages=len(_read(run.ledger)) + run.expansion.is_file(),
            step=max(checkpoint_steps(run.checkpoints), default=0),
            work_steps=sum(_number(file, "steps") for file in run.unfinished.rglob("steps.json")),
            tokens=sum(_number(file, "tokens") for file in _token_records(run.tokens)),
        )

    def __lt__(self, other: Kept) -> bool:
        return tuple(self.model_dump().values()) < tuple(other.model_dump().values())

    def __str__(self) -> str:
        if self.stages or self.step:
            return f"{self.stages} stages, and step {self.step} of training"
        return f"{self.work_steps} steps of work, {self.tokens} tokens"


class Requeues(Record):
    """Of one job (cache/requeues.json)."""

    job: str
    farthest: Kept
    """That was kept when it was last stopped."""
    fruitless: NonNegativeInt = 0
    """Starts in a row that have kept nothing new."""

    @classmethod
    def of(cls, job: str, run: RunDirectory) -> Requeues:
        """As it stands at a start of the job: a job that was submitted anew begins at 0."""
        found = Kept.by(run)
        with suppress(InputError):
            before = cls.load(run.requeues)
            if before.job == job:
                return before.model_copy(update={"farthest": max(before.farthest, found)})
        return cls(job=job, farthest=found)

    def after(self, kept: Kept) -> Requeues:
        """When this start has ended."""
        if kept > self.farthest:
            return Requeues(job=self.job, farthest=kept)
        return self.model_copy(update={"fruitless": self.fruitless + 1})


def _token_records(tokens: Path) -> list[Path]:
    return [*tokens.rglob("manifest.json"), *tokens.rglob("so_far.json")]


def _number(file: Path, key: str) -> int:
    found = _read(file).get(key)
    return found if isinstance(found, int) else 0


def _read(file: Path) -> dict[str, object]:
    with suppress(OSError, ValueError):
        found = read_json(file)
        if isinstance(found, dict):
            return found
    return {}
