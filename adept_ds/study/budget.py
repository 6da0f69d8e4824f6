"""What every cell may spend: as many tokens as any other, or as much time.

Tokens are those of training batches. What a method reads beside them, to be anchored or to estimate importances, counts
as time alone: a step's seconds have the anchor's in them.

Equal time counts all that a method needs beside its steps. With s seconds a step, r a refresh, one every e steps, and f
for what comes before the first step (probing, preparation), a cell of n steps takes

    f + n s + floor((n - 1) / e) r

and n is the largest number for which this is within the budget.
"""

from __future__ import annotations

import math

from pydantic import NonNegativeFloat, PositiveFloat

from adept_ds.base.errors import InputError
from adept_ds.base.records import Record
from adept_ds.config.schema import Config
from adept_ds.study.schema import Budget


class Rate(Record):
    """What a method takes on this machine, measured alone, in seconds."""

    step_seconds: PositiveFloat
    """Of an optimizer step: median."""
    refresh_seconds: NonNegativeFloat = 0.0
    """Of an estimate of importances during training: median."""
    preparation_seconds: NonNegativeFloat = 0.0
    """Before the first step: anchors, the first estimate."""
    probe_seconds: NonNegativeFloat = 0.0
    """Of choosing layers."""

    @property
    def before_training(self) -> float:
        return self.preparation_seconds + self.probe_seconds

    def seconds(self, steps: int, every: int | None) -> float:
        """That so many steps take; `every`: steps between refreshes, None without any."""
        refreshes = (steps - 1) // every if every else 0
        return self.before_training + steps * self.step_seconds + refreshes * self.refresh_seconds

    def steps_within(self, seconds: float, every: int | None) -> int:
        """The largest number of steps that fits; 0 where none does."""
        cost = self.step_seconds + (self.refresh_seconds / every if every else 0.0)
        steps = max(0, math.ceil((seconds - self.before_training) / cost) + 2 + (every or 0))
        while steps and self.seconds(steps, every) > seconds:
            steps -= 1
        return steps


def tokens_per_step(config: Config) -> int:
    return config.train.global_batch_size * config.data.seq_len


def refreshed_every(config: Config) -> int | None:
    """Steps between refreshes; None where there are none."""
    refreshes = config.method.estimates_again or (config.refreshes and config.importance.source == "corpus")
    return config.importance.every if refreshes else None


def steps_of(budget: Budget, config: Config, origin: str, rate: Rate | None = None) -> int:
    """Optimizer steps of a cell.

    Args:
        config: of the cell; its own number of steps does not matter.
        rate: of its method; for equal time.

    Raises:
        InputError: there is not one.
    """
    if budget.tokens is not None:
        steps = budget.tokens // tokens_per_step(config)
        if not steps:
            raise InputError(
                f"budget.tokens: {budget.tokens} is less than one step of {origin}, {config.train.global_batch_size} "
                f"sequences of {config.data.seq_len} tokens; give more"
            )
        return steps
    assert budget.seconds is not None
    assert rate is not None
    steps = rate.steps_within(budget.seconds, refreshed_every(config))
    if not steps:
        raise InputError(
            f"budget.seconds: {budget.seconds:g} leaves {origin} without a step: {rate.before_training:.1f} s go by "
            f"before the first, and each takes {rate.step_seconds:.2f} s; give more"
        )
    return steps


def scaled(budget: Budget, factor: float) -> Budget:
    """Of a larger machine."""
    if budget.tokens is not None:
        return budget.model_copy(update={"tokens": max(1, round(budget.tokens * factor))})
    assert budget.seconds is not None
    return budget.model_copy(update={"seconds": budget.seconds * factor})
