"""What the guard of a run measures, and that it ended training (guard.json)."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from adept_ds.base.errors import InputError
from adept_ds.base.records import Record


class RiseLimits(Record):
    """Of the loss of some held-out documents above the base's on the same documents."""

    rise: float
    """Nats per token; below 0 where the model is the better one."""
    lower: float
    upper: float
    """Its limits, each one-sided at the confidence of the guard."""


class Reading(Record):
    """Of one evaluation, on validation documents."""

    general: dict[str, RiseLimits] = Field(min_length=1)
    """By source."""
    domain: float
    """Loss, over all sources together."""

    @property
    def worst(self) -> str:
        """The general source that has risen for certain by most."""
        return max(self.general, key=lambda name: self.general[name].lower)


class GuardStop(Record):
    """The guard has ended training (guard.json)."""

    max_general_rise: NonNegativeFloat
    confidence: float
    """By these settings of it."""
    step: PositiveInt
    """After which it ended."""
    best: NonNegativeInt
    """The step of the checkpoint that is exported; 0: none was found good."""
    reason: str

    @classmethod
    def remedy(cls) -> str:
        return "move it away, and training goes on from its newest checkpoint"

    @classmethod
    def of(cls, path: Path, max_general_rise: float, confidence: float) -> GuardStop | None:
        """Whether training was ended by these settings; by others, it may go on.

        Raises:
            InputError: it was, and there is no checkpoint to be exported; the message says what to change.
        """
        found = cls.load(path) if path.is_file() else None
        if found is None or (found.max_general_rise, found.confidence) != (max_general_rise, confidence):
            return None
        if not found.best:
            raise InputError(
                f"guard.max_general_rise: {max_general_rise:g}, but {found.reason}, and no checkpoint has less; "
                "lower train.lr in another run_dir, evaluate more often (train.eval_every), or raise it"
            )
        return found
