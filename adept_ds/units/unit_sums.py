"""Sums over the elements of units, partition by partition: what stages one and two estimate importances from.

The gradient is that of the mean token loss over one *global* batch of general text, so what is summed does not depend
on the number of ranks. Every rank sums its own slices, and nothing is communicated beyond the backward pass itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from adept_ds.data.blocks import Blocks
from adept_ds.data.order import rank_batches
from adept_ds.models.device import host_copy
from adept_ds.models.frozen_prefix import FrozenPrefix
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.unfinished import Work
from adept_ds.units.placement import Stack, stacked
from adept_ds.units.registry import UnitRegistry
from adept_ds.zero.engine import Engine
from adept_ds.zero.gradients import clear_gradients, local_weight_and_grad, loss_scale, set_loss_scale

Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From elements of a weight and of its gradient to what is summed over a unit."""


def weight_times_grad(weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """|w * dL/dw| (paper, equation 5)."""
    return (weight * grad).abs_()


def grad_squared(weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """(dL/dw)^2, the diagonal of the empirical Fisher matrix."""
    return grad.float().square()


@dataclass(frozen=True)
class GradientBatches:
    """General text in global batches, for gradients that are taken outside training; the same for a whole run."""

    blocks: Blocks
    indices: tuple[int, ...]
    batch_sequences: int
    micro_batch_size: int

    def global_batches(self) -> list[list[int]]:
        step = self.batch_sequences
        return [list(self.indices[start : start + step]) for start in range(0, len(self.indices), step)]

    def batches_within(self, num_bytes: int, bytes_per_token: int) -> int:
        """How many micro-batches' hidden states fit into `num_bytes`."""
        return num_bytes // (self.micro_batch_size * self.blocks.seq_len * bytes_per_token)


class UnitTotals:
    """A total for each unit, gathered parameter by parameter; may be used again and again.

    Rows and columns are summed where the elements are, in float64, so that the split over ranks does not show; what is
    left, a number for each of them, is copied to the host once. The order of all sums is fixed.
    """

    def __init__(self, registry: UnitRegistry) -> None:
        self._registry = registry
        self._known: dict[tuple[str, int, int], tuple[list[Stack], torch.Tensor]] = {}
        """The tiles of each run of elements, and the units of their rows and columns."""
        self._sums: list[torch.Tensor] = []
        self._units: list[torch.Tensor] = []

    def add(self, parameter: str, start: int, values: torch.Tensor) -> None:
        """Add to each unit the sum of its values.

        Args:
            values: [n], of the n elements of the flattened parameter that begin with element `start`.
        """
        run = (parameter, start, start + values.numel())
        if not values.numel():
            return
        if run not in self._known:
            tiles = list(self._registry.tiles(*run))
            self._known[run] = stacked(tiles), torch.cat([tile.units for tile in tiles])
        stacks, units = self._known[run]
        self._units.append(units)
        self._sums += [stack.line_sums(values) for stack in stacks]

    def take(self) -> torch.Tensor:
        """[n_units] float64 on the host, and begin anew."""
        sums, units = self._taken()
        return self._by_unit(sums.cpu(), units)

    def take_later(self) -> Callable[[], torch.Tensor]:
        """The same, for which the host does not wait: what is returned may be called when it has waited for something
        that the device does later."""
        sums, units = self._taken()
        return partial(self._by_unit, host_copy(sums), units)

    def _taken(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of rows and columns, float64 where they are, and the unit of each."""
        sums, units = self._sums or [torch.zeros(0, dtype=torch.float64)], self._units or [torch.zeros(0).long()]
        self._units, self._sums = [], []
        return torch.cat(sums), torch.cat(units)

    def _by_unit(self, sums: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
        """On the host, where they are added up in the same order every time."""
        return torch.zeros(len(self._registry), dtype=torch.float64).index_add_(0, units, sums)


class UnitSums:
    """Sums of a score over this rank's elements of every unit.

    Args:
        score: by default |w * g|.
    """

    def __init__(self, engine: Engine, registry: UnitRegistry, ranks: Ranks, score: Score = weight_times_grad) -> None:
        self._engine, self._registry, self._ranks, self._score = engine, registry, ranks, score
        self._totals = UnitTotals(registry)
        named = engine.module.named_parameters()
        self._parameters: list[tuple[str, Any]] = [(name, p) for name, p in named if name in registry.placements]

    def local(self) -> torch.Tensor:
        """[n_units] float64 on the host, from the gradients that the engine holds right now; copied once from there."""
        self._add_all()
        return self._totals.take()

    def local_later(self) -> Callable[[], torch.Tensor]:
        """The same, for which the host does not wait (see `UnitTotals.take_later`)."""
        self._add_all()
        return self._totals.take_later()

    @torch.no_grad()
    def _add_all(self) -> None:
        for name, parameter in self._parameters:
            found = local_weight_and_grad(self._engine, parameter)
            if found is not None:
                weight, grad, start = found
                self._totals.add(name, start, self._score(weight, grad))

    def of_batches(
        self,
        batches: GradientBatches,
        work: Work | None = None,
        begin: Callable[[int, int], None] | None = None,
        prefix: FrozenPrefix | None = None,
        read: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """The number of each global batch, and what `of_batch` says of it.

        Args:
            work: where all of it is kept; what was done before is left out.
            begin: see `Work.steps`.
            read: called once for each, with its number, while its gradients are there.
        """
        work = work or Work()
        scale = work.tensor("loss_scale", 1)
        if scale.item():
            set_loss_scale(self._engine, scale.item())
        for number in work.steps(len(batches.global_batches()), begin):
            sums, losses = self.of_batch(batches, number, prefix, partial(read, number) if read else None)
            scale.fill_(loss_scale(self._engine))
            yield number, sums, losses

    def of_batch(
        self,
        batches: GradientBatches,
        number: int,
        prefix: FrozenPrefix | None = None,
        read: Callable[[], None] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sums for one global batch, and the summed loss of each of its rows on this rank.

        In fp16 the loss scale that training has arrived at may be too large for these gradients: it is lowered until
        all are finite.

        Args:
            read: called once, while these gradients are there.
        """
        while True:
            losses = backward_global_batch(self._engine, batches, number, self._ranks, prefix)
            sums = self.local()
            overflowed = self.have_overflowed(sums)
            if read and not overflowed:
                read()
            clear_gradients(self._engine)
            if not overflowed:
                return sums, losses
            set_loss_scale(self._engine, max(1.0, loss_scale(self._engine) / 16))

    def have_overflowed(self, sums: torch.Tensor) -> bool:
        """Whether loss scaling (fp16) was too much for the gradients of any rank."""
        if loss_scale(self._engine) <= 1:
            return False
        return bool(self._ranks.max(float(not sums.isfinite().all()))[0])


def backward_global_batch(
    engine: Engine, batches: GradientBatches, number: int, ranks: Ranks, prefix: FrozenPrefix | None = None
) -> torch.Tensor:
    """Gradient of the mean token loss over global batch `number`, which is spread over the ranks.

    Returns the summed loss of each of this rank's rows, in the order of `rank_batches`, fillers included; float32.
    """
    batch = batches.global_batches()[number]
    total_tokens = batches.blocks.predicted_tokens(batch)
    micro_batches = rank_batches(batch, ranks.rank, ranks.world_size, batches.micro_batch_size)
    row_losses = []
    for position, indices in enumerate(micro_batches):
        inputs = batches.blocks.batch(indices).to(engine.device)
        engine.set_gradient_accumulation_boundary(position == len(micro_batches) - 1)
        # DeepSpeed averages over ranks; times world_size, the sum over ranks is left.
        with prefix.at((number, position)) if prefix else nullcontext():
            losses = engine(*inputs)
            engine.backward(losses.sum() * (ranks.world_size / total_tokens), scale_wrt_gas=False)
        row_losses.append(losses.detach())
    return torch.cat(row_losses).cpu()
