"""Unit importance (paper, equation 5): mean over a unit's elements of |w * dL/dw| on general text, or on the domain's.

One all-reduce of n_units float64 numbers is all that is communicated beyond the backward passes (see `unit_sums`).
General text comes from a corpus of its own, in passes of its own, or from the sequences that a training batch replays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from adept_ds.base.progress import ProgressCallback, by_batch
from adept_ds.models.frozen_prefix import FrozenPrefix
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.unfinished import Work
from adept_ds.units.registry import UnitRegistry
from adept_ds.units.unit_sums import GradientBatches, UnitSums
from adept_ds.zero.engine import Engine
from adept_ds.zero.gradients import gradients_outside_training

T = TypeVar("T")


@dataclass(frozen=True)
class Importances:
    """Of all units, in registry order."""

    general: list[float]
    """For general competence."""
    domain: list[float] | None = None
    """For the domain, where learning rates go by it too."""


def estimate_importance(
    engine: Engine,
    registry: UnitRegistry,
    batches: GradientBatches,
    ranks: Ranks,
    progress: ProgressCallback | None = None,
    prefix: FrozenPrefix | None = None,
    work: Work | None = None,
) -> list[float]:
    """Importance of every unit, in registry order; the same on every rank.

    Leaves no trace in training (see `gradients_outside_training`).

    Args:
        prefix: kept from one estimate to the next with the same `batches`, it saves the frozen layers' forward passes.
        work: where it is kept, batch by batch.
    """
    unit_sums, work = UnitSums(engine, registry, ranks), work or Work()
    total = work.tensor("total", len(registry))
    with gradients_outside_training(engine):
        for _, sums, _ in unit_sums.of_batches(batches, work, by_batch(progress) if progress else None, prefix):
            total += sums
    return _means(total, len(batches.global_batches()), registry, ranks)


class OnlineImportance:
    """Running mean of importance over the training batches since it was last asked for.

    Its text is what the batches replay of the general corpus, so it needs no passes of its own. Every rank keeps sums
    of its own slices; only `take` communicates.
    """

    def __init__(self, engine: Engine, registry: UnitRegistry, ranks: Ranks) -> None:
        self._registry, self._ranks = registry, ranks
        self._unit_sums = UnitSums(engine, registry, ranks)
        self._sums, self._count = torch.zeros(len(registry), dtype=torch.float64), 0
        self._last: Callable[[], torch.Tensor] | None = None
        """What the last batch adds to the sums: asked for when the host has waited for the device anyway."""

    @property
    def rank(self) -> int:
        return self._ranks.rank

    @property
    def sums(self) -> torch.Tensor:
        """[n_units] float64, of this rank."""
        self._take_in()
        return self._sums

    @property
    def count(self) -> int:
        """Of batches, on every rank."""
        self._take_in()
        return self._count

    def observe(self, share: float) -> None:
        """Take in the gradient of a training batch's replayed sequences.

        To be called at their end (see `zero.gradients.end_segment`), when nothing else of the batch has had its
        backward pass. Nothing is fetched for it: a step follows, which the host waits for.

        Args:
            share: of the batch, that is replayed: the loss of a training step is a mean over the whole batch.
        """
        self._take_in()
        sums = self._unit_sums.local_later()
        self._last = lambda: sums() / share

    def take_back(self) -> None:
        """Forget the last batch: its step was skipped, on every rank; in fp16 since gradients may have overflowed."""
        self._last = None

    def take(self) -> list[float] | None:
        """Importance of every unit, in registry order, and begin anew; None if nothing was observed."""
        if not self.count:
            return None
        mean = _means(self.sums, self.count, self._registry, self._ranks)
        self._sums, self._count = torch.zeros_like(self.sums), 0
        return mean

    def share_of(self, written: Sequence[T]) -> Sequence[T]:
        """Of what ranks wrote, each one thing, in the order of these ranks, what this rank takes over: its own share,
        or several, or none."""
        return written[self._ranks.rank :: self._ranks.world_size]

    def go_on(self, shares: Sequence[torch.Tensor], count: int) -> None:
        """Go on from the `sums` of `share_of` all ranks that there were. Only the sum over ranks counts."""
        self._sums, self._count = sum(shares, torch.zeros(len(self._registry), dtype=torch.float64)), count

    def _take_in(self) -> None:
        """After the step of the last batch, which the host has waited for."""
        if self._last is not None:
            self._sums = self._sums + self._last()
            self._count += 1
            self._last = None


def _means(total: torch.Tensor, count: int, registry: UnitRegistry, ranks: Ranks) -> list[float]:
    """From this rank's sums over `count` batches to means over elements and batches."""
    means: list[float] = (ranks.sum(total) / (registry.sizes * count)).tolist()
    return means
