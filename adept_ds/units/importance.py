"""Unit importance (paper, equation 5): mean over a unit's elements of |w * dL/dw| on general text.

The gradient inside the absolute value is that of the mean token loss over one *global* probe batch, so importances
do not depend on the number of ranks. Every rank sums its own slices; one all-reduce of n_units float64 numbers is all
that is communicated beyond the backward pass itself.

General text comes from a probe corpus, in passes of its own, or from the sequences that a training batch replays.
"""

from __future__ import annotations

from typing import Any

import torch

from adept_ds.base.progress import ProgressCallback
from adept_ds.models.frozen_prefix import FrozenPrefix
from adept_ds.ranks.collectives import sum_over_ranks
from adept_ds.units.registry import UnitRegistry
from adept_ds.units.unit_sums import ProbeBatches, _has_overflowed, batch_sums, local_sums, parameters_of
from adept_ds.zero.gradients import probing_gradients


def estimate_importance(
    engine: Any,
    registry: UnitRegistry,
    probe: ProbeBatches,
    progress: ProgressCallback | None = None,
    prefix: FrozenPrefix | None = None,
) -> list[float]:
    """Importance of every unit, in registry order; the same on every rank.

    Leaves no trace in training (see `zero.probing_gradients`).

    Args:
        prefix: kept from one estimate to the next with the same `probe`, it saves the frozen layers' forward passes.
    """
    parameters = parameters_of(engine, registry)
    sums = torch.zeros(len(registry), dtype=torch.float64)
    batches = probe.global_batches()
    with probing_gradients(engine):
        for number in range(len(batches)):
            if progress:
                progress(number / len(batches), f"probe batch {number + 1} of {len(batches)}")
            sums += batch_sums(engine, registry, parameters, probe, number, prefix)[0]
    return (sum_over_ranks(sums) / (registry.sizes * len(batches))).tolist()


class OnlineImportance:
    """Running mean of importance over the training batches since it was last asked for.

    Its text is what the batches replay of the general corpus, so it needs no passes of its own. Every rank keeps sums
    of its own slices; only `take` communicates.
    """

    def __init__(self, engine: Any, registry: UnitRegistry) -> None:
        self._engine, self._registry = engine, registry
        self._parameters = parameters_of(engine, registry)
        self._sums, self._count = torch.zeros(len(registry), dtype=torch.float64), 0

    def observe(self, share: float) -> None:
        """Take in the gradient of a training batch's replayed sequences.

        To be called at their end (see `zero.end_segment`), when nothing else of the batch has had its backward pass.

        Args:
            share: of the batch, that is replayed: the loss of a training step is a mean over the whole batch.
        """
        sums = local_sums(self._engine, self._registry, self._parameters)
        if _has_overflowed(self._engine, sums):
            return  # the step will be skipped for the same reason
        self._sums += sums / share
        self._count += 1

    def take(self) -> list[float] | None:
        """Importance of every unit, in registry order, and begin anew; None if nothing was observed."""
        if not self._count:
            return None
        mean: list[float] = (sum_over_ranks(self._sums) / (self._registry.sizes * self._count)).tolist()
        self._sums, self._count = torch.zeros_like(self._sums), 0
        return mean

    def state_dict(self) -> dict[str, Any]:
        """Of this rank."""
        return {"sums": self._sums.tolist(), "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums, self._count = torch.tensor(state["sums"], dtype=torch.float64), state["count"]
